"""Pictures that let a person judge a prediction."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import IGNORE_INDEX

GAP = 4
"""Pixels of white between panels."""

_RIGHT, _WRONG, _VOID = (200, 200, 200), (214, 39, 40), (255, 255, 255)


class Panels(NamedTuple):
    """A prediction beside what it should be.

    Shape:
        - image, truth, prediction, errors: (H, W, 3) uint8 RGB
    """

    image: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    """In the colours of the classes; ignored pixels are white."""
    prediction: NDArray[np.uint8]
    """In the colours of the classes; what is no class is black."""
    errors: NDArray[np.uint8]
    """Right pixels are grey, wrong ones red and darker, ignored ones white."""


def draw_panels(
    image: NDArray[np.uint8], target: NDArray[np.uint8], *, labels: NDArray[np.uint8], taxonomy: Taxonomy
) -> Panels:
    """Draw image, ground truth, prediction and errors.

    Args:
        image: The picture.
        target: Its ground truth.
        labels: The prediction.
        taxonomy: Colours of the classes.

    Shape:
        - image: (H, W, 3) uint8 RGB
        - target: (H, W) uint8 train ids or 255
        - labels: (H, W) uint8 train ids
        - returns: (H, W, 3) uint8 RGB each
    """
    colours = taxonomy.colour_table()
    counted = target != IGNORE_INDEX
    errors = np.full_like(image, _VOID)
    errors[counted & (labels == target)] = _RIGHT
    errors[counted & (labels != target)] = _WRONG
    truth = colours[target]
    truth[~counted] = _VOID
    return Panels(image, truth, colours[labels], errors)


def draw_comparison(
    image: NDArray[np.uint8], target: NDArray[np.uint8], *, labels: NDArray[np.uint8], taxonomy: Taxonomy
) -> NDArray[np.uint8]:
    """Put image, ground truth, prediction and errors side by side, see `draw_panels`.

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
    gap = np.full((image.shape[0], GAP, 3), 255, np.uint8)
    panels = draw_panels(image, target, labels=labels, taxonomy=taxonomy)
    return np.hstack([part for panel in panels for part in (gap, panel)][1:])
