"""COCO's JSON: outlines and run lengths of objects become label maps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.types import IGNORE_INDEX, Size
from nestseg.data.polygons import MAX_COORDINATE, Paint, Patch, fill_union, paint_regions, parse_points
from nestseg.data.spec import ANY_LABEL, IGNORE, DatasetSpec

MAX_PROBLEMS = 10
"""How many problems of a file are named; the others are counted."""


class CocoRegion(NamedTuple):
    """An annotation.

    Shape:
        - polygons: (P, 2) float64 each, (x, y) in pixels
        - counts: (R,) int64 run lengths down the columns, outside first; empty for polygons
    """

    train_id: int
    polygons: tuple[NDArray[np.float64], ...]
    counts: NDArray[np.int64]
    beneath: bool = False
    """A crowd region that does not count: whatever else lies there covers it."""


class CocoImage(NamedTuple):
    """A picture with its annotations."""

    file: str
    """Path of the picture as the JSON file has it."""
    size: Size
    regions: tuple[CocoRegion, ...]

    def draw(self, *, unannotated: int) -> NDArray[np.uint8]:
        """Make the label map.

        COCO has no order of what is in front. Crowd regions that do not count come first, then the others by falling
        number of pixels, of equal ones the later in the file on top: so a small thing is not buried under a large one.
        Of several polygons of one annotation a pixel must be in any; for what is in a polygon see `fill_polygon`.

        Args:
            unannotated: Train id, or 255, of pixels in no region.

        Shape:
            - returns: (H, W) uint8 train ids or 255 (ignored)
        """
        patches = [self._fill(region) for region in self.regions]
        # sorted keeps the order of equal ones
        order = sorted(
            range(len(patches)),
            key=lambda place: (not self.regions[place].beneath, -int(patches[place].mask.sum())),
        )
        paints = [Paint(patches[place], self.regions[place].train_id) for place in order]
        return paint_regions(paints, size=self.size, unannotated=unannotated)

    def _fill(self, region: CocoRegion) -> Patch:
        if region.polygons:
            return fill_union(region.polygons, size=self.size)
        return Patch(0, 0, fill_runs(region.counts, size=self.size))


def fill_runs(counts: NDArray[np.int64], *, size: Size) -> NDArray[np.bool_]:
    """Turn run lengths into a mask: down the first column, then the second, outside first.

    Shape:
        - counts: (R,) int64, their sum is H * W
        - returns: (H, W) bool

    Example:
        >>> fill_runs(np.array([1, 2, 1]), size=(2, 2)).tolist()
        [[False, True], [True, False]]
    """
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(size[::-1]).T


def decode_counts(text: str) -> list[int]:
    """Read the compressed form of run lengths.

    Five bits a character, lowest first, from the character 0 (48) on; 32 marks that more follow, 16 of the last one the
    sign. From the fourth number on they are differences to the one before the last.

    Raises:
        ValueError: If the text is cut or holds other characters.

    Reference:
        Lin et al., Microsoft COCO: Common Objects in Context, 2014; the format is defined by the code of its toolbox.

    Example:
        >>> decode_counts("052203")
        [0, 5, 2, 7, 2, 10]
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"character {character!r} at a place where it means nothing")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("ends in the middle of a number")
    return counts


def read_coco(path: Path, spec: DatasetSpec) -> list[CocoImage]:
    """Read a COCO file of instances: images, annotations and categories.

    Args:
        path: The file.
        spec: Which names mean which class, and what crowd regions mean.

    Returns:
        The images that it lists, in its order, those without annotations too.

    Raises:
        DataError: E-DATA-030 if it is not such a file; E-DATA-031 with everything in it that makes no sense.
    """
    values = read_json(path)
    missing = [name for name in ("images", "annotations", "categories") if not isinstance(values.get(name), list)]
    if missing:
        raise DataError(
            "E-DATA-030",
            f"no list {' and '.join(missing)}; found: {', '.join(list(values)[:10])}",
            fix="give the COCO file of instances, or another label_format",
            path=path,
        )
    problems: list[str] = []
    images = _parse_images(values["images"], problems)
    classes = _parse_categories(values["categories"], values["annotations"], spec=spec, problems=problems)
    regions: dict[int | str, list[CocoRegion]] = {number: [] for number in images}
    for number, annotation in _entries(values["annotations"], "annotation", problems):
        image, category = annotation.get("image_id"), annotation.get("category_id")
        if not isinstance(image, int | str) or image not in images:
            problems.append(f"annotation {number}: there is no image {image!r}")
        elif not isinstance(category, int | str) or category not in classes:
            problems.append(f"annotation {number}: there is no category {category!r}")
        else:
            try:
                polygons, counts = _parse_segmentation(annotation.get("segmentation"), images[image].size)
            except ValueError as error:
                problems.append(f"annotation {number}: {error}")
                continue
            beneath = spec.crowd == IGNORE and bool(annotation.get("iscrowd", 0))
            train_id = IGNORE_INDEX if beneath else classes[category]
            regions[image].append(CocoRegion(train_id, polygons, counts, beneath))
    raise_problems(problems, path)
    return [image._replace(regions=tuple(regions[number])) for number, image in images.items()]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        DataError: E-DATA-032 if it cannot be read or is something else.
    """
    try:
        # a pipe would block the reader for ever
        if path.exists() and not path.is_file():
            raise DataError("E-DATA-032", "not a regular file", fix="put the JSON file there", path=path)
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else f"not JSON: {error}"
        raise DataError("E-DATA-032", reason, fix="check path and content", path=path) from error
    if not isinstance(values, dict):
        reason = f"a JSON {type(values).__name__}, where an object is expected"
        raise DataError("E-DATA-032", reason, fix="give another file", path=path)
    return values


def raise_problems(problems: Sequence[str], path: Path) -> None:
    """Raise what was found wrong in a file of outlines, if anything was.

    Raises:
        DataError: E-DATA-031, naming `MAX_PROBLEMS` and counting the others.
    """
    if problems:
        more = f"; and {len(problems) - MAX_PROBLEMS:,} more" if len(problems) > MAX_PROBLEMS else ""
        raise DataError(
            "E-DATA-031",
            "; ".join(problems[:MAX_PROBLEMS]) + more,
            fix="mend these entries in the tool that wrote the file, or name their labels in the data set file",
            path=path,
        )


def find_class(label: str, spec: DatasetSpec) -> int | None:
    """Return the train id, or 255, that a name of regions means; None if the data set file does not say."""
    table = spec.class_of_label
    return table.get(label, table.get(ANY_LABEL))


def _entries(values: Iterable[object], kind: str, problems: list[str]) -> Iterator[tuple[int | str, dict[str, Any]]]:
    """Yield the entries of a list with their ids, or places for those without."""
    for place, entry in enumerate(values):
        if not isinstance(entry, dict):
            problems.append(f"{kind} at place {place}: {entry!r}, where an object is expected"[:200])
            continue
        number = entry.get("id", place)
        if isinstance(number, int | str):
            yield number, entry
        else:
            problems.append(f"{kind} at place {place}: id {number!r}"[:200])


def _parse_images(values: Iterable[object], problems: list[str]) -> dict[int | str, CocoImage]:
    images: dict[int | str, CocoImage] = {}
    for number, entry in _entries(values, "image", problems):
        file, height, width = entry.get("file_name"), entry.get("height"), entry.get("width")
        if not (isinstance(file, str) and file and is_length(height) and is_length(width)):
            problems.append(f"image {number}: file_name {file!r}, height {height!r}, width {width!r}")
            continue
        parts = PurePosixPath(file.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or "\0" in file:
            problems.append(f"image {number}: file_name {file!r} leads out of the folder of images")
        elif number in images:
            problems.append(f"image {number}: two images have this id")
        else:
            images[number] = CocoImage(str(parts), (height, width), ())
    return images


def is_length(value: object) -> TypeGuard[int]:
    """Say whether a value of JSON is the height or width of a picture."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _parse_categories(
    values: Iterable[object], annotations: Iterable[object], *, spec: DatasetSpec, problems: list[str]
) -> dict[int | str, int]:
    """Return the train id, or 255, by category; a category that nothing uses needs no meaning."""
    used = {entry.get("category_id") for entry in annotations if isinstance(entry, dict) and _is_id(entry)}
    classes: dict[int | str, int] = {}
    unknown = []
    for number, entry in _entries(values, "category", problems):
        meaning = find_class(str(entry.get("name")), spec)
        if meaning is None and number in used:
            unknown.append(str(entry.get("name")))
        classes[number] = IGNORE_INDEX if meaning is None else meaning
    if unknown:
        problems.append(
            f"categories without a class: {', '.join(unknown[:20])}{', ...' if len(unknown) > 20 else ''}; give each "
            f'to the labels of a class or to ignore_labels, where "{ANY_LABEL}" is all others'
        )
    return classes


def _is_id(entry: Mapping[str, Any]) -> bool:
    return isinstance(entry.get("category_id"), int | str)


def _parse_segmentation(value: object, size: Size) -> tuple[tuple[NDArray[np.float64], ...], NDArray[np.int64]]:
    """Read a segmentation: a list of polygons, or run lengths, compressed or not.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(value, list):
        polygons = [parse_points(points) for points in value]
        good = tuple(points for points in polygons if points is not None)
        if not good or len(good) < len(polygons):
            raise ValueError(
                f"segmentation is not a list of polygons of at least three points, numbers within {MAX_COORDINATE:g}"
            )
        return good, np.zeros(0, np.int64)
    if not isinstance(value, dict):
        raise ValueError("no segmentation: neither polygons nor run lengths")  # noqa: TRY004 -- collected
    counts = value.get("counts")
    if value.get("size") != list(size):
        raise ValueError(f"run lengths for size {value.get('size')}, but the image is {list(size)}")
    if isinstance(counts, str):
        counts = decode_counts(counts)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("run lengths are not a list of numbers from 0 on")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(f"run lengths add up to {sum(counts):,}, not {size[0]} x {size[1]} = {size[0] * size[1]:,}")
    return (), np.array(counts, np.int64)
