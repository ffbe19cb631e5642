"""COCO's run lengths and outlines: for any mask, and against what COCO's own toolbox gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestseg.data.coco import decode_counts, fill_runs
from nestseg.data.polygons import fill_polygon, fill_union

# encoded by pycocotools 2.0.11: masks by numpy.random.default_rng(seed).random(size) < density
TOOLBOX = [
    (0, (4, 5), 0.5, "321O0020N12O"),
    (1, (7, 3), 0.2, "3180I05"),
    (2, (1, 40), 0.9, "0`01H06"),
    (3, (40, 1), 0.9, "0?1F060K"),
    (
        *(4, (33, 65), 0.02),
        r"b01e10^10^O0QN0O1i0O70^O0RO0e30lL050W10\N0g10\N03030k60]K0`M0T10cN0n10"
        r"TN1NOo30O0RL0?0\20mM0M0]O091f0OL0\10_O0d00[N0I0<0P10ZN080B07",
    ),
]


def encode_counts(counts: list[int]) -> str:
    """Write the compressed form, from its description."""
    text = ""
    for place, count in enumerate(counts):
        value = count - counts[place - 2] if place > 2 else count
        more = True
        while more:
            bits = value & 31
            value >>= 5
            # done when what is left is the sign that bit 16 shows
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + (bits | (32 if more else 0)))
    return text


def run_lengths(mask: np.ndarray) -> list[int]:
    counts, current, run = [], False, 0
    for value in mask.ravel(order="F").tolist():
        if value != current:
            counts.append(run)
            current, run = value, 0
        run += 1
    return [*counts, run]


@given(st.lists(st.integers(0, 2**31), max_size=40))
def test_compressed_counts_are_read_as_they_were_written(counts):
    assert decode_counts(encode_counts(counts)) == counts


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_a_mask_comes_back_from_its_run_lengths(height, width, data):
    values = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(values).reshape(height, width)
    counts = run_lengths(mask)
    np.testing.assert_array_equal(fill_runs(np.array(counts), size=(height, width)), mask)
    decoded = decode_counts(encode_counts(counts))
    np.testing.assert_array_equal(fill_runs(np.array(decoded), size=(height, width)), mask)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_as_a_value_error(text):
    try:
        counts = decode_counts(text)
    except ValueError:
        return
    assert all(isinstance(count, int) for count in counts)


@pytest.mark.parametrize(("seed", "size", "density", "counts"), TOOLBOX)
def test_the_toolbox_means_the_same_mask(seed, size, density, counts):
    mask = np.random.default_rng(seed).random(size) < density
    decoded = np.array(decode_counts(counts))
    assert decoded.sum() == mask.size
    np.testing.assert_array_equal(fill_runs(decoded, size=size), mask)


POINTS = st.tuples(st.floats(-20, 60), st.floats(-20, 60))


def fill(points: list[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, bool)
    top, left, part = fill_polygon(np.array(points, float), size=size)
    mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    return mask


def winding_parity(points: list[tuple[float, float]], size: tuple[int, int]) -> np.ndarray:
    """Count, centre by centre, the edges that a ray to the right crosses; from the textbook, not from our code."""
    mask = np.zeros(size, bool)
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = column + 0.5, row + 0.5
            for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
                if y0 > y1:
                    x0, y0, x1, y1 = x1, y1, x0, y0
                if y0 <= y < y1 and x0 + (y - y0) / (y1 - y0) * (x1 - x0) <= x:
                    mask[row, column] ^= True
    return mask


@given(st.lists(POINTS, min_size=3, max_size=9), st.integers(1, 24), st.integers(1, 24))
def test_a_pixel_is_inside_if_its_centre_is(points, height, width):
    np.testing.assert_array_equal(fill(points, (height, width)), winding_parity(points, (height, width)))


@given(st.integers(0, 8), st.integers(0, 8), st.integers(1, 9), st.integers(1, 9))
def test_a_rectangle_on_the_grid_holds_exactly_its_pixels(top, left, height, width):
    corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
    expected = np.zeros((12, 12), bool)
    expected[top : top + height, left : left + width] = True
    np.testing.assert_array_equal(fill(corners, (12, 12)), expected)


@given(st.lists(POINTS, min_size=4, max_size=4), POINTS)
def test_parts_of_a_polygon_neither_overlap_nor_leave_a_gap(corners, apex):
    """A fan of triangles around any point covers what the polygon covers, by the even-odd rule."""
    size = (40, 40)
    parts = [fill([apex, corners[place], corners[(place + 1) % 4]], size) for place in range(4)]
    np.testing.assert_array_equal(np.logical_xor.reduce(parts), fill(corners, size))


@given(st.lists(POINTS, min_size=3, max_size=6), st.lists(POINTS, min_size=3, max_size=6))
def test_polygons_of_one_object_are_united(first, second):
    size = (30, 30)
    top, left, mask = fill_union([np.array(first), np.array(second)], size=size)
    assert (top, left) == (0, 0)
    np.testing.assert_array_equal(mask, fill(first, size) | fill(second, size))


# Filled by pycocotools 2.0.11 in an image of 64x80: number of pixels. It rounds outlines to a fifth of a pixel.
OUTLINES = [
    ([(10, 10), (50.5, 12.25), (40, 55), (12, 40)], 1286),
    ([(5, 5), (70, 5), (70, 60), (5, 60)], 3575),
    ([(0, 0), (80, 0), (0, 64)], 2560),
    ([(20.2, 3.9), (30.1, 60.7), (22.4, 61.0)], 226),
    ([(40 + 20 * np.cos(a), 32 + 20 * np.sin(a)) for a in np.linspace(0, 6.2, 40)], 1259),
]


@pytest.mark.parametrize(("points", "num_pixels"), OUTLINES)
def test_areas_are_those_of_the_toolbox_but_for_pixels_on_the_outline(points, num_pixels):
    mask = fill(points, (64, 80))
    outline = sum(
        np.hypot(x1 - x0, y1 - y0) for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True)
    )
    assert abs(int(mask.sum()) - num_pixels) <= 0.1 * outline
