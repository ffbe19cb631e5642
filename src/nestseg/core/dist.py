"""The few collective operations that the loops need, the same with one process as with many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# None is torch's group of all ranks, which is one of gloo where they compute on processors
_host_group: dist.ProcessGroup | None = None


def use_host_group(group: dist.ProcessGroup) -> None:
    """Exchange what lies on the host through a group of gloo, where that of all ranks is one of NCCL."""
    global _host_group
    _host_group = group


def num_ranks() -> int:
    """Return how many processes share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add a tensor up over all processes; itself when there is one.

    Shape:
        - values: any, the same on each rank
        - returns: as values
    """
    if num_ranks() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def gather_from_ranks(value: T) -> list[T]:
    """Return what each process has, in the order of ranks, on all of them.

    Args:
        value: Anything that pickles.
    """
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value, group=_host_group)
    return values


def max_over_ranks(value: int) -> int:
    """Return the largest of a number that each process has; itself when there is one.

    For decisions that all have to take alike, such as whether to stop. It goes from host to host, so that no GPU is
    waited for, and fails after the time-out of the ranks where one of them does not answer.
    """
    if num_ranks() == 1:
        return value
    largest = torch.tensor(value)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_host_group)
    return int(largest)


def copy_from_first_rank(values: Iterable[Tensor]) -> None:
    """Overwrite tensors in place by those of rank 0; with one process, nothing.

    Args:
        values: As many and of the same shapes on each rank.

    Shape:
        - values: any
    """
    if num_ranks() > 1:
        for value in values:
            dist.broadcast(value, src=0)


def shares_of_pixels(weights: Sequence[Tensor]) -> list[Tensor | float]:
    """Weights that turn the means of parts into the mean over all pixels.

    A step's images are spread over R ranks and the parts that each runs one after another. Gradients of parts are added
    up, and averaged over ranks. With v counted pixels (or the sum of their weights) in a part, its mean loss times
    ``v * R / sum(v)``, the sum going over all parts of all ranks, becomes the loss over all pixels.

    Args:
        weights: Number of counted pixels of each part of this rank, or the sum of their weights.

    Returns:
        A factor a part: scalar tensors, or 1.0 where there is one part in all.

    Shape:
        - weights: ()
        - returns: ()
    """
    ranks = num_ranks()
    if ranks == len(weights) == 1:
        return [1.0]
    stacked = torch.stack(list(weights))
    total = sum_over_ranks(stacked.sum())
    return list((stacked * ranks / torch.where(total > 0, total, 1)).unbind())
