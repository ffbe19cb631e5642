"""The scores as VOC, ADE20K and CamVid define them, counted pixel by pixel; sums over splits of Cityscapes' counts."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nestseg.metrics.cityscapes import CityscapesCounts, compute_cityscapes_scores
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import SegmentationScores, VoidRule, compute_scores, final_score

Pixels = NDArray[np.uint8]


@st.composite
def draw_pictures(draw: st.DrawFn, num_classes: int) -> list[tuple[list[int], list[int]]]:
    """Pictures of few pixels: train ids of the ground truth with some void, predictions of classes and of none."""
    classes = draw(st.lists(st.integers(0, num_classes - 1), min_size=1, max_size=4))
    truth = st.sampled_from([*classes, 255])
    guess = st.sampled_from([*classes, num_classes, 255]) | st.integers(0, num_classes - 1)
    pixels = draw(st.lists(st.lists(st.tuples(guess, truth), min_size=1, max_size=12), min_size=1, max_size=3))
    return [([label for label, _ in picture], [target for _, target in picture]) for picture in pixels]


def score(pictures, num_classes: int, *, absent: str, void: VoidRule = "skip") -> SegmentationScores:
    confusion = ConfusionMatrix(num_classes)
    for labels, target in pictures:
        confusion.update(np.array(labels, np.uint8), np.array(target, np.uint8))
    assume(confusion.counts.any())
    return compute_scores(confusion, absent=absent, void=void)


def flatten(pictures) -> list[tuple[int, int]]:
    return [pair for labels, target in pictures for pair in zip(labels, target, strict=True)]


@given(draw_pictures(21))
@settings(deadline=None)
def test_voc_score_is_true_over_true_and_false_positives_and_false_negatives_without_the_border(pictures):
    pixels = [(label, target) for label, target in flatten(pictures) if target != 255]
    scores = score(pictures, 21, absent="skip")
    expected = []
    for index in range(21):
        true = sum(label == target == index for label, target in pixels)
        false_positives = sum(label == index != target for label, target in pixels)
        false_negatives = sum(target == index != label for label, target in pixels)
        total = true + false_positives + false_negatives
        expected.append(true / total if total else None)
    assert scores.iou_per_class == tuple(expected)
    present = [value for value in expected if value is not None]
    assert abs(scores.mean_iou - sum(present) / len(present)) < 1e-14
    assert scores.num_classes_counted == len(present)


@given(draw_pictures(150))
@settings(deadline=None)
def test_ade20k_score_is_over_all_150_classes_and_its_final_score_is_with_pixel_accuracy(pictures):
    # stored ids as in the challenge: 0 is anything else, k is class k - 1; what is no class is stored as 0
    pixels = [
        (0 if label >= 150 else label + 1, 0 if target == 255 else target + 1) for label, target in flatten(pictures)
    ]
    labelled = [(label, target) for label, target in pixels if target > 0]
    scores = score(pictures, 150, absent="zero")
    total = Fraction(0)
    for index in range(1, 151):
        intersection = sum(label == target == index for label, target in labelled)
        union = sum(index in pair for pair in labelled)
        total += Fraction(intersection, union) if union else 0
    accuracy = Fraction(sum(label == target for label, target in labelled), len(labelled))
    assert abs(scores.mean_iou - total / 150) < 1e-14
    assert scores.pixel_accuracy == float(accuracy)
    assert abs(final_score(scores) - (accuracy + total / 150) / 2) < 1e-14
    assert scores.num_classes_counted == 150


@given(draw_pictures(11), st.sampled_from(["skip", "false_positive"]))
@settings(deadline=None)
def test_camvid_scores_by_either_void_rule(pictures, void):
    pixels = flatten(pictures)
    labelled = [(label, target) for label, target in pixels if target != 255]
    scores = score(pictures, 11, absent="skip", void=void)
    seen = labelled if void == "skip" else pixels
    expected_iou, expected_dice, expected_precision, expected_recall, weighted = [], [], [], [], Fraction(0)
    for index in range(11):
        true = sum(label == target == index for label, target in labelled)
        actual = sum(target == index for _, target in labelled)
        predicted = sum(label == index for label, _ in seen)
        union = sum(index in pair for pair in seen)
        expected_iou.append(true / union if union else None)
        expected_dice.append(2 * true / (actual + predicted) if actual + predicted else None)
        expected_precision.append(true / predicted if predicted else None)
        expected_recall.append(true / actual if actual else None)
        weighted += Fraction(actual * true, len(labelled) * union) if union else 0
    assert scores.iou_per_class == tuple(expected_iou)
    assert scores.dice_per_class == tuple(expected_dice)
    assert scores.precision_per_class == tuple(expected_precision)
    assert scores.accuracy_per_class == tuple(expected_recall)
    assert abs(scores.frequency_weighted_iou - weighted) < 1e-14
    for mean, values in ((scores.mean_dice, expected_dice), (scores.mean_precision, expected_precision)):
        present = [value for value in values if value is not None]
        assert mean is None if not present else abs(mean - sum(present) / len(present)) < 1e-14
    assert scores.void == void


@given(draw_pictures(11), st.data())
@settings(deadline=None)
def test_void_counts_add_up_over_any_split(pictures, data):
    whole, parts = ConfusionMatrix(11), [ConfusionMatrix(11) for _ in range(3)]
    for labels, target in pictures:
        arrays = np.array(labels, np.uint8), np.array(target, np.uint8)
        whole.update(*arrays)
        data.draw(st.sampled_from(parts)).update(*arrays)
    merged = parts[0] + parts[1] + parts[2]
    assert np.array_equal(merged.counts, whole.counts)
    assert np.array_equal(merged.void_counts, whole.void_counts)
    assert whole.void_counts.sum() == sum(target == 255 for _, target in flatten(pictures))


@st.composite
def draw_streets(draw: st.DrawFn) -> list[tuple[Pixels, Pixels, NDArray[np.uint16] | None]]:
    """Pictures of label ids with instances, or without an instance map."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    pictures = []
    for has_map in draw(st.lists(st.sampled_from([True, True, True, False]), min_size=1, max_size=4)):
        size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
        truth = generator.choice([7, 24, 26, 27, 33, 255], size).astype(np.uint8)
        prediction = np.where(generator.random(size) < 0.6, truth, generator.integers(0, 256, size)).astype(np.uint8)
        numbered = np.isin(truth, (24, 26, 27, 33)) & (generator.random(size) < 0.8)
        instances = np.where(numbered, truth.astype(np.uint16) * 1000 + generator.integers(0, 4, size), truth)
        pictures.append((prediction, truth, instances.astype(np.uint16) if has_map else None))
    return pictures


@given(draw_streets(), st.data())
@settings(deadline=None)
def test_cityscapes_counts_add_up_over_any_split_and_any_number_of_ranks(pictures, data):
    whole, ranks = CityscapesCounts(), [CityscapesCounts() for _ in range(3)]
    for picture in pictures:
        whole.update(*picture)
        data.draw(st.sampled_from(ranks)).update(*picture)
    merged = ranks[2] + ranks[0] + ranks[1]
    assert np.array_equal(merged.counts, whole.counts)
    summed = CityscapesCounts.from_counts(sum(rank.counts for rank in ranks))
    assert np.array_equal(summed.counts, whole.counts)
    assert compute_cityscapes_scores(summed) == compute_cityscapes_scores(whole)


@given(draw_streets())
@settings(deadline=None)
def test_instance_scores_equal_exact_fractions(pictures):
    assume(all(instances is not None for _, _, instances in pictures))
    counts = CityscapesCounts()
    shares, number, mistaken = Fraction(0), 0, 0
    for prediction, truth, instances in pictures:
        counts.update(prediction, truth, instances)
        for instance in np.unique(instances[instances // 1000 == 26]):
            inside = instances == instance
            shares += Fraction(int((prediction[inside] == 26).sum()), int(inside.sum()))
            number += 1
        mistaken += int(((prediction == 26) & (truth != 26) & (truth != 255)).sum())
    size = Fraction("12794.0202738185")
    ours = compute_cityscapes_scores(counts).class_iiou["car"]
    if number + mistaken == 0:
        assert ours is None
    else:
        assert abs(ours - size * shares / (size * number + mistaken)) < 1e-12
