"""The launcher of ranks (T8, T9, T10), over programs that end as ranks end: what it starts, passes on and returns."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from nestseg.core.errors import RunError
from nestseg.engine.launch import launch_devices

# In place of Python, so that a rank starts at once. It notes how it was started and each signal that comes; NESTSEG_ACT
# says in bash what to do then.
RANK = """#!/bin/bash
note() { echo "$@" >> "$NESTSEG_NOTES"; }
fail() { printf '{"message": {"message": "%s", "extraInfo": {"py_callstack": "trace of %s"}}, "nanoseconds": %s,
    "code": %s}' "$1" "$1" "$2" "$3" > "$TORCHELASTIC_ERROR_FILE"; exit 1; }
trap 'note "$RANK TERM"; exit 75' TERM
trap 'note "$RANK USR1"; exit 75' USR1
note "$RANK of $WORLD_SIZE start $TORCHELASTIC_RESTART_COUNT: $*"
work() { for _ in $(seq 200); do sleep 0.05; done; }
eval "$NESTSEG_ACT"
"""


class Launched(NamedTuple):
    """What a launch came to."""

    code: int
    notes: list[str]
    seconds: float


@pytest.fixture
def run_launcher(tmp_path, monkeypatch) -> Callable[..., Launched]:
    """Launch two ranks that do ``act``; ``signals`` are sent to the launcher once both have started."""
    program, notes, run = tmp_path / "rank", tmp_path / "notes", tmp_path / "run"
    program.write_text(RANK)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setenv("NESTSEG_NOTES", str(notes))

    def launch(act: str, *signals: int, words: tuple[str, ...] = (), max_restarts: int = 3) -> Launched:
        monkeypatch.setenv("NESTSEG_ACT", act)
        notes.write_text("")
        started = time.monotonic()

        def send() -> None:
            while notes.read_text().count("start") < 2:
                time.sleep(0.01)
            for signum in signals:
                os.kill(os.getpid(), signum)
                time.sleep(0.3)

        sender = threading.Thread(target=send)
        if signals:
            sender.start()
        try:
            arguments = ["train", "demo", "--run", str(run), "--devices", "2", *words]
            code = launch_devices(arguments, run=run, devices=2, max_restarts=max_restarts)
        finally:
            if signals:
                sender.join()
        return Launched(code, sorted(notes.read_text().splitlines()), time.monotonic() - started)

    return launch


def claim(run: Path) -> None:
    run.mkdir()
    (run / "recipe.yaml").write_text("name: other\n")


def test_every_rank_gets_the_words_and_its_place(run_launcher, tmp_path):
    result = run_launcher("exit 0", words=("--device", "cpu"))
    words = f"-m nestseg train demo --run {tmp_path / 'run'} --device cpu"
    assert result.code == 0
    assert result.notes == [f"0 of 2 start 0: {words}", f"1 of 2 start 0: {words}"]


def test_devices_may_be_spelled_with_an_equals_sign(run_launcher):
    assert all("--devices" not in note for note in run_launcher("exit 0", words=("--devices=2",)).notes)


@pytest.mark.parametrize(("signum", "name"), [(signal.SIGTERM, "TERM"), (signal.SIGUSR1, "USR1")])
def test_a_signal_reaches_every_rank_once_and_nobody_starts_again(run_launcher, signum, name):
    result = run_launcher("work", signum)
    assert result.code == 75
    assert [note for note in result.notes if name in note] == [f"0 {name}", f"1 {name}"]
    assert sum("start" in note for note in result.notes) == 2


def test_a_second_signal_kills_ranks_that_do_not_stop(run_launcher):
    result = run_launcher("trap '' TERM; while true; do sleep 0.05; done", signal.SIGTERM, signal.SIGINT)
    assert result.code == 128 + signal.SIGINT
    assert result.seconds < 5


def test_ranks_that_a_signal_ends_before_they_listen_do_not_start_again(run_launcher):
    result = run_launcher("trap - TERM; work", signal.SIGTERM)
    assert result.code == 128 + signal.SIGTERM
    assert sum("start" in note for note in result.notes) == 2


def test_a_killed_rank_ends_the_others_and_all_resume(run_launcher, tmp_path, capfd):
    act = f"""
        if [ "$TORCHELASTIC_RESTART_COUNT" = 1 ]; then exit 0; fi
        mkdir -p {tmp_path}/run; touch {tmp_path}/run/recipe.yaml
        if [ "$RANK" = 1 ]; then kill -KILL $$; fi
        while true; do sleep 0.05; done"""
    result = run_launcher(act)
    assert result.code == 0
    assert [note.endswith("--resume") for note in result.notes] == [False, True, False, True]
    assert capfd.readouterr().err == "rank 1 was killed by SIGKILL; all start again (1 of 3)\n"


def test_ranks_killed_before_there_was_a_run_start_from_the_beginning(run_launcher):
    result = run_launcher('[ "$TORCHELASTIC_RESTART_COUNT" = 1 ] || kill -KILL $$')
    assert result.code == 0
    assert not any("--resume" in note for note in result.notes)


def test_a_folder_of_another_run_is_not_resumed_after_a_kill(run_launcher, tmp_path):
    claim(tmp_path / "run")
    result = run_launcher('[ "$TORCHELASTIC_RESTART_COUNT" = 1 ] || kill -KILL $$')
    assert not any("--resume" in note for note in result.notes)


def test_ranks_are_not_started_for_ever(run_launcher):
    with pytest.raises(RunError, match=r"E-RUN-044.*killed by SIGKILL") as caught:
        run_launcher("kill -KILL $$", max_restarts=2)
    assert "after 2 restarts" in caught.value.reason


def test_the_first_error_is_printed_and_no_other(run_launcher, capfd):
    # rank 0 writes last, but failed first
    act = """if [ "$RANK" = 0 ]; then sleep 0.3; fail "E-DATA-001 | a | b | fix: c" 5 '"E-DATA-001"'; fi
        fail "Connection closed" 6 null"""
    result = run_launcher(act)
    assert result.code == 1
    assert sum("start" in note for note in result.notes) == 2
    errors = capfd.readouterr().err
    assert errors == "error: E-DATA-001 | a | b | fix: c\nthat was rank 0 of 2, the first to fail\n"


def test_the_traceback_of_a_bug_is_printed(run_launcher, capfd):
    assert run_launcher('[ "$RANK" = 1 ] || work; fail "KeyError: 7" 5 null').code == 1
    assert "trace of KeyError: 7\nthat was rank 1 of 2" in capfd.readouterr().err


def test_ranks_start_again_where_one_did_not_answer(run_launcher, capfd):
    act = """[ "$TORCHELASTIC_RESTART_COUNT" = 1 ] && exit 0
        [ "$RANK" = 1 ] && kill -STOP $$
        fail "no answer from rank 1" 5 '"E-RUN-040"'"""
    result = run_launcher(act)
    assert result.code == 0
    assert capfd.readouterr().err == "no answer from rank 1; all start again (1 of 3)\n"


def test_a_rank_of_torchrun_starts_no_ranks(run_launcher, monkeypatch):
    place = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    for name, value in zip(place, ("0", "0", "2", "2", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(RunError, match="E-RUN-047"):
        run_launcher("exit 0")


def test_less_than_one_device_is_refused(tmp_path):
    with pytest.raises(RunError, match="E-RUN-047"):
        launch_devices(["train"], run=tmp_path, devices=0)


SLURM = Path(__file__).parents[2] / "examples" / "slurm"
STUB = """#!/bin/bash
echo "$(basename "$0") $*" >> "$NESTSEG_NOTES"
[ "$(basename "$0")" = scontrol ] && { [ "$1" = show ] && echo first; exit 0; }
trap 'sleep 0.3; exit 75' USR1 TERM
for _ in $(seq "$NESTSEG_STEPS"); do sleep 0.05; done
exit "$NESTSEG_CODE"
"""


@pytest.fixture
def submit(tmp_path, monkeypatch) -> Callable[..., tuple[int, str]]:
    """Run a job script with stand-ins for what a cluster has; returns its exit code and the commands it gave."""
    notes, folder = tmp_path / "notes", tmp_path / "bin"
    folder.mkdir()
    for name in ("nestseg", "srun", "scontrol"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "32", "SLURM_JOB_NODELIST": "a[1-2]"}
    path = f"{folder}:{os.environ['PATH']}"

    def run(script: str, *, signum: int = 0, steps: int = 200, code: int = 0) -> tuple[int, str]:
        notes.write_text("")
        own = {"PATH": path, "NESTSEG_NOTES": str(notes), "NESTSEG_STEPS": str(steps), "NESTSEG_CODE": str(code)}
        with subprocess.Popen(["bash", str(SLURM / script)], env=os.environ | job | own) as process:
            while " train " not in notes.read_text():
                time.sleep(0.01)
            # until the stand-in listens
            time.sleep(0.2)
            if signum:
                process.send_signal(signum)
            return process.wait(20), notes.read_text()

    return run


@pytest.mark.parametrize("script", ["one_node.sh", "several_nodes.sh"])
def test_job_scripts_for_slurm_queue_again_what_stopped_at_a_checkpoint(submit, script):
    subprocess.run(["bash", "-n", str(SLURM / script)], check=True)
    code, commands = submit(script, signum=signal.SIGUSR1)
    assert code == 75
    assert commands.endswith("scontrol requeue 7\n")
    assert "--resume --allow-fresh" in commands


@pytest.mark.parametrize("script", ["one_node.sh", "several_nodes.sh"])
@pytest.mark.parametrize("code", [0, 1])
def test_job_scripts_for_slurm_end_as_the_training_ends(submit, script, code):
    ended, commands = submit(script, steps=1, code=code)
    assert ended == code
    assert "requeue" not in commands


NUM_RANK_KILLS = int(os.environ.get("NESTSEG_RANK_KILLS", "3"))


def find_ranks(launcher: int) -> list[int]:
    """The processes of a launcher's ranks, in order of rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    places = [Path(f"/proc/{child}/environ").read_bytes().split(b"\0") for child in children]
    ranks = [next(int(word[5:]) for word in words if word.startswith(b"RANK=")) for words in places]
    return [int(child) for _, child in sorted(zip(ranks, children, strict=True))]


def steps_of_sessions(log: Path) -> list[list[int]]:
    """Steps that a run's log tells of, a list for each time that the run was started."""
    sessions: list[list[int]] = []
    for line in log.read_text().splitlines() if log.exists() else []:
        record = json.loads(line)
        if record["kind"] == "start":
            sessions.append([])
        elif record["kind"] == "step":
            sessions[-1].append(record["step"])
    return sessions


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, NUM_RANK_KILLS))]
)
def test_t8_ranks_train_again_soon_after_one_was_killed(make_job, uninterrupted, note_figure, seed):
    """F4: promised are 30 s on a quiet machine; tests share theirs, and the ranks import torch anew."""
    draw = random.Random(seed)
    victim, step = draw.randrange(2), draw.randint(2, 7)
    job = make_job(ranks=2)
    log, output = job.run / "log.jsonl", job.folder / "output.txt"

    def wait_for(count: int, step: int) -> float:
        end = time.monotonic() + 120
        while not (len(found := steps_of_sessions(log)) == count and found[-1] and found[-1][-1] >= step):
            assert time.monotonic() < end, output.read_text()
            time.sleep(0.01)
        return time.monotonic()

    words = ["train", str(job.recipe), "--data", str(job.data), "--run", str(job.run), "--device", "cpu", "--devices=2"]
    with (
        output.open("w") as file,
        subprocess.Popen(
            [sys.executable, "-m", "nestseg", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as launcher,
    ):
        wait_for(1, step)
        os.kill(find_ranks(launcher.pid)[victim], signal.SIGKILL)
        killed = time.monotonic()
        seconds = round(wait_for(2, 1) - killed, 1)
        assert launcher.wait(120) == 0, output.read_text()
    equal = job.fingerprint() == uninterrupted(ranks=2).fingerprint
    note_figure("F4", seed=seed, rank=victim, killed_after_step=step, seconds=seconds, equal=equal)
    assert f"rank {victim} was killed by SIGKILL; all start again (1 of 3)" in output.read_text()
    assert equal
    assert seconds < 90
