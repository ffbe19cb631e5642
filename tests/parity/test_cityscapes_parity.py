"""Cityscapes' scores against cityscapesScripts itself, on any maps: void predictions, absent classes, odd instances."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as official  # noqa: N813  # its name says nothing here
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from nestseg.core.errors import DataError
from nestseg.data.cityscapes import TRAIN_ID_TO_LABEL_ID
from nestseg.metrics.cityscapes import CityscapesCounts, CityscapesScores, compute_cityscapes_scores
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import compute_scores

REAL_DATA = Path(os.environ.get("NESTSEG_REAL_DATA", Path(__file__).parents[2] / "../shared/data"))

# Of all label ids, those whose instances the official code can weigh, or leaves out.
WITH_INSTANCES = (24, 25, 26, 27, 28, 31, 32, 33)
LEFT_OUT = (1, 6, 9, 29, 30)

Picture = tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]


@pytest.fixture(autouse=True, scope="module")
def in1d():
    """Give numpy the function back that the official code calls and numpy 2.4 dropped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "in1d", np.isin, raising=False)
        yield


def run_official(pictures: list[Picture]) -> dict[str, Any]:
    arguments = SimpleNamespace(**{**vars(official.args), "quiet": True, "JSONOutput": False, "evalLabels": []})
    with TemporaryDirectory() as folder:
        predictions, truths = [], []
        for number, maps in enumerate(pictures):
            stem = f"{folder}/city_{number:06d}_000019"
            paths = [f"{stem}_pred.png", f"{stem}_gtFine_labelIds.png", f"{stem}_gtFine_instanceIds.png"]
            for path, array in zip(paths, maps, strict=True):
                Image.fromarray(array).save(path)
            predictions.append(paths[0])
            truths.append(paths[1])
        return official.evaluateImgLists(predictions, truths, arguments)


def run_ours(pictures: list[Picture]) -> CityscapesScores:
    counts = CityscapesCounts()
    for prediction, truth, instances in pictures:
        counts.update(prediction, truth, instances)
    return compute_cityscapes_scores(counts)


def none_for_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else float(value) for name, value in values.items()}


def assert_equal(ours: Mapping[str, float | None], theirs: Mapping[str, float], *, exactly: bool) -> None:
    """Compare by name; what the official code lists and we do not has no score there."""
    expected = none_for_nan(theirs)
    assert {expected[name] for name in set(expected) - set(ours)} <= {None}
    for name, value in ours.items():
        if exactly or value is None or expected[name] is None:
            assert value == expected[name], name
        else:
            assert value == pytest.approx(expected[name], rel=1e-11, abs=1e-12), name
            assert print_score(value) == print_score(expected[name]) or is_between_two_prints(value), name


def print_score(value: float) -> str:
    return f"{value:>5.3f}"  # as the official code prints


def is_between_two_prints(value: float) -> bool:
    """Say whether a value lies where the last bit of a float decides which way it is rounded."""
    return abs(value * 1000 % 1 - 0.5) < 1e-8


def assert_same_scores(pictures: list[Picture]) -> None:
    ours, theirs = run_ours(pictures), run_official(pictures)
    assert_equal(ours.class_iou, theirs["classScores"], exactly=True)
    assert_equal(ours.category_iou, theirs["categoryScores"], exactly=True)
    assert_equal(ours.class_iiou, theirs["classInstScores"], exactly=False)
    assert_equal(ours.category_iiou, theirs["categoryInstScores"], exactly=False)
    means = {
        "averageScoreClasses": ours.mean_class_iou,
        "averageScoreCategories": ours.mean_category_iou,
        "averageScoreInstClasses": ours.mean_class_iiou,
        "averageScoreInstCategories": ours.mean_category_iiou,
    }
    assert_equal(means, {name: theirs[name] for name in means}, exactly=False)


@st.composite
def draw_picture(draw: st.DrawFn) -> Picture:
    """Maps of few or many ids that agree in part, with an instance map that may have nothing to do with the labels."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    size = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    some_ids = st.lists(st.integers(0, 33), min_size=1, max_size=6)
    truth = generator.choice(draw(some_ids | st.just(list(range(34)))), size).astype(np.uint8)
    guess = generator.choice(draw(some_ids | st.just(list(range(34)))), size).astype(np.uint8)
    prediction = np.where(generator.random(size) < draw(st.sampled_from([0, 0.5, 1])), truth, guess)
    owners = truth if draw(st.booleans()) else generator.choice((*WITH_INSTANCES, *LEFT_OUT), size)
    allowed = np.isin(owners, (*WITH_INSTANCES, *LEFT_OUT)) & (generator.random(size) < draw(st.sampled_from([0.5, 1])))
    numbers = generator.integers(0, draw(st.integers(1, 5)), size)
    instances = np.where(allowed, owners.astype(np.uint16) * 1000 + numbers, truth)
    return prediction.astype(np.uint8), truth, instances.astype(np.uint16)


@given(st.lists(draw_picture(), min_size=1, max_size=3))
@settings(deadline=None, max_examples=150)
def test_scores_equal_the_official_ones_on_any_maps(pictures):
    assert_same_scores(pictures)


@pytest.mark.parametrize(
    ("prediction", "truth"),
    [
        ([0] * 4, [7, 7, 24, 26]),  # nothing but void predicted
        ([9, 29, 30, 34 - 1], [26, 26, 26, 26]),  # ignored classes predicted on cars
        ([7, 8, 24, 26], [0, 3, 9, 29]),  # everything ignored
        ([24, 24, 24, 24], [7, 7, 7, 7]),  # a class that is only predicted
        ([7, 7, 7, 7], [7, 7, 7, 7]),  # one class and nothing else
    ],
)
def test_scores_equal_the_official_ones_at_the_edges(prediction, truth):
    truth_map = np.array([truth], np.uint8)
    instances = np.where(np.isin(truth_map, (*WITH_INSTANCES, 29)), truth_map.astype(np.uint16) * 1000 + 1, truth_map)
    assert_same_scores([(np.array([prediction], np.uint8), truth_map, instances.astype(np.uint16))])


def test_scores_of_a_real_picture_equal_the_official_ones():
    folder = REAL_DATA / "cityscapes_mini/gtFine/val/frankfurt"
    if not folder.is_dir():
        pytest.skip(f"no real samples at {folder}; set NESTSEG_REAL_DATA to their folder")
    stem = next(folder.glob("*_labelIds.png")).name.removesuffix("_labelIds.png")
    truth = np.array(Image.open(folder / f"{stem}_labelIds.png"))
    instances = np.array(Image.open(folder / f"{stem}_instanceIds.png")).astype(np.uint16)
    # shifted sideways, a prediction is right in the middle of things and wrong at their edges
    prediction = np.roll(truth, (3, 20), axis=(0, 1))
    prediction[:50] = 0
    assert_same_scores([(prediction, truth, instances)])
    assert run_ours([(prediction, truth, instances)]).mean_class_iiou > 0.3


@given(st.lists(draw_picture(), min_size=1, max_size=2))
@settings(deadline=None, max_examples=40)
def test_the_confusion_matrix_of_train_ids_has_the_official_class_scores_too(pictures):
    # the path of training and of every other data set: 19 classes, everything ignored as 255
    train_ids = np.full(256, 255, np.uint8)
    train_ids[TRAIN_ID_TO_LABEL_ID[:19]] = range(19)
    confusion = ConfusionMatrix(19)
    for prediction, truth, _ in pictures:
        confusion.update(train_ids[prediction], train_ids[truth])
    if confusion.counts.any():
        theirs = run_official(pictures)
        by_id = list(none_for_nan(theirs["classScores"]).values())
        scores = compute_scores(confusion, absent="skip")
        assert scores.iou_per_class == tuple(by_id[label] for label in TRAIN_ID_TO_LABEL_ID[:19])
        assert scores.mean_iou == pytest.approx(theirs["averageScoreClasses"], rel=1e-14)


@pytest.mark.parametrize(("prediction", "truth"), [(34, 7), (255, 7), (7, 34), (7, 255)])
def test_ids_outside_stop_the_official_code_and_ours_says_what_it_does_instead(prediction, truth):
    picture = (np.array([[prediction]], np.uint8), np.array([[truth]], np.uint8), np.array([[7]], np.uint16))
    with pytest.raises((SystemExit, IndexError)):
        run_official([picture])
    if truth == 34:
        with pytest.raises(DataError, match="E-DATA-014"):
            run_ours([picture])
        return
    # a prediction above 33 is void; 255 in the ground truth is id -1, which is ignored
    stand_in = [(np.where(picture[0] > 33, 0, picture[0]), np.where(picture[1] > 33, 0, picture[1]), picture[2])]
    assert run_ours([picture]) == run_ours(stand_in)
    assert_same_scores(stand_in)


@pytest.mark.parametrize("instance", [7001, 34001])
def test_instances_of_what_has_none_stop_the_official_code_and_are_an_error_here(instance):
    picture = (np.array([[7]], np.uint8), np.array([[7]], np.uint8), np.array([[instance]], np.uint16))
    with pytest.raises(KeyError):
        run_official([picture])
    with pytest.raises(DataError, match="E-DATA-114"):
        run_ours([picture])
