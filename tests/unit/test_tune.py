"""The search over a recipe's fields, with a stand-in for training whose score is known."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nestseg.cli import main
from nestseg.core.errors import NestsegError, RecipeError, RunError
from nestseg.engine.stop import RunPruned, RunStopped, StopRequest
from nestseg.engine.tune import Axis, StudyResult, StudyStopped, default_space, study_notes, study_table, tune
from nestseg.recipe import Recipe
from nestseg.recipes import named_recipe

SPACE = ("optimizer.lr=log 0.0001 0.1", "head.dropout=uniform 0 0.5")
STEPS = (10, 20, 30)


class Killed(BaseException):
    """What ends the stand-in as a kill would."""


class Trainer:
    """Stands in for training: the score is best at lr 0.01 and grows from evaluation to evaluation.

    ``disturb`` is called before each evaluation with the run's folder and the step, and may raise.
    """

    def __init__(self, disturb: Callable[[Path, int], None] = lambda run, step: None) -> None:
        self.disturb = disturb
        self.runs: list[str] = []
        self.started_at: list[int] = []

    def __call__(self, recipe: Recipe, data_root: Path | None, *, run: Path, on_evaluation, **options: object) -> Path:
        assert options == {"device": "cpu", "resume": True, "allow_fresh": True}
        checkpoint = run / "checkpoints" / "step"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        done = int(checkpoint.read_text()) if checkpoint.exists() else 0
        self.runs.append(run.name)
        self.started_at.append(done)
        for step in STEPS:
            if step <= done:
                continue
            self.disturb(run, step)
            if on_evaluation(step, score_of(recipe, step)) and step < STEPS[-1]:
                raise RunPruned(run, step=step)
            checkpoint.write_text(str(step))
        return run / "model.safetensors"


def score_of(recipe: Recipe, step: int) -> float:
    return step / 100 - abs(math.log10(recipe.optimizer.lr) + 2) / 10 + recipe.head.dropout / 100


def search(folder: Path, trials: int, train: Callable[..., Path] | None = None, **options: object) -> StudyResult:
    options = {"space": SPACE, "recipe": named_recipe("demo")} | options
    recipe = options.pop("recipe")
    return tune(recipe, None, study=folder, trials=trials, device="cpu", train=train or Trainer(), **options)


def values_by_number(result: StudyResult) -> list[dict[str, object]]:
    return [trial.values for trial in sorted(result.trials, key=lambda trial: trial.number)]


def test_first_trial_has_the_recipes_own_values_and_the_best_is_kept(tmp_path):
    result = search(tmp_path / "study", 12)
    recipe = named_recipe("demo")
    assert values_by_number(result)[0] == {"optimizer.lr": recipe.optimizer.lr, "head.dropout": recipe.head.dropout}
    scores = [trial.mean_iou for trial in result.trials]
    assert scores == sorted(scores, reverse=True)
    assert result.best is not None
    assert result.best.mean_iou > score_of(recipe, 30)
    for trial in result.trials:
        ran = Recipe.read(trial.folder / "recipe.yaml")
        assert trial.values == {"optimizer.lr": ran.optimizer.lr, "head.dropout": ran.head.dropout}
        assert all(0.0001 <= trial.values["optimizer.lr"] <= 0.1 for trial in result.trials)
    best = Recipe.read(tmp_path / "study" / "best.yaml")
    assert best.optimizer.lr == result.best.values["optimizer.lr"]
    assert f"# optimizer.lr {best.optimizer.lr:.4g}" in (tmp_path / "study" / "best.yaml").read_text()


def test_own_values_outside_the_space_are_not_tried(tmp_path):
    result = search(tmp_path / "study", 1, space=("optimizer.lr=log 0.02 0.03",))
    assert 0.02 <= result.trials[0].values["optimizer.lr"] <= 0.03


def test_number_of_trials_is_in_all_and_a_study_that_has_them_trains_nothing(tmp_path):
    search(tmp_path / "study", 3)
    again = Trainer()
    result = search(tmp_path / "study", 3, again)
    assert again.runs == []
    assert len(result.trials) == 3
    result = search(tmp_path / "study", 5, again)
    assert again.runs == ["trial-0003", "trial-0004"]
    assert len(result.trials) == 5


def test_trials_without_promise_are_given_up_and_count(tmp_path):
    said: list[str] = []
    result = search(tmp_path / "study", 14, say=said.append)
    pruned = [trial for trial in result.trials if trial.state == "pruned"]
    assert len(result.trials) == 14
    assert pruned
    assert min(trial.number for trial in pruned) >= 5
    assert result.best.state == "finished"
    assert sum(" pruned: mIoU " in line for line in said) == len(pruned)
    # a run that is told does not keep what only a resume needs
    assert not list((tmp_path / "study").glob("trial-*/checkpoints"))


def test_study_that_is_killed_anywhere_ends_as_one_that_was_not(tmp_path):
    undisturbed = search(tmp_path / "undisturbed", 12)
    places = [(trial, step) for trial in (0, 3, 11) for step in STEPS]

    def kill(run: Path, step: int) -> None:
        if places and (run.name, step) == (f"trial-{places[0][0]:04d}", places[0][1]):
            places.pop(0)
            raise Killed

    trainer, result = Trainer(kill), None
    while result is None:
        try:
            result = search(tmp_path / "killed", 12, trainer)
        except Killed:
            continue
    assert len(places) < 3, "kills at places that a pruned trial does not reach"
    assert values_by_number(result) == values_by_number(undisturbed)
    assert [trial[2:] for trial in result.trials] == [trial[2:] for trial in undisturbed.trials]
    resumed = [started for run, started in zip(trainer.runs, trainer.started_at, strict=True) if run == "trial-0003"]
    assert resumed == [0, 0, 10, 20]


def test_evaluation_that_comes_again_after_a_resume_is_counted_once(tmp_path):
    class Torn(Trainer):
        """Is killed after the evaluation at step 20, before its checkpoint."""

        def __call__(self, recipe, data_root, *, on_evaluation, **options):
            def judge(step, mean_iou):
                answer = on_evaluation(step, mean_iou)
                if step == 20 and len(self.runs) == 1:
                    raise Killed
                return answer

            return super().__call__(recipe, data_root, on_evaluation=judge, **options)

    trainer = Torn()
    with pytest.raises(Killed):
        search(tmp_path / "study", 1, trainer)
    result = search(tmp_path / "study", 1, trainer)
    assert trainer.started_at == [0, 10]
    assert result.best.mean_iou == score_of(named_recipe("demo"), 30)


@pytest.mark.parametrize("torn", [b'{"op_code":7,"worker', b'{"op_code":6}'])
def test_torn_line_and_a_stale_lock_of_the_journal_do_not_hurt(tmp_path, torn):
    study = tmp_path / "study"
    before = search(study, 2)
    with (study / "journal.jsonl").open("ab") as file:
        file.write(torn)
    (study / "journal.jsonl.lock").symlink_to("journal.jsonl")
    result = search(study, 3)
    assert values_by_number(result)[:2] == values_by_number(before)
    assert all(json.loads(line) for line in (study / "journal.jsonl").read_text().splitlines())


def test_damaged_or_missing_journal_is_named(tmp_path):
    search(tmp_path / "study", 1)
    journal = tmp_path / "study" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([lines[0], b"\0\0\n", *lines[1:]]))
    with pytest.raises(RunError, match=r"E-RUN-084 .*journal.jsonl \| damaged"):
        search(tmp_path / "study", 2)
    journal.unlink()
    with pytest.raises(RunError, match=r"E-RUN-084 .*it is missing, but there are trials"):
        search(tmp_path / "study", 2)


def test_study_goes_on_only_with_the_arguments_it_began_with(tmp_path):
    search(tmp_path / "study", 1)
    with pytest.raises(RunError, match=r"E-RUN-083 .*space.head.dropout was uniform 0 0.5, now None"):
        search(tmp_path / "study", 2, space=SPACE[:1])
    with pytest.raises(RunError, match=r"schedule.warmup_steps was 30, now 2; schedule.max_steps was 375, now 30"):
        search(tmp_path / "study", 2, max_steps=30)


def test_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"E-RUN-082 .*holds no study, but notes.txt"):
        search(tmp_path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "lock"}


def test_second_process_is_kept_out(tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    script = (
        "import sys\nfrom pathlib import Path\nfrom nestseg.engine.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(study)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=f"E-RUN-007 .*pid {holder.pid} "):
            search(study, 1)
        holder.communicate()
    assert len(search(study, 1).trials) == 1


def failing(code: str, *numbers: int) -> Trainer:
    """Fail in trials of some numbers, after their first evaluation."""

    def fail(run: Path, step: int) -> None:
        if step == 20 and int(run.name[-4:]) in numbers:
            raise RunError(code, "the loss is not finite", fix="lower optimizer.lr", path=run)

    return Trainer(fail)


def test_failed_trial_is_reported_does_not_count_and_the_study_goes_on(tmp_path):
    said: list[str] = []
    result = search(tmp_path / "study", 3, failing("E-RUN-020", 1), say=said.append)
    assert sorted(trial.state for trial in result.trials) == ["failed", "finished", "finished", "finished"]
    (failed,) = (trial for trial in result.trials if trial.state == "failed")
    assert failed.number == 1
    assert failed.error.startswith("E-RUN-020 | ")
    assert any(line.startswith("trial 1 failed: E-RUN-020") for line in said)
    assert any(note.startswith("trial-0001: E-RUN-020") for note in study_notes(result, None))
    assert (tmp_path / "study" / "trial-0001" / "checkpoints").is_dir(), "what failed can be looked at"


def test_three_failures_in_a_row_stop_the_study_and_the_same_command_goes_on(tmp_path):
    with pytest.raises(RunError, match=r"E-RUN-081 .*3 trials in a row failed, the last with E-RUN-020") as caught:
        search(tmp_path / "study", 9, failing("E-RUN-020", 1, 3, 4, 5))
    assert "lower optimizer.lr" in caught.value.fix
    result = search(tmp_path / "study", 9)
    assert sum(trial.state == "failed" for trial in result.trials) == 4
    assert len(result.trials) == 13


def test_values_that_do_not_go_together_are_a_failed_trial(tmp_path):
    recipe = named_recipe("fcn_resnest50-d8_voc")
    space = ("optimizer.lr=log 0.0001 0.01", "schedule.min_lr=log 0.00001 0.01")
    result = search(tmp_path / "study", 5, recipe=recipe, space=space)
    failed = [trial for trial in result.trials if trial.state == "failed"]
    assert failed
    assert all("schedule.min_lr" in trial.error for trial in failed)


def test_signal_in_a_trial_stops_the_study_and_the_trial_is_resumed(tmp_path):
    def stop(run: Path, step: int) -> None:
        if (run.name, step) == ("trial-0001", 20):
            raise RunStopped(run, step=10, signum=signal.SIGTERM)

    with pytest.raises(StudyStopped, match=r"stopped in trial 1 of .*; run the same command again") as caught:
        search(tmp_path / "study", 3, Trainer(stop))
    assert caught.value.trial == 1
    trainer = Trainer()
    assert len(search(tmp_path / "study", 3, trainer).trials) == 3
    assert trainer.runs == ["trial-0001", "trial-0002"]
    assert trainer.started_at == [10, 0]


@pytest.mark.parametrize("within_run", [True, False])
def test_signal_in_the_last_moment_of_a_trial_stops_the_study_before_the_next(tmp_path, within_run):
    train = Trainer()

    def train_and_get_signal(*arguments, **options):
        if within_run:
            with StopRequest():
                os.kill(os.getpid(), signal.SIGTERM)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(*arguments, **options)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StudyStopped, match="stopped in trial 1 "):
        search(tmp_path / "study", 3, train_and_get_signal)
    assert train.runs == ["trial-0000"]
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(search(tmp_path / "study", 3).trials) == 3


def test_choices_may_be_lists_words_and_null(tmp_path):
    space = (
        "augmentation.scale_range=choice [0.5,2.0] [0.75,1.5]",
        "optimizer.name=choice sgd adamw",
        "optimizer.clip_norm=choice null 1.0",
        "data.batch_size=int 2 4",
        "ema.decay=uniform 0.9 0.99",
    )
    result = search(tmp_path / "study", 8, space=space)
    ran = [Recipe.read(trial.folder / "recipe.yaml") for trial in result.trials]
    assert {recipe.augmentation.scale_range for recipe in ran} == {(0.5, 2.0), (0.75, 1.5)}
    assert {recipe.optimizer.name for recipe in ran} == {"sgd", "adamw"}
    assert {recipe.optimizer.clip_norm for recipe in ran} == {None, 1.0}
    assert {recipe.data.batch_size for recipe in ran} <= {2, 3, 4}
    assert all(0.9 <= recipe.ema.decay <= 0.99 for recipe in ran)


def test_trials_are_short_and_the_best_recipe_has_its_own_length(tmp_path):
    said: list[str] = []
    result = search(tmp_path / "study", 1, max_steps=25, say=said.append)
    ran = Recipe.read(result.best.folder / "recipe.yaml")
    assert (ran.schedule.max_steps, ran.schedule.warmup_steps) == (25, 2)
    best = Recipe.read(tmp_path / "study" / "best.yaml")
    assert best == named_recipe("demo")
    assert "evaluation.every_steps is 375, a trial has 25 steps; consider --set evaluation.every_steps=5" in said[0]


def test_importance_is_said_for_ten_finished_trials_and_names_what_matters(tmp_path):
    class Patient(Trainer):
        def __call__(self, recipe, data_root, *, on_evaluation, **options):
            def judge(step, mean_iou):
                on_evaluation(step, mean_iou)
                return False

            return super().__call__(recipe, data_root, on_evaluation=judge, **options)

    few = search(tmp_path / "study", 9, Patient())
    assert few.importance is None
    many = search(tmp_path / "study", 12, Patient())
    assert many.importance is not None
    assert list(many.importance) == ["optimizer.lr", "head.dropout"]
    assert sum(many.importance.values()) == pytest.approx(1)
    assert any(note.startswith("importance: optimizer.lr ") for note in study_notes(many, None))


def test_importance_of_trials_that_are_all_alike(tmp_path):
    class Flat(Trainer):
        def __call__(self, recipe, data_root, *, on_evaluation, **options):
            return super().__call__(
                recipe, data_root, on_evaluation=lambda step, _: on_evaluation(step, 0.5), **options
            )

    result = search(tmp_path / "study", 10, Flat())
    assert len(result.trials) == 10
    assert result.importance is None


def test_table_has_the_best_first_and_the_notes_a_command_that_works(tmp_path):
    study = tmp_path / "my study"
    result = search(study, 2)
    rows = study_table(result)
    assert rows[0] == ("TRIAL", "STATE", "MIOU %", "optimizer.lr", "head.dropout")
    assert rows[1][:3] == (result.best.folder.name, "finished", f"{100 * result.best.mean_iou:.2f}")
    best, command = study_notes(result, Path("data"))
    assert best == f"best: {result.best.folder}"
    assert command == f"train it: nestseg train '{study}/best.yaml' --data data --run '{study}/best'"
    assert main(["recipes", "show", f"{study}/best.yaml"]) == 0


def test_default_space_is_about_the_recipes_values():
    recipe = named_recipe("fcn_resnest50-d8_voc")
    assert default_space(recipe) == (
        "optimizer.lr=log 0.001 0.1",
        "optimizer.weight_decay=log 5e-05 0.005",
        "head.dropout=uniform 0 0.5",
    )
    low = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": 2e-4, "weight_decay": 0.0})})
    assert default_space(low) == ("optimizer.lr=log 0.0001 0.002", "head.dropout=uniform 0 0.5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer.lr", "E-RECIPE-100 .*not of a form that is known"),
        ("optimizer.lr=", "E-RECIPE-100"),
        ("optimizer.lr=log 1", "E-RECIPE-100"),
        ("optimizer.lr=choice", "E-RECIPE-100"),
        ("optimizer.lr=normal 0 1", "E-RECIPE-100"),
        ("optimizer.learning_rate=log 0.1 1", r"E-RECIPE-101 .*did you mean .*optimizer.lr"),
        ("evaluation.max_images=int 1 2", "E-RECIPE-102 .*could not be compared"),
        ("data.eval_split=choice val test", "E-RECIPE-102"),
        ("optimizer.lr=log 0 1", "E-RECIPE-103 .*0 < low < high"),
        ("optimizer.lr=uniform 1 1", "E-RECIPE-103"),
        ("optimizer.lr=uniform 0 inf", "E-RECIPE-103"),
        ("optimizer.lr=log low high", "E-RECIPE-103"),
        ("data.batch_size=int 1.5 2", "E-RECIPE-103 .*whole numbers"),
    ],
)
def test_space_that_makes_no_sense_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        Axis.parse(text)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (("head.dropout=uniform 0 1",), "E-RECIPE-003 .*head.dropout"),
        (("optimizer.name=choice sgd adamv",), "E-RECIPE-003 .*optimizer.name is 'adamv'"),
        (("optimizer.lr=log 0.1 1", "optimizer.lr=log 0.1 2"), "E-RECIPE-104 .*optimizer.lr is there twice"),
    ],
)
def test_space_that_the_recipe_cannot_have_is_refused_before_anything_is_written(tmp_path, space, message):
    with pytest.raises(NestsegError, match=message):
        search(tmp_path / "study", 1, space=space)
    assert not (tmp_path / "study").exists()


def test_recipe_without_evaluations_is_refused(tmp_path):
    recipe = named_recipe("demo")
    recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"every_steps": None})})
    with pytest.raises(RecipeError, match=r"E-RECIPE-105 .*evaluation.every_steps"):
        search(tmp_path / "study", 1, recipe=recipe)


def test_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "nestseg.engine.tune")
    assert main(["tune", "demo", "--study", str(tmp_path), "--trials", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: E-RUN-080 | tune needs optuna")
    assert 'pip install "nestseg[tune]"' in error
