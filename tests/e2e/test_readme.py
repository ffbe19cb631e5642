"""What the README says, done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nestseg
from nestseg.cli import build_parser, main
from nestseg.core.image_io import write_image

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_of_the_readme_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["data.crop_size=[64, 64]", "data.batch_size=3", "optimizer.lr=0.001", "data.num_workers=0"]
    small += ["head.channels=16", "evaluation.every_steps=null"]
    options = [word for override in small for word in ("--set", override)]
    assert main(["train", "demo", "--run", "runs/demo", "--max-steps", "1", "--device", "cpu", *options]) == 0
    write_image("runs/demo/street.png", nestseg.open_dataset("toystreets", None, "val").read(0).image)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "labels.png").is_file()
    assert names["main"].shape == (2, 19, 17, 25)


def test_every_path_in_the_readme_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_every_source_file_has_its_line():
    short = ("ade20k", "cityscapes", "camvid", "timm", "mmseg", "ssseg", "encoding", "ours")
    listed = README + "".join(f"{name}.py" for name in short)
    folders = ("ops", "core", "heads", "prepare", "verify", "losses", "optim")
    for path in (ROOT / "src" / "nestseg").rglob("*.py"):
        if path.stem.startswith("__") or path.stem == "version" or path.parent.name in folders:
            continue
        assert path.name in listed, f"{path.name} has no line in README.md"


@pytest.mark.parametrize("verb", ["recipes", "train", "tune", "runs", "evaluate", "predict", "data", "weights", "demo"])
def test_every_verb_and_option_of_the_readme_exists(verb):
    lines = [line for line in README.splitlines() if line.startswith(f"nestseg {verb}")]
    assert lines
    actions = {action.dest: action for action in build_parser()._subparsers._group_actions[0].choices[verb]._actions}
    known = {option for action in actions.values() for option in action.option_strings}
    inner = actions[f"{verb}_verb"].choices.values() if f"{verb}_verb" in actions else ()
    known |= {option for parser in inner for action in parser._actions for option in action.option_strings}
    assert set(re.findall(r"--[a-z-]+", " ".join(lines))) <= known
