"""A log, terminal or tracker that fails never stops a run (T29)."""

from __future__ import annotations

import csv
import errno
import os
import resource
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import pytest

from nestseg.engine import log as log_module
from nestseg.engine import trackers as trackers_module
from nestseg.engine.log import LogWarning, RunLog, read_records


def values_of(step: int) -> dict[str, float | None]:
    return {
        "step": step,
        "loss": 0.5,
        "lr": 0.01,
        "images_per_second": 12.5,
        "data_wait_share": 0.0,
        "memory_mib": 512.0,
        "seconds_left": 90.0,
    }


def steps_of(run: Path) -> list[int]:
    return [record["step"] for record in read_records(run / "log.jsonl").records if record["kind"] == "step"]


def take_steps(log: RunLog, steps: range, *, seconds: float = 0.0) -> None:
    for step in steps:
        log.step(values_of(step))
        time.sleep(seconds)


def run_steps(run: Path, steps: range, *, seconds: float = 0.0, tracker: str | None = None) -> None:
    trackers = [] if tracker is None else [tracker]
    with RunLog(run, max_steps=50, start=steps[0] - 1, silent=True, trackers=trackers) as log:
        take_steps(log, steps, seconds=seconds)


class Disk:
    """Stands before ``os.write``: after ``room`` more bytes it fails as a real one does, in the middle of a line."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: float = float("inf")
        self.code = errno.ENOSPC
        self._write = os.write
        monkeypatch.setattr(log_module.os, "write", self.write)

    def write(self, descriptor: int, content: memoryview) -> int:
        if self.room <= 0:
            raise OSError(self.code, os.strerror(self.code))
        written = self._write(descriptor, content[: int(min(self.room, len(content)))])
        self.room -= written
        return written


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("room", [0, 1, 100, 333])
def test_disk_that_is_full_for_a_while_costs_no_record(tmp_path, monkeypatch, code, room):
    disk = Disk(monkeypatch)
    with RunLog(tmp_path, max_steps=50, silent=True) as log:
        log.step(values_of(1))
        disk.room, disk.code = room, code
        with pytest.warns(LogWarning) as caught:
            take_steps(log, range(2, 6))
        # a file may have had room still; none is warned about twice
        names = [str(warning.message).split(":")[0] for warning in caught]
        assert set(names) <= {"log.jsonl", "log.csv"}
        assert len(names) == len(set(names))
        assert steps_of(tmp_path)[:1] == [1]
        disk.room = float("inf")
        log.step(values_of(6))
    found = read_records(tmp_path / "log.jsonl")
    assert found.num_damaged == 0
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    with (tmp_path / "log.csv").open(encoding="utf-8", newline="") as lines:
        assert [row["step"] for row in csv.DictReader(lines)] == ["1", "2", "3", "4", "5", "6"]


def test_disk_that_stays_full_leaves_whole_lines_for_the_next_session(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    disk.room = 400
    with pytest.warns(LogWarning):
        run_steps(tmp_path, range(1, 4))
    assert steps_of(tmp_path) == [1], "the test needs another size"
    disk.room = float("inf")
    with RunLog(tmp_path, max_steps=50, start=1, silent=True) as log:
        log.record("start", step=1)
        take_steps(log, range(2, 3))
    assert read_records(tmp_path / "log.jsonl").num_damaged == 0
    assert steps_of(tmp_path) == [1, 2]


def test_files_that_cannot_even_be_opened_are_warned_about_once_each(tmp_path):
    for name in ("log.jsonl", "log.csv", "evaluation.csv"):
        (tmp_path / name).mkdir()
    with pytest.warns(LogWarning) as caught:
        run_steps(tmp_path, range(1, 4))
    names = [str(warning.message).split(":")[0] for warning in caught]
    assert sorted(names) == ["evaluation.csv", "log.csv", "log.jsonl"]


def test_a_log_that_could_not_be_read_at_first_is_not_cut(tmp_path, monkeypatch):
    file = tmp_path / "log.jsonl"
    with RunLog(tmp_path, max_steps=50, silent=True) as log:
        log.step(values_of(1))
    with file.open("ab") as torn:
        torn.write(b'{"kind": "st')

    def fail(_: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(log_module, "read_records", fail)
        with pytest.warns(LogWarning, match=r"log\.jsonl"):
            log = RunLog(tmp_path, max_steps=50, start=1, silent=True)
    with log:
        log.step(values_of(2))
    assert steps_of(tmp_path) == [1, 2]
    assert read_records(file).num_damaged == 1


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "hung up")])
def test_a_terminal_that_is_gone_is_recorded_and_nothing_more_is_shown(tmp_path, monkeypatch, error):
    class Gone:
        num_writes = 0

        def isatty(self) -> bool:
            return False

        def write(self, _: str) -> int:
            self.num_writes += 1
            raise error

        def flush(self) -> None:
            raise error

    gone = Gone()
    monkeypatch.setattr(sys, "stderr", gone)
    with RunLog(tmp_path, max_steps=50) as log:
        for step in range(1, 4):
            log.step(values_of(step))
            log.say("hello")
    assert steps_of(tmp_path) == [1, 2, 3]
    failures = [record for record in read_records(tmp_path / "log.jsonl").records if record["kind"] == "log_failed"]
    assert [failure["sink"] for failure in failures] == ["terminal"]
    assert gone.num_writes == 1


class _NetworkError(Exception):
    """An exception of somebody else's code."""


@pytest.mark.parametrize("place", ["open", "log", "close"])
@pytest.mark.parametrize(
    "error", [_NetworkError("down"), OSError(errno.ENOSPC, "full"), SystemExit(1), KeyboardInterrupt()]
)
def test_whatever_a_tracker_raises_is_warned_about_once_and_training_goes_on(tmp_path, monkeypatch, place, error):
    def fail(here: str) -> None:
        if here == place:
            raise error

    def open_tracker(_: object) -> types.SimpleNamespace:
        fail("open")
        return types.SimpleNamespace(log=lambda values, step: fail("log"), close=lambda: fail("close"))

    monkeypatch.setitem(trackers_module.TRACKERS, "tensorboard", open_tracker)
    with pytest.warns(LogWarning) as caught:
        run_steps(tmp_path, range(1, 4), seconds=0.05, tracker="tensorboard")
    assert len(caught) == 1
    assert str(caught[0].message).startswith(f"tensorboard: {type(error).__name__}")
    assert steps_of(tmp_path) == [1, 2, 3]
    (failure,) = (one for one in read_records(tmp_path / "log.jsonl").records if one["kind"] == "log_failed")
    assert failure["sink"] == "tensorboard"


def test_a_tracker_that_hangs_holds_up_nothing(tmp_path, monkeypatch):
    free = threading.Event()
    tracker = types.SimpleNamespace(log=lambda values, step: free.wait(60), close=lambda: None)
    monkeypatch.setitem(trackers_module.TRACKERS, "tensorboard", lambda _: tracker)
    monkeypatch.setattr(trackers_module, "_LONGEST_QUEUE", 5)
    monkeypatch.setattr(log_module, "SECONDS_FOR_TRACKERS", 0.2)
    started = time.monotonic()
    with pytest.warns(LogWarning, match="5 records behind"):
        run_steps(tmp_path, range(1, 20), tracker="tensorboard")
    with pytest.warns(LogWarning, match="did not finish in time"):
        run_steps(tmp_path, range(20, 21), tracker="tensorboard")
    assert time.monotonic() - started < 10
    free.set()
    assert steps_of(tmp_path) == list(range(1, 21))


def test_a_tracker_without_room_for_its_folder_is_dropped(tmp_path):
    (tmp_path / "trackers").write_text("in the way", encoding="utf-8")
    with pytest.warns(LogWarning, match="tensorboard: ") as caught:
        run_steps(tmp_path, range(1, 4), seconds=0.05, tracker="tensorboard")
    assert len(caught) == 1
    assert steps_of(tmp_path) == [1, 2, 3]


# the writing thread of TensorBoard itself dies of it
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_files_that_the_system_lets_grow_no_further(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = RunLog(tmp_path, max_steps=50, silent=True, trackers=["tensorboard"])
    log.step(values_of(1))
    time.sleep(0.5)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # writes beyond fail with EFBIG, and may be cut short
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(2, 40):
                log.step(values_of(step))
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.__exit__()
    names = sorted(str(warning.message).split(":")[0] for warning in caught)
    assert names == ["log.csv", "log.jsonl", "tensorboard"], [str(warning.message) for warning in caught]
    assert steps_of(tmp_path) == list(range(1, 40)), "what waited was written in the end"
    assert read_records(tmp_path / "log.jsonl").num_damaged == 0


def test_a_healthy_log_warns_about_nothing(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with RunLog(tmp_path, max_steps=50, silent=True) as log:
            log.step(values_of(1))
