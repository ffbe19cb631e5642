"""Lovasz-softmax: a convex surrogate of one minus the IoU of each class."""

from __future__ import annotations

import torch
from torch import Tensor

from nestseg.core.types import IGNORE_INDEX
from nestseg.ops.pixel_scores import mark_classes, upsample_scores


def lovasz_loss(
    logits: Tensor, target: Tensor, *, ignore_index: int = IGNORE_INDEX, align_corners: bool = False
) -> Tensor:
    """Average the Lovasz extension of the Jaccard loss over the classes that occur.

    Class weights have no place in it: each class counts the same, however few pixels it has.

    Args:
        logits: Class scores at any stride.
        target: Train ids in [0, K), or ``ignore_index`` where a pixel does not count.
        ignore_index: The value of target pixels that do not count.
        align_corners: Grid rule by which logits are upsampled.

    Returns:
        The mean, in [0, 1]; 0 where nothing is labelled.

    Shape:
        - logits: (N, K, h, w) float
        - target: (N, H, W) uint8 or int64
        - returns: () float

    Reference:
        Berman, Rannen Triki, Blaschko, "The Lovasz-Softmax Loss: A Tractable Surrogate for the Optimization of the
        Intersection-over-Union Measure in Neural Networks", CVPR 2018, equations 8, 9 and 11, algorithm 1.

    Deviations:
        Algorithm 1 takes differences of neighbouring Jaccard losses; here they are written out, which loses no digits:
        in float32 and among 10^6 pixels, such a difference is not far above the rounding of what is subtracted. Counts
        are integers, whose cumulative sum is the same on every run on CUDA too. Pixels are sorted over a device's part
        of a batch, as the authors' code does by default, so that with several parts (devices, accumulation) the loss is
        the mean of the parts' losses by labelled pixels, not that of the whole batch.

    Example:
        >>> round(lovasz_loss(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]])).item(), 4)
        0.5
    """
    scores, classes = upsample_scores(logits, target, align_corners=align_corners)
    labelled = classes != ignore_index
    # a class a row, so that what is sorted lies side by side
    marks = mark_classes(classes, num_classes=scores.shape[1], ignore_index=ignore_index).T.contiguous()
    probabilities = scores.softmax(1).T.contiguous()
    errors = torch.where(labelled, torch.where(marks, 1 - probabilities, probabilities), 0)
    # The extension is linear as long as the order of the errors stays: its gradient is all that is needed of the order.
    slopes = torch.stack([_jaccard_slopes(*row, labelled) for row in zip(errors.detach(), marks, strict=True)])
    # a class that does not occur has slopes of 0
    return (errors * slopes).sum() / marks.any(1).sum().clamp(min=1)


def _jaccard_slopes(errors: Tensor, marks: Tensor, labelled: Tensor) -> Tensor:
    """Return how the Jaccard loss of a class grows with each pixel, when pixels turn wrong by descending error.

    Shape:
        - errors: (P,) float, at least 0
        - marks: (P,) bool, pixels of the class
        - labelled: (P,) bool
        - returns: (P,) float, of what is not labelled without meaning
    """
    # Non-negative floats are ordered as their bits are, and integers are sorted four times as fast on CPU. What is not
    # labelled comes last. Stable, so that pixels with equal errors are in the same order on every run.
    bits = errors.view({torch.float32: torch.int32, torch.float64: torch.int64}[errors.dtype])
    order = torch.where(labelled, -bits, 1).sort(stable=True).indices
    wrong_ones = marks[order].cumsum(0)
    places = torch.arange(1, len(order) + 1, device=order.device)
    intersection = (wrong_ones[-1] - wrong_ones).to(errors.dtype)
    union = (wrong_ones[-1] + places - wrong_ones).to(errors.dtype)
    # one more wrong pixel of the class takes 1 from the intersection, any other adds 1 to the union
    slopes = torch.where(marks[order], 1, intersection / (union - 1).clamp(min=1)) / union.clamp(min=1)
    return torch.empty_like(errors).scatter_(0, order, slopes)
