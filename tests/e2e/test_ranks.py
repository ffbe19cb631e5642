"""Two processes train like one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from nestseg.engine.evaluate import evaluate_model
from nestseg.store.files import read_model_file

SETTINGS = (
    # what depends on how a batch is split is switched off, so that only the split itself is tested
    "backbone.norm=frozen_batch",
    "backbone.zero_init_residual=false",
    "head.norm=frozen_batch",
    "head.dropout=0",
    "head.channels=16",
    "data.crop_size=[64, 64]",
    "data.batch_size=4",
    "data.num_workers=0",
    "optimizer.name=sgd",
    "optimizer.lr=0.01",
    "checkpoint.every_steps=2",
    "evaluation.every_steps=4",
    "evaluation.max_images=3",
)


TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "nestseg",
    "--",
]


def train(run: Path, launcher: list[str], *changes: str) -> None:
    options = [word for setting in (*SETTINGS, *changes) for word in ("--set", setting)]
    command = [*launcher, "train", "demo", "--run", str(run), "--max-steps", "4", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    result = subprocess.run([*command, *options], capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def test_two_ranks_end_where_one_does(tmp_path):
    train(tmp_path / "one", [sys.executable, "-m", "nestseg"])
    train(tmp_path / "two", TORCHRUN)
    one, _ = read_model_file(tmp_path / "one" / "model.safetensors")
    two, _ = read_model_file(tmp_path / "two" / "model.safetensors")
    assert one.keys() == two.keys()
    moved = 0
    start, _ = read_model_file(tmp_path / "one" / "checkpoints" / "step-00000002" / "model.safetensors")
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=1e-4, atol=1e-6), name
        moved += int(not torch.equal(value, start[name]))
    assert moved > 50
    scores = [json.loads((tmp_path / run / "evaluation" / "metrics.json").read_text()) for run in ("one", "two")]
    assert scores[0]["num_images"] == scores[1]["num_images"] == 3
    pixels = [sum(map(sum, score["confusion_matrix"])) for score in scores]
    assert pixels[0] == pixels[1] == 3 * 128 * 256


def test_ranks_score_the_model_that_is_saved(tmp_path):
    # on the processor each rank has batch statistics of its own, and those of the first are saved
    norms = ("backbone.norm=batch", "head.norm=batch", "data.batch_size=6", "evaluation.max_images=null")
    train(tmp_path, TORCHRUN, *norms)
    during = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    result = evaluate_model(tmp_path, None, out=tmp_path / "again", device="cpu")
    assert during["confusion_matrix"] == result.confusion.counts[:, :-1].tolist()
