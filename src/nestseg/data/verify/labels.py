"""What a label map holds, and what it looks like where that is not what the data set defines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nestseg.core.taxonomy import Colour, Taxonomy
from nestseg.core.types import IGNORE_INDEX
from nestseg.data.verify import problems as kinds
from nestseg.data.verify.files import Picture
from nestseg.data.verify.problems import Problem, make_problem

# Calibrated on 300 label maps of CamVid, VOC, Cityscapes, ADE20K and ToyStreets: of 100 jumps as published at most 3
# are in between, after taking every eighth pixel at most 20; resized with interpolation or saved as JPEG at least 22.
_BLENDED_RATIO = 0.2
_BLENDED_PIXELS = 100
_SUSPECT_PIXELS = 4

# Edges are measured on every row of a small map and on some of a large one: as sure, and ten times as fast.
_EDGE_PIXELS = 1 << 18

# black, white, and what VOC and CamVid draw borders and void with
_IGNORED_COLOURS = frozenset({(0, 0, 0), (255, 255, 255), (224, 224, 192)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LabelRule:
    """What the label maps of a data set may hold.

    Args:
        taxonomy: The classes.
        values: Stored ids that are defined, ignored ones included.
        label_map: Train id by stored id; of length 65,536 where 16-bit grey label maps are allowed.
        colours: Stored id by colour, where label maps are RGB pictures; None where they hold ids themselves.

    Shape:
        - label_map: (256,) or (65536,) uint8
    """

    taxonomy: Taxonomy
    values: frozenset[int]
    label_map: NDArray[np.uint8]
    colours: Mapping[Colour, int] | None = None


class Edges(NamedTuple):
    """What lies along the edges of label maps."""

    num_jumps: int
    """Neighbours whose ids differ by 2 or more."""
    num_between: int
    """Pixels whose id lies strictly between those of the two pixels beside it."""

    @property
    def suspect(self) -> bool:
        """True where many ids are in between: enough to explain values that are wrong anyway."""
        return self.num_between >= _SUSPECT_PIXELS and self.num_between >= _BLENDED_RATIO * self.num_jumps

    @property
    def blended(self) -> bool:
        """True where so many are that no published label map comes near."""
        return self.num_between >= _BLENDED_PIXELS and self.suspect


class Guess(NamedTuple):
    """What label values look like, and what to do if that is so."""

    words: str
    fix: str


class LabelCheck(NamedTuple):
    """What a label map holds.

    Shape:
        - counts: (256,) or (65536,) int64 pixels by stored id; empty where the file holds no ids
    """

    counts: NDArray[np.int64]
    problems: tuple[Problem, ...]


_NO_COUNTS = np.zeros(0, np.int64)


def check_labels(
    path: str, picture: Picture, *, rule: LabelRule, palettes: Mapping[str, Sequence[Colour]]
) -> LabelCheck:
    """Count the ids of a label map and explain those that are not defined.

    Args:
        path: The file, for messages.
        picture: Its content.
        rule: What it may hold.
        palettes: Colours of known data sets, to recognise RGB labels by.
    """
    image = picture.image
    if image.format != "PNG":
        return _refuse_format(path, picture, rule)
    if rule.colours is not None:
        return _check_colours(path, picture, rule, rule.colours)
    if image.mode == "P" or (image.mode == "L" and picture.bit_depth in {1, 2, 4, 8}):
        ids = np.asarray(image)
    elif image.mode == "1":
        ids = np.asarray(image).astype(np.uint8)
    elif image.mode.startswith("I;16"):
        ids = np.asarray(image)
    else:
        return LabelCheck(_NO_COUNTS, (_explain_colours(path, picture, rule=rule, palettes=palettes),))

    if image.mode == "L" and picture.bit_depth < 8:
        ids = ids // (255 // (2**picture.bit_depth - 1))
    counts = count_ids(ids)
    if image.mode != "P" and picture.bit_depth != 8 and not (picture.bit_depth == 16 and rule.label_map.size > 256):
        return LabelCheck(_NO_COUNTS, (_explain_depth(path, picture, counts, rule=rule),))

    wrong = find_undefined(counts, rule)
    edges = measure_edges(ids)
    if wrong:
        return LabelCheck(counts, (_explain_values(path, counts, wrong, rule=rule, edges=edges),))
    if edges.blended:
        reason = (
            f"in-between values along edges ({edges.num_between:,} beside {edges.num_jumps:,} jumps): "
            "resized with interpolation, or saved as JPEG once"
        )
        return LabelCheck(counts, (make_problem(kinds.LABEL_BLENDED, path, reason, fix=_RESTORE),))
    return LabelCheck(counts, ())


_RESTORE = "make it again from the original label map, resized with nearest neighbour and saved as PNG"


def count_ids(ids: NDArray[np.uint8] | NDArray[np.uint16]) -> NDArray[np.int64]:
    """Count pixels by stored id.

    Shape:
        - ids: (H, W) uint8 or uint16
        - returns: (256,) or (65536,) int64
    """
    if ids.dtype == np.uint8:
        # three times as fast as bincount, which copies to 64 bits first
        return np.array(Image.fromarray(ids).histogram(), np.int64)
    return np.bincount(ids.ravel(), minlength=1 << 16)


def find_undefined(counts: NDArray[np.int64], rule: LabelRule) -> list[int]:
    """Return the ids that occur and are not defined, in order.

    Shape:
        - counts: (256,) or (65536,) int64
    """
    return [value for value in np.flatnonzero(counts).tolist() if value not in rule.values]


def measure_edges(ids: NDArray[np.uint8] | NDArray[np.uint16]) -> Edges:
    """Count jumps between neighbours, and ids in between, along rows and columns.

    Interpolation between the ids 2 and 9 invents the ids between; drawn label maps hold hardly any pixel between
    two of such different ids.

    Shape:
        - ids: (H, W) uint8 or uint16
    """
    step = max(1, ids.size // _EDGE_PIXELS)
    num_jumps = num_between = 0
    for lines in (np.ascontiguousarray(ids[::step]), np.ascontiguousarray(ids[:, ::step].T)):
        before, after = lines[:, :-1], lines[:, 1:]
        num_jumps += int(np.count_nonzero(np.maximum(before, after) - np.minimum(before, after) >= 2))
        for rises in (np.less(before, after), np.greater(before, after)):
            num_between += int(np.count_nonzero(rises[:, :-1] & rises[:, 1:]))
    return Edges(num_jumps, num_between)


def guess_values(counts: NDArray[np.int64], *, rule: LabelRule, edges: Edges) -> Guess | None:
    """Say what ids look like that do not fit a data set.

    Args:
        counts: Pixels by stored id, of one label map or of many.
        rule: What is defined.
        edges: Of the same label maps.

    Returns:
        None where nothing comes to mind.

    Shape:
        - counts: (256,) or (65536,) int64
    """
    values = np.flatnonzero(counts).tolist()
    wrong = [value for value in values if value not in rule.values]
    num_classes = rule.taxonomy.num_classes
    from_zero = set(range(num_classes)) <= rule.values and rule.label_map[0] == 0
    with_classes = f"values {word_values(values)} with {num_classes} class{'es' if num_classes > 1 else ''}"

    if num_classes == 2 and values == [0, 255] and (wrong or rule.label_map[255] == IGNORE_INDEX):
        return Guess(f"{with_classes}: looks like a 0/1 mask saved as 0/255", "set `label_map: {255: 1}`")
    if not wrong:
        return None
    if edges.suspect:
        words = "in-between values along edges: resized with interpolation, or saved as JPEG once"
        return Guess(words, _RESTORE)
    if wrong == [num_classes] and from_zero:
        # a data set file that moves ids says what the id means that is left over
        shift = "{0: ignore, " + ", ".join(f"{value}: {value - 1}" for value in range(1, min(num_classes, 3) + 1))
        shift += (f", ..., {num_classes}: {num_classes - 1}" if num_classes > 3 else "") + "}"
        if 0 not in values:
            return Guess(f"{with_classes}: looks one-based", f"subtract 1 from every id, or set `label_map: {shift}`")
        return Guess(
            f"{with_classes}: looks one-based, with 0 for pixels that nobody labelled",
            f"set `label_map: {shift}`",
        )
    if wrong == [IGNORE_INDEX]:
        return Guess(
            f"value 255 stands for ignored pixels in most data sets, and {rule.taxonomy.name} does not define it",
            "set `label_map: {255: 255}` to ignore it",
        )
    if 65535 in wrong and all(value == 65535 or value in rule.values or value < num_classes for value in values):
        return Guess(
            "value 65535 is -1 in 16 bits: pixels that nobody labelled",
            "save 8-bit grey PNG with 255 in its place",
        )
    if any(value >= 1000 for value in wrong) and all(value // 1000 in rule.values for value in wrong if value >= 1000):
        return Guess("looks like instance ids (class id * 1000 + number)", "use the label maps of class ids instead")
    factor = _find_factor(values, num_classes)
    if factor is not None:
        pairs = ", ".join(f"{value}: {round(value / factor)}" for value in values[:4])
        more = ", ..." if len(values) > 4 else ""
        words = f"{with_classes}: looks like ids stretched by {factor:g}"
        return Guess(words, f"divide every id by {factor:g}, or set `label_map: {{{pairs}{more}}}`")
    return None


def _find_factor(values: Sequence[int], num_classes: int) -> float | None:
    """Find the factor by which the ids 0 to K-1 were stretched to fill 8 or 16 bits, if they were."""
    if len(values) < 2 or num_classes < 2:
        return None
    for factor in (255 / (num_classes - 1), 255 // (num_classes - 1), 255 // num_classes, 256, 257, 10):
        if factor >= 2:
            stretched = {int(index * factor) for index in range(num_classes)} | {
                round(index * factor) for index in range(num_classes)
            }
            if set(values) <= stretched:
                return float(factor)
    return None


def word_values(values: Sequence[int]) -> str:
    """Word values: few as a set, many as ranges.

    Example:
        >>> word_values([0, 255]), word_values([1, 2, 3, 4, 9])
        ('{0, 255}', '1-4, 9')
    """
    if len(values) <= 3:
        return "{" + ", ".join(map(str, values)) + "}"
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    more = f" and {len(words) - 10} more" if len(words) > 10 else ""
    return ", ".join(words[:10]) + more


def _default_fix(rule: LabelRule) -> str:
    return (
        f"use the label maps of {rule.taxonomy.name} as published, not resized, recoloured or renumbered; "
        "for labels of your own, name every id in `label_map`"
    )


def _explain_values(
    path: str, counts: NDArray[np.int64], wrong: Sequence[int], *, rule: LabelRule, edges: Edges
) -> Problem:
    guess = guess_values(counts, rule=rule, edges=edges)
    shown = ", ".join(f"{value} ({counts[value]:,} pixels)" for value in wrong[:10])
    more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
    reason = f"label value {shown}{more}; allowed in {rule.taxonomy.name}: {word_values(sorted(rule.values))}"
    if guess is not None:
        reason = f"{reason}; {guess.words}"
    return make_problem(kinds.LABEL_VALUES, path, reason, fix=guess.fix if guess else _default_fix(rule))


def _refuse_format(path: str, picture: Picture, rule: LabelRule) -> LabelCheck:
    image = picture.image
    reason = f"label map stored as {image.format}"
    if image.format == "JPEG":
        num_values = sum(count > 0 for count in image.convert("L").histogram())
        reason += f", which changes ids: {num_values} grey values, where {len(rule.values)} ids are defined"
    reason += "; allowed: PNG"
    fix = "save the original label map as PNG; what JPEG changed cannot be brought back"
    if image.format != "JPEG":
        fix = "save the same ids as 8-bit grey PNG"
    return LabelCheck(_NO_COUNTS, (make_problem(kinds.LABEL_FORMAT, path, reason, fix=fix),))


def _explain_depth(path: str, picture: Picture, counts: NDArray[np.int64], *, rule: LabelRule) -> Problem:
    values = np.flatnonzero(counts).tolist()
    reason = f"label map of {picture.bit_depth}-bit grey samples, values {word_values(values)}; allowed: 8-bit"
    fix = "save the same ids as 8-bit grey PNG"
    guess = guess_values(counts, rule=rule, edges=Edges(0, 0))
    if guess is not None:
        reason, fix = f"{reason}; {guess.words}", guess.fix
    elif find_undefined(counts, rule):
        fix = _default_fix(rule)
    return make_problem(kinds.LABEL_DEPTH, path, reason, fix=fix)


def _check_colours(path: str, picture: Picture, rule: LabelRule, colours: Mapping[Colour, int]) -> LabelCheck:
    """Map the colours of an RGB label map to ids, and name those that are not defined."""
    image = picture.image
    grey = all(red == green == blue for red, green, blue in colours)
    if (image.mode in {"L", "1"} and not grey) or image.mode.startswith("I"):
        reason = f"label map of {picture.kind} samples; expected: RGB colours of {rule.taxonomy.name}"
        fix = "say in the data set file that label maps hold ids, or use the coloured ones"
        return LabelCheck(_NO_COUNTS, (make_problem(kinds.LABEL_IDS, path, reason, fix=fix),))
    found = count_colours(image)
    counts = np.zeros(rule.label_map.size, np.int64)
    wrong = {colour: count for colour, count in found.items() if colour not in colours}
    for colour, count in found.items():
        if colour in colours:
            counts[colours[colour]] += count
    if not wrong:
        return LabelCheck(counts, ())
    shown = ", ".join(f"{colour} ({count:,} pixels)" for colour, count in list(wrong.items())[:5])
    more = f" and {len(wrong) - 5:,} more" if len(wrong) > 5 else ""
    reason = f"label colour {shown}{more}; {rule.taxonomy.name} defines {len(colours)} colours"
    fix = "name the colour in the class table, or as ignored"
    if len(wrong) > len(colours):
        reason += "; colours in between: resized with interpolation, or saved as JPEG once"
        fix = _RESTORE
    return LabelCheck(counts, (make_problem(kinds.LABEL_COLOUR, path, reason, fix=fix),))


def count_colours(image: Image.Image) -> dict[Colour, int]:
    """Count pixels by colour, the most frequent first; alpha is dropped.

    Args:
        image: Any Pillow image of colours.
    """
    rgb = image if image.mode == "RGB" else image.convert("RGBA").convert("RGB")
    packed = np.asarray(rgb).astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    values, counts = np.unique(packed, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    pairs = zip(values[order].tolist(), counts[order].tolist(), strict=True)
    return {(value >> 16, value >> 8 & 255, value & 255): count for value, count in pairs}


def guess_colours(
    found: Mapping[Colour, int], *, rule: LabelRule, palettes: Mapping[str, Sequence[Colour]]
) -> Guess | None:
    """Recognise the palette that a label map was drawn with.

    Args:
        found: Pixels by colour.
        rule: What ids would be defined.
        palettes: Colours of known data sets by name.

    Returns:
        None where nothing comes to mind.
    """
    if all(red == green == blue for red, green, blue in found):
        ids = sorted(red for red, _, _ in found)
        return Guess(
            f"three equal channels, values {word_values(ids)}: looks like ids saved as RGB",
            "save one of the channels as 8-bit grey PNG",
        )
    total = sum(found.values())
    best, best_colours, best_pixels = "", 0, 0
    for name, palette in {rule.taxonomy.name: rule.taxonomy.palette, **palettes}.items():
        matched = [colour for colour in found if colour in palette]
        pixels = sum(found[colour] for colour in matched)
        if (len(matched), pixels) > (best_colours, best_pixels):
            best, best_colours, best_pixels = name, len(matched), pixels
    stray = {colour for colour in found if colour not in _IGNORED_COLOURS}
    stray -= set({rule.taxonomy.name: rule.taxonomy.palette, **palettes}.get(best, ()))
    seen = f"three-channel labels with {len(found):,} colours"
    if best_colours and not stray:
        return Guess(
            f"{seen}: these match the {best} palette",
            f"map the colours of {best} to their ids, or describe them as colour labels in a data set file",
        )
    covered = best_pixels + sum(count for colour, count in found.items() if colour in _IGNORED_COLOURS)
    if best_colours > 1 and covered >= 0.8 * total:
        return Guess(
            f"{seen}: {best_colours} match the {best} palette, and {len(stray):,} are in between: "
            "resized with interpolation, or saved as JPEG once",
            _RESTORE,
        )
    if len(found) > 10_000:
        return Guess(f"{seen}: looks like a photo", "check that the folders of images and label maps are not swapped")
    return None


def _explain_colours(
    path: str, picture: Picture, *, rule: LabelRule, palettes: Mapping[str, Sequence[Colour]]
) -> Problem:
    found = count_colours(picture.image)
    guess = guess_colours(found, rule=rule, palettes=palettes)
    if guess is None:
        guess = Guess(
            f"three-channel labels with {len(found):,} colours, of no palette that is known",
            "save the class ids themselves as 8-bit grey PNG, or describe the colours in a data set file",
        )
    reason = f"label map of {picture.kind} samples, which are not class ids; {guess.words}"
    return make_problem(kinds.LABEL_COLOURS, path, reason, fix=guess.fix)
