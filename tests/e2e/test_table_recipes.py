"""Every row of the table trains, evaluates and predicts on real images of its data set."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nestseg.build import build_model
from nestseg.cli import main
from nestseg.models.segmenter import count_parameters
from nestseg.recipes import LABELLED_VARIANTS, PUBLISHED_MEAN_IOU, named_recipe, parse_name

REAL_DATA = Path(os.environ.get("NESTSEG_REAL_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
ROOTS = {"voc": "voc_mini", "ade20k": "ade20k_mini", "cityscapes": "cityscapes_mini"}
TABLE = (*PUBLISHED_MEAN_IOU, *LABELLED_VARIANTS)
ONE_OF_EACH_SEGMENTOR = (
    "fcn_resnest50-d8_voc",
    "pspnet_resnest50-d16_cityscapes",
    "deeplabv3_resnest101-d8_ade20k",
    "deeplabv3plus_resnest101-d16_voc",
)

MILLIONS_WITH_S101 = {
    "fcn": {"voc": 62.77, "ade20k": 62.90, "cityscapes": 62.76},
    "pspnet": {"voc": 74.04, "ade20k": 74.17, "cityscapes": 74.04},
    "deeplabv3": {"voc": 93.18, "ade20k": 93.31, "cityscapes": 93.18},
    "deeplabv3plus": {"voc": 68.66, "ade20k": 68.79, "cityscapes": 68.65},
}
MILLIONS_BETWEEN_S101_AND_S50 = 20.791776


@pytest.mark.parametrize("name", TABLE)
def test_table_recipe_has_the_parameter_count_of_the_table(name):
    parts = parse_name(name)
    with torch.device("meta"):
        millions = count_parameters(build_model(named_recipe(name))) / 1e6
    if parts.backbone == "resnest50":
        millions += MILLIONS_BETWEEN_S101_AND_S50
    assert millions == pytest.approx(MILLIONS_WITH_S101[parts.segmentor][parts.dataset], abs=0.005)


# the sample of ADE20K has a single training image
@pytest.mark.filterwarnings("ignore::nestseg.data.loader.SmallDatasetWarning")
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"real samples are not at {REAL_DATA}; set NESTSEG_REAL_DATA")
@pytest.mark.parametrize(
    "name", [name if name in ONE_OF_EACH_SEGMENTOR else pytest.param(name, marks=pytest.mark.slow) for name in TABLE]
)
def test_table_recipe_trains_evaluates_and_predicts_on_real_images(name, tmp_path):
    dataset = parse_name(name).dataset
    root = REAL_DATA / ROOTS[dataset]
    run = tmp_path / "run"
    # the network's own numbers stay; what costs minutes on a processor is made small
    small = [
        "backbone.pretrained=none",
        "data.crop_size=[65, 97]",
        "data.batch_size=3",
        "optimizer.lr=0.001",
        "augmentation.base_size=[96, 192]",
    ]
    small += ["data.num_workers=0", "evaluation.base_size=[96, 192]", "evaluation.max_images=1", "checkpoint.keep=1"]
    options = [word for override in small for word in ("--set", override)]
    command = ["train", name, "--data", str(root), "--run", str(run), "--max-steps", "3", "--device", "cpu", *options]
    assert main(command) == 0
    losses = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in losses if record["kind"] == "step"] == [3]
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert metrics["num_images"] == 1
    assert 0 <= metrics["mean_iou"] <= 1
    shutil.rmtree(run / "checkpoints")

    image = next(path for path in sorted(root.rglob("*")) if path.suffix in (".jpg", ".png") and is_photo(path))
    assert main(["predict", str(run), str(image), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    with Image.open(image) as photo, Image.open(tmp_path / "out" / f"{image.stem}.png") as labels:
        assert labels.size == photo.size
        assert labels.mode == "P"
        assert np.asarray(labels).max() < len(metrics["iou_per_class"])
    shutil.rmtree(run)


def is_photo(path: Path) -> bool:
    return any(folder in path.parts for folder in ("JPEGImages", "images", "leftImg8bit"))
