"""What every data set of the table promises, on the real samples where they are."""

import inspect
import os
import re
from pathlib import Path

import numpy as np
import pytest

from nestseg.data.dataset import SegmentationDataset
from nestseg.data.datasets import DATASETS
from nestseg.data.opening import open_dataset

REAL_DATA = Path(os.environ.get("NESTSEG_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))

# Where the samples are, which size they have where it is one, and how many there are by split.
SAMPLES: dict[str, tuple[str | None, tuple[int, int] | None, dict[str, int]]] = {
    "voc": ("voc_mini", None, {"trainaug": 60, "val": 30}),
    "ade20k": ("ade20k_mini", None, {"train": 1, "val": 2}),
    "cityscapes": ("cityscapes_mini", (1024, 2048), {"train": 3, "val": 1}),
    "camvid": ("camvid", (360, 480), {"train": 367, "val": 101}),
    "toystreets": (None, (128, 256), {"train": 512, "val": 64}),
}
SPLITS = [(name, split) for name, (_, _, splits) in SAMPLES.items() for split in splits]
READ_AT_MOST = 25


def find_root(name: str) -> Path | None:
    folder = SAMPLES[name][0]
    if folder is None:
        return None
    if not (REAL_DATA / folder).is_dir():
        pytest.skip(f"no real samples at {REAL_DATA / folder}; set NESTSEG_REAL_DATA to their folder")
    return REAL_DATA / folder


def test_every_data_set_of_the_table_is_sampled_here():
    assert set(SAMPLES) == set(DATASETS)


@pytest.mark.parametrize("name", DATASETS)
def test_class_is_final_and_describes_itself(name):
    dataset = DATASETS[name]
    assert issubclass(dataset, SegmentationDataset)
    assert not inspect.isabstract(dataset)
    assert getattr(dataset, "__final__", False)
    assert dataset.taxonomy.name == name
    assert dataset.splits
    assert "val" in dataset.splits
    assert set(dataset.official_counts) == set(dataset.splits)
    assert all(count > 0 for count in dataset.official_counts.values())


@pytest.mark.parametrize("name", DATASETS)
def test_no_method_with_a_body_is_overridden(name):
    own, *bases = inspect.getmro(DATASETS[name])
    for base in bases[: bases.index(SegmentationDataset) + 1]:
        for attribute, value in vars(base).items():
            function = getattr(value, "__func__", value)
            if not inspect.isfunction(function) or getattr(function, "__isabstractmethod__", False):
                continue
            assert attribute not in vars(own), f"{own.__name__}.{attribute} overrides {base.__name__}.{attribute}"


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_samples_keep_the_contract(name, split):
    root = find_root(name)
    _, size, counts = SAMPLES[name]
    dataset = open_dataset(name, root, split)
    assert len(dataset) == counts[split]

    names = [dataset.name(index) for index in range(len(dataset))]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w.-]+", stem) for stem in names)

    classes = set()
    for index in range(0, len(dataset), max(1, len(dataset) // READ_AT_MOST)):
        image, target = dataset.read(index)
        assert image.dtype == target.dtype == np.uint8
        assert image.shape == (*target.shape, 3)
        assert size is None or target.shape == size
        for array in (image, target):
            assert array.flags.writeable
            assert array.flags.c_contiguous
        assert image.std() > 5
        classes |= set(np.unique(target).tolist())
    assert classes <= {*range(dataset.taxonomy.num_classes), 255}
    assert len(classes) > 3


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_two_readings_are_equal_and_do_not_share_memory(name, split):
    dataset = open_dataset(name, find_root(name), split)
    first, second = dataset.read(0), dataset.read(0)
    expected = first.image.copy(), first.target.copy()
    first.image[:], first.target[:] = 0, 0
    np.testing.assert_array_equal(second.image, expected[0])
    np.testing.assert_array_equal(second.target, expected[1])
    np.testing.assert_array_equal(dataset.read(0).image, expected[0])


@pytest.mark.parametrize(("name", "split"), SPLITS)
def test_index_beyond_the_end_is_an_index_error(name, split):
    dataset = open_dataset(name, find_root(name), split)
    with pytest.raises(IndexError):
        dataset.read(len(dataset))
