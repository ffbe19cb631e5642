"""What the network will see: a contact sheet of augmented samples with their labels on top."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from nestseg.core.errors import DataError, NestsegError
from nestseg.core.image_io import write_image
from nestseg.core.taxonomy import Taxonomy
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.loader import BatchPlan, Draw, Transform, read_draw
from nestseg.report.html import (
    Section,
    Swatch,
    figure,
    grid,
    legend,
    page,
    paragraph,
    write_page,
)
from nestseg.report.overlay import draw_overlay, put_side_by_side, shrink_sample

PAGE_FILE = "preview.html"
SHEET_FILE = "preview.png"

_LONGEST = 320
_COLUMNS = 3
_MARGIN = 12
_LINE = 20


class Preview(NamedTuple):
    """A sample as the network sees it.

    Shape:
        - picture: (H, W, 3) uint8 RGB, the image beside the same with its labels on top
    """

    name: str
    draw: Draw
    picture: NDArray[np.uint8]

    def caption(self, seed: int, taxonomy: Taxonomy) -> str:
        """Word where the sample comes from: everything that its augmentation depends on."""
        words = f"seed {seed}, epoch {self.draw.epoch}, index {self.draw.sample_index}"
        if self.draw.repeat:
            words += f", repeat {self.draw.repeat}"
        if self.draw.wanted_class is not None:
            words += f", for {taxonomy.classes[self.draw.wanted_class]}"
        return words


def write_preview(
    dataset: SegmentationDataset,
    transform: Transform,
    *,
    plan: BatchPlan,
    name: str,
    out: Path,
    num_images: int = 12,
    epoch: int = 0,
) -> tuple[Path, Path]:
    """Draw the first samples of an epoch of training as ``OUT/preview.png`` and ``OUT/preview.html``.

    Args:
        dataset: What is trained on.
        transform: The augmentation.
        plan: Which samples make up the epoch; the loader makes the same ones.
        name: The recipe's name.
        out: Folder to write to; it is made if there is none.
        num_images: How many samples; an epoch that has fewer gives all of them.
        epoch: Which epoch, from 0.

    Returns:
        The two files: sheet and page.

    Raises:
        DataError: E-DATA-096 for less than one image or an epoch below 0; for a sample that cannot be read.
        OSError: If something cannot be written.
    """
    if num_images < 1 or epoch < 0:
        raise DataError(
            "E-DATA-096",
            f"{num_images} images of epoch {epoch}; allowed: at least 1 image, of epoch 0 or later",
            fix="ask for other numbers",
        )
    out.mkdir(parents=True, exist_ok=True)
    order = plan.order(epoch)
    previews = [
        _make_preview(dataset, transform, plan=plan, draw=order.draw(epoch, place))
        for place in range(min(num_images, plan.num_samples))
    ]
    taxonomy = dataset.taxonomy
    sheet, html = out / SHEET_FILE, out / PAGE_FILE
    write_image(sheet, draw_sheet([(one.picture, one.caption(plan.seed, taxonomy)) for one in previews]))
    write_page(html, _build_page(previews, plan=plan, name=name, taxonomy=taxonomy))
    return sheet, html


def _make_preview(dataset: SegmentationDataset, transform: Transform, *, plan: BatchPlan, draw: Draw) -> Preview:
    name = dataset.name(draw.sample_index)
    try:
        sample = read_draw(dataset, transform, plan=plan, draw=draw)
    except NestsegError as error:
        raise error.at(name) from error
    small = shrink_sample(sample, _LONGEST)
    return Preview(name, draw, put_side_by_side(small.image, draw_overlay(small, dataset.taxonomy)))


def _build_page(previews: list[Preview], *, plan: BatchPlan, name: str, taxonomy: Taxonomy) -> str:
    figures = (
        figure(
            one.picture,
            caption=f"{one.name}: {one.caption(plan.seed, taxonomy)}",
            alt=f"{one.name}, augmented, beside the same with its labels on top",
        )
        for one in previews
    )
    named = enumerate(zip(taxonomy.classes, taxonomy.palette, strict=True))
    swatches = [Swatch(class_name, colour, str(train_id)) for train_id, (class_name, colour) in named]
    samples = [
        paragraph(
            "Each sample as the network sees it, and with its labels on top; ignored pixels are striped. "
            "The numbers under it give the same sample again, on any machine."
        ),
        grid(figures),
    ]
    return page(
        f"{name}: samples",
        lead=f"The first {len(previews)} samples of epoch {previews[0].draw.epoch}, after augmentation.",
        sections=[
            Section("Samples", samples),
            Section("Colours", [legend(swatches)]),
        ],
    )


def draw_sheet(pictures: list[tuple[NDArray[np.uint8], str]], *, columns: int = _COLUMNS) -> NDArray[np.uint8]:
    """Arrange pictures in rows on white, each with a line under it.

    Args:
        pictures: Pictures of any size with their lines; a line that is wider than its picture is cut into several.
        columns: How many stand in a row.

    Shape:
        - pictures: (H, W, 3) uint8 RGB each
        - returns: (H', W', 3) uint8 RGB
    """
    font = ImageFont.load_default(13)
    width = max(picture.shape[1] for picture, _ in pictures)
    lines = [_break_line(text, width, font) for _, text in pictures]
    height = max(picture.shape[0] for picture, _ in pictures) + _LINE * max(map(len, lines))
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + _MARGIN) + _MARGIN, rows * (height + _MARGIN) + _MARGIN), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for place, ((picture, _), under) in enumerate(zip(pictures, lines, strict=True)):
        left = _MARGIN + place % columns * (width + _MARGIN)
        top = _MARGIN + place // columns * (height + _MARGIN)
        sheet.paste(Image.fromarray(picture), (left, top))
        for number, line in enumerate(under):
            draw.text((left, top + picture.shape[0] + 3 + number * _LINE), line, fill=(30, 30, 30), font=font)
    return np.array(sheet)


def _break_line(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
