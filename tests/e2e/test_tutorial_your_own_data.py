"""The tutorial as a reader follows it: its code and commands are run, and what it shows is what comes out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nestseg.data.spec import DatasetSpec

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorials" / "your-own-data.md").read_text(encoding="utf-8")
REAL = Path(os.environ.get("NESTSEG_REAL_DATA", ROOT / "../shared/data")).resolve()


def find_blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", find_blocks("yaml"), ids=lambda text: yaml.safe_load(text)["name"])
def test_every_data_set_file_of_the_page_is_one(text):
    spec = DatasetSpec.parse(text)
    assert DatasetSpec.parse(spec.to_yaml()) == spec


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "voc_mini").is_dir(), reason=f"no real samples in {REAL}")
@pytest.mark.timeout(900)
def test_the_page_runs_as_written_and_shows_what_comes_out(tmp_path):
    (tmp_path / "VOCdevkit").symlink_to(REAL / "voc_mini" / "VOCdevkit")
    steps = re.findall(r"^```(python|text|yaml|)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    shown, num_commands = "", 0
    for kind, block in steps:
        if kind == "python":
            subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, env=environment)
        elif kind == "":
            shown = ""
            for line in block.replace("\\\n", " ").splitlines():
                program, *words = shlex.split(line)
                assert program == "nestseg"
                done = subprocess.run(
                    [sys.executable, "-m", "nestseg", *words],
                    cwd=tmp_path,
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stderr
                assert "error" not in done.stderr
                shown += done.stdout + done.stderr
                num_commands += 1
        elif kind == "text":
            assert [line for line in block.splitlines() if line not in shown.splitlines()] == []
    assert num_commands == 5
    written = DatasetSpec.read(tmp_path / "pets" / "dataset.yaml")
    assert written == DatasetSpec.parse(find_blocks("yaml")[0])
    assert (tmp_path / "labels" / "2008_007353.png").is_file()
    assert len(list((tmp_path / "runs" / "pets" / "evaluation" / "pictures").glob("*.png"))) == 8

    # the run stands on its own: the data set file is in its recipe
    (tmp_path / "pets" / "dataset.yaml").unlink()
    again = [sys.executable, "-m", "nestseg", "evaluate", "runs/pets", "--data", "pets", "--out", "again"]
    subprocess.run(again, cwd=tmp_path, check=True, env=environment, capture_output=True)
    first, second = (tmp_path / folder / "metrics.json" for folder in ("runs/pets/evaluation", "again"))
    assert first.read_text() == second.read_text()
