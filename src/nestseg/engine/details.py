"""What a whole evaluation gathers beside the confusion matrix: where the model fails, and how sure the numbers are."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.types import AbsentRule, Sample
from nestseg.data.cityscapes import TRAIN_ID_TO_LABEL_ID, Cityscapes
from nestseg.data.dataset import SegmentationDataset
from nestseg.inference.predictor import Prediction
from nestseg.metrics.bootstrap import Interval, bootstrap_mean_iou
from nestseg.metrics.boundary import BoundaryCounts, boundary_iou
from nestseg.metrics.calibration import Calibration, CalibrationCounts, compute_calibration
from nestseg.metrics.cityscapes import CityscapesCounts, CityscapesScores, compute_cityscapes_scores
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.image_scores import ImageScores, ImageScoreWriter, image_counts, mean_iou_by_image
from nestseg.metrics.objects import ObjectCounts, iou_by_size, objects_by_size
from nestseg.report.evaluation_page import Kind, ReportPicture, shrink_picture

NUM_PICTURES = 6
"""Of each kind in the report."""

_WORST: Kind = "worst"
_BEST: Kind = "best"


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What was found beside the scores.

    Args:
        images: Counts of each image.
        interval: The mean IoU, and where it would lie with other images of the kind; None for one image, which has no
            others to be drawn with.
        boundary_iou: IoU of the bands along edges, a class each.
        iou_by_size: IoU by the size of objects: name of a size -> a value a class.
        objects_by_size: How many objects there are in the ground truth, likewise.
        calibration: How often the model is right where it is sure.
        cityscapes: Scores of the official script; None for another data set.
        pictures: Worst, best and randomly drawn images, for the report.
    """

    images: ImageScores
    interval: Interval | None
    boundary_iou: tuple[float | None, ...]
    iou_by_size: dict[str, tuple[float | None, ...]]
    objects_by_size: dict[str, tuple[int, ...]]
    calibration: Calibration
    cityscapes: CityscapesScores | None
    pictures: tuple[ReportPicture, ...]


@final
class DetailsCollector:
    """Gathers `Details` image by image; holds counts, and the few pictures of the report.

    Args:
        dataset: Whose images come.
        images_file: Where the scores of each image are written as they come; it gets its name when all are there.
    """

    def __init__(self, dataset: SegmentationDataset, *, images_file: Path) -> None:
        classes = dataset.taxonomy.classes
        self._dataset = dataset
        self._images = ImageScores(classes)
        self._writer = ImageScoreWriter(images_file, classes)
        self._boundary = BoundaryCounts(len(classes))
        self._objects = ObjectCounts(len(classes))
        self._calibration = CalibrationCounts()
        self._cityscapes = CityscapesCounts() if isinstance(dataset, Cityscapes) else None
        # the same ones for every model, so that reports can be laid side by side
        self._drawn = set(np.random.default_rng(0).permutation(len(dataset))[:NUM_PICTURES].tolist())
        self._pictures: list[ReportPicture] = []
        # heaps whose least entry goes first
        self._worst: list[tuple[float, int, ReportPicture]] = []
        self._best: list[tuple[float, int, ReportPicture]] = []

    def __enter__(self) -> Self:
        self._writer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.__exit__(kind, error, trace)

    def add(self, index: int, sample: Sample, prediction: Prediction, confusion: ConfusionMatrix) -> None:
        """Count an image.

        Args:
            index: Its place in the data set.
            sample: Image and ground truth.
            prediction: With the confidence of its labels.
            confusion: Of this image alone.

        Raises:
            DataError: If there is more to read of it, and that cannot be read, or its scores are not finite. Nothing is
                counted then.
        """
        labels, target = prediction.labels, sample.target
        assert prediction.confidence is not None, "the collector asks for it"
        if np.isnan(prediction.confidence).any():
            raise DataError(
                "E-DATA-119",
                "the model's scores of this image are not finite, so its labels mean nothing",
                fix="take an earlier checkpoint of that run; nestseg weights inspect says which tensors are bad",
                path=self._dataset.name(index),
            )
        if self._cityscapes is not None:
            # first, since instances are all that can be bad here
            assert isinstance(self._dataset, Cityscapes)
            instances = self._dataset.read_instances(index)
            try:
                self._cityscapes.update(TRAIN_ID_TO_LABEL_ID[labels], TRAIN_ID_TO_LABEL_ID[target], instances)
            except DataError as error:
                raise error.at(self._dataset.find_instances(index)) from error
        name, counts = self._dataset.name(index), image_counts(confusion)
        self._images.update(index, name, counts)
        self._writer.write(index, name, counts)
        self._boundary.update(labels, target)
        self._objects.update(labels, target)
        self._calibration.update(prediction.confidence, labels, target)
        self._keep_picture(index, mean_iou_by_image(counts[None])[0], sample, labels)

    def _keep_picture(self, index: int, mean_iou: float | None, sample: Sample, labels: NDArray[np.uint8]) -> None:
        """Keep a small copy of an image that is among the worst or best so far, or one of those that were drawn."""

        def shrunk(kind: Kind) -> ReportPicture:
            name = self._dataset.name(index)
            return shrink_picture(sample, labels, name=name, kind=kind, mean_iou=mean_iou)

        if index in self._drawn:
            self._pictures.append(shrunk("random"))
        if mean_iou is None:
            return
        # of equal scores the first image of the data set stays
        for heap, place, kind in (self._worst, (-mean_iou, -index), _WORST), (self._best, (mean_iou, -index), _BEST):
            if len(heap) < NUM_PICTURES:
                heapq.heappush(heap, (*place, shrunk(kind)))
            elif place > heap[0][:2]:
                heapq.heapreplace(heap, (*place, shrunk(kind)))

    def finish(self, *, absent: AbsentRule) -> Details:
        """Score what was gathered.

        Args:
            absent: What classes that occur nowhere do to a mean.
        """
        by_rank = [sorted(heap, key=lambda kept: kept[:2], reverse=True) for heap in (self._worst, self._best)]
        ranked = [picture for heap in by_rank for *_, picture in heap]
        interval = bootstrap_mean_iou(self._images.counts, absent=absent)
        return Details(
            images=self._images,
            interval=interval if interval.num_images > 1 else None,
            boundary_iou=boundary_iou(self._boundary.counts),
            iou_by_size=iou_by_size(self._objects.counts, self._objects.edges),
            objects_by_size=objects_by_size(self._objects.counts, self._objects.edges),
            calibration=compute_calibration(self._calibration.counts),
            cityscapes=None if self._cityscapes is None else compute_cityscapes_scores(self._cityscapes),
            pictures=(*ranked, *self._pictures),
        )
