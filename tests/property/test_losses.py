from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestseg.core.types import SegLogits
from nestseg.losses.criterion import LOSSES, Criterion
from nestseg.ops.upsample_cross_entropy import upsample_cross_entropy


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Many tiny tensors: waking a second thread costs more than it gives."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@st.composite
def _batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Logits and a target of unrelated sizes, with any share of ignored pixels."""
    num_images, num_classes = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    sides = st.integers(1, 9)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scale = draw(st.sampled_from([0.1, 3.0, 1e4]))
    logits = scale * torch.randn(
        num_images, num_classes, draw(sides), draw(sides), generator=generator, dtype=torch.float64
    )
    size = (num_images, draw(sides), draw(sides))
    target = torch.randint(0, num_classes, size, generator=generator)
    target[torch.rand(size, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 255
    return logits.requires_grad_(), target.byte()


all_losses = pytest.mark.parametrize("name", LOSSES)


@all_losses
@given(batch=_batches())
@settings(deadline=None, max_examples=30)
def test_loss_and_gradient_are_finite_and_the_loss_is_never_negative(name: str, batch: tuple[Tensor, Tensor]) -> None:
    logits, target = batch
    loss = LOSSES[name](logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert 0 <= loss.item() < float("inf")
    assert gradient.isfinite().all()
    if (target == 255).all():
        assert loss.item() == 0
        assert (gradient == 0).all()


@all_losses
@given(batch=_batches())
@settings(deadline=None, max_examples=30)
def test_loss_and_gradient_of_single_precision_are_finite_too(name: str, batch: tuple[Tensor, Tensor]) -> None:
    logits, target = batch[0].detach().float().requires_grad_(), batch[1]
    loss = LOSSES[name](logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert 0 <= loss.item() < float("inf")
    assert gradient.isfinite().all()


@all_losses
@given(batch=_batches())
@settings(deadline=None, max_examples=30)
def test_loss_ignores_logits_at_ignored_pixels(name: str, batch: tuple[Tensor, Tensor]) -> None:
    logits, target = batch
    full = torch.nn.functional.interpolate(logits.detach(), size=target.shape[1:], mode="bilinear")
    full.requires_grad_()
    loss = LOSSES[name](full, target)
    (gradient,) = torch.autograd.grad(loss, full)
    ignored = (target == 255)[:, None]
    noise = torch.randn(full.shape, generator=torch.Generator().manual_seed(0), dtype=full.dtype)
    assert torch.equal(LOSSES[name](torch.where(ignored, 1e3 * noise, full), target), loss)
    assert (gradient.masked_select(ignored) == 0).all()


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"boundary"}))
@given(batch=_batches(), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_loss_does_not_see_where_a_pixel_lies(name: str, batch: tuple[Tensor, Tensor], seed: int) -> None:
    logits, target = batch
    full = torch.nn.functional.interpolate(logits.detach(), size=target.shape[1:], mode="bilinear")
    pixels = torch.randperm(target.numel(), generator=torch.Generator().manual_seed(seed))
    rows = full.movedim(1, -1).reshape(-1, full.shape[1])[pixels]
    shuffled = rows.T[None, :, None]
    loss = LOSSES[name](full, target).item()
    assert abs(LOSSES[name](shuffled, target.flatten()[pixels][None, None]).item() - loss) <= 1e-9 * max(1.0, loss)


@all_losses
@given(batch=_batches(), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=30)
def test_loss_does_not_care_how_classes_are_numbered(name: str, batch: tuple[Tensor, Tensor], seed: int) -> None:
    logits, target = batch
    numbers = torch.randperm(logits.shape[1], generator=torch.Generator().manual_seed(seed))
    renumbered = torch.where(target == 255, 255, numbers.argsort()[torch.where(target == 255, 0, target).long()])
    loss = LOSSES[name](logits, target).item()
    assert abs(LOSSES[name](logits[:, numbers], renumbered).item() - loss) <= 1e-9 * max(1.0, loss)


@all_losses
@given(batch=_batches(), sure=st.sampled_from([50.0, 1e3]))
@settings(deadline=None, max_examples=30)
def test_loss_of_a_perfect_prediction_is_all_but_zero(name: str, batch: tuple[Tensor, Tensor], sure: float) -> None:
    logits, target = batch
    truth = torch.where(target == 255, 0, target).long()
    perfect = sure * torch.nn.functional.one_hot(truth, logits.shape[1]).movedim(-1, 1).double()
    assert 0 <= LOSSES[name](perfect, target).item() < 1e-12


@pytest.mark.parametrize("name", ["dice", "tversky", "lovasz"])
@given(batch=_batches())
@settings(deadline=None, max_examples=30)
def test_overlap_losses_are_at_most_one(name: str, batch: tuple[Tensor, Tensor]) -> None:
    assert LOSSES[name](*batch).item() <= 1 + 1e-12


@given(_batches(), st.floats(0.01, 1), st.floats(0.01, 1))
@settings(deadline=None, max_examples=50)
def test_hard_pixels_lose_at_least_as_much_as_all(
    batch: tuple[Tensor, Tensor], threshold: float, min_share: float
) -> None:
    hard = LOSSES["ohem"](*batch, threshold=threshold, min_share=min_share).item()
    loss = upsample_cross_entropy(*batch).item()
    assert hard >= loss - 1e-9 * max(1.0, loss)


@given(_batches(), st.floats(0, 5))
@settings(deadline=None, max_examples=50)
def test_focal_loss_is_at_most_cross_entropy(batch: tuple[Tensor, Tensor], gamma: float) -> None:
    loss = upsample_cross_entropy(*batch).item()
    assert LOSSES["focal"](*batch, gamma=gamma).item() <= loss + 1e-9 * max(1.0, loss)


@given(_batches())
@settings(deadline=None, max_examples=50)
def test_loss_is_the_mean_over_labelled_pixels_of_each_image_by_itself(batch: tuple[Tensor, Tensor]) -> None:
    logits, target = batch
    counts = [int((one != 255).sum()) for one in target]
    parts = [
        upsample_cross_entropy(logits[index : index + 1], target[index : index + 1]).item() * count
        for index, count in enumerate(counts)
    ]
    expected = sum(parts) / max(sum(counts), 1)
    assert abs(upsample_cross_entropy(logits, target).item() - expected) <= 1e-9 * max(1.0, expected)


@given(_batches(), st.floats(-50, 50))
@settings(deadline=None, max_examples=50)
def test_loss_does_not_change_when_all_classes_get_the_same_bonus(batch: tuple[Tensor, Tensor], bonus: float) -> None:
    logits, target = batch
    loss = upsample_cross_entropy(logits, target).item()
    assert abs(upsample_cross_entropy(logits + bonus, target).item() - loss) <= 1e-9 * max(1.0, loss)


@given(_batches(), st.floats(0, 2))
@settings(deadline=None, max_examples=50)
def test_total_loss_grows_linearly_with_the_auxiliary_weight(batch: tuple[Tensor, Tensor], weight: float) -> None:
    logits, target = batch
    terms = Criterion(auxiliary_weight=weight)(SegLogits(logits, -logits), target)
    assert terms.auxiliary is not None
    expected = terms.main.item() + weight * terms.auxiliary.item()
    assert abs(terms.total.item() - expected) <= 1e-12 * max(1.0, expected)
