"""Score a trained model on a split, and leave all that was found in a folder."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from nestseg.build import evaluation_of, open_dataset_of, open_predictor, versions
from nestseg.core.disk import sha256_of
from nestseg.core.errors import RunError
from nestseg.engine.details import DetailsCollector
from nestseg.engine.environment import code_commit, code_digest
from nestseg.engine.evaluate import Evaluation, evaluate
from nestseg.engine.evaluation_files import IMAGES_FILE, METRICS_FILE, write_metrics, write_reports
from nestseg.engine.launch import require_float32

_PICTURES = "pictures"


def evaluate_model(
    source: str | Path,
    data_root: Path | None,
    *,
    split: str | None = None,
    out: Path | None = None,
    skip_bad: bool = False,
    overrides: Sequence[str] = (),
    device: str = "auto",
    on_image: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score a run or a model file; write ``metrics.json``, ``report.html``, ``summary.md``, tables and pictures.

    Args:
        source: See `nestseg.load_model`.
        data_root: Folder of the model's data set; None for one that needs no files.
        split: Which part of it; None takes the recipe's evaluation split.
        out: Where to write; None means ``evaluation`` beside the model file; in the current folder for a
            published name.
        skip_bad: Leave out samples that cannot be read; the result then says that it is partial.
        overrides: Changes of how the model is scored, such as ``"evaluation.flip=true"``.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        on_image: Called with (images done, images in all).

    Raises:
        RunError: If there is no model; E-RUN-090 if the folder holds pictures that no evaluation wrote.
        WeightsError: If it cannot be read.
        RecipeError: If an override makes no sense.
        DataError: If the data cannot be read, or has no labels.
        OSError: If the results cannot be written.
    """
    predictor, found = open_predictor(source, device=device, overrides=overrides)
    metadata = found.metadata
    require_float32(predictor.device)
    split = split or (metadata.recipe or {}).get("data", {}).get("eval_split", "val")
    dataset = open_dataset_of(metadata, data_root, split=split)
    # beside the model where the user put it, but not in a cache
    folder = out or (found.path.parent if Path(source).exists() else Path()) / "evaluation"
    _check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        _replaced_folder(folder / _PICTURES) as pictures,
        DetailsCollector(dataset, images_file=folder / IMAGES_FILE) as collector,
    ):
        result = evaluate(
            predictor,
            dataset,
            split=split,
            pictures=pictures,
            collector=collector,
            skip_bad=skip_bad,
            on_image=on_image,
        )
        provenance = {
            "model": str(source) if not Path(source).exists() else found.path.name,
            "model_sha256": sha256_of(found.path),
            "step": metadata.step,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": code_commit(),
            "code": code_digest(),
            "device": predictor.device.type,
        }
        context = {**provenance, "versions": versions(), "model_versions": metadata.versions}
        write_metrics(result, folder, context=context)
        recipe = metadata.recipe
        if recipe is not None:
            recipe = recipe | {"evaluation": evaluation_of(metadata, overrides).model_dump(mode="json")}
        write_reports(
            result,
            folder,
            taxonomy=dataset.taxonomy,
            provenance=provenance | versions(),
            recipe=recipe,
            run=found.path.parent if (found.path.parent / "log.jsonl").is_file() else None,
        )
    return replace(result, folder=folder)


def _check_folder(folder: Path) -> None:
    """Refuse to take the place of pictures that are the user's own; those of an evaluation lie beside its figures."""
    pictures = folder / _PICTURES
    if pictures.exists() and not (folder / METRICS_FILE).exists():
        raise RunError(
            "E-RUN-090",
            f"{_PICTURES} is there already, and no evaluation wrote it: there is no {METRICS_FILE} beside it",
            fix="choose another --out",
            path=pictures,
        )


@contextmanager
def _replaced_folder(path: Path) -> Iterator[Path]:
    """Give a new folder to fill, which takes the place of another when all is there."""
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
