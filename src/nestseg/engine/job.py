"""A run in progress: everything that a recipe and a data folder become, and what of it a checkpoint keeps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, final

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor

from nestseg.build import (
    build_average,
    build_criterion,
    build_dataset,
    build_model,
    build_optimizer,
    build_plan,
    build_transform,
    describe_model,
    fill_class_weights,
    initialise_model,
)
from nestseg.core.dist import gather_from_ranks
from nestseg.core.errors import DataError, RecipeError, RunError
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.loader import BatchPlan
from nestseg.data.transforms import TrainTransform, sample_generator
from nestseg.engine.checkpoint import load_latest, save_checkpoint
from nestseg.engine.environment import compare_environments, describe_environment
from nestseg.engine.guard import Guard, all_finite
from nestseg.engine.launch import launch
from nestseg.engine.step import Stepper, fill_momentum
from nestseg.models.segmenter import Segmenter
from nestseg.models.timm_backbone import convert_sync_batch_norm
from nestseg.optim import learning_rate, load_optimizer_state
from nestseg.recipe import Recipe
from nestseg.store.metadata import Score


class ResumeWarning(UserWarning):
    """A run continues under other conditions than it began, so that its bits may differ."""


@final
@dataclass(slots=True, kw_only=True)
class Job:
    """A run in progress.

    Args:
        recipe: With numbers for all that a rule may give: steps, class weights.
        folder: The run folder; None for a run that writes nothing.
        start: What the first weights are, in words; None for random ones.
        stepper: Takes steps; holds model, optimizer, loss, guard and average.
        segmenter: The network itself, of which ``stepper.model`` is a wrapped form.
        dataset: What is trained on.
        transform: How a sample becomes a training image.
        eval_set: What is evaluated during training; None for none.
        plan: Which samples make up which step.
        environment: See `describe_environment`.
    """

    fabric: Fabric
    recipe: Recipe
    folder: Path | None
    start: str | None
    stepper: Stepper
    segmenter: Segmenter
    dataset: SegmentationDataset
    transform: TrainTransform
    eval_set: SegmentationDataset | None
    plan: BatchPlan
    environment: dict[str, Any]
    step: int = 0
    """Steps done."""
    best_mean_iou: float = -1.0
    scores: tuple[Score, ...] = ()
    """The newest evaluation."""
    evaluation_pending: bool = False
    """Whether the run stopped before the evaluation that was due at this step."""
    bad_samples: set[str] = field(default_factory=set)
    """Names of samples that could not be read and were replaced."""
    saved_step: int = -1
    """Step of the newest checkpoint; -1 before there is one."""
    failed_saves: int = 0
    """Checkpoints in a row that could not be written."""

    @property
    def max_steps(self) -> int:
        """Length of the run."""
        assert self.recipe.schedule.max_steps is not None, "fill_max_steps comes first"
        return self.recipe.schedule.max_steps

    def due(self, every_steps: int | None) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now; None is never."""
        return every_steps is not None and (self.step % every_steps == 0 or self.step == self.max_steps)

    def model_state(self) -> dict[str, Tensor]:
        """Return the weights that are evaluated and kept: the average where there is one."""
        average = self.stepper.average
        return self.segmenter.state_dict() if average is None else average.model_state(self.segmenter)

    def save(self) -> None:
        """Write a checkpoint; the random state of every rank goes into it.

        Raises:
            RunError: E-RUN-021 if a weight is not finite, else see `save_checkpoint`.
        """
        cuda = self.fabric.device.type == "cuda"
        generators = gather_from_ranks(
            {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.fabric.device) if cuda else None,
            }
        )
        bad_samples = sorted(set[str]().union(*gather_from_ranks(self.bad_samples)))
        self.stepper.guard.settle()
        failure: RunError | None = None
        if self.fabric.is_global_zero:
            try:
                self._write_checkpoint(generators, bad_samples)
            except RunError as error:
                failure = error
        # what the first rank met, all hear of
        failure = gather_from_ranks(failure)[0]
        if failure is not None:
            raise failure
        self.saved_step = self.step

    def _write_checkpoint(self, generators: list[dict[str, Any]], bad_samples: list[str]) -> None:
        assert self.folder is not None, "a run that writes nothing saves nothing"
        stepper, average = self.stepper, self.stepper.average
        state = {
            "optimizer": stepper.optimizer.state_dict(),
            "generators": generators,
            "best_mean_iou": self.best_mean_iou,
            "scores": [score.model_dump() for score in self.scores],
            "evaluation_pending": self.evaluation_pending,
            "average": None if average is None else average.state_dict(),
            "guard": stepper.guard.state_dict(),
            "scaler": stepper.scaler.state_dict(),
            "bad_samples": bad_samples,
        }
        model = self.segmenter.state_dict()
        if not all_finite([*model.values(), *_tensors(state["optimizer"]), *_tensors(state["average"])]):
            raise RunError(
                "E-RUN-021",
                f"weights or the optimizer's state are not finite after step {self.step}; no checkpoint is written",
                fix="lower optimizer.lr or set optimizer.clip_norm; the last checkpoint is good",
                path=self.folder,
            )
        save_checkpoint(
            self.folder,
            model,
            state=state,
            metadata=describe_model(self.recipe, step=self.step),
            environment=self.environment,
            keep=self.recipe.checkpoint.keep,
        )

    def restore(self, *, strict: bool) -> None:
        """Go on from the newest good checkpoint of the run folder.

        Args:
            strict: Refuse to go on under other conditions, of which there is a warning otherwise.

        Raises:
            RunError: If there is no good checkpoint, it does not fit the recipe, or conditions changed and may not.

        Warns:
            ResumeWarning: If conditions changed.
        """
        assert self.folder is not None, "a run that writes nothing has nothing to continue"
        checkpoint = load_latest(self.folder)
        steps = gather_from_ranks(checkpoint.step)
        if len(set(steps)) > 1:
            found = ", ".join(f"rank {rank}: step {step}" for rank, step in enumerate(steps))
            raise RunError(
                "E-RUN-019",
                f"ranks find other newest good checkpoints ({found})",
                fix="wait until the shared folder shows all machines the same files, then start again",
                path=self.folder,
            )
        changes = compare_environments(checkpoint.environment, self.environment)
        if changes and strict:
            raise RunError(
                "E-RUN-015",
                "conditions are others than those of the checkpoint",
                fix="restore them, or leave out --strict-resume to go on with bits that may differ",
                path=self.folder,
                table=[f"  {line}" for line in changes],
            )
        if changes and self.fabric.is_global_zero:
            lines = "".join(f"\n  {line}" for line in changes)
            warnings.warn(f"bits may differ from those of an uninterrupted run:{lines}", ResumeWarning, stacklevel=2)
        state, stepper = checkpoint.state, self.stepper
        try:
            self.segmenter.load_state_dict(checkpoint.model)
            load_optimizer_state(stepper.optimizer, state["optimizer"])
            fill_momentum(stepper.optimizer)
            if stepper.average is not None:
                stepper.average.load_state_dict(state["average"])
            if "guard" in state:
                stepper.guard.load_state_dict(state["guard"])
            if stepper.scaler.is_enabled() and state.get("scaler"):
                stepper.scaler.load_state_dict(state["scaler"])
            self.step, self.best_mean_iou = checkpoint.step, state["best_mean_iou"]
            self.scores = tuple(Score(**values) for values in state.get("scores", ()))
            self.evaluation_pending = state.get("evaluation_pending", False)
            self.bad_samples = set(state.get("bad_samples", ()))
            self._restore_generators(state["generators"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                "E-RUN-016",
                f"the checkpoint does not fit the recipe: {' '.join(str(error).split())[:300]}",
                fix="resume with a recipe of the same network, optimizer and average",
                path=self.folder,
            ) from error

    def _restore_generators(self, generators: list[dict[str, Any]]) -> None:
        # with another number of ranks, only the draws of dropout are others
        if len(generators) == self.fabric.world_size:
            mine = generators[self.fabric.global_rank]
            torch.set_rng_state(mine["cpu"])
            if self.fabric.device.type == "cuda" and mine["cuda"] is not None:
                torch.cuda.set_rng_state(mine["cuda"], self.fabric.device)


def open_job(recipe: Recipe, data_root: Path | None, *, run: Path | None, device: str, resume: bool = False) -> Job:
    """Make everything of a run, so that all that can be refused is refused before a folder is claimed.

    Args:
        recipe: What to train.
        data_root: Folder of the data set in its official layout; None for one that needs no files.
        run: The run folder, which is not touched here; None for a run that writes nothing.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        resume: Leave the first weights random, since `Job.restore` follows.

    Raises:
        RunError: If the device is not there.
        DataError: For wrong data, with the file; for a batch that the devices cannot share.
        RecipeError: For augmentation or a schedule that make no sense.
        ModelError: For a network that cannot be trained like this.
        WeightsError: For a pretrained file that does not fit.

    Warns:
        BatchNormWarning: For two images a device with a branch pooled to one pixel.
    """
    fabric = launch(device)
    dataset = build_dataset(recipe, data_root, split=recipe.data.train_split)
    # opened before the first step, so that a missing split is found now and not after hours
    eval_set = build_dataset(recipe, data_root, split=recipe.data.eval_split) if recipe.evaluation.every_steps else None
    plan = build_plan(recipe, dataset)
    recipe = fill_class_weights(recipe, dataset)
    recipe = fill_max_steps(recipe, steps_per_epoch=plan.steps_per_epoch)
    scheduled_lr(recipe, step=0)
    torch.manual_seed(recipe.seed)
    segmenter = build_model(recipe)
    start = None if resume else initialise_model(segmenter, recipe)
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        convert_sync_batch_norm(segmenter)
    segmenter.check_batch_size(part_size(recipe, plan, world_size=fabric.world_size))
    transform = build_transform(recipe, dataset)
    _try_sample(dataset, transform, seed=recipe.seed, skip=recipe.data.bad_samples == "skip")
    stepper = build_stepper(fabric, recipe, segmenter)
    # dropout draws from torch's generator, each rank from its own stream
    torch.manual_seed(int(np.random.SeedSequence((recipe.seed, fabric.global_rank)).generate_state(1)[0]))
    return Job(
        fabric=fabric,
        recipe=recipe,
        folder=run,
        start=start,
        stepper=stepper,
        segmenter=segmenter,
        dataset=dataset,
        transform=transform,
        eval_set=eval_set,
        plan=plan,
        environment=describe_environment(dataset, device=fabric.device, world_size=fabric.world_size),
    )


def _try_sample(dataset: SegmentationDataset, transform: TrainTransform, *, seed: int, skip: bool) -> None:
    """Read one sample, which shows whether pictures are of the recipe's type; with ``skip``, one that can be read."""
    for index in range(len(dataset)):
        try:
            transform(dataset.read(index), sample_generator(seed, 0, index))
        except DataError:
            if not skip or index == len(dataset) - 1:
                raise
        else:
            return


def build_stepper(fabric: Fabric, recipe: Recipe, segmenter: Segmenter) -> Stepper:
    """Set a network up for training as its recipe says, on the device of this process."""
    compute = recipe.compute
    if compute.channels_last:
        segmenter.to(memory_format=torch.channels_last)
    if compute.activation_checkpointing:
        segmenter.backbone.checkpoint_activations()
    # Fabric takes the compiled form apart and compiles what it makes of the network
    model = fabric.setup_module(cast(Segmenter, torch.compile(segmenter)) if compute.compile else segmenter)
    optimizer = build_optimizer(recipe, segmenter, device=fabric.device)
    fill_momentum(optimizer)
    half = compute.precision == "float16"
    return Stepper(
        fabric=fabric,
        segmenter=segmenter,
        model=model,
        optimizer=optimizer,
        criterion=build_criterion(recipe, device=fabric.device),
        guard=Guard(
            segmenter,
            max_bad_steps=recipe.guard.max_bad_steps,
            spike_factor=recipe.guard.spike_factor,
            half_precision=half,
        ),
        average=build_average(recipe, segmenter),
        scaler=torch.amp.GradScaler(fabric.device.type, enabled=half),
        precision=compute.precision,
        accumulate_steps=compute.accumulate_steps,
        clip_norm=recipe.optimizer.clip_norm,
    )


def part_size(recipe: Recipe, plan: BatchPlan, *, world_size: int) -> int:
    """Return how many images a device runs at once."""
    share, parts = plan.share(world_size), recipe.compute.accumulate_steps
    if share % parts:
        raise RecipeError(
            "E-RECIPE-090",
            f"compute.accumulate_steps {parts} parts of {share} images a device",
            fix=f"choose a divisor of {share}",
            path="compute.accumulate_steps",
        )
    return share // parts


def fill_max_steps(recipe: Recipe, *, steps_per_epoch: int) -> Recipe:
    """Return the recipe with ``schedule.max_steps`` decided: as given, or from the epochs."""
    if recipe.schedule.max_steps is not None:
        return recipe
    schedule = recipe.schedule.model_copy(update={"max_steps": recipe.schedule.epochs * steps_per_epoch})
    return recipe.model_copy(update={"schedule": schedule})


def scheduled_lr(recipe: Recipe, *, step: int) -> float:
    """Return the learning rate of a step, from 0, of a recipe whose ``schedule.max_steps`` is filled.

    Raises:
        RecipeError: If the schedule makes no sense, see `learning_rate`.
    """
    schedule = recipe.schedule
    assert schedule.max_steps is not None, "fill_max_steps comes first"
    return learning_rate(
        step,
        name=schedule.name,
        lr=recipe.optimizer.lr,
        min_lr=schedule.min_lr,
        power=schedule.power,
        max_steps=schedule.max_steps,
        warmup_steps=schedule.warmup_steps,
    )


def _tensors(value: Any) -> Sequence[Tensor]:
    """Collect the tensors of nested plain values."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in _tensors(inner)]
    return [tensor for inner in value for tensor in _tensors(inner)] if isinstance(value, list | tuple) else []
