"""What a verification found, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nestseg.core.disk import replaced_file
from nestseg.core.taxonomy import Taxonomy
from nestseg.data.verify.problems import KINDS, Problem, printable

_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSummary:
    """What a split holds.

    Args:
        name: The split.
        num_samples: Samples, those that are not whole included.
        class_pixels: Pixels by train id.
        ignored_pixels: Pixels of defined ids that are ignored.
        image_kinds: Images by kind of samples, such as ``"RGB"`` or ``"grey 16-bit"``.
        label_kinds: Label maps, likewise.
    """

    name: str
    num_samples: int
    class_pixels: tuple[int, ...]
    ignored_pixels: int
    image_kinds: Mapping[str, int]
    label_kinds: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that one pass over a data set found.

    Args:
        dataset: Its name.
        root: Its folder.
        taxonomy: Its classes.
        splits: What each split holds.
        problems: Errors and warnings, by code, split and path.
    """

    dataset: str
    root: str
    taxonomy: Taxonomy
    splits: tuple[SplitSummary, ...]
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Problems that make the data set unfit for training."""
        return tuple(problem for problem in self.problems if KINDS[problem.code].level == "error")

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Things to know."""
        return tuple(problem for problem in self.problems if KINDS[problem.code].level == "warning")

    @property
    def exit_code(self) -> int:
        """1 if there are errors, otherwise 0."""
        return 1 if self.errors else 0

    def to_json(self) -> dict[str, object]:
        """Return the report as plain values for strict JSON."""
        return {
            "dataset": self.dataset,
            "root": printable(self.root),
            "num_errors": len(self.errors),
            "num_warnings": len(self.warnings),
            "classes": list(self.taxonomy.classes),
            "splits": [
                {
                    "name": split.name,
                    "num_samples": split.num_samples,
                    "class_pixels": list(split.class_pixels),
                    "ignored_pixels": split.ignored_pixels,
                    "image_kinds": dict(split.image_kinds),
                    "label_kinds": dict(split.label_kinds),
                }
                for split in self.splits
            ],
            "problems": [
                {
                    "code": problem.code,
                    "level": KINDS[problem.code].level,
                    "title": KINDS[problem.code].title,
                    "split": problem.split,
                    "path": printable(problem.path),
                    "reason": problem.reason,
                    "fix": problem.fix,
                }
                for problem in self.problems
            ],
        }


def format_report(report: Report) -> str:
    """Word a report: problems by kind and fix, the first ten files of each; then what the data set holds."""
    lines: list[str] = []
    groups: dict[tuple[str, str], list[Problem]] = {}
    for problem in (*report.errors, *report.warnings):
        groups.setdefault((problem.code, problem.fix), []).append(problem)
    for (code, fix), problems in groups.items():
        kind = KINDS[code]
        lines.append(f"{kind.level} {code}: {kind.title} ({len(problems):,})")
        for problem in problems[:_SHOWN]:
            split = f"{problem.split}: " if problem.split else ""
            lines.append(f"  {split}{printable(problem.path)} | {problem.reason}")
        if len(problems) > _SHOWN:
            lines.append(f"  and {len(problems) - _SHOWN:,} more, all in --json")
        lines += [f"  fix: {fix}", ""]
    lines += [f"{summary.name}: {summary.num_samples:,} samples; {_word_kinds(summary)}" for summary in report.splits]
    lines += _word_classes(report)
    num_errors, num_warnings = len(report.errors), len(report.warnings)
    lines.append(f"{report.dataset}: {_count(num_errors, 'error')}, {_count(num_warnings, 'warning')}")
    return "\n".join(lines)


def _word_kinds(split: SplitSummary) -> str:
    return "; ".join(
        f"{noun}: " + (", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items())) or "none")
        for noun, kinds in (("images", split.image_kinds), ("label maps", split.label_kinds))
    )


def _word_classes(report: Report) -> list[str]:
    """Word the pixels of every class, in percent of those that count, for splits that have labels."""
    splits = [split for split in report.splits if sum(split.class_pixels)]
    if not splits:
        return []
    width = max(len(name) for name in ("class", *report.taxonomy.classes))
    lines = [f"{'class':<{width}}" + "".join(f" {split.name:>12}" for split in splits)]
    for index, name in enumerate(report.taxonomy.classes):
        shares = (split.class_pixels[index] / sum(split.class_pixels) for split in splits)
        lines.append(f"{name:<{width}}" + "".join(f" {share:>12.3%}" for share in shares))
    ignored = (split.ignored_pixels / (split.ignored_pixels + sum(split.class_pixels)) for split in splits)
    return [*lines, f"{'(ignored)':<{width}}" + "".join(f" {share:>12.3%}" for share in ignored)]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def write_report(path: Path, report: Report) -> None:
    """Write a report as strict JSON, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(report.to_json(), indent=1, allow_nan=False), encoding="utf-8")
