"""What does the training engine cost beside a bare loop, and how long does a checkpoint hold training up?

Run ``python benchmarks/engine.py``; it writes ``results/<version>/engine.json``.

Overhead: one network takes steps on the same batch by turns, once in a bare PyTorch loop (loss, backward, optimizer)
and once in the engine (guard, gradient norm, log, meter, signals, the same loss and optimizer). Each turn starts from
the same weights. Figures are processor time of this process on one thread, which other work disturbs less
than the wall clock: medians of the pairs' ratios, with their 10th and 90th percentile.

Stall: seconds of wall time that `Job.save` takes, disk flushes and hashes included, beside the steps between two
checkpoints at the default interval.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from nestseg.core.types import Batch
from nestseg.engine import train as engine
from nestseg.engine.job import Job, open_job, scheduled_lr
from nestseg.engine.log import Meter
from nestseg.engine.ranks import heartbeat
from nestseg.engine.stop import StopRequest
from nestseg.optim import set_lr
from nestseg.recipes import resolve_recipe
from nestseg.version import __version__

# from small to large; all on drawn pictures
CASES = {
    "demo (ResNeSt-14, 4 x 128x256)": ("demo", []),
    "ResNeSt-50-D16 FCN, 4 x 128x256": (
        "fcn_resnest50-d16_toystreets",
        ["data.batch_size=4", "data.crop_size=[128, 256]"],
    ),
}
PAIRS = {"demo (ResNeSt-14, 4 x 128x256)": 31, "ResNeSt-50-D16 FCN, 4 x 128x256": 15}
STALL_CASE = ("fcn_resnest50-d16_toystreets", ["data.batch_size=4", "data.crop_size=[128, 256]"])


def ask_git(*words: str) -> str:
    command = ["git", *words]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def open_case(name: str, changes: list[str], *, run: Path | None = None) -> Job:
    common = ["schedule.max_steps=100000", "data.num_workers=0", "evaluation.every_steps=null"]
    return open_job(resolve_recipe(name, [*changes, *common]), None, run=run, device="cpu")


def draw_batch(job: Job) -> Batch:
    data = job.recipe.data
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (data.batch_size, 3, *data.crop_size), generator=generator, dtype=torch.uint8)
    target = torch.randint(0, 8, (data.batch_size, *data.crop_size), generator=generator, dtype=torch.uint8)
    return Batch(image, target, torch.arange(data.batch_size))


def make_turns(job: Job, folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return one step of the bare loop and one of the engine's, on the same network and batch."""
    stepper, batch = job.stepper, draw_batch(job)
    stepper.model.train()
    job.folder = folder
    log, stop = engine._open_log(job), StopRequest()
    meter = Meter(step=0, max_steps=job.max_steps, batch_size=len(batch.image), device=torch.device("cpu"))

    def bare() -> None:
        set_lr(stepper.optimizer, scheduled_lr(job.recipe, step=0))
        stepper.optimizer.zero_grad(set_to_none=True)
        stepper.criterion(stepper.model(batch.image), batch.target).total.backward()
        stepper.optimizer.step()

    def full() -> None:
        engine._stop_if_asked(job, log, stop)
        with meter.waiting():
            given = job.fabric.to_device(batch)
        heartbeat(job.step + 1)
        lr = scheduled_lr(job.recipe, step=0)
        stepper.step(given, step=job.step + 1, lr=lr)
        engine._log_bad_steps(job, log)
        job.step += 1
        meter.count()
        if job.due(job.recipe.log.every_steps):
            log.step(meter.read(lr=lr, loss=stepper.guard.take_mean_loss()))

    return bare, full


def measure_overhead(name: str) -> dict[str, Any]:
    job = open_case(*CASES[name])
    with tempfile.TemporaryDirectory() as folder:
        turns = make_turns(job, Path(folder))
        weights = {key: value.clone() for key, value in job.segmenter.state_dict().items()}
        seconds: list[list[float]] = [[], []]
        for repeat in range(PAIRS[name] + 2):
            # by turns the first, since the second finds a warmer cache
            for which in (0, 1) if repeat % 2 else (1, 0):
                job.segmenter.load_state_dict(weights)
                started = time.process_time()
                turns[which]()
                if repeat > 1:
                    seconds[which].append(time.process_time() - started)
    ratios = [full / bare for bare, full in zip(*seconds, strict=True)]
    deciles = statistics.quantiles(ratios, n=10)
    return {
        "pairs": len(ratios),
        "bare_seconds": statistics.median(seconds[0]),
        "engine_seconds": statistics.median(seconds[1]),
        "ratio_of_medians": statistics.median(seconds[1]) / statistics.median(seconds[0]),
        "median_of_ratios": statistics.median(ratios),
        "ratios_10_90": [deciles[0], deciles[-1]],
    }


def measure_stall() -> dict[str, Any]:
    # not in /tmp, which may be memory
    folder = Path(tempfile.mkdtemp(dir=Path(__file__).parent))
    try:
        job = open_case(*STALL_CASE, run=folder)
        bare, _ = make_turns(job, folder)
        started = time.perf_counter()
        for _ in range(3):
            bare()
        step = (time.perf_counter() - started) / 3
        seconds = []
        for job.step in range(7):
            started = time.perf_counter()
            job.save()
            seconds.append(time.perf_counter() - started)
        newest = max((folder / "checkpoints").iterdir())
        megabytes = sum(file.stat().st_size for file in newest.iterdir()) / 1e6
    finally:
        shutil.rmtree(folder)
    save, interval = statistics.median(seconds), job.recipe.checkpoint.every_steps
    return {
        "megabytes": megabytes,
        "seconds": sorted(seconds),
        "median_seconds": save,
        "seconds_per_500_megabytes": save * 500 / megabytes,
        "step_seconds": step,
        "interval_steps": interval,
        "stall_share": save / (save + interval * step),
    }


def main() -> None:
    torch.set_num_threads(1)
    overhead = {}
    for name in CASES:
        overhead[name] = measure_overhead(name)
        print(f"{name}: {100 * (overhead[name]['median_of_ratios'] - 1):+.2f} %")
    stall = measure_stall()
    print(f"checkpoint: {stall['median_seconds']:.2f} s of {stall['megabytes']:.0f} MB, {stall['stall_share']:.2%}")
    record = {
        "script": "benchmarks/engine.py",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": ask_git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(ask_git("status", "--porcelain", "src")),
        "processor": processor(),
        "load_average": os.getloadavg(),
        "torch": torch.__version__,
        "threads": 1,
        "overhead": overhead,
        "stall": stall,
    }
    file = Path(__file__).parent / "results" / __version__ / "engine.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
