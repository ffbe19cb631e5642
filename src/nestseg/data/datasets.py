"""The table of data sets. Importing it does not import torch."""

from __future__ import annotations

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
