"""The closed forms of the learning rate against stepwise schedulers, all in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, PolynomialLR

from nestseg.optim.schedules import cosine_lr, poly_lr

PUBLISHED_STEPS = {"voc": 661 * 60, "ade20k": 1263 * 130, "cityscapes": 371 * 220}


def _optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)


def _rates(scheduler: LRScheduler, num_steps: int) -> Iterator[float]:
    """Yield the rate of each step, and the one after the last."""
    for _ in range(num_steps):
        yield scheduler.get_last_lr()[0]
        scheduler.optimizer.step()
        scheduler.step()
    yield scheduler.get_last_lr()[0]


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_without_a_floor_poly_equals_torch_step_by_step(power: float) -> None:
    scheduler = PolynomialLR(_optimizer(), total_iters=300, power=power)
    for step, rate in enumerate(_rates(scheduler, 300)):
        ours = poly_lr(step, lr=0.01, min_lr=0.0, power=power, max_steps=300)
        assert ours == pytest.approx(rate, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("max_steps", PUBLISHED_STEPS.values(), ids=PUBLISHED_STEPS.keys())
def test_with_a_floor_poly_equals_the_recursion_of_the_toolboxes(max_steps: int) -> None:
    rate = 0.01
    for step in range(max_steps):
        if step % 997 == 0:
            assert poly_lr(step, lr=0.01, max_steps=max_steps) == pytest.approx(rate, rel=1e-8)
        rate = (rate - 1e-4) * (1 - 1 / (max_steps - step)) ** 0.9 + 1e-4
    assert poly_lr(max_steps, lr=0.01, max_steps=max_steps) == pytest.approx(rate, rel=1e-8)


@pytest.mark.parametrize("min_lr", [0.0, 1e-4])
@pytest.mark.parametrize("max_steps", [1, 7, 300, 5000])
def test_cosine_equals_torch_step_by_step(max_steps: int, min_lr: float) -> None:
    # torch multiplies the last rate, so that its rounding adds up; ours is the closed form at any step
    scheduler = CosineAnnealingLR(_optimizer(), T_max=max_steps, eta_min=min_lr)
    for step, rate in enumerate(_rates(scheduler, max_steps)):
        ours = cosine_lr(step, lr=0.01, min_lr=min_lr, max_steps=max_steps)
        assert ours == pytest.approx(rate, rel=1e-9, abs=1e-14)
