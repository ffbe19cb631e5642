"""labelme's JSON, one file a picture: outlines become label maps."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.image_io import read_image
from nestseg.core.types import Size
from nestseg.data.coco import find_class, is_length, raise_problems, read_json
from nestseg.data.polygons import MAX_COORDINATE, Paint, Patch, fill_polygon, paint_regions, parse_points
from nestseg.data.spec import ANY_LABEL, DatasetSpec

SHAPE_TYPES = ("polygon", "rectangle", "circle", "mask")
"""Shapes that have an inside."""


class LabelmeShape(NamedTuple):
    """A shape.

    Shape:
        - points: (P, 2) float64, (x, y) in pixels
        - mask: (h, w) bool for a shape of kind mask, whose upper left corner is the first point; else None
    """

    train_id: int
    kind: str
    points: NDArray[np.float64]
    mask: NDArray[np.bool_] | None


class LabelmeFile(NamedTuple):
    """The shapes of a picture."""

    size: Size | None
    """Of the picture, where the file says it."""
    shapes: tuple[LabelmeShape, ...]

    def draw(self, *, size: Size, unannotated: int) -> NDArray[np.uint8]:
        """Make the label map: shapes in the order of the file, a later one covers an earlier one, as in labelme.

        What is inside a polygon and a rectangle says `fill_polygon`; a circle holds the pixels whose centre is at most
        its radius away from its first point.

        Args:
            size: Of the picture.
            unannotated: Train id, or 255, of pixels in no shape.

        Shape:
            - returns: (H, W) uint8 train ids or 255 (ignored)
        """
        paints = [Paint(_fill(shape, size), shape.train_id) for shape in self.shapes]
        return paint_regions(paints, size=size, unannotated=unannotated)


def read_labelme(path: Path, spec: DatasetSpec) -> LabelmeFile:
    """Read a file of labelme.

    Args:
        path: The file.
        spec: Which labels mean which class.

    Raises:
        DataError: E-DATA-032 and E-DATA-033 if it is not such a file; E-DATA-031 with everything in it that makes no
            sense, labels without a class included.
    """
    values = read_json(path)
    shapes = values.get("shapes")
    if not isinstance(shapes, list):
        raise DataError(
            "E-DATA-033",
            f"no list shapes; found: {', '.join(list(values)[:10])}",
            fix="give a file of labelme, or another label_format",
            path=path,
        )
    height, width = values.get("imageHeight"), values.get("imageWidth")
    problems: list[str] = []
    found = []
    for place, shape in enumerate(shapes):
        try:
            found.append(_parse_shape(shape, spec))
        except ValueError as error:
            problems.append(f"shape {place}: {error}")
    raise_problems(problems, path)
    return LabelmeFile((height, width) if is_length(height) and is_length(width) else None, tuple(found))


def _parse_shape(shape: object, spec: DatasetSpec) -> LabelmeShape:
    if not isinstance(shape, Mapping):
        raise ValueError("not an object")  # noqa: TRY004 -- collected with the others
    label, kind = shape.get("label"), shape.get("shape_type", "polygon")
    train_id = find_class(str(label), spec)
    if train_id is None:
        raise ValueError(
            f"label {label!r} without a class; give it to the labels of a class or to ignore_labels, where "
            f'"{ANY_LABEL}" is all others'
        )
    if kind not in SHAPE_TYPES:
        raise ValueError(f"a {kind} has no inside; allowed: {', '.join(SHAPE_TYPES)}")
    if kind == "polygon":
        points = parse_points(shape.get("points"))
        if points is None:
            raise ValueError(f"not a polygon of at least three points within {MAX_COORDINATE:g}")
        return LabelmeShape(train_id, kind, points, None)
    points = _parse_two_points(shape.get("points"))
    return LabelmeShape(train_id, kind, points, _parse_mask(shape) if kind == "mask" else None)


def _parse_two_points(values: object) -> NDArray[np.float64]:
    try:
        points = np.asarray(values, np.float64)
    except (TypeError, ValueError, OverflowError):
        points = np.zeros(0)
    if points.shape != (2, 2) or not (np.abs(points) <= MAX_COORDINATE).all():
        raise ValueError(f"not two points within {MAX_COORDINATE:g}")
    return points


def _parse_mask(shape: Mapping[str, Any]) -> NDArray[np.bool_]:
    try:
        content = base64.b64decode(str(shape.get("mask")), validate=True)
        return read_image(content)[:, :, 0] > 0
    except (binascii.Error, DataError) as error:
        raise ValueError(f"its mask is no picture in base64: {error}") from error


def _fill(shape: LabelmeShape, size: Size) -> Patch:
    (x0, y0), (x1, y1) = shape.points[0], shape.points[1]
    if shape.kind == "polygon":
        return fill_polygon(shape.points, size=size)
    if shape.kind == "rectangle":
        return fill_polygon(np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]), size=size)
    if shape.kind == "circle":
        rows, columns = np.ogrid[: size[0], : size[1]]
        return Patch(0, 0, np.hypot(columns + 0.5 - x0, rows + 0.5 - y0) <= np.hypot(x1 - x0, y1 - y0))
    assert shape.mask is not None, "a shape of kind mask has one"
    top, left = round(y0), round(x0)
    mask = shape.mask[max(0, -top) :, max(0, -left) :]
    top, left = min(max(0, top), size[0]), min(max(0, left), size[1])
    return Patch(top, left, mask[: size[0] - top, : size[1] - left])
