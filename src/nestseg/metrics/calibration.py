"""Is a model right as often as it is sure?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

from nestseg.core.types import IGNORE_INDEX
from nestseg.metrics.label_maps import check_counts

ONE = 1 << 24
"""Confidence is counted in whole 2^-24, so that sums are integers; a float32 of 0.5 or more is such a multiple."""

_BLOCK = 1 << 15
"""Pixels counted at once: what is computed of them stays in the processor's cache, which is twice as fast."""

_SLACK = 1e-5
"""By how much a probability computed in float32 may exceed 1."""


@final
class CalibrationCounts:
    """Pixel counts of a whole data set by how confident the prediction is.

    Bin b of B holds the pixels with confidence above b / B and at most (b + 1) / B; 0 belongs to the first.

    Args:
        num_bins: Number of bins B, 1 to 127.
        ignore_index: Ground truth value of pixels that do not count.

    Raises:
        ValueError: If an argument is outside its range.

    Shape:
        - counts: (B, 3) int64: pixels, right ones, sum of round(confidence * 2^24)

    Reference:
        Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 2; 15 bins as in
        its table 1.

    Deviations:
        A pixel counts as a sample. Confidence is rounded to 2^-24.

    Example:
        >>> calibration = CalibrationCounts(2)
        >>> labels, target = np.array([[0, 1]], np.uint8), np.array([[0, 0]], np.uint8)
        >>> calibration.update(np.array([[1.0, 0.75]], np.float32), labels, target)
        >>> calibration.counts.tolist()
        [[0, 0, 0], [2, 1, 29360128]]
    """

    def __init__(self, num_bins: int = 15, *, ignore_index: int = IGNORE_INDEX) -> None:
        if not 1 <= num_bins <= 127:
            raise ValueError(f"num_bins {num_bins}; allowed 1 to 127")
        if not 0 <= ignore_index <= 255:
            raise ValueError(f"ignore_index {ignore_index}; allowed 0 to 255")
        self.num_bins = num_bins
        self.ignore_index = ignore_index
        self.counts: NDArray[np.int64] = np.zeros((num_bins, 3), np.int64)

    @classmethod
    def from_counts(cls, counts: NDArray[np.int64], *, ignore_index: int = IGNORE_INDEX) -> Self:
        """Rebuild from counts, for example after summing them over processes.

        Args:
            counts: What `counts` held; copied.
            ignore_index: Ground truth value of pixels that do not count.

        Raises:
            ValueError: If the counts have another shape, are negative or are not int64.

        Shape:
            - counts: (B, 3) int64
        """
        check_counts(counts, (None, 3))
        calibration = cls(len(counts), ignore_index=ignore_index)
        calibration.counts += counts
        return calibration

    def update(self, confidence: NDArray[np.float32], labels: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        """Count the pixels of one picture.

        Args:
            confidence: How probable each label is.
            labels: Predicted train ids; any value is allowed.
            target: Ground truth train ids, or ``ignore_index``; `ConfusionMatrix` checks that they are classes.

        Raises:
            TypeError: If labels or target are not uint8, or confidence is not float32.
            ValueError: If the three differ in shape, or a confidence is outside [0, 1]. Nothing is counted then.

        Shape:
            - confidence: (H, W) float32
            - labels, target: (H, W) uint8
        """
        if labels.dtype != np.uint8 or target.dtype != np.uint8 or confidence.dtype != np.float32:
            given = f"{confidence.dtype}, {labels.dtype} and {target.dtype}"
            raise TypeError(f"confidence, labels and target are {given}; expected float32, uint8 and uint8")
        if not confidence.shape == labels.shape == target.shape:
            given = f"{confidence.shape}, {labels.shape} and {target.shape}"
            raise ValueError(f"confidence, labels and target are {given}; expected the same shape")
        if not confidence.size:
            return
        low, high = float(confidence.min()), float(confidence.max())
        # the negated form refuses NaN too
        if not (low >= 0 and high <= 1 + _SLACK):
            raise ValueError(f"confidence from {low} to {high}; allowed 0 to 1")
        confidence, labels, target = confidence.ravel(), labels.ravel(), target.ravel()
        for begin in range(0, confidence.size, _BLOCK):
            block = slice(begin, begin + _BLOCK)
            self._count(confidence[block], labels[block], target[block])

    def _count(self, confidence: NDArray[np.float32], labels: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        """Count some of the pixels.

        Shape:
            - confidence: (P,) float32
            - labels, target: (P,) uint8
        """
        # 2^24 is a power of two, so the product is exact and only the rounding rounds
        whole = np.rint(np.minimum(confidence, np.float32(1)) * np.float32(ONE)).astype(np.int32)
        place = np.maximum((whole * np.int32(self.num_bins) - 1) >> 24, 0)
        # a number for bin and right or wrong, and a last one for what does not count
        code = np.where(target == self.ignore_index, 2 * self.num_bins, 2 * place + (labels == target))
        counts = np.bincount(code, minlength=2 * self.num_bins + 1)[:-1].reshape(-1, 2)
        # these sums are whole numbers below 2^53, which float64 holds
        sums = np.bincount(code, weights=whole, minlength=2 * self.num_bins + 1)[:-1].reshape(-1, 2)
        self.counts[:, 0] += counts.sum(axis=1)
        self.counts[:, 1] += counts[:, 1]
        self.counts[:, 2] += sums.astype(np.int64).sum(axis=1)

    def __add__(self, other: CalibrationCounts) -> CalibrationCounts:
        """Merge the counts of two parts of a data set into new ones.

        Raises:
            ValueError: If the two differ in bins or in ``ignore_index``.
        """
        ours, theirs = (self.num_bins, self.ignore_index), (other.num_bins, other.ignore_index)
        if ours != theirs:
            raise ValueError(f"calibration counts of (bins, ignore_index) {ours} and {theirs} do not add up")
        return CalibrationCounts.from_counts(self.counts + other.counts, ignore_index=self.ignore_index)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationBin:
    """One bar of a reliability diagram.

    Args:
        low: The confidence above which it begins.
        high: The confidence at which it ends, itself included.
        num_pixels: Pixels in it.
        accuracy: Share of them that is right; None without pixels.
        confidence: Their mean confidence; None without pixels.
    """

    low: float
    high: float
    num_pixels: int
    accuracy: float | None
    confidence: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How well confidence and accuracy agree; None where no pixel was counted.

    Args:
        bins: The reliability diagram, from unsure to sure.
        num_pixels: Pixels counted.
        expected_calibration_error: Mean over the pixels of their bin's distance between confidence and accuracy.
        maximum_calibration_error: The largest such distance of a bin that has pixels.
        accuracy: Share of the pixels that is right.
        confidence: Mean confidence; above the accuracy where the model is too sure.
    """

    bins: tuple[CalibrationBin, ...]
    num_pixels: int
    expected_calibration_error: float | None
    maximum_calibration_error: float | None
    accuracy: float | None
    confidence: float | None


def compute_calibration(counts: NDArray[np.int64]) -> Calibration:
    """Compute the reliability diagram and its errors.

    Args:
        counts: See `CalibrationCounts`.

    Raises:
        ValueError: If these are no such counts.

    Shape:
        - counts: (B, 3) int64

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equations 3 and 5.

    Example:
        >>> found = compute_calibration(np.array([[0, 0, 0], [2, 1, 29360128]]))
        >>> found.expected_calibration_error, found.bins[1].accuracy, found.bins[1].confidence
        (0.375, 0.5, 0.875)
    """
    check_counts(counts, (None, 3))
    rows: list[list[int]] = counts.tolist()
    gaps = [(abs(right * ONE - total), pixels * ONE) for pixels, right, total in rows if pixels]
    num_pixels, right, total = (sum(column) for column in zip(*rows, strict=True))
    return Calibration(
        bins=tuple(
            CalibrationBin(
                low=place / len(rows),
                high=(place + 1) / len(rows),
                num_pixels=pixels,
                accuracy=_ratio(right, pixels),
                confidence=_ratio(total, pixels * ONE),
            )
            for place, (pixels, right, total) in enumerate(rows)
        ),
        num_pixels=num_pixels,
        expected_calibration_error=_ratio(sum(gap for gap, _ in gaps), num_pixels * ONE),
        maximum_calibration_error=max((gap / pixels for gap, pixels in gaps), default=None),
        accuracy=_ratio(right, num_pixels),
        confidence=_ratio(total, num_pixels * ONE),
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
