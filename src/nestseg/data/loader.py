"""From a data set to training batches whose content depends on (seed, step) alone.

The order of an epoch is a function of (seed, epoch), the augmentation of a sample one of (seed, epoch, index). So any
number of workers, any number of ranks and any restart see the same samples, and a run resumes in the middle of an
epoch by asking for the next step's batch: nothing is replayed.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader

from nestseg.core.errors import DataError
from nestseg.core.types import Batch, Sample
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.transforms import sample_generator

Transform = Callable[[Sample, np.random.Generator], Sample]


class SmallDatasetWarning(UserWarning):
    """A data set smaller than the batch: batches run on across epochs."""


class Draw(NamedTuple):
    """One sample of a batch: which image, in which epoch (the epoch decides its augmentation)."""

    epoch: int
    sample_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Which samples make up which training step.

    An epoch's last partial batch is dropped. A data set smaller than a batch would then give no batch at all, so its
    epochs follow each other without a break.

    Args:
        num_samples: Size of the data set.
        batch_size: Global batch size, over all ranks.
        seed: The recipe's seed.

    Example:
        >>> plan = BatchPlan(num_samples=10, batch_size=4, seed=0)
        >>> plan.steps_per_epoch
        2
        >>> [draw.epoch for draw in plan.draws(2)]
        [1, 1, 1, 1]
    """

    num_samples: int
    batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps until the order is drawn anew; 1 for a data set smaller than a batch."""
        return max(1, self.num_samples // self.batch_size)

    def order(self, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the permutation of an epoch: (num_samples,) int64."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,))).permutation(
            self.num_samples
        )

    def share(self, world_size: int) -> int:
        """Return how many of a step's samples each of so many ranks takes.

        Raises:
            DataError: If they cannot share a batch evenly.
        """
        if self.batch_size % world_size:
            raise DataError(
                "E-DATA-070",
                f"data.batch_size {self.batch_size} over {world_size} devices",
                fix=f"choose a multiple of {world_size}",
            )
        return self.batch_size // world_size

    def draws(self, step: int) -> list[Draw]:
        """Return the ``batch_size`` samples of a step (from 0)."""
        if self.num_samples >= self.batch_size:
            epoch, batch = divmod(step, self.steps_per_epoch)
            chosen = self.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]
            return [Draw(epoch, int(index)) for index in chosen]
        draws = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, self.num_samples)
            draws.append(Draw(epoch, int(self.order(epoch)[place])))
        return draws


@dataclass(frozen=True, slots=True)
class _StepDraws:
    """The batch sampler: this rank's share of the draws of steps start..stop."""

    plan: BatchPlan
    start: int
    stop: int
    rank: int
    world_size: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        share = self.plan.share(self.world_size)
        for step in range(self.start, self.stop):
            yield self.plan.draws(step)[self.rank * share : (self.rank + 1) * share]


@dataclass(frozen=True, slots=True)
class _AugmentedSamples:
    """The map-style data set that the workers read: a draw in, an augmented sample out."""

    dataset: SegmentationDataset
    transform: Transform
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> tuple[int, Sample] | DataError:
        # torch rebuilds a worker's exception from its text alone and would lose what a DataError carries
        rng = sample_generator(self.seed, draw.epoch, draw.sample_index)
        try:
            return draw.sample_index, self.transform(self.dataset.read(draw.sample_index), rng)
        except DataError as error:
            return error.at(self.dataset.name(draw.sample_index))


def collate(items: Sequence[tuple[int, Sample] | DataError]) -> Batch | DataError:
    """Stack samples of one size into a `Batch`; an error among them takes their place."""
    for item in items:
        if isinstance(item, DataError):
            return item
    pairs = [item for item in items if not isinstance(item, DataError)]
    images = np.stack([sample.image for _, sample in pairs])
    return Batch(
        image=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        target=torch.from_numpy(np.stack([sample.target for _, sample in pairs])),
        sample_index=torch.tensor([index for index, _ in pairs]),
    )


def training_batches(
    dataset: SegmentationDataset,
    transform: Transform,
    *,
    plan: BatchPlan,
    start: int,
    stop: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Yield this rank's batches of the steps ``start`` to ``stop`` - 1.

    Args:
        dataset: What is read.
        transform: Augmentation to one fixed size.
        plan: Which samples make up which step.
        start: First step, counted from 0.
        stop: One after the last step.
        num_workers: Loader processes; 0 reads in this one.
        rank: This process's place among ``world_size``.
        world_size: Number of processes that share a batch; must divide ``plan.batch_size``.
        pin_memory: Whether batches lie in page-locked memory, for faster copies to a GPU.

    Yields:
        `Batch` of ``plan.batch_size // world_size`` samples.

    Raises:
        DataError: For an unreadable or wrong sample, with its path, from whichever worker met it; for a batch that the
            ranks cannot share.

    Warns:
        SmallDatasetWarning: If the data set is smaller than a batch.
    """
    plan.share(world_size)
    if len(dataset) < plan.batch_size:
        warnings.warn(
            f"{len(dataset)} training images are fewer than data.batch_size {plan.batch_size}: "
            "batches run on across epochs and may hold an image twice",
            SmallDatasetWarning,
            stacklevel=2,
        )
    # Here and not in the workers: OpenCV's pool does not survive a fork, and a child that resizes it waits for threads
    # that only the parent has. The pictures are small; processes, not threads, are what reads them in parallel.
    cv2.setNumThreads(1)
    loader: DataLoader[Batch | DataError] = DataLoader(
        _AugmentedSamples(dataset, transform, plan.seed),  # type: ignore[arg-type]  # its key is a Draw
        batch_sampler=_StepDraws(plan, start, stop, rank, world_size),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        # the loader draws a seed for its workers, which nothing here uses; it must not move the stream of dropout
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield Batch(*batch)


def _start_worker(worker: int) -> None:
    # the parent decides when to stop: a signal to the whole group must not take the workers before its checkpoint
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
