"""From words to things: recipe -> model, data, optimizer, predictor; model file -> model, predictor.

The only module that knows both the recipe's words and the classes behind them.
"""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from nestseg.core.errors import RunError
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.datasets import DATASETS, open_dataset
from nestseg.data.transforms import TrainTransform
from nestseg.inference.predictor import Predictor
from nestseg.models.segmenter import Segmenter, create_model
from nestseg.optim import build_adamw, build_sgd
from nestseg.recipe import PhotometricSection, Recipe
from nestseg.version import __version__
from nestseg.weights.files import Architecture, ModelMetadata, load_strictly, read_model_file
from nestseg.weights.official import load_official_backbone

MODEL_FILE = "model.safetensors"
BEST_FILE = "best.safetensors"


def describe_architecture(recipe: Recipe) -> Architecture:
    """Return the network that a recipe means."""
    return Architecture(
        segmentor=recipe.segmentor,
        backbone=recipe.backbone.name,
        num_classes=DATASETS[recipe.data.dataset].taxonomy.num_classes,
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
        concat_input=recipe.head.concat_input,
        pool_scales=recipe.head.pool_scales,
        atrous_rates=recipe.head.atrous_rates,
        shortcut_channels=recipe.head.shortcut_channels,
    )


def build_model(recipe: Recipe, *, pretrained: bool = True) -> Segmenter:
    """Build a recipe's network: pretrained backbone where the recipe names one, the rest drawn from torch's generator.

    Args:
        recipe: What to build.
        pretrained: Whether to read ``backbone.pretrained``; a network that is loaded afterwards does not need it.

    Raises:
        WeightsError: If ``backbone.pretrained`` cannot be read or does not fit.
        ModelError: If the recipe asks for a network that cannot be.
    """
    model = create_model(**dict(describe_architecture(recipe)))
    if recipe.backbone.zero_init_residual:
        model.backbone.zero_residuals()
    if pretrained and recipe.backbone.pretrained != "none":
        load_official_backbone(model.backbone, Path(recipe.backbone.pretrained))
    return model


def build_dataset(recipe: Recipe, root: Path | None, *, split: str) -> SegmentationDataset:
    """Open one split of a recipe's data set.

    Raises:
        DataError: If the folder does not have the expected layout.
    """
    return open_dataset(recipe.data.dataset, root, split)


def build_transform(recipe: Recipe) -> TrainTransform:
    """Return the augmentation of a recipe."""
    augmentation = recipe.augmentation
    photometric = augmentation.photometric or PhotometricSection(probability=0)
    red, green, blue = (round(value) for value in recipe.data.mean)
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
        pad_colour=(red, green, blue),
        pad_where=augmentation.padding,
    )


def build_optimizer(recipe: Recipe, model: Segmenter) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe for a model's trainable parameters.

    Raises:
        ModelError: If every parameter is frozen.
    """
    wanted = recipe.optimizer
    if wanted.name == "adamw":
        return build_adamw(
            model,
            lr=wanted.lr,
            beta1=wanted.momentum,
            weight_decay=wanted.weight_decay,
            head_lr_multiplier=wanted.head_lr_multiplier,
            decay_norm_and_bias=wanted.decay_norm_and_bias,
        )
    return build_sgd(
        model,
        lr=wanted.lr,
        momentum=wanted.momentum,
        weight_decay=wanted.weight_decay,
        nesterov=wanted.nesterov,
        head_lr_multiplier=wanted.head_lr_multiplier,
        decay_norm_and_bias=wanted.decay_norm_and_bias,
    )


def describe_model(recipe: Recipe, *, step: int) -> ModelMetadata:
    """Return what must travel with the weights of a run after ``step`` steps."""
    taxonomy = DATASETS[recipe.data.dataset].taxonomy
    return ModelMetadata(
        architecture=describe_architecture(recipe),
        dataset=taxonomy.name,
        classes=taxonomy.classes,
        palette=taxonomy.palette,
        base_size=recipe.evaluation.base_size,
        recipe=recipe.model_dump(mode="json"),
        step=step,
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    return {"nestseg": __version__, "torch": torch.__version__, "python": platform.python_version()}


def build_predictor(model: Segmenter, metadata: ModelMetadata) -> Predictor:
    """Wrap a model and what it means, on whatever device it is; it is put into evaluation mode."""
    model.eval()
    return Predictor(
        lambda image: model(image).main,
        metadata.taxonomy,
        base_size=metadata.base_size,
        align_corners=metadata.architecture.align_corners,
        device=next(model.parameters()).device,
    )


def load_model(path: str | Path, *, device: str = "cpu") -> Segmenter:
    """Load a trained network, in evaluation mode.

    Args:
        path: A run folder or a model file.
        device: ``cpu``, ``cuda``, ``mps`` or ``auto``.

    Raises:
        RunError: If the folder holds no model.
        WeightsError: If the file cannot be read.
    """
    return open_model(path, device=device)[0]


def load_predictor(path: str | Path, *, device: str = "auto") -> Predictor:
    """Load a trained network, ready to label images.

    Args:
        path: A run folder or a model file.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``mps``.

    Raises:
        RunError: If the folder holds no model.
        WeightsError: If the file cannot be read.
    """
    return build_predictor(*open_model(path, device=device))


def open_model(path: str | Path, *, device: str) -> tuple[Segmenter, ModelMetadata]:
    """Load a trained network and what it means; arguments and errors as `load_model`."""
    file = find_model_file(Path(path))
    state, metadata = read_model_file(file)
    model = create_model(**dict(metadata.architecture))
    load_strictly(model, state, path=file, fix="write the file again, or use the version of nestseg that wrote it")
    return model.to(choose_device(device)).eval(), metadata


def find_model_file(path: Path) -> Path:
    """Return the model file that a run folder or a path means.

    Raises:
        RunError: If there is none.
    """
    if path.is_file():
        return path
    if not path.exists():
        raise RunError("E-RUN-001", "no such run folder or model file", fix="check the path", path=path)
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
