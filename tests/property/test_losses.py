from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestseg.core.types import SegLogits
from nestseg.losses.cross_entropy import segmentation_loss
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


@given(_batches())
@settings(deadline=None, max_examples=50)
def test_loss_and_gradient_are_finite_and_the_loss_is_never_negative(batch: tuple[Tensor, Tensor]) -> None:
    logits, target = batch
    loss = upsample_cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert 0 <= loss.item() < float("inf")
    assert gradient.isfinite().all()
    if (target == 255).all():
        assert loss.item() == 0
        assert (gradient == 0).all()


@given(_batches())
@settings(deadline=None, max_examples=50)
def test_loss_ignores_logits_at_ignored_pixels(batch: tuple[Tensor, Tensor]) -> None:
    logits, target = batch
    full = torch.nn.functional.interpolate(logits.detach(), size=target.shape[1:], mode="bilinear")
    full.requires_grad_()
    loss = upsample_cross_entropy(full, target)
    (gradient,) = torch.autograd.grad(loss, full)
    ignored = (target == 255)[:, None]
    noise = torch.randn(full.shape, generator=torch.Generator().manual_seed(0), dtype=full.dtype)
    assert torch.equal(upsample_cross_entropy(torch.where(ignored, 1e3 * noise, full), target), loss)
    assert (gradient.masked_select(ignored) == 0).all()


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
    terms = segmentation_loss(SegLogits(logits, -logits), target, auxiliary_weight=weight)
    assert terms.auxiliary is not None
    expected = terms.main.item() + weight * terms.auxiliary.item()
    assert abs(terms.total.item() - expected) <= 1e-12 * max(1.0, expected)
