"""Pictures read in windows, and label maps written in strips."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from nestseg.core import label_sink
from nestseg.core.errors import DataError
from nestseg.core.image_io import read_image, read_labels
from nestseg.core.label_sink import LabelSink
from nestseg.core.large_image import ArrayWindows, _PieceWindows, image_size, is_zarr, open_windows
from nestseg.core.resize import Window

SIZE = (75, 101)
RANDOM = np.random.default_rng(0)
PALETTE = RANDOM.integers(0, 256, (256, 3), np.uint8)


def draw(channels: int | None, dtype: str = "uint8") -> np.ndarray:
    shape = SIZE if channels is None else (*SIZE, channels)
    if dtype.startswith("float"):
        return RANDOM.normal(size=shape).astype(dtype)
    return RANDOM.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def assert_windows_are_those_of(expected: np.ndarray, path: Path, **kind: object) -> None:
    with open_windows(path, **kind) as source:
        assert (source.size, source.channels, source.dtype) == (SIZE, expected.shape[2], expected.dtype)
        whole = source.read(Window(0, 0, *SIZE))
        assert whole.dtype == expected.dtype
        assert np.array_equal(whole, expected)
        for top, left, height, width in [
            (0, 0, 1, 1),
            (74, 100, 1, 1),
            (10, 60, 40, 41),
            (3, 0, 2, 101),
            (31, 31, 2, 2),
        ]:
            part = source.read(Window(top, left, height, width))
            assert np.array_equal(part, expected[top : top + height, left : left + width])
            assert part.flags.writeable


LAYOUTS = {
    "tiles": {"tile": (16, 32), "compression": "zlib"},
    "tiles with predictor": {"tile": (32, 16), "compression": "zlib", "predictor": True},
    "tiles, uncompressed": {"tile": (16, 16)},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "one strip": {"rowsperstrip": SIZE[0], "compression": "zlib"},
    "uncompressed": {},
    "uncompressed strips": {"rowsperstrip": 8},
    "big endian": {"byteorder": ">"},
    "big endian tiles": {"byteorder": ">", "tile": (16, 16), "compression": "zlib"},
    "BigTIFF": {"bigtiff": True, "tile": (16, 16), "compression": "zlib"},
    "lzma": {"tile": (16, 16), "compression": "lzma"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ((3, "uint8"), {}),
        ((4, "uint8"), {}),
        ((None, "uint8"), {}),
        ((None, "uint8"), {"channels": 1}),
        ((None, "uint16"), {"channels": 1}),
        ((None, "uint16"), {"channels": 1, "dtype": "uint16"}),
        ((3, "uint16"), {"dtype": "uint16"}),
        ((5, "uint8"), {"channels": 5}),
        ((None, "float32"), {"channels": 1, "dtype": "float32"}),
        ((2, "float32"), {"channels": 2, "dtype": "float32"}),
    ],
    ids=str,
)
def test_windows_of_a_tiff_are_cut_from_what_read_image_gives(tmp_path, layout, stored, kind):
    path, options = tmp_path / "a.tif", dict(LAYOUTS[layout])
    if options.get("predictor") and stored[1] == "float32":
        options["predictor"] = False  # that of floats needs more than tifffile
    photometric = "rgb" if stored[0] in (3, 4) else "minisblack"
    if stored[0] == 4:
        options["extrasamples"] = ["unassalpha"]
    byteorder, bigtiff = options.pop("byteorder", None), options.pop("bigtiff", None)
    planar = None if stored[0] is None else "contig"
    with tifffile.TiffWriter(path, byteorder=byteorder, bigtiff=bigtiff) as file:
        file.write(image := draw(*stored), photometric=photometric, planarconfig=planar, **options)
    expected = read_image(path, **kind)
    if expected.dtype == image.dtype and stored[0] in (None, expected.shape[2]):
        assert np.array_equal(expected, np.broadcast_to(image.reshape(*SIZE, -1), expected.shape))
    assert_windows_are_those_of(expected, path, **kind)


@pytest.mark.parametrize("compression", ["packbits", "tiff_lzw", "jpeg"])
def test_compression_of_others_is_read_as_pillow_reads_it_or_names_the_missing_package(tmp_path, compression):
    Image.fromarray(draw(3)).save(tmp_path / "a.tif", compression=compression)
    if compression == "packbits" or find_spec("imagecodecs"):
        assert_windows_are_those_of(read_image(tmp_path / "a.tif"), tmp_path / "a.tif")
    else:
        with open_windows(tmp_path / "a.tif") as source, pytest.raises(DataError, match=r"E-DATA-083 .*imagecodecs"):
            source.read(Window(0, 0, 1, 1))


@pytest.mark.parametrize("options", [{}, {"tile": (16, 16), "compression": "zlib"}, {"rowsperstrip": 9}], ids=str)
def test_planes_are_read_from_their_places(tmp_path, options):
    image = draw(3, "uint16")
    tifffile.imwrite(
        tmp_path / "a.tif", np.moveaxis(image, 2, 0), photometric="rgb", planarconfig="separate", **options
    )
    assert_windows_are_those_of(image, tmp_path / "a.tif", dtype="uint16")


def test_of_16_bit_colour_8_bits_are_the_high_byte(tmp_path):
    image = draw(3, "uint16")
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", tile=(16, 16))
    assert_windows_are_those_of((image >> 8).astype(np.uint8), tmp_path / "a.tif")


def test_tile_that_was_left_out_is_a_hole_of_zeros(tmp_path):
    image = draw(3)
    image[16:32, 16:32] = 0
    tiles = [image[y : y + 16, x : x + 16] for y in range(0, 75, 16) for x in range(0, 101, 16)]
    tiles[8] = None  # row 1, column 1 of 7
    padded = (
        None if tile is None else np.pad(tile, [(0, 16 - tile.shape[0]), (0, 16 - tile.shape[1]), (0, 0)])
        for tile in tiles
    )
    tifffile.imwrite(
        tmp_path / "a.tif",
        padded,
        shape=image.shape,
        dtype="uint8",
        photometric="rgb",
        tile=(16, 16),
        compression="zlib",
    )
    assert_windows_are_those_of(image, tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        (draw(3), {}),
        (draw(None), {"channels": 1}),
        (draw(6, "uint16"), {"channels": 6, "dtype": "uint16"}),
        (draw(2, "float64"), {"channels": 2, "dtype": "float32"}),
        (draw(1, "float16").astype(">f2"), {"channels": 1, "dtype": "float32"}),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, np.ndarray) else "",
)
def test_windows_of_npy_and_zarr_are_cut_from_what_read_image_gives(tmp_path, stored, kind):
    np.save(tmp_path / "a.npy", stored)
    expected = read_image(tmp_path / "a.npy", **kind)
    assert_windows_are_those_of(expected, tmp_path / "a.npy", **kind)
    for version in (2, 3):
        path = tmp_path / f"{version}.zarr"
        chunks = (16, 32, 1)[: stored.ndim]
        values = stored.astype(stored.dtype.newbyteorder("="))
        zarr.create_array(str(path), shape=stored.shape, chunks=chunks, dtype=values.dtype, zarr_format=version)[:] = (
            values
        )
        assert is_zarr(path)
        assert image_size(path) == SIZE
        assert_windows_are_those_of(expected, path, **kind)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_what_is_decoded_whole_is_read_in_windows_too(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(draw(3)).save(path)
    assert_windows_are_those_of(read_image(path), path)
    with pytest.raises(
        DataError, match=r"E-DATA-100 .*75x101 = 7,575 .*allowed: 7,574 .*TIFF, .npy or zarr.*--max-pixels"
    ):
        open_windows(path, max_pixels=7574).__enter__()


def test_the_cap_holds_only_for_what_is_decoded_whole(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", draw(3), photometric="rgb")
    np.save(tmp_path / "a.npy", draw(3))
    for path in tmp_path.iterdir():
        with open_windows(path, max_pixels=1) as source:
            assert source.size == SIZE


def png_that_claims(height: int, width: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + struct.pack(">I", 9)
        + b"IDAT"
        + bytes(13)
    )


def test_size_is_told_by_the_header_alone_however_large(tmp_path):
    (tmp_path / "a.png").write_bytes(png_that_claims(70_000, 80_000))
    assert image_size(tmp_path / "a.png") == (70_000, 80_000)
    with pytest.raises(DataError, match=r"E-DATA-100 .*70000x80000"):
        open_windows(tmp_path / "a.png").__enter__()
    for byteorder, big in [("<", False), (">", False), ("<", True), (">", True)]:
        with tifffile.TiffWriter(tmp_path / "a.tif", byteorder=byteorder, bigtiff=big) as file:
            file.write(draw(7), photometric="minisblack", planarconfig="contig")
        assert image_size(tmp_path / "a.tif") == SIZE
    for suffix in ("jpg", "webp", "bmp"):
        Image.new("RGB", (101, 75)).save(tmp_path / f"b.{suffix}")
        assert image_size(tmp_path / f"b.{suffix}") == SIZE
    for name, array in {"c": draw(3), "d": draw(None)}.items():
        np.save(tmp_path / f"{name}.npy", array)
        assert image_size(tmp_path / f"{name}.npy") == SIZE


@pytest.mark.parametrize(
    "content", [b"", b"no picture", b"\x89PNG", b"II*\0", b"II+\0" + bytes(20), b"\x93NUMPY\x01", b"\x93NUMPY\x09\x00"]
)
def test_header_that_makes_no_sense_has_no_size_and_is_named_by_the_reader(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    assert image_size(tmp_path / "a") is None
    with pytest.raises(DataError, match=r"E-DATA-(011|012|085) .* fix: "):
        open_windows(tmp_path / "a").__enter__()


def test_missing_file_folder_and_pipe_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "none.tif", tmp_path, tmp_path / "pipe.png"):
        assert image_size(path) is None
        with pytest.raises(DataError, match="E-DATA-010"):
            open_windows(path).__enter__()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"photometric": "miniswhite"}, "MINISWHITE"),
        ({"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "PALETTE"),
        ({"photometric": "minisblack", "extratags": [(274, 3, 1, 6, True)]}, "orientation 6"),
    ],
)
def test_tiff_that_would_be_turned_inverted_or_looked_up_is_refused(tmp_path, options, words):
    tifffile.imwrite(tmp_path / "a.tif", draw(None), tile=(16, 16), **options)
    with pytest.raises(DataError, match=f"E-DATA-101 .*{words}.* fix: "):
        open_windows(tmp_path / "a.tif").__enter__()


@pytest.mark.parametrize(
    ("stored", "kind", "code"),
    [
        ((5, "uint8"), {}, "E-DATA-082"),
        ((3, "uint8"), {"channels": 4}, "E-DATA-082"),
        ((None, "uint16"), {"channels": 2}, "E-DATA-081"),
        ((3, "uint8"), {"dtype": "float32"}, "E-DATA-081"),
        ((None, "int16"), {"channels": 1}, "E-DATA-081"),
    ],
)
def test_other_channels_or_type_are_refused_on_opening(tmp_path, stored, kind, code):
    image = draw(*stored)
    photometric = "rgb" if stored[0] == 3 else "minisblack"
    tifffile.imwrite(
        tmp_path / "a.tif", image, photometric=photometric, planarconfig=stored[0] and "contig", tile=(16, 16)
    )
    np.save(tmp_path / "a.npy", image)
    zarr.create_array(str(tmp_path / "a.zarr"), shape=image.shape, chunks=image.shape, dtype=image.dtype)
    for path in (tmp_path / "a.tif", tmp_path / "a.npy", tmp_path / "a.zarr"):
        if path.suffix != ".tif" and stored == (None, "uint16"):
            continue  # npy and zarr know one channel only as one, never as colour
        with pytest.raises(DataError, match=code):
            open_windows(path, **kind).__enter__()


def test_colour_that_is_wanted_as_grey_is_refused_where_it_is_met(tmp_path):
    image = np.repeat(draw(1), 3, axis=2)
    image[70, 90] = (1, 2, 3)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", tile=(16, 16), compression="zlib")
    with open_windows(tmp_path / "a.tif", channels=1) as source:
        assert np.array_equal(source.read(Window(0, 0, 60, 101)), image[:60, :, :1])
        with pytest.raises(DataError, match=r"E-DATA-082 .*colour"):
            source.read(Window(60, 80, 15, 21))


def test_infinite_value_is_refused_where_it_is_met(tmp_path):
    image = draw(2, "float32")
    image[70, 90, 1] = np.inf
    np.save(tmp_path / "a.npy", image)
    with (
        open_windows(tmp_path / "a.npy", channels=2, dtype="float32") as source,
        pytest.raises(DataError, match="E-DATA-084"),
    ):
        source.read(Window(60, 0, 15, 101))


def test_rows_cannot_be_read_from_columns(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(draw(3)))
    with pytest.raises(DataError, match=r"E-DATA-102 .*ascontiguousarray"):
        open_windows(tmp_path / "a.npy").__enter__()


def test_pieces_that_are_too_large_are_refused_before_one_is_read(tmp_path):
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(12_000, 12_000, 3), chunks=(12_000, 12_000, 3), dtype="uint8")
    with pytest.raises(DataError, match=r"E-DATA-102 .*12000x12000 .* 432,000,000 .*134,217,728 .* fix: .*tiles"):
        open_windows(tmp_path / "a.zarr").__enter__()
    rows = (np.zeros((12_000, 12_000), np.uint8) for _ in range(1))
    tifffile.imwrite(
        tmp_path / "a.tif",
        rows,
        shape=(12_000, 12_000),
        dtype="uint8",
        rowsperstrip=12_000,
        compression="zlib",
        photometric="minisblack",
    )
    with pytest.raises(DataError, match=r"E-DATA-102 .*12000x12000"):
        open_windows(tmp_path / "a.tif").__enter__()


def test_zarr_that_holds_no_picture_is_refused(tmp_path):
    zarr.open_group(str(tmp_path / "group.zarr"), mode="w")
    zarr.create_array(str(tmp_path / "deep.zarr"), shape=(2, 3, 4, 5), chunks=(2, 3, 4, 5), dtype="uint8")
    for name, words in {"group": "no zarr array", "deep": r"\(2, 3, 4, 5\)"}.items():
        assert image_size(tmp_path / f"{name}.zarr") is None
        with pytest.raises(DataError, match=f"E-DATA-104 .*{words}.* fix: "):
            open_windows(tmp_path / f"{name}.zarr").__enter__()
    (tmp_path / "group.zarr" / "zarr.json").write_text("{")
    with pytest.raises(DataError, match="E-DATA-104"):
        open_windows(tmp_path / "group.zarr").__enter__()


def test_missing_extras_are_named(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", draw(3), photometric="rgb")
    zarr.create_array(str(tmp_path / "a.zarr"), shape=(4, 4), chunks=(4, 4), dtype="uint8")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    monkeypatch.setitem(sys.modules, "zarr", None)
    for name, code, extra in [("a.tif", "E-DATA-083", "tiff"), ("a.zarr", "E-DATA-103", "zarr")]:
        with pytest.raises(DataError, match=rf"{code} .*nestseg\[{extra}\]"):
            open_windows(tmp_path / name).__enter__()


@pytest.mark.parametrize("window", [(-1, 0, 2, 2), (0, 100, 1, 2), (75, 0, 1, 1), (0, 0, 0, 1)])
def test_window_outside_is_our_own_mistake(tmp_path, window):
    np.save(tmp_path / "a.npy", draw(3))
    with open_windows(tmp_path / "a.npy") as source, pytest.raises(ValueError, match="not inside"):
        source.read(Window(*window))
    with pytest.raises(ValueError, match="not inside"):
        ArrayWindows(draw(3)).read(Window(*window))


def test_a_walk_over_windows_decodes_each_piece_once_a_row_of_windows_and_keeps_no_more_rows_than_it_needs():
    decoded: list[tuple[int, int]] = []

    def decode(row: int, column: int) -> np.ndarray:
        decoded.append((row, column))
        return np.zeros((10, 10, 1), np.uint8)

    source = _PieceWindows((100, 100), (10, 10), channels=1, dtype="uint8", decode=decode)
    for top in range(0, 90, 10):
        for left in range(0, 81, 5):
            source.read(Window(top, left, 20, 20))
            assert len(source._kept) <= 2 * 10
    assert sorted(decoded) == [(row, column) for row in range(10) for column in range(10)]


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
@pytest.mark.parametrize("size", [(1, 1), (3, 700), (512, 512), (513, 1025), (1100, 30)])
def test_label_map_written_in_strips_is_the_label_map(tmp_path, suffix, size):
    labels = RANDOM.integers(0, 256, size, np.uint8)
    path = tmp_path / f"labels.{suffix}"
    with LabelSink(path, size, palette=PALETTE) as sink:
        top = 0
        for height in [1, 2, 511, 0, 3, *[37] * 40]:
            strip = labels[top : top + height]
            sink.write(top, strip)
            top += len(strip)
    with Image.open(path) as image:
        assert image.mode == "P"
        assert np.array_equal(np.asarray(image), labels)
        assert np.array_equal(np.array(image.convert("RGB")), PALETTE[labels])
    if suffix == "png":
        assert np.array_equal(read_labels(path), labels)
    else:
        with tifffile.TiffFile(path) as file:
            page = file.pages[0]
            assert (page.is_tiled, page.tile, file.is_bigtiff) == (True, (512, 512), False)
            assert np.array_equal(page.asarray(), labels)
            assert np.array_equal(page.colormap, PALETTE.T.astype(np.uint16) * 257)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_label_map_that_may_exceed_4_gib_is_a_bigtiff(tmp_path, monkeypatch):
    labels = RANDOM.integers(0, 256, (600, 1100), np.uint8)
    monkeypatch.setattr(label_sink, "_CLASSIC_BYTES", 1000)
    with LabelSink(tmp_path / "a.tif", (600, 1100), palette=PALETTE) as sink:
        sink.write(0, labels)
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_bigtiff
        assert np.array_equal(file.asarray(), labels)
    with Image.open(tmp_path / "a.tif") as image:
        assert np.array_equal(np.asarray(image), labels)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_label_map_appears_whole_or_not_at_all(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"old")
    with suppress(KeyboardInterrupt), LabelSink(path, (4, 4), palette=PALETTE) as sink:
        sink.write(0, np.zeros((4, 4), np.uint8))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="2 of 4 rows"), LabelSink(path, (4, 4), palette=PALETTE) as sink:
        sink.write(0, np.zeros((2, 4), np.uint8))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_rows_out_of_turn_are_our_own_mistake(tmp_path):
    with pytest.raises(ValueError, match="suffix"):
        LabelSink(tmp_path / "a.jpg", (4, 4), palette=PALETTE)
    with pytest.raises(ValueError, match="palette"):
        LabelSink(tmp_path / "a.png", (4, 4), palette=PALETTE[:3])
    for top, labels in [
        (1, np.zeros((1, 4), np.uint8)),
        (0, np.zeros((5, 4), np.uint8)),
        (0, np.zeros((1, 3), np.uint8)),
        (0, np.zeros((1, 4), np.int64)),
    ]:
        with pytest.raises(ValueError, match="allowed"), LabelSink(tmp_path / "a.png", (4, 4), palette=PALETTE) as sink:
            sink.write(top, labels)
    with pytest.raises(DataError, match="E-DATA-018"):
        LabelSink(tmp_path / "none" / "a.png", (4, 4), palette=PALETTE).__enter__()


def test_file_object_of_a_pillow_format_is_not_kept_open(tmp_path):
    encoded = io.BytesIO()
    Image.fromarray(draw(3)).save(encoded, "PNG")
    (tmp_path / "a.png").write_bytes(encoded.getvalue())
    image_size(tmp_path / "a.png")  # a file left open would be a ResourceWarning, and so an error
    (tmp_path / "a.png").unlink()
