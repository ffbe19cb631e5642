"""Scores by image: which pictures a model fails on, and the counts that confidence intervals are drawn from."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

from nestseg.core.disk import replaced_file
from nestseg.core.errors import DataError
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import VoidRule
from nestseg.metrics.label_maps import check_counts

_LEADING = ("index", "image", "mean_iou")
_COUNTED = ("right", "actual", "predicted")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageScore:
    """How one image was labelled.

    Args:
        index: Its place in the data set.
        name: Its name.
        mean_iou: Mean IoU over the classes that its ground truth shows; None where no pixel is labelled.
    """

    index: int
    name: str
    mean_iou: float | None


@final
class ImageScores:
    """Pixel counts of each image, by its place in the data set. Memory: 24 bytes an image and class.

    Parts of a data set, such as those of several processes, add up in any order to the same scores.

    Args:
        classes: Class names in train-id order.

    Shape:
        - counts: (N, K, 3) int64: right pixels, pixels in ground truth, pixels in the prediction

    Reference:
        Csurka, Larlus, Perronnin, "What is a good evaluation measure for semantic segmentation?", BMVC 2013:
        scores by image.

    Deviations:
        Classes that an image only shows in the prediction are not in its mean: a stray pixel would halve it. The pixels
        count as missed where they lie.

    Example:
        >>> scores = ImageScores(("road", "sky"))
        >>> scores.update(7, "street_b", np.array([[1, 2, 1], [3, 3, 4]]))
        >>> scores.update(2, "street_a", np.array([[5, 5, 5], [0, 0, 0]]))
        >>> scores.worst(1)
        (ImageScore(index=7, name='street_b', mean_iou=0.625),)
        >>> scores.names
        ('street_a', 'street_b')
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = tuple(classes)
        self._images: dict[int, tuple[str, NDArray[np.int64]]] = {}

    def update(self, index: int, name: str, counts: NDArray[np.int64]) -> None:
        """Add an image.

        Args:
            index: Its place in the data set, at least 0.
            name: Its name.
            counts: See `image_counts`; copied.

        Raises:
            ValueError: If the index is negative or taken, or these are no counts of these classes.

        Shape:
            - counts: (K, 3) int64
        """
        check_counts(counts, (len(self.classes), 3))
        if index < 0:
            raise ValueError(f"image {index}; allowed 0 and up")
        if index in self._images:
            raise ValueError(f"image {index} ({name}) was counted before, as {self._images[index][0]}")
        self._images[index] = (name, counts.copy())

    def __len__(self) -> int:
        return len(self._images)

    def __add__(self, other: ImageScores) -> ImageScores:
        """Merge two parts of a data set into new scores.

        Raises:
            ValueError: If the two differ in classes, or both have the same image.
        """
        if self.classes != other.classes:
            raise ValueError(
                f"scores of {len(self.classes)} and of {len(other.classes)} or other classes do not add up"
            )
        if shared := self._images.keys() & other._images.keys():
            raise ValueError(f"images {sorted(shared)} were counted in both parts")
        both = ImageScores(self.classes)
        both._images = self._images | other._images
        return both

    @property
    def indices(self) -> tuple[int, ...]:
        """Places in the data set, ascending."""
        return tuple(sorted(self._images))

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in the order of `indices`."""
        return tuple(self._images[index][0] for index in self.indices)

    @property
    def counts(self) -> NDArray[np.int64]:
        """All counts, in the order of `indices`.

        Shape:
            - returns: (N, K, 3) int64
        """
        empty = np.zeros((0, len(self.classes), 3), np.int64)
        return np.stack([self._images[index][1] for index in self.indices]) if self._images else empty

    def scores(self) -> tuple[ImageScore, ...]:
        """Return the score of each image, in the order of `indices`."""
        means = mean_iou_by_image(self.counts)
        rows = zip(self.indices, self.names, means, strict=True)
        return tuple(ImageScore(index=index, name=name, mean_iou=mean) for index, name, mean in rows)

    def worst(self, count: int = 20) -> tuple[ImageScore, ...]:
        """Return the images with the lowest scores, the lowest first; of equal ones, the first in the data set."""
        scored = [(score.mean_iou, score.index, score) for score in self.scores() if score.mean_iou is not None]
        return tuple(score for *_, score in sorted(scored)[:count])

    def best(self, count: int = 20) -> tuple[ImageScore, ...]:
        """Return the images with the highest scores, the highest first; of equal ones, the first in the data set."""
        scored = [(-score.mean_iou, score.index, score) for score in self.scores() if score.mean_iou is not None]
        return tuple(score for *_, score in sorted(scored)[:count])


def image_counts(confusion: ConfusionMatrix, *, void: VoidRule = "skip") -> NDArray[np.int64]:
    """Take what scores need from the confusion matrix of one image.

    Args:
        confusion: Counts of the image.
        void: What predictions on pixels without ground truth are, see `compute_scores`.

    Raises:
        ValueError: If they count, and are not known.

    Shape:
        - returns: (K, 3) int64: right pixels, pixels in ground truth, pixels in the prediction

    Example:
        >>> confusion = ConfusionMatrix(2)
        >>> confusion.update(np.array([[0, 1, 9]], np.uint8), np.array([[0, 0, 1]], np.uint8))
        >>> image_counts(confusion).tolist()
        [[1, 2, 1], [0, 1, 1]]
    """
    counts = confusion.counts
    predicted = counts[:, :-1].sum(axis=0)
    if void == "false_positive":
        if confusion.void_counts is None:
            raise ValueError("void_counts are not known; give them to ConfusionMatrix.from_counts")
        predicted = predicted + confusion.void_counts[:-1]
    return np.stack([counts.diagonal(), counts.sum(axis=1), predicted], axis=1)


def mean_iou_by_image(counts: NDArray[np.int64]) -> tuple[float | None, ...]:
    """Return each image's mean IoU over the classes of its ground truth; None where no pixel is labelled.

    Args:
        counts: See `ImageScores`.

    Shape:
        - counts: (N, K, 3) int64
    """
    right, actual, predicted = np.moveaxis(counts, 2, 0)
    iou = right / np.maximum(actual + predicted - right, 1)
    num_classes = (actual > 0).sum(axis=1)
    # a class that the ground truth lacks has no right pixel, so it adds 0 to the sum
    means = (iou.sum(axis=1) / np.maximum(num_classes, 1)).tolist()
    return tuple(mean if number else None for mean, number in zip(means, num_classes.tolist(), strict=True))


@final
class ImageScoreWriter:
    """Write a table of image scores line by line; it has its name when it is whole, and after a kill it is not there.

    A line holds the place in the data set, the name, the mean IoU, and three counts a class. To be used in a ``with``
    statement; an exception leaves what was at the path before.

    Args:
        path: The table, a CSV file.
        classes: Class names in train-id order.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> from tempfile import mkdtemp
        >>> path = Path(mkdtemp()) / "images.csv"
        >>> with ImageScoreWriter(path, ("road",)) as writer:
        ...     writer.write(0, "street", np.array([[1, 2, 3]]))
        >>> print(path.read_text())
        index,image,mean_iou,road right,road actual,road predicted
        0,street,0.250000,1,2,3
        <BLANKLINE>
    """

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        self.path = path
        self.classes = tuple(classes)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        temporary = self._stack.enter_context(replaced_file(self.path))
        try:
            # one line a write, so that the table can be watched while it grows; names may hold any bytes
            self._file = self._stack.enter_context(
                temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="", buffering=1)
            )
            self._rows = csv.writer(self._file, lineterminator="\n")
            self._rows.writerow([*_LEADING, *(f"{name} {counted}" for name in self.classes for counted in _COUNTED)])
        except BaseException as error:
            self._stack.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write(self, index: int, name: str, counts: NDArray[np.int64]) -> None:
        """Add the line of an image.

        Args:
            index: Its place in the data set.
            name: Its name.
            counts: See `image_counts`.

        Raises:
            ValueError: If these are no counts of these classes.
            OSError: If it cannot be written.

        Shape:
            - counts: (K, 3) int64
        """
        check_counts(counts, (len(self.classes), 3))
        mean = mean_iou_by_image(counts[None])[0]
        self._rows.writerow([index, name, "" if mean is None else f"{mean:.6f}", *counts.ravel().tolist()])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)


def read_image_scores(path: Path) -> ImageScores:
    """Read a table that `ImageScoreWriter` wrote. Means are computed again from the counts.

    Raises:
        DataError: If it is no such table (E-DATA-120), or a line of it is damaged (E-DATA-121).
        OSError: If it cannot be read.
    """
    again = "evaluate again to write it anew"
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file)
        try:
            header = next(rows, [])
        except csv.Error as error:
            raise DataError("E-DATA-120", f"is no CSV: {error}", fix=again, path=path) from error
        suffix = f" {_COUNTED[0]}"
        classes = tuple(name.removesuffix(suffix) for name in header[len(_LEADING) :: len(_COUNTED)])
        if not classes or header != [*_LEADING, *(f"{name} {counted}" for name in classes for counted in _COUNTED)]:
            given = ", ".join(header[:4]) or "nothing"
            reason = f"is no table of image scores: its first line begins {given}; expected {', '.join(_LEADING)}"
            raise DataError("E-DATA-120", reason, fix=again, path=path)
        scores = ImageScores(classes)
        try:
            for row in rows:
                if len(row) != len(header):
                    raise ValueError(f"{len(row)} fields; expected {len(header)}")
                counts = np.array([int(value) for value in row[len(_LEADING) :]], np.int64)
                scores.update(int(row[0]), row[1], counts.reshape(-1, len(_COUNTED)))
        except (ValueError, OverflowError, csv.Error) as error:
            raise DataError("E-DATA-121", f"line {rows.line_num}: {error}", fix=again, path=path) from error
    return scores
