"""What a benchmark's server is sent: names, ids, format (E9)."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from nestseg.core.errors import DataError
from nestseg.core.taxonomy import Taxonomy
from nestseg.data import ade20k, camvid, cityscapes, toystreets, voc
from nestseg.data.datasets import DATASETS
from nestseg.data.submission import SUBMISSIONS, submission_writer

ERROR_SHAPE = r"^E-DATA-\d{3} \| [^|]+ \| [^|]+ \| fix: [^|]+$"
NAMES = {"cityscapes": "berlin_000000_000019", "voc": "2008_000001", "ade20k": "ADE_test_00000001"}
TAXONOMIES = {"cityscapes": cityscapes.TAXONOMY, "voc": voc.TAXONOMY, "ade20k": ade20k.TAXONOMY}
EACH = pytest.mark.parametrize("name", list(NAMES))


def make_labels(taxonomy: Taxonomy) -> np.ndarray:
    """Make a map with every class, of the size that the benchmark has."""
    size = (1024, 2048) if taxonomy.name == "cityscapes" else (6, 50)
    return (np.arange(size[0] * size[1]) % taxonomy.num_classes).reshape(size).astype(np.uint8)


def refuse(code: str, match: str, call) -> DataError:
    with pytest.raises(DataError, match=match) as caught:
        call()
    assert caught.value.code == code
    assert re.search(ERROR_SHAPE, str(caught.value))
    return caught.value


def test_cityscapes_maps_hold_label_ids_as_grey_and_are_named_after_city_sequence_and_frame(tmp_path):
    labels = make_labels(cityscapes.TAXONOMY)
    path = submission_writer(cityscapes.TAXONOMY).write(tmp_path, "berlin_000000_000019", labels)
    assert path == tmp_path / "berlin_000000_000019_pred_labelIds.png"
    image = Image.open(path)
    assert (image.mode, image.size, image.format) == ("L", (2048, 1024), "PNG")
    np.testing.assert_array_equal(cityscapes.Cityscapes.label_map[np.array(image)], labels)
    assert set(np.unique(np.array(image))) == {7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33}


def test_voc_maps_hold_class_indices_with_the_devkit_palette_in_its_folders(tmp_path):
    labels = make_labels(voc.TAXONOMY)
    path = submission_writer(voc.TAXONOMY).write(tmp_path, "2008_000001", labels)
    assert path == tmp_path / "results/VOC2012/Segmentation/comp6_test_cls/2008_000001.png"
    image = Image.open(path)
    assert (image.mode, image.size) == ("P", (50, 6))
    np.testing.assert_array_equal(np.array(image), labels)
    assert tuple(image.getpalette()[3 * 15 : 3 * 16]) == (192, 128, 128)


def test_ade20k_maps_hold_1_to_150_as_grey(tmp_path):
    labels = make_labels(ade20k.TAXONOMY)
    path = submission_writer(ade20k.TAXONOMY).write(tmp_path, "ADE_test_00000001", labels)
    assert path == tmp_path / "ADE_test_00000001.png"
    image = Image.open(path)
    assert image.mode == "L"
    np.testing.assert_array_equal(np.array(image), labels + 1)
    assert (np.array(image).min(), np.array(image).max()) == (1, 150)


@EACH
def test_what_is_written_reads_back_as_the_same_train_ids_by_the_data_set_itself(name, tmp_path):
    dataset = {"cityscapes": cityscapes.Cityscapes, "voc": voc.VOC, "ade20k": ade20k.ADE20K}[name]
    labels = make_labels(TAXONOMIES[name])
    path = submission_writer(TAXONOMIES[name]).write(tmp_path, NAMES[name], labels)
    np.testing.assert_array_equal(dataset.label_map[np.array(Image.open(path))], labels)


@EACH
def test_a_result_is_replaced_whole_and_nothing_else_is_left(name, tmp_path):
    writer, labels = submission_writer(TAXONOMIES[name]), make_labels(TAXONOMIES[name])
    writer.write(tmp_path, NAMES[name], np.zeros_like(labels))
    path = writer.write(tmp_path, NAMES[name], labels)
    assert [found for found in tmp_path.rglob("*") if found.is_file()] == [path]
    assert np.array(Image.open(path)).max() > 0


@EACH
def test_a_map_that_holds_no_class_is_refused_and_not_written(name, tmp_path):
    taxonomy = TAXONOMIES[name]
    labels = make_labels(taxonomy)
    labels[0, :2] = taxonomy.num_classes, 255
    refuse(
        "E-DATA-113",
        rf"{taxonomy.num_classes}, 255; allowed: 0-{taxonomy.num_classes - 1}",
        lambda: submission_writer(taxonomy).write(tmp_path, NAMES[name], labels),
    )
    assert not list(tmp_path.rglob("*.png"))


def test_cityscapes_is_refused_at_any_other_size(tmp_path):
    error = refuse(
        "E-DATA-117",
        "512x1024; allowed in cityscapes: 1024x2048",
        lambda: submission_writer(cityscapes.TAXONOMY).write(
            tmp_path, "berlin_000000_000019", np.zeros((512, 1024), np.uint8)
        ),
    )
    assert error.path == "berlin_000000_000019"


@pytest.mark.parametrize(
    ("name", "sample"),
    [
        ("cityscapes", "berlin_0_19"),
        ("cityscapes", "berlin_000000_000019_leftImg8bit"),
        ("cityscapes", "../berlin_000000_000019"),
        ("voc", "a/2008_000001"),
        ("voc", ""),
        ("voc", "2008_000001\n"),
        ("ade20k", "ADE_val"),
    ],
)
def test_names_that_the_server_would_not_find_are_refused(name, sample, tmp_path):
    writer, labels = submission_writer(TAXONOMIES[name]), make_labels(TAXONOMIES[name])
    refuse("E-DATA-112", "sample name", lambda: writer.write(tmp_path / "out", sample, labels))
    assert not (tmp_path / "out").exists()


@EACH
def test_validation_pictures_can_be_written_too_to_try_the_official_scripts(name, tmp_path):
    sample = {"cityscapes": "frankfurt_000000_000294", "voc": "2007_000033", "ade20k": "ADE_val_00000001"}[name]
    assert submission_writer(TAXONOMIES[name]).write(tmp_path, sample, make_labels(TAXONOMIES[name])).exists()


@pytest.mark.parametrize("taxonomy", [camvid.TAXONOMY, toystreets.ToyStreets.taxonomy])
def test_a_data_set_without_a_server_is_refused_with_those_that_have_one(taxonomy):
    refuse("E-DATA-110", "allowed: cityscapes, voc, ade20k", lambda: submission_writer(taxonomy))


@EACH
def test_other_classes_under_the_name_of_a_benchmark_are_refused(name):
    classes = TAXONOMIES[name].classes
    swapped = replace(TAXONOMIES[name], classes=(classes[1], classes[0], *classes[2:]))
    error = refuse("E-DATA-111", f"{classes[1]}.*{classes[0]}", lambda: submission_writer(swapped))
    assert "0" in error.reason


def test_labels_of_another_type_are_refused(tmp_path):
    with pytest.raises(ValueError, match="uint8"):
        submission_writer(voc.TAXONOMY).write(tmp_path, "2008_000001", np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="two-dimensional"):
        submission_writer(voc.TAXONOMY).write(tmp_path, "2008_000001", np.zeros((2, 2, 1), np.uint8))


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "taken").write_text("a file")
    error = refuse(
        "E-DATA-116",
        "taken",
        lambda: submission_writer(voc.TAXONOMY).write(tmp_path / "taken", "2008_000001", np.zeros((2, 2), np.uint8)),
    )
    assert str(tmp_path / "taken") in str(error.path)


def test_every_split_without_labels_has_a_server_to_send_it_to():
    assert set(SUBMISSIONS) == {name for name, dataset in DATASETS.items() if dataset.unlabelled_splits}


def test_the_instructions_say_what_to_upload():
    for name, taxonomy in TAXONOMIES.items():
        assert "http" in submission_writer(taxonomy).upload, name
