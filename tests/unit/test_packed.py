"""A packed copy holds the same samples, is whole or not there, and says which of its files is damaged."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from nestseg.core.errors import DataError, PackError
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample
from nestseg.data.camvid import CamVid
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.loader import BatchPlan, training_batches
from nestseg.data.packed import (
    MANIFEST,
    SHARD_SAMPLES,
    TILE,
    PackedDataset,
    PackedImage,
    estimate_bytes,
    open_packed,
    pack_dataset,
    packed_splits,
    read_for_crop,
)
from nestseg.data.toystreets import ToyStreets
from nestseg.data.transforms import TrainTransform
from nestseg.data.voc import VOC

# Two files of samples. One picture has three rows and three columns of tiles, none of them whole at its edges.
COUNT = SHARD_SAMPLES + 2
SIZES = {0: (2 * TILE[0] + 3, 2 * TILE[1] + 5), 1: (1, 1), SHARD_SAMPLES: (TILE[0], TILE[1]), 65: (40, 7)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])


def write_camvid(root: Path, *, count: int = COUNT) -> Path:
    rng = np.random.default_rng(0)
    for folder in ("train", "trainannot"):
        (root / folder).mkdir(parents=True)
    for index in range(count):
        size = SIZES.get(index, (12, 16))
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / "train" / f"{index:03d}.png")
        Image.fromarray(rng.integers(0, 12, size, np.uint8)).save(root / "trainannot" / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    pack_dataset(CamVid(write_camvid(folder / "camvid"), "train"), folder / "packed", split="train")
    return folder


@pytest.fixture
def source(template, tmp_path) -> CamVid:
    return CamVid(shutil.copytree(template / "camvid", tmp_path / "camvid"), "train")


@pytest.fixture
def packed(template, source, tmp_path) -> Path:
    return shutil.copytree(template / "packed", tmp_path / "packed")


def assert_same_samples(packed: SegmentationDataset, source: SegmentationDataset) -> None:
    assert len(packed) == len(source)
    for index in range(len(source)):
        ours, theirs = packed.read(index), source.read(index)
        assert packed.name(index) == source.name(index)
        for mine, expected in zip(ours, theirs, strict=True):
            assert mine.dtype == expected.dtype
            assert mine.flags.writeable
            assert mine.flags.c_contiguous
            np.testing.assert_array_equal(mine, expected)


def flip_byte(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def test_a_packed_copy_has_the_samples_names_and_words_of_its_source(source, packed):
    dataset = PackedDataset(packed, "train")
    assert_same_samples(dataset, source)
    assert dataset.taxonomy == source.taxonomy
    assert dataset.terms == source.terms
    assert dataset.splits == packed_splits(packed) == ("train",)
    assert dataset.official_counts == {"train": 367}
    np.testing.assert_array_equal(dataset.read(-1).image, source.read(COUNT - 1).image)
    with pytest.raises(IndexError):
        dataset.read(COUNT)


def test_the_summary_counts_samples_and_bytes(source, tmp_path):
    seen: list[tuple[int, int]] = []
    summary = pack_dataset(source, tmp_path / "packed", split="train", on_progress=lambda *it: seen.append(it))
    files = [path for path in (tmp_path / "packed" / "train").iterdir() if not path.name.startswith(".")]
    assert seen == [(done, COUNT) for done in range(1, COUNT + 1)]
    assert summary.folder == tmp_path / "packed" / "train"
    assert (summary.num_samples, summary.num_kept) == (COUNT, 0)
    assert summary.num_bytes == sum(path.stat().st_size for path in files)
    assert summary.num_pixel_bytes == sum(
        sample.image.nbytes + sample.target.nbytes for sample in map(source.read, range(COUNT))
    )
    assert {path.name for path in files} == {MANIFEST, *(f"0000{i}.{suffix}" for i in (0, 1) for suffix in FILES)}


FILES = ("blosc2", "json")


def test_estimate_is_near_the_size_where_samples_are_alike(tmp_path):
    streets = ToyStreets(None, "val", num_images=40)
    summary = pack_dataset(streets, tmp_path, split="val")
    assert estimate_bytes(streets) == pytest.approx(summary.num_bytes, rel=0.15)
    assert summary.num_bytes < summary.num_pixel_bytes


def test_only_the_tiles_under_a_rectangle_are_read(source, packed):
    shard = packed / "train" / "00000.blosc2"
    [record, *_] = json.loads(shard.with_suffix(".json").read_text())["samples"]
    assert len(record["sizes"]) == 9 + 1
    flip_byte(shard, sum(record["sizes"][:4]) + 20)  # the tile in the middle
    image = PackedDataset(packed, "train").read_lazily(0).image
    height, width, _ = image.shape
    expected = source.read(0).image
    for window in [
        np.s_[0 : TILE[0], 0:width],
        np.s_[2 * TILE[0] : height, 0:width],
        np.s_[0:height, 0 : TILE[1]],
        np.s_[0:height, 2 * TILE[1] : width],
    ]:
        np.testing.assert_array_equal(image[window], expected[window])
    for window in [np.s_[:, :], np.s_[TILE[0] : TILE[0] + 1, TILE[1] : TILE[1] + 1]]:
        with pytest.raises(PackError, match=r"E-PACK-009 \| .*00000\.blosc2 \| sample 000 is damaged"):
            image[window]


def test_a_lazy_picture_gives_the_whole_as_an_array_and_refuses_steps(source, packed):
    image = PackedDataset(packed, "train").read_lazily(0).image
    np.testing.assert_array_equal(np.asarray(image), source.read(0).image)
    assert image[5:5, :].shape == (0, image.shape[1], 3)
    with pytest.raises(IndexError, match="without a step"):
        image[::2, :]


@pytest.mark.parametrize("place", ["picture", "labels"])
def test_any_changed_byte_is_an_error_that_names_file_and_sample_and_packing_again_mends_it(source, packed, place):
    shard = packed / "train" / "00000.blosc2"
    record = json.loads(shard.with_suffix(".json").read_text())["samples"][0]
    offset = 0 if place == "picture" else sum(record["sizes"]) - 1
    flip_byte(shard, offset)
    dataset = PackedDataset(packed, "train")
    with pytest.raises(DataError, match=r"E-PACK-009 .*nestseg data pack again"):
        dataset.read(0)
    np.testing.assert_array_equal(dataset.read(2).image, source.read(2).image)
    assert pack_dataset(source, packed, split="train").num_kept == COUNT - SHARD_SAMPLES
    assert_same_samples(PackedDataset(packed, "train"), source)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def change_format(path: Path) -> None:
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize(
    ("name", "damage", "code"),
    [
        ("00001.blosc2", cut_short, "E-PACK-006"),
        ("00001.blosc2", Path.unlink, "E-PACK-006"),
        ("00000.json", cut_short, "E-PACK-007"),
        ("00000.json", Path.unlink, "E-PACK-007"),
        ("00000.json", lambda path: path.write_text('{"tile": [128, 256], "samples": []}'), "E-PACK-007"),
        (MANIFEST, cut_short, None),
        (MANIFEST, lambda path: path.write_bytes(b""), "E-PACK-008"),
        (MANIFEST, change_format, "E-PACK-008"),
    ],
)
def test_a_damaged_or_missing_file_is_named_and_packing_again_mends_it(source, packed, name, damage, code):
    path = packed / "train" / name
    damage(path)
    if code is not None:  # without its last line end a manifest still says the same
        with pytest.raises(PackError, match=rf"{code} \| .*{name}"):
            PackedDataset(packed, "train").read(0)
    pack_dataset(source, packed, split="train")
    assert_same_samples(PackedDataset(packed, "train"), source)


def test_a_folder_that_is_not_packed_or_lacks_the_split_says_what_there_is(packed, tmp_path):
    with pytest.raises(PackError, match=r"E-PACK-005 .*there are: train \| fix: did you mean train\?"):
        PackedDataset(packed, "trian")
    with pytest.raises(PackError, match=r"E-PACK-005 .*there are: none \| fix: write one with nestseg data pack"):
        PackedDataset(tmp_path / "camvid", "train")
    assert packed_splits(tmp_path / "absent") == ()


def test_a_packed_copy_of_another_data_set_is_refused(packed):
    assert len(open_packed(packed, "train", taxonomy=CamVid.taxonomy)) == COUNT
    with pytest.raises(PackError, match=r"E-PACK-011 .*a packed copy of camvid, not of voc"):
        open_packed(packed, "train", taxonomy=VOC.taxonomy)


def test_a_copy_that_was_packed_with_other_classes_is_refused_since_it_holds_their_ids(packed):
    classes = CamVid.taxonomy.classes
    turned = Taxonomy(name="camvid", classes=classes[::-1], palette=CamVid.taxonomy.palette)
    with pytest.raises(PackError, match=r"E-PACK-012 .*packed with the classes sky, .*; now they are bicyclist, "):
        open_packed(packed, "train", taxonomy=turned)


def test_for_a_crop_a_packed_sample_is_read_lazily_and_any_other_whole(source, packed):
    assert isinstance(read_for_crop(source, 0).image, np.ndarray)
    assert isinstance(read_for_crop(PackedDataset(packed, "train"), 0).image, PackedImage)


def test_without_blosc2_the_error_says_what_to_install(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(PackError, match=r"E-PACK-001 .*pip install"):
        pack_dataset(source, tmp_path / "packed", split="train")
    with pytest.raises(PackError, match="E-PACK-001"):
        PackedDataset(tmp_path / "packed", "train")


def test_opening_imports_no_blosc2_whose_threads_would_be_forked(packed):
    script = (
        "import sys\n"
        "from nestseg.data.packed import PackedDataset\n"
        f"dataset = PackedDataset({str(packed)!r}, 'train')\n"
        "assert dataset.name(0) == '000' and 'blosc2' not in sys.modules\n"
        "dataset.read(0)\n"
        "assert 'blosc2' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_packing_again_keeps_what_is_the_same_and_writes_nothing(source, packed):
    before = {path.name: path.stat().st_mtime_ns for path in (packed / "train").glob("0*")}
    summary = pack_dataset(source, packed, split="train")
    assert summary.num_kept == COUNT
    assert {path.name: path.stat().st_mtime_ns for path in (packed / "train").glob("0*")} == before


@pytest.mark.parametrize("folder", ["train", "trainannot"])
def test_a_changed_source_is_packed_anew_and_only_the_file_that_it_is_in(source, packed, tmp_path, folder):
    path = tmp_path / "camvid" / folder / "001.png"
    Image.fromarray(np.full((1, 1), 3, np.uint8)).save(path)
    assert pack_dataset(source, packed, split="train").num_kept == COUNT - SHARD_SAMPLES
    assert_same_samples(PackedDataset(packed, "train"), source)


def test_drawn_pictures_without_files_are_compared_by_their_pixels(tmp_path):
    pack_dataset(ToyStreets(None, "val", num_images=3), tmp_path, split="val")
    assert pack_dataset(ToyStreets(None, "val", num_images=3), tmp_path, split="val").num_kept == 3
    larger = ToyStreets(None, "val", num_images=3, size=(64, 64))
    assert pack_dataset(larger, tmp_path, split="val").num_kept == 0
    assert_same_samples(PackedDataset(tmp_path, "val"), larger)


def test_files_of_an_older_and_larger_pack_are_removed(packed, tmp_path):
    fewer = CamVid(write_camvid(tmp_path / "fewer", count=5), "train")
    pack_dataset(fewer, packed, split="train")
    assert {path.name for path in (packed / "train").glob("[!.]*")} == {MANIFEST, "00000.blosc2", "00000.json"}
    assert_same_samples(PackedDataset(packed, "train"), fewer)


def test_a_killed_run_leaves_no_pack_and_the_next_one_finishes_it(source, tmp_path):
    script = (
        "import os, signal\n"
        "from nestseg.data.camvid import CamVid\n"
        "from nestseg.data.packed import pack_dataset\n"
        "def kill(done, total):\n"
        f"    if done == {SHARD_SAMPLES + 1}:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"source = CamVid({str(tmp_path / 'camvid')!r}, 'train')\n"
        f"pack_dataset(source, {str(tmp_path / 'packed')!r}, split='train', on_progress=kill)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == -signal.SIGKILL
    folder = tmp_path / "packed" / "train"
    assert list(folder.glob(".tmp-*")), "killed in the middle of a file"
    assert not (folder / "00001.blosc2").exists()
    with pytest.raises(PackError, match="E-PACK-005"):
        PackedDataset(tmp_path / "packed", "train")
    assert pack_dataset(source, tmp_path / "packed", split="train").num_kept == SHARD_SAMPLES
    assert not list(folder.glob(".tmp-*"))
    assert_same_samples(PackedDataset(tmp_path / "packed", "train"), source)


def test_a_changed_pack_is_no_pack_until_it_is_whole_again(source, packed, tmp_path):
    (tmp_path / "camvid" / "train" / "065.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"E-DATA-011 .*065\.png"):
        pack_dataset(source, packed, split="train")
    assert packed_splits(packed) == ()


def test_too_little_space_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    need = int(1.1 * estimate_bytes(source))
    with pytest.raises(PackError, match=rf"E-PACK-002 .*about {need:,} bytes are needed, 1,000 are free"):
        pack_dataset(source, tmp_path / "packed", split="train")
    assert not list((tmp_path / "packed" / "train").glob("[!.]*"))


def test_a_disk_that_fills_up_is_said_and_what_is_finished_stays(source, tmp_path):
    # the limit on the size of a file stands in for the disk: the first file fits, the second does not
    target = str(tmp_path / "packed")
    script = (
        "import resource, signal\n"
        "from nestseg.core.errors import PackError\n"
        "from nestseg.data.camvid import CamVid\n"
        "from nestseg.data.packed import SHARD_SAMPLES, pack_dataset\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "def shrink(done, total):\n"
        "    if done == SHARD_SAMPLES + 1:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        f"source = CamVid({str(tmp_path / 'camvid')!r}, 'train')\n"
        "try:\n"
        f"    pack_dataset(source, {target!r}, split='train', on_progress=shrink)\n"
        "except PackError as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ended.stdout.startswith("E-PACK-004 | ")
    assert "cannot be written: File too large" in ended.stdout
    assert pack_dataset(source, target, split="train").num_kept == SHARD_SAMPLES


def test_two_at_once_are_refused(source, tmp_path):
    folder = tmp_path / "packed" / "train"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"), pytest.raises(PackError, match=r"E-PACK-003 \| .*another process packs here"):
        pack_dataset(source, tmp_path / "packed", split="train")


def test_the_manifest_says_what_it_is_and_the_digest_of_every_index(source, packed):
    manifest = json.loads((packed / "train" / MANIFEST).read_text())
    assert manifest["dataset"] == "camvid"
    assert manifest["classes"] == list(source.taxonomy.classes)
    assert (manifest["split"], manifest["num_samples"], manifest["shard_samples"]) == ("train", COUNT, SHARD_SAMPLES)
    for number, shard in enumerate(manifest["shards"]):
        index = packed / "train" / f"{number:05d}.json"
        assert shard["index_sha256"] == hashlib.sha256(index.read_bytes()).hexdigest()
        assert shard["size"] == index.with_suffix(".blosc2").stat().st_size
    assert str(packed.parent) not in json.dumps(manifest)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_packed_and_unpacked_are_equal(source, packed, num_workers):
    transform = TrainTransform(base_size=(150, 300), crop_size=(64, 96))
    plan = BatchPlan(num_samples=COUNT, batch_size=4, seed=1)
    batches = [
        list(training_batches(dataset, transform, plan=plan, start=14, stop=20, num_workers=num_workers))
        for dataset in (source, pickle.loads(pickle.dumps(PackedDataset(packed, "train"))))
    ]
    assert len(batches[0]) == 6
    for theirs, ours in zip(*batches, strict=True):
        for mine, expected in zip(ours, theirs, strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_met_by_a_loader_worker_names_the_file(packed, num_workers):
    shard = packed / "train" / "00000.blosc2"
    flip_byte(shard, 0)
    plan = BatchPlan(num_samples=COUNT, batch_size=COUNT, seed=0)
    whole = TrainTransform(base_size=(8, 8), crop_size=(8, 8), scale_range=None)
    batches = training_batches(
        PackedDataset(packed, "train"), whole, plan=plan, start=0, stop=1, num_workers=num_workers
    )
    with pytest.raises(DataError, match=rf"^E-PACK-009 \| {shard} \| sample 000"):
        list(batches)


class Pictures(SegmentationDataset):
    """Three pictures of another type, in memory."""

    taxonomy, splits, official_counts = CamVid.taxonomy, ("train",), {}

    def __init__(self, dtype: str, channels: int) -> None:
        rng = np.random.default_rng(0)
        width = 3 if channels > 5 else TILE[1] + 4
        image = rng.normal(100, 30, (TILE[0] + 9, width, channels)).astype(dtype)
        self.sample = Sample(image, rng.integers(0, 11, image.shape[:2], np.uint8))

    def __len__(self) -> int:
        return 3

    def name(self, index: int) -> str:
        return f"picture {range(3)[index]}"

    def read(self, index: int) -> Sample:
        return Sample(self.sample.image + self.sample.image.dtype.type(index), self.sample.target.copy())


@pytest.mark.parametrize(
    ("dtype", "channels"), [*product(("uint8", "uint16", "float32"), (1, 3, 5)), ("uint8", 300), ("float32", 300)]
)
def test_pictures_of_other_types_and_channels_are_packed_as_they_are(tmp_path, dtype, channels):
    source = Pictures(dtype, channels)
    pack_dataset(source, tmp_path, split="train")
    packed = PackedDataset(tmp_path, "train")
    assert_same_samples(packed, source)
    window = np.s_[TILE[0] - 1 : TILE[0] + 3, -6:-1]
    np.testing.assert_array_equal(packed.read_lazily(2).image[window], source.read(2).image[window])


def test_an_unreadable_folder_is_an_error_with_its_path(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PackError, match=r"E-PACK-004 \| .*file"):
        pack_dataset(source, tmp_path / "file", split="train")
