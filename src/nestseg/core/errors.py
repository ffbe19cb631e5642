"""One shape for every error a user can cause: code, where, what, what to do.

A message reads ``E-DATA-014 | street/7.png | label value 37; allowed 0-18 or 255 | fix: ...``. The command line
prints exactly that and no traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Self


class NestsegError(Exception):
    """Something a user can mend; never raised for our own bugs.

    Args:
        code: Stable identifier such as ``"E-DATA-014"``.
        reason: What was given and what is allowed, one line.
        fix: What to do about it, one line.
        path: The file, folder or field concerned; None when there is none.
        table: Details, shown as further lines under the message.
    """

    def __init__(
        self, code: str, reason: str, *, fix: str, path: str | Path | None = None, table: Sequence[str] = ()
    ) -> None:
        self.code, self.reason, self.fix, self.path, self.table = code, reason, fix, path, tuple(table)
        where = [] if path is None else [str(path)]
        super().__init__("\n".join([" | ".join([code, *where, reason, f"fix: {fix}"]), *self.table]))

    def at(self, path: str | Path) -> Self:
        """Return this error with a path, if it has none."""
        if self.path is not None:
            return self
        return type(self)(self.code, self.reason, fix=self.fix, path=path, table=self.table)

    def __reduce__(self) -> tuple[Callable[..., NestsegError], tuple[object, ...]]:
        # an exception pickles by its positional arguments, and a loader worker sends its errors pickled
        return _rebuild, (type(self), self.code, self.reason, self.fix, self.path, self.table)


def _rebuild(
    kind: type[NestsegError], code: str, reason: str, fix: str, path: str | Path | None, table: Sequence[str]
) -> NestsegError:
    return kind(code, reason, fix=fix, path=path, table=table)


class RecipeError(NestsegError, ValueError):
    """A recipe that does not exist, or a field that it does not have (``E-RECIPE-...``)."""


class DataError(NestsegError, ValueError):
    """A file of a data set that is missing, unreadable or wrong (``E-DATA-...``)."""


class SpecError(NestsegError, ValueError):
    """A data set file that makes no sense, or does not fit the folder it describes (``E-SPEC-...``)."""


class ModelError(NestsegError, ValueError):
    """A network that cannot be built or fed like this (``E-MODEL-...``)."""


class WeightsError(NestsegError, ValueError):
    """A weights file that cannot be read or does not fit (``E-WEIGHTS-...``)."""


class DownloadError(NestsegError, ValueError):
    """A file that could not be fetched, or is not the one that was meant (``E-DOWNLOAD-...``)."""


class ArchiveError(NestsegError, ValueError):
    """An archive that is damaged, or holds what no data set needs (``E-ARCHIVE-...``)."""


class PackError(DataError):
    """A packed data set that cannot be written, or is not whole (``E-PACK-...``)."""


class PrepareError(NestsegError, ValueError):
    """A data set that cannot be prepared from what is there (``E-PREPARE-...``)."""


class RunError(NestsegError, ValueError):
    """A run folder that is taken, missing or broken (``E-RUN-...``)."""


def nearest(word: str, allowed: Iterable[str], *, count: int = 3) -> str:
    """Word a hint for a name that is not among the allowed ones.

    Args:
        word: What the user typed.
        allowed: The names that exist.
        count: How many near names to offer at most.

    Returns:
        ``"did you mean a, b?"``, or the allowed names when none is near.

    Example:
        >>> nearest("cityscape", ["voc", "cityscapes"])
        'did you mean cityscapes?'
        >>> nearest("x", ["voc", "cityscapes"])
        'allowed: voc, cityscapes'
    """
    names = list(allowed)
    matches = get_close_matches(word, names, n=count, cutoff=0.5)
    if matches:
        return f"did you mean {', '.join(matches)}?"
    return f"allowed: {', '.join(names)}"
