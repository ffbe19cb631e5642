"""Archives of any members: what comes out lies in the target, whatever the members are called (F10)."""

from __future__ import annotations

import io
import stat
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestseg.core.errors import ArchiveError
from nestseg.data.prepare.archives import open_archive

PARTS = st.sampled_from(
    ["..", ".", "", "a", "A", "b", "ab", "\u00e9", "e\u0301", "C:", "~", "-", " ", "\\", "\n", "mine", "sentinel"]
)
NAMES = st.one_of(
    st.lists(PARTS, min_size=1, max_size=5).map("/".join),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
)
TAR_KINDS = st.sampled_from([tarfile.REGTYPE] * 8 + [b"1", b"2", b"3", b"4", tarfile.DIRTYPE, b"6", b"7"])
ZIP_KINDS = st.sampled_from([stat.S_IFREG] * 8 + [0, stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO])
CONTENTS = st.binary(max_size=30)


@st.composite
def tar_archives(draw) -> bytes:
    encoded = io.BytesIO()
    with tarfile.open(
        fileobj=encoded, mode="w", format=draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    ) as archive:
        for name, kind, content, link in draw(
            st.lists(st.tuples(NAMES, TAR_KINDS, CONTENTS, NAMES), min_size=1, max_size=5)
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = len(content) if kind == tarfile.REGTYPE else 0
            archive.addfile(info, io.BytesIO(content))
    return encoded.getvalue()


@st.composite
def zip_archives(draw) -> bytes:
    encoded = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(encoded, "w") as archive:
        warnings.simplefilter("ignore")  # names that are there twice are meant
        for name, kind, content in draw(st.lists(st.tuples(NAMES, ZIP_KINDS, CONTENTS), min_size=1, max_size=5)):
            info = zipfile.ZipInfo("x")
            info.filename = info.orig_filename = name
            info.external_attr = (kind | 0o644) << 16
            archive.writestr(info, content)
    return encoded.getvalue()


@st.composite
def archives(draw) -> bytes:
    """A tar or zip file, in one of three cases with bytes changed."""
    content = bytearray(draw(st.one_of(tar_archives(), zip_archives())))
    if draw(st.integers(0, 2)) == 0:
        for position, value in draw(
            st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4)
        ):
            content[position] = value
    return bytes(content)


def unpack_beside_a_sentinel(content: bytes) -> bool:
    """Unpack every member under its own name; returns whether the archive was accepted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target = folder / "sentinel" / "target"
        target.mkdir(parents=True)
        (folder / "sentinel" / "mine").write_text("mine")
        (folder / "archive").write_bytes(content)
        written = {}
        try:
            archive = open_archive(folder / "archive")
            for member, blocks in archive.stream(archive.sizes.keys()):
                (target / member).parent.mkdir(parents=True, exist_ok=True)
                (target / member).write_bytes(written.setdefault(member, b"".join(blocks)))
        except ArchiveError:
            accepted = False
        else:
            accepted = True
            assert {member: len(text) for member, text in written.items()} == archive.sizes
        # what was written is what is in the target, and nothing else is anywhere
        files = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if not path.is_dir()}
        assert files.keys() == written.keys()
        assert all(path.read_bytes() == written[member] for member, path in files.items())
        outside = [path for path in folder.rglob("*") if not path.is_relative_to(target)]
        assert sorted(path.name for path in outside) == ["archive", "mine", "sentinel"]
        assert (folder / "sentinel" / "mine").read_text() == "mine"
        return accepted


@settings(max_examples=200, deadline=None)
@given(archives())
def test_f10_nothing_is_written_outside_the_target(content):
    unpack_beside_a_sentinel(content)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(archives())
def test_f10_nothing_is_written_outside_the_target_by_ten_thousand_archives(content):
    unpack_beside_a_sentinel(content)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=4).map(lambda name: f"{name}.txt"), CONTENTS, max_size=6),
    st.booleans(),
)
def test_harmless_archives_come_out_as_they_went_in(files, is_zip):
    encoded = io.BytesIO()
    if is_zip:
        with zipfile.ZipFile(encoded, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=encoded, mode="w:gz") as archive:
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "archive")
        path.write_bytes(encoded.getvalue())
        opened = open_archive(path)
        assert {name: opened.read(name) for name in opened.sizes} == files
