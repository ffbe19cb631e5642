"""One predictor, whatever computes the logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nestseg.core.errors import DataError
from nestseg.core.image_io import read_image, read_labels
from nestseg.core.taxonomy import Taxonomy
from nestseg.engine.predict import predict_files
from nestseg.inference.predictor import Prediction, Predictor, open_image

TAXONOMY = Taxonomy(name="toy", classes=("dark", "red", "green"), palette=((0, 0, 0), (255, 0, 0), (0, 200, 0)))


def brightest_channel(image: torch.Tensor) -> torch.Tensor:
    """Class 1 where red is brightest, 2 where green is, else 0."""
    image = image.float()
    return torch.stack([torch.full_like(image[:, 0], 50), image[:, 0], image[:, 1]], 1)


def half_picture() -> np.ndarray:
    image = np.zeros((6, 10, 3), np.uint8)
    image[:, :5, 0] = 255
    image[:, 5:, 1] = 255
    return image


def test_labels_have_the_size_of_the_image_and_the_right_ids():
    labels = Predictor(brightest_channel, TAXONOMY).predict(half_picture()).labels
    assert labels.dtype == np.uint8
    assert labels.tolist() == [[1] * 5 + [2] * 5] * 6


def test_resize_happens_before_the_network_and_labels_come_back_at_full_size():
    seen = []

    def logits_fn(image: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(image.shape))
        return brightest_channel(image)

    labels = Predictor(logits_fn, TAXONOMY, base_size=(12, 100)).predict(half_picture()).labels
    assert seen == [(1, 3, 12, 20)]
    assert labels.tolist() == [[1] * 5 + [2] * 5] * 6


def test_path_pil_and_array_give_the_same(tmp_path):
    image = half_picture()
    Image.fromarray(image).save(tmp_path / "a.png")
    predictor = Predictor(brightest_channel, TAXONOMY)
    expected = predictor.predict(image).labels
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(image)):
        assert np.array_equal(predictor.predict(source).labels, expected)


def test_pil_image_follows_the_rules_of_a_file(tmp_path):
    deep = np.array([[0, 255, 256, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = [[[level] * 3 for level in (0, 0, 1, 255)]]
    with Image.open(tmp_path / "deep.png") as opened:
        assert open_image(opened).tolist() == open_image(tmp_path / "deep.png").tolist() == expected
    Image.new("RGB", (40, 40)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    with Image.open(tmp_path / "cut.png") as opened, pytest.raises(DataError, match="E-DATA-012"):
        open_image(opened)


def test_logits_are_upsampled_by_the_rule_of_the_training():
    def logits_fn(image: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[[[0.0, 1.0]], [[0.3, 0.3]]]])

    image = np.zeros((1, 4, 3), np.uint8)
    labels = [Predictor(logits_fn, TAXONOMY, align_corners=align).predict(image).labels for align in (False, True)]
    assert labels[0].tolist() == [[1, 1, 0, 0]]  # class 0 has 0, 0.25, 0.75, 1
    assert labels[1].tolist() == [[1, 0, 0, 0]]  # and here 0, 1/3, 2/3, 1


@pytest.mark.parametrize("align_corners", [False, True])
def test_two_steps_go_through_the_size_that_the_network_saw(align_corners):
    logits = torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    image = np.zeros((53, 71, 3), np.uint8)

    def labels(logits_resizes: int) -> np.ndarray:
        predictor = Predictor(
            lambda image: logits,
            TAXONOMY,
            base_size=(15, 100),
            logits_resizes=logits_resizes,
            align_corners=align_corners,
        )
        return predictor.predict(image).labels

    how = {"mode": "bilinear", "align_corners": align_corners}
    seen = F.interpolate(logits, size=(15, 20), **how)
    once, twice = F.interpolate(logits, size=(53, 71), **how), F.interpolate(seen, size=(53, 71), **how)
    assert np.array_equal(labels(2), twice.argmax(1)[0])
    assert np.array_equal(labels(1), once.argmax(1)[0])
    assert (labels(1) != labels(2)).any()


def test_picture_that_cannot_be_resized_is_named_and_stops_no_other(tmp_path):
    Image.new("RGB", (1, 40000)).save(tmp_path / "line.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "square.png")
    predictor = Predictor(brightest_channel, TAXONOMY, base_size=(8, 16))
    result = predict_files(predictor, [tmp_path], out=tmp_path / "out")
    assert [file.name for file in result.written] == ["square.png"]
    assert [(error.code, error.path) for error in result.failed] == [("E-DATA-060", tmp_path / "line.png")]


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_array_that_is_no_image_is_refused(array):
    with pytest.raises(DataError, match=r"E-DATA-050 .* fix: "):
        Predictor(brightest_channel, TAXONOMY).predict(array)


def test_overlay_mixes_by_hand_computed_values():
    labels = np.array([[0, 1]], np.uint8)
    prediction = Prediction(labels=labels, taxonomy=TAXONOMY)
    image = np.array([[[100, 100, 100], [100, 100, 100]]], np.uint8)
    assert prediction.overlay(image, alpha=0.5).tolist() == [[[50, 50, 50], [178, 50, 50]]]
    assert np.array_equal(prediction.overlay(image, 0), image)
    assert prediction.overlay(image, alpha=1).tolist() == [[[0, 0, 0], [255, 0, 0]]]
    with pytest.raises(ValueError, match="alpha"):
        prediction.overlay(image, alpha=2)
    with pytest.raises(ValueError, match="pass the predicted image"):
        prediction.overlay(np.zeros((3, 3, 3), np.uint8))


def test_png_holds_train_ids_and_the_palette(tmp_path):
    labels = np.array([[0, 1], [2, 2]], np.uint8)
    prediction = Prediction(labels=labels, taxonomy=TAXONOMY)
    prediction.to_png(tmp_path / "labels.png")
    assert np.array_equal(read_labels(tmp_path / "labels.png"), labels)
    assert np.array_equal(read_image(tmp_path / "labels.png"), prediction.coloured())


def test_confidence_is_the_softmax_of_the_label():
    prediction = Predictor(brightest_channel, TAXONOMY).predict(half_picture() // 128, confidence=True)
    assert prediction.confidence is not None
    assert prediction.confidence.dtype == np.float32
    assert prediction.confidence.shape == prediction.labels.shape == (6, 10)
    image = np.full((1, 1, 3), 50, np.uint8)  # class 0 and 1 and 2 have the logit 50: one third each
    even = Predictor(brightest_channel, TAXONOMY).predict(image, confidence=True)
    assert even.confidence == pytest.approx(1 / 3, rel=1e-5)
    assert Predictor(brightest_channel, TAXONOMY).predict(image).confidence is None


def test_areas_add_up_to_one():
    areas = Prediction(labels=np.array([[0, 1, 1, 1]], np.uint8), taxonomy=TAXONOMY).class_areas()
    assert areas == {"dark": 0.25, "red": 0.75, "green": 0.0}
