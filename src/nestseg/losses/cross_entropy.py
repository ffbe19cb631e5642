"""The training loss of every recipe: cross-entropy of the main and the auxiliary logits."""

from __future__ import annotations

from torch import Tensor

from nestseg.core.types import IGNORE_INDEX, LossTerms, SegLogits
from nestseg.ops.upsample_cross_entropy import upsample_cross_entropy


def segmentation_loss(
    logits: SegLogits,
    target: Tensor,
    *,
    auxiliary_weight: float = 0.4,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
) -> LossTerms:
    """Add the main loss and the weighted auxiliary loss.

    Args:
        logits: Main and auxiliary scores, each at its own stride.
        target: Train ids in [0, K), or ``ignore_index`` where a pixel does not count.
        auxiliary_weight: Factor of the auxiliary loss; the main loss has 1.
        class_weights: How much a pixel of each class counts in both losses; None counts all alike.
        ignore_index: The value of target pixels that do not count.
        align_corners: Grid rule by which logits are upsampled.

    Returns:
        ``total = main + auxiliary_weight * auxiliary``. Both parts are the means over labelled pixels (weighted
        ones with ``class_weights``), without their factors; without auxiliary logits the total is the main loss.

    Shape:
        - logits.main: (N, K, h, w) float
        - logits.auxiliary: (N, K, h', w') float or None
        - target: (N, H, W) uint8 or int64
        - class_weights: (K,) float
        - returns: three scalars, the last one None where there are no auxiliary logits

    Reference:
        Zhao, Shi, Qi, Wang, Jia, "Pyramid Scene Parsing Network", CVPR 2017, section 4 (auxiliary loss) and
        section 5.2 (its weight 0.4).

    Deviations:
        None known.

    Example:
        >>> import torch
        >>> target = torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> terms = segmentation_loss(SegLogits(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)), target)
        >>> [round(term.item(), 4) for term in terms]
        [0.9704, 0.6931, 0.6931]
    """
    main = upsample_cross_entropy(
        logits.main, target, class_weights=class_weights, ignore_index=ignore_index, align_corners=align_corners
    )
    if logits.auxiliary is None:
        return LossTerms(total=main, main=main, auxiliary=None)
    auxiliary = upsample_cross_entropy(
        logits.auxiliary, target, class_weights=class_weights, ignore_index=ignore_index, align_corners=align_corners
    )
    return LossTerms(total=main + auxiliary_weight * auxiliary, main=main, auxiliary=auxiliary)
