"""A packed copy of a data set: decoded once, cut into tiles, so that a crop decodes only the tiles it touches.

``nestseg data pack`` writes a folder a split::

    OUT/train/pack.json       what it is, written last: where it is, the split is whole
    OUT/train/00000.blosc2    the tiles of 64 samples, end to end
    OUT/train/00000.json      where in that file each tile is, and the CRC-32 of each

Pictures are those of the one decoder, to the bit; label maps hold train ids. A picture is cut into tiles of 128x256
pixels, rows of tiles from top to bottom, smaller ones at the right and bottom edge; a label map is one piece, since
the choice of a crop looks all over it. Every piece is a Blosc2 chunk, compressed without loss, and is compared with its
CRC-32 before it is decompressed: a damaged file is an error, never another picture.

blosc2 is an extra, ``pip install "nestseg[pack]"``. It is imported with the first piece and not before: it starts
threads, which must not be there when loader workers are forked.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, Literal, NamedTuple, TypeVar, cast, final

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from nestseg.core.disk import replaced_file
from nestseg.core.errors import PackError, nearest
from nestseg.core.taxonomy import Colour, Taxonomy
from nestseg.core.types import AbsentRule, ImageDtype, Sample, Size
from nestseg.data.dataset import FileDataset, SegmentationDataset
from nestseg.data.derive import DatasetFacts, spread_places
from nestseg.version import __version__

MANIFEST = "pack.json"
"""The file that makes a folder a packed split."""

TILE: Size = (128, 256)
"""Of six sizes tried on Cityscapes, 64x128 to 256x256, this packs smallest; larger tiles read a crop no faster."""

SHARD_SAMPLES = 64
"""Samples a file. One that was finished is kept when packing starts again."""

OnProgress = Callable[[int, int], None]
"""Called with the samples so far and in total."""

_ESTIMATE_SAMPLES = 8
_MARGIN = 1.1
_LARGEST_FILTERED = 255  # bytes a pixel
_DAMAGED = "copy the folder again, or run nestseg data pack again, which mends it"


class PackSummary(NamedTuple):
    """What `pack_dataset` did.

    Args:
        folder: The packed split.
        num_samples: How many it holds.
        num_kept: How many of them were there from an earlier run.
        num_bytes: Size of its files.
        num_pixel_bytes: Size of its pictures and label maps when decoded.
    """

    folder: Path
    num_samples: int
    num_kept: int
    num_bytes: int
    num_pixel_bytes: int


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _SampleRecord(_Record):
    """A sample in the index of its shard: its tiles by rows, then its label map."""

    name: str
    height: int
    width: int
    channels: int
    dtype: ImageDtype
    source: str
    """sha256 of what it was made of, see `_fingerprint`."""
    sizes: tuple[int, ...]
    """Bytes of each piece."""
    checksums: tuple[int, ...]
    """CRC-32 of each piece."""


class _Index(_Record):
    """What is in a shard, in order."""

    tile: Size
    samples: tuple[_SampleRecord, ...]


class _ShardRecord(_Record):
    size: int
    index_sha256: str


class _Manifest(_Record):
    """What ``pack.json`` says."""

    format: Literal[1] = 1
    tool: str
    dataset: str
    split: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    terms: str
    absent_classes: AbsentRule
    official_count: int | None
    num_samples: int
    shard_samples: int
    shards: tuple[_ShardRecord, ...]


def packed_splits(folder: str | Path) -> tuple[str, ...]:
    """Return the packed splits that a folder holds, none if it is no packed data set.

    Raises:
        OSError: If the folder cannot be read.
    """
    folder = Path(folder)
    return tuple(sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))) if folder.is_dir() else ()


def open_packed(root: str | Path, split: str, *, taxonomy: Taxonomy) -> PackedDataset:
    """Open a packed split of a certain data set.

    Args:
        root: Folder of the packed data set.
        split: One of its splits.
        taxonomy: Of the data set that it must be a copy of.

    Raises:
        PackError: E-PACK-011, if it is a copy of another one; E-PACK-012, if it was packed with other classes, since it
            holds their train ids; the errors of `PackedDataset`.
    """
    packed = PackedDataset(root, split)
    if packed.taxonomy.name != taxonomy.name:
        raise PackError(
            "E-PACK-011",
            f"a packed copy of {packed.taxonomy.name}, not of {taxonomy.name}",
            fix=f"name the folder of {taxonomy.name}, packed or not",
            path=root,
        )
    if packed.taxonomy.classes != taxonomy.classes:
        raise PackError(
            "E-PACK-012",
            f"packed with the classes {', '.join(packed.taxonomy.classes)}; now they are {', '.join(taxonomy.classes)}",
            fix="pack the data set again: nestseg data pack",
            path=root,
        )
    return packed


def read_for_crop(dataset: SegmentationDataset, index: int) -> Sample:
    """Read a sample of which a crop is about to be cut: of a packed picture only what the crop needs is decoded, then.

    Shape:
        - returns.image: (H, W, C), an array or a `PackedImage`
        - returns.target: (H, W) uint8 train ids in [0, K) or 255 (ignored)

    Raises:
        DataError: See `SegmentationDataset.read`.
    """
    return dataset.read_lazily(index) if isinstance(dataset, PackedDataset) else dataset.read(index)


def format_summary(summary: PackSummary) -> str:
    """Word a summary in one line.

    Example:
        >>> print(
        ...     format_summary(
        ...         PackSummary(
        ...             folder=Path("packed/val"),
        ...             num_samples=500,
        ...             num_kept=64,
        ...             num_bytes=10**9,
        ...             num_pixel_bytes=4 * 10**9,
        ...         )
        ...     )
        ... )
        packed/val: 500 samples (64 kept from before), 1,000,000,000 bytes; decoded 4,000,000,000
    """
    kept = f" ({summary.num_kept:,} kept from before)" if summary.num_kept else ""
    return (
        f"{summary.folder}: {summary.num_samples:,} samples{kept}, {summary.num_bytes:,} bytes; "
        f"decoded {summary.num_pixel_bytes:,}"
    )


def estimate_bytes(dataset: SegmentationDataset) -> int:
    """Estimate the size of the packed copy from eight samples spread over the data set.

    Raises:
        DataError: If a sample cannot be read.
        PackError: E-PACK-001, if blosc2 is not installed.
    """
    count = min(len(dataset), _ESTIMATE_SAMPLES)
    if not count:
        return 0
    chosen = (index * len(dataset) // count for index in range(count))
    total = sum(len(piece) for index in chosen for piece in _compress_sample(dataset.read(index)))
    return total * len(dataset) // count


def pack_dataset(
    dataset: SegmentationDataset,
    out: str | Path,
    *,
    split: str,
    on_progress: OnProgress = lambda done, total: None,
) -> PackSummary:
    """Write the packed copy of a split: whole or not at all.

    Starting again keeps the files whose samples are the same and undamaged; all others are written anew. So a run that
    was killed is finished, and damage is mended.

    Args:
        dataset: The split.
        out: Folder of the packed data set; the split gets a folder of its own in it.
        split: Name of the split.
        on_progress: Called after every sample.

    Raises:
        DataError: If a sample cannot be read.
        PackError: E-PACK-001 to E-PACK-004: no blosc2, too little space on the disk, another process at work, or a
            file that cannot be written.
    """
    _check_blosc2()
    folder = Path(out) / split
    shards, num_kept, num_pixel_bytes = [], 0, 0
    with _writing(folder):
        _check_space(dataset, folder)
        for number, start in enumerate(range(0, len(dataset), SHARD_SAMPLES)):
            path, indices = _shard_path(folder, number), range(len(dataset))[start : start + SHARD_SAMPLES]
            index = _find_shard(dataset, indices, path=path)
            if index is None:
                # an older pack of this folder ends here: its manifest would speak of what is about to change
                (folder / MANIFEST).unlink(missing_ok=True)
                index = _write_shard(dataset, indices, path=path, on_progress=on_progress)
            else:
                num_kept += len(indices)
                on_progress(indices[-1] + 1, len(dataset))
            digest = hashlib.sha256(path.with_suffix(".json").read_bytes()).hexdigest()
            shards.append(_ShardRecord(size=path.stat().st_size, index_sha256=digest))
            num_pixel_bytes += sum(
                record.height * record.width * (record.channels * np.dtype(record.dtype).itemsize + 1)
                for record in index.samples
            )
        for path in folder.glob("[0-9]*.*"):
            if int(path.stem) >= len(shards):
                path.unlink()  # of an older pack of more samples
        manifest = _Manifest(
            tool=f"nestseg {__version__}",
            dataset=dataset.taxonomy.name,
            split=split,
            classes=dataset.taxonomy.classes,
            palette=dataset.taxonomy.palette,
            terms=dataset.terms,
            absent_classes=dataset.absent_classes,
            official_count=dataset.official_counts.get(split),
            num_samples=len(dataset),
            shard_samples=SHARD_SAMPLES,
            shards=tuple(shards),
        )
        _write_text(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    return PackSummary(
        folder=folder,
        num_samples=len(dataset),
        num_kept=num_kept,
        num_bytes=sum(path.stat().st_size for path in folder.glob("[!.]*")),
        num_pixel_bytes=num_pixel_bytes,
    )


@final
class PackedDataset(SegmentationDataset):
    """A split that `pack_dataset` wrote.

    Args:
        root: Folder of the packed data set.
        split: One of its splits.

    Raises:
        PackError: E-PACK-001 if blosc2 is not installed, E-PACK-005 to E-PACK-008 if the split is not there, not
            whole, damaged, or of another format.
    """

    taxonomy: Taxonomy  # type: ignore[misc]  # a class attribute elsewhere; here the folder tells
    splits: tuple[str, ...]  # type: ignore[misc]
    terms: str  # type: ignore[misc]
    absent_classes: AbsentRule  # type: ignore[misc]
    official_counts: Mapping[str, int]  # type: ignore[misc]

    def __init__(self, root: str | Path | None, split: str) -> None:
        _check_blosc2()
        self.splits, self.split = () if root is None else packed_splits(root), split
        if root is None or split not in self.splits:
            raise PackError(
                "E-PACK-005",
                f"no packed split {split!r}; there are: {', '.join(self.splits) or 'none'}",
                fix=nearest(split, self.splits) if self.splits else "write one with nestseg data pack",
                path=root,
            )
        self._folder = Path(root) / split
        manifest = _read_record(_Manifest, self._folder / MANIFEST)
        self.taxonomy = Taxonomy(name=manifest.dataset, classes=manifest.classes, palette=manifest.palette)
        self.terms, self.absent_classes = manifest.terms, manifest.absent_classes
        self.official_counts = {} if manifest.official_count is None else {split: manifest.official_count}
        self._count, self._shard_samples, self._shards = manifest.num_samples, manifest.shard_samples, manifest.shards
        self._indices: dict[int, tuple[_Index, tuple[int, ...]]] = {}
        for number, shard in enumerate(self._shards):
            path = _shard_path(self._folder, number)
            size = path.stat().st_size if path.is_file() else None
            if size != shard.size:
                found = "not there" if size is None else f"{size:,} bytes"
                raise PackError("E-PACK-006", f"{found}; {shard.size:,} bytes were packed", fix=_DAMAGED, path=path)

    def __len__(self) -> int:
        return self._count

    def name(self, index: int) -> str:
        """Return a sample's name, see `SegmentationDataset.name`."""
        return self._find(index)[0].name

    def read(self, index: int) -> Sample:
        """Read one sample, see `SegmentationDataset.read`.

        Shape:
            - returns.image: (H, W, C) as it was packed
            - returns.target: (H, W) uint8 train ids in [0, K) or 255 (ignored)
        """
        sample = self.read_lazily(index)
        return sample._replace(image=sample.image[:, :])

    def measure(self, *, max_images: int = 64) -> DatasetFacts:
        """Look up the sizes of the images that `CustomDataset.measure` measures.

        Args:
            max_images: How many sizes are looked up at most.
        """
        records = [self._find(place)[0] for place in spread_places(len(self), max_images)]
        return DatasetFacts.from_sizes([(record.height, record.width) for record in records], num_images=len(self))

    def read_lazily(self, index: int) -> Sample:
        """Read the ground truth of a sample, and of its picture what is sliced out of it, when it is.

        Args:
            index: 0 to ``len(self) - 1``.

        Returns:
            A sample whose image is a `PackedImage`; `random_resize_crop` takes it as it takes an array.

        Shape:
            - returns.image: (H, W, C) as it was packed
            - returns.target: (H, W) uint8 train ids in [0, K) or 255 (ignored)

        Raises:
            IndexError: If there is no such sample.
            PackError: E-PACK-007 to E-PACK-009, if a file is damaged.
        """
        record, start, tile, path = self._find(index)
        image = PackedImage(record, start=start, tile=tile, path=path)
        target = np.empty((record.height, record.width), np.uint8)
        with _reading(path) as file:
            for piece in _read_pieces(file, record, start=start, run=range(len(record.sizes))[-1:]):
                _decompress(piece, into=target)
        return Sample(image=cast("NDArray[Any]", image), target=target)

    def _find(self, index: int) -> tuple[_SampleRecord, int, Size, Path]:
        """Return what is known of a sample, where it starts in which file, and the size of its tiles."""
        number, place = divmod(range(self._count)[index], self._shard_samples)
        path = _shard_path(self._folder, number)
        if number not in self._indices:
            digest = self._shards[number].index_sha256
            read = _read_record(_Index, path.with_suffix(".json"), sha256=digest)
            self._indices[number] = read, tuple(accumulate((sum(it.sizes) for it in read.samples), initial=0))
        index_of_shard, starts = self._indices[number]
        return index_of_shard.samples[place], starts[place], index_of_shard.tile, path


@final
class PackedImage:
    """The picture of a packed sample: a rectangle that is sliced out of it is decoded, and nothing else.

    Args:
        record: What is known of the sample.
        start: Where it starts in the file.
        tile: (height, width) of a whole tile.
        path: The file.

    Shape:
        - ``image[top:bottom, left:right]``: (bottom - top, right - left, C), a fresh writable array
    """

    def __init__(self, record: _SampleRecord, *, start: int, tile: Size, path: Path) -> None:
        self._record, self._start, self._tile, self._path = record, start, tile, path
        self.shape = (record.height, record.width, record.channels)
        self.dtype: np.dtype[Any] = np.dtype(record.dtype)

    def __array__(self, dtype: np.dtype[Any] | None = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:, :], dtype)

    def __getitem__(self, window: tuple[slice, slice]) -> NDArray[Any]:
        record, (tile_height, tile_width) = self._record, self._tile
        top, bottom, down = window[0].indices(record.height)
        left, right, across = window[1].indices(record.width)
        if down != 1 or across != 1:
            raise IndexError(f"{window}; allowed are slices without a step")
        cut = np.empty((max(0, bottom - top), max(0, right - left), record.channels), self.dtype)
        if not cut.size:
            return cut
        tiles_across = -(-record.width // tile_width)
        columns = range(left // tile_width, (right - 1) // tile_width + 1)
        scratch = np.empty(tile_height * tile_width * record.channels, self.dtype)
        with _reading(self._path) as file:
            for row in range(top // tile_height, (bottom - 1) // tile_height + 1):
                y = row * tile_height
                height = min(tile_height, record.height - y)
                rows = slice(max(top, y), min(bottom, y + height))
                # the tiles of a row lie side by side in the file
                run = range(row * tiles_across + columns.start, row * tiles_across + columns.stop)
                pieces = _read_pieces(file, record, start=self._start, run=run)
                for column, piece in zip(columns, pieces, strict=True):
                    x = column * tile_width
                    width = min(tile_width, record.width - x)
                    tile = scratch[: height * width * record.channels].reshape(height, width, record.channels)
                    _decompress(piece, into=tile)
                    part = slice(max(left, x), min(right, x + width))
                    cut[rows.start - top : rows.stop - top, part.start - left : part.stop - left] = tile[
                        rows.start - y : rows.stop - y, part.start - x : part.stop - x
                    ]
        return cut


@cache
def _import_blosc2() -> ModuleType:
    return importlib.import_module("blosc2")


def _check_blosc2() -> None:
    if importlib.util.find_spec("blosc2") is None:
        raise PackError(
            "E-PACK-001", "packed data sets need blosc2, which is not installed", fix='pip install "nestseg[pack]"'
        )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Hold a folder for this process, without what a killed one left half done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            for stale in folder.glob(".tmp-*"):
                stale.unlink()
            yield
    except Timeout as error:
        raise PackError("E-PACK-003", "another process packs here", fix="wait until it is done", path=folder) from error
    except OSError as error:
        raise PackError(
            "E-PACK-004",
            f"cannot be written: {error.strerror}",
            fix="free space on the disk, or choose a folder that is writable; what is finished is kept",
            path=error.filename or folder,
        ) from error


def _check_space(dataset: SegmentationDataset, folder: Path) -> None:
    there = sum(path.stat().st_size for path in folder.glob("[!.]*"))
    need = int(_MARGIN * estimate_bytes(dataset)) - there
    free = shutil.disk_usage(folder).free
    if need > free:
        raise PackError(
            "E-PACK-002",
            f"about {need:,} bytes are needed, {free:,} are free",
            fix="free space on the disk, or choose a folder on another one",
            path=folder,
        )


def _shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.blosc2"


def _find_shard(dataset: SegmentationDataset, indices: range, *, path: Path) -> _Index | None:
    """Return the index of a shard that is there already, undamaged and of the same samples."""
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return None
    try:
        index = _read_record(_Index, path.with_suffix(".json"))
    except PackError:
        return None
    names = [dataset.name(i) for i in indices]
    content = memoryview(path.read_bytes())
    size = sum(sum(record.sizes) for record in index.samples)
    if index.tile != TILE or [record.name for record in index.samples] != names or size != len(content):
        return None
    start = 0
    for record in index.samples:
        for size, checksum in zip(record.sizes, record.checksums, strict=True):
            if zlib.crc32(content[start : start + size]) != checksum:
                return None
            start += size
    same = all(record.source == _fingerprint(dataset, i) for i, record in zip(indices, index.samples, strict=True))
    return index if same else None


def _write_shard(dataset: SegmentationDataset, indices: range, *, path: Path, on_progress: OnProgress) -> _Index:
    """Write a shard and then its index."""
    path.with_suffix(".json").unlink(missing_ok=True)
    records = []
    with replaced_file(path) as temporary, temporary.open("wb") as file:
        for index in indices:
            sample = dataset.read(index)
            pieces = _compress_sample(sample)
            file.writelines(pieces)
            height, width, channels = sample.image.shape
            records.append(
                _SampleRecord(
                    name=dataset.name(index),
                    height=height,
                    width=width,
                    channels=channels,
                    dtype=sample.image.dtype.name,
                    source=_fingerprint(dataset, index, sample=sample),
                    sizes=tuple(map(len, pieces)),
                    checksums=tuple(map(zlib.crc32, pieces)),
                )
            )
            on_progress(index + 1, len(dataset))
    written = _Index(tile=TILE, samples=tuple(records))
    _write_text(path.with_suffix(".json"), written.model_dump_json() + "\n")
    return written


def _fingerprint(dataset: SegmentationDataset, index: int, *, sample: Sample | None = None) -> str:
    """Hash what a packed sample is made of: its two files and the table of ids, or, without such, its pixels."""
    digest = hashlib.sha256()
    if isinstance(dataset, FileDataset):
        pair = dataset.pairs[index]
        parts = [pair.image.read_bytes(), pair.label.read_bytes(), dataset.label_map.tobytes()]
    else:
        sample = dataset.read(index) if sample is None else sample
        parts = [sample.image.tobytes(), sample.target.tobytes()]
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def _compress_sample(sample: Sample) -> list[bytes]:
    """Return the pieces of a sample: the tiles of its picture by rows, then its label map."""
    blosc2 = _import_blosc2()
    height, width, channels = sample.image.shape
    pixel = channels * sample.image.itemsize
    # Planes, and in each of them differences to the pixel before: a photograph packs to a third.
    filters: dict[str, Any] = {"filters": [blosc2.Filter.NOFILTER], "typesize": 1}
    if pixel <= _LARGEST_FILTERED:
        planes = [blosc2.Filter.SHUFFLE, blosc2.Filter.BYTEDELTA]
        filters = {"filters": planes, "filters_meta": [0, pixel], "typesize": pixel}
    pieces = []
    for y in range(0, height, TILE[0]):
        for x in range(0, width, TILE[1]):
            tile = np.ascontiguousarray(sample.image[y : y + TILE[0], x : x + TILE[1]])
            pieces.append(_compress(tile, clevel=1, **filters))
    labels = np.ascontiguousarray(sample.target)
    pieces.append(_compress(labels, clevel=5, filters=[blosc2.Filter.NOFILTER], typesize=1))
    return pieces


def _compress(array: NDArray[Any], **settings: Any) -> bytes:
    blosc2 = _import_blosc2()
    # All of it is one block: blocks that do not hold whole pixels came back as errors (blosc2 4.14).
    options = {"codec": blosc2.Codec.ZSTD, "blocksize": array.nbytes, "nthreads": 1, **settings}
    compressed: bytes = blosc2.compress2(array, **options)
    unpacked = np.empty_like(array)
    try:
        _decompress(memoryview(compressed), into=unpacked)
        same = unpacked.tobytes() == array.tobytes()
    except (ValueError, RuntimeError):
        same = False
    if not same:
        raise PackError(
            "E-PACK-010",
            f"blosc2 {blosc2.__version__} does not give back a piece of {array.shape} {array.dtype}",
            fix="install another version of blosc2",
        )
    return compressed


def _decompress(piece: memoryview, *, into: NDArray[Any]) -> None:
    _import_blosc2().decompress2(piece, dst=into, nthreads=1)


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb", buffering=0) as file:
            yield cast("BinaryIO", file)
    except OSError as error:
        raise PackError("E-PACK-007", f"cannot be read: {error.strerror}", fix=_DAMAGED, path=path) from error


def _read_pieces(file: BinaryIO, record: _SampleRecord, *, start: int, run: range) -> Iterator[memoryview]:
    """Read pieces of a sample that follow each other, and compare each with its checksum.

    Raises:
        PackError: E-PACK-009.
    """
    file.seek(start + sum(record.sizes[: run.start]))
    content = memoryview(file.read(sum(record.sizes[run.start : run.stop])))
    begin = 0
    for number in run:
        piece = content[begin : begin + record.sizes[number]]
        if zlib.crc32(piece) != record.checksums[number]:
            raise PackError(
                "E-PACK-009",
                f"sample {record.name} is damaged: a checksum does not match",
                fix=_DAMAGED,
                path=file.name,
            )
        yield piece
        begin += len(piece)


_R = TypeVar("_R", bound=_Record)


def _read_record(kind: type[_R], path: Path, *, sha256: str | None = None) -> _R:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PackError("E-PACK-007", f"cannot be read: {error.strerror}", fix=_DAMAGED, path=path) from error
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise PackError("E-PACK-007", "damaged: its sha256 is not that of the manifest", fix=_DAMAGED, path=path)
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise PackError(
            "E-PACK-008", f"not what this version reads: {where} {problem['msg']}", fix=_DAMAGED, path=path
        ) from error


def _write_text(path: Path, text: str) -> None:
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
