from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import ValidationError

ROOT = Path(__file__).parents[2]
NAME = re.compile(
    r"(fcn|pspnet|deeplabv3|deeplabv3plus)"
    r"_(resnest(14|26|50|101|200|269)|resnest50-fast-(1s1x64d|2s1x64d|4s1x64d|1s2x40d|2s2x40d|4s2x40d|1s4x24d))"
    r"-d(8|16|32)"
    r"_(voc|ade20k|cityscapes|camvid)"
)
RUN = {
    "recipe": "fcn_resnest50-d8_voc",
    "mean_iou": 0.71234,
    "split": "val",
    "num_classes_counted": 21,
    "steps": 39660,
    "minutes": 90.04,
    "machine": "1x H100 | 16 cores",
    "torch": "2.14.1",
    "commit": "0123abcdef",
    "date": "2026-01-31",
    "protocol": "single scale, whole image",
    "overrides": ["schedule.epochs=10"],
}


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_model_zoo", ROOT / "docs" / "generate_model_zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def results() -> dict[str, Any]:
    return tomllib.loads((ROOT / "zoo" / "results.toml").read_text(encoding="utf-8"))


def _rows(page: str) -> list[list[str]]:
    lines = (line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| "))
    return [cells for cells in lines if NAME.fullmatch(cells[-1].strip("`"))]


def test_the_page_is_fresh() -> None:
    command = [sys.executable, ROOT / "docs" / "generate_model_zoo.py", "--check"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_a_changed_or_missing_page_is_reported_and_left_alone(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "model_zoo.md"
    monkeypatch.setattr(generator, "PAGE", page)
    assert generator.main(["--check"]) == 1
    assert not page.exists()
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0
    page.write_text(page.read_text(encoding="utf-8").replace("77.41", "77.42"), encoding="utf-8")
    assert generator.main(["--check"]) == 1
    assert "77.42" in page.read_text(encoding="utf-8")
    assert "fix: python docs/generate_model_zoo.py" in capsys.readouterr().err


def test_every_recipe_name_follows_the_naming_rule(results: dict[str, Any]) -> None:
    names = [row["recipe"] for kind in ("published", "labelled") for row in results[kind]]
    runs = [row["recipe"] for row in results.get("reproduced", []) if row["recipe"] != "demo"]
    assert len(names) == 21
    assert [name for name in [*names, *runs] if not NAME.fullmatch(name)] == []


def test_the_page_has_a_row_for_each_of_the_21_recipes(results: dict[str, Any]) -> None:
    rows = _rows((ROOT / "docs" / "model_zoo.md").read_text(encoding="utf-8"))
    names = [row["recipe"] for kind in ("published", "labelled") for row in results[kind]]
    assert sorted(row[-1].strip("`") for row in rows) == sorted(names)
    assert {len(row) for row in rows} == {8}


def test_the_published_table_has_its_twelve_numbers(generator: ModuleType) -> None:
    page = (ROOT / "docs" / "model_zoo.md").read_text(encoding="utf-8")
    numbers = {row[-1].strip("`"): row[5] for row in _rows(page)}
    table = {
        "voc": ["77.41", "79.07", "78.97", "79.76"],
        "ade20k": ["45.74", "46.03", "46.24", "46.48"],
        "cityscapes": ["78.14", "78.70", "79.75", "80.30"],
    }
    for dataset, expected in table.items():
        assert [numbers[f"{model}_resnest101-d8_{dataset}"] for model in generator.TITLES] == expected
    assert sum(number == "-" for number in numbers.values()) == 9


def test_schedules_have_the_published_number_of_steps(generator: ModuleType) -> None:
    datasets = generator.read_results(generator.RESULTS).datasets
    steps = {name: dataset.steps for name, dataset in datasets.items()}
    assert steps == {"voc": 39_660, "ade20k": 164_190, "cityscapes": 81_620}


def test_a_run_of_ours_gets_a_row(generator: ModuleType, results: dict[str, Any]) -> None:
    page = generator.render(generator.Results.model_validate({**results, "reproduced": [RUN]}))
    (row,) = [line for line in page.splitlines() if line.startswith("| `fcn_resnest50-d8_voc`")]
    assert row == (
        "| `fcn_resnest50-d8_voc` | 71.23 | 21 | val | 39,660 | 90.0 | single scale, whole image "
        "| `schedule.epochs=10` | 1x H100 \\| 16 cores | 2.14.1 | 0123abc | 2026-01-31 | - |"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_iou": 71.2}, "less than or equal to 1"),
        ({"recipe": "fcn_resnet50-d8_voc"}, "String should match pattern"),
        ({"weights": "https://example.org/model.safetensors"}, "weights and sha256 belong together"),
        ({"colour": "red"}, "Extra inputs are not permitted"),
        ({"commit": "main"}, "String should match pattern"),
    ],
)
def test_a_run_with_an_impossible_field_is_refused(
    change: dict[str, Any], message: str, generator: ModuleType, results: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=message):
        generator.Results.model_validate({**results, "reproduced": [{**RUN, **change}]})


def test_rows_that_name_what_does_not_exist_are_refused(generator: ModuleType, results: dict[str, Any]) -> None:
    results["labelled"][0]["number_of"] = "fcn_resnest269-d8_voc"
    with pytest.raises(ValidationError, match=r"fcn_resnest269-d8_voc: named, but there is no such row"):
        generator.Results.model_validate(results)
    results["labelled"][0] = results["labelled"][1]
    with pytest.raises(ValidationError, match="more than one row for pspnet_resnest50-d16_voc"):
        generator.Results.model_validate(results)
