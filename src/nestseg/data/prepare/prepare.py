"""From the official archives, or from what was unpacked by hand, to a layout with a manifest.

A kill leaves a layout that is whole or not there, and ``ROOT/.prepare-NAME-...``, from which the next run goes on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from nestseg.core.disk import replaced_file, sha256_of
from nestseg.core.errors import DataError, PrepareError, nearest
from nestseg.data.prepare import ade20k, camvid, cityscapes, voc
from nestseg.data.prepare.archives import open_archive
from nestseg.data.prepare.manifest import (
    ArchiveRecord,
    FileRecord,
    Manifest,
    manifest_path,
    read_manifest,
    write_manifest,
)
from nestseg.data.prepare.preparation import Preparation, Progress, Source, join_path, list_first, name_step
from nestseg.data.prepare.sources import (
    compare_archive,
    fetch_archives,
    find_archives,
    missing_archives,
    say_how_to_get,
)
from nestseg.data.prepare.staging import gather_files, publish_files

PREPARATIONS: dict[str, Preparation] = {
    "voc": voc.PREPARATION,
    "ade20k": ade20k.PREPARATION,
    "cityscapes": cityscapes.PREPARATION,
    "camvid": camvid.PREPARATION,
}

DOWNLOADS = "archives"
"""Folder of the root in which downloaded archives stay until the user deletes them."""

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SplitCount(NamedTuple):
    """How many samples of a split there are."""

    split: str
    found: int
    official: int


class Prepared(NamedTuple):
    """What lies there now, and what was done for it."""

    dataset: str
    data: Path
    """The folder to give as ``--data``."""
    manifest: Path
    counts: tuple[SplitCount, ...]
    """The splits that are there."""
    archives: tuple[ArchiveRecord, ...]
    num_files: int
    num_bytes: int
    num_made: int
    """Files that this run unpacked or made; the others were there."""
    downloads: Path | None
    """Folder of downloaded archives, which are not needed any more; None if there is none."""


def prepare_dataset(
    name: str,
    root: str | Path,
    *,
    archives: str | Path | None = None,
    download: bool = False,
    on_progress: Progress | None = None,
) -> Prepared:
    """Prepare a data set from its official archives, or take what was unpacked by hand.

    Files that are there are kept, and only what is missing is unpacked. A layout that is whole in the official
    numbers needs no archives.

    Args:
        name: A key of `PREPARATIONS`.
        root: Folder for the data set; it is made.
        archives: Folder that holds the archives; None for those that an earlier download left.
        download: Fetch the archives that are not there.
        on_progress: See `Progress`.

    Returns:
        What lies there now.

    Raises:
        PrepareError: E-PREPARE-001 to E-PREPARE-020.
        ArchiveError: E-ARCHIVE-001 to E-ARCHIVE-013, if an archive is not what it should be.
        DownloadError: If an archive cannot be fetched.
        DataError: If what lies there then is not whole.
    """
    if name not in PREPARATIONS:
        raise PrepareError(
            "E-PREPARE-001",
            f"data set {name!r}; allowed: {', '.join(PREPARATIONS)}",
            fix=nearest(name, PREPARATIONS),
        )
    return prepare(
        PREPARATIONS[name],
        Path(root),
        archives=None if archives is None else Path(archives),
        download=download,
        on_progress=on_progress,
    )


def prepare(
    preparation: Preparation,
    root: Path,
    *,
    archives: Path | None = None,
    download: bool = False,
    on_progress: Progress | None = None,
) -> Prepared:
    """Prepare a data set by its description, see `prepare_dataset`."""
    on_progress = on_progress or (lambda what, done, total: None)
    name = preparation.dataset.taxonomy.name
    folder = archives or root / DOWNLOADS
    with _named_disk_errors(root, name):
        found = find_archives(preparation.sources, folder)
        is_offered = archives is not None or download or bool(found)
        data, manifest = _find_manifest(name, root)
        if manifest:
            lost = [file.path for file in manifest.files if _size_of(data / file.path) != file.size]
            if not lost:  # told without the lock: the data may lie on a disk that cannot be written
                return _describe(preparation, data, manifest)
            if not is_offered:
                raise _lost_files(manifest_path(name, data), lost, preparation)
        elif not is_offered and not _find_unpacked(preparation, root)[1]:
            raise _nothing_offered(preparation, root)
        with _locked(root, name):
            is_unfinished = any(root.glob(f".prepare-{name}-*"))
            home = _find_home(preparation, root)
            needed = [
                source
                for source in preparation.sources
                if source.name in found or is_unfinished or not _is_given(root / home, source)
            ]
            data, counts = _find_unpacked(preparation, root)
            if counts and not is_unfinished and (not needed or not is_offered or _are_official(preparation, counts)):
                return _take_unpacked(preparation, data, on_progress=on_progress)
            if not is_offered:
                raise PrepareError(
                    "E-PREPARE-020",
                    "an earlier run was cut off here, and the archives to go on from are not given",
                    fix="give --archives as before, or delete .prepare-* here to take what was unpacked by hand",
                    path=root,
                )
            _check_installed(needed)
            if absent := [source for source in needed if source.name not in found]:
                if not download:
                    raise missing_archives(absent, folder, preparation.lookalikes)
                found |= fetch_archives(absent, folder, on_progress=on_progress)
            return _build(preparation, root, needed, found, home=home, on_progress=on_progress)


def format_prepared(prepared: Prepared) -> str:
    """Word what lies there now, one fact a line."""
    lines = [f"{prepared.dataset}: {prepared.data}"]
    for count in prepared.counts:
        whole = "all" if count.found == count.official else f"published: {count.official:,}"
        lines.append(f"  {count.split}: {count.found:,} samples ({whole})")
    for archive in prepared.archives:
        algorithm = (archive.compared or "").partition(":")[0]
        compared = f"{algorithm} as published" if algorithm else "not compared, no hash is published"
        lines.append(f"  {archive.name}: {archive.size:,} bytes; {compared}; sha256 {archive.sha256}")
    if not prepared.archives:
        lines.append("  unpacked by hand: nothing was compared")
    there = prepared.num_files - prepared.num_made
    lines.append(f"  {prepared.num_files:,} files of {prepared.num_bytes:,} bytes in all")
    lines.append(f"  {prepared.num_made:,} files made now, {there:,} were there")
    lines.append(f"  manifest: {prepared.manifest}")
    if prepared.downloads:
        lines.append(f"  archives, not needed any more: {prepared.downloads}")
    lines.append(f"use it with: --data {prepared.data}")
    return "\n".join(lines)


def _build(
    preparation: Preparation,
    root: Path,
    sources: Sequence[Source],
    paths: Mapping[str, Path],
    *,
    home: str,
    on_progress: Progress,
) -> Prepared:
    """Unpack what is missing, move it into place and write the manifest."""
    name = preparation.dataset.taxonomy.name
    records, opened = [], {}
    for source in sources:
        path = paths[source.name]
        is_ours = path.parent == root / DOWNLOADS
        records.append(compare_archive(source, path, is_ours=is_ours, on_progress=on_progress))
        opened[source.name] = open_archive(path, on_progress=name_step(on_progress, f"check {path.name}"))
    plan = preparation.make_plan(opened, root / home)

    # what was gathered from other archives is of no use
    key = hashlib.sha256("".join(record.sha256 for record in records).encode()).hexdigest()[:12]
    staging = root / f".prepare-{name}-{key}"
    for other in root.glob(f".prepare-{name}-*"):
        if other != staging:
            shutil.rmtree(other)
    made = gather_files(plan, opened, root=root, home=home, staging=staging, on_progress=on_progress)
    if staging.is_dir():
        publish_files(staging, root)
        shutil.rmtree(staging)

    counts = _count(preparation, root)
    if all(record.compared for record in records) and not _are_official(preparation, counts):
        wrong = ", ".join(f"{count.split} {count.found:,} (published: {count.official:,})" for count in counts)
        raise PrepareError(
            "E-PREPARE-018",
            f"the archives are as published, but the samples are not as many: {wrong}",
            fix="move what you unpacked by hand out of the way, and prepare again",
            path=root / home,
        )
    origins = {join_path(home, output.path): output.source for output in plan.outputs}
    files = _record_files(preparation, root, made=made, origins=origins, on_progress=on_progress)
    manifest = write_manifest(manifest_path(name, root), dataset=name, archives=tuple(records), files=files)
    is_downloaded = any(path.parent == root / DOWNLOADS for path in paths.values())
    return _describe(
        preparation, root, manifest, num_made=len(made), downloads=root / DOWNLOADS if is_downloaded else None
    )


def _take_unpacked(preparation: Preparation, data: Path, *, on_progress: Progress) -> Prepared:
    """Write the manifest of what was unpacked by hand."""
    name = preparation.dataset.taxonomy.name
    files = _record_files(preparation, data, made={}, origins={}, on_progress=on_progress)
    manifest = write_manifest(manifest_path(name, data), dataset=name, archives=(), files=files)
    return _describe(preparation, data, manifest)


def _find_manifest(name: str, root: Path) -> tuple[Path, Manifest | None]:
    """Find the manifest in the root or a folder of it; returns it with its folder, None if there is none."""
    for data in _data_folders(root):
        path = manifest_path(name, data)
        if path.is_file():
            return data, read_manifest(path)
    return root, None


def _find_unpacked(preparation: Preparation, root: Path) -> tuple[Path, tuple[SplitCount, ...]]:
    """Find a whole layout in the root or a folder of it; returns its folder and splits, none if there is none."""
    for data in _data_folders(root):
        try:
            return data, _count(preparation, data)
        except DataError:
            continue
    return root, ()


def _data_folders(root: Path) -> list[Path]:
    """Return the folders that may hold a layout: the root, and those in it, as many tools unpack into one more."""
    if not root.is_dir():
        return []
    return [root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]


def _count(preparation: Preparation, data: Path) -> tuple[SplitCount, ...]:
    """Count the samples of every split that is there.

    Raises:
        DataError: If one that has to be there is not, or is not whole.
    """
    counts = []
    for split in preparation.dataset.splits:
        try:
            found = len(preparation.dataset(data, split))
        except DataError:
            if split in preparation.splits:
                raise
            continue
        counts.append(SplitCount(split, found, preparation.dataset.official_counts[split]))
    return tuple(counts)


def _are_official(preparation: Preparation, counts: Sequence[SplitCount]) -> bool:
    return all(count.found == count.official for count in counts if count.split in preparation.splits)


def _find_home(preparation: Preparation, data: Path) -> str:
    """Return the folder that holds the layout, or a part of it, or will hold it."""
    for home in preparation.homes:
        if any((data / home / folder).exists() for folder in preparation.folders):
            return home
    return preparation.homes[0]


def _is_given(folder: Path, source: Source) -> bool:
    return all((folder / path).exists() for path in source.gives)


def _check_installed(sources: Sequence[Source]) -> None:
    for source in sources:
        if source.needs and find_spec(source.needs[0]) is None:
            raise PrepareError(
                "E-PREPARE-012",
                f"{source.needs[0]} is not installed; it reads what is in {source.name}",
                fix=f'pip install "nestseg[{source.needs[1]}]"',
            )


def _record_files(
    preparation: Preparation,
    data: Path,
    *,
    made: Mapping[str, FileRecord],
    origins: Mapping[str, str],
    on_progress: Progress,
) -> tuple[FileRecord, ...]:
    """Record every file of the layout; those that this run did not make are read."""
    home = _find_home(preparation, data)
    records = []
    for folder in preparation.folders:
        for file in _walk(data / home / folder):
            path = file.relative_to(data).as_posix()
            record = made.get(path) or FileRecord(path, file.stat().st_size, sha256_of(file), origins.get(path))
            records.append(record)
            on_progress("record files", len(records), None)
    return tuple(records)


def _walk(folder: Path) -> Iterator[Path]:
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(path, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file())


def _describe(
    preparation: Preparation, data: Path, manifest: Manifest, *, num_made: int = 0, downloads: Path | None = None
) -> Prepared:
    return Prepared(
        dataset=manifest.dataset,
        data=data,
        manifest=manifest_path(manifest.dataset, data),
        counts=_count(preparation, data),
        archives=manifest.archives,
        num_files=len(manifest.files),
        num_bytes=sum(file.size for file in manifest.files),
        num_made=num_made,
        downloads=downloads,
    )


def _size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _lost_files(manifest: Path, lost: Sequence[str], preparation: Preparation) -> PrepareError:
    return PrepareError(
        "E-PREPARE-017",
        f"{len(lost):,} files of the manifest are missing or have another size",
        fix=f"delete the manifest to take the folder as it is; to mend it, {say_how_to_get(preparation.sources)}",
        path=manifest,
        table=list_first(lost),
    )


def _nothing_offered(preparation: Preparation, root: Path) -> PrepareError:
    """Word what a whole layout has, what is there, and how to get the rest."""
    differences = []
    for split in preparation.splits:
        try:
            preparation.dataset(root, split)
        except DataError as error:
            differences.append(f"  {split}: {error.reason}; {error.fix}")
    return PrepareError(
        "E-PREPARE-003",
        f"no whole {preparation.dataset.taxonomy.name} here, and no archives to make it of",
        fix=say_how_to_get(preparation.sources),
        path=root,
        table=differences,
    )


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """Hold the root for this process; a lock of a process that was killed is free.

    Raises:
        PrepareError: E-PREPARE-005, naming who has it.
    """
    root.mkdir(parents=True, exist_ok=True)
    holder = root / ".prepare.json"
    try:
        with FileLock(root / ".prepare.lock", timeout=0):
            who = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now().astimezone():%c %z}"}
            with replaced_file(holder) as temporary:
                temporary.write_text(json.dumps({**who, "dataset": name}), encoding="utf-8")
            try:
                yield
            finally:
                holder.unlink(missing_ok=True)
    except Timeout as error:
        raise PrepareError(
            "E-PREPARE-005",
            f"{_describe_holder(holder)} prepares data here",
            fix="wait until it is done and run this again: what is there by then is kept",
            path=root,
        ) from error


def _describe_holder(holder: Path) -> str:
    try:
        who = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}, since {who['since']},"
    except (OSError, ValueError, LookupError, TypeError):  # it has not come to write it, or is done by now
        return "another process"


@contextmanager
def _named_disk_errors(root: Path, name: str) -> Iterator[None]:
    """Turn what a disk refuses into errors; on a full one, what was gathered is deleted and the archives stay."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            for staging in root.glob(f".prepare-{name}-*"):
                shutil.rmtree(staging, ignore_errors=True)
            raise PrepareError(
                "E-PREPARE-007",
                f"the disk is full ({error.strerror}); after removing what was unpacked, "
                f"{shutil.disk_usage(root).free:,} bytes are free",
                fix="free some space, or choose a --root on another disk; the archives are still there",
                path=root,
            ) from error
        raise PrepareError(
            "E-PREPARE-008",
            f"the folder cannot be used: {error.strerror or error} ({error.filename or root})",
            fix="choose a --root that you may write to; data that is whole can be used as it is, without a manifest",
            path=root,
        ) from error
