"""An exponential moving average of a network's weights, which often scores better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, final

import torch
from torch import Tensor, nn

from nestseg.core.errors import RecipeError


@final
class WeightAverage:
    """The moving average of all floating parameters of one model, begun at their values now.

    Update t, from 0, keeps the share ``min(decay, (1 + t) / (10 + t))`` of the average and takes the rest from the
    model, so that a short run is not an average of its random start. The average is in float32, or in float64 where
    parameters are, since a step of a small share would be lost in 16 bits.

    Buffers are not averaged: wherever the average stands in for the weights, they are the model's own. BatchNorm's
    running statistics are moving averages already, of the last tens of batches, and its count of batches is no number
    to average.

    Args:
        model: The model, on its device. Later calls must be given the same one, or one like it.
        decay: Share of the average that stays at each update, in the long run.

    Raises:
        RecipeError: If ``decay`` is not between 0 and 1.

    Reference:
        Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017, section 2 (moving average);
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992 (why averages are good).

    Deviations:
        The papers' decay is one number (two in Mean Teacher's experiments); its rise from 1/10 is that of TensorFlow's
        ``ExponentialMovingAverage(num_updates=...)``. timm averages buffers as well.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = WeightAverage(model, 0.999)
        >>> nn.init.constant_(model.weight, 5.0)
        Parameter containing:
        tensor([[5.]], requires_grad=True)
        >>> for _ in range(200):
        ...     average.update(model)
        >>> with average.applied_to(model):
        ...     print(round(model.weight.item(), 3))
        5.0
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise RecipeError("E-RECIPE-059", f"{decay}; allowed: above 0, below 1", fix="lower it", path="ema.decay")
        parameters = _floating_parameters(model)
        self._decay = decay
        self._dtype = reduce(torch.promote_types, (value.dtype for value in parameters.values()), torch.float32)
        self._averages = {name: value.detach().to(self._dtype, copy=True) for name, value in parameters.items()}
        # on the device, as it depends on steps that the host does not know to have been skipped
        self._num_updates = torch.zeros((), dtype=torch.int64, device=next(iter(parameters.values())).device)

    @torch.no_grad()
    def update(self, model: nn.Module, accept: Tensor | None = None) -> None:
        """Move the average towards the model's weights. No value is read back to the host.

        Args:
            model: The model after a step.
            accept: Whether the step counts; None counts it. Where False, the update adds 0 to the average and is not
                counted; the model's weights must be finite then too, as those of a step that changed nothing are.

        Shape:
            - accept: () bool, on the model's device
        """
        # 1 - min(decay, (1 + t) / (10 + t)), without its loss of digits
        weight = (9 / (10 + self._num_updates.to(self._dtype))).clamp(min=1 - self._decay)
        if accept is None:
            self._num_updates += 1
        else:
            weight = weight * accept
            self._num_updates += accept
        targets = [parameter.detach().to(self._dtype) for parameter in self._match(model)]
        torch._foreach_lerp_(list(self._averages.values()), targets, [weight] * len(targets))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averaged weights inside a ``with`` block, and its own back after it, to the bit.

        Values are copied and not exchanged, so that whatever holds the parameters (an optimiser, compiled code, a
        wrapper for several devices) need not know; it takes the memory of one more copy of the weights.
        """
        parameters = self._match(model)
        own = [parameter.detach().clone() for parameter in parameters]
        try:
            with torch.no_grad():
                torch._foreach_copy_(parameters, list(self._averages.values()))
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, own)

    def model_state(self, model: nn.Module) -> dict[str, Tensor]:
        """Return a state dict of the model with averaged weights, whole and independent of both, for a model file."""
        with self.applied_to(model):
            return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on with the same bits; the tensors are no copies."""
        return {"num_updates": int(self._num_updates), "parameters": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the average that `state_dict` returned, of a model with the same parameters.

        Raises:
            ValueError: If names, shapes or types of the parameters are others; the average is then left as it was.
        """
        saved: Mapping[str, Tensor] = state["parameters"]
        kinds, own_kinds = (
            {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
            for tensors in (saved, self._averages)
        )
        if kinds != own_kinds:
            others = sorted(name for name, _ in kinds.items() ^ own_kinds.items())
            raise ValueError(f"the saved average is of another model; it differs in {', '.join(others[:5])}")
        for name, tensor in self._averages.items():
            tensor.copy_(saved[name])
        self._num_updates.fill_(state["num_updates"])

    def _match(self, model: nn.Module) -> list[Tensor]:
        """Return the model's parameters in the order of the averages."""
        parameters = _floating_parameters(model)
        if parameters.keys() != self._averages.keys():
            others = sorted(parameters.keys() ^ self._averages.keys())
            raise ValueError(f"the average is of another model; it differs in {', '.join(others[:5])}")
        return [parameters[name] for name in self._averages]


def _floating_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.is_floating_point()}
