"""What every count asks of a predicted and a true label map before it counts them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.types import IGNORE_INDEX


def check_classes(num_classes: int, ignore_index: int) -> None:
    """Refuse a number of classes or an ignored value that a byte cannot hold beside them.

    Args:
        num_classes: Number of classes K, 1 to 255.
        ignore_index: Ground truth value of pixels that do not count; K to 255.

    Raises:
        ValueError: If one of them is outside its range.
    """
    if not 1 <= num_classes <= 255:
        raise ValueError(f"num_classes {num_classes}; allowed 1 to 255")
    if not num_classes <= ignore_index <= 255:
        raise ValueError(f"ignore_index {ignore_index}; allowed {num_classes} to 255")


def find_labelled(
    labels: NDArray[np.uint8], target: NDArray[np.uint8], *, num_classes: int, ignore_index: int = IGNORE_INDEX
) -> NDArray[np.bool_]:
    """Return where the ground truth is a class.

    Args:
        labels: Predicted train ids; any value is allowed.
        target: Ground truth train ids in [0, K), or ``ignore_index``.
        num_classes: Number of classes K.
        ignore_index: Ground truth value of pixels that do not count.

    Raises:
        TypeError: If one of the two is not uint8.
        ValueError: If the two differ in shape, or are no pictures.
        DataError: If the ground truth holds another value (E-DATA-014).

    Shape:
        - labels, target: (H, W) uint8
        - returns: (H, W) bool

    Example:
        >>> find_labelled(np.array([[9, 1]], np.uint8), np.array([[1, 255]], np.uint8), num_classes=2)
        array([[ True, False]])
    """
    if labels.dtype != np.uint8 or target.dtype != np.uint8:
        raise TypeError(f"labels are {labels.dtype} and target is {target.dtype}; expected uint8 twice")
    if labels.shape != target.shape or target.ndim != 2:
        raise ValueError(f"labels {labels.shape} and target {target.shape}; expected (H, W) twice")
    stray = (target >= num_classes) & (target != ignore_index)
    if stray.any():
        values = ", ".join(map(str, np.unique(target[stray]).tolist()))
        raise DataError(
            "E-DATA-014",
            f"label values {values} in the ground truth; allowed 0-{num_classes - 1} or {ignore_index}",
            fix="map the source ids to train ids, or correct the number of classes",
        )
    labelled: NDArray[np.bool_] = target != ignore_index
    return labelled


def check_counts(counts: NDArray[np.int64], shape: tuple[int | None, ...]) -> None:
    """Refuse an array that cannot be counts.

    Args:
        counts: What was given.
        shape: Its shape; None where any length is allowed.

    Raises:
        ValueError: If the shape is another, or counts are negative or not int64.

    Shape:
        - counts: any
    """
    fits = counts.ndim == len(shape) and all(b in (None, a) for a, b in zip(counts.shape, shape, strict=True))
    if not fits or counts.dtype != np.int64 or (counts < 0).any():
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        raise ValueError(f"counts {counts.shape} {counts.dtype}; expected ({wanted}) int64, none of them negative")
