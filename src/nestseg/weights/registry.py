"""Published weights by name, and a cache in which every file is checked each time it is used.

The table is ``registry.toml`` beside this file. The cache is ``weights/SHA256/FILE`` with a record
``weights/names/NAME.json`` of what was fetched: two files of one name never meet. No torch in here.
"""

from __future__ import annotations

import tomllib
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, Self

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nestseg.core.disk import cache_folder, replaced_file, sha256_of, sync_file
from nestseg.core.download import Download, download
from nestseg.core.errors import WeightsError, nearest
from nestseg.core.types import DilationVariant, OutputStride, Segmentor

LayoutName = Literal["official", "timm", "mmseg", "ssseg"]
"""How the keys of a file are named."""


class UncheckedWeightsWarning(UserWarning):
    """Weights were fetched and could not be compared with a full hash, or not from the first address."""


class PublishedWeights(BaseModel):
    """What is known of a file of weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z0-9-]+:[a-z0-9_-]+$")]
    """``SOURCE:MODEL``, such as official:resnest101."""
    layout: LayoutName
    urls: Annotated[tuple[str, ...], Field(min_length=1)]
    """Addresses of the same file, in the order in which they are tried."""
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64}|[0-9a-f]{8}|)$")]
    """All digits, the first 8, or none."""
    size: Annotated[int, Field(gt=0)] | None = None
    """Bytes; None if unknown."""
    backbone: str
    segmentor: Segmentor | None = None
    output_stride: OutputStride | None = None
    dataset: str | None = None
    dilation_variant: DilationVariant
    """Which of the networks that share the weights is meant where stages are dilated."""
    logits_resizes: Literal[1, 2]
    """How many times the protocol of the metric resizes logits on their way to the size of the picture."""
    project: str
    page: str
    licence: str
    """Of the weights."""
    data_licence: str
    """Terms of the data they were trained on."""
    metric: str | None = None
    value: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if len({value is None for value in (self.segmentor, self.output_stride, self.dataset)}) > 1:
            raise ValueError("segmentor, output_stride and dataset belong together")
        if (self.metric is None) != (self.value is None):
            raise ValueError("metric and value belong together")
        return self

    @property
    def kind(self) -> Literal["backbone", "segmentation"]:
        """Whether this is a backbone alone or a whole model."""
        return "segmentation" if self.segmentor else "backbone"

    @property
    def fits(self) -> str:
        """The recipe of this network and data set; for a backbone its name in recipes."""
        if self.segmentor is None:
            return self.backbone
        return f"{self.segmentor}_{self.backbone}-d{self.output_stride}_{self.dataset}"

    @property
    def file_name(self) -> str:
        """The last part of the first address."""
        return self.urls[0].rpartition("/")[2]

    @property
    def fetch_command(self) -> str:
        """What to type to have the file."""
        return f"nestseg weights fetch {self.name}"


class WeightsRow(NamedTuple):
    """A line of ``nestseg weights list``."""

    name: str
    metric: str
    size: str
    sha256: str
    """The hash; of one known in part, its digits and how many they are."""
    cached: str
    """Yes or no; the file is there, its hash is compared when it is used."""
    fits: str
    licence: str
    data_licence: str
    source: str


class _Record(BaseModel):
    """What was fetched under a name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    file_name: Annotated[str, Field(pattern=r"^[^/\\]+$")]
    url: str
    digits_checked: int


def parse_registry(text: str) -> Mapping[str, PublishedWeights]:
    """Read a registry as ``registry.toml`` describes it.

    Args:
        text: TOML.

    Returns:
        The weights by name, in the order of the file.

    Raises:
        ValueError: If it is not TOML, or a field is unknown, missing or wrong.
        KeyError: If the source or the data set of a row is not described.
    """
    tables = tomllib.loads(text)
    registry: dict[str, PublishedWeights] = {}
    for row in tables["weights"]:
        source: dict[str, Any] = tables["sources"][row["name"].partition(":")[0]]
        trained_on = ["imagenet"] + ([row["dataset"]] if "dataset" in row else [])
        terms = "; ".join(tables["data"][name]["text"] for name in trained_on)
        entry = PublishedWeights(**source, **row, data_licence=terms)
        if entry.name in registry:
            raise ValueError(f"{entry.name} is listed twice")
        registry[entry.name] = entry
    return MappingProxyType(registry)


@cache
def load_registry() -> Mapping[str, PublishedWeights]:
    """Return the published weights by name.

    Example:
        >>> load_registry()["official:resnest101"].sha256
        '22405ba7'
    """
    return parse_registry(files("nestseg.weights").joinpath("registry.toml").read_text(encoding="utf-8"))


def find_weights(name: str) -> Path:
    """Return the fetched file of a name, after comparing its hash. Never uses the network.

    Args:
        name: A name of the registry.

    Raises:
        WeightsError: E-WEIGHTS-030 for an unknown name, E-WEIGHTS-031 if it was not fetched, E-WEIGHTS-032 if the file
            changed since, E-WEIGHTS-033 if the registry means another file by now.
    """
    entry = _find_entry(name)
    record = _read_record(entry)
    path = None if record is None else _place(record.sha256, record.file_name)
    if record is None or path is None or not path.is_file():
        raise WeightsError("E-WEIGHTS-031", "these weights were not fetched yet", fix=entry.fetch_command, path=name)
    digest = sha256_of(path)
    if digest != record.sha256:
        raise WeightsError(
            "E-WEIGHTS-032",
            f"the file changed since it was fetched: it has sha256 {digest}, fetched was {record.sha256}",
            fix=f"do not use it; fetch it again with: {entry.fetch_command}",
            path=path,
        )
    if not digest.startswith(entry.sha256):
        raise WeightsError(
            "E-WEIGHTS-033",
            f"the file has sha256 {digest}, the registry names {entry.sha256}",
            fix=f"fetch it again with: {entry.fetch_command}",
            path=path,
        )
    return path


def fetch_weights(
    name: str, *, source: str | Path | None = None, on_progress: Callable[[int, int | None], None] | None = None
) -> Path:
    """Bring a file of the registry into the cache; one that is there and good is not fetched again.

    Args:
        name: A name of the registry.
        source: Another address of the file, or a file at hand; it is read even if the cache has one already.
        on_progress: Called with the bytes so far and in total (None if unknown).

    Returns:
        The file in the cache.

    Raises:
        WeightsError: E-WEIGHTS-030 for an unknown name.
        DownloadError: If no address gives the file, or it has another hash.

    Warns:
        UncheckedWeightsWarning: If fewer than the 64 digits of a hash could be compared, or an address did not work.
    """
    entry = _find_entry(name)
    record_file = _record_file(entry)
    record_file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(record_file.with_suffix(".lock")):
        if source is None:
            try:
                return find_weights(name)
            except WeightsError:
                pass  # not there or not good: fetching replaces it
        got = download(
            entry.urls if source is None else [str(source)],
            _folder() / "incoming" / record_file.stem / entry.file_name,
            sha256=entry.sha256 or None,
            size=None if entry.sha256 else entry.size,  # where there is a hash, it decides
            by_hand=f"get the file by hand and pass it: {entry.fetch_command} --from FILE",
            on_progress=on_progress,
        )
        path = _place(got.sha256, entry.file_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        got.path.replace(path)
        sync_file(path.parent)
        record = _Record(sha256=got.sha256, file_name=entry.file_name, url=got.url, digits_checked=got.digits_checked)
        with replaced_file(record_file) as temporary:
            temporary.write_text(record.model_dump_json(indent=2), encoding="utf-8")
    _warn(entry, got)
    return path


def list_weights() -> list[WeightsRow]:
    """Lay the registry out in rows."""
    rows = []
    for entry in load_registry().values():
        record = _read_record(entry)
        cached = record is not None and _place(record.sha256, record.file_name).is_file()
        rows.append(
            WeightsRow(
                name=entry.name,
                fits=entry.fits,
                source=f"{entry.project}, {entry.page}",
                licence=entry.licence,
                data_licence=entry.data_licence,
                sha256={64: entry.sha256, 0: "not known"}.get(len(entry.sha256), f"{entry.sha256}... (8 digits known)"),
                size="-" if entry.size is None else f"{entry.size / 1e6:.1f} MB",
                metric="-" if entry.value is None else f"{entry.metric}: {100 * entry.value:.2f} %",
                cached="yes" if cached else "no",
            )
        )
    return rows


def _warn(entry: PublishedWeights, got: Download) -> None:
    messages = [f"an address did not work: {failure}" for failure in got.failures]
    if got.digits_checked == 0:
        messages.append(
            f"{entry.name}: no hash of this file is known, so nothing could be compared; its own, {got.sha256}, is "
            "recorded and compared from now on"
        )
    elif got.digits_checked < 64:
        messages.append(f"{entry.name}: {got.digits_checked} of the 64 digits of its sha256 are known, and agree")
    for message in messages:
        warnings.warn(message, UncheckedWeightsWarning, stacklevel=3)


def _find_entry(name: str) -> PublishedWeights:
    registry = load_registry()
    if name not in registry:
        near = nearest(name, registry)
        fix = near if near.startswith("did you mean") else "list them with: nestseg weights list"
        raise WeightsError("E-WEIGHTS-030", "no published weights of this name", fix=fix, path=name)
    return registry[name]


def _folder() -> Path:
    return cache_folder() / "weights"


def _place(sha256: str, file_name: str) -> Path:
    return _folder() / sha256 / file_name


def _record_file(entry: PublishedWeights) -> Path:
    return _folder() / "names" / f"{entry.name.replace(':', '--')}.json"


def _read_record(entry: PublishedWeights) -> _Record | None:
    """Read what was fetched; a record that is damaged counts as none, and the file as not fetched."""
    try:
        return _Record.model_validate_json(_record_file(entry).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
