"""Cross-entropy of low-resolution logits against a full-resolution target."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestseg.core.types import IGNORE_INDEX
from nestseg.ops.pixel_scores import check_class_weights, upsample_scores, weigh_pixels


def upsample_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
) -> Tensor:
    """Upsample logits to the target's size and average the cross-entropy over the labelled pixels.

    A batch without a labelled pixel, or with labelled pixels of weight 0 only, gives 0 and a gradient of zeros, where a
    plain mean would give NaN.

    Args:
        logits: Class scores at any stride. Half precision is widened to float32 before upsampling.
        target: Train ids in [0, K), or ``ignore_index`` where a pixel does not count.
        class_weights: How much a pixel of each class counts in the mean, at least 0; None counts all alike.
        label_smoothing: In [0, 1): the share of a pixel's target that is spread evenly over all classes.
        ignore_index: The value of target pixels that do not count.
        align_corners: Grid rule of the bilinear upsampling; True only for weights trained that way.

    Returns:
        A scalar of the logits' dtype, at least float32.

    Shape:
        - logits: (N, K, h, w) float
        - target: (N, H, W) uint8 or int64
        - class_weights: (K,) float
        - returns: () float

    Raises:
        ValueError: If the shapes do not belong together.
        TypeError: If the target is neither uint8 nor int64.
        IndexError: On CPU, if a target value is outside [0, K) and not ``ignore_index``. CUDA only asserts on
            the device, so the loader checks targets before they get there.

    Reference:
        Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015,
        section 4 (per-pixel multinomial logistic loss, masked pixels left out). Szegedy, Vanhoucke, Ioffe, Shlens,
        Wojna, "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, section 7 (label smoothing).

    Deviations:
        The divisor is the number of labelled pixels, as in the published recipes; mmsegmentation divides by
        all pixels unless ``avg_non_ignore`` is set. With class weights it is the sum of the labelled pixels'
        weights, as in ``torch.nn.CrossEntropyLoss``; and as there, what smoothing adds for a class counts with that
        class's weight.

    Example:
        >>> logits = torch.zeros(1, 2, 4, 4)
        >>> target = torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> round(upsample_cross_entropy(logits, target).item(), 4)
        0.6931
    """
    scores, classes = upsample_scores(logits, target, align_corners=align_corners)
    check_class_weights(class_weights, num_classes=scores.shape[1])
    if class_weights is not None:
        class_weights = class_weights.to(scores)
    total = F.cross_entropy(
        scores,
        classes,
        class_weights,
        ignore_index=ignore_index,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    if class_weights is None:
        return total / sum_weights(classes, ignore_index=ignore_index).clamp(min=1)
    divisor = sum_weights(classes, class_weights=class_weights, ignore_index=ignore_index)
    # smoothing alone would leave something where all pixels have weight 0
    return torch.where(divisor > 0, total / torch.where(divisor > 0, divisor, 1), 0)


def sum_weights(target: Tensor, *, class_weights: Tensor | None = None, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return what the loss of a target is divided by.

    Means of parts, each times its divisor, add up to the mean of the whole times its own: so losses of several devices
    become the loss of all their pixels.

    Args:
        target: Train ids, or ``ignore_index``.
        class_weights: See `upsample_cross_entropy`.
        ignore_index: The value of target pixels that do not count.

    Returns:
        The number of labelled pixels, or the sum of their classes' weights. Nothing is read back to the host.

    Shape:
        - target: any, uint8 or int64
        - class_weights: (K,) float
        - returns: () int64, or float with class weights

    Example:
        >>> target = torch.tensor([0, 1, 1, 255])
        >>> sum_weights(target).item(), sum_weights(target, class_weights=torch.tensor([1.0, 0.25])).item()
        (3, 1.5)
    """
    return weigh_pixels(target, class_weights=class_weights, ignore_index=ignore_index).sum()
