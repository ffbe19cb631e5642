"""Optimisers over groups of parameters, learning rates, and the average of the weights."""

from __future__ import annotations

from nestseg.optim.average import WeightAverage
from nestseg.optim.groups import group_parameters, load_optimizer_state, set_lr
from nestseg.optim.optimizers import FUSED, OPTIMIZERS, build_optimizer
from nestseg.optim.schedules import ScheduleName, cosine_lr, learning_rate, poly_lr

__all__ = [
    "FUSED",
    "OPTIMIZERS",
    "ScheduleName",
    "WeightAverage",
    "build_optimizer",
    "cosine_lr",
    "group_parameters",
    "learning_rate",
    "load_optimizer_state",
    "poly_lr",
    "set_lr",
]
