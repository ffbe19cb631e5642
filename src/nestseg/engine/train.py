"""The training loop: a recipe and a data folder in, a run folder out.

A run folder holds ``recipe.yaml`` (resolved), ``log.jsonl``, ``checkpoints/``, ``model.safetensors`` (the last model),
``best.safetensors`` (the best evaluated one) and ``evaluation/``. A resumed run continues with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import nn

from nestseg.build import (
    BEST_FILE,
    build_dataset,
    build_model,
    build_optimizer,
    build_plan,
    build_predictor,
    build_transform,
    describe_model,
    fill_class_weights,
    initialise_model,
    versions,
)
from nestseg.core.disk import replaced_file
from nestseg.core.dist import copy_from_first_rank
from nestseg.core.errors import RunError
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.loader import BatchPlan, training_batches
from nestseg.data.transforms import TrainTransform, sample_generator
from nestseg.engine.checkpoint import load_latest, save_checkpoint
from nestseg.engine.evaluate import evaluate, write_metrics
from nestseg.engine.launch import launch
from nestseg.engine.log import Meter, RunLog
from nestseg.engine.step import train_step
from nestseg.models.segmenter import Segmenter, count_parameters
from nestseg.models.timm_backbone import convert_sync_batch_norm
from nestseg.optim import poly_lr
from nestseg.recipe import Recipe
from nestseg.store.files import write_model_file
from nestseg.store.hub import MODEL_FILE
from nestseg.store.metadata import Score

RECIPE_FILE = "recipe.yaml"


def train(
    recipe: Recipe,
    data_root: Path | None,
    *,
    run: Path,
    device: str = "auto",
    resume: bool = False,
    notes: Sequence[str] = (),
) -> Path:
    """Train a recipe to its end.

    Args:
        recipe: What to train. ``schedule.max_steps`` null is filled from the epochs and the number of images.
        data_root: Folder of the data set in its official layout; None for one that needs no files.
        run: The run folder; must not hold a run yet, unless it is resumed.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        resume: Continue the run in this folder from its newest good checkpoint. A finished run is left as it is.
        notes: Written into ``recipe.yaml`` as comments: why values are what they are.

    Returns:
        The last model's file.

    Raises:
        RunError: If the folder is taken, there is nothing to resume, the recipe is another than the run's, or the loss
            is no longer finite.
        DataError: For wrong data, with the file; for a batch that the devices cannot share.
        RecipeError: For augmentation or a schedule that make no sense.
        ModelError: For a network that cannot be trained like this.
        WeightsError: For a pretrained file that does not fit.
        OSError: If the run folder cannot be written.

    Warns:
        BatchNormWarning: For two images a device with a branch pooled to one pixel.
        SmallDatasetWarning: If the data set is smaller than a batch.
    """
    fabric = launch(device)
    dataset = build_dataset(recipe, data_root, split=recipe.data.train_split)
    # opened before the first step, so that a missing split is found now and not after hours
    eval_set = build_dataset(recipe, data_root, split=recipe.data.eval_split) if recipe.evaluation.every_steps else None
    plan = build_plan(recipe, dataset)
    recipe = fill_class_weights(recipe, dataset)
    recipe = fill_max_steps(recipe, steps_per_epoch=plan.steps_per_epoch)
    torch.manual_seed(recipe.seed)
    segmenter = build_model(recipe)
    start = None if resume else initialise_model(segmenter, recipe)
    if fabric.world_size > 1 and fabric.device.type == "cuda":
        convert_sync_batch_norm(segmenter)
    # all that can be refused is refused before the folder is claimed
    segmenter.check_batch_size(plan.share(fabric.world_size))
    transform = build_transform(recipe, dataset)
    # one sample shows whether pictures are of the recipe's type
    transform(dataset.read(0), sample_generator(recipe.seed, 0, 0))
    plain_optimizer = build_optimizer(recipe, segmenter)
    scheduled_lr(recipe, step=0)
    if fabric.is_global_zero:
        check_run(run, recipe, resume=resume)
    fabric.barrier()
    if resume and (run / MODEL_FILE).is_file():
        return run / MODEL_FILE

    model, optimizer = fabric.setup(segmenter, plain_optimizer)
    # dropout draws from torch's generator, each rank from its own stream
    torch.manual_seed(int(np.random.SeedSequence((recipe.seed, fabric.global_rank)).generate_state(1)[0]))
    job = _Job(
        fabric=fabric,
        recipe=recipe,
        folder=run,
        segmenter=segmenter,
        model=model,
        optimizer=optimizer,
        dataset=dataset,
        transform=transform,
        eval_set=eval_set,
        plan=plan,
    )
    if resume:
        job.restore()
    else:
        # the recipe comes after the checkpoint: a folder with a recipe can be resumed, one without can be used anew
        job.save()
        if fabric.is_global_zero:
            with replaced_file(run / RECIPE_FILE) as temporary:
                comments = "".join(f"# {note}\n" for note in notes)
                temporary.write_text(comments + recipe.to_yaml(), encoding="utf-8")
    with RunLog(
        run if fabric.is_global_zero else None,
        max_steps=job.max_steps,
        start=job.step,
        silent=not fabric.is_global_zero,
    ) as log:
        if start is not None:
            log.record("init", step=0, description=start)
            log.say(f"start: {start}")
        job.run(log)
    fabric.barrier()
    return run / MODEL_FILE


def fill_max_steps(recipe: Recipe, *, steps_per_epoch: int) -> Recipe:
    """Return the recipe with ``schedule.max_steps`` decided: as given, or from the epochs."""
    if recipe.schedule.max_steps is not None:
        return recipe
    schedule = recipe.schedule.model_copy(update={"max_steps": recipe.schedule.epochs * steps_per_epoch})
    return recipe.model_copy(update={"schedule": schedule})


def scheduled_lr(recipe: Recipe, *, step: int) -> float:
    """Return the learning rate of a step, from 0, of a recipe whose ``schedule.max_steps`` is filled.

    Raises:
        RecipeError: If the schedule makes no sense, see `poly_lr`.
    """
    schedule = recipe.schedule
    assert schedule.max_steps is not None, "fill_max_steps comes first"
    return poly_lr(
        step,
        lr=recipe.optimizer.lr,
        min_lr=schedule.min_lr,
        power=schedule.power,
        max_steps=schedule.max_steps,
        warmup_steps=schedule.warmup_steps,
    )


def check_run(run: Path, recipe: Recipe, *, resume: bool) -> None:
    """Make a run folder and see that it is free, or that it holds the run to resume.

    Raises:
        RunError: If it is taken, holds no run to resume, or one of another recipe.
        OSError: If it cannot be made.
    """
    file = run / RECIPE_FILE
    if not resume:
        if file.exists():
            raise RunError(
                "E-RUN-004",
                "already holds a run",
                fix="continue it with --resume, or choose another folder",
                path=run,
            )
        run.mkdir(parents=True, exist_ok=True)
        return
    if not file.is_file():
        raise RunError("E-RUN-005", f"no run to resume: {RECIPE_FILE} is missing", fix="leave out --resume", path=run)
    saved = Recipe.read(file)
    if saved != recipe:
        changes = ", ".join(_differences(saved.model_dump(mode="json"), recipe.model_dump(mode="json")))
        raise RunError(
            "E-RUN-006",
            f"the run's recipe is another: {changes}",
            fix=f"resume with the run's own recipe: nestseg train {file} --data ROOT --run {run} --resume",
            path=run,
        )


def _differences(saved: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for name, value in saved.items():
        other = given[name]
        if isinstance(value, dict) and isinstance(other, dict):
            changes += _differences(value, other, f"{prefix}{name}.")
        elif value != other:
            changes.append(f"{prefix}{name} was {value}, now {other}")
    return changes


@final
@dataclass(slots=True, kw_only=True)
class _Job:
    """A run in progress. A resume needs ``step``, ``best_mean_iou``, ``scores``, model, optimizer and random state."""

    fabric: Fabric
    recipe: Recipe
    folder: Path
    segmenter: Segmenter
    model: nn.Module
    """The segmenter as Fabric runs it."""
    optimizer: torch.optim.Optimizer
    dataset: SegmentationDataset
    transform: TrainTransform
    eval_set: SegmentationDataset | None
    plan: BatchPlan
    step: int = 0
    best_mean_iou: float = -1.0
    scores: tuple[Score, ...] = ()
    """The newest evaluation."""

    @property
    def max_steps(self) -> int:
        assert self.recipe.schedule.max_steps is not None, "fill_max_steps comes first"
        return self.recipe.schedule.max_steps

    def run(self, log: RunLog) -> None:
        recipe, fabric = self.recipe, self.fabric
        parameters = count_parameters(self.segmenter)
        log.record(
            "start",
            step=self.step,
            recipe=recipe.name,
            recipe_digest=recipe.digest(),
            parameters=parameters,
            images=len(self.dataset),
            steps_per_epoch=self.plan.steps_per_epoch,
            device=str(fabric.device),
            world_size=fabric.world_size,
            threads=torch.get_num_threads(),
            versions=versions(),
        )
        log.say(
            f"{recipe.name}: {parameters / 1e6:.2f} M parameters, {len(self.dataset)} images, steps {self.step} to "
            f"{self.max_steps} of {recipe.data.batch_size} on {fabric.device}"
        )
        batches = training_batches(
            self.dataset,
            self.transform,
            plan=self.plan,
            start=self.step,
            stop=self.max_steps,
            num_workers=recipe.data.num_workers,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
            pin_memory=fabric.device.type == "cuda",
        )
        weights = recipe.loss.class_weights
        class_weights = None if isinstance(weights, str) else torch.tensor(weights, device=fabric.device)
        meter = Meter(step=self.step, max_steps=self.max_steps, batch_size=recipe.data.batch_size)
        self.model.train()
        while self.step < self.max_steps:
            with meter.waiting():
                batch = fabric.to_device(next(batches))
            lr = scheduled_lr(recipe, step=self.step)
            terms = train_step(
                fabric,
                self.model,
                self.optimizer,
                batch=batch,
                lr=lr,
                auxiliary_weight=recipe.auxiliary_head.loss_weight,
                class_weights=class_weights,
                align_corners=recipe.head.align_corners,
            )
            meter.add(terms.total)
            self.step += 1
            if self._due(recipe.log.every_steps):
                log.step(meter.read(lr=lr))
            if self._due(recipe.evaluation.every_steps):
                meter.check_finite()
                with meter.paused():
                    self._evaluate(log)
                self.model.train()
            if self._due(recipe.checkpoint.every_steps):
                meter.check_finite()
                with meter.paused():
                    self.save()
        if fabric.is_global_zero:
            # it was evaluated at this step, if at all
            metadata = describe_model(recipe, step=self.step, scores=self.scores)
            write_model_file(self.folder / MODEL_FILE, self.segmenter.state_dict(), metadata)
        log.record("end", step=self.step, best_mean_iou=self.best_mean_iou if self.eval_set else None)

    def _due(self, every_steps: int | None) -> bool:
        """Whether something that happens every so many steps, and at the end, happens now; None is never."""
        return every_steps is not None and (self.step % every_steps == 0 or self.step == self.max_steps)

    def _evaluate(self, log: RunLog) -> None:
        assert self.eval_set is not None
        recipe, started = self.recipe, time.perf_counter()
        metadata = describe_model(recipe, step=self.step)
        # without SyncBatchNorm each rank has its own statistics until the next step; the first rank's are what is saved
        copy_from_first_rank(self.segmenter.buffers())
        result = evaluate(
            build_predictor(self.segmenter, metadata),
            self.eval_set,
            split=recipe.data.eval_split,
            max_images=recipe.evaluation.max_images,
            rank=self.fabric.global_rank,
            world_size=self.fabric.world_size,
        )
        scores = result.scores
        self.scores = (
            Score(
                dataset=result.dataset,
                split=result.split,
                mean_iou=scores.mean_iou,
                num_images=result.num_images,
                protocol=result.protocol,
            ),
        )
        best = scores.mean_iou > self.best_mean_iou
        self.best_mean_iou = max(self.best_mean_iou, scores.mean_iou)
        log.record(
            "evaluation",
            step=self.step,
            mean_iou=scores.mean_iou,
            pixel_accuracy=scores.pixel_accuracy,
            iou_per_class=dict(zip(result.classes, scores.iou_per_class, strict=True)),
            num_images=result.num_images,
            seconds=round(time.perf_counter() - started, 3),
        )
        log.say(
            f"step {self.step}: {recipe.data.eval_split} mIoU {100 * scores.mean_iou:.2f} %, "
            f"pixel accuracy {100 * scores.pixel_accuracy:.2f} %, {result.num_images} images{' (best)' if best else ''}"
        )
        if not self.fabric.is_global_zero:
            return
        context = {
            "model": f"step {self.step} of {recipe.name}",
            "step": self.step,
            "versions": metadata.versions,
        }
        write_metrics(result, self.folder / "evaluation", context=context)
        if best:
            metadata = metadata.model_copy(update={"scores": self.scores})
            write_model_file(self.folder / BEST_FILE, self.segmenter.state_dict(), metadata)

    def save(self) -> None:
        """Write a checkpoint; the random state of every rank goes into it."""
        cuda = self.fabric.device.type == "cuda"
        generators: list[Any] = [
            {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.fabric.device) if cuda else None,
            }
        ]
        if self.fabric.world_size > 1:
            mine, generators = generators[0], [None] * self.fabric.world_size
            torch.distributed.all_gather_object(generators, mine)
        if self.fabric.is_global_zero:
            save_checkpoint(
                self.folder,
                self.segmenter.state_dict(),
                state={
                    "optimizer": self.optimizer.state_dict(),
                    "generators": generators,
                    "best_mean_iou": self.best_mean_iou,
                    "scores": [score.model_dump() for score in self.scores],
                },
                metadata=describe_model(self.recipe, step=self.step),
                keep=self.recipe.checkpoint.keep,
            )
        self.fabric.barrier()

    def restore(self) -> None:
        """Go on from the newest good checkpoint; with another number of ranks only dropout draws differ."""
        checkpoint = load_latest(self.folder)
        self.segmenter.load_state_dict(checkpoint.model)
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        self.step, self.best_mean_iou = checkpoint.step, checkpoint.state["best_mean_iou"]
        # checkpoints of runs that began before there were scores in model files have none
        self.scores = tuple(Score(**values) for values in checkpoint.state.get("scores", ()))
        generators = checkpoint.state["generators"]
        if len(generators) == self.fabric.world_size:
            mine = generators[self.fabric.global_rank]
            torch.set_rng_state(mine["cpu"])
            if self.fabric.device.type == "cuda" and mine["cuda"] is not None:
                torch.cuda.set_rng_state(mine["cuda"], self.fabric.device)
