"""Image files in and out: one decoder for everything, and label maps that keep their ids.

Pillow decodes, from an allow-list of formats and under a cap on pixels. Every array returned is fresh and
writable. Every failure that a file can cause is a ``DataError``.

What Pillow cannot hold, pictures of many channels and colour of 16 bits or floats, is read from ``.npy`` and TIFF.
"""

from __future__ import annotations

import importlib
import io
import struct
import tokenize
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from nestseg.core.disk import replaced_file
from nestseg.core.errors import DataError
from nestseg.core.types import ImageDtype, Size

ImageSource = str | Path | bytes | BinaryIO
"""A file by its path, or its encoded content."""

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""The formats that are decoded; a JPEG with several pictures (MPO, as phones write it) gives its first."""

MAX_PIXELS = 89_478_485
"""Default cap on height * width: a picture of 256 MiB at three bytes a pixel, as in Pillow."""

DAMAGE = (
    *(OSError, SyntaxError, ValueError),
    *(EOFError, LookupError, TypeError, ArithmeticError, struct.error, zlib.error),
)
"""What Pillow raises on damaged bytes. 60,000 damaged files of these formats gave the first three; the others are what
its parsers, written in Python, could let through."""

_CONVERTIBLE = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})

NPY_START = b"\x93NUMPY"
"""The first bytes of an npy file."""

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""The first bytes of a TIFF file; the last two are BigTIFF."""

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    source: ImageSource,
    *,
    channels: int = 3,
    dtype: ImageDtype = "uint8",
    exif: Literal["apply", "ignore"] = "apply",
    max_pixels: int = MAX_PIXELS,
) -> NDArray[Any]:
    """Decode a picture to what is asked for, which is 8-bit RGB unless said otherwise.

    **8-bit RGB.** Grey is repeated over the three channels. A palette is looked up. Alpha is dropped: a pixel keeps its
    stored colour, however transparent it is. CMYK and YCCK are converted without a colour profile. Of 16-bit
    samples the high byte is kept: scaled, never clipped. 32-bit samples are refused: their range is unknown.
    Of several pictures in a file the first is taken.

    **Anything else** is taken as it is stored and refused if it is stored as something else, since mean and standard
    deviation would not fit, but for conversions that lose nothing: colour whose channels are all equal is grey, and
    for 2 and 4 channels, grey or RGB with alpha, what has no alpha is opaque. For grey, alpha is dropped, and of 16-bit
    samples 8 bits are the high byte, as above.

    ===========  ================================================================================
    1 channel    any format; 16 bits in PNG, TIFF and npy, floats in TIFF (big-endian: by tifffile) and npy
    2, 4         8 bits: any format that can hold them (TIFF by tifffile); else TIFF and npy
    3, 16 bits   TIFF by tifffile, and npy: Pillow keeps only the high byte of 16-bit colour
    other        TIFF by tifffile, and npy
    ===========  ================================================================================

    An npy file holds (H, W, C), or (H, W) for one channel, and never pickled objects. tifffile is an extra,
    ``pip install "nestseg[tiff]"``; the channels of a pixel lie in the first page, interleaved or in planes.

    Args:
        source: Path, encoded bytes, or a binary file object, which is read to its end.
        channels: Channels C of the result.
        dtype: Type of its values. float32 is also read from npy files of 16- and 64-bit floats; none may be NaN or
            infinite.
        exif: ``"apply"`` turns the picture upright by its EXIF orientation (a damaged EXIF block counts as
            none); ``"ignore"`` keeps rows and columns as stored. What Pillow does not read has none.
        max_pixels: Largest height * width that is decoded; the header tells it before any pixel is. Pillow's
            own ``PIL.Image.MAX_IMAGE_PIXELS``, a setting of the whole process, holds as well.

    Returns:
        The picture, a fresh writable array.

    Shape:
        - returns: (H, W, channels) of ``dtype``; RGB with values 0-255 by default

    Raises:
        DataError: E-DATA-010 to E-DATA-013 and E-DATA-016: no such file, not a picture, damaged, too many
            pixels, or samples of 32 bits; E-DATA-081 to E-DATA-086: another type or number of channels, tifffile
            missing, values that are not finite, or an npy or TIFF file of another layout.

    Example:
        >>> encoded = io.BytesIO()
        >>> Image.new("L", (3, 2), 7).save(encoded, "PNG")
        >>> read_image(encoded.getvalue()).shape, read_image(encoded.getvalue(), channels=1).shape
        ((2, 3, 3), (2, 3, 1))
    """
    data, path = _read_bytes(source)
    if data.startswith(NPY_START):
        return _read_npy(data, path=path, channels=channels, dtype=dtype, max_pixels=max_pixels)
    # Pillow 13 swaps the bytes of big-endian floats that were compressed once too often
    is_swapped = data.startswith(b"MM") and dtype == "float32"
    if data.startswith(TIFF_STARTS) and (channels != 1 or is_swapped) and (channels, dtype) != (3, "uint8"):
        return _read_tiff(data, path=path, channels=channels, dtype=dtype, max_pixels=max_pixels)
    image = _decode(data, path=path, max_pixels=max_pixels)
    if exif == "apply":
        turn = _UPRIGHT.get(_orientation(image))
        if turn is not None:
            image = image.transpose(turn)
    return convert_image(image, channels=channels, dtype=dtype, path=path)


def convert_image(
    image: Image.Image, *, channels: int = 3, dtype: ImageDtype = "uint8", path: str = "<image>"
) -> NDArray[Any]:
    """Convert a Pillow image by the rules of `read_image`; its EXIF orientation is left alone.

    Args:
        image: Any Pillow image.
        channels: As in `read_image`.
        dtype: As in `read_image`.
        path: What to call it in messages.

    Shape:
        - returns: (H, W, channels) of ``dtype``; RGB with values 0-255 by default

    Raises:
        DataError: E-DATA-012 or E-DATA-016: damaged, or samples of 32 bits; E-DATA-081, E-DATA-082 and E-DATA-084:
            another type or number of channels, or values that are not finite.
    """
    try:
        image.load()
    except DAMAGE as error:
        raise damaged(path, error) from error
    if dtype != "uint8":
        return _take_deep(image, channels=channels, dtype=dtype, path=path)
    if image.mode == "RGB" and channels == 3:
        return np.array(image)
    if image.mode.startswith("I;16") and channels in (1, 3):
        high_byte = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(high_byte[:, :, None], channels, axis=2)
    if image.mode not in _CONVERTIBLE:
        raise DataError(
            "E-DATA-016",
            f"picture of mode {image.mode}; allowed: 8 or 16 bits a sample, grey, palette, RGB, CMYK",
            fix="scale the values and save as 8- or 16-bit PNG",
            path=path,
        )
    if channels == 4:
        return np.array(image.convert("RGBA"))
    if channels == 2:
        if image.mode not in {"1", "L", "LA", "La"}:
            raise other_channels(path, f"colour (mode {image.mode})", channels)
        return np.array(image.convert("LA"))
    if channels not in (1, 3):
        raise other_channels(path, f"a {image.format or 'Pillow'} picture of mode {image.mode}", channels)
    if "transparency" in image.info:
        # Alpha is dropped; a palette with transparency would make Pillow warn about exactly that.
        image = image.copy()
        del image.info["transparency"]
    if channels == 1 and image.mode in {"1", "L", "LA", "La"}:
        return np.array(image.convert("LA"))[:, :, :1].copy()
    colours = np.array(image.convert("RGB"))
    if channels == 3:
        return colours
    if not (colours == colours[:, :, :1]).all():
        raise other_channels(path, "colour", channels)
    return np.ascontiguousarray(colours[:, :, :1])


def preview_image(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Make a picture of any kind one that can be looked at; never what a network sees.

    One and two channels become grey, of more the first three become red, green and blue. Values that are not 8 bits
    are stretched to 0-255, the picture's smallest to its largest.

    Args:
        image: The picture.

    Returns:
        The picture itself if it is 8-bit RGB.

    Shape:
        - image: (H, W, C) uint8, uint16 or float32
        - returns: (H, W, 3) uint8 RGB
    """
    if image.shape[2] == 3 and image.dtype == np.uint8:
        return image
    shown = image[:, :, :3].copy() if image.shape[2] >= 3 else np.repeat(image[:, :, :1], 3, axis=2)
    if shown.dtype != np.uint8:
        values = shown.astype(np.float64)
        low, high = values.min(), values.max()
        shown = np.rint((values - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    return shown


def read_labels(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Read a label map: the ids as they are stored.

    A palette PNG gives its indices, not its colours. An 8-bit grey PNG gives its values.

    Args:
        source: Path, encoded bytes, or a binary file object.
        max_pixels: As in `read_image`.

    Returns:
        Stored ids, a fresh writable array.

    Shape:
        - returns: (H, W) uint8

    Raises:
        DataError: E-DATA-010 to E-DATA-013, or E-DATA-015: no palette or 8-bit grey PNG.
    """
    data, path = _read_bytes(source)
    image = _decode(data, path=path, max_pixels=max_pixels)
    if image.format != "PNG":
        raise _label_error(path, f"label map stored as {image.format}", "where ids may have changed")
    if image.mode == "P":
        return np.array(image)
    # Pillow stretches grey samples of 1, 2 and 4 bits to 0-255. Byte 24 of a PNG is its bit depth.
    bit_depth = data[24]
    if image.mode != "L" or bit_depth != 8:
        colours = "grey" if image.mode in {"1", "L", "I;16"} else f"mode {image.mode}"
        raise _label_error(path, f"label map of {bit_depth}-bit {colours} samples", "which are not class ids")
    return np.array(image)


def write_labels(path: str | Path, labels: NDArray[np.uint8], palette: NDArray[np.uint8] | None) -> None:
    """Write a label map as a palette PNG, or as an 8-bit grey one; the file appears whole or not at all.

    Args:
        path: File to write, with suffix ``.png``; one that exists is replaced.
        labels: Train ids, or the ids that are to be stored.
        palette: Colours by id, see ``Taxonomy.colour_table``; None: grey, the ids themselves.

    Shape:
        - labels: (H, W) uint8
        - palette: (256, 3) uint8 RGB

    Raises:
        ValueError: If an array has another shape or dtype, or the suffix is not ``.png``.
        DataError: E-DATA-018, if the file cannot be written.
    """
    path = Path(path)
    _check_array(labels, "labels", dimensions=2)
    if palette is not None:
        _check_array(palette, "palette", dimensions=2)
        # With fewer colours Pillow would write fewer bits a pixel, and other ids.
        if palette.shape != (256, 3):
            raise ValueError(f"palette of shape {palette.shape}; allowed: (256, 3)")
    if path.suffix.lower() != ".png":
        raise ValueError(f"label map {path}: suffix {path.suffix!r}; allowed: .png, which keeps ids")
    image = Image.fromarray(labels)
    if palette is not None:
        image.putpalette(palette.tobytes())
    _save(image, path, image_format="PNG")


def write_image(path: str | Path, image: NDArray[np.uint8]) -> None:
    """Write a picture in the format of its suffix; the file appears whole or not at all.

    Args:
        path: File to write: ``.png``, ``.jpg``, ``.jpeg`` (quality 95) or ``.webp`` (lossless).
        image: The picture.

    Shape:
        - image: (H, W, 3) uint8 RGB

    Raises:
        ValueError: If the array has another shape or dtype, or the suffix is another one.
        DataError: E-DATA-018, if the file cannot be written.
    """
    path = Path(path)
    _check_array(image, "image", dimensions=3)
    picture = Image.fromarray(image)
    match path.suffix.lower():
        case ".png":
            _save(picture, path, image_format="PNG")
        case ".jpg" | ".jpeg":
            _save(picture, path, image_format="JPEG", quality=95)
        case ".webp":
            _save(picture, path, image_format="WEBP", lossless=True)
        case suffix:
            raise ValueError(f"picture {path}: suffix {suffix!r}; allowed: .png .jpg .jpeg .webp")


def _read_bytes(source: ImageSource) -> tuple[bytes, str]:
    """Return the encoded content and the name to use for it in messages."""
    if isinstance(source, bytes):
        return source, "<bytes>"
    if not isinstance(source, str | Path):
        return source.read(), str(getattr(source, "name", "<stream>"))
    path = Path(source)
    try:
        # A pipe would block the reader for ever.
        if not path.is_file() and path.exists():
            raise DataError("E-DATA-010", "not a regular file", fix="give the path of a picture", path=path)
        return path.read_bytes(), str(path)
    except OSError as error:
        raise DataError(
            "E-DATA-010", f"cannot be read: {error.strerror}", fix="check path and permissions", path=path
        ) from error


def _decode(data: bytes, *, path: str, max_pixels: int) -> Image.Image:
    """Decode the first picture of a file whole, as stored."""
    limit = max_pixels if Image.MAX_IMAGE_PIXELS is None else min(max_pixels, Image.MAX_IMAGE_PIXELS)
    try:
        # The size is known here; pixels are decoded by load() alone.
        image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_large(path, "more pixels than Pillow opens", limit) from error
    except UnidentifiedImageError as error:
        raise _not_an_image(data, path) from error
    except DAMAGE as error:
        raise damaged(path, error) from error
    if image.width * image.height > limit:
        raise _too_large(path, f"{image.height}x{image.width} = {image.height * image.width:,} pixels", limit)
    try:
        image.load()
    except DAMAGE as error:
        raise damaged(path, error) from error
    return image


def _take_deep(image: Image.Image, *, channels: int, dtype: ImageDtype, path: str) -> NDArray[Any]:
    """Take one channel of 16 bits or floats from a Pillow image as it is stored."""
    stored = "uint16" if image.mode.startswith("I;16") else {"F": "float32", "I": "int32"}.get(image.mode, "uint8")
    if stored != dtype:
        # of 16-bit colour Pillow has kept the high byte; by then it looks like any 8-bit picture
        colour = "; of 16-bit colour only TIFF and npy files keep all bits" if image.mode in {"RGB", "RGBA"} else ""
        raise other_dtype(path, f"{stored} (mode {image.mode}){colour}", dtype)
    if channels != 1:
        raise other_channels(path, "grey", channels)
    values = np.asarray(image).astype(dtype)  # native byte order, and fresh
    return check_finite(values[:, :, None], path=path)


class NpyHeader(NamedTuple):
    """What an npy file says about the picture in it, and where its values start."""

    size: Size
    stored: np.dtype[Any]
    fortran_order: bool
    offset: int


def read_npy_header(file: BinaryIO, *, path: str, channels: int, dtype: ImageDtype) -> NpyHeader:
    """Read the header of an npy file, and refuse it if it is no picture of these channels and this type.

    Args:
        file: Open at its start.
        path: What to call it in messages.
        channels: As in `read_image`.
        dtype: As in `read_image`.

    Raises:
        DataError: E-DATA-012, E-DATA-081, E-DATA-082 or E-DATA-085.
    """
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        read_header = readers.get(np.lib.format.read_magic(file))
        shape, fortran_order, stored = read_header(file) if read_header else ((), False, np.dtype(object))
    except (*DAMAGE, tokenize.TokenError) as error:
        raise damaged(path, error) from error
    if stored.hasobject or stored.names or len(shape) not in (2, 3):
        raise DataError(
            "E-DATA-085",
            f"npy file of {stored} and shape {shape}; allowed: plain numbers, (H, W, C), or (H, W) for one channel",
            fix="save the picture alone: numpy.save(path, array)",
            path=path,
        )
    floats = dtype == "float32" and stored.kind == "f" and stored.itemsize <= 8
    if not floats and stored.newbyteorder("=") != np.dtype(dtype):
        raise other_dtype(path, str(stored), dtype)
    height, width, stored_channels = (*shape, 1)[:3]
    if stored_channels != channels:
        order = "; channels come last" if shape[0] == channels else ""
        raise other_channels(path, f"an array of shape {shape}{order}", channels)
    if min(height, width) < 1:
        raise damaged(path, ValueError(f"no pixels: {height}x{width}"))
    return NpyHeader((height, width), stored, fortran_order, file.tell())


def _read_npy(data: bytes, *, path: str, channels: int, dtype: ImageDtype, max_pixels: int) -> NDArray[Any]:
    height, width = read_npy_header(io.BytesIO(data), path=path, channels=channels, dtype=dtype).size
    if height * width > max_pixels:
        raise _too_large(path, f"{height}x{width} = {height * width:,} pixels", max_pixels)
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except DAMAGE as error:
        raise damaged(path, error) from error
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite and is refused
        return check_finite(array.reshape(height, width, channels).astype(dtype, order="C"), path=path)


def _read_tiff(data: bytes, *, path: str, channels: int, dtype: ImageDtype, max_pixels: int) -> NDArray[Any]:
    tifffile = import_tifffile(path, f"a TIFF file read as {channels} channels")
    damage = (*DAMAGE, NotImplementedError, tifffile.TiffFileError)
    try:
        file = tifffile.TiffFile(io.BytesIO(data))
    except damage as error:
        raise damaged(path, error) from error
    with file:
        try:
            page = file.pages[0]
            axes, shape, stored = str(page.axes), tuple(page.shape), page.dtype
            height, width = int(page.imagelength), int(page.imagewidth)
        except damage as error:
            raise damaged(path, error) from error
        if axes not in ("YX", "YXS", "SYX") or stored is None:
            raise DataError(
                "E-DATA-086",
                f"TIFF whose first page has the axes {axes}; allowed: rows, columns and samples",
                fix="store all channels of a pixel in one page, or save the array as .npy",
                path=path,
            )
        if height * width > max_pixels:
            raise _too_large(path, f"{height}x{width} = {height * width:,} pixels", max_pixels)
        if stored.newbyteorder("=") != np.dtype(dtype):
            raise other_dtype(path, str(stored), dtype)
        samples = 1 if axes == "YX" else shape[2 if axes == "YXS" else 0]
        if samples != channels:
            pages = f" in the first of {len(file.pages)} pages" if len(file.pages) > 1 else ""
            raise other_channels(path, f"{samples} samples a pixel{pages}", channels)
        try:
            array = page.asarray()
        except damage as error:
            raise undecoded(path, error) from error
    if axes == "SYX":
        array = np.moveaxis(array, 0, -1)
    return check_finite(array.reshape(height, width, channels).astype(dtype, order="C"), path=path)


def import_tifffile(path: str, what: str) -> ModuleType:
    """Import the extra that reads TIFF.

    Args:
        path: What to call the file in messages.
        what: What it is needed for.

    Raises:
        DataError: E-DATA-083, if it is not there.
    """
    try:
        return importlib.import_module("tifffile")
    except ImportError as error:
        raise DataError(
            "E-DATA-083",
            f"{what} needs tifffile, which cannot be imported",
            fix='pip install "nestseg[tiff]", or save the array as .npy',
            path=path,
        ) from error


def undecoded(path: str, error: Exception) -> DataError:
    """Word that tifffile could not decode: a decoder is missing (E-DATA-083), or damage."""
    if "imagecodecs" not in str(error):
        return damaged(path, error)
    return DataError(
        "E-DATA-083",
        f"compressed in a way that tifffile alone does not read: {error}",
        fix="pip install imagecodecs, or save it uncompressed or with deflate",
        path=path,
    )


def check_finite(array: NDArray[Any], *, path: str) -> NDArray[Any]:
    """Return an array as it is.

    Args:
        array: Pixels of any type.
        path: What to call them in messages.

    Shape:
        - array: any
        - returns: the same

    Raises:
        DataError: E-DATA-084, if floats among them are NaN or infinite.
    """
    if array.dtype == np.float32 and not np.isfinite(array).all():
        wrong = int(np.count_nonzero(~np.isfinite(array)))
        raise DataError(
            "E-DATA-084",
            f"{wrong:,} of {array.size:,} values are NaN, infinite, or too large for float32",
            fix="replace them, for example with the channel's mean, and ignore these pixels in the label map",
            path=path,
        )
    return array


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation 1-8; 1 (upright) where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except DAMAGE:
        return 1


def _not_an_image(data: bytes, path: str) -> DataError:
    """Name the kind of content that no decoder took."""
    start = data[:256].lstrip().lower()
    if not data:
        reason, fix = "empty file", "fetch the file again"
    elif start.startswith(b"version https://git-lfs"):
        reason, fix = "git-lfs pointer instead of the file", "run: git lfs pull"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml")):
        reason, fix = (
            "web page (HTML or XML) instead of a picture",
            "fetch the file again from its real address",
        )
    elif not any(data):
        reason, fix = f"{len(data):,} zero bytes", "fetch the file again"
    elif data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        reason, fix = "damaged picture: its header ends early or makes no sense", "fetch the file again"
    else:
        reason = f"not a picture (first bytes {data[:8].hex(' ')}); allowed: {', '.join(IMAGE_FORMATS)}"
        fix = "convert it to PNG or JPEG, or remove it"
    return DataError("E-DATA-011", reason, fix=fix, path=path)


def damaged(path: str, error: Exception) -> DataError:
    """Word that a picture is damaged, E-DATA-012."""
    return DataError("E-DATA-012", f"damaged picture: {error}", fix="fetch the file again", path=path)


def _too_large(path: str, given: str, limit: int) -> DataError:
    return DataError(
        "E-DATA-013",
        f"{given}; allowed: {limit:,} pixels",
        fix="scale the picture down, or raise max_pixels and PIL.Image.MAX_IMAGE_PIXELS, which both hold",
        path=path,
    )


def other_dtype(path: str, stored: str, dtype: ImageDtype) -> DataError:
    """Word that a picture is stored as another type than it is wanted as, E-DATA-081."""
    return DataError(
        "E-DATA-081",
        f"picture of {stored}, wanted as {dtype}",
        fix=f"save it as {dtype}, or set the image_dtype of the recipe to what is stored, with its mean and std",
        path=path,
    )


def other_channels(path: str, stored: str, channels: int) -> DataError:
    """Word that a picture has other channels than are wanted, E-DATA-082."""
    return DataError(
        "E-DATA-082",
        f"{stored}, wanted with {channels} {'channel' if channels == 1 else 'channels'}",
        fix="save it with these channels, or set in_channels of the recipe to what is stored, with its mean and std",
        path=path,
    )


def _label_error(path: str, given: str, why: str) -> DataError:
    return DataError(
        "E-DATA-015",
        f"{given}, {why}; allowed: PNG with a palette or 8-bit grey, one class id a pixel",
        fix="save the class ids themselves as 8-bit grey PNG",
        path=path,
    )


def _check_array(array: NDArray[np.uint8], name: str, *, dimensions: int) -> None:
    if array.dtype != np.uint8 or array.ndim != dimensions or (dimensions == 3 and array.shape[2] != 3):
        wanted = "(H, W, 3)" if dimensions == 3 else "two-dimensional"
        raise ValueError(f"{name}: {array.dtype} of shape {array.shape}; allowed: uint8, {wanted}")


def _save(image: Image.Image, path: Path, *, image_format: str, **options: int) -> None:
    """Encode, then write whole or not at all."""
    encoded = io.BytesIO()
    image.save(encoded, image_format, **options)
    try:
        with replaced_file(path) as temporary:
            temporary.write_bytes(encoded.getbuffer())
    except OSError as error:
        raise unwritten(path, error) from error


def unwritten(path: Path, error: OSError) -> DataError:
    """Word that a file cannot be written, E-DATA-018."""
    return DataError(
        "E-DATA-018",
        f"cannot be written: {error.strerror}",
        fix="free space on the disk, or choose a folder that exists and is writable",
        path=path,
    )
