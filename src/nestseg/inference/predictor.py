"""From an image to labels: the one path that predict and evaluate share.

The predictor knows a callable from images to logits, never a model class, so that other forms of a model can stand
behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nestseg.core.errors import DataError
from nestseg.core.image_io import convert_image, preview_image, read_image, write_labels
from nestseg.core.resize import resize_image, scaled_size
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import ImageDtype, Size
from nestseg.ops.upsample_argmax import upsample_argmax, upsample_argmax_confidence, upsample_logits

LogitsFn = Callable[[Tensor], Tensor]
"""(N, C, H, W) of the predictor's image type on its device -> (N, K, h, w) float logits at any stride."""

ImageSource = str | Path | Image.Image | NDArray[Any]


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
    """Predicts one image at a time: resize (keep ratio), logits, upsample to the image's own size, argmax.

    The logits are upsampled once, bilinearly, straight to the original size. Numbers of mmsegmentation were made with
    two steps, through the size that the network saw; ``logits_resizes=2`` repeats that. The two differ only where an
    image was resized.

    Args:
        logits_fn: From a uint8 image to logits.
        taxonomy: The classes of the logits.
        base_size: (short, long) side that an image is resized to before the network; None leaves it as it is.
        logits_resizes: How often the logits are upsampled, 1 or 2.
        align_corners: Grid rule by which the logits are upsampled, that of the model's training.
        in_channels: Channels of an image.
        image_dtype: Type of its values.
        device: Where ``logits_fn`` expects its input.

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
    ) -> None:
        self.logits_fn = logits_fn
        self.taxonomy = taxonomy
        self.base_size = base_size
        self.logits_resizes = logits_resizes
        self.align_corners = align_corners
        self.in_channels = in_channels
        self.image_dtype = image_dtype
        self.device = torch.device(device)

    @torch.inference_mode()
    def predict(self, image: ImageSource, *, confidence: bool = False) -> Prediction:
        """Label one image.

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
        return self.label(self.compute_logits(pixels), (pixels.shape[0], pixels.shape[1]), confidence=confidence)

    @torch.inference_mode()
    def compute_logits(self, image: ImageSource) -> Tensor:
        """Return the logits of one image, before they are upsampled to its own size.

        Shape:
            - image: as for `predict`
            - returns: (1, K, h, w) float, on the predictor's device

        Raises:
            DataError: As `predict`.
        """
        pixels = self.open_image(image)
        if self.base_size is not None:
            pixels = resize_image(pixels, scaled_size((pixels.shape[0], pixels.shape[1]), base=self.base_size))
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].to(self.device)
        logits = self.logits_fn(tensor)
        if self.logits_resizes == 2:
            logits = upsample_logits(logits, (pixels.shape[0], pixels.shape[1]), align_corners=self.align_corners)
        return logits

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
    if pixels.ndim != 3 or pixels.shape[2] != channels or pixels.dtype != np.dtype(dtype) or 0 in pixels.shape:
        kind = " RGB" if (channels, dtype) == (3, "uint8") else ""
        raise DataError(
            "E-DATA-050",
            f"array of shape {image.shape} and type {image.dtype}; allowed (H, W, {channels}) {dtype}{kind}, at least "
            "one pixel",
            fix="convert it to the range that the network was trained on, for example (255 * x).astype('uint8') for "
            "floats in [0, 1]"
            if dtype == "uint8"
            else f"convert it to {dtype}, in the range that the network was trained on",
        )
    return pixels
