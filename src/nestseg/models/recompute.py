"""Less memory for more time: parts of a network whose inner results are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_in_backward(module: nn.Module) -> None:
    """Keep what a module is given and gives, and forget what it computes in between until the backward pass.

    Gradients and BatchNorm statistics are the same to the last bit, since a second computation repeats the random draws
    of the first and does not change buffers. State-dict keys stay as they are. Done twice it is the same as once.

    Args:
        module: Changed in place. If it or what follows writes to a tensor that it is given, torch refuses the backward
            pass; lists of tensors may be written to.

    Reference:
        Chen, Xu, Zhang, Guestrin, "Training Deep Nets with Sublinear Memory Cost", 2016, section 4.

    Deviations:
        None known.
    """
    # a bound method and no closure: a deep copy of the module is then bound to the copy
    module.forward = MethodType(_run, module)


def _run(module: nn.Module, *args: Any) -> Any:
    if not torch.is_grad_enabled():
        return type(module).forward(module, *args)
    forward, args = partial(_forward, module), _copy_lists(args)
    if torch.compiler.is_compiling():
        # the compiler plans itself what it computes again, and writes every buffer once
        return checkpoint(forward, *args, use_reentrant=False)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_make_contexts, module))


def _forward(module: nn.Module, *args: Any) -> Any:
    return type(module).forward(module, *_copy_lists(args))


def _copy_lists(values: tuple[Any, ...]) -> tuple[Any, ...]:
    # HRNet's modules write into the lists that they are given, DenseNet's blocks extend those that they give
    return tuple(list(value) if isinstance(value, list) else value for value in values)


def _make_contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what surrounds the first computation, and every further one."""
    return nullcontext(), _buffers_kept(module)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Let a module write to copies of its buffers.

    BatchNorm without its running statistics would do as well, but saves other tensors than with them, which torch
    refuses.
    """
    kept = [(part, name, buffer) for part in module.modules() for name, buffer in part.named_buffers(recurse=False)]
    for part, name, buffer in kept:
        setattr(part, name, buffer.clone())
    try:
        yield
    finally:
        for part, name, buffer in kept:
            setattr(part, name, buffer)
