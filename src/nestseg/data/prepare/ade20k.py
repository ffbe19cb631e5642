"""ADE20K from the archive of the 2016 scene parsing challenge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nestseg.core.errors import PrepareError
from nestseg.data.ade20k import ADE20K
from nestseg.data.prepare.archives import Archive
from nestseg.data.prepare.preparation import Plan, Preparation, Source, select_members

_ARCHIVE = "ADEChallengeData2016.zip"
_FULL = "the full ADE20K, with thousands of object names"

_FOLDERS = ("images/training", "images/validation", "annotations/training", "annotations/validation")
_MEMBERS = (
    r"(?:.*/)?(?P<path>images/(?:training|validation)/[^/.][^/]*\.jpg"
    r"|annotations/(?:training|validation)/[^/.][^/]*\.png)"
)


def _make_plan(archives: Mapping[str, Archive], folder: Path) -> Plan:
    archive = archives[_ARCHIVE]
    # the full data set has its label maps beside the pictures, with red, green and blue that hold parts of an id
    if any(name.endswith("_seg.png") for name in archive.sizes):
        raise PrepareError(
            "E-PREPARE-015",
            f"{_FULL} (it holds _seg.png files); expected: {_ARCHIVE}",
            fix=f"fetch {_ARCHIVE}, the scene parsing form with 150 classes",
            path=archive.path,
        )
    return Plan(select_members(archive, _ARCHIVE, _MEMBERS, folders=_FOLDERS))


PREPARATION = Preparation(
    dataset=ADE20K,
    sources=(
        Source(
            _ARCHIVE,
            page="http://sceneparsing.csail.mit.edu, 'Data'",
            gives=_FOLDERS,
            digest="md5:7328b3957e407ddae1d3cbf487f149ef",
            urls=(
                "https://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
            ),
        ),
    ),
    homes=("ADEChallengeData2016", "."),
    folders=_FOLDERS,
    splits=("train", "val"),
    make_plan=_make_plan,
    lookalikes={"ADE20K_2016_07_26.zip": _FULL, "ADE20K_2021_17_01.zip": _FULL},
)
