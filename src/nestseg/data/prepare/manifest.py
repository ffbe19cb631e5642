"""The manifest of a prepared data set: what lies there, byte for byte, and where it came from.

``DATA/NAME-manifest.json``, beside the layout, is written last and in one piece: where it is, the data set is whole.
It is strict JSON with one file a line::

    {
        "format": 1,
        "dataset": "voc",
        "tool": "nestseg 0.1.0",
        "archives": [
            {
                "name": "benchmark.tgz",
                "size": 1419539633,
                "sha256": "<64 hex digits>",
                "compared": "md5:<32 hex digits>",
            }
        ],
        "files": [
            {
                "path": "VOCdevkit/VOC2012/JPEGImages/2007_000032.jpg",
                "size": 54757,
                "sha256": "...",
                "archive": "benchmark.tgz",
            }
        ],
    }

- ``format`` is 1; a reader refuses any other.
- ``archives`` are the official files that were unpacked, none if the layout was unpacked by hand. ``sha256`` is ours,
  of the file as it was used; ``compared`` is the published hash that it was found equal to, null if none is known.
- ``files`` are all files of the layout's folders, hidden ones left out, in order of ``path``, which is relative to the
  manifest's folder and has forward slashes. ``archive`` is the ``name`` of an archive, null for a file that none of
  them gave. ``sha256`` is that of the file on the disk: a label map made from a ``.mat`` file has its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from nestseg.core.disk import replaced_file
from nestseg.core.errors import PrepareError
from nestseg.version import __version__

FORMAT = 1


class ArchiveRecord(NamedTuple):
    """An archive that was unpacked, see ``archives`` in the module's text."""

    name: str
    size: int
    sha256: str
    compared: str | None


class FileRecord(NamedTuple):
    """A file of the layout, see ``files`` in the module's text."""

    path: str
    size: int
    sha256: str
    archive: str | None


class Manifest(NamedTuple):
    """What a manifest says."""

    dataset: str
    tool: str
    archives: tuple[ArchiveRecord, ...]
    files: tuple[FileRecord, ...]


def manifest_path(dataset: str, data: Path) -> Path:
    """Return where the manifest of a data set in this folder is."""
    return data / f"{dataset}-manifest.json"


def write_manifest(
    path: Path, *, dataset: str, archives: tuple[ArchiveRecord, ...], files: tuple[FileRecord, ...]
) -> Manifest:
    """Write a manifest, whole or not at all, and return what it says.

    Raises:
        OSError: If it cannot be written.
    """
    manifest = Manifest(dataset, f"nestseg {__version__}", archives, tuple(sorted(files)))
    head = {"format": FORMAT, "dataset": dataset, "tool": manifest.tool}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    lists: tuple[tuple[str, tuple[ArchiveRecord, ...] | tuple[FileRecord, ...]], ...]
    lists = (("archives", archives), ("files", manifest.files))
    blocks = [
        f'"{key}": [\n' + ",\n".join(json.dumps(record._asdict()) for record in list_) + "\n]" for key, list_ in lists
    ]
    with replaced_file(path) as temporary:
        temporary.write_text("\n".join(["{", *lines, ",\n".join(blocks), "}", ""]), encoding="utf-8")
    return manifest


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
        FileNotFoundError: If there is none.
        PrepareError: E-PREPARE-014, if it is damaged or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}; allowed: {FORMAT}")
        return Manifest(
            content["dataset"],
            content["tool"],
            tuple(ArchiveRecord(**record) for record in content["archives"]),
            tuple(FileRecord(**record) for record in content["files"]),
        )
    except (ValueError, LookupError, TypeError) as error:
        raise PrepareError(
            "E-PREPARE-014",
            f"no manifest that this version reads: {error}",
            fix="delete it and prepare again: files that are there are kept",
            path=path,
        ) from error
