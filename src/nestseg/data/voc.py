"""PASCAL VOC 2012 with the augmented training labels of SBD."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import ClassVar, final

from nestseg.core.errors import DataError
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import IGNORE_INDEX
from nestseg.data.dataset import (
    FileDataset,
    Pair,
    UnlabelledSplit,
    find_layout,
    list_files,
    make_label_map,
    match_images,
    match_pairs,
)

TAXONOMY = Taxonomy(
    name="voc",
    classes=(
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus"),
        *("car", "cat", "chair", "cow", "diningtable", "dog", "horse"),
        *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    ),
    palette=(
        *((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128)),
        *((128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128)),
        *((192, 0, 128), (64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0)),
        *((128, 192, 0), (0, 64, 128)),
    ),
)

_DEVKIT = "VOCtrainval_11-May-2012.tar"
_AUGMENTED = "SegmentationClassAug.zip (SBD labels as VOC ids)"
_TEST = "VOC2012test.tar"
_INSIDE = (".", "VOC2012", "VOCdevkit/VOC2012")


def _find_test_images(root: Path) -> dict[str, Path]:
    list_file = "ImageSets/Segmentation/test.txt"
    expected = {"JPEGImages": _TEST, list_file: _TEST}
    folder = find_layout(root, inside=_INSIDE, expected=expected, dataset="VOC 2012")
    names, causes = _read_names(folder / list_file)
    images = list_files(folder / "JPEGImages", suffixes=(".jpg",))
    return match_images(names, images, folder=folder / list_file, causes=causes)


@final
class VOC(FileDataset):
    """PASCAL VOC 2012 segmentation: 21 classes, 255 (object borders) ignored.

    Labels of ``train`` and ``val`` are in ``SegmentationClass``, of ``trainaug`` in ``SegmentationClassAug``.
    The lists in ``ImageSets/Segmentation`` decide what is in a split and in which order.

    Args:
        root: ``VOC2012`` itself, ``VOCdevkit``, or the folder that holds ``VOCdevkit``.
        split: ``"train"``, ``"trainaug"`` or ``"val"``; ``"test"`` has no labels.

    Raises:
        DataError: E-DATA-020 to E-DATA-024.

    Reference:
        Everingham et al., The PASCAL Visual Object Classes Challenge 2012.
        Hariharan et al., Semantic Contours from Inverse Detectors, ICCV 2011 (the augmented labels).
    """

    taxonomy = TAXONOMY
    splits = ("train", "trainaug", "val")
    unlabelled_splits: ClassVar[Mapping[str, UnlabelledSplit]] = {"test": UnlabelledSplit(_find_test_images, 1456)}
    terms = "Flickr terms of use; research (PASCAL VOC 2012)"
    official_counts: ClassVar[Mapping[str, int]] = {"train": 1464, "trainaug": 10582, "val": 1449}
    label_map = make_label_map({value: value for value in range(21)})
    label_values = frozenset({*range(21), IGNORE_INDEX})

    def _find_pairs(self, root: Path) -> Iterable[Pair]:
        label_folder = "SegmentationClassAug" if self.split == "trainaug" else "SegmentationClass"
        list_file = f"ImageSets/Segmentation/{self.split}.txt"
        origin = _AUGMENTED if self.split == "trainaug" else _DEVKIT
        folder = find_layout(
            root,
            inside=_INSIDE,
            expected={"JPEGImages": _DEVKIT, label_folder: origin, list_file: origin},
            dataset="VOC 2012",
        )
        names, causes = _read_names(folder / list_file)
        return match_pairs(
            names,
            list_files(folder / "JPEGImages", suffixes=(".jpg",)),
            list_files(folder / label_folder, suffixes=(".png",)),
            folder=folder / list_file,
            causes=causes,
        )


def _read_names(path: Path) -> tuple[list[str], list[DataError]]:
    """Read the names of a split: one a line, or, as some distributions have it, two paths a line.

    Only the stem of a path counts. Blank lines, surrounding blanks and Windows line ends are accepted.

    Returns:
        The names, and E-DATA-024 where lines hold something else or a name that was there before.
    """
    # a pipe would block the reader for ever
    if not path.is_file():
        raise DataError("E-DATA-024", "not a regular file", fix="put the list of the split there", path=path)
    first_line: dict[str, int] = {}
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        stems = {PurePosixPath(entry.replace("\\", "/")).stem for entry in line.split()}
        if len(stems) > 1:
            problems.append(f"line {number}: names of image and label map differ: {line.strip()!r}")
            continue
        for name in stems:
            if name in first_line:
                problems.append(f"line {number}: {name} is in line {first_line[name]} already")
            first_line.setdefault(name, number)
    if not problems:
        return list(first_line), []
    more = f"; and {len(problems) - 10:,} more" if len(problems) > 10 else ""
    return list(first_line), [
        DataError(
            "E-DATA-024",
            "; ".join(problems[:10]) + more,
            fix="give each sample one line that holds its name, such as 2007_000032",
            path=path,
        )
    ]
