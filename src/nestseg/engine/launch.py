"""The processes and devices of a run, on lightning-fabric."""

from __future__ import annotations

import os

import torch
from lightning_fabric import Fabric

from nestseg.build import choose_device


def launch(device: str) -> Fabric:
    """Join the run's processes: one, or as many as torchrun started.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Returns:
        A launched Fabric: its rank, world size and device are final.

    Raises:
        RunError: If the device is not there.
    """
    kind = choose_device(device).type
    # torchrun tells each process how many there are on this machine and how many machines there are
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    strategy = "ddp" if devices * nodes > 1 else "auto"
    fabric = Fabric(accelerator=kind, devices=devices, num_nodes=nodes, strategy=strategy, precision="32-true")
    fabric.launch()
    require_float32(fabric.device)
    return fabric


def require_float32(device: torch.device) -> None:
    """Keep CUDA from rounding the inputs of every convolution to TF32, so that scores do not depend on the GPU."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
