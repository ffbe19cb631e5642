"""Decoding pictures and label maps, and writing them."""

import io
import os
import random
import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestseg.core import image_io
from nestseg.core.errors import DataError
from nestseg.core.image_io import read_image, read_labels, write_image, write_labels

# Rows 1-2, columns 1-3 of a picture whose every pixel differs, so that a turn cannot go unseen.
COLOURS = np.array(
    [[[10, 20, 30], [40, 50, 60], [70, 80, 90]], [[110, 120, 130], [140, 150, 160], [170, 180, 190]]],
    np.uint8,
)
ERROR_SHAPE = r"^E-DATA-\d{3} \| [^|]+ \| [^|]+ \| fix: [^|]+$"


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    encoded = io.BytesIO()
    image.save(encoded, image_format, **options)
    return encoded.getvalue()


def png(image: Image.Image, **options: object) -> bytes:
    return encode(image, "PNG", **options)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def raw_png(*, height: int, width: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG made by hand, for what Pillow does not write. Each row of ``rows`` starts with a filter byte."""
    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def assert_refused(code: str, reason: str, source: object, *, read=read_image, **options: object) -> DataError:
    with pytest.raises(DataError, match=reason) as caught:
        read(source, **options)
    assert caught.value.code == code
    assert caught.value.path
    assert caught.value.fix
    with pytest.raises(DataError, match=ERROR_SHAPE):
        raise caught.value
    return caught.value


# Pictures


def test_rgb_png_is_read_as_it_is_stored_into_a_fresh_writable_array():
    image = read_image(png(Image.fromarray(COLOURS)))
    np.testing.assert_array_equal(image, COLOURS)
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert image.flags.c_contiguous


def test_path_string_bytes_and_file_object_give_the_same_picture(tmp_path):
    path = tmp_path / "a b é.png"
    path.write_bytes(png(Image.fromarray(COLOURS)))
    with path.open("rb") as file:
        from_file = read_image(file)
    for image in (read_image(path), read_image(str(path)), read_image(path.read_bytes()), from_file):
        np.testing.assert_array_equal(image, COLOURS)


@pytest.mark.parametrize(
    ("image_format", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]
)
def test_lossless_formats_keep_every_pixel(image_format, options):
    np.testing.assert_array_equal(read_image(encode(Image.fromarray(COLOURS), image_format, **options)), COLOURS)


def test_jpeg_is_close_to_its_source():
    source = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    image = read_image(encode(Image.fromarray(source), "JPEG", quality=95))
    assert np.abs(image.astype(int) - source).max() <= 3


def test_phone_jpeg_with_several_pictures_gives_the_first():
    first, second = Image.new("RGB", (16, 8), (255, 0, 0)), Image.new("RGB", (16, 8), (0, 0, 255))
    image = read_image(encode(first, "MPO", save_all=True, append_images=[second]))
    assert image.shape == (8, 16, 3)
    assert image[0, 0, 0] > 200 > 50 > image[0, 0, 2]


def test_grey_is_repeated_over_the_channels():
    grey = np.array([[0, 38, 255]], np.uint8)
    np.testing.assert_array_equal(read_image(png(Image.fromarray(grey))), np.stack([grey] * 3, axis=2))


def test_one_bit_picture_is_black_and_white():
    bilevel = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert read_image(png(bilevel)).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_palette_picture_is_read_as_its_colours_with_and_without_transparency():
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([9, 8, 7, 6, 5, 4])
    for options in ({}, {"transparency": 0}, {"transparency": b"\x00\x80"}):
        assert read_image(png(image, **options)).tolist() == [[[9, 8, 7], [6, 5, 4]]]


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_alpha_is_dropped_so_that_stored_colours_stay(alpha):
    rgba = np.dstack([COLOURS, np.full(COLOURS.shape[:2], alpha, np.uint8)])
    np.testing.assert_array_equal(read_image(png(Image.fromarray(rgba))), COLOURS)
    grey_alpha = Image.merge("LA", [Image.new("L", (1, 1), 77), Image.new("L", (1, 1), alpha)])
    assert read_image(png(grey_alpha)).tolist() == [[[77, 77, 77]]]


def test_cmyk_jpeg_becomes_rgb():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(read_image(encode(red, "JPEG")).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_by_its_high_byte_and_not_clipped(image_format):
    deep = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    image = read_image(encode(Image.fromarray(deep), image_format))
    assert image[0].tolist() == [[value] * 3 for value in (0, 0, 1, 0x12, 255)]
    assert image.dtype == np.uint8
    assert image.flags.writeable


def test_big_endian_sixteen_bit_grey_tiff_is_scaled_alike():
    pixels = np.array([[0x0102, 0xFF00]], ">u2").tobytes()
    entries = [
        (256, 2),
        (257, 1),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, len(pixels)),
    ]
    directory = struct.pack(">H", len(entries))
    directory += b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in entries) + bytes(4)
    tiff = b"MM\x00*" + struct.pack(">I", 8 + len(pixels)) + pixels + directory
    assert read_image(tiff).tolist() == [[[1, 1, 1], [255, 255, 255]]]


def test_sixteen_bit_colour_is_scaled_by_its_high_byte():
    pixel = struct.pack(">HHH", 0xFFFF, 0x0100, 0x80FF)
    deep = raw_png(height=1, width=1, bit_depth=16, colour_type=2, rows=b"\x00" + pixel)
    assert read_image(deep).tolist() == [[[255, 1, 128]]]


@pytest.mark.parametrize(("dtype", "mode"), [(np.int32, "I"), (np.float32, "F")])
def test_thirty_two_bit_samples_are_refused_because_their_range_is_unknown(dtype, mode):
    deep = encode(Image.fromarray(np.array([[1, 70000]], dtype)), "TIFF")
    assert_refused("E-DATA-016", f"mode {mode}; allowed: 8 or 16 bits", deep)


# EXIF orientation. Where the stored rows and columns go is the definition of the tag's eight values.
UPRIGHT = {
    1: COLOURS,
    2: COLOURS[:, ::-1],
    3: COLOURS[::-1, ::-1],
    4: COLOURS[::-1],
    5: COLOURS.transpose(1, 0, 2),
    6: COLOURS[::-1].transpose(1, 0, 2),
    7: COLOURS[::-1, ::-1].transpose(1, 0, 2),
    8: COLOURS.transpose(1, 0, 2)[::-1],
}


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return png(Image.fromarray(COLOURS), exif=exif)


@pytest.mark.parametrize("value", sorted(UPRIGHT))
def test_exif_orientation_turns_the_picture_upright(value):
    np.testing.assert_array_equal(read_image(with_orientation(value)), UPRIGHT[value])


@pytest.mark.parametrize("value", sorted(UPRIGHT))
def test_exif_orientation_can_be_ignored(value):
    np.testing.assert_array_equal(read_image(with_orientation(value), exif="ignore"), COLOURS)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_exif_orientation_outside_one_to_eight_counts_as_upright(value):
    np.testing.assert_array_equal(read_image(with_orientation(value)), COLOURS)


def test_damaged_exif_block_counts_as_none():
    damaged = png(Image.fromarray(COLOURS), exif=b"Exif\x00\x00this is no TIFF header")
    np.testing.assert_array_equal(read_image(damaged), COLOURS)


# Files that are no pictures


def test_missing_file_is_named(tmp_path):
    error = assert_refused("E-DATA-010", "No such file", tmp_path / "none.png")
    assert error.path == tmp_path / "none.png"
    assert "check path" in error.fix


def test_folder_and_pipe_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert_refused("E-DATA-010", "not a regular file", tmp_path / "pipe.png")
    assert_refused("E-DATA-010", "not a regular file", tmp_path)


@pytest.mark.parametrize(
    ("content", "reason", "fix"),
    [
        (b"", "empty file", "again"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "git-lfs pointer",
            "git lfs pull",
        ),
        (b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "web page", "real address"),
        (b"<?xml version='1.0'?><Error/>", "web page", "real address"),
        (bytes(2000), "2,000 zero bytes", "again"),
        (b"\x89PNG\r\n\x1a\n", "header ends early", "again"),
        (
            b"hello world",
            r"not a picture \(first bytes 68 65 6c 6c 6f 20 77 6f\); allowed: JPEG, PNG",
            "convert",
        ),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "not a picture .* allowed: JPEG, PNG", "convert"),
    ],
)
@pytest.mark.parametrize("read", [read_image, read_labels])
def test_content_that_is_no_picture_is_named_by_its_kind(tmp_path, content, reason, fix, read):
    path = tmp_path / "street 7.jpg"
    path.write_bytes(content)
    error = assert_refused("E-DATA-011", reason, path, read=read)
    assert str(path) in str(error)
    assert fix in error.fix


def test_format_outside_the_allow_list_is_refused_although_pillow_could_read_it():
    assert_refused("E-DATA-011", "not a picture", encode(Image.fromarray(COLOURS), "PPM"))


def test_jpeg_cut_in_its_pixels_is_damaged_at_every_place():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = encode(Image.fromarray(noise), "JPEG")
    start_of_scan = whole.index(b"\xff\xda")
    for cut in range(start_of_scan + 20, len(whole) - 64, 97):
        assert_refused("E-DATA-012", "damaged picture: .*truncated", whole[:cut])


def test_png_with_one_changed_byte_in_its_pixels_is_damaged():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    content = bytearray(png(Image.fromarray(noise)))
    content[content.index(b"IDAT") + 40] ^= 1
    assert_refused("E-DATA-012", "damaged picture", bytes(content))


def test_whatever_happens_to_its_bytes_a_file_is_read_or_refused_with_a_data_error():
    rng = random.Random(0)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = [
        encode(picture, "JPEG", exif=exif),
        encode(picture.convert("CMYK"), "JPEG"),
        png(picture, exif=exif),
        png(picture.quantize(9), transparency=0),
        encode(picture, "WEBP", exif=exif),
        encode(picture, "BMP"),
        encode(picture, "TIFF"),
    ]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1500):
        content = bytearray(rng.choice(whole))
        match rng.randrange(3):
            case 0:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            case 1:
                content[rng.randrange(80)] = rng.randrange(256)
            case _:
                del content[rng.randrange(len(content)) :]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = read_image(bytes(content), max_pixels=100_000)
            except DataError:
                outcomes["refused"] += 1
            else:
                assert image.ndim == 3
                assert image.shape[2] == 3
                outcomes["read"] += 1
    assert min(outcomes.values()) > 100


# Sizes


def test_picture_of_too_many_pixels_is_refused_before_its_pixels_are_decoded():
    # The header promises 8 Mpx and no pixel follows: decoding would say "damaged".
    bomb = raw_png(height=2000, width=4000, bit_depth=8, colour_type=2, rows=b"")
    error = assert_refused(
        "E-DATA-013", "2000x4000 = 8,000,000 pixels; allowed: 7,999,999 pixels", bomb, max_pixels=7_999_999
    )
    assert "max_pixels" in error.fix
    assert_refused("E-DATA-012", "damaged", bomb, max_pixels=8_000_000)


@pytest.mark.parametrize("read", [read_image, read_labels])
def test_cap_counts_pixels_exactly(read):
    grey = png(Image.fromarray(np.zeros((3, 4), np.uint8)))
    assert read(grey, max_pixels=12).shape[:2] == (3, 4)
    assert_refused("E-DATA-013", "3x4 = 12 pixels; allowed: 11", grey, read=read, max_pixels=11)


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_decompression_bomb_is_refused_by_default_whatever_pillow_does_about_it(side):
    # Pillow warns up to twice its limit and raises above; with warnings as errors it raises in both cases.
    bomb = raw_png(height=side, width=side, bit_depth=1, colour_type=0, rows=bytes(side // 8))
    assert len(bomb) < 12_000
    assert_refused("E-DATA-013", r"pixels.*; allowed: 89,478,485 pixels", bomb)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_refused("E-DATA-013", r"pixels.*; allowed: 89,478,485 pixels", bomb)


def test_pillows_own_limit_holds_below_max_pixels(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    assert_refused("E-DATA-013", "allowed: 5 pixels", png(Image.fromarray(COLOURS)), max_pixels=1000)


def test_default_cap_is_the_one_pillow_ships():
    assert image_io.MAX_PIXELS == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_thin_pictures_are_read(size):
    assert read_image(png(Image.fromarray(np.zeros((*size, 3), np.uint8)))).shape == (*size, 3)


# Label maps


def palette_labels(ids: np.ndarray, **options: object) -> bytes:
    image = Image.fromarray(ids)
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [0] * 756)  # the colours of VOC
    return png(image, **options)


def test_palette_label_map_gives_its_indices_and_neither_colours_nor_grey():
    encoded = palette_labels(np.array([[0, 1, 2, 255]], np.uint8))
    with Image.open(io.BytesIO(encoded)) as image:
        assert np.array(image.convert("L")).tolist() == [[0, 38, 75, 0]]  # what a grey reading gives
    labels = read_labels(encoded)
    assert labels.tolist() == [[0, 1, 2, 255]]
    assert labels.dtype == np.uint8
    assert labels.flags.writeable


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_label_map_of_any_bit_depth_gives_its_indices(bits):
    ids = np.array([[0, 1, 1, 0]], np.uint8)
    assert read_labels(palette_labels(ids, bits=bits)).tolist() == [[0, 1, 1, 0]]


def test_palette_label_map_with_transparency_gives_its_indices():
    assert read_labels(palette_labels(np.array([[0, 1]], np.uint8), transparency=0)).tolist() == [[0, 1]]


def test_grey_label_map_gives_its_values():
    assert read_labels(png(Image.fromarray(np.array([[0, 18, 255]], np.uint8)))).tolist() == [[0, 18, 255]]


@pytest.mark.parametrize("bit_depth", [1, 2, 4])
def test_grey_label_map_below_eight_bits_is_refused_because_pillow_stretches_it(bit_depth):
    thin = raw_png(height=1, width=1, bit_depth=bit_depth, colour_type=0, rows=b"\x00\x80")
    error = assert_refused("E-DATA-015", f"{bit_depth}-bit grey", thin, read=read_labels)
    assert "8-bit grey PNG" in error.fix


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(COLOURS), "8-bit mode RGB samples"),
        (Image.new("RGBA", (2, 2)), "8-bit mode RGBA samples"),
        (Image.new("LA", (2, 2)), "8-bit mode LA samples"),
        (Image.fromarray(np.array([[300]], np.uint16)), "16-bit grey samples"),
    ],
)
def test_label_map_of_other_samples_is_refused(tmp_path, image, reason):
    path = tmp_path / "labels.png"
    path.write_bytes(png(image))
    error = assert_refused("E-DATA-015", reason, path, read=read_labels)
    assert "allowed: PNG with a palette or 8-bit grey" in str(error)


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP", "TIFF"])
def test_label_map_in_another_format_is_refused(image_format):
    other = encode(Image.fromarray(np.zeros((8, 8), np.uint8)), image_format)
    assert_refused("E-DATA-015", f"stored as {image_format}", other, read=read_labels)


# Writing


@pytest.fixture
def palette() -> np.ndarray:
    table = np.zeros((256, 3), np.uint8)
    table[:3] = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    return table


def test_labels_come_back_as_written_with_their_palette(tmp_path, palette):
    ids = np.arange(256, dtype=np.uint8).reshape(8, 32)
    write_labels(tmp_path / "a.png", ids, palette)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), ids)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), palette[ids])
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"


def test_labels_need_not_be_contiguous(tmp_path, palette):
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    write_labels(tmp_path / "a.png", ids.T[::-1], palette)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png"), ids.T[::-1])


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".webp"])
def test_image_comes_back_as_written(tmp_path, suffix):
    write_image(tmp_path / f"a{suffix}", COLOURS)
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), COLOURS)


def test_image_is_written_as_jpeg_by_suffix(tmp_path):
    write_image(tmp_path / "a.jpeg", np.full((8, 8, 3), 90, np.uint8))
    assert (tmp_path / "a.jpeg").read_bytes().startswith(b"\xff\xd8\xff")
    assert np.abs(read_image(tmp_path / "a.jpeg").astype(int) - 90).max() <= 2


def test_writing_replaces_a_file_and_leaves_nothing_else(tmp_path, palette):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    write_labels(path, np.ones((2, 2), np.uint8), palette)
    assert read_labels(path).tolist() == [[1, 1], [1, 1]]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_written_file_has_the_permissions_of_a_new_file(tmp_path, palette):
    (tmp_path / "plain").touch()
    write_labels(tmp_path / "a.png", np.ones((2, 2), np.uint8), palette)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.png")}
    assert len(modes) == 1


def test_name_may_be_as_long_as_the_file_system_allows(tmp_path, palette):
    path = tmp_path / ("n" * 251 + ".png")
    write_labels(path, np.ones((2, 2), np.uint8), palette)
    assert read_labels(path).shape == (2, 2)


def test_folder_that_does_not_exist_is_named(tmp_path, palette):
    path = tmp_path / "none" / "a.png"

    def write_both(path: Path) -> None:
        with pytest.raises(DataError, match=r"^E-DATA-018 \| .*none/a\.png \| cannot be written: No such file"):
            write_labels(path, np.ones((2, 2), np.uint8), palette)
        write_image(path, COLOURS)

    assert_refused("E-DATA-018", "cannot be written: No such file", path, read=write_both)


def test_failure_while_writing_keeps_the_old_file_and_leaves_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    error = assert_refused("E-DATA-018", "No space left", path, read=lambda path: write_image(path, COLOURS))
    assert "free space" in error.fix
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (np.zeros((2, 2), np.int64), "labels: int64"),
        (np.zeros((2, 2, 3), np.uint8), r"labels: uint8 of shape \(2, 2, 3\)"),
    ],
)
def test_labels_of_wrong_dtype_or_shape_are_a_value_error(tmp_path, palette, labels, reason):
    with pytest.raises(ValueError, match=reason):
        write_labels(tmp_path / "a.png", labels, palette)
    assert not list(tmp_path.iterdir())


def test_image_palette_and_suffix_are_checked(tmp_path, palette):
    with pytest.raises(ValueError, match=r"image: uint8 of shape \(2, 2\)"):
        write_image(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"allowed: \(256, 3\)"):
        write_labels(tmp_path / "a.png", np.zeros((2, 2), np.uint8), palette[:3])
    with pytest.raises(ValueError, match=r"'\.jpg'; allowed: \.png"):
        write_labels(tmp_path / "a.jpg", np.zeros((2, 2), np.uint8), palette)
    with pytest.raises(ValueError, match=r"'\.tif'; allowed: \.png \.jpg"):
        write_image(Path(tmp_path / "a.tif"), COLOURS)
