"""Splits whose labels a benchmark keeps (E9), and the instance maps of Cityscapes."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestseg.core.errors import DataError
from nestseg.data.ade20k import ADE20K
from nestseg.data.cityscapes import Cityscapes
from nestseg.data.counts import count_split
from nestseg.data.datasets import DATASETS
from nestseg.data.opening import open_dataset
from nestseg.data.voc import VOC

REAL_DATA = Path(os.environ.get("NESTSEG_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))
ERROR_SHAPE = r"^E-DATA-\d{3} \| [^|]+ \| [^|]+ \| fix: [^|]+$"


def save_image(path: Path, size: tuple[int, int] = (2, 3), value: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def make_cityscapes(root: Path) -> None:
    for city, frame in (("mainz", "000001_000019"), ("berlin", "000000_000019")):
        save_image(root / f"leftImg8bit/test/{city}/{city}_{frame}_leftImg8bit.png")


def make_voc(root: Path) -> None:
    for name in ("2008_000006", "2008_000001", "2007_000032"):
        save_image(root / f"JPEGImages/{name}.jpg")
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/test.txt").write_text("2008_000006\n2008_000001\n")


def make_ade20k(root: Path) -> None:
    for number in (3, 1):
        save_image(root / f"release_test/testing/ADE_test_{number:08d}.jpg")
    (root / "release_test/list.txt").write_text("ADE_test_00000001.jpg\nADE_test_00000003.jpg\n")


SPLITS = [
    (Cityscapes, make_cityscapes, ["berlin_000000_000019", "mainz_000001_000019"], 1525),
    (VOC, make_voc, ["2008_000006", "2008_000001"], 1456),
    (ADE20K, make_ade20k, ["ADE_test_00000001", "ADE_test_00000003"], 3352),
]
EACH = pytest.mark.parametrize(
    ("dataset", "make", "names", "official"), SPLITS, ids=lambda it: getattr(it, "__name__", "")
)


@EACH
def test_a_split_without_labels_gives_images_by_name_and_in_order(dataset, make, names, official, tmp_path):
    make(tmp_path)
    opened = open_dataset(dataset.taxonomy.name, tmp_path, "test")
    assert isinstance(opened, dataset)
    assert not opened.has_labels
    assert [opened.name(index) for index in range(len(opened))] == names
    image = opened.read_image(1)
    assert (image.shape, image.dtype) == ((2, 3, 3), np.uint8)
    assert opened.pairs == ()
    with pytest.raises(IndexError):
        opened.read_image(2)
    assert dataset.unlabelled_splits["test"].official_count == official


@EACH
def test_reading_labels_that_a_benchmark_keeps_is_an_error_that_says_so(dataset, make, names, official, tmp_path):
    make(tmp_path)
    with pytest.raises(DataError, match=r"E-DATA-115 .*no labels.*train.*val") as caught:
        dataset(tmp_path, "test").read(0)
    assert re.search(ERROR_SHAPE, str(caught.value))


@EACH
def test_what_needs_labels_refuses_a_split_without_them(dataset, make, names, official, tmp_path):
    make(tmp_path)
    with pytest.raises(DataError, match="E-DATA-115"):
        count_split(dataset(tmp_path, "test"))


@EACH
def test_the_splits_with_labels_stay_what_they_were(dataset, make, names, official, tmp_path):
    assert "test" not in dataset.splits
    with pytest.raises(
        DataError, match=r"split 'tst'; allowed: train, .*val; without labels: test .*did you mean test"
    ):
        dataset(tmp_path, "tst")
    with pytest.raises(DataError, match=r"split 'test'; allowed: train, .*val; without labels: test"):
        dataset.check_split("test")


@EACH
def test_a_folder_without_the_layout_of_the_split_lists_what_is_missing(dataset, make, names, official, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"E-DATA-020 .*expected: .*(leftImg8bit/test|test\.txt|release_test/testing)"):
        dataset(tmp_path, "test")


def test_only_benchmarks_with_hidden_labels_have_such_splits_and_no_split_is_both():
    assert {name for name, dataset in DATASETS.items() if dataset.unlabelled_splits} == {"voc", "ade20k", "cityscapes"}
    for dataset in DATASETS.values():
        assert not set(dataset.unlabelled_splits) & set(dataset.splits)


@pytest.mark.parametrize("dataset", [Cityscapes, ADE20K])
def test_an_empty_split_without_labels_is_refused(dataset, tmp_path):
    for folder in ("leftImg8bit/test", "release_test/testing"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(DataError, match=r"E-DATA-022 .*split 'test'"):
        dataset(tmp_path, "test")


def test_images_that_the_list_names_and_nobody_has_are_named(tmp_path):
    make_voc(tmp_path)
    for name in ("2008_000001", "2008_000006"):
        (tmp_path / f"JPEGImages/{name}.jpg").unlink()
    with pytest.raises(DataError, match=r"E-DATA-023 .*no image for 2 samples \(2008_000006, 2008_000001\)"):
        VOC(tmp_path, "test")


def test_two_images_of_one_stem_are_refused(tmp_path):
    make_ade20k(tmp_path)
    save_image(tmp_path / "release_test/testing/ADE_test_00000001.JPG")
    with pytest.raises(DataError, match=r"E-DATA-023 .*ADE_test_00000001.JPG and ADE_test_00000001.jpg"):
        ADE20K(tmp_path, "test")


def test_a_list_that_names_an_image_twice_is_refused_with_its_line(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/test.txt").write_text("2008_000001\n2008_000006\n2008_000001\n")
    with pytest.raises(DataError, match=r"E-DATA-024 .*line 3: 2008_000001 is in line 1 already"):
        VOC(tmp_path, "test")


def test_the_images_of_ade20k_are_found_beside_the_challenge_data_too(tmp_path):
    make_ade20k(tmp_path / "ADEChallengeData2016")
    assert len(ADE20K(tmp_path, "test")) == 2
    (tmp_path / "b/ADEChallengeData2016").mkdir(parents=True)
    make_ade20k(tmp_path / "b")
    with pytest.raises(DataError, match=re.escape(f"pass {tmp_path / 'b'}, which holds the layout")):
        ADE20K(tmp_path / "b/ADEChallengeData2016", "test")


def test_an_image_is_read_as_stored_because_the_hidden_labels_are(tmp_path):
    make_voc(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (5, 4)).save(tmp_path / "JPEGImages/2008_000006.jpg", exif=exif)
    assert VOC(tmp_path, "test").read_image(0).shape == (4, 5, 3)


def test_splits_with_labels_have_images_alone_as_well(tmp_path):
    save_image(tmp_path / "images/validation/ADE_val_00000001.jpg", value=7)
    (tmp_path / "annotations/validation").mkdir(parents=True)
    Image.fromarray(np.ones((2, 3), np.uint8)).save(tmp_path / "annotations/validation/ADE_val_00000001.png")
    dataset = ADE20K(tmp_path, "val")
    assert dataset.has_labels
    np.testing.assert_array_equal(dataset.read_image(0), dataset.read(0).image)


# The instances of Cityscapes


def make_val(root: Path, instances: np.ndarray | None) -> Cityscapes:
    stem = "frankfurt/frankfurt_000000_000294"
    save_image(root / f"leftImg8bit/val/{stem}_leftImg8bit.png")
    (root / "gtFine/val/frankfurt").mkdir(parents=True)
    Image.fromarray(np.full((2, 3), 26, np.uint8)).save(root / f"gtFine/val/{stem}_gtFine_labelIds.png")
    if instances is not None:
        Image.fromarray(instances).save(root / f"gtFine/val/{stem}_gtFine_instanceIds.png")
    return Cityscapes(root, "val")


def test_instance_maps_are_read_with_all_their_bits(tmp_path):
    stored = np.array([[7, 26, 26001], [33012, 65535, 0]], np.uint16)
    instances = make_val(tmp_path, stored).read_instances(0)
    assert instances.dtype == np.uint16
    np.testing.assert_array_equal(instances, stored)


def test_no_instance_map_is_none_because_data_sets_are_whole_without(tmp_path):
    assert make_val(tmp_path, None).read_instances(0) is None


def test_an_instance_map_of_8_bits_is_named_and_refused(tmp_path):
    with pytest.raises(DataError, match=r"E-DATA-081 .*instanceIds.png"):
        make_val(tmp_path, np.zeros((2, 3), np.uint8)).read_instances(0)


def test_a_split_without_labels_has_no_instances(tmp_path):
    make_cityscapes(tmp_path)
    with pytest.raises(DataError, match="E-DATA-115"):
        Cityscapes(tmp_path, "test").read_instances(0)


def test_real_instances_lie_inside_the_pixels_of_their_class():
    root = REAL_DATA / "cityscapes_mini"
    if not root.is_dir():
        pytest.skip(f"no real samples at {root}; set NESTSEG_REAL_DATA to their folder")
    dataset = Cityscapes(root, "val")
    instances, target = dataset.read_instances(0), dataset.read(0).target
    owners = np.where(instances > 1000, instances // 1000, instances)
    np.testing.assert_array_equal(Cityscapes.label_map[owners], target)
    assert (instances > 1000).any()
