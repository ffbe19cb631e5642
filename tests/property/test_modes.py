"""Modes of inference against a plain float64 reference: odd sizes, smaller than windows, in nests (E6)."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nestseg.core.resize import resize_image, scaled_size
from nestseg.core.taxonomy import Taxonomy
from nestseg.inference.modes import MultiScale, Slide, Whole
from nestseg.inference.predictor import Predictor

TAXONOMY = Taxonomy(name="toy", classes=("a", "b", "c"), palette=((0, 0, 0), (255, 0, 0), (0, 200, 0)))
FILTERS = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3, 3, 3)) / 100)


def strided_network(image: torch.Tensor) -> torch.Tensor:
    """Neighbourhoods at half the resolution, zeros around, float64: what it says depends on where windows end."""
    return F.conv2d(image.double() - 128, FILTERS, stride=2, padding=1)


def upsample(logits, size):
    """(K, h, w) bilinearly by the half-pixel rule, written out."""
    for axis, length in ((1, size[0]), (2, size[1])):
        have = logits.shape[axis]
        positions = np.clip((np.arange(length) + 0.5) * have / length - 0.5, 0, have - 1)
        low = np.minimum(np.floor(positions).astype(int), have - 1)
        high = np.minimum(low + 1, have - 1)
        share = (positions - low)[:, None] if axis == 1 else positions - low
        logits = np.take(logits, low, axis) * (1 - share) + np.take(logits, high, axis) * share
    return logits


def reference(mode, pixels, *, base, factor, two_steps):
    """The modes in words, a window and a scale at a time; (K, h, w)."""
    own = pixels.shape[:2]
    size = scaled_size(own, base=base or (min(own), max(own)), factor=factor)
    if isinstance(mode, MultiScale):
        views = []
        for scale in mode.scales:
            for mirrored in (False, True) if mode.flip else (False,):
                seen = np.ascontiguousarray(pixels[:, ::-1]) if mirrored else pixels
                view = reference(mode.inner, seen, base=base, factor=factor * scale, two_steps=two_steps)
                view = upsample(view, own)
                view = view[:, :, ::-1] if mirrored else view
                if mode.average == "probability":
                    view = np.exp(view - view.max(0))
                    view /= view.sum(0)
                views.append(view)
        mean = np.mean(views, axis=0)
        return np.log(mean) if mode.average == "probability" else mean
    if isinstance(mode, Slide):
        height, width = min(size[0], mode.window[0]), min(size[1], mode.window[1])
        if (height, width) == size:
            return reference(mode.inner, pixels, base=base, factor=factor, two_steps=two_steps)
        resized = resize_image(pixels, size)
        raw = {
            "flat": lambda n: np.ones(n),
            "linear": lambda n: np.array([min(i + 0.5, n - i - 0.5) for i in range(n)]),
            "hann": lambda n: np.array([1 - math.cos(2 * math.pi * (i + 0.5) / n) for i in range(n)]),
        }[mode.blend]
        sums, weights = np.zeros((3, *size)), np.zeros(size)
        for row in range(math.ceil((size[0] - height) / mode.step[0]) + 1):
            for column in range(math.ceil((size[1] - width) / mode.step[1]) + 1):
                top = min(row * mode.step[0], size[0] - height)
                left = min(column * mode.step[1], size[1] - width)
                part = np.ascontiguousarray(resized[top : top + height, left : left + width])
                logits = reference(mode.inner, part, base=None, factor=1.0, two_steps=two_steps)
                weight = np.outer(raw(height), raw(width))
                sums[:, top : top + height, left : left + width] += upsample(logits, (height, width)) * weight
                weights[top : top + height, left : left + width] += weight
        return sums / weights
    logits = strided_network(torch.from_numpy(resize_image(pixels, size)).permute(2, 0, 1)[None])[0].numpy()
    return upsample(logits, size) if two_steps else logits


@st.composite
def slides(draw, inner):
    window = draw(st.tuples(st.integers(2, 24), st.integers(2, 24)))
    steps = st.tuples(st.integers((window[0] + 2) // 3, window[0]), st.integers((window[1] + 2) // 3, window[1]))
    blend = draw(st.sampled_from(["flat", "linear", "hann"]))
    return Slide(window=window, stride=draw(st.none() | steps), blend=blend, inner=draw(inner))


def multi_scales(inner):
    return st.builds(
        MultiScale,
        scales=st.lists(st.sampled_from([0.5, 0.75, 1.0, 1.25, 2.0]), min_size=1, max_size=2).map(tuple),
        flip=st.booleans(),
        average=st.sampled_from(["probability", "logit"]),
        inner=inner,
    )


MODES = st.recursive(st.just(Whole()), lambda inner: slides(inner) | multi_scales(inner), max_leaves=3)
SIZES = st.tuples(st.integers(1, 41), st.integers(1, 41))


def noise(size, seed):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@settings(deadline=None, max_examples=150)
@example(
    mode=MultiScale(scales=(0.5, 1.75), flip=True, inner=Slide(window=(9, 14), blend="hann")),
    size=(33, 21),
    base=(17, 40),
    two_steps=False,
    batch_size=2,
)
@example(
    mode=Slide(window=(9, 14), blend="linear", inner=MultiScale(scales=(0.5, 1.5), flip=True, average="logit")),
    size=(33, 21),
    base=None,
    two_steps=True,
    batch_size=3,
)
@example(
    mode=Slide(window=(20, 14), inner=Slide(window=(7, 6), blend="hann")),
    size=(33, 41),
    base=None,
    two_steps=False,
    batch_size=4,
)
@given(
    mode=MODES,
    size=SIZES,
    base=st.none() | st.tuples(st.integers(5, 30), st.integers(20, 50)).map(sorted).map(tuple),
    two_steps=st.booleans(),
    batch_size=st.integers(1, 4),
)
def test_any_mode_at_any_size_is_the_reference(mode, size, base, two_steps, batch_size):
    pixels = noise(size, seed=sum(size))
    predictor = Predictor(
        strided_network,
        TAXONOMY,
        base_size=base,
        logits_resizes=2 if two_steps else 1,
        mode=mode,
        batch_size=batch_size,
    )
    logits = predictor.compute_logits(pixels)[0].numpy()
    expected = reference(mode, pixels, base=base, factor=1.0, two_steps=two_steps)
    assert logits.dtype == np.float64
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-9
    assert predictor.predict(pixels).labels.shape == size


class ArrayWindows:
    """An image in memory, read a window at a time."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.size, self.channels, self.dtype = pixels.shape[:2], pixels.shape[2], pixels.dtype

    def read(self, window):
        assert 0 <= window.top <= window.top + window.height <= self.size[0]
        assert 0 <= window.left <= window.left + window.width <= self.size[1]
        return self.pixels[window.top : window.top + window.height, window.left : window.left + window.width]


@settings(deadline=None, max_examples=100)
@given(mode=slides(MODES), size=SIZES, batch_size=st.integers(1, 4))
def test_strips_are_the_labels_of_the_whole_picture_to_the_bit(mode, size, batch_size):
    pixels = noise(size, seed=sum(size))
    predictor = Predictor(lambda image: strided_network(image).float(), TAXONOMY, mode=mode, batch_size=batch_size)
    expected = predictor.label(predictor.compute_logits(pixels), size, confidence=True)
    strips = list(predictor.predict_strips(ArrayWindows(pixels), confidence=True))
    assert [strip.top for strip in strips] == np.cumsum([0, *(len(strip.labels) for strip in strips)])[:-1].tolist()
    assert np.array_equal(np.concatenate([strip.labels for strip in strips]), expected.labels)
    assert np.array_equal(np.concatenate([strip.confidence for strip in strips]), expected.confidence)
    assert np.array_equal(predictor.predict(pixels).labels, expected.labels)


@settings(deadline=None, max_examples=60)
@given(mode=MODES, size=SIZES)
def test_a_mode_of_a_network_that_sees_single_pixels_changes_nothing(mode, size):
    """Where nothing is resized, windows, mirrors and means of equal things give the thing itself."""

    def pixelwise(image):
        return torch.stack([image[:, 0] - 100.0, image[:, 1] * 0.5, 60.0 - image[:, 2]], 1) / 8

    mode = _without_scales(mode)
    pixels = noise(size, seed=sum(size))
    whole = Predictor(pixelwise, TAXONOMY).predict(pixels, confidence=True)
    other = Predictor(pixelwise, TAXONOMY, mode=mode, batch_size=2).predict(pixels, confidence=True)
    assert np.abs(other.confidence - whole.confidence).max() < 1e-5
    surest = np.sort(pixelwise(torch.from_numpy(pixels).permute(2, 0, 1)[None].float())[0].numpy(), axis=0)
    decided = surest[-1] - surest[-2] > 1e-3
    assert np.array_equal(other.labels[decided], whole.labels[decided])


def _without_scales(mode):
    match mode:
        case Slide():
            return Slide(window=mode.window, stride=mode.stride, blend=mode.blend, inner=_without_scales(mode.inner))
        case MultiScale():
            return MultiScale(flip=mode.flip, average=mode.average, inner=_without_scales(mode.inner))
    return mode
