"""The page of an evaluation: how good the model is, where it fails, and what to try next."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nestseg.core.disk import replaced_file
from nestseg.core.resize import resize_labels
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample
from nestseg.metrics.calibration import Calibration, CalibrationBin
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import SegmentationScores
from nestseg.report.curves import PLAIN, Curve, Unit, draw_chart, draw_legend
from nestseg.report.evaluation_script import SCRIPT, STYLE
from nestseg.report.failures import (
    Confusion,
    confused_pixels,
    find_confusions,
    name_called,
    suggest_next,
    word_confusion,
    word_share,
)
from nestseg.report.html import (
    Bar,
    Cell,
    Column,
    Html,
    Links,
    Section,
    Swatch,
    code,
    details,
    escape,
    facts,
    grid,
    image_uri,
    join,
    legend,
    notes,
    page,
    paragraph,
    subheading,
    table,
    write_page,
)
from nestseg.report.overlay import shrink_sample
from nestseg.report.pictures import draw_panels

_LONGEST = 360
_MOST_IN_MATRIX = 30
_MOST_CONFUSIONS = 40
_MOST_OF_A_CLASS = 3
_MOST_IMAGES = 20
_MOST_LINKS = 4
_LEAST_SEEN = 0.001  # of a picture: what is less is not seen in it

Kind = Literal["best", "worst", "random"]
"""What a picture was chosen for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPicture:
    """A picture of the page, already small; see `shrink_picture`.

    Args:
        name: Of the image.
        kind: What it was chosen for.
        mean_iou: Mean IoU over the classes of this image; None without a labelled pixel.
        image: The picture.
        target: Its ground truth, train ids or 255.
        labels: The prediction.

    Shape:
        - image: (h, w, 3) uint8 RGB
        - target, labels: (h, w) uint8
    """

    name: str
    kind: Kind
    mean_iou: float | None
    image: NDArray[np.uint8]
    target: NDArray[np.uint8]
    labels: NDArray[np.uint8]


class Chart(NamedTuple):
    """Learning curves in one frame."""

    title: str
    curves: Sequence[Curve]
    unit: Unit = PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationReport:
    """All that the page says.

    Args:
        title: Of the page.
        taxonomy: Classes and their colours.
        scores: Scores of the whole data set.
        confusion: What they were computed from.
        protocol: How it was measured, in words.
        provenance: What was measured: model, sha256, commit, versions, date.
        interval: In which the mean IoU lies with 95 %, over images.
        boundary_iou: A value a class.
        iou_by_size: A value a class, by the size of objects, the smallest first.
        objects_by_size: How many objects there are of each class, likewise.
        calibration: Confidence against accuracy.
        extra_tables: Scores in [0, 1] beside these, such as Cityscapes' categories: name of a table to rows.
        images: (name, mean IoU) of images, the worst first.
        pictures: What is drawn.
        curves: Of the run that made the model.
        latency: Time and memory, in words.
        recipe: Resolved, as YAML.
        partial: What was left out and why; the page then says PARTIAL.
    """

    title: str
    taxonomy: Taxonomy
    scores: SegmentationScores
    confusion: ConfusionMatrix
    protocol: Mapping[str, str]
    provenance: Mapping[str, str]
    interval: tuple[float, float] | None = None
    boundary_iou: Sequence[float | None] | None = None
    iou_by_size: Mapping[str, Sequence[float | None]] | None = None
    objects_by_size: Mapping[str, Sequence[int]] | None = None
    calibration: Calibration | None = None
    extra_tables: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    images: Sequence[tuple[str, float | None]] = ()
    pictures: Sequence[ReportPicture] = ()
    curves: Sequence[Chart] = ()
    latency: Mapping[str, str] = field(default_factory=dict)
    recipe: str | None = None
    partial: Sequence[str] = ()


class _Case(NamedTuple):
    """A picture and what it holds."""

    picture: ReportPicture
    number: str
    """By which the page calls it."""
    classes: list[int]
    pairs: dict[tuple[int, int], int]
    """Pixels by (truth, called), the most frequent first."""

    @property
    def place(self) -> str:
        """Its id in the page."""
        return f"picture-{self.number}"


def shrink_picture(
    sample: Sample, labels: NDArray[np.uint8], *, name: str, kind: Kind, mean_iou: float | None
) -> ReportPicture:
    """Make a picture of the page from an image at its own size.

    Args:
        sample: Image and ground truth.
        labels: The prediction.
        name: Of the image.
        kind: What it was chosen for.
        mean_iou: Of this image.

    Shape:
        - sample: any (H, W)
        - labels: (H, W) uint8
    """
    small = shrink_sample(sample, _LONGEST)
    height, width = small.target.shape
    return ReportPicture(
        name=name,
        kind=kind,
        mean_iou=mean_iou,
        image=small.image,
        target=small.target,
        labels=resize_labels(labels, (height, width)),
    )


def write_evaluation_report(report: EvaluationReport, path: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    write_page(path, build_evaluation_page(report))


def build_evaluation_page(report: EvaluationReport) -> str:
    """Set the page about an evaluation; without its script all of it is there too."""
    cases = _cases(report)
    confusions = find_confusions(report.confusion, report.scores)
    sections = [
        Section("Overview", _overview(report)),
        Section("What to do next", _next(report)),
        Section("Classes", _classes(report)),
        Section("Confusions", _confusions(report, confusions, cases)),
    ]
    if cases or report.images:
        sections.append(Section("Pictures", _pictures(report, cases)))
    sections.append(Section("More scores", _more_scores(report)))
    if report.calibration is not None:
        sections.append(Section("Confidence", _confidence(report.calibration)))
    if report.curves:
        sections.append(Section("Learning curves", _curves(report.curves)))
    if report.latency:
        sections.append(Section("Time and memory", [_facts_table("As measured", report.latency)]))
    if report.recipe is not None:
        sections.append(Section("Recipe", [details("Every number of the run", [code(report.recipe, label="Recipe")])]))
    return page(
        report.title,
        lead="; ".join(f"{what}: {how}" for what, how in report.protocol.items()),
        sections=sections,
        toolbar=_filter(report.taxonomy),
        style=STYLE,
        script=SCRIPT,
    )


def format_markdown(report: EvaluationReport) -> str:
    """Word the report as Markdown, for a pull request or a log: numbers without pictures."""
    names = report.taxonomy.classes
    partial = [f"**PARTIAL**: {_plain('; '.join(report.partial))}\n"] if report.partial else []
    columns, rows = _class_cells(report)
    confusions = find_confusions(report.confusion, report.scores)
    lines = [
        f"# {_plain(report.title)}\n",
        *partial,
        *(f"- {_plain(f'{what}: {value}')}" for what, value in _headline(report)),
        *(f"- {_plain(f'{what}: {value}')}" for what, value in {**report.protocol, **report.provenance}.items()),
        *_heading("What to do next", [f"- {_plain(one)}" for one in _suggestions(report)]),
        *_heading("Classes", _markdown_table([column.title for column in columns], rows)),
        *_heading(
            "Confusions",
            [
                f"- {_plain(word_confusion(one, names))}: {100 * one.cost:.2f} points of mean IoU"
                for one in confusions[:10]
            ],
        ),
        *_heading(
            "Worst images",
            _markdown_table(
                ["Image", "Mean IoU %"], [(name, _percent(iou)) for name, iou in report.images[:_MOST_IMAGES]]
            ),
        ),
    ]
    for name, values in _score_tables(report).items():
        rows_of = [(row, _percent(value)) for row, value in values.items()]
        lines += _heading(name, _markdown_table(["Score", "%"], rows_of))
    return "\n".join(lines) + "\n"


def write_class_csv(report: EvaluationReport, path: Path) -> None:
    """Write a line a class, values unrounded in [0, 1] and empty where there is none.

    Raises:
        OSError: If it cannot be written.
    """
    scores, counts, sizes = report.scores, report.confusion.counts, report.iou_by_size or {}
    columns: dict[str, Sequence[float | str | None]] = {
        "train_id": range(len(counts)),
        "class": report.taxonomy.classes,
        "iou": scores.iou_per_class,
        "dice": scores.dice_per_class,
        "recall": scores.accuracy_per_class,
        "precision": scores.precision_per_class,
        "pixels": counts.sum(axis=1).tolist(),
        "predicted_pixels": counts[:, :-1].sum(axis=0).tolist(),
        "boundary_iou": report.boundary_iou or [None] * len(counts),
        **{f"iou_{size}": values for size, values in sizes.items()},
    }
    with replaced_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _headline(report: EvaluationReport) -> list[tuple[str, str]]:
    scores = report.scores
    pairs = [("Mean IoU", f"{_percent(scores.mean_iou)} %")]
    if report.interval is not None:
        low, high = report.interval
        pairs.append(("95 % interval", f"{100 * low:.1f}–{100 * high:.1f} %"))
    pairs += [
        ("Pixel accuracy", f"{_percent(scores.pixel_accuracy)} %"),
        ("Mean accuracy", f"{_percent(scores.mean_accuracy)} %"),
        ("Classes in the means", f"{scores.num_classes_counted} of {len(scores.iou_per_class)}"),
    ]
    if report.boundary_iou is not None:
        pairs.append(("Mean boundary IoU", f"{_percent(_mean(report.boundary_iou))} %"))
    if report.calibration is not None:
        pairs.append(("Calibration error", f"{_percent(report.calibration.expected_calibration_error)} %"))
    if "commit" in report.provenance:
        commit, *changed = report.provenance["commit"].split("+", 1)
        pairs.append(("Commit", "+".join([commit[:10], *changed])))
    return pairs


def _overview(report: EvaluationReport) -> list[Html]:
    parts = [facts(_headline(report))]
    if report.partial:
        parts.insert(0, notes([f"PARTIAL: these numbers are not of the whole split. {one}" for one in report.partial]))
    tables = [
        _facts_table("How it was measured", report.protocol),
        _facts_table("What was measured", report.provenance),
    ]
    return [*parts, grid(tables)]


def _next(report: EvaluationReport) -> list[Html]:
    suggestions = _suggestions(report)
    if not suggestions:
        return [paragraph("Nothing stands out in the numbers.")]
    items = join(Html(f"<li>{escape(one)}</li>") for one in suggestions)
    return [paragraph("From the numbers of this page alone."), Html(f'<ol class="next">{items}</ol>')]


def _suggestions(report: EvaluationReport) -> list[str]:
    return suggest_next(
        report.taxonomy.classes,
        report.scores,
        confusion=report.confusion,
        interval=report.interval,
        boundary_iou=report.boundary_iou,
        iou_by_size=report.iou_by_size,
        objects_by_size=report.objects_by_size,
        calibration=report.calibration,
    )


def _classes(report: EvaluationReport) -> list[Html]:
    columns, cells = _class_cells(report)
    iou = report.scores.iou_per_class
    recall = report.scores.accuracy_per_class
    # the weakest first, those without a pixel or a score last
    order = sorted(range(len(iou)), key=lambda one: (iou[one] is None, recall[one] is None, iou[one]))
    rows: list[list[Cell]] = []
    for train_id in order:
        name, first, *others = cells[train_id]
        swatch = Swatch(name, report.taxonomy.palette[train_id], str(train_id))
        rows.append([swatch, Bar(first, iou[train_id] or 0.0), *others])
    return [
        paragraph(
            "The weakest first; the number before a name is its train id. Recall: how much of the class is found. "
            "Precision: how much of what is called so is right."
        ),
        table(
            "Scores of every class in %",
            columns,
            rows,
            row_attributes=[f'data-classes="{train_id}"' for train_id in order],
            sortable=True,
        ),
    ]


def _class_cells(report: EvaluationReport) -> tuple[list[Column], list[tuple[str, ...]]]:
    """Return the columns of the classes' scores, and a row of words a class in train-id order."""
    scores, pixels = report.scores, report.confusion.counts.sum(axis=1)
    columns: dict[str, list[str]] = {
        "Class": list(report.taxonomy.classes),
        "IoU": [_percent(value) for value in scores.iou_per_class],
        "Recall": [_percent(value) for value in scores.accuracy_per_class],
        "Precision": [_percent(value) for value in scores.precision_per_class],
        "Of the pixels": [_percent(value) for value in (pixels / pixels.sum()).tolist()],
    }
    if report.boundary_iou is not None:
        columns["Boundary IoU"] = [_percent(value) for value in report.boundary_iou]
    for size, values in (report.iou_by_size or {}).items():
        columns[f"IoU, {size}"] = [_percent(value) for value in values]
    titles = [Column(title, numeric=title != "Class") for title in columns]
    return titles, list(zip(*columns.values(), strict=True))


def _confusions(report: EvaluationReport, confusions: Sequence[Confusion], cases: Sequence[_Case]) -> list[Html]:
    if not confusions:
        return [paragraph("Every labelled pixel is right.")]
    return [_matrix(report, confusions), _confusion_table(report.taxonomy, confusions, cases)]


def _matrix(report: EvaluationReport, confusions: Sequence[Confusion]) -> Html:
    names = report.taxonomy.classes
    shown = _dearest_classes(confusions, len(names))
    counts = report.confusion.counts
    totals = counts.sum(axis=1)
    hidden = np.setdiff1d(np.arange(len(names)), shown)
    extra = [("others", counts[:, hidden].sum(axis=1))] if len(hidden) else []
    with_none = bool(counts[:, -1].any())
    heads = [*(names[one] for one in shown), *(["no class"] if with_none else []), *(name for name, _ in extra)]
    rows = []
    for truth in shown:
        called = [*shown, *([len(names)] if with_none else [])]
        cells = [_matrix_cell(names, truth, one, int(counts[truth, one]), int(totals[truth])) for one in called]
        cells += [
            _share_cell(int(of[truth]), int(totals[truth]), f"of {names[truth]} is called a class not shown", "")
            for _, of in extra
        ]
        title = escape(names[truth])
        rows.append(Html(f'<tr><th scope="row" title="{title}">{title}</th>{"".join(cells)}</tr>'))
    titles = "".join(f'<th scope="col" title="{escape(name)}"><span>{escape(name)}</span></th>' for name in heads)
    part = f"The {len(shown)} of {len(names)} classes with the dearest confusions. " if len(hidden) else ""
    guide = (
        f"{part}A row is what pixels are, a column what they are called; numbers are % of the row, "
        f"below 0.5 % they are left out."
    )
    hint = "Choose a cell by pointer, or with arrow keys and Enter, to see its pictures and the confusions of its row."
    return Html(
        f'{paragraph(guide)}<p data-hint hidden>{hint}</p><div class="scroll matrix" tabindex="0" role="region" '
        f'aria-label="Confusion matrix"><table><thead><tr><th scope="col">is / called</th>'
        f"{titles}</tr></thead><tbody>{join(rows)}</tbody></table></div>"
        '<p id="said" role="status"></p>'
    )


def _dearest_classes(confusions: Sequence[Confusion], num_classes: int) -> list[int]:
    """Return the classes of the dearest confusions, in train-id order."""
    if num_classes <= _MOST_IN_MATRIX:
        return list(range(num_classes))
    found: dict[int, None] = {}
    for one in confusions:
        for train_id in (one.truth, one.called):
            if train_id < num_classes and len(found) < _MOST_IN_MATRIX:
                found[train_id] = None
    return sorted(found)


def _matrix_cell(names: Sequence[str], truth: int, called: int, pixels: int, total: int) -> str:
    if truth == called:
        return _share_cell(pixels, total, f"of {names[truth]} is right", f"{truth}-{called}" if total else "")
    said = f"of {names[truth]} is called {name_called(called, names)}"
    return _share_cell(pixels, total, said, f"{truth}-{called}" if pixels else "")


def _share_cell(pixels: int, total: int, said: str, pair: str) -> str:
    share = pixels / total if total else 0.0
    text = f"{100 * share:.0f}" if share >= 0.005 else ""
    chosen = f' data-pair="{pair}" title="{escape(f"{word_share(share)} {said}")}"' if pair else ""
    # the root shows small shares too; between the two ranges neither colour of text would be read
    heat = share**0.5
    strong = heat > 0.65
    level = 74 + 26 * (heat - 0.65) / 0.35 if strong else 44 * heat / 0.65
    paint = f' style="--heat-share:{level:.0f}"' if level >= 1 else ""
    return f"<td{chosen}{paint}{' data-strong' if strong else ''}>{text}</td>"


def _confusion_table(taxonomy: Taxonomy, confusions: Sequence[Confusion], cases: Sequence[_Case]) -> Html:
    names = taxonomy.classes
    seen_of: Counter[int] = Counter()
    listed = []
    for place, one in enumerate(confusions):
        seen_of[one.truth] += 1
        if place < _MOST_CONFUSIONS or seen_of[one.truth] <= _MOST_OF_A_CLASS:
            listed.append(one)
    dearest = listed[0].cost or 1.0
    rows: list[list[Cell]] = [
        [
            word_confusion(one, names),
            Bar(f"{100 * one.cost:.2f}", one.cost / dearest),
            f"{one.pixels:,}",
            Links([(case.number, case.place) for case in _holding(cases, one)]),
        ]
        for one in listed
    ]
    attributes = [
        f'data-classes="{one.truth} {one.called}" data-truth="{one.truth}" data-pair="{one.truth}-{one.called}"'
        for one in listed
    ]
    caption = "The dearest confusions, and what each takes from the mean IoU in points"
    columns = [
        Column("Confusion"),
        Column("Points", numeric=True),
        Column("Pixels", numeric=True),
        Column("Pictures"),
    ]
    return table(caption, columns, rows, row_attributes=attributes)


def _holding(cases: Sequence[_Case], confusion: Confusion) -> list[_Case]:
    pair = (confusion.truth, confusion.called)
    return sorted((case for case in cases if pair in case.pairs), key=lambda case: -case.pairs[pair])[:_MOST_LINKS]


def _cases(report: EvaluationReport) -> list[_Case]:
    # the very worst and the very best first
    signs = {"worst": 1, "random": 0, "best": -1}
    kinds = list(signs)
    ordered = sorted(report.pictures, key=lambda one: (kinds.index(one.kind), signs[one.kind] * (one.mean_iou or 0.0)))
    num_classes = report.taxonomy.num_classes
    cases = []
    for place, picture in enumerate(ordered, start=1):
        least = _LEAST_SEEN * picture.target.size
        present = np.union1d(picture.target[picture.target < num_classes], picture.labels[picture.labels < num_classes])
        pairs = confused_pixels(picture.target, picture.labels, num_classes=num_classes)
        seen = {pair: pixels for pair, pixels in pairs.items() if pixels >= least}
        cases.append(_Case(picture, str(place), present.tolist(), seen))
    return cases


def _pictures(report: EvaluationReport, cases: Sequence[_Case]) -> list[Html]:
    parts = [
        paragraph(
            "Image, ground truth, prediction, errors: right pixels are light grey, wrong ones dark red, ignored ones "
            "white. The mean IoU of an image is over the classes that occur in it."
        )
    ]
    taxonomy = report.taxonomy
    pairs = zip(taxonomy.classes, taxonomy.palette, strict=True)
    swatches = [Swatch(name, colour) for name, colour in pairs]
    parts.append(details("Colours of the classes", [legend(swatches)], opened=len(swatches) <= _MOST_IN_MATRIX))
    if report.images:
        worst = report.images[:_MOST_IMAGES]
        places = {case.picture.name: case for case in reversed(cases)}
        rows: list[list[Cell]] = [
            [
                name,
                Bar(_percent(iou), iou or 0.0),
                Links([(places[name].number, places[name].place)] if name in places else []),
            ]
            for name, iou in worst
        ]
        columns = [Column("Image"), Column("Mean IoU %", numeric=True), Column("Picture")]
        parts.append(table(f"The {len(worst)} worst images", columns, rows))
    for kind, title in (("worst", "Worst"), ("random", "At random"), ("best", "Best")):
        of_kind = [case for case in cases if case.picture.kind == kind]
        if of_kind:
            parts += [subheading(title), *(_case(case, taxonomy) for case in of_kind)]
    return parts


def _case(case: _Case, taxonomy: Taxonomy) -> Html:
    picture = case.picture
    panels = draw_panels(picture.image, picture.target, labels=picture.labels, taxonomy=taxonomy)
    height, width = picture.target.shape
    shown = join(
        Html(
            f'<div><img src="{image_uri(panel, drawn=what != "image")}" width="{width}" height="{height}" '
            f'alt="{escape(f"{picture.name}: {what}")}" loading="lazy"><small>{what}</small></div>'
        )
        for what, panel in zip(("image", "truth", "prediction", "errors"), panels, strict=True)
    )
    classes = " ".join(map(str, case.classes))
    pairs = " ".join(f"{truth}-{called}" for truth, called in case.pairs)
    score = "nothing is labelled" if picture.mean_iou is None else f"mean IoU {_percent(picture.mean_iou)} %"
    return Html(
        f'<figure class="case" id="{case.place}" data-classes="{classes}" data-pairs="{pairs}"><figcaption>'
        f"<strong>{case.number}</strong> {escape(f'{picture.name}, {score}')}</figcaption>"
        f'<div class="panels">{shown}</div></figure>'
    )


def _filter(taxonomy: Taxonomy) -> Html:
    options = "".join(f'<option value="{escape(name)}"></option>' for name in taxonomy.classes)
    return Html(
        '<div class="filter" role="search" hidden><label for="class">Class</label>'
        '<input id="class" type="search" list="class-names" autocomplete="off" placeholder="all classes">'
        f'<datalist id="class-names">{options}</datalist><button type="button">Show all</button>'
        "<output></output></div>\n"
    )


def _score_tables(report: EvaluationReport) -> dict[str, Mapping[str, float | None]]:
    scores = report.scores
    means = {
        "mean IoU": scores.mean_iou,
        "frequency-weighted IoU": scores.frequency_weighted_iou,
        "mean Dice (F1)": scores.mean_dice,
        "mean recall (accuracy)": scores.mean_accuracy,
        "mean precision": scores.mean_precision,
        "pixel accuracy": scores.pixel_accuracy,
    }
    if report.boundary_iou is not None:
        means["mean boundary IoU"] = _mean(report.boundary_iou)
    for size, values in (report.iou_by_size or {}).items():
        means[f"mean IoU, {size}"] = _mean(values)
    return {"Over all classes": means, **report.extra_tables}


def _more_scores(report: EvaluationReport) -> list[Html]:
    columns = [Column("Score"), Column("%", numeric=True)]
    return [
        grid(
            table(name, columns, [(row, Bar(_percent(value), value or 0.0)) for row, value in values.items()])
            for name, values in _score_tables(report).items()
        )
    ]


def _confidence(calibration: Calibration) -> list[Html]:
    total = max(1, calibration.num_pixels)
    columns = [
        Column("Confidence"),
        *(Column(title, numeric=True) for title in ("On average", "Right", "Of the pixels")),
    ]
    rows: list[list[Cell]] = [
        [
            f"{100 * one.low:.0f} to {100 * one.high:.0f} %",
            _percent(one.confidence),
            _percent(one.accuracy),
            Bar(_percent(one.num_pixels / total), one.num_pixels / total),
        ]
        for one in calibration.bins
    ]
    return [
        paragraph(
            f"Where the model is sure of 80 %, 80 % should be right: bars then end on the dashed line. Over the pixels "
            f"they miss it by {_percent(calibration.expected_calibration_error)} points on average (expected "
            f"calibration error)."
        ),
        grid([_reliability_diagram(calibration.bins), table("Confidence in %", columns, rows)]),
    ]


def _reliability_diagram(bins: Sequence[CalibrationBin]) -> Html:
    left, top, side = 40, 10, 300
    bars = join(
        Html(
            f'<rect x="{left + side * one.low + 1:.1f}" y="{top + side * (1 - one.accuracy):.1f}" '
            f'width="{max(1.0, side * (one.high - one.low) - 2):.1f}" height="{max(1.0, side * one.accuracy):.1f}" '
            f'fill="var(--bar)"><title>{_bar_words(one)}, {one.num_pixels:,} pixels</title></rect>'
        )
        for one in bins
        if one.accuracy is not None
    )
    ticks = join(
        Html(
            f'<line x1="{left}" x2="{left + side}" y1="{top + side * (1 - tick / 100):.0f}" '
            f'y2="{top + side * (1 - tick / 100):.0f}" stroke="var(--line)"/>'
            f'<text x="{left - 6}" y="{top + side * (1 - tick / 100) + 4:.0f}" text-anchor="end">{tick}</text>'
            f'<text x="{left + side * tick / 100:.0f}" y="{top + side + 16}" text-anchor="middle">{tick}</text>'
        )
        for tick in (0, 20, 40, 60, 80, 100)
    )
    said = "; ".join(_bar_words(one) for one in bins if one.num_pixels)
    return Html(
        f'<svg class="reliability" viewBox="0 0 {left + side + 16} {top + side + 40}" role="img" '
        f'aria-label="{escape(f"Reliability: {said}")}">{ticks}{bars}'
        f'<path d="M{left} {top + side}L{left + side} {top}" stroke="var(--ink)" stroke-dasharray="5 4"/>'
        f'<text x="{left + side / 2}" y="{top + side + 34}" text-anchor="middle">confidence %; bars: right %</text>'
        "</svg>"
    )


def _bar_words(one: CalibrationBin) -> str:
    return f"sure of {word_share(one.confidence or 0.0)}, right {word_share(one.accuracy or 0.0)}"


def _curves(charts: Sequence[Chart]) -> list[Html]:
    parts = []
    for title, curves, unit in charts:
        names = [curve.name for curve in curves]
        chart = draw_chart(title, curves, unit=unit)
        parts.append(join([chart, draw_legend(names)]) if len(names) > 1 else chart)
    return [grid(parts)]


def _facts_table(caption: str, pairs: Mapping[str, str]) -> Html:
    cells = table(caption, [Column("What"), Column("Value")], list(pairs.items()))
    return Html(f'<div class="facts-table">{cells}</div>')


def _heading(title: str, lines: Sequence[str]) -> list[str]:
    return [f"\n## {_plain(title)}\n", *lines] if lines else []


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = ["| " + " | ".join(map(_plain, cells)) + " |" for cells in (heads, *rows)]
    return [lines[0], "|---" + "|---:" * (len(heads) - 1) + "|", *lines[1:]]


def _plain(text: str) -> str:
    """Keep text from being read as Markdown or HTML."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    # inside of words an underscore is no mark
    return re.sub(r"[\\`*\[\]|#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
