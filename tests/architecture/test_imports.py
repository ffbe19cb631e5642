"""Who may import whom, and what must start without torch."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_recipes_data_sets_and_the_command_line_import_no_torch():
    script = (
        "import sys\n"
        "for name in ('nestseg', 'nestseg.recipes', 'nestseg.cli', 'nestseg.data.datasets'):\n"
        "    __import__(name)\n"
        "    heavy = {'torch', 'torchvision', 'lightning_fabric'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_import_contracts_are_kept():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout


@pytest.fixture
def floors() -> list[str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    return [name.strip() for layer in layers for name in layer.split("|")]


def test_every_module_at_the_top_stands_on_a_floor(floors):
    package = ROOT / "src" / "nestseg"
    modules = {path.stem for path in package.glob("*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    assert modules - {"__init__"} == set(floors), "give it a place in pyproject.toml, [tool.importlinter]"
