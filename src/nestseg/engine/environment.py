"""What a run was made by, so that a continuation can say what is another now."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from nestseg.build import versions
from nestseg.data.dataset import SegmentationDataset


def describe_environment(dataset: SegmentationDataset, *, device: torch.device, world_size: int) -> dict[str, Any]:
    """Return what decides the bits of a run besides its recipe, as plain values.

    Args:
        dataset: What is trained on; the names of its samples and their order count, not their content.
        device: This rank's.
        world_size: Number of ranks.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        **versions(),
        "code": code_digest(),
        "data": data_digest(dataset),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "ranks": world_size,
    }


def compare_environments(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what has changed, one line each; what only one of the two knows is left out."""
    return [
        f"{name} was {before[name]}, is {now[name]}" for name in before if name in now and before[name] != now[name]
    ]


@cache
def code_digest() -> str:
    """Return eight digits of a hash over this package's source files: they change with any change of the code."""
    folder = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


@cache
def code_commit() -> str | None:
    """Return the commit of this package, ``+changes`` behind it where files differ; None outside a git checkout."""
    folder = Path(__file__).parents[1]

    def git(*words: str) -> str | None:
        try:
            found = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)  # noqa: S603, S607
        except (OSError, subprocess.CalledProcessError):
            return None
        return found.stdout.strip()

    # an installed package may lie inside of somebody else's checkout
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    changed = git("status", "--porcelain", "--untracked-files=no", ".")
    return f"{git('rev-parse', 'HEAD')}{'+changes' if changed else ''}"


def data_digest(dataset: SegmentationDataset) -> str:
    """Return eight digits of a hash over the names of a data set's samples in their order."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        digest.update(dataset.name(index).encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()[:8]
