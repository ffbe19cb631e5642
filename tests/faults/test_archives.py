"""Archives that mean harm, or were harmed: refused by name, and nothing outside the target (P8, P9, P10, F10)."""

from __future__ import annotations

import gzip
import io
import re
import stat
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest

from nestseg.core.errors import ArchiveError
from nestseg.data.prepare.archives import Limits, hash_archive, open_archive

ONE_LINE = re.compile(r"E-ARCHIVE-\d{3} \| [^|]+ \| [^|\n]+ \| fix: [^|\n]+")


@pytest.fixture
def target(tmp_path):
    """A folder in a folder with something to lose; it has to be the same afterwards."""
    sentinel = tmp_path / "sentinel"
    sentinel.mkdir()
    (sentinel / "mine").write_text("mine")
    folder = sentinel / "target"
    folder.mkdir()
    yield folder
    inside = {path for path in sentinel.rglob("*") if not path.is_relative_to(folder)}
    assert inside == {sentinel / "mine"}
    assert (sentinel / "mine").read_text() == "mine"
    assert not list(folder.rglob("*"))


def unpack_all(path: Path, folder: Path, **options) -> None:
    """Unpack an archive the way that trusts it most: every member under its name."""
    archive = open_archive(path, **options)
    for name, blocks in archive.stream(archive.sizes.keys()):
        content = b"".join(blocks)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def assert_refused(path: Path, folder: Path, code: str, reason: str, **options) -> None:
    with pytest.raises(ArchiveError, match=reason) as caught:
        unpack_all(path, folder, **options)
    assert caught.value.code == f"E-ARCHIVE-{code}"
    assert ONE_LINE.fullmatch(str(caught.value))
    assert caught.value.path == path


# Tar (P8)


def tar_member(name: str, *, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields) -> tuple:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def make_tar(path: Path, *members: tuple, kind: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w", format=kind) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return path


HARMLESS = tar_member("harmless.txt", content=b"text")

TAR_ATTACKS = {
    "parent": ([tar_member("../x", content=b"x")], "005", r"member '../x': it climbs out by '\.\.'"),
    "deep parent": ([tar_member("a/b/../../../x", content=b"x")], "005", "climbs out"),
    "absolute": ([tar_member("/etc/x", content=b"x")], "005", "member '/etc/x': an absolute path"),
    "drive": ([tar_member("C:/x", content=b"x")], "005", "an absolute path"),
    "backslash": ([tar_member("..\\x", content=b"x")], "005", "a backslash in its name"),
    "symlink": ([tar_member("link", kind=tarfile.SYMTYPE, linkname="../mine")], "006", "symbolic link to '../mine'"),
    "hard link": ([tar_member("link", kind=tarfile.LNKTYPE, linkname="../mine")], "006", "hard link to '../mine'"),
    "write through a symlink": (
        [tar_member("link", kind=tarfile.SYMTYPE, linkname=".."), tar_member("link/x", content=b"x")],
        "006",
        r"symbolic link to '\.\.'",
    ),
    "symlink chain": (
        [
            tar_member("d" * 200, kind=tarfile.DIRTYPE),
            tar_member("a", kind=tarfile.SYMTYPE, linkname="d" * 200),
            tar_member("a/b", kind=tarfile.SYMTYPE, linkname="a/../../" * 30),
            tar_member("escape", kind=tarfile.LNKTYPE, linkname="a/b/mine"),
            tar_member("escape", content=b"x"),
        ],
        "006",
        "symbolic link",
    ),
    "character device": ([tar_member("dev", kind=tarfile.CHRTYPE, devmajor=1, devminor=3)], "006", "is a device"),
    "block device": ([tar_member("dev", kind=tarfile.BLKTYPE, devmajor=8)], "006", "is a device"),
    "pipe": ([tar_member("pipe", kind=tarfile.FIFOTYPE)], "006", "is a pipe"),
    "setuid": ([tar_member("tool", content=b"x", mode=0o4755)], "006", "is a setuid or setgid file"),
    "setgid": ([tar_member("tool", content=b"x", mode=0o2755)], "006", "is a setuid or setgid file"),
    "contiguous": ([tar_member("file", kind=tarfile.CONTTYPE, content=b"x")], "006", "of type b'7'"),
    "unknown type": ([tar_member("file", kind=b"Z", content=b"x")], "006", "of type b'Z'"),
    "twice": ([tar_member("a/x", content=b"1"), tar_member("a/x", content=b"2")], "007", "'a/x' is there twice"),
    "twice by a detour": (
        [tar_member("a/x", content=b"1"), tar_member("./a//x", content=b"2")],
        "007",
        "is there twice",
    ),
    "case": ([tar_member("A/x", content=b"1"), tar_member("a/X", content=b"2")], "007", "'A/x' and 'a/X'"),
    "accents": (
        [tar_member("\u00e9", content=b"1"), tar_member("e\u0301", content=b"2")],
        "007",
        r"'\\xe9' and 'e\\u0301'",
    ),
    "file as folder": ([tar_member("a", content=b"1"), tar_member("a/x", content=b"2")], "007", "'a' is there twice"),
    "folder as file": ([tar_member("A", kind=tarfile.DIRTYPE), tar_member("a", content=b"2")], "007", "'A' and 'a'"),
    "no name": ([tar_member(".", content=b"x")], "005", "a file without a name"),
    "long name": ([tar_member("n" * 256, content=b"x")], "005", "longer than 255 bytes"),
    "long path": ([tar_member("n/" * 600 + "x", content=b"x")], "005", "longer than 1,024"),
}


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("attack", TAR_ATTACKS)
def test_p8_tar_that_climbs_out_or_holds_more_than_files_is_refused(tmp_path, target, attack, suffix):
    members, code, reason = TAR_ATTACKS[attack]
    archive = make_tar(tmp_path / f"attack{suffix}", HARMLESS, *members)
    assert_refused(archive, target, code, reason)


@pytest.mark.parametrize("attack", ["parent", "absolute", "accents", "long name"])
def test_p8_names_of_extended_headers_are_checked_too(tmp_path, target, attack):
    members, code, reason = TAR_ATTACKS[attack]
    archive = make_tar(tmp_path / "attack.tar", HARMLESS, *members, kind=tarfile.PAX_FORMAT)
    assert_refused(archive, target, code, reason)
    info = tarfile.TarInfo("harmless")
    info.pax_headers = {"path": "../x"}
    assert_refused(make_tar(archive, (info, b""), kind=tarfile.PAX_FORMAT), target, "005", "climbs out")


def test_p8_null_bytes_in_an_extended_name_are_refused(tmp_path, target):
    info = tarfile.TarInfo("harmless")
    info.pax_headers = {"path": "a\0b"}
    archive = make_tar(tmp_path / "attack.tar", (info, b""), kind=tarfile.PAX_FORMAT)
    assert_refused(archive, target, "005", "a NUL in its name")


@pytest.mark.parametrize("header", [{"GNU.sparse.major": "1"}, {"GNU.sparse.map": "0,1"}, {"GNU.sparse.size": "9"}])
def test_p8_sparse_files_are_refused(tmp_path, target, header):
    info, content = tar_member("sparse", content=b"1\n0\n1\n".ljust(512, b"\0") + b"x")
    info.pax_headers = {"GNU.sparse.minor": "0", "GNU.sparse.name": "sparse", "GNU.sparse.realsize": "9", **header}
    archive = make_tar(tmp_path / "attack.tar", (info, content), kind=tarfile.PAX_FORMAT)
    with pytest.raises(ArchiveError):
        unpack_all(archive, target)


def raw_header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with whatever is claimed in it, and a true checksum."""
    header = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0")
    header += b" " * 8 + kind + bytes(100) + b"ustar\00000"
    header = header.ljust(512, b"\0")
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


NEGATIVE = b"\xff" * 10 + b"\xfe\x00"  # -512
HUGE = b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7  # 2^63 - 1


@pytest.mark.parametrize("kind", [b"0", b"L", b"K", b"x", b"g"], ids=["file", "name", "link", "pax", "global pax"])
@pytest.mark.parametrize("size", [NEGATIVE, HUGE, b"77777777777\0"], ids=["negative", "2^63", "8 GB"])
@pytest.mark.parametrize("packed", [False, True])
def test_p8_headers_that_claim_impossible_sizes_cost_neither_time_nor_memory(tmp_path, target, kind, size, packed):
    content = raw_header(b"first", b"00000000000\0") + raw_header(b"x", size, kind) + bytes(10240)
    archive = tmp_path / "attack"
    archive.write_bytes(gzip.compress(content) if packed else content)
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises(ArchiveError) as caught:
        unpack_all(archive, target)
    assert time.monotonic() - started < 5
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()
    assert caught.value.code in ("E-ARCHIVE-003", "E-ARCHIVE-009", "E-ARCHIVE-010")


def test_p8_a_long_chain_of_extended_headers_is_refused(tmp_path, target):
    record = b"9 a=bcde\n"
    chain = (raw_header(b"x", b"%011o\0" % len(record), b"x") + record.ljust(512, b"\0")) * 2000
    (tmp_path / "attack").write_bytes(chain + raw_header(b"end", b"00000000000\0") + bytes(10240))
    assert_refused(tmp_path / "attack", target, "003", "damaged or cut")


def test_p8_a_gzip_bomb_is_stopped_at_its_ratio(tmp_path, target):
    archive = make_tar(tmp_path / "bomb.tar.gz", tar_member("zeros", content=bytes(32 << 20)))
    assert archive.stat().st_size < 64 << 10
    assert_refused(archive, target, "010", r"packed bytes \(all\) become .* or more; allowed: 200:1")


def test_p8_a_gzip_bomb_behind_the_end_is_stopped_too(tmp_path, target):
    tar = make_tar(tmp_path / "a.tar", HARMLESS).read_bytes()
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(tar) + gzip.compress(bytes(32 << 20)))
    assert_refused(tmp_path / "bomb.gz", target, "010", "allowed: 200:1")


@pytest.mark.parametrize("packed", [False, True])
def test_p8_limits_on_members_and_bytes_hold_for_tar(tmp_path, target, packed):
    name = tmp_path / ("a.tar.gz" if packed else "a.tar")
    archive = make_tar(name, *(tar_member(f"{i}", content=b"x" * 100) for i in range(5)))
    assert_refused(archive, target, "008", "more than 4 members", limits=Limits(members=4))
    assert_refused(archive, target, "009", "allowed: 499", limits=Limits(total_bytes=499))
    assert len(open_archive(archive, limits=Limits(members=5)).sizes) == 5


# Zip (P9)


def zip_member(name: str, *, mode: int = stat.S_IFREG | 0o644, kind: int = zipfile.ZIP_STORED, flags: int = 0):
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name
    info.external_attr, info.compress_type, info.flag_bits = mode << 16, kind, flags
    return info


def make_zip(path: Path, *members: tuple[zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("harmless.txt", "text")
        for info, content in members:
            archive.writestr(info, content)
    return path


ZIP_ATTACKS = {
    "parent": (zip_member("../x"), "005", "climbs out"),
    "absolute": (zip_member("/etc/x"), "005", "an absolute path"),
    "drive": (zip_member("c:x"), "005", "an absolute path"),
    "backslash": (zip_member("..\\..\\x"), "005", "a backslash in its name"),
    "NUL": (zip_member("x\0.png"), "005", "a NUL in its name"),
    "symlink": (zip_member("link", mode=stat.S_IFLNK | 0o777), "006", "is a symbolic link"),
    "pipe": (zip_member("pipe", mode=stat.S_IFIFO | 0o644), "006", "is of mode"),
    "device": (zip_member("dev", mode=stat.S_IFCHR | 0o644), "006", "is of mode"),
    "setuid": (zip_member("tool", mode=stat.S_IFREG | 0o4755), "006", "is a setuid or setgid file"),
    "folder without a slash": (zip_member("a", mode=stat.S_IFDIR | 0o755), "006", "is of mode"),
    "folder with content": (zip_member("a/", mode=stat.S_IFDIR | 0o755), "006", "a folder with content"),
    "case": (zip_member("Harmless.TXT"), "007", "'harmless.txt' and 'Harmless.TXT'"),
    "file as folder": (zip_member("harmless.txt/x"), "007", "'harmless.txt' is there twice"),
    "bzip2": (zip_member("x", kind=zipfile.ZIP_BZIP2), "012", "packed by method 12; allowed: 0"),
    "lzma": (zip_member("x", kind=zipfile.ZIP_LZMA), "012", "packed by method 14"),
}


@pytest.mark.parametrize("attack", ZIP_ATTACKS)
def test_p9_zip_that_climbs_out_or_holds_more_than_files_is_refused(tmp_path, target, attack):
    info, code, reason = ZIP_ATTACKS[attack]
    assert_refused(make_zip(tmp_path / "attack.zip", (info, b"content")), target, code, reason)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_p9_duplicate_names_are_refused(tmp_path, target):
    archive = make_zip(tmp_path / "attack.zip", (zip_member("x"), b"1"), (zip_member("x"), b"2"))
    assert_refused(archive, target, "007", "'x' is there twice")


@pytest.mark.parametrize("bits", [0x1, 0x41, 0x2000])
def test_p9_encrypted_members_are_refused(tmp_path, target, bits):
    archive = make_zip(tmp_path / "attack.zip")
    content = bytearray(archive.read_bytes())
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        at = content.index(mark) + offset
        content[at : at + 2] = struct.pack("<H", bits)
    archive.write_bytes(content)
    assert_refused(archive, target, "012", "'harmless.txt' is encrypted")


def test_p9_a_member_that_unpacks_to_a_thousand_times_its_size_is_refused(tmp_path, target):
    bomb = make_zip(tmp_path / "bomb.zip", (zip_member("zeros", kind=zipfile.ZIP_DEFLATED), bytes(16 << 20)))
    assert_refused(bomb, target, "010", r"packed bytes \('zeros'\) become 16,777,216 or more; allowed: 200:1")


def test_p9_a_member_that_lies_about_its_size_gives_no_more_than_it_says(tmp_path, target):
    info = zip_member("liar", kind=zipfile.ZIP_DEFLATED)
    archive = make_zip(tmp_path / "attack.zip", (info, bytes(16 << 20)))
    content = archive.read_bytes().replace(struct.pack("<I", 16 << 20), struct.pack("<I", 100))
    archive.write_bytes(content)
    with pytest.raises(ArchiveError, match="Bad CRC-32") as caught:
        unpack_all(archive, target)
    assert caught.value.code == "E-ARCHIVE-003"
    (target / "harmless.txt").unlink()


def test_p9_overlapping_members_are_refused(tmp_path, target):
    """A bomb that packs to little although no member's ratio is high: all of them share the same bytes."""
    kernel = zlib.compress(bytes(1 << 16), wbits=-15)
    name = b"x000"
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(kernel), 1 << 16, 4, 0) + name + kernel
    directory = b"".join(
        struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, len(kernel), 1 << 16, 4, 0, 0, 0, 0, 0, 0)
        + b"x%03d" % index
        for index in range(500)
    )
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 500, 500, len(directory), len(local), 0)
    (tmp_path / "bomb.zip").write_bytes(local + directory + end)
    assert_refused(tmp_path / "bomb.zip", target, "011", "members 'x000' and 'x001' share bytes")


def test_p9_a_claim_of_a_million_members_is_refused_before_they_are_read(tmp_path, target):
    archive = make_zip(tmp_path / "a.zip")
    content = archive.read_bytes()
    where = content.index(b"PK\5\6")
    end = bytearray(content[where:])
    record = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1_000_000, 1_000_000, 46, 0)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, where, 1)
    archive.write_bytes(content[:where] + record + locator + end)
    assert_refused(archive, target, "008", "1,000,000 members; allowed: 100,000")
    end[8:12] = struct.pack("<2H", 60_000, 60_000)
    archive.write_bytes(content[:where] + end)
    assert_refused(archive, target, "008", "60,000 members; allowed: 50,000", limits=Limits(members=50_000))
    # fewer are claimed than the directory lists
    archive = make_zip(tmp_path / "b.zip", *((zip_member(f"{i}"), b"") for i in range(9)))
    content = archive.read_bytes()
    archive.write_bytes(content[:-14] + struct.pack("<2H", 3, 3) + content[-10:])
    assert_refused(archive, target, "003", "lists 10 members and claims 3")


def test_p9_a_directory_larger_than_the_members_can_need_is_refused(tmp_path, target):
    archive = make_zip(tmp_path / "a.zip", (zip_member("n" * 250 + "/" + "n" * 250), b""))
    assert_refused(archive, target, "008", "a directory of .* bytes; allowed: 512", limits=Limits(members=2))


def test_p9_limits_on_bytes_hold_for_zip(tmp_path, target):
    archive = make_zip(tmp_path / "a.zip", (zip_member("x"), b"x" * 100))
    assert_refused(archive, target, "009", "104 bytes or more; allowed: 103", limits=Limits(total_bytes=103))


# Damage (P10)


def sound(tmp_path: Path, kind: str) -> Path:
    members = [(f"folder/{i}.txt", b"%d " % i * 3000) for i in range(4)]
    if kind == "zip":
        return make_zip(
            tmp_path / "a.zip", *((zip_member(name, kind=zipfile.ZIP_DEFLATED), text) for name, text in members)
        )
    return make_tar(tmp_path / f"a.{kind}", *(tar_member(name, content=text) for name, text in members))


KINDS = ["zip", "tar", "tar.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_p10_an_archive_is_told_by_its_content_whatever_its_name(tmp_path, kind):
    path = sound(tmp_path, kind).rename(tmp_path / "archive.rar")
    archive = open_archive(path)
    assert archive.read("folder/3.txt") == b"3 " * 3000
    assert archive.path == path


def test_p10_a_tar_of_the_oldest_kind_has_no_magic_and_is_read(tmp_path):
    header = bytearray(raw_header(b"file", b"00000000003\0"))
    header[257:265] = bytes(8)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "old").write_bytes(header + b"abc".ljust(512, b"\0") + bytes(1024))
    assert open_archive(tmp_path / "old").read("file") == b"abc"


@pytest.mark.parametrize("kind", KINDS)
def test_p10_an_archive_that_was_cut_anywhere_is_refused(tmp_path, target, kind):
    archive = sound(tmp_path, kind)
    content = archive.read_bytes()
    # gzip and zip end with what is needed; a tar ends with padding beyond its end mark, which may be lost
    end = len(content) - (0 if kind != "tar" else 10240 - 1024)
    steps = [*range(0, end, max(1, end // 60)), end - 1] if kind != "tar" else range(0, 4 * 6656, 512)
    for length in steps:
        archive.write_bytes(content[:length])
        with pytest.raises(ArchiveError) as caught:
            unpack_all(archive, target)
        assert caught.value.code in ("E-ARCHIVE-002", "E-ARCHIVE-003"), length


@pytest.mark.parametrize("kind", KINDS)
def test_p10_a_changed_byte_is_found_or_harms_nothing(tmp_path, kind):
    """Checksums find it in packed members; in a tar, whose files have none, the published hash has to."""
    archive = sound(tmp_path, kind)
    content = archive.read_bytes()
    whole = open_archive(archive)
    before, num_found = {name: whole.read(name) for name in whole.sizes}, 0
    for position in range(0, len(content), max(1, len(content) // 300)):
        changed = bytearray(content)
        changed[position] ^= 0x55
        archive.write_bytes(changed)
        try:
            damaged = open_archive(archive)
            after = {name: damaged.read(name) for name in damaged.sizes}
        except ArchiveError:
            num_found += 1
            continue
        if kind != "tar":
            assert set(after.values()) <= set(before.values())
    assert num_found > 10


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"),
        (bytes(5000), "a file of zeros"),
        (b"\n<!DOCTYPE html><html>404", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs pointer"),
        (b"BZh91AY&SY", "a bzip2 file"),
        (b"\xfd7zXZ\x00", "an xz file"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!\x1a\x07", "a rar archive"),
        (b"random bytes", r"no archive \(first bytes 72 61 6e 64 6f 6d 20 62\)"),
    ],
)
def test_p10_what_is_no_archive_is_told_by_its_kind(tmp_path, target, content, kind):
    (tmp_path / "a.zip").write_bytes(content)
    assert_refused(tmp_path / "a.zip", target, "002", f"{kind}; allowed: zip, tar, tar.gz")


def test_p10_a_gzip_file_that_holds_no_tar_is_refused(tmp_path, target):
    (tmp_path / "a.tgz").write_bytes(gzip.compress(b"text" * 1000))
    assert_refused(tmp_path / "a.tgz", target, "003", "damaged or cut")


def test_p10_a_part_of_a_split_archive_is_named(tmp_path, target):
    content = make_zip(tmp_path / "a.zip").read_bytes()
    (tmp_path / "first").write_bytes(b"PK\x07\x08" + content)
    assert_refused(tmp_path / "first", target, "004", "a part of an archive in several files")
    where = content.index(b"PK\5\6")
    (tmp_path / "last").write_bytes(content[: where + 4] + struct.pack("<2H", 1, 1) + content[where + 8 :])
    assert_refused(tmp_path / "last", target, "004", "a part of an archive in several files")


def test_p10_files_that_cannot_be_read_are_named(tmp_path, target):
    assert_refused(tmp_path / "absent", target, "001", "cannot be read: No such file")
    assert_refused(tmp_path, target, "001", "not a regular file")
    with pytest.raises(ArchiveError, match=r"E-ARCHIVE-001 .*cannot be read: No such file"):
        hash_archive(tmp_path / "absent", ["sha256"])


# What real archives have


def test_folders_dots_and_group_bits_of_folders_are_fine(tmp_path):
    members = [
        tar_member("./", kind=tarfile.DIRTYPE),
        tar_member("./a", kind=tarfile.DIRTYPE, mode=0o2775),
        tar_member("./a", kind=tarfile.DIRTYPE),
        tar_member("./a/x.txt", content=b"x"),
        tar_member("b//y.txt", content=b"y"),
        tar_member("long" * 50 + "/" + "name" * 50, content=b"z"),
    ]
    archive = open_archive(make_tar(tmp_path / "a.tar.gz", *members))
    assert archive.sizes == {"a/x.txt": 1, "b/y.txt": 1, "long" * 50 + "/" + "name" * 50: 1}
    assert archive.read("b/y.txt") == b"y"
    with pytest.raises(KeyError):
        archive.read("./a/x.txt")


def test_a_zip_with_a_comment_and_one_of_64_bits_are_read(tmp_path):
    path = make_zip(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"packed by hand " * 100
        with archive.open("large", "w", force_zip64=True) as file:
            file.write(b"x")
    assert open_archive(path).read("large") == b"x"


@pytest.mark.slow
def test_a_zip_of_more_members_than_two_bytes_can_count_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for index in range(66_000):
            archive.writestr(f"{index}", b"")
    assert len(open_archive(tmp_path / "many.zip").sizes) == 66_000


def test_a_short_file_of_one_letter_is_no_bomb(tmp_path):
    path = make_zip(tmp_path / "a.zip", (zip_member("zeros", kind=zipfile.ZIP_DEFLATED), bytes(1 << 20)))
    assert open_archive(path).sizes["zeros"] == 1 << 20


def test_members_are_given_out_in_the_order_of_the_file(tmp_path):
    for kind in KINDS:
        archive = open_archive(sound(tmp_path, kind))
        wanted = {"folder/3.txt", "folder/1.txt"}
        assert [name for name, blocks in archive.stream(wanted) if b"".join(blocks)] == ["folder/1.txt", "folder/3.txt"]


def test_hashes_are_those_of_the_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    seen = []
    digests = hash_archive(
        tmp_path / "a", ["md5", "sha256"], on_progress=lambda done, total: seen.append((done, total))
    )
    assert digests["md5"] == "900150983cd24fb0d6963f7d28e17f72"
    assert digests["sha256"].startswith("ba7816bf8f01cfea")
    assert seen == [(3, 3)]
