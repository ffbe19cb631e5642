"""From a data set to training batches whose content depends on (seed, step) alone.

The order of an epoch is a function of (seed, epoch), the augmentation of a sample one of (seed, epoch, index). So any
number of workers, any number of ranks and any restart see the same samples, and a run resumes in the middle of an
epoch by asking for the next step's batch: nothing is replayed. Rare-class sampling draws images with replacement, by
the same generators; an image that an epoch draws again is augmented by (seed, epoch, index, repeat).
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
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from nestseg.core.errors import DataError, NestsegError
from nestseg.core.types import Batch, Sample
from nestseg.data.counts import SplitCounts
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.packed import read_for_crop
from nestseg.data.transforms import sample_generator

Transform = Callable[[Sample, np.random.Generator], Sample]


class SmallDatasetWarning(UserWarning):
    """A data set smaller than the batch: batches run on across epochs."""


class Draw(NamedTuple):
    """One sample of a batch: which image, in which epoch (the epoch decides its augmentation)."""

    epoch: int
    sample_index: int
    repeat: int = 0
    """How often the epoch has drawn the image before; above 0 with rare-class sampling only."""
    wanted_class: int | None = None
    """Train id for whose sake rare-class sampling chose the image."""

    def generator(self, seed: int) -> np.random.Generator:
        """Make the generator of this sample's augmentation, from the recipe's seed."""
        if not self.repeat:
            return sample_generator(seed, self.epoch, self.sample_index)
        key = (self.epoch, self.sample_index, self.repeat)
        return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


class EpochOrder(NamedTuple):
    """The samples of an epoch in their order.

    Shape:
        - images: (num_samples,) int64 sample indices
        - repeats: (num_samples,) int64, see `Draw`; None where every image comes once
        - wanted_classes: (num_samples,) int64, see `Draw`; None without rare-class sampling
    """

    images: NDArray[np.int64]
    repeats: NDArray[np.int64] | None = None
    wanted_classes: NDArray[np.int64] | None = None

    def draw(self, epoch: int, place: int) -> Draw:
        """Return the sample at a place of this epoch."""
        return Draw(
            epoch,
            int(self.images[place]),
            0 if self.repeats is None else int(self.repeats[place]),
            None if self.wanted_classes is None else int(self.wanted_classes[place]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RareClassSampling:
    """Draw a class, the rarer the likelier, then one of the images that show it.

    Class c of the R classes that occur has probability ``exp((1 - f_c) / T) / sum(exp((1 - f) / T))``, where f is a
    class's share of the labelled pixels and T the temperature.

    Args:
        classes: Train ids that occur, ascending.
        probabilities: Of each of them.
        offsets: Where the images of every class begin in ``images``, and the end of all.
        images: Sample indices, by class.
        min_pixels: See `from_counts`.
        tries: See `from_counts`.

    Shape:
        - classes: (R,) int64
        - probabilities: (R,) float64
        - offsets: (R + 1,) int64
        - images: (M,) int64

    Reference:
        Hoyer, Dai, Van Gool, "DAFormer: Improving Network Architectures and Training Strategies for Domain-Adaptive
        Semantic Segmentation", CVPR 2022 (rare class sampling).

    Deviations:
        A class that no image shows with ``min_pixels`` pixels draws from all images that show it, where the authors'
        code refuses it. A crop must show half of ``min_pixels``, as there, or half of what its image has or half of its
        own area, if that is less. When no try does, the best one is taken and not the last.
    """

    classes: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    offsets: NDArray[np.int64]
    images: NDArray[np.int64]
    min_pixels: int
    tries: int

    @classmethod
    def from_counts(
        cls, counts: SplitCounts, *, temperature: float = 0.01, min_pixels: int = 3000, tries: int = 10
    ) -> RareClassSampling:
        """Set up the sampling of a split.

        Args:
            counts: Of the split that is trained on.
            temperature: T; a high one draws classes alike, a low one the rarest alone.
            min_pixels: Images with as many pixels of a class are drawn for it, and a crop must show half as many.
            tries: How often an image is augmented until its crop does.

        Raises:
            DataError: E-DATA-095, if no image has a labelled pixel.
        """
        class_pixels = counts.class_pixels
        classes = np.flatnonzero(class_pixels)
        if not classes.size:
            raise DataError(
                "E-DATA-095",
                f"rare-class sampling over {counts.num_images} images without a labelled pixel",
                fix="check the labels with nestseg data verify, or set data.rare_class_sampling to null",
            )
        scores = (1 - class_pixels[classes] / class_pixels.sum()) / temperature
        # the largest is taken off before exp, which would overflow at low temperatures
        likelihoods = np.exp(scores - scores.max())
        image_of_entry = counts.image_of_entry
        images = []
        for train_id in classes:
            shows = counts.classes == train_id
            enough = shows & (counts.pixels >= min_pixels)
            images.append(image_of_entry[enough if enough.any() else shows])
        return cls(
            classes=classes,
            probabilities=likelihoods / likelihoods.sum(),
            offsets=np.cumsum([0, *map(len, images)]),
            images=np.concatenate(images),
            min_pixels=min_pixels,
            tries=tries,
        )

    def draw_order(self, num_samples: int, rng: np.random.Generator) -> EpochOrder:
        """Draw the samples of an epoch, with replacement: two values of the generator each."""
        which_class, which_image = rng.random((2, num_samples))
        # without the last bound, which is 1 but for rounding: no value may lie beyond it
        places = np.searchsorted(np.cumsum(self.probabilities)[:-1], which_class, side="right")
        num_images = np.diff(self.offsets)[places]
        images = self.images[self.offsets[places] + (which_image * num_images).astype(np.int64)]
        return EpochOrder(images, _count_earlier(images), self.classes[places])


def _count_earlier(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count, for every value, the equal ones before it."""
    order = np.argsort(values, kind="stable")
    in_order = values[order]
    starts = np.searchsorted(in_order, in_order)
    earlier = np.empty_like(order)
    earlier[order] = np.arange(len(values)) - starts
    return earlier


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """Which samples make up which training step.

    An epoch's last partial batch is dropped. A data set smaller than a batch would then give no batch at all, so its
    epochs follow each other without a break.

    Args:
        num_samples: Size of the data set.
        batch_size: Global batch size, over all ranks.
        seed: The recipe's seed.
        sampling: Rare-class sampling; None visits every image once an epoch.

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
    sampling: RareClassSampling | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps until the order is drawn anew; 1 for a data set smaller than a batch."""
        return max(1, self.num_samples // self.batch_size)

    def order(self, epoch: int) -> EpochOrder:
        """Return the ``num_samples`` samples of an epoch."""
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(epoch,)))
        if self.sampling is not None:
            return self.sampling.draw_order(self.num_samples, rng)
        return EpochOrder(rng.permutation(self.num_samples))

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
            order = self.order(epoch)
            return [order.draw(epoch, batch * self.batch_size + place) for place in range(self.batch_size)]
        draws = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, self.num_samples)
            draws.append(self.order(epoch).draw(epoch, place))
        return draws


def read_draw(dataset: SegmentationDataset, transform: Transform, *, plan: BatchPlan, draw: Draw) -> Sample:
    """Read and augment one sample of a plan: what the network will see.

    A sample that was drawn for the sake of a class is augmented anew, by the next values of its generator, until the
    crop shows enough of the class, at most ``plan.sampling.tries`` times; then the crop that shows most of it is taken.

    Raises:
        DataError: See `SegmentationDataset.read`.
    """
    sample = read_for_crop(dataset, draw.sample_index)
    rng = draw.generator(plan.seed)
    best = transform(sample, rng)
    if plan.sampling is None or draw.wanted_class is None:
        return best
    shown = np.count_nonzero(best.target == draw.wanted_class)
    there = np.count_nonzero(sample.target == draw.wanted_class)
    enough = min(plan.sampling.min_pixels, int(there), best.target.size) / 2
    for _ in range(plan.sampling.tries - 1):
        if shown >= enough:
            break
        again = transform(sample, rng)
        if (more := np.count_nonzero(again.target == draw.wanted_class)) > shown:
            best, shown = again, more
    return best


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
    plan: BatchPlan

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> tuple[int, Sample] | NestsegError:
        # torch rebuilds a worker's exception from its text alone and would lose what ours carry
        try:
            return draw.sample_index, read_draw(self.dataset, self.transform, plan=self.plan, draw=draw)
        except NestsegError as error:
            return error.at(self.dataset.name(draw.sample_index))


def collate(items: Sequence[tuple[int, Sample] | NestsegError]) -> Batch | NestsegError:
    """Stack samples of one size into a `Batch`; an error among them takes their place."""
    for item in items:
        if isinstance(item, NestsegError):
            return item
    pairs = [item for item in items if not isinstance(item, NestsegError)]
    height, width, channels = pairs[0][1].image.shape
    images = np.empty_like(pairs[0][1].image, shape=(len(pairs), channels, height, width))
    for planes, (_, sample) in zip(images, pairs, strict=True):
        if sample.image.shape != (height, width, channels):
            raise ValueError(f"samples of {(height, width, channels)} and {sample.image.shape} in one batch")
        cv2.split(sample.image, list(planes))  # a fifth of the time of stacking and permuting
    return Batch(
        image=torch.from_numpy(images),
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
    loader: DataLoader[Batch | NestsegError] = DataLoader(
        _AugmentedSamples(dataset, transform, plan),  # type: ignore[arg-type]  # its key is a Draw
        batch_sampler=_StepDraws(plan, start, stop, rank, world_size),
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        pin_memory=pin_memory,
        # the loader draws a seed for its workers, which nothing here uses; it must not move the stream of dropout
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, NestsegError):
            raise batch
        yield Batch(*batch)


def _start_worker(worker: int) -> None:
    # the parent decides when to stop: a signal to the whole group must not take the workers before its checkpoint
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
