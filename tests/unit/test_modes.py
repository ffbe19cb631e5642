"""Words, records and windows of the inference modes; no network."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from nestseg.inference.modes import (
    MultiScale,
    Slide,
    Whole,
    axis_weights,
    describe_mode,
    mode_record,
    window_starts,
)

BLENDS = ("flat", "linear", "hann")


@pytest.mark.parametrize(
    ("size", "window", "stride", "starts"),
    [
        (10, 10, 7, [0]),
        (11, 10, 7, [0, 1]),
        (17, 10, 7, [0, 7]),
        (18, 10, 7, [0, 7, 8]),
        (24, 10, 7, [0, 7, 14]),
        (5, 1, 1, [0, 1, 2, 3, 4]),
    ],
)
def test_the_last_window_is_shifted_inside(size, window, stride, starts):
    assert window_starts(size, window, stride) == starts


@pytest.mark.parametrize("blend", BLENDS)
def test_every_pixel_of_every_size_is_covered_with_weights_that_add_up_to_one(blend):
    for size in range(33, 258):
        for limit, stride in ((32, 22), (33, 33), (64, 1), (101, 50), (256, 171), (400, 300)):
            window = min(size, limit)
            starts = window_starts(size, window, stride)
            assert starts[0] == 0
            assert starts[-1] + window == size
            assert all(0 < after - before <= stride for before, after in pairwise(starts))
            weights = axis_weights(starts, window, blend)
            assert weights.min() > 0
            sums, counts = np.zeros(size), np.zeros(size, int)
            for start, row in zip(starts, weights, strict=True):
                sums[start : start + window] += row
                counts[start : start + window] += 1
            assert counts.min() >= 1
            assert np.abs(sums - 1).max() < 1e-12
            for start, row in zip(starts, weights, strict=True):
                assert (row[counts[start : start + window] == 1] == 1).all()


def test_raw_weights_are_the_formulas():
    # two windows of 4 that overlap in 3 pixels, by hand: raw / (raw + raw of the other)
    linear, hann = np.array([1, 3, 3, 1]) / 4, np.array([0.14644661, 0.85355339, 0.85355339, 0.14644661])
    for blend, raw in (("flat", np.ones(4)), ("linear", linear), ("hann", hann)):
        expected = [1, *(raw[1:] / (raw[1:] + raw[:3]))]
        weights = axis_weights([0, 1], 4, blend)
        assert weights[0] == pytest.approx(expected)
        assert weights[1] == pytest.approx(expected[::-1])


def test_the_stride_is_two_thirds_of_the_window_unless_it_is_given():
    assert Slide(window=(512, 769)).step == (342, 513)
    assert Slide(window=(1, 2)).step == (1, 2)
    assert Slide(window=(512, 769), stride=(100, 769)).step == (100, 769)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Slide(window=(0, 5)), "window"),
        (lambda: Slide(window=(4, 5), stride=(4, 6)), "stride .* pixels are left out"),
        (lambda: Slide(window=(4, 5), stride=(0, 5)), "stride"),
        (lambda: Slide(window=(4, 5), blend="cosine"), "allowed: flat, linear, hann"),
        (lambda: MultiScale(scales=()), "at least one"),
        (lambda: MultiScale(scales=(1.0, 0.0)), "positive"),
        (lambda: MultiScale(scales=(float("nan"),)), "positive"),
        (lambda: MultiScale(scales=(float("inf"),)), "positive"),
        (lambda: MultiScale(average="vote"), "allowed: probability, logit"),
    ],
)
def test_a_mode_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        (Whole(), "single scale, whole image"),
        (Slide(window=(9, 6)), "single scale, windows 9x6 every 6x4 with flat blending"),
        (MultiScale(flip=True, average="logit"), "mean logit of scale 1 with flip, whole image"),
        (
            MultiScale(scales=(0.75, 1.25), inner=Slide(window=(9, 9), blend="hann")),
            "mean probability of scales 0.75, 1.25, windows 9x9 every 6x6 with hann blending",
        ),
        (
            Slide(window=(9, 9), stride=(9, 9), inner=MultiScale(scales=(0.5, 1.0), flip=True)),
            "windows 9x9 every 9x9 with flat blending, in each mean probability of scales 0.5, 1 with flip, "
            "whole window",
        ),
        (
            Slide(window=(9, 9), inner=Slide(window=(3, 3), blend="linear")),
            "single scale, windows 9x9 every 6x6 with flat blending, in each windows 3x3 every 2x2 with linear "
            "blending",
        ),
    ],
)
def test_a_mode_is_said_in_words(mode, words):
    assert describe_mode(mode) == words


def test_a_record_is_strict_json_with_every_number_of_the_nesting():
    mode = MultiScale(scales=(0.5, 2), flip=True, average="logit", inner=Slide(window=(9, 6), blend="linear"))
    record = mode_record(mode)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record == {
        "mode": "multi_scale",
        "scales": [0.5, 2],
        "flip": True,
        "average": "logit",
        "inner": {
            "mode": "slide",
            "window": [9, 6],
            "stride": [6, 4],
            "blend": "linear",
            "inner": {"mode": "whole"},
        },
    }


def test_modes_need_no_torch():
    code = "import sys, nestseg.inference.modes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
