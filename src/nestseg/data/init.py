"""``data init``: looks at a folder and writes its data set file, with what was concluded and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nestseg.core.disk import replaced_file
from nestseg.core.errors import DataError, NestsegError, SpecError
from nestseg.core.image_io import read_image, read_labels
from nestseg.core.taxonomy import Colour
from nestseg.data.coco import read_json
from nestseg.data.custom import PICTURE_SUFFIXES, CustomDataset, find_files, list_aliases, read_list, walk_files
from nestseg.data.datasets import DATASETS
from nestseg.data.derive import spread_places
from nestseg.data.parquet import ParquetRows, list_columns
from nestseg.data.spec import IGNORE, DatasetSpec, list_colour
from nestseg.data.webdataset import index_shards

FILE_NAME = "dataset.yaml"

MAX_LABELS = 500
"""How many label maps are looked at; an id or colour that occurs in none of them is found by ``data verify``."""

_SPLIT_WORDS: Mapping[str, tuple[str, ...]] = {
    "train": ("training", "train"),
    "val": ("validation", "valid", "val", "dev"),
    "test": ("testing", "test"),
}
_ANY_SPLIT = "|".join(word for words in _SPLIT_WORDS.values() for word in words)
_LABEL_ENDINGS = re.compile(r"[_.-](masks?|labels?|gt|seg|segmentation|annotations?|annot|target|L)$")
_LIKELY = re.compile(r"label|mask|gt|seg|annot|target|class", re.IGNORECASE)
_UNLIKELY = re.compile(r"instance|object|colou?r|panoptic|overlay|vis", re.IGNORECASE)
_NAME_FILES = ("classes.txt", "class_names.txt", "names.txt", "labels.txt", "labelmap.txt")
_MAX_COLOURS = 128
_MAX_PICTURES = 50
_FLAT = 0.7
_PHOTO_SAMPLE = 3


class Inspection(NamedTuple):
    """What was concluded about a folder."""

    spec: DatasetSpec
    conclusions: tuple[tuple[str, str], ...]
    """Field of the file and what was concluded about it, in words."""

    def to_yaml(self) -> str:
        """Write the data set file with the conclusions as comments."""
        header = "# Written by: nestseg data init. Check it: above all the names of the classes.\n"
        blocks = re.split(r"^(?=\w)", self.spec.to_yaml(always=("label_format",)), flags=re.MULTILINE)
        text = header
        for block in filter(None, blocks):
            field = block.partition(":")[0]
            text += "".join(f"# {words}\n" for about, words in self.conclusions if about == field) + block
        return text


class _Labels(NamedTuple):
    """What some label maps hold: pixels by id, and by colour."""

    num_read: int
    ids: Counter[int]
    colours: Counter[Colour]
    colour_of_id: dict[int, Colour]
    num_failed: int
    num_other: int
    """Files that are no PNG."""


class _Match(NamedTuple):
    """A way to tell pictures and label maps by their paths."""

    images: str
    labels: str
    num_pairs: int
    splits: dict[str, str]
    """Folder by split."""


def init_dataset(folder: str | Path, *, out: Path | None = None, overwrite: bool = False) -> tuple[Path, Inspection]:
    """Look at a folder and write its data set file.

    Args:
        folder: The folder of the data set.
        out: The file to write; None means ``dataset.yaml`` in the folder.
        overwrite: Whether a file that exists is replaced.

    Returns:
        The file, and what was concluded.

    Raises:
        SpecError: E-SPEC-020 to E-SPEC-023: a folder that is not there or in which no data set was found; a file that
            exists already or cannot be written.
    """
    file = out or Path(folder) / FILE_NAME
    if file.exists() and not overwrite:
        raise SpecError("E-SPEC-020", "exists already", fix="use it, or write another with --out", path=file)
    inspection = inspect_folder(folder)
    try:
        with replaced_file(file) as temporary:
            temporary.write_text(inspection.to_yaml(), encoding="utf-8")
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        raise SpecError("E-SPEC-021", reason, fix="choose another file with --out", path=file) from error
    return file, inspection


def inspect_folder(folder: str | Path) -> Inspection:
    """Look at a folder: parquet files, tar shards, COCO or labelme files, or pictures and label maps in folders.

    Raises:
        SpecError: E-SPEC-022 if it is not there, E-SPEC-023 if no data set was found in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise SpecError("E-SPEC-022", "no such folder", fix="name the folder that holds your data", path=root)
    files = sorted(walk_files(root, deep=True))
    by_suffix: dict[str, list[str]] = {}
    for name in files:
        by_suffix.setdefault(PurePosixPath(name).suffix.lower(), []).append(name)
    if parquet := by_suffix.get(".parquet"):
        values, words = _inspect_parquet(root, parquet)
    elif shards := by_suffix.get(".tar"):
        values, words = _inspect_shards(root, shards)
    elif (found := _inspect_json(root, by_suffix.get(".json", []), files)) is not None:
        values, words = found
    else:
        values, words = _inspect_pictures(root, files)
    name = re.sub(r"[^a-z0-9._-]+", "-", root.resolve().name.lower()).strip("-._") or "custom"
    spec = DatasetSpec.model_validate({"name": f"my-{name}" if name in DATASETS else name, **values})
    return Inspection(spec, (*words, *_count_samples(spec, root)))


Found = tuple[dict[str, Any], list[tuple[str, str]]]
"""Values of a data set file, and what was concluded."""


def _inspect_parquet(root: Path, names: Sequence[str]) -> Found:
    pattern, splits = _find_container_splits(names, ".parquet")
    files = [root / name for name in names]
    columns = list_columns(files[0])
    label = next((name for name in columns if _LIKELY.search(name) and not _UNLIKELY.search(name)), None)
    image = next((name for name in columns if name != label and re.search("image|img|picture", name)), None)
    image = image or next((name for name in columns if name != label), None)
    label = label or next((name for name in columns if name != image), None)
    if image is None or label is None:
        raise _nothing_found(root, f"parquet files with the columns of pictures: {', '.join(columns) or 'none'}")
    rows = ParquetRows(files, (image, label))
    section = {"files": pattern, "image": image, "label": label}
    words = [
        ("parquet", f"{len(names)} parquet files of {len(rows):,} rows; columns of pictures: {', '.join(columns)}")
    ]
    values, more = _describe_labels(
        _scan_labels(rows.read(place)[1] for place in spread_places(len(rows), MAX_LABELS)), len(rows), root, names
    )
    return {"parquet": section, **values, "splits": splits}, [*words, *more, _word_splits(splits)]


def _inspect_shards(root: Path, names: Sequence[str]) -> Found:
    pattern, splits = _find_container_splits(names, ".tar")
    endings: Counter[str] = Counter()
    import tarfile

    try:
        with tarfile.open(root / names[0], "r:") as tar:
            endings.update(PurePosixPath(info.name).name.partition(".")[2].lower() for info in tar if info.isreg())
    except (OSError, tarfile.TarError) as error:
        raise _nothing_found(root, f"{names[0]}, which is no plain tar file ({error})") from error
    pictures = [ending for ending in endings if f".{ending.rsplit('.')[-1]}" in PICTURE_SUFFIXES]
    labels = [ending for ending in pictures if ending.endswith("png")]
    labels = [ending for ending in labels if _LIKELY.search(ending)] or labels
    images = [ending for ending in pictures if ending not in labels]
    if not images or not labels:
        raise _nothing_found(root, f"shards whose members end in {', '.join(endings)}")
    samples = index_shards([root / name for name in names], image=images, label=labels)
    words = [
        (
            "webdataset",
            f"{len(names)} tar shards of {len(samples):,} samples; members end in {', '.join(sorted(endings))}",
        )
    ]
    places = spread_places(len(samples), MAX_LABELS)
    values, more = _describe_labels(
        _scan_labels(samples[place].label.read() for place in places), len(samples), root, names
    )
    section = {"shards": pattern, "image": images, "label": labels}
    return {"webdataset": section, **values, "splits": splits}, [*words, *more, _word_splits(splits)]


def _find_container_splits(names: Sequence[str], suffix: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """Find a pattern that tells splits by the names of parquet files or shards; else splits by share."""
    patterns: dict[str, set[str]] = {}
    for name in names:
        # the last split word of the path that stands for itself
        matches = list(re.finditer(rf"(?<![a-z])(?:{_ANY_SPLIT})(?![a-z])", name, re.IGNORECASE))
        if not matches:
            folders = {str(PurePosixPath(other).parent) for other in names}
            where = f"{folders.pop()}/" if len(folders) == 1 else "**/"
            return f"{where.removeprefix('./')}*{suffix}", _SHARES
        start, end = matches[-1].span()
        rest = name[end:]
        rest = f"*{suffix}" if "/" not in rest else f"/**/*{suffix}"
        patterns.setdefault(f"{name[:start]}{{split}}{rest}", set()).add(name[start:end])
    pattern, words = max(patterns.items(), key=lambda item: len(item[1]))
    splits = {_canonical(word): _folder_of(word) for word in sorted(words, key=_rank)}
    return pattern, splits if len(splits) > 1 else _SHARES if len(patterns) == 1 else splits


_SHARES: dict[str, dict[str, Any]] = {"train": {"share": 0.8}, "val": {"share": 0.2}}


def _canonical(word: str) -> str:
    return next((name for name, words in _SPLIT_WORDS.items() if word.lower() in words), word.lower())


def _folder_of(word: str) -> dict[str, Any]:
    return {} if _canonical(word) == word else {"folder": word}


def _rank(word: str) -> int:
    return list(_SPLIT_WORDS).index(_canonical(word))


def _word_splits(splits: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    if any("share" in section for section in splits.values()):
        return "splits", "nothing says what is trained on and what is scored: four fifths and one fifth, by split_seed"
    if any("list" in section for section in splits.values()):
        lists = ", ".join(str(section["list"]) for section in splits.values())
        return "splits", f"lists of samples: {lists}"
    folders = ", ".join(str(section.get("folder", name)) for name, section in splits.items())
    return "splits", f"told by their paths: {folders}"


def _inspect_json(root: Path, names: Sequence[str], files: Sequence[str]) -> Found | None:
    """Look for the JSON of COCO or labelme; None if there is neither."""
    coco: dict[str, dict[str, Any]] = {}
    labelme: dict[str, Counter[str]] = {}
    for name in names[:MAX_LABELS]:
        try:
            values = read_json(root / name)
        except DataError:
            continue
        if all(isinstance(values.get(key), list) for key in ("images", "annotations", "categories")):
            # captions and key points have the same lists
            if any(isinstance(entry, dict) and "segmentation" in entry for entry in values["annotations"][:10]):
                coco[name] = values
        elif isinstance(values.get("shapes"), list):
            labels = (str(shape.get("label")) for shape in values["shapes"] if isinstance(shape, dict))
            labelme[name] = Counter(labels)
    if coco:
        return _describe_coco(root, coco, files)
    if labelme:
        return _describe_labelme(root, labelme, len(names), files)
    return None


def _describe_coco(root: Path, found: Mapping[str, dict[str, Any]], files: Sequence[str]) -> Found:
    template, splits = _find_template(list(found))
    chosen = {name: values for name, values in found.items() if _fits(name, template)}
    name, values = next(iter(chosen.items()))
    wanted = [str(image.get("file_name")) for image in values["images"][:20] if isinstance(image, dict)]
    folders = _parents(files)
    word = next((folder for folder in splits.values() if template.replace("{split}", folder) == name), None)
    # pictures of one split may have the names of another's
    likely = sorted(folders, key=lambda folder: (word is not None and word not in folder, len(folder)))
    holding = [folder for folder in likely if all((root / folder / file).is_file() for file in wanted)]
    if not holding:
        raise _nothing_found(root, f"{name} of COCO, but no folder with its pictures, such as {wanted[:1]}")
    images = holding[0]
    if word is not None:
        images = next((made for made in _put_split(images, word, folders)), images)
    names = list(dict.fromkeys(str(entry.get("name")) for entry in values["categories"] if isinstance(entry, dict)))
    classes, unannotated, ignored = _classes_of_labels(names)
    result: dict[str, Any] = {
        "files": {"images": images, "labels": template},
        "label_format": "coco",
        "classes": classes,
        "unannotated": unannotated,
        "splits": {split: _folder_of(folder) for split, folder in splits.items()} or _SHARES,
    }
    words = [
        ("files", f"{len(chosen)} JSON files of COCO; {name} lists {len(values['images']):,} pictures, in {images}"),
        ("classes", f"the {len(names)} categories of {name}, and what lies between them"),
        _word_splits(result["splits"]),
    ]
    return result | ({"ignore_labels": ignored} if ignored else {}), words


def _describe_labelme(root: Path, found: Mapping[str, Counter[str]], num_files: int, files: Sequence[str]) -> Found:
    match = _match_files([*found], [name for name in files if _is_picture(name)], root)
    if match is None:
        raise _nothing_found(root, f"{len(found)} files of labelme, but no pictures of the same names")
    labels: Counter[str] = sum(found.values(), Counter())
    classes, unannotated, ignored = _classes_of_labels(sorted(labels))
    splits = {split: _folder_of(folder) for split, folder in match.splits.items()} or _SHARES
    result = {
        "files": {"images": match.images, "labels": match.labels},
        "label_format": "labelme",
        "classes": classes,
        "unannotated": unannotated,
        "splits": splits,
    }
    seen = f"{len(found):,} of {num_files:,}" if num_files > len(found) else f"{num_files:,}"
    words = [
        ("files", f"{seen} JSON files of labelme, with pictures of the same names"),
        ("classes", f"labels of {sum(labels.values()):,} shapes, and what lies between them"),
        _word_splits(splits),
    ]
    return result | ({"ignore_labels": ignored} if ignored else {}), words


def _classes_of_labels(labels: Iterable[str]) -> tuple[list[dict[str, Any]], str, list[str]]:
    """Make classes of names of regions: the classes, that of pixels in no region, and names to ignore."""
    names = list(labels)
    ignored = [name for name in names if name.strip("_").lower() in {"ignore", "void", "unlabeled", "unlabelled"}]
    background = next((name for name in names if name.strip("_").lower() == "background"), None)
    classes: list[dict[str, Any]] = [{"name": "background"}]
    if background not in {None, "background"}:
        classes[0]["labels"] = ["background", background]
    classes += [{"name": name} for name in names if name not in {*ignored, background}]
    return classes, "background", ignored


def _inspect_pictures(root: Path, files: Sequence[str]) -> Found:
    pictures = [name for name in files if _is_picture(name)]
    match = _match_files(pictures, pictures, root)
    if match is None:
        counts = Counter(f"{PurePosixPath(name).parent}/*{PurePosixPath(name).suffix}" for name in files)
        seen = ", ".join(f"{count:,} {pattern}" for pattern, count in counts.most_common(8))
        raise _nothing_found(root, seen or "nothing")
    values: dict[str, Any] = {"files": {"images": match.images, "labels": match.labels}}
    words = [("files", f"{match.num_pairs:,} pictures have a label map of the same name")]
    splits = {split: _folder_of(folder) for split, folder in match.splits.items()}
    labels: list[Path] = []
    for folder in match.splits.values() or [""]:
        every = find_files(root, match.labels.replace("{split}", folder), suffixes=PICTURE_SUFFIXES)
        labels += [paths[0] for paths in every.values()]
    if not splits:
        splits = _find_lists(root, match, files) or _SHARES
    images: list[Path] = []
    for folder in match.splits.values() or [""]:
        every = find_files(root, match.images.replace("{split}", folder), suffixes=PICTURE_SUFFIXES)
        images += [paths[0] for paths in every.values()]
    if (num_deep := _count_deep_grey(images)) > 0:
        values |= {"channels": 1, "dtype": "uint16"}
        words.append(("dtype", f"all of {num_deep} pictures are 16-bit grey: read with all their bits, as one channel"))
    scanned = _scan_labels(labels[place] for place in spread_places(len(labels), MAX_LABELS))
    described, more = _describe_labels(scanned, len(labels), root, files)
    return {**values, **described, "splits": splits}, [*words, *more, _word_splits(splits)]


def _count_deep_grey(images: Sequence[Path]) -> int:
    """Look at some pictures: how many they are if all are 16-bit grey, else 0."""
    chosen = [images[place] for place in spread_places(len(images), _MAX_PICTURES)]
    for path in chosen:
        try:
            # only the header is read
            with Image.open(path) as image:
                if not image.mode.startswith("I;16"):
                    return 0
        except (OSError, SyntaxError, ValueError):
            return 0
    return len(chosen)


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in PICTURE_SUFFIXES


def _parents(files: Iterable[str]) -> set[str]:
    return {str(parent) for name in files for parent in PurePosixPath(name).parents}


def _put_split(folder: str, word: str, folders: set[str]) -> Iterator[str]:
    """Yield the folder with ``{split}`` for a split's word, where another split's folder is there too."""
    for match in re.finditer(re.escape(word), folder):
        before, after = folder[: match.start()], folder[match.end() :]
        others = [other for words in _SPLIT_WORDS.values() for other in words if other != word]
        if any(f"{before}{other}{after}" in folders for other in others):
            yield f"{before}{{split}}{after}"


def _find_template(names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Find a path with ``{split}`` that most names fit, and the folder by split; without splits the first name."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for match in re.finditer(_ANY_SPLIT, name):
            template = f"{name[: match.start()]}{{split}}{name[match.end() :]}"
            found.setdefault(template, {})[_canonical(match.group())] = match.group()
    template, splits = max(found.items(), key=lambda item: len(item[1]), default=("", {}))
    if len(splits) < 2:
        return names[0], {}
    return template, dict(sorted(splits.items(), key=lambda item: list(_SPLIT_WORDS).index(item[0])))


def _fits(name: str, template: str) -> bool:
    before, _, after = template.partition("{split}")
    return name == template or (name.startswith(before) and name.endswith(after))


class _Group(NamedTuple):
    """Files of a folder that have the same suffix, ``{split}`` standing for splits."""

    folder: str
    suffix: str
    names: dict[str, list[str]]
    """Stems by split's word, "" where there are no splits."""

    @property
    def top(self) -> str:
        """First folder of its path, and suffix: such files are named alike."""
        return f"{self.folder.split('/')[0]}/*{self.suffix}"

    @property
    def stems(self) -> set[tuple[str, str]]:
        """(word of the split, stem) of every file."""
        return {(word, stem) for word, stems in self.names.items() for stem in stems}


class _Candidate(NamedTuple):
    """A group of pictures and one of labels, and how their stems end."""

    rank: tuple[float, ...]
    image: _Group
    image_ending: str
    label: _Group
    label_ending: str
    num_pairs: int

    @property
    def names(self) -> tuple[str, str]:
        """Last part of both folders."""
        return PurePosixPath(self.image.folder).name, PurePosixPath(self.label.folder).name

    @property
    def parents(self) -> tuple[str, str]:
        """What both folders lie in."""
        return str(PurePosixPath(self.image.folder).parent), str(PurePosixPath(self.label.folder).parent)

    def is_named_like(self, other: _Candidate) -> bool:
        """Whether both tell files by the same endings."""
        mine, theirs = (
            (one.image_ending, one.label_ending, one.image.suffix, one.label.suffix) for one in (self, other)
        )
        return mine == theirs


def _match_files(labels: Sequence[str], pictures: Sequence[str], root: Path) -> _Match | None:
    """Find the folders and endings by which pictures and labels belong together."""
    folders = _parents([*labels, *pictures])
    image_groups, label_groups = (_group_files(names, folders) for names in (pictures, labels))
    flat: dict[tuple[str, str], float] = {}
    candidates: list[_Candidate] = []
    by_top: dict[str, list[str]] = {}
    for group in image_groups:
        by_top.setdefault(group.top, []).extend(stem for _, stem in group.stems)
    shared = {top: _shared_ending(stems) for top, stems in by_top.items()}
    for image in image_groups:
        for label in label_groups:
            for image_ending, label_ending, count in _find_endings(image, label, shared[image.top]):
                if label.suffix in PICTURE_SUFFIXES:
                    sides = ((image, image_ending), (label, label_ending))
                    for group, ending in sides:
                        if (group.folder + group.suffix, ending) not in flat:
                            flat[group.folder + group.suffix, ending] = _measure_flatness(root, group, ending)
                    image_flat, label_flat = (flat[group.folder + group.suffix, ending] for group, ending in sides)
                    if label_flat < _FLAT or label_flat <= image_flat:
                        continue
                where = f"{label.folder}/{label_ending}"
                likely = bool(_LIKELY.search(where)) - 2 * bool(_UNLIKELY.search(where))
                rank = (float(count), float(likely), -float(len(where)))
                candidates.append(_Candidate(rank, image, image_ending, label, label_ending, count))
    if not candidates:
        return None
    best = max(candidates, key=lambda candidate: candidate.rank)
    # folders side by side: cities, patients, videos; pictures of one may have the names of another's labels
    beside = [
        other
        for other in candidates
        if other.is_named_like(best) and len(set(other.names)) == 1 and other.parents == best.parents
    ]
    image_folder, label_folder = best.image.folder, best.label.folder
    if len(beside) > 1:
        image_folder, label_folder = (f"{folder}/{{folder}}".removeprefix("./") for folder in best.parents)
    else:
        beside = [best]
    words = {word for other in beside for word in set(other.image.names) & set(other.label.names) if word}
    return _Match(
        _join(image_folder, best.image_ending, best.image.suffix),
        _join(label_folder, best.label_ending, best.label.suffix),
        sum(other.num_pairs for other in beside),
        {_canonical(word): word for word in sorted(words, key=_rank)},
    )


def _join(folder: str, ending: str, suffix: str) -> str:
    return f"{folder}/{{stem}}{ending}{suffix}".removeprefix("./")


def _group_files(names: Sequence[str], folders: set[str]) -> list[_Group]:
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for name in names:
        path = PurePosixPath(name)
        folder, word = _name_split(path.parent, folders)
        groups.setdefault((folder, path.suffix.lower()), {}).setdefault(word, []).append(path.stem)
    return [_Group(folder, suffix, stems) for (folder, suffix), stems in groups.items()]


def _name_split(folder: PurePosixPath, folders: set[str]) -> tuple[str, str]:
    """Put ``{split}`` into the uppermost part of a folder's path of which another split has its own."""
    for ancestor in (*reversed(folder.parents), folder):
        for match in re.finditer(_ANY_SPLIT, ancestor.name):
            prefix = str(ancestor.parent / ancestor.name[: match.start()]) if match.start() else f"{ancestor.parent}/"
            full = f"{prefix}{match.group()}{ancestor.name[match.end() :]}".removeprefix("./")
            for template in _put_split(full, match.group(), folders):
                rest = folder.relative_to(ancestor)
                return str(PurePosixPath(template) / rest), match.group()
    return str(folder), ""


def _find_endings(image: _Group, label: _Group, shared: str) -> Iterator[tuple[str, str, int]]:
    """Find what stems end in, such that the rest of a picture's is that of a label's; with the number of pairs.

    Args:
        image: Pictures.
        label: Labels, maybe among other files.
        shared: What the stems of pictures may end in.
    """
    label_stems = label.stems
    for image_ending in dict.fromkeys(("", shared)):
        stems = {(word, stem.removesuffix(image_ending)) for word, stem in image.stems if stem.endswith(image_ending)}
        endings: Counter[str] = Counter()
        by_word = {word: sorted(stems) for word, stems in label.names.items()}
        for word, stem in sorted(stems)[:: max(1, len(stems) // 50)]:
            endings.update({other[len(stem) :] for other in by_word.get(word, ()) if other.startswith(stem)})
        for ending in endings:
            if ending and not re.match(r"[_.-]", ending):
                continue
            if image.folder == label.folder and image.suffix == label.suffix and not _LABEL_ENDINGS.search(ending):
                continue
            matched = sum((word, stem + ending) in label_stems for word, stem in stems)
            if 2 * matched >= min(len(stems), sum(stem.endswith(ending) for _, stem in label_stems)):
                yield image_ending, ending, matched


def _shared_ending(stems: Iterable[str]) -> str:
    """Return what all stems end in, from a separator on and without numbers, which are alike by chance."""
    first, *others = sorted(set(stems))
    for match in re.finditer(r"[_.-]", first) if others else ():
        ending = first[match.start() :]
        numbered = any(part.isdigit() for part in re.split(r"[_.-]", ending))
        if match.start() and not numbered and all(stem.endswith(ending) for stem in others):
            return ending
    return ""


def _measure_flatness(root: Path, group: _Group, ending: str) -> float:
    """Return the share of pixels that equal their left neighbour: near 1 in label maps, far below in photos."""
    shares: list[float] = []
    for word, stem in sorted(group.stems):
        if not stem.endswith(ending) or len(shares) == _PHOTO_SAMPLE:
            continue
        folder = root / group.folder.replace("{split}", word)
        for path in sorted(folder.glob(f"{_escape(stem)}.*")):
            if path.suffix.lower() == group.suffix:
                try:
                    image = read_image(path)
                except DataError:
                    continue
                same = (image[:, 1:] == image[:, :-1]).all(axis=2)
                shares.append(float(same.mean()) if same.size else 0.0)
    return float(np.median(shares)) if shares else 0.0


def _escape(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _find_lists(root: Path, match: _Match, files: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Find text files that list the samples of splits; the folder is chosen whose lists name the most pairs."""
    images, labels = (
        find_files(root, template, suffixes=PICTURE_SUFFIXES) for template in (match.images, match.labels)
    )
    aliases = list_aliases(root, images, labels)
    found: dict[str, dict[str, tuple[str, int]]] = {}
    for name in files:
        path = PurePosixPath(name)
        if path.suffix.lower() != ".txt" or path.stem.lower() not in _ANY_SPLIT.split("|"):
            continue
        keys, problems = read_list(root / name, aliases)
        whole = [key for key in keys if key in images and key in labels]
        if keys and not problems and len(whole) == len(keys):
            found.setdefault(str(path.parent), {})[_canonical(path.stem)] = (name, len(keys))
    usable = [lists for lists in found.values() if "train" in lists and len(lists) > 1]
    if not usable:
        return {}
    best = max(usable, key=lambda lists: sum(count for _, count in lists.values()))
    return {split: {"list": best[split][0]} for split in _SPLIT_WORDS if split in best}


def _scan_labels(contents: Iterable[Path | bytes]) -> _Labels:
    """Count the ids and colours of label maps; damaged ones are left to ``data verify``."""
    ids: Counter[int] = Counter()
    colours: Counter[Colour] = Counter()
    colour_of_id: dict[int, Colour] = {}
    num_read = num_failed = num_other = 0
    for content in contents:
        try:
            labels = _read_ids(content)
            # decoded again as a picture for its colours, if they may be news
            is_news = labels is None or not set(np.unique(labels).tolist()) <= set(colour_of_id)
            image = read_image(content, exif="ignore") if is_news else None
        except DataError:
            num_failed += 1
            continue
        head = content[:8] if isinstance(content, bytes) else content.read_bytes()[:8]
        num_read += 1
        num_other += not head.startswith(b"\x89PNG")
        if labels is not None:
            counts = np.bincount(labels.ravel(), minlength=256)
            ids.update({int(value): int(counts[value]) for value in np.flatnonzero(counts)})
            if image is not None:
                values, first = np.unique(labels, return_index=True)
                for value, (red, green, blue) in zip(
                    values.tolist(), image.reshape(-1, 3)[first].tolist(), strict=True
                ):
                    colour_of_id.setdefault(value, (red, green, blue))
        elif image is not None and len(colours) <= 4 * _MAX_COLOURS:
            flat, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
            for (red, green, blue), count in zip(flat.tolist(), counts.tolist(), strict=True):
                colours[red, green, blue] += count
    return _Labels(num_read, ids, colours, colour_of_id, num_failed, num_other)


def _read_ids(content: Path | bytes) -> NDArray[np.uint8] | None:
    """Read a label map of ids; None for other pictures."""
    try:
        return read_labels(content)
    except DataError:
        return None


def _describe_labels(scanned: _Labels, total: int, root: Path, files: Sequence[str]) -> Found:
    """Say what label maps mean, from what they hold."""
    seen = (
        f"of {scanned.num_read:,} of {total:,} label maps" if scanned.num_read < total else f"of {total:,} label maps"
    )
    if not scanned.num_read:
        raise _nothing_found(root, f"{total:,} label maps, none of which can be read")
    words = []
    if scanned.num_failed:
        words.append(("label_format", f"{scanned.num_failed:,} label maps cannot be read: see nestseg data verify"))
    if scanned.num_other:
        words.append(("label_format", f"{scanned.num_other:,} label maps are no PNG files: those cannot be used"))
    names, named_colours = _read_names(root, files)
    if scanned.colours and sum(scanned.colours.values()) >= sum(scanned.ids.values()):
        values, more = _describe_colours(scanned, seen, root=root, named=named_colours)
    else:
        values, more = _describe_ids(scanned, seen, names)
    return values, [*words, *more]


def _describe_ids(scanned: _Labels, seen: str, names: Sequence[str]) -> Found:
    ids = sorted(scanned.ids)
    indexed = any(len(set(colour)) > 1 for colour in scanned.colour_of_id.values())
    if set(ids) == {0, 255} and not indexed:
        return {"label_format": "binary", "classes": ["background", "object"]}, [
            ("label_format", f"values {seen} are 0 and 255 alone: black is one class, white the other")
        ]
    words = [("label_format", f"ids {seen}: {', '.join(map(str, ids[:30]))}{', ...' if len(ids) > 30 else ''}")]
    values: dict[str, Any] = {"label_format": "ids"}
    meant = [value for value in ids if value != 255 or len(names) > 255]
    if 255 in ids and 255 not in meant:
        share = scanned.ids[255] / sum(scanned.ids.values())
        values["label_map"] = {255: IGNORE}
        words.append(("label_map", f"255 covers {share:.1%} of the pixels: ignored, as in most data sets"))
    if not meant:
        meant = [0]
    count = max(len(names), meant[-1] + 1) if meant[-1] < max(2 * len(meant), len(names)) else 0
    chosen = list(range(count)) if count and meant[0] == 0 else meant
    classes: list[Any] = []
    for index, value in enumerate(chosen):
        entry: dict[str, Any] = {"name": names[value] if value < len(names) else f"class_{value}"}
        if chosen != list(range(len(chosen))):
            entry["ids"] = [value]
        colour = scanned.colour_of_id.get(value)
        if indexed and colour and colour != list_colour(index):
            entry["colour"] = list(colour)
        classes.append(entry)
    absent = [str(value) for value in chosen if value not in ids]
    if absent:
        words.append(("classes", f"ids that none of them holds: {', '.join(absent[:20])}"))
    words.append(
        (
            "classes",
            f"{len(chosen)} classes, one an id; names from {'a file of names' if names else 'nowhere: write your own'}",
        )
    )
    return {**values, "classes": classes}, words


def _describe_colours(scanned: _Labels, seen: str, *, root: Path, named: Mapping[Colour, str]) -> Found:
    # grey label maps among coloured ones count as colours
    found = set(scanned.colours) | {(value, value, value) for value in scanned.ids}
    if found <= {(0, 0, 0), (255, 255, 255)}:
        return {"label_format": "binary", "classes": ["background", "object"]}, [
            ("label_format", f"colours {seen} are black and white alone: black is one class, white the other")
        ]
    if len(found) > _MAX_COLOURS:
        reason = f"label maps with more than {_MAX_COLOURS} colours: smoothed, resized or saved as JPEG"
        raise _nothing_found(root, reason)
    words = [("label_format", f"{len(found)} colours {seen}")]
    origin = "a file of names"
    if not named:
        for name, dataset in DATASETS.items():
            palette = dict(zip(dataset.taxonomy.palette, dataset.taxonomy.classes, strict=True))
            if len(found & set(palette)) > max(1, len(found & set(named)), len(found) // 2):
                named, origin = palette, f"the palette of {name}"
    strange = sorted(found - set(named))
    classes: list[dict[str, Any]] = [{"name": name, "colour": list(colour)} for colour, name in named.items()]
    classes += [{"name": "colour_" + "_".join(map(str, colour)), "colour": list(colour)} for colour in strange]
    names = f"names from {origin}" if named else "names from nowhere: write your own"
    words.append(("classes", f"one class a colour; {names}; move a colour that means nothing to ignore_colours"))
    return {"label_format": "colours", "classes": classes}, words


def _read_names(root: Path, files: Sequence[str]) -> tuple[list[str], dict[Colour, str]]:
    """Read class names: one a line, or ``name:red,green,blue``."""
    for name in files:
        if PurePosixPath(name).name.lower() not in _NAME_FILES:
            continue
        text = (root / name).read_text(encoding="utf-8-sig", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
        matches = [re.match(r"([^:]+):\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)", line) for line in lines]
        if lines and all(matches):
            return [], {(int(match[2]), int(match[3]), int(match[4])): match[1].strip() for match in matches if match}
        names = [re.sub(r"^\d+\s*[:,]\s*", "", line) for line in lines]
        if 1 < len(names) == len(set(names)) <= 255 and IGNORE not in names:
            return names, {}
    return [], {}


def _count_samples(spec: DatasetSpec, root: Path) -> Iterator[tuple[str, str]]:
    """Open every split as training will, and say how many samples it has."""
    for split in spec.splits:
        try:
            yield "splits", f"{split}: {len(CustomDataset(spec, root, split)):,} samples"
        except NestsegError as error:
            yield "splits", f"{split} cannot be opened yet: {error.reason}"


def _nothing_found(root: Path, seen: str) -> SpecError:
    return SpecError(
        "E-SPEC-023",
        f"no data set found; there is: {seen}",
        fix="put pictures and PNG label maps of the same names into two folders, such as images and masks; or write "
        "the data set file yourself, see docs/tutorials/your-own-data.md",
        path=root,
    )
