"""Cityscapes' scores on maps small enough to count by hand, and what the counts refuse; tests/parity has the rest."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.data.cityscapes import TAXONOMY, TRAIN_ID_TO_LABEL_ID
from nestseg.metrics.cityscapes import (
    CATEGORIES,
    CLASSES,
    INSTANCE_CLASSES,
    CityscapesCounts,
    compute_cityscapes_scores,
)

ROAD, SIDEWALK, PARKING, PERSON, RIDER, CAR, CARAVAN = 7, 8, 9, 24, 25, 26, 29
PERSON_SIZE, CAR_SIZE = 3462.4756337644, 12794.0202738185


def ids(*values: int) -> NDArray[np.uint8]:
    return np.array([values], np.uint8)


def instances(*values: int) -> NDArray[np.uint16]:
    return np.array([values], np.uint16)


def count(
    prediction: NDArray[np.uint8], truth: NDArray[np.uint8], instance_ids: NDArray[np.uint16] | None = None
) -> CityscapesCounts:
    counts = CityscapesCounts()
    counts.update(prediction, truth, instance_ids)
    return counts


def test_classes_are_those_of_the_data_set_in_its_order():
    assert TAXONOMY.classes == CLASSES
    assert CATEGORIES == ("flat", "construction", "object", "nature", "sky", "human", "vehicle")
    assert INSTANCE_CLASSES == ("person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle")


def test_a_class_mistaken_for_another_of_its_category_is_right_for_the_category():
    scores = compute_cityscapes_scores(count(ids(ROAD, ROAD, CAR), ids(ROAD, SIDEWALK, SIDEWALK)))
    assert scores.class_iou["road"] == 1 / 2
    assert scores.class_iou["sidewalk"] == 0
    assert scores.class_iou["car"] == 0
    assert scores.category_iou["flat"] == 2 / 3
    assert scores.category_iou["vehicle"] == 0
    assert scores.mean_class_iou == pytest.approx((1 / 2 + 0 + 0) / 3, rel=1e-15)
    assert scores.mean_category_iou == pytest.approx((2 / 3 + 0) / 2, rel=1e-15)


def test_what_occurs_nowhere_has_no_score_and_is_left_out_of_the_mean():
    scores = compute_cityscapes_scores(count(ids(ROAD, ROAD), ids(ROAD, ROAD)))
    assert {name for name, value in scores.class_iou.items() if value is not None} == {"road"}
    assert {name for name, value in scores.category_iou.items() if value is not None} == {"flat"}
    assert scores.mean_class_iou == scores.mean_category_iou == 1


def test_nothing_labelled_gives_no_score_at_all():
    for counts in (CityscapesCounts(), count(ids(ROAD, CAR), ids(0, PARKING), instances(0, 0))):
        scores = compute_cityscapes_scores(counts)
        for values in (scores.class_iou, scores.category_iou, scores.class_iiou, scores.category_iiou):
            assert set(values.values()) == {None}
        assert scores.mean_class_iou is scores.mean_category_iou is None
        assert scores.mean_class_iiou is scores.mean_category_iiou is None


@pytest.mark.parametrize("ignored", [0, 3, PARKING, CARAVAN, 255])
def test_pixels_whose_truth_is_ignored_never_count(ignored):
    alone = compute_cityscapes_scores(count(ids(ROAD), ids(ROAD)))
    beside = compute_cityscapes_scores(count(ids(ROAD, CAR, ROAD), ids(ROAD, ignored, ignored)))
    assert alone.class_iou == beside.class_iou
    assert alone.category_iou == beside.category_iou


@pytest.mark.parametrize("void", [0, PARKING, CARAVAN, 34, 255])
def test_a_void_prediction_on_a_class_is_a_miss_of_class_and_category(void):
    scores = compute_cityscapes_scores(count(ids(ROAD, void), ids(ROAD, ROAD)))
    assert (scores.class_iou["road"], scores.category_iou["flat"]) == (1 / 2, 1 / 2)
    assert scores.class_iou["sidewalk"] is None


def test_instances_weigh_alike_whatever_their_size():
    # a person of one pixel found, one of three pixels missed: a quarter of the pixels, half of the instances
    prediction, truth = ids(PERSON, ROAD, ROAD, ROAD), ids(PERSON, PERSON, PERSON, PERSON)
    scores = compute_cityscapes_scores(count(prediction, truth, instances(24001, 24002, 24002, 24002)))
    assert scores.class_iou["person"] == 1 / 4
    assert scores.class_iiou["person"] == pytest.approx(1 / 2, rel=1e-12)
    assert scores.category_iiou["human"] == pytest.approx(1 / 2, rel=1e-12)
    assert scores.class_iiou["rider"] is scores.category_iiou["vehicle"] is None
    assert scores.mean_class_iiou == pytest.approx(1 / 2, rel=1e-12)


def test_false_positives_of_an_instance_class_are_plain_pixels():
    scores = compute_cityscapes_scores(count(ids(CAR, CAR, CAR), ids(CAR, ROAD, ROAD), instances(26001, 7, 7)))
    assert scores.class_iiou["car"] == pytest.approx(CAR_SIZE / (CAR_SIZE + 2), rel=1e-12)
    assert scores.category_iiou["vehicle"] == pytest.approx(CAR_SIZE / (CAR_SIZE + 2), rel=1e-12)


def test_for_a_category_its_ignored_classes_are_right_predictions_too():
    # as in the official code: a car called a caravan is a vehicle, though caravans are not evaluated
    scores = compute_cityscapes_scores(count(ids(CARAVAN, PERSON), ids(CAR, PERSON), instances(26000 + 1, 24001)))
    assert scores.category_iiou["vehicle"] == pytest.approx(1, rel=1e-12)
    assert scores.class_iiou["car"] == 0
    assert scores.category_iou["vehicle"] == 0


def test_groups_have_no_instance_and_weigh_nothing():
    # 26 in the instance map is a car group: its pixels count in the IoU only
    scores = compute_cityscapes_scores(count(ids(ROAD, CAR), ids(CAR, CAR), instances(26, 26001)))
    assert scores.class_iou["car"] == 1 / 2
    assert scores.class_iiou["car"] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("instance", [1000, 1001, 9003, 29001, 30001])
def test_instances_of_ignored_classes_are_left_out(instance):
    scores = compute_cityscapes_scores(count(ids(ROAD), ids(ROAD), instances(instance)))
    assert set(scores.class_iiou.values()) == {None}


def test_instance_scores_need_the_instances_of_every_picture():
    with_map, without = count(ids(CAR), ids(CAR), instances(26001)), count(ids(CAR), ids(CAR))
    assert compute_cityscapes_scores(with_map).class_iiou["car"] == pytest.approx(1, rel=1e-12)
    both = compute_cityscapes_scores(with_map + without)
    assert set(both.class_iiou.values()) == set(both.category_iiou.values()) == {None}
    assert both.mean_class_iiou is both.mean_category_iiou is None
    assert (both.num_images, both.num_images_with_instances) == (2, 1)
    assert both.class_iou["car"] == 1


def test_train_ids_mapped_back_give_the_same_scores_as_the_stored_ids():
    # what the engine has is train ids: everything ignored has become id 0 by then
    generator = np.random.default_rng(3)
    stored = generator.integers(0, 34, (40, 30), np.uint8)
    train_ids = np.full(256, 255, np.uint8)
    train_ids[TRAIN_ID_TO_LABEL_ID[:19]] = range(19)
    labels = np.where(generator.random(stored.shape) < 0.5, train_ids[stored], generator.integers(0, 19, stored.shape))
    prediction = TRAIN_ID_TO_LABEL_ID[labels.astype(np.uint8)]
    instance_ids = np.where(stored >= 24, stored.astype(np.uint16) * 1000 + generator.integers(1, 4), 0)
    instance_ids = instance_ids.astype(np.uint16)
    from_stored = compute_cityscapes_scores(count(prediction, stored, instance_ids))
    from_train_ids = compute_cityscapes_scores(count(prediction, TRAIN_ID_TO_LABEL_ID[train_ids[stored]], instance_ids))
    assert from_stored == from_train_ids
    assert from_stored.mean_class_iiou is not None


def test_counts_are_whole_numbers_that_survive_a_round_trip_and_are_copied():
    first = count(ids(CAR, ROAD), ids(CAR, ROAD), instances(26001, 7))
    assert first.counts.dtype == np.int64
    second = CityscapesCounts.from_counts(first.counts)
    second.update(ids(ROAD), ids(ROAD), instances(7))
    assert compute_cityscapes_scores(first) == compute_cityscapes_scores(CityscapesCounts.from_counts(first.counts))
    assert second.counts.sum() > first.counts.sum()


def test_counts_beyond_the_last_exact_float32_are_exact():
    total = count(ids(ROAD), ids(ROAD))
    for _ in range(24):
        total = total + total
    total = total + count(ids(ROAD), ids(ROAD))
    total.update(ids(SIDEWALK), ids(ROAD))
    assert total.confusion.counts[ROAD, ROAD] == 2**24 + 1
    assert compute_cityscapes_scores(total).class_iou["road"] == (2**24 + 1) / (2**24 + 2)


@pytest.mark.parametrize(
    "counts", [np.zeros(5, np.int64), np.zeros((34, 35), np.int64), CityscapesCounts().counts * 0.5, None]
)
def test_counts_that_are_none_are_refused(counts):
    if counts is None:
        counts = CityscapesCounts().counts - 1
    with pytest.raises(ValueError, match="expected"):
        CityscapesCounts.from_counts(counts)


def test_a_truth_that_is_no_label_id_is_refused_and_nothing_is_counted():
    counts = CityscapesCounts()
    with pytest.raises(DataError, match=r"E-DATA-014 .* 34 .* allowed 0-33 or 255"):
        counts.update(ids(ROAD, ROAD), ids(ROAD, 34), instances(7, 26001))
    assert not counts.counts.any()


@pytest.mark.parametrize("instance", [7001, 23000, 23999, 34001, 65535])
def test_an_instance_of_what_has_none_is_refused_and_nothing_is_counted(instance):
    counts = CityscapesCounts()
    with pytest.raises(DataError, match=rf"E-DATA-114 .*{instance}.*fix: ") as caught:
        counts.update(ids(CAR, ROAD), ids(CAR, ROAD), instances(26001, instance))
    assert str(caught.value.at("a_gtFine_instanceIds.png")).startswith("E-DATA-114 | a_gtFine_instanceIds.png | ")
    assert not counts.counts.any()


def test_an_instance_map_of_another_size_or_type_is_refused():
    with pytest.raises(DataError, match=r"E-DATA-114 .*instance map of 1x1.*label map of 1x2"):
        count(ids(CAR, ROAD), ids(CAR, ROAD), instances(26001))
    with pytest.raises(TypeError, match="int32"):
        count(ids(CAR), ids(CAR), np.array([[26001]], np.int32))  # type: ignore[arg-type]


def test_maps_of_another_size_or_type_are_refused():
    with pytest.raises(ValueError, match="expected the same shape"):
        count(ids(CAR, CAR), ids(CAR))
    with pytest.raises(TypeError, match="expected uint8"):
        count(ids(CAR).astype(np.int64), ids(CAR))  # type: ignore[arg-type]


def test_the_scores_can_be_imported_without_torch():
    code = "import sys, nestseg.metrics.cityscapes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
