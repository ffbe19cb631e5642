"""From words to things: recipe -> model, data, optimizer, predictor; model file -> model, predictor.

The only module that knows both the recipe's words and the classes behind them.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestseg import optim
from nestseg.core.disk import sha256_of
from nestseg.core.errors import RecipeError, RunError
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import OutputStride
from nestseg.data.augment import (
    ColourJitter,
    CopyPaste,
    CutMix,
    GaussianBlur,
    MixUp,
    RandomErasing,
    RandomPartner,
    Rotation,
    find_class_ids,
    make_torchvision_transform,
)
from nestseg.data.counts import load_counts
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.datasets import DATASETS
from nestseg.data.loader import BatchPlan, RareClassSampling
from nestseg.data.opening import open_custom, open_dataset
from nestseg.data.spec import DatasetSpec
from nestseg.data.stats import class_weights
from nestseg.data.transforms import TrainTransform
from nestseg.inference.modes import Mode, MultiScale, Slide, Whole
from nestseg.inference.predictor import Predictor
from nestseg.losses.criterion import Criterion, LossTerm
from nestseg.models.resnest import ResNeSt
from nestseg.models.segmenter import Segmenter, create_model
from nestseg.models.timm_backbone import TIMM_PREFIX, TimmBackbone, get_timm_normalization
from nestseg.recipe import EvaluationSection, PhotometricSection, Recipe, validate_evaluation
from nestseg.recipes import change_evaluation, evaluation_base_size
from nestseg.store.files import load_strictly
from nestseg.store.metadata import Architecture, ModelMetadata, Score
from nestseg.version import __version__
from nestseg.weights.model import FoundModel, load_backbone, read_model
from nestseg.weights.registry import load_registry
from nestseg.weights.transfer import TransferWarning, transfer_weights

BEST_FILE = "best.safetensors"

_EFFECTS: dict[str, Callable[..., object]] = {
    "colour_jitter": ColourJitter,
    "blur": GaussianBlur,
    "cut_mix": CutMix,
    "mix_up": MixUp,
    "rotation": Rotation,
    "erasing": RandomErasing,
}
"""Sections of the augmentation whose fields are the effect's own; copy_paste has names of classes."""


def describe_architecture(recipe: Recipe) -> Architecture:
    """Return the network that a recipe means."""
    return Architecture(
        segmentor=recipe.segmentor,
        backbone=recipe.backbone.name,
        num_classes=taxonomy_of(recipe).num_classes,
        output_stride=recipe.output_stride,
        dilation_variant=recipe.backbone.dilation_variant,
        auxiliary=recipe.auxiliary_head.enabled,
        mean=recipe.data.mean,
        std=recipe.data.std,
        backbone_norm=recipe.backbone.norm,
        head_norm=recipe.head.norm,
        frozen_stages=recipe.backbone.frozen_stages,
        head_channels=recipe.head.channels,
        auxiliary_channels=recipe.auxiliary_head.channels if recipe.auxiliary_head.enabled else None,
        dropout=recipe.head.dropout,
        align_corners=recipe.head.align_corners,
        num_convs=recipe.head.num_convs,
        concat_input=recipe.head.concat_input,
        pool_scales=recipe.head.pool_scales,
        atrous_rates=recipe.head.atrous_rates,
        fusion=recipe.head.fusion,
        shortcut_channels=recipe.head.shortcut_channels,
    )


def build_model(recipe: Recipe) -> Segmenter:
    """Build a recipe's network with weights drawn from torch's generator.

    Raises:
        ModelError: If the recipe asks for a network that cannot be.
    """
    model = create_model(**dict(describe_architecture(recipe)))
    if recipe.backbone.zero_init_residual:
        assert isinstance(model.backbone, ResNeSt), "the recipe allows it for ResNeSt only"
        model.backbone.zero_residuals()
    return model


def initialise_model(model: Segmenter, recipe: Recipe) -> str | None:
    """Give a network the weights that its recipe starts from.

    Args:
        model: What `build_model` made of the recipe; changed in place.
        recipe: Its ``init`` or ``backbone.pretrained`` says which weights.

    Returns:
        What was taken from where, in words; None for a start from random weights.

    Raises:
        WeightsError: If the weights are not there (with the command that fetches them), cannot be read or do not fit.

    Warns:
        TransferWarning: See `transfer_weights`; and if timm's weights were trained with another normalisation.
    """
    if recipe.init.model is not None:
        found = read_model(recipe.init.model)
        transfer = transfer_weights(
            model,
            found.state,
            source=found.metadata,
            classes=taxonomy_of(recipe).classes,
            class_map=recipe.init.class_map,
            path=found.path,
        )
        return f"{found.path} (sha256 {sha256_of(found.path)[:8]}): {transfer}"
    if recipe.backbone.pretrained == "none":
        return None
    if isinstance(model.backbone, TimmBackbone):
        _warn_of_other_normalization(recipe)
    return load_backbone(model.backbone, recipe.backbone.pretrained, name=recipe.backbone.name)


def _warn_of_other_normalization(recipe: Recipe) -> None:
    spec = recipe.backbone.pretrained
    if not spec.startswith(TIMM_PREFIX):
        return
    theirs = get_timm_normalization(spec)
    if theirs != (recipe.data.mean, recipe.data.std):
        mean, std = (",".join(f"{value:g}" for value in values) for values in theirs)
        warnings.warn(
            f'{spec} was trained with another normalisation; --set "data.mean=[{mean}]" --set "data.std=[{std}]"',
            TransferWarning,
            stacklevel=3,
        )


def build_dataset(recipe: Recipe, root: Path | None, *, split: str) -> SegmentationDataset:
    """Open one split of a recipe's data set.

    Raises:
        DataError: If the folder does not have the expected layout.
    """
    return _open(recipe.data.dataset, recipe.data.spec, root, split=split)


def open_dataset_of(metadata: ModelMetadata, root: Path | None, *, split: str) -> SegmentationDataset:
    """Open one split of the data set that a model was trained for.

    Raises:
        DataError: If the folder does not have the expected layout.
    """
    spec = (metadata.recipe or {}).get("data", {}).get("spec")
    return _open(metadata.dataset, None if spec is None else DatasetSpec.model_validate(spec), root, split=split)


def _open(name: str, spec: DatasetSpec | None, root: Path | None, *, split: str) -> SegmentationDataset:
    return open_dataset(name, root, split) if spec is None else open_custom(spec, root, split)


def build_transform(recipe: Recipe, dataset: SegmentationDataset) -> TrainTransform:
    """Return the augmentation of a recipe; counts the classes of each picture where copy-paste looks for rare ones.

    Raises:
        RecipeError: If an effect makes no sense, is not for such images, or pastes classes that no picture shows.
        DataError: If a sample that has to be counted cannot be read.
    """
    augmentation, data = recipe.augmentation, recipe.data
    photometric = augmentation.photometric or PhotometricSection(probability=0)
    effects: dict[str, Any] = {
        name: effect(**dict(section))
        for name, effect in _EFFECTS.items()
        if (section := getattr(augmentation, name)) is not None
    }
    if augmentation.copy_paste is not None:
        classes = find_class_ids(augmentation.copy_paste.classes, dataset.taxonomy)
        counts = load_counts(dataset)
        weights = np.zeros(len(dataset))
        weights[counts.image_of_entry[np.isin(counts.classes, classes)]] = 1
        if not weights.any():
            absent = ", ".join(augmentation.copy_paste.classes)
            raise RecipeError(
                "E-RECIPE-071",
                f"no picture of the {len(dataset)} that are trained on shows {absent}",
                fix="name classes that occur, see: nestseg data stats; or set augmentation.copy_paste=null",
                path="augmentation.copy_paste.classes",
            )
        effects["copy_paste"] = CopyPaste(classes=classes, probability=augmentation.copy_paste.probability)
        effects["paste_partner"] = RandomPartner(dataset, tuple(weights.tolist()))
    return TrainTransform(
        base_size=augmentation.base_size,
        crop_size=recipe.data.crop_size,
        scale_range=augmentation.scale_range,
        max_class_share=augmentation.max_class_share,
        crop_tries=augmentation.crop_tries,
        flip_probability=augmentation.flip_probability,
        photometric_probability=photometric.probability,
        brightness=photometric.brightness,
        contrast=photometric.contrast,
        saturation=photometric.saturation,
        hue=photometric.hue,
        pad_colour=data.mean if data.image_dtype == "float32" else tuple(map(round, data.mean)),
        pad_where=augmentation.padding,
        extra=tuple(
            make_torchvision_transform(str(given.get("name")), {key: given[key] for key in given if key != "name"})
            for given in augmentation.torchvision
        ),
        partner=RandomPartner(dataset),
        image_dtype=data.image_dtype,
        **effects,
    )


def build_plan(recipe: Recipe, dataset: SegmentationDataset) -> BatchPlan:
    """Return which samples make up which step; counts the classes of each picture where rare ones are drawn more often.

    Raises:
        DataError: If a sample that has to be counted cannot be read.
    """
    rare, sampling = recipe.data.rare_class_sampling, None
    if rare is not None:
        sampling = RareClassSampling.from_counts(
            load_counts(dataset), temperature=rare.temperature, min_pixels=rare.min_pixels, tries=rare.tries
        )
    return BatchPlan(num_samples=len(dataset), batch_size=recipe.data.batch_size, seed=recipe.seed, sampling=sampling)


def fill_class_weights(recipe: Recipe, dataset: SegmentationDataset) -> Recipe:
    """Return the recipe with numbers for ``loss.class_weights``: as given, or by its rule from the training split.

    Raises:
        DataError: If a sample that has to be counted cannot be read.
        RecipeError: If there is another number of weights than classes.
    """
    given = recipe.loss.class_weights
    if given == "none":
        return recipe
    if isinstance(given, str):
        numbers = class_weights(load_counts(dataset), given)
        return recipe.model_copy(update={"loss": recipe.loss.model_copy(update={"class_weights": numbers})})
    if len(given) != dataset.taxonomy.num_classes:
        raise RecipeError(
            "E-RECIPE-070",
            f"loss.class_weights has {len(given)} numbers for {dataset.taxonomy.num_classes} classes",
            fix="give one number a class, or median_frequency, enet or none",
        )
    return recipe


def build_criterion(recipe: Recipe, *, device: torch.device | str) -> Criterion:
    """Return the loss of a recipe whose class weights are numbers, see `fill_class_weights`."""
    loss = recipe.loss
    assert loss.class_weights == "none" or not isinstance(loss.class_weights, str), "fill_class_weights comes first"
    weights = None if isinstance(loss.class_weights, str) else torch.tensor(loss.class_weights, device=device)
    return Criterion(
        terms=tuple(
            LossTerm(term.name, term.weight, term.model_dump(exclude={"name", "weight"})) for term in loss.terms
        ),
        auxiliary_weight=recipe.auxiliary_head.loss_weight,
        class_weights=weights,
        align_corners=recipe.head.align_corners,
    )


def build_optimizer(recipe: Recipe, model: Segmenter, *, device: torch.device | str = "cpu") -> torch.optim.Optimizer:
    """Return the optimizer of a recipe for a model's trainable parameters, in one kernel where a GPU has it.

    Raises:
        ModelError: If every parameter is frozen.
        RecipeError: For an option that the optimizer does not have.
    """
    wanted = recipe.optimizer
    # a dampened first step is not the one from momentum of zero, which a fused one begins with, see `fill_momentum`
    fused = torch.device(device).type == "cuda" and wanted.name in optim.FUSED and not wanted.options.get("dampening")
    return optim.build_optimizer(
        model,
        name=wanted.name,
        lr=wanted.lr,
        momentum=wanted.momentum,
        weight_decay=wanted.weight_decay,
        nesterov=wanted.nesterov,
        head_lr_multiplier=wanted.head_lr_multiplier,
        decay_norm_and_bias=wanted.decay_norm_and_bias,
        options=wanted.options,
        fused=fused or None,
    )


def build_average(recipe: Recipe, model: Segmenter) -> optim.WeightAverage | None:
    """Return the moving average of a recipe, begun at the model's weights now; None for a recipe without."""
    return None if recipe.ema is None else optim.WeightAverage(model, recipe.ema.decay)


def describe_model(recipe: Recipe, *, step: int, scores: tuple[Score, ...] = ()) -> ModelMetadata:
    """Return what must travel with the weights of a run after ``step`` steps."""
    taxonomy = taxonomy_of(recipe)
    return ModelMetadata(
        architecture=describe_architecture(recipe),
        dataset=taxonomy.name,
        classes=taxonomy.classes,
        palette=taxonomy.palette,
        base_size=recipe.evaluation.base_size,
        logits_resizes=recipe.evaluation.logits_resizes,
        image_dtype=recipe.data.image_dtype,
        recipe=recipe.model_dump(mode="json"),
        step=step,
        versions=versions(),
        scores=scores,
        data_licence=describe_data_terms(recipe),
    )


def describe_data_terms(recipe: Recipe) -> str:
    """Return the terms of all data that a run's weights have seen, those of its start included."""
    spec = recipe.data.spec
    terms = [DATASETS[recipe.data.dataset].terms if spec is None else spec.licence]
    start = recipe.init.model or recipe.backbone.pretrained
    published = load_registry().get(start)
    if published is not None:
        terms.append(published.data_licence)
    elif start != "none":
        terms.append(f"what {start} was trained on")
    return "; ".join(terms)


def taxonomy_of(recipe: Recipe) -> Taxonomy:
    """Return names and colours of the classes that a recipe trains."""
    spec = recipe.data.spec
    return DATASETS[recipe.data.dataset].taxonomy if spec is None else spec.taxonomy


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    return {"nestseg": __version__, "torch": torch.__version__, "python": platform.python_version()}


def evaluation_of(metadata: ModelMetadata, overrides: Sequence[str] = ()) -> EvaluationSection:
    """Return how a model is scored: as its recipe says, else whole images at the size of its data set's protocol.

    Args:
        metadata: What the model means.
        overrides: ``"evaluation.field=value"``, see `change_evaluation`.

    Raises:
        RecipeError: If an override makes no sense.
    """
    known = (metadata.recipe or {}).get("evaluation", {})
    # those of the metadata are what predictors went by before a recipe said more
    values = {**known, "base_size": metadata.base_size, "logits_resizes": metadata.logits_resizes}
    return change_evaluation(validate_evaluation(values, source="model"), overrides, source="--set")


def build_mode(evaluation: EvaluationSection) -> Mode:
    """Return the way from an image to logits that a recipe means: windows inside scales, as is published."""
    mode: Mode = Whole()
    if evaluation.window is not None:
        mode = Slide(window=evaluation.window, stride=evaluation.window_stride, blend=evaluation.blend)
    if evaluation.scales != (1.0,) or evaluation.flip:
        mode = MultiScale(scales=evaluation.scales, flip=evaluation.flip, average=evaluation.average, inner=mode)
    return mode


def build_predictor(model: Segmenter, metadata: ModelMetadata, *, overrides: Sequence[str] = ()) -> Predictor:
    """Wrap a model and what it means, on whatever device it is; it is put into evaluation mode.

    Args:
        model: The network.
        metadata: What it means, and how it is scored.
        overrides: See `evaluation_of`.

    Raises:
        RecipeError: If an override makes no sense.
    """
    evaluation = evaluation_of(metadata, overrides)
    model.eval()
    return Predictor(
        lambda image: model(image).main,
        metadata.taxonomy,
        base_size=evaluation.base_size,
        logits_resizes=evaluation.logits_resizes,
        mode=build_mode(evaluation),
        align_corners=metadata.architecture.align_corners,
        in_channels=len(metadata.architecture.mean),
        image_dtype=metadata.image_dtype,
        device=next(model.parameters()).device,
    )


def load_model(
    source: str | Path,
    *,
    device: str = "cpu",
    num_classes: int | None = None,
    replace_classifier: bool = False,
    layout: str = "auto",
    backbone: str | None = None,
    output_stride: OutputStride | None = None,
) -> Segmenter:
    """Load a trained network, in evaluation mode.

    Args:
        source: A run folder, a file in any known layout, a published name such as ``ssseg:fcn_resnest101-d8_voc``, or
            ``hf:owner/name@revision``.
        device: ``cpu``, ``cuda``, ``mps`` or ``auto``.
        num_classes: The number of classes that the caller counts on; None takes what the file has.
        replace_classifier: If the file has another number of classes, start classifiers for ``num_classes`` afresh.
        layout: ``auto`` recognises it by its keys; else ``official``, ``timm``, ``mmseg``, ``ssseg`` or ``encoding``.
        backbone: The network, where the keys fit two.
        output_stride: Of the network, which weights do not show; None takes what the file or the registry says, or 8.

    Raises:
        RunError: If there is no such file.
        WeightsError: If it cannot be read, is of no known layout, or has another number of classes.
    """
    found = find_model(source, layout=layout, backbone=backbone, output_stride=output_stride)
    found = found.with_classes(num_classes, replace_classifier=replace_classifier)
    return _make_model(found, device=device)


def load_predictor(source: str | Path, *, device: str = "auto", overrides: Sequence[str] = ()) -> Predictor:
    """Load a trained network, ready to label images.

    Args:
        source: See `load_model`.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``mps``.
        overrides: Changes of how the model is scored, such as ``"evaluation.flip=true"``.

    Raises:
        RunError: If there is no such file.
        WeightsError: If it cannot be read.
        RecipeError: If an override makes no sense.
    """
    return open_predictor(source, device=device, overrides=overrides)[0]


def open_predictor(source: str | Path, *, device: str, overrides: Sequence[str] = ()) -> tuple[Predictor, FoundModel]:
    """Load a trained network, and say which file it was and what it means; arguments and errors as `load_predictor`."""
    found = find_model(source)
    return build_predictor(_make_model(found, device=device), found.metadata, overrides=overrides), found


def find_model(
    source: str | Path,
    *,
    layout: str = "auto",
    backbone: str | None = None,
    output_stride: OutputStride | None = None,
) -> FoundModel:
    """Read a whole model with the image size of its data set's published protocol, where a file does not say it.

    Arguments and errors as `nestseg.weights.model.read_model`.
    """
    found = read_model(source, layout=layout, backbone=backbone, output_stride=output_stride)
    if found.recognised is None:
        return found
    base_size = evaluation_base_size(found.metadata.dataset)
    return found._replace(metadata=found.metadata.model_copy(update={"base_size": base_size}))


def _make_model(found: FoundModel, *, device: str) -> Segmenter:
    model = create_model(**dict(found.metadata.architecture))
    load_strictly(
        model, found.state, path=found.path, fix="write the file again, or use the version of nestseg that wrote it"
    )
    model.metadata = found.metadata
    return model.to(choose_device(device)).eval()


def choose_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``mps`` into a device.

    Raises:
        RunError: If there is no such device, or not here.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name):
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise RunError("E-RUN-003", f"device {name} is not available here", fix=f"choose from: auto, {there}")
    return torch.device(name)
