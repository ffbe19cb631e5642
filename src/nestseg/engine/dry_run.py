"""What a run will take, before it is started: parameters, memory, disk, time. Nothing is written."""

from __future__ import annotations

import os
import resource
import sys
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nestseg.build import build_criterion, build_model, build_predictor, describe_model
from nestseg.core.types import Batch
from nestseg.data.loader import training_batches
from nestseg.data.packed import PackedDataset
from nestseg.engine.determinism import use_deterministic_kernels
from nestseg.engine.evaluate import evaluate
from nestseg.engine.job import Job, open_job, part_size, scheduled_lr
from nestseg.engine.log import describe_wait
from nestseg.engine.memory import is_out_of_memory, out_of_memory_error
from nestseg.losses.criterion import Criterion, LossTerm
from nestseg.models.segmenter import count_parameters
from nestseg.recipe import Recipe

MEASURED_STEPS = 3
"""Steps that are timed, after one that is not."""
PARTS = ("backbone", "decode_head", "auxiliary_head")


class PartSize(NamedTuple):
    """Parameters of a part of the network."""

    name: str
    parameters: int
    trainable: int


class MemoryPlan(NamedTuple):
    """Bytes on a device.

    What kernels borrow while they run is left out, and so are CUDA's own memory, the fragments between tensors, and on
    a processor the program and the loader's processes. Activations are counted as float32.
    """

    weights: int
    """Parameters and buffers, and the guard's copy of the buffers."""
    optimizer: int
    average: int
    step: int
    """Largest sum of activations, gradients and what lies between them, during forward and backward pass."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """The plan of a run.

    Args:
        recipe: With numbers for all that a rule may give.
        device: Where steps were measured.
        devices: Number of devices that share a batch.
        start: What the first weights are, in words; None for random ones.
        parts: Sizes of the parts of the network.
        images: Images to train on.
        evaluation_images: Images of one evaluation.
        images_at_once: Images in one forward pass of a device.
        steps_per_epoch: Steps that see each image once.
        max_steps: Steps in all.
        evaluations: Number of evaluations.
        checkpoints: Number of checkpoints, the one before the first step included.
        flops: Floating-point operations of a step over all devices, those of convolutions and matrix products; a
            multiplication and an addition are two.
        memory: What a device is expected to hold.
        measured_memory: Bytes that were in use at the most: of the GPU by tensors, or else of this process altogether.
        checkpoint_bytes: Size of a checkpoint.
        disk_bytes: The most that the run folder takes: checkpoints, one more while it is written, two models.
        step_seconds: A step with its data at hand, measured one by one.
        read_seconds: A batch of one device, read by one process, measured one by one.
        evaluation_seconds: One evaluation, from the time of one image.
        notes: Warnings, and what to do about the loader.
    """

    recipe: Recipe
    device: str
    devices: int
    start: str | None
    parts: tuple[PartSize, ...]
    images: int
    evaluation_images: int
    images_at_once: int
    steps_per_epoch: int
    max_steps: int
    evaluations: int
    checkpoints: int
    flops: int
    memory: MemoryPlan
    measured_memory: int
    checkpoint_bytes: int
    disk_bytes: int
    step_seconds: tuple[float, ...]
    read_seconds: tuple[float, ...]
    evaluation_seconds: float
    notes: tuple[str, ...]

    @property
    def wait_share(self) -> float:
        """Share of the time in which training waits for data, at the mean speeds."""
        step = _mean(self.step_seconds)
        return 1 - step / self._seconds_per_step(step, _mean(self.read_seconds))

    @property
    def seconds(self) -> tuple[float, float, float]:
        """The whole run, evaluations included: as the fastest measured step and read have it, the mean, the slowest."""
        least, mean, most = (
            self.max_steps * self._seconds_per_step(choose(self.step_seconds), choose(self.read_seconds))
            + self.evaluations * self.evaluation_seconds
            for choose in (min, _mean, max)
        )
        return least, mean, most

    def _seconds_per_step(self, step: float, read: float) -> float:
        workers = min(self.recipe.data.num_workers, max(1, _num_cores() // self.devices))
        return max(step, read / workers) if workers else step + read


def dry_run(recipe: Recipe, data_root: Path | None, *, device: str = "auto", devices: int = 1) -> DryRun:
    """Plan a run, and measure a few of its steps on this device.

    Args:
        recipe: What would be trained.
        data_root: Folder of the data set in its official layout; None for one that needs no files.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        devices: Number of devices that would share a batch; one of them is measured, without their communication.

    Raises:
        RunError: If the device is not there, or its memory does not suffice.
        DataError: For wrong data, with the file; for a batch that the devices cannot share.
        RecipeError: For augmentation or a schedule that make no sense.
        ModelError: For a network that cannot be trained like this.
        WeightsError: For a pretrained file that does not fit.
    """
    with ExitStack() as stack:
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always", UserWarning)
        if recipe.compute.deterministic:
            stack.enter_context(use_deterministic_kernels())
        job = open_job(recipe, data_root, run=None, device=device)
        recipe = job.recipe
        images_at_once = part_size(recipe, job.plan, world_size=devices)
        job.segmenter.check_batch_size(images_at_once)
        flops, step_bytes = _rehearse_without_data(recipe, images_at_once)
        read_seconds, step_seconds = _measure_steps(job, devices=devices)
        measured_memory = _peak_memory(job)
        optimizer_bytes, average_bytes = _state_bytes(job)
        evaluation_images, seconds_per_image = _measure_evaluation(job)
    buffers = _num_bytes(job.segmenter.buffers())
    model_bytes = _num_bytes(dict(job.segmenter.state_dict()))
    checkpoint_bytes = model_bytes + optimizer_bytes + average_bytes
    passes = recipe.compute.accumulate_steps * devices
    plan = DryRun(
        recipe=recipe,
        device=str(job.environment["device"]),
        devices=devices,
        start=job.start,
        parts=_measure_parts(job),
        images=len(job.dataset),
        evaluation_images=evaluation_images,
        images_at_once=images_at_once,
        steps_per_epoch=job.plan.steps_per_epoch,
        max_steps=job.max_steps,
        evaluations=_count_due(job.max_steps, recipe.evaluation.every_steps),
        checkpoints=1 + _count_due(job.max_steps, recipe.checkpoint.every_steps),
        flops=flops * passes,
        memory=MemoryPlan(
            _num_bytes(job.segmenter.parameters()) + 2 * buffers, optimizer_bytes, average_bytes, step_bytes
        ),
        measured_memory=measured_memory,
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=(recipe.checkpoint.keep + 1) * checkpoint_bytes + 2 * model_bytes,
        step_seconds=step_seconds,
        read_seconds=read_seconds,
        evaluation_seconds=seconds_per_image * evaluation_images / devices,
        notes=tuple(dict.fromkeys(str(warning.message) for warning in caught)),
    )
    advice = describe_wait(
        plan.wait_share,
        num_workers=recipe.data.num_workers,
        cores=_num_cores(),
        packed=isinstance(job.dataset, PackedDataset),
    )
    return plan if advice is None else replace(plan, notes=(*plan.notes, advice))


def _rehearse_without_data(recipe: Recipe, images_at_once: int) -> tuple[int, int]:
    """Run a forward and a backward pass on the meta device; return floating-point operations and bytes at the most."""
    data = recipe.data
    with torch.device("meta"):
        model = build_model(recipe).train()
        image = torch.empty((images_at_once, data.in_channels, *data.crop_size), dtype=getattr(torch, data.image_dtype))
        target = torch.empty((images_at_once, *data.crop_size), dtype=torch.uint8)
    if recipe.compute.activation_checkpointing:
        model.backbone.checkpoint_activations()
    criterion = _without_host(build_criterion(recipe, device="meta"))
    with _PeakMemory() as memory:
        torch.autograd.backward(criterion(model(image), target).total)
    # in a pass of its own, since it keeps tensors longer
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(criterion(model(image), target).total)
    return counter.get_total_flops(), memory.peak


def _without_host(criterion: Criterion) -> Criterion:
    """Replace the loss that looks at its target on the host, which needs data, by one of about the same memory."""
    return replace(
        criterion,
        terms=tuple(
            LossTerm("cross_entropy", term.weight) if term.name == "boundary" else term for term in criterion.terms
        ),
    )


@final
class _PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of all tensors that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._alive: weakref.WeakKeyDictionary[UntypedStorage, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = {leaf.untyped_storage() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage not in given and storage not in self._alive:
                    self._count(storage)
        return result

    def _count(self, storage: UntypedStorage) -> None:
        size = storage.nbytes()
        self._alive[storage] = size
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self._now -= size


def _measure_steps(job: Job, *, devices: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Read batches and take steps with them; return the seconds of each, without the first.

    One process reads, since workers would hide in the first step how long they take for the next ones.
    """
    fabric = job.fabric
    count = MEASURED_STEPS + 1
    batches = training_batches(
        job.dataset,
        job.transform,
        plan=job.plan,
        start=0,
        stop=count,
        world_size=devices,
        pin_memory=fabric.device.type == "cuda",
        bad_samples=job.recipe.data.bad_samples,
    )
    lr = scheduled_lr(job.recipe, step=0)
    read_seconds, step_seconds = [], []
    job.stepper.model.train()
    with closing(batches):
        for step in range(1, count + 1):
            started = time.perf_counter()
            batch = next(batches)
            read_seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            _take_step(job, batch, step=step, lr=lr)
            step_seconds.append(time.perf_counter() - started)
    return tuple(read_seconds[1:]), tuple(step_seconds[1:])


def _take_step(job: Job, batch: Batch, *, step: int, lr: float) -> None:
    try:
        job.stepper.step(job.fabric.to_device(batch), step=step, lr=lr)
        if job.fabric.device.type == "cuda":
            torch.cuda.synchronize(job.fabric.device)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory_error(job) from error
        raise


def _measure_evaluation(job: Job) -> tuple[int, float]:
    """Return the images of an evaluation, and the seconds for one of them, the second."""
    if job.eval_set is None:
        return 0, 0.0
    limit = job.recipe.evaluation.max_images
    images = len(job.eval_set) if limit is None else min(limit, len(job.eval_set))
    predictor = build_predictor(job.segmenter, describe_model(job.recipe, step=0))
    marks: list[float] = []
    evaluate(
        predictor,
        job.eval_set,
        split=job.recipe.data.eval_split,
        max_images=min(2, images),
        with_loss=True,
        on_image=lambda done, total: marks.append(time.perf_counter()),
    )
    return images, marks[-1] - marks[0]


def _peak_memory(job: Job) -> int:
    if job.fabric.device.type == "cuda":
        return torch.cuda.max_memory_allocated(job.fabric.device)
    # in kilobytes on Linux, in bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _state_bytes(job: Job) -> tuple[int, int]:
    """Return the bytes that the optimizer and the average hold after steps."""
    average = job.stepper.average
    return (
        _num_bytes(job.stepper.optimizer.state_dict()["state"]),
        0 if average is None else _num_bytes(average.state_dict()),
    )


def _measure_parts(job: Job) -> tuple[PartSize, ...]:
    parts = ((name, getattr(job.segmenter, name)) for name in PARTS)
    return tuple(
        PartSize(
            name,
            count_parameters(part),
            sum(parameter.numel() for parameter in part.parameters() if parameter.requires_grad),
        )
        for name, part in parts
        if part is not None
    )


def _count_due(max_steps: int, every_steps: int | None) -> int:
    """Count how often something happens that happens every so many steps and at the end."""
    return 0 if every_steps is None else -(-max_steps // every_steps)


def _num_bytes(values: Any) -> int:
    """Add up the tensors in nested plain values, or of an iterator."""
    values = list(values) if isinstance(values, Iterator) else values
    return sum(leaf.nbytes for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


def format_dry_run(plan: DryRun) -> str:
    """Write a plan for people, a fact a line."""
    recipe, memory = plan.recipe, plan.memory
    parameters = sum(part.parameters for part in plan.parts)
    trainable = sum(part.trainable for part in plan.parts)
    least, mean, most = map(_duration, plan.seconds)
    spread = f"{1000 * min(plan.step_seconds):.0f} to {1000 * max(plan.step_seconds):.0f} ms"
    rows = [
        ("recipe", f"{recipe.name}, digest {recipe.digest()[:8]}"),
        ("device", f"{plan.device}" + (f", one of {plan.devices}" if plan.devices > 1 else "")),
        ("start", plan.start or "random weights"),
        (
            "parameters",
            f"{parameters / 1e6:.2f} M, {trainable / 1e6:.2f} M of them trained: "
            + ", ".join(f"{part.name} {part.parameters / 1e6:.2f} M" for part in plan.parts),
        ),
        (
            "batch",
            f"{recipe.data.batch_size} images of {recipe.data.crop_size[0]} x {recipe.data.crop_size[1]}, "
            f"{plan.images_at_once} at once",
        ),
        (
            "length",
            f"{plan.max_steps} steps, {plan.steps_per_epoch} an epoch of {plan.images} images; "
            f"{plan.evaluations} evaluations of {plan.evaluation_images} images; {plan.checkpoints} checkpoints",
        ),
        ("work", f"{plan.flops / 1e12:.3g} TFLOP a step, forward and backward"),
        (
            "memory",
            f"about {_size(memory.total)} a device: weights {_size(memory.weights)}, optimizer "
            f"{_size(memory.optimizer)}, average {_size(memory.average)}, step {_size(memory.step)}; in float32, "
            f"without what kernels borrow",
        ),
        (
            "",
            f"{_size(plan.measured_memory)} measured"
            + (" by tensors" if plan.device.startswith("cuda") else ", the whole process"),
        ),
        ("disk", f"{_size(plan.checkpoint_bytes)} a checkpoint, up to {_size(plan.disk_bytes)} in the run folder"),
        (
            "time",
            f"about {mean} ({least} to {most} by the fastest and slowest of {len(plan.step_seconds)} steps): "
            f"{spread} a step, {_duration(plan.evaluation_seconds)} an evaluation",
        ),
        (
            "loader",
            f"{1000 * _mean(plan.read_seconds):.0f} ms a batch for one process, {recipe.data.num_workers} workers: "
            f"{100 * plan.wait_share:.0f} % waiting",
        ),
        *(("note", note) for note in plan.notes),
    ]
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
