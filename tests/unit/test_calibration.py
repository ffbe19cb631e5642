from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray

from nestseg.metrics.calibration import ONE, CalibrationCounts, compute_calibration

Pixels = NDArray[np.uint8]


def _count(
    confidence: list[float] | NDArray[np.float32], labels: list[int], target: list[int], *, num_bins: int = 15
) -> CalibrationCounts:
    counts = CalibrationCounts(num_bins)
    counts.update(
        np.array(confidence, np.float32)[None], np.array(labels, np.uint8)[None], np.array(target, np.uint8)[None]
    )
    return counts


def test_bins_hold_their_upper_end_and_zero_belongs_to_the_first() -> None:
    counts = _count([0, 0.25, 0.2500001, 0.5, 0.75, 0.7500001, 1], [0] * 7, [0] * 7, num_bins=4).counts
    assert counts[:, 0].tolist() == [2, 2, 1, 2]


@pytest.mark.parametrize("num_bins", [1, 2, 3, 10, 15, 127])
def test_counts_are_those_of_a_loop_over_pixels(num_bins: int) -> None:
    generator = np.random.default_rng(num_bins)
    confidence = generator.random(500).astype(np.float32)
    confidence[:40] = np.linspace(0, 1, 40)
    labels, target = generator.integers(0, 3, (2, 500), np.uint8)
    target[generator.random(500) < 0.2] = 255
    labels[generator.random(500) < 0.1] = 255
    expected = np.zeros((num_bins, 3), np.int64)
    for value, label, true in zip(confidence, labels.tolist(), target.tolist(), strict=True):
        if true == 255:
            continue
        whole = round(float(value) * ONE)
        place = next(b for b in range(num_bins) if whole * num_bins <= (b + 1) * ONE)
        expected[place] += (1, label == true, whole)
    assert np.array_equal(_count(confidence, labels.tolist(), target.tolist(), num_bins=num_bins).counts, expected)


def test_a_picture_of_many_blocks_counts_like_its_rows() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.random((3, 40_000)).astype(np.float32)
    labels, target = generator.integers(0, 2, (2, 3, 40_000), np.uint8)
    whole, rows = CalibrationCounts(), CalibrationCounts()
    whole.update(confidence, labels, target)
    for begin in range(0, 40_000, 1000):
        part = np.s_[:, begin : begin + 1000]
        rows.update(confidence[part], labels[part], target[part])
    assert np.array_equal(whole.counts, rows.counts)
    assert whole.counts[:, 0].sum() == 120_000


def test_errors_are_those_of_the_paper_computed_in_floats() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.random(2000).astype(np.float32)
    right = generator.random(2000) < confidence**2
    found = compute_calibration(_count(confidence, [0] * 2000, np.where(right, 0, 1).tolist()).counts)
    gaps, weights = [], []
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        gaps.append(abs(right[inside].mean() - confidence[inside].mean(dtype=np.float64)))
        weights.append(inside.mean())
    assert found.expected_calibration_error == pytest.approx(np.dot(gaps, weights), abs=1e-7)
    assert found.maximum_calibration_error == pytest.approx(max(gaps), abs=1e-7)
    assert found.accuracy == right.mean()
    assert found.confidence == pytest.approx(confidence.mean(dtype=np.float64), abs=1e-7)
    assert found.num_pixels == 2000 == sum(bar.num_pixels for bar in found.bins)


def test_a_small_diagram_is_the_one_computed_by_hand() -> None:
    found = compute_calibration(_count([1, 1, 1, 1, 0.5], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1], num_bins=2).counts)
    first, second = found.bins
    assert (first.low, first.high, first.num_pixels, first.accuracy, first.confidence) == (0, 0.5, 1, 0, 0.5)
    assert (second.low, second.high, second.num_pixels, second.accuracy, second.confidence) == (0.5, 1, 4, 0.75, 1)
    assert found.expected_calibration_error == (4 * 0.25 + 0.5) / 5
    assert found.maximum_calibration_error == 0.5


def test_a_model_that_is_right_as_often_as_it_is_sure_has_no_error() -> None:
    found = compute_calibration(_count([0.75] * 4, [0] * 4, [0, 0, 0, 1]).counts)
    assert found.expected_calibration_error == found.maximum_calibration_error == 0


def test_e10_nothing_counted_has_no_value_and_is_strict_json() -> None:
    found = compute_calibration(_count([0.5], [0], [255]).counts)
    assert (found.expected_calibration_error, found.maximum_calibration_error) == (None, None)
    assert (found.accuracy, found.confidence, found.num_pixels) == (None, None, 0)
    assert found.bins[7].accuracy is None
    json.dumps(asdict(found), allow_nan=False)


def test_a_label_of_no_class_is_wrong_and_a_float_just_above_one_counts_as_one() -> None:
    counts = _count([1 + 2**-23, 1], [255, 0], [0, 0]).counts
    assert counts[-1].tolist() == [2, 1, 2 * ONE]


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_confidence_that_is_no_probability_is_refused_and_nothing_is_counted(value: float) -> None:
    counts = CalibrationCounts()
    with pytest.raises(ValueError, match="allowed 0 to 1"):
        counts.update(np.array([[0.5, value]], np.float32), np.zeros((1, 2), np.uint8), np.zeros((1, 2), np.uint8))
    assert not counts.counts.any()


def test_other_types_shapes_and_bins_are_refused_and_no_pixel_is_no_error() -> None:
    one = np.zeros((1, 1), np.uint8)
    with pytest.raises(TypeError, match="float64, uint8 and uint8"):
        CalibrationCounts().update(np.zeros((1, 1)), one, one)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected the same shape"):
        CalibrationCounts().update(np.zeros((1, 2), np.float32), one, one)
    for num_bins in (0, 128):
        with pytest.raises(ValueError, match="allowed 1 to 127"):
            CalibrationCounts(num_bins)
    CalibrationCounts().update(np.zeros((0, 2), np.float32), np.zeros((0, 2), np.uint8), np.zeros((0, 2), np.uint8))


def test_counts_survive_a_round_trip_and_other_meanings_do_not_add_up() -> None:
    first = _count([0.3, 0.9], [0, 1], [0, 0])
    copy = CalibrationCounts.from_counts(first.counts)
    assert np.array_equal((copy + first).counts, 2 * first.counts)
    for other in (CalibrationCounts(10), CalibrationCounts(ignore_index=254)):
        with pytest.raises(ValueError, match="do not add up"):
            first + other
    with pytest.raises(ValueError, match="expected"):
        CalibrationCounts.from_counts(np.zeros((3, 2), np.int64))
