"""Resizing of pictures and label maps, whole or only inside a window.

A window of a resized picture costs only its own pixels and equals, bit for bit, the same window cut from the
whole resized picture: training crops and tiled prediction may cut first without changing a single grey level.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.types import Size

LONGEST_SIDE = 32766
"""The kernel below addresses pixels by signed 16-bit numbers."""

BAND_PIXELS = 2**15
"""Output pixels to work on at a time, so that buffers stay in the cache (measured: 2**14 to 2**16 are alike)."""


class Window(NamedTuple):
    """A rectangle inside a picture, in pixels of that picture."""

    top: int
    left: int
    height: int
    width: int


def scaled_size(size: Size, *, base: Size, factor: float = 1.0) -> Size:
    """Find the largest size of the same shape that fits into a multiple of a base size.

    Args:
        size: (height, width) of the picture.
        base: (short side, long side) that the picture's own short and long side must not exceed at factor 1.
        factor: What both sides of the base are multiplied by.

    Returns:
        (height, width), each rounded to the nearest pixel (halves up) and at least 1.

    Raises:
        ValueError: If a side or the factor is not positive.

    Deviations:
        mmsegmentation cuts the multiplied base to whole pixels before it divides; here it stays real.

    Example:
        >>> scaled_size((375, 500), base=(512, 2048))
        (512, 683)
        >>> scaled_size((1024, 2048), base=(1024, 2048), factor=0.5)
        (512, 1024)
    """
    if min(*size, *base) < 1 or factor <= 0:
        raise ValueError(f"size {size}, base {base}, factor {factor}; all of them must be positive")
    scale = min(factor * max(base) / max(size), factor * min(base) / min(size))
    height, width = (max(1, int(side * scale + 0.5)) for side in size)
    return height, width


def resize_image(image: NDArray[Any], size: Size, *, window: tuple[int, int, int, int] | None = None) -> NDArray[Any]:
    """Resize a picture bilinearly: half-pixel centres, edges repeated, no antialias.

    Each output value is the bilinear mean of the four source pixels around ((i + 0.5) * H / h - 0.5, ...), rounded
    to the nearest grey level, floats not. Positions are kept in float32, so that about one value in a thousand lands
    one grey level beside the float64 answer (where that is close to a half).

    Args:
        image: The picture.
        size: (height, width) to resize the whole picture to.
        window: (top, left, height, width) inside ``size``; only this part is computed. None means all of it.

    Returns:
        The resized picture or the window of it; always a new array.

    Raises:
        ValueError: If a side is not positive or the window reaches outside ``size``.
        DataError: If the picture or the result is longer than 32766 pixels.

    Shape:
        - image: (H, W, C) uint8, uint16 or float32, any number of channels
        - returns: (window height, window width, C) of the same type, or (*size, C) without a window

    Deviations:
        ``cv2.resize`` rounds its weights to 1/2048 and differs by one grey level at about 13 % of the values of
        a noise picture, ``torch.nn.functional.interpolate`` on uint8 at 20 %.

    Example:
        >>> resize_image(np.array([[[0], [100]]], np.uint8), (1, 4))[0, :, 0].tolist()
        [0, 25, 75, 100]
    """
    top, left, height, width = _checked_window(image.shape[:2], size, window)
    if size == image.shape[:2]:
        return image[top : top + height, left : left + width].copy()
    rows, y = _source_positions(image.shape[0], size[0], start=top, count=height)
    columns, x = _source_positions(image.shape[1], size[1], start=left, count=width)
    return _sample_bilinear(image[rows, columns], x, y)


def resize_labels(
    labels: NDArray[np.uint8], size: Size, *, window: tuple[int, int, int, int] | None = None
) -> NDArray[np.uint8]:
    """Resize a label map to the nearest source pixel by the floor rule: row i reads row ``i * H // h``.

    Args:
        labels: The label map.
        size: (height, width) to resize the whole map to.
        window: (top, left, height, width) inside ``size``; only this part is computed. None means all of it.

    Returns:
        The resized map or the window of it; always a new array.

    Raises:
        ValueError: If a side is not positive or the window reaches outside ``size``.
        DataError: If the map or the result is longer than 32766 pixels.

    Shape:
        - labels: (H, W) uint8
        - returns: (window height, window width) uint8, or ``size`` without a window

    Deviations:
        Integer arithmetic. ``torch.nn.functional.interpolate(mode="nearest")`` follows the same rule in float32
        and reads the pixel before where i * H / h is whole but rounds down.

    Example:
        >>> resize_labels(np.array([[0, 1, 2]], np.uint8), (1, 5)).tolist()
        [[0, 0, 1, 1, 2]]
    """
    top, left, height, width = _checked_window(labels.shape, size, window)
    rows = np.arange(top, top + height) * labels.shape[0] // size[0]
    columns = np.arange(left, left + width) * labels.shape[1] // size[1]
    # Rows are gathered by memory copies, columns pixel by pixel: turning the map makes both the fast kind.
    turned = cv2.transpose(labels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    across: NDArray[np.uint8] = cv2.transpose(turned[columns - columns[0]])
    nearest: NDArray[np.uint8] = across[rows - rows[0]]
    return nearest


def _checked_window(
    source: tuple[int, ...], size: Size, window: tuple[int, int, int, int] | None
) -> tuple[int, int, int, int]:
    if min(size) < 1 or min(source) < 1:
        raise ValueError(f"cannot resize {source} to {size}; every side must be at least 1")
    if max(*source, *size) > LONGEST_SIDE:
        raise DataError(
            "E-DATA-060",
            f"resizing {source} to {size}; allowed up to {LONGEST_SIDE} pixels a side",
            fix="cut the picture into tiles or choose a smaller base size",
        )
    top, left, height, width = (0, 0, *size) if window is None else window
    inside = min(top, left) >= 0 and top + height <= size[0] and left + width <= size[1]
    if not inside or min(height, width) < 1:
        raise ValueError(f"window {window} (top, left, height, width) is not inside the resized picture {size}")
    return top, left, height, width


def _source_positions(source: int, size: int, *, start: int, count: int) -> tuple[slice, NDArray[np.float32]]:
    """Find where output pixels start .. start+count-1 of one axis lie on the source.

    Returns:
        The part of the source that they read, and their positions relative to its first pixel.
    """
    centres = (np.arange(start, start + count) + 0.5) * (source / size) - 0.5
    positions = np.clip(centres, 0, source - 1).astype(np.float32)
    # Rounded to float32 above, on the whole picture's axis; taking a whole number off a float that is larger is
    # exact. So a pixel's weights do not depend on the window that it is computed in.
    first = int(positions[0])
    return slice(first, int(positions[-1]) + 2), positions - np.float32(first)


def _sample_bilinear(image: NDArray[Any], x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[Any]:
    """Read a picture at the crossings of real columns x and rows y.

    OpenCV 5 interpolates in float32 for 1, 3 and 4 channels (two channels, and every count in OpenCV 4, go through
    a table of 1/32 pixel, up to 6 grey levels off), and four channels take a third of the time of three.
    """
    channels = image.shape[2]
    if channels == 3:
        fours = [cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)]
    else:
        filled = np.zeros((*image.shape[:2], -(-channels // 4) * 4), image.dtype)
        filled[..., :channels] = image
        fours = [np.ascontiguousarray(filled[..., i : i + 4]) for i in range(0, filled.shape[2], 4)]
    resized = np.empty((len(y), len(x), channels), image.dtype)
    # In bands with kept buffers: maps and result of a whole crop are megabytes of fresh memory, and having the
    # system provide it took three times as long as the interpolation.
    step = min(len(y), max(1, BAND_PIXELS // len(x)))
    across = np.ascontiguousarray(np.broadcast_to(x, (step, len(x))))
    down = np.empty_like(across)
    buffer = np.empty((step, len(x), 4), image.dtype)
    for first in range(0, len(y), step):
        band = resized[first : first + step]
        count = len(band)
        down[:count] = y[first : first + count, None]
        for i, four in enumerate(fours):
            read = cv2.remap(
                four,
                across[:count],
                down[:count],
                cv2.INTER_LINEAR,
                dst=buffer[:count],
                borderMode=cv2.BORDER_REPLICATE,
                hint=cv2.ALGO_HINT_ACCURATE,
            )
            if channels == 3:
                cv2.cvtColor(read, cv2.COLOR_RGBA2RGB, dst=band)
            else:
                band[..., 4 * i : 4 * i + 4] = read[..., : channels - 4 * i]
    return resized
