"""Counts and statistics of a split, on pictures whose numbers are known."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from nestseg.core.errors import DataError
from nestseg.core.image_io import write_image, write_labels
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample
from nestseg.data.camvid import CamVid
from nestseg.data.counts import SplitCounts, count_split, load_counts
from nestseg.data.custom import CustomDataset
from nestseg.data.opening import open_dataset
from nestseg.data.spec import DatasetSpec
from nestseg.data.stats import (
    class_weights,
    describe_split,
    enet_weights,
    find_rare_examples,
    median_frequency_weights,
)
from nestseg.data.toystreets import ToyStreets

TAXONOMY = Taxonomy(name="three", classes=("a", "b", "c"), palette=((1, 2, 3), (4, 5, 6), (7, 8, 9)))


class Given:
    """A data set of arrays."""

    taxonomy = TAXONOMY

    def __init__(self, *samples: Sample) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return f"sample {index}"

    def read(self, index: int) -> Sample:
        sample = self.samples[index]
        if not sample.target.size:
            raise DataError("E-DATA-012", "damaged picture", fix="fetch the file again")
        return sample


def make_sample(rows: list[list[int]], image: np.ndarray | None = None) -> Sample:
    target = np.array(rows, np.uint8)
    return Sample(np.zeros((*target.shape, 3), np.uint8) if image is None else image, target)


@pytest.fixture
def three() -> Given:
    """Class a in all images, b in the first and last, c nowhere; two of 14 pixels are ignored."""
    return Given(make_sample([[0, 0, 1], [0, 0, 255]]), make_sample([[0, 0]]), make_sample([[1, 1], [1, 0], [255, 0]]))


@pytest.fixture
def camvid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CamVid folder of four pairs, with a cache of its own."""
    monkeypatch.setenv("NESTSEG_CACHE", str(tmp_path / "cache"))
    root, rng = tmp_path / "camvid", np.random.default_rng(0)
    for folder in ("train", "trainannot"):
        (root / folder).mkdir(parents=True)
    for index in range(4):
        write_image(root / "train" / f"{index}.png", rng.integers(0, 256, (8, 12, 3), np.uint8))
        labels = rng.integers(0, 12, (8, 12), np.uint8)
        write_labels(root / "trainannot" / f"{index}.png", labels, CamVid.taxonomy.colour_table())
    return root


def test_counts_are_those_of_a_person_with_a_pencil(three):
    counts = count_split(three)
    assert counts.num_images == 3
    assert counts.class_pixels.tolist() == [8, 4, 0]
    assert counts.class_images.tolist() == [3, 2, 0]
    assert counts.ignored.tolist() == [1, 0, 1]
    assert counts.sizes.tolist() == [[2, 3], [1, 2], [3, 2]]
    assert counts.offsets.tolist() == [0, 2, 3, 5]
    assert counts.classes.tolist() == [0, 1, 0, 0, 1]
    assert counts.pixels.tolist() == [4, 1, 2, 2, 3]
    assert counts.image_of_entry.tolist() == [0, 0, 1, 2, 2]


def test_statistics_are_those_of_a_person_with_a_pencil(three):
    stats = describe_split(count_split(three), TAXONOMY, split="train")
    assert (stats.labelled_pixels, stats.ignored_pixels, stats.ignored_share) == (12, 2, 2 / 14)
    assert [one.share for one in stats.classes] == [8 / 12, 4 / 12, 0]
    assert [one.images for one in stats.classes] == [3, 2, 0]
    assert stats.imbalance is not None
    assert (stats.imbalance.most, stats.imbalance.least, stats.imbalance.ratio) == ("a", "b", 2)
    assert (stats.heights.minimum, stats.heights.median, stats.heights.maximum) == (1, 2, 3)
    assert [(one.low, one.high, one.images) for one in stats.widths.histogram] == [(2, 2, 2), (3, 3, 1)]
    assert stats.num_sizes == 3
    assert [(one.height, one.width, one.images) for one in stats.common_sizes] == [(1, 2, 1), (2, 3, 1), (3, 2, 1)]


def test_median_frequency_weights_are_those_of_the_formula(three):
    # a: 8 of the 12 labelled pixels of all images; b: 4 of the 10 of two images; median of 2/3 and 2/5 is 8/15
    assert median_frequency_weights(count_split(three)) == (0.8, 1.33333, 1.0)


def test_enet_weights_are_those_of_the_formula(three):
    expected = [1 / math.log(1.02 + share) for share in (8 / 12, 4 / 12, 0)]
    assert enet_weights(count_split(three)) == pytest.approx(expected, rel=1e-5)
    assert class_weights(count_split(three), "enet")[2] == 50.4983
    assert class_weights(count_split(three), "median_frequency") == median_frequency_weights(count_split(three))


def test_mean_and_deviation_are_exact_over_pictures_of_different_sizes():
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (size, 7, 3), np.uint8) for size in (3, 11, 30)]
    data = Given(*(Sample(image, np.zeros(image.shape[:2], np.uint8)) for image in images))
    stats = describe_split(count_split(data), TAXONOMY, split="train")
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)
    assert stats.channel_mean == pytest.approx(pixels.mean(0), rel=1e-15)
    assert stats.channel_std == pytest.approx(pixels.std(0), rel=1e-14)


@pytest.mark.parametrize("value", [3, 65535])
def test_a_flat_16_bit_picture_has_a_deviation_of_exactly_zero(value):
    image = np.full((500, 500, 4), value, np.uint16)
    data = Given(*[Sample(image, np.zeros((500, 500), np.uint8))] * 3)  # type: ignore[arg-type]
    stats = describe_split(count_split(data), TAXONOMY, split="train")
    assert stats.channel_mean == (value,) * 4
    assert stats.channel_std == (0.0,) * 4


def test_fractions_are_summed_in_float64():
    image = np.full((100, 100, 2), 0.1, np.float32)
    image[0] = 0.3
    data = Given(Sample(image, np.zeros((100, 100), np.uint8)))  # type: ignore[arg-type]
    stats = describe_split(count_split(data), TAXONOMY, split="train")
    assert stats.channel_mean == pytest.approx(image.reshape(-1, 2).mean(0, dtype=np.float64), rel=1e-12)
    assert stats.channel_std == pytest.approx(image.reshape(-1, 2).std(0, dtype=np.float64), rel=1e-9)


def test_workers_count_the_same_as_this_process_and_report_progress():
    calls: list[tuple[int, int]] = []
    scenes = ToyStreets(None, "val", num_images=20, size=(32, 64))
    alone = count_split(scenes, num_workers=0)
    shared = count_split(scenes, num_workers=2, on_progress=lambda done, total: calls.append((done, total)))
    for name in ("sizes", "ignored", "offsets", "classes", "pixels"):
        assert np.array_equal(getattr(alone, name), getattr(shared, name))
    assert alone.channel_squares == shared.channel_squares
    assert calls == [(8, 20), (16, 20), (20, 20)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_all_samples_that_cannot_be_counted_are_reported_at_once(num_workers):
    damaged = Sample(np.zeros((0, 0, 3), np.uint8), np.zeros((0, 0), np.uint8))
    data = Given(make_sample([[0]]), damaged, make_sample([[0, 9]]), damaged)
    with pytest.raises(DataError, match="3 of 4 samples cannot be counted") as raised:
        count_split(data, num_workers=num_workers)
    assert raised.value.code == "E-DATA-092"
    assert [line.split(" | ")[:2] for line in raised.value.table] == [
        ["  E-DATA-012", "sample 1"],
        ["  E-DATA-093", "sample 2"],
        ["  E-DATA-012", "sample 3"],
    ]
    assert "train id 9; allowed: 0-2 or 255" in raised.value.table[1]


def test_json_is_strict_and_holds_the_record(three):
    stats = describe_split(count_split(three), TAXONOMY, split="train")
    read = json.loads(stats.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert read["classes"][1] == {
        "name": "b",
        "colour": [4, 5, 6],
        "pixels": 4,
        "share": 4 / 12,
        "images": 2,
        "median_frequency": 1.33333,
        "enet": pytest.approx(3.30, abs=0.01),
    }
    assert read["heights"]["histogram"][0] == {"low": 1, "high": 1, "images": 1}


def test_split_without_a_label_has_statistics_and_no_weights():
    counts = count_split(Given(make_sample([[255, 255]])))
    stats = describe_split(counts, TAXONOMY, split="train")
    assert stats.ignored_share == 1
    assert stats.imbalance is None
    assert {one.enet for one in stats.classes} == {None}
    assert "1 of 1 images have no labelled pixel at all. Leave them out." in stats.warnings
    json.loads(stats.to_json())
    for weigh in (median_frequency_weights, enet_weights):
        with pytest.raises(DataError, match="E-DATA-094"):
            weigh(counts)


def test_warnings_say_what_is_wrong():
    ones = [make_sample([[0] * 99 + [255] * 40])] * 11
    stats = describe_split(count_split(Given(*ones, make_sample([[1]]))), TAXONOMY, split="train")
    text = "\n".join(stats.warnings)
    for words in (
        "1 of 3 classes never occur, so nothing can be learnt about them: c.",
        "Classes in fewer than 10 images: b (1).",
        "a covers 99.9% of the labelled pixels",
        "a has 1,089 times the pixels of b.",
        "28.8% of all pixels are ignored",
    ):
        assert words in text
    assert len(stats.warnings) == 5


def test_balanced_split_has_no_warnings():
    samples = [make_sample([[0, 1, 2]])] * 3
    assert describe_split(count_split(Given(*samples)), TAXONOMY, split="train").warnings == ()


def test_histogram_of_many_sizes_holds_every_image_once():
    sides = np.random.default_rng(2).integers(1, 60, 80)
    data = Given(*(make_sample([[0] * int(side)]) for side in sides))
    bins = describe_split(count_split(data), TAXONOMY, split="train").widths.histogram
    assert len(bins) == 10
    assert sum(one.images for one in bins) == 80
    assert (bins[0].low, bins[-1].high) == (sides.min(), sides.max())
    assert all(one.high + 1 == after.low for one, after in pairwise(bins))
    assert bins[3].images == sum(bins[3].low <= side <= bins[3].high for side in sides)


def test_examples_are_the_images_with_most_of_the_rarest_classes_and_none_twice():
    counts = count_split(
        Given(
            make_sample([[0] * 50 + [1] * 3 + [2] * 2]),
            make_sample([[0] * 50 + [1] * 9]),
            make_sample([[0] * 50 + [1] * 5 + [2] * 4]),
            make_sample([[0] * 50]),
        )
    )
    found = [(one.train_id, one.sample_index, one.pixels) for one in find_rare_examples(counts, per_class=2)]
    assert found == [(2, 2, 4), (2, 0, 2), (1, 1, 9), (0, 3, 50)]
    assert len(find_rare_examples(counts, num_classes=1, per_class=1)) == 1


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note every file pair that is read."""
    reads: list[int] = []
    read: Callable[[CamVid, int], Sample] = CamVid.read
    monkeypatch.setattr(CamVid, "read", lambda self, index: (reads.append(index), read(self, index))[1])
    return reads


def test_counts_are_read_from_the_cache_until_a_file_changes(camvid, monkeypatch):
    reads = counting(monkeypatch)
    first = load_counts(open_dataset("camvid", camvid, "train"), num_workers=0)
    assert reads == [0, 1, 2, 3]
    second = load_counts(open_dataset("camvid", camvid, "train"), num_workers=0)
    assert len(reads) == 4
    assert_equal(first, second)

    label = camvid / "trainannot" / "2.png"
    write_labels(label, np.full((8, 12), 3, np.uint8), CamVid.taxonomy.colour_table())
    os.utime(label, ns=(1, 1))
    changed = load_counts(open_dataset("camvid", camvid, "train"), num_workers=0)
    assert len(reads) == 8
    assert changed.class_pixels[3] > first.class_pixels[3]


@pytest.mark.parametrize("damage", [b"", b"\x08\0\0\0\0\0\0\0{}      ", None])
def test_damaged_cache_is_counted_anew(camvid, damage):
    first = load_counts(open_dataset("camvid", camvid, "train"), num_workers=0)
    (file,) = (camvid.parent / "cache" / "counts").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    assert_equal(first, load_counts(open_dataset("camvid", camvid, "train"), num_workers=0))
    assert_equal(first, load_counts(open_dataset("camvid", camvid, "train"), num_workers=0))


def test_data_set_without_files_is_counted_and_not_kept(camvid):
    counts = load_counts(ToyStreets(None, "val", num_images=3, size=(32, 64)), num_workers=0)
    assert counts.num_images == 3
    assert not (camvid.parent / "cache").exists()


def test_data_set_of_ones_own_is_kept_until_its_description_changes(camvid):
    def load(second: str) -> SplitCounts:
        classes = [{"name": "void", "ids": [*range(1, 12)]}, {"name": second, "ids": [0]}]
        files = {"images": "train", "labels": "trainannot"}
        spec = {"name": "own", "classes": classes, "files": files, "splits": {"train": {"share": 1.0}}}
        return load_counts(CustomDataset(DatasetSpec.model_validate(spec), camvid, "train"), num_workers=0)

    assert_equal(load("sky"), load("sky"))
    kept = camvid.parent / "cache" / "counts"
    assert len(list(kept.glob("*.safetensors"))) == 1
    load("heaven")
    assert len(list(kept.glob("*.safetensors"))) == 2


def assert_equal(one: SplitCounts, other: SplitCounts) -> None:
    assert one.num_classes == other.num_classes
    assert (one.channel_sums, one.channel_squares) == (other.channel_sums, other.channel_squares)
    for name in ("sizes", "ignored", "offsets", "classes", "pixels"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == getattr(other, name).dtype
