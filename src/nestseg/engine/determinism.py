"""The same bits every time: kernels whose result does not depend on which thread was first."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nestseg.core.errors import RunError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""The environment variable by which cuBLAS is told to give equal bits; it is read when CUDA starts."""
_WORKSPACES = (":4096:8", ":16:8")
_NO_KERNEL = "does not have a deterministic implementation"


@contextmanager
def use_deterministic_kernels() -> Iterator[None]:
    """Let torch use deterministic kernels only, and refuse operations that have none; settings of before come back.

    To be entered before anything runs on a GPU.

    Raises:
        RunError: E-RUN-070 if cuBLAS cannot be told any more; E-RUN-071 if an operation inside has no such kernel.

    Reference:
        PyTorch's documentation of `torch.use_deterministic_algorithms`, and NVIDIA's of cuBLAS, "Results
        reproducibility".
    """
    workspace = os.environ.get(WORKSPACE)
    if workspace not in _WORKSPACES and (workspace is not None or torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        raise RunError(
            "E-RUN-070",
            f"deterministic kernels, but {WORKSPACE} "
            + ("is not set and CUDA has started" if workspace is None else f"is {workspace!r}"),
            fix=f"set it before the start: export {WORKSPACE}={_WORKSPACES[0]}",
        )
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    os.environ[WORKSPACE] = workspace or _WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    # it times kernels, and takes another whenever another was faster
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if _NO_KERNEL not in str(error):
            raise
        operation = str(error).partition(_NO_KERNEL)[0].strip()
        raise RunError(
            "E-RUN-071",
            f"{operation} has no deterministic kernel on this device",
            fix="compute.deterministic=false, or a network without this operation",
        ) from error
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        # the variable stays: it is read once, when cuBLAS starts, and a later run must find it set
