"""The data set file: typed, closed, and telling what is wrong in words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import yaml

from nestseg.core.errors import SpecError
from nestseg.data.datasets import DATASETS
from nestseg.data.spec import DatasetSpec, LabelFormat, describe_fields, list_colour

PETS = """
name: pets
files: {images: images, labels: masks}
classes: [background, cat, dog]
splits: {train: {share: 0.8}, val: {share: 0.2}}
"""


def make_text(**changes: object) -> str:
    """Write PETS with other fields; None drops one."""
    values = yaml.safe_load(PETS) | changes
    return yaml.safe_dump({name: value for name, value in values.items() if value is not None}, sort_keys=False)


def refuse(text: str) -> str:
    with pytest.raises(SpecError) as raised:
        DatasetSpec.parse(text, source="my.yaml")
    message = str(raised.value)
    assert message.startswith("E-SPEC-00")
    assert " | my.yaml | " in message
    assert " | fix: " in message
    assert "\n" not in message
    return message


def test_a_short_file_is_enough_and_says_what_is_left_out():
    spec = DatasetSpec.parse(PETS)
    assert spec.taxonomy.classes == ("background", "cat", "dog")
    assert spec.taxonomy.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert (spec.label_format, spec.channels, spec.dtype, spec.absent_classes) == ("ids", 3, "uint8", "skip")
    assert spec.class_of_id == {0: 0, 1: 1, 2: 2}
    assert spec.licence == "not stated"


@pytest.mark.parametrize(
    "changes",
    [
        {"label_map": {255: "ignore", 7: "cat", 300: 1}},
        {"classes": ["sky", {"name": "cat", "colour": [1, 2, 3]}]},
        {"classes": [{"name": "a", "ids": [1]}, {"name": "b", "ids": [5, 6]}], "label_map": {0: "ignore"}},
        {"label_format": "binary", "classes": ["background", "object"], "ignore_colours": [[128, 128, 128]]},
        {"label_format": "labelme", "unannotated": "background", "ignore_labels": ["*"]},
        {
            "files": {"images": "{split}/images/{folder}/{stem}.jpg", "labels": "{split}/masks"},
            "splits": ["train", "val"],
        },
        {"files": None, "parquet": {"files": "data/{split}-*.parquet"}, "splits": {"train": None}},
        {"licence": "CC BY 4.0", "name": "my.pets-2", "split_seed": 7, "absent_classes": "zero"},
    ],
)
def test_a_spec_comes_back_from_its_yaml_and_from_the_plain_values_of_a_recipe(changes):
    spec = DatasetSpec.parse(make_text(**changes))
    assert DatasetSpec.parse(spec.to_yaml()) == spec
    assert DatasetSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert DatasetSpec.model_validate(yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json")))) == spec


def test_ids_of_no_line_mean_the_class_at_their_place():
    spec = DatasetSpec.parse(make_text(label_map={255: "ignore", 7: 1, 300: "dog", 1: "ignore", 9: 255}))
    assert spec.class_of_id == {0: 0, 1: 255, 2: 2, 255: 255, 7: 1, 300: 2, 9: 255}
    table = spec.make_id_table()
    assert table.shape == (65536,)
    assert table.dtype == np.uint8
    assert table[[0, 1, 2, 7, 300, 8]].tolist() == [0, 255, 2, 1, 2, 255]


def test_a_0_255_mask_is_one_line_of_the_label_map():
    spec = DatasetSpec.parse(make_text(classes=["background", "object"], label_map={255: 1}))
    assert spec.class_of_id == {0: 0, 1: 1, 255: 1}


def test_renumbering_ids_without_saying_what_the_others_mean_is_an_error():
    """One-based ids: 0 would silently become the first class as well (P24)."""
    message = refuse(make_text(label_map={1: 0, 2: 1, 3: 2}))
    assert "no line for 0" in message
    assert "0: ignore" in message
    spec = DatasetSpec.parse(make_text(label_map={0: "ignore", 1: 0, 2: 1, 3: 2}))
    assert spec.class_of_id == {0: 255, 1: 0, 2: 1, 3: 2}


def test_classes_with_ids_merge_and_name_everything_themselves():
    classes = [{"name": "ground", "ids": [7, 8]}, {"name": "thing", "ids": [26]}]
    spec = DatasetSpec.parse(make_text(classes=classes, label_map={0: "ignore"}))
    assert spec.class_of_id == {7: 0, 8: 0, 26: 1, 0: 255}


def test_colours_merge_and_are_ignored():
    classes = [{"name": "a", "colour": [0, 0, 0]}, {"name": "b", "colour": [1, 1, 1], "colours": [[2, 2, 2]]}]
    spec = DatasetSpec.parse(make_text(label_format="colours", classes=classes, ignore_colours=[[9, 9, 9]]))
    assert spec.class_of_colour == {(0, 0, 0): 0, (1, 1, 1): 1, (2, 2, 2): 1, (9, 9, 9): 255}


def test_names_of_regions_merge_are_ignored_and_may_stand_for_all_others():
    classes = ["background", {"name": "pet", "labels": ["cat", "dog"]}]
    changes = {"label_format": "labelme", "classes": classes, "unannotated": "background", "ignore_labels": ["*"]}
    spec = DatasetSpec.parse(make_text(**changes))
    assert spec.class_of_label == {"background": 0, "cat": 1, "dog": 1, "*": 255}
    assert spec.unannotated_id == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nam": "x"}, "unknown field nam: did you mean name"),
        ({"classes": None}, "classes is missing"),
        ({"classes": []}, "classes"),
        (
            {"classes": ["cat", False]},
            "classes.1.name is False: YAML reads this as false; write a number, or put a name",
        ),
        ({"classes": ["cat", "cat"]}, "class names given twice: cat"),
        ({"classes": ["cat", "ignore"]}, "a class named ignore"),
        ({"classes": [f"c{index}" for index in range(256)]}, "at most 255"),
        ({"classes": [{"name": "cat", "color": [1, 2, 3]}]}, "unknown field classes.0.color: did you mean colour"),
        ({"classes": [{"name": "cat", "colour": [1, 2, 300]}]}, "classes.0.colour.2 is 300"),
        ({"classes": [{"name": "a", "ids": [1]}, "b"]}, "classes without ids: b"),
        ({"classes": [{"name": "a", "ids": [1]}, {"name": "b", "ids": [1]}]}, "id 1 means a and b"),
        ({"classes": [{"name": "a", "ids": [1]}], "label_map": {2: "a"}}, "may only say which others are: ignore"),
        ({"classes": [{"name": "a", "labels": ["x"]}]}, "labels is for coco and labelme"),
        ({"label_map": {7: "cta"}}, "label_map 7: cta; did you mean cat"),
        ({"label_map": {7: 3}}, "label_map 7: 3; allowed: 0-2, a class name, or ignore"),
        ({"label_map": {70000: 1}}, "label_map.70000"),
        ({"label_map": {1: "ignore"}, "classes": ["a", "b"]}, "no stored id means b"),
        ({"name": "voc"}, "name voc is that of a data set that nestseg knows"),
        ({"name": "My Pets"}, "name is 'My Pets'"),
        ({"channels": "grey"}, "channels is 'grey'"),
        ({"dtype": "float64"}, "dtype is 'float64'"),
        ({"files": None}, "none of files, parquet and webdataset"),
        ({"parquet": {"files": "*.parquet"}}, "files and parquet of files, parquet and webdataset given"),
        ({"files": {"images": "../images", "labels": "masks"}}, "stay inside it"),
        ({"files": {"images": "/images", "labels": "masks"}}, "paths are relative"),
        ({"files": {"images": "a\\b", "labels": "masks"}}, "with / between folders"),
        ({"files": {"images": "{name}.jpg", "labels": "masks"}}, "unknown placeholder {name}; allowed: {split}"),
        ({"files": {"images": "{stem}/a.jpg", "labels": "masks"}}, "{stem} belongs into the last part"),
        ({"files": {"images": "x", "labels": "x"}}, "files.images and files.labels are both x"),
        ({"splits": ["train"]}, "split train: no path has {split} in it; give it a list or a share"),
        ({"splits": {"train": {"share": 0.8}, "val": {"share": 0.4}}}, "shares add up to 1.2"),
        ({"splits": {"train": {"share": 0.8}, "val": {"list": "val.txt"}}}, "give every split a share, or none"),
        ({"splits": {"train": {"share": 0.8, "list": "a.txt"}}}, "list and share given"),
        ({"splits": {"train": {"list": "a.txt", "folder": "b"}}}, "folder is given, but no path has {split}"),
        ({"splits": {"train": {"share": True}}}, "YAML reads this as true"),
        ({"label_format": "colours"}, "classes without colour: background, cat, dog"),
        ({"label_format": "binary"}, "label_format binary has two classes, black and white, not 3"),
        ({"label_format": "coco", "files": {"images": "i", "labels": "i.json"}}, "unannotated is missing"),
        ({"label_format": "labelme", "unannotated": "bg"}, "unannotated is bg"),
        ({"label_format": "labelme", "unannotated": "cat", "label_map": {1: 2}}, "label_map is set, but label_format"),
        ({"crowd": "draw"}, "crowd is set, but label_format is ids"),
        (
            {"files": None, "webdataset": {"shards": "*.tar"}, "label_format": "labelme", "unannotated": "cat"},
            "label_format labelme is for files",
        ),
    ],
)
def test_what_makes_no_sense_is_named_with_what_is_allowed(changes, words):
    assert words in refuse(make_text(**changes))


def test_all_wrong_fields_are_named_at_once():
    message = refuse(make_text(nam="x", dtype="int8", splits={"train": {"shar": 0.5}}))
    assert all(words in message for words in ("unknown field nam", "dtype", "splits.train.shar: did you mean share"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not YAML"),
        ("- a\n- b", "this is a list"),
        ("", "this is a NoneType"),
        ("name: a\nname: b", "keys given twice: name"),
        ("name: a\nlabel_map: {7: 1, 7: ignore}", "keys given twice: 7"),
        ("name: !!python/object/apply:os.system ['true']", "not YAML"),
        ("[" * 5000, "not YAML"),
    ],
)
def test_text_that_is_no_data_set_file_is_refused_and_nothing_in_it_runs(text, words):
    """T30."""
    assert words in refuse(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(SpecError, match="E-SPEC-004"):
            DatasetSpec.read(path)
    (tmp_path / "latin.yaml").write_bytes("name: Bäume".encode("latin-1"))
    with pytest.raises(SpecError, match="UTF-8"):
        DatasetSpec.read(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_text(PETS + "#" * (1 << 20))
    with pytest.raises(SpecError, match="give the data set file, not the data"):
        DatasetSpec.read(tmp_path / "large.yaml")
    (tmp_path / "dos.yaml").write_bytes(b"\xef\xbb\xbf" + PETS.replace("\n", "\r\n").encode())
    assert DatasetSpec.read(tmp_path / "dos.yaml") == DatasetSpec.parse(PETS)


def test_every_field_says_what_it_does():
    fields = describe_fields()
    assert {"classes[].ids", "splits[].share", "files.images", "parquet.image", "webdataset.shards"} <= set(fields)
    assert [name for name, words in fields.items() if len(words) < 10] == []
    assert set(get_args(LabelFormat)) == {"ids", "colours", "binary", "coco", "labelme"}


def test_generated_colours_are_those_of_voc():
    assert tuple(list_colour(index) for index in range(21)) == DATASETS["voc"].taxonomy.palette
    assert len({list_colour(index) for index in range(256)}) == 256


def test_specs_and_what_follows_from_them_live_without_torch():
    modules = "spec, derive, custom, coco, labelme, parquet, webdataset, init"
    code = (
        f"import sys; from nestseg.data import {modules}; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
