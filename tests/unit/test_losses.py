from __future__ import annotations

import math

import pytest
import torch

from nestseg.core.types import SegLogits
from nestseg.losses.cross_entropy import segmentation_loss
from nestseg.ops.upsample_cross_entropy import upsample_cross_entropy


@pytest.fixture
def target() -> torch.Tensor:
    return torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(1)).byte()


def test_total_is_main_plus_four_tenths_of_auxiliary(target: torch.Tensor) -> None:
    logits = SegLogits(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2))
    terms = segmentation_loss(logits, target)
    assert terms.auxiliary is not None
    assert torch.equal(terms.main, upsample_cross_entropy(logits.main, target))
    assert torch.equal(terms.auxiliary, upsample_cross_entropy(torch.Tensor(logits.auxiliary), target))
    assert terms.total.item() == pytest.approx(terms.main.item() + 0.4 * terms.auxiliary.item(), rel=1e-6)


def test_total_is_the_main_loss_without_auxiliary_logits(target: torch.Tensor) -> None:
    terms = segmentation_loss(SegLogits(torch.randn(2, 3, 4, 4), None), target)
    assert terms.auxiliary is None
    assert torch.equal(terms.total, terms.main)


def test_auxiliary_weight_and_ignored_value_are_passed_on() -> None:
    logits = SegLogits(torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2))
    target = torch.tensor([[[0, 1]]])
    terms = segmentation_loss(logits, target, auxiliary_weight=3.0, ignore_index=1)
    assert terms.total.item() == pytest.approx(4 * math.log(2))
    nothing = segmentation_loss(logits, torch.full_like(target, 7), ignore_index=7)
    assert [term.item() for term in nothing if term is not None] == [0, 0, 0]


def test_both_losses_upsample_by_the_rule_that_is_asked_for(target: torch.Tensor) -> None:
    logits = SegLogits(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2))
    terms = segmentation_loss(logits, target, align_corners=True)
    assert terms.auxiliary is not None
    assert torch.equal(terms.main, upsample_cross_entropy(logits.main, target, align_corners=True))
    auxiliary = upsample_cross_entropy(torch.Tensor(logits.auxiliary), target, align_corners=True)
    assert torch.equal(terms.auxiliary, auxiliary)


def test_gradient_reaches_both_heads_in_their_proportion(target: torch.Tensor) -> None:
    scores = torch.randn(2, 3, 4, 4)
    main, auxiliary = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    segmentation_loss(SegLogits(main, auxiliary), target, auxiliary_weight=0.25).total.backward()
    assert main.grad is not None
    assert auxiliary.grad is not None
    assert main.grad.abs().sum() > 0
    torch.testing.assert_close(auxiliary.grad, main.grad / 4)
