"""Files that are on the disk whole or not at all."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Give a new name beside a file to write to; on leaving, flush what was written and rename it into place.

    A kill or a full disk leaves the old file or the new one. The flush is for power cuts: a run that skips files which
    exist would otherwise trust an empty one.

    Args:
        path: The file to make or replace.

    Yields:
        The path to write to. What is there when an exception passes is deleted, and the old file stays.

    Raises:
        OSError: If the file cannot be flushed or renamed.

    Example:
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp()) / "a.txt"
        >>> with replaced_file(file) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> file.read_text()
        'whole'
    """
    # the name is short and free of the target's, which may already be as long as the file system allows
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        yield temporary
        sync_file(temporary)
        temporary.replace(path)
        sync_file(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Flush a file or folder to the disk, so that a power cut after this call cannot lose it.

    Raises:
        OSError: If it cannot be flushed; it names the path.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(descriptor)


def flushed_sha256(path: Path) -> str:
    """Flush a file to the disk, and meanwhile hash it: 64 hex digits.

    Raises:
        OSError: If it cannot be flushed or read.
    """
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(sync_file, path)
        digest = sha256_of(path)
        flushed.result()
    return digest


def cache_folder() -> Path:
    """Return where fetched files are kept: ``NESTSEG_CACHE``, else ``nestseg`` in the user's folder for caches."""
    if chosen := os.environ.get("NESTSEG_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "nestseg").expanduser()


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, 64 hex digits.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
