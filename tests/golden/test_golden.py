"""Did numerics move? What 30 steps see and lose on the processor, against the committed values.

The pictures are drawn here by integer arithmetic, so that no change of a data set's art moves the numbers. All else is
what `nestseg train` runs: augmentation, order of samples, network, loss, optimiser, schedule.

Losses are computed in float64, on pixels that are cropped and flipped only. In float32 they cannot tell a change from
rounding: the same code with and without oneDNN, on one machine, differs by 0.7 % within 30 steps, and so it does when
weight decay goes from 5e-4 to 4e-4. In float64 two instruction sets agree to 1e-12. Weights are drawn in float64 too,
since torch's float32 normals differ in the last bit between instruction sets, and nothing is dropped, since torch draws
masks by another generator where there is no MKL. What resize and photometric distortion give is compared apart, by the
mean grey level and the labelled pixels of each batch.

A value that moves on purpose needs a line under *Numerics* in CHANGELOG.md that says why; then write the file again
with ``python tests/golden/test_golden.py --write``.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, final

import cv2
import numpy as np
import pytest
import torch

from nestseg.build import build_model, build_transform
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import IGNORE_INDEX, Batch, Sample
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.loader import BatchPlan, training_batches
from nestseg.engine.job import build_stepper, scheduled_lr
from nestseg.engine.launch import launch
from nestseg.recipe import Recipe
from nestseg.recipes import resolve_recipe

FILE = Path(__file__).with_name("losses.json")
STEPS = 30
RECIPE = "deeplabv3plus_resnest14-d32_toystreets"  # for its eight classes; its pictures are not read
OVERRIDES = (
    "seed=0",
    "head.channels=16",
    "head.dropout=0.0",
    "auxiliary_head.channels=16",
    "data.batch_size=4",
    "data.crop_size=[64, 64]",
    "data.num_workers=0",
    "augmentation.base_size=[64, 96]",
    "optimizer.lr=0.02",
    "evaluation.every_steps=null",
    f"schedule.max_steps={STEPS}",
)
NO_FLOAT_ON_PIXELS = ("augmentation.scale_range=[1.0, 1.0]", "augmentation.photometric=null")
TOLERANCE = {"image_mean": 1e-3, "labelled_pixels": 0.0, "loss": 1e-6, "auxiliary_loss": 1e-6}


@final
class Stripes(SegmentationDataset):
    """Ten pictures of slanted stripes, a class and a colour a stripe, with grain; the first rows are ignored."""

    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        name="stripes", classes=tuple("abcdefgh"), palette=tuple((30 * k, 255 - 30 * k, 60) for k in range(8))
    )
    splits: ClassVar[tuple[str, ...]] = ("train",)
    official_counts: ClassVar[Mapping[str, int]] = {"train": 10}

    def __init__(self, root: str | Path | None, split: str) -> None:
        assert root is None
        self.check_split(split)

    def __len__(self) -> int:
        return self.official_counts["train"]

    def name(self, index: int) -> str:
        return f"stripes_{index}"

    def read(self, index: int) -> Sample:
        rows, columns = np.mgrid[:64, :96]
        target = ((rows * (index % 3) + columns * (1 + index % 2) + 11 * index) // 24 % 8).astype(np.uint8)
        grain = (rows * 37 + columns * 101 + index * 53) % 41 - 20
        colours = np.array(self.taxonomy.palette)[target] + grain[:, :, None]
        target[:3] = IGNORE_INDEX
        return Sample(image=np.clip(colours, 0, 255).astype(np.uint8), target=target)


def draw_batches(recipe: Recipe) -> Iterator[Batch]:
    dataset = Stripes(None, "train")
    plan = BatchPlan(num_samples=len(dataset), batch_size=recipe.data.batch_size, seed=recipe.seed)
    return training_batches(dataset, build_transform(recipe, dataset), plan=plan, start=0, stop=STEPS)


def see_batches() -> dict[str, list[float]]:
    """Return what each step sees under the whole augmentation."""
    batches = list(draw_batches(resolve_recipe(RECIPE, OVERRIDES)))
    return {
        "image_mean": [batch.image.double().mean().item() for batch in batches],
        "labelled_pixels": [int((batch.target != IGNORE_INDEX).sum()) for batch in batches],
    }


def run_steps() -> dict[str, list[float]]:
    """Train, and return what each step loses."""
    recipe = resolve_recipe(RECIPE, [*OVERRIDES, *NO_FLOAT_ON_PIXELS])
    fabric = launch("cpu")
    torch.manual_seed(recipe.seed)
    torch.set_default_dtype(torch.float64)
    try:
        segmenter = build_model(recipe)
    finally:
        torch.set_default_dtype(torch.float32)
    stepper = build_stepper(fabric, recipe, segmenter)
    stepper.model.train()
    losses: dict[str, list[float]] = {"loss": [], "auxiliary_loss": []}
    for step, batch in enumerate(draw_batches(recipe)):
        terms = stepper.step(batch, step=step + 1, lr=scheduled_lr(recipe, step=step))
        assert terms.auxiliary is not None
        losses["loss"].append(terms.total.item())
        losses["auxiliary_loss"].append(terms.auxiliary.item())
    return losses


def measure() -> dict[str, list[float]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {**see_batches(), **run_steps()}
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured() -> dict[str, list[float]]:
    return measure()


@pytest.mark.parametrize("name", TOLERANCE)
def test_every_step_gives_what_it_gave(name, committed, measured):
    assert len(measured[name]) == len(committed[name]) == STEPS
    moved = [
        f"step {step}: {value:.8g}, was {before:.8g}"
        for step, (value, before) in enumerate(zip(measured[name], committed[name], strict=True))
        if value != pytest.approx(before, rel=TOLERANCE[name], abs=0)
    ]
    assert not moved, (
        f"{name} moved at {len(moved)} of {STEPS} steps, first at {moved[0]} (torch {torch.__version__} here, the file "
        f"was made with {committed['made_with']}). If that is meant: a line under Numerics in CHANGELOG.md, then "
        "python tests/golden/test_golden.py --write"
    )


def test_the_run_learns_so_that_its_losses_depend_on_every_step(committed):
    losses = committed["loss"]
    assert np.mean(losses[-5:]) < 0.98 * np.mean(losses[:5])


def write() -> None:
    versions = {"torch": torch.__version__, "numpy": np.__version__, "opencv": cv2.__version__}
    values = {"made_with": {**versions, "machine": platform.machine()}, **measure()}
    FILE.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/golden/test_golden.py --write")
    write()
