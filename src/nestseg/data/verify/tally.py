"""What is kept while files pass by, and the conclusions drawn when all have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestseg.core.types import IGNORE_INDEX
from nestseg.data.verify import problems as kinds
from nestseg.data.verify.labels import Edges, LabelRule, guess_values, word_values
from nestseg.data.verify.pairs import Split
from nestseg.data.verify.problems import Problem, enumerate_names, make_problem
from nestseg.data.verify.report import Report, SplitSummary

TINY = 16
"""Images below this height or width are reported."""

_DOMINANT = 0.999
_EXAMPLES = 11  # one more than is shown
_EVALUATION = ("val", "test")

_CONVERSIONS = {
    "grey": "repeated over three channels",
    "grey with alpha": "alpha is dropped, and the grey repeated over three channels",
    "grey 16-bit": "scaled to 8 bits by its high byte, never clipped, and repeated over three channels",
    "RGB 16-bit": "scaled to 8 bits by its high byte",
    "RGBA": "alpha is dropped, the stored colour stays",
    "palette": "looked up in the palette",
    "CMYK": "converted without a colour profile",
    "YCCK": "converted without a colour profile",
    "1-bit": "taken as black and white",
}


class Result(NamedTuple):
    """What was found about a sample or another file: of a good one a few hundred bytes, dropped after counting."""

    split: int | None
    """The split's place in the list of splits; None for a file that is no sample."""
    place: int
    """The sample's place in the split."""
    path: str
    problems: tuple[Problem, ...]
    digest: bytes
    """16 bytes of the image's sha256."""
    image_kind: str
    label_kind: str
    orientation: int
    """Of the image; 0 where it is upright."""
    is_tiny: bool
    counts: tuple[NDArray[np.intp], NDArray[np.int64]]
    """Stored ids that occur, and their pixels."""


@dataclass(slots=True, kw_only=True)
class _SplitTally:
    """Counts of a split."""

    stored: Counter[int] = field(default_factory=Counter)
    image_kinds: Counter[str] = field(default_factory=Counter)
    label_kinds: Counter[str] = field(default_factory=Counter)
    orientations: Counter[int] = field(default_factory=Counter)
    num_tiny: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, path: str) -> None:
        """Keep the first few paths of a kind."""
        paths = self.examples.setdefault(what, [])
        if len(paths) < _EXAMPLES:
            paths.append(path)


@dataclass(slots=True, kw_only=True)
class Tally:
    """All that is kept while files pass by.

    Args:
        splits: What is verified.
        rule: What label maps may hold.
        root: Folder of the data set.
        explains: Whether to guess what the label values, all together, were meant to be.
    """

    splits: Sequence[Split]
    rule: LabelRule
    root: str
    explains: bool = True
    problems: list[Problem] = field(default_factory=list)
    by_split: list[_SplitTally] = field(default_factory=list)
    seen_in_training: dict[bytes, tuple[int, int]] = field(default_factory=dict)
    seen_in_evaluation: dict[bytes, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.by_split = [_SplitTally() for _ in self.splits]

    def add(self, result: Result) -> None:
        """Add what was found about a sample or another file."""
        if result.split is None:
            self.problems += result.problems
            return
        name = self.splits[result.split].name
        self.problems += [problem._replace(split=name) for problem in result.problems]
        tally = self.by_split[result.split]
        for value, count in zip(*(part.tolist() for part in result.counts), strict=True):
            tally.stored[value] += count
        if result.image_kind:
            tally.image_kinds[result.image_kind] += 1
            if result.image_kind != "RGB":
                tally.note(result.image_kind, result.path)
        if result.label_kind:
            tally.label_kinds[result.label_kind] += 1
        if result.orientation:
            tally.orientations[result.orientation] += 1
            tally.note("orientation", result.path)
        if result.is_tiny:
            tally.num_tiny += 1
            tally.note("tiny", result.path)
        if result.digest:
            seen = self.seen_in_evaluation if name.startswith(_EVALUATION) else self.seen_in_training
            where = (result.split, result.place)
            seen[result.digest] = min(where, seen.get(result.digest, where))

    def finish(self) -> Report:
        """Draw conclusions from the counts, and put everything in order."""
        for split, tally in zip(self.splits, self.by_split, strict=True):
            for found in (self._word_images(tally), self._word_classes(tally)):
                self.problems += [problem._replace(split=split.name) for problem in found]
        self.problems += self._word_leaks()
        if self.explains:
            self.problems += self._word_diagnosis()
        # splits may share files, and then their problems
        unique = {(problem.code, problem.path, problem.reason): problem for problem in reversed(self.problems)}
        names = [split.name for split in self.splits]
        order = {name: place for place, name in enumerate(["", *names])}
        return Report(
            dataset=self.rule.taxonomy.name,
            root=self.root,
            taxonomy=self.rule.taxonomy,
            splits=tuple(map(self._summarise, self.splits, self.by_split)),
            problems=tuple(
                sorted(unique.values(), key=lambda problem: (problem.code, order[problem.split], problem.path))
            ),
        )

    def _summarise(self, split: Split, tally: _SplitTally) -> SplitSummary:
        class_pixels, ignored = self._count_classes(tally)
        return SplitSummary(
            name=split.name,
            num_samples=len(split.samples),
            class_pixels=tuple(class_pixels),
            ignored_pixels=ignored,
            image_kinds=dict(tally.image_kinds),
            label_kinds=dict(tally.label_kinds),
        )

    def _count_classes(self, tally: _SplitTally) -> tuple[list[int], int]:
        """Count pixels by train id, and those that are ignored; undefined ids count as neither."""
        class_pixels, ignored = [0] * self.rule.taxonomy.num_classes, 0
        for value, count in tally.stored.items():
            train_id = int(self.rule.label_map[value]) if value in self.rule.values else None
            if train_id == IGNORE_INDEX:
                ignored += count
            elif train_id is not None:
                class_pixels[train_id] += count
        return class_pixels, ignored

    def _word_images(self, tally: _SplitTally) -> Iterator[Problem]:
        for kind, count in sorted(tally.image_kinds.items()):
            # what is not read is an error of every file already, and what has the type of the data set file is meant
            if kind != "RGB" and "32-bit" not in kind and "-channel" not in kind:
                paths = tally.examples[kind]
                yield make_problem(
                    kinds.IMAGE_KIND,
                    min(paths),
                    f"{count:,} of {kind} samples, {_CONVERSIONS.get(kind, 'converted to 8-bit RGB')}: "
                    + _enumerate(paths, count),
                    fix="nothing, if that is meant; otherwise save them as 8-bit RGB",
                )
        if tally.orientations:
            paths, count = tally.examples["orientation"], tally.orientations.total()
            tags = ", ".join(f"{tag}: {number:,}" for tag, number in sorted(tally.orientations.items()))
            yield make_problem(
                kinds.ORIENTATION,
                min(paths),
                f"{count:,} with an orientation ({tags}); rows are taken as stored, "
                f"unless only the upright image has the size of its label map: {_enumerate(paths, count)}",
                fix="look at a few with their labels on top: sizes cannot tell half a turn or a mirror image",
            )
        if tally.num_tiny:
            paths = tally.examples["tiny"]
            yield make_problem(
                kinds.TINY,
                min(paths),
                f"{tally.num_tiny:,} less than {TINY} pixels high or wide, padded in training: "
                + _enumerate(paths, tally.num_tiny),
                fix="leave them out: nearly all of what the network sees of them is padding",
            )

    def _word_classes(self, tally: _SplitTally) -> Iterator[Problem]:
        class_pixels, _ = self._count_classes(tally)
        total = sum(class_pixels)
        if not total:
            return
        classes = self.rule.taxonomy.classes
        absent = [name for name, count in zip(classes, class_pixels, strict=True) if not count]
        if absent:
            yield make_problem(
                kinds.ABSENT_CLASS,
                self.root,
                f"{len(absent)} of {len(classes)} classes never occur: {enumerate_names(absent)}",
                fix="add pictures that show them, or take the classes out of the table",
            )
        largest = max(class_pixels)
        if len(classes) > 1 and largest > _DOMINANT * total:
            name = classes[class_pixels.index(largest)]
            yield make_problem(
                kinds.DOMINANT_CLASS,
                self.root,
                f"class {name} covers {largest / total:.3%} of the labelled pixels",
                fix="check that the ids are the right ones; if so, weigh the classes, or crop around the others",
            )

    def _word_leaks(self) -> Iterator[Problem]:
        for digest, (split, index) in self.seen_in_evaluation.items():
            if digest in self.seen_in_training:
                other_split, other_index = self.seen_in_training[digest]
                other = self.splits[other_split].samples[other_index]
                yield make_problem(
                    kinds.IN_TWO_SPLITS,
                    str(self.splits[split].samples[index].image),
                    f"the same content as {kinds.printable(str(other.image))} of {self.splits[other_split].name}: "
                    "scores on it say nothing",
                    fix="take it out of one of the two",
                )._replace(split=self.splits[split].name)

    def _word_diagnosis(self) -> Iterator[Problem]:
        stored: Counter[int] = Counter()
        for tally in self.by_split:
            stored.update(tally.stored)
        counts = np.zeros(max([self.rule.label_map.size, *(value + 1 for value in stored)]), np.int64)
        counts[list(stored)] = list(stored.values())
        guess = guess_values(counts, rule=self.rule, edges=Edges(0, 0))
        if guess is not None:
            values = word_values(sorted(stored))
            yield make_problem(
                kinds.LABELS_LOOK, self.root, f"all label maps together hold {values}; {guess.words}", fix=guess.fix
            )


def _enumerate(paths: Sequence[str], count: int) -> str:
    shown = sorted(paths)[: _EXAMPLES - 1]
    more = f" and {count - len(shown):,} more" if count > len(shown) else ""
    return ", ".join(map(kinds.printable, shown)) + more
