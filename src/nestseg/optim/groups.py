"""Parameters in groups; the learning rate of all groups at once; going on from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nestseg.core.errors import ModelError


def group_parameters(
    model: nn.Module, *, lr: float, weight_decay: float, head_lr_multiplier: float, decay_norm_and_bias: bool
) -> list[dict[str, Any]]:
    """Split the trainable parameters into as few groups as the options need, in torch's own form.

    Args:
        model: The network; parameters with ``requires_grad`` False are left out.
        lr: Learning rate of the backbone.
        weight_decay: Decay of the parameters that have one.
        head_lr_multiplier: Learning rate of everything outside ``model.backbone``, as a multiple of ``lr``.
        decay_norm_and_bias: Whether weight decay also acts on normalisation weights and on biases, which are
            the parameters with at most one dimension.

    Raises:
        ModelError: If there is nothing to train, or heads are to be trained at another rate than a backbone
            that the model does not have.

    Reference:
        Chen et al., "DeepLab", TPAMI 2018, section 4.1 (higher rate for the classifier); He et al., "Bag of
        Tricks for Image Classification", CVPR 2019, section 3.1 (no decay of norms and biases).
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ModelError("E-MODEL-050", "no parameter of the model is to be trained", fix="unfreeze a part of it")
    has_backbone = any(name.startswith("backbone.") for name, _ in model.named_parameters())
    if head_lr_multiplier != 1.0 and not has_backbone:
        raise ModelError(
            "E-MODEL-051",
            f"head_lr_multiplier {head_lr_multiplier}, but the model has no part named backbone",
            fix="leave head_lr_multiplier at 1",
        )
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        multiplier = 1.0 if name.startswith("backbone.") else head_lr_multiplier
        decay = weight_decay if decay_norm_and_bias or parameter.ndim > 1 else 0.0
        groups.setdefault((multiplier, decay), []).append(parameter)
    return [
        {"params": members, "lr": lr * multiplier, "weight_decay": decay, "lr_multiplier": multiplier}
        for (multiplier, decay), members in groups.items()
    ]


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group to ``lr`` times the group's ``lr_multiplier``.

    Args:
        optimizer: An optimiser whose groups carry ``lr_multiplier``, as those of `build_optimizer` do.
        lr: The rate of a group with multiplier 1.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def load_optimizer_state(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Take over what an optimiser remembers of its parameters, but none of its numbers.

    ``Optimizer.load_state_dict`` also takes decay, momentum and the choice of kernels from the file. A changed recipe
    would be ignored in silence, and a run from a processor would go on without the fused kernels of its GPU.

    Args:
        optimizer: An optimiser of the same class over the same groups of parameters; its numbers stay.
        saved: What ``state_dict`` of the other returned.

    Raises:
        ValueError: If groups are others, or have another number of parameters.
    """
    own_groups = optimizer.param_groups
    groups = [{**own, "params": other["params"]} for own, other in zip(own_groups, saved["param_groups"], strict=True)]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
