"""One process at a time writes to a run folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, final

from nestseg.core.errors import RunError

LOCK_FILE = "lock"


class NoLockWarning(UserWarning):
    """The file system has no locks, so that nothing keeps a second run out of the folder."""


@final
class RunLock:
    """Holds a run folder while entered.

    The system frees the lock when the process ends, however it ends. It is a POSIX record lock and not one of flock:
    loader workers that outlive a killed parent for some seconds do not inherit it. The file stays; what it says is
    only of interest while it is locked.

    Args:
        run: The run folder; it must exist.

    Raises:
        RunError: E-RUN-007 on entering, if another process holds it; it is named.
        OSError: If the lock file cannot be made.

    Warns:
        NoLockWarning: If the file system has no locks.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._descriptor = -1

    def __enter__(self) -> Self:
        self._descriptor = os.open(self._run / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = _read_holder(self._descriptor)
                os.close(self._descriptor)
                raise RunError(
                    "E-RUN-007",
                    f"another process trains in it: {describe_holder(holder)}",
                    fix="wait for it, stop it, or choose another folder",
                    path=self._run,
                ) from error
            warnings.warn(
                f"{self._run} cannot be locked ({error.strerror}): start no second run in it",
                NoLockWarning,
                stacklevel=2,
            )
        started = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def lock_holder(run: Path) -> dict[str, Any] | None:
    """Say who trains in a run folder: pid, host and start; None if nobody does.

    Not for the process that holds the lock itself: closing the file would free it.
    """
    try:
        descriptor = os.open(run / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _read_holder(descriptor) if error.errno in (errno.EACCES, errno.EAGAIN) else None
    else:
        return None
    finally:
        os.close(descriptor)


def describe_holder(holder: dict[str, Any]) -> str:
    """Word what `lock_holder` found."""
    return f"pid {holder.get('pid', '?')} on {holder.get('host', '?')} since {holder.get('started', '?')}"


def _read_holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # it was just created
        return {}
    return holder if isinstance(holder, dict) else {}
