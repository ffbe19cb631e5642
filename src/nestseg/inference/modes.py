"""How an image is given to the network: whole, in windows, at several scales, or any nesting of these.

Words, records and the arithmetic of windows; nothing here runs a network or imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from nestseg.core.types import Size

Blend = Literal["flat", "linear", "hann"]
"""Weights of the pixels of a window, see `axis_weights`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """The whole image at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slide:
    """Windows over the image, averaged where they overlap.

    Windows start every ``stride`` pixels; the last one of an axis is shifted so that it ends with the image. An image
    that fits into one window is left to ``inner`` as it is, along an axis that is shorter the window shrinks to it.

    Args:
        window: (height, width), in pixels of the image that the network would see whole.
        stride: (height, width) from window to window, at most the window; None takes two thirds of the window,
            rounded up.
        blend: How windows are weighted where they overlap: ``flat`` all alike, ``linear`` and ``hann`` by how far a
            pixel is from the border of its window.
        inner: What is done with each window, as if it were an image.

    Raises:
        ValueError: If a side is not positive, the stride leaves gaps, or there is no such blend.
    """

    window: Size
    stride: Size | None = None
    blend: Blend = "flat"
    inner: Mode = Whole()

    def __post_init__(self) -> None:
        if min(self.window) < 1:
            raise ValueError(f"window {self.window} (height, width): both must be positive")
        if any(not 1 <= step <= side for step, side in zip(self.step, self.window, strict=True)):
            raise ValueError(f"stride {self.stride}: allowed 1 to the window {self.window}, else pixels are left out")
        if self.blend not in ("flat", "linear", "hann"):
            raise ValueError(f"blend {self.blend!r}; allowed: flat, linear, hann")

    @property
    def step(self) -> Size:
        """(height, width) from window to window."""
        return self.stride or (math.ceil(2 * self.window[0] / 3), math.ceil(2 * self.window[1] / 3))


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiScale:
    """The mean over several scales of the image and, if asked for, its mirror image at each of them.

    Args:
        scales: Multiples of the size that the network would see; every one is resized from the original pixels.
        flip: Also mirror the image left to right, and the result back.
        average: Of which the mean is taken: ``probability``, the softmax, or ``logit``.
        inner: What is done at each scale.

    Raises:
        ValueError: If there is no scale, one is not positive, or there is no such average.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    average: Literal["probability", "logit"] = "probability"
    inner: Mode = Whole()

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ValueError(f"scales {self.scales}: at least one, all of them positive")
        if self.average not in ("probability", "logit"):
            raise ValueError(f"average {self.average!r}; allowed: probability, logit")


Mode = Whole | Slide | MultiScale


def describe_mode(mode: Mode) -> str:
    """Say in words how an image is given to the network.

    Example:
        >>> describe_mode(Whole())
        'single scale, whole image'
        >>> describe_mode(MultiScale(scales=(0.5, 1.0), flip=True, inner=Slide(window=(512, 512), blend="hann")))
        'mean probability of scales 0.5, 1 with flip, windows 512x512 every 342x342 with hann blending'
    """
    words = _describe(mode, what="image")
    return words if _has_scales(mode) else f"single scale, {words}"


def _has_scales(mode: Mode) -> bool:
    return isinstance(mode, MultiScale) or (isinstance(mode, Slide) and _has_scales(mode.inner))


def _describe(mode: Mode, *, what: str) -> str:
    match mode:
        case Whole():
            return f"whole {what}"
        case Slide():
            (height, width), (down, across) = mode.window, mode.step
            words = f"windows {height}x{width} every {down}x{across} with {mode.blend} blending"
            return words if mode.inner == Whole() else f"{words}, in each {_describe(mode.inner, what='window')}"
        case MultiScale():
            scales = ", ".join(f"{scale:g}" for scale in mode.scales)
            views = f"{'scale' if len(mode.scales) == 1 else 'scales'} {scales}{' with flip' if mode.flip else ''}"
            return f"mean {mode.average} of {views}, {_describe(mode.inner, what=what)}"
        case _:
            assert_never(mode)


def mode_record(mode: Mode) -> dict[str, Any]:
    """Write a mode as strict JSON, every number of it resolved.

    Example:
        >>> mode_record(Slide(window=(512, 512)))["stride"]
        [342, 342]
    """
    match mode:
        case Whole():
            return {"mode": "whole"}
        case Slide():
            return {
                "mode": "slide",
                "window": list(mode.window),
                "stride": list(mode.step),
                "blend": mode.blend,
                "inner": mode_record(mode.inner),
            }
        case MultiScale():
            return {
                "mode": "multi_scale",
                "scales": list(mode.scales),
                "flip": mode.flip,
                "average": mode.average,
                "inner": mode_record(mode.inner),
            }
        case _:
            assert_never(mode)


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """List where the windows of one axis start: every ``stride`` pixels, the last one so that it ends with the axis.

    Args:
        size: Length of the axis.
        window: Length of a window, at most ``size``.
        stride: From start to start, at most ``window``.

    Returns:
        Rising starts; the windows cover every pixel.

    Example:
        >>> window_starts(10, 4, 3)
        [0, 3, 6]
        >>> window_starts(11, 4, 3)
        [0, 3, 6, 7]
    """
    return [*range(0, size - window, stride), size - window]


def axis_weights(starts: list[int], window: int, blend: Blend) -> NDArray[np.float64]:
    """Weigh the pixels of the windows of one axis so that the weights of all windows at a pixel add up to 1.

    Pixel i of a window of n has the raw weight 1 (``flat``), 1 - |2 (i + 0.5) / n - 1| (``linear``), or
    sin^2(pi (i + 0.5) / n) (``hann``), which are never 0; it is divided by the sum over the windows that hold the
    pixel. Weights of an area are products of those of its axes, sums included, since windows lie on a grid. Where one
    window is alone, its weight is exactly 1.

    Args:
        starts: Of the windows, as of `window_starts`.
        window: Length of a window.
        blend: Which weights.

    Shape:
        - returns: (len(starts), window) float64 in (0, 1]

    Reference:
        Pielawski and Wählby, "Introducing Hann windows for reducing edge-effects in patch-based image segmentation",
        PLOS ONE 15(3), 2020.

    Deviations:
        The paper has windows at the borders and corners of the image with weights of their own, for a stride of half
        a window; here the sum is divided out, for any stride.

    Example:
        >>> axis_weights([0, 2], 4, "linear").round(2).tolist()
        [[1.0, 1.0, 0.75, 0.25], [0.25, 0.75, 1.0, 1.0]]
    """
    centres = (np.arange(window) + 0.5) / window
    match blend:
        case "flat":
            raw = np.ones(window)
        case "linear":
            raw = 1 - np.abs(2 * centres - 1)
        case "hann":
            raw = np.sin(np.pi * centres) ** 2
        case _:
            assert_never(blend)
    sums = np.zeros(starts[-1] + window)
    for start in starts:
        sums[start : start + window] += raw
    return np.stack([raw / sums[start : start + window] for start in starts])
