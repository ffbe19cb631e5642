"""From a data set to training batches whose content depends on (seed, step) alone.

The order of an epoch is a function of (seed, epoch), the augmentation of a sample one of (seed, epoch, index). So any
number of workers, any number of ranks and any restart see the same samples, and a run resumes in the middle of an
epoch by asking for the next step's batch: nothing is replayed. Rare-class sampling draws images with replacement, by
the same generators; an image that an epoch draws again is augmented by (seed, epoch, index, repeat). What stands in for
a sample that cannot be read is drawn by (seed, epoch, index, repeat, attempt).

What goes wrong is told with the name of the sample. Errors of data keep their class and code. OSError and MemoryError,
which the machine makes, become a `DataError`. Any other exception is a bug, of an augmentation or of ours: it keeps its
type and traceback, and a note says which sample it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from nestseg.core.errors import DataError, NestsegError, PackError
from nestseg.core.types import IGNORE_INDEX, Batch, Sample
from nestseg.data.counts import SplitCounts
from nestseg.data.custom import CustomDataset
from nestseg.data.dataset import FileDataset, Pair, SegmentationDataset
from nestseg.data.packed import read_for_crop
from nestseg.data.transforms import sample_generator
from nestseg.data.workers import OnSample, read_ahead

Transform = Callable[[Sample, np.random.Generator], Sample]

OnReplaced = Callable[[str, NestsegError], None]
"""Called with the name of a sample that cannot be read, and why; once a sample."""

_MACHINE = "E-DATA-079"  # an error of the machine: nothing says that the sample is bad
_ATTEMPTS = 10  # to replace one sample
_SHOWN = 20


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

    def substitute(self, seed: int, *, attempt: int, num_samples: int) -> Draw:
        """Draw another image to stand in for this one.

        Args:
            seed: The recipe's seed.
            attempt: From 1; the image that an attempt draws may be as bad.
            num_samples: Size of the data set, at least 2.
        """
        key = (self.epoch, self.sample_index, self.repeat, attempt)
        other = int(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key)).integers(num_samples - 1))
        return Draw(self.epoch, other + (other >= self.sample_index))


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

    Raises:
        DataError: E-DATA-071, if there is no image.

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

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise DataError("E-DATA-071", "no images to train on", fix="choose another split, or another data set")

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
        DataError: See `SegmentationDataset.read`; E-DATA-078 for labels that are no class, which no loss would survive.
    """
    sample = read_for_crop(dataset, draw.sample_index)
    rng = draw.generator(plan.seed)
    best = transform(sample, rng)
    if plan.sampling is not None and draw.wanted_class is not None:
        shown = np.count_nonzero(best.target == draw.wanted_class)
        there = np.count_nonzero(sample.target == draw.wanted_class)
        enough = min(plan.sampling.min_pixels, int(there), best.target.size) / 2
        for _ in range(plan.sampling.tries - 1):
            if shown >= enough:
                break
            again = transform(sample, rng)
            if (more := np.count_nonzero(again.target == draw.wanted_class)) > shown:
                best, shown = again, more
    _check_labels(best.target, dataset.taxonomy.num_classes)
    return best


def _check_labels(target: NDArray[np.uint8], num_classes: int) -> None:
    # plus one, 255 becomes 0 and one comparison is enough: a tenth of the time of looking for each allowed id
    if int((target + np.uint8(1)).max()) <= num_classes:
        return
    wrong = [str(value) for value in np.unique(target) if num_classes <= value != IGNORE_INDEX]
    raise DataError(
        "E-DATA-078",
        f"train id {', '.join(wrong[:10])} after augmentation; allowed: 0-{num_classes - 1} or {IGNORE_INDEX}",
        fix="check the label map with nestseg data verify; if it is right, drop the augmentation that changes it",
    )


class _Read(NamedTuple):
    """What a step gives."""

    batch: Batch
    replaced: tuple[tuple[str, NestsegError], ...]
    """Names of samples that others stand in for, and why."""


@dataclass(frozen=True, slots=True)
class _StepReader:
    """Reads this rank's share of a step; workers get a copy."""

    dataset: SegmentationDataset
    transform: Transform
    plan: BatchPlan
    rank: int
    world_size: int
    replaces: bool
    """Whether a sample that cannot be read is replaced."""

    def __call__(self, step: int, on_sample: OnSample) -> _Read:
        items: list[tuple[int, Sample]] = []
        replaced: list[tuple[str, NestsegError]] = []
        for place, draw in enumerate(self._draws(step)):
            on_sample(place)
            items.append(self._read_or_replace(draw, replaced))
        return _Read(collate(items), tuple(replaced))

    def name_samples(self, step: int) -> list[str]:
        return [_locate(self.dataset, draw.sample_index) for draw in self._draws(step)]

    def _draws(self, step: int) -> list[Draw]:
        share = self.plan.share(self.world_size)
        return self.plan.draws(step)[self.rank * share : (self.rank + 1) * share]

    def _read_or_replace(self, draw: Draw, replaced: list[tuple[str, NestsegError]]) -> tuple[int, Sample]:
        num_samples = self.plan.num_samples
        if not self.replaces or num_samples == 1:
            return draw.sample_index, self._read(draw)
        bad: list[tuple[str, NestsegError]] = []
        one = draw
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                sample = self._read(one)
            except DataError as error:
                if error.code == _MACHINE:
                    raise
                bad.append((self._name_culprit(error), error))
                one = draw.substitute(self.plan.seed, attempt=attempt, num_samples=num_samples)
            else:
                replaced += bad
                return one.sample_index, sample
        raise _too_many(dict(bad), f"{_ATTEMPTS} samples in a row cannot be read")

    def _read(self, draw: Draw) -> Sample:
        """Read a sample; whatever goes wrong says which one it was."""
        try:
            return read_draw(self.dataset, self.transform, plan=self.plan, draw=draw)
        except NestsegError as error:
            if error.path is not None:
                raise
            raise error.at(_locate(self.dataset, draw.sample_index)) from error
        except (OSError, MemoryError) as error:
            raise DataError(
                _MACHINE,
                f"{type(error).__name__}: {error}",
                fix="for MemoryError lower data.num_workers or data.batch_size; else check the disk and its connection",
                path=_locate(self.dataset, draw.sample_index),
            ) from error
        except Exception as error:
            error.add_note(
                f"with sample {_locate(self.dataset, draw.sample_index)} "
                f"(seed {self.plan.seed}, epoch {draw.epoch}, index {draw.sample_index})"
            )
            raise

    def _name_culprit(self, error: DataError) -> str:
        """Name the sample that is bad: the one drawn, or the one that its augmentation mixes with it."""
        where = str(error.path)
        for pair in _find_pairs(self.dataset):
            if where in {str(pair.image), str(pair.label)}:
                return pair.name
        # the path of a packed sample is that of a file of many; the reason names the sample
        return f"{where}: {error.reason}" if isinstance(error, PackError) else where


def _find_pairs(dataset: SegmentationDataset) -> tuple[Pair, ...]:
    """Return the files of every sample; none where a sample is not two files of its own."""
    pairs = dataset.pairs if isinstance(dataset, FileDataset | CustomDataset) else ()
    return pairs if len(pairs) == len(dataset) else ()


def _locate(dataset: SegmentationDataset, index: int) -> str:
    """Return the picture's path if each sample has a file of its own, else the sample's name."""
    pairs = _find_pairs(dataset)
    return str(pairs[index].image) if pairs else dataset.name(index)


def _too_many(bad: Mapping[str, NestsegError | None], reason: str) -> DataError:
    lines = [f"  {name}" if error is None else f"  {name}: {error}" for name, error in bad.items()]
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return DataError(
        "E-DATA-077",
        reason,
        fix="mend them or take them out of the split; nestseg data verify finds all of them",
        table=[*lines[:_SHOWN], *more],
    )


def collate(items: Sequence[tuple[int, Sample]]) -> Batch:
    """Stack samples of one size, with their places in the data set, into a `Batch`."""
    height, width, channels = items[0][1].image.shape
    images = np.empty_like(items[0][1].image, shape=(len(items), channels, height, width))
    for planes, (_, sample) in zip(images, items, strict=True):
        if sample.image.shape != (height, width, channels):
            raise ValueError(f"samples of {(height, width, channels)} and {sample.image.shape} in one batch")
        cv2.split(sample.image, list(planes))  # a fifth of the time of stacking and permuting
    return Batch(
        image=torch.from_numpy(images),
        target=torch.from_numpy(np.stack([sample.target for _, sample in items])),
        sample_index=torch.tensor([index for index, _ in items]),
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
    timeout: float = 300.0,
    bad_samples: Literal["stop", "skip"] = "stop",
    known_bad: Collection[str] = (),
    on_replaced: OnReplaced = lambda name, error: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Generator[Batch, None, None]:
    """Yield this rank's batches of the steps ``start`` to ``stop`` - 1.

    Each worker reads two batches ahead, so up to ``2 * num_workers`` of them lie in memory besides the one in use.
    Close the generator when training ends before ``stop``: this kills the workers, whatever they are doing.

    A worker that dies is replaced once a step, and reads the same samples again.

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
        timeout: Seconds that a batch may be waited for. Without workers a read that hangs is this process's own and
            cannot time out.
        bad_samples: What a sample does that cannot be read, or that cannot be what the network needs: ``"stop"`` is
            the error; ``"skip"`` puts another one in its place, drawn by `Draw.substitute`, so that the batch depends
            on the data, seed and step alone. Where several samples are mixed, the one that is bad is counted and the
            whole mixture replaced. More than one bad sample in 1,000 stops the run, but one alone never does. Each
            rank counts what it meets.
        known_bad: Names of samples that were replaced before, in the run that is resumed.
        on_replaced: Called in this process when a batch with a substitute is due, once for every bad sample, but for
            those in ``known_bad``.
        should_stop: Looked at while a worker is waited for; when it says so, there are no more batches.

    Yields:
        `Batch` of ``plan.batch_size // world_size`` samples.

    Raises:
        DataError: For an unreadable or wrong sample, with its path, from whichever worker met it; for a batch that the
            ranks cannot share. E-DATA-075: a worker died twice at a step; E-DATA-076: a batch did not come in time;
            E-DATA-077: too many bad samples; E-DATA-079: an OSError or MemoryError.
        Exception: Whatever an augmentation raises by mistake, with a note that names the sample.

    Warns:
        SmallDatasetWarning: If the data set is smaller than a batch.
        WorkerWarning: If a worker died and was replaced.
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
    reader = _StepReader(dataset, transform, plan, rank, world_size, bad_samples == "skip")
    steps = range(start, stop)
    bad: dict[str, NestsegError | None] = dict.fromkeys(known_bad)
    allowed = max(1, plan.num_samples // 1000)
    with closing(
        read_ahead(
            reader,
            steps=steps,
            num_workers=num_workers,
            timeout=timeout,
            name_samples=reader.name_samples,
            should_stop=should_stop,
        )
        if num_workers
        else (reader(step, lambda place: None) for step in steps)
    ) as reads:
        for batch, replaced in reads:
            for name, error in replaced:
                if name in bad:
                    continue
                bad[name] = error
                on_replaced(name, error)
                if len(bad) > allowed:
                    raise _too_many(bad, f"{len(bad)} of {plan.num_samples} samples cannot be read; allowed: {allowed}")
            yield Batch(*(part.pin_memory() for part in batch)) if pin_memory else batch
