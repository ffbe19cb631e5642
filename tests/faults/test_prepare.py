"""Preparing under kills, full disks, closed doors and company: whole or not there (P6, P7, P32, P33)."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from nestseg.core.errors import ArchiveError, PrepareError
from nestseg.data.prepare.manifest import read_manifest
from nestseg.data.prepare.prepare import PREPARATIONS, prepare
from nestseg.data.voc import VOC

NUM_SBD, NUM_VOC = 40, 30

# What a child runs: archives made here have no published hash, and batches are short, so that a kill meets many.
CHILD = """
import sys, time
from pathlib import Path
from nestseg.core.errors import NestsegError
from nestseg.data.prepare import staging
from nestseg.data.prepare.prepare import PREPARATIONS, prepare
import scipy.io

staging._BATCH_FILES = 5
root, archives, before, on_progress = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], None
preparation = PREPARATIONS["voc"]
preparation = preparation._replace(sources=tuple(s._replace(digest=None) for s in preparation.sources))
exec(before)
print("ready", flush=True)
try:
    prepared = prepare(preparation, root, archives=archives, on_progress=on_progress)
    print("done", prepared.num_made, flush=True)
except NestsegError as error:
    print(error, flush=True)
print(sorted(path.name for path in root.iterdir()), flush=True)
"""


def without_hashes(name):
    preparation = PREPARATIONS[name]
    return preparation._replace(sources=tuple(source._replace(digest=None) for source in preparation.sources))


def make_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> Path:
    """Both archives of VOC with some dozens of pictures, SBD's labels among them."""
    folder = tmp_path_factory.mktemp("archives")
    draw = np.random.default_rng(0)

    def encode(array, kind) -> bytes:
        encoded = io.BytesIO()
        Image.fromarray(array).save(encoded, kind)
        return encoded.getvalue()

    def mat_file(array) -> bytes:
        encoded = io.BytesIO()
        scipy.io.savemat(encoded, {"GTcls": {"Segmentation": array}}, do_compression=True)
        return encoded.getvalue()

    sbd, voc = [f"s{i}" for i in range(NUM_SBD)], [f"v{i}" for i in range(NUM_VOC)]
    base, lists = "VOCdevkit/VOC2012/", "VOCdevkit/VOC2012/ImageSets/Segmentation/"
    files = {f"{lists}train.txt": "\n".join(voc[:20]).encode(), f"{lists}val.txt": "\n".join(voc[20:]).encode()}
    for name in (*sbd, *voc):
        files[f"{base}JPEGImages/{name}.jpg"] = encode(draw.integers(0, 256, (120, 160, 3), np.uint8), "JPEG")
    for name in voc:
        files[f"{base}SegmentationClass/{name}.png"] = encode(draw.integers(0, 21, (120, 160), np.uint8), "PNG")
    make_tar(folder / "VOCtrainval_11-May-2012.tar", files)
    base = "benchmark_RELEASE/dataset/"
    files = {f"{base}train.txt": "\n".join(sbd).encode(), f"{base}val.txt": b"v0\nv25\n"}
    files |= {f"{base}cls/{name}.mat": mat_file(draw.integers(0, 21, (120, 160), np.uint8)) for name in sbd}
    make_tar(folder / "benchmark.tgz", files)
    return folder


@pytest.fixture(scope="module")
def expected(archives, tmp_path_factory) -> dict[str, bytes]:
    """What an undisturbed run leaves."""
    root = tmp_path_factory.mktemp("undisturbed") / "root"
    prepare(without_hashes("voc"), root, archives=archives)
    assert len(VOC(root, "trainaug")) == NUM_SBD + 20
    return contents(root)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with its content; what has a dot in front is ours and no part of the layout."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    named = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: path.read_bytes() for name, path in named.items() if not name.startswith(".")}


def start_child(root: Path, archives: Path, *, before: str = "pass", prefix: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [*prefix, sys.executable, "-c", CHILD, str(root), str(archives), before]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_child(*arguments, **options) -> list[str]:
    output, _ = start_child(*arguments, **options).communicate(timeout=120)
    lines = output.splitlines()
    assert lines[:1] == ["ready"], output
    return lines[1:]


def kill_and_finish(root: Path, archives: Path, expected: dict[str, bytes], delay: float) -> tuple[bool, int]:
    """Kill a run after a while and let another finish; returns whether it was cut, and how many files it left."""
    child = start_child(root, archives)
    assert child.stdout.readline() == "ready\n"
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    output, _ = child.communicate()
    left = contents(root)
    assert {name: expected[name] for name in left} == left, "a file under its final name is not whole"
    staged = {  # by the name that it will have
        path.relative_to(staging).as_posix(): path.stat().st_ino
        for staging in root.glob(".prepare-voc-*")
        for path in staging.rglob("*")
        if path.is_file() and not path.name.startswith(".tmp-")
    }
    for name in staged:
        (gathered,) = root.glob(f".prepare-voc-*/{name}")
        assert gathered.read_bytes() == expected[name], "a gathered file is not whole"
    final = {name: (root / name).stat().st_ino for name in left}
    prepare(without_hashes("voc"), root, archives=archives)
    assert contents(root) == expected
    kept = staged | final
    kept.pop("voc-manifest.json", None)
    assert {name: (root / name).stat().st_ino for name in kept} == kept, "a finished file was made again"
    assert not list(root.glob(".prepare-voc-*"))
    return "done" not in output, len(kept)


def measure(root: Path, archives: Path) -> float:
    child = start_child(root, archives)
    assert child.stdout.readline() == "ready\n"
    started = time.monotonic()
    assert child.stdout.readline().startswith("done ")
    duration = time.monotonic() - started
    child.communicate()
    return duration


def test_p6_a_killed_run_leaves_no_half_file_and_the_next_one_goes_on(tmp_path, archives, expected):
    duration = measure(tmp_path / "measure", archives)
    for index, share in enumerate((0.4, 0.8)):
        kill_and_finish(tmp_path / str(index), archives, expected, duration * share)


@pytest.mark.slow
def test_p6_thirty_kills_at_random_times(tmp_path, archives, expected):
    duration, draw = measure(tmp_path / "measure", archives), random.Random(0)
    results = [
        kill_and_finish(tmp_path / str(index), archives, expected, draw.uniform(0, duration)) for index in range(30)
    ]
    assert sum(cut for cut, _ in results) >= 15
    assert any(0 < num_kept < len(expected) - 1 for _, num_kept in results)


STOPS = {
    "before the first file is named": ("staging._Batch.flush", "before", 1),
    "between two batches": ("staging._Batch.flush", "after", 7),
    "when all is gathered": ("module.publish_files", "before", 1),
    "when all is in place": ("module.publish_files", "after", 1),
    "before the manifest": ("module.write_manifest", "before", 1),
    "after the manifest": ("module.write_manifest", "after", 1),
}


@pytest.mark.parametrize("stop", STOPS)
def test_p6_a_kill_at_each_turn_can_be_mended(tmp_path, archives, expected, stop):
    """The same as a kill at a random time, but for the times that are too short to be met by chance."""
    where, when, count = STOPS[stop]
    owner, _, name = where.rpartition(".")
    before = f"""
import os, signal
from nestseg.data.prepare import prepare as _, staging
module = sys.modules["nestseg.data.prepare.prepare"]
original, calls = {where}, [0]
def killed(*arguments, **options):
    calls[0] += 1
    if "{when}" == "before" and calls[0] == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments, **options)
    if calls[0] == {count}:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr({owner}, "{name}", killed)
"""
    root = tmp_path / "root"
    child = start_child(root, archives, before=before)
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    left = contents(root)
    assert {name: expected[name] for name in left} == left
    assert ("voc-manifest.json" in left) == (stop == "after the manifest")
    # the layout is there whole or not at all
    assert len(left) in (0, len(expected) - 1, len(expected))
    prepared = prepare(without_hashes("voc"), root, archives=archives)
    assert contents(root) == expected
    assert {path.name for path in root.iterdir()} - {".prepare.lock", ".prepare.json"} == {
        "VOCdevkit",
        "voc-manifest.json",
    }
    if stop == "between two batches":
        assert prepared.num_made == prepared.num_files - 7 * 5
    elif stop != "before the first file is named":
        assert prepared.num_made == 0


def test_p6_what_was_gathered_from_another_archive_is_not_used(tmp_path, archives, expected):
    root = tmp_path / "root"
    stale = root / ".prepare-voc-0123456789ab/VOCdevkit/VOC2012/JPEGImages"
    stale.mkdir(parents=True)
    (stale / "s0.jpg").write_bytes(b"of another archive")
    prepare(without_hashes("voc"), root, archives=archives)
    assert contents(root) == expected
    assert not list(root.glob(".prepare-voc-*"))


def test_p6_a_run_that_was_cut_off_is_not_taken_for_a_smaller_data_set(tmp_path, archives):
    """What lies there is whole by itself, but more was on its way."""
    root = tmp_path / "root"
    prepare(without_hashes("voc"), root, archives=archives)
    (root / "voc-manifest.json").unlink()
    (root / ".prepare-voc-0123456789ab").mkdir()
    with pytest.raises(PrepareError, match=r"E-PREPARE-020 .*an earlier run was cut off here"):
        prepare(without_hashes("voc"), root)
    (root / ".prepare-voc-0123456789ab").rmdir()
    assert prepare(without_hashes("voc"), root).num_made == 0


# Full disks (P7)


def test_p7_a_full_disk_is_named_what_was_unpacked_is_removed_and_the_archives_stay(tmp_path, archives, expected):
    before = contents(archives)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000,) * 2)"
    message, names = run_child(tmp_path / "root", archives, before=limit)
    assert message.startswith(f"E-PREPARE-007 | {tmp_path / 'root'} | the disk is full (File too large)")
    assert "bytes are free | fix: free some space" in message
    assert names == "['.prepare.lock']"
    assert contents(archives) == before
    prepare(without_hashes("voc"), tmp_path / "root", archives=archives)
    assert contents(tmp_path / "root") == expected


def private_mount(command: str) -> tuple[str, ...]:
    """A command line that mounts something only its own process sees."""
    if os.geteuid() or not shutil.which("unshare"):
        pytest.skip("mounting needs root and unshare")
    probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip(f"this machine allows no private mounts: {probe.stderr.decode().strip()}")
    return ("unshare", "-m", "sh", "-c", f'{command} && exec "$@"', "sh")


def test_p7_too_little_space_is_told_before_anything_is_unpacked(tmp_path, archives):
    root = tmp_path / "root"
    root.mkdir()
    prefix = private_mount(f"mount -t tmpfs -o size=64k tmpfs {root}")
    message, names = run_child(root, archives, prefix=prefix)
    assert message.startswith(f"E-PREPARE-006 | {root} | ")
    need, free = (int(word.replace(",", "")) for word in message.split(" | ")[2].split() if word[0].isdigit())
    assert need > 600_000
    assert free <= 64 << 10
    assert names == "['.prepare.lock']"


@pytest.mark.parametrize("inodes", [12, 40, 100])
def test_p7_a_disk_that_fills_all_the_same_is_named(tmp_path, archives, inodes):
    """Bytes are left, places for files are not: no pre-flight sees that."""
    root = tmp_path / "root"
    root.mkdir()
    prefix = private_mount(f"mount -t tmpfs -o size=64m,nr_inodes={inodes} tmpfs {root}")
    message, names = run_child(root, archives, prefix=prefix)
    assert message.startswith(f"E-PREPARE-007 | {root} | the disk is full (No space left on device)")
    assert names == "['.prepare.lock']"


# Company and closed doors (P32, P33)


def test_p32_the_second_of_two_is_told_who_the_first_is(tmp_path, archives, expected):
    root = tmp_path / "root"
    wait = "on_progress = lambda what, done, total: (print('busy', flush=True), time.sleep(60))"
    child = start_child(root, archives, before=wait)
    assert child.stdout.readline() == "ready\n"
    assert child.stdout.readline() == "busy\n"
    try:
        who = (
            rf"E-PREPARE-005 .*process {child.pid} on {socket.gethostname()}, since .*, prepares data here \| fix: wait"
        )
        for name in ("voc", "camvid"):
            with pytest.raises(PrepareError, match=who):
                prepare(without_hashes(name), root, archives=archives)
    finally:
        child.kill()
        child.communicate()
    # the lock of a process that was killed is free
    prepare(without_hashes("voc"), root, archives=archives)
    assert contents(root) == expected


def test_p33_a_root_that_cannot_be_written_is_named(tmp_path, archives):
    root = tmp_path / "root"
    root.mkdir()
    prefix = private_mount(f"mount --bind {root} {root} && mount -o remount,ro,bind {root}")
    message, names = run_child(root, archives, prefix=prefix)
    assert message.startswith(f"E-PREPARE-008 | {root} | the folder cannot be used: Read-only file system")
    assert "choose a --root that you may write to" in message
    assert names == "[]"


def test_p33_a_finished_data_set_on_a_read_only_disk_is_fine(tmp_path, archives):
    root = tmp_path / "root"
    prepare(without_hashes("voc"), root, archives=archives)
    prefix = private_mount(f"mount --bind {root} {root} && mount -o remount,ro,bind {root}")
    assert run_child(root, archives, prefix=prefix)[0] == "done 0"


def test_a_file_in_place_of_the_root_is_named(tmp_path, archives):
    (tmp_path / "root").write_text("in the way")
    with pytest.raises(PrepareError, match=r"E-PREPARE-008 \| .*root \| the folder cannot be used: .* \| fix: "):
        prepare(without_hashes("voc"), tmp_path / "root", archives=archives)


@pytest.mark.parametrize("archive", ["VOCtrainval_11-May-2012.tar", "benchmark.tgz"])
def test_a_cut_archive_leaves_nothing_behind(tmp_path, archives, archive):
    folder = shutil.copytree(archives, tmp_path / "archives")
    content = (folder / archive).read_bytes()
    (folder / archive).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArchiveError, match=rf"E-ARCHIVE-003 .*{archive} .*damaged or cut"):
        prepare(without_hashes("voc"), tmp_path / "root", archives=folder)
    assert contents(tmp_path / "root") == {}
    assert not list((tmp_path / "root").glob(".prepare-voc-*"))


def test_manifest_of_an_undisturbed_run_lists_everything(archives, tmp_path):
    prepared = prepare(without_hashes("voc"), tmp_path / "root", archives=archives)
    listed = {file.path for file in read_manifest(prepared.manifest).files}
    assert {*listed, "voc-manifest.json"} == set(contents(tmp_path / "root"))
