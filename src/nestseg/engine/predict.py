"""Label picture files: one label PNG and one overlay a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from nestseg.core.errors import DataError
from nestseg.core.image_io import write_image
from nestseg.engine.launch import require_float32
from nestseg.inference.predictor import Predictor

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


class PredictedFiles(NamedTuple):
    """What became of the inputs: label files written, inputs left alone since their outputs exist, failures."""

    written: list[Path]
    skipped: list[Path]
    failed: list[DataError]


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Path],
    *,
    out: Path,
    overwrite: bool = False,
    on_file: Callable[[Path], None] | None = None,
) -> PredictedFiles:
    """Write ``OUT/STEM.png`` (train ids, palette) and ``OUT/STEM_overlay.png`` for every input.

    An input that cannot be read or labelled does not stop the others.

    Args:
        predictor: Labels one picture.
        inputs: Picture files, or folders whose pictures are taken (not those of subfolders).
        out: Output folder; made if absent.
        overwrite: Replace outputs that exist; otherwise their inputs are skipped.
        on_file: Called with each label file that was written.

    Raises:
        DataError: If there are no pictures, two would write the same output, an output would replace an input, or one
            cannot be written.
        OSError: If a folder cannot be listed or made.
    """
    require_float32(predictor.device)
    files = find_pictures(inputs)
    outputs = {file: (out / f"{file.stem}.png", out / f"{file.stem}_overlay.png") for file in files}
    _check_outputs(outputs)
    out.mkdir(parents=True, exist_ok=True)
    result = PredictedFiles([], [], [])
    for file, (labels_file, overlay_file) in outputs.items():
        if not overwrite and labels_file.exists() and overlay_file.exists():
            result.skipped.append(file)
            continue
        try:
            image = predictor.open_image(file)
            prediction = predictor.predict(image)
        except DataError as error:
            result.failed.append(error.at(file))
            continue
        write_image(overlay_file, prediction.overlay(image))
        prediction.to_png(labels_file)
        result.written.append(labels_file)
        if on_file is not None:
            on_file(labels_file)
    return result


def find_pictures(inputs: Sequence[Path]) -> list[Path]:
    """List picture files: those named, and those lying in folders that are named, by suffix, in name order.

    Raises:
        DataError: If an input does not exist or a folder holds no picture.
    """
    files: list[Path] = []
    for source in inputs:
        if source.is_dir():
            found = sorted(file for file in source.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise DataError(
                    "E-DATA-052",
                    f"no pictures in this folder; known suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}",
                    fix="pass the folder that holds the pictures itself",
                    path=source,
                )
            files += found
        elif source.exists():
            files.append(source)
        else:
            raise DataError("E-DATA-053", "no such file or folder", fix="check the path", path=source)
    return list(dict.fromkeys(files))


def _check_outputs(outputs: dict[Path, tuple[Path, Path]]) -> None:
    inputs = {file.resolve() for file in outputs}
    targets = Counter(target for pair in outputs.values() for target in pair)
    for file, pair in outputs.items():
        for target in pair:
            if targets[target] > 1:
                raise DataError(
                    "E-DATA-054",
                    f"another input would also write {target}",
                    fix="predict them into separate folders",
                    path=file,
                )
            if target.resolve() in inputs:
                raise DataError(
                    "E-DATA-055",
                    f"its output {target} is one of the inputs",
                    fix="choose another --out",
                    path=file,
                )
