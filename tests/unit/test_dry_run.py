"""The plan of a run says what the run then does, and nothing is written."""

from __future__ import annotations

import json
from contextlib import chdir
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nestseg.build import build_criterion, build_model
from nestseg.core.errors import DataError
from nestseg.engine.checkpoint import list_checkpoints
from nestseg.engine.dry_run import _count_due, _PeakMemory, _rehearse_without_data, dry_run, format_dry_run
from nestseg.engine.train import train
from nestseg.models.segmenter import count_parameters
from nestseg.recipes import resolve_recipe

SMALL = ("head.channels=16", "data.crop_size=[32,64]", "data.num_workers=0", "schedule.max_steps=5")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe():
    return resolve_recipe(
        "demo",
        [
            *SMALL,
            "evaluation.every_steps=2",
            "evaluation.max_images=3",
            "checkpoint.every_steps=3",
            "checkpoint.keep=9",
            "log.every_steps=1",
            "ema.decay=0.9",
        ],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the plan is made."""
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def plan(recipe, folder):
    with chdir(folder):
        return dry_run(recipe, None, device="cpu")


def test_a_plan_says_what_the_run_then_does(recipe, plan, tmp_path):
    train(recipe, None, run=tmp_path / "run", device="cpu")
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    start = next(record for record in records if record["kind"] == "start")
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert plan.max_steps == max(record["step"] for record in records) == 5
    assert plan.images == start["images"]
    assert plan.steps_per_epoch == start["steps_per_epoch"]
    assert sum(part.parameters for part in plan.parts) == start["parameters"] == count_parameters(build_model(recipe))
    assert plan.evaluations == len(evaluations) == 3
    assert {record["num_images"] for record in evaluations} == {plan.evaluation_images} == {3}
    folders = list_checkpoints(tmp_path / "run")
    assert plan.checkpoints == len(folders) == 3
    newest = max(folders, key=lambda folder: folder.name)
    written = sum(file.stat().st_size for file in newest.iterdir())
    assert plan.checkpoint_bytes == pytest.approx(written, rel=0.01)


def test_nothing_is_written(plan, folder):
    assert plan.max_steps == 5
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("checkpointing", [False, True])
def test_predicted_memory_of_a_step_is_what_a_processor_allocates(checkpointing):
    # large enough that what kernels borrow is little beside activations
    crop = "data.crop_size=[128,256]"
    recipe = resolve_recipe("demo", [*SMALL, crop, f"compute.activation_checkpointing={checkpointing}"])
    _, predicted = _rehearse_without_data(recipe, 3)
    model, criterion = build_model(recipe).train(), build_criterion(recipe, device="cpu")
    if checkpointing:
        model.backbone.checkpoint_activations()
    image, target = torch.zeros((3, 3, 128, 256), dtype=torch.uint8), torch.zeros((3, 128, 256), dtype=torch.uint8)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        criterion(model(image), target).total.backward()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    assert predicted == pytest.approx(peak, rel=0.1)


def test_activation_checkpointing_lowers_the_memory_of_a_step_and_adds_work():
    flops, step, plain_flops, plain_step = (
        number
        for checkpointing in (True, False)
        for number in _rehearse_without_data(
            resolve_recipe("fcn_resnest26-d8_voc", [f"compute.activation_checkpointing={checkpointing}"]), 4
        )
    )
    assert step < 0.5 * plain_step
    assert 1.1 * plain_flops < flops < 4 / 3 * plain_flops


def test_work_grows_with_images_and_not_with_devices(recipe, plan):
    assert _rehearse_without_data(recipe, 8)[0] == 2 * _rehearse_without_data(recipe, 4)[0] == 2 * plan.flops
    both = dry_run(recipe, None, device="cpu", devices=2)
    assert both.flops == plan.flops
    assert both.images_at_once == plan.images_at_once // 2
    assert "two images a device" in "".join(both.notes)


def test_more_devices_than_images_are_refused(recipe):
    with pytest.raises(DataError):
        dry_run(recipe, None, device="cpu", devices=3)


def test_peak_memory_counts_tensors_as_long_as_they_live():
    with torch.device("meta"), _PeakMemory() as memory:
        first = torch.empty(1000)
        second = first + 1
        assert memory.peak == 8000
        del first
        third = second + 1  # takes the place of the first
        assert memory.peak == 8000
        _ = second.view(10, 100)  # a view has no memory of its own
        third.mul_(2)
        assert memory.peak == 8000
        _ = third.double()
        assert memory.peak == 16000


@pytest.mark.parametrize(("every", "times"), [(4, 3), (5, 2), (10, 1), (100, 1), (None, 0)])
def test_what_happens_every_so_many_steps_happens_at_the_end_too(every, times):
    assert _count_due(10, every) == times


def test_time_is_that_of_steps_or_of_reading_whichever_is_slower(plan):
    data = plan.recipe.data.model_copy(update={"num_workers": 1})
    plan = replace(plan, max_steps=10, evaluations=2, evaluation_seconds=5.0, step_seconds=(1.0, 2.0, 3.0))
    alone = replace(plan, read_seconds=(1.0, 1.0, 1.0))
    assert alone.seconds == (30, 40, 50)
    assert alone.wait_share == pytest.approx(1 / 3)
    helped = replace(alone, recipe=plan.recipe.model_copy(update={"data": data}))
    assert helped.seconds == (20, 30, 40)
    assert helped.wait_share == 0
    bound = replace(helped, read_seconds=(8.0, 8.0, 8.0))
    assert bound.seconds == (90, 90, 90)
    assert bound.wait_share == pytest.approx(0.75)


def test_a_plan_is_written_a_fact_a_line(plan):
    lines = format_dry_run(plan).splitlines()
    names = [line[:12].strip() for line in lines]
    assert names[:5] == ["recipe", "device", "start", "parameters", "batch"]
    assert {"length", "work", "memory", "disk", "time", "loader"} <= set(names)
    assert any("5 steps, 128 an epoch of 512 images; 3 evaluations of 3 images" in line for line in lines)
