"""The layout of the ResNeSt authors' backbones, which timm's files share key for key.

Our backbone uses the same keys, so that reading is a strict load; only the ImageNet classifier is left out.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from nestseg.core.errors import WeightsError
from nestseg.weights.files import read_state_dict

CLASSIFIER_KEYS = frozenset({"fc.weight", "fc.bias"})


def load_official_backbone(backbone: nn.Module, path: Path) -> None:
    """Load an official or timm ResNeSt state dict into a backbone, strictly.

    Args:
        backbone: A `nestseg.models.resnest.ResNeSt`; changed in place.
        path: A ``.pth`` or ``.safetensors`` file.

    Raises:
        WeightsError: If the file cannot be read, or its keys or shapes are not those of this backbone; the message
            counts them and names the first ten.
    """
    given = {name: value for name, value in read_state_dict(path).items() if name not in CLASSIFIER_KEYS}
    wanted = backbone.state_dict()
    # files older than torch 0.4.1 have no batch counters; they count steps, decide nothing here, and start at zero
    given |= {
        name: value for name, value in wanted.items() if name.endswith("num_batches_tracked") and name not in given
    }
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted]
    reshaped = [
        f"{name} {tuple(given[name].shape)} for {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    if missing or unexpected or reshaped:
        parts = [
            f"{len(names)} {kind}: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
            for kind, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", reshaped),
            )
            if names
        ]
        raise WeightsError(
            "E-WEIGHTS-010",
            "does not fit this backbone; " + "; ".join(parts),
            fix="check that backbone.name is the network of this file, in the authors' or timm's key layout",
            path=path,
        )
    backbone.load_state_dict(given)
