from __future__ import annotations

import pytest
import torch
from torch import nn

from nestseg.core.errors import ModelError, RecipeError
from nestseg.optim import build_adamw, build_sgd, poly_lr, set_lr


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.decode_head = nn.Conv2d(4, 2, 1)


def _build(model: nn.Module, **options: float) -> torch.optim.SGD:
    return build_sgd(model, lr=0.01, momentum=0.9, weight_decay=5e-4, **options)  # type: ignore[arg-type]


def test_learning_rate_starts_at_lr_and_ends_at_min_lr() -> None:
    assert poly_lr(0, lr=0.01, max_steps=39_660) == pytest.approx(0.01, rel=1e-15)
    assert poly_lr(39_660, lr=0.01, max_steps=39_660) == 1e-4
    assert poly_lr(1, lr=0.02, min_lr=0.0, power=1.0, max_steps=4) == pytest.approx(0.015)


def test_learning_rate_halfway_is_the_hand_computed_value() -> None:
    assert poly_lr(500, lr=0.01, max_steps=1000) == pytest.approx(0.0099 * 0.5**0.9 + 1e-4, rel=1e-15)


def test_learning_rate_falls_with_every_step() -> None:
    rates = [poly_lr(step, lr=0.01, max_steps=200) for step in range(201)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 201


def test_warmup_multiplies_the_first_steps_and_leaves_the_rest() -> None:
    def ratio(step: int) -> float:
        return poly_lr(step, lr=0.01, max_steps=100, warmup_steps=4) / poly_lr(step, lr=0.01, max_steps=100)

    assert [ratio(step) for step in (0, 1, 2, 3, 4, 99)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize("step", [-1, 101])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step}; allowed 0 to 100"):
        poly_lr(step, lr=0.01, max_steps=100)


@pytest.mark.parametrize(
    "options",
    [{"max_steps": 0}, {"max_steps": 10, "warmup_steps": 11}, {"max_steps": 10, "warmup_steps": -1}],
)
def test_a_run_without_steps_or_a_warmup_outside_it_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="E-RECIPE-050"):
        poly_lr(0, lr=0.01, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"lr": 1e-5}, {"lr": 0.01, "min_lr": -1.0}, {"lr": 0.01, "power": -0.9}])
def test_a_rate_that_would_not_fall_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="E-RECIPE-051"):
        poly_lr(0, max_steps=10, **options)  # type: ignore[arg-type]


def test_the_published_recipe_is_one_group_with_decay_on_everything() -> None:
    model = _Network()
    optimizer = _build(model)
    (group,) = optimizer.param_groups
    assert all(ours is theirs for ours, theirs in zip(group["params"], model.parameters(), strict=True))
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.01, 0.9, 5e-4)
    assert (group["nesterov"], group["dampening"], group["lr_multiplier"]) == (False, 0, 1.0)


def test_frozen_parameters_are_left_out() -> None:
    model = _Network()
    model.backbone.requires_grad_(False)
    (group,) = _build(model).param_groups
    assert [parameter.shape for parameter in group["params"]] == [(2, 4, 1, 1), (2,)]


def test_heads_can_learn_faster_than_the_backbone() -> None:
    model = _Network()
    groups = _build(model, head_lr_multiplier=10.0).param_groups
    assert [(group["lr_multiplier"], group["lr"], len(group["params"])) for group in groups] == [
        (1.0, 0.01, 4),
        (10.0, 0.1, 2),
    ]
    assert groups[1]["params"][0] is model.decode_head.weight


def test_norms_and_biases_can_be_spared_the_decay() -> None:
    groups = _build(_Network(), decay_norm_and_bias=False).param_groups
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(5e-4, 2), (0.0, 4)]


def test_the_weight_of_a_linear_layer_is_no_norm_and_keeps_its_decay() -> None:
    groups = _build(nn.Linear(3, 2), decay_norm_and_bias=False).param_groups
    assert [(group["weight_decay"], group["params"][0].shape) for group in groups] == [(5e-4, (2, 3)), (0.0, (2,))]


def test_both_options_split_into_four_groups_that_hold_every_parameter_once() -> None:
    model = _Network()
    groups = _build(model, head_lr_multiplier=10.0, decay_norm_and_bias=False).param_groups
    assert len(groups) == 4
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_set_lr_keeps_the_multipliers() -> None:
    optimizer = _build(_Network(), head_lr_multiplier=10.0)
    set_lr(optimizer, 0.002)
    assert [group["lr"] for group in optimizer.param_groups] == [0.002, 0.02]


def test_multipliers_survive_saving_and_loading() -> None:
    saved = _build(_Network(), head_lr_multiplier=10.0).state_dict()
    optimizer = _build(_Network(), head_lr_multiplier=2.0)
    optimizer.load_state_dict(saved)
    set_lr(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.0]


def test_nesterov_is_passed_on() -> None:
    assert _build(_Network(), nesterov=True).param_groups[0]["nesterov"] is True


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ModelError, match="E-MODEL-050"):
        _build(_Network().requires_grad_(False))


def test_a_head_multiplier_without_a_backbone_is_refused() -> None:
    with pytest.raises(ModelError, match="E-MODEL-051"):
        _build(nn.Conv2d(3, 2, 1), head_lr_multiplier=10.0)


def test_one_step_is_the_textbook_update() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(2.0)
    optimizer = build_sgd(model, lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model.weight.sum().backward()
        optimizer.step()
    # v1 = 1 + 0.5 * 2 = 2, w1 = 1.8; v2 = 0.9 * 2 + 1 + 0.5 * 1.8 = 3.7, w2 = 1.43
    assert model.weight.item() == pytest.approx(1.43)


def test_adamw_takes_the_step_of_its_paper():
    weight = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(weight.weight, 2.0)
    optimizer = build_adamw(weight, lr=0.1, beta1=0.9, weight_decay=0.5)
    weight.weight.grad = torch.full((1, 1), 3.0, dtype=torch.float64)
    optimizer.step()
    # the first bias-corrected step is lr * g / |g|; the decay takes lr * decay of the weight beforehand
    assert weight.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-7)
