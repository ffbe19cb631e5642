"""What a split holds: pixels a class, sizes, channels, imbalance, and the weights to set against it.

Everything here is a function of `nestseg.data.counts.SplitCounts`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.taxonomy import Colour, Taxonomy
from nestseg.data.counts import SplitCounts

WeightRule = Literal["median_frequency", "enet"]
"""How class weights follow from the counts of a split."""

FEW_IMAGES = 10
"""A class in fewer images gets a warning."""

DOMINANT_SHARE = 0.9
"""A class that covers more of the labelled pixels gets a warning."""

STRONG_IMBALANCE = 100
"""A ratio of most to least frequent class from which on there is a warning."""

HIGH_IGNORED_SHARE = 0.25
"""A share of ignored pixels above which there is a warning."""

_MANY_BINS = 10
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassStats:
    """One class of a split.

    Args:
        name: Its name.
        colour: (red, green, blue) that it is drawn in.
        pixels: How many pixels have it.
        share: Of the labelled pixels, 0 to 1.
        images: How many images it occurs in.
        median_frequency: Its weight by `median_frequency_weights`; None where nothing is labelled.
        enet: Its weight by `enet_weights`; None where nothing is labelled.
    """

    name: str
    colour: Colour
    pixels: int
    share: float
    images: int
    median_frequency: float | None
    enet: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """How many images have a side of ``low`` to ``high`` pixels, both included."""

    low: int
    high: int
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SideStats:
    """Heights or widths of the images, pixels."""

    minimum: int
    median: float
    maximum: int
    histogram: tuple[Bin, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeCount:
    """How many images have a size."""

    height: int
    width: int
    images: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Imbalance:
    """The most and the least frequent class that occur, and the ratio of their pixels."""

    most: str
    least: str
    ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitStats:
    """What a split holds, in words and numbers.

    Args:
        dataset: Name of the data set.
        split: Which part of it.
        num_images: How many samples.
        labelled_pixels: Pixels with a class.
        ignored_pixels: Pixels without one.
        ignored_share: Of all pixels, 0 to 1.
        classes: In train-id order.
        heights: Of the images.
        widths: Of the images.
        num_sizes: How many different sizes there are.
        common_sizes: The most frequent of them.
        channel_mean: Of the stored values; 0-255 for 8-bit images.
        channel_std: Standard deviation over all pixels, likewise.
        imbalance: None with fewer than two classes that occur.
        warnings: What to know before training, in words.
    """

    dataset: str
    split: str
    num_images: int
    labelled_pixels: int
    ignored_pixels: int
    ignored_share: float
    classes: tuple[ClassStats, ...]
    heights: SideStats
    widths: SideStats
    num_sizes: int
    common_sizes: tuple[SizeCount, ...]
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    imbalance: Imbalance | None
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        """Write the record as strict JSON (no NaN, no infinity)."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)


def describe_split(counts: SplitCounts, taxonomy: Taxonomy, *, split: str) -> SplitStats:
    """Draw conclusions from the counts of a split.

    Args:
        counts: Of the split.
        taxonomy: Names and colours of the classes.
        split: Its name.
    """
    class_pixels, class_images = counts.class_pixels, counts.class_images
    labelled, ignored = int(class_pixels.sum()), int(counts.ignored.sum())
    empty: list[None] = [None] * taxonomy.num_classes
    classes = tuple(
        ClassStats(
            name=name,
            colour=colour,
            pixels=int(pixels),
            share=int(pixels) / labelled if labelled else 0.0,
            images=int(images),
            median_frequency=median_frequency,
            enet=enet,
        )
        for name, colour, pixels, images, median_frequency, enet in zip(
            taxonomy.classes,
            taxonomy.palette,
            class_pixels,
            class_images,
            median_frequency_weights(counts) if labelled else empty,
            enet_weights(counts) if labelled else empty,
            strict=True,
        )
    )
    sizes = Counter((height, width) for height, width in counts.sizes.tolist())
    mean, std = _describe_channels(counts)
    imbalance = _find_imbalance(classes)
    return SplitStats(
        dataset=taxonomy.name,
        split=split,
        num_images=counts.num_images,
        labelled_pixels=labelled,
        ignored_pixels=ignored,
        ignored_share=ignored / max(1, labelled + ignored),
        classes=classes,
        heights=_describe_sides(counts.sizes[:, 0]),
        widths=_describe_sides(counts.sizes[:, 1]),
        num_sizes=len(sizes),
        common_sizes=tuple(
            SizeCount(height=height, width=width, images=images)
            for (height, width), images in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]
        ),
        channel_mean=mean,
        channel_std=std,
        imbalance=imbalance,
        warnings=tuple(_word_warnings(counts, classes, imbalance)),
    )


def class_weights(counts: SplitCounts, rule: WeightRule) -> tuple[float, ...]:
    """Return the class weights of a split by a rule, see `median_frequency_weights` and `enet_weights`.

    Raises:
        DataError: E-DATA-094, if nothing is labelled.
    """
    return median_frequency_weights(counts) if rule == "median_frequency" else enet_weights(counts)


def median_frequency_weights(counts: SplitCounts) -> tuple[float, ...]:
    """Weigh every class by the median frequency over its own.

    The frequency of a class is its share of the pixels of the images in which it occurs; the median is over classes.

    Args:
        counts: Of the split that is trained on.

    Returns:
        One weight a class in train-id order, to six digits: they are written into recipes. A class that never occurs
        has 1, which no pixel uses.

    Raises:
        DataError: E-DATA-094, if nothing is labelled.

    Reference:
        Eigen, Fergus, "Predicting Depth, Surface Normals and Semantic Labels with a Common Multi-Scale Convolutional
        Architecture", ICCV 2015 (the weight alpha of a class).

    Deviations:
        Pixels of an image are its labelled ones; the paper does not say what it does with ignored ones.
    """
    _check_labelled(counts)
    image_of_entry = counts.image_of_entry
    labelled_of_image = np.zeros(counts.num_images, np.int64)
    np.add.at(labelled_of_image, image_of_entry, counts.pixels)
    around = np.zeros(counts.num_classes, np.int64)
    np.add.at(around, counts.classes, labelled_of_image[image_of_entry])
    occurs = around > 0
    frequency = counts.class_pixels[occurs] / around[occurs]
    weights = np.ones(counts.num_classes)
    weights[occurs] = np.median(frequency) / frequency
    return _round_weights(weights)


def enet_weights(counts: SplitCounts) -> tuple[float, ...]:
    """Weigh every class by 1 / ln(1.02 + p), where p is its share of the labelled pixels: 1.42 to 50.5.

    Args:
        counts: Of the split that is trained on.

    Returns:
        One weight a class in train-id order, to six digits: they are written into recipes.

    Raises:
        DataError: E-DATA-094, if nothing is labelled.

    Reference:
        Paszke, Chaurasia, Kim, Culurciello, "ENet: A Deep Neural Network Architecture for Real-Time Semantic
        Segmentation", 2016 (the weighing of classes, with its c = 1.02).

    Deviations:
        None known.
    """
    _check_labelled(counts)
    class_pixels = counts.class_pixels
    return _round_weights(1 / np.log(1.02 + class_pixels / class_pixels.sum()))


class ClassExample(NamedTuple):
    """An image that shows a class well."""

    train_id: int
    sample_index: int
    pixels: int
    """Of the class in this image."""


def find_rare_examples(counts: SplitCounts, *, num_classes: int = 5, per_class: int = 3) -> list[ClassExample]:
    """Choose images that show the rarest classes that occur, those with the most pixels of them first.

    Args:
        counts: Of the split.
        num_classes: How many classes at most, the rarest first.
        per_class: How many images a class at most; no image is shown for two classes.
    """
    class_pixels = counts.class_pixels
    rarest = [int(train_id) for train_id in np.argsort(class_pixels, kind="stable") if class_pixels[train_id]]
    image_of_entry = counts.image_of_entry
    shown: set[int] = set()
    examples = []
    for train_id in rarest[:num_classes]:
        entries = np.flatnonzero(counts.classes == train_id)
        entries = entries[np.argsort(-counts.pixels[entries], kind="stable")]
        fresh = [entry for entry in entries.tolist() if int(image_of_entry[entry]) not in shown]
        for entry in fresh[:per_class]:
            shown.add(int(image_of_entry[entry]))
            examples.append(ClassExample(train_id, int(image_of_entry[entry]), int(counts.pixels[entry])))
    return examples


def _check_labelled(counts: SplitCounts) -> None:
    if not counts.pixels.size:
        raise DataError(
            "E-DATA-094",
            f"no labelled pixel in {counts.num_images} images, so classes have no frequency",
            fix="check the label map; nestseg data verify says what the labels hold",
        )


def _round_weights(weights: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(f"{weight:.6g}") for weight in weights)


def _describe_sides(sides: NDArray[np.int64]) -> SideStats:
    low, high = int(sides.min()), int(sides.max())
    values = np.unique(sides)
    if len(values) <= _MANY_BINS:
        edges = [(int(value), int(value)) for value in values]
    else:
        starts = [low + (high + 1 - low) * step // _MANY_BINS for step in range(_MANY_BINS + 1)]
        edges = [(start, after - 1) for start, after in pairwise(starts)]
    return SideStats(
        minimum=low,
        median=float(np.median(sides)),
        maximum=high,
        histogram=tuple(
            Bin(low=first, high=last, images=int(((sides >= first) & (sides <= last)).sum())) for first, last in edges
        ),
    )


def _describe_channels(counts: SplitCounts) -> tuple[tuple[float, ...], tuple[float, ...]]:
    num_pixels = int((counts.sizes[:, 0] * counts.sizes[:, 1]).sum())
    mean = tuple(total / num_pixels for total in counts.channel_sums)
    # Python's whole numbers have no limit, so for them the difference is exact; it is divided once
    spreads = (
        num_pixels * squares - total * total
        for total, squares in zip(counts.channel_sums, counts.channel_squares, strict=True)
    )
    return mean, tuple(math.sqrt(max(0, spread / num_pixels**2)) for spread in spreads)


def _find_imbalance(classes: Sequence[ClassStats]) -> Imbalance | None:
    occurring = [one for one in classes if one.pixels]
    if len(occurring) < 2:
        return None
    most, least = max(occurring, key=lambda one: one.pixels), min(occurring, key=lambda one: one.pixels)
    return Imbalance(most=most.name, least=least.name, ratio=most.pixels / least.pixels)


def _word_warnings(counts: SplitCounts, classes: Sequence[ClassStats], imbalance: Imbalance | None) -> Iterable[str]:
    unlabelled = counts.num_images - np.count_nonzero(np.diff(counts.offsets))
    total = int((counts.sizes[:, 0] * counts.sizes[:, 1]).sum())
    ignored_share = int(counts.ignored.sum()) / total
    if absent := [one.name for one in classes if not one.pixels]:
        yield (
            f"{len(absent)} of {len(classes)} classes never occur, so nothing can be learnt about them: "
            f"{_enumerate(absent)}."
        )
    if few := [f"{one.name} ({one.images})" for one in classes if 0 < one.images < min(FEW_IMAGES, counts.num_images)]:
        yield f"Classes in fewer than {FEW_IMAGES} images: {_enumerate(few)}. Their scores will depend on chance."
    largest = max(classes, key=lambda one: one.share)
    if len(classes) > 1 and largest.share > DOMINANT_SHARE:
        yield (
            f"{largest.name} covers {largest.share:.1%} of the labelled pixels: always answering {largest.name} has "
            "that pixel accuracy. Judge by mean IoU."
        )
    if imbalance is not None and imbalance.ratio >= STRONG_IMBALANCE:
        yield (
            f"{imbalance.most} has {imbalance.ratio:,.0f} times the pixels of {imbalance.least}. "
            "Class weights or rare-class sampling may help the rare classes."
        )
    if ignored_share > HIGH_IGNORED_SHARE:
        yield f"{ignored_share:.1%} of all pixels are ignored: they cost time and teach nothing."
    if unlabelled:
        yield f"{unlabelled} of {counts.num_images} images have no labelled pixel at all. Leave them out."


def _enumerate(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
