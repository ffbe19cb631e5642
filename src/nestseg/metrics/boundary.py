"""IoU of the bands along the edges of classes, which large objects do not decide."""

from __future__ import annotations

import math
from typing import Self, final

import cv2
import numpy as np
from numpy.typing import NDArray

from nestseg.core.types import IGNORE_INDEX, Size
from nestseg.metrics.label_maps import check_classes, check_counts, find_labelled


@final
class BoundaryCounts:
    """Pixel counts of the bands along class edges, over a whole data set.

    The band of a class holds its pixels that have a pixel of another class, or the outside of the picture, in the
    square of 2d + 1 pixels around them; d is ``dilation_ratio`` of the picture's diagonal, rounded, at least 1. The
    band of a class in the prediction is compared with that in the ground truth.

    Pixels that the ground truth ignores are in no band and end none: next to them, only pixels of another class within
    d make an edge, in the ground truth and in the prediction alike. What is predicted there changes nothing. A pixel
    whose prediction is no class (an id of K or more) is in no band, but the classes beside it have an edge.

    Args:
        num_classes: Number of classes K, 1 to 255.
        dilation_ratio: Width of the band as a share of the picture's diagonal, above 0 and at most 1.
        ignore_index: Ground truth value of pixels that do not count; K to 255.

    Raises:
        ValueError: If an argument is outside its range.

    Shape:
        - counts: (K, 2) int64, intersection and union of the two bands of a class

    Reference:
        Cheng, Girshick, Dollár, Berg, Kirillov, "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation",
        CVPR 2021, section 4; d is 2 % of the diagonal as there.

    Deviations:
        The paper measures masks of instances and averages over them; here pixels are added up over a data set, class by
        class. Its distance is Euclidean; that of the square is its authors' code's, which this agrees with. The paper
        knows no ignored pixels.

    Example:
        >>> bands = BoundaryCounts(2)
        >>> bands.update(np.array([[0, 1, 1, 1]], np.uint8), np.array([[0, 0, 1, 1]], np.uint8))
        >>> bands.counts.tolist()
        [[1, 2], [2, 3]]
    """

    def __init__(self, num_classes: int, dilation_ratio: float = 0.02, *, ignore_index: int = IGNORE_INDEX) -> None:
        check_classes(num_classes, ignore_index)
        if not 0 < dilation_ratio <= 1:
            raise ValueError(f"dilation_ratio {dilation_ratio}; allowed above 0, at most 1")
        self.num_classes = num_classes
        self.dilation_ratio = dilation_ratio
        self.ignore_index = ignore_index
        self.counts: NDArray[np.int64] = np.zeros((num_classes, 2), np.int64)

    @classmethod
    def from_counts(
        cls, counts: NDArray[np.int64], *, dilation_ratio: float = 0.02, ignore_index: int = IGNORE_INDEX
    ) -> Self:
        """Rebuild from counts, for example after summing them over processes.

        Args:
            counts: What `counts` held; copied.
            dilation_ratio: Width of the band as a share of the picture's diagonal.
            ignore_index: Ground truth value of pixels that do not count.

        Raises:
            ValueError: If the counts have another shape, are negative or are not int64.

        Shape:
            - counts: (K, 2) int64
        """
        check_counts(counts, (None, 2))
        bands = cls(len(counts), dilation_ratio, ignore_index=ignore_index)
        bands.counts += counts
        return bands

    def update(self, labels: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        """Count the bands of one picture.

        Args:
            labels: Predicted train ids; any value is allowed.
            target: Ground truth train ids in [0, K), or ``ignore_index``.

        Raises:
            TypeError: If one of the two is not uint8.
            ValueError: If the two differ in shape, or are no pictures.
            DataError: If the ground truth holds another value (E-DATA-014). Nothing is counted then.

        Shape:
            - labels, target: (H, W) uint8
        """
        labelled = find_labelled(labels, target, num_classes=self.num_classes, ignore_index=self.ignore_index)
        if not labelled.any():
            return
        distance = band_width((target.shape[0], target.shape[1]), self.dilation_ratio)
        predicted = labelled & _near_edge(labels, labelled, distance)
        actual = labelled & _near_edge(target, labelled, distance)
        right = predicted & actual & (labels == target)

        def count(ids: NDArray[np.uint8], flags: NDArray[np.uint8]) -> NDArray[np.int64]:
            # counting 16-bit numbers that hold the flags is faster than picking pixels first
            codes = (flags.astype(np.uint16) << 8) | ids
            return np.bincount(codes.ravel(), minlength=4 << 8).reshape(4, 256)[:, : self.num_classes]

        in_prediction = count(labels, predicted.view(np.uint8))
        in_truth = count(target, actual.view(np.uint8) + right.view(np.uint8))
        intersection = in_truth[2]
        union = in_prediction[1] + in_truth[1]
        self.counts += np.stack([intersection, union], axis=1)

    def __add__(self, other: BoundaryCounts) -> BoundaryCounts:
        """Merge the counts of two parts of a data set into new ones.

        Raises:
            ValueError: If the two differ in classes, ``dilation_ratio`` or ``ignore_index``.
        """
        ours = (self.num_classes, self.dilation_ratio, self.ignore_index)
        theirs = (other.num_classes, other.dilation_ratio, other.ignore_index)
        if ours != theirs:
            raise ValueError(f"bands of (classes, dilation_ratio, ignore_index) {ours} and {theirs} do not add up")
        return BoundaryCounts.from_counts(
            self.counts + other.counts, dilation_ratio=self.dilation_ratio, ignore_index=self.ignore_index
        )


def boundary_iou(counts: NDArray[np.int64]) -> tuple[float | None, ...]:
    """Return the Boundary IoU of each class; None where neither prediction nor ground truth has a band.

    Shape:
        - counts: (K, 2) int64, see `BoundaryCounts`

    Reference:
        See `BoundaryCounts`.

    Example:
        >>> boundary_iou(np.array([[1, 2], [0, 0]]))
        (0.5, None)
    """
    return tuple(part / whole if whole else None for part, whole in counts.tolist())


def band_width(size: Size, dilation_ratio: float) -> int:
    """Return the width d of the bands of a picture, in pixels.

    Example:
        >>> band_width((1024, 2048), 0.02)
        46
    """
    return max(1, round(dilation_ratio * math.hypot(*size)))


def _near_edge(ids: NDArray[np.uint8], labelled: NDArray[np.bool_], distance: int) -> NDArray[np.bool_]:
    """Return where the square around a pixel holds another id than its own, or the outside.

    A square holds one id when its smallest is its largest. So two passes serve all classes at once, and pixels that are
    not labelled keep out by being neither: 255 to the smallest, 0 to the largest.

    Shape:
        - ids: (H, W) uint8
        - labelled: (H, W) bool
        - returns: (H, W) bool; only right where labelled and the id is a class
    """
    square = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    # 255 where labelled, else 0; `numpy.where` takes ten times as long as this
    kept = -labelled.view(np.uint8)
    low, high = ids | ~kept, ids & kept
    smallest = cv2.erode(low, square)
    # the outside is another id than any class
    largest = cv2.dilate(high, square, borderType=cv2.BORDER_CONSTANT, borderValue=255)
    different: NDArray[np.bool_] = smallest != largest
    return different
