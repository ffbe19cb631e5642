"""What a data set is, and the parts that data sets of files share: layout, pairs, ids."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import ClassVar, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError, nearest
from nestseg.core.image_io import read_image, read_labels
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import IGNORE_INDEX, AbsentRule, Sample

_NO_LAYOUT = "E-DATA-020"


class UnlabelledSplit(NamedTuple):
    """A split whose labels are kept by a benchmark: pictures to predict and submit."""

    find_images: Callable[[Path], Mapping[str, Path]]
    """Find the picture of each sample, by name and in order, in the folder that the user named."""

    official_count: int
    """Pictures it has as published."""


class SegmentationDataset(ABC):
    """Pictures with their ground truth in train ids, by index.

    A subclass is either final or abstract as `FileDataset` is; no method with a body is overridden.

    Args:
        root: Folder of the data set; None for one that has no files.
        split: One of ``splits``.
    """

    taxonomy: ClassVar[Taxonomy]
    """Class names and colours in train-id order."""

    splits: ClassVar[tuple[str, ...]]
    """Names of the splits."""

    unlabelled_splits: ClassVar[Mapping[str, UnlabelledSplit]] = {}
    """Further splits, without labels, by name; only a `FileDataset` has any."""

    official_counts: ClassVar[Mapping[str, int]]
    """Pictures a split has as published. A folder that holds another number is fine: subsets are legal."""

    absent_classes: ClassVar[AbsentRule] = "skip"
    """What a class that occurs nowhere in a split does to means of scores, by the data set's own rule."""

    terms: ClassVar[str] = "not stated"
    """Under which terms the data may be used, in words; travels with models that were trained on it."""

    @abstractmethod
    def __init__(self, root: str | Path | None, split: str) -> None: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return a sample's name, unique in the split and usable as a file stem."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Read one sample.

        Args:
            index: 0 to ``len(self) - 1``.

        Shape:
            - returns.image: (H, W, 3) uint8 RGB
            - returns.target: (H, W) uint8 train ids in [0, K) or 255 (ignored)

        Raises:
            DataError: If a file is missing, damaged or holds a value that the data set does not define.
        """

    @classmethod
    def check_split(cls, split: str) -> str:
        """Return ``split`` if the data set has it.

        Raises:
            DataError: E-DATA-021, with the nearest names.
        """
        if split not in cls.splits:
            others = f"; without labels: {', '.join(cls.unlabelled_splits)}" if cls.unlabelled_splits else ""
            raise DataError(
                "E-DATA-021",
                f"split {split!r}; allowed: {', '.join(cls.splits)}{others}",
                fix=nearest(split, [*cls.splits, *(name for name in cls.unlabelled_splits if name != split)]),
                path=cls.taxonomy.name,
            )
        return split


class Pair(NamedTuple):
    """The two files of a sample."""

    name: str
    image: Path
    label: Path


class SampleFiles(NamedTuple):
    """What was found of a sample: both files, or None where one is not there."""

    name: str
    image: Path | None
    label: Path | None


class LayoutError(DataError):
    """A folder without the layout of a data set. Pickling keeps the message alone."""

    expected: tuple[str, ...] = ()
    """Files and folders of the layout, relative to the folder sought."""

    missing: tuple[str, ...] = ()
    """Those of them that are not there."""


class PairsError(DataError):
    """Samples that are not whole. Its message is the first cause; pickling keeps the message alone."""

    causes: tuple[DataError, ...] = ()
    """All that is wrong with lists, names and pairs, in words."""

    samples: tuple[SampleFiles, ...] = ()
    """What was found all the same, in order of the names."""

    repeated: tuple[tuple[Path, ...], ...] = ()
    """Files that share a stem."""


class FileDataset(SegmentationDataset):
    """A data set whose samples are pairs of an image file and a label file.

    A split without labels has images only: `read_image` reads them, and `read` is an error.

    Args:
        root: Folder that holds the layout, see the subclass.
        split: One of ``splits`` or of ``unlabelled_splits``.

    Raises:
        DataError: E-DATA-020 to E-DATA-024: unexpected layout, unknown split, empty split, incomplete pairs,
            bad list; E-DATA-010: a folder that cannot be read.
    """

    label_map: ClassVar[NDArray[np.uint8]]
    """(256,) uint8: train id by stored id."""

    label_values: ClassVar[Set[int]]
    """Stored ids that the data set defines, ignored ones included; any other is an error."""

    def __init__(self, root: str | Path | None, split: str) -> None:
        self.has_labels = split not in self.unlabelled_splits
        self.split = self.check_split(split) if self.has_labels else split
        if root is None:
            raise DataError(
                "E-DATA-020",
                "no folder given",
                fix="name the folder that holds the data set, on the command line with --data",
                path=self.taxonomy.name,
            )
        try:
            self._pairs = tuple(self._find_pairs(Path(root))) if self.has_labels else ()
            self._images = tuple((pair.name, pair.image) for pair in self._pairs)
            if not self.has_labels:
                self._images = tuple(self.unlabelled_splits[split].find_images(Path(root)).items())
        except OSError as error:
            raise DataError(
                "E-DATA-010",
                f"cannot be read: {error.strerror}",
                fix="check path and permissions",
                path=error.filename,
            ) from error
        if not self._images:
            raise DataError(
                "E-DATA-022",
                f"split {split!r} of {self.taxonomy.name} holds no samples",
                fix="unpack the data set again, or choose another split",
                path=root,
            )

    def __len__(self) -> int:
        return len(self._images)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The files of every sample, by index; none in a split without labels."""
        return self._pairs

    def name(self, index: int) -> str:
        """Return a sample's name, see `SegmentationDataset.name`."""
        return self._images[index][0]

    def read_image(self, index: int) -> NDArray[np.uint8]:
        """Read the image of one sample as it is stored, whatever its EXIF orientation.

        Args:
            index: 0 to ``len(self) - 1``.

        Shape:
            - returns: (H, W, 3) uint8 RGB

        Raises:
            DataError: If the file is missing or damaged.
        """
        return read_image(self._images[index][1], exif="ignore")

    def read(self, index: int) -> Sample:
        """Read one sample, see `SegmentationDataset.read`.

        Shape:
            - returns.image: (H, W, 3) uint8 RGB
            - returns.target: (H, W) uint8 train ids in [0, K) or 255 (ignored)
        """
        pair = self.find_pair(index)
        return read_pair(
            pair.image,
            pair.label,
            label_map=self.label_map,
            allowed=self.label_values,
            taxonomy=self.taxonomy,
        )

    def find_pair(self, index: int) -> Pair:
        """Return the files of one sample.

        Raises:
            DataError: E-DATA-115 in a split without labels.
        """
        if not self.has_labels:
            raise DataError(
                "E-DATA-115",
                f"split {self.split!r} of {self.taxonomy.name} has no labels; the benchmark keeps them",
                fix=f"score {', '.join(self.splits)}; write this one with nestseg evaluate ... --submission DIR",
                path=self.name(index),
            )
        return self._pairs[index]

    @abstractmethod
    def _find_pairs(self, root: Path) -> Iterable[Pair]:
        """List the samples of ``self.split`` in a stable order."""


def read_pair(
    image_path: str | Path,
    label_path: str | Path,
    *,
    label_map: NDArray[np.uint8],
    allowed: Set[int],
    taxonomy: Taxonomy,
) -> Sample:
    """Read an image with its label map, check them, and map stored ids to train ids.

    The image is taken as stored, whatever its EXIF orientation, unless only the upright image has the label
    map's size: then the labels were drawn on that.

    Args:
        image_path: The picture.
        label_path: Palette or 8-bit grey PNG of stored ids.
        label_map: Train id by stored id.
        allowed: Stored ids that the data set defines, ignored ones included.
        taxonomy: The data set's classes; its name stands in messages.

    Returns:
        The sample in train ids.

    Shape:
        - label_map: (256,) uint8
        - returns.image: (H, W, 3) uint8 RGB
        - returns.target: (H, W) uint8 train ids in [0, K) or 255 (ignored)

    Raises:
        DataError: E-DATA-014 for ids that are not allowed, E-DATA-017 for sizes that differ, and the errors
            of `read_image` and `read_labels`.
    """
    labels = read_labels(label_path)
    image = read_image(image_path, exif="ignore")
    height, width = image.shape[:2]
    if labels.shape == (width, height) and height != width:
        image = read_image(image_path, exif="apply")
    if labels.shape != image.shape[:2]:
        raise DataError(
            "E-DATA-017",
            f"label map of {labels.shape[0]}x{labels.shape[1]}, but {image_path} is {height}x{width}",
            fix="restore the original pair; never resize a label map to fit",
            path=label_path,
        )
    # Deleting the allowed ids leaves the others: four times as fast as counting, which only an error needs.
    if labels.tobytes().translate(None, bytes(allowed)):
        raise _label_value_error(labels, label_path, allowed=allowed, taxonomy=taxonomy)
    return Sample(image=image, target=np.asarray(cv2.LUT(labels, label_map), np.uint8))


def make_label_map(train_ids: Mapping[int, int]) -> NDArray[np.uint8]:
    """Build the look-up table from stored ids to train ids; every id not given is ignored.

    Args:
        train_ids: Train id by stored id.

    Shape:
        - returns: (256,) uint8, read-only

    Example:
        >>> make_label_map({7: 0, 8: 1})[[0, 7, 8]].tolist()
        [255, 0, 1]
    """
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[list(train_ids)] = list(train_ids.values())
    table.flags.writeable = False
    return table


def find_layout(root: Path, *, inside: Sequence[str], expected: Mapping[str, str], dataset: str) -> Path:
    """Find the folder that holds a data set's layout.

    Args:
        root: The folder that the user named.
        inside: Folders to look into, relative to ``root``, in this order; ``"."`` is ``root`` itself.
        expected: Files and folders of the layout, relative to the folder sought, and where each comes from.
        dataset: The data set's name, for messages.

    Returns:
        The first folder of ``inside`` that holds everything expected.

    Raises:
        LayoutError: E-DATA-020, with what was expected, what is missing, what is there, and what to do.
    """
    candidates = [root / folder for folder in inside]
    for candidate in candidates:
        if not _missing(candidate, expected):
            return candidate
    # The folder that holds most of the layout is the one to report on.
    best = min(candidates, key=lambda candidate: len(_missing(candidate, expected)))
    missing = _missing(best, expected)
    error = LayoutError(
        _NO_LAYOUT,
        f"no {dataset} layout; expected: {', '.join(expected)}; missing: {', '.join(missing)}; "
        f"found: {_describe_folder(best)}",
        fix=_layout_fix(root, inside=inside, expected=expected, missing=missing),
        path=best,
    )
    error.expected, error.missing = tuple(expected), tuple(missing)
    raise error


def list_files(folder: Path, *, suffixes: Sequence[str], ending: str = "") -> dict[str, list[Path]]:
    """List the files of a folder by stem, in order of their names: one a stem, or `match_pairs` refuses them.

    Hidden files are left out; among them are the shadow files that macOS writes beside real ones.

    Args:
        folder: The folder.
        suffixes: Suffixes to take, lower case; files may have them in any case.
        ending: What the stem must end with; it is cut off.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and path.stem.endswith(ending):
            files.setdefault(path.stem.removesuffix(ending), []).append(path)
    return files


def match_pairs(
    names: Iterable[str],
    images: Mapping[str, Sequence[Path]],
    labels: Mapping[str, Sequence[Path]],
    *,
    folder: Path,
    causes: Sequence[DataError] = (),
) -> list[Pair]:
    """Look up the image and the label map of every sample.

    Args:
        names: The samples, in order.
        images: Image files by stem; others than the named ones may be among them.
        labels: Label files by stem, likewise.
        folder: Where they are, for messages.
        causes: What was found wrong with the names themselves; raised here, so that one pass finds everything.

    Returns:
        The pairs, in order of ``names``.

    Raises:
        PairsError: The first of ``causes``, or E-DATA-023, naming all files of one stem, or all samples without
            image and all without label map.
    """
    samples = tuple(SampleFiles(name, _first(images, name), _first(labels, name)) for name in names)
    repeated = tuple(tuple(paths) for files in (images, labels) for paths in files.values() if len(paths) > 1)
    causes = [*causes, *_word_repeated(repeated), *_word_incomplete(samples, folder)]
    if causes:
        first = causes[0]
        error = PairsError(first.code, first.reason, fix=first.fix, path=first.path)
        error.causes, error.samples, error.repeated = tuple(causes), samples, repeated
        raise error
    return [Pair(name, image, label) for name, image, label in samples if image and label]


def match_images(
    names: Iterable[str], images: Mapping[str, Sequence[Path]], *, folder: Path, causes: Sequence[DataError] = ()
) -> dict[str, Path]:
    """Look up the image of every sample of a split without labels; arguments as `match_pairs`.

    Returns:
        The images by name, in order of ``names``.

    Raises:
        DataError: The first of ``causes``, or E-DATA-023, naming all files of one stem, or all samples without image.
    """
    wanted = list(names)
    missing = [name for name in wanted if name not in images]
    repeated = [paths for paths in images.values() if len(paths) > 1]
    causes = [*causes, *_word_repeated(repeated)]
    if missing:
        causes.append(_not_whole(f"no image for {_enumerate(missing, 'sample')}", folder))
    if causes:
        raise causes[0]
    return {name: images[name][0] for name in wanted}


def _first(files: Mapping[str, Sequence[Path]], name: str) -> Path | None:
    return files[name][0] if name in files else None


def _word_repeated(repeated: Iterable[Sequence[Path]]) -> list[DataError]:
    """Word what shares a stem, one error a folder."""
    by_folder: dict[Path, list[str]] = {}
    for paths in repeated:
        by_folder.setdefault(paths[0].parent, []).append(" and ".join(path.name for path in paths))
    return [
        DataError(
            "E-DATA-023",
            f"{_enumerate(stems, 'stem')} given twice",
            fix="keep one file of each name",
            path=folder,
        )
        for folder, stems in by_folder.items()
    ]


def _word_incomplete(samples: Sequence[SampleFiles], folder: Path) -> list[DataError]:
    """Word what is not there, in one error at most."""
    problems = []
    if without_label := [sample.name for sample in samples if sample.label is None]:
        problems.append(f"no label map for {_enumerate(without_label, 'sample')}")
    if without_image := [sample.name for sample in samples if sample.image is None]:
        problems.append(f"no image for {_enumerate(without_image, 'sample')}")
    return [_not_whole("; ".join(problems), folder)] if problems else []


def _not_whole(reason: str, folder: Path) -> DataError:
    return DataError(
        "E-DATA-023",
        reason,
        fix="unpack the archives again, or remove the samples that are not whole",
        path=folder,
    )


def _label_value_error(
    labels: NDArray[np.uint8], path: str | Path, *, allowed: Set[int], taxonomy: Taxonomy
) -> DataError:
    counts = np.bincount(labels.ravel(), minlength=256)
    wrong = [value for value in range(256) if counts[value] and value not in allowed]
    shown = ", ".join(f"{value} ({counts[value]:,} pixels)" for value in wrong[:10])
    more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
    fix = f"use the label map of {taxonomy.name} as published, not resized, recoloured or renumbered"
    if wrong == [taxonomy.num_classes] and not counts[0]:
        fix = "subtract 1 from every id: they look 1-based"
    return DataError(
        "E-DATA-014",
        f"label value {shown}{more}; allowed in {taxonomy.name}: {_as_ranges(allowed)}",
        fix=fix,
        path=path,
    )


def _as_ranges(values: Iterable[int]) -> str:
    """Word a set of numbers: {0, 1, 2, 255} as ``"0-2, 255"``."""
    runs: list[list[int]] = []
    for value in sorted(values):
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _enumerate(names: Sequence[str], noun: str) -> str:
    """Word a list of any length: its count and its first ten."""
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return f"{len(names):,} {noun}{'' if len(names) == 1 else 's'} ({', '.join(names[:10])}{more})"


def _missing(folder: Path, expected: Iterable[str]) -> list[str]:
    return [entry for entry in expected if not _is_there(folder / entry)]


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # inside a folder that is closed to us, such as lost+found
        return False


def _describe_folder(folder: Path) -> str:
    """Word what is at the top of a folder."""
    if not folder.exists():
        return "no such folder"
    if not folder.is_dir():
        return "a file, not a folder"
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    if not names:
        return "an empty folder"
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more


def _layout_fix(root: Path, *, inside: Sequence[str], expected: Mapping[str, str], missing: Sequence[str]) -> str:
    """Say what to do about a layout that was not found."""
    # One level down and one level up are where people point by mistake.
    children = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    for folder in [*children, root.absolute().parent]:
        if any(not _missing(folder / prefix, expected) for prefix in inside):
            return f"pass {folder}, which holds the layout"
    if len(missing) < len(expected):
        return "fetch what is missing: " + ", ".join(dict.fromkeys(expected[entry] for entry in missing))
    return "pass the folder that holds these, from " + ", ".join(dict.fromkeys(expected.values()))
