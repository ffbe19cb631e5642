"""The scores against torchmetrics and against counting pixel by pixel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassJaccardIndex,
)

from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import compute_scores

Picture = NDArray[np.uint8]


def _draw(num_classes: int, *, present: int) -> list[tuple[Picture, Picture]]:
    """Pictures of different sizes whose ground truth and prediction hold only the first classes."""
    generator = np.random.default_rng(num_classes)
    pairs = []
    for size in [(33, 65), (48, 40), (7, 9)]:
        target = generator.integers(0, present, size, np.uint8)
        labels = np.where(generator.random(size) < 0.6, target, generator.integers(0, present, size, np.uint8))
        target[generator.random(size) < 0.1] = 255
        pairs.append((labels, target))
    return pairs


def _count(pairs: list[tuple[Picture, Picture]], num_classes: int) -> ConfusionMatrix:
    confusion = ConfusionMatrix(num_classes)
    for labels, target in pairs:
        confusion.update(labels, target)
    return confusion


def _feed(metric: torch.nn.Module, pairs: list[tuple[Picture, Picture]]) -> torch.Tensor:
    for labels, target in pairs:
        metric.update(torch.from_numpy(labels)[None].long(), torch.from_numpy(target)[None].long())
    return metric.compute()


@pytest.mark.parametrize("num_classes", [2, 11, 19, 21, 150])
def test_confusion_matrix_equals_torchmetrics(num_classes: int) -> None:
    pairs = _draw(num_classes, present=num_classes)
    theirs = _feed(MulticlassConfusionMatrix(num_classes, ignore_index=255), pairs)
    assert np.array_equal(_count(pairs, num_classes).counts[:, :-1], theirs.numpy())


@pytest.mark.parametrize(("num_classes", "present"), [(2, 2), (11, 11), (19, 17), (150, 150), (150, 40)])
def test_iou_and_its_mean_over_occurring_classes_equal_torchmetrics(num_classes: int, present: int) -> None:
    pairs = _draw(num_classes, present=present)
    scores = compute_scores(_count(pairs, num_classes), absent="skip")
    per_class = _feed(MulticlassJaccardIndex(num_classes, average="none", ignore_index=255), pairs)
    mean = _feed(MulticlassJaccardIndex(num_classes, average="macro", ignore_index=255), pairs)
    assert scores.num_classes_counted == present
    assert scores.iou_per_class[present:] == (None,) * (num_classes - present)
    assert scores.iou_per_class[:present] == pytest.approx(per_class[:present].tolist(), rel=1e-6)
    assert scores.mean_iou == pytest.approx(mean.item(), rel=1e-6)


@pytest.mark.parametrize("num_classes", [11, 150])
def test_accuracies_equal_torchmetrics(num_classes: int) -> None:
    pairs = _draw(num_classes, present=num_classes)
    scores = compute_scores(_count(pairs, num_classes), absent="skip")
    per_class = _feed(MulticlassAccuracy(num_classes, average="none", ignore_index=255), pairs)
    overall = _feed(MulticlassAccuracy(num_classes, average="micro", ignore_index=255), pairs)
    assert scores.accuracy_per_class == pytest.approx(per_class.tolist(), rel=1e-6)
    assert scores.mean_accuracy == pytest.approx(per_class.mean().item(), rel=1e-6)
    assert scores.pixel_accuracy == pytest.approx(overall.item(), rel=1e-6)


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_mean_iou_equals_a_count_of_every_pixel(absent: str) -> None:
    num_classes = 9
    pairs = _draw(num_classes, present=6)
    ratios = []
    for index in range(num_classes):
        both = either = 0
        for labels, target in pairs:
            for label, truth in zip(labels.ravel().tolist(), target.ravel().tolist(), strict=True):
                both += truth == index == label
                either += truth != 255 and index in (truth, label)
        ratios.append(both / either if either else None)
    values = [ratio or 0.0 for ratio in ratios if ratio is not None or absent == "zero"]
    scores = compute_scores(_count(pairs, num_classes), absent=absent)  # type: ignore[arg-type]
    assert scores.iou_per_class == tuple(ratios)
    assert scores.mean_iou == pytest.approx(sum(values) / len(values), rel=1e-15)
    assert len(values) == (6 if absent == "skip" else 9)
