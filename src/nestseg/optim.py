"""The optimiser of the recipes and its learning rate at every step."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from nestseg.core.errors import ModelError, RecipeError


def poly_lr(
    step: int, *, lr: float, max_steps: int, min_lr: float = 1e-4, power: float = 0.9, warmup_steps: int = 0
) -> float:
    """Learning rate of one step in closed form, so that a resumed run cannot drift.

    Args:
        step: Number of optimiser steps already taken, 0 to ``max_steps``.
        lr: Learning rate of step 0.
        max_steps: Number of steps of the whole run; the rate is ``min_lr`` when they are done.
        min_lr: Learning rate at the end.
        power: Exponent of the decay.
        warmup_steps: For this many steps the rate is multiplied by 1/n, 2/n, ... n/n; 0 for none.

    Returns:
        ``(lr - min_lr) * (1 - step / max_steps) ** power + min_lr``, times the warm-up factor.

    Raises:
        RecipeError: If the schedule makes no sense: no steps, a negative rate or power, ``min_lr`` above
            ``lr``, or a warm-up longer than the run.
        ValueError: If ``step`` is not one of the run's steps.

    Reference:
        Chen, Papandreou, Kokkinos, Murphy, Yuille, "DeepLab", TPAMI 2018, section 4.1 ("poly", power 0.9).

    Deviations:
        The paper decays to 0, the published recipes to 1e-4; with ``min_lr=0`` this is the paper's formula.

    Example:
        >>> [round(poly_lr(step, lr=0.01, max_steps=100), 6) for step in (0, 50, 100)]
        [0.01, 0.005405, 0.0001]
    """
    if max_steps < 1 or not 0 <= warmup_steps <= max_steps:
        raise RecipeError(
            "E-RECIPE-050",
            f"{max_steps} steps, {warmup_steps} of them warm-up; allowed: 1 or more, warm-up within the run",
            fix="raise schedule.max_steps or lower schedule.warmup_steps",
        )
    if not 0 <= min_lr <= lr or power < 0:
        raise RecipeError(
            "E-RECIPE-051",
            f"lr {lr}, min_lr {min_lr}, power {power}; allowed: 0 <= min_lr <= lr and power >= 0",
            fix="lower min_lr along with lr",
        )
    if not 0 <= step <= max_steps:
        raise ValueError(f"step {step}; allowed 0 to {max_steps}")
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decay: float = (1 - step / max_steps) ** power
    return warmup * ((lr - min_lr) * decay + min_lr)


def build_sgd(
    model: nn.Module,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    head_lr_multiplier: float = 1.0,
    decay_norm_and_bias: bool = True,
) -> SGD:
    """Build stochastic gradient descent over the parameters that are to be trained.

    With the defaults this is the published recipe: one parameter group, weight decay on everything. Each
    option splits the parameters only where it must. Every group carries its ``lr_multiplier``, for `set_lr`.

    Args:
        model: The network; parameters with ``requires_grad`` False are left out.
        lr: Learning rate of the backbone.
        momentum: Momentum factor.
        weight_decay: L2 penalty.
        nesterov: Whether to use Nesterov's momentum.
        head_lr_multiplier: See `group_parameters`.
        decay_norm_and_bias: See `group_parameters`.

    Returns:
        The optimiser, its parameters in the model's order within each group.

    Raises:
        ModelError: See `group_parameters`.

    Reference:
        Chen et al., "DeepLab", TPAMI 2018, section 4.1 (higher rate for the classifier); He et al., "Bag of
        Tricks for Image Classification", CVPR 2019, section 3.1 (no decay of norms and biases).

    Deviations:
        None known.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> optimizer = build_sgd(model, lr=0.01, momentum=0.9, weight_decay=5e-4, decay_norm_and_bias=False)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.0005), (3, 0.0)]
    """
    groups = group_parameters(
        model,
        lr=lr,
        weight_decay=weight_decay,
        head_lr_multiplier=head_lr_multiplier,
        decay_norm_and_bias=decay_norm_and_bias,
    )
    return SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov)


def build_adamw(
    model: nn.Module,
    *,
    lr: float,
    beta1: float,
    weight_decay: float,
    head_lr_multiplier: float = 1.0,
    decay_norm_and_bias: bool = True,
) -> AdamW:
    """Build Adam with decoupled weight decay over the parameters that are to be trained.

    Args:
        model: The network; parameters with ``requires_grad`` False are left out.
        lr: Learning rate of the backbone.
        beta1: Decay of the running mean of gradients; that of their squares is 0.999.
        weight_decay: Decoupled decay, multiplied by the learning rate.
        head_lr_multiplier: See `group_parameters`.
        decay_norm_and_bias: See `group_parameters`.

    Returns:
        The optimiser, its parameters in the model's order within each group.

    Raises:
        ModelError: See `group_parameters`.

    Reference:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.

    Deviations:
        As in torch, the decay is multiplied by the learning rate, which the paper keeps apart.

    Example:
        >>> build_adamw(nn.Conv2d(3, 8, 3), lr=0.001, beta1=0.9, weight_decay=0.01).defaults["betas"]
        (0.9, 0.999)
    """
    groups = group_parameters(
        model,
        lr=lr,
        weight_decay=weight_decay,
        head_lr_multiplier=head_lr_multiplier,
        decay_norm_and_bias=decay_norm_and_bias,
    )
    return AdamW(groups, lr=lr, betas=(beta1, 0.999))


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
        optimizer: An optimiser whose groups carry ``lr_multiplier``, as those of `build_sgd` do.
        lr: The rate of a group with multiplier 1.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
