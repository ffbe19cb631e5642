"""Reading and writing weight files: safetensors, and pickles only with ``weights_only=True``.

A model file of ours is a safetensors file whose header carries a `ModelMetadata`: with it the file alone is enough to
build the network, to name and colour its classes, and to prepare an image for it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import safetensors
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nestseg.core.disk import replaced_file
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

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if not len(self.classes) == len(self.palette) == self.architecture.num_classes:
            raise ValueError(
                f"{len(self.classes)} class names and {len(self.palette)} colours "
                f"for a network of {self.architecture.num_classes} classes"
            )
        return self

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

    Raises:
        WeightsError: If it cannot be written; the older file is then left as it was.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        with replaced_file(path) as temporary:
            save_file(tensors, temporary, metadata={METADATA_KEY: metadata.model_dump_json()})
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
    state = read_state_dict(path)
    try:
        if path.suffix != ".safetensors":
            raise _no_metadata(path)
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
        if text is None:
            raise _no_metadata(path)
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


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], *, path: Path, fix: str) -> None:
    """Load a state dict, every key and shape of which must fit.

    Args:
        module: Changed in place.
        state: Tensors by name.
        path: The file that they are from, for messages.
        fix: What to do where they do not fit.

    Raises:
        WeightsError: E-WEIGHTS-010, if keys or shapes are not those of the module; the message counts them and names
            the first ten. The module is then as it was.
    """
    wanted = module.state_dict()
    differences = {
        "missing": [name for name in wanted if name not in state],
        "unexpected": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} for {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in state and state[name].shape != value.shape
        ],
    }
    parts = [
        f"{len(names)} {kind}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
        for kind, names in differences.items()
        if names
    ]
    if parts:
        raise WeightsError("E-WEIGHTS-010", "does not fit this network; " + "; ".join(parts), fix=fix, path=path)
    module.load_state_dict(state)


def read_torch_file(path: Path) -> Any:
    """Read a torch pickle of tensors and plain values; nothing in it can run.

    Raises:
        WeightsError: If the file is damaged or holds anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own words would advise to run whatever is in the file
        raise _unreadable(path, "not a torch file, or one that holds more than tensors and plain values") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception | str) -> WeightsError:
    return WeightsError(
        "E-WEIGHTS-002",
        f"cannot be read as weights: {' '.join(str(error).split())[:200]}",
        fix="fetch the file again; only tensors are read, a file that needs to run code is refused",
        path=path,
    )


def _no_metadata(path: Path) -> WeightsError:
    return WeightsError(
        "E-WEIGHTS-004",
        "holds weights but not what they mean (no nestseg metadata)",
        fix="pass a model.safetensors that nestseg train wrote",
        path=path,
    )
