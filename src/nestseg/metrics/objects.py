"""IoU by the size of objects: does a model fail on what is small?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Self, final

import numpy as np
from numpy.typing import NDArray

from nestseg.core.types import IGNORE_INDEX
from nestseg.metrics.label_maps import check_classes, check_counts, find_labelled


@final
class ObjectCounts:
    """Pixel counts of a whole data set by class and by the size of objects.

    An object is a connected part of one class in the ground truth; pixels connect to their eight neighbours. Its number
    of pixels decides its bucket. With ``edges`` (e1, e2), bucket 0 holds objects below e1 pixels, bucket 1 those of e1
    and more but below e2, bucket 2 the others.

    Every labelled pixel that is predicted as a class belongs to one bucket of that class:

    - a right one to the bucket of the object it lies on;
    - a wrong one by the predicted object (a connected part of one class in the prediction, ignored pixels cut out) that
      it is part of: to the bucket in which that object has most right pixels, the larger bucket where two have
      equally many; where it has none at all, to the bucket of the predicted object's own size.

    So the halo around a small object costs the small ones, and what was made up from nothing counts by its size. Summed
    over buckets, the counts are those of the confusion matrix. Pixels that the ground truth ignores are part of no
    object, and what is predicted there changes nothing.

    Args:
        num_classes: Number of classes K, 1 to 255.
        edges: Rising numbers of pixels, at least 1, at which the next bucket begins; B - 1 of them.
        ignore_index: Ground truth value of pixels that do not count; K to 255.

    Raises:
        ValueError: If an argument is outside its range.

    Shape:
        - counts: (K, B, 4) int64: right pixels, pixels of objects, predicted pixels, number of objects

    Reference:
        Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, and its evaluation code: areas below 32 x 32
        are small, above 96 x 96 large.

    Deviations:
        COCO's are areas of annotated instances; here touching instances of a class are one object. It has no rule for
        the pixels of a semantic prediction; the one above is ours.

    Example:
        >>> objects = ObjectCounts(2, edges=(3,))
        >>> objects.update(np.array([[1, 1, 1, 0, 1]], np.uint8), np.array([[0, 1, 1, 0, 0]], np.uint8))
        >>> objects.counts[1].tolist()
        [[2, 2, 4, 1], [0, 0, 0, 0]]
    """

    def __init__(
        self, num_classes: int, edges: Sequence[int] = (32**2, 96**2), *, ignore_index: int = IGNORE_INDEX
    ) -> None:
        check_classes(num_classes, ignore_index)
        if list(edges) != sorted(set(edges)) or any(edge < 1 for edge in edges):
            raise ValueError(f"edges {tuple(edges)}; expected rising numbers of pixels, at least 1")
        self.num_classes = num_classes
        self.edges = tuple(edges)
        self.ignore_index = ignore_index
        self.counts: NDArray[np.int64] = np.zeros((num_classes, len(self.edges) + 1, 4), np.int64)

    @classmethod
    def from_counts(
        cls,
        counts: NDArray[np.int64],
        *,
        edges: Sequence[int] = (32**2, 96**2),
        ignore_index: int = IGNORE_INDEX,
    ) -> Self:
        """Rebuild from counts, for example after summing them over processes.

        Args:
            counts: What `counts` held; copied.
            edges: Numbers of pixels at which the next bucket begins.
            ignore_index: Ground truth value of pixels that do not count.

        Raises:
            ValueError: If the counts have another shape, are negative or are not int64.

        Shape:
            - counts: (K, B, 4) int64
        """
        check_counts(counts, (None, len(edges) + 1, 4))
        objects = cls(len(counts), edges, ignore_index=ignore_index)
        objects.counts += counts
        return objects

    def update(self, labels: NDArray[np.uint8], target: NDArray[np.uint8]) -> None:
        """Count the objects of one picture.

        Args:
            labels: Predicted train ids; any value is allowed.
            target: Ground truth train ids in [0, K), or ``ignore_index``.

        Raises:
            TypeError: If one of the two is not uint8.
            ValueError: If the two differ in shape, or are no pictures.
            DataError: If the ground truth holds another value (E-DATA-014). Nothing is counted then.

        Shape:
            - labels, target: (H, W) uint8
        """
        find_labelled(labels, target, num_classes=self.num_classes, ignore_index=self.ignore_index)
        if not target.size:
            return
        num_classes, num_buckets, _ = self.counts.shape
        truth, guess, length, (first, second) = _cut_into_segments(labels, target)
        num_segments = len(length)
        # places instead of masks here and below: numpy picks by them four times as fast
        valid = truth != self.ignore_index
        labelled = np.flatnonzero(valid)
        right = np.flatnonzero(valid & (truth == guess))
        wrong = np.flatnonzero(valid & (truth != guess) & (guess < num_classes))

        true_ids = truth[first], truth[second]
        same = true_ids[0] == true_ids[1]
        one_object = np.flatnonzero(same & (true_ids[0] != self.ignore_index))
        object_of = _connect(num_segments, first[one_object], second[one_object])
        both = (true_ids[0] != self.ignore_index) & (true_ids[1] != self.ignore_index)
        one_guess = np.flatnonzero(both & (guess[first] == guess[second]))
        guess_of = _connect(num_segments, first[one_guess], second[one_guess])

        size = _add_up(object_of, length, num_segments)
        bucket = np.searchsorted(self.edges, size, side="right")[object_of]
        hits = _add_up(guess_of[right] * num_buckets + bucket[right], length[right], num_segments * num_buckets)
        hits = hits.reshape(-1, num_buckets)[guess_of[wrong]]
        most = num_buckets - 1 - np.argmax(hits[:, ::-1], axis=1)
        guess_size = _add_up(guess_of, length, num_segments)[guess_of[wrong]]
        wrong_bucket = np.where(hits.any(axis=1), most, np.searchsorted(self.edges, guess_size, side="right"))

        def count(chosen: NDArray[np.int64], ids: NDArray[np.uint8], buckets: NDArray[np.int64]) -> NDArray[np.int64]:
            places = ids[chosen] * np.int64(num_buckets) + buckets
            return _add_up(places, length[chosen], num_classes * num_buckets).reshape(num_classes, num_buckets)

        begun = np.flatnonzero(valid & (object_of == np.arange(num_segments)))
        num_right = count(right, truth, bucket[right])
        self.counts[..., 0] += num_right
        self.counts[..., 1] += count(labelled, truth, bucket[labelled])
        self.counts[..., 2] += num_right + count(wrong, guess, wrong_bucket)
        np.add.at(self.counts[..., 3], (truth[begun], bucket[begun]), 1)

    def __add__(self, other: ObjectCounts) -> ObjectCounts:
        """Merge the counts of two parts of a data set into new ones.

        Raises:
            ValueError: If the two differ in classes, ``edges`` or ``ignore_index``.
        """
        ours = (self.num_classes, self.edges, self.ignore_index)
        theirs = (other.num_classes, other.edges, other.ignore_index)
        if ours != theirs:
            raise ValueError(f"objects of (classes, edges, ignore_index) {ours} and {theirs} do not add up")
        return ObjectCounts.from_counts(self.counts + other.counts, edges=self.edges, ignore_index=self.ignore_index)


def iou_by_size(counts: NDArray[np.int64], edges: Sequence[int]) -> dict[str, tuple[float | None, ...]]:
    """Return the IoU of each class by the size of objects; None where a bucket holds nothing of a class.

    Args:
        counts: See `ObjectCounts`.
        edges: The numbers of pixels that it was made with.

    Returns:
        The name of each bucket with a value a class, small to large.

    Raises:
        ValueError: If there are not as many buckets as the edges make.

    Shape:
        - counts: (K, B, 4) int64

    Reference:
        See `ObjectCounts`.

    Example:
        >>> iou_by_size(np.array([[[2, 2, 4, 1], [0, 0, 0, 0]]]), (3,))
        {'below 3 px': (0.5,), '3 px and more': (None,)}
    """
    check_counts(counts, (None, len(edges) + 1, 4))
    right, actual, predicted, _ = np.moveaxis(counts, 2, 0)
    union = actual + predicted - right
    return {
        name: tuple(a / b if b else None for a, b in zip(parts, wholes, strict=True))
        for name, parts, wholes in zip(size_names(edges), right.T.tolist(), union.T.tolist(), strict=True)
    }


def objects_by_size(counts: NDArray[np.int64], edges: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Return how many objects of each class there are, by their size.

    Args:
        counts: See `ObjectCounts`.
        edges: The numbers of pixels that it was made with.

    Returns:
        The name of each bucket with a number a class, small to large.

    Raises:
        ValueError: If there are not as many buckets as the edges make.

    Shape:
        - counts: (K, B, 4) int64

    Reference:
        See `ObjectCounts`.

    Example:
        >>> objects_by_size(np.array([[[2, 2, 4, 1], [0, 0, 0, 0]]]), (3,))
        {'below 3 px': (1,), '3 px and more': (0,)}
    """
    check_counts(counts, (None, len(edges) + 1, 4))
    return {name: tuple(numbers) for name, numbers in zip(size_names(edges), counts[..., 3].T.tolist(), strict=True)}


def size_names(edges: Sequence[int]) -> tuple[str, ...]:
    """Word the buckets of object sizes, small to large.

    Example:
        >>> size_names((1024, 9216))
        ('below 1024 px', '1024 to 9215 px', '9216 px and more')
    """
    if not edges:
        return ("any size",)
    between = [f"{low} to {high - 1} px" for low, high in pairwise(edges)]
    return (f"below {edges[0]} px", *between, f"{edges[-1]} px and more")


class _Segments(NamedTuple):
    """The longest parts of rows along which neither map changes, from top left to bottom right."""

    truth: NDArray[np.uint8]
    guess: NDArray[np.uint8]
    length: NDArray[np.int64]
    neighbours: tuple[NDArray[np.int64], NDArray[np.int64]]
    """Segments that touch, by a side or a corner, each pair once."""


def _cut_into_segments(labels: NDArray[np.uint8], target: NDArray[np.uint8]) -> _Segments:
    """Turn two maps into segments: some ten thousand in a picture of two million pixels.

    Shape:
        - labels, target: (H, W) uint8
        - returns: (S,) uint8 and int64; neighbours (E,) int64 twice
    """
    height, width = target.shape
    changes = np.ones((height, width), np.bool_)
    changes[:, 1:] = (target[:, 1:] != target[:, :-1]) | (labels[:, 1:] != labels[:, :-1])
    begins = changes.ravel()
    start = np.flatnonzero(begins)
    end = np.append(start[1:], height * width)
    at_left, at_right = start % width == 0, end % width == 0

    # segments of the next row from below left of a segment to below right of it: the latter is where the search for
    # the following segment began, or begins one pixel on
    upper = int(np.searchsorted(start, (height - 1) * width))
    first = np.searchsorted(start, start[:upper] + width - ~at_left[:upper], side="right") - 1
    following = np.append(first[1:], len(start))
    below = end[:upper] + width - at_right[:upper]
    number = following - first + np.where(at_right[:upper], 0, 1 + begins[below])
    place = np.arange(number.sum()) - np.repeat(np.cumsum(number) - number - first, number)
    beside = np.flatnonzero(~at_right)
    return _Segments(
        truth=target.ravel()[start],
        guess=labels.ravel()[start],
        length=end - start,
        neighbours=(
            np.concatenate([beside, np.repeat(np.arange(upper), number)]),
            np.concatenate([beside + 1, place]),
        ),
    )


def _connect(num_nodes: int, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Name every node after the smallest node that edges lead to from it.

    Trees are hung under a neighbouring tree of smaller root and flattened, until no edge joins two trees.

    Args:
        num_nodes: Number of nodes S.
        first: One end of each edge.
        second: The other end.

    Shape:
        - first, second: (E,) int64 in [0, S)
        - returns: (S,) int64
    """
    root = np.arange(num_nodes)
    while len(first):
        low, high = np.minimum(first, second), np.maximum(first, second)
        root[high] = low
        while not np.array_equal(above := root[root], root):
            root = above
        first, second = root[first], root[second]
        apart = np.flatnonzero(first != second)
        first, second = first[apart], second[apart]
    return root


def _add_up(places: NDArray[np.int64], values: NDArray[np.int64], num_places: int) -> NDArray[np.int64]:
    """Sum values by place; the sums pass through float64, which is exact for the pixels of any picture.

    Shape:
        - places, values: (S,) int64
        - returns: (num_places,) int64
    """
    return np.bincount(places, weights=values, minlength=num_places).astype(np.int64)
