"""The official archives: found, fetched, and compared with what was published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nestseg.core.download import download
from nestseg.core.errors import ArchiveError, PrepareError
from nestseg.data.prepare.archives import hash_archive
from nestseg.data.prepare.manifest import ArchiveRecord
from nestseg.data.prepare.preparation import Progress, Source, name_step


def find_archives(sources: Sequence[Source], folder: Path) -> dict[str, Path]:
    """Find the archives that are in a folder, by name of source."""
    found = {}
    for source in sources:
        for path in (folder / name for name in (source.name, *source.other_names)):
            if path.is_file():
                found[source.name] = path
                break
    return found


def fetch_archives(sources: Sequence[Source], folder: Path, *, on_progress: Progress) -> dict[str, Path]:
    """Fetch archives into a folder; returns them by name of source.

    Raises:
        PrepareError: E-PREPARE-004, if one of them is only given to people who log in.
        DownloadError: If one cannot be fetched.
    """
    closed = [source for source in sources if not source.urls]
    if closed:
        raise PrepareError(
            "E-PREPARE-004",
            f"a login is needed to fetch {', '.join(source.name for source in closed)}",
            fix=say_how_to_get(closed),
            path=folder,
        )
    paths = {}
    for source in sources:
        algorithm, _, digest = (source.digest or "").partition(":")
        fetched = download(
            source.urls,
            folder / source.name,
            sha256=digest if algorithm == "sha256" else None,
            expected="an archive",
            by_hand=f"get {source.name} by hand from {source.page} and give its folder as --archives",
            on_progress=name_step(on_progress, f"fetch {source.name}"),
        )
        paths[source.name] = fetched.path
    return paths


def compare_archive(source: Source, path: Path, *, is_ours: bool, on_progress: Progress) -> ArchiveRecord:
    """Compare an archive with its published hash.

    Args:
        source: What it should be.
        path: The file.
        is_ours: Whether we fetched it: then another one than was meant is put aside, so that it is fetched again.
        on_progress: See `Progress`.

    Returns:
        Its record, which says whether anything was compared.

    Raises:
        ArchiveError: E-ARCHIVE-013, with both hashes, or E-ARCHIVE-001.
    """
    algorithm, _, published = (source.digest or "").partition(":")
    algorithms = {"sha256", algorithm} - {""}
    digests = hash_archive(path, algorithms, on_progress=name_step(on_progress, f"hash {path.name}"))
    if published and digests[algorithm] != published:
        aside = ""
        if is_ours:
            bad = path.with_name(f"{path.name}.bad-{digests[algorithm][:8]}")
            path.replace(bad)
            aside = f"; moved to {bad.name}"
        raise ArchiveError(
            "E-ARCHIVE-013",
            f"{algorithm} {digests[algorithm]}; published: {published}{aside}; nothing was unpacked",
            fix=f"get {source.name} again from {source.page}; a copy that you trust may be unpacked by hand",
            path=path,
        )
    return ArchiveRecord(source.name, path.stat().st_size, digests["sha256"], source.digest)


def missing_archives(sources: Sequence[Source], folder: Path, lookalikes: Mapping[str, str]) -> PrepareError:
    """Word which archives are not there, what is, and where to get them."""
    others = [f"{name} is {what}" for name, what in lookalikes.items() if (folder / name).exists()]
    missing = ", ".join(source.name for source in sources)
    return PrepareError(
        "E-PREPARE-002",
        "; ".join([f"missing: {missing}; found: {_list_folder(folder)}", *others]),
        fix=say_how_to_get(sources),
        path=folder,
    )


def say_how_to_get(sources: Sequence[Source]) -> str:
    """Word where a person gets archives from, and what to do then."""
    pages: dict[str, list[str]] = {}
    for source in sources:
        pages.setdefault(source.page, []).append(source.name)
    ways = "; ".join(f"get {' and '.join(names)} from {page}" for page, names in pages.items())
    fetchable = ", or use --download" if all(source.urls for source in sources) else ""
    return f"{ways}, and give their folder as --archives{fetchable}"


def _list_folder(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more or "an empty folder"
