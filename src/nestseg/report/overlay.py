"""Pictures with their ground truth on top, small enough for a page."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from nestseg.core.resize import resize_labels
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import IGNORE_INDEX, Sample
from nestseg.report.pictures import GAP

_GREY = 128
_STRIPE = 4
_FAINT, _PLAIN, _STRONG = 0.25, 0.5, 0.75


def shrink_sample(sample: Sample, longest: int) -> Sample:
    """Return a sample for the eye: 8-bit RGB, no side longer than ``longest``.

    Of other than three channels the first is shown in grey; other than 8-bit values are stretched to 0-255.

    Args:
        sample: Picture and ground truth.
        longest: Largest height or width.

    Shape:
        - sample: any (H, W)
        - returns: (h, w, 3) uint8 RGB and (h, w) uint8
    """
    image, target = sample
    if image.shape[2] != 3:
        image = np.repeat(image[:, :, :1], 3, axis=2)
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = np.rint((image.astype(np.float64) - low) * (255 / max(high - low, 1e-9))).astype(np.uint8)
    height, width = target.shape
    scale = longest / max(height, width)
    if scale >= 1:
        return Sample(image, target)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    small = np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA), np.uint8)
    return Sample(small, resize_labels(target, size))


def draw_overlay(sample: Sample, taxonomy: Taxonomy, *, highlight: int | None = None) -> NDArray[np.uint8]:
    """Lay the colours of the classes over a picture; ignored pixels are striped grey.

    Args:
        sample: Picture and ground truth.
        taxonomy: Colours of the classes.
        highlight: Train id of a class to draw strongly, the others faintly; None draws all alike.

    Shape:
        - sample: (H, W), 8-bit RGB
        - returns: (H, W, 3) uint8 RGB
    """
    image, target = sample
    ignored = target == IGNORE_INDEX
    colours = taxonomy.colour_table()[target].astype(np.float32)
    colours[ignored] = _GREY
    opacity = np.full(target.shape, _PLAIN if highlight is None else _FAINT, np.float32)
    if highlight is not None:
        opacity[target == highlight] = _STRONG
    height, width = target.shape
    stripes = (np.arange(height)[:, None] + np.arange(width)) // _STRIPE % 2
    opacity[ignored] = np.where(stripes, _STRONG, _FAINT)[ignored]
    mixed = image + (colours - image) * opacity[:, :, None]
    if highlight is not None:
        # white on black, so that it shows on every picture
        shown = (target == highlight).astype(np.uint8)
        contours, _ = cv2.findContours(shown, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        mixed = np.ascontiguousarray(mixed)
        cv2.drawContours(mixed, contours, -1, (0, 0, 0), 3)
        cv2.drawContours(mixed, contours, -1, (255, 255, 255), 1)
    overlay: NDArray[np.uint8] = np.rint(mixed).astype(np.uint8)
    return overlay


def put_side_by_side(*images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Put pictures of one height next to each other, white between them.

    Shape:
        - images: (H, W, 3) uint8 RGB each
        - returns: (H, W', 3) uint8 RGB
    """
    gap = np.full((images[0].shape[0], GAP, 3), 255, np.uint8)
    return np.hstack([part for image in images for part in (gap, image)][1:])
