from __future__ import annotations

import copy
import inspect
import itertools
import re
from typing import Any, get_args

import pytest
import torch
from torch import nn

from nestseg.core.errors import ModelError, RecipeError
from nestseg.optim.groups import load_optimizer_state, set_lr
from nestseg.optim.optimizers import _NOT_AN_OPTION, FUSED, OPTIMIZERS, build_optimizer
from nestseg.optim.schedules import ScheduleName, cosine_lr, learning_rate, poly_lr
from nestseg.recipe import OptimizerName, OptimizerSection, ScheduleSection
from nestseg.store.files import read_torch_file, write_torch_file


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.decode_head = nn.Conv2d(4, 2, 1)


def _build(model: nn.Module, **given: Any) -> torch.optim.Optimizer:
    return build_optimizer(model, **{"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, **given})


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
    optimizer = build_optimizer(model, name="sgd", lr=0.1, momentum=0.9, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model.weight.sum().backward()
        optimizer.step()
    # v1 = 1 + 0.5 * 2 = 2, w1 = 1.8; v2 = 0.9 * 2 + 1 + 0.5 * 1.8 = 3.7, w2 = 1.43
    assert model.weight.item() == pytest.approx(1.43)


def test_adamw_takes_the_step_of_its_paper():
    weight = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(weight.weight, 2.0)
    optimizer = build_optimizer(weight, name="adamw", lr=0.1, momentum=0.9, weight_decay=0.5)
    weight.weight.grad = torch.full((1, 1), 3.0, dtype=torch.float64)
    optimizer.step()
    # the first bias-corrected step is lr * g / |g|; the decay takes lr * decay of the weight beforehand
    assert weight.weight.item() == pytest.approx(2.0 * (1 - 0.1 * 0.5) - 0.1, abs=1e-7)


LEARNING_RATES = {"adadelta": 1.0, "asgd": 0.05, "sgd": 0.05, "adagrad": 0.01}
"""Where 0.001 is no rate for that optimiser."""


class _Toy(nn.Module):
    """Kernels, a norm and a matrix, so that no optimiser sees one shape only."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
        self.head = nn.Linear(4, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(image).mean((2, 3)))


def _make_toy(name: str, **given: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Toy()
    lr = LEARNING_RATES.get(name, 0.001)
    return model, _build(model, **{"name": name, "lr": lr, "head_lr_multiplier": 2.0, **given})


def _take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    image, wanted = torch.rand(8, 3, 6, 6, generator=generator), torch.rand(8, 5, generator=generator)
    losses = []
    for step in range(start, stop):
        set_lr(optimizer, learning_rate(step, name="poly", lr=optimizer.defaults["lr"], min_lr=0.0, max_steps=20))
        optimizer.zero_grad()
        loss = (model(image) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _bits(model: nn.Module) -> list[bytes]:
    return [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


def test_the_table_has_the_names_of_the_recipe():
    assert list(OPTIMIZERS) == list(get_args(OptimizerName))
    assert set(OPTIMIZERS) > FUSED


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_of_three_steps_of_every_optimizer_lowers_the_square_error(name):
    losses = _take_steps(*_make_toy(name), 0, 4)
    assert all(after < before for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize(
    ("name", "fused"), [(name, None) for name in OPTIMIZERS] + [(name, True) for name in sorted(FUSED)]
)
def test_every_optimizer_goes_on_from_its_saved_state_with_the_same_bits(name, fused, tmp_path):
    """T1, R10: what a checkpoint must keep of an optimiser."""
    model, optimizer = _make_toy(name, fused=fused)
    _take_steps(model, optimizer, 0, 3)
    write_torch_file(tmp_path / "state.pt", {"optimizer": optimizer.state_dict()})
    weights = copy.deepcopy(model.state_dict())
    _take_steps(model, optimizer, 3, 7)

    resumed, resumed_optimizer = _make_toy(name, fused=fused)
    resumed.load_state_dict(weights)
    load_optimizer_state(resumed_optimizer, read_torch_file(tmp_path / "state.pt")["optimizer"])
    _take_steps(resumed, resumed_optimizer, 3, 7)
    assert _bits(resumed) == _bits(model)

    forgetful, forgetful_optimizer = _make_toy(name, fused=fused)
    forgetful.load_state_dict(weights)
    _take_steps(forgetful, forgetful_optimizer, 3, 7)
    assert _bits(forgetful) != _bits(model), "the test would not notice a state that is lost"


def test_a_resumed_optimizer_keeps_the_numbers_of_its_recipe():
    """R6: a change that was accepted must not be undone by the checkpoint."""
    model, optimizer = _make_toy("adamw")
    _take_steps(model, optimizer, 0, 3)
    saved = optimizer.state_dict()
    _, resumed = _make_toy("adamw", weight_decay=0.1, momentum=0.8, head_lr_multiplier=5.0, options={"eps": 1e-6})
    load_optimizer_state(resumed, saved)
    for group, multiplier in zip(resumed.param_groups, (1.0, 5.0), strict=True):
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0.1, (0.8, 0.999), 1e-6)
        assert group["lr_multiplier"] == multiplier
    mean = resumed.state[resumed.param_groups[0]["params"][0]]["exp_avg"]
    assert torch.equal(mean, optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"])


@pytest.mark.parametrize("name", sorted(FUSED))
@pytest.mark.parametrize(("before", "after"), [(None, True), (True, None)])
def test_a_resumed_optimizer_has_the_kernels_of_its_device_and_not_those_of_the_checkpoint(name, before, after):
    model, optimizer = _make_toy(name, fused=before)
    _take_steps(model, optimizer, 0, 3)
    resumed, resumed_optimizer = _make_toy(name, fused=after)
    resumed.load_state_dict(model.state_dict())
    load_optimizer_state(resumed_optimizer, copy.deepcopy(optimizer.state_dict()))
    assert {group["fused"] for group in resumed_optimizer.param_groups} == {after}
    assert _take_steps(resumed, resumed_optimizer, 3, 6) == pytest.approx(_take_steps(model, optimizer, 3, 6), rel=1e-5)


def test_a_state_of_other_groups_is_refused():
    saved = _make_toy("sgd")[1].state_dict()
    for given in ({"head_lr_multiplier": 1.0}, {"decay_norm_and_bias": False}):
        with pytest.raises(ValueError, match=r"zip|size"):
            load_optimizer_state(_make_toy("sgd", **given)[1], saved)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_defaults_give_the_bits_of_torch(name):
    model, optimizer = _make_toy(name, head_lr_multiplier=1.0)
    reference = copy.deepcopy(model)
    theirs = {
        "sgd": torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
        "adamw": torch.optim.AdamW(reference.parameters(), lr=0.001, betas=(0.9, 0.999), weight_decay=5e-4),
    }[name]
    for group in theirs.param_groups:
        group["lr_multiplier"] = 1.0
    _take_steps(model, optimizer, 0, 5)
    _take_steps(reference, theirs, 0, 5)
    assert _bits(model) == _bits(reference)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_goes_where_the_recipe_says(name):
    group = _make_toy(name, momentum=0.75)[1].param_groups[0]
    words = str(OptimizerSection.model_fields["momentum"].description).partition("unused by")[0]
    given = {key: group[key] for key in ("momentum", "betas") if key in group}
    if name not in re.findall(r"\w+", words):
        assert given == {}
    else:
        assert given == ({"betas": (0.75, 0.999)} if "betas" in group else {"momentum": 0.75})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_decay_is_the_one_given_whatever_the_class_has_by_default(name):
    assert [group["weight_decay"] for group in _make_toy(name)[1].param_groups] == [5e-4, 5e-4]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"dampening": 0.5}),
        ("adam", {"amsgrad": True, "eps": 1e-6}),
        ("adamw", {"betas": (0.9, 0.98)}),
        ("nadam", {"momentum_decay": 1}),
        ("adafactor", {"eps": (1e-30, 1e-3), "d": 2.0}),
        ("rmsprop", {"alpha": 0.9, "centered": True}),
        ("asgd", {"t0": 100.0}),
    ],
)
def test_options_reach_the_optimizer(name, options):
    group = _make_toy(name, options=options)[1].param_groups[1]
    assert {key: group[key] for key in options} == options


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ({"name": "adamv"}, "E-RECIPE-052 | optimizer.name", "did you mean adam"),
        (
            {"name": "adam", "options": {"epsilon": 1e-6}},
            "E-RECIPE-053 | optimizer.options.epsilon",
            "did you mean eps",
        ),
        ({"options": {"eps": 1e-6}}, "E-RECIPE-053 | optimizer.options.eps", "allowed: dampening"),
        ({"name": "adagrad", "options": {"momentum": 0.5}}, "E-RECIPE-053", "adagrad has no such option"),
        ({"options": {"lr": 0.1}}, "E-RECIPE-053 | optimizer.options.lr", "set optimizer.lr"),
        ({"options": {"momentum": 0.1}}, "E-RECIPE-053", "set optimizer.momentum"),
        ({"options": {"nesterov": True}}, "E-RECIPE-053", "set optimizer.nesterov"),
        ({"options": {"weight_decay": 0.1}}, "E-RECIPE-053", "set optimizer.weight_decay"),
        ({"options": {"params": 1}}, "E-RECIPE-053", "those of the model"),
        ({"options": {"maximize": True}}, "E-RECIPE-053", "raise the loss"),
        ({"options": {"foreach": False}}, "E-RECIPE-053", "torch chooses"),
        ({"options": {"fused": True}}, "E-RECIPE-053", "chosen by the device"),
        ({"name": "adam", "options": {"capturable": True}}, "E-RECIPE-053", "CUDA graphs"),
        ({"name": "adam", "options": {"differentiable": True}}, "E-RECIPE-053", "gradients through a step"),
        ({"name": "adam", "options": {"eps": True}}, "E-RECIPE-054 | optimizer.options.eps", "True; allowed: a number"),
        ({"name": "adam", "options": {"amsgrad": 1}}, "E-RECIPE-054", "1; allowed: true or false"),
        ({"name": "adam", "options": {"betas": (0.9, 0.99, 0.999)}}, "E-RECIPE-054", "allowed: 2 numbers"),
        ({"name": "adam", "options": {"betas": 0.9}}, "E-RECIPE-054", "allowed: 2 numbers"),
        ({"name": "adam", "options": {"betas": (0.8, 0.99)}}, "E-RECIPE-055", "set optimizer.momentum=0.8"),
        ({"name": "adam", "options": {"betas": (0.9, 1.5)}}, "E-RECIPE-056", "beta parameter at index 1"),
        ({"nesterov": True, "options": {"dampening": 0.1}}, "E-RECIPE-056", "zero dampening"),
        ({"name": "adamw", "nesterov": True}, "E-RECIPE-057 | optimizer.nesterov", "adamw has no Nesterov momentum"),
    ],
)
def test_what_the_optimizer_does_not_have_is_refused_with_what_it_has(given, code, words):
    with pytest.raises(RecipeError) as raised:
        _build(_Network(), **given)
    assert str(raised.value).startswith(code)
    assert words in str(raised.value)


def test_every_argument_of_every_class_is_an_option_or_refused_for_a_reason():
    """A version of torch that adds an argument shows up here."""
    free = {
        name: {key for key in inspect.signature(kind).parameters if key not in _NOT_AN_OPTION}
        for name, kind in OPTIMIZERS.items()
    }
    assert free == {
        "sgd": {"dampening"},
        "adamw": {"betas", "eps", "amsgrad"},
        "adam": {"betas", "eps", "amsgrad", "decoupled_weight_decay"},
        "nadam": {"betas", "eps", "momentum_decay", "decoupled_weight_decay"},
        "radam": {"betas", "eps", "decoupled_weight_decay"},
        "adamax": {"betas", "eps"},
        "adagrad": {"lr_decay", "initial_accumulator_value", "eps"},
        "adadelta": {"rho", "eps"},
        "adafactor": {"beta2_decay", "eps", "d"},
        "rmsprop": {"alpha", "eps", "centered"},
        "asgd": {"lambd", "alpha", "t0"},
    }


def test_a_fused_kernel_is_used_where_there_is_one_and_refused_where_there_is_none():
    assert _build(_Network(), fused=True).param_groups[0]["fused"] is True
    assert _build(_Network()).param_groups[0]["fused"] is None
    with pytest.raises(ValueError, match="no fused adamax; allowed: adam, adamw, sgd"):
        _build(_Network(), name="adamax", fused=True)


def test_cosine_starts_at_lr_passes_the_middle_and_ends_at_min_lr():
    assert cosine_lr(0, lr=0.01, max_steps=1000) == 0.01
    assert cosine_lr(500, lr=0.01, max_steps=1000) == pytest.approx(0.00505, rel=1e-15)
    assert cosine_lr(1000, lr=0.01, max_steps=1000) == 1e-4
    # cos(pi / 3) = 1/2
    assert cosine_lr(100, lr=0.01, min_lr=0.002, max_steps=300) == pytest.approx(0.002 + 0.008 * 0.75, rel=1e-15)


def test_cosine_falls_with_every_step_and_warms_up_as_poly_does():
    rates = [cosine_lr(step, lr=0.01, max_steps=200) for step in range(201)]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 201
    warm = [cosine_lr(step, lr=0.01, max_steps=200, warmup_steps=4) for step in range(201)]
    assert warm == pytest.approx([rate * min(1, (step + 1) / 4) for step, rate in enumerate(rates)])


@pytest.mark.parametrize("step", [-1, 101])
def test_cosine_refuses_a_step_outside_the_run(step):
    with pytest.raises(ValueError, match=f"step {step}; allowed 0 to 100"):
        cosine_lr(step, lr=0.01, max_steps=100)


@pytest.mark.parametrize(
    ("options", "code"),
    [({"max_steps": 0}, "E-RECIPE-050"), ({"warmup_steps": 11}, "E-RECIPE-050"), ({"min_lr": 0.1}, "E-RECIPE-051")],
)
def test_cosine_refuses_what_poly_refuses(options, code):
    with pytest.raises(RecipeError, match=code):
        cosine_lr(0, **{"lr": 0.01, "max_steps": 10, **options})


def test_the_name_of_a_schedule_leads_to_its_formula():
    assert get_args(ScheduleName) == get_args(ScheduleSection.model_fields["name"].annotation)
    given = {"lr": 0.02, "max_steps": 50, "min_lr": 1e-3, "warmup_steps": 5}
    for step in (0, 3, 20, 50):
        assert learning_rate(step, name="poly", power=2.0, **given) == poly_lr(step, power=2.0, **given)
        assert learning_rate(step, name="cosine", **given) == cosine_lr(step, **given)
    with pytest.raises(RecipeError, match="E-RECIPE-058"):
        learning_rate(0, name="linear", **given)
