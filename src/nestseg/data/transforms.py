"""Training augmentation: pure functions from a sample and a random generator to a sample.

Every random transform is two functions: ``draw_*`` takes numbers from the generator and depends on nothing else,
and a kernel turns a sample and those numbers into a sample. A draw always takes the same number of values, so the
flip of a sample does not depend on its labels, and switching one effect off leaves the others as they were.

The order of `TrainTransform`, in values of ``rng.random()``:

1. `draw_resize_crop`: the factor, then (down, across) for every try, used or not;
2. `draw_flip`: one coin;
3. `draw_photometric`: brightness coin and value, contrast coin and value, whether contrast comes first, saturation
   coin and value, hue coin and value;
4. seven seeds, for colour jitter, blur, copy-paste, CutMix, mixup, rotation and erasing, whether they are on or off;
5. one seed for every torchvision transform (`apply_torchvision`).

OpenCV's thread count is a setting of the process and is left alone here: whoever starts workers calls
``cv2.setNumThreads(1)`` in each. It changes the speed and no pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError, RecipeError
from nestseg.core.resize import BAND_PIXELS, Window, resize_image, resize_labels, scaled_size
from nestseg.core.taxonomy import Colour
from nestseg.core.types import IGNORE_INDEX, ImageDtype, Sample, Size
from nestseg.data.augment import (
    ColourJitter,
    CopyPaste,
    CutMix,
    Fill,
    GaussianBlur,
    MixUp,
    Partner,
    RandomErasing,
    Rotation,
)

if TYPE_CHECKING:
    from torchvision.transforms.v2 import Transform  # type: ignore[import-untyped]

MEAN_COLOUR: Colour = (124, 116, 104)
"""The ImageNet mean 123.675, 116.28, 103.53 in whole grey levels: within 0.01 standard deviations of zero."""

PadWhere = Literal["centre", "bottom_right"]

_LEVELS = np.arange(256.0)

_VALUE_RANGES: dict[ImageDtype, tuple[float, float]] = {
    "uint8": (0, 255),
    "uint16": (0, 65535),
    "float32": (float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)),
}


class ResizeCropDraw(NamedTuple):
    """How much to resize, and where every try puts its crop.

    Args:
        factor: Multiplies the base size.
        corners: One (down, across) a try, each in [0, 1): the share of the free room above and left of the crop.
    """

    factor: float
    corners: tuple[tuple[float, float], ...]


class Placement(NamedTuple):
    """The size that a picture is resized to, and the window of it that is kept."""

    size: Size
    window: Window


class PhotometricDraw(NamedTuple):
    """Strengths of the four colour effects; 0, 1, 1 and 0 leave the picture as it is.

    Args:
        brightness: Grey levels that are added.
        contrast: Factor about 0 (not about the mean).
        contrast_first: Whether contrast comes before saturation and hue rather than after.
        saturation: Factor of S in HSV.
        hue: Added to H, in OpenCV's half degrees (0-179).
    """

    brightness: float
    contrast: float
    contrast_first: bool
    saturation: float
    hue: int


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """Make the generator of one sample, the same whichever worker, rank or restart asks.

    Args:
        seed: The run's seed.
        epoch: Which pass over the data.
        index: The sample's place in its data set.

    Returns:
        A generator that is statistically independent of that of every other triple.

    Raises:
        ValueError: If one of them is negative (numpy's).

    Example:
        >>> bool(sample_generator(0, 1, 2).random() == sample_generator(0, 1, 2).random())
        True
    """
    # A spawn key, and not SeedSequence([seed, epoch, index]): there a seed of two words could pass for an epoch.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch, index)))


def draw_resize_crop(
    rng: np.random.Generator, *, scale_range: tuple[float, float] | None = (0.5, 2.0), tries: int = 10
) -> ResizeCropDraw:
    """Draw the factor of the resize and the corners of the crop: 1 + 2 * tries values.

    Args:
        rng: Where the values come from.
        scale_range: The factor is uniform in it; None makes it 1.
        tries: How many corners to draw.

    Returns:
        The draw; it depends on the generator alone.
    """
    factor, *corners = rng.random(1 + 2 * tries).tolist()
    low, high = (1.0, 1.0) if scale_range is None else scale_range
    return ResizeCropDraw(low + (high - low) * factor, tuple(zip(corners[::2], corners[1::2], strict=True)))


def place_crop(
    target: NDArray[np.uint8],
    draw: ResizeCropDraw,
    *,
    base_size: Size,
    crop_size: Size,
    max_class_share: float = 0.75,
) -> Placement:
    """Choose the crop: the first try in which no class covers too much, else the last try.

    Only labels are looked at, resized inside the window of each try. A crop without any labelled pixel counts as a
    failed try, and so does one with a single class, whose share is 1. With ``max_class_share`` 1 the first try
    is taken unseen.

    Args:
        target: Ground truth.
        draw: Factor and corners.
        base_size: (short side, long side) at factor 1, see `scaled_size`.
        crop_size: Largest size of the crop; a side on which the resized picture is shorter is kept whole.
        max_class_share: Largest share of the non-ignored pixels that one class may have.

    Returns:
        Size of the resized picture and the window to keep.

    Shape:
        - target: (H, W) uint8

    Deviations:
        mmsegmentation looks at ten crops and, when all fail, keeps an eleventh that it has not looked at; it
        wants the share below 0.75, we allow 0.75 itself, as the recipe's words do.
    """
    placement, _ = _cut_target(target, draw, base_size=base_size, crop_size=crop_size, max_class_share=max_class_share)
    return placement


def random_resize_crop(
    sample: Sample,
    rng: np.random.Generator,
    *,
    base_size: Size,
    crop_size: Size,
    scale_range: tuple[float, float] | None = (0.5, 2.0),
    max_class_share: float = 0.75,
    tries: int = 10,
) -> Sample:
    """Resize by one random factor and cut a random crop; only the crop's pixels are computed.

    Args:
        sample: Picture and ground truth of one size.
        rng: See `draw_resize_crop`.
        base_size: (short side, long side) at factor 1, see `scaled_size`.
        crop_size: Largest size of the result; nothing is padded here.
        scale_range: The factor is uniform in it; None makes it 1.
        max_class_share: See `place_crop`.
        tries: How many crops to look at.

    Returns:
        The crop: bilinear picture, nearest ground truth.

    Shape:
        - sample: any (H, W)
        - returns: at most ``crop_size``
    """
    draw = draw_resize_crop(rng, scale_range=scale_range, tries=tries)
    (size, window), target = _cut_target(
        sample.target, draw, base_size=base_size, crop_size=crop_size, max_class_share=max_class_share
    )
    return Sample(resize_image(sample.image, size, window=window), target)


def draw_flip(rng: np.random.Generator, *, probability: float = 0.5) -> bool:
    """Toss the coin of `random_flip`: one value.

    Args:
        rng: Where it comes from.
        probability: Of True.

    Returns:
        Whether to flip.
    """
    return bool(rng.random() < probability)


def random_flip(sample: Sample, rng: np.random.Generator, *, probability: float = 0.5) -> Sample:
    """Swap left and right of picture and ground truth, or leave both.

    Args:
        sample: Picture and ground truth of one size.
        rng: See `draw_flip`.
        probability: How often to flip.

    Returns:
        A flipped copy, or the sample itself.

    Shape:
        - sample: any (H, W)
        - returns: the same
    """
    if not draw_flip(rng, probability=probability):
        return sample
    return Sample(_flip(sample.image), _flip(sample.target))


def draw_photometric(
    rng: np.random.Generator,
    *,
    brightness: float = 32.0,
    contrast: tuple[float, float] = (0.5, 1.5),
    saturation: tuple[float, float] = (0.5, 1.5),
    hue: int = 18,
    probability: float = 0.5,
) -> PhotometricDraw:
    """Draw the colour effects: nine values, whatever the coins say.

    Args:
        rng: Where they come from.
        brightness: Added grey levels are uniform in [-brightness, brightness].
        contrast: Range of the contrast factor.
        saturation: Range of the saturation factor.
        hue: Added half degrees are whole numbers in [-hue, hue], each as likely.
        probability: Of each of the four effects.

    Returns:
        The draw; an effect whose coin says no has its neutral value.

    Deviations:
        mmsegmentation never draws +18, since its upper end is exclusive.
    """
    coins_and_values = rng.random(9).tolist()
    bright, bright_at, contrasted, contrast_at, first, saturated, saturation_at, hued, hue_at = coins_and_values
    return PhotometricDraw(
        brightness=brightness * (2 * bright_at - 1) if bright < probability else 0.0,
        contrast=contrast[0] + (contrast[1] - contrast[0]) * contrast_at if contrasted < probability else 1.0,
        contrast_first=first < 0.5,
        saturation=saturation[0] + (saturation[1] - saturation[0]) * saturation_at if saturated < probability else 1.0,
        hue=int(hue_at * (2 * hue + 1)) - hue if hued < probability else 0,
    )


def distort_photometric(image: NDArray[np.uint8], draw: PhotometricDraw) -> NDArray[np.uint8]:
    """Apply brightness, contrast, saturation and hue; contrast goes before or after the last two.

    Each effect ends in whole grey levels: rounded to nearest (halves to even) and clipped to 0-255. Saturation
    and hue are applied in OpenCV's 8-bit HSV (H 0-179, S and V 0-255), in one conversion there and back.

    Args:
        image: The picture.
        draw: What to do.

    Returns:
        The distorted picture, a new array.

    Shape:
        - image: (H, W, 3) uint8 RGB
        - returns: (H, W, 3) uint8 RGB

    Deviations:
        mmsegmentation cuts fractions off where we round, and converts to HSV and back once for saturation and
        once more for hue. OpenCV itself cuts fractions off on its way back from HSV, a third of a grey level
        darker on average. torchvision's ``RandomPhotometricDistort`` is another function.
    """
    bright = _to_levels(_LEVELS + draw.brightness)
    contrasted = _to_levels(_LEVELS * draw.contrast)
    saturated = _to_levels(_LEVELS * draw.saturation)
    if draw.saturation == 1 and draw.hue == 0:
        return _look_up(image, contrasted[bright])
    hued = ((_LEVELS + draw.hue) % 180).astype(np.uint8)
    # Tables of single effects chain exactly: looking up in a looked-up table rounds and clips after each.
    before = contrasted[bright] if draw.contrast_first else bright
    distorted = np.empty_like(image)
    step = min(len(image), max(1, BAND_PIXELS // image.shape[1]))
    hsv = np.empty_like(image, shape=(step, *image.shape[1:]))
    planes = np.empty_like(image, shape=(3, *hsv.shape[:2]))
    for first in range(0, len(image), step):
        band = distorted[first : first + step]
        height = len(band)
        _look_up(image[first : first + step], before, into=band)
        cv2.cvtColor(band, cv2.COLOR_RGB2HSV, dst=hsv[:height])
        # Apart and together again: looking up three channels at once takes longer than all of this.
        hue, saturation, value = planes[:, :height]
        cv2.split(hsv[:height], [hue, saturation, value])
        if draw.hue != 0:
            cv2.LUT(hue, hued, dst=hue)
        if draw.saturation != 1:
            cv2.LUT(saturation, saturated, dst=saturation)
        cv2.merge([hue, saturation, value], dst=hsv[:height])
        cv2.cvtColor(hsv[:height], cv2.COLOR_HSV2RGB, dst=band)
        if not draw.contrast_first:
            _look_up(band, contrasted, into=band)
    return distorted


def photometric_distortion(
    sample: Sample,
    rng: np.random.Generator,
    *,
    brightness: float = 32.0,
    contrast: tuple[float, float] = (0.5, 1.5),
    saturation: tuple[float, float] = (0.5, 1.5),
    hue: int = 18,
    probability: float = 0.5,
) -> Sample:
    """Distort the colours of the picture at random; the ground truth stays.

    Args:
        sample: Picture and ground truth.
        rng: See `draw_photometric`.
        brightness: Largest number of grey levels to add or take away.
        contrast: Range of the factor about 0.
        saturation: Range of the factor of S in HSV.
        hue: Largest shift of H, in OpenCV's half degrees.
        probability: Of each of the four effects.

    Returns:
        The distorted sample.

    Shape:
        - sample: any (H, W), RGB
        - returns: the same
    """
    draw = draw_photometric(
        rng,
        brightness=brightness,
        contrast=contrast,
        saturation=saturation,
        hue=hue,
        probability=probability,
    )
    return sample._replace(image=distort_photometric(sample.image, draw))


def pad_to(sample: Sample, size: Size, *, fill: Fill = MEAN_COLOUR, where: PadWhere = "centre") -> Sample:
    """Fill up a sample to a size: the picture with one colour, the ground truth with 255.

    Args:
        sample: Picture and ground truth, on no side longer than ``size``.
        size: (height, width) of the result.
        fill: Colour of the border, one value a channel.
        where: ``"centre"`` puts the sample in the middle (the odd row or column goes below or right), as the
            original recipe does; ``"bottom_right"`` adds only there, as mmsegmentation does.

    Returns:
        The padded sample, or the sample itself where it has that size.

    Raises:
        ValueError: If the sample is longer than ``size`` on a side.

    Shape:
        - sample: at most ``size``
        - returns: exactly ``size``
    """
    height, width = _size_of(sample.target)
    if height > size[0] or width > size[1]:
        raise ValueError(f"a sample of {(height, width)} cannot be padded to {size}; crop it first")
    if (height, width) == size:
        return sample
    top, left = ((size[0] - height) // 2, (size[1] - width) // 2) if where == "centre" else (0, 0)
    border = (top, size[0] - height - top, left, size[1] - width - left)
    channels = sample.image.shape[2]
    if channels <= 4:
        # OpenCV drops the axis of a single channel
        image = cv2.copyMakeBorder(sample.image, *border, cv2.BORDER_CONSTANT, value=fill).reshape(*size, channels)
    else:  # its colours end at four
        image = np.empty((*size, channels), sample.image.dtype)
        image[:] = np.asarray(fill, image.dtype)
        image[top : top + height, left : left + width] = sample.image
    target = cv2.copyMakeBorder(sample.target, *border, cv2.BORDER_CONSTANT, value=(IGNORE_INDEX,))
    return Sample(image, np.asarray(target, np.uint8))


def apply_torchvision(sample: Sample, rng: np.random.Generator, transform: Transform) -> Sample:
    """Apply any transform of ``torchvision.transforms.v2`` with our randomness.

    The transform sees a ``tv_tensors.Image`` and a ``tv_tensors.Mask``, so geometric ones move both alike. Its
    random numbers come from torch's global CPU generator, which is seeded from ``rng`` for the call and put back.

    torchvision fills the corners that a rotation uncovers with 0 in the mask too, which is a class. Here the mask
    travels with its complement: a filled pixel has the same value in both and becomes 255, whatever the fill.

    Args:
        sample: Picture and ground truth of one size.
        rng: Gives one value, the seed.
        transform: The transform; its picture must stay uint8 RGB and as large as the mask.

    Returns:
        The transformed sample.

    Raises:
        RecipeError: If the result is no longer such a sample.

    Shape:
        - sample: any (H, W), RGB
        - returns: any (H', W'), RGB
    """
    import torch
    from torchvision import tv_tensors  # type: ignore[import-untyped]

    seed = int(rng.random() * 2**53)
    image = tv_tensors.Image(torch.from_numpy(sample.image.transpose(2, 0, 1).copy()))
    mask = tv_tensors.Mask(torch.from_numpy(np.stack([sample.target, ~sample.target])))
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would seed the accelerators too, and fork_rng would not put them back.
        torch.default_generator.manual_seed(seed)
        image, mask = transform(image, mask)
    if image.dtype != torch.uint8 or image.shape != (3, *mask.shape[-2:]) or mask.dtype != torch.uint8:
        raise RecipeError(
            "E-RECIPE-060",
            f"{type(transform).__name__} made a {tuple(image.shape)} {image.dtype} picture with a "
            f"{tuple(mask.shape[-2:])} {mask.dtype} mask; allowed: 3 channels, uint8, one size",
            fix="drop it from the extra transforms; normalising and converting to float happen inside the model",
        )
    target, complement = mask.numpy()
    return Sample(
        np.ascontiguousarray(image.numpy().transpose(1, 2, 0)),
        np.where(target == ~complement, target, np.uint8(IGNORE_INDEX)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTransform:
    """The augmentation of a training run.

    In this order: resize and crop, flip, photometric distortion, colour jitter, blur, pad; then copy-paste, CutMix,
    mixup, rotation, torchvision's transforms, erasing. Colours come before padding, so that a border stays the mean
    colour. A partner goes through everything up to padding by itself. What covers or turns comes last, so that it
    meets what was pasted. All beyond the table's recipe is off unless asked for.

    Every effect from `nestseg.data.augment` draws from a generator of its own, made from the sample's: to switch one
    on or off leaves the draws of all others as they were.

    Geometry, blur, mixing and erasing work on any number of channels and any `ImageDtype`. Photometric distortion,
    colour jitter and torchvision's transforms are defined for 8-bit RGB and refused for anything else.

    Args:
        base_size: (short side, long side) of a picture at factor 1, see `scaled_size`.
        crop_size: (height, width) of every result.
        scale_range: Range of the resize factor; None resizes to the base size only.
        max_class_share: See `place_crop`; 1 takes the first crop.
        crop_tries: How many crops to look at.
        flip_probability: 0 switches flipping off.
        photometric_probability: Of each of the four colour effects; 0 switches them off.
        brightness: See `draw_photometric`.
        contrast: See `draw_photometric`.
        saturation: See `draw_photometric`.
        hue: See `draw_photometric`.
        pad_colour: Colour of the border, and of what rotation uncovers and erasing covers; one value a channel, so
            that it says how many there are.
        pad_where: See `pad_to`.
        colour_jitter: None is off, and so for the next six.
        blur: Gaussian blur.
        copy_paste: Needs ``paste_partner`` or ``partner``.
        cut_mix: Needs ``partner``.
        mix_up: Needs ``partner``.
        rotation: About the centre of the crop.
        erasing: A rectangle.
        extra: Transforms of ``torchvision.transforms.v2``, in this order.
        partner: Draws the second sample, see `RandomPartner`.
        paste_partner: Draws what is pasted from, such as samples that show the rare classes; None takes ``partner``.
        image_dtype: Type of a picture's values.

    Raises:
        RecipeError: If a number is outside its range; all of them are named at once. If an effect for 8-bit RGB is on
            for other pictures.
        ValueError: If an effect lacks the partner that it needs.
    """

    base_size: Size
    crop_size: Size
    scale_range: tuple[float, float] | None = (0.5, 2.0)
    max_class_share: float = 0.75
    crop_tries: int = 10
    flip_probability: float = 0.5
    photometric_probability: float = 0.5
    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18
    pad_colour: tuple[float, ...] = MEAN_COLOUR
    pad_where: PadWhere = "centre"
    colour_jitter: ColourJitter | None = None
    blur: GaussianBlur | None = None
    copy_paste: CopyPaste | None = None
    cut_mix: CutMix | None = None
    mix_up: MixUp | None = None
    rotation: Rotation | None = None
    erasing: RandomErasing | None = None
    extra: tuple[Transform, ...] = ()
    partner: Partner | None = None
    paste_partner: Partner | None = None
    image_dtype: ImageDtype = "uint8"

    def __post_init__(self) -> None:
        ranges = {"contrast": self.contrast, "saturation": self.saturation}
        low, high = _VALUE_RANGES[self.image_dtype]
        rules = {
            f"base_size {self.base_size}: positive": min(self.base_size) >= 1,
            f"crop_size {self.crop_size}: positive": min(self.crop_size) >= 1,
            f"scale_range {self.scale_range}: 0 < low <= high": self.scale_range is None
            or 0 < self.scale_range[0] <= self.scale_range[1],
            f"max_class_share {self.max_class_share}: 0 to 1": 0 <= self.max_class_share <= 1,
            f"crop_tries {self.crop_tries}: at least 1": self.crop_tries >= 1,
            f"flip_probability {self.flip_probability}: 0 to 1": 0 <= self.flip_probability <= 1,
            f"photometric_probability {self.photometric_probability}: 0 to 1": 0 <= self.photometric_probability <= 1,
            f"brightness {self.brightness}: 0 to 255": 0 <= self.brightness <= 255,
            **{f"{name} {pair}: 0 <= low <= high": 0 <= pair[0] <= pair[1] for name, pair in ranges.items()},
            f"hue {self.hue}: 0 to 90": 0 <= self.hue <= 90,
            f"pad_colour {self.pad_colour}: one value a channel, {low:g} to {high:g}": len(self.pad_colour) > 0
            and all(low <= value <= high for value in self.pad_colour),
            f"pad_where {self.pad_where!r}: centre or bottom_right": self.pad_where in ("centre", "bottom_right"),
        }
        broken = [rule for rule, kept in rules.items() if not kept]
        if broken:
            raise RecipeError(
                "E-RECIPE-061", f"augmentation: {'; '.join(broken)}", fix="set the fields to allowed values"
            )
        colours = {
            "photometric": self.photometric_probability > 0,
            "colour_jitter": self.colour_jitter is not None,
            "torchvision": bool(self.extra),
        }
        if not self._is_rgb and any(colours.values()):
            raise RecipeError(
                "E-RECIPE-066",
                f"augmentation.{', '.join(name for name, on in colours.items() if on)} for pictures of "
                f"{len(self.pad_colour)} channels {self.image_dtype}; they change the colours of 8-bit RGB",
                fix=" ".join(
                    f"augmentation.{name}={'[]' if name == 'torchvision' else 'null'}"
                    for name, on in colours.items()
                    if on
                ),
            )
        pastes = self.copy_paste is not None and self.paste_partner is None
        if self.partner is None and (pastes or self.cut_mix is not None or self.mix_up is not None):
            raise ValueError("copy_paste, cut_mix and mix_up need a partner; pass partner=RandomPartner(dataset)")

    @property
    def _is_rgb(self) -> bool:
        return (len(self.pad_colour), self.image_dtype) == (3, "uint8")

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Augment one sample.

        Args:
            sample: Picture and ground truth of one size; not changed.
            rng: The sample's own generator, see `sample_generator`.

        Returns:
            A sample of exactly ``crop_size``.

        Raises:
            RecipeError: If an extra transform fails, changes the size, or makes something else than a sample.
            DataError: If a partner cannot be read, or a picture has other channels or another type than it should.

        Shape:
            - sample: any (H, W), as many channels as ``pad_colour``, of ``image_dtype``
            - returns: ``crop_size``, the same
        """
        sample = self._frame(sample, rng)
        copy_seed, cut_seed, mix_seed, rotation_seed, erasing_seed = _draw_seeds(rng, 5)
        if self.copy_paste is not None:
            sample = self.copy_paste(sample, np.random.default_rng(copy_seed), partner=self._draw_paste_partner)
        if self.cut_mix is not None:
            sample = self.cut_mix(sample, np.random.default_rng(cut_seed), partner=self._draw_partner)
        if self.mix_up is not None:
            sample = self.mix_up(sample, np.random.default_rng(mix_seed), partner=self._draw_partner)
        if self.rotation is not None:
            sample = self.rotation(sample, np.random.default_rng(rotation_seed), fill=self.pad_colour)
        for transform in self.extra:
            try:
                sample = apply_torchvision(sample, rng, transform)
            except RuntimeError as error:  # torch's, for pictures too small for a transform
                raise RecipeError(
                    "E-RECIPE-068",
                    f"{type(transform).__name__} of torchvision fails on a crop of {self.crop_size}: {error}",
                    fix="drop the transform, choose other arguments, or a larger data.crop_size",
                    path="augmentation.torchvision",
                ) from error
        if _size_of(sample.target) != self.crop_size:
            raise RecipeError(
                "E-RECIPE-062",
                f"the extra transforms made a sample of {_size_of(sample.target)}; "
                f"allowed is the crop size {self.crop_size}",
                fix="drop the transform that changes the size",
            )
        if self.erasing is not None:
            sample = self.erasing(sample, np.random.default_rng(erasing_seed), fill=self.pad_colour)
        return sample

    def _frame(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Bring one sample to the crop size, its colours changed: all that concerns a sample alone."""
        given, wanted = sample.image.shape[2:], (len(self.pad_colour),)
        if given != wanted or sample.image.dtype != np.dtype(self.image_dtype):
            raise DataError(
                "E-DATA-087",
                f"picture of {given[0]} channels {sample.image.dtype}; the recipe says {wanted[0]} {self.image_dtype}",
                fix="data.in_channels and data.image_dtype must be those of the data set; pack a packed copy again",
            )
        sample = random_resize_crop(
            sample,
            rng,
            base_size=self.base_size,
            crop_size=self.crop_size,
            scale_range=self.scale_range,
            max_class_share=self.max_class_share,
            tries=self.crop_tries,
        )
        sample = random_flip(sample, rng, probability=self.flip_probability)
        if self._is_rgb:
            sample = photometric_distortion(
                sample,
                rng,
                brightness=self.brightness,
                contrast=self.contrast,
                saturation=self.saturation,
                hue=self.hue,
                probability=self.photometric_probability,
            )
        jitter_seed, blur_seed = _draw_seeds(rng, 2)
        if self.colour_jitter is not None:
            sample = self.colour_jitter(sample, np.random.default_rng(jitter_seed))
        if self.blur is not None:
            sample = self.blur(sample, np.random.default_rng(blur_seed))
        return pad_to(sample, self.crop_size, fill=self.pad_colour, where=self.pad_where)

    def _draw_partner(self, rng: np.random.Generator) -> Sample:
        assert self.partner is not None, "an effect without the partner it needs is refused at the start"
        return self._frame(self.partner(rng), rng)

    def _draw_paste_partner(self, rng: np.random.Generator) -> Sample:
        if self.paste_partner is None:
            return self._draw_partner(rng)
        return self._frame(self.paste_partner(rng), rng)


def _draw_seeds(rng: np.random.Generator, count: int) -> list[int]:
    """Draw seeds of generators, as many values."""
    return [int(value * 2**53) for value in rng.random(count).tolist()]


def _size_of(target: NDArray[np.uint8]) -> Size:
    height, width = target.shape
    return height, width


def _cut_target(
    target: NDArray[np.uint8], draw: ResizeCropDraw, *, base_size: Size, crop_size: Size, max_class_share: float
) -> tuple[Placement, NDArray[np.uint8]]:
    """Choose the crop as `place_crop` does, and return the ground truth in it, which has been resized by then."""
    size = scaled_size(_size_of(target), base=base_size, factor=draw.factor)
    height, width = min(crop_size[0], size[0]), min(crop_size[1], size[1])
    windows = [
        Window(int(down * (size[0] - height + 1)), int(across * (size[1] - width + 1)), height, width)
        for down, across in draw.corners
    ]
    if max_class_share >= 1:
        return Placement(size, windows[0]), resize_labels(target, size, window=windows[0])
    # Without room to move all tries are the same crop, so distinct windows are looked at once.
    for window in dict.fromkeys(windows):
        labels = resize_labels(target, size, window=window)
        if not _is_dominated(labels, max_class_share):
            return Placement(size, window), labels
    if window != windows[-1]:
        labels = resize_labels(target, size, window=windows[-1])
    return Placement(size, windows[-1]), labels


def _is_dominated(target: NDArray[np.uint8], share: float) -> bool:
    """Return whether one class covers more than a share of the labelled pixels; True when none is labelled."""
    labelled = target.size - int(np.count_nonzero(target == IGNORE_INDEX))
    if not labelled:
        return True
    # To compare with one value takes an eighth of a histogram's time. The most frequent class of a coarse grid mostly
    # settles it: it covers too much, or leaves so little that no other class can.
    likely = int(np.bincount(target[::8, ::8].ravel(), minlength=256)[:IGNORE_INDEX].argmax())
    covered = int(np.count_nonzero(target == likely))
    if _divide(covered, labelled) > share:
        return True
    if _divide(labelled - covered, labelled) <= share:
        return False
    counts = cv2.calcHist([target], [0], None, [256], [0, 256]).ravel()
    return _divide(int(counts[:IGNORE_INDEX].max()), labelled) > share


def _divide(count: int, total: int) -> float:
    # in float32: which crop is taken where a share is the allowed one to the last digit depends on it
    return float(np.float32(count) / np.float32(total))


def _flip(array: NDArray[Any]) -> NDArray[Any]:
    # 30 times as fast as copying array[:, ::-1]; OpenCV drops the axis of a single channel
    return cv2.flip(array, 1).reshape(array.shape)


def _to_levels(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    levels: NDArray[np.uint8] = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return levels


def _look_up(
    image: NDArray[np.uint8], table: NDArray[np.uint8], *, into: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Replace each value by its entry in the table."""
    into = np.empty_like(image) if into is None else into
    if not np.array_equal(table, _LEVELS):
        cv2.LUT(image, table, dst=into)
    elif into is not image:
        np.copyto(into, image)
    return into
