"""Score a predictor on a data set: every pixel counted once, at the size of its ground truth."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nestseg.core.dist import num_ranks, sum_over_ranks
from nestseg.core.errors import DataError
from nestseg.core.image_io import preview_image, write_image
from nestseg.core.types import AbsentRule
from nestseg.data.dataset import SegmentationDataset
from nestseg.engine.details import Details, DetailsCollector
from nestseg.inference.modes import describe_mode, mode_record
from nestseg.inference.predictor import Predictor
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import SegmentationScores, compute_scores
from nestseg.ops.upsample_cross_entropy import sum_weights, upsample_cross_entropy
from nestseg.report.pictures import draw_comparison

NUM_PICTURES = 8


class EvaluationStopped(Exception):  # noqa: N818  # nothing went wrong
    """An evaluation was asked to stop before its end; it has no result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Args:
        dataset: Name of the data set.
        split: Which part of it.
        classes: Class names in train-id order.
        num_images: How many images were scored.
        confusion: Pixel counts over all of them.
        scores: The scores of those counts.
        protocol: How it was measured, in words.
        settings: The same as plain values, for a file.
    """

    dataset: str
    split: str
    classes: tuple[str, ...]
    num_images: int
    confusion: ConfusionMatrix
    scores: SegmentationScores
    protocol: str
    settings: dict[str, Any]
    loss: float | None = None
    """Mean cross-entropy over the labelled pixels, in nats; None if it was not asked for."""
    details: Details | None = None
    """What else was gathered; None if it was not asked for."""
    seconds_per_image: float = 0.0
    """Median time from pixels to labels, without reading and counting."""
    skipped: tuple[DataError, ...] = ()
    """Why images were left out; the result is partial if there are any."""
    folder: Path | None = None
    """Where the results were written; None if nowhere."""


def evaluate(
    predictor: Predictor,
    dataset: SegmentationDataset,
    *,
    split: str,
    max_images: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    pictures: Path | None = None,
    collector: DetailsCollector | None = None,
    skip_bad: bool = False,
    with_loss: bool = False,
    stop: Callable[[], bool] | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predict and count a split.

    Args:
        predictor: Labels an image at its own size.
        dataset: The opened split.
        split: Its name, for the record.
        max_images: Only the first so many; None means all.
        rank: This process's place among ``world_size``, which share the images; counts are added up over all.
        world_size: Number of processes.
        pictures: Folder for comparisons of up to eight images spread over the split; None draws none.
        collector: Gathers more than the confusion matrix, of this process's images.
        skip_bad: Leave out samples that cannot be read, and say so in the result, instead of raising.
        with_loss: Also average the cross-entropy of the logits, upsampled straight to the label's size.
        stop: Asked before each image, on all ranks equally often; True ends the evaluation.
        on_image: Called with (images done, images in all) on this rank.

    Raises:
        EvaluationStopped: If ``stop`` says so.
        DataError: If the predictor's classes are not those of the data set, or an image or label cannot be read.
    """
    taxonomy = dataset.taxonomy
    check_classes(predictor, dataset)
    total = len(dataset) if max_images is None else min(max_images, len(dataset))
    drawn = {round(place * (total - 1) / max(1, NUM_PICTURES - 1)) for place in range(NUM_PICTURES)}
    confusion = ConfusionMatrix(taxonomy.num_classes)
    mine = range(rank, total, world_size)
    loss, num_pixels = 0.0, 0
    skipped: list[DataError] = []

    def leave_out(error: DataError) -> None:
        if not skip_bad:
            raise error
        skipped.append(error)

    seconds: list[float] = []
    for place in range(math.ceil(total / world_size)):
        if stop is not None and stop():
            raise EvaluationStopped
        if place >= len(mine):
            break
        index = mine[place]
        try:
            sample = dataset.read(index)
        except DataError as error:
            leave_out(error)
            continue
        started = time.perf_counter()
        logits = predictor.compute_logits(sample.image)
        size = sample.image.shape[0], sample.image.shape[1]
        prediction = predictor.label(logits, size, confidence=collector is not None)
        seconds.append(time.perf_counter() - started)
        counts = ConfusionMatrix(taxonomy.num_classes)
        counts.update(prediction.labels, sample.target)
        if collector is not None:
            try:
                collector.add(index, sample, prediction, counts)
            except DataError as error:
                leave_out(error)
                continue
        confusion += counts
        if with_loss:
            target = torch.from_numpy(sample.target)[None].to(logits.device)
            mean = upsample_cross_entropy(logits, target, align_corners=predictor.align_corners)
            counted = int(sum_weights(target))
            loss, num_pixels = loss + float(mean) * counted, num_pixels + counted
        if pictures is not None and index in drawn:
            pictures.mkdir(parents=True, exist_ok=True)
            comparison = draw_comparison(
                preview_image(sample.image), sample.target, labels=prediction.labels, taxonomy=taxonomy
            )
            write_image(pictures / f"{dataset.name(index)}.png", comparison)
        if on_image is not None:
            on_image(place + 1, len(mine))
    if skipped and len(skipped) == len(mine):
        # nothing is left to score
        raise skipped[0]
    if num_ranks() > 1:
        loss, num_pixels = sum_over_ranks(
            torch.tensor([loss, num_pixels], dtype=torch.float64, device=predictor.device)
        ).tolist()
    confusion = _sum_over_ranks(confusion, predictor.device)
    absent = dataset.absent_classes
    return Evaluation(
        dataset=taxonomy.name,
        split=split,
        classes=taxonomy.classes,
        num_images=total - len(skipped),
        confusion=confusion,
        scores=compute_scores(confusion, absent=absent),
        protocol=describe_protocol(predictor),
        settings=_record_protocol(predictor, absent),
        loss=loss / max(1, num_pixels) if with_loss else None,
        details=None if collector is None else collector.finish(absent=absent),
        seconds_per_image=median(seconds) if seconds else 0.0,
        skipped=tuple(skipped),
    )


def check_classes(predictor: Predictor, dataset: SegmentationDataset) -> None:
    """Refuse to compare labels that do not mean the same.

    Raises:
        DataError: E-DATA-051, if the predictor's classes are not those of the data set.
    """
    if predictor.taxonomy.classes != dataset.taxonomy.classes:
        raise DataError(
            "E-DATA-051",
            f"the model has the {predictor.taxonomy.num_classes} classes of {predictor.taxonomy.name}, "
            f"the data set the {dataset.taxonomy.num_classes} of {dataset.taxonomy.name}",
            fix="evaluate on the data set that the model was trained for",
        )


def _sum_over_ranks(confusion: ConfusionMatrix, device: torch.device) -> ConfusionMatrix:
    assert confusion.void_counts is not None, "they were counted here"
    counts = sum_over_ranks(torch.from_numpy(confusion.counts).to(device)).cpu().numpy()
    void = sum_over_ranks(torch.from_numpy(confusion.void_counts).to(device)).cpu().numpy()
    return ConfusionMatrix.from_counts(counts, void)


def describe_protocol(predictor: Predictor) -> str:
    """Say in words how a predictor goes from an image to labels."""
    resizes = "" if predictor.logits_resizes == 1 else ", logits upsampled in two steps"
    return f"{describe_mode(predictor.mode)}{resizes}"


def _record_protocol(predictor: Predictor, absent: AbsentRule) -> dict[str, Any]:
    return {
        **mode_record(predictor.mode),
        "base_size": predictor.base_size,
        "logits_resizes": predictor.logits_resizes,
        "absent_classes": absent,
        "ignored_pixels": "not counted",
    }


def format_scores(evaluation: Evaluation) -> str:
    """Lay the scores out as a plain table: IoU, F1 and accuracy of each class in percent, then the means."""
    scores, classes = evaluation.scores, evaluation.classes

    def percent(value: float | None) -> str:
        return "absent" if value is None else f"{100 * value:.2f}"

    width = max(len("pixel accuracy"), *map(len, classes))
    rows = [f"{'class':<{width}}  {'IoU %':>7}  {'F1 %':>7}  {'acc %':>7}"]
    columns = (scores.iou_per_class, scores.dice_per_class, scores.accuracy_per_class)
    for name, *values in zip(classes, *columns, strict=True):
        rows.append("  ".join([f"{name:<{width}}", *(f"{percent(value):>7}" for value in values)]))
    means = (scores.mean_iou, scores.mean_dice, scores.mean_accuracy)
    rows += [
        "  ".join([f"{'mean':<{width}}", *(f"{percent(value):>7}" for value in means)]),
        f"{'pixel accuracy':<{width}}  {'':>7}  {'':>7}  {percent(scores.pixel_accuracy):>7}",
        f"{evaluation.dataset} {evaluation.split}, {evaluation.num_images} images, {evaluation.protocol}; "
        f"ignored pixels {evaluation.settings['ignored_pixels']}; "
        f"the mean is over {scores.num_classes_counted} of {len(classes)} classes",
    ]
    if evaluation.details is not None:
        interval = evaluation.details.interval
        if interval is not None:
            rows.append(
                f"with other images of the kind, the mean IoU would lie between {percent(interval.low)} and "
                f"{percent(interval.high)} (95 % interval)"
            )
        rows += _format_official(evaluation.details)
    if evaluation.skipped:
        rows.append(f"PARTIAL: {len(evaluation.skipped)} images were left out")
    return "\n".join(rows)


def _format_official(details: Details) -> list[str]:
    official = details.cityscapes
    if official is None:
        return []
    means = {
        "IoU of categories": official.mean_category_iou,
        "iIoU": official.mean_class_iiou,
        "iIoU of categories": official.mean_category_iiou,
    }
    shown = ", ".join(f"{name} {100 * value:.2f}" for name, value in means.items() if value is not None)
    return [f"by the rules of Cityscapes: {shown}"]
