"""Files on their way into a layout: whole or not there, and never over what is there.

They gather in a folder of the same file system, each written under a temporary name, flushed, then named. When the
last one is there they move, whole folders at a time. A run that was killed leaves that folder to the next one, which
takes what it finds.
"""

from __future__ import annotations

import hashlib
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import final

from nestseg.core.disk import sync_file
from nestseg.core.errors import NestsegError, PrepareError
from nestseg.data.prepare.archives import Archive
from nestseg.data.prepare.manifest import FileRecord
from nestseg.data.prepare.preparation import Output, Plan, Progress, join_path, list_first

# Files of one batch are flushed together, by threads: the disk then has one journal to write and not 256.
_BATCH_FILES = 256
_BATCH_BYTES = 64 << 20
_FLUSH_THREADS = 8

# No picture of these data sets has a tenth of it, and a member is held in memory.
_MAX_FILE_BYTES = 256 << 20


def gather_files(
    plan: Plan, archives: Mapping[str, Archive], *, root: Path, home: str, staging: Path, on_progress: Progress
) -> dict[str, FileRecord]:
    """Gather what a layout lacks.

    Args:
        plan: What the layout needs.
        archives: The archives that the plan names.
        root: Where the layout goes.
        home: Folder of the layout, relative to the root.
        staging: Folder that mirrors the root, on the same file system; it may hold files already.
        on_progress: Called with the bytes so far and in total.

    Returns:
        What was made, by its path in the root.

    Raises:
        PrepareError: E-PREPARE-006, E-PREPARE-010, E-PREPARE-011, E-PREPARE-016 or E-PREPARE-019.
        ArchiveError: If an archive is damaged.
        OSError: If the disk does not take it.
    """
    outputs, copies, texts = _find_lacking(plan, archives, root=root, home=home, staging=staging)
    need = sum(archives[output.source].sizes[output.member] for output in outputs.values())
    need += sum(source.stat().st_size for source in copies.values()) + sum(map(len, texts.values()))
    free = shutil.disk_usage(root).free
    if need > free:
        raise PrepareError(
            "E-PREPARE-006",
            f"{need:,} bytes are needed, {free:,} are free",
            fix="free some space, or choose a --root on another disk",
            path=root,
        )
    batch, done = _Batch(staging), 0
    for name, archive in archives.items():
        paths: dict[str, list[str]] = {}
        for path, output in outputs.items():
            if output.source == name:
                paths.setdefault(output.member, []).append(path)
        for member, blocks in archive.stream(paths.keys()):
            content = b"".join(blocks)
            for path in paths[member]:
                batch.add(path, _convert(content, outputs[path], archive), archive=name)
                done += len(content)
                on_progress(f"unpack {name}", done, need)
    for path, source in copies.items():
        batch.add(path, source.read_bytes(), archive=None)
    for path, text in texts.items():
        batch.add(path, text, archive=None)
    batch.flush()
    return batch.records


def publish_files(staging: Path, root: Path) -> None:
    """Move what was gathered into place: a folder that is not there yet in one piece, else what is in it.

    Args:
        staging: The folder that mirrors the root; what is left of it may be deleted.
        root: Where the layout goes; a file that is there stays.

    Raises:
        OSError: If the disk does not take it.
    """
    for path in sorted(staging.iterdir()):
        target = root / path.name
        if path.is_dir() and target.exists():
            publish_files(path, target)
        elif not target.exists():
            path.rename(target)
    sync_file(root)


def _find_lacking(
    plan: Plan, archives: Mapping[str, Archive], *, root: Path, home: str, staging: Path
) -> tuple[dict[str, Output], dict[str, Path], dict[str, bytes]]:
    """Find the files that are neither in the layout nor gathered, by their path in the root."""
    seen: set[str] = set()
    differing: list[str] = []

    def lacks(path: str, size: int | None) -> bool:
        if path in seen:
            raise PrepareError(
                "E-PREPARE-019",
                f"two members of the archives are for one file, {path}",
                fix="fetch the official archive",
                path=root,
            )
        seen.add(path)
        there = root / path
        if there.exists() and size not in (None, there.stat().st_size):
            differing.append(f"{path}: {there.stat().st_size:,} bytes; of the archive: {size:,}")
        return not there.exists() and not (staging / path).exists()

    outputs: dict[str, Output] = {}
    for output in plan.outputs:
        archive = archives[output.source]
        size = archive.sizes[output.member]
        if size > _MAX_FILE_BYTES:
            raise PrepareError(
                "E-PREPARE-016",
                f"{output.member} has {size:,} bytes; allowed: {_MAX_FILE_BYTES:,}",
                fix="fetch the official archive",
                path=archive.path,
            )
        path = join_path(home, output.path)
        if lacks(path, None if output.convert else size):
            outputs[path] = output
    given = {join_path(home, path): source for path, source in plan.copies.items()}
    copies = {path: source for path, source in given.items() if lacks(path, source.stat().st_size)}
    ours = {join_path(home, path): text for path, text in plan.texts.items()}
    texts = {path: text for path, text in ours.items() if lacks(path, len(text))}
    if differing:
        raise PrepareError(
            "E-PREPARE-010",
            f"{len(differing):,} files are there and differ from the archive",
            fix="move them away and prepare again: nothing that is there is overwritten",
            path=root / home,
            table=list_first(differing),
        )
    return outputs, copies, texts


@final
class _Batch:
    """Files that were written and wait for their name.

    Args:
        folder: Where they gather; temporary files that a killed run left are deleted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._targets: dict[Path, Path] = {}
        self._num_bytes = 0
        self.records: dict[str, FileRecord] = {}
        for leftover in folder.glob(".tmp-*"):
            leftover.unlink()

    def add(self, path: str, content: bytes, *, archive: str | None) -> None:
        """Write a file; it has its name after the next flush."""
        self._folder.mkdir(exist_ok=True)
        temporary = self._folder / f".tmp-{uuid.uuid4().hex}"
        temporary.write_bytes(content)
        self._targets[temporary] = self._folder / path
        self._num_bytes += len(content)
        self.records[path] = FileRecord(path, len(content), hashlib.sha256(content).hexdigest(), archive)
        if len(self._targets) >= _BATCH_FILES or self._num_bytes >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Flush what was written since the last time, and give it its name."""
        with ThreadPoolExecutor(_FLUSH_THREADS) as pool:
            list(pool.map(sync_file, self._targets))
        folders = {target.parent for target in self._targets.values()}
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for temporary, target in self._targets.items():
            temporary.rename(target)
        for folder in folders:
            sync_file(folder)
        self._targets, self._num_bytes = {}, 0


def _convert(content: bytes, output: Output, archive: Archive) -> bytes:
    if output.convert is None:
        return content
    try:
        return output.convert(content)
    except NestsegError as error:
        raise error.at(f"{archive.path}: {output.member}") from error
