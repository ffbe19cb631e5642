from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.image_scores import image_counts
from nestseg.metrics.objects import ObjectCounts, iou_by_size, size_names

Pixels = NDArray[np.uint8]


def _count(labels: Pixels, target: Pixels, *, num_classes: int, edges: tuple[int, ...]) -> NDArray[np.int64]:
    counts = ObjectCounts(num_classes, edges)
    counts.update(labels, target)
    return counts.counts


def _flood(ids: Pixels, allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Number connected parts of one id from 0, -1 where not allowed: a flood fill over eight neighbours."""
    part = np.full(ids.shape, -1)
    number = 0
    for seed in np.ndindex(ids.shape):
        if not allowed[seed] or part[seed] >= 0:
            continue
        part[seed], open_pixels = number, [seed]
        while open_pixels:
            i, j = open_pixels.pop()
            for y in range(max(0, i - 1), min(ids.shape[0], i + 2)):
                for x in range(max(0, j - 1), min(ids.shape[1], j + 2)):
                    if allowed[y, x] and part[y, x] < 0 and ids[y, x] == ids[seed]:
                        part[y, x] = number
                        open_pixels.append((y, x))
        number += 1
    return part


def _by_hand(labels: Pixels, target: Pixels, *, num_classes: int, edges: tuple[int, ...]) -> NDArray[np.int64]:
    """The definition in words, pixel by pixel."""
    num_buckets = len(edges) + 1
    counts = np.zeros((num_classes, num_buckets, 4), np.int64)
    labelled = target != 255
    objects, guesses = _flood(target, labelled), _flood(labels, labelled)

    def bucket(parts: NDArray[np.int64], number: int) -> int:
        size = int((parts == number).sum())
        return sum(size >= edge for edge in edges)

    hits: dict[int, list[int]] = defaultdict(lambda: [0] * num_buckets)
    for pixel in zip(*np.nonzero(labelled & (labels == target)), strict=True):
        hits[guesses[pixel]][bucket(objects, objects[pixel])] += 1
    for number in range(objects.max() + 1):
        index = target[objects == number][0]
        counts[index, bucket(objects, number), 3] += 1
    for pixel in zip(*np.nonzero(labelled), strict=True):
        of_object = bucket(objects, objects[pixel])
        counts[target[pixel], of_object, 1] += 1
        if labels[pixel] == target[pixel]:
            counts[target[pixel], of_object, 0] += 1
            counts[target[pixel], of_object, 2] += 1
        elif labels[pixel] < num_classes:
            found = hits.get(guesses[pixel])
            if found is None:
                place = bucket(guesses, guesses[pixel])
            else:
                place = max(b for b in range(num_buckets) if found[b] == max(found))
            counts[labels[pixel], place, 2] += 1
    return counts


def _draw(seed: int, size: tuple[int, int], num_classes: int) -> tuple[Pixels, Pixels]:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, num_classes, (size[0] // 3 + 1, size[1] // 3 + 1), np.uint8)
    target = coarse.repeat(3, 0).repeat(3, 1)[: size[0], : size[1]].copy()
    change = generator.random(size) < generator.choice([0.05, 0.3, 0.9])
    labels = np.where(change, generator.integers(0, num_classes + 1, size), target).astype(np.uint8)
    labels[labels == num_classes] = 255
    target[generator.random(size) < generator.choice([0, 0.1, 0.5])] = 255
    return labels, target


@pytest.mark.parametrize("seed", range(30))
def test_counts_are_those_of_a_flood_fill_pixel_by_pixel(seed: int) -> None:
    size = [(11, 14), (1, 20), (20, 1), (2, 2), (16, 9)][seed % 5]
    num_classes = [2, 3, 5][seed % 3]
    labels, target = _draw(seed, size, num_classes)
    edges = [(4, 12), (9,), (1, 2, 30), ()][seed % 4]
    found = _count(labels, target, num_classes=num_classes, edges=edges)
    assert np.array_equal(found, _by_hand(labels, target, num_classes=num_classes, edges=edges))


@pytest.mark.parametrize("seed", range(4))
def test_summed_over_sizes_the_counts_are_those_of_the_confusion_matrix(seed: int) -> None:
    labels, target = _draw(seed, (40, 50), 6)
    confusion = ConfusionMatrix(6)
    confusion.update(labels, target)
    found = _count(labels, target, num_classes=6, edges=(5, 20))
    assert np.array_equal(found[..., :3].sum(axis=1), image_counts(confusion))


def test_an_object_as_large_as_an_edge_belongs_to_the_larger_bucket() -> None:
    target = np.zeros((1, 9), np.uint8)
    target[0, 1:4] = 1
    assert _count(target, target, num_classes=2, edges=(3,))[1].tolist() == [[0, 0, 0, 0], [3, 3, 3, 1]]
    assert _count(target, target, num_classes=2, edges=(4,))[1].tolist() == [[3, 3, 3, 1], [0, 0, 0, 0]]


def test_pixels_that_meet_at_a_corner_are_one_object_in_both_directions() -> None:
    target = np.eye(4, dtype=np.uint8)
    for picture in (target, target[::-1].copy()):
        assert _count(picture, picture, num_classes=2, edges=(4,))[1, :, 3].tolist() == [0, 1]


def test_parts_that_meet_in_a_later_row_are_one_object() -> None:
    comb = np.array([[1, 0, 1, 0, 1], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1]], np.uint8)
    assert _count(comb, comb, num_classes=2, edges=())[1].tolist() == [[11, 11, 11, 1]]
    # rows do not wrap around
    edge = np.array([[0, 0, 1], [1, 0, 0], [0, 0, 1]], np.uint8)
    assert _count(edge, edge, num_classes=2, edges=())[1, 0, 3] == 3


def test_a_spiral_is_one_object() -> None:
    spiral = np.zeros((41, 41), np.uint8)
    i = j = 0
    di, dj = 0, 1
    spiral[0, 0] = 1
    for _ in range(2000):
        y, x = i + 2 * di, j + 2 * dj
        if not (0 <= i + di < 41 and 0 <= j + dj < 41) or (0 <= y < 41 and 0 <= x < 41 and spiral[y, x]):
            di, dj = dj, -di
            if spiral[i + di, j + dj] or spiral[min(40, i + 2 * di), min(40, j + 2 * dj)]:
                break
        i, j = i + di, j + dj
        spiral[i, j] = 1
    assert spiral.sum() > 600
    assert _count(spiral, spiral, num_classes=2, edges=())[1, 0].tolist() == [spiral.sum()] * 3 + [1]


def test_the_halo_of_a_small_object_costs_the_small_ones_however_large_it_is() -> None:
    target = np.zeros((8, 8), np.uint8)
    target[3:5, 3:5] = 1
    labels = np.zeros((8, 8), np.uint8)
    labels[1:7, 1:7] = 1
    assert _count(labels, target, num_classes=2, edges=(10,))[1].tolist() == [[4, 4, 36, 1], [0, 0, 0, 0]]


def test_what_is_made_up_counts_by_its_own_size() -> None:
    labels = np.zeros((8, 8), np.uint8)
    labels[1:7, 1:3] = 1
    labels[1, 5] = 1
    found = _count(labels, np.zeros((8, 8), np.uint8), num_classes=2, edges=(10,))
    assert found[1].tolist() == [[0, 0, 1, 0], [0, 0, 12, 0]]


def test_a_predicted_object_over_two_sizes_goes_to_the_one_it_covers_most_and_if_equal_to_the_larger() -> None:
    target = np.array([[1, 1, 0, 0, 1, 1, 1, 1]], np.uint8)
    labels = np.array([[1, 1, 1, 1, 1, 0, 0, 0]], np.uint8)
    assert _count(labels, target, num_classes=2, edges=(3,))[1].tolist() == [[2, 2, 4, 1], [1, 4, 1, 1]]
    labels = np.array([[0, 1, 1, 1, 1, 0, 0, 0]], np.uint8)
    assert _count(labels, target, num_classes=2, edges=(3,))[1].tolist() == [[1, 2, 1, 1], [1, 4, 3, 1]]


def test_predictions_on_ignored_pixels_change_nothing_and_cut_objects() -> None:
    target = np.array([[1, 255, 1, 0]], np.uint8)
    results = [_count(np.array([[1, x, 1, 1]], np.uint8), target, num_classes=2, edges=(2,)) for x in (0, 1, 255)]
    assert all(np.array_equal(result, results[0]) for result in results)
    assert results[0][1].tolist() == [[2, 2, 3, 2], [0, 0, 0, 0]]


def test_another_ignored_value_and_255_classes_work() -> None:
    target = np.array([[0, 0, 2, 1]], np.uint8)
    counts = ObjectCounts(2, (2,), ignore_index=2)
    counts.update(np.array([[0, 1, 1, 1]], np.uint8), target)
    assert counts.counts.tolist() == [[[0, 0, 0, 0], [1, 2, 1, 1]], [[1, 1, 2, 1], [0, 0, 0, 0]]]
    last = np.full((2, 2), 254, np.uint8)
    assert _count(last, last, num_classes=255, edges=())[254].tolist() == [[4, 4, 4, 1]]


def test_iou_by_size_has_a_value_a_class_and_none_where_nothing_is() -> None:
    counts = np.array([[[1, 2, 3, 1], [0, 0, 0, 0], [0, 0, 5, 0]], [[0, 4, 0, 1], [7, 7, 7, 2], [0, 0, 0, 0]]])
    assert iou_by_size(counts, (4, 9)) == {
        "below 4 px": (0.25, 0.0),
        "4 to 8 px": (None, 1.0),
        "9 px and more": (0.0, None),
    }
    with pytest.raises(ValueError, match="expected"):
        iou_by_size(counts, (4,))
    assert size_names(()) == ("any size",)


def test_pictures_without_a_labelled_pixel_or_any_pixel_count_nothing() -> None:
    void = np.full((4, 5), 255, np.uint8)
    assert not _count(np.zeros((4, 5), np.uint8), void, num_classes=2, edges=(2,)).any()
    assert not _count(void[:0], void[:0], num_classes=2, edges=(2,)).any()


def test_a_ground_truth_value_that_is_no_class_is_refused_and_nothing_is_counted() -> None:
    counts = ObjectCounts(2)
    with pytest.raises(DataError, match=r"E-DATA-014 .* 2 .* allowed 0-1 or 255"):
        counts.update(np.zeros((1, 2), np.uint8), np.array([[0, 2]], np.uint8))
    assert not counts.counts.any()


@pytest.mark.parametrize("edges", [(0, 4), (4, 4), (9, 4)])
def test_edges_that_do_not_rise_are_refused(edges: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rising"):
        ObjectCounts(2, edges)


def test_counts_survive_a_round_trip_and_other_meanings_do_not_add_up() -> None:
    labels, target = _draw(0, (12, 12), 2)
    first = ObjectCounts(2, (5,))
    first.update(labels, target)
    copy = ObjectCounts.from_counts(first.counts, edges=(5,))
    copy.update(labels, target)
    assert np.array_equal(copy.counts, 2 * first.counts)
    for other in (ObjectCounts(3, (5,)), ObjectCounts(2, (6,)), ObjectCounts(2, (5,), ignore_index=254)):
        with pytest.raises(ValueError, match="do not add up"):
            first + other
    with pytest.raises(ValueError, match="expected"):
        ObjectCounts.from_counts(first.counts)
