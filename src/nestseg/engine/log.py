"""What a run says while it runs: ``log.jsonl`` and CSV files, a live display on a terminal, plain lines elsewhere.

Nothing in here stops a run: a full disk, a terminal that is gone or a tracker that is down is told once, and training
goes on. Durations come from the monotonic clock, so that a jump of the wall clock changes none of them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, final

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from nestseg.engine.trackers import TrackerThread

if TYPE_CHECKING:
    import torch

LOG_FILE = "log.jsonl"
CURVE_FILE = "log.csv"
EVALUATION_FILE = "evaluation.csv"

LOADER_BOUND = 0.2
"""Share of the time spent waiting for data from which a run counts as held up by its loader."""

SECONDS_FOR_TRACKERS = 30.0
"""How long the end of a run waits for trackers to send what is left; a signal may have asked it to be quick."""

_STEP_COLUMNS = ("step", "loss", "lr", "images_per_second", "data_wait_share", "memory_mib", "seconds")
_EVALUATION_COLUMNS = ("step", "mean_iou", "loss", "pixel_accuracy")
_SESSION_STARTS = ("start", "resume")
_TRACKED = ("loss", "lr", "images_per_second", "data_wait_share", "memory_mib")


class LogWarning(UserWarning):
    """Something that a run reports to cannot be written or reached; training goes on."""


class RunRecords(NamedTuple):
    """What ``log.jsonl`` holds."""

    records: list[dict[str, Any]]
    """In their order, without those that a resume from an earlier step has superseded."""
    num_damaged: int
    """Lines that are no records."""
    num_bytes: int
    """Length of the file up to its last whole line; what a kill tore comes after."""


def read_records(file: Path) -> RunRecords:
    """Read a run's ``log.jsonl``, whatever happened to it.

    The file only ever grows. A record of kind ``start`` or ``resume`` says from which step a session went on; what came
    before it of later steps was lost with the session, was done again, and is left out.

    Raises:
        OSError: If it cannot be read.
    """
    *lines, _torn = file.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    num_damaged = 0
    for line in lines:
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            num_damaged += 1
            continue
        if record["kind"] in _SESSION_STARTS:
            step = _step_of(record)
            records = [earlier for earlier in records if _step_of(earlier) <= step]
        records.append(record)
    # a step that two sessions evaluated, the second to make up for the first, counts once
    last = {(record["kind"], _step_of(record)): place for place, record in enumerate(records)}
    records = [
        record
        for place, record in enumerate(records)
        if record["kind"] not in ("step", "evaluation") or last[record["kind"], _step_of(record)] == place
    ]
    return RunRecords(records, num_damaged, sum(map(len, lines)) + len(lines))


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line, parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def _step_of(record: Mapping[str, Any]) -> int:
    step = record.get("step")
    return step if isinstance(step, int) else 0


@final
class RunLog:
    """Writes what a run reports, and shows it.

    ``log.jsonl`` gets every record. ``log.csv`` has a row for each step that was recorded, ``evaluation.csv`` one for
    each evaluation; the two are written anew from ``log.jsonl`` whenever a run goes on, so that they hold no step
    twice. Lines that cannot be written are kept and tried again with the next one. A terminal or tracker that fails is
    not tried again.

    Args:
        run: The run folder; None shows only (ranks other than the first are silent altogether).
        max_steps: Length of the run, for the bar.
        start: Steps already done.
        silent: Show nothing.
        trackers: Where records go besides, see `nestseg.engine.trackers.TRACKERS`.
        settings: The recipe as plain values, for the trackers.
        name: The recipe's name, for the trackers.
        judge_wait: Says what to do about a share of waiting for data; None where all is well. See `describe_wait`.

    Warns:
        LogWarning: Once for each file, terminal or tracker that fails.
    """

    def __init__(
        self,
        run: Path | None,
        *,
        max_steps: int,
        start: int = 0,
        silent: bool = False,
        trackers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
        name: str = "",
        judge_wait: Callable[[float], str | None] = lambda share: None,
    ) -> None:
        self._max_steps, self._silent, self._judge_wait = max_steps, silent, judge_wait
        self._loader_bound = False
        self._warned: set[str] = set()
        self._opened = time.monotonic()
        self._seconds_before = 0.0
        self._files: dict[str, _LineFile] = {}
        self._classes: tuple[str, ...] | None = None
        self._trackers: list[TrackerThread] = []
        self._mean_iou = ""
        if run is not None:
            self._open_files(run, start=start)
            title = f"{name} {run.resolve().name}".strip()
            self._trackers = [
                TrackerThread(tracker, run, title=title, settings=settings or {}, start=start) for tracker in trackers
            ]
        console = Console(stderr=True)
        self._live: Live | None = None
        if console.is_terminal and not silent:
            self._bar = Progress(
                TextColumn("step"),
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(bar_width=None),
                TaskProgressColumn(),
                TextColumn("{task.fields[left]}"),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task("step", total=max_steps, completed=start, left="")
            self._figures = Text()
            self._live = Live(Group(self._bar, self._figures), console=console)

    def __enter__(self) -> Self:
        if self._live is not None:
            with self._showing():
                self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + SECONDS_FOR_TRACKERS
        for tracker in self._trackers:
            tracker.finish()
        for tracker in self._trackers:
            tracker.wait(deadline - time.monotonic())
        self._check_trackers()
        if self._live is not None:
            with self._showing():
                self._live.stop()
        for name, file in self._files.items():
            self._write(name)
            try:
                file.close()
            except OSError as error:  # what a network drive could not keep may come out only now
                self._warn(name, str(error))

    def record(self, kind: str, **values: Any) -> None:
        """Append one record to ``log.jsonl``: its kind, the time, and the values.

        Args:
            kind: What it is about. ``evaluation`` also goes into ``evaluation.csv`` and to the trackers.
            values: Plain values; a float that is not finite becomes null.
        """
        values = _plain(values)
        time_now = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"kind": kind, "time": time_now, **values}, allow_nan=False) + "\n"
        self._write(LOG_FILE, line)
        if kind == "evaluation":
            self._record_evaluation(values)
        self._check_trackers()

    def say(self, text: str) -> None:
        """Show one line."""
        with self._showing():
            if self._silent:
                return
            if self._live is not None:
                self._live.console.print(text, highlight=False, markup=False)
            else:
                sys.stderr.write(text + "\n")
                sys.stderr.flush()

    def step(self, values: Mapping[str, float | None]) -> None:
        """Record the state of training after ``values["step"]`` steps and show it.

        Args:
            values: See `Meter.read`.
        """
        seconds = round(self._seconds_before + time.monotonic() - self._opened, 3)
        plain = _plain({**values, "seconds": seconds})
        self.record("step", **plain)
        self._write(CURVE_FILE, _csv_line([plain.get(column) for column in _STEP_COLUMNS]))
        self._track({f"train/{name}": plain.get(name) for name in _TRACKED}, step=plain["step"])
        self._show_step(plain)
        self._judge(plain)

    def _open_files(self, run: Path, *, start: int) -> None:
        """Take up what is there, without what is later than ``start``; whatever fails is tried again later."""
        try:
            found = read_records(run / LOG_FILE)
        except FileNotFoundError:
            found = RunRecords([], 0, 0)
        except OSError as error:
            self._warn(LOG_FILE, str(error))
            found = RunRecords([], 0, -1)
        records = [record for record in found.records if _step_of(record) <= start]
        steps = [record for record in records if record["kind"] == "step"]
        evaluations = [record for record in records if record["kind"] == "evaluation"]
        if steps and isinstance(before := steps[-1].get("seconds"), int | float):
            self._seconds_before = before
        self._files = {
            LOG_FILE: _LineFile(run / LOG_FILE, end=found.num_bytes if found.num_bytes >= 0 else None),
            CURVE_FILE: _LineFile(run / CURVE_FILE, end=0),
            EVALUATION_FILE: _LineFile(run / EVALUATION_FILE, end=0),
        }
        rows = [_STEP_COLUMNS, *([record.get(column) for column in _STEP_COLUMNS] for record in steps)]
        self._write(LOG_FILE)
        self._write(CURVE_FILE, "".join(map(_csv_line, rows)))
        # a run without evaluations has no such file; an old one would be of steps that were lost
        self._write(EVALUATION_FILE, "".join(map(self._evaluation_lines, evaluations)))

    def _record_evaluation(self, values: Mapping[str, Any]) -> None:
        mean_iou = values.get("mean_iou")
        if mean_iou is not None:
            self._mean_iou = f"mIoU {100 * mean_iou:.2f} % at {values['step']}"
        self._write(EVALUATION_FILE, self._evaluation_lines(values))
        scores = {f"val/{name}": values.get(name) for name in _EVALUATION_COLUMNS[1:]}
        classes = {f"iou/{name}": value for name, value in values.get("iou_per_class", {}).items()}
        self._track({**scores, **classes}, step=values["step"])

    def _evaluation_lines(self, values: Mapping[str, Any]) -> str:
        """Return the row of an evaluation; before the first one the titles, which are known only then."""
        per_class: Mapping[str, Any] = values.get("iou_per_class") or {}
        titles = ""
        if self._classes is None:
            self._classes = tuple(per_class)
            titles = _csv_line([*_EVALUATION_COLUMNS, *(f"iou {name}" for name in self._classes)])
        row = [values.get(column) for column in _EVALUATION_COLUMNS]
        return titles + _csv_line([*row, *(per_class.get(name) for name in self._classes)])

    def _write(self, name: str, text: str = "") -> None:
        file = self._files.get(name)
        if file is None:
            return
        try:
            file.append(text)
        except OSError as error:
            self._warn(name, f"{error.strerror or error}; its lines are kept and tried again")

    def _track(self, values: Mapping[str, Any], *, step: int) -> None:
        known = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.log(known, step=step)

    def _check_trackers(self) -> None:
        for tracker in self._trackers:
            if tracker.failure is not None:
                self._warn(tracker.name, f"{tracker.failure}; nothing more is sent to it")

    @contextmanager
    def _showing(self) -> Iterator[None]:
        """Fall silent if the terminal is gone."""
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            live, self._silent, self._live = self._live, True, None
            if live is not None:
                with suppress(OSError, ValueError):
                    live.stop()  # gives stdout and stderr back
            self._warn("terminal", f"{error}; nothing more is shown")

    def _warn(self, sink: str, reason: str) -> None:
        if sink in self._warned:
            return
        self._warned.add(sink)
        if sink != LOG_FILE:
            self.record("log_failed", sink=sink, error=reason)
        if sink != "terminal":
            warnings.warn(f"{sink}: {reason}; training goes on", LogWarning, stacklevel=3)

    def _show_step(self, values: Mapping[str, Any]) -> None:
        step, loss, memory = values["step"], values["loss"], values["memory_mib"]
        left = f"left {timedelta(seconds=round(values['seconds_left']))}"
        figures = [
            "loss -" if loss is None else f"loss {loss:.4f}",
            f"lr {values['lr']:.3g}",
            f"{values['images_per_second']:.1f} images/s",
            f"{memory:,.0f} MiB",
            f"data wait {values['data_wait_share']:.0%}",
        ]
        if self._live is None:
            self.say("  ".join([f"step {step}/{self._max_steps}", *figures, left]))
            return
        with self._showing():
            self._bar.update(self._task, completed=step, left=left)
            self._figures.plain = "  ".join([*figures, self._mean_iou])

    def _judge(self, values: Mapping[str, Any]) -> None:
        """Say it once when the loader begins to hold up training, and once when it keeps up again."""
        share = values["data_wait_share"]
        verdict = self._judge_wait(share)
        if verdict is not None and not self._loader_bound:
            self._loader_bound = True
        # well below the limit, or a share that hovers about it would be news at every second step
        elif verdict is None and self._loader_bound and share < LOADER_BOUND / 2:
            self._loader_bound = False
            verdict = f"the loader keeps up: {share:.0%} waiting"
        else:
            return
        self.record("loader", step=values["step"], data_wait_share=share, verdict=verdict)
        self.say(verdict)


@final
class _LineFile:
    """A file that grows by whole lines. What cannot be written waits, and comes first the next time.

    Args:
        path: The file; it is opened when there is something to write.
        end: Bytes of it that are good; whatever comes after is cut off. None if that is unknown: nothing is cut.
    """

    def __init__(self, path: Path, *, end: int | None) -> None:
        self._path, self._end = path, end
        self._descriptor: int | None = None
        # an unknown file may end in half a line
        self._waiting = b"\n" if end is None else b""

    def append(self, text: str) -> None:
        """Write what waits, and then this.

        Raises:
            OSError: If it cannot be written; it waits then.
        """
        self._waiting += text.encode(errors="backslashreplace")
        if not self._waiting and not self._path.exists():
            return
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            assert self._end is not None, "opening finds it out"
            # a write that failed may have left half a line
            if os.fstat(self._descriptor).st_size > self._end:
                os.ftruncate(self._descriptor, self._end)
            rest = memoryview(self._waiting)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            # opened anew the next time: a network drive may have come back under another handle
            self._forget()
            raise
        self._end += len(self._waiting)
        self._waiting = b""

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        if self._end is None:
            self._end = os.fstat(descriptor).st_size
        return descriptor

    def _forget(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def close(self) -> None:
        """Close the file."""
        self._forget()


@final
class Meter:
    """Speed, waiting and memory since the last report, and the time that is left.

    The first wait is left out of speed and share: loader processes start in it, which says nothing about the rest.

    Args:
        step: Steps already done.
        max_steps: Length of the run.
        batch_size: Images a step, over all devices.
        device: Whose memory is measured; on the processor it is that of this process.
    """

    def __init__(self, *, step: int, max_steps: int, batch_size: int, device: torch.device) -> None:
        self._step, self._max_steps, self._batch_size, self._device = step, max_steps, batch_size, device
        self._has_waited = False
        self._step_seconds: float | None = None
        self._pauses: dict[str, _Pause] = {}
        self._start()

    def _start(self) -> None:
        self._count = 0
        self._data_seconds = 0.0
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        if self._has_waited:
            self._data_seconds += seconds
        else:
            self._has_waited = True
            self._started += seconds

    @contextmanager
    def paused(self, what: str, *, every_steps: int | None) -> Iterator[None]:
        """Leave the time inside out of the speed, and expect the like again.

        Args:
            what: What is done meanwhile.
            every_steps: After how many steps it happens, and once more at the end; None for what does not come again.
        """
        started = time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        self._started += seconds
        if every_steps is not None:
            self._pauses[what] = _Pause(every_steps, self._step + self._count, seconds)

    def count(self) -> None:
        """Count one step."""
        self._count += 1

    def read(self, *, lr: float, loss: float | None) -> dict[str, float | None]:
        """Return the figures since the last call, and start anew.

        Args:
            lr: Learning rate of the last step.
            loss: Mean loss of these steps; None if none of them counted.

        Returns:
            ``step``, ``loss``, ``lr``, ``images_per_second``, ``data_wait_share`` (0 to 1), ``memory_mib`` (on a GPU
            the peak since the start) and ``seconds_left``, evaluations and checkpoints to come included, each as long
            as its last one.
        """
        assert self._count, "count comes first"
        self._step += self._count
        seconds = max(time.perf_counter() - self._started, 1e-9)
        now = seconds / self._count
        # smoothed: half of it is what the last three reports said
        self._step_seconds = now if self._step_seconds is None else 0.8 * self._step_seconds + 0.2 * now
        pauses = sum(pause.seconds * pause.num_left(self._max_steps) for pause in self._pauses.values())
        values = {
            "step": self._step,
            "loss": loss,
            "lr": lr,
            "images_per_second": self._count * self._batch_size / seconds,
            "data_wait_share": min(1.0, self._data_seconds / seconds),
            "memory_mib": _measure_memory(self._device),
            "seconds_left": (self._max_steps - self._step) * self._step_seconds + pauses,
        }
        self._start()
        return values


class _Pause(NamedTuple):
    """Something that stops training now and then."""

    every_steps: int
    step: int
    """After which step it happened last."""
    seconds: float
    """How long it took."""

    def num_left(self, max_steps: int) -> int:
        """How often it is still to come."""
        at_end = max_steps % self.every_steps > 0 and self.step < max_steps
        return max_steps // self.every_steps - self.step // self.every_steps + at_end


def _measure_memory(device: torch.device) -> float:
    """Return the peak of a GPU's memory, else the memory that this process has now, in MiB."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
    return pages * resource.getpagesize() / 2**20


def describe_wait(share: float, *, num_workers: int, cores: int, packed: bool) -> str | None:
    """Say what to do about the time that training waits for data.

    Args:
        share: Share of the time, 0 to 1.
        num_workers: Loader processes of this device.
        cores: Processor cores that they may use.
        packed: Whether the data set is a packed copy.

    Returns:
        A verdict; None if the share is below `LOADER_BOUND`.

    Example:
        >>> describe_wait(0.62, num_workers=3, cores=16, packed=False)
        'loader-bound: 62 % waiting; try data.num_workers=8 or nestseg data pack'
        >>> describe_wait(0.1, num_workers=3, cores=16, packed=False)
    """
    if share < LOADER_BOUND:
        return None
    # enough of them that loading would take no longer than the rest of a step
    busy = num_workers / max(1 - share, 0.01) if num_workers else share / max(1 - share, 0.01)
    enough = min(cores, max(num_workers + 1, math.ceil(busy - 1e-9)))
    ways = [f"data.num_workers={enough}"] if enough > num_workers else []
    ways += [] if packed else ["nestseg data pack"]
    advice = f"try {' or '.join(ways)}" if ways else f"{cores} cores are busy with it: use more, or augment less"
    return f"loader-bound: {100 * share:.0f} % waiting; {advice}"


def _plain(value: Any) -> Any:
    """Replace numbers that strict JSON does not have by null, however deep they are."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _csv_line(cells: Sequence[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
