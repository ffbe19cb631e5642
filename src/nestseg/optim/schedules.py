"""The learning rate of every step in closed form, so that a resumed run cannot drift."""

from __future__ import annotations

from math import cos, pi
from typing import Literal

from nestseg.core.errors import RecipeError

ScheduleName = Literal["poly", "cosine"]


def learning_rate(
    step: int,
    *,
    name: ScheduleName,
    lr: float,
    max_steps: int,
    min_lr: float = 1e-4,
    power: float = 0.9,
    warmup_steps: int = 0,
) -> float:
    """Return the learning rate of one step by the name of its schedule; ``power`` is read by poly only.

    Other arguments, values and errors are those of `poly_lr` and `cosine_lr`.

    Reference:
        See `poly_lr` and `cosine_lr`.

    Example:
        >>> learning_rate(50, name="cosine", lr=0.01, max_steps=100, min_lr=0.0)
        0.005
    """
    if name == "poly":
        return poly_lr(step, lr=lr, max_steps=max_steps, min_lr=min_lr, power=power, warmup_steps=warmup_steps)
    if name == "cosine":
        return cosine_lr(step, lr=lr, max_steps=max_steps, min_lr=min_lr, warmup_steps=warmup_steps)
    raise RecipeError("E-RECIPE-058", f"no schedule {name}", fix="choose from: poly, cosine", path="schedule.name")


def poly_lr(
    step: int, *, lr: float, max_steps: int, min_lr: float = 1e-4, power: float = 0.9, warmup_steps: int = 0
) -> float:
    """Learning rate of one step that falls by a power of what is left of the run.

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
    _check(step, lr=lr, max_steps=max_steps, min_lr=min_lr, power=power, warmup_steps=warmup_steps)
    decay: float = (1 - step / max_steps) ** power
    return _warm_up(step, warmup_steps) * ((lr - min_lr) * decay + min_lr)


def cosine_lr(step: int, *, lr: float, max_steps: int, min_lr: float = 1e-4, warmup_steps: int = 0) -> float:
    """Learning rate of one step that falls along half a cosine wave.

    Args:
        step: See `poly_lr`.
        lr: See `poly_lr`.
        max_steps: See `poly_lr`.
        min_lr: See `poly_lr`.
        warmup_steps: See `poly_lr`.

    Returns:
        ``(lr - min_lr) * (1 + cos(pi * step / max_steps)) / 2 + min_lr``, times the warm-up factor.

    Raises:
        RecipeError: See `poly_lr`.
        ValueError: See `poly_lr`.

    Reference:
        Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, equation 5.

    Deviations:
        No restarts; the whole run is one period.

    Example:
        >>> [round(cosine_lr(step, lr=0.01, max_steps=100), 6) for step in (0, 50, 100)]
        [0.01, 0.00505, 0.0001]
    """
    _check(step, lr=lr, max_steps=max_steps, min_lr=min_lr, power=1.0, warmup_steps=warmup_steps)
    decay = (1 + cos(pi * step / max_steps)) / 2
    return _warm_up(step, warmup_steps) * ((lr - min_lr) * decay + min_lr)


def _check(step: int, *, lr: float, max_steps: int, min_lr: float, power: float, warmup_steps: int) -> None:
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


def _warm_up(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
