"""Cityscapes from its two archives, which its site gives to registered users only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nestseg.data.cityscapes import Cityscapes
from nestseg.data.prepare.archives import Archive
from nestseg.data.prepare.preparation import Plan, Preparation, Source, select_members

_PAGE = "https://www.cityscapes-dataset.com/downloads/, after a registration"

# Read are labelIds, and instanceIds for the scores of instances: labelTrainIds are not in the archive, nor needed.
_MEMBERS = {
    "leftImg8bit_trainvaltest.zip": (
        r"(?:.*/)?(?P<path>leftImg8bit/(?:train|val)/[^/.][^/]*/[^/.][^/]*_leftImg8bit\.png)",
        ("leftImg8bit/train", "leftImg8bit/val"),
    ),
    "gtFine_trainvaltest.zip": (
        r"(?:.*/)?(?P<path>gtFine/(?:train|val)/[^/.][^/]*/[^/.][^/]*_gtFine_(?:labelIds|instanceIds)\.png)",
        ("gtFine/train", "gtFine/val"),
    ),
}
_DIGESTS = {
    "leftImg8bit_trainvaltest.zip": "md5:0a6e97e94b616a514066c9e2adb0c97f",
    "gtFine_trainvaltest.zip": "md5:4237c19de34c8a376e9ba46b495d6f66",
}


def _make_plan(archives: Mapping[str, Archive], folder: Path) -> Plan:
    outputs = []
    for name, archive in archives.items():
        pattern, folders = _MEMBERS[name]
        outputs += select_members(archive, name, pattern, folders=folders)
    return Plan(outputs)


PREPARATION = Preparation(
    dataset=Cityscapes,
    sources=tuple(
        Source(name, page=_PAGE, gives=folders, digest=_DIGESTS[name]) for name, (_, folders) in _MEMBERS.items()
    ),
    homes=(".",),
    folders=("leftImg8bit/train", "leftImg8bit/val", "gtFine/train", "gtFine/val"),
    splits=("train", "val"),
    make_plan=_make_plan,
)
