"""A disk that fills up or fails: old checkpoints stay, training goes on, three failures in a row end it."""

from __future__ import annotations

import errno
import os
import resource
import sys
from contextlib import suppress

import pytest

NUM_STEPS = 12
NUM_INJECTED = int(os.environ.get("NESTSEG_INJECTED", "4"))
MB = 1 << 20
# about 1.6 MB of model and 4.9 MB of state a checkpoint; a run of ours needs up to three of them and two models
SIZES = [8, 12, 16, 17, 18, 19, 20, 21, 22, 23, 24, 26]


def failures(job) -> list[int]:
    return [record["step"] for record in job.records() if record["kind"] == "checkpoint_failed"]


def finish_and_compare(job, uninterrupted) -> None:
    job.finish()
    kinds = [record["kind"] for record in job.records()]
    # a run goes by the best model that it could write, see `best.safetensors`
    best = "write_failed" not in kinds
    # it is finished once its model is written, also where its last checkpoint could not be
    state = not (NUM_STEPS in failures(job) and kinds.count("resume") == 0)
    alike = uninterrupted().job.fingerprint(best=best, state=state)
    assert job.fingerprint(best=best, state=state) == alike
    assert not list(job.seen.rglob(".tmp-*"))


@pytest.fixture
def small_disk(mounts, tmp_path):
    """Mount a disk of so many bytes for children; the test gives it more room by calling again."""
    place = tmp_path / "disk"

    def mount(size: int):
        if place.is_dir():
            mounts.call("mount", "-o", f"remount,size={size}", str(place))
        else:
            place.mkdir()
            mounts.call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place))
        return place / "run"

    yield mount
    mounts.call("umount", "--lazy", str(place))


@pytest.mark.parametrize("size", [pytest.param(size, marks=() if size == 17 else pytest.mark.slow) for size in SIZES])
def test_full_disk_loses_nothing_and_more_room_brings_the_same_bits(
    make_job, small_disk, uninterrupted, note_figure, size
):
    """T6: at any size of the disk, an error that is mended by room and --resume, or a run that came through."""
    run = small_disk(size * MB)
    job = make_job(run=run)
    ending = job.train()
    kept, failed = job.checkpoints(), failures(job) if (job.seen / "log.jsonl").exists() else []
    note_figure("F2", kind="ENOSPC", megabytes=size, code=ending.code, kept=kept, failed=failed)
    sys.stdout.write(f"{size} MB: exit code {ending.code}, checkpoints {kept}, failed at {failed}\n")
    assert ending.code in (0, 1), ending.output[-3000:]
    if failed:
        assert "needs" in ending.output
        assert "are free" in ending.output
    if len(failed) >= 3 and [step - failed[0] for step in failed[:3]] == [0, 2, 4]:
        assert ending.code == 1
        assert "E-RUN-012" in ending.output.splitlines()[-1]
    small_disk(256 * MB)
    ending = job.finish()
    assert "is passed over" not in ending.output
    finish_and_compare(job, uninterrupted)


@pytest.mark.slow
def test_room_that_comes_back_in_time_lets_the_run_finish(make_job, small_disk, uninterrupted):
    """T6: a failure is forgotten once a checkpoint is written."""
    run = small_disk(64 * MB)
    job = make_job(run=run)
    child = job.start().first
    job.wait_for_checkpoint(2, child=child)
    ballast = job.seen.with_name("ballast")
    with suppress(OSError), ballast.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(MB))
    while "checkpoint cannot be written" not in child.output:
        assert "step 11/" not in child.output
    ballast.unlink()
    ending = child.wait()
    assert ending.code == 0, ending.output[-3000:]
    assert 1 <= len(failures(job)) <= 2
    assert job.fingerprint() == uninterrupted().fingerprint


# where a file may grow to: within the model file, at its end, within the state; the log and what is said stay smaller
OFFSETS = [20_000, 100_000, 800_000, 1_600_000, 1_700_000, 2_500_000, 3_200_000, 4_000_000, 4_500_000, 4_800_000]


@pytest.mark.parametrize(
    "offset", [pytest.param(offset, marks=() if offset == 2_500_000 else pytest.mark.slow) for offset in OFFSETS]
)
def test_file_that_may_not_grow_is_no_checkpoint_and_three_of_them_end_the_run(
    make_job, uninterrupted, note_figure, offset
):
    """T6: the write fails at an offset, from the checkpoint after step 2 on."""
    job = make_job()
    child = job.start().first
    job.wait_for_checkpoint(2, child=child)
    resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (offset, resource.RLIM_INFINITY))
    ending = child.wait()
    kept = job.checkpoints()
    note_figure("F2", kind="RLIMIT_FSIZE", offset=offset, code=ending.code, kept=kept)
    assert ending.code == 1, ending.output[-3000:]
    assert "E-RUN-012" in ending.output
    assert kept[-1] <= 4
    assert len(kept) == 2
    finish_and_compare(job, uninterrupted)


FAILING_DISK = """
import errno, os, shutil, torch
from pkgutil import resolve_name

def fail():
    raise OSError(errno.{error}, os.strerror(errno.{error}))

before_call(resolve_name("{owner}"), "{name}", fail, calls={calls})
"""


@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        # of some ten a checkpoint; the first that fails ends the attempt, so that two in a row fail here
        pytest.param("os", "fsync", range(40, 42)),
        pytest.param("os", "fsync", range(24, 26), marks=pytest.mark.slow),
        pytest.param("os", "fsync", range(30, 32), marks=pytest.mark.slow),
        pytest.param("torch", "save", (3, 4), marks=pytest.mark.slow),
        pytest.param("nestseg.store.files", "save_file", (3,), marks=pytest.mark.slow),
        pytest.param("shutil", "rmtree", (4,), marks=pytest.mark.slow),
        pytest.param("os", "rmdir", (2, 3), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("error", ["EIO", pytest.param("EROFS", marks=pytest.mark.slow)])
def test_disk_that_fails_for_a_while_does_not_end_the_run(make_job, uninterrupted, error, owner, name, calls):
    """T7: an error of the disk in any step of a checkpoint is told; the next checkpoint is written again."""
    job = make_job()
    ending = job.train(prelude=FAILING_DISK.format(error=error, owner=owner, name=name, calls=calls))
    assert ending.code == 0, ending.output[-3000:]
    assert "error: " in ending.output or "warning: " in ending.output, "the failure was not told"
    assert job.fingerprint(best=False) == uninterrupted().job.fingerprint(best=False)
    assert not list(job.seen.rglob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("error", ["EIO", "EROFS"])
def test_disk_that_fails_for_good_ends_the_run_after_three_checkpoints(make_job, uninterrupted, error):
    """T7."""
    job = make_job()
    prelude = FAILING_DISK.format(error=error, owner="os", name="fsync", calls=range(30, 10_000))
    ending = job.train(prelude=prelude)
    assert ending.code == 1, ending.output[-3000:]
    assert len(failures(job)) == 3
    assert "E-RUN-012" in ending.output
    finish_and_compare(job, uninterrupted)


RANDOM_FAILURES = """
import os, random, torch
from nestseg.store import files

draw = random.Random({seed})

class Unlucky:
    def __contains__(self, call):
        return os.path.exists("{begin}") and draw.random() < {probability}

def fail(*place):
    raise OSError({error}, os.strerror({error}), *place)

# the system names no file where it cannot flush one
before_call(os, "fsync", fail, calls=Unlucky())
for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
    before_call(os, name, lambda: fail("a file"), calls=Unlucky())
before_call(torch, "save", lambda: fail("a file"), calls=Unlucky())
before_call(files, "save_file", lambda: fail("a file"), calls=Unlucky())
"""


@pytest.mark.slow
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("seed", range(NUM_INJECTED))
def test_random_operations_on_files_fail(make_job, uninterrupted, note_figure, error, seed):
    """T7: one in so many, once there are two checkpoints."""
    job = make_job()
    probability = (0.01, 0.03, 0.1, 0.3)[seed % 4]
    values = {"error": getattr(errno, error), "seed": seed, "probability": probability}
    begin = job.run / "checkpoints" / "step-00000002"
    ending = job.train(prelude=RANDOM_FAILURES.format(**values, begin=begin))
    kept = job.checkpoints()
    failed = failures(job) if (job.seen / "log.jsonl").exists() else []
    sys.stdout.write(f"seed {seed}, {error} in {probability:.1%}: code {ending.code}, {kept}, failed at {failed}\n")
    note_figure("F2", kind=f"injected {error}", seed=seed, code=ending.code, kept=kept, failed=failed)
    assert ending.code in (0, 1), ending.output[-3000:]
    ending = job.finish()
    assert "is passed over" not in ending.output
    finish_and_compare(job, uninterrupted)
