"""Dice loss: one minus the overlap of each class."""

from __future__ import annotations

from torch import Tensor

from nestseg.core.types import IGNORE_INDEX
from nestseg.losses.tversky import tversky_loss


def dice_loss(
    logits: Tensor, target: Tensor, *, ignore_index: int = IGNORE_INDEX, align_corners: bool = False
) -> Tensor:
    """Average 1 - 2 * TP / (2 * TP + FP + FN) over the classes that occur, with probabilities as counts.

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
        Milletari, Navab, Ahmadi, "V-Net: Fully Convolutional Neural Networks for Volumetric Medical Image
        Segmentation", 3DV 2016, section 3.

    Deviations:
        Probabilities in the denominator are not squared, as in Drozdzal et al., "The Importance of Skip Connections in
        Biomedical Image Segmentation", 2016, and in segmentation_models_pytorch; V-Net and mmsegmentation square them.
        Nothing is added against division by 0, since only classes that occur are in the mean; of classes and parts of
        a batch see `tversky_loss`.

    Example:
        >>> import torch
        >>> round(dice_loss(torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 1]]])).item(), 4)
        0.5
    """
    # equal prices of one half: TP / (TP + FP / 2 + FN / 2)
    return tversky_loss(logits, target, ignore_index=ignore_index, align_corners=align_corners, alpha=0.5, beta=0.5)
