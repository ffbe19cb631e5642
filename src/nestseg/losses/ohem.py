"""Online hard example mining: cross-entropy over the pixels that are hardest now."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nestseg.core.types import IGNORE_INDEX
from nestseg.ops.pixel_scores import average_pixels, check_class_weights, upsample_scores, weigh_pixels


def ohem_loss(
    logits: Tensor,
    target: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    align_corners: bool = False,
    threshold: float = 0.7,
    min_share: float = 0.0625,
) -> Tensor:
    """Average the cross-entropy over the pixels whose class has at most a probability, and at least over a share.

    Args:
        logits: Class scores at any stride.
        target: Train ids in [0, K), or ``ignore_index`` where a pixel does not count.
        class_weights: How much a kept pixel of each class counts in the mean, at least 0; None counts all alike. They
            do not decide which pixels are kept.
        ignore_index: The value of target pixels that do not count.
        align_corners: Grid rule by which logits are upsampled.
        threshold: In (0, 1]: pixels whose class has at most this probability are kept. 1 is cross-entropy.
        min_share: In (0, 1]: at least so large a share of the labelled pixels is kept, the hardest; pixels as hard as
            the last of them too.

    Returns:
        The mean over the kept pixels, weighted by class weights; 0 where nothing counts.

    Shape:
        - logits: (N, K, h, w) float
        - target: (N, H, W) uint8 or int64
        - class_weights: (K,) float
        - returns: () float

    Reference:
        Shrivastava, Gupta, Girshick, "Training Region-based Object Detectors with Online Hard Example Mining", CVPR
        2016, for detection. For pixels, with the threshold that is raised where it would keep too few: Wu, Shen, van
        den Hengel, "High-performance Semantic Segmentation Using Very Deep Fully Convolutional Networks", 2016, on
        online bootstrapping.

    Deviations:
        The least number of pixels is a share, the same for any crop and batch; mmsegmentation has 100,000 an image.
        Threshold 0.7 is its default, 1/16 that of the well-known re-implementation of BiSeNet. The divisor is what the
        kept pixels weigh; mmsegmentation divides by all pixels. Pixels are chosen among those of one device's part of
        a batch, so that with several parts (devices, accumulation) the loss is the mean of the parts' losses by
        labelled pixels, not that of the whole batch.

    Example:
        >>> logits = torch.tensor([[[[0.0, 5.0]], [[0.0, 0.0]]]])
        >>> round(ohem_loss(logits, torch.zeros(1, 1, 2, dtype=torch.uint8)).item(), 4)  # the second pixel is easy
        0.6931
    """
    scores, classes = upsample_scores(logits, target, align_corners=align_corners)
    check_class_weights(class_weights, num_classes=scores.shape[1])
    losses = F.cross_entropy(scores, classes, ignore_index=ignore_index, reduction="none")
    with torch.no_grad():
        # ignored pixels have loss 0 and come last. A sort, since only the device knows how many are wanted.
        hardest = losses.sort(descending=True).values
        least = (min_share * (classes != ignore_index).sum()).round().long().clamp(min=1)
        limit = hardest.gather(0, least[None] - 1).clamp(max=-math.log(threshold))
        kept = losses >= limit
    weights = weigh_pixels(classes, class_weights=class_weights, ignore_index=ignore_index)
    return average_pixels(losses, weights * kept)
