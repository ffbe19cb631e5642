"""The losses against torch's and segmentation_models_pytorch's own, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import segmentation_models_pytorch.losses as smp
import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits

from nestseg.core.types import SegLogits
from nestseg.losses.criterion import Criterion
from nestseg.losses.cross_entropy import cross_entropy_loss
from nestseg.losses.dice import dice_loss
from nestseg.losses.focal import focal_loss
from nestseg.losses.lovasz import lovasz_loss
from nestseg.losses.ohem import ohem_loss
from nestseg.losses.tversky import tversky_loss
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
    total = Criterion()(SegLogits(main, auxiliary), target).total
    assert _difference(total, _reference(main, target) + 0.4 * _reference(auxiliary, target)) < 1e-12


def test_float32_loss_is_within_rounding_of_float64() -> None:
    logits, target = _draw((2, 150, 16, 16), (2, 128, 128))
    single = upsample_cross_entropy(logits.detach().float(), target)
    assert _difference(single.double(), _reference(logits.detach(), target)) < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.05, 0.5])
def test_smoothed_loss_and_gradient_are_those_of_torch(weighted: bool, smoothing: float) -> None:
    logits, target = _draw((2, 11, 15, 15), (2, 60, 60))
    weights = torch.rand(11, dtype=torch.float64) if weighted else None
    upsampled = F.interpolate(logits, size=(60, 60), mode="bilinear")
    module = torch.nn.CrossEntropyLoss(weights, ignore_index=255, label_smoothing=smoothing)
    ours = cross_entropy_loss(logits, target, class_weights=weights, label_smoothing=smoothing)
    _assert_equal(ours, module(upsampled, target.long()), logits, tolerance=1e-12)


Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _assert_equal(ours: torch.Tensor, theirs: torch.Tensor, logits: torch.Tensor, *, tolerance: float) -> None:
    (our_gradient,) = torch.autograd.grad(ours, logits)
    (their_gradient,) = torch.autograd.grad(theirs, logits)
    assert theirs.item() > 0.01
    assert _difference(ours, theirs) < tolerance
    assert _difference(our_gradient, their_gradient) < tolerance


def _smp_smoothing(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # its mean divides by ignored pixels too
    total = smp.SoftCrossEntropyLoss(reduction="sum", smooth_factor=0.1, ignore_index=255)(scores, target)
    return total / (target != 255).sum()


def _smp_focal(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    labelled = target != 255
    return softmax_focal_loss_with_logits(scores.movedim(1, -1)[labelled], target[labelled], gamma=1.5)


def _smp_lovasz(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    # its cumulative sums are float32, and so must be the rest
    return smp.LovaszLoss("multiclass", ignore_index=255)(scores.float(), target)


@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance"),
    [
        pytest.param(lambda x, y: cross_entropy_loss(x, y, label_smoothing=0.1), _smp_smoothing, 1e-12, id="smoothing"),
        pytest.param(lambda x, y: focal_loss(x, y, gamma=1.5), _smp_focal, 1e-12, id="focal"),
        pytest.param(dice_loss, smp.DiceLoss("multiclass", ignore_index=255), 1e-12, id="dice"),
        pytest.param(
            tversky_loss, smp.TverskyLoss("multiclass", ignore_index=255, alpha=0.3, beta=0.7), 1e-12, id="tversky"
        ),
        pytest.param(lovasz_loss, _smp_lovasz, 2e-4, id="lovasz"),
    ],
)
def test_loss_and_gradient_are_those_of_segmentation_models_pytorch(ours: Loss, theirs: Loss, tolerance: float) -> None:
    for shape, size in (((2, 11, 15, 15), (60, 60)), ((1, 5, 9, 17), (33, 65))):
        logits, target = _draw(shape, (shape[0], *size))
        # theirs divides by all classes, so all have to occur
        assert len(target.unique()) == shape[1] + 1
        upsampled = F.interpolate(logits, size=size, mode="bilinear")
        _assert_equal(ours(logits, target), theirs(upsampled, target.long()), logits, tolerance=tolerance)


def test_hard_example_mining_is_cross_entropy_over_the_pixels_that_a_plain_sort_keeps() -> None:
    logits, target = _draw((2, 11, 15, 15), (2, 60, 60))
    labelled = target != 255
    for threshold, min_share in ((0.7, 0.0625), (1e-6, 0.25)):
        upsampled = F.interpolate(logits, size=(60, 60), mode="bilinear").movedim(1, -1)[labelled]
        losses = F.cross_entropy(upsampled, target[labelled].long(), reduction="none").sort(descending=True).values
        least = max(int((losses.exp() >= 1 / threshold).sum()), round(min_share * len(losses)))
        ours = ohem_loss(logits, target, threshold=threshold, min_share=min_share)
        assert least < len(losses)
        _assert_equal(ours, losses[:least].mean(), logits, tolerance=1e-12)
