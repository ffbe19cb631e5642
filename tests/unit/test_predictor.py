"""One predictor, whatever computes the logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nestseg.core.errors import DataError
from nestseg.core.image_io import read_image, read_labels
from nestseg.core.taxonomy import Taxonomy
from nestseg.inference.predictor import Prediction, Predictor

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


def test_areas_add_up_to_one():
    areas = Prediction(labels=np.array([[0, 1, 1, 1]], np.uint8), taxonomy=TAXONOMY).class_areas()
    assert areas == {"dark": 0.25, "red": 0.75, "green": 0.0}
