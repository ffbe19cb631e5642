"""The losses against torch's own, in float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nestseg.core.types import SegLogits
from nestseg.losses.cross_entropy import segmentation_loss
from nestseg.ops.upsample_cross_entropy import upsample_cross_entropy

CASES = [
    pytest.param((2, 21, 64, 64), (2, 512, 512), id="voc"),
    pytest.param((2, 11, 15, 15), (2, 60, 60), id="toystreets"),
    pytest.param((1, 150, 9, 17), (1, 33, 65), id="odd sizes"),
    pytest.param((3, 19, 8, 8), (3, 8, 8), id="size unchanged"),
    pytest.param((1, 2, 32, 32), (1, 8, 8), id="target smaller"),
]


def _reference(logits: torch.Tensor, target: torch.Tensor, *, align_corners: bool = False) -> torch.Tensor:
    upsampled = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(upsampled, target.long(), ignore_index=255)


def _draw(shape: tuple[int, ...], out: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    logits = 4 * torch.randn(shape, generator=generator, dtype=torch.float64)
    target = torch.randint(0, shape[1], out, generator=generator)
    target[torch.rand(out, generator=generator) < 0.2] = 255
    return logits.requires_grad_(), target.byte()


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("shape", "out"), CASES)
def test_loss_and_gradient_equal_interpolate_and_cross_entropy(
    shape: tuple[int, ...], out: tuple[int, ...], align_corners: bool
) -> None:
    logits, target = _draw(shape, out)
    ours = upsample_cross_entropy(logits, target, align_corners=align_corners)
    theirs = _reference(logits, target, align_corners=align_corners)
    (our_gradient,) = torch.autograd.grad(ours, logits)
    (their_gradient,) = torch.autograd.grad(theirs, logits)
    assert _difference(ours, theirs) < 1e-12
    assert _difference(our_gradient, their_gradient) < 1e-12


def test_total_loss_equals_two_weighted_cross_entropies() -> None:
    main, target = _draw((2, 11, 15, 15), (2, 60, 60))
    auxiliary, _ = _draw((2, 11, 8, 8), (2, 60, 60))
    total = segmentation_loss(SegLogits(main, auxiliary), target).total
    assert _difference(total, _reference(main, target) + 0.4 * _reference(auxiliary, target)) < 1e-12


def test_float32_loss_is_within_rounding_of_float64() -> None:
    logits, target = _draw((2, 150, 16, 16), (2, 128, 128))
    single = upsample_cross_entropy(logits.detach().float(), target)
    assert _difference(single.double(), _reference(logits.detach(), target)) < 1e-6
