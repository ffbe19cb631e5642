"""The few collective operations that the loops need, the same with one process as with many."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add a tensor up over all processes; itself when there is one.

    Shape:
        - values: any, the same on each rank
        - returns: as values
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def copy_from_first_rank(values: Iterable[Tensor]) -> None:
    """Overwrite tensors in place by those of rank 0; with one process, nothing.

    Args:
        values: As many and of the same shapes on each rank.

    Shape:
        - values: any
    """
    if dist.is_available() and dist.is_initialized():
        for value in values:
            dist.broadcast(value, src=0)


def share_of_pixels(weight: Tensor) -> Tensor | float:
    """Weight that turns the mean of rank means into the mean over all pixels.

    Gradients are averaged over ranks. With v_r counted pixels (or the sum of their weights) on rank r of R, the loss of
    rank r times v_r * R / sum(v) averages to the loss over the pixels of all ranks.

    Args:
        weight: () number of counted pixels on this rank, or the sum of their weights.

    Returns:
        The weight: a scalar tensor, or 1.0 with one process.

    Shape:
        - weight: ()
        - returns: ()
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 1.0
    total = sum_over_ranks(weight)
    return weight * dist.get_world_size() / torch.where(total > 0, total, 1)
