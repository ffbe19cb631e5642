"""Tversky loss: the overlap of each class, with a price for false positives and another for false negatives."""

from __future__ import annotations

import torch
from torch import Tensor

from nestseg.core.types import IGNORE_INDEX
from nestseg.ops.pixel_scores import mark_classes, upsample_scores


def tversky_loss(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
    alpha: float = 0.3,
    beta: float = 0.7,
    exponent: float = 1.0,
) -> Tensor:
    """Average 1 - TP / (TP + alpha * FP + beta * FN) over the classes that occur, with probabilities as counts.

    Class weights have no place in it: each class counts the same, however few pixels it has.

    Args:
        logits: Class scores at any stride.
        target: Train ids in [0, K), or ``ignore_index`` where a pixel does not count.
        ignore_index: The value of target pixels that do not count.
        align_corners: Grid rule by which logits are upsampled.
        alpha: Above 0: what a false positive costs.
        beta: Above 0: what a false negative costs; above alpha it asks for recall. Both 0.5 is the Dice loss, both 1
            the soft Jaccard loss.
        exponent: Above 0: power of a class's loss before the mean. Below 1 classes that are nearly right keep a larger
            gradient; 0.75 is the focal Tversky loss.

    Returns:
        The mean, in [0, 1]; 0 where nothing is labelled.

    Shape:
        - logits: (N, K, h, w) float
        - target: (N, H, W) uint8 or int64
        - returns: () float

    Reference:
        Salehi, Erdogmus, Gholipour, "Tversky Loss Function for Image Segmentation Using 3D Fully Convolutional Deep
        Networks", MLMI 2017, section 2 (Tversky loss layer); alpha 0.3 and beta 0.7 are their best. The exponent:
        Abraham, Khan, "A Novel Focal Tversky Loss Function with Improved Attention U-Net for Lesion Segmentation", ISBI
        2019, section 2, where it is written 1 / gamma with gamma 4/3, and alpha is the price of false negatives.

    Deviations:
        Theirs is for one class and background; here each class is a class against the rest. Counts are those of all
        pixels of a device's part of a batch, not of an image, and classes that do not occur there are left out of the
        mean; segmentation_models_pytorch counts them as 0 and divides by all classes. With several parts (devices,
        accumulation) the loss is the mean of the parts' losses by labelled pixels, not that of the whole batch.

    Example:
        >>> target = torch.tensor([[[0, 1]]])
        >>> round(tversky_loss(torch.zeros(1, 2, 1, 2), target).item(), 4)  # TP, FP and FN are 0.5 for both
        0.5
    """
    scores, classes = upsample_scores(logits, target, align_corners=align_corners)
    marks = mark_classes(classes, num_classes=scores.shape[1], ignore_index=ignore_index)
    probabilities = torch.where((classes != ignore_index)[:, None], scores.softmax(1), 0)
    hits = torch.where(marks, probabilities, 0).sum(0)
    sizes = marks.sum(0)
    misses = alpha * (probabilities.sum(0) - hits) + beta * (sizes - hits)
    present = sizes > 0
    # Rounding may leave a little below 0 of a class that is perfect, and a power below 1 has no derivative at 0.
    losses = (misses / torch.where(present, hits + misses, 1)).clamp(min=torch.finfo(misses.dtype).tiny) ** exponent
    return torch.where(present, losses, 0).sum() / present.sum().clamp(min=1)
