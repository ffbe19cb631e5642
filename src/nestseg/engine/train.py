"""The training loop: a recipe and a data folder in, a run folder out.

A run folder holds ``recipe.yaml`` (resolved), ``log.jsonl``, ``checkpoints/``, ``model.safetensors`` (the last model),
``best.safetensors`` (the best evaluated one) and ``evaluation/``. A resumed run continues with the same bits.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from nestseg.build import BEST_FILE, build_predictor, describe_model
from nestseg.core.disk import replaced_file
from nestseg.core.dist import copy_from_first_rank, gather_from_ranks, max_over_ranks
from nestseg.core.errors import NestsegError, RunError, WeightsError
from nestseg.data.loader import training_batches
from nestseg.data.packed import PackedDataset
from nestseg.engine.checkpoint import checkpoint_folder, clean_up, list_checkpoints
from nestseg.engine.determinism import use_deterministic_kernels
from nestseg.engine.evaluate import Evaluation, EvaluationStopped, evaluate
from nestseg.engine.evaluation_files import write_metrics
from nestseg.engine.job import Job, ResumeWarning, open_job, scheduled_lr
from nestseg.engine.lock import RunLock
from nestseg.engine.log import Meter, RunLog, describe_wait
from nestseg.engine.memory import fit_accumulation, is_out_of_memory, out_of_memory_error
from nestseg.engine.ranks import heartbeat, rank_errors
from nestseg.engine.stop import RunPruned, RunStopped, StopRequest
from nestseg.engine.trackers import check_trackers
from nestseg.models.segmenter import count_parameters
from nestseg.recipe import Recipe
from nestseg.store.files import read_model_file, write_model_file
from nestseg.store.hub import MODEL_FILE
from nestseg.store.metadata import Score

RECIPE_FILE = "recipe.yaml"
MAX_FAILED_SAVES = 3
_WITHOUT_EFFECT = ("data.num_workers ", "data.worker_timeout ", "log.", "checkpoint.")
"""Fields that may be others at a resume: no weight depends on them."""

OnEvaluation = Callable[[int, float], bool]
"""Hears of each evaluation, step and mean IoU; true gives the run up, unless it is at its end anyway."""


class BadSampleWarning(UserWarning):
    """A sample could not be read, and the recipe lets another take its place."""

    of_one_rank = True


def train(
    recipe: Recipe,
    data_root: Path | None,
    *,
    run: Path,
    device: str = "auto",
    resume: bool = False,
    accept_changes: bool = False,
    strict_resume: bool = False,
    allow_fresh: bool = False,
    auto_accumulate: bool = False,
    notes: Sequence[str] = (),
    on_evaluation: OnEvaluation | None = None,
) -> Path:
    """Train a recipe to its end.

    SIGTERM, SIGINT and SIGUSR1 stop the run at a checkpoint after the step that is being taken; a second one ends the
    process at once.

    Args:
        recipe: What to train. ``schedule.max_steps`` null is filled from the epochs and the number of images.
        data_root: Folder of the data set in its official layout; None for one that needs no files.
        run: The run folder; must not hold a run yet, unless it is resumed.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        resume: Continue the run in this folder from its newest good checkpoint. A finished run is left as it is.
        accept_changes: With ``resume``: go on with this recipe even if the run's was another.
        strict_resume: With ``resume``: refuse to go on under other conditions (versions, data, devices, threads).
        allow_fresh: With ``resume``: start from the beginning where the folder has no checkpoint at all.
        auto_accumulate: Raise ``compute.accumulate_steps`` until a step fits into memory.
        notes: Written into ``recipe.yaml`` as comments: why values are what they are.
        on_evaluation: Called after each evaluation, before the checkpoint of that step, on every rank.

    Returns:
        The last model's file.

    Raises:
        RunStopped: If a signal asked for it; the checkpoint is written.
        RunPruned: If ``on_evaluation`` asked for it.
        RunError: If the folder is taken or locked, there is nothing to resume, the recipe is another than the run's,
            numbers are not finite for too long, memory does not suffice, or checkpoints cannot be written.
        DataError: For wrong data, with the file; for a batch that the devices cannot share.
        RecipeError: For augmentation or a schedule that make no sense.
        ModelError: For a network that cannot be trained like this.
        WeightsError: For a pretrained file that does not fit.
        OSError: If the run folder cannot be written.

    Warns:
        BatchNormWarning: For two images a device with a branch pooled to one pixel.
        SmallDatasetWarning: If the data set is smaller than a batch.
        ResumeWarning: If a run continues under other conditions.
    """
    resume = resume and not (allow_fresh and not _holds_run(run))
    with ExitStack() as stack:
        stop = stack.enter_context(StopRequest())
        stack.enter_context(rank_errors())
        check_trackers(recipe.log.trackers)
        if recipe.compute.deterministic:
            stack.enter_context(use_deterministic_kernels())
        if resume and auto_accumulate:
            recipe = _keep_accumulation(recipe, run)
        job = open_job(recipe, data_root, run=run, device=device, resume=resume)
        if auto_accumulate and not resume:
            fit_accumulation(job)
        changes: list[str] = []
        if job.fabric.is_global_zero:
            if not resume:
                run.mkdir(parents=True, exist_ok=True)
            if run.is_dir():
                stack.enter_context(RunLock(run))
            changes = check_run(run, job.recipe, resume=resume, accept_changes=accept_changes, allow_fresh=allow_fresh)
            clean_up(run)
        changes = gather_from_ranks(changes)[0]
        if resume and _is_finished(job):
            if changes:
                warnings.warn(f"{run} is finished; its recipe stays as it was", ResumeWarning, stacklevel=2)
            return run / MODEL_FILE
        if resume:
            job.restore(strict=strict_resume)
            _adapt(job, changes)
        else:
            # the recipe comes after the checkpoint: a folder with a recipe can be resumed, one without be used anew
            job.save()
        if job.fabric.is_global_zero and (changes or not resume):
            _write_recipe(run, job.recipe, notes)
        log = stack.enter_context(_open_log(job))
        if resume:
            log.record("resume", step=job.step, changes=changes)
        _train(job, log, stop, on_evaluation)
        job.fabric.barrier()
    return run / MODEL_FILE


def _keep_accumulation(recipe: Recipe, run: Path) -> Recipe:
    """Return the recipe with the parts of a step that were found when the run began."""
    if not (run / RECIPE_FILE).is_file():
        return recipe  # check_run will say so
    parts = Recipe.read(run / RECIPE_FILE).compute.accumulate_steps
    return recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"accumulate_steps": parts})})


def _adapt(job: Job, changes: Sequence[str]) -> None:
    """Drop what a changed recipe makes of no use.

    Raises:
        RunError: E-RUN-009, if the run is to be shorter than it is.
    """
    if job.step > job.max_steps:
        raise RunError(
            "E-RUN-009",
            f"the checkpoint is of step {job.step}, the run is to have {job.max_steps}",
            fix="raise schedule.max_steps, or delete newer checkpoints to go on from an older one",
            path=job.folder,
        )
    if not select_weighty(changes):
        return
    # scores of another recipe are not this one's
    job.scores = ()
    if any(change.startswith(("evaluation.", "data.eval_split ")) for change in changes):
        job.best_mean_iou = -1.0
    job.evaluation_pending = job.eval_set is not None and (job.evaluation_pending or job.step == job.max_steps)


def _holds_run(run: Path) -> bool:
    return (run / RECIPE_FILE).is_file() and bool(list_checkpoints(run))


def _is_finished(job: Job) -> bool:
    assert job.folder is not None, "a run that is trained has a folder"
    try:
        return read_model_file(job.folder / MODEL_FILE)[1].step == job.max_steps
    except WeightsError:  # not there, or damaged: it will be written again
        return False


def check_run(
    run: Path, recipe: Recipe, *, resume: bool, accept_changes: bool = False, allow_fresh: bool = False
) -> list[str]:
    """See that a run folder is free, or that it holds the run to resume.

    Args:
        run: The run folder.
        recipe: What is to be trained.
        resume: Whether a run is to be continued.
        accept_changes: Let the recipe be another than the run's.
        allow_fresh: Take a folder with a recipe but without any checkpoint.

    Returns:
        What is another in this recipe than in the run's.

    Raises:
        RunError: If it is taken, holds no run to resume, or one of another recipe.
    """
    file = run / RECIPE_FILE
    if not resume:
        # a kill between the first checkpoint and the recipe leaves step 0 alone
        begun = [folder for folder in list_checkpoints(run) if folder != checkpoint_folder(run, 0)]
        if begun or (file.exists() and not (allow_fresh and not list_checkpoints(run))):
            raise RunError(
                "E-RUN-004",
                "already holds a run",
                fix="continue it with --resume, or choose another folder",
                path=run,
            )
        return []
    if not file.is_file():
        raise RunError(
            "E-RUN-005",
            f"no run to resume: {RECIPE_FILE} is missing",
            fix="leave out --resume, or add --allow-fresh to begin where nothing was begun",
            path=run,
        )
    saved = Recipe.read(file)
    if saved == recipe:
        return []
    changes = list(_differences(saved.model_dump(mode="json"), recipe.model_dump(mode="json")))
    weighty = select_weighty(changes)
    if weighty and not accept_changes:
        raise RunError(
            "E-RUN-006",
            f"the run's recipe is another: {', '.join(weighty)}",
            fix=f"resume with the run's own recipe: nestseg train {file} --data ROOT --run {run} --resume; or go on "
            "with this one by --accept-changes",
            path=run,
        )
    before, now = (
        {"name": one.name, "options": one.options, "momentum above 0": one.momentum > 0}
        for one in (saved.optimizer, recipe.optimizer)
    )
    if before != now:
        raise RunError(
            "E-RUN-008",
            f"the run's optimizer is {before}, whose state that of {now} cannot take over",
            fix=f"keep optimizer.name, options and whether there is momentum, or begin a new run with --init {run}",
            path=run,
        )
    return changes


def select_weighty(changes: Sequence[str]) -> list[str]:
    """Return those changes of a recipe that weights depend on."""
    return [change for change in changes if not change.startswith(_WITHOUT_EFFECT)]


def _differences(saved: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    changes = []
    for name, value in saved.items():
        other = given[name]
        if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
            changes += _differences(value, other, f"{prefix}{name}.")
        elif value != other:
            changes.append(f"{prefix}{name} was {value}, now {other}")
    return changes


def _write_recipe(run: Path, recipe: Recipe, notes: Sequence[str]) -> None:
    with replaced_file(run / RECIPE_FILE) as temporary:
        comments = "".join(f"# {note}\n" for note in notes)
        temporary.write_text(comments + recipe.to_yaml(), encoding="utf-8")


def _open_log(job: Job) -> RunLog:
    first = job.fabric.is_global_zero
    return RunLog(
        job.folder if first else None,
        max_steps=job.max_steps,
        start=job.step,
        silent=not first,
        trackers=job.recipe.log.trackers if first else (),
        settings=job.recipe.model_dump(mode="json"),
        name=job.recipe.name,
        judge_wait=partial(
            describe_wait,
            num_workers=job.recipe.data.num_workers,
            cores=os.cpu_count() or 1,
            packed=isinstance(job.dataset, PackedDataset),
        ),
    )


def _train(job: Job, log: RunLog, stop: StopRequest, on_evaluation: OnEvaluation | None) -> None:
    """Take the steps that are left, and write the last model."""
    recipe, fabric, guard = job.recipe, job.fabric, job.stepper.guard
    _announce(job, log)
    meter = Meter(step=job.step, max_steps=job.max_steps, batch_size=recipe.data.batch_size, device=fabric.device)
    if job.evaluation_pending and job.eval_set is not None:
        _evaluate(job, log, stop, on_evaluation)
    batches = training_batches(
        job.dataset,
        job.transform,
        plan=job.plan,
        start=job.step,
        stop=job.max_steps,
        num_workers=recipe.data.num_workers,
        rank=fabric.global_rank,
        world_size=fabric.world_size,
        pin_memory=fabric.device.type == "cuda",
        timeout=recipe.data.worker_timeout,
        bad_samples=recipe.data.bad_samples,
        known_bad=job.bad_samples,
        on_replaced=_replaced(job, log),
        # a hung worker must not keep a signal waiting; of several ranks the others would wait in the next exchange
        should_stop=lambda: fabric.world_size == 1 and bool(stop.signum),
    )
    job.stepper.model.train()
    with closing(batches):
        while job.step < job.max_steps:
            _stop_if_asked(job, log, stop)
            with meter.waiting():
                batch = next(batches, None)
                if batch is None:
                    _stop_if_asked(job, log, stop)
                    raise AssertionError("batches end before the run without a signal")
                batch = fabric.to_device(batch)
            heartbeat(job.step + 1)
            lr = scheduled_lr(recipe, step=job.step)
            with _logged_bad_steps(job, log):
                job.stepper.step(batch, step=job.step + 1, lr=lr)
            job.step += 1
            meter.count()
            if job.due(recipe.log.every_steps):
                with _logged_bad_steps(job, log):
                    log.step(meter.read(lr=lr, loss=guard.take_mean_loss()))
            if job.due(recipe.evaluation.every_steps):
                with meter.paused("evaluation", every_steps=recipe.evaluation.every_steps):
                    _evaluate(job, log, stop, on_evaluation)
            if job.due(recipe.checkpoint.every_steps):
                with meter.paused("checkpoint", every_steps=recipe.checkpoint.every_steps):
                    _save(job, log)
    if fabric.is_global_zero:
        # it was evaluated at this step, if at all
        metadata = describe_model(recipe, step=job.step, scores=job.scores if job.eval_set else ())
        assert job.folder is not None, "a run that is trained has a folder"
        write_model_file(job.folder / MODEL_FILE, job.model_state(), metadata)
    log.record("end", step=job.step, best_mean_iou=job.best_mean_iou if job.eval_set else None)


def _announce(job: Job, log: RunLog) -> None:
    recipe, parameters = job.recipe, count_parameters(job.segmenter)
    log.record(
        "start",
        step=job.step,
        recipe=recipe.name,
        recipe_digest=recipe.digest(),
        parameters=parameters,
        images=len(job.dataset),
        steps_per_epoch=job.plan.steps_per_epoch,
        environment=job.environment,
    )
    log.say(
        f"{recipe.name}: {parameters / 1e6:.2f} M parameters, {len(job.dataset)} images, steps {job.step} to "
        f"{job.max_steps} of {recipe.data.batch_size} on {job.environment['device']}"
    )
    if job.start is not None:
        log.record("init", step=job.step, description=job.start)
        log.say(f"start: {job.start}")


def _stop_if_asked(job: Job, log: RunLog, stop: StopRequest) -> None:
    """Write a checkpoint and raise, on all ranks alike, if a signal came to one of them."""
    if not max_over_ranks(stop.signum):
        return
    if job.saved_step != job.step or job.evaluation_pending:
        with _logged_bad_steps(job, log):
            job.save()
    log.record("stop", step=job.step, signal=stop.signum)
    assert job.folder is not None, "a run that is trained has a folder"
    raise RunStopped(job.folder, step=job.step, signum=stop.signum)


def _save(job: Job, log: RunLog) -> None:
    """Write a checkpoint; a disk that is full or fails stops the run only after some times in a row."""
    try:
        with _logged_bad_steps(job, log):
            job.save()
        job.failed_saves = 0
    except RunError as error:
        if error.code != "E-RUN-012":
            raise
        job.failed_saves += 1
        log.record("checkpoint_failed", step=job.step, error=str(error))
        log.say(f"error: {error}")
        if job.failed_saves >= MAX_FAILED_SAVES:
            raise


def _replaced(job: Job, log: RunLog) -> Callable[[str, NestsegError], None]:
    def note(name: str, error: NestsegError) -> None:
        job.bad_samples.add(name)
        log.record("bad_sample", step=job.step, sample=name, error=str(error))
        # not through the log, which shows what the first rank meets
        warnings.warn(f"{name} was replaced by another sample: {error}", BadSampleWarning, stacklevel=2)

    return note


@contextmanager
def _logged_bad_steps(job: Job, log: RunLog) -> Iterator[None]:
    """Log the steps that turn out inside not to have been taken, also if they end the run.

    Raises:
        RunError: E-RUN-023, in place of torch's own error, if memory does not suffice.
    """
    try:
        yield
    except RuntimeError as error:
        # of one rank alone, perhaps: nothing is exchanged with the others
        if is_out_of_memory(error):
            raise out_of_memory_error(job) from error
        raise
    except NestsegError:
        _log_bad_steps(job, log)
        raise
    else:
        _log_bad_steps(job, log)


def _log_bad_steps(job: Job, log: RunLog) -> None:
    bad_steps = job.stepper.guard.take_bad_steps()
    if not bad_steps:
        return
    # ranks judge alike, so that all are here
    by_rank = gather_from_ranks([bad.sample_index for bad in bad_steps])
    for bad, *indices in zip(bad_steps, *by_rank, strict=True):
        names = [job.dataset.name(index) for rank in indices for index in rank]
        log.record(
            "bad_step",
            step=bad.step,
            loss=bad.loss,
            gradient_norm=bad.gradient_norm,
            reason=bad.reason,
            samples=names,
        )
        log.say(f"warning: step {bad.step} was not taken: {bad.reason}, samples {', '.join(names)}")


def _evaluate(job: Job, log: RunLog, stop: StopRequest, on_evaluation: OnEvaluation | None) -> None:
    """Score the model, keep it if it is the best; stop at a checkpoint if a signal comes meanwhile."""
    assert job.eval_set is not None, "a run without evaluations has none due"
    recipe, started, average = job.recipe, time.perf_counter(), job.stepper.average
    metadata = describe_model(recipe, step=job.step)
    job.evaluation_pending = True
    try:
        with nullcontext() if average is None else average.applied_to(job.segmenter):
            # without SyncBatchNorm each rank has its own statistics until the next step; the first rank's are saved
            copy_from_first_rank(job.segmenter.buffers())
            result = evaluate(
                build_predictor(job.segmenter, metadata),
                job.eval_set,
                split=recipe.data.eval_split,
                max_images=recipe.evaluation.max_images,
                rank=job.fabric.global_rank,
                world_size=job.fabric.world_size,
                with_loss=True,
                stop=lambda: bool(max_over_ranks(stop.signum)),
            )
    except EvaluationStopped:
        _stop_if_asked(job, log, stop)
        raise
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory_error(job, evaluating=True) from error
        raise
    finally:
        job.stepper.model.train()
    job.evaluation_pending = False
    scores = result.scores
    job.scores = (
        Score(
            dataset=result.dataset,
            split=result.split,
            mean_iou=scores.mean_iou,
            num_images=result.num_images,
            protocol=result.protocol,
        ),
    )
    best, before = scores.mean_iou > job.best_mean_iou, job.best_mean_iou
    job.best_mean_iou = max(job.best_mean_iou, scores.mean_iou)
    log.record(
        "evaluation",
        step=job.step,
        mean_iou=scores.mean_iou,
        loss=result.loss,
        pixel_accuracy=scores.pixel_accuracy,
        iou_per_class=dict(zip(result.classes, scores.iou_per_class, strict=True)),
        num_images=result.num_images,
        seconds=round(time.perf_counter() - started, 3),
    )
    log.say(
        f"step {job.step}: {recipe.data.eval_split} mIoU {100 * scores.mean_iou:.2f} %, "
        f"pixel accuracy {100 * scores.pixel_accuracy:.2f} %, {result.num_images} images{' (best)' if best else ''}"
    )
    kept = _keep_result(job, log, result, best=best) if job.fabric.is_global_zero else True
    if best and not gather_from_ranks(kept)[0]:
        # the file still holds the one before; the next that is better than that takes its place
        job.best_mean_iou = before
    # all ranks ask, and give up together
    if on_evaluation is not None and max_over_ranks(on_evaluation(job.step, scores.mean_iou)):
        _give_up(job, log)


def _give_up(job: Job, log: RunLog) -> None:
    """End a run that is not at its end anyway."""
    if job.step == job.max_steps:
        return
    log.record("pruned", step=job.step, best_mean_iou=job.best_mean_iou)
    assert job.folder is not None, "a run that is trained has a folder"
    raise RunPruned(job.folder, step=job.step)


def _keep_result(job: Job, log: RunLog, result: Evaluation, *, best: bool) -> bool:
    """Write the model if it is the best, and the scores; a full disk does not stop the run.

    Returns:
        Whether the model could be written.
    """
    assert job.folder is not None, "a run that is trained has a folder"
    folder, metadata = job.folder, describe_model(job.recipe, step=job.step, scores=job.scores)
    context = {"model": f"step {job.step} of {job.recipe.name}", "step": job.step, "versions": metadata.versions}
    kept = not best or _write(job, log, lambda: write_model_file(folder / BEST_FILE, job.model_state(), metadata))
    _write(job, log, lambda: write_metrics(result, folder / "evaluation", context=context))
    return kept


def _write(job: Job, log: RunLog, write: Callable[[], object]) -> bool:
    """Write a file of an evaluation; say it if that fails, and return whether it did not."""
    try:
        write()
    except (OSError, NestsegError) as error:
        failure = RunError(
            "E-RUN-018",
            f"the evaluation of step {job.step} cannot be written: "
            f"{error.reason if isinstance(error, NestsegError) else error}",
            fix="free space on the disk; training goes on",
            path=job.folder,
        )
        log.record("write_failed", step=job.step, error=str(failure))
        log.say(f"error: {failure}")
        return False
    return True
