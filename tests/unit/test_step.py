"""One step: the same gradient in parts, nothing changed by a bad one, and the order of unscale, clip and update."""

from __future__ import annotations

import math

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from nestseg.core.types import Batch, SegLogits
from nestseg.engine.guard import Guard
from nestseg.engine.step import Stepper, fill_momentum
from nestseg.losses.criterion import Criterion, LossTerm
from nestseg.optim import WeightAverage, build_optimizer


class TinySegmenter(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        convolution = nn.Conv2d(3, 6, 3, padding=1, bias=not norm)
        self.backbone = nn.Sequential(convolution, nn.BatchNorm2d(6) if norm else nn.Identity())
        self.decode_head = nn.Conv2d(6, 4, 1)

    def forward(self, image: torch.Tensor) -> SegLogits:
        features = self.backbone(image.to(self.decode_head.weight.dtype) / 255)
        return SegLogits(self.decode_head(features), None)


def make_stepper(*, norm: bool = True, name: str = "sgd", fused: bool | None = None, **options) -> Stepper:
    torch.manual_seed(0)
    model = TinySegmenter(norm)
    optimizer = build_optimizer(model, name=name, lr=0.1, momentum=0.9, weight_decay=1e-3, fused=fused)
    fill_momentum(optimizer)
    fabric = Fabric(accelerator="cpu", devices=1)
    given = {
        "criterion": Criterion(),
        "guard": Guard(model, max_bad_steps=100, spike_factor=None),
        "average": WeightAverage(model, 0.9),
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        **options,
    }
    return Stepper(fabric=fabric, segmenter=model, model=fabric.setup_module(model), optimizer=optimizer, **given)


def draw_batch(seed: int = 0, *, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8)
    target = torch.randint(0, 4, (size, 16, 16), generator=generator, dtype=torch.uint8)
    # parts with very different numbers of labelled pixels
    target[0], target[1, :12], target[2, :, 3:] = 255, 255, 255
    return Batch(image, target, torch.arange(size))


def everything(stepper: Stepper) -> dict[str, torch.Tensor]:
    values = {f"model.{name}": value.clone() for name, value in stepper.segmenter.state_dict().items()}
    for index, state in stepper.optimizer.state_dict()["state"].items():
        values |= {f"optimizer.{index}.{name}": torch.as_tensor(value).clone() for name, value in state.items()}
    assert stepper.average is not None
    average = stepper.average.state_dict()
    values |= {f"average.{name}": value.clone() for name, value in average["parameters"].items()}
    return values | {"average.num_updates": torch.tensor(average["num_updates"])}


def gradients(stepper: Stepper) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in stepper.segmenter.parameters()]


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0, 0.25]])
@pytest.mark.parametrize("parts", [2, 4])
def test_parts_give_the_gradient_and_the_loss_of_the_whole_batch(parts, weights):
    criterion = Criterion(class_weights=None if weights is None else torch.tensor(weights, dtype=torch.float64))
    steppers = [make_stepper(norm=False, criterion=criterion, accumulate_steps=number) for number in (1, parts)]
    terms = []
    for stepper in steppers:
        stepper.segmenter.double()
        stepper.average = None
        terms.append(stepper.step(draw_batch(), step=1, lr=0.1))
    assert terms[0].total.item() == pytest.approx(terms[1].total.item(), rel=1e-7)  # shares are float32
    for one, other in zip(*map(gradients, steppers), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_finite_changes_no_bit(name, first):
    stepper = make_stepper(name=name)
    if not first:
        stepper.step(draw_batch(), step=1, lr=0.1)
    before = everything(stepper)
    poisoned = draw_batch(1)
    stepper.criterion = Criterion(terms=(LossTerm("cross_entropy", math.inf),))
    stepper.step(poisoned, step=2, lr=0.1)
    after = everything(stepper)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    (bad,) = stepper.guard.take_bad_steps()
    assert (bad.step, bad.sample_index) == (2, [0, 1, 2, 3])
    # and then it goes on as if that batch had never been
    stepper.criterion = Criterion()
    other = make_stepper(name=name)
    if not first:
        other.step(draw_batch(), step=1, lr=0.1)
    for one in (stepper, other):
        one.step(draw_batch(2), step=3, lr=0.1)
    assert all(torch.equal(value, everything(other)[key]) for key, value in everything(stepper).items())


@pytest.mark.parametrize("name", ["sgd", "adamw", "adam"])
def test_fused_kernels_skip_a_step_without_asking_the_host(name, monkeypatch):
    # what a GPU does; torch's fused kernels for the processor follow the same flag
    stepper = make_stepper(name=name, fused=True)
    monkeypatch.setattr(Stepper, "_update", lambda self, accept: self._update_fused(accept))
    plain = make_stepper(name=name)
    for seed, bad in enumerate([True, False, True, False]):
        before = everything(stepper)
        stepper.criterion = Criterion(terms=(LossTerm("cross_entropy", math.inf if bad else 1.0),))
        stepper.step(draw_batch(seed), step=seed + 1, lr=0.1)
        if bad:
            assert all(torch.equal(value, before[key]) for key, value in everything(stepper).items() if key in before)
    monkeypatch.undo()
    for seed in (1, 3):
        plain.step(draw_batch(seed), step=seed, lr=0.1)
    for key, value in everything(plain).items():
        assert torch.allclose(value.double(), everything(stepper)[key].double(), rtol=1e-4, atol=1e-6), key


def test_clipping_scales_to_the_norm_and_no_further():
    free, clipped, roomy = (make_stepper(norm=False, clip_norm=norm) for norm in (None, 0.01, 1e6))
    for stepper in (free, clipped, roomy):
        stepper.step(draw_batch(), step=1, lr=0.1)
    norms = [math.sqrt(sum(float((grad**2).sum()) for grad in gradients(one))) for one in (free, clipped, roomy)]
    assert norms[1] == pytest.approx(0.01, rel=1e-3)
    assert norms[0] == norms[2] > 0.1


def test_float16_gradients_are_unscaled_before_they_are_clipped_and_the_scale_halves_on_overflow():
    plain = make_stepper(norm=False, clip_norm=0.01)
    scaled = make_stepper(norm=False, clip_norm=0.01, scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    for stepper in (plain, scaled):
        stepper.step(draw_batch(), step=1, lr=0.1)
    for one, other in zip(*map(gradients, (plain, scaled)), strict=True):
        assert torch.allclose(one, other, rtol=1e-4)
    before = everything(scaled)
    scaled.criterion = Criterion(terms=(LossTerm("cross_entropy", 1e36),))
    scaled.step(draw_batch(), step=2, lr=0.1)
    assert all(torch.equal(value, before[key]) for key, value in everything(scaled).items())
    assert scaled.scaler.get_scale() == 512.0


def test_bfloat16_is_near_float32_and_leaves_weights_and_gradients_in_float32():
    full, half = make_stepper(), make_stepper(precision="bfloat16")
    losses = [[one.step(draw_batch(seed), step=seed + 1, lr=0.1).total for seed in range(5)] for one in (full, half)]
    assert all(value.dtype == torch.float32 for value in gradients(half))
    for one, other in zip(*losses, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=0.02)
    assert losses[0] != losses[1], "autocast did nothing"


def test_a_rehearsal_leaves_no_trace():
    stepper = make_stepper()
    stepper.step(draw_batch(), step=1, lr=0.1)
    before, generator = everything(stepper), torch.get_rng_state()
    stepper.rehearse(draw_batch(3))
    assert all(torch.equal(value, before[key]) for key, value in everything(stepper).items())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in stepper.segmenter.parameters())
