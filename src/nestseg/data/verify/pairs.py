"""The samples of each split, whole or not, and what is wrong with their names."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nestseg.core.errors import DataError
from nestseg.data.custom import CustomDataset
from nestseg.data.dataset import FileDataset, LayoutError, PairsError, SampleFiles
from nestseg.data.verify import problems as kinds
from nestseg.data.verify.problems import Problem, make_problem, printable


class Split(NamedTuple):
    """A split to verify: what was found of its samples, and what was wrong before any file was opened."""

    name: str
    samples: Sequence[SampleFiles]
    problems: Sequence[Problem] = ()


def collect_splits(names: Iterable[str], open_split: Callable[[str], FileDataset | CustomDataset]) -> list[Split]:
    """List the samples of every split, those that are not whole included.

    A split of which nothing of its own is there is left out with a warning, unless none is there.

    Args:
        names: The splits.
        open_split: Opens one, or raises as `FileDataset` does.
    """
    names = list(names)
    splits: list[Split] = []
    layouts: dict[str, LayoutError] = {}
    for name in names:
        try:
            dataset = open_split(name)
            splits.append(Split(name, [SampleFiles(*pair) for pair in dataset.pairs]))
        except LayoutError as error:
            layouts[name] = error
        except PairsError as error:
            splits.append(Split(name, error.samples, _find_causes(error)))
        except DataError as error:
            splits.append(Split(name, (), (_from_error(error),)))
    first_files = [
        path for split in splits if split.samples for path in (split.samples[0].image, split.samples[0].label) if path
    ]
    for name, layout in layouts.items():
        absent = len(layouts) < len(names) and _is_absent(layout, first_files)
        problem = _from_error(layout, kinds.ABSENT_SPLIT if absent else kinds.LAYOUT)
        splits.append(Split(name, (), (problem,)))
    return sorted(splits, key=lambda split: names.index(split.name))


def _is_absent(error: LayoutError, first_files: Sequence[Path]) -> bool:
    """Say whether nothing of a split is there but what other splits, by their first files, share with it."""
    present = [Path(str(error.path)) / entry for entry in error.expected if entry not in error.missing]
    return all(any(path.is_relative_to(entry) for path in first_files) for entry in present)


def check_names(split: Split) -> Iterator[Problem]:
    """Find samples that are not whole, and names that other tools or file systems stumble over."""
    lone_labels = {
        _fold(sample.name): sample for sample in split.samples if sample.image is None and sample.label is not None
    }
    folded: dict[str, SampleFiles] = {}
    matched: set[str] = set()
    for sample in split.samples:
        path = str(sample.image or sample.label or sample.name)
        key = _fold(sample.name)
        yield from _check_name(path, sample.name)
        if sample.image is None and sample.label is None:
            yield make_problem(
                kinds.NO_FILES, path, "neither image nor label map of this name", fix="take it out of the list"
            )
        elif sample.label is None and key in lone_labels:
            label = lone_labels[key].label
            matched.add(key)
            yield make_problem(
                kinds.NAMES_DIFFER,
                path,
                f"its label map is {printable(label.name) if label else ''}: case or Unicode form differ",
                fix="give both the same name, in the same case and Unicode form (NFC)",
            )
        elif sample.label is None:
            yield make_problem(
                kinds.NO_LABEL, path, "image without label map", fix="add the label map, or remove the image"
            )
        elif sample.image is not None and key in folded:
            yield make_problem(
                kinds.CLASHING_NAMES,
                path,
                f"differs from {printable(folded[key].name)} in case or Unicode form alone",
                fix="rename one of them",
            )
        elif sample.image is not None:
            folded[key] = sample
    for key, sample in lone_labels.items():
        if key not in matched:
            yield make_problem(
                kinds.NO_IMAGE,
                str(sample.label),
                "label map without image",
                fix="add the image, or remove the label map",
            )


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _check_name(path: str, name: str) -> Iterator[Problem]:
    reasons = []
    if not name.isprintable():
        reasons.append("holds control characters, line ends or bytes that are not UTF-8")
    elif name != name.strip() or any(part != part.strip() for part in (Path(path).name, Path(path).stem)):
        reasons.append("starts or ends with blanks")
    if name.startswith("-"):
        reasons.append("starts with a dash, which programs take for an option")
    if not unicodedata.is_normalized("NFC", name):
        reasons.append("has accents as characters of their own (Unicode NFD), which looks like another name")
    if reasons:
        yield make_problem(kinds.ODD_NAME, path, f"name {'; '.join(reasons)}", fix="rename image and label map")


def _from_error(error: DataError, kind: kinds.Kind = kinds.LAYOUT) -> Problem:
    path = "" if error.path is None else str(error.path)
    return make_problem(kind, path, error.reason, fix=error.fix)


def _find_causes(error: PairsError) -> list[Problem]:
    """Word what was wrong with lists and stems; samples that are not whole are found by `check_pairs`."""
    found = [_from_error(cause, kinds.LIST) for cause in error.causes if cause.code != "E-DATA-023"]
    for paths in error.repeated:
        found += [
            make_problem(
                kinds.REPEATED,
                str(path),
                f"has the stem of {paths[0].name}",
                fix="keep one file of each stem, whatever its suffix",
            )
            for path in paths[1:]
        ]
    return found
