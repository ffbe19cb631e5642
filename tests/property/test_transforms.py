"""Picture and ground truth stay together, no label is invented, and a triple decides everything."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from nestseg.core.types import Sample
from nestseg.data.transforms import TrainTransform, sample_generator

CODES = (10, 120, 240)
"""Grey level of each class in pictures that show their own ground truth; 255 is shown as 70."""
IGNORED_CODE = 70


def painted_sample(seed, size, *, cell):
    """A mosaic of classes 0-2 and ignored cells whose picture tells the class."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array([0, 1, 2, 255], np.uint8), (-(-size[0] // cell), -(-size[1] // cell)))
    target = np.kron(coarse, np.ones((cell, cell), np.uint8))[: size[0], : size[1]]
    table = np.zeros(256, np.uint8)
    table[[0, 1, 2, 255]] = [*CODES, IGNORED_CODE]
    image = np.repeat(table[target][..., None], 3, axis=2)
    return Sample(image, np.ascontiguousarray(target))


sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@st.composite
def transforms(draw):
    low, high = sorted((draw(st.floats(0.3, 3.0)), draw(st.floats(0.3, 3.0))))
    return TrainTransform(
        base_size=draw(st.tuples(st.integers(8, 60), st.integers(60, 120))),
        crop_size=draw(sizes),
        scale_range=draw(st.sampled_from([None, (low, high)])),
        max_class_share=draw(st.sampled_from([0.3, 0.75, 1.0])),
        crop_tries=draw(st.integers(1, 10)),
        flip_probability=draw(st.sampled_from([0.0, 0.5, 1.0])),
        photometric_probability=draw(st.sampled_from([0.0, 0.5, 1.0])),
        pad_where=draw(st.sampled_from(["centre", "bottom_right"])),
    )


@settings(max_examples=80, deadline=None)
@given(transform=transforms(), size=sizes, seed=st.integers(0, 2**32), index=st.integers(0, 2**31))
def test_size_labels_and_repeatability(transform, size, seed, index):
    sample = painted_sample(seed, size, cell=5)
    image, target = sample.image.copy(), sample.target.copy()
    first = transform(sample, sample_generator(seed, 0, index))
    second = transform(sample, sample_generator(seed, 0, index))
    assert first.image.shape == (*transform.crop_size, 3)
    assert first.target.shape == transform.crop_size
    assert first.image.dtype == first.target.dtype == np.uint8
    assert first.image.flags.c_contiguous
    assert set(np.unique(first.target)) <= {*np.unique(target), 255}
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.target, second.target)
    np.testing.assert_array_equal(sample.image, image, err_msg="the input was changed")
    np.testing.assert_array_equal(sample.target, target, err_msg="the input was changed")


@settings(max_examples=60, deadline=None)
@given(
    cells=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    seed=st.integers(0, 2**32),
    factor=st.floats(0.5, 2.0),
    where=st.sampled_from(["centre", "bottom_right"]),
    extra=st.sampled_from([(), (v2.RandomVerticalFlip(),), (v2.RandomAffine(30, translate=(0.2, 0.2)),)]),
)
def test_picture_and_ground_truth_stay_aligned(cells, seed, factor, where, extra):
    """Away from class borders the picture must still show the class of the ground truth, and padding its colour."""
    transform = TrainTransform(
        base_size=(60, 240),
        crop_size=(64, 80),
        scale_range=(factor, factor),
        photometric_probability=0.0,
        pad_colour=(IGNORED_CODE, IGNORED_CODE, IGNORED_CODE),
        pad_where=where,
        extra=extra,
    )
    painted = painted_sample(seed, (20 * cells[0], 20 * cells[1]), cell=20)  # whole cells: none is too thin to see
    sample = transform(painted, sample_generator(seed, 1, 2))
    shown = np.full((64, 80), IGNORED_CODE)
    for label, code in enumerate(CODES):
        shown[sample.target == label] = code
    agrees = np.abs(sample.image[..., 0].astype(int) - shown) <= 2
    # Bilinear and floor-rule pixels part by up to one source pixel (at most 3 output pixels) around a border, which
    # may lie just outside the crop.
    square = np.ones((9, 9), np.uint8)
    inside = cv2.erode(sample.target, square) == cv2.dilate(sample.target, square)
    inside[:4] = inside[-4:] = inside[:, :4] = inside[:, -4:] = False
    if any(isinstance(transform, v2.RandomAffine) for transform in extra):
        inside &= sample.target != 255  # torchvision fills the picture with black where the target is 255
    assert agrees[inside].all()


@pytest.mark.parametrize("epoch", [0, 1])
def test_epochs_and_indices_give_different_samples(epoch):
    transform = TrainTransform(base_size=(60, 240), crop_size=(32, 32))
    sample = painted_sample(0, (60, 80), cell=9)
    pictures = {transform(sample, sample_generator(0, epoch, index)).image.tobytes() for index in range(10)}
    pictures.add(transform(sample, sample_generator(0, epoch + 1, 0)).image.tobytes())
    assert len(pictures) == 11
