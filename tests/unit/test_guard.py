"""A step that goes wrong changes nothing, and too many in a row end the run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nestseg.core.errors import RunError
from nestseg.engine.guard import Guard, all_finite


def make_guard(**options) -> tuple[nn.Module, Guard]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=0.3))
    return model, Guard(model, **{"max_bad_steps": 3, "spike_factor": None, **options})


def add(guard: Guard, step: int, loss: float, norm: float = 1.0, own: float | None = None) -> bool:
    loss_tensor, norm_tensor = torch.tensor(loss), torch.tensor(norm)
    accept = guard.judge(loss_tensor, norm_tensor)
    guard.add(
        step,
        loss=loss_tensor,
        own_loss=torch.tensor(loss if own is None else own),
        gradient_norm=norm_tensor,
        accept=accept,
        sample_index=torch.tensor([step, step + 100]),
    )
    return bool(accept)


@pytest.mark.parametrize("accept", [True, False])
def test_buffers_go_back_unless_the_step_counts(accept):
    model, guard = make_guard()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    guard.remember()
    model(torch.full((2, 3, 8, 8), math.nan if not accept else 1.5))
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert not any(torch.equal(before[name], after[name]) for name in before)
    guard.restore(torch.tensor(accept))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, after[name] if accept else before[name]), name


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_does_not_count(loss, norm):
    _, guard = make_guard()
    assert add(guard, 1, 1.0)
    assert not add(guard, 2, loss, norm)
    (bad,) = guard.take_bad_steps()
    assert (bad.step, bad.reason, bad.sample_index) == (2, "not finite", [2, 102])
    assert guard.take_bad_steps() == []
    assert guard.take_mean_loss() == 1.0
    assert guard.take_mean_loss() is None


def test_samples_of_ranks_whose_own_loss_is_finite_are_not_blamed():
    _, guard = make_guard()
    add(guard, 1, math.nan, own=0.5)
    assert guard.take_bad_steps()[0].sample_index == []


def test_only_bad_steps_in_a_row_end_the_run():
    _, guard = make_guard()
    for step in range(1, 10):
        add(guard, step, math.nan if step % 3 else 1.0)
    add(guard, 10, math.nan)
    add(guard, 11, math.nan)
    with pytest.raises(RunError, match=r"E-RUN-020 .*3 steps in a row to step 12.*optimizer.lr"):
        add(guard, 12, math.nan)


def test_float16_may_halve_its_scale_first():
    _, guard = make_guard(half_precision=True)
    for step in range(1, 19):
        add(guard, step, 1.0, math.inf)
    with pytest.raises(RunError, match="19 steps in a row"):
        add(guard, 19, 1.0, math.inf)


def test_spikes_are_measured_by_the_median_of_the_losses_that_counted():
    _, guard = make_guard(spike_factor=10.0, max_bad_steps=1000)
    assert all(add(guard, step, 1.0) for step in range(1, 20))
    assert add(guard, 20, 500.0), "too few losses to know what is usual"
    assert not add(guard, 21, 10.1)
    assert add(guard, 22, 9.9)
    for step in range(23, 200):
        assert not add(guard, step, 50.0), "losses that do not count must not become the usual"
    assert {bad.reason for bad in guard.take_bad_steps()} == {"spike"}


def test_a_continuation_judges_as_the_uninterrupted_run():
    _, guard = make_guard(spike_factor=1.3, max_bad_steps=1000)
    generator = torch.Generator().manual_seed(0)
    losses = (1 + torch.rand(150, generator=generator) * 1.5).tolist()
    whole = [add(guard, step, loss) for step, loss in enumerate(losses[:130])]
    _, other = make_guard(spike_factor=1.3, max_bad_steps=1000)
    first = [add(other, step, loss) for step, loss in enumerate(losses[:70])]
    _, third = make_guard(spike_factor=1.3, max_bad_steps=1000)
    third.load_state_dict(other.state_dict())
    assert first + [add(third, step, loss) for step, loss in enumerate(losses[70:130])] == whole
    assert not all(whole)


def test_finite_values_whose_squares_overflow_are_finite():
    assert all_finite([torch.full((3,), 3e38), torch.arange(3), torch.zeros(0)])
    assert not all_finite([torch.zeros(3), torch.tensor([1.0, math.nan])])
    assert not all_finite([torch.tensor([-math.inf])])
