"""Pictures that let a person judge a prediction."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import IGNORE_INDEX

GAP = 4
"""Pixels of white between panels."""


def draw_comparison(
    image: NDArray[np.uint8], target: NDArray[np.uint8], *, labels: NDArray[np.uint8], taxonomy: Taxonomy
) -> NDArray[np.uint8]:
    """Put image, ground truth, prediction and errors side by side.

    In the last panel right pixels are grey, wrong ones red, ignored ones white.

    Args:
        image: The picture.
        target: Its ground truth.
        labels: The prediction.
        taxonomy: Colours of the classes.

    Shape:
        - image: (H, W, 3) uint8 RGB
        - target: (H, W) uint8 train ids or 255
        - labels: (H, W) uint8 train ids
        - returns: (H, 4W + 3 gaps, 3) uint8 RGB
    """
    colours = taxonomy.colour_table()
    errors = np.full_like(image, 255)
    counted = target != IGNORE_INDEX
    errors[counted & (labels == target)] = (200, 200, 200)
    errors[counted & (labels != target)] = (214, 39, 40)
    truth = colours[target]
    truth[~counted] = 255
    gap = np.full((image.shape[0], GAP, 3), 255, np.uint8)
    return np.hstack([image, gap, truth, gap, colours[labels], gap, errors])
