"""How many training samples a second does one core read and augment, and how many with mmsegmentation's pipeline?

Run ``python benchmarks/loader.py``; it writes ``results/<version>/loader.json``. Three sides take turns on the real
samples that ``NESTSEG_REAL_DATA`` names (default ``../shared/data``): our loader on the files as they are, our loader
on a packed copy, and mmsegmentation's own transforms with its published settings. Each side is a process of its own
with one thread; in every repetition each reads the same number of samples, in rotating order, while the others
sleep. The first repetition warms up and is dropped. Figures are samples a second of CPU time, which other work on the
machine disturbs less than the clock; those by the clock stand beside them.

mmsegmentation is looked for in ``NESTSEG_PEERS_PYTHON``, in ``.venv-peers`` (``make parity-peers`` makes it), and
beside this Python. A side that cannot run is left out, and the record says so.

Our side ends in a batch on contiguous planes, theirs in one sample on contiguous planes (``PackSegInputs``): their
stacking of samples is not counted. Cityscapes label maps are the published ``labelIds`` for us; for them they are
turned into ``labelTrainIds`` beforehand, as their preparation does.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
REPEATS = 9
SIDES = ("nestseg", "nestseg packed", "mmsegmentation")


class Case(NamedTuple):
    """A data set and the settings of its recipe; ``steps`` batches are a repetition."""

    folder: str
    split: str
    base: tuple[int, int]
    crop: tuple[int, int]
    batch: int
    steps: int
    bars: dict[str, float]
    """By how much a side of ours is to be faster than mmsegmentation."""


CASES = {
    "voc": Case("voc_mini", "trainaug", (512, 2048), (512, 512), 4, 15, {"nestseg": 2.0}),
    "cityscapes": Case("cityscapes_mini", "train", (1024, 2048), (512, 1024), 3, 8, {"nestseg packed": 5.0}),
    "camvid": Case("camvid", "train", (360, 480), (360, 480), 4, 25, {"nestseg": 1.5}),
}

Serve = Callable[[int], None]
"""Reads and augments the samples of one repetition, which its number seeds."""


def open_ours(name: str, root: Path) -> Serve:
    loader = importlib.import_module("nestseg.data.loader")
    transforms = importlib.import_module("nestseg.data.transforms")
    case = CASES[name]
    if any(root.glob("*/pack.json")):
        dataset = importlib.import_module("nestseg.data.packed").PackedDataset(root, case.split)
    else:
        dataset = importlib.import_module("nestseg.data.opening").open_dataset(name, root, case.split)
    transform = transforms.TrainTransform(base_size=case.base, crop_size=case.crop)

    def serve(repetition: int) -> None:
        plan = loader.BatchPlan(num_samples=len(dataset), batch_size=case.batch, seed=repetition)
        for batch in loader.training_batches(dataset, transform, plan=plan, start=0, stop=case.steps):
            assert batch.image.shape == (case.batch, 3, *case.crop)

    return serve


class CompiledOperators(types.ModuleType):
    """Stands where mmcv has operators that need a compiler; no transform here calls one."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object()


def open_theirs(name: str, pairs: list[list[str]]) -> Serve:
    case = CASES[name]
    sys.modules.setdefault("mmcv.ops", CompiledOperators("mmcv.ops"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is older than our torch
        importlib.import_module("mmseg.datasets.transforms")
        importlib.import_module("mmengine.registry").init_default_scope("mmseg")
        build = importlib.import_module("mmseg.registry").TRANSFORMS.build
    # the train_pipeline of its configs/_base_/datasets, whose sizes are (long side, short side)
    pipeline = [
        build(settings)
        for settings in (
            {"type": "LoadImageFromFile"},
            {"type": "LoadAnnotations"},
            {"type": "RandomResize", "scale": case.base[::-1], "ratio_range": (0.5, 2.0), "keep_ratio": True},
            {"type": "RandomCrop", "crop_size": case.crop, "cat_max_ratio": 0.75},
            {"type": "RandomFlip", "prob": 0.5},
            {"type": "PhotoMetricDistortion"},
            {"type": "PackSegInputs"},
        )
    ]

    def serve(repetition: int) -> None:
        np.random.seed(repetition)
        random.seed(repetition)
        order = np.random.permutation(len(pairs)).tolist()
        for place in range(case.batch * case.steps):
            image, label = pairs[order[place % len(order)]]
            results: dict[str, Any] = {"img_path": image, "seg_map_path": label, "seg_fields": []}
            results |= {"reduce_zero_label": False, "label_map": None}
            for transform in pipeline:
                results = transform(results)
            assert results["inputs"].dtype == torch.uint8

    return serve


def find_versions() -> dict[str, str]:
    packages = ("numpy", "opencv-python-headless", "pillow", "torch", "blosc2", "mmsegmentation", "mmcv-lite")
    found = {"python": sys.version.split()[0]}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def work(side: str) -> None:
    """Be one side: open what the first line says, then answer each number with the time that its repetition took."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    given = json.loads(sys.stdin.readline())
    serves = {
        name: open_theirs(name, what) if side == "mmsegmentation" else open_ours(name, Path(what))
        for name, what in given.items()
    }
    print(json.dumps(find_versions()), flush=True)
    for line in sys.stdin:
        name, repetition = json.loads(line)
        clock, cpu = time.perf_counter(), time.process_time()
        serves[name](repetition)
        cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
        print(json.dumps({"cpu_s": cpu, "clock_s": clock}), flush=True)


class Side:
    """A process that reads and augments when asked."""

    def __init__(self, name: str, python: str, given: dict[str, Any]) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [python, __file__, "--side", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )
        self.versions = self.ask(given)

    def ask(self, question: object) -> dict[str, Any]:
        """Write a line and wait for the answer; RuntimeError where there is none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self.name} ended without an answer")

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def find_peers() -> tuple[str | None, str]:
    """Return a Python that has mmsegmentation, and else why there is none."""
    own = ROOT / ".venv-peers" / "bin" / "python"
    for python in filter(
        None, [os.environ.get("NESTSEG_PEERS_PYTHON"), str(own) if own.exists() else "", sys.executable]
    ):
        script = "import cv2, torch; from importlib.metadata import version as v; v('mmsegmentation'), v('mmcv-lite')"
        if subprocess.run([python, "-c", script], capture_output=True, check=False).returncode == 0:
            return python, ""
    return None, "no NESTSEG_PEERS_PYTHON with it, no .venv-peers, not beside this Python; make parity-peers makes one"


def prepare(data: Path, scratch: Path, left_out: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Write the packed copies and the label maps that mmsegmentation needs; return what each side opens."""
    open_dataset = importlib.import_module("nestseg.data.opening").open_dataset
    given: dict[str, dict[str, Any]] = {side: {} for side in SIDES}
    for name, case in CASES.items():
        if not (data / case.folder).is_dir():
            left_out[name] = f"no folder {case.folder} among the samples"
            continue
        dataset = open_dataset(name, data / case.folder, case.split)
        given["nestseg"][name] = str(data / case.folder)
        pairs = [[str(pair.image), str(pair.label)] for pair in dataset.pairs]
        if name == "cityscapes":
            for index, pair in enumerate(pairs):
                pair[1] = str(scratch / f"{dataset.name(index)}_labelTrainIds.png")
                cv2.imwrite(pair[1], dataset.read(index).target)
        given["mmsegmentation"][name] = pairs
        if importlib.util.find_spec("blosc2") is None:
            left_out["nestseg packed"] = "blosc2 is not installed"
        else:
            packed = importlib.import_module("nestseg.data.packed")
            packed.pack_dataset(dataset, scratch / name, split=case.split)
            given["nestseg packed"][name] = str(scratch / name)
    return given


def rate(times: list[dict[str, float]], kind: str, samples: int) -> dict[str, float]:
    rates = [samples / each[kind] for each in times]
    low, median, high = np.percentile(rates, [0, 50, 100])
    return {"median": round(median, 1), "lowest": round(low, 1), "highest": round(high, 1)}


def measure(sides: list[Side], given: dict[str, dict[str, Any]], repeats: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, case in CASES.items():
        present = [side for side in sides if name in given[side.name]]
        times: dict[str, list[dict[str, float]]] = {side.name: [] for side in present}
        for repetition in range(repeats + 1):
            turn = repetition % max(1, len(present))
            for side in present[turn:] + present[:turn]:
                taken = side.ask([name, repetition])
                if repetition:
                    times[side.name].append(taken)
        for side in present:
            row: dict[str, Any] = {
                "dataset": name,
                "side": side.name,
                "crop": case.crop,
                "samples_per_repetition": case.batch * case.steps,
                "samples_per_cpu_second": rate(times[side.name], "cpu_s", case.batch * case.steps),
                "samples_per_second": rate(times[side.name], "clock_s", case.batch * case.steps),
            }
            if "mmsegmentation" in times and side.name != "mmsegmentation":
                ratios = [
                    theirs["cpu_s"] / ours["cpu_s"]
                    for theirs, ours in zip(times["mmsegmentation"], times[side.name], strict=True)
                ]
                low, median, high = np.percentile(ratios, [0, 50, 100])
                row["times_mmsegmentation"] = {
                    "median": round(median, 2),
                    "lowest": round(low, 2),
                    "highest": round(high, 2),
                }
                row["bar"] = case.bars.get(side.name)
                row["reached"] = None if row["bar"] is None else bool(median >= row["bar"])
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES, help="be the process of one side; for the script itself")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    arguments = parser.parse_args()
    if arguments.side:
        work(arguments.side)
        return
    nestseg = importlib.import_module("nestseg.version").__version__
    data = Path(os.environ.get("NESTSEG_REAL_DATA", ROOT / ".." / "shared" / "data"))
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout  # noqa: E731
    cpu_lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = cpu_lines[0].split(":", 1)[1].strip() if cpu_lines else platform.processor()
    left_out: dict[str, str] = {}
    peers, why = find_peers()
    load = [round(os.getloadavg()[0], 2)]
    with tempfile.TemporaryDirectory() as scratch:
        given = prepare(data, Path(scratch), left_out)
        if peers is None:
            left_out["mmsegmentation"] = why
        pythons = {"nestseg": sys.executable, "nestseg packed": sys.executable, "mmsegmentation": peers}
        sides = []
        for name, python in pythons.items():
            if python is None or not given[name]:
                continue
            try:
                sides.append(Side(name, python, given[name]))
            except (RuntimeError, BrokenPipeError):
                left_out[name] = "its process ended before the first sample; what it said stands on the screen"
        rows = measure(sides, given, arguments.repeats)
        versions = {side.name: side.versions for side in sides}
        for side in sides:
            side.close()
    load.append(round(os.getloadavg()[0], 2))
    for what, reason in left_out.items():
        print(f"left out: {what}: {reason}")
    record = {
        "question": __doc__.splitlines()[0],
        "date": datetime.now(UTC).date().isoformat(),
        "commit": git("rev-parse", "HEAD").strip(),
        "uncommitted_changes": bool(git("status", "--porcelain", "--untracked-files=no", "src").strip()),
        "machine": f"{cpu}, {os.cpu_count()} cores, one process and one thread a side",
        "load_average_before_and_after": load,
        "nestseg": nestseg,
        "versions": versions,
        "repeats": arguments.repeats,
        "left_out": left_out,
        "results": rows,
    }
    target = ROOT / "benchmarks" / "results" / nestseg / "loader.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
