from __future__ import annotations

from random import Random

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import compute_scores

Pixels = NDArray[np.uint8]


@st.composite
def _pictures(draw: st.DrawFn) -> tuple[int, Pixels, Pixels]:
    """A class count, predictions of any value, and ground truth of classes and ignored pixels."""
    num_classes = draw(st.integers(1, 255))
    num_pixels = draw(st.integers(1, 200))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    target = generator.integers(0, num_classes, num_pixels, np.uint8)
    labels = np.where(
        generator.random(num_pixels) < draw(st.floats(0, 1)), target, generator.integers(0, 256, num_pixels)
    ).astype(np.uint8)
    target[generator.random(num_pixels) < draw(st.sampled_from([0, 0.3, 1]))] = 255
    return num_classes, labels, target


def _count(labels: Pixels, target: Pixels, num_classes: int) -> ConfusionMatrix:
    confusion = ConfusionMatrix(num_classes)
    confusion.update(labels, target)
    return confusion


@given(_pictures(), st.lists(st.integers(0, 200), max_size=5))
@settings(deadline=None)
def test_confusion_matrices_add_up_over_any_split(pictures: tuple[int, Pixels, Pixels], cuts: list[int]) -> None:
    num_classes, labels, target = pictures
    whole = _count(labels, target, num_classes)
    one_by_one, merged = ConfusionMatrix(num_classes), ConfusionMatrix(num_classes)
    for some_labels, some_target in zip(np.split(labels, sorted(cuts)), np.split(target, sorted(cuts)), strict=True):
        one_by_one.update(some_labels, some_target)
        merged = merged + _count(some_labels, some_target, num_classes)
    assert np.array_equal(one_by_one.counts, whole.counts)
    assert np.array_equal(merged.counts, whole.counts)


@given(_pictures())
@settings(deadline=None)
def test_every_labelled_pixel_is_counted_once_in_its_row(pictures: tuple[int, Pixels, Pixels]) -> None:
    num_classes, labels, target = pictures
    counts = _count(labels, target, num_classes).counts
    assert counts.sum(axis=1).tolist() == [(target == index).sum() for index in range(num_classes)]
    missed = [((target == index) & (labels >= num_classes)).sum() for index in range(num_classes)]
    assert counts[:, -1].tolist() == missed


@given(_pictures())
@settings(deadline=None)
def test_predictions_on_ignored_pixels_change_nothing(pictures: tuple[int, Pixels, Pixels]) -> None:
    num_classes, labels, target = pictures
    other = np.where(target == 255, 255 - labels, labels).astype(np.uint8)
    ours, theirs = _count(labels, target, num_classes), _count(other, target, num_classes)
    assert np.array_equal(ours.counts, theirs.counts)


@given(_pictures())
@settings(deadline=None)
def test_scores_equal_a_count_with_masks_and_stay_in_range(pictures: tuple[int, Pixels, Pixels]) -> None:
    num_classes, labels, target = pictures
    valid = target != 255
    assume(valid.any())
    scores = compute_scores(_count(labels, target, num_classes), absent="skip")
    expected: list[float | None] = []
    for index in range(num_classes):
        either = valid & ((labels == index) | (target == index))
        both = valid & (labels == index) & (target == index)
        expected.append(both.sum() / either.sum() if either.any() else None)
    assert scores.iou_per_class == tuple(expected)
    assert scores.pixel_accuracy == (labels[valid] == target[valid]).sum() / valid.sum()
    assert scores.num_classes_counted == sum(value is not None for value in expected)
    assert 0 <= scores.mean_iou <= 1
    assert compute_scores(_count(labels, target, num_classes), absent="zero").mean_iou <= scores.mean_iou


@given(_pictures(), st.randoms())
@settings(deadline=None)
def test_mean_iou_does_not_depend_on_the_order_of_the_classes(
    pictures: tuple[int, Pixels, Pixels], random: Random
) -> None:
    num_classes, labels, target = pictures
    assume((target != 255).any())
    order = list(range(num_classes))
    random.shuffle(order)
    table = np.array([*order, *range(num_classes, 256)], np.uint8)
    ours = compute_scores(_count(labels, target, num_classes), absent="skip")
    theirs = compute_scores(_count(table[labels], table[target], num_classes), absent="skip")
    assert abs(ours.mean_iou - theirs.mean_iou) < 1e-12
    assert [theirs.iou_per_class[new] for new in order] == list(ours.iou_per_class)


@given(_pictures())
@settings(deadline=None)
def test_a_perfect_prediction_scores_one(pictures: tuple[int, Pixels, Pixels]) -> None:
    num_classes, _, target = pictures
    assume((target != 255).any())
    scores = compute_scores(_count(target, target, num_classes), absent="skip")
    assert scores.mean_iou == scores.mean_accuracy == scores.pixel_accuracy == 1
