"""How far a mean IoU would move with other images of the same kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestseg.core.types import AbsentRule
from nestseg.metrics.label_maps import check_counts

_DRAWN_AT_ONCE = 1 << 22
"""Weights of images drawn in one go, 8 bytes each; memory stays below this however many repeats there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A score and where it may lie.

    Args:
        value: The score of the whole data set.
        low: Lower end of the interval.
        high: Upper end.
        level: Share of the resampled scores between the two.
        num_images: Images that were drawn from.
    """

    value: float
    low: float
    high: float
    level: float
    num_images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """By how much the second of two models is better on the same images.

    Args:
        difference: Mean IoU of the second minus that of the first.
        low: Lower end of its interval.
        high: Upper end.
        level: Share of the resampled differences between the two.
        share_below_zero: Share of resampled differences in which the second is worse; a tie counts half.
        p_value: Two-sided: how often chance alone would separate two equal models so far. At least 2 / (repeats + 1),
            and at least how often N images would all favour the same of two equal models, 2^(1 - N).
        num_images: Images that were drawn from.
    """

    difference: float
    low: float
    high: float
    level: float
    share_below_zero: float
    p_value: float
    num_images: int


def bootstrap_mean_iou(
    counts: NDArray[np.int64], *, absent: AbsentRule, repeats: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Compute the mean IoU of a data set, and an interval around it by drawing its images anew.

    Each repeat draws as many images as there are, with replacement, adds their pixels up and scores the sum. Images
    without a counted pixel are left out, since they cannot change a score.

    Args:
        counts: See `ImageScores`.
        absent: Whether a class that occurs nowhere is left out of the mean or counts as 0; for repeats too.
        repeats: How often to draw.
        seed: The same seed draws the same images.
        level: Share of the repeats inside the interval.

    Raises:
        ValueError: If an argument is outside its range, or no image has a counted pixel.

    Shape:
        - counts: (N, K, 3) int64: right pixels, pixels in ground truth, pixels in the prediction

    Reference:
        Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3: the percentile interval.

    Deviations:
        None known.

    Example:
        >>> counts = np.array([[[9, 10, 10]], [[5, 10, 10]], [[7, 10, 10]]])
        >>> found = bootstrap_mean_iou(counts, absent="skip")
        >>> f"{found.value:.3f} in {found.low:.3f} to {found.high:.3f}"
        '0.538 in 0.333 to 0.818'
    """
    _check(counts, repeats=repeats, level=level)
    counts = counts[counts.any(axis=(1, 2))]
    if not len(counts):
        raise ValueError("no image has a counted pixel; expected at least one")
    drawn = np.concatenate([_mean_iou(sums, absent) for (sums,) in _resample((counts,), repeats, seed)])
    low, high = _percentiles(drawn, level)
    return Interval(value=_exact_mean_iou(counts, absent), low=low, high=high, level=level, num_images=len(counts))


def paired_bootstrap(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    *,
    absent: AbsentRule,
    repeats: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> PairedDifference:
    """Compute by how much the second model's mean IoU is above the first's, drawing the same images for both.

    Args:
        first: Counts of the first model, see `ImageScores`.
        second: Counts of the second, of the same images in the same order.
        absent: See `bootstrap_mean_iou`.
        repeats: How often to draw.
        seed: The same seed draws the same images.
        level: Share of the repeats inside the interval.

    Raises:
        ValueError: If an argument is outside its range, the two differ in images, classes or ground truth, or no image
            has a counted pixel.

    Shape:
        - first, second: (N, K, 3) int64: right pixels, pixels in ground truth, pixels in the prediction

    Reference:
        Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, sections 13.3 and 15.4: the percentile interval,
        and the level at which it reaches zero; Davison, Hinkley, "Bootstrap Methods and their Application", 1997,
        chapter 4: one is added to both counts, since a finite number of repeats cannot show a chance of 0.

    Deviations:
        The p-value has a second floor, that of the sign test: draws from one image, or from three that agree, never
        reach zero, however little so few images prove.

    Example:
        >>> first = np.array([[[9, 10, 10]], [[5, 10, 10]], [[7, 10, 10]]])
        >>> second = first + np.array([1, 0, 0])
        >>> found = paired_bootstrap(first, second, absent="skip")
        >>> round(found.difference, 3), found.low > 0, round(found.p_value, 4)
        (0.128, True, 0.25)
    """
    _check(first, repeats=repeats, level=level)
    _check(second, repeats=repeats, level=level)
    if first.shape != second.shape or not np.array_equal(first[..., 1], second[..., 1]):
        raise ValueError(f"counts {first.shape} and {second.shape}; expected two models on the same ground truth")
    kept = first.any(axis=(1, 2)) | second.any(axis=(1, 2))
    first, second = first[kept], second[kept]
    if not len(first):
        raise ValueError("no image has a counted pixel; expected at least one")
    drawn = np.concatenate(
        [_mean_iou(b, absent) - _mean_iou(a, absent) for a, b in _resample((first, second), repeats, seed)]
    )
    low, high = _percentiles(drawn, level)
    below, ties = int((drawn < 0).sum()), int((drawn == 0).sum())
    tail = min(below + ties, repeats - below)
    return PairedDifference(
        difference=_exact_mean_iou(second, absent) - _exact_mean_iou(first, absent),
        low=low,
        high=high,
        level=level,
        share_below_zero=(below + ties / 2) / repeats,
        p_value=min(1.0, max(2 * (tail + 1) / (repeats + 1), 2.0 ** (1 - len(first)))),
        num_images=len(first),
    )


def _check(counts: NDArray[np.int64], *, repeats: int, level: float) -> None:
    check_counts(counts, (None, None, 3))
    if repeats < 1 or not 0 < level < 1:
        raise ValueError(f"repeats {repeats} and level {level}; allowed 1 and up, and between 0 and 1")


def _resample(
    models: tuple[NDArray[np.int64], ...], repeats: int, seed: int
) -> Iterator[tuple[NDArray[np.float64], ...]]:
    """Draw images with replacement and add their counts up, the same images for each model.

    How often each image is drawn is a row of weights, so that adding up is a product of matrices. Whole numbers below
    2^53 come out of it exact, in whatever order it adds.

    Shape:
        - models: (N, K, 3) int64 each
        - yields: (R, K, 3) float64 each, whole numbers; R adds up to ``repeats``
    """
    generator = np.random.default_rng(seed)
    num_images = len(models[0])
    flat = [counts.reshape(num_images, -1).astype(np.float64) for counts in models]
    at_once = max(1, _DRAWN_AT_ONCE // num_images)
    for begin in range(0, repeats, at_once):
        number = min(at_once, repeats - begin)
        images = generator.integers(num_images, size=(number, num_images))
        images += num_images * np.arange(number)[:, None]
        weights = np.bincount(images.ravel(), minlength=images.size).reshape(images.shape).astype(np.float64)
        yield tuple((weights @ counts).reshape(number, -1, 3) for counts in flat)


def _mean_iou(sums: NDArray[np.float64], absent: AbsentRule) -> NDArray[np.float64]:
    """Score the sums of many draws.

    Shape:
        - sums: (R, K, 3) float64
        - returns: (R,) float64
    """
    right, actual, predicted = np.moveaxis(sums, 2, 0)
    union = actual + predicted - right
    iou = np.where(union > 0, right / np.maximum(union, 1), 0)
    num_classes = (union > 0).sum(axis=1) if absent == "skip" else np.full(len(sums), sums.shape[1])
    mean: NDArray[np.float64] = iou.sum(axis=1) / num_classes
    return mean


def _exact_mean_iou(counts: NDArray[np.int64], absent: AbsentRule) -> float:
    """Score a data set as `compute_scores` does, to the bit.

    Shape:
        - counts: (N, K, 3) int64
    """
    rows = counts.sum(axis=0).tolist()
    unions = [(right, actual + predicted - right) for right, actual, predicted in rows]
    iou: list[float] = [right / union for right, union in unions if union]
    return sum(iou) / (len(iou) if absent == "skip" else len(rows))


def _percentiles(drawn: NDArray[np.float64], level: float) -> tuple[float, float]:
    """Return the ends of the middle share of the values.

    Shape:
        - drawn: (R,) float64
    """
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return low, high
