"""Cross-entropy: what every published recipe minimises."""

from __future__ import annotations

from torch import Tensor

from nestseg.core.types import IGNORE_INDEX
from nestseg.ops.upsample_cross_entropy import upsample_cross_entropy


def cross_entropy_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Average the negative log probability of each labelled pixel's class; `upsample_cross_entropy` by another name.

    Args:
        logits: Class scores at any stride.
        target: Train ids in [0, K), or ``ignore_index`` where a pixel does not count.
        class_weights: How much a pixel of each class counts in the mean, at least 0; None counts all alike.
        ignore_index: The value of target pixels that do not count.
        align_corners: Grid rule by which logits are upsampled.
        label_smoothing: In [0, 1): the share of a pixel's target that is spread evenly over all classes.

    Returns:
        The mean, weighted by class weights; 0 where nothing counts.

    Shape:
        - logits: (N, K, h, w) float
        - target: (N, H, W) uint8 or int64
        - class_weights: (K,) float
        - returns: () float

    Reference:
        See `upsample_cross_entropy`.

    Deviations:
        See `upsample_cross_entropy`.

    Example:
        >>> import torch
        >>> round(cross_entropy_loss(torch.zeros(1, 2, 4, 4), torch.zeros(1, 8, 8, dtype=torch.uint8)).item(), 4)
        0.6931
    """
    return upsample_cross_entropy(
        logits,
        target,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        align_corners=align_corners,
    )
