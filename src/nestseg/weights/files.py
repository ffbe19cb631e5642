"""Reading and writing weight files: safetensors, and pickles only with ``weights_only=True``.

A model file of ours is a safetensors file whose header carries a `ModelMetadata`: with it the file alone is enough to
build the network, to name and colour its classes, and to prepare an image for it.
"""

from __future__ import annotations

import json
import os
import pickle
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nestseg.core.errors import WeightsError
from nestseg.core.taxonomy import Colour, Taxonomy

METADATA_KEY = "nestseg"


class Architecture(BaseModel):
    """The arguments of `nestseg.create_model` that built a network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    segmentor: Literal["fcn", "pspnet", "deeplabv3", "deeplabv3plus"]
    backbone: str
    num_classes: int
    output_stride: Literal[8, 16, 32]
    dilation_variant: Literal["plain", "official", "timm"]
    auxiliary: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    backbone_norm: Literal["batch", "frozen_batch", "group"]
    head_norm: Literal["batch", "frozen_batch", "group"]
    frozen_stages: int
    head_channels: int
    auxiliary_channels: int | None
    dropout: float
    align_corners: bool
    concat_input: bool
    pool_scales: tuple[int, ...] | None
    atrous_rates: tuple[int, int, int] | None
    shortcut_channels: int | None


class ModelMetadata(BaseModel):
    """What travels with the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    architecture: Architecture
    dataset: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    base_size: tuple[int, int] | None
    """(short, long) that an image is resized to before the network, keeping its ratio; None leaves it as it is."""
    recipe: dict[str, Any] | None
    """The run's recipe as plain values; None for a model that no recipe of ours made."""
    step: int
    versions: dict[str, str]

    @property
    def taxonomy(self) -> Taxonomy:
        """Names and colours of the classes."""
        return Taxonomy(name=self.dataset, classes=self.classes, palette=self.palette)


def write_model_file(path: Path, state: Mapping[str, Tensor], metadata: ModelMetadata) -> None:
    """Write weights and metadata as safetensors, whole or not at all.

    Args:
        path: Where to; an older file there stays until the new one is on disk.
        state: A state dict, any device and dtype.
        metadata: What the weights mean.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}-{path.name}")
    try:
        save_file(tensors, temporary, metadata={METADATA_KEY: metadata.model_dump_json()})
        sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_file(path.parent)


def read_model_file(path: Path) -> tuple[dict[str, Tensor], ModelMetadata]:
    """Read a model file of ours.

    Raises:
        WeightsError: If the file is missing, damaged, or has no metadata of ours.
    """
    state = read_state_dict(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
        if text is None:
            raise WeightsError(
                "E-WEIGHTS-004",
                "holds weights but not what they mean (no nestseg metadata)",
                fix="pass a model.safetensors that nestseg train wrote",
                path=path,
            )
        return state, ModelMetadata.model_validate_json(text)
    except (safetensors.SafetensorError, ValidationError, json.JSONDecodeError) as error:
        raise WeightsError(
            "E-WEIGHTS-005",
            f"metadata cannot be read: {' '.join(str(error).split())[:300]}",
            fix="write the file again, or use the version of nestseg that wrote it",
            path=path,
        ) from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file or a torch pickle.

    Pickles are read with ``weights_only=True``: nothing in them can run.

    Returns:
        Tensors on the CPU. A ``{"state_dict": ...}`` wrapper is opened, a ``module.`` prefix of DataParallel dropped.

    Raises:
        WeightsError: If the file is missing, damaged, tries to run code, or holds something else than tensors.
    """
    if not path.is_file():
        raise WeightsError("E-WEIGHTS-001", "there is no such file", fix="check the path", path=path)
    if path.suffix != ".safetensors":
        values = read_torch_file(path)
    else:
        try:
            return load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(path, error) from error
    if isinstance(values, Mapping) and isinstance(values.get("state_dict"), Mapping):
        values = values["state_dict"]
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        raise WeightsError("E-WEIGHTS-003", "not a table of tensors by name", fix="pass a state dict", path=path)
    return {str(name).removeprefix("module."): value for name, value in values.items()}


def read_torch_file(path: Path) -> Any:
    """Read a torch pickle of tensors and plain values; nothing in it can run.

    Raises:
        WeightsError: If the file is damaged or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        "E-WEIGHTS-002",
        f"cannot be read as weights: {' '.join(str(error).split())[:200]}",
        fix="fetch the file again; only tensors are read, a file that needs to run code is refused",
        path=path,
    )


def sync_file(path: Path) -> None:
    """Flush a file or folder to the disk, so that a power cut after this call cannot lose it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
