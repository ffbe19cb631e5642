"""One optimisation step: forward, loss, backward, update.

On a GPU nothing here waits for the device, but for the boundary loss, whose distances are measured on the host, and for
optimizers that torch has no fused kernel of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import final

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from nestseg.core.dist import shares_of_pixels, sum_over_ranks
from nestseg.core.types import Batch, LossTerms
from nestseg.engine.guard import Guard
from nestseg.losses.criterion import Criterion
from nestseg.optim import WeightAverage, set_lr

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@final
@dataclass(slots=True, kw_only=True)
class Stepper:
    """Takes steps. The order in one: forward and loss, backward, unscale, norm, clip, judge, update, average.

    Args:
        fabric: Runs the backward pass.
        segmenter: The network in training mode.
        model: The same, as Fabric runs it.
        optimizer: Its optimizer.
        criterion: The loss.
        guard: Decides whether a step counts.
        average: Moving average of the weights, or None.
        scaler: Scales the loss where gradients are float16; disabled otherwise.
        precision: Type of activations, a key of `PRECISIONS`; weights, loss and update are float32.
        accumulate_steps: Parts of a batch that are run one after another.
        clip_norm: Largest norm of the gradient over all parameters, or None.
    """

    fabric: Fabric
    segmenter: torch.nn.Module
    model: _FabricModule
    optimizer: torch.optim.Optimizer
    criterion: Criterion
    guard: Guard
    average: WeightAverage | None
    scaler: torch.amp.GradScaler
    precision: str = "float32"
    accumulate_steps: int = 1
    clip_norm: float | None = None

    def step(self, batch: Batch, *, step: int, lr: float) -> LossTerms:
        """Take one step on one batch; nothing changes if the guard refuses it.

        The gradient is that of the (weighted) mean over the labelled pixels of all ranks and parts.

        Args:
            batch: This rank's images, on the model's device.
            step: Number of this step, from 1.
            lr: Its learning rate.

        Returns:
            This rank's loss terms, detached, on the device.
        """
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        self.guard.remember()
        terms = self._backward(batch)
        ranks = self.fabric.world_size
        loss = sum_over_ranks(terms.total) / ranks if ranks > 1 else terms.total
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        accept = self.guard.judge(loss, norm)
        if self.clip_norm is not None:
            clip_grads_with_norm_(parameters, self.clip_norm, norm)
        self._update(accept)
        self.guard.restore(accept)
        if self.average is not None:
            self.average.update(self.segmenter, accept)
        self.guard.add(
            step,
            loss=loss,
            own_loss=terms.total,
            gradient_norm=norm,
            accept=accept,
            sample_index=batch.sample_index,
        )
        return terms

    def rehearse(self, batch: Batch) -> None:
        """Use as much memory as a step does, and leave everything as it was, torch's generators included."""
        devices = [batch.image.device] if batch.image.is_cuda else []
        self.guard.remember()
        # what an optimizer keeps: one tensor a parameter with momentum, two in the Adam family
        kept = 2 if "betas" in self.optimizer.defaults else 1
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        with torch.random.fork_rng(devices=devices):
            try:
                memory = [torch.empty_like(parameter) for parameter in parameters for _ in range(kept)]
                self._backward(batch)
                del memory
            finally:
                self.optimizer.zero_grad(set_to_none=True)
                self.guard.restore(torch.zeros((), dtype=torch.bool, device=batch.image.device))

    def _backward(self, batch: Batch) -> LossTerms:
        """Add up the gradients of all parts; ranks exchange theirs once, in the last part."""
        parts = list(_split(batch, self.accumulate_steps))
        weights = [self.criterion.sum_weights(part.target) for part in parts]
        total: LossTerms | None = None
        for place, (part, share) in enumerate(zip(parts, shares_of_pixels(weights), strict=True), start=1):
            with self._alone(place < len(parts)):
                with self._autocast(part.image.device.type):
                    logits = self.model(part.image)
                terms = self.criterion(logits, part.target)
                self.fabric.backward(self.scaler.scale(terms.total * share))
            terms = _scale(terms, share)
            total = terms if total is None else _add(total, terms)
        assert total is not None, "a batch has at least one part"
        return total

    def _alone(self, alone: bool) -> AbstractContextManager[None]:
        """Keep this part's gradients on this rank."""
        if alone and self.fabric.world_size > 1:
            return self.fabric.no_backward_sync(self.model)
        return nullcontext()

    def _autocast(self, device: str) -> AbstractContextManager[None]:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(device, dtype)

    def _update(self, accept: Tensor) -> None:
        if accept.is_cuda and getattr(self.optimizer, "_step_supports_amp_scaling", False):
            self._update_fused(accept)
        elif accept:
            self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()

    def _update_fused(self, accept: Tensor) -> None:
        # torch's fused kernels leave everything as it is where this is 1, so that the host need not know
        self.optimizer.found_inf = (~accept).float()  # type: ignore[attr-defined]
        self.optimizer.step()


def _split(batch: Batch, num_parts: int) -> Iterator[Batch]:
    size = len(batch.image) // num_parts
    for start in range(0, len(batch.image), size):
        yield Batch(*(values[start : start + size] for values in batch))


def _scale(terms: LossTerms, share: Tensor | float) -> LossTerms:
    auxiliary = None if terms.auxiliary is None else terms.auxiliary.detach() * share
    return LossTerms(terms.total.detach() * share, terms.main.detach() * share, auxiliary)


def _add(first: LossTerms, second: LossTerms) -> LossTerms:
    auxiliary = None if first.auxiliary is None or second.auxiliary is None else first.auxiliary + second.auxiliary
    return LossTerms(first.total + second.total, first.main + second.main, auxiliary)


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give fused SGD its momentum buffers before the first step.

    torch makes them without a value, for that step to write; where the guard refuses it they would keep what happened
    to be in memory. Zeros give the same first step.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum") and "betas" not in group:
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
