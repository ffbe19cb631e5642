"""Results in the form in which the servers of the benchmarks take them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.image_io import write_labels
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import IGNORE_INDEX, Size
from nestseg.data.ade20k import ADE20K
from nestseg.data.cityscapes import Cityscapes
from nestseg.data.dataset import FileDataset
from nestseg.data.voc import VOC


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class SubmissionWriter:
    """Writes label maps as one benchmark wants them.

    Args:
        dataset: The data set; its stored ids are those that the server compares.
        sample_name: Regular expression of the names of its samples.
        example: One of these names.
        file_name: Path of a result inside the submission, with ``{}`` for the sample's name.
        has_palette: Whether maps are palette PNGs; else they are 8-bit grey.
        size: The size that every map has; None: each as its image.
        upload: What to do with the folder, in words.
    """

    dataset: type[FileDataset]
    sample_name: str
    example: str
    file_name: str
    has_palette: bool
    size: Size | None
    upload: str

    def write(self, folder: str | Path, sample_name: str, labels: NDArray[np.uint8]) -> Path:
        """Write the result of one sample; the file appears whole or not at all.

        Args:
            folder: Folder of the submission; made where it is not there.
            sample_name: The sample's name, as the data set says it.
            labels: Train ids, at the size of the image.

        Returns:
            The file.

        Shape:
            - labels: (H, W) uint8 in [0, K)

        Raises:
            ValueError: If the labels have another number of dimensions or dtype.
            DataError: E-DATA-112 for a name that is none of the data set's, E-DATA-113 for labels that are no class,
                E-DATA-116 for a folder that cannot be made, E-DATA-117 for another size than the benchmark's,
                E-DATA-018 for a file that cannot be written.
        """
        if labels.dtype != np.uint8 or labels.ndim != 2:
            raise ValueError(f"labels: {labels.dtype} of shape {labels.shape}; allowed: uint8, two-dimensional")
        taxonomy = self.dataset.taxonomy
        if not re.fullmatch(self.sample_name, sample_name):
            raise DataError(
                "E-DATA-112",
                f"sample name {sample_name!r}; allowed: the data set's, such as {self.example}",
                fix="keep the file names of the data set as published",
                path=taxonomy.name,
            )
        if self.size is not None and labels.shape != self.size:
            given, wanted = (f"{height}x{width}" for height, width in (labels.shape, self.size))
            raise DataError(
                "E-DATA-117",
                f"labels of {given}; allowed in {taxonomy.name}: {wanted}",
                fix="predict the images as published; labels come at the size of their image",
                path=sample_name,
            )
        if (strays := np.unique(labels[labels >= taxonomy.num_classes])).size:
            raise DataError(
                "E-DATA-113",
                f"labels {', '.join(map(str, strays))}; allowed: 0-{taxonomy.num_classes - 1}",
                fix="give every pixel a class",
                path=sample_name,
            )
        path = Path(folder, self.file_name.format(sample_name))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                "E-DATA-116",
                f"folder cannot be made: {error.strerror}",
                fix="choose a folder that is not there yet, or is writable",
                path=path.parent,
            ) from error
        stored_ids = _invert(self.dataset.label_map)[labels]
        write_labels(path, stored_ids, taxonomy.colour_table() if self.has_palette else None)
        return path


SUBMISSIONS: dict[str, SubmissionWriter] = {
    "cityscapes": SubmissionWriter(
        dataset=Cityscapes,
        sample_name=r"[A-Za-z-]+_\d{6}_\d{6}",
        example="berlin_000000_000019",
        file_name="{}_pred_labelIds.png",
        has_palette=False,
        size=(1024, 2048),
        upload="zip the PNG files and upload them at https://www.cityscapes-dataset.com/submit",
    ),
    "voc": SubmissionWriter(
        dataset=VOC,
        sample_name=r"\d{4}_\d{6}",
        example="2008_000006",
        file_name="results/VOC2012/Segmentation/comp6_test_cls/{}.png",
        has_palette=True,
        size=None,
        upload="tar -czf results.tgz results, and upload that at http://host.robots.ox.ac.uk:8080",
    ),
    "ade20k": SubmissionWriter(
        dataset=ADE20K,
        sample_name=r"ADE_[a-z]+_\d{8}",
        example="ADE_test_00000001",
        file_name="{}.png",
        has_palette=False,
        size=None,
        upload="zip the PNG files and upload them at http://sceneparsing.csail.mit.edu",
    ),
}
"""The writer of each data set whose benchmark has a server."""


def submission_writer(taxonomy: Taxonomy) -> SubmissionWriter:
    """Return the writer of a data set's submissions.

    Args:
        taxonomy: The classes that are predicted; they have to be the benchmark's.

    Raises:
        DataError: E-DATA-110 if the data set has no server, E-DATA-111 if the classes are others.

    Example:
        >>> from nestseg.data.voc import TAXONOMY
        >>> submission_writer(TAXONOMY).file_name
        'results/VOC2012/Segmentation/comp6_test_cls/{}.png'
    """
    writer = SUBMISSIONS.get(taxonomy.name)
    if writer is None:
        raise DataError(
            "E-DATA-110",
            f"no benchmark takes results of this data set; allowed: {', '.join(SUBMISSIONS)}",
            fix="score them on a split that has labels, or write them with nestseg predict",
            path=taxonomy.name,
        )
    official = writer.dataset.taxonomy.classes
    if taxonomy.classes != official:
        # the class after the last one is no class, so that lists of two lengths differ too
        given, wanted = (*taxonomy.classes, "none"), (*official, "none")
        place = next(place for place, pair in enumerate(zip(given, wanted, strict=False)) if pair[0] != pair[1])
        raise DataError(
            "E-DATA-111",
            f"class {place} is {given[place]}, in the benchmark {wanted[place]}",
            fix=f"predict with a model that was trained on {taxonomy.name} as it is",
            path=taxonomy.name,
        )
    return writer


def _invert(label_map: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the table from train ids to stored ids; 0 for what is no class.

    Shape:
        - label_map, returns: (256,) uint8
    """
    stored_ids = np.zeros(256, np.uint8)
    classes = np.flatnonzero(label_map != IGNORE_INDEX)
    stored_ids[label_map[classes]] = classes
    return stored_ids
