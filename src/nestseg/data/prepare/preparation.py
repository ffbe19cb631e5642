"""What the preparations of the data sets have in common: their archives, and what becomes of the members."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from nestseg.core.errors import PrepareError
from nestseg.data.dataset import FileDataset
from nestseg.data.prepare.archives import Archive

Progress = Callable[[str, int, int | None], None]
"""Called with what is done now, how far it is, and how far it goes (None if unknown), mostly in bytes."""


class Source(NamedTuple):
    """An official archive."""

    name: str
    """Its file name."""
    page: str
    """Where a person gets it, in words."""
    gives: tuple[str, ...]
    """Folders of the layout that it fills; where all of them are there, it is not needed."""
    other_names: tuple[str, ...] = ()
    """What browsers and mirrors call it."""
    digest: str | None = None
    """The published hash, as ``"md5:..."`` or ``"sha256:..."``; None if there is none."""
    urls: tuple[str, ...] = ()
    """Where it may be fetched without a login."""
    needs: tuple[str, str] | None = None
    """A module that has to be installed to read its members, and the extra of this package that brings it."""


class Output(NamedTuple):
    """A file of the layout that comes from a member of an archive."""

    path: str
    """Relative to the folder that holds the layout."""
    source: str
    """Name of the archive."""
    member: str
    convert: Callable[[bytes], bytes] | None = None
    """Makes the file's content of the member's; None if they are the same."""


class Plan(NamedTuple):
    """Everything that a layout needs from the archives at hand."""

    outputs: Sequence[Output]
    copies: Mapping[str, Path] = {}
    """Files to copy from where the user has them, by path."""
    texts: Mapping[str, bytes] = {}
    """Files that we write, by path."""


class Preparation(NamedTuple):
    """How a data set gets from its archives to the layout that its class reads."""

    dataset: type[FileDataset]
    sources: tuple[Source, ...]
    homes: tuple[str, ...]
    """Folders that may hold the layout, relative to the root; the first is where a new one goes."""
    folders: tuple[str, ...]
    """Folders of the layout, relative to its home."""
    splits: tuple[str, ...]
    """Splits that have to be there."""
    make_plan: Callable[[Mapping[str, Archive], Path], Plan]
    """Plans with the archives at hand, by name of source, and the folder that holds or will hold the layout."""
    lookalikes: Mapping[str, str] = {}
    """Files that are taken for the right archive, and what they are."""


def select_members(archive: Archive, source: str, pattern: str, *, folders: Sequence[str]) -> list[Output]:
    """Select the members that go into the layout as they are.

    Args:
        archive: The archive.
        source: Its name.
        pattern: Regular expression of whole member names; its group ``path`` is where the file goes.
        folders: Folders of the layout of which each has to get a file.

    Returns:
        The files, in order of their paths.

    Raises:
        PrepareError: E-PREPARE-009, if a folder gets none.
    """
    matches = [match for name in archive.sizes if (match := re.fullmatch(pattern, name))]
    outputs = sorted(Output(match["path"], source, match[0]) for match in matches)
    empty = [folder for folder in folders if not any(output.path.startswith(f"{folder}/") for output in outputs)]
    if empty:
        raise lacking(archive, f"nothing for {', '.join(empty)}")
    return outputs


def join_path(home: str, path: str) -> str:
    """Join the path of a layout's file to the layout's folder, ``"."`` being the root itself."""
    return path if home == "." else f"{home}/{path}"


def name_step(on_progress: Progress, what: str) -> Callable[[int, int | None], None]:
    """Return a progress function for one named step."""
    return lambda done, total: on_progress(what, done, total)


def list_first(lines: Sequence[str]) -> list[str]:
    """Return the first ten of many lines, indented, and how many more there are."""
    more = [f"  and {len(lines) - 10:,} more"] if len(lines) > 10 else []
    return [*(f"  {line}" for line in lines[:10]), *more]


def lacking(archive: Archive, what: str) -> PrepareError:
    """Word that an archive is not the one that it should be; ``what`` says why."""
    tops = sorted({"/".join(name.split("/")[:2]) for name in archive.sizes})
    more = f" and {len(tops) - 10:,} more" if len(tops) > 10 else ""
    return PrepareError(
        "E-PREPARE-009",
        f"not the official archive: {what}; it holds: {', '.join(map(ascii, tops[:10]))}{more}",
        fix="fetch the official one, or unpack this one by hand and prepare without --archives",
        path=archive.path,
    )
