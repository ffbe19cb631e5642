"""From an image to labels: the one path that predict and evaluate share.

The predictor knows a callable from images to logits, never a model class, so that other forms of a model can stand
behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from nestseg.core.errors import DataError
from nestseg.core.image_io import convert_image, read_image, write_labels
from nestseg.core.resize import resize_image, scaled_size
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Size
from nestseg.ops.upsample_argmax import upsample_argmax, upsample_argmax_confidence, upsample_logits

LogitsFn = Callable[[Tensor], Tensor]
"""(N, 3, H, W) uint8 RGB on the predictor's device -> (N, K, h, w) float logits at any stride."""

ImageSource = str | Path | Image.Image | NDArray[np.uint8]


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
            image: The image that was predicted: a path, a PIL image or a (H, W, 3) uint8 RGB array.
            alpha: Opacity of the colours in [0, 1].

        Shape:
            - returns: (H, W, 3) uint8 RGB

        Raises:
            ValueError: If the image has another size than the labels, or alpha is outside [0, 1].
        """
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
        device: torch.device | str = "cpu",
    ) -> None:
        self.logits_fn = logits_fn
        self.taxonomy = taxonomy
        self.base_size = base_size
        self.logits_resizes = logits_resizes
        self.align_corners = align_corners
        self.device = torch.device(device)

    @torch.inference_mode()
    def predict(self, image: ImageSource, *, confidence: bool = False) -> Prediction:
        """Label one image.

        Args:
            image: A path (its EXIF orientation is applied), a PIL image, or a (H, W, 3) uint8 RGB array.
            confidence: Also return how probable each label is; takes a little longer.

        Shape:
            - image: (H, W, 3) uint8 RGB, for an array
            - returns.labels: (H, W) uint8 train ids in [0, K)
            - returns.confidence: (H, W) float32, or None

        Raises:
            DataError: If the file cannot be read, or the array is not an image.
        """
        pixels = open_image(image)
        size = pixels.shape[0], pixels.shape[1]
        if self.base_size is not None:
            pixels = resize_image(pixels, scaled_size(size, base=self.base_size))
        tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].to(self.device)
        logits = self.logits_fn(tensor)
        if self.logits_resizes == 2:
            logits = upsample_logits(logits, (pixels.shape[0], pixels.shape[1]), align_corners=self.align_corners)
        if not confidence:
            labels = upsample_argmax(logits, size, align_corners=self.align_corners)
            return Prediction(labels=labels[0].cpu().numpy(), taxonomy=self.taxonomy)
        both = upsample_argmax_confidence(logits, size, align_corners=self.align_corners)
        return Prediction(
            labels=both.labels[0].cpu().numpy(),
            taxonomy=self.taxonomy,
            confidence=both.confidence[0].float().cpu().numpy(),
        )


def open_image(image: ImageSource) -> NDArray[np.uint8]:
    """Return an image as pixels, whatever it was given as.

    Shape:
        - returns: (H, W, 3) uint8 RGB

    Raises:
        DataError: If a file cannot be read, or an array is not (H, W, 3) uint8 with at least one pixel.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, Image.Image):
        return convert_image(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise DataError(
            "E-DATA-050",
            f"array of shape {image.shape} and type {image.dtype}; allowed (H, W, 3) uint8 RGB, at least one pixel",
            fix="convert it, for example (255 * x).astype('uint8') for floats in [0, 1]",
        )
    return image
