"""SIGKILL: whenever it comes, the continued run ends with the same bits, and no checkpoint is lost or unreadable."""

from __future__ import annotations

import json
import os
import random
import sys
import time

import pytest

NUM_KILLS = int(os.environ.get("NESTSEG_KILLS", "40"))
NUM_STEPS = 12
HEADS = ("deeplabv3plus", "fcn", "pspnet", "deeplabv3")


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, NUM_KILLS))])
def test_run_killed_at_a_random_time_ends_with_the_same_bits(make_job, uninterrupted, note_figure, seed):
    """T1, R5: {1, 2 ranks} x {0, 2 workers} x 4 heads; the workers die too, or are left behind."""
    head, ranks, workers = HEADS[seed // 4 % 4], 1 + seed % 2, (0, 2)[seed // 2 % 2]
    expected = uninterrupted(head, ranks)
    draw = random.Random(seed)
    delay, with_workers = draw.uniform(0, 0.8) * expected.seconds, draw.random() < 0.5
    job = make_job(head=head, ranks=ranks, workers=workers)
    group = job.start()
    time.sleep(delay)
    group.kill(workers=with_workers)
    code = group.wait().code
    found = job.checkpoints()
    sys.stdout.write(f"seed {seed}: {head}, {ranks} ranks, {workers} workers, {delay:.3f} s, checkpoints {found}\n")
    job.finish()
    equal = job.fingerprint() == expected.fingerprint
    note_figure(
        "F1", seed=seed, head=head, ranks=ranks, workers=workers, equal=equal, killed=code == -9, checkpoints=found
    )
    assert equal


# SIGKILL before the n-th operation on files once a checkpoint is there
KILL_AT_OPERATION = """
import itertools, os, signal

count, begun = itertools.count(), []

def watch(name):
    real = getattr(os, name)

    def watched(*arguments, **options):
        if begun or os.path.exists("{checkpoint}"):
            begun.append(name)
            if next(count) == {number}:
                os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(os, name, watched)

for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink"):
    watch(name)
"""


@pytest.mark.parametrize("number", [pytest.param(n, marks=() if n == 31 else pytest.mark.slow) for n in range(39)])
def test_kill_between_two_operations_on_files_loses_no_checkpoint(make_job, uninterrupted, note_figure, number):
    """T2, E8: every step of a rotation, of writing metrics.json and best.safetensors, of the next save and rotation."""
    job = make_job()
    checkpoint = job.run / "checkpoints" / "step-00000004"
    ending = job.train(prelude=KILL_AT_OPERATION.format(checkpoint=checkpoint, number=number))
    assert ending.code == -9, f"the run has fewer operations than {number}"
    assert job.checkpoints()[-1] == (4 if number < 31 else 6), "the operations are others: choose new numbers"
    unreadable = len([file for file in (job.seen / "evaluation").glob("*.json") if not json.loads(file.read_text())])
    ending = job.finish()
    note_figure("F2", kind="kill in a save", lost="is passed over" in ending.output, unreadable=unreadable)
    assert "is passed over" not in ending.output
    assert job.fingerprint() == uninterrupted().fingerprint
    assert job.checkpoints() == [10, 12]
    assert not list(job.seen.rglob(".tmp-*"))


STOP_IN_EVALUATION = """
import os
from nestseg.inference.predictor import Predictor
before_call(Predictor, "compute_logits", lambda: os.kill(os.getpid(), 15), calls=(1,))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(9, 20))
def test_kill_while_a_checkpoint_is_replaced_by_one_of_the_same_step_loses_neither(make_job, uninterrupted, number):
    """T2: a run that is stopped twice in one evaluation writes the same step twice."""
    job = make_job()
    assert job.train(prelude=STOP_IN_EVALUATION).code == 75
    assert job.checkpoints() == [4, 5]
    checkpoint = job.run / "checkpoints" / "step-00000005"
    prelude = STOP_IN_EVALUATION + KILL_AT_OPERATION.format(checkpoint=checkpoint, number=number)
    assert job.train("--resume", prelude=prelude).code == -9
    ending = job.finish()
    assert "steps 5 to 12" in ending.output
    assert job.fingerprint() == uninterrupted().fingerprint


@pytest.mark.parametrize("every_steps", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_run_killed_after_every_checkpoint_ends_with_the_same_bits(make_job, uninterrupted, every_steps, workers):
    """R10."""
    job = make_job(workers=workers, checkpoint__every_steps=every_steps)
    for step in range(every_steps, NUM_STEPS, every_steps):
        group = job.start(*(["--resume"] if step > every_steps else []))
        job.wait_for_checkpoint(step, child=group.first)
        group.kill(workers=True)
        assert group.wait().code == -9
    job.finish()
    assert job.fingerprint() == uninterrupted().fingerprint
