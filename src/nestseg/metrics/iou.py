"""Scores of a whole data set from its confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.types import AbsentRule
from nestseg.metrics.confusion import ConfusionMatrix

VoidRule = Literal["skip", "false_positive"]
"""What a class predicted on a pixel without ground truth is: not counted, or a false positive of that class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentationScores:
    """Scores in [0, 1] over a whole data set; None where a class has no score, so that JSON never holds NaN.

    Args:
        mean_iou: Mean of the IoU over the classes that count.
        iou_per_class: Intersection over union in train-id order; None for a class that occurs neither in
            ground truth nor in prediction.
        pixel_accuracy: Share of labelled pixels that are right.
        mean_accuracy: Mean of the accuracy over the classes that count.
        accuracy_per_class: Share of a class's pixels that are right, which is its recall; None for a class without a
            pixel.
        num_classes_counted: Number of classes in ``mean_iou``; below K where absent classes are skipped.
        mean_dice: Mean of Dice over the classes that count.
        dice_per_class: Dice, which is F1: twice the intersection over the sum of both sizes; None as for IoU.
        mean_precision: Mean of the precision over the classes that count; None where no class has one.
        precision_per_class: Share of the pixels predicted as a class that are right; None for a class that is not
            predicted.
        frequency_weighted_iou: IoU averaged with each class's share of the labelled pixels as weight.
        void: What predictions on pixels without ground truth were.
    """

    mean_iou: float
    iou_per_class: tuple[float | None, ...]
    pixel_accuracy: float
    mean_accuracy: float
    accuracy_per_class: tuple[float | None, ...]
    num_classes_counted: int
    mean_dice: float
    dice_per_class: tuple[float | None, ...]
    mean_precision: float | None
    precision_per_class: tuple[float | None, ...]
    frequency_weighted_iou: float
    void: VoidRule


def compute_scores(confusion: ConfusionMatrix, *, absent: AbsentRule, void: VoidRule = "skip") -> SegmentationScores:
    """Compute the scores of a data set from all its pixels at once; never a mean over pictures.

    A class that is predicted but has no ground truth pixel has IoU 0, and that counts under both rules.

    Args:
        confusion: Counts of the whole data set.
        absent: Whether a class that occurs neither in ground truth nor in prediction is left out of the means
            or counts as 0 in them; the data set says which. The same holds in each mean for a class without a value.
        void: Whether predictions on pixels without ground truth are left out, as everywhere but in some papers on
            CamVid, or are false positives. The latter lowers IoU, Dice and precision; accuracy is of labelled pixels.

    Returns:
        The scores, unrounded.

    Raises:
        ValueError: If the counts do not know what was predicted on such pixels, and the rule needs it.
        DataError: If no labelled pixel was counted, since there is no score then.

    Reference:
        Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective", IJCV 2015,
        section 2.4 (intersection over union); Cordts et al., "The Cityscapes Dataset", CVPR 2016,
        section 3.1; the evaluation script of the MIT Scene Parsing Benchmark (absent classes count as 0);
        Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015, section 5
        (frequency-weighted IoU); van Rijsbergen, "Information Retrieval", 1979, chapter 7 (precision, recall, F).

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
    if void == "false_positive":
        if confusion.void_counts is None:
            raise ValueError("void_counts are not known; give them to ConfusionMatrix.from_counts")
        predicted = predicted + confusion.void_counts[:-1]
    if not actual.any():
        raise DataError(
            "E-DATA-080",
            "no labelled pixel was counted, so there is no score",
            fix="evaluate on a split that has ground truth",
        )
    iou = _ratios(right, actual + predicted - right)
    accuracy = _ratios(right, actual)
    dice = _ratios(2 * right, actual + predicted)
    precision = _ratios(right, predicted)
    num_absent = iou.count(None)
    weighted = sum(count * (value or 0.0) for count, value in zip(actual.tolist(), iou, strict=True))
    return SegmentationScores(
        mean_iou=_mean(iou, absent=absent),
        iou_per_class=iou,
        pixel_accuracy=int(right.sum()) / int(actual.sum()),
        mean_accuracy=_mean(accuracy, absent=absent),
        accuracy_per_class=accuracy,
        num_classes_counted=len(iou) - (num_absent if absent == "skip" else 0),
        mean_dice=_mean(dice, absent=absent),
        dice_per_class=dice,
        mean_precision=_mean(precision, absent=absent) if predicted.any() or absent == "zero" else None,
        precision_per_class=precision,
        frequency_weighted_iou=weighted / int(actual.sum()),
        void=void,
    )


def final_score(scores: SegmentationScores) -> float:
    """Return the score that ADE20K's scene parsing challenge ranks by: the mean of pixel accuracy and mean IoU.

    Args:
        scores: Scores in which absent classes count as 0.

    Reference:
        MIT Scene Parsing Benchmark, "Evaluation".

    Deviations:
        None known.
    """
    return (scores.pixel_accuracy + scores.mean_iou) / 2


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
