"""Pictures that are read in windows, so that one larger than memory can be labelled.

TIFF, npy and zarr are read piece by piece: a tile, a strip, some rows or a chunk at a time. PNG, JPEG, WebP and BMP
can only be decoded whole, which a cap on pixels keeps bounded. What a window holds is what `read_image` would give of
the same picture, or it is refused.
"""

from __future__ import annotations

import importlib
import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Protocol, final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from nestseg.core.errors import DataError
from nestseg.core.image_io import (
    DAMAGE,
    MAX_PIXELS,
    NPY_START,
    TIFF_STARTS,
    check_finite,
    convert_image,
    damaged,
    import_tifffile,
    other_channels,
    other_dtype,
    read_image,
    read_npy_header,
    undecoded,
)
from nestseg.core.resize import Window
from nestseg.core.types import ImageDtype, Size

MAX_PIECE_BYTES = 2**27
"""Largest piece (tile, strip or chunk), decoded, that a picture may be stored in: 128 MiB."""

_ROWS_BYTES = 2**22  # of what lies uncompressed row after row, this much is read at a time

_ZARR_FILES = ("zarr.json", ".zarray")
_DECODED_WHOLE: dict[bytes, Callable[[BinaryIO], Image.Image]] = {
    b"\x89PNG": PngImageFile,
    b"\xff\xd8": JpegImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
}

# TIFF: what a sample means (tag 262) and JPEG, whose decoder gives RGB whatever was stored
_GREY, _RGB, _YCBCR, _JPEG = 1, 2, 6, 7
_WIDTH, _LENGTH, _ORIENTATION = 256, 257, 274  # tags
_SHORT, _LONG, _LONG8 = 3, 4, 16  # types of their values


class ImageWindows(Protocol):
    """A picture that is read in windows."""

    @property
    def size(self) -> Size:
        """(height, width) of the picture."""

    @property
    def channels(self) -> int:
        """Channels C of a window."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of its values."""

    def read(self, window: Window) -> NDArray[Any]:
        """Read a part of the picture; cheapest from top to bottom.

        Args:
            window: Inside the picture.

        Shape:
            - returns: (window height, window width, C) of ``dtype``, fresh

        Raises:
            ValueError: If the window reaches outside the picture.
            DataError: If the part cannot be read.
        """


@final
class ArrayWindows:
    """A picture that is in memory.

    Args:
        array: The picture.

    Shape:
        - array: (H, W, C)

    Example:
        >>> ArrayWindows(np.arange(12, dtype=np.uint8).reshape(3, 4, 1)).read(Window(1, 2, 2, 1)).ravel().tolist()
        [6, 10]
    """

    def __init__(self, array: NDArray[Any]) -> None:
        height, width, self.channels = array.shape
        self.size: Size = (height, width)
        self.dtype = array.dtype
        self._array = array

    def read(self, window: Window) -> NDArray[Any]:
        """Read a part of the picture, see `ImageWindows`.

        Shape:
            - returns: (window height, window width, C)
        """
        top, left, height, width = _check_inside(window, self.size)
        return self._array[top : top + height, left : left + width].copy()


@final
class _PieceWindows:
    """A picture whose file holds it in a grid of pieces.

    Pieces stay decoded while windows touch their rows, so that a walk from left to right and top to bottom decodes each
    piece once, or twice where rows of windows overlap by more than a piece. Memory: the rows of pieces that a window
    touches, over the whole width.

    Args:
        size: (height, width) of the picture.
        piece: (height, width) of a piece; those at the right and bottom may be smaller or larger than what is left.
        channels: Channels C.
        dtype: Type of the values.
        decode: (row, column) of a piece in the grid -> its pixels, (h, w, C).
    """

    def __init__(
        self,
        size: Size,
        piece: Size,
        *,
        channels: int,
        dtype: ImageDtype,
        decode: Callable[[int, int], NDArray[Any]],
    ) -> None:
        self.size, self.channels, self.dtype = size, channels, np.dtype(dtype)
        self._piece, self._decode = piece, decode
        self._kept: dict[tuple[int, int], NDArray[Any]] = {}

    def read(self, window: Window) -> NDArray[Any]:
        """Read a part of the picture, see `ImageWindows`.

        Shape:
            - returns: (window height, window width, C)
        """
        top, left, height, width = _check_inside(window, self.size)
        tall, wide = self._piece
        rows = range(top // tall, (top + height - 1) // tall + 1)
        self._kept = {place: piece for place, piece in self._kept.items() if place[0] in rows}
        pixels = np.empty((height, width, self.channels), self.dtype)
        for row in rows:
            for column in range(left // wide, (left + width - 1) // wide + 1):
                if (row, column) not in self._kept:
                    self._kept[row, column] = self._decode(row, column)
                piece = self._kept[row, column]
                y, x = row * tall, column * wide
                first, last = max(top, y), min(top + height, y + tall)
                start, end = max(left, x), min(left + width, x + wide)
                pixels[first - top : last - top, start - left : end - left] = piece[
                    first - y : last - y, start - x : end - x
                ]
        return pixels


def is_zarr(path: Path) -> bool:
    """Tell whether a folder is a zarr array or group rather than a folder of pictures."""
    return any((path / name).is_file() for name in _ZARR_FILES)


def image_size(path: Path) -> Size | None:
    """Read from its header how large a picture is stored.

    Returns:
        (height, width) before any EXIF orientation; None where the file cannot be read or its header makes no sense:
        whoever reads the picture then says why.
    """
    try:
        if is_zarr(path):
            shape = _open_zarr(path).shape
            return (shape[0], shape[1]) if len(shape) in (2, 3) else None
        if not path.is_file():
            return None  # a pipe would block for ever
        with path.open("rb") as file:
            return _header_size(file)
    except (*DAMAGE, DataError):
        return None


@contextmanager
def open_windows(
    path: str | Path, *, channels: int = 3, dtype: ImageDtype = "uint8", max_pixels: int = MAX_PIXELS
) -> Iterator[ImageWindows]:
    """Open a picture to be read in windows.

    ======================  =====================================================================================
    TIFF, BigTIFF           the first page; tiles or strips of at most 128 MiB each, or uncompressed. By tifffile, an
                            extra: ``pip install "nestseg[tiff]"``
    npy                     (H, W, C), or (H, W) for one channel; rows are read as they lie in the file
    zarr                    a folder that holds one array of such a shape; an extra: ``pip install "nestseg[zarr]"``
    PNG, JPEG, WebP, BMP    decoded whole, up to ``max_pixels``
    ======================  =====================================================================================

    Values are those of `read_image`. Of a TIFF, what it would turn upright, invert or look up in a palette is refused.

    Memory: the rows of tiles, strips or chunks that a window touches, over the whole width; of what is decoded whole,
    all of it.

    Args:
        path: The file, or the folder of a zarr array.
        channels: As in `read_image`.
        dtype: As in `read_image`.
        max_pixels: Largest height * width of a picture that is decoded whole; the others have no cap. Pillow's own
            ``PIL.Image.MAX_IMAGE_PIXELS``, a setting of the whole process, holds as well.

    Yields:
        The picture; closed on leaving.

    Raises:
        DataError: E-DATA-100 to E-DATA-104: too many pixels to decode whole, stored in a way that no window can be
            read from, in pieces too large, zarr missing, or no zarr array. Else as `read_image`.
    """
    path = Path(path)
    if is_zarr(path):
        yield _zarr_windows(path, channels=channels, dtype=dtype)
        return
    try:
        with path.open("rb") if path.is_file() else io.BytesIO() as file:
            start = file.read(len(NPY_START))
    except OSError:
        start = b""  # read_image says what is wrong with it
    if start.startswith(TIFF_STARTS):
        with _tiff_windows(path, channels=channels, dtype=dtype) as source:
            yield source
    elif start == NPY_START:
        with path.open("rb") as file:
            yield _npy_windows(file, path, channels=channels, dtype=dtype)
    else:
        _check_cap(path, max_pixels)
        yield ArrayWindows(read_image(path, channels=channels, dtype=dtype, max_pixels=max_pixels))


def _header_size(file: BinaryIO) -> Size | None:
    start = file.read(16)
    file.seek(0)
    if start.startswith(NPY_START):
        read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, _, _ = read_header[np.lib.format.read_magic(file)[0]](file)
        return (shape[0], shape[1]) if len(shape) in (2, 3) else None
    if start.startswith(TIFF_STARTS):
        return _tiff_size(file, start)
    for magic, opener in _DECODED_WHOLE.items():
        if start.startswith(magic):
            # the class, not Image.open, whose own cap hides the size of what is above it
            image = opener(file)
            return image.height, image.width
    return None


def _tiff_size(file: BinaryIO, start: bytes) -> Size:
    """Read two tags of the first directory. Pillow's reader of them warns of what it does not like in the others."""
    order = "<" if start.startswith(b"II") else ">"
    if start[2:4] in (b"+\0", b"\0+"):  # BigTIFF
        (place,) = struct.unpack_from(f"{order}Q", start, 8)
        counter, entry = struct.Struct(f"{order}Q"), struct.Struct(f"{order}HHQ8s")
    else:
        (place,) = struct.unpack_from(f"{order}I", start, 4)
        counter, entry = struct.Struct(f"{order}H"), struct.Struct(f"{order}HHI4s")
    file.seek(place)
    (count,) = counter.unpack(file.read(counter.size))
    sides = {}
    for _ in range(count):
        tag, kind, _, value = entry.unpack(file.read(entry.size))
        if tag in (_WIDTH, _LENGTH):
            sides[tag] = int(struct.unpack_from(order + {_SHORT: "H", _LONG: "I", _LONG8: "Q"}[kind], value)[0])
        if len(sides) == 2:
            break
    return sides[_LENGTH], sides[_WIDTH]


def _check_cap(path: Path, max_pixels: int) -> None:
    limit = max_pixels if Image.MAX_IMAGE_PIXELS is None else min(max_pixels, Image.MAX_IMAGE_PIXELS)
    size = image_size(path)
    if size is not None and size[0] * size[1] > limit:
        raise DataError(
            "E-DATA-100",
            f"{size[0]}x{size[1]} = {size[0] * size[1]:,} pixels, to be decoded whole; allowed: {limit:,}",
            fix="store it as tiled TIFF, .npy or zarr, which need no cap; or raise the cap: --max-pixels, in Python "
            "max_pixels and PIL.Image.MAX_IMAGE_PIXELS",
            path=path,
        )


@contextmanager
def _tiff_windows(path: Path, *, channels: int, dtype: ImageDtype) -> Iterator[ImageWindows]:
    name = str(path)
    tifffile = import_tifffile(name, "a TIFF file read in windows")
    damage = (*DAMAGE, NotImplementedError, tifffile.TiffFileError)
    try:
        file = tifffile.TiffFile(path)
    except damage as error:
        raise damaged(name, error) from error
    with file:
        try:
            page = file.pages[0]
            size = (int(page.imagelength), int(page.imagewidth))
            if min(size) < 1:
                raise ValueError(f"no pixels: {size[0]}x{size[1]}")
            samples, is_planar = int(page.samplesperpixel), str(page.axes) == "SYX"
            _check_tiff(page, path)
            _check_samples(name, page.dtype, samples, channels=channels, dtype=dtype)
            if page.is_final:
                stored = page.dtype.newbyteorder(file.byteorder)
                source = _row_windows(
                    file.filehandle,
                    name,
                    size,
                    offset=int(page.dataoffsets[0]),
                    samples=samples,
                    is_planar=is_planar,
                    stored=stored,
                    channels=channels,
                    dtype=dtype,
                )
            else:
                source = _segment_windows(page, path, is_planar=is_planar, channels=channels, dtype=dtype)
        except damage as error:
            # a DataError is a ValueError, and already says what is wrong
            raise (error if isinstance(error, DataError) else damaged(name, error)) from error
        yield source


def _check_tiff(page: Any, path: Path) -> None:
    """Refuse what `read_image` would turn, invert or look up, and what it does not read either."""
    orientation = page.tags.valueof(_ORIENTATION, 1)
    if str(page.axes) not in ("YX", "YXS", "SYX") or page.dtype is None or page.imagedepth != 1:
        given = f"axes {page.axes}"
    elif page.photometric not in (_GREY, _RGB) and (page.photometric, page.compression) != (_YCBCR, _JPEG):
        given = f"colours {getattr(page.photometric, 'name', page.photometric)}"
    elif orientation != 1:
        given = f"orientation {orientation}"
    else:
        return
    raise DataError(
        "E-DATA-101",
        f"TIFF with {given}; allowed, to be read in windows: rows, columns and samples in the first page, "
        "grey (MINISBLACK) or RGB, stored upright",
        fix="convert it to an upright, tiled RGB TIFF",
        path=path,
    )


def _check_samples(path: str, stored: np.dtype[Any], samples: int, *, channels: int, dtype: ImageDtype) -> None:
    """Refuse what `_convert` cannot convert; the rules of `read_image` for TIFF."""
    if stored == np.dtype(dtype) and samples == channels:
        return
    is_colour = channels in (1, 3) and samples <= 4
    if stored != np.dtype(dtype) and not (is_colour and dtype == "uint8" and stored == np.uint16):
        raise other_dtype(path, str(stored), dtype)
    if samples != channels and not (is_colour and dtype == "uint8"):
        raise other_channels(path, f"{samples} samples a pixel", channels)


def _convert(pixels: NDArray[Any], path: str, *, channels: int, dtype: ImageDtype) -> NDArray[Any]:
    """Convert a piece by the rules of `read_image`; its type and samples passed the checks.

    Shape:
        - pixels: (h, w, S)
        - returns: (h, w, channels) of ``dtype``
    """
    if pixels.shape[2] == channels:
        if dtype != "uint8" or pixels.dtype == np.uint8:
            with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite and is refused
                return check_finite(pixels.astype(dtype, order="C"), path=path)
        return (pixels >> 8).astype(np.uint8)
    narrow = pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(narrow[:, :, 0] if narrow.shape[2] == 1 else narrow))
    return convert_image(image, channels=channels, path=path)


def _segment_windows(page: Any, path: Path, *, is_planar: bool, channels: int, dtype: ImageDtype) -> _PieceWindows:
    """Read the tiles or strips of a TIFF page."""
    height, width = int(page.imagelength), int(page.imagewidth)
    piece = (
        (int(page.tilelength), int(page.tilewidth)) if page.is_tiled else (min(int(page.rowsperstrip), height), width)
    )
    _check_piece(path, piece, page.dtype.itemsize * int(page.samplesperpixel))
    down, across = -(-height // piece[0]), -(-width // piece[1])
    planes = int(page.samplesperpixel) if is_planar else 1
    if min(len(page.dataoffsets), len(page.databytecounts)) < planes * down * across:
        pieces = f"{len(page.dataoffsets)} tiles or strips of {planes * down * across}"
        raise damaged(str(path), ValueError(f"it has {pieces}"))
    tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader} if page.compression == _JPEG else {}

    def decode(row: int, column: int) -> NDArray[Any]:
        parts = [read((plane * down + row) * across + column) for plane in range(planes)]
        pixels = parts[0] if planes == 1 else np.concatenate(parts, axis=2)
        # the padding of tiles at the border may be anything
        pixels = pixels[: height - row * piece[0], : width - column * piece[1]]
        return _convert(pixels, str(path), channels=channels, dtype=dtype)

    def read(index: int) -> NDArray[Any]:
        count = int(page.databytecounts[index])
        if count == 0:
            # left out by the writer: a hole of a sparse file
            samples = 1 if is_planar else int(page.samplesperpixel)
            return np.full((*piece, samples), page.nodata, page.dtype)
        try:
            page.parent.filehandle.seek(int(page.dataoffsets[index]))
            data = page.parent.filehandle.read(count)
            if len(data) < count:
                raise EOFError(f"tile or strip {index} ends after {len(data):,} of {count:,} bytes")
            segment: NDArray[Any] = page.decode(data, index, **tables)[0][0]
        except (*DAMAGE, NotImplementedError) as error:
            raise undecoded(str(path), error) from error
        return segment

    return _PieceWindows((height, width), piece, channels=channels, dtype=dtype, decode=decode)


def _npy_windows(file: BinaryIO, path: Path, *, channels: int, dtype: ImageDtype) -> ImageWindows:
    header = read_npy_header(file, path=str(path), channels=channels, dtype=dtype)
    if header.fortran_order:
        raise DataError(
            "E-DATA-102",
            "npy file that holds columns, not rows, one after another (fortran_order)",
            fix="numpy.save(path, numpy.ascontiguousarray(array))",
            path=path,
        )
    return _row_windows(
        file,
        str(path),
        header.size,
        offset=header.offset,
        samples=channels,
        is_planar=False,
        stored=header.stored,
        channels=channels,
        dtype=dtype,
    )


def _row_windows(
    file: BinaryIO,
    path: str,
    size: Size,
    *,
    offset: int,
    samples: int,
    is_planar: bool,
    stored: np.dtype[Any],
    channels: int,
    dtype: ImageDtype,
) -> ImageWindows:
    """Read rows that lie uncompressed one after another; planes too, one after another.

    Not by a memory map: the pages of one count as the process's own memory, and a file that is cut short or on a
    failing disk kills the process instead of raising.
    """
    height, width = size
    planes, together = (samples, 1) if is_planar else (1, samples)
    row_bytes = width * together * stored.itemsize
    file.seek(0, 2)
    needed = offset + planes * height * row_bytes
    if file.tell() < needed:
        raise damaged(path, EOFError(f"it has {file.tell():,} bytes of {needed:,}"))
    rows = min(height, max(1, _ROWS_BYTES // (planes * row_bytes)))

    def decode(row: int, _: int) -> NDArray[Any]:
        count = min(rows, height - row * rows)
        pixels = np.empty((count, width, samples), stored)
        for plane in range(planes):
            try:
                file.seek(offset + (plane * height + row * rows) * row_bytes)
                data = file.read(count * row_bytes)
                values = np.frombuffer(data, stored).reshape(count, width, together)
            except (OSError, ValueError) as error:
                raise damaged(path, error) from error
            pixels[:, :, plane : plane + together] = values
        return _convert(pixels, path, channels=channels, dtype=dtype)

    return _PieceWindows(size, (rows, width), channels=channels, dtype=dtype, decode=decode)


def _zarr_windows(path: Path, *, channels: int, dtype: ImageDtype) -> ImageWindows:
    array = _open_zarr(path)
    shape, stored = tuple(array.shape), array.dtype
    if len(shape) not in (2, 3) or 0 in shape:
        raise DataError(
            "E-DATA-104",
            f"zarr array of shape {shape}; allowed: (H, W, C), or (H, W) for one channel",
            fix="store the picture alone, with its channels last",
            path=path,
        )
    floats = dtype == "float32" and stored.kind == "f" and stored.itemsize <= 8
    if not floats and stored.newbyteorder("=") != np.dtype(dtype):
        raise other_dtype(str(path), str(stored), dtype)
    height, width, stored_channels = (*shape, 1)[:3]
    if stored_channels != channels:
        order = "; channels come last" if shape[0] == channels else ""
        raise other_channels(str(path), f"an array of shape {shape}{order}", channels)
    piece = (int(array.chunks[0]), int(array.chunks[1]))
    _check_piece(path, (min(piece[0], height), min(piece[1], width)), stored.itemsize * channels)

    def decode(row: int, column: int) -> NDArray[Any]:
        y, x = row * piece[0], column * piece[1]
        try:
            pixels = np.asarray(array[y : y + piece[0], x : x + piece[1]])
        except (*DAMAGE, RuntimeError) as error:
            raise damaged(str(path), error) from error
        return _convert(pixels.reshape(*pixels.shape[:2], channels), str(path), channels=channels, dtype=dtype)

    return _PieceWindows((height, width), piece, channels=channels, dtype=dtype, decode=decode)


def _open_zarr(path: Path) -> Any:
    zarr = _import_zarr(path)
    try:
        return zarr.open_array(str(path), mode="r")
    except (*DAMAGE, RuntimeError) as error:
        raise DataError(
            "E-DATA-104",
            f"no zarr array: {error}",
            fix="of a group, give the folder of one array, for example PICTURE.zarr/0",
            path=path,
        ) from error


def _import_zarr(path: Path) -> ModuleType:
    try:
        return importlib.import_module("zarr")
    except ImportError as error:
        raise DataError(
            "E-DATA-103",
            "a zarr array needs the zarr package, which cannot be imported",
            fix='pip install "nestseg[zarr]", or store the picture as tiled TIFF or .npy',
            path=path,
        ) from error


def _check_piece(path: Path, piece: Size, pixel_bytes: int) -> None:
    if piece[0] * piece[1] * pixel_bytes > MAX_PIECE_BYTES:
        raise DataError(
            "E-DATA-102",
            f"stored in pieces of {piece[0]}x{piece[1]} pixels, {piece[0] * piece[1] * pixel_bytes:,} bytes each; "
            f"allowed: {MAX_PIECE_BYTES:,}",
            fix="store it in tiles or chunks of 256x256 to 1024x1024 pixels",
            path=path,
        )


def _check_inside(window: Window, size: Size) -> Window:
    top, left, height, width = window
    if min(top, left) < 0 or min(height, width) < 1 or top + height > size[0] or left + width > size[1]:
        raise ValueError(f"{window} is not inside the picture of {size}")
    return window
