"""The data set file: what a folder of your own holds, as typed data. Nothing here imports torch.

One YAML file describes where pictures and labels are, what the labels mean, and what the splits are. ``nestseg data
init FOLDER`` writes it, a recipe carries it whole. Unknown keys are errors. Each field's description says what it does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_args

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from nestseg.core.errors import SpecError, nearest
from nestseg.core.taxonomy import Colour, Taxonomy
from nestseg.core.types import IGNORE_INDEX, ImageDtype
from nestseg.data.datasets import DATASETS

LabelFormat = Literal["ids", "colours", "binary", "coco", "labelme"]
"""How labels are stored: class ids, class colours, black and white, or outlines in the JSON of COCO or labelme."""

IGNORE = "ignore"
"""The word for pixels that count neither in a loss nor in a metric."""

ANY_LABEL = "*"
"""In a list of label names: every name that nothing else mentions."""

MAX_STORED_ID = 65535
"""Largest id of a label map: 16 bits."""

_MAX_BYTES = 1 << 20
_STYLE: Mapping[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": 1 << 20}
_BLACK_AND_WHITE: Mapping[Colour, int] = {(0, 0, 0): 0, (255, 255, 255): 1}
_NAME = r"^[a-z0-9][a-z0-9._-]*$"


def _refuse_bool(value: object) -> object:
    # pydantic takes true for 1, and YAML reads yes, no, on and off as true and false
    if isinstance(value, bool):
        raise ValueError(f"YAML reads this as {str(value).lower()}; write a number, or put a name in quotes")  # noqa: TRY004
    return value


def _check_path(value: str) -> str:
    parts = PurePosixPath(value)
    if not value or parts.is_absolute() or ".." in parts.parts or "\\" in value or "\0" in value:
        raise ValueError(
            "paths are relative to the folder of the data set and stay inside it, with / between folders; link what "
            "lies elsewhere into it"
        )
    unknown = set(re.findall(r"\{.*?\}|[{}]", value)) - {"{split}", "{stem}", "{folder}"}
    if unknown:
        raise ValueError(f"unknown placeholder {', '.join(sorted(unknown))}; allowed: {{split}}, {{folder}}, {{stem}}")
    return value


_Level = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, le=255)]
_ColourField = tuple[_Level, _Level, _Level]
_Id = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, le=MAX_STORED_ID)]
_Name = Annotated[str, BeforeValidator(_refuse_bool), Field(min_length=1)]
_PathField = Annotated[str, BeforeValidator(_check_path)]
_Share = Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0, le=1)]


class SpecSection(BaseModel):
    """A part of a data set file: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class ClassSection(SpecSection):
    """A class; its place in the list is its train id. A bare name stands for a class with nothing but a name."""

    name: _Name
    """What it is called."""
    colour: _ColourField | None = None
    """[red, green, blue], 0-255: to draw it with, and what label maps of label_format colours hold."""
    ids: tuple[_Id, ...] = ()
    """label_format ids: the stored ids that mean it; several are merged. Either every class has ids, or none."""
    colours: tuple[_ColourField, ...] = ()
    """label_format colours: further colours that are merged into it."""
    labels: tuple[_Name, ...] = ()
    """coco and labelme: the names that mean it; empty means its own name, "*" every name not mentioned elsewhere."""


class SplitSection(SpecSection):
    """Which samples a split holds; without any field, those of the folder {split} of the same name."""

    list: _PathField | None = None
    """A text file that names its samples, one a line."""
    share: _Share | None = None
    """Part of all samples, drawn by split_seed: 0.8 is four fifths."""
    folder: _PathField | None = None
    """What {split} stands for in paths; null means the split's own name."""


class FilesSection(SpecSection):
    """A picture file and a label file a sample."""

    images: _PathField
    """A folder, subfolders included, or a template such as images/{split}/{stem}.jpg or {split}/{folder}/{stem}.png."""
    labels: _PathField
    """The same for label files, {folder} and {stem} having the same value; for coco the JSON file."""


class ParquetSection(SpecSection):
    """Hugging Face parquet files: a picture and a label map a row. Needs the extra nestseg[parquet]."""

    files: _PathField
    """The files, with * for any text, such as data/{split}-*.parquet."""
    image: _Name = "image"
    """Column of the encoded pictures."""
    label: _Name = "label"
    """Column of the encoded label maps."""


class WebDatasetSection(SpecSection):
    """WebDataset shards: plain tar files whose members share a name up to its first dot."""

    shards: _PathField
    """The files, with * for any text, such as shards/{split}-*.tar."""
    image: tuple[_Name, ...] = ("jpg", "jpeg", "webp")
    """Endings of pictures; a sample has one of them."""
    label: tuple[_Name, ...] = ("png", "seg.png", "mask.png")
    """Endings of label maps; a sample has one of them."""


class DatasetSpec(SpecSection):
    """A data set of your own.

    Raises:
        SpecError: From `read` and `parse`, naming the field, what is allowed and the nearest key.

    Example:
        >>> text = "{name: pets, files: {images: images, labels: masks}, classes: [background, cat], "
        >>> spec = DatasetSpec.parse(text + "splits: {train: {share: 0.8}, val: {share: 0.2}}}")
        >>> spec.taxonomy.classes, spec.class_of_id
        (('background', 'cat'), {0: 0, 1: 1})
    """

    name: Annotated[str, Field(pattern=_NAME, max_length=64)]
    """What results and models call it: small letters, digits, dots and dashes."""
    licence: str = "not stated"
    """Under which terms the data may be used, in words; travels with models that were trained on it."""
    channels: Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1)] = 3
    """Channels of a picture: 1 grey, 3 RGB, 4 RGB and alpha, or as many as TIFF or .npy files hold."""
    dtype: ImageDtype = "uint8"
    """Type of a picture's values, as they are stored."""
    files: FilesSection | None = None
    """Where pictures and labels are, if they are files; one of files, parquet and webdataset is given."""
    parquet: ParquetSection | None = None
    """Where they are, if in parquet files."""
    webdataset: WebDatasetSection | None = None
    """Where they are, if in tar shards."""
    label_format: LabelFormat = "ids"
    """ids: PNG of class ids (palette, grey, 16-bit). colours: PNG of class colours. binary: black is the first class,
    white the second. coco, labelme: outlines in JSON."""
    classes: Annotated[tuple[ClassSection, ...], Field(min_length=1, max_length=255)]
    """The classes, in train-id order."""
    label_map: dict[_Id, Annotated[int | str, BeforeValidator(_refuse_bool)]] = {}
    """label_format ids: stored id -> place or name of a class, or ignore. Ids of no line mean the class at their place;
    any other id is an error, 255 included."""
    ignore_colours: tuple[_ColourField, ...] = ()
    """label_format colours and binary: colours of pixels that do not count."""
    ignore_labels: tuple[_Name, ...] = ()
    """coco and labelme: names of regions whose pixels do not count; "*" is every name not mentioned elsewhere."""
    unannotated: str | None = None
    """coco and labelme: what pixels in no region are: a class by its name, or ignore. Required there."""
    crowd: Literal["ignore", "draw"] = "ignore"
    """coco: regions with iscrowd cover what is between the objects too: do they count, or are they drawn as others?"""
    splits: Annotated[dict[Annotated[str, Field(pattern=_NAME)], SplitSection], Field(min_length=1)]
    """The splits: by folder, list or share."""
    split_seed: Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, lt=2**63)] = 0
    """Decides which samples make up a share."""
    absent_classes: Literal["skip", "zero"] = "skip"
    """What a class that occurs neither in labels nor in predictions does to a mean: nothing, or it counts as 0."""

    @field_validator("classes", mode="before")
    @classmethod
    def _name_alone_is_a_class(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            return [entry if isinstance(entry, Mapping | ClassSection) else {"name": entry} for entry in value]
        return value

    @field_validator("splits", mode="before")
    @classmethod
    def _split_may_be_empty(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            return {name: {} for name in value}
        if isinstance(value, Mapping):
            return {name: {} if section is None else section for name, section in value.items()}
        return value

    @model_validator(mode="after")
    def _check_across_fields(self) -> DatasetSpec:
        for problem in (*self._check_source(), *self._check_classes(), *self._check_labels(), *self._check_splits()):
            raise ValueError(problem)
        return self

    def _check_source(self) -> Iterator[str]:
        given = [name for name in ("files", "parquet", "webdataset") if getattr(self, name) is not None]
        if self.name in DATASETS:
            yield f"name {self.name} is that of a data set that nestseg knows; choose another"
        if len(given) != 1:
            yield f"{' and '.join(given) or 'none'} of files, parquet and webdataset given; give one of them"
        elif self.label_format in {"coco", "labelme"} and self.files is None:
            yield f"label_format {self.label_format} is for files; allowed with {given[0]}: ids, colours, binary"
        if self.files is None:
            return
        for template in (self.files.images, self.files.labels):
            for part in PurePosixPath(template).parts[:-1]:
                if "{stem}" in part or ("{folder}" in part and part != "{folder}"):
                    yield f"{template}: {{folder}} is a part of a path of its own, {{stem}} belongs into the last part"
            if "{folder}" in template and "{stem}" not in template:
                yield f"{template}: {{folder}} without {{stem}}; a folder alone includes its subfolders already"
        if self.label_format == "coco" and ("{stem}" in self.files.labels or "{stem}" in self.files.images):
            yield "files: with coco, images is the folder that file names are relative to, and labels the JSON file"
        elif self.files.images == self.files.labels:
            yield f"files.images and files.labels are both {self.files.images}; tell them apart by their templates"

    def _check_classes(self) -> Iterator[str]:
        names = [entry.name for entry in self.classes]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            yield f"class names given twice: {', '.join(repeated)}"
        if IGNORE in names:
            yield f"a class named {IGNORE}: that word stands for pixels that do not count; rename it"
        for field, formats in (("ids", ("ids",)), ("colours", ("colours",)), ("labels", ("coco", "labelme"))):
            if self.label_format not in formats and any(getattr(entry, field) for entry in self.classes):
                yield (
                    f"classes have {field}, but label_format is {self.label_format}; "
                    f"{field} is for {' and '.join(formats)}"
                )

    def _check_labels(self) -> Iterator[str]:
        kind = self.label_format
        unused = {
            "label_map": kind != "ids" and bool(self.label_map),
            "ignore_colours": kind not in {"colours", "binary"} and bool(self.ignore_colours),
            "ignore_labels": kind not in {"coco", "labelme"} and bool(self.ignore_labels),
            "unannotated": kind not in {"coco", "labelme"} and self.unannotated is not None,
            "crowd": kind != "coco" and self.crowd != "ignore",
        }
        for field in (field for field, wrong in unused.items() if wrong):
            yield f"{field} is set, but label_format is {kind}, which does not use it; leave it out"
        match kind:
            case "ids":
                yield from self._check_ids()
            case "colours":
                yield from self._check_colours()
            case "binary":
                if len(self.classes) != 2:
                    yield f"label_format binary has two classes, black and white, not {len(self.classes)}"
                if set(self.ignore_colours) & set(_BLACK_AND_WHITE):
                    yield "ignore_colours: black and white are the two classes"
            case _:
                yield from self._check_label_names()

    def _check_ids(self) -> Iterator[str]:
        names, num_classes = [entry.name for entry in self.classes], len(self.classes)
        for stored, meaning in self.label_map.items():
            if isinstance(meaning, int) and not (0 <= meaning < num_classes or meaning == IGNORE_INDEX):
                yield f"label_map {stored}: {meaning}; allowed: 0-{num_classes - 1}, a class name, or {IGNORE}"
            if isinstance(meaning, str) and meaning not in {*names, IGNORE}:
                yield f"label_map {stored}: {meaning}; {nearest(meaning, [*names, IGNORE])}"
        given = [entry.name for entry in self.classes if entry.ids]
        if given:
            without = [name for name in names if name not in given]
            if without:
                yield f"classes without ids: {', '.join(without)}; give ids to every class, or to none"
            if any(self._meant(meaning) != IGNORE_INDEX for meaning in self.label_map.values()):
                yield f"classes have ids, so label_map may only say which others are: {IGNORE}"
            owners: dict[int, str] = {}
            for stored, owner in (
                *((stored, entry.name) for entry in self.classes for stored in entry.ids),
                *((stored, IGNORE) for stored in self.label_map),
            ):
                if stored in owners:
                    yield f"id {stored} means {owners[stored]} and {owner}; one id has one meaning"
                owners[stored] = owner
            return
        moved = [stored for stored, meaning in self.label_map.items() if stored < num_classes]
        renumbered = [stored for stored in moved if self._meant(self.label_map[stored]) not in {stored, IGNORE_INDEX}]
        silent = [stored for stored in range(num_classes) if stored not in self.label_map]
        if renumbered and silent:
            yield (
                f"label_map gives id {renumbered[0]} another class than the one at its place, but has no line for "
                f"{', '.join(map(str, silent[:5]))}; say what {'it means' if len(silent) == 1 else 'they mean'}, "
                f"such as {silent[0]}: {IGNORE}"
            )
        meant = set(self.class_of_id.values()) if not renumbered or not silent else set(range(num_classes))
        lost = [name for index, name in enumerate(names) if index not in meant]
        if lost:
            yield f"no stored id means {', '.join(lost)}; add a line to label_map, or drop the class"

    def _check_colours(self) -> Iterator[str]:
        without = [entry.name for entry in self.classes if entry.colour is None]
        if without:
            yield f"classes without colour: {', '.join(without)}; label_format colours needs one for each"
            return
        owners: dict[Colour, str] = {}
        for colour, owner in (
            *((colour, entry.name) for entry in self.classes for colour in (entry.colour, *entry.colours) if colour),
            *((colour, IGNORE) for colour in self.ignore_colours),
        ):
            if colour in owners:
                yield f"colour {list(colour)} means {owners[colour]} and {owner}; one colour has one meaning"
            owners[colour] = owner

    def _check_label_names(self) -> Iterator[str]:
        names = [entry.name for entry in self.classes]
        if self.unannotated is None:
            yield f"unannotated is missing: say what pixels in no region are: one of {', '.join(names)}, or {IGNORE}"
        elif self.unannotated not in {*names, IGNORE}:
            yield f"unannotated is {self.unannotated}; {nearest(self.unannotated, [*names, IGNORE])}"
        owners: dict[str, str] = {}
        for label, owner in (
            *((label, entry.name) for entry in self.classes for label in (entry.labels or (entry.name,))),
            *((label, IGNORE) for label in self.ignore_labels),
        ):
            if label in owners:
                yield f"label {label} means {owners[label]} and {owner}; one label has one meaning"
            owners[label] = owner

    def _check_splits(self) -> Iterator[str]:
        source = self.files or self.parquet or self.webdataset
        paths = "" if source is None else " ".join(value for value in vars(source).values() if isinstance(value, str))
        shares = [name for name, section in self.splits.items() if section.share is not None]
        for name, section in self.splits.items():
            given = [field for field in ("list", "share", "folder") if getattr(section, field) is not None]
            if section.list is not None and section.share is not None:
                yield f"split {name}: list and share given; give one of them"
            if section.folder is not None and "{split}" not in paths:
                yield f"split {name}: folder is given, but no path has {{split}} in it"
            if not given and "{split}" not in paths:
                yield f"split {name}: no path has {{split}} in it; give it a list or a share"
        if shares and len(shares) < len(self.splits):
            yield f"splits by share ({', '.join(shares)}) and others; give every split a share, or none"
        if shares and "{split}" in paths:
            yield "splits by share are drawn from one folder, but a path has {split} in it"
        total = sum(section.share or 0 for section in self.splits.values())
        if total > 1 + 1e-9:
            yield f"shares add up to {total:g}; allowed: at most 1"

    def _meant(self, meaning: int | str) -> int:
        """Return the train id that a value of ``label_map`` means."""
        if isinstance(meaning, int):
            return meaning
        names = [entry.name for entry in self.classes]
        return names.index(meaning) if meaning in names else IGNORE_INDEX

    @property
    def taxonomy(self) -> Taxonomy:
        """Names and colours of the classes; a class without a colour gets one of VOC's list."""
        return Taxonomy(
            name=self.name,
            classes=tuple(entry.name for entry in self.classes),
            palette=tuple(entry.colour or list_colour(index) for index, entry in enumerate(self.classes)),
        )

    @property
    def is_rgb(self) -> bool:
        """Whether pictures are 8-bit RGB, into which any other 8- or 16-bit picture is converted."""
        return (self.channels, self.dtype) == (3, "uint8")

    @property
    def class_of_id(self) -> dict[int, int]:
        """Train id, or 255, by stored id, of label maps of ids."""
        if any(entry.ids for entry in self.classes):
            meanings = {stored: index for index, entry in enumerate(self.classes) for stored in entry.ids}
        else:
            meanings = {index: index for index in range(len(self.classes))}
        return meanings | {stored: self._meant(meaning) for stored, meaning in self.label_map.items()}

    @property
    def class_of_colour(self) -> dict[Colour, int]:
        """Train id, or 255, by colour, of label maps of colours and of black and white."""
        ignored = dict.fromkeys(self.ignore_colours, IGNORE_INDEX)
        if self.label_format == "binary":
            return dict(_BLACK_AND_WHITE) | ignored
        table = {
            colour: index
            for index, entry in enumerate(self.classes)
            for colour in (entry.colour, *entry.colours)
            if colour is not None
        }
        return table | ignored

    @property
    def class_of_label(self) -> dict[str, int]:
        """Train id, or 255, by the name of a region; ``"*"`` among them is any other."""
        table = {label: index for index, entry in enumerate(self.classes) for label in (entry.labels or (entry.name,))}
        return table | dict.fromkeys(self.ignore_labels, IGNORE_INDEX)

    @property
    def unannotated_id(self) -> int:
        """Train id, or 255, of pixels in no region."""
        return self._meant(self.unannotated or IGNORE)

    def make_id_table(self) -> NDArray[np.uint8]:
        """Build the look-up table from stored ids to train ids; ids without a meaning are ignored in it.

        Shape:
            - returns: (65536,) uint8, read-only
        """
        meanings = self.class_of_id
        table = np.full(MAX_STORED_ID + 1, IGNORE_INDEX, np.uint8)
        table[list(meanings)] = list(meanings.values())
        table.flags.writeable = False
        return table

    def to_yaml(self, *, always: Collection[str] = ()) -> str:
        """Write what differs from the defaults as YAML, in the order the fields are declared.

        Args:
            always: Fields that are written anyway.
        """
        given = self.model_dump(mode="json", exclude_defaults=True)
        values = {name: value for name, value in self.model_dump(mode="json").items() if name in {*given, *always}}
        text = ""
        for name, value in values.items():
            if name == "classes":
                entries = [entry["name"] if set(entry) == {"name"} else entry for entry in given["classes"]]
                # one class a line
                lines = (yaml.safe_dump([entry], default_flow_style=True, **_STYLE)[1:-2] for entry in entries)
                text += "classes:\n" + "".join(f"- {line}\n" for line in lines)
            else:
                # JSON has no numbers as keys
                value = dict(self.label_map) if name == "label_map" else given.get(name, value)
                flow = None if isinstance(value, dict | list) else False
                text += yaml.safe_dump({name: value}, default_flow_style=flow, **_STYLE)
        return text

    @classmethod
    def parse(cls, text: str, *, source: str = "data set file") -> DatasetSpec:
        """Read a spec from YAML text; ``source`` names it in errors."""
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            repeated = sorted(set(_find_repeated_keys(root))) if root is not None else []
            values = yaml.safe_load(text)
        except (yaml.YAMLError, RecursionError) as error:
            reason = f"not YAML: {' '.join(str(error).split())}"
            raise SpecError("E-SPEC-001", reason, fix="mend the file", path=source) from error
        if repeated:
            raise SpecError(
                "E-SPEC-002", f"keys given twice: {', '.join(repeated)}", fix="keep one of each", path=source
            )
        if not isinstance(values, Mapping):
            raise SpecError(
                "E-SPEC-001",
                f"a data set file is a mapping of fields, this is a {type(values).__name__}",
                fix="let one be written by: nestseg data init FOLDER",
                path=source,
            )
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            found = error.errors()
            # a list of classes of which none is right is also "too short": that helps nobody
            inner = {location["loc"][:1] for location in found if len(location["loc"]) > 1}
            problems = [_describe(dict(problem)) for problem in found if problem["loc"] not in inner]
            raise SpecError(
                "E-SPEC-003",
                "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else ""),
                fix="see the fields in docs/tutorials/your-own-data.md, or start from: nestseg data init FOLDER",
                path=source,
            ) from error

    @classmethod
    def read(cls, path: Path) -> DatasetSpec:
        """Read a data set file."""
        try:
            # a pipe would block the reader for ever
            if path.exists() and not path.is_file():
                raise SpecError("E-SPEC-004", "not a regular file", fix="give the path of a YAML file", path=path)
            if path.stat().st_size > _MAX_BYTES:
                reason = f"{path.stat().st_size:,} bytes; allowed: {_MAX_BYTES:,}"
                raise SpecError("E-SPEC-004", reason, fix="give the data set file, not the data", path=path)
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(
                "E-SPEC-004",
                f"cannot be read: {error}",
                fix="check the path; it must be a UTF-8 YAML file, such as nestseg data init FOLDER writes",
                path=path,
            ) from error
        return cls.parse(text, source=str(path))


def list_colour(index: int) -> Colour:
    """Return the colour that VOC's rule gives to an id: its bits, spread over red, green and blue.

    Example:
        >>> [list_colour(index) for index in range(3)]
        [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    """
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (index >> (3 * place + channel) & 1) << (7 - place)
    return channels[0], channels[1], channels[2]


def describe_fields() -> dict[str, str]:
    """Map every dotted field name to what it does, in the order of the file; lists and tables add ``[]``.

    Example:
        >>> describe_fields()["classes[].name"]
        'What it is called.'
    """
    found: dict[str, str] = {}

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            found[prefix + name] = " ".join((field.description or "").split())
            inner, many = _section_of(field.annotation)
            if inner is not None:
                walk(inner, f"{prefix}{name}{'[]' if many else ''}.")

    walk(DatasetSpec, "")
    return found


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Find the section inside an annotation, and whether it is one of many."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for inner in get_args(annotation):
        section, _ = _section_of(inner)
        if section is not None:
            return section, type(None) not in get_args(annotation)
    return None, False


def _find_repeated_keys(node: yaml.Node) -> Iterator[str]:
    """Walk a YAML document for keys given twice, of which YAML would keep the last without a word."""
    waiting, seen = [node], {id(node)}
    while waiting:
        current = waiting.pop()
        children: list[yaml.Node] = []
        if isinstance(current, yaml.MappingNode):
            keys = [key.value for key, _ in current.value if isinstance(key, yaml.ScalarNode)]
            yield from (key for key in keys if keys.count(key) > 1)
            children = [value for _, value in current.value]
        elif isinstance(current, yaml.SequenceNode):
            children = list(current.value)
        # an alias is the same node again
        waiting += [child for child in children if id(child) not in seen]
        seen.update(map(id, children))


def _describe(problem: Mapping[str, Any]) -> str:
    name = ".".join(str(part) for part in problem["loc"] if str(part) != "[key]")
    words = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        last = str(problem["loc"][-1])
        siblings = [field.split(".")[-1] for field in describe_fields()]
        return f"unknown field {name}: {nearest(last, dict.fromkeys(siblings))}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    if not name:
        return words
    given = repr(problem["input"])
    return f"{name} is {given if len(given) < 80 else given[:77] + '...'}: {words}"
