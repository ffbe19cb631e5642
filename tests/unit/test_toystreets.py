"""ToyStreets: scenes are reproducible, aligned with their ground truth, and hold every class."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nestseg.core.errors import DataError
from nestseg.core.types import Sample
from nestseg.data.toystreets import CAR, PERSON, POLE, ROAD, SKY, TAXONOMY, ToyStreets, draw_scene


@pytest.fixture(scope="module")
def val() -> list[Sample]:
    scenes = ToyStreets(None, "val")
    return [scenes.read(index) for index in range(len(scenes))]


def digest(sample: Sample) -> str:
    return hashlib.sha256(sample.image.tobytes() + sample.target.tobytes()).hexdigest()


def test_taxonomy_lists_the_eight_classes_in_train_id_order():
    assert TAXONOMY.name == "toystreets"
    assert TAXONOMY.classes == (
        "sky",
        "building",
        "road",
        "pavement",
        "vegetation",
        "car",
        "person",
        "pole",
    )
    assert TAXONOMY.classes[SKY] == "sky"
    assert TAXONOMY.classes[POLE] == "pole"
    assert len(set(TAXONOMY.palette)) == 8


def test_default_sizes_and_names():
    train, val = ToyStreets(None, "train"), ToyStreets(None, "val")
    assert (len(train), len(val)) == (512, 64)
    assert train.name(7) == "train_0007"
    assert val.name(63) == "val_0063"
    assert len({train.name(index) for index in range(len(train))}) == len(train)


@pytest.mark.parametrize("size", [(32, 64), (64, 128), (128, 256), (96, 96), (65, 131), (256, 512)])
def test_samples_have_the_asked_size_and_only_train_ids(size):
    scenes = ToyStreets(None, "train", num_images=3, size=size)
    for index in range(len(scenes)):
        image, target = scenes.read(index)
        assert image.shape == (*size, 3)
        assert target.shape == size
        assert image.dtype == target.dtype == np.uint8
        assert image.flags.c_contiguous
        assert target.flags.c_contiguous
        assert target.max() < TAXONOMY.num_classes


def test_a_scene_depends_only_on_split_and_index_not_on_order_count_or_instance():
    forward = ToyStreets(None, "train", size=(64, 128))
    backward = ToyStreets(None, "train", num_images=6, size=(64, 128))
    first = [digest(forward.read(index)) for index in range(6)]
    second = [digest(backward.read(index)) for index in reversed(range(6))]
    assert first == second[::-1]
    assert digest(backward.read(-1)) == first[5]


def test_another_process_draws_the_same_scenes():
    code = (
        "import hashlib\n"
        "from nestseg.data.toystreets import ToyStreets\n"
        "scenes = ToyStreets(None, 'val', size=(64, 128))\n"
        "for index in range(3):\n"
        "    image, target = scenes.read(index)\n"
        "    print(hashlib.sha256(image.tobytes() + target.tobytes()).hexdigest())\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    scenes = ToyStreets(None, "val", size=(64, 128))
    assert printed.split() == [digest(scenes.read(index)) for index in range(3)]


def test_importing_toystreets_does_not_import_torch():
    code = "import sys, nestseg.data.toystreets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_train_and_val_share_no_image_and_repeat_none():
    digests = [
        digest(scenes.read(index))
        for scenes in (ToyStreets(None, split, num_images=32, size=(32, 64)) for split in ToyStreets.splits)
        for index in range(len(scenes))
    ]
    assert len(set(digests)) == 64


def test_writing_to_a_sample_does_not_change_the_data_set():
    scenes = ToyStreets(None, "val", num_images=1, size=(64, 128))
    sample = scenes.read(0)
    before = digest(sample)
    sample.image[:] = 0
    sample.target[:] = 255
    assert digest(scenes.read(0)) == before


def test_a_second_read_is_much_faster_than_drawing():
    scenes = ToyStreets(None, "val", num_images=8)
    started = time.process_time()
    for index in range(8):
        scenes.read(index)
    drawn = time.process_time()
    for index in range(8):
        scenes.read(index)
    copied = time.process_time()
    assert copied - drawn < 0.5 * (drawn - started)
    assert (drawn - started) / 8 < 1.0  # seconds a scene: twenty times what it takes, to catch an explosion only


def test_every_class_is_in_val_and_nearly_every_class_in_most_scenes(val):
    counts = np.array([np.bincount(sample.target.ravel(), minlength=8) for sample in val])
    assert (counts.sum(axis=0) > 0.005 * counts.sum()).all()
    assert ((counts > 0).sum(axis=1) >= 7).mean() > 0.9


def test_most_people_and_poles_are_large_enough_to_be_seen(val):
    """Half of the pixels of a class lie in runs as tall (people) or as wide (poles) as promised."""

    def lengths(mask: np.ndarray) -> list[int]:
        edges = np.flatnonzero(np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1))
        return (edges[1::2] - edges[::2]).tolist()

    tall = [run for sample in val for run in lengths((sample.target == PERSON).T)]
    wide = [run for sample in val for run in lengths(sample.target == POLE)]
    assert sum(run for run in tall if run >= 12) > 0.5 * sum(tall)
    assert sum(run for run in wide if run >= 3) > 0.8 * sum(wide)


def test_the_sky_is_above_and_the_road_below(val):
    top, bottom = (
        np.bincount(np.concatenate([sample.target[rows].ravel() for sample in val]), minlength=8)
        for rows in (slice(0, 16), slice(-16, None))
    )
    assert top[ROAD] == 0
    assert bottom[SKY] == 0
    assert bottom[ROAD] > 0.5 * bottom.sum()


def test_label_borders_lie_on_image_borders_to_the_pixel(val):
    """Shifting the ground truth by a single pixel either way lowers the contrast across its borders."""

    def contrast(shift: int) -> float:
        total, count = 0.0, 0
        for image, target in val:
            grey = image.astype(np.float64).mean(axis=2)
            steps = np.abs(np.diff(grey, axis=1))
            borders = np.roll(np.diff(target.astype(np.int64), axis=1) != 0, shift, axis=1)[:, 3:-3]
            total += steps[:, 3:-3][borders].sum()
            count += int(borders.sum())
        return total / count

    aligned = contrast(0)
    assert aligned > 1.15 * contrast(1)
    assert aligned > 1.15 * contrast(-1)
    assert aligned > 1.5 * contrast(3)


def test_equal_seeds_give_the_same_street_at_another_size():
    small = draw_scene(np.random.default_rng(5), (64, 128)).target
    large = draw_scene(np.random.default_rng(5), (256, 512)).target
    assert (large[2::4, 2::4] == small).mean() > 0.93
    other = draw_scene(np.random.default_rng(6), (64, 128)).target
    assert (other == small).mean() < 0.9


def test_no_label_is_a_mixture_of_two(val):
    """Blending ids at a border between sky (0) and car (5), say, would line it with the ids between them."""
    borders, between = 0, 0
    for _, target in val:
        left, middle, right = target[:, :-2], target[:, 1:-1], target[:, 2:]
        borders += int((left != right).sum())
        between += int(((np.minimum(left, right) < middle) & (middle < np.maximum(left, right))).sum())
    assert between < 0.02 * borders


def test_a_folder_is_refused():
    with pytest.raises(DataError, match=r"E-DATA-090 \| somewhere \| .*drawn, not read") as caught:
        ToyStreets(Path("somewhere"), "train")
    assert caught.value.fix


def test_an_unknown_split_is_refused_with_the_allowed_ones():
    with pytest.raises(DataError, match=r"E-DATA-021 .*'test'; allowed: train, val"):
        ToyStreets(None, "test")


@pytest.mark.parametrize(("num_images", "size"), [(0, (128, 256)), (4, (31, 256)), (4, (128, 16))])
def test_too_few_or_too_small_scenes_are_refused(num_images, size):
    with pytest.raises(DataError, match="E-DATA-091"):
        ToyStreets(None, "train", num_images=num_images, size=size)


def test_an_index_outside_the_split_is_refused():
    scenes = ToyStreets(None, "val", num_images=2)
    with pytest.raises(IndexError):
        scenes.read(2)
    with pytest.raises(IndexError):
        scenes.name(2)


def test_cars_stand_on_the_ground(val):
    """Below the lowest pixel of a car there is road, pavement, or something nearer, never sky."""
    for _, target in val:
        lowest = (target[:-1] == CAR) & (target[1:] != CAR)
        assert not (target[1:][lowest] == SKY).any()
