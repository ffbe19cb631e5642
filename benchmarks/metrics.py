"""How fast is everything counted that an evaluation reports, and the confusion matrix beside the Cityscapes script?

Run ``OMP_NUM_THREADS=1 python benchmarks/metrics.py``; it writes ``results/<version>/metrics.json``. Maps are drawn:
twelve classes in smooth regions, the prediction frayed along their edges, with more changes along the rows than street
scenes have; pure noise is the worst case for counting objects. Figures are processor time of this process, which other
work on the machine disturbs less than the wall clock: the median of repeated calls, and the 10th and 90th percentile.
The official script (``pip install cityscapesscripts``; left out with a line where it is absent) reads the PNGs of each
pair itself, so its rows stand beside ours on the same files, and a row says what reading them takes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from nestseg.data.cityscapes import TRAIN_ID_TO_LABEL_ID
from nestseg.metrics.bootstrap import bootstrap_mean_iou, paired_bootstrap
from nestseg.metrics.boundary import BoundaryCounts
from nestseg.metrics.calibration import CalibrationCounts
from nestseg.metrics.cityscapes import CityscapesCounts
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.image_scores import ImageScoreWriter, image_counts
from nestseg.metrics.objects import ObjectCounts
from nestseg.version import __version__

REPEATS = 15
CASES = {"cityscapes": ((1024, 2048), 19, 500), "ade20k": ((512, 683), 150, 2000)}
OFFICIAL = "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling"


def ask_git(*words: str) -> str:
    command = ["git", *words]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def draw_maps(size: tuple[int, int], num_classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, ground truth and confidence of one picture."""
    generator = np.random.default_rng(0)
    height, width = size

    def smooth(step: int) -> np.ndarray:
        coarse = generator.standard_normal((height // step + 1, width // step + 1)).astype(np.float32)
        return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)

    scores = [smooth(64) for _ in range(12)]
    ids = generator.permutation(num_classes)[:12].astype(np.uint8)
    target = ids[np.argmax(scores, axis=0)]
    frayed = np.stack([score + 0.1 * smooth(8) for score in scores])
    labels = ids[np.argmax(frayed, axis=0)]
    target[smooth(32) > 1.3] = 255
    confidence = 1 / np.exp(frayed - frayed.max(axis=0)).sum(axis=0)
    return labels, target, confidence


def measure(call: Callable[[], object], repeats: int = REPEATS) -> dict[str, object]:
    times = []
    for repeat in range(repeats + 2):
        started = time.process_time()
        call()
        if repeat > 1:
            times.append((time.process_time() - started) * 1e3)
    spread = [round(float(value), 2) for value in np.percentile(times, (10, 90))]
    return {"ms": round(statistics.median(times), 2), "p10_p90_ms": spread}


def count_pictures(dataset: str) -> list[dict[str, object]]:
    size, num_classes, _ = CASES[dataset]
    labels, target, confidence = draw_maps(size, num_classes)
    noise = np.random.default_rng(1).integers(0, num_classes, size, np.uint8)
    confusion, boundary = ConfusionMatrix(num_classes), BoundaryCounts(num_classes)
    objects, calibration = ObjectCounts(num_classes), CalibrationCounts()
    calls: dict[str, Callable[[], object]] = {
        "ConfusionMatrix": lambda: confusion.update(labels, target),
        "BoundaryCounts": lambda: boundary.update(labels, target),
        "ObjectCounts": lambda: objects.update(labels, target),
        "ObjectCounts, prediction of pure noise": lambda: objects.update(noise, target),
        "CalibrationCounts": lambda: calibration.update(confidence, labels, target),
    }
    rows = []
    for name, call in calls.items():
        found = measure(call)
        speed = round(target.size / float(str(found["ms"])) / 1e3, 1)
        rows.append({"dataset": dataset, "count": name, **found, "mpixel_per_s": speed})
    with tempfile.TemporaryDirectory() as folder:
        names = [f"class {index}" for index in range(num_classes)]
        with ImageScoreWriter(Path(folder) / "images.csv", names) as writer:
            found = measure(lambda: writer.write(0, "picture", image_counts(confusion)))
    rows.append({"dataset": dataset, "count": "image_counts and a line of ImageScoreWriter", **found})
    return rows


def draw_intervals(dataset: str) -> list[dict[str, object]]:
    _, num_classes, num_images = CASES[dataset]
    counts = np.sort(np.random.default_rng(0).integers(0, 9999, (num_images, num_classes, 3)), axis=2)
    calls: dict[str, Callable[[], object]] = {
        "bootstrap_mean_iou, 2000 repeats": lambda: bootstrap_mean_iou(counts, absent="skip"),
        "paired_bootstrap, 2000 repeats": lambda: paired_bootstrap(counts, counts, absent="skip"),
    }
    return [
        {"dataset": dataset, "images": num_images, "count": name, **measure(call, repeats=5)}
        for name, call in calls.items()
    ]


def compare_with_official() -> list[dict[str, object]]:
    size, num_classes, _ = CASES["cityscapes"]
    labels, target, _ = draw_maps(size, num_classes)
    label_ids = np.where(target == 255, 0, TRAIN_ID_TO_LABEL_ID[np.minimum(target, num_classes - 1)]).astype(np.uint8)
    with_instances = np.isin(label_ids, (24, 25, 26, 27, 28, 31, 32, 33))
    parts = cv2.connectedComponents(with_instances.astype(np.uint8))[1] % 1000
    instance_ids = np.where(with_instances, label_ids * np.int32(1000) + parts, label_ids).astype(np.uint16)
    confusion, counts = ConfusionMatrix(34), CityscapesCounts()

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"a_{name}.png" for name in ("prediction", "labelIds", "instanceIds")}
        images = (TRAIN_ID_TO_LABEL_ID[labels].astype(np.uint8), label_ids, instance_ids)
        for path, pixels in zip(files.values(), images, strict=True):
            Image.fromarray(pixels).save(path)

        def read(*names: str) -> list[np.ndarray]:
            found = []
            for name in names:
                with Image.open(files[name]) as image:
                    found.append(np.array(image))
            return found

        calls: dict[str, Callable[[], object]] = {
            "two PNGs read": lambda: read("prediction", "labelIds"),
            "ConfusionMatrix of label ids, from two PNGs": lambda: confusion.update(*read("prediction", "labelIds")),
            "CityscapesCounts with instances, from three PNGs": lambda: counts.update(
                *read("prediction", "labelIds", "instanceIds")
            ),
        }
        if importlib.util.find_spec("cityscapesscripts") is None:
            print("cityscapesscripts is not installed: its rows are left out")
        else:
            official = importlib.import_module(OFFICIAL)
            kind = "compiled" if official.CSUPPORT else "its numpy path"
            # it calls a function that numpy 2.4 dropped
            np.in1d = np.isin

            def evaluate_pair(with_instances: bool) -> None:
                official.args.evalInstLevelScore = with_instances
                paths = str(files["prediction"]), str(files["labelIds"])
                official.evaluatePair(*paths, matrix, instances, {}, official.args)

            matrix = official.generateMatrix(official.args)
            instances = official.generateInstanceStats(official.args)
            calls[f"evaluatePair without instances, {kind}"] = lambda: evaluate_pair(False)
            calls[f"evaluatePair with instances, {kind}"] = lambda: evaluate_pair(True)
        return [{"dataset": "cityscapes", "count": name, **measure(call, repeats=7)} for name, call in calls.items()]


def main() -> None:
    cv2.setNumThreads(1)
    load = os.getloadavg()[0]
    rows = [row for dataset in CASES for row in count_pictures(dataset) + draw_intervals(dataset)]
    rows += compare_with_official()
    has_official = importlib.util.find_spec("cityscapesscripts") is not None
    record = {
        "question": "How fast is everything counted, and the confusion matrix beside the Cityscapes script?",
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
            "cityscapesscripts": version("cityscapesscripts") if has_official else None,
        },
        "pictures": {name: {"size": size, "classes": k} for name, (size, k, _) in CASES.items()},
        "repeats": REPEATS,
        "threads_of_blas": os.environ.get("OMP_NUM_THREADS", "all"),
        "counts": rows,
    }
    path = Path(__file__).with_name("results") / __version__ / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
