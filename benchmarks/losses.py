"""What does each loss cost a training step, beside plain cross-entropy?

Run ``python benchmarks/losses.py``; it writes ``results/<version>/losses.json``. Forward and backward of one term on a
thread: logits (2, 21, 64, 64) against targets of 512 x 512 that show seven classes in blocks, 5 % of their pixels
ignored. Figures are processor time of this process, which other work on the machine disturbs less than the wall clock:
the median of repeated calls, and the 10th and 90th percentile.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import torch

from nestseg.losses.criterion import LOSSES
from nestseg.version import __version__

REPEATS = 15
SHAPE, SIZE = (2, 21, 64, 64), (512, 512)


def ask_git(*words: str) -> str:
    command = ["git", *words]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def draw_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(SHAPE, generator=generator)
    coarse = 3 * torch.randint(0, SHAPE[1] // 3, (SHAPE[0], 8, 8), generator=generator)
    target = coarse.repeat_interleave(SIZE[0] // 8, 1).repeat_interleave(SIZE[1] // 8, 2)
    target[torch.rand(target.shape, generator=generator) < 0.05] = 255
    return logits.requires_grad_(), target.byte()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure(name: str) -> dict[str, object]:
    logits, target = draw_batch()
    times = []
    for repeat in range(REPEATS + 2):
        started = time.process_time()
        loss = LOSSES[name](logits, target)
        between = time.process_time()
        torch.autograd.grad(loss, logits)
        if repeat > 1:
            times.append((between - started, time.process_time() - started))
    total = np.array([both for _, both in times]) * 1e3
    return {
        "loss": name,
        "forward_ms": round(statistics.median(forward for forward, _ in times) * 1e3, 1),
        "forward_and_backward_ms": round(float(np.median(total)), 1),
        "p10_p90_ms": [round(float(value), 1) for value in np.percentile(total, (10, 90))],
    }


def main() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    load = os.getloadavg()[0]
    rows = [measure(name) for name in LOSSES]
    record = {
        "question": "What does each loss cost a training step, beside plain cross-entropy?",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": ask_git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(ask_git("status", "--porcelain", ":/src")),
        "machine": f"{processor()}, {os.cpu_count()} cores, one thread used",
        "load_average_before_and_after": [round(load, 2), round(os.getloadavg()[0], 2)],
        "versions": {
            "nestseg": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "torch": torch.__version__,
        },
        "logits": SHAPE,
        "target": SIZE,
        "repeats": REPEATS,
        "losses": rows,
    }
    path = Path(__file__).with_name("results") / __version__ / "losses.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
