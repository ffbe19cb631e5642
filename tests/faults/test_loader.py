"""The loader when workers die or hang, samples are bad, transforms have bugs, and memory for sharing is short."""

from __future__ import annotations

import ctypes
import errno
import faulthandler
import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from nestseg.core.errors import DataError, RecipeError
from nestseg.core.image_io import write_image, write_labels
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample
from nestseg.data.augment import CutMix, RandomPartner
from nestseg.data.dataset import FileDataset, Pair, SegmentationDataset, make_label_map
from nestseg.data.loader import BatchPlan, training_batches
from nestseg.data.packed import PackedDataset, pack_dataset
from nestseg.data.transforms import TrainTransform
from nestseg.data.workers import WorkerWarning

COUNT = 12
FORK = multiprocessing.get_context("fork")


class Folder(FileDataset):
    """Pictures filled with their index; ``traps`` says what happens first when a sample is read."""

    taxonomy: ClassVar = Taxonomy(name="folder", classes=("a", "b"), palette=((0, 0, 0), (9, 9, 9)))
    splits: ClassVar = ("train",)
    official_counts: ClassVar = {}
    label_map: ClassVar = make_label_map({0: 0, 1: 1})
    label_values: ClassVar = frozenset({0, 1, 255})
    traps: dict[int, Callable[[], object]]

    def _find_pairs(self, root: Path) -> Iterator[Pair]:
        self.traps = {}
        for path in sorted(root.glob("*_image.png")):
            name = path.name.removesuffix("_image.png")
            yield Pair(name, path, root / f"{name}_labels.png")

    def read(self, index: int) -> Sample:
        self.traps.get(index, lambda: None)()
        return super().read(index)


def write_folder(root: Path, count: int = COUNT) -> Path:
    for index in range(count):
        write_image(root / f"{index:03}_image.png", np.full((8, 8, 3), index, np.uint8))
        labels = np.zeros((8, 8), np.uint8)
        labels[:, 4:] = 1
        write_labels(root / f"{index:03}_labels.png", labels, Folder.taxonomy.colour_table())
    return root


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(write_folder(tmp_path), "train")


def add_noise(sample: Sample, rng: np.random.Generator) -> Sample:
    return Sample(sample.image + rng.integers(0, 50, sample.image.shape, dtype=np.uint8), sample.target)


def make_plan(dataset: SegmentationDataset, batch_size: int = 2) -> BatchPlan:
    return BatchPlan(num_samples=len(dataset), batch_size=batch_size, seed=5)


def read(dataset, *, transform=add_noise, batch_size=2, **options):
    options = {"start": 0, "stop": 9, **options}
    return list(training_batches(dataset, transform, plan=make_plan(dataset, batch_size), **options))


def assert_same(batches, others) -> None:
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert all(torch.equal(*parts) for parts in zip(batch, other, strict=True))


def set_trap(dataset, step: int, place: int, trap: Callable[[], object]) -> str:
    """Let something happen when a sample of a step is read; return its path."""
    index = make_plan(dataset).draws(step)[place].sample_index
    dataset.traps[index] = trap
    return str(dataset.pairs[index].image)


def kill_self(how: int) -> None:
    faulthandler.disable()  # pytest's would print every thread of a crash that is meant
    os.kill(os.getpid(), how)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


def count_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# --- T11: a worker dies


@pytest.mark.parametrize(
    ("end", "word"),
    [
        (lambda: kill_self(signal.SIGKILL), "was killed by SIGKILL"),
        (lambda: kill_self(signal.SIGSEGV), "was killed by SIGSEGV"),
        (lambda: kill_self(signal.SIGBUS), "was killed by SIGBUS"),
        (lambda: os._exit(3), "ended with status 3"),
    ],
    ids=["killed", "segfault", "bus error", "exit"],
)
def test_worker_that_dies_once_is_replaced_and_the_samples_stay_the_same(folder, tmp_path, end, word):
    expected = read(folder)
    once = tmp_path / "died"

    def die_once() -> None:
        if not once.exists():
            once.touch()
            end()

    path = set_trap(folder, 3, 1, die_once)
    with pytest.warns(WorkerWarning) as caught:
        batches = read(folder, num_workers=2)
    assert_same(batches, expected)
    (warning,) = caught
    assert str(warning.message).startswith(f"a loader process {word} while it read {path}, a sample of step 3;")


def test_worker_that_dies_at_the_same_step_again_stops_the_run_and_names_the_samples(folder):
    path = set_trap(folder, 2, 1, lambda: kill_self(signal.SIGKILL))
    batches = training_batches(folder, add_noise, plan=make_plan(folder), start=0, stop=9, num_workers=2)
    assert_same([next(batches), next(batches)], read(folder, stop=2))
    with pytest.warns(WorkerWarning), pytest.raises(DataError) as raised:
        next(batches)
    assert str(raised.value).startswith(f"E-DATA-075 | {path} | two loader processes in a row ended at step 2;")
    assert "SIGKILL" in raised.value.reason
    assert "data.num_workers" in raised.value.fix
    names = [str(folder.pairs[draw.sample_index].image) for draw in make_plan(folder).draws(2)]
    assert [line.strip() for line in raised.value.table[1:]] == names
    assert not multiprocessing.active_children()


def test_every_worker_killed_between_any_two_steps_changes_no_sample(folder):
    expected = read(folder, stop=8)
    with closing(
        training_batches(folder, add_noise, plan=make_plan(folder), start=0, stop=8, num_workers=2)
    ) as batches:
        got = []
        with warnings.catch_warnings(record=True, action="always", category=WorkerWarning) as caught:
            for batch in batches:
                got.append(batch)
                for process in multiprocessing.active_children():
                    process.kill()
    assert_same(got, expected)
    assert len(caught) >= 4


def test_death_of_a_worker_does_not_interrupt_what_the_run_is_doing(folder):
    # torch's own loader raises from a handler of SIGCHLD, in the middle of an optimiser step if it happens to be there
    before = signal.getsignal(signal.SIGCHLD)
    with closing(training_batches(folder, add_noise, plan=make_plan(folder), start=0, stop=9, num_workers=2)) as some:
        next(some)
        assert signal.getsignal(signal.SIGCHLD) == before


# --- T12: any exception


class PickyError(Exception):
    """Cannot be pickled: its constructor wants two words."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def format_error(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bug_keeps_its_type_and_traceback_and_names_the_sample(folder, num_workers):
    def divide_by_nothing(sample: Sample, rng: np.random.Generator) -> Sample:
        return sample._replace(image=sample.image * (1 // int(sample.image[0, 0, 0] // 100)))

    index = make_plan(folder).draws(0)[0].sample_index
    with pytest.raises(ZeroDivisionError) as raised:
        read(folder, transform=divide_by_nothing, num_workers=num_workers)
    text = format_error(raised.value)
    assert f"with sample {folder.pairs[index].image} (seed 5, epoch 0, index {index})" in text
    assert "in divide_by_nothing" in text


@pytest.mark.parametrize(("num_workers", "kind"), [(0, PickyError), (1, RuntimeError)])
def test_bug_whose_exception_cannot_travel_arrives_all_the_same(folder, num_workers, kind):
    def refuse(sample: Sample, rng: np.random.Generator) -> Sample:
        raise PickyError("this", "that")

    with pytest.raises(kind, match="this and that") as raised:
        read(folder, transform=refuse, num_workers=num_workers)
    text = format_error(raised.value)
    assert "PickyError" in text
    assert f"with sample {folder.pairs[make_plan(folder).draws(0)[0].sample_index].image}" in text


@pytest.mark.parametrize("bad_samples", ["stop", "skip"])
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [MemoryError("no 9 GB"), OSError(errno.EIO, "Input/output error")], ids=type)
def test_error_of_the_machine_names_the_sample_and_is_no_bad_sample(folder, error, num_workers, bad_samples):
    def fail() -> None:
        raise error

    path = set_trap(folder, 1, 0, fail)
    with pytest.raises(DataError) as raised:
        read(folder, num_workers=num_workers, bad_samples=bad_samples)
    assert raised.value.code == "E-DATA-079"
    assert raised.value.path == path
    assert str(error) in raised.value.reason
    assert "in fail" in format_error(raised.value)


# --- T13: little shared memory


def read_with_little_shared_memory(root: Path) -> None:
    assert ctypes.CDLL(None, use_errno=True).unshare(0x00020000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", "/dev/shm"], check=True)
    whole = TrainTransform(base_size=(1024, 1024), crop_size=(1024, 1024))
    batches = read(Folder(root, "train"), transform=whole, stop=4, num_workers=2)
    assert [batch.image.nbytes for batch in batches] == [2 * 3 * 2**20] * 4


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root may mount a small /dev/shm")
def test_batches_larger_than_dev_shm_arrive(tmp_path):
    child = FORK.Process(target=read_with_little_shared_memory, args=(write_folder(tmp_path, 4),))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_batches_cost_no_file_descriptors_once_they_are_gone(folder):
    gc.collect()  # what earlier tests left behind
    before = count_descriptors()
    for _ in range(3):
        batches = read(folder, num_workers=2)
        assert count_descriptors() <= before + len(batches)
        del batches
    assert count_descriptors() <= before


# --- T14: a worker hangs


@pytest.fixture
def pipe(tmp_path) -> Path:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    return path


def test_read_that_hangs_ends_in_an_error_that_names_the_file(folder, pipe):
    path = set_trap(folder, 2, 1, pipe.read_bytes)
    started = time.monotonic()
    with pytest.raises(DataError, match=re.escape(f"E-DATA-076 | {path} | step 2 was waited for 0.5 seconds")):
        read(folder, num_workers=2, timeout=0.5)
    assert time.monotonic() - started < 4
    assert not multiprocessing.active_children()


def test_worker_that_is_stopped_is_told_from_a_sample_that_hangs(folder):
    batches = training_batches(folder, add_noise, plan=make_plan(folder), start=0, stop=9, num_workers=1, timeout=0.5)
    next(batches)
    (process,) = multiprocessing.active_children()
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match="E-DATA-076") as raised:
        list(batches)
    assert [line.strip() for line in raised.value.table[1:]] == [
        str(folder.pairs[draw.sample_index].image)
        for draw in make_plan(folder).draws(int(raised.value.reason.split()[1]))
    ]
    assert is_gone(process.pid)


def test_pipe_in_place_of_a_picture_is_refused_without_a_wait(folder):
    path = Path(set_trap(folder, 1, 0, lambda: None))
    path.unlink()
    os.mkfifo(path)
    for num_workers in (0, 1):
        with pytest.raises(DataError, match=re.escape(f"E-DATA-010 | {path} | not a regular file")):
            read(folder, num_workers=num_workers)


# --- closing and signals


def test_closing_ends_a_hung_worker_at_once(folder, pipe):
    set_trap(folder, 1, 0, pipe.read_bytes)
    batches = training_batches(folder, add_noise, plan=make_plan(folder), start=0, stop=9, num_workers=2)
    next(batches)
    pids = [process.pid for process in multiprocessing.active_children()]
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 1
    assert len(pids) == 2
    assert all(map(is_gone, pids))


def test_wait_for_a_batch_ends_when_the_run_is_to_stop(folder, pipe):
    set_trap(folder, 1, 0, pipe.read_bytes)
    asked_at = time.monotonic() + 0.5
    batches = read(folder, num_workers=2, should_stop=lambda: time.monotonic() > asked_at)
    assert len(batches) == 1
    assert 0.5 < time.monotonic() - asked_at + 0.5 < 2
    assert not multiprocessing.active_children()


def test_workers_ignore_the_signals_that_stop_a_run(folder):
    expected, got = read(folder), []
    with closing(training_batches(folder, add_noise, plan=make_plan(folder), start=0, stop=9, num_workers=2)) as some:
        for batch in some:
            got.append(batch)
            for process in multiprocessing.active_children():
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                    os.kill(process.pid, number)
    assert_same(got, expected)


def hang_in_a_worker(root: Path, pipe: Path, report) -> None:
    dataset = Folder(root, "train")
    set_trap(dataset, 1, 0, pipe.read_bytes)
    batches = training_batches(dataset, add_noise, plan=make_plan(dataset), start=0, stop=9, num_workers=3)
    next(batches)
    report.send([process.pid for process in multiprocessing.active_children()])
    time.sleep(60)


def test_no_worker_outlives_a_killed_run(tmp_path, pipe):
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=hang_in_a_worker, args=(write_folder(tmp_path), pipe, theirs))
    child.start()
    assert ours.poll(20)
    pids = ours.recv()
    assert len(pids) == 3
    assert not any(map(is_gone, pids))
    child.kill()
    child.join()
    assert wait_for(lambda: all(map(is_gone, pids)), 6)


ABANDON = """
import sys
sys.path.insert(0, {here!r})
from test_loader import *
dataset = Folder({root!r}, "train")
set_trap(dataset, 1, 0, Path({pipe!r}).read_bytes)
batches = training_batches(dataset, add_noise, plan=make_plan(dataset), start=0, stop=9, num_workers=2)
next(batches)
print("read")
"""


@pytest.mark.slow
def test_interpreter_ends_although_the_batches_were_never_closed(tmp_path, pipe):
    here = str(Path(__file__).parent)
    script = ABANDON.format(here=here, root=str(write_folder(tmp_path)), pipe=str(pipe))
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "read\n", "")


# --- T15: bad samples


def damage(dataset, *indices: int) -> None:
    for index in indices:
        path = dataset.pairs[index].image
        path.write_bytes(path.read_bytes()[:40])


def collect(dataset, **options):
    replaced: list[tuple[str, str | None]] = []
    batches = read(
        dataset, bad_samples="skip", on_replaced=lambda name, error: replaced.append((name, error.code)), **options
    )
    return batches, replaced


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_sample_stops_the_run_unless_told_otherwise(folder, num_workers):
    damage(folder, 4)
    with pytest.raises(DataError, match=re.escape(f"E-DATA-011 | {folder.pairs[4].image}")):
        read(folder, num_workers=num_workers)


def test_bad_sample_is_replaced_alike_for_workers_ranks_and_restarts_and_counted_once(folder):
    clean = read(folder, stop=18, batch_size=4)
    damage(folder, 4)
    straight, replaced = collect(folder, stop=18, batch_size=4)  # six epochs
    assert replaced == [("004", "E-DATA-011")]
    assert not any((batch.sample_index == 4).any() for batch in straight)
    substitutes = set()
    for batch, before in zip(straight, clean, strict=True):
        was_bad = before.sample_index == 4
        assert torch.equal(batch.image[~was_bad], before.image[~was_bad])
        substitutes |= set(batch.sample_index[was_bad].tolist())
    assert len(substitutes) > 1
    for options in ({"num_workers": 2}, {"start": 7}):
        again, counted = collect(folder, batch_size=4, **{"stop": 18, **options})
        assert_same(again, straight[-len(again) :])
        assert counted == replaced
    ranks = [collect(folder, stop=18, batch_size=4, rank=rank, world_size=2)[0] for rank in range(2)]
    for step, batch in enumerate(straight):
        assert torch.equal(batch.image, torch.cat([ranks[0][step].image, ranks[1][step].image]))


def test_substitute_that_is_bad_too_is_replaced_by_the_next_and_both_are_counted(tmp_path):
    folder = Folder(write_folder(tmp_path, 3), "train")
    damage(folder, 0, 1)
    with pytest.raises(DataError, match="E-DATA-077") as raised:
        collect(folder, batch_size=1, stop=3)
    assert raised.value.reason == "2 of 3 samples cannot be read; allowed: 1"
    assert sorted(line.split(":")[0].strip() for line in raised.value.table) == ["000", "001"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_bad_sample_in_a_thousand_is_allowed_and_one_more_is_not(num_workers):
    class Numbered:
        taxonomy = Folder.taxonomy

        def __init__(self, bad):
            self.bad = bad

        def __len__(self):
            return 2000

        def name(self, index):
            return f"sample {index}"

        def read(self, index):
            if index in self.bad:
                raise DataError("E-DATA-012", "damaged", fix="mend it")
            return Sample(np.full((2, 2, 3), index % 256, np.uint8), np.zeros((2, 2), np.uint8))

    def collect_all(bad, **options):
        return collect(Numbered(bad), batch_size=250, num_workers=num_workers, **{"stop": 8, **options})

    batches, replaced = collect_all({7, 700}, stop=16)  # two epochs
    assert len(batches) == 16
    assert sorted(replaced) == [("sample 7", "E-DATA-012"), ("sample 700", "E-DATA-012")]
    with pytest.raises(DataError, match=r"E-DATA-077 \| 3 of 2000 samples cannot be read; allowed: 2") as raised:
        collect_all({7, 70, 700})
    assert {line.split(":")[0] for line in raised.value.table} == {"  sample 7", "  sample 70", "  sample 700"}
    # those of the run that is resumed count, and are not told again
    assert collect_all({7, 700}, known_bad={"sample 7"})[1] == [("sample 700", "E-DATA-012")]
    with pytest.raises(DataError, match=r"E-DATA-077 \| 3 of 2000 "):
        collect_all({7, 700}, known_bad={"sample 7", "sample 9"})


def test_of_two_samples_that_are_mixed_the_bad_one_is_counted(folder):
    damage(folder, 4)
    mixed = TrainTransform(
        base_size=(8, 8), crop_size=(8, 8), cut_mix=CutMix(probability=1.0), partner=RandomPartner(folder)
    )
    batches, replaced = collect(folder, transform=mixed, stop=30)
    assert len(batches) == 30
    assert replaced == [("004", "E-DATA-011")]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_set_that_cannot_be_read_at_all_stops_the_run(folder, num_workers):
    damage(folder, *range(COUNT))
    with pytest.raises(DataError, match=r"E-DATA-077 \| 10 samples in a row cannot be read"):
        collect(folder, num_workers=num_workers)


def test_only_image_of_a_data_set_has_no_substitute(tmp_path):
    folder = Folder(write_folder(tmp_path, 1), "train")
    damage(folder, 0)
    with pytest.raises(DataError, match="E-DATA-011"):
        collect(folder, batch_size=1)


def test_error_of_the_recipe_is_no_bad_sample(folder):
    def refuse(sample: Sample, rng: np.random.Generator) -> Sample:
        raise RecipeError("E-RECIPE-068", "fails on a crop", fix="drop it")

    with pytest.raises(RecipeError, match="E-RECIPE-068"):
        collect(folder, transform=refuse)


# --- T24: labels that are no class


class WrongLabels(SegmentationDataset):
    """A data set of somebody who forgot to map an id."""

    taxonomy, splits, official_counts = Folder.taxonomy, ("train",), {}

    def __init__(self, root=None, split="train"):
        pass

    def __len__(self):
        return 4

    def name(self, index):
        return f"street {index}"

    def read(self, index):
        target = np.full((8, 8), 255, np.uint8)
        target[0, :4] = 1
        if index == 3:
            target[4, 4:6] = 2, 254
        return Sample(np.zeros((8, 8, 3), np.uint8), target)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_label_that_is_no_class_is_found_before_a_loss_sees_it(tmp_path, packed, num_workers):
    dataset = WrongLabels()
    if packed:
        pytest.importorskip("blosc2")
        pack_dataset(dataset, tmp_path, split="train")
        dataset = PackedDataset(tmp_path, "train")
    whole = TrainTransform(base_size=(8, 8), crop_size=(8, 8), scale_range=None)
    expected = r"E-DATA-078 \| street 3 \| train id 2, 254 after augmentation; allowed: 0-1 or 255 \| fix: "
    with pytest.raises(DataError, match=expected):
        read(dataset, transform=whole, num_workers=num_workers)


def test_label_that_an_augmentation_invents_is_found(folder):
    def blend(sample: Sample, rng: np.random.Generator) -> Sample:
        return sample._replace(target=sample.target + np.uint8(1))

    with pytest.raises(DataError, match=r"E-DATA-078 \| .*_image\.png \| train id 2 after augmentation"):
        read(folder, transform=blend)


def test_no_warning_comes_from_a_loader_that_nothing_happens_to(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(read(folder, num_workers=3), read(folder))
