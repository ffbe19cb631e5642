"""Label picture files: one label PNG and one overlay a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.image_io import MAX_PIXELS, preview_image, read_image, write_image
from nestseg.core.label_sink import LabelSink
from nestseg.core.large_image import ImageWindows, image_size, is_zarr, open_windows
from nestseg.core.resize import Window
from nestseg.core.types import Size
from nestseg.engine.launch import require_float32
from nestseg.inference.modes import Slide, describe_mode
from nestseg.inference.predictor import Prediction, Predictor

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})

LARGE_PIXELS = 64_000_000
"""A picture of more pixels is read, labelled and written in parts."""

LARGE_WINDOW: Size = (512, 512)
"""Windows over a large picture, where the predictor has none of its own: about what networks are trained on."""

OVERVIEW_SIDE = 2048
"""Longest side that the overlay of a large picture may have."""

_DECODED_WHOLE = IMAGE_SUFFIXES - {".tif", ".tiff"}


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
    max_pixels: int = MAX_PIXELS,
    large_pixels: int = LARGE_PIXELS,
    on_file: Callable[[Path], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> PredictedFiles:
    """Write ``OUT/STEM.png`` (train ids, palette) and ``OUT/STEM_overlay.png`` for every input.

    An input that cannot be read or labelled does not stop the others.

    A picture of more than ``large_pixels`` is labelled at its own resolution, whatever the predictor's ``base_size``,
    in the windows of the predictor's own `Slide`, or else in windows of 512x512 with its mode inside. Its labels are
    ``OUT/STEM.tif``, tiled, if it is TIFF, npy or zarr, whatever its size. Its overlay is reduced to at most 2048
    pixels a side. Memory beside the network: what `Predictor.predict_strips` and `open_windows` state.

    Args:
        predictor: Labels one picture.
        inputs: Picture files, zarr arrays, or folders whose pictures are taken (not those of subfolders).
        out: Output folder; made if absent.
        overwrite: Replace outputs that exist; otherwise their inputs are skipped.
        max_pixels: Largest height * width of a picture that is decoded whole, see `open_windows`.
        large_pixels: Pictures of more pixels are labelled in parts.
        on_file: Called with each label file that was written.
        on_note: Called with a line on how a large picture is labelled, and at each tenth of it.

    Raises:
        DataError: If there are no pictures, two would write the same output, an output would replace an input, or one
            cannot be written.
        OSError: If a folder cannot be listed or made.
    """
    require_float32(predictor.device)
    files = find_pictures(inputs)
    large = {file for file in files if _num_pixels(file) > large_pixels}
    outputs = {
        file: (out / f"{file.stem}{_label_suffix(file, file in large)}", out / f"{file.stem}_overlay.png")
        for file in files
    }
    _check_outputs(outputs)
    out.mkdir(parents=True, exist_ok=True)
    result = PredictedFiles([], [], [])
    for file, (labels_file, overlay_file) in outputs.items():
        if not overwrite and labels_file.exists() and overlay_file.exists():
            result.skipped.append(file)
            continue
        try:
            if file in large:
                _predict_large(
                    predictor, file, labels_file, overlay_file, max_pixels=max_pixels, on_note=on_note or _say_nothing
                )
            else:
                image = _read(file, predictor, max_pixels)
                prediction = predictor.predict(image)
        except DataError as error:
            if error.path in (labels_file, overlay_file):
                raise  # a disk that is full is so for the others too
            result.failed.append(error.at(file))
            continue
        if file not in large:
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
        if source.is_dir() and not is_zarr(source):
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


def _num_pixels(file: Path) -> int:
    height, width = image_size(file) or (0, 0)
    return height * width


def _label_suffix(file: Path, is_large: bool) -> str:
    return ".tif" if is_large and file.suffix.lower() not in _DECODED_WHOLE else ".png"


def _say_nothing(_: str) -> None:
    return


def _read(file: Path, predictor: Predictor, max_pixels: int) -> NDArray[Any]:
    """Read a picture whole.

    Shape:
        - returns: (H, W, C) of the predictor's type
    """
    if not is_zarr(file):
        return read_image(file, channels=predictor.in_channels, dtype=predictor.image_dtype, max_pixels=max_pixels)
    with open_windows(file, channels=predictor.in_channels, dtype=predictor.image_dtype) as source:
        return source.read(Window(0, 0, *source.size))


def _predict_large(
    predictor: Predictor,
    file: Path,
    labels_file: Path,
    overlay_file: Path,
    *,
    max_pixels: int,
    on_note: Callable[[str], None],
) -> None:
    """Label a picture in parts; its label file appears last.

    Raises:
        DataError: With the path of an output if it cannot be written, else if the picture cannot be read.
    """
    mode = predictor.mode if isinstance(predictor.mode, Slide) else Slide(window=LARGE_WINDOW, inner=predictor.mode)
    in_windows = Predictor(
        predictor.logits_fn,
        predictor.taxonomy,
        logits_resizes=predictor.logits_resizes,
        align_corners=predictor.align_corners,
        in_channels=predictor.in_channels,
        image_dtype=predictor.image_dtype,
        device=predictor.device,
        mode=mode,
        batch_size=predictor.batch_size,
    )
    palette = predictor.taxonomy.colour_table()
    with open_windows(
        file, channels=predictor.in_channels, dtype=predictor.image_dtype, max_pixels=max_pixels
    ) as source:
        height, width = source.size
        gibibytes = min(mode.window[0], height) * width * predictor.taxonomy.num_classes * 4 / 2**30
        resized = "" if predictor.base_size is None else f", not resized to {predictor.base_size}"
        on_note(
            f"{file}: {height}x{width} pixels, labelled at its own resolution{resized}: {describe_mode(mode)}; "
            f"{gibibytes:.1f} GiB for the scores of a row of windows"
        )
        step = -(-max(source.size) // OVERVIEW_SIDE)
        rows, columns = (np.minimum(np.arange(0, side, step) + step // 2, side - 1) for side in source.size)
        overview = np.empty((len(rows), len(columns)), np.uint8)
        with LabelSink(labels_file, source.size, palette=palette) as sink:
            tenths = 0
            for strip in in_windows.predict_strips(source):
                sink.write(strip.top, strip.labels)
                end = strip.top + len(strip.labels)
                inside = (rows >= strip.top) & (rows < end)
                overview[inside] = strip.labels[rows[inside] - strip.top][:, columns]
                if 10 * end // height > tenths:
                    tenths = 10 * end // height
                    on_note(f"{file}: {10 * tenths} % of its rows are labelled")
            shown = preview_image(_reduce(source, step))
            # in parts: laying one over the other takes 28 bytes a value
            parts = [
                Prediction(labels=overview[i : i + 128], taxonomy=predictor.taxonomy).overlay(shown[i : i + 128])
                for i in range(0, len(overview), 128)
            ]
            write_image(overlay_file, np.concatenate(parts))


def _reduce(source: ImageWindows, step: int) -> NDArray[Any]:
    """Read a picture at 1/step of its size, each pixel the mean of a square.

    Shape:
        - returns: (ceil(H / step), ceil(W / step), min(C, 3)) of the picture's type
    """
    height, width = source.size
    lefts = np.arange(0, width, step)
    widths = np.diff(lefts, append=width)[:, None]
    means = []
    for top in range(0, height, step):
        rows = source.read(Window(top, 0, min(step, height - top), width))[:, :, :3]
        mean = np.add.reduceat(rows.sum(axis=0, dtype=np.float64), lefts, axis=0) / (len(rows) * widths)
        means.append((mean if source.dtype.kind == "f" else np.rint(mean)).astype(source.dtype))
    return np.stack(means)
