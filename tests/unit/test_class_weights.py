"""Class weights: in the loss, as torch weighs; from the counts of a split, as their papers say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nestseg.core.types import SegLogits
from nestseg.losses.criterion import Criterion
from nestseg.ops.upsample_cross_entropy import sum_weights, upsample_cross_entropy


def draw_batch(num_classes: int, *, ignored: float = 0.3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    logits = 4 * torch.randn(2, num_classes, 5, 7, generator=generator, dtype=torch.float64)
    target = torch.randint(0, num_classes, (2, 19, 23), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    weights = 0.01 + 3 * torch.rand(num_classes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), target.byte(), weights


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("num_classes", [2, 19, 150])
def test_weighted_loss_and_gradient_are_those_of_torch_in_float64(num_classes, align_corners):
    logits, target, weights = draw_batch(num_classes)
    ours = upsample_cross_entropy(logits, target, class_weights=weights, align_corners=align_corners)
    upsampled = F.interpolate(logits, size=(19, 23), mode="bilinear", align_corners=align_corners)
    theirs = torch.nn.CrossEntropyLoss(weights, ignore_index=255)(upsampled, target.long())
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    (our_gradient,) = torch.autograd.grad(ours, logits)
    (their_gradient,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-10, atol=1e-15)
    assert abs(ours.item() / upsample_cross_entropy(logits, target, align_corners=align_corners).item() - 1) > 1e-3


def test_weighted_mean_of_two_pixels_is_the_hand_computed_value():
    # equal scores but one: losses ln 2 and ln(1 + e), weights 1 and 3
    logits = torch.tensor([[[[0.0, 1.0]], [[0.0, 0.0]]]], dtype=torch.float64)
    target = torch.tensor([[[0, 1]]])
    loss = upsample_cross_entropy(logits, target, class_weights=torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx((math.log(2) + 3 * math.log(1 + math.e)) / 4, rel=1e-12)


def test_scaling_all_weights_changes_nothing_and_ones_give_the_plain_mean():
    logits, target, weights = draw_batch(5)
    loss = upsample_cross_entropy(logits, target, class_weights=weights)
    assert upsample_cross_entropy(logits, target, class_weights=1e-4 * weights).item() == pytest.approx(loss.item())
    ones = upsample_cross_entropy(logits, target, class_weights=torch.ones(5))
    assert ones.item() == pytest.approx(upsample_cross_entropy(logits, target).item(), rel=1e-12)


@pytest.mark.parametrize("case", ["all ignored", "all of weight 0"])
def test_batch_in_which_nothing_counts_gives_zero_and_a_gradient_of_zeros(case):
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    target = torch.full((1, 8, 8), 255 if case == "all ignored" else 2, dtype=torch.uint8)
    loss = upsample_cross_entropy(logits, target, class_weights=torch.tensor([1.0, 2.0, 0.0]))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_ignored_value_other_than_255_is_left_out_of_the_weights_too():
    logits, target, weights = draw_batch(4, ignored=0)
    loss = upsample_cross_entropy(logits, target, class_weights=weights, ignore_index=1)
    upsampled = F.interpolate(logits, size=(19, 23), mode="bilinear")
    expected = F.cross_entropy(upsampled, target.long(), weights, ignore_index=1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_half_precision_logits_are_weighed_in_float32():
    logits, target, weights = draw_batch(6)
    loss = upsample_cross_entropy(logits.bfloat16(), target, class_weights=weights)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, upsample_cross_entropy(logits.bfloat16().float(), target, class_weights=weights.float()))


def test_wrong_number_of_weights_is_refused():
    logits, target, _ = draw_batch(6)
    with pytest.raises(ValueError, match=r"class weights of shape \(5,\); expected \(6,\)"):
        upsample_cross_entropy(logits, target, class_weights=torch.ones(5))


def test_both_heads_are_weighed():
    logits, target, weights = draw_batch(5)
    auxiliary = -logits[:, :, :3, :3]
    terms = Criterion(class_weights=weights)(SegLogits(logits, auxiliary), target)
    assert terms.auxiliary is not None
    assert torch.equal(terms.main, upsample_cross_entropy(logits, target, class_weights=weights))
    assert torch.equal(terms.auxiliary, upsample_cross_entropy(auxiliary, target, class_weights=weights))


def test_losses_of_the_parts_of_a_batch_times_their_weights_add_up_to_that_of_the_whole():
    logits, target, weights = draw_batch(5)
    target[1] = torch.where(target[1] == 0, 255, target[1])
    whole = upsample_cross_entropy(logits, target, class_weights=weights)
    total = sum(
        upsample_cross_entropy(logits[i : i + 1], target[i : i + 1], class_weights=weights)
        * sum_weights(target[i : i + 1], class_weights=weights)
        for i in range(2)
    )
    assert (total / sum_weights(target, class_weights=weights)).item() == pytest.approx(whole.item(), rel=1e-12)
