"""Focal loss: cross-entropy that counts a pixel less, the surer its class is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestseg.core.types import IGNORE_INDEX
from nestseg.ops.pixel_scores import average_pixels, check_class_weights, upsample_scores, weigh_pixels


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
    gamma: float = 2.0,
) -> Tensor:
    """Average (1 - p)^gamma * -log(p) over the labelled pixels, with p the probability of a pixel's class.

    Args:
        logits: Class scores at any stride.
        target: Train ids in [0, K), or ``ignore_index`` where a pixel does not count.
        class_weights: The paper's alpha: how much a pixel of each class counts in the mean, at least 0; None counts
            all alike.
        ignore_index: The value of target pixels that do not count.
        align_corners: Grid rule by which logits are upsampled.
        gamma: At least 0; the larger, the less sure pixels count. 0 is cross-entropy.

    Returns:
        The mean, weighted by class weights; 0 where nothing counts.

    Shape:
        - logits: (N, K, h, w) float
        - target: (N, H, W) uint8 or int64
        - class_weights: (K,) float
        - returns: () float

    Reference:
        Lin, Goyal, Girshick, He, Dollar, "Focal Loss for Dense Object Detection", ICCV 2017, section 3.2,
        equations 4 and 5; gamma 2 is their best.

    Deviations:
        The probability is a softmax over the classes; theirs is a sigmoid a class. The divisor is that of
        cross-entropy, the weights of the labelled pixels; theirs is the number of boxes that match an object.

    Example:
        >>> loss = focal_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 8, 8, dtype=torch.uint8))
        >>> round(loss.item(), 4)  # a quarter of log 2
        0.1733
    """
    scores, classes = upsample_scores(logits, target, align_corners=align_corners)
    check_class_weights(class_weights, num_classes=scores.shape[1])
    losses = F.cross_entropy(scores, classes, ignore_index=ignore_index, reduction="none")
    # 1 - exp(-loss) without cancellation where p is near 1. A power below 1 has no derivative at 0.
    doubts = (-torch.expm1(-losses)).clamp(min=torch.finfo(losses.dtype).tiny)
    weights = weigh_pixels(classes, class_weights=class_weights, ignore_index=ignore_index)
    return average_pixels(doubts**gamma * losses, weights)
