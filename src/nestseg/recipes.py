"""The zoo as data, and the way from a name to a recipe.

A name is ``{segmentor}_{backbone}-d{output_stride}_{dataset}``, for example ``pspnet_resnest50-d16_ade20k``; any valid
combination resolves. ``demo`` is the small run on drawn streets. Nothing here imports torch.

Reference:
    The schedules and augmentation of the twelve originals are those of the ResNeSt models of sssegmentation
    (December 2020); LR / POLICY / BATCH SIZE / EPOCHS stand in that project's model zoo.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml

from nestseg.core.errors import RecipeError, nearest
from nestseg.core.types import Segmentor, Size
from nestseg.data.datasets import DATASETS
from nestseg.data.derive import DatasetFacts, derive_recipe
from nestseg.data.spec import DatasetSpec
from nestseg.recipe import EvaluationSection, Recipe, known_fields, validate_evaluation, validate_recipe

SEGMENTORS: tuple[str, ...] = get_args(Segmentor)
BACKBONES = (
    *(f"resnest{depth}" for depth in (14, 26, 50, 101, 200, 269)),
    *(
        f"resnest50-fast-{kind}"
        for kind in ("1s1x64d", "2s1x64d", "4s1x64d", "1s2x40d", "2s2x40d", "4s2x40d", "1s4x24d")
    ),
)
"""Names a recipe may use; an architecture test holds them against `nestseg.models.resnest.BACKBONES`."""

PUBLISHED_MEAN_IOU: Mapping[str, float] = {
    "fcn_resnest101-d8_voc": 0.7741,
    "pspnet_resnest101-d8_voc": 0.7907,
    "deeplabv3_resnest101-d8_voc": 0.7897,
    "deeplabv3plus_resnest101-d8_voc": 0.7976,
    "fcn_resnest101-d8_ade20k": 0.4574,
    "pspnet_resnest101-d8_ade20k": 0.4603,
    "deeplabv3_resnest101-d8_ade20k": 0.4624,
    "deeplabv3plus_resnest101-d8_ade20k": 0.4648,
    "fcn_resnest101-d8_cityscapes": 0.7814,
    "pspnet_resnest101-d8_cityscapes": 0.7870,
    "deeplabv3_resnest101-d8_cityscapes": 0.7975,
    "deeplabv3plus_resnest101-d8_cityscapes": 0.8030,
}
"""Single-scale val mean IoU in [0, 1] of the networks that were really trained: all ResNeSt-101 at output stride 8."""

LABELLED_VARIANTS = tuple(
    f"{model}_{dataset}"
    for dataset in ("voc", "ade20k", "cityscapes")
    for model in ("fcn_resnest50-d8", "pspnet_resnest50-d16", "deeplabv3plus_resnest101-d16")
)
"""Backbones as the published table labelled them; the numbers beside those labels were not made with them."""

ZOO = (*PUBLISHED_MEAN_IOU, *LABELLED_VARIANTS, "deeplabv3plus_resnest14-d16_camvid", "demo")
"""The recipes that ``nestseg recipes`` lists."""

_NAME = re.compile(r"(?P<segmentor>[a-z0-9]+)_(?P<backbone>[a-z0-9-]+)-d(?P<output_stride>\d+)_(?P<dataset>[a-z0-9]+)")

_DATASET_SECTIONS: Mapping[str, Mapping[str, Any]] = {
    "voc": {
        "data": {"dataset": "voc", "train_split": "trainaug", "batch_size": 16, "crop_size": (512, 512)},
        "augmentation": {"base_size": (512, 2048)},
        "schedule": {"epochs": 60},
        "evaluation": {"base_size": (512, 2048)},
    },
    "ade20k": {
        "data": {"dataset": "ade20k", "batch_size": 16, "crop_size": (512, 512)},
        "augmentation": {"base_size": (512, 2048)},
        "schedule": {"epochs": 130},
        "evaluation": {"base_size": (512, 2048), "every_steps": 16000},
    },
    "cityscapes": {
        "data": {"dataset": "cityscapes", "batch_size": 8, "crop_size": (512, 1024)},
        "augmentation": {"base_size": (1024, 2048)},
        "schedule": {"epochs": 220},
        "evaluation": {"base_size": (1024, 2048), "every_steps": 8000},
    },
    "camvid": {
        "data": {"dataset": "camvid", "batch_size": 8, "crop_size": (360, 480)},
        "augmentation": {"base_size": (360, 480)},
        "schedule": {"epochs": 200},
        "evaluation": {"base_size": None, "every_steps": 1000},
    },
    "toystreets": {
        "data": {"dataset": "toystreets", "batch_size": 8, "crop_size": (128, 128)},
        "augmentation": {"base_size": (128, 256), "scale_range": (0.75, 1.5)},
        "schedule": {"epochs": 20},
        "evaluation": {"base_size": None, "every_steps": 500},
        "backbone": {"pretrained": "none"},
    },
}

_SPECIAL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "demo": (
        "deeplabv3plus_resnest14-d32_toystreets",
        {
            "backbone.zero_init_residual": True,
            "head.channels": 96,
            "auxiliary_head.enabled": False,
            "data.batch_size": 4,
            "data.crop_size": (128, 256),
            "data.num_workers": 1,
            "augmentation.scale_range": (1.0, 1.0),
            "augmentation.max_class_share": 1.0,
            "augmentation.photometric": None,
            "optimizer.name": "adamw",
            "optimizer.lr": 0.003,
            "optimizer.weight_decay": 0.01,
            "schedule.min_lr": 0.0,
            "schedule.warmup_steps": 30,
            "schedule.max_steps": 375,
            "evaluation.every_steps": 375,
            "log.every_steps": 10,
        },
    ),
}
"""Names that stand for another recipe with changes, as dotted fields."""

_TUNED: Mapping[str, Mapping[str, Any]] = {
    "deeplabv3plus_resnest14-d16_camvid": {
        "backbone.pretrained": "none",
        "backbone.zero_init_residual": True,
        "head.channels": 128,
        "auxiliary_head.enabled": False,
        "data.batch_size": 4,
        "data.crop_size": (176, 240),
        "data.num_workers": 1,
        "augmentation.base_size": (180, 240),
        "augmentation.scale_range": (0.75, 1.5),
        "augmentation.photometric": None,
        "optimizer.name": "adamw",
        "optimizer.lr": 0.002,
        "optimizer.weight_decay": 0.01,
        "schedule.min_lr": 0.0,
        "schedule.warmup_steps": 50,
        "schedule.max_steps": 1050,
        "evaluation.base_size": (180, 240),
        "evaluation.every_steps": 350,
    },
}
"""Recipes whose values were found by trying, as dotted fields over the data set's defaults (see docs/log.md)."""


class RecipeWarning(UserWarning):
    """A recipe that will run, but probably not as meant."""


class RecipeName(NamedTuple):
    """A recipe name, taken apart."""

    segmentor: str
    backbone: str
    output_stride: int
    dataset: str


def list_recipes() -> list[tuple[str, str, str, str, str, str, str]]:
    """Lay the zoo out in rows: name, segmentor, backbone, stride, data set, schedule, published mIoU in %."""
    rows: list[tuple[str, str, str, str, str, str, str]] = []
    for name in ZOO:
        recipe = named_recipe(name)
        published = PUBLISHED_MEAN_IOU.get(name)
        length = recipe.schedule.max_steps
        schedule = (
            f"{recipe.optimizer.lr:g}/{recipe.schedule.name}/{recipe.data.batch_size}/"
            f"{f'{length} steps' if length else f'{recipe.schedule.epochs} epochs'}"
        )
        rows.append(
            (
                name,
                recipe.segmentor,
                recipe.backbone.name,
                str(recipe.output_stride),
                recipe.data.dataset,
                schedule,
                "-" if published is None else f"{100 * published:.2f}",
            )
        )
    return rows


def parse_name(name: str, *, dataset: str | None = None) -> RecipeName:
    """Take a recipe name apart.

    Args:
        name: The name.
        dataset: Name of a data set of your own, of which ``name`` says nothing.

    Raises:
        RecipeError: If a part does not exist; offers the nearest names.

    Example:
        >>> parse_name("pspnet_resnest50-d16_ade20k")
        RecipeName(segmentor='pspnet', backbone='resnest50', output_stride=16, dataset='ade20k')
    """
    match = _NAME.fullmatch(name if dataset is None else f"{name}_custom")
    if match is None:
        form = "SEGMENTOR_BACKBONE-dSTRIDE" + ("_DATASET" if dataset is None else ", as --dataset says the rest")
        raise _unknown(name, f"not of the form {form}")
    parts = RecipeName(match["segmentor"], match["backbone"], int(match["output_stride"]), dataset or match["dataset"])
    tables: tuple[tuple[str, str, Iterable[str]], ...] = (
        ("segmentor", parts.segmentor, SEGMENTORS),
        ("backbone", parts.backbone, BACKBONES),
        ("output stride", str(parts.output_stride), ("8", "16", "32")),
        ("data set", parts.dataset, DATASETS if dataset is None else [dataset]),
    )
    for kind, given, allowed in tables:
        if given not in allowed:
            raise _unknown(name, f"there is no {kind} {given}; {nearest(given, allowed)}")
    return parts


def resolve_recipe(
    source: str | Path,
    overrides: Sequence[str] = (),
    *,
    spec: DatasetSpec | None = None,
    facts: DatasetFacts | None = None,
) -> Recipe:
    """Turn a name or a YAML file, and ``--set`` overrides, into a recipe.

    Args:
        source: A recipe name, or the path of a recipe file (ends in .yaml or .yml).
        overrides: ``"dotted.field=value"``; values are read as YAML. ``schedule.max_steps`` shortens the warm-up in
            proportion, ``backbone.name`` brings its own published weights, ``init.model`` stands in for them (and for
            ``backbone.zero_init_residual``), unless those fields are given too.
        spec: A data set of your own; ``source`` is then a name without a data set, ``SEGMENTOR_BACKBONE-dSTRIDE``.
        facts: What was measured of it.

    Raises:
        RecipeError: Unknown name, field or value; the message offers what is near and allowed.

    Example:
        >>> resolve_recipe("fcn_resnest50-d8_voc", ["data.crop_size=[97, 97]"]).data.crop_size
        (97, 97)
    """
    is_file = str(source).endswith((".yaml", ".yml"))
    if spec is not None and facts is not None:
        recipe = custom_recipe(str(source), spec, facts=facts)
    else:
        recipe = Recipe.read(Path(source)) if is_file else named_recipe(str(source))
    if not overrides:
        return recipe
    changes = dict(parse_override(text) for text in overrides)
    values = recipe.model_dump(mode="json")
    for field, value in changes.items():
        _assign(values, field, value)
    if "schedule.warmup_steps" not in changes:
        values["schedule"]["warmup_steps"] = _shortened_warmup(recipe, values["schedule"]["max_steps"])
    if "backbone.pretrained" not in changes:
        values["backbone"]["pretrained"] = _following_weights(recipe, values)
    if values["init"]["model"] is not None and "backbone.zero_init_residual" not in changes:
        values["backbone"]["zero_init_residual"] = False
    changed = validate_recipe(values, source=str(source))
    if changed.data.batch_size != recipe.data.batch_size and "optimizer.lr" not in changes:
        scaled = recipe.optimizer.lr * changed.data.batch_size / recipe.data.batch_size
        warnings.warn(
            f"data.batch_size is {changed.data.batch_size}, not {recipe.data.batch_size}, and optimizer.lr unchanged; "
            f"linear scaling gives --set optimizer.lr={scaled:g}",
            RecipeWarning,
            stacklevel=2,
        )
    return changed


def start_overrides(init: str | None, class_map: Sequence[str]) -> list[str]:
    """Word ``--init MODEL`` and ``--class-map NEW=OLD`` as overrides.

    Raises:
        RecipeError: For a class map entry without ``=``.

    Example:
        >>> start_overrides("model.pth", ["tram=train"])
        ['init.model="model.pth"', 'init.class_map={"tram": "train"}']
    """
    overrides = [] if init is None else [f"init.model={json.dumps(init)}"]
    if class_map:
        pairs = dict(entry.split("=", 1) for entry in class_map if "=" in entry)
        if len(pairs) != len(class_map):
            raise RecipeError(
                "E-RECIPE-021",
                "no '=' in it, or a class twice",
                fix="write --class-map NEW=OLD, once a class",
                path=f"--class-map {' --class-map '.join(class_map)}",
            )
        overrides.append(f"init.class_map={json.dumps(pairs)}")
    return overrides


def named_recipe(name: str) -> Recipe:
    """Return the recipe of a zoo name or of any valid combination, without overrides.

    Raises:
        RecipeError: If there is no such name.
    """
    full_name, changes = _SPECIAL.get(name, (name, _TUNED.get(name, {})))
    parts = parse_name(full_name)
    sections = {section: dict(values) for section, values in _DATASET_SECTIONS[parts.dataset].items()}
    backbone = {"name": parts.backbone, "pretrained": published_backbone(parts.backbone)}
    values: dict[str, Any] = {
        "name": name,
        "segmentor": parts.segmentor,
        "output_stride": parts.output_stride,
        **sections,
        "backbone": backbone | sections.get("backbone", {}),
    }
    recipe = validate_recipe(values, source=name)
    return change_recipe(recipe, changes, source=name) if changes else recipe


def change_recipe(recipe: Recipe, changes: Mapping[str, Any], *, source: str) -> Recipe:
    """Return a recipe with other values in some fields, and nothing that follows from them.

    Args:
        recipe: What is changed.
        changes: Dotted fields and their values.
        source: Names it in errors.

    Raises:
        RecipeError: For a value that its field cannot have, or that does not go with others.

    Example:
        >>> change_recipe(named_recipe("demo"), {"ema.decay": 0.99}, source="demo").ema.decay
        0.99
    """
    values = recipe.model_dump(mode="json")
    for field, value in changes.items():
        _assign(values, field, value)
    return validate_recipe(values, source=source)


def shorten_recipe(recipe: Recipe, max_steps: int, *, source: str) -> Recipe:
    """Return a recipe of another length, its warm-up cut in proportion.

    Raises:
        RecipeError: For a length below 1.

    Example:
        >>> shorten_recipe(named_recipe("demo"), 75, source="demo").schedule.warmup_steps
        6
    """
    changes = {"schedule.max_steps": max_steps, "schedule.warmup_steps": _shortened_warmup(recipe, max_steps)}
    return change_recipe(recipe, changes, source=source)


def custom_recipe(name: str, spec: DatasetSpec, *, facts: DatasetFacts) -> Recipe:
    """Return the recipe of a network on a data set of your own, see `derive_recipe`.

    Args:
        name: ``SEGMENTOR_BACKBONE-dSTRIDE``.
        spec: The data set.
        facts: What was measured of it.

    Raises:
        RecipeError: If a part of the name does not exist, or it is a recipe file's.
    """
    if name.endswith((".yaml", ".yml")):
        raise RecipeError(
            "E-RECIPE-022",
            "a recipe file says which data set it is for",
            fix="leave out --dataset (data.spec of the file holds it), or name SEGMENTOR_BACKBONE-dSTRIDE",
            path=name,
        )
    parts = parse_name(name, dataset=spec.name)
    values: dict[str, Any] = {
        "name": f"{name}_{spec.name}",
        "segmentor": parts.segmentor,
        "output_stride": parts.output_stride,
        "backbone": {"name": parts.backbone, "pretrained": published_backbone(parts.backbone)},
        "data": {"spec": spec.model_dump(mode="json")},
    }
    for field, value, _ in derive_recipe(spec, facts):
        section, _, last = field.partition(".")
        values.setdefault(section, {})[last] = value
    return validate_recipe(values, source=name)


def published_backbone(name: str) -> str:
    """Return the name of a backbone's published ImageNet weights, a value of ``backbone.pretrained``.

    Example:
        >>> published_backbone("resnest101"), published_backbone("resnest14")
        ('official:resnest101', 'timm:resnest14')
    """
    if name.startswith("timm:"):
        return name
    return f"timm:{name}" if name in ("resnest14", "resnest26") else f"official:{name}"


def evaluation_base_size(dataset: str) -> Size | None:
    """Return the (short, long) side that images of a data set are resized to by its published protocol.

    Example:
        >>> evaluation_base_size("ade20k"), evaluation_base_size("camvid")
        ((512, 2048), None)
    """
    size: Size | None = _DATASET_SECTIONS.get(dataset, {}).get("evaluation", {}).get("base_size")
    return size


def change_evaluation(section: EvaluationSection, overrides: Sequence[str], *, source: str) -> EvaluationSection:
    """Return how a trained model is scored, with ``--set`` overrides.

    Args:
        section: What its recipe says.
        overrides: ``"evaluation.field=value"``.
        source: Names it in errors.

    Raises:
        RecipeError: For a field that is not of the evaluation, or that says when a training evaluates; and as
            `parse_override`.

    Example:
        >>> section = named_recipe("demo").evaluation
        >>> change_evaluation(section, ["evaluation.flip=true"], source="demo").flip
        True
    """
    values = section.model_dump(mode="json")
    for text in overrides:
        field, value = parse_override(text)
        name = field.removeprefix("evaluation.")
        if name == field or name in ("every_steps", "max_images"):
            allowed = (known for known in values if known not in ("every_steps", "max_images"))
            raise RecipeError(
                "E-RECIPE-013",
                f"{field} no longer decides anything once a model is trained",
                fix="change one of: " + ", ".join(f"evaluation.{known}" for known in allowed),
                path=f"--set {text}",
            )
        values[name] = value
    return validate_evaluation(values, source=source)


def parse_override(text: str) -> tuple[str, Any]:
    """Read one ``field=value`` of ``--set``.

    Raises:
        RecipeError: Without ``=``, for an unknown field, a value that is not YAML, or true or false for another type.
    """
    field, equals, value = text.partition("=")
    field = field.strip()
    fields = known_fields()
    if not equals:
        raise RecipeError("E-RECIPE-010", "no '=' in it", fix="write --set field=value", path=f"--set {text}")
    if field not in fields:
        near = nearest(field, fields)
        first = near.removeprefix("did you mean ").rstrip("?").split(", ")[0]
        kind = f" ({first}: {fields[first]})" if first in fields else ""
        raise RecipeError(
            "E-RECIPE-011",
            f"unknown field {field}",
            fix=f"{near if near.startswith('did') else 'see the fields with: nestseg recipes show NAME'}{kind}",
            path=f"--set {text}",
        )
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(
            "E-RECIPE-012",
            f"the value is not YAML: {' '.join(str(error).split())}",
            fix=f"{field} takes {fields[field]}",
            path=f"--set {text}",
        ) from error

    # pydantic takes true for 1, which nobody means
    if isinstance(parsed, bool) and "boolean" not in fields[field]:
        raise RecipeError(
            "E-RECIPE-003", f"{field} is {parsed}", fix=f"{field} takes {fields[field]}", path=f"--set {text}"
        )
    return field, parsed


def _assign(values: dict[str, Any], field: str, value: Any) -> None:
    *sections, last = field.split(".")
    for section in sections:
        if values[section] is None:
            values[section] = {}
        values = values[section]
    values[last] = value


def _shortened_warmup(recipe: Recipe, max_steps: object) -> int:
    """Cut the warm-up of a recipe in the proportion to which its run is cut; for another length leave it."""
    warmup, length = recipe.schedule.warmup_steps, recipe.schedule.max_steps
    if not isinstance(max_steps, int) or max_steps < 1:
        return warmup
    if length is None:
        return min(warmup, max_steps)
    return warmup * min(max_steps, length) // length


def _following_weights(recipe: Recipe, values: Mapping[str, Any]) -> object:
    """Say where the backbone starts when an override changes which backbone that is, or names a whole model instead."""
    before, name = recipe.backbone, values["backbone"]["name"]
    if values["init"]["model"] is not None:
        return "none"
    if before.pretrained == published_backbone(before.name) and isinstance(name, str):
        return published_backbone(name)
    return before.pretrained


def _unknown(name: str, reason: str) -> RecipeError:
    near = nearest(name, ZOO)
    fix = near if near.startswith("did you mean") else "list them with: nestseg recipes"
    return RecipeError("E-RECIPE-020", reason, fix=fix, path=f"recipe {name}")
