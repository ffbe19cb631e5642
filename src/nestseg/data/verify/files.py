"""What is wrong with a file that should be a picture; the same decoder as `core.image_io`, asked more questions.

A truncated JPEG passes Pillow's ``verify`` and fails its ``load``; a PNG cut by a few bytes does the opposite. So both
are asked, each on an opening of its own, after the parts of the file were walked through here.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import re
import stat
import struct
import warnings
import zlib
from importlib.util import find_spec
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from nestseg.core.errors import DataError
from nestseg.core.image_io import IMAGE_FORMATS, preview_image, read_image
from nestseg.core.types import ImageDtype, Size
from nestseg.data.verify import problems as kinds
from nestseg.data.verify.problems import Problem, make_problem

MAX_BYTES = 1 << 30
"""Largest file that is read; whatever a picture below the pixel limit needs is far less."""

FETCH = "fetch the file again"

# What Pillow raises on damaged bytes, as in core.image_io.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError),
    *(EOFError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error),
)

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# inside the coded pixels of a JPEG a marker is ff and neither 00 (a stuffed byte), nor a restart, nor another ff
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_ORIENTATION_TAG = 0x0112
_TURNED = range(5, 9)

_MODES = {
    "1": "1-bit",
    "L": "grey",
    "LA": "grey with alpha",
    "La": "grey with alpha",
    "P": "palette",
    "PA": "palette with alpha",
    "RGB": "RGB",
    "RGBX": "RGB",
    "RGBA": "RGBA",
    "RGBa": "RGBA",
    "CMYK": "CMYK",
    "YCbCr": "YCbCr",
}


class ImageType(NamedTuple):
    """What the images of a data set are read as."""

    channels: int
    dtype: ImageDtype

    def __str__(self) -> str:
        return f"{self.channels}-channel {self.dtype}"


RGB = ImageType(3, "uint8")


class Picture(NamedTuple):
    """A picture that was decoded whole."""

    image: Image.Image
    kind: str
    """Such as ``"RGB"``, ``"grey 16-bit"``, ``"palette"``, ``"CMYK"``."""
    bit_depth: int
    """Bits a sample as the file has it."""
    orientation: int
    """EXIF orientation 1-8; 1 where there is none."""

    @property
    def size(self) -> Size:
        """(height, width) as stored."""
        return self.image.height, self.image.width

    @property
    def upright_size(self) -> Size:
        """(height, width) after the EXIF orientation was applied."""
        return self.size[::-1] if self.orientation in _TURNED else self.size


class FileCheck(NamedTuple):
    """What a file turned out to be."""

    picture: Picture | None
    digest: bytes
    """sha256 of the content; empty where it could not be read."""
    problems: tuple[Problem, ...]


class _FaultError(Exception):
    """A fault that ends the check of a file."""

    def __init__(self, kind: kinds.Kind, reason: str, *, fix: str = FETCH) -> None:
        self.kind, self.reason, self.fix = kind, reason, fix
        super().__init__(reason)


class Expected(NamedTuple):
    """What the manifest says about a file."""

    size: int
    sha256: bytes


def check_picture(path: str, *, max_pixels: int, expected: Expected | None = None) -> FileCheck:
    """Read and decode a file, and say what is wrong with it.

    A pipe, a device or a folder is never opened. A picture above the limit is not decoded.

    Args:
        path: The file.
        max_pixels: Largest height * width.
        expected: What the manifest says about it.
    """
    found: list[Problem] = []
    digest = b""
    picture = None
    try:
        data = read_file(path)
        digest = hashlib.sha256(data).digest()
        check_content(data)
        _check_structure(data)
        picture = _decode(data, max_pixels)
        if reason := _refusal_of_strict_decoder(data):
            found.append(make_problem(kinds.DOUBTFUL, path, reason, fix="compare it with its source"))
    except _FaultError as fault:
        found.append(make_problem(fault.kind, path, fault.reason, fix=fault.fix))
        if fault.kind is kinds.TRAILING:
            picture = _decode_anyway(data, max_pixels)
    if digest and expected is not None and digest != expected.sha256:
        found.append(_differs(path, len(data), digest, expected))
    return FileCheck(picture, digest, tuple(found))


def check_typed_picture(
    path: str, *, image_type: ImageType, max_pixels: int, expected: Expected | None = None
) -> FileCheck:
    """Read a file as the type that a data set file names, and say what is wrong with it.

    What Pillow cannot hold, arrays and TIFF of many channels, is asked one question: whether it is read. All others
    are checked as `check_picture` does, too.

    Args:
        path: The file.
        image_type: What it is read as.
        max_pixels: Largest height * width.
        expected: What the manifest says about it.
    """
    found = FileCheck(None, b"", ())
    if not path.lower().endswith((".npy", ".tif", ".tiff")):
        found = check_picture(path, max_pixels=max_pixels, expected=expected)
        if found.picture is None:
            return found
    try:
        data = read_file(path)
        check_content(data)
        image = read_image(data, exif="ignore", channels=image_type.channels, dtype=image_type.dtype)
    except _FaultError as fault:
        return found._replace(problems=(*found.problems, make_problem(fault.kind, path, fault.reason, fix=fault.fix)))
    except DataError as error:
        problem = make_problem(kinds.OTHER_TYPE, path, f"{error.code}: {error.reason}", fix=error.fix)
        return found._replace(problems=(*found.problems, problem))
    if found.picture is None:
        digest = hashlib.sha256(data).digest()
        wrong = expected is not None and digest != expected.sha256
        found = FileCheck(None, digest, (_differs(path, len(data), digest, expected),) if expected and wrong else ())
    shown = Image.fromarray(preview_image(image))
    bits = 8 * image.itemsize
    orientation = found.picture.orientation if found.picture else 1
    return found._replace(picture=Picture(shown, str(image_type), bits, orientation))


def _refusal_of_strict_decoder(data: bytes) -> str:
    """Say why a strict decoder refuses a JPEG that Pillow takes; empty if it does not, or is not installed.

    Without a manifest only this finds changed bytes among the coded pixels, and not all of them. It is the extra
    ``nestseg[strict]`` and costs about a millisecond a picture; its pixels are not used.
    """
    if not data.startswith(_JPEG) or find_spec("simplejpeg") is None:
        return ""
    simplejpeg = importlib.import_module("simplejpeg")
    try:
        simplejpeg.decode_jpeg(data, strict=True)
    except ValueError as error:
        return f"a strict decoder says: {' '.join(str(error).split())[:120]}"
    return ""


def check_hash(path: str, expected: Expected) -> tuple[Problem, ...]:
    """Compare a file of any kind with the manifest."""
    digest, size = hashlib.sha256(), 0
    try:
        _check_regular(path)
        with open(path, "rb") as file:  # noqa: PTH123 -- paths are text here, they come from another process
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except FileNotFoundError:
        return (make_problem(kinds.NOT_THERE, path, "named by the manifest, and not there", fix=FETCH),)
    except OSError as error:
        return (make_problem(kinds.UNREADABLE, path, _word(error), fix="check path and permissions"),)
    except _FaultError as fault:
        return (make_problem(fault.kind, path, fault.reason, fix=fault.fix),)
    if digest.digest() == expected.sha256:
        return ()
    return (_differs(path, size, digest.digest(), expected),)


def read_file(path: str) -> bytes:
    """Read a regular file of at most `MAX_BYTES`.

    Raises:
        _FaultError: If it is no such file or cannot be read.
    """
    try:
        status = _check_regular(path)
        if status.st_size > MAX_BYTES:
            raise _FaultError(
                kinds.TOO_LARGE,
                f"{status.st_size:,} bytes; allowed: {MAX_BYTES:,}",
                fix="scale the picture down or cut it into parts",
            )
        with open(path, "rb") as file:  # noqa: PTH123 -- paths are text here, they come from another process
            return file.read()
    except OSError as error:
        raise _FaultError(kinds.UNREADABLE, _word(error), fix=_fix_for(path)) from error


def _check_regular(path: str) -> os.stat_result:
    status = os.stat(path)  # noqa: PTH116
    if not stat.S_ISREG(status.st_mode):
        names = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
        what = names.get(stat.S_IFMT(status.st_mode), "a device")
        raise _FaultError(kinds.NOT_REGULAR, f"{what}, not a file", fix="remove it, or put the picture there")
    return status


def _word(error: OSError) -> str:
    return f"cannot be read: {error.strerror or error}"


def _fix_for(path: str) -> str:
    if not os.path.islink(path):  # noqa: PTH114
        return "check path and permissions"
    return f"mend the link, which points to {kinds.printable(os.readlink(path))}"  # noqa: PTH115


def check_content(data: bytes) -> None:
    """Tell pictures from what downloads leave in their place.

    Raises:
        _FaultError: With the kind of content.
    """
    start = data[:256].lstrip().lower()
    if not data:
        raise _FaultError(kinds.EMPTY, "empty file")
    if data.startswith((_JPEG, _PNG)):
        return
    if start.startswith(b"version https://git-lfs"):
        raise _FaultError(kinds.LFS_POINTER, "git-lfs pointer instead of the file", fix="run: git lfs pull")
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")):
        raise _FaultError(
            kinds.WEB_PAGE,
            "web page (HTML or XML) instead of a picture",
            fix="fetch the file again from its real address",
        )
    if not any(data):
        raise _FaultError(kinds.ZEROS, f"{len(data):,} zero bytes and nothing else")


def _check_structure(data: bytes) -> None:
    """Walk through the parts of a JPEG or PNG; other formats are left to the decoder.

    Raises:
        _FaultError: If the end is missing, a checksum is wrong or bytes follow the end.
    """
    if data.startswith(_JPEG) and not _jpeg_has_end(data):
        num_zeros = len(data) - len(data.rstrip(b"\0"))
        tail = f"; its last {num_zeros:,} bytes are zero" if num_zeros > 2 else ""
        raise _FaultError(kinds.CUT, f"JPEG of {len(data):,} bytes without end marker{tail}")
    if data.startswith(_PNG):
        _check_png_parts(data)


def _jpeg_has_end(data: bytes) -> bool:
    """Walk from marker to marker; a thumbnail inside a segment has an end of its own, which does not count."""
    position = 2
    while position + 4 <= len(data) or data[position : position + 2] == b"\xff\xd9":
        if data[position] != 0xFF:
            return False
        marker = data[position + 1]
        if marker == 0xD9:
            return True
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:
            match = _NEXT_MARKER.search(data, position)
            if match is None:
                return False
            position = match.start()
    return False


def _check_png_parts(data: bytes) -> None:
    position = len(_PNG)
    while position + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(memoryview(data)[position + 4 : end - 4]) != checksum:
            part = name.decode("ascii", "replace")
            raise _FaultError(
                kinds.CHECKSUM, f"part {kinds.printable(part)} at byte {position:,} differs from its checksum"
            )
        if name == b"IEND":
            if end < len(data):
                raise _FaultError(
                    kinds.TRAILING,
                    f"{len(data) - end:,} bytes after the end of the picture",
                    fix="fetch the file again, or cut it after IEND",
                )
            return
        position = end
    raise _FaultError(kinds.CUT, f"PNG of {len(data):,} bytes without end (IEND)")


def _decode_anyway(data: bytes, max_pixels: int) -> Picture | None:
    try:
        return _decode(data, max_pixels)
    except _FaultError:
        return None


def _decode(data: bytes, max_pixels: int) -> Picture:
    limit = max_pixels if Image.MAX_IMAGE_PIXELS is None else min(max_pixels, Image.MAX_IMAGE_PIXELS)
    with warnings.catch_warnings():
        # the limit is checked right below; the others are about EXIF blocks and palettes, which do no harm
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            if image.width * image.height > limit:
                size = f"{image.height}x{image.width} = {image.height * image.width:,} pixels"
                raise _too_large(size, limit)
            image.verify()
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            image.load()
        except Image.DecompressionBombError as error:
            raise _too_large(str(error).split(",")[0], limit) from error
        except UnidentifiedImageError as error:
            raise _not_a_picture(data) from error
        except _DAMAGE as error:
            raise _FaultError(kinds.DAMAGED, f"damaged picture: {kinds.printable(str(error))}") from error
        return Picture(image, *_describe(image, data), _orientation(image))


def _too_large(given: str, limit: int) -> _FaultError:
    return _FaultError(
        kinds.TOO_LARGE,
        f"{given}; allowed: {limit:,} pixels; it was not decoded",
        fix="scale the picture down or cut it into parts",
    )


def _not_a_picture(data: bytes) -> _FaultError:
    if data.startswith((_JPEG, _PNG)):
        return _FaultError(kinds.DAMAGED, "damaged picture: its header ends early or makes no sense")
    return _FaultError(
        kinds.NOT_A_PICTURE,
        f"not a picture (first bytes {data[:8].hex(' ')}); allowed: {', '.join(IMAGE_FORMATS)}",
        fix="convert it to PNG or JPEG, or remove it",
    )


def _describe(image: Image.Image, data: bytes) -> tuple[str, int]:
    """Return the kind of samples, in words, and their bits."""
    if image.format == "PNG":
        # Pillow stretches grey of few bits and shortens colours of 16; bytes 24 and 25 say what the file has
        bits, colour_type = data[24], data[25]
        names = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
        name = names.get(colour_type, image.mode)
        if bits == 1 and colour_type == 0:
            return "1-bit", 1
        return (f"{name} {bits}-bit" if bits != 8 and colour_type != 3 else name), bits
    if image.mode == "CMYK" and image.info.get("adobe_transform") == 2:
        return "YCCK", 8
    if image.mode.startswith("I;16"):
        return "grey 16-bit", 16
    if image.mode in {"I", "F"}:
        return f"grey 32-bit ({'whole' if image.mode == 'I' else 'real'} numbers)", 32
    return _MODES.get(image.mode, image.mode), 1 if image.mode == "1" else 8


def is_read(image: Image.Image) -> bool:
    """Say whether `core.image_io.read_image` converts such a picture."""
    return image.mode in _MODES or image.mode.startswith("I;16")


def _orientation(image: Image.Image) -> int:
    try:
        orientation = int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DAMAGE:
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _differs(path: str, size: int, digest: bytes, expected: Expected) -> Problem:
    if size != expected.size:
        reason = f"{size:,} bytes; the manifest says {expected.size:,}"
    else:
        reason = f"sha256 {digest.hex()[:12]}...; the manifest says {expected.sha256.hex()[:12]}..."
    return make_problem(kinds.HASH, path, reason, fix="prepare the data set again, or fetch this file again")
