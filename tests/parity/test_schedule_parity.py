"""The closed form of the learning rate against stepwise schedulers."""

from __future__ import annotations

import pytest
import torch
from torch.optim.lr_scheduler import PolynomialLR

from nestseg.optim import poly_lr

PUBLISHED_STEPS = {"voc": 661 * 60, "ade20k": 1263 * 130, "cityscapes": 371 * 220}


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_without_a_floor_it_equals_torch_step_by_step(power: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    scheduler = PolynomialLR(optimizer, total_iters=300, power=power)
    for step in range(300):
        ours = poly_lr(step, lr=0.01, min_lr=0.0, power=power, max_steps=300)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9, abs=1e-15)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("max_steps", PUBLISHED_STEPS.values(), ids=PUBLISHED_STEPS.keys())
def test_with_a_floor_it_equals_the_recursion_of_the_toolboxes(max_steps: int) -> None:
    rate = 0.01
    for step in range(max_steps):
        if step % 997 == 0:
            assert poly_lr(step, lr=0.01, max_steps=max_steps) == pytest.approx(rate, rel=1e-8)
        rate = (rate - 1e-4) * (1 - 1 / (max_steps - step)) ** 0.9 + 1e-4
    assert poly_lr(max_steps, lr=0.01, max_steps=max_steps) == pytest.approx(rate, rel=1e-8)
