"""Counting which class was predicted where which class is."""

from __future__ import annotations

from typing import Self, final

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.types import IGNORE_INDEX


@final
class ConfusionMatrix:
    """Pixel counts of a whole data set, exact at any size.

    Pixels whose ground truth is ``ignore_index`` (void) are kept apart from ``counts``, for the one rule that asks what
    was predicted there. A pixel whose *prediction* is no class (an id of K or more, such as 255) is counted in a column
    of its own: it belongs to its class's row total and is therefore a miss.

    Args:
        num_classes: Number of classes K, 1 to 255.
        ignore_index: Ground truth value of pixels that do not count; K to 255.

    Raises:
        ValueError: If ``num_classes`` or ``ignore_index`` is outside its range.

    Shape:
        - counts: (K, K + 1) int64, rows are ground truth, columns are prediction, the last one is "no class"
        - void_counts: (K + 1,) int64, the same columns over the void pixels; None where they are not known

    Reference:
        Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective", IJCV 2015,
        section 2.4; Cordts et al., "The Cityscapes Dataset", CVPR 2016, section 3.1.

    Deviations:
        None known.

    Example:
        >>> confusion = ConfusionMatrix(2)
        >>> confusion.update(np.array([[0, 1, 9, 9]], np.uint8), np.array([[0, 0, 255, 1]], np.uint8))
        >>> confusion.counts.tolist()
        [[1, 1, 0], [0, 0, 1]]
        >>> confusion.void_counts.tolist()
        [0, 0, 1]
    """

    def __init__(self, num_classes: int, *, ignore_index: int = IGNORE_INDEX) -> None:
        if not 1 <= num_classes <= 255:
            raise ValueError(f"num_classes {num_classes}; allowed 1 to 255")
        if not num_classes <= ignore_index <= 255:
            raise ValueError(f"ignore_index {ignore_index}; allowed {num_classes} to 255")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts: NDArray[np.int64] = np.zeros((num_classes, num_classes + 1), np.int64)
        self.void_counts: NDArray[np.int64] | None = np.zeros(num_classes + 1, np.int64)

    @classmethod
    def from_counts(
        cls,
        counts: NDArray[np.int64],
        void_counts: NDArray[np.int64] | None = None,
        *,
        ignore_index: int = IGNORE_INDEX,
    ) -> Self:
        """Rebuild a matrix from counts, for example after summing them over processes.

        Args:
            counts: What `counts` held; copied.
            void_counts: What `void_counts` held; copied. None: not known, and then no score can be asked for that
                needs them.
            ignore_index: Ground truth value of pixels that do not count.

        Raises:
            ValueError: If the counts have another shape, are negative or are not int64.

        Shape:
            - counts: (K, K + 1) int64
            - void_counts: (K + 1,) int64
        """
        if counts.ndim != 2 or counts.shape[1] != counts.shape[0] + 1:
            raise ValueError(f"counts {counts.shape}; expected (K, K + 1)")
        if void_counts is not None and void_counts.shape != counts.shape[1:]:
            raise ValueError(f"void_counts {void_counts.shape}; expected {counts.shape[1:]}")
        for given in (counts, void_counts):
            if given is not None and (given.dtype != np.int64 or (given < 0).any()):
                raise ValueError(f"counts of dtype {given.dtype}; expected int64, none of them negative")
        confusion = cls(counts.shape[0], ignore_index=ignore_index)
        confusion.counts += counts
        confusion.void_counts = None if void_counts is None else void_counts.copy()
        return confusion

    def update(self, labels: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        """Count the pixels of one picture, or of several at once.

        Args:
            labels: Predicted train ids; any value is allowed.
            target: Ground truth train ids in [0, K), or ``ignore_index``.

        Raises:
            TypeError: If one of the two is not uint8.
            ValueError: If the two differ in shape; resize the prediction, never the ground truth.
            DataError: If the ground truth holds another value (E-DATA-014). Nothing is counted then.

        Shape:
            - labels: (H, W) uint8, or any other shape
            - target: the same shape, uint8
        """
        if labels.dtype != np.uint8 or target.dtype != np.uint8:
            raise TypeError(f"labels are {labels.dtype} and target is {target.dtype}; expected uint8 twice")
        if labels.shape != target.shape:
            raise ValueError(f"labels {labels.shape} and target {target.shape}; expected the same shape")
        # One 16-bit number a pixel, counted in one pass: 400 to 540 Mpixel/s a core. OpenCV's histograms are
        # up to three times as fast, but return float32, which stops counting at 2^24.
        pairs = (target.astype(np.uint16) << 8) | labels
        found = np.bincount(pairs.ravel(), minlength=1 << 16).reshape(256, 256)

        k = self.num_classes
        values = np.flatnonzero(found.any(axis=1)).tolist()
        strays = [value for value in values if value >= k and value != self.ignore_index]
        if strays:
            raise DataError(
                "E-DATA-014",
                f"label values {', '.join(map(str, strays))} in the ground truth; "
                f"allowed 0-{k - 1} or {self.ignore_index}",
                fix="map the source ids to train ids, or correct the number of classes",
            )
        self.counts[:, :k] += found[:k, :k]
        self.counts[:, k] += found[:k, k:].sum(axis=1)
        if self.void_counts is not None:
            self.void_counts[:k] += found[self.ignore_index, :k]
            self.void_counts[k] += found[self.ignore_index, k:].sum()

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """Merge the counts of two parts of a data set into a new matrix.

        Raises:
            ValueError: If the two differ in classes or in ``ignore_index``.
        """
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise ValueError(
                f"a matrix of {self.num_classes} classes that ignores {self.ignore_index} and one of "
                f"{other.num_classes} that ignores {other.ignore_index} do not add up"
            )
        void_counts = None
        if self.void_counts is not None and other.void_counts is not None:
            void_counts = self.void_counts + other.void_counts
        return ConfusionMatrix.from_counts(self.counts + other.counts, void_counts, ignore_index=self.ignore_index)
