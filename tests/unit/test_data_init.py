"""``data init``: folders as people have them, and what is concluded about each."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestseg.core.errors import SpecError
from nestseg.data.custom import CustomDataset
from nestseg.data.init import FILE_NAME, Inspection, init_dataset, inspect_folder
from nestseg.data.spec import DatasetSpec

REAL = Path(os.environ.get("NESTSEG_REAL_DATA", "../shared/data"))


def photo(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 24, 3), np.uint8)


def blocks(*values: int) -> np.ndarray:
    """Draw a label map of upright bars."""
    return np.repeat(np.repeat(np.array([values], np.uint8), 16, 0), 24 // len(values), 1)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_pairs(root: Path, images: str, labels: str, *, count: int = 5, label: np.ndarray | None = None) -> None:
    """Write pictures and label maps; templates with {} for the number."""
    for index in range(count):
        save(root / images.format(index), photo(index))
        save(root / labels.format(index), blocks(0, 1, 2) if label is None else label)


def inspect(root: Path) -> Inspection:
    """Inspect, and see that what was written reads back and opens."""
    inspection = inspect_folder(root)
    assert DatasetSpec.parse(inspection.to_yaml()) == inspection.spec
    for split in inspection.spec.splits:
        assert len(CustomDataset(inspection.spec, root, split)) > 0
    assert all(words for _, words in inspection.conclusions)
    return inspection


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        ("images/{}.jpg", "masks/{}.png", ("images/{stem}.jpg", "masks/{stem}.png")),
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", ("JPEGImages/{stem}.jpg", "SegmentationClass/{stem}.png")),
        ("{}.jpg", "{}.png", ("{stem}.jpg", "{stem}.png")),
        ("all/{}.png", "all/{}_mask.png", ("all/{stem}.png", "all/{stem}_mask.png")),
        ("a/x{}_rgb.png", "b/x{}_labels.png", ("a/{stem}_rgb.png", "b/{stem}_labels.png")),
    ],
)
def test_pictures_and_label_maps_are_told_apart_by_folder_or_ending(tmp_path, images, labels, expected):
    make_pairs(tmp_path, images, labels)
    spec = inspect(tmp_path).spec
    assert spec.files is not None
    assert (spec.files.images, spec.files.labels) == expected
    assert [entry.name for entry in spec.classes] == ["class_0", "class_1", "class_2"]
    assert {name: section.share for name, section in spec.splits.items()} == {"train": 0.8, "val": 0.2}


@pytest.mark.parametrize(
    ("layout", "images", "labels"),
    [
        ("images/{split}/{}.jpg masks/{split}/{}.png", "images/{split}/{stem}.jpg", "masks/{split}/{stem}.png"),
        ("{split}/images/{}.jpg {split}/masks/{}.png", "{split}/images/{stem}.jpg", "{split}/masks/{stem}.png"),
        ("{split}/{}.png {split}annot/{}.png", "{split}/{stem}.png", "{split}annot/{stem}.png"),
    ],
)
def test_splits_are_told_by_folders(tmp_path, layout, images, labels):
    image, label = layout.split()
    for word in ("training", "validation", "test"):
        make_pairs(tmp_path, image.replace("{split}", word), label.replace("{split}", word), count=3)
    spec = inspect(tmp_path).spec
    assert (spec.files.images, spec.files.labels) == (images, labels)
    folders = {name: section.folder for name, section in spec.splits.items()}
    assert folders == {"train": "training", "val": "validation", "test": None}


def test_folders_side_by_side_are_taken_together(tmp_path):
    for split in ("train", "val"):
        for city in ("aachen", "ulm"):
            make_pairs(tmp_path, f"img/{split}/{city}/{{}}_rgb.png", f"gt/{split}/{city}/{{}}_ids.png", count=2)
    spec = inspect(tmp_path).spec
    assert spec.files.images == "img/{split}/{folder}/{stem}_rgb.png"
    assert spec.files.labels == "gt/{split}/{folder}/{stem}_ids.png"
    assert len(CustomDataset(spec, tmp_path, "train")) == 4


def test_splits_are_told_by_lists(tmp_path):
    make_pairs(tmp_path, "images/{}.jpg", "masks/{}.png")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "train.txt").write_bytes(b"0\r\n1\r\n2 \r\n")
    (tmp_path / "splits" / "val.txt").write_text("images/3.jpg masks/3.png\n")
    (tmp_path / "notes.txt").write_text("nothing\n")
    spec = inspect(tmp_path).spec
    assert {name: section.list for name, section in spec.splits.items()} == {
        "train": "splits/train.txt",
        "val": "splits/val.txt",
    }


def test_255_is_ignored_and_said_so(tmp_path):
    make_pairs(tmp_path, "images/{}.jpg", "masks/{}.png", label=blocks(0, 1, 255))
    inspection = inspect(tmp_path)
    assert inspection.spec.class_of_id == {0: 0, 1: 1, 255: 255}
    assert "# 255 covers 33.3% of the pixels: ignored" in inspection.to_yaml()


@pytest.mark.parametrize("mode", ["L", "1", "RGB"])
def test_black_and_white_masks_are_binary(tmp_path, mode):
    make_pairs(tmp_path, "images/{}.jpg", "masks/{}.png")
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(blocks(0, 255, 0)).convert(mode).save(path)
    spec = inspect(tmp_path).spec
    assert spec.label_format == "binary"
    assert spec.taxonomy.classes == ("background", "object")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 7, 26), {0: 0, 7: 1, 26: 2}),
        ((1, 2, 3), {1: 0, 2: 1, 3: 2}),
        ((0, 2, 3), {0: 0, 1: 1, 2: 2, 3: 3}),
    ],
)
def test_ids_with_gaps_and_one_based_ids_get_classes_of_their_own(tmp_path, values, expected):
    make_pairs(tmp_path, "images/{}.jpg", "masks/{}.png", label=blocks(*values))
    assert inspect(tmp_path).spec.class_of_id == expected


def test_names_come_from_a_file_of_names(tmp_path):
    make_pairs(tmp_path, "images/{}.jpg", "masks/{}.png")
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\ntree\n")
    spec = inspect(tmp_path).spec
    assert spec.taxonomy.classes == ("sky", "road", "car", "tree")


COLOURED = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0)], np.uint8)[blocks(0, 1, 2)]


def test_colours_become_classes_with_names_of_the_label_file(tmp_path):
    make_pairs(tmp_path, "JPEGImages/{}.jpg", "SegmentationClass/{}.png", label=COLOURED)
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:128,0,0::\n")
    spec = inspect(tmp_path).spec
    assert spec.label_format == "colours"
    assert spec.class_of_colour == {(0, 0, 0): 0, (128, 0, 0): 1, (0, 128, 0): 2}
    assert spec.taxonomy.classes == ("background", "cat", "colour_0_128_0")


def test_a_known_palette_is_recognised(tmp_path):
    make_pairs(tmp_path, "images/{}.jpg", "masks/{}.png", label=COLOURED)
    inspection = inspect(tmp_path)
    assert "aeroplane" in inspection.spec.taxonomy.classes
    assert any("the palette of voc" in words for _, words in inspection.conclusions)


def test_coco_files_are_recognised(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "a.jpg", photo())
        values = {
            "images": [{"id": 1, "file_name": "a.jpg", "height": 16, "width": 24}],
            "categories": [{"id": 1, "name": "cat"}, {"id": 9, "name": "dog"}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9]]}],
        }
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(values))
        (tmp_path / "annotations" / f"captions_{split}.json").write_text(
            json.dumps(values | {"annotations": [{"id": 1}]})
        )
    spec = inspect(tmp_path).spec
    assert spec.label_format == "coco"
    assert (spec.files.images, spec.files.labels) == ("{split}", "annotations/instances_{split}.json")
    assert spec.taxonomy.classes == ("background", "cat", "dog")
    assert spec.unannotated == "background"


def test_labelme_files_are_recognised(tmp_path):
    for index in range(4):
        save(tmp_path / f"{index}.jpg", photo())
        shapes = [
            {"label": label, "shape_type": "rectangle", "points": [[1, 1], [9, 9]]} for label in ("cat", "__ignore__")
        ]
        values = {"imageHeight": 16, "imageWidth": 24, "shapes": shapes}
        (tmp_path / f"{index}.json").write_text(json.dumps(values))
    spec = inspect(tmp_path).spec
    assert spec.label_format == "labelme"
    assert spec.class_of_label == {"background": 0, "cat": 1, "__ignore__": 255}
    assert CustomDataset(spec, tmp_path, "train").read(0).target[2, 2] == 255


def encode(array: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def test_parquet_files_are_recognised(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        rows = {
            "id": [1, 2],
            "image": [{"bytes": encode(photo(), "JPEG"), "path": "a.jpg"}] * 2,
            "annotation": [{"bytes": encode(blocks(0, 1), "PNG"), "path": "a.png"}] * 2,
        }
        parquet.write_table(pyarrow.table(rows), tmp_path / "data" / f"{name}.parquet")
    spec = inspect(tmp_path).spec
    assert (spec.parquet.files, spec.parquet.image, spec.parquet.label) == (
        "data/{split}*.parquet",
        "image",
        "annotation",
    )
    assert {name: section.folder for name, section in spec.splits.items()} == {"train": None, "val": "validation"}
    assert len(CustomDataset(spec, tmp_path, "train")) == 4


def test_shards_are_recognised(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:04d}.tar", "w") as tar:
            for row in range(3):
                for ending, content in (("jpg", encode(photo(), "JPEG")), ("mask.png", encode(blocks(0, 255), "PNG"))):
                    info = tarfile.TarInfo(f"{shard}{row}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    spec = inspect(tmp_path).spec
    assert (spec.webdataset.shards, spec.webdataset.image, spec.webdataset.label) == ("*.tar", ("jpg",), ("mask.png",))
    assert spec.label_format == "binary"
    assert {name: section.share for name, section in spec.splits.items()} == {"train": 0.8, "val": 0.2}


def test_a_file_is_written_once_and_replaced_only_if_asked(tmp_path):
    make_pairs(tmp_path, "images/{}.jpg", "masks/{}.png")
    file, inspection = init_dataset(tmp_path)
    assert file == tmp_path / FILE_NAME
    assert DatasetSpec.read(file) == inspection.spec
    with pytest.raises(SpecError, match="E-SPEC-020"):
        init_dataset(tmp_path)
    assert init_dataset(tmp_path, overwrite=True)[1].spec == inspection.spec
    assert init_dataset(tmp_path, out=tmp_path / "other.yaml")[0].is_file()
    with pytest.raises(SpecError, match="E-SPEC-021"):
        init_dataset(tmp_path, out=tmp_path / "absent" / "other.yaml")


def test_a_folder_without_a_data_set_says_what_is_there(tmp_path):
    with pytest.raises(SpecError, match="E-SPEC-022"):
        inspect_folder(tmp_path / "absent")
    with pytest.raises(SpecError, match=r"E-SPEC-023 .* there is: nothing"):
        inspect_folder(tmp_path)
    for index in range(3):
        save(tmp_path / "photos" / f"{index}.png", photo(index))
        save(tmp_path / "more" / f"{index}.png", photo(index) // 64 * 64)  # flatter, and no label map all the same
    with pytest.raises(SpecError, match=r"3 more/\*\.png, 3 photos/\*\.png"):
        inspect_folder(tmp_path)


def test_smoothed_colours_are_no_classes(tmp_path):
    smooth = np.repeat(np.arange(240, dtype=np.uint8).reshape(1, 240, 1), 16, 0).repeat(3, 1).repeat(3, 2)
    smooth[:, :, 1] = 7
    for index in range(3):
        save(tmp_path / "images" / f"{index}.jpg", np.random.default_rng(0).integers(0, 256, smooth.shape, np.uint8))
        save(tmp_path / "masks" / f"{index}.png", smooth.repeat(8, 1))
    with pytest.raises(SpecError, match="more than 128 colours: smoothed, resized or saved as JPEG"):
        inspect_folder(tmp_path)


def test_damaged_label_maps_are_counted_and_left_to_verify(tmp_path):
    make_pairs(tmp_path, "images/{}.jpg", "masks/{}.png", count=9)
    (tmp_path / "masks" / "8.png").write_bytes(b"")
    inspection = inspect_folder(tmp_path)
    assert any("1 label maps cannot be read" in words for _, words in inspection.conclusions)


needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real samples in {REAL}")


@needs_real
@pytest.mark.parametrize(
    ("folder", "images", "num_classes", "counts"),
    [
        ("camvid", "{split}/{stem}.jpg", 12, {"train": 367, "val": 101}),
        ("voc_mini", "VOCdevkit/VOC2012/JPEGImages/{stem}.jpg", 21, {"train": 72, "val": 18}),
        ("cityscapes_mini", "leftImg8bit/{split}/{folder}/{stem}_leftImg8bit.png", 34, {"train": 3, "val": 1}),
    ],
)
def test_published_layouts_are_found_without_being_told(folder, images, num_classes, counts):
    spec = inspect_folder(REAL / folder).spec
    assert spec.files.images == images
    assert len(spec.classes) == num_classes
    assert {split: len(CustomDataset(spec, REAL / folder, split)) for split in spec.splits} == counts


def test_16_bit_grey_is_kept_whole_if_all_pictures_are(tmp_path):
    make_pairs(tmp_path, "images/{}.png", "masks/{}.png")
    for index in range(5):
        assert inspect(tmp_path).spec.is_rgb
        save(tmp_path / f"images/{index}.png", photo(index)[:, :, 0].astype(np.uint16) * 257)
    inspection = inspect(tmp_path)
    assert (inspection.spec.channels, inspection.spec.dtype) == (1, "uint16")
    assert (
        "# all of 5 pictures are 16-bit grey: read with all their bits, as one channel\ndtype:" in inspection.to_yaml()
    )
