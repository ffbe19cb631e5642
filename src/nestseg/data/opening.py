"""Opening a split: of a data set of the table, of one that a file describes, of a packed copy. No torch in here."""

from __future__ import annotations

from pathlib import Path

from nestseg.core.errors import DataError, nearest
from nestseg.data.custom import CustomDataset
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.datasets import DATASETS
from nestseg.data.derive import DatasetFacts, choose_splits
from nestseg.data.packed import PackedDataset, open_packed, packed_splits
from nestseg.data.spec import DatasetSpec


def open_dataset(name: str, root: str | Path | None, split: str) -> SegmentationDataset:
    """Open one split of a data set.

    Args:
        name: A key of `DATASETS`, or a data set file (ends in .yaml or .yml).
        root: The data set's folder, see its class, or one that ``nestseg data pack`` wrote; None for toystreets, which
            has no files, and for the folder of a data set file.
        split: One of the class's ``splits``.

    Raises:
        SpecError: For a data set file that makes no sense.
        DataError: E-DATA-025 for an unknown name; the errors of the data set's class for folder and split.
    """
    if name.endswith((".yaml", ".yml")):
        return open_custom(DatasetSpec.read(Path(name)), Path(name).parent if root is None else root, split)
    if name not in DATASETS:
        raise DataError(
            "E-DATA-025",
            f"data set {name!r}; allowed: {', '.join(DATASETS)}",
            fix=nearest(name, DATASETS),
        )
    if root is not None and packed_splits(root):
        return open_packed(root, split, taxonomy=DATASETS[name].taxonomy)
    return DATASETS[name](root, split)


def open_custom(spec: DatasetSpec, root: str | Path | None, split: str) -> SegmentationDataset:
    """Open one split of a data set of one's own, packed or not.

    Raises:
        DataError: For folder and split.
    """
    if root is not None and packed_splits(root):
        return open_packed(root, split, taxonomy=spec.taxonomy)
    return CustomDataset(spec, root, split)


def measure_dataset(spec: DatasetSpec, root: str | Path | None) -> DatasetFacts:
    """Measure the split that a data set of one's own, packed or not, is trained on; errors as `open_custom`."""
    dataset = open_custom(spec, root, choose_splits(spec)[0])
    assert isinstance(dataset, CustomDataset | PackedDataset), "what open_custom opens"
    return dataset.measure()
