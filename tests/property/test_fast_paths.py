"""What was made fast gives what the plain statement gives, to the bit."""

from __future__ import annotations

import cv2
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nestseg.core.resize import Window, resize_labels, scaled_size
from nestseg.data.transforms import (
    PhotometricDraw,
    Placement,
    ResizeCropDraw,
    distort_photometric,
    place_crop,
)

SHARES = st.sampled_from([0.0, 0.1, 1 / 3, 0.4, 0.5, 0.6, 0.75, 0.9, 0.99])
CORNERS = st.lists(st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2), min_size=1, max_size=5)


def place_by_counting(target, draw, *, base_size, crop_size, max_class_share):
    """The rule in words: a histogram of every try; the shares are float32."""
    size = scaled_size(target.shape, base=base_size, factor=draw.factor)
    height, width = min(crop_size[0], size[0]), min(crop_size[1], size[1])
    for down, across in draw.corners:
        window = Window(int(down * (size[0] - height + 1)), int(across * (size[1] - width + 1)), height, width)
        counts = np.bincount(resize_labels(target, size, window=window).ravel(), minlength=256)[:255]
        if counts.sum() and float(np.float32(counts.max()) / np.float32(counts.sum())) <= max_class_share:
            break
    return Placement(size, window)


# 0.4 in float32 is more than 0.4: these labels have it wherever they are cut
TWO_FIFTHS = np.tile(np.repeat([0, 1, 2], [8, 8, 4]).astype(np.uint8), (24, 3))


@settings(deadline=None, max_examples=300)
@example(labels=TWO_FIFTHS, factor=1.0, corners=[(0.0, 0.0), (0.5, 0.5)], share=0.4)
@given(
    labels=st.one_of(
        arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.sampled_from([0, 1, 2, 255])),
        # few blocks of one class each, where the coarse grid may miss what covers most
        arrays(np.uint8, (3, 4), elements=st.sampled_from([0, 1, 254, 255])).map(
            lambda blocks: blocks.repeat(9, axis=0).repeat(11, axis=1)
        ),
        # all different on the coarse grid, one class between
        st.integers(1, 30).map(lambda count: np.where(np.indices((24, 24)).sum(0) % 8, 7, count).astype(np.uint8)),
    ),
    factor=st.floats(0.5, 2.0),
    corners=CORNERS,
    share=SHARES,
)
def test_the_crop_is_the_one_that_counting_every_class_chooses(labels, factor, corners, share):
    draw = ResizeCropDraw(factor, tuple(corners))
    options = {"base_size": (24, 60), "crop_size": (16, 20), "max_class_share": share}
    assert place_crop(labels, draw, **options) == place_by_counting(labels, draw, **options)


def distort_at_once(image, draw):
    """Each effect on the whole picture by itself; HSV in one pass of three tables."""
    levels = np.arange(256.0)
    table = lambda values: np.rint(np.clip(values, 0, 255)).astype(np.uint8)  # noqa: E731
    image = table(levels + draw.brightness)[image]
    if draw.contrast_first:
        image = table(levels * draw.contrast)[image]
    if draw.saturation != 1 or draw.hue != 0:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hue, saturation = ((levels + draw.hue) % 180).astype(np.uint8), table(levels * draw.saturation)
        hsv = np.stack([hue[hsv[..., 0]], saturation[hsv[..., 1]], hsv[..., 2]], axis=-1)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if draw.contrast_first else table(levels * draw.contrast)[image]


@settings(deadline=None, max_examples=100)
@given(
    size=st.tuples(st.sampled_from([1, 7, 200]), st.sampled_from([1, 16, 333])),
    seed=st.integers(0, 5),
    draw=st.builds(
        PhotometricDraw,
        brightness=st.one_of(st.just(0.0), st.floats(-32, 32)),
        contrast=st.one_of(st.just(1.0), st.floats(0.5, 1.5)),
        contrast_first=st.booleans(),
        saturation=st.one_of(st.just(1.0), st.floats(0.5, 1.5)),
        hue=st.integers(-18, 18),
    ),
)
def test_distortion_in_bands_and_planes_is_distortion_at_once(size, seed, draw):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    before = image.copy()
    distorted = distort_photometric(image, draw)
    np.testing.assert_array_equal(distorted, distort_at_once(image, draw), strict=True)
    np.testing.assert_array_equal(image, before)
    assert not np.shares_memory(distorted, image)
