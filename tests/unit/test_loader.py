"""Batches depend on (seed, step) alone."""

from __future__ import annotations

from collections import Counter

import cv2
import numpy as np
import pytest
import torch

from nestseg.core.errors import DataError
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample
from nestseg.data.loader import BatchPlan, Draw, SmallDatasetWarning, collate, training_batches


class Numbered:
    """A data set whose images are filled with their own index."""

    taxonomy = Taxonomy(name="numbered", classes=("a", "b"), palette=((0, 0, 0), (9, 9, 9)))

    def __init__(self, size: int, bad: int | None = None) -> None:
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"sample {index}"

    def read(self, index: int) -> Sample:
        if index == self.bad:
            raise DataError("E-DATA-012", "damaged picture", fix="fetch the file again", path=f"{index}.png")
        return Sample(np.full((4, 6, 3), index, np.uint8), np.zeros((4, 6), np.uint8))


def add_noise(sample: Sample, rng: np.random.Generator) -> Sample:
    return Sample(sample.image + rng.integers(0, 50, sample.image.shape, dtype=np.uint8), sample.target)


def read_all(plan: BatchPlan, **options):
    return list(training_batches(Numbered(plan.num_samples), add_noise, plan=plan, **options))


def test_epoch_visits_each_image_at_most_once_and_drops_the_rest():
    plan = BatchPlan(num_samples=11, batch_size=4, seed=3)
    assert plan.steps_per_epoch == 2
    for epoch in range(3):
        draws = plan.draws(2 * epoch) + plan.draws(2 * epoch + 1)
        assert {draw.epoch for draw in draws} == {epoch}
        assert max(Counter(draw.sample_index for draw in draws).values()) == 1
    assert plan.draws(0) != [Draw(0, draw.sample_index) for draw in plan.draws(2)]


def test_small_data_set_runs_on_across_epochs():
    plan = BatchPlan(num_samples=3, batch_size=8, seed=0)
    draws = plan.draws(0) + plan.draws(1) + plan.draws(2)
    assert [draw.epoch for draw in draws] == [place // 3 for place in range(24)]
    assert set(Counter(draws).values()) == {1}
    with pytest.warns(SmallDatasetWarning, match="3 training images are fewer than data.batch_size 8"):
        assert len(read_all(plan, start=0, stop=2)) == 2


def test_workers_ranks_and_restarts_see_the_same_samples():
    plan = BatchPlan(num_samples=10, batch_size=4, seed=7)
    straight = read_all(plan, start=0, stop=6)
    assert [batch.image.shape for batch in straight] == [(4, 3, 4, 6)] * 6
    with_workers = read_all(plan, start=0, stop=6, num_workers=2)
    resumed = read_all(plan, start=3, stop=6)
    ranks = [read_all(plan, start=0, stop=6, rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(straight):
        assert torch.equal(batch.image, with_workers[step].image)
        assert torch.equal(batch.sample_index, with_workers[step].sample_index)
        if step >= 3:
            assert torch.equal(batch.image, resumed[step - 3].image)
        assert torch.equal(batch.image, torch.cat([ranks[0][step].image, ranks[1][step].image]))


def test_same_image_is_augmented_anew_each_epoch_and_other_seeds_differ():
    plan = BatchPlan(num_samples=4, batch_size=4, seed=0)
    first, second = (batch.image[batch.sample_index.argsort()] for batch in read_all(plan, start=0, stop=2))
    assert not torch.equal(first, second)
    other = read_all(BatchPlan(num_samples=4, batch_size=4, seed=1), start=0, stop=1)[0]
    assert not torch.equal(first, other.image[other.sample_index.argsort()])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_file_arrives_as_the_error_that_names_it(num_workers):
    plan = BatchPlan(num_samples=4, batch_size=4, seed=0)
    with pytest.raises(DataError, match=r"2\.png \| damaged picture") as raised:
        list(training_batches(Numbered(4, bad=2), add_noise, plan=plan, start=0, stop=1, num_workers=num_workers))
    assert raised.value.code == "E-DATA-012"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_error_of_the_augmentation_names_the_sample(num_workers):
    def refuse(sample: Sample, rng: np.random.Generator) -> Sample:
        raise DataError("E-DATA-060", "too long", fix="cut it")

    plan = BatchPlan(num_samples=4, batch_size=1, seed=0)
    name = f"sample {plan.draws(0)[0].sample_index}"
    with pytest.raises(DataError, match=rf"E-DATA-060 \| {name} \| too long"):
        list(training_batches(Numbered(4), refuse, plan=plan, start=0, stop=1, num_workers=num_workers))


def test_split_without_images_is_refused_and_one_image_is_enough():  # T22
    with pytest.raises(DataError, match=r"E-DATA-071 \| no images to train on"):
        BatchPlan(num_samples=0, batch_size=4, seed=0)
    plan = BatchPlan(num_samples=1, batch_size=3, seed=0)
    with pytest.warns(SmallDatasetWarning, match="1 training images are fewer"):
        (first, second) = read_all(plan, start=0, stop=2)
    assert first.sample_index.tolist() == second.sample_index.tolist() == [0, 0, 0]
    assert len({image.numpy().tobytes() for image in [*first.image, *second.image]}) == 6


def test_substitutes_are_other_images_drawn_by_seed_draw_and_attempt():
    drawn = {
        (seed, draw, attempt): draw.substitute(seed, attempt=attempt, num_samples=50)
        for seed in (0, 1)
        for draw in (Draw(0, 7), Draw(1, 7), Draw(0, 8), Draw(0, 7, 1))
        for attempt in range(1, 30)
    }
    assert len({other.sample_index for other in drawn.values()}) == 50
    for (seed, draw, attempt), other in drawn.items():
        assert other == draw.substitute(seed, attempt=attempt, num_samples=50)
        assert other.epoch == draw.epoch
        assert other.sample_index != draw.sample_index
    for one in ("seed", "draw"):
        lists = {}
        for (seed, draw, _), other in drawn.items():
            lists.setdefault((seed, Draw(0, 7)) if one == "seed" else (0, draw), []).append(other.sample_index)
        assert len(set(map(tuple, lists.values()))) == len(lists)
    assert {Draw(0, 1).substitute(0, attempt=attempt, num_samples=2).sample_index for attempt in range(1, 9)} == {0}


def test_batch_that_ranks_cannot_share_is_refused():
    plan = BatchPlan(num_samples=10, batch_size=5, seed=0)
    with pytest.raises(DataError, match="choose a multiple of 2"):
        read_all(plan, start=0, stop=1, rank=0, world_size=2)


def test_collate_moves_channels_first_without_changing_a_value():
    rng = np.random.default_rng(0)
    images, targets = rng.integers(0, 256, (2, 3, 5, 3), np.uint8), rng.integers(0, 9, (2, 3, 5), np.uint8)
    samples = [Sample(image, target) for image, target in zip(images, targets, strict=True)]
    batch = collate([(7, samples[0]), (2, samples[1])])
    assert batch.image[1, 2, 1, 4] == samples[1].image[1, 4, 2]
    assert batch.image.dtype == batch.target.dtype == torch.uint8
    assert batch.sample_index.tolist() == [7, 2]


def test_workers_start_after_opencv_has_started_its_threads():
    previous = cv2.getNumThreads()
    cv2.setNumThreads(4)
    picture = np.zeros((2000, 2000, 3), np.uint8)
    cv2.GaussianBlur(cv2.resize(picture, (3000, 3000)), (9, 9), 3)
    try:
        plan = BatchPlan(num_samples=8, batch_size=4, seed=0)
        assert len(read_all(plan, start=0, stop=2, num_workers=2)) == 2
    finally:
        cv2.setNumThreads(previous)
