"""The layout of the ResNeSt authors' backbones, which timm's files share key for key.

Our backbone uses the same keys, so that reading is a strict load; only the ImageNet classifier is left out.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from nestseg.weights.files import load_strictly, read_state_dict

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
    load_strictly(
        backbone,
        given,
        path=path,
        fix="check that backbone.name is the network of this file, in the authors' or timm's key layout, "
        "and that backbone.norm is batch or frozen_batch",
    )
