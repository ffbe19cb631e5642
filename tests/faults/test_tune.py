"""A search that is killed or stopped goes on with the trial that was running, and ends as one that was not."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from nestseg.engine.log import read_records
from nestseg.engine.stop import RunPruned
from nestseg.engine.train import train
from nestseg.recipe import Recipe

SPACE = ("optimizer.lr=log 0.001 0.01", "head.dropout=choice 0 0.1")


class Search(NamedTuple):
    """A study of two trials of 12 steps, on the drawn pictures."""

    server: object
    job: object
    folder: Path

    def start(self):
        words = ["tune", str(self.job.recipe), "--data", str(self.job.data), "--study", str(self.folder)]
        words += ["--trials", "2", "--device", "cpu"]
        return self.server.fork([*words, *(word for axis in SPACE for word in ("--space", axis))])

    @property
    def seen(self) -> Path:
        return self.server.seen(self.folder)

    def wait_for(self, place: str, *, child) -> None:
        end = time.monotonic() + 60
        while not (self.seen / place).exists():
            assert time.monotonic() < end, child.output[-3000:]
            time.sleep(0.002)

    def weights(self) -> list:
        return [load_file(self.seen / f"trial-{number:04d}" / "model.safetensors") for number in range(2)]


@pytest.fixture
def make_search(fork_server, make_job, tmp_path):
    def make(name: str) -> Search:
        return Search(fork_server, make_job(name), tmp_path / f"{name}-study")

    return make


def assert_equal_weights(left: list, right: list) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.slow
def test_killed_and_stopped_search_ends_with_the_bits_of_one_that_was_not(make_search):
    """T1, T3."""
    undisturbed = make_search("undisturbed")
    ending = undisturbed.start().wait()
    assert ending.code == 0, ending.output[-3000:]
    assert "TRIAL       STATE     MIOU %  optimizer.lr  head.dropout" in ending.output

    disturbed = make_search("disturbed")
    killed = disturbed.start()
    disturbed.wait_for("trial-0000/checkpoints/step-00000004", child=killed)
    killed.signal(signal.SIGKILL, group=True)
    assert killed.wait().code == -signal.SIGKILL

    stopped = disturbed.start()
    disturbed.wait_for("trial-0001/checkpoints/step-00000006", child=stopped)
    stopped.signal(signal.SIGTERM)
    ending = stopped.wait()
    assert ending.code == 75, ending.output[-3000:]
    assert "stopped in trial 1 of" in ending.output

    last = disturbed.start().wait()
    assert last.code == 0, last.output[-3000:]
    assert "trial 0" not in last.output
    first = read_records(disturbed.seen / "trial-0000" / "log.jsonl").records
    assert [record["step"] for record in first if record["kind"] == "resume"], "it began anew"
    assert_equal_weights(disturbed.weights(), undisturbed.weights())
    assert (disturbed.seen / "best.yaml").read_text() == (undisturbed.seen / "best.yaml").read_text()


def test_run_that_is_given_up_says_so_and_can_be_resumed(make_job):
    job = make_job()
    heard: list[tuple[int, float]] = []

    def give_up(step: int, mean_iou: float) -> bool:
        heard.append((step, mean_iou))
        return step == 5 or step == 12

    recipe = Recipe.read(job.recipe)
    with pytest.raises(RunPruned, match="given up after the evaluation at step 5"):
        train(recipe, job.data, run=job.run, device="cpu", on_evaluation=give_up)
    records = read_records(job.run / "log.jsonl").records
    assert records[-1]["kind"] == "pruned"
    assert not (job.run / "model.safetensors").exists()
    evaluations = [(record["step"], record["mean_iou"]) for record in records if record["kind"] == "evaluation"]
    assert heard == evaluations

    # the last evaluation cannot give up what is done
    answers = iter([False, False, True])
    model = train(
        recipe, job.data, run=job.run, device="cpu", resume=True, on_evaluation=lambda step, mean_iou: next(answers)
    )
    assert model.exists()
    assert next(answers, None) is None
