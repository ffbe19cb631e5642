"""Layouts, pairs, ids and errors of the data sets, on tiny folders made here."""

import pickle
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestseg.core.errors import DataError
from nestseg.core.taxonomy import Taxonomy
from nestseg.data.ade20k import ADE20K
from nestseg.data.camvid import CamVid
from nestseg.data.cityscapes import TRAIN_ID_TO_LABEL_ID, Cityscapes
from nestseg.data.dataset import FileDataset, make_label_map, read_pair
from nestseg.data.datasets import DATASETS
from nestseg.data.opening import open_dataset
from nestseg.data.voc import VOC

ERROR_SHAPE = r"^E-DATA-\d{3} \| [^|]+ \| [^|]+ \| fix: [^|]+$"
PAIR = Taxonomy(name="pair", classes=("a", "b", "c"), palette=((0, 0, 0), (1, 1, 1), (2, 2, 2)))


def save_image(path: Path, size: tuple[int, int] = (2, 3), **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(path, **options)


def save_labels(path: Path, ids: object = ((0, 0, 0), (0, 0, 0)), *, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(ids, np.uint8))
    if palette:
        image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [0] * 756)
    image.save(path)


def make_voc(root: Path, ids: object = ((0, 1, 20), (255, 2, 0)), *, palette: bool = True) -> None:
    for name in ("2007_000032", "2007_000039"):
        save_image(root / f"JPEGImages/{name}.jpg")
        save_labels(root / f"SegmentationClass/{name}.png", ids, palette=palette)
        save_labels(root / f"SegmentationClassAug/{name}.png", ((3, 3, 3), (3, 3, 3)))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000039\n")
    (lists / "trainaug.txt").write_text("2007_000032\n2007_000039\n")
    (lists / "val.txt").write_text("2007_000039\n2007_000032\n")


def make_ade20k(root: Path, ids: object = ((0, 1, 150), (2, 0, 3))) -> None:
    for folder, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        save_image(root / f"images/{folder}/{name}.jpg")
        save_labels(root / f"annotations/{folder}/{name}.png", ids)


def make_cityscapes(root: Path, ids: object = ((7, 8, 33), (0, 255, 29))) -> None:
    for split, city, frame in (
        ("train", "ulm", "000001_000019"),
        ("train", "aachen", "000000_000019"),
        ("val", "frankfurt", "000000_000294"),
    ):
        save_image(root / f"leftImg8bit/{split}/{city}/{city}_{frame}_leftImg8bit.png")
        folder = root / f"gtFine/{split}/{city}"
        save_labels(folder / f"{city}_{frame}_gtFine_labelIds.png", ids)
        save_labels(folder / f"{city}_{frame}_gtFine_labelTrainIds.png")
        save_labels(folder / f"{city}_{frame}_gtFine_instanceIds.png")


def make_camvid(root: Path, ids: object = ((0, 1, 10), (11, 5, 0))) -> None:
    for split in ("train", "val", "test"):
        for name in ("0001TP_006690", "0001TP_006720"):
            save_image(root / f"{split}/{name}.png")
            save_labels(root / f"{split}annot/{name}.png", ids)


MAKERS = {VOC: make_voc, ADE20K: make_ade20k, Cityscapes: make_cityscapes, CamVid: make_camvid}
FILE_DATASETS = pytest.mark.parametrize("dataset", list(MAKERS), ids=lambda dataset: dataset.__name__)


def assert_refused(code: str, reason: str, dataset: type[FileDataset], root: Path | None, split: str) -> DataError:
    with pytest.raises(DataError, match=reason) as caught:
        dataset(root, split)
    assert caught.value.code == code
    assert re.search(ERROR_SHAPE, str(caught.value))
    return caught.value


# Reading, with ids mapped by hand


def test_voc_reads_palette_indices_as_they_are_stored(tmp_path):
    make_voc(tmp_path)
    sample = VOC(tmp_path, "val").read(0)
    assert sample.image.shape == (2, 3, 3)
    assert sample.target.tolist() == [[0, 1, 20], [255, 2, 0]]


def test_voc_reads_grey_labels_like_palette_labels(tmp_path):
    make_voc(tmp_path, palette=False)
    assert VOC(tmp_path, "val").read(0).target.tolist() == [[0, 1, 20], [255, 2, 0]]


def test_voc_takes_augmented_labels_for_trainaug_alone(tmp_path):
    make_voc(tmp_path)
    assert VOC(tmp_path, "trainaug").read(0).target.tolist() == [[3, 3, 3], [3, 3, 3]]
    assert VOC(tmp_path, "train").read(0).target[0, 2] == 20


def test_ade20k_ignores_zero_and_shifts_the_rest_down(tmp_path):
    make_ade20k(tmp_path)
    assert ADE20K(tmp_path, "train").read(0).target.tolist() == [[255, 0, 149], [1, 255, 2]]


def test_cityscapes_maps_label_ids_to_train_ids(tmp_path):
    make_cityscapes(tmp_path)
    assert Cityscapes(tmp_path, "val").read(0).target.tolist() == [[0, 1, 18], [255, 255, 255]]


def test_cityscapes_table_is_the_published_one():
    published = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12}
    published |= {26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    for value in range(256):
        assert Cityscapes.label_map[value] == published.get(value, 255)


def test_cityscapes_submission_table_is_the_way_back():
    train_ids = np.arange(19)
    np.testing.assert_array_equal(Cityscapes.label_map[TRAIN_ID_TO_LABEL_ID[:19]], train_ids)
    assert TRAIN_ID_TO_LABEL_ID[:3].tolist() == [7, 8, 11]
    assert not TRAIN_ID_TO_LABEL_ID[19:].any()


def test_camvid_ignores_void(tmp_path):
    make_camvid(tmp_path)
    assert CamVid(tmp_path, "train").read(0).target.tolist() == [[0, 1, 10], [255, 5, 0]]


@FILE_DATASETS
def test_label_map_sends_every_defined_value_to_a_class_or_to_255_and_reaches_every_class(dataset):
    reached = {int(dataset.label_map[value]) for value in dataset.label_values}
    assert reached == {*range(dataset.taxonomy.num_classes), 255}
    undefined = sorted(set(range(256)) - set(dataset.label_values))
    assert (dataset.label_map[undefined] == 255).all()


@FILE_DATASETS
def test_label_map_cannot_be_changed(dataset):
    with pytest.raises(ValueError, match="read-only"):
        dataset.label_map[0] = 1


def test_make_label_map_ignores_what_is_not_given():
    table = make_label_map({0: 4, 255: 9})
    assert table.dtype == np.uint8
    assert table.shape == (256,)
    assert (table[0], table[1], table[254], table[255]) == (4, 255, 255, 9)


# Order and names


def test_voc_keeps_the_order_of_its_list(tmp_path):
    make_voc(tmp_path)
    dataset = VOC(tmp_path, "val")
    assert [dataset.name(index) for index in range(len(dataset))] == ["2007_000039", "2007_000032"]


def test_cityscapes_sorts_by_city_and_frame_and_names_both(tmp_path):
    make_cityscapes(tmp_path)
    dataset = Cityscapes(tmp_path, "train")
    names = [dataset.name(index) for index in range(len(dataset))]
    assert names == ["aachen_000000_000019", "ulm_000001_000019"]


def test_folder_data_sets_sort_by_name(tmp_path):
    make_camvid(tmp_path)
    save_image(tmp_path / "train/0000.JPG", format="JPEG")
    save_labels(tmp_path / "trainannot/0000.PNG")
    dataset = CamVid(tmp_path, "train")
    assert [dataset.name(index) for index in range(3)] == ["0000", "0001TP_006690", "0001TP_006720"]


def test_unusual_names_are_read(tmp_path):
    names = ["-dash", "a b", "ä ö 街", "dots.in.name", "n" * 250]
    for name in names:
        save_image(tmp_path / f"val/{name}.png")
        save_labels(tmp_path / f"valannot/{name}.png")
    dataset = CamVid(tmp_path, "val")
    assert sorted(dataset.name(index) for index in range(len(dataset))) == sorted(names)
    for index in range(len(dataset)):
        dataset.read(index)


def test_other_and_hidden_files_are_left_out(tmp_path):
    make_camvid(tmp_path)
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._0001TP_006690.png"):
        (tmp_path / "train" / name).write_bytes(b"\x00")
    assert len(CamVid(tmp_path, "train")) == 2


@pytest.mark.parametrize(
    "text",
    [
        "2007_000039\r\n2007_000032\r\n",
        "  2007_000039 \t\n\n2007_000032",
        "/JPEGImages/2007_000039.jpg /SegmentationClass/2007_000039.png\n"
        "/JPEGImages/2007_000032.jpg /SegmentationClass/2007_000032.png\n",
        "JPEGImages\\2007_000039.jpg SegmentationClass\\2007_000039.png\r\nJPEGImages\\2007_000032.jpg\r\n",
    ],
    ids=["windows line ends", "blanks", "paths", "windows paths"],
)
def test_voc_reads_lists_as_they_are_handed_around(tmp_path, text):
    make_voc(tmp_path)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_bytes(text.encode())
    dataset = VOC(tmp_path, "val")
    assert [dataset.name(index) for index in range(len(dataset))] == ["2007_000039", "2007_000032"]


def test_voc_list_that_repeats_or_mixes_names_is_refused_with_all_its_lines(tmp_path):
    make_voc(tmp_path)
    path = tmp_path / "ImageSets/Segmentation/val.txt"
    path.write_text("2007_000032\n2007_000039\n2007_000032\na.jpg b.png\n")
    error = assert_refused(
        "E-DATA-024", "line 3: 2007_000032 is in line 1 already; line 4: .*differ", VOC, tmp_path, "val"
    )
    assert error.path == path


# Splits and folders


@FILE_DATASETS
def test_unknown_split_is_answered_with_the_allowed_ones(dataset, tmp_path):
    error = assert_refused(
        "E-DATA-021", f"split 'vall'; allowed: {', '.join(dataset.splits)}", dataset, tmp_path, "vall"
    )
    assert error.fix == "did you mean val?"


@FILE_DATASETS
def test_folder_must_be_given(dataset):
    with pytest.raises(DataError, match=rf"^E-DATA-020 \| {dataset.taxonomy.name} \| no folder given \| fix: .*--data"):
        dataset(None, "val")


@FILE_DATASETS
def test_root_without_layout_lists_expected_and_found(dataset, tmp_path):
    (tmp_path / "readme.txt").touch()
    (tmp_path / "other").mkdir()
    error = assert_refused(
        "E-DATA-020", "layout; expected: .*; missing: .*; found: other/, readme.txt", dataset, tmp_path, "val"
    )
    assert "pass the folder that holds" in error.fix


@FILE_DATASETS
def test_root_that_is_empty_missing_or_a_file_is_said_to_be(dataset, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    assert_refused("E-DATA-020", "found: an empty folder", dataset, tmp_path / "empty", "val")
    assert_refused("E-DATA-020", "found: no such folder", dataset, tmp_path / "none", "val")
    assert_refused("E-DATA-020", "found: a file, not a folder", dataset, tmp_path / "file", "val")


@FILE_DATASETS
def test_layout_one_level_deeper_or_higher_is_pointed_to(dataset, tmp_path):
    real = tmp_path / "somewhere"
    MAKERS[dataset](real)
    error = assert_refused("E-DATA-020", "layout", dataset, tmp_path, "val")
    assert error.fix == f"pass {real}, which holds the layout"
    inner = next(path for path in sorted(real.iterdir()) if path.is_dir())
    error = assert_refused("E-DATA-020", "layout", dataset, inner, "val")
    assert error.fix == f"pass {real}, which holds the layout"


def test_layout_above_the_working_folder_is_pointed_to(tmp_path, monkeypatch):
    make_cityscapes(tmp_path)
    monkeypatch.chdir(tmp_path / "gtFine")
    error = assert_refused("E-DATA-020", "layout", Cityscapes, Path(), "val")
    assert error.fix == f"pass {tmp_path}, which holds the layout"


def test_search_for_the_layout_passes_by_folders_that_are_closed(tmp_path, monkeypatch):
    make_camvid(tmp_path / "real")
    (tmp_path / "lost+found").mkdir()
    exists = Path.exists

    # Root may look everywhere, and tests run as root.
    def exists_but_for_closed_folders(path: Path) -> bool:
        if path.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", exists_but_for_closed_folders)
    error = assert_refused("E-DATA-020", "layout", CamVid, tmp_path, "val")
    assert error.fix == f"pass {tmp_path / 'real'}, which holds the layout"


@FILE_DATASETS
def test_root_may_be_text(dataset, tmp_path):
    MAKERS[dataset](tmp_path)
    assert len(dataset(str(tmp_path), "val")) > 0


@pytest.mark.parametrize("inside", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_accepts_three_roots(tmp_path, inside):
    make_voc(tmp_path / inside)
    assert len(VOC(tmp_path, "val")) == 2


@pytest.mark.parametrize("inside", [".", "ADEChallengeData2016"])
def test_ade20k_accepts_two_roots(tmp_path, inside):
    make_ade20k(tmp_path / inside)
    assert len(ADE20K(tmp_path, "val")) == 1


@pytest.mark.parametrize(
    ("folder", "archive"),
    [("gtFine", "gtFine_trainvaltest.zip"), ("leftImg8bit", "leftImg8bit_trainvaltest.zip")],
)
def test_cityscapes_with_half_of_its_archives_names_the_other(tmp_path, folder, archive):
    make_cityscapes(tmp_path)
    (tmp_path / folder).rename(tmp_path.parent / f"{tmp_path.name}_moved")
    error = assert_refused("E-DATA-020", f"missing: {folder}/val; found: ", Cityscapes, tmp_path, "val")
    assert error.fix == f"fetch what is missing: {archive}"


def test_voc_without_augmented_labels_says_where_they_come_from(tmp_path):
    make_voc(tmp_path / "VOCdevkit/VOC2012")
    base = tmp_path / "VOCdevkit/VOC2012"
    (base / "SegmentationClassAug").rename(tmp_path / "elsewhere")
    error = assert_refused("E-DATA-020", "missing: SegmentationClassAug; found: ImageSets/", VOC, tmp_path, "trainaug")
    assert error.path == base
    assert "SBD" in error.fix
    assert len(VOC(tmp_path, "val")) == 2


@pytest.mark.parametrize("mark", ["images/training/a", "images/ADE", "ADE20K_2021_17_01"])
def test_full_ade20k_is_told_from_the_scene_parsing_form(tmp_path, mark):
    (tmp_path / mark).mkdir(parents=True)
    error = assert_refused("E-DATA-020", f"the full ADE20K data set .found: {mark}", ADE20K, tmp_path, "train")
    assert "ADEChallengeData2016.zip" in error.fix


def test_folder_that_cannot_be_listed_is_named(tmp_path):
    make_camvid(tmp_path / "real")
    (tmp_path / "val").write_text("a file where a folder belongs")
    (tmp_path / "valannot").mkdir()
    error = assert_refused("E-DATA-010", "cannot be read: Not a directory", CamVid, tmp_path, "val")
    assert error.path == str(tmp_path / "val")


# Pairs


@FILE_DATASETS
def test_split_without_samples_is_refused(dataset, tmp_path):
    MAKERS[dataset](tmp_path)
    for path in tmp_path.rglob("*"):
        if path.suffix in {".jpg", ".png"}:
            path.unlink()
        elif path.suffix == ".txt":
            path.write_text("\n")
    assert_refused("E-DATA-022", f"split 'val' of {dataset.taxonomy.name} holds no samples", dataset, tmp_path, "val")


def test_all_incomplete_pairs_are_reported_at_once(tmp_path):
    make_camvid(tmp_path)
    for index in range(12):
        save_image(tmp_path / f"val/lone_{index:02d}.png")
    save_labels(tmp_path / "valannot/alone.png")
    error = assert_refused(
        "E-DATA-023",
        r"no label map for 12 samples \(lone_00, .*, lone_09 and 2 more\)",
        CamVid,
        tmp_path,
        "val",
    )
    assert "no image for 1 sample (alone)" in str(error)
    assert error.path == tmp_path


def test_voc_reports_files_that_its_list_names_and_nobody_has(tmp_path):
    make_voc(tmp_path)
    (tmp_path / "JPEGImages/2007_000039.jpg").unlink()
    (tmp_path / "SegmentationClass/2007_000032.png").unlink()
    error = assert_refused("E-DATA-023", r"no label map for 1 sample \(2007_000032\)", VOC, tmp_path, "val")
    assert "no image for 1 sample (2007_000039)" in str(error)


def test_cityscapes_without_label_ids_says_so_although_train_ids_are_there(tmp_path):
    make_cityscapes(tmp_path)
    for path in tmp_path.rglob("*_labelIds.png"):
        path.unlink()
    assert_refused("E-DATA-023", r"no label map for 1 sample \(frankfurt_000000_000294\)", Cityscapes, tmp_path, "val")


def test_two_files_of_one_stem_are_refused(tmp_path):
    make_camvid(tmp_path)
    save_image(tmp_path / "val/0001TP_006690.jpg")
    error = assert_refused("E-DATA-023", r"1 stem \(0001TP_006690.jpg and 0001TP_006690.png\)", CamVid, tmp_path, "val")
    assert error.path == tmp_path / "val"


# Wrong files


@FILE_DATASETS
def test_value_that_the_data_set_does_not_define_is_refused_with_its_count(dataset, tmp_path):
    wrong = max(set(range(255)) - set(dataset.label_values))
    MAKERS[dataset](tmp_path, ((wrong, wrong, 1), (1, 1, 1)))
    with pytest.raises(
        DataError, match=rf"label value {wrong} \(2 pixels\); allowed in {dataset.taxonomy.name}: 0-"
    ) as error:
        dataset(tmp_path, "val").read(0)
    assert error.value.code == "E-DATA-014"
    assert str(error.value.path).endswith(".png")
    assert re.search(ERROR_SHAPE, str(error.value))
    assert "not resized" in error.value.fix


def test_allowed_values_are_worded_as_ranges(tmp_path):
    make_voc(tmp_path, ((21, 0, 0), (0, 30, 30)))
    reason = r"label value 21 \(1 pixels\), 30 \(2 pixels\); allowed in voc: 0-20, 255"
    with pytest.raises(DataError, match=reason):
        VOC(tmp_path, "val").read(0)


def test_many_wrong_values_are_cut_to_ten(tmp_path):
    save_image(tmp_path / "a.png", (2, 10))
    save_labels(tmp_path / "a_label.png", np.arange(100, 120).reshape(2, 10))
    with pytest.raises(DataError, match=r"109 \(1 pixels\) and 10 more; allowed in pair: 0-2 \|"):
        read_pair(
            tmp_path / "a.png",
            tmp_path / "a_label.png",
            label_map=make_label_map({0: 0, 1: 1, 2: 2}),
            allowed={0, 1, 2},
            taxonomy=PAIR,
        )


def test_ids_that_count_from_one_are_recognised(tmp_path):
    make_voc(tmp_path, ((1, 2, 21), (1, 1, 1)))
    with pytest.raises(DataError, match="fix: subtract 1 from every id: they look 1-based"):
        VOC(tmp_path, "val").read(0)
    save_labels(tmp_path / "SegmentationClass/2007_000039.png", ((0, 2, 21), (1, 1, 1)))
    with pytest.raises(DataError, match="fix: use the label map of voc as published"):
        VOC(tmp_path, "val").read(0)


@FILE_DATASETS
def test_sizes_that_differ_are_refused_with_both(dataset, tmp_path):
    MAKERS[dataset](tmp_path, ((0, 0), (0, 0), (0, 0), (0, 0)))
    with pytest.raises(DataError, match=r"label map of 4x2, but .* is 2x3 \| fix: .*never resize") as error:
        dataset(tmp_path, "val").read(0)
    assert error.value.code == "E-DATA-017"


@FILE_DATASETS
def test_damaged_image_is_named(dataset, tmp_path):
    MAKERS[dataset](tmp_path)
    folder = {VOC: "JPEGImages", ADE20K: "images", Cityscapes: "leftImg8bit", CamVid: "val"}[dataset]
    for path in (tmp_path / folder).rglob("*.*"):
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(
        DataError, match=rf"^E-DATA-01[12] \| {re.escape(str(tmp_path))}/{folder}/.* \| damaged picture"
    ):
        dataset(tmp_path, "val").read(0)


def test_colour_labels_are_refused(tmp_path):
    make_voc(tmp_path)
    save_image(tmp_path / "SegmentationClass/2007_000039.png")
    with pytest.raises(DataError, match=r"^E-DATA-015 .*mode RGB"):
        VOC(tmp_path, "val").read(0)


# EXIF orientation of training images


def read_turned(folder: Path, *, orientation: int, stored: tuple[int, int], labels: tuple[int, int]) -> np.ndarray:
    """A picture whose left or top half is black, stored with an orientation, read with labels of a size."""
    pixels = np.full((*stored, 3), 255, np.uint8)
    pixels[: stored[0] // 2] = 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(folder / "image.png", exif=exif)
    save_labels(folder / "label.png", np.zeros(labels))
    sample = read_pair(
        folder / "image.png",
        folder / "label.png",
        label_map=make_label_map({0: 0}),
        allowed={0},
        taxonomy=PAIR,
    )
    assert sample.image.shape[:2] == sample.target.shape == labels
    return sample.image[:, :, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_stays_as_stored_where_its_labels_have_the_stored_size(tmp_path, orientation):
    image = read_turned(tmp_path, orientation=orientation, stored=(4, 6), labels=(4, 6))
    assert not image[:2].any()
    assert image[2:].all()


@pytest.mark.parametrize(("orientation", "black_is_left"), [(5, True), (6, False), (7, False), (8, True)])
def test_image_is_turned_where_only_then_its_labels_fit(tmp_path, orientation, black_is_left):
    image = read_turned(tmp_path, orientation=orientation, stored=(4, 6), labels=(6, 4))
    left, right = image[:, :2], image[:, 2:]
    assert not (left if black_is_left else right).any()
    assert (right if black_is_left else left).all()


@pytest.mark.parametrize("orientation", [1, 2, 3, 4])
def test_labels_that_lie_on_their_side_are_refused_where_the_orientation_does_not(tmp_path, orientation):
    with pytest.raises(DataError, match=r"label map of 6x4, but .* is 4x6"):
        read_turned(tmp_path, orientation=orientation, stored=(4, 6), labels=(6, 4))


def test_square_image_stays_as_stored(tmp_path):
    image = read_turned(tmp_path, orientation=6, stored=(4, 4), labels=(4, 4))
    assert not image[:2].any()


# The table


def test_open_dataset_opens_by_name(tmp_path):
    make_camvid(tmp_path)
    dataset = open_dataset("camvid", tmp_path, "test")
    assert type(dataset) is CamVid
    assert len(dataset) == 2


def test_open_dataset_answers_an_unknown_name_with_the_nearest():
    with pytest.raises(
        DataError, match=r"data set 'cityscape'; allowed: voc, .* \| fix: did you mean cityscapes\?"
    ) as error:
        open_dataset("cityscape", None, "val")
    assert error.value.code == "E-DATA-025"


def test_taxonomies_are_reached_without_torch():
    code = (
        "import sys; from nestseg.data.datasets import DATASETS;"
        "assert DATASETS['ade20k'].taxonomy.num_classes == 150; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_file_data_set_survives_pickling_as_loader_workers_need_it(tmp_path):
    make_cityscapes(tmp_path)
    dataset = Cityscapes(tmp_path, "train")
    copy = pickle.loads(pickle.dumps(dataset))
    assert [copy.name(0), len(copy)] == [dataset.name(0), len(dataset)]
    np.testing.assert_array_equal(copy.read(1).target, dataset.read(1).target)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "voc",
            {0: ("background", (0, 0, 0)), 15: ("person", (192, 128, 128)), 20: ("tvmonitor", (0, 64, 128))},
        ),
        ("ade20k", {0: ("wall", (120, 120, 120)), 12: ("person", (150, 5, 61)), 149: ("flag", (92, 0, 255))}),
        (
            "cityscapes",
            {0: ("road", (128, 64, 128)), 13: ("car", (0, 0, 142)), 18: ("bicycle", (119, 11, 32))},
        ),
        (
            "camvid",
            {0: ("sky", (128, 128, 128)), 3: ("road", (128, 64, 128)), 10: ("bicyclist", (0, 128, 192))},
        ),
    ],
)
def test_classes_and_colours_stand_where_they_were_published(name: str, facts: Mapping[int, tuple[str, object]]):
    taxonomy = DATASETS[name].taxonomy
    for train_id, fact in facts.items():
        assert (taxonomy.classes[train_id], taxonomy.palette[train_id]) == fact


def test_voc_colours_are_those_of_its_devkit():
    # The devkit spreads the bits of an id over the channels: bit 3i+c of the id is bit 7-i of channel c.
    for train_id, colour in enumerate(VOC.taxonomy.palette):
        spread = [sum(((train_id >> (3 * i + c)) & 1) << (7 - i) for i in range(3)) for c in range(3)]
        assert colour == tuple(spread)
