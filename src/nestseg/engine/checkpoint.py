"""Checkpoints that are found, not pointed at, and that a kill at any moment cannot tear.

A checkpoint is a folder ``checkpoints/step-00001234`` with ``model.safetensors`` (a model file like any other),
``state.pt`` (optimizer, random state, progress) and ``meta.json`` (sha256 of the two). It is written under a temporary
name, flushed, and renamed; the newest one whose hashes match is the one to resume from.
"""

from __future__ import annotations

import json
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from nestseg.core.disk import sha256_of, sync_file
from nestseg.core.errors import RunError, WeightsError
from nestseg.store.files import read_model_file, read_torch_file, write_model_file, write_torch_file
from nestseg.store.hub import MODEL_FILE
from nestseg.store.metadata import ModelMetadata

STATE_FILE = "state.pt"
META_FILE = "meta.json"


class BadCheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over for an older one."""


class Checkpoint(NamedTuple):
    """A checkpoint read back: ``model`` is a state dict, ``state`` what `save_checkpoint` was given."""

    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    run: Path, model: Mapping[str, Tensor], *, state: Mapping[str, Any], metadata: ModelMetadata, keep: int
) -> Path:
    """Write the checkpoint of step ``metadata.step``, verify it, then delete all but the ``keep`` newest.

    Args:
        run: The run folder.
        model: State dict of the model.
        state: Plain values and tensors only; all that a bit-exact continuation needs.
        metadata: Written into the model file.
        keep: How many checkpoints stay, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        RunError: If it cannot be written, or does not read back as it was; older checkpoints are then left alone.
        WeightsError: If the model cannot be written, likewise.
    """
    final = checkpoint_folder(run, metadata.step)
    temporary = final.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        write_model_file(temporary / MODEL_FILE, model, metadata)
        write_torch_file(temporary / STATE_FILE, state)
        files = {name: sha256_of(temporary / name) for name in (MODEL_FILE, STATE_FILE)}
        meta = {"format": 1, "step": metadata.step, "versions": metadata.versions, "sha256": files}
        (temporary / META_FILE).write_text(json.dumps(meta, indent=2), encoding="utf-8")
        sync_file(temporary / META_FILE)
        sync_file(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_file(final.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise RunError(
            "E-RUN-012",
            f"the checkpoint cannot be written: {' '.join(str(error).split())[:200]}",
            fix="free space on the disk, then continue with --resume; older checkpoints are as they were",
            path=final,
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    problem = find_damage(final)
    if problem:
        raise RunError(
            "E-RUN-010",
            f"the checkpoint just written is damaged: {problem}",
            fix="check the disk",
            path=final,
        )
    # newer ones are there if damage made the run go on from an older one; they must not push the good ones out
    for old in [folder for folder in _folders(run) if folder.name <= final.name][keep:]:
        shutil.rmtree(old)
    return final


def find_damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, None when every hash matches."""
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        expected = dict(meta["sha256"])
        for name in (MODEL_FILE, STATE_FILE):
            if sha256_of(folder / name) != expected[name]:
                return f"{name} does not have the sha256 that {META_FILE} gives"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_latest(run: Path) -> Checkpoint:
    """Read the newest checkpoint whose hashes match.

    Raises:
        RunError: If there is none; a run never starts from the beginning silently.

    Warns:
        BadCheckpointWarning: For each damaged one that is passed over.
    """
    folders = _folders(run)
    for folder in folders:
        problem = find_damage(folder)
        if problem is None:
            try:
                model, metadata = read_model_file(folder / MODEL_FILE)
                return Checkpoint(metadata.step, model, read_torch_file(folder / STATE_FILE))
            except WeightsError as error:
                problem = str(error)
        warnings.warn(f"checkpoint {folder} is passed over: {problem}", BadCheckpointWarning, stacklevel=2)
    reason = f"all {len(folders)} checkpoints are damaged" if folders else "no complete checkpoint"
    raise RunError("E-RUN-011", reason, fix="start again in another folder", path=run)


def _folders(run: Path) -> list[Path]:
    """Complete checkpoints, newest step first (by step, since clocks can jump)."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)
