"""A data set of your own: whatever a data set file describes, as pictures with train ids."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError, nearest
from nestseg.core.image_io import read_image, read_labels
from nestseg.core.taxonomy import Colour, Taxonomy
from nestseg.core.types import IGNORE_INDEX, AbsentRule, Sample, Size
from nestseg.data.coco import CocoImage, read_coco
from nestseg.data.dataset import Pair, SegmentationDataset, match_pairs
from nestseg.data.derive import DatasetFacts, spread_places
from nestseg.data.labelme import read_labelme
from nestseg.data.parquet import ParquetRows
from nestseg.data.spec import DatasetSpec
from nestseg.data.webdataset import Member, index_shards

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""What files of pictures and label maps end in; in any case."""

_PNG = b"\x89PNG\r\n\x1a\n"
_NAMELESS = "<bytes>"


class Cell(NamedTuple):
    """A value of a parquet file."""

    rows: ParquetRows
    row: int
    column: int

    def read(self) -> bytes:
        """Read it, see `ParquetRows.read`."""
        return self.rows.read(self.row)[self.column]

    def __str__(self) -> str:
        return self.rows.names[self.row]


class CustomSample(NamedTuple):
    """Where a sample is."""

    name: str
    image: Path | Member | Cell
    label: Path | Member | Cell | CocoImage


@final
class CustomDataset(SegmentationDataset):
    """The data set that a data set file describes.

    Args:
        spec: The description.
        root: Folder of the data set; paths of the description are relative to it.
        split: One of the description's splits.

    Raises:
        DataError: For a folder or list that is not there or makes no sense, and samples that are not whole.
    """

    taxonomy: Taxonomy  # type: ignore[misc]  # a class attribute elsewhere: only here two data sets share a class
    splits: tuple[str, ...]  # type: ignore[misc]
    terms: str  # type: ignore[misc]
    absent_classes: AbsentRule  # type: ignore[misc]
    official_counts: ClassVar[Mapping[str, int]] = {}

    def __init__(self, spec: DatasetSpec, root: str | Path | None, split: str) -> None:
        self.spec, self.split = spec, split
        self.taxonomy, self.splits = spec.taxonomy, tuple(spec.splits)
        self.terms, self.absent_classes = spec.licence, spec.absent_classes
        if split not in spec.splits:
            raise DataError(
                "E-DATA-038",
                f"split {split!r}; allowed: {', '.join(spec.splits)}",
                fix=nearest(split, spec.splits),
                path=spec.name,
            )
        if root is None:
            raise DataError(
                "E-DATA-039", "no folder given", fix="name the folder of the data set with --data", path=spec.name
            )
        try:
            self._samples = tuple(_find_samples(spec, Path(root), split))
        except OSError as error:
            reason = f"cannot be read: {error.strerror}"
            raise DataError("E-DATA-039", reason, fix="check path and permissions", path=error.filename) from error
        if not self._samples:
            raise DataError(
                "E-DATA-040",
                f"split {split} of {spec.name} holds no samples",
                fix="check the paths and splits of the data set file, or let one be written by: nestseg data init",
                path=root,
            )
        self._table, self._meanings = spec.make_id_table(), spec.class_of_id

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The files of every sample, by index, where each has a picture file and a label map file of its own."""
        if self.spec.label_format == "labelme":
            return ()
        return tuple(
            Pair(name, image, label)
            for name, image, label in self._samples
            if isinstance(image, Path) and isinstance(label, Path)
        )

    @property
    def label_map(self) -> NDArray[np.uint8]:
        """Train id, or 255, by stored id; of coloured label maps the stored ids are the train ids.

        Shape:
            - returns: (65536,) uint8
        """
        if self.colours is None:
            return self._table
        table = np.full(self._table.size, IGNORE_INDEX, np.uint8)
        table[: self.taxonomy.num_classes] = np.arange(self.taxonomy.num_classes)
        return table

    @property
    def label_values(self) -> frozenset[int]:
        """Stored ids that have a meaning, ignored ones included."""
        if self.colours is None:
            return frozenset(self._meanings)
        return frozenset(self.colours.values())

    @property
    def colours(self) -> dict[Colour, int] | None:
        """Stored id by colour where label maps hold colours or black and white; None where they hold ids."""
        return self.spec.class_of_colour if self.spec.label_format in {"colours", "binary"} else None

    def name(self, index: int) -> str:
        """Return a sample's name, see `SegmentationDataset.name`."""
        return self._samples[index].name

    def read(self, index: int) -> Sample:
        """Read one sample, see `SegmentationDataset.read`.

        Shape:
            - returns.image: (H, W, 3) uint8 RGB
            - returns.target: (H, W) uint8 train ids in [0, K) or 255 (ignored)
        """
        sample = self._samples[index]
        if isinstance(sample.label, CocoImage):
            image = self._read_image(sample.image, size=sample.label.size)
            return Sample(image=image, target=sample.label.draw(unannotated=self.spec.unannotated_id))
        if self.spec.label_format == "labelme":
            assert isinstance(sample.label, Path), "only files hold labelme's JSON"
            outlines = read_labelme(sample.label, self.spec)
            image = self._read_image(sample.image, size=outlines.size)
            height, width = image.shape[:2]
            target = outlines.draw(size=(height, width), unannotated=self.spec.unannotated_id)
            return Sample(image=image, target=target)
        with _naming(sample.label):
            content = sample.label if isinstance(sample.label, Path) else sample.label.read()
            if self.spec.label_format == "ids":
                target = self._map_ids(content, where=sample.label)
            else:
                target = self._map_colours(content, where=sample.label)
        height, width = target.shape
        return Sample(image=self._read_image(sample.image, size=(height, width)), target=target)

    def measure(self, *, max_images: int = 64) -> DatasetFacts:
        """Count the samples and measure some of their pictures, evenly spread.

        Args:
            max_images: How many pictures are read at most.

        Raises:
            DataError: If one of them cannot be read.
        """
        places = spread_places(len(self), max_images)
        sizes = [self._read_image(self._samples[place].image, size=None).shape[:2] for place in places]
        return DatasetFacts.from_sizes([(height, width) for height, width in sizes], num_images=len(self))

    def _read_image(self, source: Path | Member | Cell, *, size: Size | None) -> NDArray[np.uint8]:
        """Read a picture as stored, or upright by its EXIF orientation if only that has the size of its labels."""
        with _naming(source):
            content = source if isinstance(source, Path) else source.read()
            image = read_image(content, exif="ignore", channels=self.spec.channels, dtype=self.spec.dtype)
            height, width = image.shape[:2]
            if size == (width, height) and height != width:
                image = read_image(content, exif="apply", channels=self.spec.channels, dtype=self.spec.dtype)
        if size is not None and image.shape[:2] != size:
            raise DataError(
                "E-DATA-044",
                f"picture of {height}x{width}, but its labels are {size[0]}x{size[1]}",
                fix="restore the original pair; never resize a label map to fit",
                path=str(source),
            )
        return image

    def _map_ids(self, content: Path | bytes, *, where: object) -> NDArray[np.uint8]:
        header = _read_header(content)
        # bytes 24 and 25 of a PNG are its bit depth and whether it is grey
        wide = header.startswith(_PNG) and header[24:26] == b"\x10\x00"
        ids = read_image(content, channels=1, dtype="uint16", exif="ignore")[:, :, 0] if wide else read_labels(content)
        meanings = self._meanings
        if ids.dtype == np.uint8:
            # deleting the ids that mean something leaves the others: four times as fast as counting
            wrong = bool(ids.tobytes().translate(None, bytes(value for value in meanings if value < 256)))
        else:
            wrong = not np.isin(ids, list(meanings)).all()
        if wrong:
            raise self._undefined_ids(ids, where)
        return np.take(self._table, ids)

    def _undefined_ids(self, ids: NDArray[np.uint8] | NDArray[np.uint16], where: object) -> DataError:
        values, counts = np.unique(ids, return_counts=True)
        meanings = self._meanings
        wrong = [(value, count) for value, count in zip(values, counts, strict=True) if int(value) not in meanings]
        shown = ", ".join(f"{value} ({count:,} pixels)" for value, count in wrong[:10])
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        first = wrong[0][0]
        fix = f"say what it is in label_map, such as {first}: ignore, or correct the label map"
        if values.tolist() == [0, 255] and self.taxonomy.num_classes == 2:
            fix = "a 0/255 mask of two classes: set label_format: binary"
        elif [value for value, _ in wrong] == [self.taxonomy.num_classes] and 0 not in values:
            fix = "the ids look one-based: give each class its ids, such as ids: [1] for the first"
        return DataError(
            "E-DATA-041",
            f"label value {shown}{more}; {self.taxonomy.name} defines {_shorten(sorted(meanings))}",
            fix=fix,
            path=str(where),
        )

    def _map_colours(self, content: Path | bytes, *, where: object) -> NDArray[np.uint8]:
        if not _read_header(content).startswith(_PNG):
            raise DataError(
                "E-DATA-042",
                "label map that is no PNG file: other formats change colours",
                fix="save the original label map as PNG; what JPEG changed cannot be brought back",
                path=str(where),
            )
        image = read_image(content, exif="ignore")
        red, green, blue = (image[:, :, channel].astype(np.uint32) for channel in range(3))
        found = _make_colour_table(tuple(self.spec.class_of_colour.items()))[red << 16 | green << 8 | blue]
        unknown = found == 0
        if unknown.any():
            raise self._unknown_colour(image, unknown, where)
        target: NDArray[np.uint8] = (found - 1).astype(np.uint8)
        return target

    def _unknown_colour(self, image: NDArray[np.uint8], unknown: NDArray[np.bool_], where: object) -> DataError:
        row, column = (int(place) for place in np.argwhere(unknown)[0])
        num_colours = len(np.unique(image[unknown], axis=0))
        fix = "give the colour to a class, or to ignore_colours"
        if num_colours > len(self.taxonomy.classes):
            fix = "many colours in between look smoothed or resized: export the label map again without smoothing"
        return DataError(
            "E-DATA-043",
            f"pixel at row {row}, column {column} has the colour {image[row, column].tolist()}, which no class has; so "
            f"have {int(unknown.sum()):,} pixels, of {num_colours:,} such colours",
            fix=fix,
            path=str(where),
        )


def _find_samples(spec: DatasetSpec, root: Path, split: str) -> list[CustomSample]:
    """List the samples of a split."""
    section = spec.splits[split]
    folder = section.folder or split
    if spec.parquet is not None:
        files = _find_containers(root, spec.parquet.files.replace("{split}", folder))
        rows = ParquetRows(files, (spec.parquet.image, spec.parquet.label))
        every = [
            CustomSample(name, Cell(rows, index, 0), Cell(rows, index, 1)) for index, name in enumerate(rows.names)
        ]
        return _choose(every, spec, split, root=root)
    if spec.webdataset is not None:
        shards = _find_containers(root, spec.webdataset.shards.replace("{split}", folder))
        found = index_shards(shards, image=spec.webdataset.image, label=spec.webdataset.label)
        return _choose([CustomSample(*sample) for sample in found], spec, split, root=root)
    assert spec.files is not None, "one of the three is given"
    images_template, labels_template = (
        template.replace("{split}", folder) for template in (spec.files.images, spec.files.labels)
    )
    outlines: dict[str, CocoImage] = {}
    if spec.label_format == "coco":
        file = root / labels_template
        outlines = {_key_of(PurePosixPath(image.file)): image for image in read_coco(file, spec)}
        pictures = {key: root / images_template / image.file for key, image in outlines.items()}
        images = {key: [path] for key, path in pictures.items() if path.is_file()}
        labels = {key: [file] for key in outlines}
    else:
        suffixes = (".json",) if spec.label_format == "labelme" else PICTURE_SUFFIXES
        labels = find_files(root, labels_template, suffixes=suffixes)
        taken = {path for paths in labels.values() for path in paths}
        images = {
            key: rest
            for key, paths in find_files(root, images_template, suffixes=_image_suffixes(spec)).items()
            # a template such as {stem}.png matches the label maps {stem}_mask.png as well
            if (rest := [path for path in paths if path not in taken])
        }
    keys, causes = sorted({*images, *labels}), list[DataError]()
    if section.list is not None:
        keys, causes = read_list(root / section.list, list_aliases(root, images, labels))
    elif section.share is not None:
        keys = _draw_share(keys, spec, split)
    chosen = set(keys)
    pairs = match_pairs(
        keys,
        {key: paths for key, paths in images.items() if key in chosen},
        {key: paths for key, paths in labels.items() if key in chosen},
        folder=root,
        causes=causes,
    )
    return [
        CustomSample(name, pair.image, outlines.get(pair.name, pair.label))
        for name, pair in zip(_name_keys([pair.name for pair in pairs], root), pairs, strict=True)
    ]


def _image_suffixes(spec: DatasetSpec) -> tuple[str, ...]:
    """Return what files of pictures end in: for 8-bit RGB an array beside a picture is something else."""
    return PICTURE_SUFFIXES if spec.is_rgb else (*PICTURE_SUFFIXES, ".npy")


def _choose(samples: Sequence[CustomSample], spec: DatasetSpec, split: str, *, root: Path) -> list[CustomSample]:
    """Take the samples of a split from those of parquet files or shards."""
    section = spec.splits[split]
    keys: list[str] = [sample.name for sample in samples]
    causes: list[DataError] = []
    if section.list is not None:
        aliases: dict[str, str | None] = {key: key for key in keys}
        keys, causes = read_list(root / section.list, aliases)
    elif section.share is not None:
        keys = _draw_share(keys, spec, split)
    if causes:
        raise causes[0]
    by_key = {sample.name: sample for sample in samples}
    return [by_key[key]._replace(name=name) for key, name in zip(keys, _name_keys(keys, root), strict=True)]


def find_files(root: Path, template: str, *, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """List the files that a template matches, by what its ``{folder}`` and ``{stem}`` stand for.

    Args:
        root: Folder of the data set.
        template: Relative to it; a path without ``{stem}`` is a folder with all its subfolders.
        suffixes: What files end in where the template does not say it, lower case.

    Returns:
        Files by key, in order of the keys: ``stem``, or ``sub/folder/stem``.

    Raises:
        DataError: E-DATA-045 if the folder is not there.
        OSError: If it cannot be read.
    """
    parts = PurePosixPath(template).parts
    if "{stem}" not in template:
        parts = (*parts, "{folder}", "{stem}")
    fixed = next(place for place, part in enumerate(parts) if "{" in part)
    base = root.joinpath(*parts[:fixed])
    if not base.is_dir():
        raise DataError(
            "E-DATA-045",
            f"no such folder; {_describe(root)}",
            fix="check --data and the paths of the data set file, which are relative to it",
            path=base,
        )
    pattern = _compile(parts[fixed:], suffixes)
    found: dict[str, list[Path]] = {}
    for relative in walk_files(base, deep="{folder}" in parts):
        if match := pattern.fullmatch(relative):
            folder = match.groupdict().get("folder")
            found.setdefault(f"{folder}/{match['stem']}" if folder else match["stem"], []).append(base / relative)
    return dict(sorted(found.items()))


def _compile(parts: Sequence[str], suffixes: Sequence[str]) -> re.Pattern[str]:
    *folders, last = parts
    pattern = "".join("(?:(?P<folder>.+)/)?" if part == "{folder}" else re.escape(part) + "/" for part in folders)
    before, _, after = last.partition("{stem}")
    suffix = PurePosixPath(f"x{after}").suffix
    after = after.removesuffix(suffix)
    endings = re.escape(suffix) if suffix else "|".join(map(re.escape, suffixes))
    return re.compile(f"{pattern}{re.escape(before)}(?P<stem>[^/]+){re.escape(after)}(?i:{endings})", re.DOTALL)


def walk_files(base: Path, *, deep: bool) -> Iterator[str]:
    """List files in a folder, relative to it; hidden ones and those of macOS's shadow folder are left out.

    Args:
        base: The folder.
        deep: Whether subfolders are entered; links are followed, but no folder is entered twice.
    """
    waiting, seen = [""], {_identity(base)}
    while waiting:
        prefix = waiting.pop()
        with os.scandir(base / prefix) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or entry.name == "__MACOSX":
                    continue
                if not entry.is_dir():
                    yield prefix + entry.name
                elif deep and (identity := _identity(Path(entry.path))) not in seen:
                    seen.add(identity)
                    waiting.append(f"{prefix}{entry.name}/")


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _find_containers(root: Path, pattern: str) -> list[Path]:
    """List the parquet files or shards that a pattern matches, in order of their names."""
    files = sorted(path for path in root.glob(pattern) if not path.name.startswith("."))
    if not files:
        raise DataError(
            "E-DATA-045",
            f"no file matches {pattern}; {_describe(root)}",
            fix="check --data and the paths of the data set file, which are relative to it",
            path=root,
        )
    return files


def _describe(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder"
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.iterdir())
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return f"{folder} holds {', '.join(names[:10]) + more or 'nothing'}"


def _key_of(path: PurePosixPath) -> str:
    return str(path.with_suffix("")) if path.suffix.lower() in {*PICTURE_SUFFIXES, ".json"} else str(path)


def _name_keys(keys: Sequence[str], root: Path) -> list[str]:
    """Turn keys, which may have folders in them, into names that are file stems."""
    names = [key.replace("/", "-") for key in keys]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            "E-DATA-046",
            f"two samples have the name {twice}, which is their path with - for /",
            fix="rename one of them",
            path=root,
        )
    return names


def _draw_share(keys: Sequence[str], spec: DatasetSpec, split: str) -> list[str]:
    """Take a split's share of the samples.

    Samples are put in the order of a hash of seed and name, and the splits cut from it one after the other. So a share
    depends on nothing but the names, and a sample more or less moves few others.
    """
    order = sorted(keys, key=lambda key: hashlib.sha256(f"{spec.split_seed}/{key}".encode(errors="replace")).digest())
    start = end = 0.0
    for name, section in spec.splits.items():
        start, end = end, end + (section.share or 0)
        if name == split:
            break
    return sorted(order[round(start * len(order)) : round(min(end, 1) * len(order))])


def list_aliases(
    root: Path, images: Mapping[str, Sequence[Path]], labels: Mapping[str, Sequence[Path]]
) -> dict[str, str | None]:
    """Map what a list may call a sample to its key: the key, its last part, its files; None where it may be two."""
    aliases: dict[str, str | None] = {}
    for files in (images, labels):
        for key, paths in files.items():
            relative = [path.relative_to(root).as_posix() for path in paths]
            names = {key.rsplit("/", 1)[-1], *relative, *(_key_of(PurePosixPath(path)) for path in relative)}
            names |= {path.rsplit("/", 1)[-1] for path in relative}
            names |= {_key_of(PurePosixPath(name)) for name in names}
            for name in names:
                aliases[name] = key if aliases.get(name, key) == key else None
    # a whole key is never in doubt
    return aliases | {key: key for key in (*images, *labels)}


def read_list(path: Path, aliases: Mapping[str, str | None]) -> tuple[list[str], list[DataError]]:
    """Read the samples of a split: a line holds a name, a path, or the paths of picture and label map.

    Blank lines, surrounding blanks, a byte order mark, Windows line ends and backslashes are accepted. Folders in front
    that are not part of the data set do not count.

    Returns:
        The keys in the order of the list, and what is wrong with lines.
    """
    # a pipe would block the reader for ever
    if not path.is_file():
        raise DataError("E-DATA-047", "no such list of samples", fix="check the lists of the data set file", path=path)
    first_line: dict[str, int] = {}
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        if not (entry := line.strip()):
            continue
        keys = {_look_up(entry, aliases)}
        if keys == {None}:
            keys = {_look_up(word, aliases) for word in re.split(r"[\s,;]+", entry) if word}
        key = keys.pop()
        if keys:
            problems.append(f"line {number}: names of different samples, or of none: {entry!r}")
        elif key is None:
            problems.append(f"line {number}: no sample, or more than one, is called {entry!r}")
        elif key in first_line:
            problems.append(f"line {number}: {key} is in line {first_line[key]} already")
        else:
            first_line[key] = number
    if not problems:
        return list(first_line), []
    more = f"; and {len(problems) - 10:,} more" if len(problems) > 10 else ""
    return list(first_line), [
        DataError(
            "E-DATA-047",
            "; ".join(problems[:10]) + more,
            fix="give each sample one line that holds its name or its path below the folder of the data set",
            path=path,
        )
    ]


def _look_up(entry: str, aliases: Mapping[str, str | None]) -> str | None:
    parts = [part for part in entry.replace("\\", "/").split("/") if part not in {"", "."}]
    for start in range(len(parts)):
        name = "/".join(parts[start:])
        for candidate in (name, _key_of(PurePosixPath(name))):
            if candidate in aliases:
                return aliases[candidate]
    return None


@contextmanager
def _naming(source: object) -> Iterator[None]:
    """Name the member or cell in errors about its content."""
    try:
        yield
    except DataError as error:
        if error.path not in {None, _NAMELESS}:
            raise
        raise type(error)(error.code, error.reason, fix=error.fix, path=str(source), table=error.table) from error


def _read_header(content: Path | bytes) -> bytes:
    """Return the first 26 bytes; fewer, or none, of a file that cannot be read, which its decoder will say better."""
    if isinstance(content, bytes):
        return content[:26]
    if not content.is_file():
        return b""
    try:
        with content.open("rb") as file:
            return file.read(26)
    except OSError:
        return b""


@lru_cache(maxsize=4)
def _make_colour_table(meanings: tuple[tuple[Colour, int], ...]) -> NDArray[np.uint16]:
    """Make a table of train ids + 1 by red, green and blue in 24 bits; 0 is a colour without a meaning.

    Its 32 MiB are address space: but for the few pages that hold a colour the system never fills them with memory.

    Shape:
        - returns: (16777216,) uint16
    """
    table = np.zeros(1 << 24, np.uint16)
    for (red, green, blue), train_id in meanings:
        table[red << 16 | green << 8 | blue] = train_id + 1
    return table


def _shorten(values: Iterable[int]) -> str:
    numbers = list(values)
    if len(numbers) > 12:
        return f"{', '.join(map(str, numbers[:10]))}, ... ({len(numbers)} ids)"
    return ", ".join(map(str, numbers))
