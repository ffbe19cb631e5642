"""Scores of a whole data set from its confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.types import AbsentRule
from nestseg.metrics.confusion import ConfusionMatrix


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationScores:
    """Scores in [0, 1] over a whole data set; None where a class has no score, so that JSON never holds NaN.

    Args:
        mean_iou: Mean of the IoU over the classes that count.
        iou_per_class: Intersection over union in train-id order; None for a class that occurs neither in
            ground truth nor in prediction.
        pixel_accuracy: Share of labelled pixels that are right.
        mean_accuracy: Mean of the accuracy over the classes that count.
        accuracy_per_class: Share of a class's pixels that are right; None for a class without a pixel.
        num_classes_counted: Number of classes in ``mean_iou``; below K where absent classes are skipped.
    """

    mean_iou: float
    iou_per_class: tuple[float | None, ...]
    pixel_accuracy: float
    mean_accuracy: float
    accuracy_per_class: tuple[float | None, ...]
    num_classes_counted: int


def compute_scores(confusion: ConfusionMatrix, *, absent: AbsentRule) -> SegmentationScores:
    """Compute the scores of a data set from all its pixels at once; never a mean over pictures.

    A class that is predicted but has no ground truth pixel has IoU 0, and that counts under both rules.

    Args:
        confusion: Counts of the whole data set.
        absent: Whether a class that occurs neither in ground truth nor in prediction is left out of the means
            or counts as 0 in them; the data set says which.

    Returns:
        The scores, unrounded.

    Raises:
        DataError: If no labelled pixel was counted, since there is no score then.

    Reference:
        Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective", IJCV 2015,
        section 2.4 (intersection over union); Cordts et al., "The Cityscapes Dataset", CVPR 2016,
        section 3.1; the evaluation script of the MIT Scene Parsing Benchmark (absent classes count as 0).

    Deviations:
        ADE20K's own script adds a small constant to the denominators; here absent classes are a rule instead.

    Example:
        >>> confusion = ConfusionMatrix(3)
        >>> confusion.update(np.array([[0, 1, 1, 1]], np.uint8), np.array([[0, 0, 1, 1]], np.uint8))
        >>> scores = compute_scores(confusion, absent="skip")
        >>> scores.iou_per_class
        (0.5, 0.6666666666666666, None)
        >>> f"{100 * scores.mean_iou:.2f} over {scores.num_classes_counted} classes"
        '58.33 over 2 classes'
    """
    right = confusion.counts.diagonal()
    actual = confusion.counts.sum(axis=1)
    predicted = confusion.counts[:, :-1].sum(axis=0)
    if not actual.any():
        raise DataError(
            "E-DATA-080",
            "no labelled pixel was counted, so there is no score",
            fix="evaluate on a split that has ground truth",
        )
    iou = _ratios(right, actual + predicted - right)
    accuracy = _ratios(right, actual)
    num_absent = iou.count(None)
    return SegmentationScores(
        mean_iou=_mean(iou, absent=absent),
        iou_per_class=iou,
        pixel_accuracy=int(right.sum()) / int(actual.sum()),
        mean_accuracy=_mean(accuracy, absent=absent),
        accuracy_per_class=accuracy,
        num_classes_counted=len(iou) - (num_absent if absent == "skip" else 0),
    )


def _ratios(parts: NDArray[np.int64], wholes: NDArray[np.int64]) -> tuple[float | None, ...]:
    """Divide class by class, None where the whole is 0.

    Shape:
        - parts, wholes: (K,) int64
    """
    pairs = zip(parts.tolist(), wholes.tolist(), strict=True)
    return tuple(part / whole if whole else None for part, whole in pairs)


def _mean(values: tuple[float | None, ...], *, absent: AbsentRule) -> float:
    """Average over the classes that have a value, or over all of them with 0 for the others."""
    present = [value for value in values if value is not None]
    return sum(present) / (len(present) if absent == "skip" else len(values))
