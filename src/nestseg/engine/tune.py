"""Search over fields of a recipe: many runs, of which those without promise are given up early.

A study is a folder: ``study.yaml`` says what is searched, ``journal.jsonl`` is optuna's record of it, ``trial-0007`` is
an ordinary run folder, ``best.yaml`` the recipe with the best values. A study that was killed goes on: the trial that
was running is resumed from its checkpoint, and each trial's values depend only on the seed and the trials before.

optuna is an extra, ``pip install "nestseg[tune]"``.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, final, get_args

import numpy as np
import yaml

from nestseg.core.disk import replaced_file
from nestseg.core.errors import NestsegError, RecipeError, RunError, nearest
from nestseg.engine.checkpoint import checkpoint_folder
from nestseg.engine.lock import LOCK_FILE, RunLock
from nestseg.engine.stop import RunPruned, RunStopped, StopRequest
from nestseg.engine.trackers import flatten
from nestseg.engine.train import train as train_recipe
from nestseg.recipe import Recipe, known_fields, validate_recipe
from nestseg.recipes import change_recipe, shorten_recipe

try:
    import optuna
except ImportError as missing:
    raise RunError(
        "E-RUN-080", f"tune needs optuna, which cannot be imported: {missing}", fix='pip install "nestseg[tune]"'
    ) from missing

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import FrozenTrial, Trial, TrialState

STUDY_FILE = "study.yaml"
JOURNAL_FILE = "journal.jsonl"
BEST_FILE = "best.yaml"
MAX_FAILURES = 3
"""Trials in a row that may fail with one code before the study stops."""
MIN_TRIALS_FOR_IMPORTANCE = 10

Scale = Literal["log", "uniform", "int", "choice"]

_FORMS = "FIELD=log LOW HIGH, FIELD=uniform LOW HIGH, FIELD=int LOW HIGH or FIELD=choice A B ..."
_SCORED_BY = ("data.dataset", "data.spec", "data.eval_split", "evaluation")
_STATES: Mapping[TrialState, Literal["finished", "pruned", "failed", "running"]] = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}


class Axis(NamedTuple):
    """A field that is searched, and where."""

    field: str
    scale: Scale
    words: tuple[str, ...]
    """Low and high end, or the choices, as they were written."""

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Read one ``FIELD=SPEC`` of ``--space``.

        Raises:
            RecipeError: For another form, an unknown field, one that decides how trials are scored, or a range that
                is none.

        Example:
            >>> Axis.parse("optimizer.lr=log 0.001 0.1")
            Axis(field='optimizer.lr', scale='log', words=('0.001', '0.1'))
        """
        field, _, spec = text.partition("=")
        field = field.strip()
        scale, *words = spec.split() or [""]
        where = f"--space {text}"
        if scale not in get_args(Scale) or not words or (scale != "choice" and len(words) != 2):
            raise RecipeError("E-RECIPE-100", "not of a form that is known", fix=f"write {_FORMS}", path=where)
        fields = known_fields()
        if field not in fields:
            hint = nearest(field, fields)
            fix = hint if hint.startswith("did") else "see the fields with: nestseg recipes show NAME"
            raise RecipeError("E-RECIPE-101", f"unknown field {field}", fix=fix, path=where)
        if any(field == name or field.startswith(f"{name}.") for name in _SCORED_BY):
            raise RecipeError(
                "E-RECIPE-102",
                f"{field} decides what a score means, so that trials could not be compared",
                fix="search another field, and set this one for all trials with --set",
                path=where,
            )
        axis = cls(field, cast(Scale, scale), tuple(words))
        if scale != "choice":
            axis._check_range(where)
        return axis

    def _check_range(self, where: str) -> None:
        kind = int if self.scale == "int" else float
        try:
            low, high = map(kind, self.words)
            good = low < high and math.isfinite(high - low) and (self.scale != "log" or low > 0)
        except ValueError:
            good = False
        if not good:
            needs = {"int": "whole numbers, low < high", "log": "numbers, 0 < low < high"}
            raise RecipeError(
                "E-RECIPE-103",
                f"{' '.join(self.words)} is no range",
                fix=f"{self.scale} takes two {needs.get(self.scale, 'numbers, low < high')}",
                path=where,
            )

    def __str__(self) -> str:
        return f"{self.field}={self.scale} {' '.join(self.words)}"

    @property
    def distribution(self) -> BaseDistribution:
        """The same in optuna's words; a choice is drawn by its text, since it may be a list."""
        if self.scale == "choice":
            return CategoricalDistribution(self.words)
        low, high = map(float, self.words)
        if self.scale == "int":
            return IntDistribution(int(low), int(high))
        return FloatDistribution(low, high, log=self.scale == "log")

    def value_of(self, drawn: Any) -> Any:
        """Return the recipe's value for what optuna drew."""
        return yaml.safe_load(drawn) if self.scale == "choice" else drawn

    def drawn_for(self, value: Any) -> Any:
        """Return what optuna would have drawn for a value of the recipe; None if it is outside."""
        if self.scale == "choice":
            return next((word for word in self.words if yaml.safe_load(word) == value), None)
        low, high = map(float, self.words)
        return value if isinstance(value, int | float) and low <= value <= high else None

    def check(self, recipe: Recipe) -> None:
        """See that the recipe can have every choice, or either end of the range.

        Raises:
            RecipeError: If it cannot.
        """
        for word in self.words:
            change_recipe(recipe, {self.field: yaml.safe_load(word)}, source=f"--space {self}")


class TrialResult(NamedTuple):
    """A trial of a study."""

    number: int
    folder: Path
    state: Literal["finished", "pruned", "failed", "running"]
    mean_iou: float | None
    """The best of its evaluations; None before the first."""
    values: dict[str, Any]
    """What it had in the fields that are searched."""
    error: str | None
    """Why it failed."""


class StudyResult(NamedTuple):
    """A study so far."""

    folder: Path
    trials: tuple[TrialResult, ...]
    """By their mean IoU, the best first."""
    importance: dict[str, float] | None
    """Share of each field in what sets the better half of the finished trials apart, the largest first.

    None for fewer than `MIN_TRIALS_FOR_IMPORTANCE` of them, or where they are all alike.
    """

    @property
    def best(self) -> TrialResult | None:
        """The finished trial with the highest mean IoU."""
        return _best_of(self.trials)


class StudyStopped(Exception):  # noqa: N818  # nothing went wrong
    """A study stopped because a signal asked for it; the trial that was running has its checkpoint.

    Args:
        study: The study's folder.
        trial: Number of the trial that is resumed next.
    """

    def __init__(self, study: Path, *, trial: int) -> None:
        self.study, self.trial = study, trial
        super().__init__(f"stopped in trial {trial} of {study}; run the same command again to go on")


def default_space(recipe: Recipe) -> tuple[str, ...]:
    """Return what is searched where nobody says: learning rate, weight decay and dropout, about the recipe's values.

    Example:
        >>> from nestseg.recipes import named_recipe
        >>> default_space(named_recipe("demo"))
        ('optimizer.lr=log 0.0003 0.03', 'optimizer.weight_decay=log 0.001 0.1', 'head.dropout=uniform 0 0.5')
    """
    lr, weight_decay = recipe.optimizer.lr, recipe.optimizer.weight_decay
    space = [f"optimizer.lr=log {max(lr / 10, recipe.schedule.min_lr):g} {lr * 10:g}"]
    if weight_decay:
        space.append(f"optimizer.weight_decay=log {weight_decay / 10:g} {weight_decay * 10:g}")
    return (*space, "head.dropout=uniform 0 0.5")


def tune(
    recipe: Recipe,
    data_root: Path | None,
    *,
    study: Path,
    trials: int,
    space: Sequence[str] = (),
    max_steps: int | None = None,
    device: str = "auto",
    train: Callable[..., Path] = train_recipe,
    say: Callable[[str], None] = lambda line: None,
) -> StudyResult:
    """Search for values of a recipe's fields that give the best mean IoU on its ``data.eval_split``.

    The first trial has the recipe's own values where the space holds them. Once five are finished, one that is below
    their median at an evaluation is given up. SIGTERM, SIGINT and SIGUSR1 stop the study at a checkpoint.

    Args:
        recipe: What is trained; its seed is the search's too.
        data_root: Folder of the data set in its official layout; None for one that needs no files.
        study: Folder of the study: a new one, or one to go on with.
        trials: How many finished and pruned trials there shall be in all.
        space: What is searched, see `Axis.parse`; nothing means `default_space`.
        max_steps: Length of the trials; None for the recipe's own. ``best.yaml`` has the recipe's own in any case.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        train: Called as `nestseg.engine.train.train`.
        say: Shows a line about a trial.

    Returns:
        All trials of the study, also of earlier sessions.

    Raises:
        StudyStopped: If a signal asked for it.
        RecipeError: For a space that makes no sense, or a recipe without evaluations.
        RunError: If the folder is another study's, is damaged or in use; for trials that fail one after another.
        OSError: If the folder cannot be written.
    """
    short = recipe if max_steps is None else shorten_recipe(recipe, max_steps, source=f"--max-steps {max_steps}")
    axes = _read_space(space or default_space(short), short)
    study.mkdir(parents=True, exist_ok=True)
    with StopRequest() as stop, RunLock(study):
        _claim(study, short, axes)
        search = _Search(study, short, axes, _open_journal(study))
        if (never := _why_never_pruned(short)) is not None:
            say(never)
        failures: list[str] = []
        while (done := search.count_done()) < trials:
            trial = search.next_trial()
            if stop.signum:
                raise StudyStopped(study, trial=trial.number)
            say(f"trial {trial.number}, {done + 1} of {trials}: {_word_values(search.values_of(trial))}")
            error = search.run(trial, lambda chosen, **options: train(chosen, data_root, device=device, **options))
            say(_word_outcome(search.result_of(trial.number)))
            search.write_best(recipe)
            failures = [*failures, error.code][-MAX_FAILURES:] if error is not None else []
            if error is not None and failures == [error.code] * MAX_FAILURES:
                raise RunError(
                    "E-RUN-081",
                    f"{MAX_FAILURES} trials in a row failed, the last with {error.code}: {error.reason}",
                    fix=f"{error.fix}; or choose a narrower --space for a new study; the same command goes on",
                    path=study,
                ) from error
        return search.summarise()


def study_table(result: StudyResult) -> list[tuple[str, ...]]:
    """Return a study's trials as rows under a title, the best first."""
    fields = list(dict.fromkeys(field for trial in result.trials for field in trial.values))
    rows = [("TRIAL", "STATE", "MIOU %", *fields)]
    for trial in result.trials:
        score = "-" if trial.mean_iou is None else f"{100 * trial.mean_iou:.2f}"
        rows.append((trial.folder.name, trial.state, score, *(_word(trial.values[field]) for field in fields)))
    return rows


def study_notes(result: StudyResult, data_root: Path | None) -> list[str]:
    """Say what is to know beside a study's table: failures, importance, and how to train with the best values."""
    notes = [f"{trial.folder.name}: {trial.error}" for trial in result.trials if trial.error is not None]
    if result.importance is not None:
        shares = ", ".join(f"{field} {share:.0%}" for field, share in result.importance.items())
        notes.append(f"importance: {shares}")
    if result.best is not None:
        command = ["nestseg", "train", str(result.folder / BEST_FILE)]
        command += [] if data_root is None else ["--data", str(data_root)]
        notes.append(f"best: {result.best.folder}")
        notes.append(f"train it: {shlex.join([*command, '--run', str(result.folder / 'best')])}")
    return notes


@final
class _Search:
    """A study that is open: its trials, in optuna's journal and in their folders."""

    def __init__(self, folder: Path, recipe: Recipe, axes: Sequence[Axis], study: optuna.Study) -> None:
        self._folder, self._recipe, self._axes, self._study = folder, recipe, axes, study

    def count_done(self) -> int:
        return sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in self._trials())

    def next_trial(self) -> FrozenTrial:
        """Return the trial that was running when the study was left, or a new one."""
        if not self._running():
            # in one line of the journal, so that a kill leaves no trial with half of its values
            draws = self._draw()
            space = {axis.field: axis.distribution for axis in self._axes}
            trial = optuna.trial.create_trial(state=TrialState.RUNNING, params=draws, distributions=space)
            self._study.add_trial(trial)
        return self._running()[0]

    def values_of(self, trial: FrozenTrial) -> dict[str, Any]:
        return {axis.field: axis.value_of(trial.params[axis.field]) for axis in self._axes}

    def run(self, frozen: FrozenTrial, train: Callable[..., Path]) -> NestsegError | None:
        """Begin or resume a trial and write down how it ends; return why it failed."""
        number, run = frozen.number, self._trial_folder(frozen.number)
        trial = Trial(self._study, frozen._trial_id)

        def judge(step: int, mean_iou: float) -> bool:
            # what comes after the checkpoint of a resumed trial was reported once
            if step not in frozen.intermediate_values:
                trial.report(mean_iou, step)
            return trial.should_prune()

        try:
            recipe = change_recipe(self._recipe, self.values_of(frozen), source=run.name)
            train(recipe, run=run, resume=True, allow_fresh=True, on_evaluation=judge)
        except RunStopped as stopped:
            raise StudyStopped(self._folder, trial=number) from stopped
        except RunPruned:
            self._study.tell(number, state=TrialState.PRUNED)
        except NestsegError as error:
            trial.set_user_attr("error", str(error))
            self._study.tell(number, state=TrialState.FAIL)
            return error
        else:
            self._study.tell(number, max(self._trials()[number].intermediate_values.values()))
        # nothing goes on from there, and a study of large networks would fill the disk
        shutil.rmtree(checkpoint_folder(run, 0).parent, ignore_errors=True)
        return None

    def result_of(self, number: int) -> TrialResult:
        trial = self._trials()[number]
        return TrialResult(
            number=number,
            folder=self._trial_folder(number),
            state=_STATES[trial.state],
            mean_iou=max(trial.intermediate_values.values(), default=None),
            values=self.values_of(trial),
            error=trial.user_attrs.get("error"),
        )

    def summarise(self) -> StudyResult:
        return StudyResult(self._folder, self._results(), self._weigh_fields())

    def write_best(self, recipe: Recipe) -> None:
        """Keep ``best.yaml`` up to date: a recipe with the values of the best trial."""
        best = _best_of(self._results())
        if best is None:
            return
        assert best.mean_iou is not None, "a finished trial was evaluated"
        text = change_recipe(recipe, best.values, source=best.folder.name).to_yaml()
        notes = f"# {_word_values(best.values)}: {best.folder.name}, mIoU {100 * best.mean_iou:.2f} %\n"
        with replaced_file(self._folder / BEST_FILE) as temporary:
            temporary.write_text(notes + text, encoding="utf-8")

    def _results(self) -> tuple[TrialResult, ...]:
        results = [self.result_of(trial.number) for trial in self._trials()]
        results.sort(key=lambda result: -1.0 if result.mean_iou is None else result.mean_iou, reverse=True)
        return tuple(results)

    def _weigh_fields(self) -> dict[str, float] | None:
        if sum(trial.state == TrialState.COMPLETE for trial in self._trials()) < MIN_TRIALS_FOR_IMPORTANCE:
            return None
        # optuna's best tenth would be a trial or two
        evaluator = PedAnovaImportanceEvaluator(target_quantile=0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            try:
                return get_param_importances(self._study, evaluator=evaluator)
            except UserWarning:  # no half is better
                return None

    def _draw(self) -> dict[str, Any]:
        number = len(self._trials())
        if number == 0:
            fields = flatten(self._recipe.model_dump(mode="json"))
            own = {axis.field: axis.drawn_for(fields.get(axis.field)) for axis in self._axes}
            if None not in own.values():
                return own
        # the generator of each trial is its own, so that a study that is left and taken up draws the same
        seed = int(np.random.SeedSequence((self._recipe.seed, number)).generate_state(1)[0])
        draft = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
        draft.add_trials(self._trials())
        return draft.ask({axis.field: axis.distribution for axis in self._axes}).params

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _running(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=True, states=(TrialState.RUNNING,))

    def _trial_folder(self, number: int) -> Path:
        return self._folder / f"trial-{number:04d}"


def _best_of(results: Sequence[TrialResult]) -> TrialResult | None:
    return next((result for result in results if result.state == "finished"), None)


def _read_space(space: Sequence[str], recipe: Recipe) -> tuple[Axis, ...]:
    axes = tuple(Axis.parse(text) for text in space)
    fields = [axis.field for axis in axes]
    twice = [field for field in fields if fields.count(field) > 1]
    if twice:
        raise RecipeError("E-RECIPE-104", f"{twice[0]} is there twice", fix="name each field once", path="--space")
    if recipe.evaluation.every_steps is None:
        raise RecipeError(
            "E-RECIPE-105",
            "there are no evaluations to compare trials by",
            fix="set evaluation.every_steps to a number",
            path="evaluation.every_steps",
        )
    for axis in axes:
        axis.check(recipe)
    return axes


def _why_never_pruned(recipe: Recipe) -> str | None:
    length, every_steps = recipe.schedule.max_steps, recipe.evaluation.every_steps
    if length is None or every_steps is None or every_steps < length:
        return None
    return (
        f"no trial will be given up early: evaluation.every_steps is {every_steps}, a trial has {length} steps; "
        f"consider --set evaluation.every_steps={max(1, length // 5)}"
    )


def _claim(folder: Path, recipe: Recipe, axes: Sequence[Axis]) -> None:
    """Write what is searched into a new folder; see that an old one is of the same search."""
    file = folder / STUDY_FILE
    space = {axis.field: str(axis).partition("=")[2] for axis in axes}
    if not file.exists():
        others = sorted(path.name for path in folder.iterdir() if path.name[0] != "." and path.name != LOCK_FILE)
        if others:
            raise RunError(
                "E-RUN-082",
                f"holds no study, but {', '.join(others[:3])}",
                fix="choose a new folder for --study",
                path=folder,
            )
        content = {"space": space, "recipe": recipe.model_dump(mode="json")}
        with replaced_file(file) as temporary:
            text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=100)
            temporary.write_text(text, encoding="utf-8")
        return
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        # a field that is newer than the study has its default
        saved_recipe, saved_space = validate_recipe(content["recipe"], source=str(file)), content["space"]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise _damaged(file, error) from error
    before = flatten({"space": saved_space} | saved_recipe.model_dump(mode="json"))
    now = flatten({"space": space} | recipe.model_dump(mode="json"))
    changes = [
        f"{field} was {before.get(field)}, now {now.get(field)}"
        for field in dict.fromkeys([*before, *now])
        if before.get(field) != now.get(field)
    ]
    if changes:
        raise RunError(
            "E-RUN-083",
            f"the study is another: {'; '.join(changes)}",
            fix="go on with the arguments that it began with, or choose a new folder for --study",
            path=folder,
        )


def _open_journal(folder: Path) -> optuna.Study:
    file = folder / JOURNAL_FILE
    if not file.exists() and any(folder.glob("trial-*")):
        raise _damaged(file, FileNotFoundError("it is missing, but there are trials"))
    # Nobody else writes, as we hold the folder. A lock that a killed process left would be waited for, and a line that
    # it tore, or for which there was no space, would damage the next.
    file.with_name(f"{JOURNAL_FILE}.lock").unlink(missing_ok=True)
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            study_name="nestseg",
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(),
            load_if_exists=True,
        )
    # it trusts its file
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> RunError:
    return RunError(
        "E-RUN-084",
        f"damaged: {' '.join(str(error).split())[:200]}",
        fix="restore it from a copy, or begin anew in another folder; the trials' run folders are good by themselves",
        path=file,
    )


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _word_values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{field} {_word(value)}" for field, value in values.items())


def _word_outcome(trial: TrialResult) -> str:
    if trial.error is not None:
        return f"trial {trial.number} failed: {trial.error}"
    assert trial.mean_iou is not None, "a trial that did not fail was evaluated"
    return f"trial {trial.number} {trial.state}: mIoU {100 * trial.mean_iou:.2f} %"
