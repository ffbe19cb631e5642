"""Rare-class sampling: the published probabilities, and an order that depends on (seed, epoch) alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from nestseg.core.errors import DataError
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample
from nestseg.data.counts import SplitCounts
from nestseg.data.loader import BatchPlan, Draw, RareClassSampling, read_draw, training_batches
from nestseg.data.transforms import sample_generator


def make_counts(images: list[dict[int, int]], num_classes: int) -> SplitCounts:
    """Counts of images that are given as pixels by class."""
    entries = [(train_id, pixels) for image in images for train_id, pixels in sorted(image.items())]
    return SplitCounts(
        num_classes=num_classes,
        sizes=np.full((len(images), 2), 100, np.int64),
        ignored=np.zeros(len(images), np.int64),
        offsets=np.cumsum([0, *map(len, images)]),
        classes=np.array([train_id for train_id, _ in entries], np.uint8),
        pixels=np.array([pixels for _, pixels in entries], np.int64),
        channel_sums=(0, 0, 0),
        channel_squares=(0, 0, 0),
    )


IMAGES = [{0: 9000, 1: 1000}, {0: 10000}, {0: 9990, 3: 10}, {0: 7000, 1: 3000}, {0: 6000, 1: 4000}]
"""Class 2 occurs nowhere, class 3 in one image."""


class Painted:
    """A data set whose pictures are filled with their index, and whose labels hold what `IMAGES` says."""

    taxonomy = Taxonomy(name="painted", classes=("a", "b", "c", "d"), palette=((0, 0, 0),) * 4)

    def __len__(self) -> int:
        return len(IMAGES)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Sample:
        labels = np.repeat(*(np.array(column) for column in zip(*IMAGES[index].items(), strict=True)))
        return Sample(np.full((100, 100, 3), index, np.uint8), labels.astype(np.uint8).reshape(100, 100))


def cut_window(sample: Sample, rng: np.random.Generator) -> Sample:
    top, left = rng.integers(0, 91, 2)
    image, target = (part[top : top + 10, left : left + 10].copy() for part in sample)
    return Sample(image + rng.integers(0, 99, image.shape, dtype=np.uint8), target)


@pytest.fixture
def sampling() -> RareClassSampling:
    return RareClassSampling.from_counts(make_counts(IMAGES, 4), temperature=0.5, min_pixels=3000)


@pytest.fixture
def plan(sampling) -> BatchPlan:
    return BatchPlan(num_samples=5, batch_size=2, seed=11, sampling=sampling)


def test_probabilities_are_those_of_the_paper(sampling):
    share = np.array([41990, 8000, 10]) / 50000
    expected = np.exp((1 - share) / 0.5) / np.exp((1 - share) / 0.5).sum()
    assert sampling.classes.tolist() == [0, 1, 3]
    np.testing.assert_allclose(sampling.probabilities, expected, rtol=1e-14)


def test_low_temperature_neither_overflows_nor_gives_other_classes_a_chance():
    sampling = RareClassSampling.from_counts(make_counts(IMAGES, 4), temperature=1e-4)
    assert sampling.probabilities.tolist() == [0, 0, 1]
    order = BatchPlan(num_samples=50, batch_size=2, seed=0, sampling=sampling).order(0)
    assert set(order.images.tolist()) == {2}


def test_images_of_a_class_are_those_with_enough_of_it_or_else_all(sampling):
    by_class = [
        sampling.images[start:stop].tolist()
        for start, stop in zip(sampling.offsets[:-1], sampling.offsets[1:], strict=True)
    ]
    assert by_class == [[0, 1, 2, 3, 4], [3, 4], [2]]


def test_draws_have_the_frequencies_of_the_probabilities(sampling):
    order = BatchPlan(num_samples=30_000, batch_size=8, seed=3, sampling=sampling).order(0)
    assert order.wanted_classes is not None
    for train_id, probability in zip(sampling.classes, sampling.probabilities, strict=True):
        assert (order.wanted_classes == train_id).mean() == pytest.approx(probability, abs=0.01)
    images = Counter(order.images[order.wanted_classes == 1].tolist())
    assert images[3] / images.total() == pytest.approx(0.5, abs=0.02)
    assert set(images) == {3, 4}


def test_order_is_a_function_of_seed_and_epoch(plan, sampling):
    again = BatchPlan(num_samples=5, batch_size=2, seed=11, sampling=sampling)
    steps = [plan.draws(step) for step in range(12)]
    assert [again.draws(step) for step in reversed(range(12))][::-1] == steps
    assert [draw.epoch for draws in steps for draw in draws] == [epoch for epoch in range(6) for _ in range(4)]
    assert len({tuple(draw.sample_index for draw in steps[2 * epoch]) for epoch in range(6)}) > 1
    other = BatchPlan(num_samples=5, batch_size=2, seed=12, sampling=sampling)
    assert [other.draws(step) for step in range(12)] != steps


def test_repeats_count_up_within_an_epoch_so_that_no_augmentation_comes_twice(sampling):
    order = BatchPlan(num_samples=200, batch_size=8, seed=0, sampling=sampling).order(4)
    draws = [order.draw(4, place) for place in range(200)]
    seen: Counter[int] = Counter()
    for draw in draws:
        assert draw.repeat == seen[draw.sample_index]
        seen[draw.sample_index] += 1
    assert len({draw.generator(0).random() for draw in draws}) == 200
    first = Draw(4, 2, 0, 1)
    assert first.generator(7).random() == sample_generator(7, 4, 2).random()


def test_without_sampling_every_image_comes_once_and_no_class_is_wanted():
    plan = BatchPlan(num_samples=64, batch_size=8, seed=5)
    draws = [draw for step in range(8) for draw in plan.draws(step)]
    assert sorted(draws) == [(0, index, 0, None) for index in range(64)]
    # the order of every run so far
    expected = np.random.default_rng(np.random.SeedSequence(5, spawn_key=(0,))).permutation(64)
    assert [draw.sample_index for draw in draws] == expected.tolist()


def test_workers_ranks_and_restarts_see_the_same_samples(plan):
    def read(**options):
        return list(training_batches(Painted(), cut_window, plan=plan, stop=8, **{"start": 0, **options}))

    straight, with_workers, resumed = read(), read(num_workers=2), read(start=5)
    ranks = [read(rank=rank, world_size=2) for rank in range(2)]
    for step, batch in enumerate(straight):
        assert torch.equal(batch.image, with_workers[step].image)
        assert torch.equal(batch.image, torch.cat([ranks[0][step].image, ranks[1][step].image]))
        if step >= 5:
            assert torch.equal(batch.image, resumed[step - 5].image)


def test_data_set_smaller_than_a_batch_runs_on_across_epochs(sampling):
    plan = BatchPlan(num_samples=5, batch_size=8, seed=0, sampling=sampling)
    draws = plan.draws(0) + plan.draws(1)
    assert [draw.epoch for draw in draws] == [place // 5 for place in range(16)]
    assert len(set(draws)) == 16


def test_crop_is_drawn_again_until_it_shows_the_class(plan):
    # class 1 fills the lowest 40 of 100 rows of image 4: a window of 10 rows misses it more often than not
    def count_good(wanted_class: int | None) -> int:
        crops = [
            read_draw(Painted(), cut_window, plan=plan, draw=Draw(epoch, 4, 0, wanted_class)) for epoch in range(40)
        ]
        return sum(np.count_nonzero(crop.target == 1) >= 50 for crop in crops)

    assert count_good(None) < 25
    assert count_good(1) >= 39


@pytest.mark.parametrize(("shown", "tries", "kept"), [([4, 3, 5, 9], 10, 5), ([1, 3, 2, 9], 3, 3), ([0, 0], 2, 0)])
def test_crop_is_redrawn_for_half_of_what_the_image_has_and_the_best_is_kept(shown, tries, kept):
    left = list(shown)

    def transform(sample: Sample, rng: np.random.Generator) -> Sample:
        target = np.zeros_like(sample.target)
        target.flat[: left.pop(0)] = 3
        return sample._replace(target=target)

    # image 2 has ten pixels of class 3
    sampling = RareClassSampling.from_counts(make_counts(IMAGES, 4), min_pixels=3000, tries=tries)
    plan = BatchPlan(num_samples=5, batch_size=2, seed=0, sampling=sampling)
    crop = read_draw(Painted(), transform, plan=plan, draw=Draw(0, 2, 0, 3))
    assert np.count_nonzero(crop.target) == kept
    assert len(left) == len(shown) - min(3, tries)


def test_first_try_is_the_augmentation_of_a_run_without_sampling(plan):
    without = BatchPlan(num_samples=5, batch_size=2, seed=11)
    draw = Draw(3, 1, 0, 0)
    ours, theirs = (read_draw(Painted(), cut_window, plan=one, draw=draw) for one in (plan, without))
    assert np.array_equal(ours.image, theirs.image)


def test_split_without_labels_is_refused():
    with pytest.raises(DataError, match="E-DATA-095"):
        RareClassSampling.from_counts(make_counts([{}, {}], 3))
