"""What a run says while it runs: ``log.jsonl`` always, a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self, final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from nestseg.core.errors import RunError


@final
class RunLog:
    """Writes records to ``log.jsonl`` and shows them.

    Args:
        run: The run folder; None shows only (ranks other than the first are silent altogether).
        max_steps: Length of the run, for the bar.
        start: Steps already done.
        silent: Show nothing.
    """

    def __init__(self, run: Path | None, *, max_steps: int, start: int = 0, silent: bool = False) -> None:
        self._file = None if run is None else (run / "log.jsonl").open("a", encoding="utf-8")
        self._silent = silent
        self._max_steps = max_steps
        console = Console(stderr=True)
        self._progress: Progress | None = None
        if console.is_terminal and not silent:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
            )
            self._progress = Progress(*columns, TextColumn("{task.fields[status]}"), console=console)
            self._task = self._progress.add_task("train", total=max_steps, completed=start, status="")

    def __enter__(self) -> Self:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._file is not None:
            self._file.close()

    def record(self, kind: str, **values: Any) -> None:
        """Append one record to ``log.jsonl``: its kind, the time, and the values."""
        if self._file is not None:
            time = datetime.now(UTC).isoformat(timespec="seconds")
            self._file.write(json.dumps({"kind": kind, "time": time, **values}, allow_nan=False) + "\n")
            self._file.flush()

    def say(self, text: str) -> None:
        """Show one line."""
        if self._silent:
            return
        if self._progress is not None:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def step(self, values: dict[str, float]) -> None:
        """Record the state of training after ``values["step"]`` steps and show it."""
        self.record("step", **values)
        text = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.5f}  {values['images_per_second']:.1f} images/s  "
            f"data wait {values['data_wait_share']:.0%}  left {timedelta(seconds=round(values['seconds_left']))}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=int(values["step"]), status=text)
        else:
            self.say(f"step {int(values['step'])}/{self._max_steps}  {text}")


@final
class Meter:
    """Loss and speed since the last report. The loss is added up on its device and read only when reported.

    Args:
        step: Steps already done.
        max_steps: Length of the run.
        batch_size: Images a step, over all devices.
    """

    def __init__(self, *, step: int, max_steps: int, batch_size: int) -> None:
        self._step, self._max_steps, self._batch_size = step, max_steps, batch_size
        self._start()

    def _start(self) -> None:
        self._total: Tensor | None = None
        self._count = 0
        self._data_seconds = 0.0
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        started = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the speed."""
        started = time.perf_counter()
        yield
        self._started += time.perf_counter() - started

    def add(self, loss: Tensor) -> None:
        """Count one step.

        Shape:
            - loss: () float, detached
        """
        self._total = loss if self._total is None else self._total + loss
        self._count += 1

    def check_finite(self) -> None:
        """Stop before a broken model is kept.

        Raises:
            RunError: If a loss since the last report was not finite.
        """
        if self._total is not None and not math.isfinite(self._total.item()):
            raise RunError(
                "E-RUN-020",
                f"the loss is not finite in steps {self._step + 1} to {self._step + self._count}",
                fix="lower optimizer.lr, check the labels, or use pretrained weights; the last checkpoint is good",
            )

    def read(self, *, lr: float) -> dict[str, float]:
        """Return the figures since the last call, and start anew.

        Raises:
            RunError: If a loss was not finite.
        """
        self.check_finite()
        assert self._total is not None, "add comes first"
        self._step += self._count
        seconds = max(time.perf_counter() - self._started, 1e-9)
        values = {
            "step": self._step,
            "loss": self._total.item() / self._count,
            "lr": lr,
            "images_per_second": self._count * self._batch_size / seconds,
            "data_wait_share": min(1.0, self._data_seconds / seconds),
            "seconds_left": (self._max_steps - self._step) * seconds / self._count,
        }
        self._start()
        return values
