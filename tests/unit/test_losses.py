"""The criterion: what is added up with which factors, for both heads."""

from __future__ import annotations

import pytest
import torch

from nestseg.core.types import SegLogits
from nestseg.losses.boundary import boundary_loss
from nestseg.losses.criterion import CLASS_WEIGHTED, LOSSES, Criterion, LossTerm
from nestseg.losses.dice import dice_loss
from nestseg.losses.tversky import tversky_loss
from nestseg.ops.upsample_cross_entropy import upsample_cross_entropy

CROSS_ENTROPY = LossTerm("cross_entropy")


@pytest.fixture
def target() -> torch.Tensor:
    return torch.randint(0, 3, (2, 16, 16), generator=torch.Generator().manual_seed(1)).byte()


def test_total_is_main_plus_four_tenths_of_auxiliary(target: torch.Tensor) -> None:
    logits = SegLogits(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2))
    terms = Criterion()(logits, target)
    assert terms.auxiliary is not None
    assert torch.equal(terms.main, upsample_cross_entropy(logits.main, target))
    assert torch.equal(terms.auxiliary, upsample_cross_entropy(torch.Tensor(logits.auxiliary), target))
    assert terms.total.item() == pytest.approx(terms.main.item() + 0.4 * terms.auxiliary.item(), rel=1e-6)


def test_total_is_the_main_loss_without_auxiliary_logits(target: torch.Tensor) -> None:
    terms = Criterion()(SegLogits(torch.randn(2, 3, 4, 4), None), target)
    assert terms.auxiliary is None
    assert torch.equal(terms.total, terms.main)


def test_auxiliary_weight_is_passed_on_and_a_batch_without_labels_gives_zeros() -> None:
    logits = SegLogits(torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2))
    target = torch.tensor([[[0, 1]]])
    criterion = Criterion(auxiliary_weight=3.0)
    assert criterion(logits, target).total.item() == pytest.approx(4 * 0.693147, rel=1e-6)
    nothing = criterion(logits, torch.full_like(target, 255))
    assert [term.item() for term in nothing if term is not None] == [0, 0, 0]


@pytest.mark.parametrize("name", LOSSES)
def test_both_losses_upsample_by_the_rule_that_is_asked_for(name: str, target: torch.Tensor) -> None:
    logits = SegLogits(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2))
    terms = Criterion(terms=(LossTerm(name),), align_corners=True)(logits, target)
    assert terms.auxiliary is not None
    assert torch.equal(terms.main, LOSSES[name](logits.main, target, align_corners=True))
    assert torch.equal(terms.auxiliary, LOSSES[name](logits.auxiliary, target, align_corners=True))
    assert not torch.equal(terms.main, LOSSES[name](logits.main, target))


def test_gradient_reaches_both_heads_in_their_proportion(target: torch.Tensor) -> None:
    scores = torch.randn(2, 3, 4, 4)
    main, auxiliary = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    Criterion(auxiliary_weight=0.25)(SegLogits(main, auxiliary), target).total.backward()
    assert main.grad is not None
    assert auxiliary.grad is not None
    assert main.grad.abs().sum() > 0
    torch.testing.assert_close(auxiliary.grad, main.grad / 4)


@pytest.mark.parametrize("weighted", [False, True])
def test_plain_cross_entropy_and_its_gradient_are_not_one_bit_off(target: torch.Tensor, weighted: bool) -> None:
    class_weights = torch.tensor([0.3, 1.7, 2.2]) if weighted else None
    ours, theirs = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    loss = Criterion(class_weights=class_weights)(SegLogits(ours.requires_grad_(), None), target).total
    expected = upsample_cross_entropy(theirs.requires_grad_(), target, class_weights=class_weights)
    loss.backward()
    expected.backward()
    assert torch.equal(loss, expected)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_terms_are_added_up_with_their_weights_and_options(target: torch.Tensor) -> None:
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    terms = (CROSS_ENTROPY, LossTerm("tversky", 0.5, {"alpha": 0.4, "exponent": 0.75}), LossTerm("boundary", 0.01))
    expected = (
        upsample_cross_entropy(logits, target)
        + 0.5 * tversky_loss(logits, target, alpha=0.4, exponent=0.75)
        + 0.01 * boundary_loss(logits, target)
    )
    assert Criterion(terms=terms)(SegLogits(logits, None), target).total.item() == pytest.approx(expected.item())


def test_class_weights_act_on_means_over_pixels_only(target: torch.Tensor) -> None:
    logits, weights = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0.2, 1.0, 3.0])
    for name in CLASS_WEIGHTED:
        criterion = Criterion(terms=(LossTerm(name), LossTerm("dice")), class_weights=weights)
        expected = LOSSES[name](logits, target, class_weights=weights) + dice_loss(logits, target)
        assert criterion(SegLogits(logits, None), target).total.item() == pytest.approx(expected.item(), rel=1e-12)
        assert abs(expected.item() - (LOSSES[name](logits, target) + dice_loss(logits, target)).item()) > 1e-3


@pytest.mark.parametrize(
    ("terms", "weights", "answer"),
    [
        ((), None, "no loss; name at least one of cross_entropy, ohem"),
        ((LossTerm("dyce"),), None, "no loss is called dyce: did you mean dice?"),
        ((LossTerm("dice", 0.0),), None, "dice has weight 0.0; allowed above 0"),
        ((LossTerm("dice", float("nan")),), None, "dice has weight nan"),
        ((LossTerm("dice"), LossTerm("lovasz")), torch.ones(3), "class weights, but none of the losses they act on"),
    ],
)
def test_a_criterion_that_makes_no_sense_is_refused(
    terms: tuple[LossTerm, ...], weights: torch.Tensor | None, answer: str
) -> None:
    with pytest.raises(ValueError, match=answer):
        Criterion(terms=terms, class_weights=weights)


@pytest.mark.parametrize(
    ("term", "weighted"),
    [
        (LossTerm("cross_entropy"), False),
        (LossTerm("cross_entropy"), True),
        (LossTerm("cross_entropy", 1.0, {"label_smoothing": 0.1}), True),
        (LossTerm("focal"), False),
        (LossTerm("focal"), True),
        (LossTerm("boundary"), False),
    ],
)
def test_losses_of_parts_by_what_they_count_are_that_of_the_whole_batch(term: LossTerm, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(3, 4, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (3, 12, 11), generator=generator)
    target[0, :9] = 255
    target[1, target[1] == 2] = 255
    class_weights = torch.tensor([0.2, 1.0, 3.0, 0.7], dtype=torch.float64) if weighted else None
    criterion = Criterion(terms=(term,), class_weights=class_weights)
    parts = [slice(0, 1), slice(1, 3)]
    counts = [criterion.sum_weights(target[part]) for part in parts]
    losses = [criterion(SegLogits(logits[part], None), target[part]).total for part in parts]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert mean.item() == pytest.approx(criterion(SegLogits(logits, None), target).total.item(), rel=1e-12)
    assert abs(losses[0].item() - losses[1].item()) > 1e-3
