"""Fine-tuning: a network that starts as another whole segmentation model, its classes matched by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestseg.core.errors import WeightsError, nearest
from nestseg.core.taxonomy import plain_name
from nestseg.models.segmenter import Segmenter, create_model
from nestseg.store.files import load_strictly
from nestseg.store.metadata import Architecture, ModelMetadata

RECIPE_FIELDS = {
    "segmentor": "segmentor",
    "backbone": "backbone.name",
    "backbone_norm": "backbone.norm",
    "head_norm": "head.norm",
    "head_channels": "head.channels",
    "num_convs": "head.num_convs",
    "concat_input": "head.concat_input",
    "pool_scales": "head.pool_scales",
    "fusion": "head.fusion",
    "shortcut_channels": "head.shortcut_channels",
    "auxiliary_channels": "auxiliary_head.channels",
}
"""Arguments of a network that its keys and shapes show, and the recipe field of each."""

SILENT_FIELDS = {
    "output_stride": "output_stride",
    "dilation_variant": "backbone.dilation_variant",
    "atrous_rates": "head.atrous_rates",
    "align_corners": "head.align_corners",
    "mean": "data.mean",
    "std": "data.std",
}
"""Arguments that change what a network computes and leave keys and shapes as they are."""

_CLASSIFIERS = ("decode_head.classifier", "auxiliary_head.classifier")


class TransferWarning(UserWarning):
    """Weights were taken from a network that computes something else with them."""


class Transfer(NamedTuple):
    """What a network took from another.

    Args:
        kept: Classes whose classifier rows were taken, as (class here, class there).
        new: Classes whose rows start fresh.
        unused: Classes of the other model that no class here took.
        fresh: Parts that start fresh as a whole, such as ``auxiliary_head``.
        left_out: Parts of the other model that this network does not have.
    """

    kept: tuple[tuple[str, str], ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    fresh: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.kept) + len(self.new)
        renamed = [f"{here} from {there}" for here, there in self.kept if here != there]
        parts = [
            "backbone and decode head kept",
            f"{len(self.kept)} of {total} classes kept" + (f" ({', '.join(renamed)})" if renamed else ""),
            f"new: {', '.join(self.new)}" if self.new else "",
            f"not used: {', '.join(self.unused)}" if self.unused else "",
            f"starts fresh: {', '.join(self.fresh)}" if self.fresh else "",
            f"left out: {', '.join(self.left_out)}" if self.left_out else "",
        ]
        return "; ".join(part for part in parts if part)


def transfer_weights(
    model: Segmenter,
    state: Mapping[str, Tensor],
    *,
    source: ModelMetadata,
    classes: Sequence[str],
    class_map: Mapping[str, str],
    path: Path,
) -> Transfer:
    """Start a network as another one: backbone and decode head whole, each class's classifier row by its name.

    Names are compared without case, blanks, hyphens and underscores. The auxiliary head is taken where both have one
    of the same width.

    Args:
        model: Changed in place; made by `create_model`, its own weights are what new classes keep.
        state: State dict of the other model, in our keys.
        source: What those weights mean.
        classes: Class names of ``model`` in train-id order.
        class_map: Class of ``model`` -> class of the other one, where their names differ.
        path: The file of ``state``, for messages.

    Raises:
        WeightsError: E-WEIGHTS-050, if the networks differ in more than their classes, with the recipe fields that
            make them one; E-WEIGHTS-051, if the class map names a class that one of them does not have.

    Warns:
        TransferWarning: For each difference that keys and shapes cannot show.
    """
    assert model.architecture is not None, "create_model records it"
    here, there = model.architecture, _complete(source.architecture)
    takes_auxiliary = here.auxiliary and there.auxiliary and here.auxiliary_channels == there.auxiliary_channels
    _check_fit(here, there, path=path, ignore=() if takes_auxiliary else ("auxiliary_channels",))
    pairs = match_classes(classes, source.classes, class_map=class_map, path=path)

    fresh = model.state_dict()
    taken = {name: value for name, value in state.items() if takes_auxiliary or not name.startswith("auxiliary_head.")}
    for classifier in _CLASSIFIERS[: 1 + takes_auxiliary]:
        for leaf in ("weight", "bias"):
            rows = fresh[f"{classifier}.{leaf}"].clone()
            for train_id, other_id in pairs.items():
                rows[train_id] = state[f"{classifier}.{leaf}"][other_id]
            taken[f"{classifier}.{leaf}"] = rows
    starts_fresh = ("auxiliary_head",) if here.auxiliary and not takes_auxiliary else ()
    load_strictly(
        model,
        taken,
        path=path,
        fix="start from a model of the same network",
        may_miss=tuple(f"{part}." for part in starts_fresh),
    )
    return Transfer(
        kept=tuple((classes[i], source.classes[j]) for i, j in pairs.items()),
        new=tuple(name for i, name in enumerate(classes) if i not in pairs),
        unused=tuple(name for j, name in enumerate(source.classes) if j not in pairs.values()),
        fresh=starts_fresh,
        left_out=("auxiliary_head",) if there.auxiliary and not takes_auxiliary else (),
    )


def match_classes(
    classes: Sequence[str], others: Sequence[str], *, class_map: Mapping[str, str], path: Path
) -> dict[int, int]:
    """Pair the classes of two models by name: train id here -> train id there.

    Raises:
        WeightsError: E-WEIGHTS-051, if the class map names a class that does not exist.

    Example:
        >>> match_classes(["Sky", "tram"], ["road", "sky", "train"], class_map={"tram": "train"}, path=Path("a"))
        {0: 1, 1: 2}
    """
    for names, allowed in ((class_map, classes), (class_map.values(), others)):
        for name in names:
            if name not in allowed:
                owner = "this data set" if allowed is classes else "that model"
                raise WeightsError(
                    "E-WEIGHTS-051",
                    f"the class map names {name!r}, which is no class of {owner}",
                    fix=nearest(name, allowed),
                    path=path,
                )
    there = {plain_name(name): index for index, name in enumerate(others)}
    wanted = [plain_name(class_map.get(name, name)) for name in classes]
    return {index: there[name] for index, name in enumerate(wanted) if name in there}


def _complete(architecture: Architecture) -> Architecture:
    """Fill in what null stands for, by building the network without memory for its weights."""
    with torch.device("meta"):
        built = create_model(**dict(architecture)).architecture
    assert built is not None
    return built


def _check_fit(here: Architecture, there: Architecture, *, path: Path, ignore: Sequence[str]) -> None:
    differences = _differences(here, there, {n: f for n, f in RECIPE_FIELDS.items() if n not in ignore})
    # the two kinds of BatchNorm have the same keys
    if {here.backbone_norm, there.backbone_norm} <= {"batch", "frozen_batch"}:
        differences.pop("backbone.norm", None)
    if {here.head_norm, there.head_norm} <= {"batch", "frozen_batch"}:
        differences.pop("head.norm", None)
    if differences:
        raise WeightsError(
            "E-WEIGHTS-050",
            "the model to start from is another network: "
            + "; ".join(f"{field} is {b} there, {a} here" for field, (a, b) in differences.items()),
            fix=" ".join(f"--set {field}={_yaml(b)}" for field, (_, b) in differences.items()),
            path=path,
        )
    silent = _differences(here, there, SILENT_FIELDS)
    if "output_stride" in silent:  # the rates follow it
        silent.pop("head.atrous_rates", None)
    for field, (a, b) in silent.items():
        warnings.warn(
            f"{path} was trained with {field}={_yaml(b)}, this network has {_yaml(a)}: the same weights compute "
            f"something else; --set {field}={_yaml(b)} keeps what they were trained for",
            TransferWarning,
            stacklevel=4,
        )


def _differences(here: Architecture, there: Architecture, fields: Mapping[str, str]) -> dict[str, tuple[Any, Any]]:
    both = {field: (getattr(here, name), getattr(there, name)) for name, field in fields.items()}
    return {field: (a, b) for field, (a, b) in both.items() if a != b}


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
