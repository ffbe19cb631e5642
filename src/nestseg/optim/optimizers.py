"""The optimisers of torch that a recipe may name, built from the same few numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from torch import nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from nestseg.core.errors import RecipeError, nearest
from nestseg.optim.groups import group_parameters

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": SGD,
    "adamw": AdamW,
    "adam": Adam,
    "nadam": NAdam,
    "radam": RAdam,
    "adamax": Adamax,
    "adagrad": Adagrad,
    "adadelta": Adadelta,
    "adafactor": Adafactor,
    "rmsprop": RMSprop,
    "asgd": ASGD,
}
"""Optimisers by the name that a recipe gives them."""

FUSED = frozenset({"sgd", "adamw", "adam"})
"""Names whose class updates all parameters in one kernel on a GPU, in every version of torch that is supported."""

_NOT_AN_OPTION = {
    "params": "the parameters are those of the model",
    "lr": "it follows the schedule; set optimizer.lr",
    "momentum": "set optimizer.momentum",
    "nesterov": "set optimizer.nesterov",
    "weight_decay": "it belongs to a group of parameters; set optimizer.weight_decay",
    "maximize": "it would raise the loss",
    "differentiable": "nothing here takes gradients through a step",
    "capturable": "it is for CUDA graphs, which no step is captured in",
    "foreach": "torch chooses it by the device; numbers do not depend on it",
    "fused": "it is chosen by the device",
}
"""Arguments of these classes that are set elsewhere or not at all, with where or why."""


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
    head_lr_multiplier: float = 1.0,
    decay_norm_and_bias: bool = True,
    options: Mapping[str, bool | int | float | tuple[float, ...]] = {},
    fused: bool | None = None,
) -> Optimizer:
    """Build an optimiser over the parameters that are to be trained.

    With ``sgd`` and the defaults this is the published recipe: one parameter group, weight decay on everything.
    Options split the parameters only where they must. Every group carries its ``lr_multiplier``, for `set_lr`.

    Args:
        model: The network; parameters with ``requires_grad`` False are left out.
        name: A key of `OPTIMIZERS`.
        lr: Learning rate of the backbone.
        momentum: Momentum of ``sgd`` and ``rmsprop``; decay of the running mean of gradients, beta1, of classes that
            have betas. The others have no momentum and do not use it.
        weight_decay: L2 penalty added to the gradient; for ``adamw`` and ``adafactor`` decoupled from it, a decay
            that is multiplied by the learning rate.
        nesterov: Whether to use Nesterov's momentum; ``sgd`` only.
        head_lr_multiplier: See `group_parameters`.
        decay_norm_and_bias: See `group_parameters`.
        options: More arguments of the class, such as ``{"eps": 1e-6}``. Betas begin with ``momentum``.
        fused: Whether one kernel updates everything; only names in `FUSED`. None leaves it to torch.

    Returns:
        The optimiser, its parameters in the model's order within each group.

    Raises:
        RecipeError: If there is no such optimiser, or an option that it does not have, or not with that value.
        ModelError: See `group_parameters`.
        ValueError: If ``fused`` is asked of a class that has no such kernel.

    Reference:
        Robbins and Monro, 1951, and Polyak, 1964 (``sgd``); Loshchilov and Hutter, "Decoupled Weight Decay
        Regularization", ICLR 2019, algorithm 2 (``adamw``); the others as their classes in ``torch.optim`` say.

    Deviations:
        As in torch, decoupled decay is multiplied by the learning rate, which the paper keeps apart. ``asgd`` trains
        the weights of its last step; the average that its state holds is not used, `WeightAverage` is for that.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> optimizer = build_optimizer(
        ...     model, name="sgd", lr=0.01, momentum=0.9, weight_decay=5e-4, decay_norm_and_bias=False
        ... )
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.0005), (3, 0.0)]
    """
    if name not in OPTIMIZERS:
        raise RecipeError(
            "E-RECIPE-052",
            f"no optimizer {name}",
            fix=nearest(name, OPTIMIZERS),
            path="optimizer.name",
        )
    if fused is not None and name not in FUSED:
        raise ValueError(f"no fused {name}; allowed: {', '.join(sorted(FUSED))}")
    arguments = _read_options(name, momentum=momentum, nesterov=nesterov, options=options)
    if fused is not None:
        arguments["fused"] = fused
    groups = group_parameters(
        model,
        lr=lr,
        weight_decay=weight_decay,
        head_lr_multiplier=head_lr_multiplier,
        decay_norm_and_bias=decay_norm_and_bias,
    )
    try:
        return OPTIMIZERS[name](groups, lr=lr, **arguments)
    except ValueError as error:
        raise RecipeError(
            "E-RECIPE-056",
            f"torch's {name} refuses its numbers: {' '.join(str(error).split())}",
            fix="change that number",
            path="optimizer",
        ) from error


def _read_options(name: str, *, momentum: float, nesterov: bool, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the class but for parameters, rate and decay."""
    defaults = {key: parameter.default for key, parameter in signature(OPTIMIZERS[name]).parameters.items()}
    allowed = [key for key in defaults if key not in _NOT_AN_OPTION]
    for key, value in options.items():
        path = f"optimizer.options.{key}"
        if key not in defaults:
            raise RecipeError(
                "E-RECIPE-053",
                f"{name} has no such option",
                fix=nearest(key, allowed),
                path=path,
            )
        if key in _NOT_AN_OPTION:
            raise RecipeError(
                "E-RECIPE-053",
                f"this is not an option: {_NOT_AN_OPTION[key]}",
                fix=f"leave it out; {name} has {', '.join(allowed)}",
                path=path,
            )
        if not _is_like(value, defaults[key]):
            raise RecipeError("E-RECIPE-054", f"{value!r}; allowed: {_say(defaults[key])}", fix="change it", path=path)
    arguments = dict(options)
    if "betas" in defaults:
        beta1, beta2 = options.get("betas", (momentum, defaults["betas"][1]))
        if beta1 != momentum:
            raise RecipeError(
                "E-RECIPE-055",
                f"begins with {beta1}, but beta1 is optimizer.momentum, {momentum}",
                fix=f"set optimizer.momentum={beta1} as well, or begin with {momentum}",
                path="optimizer.options.betas",
            )
        arguments["betas"] = (momentum, beta2)
    elif "momentum" in defaults:
        arguments["momentum"] = momentum
    if "nesterov" in defaults:
        arguments["nesterov"] = nesterov
    elif nesterov:
        raise RecipeError(
            "E-RECIPE-057", f"{name} has no Nesterov momentum", fix="leave it at false", path="optimizer.nesterov"
        )
    return arguments


def _is_like(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) == len(default) and all(_is_like(part, 0.0) for part in value)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    return isinstance(value, int | float)


def _say(default: Any) -> str:
    if isinstance(default, tuple):
        return f"{len(default)} numbers"
    return "true or false" if isinstance(default, bool) else "a number"
