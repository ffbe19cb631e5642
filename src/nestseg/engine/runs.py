"""Looking at run folders: a list of them, two or more side by side, their curves as a page.

Everything is read from ``recipe.yaml`` and ``log.jsonl``, so that runs in progress, stopped and damaged ones can be
looked at like any other, and nothing here needs torch.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from nestseg.core.errors import RecipeError, RunError
from nestseg.engine.log import LOG_FILE, read_records
from nestseg.engine.trackers import flatten
from nestseg.recipe import Recipe
from nestseg.report.curves import PERCENT, PLAIN, Curve, Unit, draw_chart, draw_legend
from nestseg.report.evaluation_page import Chart
from nestseg.report.html import Column, Html, Section, grid, notes, page, paragraph, table, write_page

LockHolder = Callable[[Path], Mapping[str, Any] | None]
"""Says who trains in a run folder; None if nobody does."""

State = Literal["finished", "running", "stopped"]

# their names belong to modules that import torch
_RECIPE_FILE = "recipe.yaml"
_MODEL_FILE = "model.safetensors"

# fields without which a score is another measurement
_PROTOCOL = (
    "data.dataset",
    "data.spec",
    "data.eval_split",
    "evaluation.base_size",
    "evaluation.logits_resizes",
    "evaluation.window",
    "evaluation.window_stride",
    "evaluation.blend",
    "evaluation.scales",
    "evaluation.flip",
    "evaluation.average",
    "evaluation.max_images",
)


class Run(NamedTuple):
    """What is known of a run folder."""

    folder: Path
    recipe: Mapping[str, Any]
    """Fields by dotted names, with the defaults of today where the file has none; empty if it cannot be read."""
    records: Sequence[Mapping[str, Any]]
    """Of ``log.jsonl``, see `read_records`."""
    problems: tuple[str, ...]
    """What cannot be read, in words."""

    def of_kind(self, kind: str) -> list[Mapping[str, Any]]:
        """Return the records of a kind, in their order."""
        return [record for record in self.records if record["kind"] == kind]

    def newest(self, kind: str) -> Mapping[str, Any]:
        """Return the last record of a kind; empty if there is none."""
        return next((record for record in reversed(self.records) if record["kind"] == kind), {})

    @property
    def step(self) -> int:
        """The last step that is known to be done."""
        return max((record["step"] for record in self.records if isinstance(record.get("step"), int)), default=0)

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The evaluation with the highest mIoU."""
        scored = [record for record in self.of_kind("evaluation") if _number(record.get("mean_iou")) is not None]
        return max(scored, key=lambda record: float(record["mean_iou"]), default=None)

    @property
    def last_loss(self) -> float | None:
        """The newest mean loss that was recorded."""
        return _number(self.newest("step").get("loss"))

    @property
    def images_per_second(self) -> float | None:
        """The median over the records."""
        speeds = [_number(record.get("images_per_second")) for record in self.of_kind("step")]
        return statistics.median(known) if (known := [speed for speed in speeds if speed is not None]) else None

    @property
    def environment(self) -> Mapping[str, Any]:
        """Versions and machine, as its newest session found them."""
        start = self.newest("start")
        if isinstance(environment := start.get("environment"), Mapping):
            return environment
        # runs of 0.1
        rest = {name: start[name] for name in ("device", "world_size", "threads") if name in start}
        return {**start.get("versions", {}), **rest}


class RunRow(NamedTuple):
    """A line of the list of runs."""

    run: Run
    state: State
    holder: str
    """Who trains in it; empty if nobody does."""
    num_bytes: int
    """Size on disk."""


class RunList(NamedTuple):
    """The runs below a folder."""

    rows: tuple[RunRow, ...]
    others: tuple[tuple[Path, str], ...]
    """Folders that are no runs and hold none, and why they were passed over."""


def list_runs(folder: Path, *, lock_holder: LockHolder) -> RunList:
    """Find the runs in a folder: itself, its folders, and theirs.

    Args:
        folder: Where to look.
        lock_holder: See `nestseg.engine.lock.lock_holder`.

    Raises:
        RunError: E-RUN-063 if the folder is not there.
    """
    if not folder.is_dir():
        raise RunError("E-RUN-063", "no such folder", fix="name the folder that holds your runs", path=folder)
    rows: list[RunRow] = []
    others: list[tuple[Path, str]] = []
    for path, reason in _find_runs(folder, depth=2):
        if reason:
            others.append((path, reason))
        else:
            rows.append(_summarise(read_run(path), lock_holder))
    return RunList(tuple(rows), tuple(others))


def read_run(folder: Path) -> Run:
    """Read what is known of a run; what cannot be read is one of its problems.

    Raises:
        RunError: E-RUN-064 if the folder is no run.
    """
    if not _is_run(folder):
        raise RunError(
            "E-RUN-064",
            f"no run: it has neither {_RECIPE_FILE} nor {LOG_FILE}",
            fix="name a folder that nestseg train --run wrote",
            path=folder,
        )
    problems: list[str] = []
    recipe = _read_recipe(folder / _RECIPE_FILE, problems)
    records: Sequence[Mapping[str, Any]] = ()
    try:
        found = read_records(folder / LOG_FILE)
        records = found.records
        if found.num_damaged:
            problems.append(f"{LOG_FILE}: {found.num_damaged} damaged lines are left out")
    except FileNotFoundError:
        problems.append(f"{LOG_FILE} is missing")
    except OSError as error:
        problems.append(f"{LOG_FILE} cannot be read: {error.strerror or error}")
    return Run(folder, recipe, records, tuple(problems))


def format_list(runs: RunList) -> str:
    """Lay a list of runs out as a plain table, with what was passed over below it."""
    rows = [("RUN", "RECIPE", "STATE", "BEST MIOU %", "LAST LOSS", "IMAGES/S", "SIZE"), *map(_list_cells, runs.rows)]
    lines = [_lay_out(rows)] if runs.rows else ["no runs"]
    lines += [f"{row.run.folder}: {problem}" for row in runs.rows for problem in row.run.problems]
    lines += [f"{path}: {reason}" for path, reason in runs.others]
    return "\n".join(lines)


def compare_runs(folders: Sequence[Path], *, lock_holder: LockHolder) -> str:
    """Lay runs side by side: what differs in their recipes, their scores, their classes, where they were made.

    Args:
        folders: Two or more runs; differences are to the first.
        lock_holder: See `nestseg.engine.lock.lock_holder`.

    Returns:
        Plain tables.

    Raises:
        RunError: E-RUN-064 for a folder that is no run; E-RUN-065 for fewer than two.
    """
    if len(folders) < 2:
        raise RunError("E-RUN-065", f"{len(folders)} run given", fix="name two or more runs to compare")
    rows = [_summarise(read_run(folder), lock_holder) for folder in folders]
    runs = [row.run for row in rows]
    names = name_runs(folders)
    differences = _differences(runs)
    parts = [
        _lay_out([("recipe", *names), *differences]) if differences else "recipe: no difference",
        _lay_out([("scores", *names), *_score_cells(rows)]),
    ]
    foreign = [field for field, *_ in differences if field.startswith(_PROTOCOL)]
    if foreign:
        parts.append(f"scores cannot be compared: {', '.join(foreign)} differ")
    if classes := _class_cells(runs, names):
        parts.append(_lay_out(classes))
    environments = [run.environment for run in runs]
    fields = dict.fromkeys(name for environment in environments for name in environment)
    if fields:
        cells = [(name, *(_word(environment.get(name)) for environment in environments)) for name in fields]
        parts.append(_lay_out([("made with", *names), *cells]))
    parts += [f"{run.folder}: {problem}" for run in runs for problem in run.problems]
    return "\n\n".join(parts)


def learning_curves(folder: Path) -> list[Chart]:
    """Return the curves of one run: losses, and scores of the evaluations in training.

    Raises:
        RunError: E-RUN-064 for a folder that is no run.
    """
    run = read_run(folder)

    def of(kind: str, field: str) -> Curve:
        return _curve(f"{kind}", run.of_kind(kind), lambda record: record.get(field))

    return [
        Chart("Training loss", [of("step", "loss")]),
        Chart("Validation loss", [of("evaluation", "loss")]),
        Chart("mIoU", [of("evaluation", "mean_iou")], PERCENT),
    ]


def plot_runs(folders: Sequence[Path], out: Path, *, lock_holder: LockHolder) -> None:
    """Write the curves of runs as one page that needs nothing but itself.

    Args:
        folders: The runs.
        out: The page; its folder is made.
        lock_holder: See `nestseg.engine.lock.lock_holder`.

    Raises:
        RunError: E-RUN-064 for a folder that is no run; E-RUN-066 if nothing was recorded yet.
        OSError: If the page cannot be written.
    """
    rows = [_summarise(read_run(folder), lock_holder) for folder in folders]
    runs, names = [row.run for row in rows], name_runs(folders)
    if not any(run.of_kind("step") or run.of_kind("evaluation") for run in runs):
        raise RunError("E-RUN-066", "nothing was recorded yet", fix="wait for log.every_steps steps", path=folders[0])

    def chart(title: str, kind: str, find: Callable[[Mapping[str, Any]], Any], unit: Unit = PLAIN) -> Html:
        curves = [_curve(name, run.of_kind(kind), find) for name, run in zip(names, runs, strict=True)]
        return draw_chart(title, curves, unit=unit)

    charts = [
        chart("Training loss", "step", lambda record: record.get("loss")),
        chart("Validation loss", "evaluation", lambda record: record.get("loss")),
        chart("mIoU", "evaluation", lambda record: record.get("mean_iou"), PERCENT),
        chart("Pixel accuracy", "evaluation", lambda record: record.get("pixel_accuracy"), PERCENT),
        chart("Learning rate", "step", lambda record: record.get("lr")),
        chart("Images a second", "step", lambda record: record.get("images_per_second")),
    ]
    sections = [
        Section("Runs", [*_run_table(rows, names), *([notes(problems)] if (problems := _problems(runs)) else [])]),
        Section("Curves", [draw_legend(names), grid(charts)]),
    ]
    classes = _class_names(runs)
    if classes:
        of_class = [chart(name, "evaluation", partial(_class_iou, name=name), PERCENT) for name in classes]
        sections.append(Section("IoU of every class", [draw_legend(names), grid(of_class)]))
    lead = "Rest the pointer on a chart to read its values. Steps that a resume took again are drawn once."
    out.parent.mkdir(parents=True, exist_ok=True)
    write_page(out, page(names[0] if len(names) == 1 else f"{len(names)} runs", lead=lead, sections=sections))


def name_runs(folders: Sequence[Path]) -> list[str]:
    """Name runs by as much of their paths as tells them apart.

    Example:
        >>> name_runs([Path("a/x"), Path("a/y")]), name_runs([Path("a/x"), Path("b/x")])
        (['x', 'y'], ['a/x', 'b/x'])
    """
    paths = [folder.resolve() for folder in folders]
    longest = max((len(path.parts) for path in paths), default=0)
    for length in range(1, longest + 1):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        if len(set(names)) == len(set(paths)):
            return names
    return [str(path) for path in paths]


def _find_runs(folder: Path, *, depth: int) -> Iterator[tuple[Path, str]]:
    """Yield runs with an empty reason, and folders that hold none with what they are."""
    try:
        if _is_run(folder):
            yield folder, ""
            return
        inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        yield folder, f"cannot be read: {error.strerror or error}"
        return
    found = [pair for path in inside for pair in _find_runs(path, depth=depth - 1)] if depth else []
    if any(not reason for _, reason in found) or depth == 2:
        yield from found
    else:
        # one line for a folder of folders
        yield folder, "no run"


def _is_run(folder: Path) -> bool:
    return (folder / _RECIPE_FILE).is_file() or (folder / LOG_FILE).is_file()


def _read_recipe(file: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        return flatten(Recipe.read(file).model_dump(mode="json"))
    except RecipeError as error:
        problem = f"{file.name}: {error.reason}"
    try:
        # a recipe of another release still says what it says
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        values = None
    problems.append(problem)
    return flatten(values) if isinstance(values, dict) else {}


def _summarise(run: Run, lock_holder: LockHolder) -> RunRow:
    holder = lock_holder(run.folder)
    state: State = "stopped"
    if holder is not None:
        state = "running"
    elif (run.folder / _MODEL_FILE).is_file():
        state = "finished"
    words = "" if holder is None else f"pid {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return RunRow(run, state, words, _size_of(run.folder))


def _size_of(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(parent) / name).lstat().st_size
            except OSError:  # a checkpoint that was rotated out meanwhile
                continue
    return total


def _list_cells(row: RunRow) -> tuple[str, ...]:
    run, best = row.run, row.run.best
    name = run.recipe.get("name") or next((record.get("recipe") for record in run.of_kind("start")), None)
    return (
        str(run.folder),
        _word(name),
        _word_state(row),
        "-" if best is None else f"{100 * best['mean_iou']:.2f} (step {best.get('step', '?')})",
        "-" if run.last_loss is None else f"{run.last_loss:.4f}",
        "-" if run.images_per_second is None else f"{run.images_per_second:.1f}",
        _word_bytes(row.num_bytes),
    )


def _word_state(row: RunRow) -> str:
    total = row.run.recipe.get("schedule.max_steps")
    progress = f"step {row.run.step}" + (f" of {total}" if total else "")
    if row.state == "finished":
        return f"finished, {progress}"
    return f"running, {progress} ({row.holder})" if row.state == "running" else f"stopped, {progress}"


def _word_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _differences(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    known = [run for run in runs if run.recipe]
    fields = dict.fromkeys(field for run in known for field in run.recipe)
    missing = object()
    return [
        (field, *(_word(run.recipe.get(field, "-")) for run in runs))
        for field in fields
        if any(run.recipe.get(field, missing) != known[0].recipe.get(field, missing) for run in known)
    ]


def _score_cells(rows: Sequence[RunRow]) -> list[tuple[str, ...]]:
    cells: dict[str, list[str]] = {}
    for row in rows:
        run = row.run
        best, last = run.best or {}, run.newest("evaluation")
        seconds = _number(run.newest("step").get("seconds"))
        at = f" (step {best['step']})" if "step" in best else ""
        values = {
            "state": _word_state(row),
            "best mIoU %": _percent(best.get("mean_iou")) + at,
            "final mIoU %": _percent(last.get("mean_iou")),
            "final pixel accuracy %": _percent(last.get("pixel_accuracy")),
            "final validation loss": _decimals(last.get("loss")),
            "last training loss": _decimals(run.last_loss),
            "images/s": "-" if run.images_per_second is None else f"{run.images_per_second:.1f}",
            "hours": "-" if seconds is None else f"{seconds / 3600:.2f}",
            "size": _word_bytes(row.num_bytes),
        }
        for name, value in values.items():
            cells.setdefault(name, []).append(value)
    return [(name, *values) for name, values in cells.items()]


def _class_cells(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Set the IoU of every class at each run's best evaluation, and after each run but the first the difference."""
    bests = [run.best or {} for run in runs]
    header = ["IoU % at the best", names[0]]
    for name in names[1:]:
        header += [name, "difference"]
    rows = [tuple(header)]
    for class_name in _class_names(runs):
        first, *others = (_class_iou(best, name=class_name) for best in bests)
        cells = [class_name, _percent(first)]
        for other in others:
            difference = "-" if first is None or other is None else f"{100 * (other - first):+.2f}"
            cells += [_percent(other), difference]
        rows.append(tuple(cells))
    return rows if len(rows) > 1 else []


def _class_names(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in _classes_of(run.newest("evaluation"))))


def _classes_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    classes = record.get("iou_per_class")
    return classes if isinstance(classes, Mapping) else {}


def _class_iou(record: Mapping[str, Any], *, name: str) -> float | None:
    return _number(_classes_of(record).get(name))


def _curve(name: str, records: Iterable[Mapping[str, Any]], find: Callable[[Mapping[str, Any]], Any]) -> Curve:
    values = {record["step"]: _number(find(record)) for record in records if isinstance(record.get("step"), int)}
    steps = sorted(values)
    return Curve(name, steps, [values[step] for step in steps])


def _run_table(rows: Sequence[RunRow], names: Sequence[str]) -> list[Html]:
    columns = [Column("Run"), Column("Recipe"), Column("State")]
    columns += [Column(title, numeric=True) for title in ("Best mIoU %", "Last loss", "Images/s", "Size")]
    cells = [(name, *_list_cells(row)[1:]) for name, row in zip(names, rows, strict=True)]
    parts = [table("What was read", columns, cells)]
    differences = _differences([row.run for row in rows])
    if differences:
        parts.append(table("Recipe fields that differ", [Column("Field"), *map(Column, names)], differences))
    elif len(rows) > 1:
        parts.append(paragraph("Their recipes do not differ."))
    return parts


def _problems(runs: Iterable[Run]) -> list[str]:
    return [f"{run.folder}: {problem}" for run in runs for problem in run.problems]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _percent(value: Any) -> str:
    return "-" if _number(value) is None else f"{100 * value:.2f}"


def _decimals(value: Any) -> str:
    return "-" if _number(value) is None else f"{value:.4f}"


def _word(value: Any) -> str:
    return "null" if value is None else str(value)


def _lay_out(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
