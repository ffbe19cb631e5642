"""Write docs/model_zoo.md from zoo/results.toml.

``python docs/generate_model_zoo.py`` writes the page, ``--check`` only says whether it is up to date.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nestseg.core.types import Segmentor
from nestseg.weights.registry import load_registry

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "zoo" / "results.toml"
PAGE = ROOT / "docs" / "model_zoo.md"

TITLES = {"fcn": "FCN", "pspnet": "PSPNet", "deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3plus"}

RecipeName = Annotated[
    str,
    Field(pattern=r"^(fcn|pspnet|deeplabv3|deeplabv3plus)_resnest\d+(-fast-\ds\dx\d+d)?-d(8|16|32)_[a-z0-9]+$"),
]
Share = Annotated[float, Field(ge=0, le=1)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dataset(_Record):
    """What the recipes of one data set have in common."""

    title: str
    crop_size: tuple[int, int]
    lr: float
    policy: str
    batch_size: int
    epochs: int
    train_split: str
    eval_split: str
    num_train_images: int
    num_eval_images: int
    num_classes: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole schedule; the last, partial batch of an epoch is dropped."""
        return self.num_train_images // self.batch_size * self.epochs


class Protocol(_Record):
    """Who made numbers, and how they evaluated."""

    title: str
    url: str
    text: str


class Published(_Record):
    """A number of others that belongs to one of our recipes."""

    recipe: RecipeName
    mean_iou: Share
    protocol: str
    weights: str
    log: str


class Labelled(_Record):
    """A recipe that stood beside a number which was made by another network."""

    recipe: RecipeName
    number_of: RecipeName


class Elsewhere(_Record):
    """A number of others that belongs to none of our recipes."""

    segmentor: Segmentor
    backbone: str
    output_stride: Literal[8, 16, 32]
    dataset: str
    protocol: str
    source: str
    length: str = "-"
    mean_iou: Share | None = None
    mean_iou_multi_scale: Share | None = None
    weights: str | None = None


class Reproduced(_Record):
    """A run of ours."""

    recipe: RecipeName | Literal["demo"]
    mean_iou: Share
    split: str
    num_classes_counted: int
    steps: int
    minutes: float
    machine: str
    torch: str
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")]
    date: datetime.date
    protocol: str
    overrides: tuple[str, ...]
    log: str | None = None
    weights: str | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _weights_have_a_hash(self) -> Reproduced:
        if (self.weights is None) != (self.sha256 is None):
            raise ValueError("weights and sha256 belong together")
        return self


class Results(_Record):
    """zoo/results.toml."""

    datasets: dict[str, Dataset]
    protocols: dict[str, Protocol]
    published: tuple[Published, ...]
    labelled: tuple[Labelled, ...]
    elsewhere: tuple[Elsewhere, ...]
    reproduced: tuple[Reproduced, ...] = ()

    @model_validator(mode="after")
    def _references_exist(self) -> Results:
        published = [row.recipe for row in self.published]
        recipes = [*published, *(row.recipe for row in self.labelled)]
        if repeated := sorted({name for name in recipes if recipes.count(name) > 1}):
            raise ValueError(f"more than one row for {', '.join(repeated)}")
        wanted = {
            "a row of [[published]]": ({row.number_of for row in self.labelled}, set(published)),
            "a table of [protocols]": (
                {row.protocol for row in self.published} | {row.protocol for row in self.elsewhere},
                set(self.protocols),
            ),
            "a table of [datasets]": (
                {name.rsplit("_", 1)[1] for name in recipes} | {row.dataset for row in self.elsewhere},
                set(self.datasets),
            ),
            "an entry of the registry of weights": (
                {row.weights for row in (*self.published, *self.elsewhere) if row.weights},
                set(load_registry()),
            ),
        }
        for kind, (named, existing) in wanted.items():
            if missing := sorted(named - existing):
                raise ValueError(
                    f"{', '.join(missing)}: named, but there is no such {kind.removeprefix('a ').removeprefix('an ')}"
                )
        return self


def read_results(path: Path) -> Results:
    """Read and check the numbers.

    Raises:
        pydantic.ValidationError: For unknown, missing or impossible fields; names them.
    """
    return Results.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))


def render(results: Results) -> str:
    """Lay the page out in Markdown."""
    sections = [
        _INTRODUCTION,
        *(_dataset_section(name, results) for name in results.datasets),
        _WHICH_NUMBER,
        _reproduced_section(results),
        _elsewhere_section(results),
        _CITATION,
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _dataset_section(name: str, results: Results) -> str:
    dataset = results.datasets[name]
    height, width = dataset.crop_size
    shared = [
        f"{height}x{width}",
        f"{dataset.lr:g}/{dataset.policy}/{dataset.batch_size}/{dataset.epochs}",
        f"{dataset.train_split}/{dataset.eval_split}",
    ]
    published = [
        (row.recipe, _percent(row.mean_iou), _downloads(row.weights, log=row.log)) for row in results.published
    ]
    labelled = [(row.recipe, "-", "-") for row in results.labelled]
    rows = [
        [*_model(recipe), *shared, mean_iou, links, f"`{recipe}`"]
        for recipe, mean_iou, links in (*published, *labelled)
        if recipe.endswith(f"_{name}")
    ]
    facts = (
        f"{dataset.num_classes} classes; {dataset.num_train_images:,} training and "
        f"{dataset.num_eval_images:,} evaluation images; {dataset.steps:,} steps."
    )
    return f"## {dataset.title}\n\n{facts}\n\n{_table(_COLUMNS, rows)}"


def _reproduced_section(results: Results) -> str:
    if not results.reproduced:
        return "## Measured with this code\n\nNo run is recorded yet."
    columns = (
        *("Recipe", "mIoU", "Classes", "Set", "Steps", "Minutes", "Protocol"),
        *("Changed", "Machine", "torch", "Commit", "Date", "Files"),
    )
    rows = [
        [
            f"`{row.recipe}`",
            _percent(row.mean_iou),
            str(row.num_classes_counted),
            row.split,
            f"{row.steps:,}",
            f"{row.minutes:.1f}",
            row.protocol,
            "<br>".join(f"`{override}`" for override in row.overrides) or "nothing",
            row.machine,
            row.torch,
            row.commit[:7],
            row.date.isoformat(),
            _links(model=row.weights, log=None if row.log is None else f"../{row.log}"),
        ]
        for row in results.reproduced
    ]
    return f"{_REPRODUCED.strip()}\n\n{_table(columns, rows)}"


def _elsewhere_section(results: Results) -> str:
    columns = ("Data set", "Model", "Backbone", "Length", "mIoU", "mIoU multi-scale + flip", "By", "Download")
    rows = [
        [
            results.datasets[row.dataset].title,
            TITLES[row.segmentor],
            f"{row.backbone}-D{row.output_stride}",
            row.length,
            _percent(row.mean_iou),
            _percent(row.mean_iou_multi_scale),
            f"[{results.protocols[row.protocol].title}]({row.source})",
            _downloads(row.weights),
        ]
        for row in results.elsewhere
    ]
    protocols = "\n".join(f"- [{one.title}]({one.url}): {one.text}" for one in results.protocols.values())
    return f"{_ELSEWHERE.strip()}\n\n{_table(columns, rows)}\n\n{_PROTOCOLS}\n\n{protocols}"


def _model(recipe: str) -> list[str]:
    """Name the model and the backbone of a recipe as the published table did.

    Example:
        >>> _model("pspnet_resnest50-d16_ade20k")
        ['PSPNet', 'Rst-50-D16']
    """
    segmentor, backbone, _ = recipe.split("_")
    return [TITLES[segmentor], backbone.replace("resnest", "Rst-").replace("-d", "-D")]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def _downloads(weights: str | None, **urls: str | None) -> str:
    """Say how to get published weights, and link what else there is."""
    command = [] if weights is None else [f"`{load_registry()[weights].fetch_command}`"]
    return ", ".join([*command, *([_links(**urls)] if any(urls.values()) else [])]) or "-"


def _links(**urls: str | None) -> str:
    return ", ".join(f"[{name}]({url})" for name, url in urls.items() if url is not None) or "-"


def _table(columns: Sequence[str], rows: list[list[str]]) -> str:
    ruler = ["---:" if name in _NUMBERS else "---" for name in columns]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (columns, ruler, *cells))


_NUMBERS = {"mIoU", "mIoU multi-scale + flip", "Classes", "Steps", "Minutes"}
"""Columns that are set flush right."""


_COLUMNS = (
    "Model",
    "Backbone",
    "Crop Size",
    "Schedule (LR/POLICY/BS/EPOCH)",
    "Train/Eval Set",
    "mIoU",
    "Download",
    "Recipe",
)

_INTRODUCTION = """
<!-- Written by docs/generate_model_zoo.py from zoo/results.toml; change those, not this page. -->
# Model zoo

Every row is a recipe: the name in the last column stands for the network and for every number of its
training. `nestseg recipes` lists them. Names have the form
`{segmentor}_{backbone}-d{output_stride}_{dataset}`, and every valid combination works, not only these.
Rst-101-D8 is short for ResNeSt-101 at output stride 8.

mIoU is in percent, over all pixels of the evaluation set, single scale, whole image. In the first three
tables it is the **published** number of another toolbox; the command in the column Download fetches the
weights that made it, and [how-to/weights.md](how-to/weights.md) says how to make it again. What this code
reached itself is [further down](#measured-with-this-code). A dash means that we know of no published number
for that network; [why there are such rows](#which-number-belongs-to-which-network). Sizes are height x width.
"""

_WHICH_NUMBER = """
## Which number belongs to which network

The published table once stood with the backbone labels Rst-50-D8 (FCN), Rst-50-D16 (PSPNet), Rst-101-D8
(DeepLabV3) and Rst-101-D16 (DeepLabV3plus). The configurations that gave its twelve numbers were all
ResNeSt-101 at output stride 8, and the project's own page was corrected to say so, with the numbers
unchanged. So labels and numbers agree in the three DeepLabV3 rows only.

This zoo holds both: the twelve networks that were trained, with their numbers, and the nine that were only
labels, without a number. If you look for the number printed beside, say, "PSPNet, Rst-50-D16", it is the
one in the row of PSPNet with Rst-101-D8; the network of the label has 20.8 million parameters less and sees
features at half the resolution, so expect less from it.
"""

_REPRODUCED = """
## Measured with this code

One row a run, with everything needed to run it again. "Changed" lists what was set differently from the
recipe; a run with a shorter schedule or another batch size is not a reproduction of the published number,
and says so there. "Classes" is the number of classes in the mean.
"""

_ELSEWHERE = """
## Published elsewhere

The same kinds of network under other schedules and protocols. A plain ResNet-101 trained the same way does
better than ResNeSt-101 in the last Cityscapes rows: this schedule was made for ResNet and never tuned for
ResNeSt.
"""

_PROTOCOLS = "How those who published the numbers on this page evaluated:"

_CITATION = """
## Citation

The backbone is by the authors of ResNeSt; if you use it, cite them.

```bibtex
@inproceedings{zhang2022resnest,
  title     = {{ResNeSt}: Split-Attention Networks},
  author    = {Zhang, Hang and Wu, Chongruo and Zhang, Zhongyue and Zhu, Yi and Lin, Haibin and Zhang, Zhi and
               Sun, Yue and He, Tong and Mueller, Jonas and Manmatha, R. and Li, Mu and Smola, Alexander},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR) Workshops},
  year      = {2022},
  doi       = {10.1109/CVPRW56347.2022.00309},
  note      = {arXiv:2004.08955}
}
```
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page.

    Returns:
        Exit code: 1 if the page was to be checked and is not up to date.
    """
    parser = argparse.ArgumentParser(description="Write docs/model_zoo.md from zoo/results.toml.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    check = parser.parse_args(arguments).check
    page = render(read_results(RESULTS))
    if not check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    sys.stderr.write(f"{PAGE} is not up to date | fix: python docs/generate_model_zoo.py\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
