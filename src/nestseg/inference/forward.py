"""From pixels to logits by a mode: whole, in windows, at several scales, in any nesting."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestseg.core.resize import Window, resize_image, scaled_size
from nestseg.core.types import Size
from nestseg.inference.modes import Mode, MultiScale, Slide, axis_weights, window_starts
from nestseg.ops.upsample_argmax import upsample_logits

LogitsFn = Callable[[Tensor], Tensor]
"""(N, C, H, W) of the predictor's image type on its device -> (N, K, h, w) float logits at any stride."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A callable, and how it is fed and its logits are upsampled; fields as of `Predictor`."""

    logits_fn: LogitsFn
    logits_resizes: Literal[1, 2]
    align_corners: bool
    batch_size: int
    device: torch.device

    def upsample(self, logits: Tensor, size: Size) -> Tensor:
        """Upsample by the rule of the network's training, see `upsample_logits`.

        Shape:
            - logits: (N, K, h, w) float
            - returns: (N, K, *size) float32 or float64
        """
        return upsample_logits(logits, size, align_corners=self.align_corners)


class LogitStrip(NamedTuple):
    """Finished rows of an image.

    Shape:
        - logits: (1, K, rows, W) float, rows ``top`` to ``top + rows`` of the image
    """

    top: int
    logits: Tensor


def compute_mode_logits(
    network: Network, mode: Mode, pixels: NDArray[Any], *, base: Size, factor: float = 1.0
) -> Tensor:
    """Compute the logits of images of one size.

    The network sees them at `scaled_size` of their own size, resized from ``pixels`` whatever the mode.

    Args:
        network: What computes logits.
        mode: How the images are given to it.
        pixels: The images.
        base: (short, long) side that they are resized to at factor 1, with their ratio kept.
        factor: Multiple of ``base``.

    Returns:
        For `Whole` at the network's stride, for `MultiScale` at the images' own size, for `Slide` at the size that
        the network would see whole, or, for images that fit into one window, what ``inner`` returns.

    Shape:
        - pixels: (N, H, W, C) uint8, uint16 or float32
        - returns: (N, K, h, w) float

    Deviations:
        Of the mirror image, the pixels are mirrored and then resized; other toolboxes resize first. The grid is
        symmetric, so that no more than about one value in a thousand differs, by one grey level.
    """
    own = (pixels.shape[1], pixels.shape[2])
    size = scaled_size(own, base=base, factor=factor)
    if isinstance(mode, MultiScale):
        return _mean_over_scales(network, mode, pixels, base=base, factor=factor)
    if isinstance(mode, Slide):
        if size[0] <= mode.window[0] and size[1] <= mode.window[1]:
            return compute_mode_logits(network, mode.inner, pixels, base=base, factor=factor)
        return torch.cat([_slide_over_pixels(network, mode, image, size) for image in pixels])
    if size != own:
        pixels = np.stack([resize_image(image, size) for image in pixels])
    # Always a copy: ascontiguousarray keeps the negative stride of a mirrored image one pixel wide, torch refuses it.
    batch = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    logits = network.logits_fn(batch.to(network.device))
    return network.upsample(logits, size) if network.logits_resizes == 2 else logits


def _mean_over_scales(network: Network, mode: MultiScale, pixels: NDArray[Any], *, base: Size, factor: float) -> Tensor:
    own = (pixels.shape[1], pixels.shape[2])
    total: Tensor | None = None
    for scale in mode.scales:
        for mirrored in (False, True) if mode.flip else (False,):
            seen = pixels[:, :, ::-1] if mirrored else pixels
            logits = compute_mode_logits(network, mode.inner, seen, base=base, factor=factor * scale)
            logits = network.upsample(logits, own)
            if mirrored:
                logits = logits.flip(3)
            if mode.average == "logit":
                total = logits if total is None else total + logits
            else:
                # Probabilities are added as logarithms: one that rounds to 0 would be an infinite loss.
                logits = logits.log_softmax(1)
                total = logits if total is None else torch.logaddexp(total, logits)
    assert total is not None, "a MultiScale has at least one scale"
    num_views = len(mode.scales) * (2 if mode.flip else 1)
    return total / num_views if mode.average == "logit" else total - math.log(num_views)


def _slide_over_pixels(network: Network, mode: Slide, pixels: NDArray[Any], size: Size) -> Tensor:
    """Gather the strips of one image (H, W, C), resized to ``size``, as (1, K, *size)."""

    def read(window: Window) -> NDArray[Any]:
        if size != pixels.shape[:2]:
            return resize_image(pixels, size, window=window)
        return pixels[window.top : window.top + window.height, window.left : window.left + window.width]

    logits: Tensor | None = None
    for top, strip in slide_logits(network, mode, read, size=size):
        if logits is None:
            shape = (1, strip.shape[1], *size)
            logits = torch.empty(shape, dtype=strip.dtype, device=strip.device, memory_format=torch.channels_last)
        logits[:, :, top : top + strip.shape[2]] = strip
    assert logits is not None, "an image has at least one window"
    return logits


def slide_logits(
    network: Network, mode: Slide, read: Callable[[Window], NDArray[Any]], *, size: Size
) -> Iterator[LogitStrip]:
    """Compute the logits of an image window by window, and give its rows as soon as no later window touches them.

    Memory is that of one band: window height x W x K x 4 bytes, beside the windows of one forward pass.

    Args:
        network: What computes logits.
        mode: Windows, weights, and what is done in each window.
        read: Returns the pixels of a window.
        size: (height, width) of the image.

    Yields:
        Strips from top to bottom, which together are the image. The logits of a strip are overwritten when the next
        one is asked for.

    Shape:
        - read: returns (window height, window width, C) uint8, uint16 or float32
        - yields: (1, K, rows, W) float32, or float64 of a float64 network

    Deviations:
        Windows lie as in mmsegmentation. It adds up raw logits and divides by how many windows there were; here each
        window is weighted before, with weights that add up to 1, so that the sums need no second map.
    """
    window = height, width = min(size[0], mode.window[0]), min(size[1], mode.window[1])
    tops, lefts = window_starts(size[0], height, mode.step[0]), window_starts(size[1], width, mode.step[1])
    down, across = (
        torch.from_numpy(axis_weights(starts, side, mode.blend)) for starts, side in ((tops, height), (lefts, width))
    )
    band: Tensor | None = None
    for row, (top, end) in enumerate(zip(tops, [*tops[1:], size[0]], strict=True)):
        for first in range(0, len(lefts), network.batch_size):
            some = lefts[first : first + network.batch_size]
            pixels = np.stack([read(Window(top, left, height, width)) for left in some])
            logits = compute_mode_logits(network, mode.inner, pixels, base=(min(window), max(window)))
            logits = network.upsample(logits, window)
            if band is None:
                shape = (1, logits.shape[1], height, size[1])
                band = torch.empty(
                    shape, dtype=logits.dtype, device=logits.device, memory_format=torch.channels_last
                ).zero_()
                down, across = (weights.to(band.dtype).to(band.device) for weights in (down, across))
            for column, left in enumerate(some, start=first):
                weights = down[row, :, None] * across[column]
                band[..., left : left + width].addcmul_(logits[column - first : column - first + 1], weights)
        assert band is not None, "a row has at least one window"
        done = end - top
        yield LogitStrip(top, band[:, :, :done])
        # The rows that the next windows add to move up, in parts that do not overlap where they go.
        for start in range(0, height - done, done):
            part = band[:, :, start + done : start + 2 * done]
            band[:, :, start : start + part.shape[2]] = part
        band[:, :, height - done :] = 0
