"""Checkpoints: found by their hashes, rotated only once the new one is good."""

from __future__ import annotations

import pytest
import torch

from nestseg.build import describe_model
from nestseg.core.errors import RunError
from nestseg.engine.checkpoint import (
    META_FILE,
    MODEL_FILE,
    STATE_FILE,
    BadCheckpointWarning,
    checkpoint_folder,
    find_damage,
    load_latest,
    save_checkpoint,
)
from nestseg.recipes import named_recipe


def save(run, step: int, *, keep: int = 3) -> None:
    model = {"weight": torch.full((3, 2), float(step))}
    state = {
        **dict.fromkeys(("generators", "scores", "evaluation_pending", "average", "guard", "scaler", "bad_samples")),
        "optimizer": {"momentum": torch.ones(2) * step},
        "best_mean_iou": step / 100,
    }
    metadata = describe_model(named_recipe("fcn_resnest14-d16_voc"), step=step)
    save_checkpoint(run, model, state=state, metadata=metadata, environment={}, keep=keep)


def test_newest_is_read_back_as_it_was(tmp_path):
    for step in (0, 10, 9):
        save(tmp_path, step)
    checkpoint = load_latest(tmp_path)
    assert checkpoint.step == 10
    assert torch.equal(checkpoint.model["weight"], torch.full((3, 2), 10.0))
    assert torch.equal(checkpoint.state["optimizer"]["momentum"], torch.ones(2) * 10)
    assert checkpoint.state["best_mean_iou"] == 0.1


def test_rotation_keeps_the_newest_and_leaves_no_temporary(tmp_path):
    for step in range(5):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_damaged_newer_ones_do_not_push_good_ones_out(tmp_path):
    for step in (1, 3):
        save(tmp_path, step)
    (checkpoint_folder(tmp_path, 3) / STATE_FILE).write_bytes(b"junk")
    save(tmp_path, 2, keep=1)
    with pytest.warns(BadCheckpointWarning, match="step-00000003"):
        assert load_latest(tmp_path).step == 2
    assert not checkpoint_folder(tmp_path, 1).exists()


@pytest.mark.parametrize("name", [MODEL_FILE, STATE_FILE, META_FILE])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damaged_newest_is_named_and_the_older_one_used(tmp_path, name, damage):
    save(tmp_path, 1)
    save(tmp_path, 2)
    file = checkpoint_folder(tmp_path, 2) / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        # in meta.json the flip must hit a hash: one in the versions would be harmless
        place = content.index(b'"model.safetensors": "') + 25 if name == META_FILE else len(content) // 2
        content[place] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    assert find_damage(file.parent)
    with pytest.warns(BadCheckpointWarning, match="step-00000002"):
        assert load_latest(tmp_path).step == 1


def test_no_good_checkpoint_never_means_a_silent_fresh_start(tmp_path):
    with pytest.raises(RunError, match="no complete checkpoint"):
        load_latest(tmp_path)
    (tmp_path / "checkpoints" / ".tmp-abc").mkdir(parents=True)
    with pytest.raises(RunError, match="no complete checkpoint"):
        load_latest(tmp_path)
    save(tmp_path, 3)
    (checkpoint_folder(tmp_path, 3) / STATE_FILE).write_bytes(b"junk")
    with pytest.warns(BadCheckpointWarning), pytest.raises(RunError, match="all 1 checkpoints are damaged"):
        load_latest(tmp_path)


def test_failing_disk_leaves_older_checkpoints_alone(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nestseg.store.files.torch.save", full_disk)
    with pytest.raises(RunError, match=r"E-RUN-012 .*No space left.* fix: free space"):
        save(tmp_path, 2, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    assert load_latest(tmp_path).step == 1
