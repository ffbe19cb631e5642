"""Recognising a checkpoint by the keys and shapes of its tensors, never by its name."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor

from nestseg.core.errors import WeightsError, nearest
from nestseg.core.taxonomy import Colour, Taxonomy, plain_name
from nestseg.core.types import Fusion, Norm, OutputStride, Segmentor
from nestseg.data.datasets import DATASETS
from nestseg.models.heads.aspp import ATROUS_RATES
from nestseg.models.resnest import BACKBONES, ResNeStSpec
from nestseg.models.segmenter import IMAGENET_MEAN, IMAGENET_STD
from nestseg.store.metadata import Architecture
from nestseg.weights.encoding import ENCODING
from nestseg.weights.layout import Layout
from nestseg.weights.mmseg import MMSEG
from nestseg.weights.mmseg_config import MmsegSettings, read_config
from nestseg.weights.official import OFFICIAL
from nestseg.weights.ours import NESTSEG
from nestseg.weights.ssseg import SSSEG
from nestseg.weights.timm import TIMM

LAYOUTS: Mapping[str, Layout] = {
    "nestseg": NESTSEG,
    "official": OFFICIAL,
    "timm": TIMM,
    "mmseg": MMSEG,
    "ssseg": SSSEG,
    "encoding": ENCODING,
}
"""Layouts by name; of those that fit equally well, the first is taken."""

_USUAL_DATASETS = ("voc", "ade20k", "cityscapes", "camvid")
_POOL_SCALES = (1, 2, 3, 6)


class Recognised(NamedTuple):
    """What a state dict is.

    Args:
        layout: The layout that it came in.
        kind: A whole network, or a backbone only.
        state: Tensors by our names; a backbone's without the prefix ``backbone.``.
        architecture: The arguments of `nestseg.create_model`; None for a backbone.
        backbone: A key of `BACKBONES`.
        taxonomy: Names and colours of the classes; None for a backbone.
        dropped: Keys that no network of ours has, such as an ImageNet classifier.
        assumptions: What weights do not show and was taken for granted, a sentence each.
        names: Our keys, with the prefix ``backbone.``, by theirs.
    """

    layout: Layout
    kind: Literal["segmentation", "backbone"]
    state: dict[str, Tensor]
    architecture: Architecture | None
    backbone: str
    taxonomy: Taxonomy | None
    dropped: tuple[str, ...]
    assumptions: tuple[str, ...]
    names: Mapping[str, str]


def recognise(
    state: Mapping[str, Tensor],
    *,
    meta: Mapping[str, Any] | None = None,
    layout: str = "auto",
    backbone: str | None = None,
    output_stride: OutputStride | None = None,
) -> Recognised:
    """Find out what a state dict is, and rename it to our keys.

    Args:
        state: Tensors by name, on any device; a ``module.`` prefix is dropped.
        meta: The entry ``meta`` of mmsegmentation's files: class names, colours, and the configuration as text, which
            is read but never run.
        layout: A key of `LAYOUTS`, or ``auto`` for the one that knows most keys.
        backbone: Which backbone it is, where several have the same shapes.
        output_stride: Stride that the network is to be built with; None is what the configuration says, or else 8.

    Returns:
        What it is. Batch counters that old files lack are missing in its state too.

    Shape:
        - state: any

    Raises:
        WeightsError: E-WEIGHTS-020 for keys that are unknown, 022 for a layout that is, 023 for a backbone that
            does not fit, 024 for tensors that are missing or of a strange shape, 025 for a configuration that we
            cannot build, 026 for a key that is given twice, 027 for an output stride that there is not.
    """
    if output_stride is not None and output_stride not in get_args(OutputStride):
        raise WeightsError("E-WEIGHTS-027", f"output stride {output_stride}; allowed 8, 16, 32", fix="choose one")
    plain = {key.removeprefix("module."): value for key, value in state.items()}
    if len(plain) < len(state):
        twice = next(key for key in state if f"module.{key}" in state)
        raise WeightsError("E-WEIGHTS-026", f"both {twice} and module.{twice} are given", fix="remove one of the two")
    found = _choose_layout(plain, layout)
    ours, dropped, names = found.to_ours(plain)
    name, assumptions = _find_backbone(ours, backbone)
    if not any(key.startswith(("decode_head.", "auxiliary_head.")) for key in ours):
        if layout == "auto" and found is OFFICIAL:
            assumptions += ("timm's files have the same keys: official assumed; layout timm dilates otherwise",)
        bare = {key.removeprefix("backbone."): value for key, value in ours.items()}
        return Recognised(found, "backbone", bare, None, name, None, dropped, assumptions, names)
    settings, lines = _read_settings(found, meta or {})
    architecture, more = _find_architecture(ours, found, name, settings=settings, output_stride=output_stride)
    taxonomy, last = _find_taxonomy(architecture.num_classes, meta or {})
    assumptions += (*lines, *more, *last)
    return Recognised(found, "segmentation", ours, architecture, name, taxonomy, dropped, assumptions, names)


def _choose_layout(keys: Iterable[str], name: str) -> Layout:
    if name == "auto":
        return min(LAYOUTS.values(), key=lambda layout: len(layout.find_unknown(keys)))
    if name not in LAYOUTS:
        raise WeightsError(
            "E-WEIGHTS-022", f"unknown layout {name!r}; {nearest(name, ['auto', *LAYOUTS])}", fix="choose one of these"
        )
    return LAYOUTS[name]


def _shape(state: Mapping[str, Tensor], key: str, num_dims: int) -> tuple[int, ...]:
    """Return the shape of a tensor that must be there."""
    given = "missing" if key not in state else f"of shape {tuple(state[key].shape)}"
    if key not in state or state[key].ndim != num_dims or 0 in state[key].shape:
        raise WeightsError(
            "E-WEIGHTS-024",
            f"{key} (named as in nestseg) is {given}; expected {num_dims} dimensions, none of them 0",
            fix="pass the whole state dict of one of the four segmentors on a ResNeSt, or of a ResNeSt",
        )
    return tuple(state[key].shape)


def _parts(state: Iterable[str], prefix: str) -> set[str]:
    """Return the next parts of all keys that start with a prefix."""
    return {key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}


def _find_backbone(state: Mapping[str, Tensor], asked: str | None) -> tuple[str, tuple[str, ...]]:
    blocks = tuple(len(_parts(state, f"backbone.layer{stage}.")) for stage in (1, 2, 3, 4))
    stem = _shape(state, "backbone.conv1.0.weight", 4)[0]
    width = _shape(state, "backbone.layer1.0.conv1.weight", 4)[0]
    radix = _shape(state, "backbone.layer1.0.conv2.bn0.weight", 1)[0] // width
    cardinality = width // _shape(state, "backbone.layer1.0.conv2.fc1.weight", 4)[1]

    def fits(spec: ResNeStSpec) -> bool:
        seen = (spec.blocks, spec.stem_channels, spec.radix, spec.cardinality, spec.cardinality * spec.group_width)
        return seen == (blocks, stem, radix, cardinality, width)

    names = [name for name, spec in BACKBONES.items() if fits(spec)]
    if not names or (asked is not None and asked not in names):
        raise WeightsError(
            "E-WEIGHTS-023",
            f"blocks {blocks}, stem {stem}, radix {radix}, cardinality {cardinality}, width {width} "
            + (f"are {' or '.join(names)}, not {asked}" if names else "are no ResNeSt that nestseg has"),
            fix=f"name {' or '.join(names)}, or leave the name out"
            if names
            else f"pass weights of one of {', '.join(BACKBONES)}",
        )
    if asked is not None or len(names) == 1:
        return asked or names[0], ()
    return names[0], (f"backbone {names[0]}: {', '.join(names[1:])} has the same shapes and pools elsewhere",)


def _read_settings(layout: Layout, meta: Mapping[str, Any]) -> tuple[MmsegSettings | None, tuple[str, ...]]:
    text = meta.get("config", meta.get("cfg"))
    if layout is not MMSEG or not isinstance(text, str):
        return None, ()
    settings = read_config(text)
    return settings, () if settings else ("the configuration in meta has no model of plain values and was not used",)


def _find_architecture(
    state: Mapping[str, Tensor],
    layout: Layout,
    backbone: str,
    *,
    settings: MmsegSettings | None,
    output_stride: OutputStride | None,
) -> tuple[Architecture, tuple[str, ...]]:
    """Read arguments of `create_model` off keys and shapes; take the others from settings, or assume them."""
    num_classes, channels = _shape(state, "decode_head.classifier.weight", 4)[:2]
    in_channels = _shape(state, "backbone.conv1.0.weight", 4)[1]
    if in_channels != 3:
        raise WeightsError(
            "E-WEIGHTS-024",
            f"{in_channels} image channels; weights do not show which mean and deviation they were trained with",
            fix="pass a model file that nestseg wrote",
        )
    segmentor = _find_segmentor(state)
    auxiliary = bool(_parts(state, "auxiliary_head."))
    told = settings.output_stride if settings else None
    stride: OutputStride = output_stride or told or 8
    assumptions = []
    if settings is None:
        asked = "as asked" if output_stride else "assumed"
        assumptions.append(
            f"output stride {stride} {asked}; its atrous rates, align_corners={layout.align_corners}, dropout 0.1 and "
            "ImageNet's mean and deviation assumed: weights do not show them"
        )
    elif stride != told:
        assumptions.append(f"output stride {stride} as asked, with its atrous rates; the configuration says {told}")
    if settings and not (settings.mean and settings.std):
        assumptions.append("ImageNet's mean and deviation assumed: the configuration does not show them")
    scales: tuple[int, ...] | None = None
    if segmentor == "pspnet":
        scales = settings.pool_scales if settings else _POOL_SCALES
        num_scales = len(_parts(state, "decode_head.branches."))
        if len(scales) != num_scales:
            raise _wrong_count(num_scales, "pooling branches", f"pool scales {scales}")
        if settings is None:
            assumptions.append(f"pool scales {scales} assumed: weights show only their number")
    rates: tuple[int, ...] | None = None
    if segmentor in ("deeplabv3", "deeplabv3plus"):
        rates = settings.atrous_rates if settings and stride == told else ATROUS_RATES[stride]
        num_rates = len(_parts(state, "decode_head.aspp.branches.")) - 1
        if not len(rates) == num_rates == 3:
            raise _wrong_count(num_rates, "atrous branches", f"atrous rates {rates}; nestseg builds three")
    architecture = Architecture(
        segmentor=segmentor,
        backbone=backbone,
        num_classes=num_classes,
        output_stride=stride,
        dilation_variant=layout.dilation_variant,
        auxiliary=auxiliary,
        mean=settings.mean if settings and settings.mean else IMAGENET_MEAN,
        std=settings.std if settings and settings.std else IMAGENET_STD,
        backbone_norm=_find_norm(state, "backbone.bn1"),
        head_norm=_find_norm(state, "decode_head."),
        frozen_stages=0,
        head_channels=channels,
        auxiliary_channels=_shape(state, "auxiliary_head.classifier.weight", 4)[1] if auxiliary else None,
        dropout=settings.dropout if settings else 0.1,
        align_corners=settings.align_corners if settings else layout.align_corners,
        num_convs=len(_parts(state, "decode_head.convs.")) if segmentor == "fcn" else None,
        concat_input=segmentor == "fcn" and "decode_head.fuse.conv.weight" in state,
        pool_scales=scales,
        atrous_rates=None if rates is None else (rates[0], rates[1], rates[2]),
        fusion=None if rates is None else _find_fusion(state),
        shortcut_channels=_shape(state, "decode_head.shortcut.conv.weight", 4)[0]
        if segmentor == "deeplabv3plus"
        else None,
    )
    return architecture, tuple(assumptions)


def _wrong_count(given: int, what: str, known: str) -> WeightsError:
    return WeightsError(
        "E-WEIGHTS-024", f"{given} {what} for {known}", fix="pass a file whose meta has the configuration that made it"
    )


def _find_segmentor(state: Iterable[str]) -> Segmentor:
    parts = _parts(state, "decode_head.")
    if "convs" in parts:
        return "fcn"
    if "branches" in parts:
        return "pspnet"
    return "deeplabv3plus" if parts & {"shortcut", "refine"} else "deeplabv3"


def _find_norm(state: Iterable[str], prefix: str) -> Norm:
    return "batch" if any(key.startswith(prefix) and key.endswith(".running_mean") for key in state) else "group"


def _find_fusion(state: Iterable[str]) -> Fusion:
    parts = _parts(state, "decode_head.aspp.fuse.")
    return "separable" if "depthwise" in parts else "projected" if "0" in parts else "full"


def _find_taxonomy(num_classes: int, meta: Mapping[str, Any]) -> tuple[Taxonomy, tuple[str, ...]]:
    """Name the classes by what the file says, or else by their number."""
    names, colours = _read_classes(meta)
    lines: tuple[str, ...] = ()
    if len(names) == num_classes == len(set(names)):
        for dataset in DATASETS.values():
            if list(map(plain_name, dataset.taxonomy.classes)) == list(map(plain_name, names)):
                return dataset.taxonomy, ()
        palette = colours if len(colours) == num_classes else _distinct_colours(num_classes)
        return Taxonomy(name="custom", classes=names, palette=palette), ()
    if names:
        lines = (f"the file names {len(set(names))} different classes for {num_classes}: its names were not used",)
    for name in _USUAL_DATASETS:
        if DATASETS[name].taxonomy.num_classes == num_classes:
            return DATASETS[name].taxonomy, (*lines, f"{num_classes} classes: those of {name} assumed")
    return generic_taxonomy(num_classes), (*lines, f"{num_classes} classes without names")


def generic_taxonomy(num_classes: int) -> Taxonomy:
    """Return classes named by number, in colours that differ.

    Args:
        num_classes: Classes K.

    Raises:
        DataError: E-DATA-001, if there are none or more than 255.

    Example:
        >>> generic_taxonomy(2).classes
        ('class_0', 'class_1')
    """
    names = tuple(f"class_{index}" for index in range(num_classes))
    return Taxonomy(name="custom", classes=names, palette=_distinct_colours(num_classes))


def _read_classes(meta: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[Colour, ...]]:
    """Return class names and colours of an mmsegmentation file, none where there are none that make sense."""
    newer = meta.get("dataset_meta")
    entries = {str(key).lower(): value for key, value in (newer if isinstance(newer, Mapping) else meta).items()}
    try:
        names = tuple(str(name).strip() for name in entries.get("classes") or ())
        colours = tuple((int(red), int(green), int(blue)) for red, green, blue in entries.get("palette") or ())
    except (TypeError, ValueError):
        return (), ()
    return names, colours if all(0 <= value <= 255 for colour in colours for value in colour) else ()


def _distinct_colours(count: int) -> tuple[Colour, ...]:
    """Return colours that differ, neighbours most of all."""
    # multiples of the golden ratio never come back to the same hue
    hues = ((index * 0.618034 % 1, 0.95 - 0.25 * (index % 3), 0.95 - 0.2 * (index % 2)) for index in range(count))
    colours = (colorsys.hsv_to_rgb(*hue) for hue in hues)
    return tuple((round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colours)
