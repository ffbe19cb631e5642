"""The table of data sets. Importing it does not import torch."""

from __future__ import annotations

from pathlib import Path

from nestseg.core.errors import DataError, nearest
from nestseg.data.ade20k import ADE20K
from nestseg.data.camvid import CamVid
from nestseg.data.cityscapes import Cityscapes
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.toystreets import ToyStreets
from nestseg.data.voc import VOC

DATASETS: dict[str, type[SegmentationDataset]] = {
    "voc": VOC,
    "ade20k": ADE20K,
    "cityscapes": Cityscapes,
    "camvid": CamVid,
    "toystreets": ToyStreets,
}


def open_dataset(name: str, root: str | Path | None, split: str) -> SegmentationDataset:
    """Open one split of a data set.

    Args:
        name: A key of `DATASETS`.
        root: The data set's folder, see its class; None for toystreets, which has no files.
        split: One of the class's ``splits``.

    Raises:
        DataError: E-DATA-025 for an unknown name; the errors of the data set's class for folder and split.
    """
    if name not in DATASETS:
        raise DataError(
            "E-DATA-025",
            f"data set {name!r}; allowed: {', '.join(DATASETS)}",
            fix=nearest(name, DATASETS),
        )
    return DATASETS[name](root, split)
