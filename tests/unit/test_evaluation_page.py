"""The page of an evaluation and what stands beside it: right numbers, right words, nothing from elsewhere (E10, F9)."""

from __future__ import annotations

import base64
import csv
import hashlib
import inspect
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample
from nestseg.engine.trackers import flatten
from nestseg.metrics.calibration import ONE, compute_calibration
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.iou import compute_scores
from nestseg.recipes import named_recipe
from nestseg.report import failures
from nestseg.report.curves import PERCENT, Curve
from nestseg.report.evaluation_page import (
    Chart,
    EvaluationReport,
    Kind,
    ReportPicture,
    build_evaluation_page,
    format_markdown,
    shrink_picture,
    write_class_csv,
    write_evaluation_report,
)
from nestseg.report.failures import confused_pixels, find_confusions, suggest_next
from nestseg.report.html import Column, Links, Section, details, image_uri, page, paragraph, table
from nestseg.report.pictures import draw_comparison, draw_panels

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=y>', "a & b's", "c|d")
PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 90, 90))
# rows: ground truth; the last column: no class
COUNTS = np.array([[80, 15, 5, 0, 0], [10, 90, 0, 0, 0], [0, 4, 1, 0, 5], [0, 0, 0, 0, 0]])
CALIBRATION = compute_calibration(np.array([[0, 0, 0], [100, 60, 90 * ONE]]))


class Outline(HTMLParser):
    """Everything that the tests ask about a page; fails on tags that do not close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.script = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes)
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "img", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.script += data
        elif "style" not in self.open:
            self.text += data

    def find(self, tag: str, attribute: str = "") -> list[dict[str, str | None]]:
        return [found for name, found in self.tags if name == tag and (not attribute or attribute in found)]

    def cells(self) -> dict[str, str]:
        """The sentence of every cell of the matrix by its pair."""
        return {found["data-pair"] or "": found["title"] or "" for found in self.find("td", "data-pair")}


def make_picture(name: str, kind: Kind, labels: list[list[int]], mean_iou: float | None = 0.5) -> ReportPicture:
    predicted = np.array(labels, np.uint8).repeat(8, 0).repeat(8, 1)
    target = np.zeros_like(predicted)
    target[:, 16:] = 1
    target[:8] = 255
    image = np.random.default_rng(0).integers(0, 256, (*target.shape, 3), np.uint8)
    return ReportPicture(name=name, kind=kind, mean_iou=mean_iou, image=image, target=target, labels=predicted)


def make_report(
    counts: np.ndarray = COUNTS, classes: tuple[str, ...] = ("road", "car", "pole", "sky")
) -> EvaluationReport:
    confusion = ConfusionMatrix.from_counts(counts)
    palette = tuple(PALETTE[place % 4] for place in range(len(classes)))
    return EvaluationReport(
        title="deeplabv3 on toy",
        taxonomy=Taxonomy(name="toy", classes=classes, palette=palette),
        scores=compute_scores(confusion, absent="skip"),
        confusion=confusion,
        protocol={"mode": "whole image", "void pixels": "not counted"},
        provenance={"model": "model.safetensors", "commit": "0123456789abcdef"},
    )


def make_full_report() -> EvaluationReport:
    report = make_report()
    return replace(
        report,
        interval=(0.51, 0.58),
        boundary_iou=(0.4, 0.3, None, None),
        iou_by_size={"small": (0.1, None, 0.2, None), "large": (0.8, 0.7, None, None)},
        objects_by_size={"small": (20, 0, 1, 0), "large": (11, 9, 0, 0)},
        calibration=CALIBRATION,
        extra_tables={"Categories": {"flat": 0.8125, "human": None}},
        images=[("a.png", 0.25), ("b.png", 0.75), ("c.png", None)],
        pictures=[
            make_picture("b.png", "best", [[0, 0, 1, 1], [0, 0, 1, 1]]),
            make_picture("a.png", "worst", [[0, 0, 1, 1], [1, 1, 1, 2]]),
        ],
        curves=[Chart("mIoU", [Curve("val", [10, 20], [0.1, 0.5]), Curve("train", [10, 20], [0.2, 0.6])], PERCENT)],
        latency={"median": "41 ms"},
        recipe="name: toy\nschedule: {max_steps: 10}\n",
        partial=["c.png: cannot be read"],
    )


def test_page_holds_all_that_was_given_and_asks_for_nothing() -> None:
    text = build_evaluation_page(make_full_report())
    outline = Outline(text)
    for said in (
        "deeplabv3 on toy",
        "mode: whole image; void pixels: not counted",
        "51.0–58.0 %",
        "0123456789abcdef",
        "PARTIAL: these numbers are not of the whole split. c.png: cannot be read",
        "81.25",
        "41 ms",
        "max_steps: 10",
        "a.png, mean IoU 50.00 %",
        "15.0 % of road is called car",
        "30.00 points on average",
    ):
        assert said in outline.text, said
    assert [found["src"] for found in outline.find("img") if not (found["src"] or "").startswith("data:image/")] == []
    assert len(outline.find("img")) == 8
    assert all(found["alt"] for found in outline.find("img"))
    assert outline.find("link") == outline.find("iframe") == outline.find("form") == []
    assert re.findall(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text) == []
    ids = [found["id"] for _, found in outline.tags if "id" in found]
    assert len(ids) == len(set(ids))
    places = {(found["href"] or "")[1:] for found in outline.find("a")}
    assert places <= set(ids)
    assert {"picture-1", "picture-2"} <= places


def test_parts_without_values_are_left_out_and_the_rest_stands() -> None:
    text = build_evaluation_page(make_report())
    titles = re.findall(r"<h2[^>]*>([^<]*)</h2>", text)
    assert titles == ["Overview", "What to do next", "Classes", "Confusions", "More scores"]
    assert "PARTIAL" not in Outline(text).text


def test_policy_of_the_page_names_the_hash_of_its_script_and_no_other() -> None:
    outline = Outline(build_evaluation_page(make_report()))
    digest = base64.b64encode(hashlib.sha256(outline.script.encode()).digest()).decode()
    (policy,) = (found["content"] or "" for found in outline.find("meta", "http-equiv"))
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert len(outline.find("script")) == 1
    assert [name for _, found in outline.tags for name in found if name.startswith("on")] == []


def test_page_without_a_script_allows_none_and_one_that_would_end_early_is_refused() -> None:
    text = page("a", lead="b", sections=[Section("c", [paragraph("d")])])
    assert "script" not in text
    with pytest.raises(ValueError, match="</"):
        page("a", lead="b", sections=[], script="x = '</script>'")
    with pytest.raises(ValueError, match="</"):
        page("a", lead="b", sections=[], style="</style>")


def test_hostile_names_stay_text_everywhere() -> None:
    picture = replace(make_picture(HOSTILE[1], "worst", [[0, 0, 1, 1], [1, 2, 1, 2]]), mean_iou=None)
    report = replace(
        make_full_report(),
        title=HOSTILE[0],
        taxonomy=Taxonomy(name=HOSTILE[0], classes=HOSTILE, palette=PALETTE),
        pictures=[picture],
        images=[(HOSTILE[1], 0.1)],
        protocol={HOSTILE[0]: HOSTILE[1]},
        provenance={HOSTILE[1]: HOSTILE[0], "commit": HOSTILE[0]},
        extra_tables={HOSTILE[0]: {HOSTILE[1]: 0.5}},
        iou_by_size={HOSTILE[0]: (0.1, 0.1, 0.1, None), HOSTILE[1]: (0.9, 0.9, 0.9, None)},
        objects_by_size=dict.fromkeys(HOSTILE[:2], (20, 20, 20, 0)),
        latency={HOSTILE[0]: HOSTILE[1]},
        recipe=HOSTILE[0],
        partial=[HOSTILE[1]],
        curves=[Chart(HOSTILE[0], [Curve(HOSTILE[1], [1], [0.5]), Curve("b", [1], [0.5])])],
    )
    plain, hostile = (
        Outline(build_evaluation_page(one)) for one in (replace(report, taxonomy=make_report().taxonomy), report)
    )
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in plain.tags]
    assert hostile.script == plain.script
    assert "onerror" not in {name for _, found in hostile.tags for name in found}
    assert [found["value"] for found in hostile.find("option")] == list(HOSTILE)
    summary = format_markdown(report)
    assert "<" not in summary
    rows = [line for line in summary.splitlines() if line.startswith("| c")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [8 + 1]  # columns


def test_cells_of_the_matrix_are_shares_of_the_row_in_words() -> None:
    outline = Outline(build_evaluation_page(make_report()))
    cells = outline.cells()
    assert cells["0-0"] == "80.0 % of road is right"
    assert cells["0-1"] == "15.0 % of road is called car"
    assert cells["2-4"] == "50.0 % of pole is called no class"
    assert "1-2" not in cells  # nothing there to choose
    assert "3-3" not in cells  # there is no sky
    assert len(outline.find("td", "data-pair")) == 3 + 5


def test_matrix_of_many_classes_shows_those_with_the_dearest_confusions_and_says_so() -> None:
    rng = np.random.default_rng(1)
    counts = np.diag(rng.integers(1000, 2000, 150)).astype(np.int64)
    dear = [(7, 8), (8, 7), (100, 3), (149, 0)]
    for truth, called in dear:
        counts[truth, called] = 900
    for place in range(30, 90):
        counts[place, place + 1] = 1
    classes = tuple(f"class {place}" for place in range(150))
    text = build_evaluation_page(make_report(np.hstack([counts, np.zeros((150, 1), np.int64)]), classes))
    outline = Outline(text)
    assert "The 30 of 150 classes with the dearest confusions." in outline.text
    cells = outline.cells()
    assert {f"{truth}-{called}" for truth, called in dear} <= set(cells)
    assert len({pair.split("-")[0] for pair in cells}) == 30
    assert "others" in outline.text
    assert "no class" not in outline.text
    # every class keeps its row in the table, and its dearest confusion
    assert {found["data-classes"] for found in outline.find("tr", "data-classes")} >= {str(one) for one in range(150)}
    assert {found["data-truth"] for found in outline.find("tr", "data-truth")} >= {str(one) for one in range(30, 90)}
    assert len(text) < 300_000


def test_classes_come_weakest_first_and_those_without_pixels_last() -> None:
    counts = np.array([[9, 0, 0, 1, 0, 0], [5, 5, 0, 0, 0, 0], *([[0] * 6] * 2), [0, 0, 0, 0, 8, 0]])
    outline = Outline(build_evaluation_page(make_report(counts, ("a", "b", "absent", "invented", "e"))))
    order = [found["data-classes"] for found in outline.find("tr", "data-classes") if "data-truth" not in found]
    assert order == ["1", "0", "4", "3", "2"]


def test_pictures_carry_their_classes_and_confusions_and_the_table_leads_to_them() -> None:
    outline = Outline(build_evaluation_page(make_full_report()))
    worst, best = outline.find("figure", "data-pairs")
    assert (worst["id"], best["id"]) == ("picture-1", "picture-2")
    assert worst["data-classes"] == "0 1 2"
    assert (worst["data-pairs"] or "").split() == ["0-1", "1-2"]
    assert best["data-classes"] == "0 1"
    assert best["data-pairs"] == ""


def test_very_worst_and_very_best_pictures_come_first() -> None:
    kinds: list[tuple[Kind, float | None]] = [
        ("best", 0.8),
        ("random", 0.5),
        ("worst", 0.2),
        ("best", 0.9),
        ("worst", 0.1),
        ("random", 0.4),
        ("worst", None),
    ]
    pictures = [make_picture(f"{kind} {iou}", kind, [[0, 0, 1, 1]] * 2, iou) for kind, iou in kinds]
    text = build_evaluation_page(replace(make_report(), pictures=pictures))
    names = re.findall(r'alt="([a-z]+ [\w.]+): image"', text)
    assert names == ["worst None", "worst 0.1", "worst 0.2", "random 0.5", "random 0.4", "best 0.9", "best 0.8"]


@settings(max_examples=60, deadline=None)
@given(
    npst.arrays(np.int64, (4, 5), elements=st.integers(0, 50)).filter(lambda counts: counts[:, :4].any(axis=1).all())
)
def test_costs_of_all_confusions_and_the_mean_iou_make_one(counts: np.ndarray) -> None:
    confusion = ConfusionMatrix.from_counts(counts)
    scores = compute_scores(confusion, absent="skip")
    found = find_confusions(confusion, scores)
    assert sum(one.cost for one in found) == pytest.approx(1 - scores.mean_iou, abs=1e-12)
    assert sum(one.pixels for one in found) == counts.sum() - counts.diagonal().sum()
    assert [one.cost for one in found] == sorted((one.cost for one in found), reverse=True)


def test_confusions_with_void_as_false_positive_divide_by_the_larger_union() -> None:
    counts = np.array([[3, 1, 0], [0, 4, 0]])
    confusion = ConfusionMatrix.from_counts(counts, np.array([0, 5, 0]))
    (found,) = find_confusions(confusion, compute_scores(confusion, absent="skip", void="false_positive"))
    assert found.cost == pytest.approx((1 / 4 + 1 / 10) / 2)


def test_confused_pixels_of_a_picture_leave_out_void_and_gather_what_is_no_class() -> None:
    target = np.array([[0, 0, 0, 1, 255, 1]], np.uint8)
    labels = np.array([[1, 1, 0, 200, 0, 255]], np.uint8)
    found = confused_pixels(target, labels, num_classes=2)
    assert found == {(0, 1): 2, (1, 2): 2}
    assert confused_pixels(target, target, num_classes=2) == {}


def suggestions(report: EvaluationReport) -> str:
    return "\n".join(
        suggest_next(
            report.taxonomy.classes,
            report.scores,
            confusion=report.confusion,
            interval=report.interval,
            boundary_iou=report.boundary_iou,
            iou_by_size=report.iou_by_size,
            objects_by_size=report.objects_by_size,
            calibration=report.calibration,
        )
    )


def test_nothing_is_suggested_where_nothing_stands_out() -> None:
    counts = np.hstack([np.eye(3, dtype=np.int64) * 1000, np.zeros((3, 1), np.int64)])
    report = make_report(counts, ("a", "b", "c"))
    assert suggestions(report) == ""
    outline = Outline(build_evaluation_page(report))
    assert "Nothing stands out in the numbers." in outline.text
    assert "Every labelled pixel is right." in outline.text


def test_weak_classes_are_said_to_be_missed_or_invented_or_rare() -> None:
    assert "pole has an IoU of 6.7 %: 10.0 % of its pixels are found, 16.7 % of what is called so" in suggestions(
        make_report()
    )
    missed = np.array([[20, 80, 0, 0], [0, 900, 0, 0], [0, 0, 900, 0]])
    assert "a has an IoU of 20.0 %: only 20.0 % of its pixels are found." in suggestions(
        make_report(missed, ("a", "b", "c"))
    )
    invented = np.array([[100, 0, 0, 0], [400, 900, 0, 0], [0, 0, 900, 0]])
    assert "a has an IoU of 20.0 %: only 20.0 % of what is called a is a." in suggestions(
        make_report(invented, ("a", "b", "c"))
    )
    never = np.array([[0, 2, 0, 0], [0, 900, 0, 0], [0, 0, 900, 0]])
    said = suggestions(make_report(never, ("a", "b", "c")))
    assert "a has an IoU of 0.0 %: it is never predicted. It is 0.1 % of the labelled pixels: try data.rare" in said


def test_absent_and_invented_classes_are_named() -> None:
    counts = np.array([[90, 0, 10, 0, 0], *([[0] * 5] * 2), [0, 0, 0, 0, 0]])
    said = suggestions(make_report(counts))
    assert "Nothing can be said of car, sky: " in said
    assert "Not in the labels of this split but predicted: pole." in said


def test_two_classes_that_are_mixed_up_are_one_sentence() -> None:
    said = suggestions(make_report())
    costs = {
        (one.truth, one.called): one.cost for one in find_confusions(make_report().confusion, make_report().scores)
    }
    both = 100 * (costs[0, 1] + costs[1, 0])
    words = {"15.0 % of road is called car", "10.0 % of car is called road"}
    (line,) = (line for line in said.splitlines() if words <= set(line.split(": ")[0].split(", ")))
    assert f": {both:.1f} points of mean IoU." in line


@pytest.mark.parametrize(("large", "num_large", "said"), [(0.5, 10, True), (0.28, 10, False), (0.5, 9, False)])
def test_small_objects_are_named_only_if_those_of_several_classes_are_worse(
    large: float, num_large: int, said: bool
) -> None:
    sizes = {"small": (0.2, 0.3, 0.2, 0.9), "between": (0.0, 0.0, 0.25, 0.0), "large": (large, 0.9, None, None)}
    numbers = {"small": (10, 10, 10, 10), "between": (0, 99, 10, 0), "large": (num_large, 10, 0, 0)}
    text = suggestions(replace(make_report(), iou_by_size=sizes, objects_by_size=numbers))
    words = (
        "Objects of size small have a lower IoU than the largest of their class, by 30.0 points in the median of 3 "
        "classes (most: car 30.0 % against 90.0 %, road 20.0 % against 50.0 %, pole 20.0 % against 25.0 %)"
    )
    assert (words in text) == said
    assert ("Objects of size" in text) == said


def test_small_objects_of_one_class_prove_nothing() -> None:
    sizes = {"small": (0.0, 0.6, 0.6, None), "large": (0.95, None, None, None)}
    numbers = {"small": (99, 99, 99, 0), "large": (99, 0, 0, 0)}
    assert "Objects of size" not in suggestions(replace(make_report(), iou_by_size=sizes, objects_by_size=numbers))


@pytest.mark.parametrize(("confidence", "said"), [(90, True), (62, False), (50, False)])
def test_confidence_is_named_only_if_it_is_too_high(confidence: int, said: bool) -> None:
    calibration = compute_calibration(np.array([[0, 0, 0], [100, 60, confidence * ONE]]))
    text = suggestions(replace(make_report(), calibration=calibration))
    assert ("over-confident: 60.0 % of the pixels are right, and it is sure of 90.0 %" in text) == said


@pytest.mark.parametrize(("factor", "said"), [(0.5, True), (0.95, False)])
def test_outlines_are_named_only_if_they_are_worse(factor: float, said: bool) -> None:
    report = make_report()
    edges = [None if iou is None else factor * iou for iou in report.scores.iou_per_class]
    assert ("Along the outlines" in suggestions(replace(report, boundary_iou=edges))) == said


@pytest.mark.parametrize(("width", "said"), [(0.06, True), (0.02, False)])
def test_interval_is_named_only_if_it_is_wide(width: float, said: bool) -> None:
    text = suggestions(replace(make_report(), interval=(0.5, 0.5 + width)))
    assert ("is known to 6.0 points only (50.0 % to 56.0 %)" in text) == said


def test_fields_and_names_that_suggestions_speak_of_exist() -> None:
    fields = flatten(named_recipe("deeplabv3plus_resnest50-d8_camvid").model_dump(mode="json"))
    source = inspect.getsource(failures)
    spoken = set(re.findall(r"\b(?:data|loss|optimizer|schedule|evaluation)\.[a-z_]+\b", source))
    assert spoken == {"data.rare_class_sampling", "data.crop_size"}
    assert all(any(name == field or name.startswith(f"{field}.") for name in fields) for field in spoken)


def test_headline_does_not_hide_that_the_code_was_changed() -> None:
    report = replace(make_report(), provenance={"commit": f"{'0123456789' * 4}+changes"})
    assert "- Commit: 0123456789+changes\n" in format_markdown(report)
    assert ">0123456789+changes<" in build_evaluation_page(report)


def test_calibration_of_no_pixel_is_drawn_as_nothing() -> None:
    empty = compute_calibration(np.zeros((5, 3), np.int64))
    outline = Outline(build_evaluation_page(replace(make_report(), calibration=empty)))
    assert outline.find("rect") == []
    assert "over-confident" not in outline.text


def test_class_csv_holds_unrounded_values_and_empty_cells(tmp_path: Path) -> None:
    report = make_full_report()
    write_class_csv(report, tmp_path / "classes.csv")
    with (tmp_path / "classes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(report.taxonomy.classes)
    assert [float(row["iou"]) if row["iou"] else None for row in rows] == list(report.scores.iou_per_class)
    assert float(rows[0]["precision"]) == 80 / 90
    assert (rows[2]["pixels"], rows[2]["predicted_pixels"]) == ("10", "6")
    assert (rows[3]["iou"], rows[3]["recall"], rows[2]["boundary_iou"], rows[1]["iou_small"]) == ("", "", "", "")


def test_markdown_has_headline_classes_confusions_and_worst_images() -> None:
    text = format_markdown(make_full_report())
    assert text.startswith("# deeplabv3 on toy\n\n**PARTIAL**: c.png: cannot be read\n")
    for line in (
        f"- Mean IoU: {100 * make_report().scores.mean_iou:.2f} %",
        "- 95 % interval: 51.0–58.0 %",
        "- mode: whole image",
        "- commit: 0123456789abcdef",
        "| Image | Mean IoU % |",
        "| a.png | 25.00 |",
        "| c.png | - |",
        "| flat | 81.25 |",
    ):
        assert line in text.splitlines(), line
    marks = format_markdown(replace(make_full_report(), title="data.crop_size *a* _b_ `c` #d [e](f) <g> x\\y"))
    assert marks.startswith("# data.crop_size \\*a\\* \\_b\\_ \\`c\\` \\#d \\[e\\](f) &lt;g> x\\\\y\n")
    assert any(line.startswith("- 15.0 % of road is called car: ") for line in text.splitlines())


def test_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write_evaluation_report(make_report(), path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_evaluation_report(make_full_report(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_equal_reports_give_equal_pages() -> None:
    assert build_evaluation_page(make_full_report()) == build_evaluation_page(make_full_report())


def test_panels_show_truth_prediction_and_errors_and_the_comparison_is_made_of_them() -> None:
    taxonomy = make_report().taxonomy
    image = np.full((1, 4, 3), 7, np.uint8)
    target = np.array([[0, 1, 255, 1]], np.uint8)
    labels = np.array([[0, 0, 1, 200]], np.uint8)
    panels = draw_panels(image, target, labels=labels, taxonomy=taxonomy)
    red, green, white, black = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)
    assert panels.truth.tolist() == [[list(colour) for colour in (red, green, white, green)]]
    assert panels.prediction.tolist() == [[list(colour) for colour in (red, red, green, black)]]
    grey, wrong = panels.errors[0, 0].tolist(), panels.errors[0, 1].tolist()
    assert panels.errors[0, 2:].tolist() == [list(white), wrong]
    assert sum(grey) > 1.5 * sum(wrong)  # told apart without colour too
    comparison = draw_comparison(image, target, labels=labels, taxonomy=taxonomy)
    assert comparison.shape == (1, 4 * 4 + 3 * 4, 3)
    for place, panel in enumerate(panels):
        np.testing.assert_array_equal(comparison[:, 8 * place : 8 * place + 4], panel)


def test_picture_of_the_page_is_shrunk_with_its_labels_and_invents_none() -> None:
    rng = np.random.default_rng(0)
    target = rng.choice([0, 2, 255], (400, 800)).astype(np.uint8)
    labels = rng.choice([0, 3], (400, 800)).astype(np.uint8)
    sample = Sample(np.zeros((400, 800, 4), np.uint16), target)
    picture = shrink_picture(sample, labels, name="a", kind="worst", mean_iou=0.5)
    assert picture.image.shape == (180, 360, 3)
    assert picture.image.dtype == np.uint8
    assert picture.target.shape == picture.labels.shape == (180, 360)
    assert set(np.unique(picture.target)) == {0, 2, 255}
    assert set(np.unique(picture.labels)) == {0, 3}


def test_drawn_pictures_keep_every_pixel() -> None:
    image = np.random.default_rng(0).choice([0, 90, 255], (9, 11, 3)).astype(np.uint8)
    kind, content = image_uri(image, drawn=True).split(";base64,")
    assert kind == "data:image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))), image)


def test_rows_links_and_folded_parts_of_a_page() -> None:
    text = table("t", [Column("a"), Column("b")], [("x", Links([("<1>", "p-1")]))], row_attributes=['data-classes="3"'])
    assert '<tr data-classes="3"><th scope="row">x</th>' in text
    assert '<td><a href="#p-1">&lt;1&gt;</a></td>' in text.replace("\n", "")
    with pytest.raises(ValueError, match="zip"):
        table("t", [Column("a")], [("x",), ("y",)], row_attributes=["one"])
    assert details("<s>", [paragraph("a")]) == "<details><summary>&lt;s&gt;</summary><p>a</p></details>"
