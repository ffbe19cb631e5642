"""Pictures that are not 8-bit RGB: read as they are stored, augmented, batched, normalised, predicted; or refused."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from nestseg.core.errors import DataError, RecipeError, WeightsError
from nestseg.core.image_io import preview_image, read_image
from nestseg.core.resize import resize_image
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample
from nestseg.data.augment import (
    ColourJitter,
    CopyPaste,
    CutMix,
    RandomErasing,
    Rotation,
    blur_image,
    make_torchvision_transform,
)
from nestseg.data.loader import BatchPlan, collate, training_batches
from nestseg.data.transforms import TrainTransform, sample_generator
from nestseg.inference.predictor import Predictor, open_image
from nestseg.models.segmenter import create_model
from nestseg.weights.channels import adapt_first_convolution

KINDS = [
    (1, "uint8"),
    (2, "uint8"),
    (4, "uint8"),
    (1, "uint16"),
    (4, "uint16"),
    (6, "uint16"),
    (1, "float32"),
    (5, "float32"),
]
TAXONOMY = Taxonomy(name="toy", classes=("dark", "bright"), palette=((0, 0, 0), (255, 255, 255)))


def make_pixels(channels, dtype, *, size=(11, 13), seed=0):
    values = np.random.default_rng(seed).random((*size, channels))
    scale = {"uint8": 255, "uint16": 65535, "float32": 4.0}[dtype]
    return (values * scale - (2 if dtype == "float32" else 0)).astype(dtype)


def encode(pixels, image_format, **options):
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, image_format, **options)
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def tiff(array, **options):
    stream = io.BytesIO()
    tifffile.imwrite(stream, array, photometric=options.pop("photometric", "minisblack"), **options)
    return stream.getvalue()


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "BMP", "WEBP"])
def test_grey_is_read_as_one_channel(image_format):
    pixels = make_pixels(1, "uint8")[..., 0]
    options = {"lossless": True} if image_format == "WEBP" else {}
    image = read_image(encode(pixels, image_format, **options), channels=1)
    np.testing.assert_array_equal(image[..., 0], pixels)  # WebP holds no grey: its three channels are alike
    assert image.shape == (11, 13, 1)
    assert image.flags.writeable
    assert image.flags.c_contiguous


def test_alpha_is_kept_where_there_are_channels_for_it():
    pixels = make_pixels(4, "uint8")
    np.testing.assert_array_equal(read_image(encode(pixels, "PNG"), channels=4), pixels)
    np.testing.assert_array_equal(read_image(encode(pixels, "PNG")), pixels[..., :3])
    grey = make_pixels(2, "uint8")
    np.testing.assert_array_equal(read_image(encode(grey, "PNG"), channels=2), grey)
    np.testing.assert_array_equal(read_image(encode(grey, "PNG"), channels=1), grey[..., :1])


def test_what_has_no_alpha_is_opaque():
    pixels = make_pixels(3, "uint8")
    image = read_image(encode(pixels, "PNG"), channels=4)
    np.testing.assert_array_equal(image[..., :3], pixels)
    assert (image[..., 3] == 255).all()
    assert (read_image(encode(pixels[..., 0], "PNG"), channels=2)[..., 1] == 255).all()
    clear = Image.new("P", (2, 1))
    clear.putpalette([9, 8, 7, 1, 2, 3])
    clear.putpixel((1, 0), 1)
    assert read_image(encode(clear, "PNG", transparency=1), channels=4).tolist() == [[[9, 8, 7, 255], [1, 2, 3, 0]]]


def test_sixteen_bit_grey_keeps_all_bits_or_the_high_byte():
    deep = np.array([[0, 255, 256, 65535]], np.uint16)
    for encoded in (encode(deep, "PNG"), encode(deep, "TIFF"), tiff(deep), tiff(deep, byteorder=">")):
        image = read_image(encoded, channels=1, dtype="uint16")
        assert image.dtype == np.dtype("=u2")
        assert image.tolist() == [[[0], [255], [256], [65535]]]
        assert read_image(encoded, channels=1).tolist() == [[[0], [0], [1], [255]]]


def test_float_tiff_is_read_without_an_extra():
    pixels = make_pixels(1, "float32")[..., 0]
    np.testing.assert_array_equal(read_image(encode(pixels, "TIFF"), channels=1, dtype="float32")[..., 0], pixels)


@pytest.mark.parametrize(("channels", "dtype"), [*KINDS, (3, "uint8"), (3, "uint16")])
def test_npy_is_read_as_it_is(channels, dtype):
    pixels = make_pixels(channels, dtype)
    for stored in (pixels, np.asfortranarray(pixels), pixels.astype(pixels.dtype.newbyteorder(">"))):
        image = read_image(npy(stored), channels=channels, dtype=dtype)
        np.testing.assert_array_equal(image, pixels)
        assert image.dtype == dtype
        assert image.flags.c_contiguous
        assert image.flags.writeable


def test_npy_of_one_channel_may_be_flat_and_of_other_floats():
    pixels = np.array([[1.5, -2.0]])
    for dtype in (np.float16, np.float32, np.float64):
        assert read_image(npy(pixels.astype(dtype)), channels=1, dtype="float32").tolist() == [[[1.5], [-2.0]]]


@pytest.mark.parametrize(
    ("channels", "dtype"), [(2, "uint8"), (4, "uint8"), (3, "uint16"), (6, "uint16"), (5, "float32")]
)
def test_tiff_of_many_channels_is_read_interleaved_and_in_planes(channels, dtype):
    pixels = make_pixels(channels, dtype)
    planes = np.moveaxis(pixels, -1, 0)
    for encoded in (
        tiff(pixels, planarconfig="contig"),
        tiff(planes, planarconfig="separate"),
        tiff(pixels, planarconfig="contig", compression="zlib", byteorder=">"),
        tiff(pixels, planarconfig="contig", bigtiff=True, tile=(16, 16)),
    ):
        image = read_image(encoded, channels=channels, dtype=dtype)
        np.testing.assert_array_equal(image, pixels)
        assert image.dtype == np.dtype(dtype)
        assert image.flags.c_contiguous


def test_near_infrared_of_a_four_channel_tiff_is_no_alpha():
    pixels = make_pixels(4, "uint8")
    np.testing.assert_array_equal(
        read_image(tiff(pixels, photometric="rgb", extrasamples=["unspecified"]), channels=4), pixels
    )


def test_exif_orientation_turns_pictures_of_any_kind():
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = make_pixels(1, "uint16")[..., 0]
    encoded = encode(deep, "PNG", exif=exif)
    np.testing.assert_array_equal(read_image(encoded, channels=1, dtype="uint16")[..., 0], np.rot90(deep, -1))
    np.testing.assert_array_equal(read_image(encoded, channels=1, dtype="uint16", exif="ignore")[..., 0], deep)


SIXTEEN = make_pixels(1, "uint16")[..., 0]
COLOUR = make_pixels(3, "uint8")


@pytest.mark.parametrize(
    ("encoded", "channels", "dtype", "code", "words"),
    [
        (encode(COLOUR, "PNG"), 1, "uint8", "E-DATA-082", "colour, wanted with 1 channel "),
        (encode(COLOUR, "PNG"), 2, "uint8", "E-DATA-082", "wanted with 2 channels"),
        (encode(COLOUR, "PNG"), 5, "uint8", "E-DATA-082", "a PNG picture of mode RGB"),
        (encode(COLOUR, "PNG"), 3, "uint16", "E-DATA-081", "of 16-bit colour only TIFF and npy"),
        (encode(COLOUR[..., 0], "PNG"), 1, "uint16", "E-DATA-081", "picture of uint8 (mode L), wanted as uint16"),
        (encode(SIXTEEN, "PNG"), 1, "float32", "E-DATA-081", "picture of uint16"),
        (encode(SIXTEEN, "PNG"), 3, "uint16", "E-DATA-082", "grey, wanted with 3 channels"),
        (encode(SIXTEEN, "PNG"), 4, "uint8", "E-DATA-016", "mode I;16"),
        (encode(SIXTEEN.astype(np.int32), "TIFF"), 1, "float32", "E-DATA-081", "int32"),
        (npy(SIXTEEN), 1, "uint8", "E-DATA-081", "picture of uint16, wanted as uint8"),
        (npy(SIXTEEN.astype(np.int64)), 1, "float32", "E-DATA-081", "int64"),
        (npy(np.zeros((4, 9, 9), np.uint8)), 4, "uint8", "E-DATA-082", "(4, 9, 9); channels come last"),
        (npy(np.zeros((9, 9), np.uint8)), 3, "uint8", "E-DATA-082", "wanted with 3 channels"),
        (npy(np.zeros((1, 2, 3, 4), np.uint8)), 4, "uint8", "E-DATA-085", "shape (1, 2, 3, 4)"),
        (npy(np.zeros((2, 2), [("a", "u1")])), 1, "uint8", "E-DATA-085", "plain numbers"),
        (npy(np.zeros((0, 2), np.uint8)), 1, "uint8", "E-DATA-012", "no pixels"),
        (npy(np.zeros((9, 9), np.uint8))[:-1], 1, "uint8", "E-DATA-012", "damaged"),
        (npy(np.zeros((9, 9), np.uint8))[:20], 1, "uint8", "E-DATA-012", "damaged"),
        (npy(np.array([[np.nan, 1.0]])), 1, "float32", "E-DATA-084", "1 of 2 values"),
        (npy(np.array([[1e39, 1.0]])), 1, "float32", "E-DATA-084", "too large for float32"),
        (encode(np.full((2, 2), np.inf, np.float32), "TIFF"), 1, "float32", "E-DATA-084", "4 of 4 values"),
        (tiff(make_pixels(5, "uint16"), planarconfig="contig"), 6, "uint16", "E-DATA-082", "5 samples a pixel"),
        (tiff(make_pixels(5, "uint16"), planarconfig="contig"), 5, "float32", "E-DATA-081", "uint16"),
        (tiff(np.zeros((4, 9, 9), np.uint16)), 4, "uint16", "E-DATA-082", "1 samples a pixel in the first of 4 pages"),
        (tiff(make_pixels(5, "uint16"), planarconfig="contig")[:60], 5, "uint16", "E-DATA-012", "damaged"),
        (b"II*\0" + b"\xff" * 40, 5, "uint16", "E-DATA-012", "damaged"),
    ],
)  # fmt: skip
def test_what_is_stored_otherwise_is_refused_in_words(encoded, channels, dtype, code, words):
    with pytest.raises(DataError, match=f"{code} .* fix: ") as caught:
        read_image(encoded, channels=channels, dtype=dtype)
    assert words in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).code == code


def test_pickled_objects_in_npy_are_never_loaded():
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("was loaded",))

    array = np.empty((2, 2), object)
    array[:] = Bomb()
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    with pytest.raises(DataError, match="E-DATA-085"):
        read_image(stream.getvalue(), channels=1)


def test_an_npy_header_that_claims_more_than_it_holds_takes_no_memory():
    header = npy(np.zeros((1, 1), np.uint8)).replace(b"(1, 1)", b"(9000, 9000)")
    header = header[:8] + (int.from_bytes(header[8:10], "little") + 6).to_bytes(2, "little") + header[10:]
    with pytest.raises(DataError, match="E-DATA-012"):
        read_image(header, channels=1)
    with pytest.raises(DataError, match="E-DATA-013"):
        read_image(header, channels=1, max_pixels=1000)
    with pytest.raises(DataError, match="E-DATA-013"):
        read_image(tiff(make_pixels(5, "uint16"), planarconfig="contig"), channels=5, dtype="uint16", max_pixels=100)


def test_whatever_happens_to_its_bytes_a_file_is_read_or_refused():
    # T24, P12
    rng = np.random.default_rng(0)
    for encoded, channels, dtype in (
        (npy(make_pixels(4, "uint16")), 4, "uint16"),
        (tiff(make_pixels(5, "uint16"), planarconfig="contig", compression="zlib"), 5, "uint16"),
        (tiff(make_pixels(2, "float32"), planarconfig="contig", tile=(16, 16)), 2, "float32"),
        (encode(SIXTEEN, "PNG"), 1, "uint16"),
    ):
        for _ in range(150):
            damaged = bytearray(encoded)
            for place in rng.integers(0, min(len(encoded), 400), 3):
                damaged[place] = rng.integers(0, 256)
            try:
                image = read_image(bytes(damaged), channels=channels, dtype=dtype)
            except DataError:
                continue
            assert image.dtype == dtype
            assert image.shape[2] == channels


def test_missing_tifffile_is_named_with_the_install_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(DataError, match=r"E-DATA-083 .* fix: pip install \"nestseg\[tiff\]\""):
        read_image(tiff(make_pixels(5, "uint16"), planarconfig="contig"), channels=5, dtype="uint16")
    assert read_image(tiff(SIXTEEN), channels=1, dtype="uint16").shape == (11, 13, 1)


def test_preview_can_be_looked_at_and_is_the_picture_where_it_can():
    rgb = make_pixels(3, "uint8")
    assert preview_image(rgb) is rgb
    assert preview_image(np.array([[[3], [200]]], np.uint8)).tolist() == [[[3] * 3, [200] * 3]]
    assert preview_image(np.array([[[1, 2, 3, 4]]], np.uint8)).tolist() == [[[1, 2, 3]]]
    stretched = preview_image(np.array([[[1000], [1500], [2000]]], np.uint16))
    assert stretched[0, :, 0].tolist() == [0, 128, 255]
    assert preview_image(np.full((1, 1, 1), -7.0, np.float32)).tolist() == [[[0] * 3]]


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_batches_keep_values_and_type_and_the_network_sees_them_exactly(channels, dtype):
    samples = [Sample(make_pixels(channels, dtype, seed=seed), np.zeros((11, 13), np.uint8)) for seed in range(2)]
    batch = collate([(0, samples[0]), (1, samples[1])])
    assert batch.image.dtype == getattr(torch, dtype)
    assert batch.image.shape == (2, channels, 11, 13)
    as_float = batch.image.to(torch.float32)  # what the segmenter does first, on the device
    np.testing.assert_array_equal(as_float[1].permute(1, 2, 0).numpy(), samples[1].image.astype(np.float32))


def test_a_network_normalises_sixteen_bits_by_mean_and_std_of_its_own():
    options = {"num_classes": 2, "head_channels": 16, "auxiliary": False, "output_stride": 32}
    torch.manual_seed(0)
    deep = create_model("fcn", "resnest14", in_channels=1, mean=(30000.0,), std=(9000.0,), **options).eval()
    torch.manual_seed(0)
    plain = create_model("fcn", "resnest14", in_channels=1, mean=(0.0,), std=(1.0,), **options).eval()
    pixels = torch.from_numpy(make_pixels(1, "uint16", size=(33, 65))).permute(2, 0, 1)[None]
    with torch.no_grad():
        ours = deep(pixels).main
        expected = plain((pixels.float() - 30000) / 9000).main
    assert torch.isfinite(ours).all()
    assert torch.allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_predictor_takes_arrays_and_files_of_its_kind(channels, dtype, tmp_path):
    seen = []

    def logits_fn(image):
        seen.append(image)
        return torch.stack([image[:, 0].float() * 0, image[:, 0].float()], 1)

    predictor = Predictor(logits_fn, TAXONOMY, in_channels=channels, image_dtype=dtype)
    pixels = make_pixels(channels, dtype)
    np.save(tmp_path / "a.npy", pixels)
    labels = predictor.predict(pixels).labels
    np.testing.assert_array_equal(labels, pixels[..., 0] > 0)
    np.testing.assert_array_equal(predictor.predict(tmp_path / "a.npy").labels, labels)
    assert seen[0].dtype == getattr(torch, dtype)
    assert seen[0].shape == (1, channels, 11, 13)
    assert predictor.predict(pixels).overlay(pixels).shape == (11, 13, 3)
    if channels == 1:
        flat = predictor.predict(pixels[..., 0])
        np.testing.assert_array_equal(flat.labels, labels)
        np.testing.assert_array_equal(flat.overlay(pixels[..., 0]), flat.overlay(pixels))


@pytest.mark.parametrize(
    ("array", "channels", "dtype"),
    [
        (np.zeros((4, 4), np.uint8), 4, "uint8"),
        (np.zeros((4, 4, 3), np.uint8), 4, "uint8"),
        (np.zeros((4, 4, 4), np.uint8), 4, "uint16"),
        (np.zeros((4, 4, 1), np.float64), 1, "float32"),
        (np.zeros((0, 4), np.uint8), 1, "uint8"),
    ],
)
def test_an_array_of_another_kind_is_refused_with_what_is_allowed(array, channels, dtype):
    with pytest.raises(DataError, match=rf"E-DATA-050 .*allowed \(H, W, {channels}\) {dtype}"):
        open_image(array, channels=channels, dtype=dtype)


def test_pil_images_follow_the_rules_of_files():
    assert open_image(Image.new("LA", (2, 1), (7, 9)), channels=2).tolist() == [[[7, 9], [7, 9]]]
    assert open_image(Image.new("F", (1, 1), 0.5), channels=1, dtype="float32").tolist() == [[[0.5]]]


def make_transform(channels, dtype, **options):
    return TrainTransform(
        **{
            "base_size": (20, 40),
            "crop_size": (16, 24),
            "photometric_probability": 0.0,
            "pad_colour": (1.0,) * channels,
            "image_dtype": dtype,
            **options,
        }
    )


@pytest.mark.parametrize(
    "options",
    [
        {"photometric_probability": 0.5},
        {"colour_jitter": ColourJitter()},
        {"extra": (make_torchvision_transform("RandomInvert", {}),)},
    ],
)
@pytest.mark.parametrize(("channels", "dtype"), [(4, "uint8"), (3, "uint16"), (1, "uint8"), (3, "float32")])
def test_colour_effects_are_refused_for_what_is_no_8_bit_rgb(options, channels, dtype):
    name = {"photometric_probability": "photometric", "extra": "torchvision"}.get(next(iter(options)), "colour_jitter")
    with pytest.raises(
        RecipeError, match=rf"E-RECIPE-066 .*{name} .*{channels} channels {dtype}.* fix: augmentation.{name}="
    ):
        make_transform(channels, dtype, **options)


def test_pad_colour_must_lie_in_the_range_of_the_type():
    for dtype, colour in (("uint8", (256.0,)), ("uint16", (-1.0,)), ("float32", (np.inf,)), ("uint8", ())):
        with pytest.raises(RecipeError, match=r"E-RECIPE-061 .*pad_colour .* one value a channel"):
            make_transform(1, dtype, pad_colour=colour)


def test_pictures_of_another_kind_than_the_recipe_says_are_named():
    sample = Sample(np.zeros((20, 40, 3), np.uint8), np.zeros((20, 40), np.uint8))
    for channels, dtype in ((4, "uint8"), (3, "uint16")):
        with pytest.raises(DataError, match=rf"E-DATA-087 .* 3 channels uint8; the recipe says {channels} {dtype}"):
            make_transform(channels, dtype)(sample, sample_generator(0, 0, 0))


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_effects_beyond_the_recipe_work_on_any_kind(channels, dtype):
    sample = Sample(make_pixels(channels, dtype), np.ones((11, 13), np.uint8))
    fill = (1,) * channels
    for effect in (Rotation(degrees=90, probability=1.0), RandomErasing(area=(0.2, 0.5), probability=1.0)):
        result = effect(sample, np.random.default_rng(0), fill=fill)
        assert result.image.dtype == sample.image.dtype
        assert result.image.shape == sample.image.shape
        assert (result.image[result.target == 255] == 1).all(axis=-1).any()
    blurred = blur_image(sample.image, 1.0)
    assert blurred.dtype == sample.image.dtype
    assert blurred.std() < sample.image.std()


@pytest.mark.parametrize("in_channels", [1, 2, 3, 4, 5, 6, 7])
def test_first_convolution_is_adapted_as_timm_does(in_channels):
    from timm.models import adapt_input_conv

    torch.manual_seed(0)
    weight = torch.randn(8, 3, 3, 3)
    ours = adapt_first_convolution(weight, in_channels)
    assert ours.shape == (8, in_channels, 3, 3)
    assert torch.allclose(ours, adapt_input_conv(in_channels, weight.clone()))
    assert torch.equal(ours, adapt_first_convolution(weight, in_channels))


@pytest.mark.parametrize(("in_channels", "scale"), [(1, 1.0), (6, 1.0), (9, 1.0)])
def test_adapted_filters_see_a_grey_picture_as_before(in_channels, scale):
    torch.manual_seed(0)
    weight, grey = torch.randn(8, 3, 3, 3), torch.randn(1, 1, 9, 9)
    before = torch.nn.functional.conv2d(grey.expand(-1, 3, -1, -1), weight)
    after = torch.nn.functional.conv2d(
        grey.expand(-1, in_channels, -1, -1), adapt_first_convolution(weight, in_channels)
    )
    assert torch.allclose(before, after, atol=1e-5)


def test_filters_for_other_than_rgb_are_not_guessed_at():
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-090 .*\(8, 4, 3, 3\)"):
        adapt_first_convolution(torch.zeros(8, 4, 3, 3), 6)


@pytest.mark.parametrize(("channels", "dtype"), [*KINDS, (3, "uint16"), (3, "float32")])
def test_resizing_is_the_bilinear_mean_in_every_channel_and_a_window_is_a_crop(channels, dtype):
    pixels = make_pixels(channels, dtype)
    size = (19, 8)
    resized = resize_image(pixels, size)
    assert resized.dtype == pixels.dtype
    planes = torch.from_numpy(pixels.astype(np.float64)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(planes, size, mode="bilinear").numpy()[0].transpose(1, 2, 0)
    # positions are float32, and a pixel's neighbour may be a whole range away
    tolerance = {"uint8": 0.52, "uint16": 0.6, "float32": 1e-5}[dtype]
    assert np.abs(resized - expected).max() <= tolerance
    np.testing.assert_array_equal(resize_image(pixels, size, window=(3, 2, 9, 5)), resized[3:12, 2:7])


def painted(channels, dtype, seed):
    """A mosaic whose every channel shows the label: 1 + label times a number of its own."""
    target = np.random.default_rng(seed).integers(0, 3, (4, 6), np.uint8).repeat(10, 0).repeat(10, 1)
    return Sample((1 + target[..., None] * np.arange(1, channels + 1)).astype(dtype), target)


@pytest.mark.parametrize(("channels", "dtype"), [*KINDS, (3, "uint16")])
def test_the_whole_augmentation_keeps_channels_type_and_alignment(channels, dtype):
    transform = make_transform(
        channels,
        dtype,
        base_size=(40, 60),
        crop_size=(48, 50),
        scale_range=None,
        pad_colour=tuple(range(200, 200 + channels)),
        copy_paste=CopyPaste(classes=(2,)),
        cut_mix=CutMix(),
        erasing=RandomErasing(),
        partner=lambda rng: painted(channels, dtype, int(rng.integers(100))),
    )
    flipped = 0
    for index in range(12):
        given = painted(channels, dtype, index)
        result = transform(given, sample_generator(0, 0, index))
        assert result.image.shape == (48, 50, channels)
        assert result.image.dtype == dtype
        ignored = result.target == 255
        expected = 1 + result.target[..., None].astype(int) * np.arange(1, channels + 1)
        expected[ignored] = np.arange(200, 200 + channels)
        np.testing.assert_array_equal(result.image, expected)
        assert ignored.sum() >= 8 * 50
        flipped += not any(
            (result.target[4:44] == given.target[:, left : left + 50]).mean() > 0.6 for left in range(11)
        )
    assert 0 < flipped < 12


@pytest.mark.parametrize(("channels", "dtype"), [(4, "uint8"), (1, "uint16"), (6, "float32")])
def test_a_network_learns_and_predicts_from_pictures_of_its_kind(channels, dtype):
    class Set:
        taxonomy = Taxonomy(name="mosaic", classes=("a", "b", "c"), palette=((0, 0, 0),) * 3)

        def __len__(self):
            return 6

        def name(self, index):
            return str(index)

        def read(self, index):
            return painted(channels, dtype, index)

    torch.manual_seed(0)
    mean, std = (3.0,) * channels, (2.0,) * channels
    options = {"num_classes": 3, "head_channels": 16, "auxiliary": False, "output_stride": 32}
    model = create_model("fcn", "resnest14", in_channels=channels, mean=mean, std=std, **options)
    transform = make_transform(channels, dtype, base_size=(40, 60), crop_size=(40, 60), pad_colour=mean)
    batches = training_batches(Set(), transform, plan=BatchPlan(num_samples=6, batch_size=3, seed=0), start=0, stop=2)
    for batch in batches:
        assert batch.image.dtype == getattr(torch, dtype)
        logits = torch.nn.functional.interpolate(model(batch.image).main, batch.target.shape[1:])
        loss = torch.nn.functional.cross_entropy(logits, batch.target.long(), ignore_index=255)
        loss.backward()
        assert torch.isfinite(loss)
    assert model.backbone.conv1[0].weight.grad.abs().sum() > 0
    predictor = Predictor(
        lambda image: model.eval()(image).main, TAXONOMY, base_size=(64, 128), in_channels=channels, image_dtype=dtype
    )
    assert predictor.predict(Set().read(0).image).labels.shape == (40, 60)
