"""Whatever effects are combined: picture and ground truth stay together, no label is invented, a triple decides all."""

from __future__ import annotations

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nestseg.core.types import Sample
from nestseg.data.augment import (
    ColourJitter,
    CopyPaste,
    CutMix,
    GaussianBlur,
    MixUp,
    RandomErasing,
    RandomPartner,
    Rotation,
    list_torchvision_transforms,
    make_torchvision_transform,
)
from nestseg.data.transforms import TrainTransform, sample_generator

CODES = (10, 120, 240)
"""Grey level of each class in pictures that show their own ground truth; 255 is shown as 70."""
IGNORED_CODE = 70
ARGUMENTS = {
    "GaussianBlur": {"kernel_size": 3},
    "RandomAdjustSharpness": {"sharpness_factor": 2},
    "RandomAffine": {"degrees": 20},
    "RandomPosterize": {"bits": 3},
    "RandomRotation": {"degrees": 20},
    "RandomSolarize": {"threshold": 128},
}


class Mosaics:
    """Pictures of classes ``first`` and up, in cells, each painted in the colour of its class."""

    def __init__(self, seed, *, size=(80, 100), cell=20, labels=(0, 1, 2, 255)):
        self.seed, self.size, self.cell, self.labels = seed, size, cell, labels

    def __len__(self):
        return 5

    def name(self, index):
        return str(index)

    def read(self, index):
        rng = np.random.default_rng([self.seed, index])
        cells = -(-self.size[0] // self.cell), -(-self.size[1] // self.cell)
        coarse = rng.choice(np.array(self.labels, np.uint8), cells)
        target = np.kron(coarse, np.ones((self.cell, self.cell), np.uint8))[: self.size[0], : self.size[1]]
        table = np.zeros(256, np.uint8)
        table[[0, 1, 2, 255]] = [*CODES, IGNORED_CODE]
        return Sample(np.repeat(table[target][..., None], 3, axis=2), np.ascontiguousarray(target))


probabilities = st.sampled_from([0.0, 0.5, 1.0])
sizes = st.tuples(st.integers(1, 70), st.integers(1, 70))


@st.composite
def transforms(draw, dataset):
    crop_size = draw(sizes)

    def maybe(effect):
        return draw(st.none() | st.just(effect))

    name = draw(st.sampled_from(list_torchvision_transforms()))
    maybe_torchvision = draw(st.sampled_from([(), (make_torchvision_transform(name, ARGUMENTS.get(name, {})),)]))
    return TrainTransform(
        base_size=draw(st.tuples(st.integers(8, 50), st.integers(50, 90))),
        crop_size=crop_size,
        colour_jitter=maybe(ColourJitter(probability=draw(probabilities))),
        blur=maybe(GaussianBlur(probability=draw(probabilities))),
        copy_paste=maybe(CopyPaste(classes=(1, 2), probability=draw(probabilities))),
        cut_mix=maybe(CutMix(alpha=draw(st.floats(0.1, 5)), probability=draw(probabilities))),
        mix_up=maybe(MixUp(alpha=draw(st.floats(0.1, 5)), probability=draw(probabilities))),
        rotation=maybe(Rotation(degrees=draw(st.floats(0, 180)), probability=draw(probabilities))),
        erasing=maybe(RandomErasing(area=(0.01, 0.9), probability=draw(probabilities))),
        # torchvision's own cannot do with a few pixels: elastic, perspective
        extra=maybe_torchvision if min(crop_size) >= 32 else (),
        partner=RandomPartner(dataset),
    )


@settings(max_examples=120, deadline=None)
@given(data=st.data(), size=sizes, seed=st.integers(0, 2**32), index=st.integers(0, 2**31))
def test_size_labels_input_and_repeatability(data, size, seed, index):
    theirs = Mosaics(seed, cell=7, labels=(1, 2, 255))
    transform = data.draw(transforms(theirs))
    sample = Mosaics(seed, size=size, cell=5, labels=(0, 255)).read(0)
    image, target = sample.image.copy(), sample.target.copy()
    first = transform(sample, sample_generator(seed, 0, index))
    second = transform(sample, sample_generator(seed, 0, index))
    assert first.image.shape == (*transform.crop_size, 3)
    assert first.target.shape == transform.crop_size
    assert first.image.dtype == first.target.dtype == np.uint8
    mixes_labels = transform.copy_paste is not None or transform.cut_mix is not None
    assert set(np.unique(first.target)) <= {*np.unique(target), 255} | ({1, 2} if mixes_labels else set())
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.target, second.target)
    np.testing.assert_array_equal(sample.image, image, err_msg="the input was changed")
    np.testing.assert_array_equal(sample.target, target, err_msg="the input was changed")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), degrees=st.none() | st.floats(0, 180))
def test_picture_and_ground_truth_stay_aligned(seed, degrees):
    """Every pixel shows the class of the ground truth, whoever it came from; turned, it does so away from borders.

    Nothing is resized here, and nothing mixed or erased is turned: where one side of a blended border is covered, the
    other side keeps the blend.
    """
    mixes = degrees is None
    dataset = Mosaics(seed, labels=(0, 1, 2, 255) if mixes else (0, 1, 2))
    transform = TrainTransform(
        base_size=(80, 160),
        crop_size=(72, 88),
        scale_range=None,
        photometric_probability=0.0,
        pad_colour=(IGNORED_CODE,) * 3,
        copy_paste=CopyPaste(classes=(1,)) if mixes else None,
        cut_mix=CutMix() if mixes else None,
        rotation=None if mixes else Rotation(degrees=degrees),
        erasing=RandomErasing() if mixes else None,
        partner=RandomPartner(dataset),
    )
    sample = transform(dataset.read(0), sample_generator(seed, 1, 2))
    shown = np.full(sample.target.shape, IGNORED_CODE)
    for label, code in enumerate(CODES):
        shown[sample.target == label] = code
    inside = np.ones(sample.target.shape, bool)
    if not mixes:
        square = np.ones((5, 5), np.uint8)
        inside = cv2.erode(sample.target, square) == cv2.dilate(sample.target, square)
        inside[:2] = inside[-2:] = inside[:, :2] = inside[:, -2:] = False
        assert inside.mean() > 0.2
    assert (sample.image[..., 0] == shown)[inside].all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), alpha=st.floats(0.2, 5))
def test_mixup_keeps_the_picture_nearer_to_its_own_than_to_the_partners(seed, alpha):
    dataset = Mosaics(seed, labels=(0, 2))
    sample, partner = dataset.read(0), dataset.read(1)
    mixed = MixUp(alpha=alpha, probability=1.0)(sample, np.random.default_rng(seed), partner=lambda _: partner)
    own, other = (np.abs(mixed.image.astype(int) - picture.image) for picture in (sample, partner))
    assert (own <= other + 1).all()
    np.testing.assert_array_equal(mixed.target, sample.target)
