"""From a data set of your own to recipe values, each with its reason. Pure arithmetic: no torch, no files.

The rules are rules of thumb. They give the published recipes back where those apply (crop and base size of Cityscapes,
within a few percent the length of VOC's schedule) and something that trains elsewhere; ``--set`` overrules each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from nestseg.core.types import Size
from nestseg.data.spec import DatasetSpec

MAX_SHORT_SIDE = 1024
"""Pictures with a longer short side are resized to it."""

MIN_SHORT_SIDE = 128
"""Pictures with a shorter one are enlarged to it: C5 would have too few pixels."""

MAX_CROP = (512, 1024)
"""[height, width] of the largest crop, that of Cityscapes."""

STEPS_FOR_ONE = 400
"""Steps for one image; n images get the square root of n times as many."""

MAX_EPOCHS = 400
MIN_STEPS = 500


class DatasetFacts(NamedTuple):
    """What was measured of a training split.

    Each size is three quantiles: a tenth of the images have at most the first, half at most the second, nine tenths at
    most the third.
    """

    num_images: int
    heights: tuple[int, int, int]
    widths: tuple[int, int, int]
    short_sides: tuple[int, int, int]
    long_sides: tuple[int, int, int]

    @classmethod
    def from_sizes(cls, sizes: Sequence[Size], *, num_images: int) -> DatasetFacts:
        """Compute the quantiles of some sizes.

        Example:
            >>> facts = DatasetFacts.from_sizes([(360, 480)] * 8 + [(480, 360)] * 2, num_images=10)
            >>> facts.heights, facts.short_sides
            ((360, 360, 480), (360, 360, 360))
        """

        def quantiles(values: Iterable[int]) -> tuple[int, int, int]:
            ordered = sorted(values)
            low, middle, high = (ordered[min(len(ordered) - 1, len(ordered) * part // 10)] for part in (1, 5, 9))
            return low, middle, high

        return cls(
            num_images=num_images,
            heights=quantiles(height for height, _ in sizes),
            widths=quantiles(width for _, width in sizes),
            short_sides=quantiles(map(min, sizes)),
            long_sides=quantiles(map(max, sizes)),
        )

    @property
    def alike(self) -> bool:
        """Whether nearly all images have about the same height and width."""
        return all(high <= 1.1 * low for low, _, high in (self.heights, self.widths))


class DerivedField(NamedTuple):
    """A field of the recipe, its value, and why."""

    field: str
    value: Any
    reason: str

    def __str__(self) -> str:
        value = list(self.value) if isinstance(self.value, tuple) else "null" if self.value is None else self.value
        return f"{self.field}: {value}  # {self.reason}"


def spread_places(total: int, count: int) -> list[int]:
    """Choose at most ``count`` of ``total`` places, evenly spread, the first and the last among them.

    Example:
        >>> spread_places(9, 3), spread_places(2, 64)
        ([0, 4, 8], [0, 1])
    """
    count = min(total, count)
    return [place * (total - 1) // max(1, count - 1) for place in range(count)]


def derive_recipe(spec: DatasetSpec, facts: DatasetFacts) -> list[DerivedField]:
    """Derive what a recipe needs to know of a data set.

    Args:
        spec: The description.
        facts: What was measured of its training split, see `choose_splits`.

    Returns:
        Dotted fields of the recipe with plain values and reasons, in the order of the recipe.
    """
    train_split, eval_split = choose_splits(spec)
    base_size, scoring_size, size_reason = _derive_base_size(facts)
    crop_size, crop_reason = _derive_crop(facts, base_size)
    batch_size = 16 if crop_size[0] * crop_size[1] <= 512 * 512 else 8
    batch_reason = f"{batch_size} crops of this size, as in the published recipes"
    if facts.num_images < batch_size:
        batch_size = max(4, facts.num_images)
        batch_reason = f"as many as there are training images ({facts.num_images}), at least 4 for the norms"
    lr = 0.01 if batch_size >= 8 else 0.01 * batch_size / 8
    steps_per_epoch = max(1, facts.num_images // batch_size)
    epochs, steps_reason = _derive_epochs(facts.num_images, steps_per_epoch)
    max_steps = epochs * steps_per_epoch
    fields = [
        DerivedField("data.dataset", spec.name, f"{len(spec.classes)} classes: {_name_classes(spec)}"),
        DerivedField("data.train_split", train_split, f"one of the splits {', '.join(spec.splits)}"),
        DerivedField(
            "data.eval_split",
            eval_split or train_split,
            "scored during training" if eval_split else "there is no other split, so nothing is scored in training",
        ),
        DerivedField("data.batch_size", batch_size, batch_reason),
        DerivedField("data.crop_size", crop_size, crop_reason),
        *_derive_values(spec),
        DerivedField("augmentation.base_size", base_size, size_reason),
        DerivedField("optimizer.lr", lr, f"0.01, the published value{'' if lr == 0.01 else f', times {batch_size}/8'}"),
        DerivedField("schedule.epochs", epochs, steps_reason),
        DerivedField(
            "evaluation.base_size",
            scoring_size,
            "images are scored as they are" if scoring_size is None else "images are scored at the size of training",
        ),
        DerivedField(
            "evaluation.every_steps",
            max(1, min(5000, math.ceil(max_steps / 10))) if eval_split else None,
            "ten times a run, and every 5,000 steps of a long one" if eval_split else "there is nothing to score on",
        ),
    ]
    return fields


def choose_splits(spec: DatasetSpec) -> tuple[str, str | None]:
    """Choose the split to train on and the one to score, None where there is only one.

    A split called test is scored only if there is nothing else: choosing models by it would spoil it.

    Example:
        >>> text = "{name: pets, files: {images: '{split}/images', labels: '{split}/masks'}, classes: [a, b], "
        >>> choose_splits(DatasetSpec.parse(text + "splits: [test, training, valid]}"))
        ('training', 'valid')
    """
    names = list(spec.splits)
    train = next((name for name in names if name.startswith("train")), names[0])
    others = sorted((name for name in names if name != train), key=lambda name: name.startswith("test"))
    val = next((name for name in others if name.startswith("val")), next(iter(others), None))
    return train, val


def _derive_values(spec: DatasetSpec) -> list[DerivedField]:
    """Derive how images of other than 8-bit RGB are normalised; for 8-bit RGB it is ImageNet's mean and deviation."""
    if spec.is_rgb:
        return []
    middle = {"uint8": 127.5, "uint16": 32767.5, "float32": 0.5}[spec.dtype]
    fields = [
        DerivedField("data.in_channels", spec.channels, "as the data set file says"),
        DerivedField("data.image_dtype", spec.dtype, "as the data set file says"),
        DerivedField(
            "data.mean", (middle,) * spec.channels, "the middle of the range; nestseg data stats has the measured one"
        ),
        DerivedField("data.std", (middle / 2,) * spec.channels, "a quarter of the range"),
        DerivedField("augmentation.photometric", None, "it is for 8-bit RGB only"),
    ]
    return fields


def _derive_base_size(facts: DatasetFacts) -> tuple[Size, Size | None, str]:
    """Return base_size of augmentation and of evaluation, and why."""
    low, short, high = facts.short_sides
    long = facts.long_sides[1]
    target = min(max(short, MIN_SHORT_SIDE), MAX_SHORT_SIDE)
    if facts.alike:
        base = (target, round(long * target / short))
        if target == short:
            return base, None, f"the images' own size: nine of ten are about {facts.heights[1]}x{facts.widths[1]}"
        words = "longer" if target < short else "shorter"
        return base, base, f"short side {target}: that of the images, {short}, is {words} than what trains well"
    base = (target, 4 * target)
    reason = f"sizes or shapes differ (short sides {low} to {high}, median {short}): the median, whatever the long side"
    return base, base, reason


def _derive_crop(facts: DatasetFacts, base_size: Size) -> tuple[Size, str]:
    short, long = base_size
    if not facts.alike:
        side = _round_side(min(short, MAX_CROP[0]))
        return (side, side), f"the short side of {short}, at most {MAX_CROP[0]}, in steps of 32: images differ in shape"
    height, width = (short, long) if facts.heights[1] <= facts.widths[1] else (long, short)
    limit = MAX_CROP if height <= width else MAX_CROP[::-1]
    crop = (_round_side(min(height, limit[0])), _round_side(min(width, limit[1])))
    return crop, f"images of {height}x{width}, at most {limit[0]}x{limit[1]}, in steps of 32"


def _round_side(side: int) -> int:
    return max(64, round(side / 32) * 32)


def _derive_epochs(num_images: int, steps_per_epoch: int) -> tuple[int, str]:
    wanted = STEPS_FOR_ONE * math.sqrt(num_images)
    epochs = max(1, min(round(wanted / steps_per_epoch), MAX_EPOCHS))
    if epochs * steps_per_epoch < MIN_STEPS:
        epochs = math.ceil(MIN_STEPS / steps_per_epoch)
        why = f"at least {MIN_STEPS} steps"
    elif epochs == MAX_EPOCHS:
        why = f"at most {MAX_EPOCHS} epochs"
    else:
        why = "steps grow with the square root of the number of images"
    images = f"{num_images:,} training image{'s' if num_images > 1 else ''}"
    return epochs, f"{images}: {epochs * steps_per_epoch:,} steps of training; {why}"


def _name_classes(spec: DatasetSpec) -> str:
    names = [entry.name for entry in spec.classes]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
