from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.metrics.boundary import BoundaryCounts, band_width, boundary_iou

Pixels = NDArray[np.uint8]


def _count(labels: Pixels, target: Pixels, *, num_classes: int, ratio: float = 0.02) -> BoundaryCounts:
    counts = BoundaryCounts(num_classes, ratio)
    counts.update(labels, target)
    return counts


def _authors_band(mask: Pixels, distance: int) -> NDArray[np.bool_]:
    """A mask less what is left of it after `distance` erosions by 3 x 3, the outside being no part of it."""
    inner = np.pad(mask, distance)
    for _ in range(distance):
        padded = np.pad(inner, 1)
        rows, columns = inner.shape
        inner = np.min([padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3)], axis=0)
    kept = inner[distance:-distance, distance:-distance]
    return (mask == 1) & (kept == 0)


def _band(ids: Pixels, labelled: NDArray[np.bool_], index: int, distance: int) -> NDArray[np.bool_]:
    """The definition, a pixel at a time: a labelled pixel of another class, or the outside, is near."""
    height, width = ids.shape
    band = np.zeros(ids.shape, bool)
    for i, j in np.ndindex(ids.shape):
        if not labelled[i, j] or ids[i, j] != index:
            continue
        for y in range(i - distance, i + distance + 1):
            for x in range(j - distance, j + distance + 1):
                inside = 0 <= y < height and 0 <= x < width
                band[i, j] |= not inside or (labelled[y, x] and ids[y, x] != index)
    return band


def _draw(seed: int, size: tuple[int, int], num_classes: int, *, void: float, stray: float) -> tuple[Pixels, Pixels]:
    """Blocks of classes, moved a little in the prediction."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, num_classes, (size[0] // 4 + 2, size[1] // 4 + 2), np.uint8)
    blocks = coarse.repeat(4, 0).repeat(4, 1)
    target = blocks[: size[0], : size[1]].copy()
    labels = blocks[2 : 2 + size[0], 1 : 1 + size[1]].copy()
    labels[generator.random(size) < stray] = 255
    target[generator.random(size) < void] = 255
    return labels, target


@pytest.mark.parametrize("ratio", [0.02, 0.05, 0.2, 1.0])
@pytest.mark.parametrize("size", [(17, 23), (1, 9), (30, 2)])
def test_without_ignored_pixels_bands_are_those_of_the_authors_code(size: tuple[int, int], ratio: float) -> None:
    labels, target = _draw(0, size, 3, void=0, stray=0)
    distance = band_width(size, ratio)
    for index, (intersection, union) in enumerate(_count(labels, target, num_classes=3, ratio=ratio).counts):
        ours = _authors_band((labels == index).astype(np.uint8), distance)
        theirs = _authors_band((target == index).astype(np.uint8), distance)
        assert (intersection, union) == ((ours & theirs).sum(), (ours | theirs).sum())


@pytest.mark.parametrize("seed", range(6))
def test_bands_with_ignored_pixels_and_predictions_of_no_class_are_as_defined(seed: int) -> None:
    labels, target = _draw(seed, (13, 18), 4, void=(0.05, 0.6)[seed % 2], stray=0.1)
    labelled = target != 255
    counts = _count(labels, target, num_classes=4, ratio=0.08).counts
    assert band_width((13, 18), 0.08) == 2
    for index, (intersection, union) in enumerate(counts):
        ours, theirs = (_band(ids, labelled, index, 2) for ids in (np.minimum(labels, 4), target))
        assert (intersection, union) == ((ours & theirs).sum(), (ours | theirs).sum())


def test_small_pictures_are_counted_by_hand() -> None:
    # one row: the outside is above and below, so all pixels are in a band
    counts = _count(np.array([[0, 1, 1, 1]], np.uint8), np.array([[0, 0, 1, 1]], np.uint8), num_classes=2).counts
    assert counts.tolist() == [[1, 2], [2, 3]]
    # 9 x 9 of one class: the outermost ring
    one = np.zeros((9, 9), np.uint8)
    assert _count(one, one, num_classes=2).counts.tolist() == [[32, 32], [0, 0]]


def test_ignored_pixels_make_no_edge_and_nothing_predicted_there_counts() -> None:
    target = np.zeros((9, 9), np.uint8)
    target[3:6, 3:6] = 255
    labels = target.copy()
    assert _count(labels, target, num_classes=2).counts.tolist() == [[32, 32], [0, 0]]
    labels[3:6, 3:6] = 1
    assert _count(labels, target, num_classes=2).counts.tolist() == [[32, 32], [0, 0]]


def test_255_classes_no_class_and_ignored_pixels_are_kept_apart() -> None:
    target = np.full((7, 7), 254, np.uint8)
    target[3, 3] = 255
    labels = np.full((7, 7), 254, np.uint8)
    ring = 49 - 25
    assert _count(labels, target, num_classes=255).counts[254].tolist() == [ring, ring]
    labels[3, 2] = 255  # no class: its neighbours are at an edge, three of which are not in the ring or ignored
    near = 8 - 1
    assert _count(labels, target, num_classes=255).counts[254].tolist() == [ring, ring + near]


def test_a_class_that_has_no_band_has_no_score_and_a_made_up_one_has_zero() -> None:
    labels, target = np.zeros((5, 5), np.uint8), np.zeros((5, 5), np.uint8)
    labels[2, 2] = 1
    found = boundary_iou(_count(labels, target, num_classes=3).counts)
    assert found[1:] == (0.0, None)
    assert found[0] == 16 / 24


def test_a_thin_error_along_an_edge_costs_more_here_than_in_iou() -> None:
    target = np.zeros((100, 100), np.uint8)
    target[20:80, 20:80] = 1
    labels = np.zeros((100, 100), np.uint8)
    labels[21:79, 21:79] = 1
    found = boundary_iou(_count(labels, target, num_classes=2).counts)[1]
    assert band_width((100, 100), 0.02) == 3
    assert found == (58**2 - 54**2) / (60**2 - 52**2)
    assert found < 58**2 / 60**2


def test_pictures_without_a_labelled_pixel_or_any_pixel_count_nothing() -> None:
    void = np.full((4, 5), 255, np.uint8)
    assert not _count(np.zeros((4, 5), np.uint8), void, num_classes=2).counts.any()
    assert not _count(void[:0], void[:0], num_classes=2).counts.any()


def test_views_are_counted_like_copies() -> None:
    labels, target = _draw(3, (20, 20), 3, void=0.1, stray=0)
    seen = _count(labels[::2, ::-1], target[::2, ::-1], num_classes=3)
    assert np.array_equal(seen.counts, _count(labels[::2, ::-1].copy(), target[::2, ::-1].copy(), num_classes=3).counts)


def test_a_ground_truth_value_that_is_no_class_is_refused_and_nothing_is_counted() -> None:
    counts = BoundaryCounts(2)
    with pytest.raises(DataError, match=r"E-DATA-014 .* 2, 7 .* allowed 0-1 or 255"):
        counts.update(np.zeros((1, 3), np.uint8), np.array([[0, 2, 7]], np.uint8))
    assert not counts.counts.any()


def test_pictures_of_another_type_or_shape_are_refused() -> None:
    with pytest.raises(TypeError, match="int64"):
        BoundaryCounts(2).update(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2, 1\) and target \(1, 2\)"):
        BoundaryCounts(2).update(np.zeros((2, 1), np.uint8), np.zeros((1, 2), np.uint8))
    with pytest.raises(ValueError, match=r"expected \(H, W\)"):
        BoundaryCounts(2).update(np.zeros(2, np.uint8), np.zeros(2, np.uint8))


@pytest.mark.parametrize("arguments", [(0,), (256,), (2, 0.0), (2, 1.5), (2, float("nan"))])
def test_classes_and_ratios_outside_their_range_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="allowed"):
        BoundaryCounts(*arguments)


def test_counts_survive_a_round_trip_and_other_meanings_do_not_add_up() -> None:
    labels, target = _draw(1, (12, 12), 2, void=0, stray=0)
    first = _count(labels, target, num_classes=2)
    copy = BoundaryCounts.from_counts(first.counts)
    copy.update(labels, target)
    assert np.array_equal(copy.counts, 2 * first.counts)
    for other in (BoundaryCounts(3), BoundaryCounts(2, 0.03), BoundaryCounts(2, ignore_index=254)):
        with pytest.raises(ValueError, match="do not add up"):
            first + other
    for wrong in (np.zeros((2, 3), np.int64), np.zeros((2, 2)), np.full((2, 2), -1)):
        with pytest.raises(ValueError, match="expected"):
            BoundaryCounts.from_counts(wrong)
