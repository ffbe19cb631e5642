"""Each loss against values computed by hand or straight from its definition, and what all of them promise."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nestseg.losses.boundary import boundary_loss, measure_distances
from nestseg.losses.criterion import CLASS_WEIGHTED, LOSSES
from nestseg.losses.cross_entropy import cross_entropy_loss
from nestseg.losses.dice import dice_loss
from nestseg.losses.focal import focal_loss
from nestseg.losses.lovasz import lovasz_loss
from nestseg.losses.ohem import ohem_loss
from nestseg.losses.tversky import tversky_loss
from nestseg.ops.upsample_cross_entropy import upsample_cross_entropy

VARIANTS = [
    *((name, {}) for name in LOSSES),
    ("cross_entropy", {"label_smoothing": 0.2}),
    ("ohem", {"threshold": 0.3, "min_share": 0.5}),
    ("focal", {"gamma": 0.5}),
    ("tversky", {"alpha": 1.0, "beta": 1.0, "exponent": 0.75}),
]
all_losses = pytest.mark.parametrize(("name", "options"), VARIANTS)


def logits_of(probabilities: list[list[float]]) -> torch.Tensor:
    """Scores of one image of one row, of which softmax makes these probabilities, a pixel a list."""
    return torch.tensor(probabilities, dtype=torch.float64).log().T[None, :, None]


def draw_batch(
    num_classes: int = 5, *, ignored: float = 0.3, size: tuple[int, int] = (11, 13)
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_classes)
    logits = 3 * torch.randn(2, num_classes, 4, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(0, num_classes, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return logits.requires_grad_(), target.byte()


# cross-entropy


def test_label_smoothing_of_one_pixel_is_the_hand_computed_value():
    loss = cross_entropy_loss(logits_of([[0.7, 0.2, 0.1]]), torch.tensor([[[0]]]), label_smoothing=0.3)
    # the target is 0.8, 0.1, 0.1
    assert loss.item() == pytest.approx(-0.8 * math.log(0.7) - 0.1 * math.log(0.2) - 0.1 * math.log(0.1), rel=1e-12)


def test_smoothing_alone_leaves_nothing_where_every_pixel_has_weight_zero():
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    target = torch.full((1, 4, 4), 2, dtype=torch.uint8)
    loss = cross_entropy_loss(logits, target, class_weights=torch.tensor([1.0, 1.0, 0.0]), label_smoothing=0.5)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert (gradient == 0).all()


# focal


def test_focal_loss_of_two_pixels_is_the_hand_computed_value():
    logits, target = logits_of([[0.9, 0.1], [0.75, 0.25]]), torch.tensor([[[0, 1]]])
    first, second = -(0.1**2) * math.log(0.9), -(0.75**2) * math.log(0.25)
    assert focal_loss(logits, target).item() == pytest.approx((first + second) / 2, rel=1e-12)
    weighted = focal_loss(logits, target, class_weights=torch.tensor([1.0, 3.0]))
    assert weighted.item() == pytest.approx((first + 3 * second) / 4, rel=1e-12)


def test_focal_loss_without_focus_is_cross_entropy():
    logits, target = draw_batch()
    weights = torch.rand(5, dtype=torch.float64)
    for class_weights in (None, weights):
        loss = focal_loss(logits, target, class_weights=class_weights, gamma=0.0)
        expected = upsample_cross_entropy(logits, target, class_weights=class_weights)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("score", [20.0, 100.0, 1e4, -1e4])
def test_gradient_of_focal_loss_is_finite_where_a_pixel_is_sure(gamma, score):
    logits = torch.tensor([[[[score]], [[0.0]]]], requires_grad=True)
    loss = focal_loss(logits, torch.zeros(1, 3, 3, dtype=torch.uint8), gamma=gamma)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    if score > 0:
        assert gradient.abs().max() < 1e-3


# online hard example mining

HARDNESS = [0.95, 0.9, 0.8, 0.6, 0.3]


@pytest.mark.parametrize(
    ("threshold", "min_share", "kept"),
    [(0.7, 0.2, 2), (0.7, 0.6, 3), (0.7, 0.01, 2), (0.1, 0.01, 1), (0.1, 0.4, 2), (0.92, 0.2, 4), (1.0, 0.2, 5)],
)
def test_ohem_keeps_pixels_below_the_threshold_and_at_least_a_share(threshold, min_share, kept):
    logits = logits_of([[p, 1 - p] for p in HARDNESS])
    loss = ohem_loss(logits, torch.zeros(1, 1, 5, dtype=torch.uint8), threshold=threshold, min_share=min_share)
    assert loss.item() == pytest.approx(-sum(map(math.log, HARDNESS[-kept:])) / kept, rel=1e-12)


def test_ohem_counts_its_share_among_labelled_pixels():
    logits = logits_of([[p, 1 - p] for p in [0.01, 0.02, *HARDNESS, 0.03]])
    target = torch.tensor([[[255, 255, 0, 0, 0, 0, 0, 255]]])
    loss = ohem_loss(logits, target, threshold=0.1, min_share=0.4)
    assert loss.item() == pytest.approx(-(math.log(0.6) + math.log(0.3)) / 2, rel=1e-12)


def test_ohem_keeps_all_pixels_that_are_equally_hard():
    logits = torch.zeros(1, 2, 1, 4, requires_grad=True)
    loss = ohem_loss(logits, torch.zeros(1, 1, 4, dtype=torch.uint8), threshold=0.1, min_share=0.25)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert len(gradient.unique()) == 2


def test_ohem_weighs_what_it_keeps_but_does_not_choose_by_weights():
    logits, target = logits_of([[0.6, 0.4], [0.7, 0.3], [0.1, 0.9]]), torch.tensor([[[0, 1, 1]]])
    loss = ohem_loss(logits, target, class_weights=torch.tensor([10.0, 1.0]), threshold=0.5, min_share=0.6)
    # kept are 0.3 (class 1) and 0.6 (class 0)
    assert loss.item() == pytest.approx(-(10 * math.log(0.6) + math.log(0.3)) / 11, rel=1e-12)


def test_ohem_at_its_limits_is_cross_entropy():
    logits, target = draw_batch()
    expected = upsample_cross_entropy(logits, target).item()
    assert ohem_loss(logits, target, threshold=1.0).item() == pytest.approx(expected, rel=1e-12)
    assert ohem_loss(logits, target, threshold=1e-9, min_share=1.0).item() == pytest.approx(expected, rel=1e-12)


# overlaps

PROBABILITIES = [[0.8, 0.2], [0.4, 0.6], [0.3, 0.7]]


def test_tversky_loss_of_three_pixels_is_the_hand_computed_value():
    # class 0: hits 0.8 + 0.4, false positives 0.3, false negatives 0.2 + 0.6; class 1: 0.7, 0.2 + 0.6, 0.3
    first, second = 1.2 / (1.2 + 0.3 * 0.3 + 0.7 * 0.8), 0.7 / (0.7 + 0.3 * 0.8 + 0.7 * 0.3)
    logits, target = logits_of(PROBABILITIES), torch.tensor([[[0, 0, 1]]])
    assert tversky_loss(logits, target).item() == pytest.approx(1 - (first + second) / 2, rel=1e-12)
    focal = tversky_loss(logits, target, exponent=0.75)
    assert focal.item() == pytest.approx(((1 - first) ** 0.75 + (1 - second) ** 0.75) / 2, rel=1e-12)


def test_dice_loss_of_three_pixels_is_the_hand_computed_value():
    first, second = 2.4 / (2.4 + 0.3 + 0.8), 1.4 / (1.4 + 0.8 + 0.3)
    loss = dice_loss(logits_of(PROBABILITIES), torch.tensor([[[0, 0, 1]]]))
    assert loss.item() == pytest.approx(1 - (first + second) / 2, rel=1e-12)


@pytest.mark.parametrize("exponent", [0.1, 0.75, 1.0, 2.0])
@pytest.mark.parametrize("score", [20.0, 1e4])
def test_gradient_of_tversky_loss_is_finite_where_all_is_right(exponent, score):
    target = torch.tensor([[[0, 0, 1, 1, 1]]])
    logits = (score * F.one_hot(target, 3).movedim(-1, 1)).float().requires_grad_()
    loss = tversky_loss(logits, target, exponent=exponent)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert 0 <= loss.item() < 0.2
    assert gradient.isfinite().all()


def test_tversky_loss_with_equal_full_prices_is_the_soft_jaccard_loss():
    logits, target = draw_batch(ignored=0)
    probabilities = F.interpolate(logits, size=target.shape[1:], mode="bilinear").softmax(1)
    truth = F.one_hot(target.long(), 5).movedim(-1, 1)
    intersection = (probabilities * truth).sum((0, 2, 3))
    union = (probabilities + truth).sum((0, 2, 3)) - intersection
    expected = (1 - intersection / union).mean()
    assert tversky_loss(logits, target, alpha=1.0, beta=1.0).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("loss", [dice_loss, tversky_loss, lovasz_loss])
def test_a_class_that_does_not_occur_is_left_out_of_the_mean(loss):
    # what class 2 is given is missing elsewhere, and that is all
    probabilities = [[0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.1, 0.8]]
    only_first = loss(logits_of(probabilities[:1]), torch.tensor([[[0]]]))
    if loss is not lovasz_loss:
        beta = 0.5 if loss is dice_loss else 0.7
        assert only_first.item() == pytest.approx(1 - 0.7 / (0.7 + beta * 0.3), rel=1e-12)
    two = loss(logits_of(probabilities), torch.tensor([[[0, 1, 255]]]))
    without = loss(logits_of(probabilities[:2]), torch.tensor([[[0, 1]]]))
    assert two.item() == pytest.approx(without.item(), rel=1e-12)


# Lovasz


def jaccard_loss(truth: set[int], wrong: set[int]) -> float:
    """1 - IoU of a class whose pixels are ``truth``, when the pixels ``wrong`` are labelled wrong; equation 6."""
    return len(wrong) / len(truth | wrong)


def lovasz_by_definition(probabilities: np.ndarray, classes: np.ndarray) -> float:
    """Equations 8, 9 and 11, with sets."""
    losses = []
    for value in np.unique(classes):
        truth = set(np.flatnonzero(classes == value).tolist())
        errors = np.where(classes == value, 1 - probabilities[:, value], probabilities[:, value])
        order = np.argsort(-errors, kind="stable").tolist()
        steps = [jaccard_loss(truth, set(order[:count])) for count in range(len(order) + 1)]
        losses.append(
            sum(errors[i] * (after - before) for i, (before, after) in zip(order, pairwise(steps), strict=True))
        )
    return float(np.mean(losses))


def test_lovasz_loss_of_three_pixels_is_the_hand_computed_value():
    # Both classes have the errors 0.6, 0.3, 0.2, of the second, third and first pixel. As these turn wrong, the Jaccard
    # loss of class 0, pixels one and two, is 1/2, 2/3, 1, and of class 1, the third pixel, 1/2, 1, 1.
    loss = lovasz_loss(logits_of(PROBABILITIES), torch.tensor([[[0, 0, 1]]]))
    first = 0.6 * 1 / 2 + 0.3 * (2 / 3 - 1 / 2) + 0.2 * (1 - 2 / 3)
    second = 0.6 * 1 / 2 + 0.3 * (1 - 1 / 2) + 0.2 * (1 - 1)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-12)


@pytest.mark.parametrize("num_classes", [1, 2, 5, 9])
def test_lovasz_loss_is_that_of_its_definition(num_classes):
    logits, target = draw_batch(num_classes)
    target[target == 1] = 0  # a class that does not occur
    upsampled = F.interpolate(logits.detach(), size=target.shape[1:], mode="bilinear").softmax(1)
    labelled = (target != 255).flatten().numpy()
    rows = upsampled.movedim(1, -1).reshape(-1, num_classes).numpy()[labelled]
    expected = lovasz_by_definition(rows, target.flatten().numpy()[labelled])
    assert lovasz_loss(logits, target).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_lovasz_loss_of_sure_predictions_is_one_minus_the_mean_iou():
    generator = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 4, (1, 9, 9), generator=generator)
    target = torch.where(torch.rand(1, 9, 9, generator=generator) < 0.6, labels, 3 - labels)
    logits = 1e3 * F.one_hot(labels, 4).movedim(-1, 1).double()
    ious = [((labels == k) & (target == k)).sum() / ((labels == k) | (target == k)).sum() for k in range(4)]
    assert lovasz_loss(logits, target).item() == pytest.approx(1 - sum(ious).item() / 4, rel=1e-6)


def test_lovasz_loss_of_many_pixels_keeps_its_digits_in_float32():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(1, 3, 700, 700, generator=generator)
    target = torch.randint(0, 3, (1, 700, 700), generator=generator)
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (ours,) = torch.autograd.grad(lovasz_loss(single, target), single)
    (exact,) = torch.autograd.grad(lovasz_loss(double, target), double)
    # a few pixels with all but equal errors change places
    assert ((ours - exact).abs() > 1e-4 * exact.abs().max()).float().mean() < 1e-4


# boundary


def distances_by_definition(target: np.ndarray, num_classes: int) -> np.ndarray:
    distances = np.zeros((*target.shape, num_classes))
    positions = {value: np.argwhere(target == value) for value in np.unique(target) if value != 255}
    for place, own in np.ndenumerate(target):
        for value in positions:
            others = [positions[other] for other in positions if (other != own if value == own else other == value)]
            if own != 255 and others and len(positions) > 1:
                nearest = min(np.hypot(*(points - place).T).min() for points in others)
                distances[(*place, value)] = max(nearest - 0.5, 0)
    return distances


@pytest.mark.parametrize("num_classes", [1, 2, 4])
def test_distances_are_those_to_the_nearest_pixel_across_the_boundary(num_classes):
    generator = np.random.default_rng(num_classes)
    coarse = generator.integers(0, num_classes, (4, 5))
    target = coarse.repeat(3, 0).repeat(4, 1)
    target[generator.random(target.shape) < 0.2] = 255
    for dtype in (np.uint8, np.int64):
        distances = measure_distances(target.astype(dtype), num_classes + 1)
        assert distances.dtype == np.float32
        np.testing.assert_allclose(distances, distances_by_definition(target, num_classes + 1), rtol=1e-5)


def test_distances_are_the_same_bits_wherever_their_arrays_lie_in_memory():
    target = (np.add.outer(np.arange(37) ** 2, np.arange(53) ** 2) > 700).astype(np.uint8)
    junk = [np.empty(size, np.uint8) for size in range(1, 4000, 7)]
    seen = set()
    for keep in range(100):
        del junk[keep::90]
        seen.add(measure_distances(target.copy(), 2).tobytes())
    assert len(seen) == 1


def test_distances_end_at_the_largest():
    distances = measure_distances(np.array([[0] * 1500 + [1]]), 2)
    assert distances[0, [476, 475, 0], 0].tolist() == [1023.5, 1023.5, 1023.5]
    assert distances[0, 477, 0] == 1022.5


def test_boundary_loss_of_a_row_is_the_hand_computed_value():
    # distances 1.5, 0.5 | 0.5 to either class; each pixel counts for both classes
    loss = boundary_loss(logits_of(PROBABILITIES), torch.tensor([[[0, 0, 1]]]))
    first = 1.5 * 0.2 + 0.5 * 0.6 + 0.5 * 0.3
    second = 1.5 * 0.2 + 0.5 * 0.6 + 0.5 * 0.3
    assert loss.item() == pytest.approx((first + second) / 3, rel=1e-6)


def test_boundary_loss_has_the_gradient_of_the_integral_over_the_signed_distance():
    logits, target = draw_batch(3, ignored=0)
    probabilities = F.interpolate(logits, size=target.shape[1:], mode="bilinear").softmax(1)
    distances = torch.from_numpy(np.stack([distances_by_definition(one, 3) for one in target.numpy()])).movedim(-1, 1)
    inside = F.one_hot(target.long(), 3).movedim(-1, 1).bool()
    integral = (torch.where(inside, -distances, distances) * probabilities).sum() / target.numel()
    (ours,) = torch.autograd.grad(boundary_loss(logits, target), logits)
    (theirs,) = torch.autograd.grad(integral, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_boundary_loss_is_zero_where_there_is_no_boundary():
    target = torch.zeros(2, 6, 6, dtype=torch.uint8)
    target[1] = 255
    assert boundary_loss(torch.randn(2, 3, 2, 2), target).item() == 0


def test_ignored_pixels_between_two_classes_are_no_boundary():
    assert measure_distances(np.array([[0, 255, 255, 1]]), 2).tolist() == [[[2.5, 2.5], [0, 0], [0, 0], [2.5, 2.5]]]


# what all of them promise


@all_losses
def test_gradient_is_that_of_finite_differences(name, options):
    logits, target = draw_batch(3, size=(7, 6))
    weights = {"class_weights": torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)} if name in CLASS_WEIGHTED else {}
    for align_corners in (False, True):
        assert torch.autograd.gradcheck(
            lambda x, align_corners=align_corners: LOSSES[name](
                x, target, align_corners=align_corners, **weights, **options
            ),
            (logits,),
        )


@all_losses
def test_loss_is_zero_with_zero_gradient_when_every_pixel_is_ignored(name, options):
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = LOSSES[name](logits, torch.full((2, 8, 8), 255, dtype=torch.uint8), **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("name", CLASS_WEIGHTED)
def test_loss_is_zero_with_zero_gradient_when_nothing_has_weight(name):
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    target = torch.full((1, 8, 8), 2, dtype=torch.uint8)
    loss = LOSSES[name](logits, target, class_weights=torch.tensor([1.0, 1.0, 0.0]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert (gradient == 0).all()


@all_losses
def test_loss_is_the_same_for_byte_and_long_targets_and_for_another_ignored_value(name, options):
    logits, target = draw_batch()
    loss = LOSSES[name](logits, target, **options)
    assert torch.equal(LOSSES[name](logits, target.long(), **options), loss)
    other = torch.where(target == 255, 77, target.long())
    assert torch.equal(LOSSES[name](logits, other, ignore_index=77, **options), loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@all_losses
def test_half_precision_logits_are_widened(name, options, dtype):
    logits, target = draw_batch()
    loss = LOSSES[name](logits.to(dtype), target, **options)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, LOSSES[name](logits.to(dtype).float(), target, **options))


@all_losses
def test_float32_is_within_rounding_of_float64(name, options):
    logits, target = draw_batch(21, size=(40, 40))
    single = LOSSES[name](logits.detach().float(), target, **options)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(LOSSES[name](logits.detach(), target, **options).item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_what_makes_no_sense_is_refused(name):
    logits = torch.zeros(1, 3, 2, 2)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        LOSSES[name](logits, torch.full((1, 4, 4), 3))
    with pytest.raises(ValueError, match=r"expected \(N, K, h, w\) and \(N, H, W\)"):
        LOSSES[name](logits, torch.zeros(2, 4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"expected torch\.uint8 or torch\.int64"):
        LOSSES[name](logits, torch.zeros(1, 4, 4))
    if name in CLASS_WEIGHTED:
        with pytest.raises(ValueError, match=r"class weights of shape \(4,\); expected \(3,\)"):
            LOSSES[name](logits, torch.zeros(1, 4, 4, dtype=torch.uint8), class_weights=torch.ones(4))


@all_losses
def test_loss_is_the_same_bits_every_time(name, options):
    logits, target = draw_batch(size=(64, 64))
    runs = []
    for _ in range(2):
        loss = LOSSES[name](logits, target, **options)
        runs.append((loss, *torch.autograd.grad(loss, logits)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


# On CUDA torch refuses them under `use_deterministic_algorithms`, or makes them deterministic only then. The backward
# pass of bilinear upsampling is left out: `F.interpolate` takes another way there when determinism is asked for.
NONDETERMINISTIC = {
    "nll_loss2d_forward",
    "nll_loss2d_backward",
    "scatter_add",
    "scatter_add_",
    "scatter_reduce",
    "index_add",
    "index_add_",
    "index_copy",
    "index_put",
    "index_put_",
    "_unsafe_index_put",
    "_index_put_impl_",
    "put_",
    "bincount",
    "histc",
    "kthvalue",
    "median",
    "masked_scatter",
    "gather_backward",
    "index_select_backward",
    "embedding_dense_backward",
    "repeat_interleave",
}


class _CalledOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.float_sums_along_a_line = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.add(name)
        self.float_sums_along_a_line += name in ("cumsum", "cumprod") and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


@all_losses
def test_loss_calls_no_kernel_that_is_nondeterministic_on_cuda(name, options):
    """F13, T32."""
    logits, target = draw_batch()
    weights = {"class_weights": torch.rand(5)} if name in CLASS_WEIGHTED else {}
    with _CalledOps() as called:
        LOSSES[name](logits, target, **weights, **options).backward()
    assert len(called.names) > 10
    assert not called.names & NONDETERMINISTIC
    assert not called.float_sums_along_a_line


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"boundary"}))
def test_loss_reads_nothing_back_to_the_host(name):
    logits = torch.empty(2, 5, 4, 4, device="meta", requires_grad=True)
    target = torch.empty(2, 16, 16, device="meta", dtype=torch.uint8)
    LOSSES[name](logits, target).backward()
    assert logits.grad is not None
