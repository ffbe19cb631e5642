"""From an image to labels: the one path that predict and evaluate share.

The predictor knows a callable from images to logits, never a model class, so that other forms of a model can stand
behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nestseg.core.errors import DataError
from nestseg.core.image_io import convert_image, preview_image, read_image, write_labels
from nestseg.core.resize import Window, scaled_size
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import ImageDtype, Size
from nestseg.inference.forward import LogitsFn, Network, compute_mode_logits, slide_logits
from nestseg.inference.modes import Mode, Slide, Whole, describe_mode
from nestseg.ops.upsample_argmax import upsample_argmax, upsample_argmax_confidence

if TYPE_CHECKING:
    from nestseg.core.large_image import ImageWindows

ImageSource = str | Path | Image.Image | NDArray[Any]

LABEL_PIXELS = 2**18
"""Pixels of a strip at the most, unless a row is longer: bounds what upsampling and argmax need beside the logits."""


class Strip(NamedTuple):
    """Rows ``top`` to ``top + rows`` of the labels of an image.

    Shape:
        - labels: (rows, W) uint8 train ids in [0, K)
        - confidence: (rows, W) float32, see `Prediction`; or None
    """

    top: int
    labels: NDArray[np.uint8]
    confidence: NDArray[np.float32] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The labels of one image and what they mean.

    Args:
        labels: (H, W) uint8 train ids in [0, K), at the image's own size.
        taxonomy: Class names and colours.
        confidence: (H, W) float32 softmax probability of each label in [1/K, 1]; None where it was not asked for.
    """

    labels: NDArray[np.uint8]
    taxonomy: Taxonomy
    confidence: NDArray[np.float32] | None = None

    def coloured(self) -> NDArray[np.uint8]:
        """Paint each pixel in its class's colour.

        Shape:
            - returns: (H, W, 3) uint8 RGB
        """
        return self.taxonomy.colour_table()[self.labels]

    def overlay(self, image: ImageSource, alpha: float = 0.5) -> NDArray[np.uint8]:
        """Lay the class colours over the image.

        Args:
            image: The image that was predicted: a path or a PIL image, which are read as RGB, or an array, of which
                `preview_image` is shown.
            alpha: Opacity of the colours in [0, 1].

        Shape:
            - returns: (H, W, 3) uint8 RGB

        Raises:
            ValueError: If the image has another size than the labels, or alpha is outside [0, 1].
        """
        if isinstance(image, np.ndarray):
            pixels = preview_image(image if image.ndim == 3 else image[:, :, None])
        else:
            pixels = open_image(image)
        if pixels.shape[:2] != self.labels.shape:
            raise ValueError(f"image is {pixels.shape[:2]}, labels are {self.labels.shape}: pass the predicted image")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha is {alpha}; allowed 0 to 1")
        mixed = (1 - alpha) * pixels.astype(np.float32) + alpha * self.coloured()
        return np.rint(mixed).astype(np.uint8)

    def to_png(self, path: str | Path) -> None:
        """Write the train ids as a PNG with the palette of the classes."""
        write_labels(Path(path), self.labels, palette=self.taxonomy.colour_table())

    def class_areas(self) -> dict[str, float]:
        """Share of the image that each class covers, by name, in [0, 1]; they add up to 1."""
        counts = np.bincount(self.labels.ravel(), minlength=self.taxonomy.num_classes)
        return {
            name: float(count / self.labels.size) for name, count in zip(self.taxonomy.classes, counts, strict=True)
        }


class Predictor:
    """Predicts one image at a time, by default in the published order of operations.

    The order, which is the protocol of the published numbers, and what each mode puts into it:

    1. The image is resized to ``base_size``, its ratio kept; labels never are.
    2. `Whole`: the network sees all of it, and returns logits at its own stride.
       `Slide`: it sees windows of the resized image. The logits of each are upsampled to the window and averaged, as
       logits, with the weights of the blend.
       `MultiScale`: every scale is resized anew from the original, not from step 1; the mirror image is computed
       beside it and mirrored back. The logits of each are upsampled to the image's own size, and only there softmax
       is taken and the probabilities are averaged (or the logits, if so chosen).
    3. The logits are upsampled, bilinearly, straight to the image's own size. With ``logits_resizes=2`` they go
       through the size that the network saw (the resized image, a window of it, a scale of it), by which the numbers
       of mmsegmentation were made; the two differ only where an image was resized.
    4. Argmax; equal scores go to the lowest train id. Confidence is the softmax of step 3.

    Modes nest: ``MultiScale(inner=Slide(...))`` slides at every scale, ``Slide(inner=MultiScale(...))`` treats each
    window as an image of its own. An image that fits into one window is what ``inner`` makes of it.

    Args:
        logits_fn: From images to logits.
        taxonomy: The classes of the logits.
        base_size: (short, long) side that an image is resized to before the network; None leaves it as it is.
        logits_resizes: How often the logits are upsampled, 1 or 2.
        align_corners: Grid rule by which the logits are upsampled, that of the model's training.
        in_channels: Channels of an image.
        image_dtype: Type of its values.
        device: Where ``logits_fn`` expects its input.
        mode: How an image is given to the network.
        batch_size: Windows of one forward pass; only windows beside each other share one.

    Raises:
        ValueError: If the batch size is not positive.

    Deviations:
        mmsegmentation and sssegmentation slide as here with ``blend="flat"``; there, logits go through the size of
        the resized image even where one window holds all of it, here they then go straight to the image's own.
        mmsegmentation averages probabilities over scales as here. sssegmentation resizes each scale from the resized
        image. PyTorch-Encoding resizes from the original, pads it to whole windows with the mean colour, and adds up
        exponentials of logits, not divided by their sum. Some toolboxes take argmax at the size that the network saw
        and resize the labels, which moves outlines by up to a pixel of that size.

    Example:
        >>> import torch
        >>> taxonomy = Taxonomy(name="two", classes=("dark", "bright"), palette=((0, 0, 0), (255, 255, 255)))
        >>> threshold = lambda image: torch.stack([127.5 - image[:, 0].float(), image[:, 0].float() - 127.5], 1)
        >>> image = np.array([[[0] * 3, [255] * 3]], np.uint8)
        >>> Predictor(threshold, taxonomy).predict(image).labels
        array([[0, 1]], dtype=uint8)
    """

    def __init__(
        self,
        logits_fn: LogitsFn,
        taxonomy: Taxonomy,
        *,
        base_size: Size | None = None,
        logits_resizes: Literal[1, 2] = 1,
        align_corners: bool = False,
        in_channels: int = 3,
        image_dtype: ImageDtype = "uint8",
        device: torch.device | str = "cpu",
        mode: Mode = Whole(),  # noqa: B008  # a frozen value
        batch_size: int = 1,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; at least one window is needed")
        self.logits_fn = logits_fn
        self.taxonomy = taxonomy
        self.base_size = base_size
        self.logits_resizes = logits_resizes
        self.align_corners = align_corners
        self.in_channels = in_channels
        self.image_dtype = image_dtype
        self.device = torch.device(device)
        self.mode = mode
        self.batch_size = batch_size

    @torch.inference_mode()
    def predict(self, image: ImageSource, *, confidence: bool = False) -> Prediction:
        """Label one image.

        Where windows slide over an image that is not resized, logits exist for a band of it only, see
        `predict_strips`; in any other mode for all of it.

        Args:
            image: See `open_image`.
            confidence: Also return how probable each label is; takes a little longer.

        Shape:
            - image: (H, W, in_channels) of ``image_dtype``, for an array; (H, W) too where there is one channel
            - returns.labels: (H, W) uint8 train ids in [0, K)
            - returns.confidence: (H, W) float32, or None

        Raises:
            DataError: If the file cannot be read, or the array is not an image.
        """
        pixels = self.open_image(image)
        size = (pixels.shape[0], pixels.shape[1])
        if not isinstance(self.mode, Slide) or self._network_size(size) != size:
            return self.label(self.compute_logits(pixels), size, confidence=confidence)

        def read(window: Window) -> NDArray[Any]:
            return pixels[window.top : window.top + window.height, window.left : window.left + window.width]

        strips = list(self._label_strips(self.mode, read, size=size, confidence=confidence))
        return Prediction(
            labels=np.concatenate([strip.labels for strip in strips]),
            taxonomy=self.taxonomy,
            confidence=np.concatenate([strip.confidence for strip in strips if strip.confidence is not None])
            if confidence
            else None,
        )

    def predict_strips(self, source: ImageWindows, *, confidence: bool = False) -> Iterator[Strip]:
        """Label an image that need not fit into memory, from top to bottom.

        The strips together are the labels that `predict` gives, to the bit. Memory beside the network's own: window
        height x W x K x 4 bytes (0.8 GB for windows of 512, 19 classes and a width of 20,000), the windows of one
        forward pass, and three times the logits of a strip, which has at most 2^18 pixels or one row.

        Args:
            source: The image, read a window at a time.
            confidence: Also return how probable each label is.

        Returns:
            Strips of different heights, which follow each other without a gap.

        Raises:
            ValueError: If the mode is not a `Slide` (of whatever inside), or the image would be resized.
            DataError: If the image has other channels or another type than the network takes; while strips are
                made, if the source cannot be read.
        """
        if not isinstance(self.mode, Slide):
            words = describe_mode(self.mode)
            raise ValueError(f"strips need a Slide outermost; this mode is: {words}")  # noqa: TRY004  # no argument
        if self._network_size(source.size) != source.size:
            raise ValueError(
                f"strips need base_size=None; {self.base_size} resizes this image from {source.size} to "
                f"{self._network_size(source.size)}"
            )
        _check_pixels((*source.size, source.channels), source.dtype, channels=self.in_channels, dtype=self.image_dtype)
        return self._label_strips(self.mode, source.read, size=source.size, confidence=confidence)

    @torch.inference_mode()
    def compute_logits(self, image: ImageSource) -> Tensor:
        """Return the logits of one image, before they are upsampled to its own size.

        Their size is of the mode's making, see `compute_mode_logits`. Where the mode averages probabilities, they are
        the logarithms of the mean, so that softmax gives the mean back.

        Shape:
            - image: as for `predict`
            - returns: (1, K, h, w) float, on the predictor's device

        Raises:
            DataError: As `predict`.
        """
        pixels = self.open_image(image)
        base = self._base_of((pixels.shape[0], pixels.shape[1]))
        return compute_mode_logits(self._network, self.mode, pixels[None], base=base)

    @torch.inference_mode()
    def label(self, logits: Tensor, size: Size, *, confidence: bool = False) -> Prediction:
        """Turn what `compute_logits` returned into labels.

        Args:
            logits: Of one image.
            size: The image's own.
            confidence: See `predict`.

        Shape:
            - logits: (1, K, h, w) float
        """
        if not confidence:
            labels = upsample_argmax(logits, size, align_corners=self.align_corners)
            return Prediction(labels=labels[0].cpu().numpy(), taxonomy=self.taxonomy)
        both = upsample_argmax_confidence(logits, size, align_corners=self.align_corners)
        return Prediction(
            labels=both.labels[0].cpu().numpy(),
            taxonomy=self.taxonomy,
            confidence=both.confidence[0].float().cpu().numpy(),
        )

    def open_image(self, image: ImageSource) -> NDArray[Any]:
        """Return an image as the pixels that this predictor's network takes, see `open_image`."""
        return open_image(image, channels=self.in_channels, dtype=self.image_dtype)

    @property
    def _network(self) -> Network:
        return Network(
            logits_fn=self.logits_fn,
            logits_resizes=self.logits_resizes,
            align_corners=self.align_corners,
            batch_size=self.batch_size,
            device=self.device,
        )

    def _base_of(self, size: Size) -> Size:
        return self.base_size or (min(size), max(size))

    def _network_size(self, size: Size) -> Size:
        return scaled_size(size, base=self._base_of(size))

    @torch.inference_mode()
    def _label_strips(
        self, mode: Slide, read: Callable[[Window], NDArray[Any]], *, size: Size, confidence: bool
    ) -> Iterator[Strip]:
        step = max(1, LABEL_PIXELS // size[1])
        for top, logits in slide_logits(self._network, mode, read, size=size):
            for start in range(0, logits.shape[2], step):
                rows = logits[:, :, start : start + step]
                part = self.label(rows, (rows.shape[2], size[1]), confidence=confidence)
                yield Strip(top + start, part.labels, part.confidence)


def open_image(image: ImageSource, *, channels: int = 3, dtype: ImageDtype = "uint8") -> NDArray[Any]:
    """Return an image as pixels, whatever it was given as.

    Args:
        image: A path (its EXIF orientation is applied), a PIL image, or an array, which is taken as it is.
        channels: See `read_image`.
        dtype: See `read_image`.

    Shape:
        - image: (H, W, channels) of ``dtype``, for an array; (H, W) too where there is one channel
        - returns: (H, W, channels) of ``dtype``; uint8 RGB by default

    Raises:
        DataError: If a file cannot be read, or an array is of another kind or without a pixel.
    """
    if isinstance(image, str | Path):
        return read_image(image, channels=channels, dtype=dtype)
    if isinstance(image, Image.Image):
        return convert_image(image, channels=channels, dtype=dtype)
    pixels = image[:, :, None] if channels == 1 and image.ndim == 2 else image
    _check_pixels(pixels.shape, pixels.dtype, channels=channels, dtype=dtype)
    return pixels


def _check_pixels(shape: tuple[int, ...], given: np.dtype[Any], *, channels: int, dtype: ImageDtype) -> None:
    if len(shape) != 3 or shape[2] != channels or given != np.dtype(dtype) or 0 in shape:
        kind = " RGB" if (channels, dtype) == (3, "uint8") else ""
        raise DataError(
            "E-DATA-050",
            f"array of shape {shape} and type {given}; allowed (H, W, {channels}) {dtype}{kind}, at least one pixel",
            fix="convert it to the range that the network was trained on, for example (255 * x).astype('uint8') for "
            "floats in [0, 1]"
            if dtype == "uint8"
            else f"convert it to {dtype}, in the range that the network was trained on",
        )
