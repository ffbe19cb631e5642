"""Packed and unpacked give the same training samples, to the bit, on every data set with real samples and on ours."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from nestseg.data.datasets import DATASETS
from nestseg.data.opening import open_dataset
from nestseg.data.packed import PackedDataset, pack_dataset
from nestseg.data.transforms import TrainTransform, sample_generator

REAL_DATA = Path(os.environ.get("NESTSEG_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))

# Folder of the samples, split, base and crop of the recipe, epochs to draw of at most PICTURES pictures.
CASES = {
    "voc": ("voc_mini", "trainaug", (512, 2048), (512, 512), 3),
    "ade20k": ("ade20k_mini", "val", (512, 2048), (512, 512), 12),
    "cityscapes": ("cityscapes_mini", "train", (1024, 2048), (512, 1024), 12),
    "camvid": ("camvid", "train", (360, 480), (360, 480), 3),
    "toystreets": (None, "train", (128, 256), (128, 128), 3),
}
PICTURES = 16


class First:
    """The first pictures of a data set, spread over it."""

    def __init__(self, dataset, count):
        self.dataset = dataset
        self.chosen = range(0, len(dataset), max(1, len(dataset) // count))[:count]
        self.taxonomy, self.terms, self.official_counts = dataset.taxonomy, dataset.terms, dataset.official_counts
        self.absent_classes = dataset.absent_classes

    def __len__(self):
        return len(self.chosen)

    def name(self, index):
        return self.dataset.name(self.chosen[index])

    def read(self, index):
        return self.dataset.read(self.chosen[index])


def test_every_data_set_is_compared_here():
    assert set(CASES) == set(DATASETS)


@pytest.mark.parametrize("name", CASES)
def test_packed_and_unpacked_samples_are_the_same_bits(name, tmp_path):
    folder, split, base_size, crop_size, epochs = CASES[name]
    if folder is not None and not (REAL_DATA / folder).is_dir():
        pytest.skip(f"no real samples at {REAL_DATA / folder}; set NESTSEG_REAL_DATA to their folder")
    source = First(open_dataset(name, None if folder is None else REAL_DATA / folder, split), PICTURES)
    pack_dataset(source, tmp_path, split=split)
    packed = PackedDataset(tmp_path, split)
    transform = TrainTransform(base_size=base_size, crop_size=crop_size)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    read = 0
    for index in range(len(source)):
        sample = source.read(index)
        for mine, expected in zip(packed.read(index), sample, strict=True):
            np.testing.assert_array_equal(mine, expected)
        for epoch in range(epochs):
            ours = transform(packed.read_lazily(index), sample_generator(0, epoch, index))
            theirs = transform(sample, sample_generator(0, epoch, index))
            for mine, expected in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(mine, expected)
            read += 1
    cv2.setNumThreads(threads)
    assert read >= 24
