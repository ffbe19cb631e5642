"""CamVid from random weights: which val mIoU do two toolboxes reach in the same processor time?

Ours, the recipe ``deeplabv3plus_resnest14-d16_camvid`` made longer, against segmentation_models_pytorch's DeepLabV3Plus
with ``tu-resnest14d`` and settings that are usual for it (`SMP`). Both read the same files through our loader and are
scored by our `ConfusionMatrix` on the whole val split, every label at its own size.

It takes long: with the default budget of 80 processor minutes each, about two hours on two quiet cores. ``python
benchmarks/camvid_from_scratch.py`` starts both sides at once, each a process with one thread that loads its own
pictures, so that both see the same machine whatever else it does. Schedules must know their length beforehand, so both
sides first calibrate side by side: a few steps to warm up, then timed ones until both have enough, all of which count.
Length is budget / processor time a step. Evaluation counts neither in that nor in the budget; the processor minutes
that training really used are in the record, ``results/<version>/camvid_head_to_head.json``.

The sides write into ``--work`` and do not need the script that started them: had it to be ended, ``--collect`` writes
the record from what they left there. Without the data that ``NESTSEG_REAL_DATA`` names (default ``../shared/data``),
and without segmentation_models_pytorch, the script says so and ends.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nestseg
from nestseg.core.types import IGNORE_INDEX
from nestseg.data.camvid import CamVid
from nestseg.data.loader import BatchPlan, training_batches
from nestseg.data.transforms import TrainTransform
from nestseg.engine.job import open_job, scheduled_lr
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import SegmentationScores, compute_scores
from nestseg.models.segmenter import IMAGENET_MEAN, IMAGENET_STD
from nestseg.recipes import resolve_recipe

ROOT = Path(__file__).parents[1]
SIDES = ("nestseg", "smp")
RECIPE = "deeplabv3plus_resnest14-d16_camvid"
SMP: dict[str, Any] = {
    "model": "DeepLabV3Plus",
    "encoder": "tu-resnest14d",
    "encoder_weights": None,
    "batch_size": 8,
    "crop_size": (240, 320),
    "base_size": (360, 480),
    "scale_range": (0.5, 1.5),
    "optimizer": "sgd",
    "lr": 0.02,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "poly_power": 0.9,
    "seed": 0,
}
WARM_UP_STEPS = 3
PATIENCE = 3600.0
"""Seconds that a side waits for the other to warm up."""


class Clock:
    """Processor and wall time of this process since it was made, evaluation left out."""

    def __init__(self) -> None:
        self._started = time.process_time(), time.perf_counter()
        self._evaluation = (0.0, 0.0)

    @property
    def minutes(self) -> tuple[float, float]:
        """Processor and wall minutes of training."""
        now = time.process_time(), time.perf_counter()
        processor, wall = (
            (end - start - left_out) / 60
            for end, start, left_out in zip(now, self._started, self._evaluation, strict=True)
        )
        return processor, wall

    @property
    def evaluation_minutes(self) -> tuple[float, float]:
        """Processor and wall minutes of evaluation."""
        return self._evaluation[0] / 60, self._evaluation[1] / 60

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Leave the time inside out."""
        started = time.process_time(), time.perf_counter()
        yield
        self._evaluation = (
            self._evaluation[0] + time.process_time() - started[0],
            self._evaluation[1] + time.perf_counter() - started[1],
        )


class CalibratedError(Exception):
    """Ends the training that only measures how long a step takes."""


class Calibration:
    """Times steps while the other side does the same; the sides tell each other how far they are by empty files."""

    def __init__(self, side: str, *, work: Path, timed_steps: int) -> None:
        self._side, self._work, self._timed_steps = side, work, timed_steps
        self._count = 0
        self._started = 0.0
        self.seconds_per_step = 0.0

    def _have_all(self, stage: str) -> bool:
        return all((self._work / f"{side}.{stage}").exists() for side in SIDES)

    def after_step(self) -> None:
        """Count a step; raises `CalibratedError` after the last."""
        self._count += 1
        timed = self._count - WARM_UP_STEPS
        if timed == 0:
            (self._work / f"{self._side}.warm").touch()
            deadline = time.monotonic() + PATIENCE
            while not self._have_all("warm"):
                if time.monotonic() > deadline:
                    raise TimeoutError("the other side has not warmed up; see its log")
                time.sleep(0.05)
            self._started = time.process_time()
        if timed == self._timed_steps:
            (self._work / f"{self._side}.timed").touch()
        if timed >= self._timed_steps and self._have_all("timed"):
            self.seconds_per_step = (time.process_time() - self._started) / timed
            print(f"calibrated: {self.seconds_per_step:.3f} processor seconds a step, of {timed} steps", flush=True)
            raise CalibratedError

    def choose_steps(self, *, processor_minutes: float, points: int) -> int:
        """Return how many steps fit into the budget, a multiple of the points of the curve."""
        steps = round(60 * processor_minutes / self.seconds_per_step / points) * points
        print(f"{max(points, steps)} steps", flush=True)
        return max(points, steps)


def describe_scores(scores: SegmentationScores) -> dict[str, Any]:
    return {
        "mean_iou": scores.mean_iou,
        "pixel_accuracy": scores.pixel_accuracy,
        "iou_per_class": dict(zip(CamVid.taxonomy.classes, scores.iou_per_class, strict=True)),
    }


def run_ours(data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    engine = importlib.import_module("nestseg.engine.train")
    evaluate = engine.evaluate
    calibration = Calibration("nestseg", work=arguments.work, timed_steps=arguments.timed_steps)
    trial = ["data.num_workers=0", "schedule.max_steps=100000", "evaluation.every_steps=null"]
    job = open_job(resolve_recipe(RECIPE, trial), data, run=None, device="cpu")
    job.stepper.model.train()
    batches = training_batches(job.dataset, job.transform, plan=job.plan, start=0, stop=job.max_steps)
    try:
        for step, batch in enumerate(batches):
            job.stepper.step(batch, step=step + 1, lr=scheduled_lr(job.recipe, step=step))
            calibration.after_step()
    except CalibratedError:
        batches.close()
    steps = calibration.choose_steps(processor_minutes=arguments.processor_minutes, points=arguments.points)

    used: list[tuple[float, float]] = []
    scores: list[dict[str, Any]] = []

    def timed_evaluate(*given: Any, **more: Any) -> Any:
        used.append(clock.minutes)
        with clock.evaluating():
            result = evaluate(*given, **more)
        scores.append(describe_scores(result.scores))
        return result

    engine.evaluate = timed_evaluate
    overrides = [
        "data.num_workers=0",
        f"schedule.max_steps={steps}",
        f"evaluation.every_steps={steps // arguments.points}",
    ]
    recipe = resolve_recipe(RECIPE, overrides)
    clock = Clock()
    weights = engine.train(recipe, data, run=arguments.work / "run", device="cpu")
    return {
        "settings": {"recipe": RECIPE, "overrides": overrides, "resolved": recipe.model_dump(mode="json")},
        "evaluation": f"single scale, whole pictures resized to {recipe.evaluation.base_size}, labels at their size",
        **summarise(calibration, clock, steps=steps, used=used, scores=scores),
        "weights": str(weights.relative_to(arguments.work)),
    }


def run_smp(data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    train_set, val_set = CamVid(data, "train"), CamVid(data, "val")
    transform = TrainTransform(
        base_size=SMP["base_size"],
        crop_size=SMP["crop_size"],
        scale_range=SMP["scale_range"],
        max_class_share=1.0,
        photometric_probability=0.0,
    )
    plan = BatchPlan(num_samples=len(train_set), batch_size=SMP["batch_size"], seed=SMP["seed"])
    calibration = Calibration("smp", work=arguments.work, timed_steps=arguments.timed_steps)
    try:
        for _ in train_smp(build_smp(), training_batches(train_set, transform, plan=plan, start=0, stop=10**5), 10**5):
            calibration.after_step()
    except CalibratedError:
        pass
    steps = calibration.choose_steps(processor_minutes=arguments.processor_minutes, points=arguments.points)

    used: list[tuple[float, float]] = []
    scores: list[dict[str, Any]] = []
    clock = Clock()
    model = build_smp()
    batches = training_batches(train_set, transform, plan=plan, start=0, stop=steps)
    for step, loss in enumerate(train_smp(model, batches, steps), start=1):
        if step % 10 == 0:
            print(f"step {step}/{steps}  loss {loss:.4f}  {clock.minutes[0]:.2f} processor minutes", flush=True)
        if step % (steps // arguments.points) == 0:
            used.append(clock.minutes)
            with clock.evaluating():
                scores.append(describe_scores(evaluate_smp(model, val_set)))
            print(json.dumps({"step": step, **scores[-1]}), flush=True)
    torch.save(model.state_dict(), arguments.work / "smp.pt")
    return {
        "settings": {**SMP, "flip_probability": 0.5, "loss": "cross-entropy of upsampled logits, void ignored"},
        "evaluation": "single scale, whole pictures of 360x480, padded to 368x480 and cropped back",
        **summarise(calibration, clock, steps=steps, used=used, scores=scores),
        "weights": "smp.pt",
    }


def build_smp() -> nn.Module:
    smp = importlib.import_module("segmentation_models_pytorch")
    torch.manual_seed(SMP["seed"])
    model: nn.Module = smp.DeepLabV3Plus(
        SMP["encoder"], encoder_weights=SMP["encoder_weights"], classes=CamVid.taxonomy.num_classes
    )
    return model


def train_smp(model: nn.Module, batches: Iterator[Any], steps: int) -> Iterator[float]:
    """Train step by step, yielding the loss of each."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=SMP["lr"], momentum=SMP["momentum"], weight_decay=SMP["weight_decay"]
    )
    for step, batch in enumerate(batches):
        model.train()
        optimizer.param_groups[0]["lr"] = SMP["lr"] * (1 - step / steps) ** SMP["poly_power"]
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(normalise(batch.image)), batch.target.long(), ignore_index=IGNORE_INDEX)
        loss.backward()
        optimizer.step()
        yield loss.item()


def normalise(image: Tensor) -> Tensor:
    """Map 8-bit RGB to zero mean and unit deviation.

    Shape:
        - image: (N, 3, H, W) uint8
        - returns: (N, 3, H, W) float
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (image.float() - mean) / std


@torch.inference_mode()
def evaluate_smp(model: nn.Module, dataset: CamVid) -> SegmentationScores:
    model.eval()
    confusion = ConfusionMatrix(CamVid.taxonomy.num_classes)
    for index in range(len(dataset)):
        sample = dataset.read(index)
        height, width = sample.target.shape
        image = normalise(torch.from_numpy(np.ascontiguousarray(sample.image.transpose(2, 0, 1)))[None])
        # after normalisation, so that the border has the mean colour
        logits = model(F.pad(image, (0, -width % 16, 0, -height % 16)))
        labels = logits[0, :, :height, :width].argmax(0).to(torch.uint8)
        confusion.update(labels.numpy(), sample.target)
    return compute_scores(confusion, absent=dataset.absent_classes)


def summarise(
    calibration: Calibration,
    clock: Clock,
    *,
    steps: int,
    used: list[tuple[float, float]],
    scores: list[dict[str, Any]],
) -> dict[str, Any]:
    curve = [
        {
            "step": steps * place // len(scores),
            "processor_minutes": round(processor, 2),
            "wall_minutes": round(wall, 2),
            "mean_iou": round(point["mean_iou"], 4),
            "pixel_accuracy": round(point["pixel_accuracy"], 4),
        }
        for place, ((processor, wall), point) in enumerate(zip(used, scores, strict=True), start=1)
    ]
    (processor, wall), (evaluation_processor, evaluation_wall) = clock.minutes, clock.evaluation_minutes
    return {
        "calibrated_seconds_per_step": round(calibration.seconds_per_step, 4),
        "steps": steps,
        "processor_minutes": round(processor, 2),
        "wall_minutes": round(wall, 2),
        "evaluation_processor_minutes": round(evaluation_processor, 2),
        "evaluation_wall_minutes": round(evaluation_wall, 2),
        **scores[-1],
        "curve": curve,
    }


def work(side: str, data: Path, arguments: argparse.Namespace) -> None:
    """Be one side: calibrate, train, and leave the result in the work folder."""
    niceness = os.nice(arguments.nice)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    load = [round(os.getloadavg()[0], 2)]
    # of the package that is run, which need not lie beside this script
    package = Path(nestseg.__file__).parent
    git = lambda *words: subprocess.run(["git", *words], cwd=package, capture_output=True, text=True).stdout.strip()  # noqa: E731
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", ".")
    print(f"{side}: process {os.getpid()}, nestseg of {package} at {commit}", flush=True)
    started = datetime.now(UTC)
    result = run_ours(data, arguments) if side == "nestseg" else run_smp(data, arguments)
    cpu_lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = cpu_lines[0].split(":", 1)[1].strip() if cpu_lines else platform.processor()
    packages = ("numpy", "opencv-python-headless", "torch", "timm", "segmentation_models_pytorch")
    result |= {
        "started": started.isoformat(timespec="seconds"),
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average_before_and_after": [*load, round(os.getloadavg()[0], 2)],
        "commit": commit,
        "uncommitted_changes": bool(changes),
        "nestseg": nestseg.__version__,
        "versions": {"python": sys.version.split()[0], **{package: version(package) for package in packages}},
        "machine": f"{cpu}, {os.cpu_count()} cores, one process and one thread a side, both at once",
        "budget_processor_minutes": arguments.processor_minutes,
        "nice": niceness,
    }
    temporary = arguments.work / f"{side}.json.part"
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    temporary.replace(arguments.work / f"{side}.json")


def start(arguments: argparse.Namespace) -> None:
    """Start both sides and wait for them; they go on if this process ends."""
    if arguments.work.exists() and any(arguments.work.iterdir()):
        raise SystemExit(f"{arguments.work} is not empty; collect what is there with --collect, or name another --work")
    arguments.work.mkdir(parents=True, exist_ok=True)
    sides = {}
    for side in SIDES:
        options = {name: getattr(arguments, name) for name in ("processor_minutes", "timed_steps", "points", "nice")}
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        with (arguments.work / f"{side}.log").open("w") as log:
            sides[side] = subprocess.Popen(
                [sys.executable, __file__, "--side", side, "--work", str(arguments.work), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            )
        print(f"{side}: process {sides[side].pid}, log {arguments.work / f'{side}.log'}", flush=True)
    failed = [side for side, process in sides.items() if process.wait() != 0]
    if failed:
        raise SystemExit(f"{' and '.join(failed)} failed; see the logs in {arguments.work}")


def collect(arguments: argparse.Namespace) -> None:
    """Write the record from what the sides left."""
    missing = [side for side in SIDES if not (arguments.work / f"{side}.json").is_file()]
    if missing:
        raise SystemExit(f"no result of {' and '.join(missing)} in {arguments.work}; the logs say how far they are")
    results = {side: json.loads((arguments.work / f"{side}.json").read_text()) for side in SIDES}
    shared = ("commit", "uncommitted_changes", "nestseg", "versions", "machine", "budget_processor_minutes", "nice")
    for name in shared:
        if len({json.dumps(result[name]) for result in results.values()}) != 1:
            raise SystemExit(f"the sides differ in {name}: they are not of one run")
    record = {
        "question": __doc__.splitlines()[0],
        "date": results["nestseg"]["started"][:10],
        **{name: results["nestseg"][name] for name in shared},
        "data": "CamVid, 367 train and 101 val pictures, 360x480, JPEG copies",
        "sides": {
            side: {name: value for name, value in result.items() if name not in shared}
            for side, result in results.items()
        },
    }
    target = ROOT / "benchmarks" / "results" / record["nestseg"] / "camvid_head_to_head.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    for side, result in results.items():
        print(f"{side}: val mIoU {result['mean_iou']:.4f} after {result['processor_minutes']} processor minutes")
    print(target.relative_to(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", choices=SIDES, help="be the process of one side; for the script itself")
    parser.add_argument("--processor-minutes", type=float, default=80.0, help="training budget of each side")
    parser.add_argument("--timed-steps", type=int, default=20, help="fewest steps that a calibration times")
    parser.add_argument("--points", type=int, default=5, help="evaluations of each side")
    parser.add_argument("--nice", type=int, default=0, help="added to the niceness of both sides")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "camvid_head_to_head", help="empty or new folder")
    parser.add_argument("--collect", action="store_true", help="only write the record from an earlier run's --work")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    data = Path(os.environ.get("NESTSEG_REAL_DATA", ROOT / ".." / "shared" / "data")) / "camvid"
    if arguments.side:
        work(arguments.side, data, arguments)
        return
    if not arguments.collect:
        # not a failure: the other benchmarks go on
        if not data.is_dir():
            print(f"left out: no folder {data}; let NESTSEG_REAL_DATA name the folder that holds camvid")
            return
        if importlib.util.find_spec("segmentation_models_pytorch") is None:
            print("left out: segmentation_models_pytorch is not installed; it comes with nestseg[dev]")
            return
        start(arguments)
    collect(arguments)


if __name__ == "__main__":
    main()
