"""Label maps larger than memory, written from top to bottom."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self, final

import numpy as np
from numpy.typing import NDArray

from nestseg.core.disk import replaced_file
from nestseg.core.image_io import unwritten
from nestseg.core.types import Size

TILE = 512
"""Side of a tile of a TIFF label map."""

_CLASSIC_BYTES = 2**32 - 2**16  # what a TIFF that is no BigTIFF can address, without its directory

_SHORT, _LONG, _LONG8 = 3, 4, 16  # types of TIFF values
_CODES = {_SHORT: "H", _LONG: "I", _LONG8: "Q"}


@final
class LabelSink:
    """A label map file that is written row band by row band, and appears whole or not at all.

    ``.png``: 8 bits and a palette, as `write_labels` writes it. ``.tif``, ``.tiff``: the same in deflated tiles of
    512x512, which programs can open without reading all of it; BigTIFF where 4 GiB might not do.

    Memory: 512 rows of the map, for TIFF; what is given, for PNG.

    Args:
        path: File to write; one that exists is replaced.
        size: (height, width) of the map.
        palette: Colours by train id, see ``Taxonomy.colour_table``.

    Shape:
        - palette: (256, 3) uint8 RGB

    Raises:
        ValueError: If the suffix is another one, the palette is of another kind, or not all rows were written.
        DataError: E-DATA-018, if the file cannot be written.

    Example:
        >>> from tempfile import mkdtemp
        >>> from nestseg.core.image_io import read_labels
        >>> file = Path(mkdtemp(), "labels.png")
        >>> with LabelSink(file, (2, 2), palette=np.zeros((256, 3), np.uint8)) as sink:
        ...     sink.write(0, np.array([[1, 2]], np.uint8))
        ...     sink.write(1, np.array([[3, 4]], np.uint8))
        >>> read_labels(file).tolist()
        [[1, 2], [3, 4]]
    """

    def __init__(self, path: str | Path, size: Size, *, palette: NDArray[np.uint8]) -> None:
        self._path, self._size, self._palette = Path(path), size, palette
        if palette.shape != (256, 3) or palette.dtype != np.uint8:
            raise ValueError(f"palette: {palette.dtype} of shape {palette.shape}; allowed: uint8, (256, 3)")
        if self._path.suffix.lower() not in (".png", ".tif", ".tiff"):
            raise ValueError(
                f"label map {path}: suffix {self._path.suffix!r}; allowed: .png .tif .tiff, which keep ids"
            )
        self._stack = ExitStack()
        self._next = 0

    def __enter__(self) -> Self:
        try:
            with ExitStack() as stack:
                temporary = stack.enter_context(replaced_file(self._path))
                file = stack.enter_context(temporary.open("wb"))
                kind = _PngWriter if self._path.suffix.lower() == ".png" else _TiffWriter
                self._writer: _PngWriter | _TiffWriter = kind(file, self._size, self._palette)
                self._stack = stack.pop_all()
        except OSError as error:
            raise unwritten(self._path, error) from error
        return self

    def write(self, top: int, labels: NDArray[np.uint8]) -> None:
        """Write the next rows.

        Args:
            top: The first of them: as many as were written before.
            labels: Train ids.

        Shape:
            - labels: (h, W) uint8

        Raises:
            ValueError: If they are not the next rows, or of another width or type.
            DataError: E-DATA-018, if they cannot be written.
        """
        height, width = self._size
        if labels.dtype != np.uint8 or labels.ndim != 2 or labels.shape[1] != width:
            raise ValueError(f"labels: {labels.dtype} of shape {labels.shape}; allowed: uint8, (h, {width})")
        if top != self._next or top + len(labels) > height:
            raise ValueError(
                f"rows {top} to {top + len(labels)} of {height}, after {self._next}; allowed: the next ones"
            )
        try:
            self._writer.write(labels)
        except OSError as error:
            raise unwritten(self._path, error) from error
        self._next += len(labels)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            # What is still in a buffer may not fit on the disk either; the first error is the one to tell.
            with suppress(OSError):
                self._stack.__exit__(kind, error, trace)
            return
        try:
            with self._stack:
                if self._next < self._size[0]:
                    raise ValueError(f"label map {self._path}: {self._next} of {self._size[0]} rows were written")
                self._writer.finish()
        except OSError as failure:
            raise unwritten(self._path, failure) from failure


@final
class _PngWriter:
    """A PNG of 8 bits and a palette, one compressed stream."""

    def __init__(self, file: BinaryIO, size: Size, palette: NDArray[np.uint8]) -> None:
        self._file, self._compressor = file, zlib.compressobj()
        file.write(b"\x89PNG\r\n\x1a\n")
        height, width = size
        # bit depth 8, colour type 3 (palette), and the only compression, filter method and interlacing we write
        self._write_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0))
        self._write_chunk(b"PLTE", palette.tobytes())

    def write(self, labels: NDArray[np.uint8]) -> None:
        # every row starts with the number of its filter: 0, none, the best for ids
        rows = np.zeros((labels.shape[0], labels.shape[1] + 1), np.uint8)
        rows[:, 1:] = labels
        self._write_data(self._compressor.compress(rows.data))

    def finish(self) -> None:
        self._write_data(self._compressor.flush())
        self._write_chunk(b"IEND", b"")

    def _write_data(self, data: bytes) -> None:
        if data:
            self._write_chunk(b"IDAT", data)

    def _write_chunk(self, kind: bytes, data: bytes) -> None:
        checksum = zlib.crc32(data, zlib.crc32(kind))
        self._file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum))


@final
class _TiffWriter:
    """A TIFF of 8 bits and a palette, in deflated tiles; its directory comes last."""

    def __init__(self, file: BinaryIO, size: Size, palette: NDArray[np.uint8]) -> None:
        self._file, self._size, self._palette = file, size, palette
        height, width = size
        self._across, self._down = -(-width // TILE), -(-height // TILE)
        # deflate adds at most 5 bytes to every 16 KiB; the directory takes 8 bytes a tile
        self._is_big = self._across * self._down * (TILE * TILE + 128) > _CLASSIC_BYTES
        self._band = np.zeros((TILE, self._across * TILE), np.uint8)
        self._filled = 0
        self._offsets: list[int] = []
        self._counts: list[int] = []
        # the place of the directory is written over the last number when it is known
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0) if self._is_big else struct.pack("<2sHI", b"II", 42, 0))

    def write(self, labels: NDArray[np.uint8]) -> None:
        while len(labels):
            rows = labels[: TILE - self._filled]
            self._band[self._filled : self._filled + len(rows), : labels.shape[1]] = rows
            self._filled += len(rows)
            labels = labels[len(rows) :]
            if self._filled == TILE:
                self._write_tiles()

    def finish(self) -> None:
        if self._filled:
            self._band[self._filled :] = 0
            self._write_tiles()
        height, width = self._size
        place = _LONG8 if self._is_big else _LONG
        # 16 bits a colour: 257 times the 8 bits, all of red first
        colours = (self._palette.T.astype(np.uint16) * 257).ravel().tolist()
        self._write_directory(
            [
                (256, _LONG, [width]),
                (257, _LONG, [height]),
                (258, _SHORT, [8]),  # bits a sample
                (259, _SHORT, [8]),  # deflate
                (262, _SHORT, [3]),  # colours from a palette
                (277, _SHORT, [1]),  # samples a pixel
                (320, _SHORT, colours),
                (322, _LONG, [TILE]),
                (323, _LONG, [TILE]),
                (324, place, self._offsets),
                (325, place, self._counts),
            ]
        )

    def _write_tiles(self) -> None:
        for column in range(self._across):
            tile = zlib.compress(self._band[:, column * TILE : (column + 1) * TILE].tobytes())
            self._offsets.append(self._file.tell())
            self._counts.append(len(tile))
            self._file.write(tile)
        self._filled = 0

    def _write_directory(self, entries: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        number, room = ("Q", 8) if self._is_big else ("I", 4)
        lines = b""
        for tag, kind, values in entries:
            data = struct.pack(f"<{len(values)}{_CODES[kind]}", *values)
            if len(data) > room:
                data = struct.pack(f"<{number}", self._write_even(data))
            lines += struct.pack(f"<HH{number}", tag, kind, len(values)) + data.ljust(room, b"\0")
        count = struct.pack("<Q" if self._is_big else "<H", len(entries))
        start = self._write_even(count + lines + bytes(room))  # no other directory follows
        self._file.seek(8 if self._is_big else 4)
        self._file.write(struct.pack(f"<{number}", start))

    def _write_even(self, data: bytes) -> int:
        """Write at the end, at an even place as TIFF wants it, and return the place."""
        if self._file.tell() % 2:
            self._file.write(b"\0")
        place = self._file.tell()
        self._file.write(data)
        return place
