"""Tables that repeat each other's names agree, and so do codes, recipes, decisions and the guide for contributors."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nestseg.build import build_model
from nestseg.core import errors
from nestseg.core.errors import NestsegError
from nestseg.data.datasets import DATASETS
from nestseg.models.heads import HEADS
from nestseg.models.resnest import BACKBONES
from nestseg.recipes import (
    _DATASET_SECTIONS,
    LABELLED_VARIANTS,
    PUBLISHED_MEAN_IOU,
    SEGMENTORS,
    ZOO,
    named_recipe,
    parse_name,
)
from nestseg.recipes import BACKBONES as BACKBONE_NAMES

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "nestseg"
STRIDES = (8, 16, 32)
CODE = re.compile(r"E-[A-Z]+-\d{3}")

# One meaning that is found out in more than one place. Any other code belongs to one module.
SHARED_CODES = {
    "E-DATA-010": {"core/image_io.py", "data/dataset.py"},  # a file or folder that cannot be read
    # a label value that is not allowed
    "E-DATA-014": {"data/dataset.py", "metrics/confusion.py", "metrics/label_maps.py"},
    "E-DATA-020": {"data/dataset.py", "data/ade20k.py"},  # a folder without the layout
    "E-RECIPE-003": {"recipe.py", "recipes.py"},  # a value that the field cannot have
}


@pytest.fixture
def results() -> dict[str, Any]:
    return tomllib.loads((ROOT / "zoo" / "results.toml").read_text(encoding="utf-8"))


def test_recipes_name_the_backbones_and_heads_that_there_are():
    assert set(BACKBONE_NAMES) == set(BACKBONES)
    assert set(SEGMENTORS) == set(HEADS)
    assert len(set(BACKBONE_NAMES)) == len(BACKBONE_NAMES)


def test_every_data_set_has_its_recipe_sections():
    assert set(_DATASET_SECTIONS) == set(DATASETS)
    for name, sections in _DATASET_SECTIONS.items():
        assert sections["data"]["dataset"] == name


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_splits_of_a_recipe_exist(dataset):
    data = named_recipe(f"fcn_resnest50-d8_{dataset}").data
    assert {data.train_split, data.eval_split} <= set(DATASETS[dataset].splits)


def test_published_numbers_are_those_of_the_zoo(results):
    assert {row["recipe"]: row["mean_iou"] for row in results["published"]} == PUBLISHED_MEAN_IOU


def test_labelled_variants_are_those_of_the_zoo_and_stand_for_a_published_recipe(results):
    assert sorted(row["recipe"] for row in results["labelled"]) == sorted(LABELLED_VARIANTS)
    for row in results["labelled"]:
        given, meant = parse_name(row["recipe"]), parse_name(row["number_of"])
        assert row["number_of"] in PUBLISHED_MEAN_IOU
        assert (given.segmentor, given.dataset) == (meant.segmentor, meant.dataset)


@pytest.mark.parametrize("name", [*PUBLISHED_MEAN_IOU, *LABELLED_VARIANTS])
def test_recipes_have_the_settings_that_the_zoo_says(name, results):
    recipe = named_recipe(name)
    said = results["datasets"][recipe.data.dataset]
    dataset = DATASETS[recipe.data.dataset]
    assert list(recipe.data.crop_size) == said["crop_size"]
    assert recipe.data.batch_size == said["batch_size"]
    assert recipe.optimizer.lr == said["lr"]
    assert recipe.schedule.name == said["policy"]
    assert recipe.schedule.epochs == said["epochs"]
    assert recipe.data.train_split == said["train_split"]
    assert recipe.data.eval_split == said["eval_split"]
    assert dataset.taxonomy.num_classes == said["num_classes"]
    assert dataset.official_counts[said["train_split"]] == said["num_train_images"]
    assert dataset.official_counts[said["eval_split"]] == said["num_eval_images"]


def sample_names() -> Iterator[str]:
    """Each backbone once, with heads, strides and data sets in turn; each head at each stride once."""
    datasets = list(DATASETS)
    for i, backbone in enumerate(BACKBONE_NAMES):
        yield f"{SEGMENTORS[i % len(SEGMENTORS)]}_{backbone}-d{STRIDES[i % 3]}_{datasets[i % len(datasets)]}"
    for i, segmentor in enumerate(SEGMENTORS):
        for j, stride in enumerate(STRIDES):
            yield f"{segmentor}_resnest14-d{stride}_{datasets[(i + j) % len(datasets)]}"


@pytest.mark.parametrize("name", dict.fromkeys([*ZOO, *sample_names()]))
def test_recipe_builds_on_the_meta_device(name):
    recipe = named_recipe(name)
    with torch.device("meta"):
        model = build_model(recipe)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert type(model.decode_head) is HEADS[recipe.segmentor]
    assert model.decode_head.num_classes == DATASETS[recipe.data.dataset].taxonomy.num_classes
    assert model.backbone.output_stride == recipe.output_stride


def find_raised_codes() -> list[tuple[str, str, str]]:
    """Find every error made in the package: code, name of its class, module."""
    raised = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args):
                continue
            first = node.args[0]
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and CODE.fullmatch(first.value):
                raised.append((first.value, node.func.id, path.relative_to(SOURCE).as_posix()))
    return raised


def test_every_error_code_has_one_meaning():
    modules: dict[str, set[str]] = defaultdict(set)
    for code, _, module in find_raised_codes():
        modules[code].add(module)
    assert len(modules) > 50
    clashes = {
        code: sorted(found)
        for code, found in modules.items()
        if len(found) > 1 and not found <= SHARED_CODES.get(code, set())
    }
    assert not clashes, "give each its own code, or name the meaning they share in SHARED_CODES"
    assert {code: modules[code] for code in SHARED_CODES} == SHARED_CODES, "SHARED_CODES says more than there is"


def test_every_error_code_is_of_the_family_of_its_class():
    families = {name: name.removesuffix("Error").upper() for name, kind in vars(errors).items() if is_error(kind)}
    wrong = [
        f"{module}: {name}({code})"
        for code, name, module in find_raised_codes()
        if code.split("-")[1] != families.get(name)
    ]
    assert not wrong


def is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, NestsegError) and kind is not NestsegError


def find_printed_codes() -> set[str]:
    """Find the codes in every text of the package that is not a docstring."""
    printed = set()
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        # a docstring, of whatever it may be, is an expression that is thrown away
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                printed |= set(CODE.findall(node.value))
    return printed


def test_every_code_that_the_documentation_names_exists():
    printed = find_printed_codes()
    pages = [*SOURCE.rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    unknown = {
        f"{path.relative_to(ROOT)}: {code}"
        for path in pages
        for code in CODE.findall(path.read_text(encoding="utf-8"))
        if code not in printed
    }
    assert not unknown


DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))


def test_decisions_are_numbered_without_a_gap():
    assert [path.name[:5] for path in DECISIONS] == [f"{number:04d}-" for number in range(1, len(DECISIONS) + 1)]


@pytest.mark.parametrize("path", DECISIONS, ids=lambda path: path.stem)
def test_a_decision_is_short_and_says_what_would_overturn_it(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    assert lines[0].startswith(f"# {int(path.name[:4])}. ")
    assert any(line.startswith("**We would notice that it is wrong**") for line in lines)


GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_line_beside_a_change_that_the_guide_shows_is_still_there():
    lost, num_lines = [], 0
    for block in re.findall(r"```diff\n(.*?)```", GUIDE, flags=re.DOTALL):
        for name, hunks in re.findall(r"^--- (.*?)\n(.*?)(?=^--- |\Z)", block, flags=re.DOTALL | re.MULTILINE):
            file = (ROOT / name).read_text(encoding="utf-8").splitlines()
            for mark, line in re.findall(r"^([ -])(.*)$", hunks, flags=re.MULTILINE):
                num_lines += 1
                # a line that is replaced lists what there is, and grows: its start is enough
                there = line in file if mark == " " else any(other.startswith(line[:30]) for other in file)
                lost += [] if there else [f"{name}: {line}"]
    assert num_lines > 10
    assert not lost, "CONTRIBUTING.md shows lines that have changed; show them as they are"


def test_the_code_of_the_guide_is_python_and_its_links_exist():
    for block in re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL):
        ast.parse(block)
    links = re.findall(r"\]\(([^)#]+)\)", re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL))
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []
