"""Cityscapes with fine annotations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, final

import numpy as np
from numpy.typing import NDArray

from nestseg.core.image_io import read_image
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
    name="cityscapes",
    classes=(
        *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light"),
        *("traffic sign", "vegetation", "terrain", "sky", "person", "rider"),
        *("car", "truck", "bus", "train", "motorcycle", "bicycle"),
    ),
    palette=(
        *((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153)),
        *((250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60)),
        *((255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
    ),
)

_LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The label id of each train id."""

TRAIN_ID_TO_LABEL_ID = np.zeros(256, np.uint8)
"""(256,) uint8: label id, as submissions hold it, by train id; 0 ("unlabeled") for ids without a class."""
TRAIN_ID_TO_LABEL_ID[: len(_LABEL_IDS)] = _LABEL_IDS
TRAIN_ID_TO_LABEL_ID.flags.writeable = False

_IMAGES = "leftImg8bit_trainvaltest.zip"


def _find_test_images(root: Path) -> dict[str, Path]:
    # gtFine/test holds maps too, in which everything is ignored
    folder = "leftImg8bit/test"
    base = find_layout(root, inside=(".",), expected={folder: _IMAGES}, dataset="Cityscapes")
    images = _list_cities(base / folder, ending="_leftImg8bit")
    return match_images(sorted(images), images, folder=base)


@final
class Cityscapes(FileDataset):
    """Cityscapes: 19 of the 34 label ids are classes, the others and 255 (id -1 in 8 bits) are ignored.

    Read are the ``labelIds`` maps, which the archives hold; ``labelTrainIds`` maps are not needed.

    Args:
        root: The folder that holds ``leftImg8bit`` and ``gtFine``.
        split: ``"train"`` or ``"val"``; ``"test"`` has no labels.

    Raises:
        DataError: E-DATA-020 to E-DATA-023.

    Reference:
        Cordts et al., The Cityscapes Dataset for Semantic Urban Scene Understanding, CVPR 2016.
    """

    taxonomy = TAXONOMY
    splits = ("train", "val")
    unlabelled_splits: ClassVar[Mapping[str, UnlabelledSplit]] = {"test": UnlabelledSplit(_find_test_images, 1525)}
    terms = "non-commercial use, after registration (Cityscapes)"
    official_counts: ClassVar[Mapping[str, int]] = {"train": 2975, "val": 500}
    label_map = make_label_map({label_id: train_id for train_id, label_id in enumerate(_LABEL_IDS)})
    label_values = frozenset({*range(34), IGNORE_INDEX})

    def read_instances(self, index: int) -> NDArray[np.uint16] | None:
        """Read the instances of one sample's ground truth, which scores of instances need and nothing else.

        Args:
            index: 0 to ``len(self) - 1``.

        Returns:
            Label id * 1000 + number for pixels of an instance, below 1000 for the others. None if there is no
            ``instanceIds`` map beside the label map.

        Shape:
            - returns: (H, W) uint16

        Raises:
            DataError: If the map is damaged or not of 16 bits; E-DATA-115 in a split without labels.
        """
        path = self.find_instances(index)
        return read_image(path, channels=1, dtype="uint16", exif="ignore")[:, :, 0] if path.exists() else None

    def find_instances(self, index: int) -> Path:
        """Return where the instances of one sample's ground truth would be; archives without them are whole too.

        Raises:
            DataError: E-DATA-115 in a split without labels.
        """
        label = self.find_pair(index).label
        return label.with_name(label.name.replace("_labelIds", "_instanceIds"))

    def _find_pairs(self, root: Path) -> Iterable[Pair]:
        image_folder, label_folder = f"leftImg8bit/{self.split}", f"gtFine/{self.split}"
        base = find_layout(
            root,
            inside=(".",),
            expected={image_folder: _IMAGES, label_folder: "gtFine_trainvaltest.zip"},
            dataset="Cityscapes",
        )
        images = _list_cities(base / image_folder, ending="_leftImg8bit")
        labels = _list_cities(base / label_folder, ending="_gtFine_labelIds")
        return match_pairs(sorted({*images, *labels}), images, labels, folder=base)


def _list_cities(folder: Path, *, ending: str) -> dict[str, list[Path]]:
    """List the files of all cities by stem; a stem starts with its city, so that none occurs twice."""
    files: dict[str, list[Path]] = {}
    for city in folder.iterdir():
        if city.is_dir():
            files |= list_files(city, suffixes=(".png",), ending=ending)
    return files
