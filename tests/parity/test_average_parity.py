"""The moving average against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nestseg.optim.average import WeightAverage


def _rising(decay: float) -> Callable[[Any, Any, Any], None]:
    """Return torch's kind of averaging function with a share that rises to ``decay``."""

    def average(averages: list[Tensor], values: list[Tensor], num_averaged: Tensor) -> None:
        # torch's first update is a copy: its second is our update 0
        update = int(num_averaged) - 1
        get_ema_multi_avg_fn(min(decay, (1 + update) / (10 + update)))(averages, values, num_averaged)

    return average


@pytest.mark.parametrize(
    ("decay", "function"),
    [(0.1, get_ema_multi_avg_fn(0.1)), (0.7, _rising(0.7)), (0.9998, _rising(0.9998))],
    ids=["constant", "rising to the decay", "rising"],
)
def test_weights_and_buffers_are_those_of_torch(decay: float, function: Callable[[Any, Any, Any], None]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    ours, theirs = WeightAverage(model, decay), AveragedModel(model, multi_avg_fn=function)
    theirs.update_parameters(model)
    for _ in range(60):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 8, 8, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        ours.update(model)
        theirs.update_parameters(model)
    state, expected = ours.model_state(model), theirs.module.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-12)
    assert not torch.equal(state["2.weight"], model.state_dict()["2.weight"])
