"""Augmentation beyond the table's recipe: every effect a record of its settings and a kernel that applies numbers.

A record is called with a sample and a generator: it tosses its coin, draws its numbers and hands them to the kernel.
A kernel draws nothing. In which order the effects come, and that each has a generator of its own, is decided in
`nestseg.data.transforms.TrainTransform`.

Effects that put two samples together ask for the second one, the partner, only when their coin says so. It comes from
the generator of the effect, so that workers, ranks and restarts see the same pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import cv2
import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError, RecipeError, nearest
from nestseg.core.resize import Window
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import IGNORE_INDEX, Sample, Size
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.packed import read_for_crop

if TYPE_CHECKING:
    from torchvision.transforms.v2 import Transform  # type: ignore[import-untyped]

Partner = Callable[[np.random.Generator], Sample]
"""Draws a second sample."""

Fill = Sequence[float]
"""One value a channel."""

_LEVELS = np.arange(256.0)
_MAX_CHANNELS = 4  # of one OpenCV border value


class JitterDraw(NamedTuple):
    """Strengths of the four effects of `jitter_colours`; 1, 1, 1 and 0 leave the picture as it is.

    Args:
        brightness: Factor about 0.
        contrast: Factor about the mean of the grey picture.
        saturation: Factor about each pixel's own grey.
        hue: Added to H, in OpenCV's half degrees (0-179).
        order: A permutation of 0-3: brightness, contrast, saturation, hue.
    """

    brightness: float
    contrast: float
    saturation: float
    hue: int
    order: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ColourJitter:
    """Brightness, contrast, saturation and hue in random order, each by a random strength.

    Not the photometric distortion of the table's recipe: there brightness adds, contrast is about 0, and each of the
    four has a coin of its own.

    Args:
        brightness: The factor is uniform in [1 - brightness, 1 + brightness]; at most 1.
        contrast: Likewise.
        saturation: Likewise.
        hue: The shift is uniform in [-hue, hue], in turns of the colour wheel; at most 0.5.
        probability: Of jittering at all.

    Raises:
        RecipeError: If a number is outside its range.

    Reference:
        Howard, "Some Improvements on Deep Convolutional Neural Network Based Image Classification", 2013, section 2.2;
        hue and random order as in torchvision's ``ColorJitter``.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    probability: float = 0.5

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in ("brightness", "contrast", "saturation", "probability")}
        _check_rules(
            "colour_jitter",
            {
                **{f"{name} {value}: 0 to 1": 0 <= value <= 1 for name, value in shares.items()},
                f"hue {self.hue}: 0 to 0.5": 0 <= self.hue <= 0.5,
            },
        )

    def draw(self, rng: np.random.Generator) -> JitterDraw:
        """Draw strengths and order."""
        brightness, contrast, saturation, hue = (2 * rng.random(4) - 1).tolist()
        return JitterDraw(
            brightness=1 + self.brightness * brightness,
            contrast=1 + self.contrast * contrast,
            saturation=1 + self.saturation * saturation,
            hue=round(180 * self.hue * hue),
            order=tuple(rng.permutation(4).tolist()),
        )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Jitter the colours of the picture, or leave them; the ground truth stays.

        Shape:
            - sample: any (H, W), uint8 RGB
            - returns: the same
        """
        if rng.random() >= self.probability:
            return sample
        return sample._replace(image=jitter_colours(sample.image, self.draw(rng)))


def jitter_colours(image: NDArray[np.uint8], draw: JitterDraw) -> NDArray[np.uint8]:
    """Apply brightness, contrast, saturation and hue in the order drawn.

    Each effect ends in whole grey levels: rounded to nearest and clipped to 0-255. Grey is 0.299 R + 0.587 G + 0.114 B
    in whole levels. The hue is turned in OpenCV's 8-bit HSV, as in `distort_photometric`.

    Args:
        image: The picture.
        draw: Strengths and order.

    Returns:
        The jittered picture.

    Shape:
        - image: (H, W, 3) uint8 RGB
        - returns: (H, W, 3) uint8 RGB

    Deviations:
        torchvision's ``ColorJitter`` cuts fractions off where we round, and turns the hue by real numbers, we by steps
        of two degrees.
    """
    effects: tuple[Callable[[NDArray[np.uint8]], NDArray[np.uint8]], ...] = (
        lambda picture: _scale_about(picture, 0.0, draw.brightness),
        lambda picture: _scale_about(picture, float(_to_grey(picture).mean()), draw.contrast),
        lambda picture: _saturate(picture, draw.saturation),
        lambda picture: _turn_hue(picture, draw.hue),
    )
    for effect in draw.order:
        image = effects[effect](image)
    return image


def _scale_about(image: NDArray[np.uint8], centre: float, factor: float) -> NDArray[np.uint8]:
    table = np.rint(np.clip(centre + factor * (_LEVELS - centre), 0, 255)).astype(np.uint8)
    return np.asarray(cv2.LUT(image, table), np.uint8)


def _saturate(image: NDArray[np.uint8], factor: float) -> NDArray[np.uint8]:
    grey = cv2.cvtColor(_to_grey(image), cv2.COLOR_GRAY2RGB)
    return np.asarray(cv2.addWeighted(image, factor, grey, 1 - factor, 0), np.uint8)


def _turn_hue(image: NDArray[np.uint8], steps: int) -> NDArray[np.uint8]:
    if steps == 0:  # the way to HSV and back changes levels
        return image
    levels = np.arange(256)
    table = np.stack([(levels + steps) % 180, levels, levels], axis=1)[None].astype(np.uint8)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table)
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), np.uint8)


def _to_grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), np.uint8)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianBlur:
    """Blur by a Gaussian of random width.

    Args:
        sigma: Range of the standard deviation, in pixels, uniform.
        probability: Of blurring at all.

    Raises:
        RecipeError: If a number is outside its range.

    Reference:
        Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", 2020, appendix A.

    Deviations:
        The paper's kernel is as wide as a tenth of the picture; ours reaches three standard deviations.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_rules(
            "blur",
            {
                f"sigma {self.sigma}: 0 < low <= high <= 50": 0 < self.sigma[0] <= self.sigma[1] <= 50,
                _probability_rule(self.probability): 0 <= self.probability <= 1,
            },
        )

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Blur the picture, or leave it; the ground truth stays.

        Shape:
            - sample: any (H, W), any channels and dtype
            - returns: the same
        """
        if rng.random() >= self.probability:
            return sample
        return sample._replace(image=blur_image(sample.image, rng.uniform(*self.sigma)))


def blur_image(image: NDArray[Any], sigma: float) -> NDArray[Any]:
    """Convolve each channel with a Gaussian that is cut at three standard deviations; edges are mirrored.

    Args:
        image: The picture.
        sigma: Standard deviation in pixels.

    Returns:
        The blurred picture; whole numbers are rounded.

    Shape:
        - image: (H, W, C) uint8, uint16 or float32
        - returns: the same
    """
    side = 2 * math.ceil(3 * sigma) + 1
    blurred = cv2.GaussianBlur(image, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)
    return blurred.reshape(image.shape)  # OpenCV drops the axis of a single channel


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """Turn picture and ground truth about the centre by a random angle.

    Args:
        degrees: The angle is uniform in [-degrees, degrees].
        probability: Of turning at all.

    Raises:
        RecipeError: If a number is outside its range.

    Reference:
        Simard et al., "Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis", 2003,
        section 2 (affine distortions).
    """

    degrees: float = 10.0
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_rules(
            "rotation",
            {
                f"degrees {self.degrees}: 0 to 180": 0 <= self.degrees <= 180,
                _probability_rule(self.probability): 0 <= self.probability <= 1,
            },
        )

    def __call__(self, sample: Sample, rng: np.random.Generator, *, fill: Fill) -> Sample:
        """Turn the sample, or leave it.

        Args:
            sample: Picture and ground truth of one size.
            rng: Where the numbers come from.
            fill: What the picture gets where it uncovers nothing.

        Returns:
            The turned sample, see `rotate`, or the sample itself.

        Shape:
            - sample: any (H, W), any channels and dtype
            - fill: C values
            - returns: the same
        """
        if rng.random() >= self.probability:
            return sample
        return rotate(sample, rng.uniform(-self.degrees, self.degrees), fill=fill)


def rotate(sample: Sample, degrees: float, *, fill: Fill) -> Sample:
    """Turn a sample about its centre; the size stays.

    The picture is read bilinearly, the ground truth at the nearest pixel. What comes from outside is ``fill`` in the
    picture (mixed with its edge within one pixel) and 255 in the ground truth.

    Args:
        sample: Picture and ground truth of one size.
        degrees: Counter-clockwise.
        fill: One value a channel.

    Returns:
        The turned sample.

    Shape:
        - sample: any (H, W), any channels and dtype
        - fill: C values
        - returns: the same
    """
    height, width, channels = sample.image.shape
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, 1.0)
    image = np.empty_like(sample.image)
    for first in range(0, channels, _MAX_CHANNELS):
        last = first + _MAX_CHANNELS
        turned = cv2.warpAffine(
            np.ascontiguousarray(sample.image[..., first:last]),
            matrix,
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=tuple(map(float, fill[first:last])),
            hint=cv2.ALGO_HINT_ACCURATE,
        )
        image[..., first:last] = turned.reshape(height, width, -1)
    target = cv2.warpAffine(
        sample.target,
        matrix,
        (width, height),
        flags=cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(IGNORE_INDEX,),
    )
    return Sample(image, np.asarray(target, np.uint8))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RandomErasing:
    """Cover a random rectangle.

    Args:
        area: Range of its share of the picture, uniform.
        aspect: Range of height / width; its logarithm is uniform.
        probability: Of covering at all.

    Raises:
        RecipeError: If a number is outside its range.

    Reference:
        Zhong et al., "Random Erasing Data Augmentation", 2017, section 3.2 and algorithm 1.

    Deviations:
        The paper draws again while the rectangle does not fit; here its sides are cut to those of the picture, so that
        a draw always takes the same number of values. Its colour is the mean's, not noise. The paper is about
        classification; here the covered pixels become 255, since nothing in the picture says what was there.
    """

    area: tuple[float, float] = (0.02, 0.2)
    aspect: tuple[float, float] = (0.3, 3.3)
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_rules(
            "erasing",
            {
                f"area {self.area}: 0 < low <= high <= 1": 0 < self.area[0] <= self.area[1] <= 1,
                f"aspect {self.aspect}: 0 < low <= high": 0 < self.aspect[0] <= self.aspect[1],
                _probability_rule(self.probability): 0 <= self.probability <= 1,
            },
        )

    def __call__(self, sample: Sample, rng: np.random.Generator, *, fill: Fill) -> Sample:
        """Cover a rectangle of the sample, or none.

        Args:
            sample: Picture and ground truth of one size; not changed.
            rng: Where the numbers come from.
            fill: Colour of the rectangle.

        Returns:
            A copy with a rectangle of ``fill`` and 255, or the sample itself.

        Shape:
            - sample: any (H, W), any channels and dtype
            - fill: C values
            - returns: the same
        """
        if rng.random() >= self.probability:
            return sample
        size = _size_of(sample)
        area = rng.uniform(*self.area) * size[0] * size[1]
        aspect = math.exp(rng.uniform(math.log(self.aspect[0]), math.log(self.aspect[1])))
        height = min(size[0], max(1, round(math.sqrt(area * aspect))))
        width = min(size[1], max(1, round(math.sqrt(area / aspect))))
        down, across = rng.random(2).tolist()
        box = Window(int(down * (size[0] - height + 1)), int(across * (size[1] - width + 1)), height, width)
        return erase(sample, box, fill=fill)


def erase(sample: Sample, box: Window, *, fill: Fill) -> Sample:
    """Cover a rectangle with one colour, and ignore its labels.

    Args:
        sample: Picture and ground truth of one size; not changed.
        box: The rectangle.
        fill: One value a channel.

    Returns:
        A copy with the rectangle.

    Shape:
        - sample: any (H, W), any channels and dtype
        - fill: C values
        - returns: the same
    """
    image, target = sample.image.copy(), sample.target.copy()
    inside = _slices(box)
    image[inside] = np.asarray(fill, image.dtype)
    target[inside] = IGNORE_INDEX
    return Sample(image, target)


@final
@dataclass(frozen=True, slots=True)
class RandomPartner:
    """Draws the second sample of an effect from a data set.

    Args:
        dataset: Where it is read.
        weights: How often each sample is drawn, relative to the others; None draws all alike. Weights that prefer
            samples with rare classes make `CopyPaste` paste more often.

    Raises:
        ValueError: If there is not one weight a sample, or they are not non-negative with a positive sum.
    """

    dataset: SegmentationDataset
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.weights is None:
            return
        if len(self.weights) != len(self.dataset) or min(self.weights) < 0 or not 0 < sum(self.weights) < math.inf:
            raise ValueError(
                f"{len(self.weights)} weights for {len(self.dataset)} samples; allowed: one a sample, none negative, "
                "a positive sum"
            )

    def __call__(self, rng: np.random.Generator) -> Sample:
        """Read a random sample.

        Raises:
            DataError: If it cannot be read; names the sample.
        """
        index = self.draw_index(rng)
        try:
            return read_for_crop(self.dataset, index)
        except DataError as error:
            raise error.at(self.dataset.name(index)) from error

    def draw_index(self, rng: np.random.Generator) -> int:
        """Draw which sample: one value."""
        value = rng.random()
        if self.weights is None:
            return int(value * len(self.dataset))
        sums = np.cumsum(self.weights)
        return int(np.searchsorted(sums, value * sums[-1], side="right"))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CopyPaste:
    """Paste what a partner shows of some classes over the sample.

    Args:
        classes: Train ids to paste, the rare ones, see `find_class_ids`.
        probability: Of asking for a partner; if it shows none of the classes, nothing is pasted.

    Raises:
        RecipeError: If a number is outside its range.

    Reference:
        Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", 2021,
        section 3.

    Deviations:
        The paper pastes a random subset of instances and softens their outline (and finds that this does not matter);
        here all pixels of the classes are pasted as they are, since a label map knows no instances. The partner is
        resized by the recipe's own range, not by 0.1 to 2.
    """

    classes: tuple[int, ...]
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_rules(
            "copy_paste",
            {
                f"classes {self.classes}: at least one train id, each 0 to 254": bool(self.classes)
                and all(0 <= label < IGNORE_INDEX for label in self.classes),
                _probability_rule(self.probability): 0 <= self.probability <= 1,
            },
        )

    def __call__(self, sample: Sample, rng: np.random.Generator, *, partner: Partner) -> Sample:
        """Paste from a partner, or leave the sample.

        Args:
            sample: Picture and ground truth of one size; not changed.
            rng: Where the numbers come from.
            partner: Gives a sample of the same size.

        Returns:
            A copy with the pasted pixels, or the sample itself.

        Shape:
            - sample: any (H, W), any channels and dtype
            - returns: the same
        """
        if rng.random() >= self.probability:
            return sample
        return paste_classes(sample, partner(rng), classes=self.classes)


def paste_classes(sample: Sample, partner: Sample, *, classes: Sequence[int]) -> Sample:
    """Take over every pixel of some classes from a partner, its label with it.

    Args:
        sample: Picture and ground truth; not changed.
        partner: Another sample of this size.
        classes: Train ids.

    Returns:
        A copy with the pasted pixels, or the sample itself if the partner has none.

    Shape:
        - sample: any (H, W), any channels and dtype
        - partner: as sample
        - returns: the same
    """
    _check_partner(sample, partner)
    wanted = np.zeros(256, bool)
    wanted[list(classes)] = True
    pasted = wanted[partner.target]
    if not pasted.any():
        return sample
    return Sample(
        np.where(pasted[..., None], partner.image, sample.image), np.where(pasted, partner.target, sample.target)
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CutMix:
    """Replace a random rectangle by what a partner has there, labels included.

    Args:
        alpha: The share that stays is drawn from Beta(alpha, alpha); 1 is uniform.
        probability: Of asking for a partner.

    Raises:
        RecipeError: If a number is outside its range.

    Reference:
        Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", 2019,
        section 3.1, equations 1 and 2; for masks: French et al., "Semi-supervised semantic segmentation needs strong,
        varied perturbations", 2020, section 3.3.

    Deviations:
        Yun et al. mix the labels of two pictures by area; a label map is cut along with the picture, exactly.
    """

    alpha: float = 1.0
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_rules(
            "cut_mix",
            {
                f"alpha {self.alpha}: above 0": self.alpha > 0,
                _probability_rule(self.probability): 0 <= self.probability <= 1,
            },
        )

    def __call__(self, sample: Sample, rng: np.random.Generator, *, partner: Partner) -> Sample:
        """Cut a rectangle from a partner, or leave the sample.

        Args:
            sample: Picture and ground truth of one size; not changed.
            rng: Where the numbers come from.
            partner: Gives a sample of the same size.

        Returns:
            A copy with the rectangle, or the sample itself.

        Shape:
            - sample: any (H, W), any channels and dtype
            - returns: the same
        """
        if rng.random() >= self.probability:
            return sample
        box = place_cut(_size_of(sample), kept=rng.beta(self.alpha, self.alpha), centre=tuple(rng.random(2).tolist()))
        return paste_box(sample, partner(rng), box)


def place_cut(size: Size, *, kept: float, centre: tuple[float, ...]) -> Window:
    """Place the rectangle of CutMix: of the picture's shape, cut off where it reaches outside.

    Args:
        size: (height, width) of the picture.
        kept: Share of the picture that stays where the rectangle lies inside whole, in [0, 1].
        centre: (down, across) of the rectangle's centre, each in [0, 1) of the picture.

    Returns:
        The rectangle; a side may be 0.
    """
    share = math.sqrt(1 - kept)
    spans = []
    for side, place in zip(size, centre, strict=True):
        length, middle = int(side * share), int(side * place)
        first = max(0, middle - length // 2)
        spans.append((first, min(side, middle - length // 2 + length) - first))
    (top, height), (left, width) = spans
    return Window(top, left, height, width)


def paste_box(sample: Sample, partner: Sample, box: Window) -> Sample:
    """Take over a rectangle from a partner, picture and labels.

    Args:
        sample: Picture and ground truth; not changed.
        partner: Another sample of this size.
        box: The rectangle.

    Returns:
        A copy with the rectangle.

    Shape:
        - sample: any (H, W), any channels and dtype
        - partner: as sample
        - returns: the same
    """
    _check_partner(sample, partner)
    image, target = sample.image.copy(), sample.target.copy()
    inside = _slices(box)
    image[inside], target[inside] = partner.image[inside], partner.target[inside]
    return Sample(image, target)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MixUp:
    """Lay a partner's picture over the sample's, more weakly; the ground truth stays the sample's own.

    Args:
        alpha: The share of the stronger picture is drawn from Beta(alpha, alpha), folded to at least 0.5.
        probability: Of asking for a partner.

    Raises:
        RecipeError: If a number is outside its range.

    Reference:
        Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2017, section 2.

    Deviations:
        The paper mixes targets as it mixes pictures. A target here is one train id a pixel, so the weaker picture's
        are left out: of the paper's loss its larger term is kept, at full weight. What remains is clutter in the shape
        of real pictures.
    """

    alpha: float = 0.2
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_rules(
            "mix_up",
            {
                f"alpha {self.alpha}: above 0": self.alpha > 0,
                _probability_rule(self.probability): 0 <= self.probability <= 1,
            },
        )

    def __call__(self, sample: Sample, rng: np.random.Generator, *, partner: Partner) -> Sample:
        """Mix with a partner, or leave the sample.

        Args:
            sample: Picture and ground truth of one size; not changed.
            rng: Where the numbers come from.
            partner: Gives a sample of the same size.

        Returns:
            A mixed picture with the sample's ground truth, or the sample itself.

        Shape:
            - sample: any (H, W), any channels and dtype
            - returns: the same
        """
        if rng.random() >= self.probability:
            return sample
        share = rng.beta(self.alpha, self.alpha)
        return mix_pictures(sample, partner(rng), share=max(share, 1 - share))


def mix_pictures(sample: Sample, partner: Sample, *, share: float) -> Sample:
    """Mix two pictures pixel by pixel; the ground truth is the first one's.

    Args:
        sample: Picture and ground truth; not changed.
        partner: Another sample of this size.
        share: Weight of the sample's picture in [0.5, 1]; the partner has the rest.

    Returns:
        The mixed sample; whole numbers are rounded.

    Shape:
        - sample: any (H, W), any channels and dtype
        - partner: as sample
        - returns: the same
    """
    _check_partner(sample, partner)
    mixed = cv2.addWeighted(sample.image, share, partner.image, 1 - share, 0)
    return sample._replace(image=mixed.reshape(sample.image.shape))


def find_class_ids(names: Sequence[str], taxonomy: Taxonomy) -> tuple[int, ...]:
    """Turn class names into train ids, for `CopyPaste`.

    Args:
        names: Names of classes.
        taxonomy: The classes that there are.

    Raises:
        RecipeError: E-RECIPE-067, for a name that is not among them, with the nearest.
    """
    unknown = [name for name in names if name not in taxonomy.classes]
    if unknown:
        raise RecipeError(
            "E-RECIPE-067",
            f"{taxonomy.name} has no class {unknown[0]!r}; {nearest(unknown[0], taxonomy.classes)}",
            fix="name classes of the data set",
            path="augmentation.copy_paste.classes",
        )
    return tuple(taxonomy.classes.index(name) for name in names)


def make_torchvision_transform(name: str, arguments: Mapping[str, Any]) -> Transform:
    """Make a transform of ``torchvision.transforms.v2`` from its name and plain keyword arguments.

    The names are those of a table of classes; nothing is looked up or imported by a name that a recipe brings.

    Args:
        name: One of `list_torchvision_transforms`.
        arguments: What its constructor takes: numbers, true, false, null, and lists of numbers. ``interpolation`` is a
            whole number: 0 nearest, 2 bilinear, 3 bicubic.

    Raises:
        RecipeError: E-RECIPE-064 for another name, E-RECIPE-065 for arguments that it does not take.
    """
    table = _torchvision_table()
    if name not in table:
        raise RecipeError(
            "E-RECIPE-064",
            f"torchvision transform {name!r}; allowed: {', '.join(table)}",
            fix=nearest(name, table, count=1) if nearest(name, table).startswith("did") else "choose one of these",
            path="augmentation.torchvision",
        )
    try:
        unplain = [key for key, value in arguments.items() if not _is_plain(value)]
        if unplain:
            raise TypeError(f"{unplain[0]} is neither a number, true, false, null nor a list of numbers")
        return table[name](**arguments)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            "E-RECIPE-065",
            f"{name} of torchvision: {' '.join(str(error).split())}",
            fix=f"its arguments are those of torchvision.transforms.v2.{name}",
            path="augmentation.torchvision",
        ) from error


def list_torchvision_transforms() -> tuple[str, ...]:
    """Name the transforms of torchvision that a recipe may use.

    They take a uint8 RGB picture with its ground truth and keep its size. Not among them are those that move pixels
    without their labels (AutoAugment, RandAugment, TrivialAugmentWide, AugMix), that make float pictures,
    that mix whole batches, or that torchvision gives up (JPEG).
    """
    return tuple(_torchvision_table())


def _torchvision_table() -> dict[str, Callable[..., Transform]]:
    from torchvision.transforms import v2  # type: ignore[import-untyped]

    return {
        "ColorJitter": v2.ColorJitter,
        "ElasticTransform": v2.ElasticTransform,
        "GaussianBlur": v2.GaussianBlur,
        "GaussianNoise": v2.GaussianNoise,
        "RandomAdjustSharpness": v2.RandomAdjustSharpness,
        "RandomAffine": v2.RandomAffine,
        "RandomAutocontrast": v2.RandomAutocontrast,
        "RandomChannelPermutation": v2.RandomChannelPermutation,
        "RandomEqualize": v2.RandomEqualize,
        "RandomGrayscale": v2.RandomGrayscale,
        "RandomHorizontalFlip": v2.RandomHorizontalFlip,
        "RandomInvert": v2.RandomInvert,
        "RandomPerspective": v2.RandomPerspective,
        "RandomPhotometricDistort": v2.RandomPhotometricDistort,
        "RandomPosterize": v2.RandomPosterize,
        "RandomRotation": v2.RandomRotation,
        "RandomSolarize": v2.RandomSolarize,
        "RandomVerticalFlip": v2.RandomVerticalFlip,
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | float) for item in value)
    return value is None or isinstance(value, int | float)


def _check_rules(effect: str, rules: Mapping[str, bool]) -> None:
    broken = [rule for rule, kept in rules.items() if not kept]
    if broken:
        raise RecipeError(
            "E-RECIPE-063", "; ".join(broken), fix="set the fields to allowed values", path=f"augmentation.{effect}"
        )


def _probability_rule(value: float) -> str:
    return f"probability {value}: 0 to 1"


def _check_partner(sample: Sample, partner: Sample) -> None:
    if sample.image.shape != partner.image.shape or sample.image.dtype != partner.image.dtype:
        raise ValueError(
            f"a partner of {partner.image.shape} {partner.image.dtype} for a sample of {sample.image.shape} "
            f"{sample.image.dtype}; both must be alike"
        )


def _size_of(sample: Sample) -> Size:
    height, width = sample.target.shape
    return height, width


def _slices(box: Window) -> tuple[slice, slice]:
    return slice(box.top, box.top + box.height), slice(box.left, box.left + box.width)
