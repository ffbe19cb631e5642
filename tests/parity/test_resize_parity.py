"""Resizing against its float64 definition, torch, and itself cut in windows."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestseg.core.errors import DataError
from nestseg.core.resize import Window, resize_image, resize_labels, scaled_size

PAIRS = [
    ((375, 500), (256, 341)),
    ((375, 500), (701, 935)),
    ((375, 500), (1024, 1365)),
    ((33, 65), (97, 31)),
    ((1, 40), (5, 3)),
    ((40, 1), (1, 77)),
    ((64, 64), (128, 128)),
    ((64, 64), (32, 32)),
]


def bilinear_float64(image, size):
    """The definition, spelled out pixel by axis in float64 and not rounded."""

    def along(array, count):
        out = np.empty((count, *array.shape[1:]))
        for i in range(count):
            position = min(max((i + 0.5) * array.shape[0] / count - 0.5, 0.0), array.shape[0] - 1.0)
            low = int(position)
            high = min(low + 1, array.shape[0] - 1)
            out[i] = array[low] + (position - low) * (array[high] - array[low])
        return out

    tall = along(image.astype(np.float64), size[0])
    return along(tall.swapaxes(0, 1), size[1]).swapaxes(0, 1)


@pytest.mark.parametrize(("source", "size"), PAIRS)
def test_bilinear_is_the_float64_definition_rounded_to_the_nearest_grey_level(source, size):
    image = np.random.default_rng(0).integers(0, 256, (*source, 3), np.uint8)
    exact = bilinear_float64(image, size)
    resized = resize_image(image, size)
    assert resized.dtype == np.uint8
    assert resized.shape == (*size, 3)
    # 0.5 is rounding; the rest is float32 positions (below 2048: 6e-5 pixels) times at most 255 grey levels an axis.
    assert np.abs(resized - exact).max() <= 0.52
    off_tie = np.abs(exact - np.floor(exact) - 0.5) > 1e-9
    assert (resized != np.rint(exact))[off_tie].mean() < 2e-3


def test_bilinear_agrees_with_torch_in_float64():
    image = np.random.default_rng(1).integers(0, 256, (37, 53, 3), np.uint8)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    theirs = torch.nn.functional.interpolate(planes, size=(50, 29), mode="bilinear", align_corners=False)
    assert np.abs(resize_image(image, (50, 29)) - theirs[0].permute(1, 2, 0).numpy()).max() <= 0.52


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 9])
def test_every_number_of_channels_takes_the_exact_kernel(channels):
    image = np.random.default_rng(2).integers(0, 256, (21, 34, channels), np.uint8)
    resized = resize_image(image, (40, 30))
    assert resized.shape == (40, 30, channels)
    assert np.abs(resized - bilinear_float64(image, (40, 30))).max() <= 0.52


@pytest.mark.parametrize(("source", "size"), PAIRS)
def test_labels_follow_the_floor_rule_in_integers(source, size):
    labels = np.random.default_rng(3).integers(0, 256, source, np.uint8)
    expected = np.array(
        [[labels[i * source[0] // size[0], j * source[1] // size[1]] for j in range(size[1])] for i in range(size[0])]
    )
    np.testing.assert_array_equal(resize_labels(labels, size), expected)


def test_labels_agree_with_torch_nearest_but_for_float32_at_whole_positions():
    differing = total = 0
    for source in range(1, 60):
        for size in range(1, 90):
            line = np.arange(source, dtype=np.uint8)[None]
            ours = resize_labels(line, (1, size))[0]
            theirs = torch.nn.functional.interpolate(
                torch.from_numpy(line)[None, None], size=(1, size), mode="nearest"
            )[0, 0, 0].numpy()
            elsewhere = np.arange(size) * source % size != 0
            np.testing.assert_array_equal(ours[elsewhere], theirs[elsewhere])
            differing += int((ours != theirs).sum())
            total += size
    assert differing / total < 5e-3


def test_labels_do_not_follow_the_half_pixel_rule():
    assert resize_labels(np.array([[0, 1]], np.uint8), (1, 1))[0, 0] == 0
    assert resize_labels(np.array([[0, 1, 2, 3]], np.uint8), (1, 2)).tolist() == [[0, 2]]


@st.composite
def windows(draw):
    sides = [draw(st.integers(1, 80)), draw(st.integers(1, 80))]
    size = (draw(st.integers(1, 160)), draw(st.integers(1, 160)))
    top, left = draw(st.integers(0, size[0] - 1)), draw(st.integers(0, size[1] - 1))
    height, width = draw(st.integers(1, size[0] - top)), draw(st.integers(1, size[1] - left))
    return sides, size, Window(top, left, height, width)


@settings(max_examples=150, deadline=None)
@given(case=windows(), channels=st.sampled_from([1, 3, 4, 6]), seed=st.integers(0, 2**32 - 1))
def test_a_window_equals_the_crop_of_the_whole_resize_bit_for_bit(case, channels, seed):
    source, size, window = case
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*source, channels), np.uint8)
    labels = rng.integers(0, 256, source, np.uint8)
    rows = slice(window.top, window.top + window.height)
    columns = slice(window.left, window.left + window.width)
    np.testing.assert_array_equal(resize_image(image, size, window=window), resize_image(image, size)[rows, columns])
    np.testing.assert_array_equal(
        resize_labels(labels, size, window=window), resize_labels(labels, size)[rows, columns]
    )


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.0, 1.337, 2.0])
def test_cityscapes_windows_equal_the_crop_of_the_whole_resize(factor):
    image = np.random.default_rng(4).integers(0, 256, (1024, 2048, 3), np.uint8)
    size = scaled_size((1024, 2048), base=(1024, 2048), factor=factor)
    whole = resize_image(image, size)
    for top, left in [(0, 0), (size[0] - 512, size[1] - 1024), ((size[0] - 512) // 3, (size[1] - 1024) // 2)]:
        window = resize_image(image, size, window=(top, left, 512, 1024))
        np.testing.assert_array_equal(window, whole[top : top + 512, left : left + 1024])


def test_the_number_of_opencv_threads_does_not_change_a_bit():
    image = np.random.default_rng(5).integers(0, 256, (300, 400, 3), np.uint8)
    before = cv2.getNumThreads()
    try:
        results = []
        for threads in (1, 2, 4):
            cv2.setNumThreads(threads)
            results.append(resize_image(image, (777, 911)))
    finally:
        cv2.setNumThreads(before)
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_same_size_is_the_identity_and_a_new_array():
    image = np.random.default_rng(6).integers(0, 256, (20, 30, 3), np.uint8)
    for resized in (resize_image(image, (20, 30)), resize_labels(image[..., 0], (20, 30))):
        assert not np.shares_memory(resized, image)
    np.testing.assert_array_equal(resize_image(image, (20, 30)), image)
    np.testing.assert_array_equal(resize_image(image, (20, 30), window=(3, 4, 5, 6)), image[3:8, 4:10])


def test_views_that_are_not_contiguous_are_read_right():
    image = np.random.default_rng(7).integers(0, 256, (20, 30, 3), np.uint8)
    for view in (image[:, ::-1], image[::2, 1::3], image.transpose(1, 0, 2)):
        copy = np.ascontiguousarray(view)
        np.testing.assert_array_equal(resize_image(view, (17, 19)), resize_image(copy, (17, 19)))
        np.testing.assert_array_equal(resize_labels(view[..., 0], (17, 19)), resize_labels(copy[..., 0], (17, 19)))


@pytest.mark.parametrize(
    ("size", "base", "factor", "expected"),
    [
        ((375, 500), (512, 2048), 1.0, (512, 683)),
        ((500, 375), (512, 2048), 1.0, (683, 512)),
        ((375, 500), (512, 2048), 0.5, (256, 341)),
        ((100, 1000), (512, 2048), 1.0, (205, 2048)),
        ((1024, 2048), (1024, 2048), 2.0, (2048, 4096)),
        ((1, 5000), (512, 2048), 0.5, (1, 1024)),
    ],
)
def test_scaled_size_by_hand(size, base, factor, expected):
    assert scaled_size(size, base=base, factor=factor) == expected


@pytest.mark.parametrize("window", [(-1, 0, 2, 2), (0, 0, 5, 2), (0, 3, 2, 2), (0, 0, 0, 2)])
def test_a_window_outside_the_resized_picture_is_refused(window):
    with pytest.raises(ValueError, match="not inside the resized picture"):
        resize_image(np.zeros((8, 8, 3), np.uint8), (4, 4), window=window)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        resize_labels(np.zeros((8, 8), np.uint8), (0, 4))
    with pytest.raises(DataError, match=r"E-DATA-060 .* 32766 pixels a side"):
        resize_image(np.zeros((2, 8, 3), np.uint8), (1, 40000))
    with pytest.raises(ValueError, match="must be positive"):
        scaled_size((3, 4), base=(512, 2048), factor=0.0)
