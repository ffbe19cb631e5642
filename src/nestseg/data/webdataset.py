"""WebDataset shards, read by index: a sample is the members of a tar file that share a name."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from nestseg.core.errors import DataError


class Member(NamedTuple):
    """Where the content of a file lies in a tar file."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the content.

        Raises:
            DataError: E-DATA-034 if the shard cannot be read, or ends before.
        """
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise _unreadable(self.shard, f"cannot be read: {error.strerror}") from error
        if len(content) < self.size:
            raise _unreadable(self.shard, f"ends inside {self.name}")
        return content

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"


class TarSample(NamedTuple):
    """The two members of a sample."""

    name: str
    image: Member
    label: Member


def index_shards(shards: Sequence[Path], *, image: Sequence[str], label: Sequence[str]) -> list[TarSample]:
    """List the samples of tar files from their headers; contents are not read.

    Members belong together that have the same path up to the first dot of its last part; what follows that dot tells
    what they are. Other members, such as ``cls`` or ``json``, are left alone.

    Args:
        shards: The files, not compressed.
        image: Endings of pictures, without the first dot.
        label: Endings of label maps, likewise.

    Returns:
        The samples in the order of their first members.

    Raises:
        DataError: E-DATA-034 for a file that is no plain tar file or is cut; E-DATA-035 with all samples that are not
            whole or were there before.
    """
    found: dict[str, dict[str, Member]] = {}
    problems = []
    for shard in shards:
        for member in _list_members(shard):
            path = PurePosixPath(member.name)
            stem, _, ending = path.name.partition(".")
            kind = "image" if ending.lower() in image else "label" if ending.lower() in label else ""
            if not stem or not kind:
                continue
            parts = found.setdefault(str(path.with_name(stem)), {})
            if kind in parts:
                problems.append(f"{member} is a second {kind} of its sample, beside {parts[kind]}")
            parts.setdefault(kind, member)
    for name, parts in found.items():
        problems += [f"{name} has no {kind}" for kind in ("image", "label") if kind not in parts]
    if problems:
        more = f"; and {len(problems) - 10:,} more" if len(problems) > 10 else ""
        raise DataError(
            "E-DATA-035",
            "; ".join(problems[:10]) + more,
            fix=f"a sample has one member that ends in .{', .'.join(image)} and one in .{', .'.join(label)}; write the "
            "shards again, or name other endings in the data set file",
            path=shards[0].parent,
        )
    return [TarSample(name, parts["image"], parts["label"]) for name, parts in found.items()]


def _list_members(shard: Path) -> list[Member]:
    """List the regular files of a tar file; anything else in it is left alone."""
    try:
        # a pipe would block the reader for ever
        if not shard.is_file():
            raise _unreadable(shard, "not a regular file")
        with tarfile.open(shard, "r:") as tar:
            return [Member(shard, info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    except (OSError, tarfile.TarError, ValueError) as error:
        reason = f"cannot be read: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        raise _unreadable(shard, f"no plain tar file ({reason})") from error


def _unreadable(shard: Path, reason: str) -> DataError:
    return DataError("E-DATA-034", reason, fix="fetch the shard again; unpack a compressed one", path=shard)
