"""Archives from strangers: every member is checked before the first byte of any is given out.

This module decides which members an archive may have and gives out their content; it never makes a path of a
member's name. Only ``prepare`` reads archives, so it lives here and not in ``core``.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, final

from nestseg.core.errors import ArchiveError

BLOCK = 1 << 14
"""Bytes a read. It also caps a tar header: longer ones are only good for slowing its parser down."""

_HASH_BLOCK = 1 << 20

# What tarfile, zipfile, gzip and zlib raise on damaged bytes. OSError is BadGzipFile, or a disk that fails.
_DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError),
    *(ValueError, LookupError, ArithmeticError, NotImplementedError, RuntimeError),
)

# What is found in place of an archive, by its first bytes.
_OTHER_STARTS = {
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"<?xml": "a web page or XML",
    b"version https://git-lfs": "a git-lfs pointer",
    b"bzh": "a bzip2 file",
    b"\xfd7zxz\x00": "an xz file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"rar!": "a rar archive",
    b"(\xb5/\xfd": "a zstandard file",
}

_FETCH_AGAIN = "fetch it again from its official page"
_DO_NOT_USE = "do not use this archive; fetch it from its official page"


class Limits(NamedTuple):
    """What an archive may hold. ADE20K has 44,000 members, Cityscapes 11 GB: both far below."""

    members: int = 100_000
    total_bytes: int = 64 << 30
    ratio: int = 200
    """Unpacked bytes per packed byte."""
    free_bytes: int = 1 << 20
    """Up to here any ratio is fine: a short file of one letter packs at 1,000:1."""


class Archive(ABC):
    """An archive all of whose members were checked.

    Args:
        path: The file.
        sizes: Bytes of each regular file, by its name without ``.`` and doubled slashes.
    """

    def __init__(self, path: Path, sizes: Mapping[str, int]) -> None:
        self.path, self.sizes = path, sizes

    def read(self, name: str) -> bytes:
        """Return the content of one member.

        Args:
            name: A key of ``sizes``.

        Raises:
            KeyError: If there is no such member.
            ArchiveError: If it is damaged.
        """
        _ = self.sizes[name]
        return b"".join(block for _, blocks in self.stream({name}) for block in blocks)

    @abstractmethod
    def stream(self, names: Set[str]) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Give out members one after the other, in the order in which they lie in the file.

        Args:
            names: Keys of ``sizes``; their order does not matter.

        Yields:
            Name and blocks of content. The blocks of one have to be taken before the next.

        Raises:
            ArchiveError: While a member's blocks are taken, if it is damaged.
        """


def open_archive(
    path: Path, *, limits: Limits | None = None, on_progress: Callable[[int, int | None], None] | None = None
) -> Archive:
    """Check an archive whole and open it; its kind is told by its content, whatever its name ends in.

    A member may be a regular file or a folder. Its name may not be absolute, climb by ``..``, hold a backslash or
    NUL, or be that of another one, also where case and composed accents are not told apart. Links, devices, pipes,
    sparse files, setuid files, encryption and overlapping members are refused, and so is what exceeds the limits.

    Args:
        path: A zip, tar or tar.gz file.
        limits: What it may hold; None for the defaults.
        on_progress: Called with the bytes checked so far and in total (None if unknown).

    Returns:
        The archive.

    Raises:
        ArchiveError: E-ARCHIVE-001 to E-ARCHIVE-012, naming the member.

    Example:
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp()) / "a.zip"
        >>> with zipfile.ZipFile(file, "w") as made:
        ...     made.writestr("folder/a.txt", "text")
        >>> archive = open_archive(file)
        >>> archive.sizes, archive.read("folder/a.txt")
        ({'folder/a.txt': 4}, b'text')
    """
    limits, on_progress = limits or Limits(), on_progress or (lambda done, total: None)
    try:
        if path.exists() and not path.is_file():
            raise ArchiveError("E-ARCHIVE-001", "not a regular file", fix="give the archive itself", path=path)
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError as error:
        raise ArchiveError(
            "E-ARCHIVE-001", f"cannot be read: {error.strerror}", fix="check path and permissions", path=path
        ) from error
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _ZipArchive(path, limits)
    if start.startswith(b"PK\x07\x08"):
        raise _in_parts(path)
    if start.startswith(b"\x1f\x8b") or _is_tar(start):
        return _TarArchive(path, limits, is_packed=start.startswith(b"\x1f\x8b"), on_progress=on_progress)
    raise ArchiveError("E-ARCHIVE-002", f"{_name_kind(start)}; allowed: zip, tar, tar.gz", fix=_FETCH_AGAIN, path=path)


def hash_archive(
    path: Path, algorithms: Iterable[str], *, on_progress: Callable[[int, int | None], None] | None = None
) -> dict[str, str]:
    """Compute several hashes of a file in one pass.

    Args:
        path: The file.
        algorithms: Names that ``hashlib`` knows.
        on_progress: Called with the bytes so far and in total.

    Returns:
        Hexadecimal digits by algorithm.

    Raises:
        ArchiveError: E-ARCHIVE-001, if it cannot be read.
    """
    # md5 tells a cut or mixed-up file, not a forged one; it is what some of these archives were published with
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    try:
        total, done = path.stat().st_size, 0
        with path.open("rb") as file:
            while block := file.read(_HASH_BLOCK):
                for computed in hashes.values():
                    computed.update(block)
                done += len(block)
                if on_progress:
                    on_progress(done, total)
    except OSError as error:
        raise ArchiveError(
            "E-ARCHIVE-001", f"cannot be read: {error.strerror}", fix="check path and permissions", path=path
        ) from error
    return {name: computed.hexdigest() for name, computed in hashes.items()}


@final
class _TarArchive(Archive):
    """A tar file, packed by gzip or not. tarfile parses it; what it may read and where it may go is metered."""

    def __init__(
        self, path: Path, limits: Limits, *, is_packed: bool, on_progress: Callable[[int, int | None], None]
    ) -> None:
        self._limits, self._is_packed = limits, is_packed
        names = _Names(path, limits)
        with _damage_named(path), _open_tar(path, limits, is_packed=is_packed) as (tar, metered):
            while (member := tar.next()) is not None:
                if member.size < 0:
                    raise _damaged(path, f"member {_show(member.name)} has {member.size} bytes")
                names.add(member.name, member.size, is_folder=member.isdir())
                _check_tar_kind(path, member)
                on_progress(metered.tell(), None if is_packed else path.stat().st_size)
            _check_tar_end(path, tar, metered)
        super().__init__(path, names.finish())

    def stream(self, names: Set[str]) -> Iterator[tuple[str, Iterator[bytes]]]:
        """See `Archive.stream`."""
        left = len(names)
        with _damage_named(self.path), _open_tar(self.path, self._limits, is_packed=self._is_packed) as (tar, _):
            while left:
                member = tar.next()
                if member is None:
                    raise _damaged(self.path, "it changed while it was read")
                name = "/".join(_split_name(member.name))
                file = tar.extractfile(member) if name in names else None
                if file is not None:
                    left -= 1
                    yield name, _read_blocks(self.path, name, file, self.sizes[name])


@contextmanager
def _open_tar(path: Path, limits: Limits, *, is_packed: bool) -> Iterator[tuple[tarfile.TarFile, _Metered]]:
    packed_bytes = path.stat().st_size if is_packed else None
    with gzip.open(path) if is_packed else path.open("rb") as file:
        metered = _Metered(path, file, limits, packed_bytes)
        with tarfile.open(fileobj=metered, mode="r:") as tar:  # type: ignore[call-overload]  # it needs no more of a file
            yield tar, metered


class _Metered:
    """A file for tarfile that cannot be made to read back, far, or much at once.

    A header's sizes are the archive's own claims: unmetered, one of them fills the memory, a negative one makes
    tarfile loop for ever, and one gzip block in a thousand is enough to fill a disk.
    """

    def __init__(self, path: Path, file: BinaryIO | gzip.GzipFile, limits: Limits, packed_bytes: int | None) -> None:
        self._path, self._file, self._limits = path, file, limits
        self._packed_bytes = packed_bytes

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int) -> bytes:
        if not 0 <= size <= BLOCK:
            raise _damaged(self._path, f"a header claims {size:,} bytes of its own; allowed: {BLOCK:,}")
        data = self._file.read(size)
        self._check(self._file.tell())
        return data

    def seek(self, position: int) -> int:
        if position < 0:
            raise _damaged(self._path, "a header points before the start")
        self._check(position)
        return self._file.seek(position)

    def _check(self, position: int) -> None:
        if position > self._limits.total_bytes:
            raise _too_much(self._path, position, self._limits)
        if self._packed_bytes is not None:
            _check_ratio(self._path, "all", position, self._packed_bytes, self._limits)


@final
class _ZipArchive(Archive):
    """A zip file. zipfile parses it; the directory's size is checked before, as it is read whole."""

    def __init__(self, path: Path, limits: Limits) -> None:
        names = _Names(path, limits)
        with _damage_named(path):
            claimed = _check_zip_end(path, limits)
            with zipfile.ZipFile(path) as archive:
                infos, directory_start = archive.infolist(), archive.start_dir
            if len(infos) != claimed:
                raise _damaged(path, f"its directory lists {len(infos):,} members and claims {claimed:,}")
            self._infos: dict[str, zipfile.ZipInfo] = {}
            for info in infos:
                # orig_filename is the name up to its real end; zipfile cuts filename at a NUL
                is_folder = info.orig_filename.endswith("/")
                name = names.add(info.orig_filename, info.file_size, is_folder=is_folder)
                _check_zip_kind(path, info, is_folder=is_folder)
                _check_ratio(path, repr(info.orig_filename), info.file_size, info.compress_size, limits)
                if name and not is_folder:
                    self._infos[name] = info
            _check_zip_overlap(path, infos, directory_start)
        super().__init__(path, names.finish())

    def stream(self, names: Set[str]) -> Iterator[tuple[str, Iterator[bytes]]]:
        """See `Archive.stream`."""
        with _damage_named(self.path), zipfile.ZipFile(self.path) as archive:
            for name in sorted(names, key=lambda name: self._infos[name].header_offset):
                yield name, _read_blocks(self.path, name, archive.open(self._infos[name]), self.sizes[name])


class _Names:
    """The names and sizes seen so far, and what is wrong with the next."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._limits = path, limits
        self._sizes: dict[str, int] = {}
        self._files: dict[str, str] = {}
        self._folders: dict[str, str] = {}
        self._count = self._bytes = 0

    def add(self, raw: str, size: int, *, is_folder: bool) -> str:
        """Check a member's name and count it; returns the name as it is used, empty for the top folder."""
        self._count += 1
        self._bytes += size
        if self._count > self._limits.members:
            raise ArchiveError(
                "E-ARCHIVE-008",
                f"more than {self._limits.members:,} members",
                fix=_DO_NOT_USE,
                path=self._path,
            )
        if self._bytes > self._limits.total_bytes:
            raise _too_much(self._path, self._bytes, self._limits)
        if wrong := _find_name_fault(raw):
            raise ArchiveError("E-ARCHIVE-005", f"member {_show(raw)}: {wrong}", fix=_DO_NOT_USE, path=self._path)
        parts = _split_name(raw)
        if not parts and not is_folder:
            raise ArchiveError(
                "E-ARCHIVE-005", f"member {_show(raw)}: a file without a name", fix=_DO_NOT_USE, path=self._path
            )
        name = "/".join(parts)
        for depth in range(1, len(parts) + is_folder):
            folder = "/".join(parts[:depth])
            self._folders.setdefault(_fold(folder), folder)
        if not is_folder:
            first = self._files.setdefault(_fold(name), name)
            if name in self._sizes or first != name:
                raise self._repeated(first, name)
            self._sizes[name] = size
        return name

    def finish(self) -> dict[str, int]:
        """Return the sizes of the files by name, once all are known."""
        for key in self._files.keys() & self._folders.keys():
            raise self._repeated(self._folders[key], self._files[key])
        return self._sizes

    def _repeated(self, first: str, second: str) -> ArchiveError:
        same = f"{_show(second)} is there twice" if first == second else f"{_show(first)} and {_show(second)}"
        return ArchiveError(
            "E-ARCHIVE-007", f"members that are one file on some disks: {same}", fix=_DO_NOT_USE, path=self._path
        )


def _find_name_fault(raw: str) -> str:
    """Say what is wrong with a member's name; empty if nothing is."""
    if "\0" in raw:
        return "a NUL in its name"
    if "\\" in raw:
        return "a backslash in its name"
    if raw.startswith("/") or re.match("[A-Za-z]:", raw):
        return "an absolute path"
    if ".." in raw.split("/"):
        return "it climbs out by '..'"
    try:
        encoded = raw.encode()
    except UnicodeEncodeError:
        return "its name is no UTF-8"
    if len(encoded) > 1024 or any(len(part) > 255 for part in encoded.split(b"/")):
        return "its name is longer than 255 bytes, or its path longer than 1,024"
    return ""


def _split_name(raw: str) -> list[str]:
    return [part for part in raw.split("/") if part not in ("", ".")]


def _fold(name: str) -> str:
    """Return what two names share that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _check_tar_kind(path: Path, member: tarfile.TarInfo) -> None:
    kinds = {
        tarfile.SYMTYPE: f"a symbolic link to {_show(member.linkname)}",
        tarfile.LNKTYPE: f"a hard link to {_show(member.linkname)}",
        tarfile.CHRTYPE: "a device",
        tarfile.BLKTYPE: "a device",
        tarfile.FIFOTYPE: "a pipe",
    }
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        raise _refused_kind(path, member.name, kinds.get(member.type, f"of type {member.type!r}"))
    if member.issparse():
        raise _refused_kind(path, member.name, "a sparse file")
    if member.isreg() and member.mode & (stat.S_ISUID | stat.S_ISGID):
        raise _refused_kind(path, member.name, "a setuid or setgid file")


def _check_tar_end(path: Path, tar: tarfile.TarFile, metered: _Metered) -> None:
    """Check that tarfile stopped at the end mark: it also stops, in silence, at a header that is damaged or cut."""
    metered.seek(tar.offset)
    if metered.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise _damaged(path, f"no end mark at byte {tar.offset:,}")
    while metered.read(BLOCK):  # gzip compares its checksum at the very end
        pass


def _check_zip_kind(path: Path, info: zipfile.ZipInfo, *, is_folder: bool) -> None:
    name, mode = info.orig_filename, info.external_attr >> 16
    kind = stat.S_IFMT(mode)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or (kind == stat.S_IFDIR) > is_folder:
        raise _refused_kind(path, name, "a symbolic link" if kind == stat.S_IFLNK else f"of mode {mode:o}")
    if not is_folder and mode & (stat.S_ISUID | stat.S_ISGID):
        raise _refused_kind(path, name, "a setuid or setgid file")
    if is_folder and info.file_size:
        raise _refused_kind(path, name, "a folder with content")
    if info.flag_bits & 0b10_0000_0100_0001:  # bits 0, 6 and 13: encrypted, strongly, or its header is
        raise ArchiveError("E-ARCHIVE-012", f"member {_show(name)} is encrypted", fix=_DO_NOT_USE, path=path)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArchiveError(
            "E-ARCHIVE-012",
            f"member {_show(name)} is packed by method {info.compress_type}; allowed: 0 (stored), 8 (deflate)",
            fix=_DO_NOT_USE,
            path=path,
        )
    if info.volume:
        raise _in_parts(path)


def _check_zip_overlap(path: Path, infos: Iterable[zipfile.ZipInfo], directory_start: int) -> None:
    """Refuse members that share packed bytes: one kilobyte could stand for each of thousands of files."""
    end, before = 0, ""
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise ArchiveError(
                "E-ARCHIVE-011",
                f"members {_show(before)} and {_show(info.orig_filename)} share bytes",
                fix=_DO_NOT_USE,
                path=path,
            )
        end, before = info.header_offset + 30 + len(info.orig_filename) + info.compress_size, info.orig_filename
    if end > directory_start:
        raise _damaged(path, f"member {_show(before)} runs into the directory")


def _check_zip_end(path: Path, limits: Limits) -> int:
    """Read the record at the end of a zip file and return how many members it claims.

    zipfile builds an object for whatever the directory lists before it can be asked for a number.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        # as zipfile does: a record without a comment first, else the last one among the last 64 KiB
        file.seek(max(0, size - (1 << 16) - 22 - 76))
        tail = file.read()
    at = len(tail) - 22 if tail[-22:].startswith(b"PK\5\6") and tail.endswith(b"\0\0") else tail.rfind(b"PK\5\6")
    if at < 0:
        raise _damaged(path, "it has no directory at its end: cut, or a part of several")
    disk, directory_disk, _, members, directory_bytes = struct.unpack_from("<HHHHI", tail, at + 4)
    if tail[max(0, at - 20) : at].startswith(b"PK\6\7"):
        if struct.unpack_from("<I", tail, at - 4)[0] > 1:
            raise _in_parts(path)
        if not tail[max(0, at - 76) :].startswith(b"PK\6\6"):
            raise _damaged(path, "its directory is not where it says")
        members, directory_bytes = struct.unpack_from("<QQ", tail, at - 76 + 32)
    elif disk or directory_disk:
        raise _in_parts(path)
    if members > limits.members:
        raise ArchiveError(
            "E-ARCHIVE-008", f"{members:,} members; allowed: {limits.members:,}", fix=_DO_NOT_USE, path=path
        )
    if directory_bytes > limits.members * 256:
        raise ArchiveError(
            "E-ARCHIVE-008",
            f"a directory of {directory_bytes:,} bytes; allowed: {limits.members * 256:,}",
            fix=_DO_NOT_USE,
            path=path,
        )
    return int(members)


def _check_ratio(path: Path, what: str, unpacked: int, packed: int, limits: Limits) -> None:
    if unpacked > limits.free_bytes and unpacked > limits.ratio * packed:
        raise ArchiveError(
            "E-ARCHIVE-010",
            f"{packed:,} packed bytes ({what}) become {unpacked:,} or more; allowed: {limits.ratio}:1",
            fix=_DO_NOT_USE,
            path=path,
        )


def _read_blocks(path: Path, name: str, file: IO[bytes], size: int) -> Iterator[bytes]:
    """Give out a member's content, exactly as many bytes as were claimed and checked."""
    done = 0
    with _damage_named(path), file:
        while True:
            block = file.read(BLOCK)
            done += len(block)
            if done > size or (not block and done < size):
                raise _damaged(path, f"member {_show(name)} has {done:,} bytes, its header says {size:,}")
            if not block:
                return
            yield block


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except ArchiveError:
        raise
    except _DAMAGE as error:
        raise _damaged(path, str(error) or type(error).__name__) from error


def _damaged(path: Path, why: str) -> ArchiveError:
    return ArchiveError("E-ARCHIVE-003", f"damaged or cut: {why}", fix=_FETCH_AGAIN, path=path)


def _in_parts(path: Path) -> ArchiveError:
    return ArchiveError(
        "E-ARCHIVE-004", "a part of an archive in several files", fix=f"{_FETCH_AGAIN}, in one file", path=path
    )


def _refused_kind(path: Path, name: str, kind: str) -> ArchiveError:
    return ArchiveError(
        "E-ARCHIVE-006", f"member {_show(name)} is {kind}; allowed: files, folders", fix=_DO_NOT_USE, path=path
    )


def _too_much(path: Path, num_bytes: int, limits: Limits) -> ArchiveError:
    return ArchiveError(
        "E-ARCHIVE-009",
        f"{num_bytes:,} bytes or more; allowed: {limits.total_bytes:,}",
        fix=_DO_NOT_USE,
        path=path,
    )


def _show(name: str) -> str:
    """Word a name that may hold anything, on one line."""
    shown = ascii(name)
    return shown if len(shown) <= 120 else f"{shown[:100]}... ({len(name)} characters)"


def _is_tar(start: bytes) -> bool:
    """Tell a tar file by its magic or, as the oldest kind has none, by the checksum of its first header."""
    if start[257:262] == b"ustar":
        return True
    try:
        tarfile.TarInfo.frombuf(start[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _name_kind(start: bytes) -> str:
    if not start:
        return "an empty file"
    if not any(start):
        return "a file of zeros"
    begin = start.lstrip().lower()
    for mark, kind in _OTHER_STARTS.items():
        if begin.startswith(mark):
            return kind
    return f"no archive (first bytes {start[:8].hex(' ')})"
