"""Where a model fails and what to try, from the counts of an evaluation alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestseg.metrics.calibration import Calibration
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import SegmentationScores

NO_CLASS = "no class"
"""What a prediction is called that is none of the classes."""

# what is worth a sentence
_WEAK = 0.1  # IoU below the mean
_LOPSIDED = 0.1  # between found and right when called
_RARE = 0.005  # of the labelled pixels
_MIXED = 0.005  # of mean IoU
_SMALL = 0.1  # IoU of the smallest objects below that of the largest of the class, in the median of the classes
_OBJECTS = 10  # of a size and class: what fewer say is chance
_CLASSES = 3  # of which that is known
_EDGES = 0.15  # boundary IoU below IoU
_SURE = 0.03  # confidence above accuracy
_WIDE = 0.04  # width of the interval
_MOST = 3  # sentences of a kind


class Confusion(NamedTuple):
    """Pixels of one class that were called another."""

    truth: int
    """Train id of what they are."""
    called: int
    """Train id of what they were called; K for no class."""
    pixels: int
    share: float
    """Of all pixels of the first class."""
    cost: float
    """What they take from the mean IoU."""


def find_confusions(confusion: ConfusionMatrix, scores: SegmentationScores) -> list[Confusion]:
    """List what was called what, the dearest first.

    A class's IoU is 1 minus its misses and its false alarms over its union. A confused pixel is a miss of one class and
    a false alarm of another, so its cost is one over the union of each, and all costs together with the mean IoU make 1
    where every class that is counted occurs and void pixels are left out.

    Args:
        confusion: Counts of the whole data set.
        scores: Computed from them.

    Example:
        >>> from nestseg.metrics.iou import compute_scores
        >>> confusion = ConfusionMatrix.from_counts(np.array([[3, 1, 0], [0, 4, 0]]))
        >>> find_confusions(confusion, compute_scores(confusion, absent="skip"))
        [Confusion(truth=0, called=1, pixels=1, share=0.25, cost=0.225)]
    """
    counts = confusion.counts
    right, actual, predicted = counts.diagonal(), counts.sum(axis=1), counts[:, :-1].sum(axis=0)
    if scores.void == "false_positive" and confusion.void_counts is not None:
        predicted = predicted + confusion.void_counts[:-1]
    union = np.maximum(1, actual + predicted - right)
    weights = np.append(1 / union, 0.0)  # no class is no class's false alarm
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    found = [
        Confusion(
            truth,
            called,
            int(wrong[truth, called]),
            int(wrong[truth, called]) / int(actual[truth]),
            float(wrong[truth, called] * (weights[truth] + weights[called]) / scores.num_classes_counted),
        )
        for truth, called in np.argwhere(wrong).tolist()
    ]
    return sorted(found, key=lambda one: -one.cost)


def word_confusion(confusion: Confusion, classes: Sequence[str]) -> str:
    """Say it in words.

    Example:
        >>> word_confusion(Confusion(0, 1, 12, 0.123, 0.01), ("person", "rider"))
        '12.3 % of person is called rider'
    """
    called = name_called(confusion.called, classes)
    return f"{word_share(confusion.share)} of {classes[confusion.truth]} is called {called}"


def word_share(share: float) -> str:
    """Word a share of a whole as sentences do.

    Example:
        >>> word_share(0.1234), word_share(0.000123), word_share(0)
        ('12.3 %', '0.012 %', '0.0 %')
    """
    return f"{100 * share:.1f} %" if share >= 0.001 or not share else f"{100 * share:.2g} %"


def name_called(called: int, classes: Sequence[str]) -> str:
    """Return the name of what a pixel was called, see `Confusion`."""
    return classes[called] if called < len(classes) else NO_CLASS


def confused_pixels(
    target: NDArray[np.uint8], labels: NDArray[np.uint8], *, num_classes: int
) -> dict[tuple[int, int], int]:
    """Count what was called what in one picture, the most frequent first.

    Args:
        target: Ground truth.
        labels: The prediction.
        num_classes: Number of classes K.

    Returns:
        Pixels by (truth, called), where called is K for no class.

    Shape:
        - target: (H, W) uint8 train ids or 255
        - labels: (H, W) uint8
    """
    wrong = (target < num_classes) & (target != labels)
    called = np.minimum(labels[wrong], num_classes)
    pairs, pixels = np.unique(target[wrong].astype(np.int64) * (num_classes + 1) + called, return_counts=True)
    found = zip(pairs.tolist(), pixels.tolist(), strict=True)
    return {divmod(pair, num_classes + 1): count for pair, count in sorted(found, key=lambda one: -one[1])}


def suggest_next(
    classes: Sequence[str],
    scores: SegmentationScores,
    *,
    confusion: ConfusionMatrix,
    interval: tuple[float, float] | None = None,
    boundary_iou: Sequence[float | None] | None = None,
    iou_by_size: Mapping[str, Sequence[float | None]] | None = None,
    objects_by_size: Mapping[str, Sequence[int]] | None = None,
    calibration: Calibration | None = None,
) -> list[str]:
    """Say what stands out in the numbers and what to try; nothing that the numbers do not show.

    Args:
        classes: Their names.
        scores: Scores of the whole data set.
        confusion: What they were computed from.
        interval: In which the mean IoU lies with 95 %.
        boundary_iou: A value a class.
        iou_by_size: A value a class, by the size of objects, the smallest first.
        objects_by_size: How many objects there are of each class, likewise; without it sizes are not compared.
        calibration: Confidence against accuracy.

    Returns:
        Sentences, the most useful first; none if nothing stands out.
    """
    sentences = [
        *_weak_classes(classes, scores, confusion),
        *_mixed_classes(classes, find_confusions(confusion, scores)),
    ]
    if iou_by_size is not None and objects_by_size is not None and len(iou_by_size) > 1:
        sentences += _small_objects(classes, iou_by_size, objects_by_size)
    if boundary_iou is not None:
        sentences += _edges(scores.iou_per_class, boundary_iou)
    if calibration is not None:
        sentences += _confidence(calibration)
    if interval is not None and interval[1] - interval[0] > _WIDE:
        sentences.append(
            f"With these images the mean IoU is known to {_points(interval[1] - interval[0])} points only "
            f"({word_share(interval[0])} to {word_share(interval[1])}). To tell models apart that differ by less, "
            f"evaluate on more images, or compare the two image by image."
        )
    pairs = zip(classes, scores.iou_per_class, scores.accuracy_per_class, strict=True)
    invented = [name for name, iou, recall in pairs if iou is not None and recall is None]
    if invented:
        sentences.append(
            f"Not in the labels of this split but predicted: {_list(invented)}. An IoU of 0 of each counts in the mean."
        )
    absent = [name for name, iou in zip(classes, scores.iou_per_class, strict=True) if iou is None]
    if absent:
        sentences.append(f"Nothing can be said of {_list(absent)}: not in the labels of this split, nor predicted.")
    return sentences


def _weak_classes(classes: Sequence[str], scores: SegmentationScores, confusion: ConfusionMatrix) -> list[str]:
    pixels = confusion.counts.sum(axis=1)
    shares = (pixels / pixels.sum()).tolist()
    rows = zip(
        scores.iou_per_class, scores.accuracy_per_class, scores.precision_per_class, shares, classes, strict=True
    )
    known = [
        (iou, recall, precision, share, name)
        for iou, recall, precision, share, name in rows
        if iou is not None and recall is not None and iou < scores.mean_iou - _WEAK
    ]
    weak = sorted(known, key=lambda row: row[0])[:_MOST]
    return [_weak_class(name, iou, recall, precision, share=share) for iou, recall, precision, share, name in weak]


def _weak_class(name: str, iou: float, recall: float, precision: float | None, *, share: float) -> str:
    start = f"{name} has an IoU of {word_share(iou)}"
    if precision is None:
        found = "it is never predicted"
    elif recall < precision - _LOPSIDED:
        found = f"only {word_share(recall)} of its pixels are found"
    elif precision < recall - _LOPSIDED:
        return f"{start}: only {word_share(precision)} of what is called {name} is {name}."
    else:
        found = f"{word_share(recall)} of its pixels are found, {word_share(precision)} of what is called so is right"
    if share >= _RARE:
        return f"{start}: {found}."
    return f"{start}: {found}. It is {word_share(share)} of the labelled pixels: try data.rare_class_sampling."


def _mixed_classes(classes: Sequence[str], confusions: Sequence[Confusion]) -> list[str]:
    pairs: dict[frozenset[int], list[Confusion]] = {}
    for one in confusions:
        if one.called < len(classes):
            pairs.setdefault(frozenset((one.truth, one.called)), []).append(one)
    dearest = sorted(pairs.values(), key=lambda both: -sum(one.cost for one in both))[:_MOST]
    sentences: list[str] = []
    for both in dearest:
        cost = sum(one.cost for one in both)
        if cost >= _MIXED:
            said = ", ".join(word_confusion(one, classes) for one in both)
            advice = "" if sentences else " See in its pictures whether the labels tell them apart."
            sentences.append(f"{said}: {_points(cost)} points of mean IoU.{advice}")
    return sentences


def _small_objects(
    classes: Sequence[str],
    iou_by_size: Mapping[str, Sequence[float | None]],
    objects_by_size: Mapping[str, Sequence[int]],
) -> list[str]:
    """Compare each class with itself: small cars with large cars, never small cars with large roads."""
    smallest, *larger = iou_by_size
    known: list[tuple[float, float, str]] = []
    for train_id, name in enumerate(classes):
        values = {
            size: iou
            for size, of_classes in iou_by_size.items()
            if (iou := of_classes[train_id]) is not None and objects_by_size[size][train_id] >= _OBJECTS
        }
        large = next((values[size] for size in reversed(larger) if size in values), None)
        if smallest in values and large is not None:
            known.append((values[smallest], large, name))
    if len(known) < _CLASSES or median(large - small for small, large, _ in known) < _SMALL:
        return []
    worst = sorted(known, key=lambda row: row[0] - row[1])[:_MOST]
    said = ", ".join(f"{name} {word_share(small)} against {word_share(large)}" for small, large, name in worst)
    return [
        f"Objects of size {smallest} have a lower IoU than the largest of their class, by "
        f"{_points(median(large - small for small, large, _ in known))} points in the median of {len(known)} classes "
        f"(most: {said}): try a larger data.crop_size, a smaller output stride, or evaluation at several scales."
    ]


def _edges(iou: Sequence[float | None], boundary_iou: Sequence[float | None]) -> list[str]:
    pairs = zip(iou, boundary_iou, strict=True)
    known = [(whole, edge) for whole, edge in pairs if whole is not None and edge is not None]
    if not known:
        return []
    whole, edge = (sum(values) / len(known) for values in zip(*known, strict=True))
    if whole - edge < _EDGES:
        return []
    return [
        f"Along the outlines the IoU is {word_share(edge)}, over whole areas {word_share(whole)}: "
        f"try a smaller output stride, or deeplabv3plus, which decodes with C2."
    ]


def _confidence(calibration: Calibration) -> list[str]:
    accuracy, confidence = calibration.accuracy, calibration.confidence
    if accuracy is None or confidence is None or confidence - accuracy < _SURE:
        return []
    return [
        f"The model is over-confident: {word_share(accuracy)} of the pixels are right, and it is sure of "
        f"{word_share(confidence)}. Do not read its confidence as a probability."
    ]


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _points(value: float) -> str:
    return f"{100 * value:.1f}"
