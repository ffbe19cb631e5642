"""The list, comparison and curves of run folders: whole ones, running ones, damaged ones, and folders that are none."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestseg.core.errors import RunError
from nestseg.engine import runs as runs_module
from nestseg.engine.runs import (
    compare_runs,
    format_list,
    list_runs,
    name_runs,
    plot_runs,
    read_run,
)
from nestseg.engine.train import RECIPE_FILE
from nestseg.recipes import named_recipe
from nestseg.report.curves import COLOURS, DASHES, PERCENT, Curve, choose_ticks, draw_chart, draw_legend
from nestseg.store.hub import MODEL_FILE


def nobody(_: Path) -> None:
    return None


def write_run(folder: Path, records: list[dict[str, object]], **changes: object) -> Path:
    folder.mkdir(parents=True)
    recipe = named_recipe("fcn_resnest14-d16_camvid")
    schedule = recipe.schedule.model_copy(update={"max_steps": 40})
    optimizer = recipe.optimizer.model_copy(update=changes)
    recipe = recipe.model_copy(update={"schedule": schedule, "optimizer": optimizer})
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def session(last: int, *, shift: float = 0.0) -> list[dict[str, object]]:
    records: list[dict[str, object]] = [
        {"kind": "start", "step": 0, "recipe": "fcn", "environment": {"torch": "2.14", "device": f"cpu {shift}"}}
    ]
    for step in range(10, last + 1, 10):
        speed = {10: 1.0, 20: 8.0}.get(step, 9.0)
        records.append(
            {"kind": "step", "step": step, "loss": 2 / step, "lr": 0.01, "images_per_second": speed, "seconds": 36.0}
        )
        if step % 20 == 0:
            iou = {"sky": 0.01 * step + shift, "<b>": None if step == 20 else 0.5}
            records.append({"kind": "evaluation", "step": step, "mean_iou": 0.01 * step + shift, "iou_per_class": iou})
    return records


def cells(text: str, title: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(title + "  "))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_names_of_files_are_those_of_the_modules_that_write_them():
    assert (runs_module._RECIPE_FILE, runs_module._MODEL_FILE) == (RECIPE_FILE, MODEL_FILE)


def test_the_list_says_how_far_each_run_is_and_names_what_is_no_run(tmp_path):
    done = write_run(tmp_path / "done", session(40))
    (done / "model.safetensors").write_bytes(b"x" * 2_000_000)
    busy = write_run(tmp_path / "group" / "busy", session(20))
    write_run(tmp_path / "stopped", [])
    (tmp_path / "notes" / "deep").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "file.txt").touch()
    listed = list_runs(tmp_path, lock_holder=lambda run: {"pid": 7, "host": "box"} if run == busy else None)
    text = format_list(listed)
    assert [row.run.folder.name for row in listed.rows] == ["done", "busy", "stopped"]
    assert cells(text, str(done)) == [
        str(done),
        "fcn_resnest14-d16_camvid",
        "finished, step 40 of 40",
        "40.00 (step 40)",
        "0.0500",
        "8.5",
        "2.0 MB",
    ]
    assert cells(text, str(busy))[2] == "running, step 20 of 40 (pid 7 on box)"
    assert cells(text, str(tmp_path / "stopped"))[2:] == ["stopped, step 0 of 40", "-", "-", "-", "0.0 MB"]
    assert listed.others == ((tmp_path / "notes", "no run"),)
    assert text.splitlines()[-1] == f"{tmp_path / 'notes'}: no run"


def test_a_folder_that_is_itself_a_run_is_listed(tmp_path):
    run = write_run(tmp_path / "run", session(10))
    assert [row.run.folder for row in list_runs(run, lock_holder=nobody).rows] == [run]


def test_an_empty_folder_has_no_runs_and_a_missing_one_is_an_error(tmp_path):
    assert format_list(list_runs(tmp_path, lock_holder=nobody)) == "no runs"
    with pytest.raises(RunError, match="E-RUN-063"):
        list_runs(tmp_path / "missing", lock_holder=nobody)


def test_torn_and_damaged_files_are_read_as_far_as_they_go(tmp_path):
    run = write_run(tmp_path / "run", session(30))
    with (run / "log.jsonl").open("ab") as log:
        log.write(b'\0\0\0\n{"kind": "step", "step": 40, "lo')
    (run / "recipe.yaml").write_text("name: old\nnew_field: 3\nschedule: {max_steps: 50}\n", encoding="utf-8")
    read = read_run(run)
    assert read.step == 30
    assert read.recipe == {"name": "old", "new_field": 3, "schedule.max_steps": 50}
    assert len(read.problems) == 2
    assert "recipe.yaml" in read.problems[0]
    assert read.problems[1] == "log.jsonl: 1 damaged lines are left out"
    assert "stopped, step 30 of 50" in format_list(list_runs(run, lock_holder=nobody))
    (run / "recipe.yaml").write_text(": [", encoding="utf-8")
    assert read_run(run).recipe == {}
    (run / "recipe.yaml").unlink()
    (run / "log.jsonl").write_text('{"kind": "step", "step": "x", "loss": "y", "images_per_second": true}\n')
    odd = read_run(run)
    assert (odd.step, odd.last_loss, odd.images_per_second, odd.best) == (0, None, None, None)
    format_list(list_runs(run, lock_holder=nobody))
    compare_runs([run, run], lock_holder=nobody)


def test_a_run_without_log_is_a_run_and_a_folder_without_both_is_none(tmp_path):
    run = write_run(tmp_path / "run", [])
    (run / "log.jsonl").unlink()
    assert read_run(run).problems == ("log.jsonl is missing",)
    with pytest.raises(RunError, match="E-RUN-064"):
        read_run(tmp_path)


def test_a_comparison_has_what_differs_scores_classes_and_versions(tmp_path):
    first = write_run(tmp_path / "a", session(40), lr=0.01)
    second = write_run(tmp_path / "b", session(20, shift=0.125), lr=0.02)
    text = compare_runs([first, second], lock_holder=nobody)
    recipe, scores, classes, versions = text.split("\n\n")
    assert [line.split() for line in recipe.splitlines()] == [["recipe", "a", "b"], ["optimizer.lr", "0.01", "0.02"]]
    assert cells(scores, "best mIoU %") == ["best mIoU %", "40.00 (step 40)", "32.50 (step 20)"]
    assert cells(scores, "last training loss")[1:] == ["0.0500", "0.1000"]
    assert cells(scores, "images/s")[1:] == ["8.5", "4.5"]
    assert cells(scores, "hours")[1:] == ["0.01", "0.01"]
    assert cells(classes, "sky") == ["sky", "40.00", "32.50", "-7.50"]
    assert cells(classes, "<b>") == ["<b>", "50.00", "-", "-"]
    assert cells(versions, "device")[1:] == ["cpu 0.0", "cpu 0.125"]
    assert "cannot be compared" not in text


def test_runs_of_other_data_are_said_to_have_scores_of_another_kind(tmp_path):
    first, second = (write_run(tmp_path / name, session(40)) for name in "ab")
    file = second / "recipe.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("eval_split: val", "eval_split: test"), encoding="utf-8")
    text = compare_runs([first, second], lock_holder=nobody)
    assert "scores cannot be compared: data.eval_split differ" in text


def test_one_run_is_not_compared(tmp_path):
    with pytest.raises(RunError, match="E-RUN-065"):
        compare_runs([write_run(tmp_path / "a", [])], lock_holder=nobody)


def test_names_of_runs_tell_them_apart():
    assert name_runs([Path("/x/a/run"), Path("/y/a/run"), Path("/y/b")]) == ["x/a/run", "y/a/run", "/y/b"]
    assert name_runs([Path("/x/a"), Path("/x/a")]) == ["a", "a"]


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))


def test_the_page_of_curves_needs_nothing_but_itself_and_escapes_names(tmp_path):
    runs = [write_run(tmp_path / name, session(40, shift=0.1)) for name in ("<script>x", "b & c")]
    out = tmp_path / "new" / "curves.html"
    plot_runs(runs, out, lock_holder=nobody)
    text = out.read_text(encoding="utf-8")
    tags = Page(text).tags
    assert not {"script", "link", "img", "iframe", "b"} & {tag for tag, _ in tags}
    assert all((values.get("href") or "#").startswith("#") and "src" not in values for _, values in tags)
    assert not any("url(" in line or "@import" in line for line in text.splitlines())
    charts = [values["aria-label"] for tag, values in tags if tag == "svg" and values.get("class") == "chart"]
    assert [label.split(":")[0] for label in charts] == [
        "Training loss",
        "Validation loss",
        "mIoU (%)",
        "Pixel accuracy (%)",
        "Learning rate",
        "Images a second",
        "sky (%)",
        "<b> (%)",
    ]
    assert "<script>x ends at 0.05 after step 40" in charts[0]
    assert charts[1].endswith("no values")


def test_runs_that_recorded_nothing_have_no_curves(tmp_path):
    with pytest.raises(RunError, match="E-RUN-066"):
        plot_runs([write_run(tmp_path / "a", [])], tmp_path / "x.html", lock_holder=nobody)


def test_reading_runs_needs_no_torch():
    script = "import sys, nestseg.engine.runs; assert not {'torch', 'lightning_fabric'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def paths_of(chart: str) -> list[list[tuple[float, float]]]:
    root = ET.fromstring(chart)
    found = [one for one in root.iter() if one.get("class") == "chart-line"]
    return [
        [tuple(map(float, pair.split())) for pair in (one.get("d") or "")[1:].split("L")]  # type: ignore[misc]
        for one in found
    ]


def test_a_curve_lies_where_its_values_are():
    curve = Curve("a", [0, 50, 100], [0.0, 0.5, 1.0])
    ((first, middle, last),) = paths_of(draw_chart("x", [curve]))
    assert first[0] < middle[0] < last[0]
    assert first[1] > middle[1] > last[1], "up is less in SVG"
    assert middle[0] == pytest.approx((first[0] + last[0]) / 2, abs=0.1)
    assert middle[1] == pytest.approx((first[1] + last[1]) / 2, abs=0.1)


def test_gaps_are_left_out_and_a_single_value_is_a_dot():
    chart = draw_chart("x", [Curve("a", [10, 20, 30], [None, 0.5, None]), Curve("b", [10], [None])], unit=PERCENT)
    root = ET.fromstring(chart)
    dots = [one for one in root if one.tag.endswith("circle")]
    assert len(dots) == 1
    assert "a ends at 50 % after step 20" in (root.get("aria-label") or "")
    titles = [one.text for one in root.iter() if one.tag.endswith("title")]
    assert titles == ["step 20\na: 50 %"]


def test_a_curve_that_ended_says_nothing_about_later_steps():
    chart = draw_chart("x", [Curve("a", [10, 20], [1, 2]), Curve("b", [10, 20, 30], [3, 4, 5])])
    titles = [one.text for one in ET.fromstring(chart).iter() if one.tag.endswith("title")]
    assert titles == ["step 10\na: 1\nb: 3", "step 20\na: 2\nb: 4", "step 30\nb: 5"]


def test_long_curves_are_averaged_and_stay_small():
    steps = range(1, 100_001)
    chart = draw_chart("x", [Curve("a", steps, [float(step % 2) for step in steps])])
    ((*points, _),) = paths_of(chart)
    assert 300 <= len(points) <= 400
    assert len({y for _, y in points}) == 1, "of zeros and ones in turn the mean is a half"
    assert len(chart) < 80_000


@given(
    values=st.lists(st.floats(min_value=-1e12, max_value=1e12, allow_nan=False) | st.none(), min_size=1, max_size=30),
    name=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co"]), max_size=10),
)
def test_any_values_make_a_chart_that_is_whole_and_inside_its_frame(values, name):
    chart = draw_chart(name, [Curve(name, range(0, 7 * len(values), 7), values)])
    assert ET.fromstring(chart).get("viewBox") == "0 0 400 236"
    for path in paths_of(chart):
        assert all(0 <= x <= 400 and 0 <= y <= 236 for x, y in path)


@given(low=st.floats(-1e9, 1e9), span=st.floats(0, 1e9), most=st.integers(2, 8))
def test_ticks_hold_the_range_and_are_few(low, span, most):
    ticks = choose_ticks(low, low + span, most=most)
    assert 2 <= len(ticks) <= most + 3
    assert ticks == sorted(set(ticks))
    slack = (ticks[1] - ticks[0]) * 1e-6
    assert ticks[0] - slack <= low
    assert low + span <= ticks[-1] + slack


def luminance(colour: tuple[int, int, int]) -> float:
    parts = [value / 255 for value in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_curves_are_seen_on_white_and_on_black_paper_and_told_apart():
    white, black = luminance((255, 255, 255)), luminance((0x14, 0x18, 0x1C))
    for colour in COLOURS:
        own = luminance(colour)
        assert (white + 0.05) / (own + 0.05) >= 3
        assert (own + 0.05) / (black + 0.05) >= 3
    count = len(COLOURS) * len(DASHES)
    root = ET.fromstring(f"<div>{draw_legend(map(str, range(count)))}</div>")
    lines = [(one.get("stroke"), one.get("stroke-dasharray")) for one in root.iter() if one.tag == "path"]
    assert len(set(lines)) == count
