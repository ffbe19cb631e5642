from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nestseg.ops.upsample_argmax import upsample_argmax, upsample_argmax_confidence
from nestseg.ops.upsample_cross_entropy import upsample_cross_entropy


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_loss_of_two_pixels_is_the_hand_computed_value() -> None:
    logits = torch.tensor([[[[0.0, 1.0]], [[0.0, 3.0]]]], dtype=torch.float64)
    target = torch.tensor([[[1, 0]]])
    expected = (math.log(2) + math.log(1 + math.exp(2))) / 2
    assert upsample_cross_entropy(logits, target).item() == pytest.approx(expected, rel=1e-12)


def test_loss_upsamples_the_logits_and_not_the_probabilities() -> None:
    # The half-pixel rule turns the row (0, 4) into (0, 1, 3, 4); all pixels belong to class 0.
    logits = torch.tensor([[[[0.0, 4.0]], [[0.0, 0.0]]]], dtype=torch.float64)
    target = torch.zeros(1, 1, 4, dtype=torch.uint8)
    expected = sum(math.log(1 + math.exp(-score)) for score in (0, 1, 3, 4)) / 4
    assert upsample_cross_entropy(logits, target).item() == pytest.approx(expected, rel=1e-12)


def test_loss_with_aligned_corners_uses_the_other_grid() -> None:
    logits = torch.tensor([[[[0.0, 3.0]], [[0.0, 0.0]]]], dtype=torch.float64)
    target = torch.zeros(1, 1, 4, dtype=torch.uint8)
    expected = sum(math.log(1 + math.exp(-score)) for score in (0, 1, 2, 3)) / 4
    assert upsample_cross_entropy(logits, target, align_corners=True).item() == pytest.approx(expected, rel=1e-12)


def test_loss_divides_by_the_labelled_pixels_only() -> None:
    logits = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    target = torch.tensor([[[0, 255, 255, 1]]])
    assert upsample_cross_entropy(logits, target).item() == pytest.approx(math.log(2), rel=1e-12)


def test_loss_has_the_gradient_of_finite_differences(generator: torch.Generator) -> None:
    logits = torch.randn(2, 3, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 5, 4), generator=generator)
    target[0, :2] = 255
    assert torch.autograd.gradcheck(lambda x: upsample_cross_entropy(x, target), (logits,))


def test_loss_ignores_logits_at_ignored_pixels(generator: torch.Generator) -> None:
    logits = torch.randn(1, 3, 4, 4, generator=generator, requires_grad=True)
    target = torch.randint(0, 3, (1, 4, 4), generator=generator)
    ignored = torch.rand(1, 4, 4, generator=generator) < 0.5
    target[ignored] = 255
    loss = upsample_cross_entropy(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    other = torch.where(ignored[:, None], logits + 100, logits)
    assert torch.equal(upsample_cross_entropy(other, target), loss)
    assert (gradient.movedim(1, -1)[ignored] == 0).all()
    assert (gradient.movedim(1, -1)[~ignored] != 0).any()


def test_loss_is_zero_with_zero_gradient_when_every_pixel_is_ignored() -> None:
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = upsample_cross_entropy(logits, torch.full((2, 8, 8), 255, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_loss_is_the_same_for_byte_and_long_targets(generator: torch.Generator) -> None:
    logits = torch.randn(2, 150, 4, 4, generator=generator)
    target = torch.randint(0, 150, (2, 16, 16), generator=generator)
    target[:, 3] = 255
    assert torch.equal(upsample_cross_entropy(logits, target), upsample_cross_entropy(logits, target.byte()))


def test_loss_can_ignore_another_value() -> None:
    logits = torch.tensor([[[[5.0, 0.0]], [[0.0, 0.0]]]])
    target = torch.tensor([[[0, 1]]])
    assert upsample_cross_entropy(logits, target, ignore_index=0).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_half_precision_logits_is_computed_in_float32(dtype: torch.dtype, generator: torch.Generator) -> None:
    logits = torch.randn(1, 5, 4, 4, generator=generator).to(dtype)
    target = torch.randint(0, 5, (1, 16, 16), generator=generator)
    loss = upsample_cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, upsample_cross_entropy(logits.float(), target))


def test_loss_refuses_a_target_value_that_is_no_class() -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        upsample_cross_entropy(torch.zeros(1, 3, 2, 2), torch.full((1, 4, 4), 3))


@pytest.mark.parametrize("shape", [(2, 4, 4), (1, 1, 4, 4), (4, 4)])
def test_loss_refuses_targets_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \(N, K, h, w\) and \(N, H, W\)"):
        upsample_cross_entropy(torch.zeros(1, 3, 2, 2), torch.zeros(shape, dtype=torch.int64))


def test_loss_refuses_a_target_that_holds_no_train_ids() -> None:
    with pytest.raises(TypeError, match=r"torch\.float32; expected torch\.uint8 or torch\.int64"):
        upsample_cross_entropy(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4))


class _CalledOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_loss_calls_no_kernel_that_is_nondeterministic_on_cuda() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    with _CalledOps() as called:
        upsample_cross_entropy(logits, torch.zeros(1, 8, 8, dtype=torch.uint8)).backward()
    assert {"nll_loss_forward", "nll_loss_backward"} <= called.names
    assert not [name for name in called.names if "nll_loss2d" in name]


@pytest.mark.parametrize(
    ("size", "out"), [((5, 7), (33, 65)), ((16, 16), (64, 64)), ((9, 9), (4, 3)), ((1, 1), (3, 2))]
)
def test_labels_are_the_argmax_of_the_interpolated_logits(
    size: tuple[int, int], out: tuple[int, int], generator: torch.Generator
) -> None:
    logits = torch.randn(2, 21, *size, generator=generator, dtype=torch.float64)
    labels = upsample_argmax(logits, out)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), F.interpolate(logits, size=out, mode="bilinear").argmax(1))


def test_labels_can_follow_the_grid_with_aligned_corners(generator: torch.Generator) -> None:
    logits = torch.randn(1, 6, 5, 5, generator=generator, dtype=torch.float64)
    expected = F.interpolate(logits, size=(17, 17), mode="bilinear", align_corners=True).argmax(1)
    assert torch.equal(upsample_argmax(logits, (17, 17), align_corners=True).long(), expected)
    assert not torch.equal(upsample_argmax(logits, (17, 17)).long(), expected)


@pytest.mark.parametrize("num_classes", [2, 19, 255])
def test_equal_scores_go_to_the_lowest_train_id(num_classes: int) -> None:
    logits = torch.zeros(1, num_classes, 8, 8)
    logits[:, 0] = -1
    logits[:, 1, :, :4] = -1
    labels = upsample_argmax(logits, (8, 8))
    assert (labels[..., 4:] == 1).all()
    assert (labels[..., :4] == (2 if num_classes > 2 else 0)).all()


def test_the_highest_of_255_classes_fits_and_256_classes_do_not() -> None:
    logits = torch.zeros(1, 255, 2, 2)
    logits[:, 254] = 1
    assert (upsample_argmax(logits, (4, 4)) == 254).all()
    with pytest.raises(AssertionError, match="256 classes"):
        upsample_argmax(torch.zeros(1, 256, 2, 2), (4, 4))


def test_confidence_is_the_softmax_probability_of_the_label(generator: torch.Generator) -> None:
    logits = 3 * torch.randn(2, 11, 6, 5, generator=generator, dtype=torch.float64)
    labels, confidence = upsample_argmax_confidence(logits, (24, 21))
    expected = F.interpolate(logits, size=(24, 21), mode="bilinear").softmax(1).max(1)
    assert torch.equal(labels, upsample_argmax(logits, (24, 21)))
    torch.testing.assert_close(confidence, expected.values, rtol=1e-12, atol=0)


def test_confidence_is_finite_for_huge_scores_and_never_above_one() -> None:
    logits = torch.tensor([1e4, -1e4, 3e4]).reshape(1, 3, 1, 1)
    assert upsample_argmax_confidence(logits, (2, 2)).confidence.eq(1).all()


def test_labels_of_half_precision_logits_are_those_of_float32(generator: torch.Generator) -> None:
    logits = torch.randn(1, 19, 8, 8, generator=generator).bfloat16()
    assert torch.equal(upsample_argmax(logits, (31, 17)), upsample_argmax(logits.float(), (31, 17)))
    assert upsample_argmax_confidence(logits, (31, 17)).confidence.dtype == torch.float32
