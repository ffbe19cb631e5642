"""The power goes: what was told to be saved is on the disk.

A run writes to a file system in a file. The file is copied while the run and its system are at work; the copy is what a
disk would hold after a cut at that moment, but that a disk may also lose what it was sent and not asked to flush.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import pytest

NUM_CUTS = int(os.environ.get("NESTSEG_POWER_CUTS", "3"))
NUM_BYTES = 96 << 20


@pytest.fixture
def disk_image(mounts, tmp_path):
    """Mount a file as a disk for children; without one, make it first."""
    mounted = []

    def mount(name: str):
        image, place = tmp_path / f"{name}.img", tmp_path / name
        place.mkdir()
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(NUM_BYTES)
            mounts.call("mkfs.ext4", "-q", "-F", str(image))
        answer = mounts.ask(do="call", command=["mount", "-o", "loop", str(image), str(place)])
        if answer["code"]:
            pytest.skip(f"no loop device to mount: {answer['output'].strip()}")
        mounted.append(place)
        return image, place

    yield mount
    for place in mounted:
        mounts.call("umount", "--lazy", str(place))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, NUM_CUTS))])
def test_power_cut_keeps_every_checkpoint_that_was_written(
    make_job, disk_image, uninterrupted, note_figure, tmp_path, seed
):
    """T5."""
    image, place = disk_image("disk")
    job = make_job(run=place / "run", checkpoint__every_steps=1, checkpoint__keep=3)
    draw = random.Random(seed)
    child = job.start().first
    job.wait_for_checkpoint(draw.randrange(1, 11), child=child)
    time.sleep(draw.uniform(0, 0.2))
    # it stands still, so that the copy is of one moment
    child.signal(signal.SIGSTOP, group=True)
    seen = job.checkpoints()
    logged = max(record["step"] for record in job.records() if record["kind"] == "step")
    # what is logged after a save knows that the save returned
    written = [step for step in seen if step < logged]
    copy = tmp_path / "copied-disk.img"
    content = image.read_bytes()
    while (again := image.read_bytes()) != content:
        content = again
    copy.write_bytes(content)
    child.signal(signal.SIGKILL, group=True)
    child.wait()

    _, place = disk_image("copied-disk")
    after = make_job("after", run=place / "run", checkpoint__every_steps=1, checkpoint__keep=3)
    found = after.checkpoints()
    sys.stdout.write(f"seed {seed}: logged step {logged}, checkpoints seen {seen}, found after the cut {found}\n")
    lost = [step for step in written if step not in found]
    ending = after.finish()
    unreadable = ending.output.count("is passed over")
    note_figure("F2", kind="power cut", seed=seed, seen=seen, found=found, lost=lost, unreadable=unreadable)
    assert not lost
    assert not unreadable
    assert after.fingerprint() == uninterrupted().fingerprint
