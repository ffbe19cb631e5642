"""Label a split for the server of its benchmark, which keeps the ground truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nestseg.build import open_dataset_of, open_predictor
from nestseg.core.errors import DataError
from nestseg.data.dataset import FileDataset
from nestseg.data.submission import submission_writer
from nestseg.engine.evaluate import check_classes
from nestseg.engine.launch import require_float32


class Submission(NamedTuple):
    """What was written: where, how many label maps, and what to do with them."""

    folder: Path
    num_images: int
    upload: str


def submit_model(
    source: str | Path,
    data_root: Path,
    *,
    split: str,
    folder: Path,
    overrides: Sequence[str] = (),
    device: str = "auto",
    on_image: Callable[[int, int], None] | None = None,
) -> Submission:
    """Write the label maps of a split as the benchmark's server takes them.

    Args:
        source: See `nestseg.load_model`.
        data_root: Folder of the model's data set.
        split: Which part of it; it need not have labels.
        folder: Where to; made if absent.
        overrides: Changes of how images are labelled, such as ``"evaluation.flip=true"``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        on_image: Called with (images done, images in all).

    Raises:
        RunError: If there is no model.
        WeightsError: If it cannot be read.
        RecipeError: If an override makes no sense.
        DataError: If the data set has no server, an image cannot be read, or a label map cannot be written.
    """
    predictor, found = open_predictor(source, device=device, overrides=overrides)
    writer = submission_writer(predictor.taxonomy)
    require_float32(predictor.device)
    dataset = open_dataset_of(found.metadata, data_root, split=split)
    if not isinstance(dataset, FileDataset):
        raise DataError(
            "E-DATA-118",
            "a packed copy, which has no names of the official files",
            fix="pass the folder of the data set itself as --data",
            path=data_root,
        )
    check_classes(predictor, dataset)
    for index in range(len(dataset)):
        labels = predictor.predict(dataset.read_image(index)).labels
        writer.write(folder, dataset.name(index), labels)
        if on_image is not None:
            on_image(index + 1, len(dataset))
    return Submission(folder, len(dataset), writer.upload)
