"""A model or a backbone from wherever it is named: a file of any layout, a run folder, a published name, the Hub."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nestseg.core.disk import sha256_of
from nestseg.core.errors import RunError, WeightsError
from nestseg.core.types import OutputStride
from nestseg.data.datasets import DATASETS
from nestseg.models.backbone import Backbone
from nestseg.models.segmenter import create_model
from nestseg.models.timm_backbone import TIMM_PREFIX, TimmBackbone, load_timm_state, load_timm_weights
from nestseg.store.files import RawCheckpoint, check_finite, load_strictly, read_checkpoint, read_metadata
from nestseg.store.hub import MODEL_FILE, check_config, fetch_pretrained
from nestseg.store.metadata import Architecture, ModelMetadata, Score
from nestseg.version import __version__
from nestseg.weights.channels import adapt_first_convolution
from nestseg.weights.recognise import Recognised, generic_taxonomy, recognise
from nestseg.weights.registry import PublishedWeights, find_weights, load_registry

_PUBLISHED_NAME = re.compile(r"[a-z][a-z-]+:[\w.-]+")


class AssumptionWarning(UserWarning):
    """A model was read from a file that does not show all that decides what it computes."""


class FoundModel(NamedTuple):
    """A whole model read from a file.

    Args:
        path: The file.
        state: Its tensors in our keys, all finite.
        metadata: What they mean; ``base_size`` is None where the file is not ours, since layouts do not say it.
        recognised: How a file that is not ours was read; None for ours, which says itself what it is.
        published: Its entry in the registry, see `find_published`.
    """

    path: Path
    state: dict[str, Tensor]
    metadata: ModelMetadata
    recognised: Recognised | None
    published: PublishedWeights | None

    def with_classes(self, num_classes: int | None, *, replace_classifier: bool) -> FoundModel:
        """Return the model with the number of classes that is wanted.

        Args:
            num_classes: None takes any number.
            replace_classifier: Start classifiers of another number of classes afresh, with names ``class_0`` and on.

        Raises:
            WeightsError: E-WEIGHTS-053, for another number of classes without ``replace_classifier``.
        """
        architecture = self.metadata.architecture
        if num_classes is None or num_classes == architecture.num_classes:
            return self
        if not replace_classifier:
            raise WeightsError(
                "E-WEIGHTS-053",
                f"has {architecture.num_classes} classes, not {num_classes}",
                fix=f"leave the number out, or start new classifiers: --num-classes {num_classes} on the command line, "
                "replace_classifier=True in Python",
                path=self.path,
            )
        architecture = architecture.model_copy(update={"num_classes": num_classes})
        fresh = create_model(**dict(architecture)).state_dict()
        taxonomy = generic_taxonomy(num_classes)
        update = {
            "architecture": architecture,
            "dataset": taxonomy.name,
            "classes": taxonomy.classes,
            "palette": taxonomy.palette,
            "scores": (),
        }
        return self._replace(
            state={name: fresh[name] if ".classifier." in name else value for name, value in self.state.items()},
            metadata=self.metadata.model_copy(update=update),
        )


def locate_weights(source: str | Path) -> Path:
    """Return the file that a name means; nothing is fetched but from the Hub.

    Args:
        source: A file, a run folder or a folder of `Segmenter.save_pretrained`, a published name such as
            ``official:resnest101``, or ``hf:owner/name@revision``.

    Raises:
        WeightsError: If published weights are not fetched yet (with the command), or the Hub does not have them.
        RunError: If there is no such file, or the folder holds no model.
    """
    text = str(source)
    if text.startswith("hf:"):
        return fetch_pretrained(text).path
    if _is_published_name(source):
        return find_weights(text)
    return find_model_file(Path(source))


def find_model_file(path: Path) -> Path:
    """Return the model file that a run folder or a path means.

    Raises:
        RunError: If there is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise RunError(
            "E-RUN-001",
            "no such run folder or model file",
            fix="check the path; published weights are listed by: nestseg weights list",
            path=path,
        )
    file = path / MODEL_FILE
    if not file.is_file():
        checkpoints = sorted(path.glob(f"checkpoints/step-*/{MODEL_FILE}"))
        fix = (
            f"finish the run with: nestseg train {path}/recipe.yaml --data ROOT --run {path} --resume, "
            f"or use {checkpoints[-1]}"
            if checkpoints
            else "pass the folder that nestseg train --run wrote, or a model file"
        )
        raise RunError("E-RUN-002", f"holds no {MODEL_FILE}", fix=fix, path=path)
    return file


def read_model(
    source: str | Path,
    *,
    layout: str = "auto",
    backbone: str | None = None,
    output_stride: OutputStride | None = None,
) -> FoundModel:
    """Read a whole segmentation model, whoever wrote it.

    Args:
        source: See `locate_weights`.
        layout: ``auto`` recognises it by its keys; otherwise a key of `LAYOUTS`.
        backbone: The network, where its keys fit two.
        output_stride: Of the network, which weights do not show; None takes what the file or the registry says, or 8.

    Raises:
        RunError: If there is no such file.
        WeightsError: If it cannot be read, is of no known layout, is not what was asked for, or holds a backbone only.

    Warns:
        AssumptionWarning: If the file is not ours nor in the registry, and something had to be assumed.
    """
    path = locate_weights(source)
    raw = read_checkpoint(path)
    metadata = read_metadata(raw, path=path)
    check_finite(raw.state, path=path)
    if metadata is not None:
        check_config(path, metadata)
        check_asked(metadata.architecture, layout=layout, backbone=backbone, output_stride=output_stride, path=path)
        return FoundModel(path, raw.state, metadata, None, None)
    found, published = recognise_file(
        raw, path, source=source, layout=layout, backbone=backbone, output_stride=output_stride
    )
    if found.architecture is None or found.taxonomy is None:
        raise WeightsError(
            "E-WEIGHTS-052",
            f"holds a backbone only ({found.backbone}, {found.layout.name} layout), no segmentation model",
            fix=f"start from it with: nestseg train NAME --set backbone.pretrained={source}",
            path=path,
        )
    if published is None and found.assumptions:
        warnings.warn(
            f"{path}: {'; '.join(found.assumptions)}; where that is wrong, say what is right: nestseg weights convert "
            f"{path} DST.safetensors --output-stride N --backbone NAME",
            AssumptionWarning,
            stacklevel=2,
        )
    return FoundModel(path, found.state, _describe(found, published, path=path), found, published)


def recognise_file(
    raw: RawCheckpoint,
    path: Path,
    *,
    source: str | Path,
    layout: str = "auto",
    backbone: str | None = None,
    output_stride: OutputStride | None = None,
) -> tuple[Recognised, PublishedWeights | None]:
    """Find out what a file that is not ours holds, with what the registry knows of it.

    Args:
        raw: What is in it.
        path: The file.
        source: What it was named by.
        layout: See `read_model`.
        backbone: See `read_model`.
        output_stride: See `read_model`.

    Returns:
        What it is, and its entry in the registry.

    Raises:
        WeightsError: If it is of no known layout, or not what the registry says of it.
    """
    published = find_published(source, path)
    is_plain = layout == "auto" and backbone is None and output_stride is None
    if published is not None:
        layout = published.layout if layout == "auto" else layout
        backbone = backbone or published.backbone
        output_stride = output_stride or published.output_stride
    try:
        found = recognise(raw.state, meta=raw.meta, layout=layout, backbone=backbone, output_stride=output_stride)
    except WeightsError as error:
        if published is not None and is_plain:
            raise _not_published(published, error.reason, path=path) from error
        raise error.at(path) from None
    if published is not None and found.architecture is not None and published.dataset is not None:
        told = (published.segmentor, DATASETS[published.dataset].taxonomy.num_classes)
        if told != (found.architecture.segmentor, found.architecture.num_classes):
            seen = f"{found.architecture.segmentor} of {found.architecture.num_classes} classes"
            raise _not_published(published, f"it is {seen}, not {told[0]} of {told[1]}", path=path)
    return found, published


def check_asked(
    architecture: Architecture,
    *,
    layout: str,
    backbone: str | None,
    output_stride: OutputStride | None,
    path: Path,
) -> None:
    """Refuse what was asked of a model file of ours that says of itself something else.

    Raises:
        WeightsError: E-WEIGHTS-054.
    """
    pairs = {
        "layout": (layout, ("auto", "nestseg")),
        "backbone": (backbone, (None, architecture.backbone)),
        "output stride": (output_stride, (None, architecture.output_stride)),
    }
    wrong = [f"{name} {allowed[1]}, not {asked}" for name, (asked, allowed) in pairs.items() if asked not in allowed]
    if wrong:
        raise WeightsError(
            "E-WEIGHTS-054",
            f"is a model file of nestseg, which says itself what it is: {', '.join(wrong)}",
            fix="leave that out",
            path=path,
        )


def load_backbone(backbone: Backbone, source: str, *, name: str) -> str:
    """Load pretrained weights into a backbone, strictly.

    Args:
        backbone: Changed in place.
        source: See `locate_weights`, a backbone or a whole model whose backbone is taken; for timm's backbones also
            ``timm:NAME`` or ``timm:NAME.TAG``, which timm fetches itself.
        name: What `create_model` calls the backbone, since two networks have the same keys and shapes.

    Returns:
        What was loaded, in words.

    Raises:
        RunError: If there is no such file.
        ModelError: If timm does not have such weights.
        WeightsError: If the file cannot be read or does not fit.
    """
    if isinstance(backbone, TimmBackbone) and source.startswith(TIMM_PREFIX):
        return f"backbone {load_timm_weights(backbone, source).source}"
    path = locate_weights(source)
    raw = read_checkpoint(path)
    check_finite(raw.state, path=path)
    words = f"backbone {path} (sha256 {sha256_of(path)[:8]})"
    metadata = read_metadata(raw, path=path)
    ours = metadata is not None
    if metadata is not None:
        check_config(path, metadata)
    published = find_published(source, path)
    told = metadata.architecture.backbone if metadata is not None else published.backbone if published else name
    if told != name:
        raise WeightsError(
            "E-WEIGHTS-056",
            f"holds the backbone {told}, not {name}",
            fix=f"--set backbone.name={told}, or other weights: nestseg weights list",
            path=path,
        )
    if isinstance(backbone, TimmBackbone) and not ours:
        load_timm_state(backbone, raw.state, path=path)
        return words
    try:
        found = raw.state if ours else recognise(raw.state, meta=raw.meta).state
    except WeightsError as error:
        raise error.at(path) from None
    heads = ("decode_head.", "auxiliary_head.")
    state = {name.removeprefix("backbone."): value for name, value in found.items() if not name.startswith(heads)}
    first = state.get("conv1.0.weight")
    if first is not None and first.shape[1] != backbone.in_channels:
        state["conv1.0.weight"] = adapt_first_convolution(first, backbone.in_channels)
        words += f", first convolution adapted from {first.shape[1]} to {backbone.in_channels} channels"
    load_strictly(
        backbone,
        state,
        path=path,
        fix="check that backbone.name is the network of this file and backbone.norm is batch or frozen_batch, or start "
        "from random weights with backbone.pretrained=none",
    )
    return words


def find_published(source: str | Path, path: Path) -> PublishedWeights | None:
    """Return the entry of the registry for a file; None where there is none.

    Args:
        source: What the file was named by; a published name is its own entry, whether or not its hash is known.
        path: The file. By any other name its hash decides, as far as digits of it are known.
    """
    registry = load_registry()
    if _is_published_name(source):
        return registry[str(source)]
    digest = sha256_of(path)
    return next((entry for entry in registry.values() if entry.sha256 and digest.startswith(entry.sha256)), None)


def _is_published_name(source: str | Path) -> bool:
    text = str(source)
    return not text.startswith("hf:") and bool(_PUBLISHED_NAME.fullmatch(text)) and not Path(text).exists()


def _not_published(published: PublishedWeights, reason: str, *, path: Path) -> WeightsError:
    return WeightsError(
        "E-WEIGHTS-055",
        f"is not what {published.name} is: {reason}",
        fix=f"fetch it from its own address: {published.fetch_command} --from {published.urls[0]}",
        path=path,
    )


def _describe(found: Recognised, published: PublishedWeights | None, *, path: Path) -> ModelMetadata:
    assert found.architecture is not None
    assert found.taxonomy is not None
    source, taxonomy = f"{path.name}, {found.layout.name} layout", found.taxonomy
    scores: tuple[Score, ...] = ()
    if published is not None:
        source = f"{published.project}, {published.name}"
    if published is not None and published.dataset is not None:
        taxonomy = DATASETS[published.dataset].taxonomy
    # the number is that of the network which was published, not of its weights at another stride
    same = published is not None and published.output_stride == found.architecture.output_stride
    if published is not None and same and published.value is not None and published.dataset is not None:
        scores = (
            Score(
                dataset=published.dataset,
                split="val",
                mean_iou=published.value,
                protocol=f"{published.metric}, as published by {published.project}",
            ),
        )
    return ModelMetadata(
        architecture=found.architecture,
        dataset=taxonomy.name,
        classes=taxonomy.classes,
        palette=taxonomy.palette,
        base_size=None,
        logits_resizes=published.logits_resizes if published else found.layout.logits_resizes,
        recipe=None,
        step=0,
        versions={"nestseg": __version__, "torch": torch.__version__},
        scores=scores,
        source=source,
        licence=published.licence if published else None,
        data_licence=published.data_licence if published else None,
    )
