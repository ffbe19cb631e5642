"""Two processes train like one."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from nestseg.cli import build_parser
from nestseg.engine.evaluate_model import evaluate_model
from nestseg.store.files import read_model_file

SETTINGS = (
    # what depends on how a batch is split is switched off, so that only the split itself is tested
    "backbone.norm=frozen_batch",
    "backbone.zero_init_residual=false",
    "head.norm=frozen_batch",
    "head.dropout=0",
    "head.channels=16",
    "data.crop_size=[64, 64]",
    "data.batch_size=4",
    "data.num_workers=0",
    "optimizer.name=sgd",
    "optimizer.lr=0.01",
    "checkpoint.every_steps=2",
    "evaluation.every_steps=4",
    "evaluation.max_images=3",
)


TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "nestseg",
    "--",
]


def train(run: Path, launcher: list[str], *changes: str) -> None:
    options = [word for setting in (*SETTINGS, *changes) for word in ("--set", setting)]
    command = [*launcher, "train", "demo", "--run", str(run), "--max-steps", "4", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    result = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def test_two_ranks_end_where_one_does(tmp_path):
    train(tmp_path / "one", [sys.executable, "-m", "nestseg"])
    train(tmp_path / "two", TORCHRUN)
    one, _ = read_model_file(tmp_path / "one" / "model.safetensors")
    two, _ = read_model_file(tmp_path / "two" / "model.safetensors")
    assert one.keys() == two.keys()
    moved = 0
    start, _ = read_model_file(tmp_path / "one" / "checkpoints" / "step-00000002" / "model.safetensors")
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-6), name
        moved += int(not torch.equal(value, start[name]))
    assert moved > 50
    scores = [json.loads((tmp_path / run / "evaluation" / "metrics.json").read_text()) for run in ("one", "two")]
    assert scores[0]["num_images"] == scores[1]["num_images"] == 3
    pixels = [sum(map(sum, score["confusion_matrix"])) for score in scores]
    assert pixels[0] == pixels[1] == 3 * 128 * 256


def test_ranks_score_the_model_that_is_saved(tmp_path):
    # on the processor each rank has batch statistics of its own, and those of the first are saved
    norms = ("backbone.norm=batch", "head.norm=batch", "data.batch_size=6", "evaluation.max_images=null")
    train(tmp_path, TORCHRUN, *norms)
    during = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    result = evaluate_model(tmp_path, None, out=tmp_path / "again", device="cpu")
    assert during["confusion_matrix"] == result.confusion.counts[:, :-1].tolist()


def torchrun_passes(*words: str) -> bool:
    """Whether torchrun hands words on to the program unchanged."""
    try:
        given = get_args_parser().parse_args(["--nproc-per-node=2", "-m", "nestseg", *words]).training_script_args
    except SystemExit:
        return False
    return given[given[:1] == ["--"] :] == list(words)[words[:1] == ("--",) :]


def test_torchrun_passes_on_every_option_of_train_but_run(capsys):
    verbs = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    options = [option for action in verbs.choices["train"]._actions for option in action.option_strings]
    assert "--run" in options
    # torchrun looks for short forms of its own options in the words of the program too, as argparse did until it was
    # mended in Python 3.12.8 and 3.13.1 (python/cpython#58573, pytorch/pytorch#120601)
    mended = sys.version_info >= (3, 13, 1) or (3, 12, 8) <= sys.version_info < (3, 13)
    assert [option for option in options if not torchrun_passes("train", "demo", option)] == (
        [] if mended else ["--run"]
    )
    assert torchrun_passes("--", "train", "demo", "--run", "runs/demo")
    capsys.readouterr()


SMALL = (
    "backbone.name=timm:test_resnet",
    "backbone.zero_init_residual=false",
    "head.channels=16",
    "auxiliary_head.enabled=false",
    "data.crop_size=[32, 64]",
    "data.batch_size=8",
    "data.num_workers=1",
    "checkpoint.every_steps=5",
    "evaluation.every_steps=null",
    "schedule.max_steps=30",
)


def start_two_devices(run: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    command = [sys.executable, "-m", "nestseg", "train", "demo", "--run", str(run), "--device", "cpu"]
    return subprocess.Popen(
        [*command, "--devices", "2", *settings, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


def wait_for_checkpoint(run: Path, step: int, launcher: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not (run / "checkpoints" / f"step-{step:08d}").exists():
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)


def rank_pids(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Process id by rank, of a launcher's children."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
    return {
        int(value.removeprefix(b"RANK=")): pid
        for pid, values in environments.items()
        for value in values
        if value.startswith(b"RANK=")
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    launcher = start_two_devices(run)
    output = launcher.communicate(timeout=240)[0]
    assert launcher.returncode == 0, output
    return run


def assert_same_bits(first: Path, second: Path) -> None:
    one, two = (read_model_file(run / "model.safetensors")[0] for run in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    ("signum", "said"),
    [
        (signal.SIGKILL, "rank 1 was killed by SIGKILL; all start again"),
        (signal.SIGSTOP, "no answer from rank 1, which"),
    ],
)
def test_t8_t9_ranks_start_again_where_one_is_killed_or_hangs_and_end_with_the_same_bits(
    tmp_path, undisturbed, signum, said
):
    launcher = start_two_devices(tmp_path, NESTSEG_RANK_TIMEOUT="20")
    wait_for_checkpoint(tmp_path, 10, launcher)
    os.kill(rank_pids(launcher)[1], signum)
    output = launcher.communicate(timeout=240)[0]
    assert launcher.returncode == 0, output
    assert said in output
    assert_same_bits(undisturbed, tmp_path)


@pytest.mark.slow
def test_t3_a_signal_to_the_launcher_stops_all_ranks_at_a_checkpoint_to_go_on_from(tmp_path, undisturbed):
    launcher = start_two_devices(tmp_path)
    wait_for_checkpoint(tmp_path, 10, launcher)
    launcher.send_signal(signal.SIGTERM)
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 75, output
    launcher = start_two_devices(tmp_path, "--resume")
    output = launcher.communicate(timeout=240)[0]
    assert launcher.returncode == 0, output
    assert_same_bits(undisturbed, tmp_path)


@pytest.mark.slow
def test_t10_of_an_error_that_every_rank_meets_one_is_shown(tmp_path):
    launcher = start_two_devices(tmp_path, "--set", "data.batch_size=7")
    output = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 1
    assert output.count("error: ") == 1, output
    assert "Traceback" not in output
