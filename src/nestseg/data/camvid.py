"""CamVid with 11 classes, in the layout that came with SegNet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, final

from nestseg.core.taxonomy import Taxonomy
from nestseg.data.dataset import FileDataset, Pair, find_layout, list_files, make_label_map, match_pairs

TAXONOMY = Taxonomy(
    name="camvid",
    classes=(
        *("sky", "building", "pole", "road", "pavement", "tree"),
        *("sign", "fence", "car", "pedestrian", "bicyclist"),
    ),
    palette=(
        *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0)),
        *((192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
    ),
)

_ORIGIN = "the CamVid folder of the SegNet tutorial"


@final
class CamVid(FileDataset):
    """CamVid at 360x480: 11 classes; stored 11 (void) is ignored.

    Args:
        root: The folder that holds ``train``, ``trainannot``, ``val``, ``valannot``, ``test``, ``testannot``;
            those of the split asked for are enough.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        DataError: E-DATA-020 to E-DATA-023.

    Reference:
        Brostow et al., Semantic Object Classes in Video: A High-Definition Ground Truth Database, 2009.
        Badrinarayanan et al., SegNet, 2017 (the splits and the 11 classes).
    """

    taxonomy = TAXONOMY
    splits = ("train", "val", "test")
    terms = "research (CamVid); its page names no licence"
    official_counts: ClassVar[Mapping[str, int]] = {"train": 367, "val": 101, "test": 233}
    label_map = make_label_map({value: value for value in range(11)})
    label_values = frozenset(range(12))

    def _find_pairs(self, root: Path) -> Iterable[Pair]:
        base = find_layout(
            root,
            inside=(".",),
            expected={self.split: _ORIGIN, f"{self.split}annot": _ORIGIN},
            dataset="CamVid",
        )
        images = list_files(base / self.split, suffixes=(".png", ".jpg", ".jpeg"))
        labels = list_files(base / f"{self.split}annot", suffixes=(".png",))
        return match_pairs(sorted({*images, *labels}), images, labels, folder=base)
