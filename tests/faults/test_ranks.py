"""Several ranks: joining (T31), one that hangs (T9), one that fails (T10), and what they share (E3, F12)."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nestseg.core.errors import RunError
from nestseg.engine.ranks import JOIN_TIMEOUT, Place, read_seconds

ONE_OF_TWO = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def start_rank(fork_server) -> Callable[..., object]:
    """Start a rank of ``train demo`` that waits two seconds for the others."""

    def start(**changes: str):
        environment = ONE_OF_TWO | {"NESTSEG_JOIN_TIMEOUT": "2"} | changes
        words = ["train", "demo", "--run", "/nonexistent/run", "--device", "cpu", "--set", "backbone.pretrained=none"]
        return fork_server.fork(words, environment=environment)

    return start


def test_a_place_is_read_from_the_environment():
    assert Place.read(ONE_OF_TWO) == Place(0, 2, 0, 2, "127.0.0.1", 29500)
    assert Place.read({}) is None
    assert Place.read(ONE_OF_TWO | {"WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "2"},
        {"RANK": "-1"},
        {"RANK": "x"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "3"},
        {"LOCAL_WORLD_SIZE": "0"},
        {"MASTER_PORT": "70000"},
    ],
)
def test_a_place_that_makes_no_sense_is_refused(change):
    with pytest.raises(RunError, match="E-RUN-041") as caught:
        Place.read(ONE_OF_TWO | change)
    for name, value in change.items():
        assert f"{name}={value}" in caught.value.reason


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_place_without_one_of_its_variables_is_refused(name):
    given = {other: value for other, value in ONE_OF_TWO.items() if other != name}
    with pytest.raises(RunError, match=f"{name}=not set"):
        Place.read(given)


@pytest.mark.parametrize("text", ["soon", "0", "-3", "inf", "nan", ""])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(monkeypatch, text):
    monkeypatch.setenv("NESTSEG_JOIN_TIMEOUT", text)
    with pytest.raises(RunError, match=r"E-RUN-041.*NESTSEG_JOIN_TIMEOUT"):
        read_seconds("NESTSEG_JOIN_TIMEOUT", 1.0)


def test_ranks_wait_for_each_other_for_less_than_half_a_minute():
    assert JOIN_TIMEOUT < 30


def test_t31_a_port_in_use_is_named(start_rank):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ending = start_rank(MASTER_PORT=str(port)).wait()
    assert ending.code == 1
    assert re.search(rf"E-RUN-042 \| 127.0.0.1:{port} \| rank 0 cannot listen there: .*EADDRINUSE", ending.output)


def test_t31_a_host_that_nobody_knows_is_named(start_rank):
    ending = start_rank(MASTER_ADDR="rank-zero.invalid").wait()
    assert ending.code == 1
    assert "MASTER_ADDR rank-zero.invalid is no host that this machine knows" in ending.output


def test_t31_a_rank_0_that_does_not_listen_is_named(start_rank):
    port = free_port()
    ending = start_rank(RANK="1", LOCAL_RANK="1", MASTER_PORT=str(port)).wait()
    assert ending.code == 1
    assert f"E-RUN-042 | 127.0.0.1:{port} | rank 1 did not reach rank 0 there within 2 s" in ending.output
    assert ending.seconds < 30


def test_t31_a_missing_rank_is_named(start_rank):
    three = {"MASTER_PORT": str(free_port()), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "NESTSEG_JOIN_TIMEOUT": "4"}
    ranks = [start_rank(RANK=rank, LOCAL_RANK=rank, **three) for rank in "02"]
    endings = [rank.wait() for rank in ranks]
    assert [ending.code for ending in endings] == [1, 1]
    assert any("missing after 4 s: rank 1 of 3" in ending.output for ending in endings)


def test_t31_ranks_that_were_told_of_different_numbers_are_named(start_rank):
    port = str(free_port())
    first = start_rank(MASTER_PORT=port)
    second = start_rank(MASTER_PORT=port, RANK="1", LOCAL_RANK="1", WORLD_SIZE="3", LOCAL_WORLD_SIZE="3")
    endings = [first.wait(), second.wait()]
    assert [ending.code for ending in endings] == [1, 1]
    assert any(
        re.search(r"E-RUN-043 \| .*was told of 2 ranks, rank . of 3|of 3 ranks, rank 0 of 2", ending.output)
        for ending in endings
    )


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_t9_a_rank_that_hangs_is_named_with_its_last_step(make_job, stopped):
    # rank 0 has the store of what ranks say; where it hangs, the other knows its own step
    job = make_job(ranks=2, checkpoint__every_steps=1, schedule__max_steps=2000, evaluation__every_steps=None)
    group = job.start(prelude="import os; os.environ['NESTSEG_RANK_TIMEOUT'] = '3'")
    job.wait_for_checkpoint(3, child=group.first)
    group.children[stopped].signal(signal.SIGSTOP)
    step = job.checkpoints()[-1]
    ending = group.children[1 - stopped].wait()
    group.children[stopped].signal(signal.SIGKILL)
    assert ending.code == 1
    found = re.search(
        rf"E-RUN-040 \| no answer from rank {stopped}, which began step (\d+) last, for 3 s", ending.output
    )
    assert found, ending.output
    assert abs(int(found[1]) - step) <= 2
    assert ending.seconds < 60


def test_t10_the_error_of_one_rank_ends_all_and_the_others_name_it(make_job):
    prelude = """
import os
from nestseg.core.errors import DataError
from nestseg.engine.step import Stepper
step = Stepper.step
def fail(self, batch, **options):
    if options["step"] == 4 and os.environ["RANK"] == "1":
        raise DataError("E-DATA-999", "a label value 37", fix="mend it", path="street.png")
    return step(self, batch, **options)
Stepper.step = fail
"""
    group = make_job(ranks=2).start(prelude=prelude)
    first, second = (child.wait() for child in group.children)
    assert (first.code, second.code) == (1, 1)
    assert "error: E-DATA-999 | street.png | a label value 37 | fix: mend it" in second.output
    assert "error: E-RUN-046 | rank 1 failed: E-DATA-999 | street.png | a label value 37 | fix: mend it" in first.output
    assert first.seconds < 30


COUNT = """
import json, os, sys
import numpy as np
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample
from nestseg.data.dataset import SegmentationDataset
from nestseg.engine.evaluate import evaluate
from nestseg.engine.ranks import Place, join
from nestseg.inference.predictor import Predictor

THREE = Taxonomy(name="three", classes=("a", "b", "c"), palette=((0, 0, 0), (9, 9, 9), (99, 99, 99)))


class Noise(SegmentationDataset):
    taxonomy = THREE
    absent_classes = "leave_out"

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def name(self, index):
        return str(index)

    def read(self, index):
        draw = np.random.default_rng(index)
        shape = tuple(draw.integers(1, 9, 2))
        target = draw.choice(np.array([0, 1, 2, 255], np.uint8), shape)
        return Sample(draw.integers(0, 256, (*shape, 3), np.uint8), target)


def count(rank, world_size):
    predictor = Predictor(lambda image: image.float(), THREE)
    sizes = [(size, None) for size in range(1, 18)] + [(17, 5)]
    return [
        evaluate(
            predictor, Noise(size), split="val", max_images=most, rank=rank, world_size=world_size
        ).confusion.counts.tolist()
        for size, most in sizes
    ]
"""


def test_f12_ranks_count_every_pixel_once_for_any_number_of_images(fork_server, note_figure):
    alone: dict = {}
    exec(COUNT, alone)
    expected = alone["count"](0, 1)
    assert sum(map(sum, expected[0])) > 0
    for world_size in (2, 3):
        port = str(free_port())
        end = """
place = Place.read(os.environ)
join(place, kind="cpu")
print(json.dumps(count(place.rank, place.world_size)), flush=True)
os._exit(0)
"""
        ranks = [
            fork_server.fork(
                [],
                prelude=COUNT + end,
                environment=ONE_OF_TWO
                | {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_PORT": port}
                | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world_size)
        ]
        for rank in ranks:
            ending = rank.wait()
            assert ending.code == 0, ending.output
            assert json.loads(ending.output) == expected
        note_figure("F12", ranks=world_size, images="1 to 17", integer_equal=True)


# what depends on how a batch is split is switched off, so that only the split itself is tested
SPLIT_FREE = {
    "backbone__norm": "frozen_batch",
    "head__norm": "frozen_batch",
    "head__dropout": 0,
    "data__batch_size": 8,
    "optimizer__name": "sgd",
    "optimizer__lr": 0.05,
    "schedule__warmup_steps": 0,
    "evaluation__every_steps": None,
    "ema": None,
    "checkpoint__keep": 20,
}


@pytest.fixture
def uneven_pictures(tmp_path) -> Path:
    """16 pictures to train on: of half of them, all but two in a hundred pixels are not labelled."""
    root, draw = tmp_path / "uneven", np.random.default_rng(3)
    for split, count in (("train", 16), ("val", 2)):
        for index in range(count):
            labels = draw.integers(0, 11, (40, 72), np.uint8)
            if index % 2:
                labels[draw.random(labels.shape) < 0.98] = 11
            for folder, array in (
                (split, draw.integers(0, 256, (40, 72, 3), np.uint8)),
                (f"{split}annot", labels),
            ):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / folder / f"{index:02d}.png")
    return root


@pytest.fixture
def make_split_free(make_job, uneven_pictures) -> Callable[..., object]:
    """Make a job on these pictures that ends alike with any number of ranks."""

    def make(name: str):
        job = make_job(name, **SPLIT_FREE)
        job.data = uneven_pictures
        return job

    return make


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


def difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """The largest difference of two models' weights."""
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def test_two_ranks_step_by_all_pixels_where_labels_are_uneven(make_split_free):
    one, two, wrong = (make_split_free(name) for name in ("one", "two", "wrong"))
    assert one.train().code == 0
    assert two.train(ranks=2).code == 0
    # each rank's mean counting alike is the mistake that this is about
    alike = "import nestseg.engine.step as step; step.shares_of_pixels = lambda weights: [1.0] * len(weights)"
    assert wrong.train(ranks=2, prelude=alike).code == 0
    start = weights(one.run / "checkpoints" / "step-00000000")
    moved = difference(start, weights(one.run))
    assert difference(weights(one.run), weights(two.run)) < 1e-4 * moved
    assert difference(weights(one.run), weights(wrong.run)) > 1e-2 * moved


def test_r4_a_run_goes_on_with_two_ranks_and_back_with_one(make_split_free):
    undisturbed, changing = make_split_free("undisturbed"), make_split_free("changing")
    assert undisturbed.train().code == 0
    for ranks, step in ((1, 4), (2, 8)):
        group = changing.start(*(["--resume"] if ranks == 2 else []), ranks=ranks)
        changing.wait_for_checkpoint(step, child=group.first)
        group.kill(workers=True)
        for child in group.children:
            child.wait()
    assert changing.train("--resume", ranks=1).code == 0
    start = weights(undisturbed.run / "checkpoints" / "step-00000000")
    moved = difference(start, weights(undisturbed.run))
    assert difference(weights(undisturbed.run), weights(changing.run)) < 1e-4 * moved


@pytest.mark.slow
def test_t8_three_ranks_resume_with_the_same_bits(make_job):
    # of two numbers the sum is the same in either order, of three it is not
    options = {"ranks": 3, "data__batch_size": 6, "evaluation__every_steps": None}
    undisturbed, killed = make_job("undisturbed", **options), make_job("killed", **options)
    assert undisturbed.train().code == 0
    group = killed.start()
    killed.wait_for_checkpoint(4, child=group.first)
    group.kill(workers=True)
    for child in group.children:
        child.wait()
    assert killed.train("--resume").code == 0
    assert undisturbed.fingerprint() == killed.fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_frozen_stages_with_recomputation_in_parts(make_job, ranks):
    # neither what has no gradient nor what is computed twice, or added up before ranks exchange it, stops torch's DDP
    job = make_job(
        ranks=ranks,
        data__batch_size=12,
        backbone__name="resnest14",
        backbone__frozen_stages=2,
        schedule__max_steps=3,
        compute__activation_checkpointing=True,
        compute__accumulate_steps=2,
        evaluation__every_steps=None,
    )
    assert job.train().code == 0
