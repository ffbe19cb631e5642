"""Which kernel resizes a training crop fastest without changing a pixel against the whole resize?

Run ``python benchmarks/resize_kernels.py``; it writes ``results/<version>/resize_kernels.json``. Every kernel
runs on one thread. Figures are CPU time of that thread, which other work on the machine disturbs less than the wall
clock: the median of repeated calls, the mean, and the 10th and 90th percentile as spread. The last entry times the
whole training chain on synthetic VOC-sized samples, decoding excluded.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import cv2
import numpy as np
import torch

from nestseg.core.resize import resize_image, resize_labels, scaled_size
from nestseg.core.types import Sample
from nestseg.data.transforms import TrainTransform, sample_generator
from nestseg.version import __version__

REPEATS = 40
CASES = [
    {"source": (375, 500), "base": (512, 2048), "crop": (512, 512), "factors": (0.5, 0.75, 1.0, 1.37, 2.0)},
    {"source": (1024, 2048), "base": (1024, 2048), "crop": (512, 1024), "factors": (0.5, 0.75, 1.0, 1.37, 2.0)},
]


def axis(source, size, start, count):
    """Source positions of output pixels, float64."""
    return np.clip((np.arange(start, start + count) + 0.5) * (source / size) - 0.5, 0, source - 1)


def maps(image, size, window):
    top, left, height, width = window
    x = axis(image.shape[1], size[1], left, width).astype(np.float32)
    y = axis(image.shape[0], size[0], top, height).astype(np.float32)
    return (
        np.ascontiguousarray(np.broadcast_to(x, (height, width))),
        np.ascontiguousarray(np.broadcast_to(y[:, None], (height, width))),
    )


def chosen(image, size, window):
    return resize_image(image, size, window=window)


def remap_3_channels(image, size, window):
    return cv2.remap(image, *maps(image, size, window), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def remap_4_channels(image, size, window):
    four = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)
    read = cv2.remap(four, *maps(image, size, window), cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return cv2.cvtColor(read, cv2.COLOR_RGBA2RGB)


def remap_fixed_point(image, size, window):
    fixed = cv2.convertMaps(*maps(image, size, window), cv2.CV_16SC2)
    return cv2.remap(image, *fixed, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def warp_affine(image, size, window):
    top, left, height, width = window
    down, across = image.shape[0] / size[0], image.shape[1] / size[1]
    matrix = np.array([[across, 0, (left + 0.5) * across - 0.5], [0, down, (top + 0.5) * down - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def cut(image, window):
    top, left, height, width = window
    return image[top : top + height, left : left + width]


def whole_resize_then_crop(image, size, window):
    return cut(cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR), window)


def whole_resize_exact_then_crop(image, size, window):
    return cut(cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR_EXACT), window)


def resize_of_the_source_part(image, size, window):
    """Cut the source first and resize that: quick, but its phase is off, so it is another picture."""
    top, left, height, width = window
    down, across = image.shape[0] / size[0], image.shape[1] / size[1]
    part = image[
        round(top * down) : round((top + height) * down), round(left * across) : round((left + width) * across)
    ]
    return cv2.resize(np.ascontiguousarray(part), (width, height), interpolation=cv2.INTER_LINEAR)


def numpy_gather(image, size, window):
    top, left, height, width = window
    y, x = axis(image.shape[0], size[0], top, height), axis(image.shape[1], size[1], left, width)
    low_y, low_x = y.astype(int), x.astype(int)
    high_y, high_x = np.minimum(low_y + 1, image.shape[0] - 1), np.minimum(low_x + 1, image.shape[1] - 1)
    share_y, share_x = (y - low_y).astype(np.float32)[:, None, None], (x - low_x).astype(np.float32)[None, :, None]
    first = int(low_x[0])
    part = image[:, first : int(high_x[-1]) + 1].astype(np.float32)
    rows = part[low_y] + (part[high_y] - part[low_y]) * share_y
    left_values = rows[:, low_x - first]
    return np.rint(left_values + (rows[:, high_x - first] - left_values) * share_x).astype(np.uint8)


def torch_interpolate_then_crop(image, size, window):
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    return cut(resized[0].permute(1, 2, 0).numpy(), window)


def torch_grid_sample(image, size, window):
    top, left, height, width = window
    y = torch.from_numpy((axis(image.shape[0], size[0], top, height) + 0.5) * 2 / image.shape[0] - 1)
    x = torch.from_numpy((axis(image.shape[1], size[1], left, width) + 0.5) * 2 / image.shape[1] - 1)
    grid = torch.stack(torch.broadcast_tensors(x[None, :], y[:, None]), -1)[None].float()
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    read = torch.nn.functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    return read[0].permute(1, 2, 0).round_().to(torch.uint8).numpy()


KERNELS = [
    chosen,
    remap_3_channels,
    remap_4_channels,
    remap_fixed_point,
    warp_affine,
    whole_resize_then_crop,
    whole_resize_exact_then_crop,
    resize_of_the_source_part,
    numpy_gather,
    torch_interpolate_then_crop,
    torch_grid_sample,
]


def milliseconds(call: Callable[[int], object], *, repeats: int = REPEATS) -> dict[str, float]:
    call(0)
    times = []
    for i in range(repeats):
        start = time.thread_time()
        call(i)
        times.append(1e3 * (time.thread_time() - start))
    low, median, high = np.percentile(times, [10, 50, 90])
    return {
        "median_ms": round(median, 3),
        "mean_ms": round(float(np.mean(times)), 3),
        "p10_ms": round(low, 3),
        "p90_ms": round(high, 3),
    }


def float64_answer(image, size, window):
    def along(array, positions):
        low = positions.astype(int)
        share = (positions - low)[:, None, None]
        return array[low] + (array[np.minimum(low + 1, len(array) - 1)] - array[low]) * share

    tall = along(image.astype(np.float64), axis(image.shape[0], size[0], window[0], window[2]))
    return along(tall.swapaxes(0, 1), axis(image.shape[1], size[1], window[1], window[3])).swapaxes(0, 1)


def measure_kernels() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    rng = np.random.default_rng(0)
    for case in CASES:
        image = rng.integers(0, 256, (*case["source"], 3), np.uint8)
        for factor in case["factors"]:
            size = scaled_size(case["source"], base=case["base"], factor=factor)
            height, width = min(case["crop"][0], size[0]), min(case["crop"][1], size[1])
            window = ((size[0] - height) // 2, (size[1] - width) // 3, height, width)
            exact = float64_answer(image, size, window)
            for kernel in KERNELS:
                result = kernel(image, size, window)
                whole = cut(kernel(image, size, (0, 0, *size)), window)
                row = {
                    "kernel": kernel.__name__,
                    "source": case["source"],
                    "factor": factor,
                    "size": size,
                    "window": window,
                    **milliseconds(lambda _, k=kernel, i=image, s=size, w=window: k(i, s, w)),
                    "equals_crop_of_whole": bool(np.array_equal(result, whole)),
                    "share_not_nearest": round(float((np.abs(result - exact) > 0.5 + 1e-9).mean()), 6),
                    "largest_error_grey_levels": round(float(np.abs(result - exact).max()), 4),
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def measure_chain() -> dict[str, object]:
    rng = np.random.default_rng(1)
    samples = []
    for i in range(40):
        shape = (375, 500) if i % 2 else (500, 333)
        coarse = rng.choice(np.array([0, 0, 0, 5, 9, 255], np.uint8), (4, 4))
        coarse_image = rng.integers(0, 256, (9, 9, 3), np.uint8)
        image = np.clip(resize_image(coarse_image, shape) + rng.normal(0, 6, (*shape, 3)), 0, 255).astype(np.uint8)
        samples.append(Sample(image, resize_labels(coarse, shape)))
    transform = TrainTransform(base_size=(512, 2048), crop_size=(512, 512))
    call: Callable[[int], object] = lambda i: transform(samples[i % 40], sample_generator(0, i // 40, i % 40))  # noqa: E731
    return {"what": "TrainTransform, VOC recipe, 512x512", **milliseconds(call, repeats=400)}


def main() -> None:
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    root = Path(__file__).parent
    load_before = os.getloadavg()[0]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()
    cpu_lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    cpu = cpu_lines[0].split(":", 1)[1].strip() if cpu_lines else platform.processor()
    record = {
        "question": __doc__.splitlines()[0],
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit,
        "machine": f"{cpu}, {os.cpu_count()} cores, one thread used",
        "load_average_before": round(load_before, 2),
        "versions": {
            "nestseg": __version__,
            "python": sys.version.split()[0],
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "torch": torch.__version__,
        },
        "repeats": REPEATS,
        "kernels": measure_kernels(),
        "chain": measure_chain(),
    }
    print(json.dumps(record["chain"]))
    target = root / "results" / __version__ / "resize_kernels.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
