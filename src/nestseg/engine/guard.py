"""What keeps wrong numbers out of a model: a step that goes wrong changes nothing.

Whether a step counts is decided on the device. The host reads it when the run reports, so that no step waits for it; on
a processor, where nothing waits, after each step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from nestseg.core.errors import RunError

NUM_LOSSES = 100
"""Losses whose median a spike is measured by."""
_MIN_LOSSES = 20
_HALVINGS = 16
"""Halvings that bring the scale of float16 gradients from its start, 65,536, to 1."""


class BadStep(NamedTuple):
    """A step that was not taken."""

    step: int
    """Counted from 1, as in the log."""
    loss: float
    gradient_norm: float
    reason: str
    """``not finite`` or ``spike``."""
    sample_index: list[int]
    """Samples of this rank's batch; none where another rank's loss was the one that was not finite."""


class _Record(NamedTuple):
    step: int
    numbers: Tensor
    """(4,) loss, gradient norm, 1 if the step counts, this rank's own loss."""
    sample_index: Tensor


@final
class Guard:
    """Judges steps, keeps buffers as they were where one does not count, and counts those in a row.

    Use, a step: `remember`, forward, backward, `judge`, an optimizer step only where accepted, `restore`, `add`.

    Args:
        model: Its buffers (BatchNorm statistics) are what a forward pass changes.
        max_bad_steps: See `settle`.
        spike_factor: A loss above so many times the median of the last 100 does not count; None lets it.
        half_precision: Whether gradients are scaled for float16, whose first steps overflow until the scale fits.
    """

    def __init__(
        self, model: nn.Module, *, max_bad_steps: int, spike_factor: float | None, half_precision: bool = False
    ) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(by_dtype.values())
        self._kept: list[Tensor] = []
        self._limit = max_bad_steps + (_HALVINGS if half_precision else 0)
        self._spike_factor = spike_factor
        device = next(model.parameters()).device
        self._losses = torch.full((NUM_LOSSES,), math.nan, device=device)
        self._records: list[_Record] = []
        self._bad: list[BadStep] = []
        self._bad_in_a_row = 0
        self._sum, self._count = 0.0, 0

    def remember(self) -> None:
        """Keep the buffers as they are before a forward pass."""
        # one flat tensor a type: a few launches on a GPU, where a copy a buffer would be a thousand
        self._kept = [torch.cat([buffer.flatten() for buffer in buffers]) for buffers in self._buffers]

    def judge(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Decide whether a step counts.

        Args:
            loss: Over all ranks, so that they decide alike.
            gradient_norm: Over all parameters; NaN or infinite if one of them is.

        Shape:
            - loss: () float32, detached
            - gradient_norm: () float32
            - returns: () bool, on the device
        """
        accept = loss.isfinite() & gradient_norm.isfinite()
        if self._spike_factor is not None:
            enough = self._losses.isfinite().sum() >= _MIN_LOSSES
            accept = accept & ~(enough & (loss > self._spike_factor * self._losses.nanmedian()))
            self._losses = torch.where(accept, torch.cat([self._losses[1:], loss[None]]), self._losses)
        return accept

    def restore(self, accept: Tensor) -> None:
        """Put the buffers back where a step does not count.

        Shape:
            - accept: () bool
        """
        for buffers, kept in zip(self._buffers, self._kept, strict=True):
            flat = torch.where(accept, torch.cat([buffer.flatten() for buffer in buffers]), kept)
            parts = torch.split(flat, [buffer.numel() for buffer in buffers])
            torch._foreach_copy_(buffers, [part.view_as(buffer) for part, buffer in zip(parts, buffers, strict=True)])
        self._kept = []

    def add(
        self, step: int, *, loss: Tensor, own_loss: Tensor, gradient_norm: Tensor, accept: Tensor, sample_index: Tensor
    ) -> None:
        """Note a step, for `settle` to read.

        Args:
            step: Counted from 1.
            loss: As given to `judge`.
            own_loss: Of this rank alone.
            gradient_norm: As given to `judge`.
            accept: What `judge` returned.
            sample_index: Samples of this rank's batch.

        Shape:
            - sample_index: (N,) int64
        """
        numbers = torch.stack([loss.float(), gradient_norm.float(), accept.float(), own_loss.float()])
        self._records.append(_Record(step, numbers, sample_index))
        if numbers.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Read what happened since the last call; every rank reads the same.

        Raises:
            RunError: E-RUN-020, after ``max_bad_steps`` bad steps in a row, with the usual causes.
        """
        records, self._records = self._records, []
        if not records:
            return
        numbers = torch.stack([record.numbers for record in records]).tolist()
        for record, (loss, norm, accepted, own_loss) in zip(records, numbers, strict=True):
            if accepted:
                self._bad_in_a_row = 0
                self._sum, self._count = self._sum + loss, self._count + 1
                continue
            self._bad_in_a_row += 1
            finite = math.isfinite(loss) and math.isfinite(norm)
            blamed = finite or math.isfinite(loss) or not math.isfinite(own_loss)
            samples = record.sample_index.tolist() if blamed else []
            self._bad.append(BadStep(record.step, loss, norm, "spike" if finite else "not finite", samples))
            if self._bad_in_a_row >= self._limit:
                raise RunError(
                    "E-RUN-020",
                    f"{self._bad_in_a_row} steps in a row to step {record.step} were not taken, the last since its "
                    f"{'loss spiked' if finite else 'gradient was not finite'} (loss {loss:.4g}, norm {norm:.4g})",
                    fix="lower optimizer.lr or set optimizer.clip_norm; look at the samples of these steps in "
                    "log.jsonl; start from pretrained weights; the last checkpoint is good",
                )

    def take_bad_steps(self) -> list[BadStep]:
        """Return the bad steps that `settle` has read, once."""
        bad, self._bad = self._bad, []
        return bad

    def take_mean_loss(self) -> float | None:
        """Return the mean loss of the steps that counted since the last call; None if none did."""
        self.settle()
        mean = self._sum / self._count if self._count else None
        self._sum, self._count = 0.0, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation needs; call `settle` first."""
        return {"losses": self._losses.cpu(), "bad_in_a_row": self._bad_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._losses = state["losses"].to(self._losses.device)
        self._bad_in_a_row = state["bad_in_a_row"]


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no value of many tensors is NaN or infinite."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    # a sum of squares can overflow where no value does, the largest magnitude cannot
    largest: dict[torch.device, list[Tensor]] = {}
    for norm in torch._foreach_norm(floats, math.inf) if floats else ():
        largest.setdefault(norm.device, []).append(norm)  # some optimizers count steps on the processor
    return all(bool(torch.stack([norm.float() for norm in norms]).isfinite().all()) for norms in largest.values())
