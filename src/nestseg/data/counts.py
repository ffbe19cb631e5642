"""One pass over a split: the few numbers of every sample that statistics and rare-class sampling are made of.

They are kept in the cache folder, since class weights and rare-class sampling ask for them at every start of a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch.utils.data import DataLoader

from nestseg.core.disk import cache_folder, replaced_file
from nestseg.core.errors import DataError, NestsegError
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import IGNORE_INDEX, Size
from nestseg.data.custom import CustomDataset
from nestseg.data.dataset import FileDataset, SegmentationDataset

OnProgress = Callable[[int, int], None]
"""Called with the number of samples that are done, and of all."""

_FORMAT = "1"
"""Part of the name of a kept file: counts that another version wrote in another form are never read."""

_CHUNK = 8
_SHOWN = 10
_LEVELS = np.arange(256)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SplitCounts:
    """What one pass over a split of N images and K classes counted.

    The classes of image i are ``classes[offsets[i]:offsets[i + 1]]``, ascending, with their ``pixels`` beside them.

    Args:
        num_classes: K.
        sizes: (height, width) of every image.
        ignored: Ignored pixels of every image.
        offsets: Where every image's classes begin, and the end of all.
        classes: Train ids that occur.
        pixels: Their pixels, at least 1.
        channel_sums: Sum of every channel over all pixels; a whole number, exact, where images hold whole numbers.
        channel_squares: Sum of the squares, likewise.

    Shape:
        - sizes: (N, 2) int64
        - ignored: (N,) int64
        - offsets: (N + 1,) int64
        - classes: (M,) uint8
        - pixels: (M,) int64
    """

    num_classes: int
    sizes: NDArray[np.int64]
    ignored: NDArray[np.int64]
    offsets: NDArray[np.int64]
    classes: NDArray[np.uint8]
    pixels: NDArray[np.int64]
    channel_sums: tuple[int | float, ...]
    channel_squares: tuple[int | float, ...]

    @property
    def num_images(self) -> int:
        """Number of images N."""
        return len(self.sizes)

    @property
    def class_pixels(self) -> NDArray[np.int64]:
        """Pixels by train id: (K,) int64."""
        total = np.zeros(self.num_classes, np.int64)
        np.add.at(total, self.classes, self.pixels)
        return total

    @property
    def class_images(self) -> NDArray[np.int64]:
        """Images in which a class occurs, by train id: (K,) int64."""
        return np.bincount(self.classes, minlength=self.num_classes)

    @property
    def image_of_entry(self) -> NDArray[np.int64]:
        """The image that each entry of ``classes`` and ``pixels`` belongs to: (M,) int64."""
        return np.repeat(np.arange(self.num_images), np.diff(self.offsets))


def count_split(
    dataset: SegmentationDataset,
    *,
    num_workers: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> SplitCounts:
    """Read every sample of a split once and count.

    Args:
        dataset: The split.
        num_workers: Processes; 0 reads in this one. By default one a core, or 0 for a handful of images.
        on_progress: Called after every few samples.

    Returns:
        The counts; the same for any number of workers.

    Raises:
        DataError: E-DATA-092, if samples cannot be read or hold ids without a class: all of them are counted, the first
            ones listed.
    """
    total = len(dataset)
    # as in the training loader: OpenCV's threads do not survive a fork
    cv2.setNumThreads(1)
    loader: DataLoader[list[_Counted | NestsegError]] = DataLoader(
        _CountedSamples(dataset),  # type: ignore[arg-type]  # its items are no tensors
        batch_size=_CHUNK,
        collate_fn=list,
        num_workers=_default_workers(total) if num_workers is None else num_workers,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),
    )
    tally = _Tally()
    done = 0
    for chunk in loader:
        for item in chunk:
            tally.add(item)
        done += len(chunk)
        on_progress(done, total)
    return tally.finish(dataset.taxonomy)


def load_counts(
    dataset: SegmentationDataset,
    *,
    num_workers: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> SplitCounts:
    """Return the counts of a split from the cache folder, or count and keep them there.

    They are found again as long as every file has the path, size and time of change that it had. A data set whose
    samples are not pairs of files is counted every time. Processes that ask at once wait for one of them to count.

    Args:
        dataset: The split.
        num_workers: See `count_split`.
        on_progress: See `count_split`; not called where nothing is counted.

    Raises:
        DataError: See `count_split`.
        OSError: If the cache folder cannot be written.
    """
    if (fingerprint := _fingerprint(dataset)) is None:
        return count_split(dataset, num_workers=num_workers, on_progress=on_progress)
    path = cache_folder() / "counts" / f"{fingerprint}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if (kept := _read_counts(path, num_images=len(dataset))) is not None:
            return kept
        counts = count_split(dataset, num_workers=num_workers, on_progress=on_progress)
        _write_counts(path, counts)
    return counts


class _Counted(NamedTuple):
    """What is kept of a sample."""

    size: Size
    histogram: NDArray[np.int64]
    """(256,) pixels by train id."""
    channel_sums: list[int | float]
    channel_squares: list[int | float]


@dataclass(frozen=True, slots=True)
class _CountedSamples:
    """The map-style data set that the workers read: an index in, counts out."""

    dataset: SegmentationDataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Counted | NestsegError:
        try:
            image, target = self.dataset.read(index)
        except NestsegError as error:
            return error.at(self.dataset.name(index))
        histogram = np.array(Image.fromarray(target).histogram(), np.int64)
        num_classes = self.dataset.taxonomy.num_classes
        if histogram[num_classes:IGNORE_INDEX].any():
            wrong = num_classes + int(np.flatnonzero(histogram[num_classes:])[0])
            return DataError(
                "E-DATA-093",
                f"train id {wrong}; allowed: 0-{num_classes - 1} or {IGNORE_INDEX}",
                fix="map it to a class, or ignore it",
                path=self.dataset.name(index),
            )
        return _Counted((target.shape[0], target.shape[1]), histogram, *_sum_channels(image))


def _sum_channels(image: NDArray[np.uint8]) -> tuple[list[int | float], list[int | float]]:
    """Sum values and squares a channel: exact for whole numbers, in float64 for others."""
    if image.dtype == np.uint8 and image.shape[2] == 3:
        # three times as fast as the sums below, which work on copies of eight bytes a value
        histogram = np.array(Image.fromarray(image).histogram(), np.int64).reshape(3, 256)
        return (histogram @ _LEVELS).tolist(), (histogram @ _LEVELS**2).tolist()
    flat = image.reshape(-1, image.shape[2])
    wide = flat.astype(np.float64 if np.issubdtype(image.dtype, np.floating) else np.uint64)
    return wide.sum(0).tolist(), (wide * wide).sum(0).tolist()


class _Tally:
    """Everything that is kept while samples pass by, a few numbers each."""

    def __init__(self) -> None:
        self.sizes, self.ignored = array("q"), array("q")
        self.offsets, self.classes, self.pixels = array("q", [0]), bytearray(), array("q")
        self.channel_sums: list[int | float] = []
        self.channel_squares: list[int | float] = []
        self.num_bad = 0
        self.first_bad: list[NestsegError] = []

    def add(self, item: _Counted | NestsegError) -> None:
        if isinstance(item, NestsegError):
            self.num_bad += 1
            self.first_bad += [item] if len(self.first_bad) < _SHOWN else []
            return
        present = np.flatnonzero(item.histogram[:IGNORE_INDEX])
        self.sizes.extend(item.size)
        self.ignored.append(int(item.histogram[IGNORE_INDEX]))
        self.classes.extend(present.tolist())
        self.pixels.extend(item.histogram[present].tolist())
        self.offsets.append(len(self.pixels))
        self.channel_sums = _add_up(self.channel_sums, item.channel_sums)
        self.channel_squares = _add_up(self.channel_squares, item.channel_squares)

    def finish(self, taxonomy: Taxonomy) -> SplitCounts:
        num_images = len(self.ignored)
        if self.num_bad:
            raise DataError(
                "E-DATA-092",
                f"{self.num_bad} of {num_images + self.num_bad} samples cannot be counted",
                fix="nestseg data verify explains every one of them",
                path=taxonomy.name,
                table=[f"  {error}" for error in self.first_bad],
            )
        return SplitCounts(
            num_classes=taxonomy.num_classes,
            sizes=np.array(self.sizes, np.int64).reshape(-1, 2),
            ignored=np.array(self.ignored, np.int64),
            offsets=np.array(self.offsets, np.int64),
            classes=np.frombuffer(bytes(self.classes), np.uint8),
            pixels=np.array(self.pixels, np.int64),
            channel_sums=tuple(self.channel_sums),
            channel_squares=tuple(self.channel_squares),
        )


def _add_up(total: Sequence[int | float], more: Sequence[int | float]) -> list[int | float]:
    return [a + b for a, b in zip(total, more, strict=True)] if total else list(more)


def _default_workers(num_images: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if cores > 1 and num_images >= 8 * _CHUNK else 0


def _ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _fingerprint(dataset: SegmentationDataset) -> str | None:
    """Hash what the counts of a split depend on: what labels mean, and every file's path, size and time of change.

    None where samples are not pairs of files.
    """
    match dataset:
        case FileDataset():
            meaning = json.dumps([dataset.taxonomy.name, dataset.taxonomy.classes, dataset.label_map.tolist()])
        case CustomDataset():
            meaning = dataset.spec.model_dump_json()
        case _:
            return None
    if len(dataset.pairs) != len(dataset):
        return None
    digest = hashlib.sha256(f"{_FORMAT} {meaning}\n".encode())
    for pair in dataset.pairs:
        for path in (pair.image, pair.label):
            status = path.stat()
            digest.update(
                f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
    return digest.hexdigest()


_ARRAYS = ("sizes", "ignored", "offsets", "classes", "pixels")


def _write_counts(path: Path, counts: SplitCounts) -> None:
    numbers = {
        "num_classes": counts.num_classes,
        "channel_sums": counts.channel_sums,
        "channel_squares": counts.channel_squares,
    }
    metadata = {name: json.dumps(value) for name, value in numbers.items()}
    with replaced_file(path) as temporary:
        save_file({name: getattr(counts, name) for name in _ARRAYS}, temporary, metadata)


def _read_counts(path: Path, *, num_images: int) -> SplitCounts | None:
    """Read kept counts; None where there are none, or the file is damaged: then they are counted anew."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            numbers = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
    except (SafetensorError, OSError, ValueError):
        return None
    if len(arrays["sizes"]) != num_images:
        return None
    return SplitCounts(
        num_classes=numbers["num_classes"],
        channel_sums=tuple(numbers["channel_sums"]),
        channel_squares=tuple(numbers["channel_squares"]),
        **arrays,
    )
