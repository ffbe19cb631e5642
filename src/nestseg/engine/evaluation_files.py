"""What an evaluation leaves in a folder: strict JSON, tables, and a page to look at."""

from __future__ import annotations

import json
import resource
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from nestseg.core.disk import replaced_file
from nestseg.core.taxonomy import Taxonomy
from nestseg.engine.details import Details
from nestseg.engine.evaluate import Evaluation
from nestseg.engine.runs import learning_curves
from nestseg.metrics.iou import compute_scores, final_score
from nestseg.report.evaluation_page import EvaluationReport, format_markdown, write_class_csv, write_evaluation_report

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
SUMMARY_FILE = "summary.md"
CLASSES_FILE = "classes.csv"
IMAGES_FILE = "images.csv"


def write_metrics(evaluation: Evaluation, folder: Path, *, context: Mapping[str, Any]) -> Path:
    """Write ``metrics.json``: strict JSON, whole or not at all.

    The report and tables of an earlier evaluation that lie beside it go: they would speak of other figures.

    Args:
        evaluation: What was found.
        folder: Where ``metrics.json`` goes; made if absent.
        context: More that identifies the result (model, step, versions).

    Returns:
        The file's path.
    """
    scores, classes = evaluation.scores, evaluation.classes
    values = {
        "dataset": evaluation.dataset,
        "split": evaluation.split,
        "num_images": evaluation.num_images,
        "partial": bool(evaluation.skipped),
        "skipped": [str(error) for error in evaluation.skipped],
        "mean_iou": scores.mean_iou,
        "pixel_accuracy": scores.pixel_accuracy,
        "mean_accuracy": scores.mean_accuracy,
        "mean_dice": scores.mean_dice,
        "mean_precision": scores.mean_precision,
        "frequency_weighted_iou": scores.frequency_weighted_iou,
        "final_score": final_score(scores),
        "num_classes_counted": scores.num_classes_counted,
        "mean_iou_with_void_as_false_positive": _void_counted(evaluation),
        "loss": evaluation.loss,
        "iou_per_class": dict(zip(classes, scores.iou_per_class, strict=True)),
        "accuracy_per_class": dict(zip(classes, scores.accuracy_per_class, strict=True)),
        "dice_per_class": dict(zip(classes, scores.dice_per_class, strict=True)),
        "precision_per_class": dict(zip(classes, scores.precision_per_class, strict=True)),
        **_describe_details(evaluation),
        "protocol": evaluation.settings,
        "seconds_per_image": round(evaluation.seconds_per_image, 4),
        **context,
        "confusion_matrix": evaluation.confusion.counts[:, :-1].tolist(),
        "no_class_predicted": evaluation.confusion.counts[:, -1].tolist(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / METRICS_FILE
    with replaced_file(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")
        for name in (REPORT_FILE, SUMMARY_FILE, CLASSES_FILE, IMAGES_FILE):
            if (folder / name).exists():
                (folder / name).unlink()
    return path


def _void_counted(evaluation: Evaluation) -> float:
    """Return the mean IoU by the other of the two rules for what is predicted on ignored pixels."""
    absent = evaluation.settings["absent_classes"]
    return compute_scores(evaluation.confusion, absent=absent, void="false_positive").mean_iou


def _describe_details(evaluation: Evaluation) -> dict[str, Any]:
    details, classes = evaluation.details, evaluation.classes
    if details is None:
        return {}
    return {
        "mean_iou_interval": None if details.interval is None else asdict(details.interval),
        "boundary_iou_per_class": dict(zip(classes, details.boundary_iou, strict=True)),
        "iou_per_class_by_size": {
            size: dict(zip(classes, values, strict=True)) for size, values in details.iou_by_size.items()
        },
        "objects_per_class_by_size": {
            size: dict(zip(classes, numbers, strict=True)) for size, numbers in details.objects_by_size.items()
        },
        "calibration": asdict(details.calibration),
        "cityscapes": None if details.cityscapes is None else asdict(details.cityscapes),
        "worst_images": [[score.name, score.mean_iou] for score in details.images.worst(20)],
    }


def write_reports(
    evaluation: Evaluation,
    folder: Path,
    *,
    taxonomy: Taxonomy,
    provenance: Mapping[str, Any],
    recipe: Mapping[str, Any] | None,
    run: Path | None,
) -> None:
    """Write what people read: ``report.html``, ``summary.md`` and ``classes.csv``.

    Args:
        evaluation: What was found, details included.
        folder: Where to.
        taxonomy: Names and colours of the classes.
        provenance: What was measured: model, sha256, versions.
        recipe: Of the model, as plain values, with the evaluation that was done; None where there is none.
        run: The run folder whose curves are shown; None shows none.

    Raises:
        OSError: If one cannot be written.
    """
    details = evaluation.details
    assert details is not None, "a report is made of them"
    report = EvaluationReport(
        title=f"{evaluation.dataset} {evaluation.split}",
        taxonomy=taxonomy,
        scores=evaluation.scores,
        confusion=evaluation.confusion,
        interval=None if details.interval is None else (details.interval.low, details.interval.high),
        protocol=_word_protocol(evaluation),
        provenance={name: "-" if value is None else str(value) for name, value in provenance.items()},
        boundary_iou=details.boundary_iou,
        iou_by_size=details.iou_by_size,
        objects_by_size=details.objects_by_size,
        calibration=details.calibration,
        extra_tables=_other_rules(evaluation) | _official_tables(details),
        images=[(score.name, score.mean_iou) for score in details.images.worst(20)],
        pictures=details.pictures,
        curves=[] if run is None else learning_curves(run),
        latency={
            "Median time an image": f"{1000 * evaluation.seconds_per_image:.0f} ms, reading and counting left out",
            # in KiB on Linux
            "Largest memory of the process": f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB",
        },
        recipe=None if recipe is None else yaml.safe_dump(dict(recipe), sort_keys=False, default_flow_style=None),
        partial=[str(error) for error in evaluation.skipped],
    )
    write_evaluation_report(report, folder / REPORT_FILE)
    write_class_csv(report, folder / CLASSES_FILE)
    with replaced_file(folder / SUMMARY_FILE) as temporary:
        temporary.write_text(format_markdown(report), encoding="utf-8")


def _word_protocol(evaluation: Evaluation) -> dict[str, str]:
    settings, counted = evaluation.settings, evaluation.scores.num_classes_counted
    base = settings["base_size"]
    return {
        "Images": f"{evaluation.num_images} of {evaluation.split}",
        "Inference": evaluation.protocol,
        "Resized to": "not resized" if base is None else f"short side {base[0]}, long side {base[1]} at the most",
        "Scored at": "the size of the ground truth, which is never resized",
        "Ignored pixels": str(settings["ignored_pixels"]),
        "Absent classes": "left out of the mean" if settings["absent_classes"] == "skip" else "count as 0",
        "Classes in the mean": f"{counted} of {len(evaluation.classes)}",
    }


def _other_rules(evaluation: Evaluation) -> dict[str, dict[str, float | None]]:
    """Scores that papers and servers compute by other rules."""
    scores = evaluation.scores
    return {
        "By other rules": {
            "mean IoU, ignored pixels as false positives": _void_counted(evaluation),
            "mean of pixel accuracy and mean IoU (ADE20K ranks by it)": final_score(scores),
        }
    }


def _official_tables(details: Details) -> dict[str, dict[str, float | None]]:
    official = details.cityscapes
    if official is None:
        return {}
    return {
        "IoU of categories": {**official.category_iou, "mean": official.mean_category_iou},
        "iIoU of classes": {**official.class_iiou, "mean": official.mean_class_iiou},
        "iIoU of categories": {**official.category_iiou, "mean": official.mean_category_iiou},
    }
