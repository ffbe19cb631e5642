"""SIGTERM, SIGINT, SIGUSR1: a checkpoint at most a step later, exit code 75; a second one ends at once."""

from __future__ import annotations

import re
import signal
import time

import pytest

# where the signal comes, and how many steps are done by then
PLACES = {
    "first batch": ("nestseg.engine.train", "training_batches", 1, 0),
    "step": ("torch.Tensor", "backward", 4, 3),
    "evaluation": ("nestseg.inference.predictor.Predictor", "compute_logits", 1, 5),
    "save": ("nestseg.engine.checkpoint", "write_torch_file", 3, 4),
}
SEND = """
import os, time
from pkgutil import resolve_name

def send():
    print("signalled at", time.monotonic(), flush=True)
    os.kill(os.getpid(), {signum})

if os.environ.get("RANK", "0") == "{rank}":
    before_call(resolve_name("{owner}"), "{name}", send, calls=({call},))
"""


def stop_at(make_job, place: str, signum: int, *, ranks: int = 1, rank: int = 0, workers: int = 2):
    """Run a job that gets a signal; return it, its end, and the seconds that it took to stop."""
    owner, name, call, steps_done = PLACES[place]
    job = make_job(ranks=ranks, workers=workers)
    prelude = SEND.format(signum=int(signum), rank=rank, owner=owner, name=name, call=call)
    group = job.start(prelude=prelude)
    endings = [child.wait() for child in group.children]
    ended = time.monotonic()
    assert [ending.code for ending in endings] == [75] * ranks, endings[0].output[-3000:]
    assert steps_done <= job.checkpoints()[-1] <= steps_done + 1
    assert f"at a checkpoint of step {job.checkpoints()[-1]}; continue with --resume" in endings[0].output
    assert not list((job.seen / "checkpoints").glob(".tmp-*"))
    sent = re.search(r"signalled at ([\d.]+)", endings[rank].output)
    assert sent is not None
    return job, endings, ended - float(sent[1])


@pytest.mark.parametrize(
    ("place", "signum"),
    [
        pytest.param(place, signum, marks=() if (place, signum) == ("step", signal.SIGTERM) else pytest.mark.slow)
        for place in PLACES
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ],
)
def test_signal_anywhere_stops_at_a_checkpoint_of_at_most_one_step_later(
    make_job, uninterrupted, note_figure, place, signum
):
    """T3, F3, with two loader workers."""
    job, _, seconds = stop_at(make_job, place, signum)
    note_figure("F3", place=place, signal=signal.Signals(signum).name, ranks=1, seconds=round(seconds, 3))
    assert seconds <= 5
    job.finish()
    assert job.fingerprint() == uninterrupted().fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("rank", [0, 1])
def test_signal_to_one_rank_stops_both_at_one_checkpoint(make_job, uninterrupted, note_figure, place, rank):
    """T3, F3, with two ranks of which one hears."""
    if (place, rank) == ("save", 1):
        # only the first rank writes; the other is reached in another way
        place = "step"
    job, _, seconds = stop_at(make_job, place, signal.SIGTERM, ranks=2, rank=rank, workers=0)
    note_figure("F3", place=place, signal="SIGTERM", ranks=2, seconds=round(seconds, 3))
    assert seconds <= 5
    job.finish()
    assert job.fingerprint() == uninterrupted(ranks=2).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_loader_workers_outlive_a_signal_to_the_whole_group(make_job, uninterrupted, signum):
    """T3: a terminal or a batch system sends signals to every process; workers must not die before the checkpoint."""
    job = make_job(workers=2)
    group = job.start()
    job.wait_for_checkpoint(2, child=group.first)
    group.first.signal(signum, group=True)
    ending = group.wait()
    assert ending.code == 75, ending.output[-3000:]
    assert "warning: " not in ending.output, ending.output
    job.finish()
    assert job.fingerprint() == uninterrupted().fingerprint


def test_second_signal_ends_at_once_and_the_last_checkpoint_is_good(make_job, uninterrupted):
    """T4: while a checkpoint is being written, by a disk that takes half a minute for it."""
    slow_disk = """
import time, torch
before_call(torch, "save", lambda: print("saving", flush=True) or time.sleep(30), calls=(3,))
"""
    job = make_job(workers=2)
    child = job.start(prelude=slow_disk).first
    end = time.monotonic() + 60
    while "saving" not in child.output and time.monotonic() < end:
        time.sleep(0.02)
    child.signal(signal.SIGINT)
    time.sleep(0.2)
    sent = time.monotonic()
    child.signal(signal.SIGINT)
    ending = child.wait(10)
    assert ending.code == 128 + signal.SIGINT, ending.output[-3000:]
    assert time.monotonic() - sent < 2
    assert job.checkpoints() == [0, 2]
    job.finish()
    assert job.fingerprint() == uninterrupted().fingerprint
    assert not list((job.seen / "checkpoints").glob(".tmp-*"))


@pytest.mark.slow
def test_signal_while_a_checkpoint_cannot_be_written_does_not_claim_one(make_job, uninterrupted):
    """T3, T7: what the last words and the exit code say is on the disk."""
    prelude = """
import errno, os, torch

def fail():
    os.kill(os.getpid(), 15)
    raise OSError(errno.EIO, "Input/output error")

before_call(torch, "save", fail, calls=(3,))
"""
    job = make_job()
    ending = job.train(prelude=prelude)
    assert ending.code == 75, ending.output[-3000:]
    assert f"at a checkpoint of step {job.checkpoints()[-1]}; continue" in ending.output
    job.finish()
    assert job.fingerprint() == uninterrupted().fingerprint
