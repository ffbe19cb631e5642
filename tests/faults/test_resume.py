"""Continuing a run: from any step, past damage, with changes that are said; one process a folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import yaml

from nestseg.core.disk import sha256_of
from nestseg.store.files import write_torch_file

NUM_STEPS = 12
MODEL, STATE, META = "model.safetensors", "state.pt", "meta.json"


@pytest.fixture
def copy_run(make_job, uninterrupted):
    """Make a job whose run was cut off at a step: it has the recipe and the checkpoints up to there."""

    def copy(step: int, *, keep: int = NUM_STEPS + 1, **options):
        job, source = make_job(**options), uninterrupted().job
        for found in source.checkpoints()[: step + 1][-keep:]:
            name = f"checkpoints/step-{found:08d}"
            shutil.copytree(source.run / name, job.run / name)
        text = source.recipe.read_text(encoding="utf-8")
        (job.run / "recipe.yaml").write_text(text, encoding="utf-8")
        if not options:
            job.recipe.write_text(text, encoding="utf-8")
        return job

    return copy


def checkpoint(job, step: int) -> Path:
    return job.run / "checkpoints" / f"step-{step:08d}"


def change_state(folder: Path, change, *, form: int | None = None) -> None:
    """Change what a checkpoint's state holds, and make its hashes those of the new file."""
    state = torch.load(folder / STATE, weights_only=True)
    write_torch_file(folder / STATE, change(state))
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    meta["sha256"][STATE] = sha256_of(folder / STATE)
    if form is not None:
        meta["format"] = form
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")


@pytest.mark.parametrize("step", [pytest.param(n, marks=() if n == 6 else pytest.mark.slow) for n in range(NUM_STEPS)])
def test_resume_at_any_step_ends_with_the_same_bits(copy_run, uninterrupted, step):
    """R9: 3, 6 and 9 are exact ends of epochs, at 5 and 10 there is an evaluation, 11 leaves one step."""
    job = copy_run(step)
    job.finish()
    assert job.fingerprint() == uninterrupted().fingerprint
    steps = [record["step"] for record in job.records() if record["kind"] == "step"]
    assert steps == list(range(step + 1, NUM_STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("last_model", ["missing", "cut"])
def test_resume_after_the_last_checkpoint_writes_the_model_that_was_missing(copy_run, uninterrupted, last_model):
    """R9: the kill came between the last checkpoint and the model."""
    job = copy_run(NUM_STEPS)
    if last_model == "cut":
        content = (uninterrupted().job.run / MODEL).read_bytes()
        (job.run / MODEL).write_bytes(content[: len(content) // 2])
    job.finish()
    assert job.fingerprint() == uninterrupted().fingerprint


def test_resume_of_a_finished_run_changes_nothing(make_job, uninterrupted):
    """R9."""
    job, source = make_job(), uninterrupted().job
    shutil.copytree(source.run, job.run)
    shutil.copy(source.recipe, job.recipe)

    def contents() -> dict[str, str]:
        files = [path for path in job.run.rglob("*") if path.is_file() and path.name != "lock"]
        return {str(path): sha256_of(path) for path in files}

    before = contents()
    ending = job.finish()
    assert contents() == before
    assert "step 1" not in ending.output


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=() if (name, damage) == (STATE, "flip") else pytest.mark.slow)
        for name in (MODEL, STATE, META)
        for damage in ("flip", "cut", "empty", "gone")
    ],
)
def test_damaged_newest_is_named_and_the_run_ends_with_the_same_bits_from_the_older(
    copy_run, uninterrupted, name, damage
):
    """R1."""
    job = copy_run(7)
    file = checkpoint(job, 7) / name
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "flip":
        # of meta.json, a digit of a hash
        content[content.index(b'"sha256"') + 45 if name == META else len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    ending = job.finish()
    assert f"warning: checkpoint {checkpoint(job, 7)} is passed over" in ending.output
    assert "steps 6 to 12" in ending.output
    assert job.fingerprint() == uninterrupted().fingerprint


@pytest.mark.slow
def test_all_checkpoints_damaged_is_an_error_that_leaves_them(copy_run):
    """R2."""
    job = copy_run(2)
    for step in range(3):
        (checkpoint(job, step) / STATE).write_bytes(b"junk")
    for options in (("--resume",), ("--resume", "--allow-fresh")):
        ending = job.train(*options)
        assert ending.code == 1
        assert "all 3 checkpoints are damaged" in ending.output
        assert all(f"{checkpoint(job, step)} is passed over" in ending.output for step in range(3))
    assert job.checkpoints() == [0, 1, 2]


@pytest.mark.slow
def test_only_temporary_files_mean_no_checkpoint_and_a_fresh_start_is_asked_for(copy_run, uninterrupted):
    """R3."""
    job = copy_run(0)
    checkpoint(job, 0).rename(job.run / "checkpoints" / ".tmp-0123456789abcdef")
    ending = job.train("--resume")
    assert ending.code == 1
    assert "no complete checkpoint" in ending.output
    assert "--allow-fresh" in ending.output
    ending = job.train("--resume", "--allow-fresh")
    assert ending.code == 0, ending.output
    assert job.fingerprint() == uninterrupted().fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_resume_with_another_number_of_ranks_goes_on_and_says_so(make_job, before, after):
    """R4."""
    job = make_job(ranks=before)
    group = job.start()
    job.wait_for_checkpoint(4, child=group.first)
    group.kill(workers=True)
    group.wait()
    ending = job.train("--resume", ranks=after)
    assert ending.code == 0, ending.output[-3000:]
    assert f"ranks was {before}, is {after}" in ending.output
    assert job.checkpoints()[-1] == NUM_STEPS


def test_other_loader_workers_are_no_other_recipe(copy_run, uninterrupted):
    """R5."""
    job = copy_run(6, workers=2, checkpoint__every_steps=1, checkpoint__keep=NUM_STEPS + 1)
    ending = job.train("--resume")
    assert ending.code == 0, ending.output[-3000:]
    assert job.fingerprint() == uninterrupted().fingerprint
    assert yaml.safe_load((job.run / "recipe.yaml").read_text(encoding="utf-8"))["data"]["num_workers"] == 2


def test_another_recipe_is_refused_with_its_differences_and_accepted_on_request(copy_run, uninterrupted):
    """R6."""
    job = copy_run(6, optimizer__lr=0.001, checkpoint__every_steps=1, checkpoint__keep=NUM_STEPS + 1)
    ending = job.train("--resume")
    assert ending.code == 1
    assert "now 0.001" in ending.output
    assert job.checkpoints() == list(range(7))
    ending = job.train("--resume", "--accept-changes")
    assert ending.code == 0, ending.output[-3000:]
    assert job.fingerprint() != uninterrupted().fingerprint
    assert yaml.safe_load((job.run / "recipe.yaml").read_text(encoding="utf-8"))["optimizer"]["lr"] == 0.001


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"optimizer__lr": 0.5}, 0),
        ({"head__channels": 8}, 1),
        ({"optimizer__name": "sgd"}, 1),
        ({"ema": None}, 0),
        ({"backbone__name": "timm:test_efficientnet"}, 1),
    ],
)
def test_accepted_change_that_the_checkpoint_cannot_follow_is_an_error(copy_run, change, code):
    """R6."""
    job = copy_run(6, **change)
    ending = job.train("--resume", "--accept-changes")
    assert ending.code == code, ending.output[-3000:]
    if code:
        assert "E-RUN-016" in ending.output or "E-RUN-008" in ending.output
        assert job.checkpoints() == list(range(7))


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    ["optimizer", "generators", "best_mean_iou", "scores", "evaluation_pending", "average", "guard", "scaler"],
)
def test_missing_entry_of_the_state_is_named(copy_run, key):
    """R8."""
    job = copy_run(6)
    change_state(checkpoint(job, 6), lambda state: {name: value for name, value in state.items() if name != key})
    ending = job.train("--resume")
    assert ending.code == 1
    assert f"state.pt has no {key}" in ending.output


@pytest.mark.slow
@pytest.mark.parametrize("place", ["a parameter of the optimizer", "its groups", "an entry of the average", "cpu"])
def test_missing_part_of_an_entry_of_the_state_is_an_error(copy_run, place):
    """R8, one floor down: nothing starts from nothing in silence."""

    def drop(state: dict) -> dict:
        if place == "a parameter of the optimizer":
            del state["optimizer"]["state"][3]
        elif place == "its groups":
            del state["optimizer"]["param_groups"]
        elif place == "cpu":
            del state["generators"][0]["cpu"]
        else:
            inner = next(value for value in (state["average"], *state["average"].values()) if _holds_tensors(value))
            del inner[next(iter(inner))]
        return state

    job = copy_run(6)
    change_state(checkpoint(job, 6), drop)
    ending = job.train("--resume")
    assert ending.code == 1, "resumed without it"
    assert "E-RUN-01" in ending.output


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(item, torch.Tensor) for item in value.values())


@pytest.mark.slow
def test_checkpoint_of_a_newer_format_is_refused(copy_run):
    """R7."""
    job = copy_run(6)
    change_state(checkpoint(job, 6), lambda state: state, form=99)
    ending = job.train("--resume")
    assert ending.code == 1
    assert "E-RUN-014" in ending.output
    assert "format 99" in ending.output


# recipe.yaml of such a run, as 0.1.0 wrote it
RECIPE_OF_0_1_0 = """\
name: deeplabv3plus_resnest14-d32_camvid
seed: 0
segmentor: deeplabv3plus
output_stride: 32
backbone: {name: 'timm:test_resnet', pretrained: none, zero_init_residual: false, dilation_variant: plain,
  norm: batch, frozen_stages: 0}
head: {channels: 16, dropout: 0.1, norm: batch, align_corners: false, num_convs: null, concat_input: false,
  pool_scales: null, atrous_rates: null, fusion: null, shortcut_channels: null}
auxiliary_head: {enabled: false, channels: 512, loss_weight: 0.4}
init: {model: null, class_map: {}}
data: {dataset: camvid, spec: null, train_split: train, eval_split: val, batch_size: 4, crop_size: [32, 64],
  rare_class_sampling: null, num_workers: 0, in_channels: 3, image_dtype: uint8, mean: [123.675, 116.28, 103.53],
  std: [58.395, 57.12, 57.375]}
augmentation:
  base_size: [40, 72]
  scale_range: [0.5, 2.0]
  max_class_share: 0.75
  crop_tries: 10
  flip_probability: 0.5
  photometric: {probability: 0.5, brightness: 32.0, contrast: [0.5, 1.5], saturation: [0.5, 1.5], hue: 18}
  padding: centre
  colour_jitter: null
  blur: null
  copy_paste: null
  cut_mix: null
  mix_up: null
  rotation: null
  torchvision: []
  erasing: null
loss: {class_weights: none}
optimizer: {name: adamw, lr: 0.002, momentum: 0.9, weight_decay: 0.0005, nesterov: false, head_lr_multiplier: 1.0,
  decay_norm_and_bias: true}
schedule: {name: poly, power: 0.9, min_lr: 0.0001, warmup_steps: 2, epochs: 200, max_steps: 12}
checkpoint: {every_steps: 2, keep: 9}
evaluation: {base_size: null, logits_resizes: 1, every_steps: 5, max_images: null}
log: {every_steps: 1}
"""


@pytest.mark.slow
def test_run_of_0_1_0_is_continued_with_the_same_bits(make_job):
    """R7: its recipe and its format 1, which had no average, guard, scaler, bad samples or pending evaluation."""
    whole, old = (make_job(name, ema=None, checkpoint__keep=9) for name in ("whole", "old"))
    whole.finish()
    for step in (0, 2, 4, 6):
        shutil.copytree(checkpoint(whole, step), checkpoint(old, step))
    folder = checkpoint(old, 6)
    known = ("optimizer", "generators", "best_mean_iou", "scores")
    change_state(folder, lambda state: {name: state[name] for name in known}, form=1)
    meta = json.loads((folder / META).read_text(encoding="utf-8"))
    meta = {name: meta[name] for name in ("format", "step", "versions", "sha256")}
    (folder / META).write_text(json.dumps(meta), encoding="utf-8")
    for file in (old.recipe, old.run / "recipe.yaml"):
        file.write_text(RECIPE_OF_0_1_0, encoding="utf-8")
    ending = old.finish()
    assert "steps 6 to 12" in ending.output
    assert "warning" not in ending.output, ending.output
    assert old.fingerprint() == whole.fingerprint()


@pytest.mark.slow
def test_clock_that_jumps_back_does_not_change_which_checkpoint_is_the_newest(copy_run, uninterrupted):
    """T28: by files that seem to come from the future, and by a clock that stands two years back."""
    job = copy_run(6)
    for step in range(7):
        os.utime(checkpoint(job, step), (2e9 - step, 2e9 - step))
    back = "import time\nreal = time.time\ntime.time = lambda: real() - 63e6"
    ending = job.train("--resume", prelude=back)
    assert ending.code == 0, ending.output[-3000:]
    assert "steps 6 to 12" in ending.output
    assert job.fingerprint() == uninterrupted().fingerprint


def test_second_run_in_a_folder_names_the_first_and_a_kill_frees_it(make_job, uninterrupted):
    """T26, T27: the loader workers that a kill leaves behind do not hold the folder."""
    job = make_job(workers=2)
    group = job.start()
    job.wait_for_checkpoint(2, child=group.first)
    group.first.signal(signal.SIGSTOP)
    stale = job.run / "checkpoints" / ".tmp-00000000000000000000000000000000"
    stale.mkdir()
    (stale / STATE).write_bytes(b"half")
    for options in ((), ("--resume",)):
        ending = job.train(*options)
        assert ending.code == 1
        holder = f"pid {group.first.pid} on {socket.gethostname()} since {time.strftime('%Y-')}"
        assert holder in ending.output
        assert "E-RUN-007" in ending.output
    assert stale.exists(), "another process's files were deleted"
    group.kill(workers=False)
    assert group.wait().code == -9
    job.finish()
    assert not stale.exists()
    assert job.fingerprint() == uninterrupted().fingerprint


@pytest.mark.slow
def test_record_that_a_kill_tore_does_not_spoil_the_next(copy_run, uninterrupted):
    """T1: half a line at the end of the log."""
    job = copy_run(6)
    (job.run / "log.jsonl").write_text('{"kind": "step", "time": "2025-01-01T00:00:00+00:00", "step": 7, "los')
    job.finish()
    lines = (job.run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    torn = []
    for line in lines:
        try:
            json.loads(line)
        except ValueError:
            torn.append(line)
    assert len(torn) <= 1, torn
    steps = [json.loads(line).get("step") for line in lines if line not in torn and '"kind": "step"' in line]
    assert steps == list(range(7, NUM_STEPS + 1))
