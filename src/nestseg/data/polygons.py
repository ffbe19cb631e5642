"""Outlines become pixels: one rule for COCO and labelme."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestseg.core.types import Size

MAX_COORDINATE = 1e6
"""Largest distance of a point from the origin, in pixels."""


class Patch(NamedTuple):
    """Some pixels of an image: True in a window whose first row and column are given.

    Shape:
        - mask: (h, w) bool
    """

    top: int
    left: int
    mask: NDArray[np.bool_]


class Paint(NamedTuple):
    """A region and the train id, or 255, of its pixels."""

    patch: Patch
    train_id: int


def fill_polygon(points: NDArray[np.float64], *, size: Size) -> Patch:
    """Find the pixels inside a polygon.

    A pixel is inside if its centre is: row i and column j are the point (x, y) = (j + 0.5, i + 0.5), (0, 0) being the
    corner of the image. A centre on an outline belongs to the polygon on its right, or below. So polygons that share an
    edge neither overlap nor leave a gap, and a thin one may hold no pixel. Where an outline crosses itself, what it
    surrounds twice is outside (even-odd rule). What lies outside the image is cut off.

    Args:
        points: Corners in order; the last is joined to the first.
        size: Of the image.

    Shape:
        - points: (P, 2) float64, (x, y) in pixels
        - returns.mask: (h, w) bool, h and w those of the part of the polygon's box that lies in the image

    Deviations:
        pycocotools draws at five times the size and rounds, Pillow and OpenCV include all pixels that the outline
        touches; either differs by pixels along the outline.

    Example:
        >>> square = np.array([(1.0, 0.0), (3.0, 0.0), (3.0, 2.0), (1.0, 2.0)])
        >>> top, left, mask = fill_polygon(square, size=(4, 4))
        >>> (top, left), mask.shape, mask.all()
        ((0, 1), (2, 2), np.True_)
    """
    first = _first_centre(points.min(0), size)
    last = _first_centre(points.max(0), size)
    left, top = int(first[0]), int(first[1])
    width, height = int(last[0]) - left, int(last[1]) - top
    if width <= 0 or height <= 0:
        return Patch(top, left, np.zeros((0, 0), np.bool_))

    # from the upper end of an edge to its lower one, so that both polygons at an edge compute the same crossings
    ends = np.stack([points, np.roll(points, -1, axis=0)], axis=1)
    ends = np.take_along_axis(ends, np.argsort(ends[:, :, 1], axis=1, kind="stable")[:, :, None], axis=1)
    (x0, y0), (x1, y1) = ends[:, 0].T, ends[:, 1].T
    first_row = np.clip(np.ceil(y0 - 0.5), top, top + height).astype(np.int64)
    num_rows = np.clip(np.ceil(y1 - 0.5), top, top + height).astype(np.int64) - first_row
    edge = np.repeat(np.arange(len(points)), num_rows)
    row = np.arange(num_rows.sum()) - np.repeat(num_rows.cumsum() - num_rows, num_rows) + first_row[edge]
    share = (row + 0.5 - y0[edge]) / (y1[edge] - y0[edge])
    crossing = x0[edge] + share * (x1[edge] - x0[edge])
    column = np.clip(np.ceil(crossing - 0.5), left, left + width).astype(np.int64) - left

    # each crossing switches between outside and inside from its column on
    switches = np.bincount((row - top) * (width + 1) + column, minlength=height * (width + 1))
    inside = switches.reshape(height, width + 1).cumsum(axis=1)[:, :-1] % 2 == 1
    return Patch(top, left, inside)


def _first_centre(point: NDArray[np.float64], size: Size) -> NDArray[np.float64]:
    """Return the column and row of the first centre at or after a point, cut to the image."""
    return np.clip(np.ceil(point - 0.5), 0, [size[1], size[0]])


def fill_union(polygons: Iterable[NDArray[np.float64]], *, size: Size) -> Patch:
    """Find the pixels inside any of several polygons.

    Shape:
        - polygons: (P, 2) float64 each, (x, y) in pixels
        - returns.mask: (h, w) bool
    """
    patches = [fill_polygon(points, size=size) for points in polygons]
    if len(patches) == 1:
        return patches[0]
    mask = np.zeros(size, np.bool_)
    for top, left, part in patches:
        mask[top : top + part.shape[0], left : left + part.shape[1]] |= part
    return Patch(0, 0, mask)


def paint_regions(paints: Iterable[Paint], *, size: Size, unannotated: int) -> NDArray[np.uint8]:
    """Paint regions over each other, in order.

    Args:
        paints: The regions; a later one covers an earlier one.
        size: Of the image.
        unannotated: Train id, or 255, of pixels in no region.

    Shape:
        - returns: (H, W) uint8 train ids or 255 (ignored)
    """
    target = np.full(size, unannotated, np.uint8)
    for (top, left, mask), train_id in paints:
        target[top : top + mask.shape[0], left : left + mask.shape[1]][mask] = train_id
    return target


def parse_points(values: object) -> NDArray[np.float64] | None:
    """Read a polygon from JSON: x and y in turn, or pairs of them.

    Returns:
        None if it is not at least three points of finite numbers within `MAX_COORDINATE`.

    Shape:
        - returns: (P, 2) float64, (x, y) in pixels
    """
    try:
        points = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    if points.size % 2 or points.size < 6 or points.ndim not in {1, 2} or (points.ndim == 2 and points.shape[1] != 2):
        return None
    points = points.reshape(-1, 2)
    return points if bool((np.abs(points) <= MAX_COORDINATE).all()) else None
