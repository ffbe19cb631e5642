"""When memory does not suffice (T25)."""

from __future__ import annotations

import pytest
import torch

from nestseg.core.errors import RunError
from nestseg.engine.job import open_job
from nestseg.engine.memory import fit_accumulation, is_out_of_memory
from nestseg.engine.step import Stepper
from nestseg.engine.train import train
from nestseg.recipes import resolve_recipe

TINY = (
    "data.crop_size=[32, 64]",
    "data.batch_size=4",
    "optimizer.lr=0.001",
    "data.num_workers=0",
    "head.channels=8",
    "backbone.norm=frozen_batch",
    "head.norm=frozen_batch",
    "backbone.zero_init_residual=false",
    "evaluation.every_steps=null",
)


def run_out_above(images: int, monkeypatch) -> list[int]:
    """Let the backward pass of more images at once than these fail as a GPU's does; returns what is tried."""
    tried: list[int] = []
    real = Stepper._backward

    def backward(self, batch):
        tried.append(len(batch.image) // self.accumulate_steps)
        if tried[-1] > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, batch)

    monkeypatch.setattr(Stepper, "_backward", backward)
    return tried


def test_the_error_says_what_was_used_and_what_uses_less(tmp_path, monkeypatch):
    run_out_above(3, monkeypatch)
    recipe = resolve_recipe("demo", [*TINY, "schedule.max_steps=4"])
    with pytest.raises(RunError, match=r"E-RUN-023 .*step 1 with 4 images at once; peak \d.*accumulate_steps=2"):
        train(recipe, None, run=tmp_path / "run", device="cpu")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]


def test_parts_are_made_smaller_until_a_step_fits_and_nothing_else_changes(monkeypatch):
    job = open_job(resolve_recipe("demo", TINY), None, run=None, device="cpu")
    before = {name: value.clone() for name, value in job.segmenter.state_dict().items()}
    tried = run_out_above(1, monkeypatch)
    fit_accumulation(job)
    assert tried == [4, 2, 1]
    assert job.stepper.accumulate_steps == job.recipe.compute.accumulate_steps == 4
    assert all(torch.equal(value, before[name]) for name, value in job.segmenter.state_dict().items())


def test_an_image_that_does_not_fit_alone_is_an_error(monkeypatch):
    job = open_job(resolve_recipe("demo", TINY), None, run=None, device="cpu")
    run_out_above(0, monkeypatch)
    with pytest.raises(RunError, match=r"E-RUN-023 .*activation_checkpointing.*data\.crop_size"):
        fit_accumulation(job)


def test_only_a_want_of_memory_is_taken_for_one():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
