"""A data set of your own, in every form that a data set file can describe, with values computed by hand."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from nestseg.core.errors import DataError
from nestseg.data.custom import CustomDataset, find_files
from nestseg.data.dataset import PairsError
from nestseg.data.opening import measure_dataset
from nestseg.data.packed import pack_dataset
from nestseg.data.spec import DatasetSpec, SplitSection
from nestseg.data.verify import problems as kinds
from nestseg.data.verify.verify import verify_custom

IDS = np.array([[0, 1, 2], [1, 2, 0]], np.uint8)


def make_spec(**changes: object) -> DatasetSpec:
    values: dict[str, object] = {
        "name": "pets",
        "files": {"images": "images", "labels": "masks"},
        "classes": ["background", "cat", "dog"],
        "splits": {"train": {"share": 1.0}},
    }
    values = {name: value for name, value in (values | changes).items() if value is not None}
    return DatasetSpec.parse(yaml.safe_dump(values))


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def encode(array: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def picture(size: tuple[int, int] = (2, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def make_pair(root: Path, name: str = "a", labels: np.ndarray = IDS, *, images: str = "images") -> None:
    save(root / images / f"{name}.png", picture(labels.shape[:2]))
    save(root / "masks" / f"{name}.png", labels)


def open_names(spec: DatasetSpec, root: Path, split: str = "train") -> list[str]:
    dataset = CustomDataset(spec, root, split)
    return [dataset.name(index) for index in range(len(dataset))]


def read_target(spec: DatasetSpec, root: Path) -> list[list[int]]:
    dataset = CustomDataset(spec, root, next(iter(spec.splits)))
    sample = dataset.read(0)
    assert sample.image.dtype == sample.target.dtype == np.uint8
    assert sample.image.shape == (*sample.target.shape, 3)
    return sample.target.tolist()


def refuse(spec: DatasetSpec, root: Path, split: str = "train") -> str:
    with pytest.raises(DataError, match=r"^E-DATA-.* \| fix: ") as raised:
        CustomDataset(spec, root, split).read(0)
    return str(raised.value)


# --- label maps of ids


def test_ids_become_train_ids_and_those_without_a_meaning_are_errors(tmp_path):
    make_pair(tmp_path, labels=np.array([[0, 1, 2], [255, 7, 0]], np.uint8))
    spec = make_spec(label_map={255: "ignore", 7: "cat"})
    assert read_target(spec, tmp_path) == [[0, 1, 2], [255, 1, 0]]
    message = refuse(make_spec(label_map={7: 1}), tmp_path)
    assert "E-DATA-041" in message
    assert "label value 255 (1 pixels); pets defines 0, 1, 2, 7" in message
    assert "255: ignore" in message


def test_two_data_sets_of_one_class_have_their_own_taxonomies(tmp_path):
    make_pair(tmp_path)
    first = CustomDataset(make_spec(), tmp_path, "train")
    second = CustomDataset(
        make_spec(name="others", classes=["a", "b", "c"], licence="CC0", absent_classes="zero"), tmp_path, "train"
    )
    assert first.taxonomy.classes == ("background", "cat", "dog")
    assert second.taxonomy.classes == ("a", "b", "c")
    assert (first.absent_classes, second.absent_classes) == ("skip", "zero")
    assert (first.terms, second.terms, second.splits) == ("not stated", "CC0", ("train",))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_palette_label_maps_give_their_indices(tmp_path, bits):
    make_pair(tmp_path)
    image = Image.fromarray(IDS)
    image.putpalette(list(range(3 * 2**bits)) if bits < 8 else [value % 256 for value in range(768)])
    image.save(tmp_path / "masks" / "a.png", bits=bits)
    assert (tmp_path / "masks" / "a.png").read_bytes()[24] == bits
    assert read_target(make_spec(), tmp_path) == IDS.tolist()


def test_label_maps_of_16_bits_keep_their_ids(tmp_path):
    """P24: ids above 255 are not cut."""
    make_pair(tmp_path, labels=np.array([[0, 256, 2], [1, 30_000, 65_535]], np.uint16))
    spec = make_spec(label_map={256: "cat", 30_000: 2, 65_535: "ignore"})
    assert read_target(spec, tmp_path) == [[0, 1, 2], [1, 2, 255]]
    assert "label value 30000 (1 pixels), 65535 (1 pixels)" in refuse(make_spec(label_map={256: 1}), tmp_path)
    assert CustomDataset(spec, tmp_path, "train").label_values == {0, 1, 2, 256, 30_000, 65_535}


def test_damaged_16_bit_label_map_is_a_data_error(tmp_path):
    make_pair(tmp_path, labels=np.random.default_rng(0).integers(0, 3, (50, 50), np.uint16))
    path = tmp_path / "masks" / "a.png"
    path.write_bytes(path.read_bytes()[:60])
    assert "a.png" in refuse(make_spec(), tmp_path)


def test_one_based_ids_and_0_255_masks_are_recognised(tmp_path):
    make_pair(tmp_path, labels=np.array([[1, 2, 3]], np.uint8))
    assert "the ids look one-based" in refuse(make_spec(), tmp_path)
    make_pair(tmp_path, labels=np.array([[0, 255, 0]], np.uint8))
    assert "set label_format: binary" in refuse(make_spec(classes=["background", "object"]), tmp_path)


# --- label maps of colours


COLOURED = np.array([[(0, 0, 0), (255, 0, 0), (0, 255, 0)], [(255, 0, 0), (1, 1, 1), (9, 9, 9)]], np.uint8)
COLOURS = {
    "label_format": "colours",
    "classes": [
        {"name": "background", "colour": [0, 0, 0], "colours": [[1, 1, 1]]},
        {"name": "cat", "colour": [255, 0, 0]},
        {"name": "dog", "colour": [0, 255, 0]},
    ],
}


def test_colours_are_mapped_exactly_merged_and_ignored(tmp_path):
    make_pair(tmp_path, labels=COLOURED)
    assert read_target(make_spec(**COLOURS, ignore_colours=[[9, 9, 9]]), tmp_path) == [[0, 1, 2], [1, 0, 255]]


def test_unknown_colour_is_named_with_its_pixel(tmp_path):
    make_pair(tmp_path, labels=COLOURED)
    message = refuse(make_spec(**COLOURS), tmp_path)
    assert "E-DATA-043" in message
    assert "pixel at row 1, column 2 has the colour [9, 9, 9], which no class has; so have 1 pixels" in message
    assert message.split(" | ")[1].endswith("masks/a.png")


def test_a_near_colour_is_not_the_colour(tmp_path):
    make_pair(tmp_path, labels=np.array([[(254, 0, 0), (255, 0, 1)]], np.uint8))
    assert "[254, 0, 0], which no class has; so have 2 pixels, of 2 such colours" in refuse(
        make_spec(**COLOURS), tmp_path
    )


def test_coloured_label_maps_with_palette_or_alpha_mean_their_colours(tmp_path):
    make_pair(tmp_path)
    image = Image.fromarray(np.array([[2, 0, 1]], np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 0])
    image.save(tmp_path / "masks" / "a.png")
    save(tmp_path / "images" / "a.png", picture((1, 3)))
    assert read_target(make_spec(**COLOURS), tmp_path) == [[0, 1, 2]]
    alpha = np.array([[(0, 0, 0, 255), (255, 0, 0, 0), (0, 255, 0, 9)]], np.uint8)
    save(tmp_path / "masks" / "a.png", alpha)
    assert read_target(make_spec(**COLOURS), tmp_path) == [[0, 1, 2]]


def test_coloured_label_map_saved_as_jpeg_is_refused(tmp_path):
    """P25."""
    make_pair(tmp_path)
    (tmp_path / "masks" / "a.png").unlink()
    save(tmp_path / "masks" / "a.jpg", COLOURED)
    assert "no PNG file: other formats change colours" in refuse(make_spec(**COLOURS), tmp_path)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_black_and_white_in_any_mode_are_two_classes(tmp_path, mode):
    make_pair(tmp_path)
    mask = Image.fromarray(np.array([[0, 255, 255], [0, 0, 255]], np.uint8))
    mask.convert(mode).save(tmp_path / "masks" / "a.png")
    spec = make_spec(label_format="binary", classes=["background", "object"])
    assert read_target(spec, tmp_path) == [[0, 1, 1], [0, 0, 1]]


def test_a_smoothed_mask_is_refused_not_cut_at_a_threshold(tmp_path):
    make_pair(tmp_path, labels=np.array([[0, 255, 127], [0, 0, 254]], np.uint8))
    message = refuse(make_spec(label_format="binary", classes=["background", "object"]), tmp_path)
    assert "row 0, column 2 has the colour [127, 127, 127]" in message


# --- where files are


def test_subfolders_belong_to_a_folder_and_suffixes_may_differ_in_case(tmp_path):
    save(tmp_path / "images" / "city" / "a.JPG", picture(), format="JPEG")
    save(tmp_path / "images" / "b.jpeg", picture())
    save(tmp_path / "images" / ".hidden.png", picture())
    save(tmp_path / "masks" / "city" / "a.png", IDS)
    save(tmp_path / "masks" / "b.PNG", IDS, format="PNG")
    assert open_names(make_spec(), tmp_path) == ["b", "city-a"]


def test_templates_tell_pictures_and_label_maps_in_one_folder_apart(tmp_path):
    for stem in ("a", "b.1"):
        save(tmp_path / "all" / f"{stem}.png", picture())
        save(tmp_path / "all" / f"{stem}_mask.png", IDS)
    spec = make_spec(files={"images": "all/{stem}.png", "labels": "all/{stem}_mask.png"})
    assert open_names(spec, tmp_path) == ["a", "b.1"]
    assert read_target(spec, tmp_path) == IDS.tolist()


def test_splits_are_folders_of_any_name(tmp_path):
    for folder, name in (("training", "a"), ("val", "b")):
        save(tmp_path / "img" / folder / "x" / f"{name}_rgb.jpg", picture())
        save(tmp_path / f"{folder}annot" / "x" / f"{name}.png", IDS)
    spec = make_spec(
        files={"images": "img/{split}/{folder}/{stem}_rgb.jpg", "labels": "{split}annot/{folder}/{stem}.png"},
        splits={"train": {"folder": "training"}, "val": {}},
    )
    assert open_names(spec, tmp_path) == ["x-a"]
    assert open_names(spec, tmp_path, "val") == ["x-b"]
    with pytest.raises(DataError, match=r"E-DATA-038 .* split 'vall'; allowed: train, val \| fix: did you mean val"):
        CustomDataset(spec, tmp_path, "vall")


def test_lists_may_be_sloppy_and_name_samples_in_many_ways(tmp_path):
    """P29: blanks, Windows line ends, byte order mark, backslashes, paths, two paths a line."""
    names = ["a", "b c", "d", "sub/e", "f", "g"]
    for name in names:
        make_pair(tmp_path, name)
    lines = [
        "",
        "g  ",
        "images/a.png",
        "b c",
        "./masks\\d.png\t",
        "/images/sub/e.png /masks/sub/e.png",
        "old/place/f.jpg",
    ]
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    spec = make_spec(splits={"train": {"list": "list.txt"}})
    assert open_names(spec, tmp_path) == ["g", "a", "b c", "d", "sub-e", "f"]


def test_everything_wrong_with_a_list_and_its_samples_is_found_at_once(tmp_path):
    for name in ("a", "b", "c"):
        make_pair(tmp_path, name)
    (tmp_path / "masks" / "c.png").unlink()
    (tmp_path / "list.txt").write_text("a\nabsent\na\nc\na b\n")
    spec = make_spec(splits={"train": {"list": "list.txt"}})
    with pytest.raises(PairsError, match="E-DATA-047") as raised:
        CustomDataset(spec, tmp_path, "train")
    words = " ".join(map(str, raised.value.causes))
    assert "line 2: no sample, or more than one, is called 'absent'" in words
    assert "line 3: a is in line 1 already" in words
    assert "line 5: names of different samples" in words
    assert "no label map for 1 sample (c)" in words
    with pytest.raises(DataError, match="no such list"):
        CustomDataset(make_spec(splits={"train": {"list": "no.txt"}}), tmp_path, "train")


def test_a_name_that_may_mean_two_samples_is_not_guessed(tmp_path):
    for folder in ("x", "y"):
        save(tmp_path / "images" / folder / "a.png", picture())
        save(tmp_path / "masks" / folder / "a.png", IDS)
    (tmp_path / "list.txt").write_text("a\n")
    spec = make_spec(splits={"train": {"list": "list.txt"}})
    with pytest.raises(DataError, match="no sample, or more than one, is called 'a'"):
        CustomDataset(spec, tmp_path, "train")
    (tmp_path / "list.txt").write_text("x/a\n")
    assert open_names(spec, tmp_path) == ["x-a"]


def test_shares_part_the_samples_and_hang_on_seed_and_names_alone(tmp_path):
    names = [f"{index:03d}" for index in range(40)]
    for name in names:
        make_pair(tmp_path, name)
    splits = {"train": {"share": 0.7}, "val": {"share": 0.2}, "test": {"share": 0.1}}
    spec = make_spec(splits=splits)
    parts = [open_names(spec, tmp_path, split) for split in splits]
    assert [len(part) for part in parts] == [28, 8, 4]
    assert sorted(name for part in parts for name in part) == names
    assert [open_names(make_spec(splits=splits), tmp_path, split) for split in splits] == parts
    assert open_names(make_spec(splits=splits, split_seed=1), tmp_path, "val") != parts[1]
    for index in range(0, 40, 10):
        (tmp_path / "images" / f"{index:03d}.png").unlink()
        (tmp_path / "masks" / f"{index:03d}.png").unlink()
    moved = set(open_names(spec, tmp_path, "val")) - set(parts[1])
    assert len(moved) <= 3


def test_shares_stay_as_they_were_drawn(tmp_path):
    """A saved run must find the same split after an update: these names were drawn by this rule once."""
    for index in range(10):
        make_pair(tmp_path, f"p{index}")
    spec = make_spec(splits={"train": {"share": 0.7}, "val": {"share": 0.3}})
    assert open_names(spec, tmp_path, "val") == ["p4", "p7", "p8"]


def test_samples_that_are_not_whole_are_named(tmp_path):
    """P27."""
    for name in ("a", "b", "c"):
        make_pair(tmp_path, name)
    (tmp_path / "images" / "b.png").unlink()
    (tmp_path / "masks" / "c.png").unlink()
    save(tmp_path / "images" / "a.jpg", picture())
    with pytest.raises(PairsError) as raised:
        CustomDataset(make_spec(), tmp_path, "train")
    words = " ".join(map(str, raised.value.causes))
    assert "no label map for 1 sample (c); no image for 1 sample (b)" in words
    assert "a.jpg and a.png" in words


def test_folders_that_are_not_there_are_named_with_what_is(tmp_path):
    make_pair(tmp_path)
    message = refuse(make_spec(files={"images": "imgs", "labels": "masks"}), tmp_path)
    assert "E-DATA-045" in message
    assert "holds images/, masks/" in message
    with pytest.raises(DataError, match="E-DATA-039"):
        CustomDataset(make_spec(), None, "train")
    (tmp_path / "empty" / "images").mkdir(parents=True)
    (tmp_path / "empty" / "masks").mkdir()
    assert "E-DATA-040" in refuse(make_spec(), tmp_path / "empty")


def test_two_samples_of_one_name_are_refused(tmp_path):
    for name in ("x/a", "x-a"):
        make_pair(tmp_path, name)
    assert "two samples have the name x-a" in refuse(make_spec(), tmp_path)


def test_loops_of_links_end_and_odd_files_are_left_alone(tmp_path):
    """P30."""
    make_pair(tmp_path)
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    (tmp_path / "images" / "broken.png").symlink_to(tmp_path / "nowhere")
    found = find_files(tmp_path, "images", suffixes=(".png",))
    assert sorted(found) == ["a", "broken"]


def test_sizes_that_differ_are_refused_and_exif_is_applied_only_where_it_fits(tmp_path):
    """P22, P23."""
    make_pair(tmp_path)
    save(tmp_path / "images" / "a.png", picture((4, 4)))
    assert "picture of 4x4, but its labels are 2x3" in refuse(make_spec(), tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images" / "a.png").unlink()
    save(tmp_path / "images" / "a.jpg", picture((3, 2)), exif=exif)
    assert CustomDataset(make_spec(), tmp_path, "train").read(0).image.shape == (2, 3, 3)


def test_what_verify_needs_is_there(tmp_path):
    make_pair(tmp_path)
    dataset = CustomDataset(make_spec(label_map={255: "ignore"}), tmp_path, "train")
    assert [(pair.name, pair.image.name, pair.label.name) for pair in dataset.pairs] == [("a", "a.png", "a.png")]
    assert dataset.label_values == {0, 1, 2, 255}
    assert dataset.label_map[[0, 1, 2, 255]].tolist() == [0, 1, 2, 255]
    assert dataset.colours is None
    coloured = CustomDataset(make_spec(**COLOURS, ignore_colours=[[9, 9, 9]]), tmp_path, "train")
    assert coloured.colours == {(0, 0, 0): 0, (1, 1, 1): 0, (255, 0, 0): 1, (0, 255, 0): 2, (9, 9, 9): 255}
    assert coloured.label_values == {0, 1, 2, 255}
    assert coloured.label_map[[0, 1, 2, 3, 255]].tolist() == [0, 1, 2, 255, 255]


def test_facts_are_measured_of_pictures_spread_over_the_split(tmp_path):
    for index in range(9):
        make_pair(tmp_path, f"{index}", np.zeros((10 + index, 20), np.uint8))
    facts = CustomDataset(make_spec(), tmp_path, "train").measure(max_images=3)
    assert facts.num_images == 9
    assert facts.heights == (10, 14, 18)
    assert facts.widths == (20, 20, 20)


# --- COCO


SQUARE = [1, 1, 3, 1, 3, 3, 1, 3]


def write_coco(root: Path, annotations: list[dict[str, Any]], **changes: Any) -> DatasetSpec:
    """Write one picture of 4x4 with annotations; category 7 is cat, 9 dog, 5 bird."""
    save(root / "images" / "a.png", picture((4, 4)))
    values = {
        "images": [{"id": 3, "file_name": "a.png", "height": 4, "width": 4}],
        "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}, {"id": 5, "name": "bird"}],
        "annotations": [
            {"id": index, "image_id": 3, "category_id": 7} | entry for index, entry in enumerate(annotations)
        ],
    }
    (root / "coco.json").write_text(json.dumps(values | changes.pop("values", {})))
    return make_spec(
        files={"images": "images", "labels": "coco.json"}, label_format="coco", unannotated="background", **changes
    )


def test_coco_polygons_are_drawn_over_the_background(tmp_path):
    spec = write_coco(tmp_path, [{"segmentation": [SQUARE]}])
    assert read_target(spec, tmp_path) == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert read_target(spec.model_copy(update={"unannotated": "ignore"}), tmp_path)[0] == [255] * 4


def test_coco_runs_are_read_in_both_forms(tmp_path):
    runs = {"size": [4, 4], "counts": [5, 2, 2, 2, 5]}
    expected = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert read_target(write_coco(tmp_path, [{"segmentation": runs}]), tmp_path) == expected
    # the fourth and fifth number are differences to the second and third: 2 - 2 and 5 - 2
    packed = {"size": [4, 4], "counts": "52203"}
    assert read_target(write_coco(tmp_path, [{"segmentation": packed}]), tmp_path) == expected


def test_small_objects_lie_on_top_of_large_ones_whatever_their_order(tmp_path):
    everything = [0, 0, 4, 0, 4, 4, 0, 4]
    for order in (1, -1):
        entries = [{"segmentation": [SQUARE]}, {"segmentation": [everything], "category_id": 9}][::order]
        assert read_target(write_coco(tmp_path, entries), tmp_path)[1] == [2, 1, 1, 2]


def test_crowds_are_ignored_beneath_everything_or_drawn(tmp_path):
    everything = {"size": [4, 4], "counts": [0, 16]}
    entries = [{"segmentation": [SQUARE]}, {"segmentation": everything, "iscrowd": 1, "category_id": 9}]
    assert read_target(write_coco(tmp_path, entries), tmp_path)[1] == [255, 1, 1, 255]
    assert read_target(write_coco(tmp_path, entries, crowd="draw"), tmp_path)[1] == [2, 1, 1, 2]


def test_categories_merge_and_those_without_a_class_are_errors_only_if_they_occur(tmp_path):
    spec = write_coco(tmp_path, [{"segmentation": [SQUARE]}])
    assert read_target(spec, tmp_path)[1] == [0, 1, 1, 0]
    message = refuse(write_coco(tmp_path, [{"segmentation": [SQUARE], "category_id": 5}]), tmp_path)
    assert "categories without a class: bird" in message
    classes = ["background", {"name": "cat", "labels": ["cat", "*"]}, "dog"]
    spec = write_coco(tmp_path, [{"segmentation": [SQUARE], "category_id": 5}], classes=classes)
    assert read_target(spec, tmp_path)[1] == [0, 1, 1, 0]
    spec = write_coco(tmp_path, [{"segmentation": [SQUARE], "category_id": 5}], ignore_labels=["*"])
    assert read_target(spec, tmp_path)[1] == [0, 255, 255, 0]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"segmentation": [[1, 2, 3, 4]]}, "at least three points"),
        ({"segmentation": [[1, 2, 3, 4, float("nan"), 5]]}, "at least three points"),
        ({"segmentation": [[1, 2, 3, 4, 1e300, 5]]}, "at least three points"),
        ({"segmentation": [["a", 2, 3, 4, 5, 6]]}, "at least three points"),
        ({"segmentation": []}, "at least three points"),
        ({"segmentation": None}, "neither polygons nor run lengths"),
        ({"segmentation": {"size": [4, 4], "counts": [5, 2]}}, "run lengths add up to 7, not 4 x 4 = 16"),
        ({"segmentation": {"size": [9, 9], "counts": [81]}}, "run lengths for size [9, 9], but the image is [4, 4]"),
        ({"segmentation": {"size": [4, 4], "counts": [20, -4]}}, "not a list of numbers from 0 on"),
        ({"segmentation": {"size": [4, 4], "counts": "5o"}}, "ends in the middle"),
        ({"segmentation": {"size": [4, 4], "counts": "5~"}}, "means nothing"),
        ({"segmentation": [SQUARE], "image_id": 4}, "there is no image 4"),
        ({"segmentation": [SQUARE], "category_id": 8}, "there is no category 8"),
        ({"segmentation": [SQUARE], "image_id": [1]}, "there is no image [1]"),
    ],
)
def test_annotations_that_make_no_sense_are_named(tmp_path, entry, words):
    message = refuse(write_coco(tmp_path, [entry]), tmp_path)
    assert "E-DATA-031" in message
    assert "annotation 0: " in message
    assert words in message


def test_coco_files_that_are_none_and_pictures_that_are_missing_are_named(tmp_path):
    spec = write_coco(tmp_path, [], values={"images": {}})
    assert "no list images" in refuse(spec, tmp_path)
    (tmp_path / "coco.json").write_text("{")
    assert "not JSON" in refuse(spec, tmp_path)
    outside = {"images": [{"id": 1, "file_name": "../x.png", "height": 4, "width": 4}]}
    assert "leads out of the folder" in refuse(write_coco(tmp_path, [], values=outside), tmp_path)
    absent = {"images": [{"id": 1, "file_name": "sub/b.png", "height": 4, "width": 4}]}
    assert "no image for 1 sample (sub/b)" in refuse(write_coco(tmp_path, [], values=absent), tmp_path)
    wrong = {"images": [{"id": 1, "file_name": "a.png", "height": 5, "width": 4}]}
    assert "picture of 4x4, but its labels are 5x4" in refuse(write_coco(tmp_path, [], values=wrong), tmp_path)


# --- labelme


def write_labelme(root: Path, shapes: list[dict[str, Any]], **changes: Any) -> DatasetSpec:
    save(root / "images" / "a.png", picture((4, 4)))
    (root / "json").mkdir(exist_ok=True)
    values = {"imageHeight": 4, "imageWidth": 4, "shapes": shapes, "imageData": None}
    (root / "json" / "a.json").write_text(json.dumps(values))
    return make_spec(
        files={"images": "images", "labels": "json"}, label_format="labelme", unannotated="background", **changes
    )


def test_labelme_shapes_are_drawn_in_their_order(tmp_path):
    mask = base64.b64encode(encode(np.array([[255, 0], [255, 255]], np.uint8))).decode()
    shapes = [
        {"label": "cat", "shape_type": "polygon", "points": [[1, 1], [3, 1], [3, 3], [1, 3]]},
        {"label": "dog", "shape_type": "rectangle", "points": [[2, 2], [4, 3]]},
        {"label": "cat", "shape_type": "circle", "points": [[0.5, 3.5], [1, 3.5]]},
        {"label": "dog", "shape_type": "mask", "points": [[0, 0], [1, 1]], "mask": mask},
    ]
    assert read_target(write_labelme(tmp_path, shapes), tmp_path) == [
        [2, 0, 0, 0],
        [2, 2, 1, 0],
        [0, 1, 2, 2],
        [1, 0, 0, 0],
    ]
    assert CustomDataset(write_labelme(tmp_path, shapes), tmp_path, "train").pairs == ()


def test_what_is_wrong_with_a_labelme_file_is_named_at_once(tmp_path):
    shapes = [
        {"label": "bird", "points": [[1, 1], [3, 1], [3, 3]]},
        {"label": "cat", "shape_type": "line", "points": [[1, 1], [3, 1]]},
        {"label": "cat", "shape_type": "polygon", "points": [[1, 1], [3, 1]]},
        {"label": "cat", "shape_type": "circle", "points": [[1, 1]]},
        {"label": "cat", "shape_type": "mask", "points": [[1, 1], [2, 2]], "mask": "?"},
        "shape",
    ]
    message = refuse(write_labelme(tmp_path, shapes), tmp_path)
    for words in ("shape 0: label 'bird' without a class", "shape 1: a line has no inside", "shape 2: not a polygon"):
        assert words in message
    for words in ("shape 3: not two points", "shape 4: its mask is no picture", "shape 5: not an object"):
        assert words in message
    spec = write_labelme(tmp_path, [])
    (tmp_path / "json" / "a.json").write_text("{}")
    assert "no list shapes" in refuse(spec, tmp_path)


# --- parquet and tar


def write_parquet(path: Path, count: int, *, start: int = 0, group: int = 2) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = {
        "image": [{"bytes": encode(picture(seed=start + row), "JPEG"), "path": None} for row in range(count)],
        "label": [encode(np.full((2, 3), (start + row) % 3, np.uint8)) for row in range(count)],
        "id": list(range(count)),
    }
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pyarrow.table(rows), path, row_group_size=group)


PARQUET = {"files": None, "parquet": {"files": "data/{split}-*.parquet"}, "splits": {"train": None, "val": None}}


def test_parquet_rows_are_read_in_any_order(tmp_path):
    write_parquet(tmp_path / "data" / "train-0.parquet", 5)
    write_parquet(tmp_path / "data" / "train-1.parquet", 3, start=5)
    write_parquet(tmp_path / "data" / "val-0.parquet", 1)
    dataset = CustomDataset(make_spec(**PARQUET), tmp_path, "train")
    assert len(dataset) == 8
    assert dataset.name(5) == "train-1-000000"
    for index in (7, 0, 4, 5, 1, 2):
        sample = dataset.read(index)
        assert (sample.target == index % 3).all()
        np.testing.assert_array_equal(
            sample.image, np.asarray(Image.open(io.BytesIO(encode(picture(seed=index), "JPEG"))))
        )
    fresh = CustomDataset(make_spec(**PARQUET), tmp_path, "train")
    assert len(pickle.dumps(dataset)) == len(pickle.dumps(fresh)), "a worker gets no pictures"
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(dataset)).read(3).target, dataset.read(3).target)
    assert len(CustomDataset(make_spec(**PARQUET), tmp_path, "val")) == 1


def test_parquet_files_that_cannot_be_used_are_named(tmp_path):
    spec = make_spec(**PARQUET)
    assert "no file matches data/train-*.parquet" in refuse(spec, tmp_path)
    write_parquet(tmp_path / "data" / "train-0.parquet", 2)
    other = PARQUET | {"parquet": {"files": "data/{split}-*.parquet", "label": "mask"}}
    assert "no column mask; there are: image, label, id" in refuse(make_spec(**other), tmp_path)
    other = PARQUET | {"parquet": {"files": "data/{split}-*.parquet", "label": "id"}}
    assert "column id of train-0-000000 holds no encoded picture, but int" in refuse(make_spec(**other), tmp_path)
    (tmp_path / "data" / "train-0.parquet").write_bytes(b"PAR1 nothing PAR1")
    assert "no parquet file" in refuse(spec, tmp_path)


def test_a_bad_label_in_a_parquet_file_is_named_by_its_row(tmp_path):
    write_parquet(tmp_path / "data" / "train-0.parquet", 3)
    spec = make_spec(**PARQUET | {"classes": ["a"]})
    with pytest.raises(DataError, match=r"E-DATA-041 \| train-0-000001 \| label value 1"):
        CustomDataset(spec, tmp_path, "train").read(1)


def write_shard(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


SHARDS = {"files": None, "webdataset": {"shards": "{split}-*.tar"}, "splits": {"train": None}}


def test_shards_are_read_by_their_members(tmp_path):
    for shard in range(2):
        members: dict[str, bytes] = {}
        for row in range(3):
            members[f"x/{shard}{row}.seg.png"] = encode(np.full((2, 3), row, np.uint8))
            members[f"x/{shard}{row}.cls"] = b"7"
            members[f"x/{shard}{row}.jpg"] = encode(picture(seed=row), "JPEG")
        write_shard(tmp_path / f"train-{shard}.tar", members)
    dataset = CustomDataset(make_spec(**SHARDS), tmp_path, "train")
    assert [dataset.name(index) for index in range(6)] == ["x-00", "x-01", "x-02", "x-10", "x-11", "x-12"]
    for index in (5, 0, 3, 1):
        assert (dataset.read(index).target == index % 3).all()
    spec = make_spec(**SHARDS | {"splits": {"train": {"list": "l.txt"}}, "webdataset": {"shards": "*.tar"}})
    (tmp_path / "l.txt").write_text("x/11\nx/02\n")
    assert open_names(spec, tmp_path) == ["x-11", "x-02"]
    assert (CustomDataset(spec, tmp_path, "train").read(1).target == 2).all()


def test_shards_that_cannot_be_used_are_named(tmp_path):
    good = {"a.jpg": encode(picture(), "JPEG"), "a.png": encode(IDS)}
    shard = tmp_path / "train-0.tar"
    write_shard(shard, good | {"b.jpg": b"x"})
    assert "b has no label" in refuse(make_spec(**SHARDS), tmp_path)
    write_shard(shard, good | {"a.seg.png": encode(IDS)})
    assert "is a second label of its sample" in refuse(make_spec(**SHARDS), tmp_path)
    write_shard(shard, good, "w:gz")
    assert "no plain tar file" in refuse(make_spec(**SHARDS), tmp_path)
    write_shard(shard, {"a.png": encode(IDS), "a.jpg": np.random.default_rng(0).bytes(20_000)})
    shard.write_bytes(shard.read_bytes()[:10_000])
    assert "no plain tar file" in refuse(make_spec(**SHARDS), tmp_path)
    write_shard(shard, good | {"a.jpg": b"<html>"})
    assert f"{shard}:a.jpg" in refuse(make_spec(**SHARDS), tmp_path)


# Pictures of other types


def make_grey_16(root: Path, count: int = 6) -> None:
    for number in range(count):
        save(root / "images" / f"{number}.png", np.full((40, 60), 1000 * number + 7, np.uint16))
        save(root / "masks" / f"{number}.png", np.repeat(np.arange(60, dtype=np.uint8)[None] // 20, 40, 0))


def test_arrays_are_found_as_pictures_where_they_are_not_8_bit_rgb(tmp_path):
    make_pair(tmp_path)
    np.save(tmp_path / "images/a.npy", np.full((2, 3, 5), 0.25, np.float32))
    assert CustomDataset(make_spec(), tmp_path, "train").read(0).image.dtype == np.uint8
    (tmp_path / "images/a.png").unlink()
    image = CustomDataset(make_spec(channels=5, dtype="float32"), tmp_path, "train").read(0).image
    assert image.shape == (2, 3, 5)
    assert (image == 0.25).all()


def test_verify_knows_the_image_type_of_the_data_set_file(tmp_path):
    make_grey_16(tmp_path)
    report = verify_custom(make_spec(channels=1, dtype="uint16"), tmp_path)
    assert report.problems == ()
    assert report.splits[0].image_kinds == {"1-channel uint16": 6}
    as_rgb = verify_custom(make_spec(), tmp_path)
    assert [problem.code for problem in as_rgb.problems] == [kinds.IMAGE_KIND.code]

    save(tmp_path / "images/1.png", picture((40, 60)))
    (tmp_path / "images/2.png").write_bytes((tmp_path / "images/2.png").read_bytes()[:-20])
    save(tmp_path / "images/3.png", np.zeros((40, 50), np.uint16))
    (tmp_path / "images/5.png").unlink()
    np.save(tmp_path / "images/5.npy", np.zeros((40, 60), np.uint16))
    found = {
        Path(problem.path).stem: problem.code
        for problem in verify_custom(make_spec(channels=1, dtype="uint16"), tmp_path).problems
    }
    assert found == {
        "1": kinds.OTHER_TYPE.code,
        "2": kinds.CUT.code,
        "3": kinds.SIZES.code,
    }


def test_a_packed_copy_is_measured_as_what_it_was_packed_from(tmp_path):
    for number in range(70):
        make_pair(tmp_path, f"{number:02d}", np.zeros((20 + number, 30), np.uint8))
    spec = make_spec()
    dataset = CustomDataset(spec, tmp_path, "train")
    pack_dataset(dataset, tmp_path / "packed", split="train")
    assert measure_dataset(spec, tmp_path / "packed") == measure_dataset(spec, tmp_path) == dataset.measure()


@pytest.mark.parametrize(
    ("ids", "num_classes", "clue"),
    [
        ([0, 255], 2, "saved as 0/255"),
        ([1, 2, 3], 3, "looks one-based"),
        ([0, 1, 2, 3], 3, "with 0 for pixels that nobody labelled"),
        ([0, 85, 170], 3, "stretched"),
        ([0, 1, 2, 255], 3, "255 stands for ignored"),
    ],
)
def test_the_label_map_that_verify_proposes_makes_the_data_set_right(tmp_path, ids, num_classes, clue):
    labels = np.repeat(np.repeat(np.array([ids], np.uint8), 40, 0), 12, 1)
    for number in range(3):
        make_pair(tmp_path, str(number), labels)
    spec = make_spec(classes=["a", "b", "c"][:num_classes])
    problem = next(problem for problem in verify_custom(spec, tmp_path).errors if clue in problem.reason)
    proposed = re.search(r"`label_map: (.*)`", problem.fix)[1]
    changed = make_spec(classes=["a", "b", "c"][:num_classes], label_map=yaml.safe_load(proposed))
    assert verify_custom(changed, tmp_path).errors == ()
    assert set(np.unique(CustomDataset(changed, tmp_path, "train").read(0).target)) - {255} == set(range(num_classes))


def test_verify_reads_what_has_no_label_files_of_its_own(tmp_path):
    report = verify_custom(write_coco(tmp_path, [{"segmentation": [SQUARE]}]), tmp_path)
    assert report.errors == ()
    (summary,) = report.splits
    assert summary.image_kinds == {"RGB": 1}
    assert summary.class_pixels == (12, 4, 0)


def test_verify_by_reading_asks_what_it_asks_of_files_too(tmp_path):
    square = {"segmentation": [SQUARE]}
    spec = write_coco(tmp_path, [square], classes=["background", "cat", "dog"])
    save(tmp_path / "images" / "b.png", picture((4, 4)))
    save(tmp_path / "images" / "c.png", picture((4, 4)))
    (tmp_path / "images" / "c.png").write_bytes((tmp_path / "images" / "c.png").read_bytes()[:60])
    values = json.loads((tmp_path / "coco.json").read_text())
    values["images"] += [
        {"id": index, "file_name": f"{name}.png", "height": 4, "width": 4} for index, name in ((4, "b"), (5, "c"))
    ]
    (tmp_path / "coco.json").write_text(json.dumps(values))
    for name, line in (("train", "a"), ("val", "b\nc")):
        (tmp_path / f"{name}.txt").write_text(line + "\n")
    spec = spec.model_copy(update={"splits": {name: SplitSection(list=f"{name}.txt") for name in ("train", "val")}})
    here = verify_custom(spec, tmp_path, num_workers=0)
    found = {(problem.code, problem.split) for problem in here.problems}
    assert ("E-VERIFY-052", "val") in found  # b is a
    assert ("E-VERIFY-056", "train") in found  # no dog
    assert [problem.path.endswith("c.png") for problem in here.errors] == [True]
    assert verify_custom(spec, tmp_path, num_workers=1).to_json() == here.to_json()
