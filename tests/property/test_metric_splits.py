"""Every accumulator adds up to the same integers, however the images are split and whoever counts them (E3, E4)."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import NamedTuple

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nestseg.metrics.boundary import BoundaryCounts, boundary_iou
from nestseg.metrics.calibration import CalibrationCounts, compute_calibration
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.image_scores import ImageScores, image_counts
from nestseg.metrics.objects import ObjectCounts

Pixels = NDArray[np.uint8]


class Picture(NamedTuple):
    labels: Pixels
    target: Pixels
    confidence: NDArray[np.float32]


class Counts(NamedTuple):
    boundary: BoundaryCounts
    objects: ObjectCounts
    calibration: CalibrationCounts
    images: ImageScores
    confusion: ConfusionMatrix


@st.composite
def _pictures(draw: st.DrawFn) -> tuple[int, list[Picture]]:
    """Pictures of any sizes: blocks of classes with noise, ignored pixels and predictions of no class."""
    num_classes = draw(st.one_of(st.integers(1, 5), st.just(255)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    pictures = []
    for height, width in draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6)):
        block = draw(st.integers(1, 6))
        coarse = generator.integers(0, num_classes, (height // block + 1, width // block + 1), np.uint8)
        target = coarse.repeat(block, 0).repeat(block, 1)[:height, :width].copy()
        noise = generator.integers(0, 256, target.shape, np.uint8)
        labels = np.where(generator.random(target.shape) < draw(st.sampled_from([0, 0.2, 0.8])), noise, target)
        target[generator.random(target.shape) < draw(st.sampled_from([0, 0.3, 1]))] = 255
        pictures.append(Picture(labels, target, generator.random(target.shape).astype(np.float32)))
    return num_classes, pictures


def _count(pictures: list[tuple[int, Picture]], num_classes: int) -> Counts:
    counts = Counts(
        BoundaryCounts(num_classes, 0.1),
        ObjectCounts(num_classes, (4, 20)),
        CalibrationCounts(),
        ImageScores([f"class {index}" for index in range(num_classes)]),
        ConfusionMatrix(num_classes),
    )
    for index, (labels, target, confidence) in pictures:
        one = ConfusionMatrix(num_classes)
        one.update(labels, target)
        counts.boundary.update(labels, target)
        counts.objects.update(labels, target)
        counts.calibration.update(confidence, labels, target)
        counts.images.update(index, f"picture {index}", image_counts(one))
        counts.confusion.update(labels, target)
    return counts


@given(_pictures(), st.integers(1, 8), st.randoms())
@settings(deadline=None, max_examples=60)
def test_any_split_over_any_number_of_ranks_gives_the_same_integers(
    drawn: tuple[int, list[Picture]], num_ranks: int, random: object
) -> None:
    num_classes, pictures = drawn
    numbered = list(enumerate(pictures))
    whole = _count(numbered, num_classes)
    ranks = [_count(numbered[rank::num_ranks], num_classes) for rank in range(num_ranks)]
    random.shuffle(ranks)  # type: ignore[attr-defined]
    for place, expected in enumerate(whole):
        merged = reduce(add, (rank[place] for rank in ranks))
        assert merged.counts.dtype == np.int64
        assert np.array_equal(merged.counts, expected.counts)
        if place < 3:  # what the engine does between processes
            summed = np.sum([rank[place].counts for rank in ranks], axis=0)
            assert np.array_equal(summed, expected.counts)


@given(_pictures())
@settings(deadline=None, max_examples=60)
def test_every_count_agrees_with_the_confusion_matrix(drawn: tuple[int, list[Picture]]) -> None:
    num_classes, pictures = drawn
    counts = _count(list(enumerate(pictures)), num_classes)
    expected = image_counts(counts.confusion)
    assert np.array_equal(counts.images.counts.sum(axis=0), expected)
    assert np.array_equal(counts.objects.counts[..., :3].sum(axis=1), expected)
    assert counts.calibration.counts[:, 0].sum() == expected[:, 1].sum()
    assert counts.calibration.counts[:, 1].sum() == expected[:, 0].sum()
    intersection, union = counts.boundary.counts.T
    assert (intersection <= expected[:, 0]).all()
    assert (union <= expected[:, 1] + expected[:, 2] - intersection).all()
    whole_band = BoundaryCounts(num_classes, 1.0)
    for picture in pictures:
        whole_band.update(picture.labels, picture.target)
    right, actual, predicted = expected.T
    # a band as wide as the picture is all of it
    assert np.array_equal(whole_band.counts, np.stack([right, actual + predicted - right], axis=1))


@given(_pictures(), st.integers(0, 255))
@settings(deadline=None, max_examples=60)
def test_predictions_on_ignored_pixels_change_nothing(drawn: tuple[int, list[Picture]], other: int) -> None:
    num_classes, pictures = drawn
    changed = [
        Picture(np.where(target == 255, np.uint8(other), labels), target, np.where(target == 255, 0, confidence))
        for labels, target, confidence in pictures
    ]
    ours, theirs = (_count(list(enumerate(each)), num_classes) for each in (pictures, changed))
    assert all(np.array_equal(a.counts, b.counts) for a, b in zip(ours, theirs, strict=True))


@given(_pictures())
@settings(deadline=None, max_examples=60)
def test_a_mirrored_picture_counts_the_same(drawn: tuple[int, list[Picture]]) -> None:
    num_classes, pictures = drawn
    for turn in (np.fliplr, np.flipud, np.transpose):
        turned = [Picture(*(turn(part) for part in picture)) for picture in pictures]
        ours, theirs = (_count(list(enumerate(each)), num_classes) for each in (pictures, turned))
        assert all(np.array_equal(a.counts, b.counts) for a, b in zip(ours, theirs, strict=True))


@given(_pictures())
@settings(deadline=None, max_examples=60)
def test_a_perfect_prediction_scores_one_everywhere(drawn: tuple[int, list[Picture]]) -> None:
    num_classes, pictures = drawn
    counts = _count(
        [(i, Picture(p.target, p.target, np.ones_like(p.confidence))) for i, p in enumerate(pictures)], num_classes
    )
    assert set(boundary_iou(counts.boundary.counts)) <= {1.0, None}
    assert {score.mean_iou for score in counts.images.scores()} <= {1.0, None}
    assert compute_calibration(counts.calibration.counts).expected_calibration_error in (0, None)
