"""Score a predictor on a data set: every pixel counted once, at the size of its ground truth."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nestseg.build import open_dataset_of, open_predictor
from nestseg.core.disk import replaced_file, sha256_of
from nestseg.core.dist import num_ranks, sum_over_ranks
from nestseg.core.errors import DataError
from nestseg.core.image_io import preview_image, write_image
from nestseg.core.types import AbsentRule
from nestseg.data.dataset import SegmentationDataset
from nestseg.engine.launch import require_float32
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
        base_size: (short, long) that images were resized to before the network; None: not resized.
        logits_resizes: How often the logits were upsampled, see `Predictor`.
        absent_classes: What classes that occur nowhere did to the means.
    """

    dataset: str
    split: str
    classes: tuple[str, ...]
    num_images: int
    confusion: ConfusionMatrix
    scores: SegmentationScores
    base_size: tuple[int, int] | None
    logits_resizes: int
    absent_classes: AbsentRule
    loss: float | None = None
    """Mean cross-entropy over the labelled pixels, in nats; None if it was not asked for."""
    folder: Path | None = None
    """Where ``metrics.json`` and the pictures were written; None if nowhere."""

    @property
    def protocol(self) -> str:
        """How it was measured, in words."""
        resizes = "" if self.logits_resizes == 1 else ", logits upsampled in two steps"
        return f"single scale, whole image{resizes}"


def evaluate(
    predictor: Predictor,
    dataset: SegmentationDataset,
    *,
    split: str,
    max_images: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    pictures: Path | None = None,
    with_loss: bool = False,
    stop: Callable[[], bool] | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predict and count a split, single scale, whole image.

    Args:
        predictor: Labels an image at its own size.
        dataset: The opened split.
        split: Its name, for the record.
        max_images: Only the first so many; None means all.
        rank: This process's place among ``world_size``, which share the images; counts are added up over all.
        world_size: Number of processes.
        pictures: Folder for comparisons of up to eight images spread over the split; None draws none.
        with_loss: Also average the cross-entropy of the logits, upsampled straight to the label's size.
        stop: Asked before each image, on all ranks equally often; True ends the evaluation.
        on_image: Called with (images done, images in all) on this rank.

    Raises:
        EvaluationStopped: If ``stop`` says so.
        DataError: If the predictor's classes are not those of the data set, or an image or label cannot be read.
    """
    taxonomy = dataset.taxonomy
    if predictor.taxonomy.classes != taxonomy.classes:
        raise DataError(
            "E-DATA-051",
            f"the model has the {predictor.taxonomy.num_classes} classes of {predictor.taxonomy.name}, "
            f"the data set the {taxonomy.num_classes} of {taxonomy.name}",
            fix="evaluate on the data set that the model was trained for",
        )
    total = len(dataset) if max_images is None else min(max_images, len(dataset))
    drawn = {round(place * (total - 1) / max(1, NUM_PICTURES - 1)) for place in range(NUM_PICTURES)}
    confusion = ConfusionMatrix(taxonomy.num_classes)
    mine = range(rank, total, world_size)
    loss, num_pixels = 0.0, 0
    for place in range(math.ceil(total / world_size)):
        if stop is not None and stop():
            raise EvaluationStopped
        if place >= len(mine):
            break
        sample = dataset.read(mine[place])
        logits = predictor.compute_logits(sample.image)
        labels = predictor.label(logits, (sample.image.shape[0], sample.image.shape[1])).labels
        confusion.update(labels, sample.target)
        if with_loss:
            target = torch.from_numpy(sample.target)[None].to(logits.device)
            mean = upsample_cross_entropy(logits, target, align_corners=predictor.align_corners)
            counted = int(sum_weights(target))
            loss, num_pixels = loss + float(mean) * counted, num_pixels + counted
        if pictures is not None and mine[place] in drawn:
            pictures.mkdir(parents=True, exist_ok=True)
            comparison = draw_comparison(preview_image(sample.image), sample.target, labels=labels, taxonomy=taxonomy)
            write_image(pictures / f"{dataset.name(mine[place])}.png", comparison)
        if on_image is not None:
            on_image(place + 1, len(mine))
    counts = sum_over_ranks(torch.from_numpy(confusion.counts).to(predictor.device)).cpu().numpy()
    if num_ranks() > 1:
        loss, num_pixels = sum_over_ranks(
            torch.tensor([loss, num_pixels], dtype=torch.float64, device=predictor.device)
        ).tolist()
    confusion = ConfusionMatrix.from_counts(counts)
    return Evaluation(
        dataset=taxonomy.name,
        split=split,
        classes=taxonomy.classes,
        num_images=total,
        confusion=confusion,
        scores=compute_scores(confusion, absent=dataset.absent_classes),
        base_size=predictor.base_size,
        logits_resizes=predictor.logits_resizes,
        absent_classes=dataset.absent_classes,
        loss=loss / max(1, num_pixels) if with_loss else None,
    )


def evaluate_model(
    source: str | Path,
    data_root: Path | None,
    *,
    split: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    on_image: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a run or a model file, write ``metrics.json`` and pictures.

    Args:
        source: See `nestseg.load_model`.
        data_root: Folder of the model's data set; None for one that needs no files.
        split: Which part of it; None takes the recipe's evaluation split.
        out: Where to write; None means ``evaluation`` beside the model file; in the current folder for a
            published name.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        on_image: Called with (images done, images in all).

    Raises:
        RunError: If there is no model.
        WeightsError: If it cannot be read.
        DataError: If the data cannot be read.
        OSError: If the results cannot be written.
    """
    predictor, found = open_predictor(source, device=device)
    metadata = found.metadata
    require_float32(predictor.device)
    split = split or (metadata.recipe or {}).get("data", {}).get("eval_split", "val")
    # beside the model where the user put it, but not in a cache
    folder = out or (found.path.parent if Path(source).exists() else Path()) / "evaluation"
    result = evaluate(
        predictor,
        open_dataset_of(metadata, data_root, split=split),
        split=split,
        pictures=folder / "pictures",
        on_image=on_image,
    )
    context = {
        "model": str(source) if not Path(source).exists() else found.path.name,
        "model_sha256": sha256_of(found.path),
        "step": metadata.step,
        "versions": metadata.versions,
    }
    write_metrics(result, folder, context=context)
    return replace(result, folder=folder)


def format_scores(evaluation: Evaluation) -> str:
    """Lay the scores out as a plain table: IoU and accuracy of each class in percent, then the means."""
    scores, classes = evaluation.scores, evaluation.classes

    def percent(value: float | None) -> str:
        return "absent" if value is None else f"{100 * value:.2f}"

    width = max(len("pixel accuracy"), *map(len, classes))
    rows = [f"{'class':<{width}}  {'IoU %':>7}  {'acc %':>7}"]
    for name, iou, accuracy in zip(classes, scores.iou_per_class, scores.accuracy_per_class, strict=True):
        rows.append(f"{name:<{width}}  {percent(iou):>7}  {percent(accuracy):>7}")
    rows += [
        f"{'mean':<{width}}  {percent(scores.mean_iou):>7}  {percent(scores.mean_accuracy):>7}",
        f"{'pixel accuracy':<{width}}  {'':>7}  {percent(scores.pixel_accuracy):>7}",
        f"{evaluation.dataset} {evaluation.split}, {evaluation.num_images} images, {evaluation.protocol}; "
        f"the mean is over {scores.num_classes_counted} of {len(classes)} classes",
    ]
    return "\n".join(rows)


def write_metrics(evaluation: Evaluation, folder: Path, *, context: Mapping[str, Any]) -> Path:
    """Write ``metrics.json``: strict JSON, whole or not at all.

    Args:
        evaluation: What was found.
        folder: Where ``metrics.json`` goes; made if absent.
        context: More that identifies the result (model, step, versions).

    Returns:
        The file's path.
    """
    scores = evaluation.scores
    values = {
        "dataset": evaluation.dataset,
        "split": evaluation.split,
        "num_images": evaluation.num_images,
        "mean_iou": scores.mean_iou,
        "pixel_accuracy": scores.pixel_accuracy,
        "mean_accuracy": scores.mean_accuracy,
        "num_classes_counted": scores.num_classes_counted,
        "loss": evaluation.loss,
        "iou_per_class": dict(zip(evaluation.classes, scores.iou_per_class, strict=True)),
        "accuracy_per_class": dict(zip(evaluation.classes, scores.accuracy_per_class, strict=True)),
        "protocol": {
            "mode": "whole",
            "scales": [1.0],
            "flip": False,
            "base_size": evaluation.base_size,
            "logits_resizes": evaluation.logits_resizes,
            "absent_classes": evaluation.absent_classes,
            "ignored_pixels": "not counted",
        },
        **context,
        "confusion_matrix": evaluation.confusion.counts[:, :-1].tolist(),
        "no_class_predicted": evaluation.confusion.counts[:, -1].tolist(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.json"
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")
    return path
