"""The predictor in its modes: what is exact, what the network is given, what is kept in memory."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nestseg.core.errors import DataError
from nestseg.core.taxonomy import Taxonomy
from nestseg.inference.modes import MultiScale, Slide, Whole
from nestseg.inference.predictor import Predictor
from nestseg.ops.upsample_argmax import upsample_logits
from nestseg.ops.upsample_cross_entropy import upsample_cross_entropy

TAXONOMY = Taxonomy(name="toy", classes=("a", "b", "c"), palette=((0, 0, 0), (255, 0, 0), (0, 200, 0)))
BLENDS = ("flat", "linear", "hann")


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (37, 53, 3), dtype=np.uint8)


@pytest.fixture
def network():
    filters = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 200
    return lambda image: F.conv2d(image.float() - 128, filters, stride=4, padding=1)


@pytest.fixture
def mirrored_network():
    """Filters that are their own mirror images, at the image's own resolution."""
    filters = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(0)) / 200
    filters = filters + filters.flip(3)
    return lambda image: F.conv2d(image.float() - 128, filters, padding=1)


class ArrayWindows:
    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.size, self.channels, self.dtype = pixels.shape[:2], pixels.shape[2], pixels.dtype

    def read(self, window):
        return self.pixels[window.top : window.top + window.height, window.left : window.left + window.width]


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("window", [(37, 53), (64, 53), (1000, 1000)])
@pytest.mark.parametrize("base_size", [None, (20, 60)])
def test_a_window_that_holds_the_image_gives_the_logits_of_the_whole_to_the_bit(
    blend, window, base_size, pixels, network
):
    whole = Predictor(network, TAXONOMY, base_size=base_size).compute_logits(pixels)
    slide = Predictor(network, TAXONOMY, base_size=base_size, mode=Slide(window=window, blend=blend))
    assert torch.equal(slide.compute_logits(pixels), whole)


@pytest.mark.parametrize("blend", BLENDS)
def test_strips_of_a_single_window_are_those_of_the_whole_to_the_bit(blend, pixels, network):
    whole = Predictor(network, TAXONOMY).predict(pixels, confidence=True)
    slide = Predictor(network, TAXONOMY, mode=Slide(window=(40, 60), blend=blend))
    (strip,) = slide.predict_strips(ArrayWindows(pixels), confidence=True)
    assert strip.top == 0
    assert np.array_equal(strip.labels, whole.labels)
    assert np.array_equal(strip.confidence, whole.confidence)


@pytest.mark.parametrize("average", ["probability", "logit"])
@pytest.mark.parametrize("inner", [Whole(), Slide(window=(37, 53))])
def test_flipping_changes_nothing_for_a_network_that_flips_with_its_image(average, inner, pixels, mirrored_network):
    plain = Predictor(mirrored_network, TAXONOMY)
    flipped = Predictor(mirrored_network, TAXONOMY, mode=MultiScale(flip=True, average=average, inner=inner))
    expected, found = plain.compute_logits(pixels), flipped.compute_logits(pixels)
    if average == "probability":
        expected = expected.log_softmax(1)
    assert torch.allclose(found, expected, rtol=0, atol=2e-6)
    assert np.array_equal(flipped.predict(pixels).labels, plain.predict(pixels).labels)


def test_the_mean_is_that_of_probabilities_or_of_logits_by_hand():
    """A bright left pixel says class 0 with odds 3:1, a dark one class 1 with 1:7."""

    def network(image):
        left = image[:, :1, :1, :1].float() > 0
        return torch.where(
            left,
            torch.log(torch.tensor([3.0, 1.0])).view(1, 2, 1, 1),
            torch.log(torch.tensor([1.0, 7.0])).view(1, 2, 1, 1),
        )

    two = Taxonomy(name="two", classes=("a", "b"), palette=((0, 0, 0), (9, 9, 9)))
    image = np.array([[[1] * 3, [0] * 3]], np.uint8)
    predictor = Predictor(network, two, mode=MultiScale(flip=True))
    prediction = predictor.predict(image, confidence=True)
    # (3/4 + 1/8) / 2 = 7/16 for class 0
    assert predictor.compute_logits(image).exp()[0, 0, 0].tolist() == pytest.approx([7 / 16, 7 / 16])
    assert prediction.labels.tolist() == [[1, 1]]
    assert prediction.confidence == pytest.approx(9 / 16)
    # sqrt(3 * 1) : sqrt(1 * 7)
    logits = Predictor(network, two, mode=MultiScale(flip=True, average="logit")).predict(image, confidence=True)
    assert logits.confidence == pytest.approx(7**0.5 / (7**0.5 + 3**0.5))


def test_the_loss_of_mean_probabilities_stays_finite_where_one_is_nothing():
    predictor = Predictor(
        lambda image: torch.tensor([[[[0.0]], [[-200.0]], [[-500.0]]]]), TAXONOMY, mode=MultiScale(flip=True)
    )
    logits = predictor.compute_logits(np.zeros((2, 3, 3), np.uint8))
    assert torch.isfinite(logits).all()
    target = torch.ones(1, 2, 3, dtype=torch.uint8)
    assert float(upsample_cross_entropy(logits, target)) == pytest.approx(200)


def test_scales_are_resized_from_the_original_by_the_base_and_come_back_to_its_own_size(pixels):
    seen = []

    def network(image):
        seen.append(tuple(image.shape))
        return image[:, :, ::4, ::4].float()

    mode = MultiScale(scales=(0.5, 1.0, 1.75), flip=True)
    logits = Predictor(network, TAXONOMY, base_size=(20, 100), mode=mode).compute_logits(pixels)
    # 37 x 53 with the short side at 10, 20 and 35
    assert seen == [(1, 3, *size) for size in ((10, 14), (20, 29), (35, 50)) for _ in range(2)]
    assert logits.shape == (1, 3, 37, 53)


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1] * 6), (2, [2, 1, 2, 1]), (3, [3, 3]), (8, [3, 3])])
def test_windows_of_a_row_share_forward_passes(batch_size, batches, pixels, network):
    seen = []

    def counted(image):
        seen.append(tuple(image.shape))
        return network(image)

    mode = Slide(window=(24, 24), stride=(16, 16), blend="hann")
    logits = Predictor(counted, TAXONOMY, mode=mode, batch_size=batch_size).compute_logits(pixels)
    assert seen == [(count, 3, 24, 24) for count in batches]
    single = Predictor(network, TAXONOMY, mode=mode).compute_logits(pixels)
    assert torch.allclose(logits, single, atol=1e-5)


def test_windows_lie_in_the_resized_image_and_logits_have_its_size(pixels, network):
    mode = Slide(window=(16, 16))
    logits = Predictor(network, TAXONOMY, base_size=(30, 100), mode=mode).compute_logits(pixels)
    assert logits.shape == (1, 3, 30, 43)
    assert Predictor(network, TAXONOMY, base_size=(30, 100), mode=mode).predict(pixels).labels.shape == (37, 53)


def test_the_same_call_gives_the_same_bits(pixels, network):
    mode = MultiScale(scales=(0.75, 1.5), flip=True, inner=Slide(window=(17, 19), blend="hann"))
    predictor = Predictor(network, TAXONOMY, mode=mode, batch_size=2)
    assert torch.equal(predictor.compute_logits(pixels), predictor.compute_logits(pixels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_float32(dtype, pixels, network):
    mode = Slide(window=(16, 16), stride=(4, 4))
    logits = Predictor(lambda image: network(image).to(dtype), TAXONOMY, mode=mode).compute_logits(pixels)
    assert logits.dtype == torch.float32


def test_a_row_is_given_as_soon_as_no_later_window_touches_it(pixels, network):
    calls = []

    def counted(image):
        calls.append(len(image))
        return network(image)

    mode = Slide(window=(16, 53), stride=(10, 53))  # rows of windows at 0, 10, 20, 21
    progress = [
        (strip.top, len(strip.labels), len(calls))
        for strip in Predictor(counted, TAXONOMY, mode=mode).predict_strips(ArrayWindows(pixels))
    ]
    assert progress == [(0, 10, 1), (10, 10, 2), (20, 1, 3), (21, 16, 4)]


def test_a_high_image_in_strips_needs_a_band_of_it_only():
    """Whole, it would be 12 MB of pixels and 48 of logits; here numpy's share is counted."""
    size, widest = (20_000, 200), []

    class Stripes:
        channels, dtype = 3, np.dtype(np.uint8)

        def __init__(self) -> None:
            self.size = size

        def read(self, window):
            widest.append(window.height * window.width)
            return np.full((window.height, window.width, 3), window.top % 251, np.uint8)

    predictor = Predictor(lambda image: image[:, :, ::8, ::8].float(), TAXONOMY, mode=Slide(window=(256, 200)))
    tracemalloc.start()
    rows = 0
    for strip in predictor.predict_strips(Stripes()):
        rows += len(strip.labels)
        assert strip.confidence is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert rows == size[0]
    assert max(widest) == 256 * 200
    assert peak < 2_000_000


def test_strips_need_windows_outermost_and_no_resize(pixels, network):
    source = ArrayWindows(pixels)
    for mode in (Whole(), MultiScale(inner=Slide(window=(8, 8)))):
        with pytest.raises(ValueError, match=r"Slide outermost; this mode is: (single|mean)"):
            Predictor(network, TAXONOMY, mode=mode).predict_strips(source)
    with pytest.raises(ValueError, match=r"\(37, 53\) to \(20, 29\)"):
        Predictor(network, TAXONOMY, mode=Slide(window=(8, 8)), base_size=(20, 60)).predict_strips(source)
    with pytest.raises(DataError, match=r"E-DATA-050 .* allowed \(H, W, 4\) uint8"):
        Predictor(network, TAXONOMY, mode=Slide(window=(8, 8)), in_channels=4).predict_strips(source)


def test_a_batch_without_a_window_is_refused(network):
    with pytest.raises(ValueError, match="batch_size is 0"):
        Predictor(network, TAXONOMY, batch_size=0)


def test_a_mirrored_view_of_an_array_is_taken(pixels, network):
    view = pixels[::-1, ::-1]
    for mode in (Whole(), Slide(window=(16, 16)), MultiScale(scales=(0.5,), flip=True)):
        predictor = Predictor(network, TAXONOMY, mode=mode, base_size=(30, 60))
        assert np.array_equal(predictor.predict(view).labels, predictor.predict(view.copy()).labels)


def test_windows_deeper_than_one_channel_type(network):
    image = np.random.default_rng(0).integers(0, 65536, (20, 31, 1), dtype=np.uint16)

    def grey(batch):
        assert batch.dtype == torch.uint16
        return torch.cat([batch.float() - level for level in (1000, 30000, 50000)], 1)

    for mode in (Slide(window=(8, 8)), MultiScale(scales=(0.5, 1.0), flip=True)):
        predictor = Predictor(grey, TAXONOMY, mode=mode, in_channels=1, image_dtype="uint16", batch_size=3)
        assert predictor.predict(image[:, :, 0]).labels.shape == (20, 31)


def test_modes_are_values_that_cannot_be_changed():
    mode = Slide(window=(8, 8))
    assert mode == Slide(window=(8, 8), stride=None, blend="flat", inner=Whole())
    with pytest.raises(dataclasses.FrozenInstanceError):
        mode.blend = "hann"


def test_logits_at_their_own_stride_are_what_whole_gives(pixels, network):
    logits = Predictor(network, TAXONOMY).compute_logits(pixels)
    assert logits.shape == (1, 3, 10, 14)
    once = upsample_logits(logits, (37, 53)).argmax(1)[0].numpy()
    assert np.array_equal(Predictor(network, TAXONOMY).predict(pixels).labels, once)


def test_a_strip_of_many_pixels_is_given_in_parts(network):
    image = np.random.default_rng(0).integers(0, 256, (300, 2000, 3), dtype=np.uint8)
    predictor = Predictor(network, TAXONOMY, mode=Slide(window=(200, 2000)))
    strips = list(predictor.predict_strips(ArrayWindows(image)))
    # rows of windows at 0 and 100: 100 and 200 rows are finished, of which 131 are 2^18 pixels
    assert [(strip.top, len(strip.labels)) for strip in strips] == [(0, 100), (100, 131), (231, 69)]
    expected = predictor.label(predictor.compute_logits(image), (300, 2000)).labels
    assert np.array_equal(np.concatenate([strip.labels for strip in strips]), expected)
