from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from nestseg.core.errors import DataError
from nestseg.data.datasets import DATASETS
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import compute_scores, final_score


def _count(labels: list[int], target: list[int], *, num_classes: int) -> ConfusionMatrix:
    confusion = ConfusionMatrix(num_classes)
    confusion.update(np.array([labels], np.uint8), np.array([target], np.uint8))
    return confusion


def test_rows_are_ground_truth_and_columns_are_predictions() -> None:
    confusion = _count([0, 1, 1, 1, 0], [0, 0, 0, 1, 255], num_classes=2)
    assert confusion.counts.tolist() == [[1, 2, 0], [0, 1, 0]]
    assert confusion.counts.dtype == np.int64


@pytest.mark.parametrize("nothing", [2, 200, 255])
def test_a_prediction_that_is_no_class_is_a_miss_and_is_not_lost(nothing: int) -> None:
    confusion = _count([0, nothing, 1], [0, 0, 1], num_classes=2)
    assert confusion.counts.tolist() == [[1, 0, 1], [0, 1, 0]]
    scores = compute_scores(confusion, absent="skip")
    assert scores.iou_per_class == (0.5, 1.0)
    assert scores.pixel_accuracy == pytest.approx(2 / 3)


def test_pixels_with_ignored_ground_truth_never_count_whatever_is_predicted() -> None:
    assert not _count([0, 1, 2, 255], [255] * 4, num_classes=2).counts.any()


def test_a_ground_truth_value_that_is_no_class_is_refused_and_nothing_is_counted() -> None:
    confusion = _count([0], [0], num_classes=19)
    with pytest.raises(DataError, match=r"E-DATA-014 .* 19, 254 .* allowed 0-18 or 255"):
        confusion.update(np.zeros((1, 3), np.uint8), np.array([[0, 19, 254]], np.uint8))
    assert confusion.counts.sum() == 1


def test_another_value_can_be_ignored_and_255_is_then_refused() -> None:
    confusion = ConfusionMatrix(2, ignore_index=2)
    confusion.update(np.array([[0, 1]], np.uint8), np.array([[2, 1]], np.uint8))
    assert confusion.counts.tolist() == [[0, 0, 0], [0, 1, 0]]
    with pytest.raises(DataError, match="label values 255"):
        confusion.update(np.zeros((1, 1), np.uint8), np.full((1, 1), 255, np.uint8))


def test_255_classes_are_counted_to_the_last_one() -> None:
    confusion = _count([254, 255, 0], [254, 254, 255], num_classes=255)
    assert confusion.counts[254, 254:].tolist() == [1, 1]
    assert confusion.counts.sum() == 2


def test_counts_beyond_the_last_exact_float32_are_exact() -> None:
    num_pixels = 2**24 + 1
    target = np.zeros((1, num_pixels), np.uint8)
    target[0, -3:] = 1
    confusion = ConfusionMatrix(2)
    confusion.update(np.zeros_like(target), target)
    confusion.update(np.zeros_like(target), target)
    assert confusion.counts.tolist() == [[2 * (num_pixels - 3), 0, 0], [6, 0, 0]]


def test_views_that_are_not_contiguous_are_counted_like_copies() -> None:
    generator = np.random.default_rng(0)
    labels, target = generator.integers(0, 5, (2, 40, 60), np.uint8)
    seen, copied = ConfusionMatrix(5), ConfusionMatrix(5)
    seen.update(labels[::2, ::-3], target[::2, ::-3])
    copied.update(labels[::2, ::-3].copy(), target[::2, ::-3].copy())
    assert np.array_equal(seen.counts, copied.counts)
    assert seen.counts.sum() == 20 * 20


def test_empty_pictures_count_nothing() -> None:
    assert not _count([], [], num_classes=3).counts.any()


def test_labels_of_another_size_or_type_are_refused() -> None:
    confusion = ConfusionMatrix(2)
    with pytest.raises(ValueError, match=r"labels \(2, 3\) and target \(3, 2\)"):
        confusion.update(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))
    with pytest.raises(TypeError, match="labels are int64"):
        confusion.update(np.zeros((2, 3), np.int64), np.zeros((2, 3), np.uint8))  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_classes", "ignore_index"), [(0, 255), (256, 255), (3, 2), (3, 256), (3, -1)])
def test_class_counts_and_ignored_values_outside_a_byte_are_refused(num_classes: int, ignore_index: int) -> None:
    with pytest.raises(ValueError, match="allowed"):
        ConfusionMatrix(num_classes, ignore_index=ignore_index)


def test_counts_survive_a_round_trip_and_are_copied() -> None:
    first = _count([0, 1], [0, 0], num_classes=2)
    second = ConfusionMatrix.from_counts(first.counts)
    second.update(np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8))
    assert first.counts.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert second.counts.tolist() == [[2, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize("counts", [np.zeros((2, 2), np.int64), np.zeros((2, 3)), np.full((2, 3), -1)])
def test_counts_that_are_no_confusion_matrix_are_refused(counts: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        ConfusionMatrix.from_counts(counts)


def test_adding_leaves_both_parts_as_they_were() -> None:
    first, second = _count([0], [0], num_classes=2), _count([0], [1], num_classes=2)
    assert (first + second).counts.tolist() == [[1, 0, 0], [1, 0, 0]]
    assert first.counts.sum() == second.counts.sum() == 1


@pytest.mark.parametrize("other", [ConfusionMatrix(3), ConfusionMatrix(2, ignore_index=254)])
def test_matrices_of_different_meaning_do_not_add_up(other: ConfusionMatrix) -> None:
    with pytest.raises(ValueError, match="do not add up"):
        ConfusionMatrix(2) + other


def test_scores_of_a_small_example_are_the_hand_computed_ones() -> None:
    # Class 0: 3 pixels, 2 right; class 1: 2 pixels, 1 right; each is once predicted where it is not.
    scores = compute_scores(_count([0, 0, 1, 1, 0], [0, 0, 0, 1, 1], num_classes=2), absent="skip")
    assert scores.iou_per_class == (2 / 4, 1 / 3)
    assert scores.mean_iou == pytest.approx(5 / 12)
    assert scores.accuracy_per_class == (2 / 3, 1 / 2)
    assert scores.mean_accuracy == pytest.approx(7 / 12)
    assert scores.pixel_accuracy == 3 / 5
    assert scores.num_classes_counted == 2


def test_a_class_that_occurs_nowhere_is_skipped_or_counts_as_zero_by_rule() -> None:
    confusion = _count([0, 1, 1], [0, 0, 1], num_classes=4)
    skipped, counted = (compute_scores(confusion, absent=rule) for rule in ("skip", "zero"))
    assert skipped.iou_per_class == counted.iou_per_class == (0.5, 0.5, None, None)
    assert (skipped.mean_iou, skipped.num_classes_counted) == (0.5, 2)
    assert (counted.mean_iou, counted.num_classes_counted) == (0.25, 4)
    assert (skipped.mean_accuracy, counted.mean_accuracy) == (0.75, 0.375)


@pytest.mark.parametrize("rule", ["skip", "zero"])
def test_a_class_that_is_only_predicted_has_iou_zero_and_counts(rule: str) -> None:
    scores = compute_scores(_count([0, 1], [0, 0], num_classes=2), absent=rule)  # type: ignore[arg-type]
    assert scores.iou_per_class == (0.5, 0.0)
    assert scores.accuracy_per_class == (0.5, None)
    assert scores.mean_iou == 0.25
    assert scores.num_classes_counted == 2


def test_a_void_prediction_does_not_become_a_false_positive_of_the_last_class() -> None:
    scores = compute_scores(_count([255, 1], [0, 1], num_classes=2), absent="skip")
    assert scores.iou_per_class == (0.0, 1.0)


def test_there_is_no_score_without_a_labelled_pixel() -> None:
    with pytest.raises(DataError, match="no labelled pixel"):
        compute_scores(_count([0], [255], num_classes=2), absent="zero")


def test_only_ade20k_counts_absent_classes_as_zero() -> None:
    assert {name for name, dataset in DATASETS.items() if dataset.absent_classes == "zero"} == {"ade20k"}


def test_metrics_can_be_imported_without_torch() -> None:
    code = "import sys, nestseg.metrics.iou; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_predictions_on_void_pixels_are_kept_apart_by_class() -> None:
    confusion = _count([0, 1, 1, 7, 255, 0], [255, 255, 255, 255, 255, 0], num_classes=3)
    assert confusion.counts.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert confusion.void_counts is not None
    assert confusion.void_counts.tolist() == [1, 2, 0, 2]
    assert confusion.void_counts.dtype == np.int64


def test_void_counts_of_another_ignored_value_are_those_of_that_value() -> None:
    confusion = ConfusionMatrix(2, ignore_index=2)
    confusion.update(np.array([[0, 1, 1]], np.uint8), np.array([[2, 2, 1]], np.uint8))
    assert confusion.void_counts is not None
    assert confusion.void_counts.tolist() == [1, 1, 0]


def test_void_counts_add_up_and_are_unknown_where_a_part_does_not_know_them() -> None:
    known = _count([0], [255], num_classes=2)
    assert known.void_counts is not None
    rebuilt = ConfusionMatrix.from_counts(known.counts, known.void_counts)
    rebuilt.update(np.ones((1, 1), np.uint8), np.full((1, 1), 255, np.uint8))
    summed = rebuilt + known
    assert summed.void_counts is not None
    assert (summed.void_counts.tolist(), known.void_counts.tolist()) == ([2, 1, 0], [1, 0, 0])
    unknown = ConfusionMatrix.from_counts(known.counts)
    unknown.update(np.zeros((1, 1), np.uint8), np.full((1, 1), 255, np.uint8))
    assert unknown.void_counts is (unknown + known).void_counts is (known + unknown).void_counts is None


@pytest.mark.parametrize("void_counts", [np.zeros(2, np.int64), np.zeros(3), np.full(3, -1)])
def test_void_counts_that_do_not_fit_are_refused(void_counts: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        ConfusionMatrix.from_counts(np.zeros((2, 3), np.int64), void_counts)


def test_dice_precision_and_weighted_iou_of_a_small_example_are_the_hand_computed_ones() -> None:
    # Class 0: 3 pixels, predicted 3 times, 2 right. Class 1: 3 pixels, predicted 2 times, 1 right, once as no class.
    scores = compute_scores(_count([0, 0, 1, 1, 0, 255], [0, 0, 0, 1, 1, 1], num_classes=2), absent="skip")
    assert scores.iou_per_class == (2 / 4, 1 / 4)
    assert scores.dice_per_class == (4 / 6, 2 / 5)
    assert scores.mean_dice == pytest.approx((4 / 6 + 2 / 5) / 2, rel=1e-15)
    assert scores.precision_per_class == (2 / 3, 1 / 2)
    assert scores.mean_precision == pytest.approx(7 / 12, rel=1e-15)
    assert scores.accuracy_per_class == (2 / 3, 1 / 3)
    assert scores.frequency_weighted_iou == pytest.approx(0.5 * 2 / 4 + 0.5 * 1 / 4, rel=1e-15)
    assert scores.void == "skip"


def test_the_void_rule_makes_predictions_on_void_pixels_false_positives_and_moves_nothing_else() -> None:
    confusion = _count([0, 1, 1, 1, 1, 255], [0, 1, 1, 255, 255, 255], num_classes=2)
    skipped, counted = (compute_scores(confusion, absent="skip", void=rule) for rule in ("skip", "false_positive"))
    assert (skipped.iou_per_class, counted.iou_per_class) == ((1.0, 1.0), (1.0, 2 / 4))
    assert (skipped.precision_per_class, counted.precision_per_class) == ((1.0, 1.0), (1.0, 2 / 4))
    assert (skipped.dice_per_class, counted.dice_per_class) == ((1.0, 1.0), (1.0, 4 / 6))
    assert counted.frequency_weighted_iou == pytest.approx(1 / 3 + 2 / 3 * 2 / 4, rel=1e-15)
    assert skipped.accuracy_per_class == counted.accuracy_per_class == (1.0, 1.0)
    assert skipped.pixel_accuracy == counted.pixel_accuracy == 1
    assert (skipped.void, counted.void) == ("skip", "false_positive")


def test_a_class_that_is_predicted_on_void_pixels_only_is_absent_by_one_rule_and_wrong_by_the_other() -> None:
    confusion = _count([0, 1], [0, 255], num_classes=2)
    assert compute_scores(confusion, absent="skip").iou_per_class == (1.0, None)
    scores = compute_scores(confusion, absent="skip", void="false_positive")
    assert (scores.iou_per_class, scores.num_classes_counted, scores.mean_iou) == ((1.0, 0.0), 2, 0.5)


def test_the_void_rule_cannot_be_asked_of_counts_that_do_not_know_it() -> None:
    confusion = ConfusionMatrix.from_counts(_count([0], [0], num_classes=2).counts)
    assert compute_scores(confusion, absent="skip").mean_iou == 1
    with pytest.raises(ValueError, match="void_counts are not known"):
        compute_scores(confusion, absent="skip", void="false_positive")


@pytest.mark.parametrize(("absent", "mean"), [("skip", None), ("zero", 0.0)])
def test_no_precision_is_none_where_no_class_is_predicted_at_all(absent: str, mean: float | None) -> None:
    scores = compute_scores(_count([255, 255], [0, 1], num_classes=2), absent=absent)  # type: ignore[arg-type]
    assert scores.precision_per_class == (None, None)
    assert scores.mean_precision == mean
    assert scores.mean_iou == scores.mean_dice == scores.frequency_weighted_iou == 0


def test_final_score_is_the_mean_of_pixel_accuracy_and_mean_iou() -> None:
    scores = compute_scores(_count([0, 0, 1, 1, 0], [0, 0, 0, 1, 1], num_classes=2), absent="zero")
    assert final_score(scores) == pytest.approx((3 / 5 + 5 / 12) / 2, rel=1e-15)


def test_more_pixels_than_float32_can_count_are_exact_in_all_counts() -> None:
    # 2^24 + 1 is the first whole number that float32 does not have; 2^53 + 1 the first that float64 does not have.
    for count in (2**24, 2**53):
        big = ConfusionMatrix.from_counts(np.array([[count, 0]]), np.array([count, 0]))
        summed = big + _count([0, 0], [0, 255], num_classes=1)
        assert summed.void_counts is not None
        assert (int(summed.counts[0, 0]), int(summed.void_counts[0])) == (count + 1, count + 1)
