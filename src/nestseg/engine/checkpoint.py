"""Checkpoints that are found, not pointed at, and that a kill at any moment cannot tear.

A checkpoint is a folder ``checkpoints/step-00001234`` with ``model.safetensors`` (a model file like any other),
``state.pt`` (optimizer, random state, progress) and ``meta.json`` (sha256 of the two, and what they were made by). It
is written under a temporary name, flushed, and renamed; the newest one whose hashes match is the one to resume from.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
FORMAT = 2
"""Format 1, of 0.1.0, had no average, guard, scaler, environment and pending evaluation; it is read too."""
_SPACE_FACTOR = 1.5
_FIRST_KEYS = ("optimizer", "generators", "best_mean_iou")
_KEYS = (*_FIRST_KEYS, "scores", "evaluation_pending", "average", "guard", "scaler", "bad_samples")


class BadCheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over for an older one."""


class OldCheckpointWarning(UserWarning):
    """A checkpoint that is no longer needed could not be deleted, and takes space."""


class Checkpoint(NamedTuple):
    """A checkpoint read back: ``model`` is a state dict, ``state`` what `save_checkpoint` was given."""

    step: int
    model: dict[str, Tensor]
    state: dict[str, Any]
    environment: dict[str, Any]
    """What it was made by; empty for one of format 1."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def save_checkpoint(
    run: Path,
    model: Mapping[str, Tensor],
    *,
    state: Mapping[str, Any],
    metadata: ModelMetadata,
    environment: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of step ``metadata.step``, verify it, then delete all but the ``keep`` newest.

    Args:
        run: The run folder.
        model: State dict of the model.
        state: Plain values and tensors only; all that a bit-exact continuation needs.
        metadata: Written into the model file.
        environment: What a continuation should find as it was: plain values, written into ``meta.json``.
        keep: How many checkpoints stay, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        RunError: E-RUN-012 if it cannot be written, E-RUN-010 if it does not read back as it was; older checkpoints are
            then left alone.
    """
    final = checkpoint_folder(run, metadata.step)
    temporary = final.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        temporary.mkdir(parents=True)
        _check_space(temporary, needed=int(_SPACE_FACTOR * (_num_bytes(model) + _num_bytes(state))))
        digests = {
            MODEL_FILE: write_model_file(temporary / MODEL_FILE, model, metadata),
            STATE_FILE: write_torch_file(temporary / STATE_FILE, state),
        }
        meta = {
            "format": FORMAT,
            "step": metadata.step,
            "versions": metadata.versions,
            "environment": dict(environment),
            "state": _digest_structure(state),
            "sha256": digests,
        }
        (temporary / META_FILE).write_text(json.dumps(meta, indent=2), encoding="utf-8")
        sync_file(temporary / META_FILE)
        sync_file(temporary)
        if final.exists():
            shutil.rmtree(_old_name(final), ignore_errors=True)
            final.rename(_old_name(final))  # still found, until the new one is in its place
        temporary.rename(final)
        for folder in (final.parent, run):
            sync_file(folder)
        with suppress(PermissionError):  # it may be entered and not read
            sync_file(run.absolute().parent)
    except (OSError, RuntimeError, WeightsError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = error.reason.removeprefix("cannot be written: ") if isinstance(error, WeightsError) else str(error)
        raise RunError(
            "E-RUN-012",
            f"the checkpoint cannot be written: {' '.join(reason.split())[:300]}",
            fix="free space on the disk, or check it; older checkpoints are as they were",
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
    try:
        shutil.rmtree(_old_name(final), ignore_errors=True)
        # newer ones are there if damage made the run go on from an older one; they must not push the good ones out
        for old in [folder for folder in list_checkpoints(run) if folder.name <= final.name][keep:]:
            shutil.rmtree(old)
    except OSError as error:
        warnings.warn(f"an old checkpoint cannot be deleted: {error}", OldCheckpointWarning, stacklevel=2)
    return final


def find_damage(folder: Path) -> str | None:
    """Say what is wrong with a checkpoint, None when every hash matches."""
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        expected = dict(meta["sha256"])
        for name, found in _hash_files(folder).items():
            if found != expected[name]:
                return f"{name} does not have the sha256 that {META_FILE} gives"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def load_latest(run: Path) -> Checkpoint:
    """Read the newest checkpoint whose hashes match.

    Raises:
        RunError: If there is none (a run never starts from the beginning silently), or the newest good one is of a
            newer format, or lacks a part.

    Warns:
        BadCheckpointWarning: For each damaged one that is passed over.
    """
    folders = list_checkpoints(run)
    for folder in folders:
        problem = find_damage(folder)
        if problem is None:
            try:
                return _read(folder)
            except WeightsError as error:
                problem = str(error)
        warnings.warn(f"checkpoint {folder} is passed over: {problem}", BadCheckpointWarning, stacklevel=2)
    reason = f"all {len(folders)} checkpoints are damaged" if folders else "no complete checkpoint"
    fix = "start again in another folder" if folders else "start again in another folder, or add --allow-fresh"
    raise RunError("E-RUN-011", reason, fix=fix, path=run)


def _read(folder: Path) -> Checkpoint:
    meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
    number = meta.get("format")
    if number not in (1, FORMAT):
        raise RunError(
            "E-RUN-014",
            f"a checkpoint of format {number}; this version reads 1 and {FORMAT}",
            fix="continue the run with the version of nestseg that wrote it, which meta.json names",
            path=folder,
        )
    model, metadata = read_model_file(folder / MODEL_FILE)
    state = read_torch_file(folder / STATE_FILE)
    missing = [key for key in (_KEYS if number == FORMAT else _FIRST_KEYS) if key not in state]
    if missing:
        raise RunError(
            "E-RUN-013",
            f"{STATE_FILE} has no {', '.join(missing)}: a continuation would not be exact",
            fix="delete this checkpoint to continue from an older one",
            path=folder,
        )
    if number == FORMAT and meta.get("state") != _digest_structure(state):
        raise RunError(
            "E-RUN-017",
            f"{STATE_FILE} lacks a part that it was written with, or has one more: somebody changed it",
            fix="delete this checkpoint to continue from an older one",
            path=folder,
        )
    return Checkpoint(metadata.step, model, state, meta.get("environment", {}))


def _digest_structure(state: Mapping[str, Any]) -> str:
    """Return eight digits of a hash over names, types and shapes of nested values: what there is, not its value."""

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return [str(value.dtype), *value.shape]
        if isinstance(value, Mapping):
            return {str(name): describe(inner) for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return [describe(inner) for inner in value]
        return type(value).__name__

    text = json.dumps(describe(state), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def clean_up(run: Path) -> None:
    """Delete what killed processes left half written; only for the one that holds the run's lock."""
    for place in (run, run / "checkpoints", run / "evaluation"):
        for path in place.glob(".tmp-*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints, newest step first (by step, since clocks can jump)."""
    folders = (run / "checkpoints").glob("step-*")
    return sorted(folders, key=lambda folder: (folder.stem, not folder.suffix), reverse=True)


def _old_name(folder: Path) -> Path:
    return folder.with_suffix(".old")


def _hash_files(folder: Path) -> dict[str, str]:
    # the two are about as large, and hashing lets other threads run
    names = (MODEL_FILE, STATE_FILE)
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(lambda name: sha256_of(folder / name), names), strict=True))


def _check_space(folder: Path, *, needed: int) -> None:
    """Fail before a file is begun that the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"needs {needed / 1e6:.1f} MB with some room, {free / 1e6:.1f} MB are free")


def _num_bytes(value: object) -> int:
    """Count the bytes of all tensors in nested plain values."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    return sum(map(_num_bytes, value)) if isinstance(value, list | tuple) else 0
