"""One pass over every file of a data set, in parallel, with bounded memory."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.image_io import MAX_PIXELS
from nestseg.core.taxonomy import Colour
from nestseg.core.types import IGNORE_INDEX
from nestseg.data.custom import CustomDataset
from nestseg.data.dataset import FileDataset, PairsError, SampleFiles
from nestseg.data.datasets import DATASETS
from nestseg.data.opening import open_dataset
from nestseg.data.spec import DatasetSpec
from nestseg.data.verify import problems as kinds
from nestseg.data.verify.files import (
    RGB,
    Expected,
    FileCheck,
    ImageType,
    Picture,
    check_hash,
    check_picture,
    check_typed_picture,
    is_read,
)
from nestseg.data.verify.labels import LabelRule, check_labels
from nestseg.data.verify.manifest import find_manifest, read_expected
from nestseg.data.verify.pairs import Split, check_names, collect_splits
from nestseg.data.verify.problems import Problem, make_problem
from nestseg.data.verify.report import Report
from nestseg.data.verify.tally import TINY, Result, Tally

OnProgress = Callable[[int, int], None]
"""Called with the number of samples and other files that are done, and of all."""

_CHUNK = 8


class _Sample(NamedTuple):
    """A sample on its way to a worker; the paths are text, a third of the size of a ``Path``."""

    split: int
    place: int
    image: str | None
    label: str | None
    image_expected: Expected | None
    label_expected: Expected | None


class _Other(NamedTuple):
    """A file that the manifest names and no sample has."""

    path: str
    expected: Expected


def verify_named(
    name: str,
    root: str | Path | None,
    *,
    splits: Sequence[str] = (),
    num_workers: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Report:
    """Verify a data set of the table `DATASETS`.

    Args:
        name: Its name.
        root: Its folder.
        splits: Which splits; by default all that are there.
        num_workers: See `verify_dataset`.
        on_progress: See `verify_dataset`.

    Raises:
        DataError: E-DATA-025 for an unknown name, E-DATA-021 for an unknown split.
    """
    dataset = DATASETS.get(name)
    if dataset is None:
        open_dataset(name, root, "val")  # raises, with the names that there are
        raise AssertionError(name)
    names = [dataset.check_split(split) for split in splits] or list(dataset.splits)
    if not issubclass(dataset, FileDataset):
        problem = make_problem(
            kinds.NO_FILES_AT_ALL, name, "drawn by code: there is nothing to verify", fix="train on it"
        )
        return Report(dataset=name, root=str(root), taxonomy=dataset.taxonomy, splits=(), problems=(problem,))
    rule = LabelRule(taxonomy=dataset.taxonomy, values=frozenset(dataset.label_values), label_map=dataset.label_map)
    return verify_dataset(
        collect_splits(names, lambda split: dataset(root, split)),
        rule,
        root=root or "",
        num_workers=num_workers,
        on_progress=on_progress,
    )


def verify_custom(
    spec: DatasetSpec,
    root: str | Path | None,
    *,
    splits: Sequence[str] = (),
    num_workers: int | None = None,
    on_progress: OnProgress = lambda done, total: None,
) -> Report:
    """Verify a data set of your own; arguments as `verify_named`."""
    names = list(splits) or list(spec.splits)
    if spec.files is None or spec.label_format in {"coco", "labelme"}:
        return _verify_by_reading(spec, root, names, num_workers=num_workers, on_progress=on_progress)
    colours = spec.class_of_colour if spec.label_format in {"colours", "binary"} else None
    label_map = spec.make_id_table()
    if colours is not None:
        label_map = np.full(256, IGNORE_INDEX, np.uint8)
        label_map[: len(spec.classes)] = range(len(spec.classes))
    values = frozenset(spec.class_of_id if colours is None else colours.values())
    rule = LabelRule(taxonomy=spec.taxonomy, values=values, label_map=label_map, colours=colours)
    return verify_dataset(
        collect_splits(names, lambda split: CustomDataset(spec, root, split)),
        rule,
        root=root or "",
        image_type=ImageType(spec.channels, spec.dtype),
        num_workers=num_workers,
        on_progress=on_progress,
    )


def _verify_by_reading(
    spec: DatasetSpec,
    root: str | Path | None,
    names: Sequence[str],
    *,
    num_workers: int | None,
    on_progress: OnProgress,
) -> Report:
    """Read every sample of a data set whose labels are no picture files of their own."""
    num_classes = spec.taxonomy.num_classes
    identity = np.full(256, IGNORE_INDEX, np.uint8)
    identity[:num_classes] = range(num_classes)
    rule = LabelRule(taxonomy=spec.taxonomy, values=frozenset((*range(num_classes), IGNORE_INDEX)), label_map=identity)
    splits = []
    for name in names:
        try:
            dataset = CustomDataset(spec, root, name)
        except DataError as error:
            causes = error.causes if isinstance(error, PairsError) and error.causes else (error,)
            problems = [make_problem(kinds.LAYOUT, str(e.path or ""), e.reason, fix=e.fix) for e in causes]
            splits.append(Split(name, (), problems))
        else:
            splits.append(
                Split(name, [SampleFiles(dataset.name(i), Path(dataset.name(i)), None) for i in range(len(dataset))])
            )
    jobs = (
        _Sample(index, place, sample.name, None, None, None)
        for index, split in enumerate(splits)
        for place, sample in enumerate(split.samples)
    )
    # train ids were made of drawn outlines or by the table of ids: there is nothing left to guess
    tally = Tally(splits=splits, rule=rule, root=str(root), explains=False)
    for split in splits:
        tally.problems += [problem._replace(split=split.name) for problem in split.problems]
    work = partial(_read_jobs, spec=spec, root=root, names=tuple(names))
    total = sum(len(split.samples) for split in splits)
    _add_results(tally, work, jobs, total=total, num_workers=num_workers, on_progress=on_progress)
    return tally.finish()


def _read_jobs(
    jobs: Sequence[_Sample | _Other], *, spec: DatasetSpec, root: str | Path | None, names: Sequence[str]
) -> list[Result]:
    """Read samples of a described data set; each process opens a split once."""
    results = []
    for job in jobs:
        assert isinstance(job, _Sample), "a manifest lists files, and these are none"
        key = (spec.to_yaml(), str(root), names[job.split])
        if key not in _OPENED:
            _OPENED[key] = CustomDataset(spec, root, names[job.split])
        found, counts, digest, size = [], np.zeros(256, np.int64), b"", (TINY, TINY)
        try:
            sample = _OPENED[key].read(job.place)
        except DataError as error:
            reason = f"{error.code}: {error.reason}"
            found.append(make_problem(kinds.UNREADABLE, str(error.path), reason, fix=error.fix))
        else:
            counts = np.bincount(sample.target.ravel(), minlength=256)
            digest = hashlib.sha256(sample.image.tobytes()).digest()[:16]
            size = sample.target.shape
            if not (sample.target != IGNORE_INDEX).any():
                reason = "no pixel of it is labelled"
                found.append(make_problem(kinds.ALL_IGNORED, str(job.image), reason, fix="label it, or leave it out"))
        values = np.flatnonzero(counts)
        results.append(
            Result(
                split=job.split,
                place=job.place,
                path=str(job.image),
                problems=tuple(found),
                digest=digest,
                image_kind="" if not digest else "RGB" if spec.is_rgb else str(ImageType(spec.channels, spec.dtype)),
                label_kind=spec.label_format if digest else "",
                orientation=0,
                is_tiny=min(size) < TINY,
                counts=(values, counts[values]),
            )
        )
    return results


_OPENED: dict[tuple[str, str, str], CustomDataset] = {}
"""Splits that this process has opened."""


def verify_dataset(
    splits: Sequence[Split],
    rule: LabelRule,
    *,
    root: str | Path,
    image_type: ImageType = RGB,
    num_workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    on_progress: OnProgress = lambda done, total: None,
) -> Report:
    """Find every problem of a data set in one pass.

    Of a good file nothing is kept but a hash of 16 bytes for images.

    Args:
        splits: What to verify, see `collect_splits`.
        rule: What label maps may hold.
        root: Folder of the data set; a manifest in it is compared with the files.
        image_type: What images are read as; what does not fit it is an error, what is converted to RGB a warning.
        num_workers: Processes; 0 works in this one. By default one a core, or 0 for a handful of files.
        max_pixels: Largest height * width of a picture; others are named, not decoded.
        on_progress: Called after every few samples.
    """
    manifest: dict[str, Expected] = {}
    manifest_problems: tuple[Problem, ...] = ()
    if (manifest_path := find_manifest(rule.taxonomy.name, Path(root))) is not None:
        manifest, manifest_problems = read_expected(manifest_path)
    jobs = _list_jobs(splits, manifest)
    total = len(manifest.keys() - _paths_of(splits)) if manifest else 0
    total += sum(len(split.samples) for split in splits)
    palettes = {name: dataset.taxonomy.palette for name, dataset in DATASETS.items()}
    work = partial(_check_jobs, rule=rule, palettes=palettes, image_type=image_type, max_pixels=max_pixels)

    tally = Tally(splits=splits, rule=rule, root=str(root))
    tally.problems += manifest_problems
    for split in splits:
        tally.problems += [problem._replace(split=split.name) for problem in split.problems]
        tally.problems += [problem._replace(split=split.name) for problem in check_names(split)]
    _add_results(tally, work, jobs, total=total, num_workers=num_workers, on_progress=on_progress)
    return tally.finish()


def _add_results(
    tally: Tally,
    work: Callable[[tuple[_Sample | _Other, ...]], list[Result]],
    jobs: Iterator[_Sample | _Other],
    *,
    total: int,
    num_workers: int | None,
    on_progress: OnProgress,
) -> None:
    """Do all jobs, here or in processes, and count what comes of them."""
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_workers = num_workers if total >= 8 * _CHUNK else 0
    done = 0
    chunks = iter(lambda: tuple(islice(jobs, _CHUNK)), ())
    results = map(work, chunks) if num_workers == 0 else _work_in_parallel(work, chunks, num_workers)
    for chunk in results:
        for result in chunk:
            tally.add(result)
        done += len(chunk)
        on_progress(done, total)


def _paths_of(splits: Sequence[Split]) -> set[str]:
    return {
        _absolute(path) for split in splits for sample in split.samples for path in (sample.image, sample.label) if path
    }


def _absolute(path: str | Path) -> str:
    return os.path.abspath(path)  # noqa: PTH100 -- as in find_manifest


def _list_jobs(splits: Sequence[Split], manifest: Mapping[str, Expected]) -> Iterator[_Sample | _Other]:
    for index, split in enumerate(splits):
        for place, sample in enumerate(split.samples):
            image, label = (None if path is None else str(path) for path in (sample.image, sample.label))
            expected = (manifest.get(_absolute(path)) if manifest and path else None for path in (image, label))
            yield _Sample(index, place, image, label, *expected)
    if manifest:
        seen = _paths_of(splits)
        yield from (_Other(path, expected) for path, expected in manifest.items() if path not in seen)


def _work_in_parallel(
    work: Callable[[tuple[_Sample | _Other, ...]], list[Result]],
    chunks: Iterable[tuple[_Sample | _Other, ...]],
    num_workers: int,
) -> Iterator[list[Result]]:
    """Work on chunks in processes, a few ahead; a file that ends its process is named and the work goes on."""
    chunks = iter(chunks)
    while True:
        running: dict[Future[list[Result]], tuple[_Sample | _Other, ...]] = {}
        with _make_pool(num_workers) as pool:
            try:
                for chunk in chunks:
                    running[pool.submit(work, chunk)] = chunk
                    if len(running) >= 4 * num_workers:
                        yield from _collect(running, wait(running, return_when=FIRST_COMPLETED).done)
                while running:
                    yield from _collect(running, wait(running, return_when=FIRST_COMPLETED).done)
            except BrokenProcessPool:
                pass
            else:
                return
        yield from _work_one_by_one(work, [job for chunk in running.values() for job in chunk])


def _make_pool(num_workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_ignore_interrupts)


def _ignore_interrupts() -> None:
    """Leave Ctrl-C to the process that shows the result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collect(
    running: dict[Future[list[Result]], tuple[_Sample | _Other, ...]], done: Iterable[Future[list[Result]]]
) -> Iterator[list[Result]]:
    for future in done:
        result = future.result()
        del running[future]
        yield result


def _work_one_by_one(
    work: Callable[[tuple[_Sample | _Other, ...]], list[Result]], jobs: Sequence[_Sample | _Other]
) -> Iterator[list[Result]]:
    """Work on jobs of which one ended its process, to find out which."""
    left = list(reversed(jobs))
    while left:
        with _make_pool(1) as pool:
            try:
                while left:
                    yield pool.submit(work, (left[-1],)).result()
                    left.pop()
            except BrokenProcessPool:
                yield [_word_crash(left.pop())]


def _word_crash(job: _Sample | _Other) -> Result:
    path = job.path if isinstance(job, _Other) else job.image or job.label or ""
    reason = "the process that decoded this sample was ended: its decoder crashed, or memory ran out"
    problem = make_problem(kinds.CRASHED, path, reason, fix="fetch image and label map again, or remove them")
    return _make_result(job, path, [problem])


def _check_jobs(
    jobs: Sequence[_Sample | _Other],
    *,
    rule: LabelRule,
    palettes: Mapping[str, Sequence[Colour]],
    image_type: ImageType,
    max_pixels: int,
) -> list[Result]:
    return [
        _make_result(job, job.path, check_hash(job.path, job.expected))
        if isinstance(job, _Other)
        else _check_sample(job, rule=rule, palettes=palettes, image_type=image_type, max_pixels=max_pixels)
        for job in jobs
    ]


def _make_result(
    job: _Sample | _Other,
    path: str,
    problems: Iterable[Problem],
    *,
    image: FileCheck | None = None,
    label: Picture | None = None,
    counts: NDArray[np.int64] | None = None,
) -> Result:
    picture = image.picture if image else None
    values = np.flatnonzero(counts) if counts is not None else np.zeros(0, np.intp)
    return Result(
        split=None if isinstance(job, _Other) else job.split,
        place=0 if isinstance(job, _Other) else job.place,
        path=path,
        problems=tuple(problems),
        digest=image.digest[:16] if image else b"",
        image_kind=picture.kind if picture else "",
        label_kind=label.kind if label else "",
        orientation=picture.orientation if picture and picture.orientation > 1 else 0,
        is_tiny=picture is not None and min(picture.size) < TINY,
        counts=(values, counts[values] if counts is not None else np.zeros(0, np.int64)),
    )


def _check_sample(
    job: _Sample,
    *,
    rule: LabelRule,
    palettes: Mapping[str, Sequence[Colour]],
    image_type: ImageType,
    max_pixels: int,
) -> Result:
    found: list[Problem] = []
    image = label = None
    counts = None
    if job.image is not None:
        check = check_picture if image_type == RGB else partial(check_typed_picture, image_type=image_type)
        image = check(job.image, max_pixels=max_pixels, expected=job.image_expected)
        found += image.problems
        if image_type == RGB and image.picture is not None and not is_read(image.picture.image):
            found.append(
                make_problem(
                    kinds.SAMPLE_DEPTH,
                    job.image,
                    f"picture of {image.picture.kind} samples; allowed: 8 or 16 bits, grey, palette, RGB, CMYK",
                    fix="scale the values and save as 8- or 16-bit PNG",
                )
            )
    if job.label is not None:
        label = check_picture(job.label, max_pixels=max_pixels, expected=job.label_expected)
        found += label.problems
        if label.picture is not None:
            checked = check_labels(job.label, label.picture, rule=rule, palettes=palettes)
            found += checked.problems
            counts = checked.counts if checked.counts.size else None
            if counts is not None and not checked.problems:
                found += _check_ignored(job.label, counts, rule)
    if job.label and image and label and image.picture and label.picture:
        found += _compare_sizes(job.label, image.picture, label.picture)
    path = job.image or job.label or ""
    return _make_result(job, path, found, image=image, label=label.picture if label else None, counts=counts)


def _check_ignored(path: str, counts: NDArray[np.int64], rule: LabelRule) -> Iterator[Problem]:
    values = np.flatnonzero(counts)
    if (rule.label_map[values] == IGNORE_INDEX).all():
        yield make_problem(
            kinds.ALL_IGNORED,
            path,
            f"every pixel is ignored (value {', '.join(map(str, values[:5].tolist()))})",
            fix="label it, or leave the sample out: it teaches nothing",
        )


def _compare_sizes(path: str, image: Picture, label: Picture) -> Iterator[Problem]:
    """Compare sizes as `nestseg.data.dataset.read_pair` does."""
    if label.size in {image.size, image.upright_size}:
        return
    turned = f" (upright, by its EXIF orientation: {_word_size(image.upright_size)})" if image.orientation > 4 else ""
    yield make_problem(
        kinds.SIZES,
        path,
        f"label map of {_word_size(label.size)}, but its image is {_word_size(image.size)}{turned}",
        fix="restore the original pair; never resize a label map to fit",
    )


def _word_size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
