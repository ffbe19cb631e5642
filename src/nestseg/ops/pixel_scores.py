"""Logits and their target as rows, a pixel a row: what every loss starts from.

Rows, because the spatial form of torch's cross-entropy has no deterministic CUDA kernel. For the same reason nothing
here or in the losses sums floats by index (``scatter_add``, ``index_add``, ``bincount`` with weights) or along a line
(``cumsum``): on CUDA the order of those additions is not fixed. Sums by class are sums over masks; counts are integers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nestseg.core.types import IGNORE_INDEX


def upsample_scores(logits: Tensor, target: Tensor, *, align_corners: bool = False) -> tuple[Tensor, Tensor]:
    """Upsample logits to the target's size, and lay both out as rows.

    Args:
        logits: Class scores at any stride. Half precision is widened to float32 before upsampling.
        target: Train ids in [0, K), or a value for pixels that do not count.
        align_corners: Grid rule of the bilinear upsampling; True only for weights trained that way.

    Returns:
        Scores, of the logits' dtype, at least float32; and classes. Row by row, images after each other, P = N * H * W.

    Shape:
        - logits: (N, K, h, w) float
        - target: (N, H, W) uint8 or int64
        - returns: (P, K) float, (P,) int64

    Raises:
        ValueError: If the shapes do not belong together.
        TypeError: If the target is neither uint8 nor int64.

    Example:
        >>> scores, classes = upsample_scores(torch.zeros(1, 2, 4, 4), torch.zeros(1, 8, 8, dtype=torch.uint8))
        >>> scores.shape, classes.dtype
        (torch.Size([64, 2]), torch.int64)
    """
    if logits.ndim != 4 or target.ndim != 3 or logits.shape[0] != target.shape[0]:
        given = f"logits {tuple(logits.shape)} and target {tuple(target.shape)}"
        raise ValueError(f"{given}; expected (N, K, h, w) and (N, H, W)")
    if target.dtype not in (torch.uint8, torch.int64):
        raise TypeError(f"target is {target.dtype}; expected torch.uint8 or torch.int64")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    # Channels last, so that the upsampled scores of a pixel lie side by side: flattening is then a view, and
    # softmax reads memory in order. Forward and backward of (2, 150, 64, 64) to 512 x 512 on 2 CPU threads:
    # 563 ms against 837 ms for NCHW.
    logits = logits.contiguous(memory_format=torch.channels_last)
    scores = F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=align_corners)
    return scores.permute(0, 2, 3, 1).reshape(-1, scores.shape[1]), target.reshape(-1).long()


def mark_classes(classes: Tensor, *, num_classes: int, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Say of which class each pixel is; of none where it is ignored.

    Shape:
        - classes: (P,) int64
        - returns: (P, K) bool

    Raises:
        RuntimeError: On CPU, if a class is outside [0, K) and not ``ignore_index``; CUDA asserts on the device.

    Example:
        >>> mark_classes(torch.tensor([1, 255]), num_classes=2).tolist()
        [[False, True], [False, False]]
    """
    labelled = (classes != ignore_index)[:, None]
    marks = torch.zeros(len(classes), num_classes, dtype=torch.bool, device=classes.device)
    return marks.scatter_(1, torch.where(labelled, classes[:, None], 0), True) & labelled


def weigh_pixels(target: Tensor, *, class_weights: Tensor | None = None, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Say how much each pixel counts in a mean.

    Args:
        target: Train ids, or ``ignore_index``.
        class_weights: How much a pixel of each class counts, at least 0; None counts all alike.
        ignore_index: The value of target pixels that do not count.

    Returns:
        The weight of each pixel's class, 0 where it is ignored; without class weights True and False.

    Shape:
        - target: any, uint8 or int64
        - class_weights: (K,) float
        - returns: as target, bool, or float with class weights
    """
    labelled = target != ignore_index
    if class_weights is None:
        return labelled
    # ignored pixels look up class 0, and then count 0
    weights = class_weights[torch.where(labelled, target, 0).long()]
    return torch.where(labelled, weights, 0)


def check_class_weights(class_weights: Tensor | None, *, num_classes: int) -> None:
    """Refuse class weights that are not one a class.

    Shape:
        - class_weights: (K,) float

    Raises:
        ValueError: If there is another number of them than classes.
    """
    if class_weights is not None and class_weights.shape != (num_classes,):
        raise ValueError(f"class weights of shape {tuple(class_weights.shape)}; expected ({num_classes},)")


def average_pixels(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean; 0, with a gradient of zeros, where nothing counts.

    Shape:
        - values: (P,) float
        - weights: (P,) bool or float, at least 0
        - returns: () float
    """
    divisor = weights.sum()
    return (values * weights).sum() / torch.where(divisor > 0, divisor, 1)
