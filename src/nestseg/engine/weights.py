"""Say what a weights file is, and write it in another layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from nestseg.build import find_model
from nestseg.core.disk import replaced_file, sha256_of
from nestseg.core.errors import NestsegError, WeightsError
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import OutputStride
from nestseg.models.segmenter import count_parameters, create_model
from nestseg.store.files import (
    RawCheckpoint,
    check_finite,
    load_strictly,
    read_checkpoint,
    read_metadata,
    write_model_file,
    write_torch_file,
)
from nestseg.store.hub import check_config
from nestseg.store.metadata import Architecture, ModelMetadata
from nestseg.weights.layout import Layout
from nestseg.weights.model import check_asked, find_published, locate_weights, recognise_file
from nestseg.weights.recognise import LAYOUTS, recognise
from nestseg.weights.registry import PublishedWeights

TargetLayout = Literal["nestseg", "official", "mmseg", "ssseg", "encoding"]


class Inspection(NamedTuple):
    """What `inspect_weights` found: a text for people, and the problems among it, none for a file that loads."""

    text: str
    problems: tuple[str, ...]


def inspect_weights(
    source: str | Path,
    *,
    layout: str = "auto",
    backbone: str | None = None,
    output_stride: OutputStride | None = None,
    keys: bool = False,
) -> Inspection:
    """Say what a weights file is: layout, network, classes, what had to be assumed, keys, and what is wrong with it.

    Args:
        source: See `nestseg.load_model`.
        layout: ``auto`` recognises it by its keys; otherwise the layout to read it in.
        backbone: The network, where the keys fit two.
        output_stride: Of the network, which weights do not show.
        keys: List every key, in their names and ours, instead of a summary of their parts.

    Raises:
        RunError: If there is no such file.
        WeightsError: If it holds no weights that can be read at all.
    """
    path = locate_weights(source)
    raw = read_checkpoint(path)
    digest = sha256_of(path)
    published = find_published(source, path)
    lines = [
        ("file", f"{path}, {path.stat().st_size / 1e6:.1f} MB"),
        ("sha256", digest),
        ("published", "no file of the registry has this hash" if published is None else _describe_entry(published)),
    ]
    if published is not None:
        lines += [("licence", published.licence), ("data", published.data_licence)]
    problems, ours, names = [], raw.state, dict.fromkeys(raw.state, "")
    try:
        metadata = read_metadata(raw, path=path)
        if metadata is not None:
            lines += [("layout", "nestseg, a model file"), *_describe_model(metadata)]
            architecture: Architecture | None = metadata.architecture
            names = {name: name for name in raw.state}
            check_config(path, metadata)
            check_asked(metadata.architecture, layout=layout, backbone=backbone, output_stride=output_stride, path=path)
        else:
            found, _ = recognise_file(
                raw, path, source=source, layout=layout, backbone=backbone, output_stride=output_stride
            )
            ours, architecture = found.state, found.architecture
            kind = "a backbone" if architecture is None else "a whole model"
            lines.append(("layout", f"{found.layout.name}, {kind}"))
            if architecture is None:
                lines.append(("backbone", found.backbone))
            else:
                lines += _describe_network(architecture)
            if found.taxonomy is not None:
                lines.append(_describe_classes(found.taxonomy))
            lines += [("assumed", text) for text in found.assumptions]
            lines += [("left out", ", ".join(found.dropped))] if found.dropped else []
            names |= {name: found.names.get(name.removeprefix("module."), "") for name in raw.state}
        if architecture is not None:
            with torch.device("meta"):
                model = create_model(**dict(architecture))
            lines.append(("parameters", f"{count_parameters(model) / 1e6:.2f} M"))
            load_strictly(model, {k: v.to("meta") for k, v in ours.items()}, path=path, fix="pass a file that fits")
    except NestsegError as error:
        problems.append(str(error))
    try:
        check_finite(raw.state, path=path)
    except WeightsError as error:
        problems.append(str(error))
    lines += _describe_meta(raw)
    lines.append(("keys", f"{len(raw.state)} tensors, {sum(t.numel() for t in raw.state.values()) / 1e6:.2f} M values"))
    table = _list_keys(raw.state, names) if keys else _list_parts(raw.state)
    width = max(len(label) for label, _ in lines)
    text = [f"{label:<{width}}  {value}" for label, value in lines] + [f"{'':<{width}}  {row}" for row in table]
    text += [f"{'problem':<{width}}  {problem}" for problem in problems or ["none"]]
    return Inspection("\n".join(text), tuple(problems))


def convert_weights(
    source: str | Path,
    out: Path,
    *,
    to: TargetLayout = "nestseg",
    num_classes: int | None = None,
    layout: str = "auto",
    backbone: str | None = None,
    output_stride: OutputStride | None = None,
) -> str:
    """Write weights in another layout, and read them back to see that they are the same.

    Args:
        source: See `nestseg.load_model`; a backbone alone can be converted too.
        out: ``.safetensors``, or ``.pth`` for the layouts of others.
        to: The layout to write. ``official`` is the backbone alone.
        num_classes: Start classifiers for so many classes afresh, if the file has another number.
        layout: ``auto`` recognises the source by its keys.
        backbone: The network, where the keys fit two.
        output_stride: Of the network, which weights do not show.

    Returns:
        What was written, in words.

    Raises:
        RunError: If there is no such file.
        WeightsError: If it cannot be read, has no place in that layout, or the result cannot be written.
    """
    if out.suffix not in (".safetensors", ".pth") or (to == "nestseg" and out.suffix == ".pth"):
        allowed = ".safetensors" if to == "nestseg" else ".safetensors or .pth"
        raise WeightsError("E-WEIGHTS-060", f"suffix {out.suffix!r}; allowed {allowed}", fix="rename it", path=out)
    path = locate_weights(source)
    if out.resolve() == path.resolve():
        raise WeightsError("E-WEIGHTS-061", "would be written over its source", fix="choose another name", path=out)
    raw = read_checkpoint(path)
    metadata = read_metadata(raw, path=path)
    alone = None
    if metadata is None:
        alone, _ = recognise_file(
            raw, path, source=source, layout=layout, backbone=backbone, output_stride=output_stride
        )
    if alone is not None and alone.kind == "backbone":
        if num_classes is not None or output_stride is not None:
            raise WeightsError(
                "E-WEIGHTS-064",
                "holds a backbone only, whose file has neither a classifier nor an output stride",
                fix="leave out the number of classes and the output stride",
                path=path,
            )
        check_finite(raw.state, path=path)
        state, description = alone.state, alone.backbone
    else:
        found = find_model(source, layout=layout, backbone=backbone, output_stride=output_stride)
        found = found.with_classes(num_classes, replace_classifier=num_classes is not None)
        state, metadata = found.state, found.metadata
        description = f"{metadata.architecture.segmentor} on {metadata.architecture.backbone}"
        if num_classes is not None:
            description += f", classifiers for {num_classes} classes start afresh"
    if to == "nestseg" and metadata is not None:
        write_model_file(out, state, metadata)
        left_out: tuple[str, ...] = ()
    else:
        try:
            written = LAYOUTS[to].from_ours(state)
        except WeightsError as error:
            raise error.at(path) from None
        left_out = written.left_out
        _write_foreign(out, written.state, layout=LAYOUTS[to], metadata=metadata)
    _check_read_back(out, state, left_out=left_out)
    notes = [f"{out}: {description}, layout {to}, read back equal"]
    if left_out:
        notes.append("left out: " + ", ".join(sorted({name.split(".")[0] for name in left_out})))
    if metadata is not None and to != "nestseg":
        notes += _lost_in(LAYOUTS[to], metadata.architecture)
    return "\n".join(notes)


def _lost_in(layout: Layout, architecture: Architecture) -> list[str]:
    """Name what a layout's project builds otherwise than this network, which keys and shapes cannot say."""
    pairs = {
        "the dilation variant": (architecture.dilation_variant, layout.dilation_variant),
        "align_corners": (architecture.align_corners, layout.align_corners),
    }
    lost = [
        f"note: {name} is {ours} here and {theirs} in {layout.name}: there the same weights compute something else"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs and not (name == "align_corners" and layout.is_backbone_only)
    ]
    return [
        *lost,
        f"note: the output stride {architecture.output_stride} is not in the file; state it where you load it",
    ]


def _write_foreign(path: Path, state: Mapping[str, Tensor], *, layout: Layout, metadata: ModelMetadata | None) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    content: dict[str, Any] = dict(tensors)
    if layout.wrapper is not None:
        content = {layout.wrapper: tensors}
        if metadata is not None:
            content["meta"] = {"CLASSES": metadata.classes, "PALETTE": [list(colour) for colour in metadata.palette]}
    try:
        if path.suffix == ".safetensors":
            with replaced_file(path) as temporary:
                save_file(tensors, temporary)
        else:
            write_torch_file(path, content)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise WeightsError(
            "E-WEIGHTS-062",
            f"cannot be written: {' '.join(str(error).split())[:200]}",
            fix="free space on the disk, or choose a folder that exists and is writable",
            path=path,
        ) from error


def _check_read_back(path: Path, state: Mapping[str, Tensor], *, left_out: tuple[str, ...]) -> None:
    raw = read_checkpoint(path)
    back = raw.state if read_metadata(raw, path=path) else recognise(raw.state, meta=raw.meta).state
    kept = {name.removeprefix("backbone."): value for name, value in state.items() if name not in left_out}
    same = {name.removeprefix("backbone."): value for name, value in back.items()}
    if kept.keys() != same.keys() or not all(torch.equal(value, same[name]) for name, value in kept.items()):
        raise WeightsError(
            "E-WEIGHTS-063", "does not read back as it was written", fix="do not use it; check the disk", path=path
        )


def _describe_entry(published: PublishedWeights) -> str:
    known = len(published.sha256)
    return published.name + {64: "", 0: ", by its name: no hash is known"}.get(
        known, f", by the {known} of 64 digits of its sha256 that are known"
    )


def _describe_network(architecture: Architecture) -> list[tuple[str, str]]:
    a = architecture
    heads = f"width {a.head_channels}, " + (f"auxiliary {a.auxiliary_channels}" if a.auxiliary else "no auxiliary head")
    options = {
        "dilation": a.dilation_variant,
        "align_corners": a.align_corners or None,
        "concat_input": a.concat_input or None,
        "atrous_rates": a.atrous_rates,
        "pool_scales": a.pool_scales,
        "fusion": a.fusion,
    }
    return [
        ("network", f"{a.segmentor} on {a.backbone}, output stride {a.output_stride}, {a.num_classes} classes"),
        ("heads", ", ".join([heads, *(f"{name} {value}" for name, value in options.items() if value is not None)])),
    ]


def _describe_classes(taxonomy: Taxonomy) -> tuple[str, str]:
    return "classes", f"{taxonomy.name}: {', '.join(taxonomy.classes)}"


def _describe_model(metadata: ModelMetadata) -> list[tuple[str, str]]:
    recipe = (metadata.recipe or {}).get("name")
    lines = [*_describe_network(metadata.architecture), _describe_classes(metadata.taxonomy)]
    lines.append(("trained", f"{recipe}, step {metadata.step}" if recipe else "not by a recipe of ours"))
    lines += [("source", metadata.source)] if metadata.source else []
    lines += [("score", f"{s.dataset} {s.split} mIoU {100 * s.mean_iou:.2f} %, {s.protocol}") for s in metadata.scores]
    lines.append(("licence", metadata.licence or "not stated"))
    lines.append(("data", metadata.data_licence or "not stated"))
    versions = ", ".join(f"{name} {version}" for name, version in metadata.versions.items())
    return [*lines, ("versions", versions)]


def _describe_meta(raw: RawCheckpoint) -> list[tuple[str, str]]:
    shown = {name: value for name, value in raw.meta.items() if name != "nestseg"}
    if not shown:
        return []
    parts = [
        f"{name}={value!r}"[:80] if isinstance(value, int | float | str) else name for name, value in shown.items()
    ]
    return [("beside", " ".join("; ".join(parts).split()))]


def _list_keys(state: Mapping[str, Tensor], names: Mapping[str, str]) -> list[str]:
    width = max(map(len, state))
    shapes = {
        name: f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in state.items()
    }
    column = max(map(len, shapes.values()))
    rows = (f"{name:<{width}}  {shapes[name]:<{column}}  {names[name] or '-'}" for name in state)
    return [row.rstrip() for row in rows]


def _list_parts(state: Mapping[str, Tensor]) -> list[str]:
    """Sum keys up by their first two parts."""
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        parts.setdefault(".".join(name.split(".")[:-1][:2]) or name, []).append(tensor)
    width = max(map(len, parts))
    return [
        f"{part:<{width}}  {len(tensors):>4} tensors  {sum(t.numel() for t in tensors):>11,} values"
        for part, tensors in parts.items()
    ]
