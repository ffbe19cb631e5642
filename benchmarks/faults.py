"""How often was a run killed, starved and cut off, and what was lost? How long does a checkpoint take?

Run ``python benchmarks/faults.py``, or ``make faults FULL=1``; it runs the tests of ``tests/faults`` that train, as
often as its options say, and writes what they counted to ``results/<version>/faults.json``: figures F1 to F4 and F12 to
F15 of the fault list. A figure that no test noted is left out. Power cuts and full disks need root; what was
skipped is written down. Restarts after a killed rank (F4) are timed with nothing beside them.

F15 is measured here: a checkpoint of 500 MB (flushed, hashed, read back, verified), beside the same bytes just written.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file

from nestseg.build import describe_model, versions
from nestseg.core.disk import sync_file
from nestseg.engine.checkpoint import save_checkpoint
from nestseg.recipes import named_recipe
from nestseg.version import __version__

ROOT = Path(__file__).parents[1]
FILES = (
    *(f"tests/faults/test_{name}.py" for name in ("kills", "signals", "full_disk", "power_cut", "resume", "ranks")),
    "tests/architecture/test_determinism.py",
)
ALONE = "tests/faults/test_launch.py"
"""Its restarts are timed: nothing runs beside it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="at random times, over 16 kinds of runs")
    parser.add_argument("--rank-kills", type=int, default=10, help="after which the launcher starts all ranks again")
    parser.add_argument("--power-cuts", type=int, default=20)
    parser.add_argument("--injected", type=int, default=100, help="runs with EIO, and as many with ENOSPC")
    parser.add_argument("--only", default="", metavar="WORDS", help="tests to run, as pytest -k has it; all without")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tests = run_tests(Path(folder), arguments)
        notes = [json.loads(line) for file in sorted(Path(folder).glob("*.jsonl")) for line in file.open()]
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "src", "tests") else ""),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "versions": versions(),
        "tests": tests,
        **summarise(notes),
        "F13": {"audits_without_a_flagged_operation": tests.pop("audits_passed")},
        "F15": time_checkpoint(),
    }
    path = ROOT / "benchmarks" / "results" / __version__ / "faults.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def run_tests(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the tests, which note figures in a folder; return how they ended."""
    asked = {
        "NESTSEG_FAULT_FIGURES": str(folder),
        "NESTSEG_KILLS": str(arguments.kills),
        "NESTSEG_RANK_KILLS": str(arguments.rank_kills),
        "NESTSEG_POWER_CUTS": str(arguments.power_cuts),
        "NESTSEG_INJECTED": str(arguments.injected),
        "OMP_NUM_THREADS": "1",
    }
    started = time.perf_counter()
    endings, lines = [], []
    for words in (["-n", "2", *FILES], [ALONE]):
        command = [sys.executable, "-m", "pytest", "-v", "-k", arguments.only, *words]
        with subprocess.Popen(command, cwd=ROOT, env=os.environ | asked, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                sys.stderr.write(line)
                lines.append(line.rstrip())
        endings.append(lines[-1].strip("= "))
    audits = [line for line in lines if "test_determinism.py::" in line and "deterministic" in line.split("::")[1]]
    return {
        "only": arguments.only,
        "kills": arguments.kills,
        "rank_kills": arguments.rank_kills,
        "power_cuts": arguments.power_cuts,
        "injected": 2 * arguments.injected,
        "ended": endings,
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
        "skipped": [line for line in lines if line.startswith("SKIPPED")],
        "audits_passed": sum("PASSED" in line for line in audits),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }


def summarise(notes: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the notes of the tests together, a figure at a time."""
    by_figure: dict[str, list[dict[str, Any]]] = {}
    for note in notes:
        by_figure.setdefault(note.pop("figure"), []).append(note)
    result: dict[str, Any] = {}
    if kills := by_figure.pop("F1", []):
        cells = Counter(f"{kill['head']}, {kill['ranks']} ranks, {kill['workers']} workers" for kill in kills)
        result["F1"] = {
            "runs": len(kills),
            "killed": sum(kill["killed"] for kill in kills),
            "killed_before_the_first_checkpoint": sum(kill["killed"] and not kill["checkpoints"] for kill in kills),
            "equal": sum(kill["equal"] for kill in kills),
            "cells": dict(sorted(cells.items())),
        }
    if losses := by_figure.pop("F2", []):
        kinds = Counter(loss["kind"] for loss in losses)
        result["F2"] = {
            "runs": dict(sorted(kinds.items())),
            "lost": sum(bool(loss.get("lost")) for loss in losses),
            "unreadable": sum(bool(loss.get("unreadable")) for loss in losses),
            "codes": dict(sorted(Counter(str(loss["code"]) for loss in losses if "code" in loss).items())),
        }
    if stops := by_figure.pop("F3", []):
        seconds = [stop["seconds"] for stop in stops]
        places = Counter(f"{stop['place']}, {stop['signal']}, {stop['ranks']} ranks" for stop in stops)
        result["F3"] = {
            "stops": len(stops),
            "places": dict(sorted(places.items())),
            "median_seconds": round(median(seconds), 2),
            "most_seconds": max(seconds),
        }
    if restarts := by_figure.pop("F4", []):
        seconds = [restart["seconds"] for restart in restarts]
        result["F4"] = {
            "killed_ranks": len(restarts),
            "within_30_seconds": sum(second <= 30 for second in seconds),
            "median_seconds": round(median(seconds), 1),
            "most_seconds": max(seconds),
            "equal": sum(restart["equal"] for restart in restarts),
        }
    if errors := by_figure.pop("F14", []):
        codes = Counter(error["code"] for error in errors)
        result["F14"] = {"errors_with_place_reason_and_fix": len(errors), "codes": dict(sorted(codes.items()))}
    # what other tests note is kept as it is: F12 of the ranks
    return result | dict(sorted(by_figure.items()))


def time_checkpoint(*, megabytes: int = 500, repeats: int = 5) -> dict[str, Any]:
    """Time a checkpoint of so many megabytes, a quarter of it the model, and the same bytes just written."""
    count, size = 64, megabytes * 10**6 // 4 // 64
    model = {f"layer{index}": torch.randn(size // 4) for index in range(count)}
    moments = {name: {"exp_avg": value.clone(), "exp_avg_sq": value.clone()} for name, value in model.items()}
    state = {"optimizer": moments, "average": {name: value.clone() for name, value in model.items()}}
    recipe = named_recipe("fcn_resnest14-d16_voc")
    whole, whole_cpu, bare, flushed = [], [], [], []
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        run = Path(folder)
        for step in range(repeats + 1):
            started, started_cpu = time.perf_counter(), time.process_time()
            save_checkpoint(run, model, state=state, metadata=describe_model(recipe, step=step), environment={}, keep=2)
            whole.append(time.perf_counter() - started)
            whole_cpu.append(time.process_time() - started_cpu)
            os.sync()
            started = time.perf_counter()
            save_file(model, run / "model.safetensors")
            torch.save(state, run / "state.pt")
            bare.append(time.perf_counter() - started)
            for name in ("model.safetensors", "state.pt"):
                sync_file(run / name)
            flushed.append(time.perf_counter() - started)
    # the first warms up
    seconds, bare_seconds = median(whole[1:]), median(bare[1:])
    every_steps = recipe.checkpoint.every_steps
    return {
        "megabytes": megabytes,
        "seconds": round(seconds, 3),
        "processor_seconds": round(median(whole_cpu[1:]), 3),
        "seconds_just_written": round(bare_seconds, 3),
        "seconds_written_and_flushed": round(median(flushed[1:]), 3),
        "overhead_seconds": round(seconds - bare_seconds, 3),
        "every_steps": every_steps,
        "stalls_5_percent_where_a_step_takes_seconds": round(seconds / 0.05 / every_steps, 4),
    }


def processor() -> str:
    """Name the processor."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def git(*words: str) -> str:
    """Ask git about this checkout."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
