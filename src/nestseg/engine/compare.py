"""Is one model better than another, or would other images have said the opposite?"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nestseg.build import open_dataset_of, open_predictor
from nestseg.core.disk import replaced_file
from nestseg.data.dataset import SegmentationDataset
from nestseg.engine.evaluate import check_classes, describe_protocol
from nestseg.engine.launch import require_float32
from nestseg.inference.predictor import Predictor
from nestseg.metrics.bootstrap import PairedDifference, paired_bootstrap
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.image_scores import image_counts
from nestseg.metrics.iou import SegmentationScores, compute_scores

_SURE = 0.05
"""Below this p-value a difference is called one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two models on the same images.

    Args:
        models: What they were called.
        dataset: Name of the data set.
        split: Which part of it.
        classes: Class names in train-id order.
        num_images: How many images both labelled.
        protocols: How each was measured, in words.
        scores: Of each.
        difference: Mean IoU of the second minus that of the first, and how sure that is.
        images: How often the second is better, the first is, and neither, by an image's pixel accuracy.
    """

    models: tuple[str, str]
    dataset: str
    split: str
    classes: tuple[str, ...]
    num_images: int
    protocols: tuple[str, str]
    scores: tuple[SegmentationScores, SegmentationScores]
    difference: PairedDifference
    images: tuple[int, int, int]


def compare_models(
    first: str | Path,
    second: str | Path,
    data_root: Path | None,
    *,
    split: str | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
    on_image: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Score two models on the same images, and draw the images anew to see what the difference is worth.

    Args:
        first: See `nestseg.load_model`.
        second: Likewise; of the same classes.
        data_root: Folder of the first model's data set; None for one that needs no files.
        split: Which part of it; None takes the evaluation split of the first model's recipe.
        out: A file that gets the figures as JSON; None writes none.
        overrides: Changes of how both are scored, such as ``"evaluation.flip=true"``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        on_image: Called with (images done, images in all).

    Raises:
        RunError: If there is no model.
        WeightsError: If one cannot be read.
        RecipeError: If an override makes no sense.
        DataError: If the data cannot be read, or classes differ.
        OSError: If the figures cannot be written.
    """
    opened = [open_predictor(source, device=device, overrides=overrides) for source in (first, second)]
    predictors = [predictor for predictor, _ in opened]
    metadata = opened[0][1].metadata
    split = split or (metadata.recipe or {}).get("data", {}).get("eval_split", "val")
    dataset = open_dataset_of(metadata, data_root, split=split)
    require_float32(predictors[0].device)
    confusions, counts = _count(predictors, dataset, on_image=on_image)
    absent = dataset.absent_classes
    right = counts[..., 0].sum(axis=2)
    result = Comparison(
        models=(str(first), str(second)),
        dataset=dataset.taxonomy.name,
        split=split,
        classes=dataset.taxonomy.classes,
        num_images=len(dataset),
        protocols=(describe_protocol(predictors[0]), describe_protocol(predictors[1])),
        scores=(compute_scores(confusions[0], absent=absent), compute_scores(confusions[1], absent=absent)),
        difference=paired_bootstrap(counts[0], counts[1], absent=absent),
        images=(int((right[1] > right[0]).sum()), int((right[0] > right[1]).sum()), int((right[0] == right[1]).sum())),
    )
    if out is not None:
        with replaced_file(out) as temporary:
            temporary.write_text(json.dumps(asdict(result), indent=1, allow_nan=False), encoding="utf-8")
    return result


def _count(
    predictors: Sequence[Predictor], dataset: SegmentationDataset, *, on_image: Callable[[int, int], None] | None
) -> tuple[list[ConfusionMatrix], NDArray[np.int64]]:
    """Label every image with each model, reading it once.

    Shape:
        - returns: one matrix a model, and (2, N, K, 3) int64 as `ImageScores` has them
    """
    for predictor in predictors:
        check_classes(predictor, dataset)
    confusions = [ConfusionMatrix(dataset.taxonomy.num_classes) for _ in predictors]
    counts = np.zeros((len(predictors), len(dataset), dataset.taxonomy.num_classes, 3), np.int64)
    for index in range(len(dataset)):
        sample = dataset.read(index)
        for place, predictor in enumerate(predictors):
            confusion = ConfusionMatrix(dataset.taxonomy.num_classes)
            confusion.update(predictor.predict(sample.image).labels, sample.target)
            counts[place, index] = image_counts(confusion)
            confusions[place] += confusion
        if on_image is not None:
            on_image(index + 1, len(dataset))
    return confusions, counts


def format_comparison(comparison: Comparison) -> str:
    """Lay two models out side by side, classes that moved most first, and say what the difference is worth."""
    first, second = comparison.scores
    pairs = zip(comparison.classes, first.iou_per_class, second.iou_per_class, strict=True)
    rows = sorted(pairs, key=lambda row: -abs((row[2] or 0) - (row[1] or 0)))
    width = max(len("mean"), *(len(name) for name in comparison.classes))

    def percent(value: float | None) -> str:
        return "absent" if value is None else f"{100 * value:.2f}"

    def line(name: str, before: float | None, after: float | None) -> str:
        change = "" if before is None or after is None else f"{100 * (after - before):+.2f}"
        return f"{name:<{width}}  {percent(before):>7}  {percent(after):>7}  {change:>7}".rstrip()

    found = comparison.difference
    verdict = "more than chance" if found.p_value < _SURE else "not more than chance would give"
    better, worse, alike = comparison.images
    return "\n".join(
        [
            f"A: {comparison.models[0]}, {comparison.protocols[0]}",
            f"B: {comparison.models[1]}, {comparison.protocols[1]}",
            f"{'IoU %':<{width}}  {'A':>7}  {'B':>7}  {'B - A':>7}",
            *(line(*row) for row in rows),
            line("mean", first.mean_iou, second.mean_iou),
            f"{comparison.dataset} {comparison.split}, {comparison.num_images} images: B has more pixels right in "
            f"{better}, A in {worse}, both as many in {alike}",
            f"B - A in mean IoU: {100 * found.difference:+.2f}, 95 % interval {100 * found.low:+.2f} to "
            f"{100 * found.high:+.2f}, p = {found.p_value:.3f}: {verdict}",
        ]
    )
