"""Reading and writing weight files: safetensors, and pickles that are checked twice before they are read.

A model file of ours is a safetensors file whose header carries a `ModelMetadata`: with it the file alone is enough to
build the network, to name and colour its classes, and to prepare an image for it.

Whatever a file is called, its first bytes decide how it is read (`nestseg.store.kinds`). A header of safetensors is
checked in `nestseg.store.headers`; a pickle in `nestseg.store.pickles`, and then by ``weights_only=True`` of torch.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nestseg.core.disk import flushed_sha256, replaced_file
from nestseg.core.errors import WeightsError
from nestseg.store.headers import read_header
from nestseg.store.kinds import find_kind, show_text
from nestseg.store.metadata import ModelMetadata
from nestseg.store.pickles import INERT_GLOBALS, check_pickles

METADATA_KEY = "nestseg"

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_TRAINING_STATE = ("optim", "sched", "scaler")
_MAX_PLAIN_VALUES = 100_000
_NUM_SHOWN = 10


class RawCheckpoint(NamedTuple):
    """What a weights file holds, whoever wrote it."""

    state: dict[str, Tensor]
    """Tensors by name, on the CPU."""
    meta: Mapping[str, Any]
    """What stands beside them, plain values only; the entries of a table ``meta`` (mmsegmentation) are among them."""


def write_model_file(path: Path, state: Mapping[str, Tensor], metadata: ModelMetadata) -> str:
    """Write weights and metadata as safetensors, whole or not at all.

    Args:
        path: Where to; an older file there stays until the new one is on disk.
        state: A state dict, any device and dtype.
        metadata: What the weights mean.

    Returns:
        The sha256 of the file.

    Raises:
        WeightsError: If it cannot be written; the older file is then left as it was.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        with replaced_file(path) as temporary:
            save_file(tensors, temporary, metadata={METADATA_KEY: metadata.model_dump_json()})
            return flushed_sha256(temporary)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            "E-WEIGHTS-006",
            f"cannot be written: {' '.join(str(error).split())[:200]}",
            fix="free space on the disk, or choose a folder that exists and is writable",
            path=path,
        ) from error


def read_model_file(path: Path) -> tuple[dict[str, Tensor], ModelMetadata]:
    """Read a model file of ours.

    Raises:
        WeightsError: If the file is missing, damaged, or has no metadata of ours.
    """
    checkpoint = read_checkpoint(path)
    metadata = read_metadata(checkpoint, path=path)
    if metadata is None:
        raise WeightsError(
            "E-WEIGHTS-004",
            "holds weights but not what they mean (no nestseg metadata)",
            fix="pass a model.safetensors that nestseg train wrote",
            path=path,
        )
    return checkpoint.state, metadata


def read_metadata(checkpoint: RawCheckpoint, *, path: Path) -> ModelMetadata | None:
    """Read what the weights mean; None for a file that is not ours.

    Args:
        checkpoint: What `read_checkpoint` returned.
        path: The file that it is from, for messages.

    Raises:
        WeightsError: E-WEIGHTS-005, if there is metadata of ours that is damaged or of another version.
    """
    text = checkpoint.meta.get(METADATA_KEY)
    if text is None:
        return None
    try:
        return ModelMetadata.model_validate_json(str(text))
    except ValidationError as error:
        raise WeightsError(
            "E-WEIGHTS-005",
            f"metadata cannot be read: {' '.join(str(error).split())[:300]}",
            fix="write the file again, or use the version of nestseg that wrote it",
            path=path,
        ) from error


def read_checkpoint(path: Path) -> RawCheckpoint:
    """Read tensors, and what stands beside them, from a safetensors or torch file of anybody.

    A wrapper such as ``{"state_dict": ..., "meta": ...}`` is opened, and a ``module.`` that all names begin with, of
    DataParallel, dropped. Beside the tensors only plain values are kept: text, numbers, None, and lists, tuples and
    tables of these. Training state (optimizers, schedulers) goes, and so do numpy values, which cannot be read safely.

    Args:
        path: A file; its suffix does not matter.

    Raises:
        WeightsError: If the file is missing, damaged, no weights file, would run code, or holds no table of tensors.
    """
    with _named(path):
        if find_kind(path) == "safetensors":
            meta = read_header(path)
            return RawCheckpoint(_take_tensors(load_file(path)), meta)
    values = read_torch_file(path)
    table, beside = values, {}
    if isinstance(values, dict):
        for key in _WRAPPERS:
            if isinstance(values.get(key), dict):
                table, beside = values[key], {name: value for name, value in values.items() if name != key}
                break
    entries = table.items() if isinstance(table, dict) else [("", table)]
    for name, value in entries:
        if not (isinstance(name, str) and name and isinstance(value, Tensor)):
            given = f"{show_text(str(name))} is {type(value).__name__}" if name else f"it holds {type(value).__name__}"
            raise WeightsError(
                "E-WEIGHTS-003", f"not a table of tensors by name: {given}", fix="pass a state dict", path=path
            )
    with _named(path):
        return RawCheckpoint(_take_tensors(table), _keep_plain(beside))


def write_torch_file(path: Path, values: Mapping[str, Any]) -> str:
    """Write a torch pickle of tensors and plain values, whole or not at all; the one place that does.

    Args:
        path: Where to; an older file there stays until the new one is on disk.
        values: What `read_torch_file` gives back.

    Returns:
        The sha256 of the file.

    Raises:
        OSError: If it cannot be written.
        RuntimeError: If it cannot be written; torch makes this of a full disk.
    """
    # an open file: torch names the archive after the path, which may not start with a dot
    with replaced_file(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(dict(values), file)
        return flushed_sha256(temporary)


def read_torch_file(path: Path) -> Any:
    """Read a torch pickle of tensors and plain values; nothing in it can run.

    Numpy scalars and arrays come back as placeholders without a value. numpy's own functions are not let in: with them
    a file can make numpy follow any pointer.

    Raises:
        WeightsError: If the file is damaged or holds anything else.
    """
    with _named(path):
        kind = find_kind(path)
        if kind == "safetensors":
            raise WeightsError(
                "E-WEIGHTS-003", "a safetensors file, where one of torch is read", fix="pass a .pth file", path=path
            )
        check_pickles(path, kind)
        # an open file, since torch goes by the suffix of a path
        with path.open("rb") as file, torch.serialization.safe_globals([(_Inert, name) for name in INERT_GLOBALS]):
            return torch.load(file, map_location="cpu", weights_only=True)


def check_finite(state: Mapping[str, Tensor], *, path: Path) -> None:
    """Refuse weights that hold NaN or infinity.

    Args:
        state: Tensors by name, of any dtype.
        path: The file that they are from, for messages.

    Raises:
        WeightsError: E-WEIGHTS-018; the message counts the values and names the first ten tensors.
    """
    counts = {
        # isfinite does not know float8
        name: int(value.numel() - (value.float() if value.element_size() == 1 else value).isfinite().sum())
        for name, value in state.items()
        if value.is_floating_point() or value.is_complex()
    }
    bad = {name: count for name, count in counts.items() if count}
    if bad:
        raise WeightsError(
            "E-WEIGHTS-018",
            f"{sum(bad.values()):,} values in {len(bad)} of {len(state)} tensors are NaN or infinite",
            fix="take an earlier checkpoint of that run, or fetch the file again",
            path=path,
            table=_align([("name", "values"), *((name, f"{bad[name]:,}") for name in list(bad)[:_NUM_SHOWN])]),
        )


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], *, path: Path, fix: str, may_miss: Sequence[str] = ()
) -> list[str]:
    """Load a state dict, every key and shape of which must fit.

    Files older than torch 0.4.1 have no ``num_batches_tracked``. It counts steps and decides nothing here: where it is
    absent it starts at zero.

    Args:
        module: Changed in place.
        state: Tensors by name.
        path: The file that they are from, for messages.
        fix: What to do where they do not fit.
        may_miss: Names, or beginnings of names such as ``"auxiliary_head."``, that may be absent; a beginning must then
            be absent altogether. The module keeps its own values there.

    Returns:
        The names that were absent because ``may_miss`` allows it.

    Raises:
        WeightsError: E-WEIGHTS-010, if keys or shapes are not those of the module; the message counts them and names
            the first ten of each kind. The module is then as it was.
    """
    wanted = module.state_dict()
    free = tuple(prefix for prefix in may_miss if not any(name.startswith(prefix) for name in state))
    absent = [name for name in wanted if name not in state and name.startswith(free)]
    kept = {name: wanted[name] for name in absent}
    kept |= {
        name: torch.zeros_like(value)
        for name, value in wanted.items()
        if name.endswith("num_batches_tracked") and name not in state and name not in kept
    }
    missing = [(name, "-", _shape(value)) for name, value in wanted.items() if name not in state and name not in kept]
    unexpected = [(name, _shape(value), "-") for name, value in state.items() if name not in wanted]
    reshaped = [
        (name, _shape(state[name]), _shape(value))
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    if missing or unexpected or reshaped:
        counts = ", ".join(f"{len(rows)} {kind}" for kind, rows in kinds.items() if rows)
        rows = [("", "name", "given", "wanted")]
        for kind, differences in kinds.items():
            rows += [(kind, *difference) for difference in differences[:_NUM_SHOWN]]
            if len(differences) > _NUM_SHOWN:
                rows.append((kind, f"... and {len(differences) - _NUM_SHOWN} more", "", ""))
        raise WeightsError(
            "E-WEIGHTS-010", f"does not fit this network: {counts}", fix=fix, path=path, table=_align(rows)
        )
    module.load_state_dict({**state, **kept})
    return absent


class _Inert:
    """Stands for a numpy function or class while a file is read: takes anything and does nothing."""

    def __new__(cls, *_: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


_GONE = object()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes a reader raise into one error that names the file."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        # a damaged pickle can make torch's interpreter raise anything: IndexError, AttributeError, struct.error, ...;
        # its own words for a refused one would advise to switch weights_only off
        refused = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        reason = "a pickle that torch refuses" if refused else show_text(f"{type(error).__name__}: {error}", limit=200)
        raise WeightsError(
            "E-WEIGHTS-002",
            f"cannot be read as weights: {reason}",
            fix="check that it may be read, or fetch it again; a file that needs to run code is refused",
            path=path,
        ) from error


def _take_tensors(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop a common ``module.``, gradients and hooks; refuse tensors that are larger than what is stored of them."""
    for name, value in table.items():
        # a stride of zero makes a terabyte of four bytes, for whoever copies it
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"tensor {name} of shape {tuple(value.shape)} is larger than its stored bytes")
    prefix = "module." if all(name.startswith("module.") for name in table) else ""
    return {name.removeprefix(prefix): value.detach() for name, value in table.items()}


def _keep_plain(beside: Mapping[object, object]) -> dict[str, Any]:
    """Keep the plain values that stand beside the tensors, without the state of the training."""
    left = iter(range(_MAX_PLAIN_VALUES))
    kept = {
        name: _take_plain(value, left)
        for name, value in beside.items()
        if isinstance(name, str) and not any(word in name.lower() for word in _TRAINING_STATE)
    }
    kept = {name: value for name, value in kept.items() if value is not _GONE}
    inner = kept.pop("meta", {})
    return {**kept, **inner} if isinstance(inner, dict) else {**kept, "meta": inner}


def _take_plain(value: object, left: Iterator[int]) -> Any:
    """Copy plain values; a table loses the entries that are not, a list that holds one goes as a whole."""
    if next(left, None) is None:
        # lists that hold one list twice, and that one another, are a few bytes in the file and fill any memory here
        raise ValueError(f"more than {_MAX_PLAIN_VALUES:,} values stand beside the tensors")
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_take_plain(item, left) for item in value]
        if any(item is _GONE for item in items):
            return _GONE
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        pairs = {name: _take_plain(item, left) for name, item in value.items() if isinstance(name, (str, int, float))}
        kept = {name: item for name, item in pairs.items() if item is not _GONE}
        return kept if kept or not value else _GONE
    return _GONE


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lay out rows of equal length in columns, for a terminal."""
    shown = [[show_text(cell, limit=120) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in shown) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown
    ]
