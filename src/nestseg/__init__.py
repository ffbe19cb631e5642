"""Semantic segmentation around ResNeSt backbones: FCN, PSPNet, DeepLabV3 and DeepLabV3+.

The names below are the public API. They are imported when first used, so that ``import nestseg`` and the recipes stay
free of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nestseg.version import __version__

if TYPE_CHECKING:
    from nestseg.build import load_model, load_predictor
    from nestseg.core.errors import NestsegError
    from nestseg.core.taxonomy import Taxonomy
    from nestseg.core.types import Sample, SegLogits
    from nestseg.data.opening import open_dataset
    from nestseg.engine.evaluate_model import evaluate_model
    from nestseg.engine.predict import predict_files
    from nestseg.engine.train import train
    from nestseg.inference.predictor import Prediction, Predictor
    from nestseg.models.segmenter import Segmenter, create_model
    from nestseg.recipe import Recipe
    from nestseg.recipes import resolve_recipe

_HOME = {
    "NestsegError": "nestseg.core.errors",
    "Prediction": "nestseg.inference.predictor",
    "Predictor": "nestseg.inference.predictor",
    "Recipe": "nestseg.recipe",
    "Sample": "nestseg.core.types",
    "SegLogits": "nestseg.core.types",
    "Segmenter": "nestseg.models.segmenter",
    "Taxonomy": "nestseg.core.taxonomy",
    "create_model": "nestseg.models.segmenter",
    "evaluate_model": "nestseg.engine.evaluate_model",
    "load_model": "nestseg.build",
    "load_predictor": "nestseg.build",
    "open_dataset": "nestseg.data.opening",
    "predict_files": "nestseg.engine.predict",
    "resolve_recipe": "nestseg.recipes",
    "train": "nestseg.engine.train",
}

__all__ = [
    "NestsegError",
    "Prediction",
    "Predictor",
    "Recipe",
    "Sample",
    "SegLogits",
    "Segmenter",
    "Taxonomy",
    "__version__",
    "create_model",
    "evaluate_model",
    "load_model",
    "load_predictor",
    "open_dataset",
    "predict_files",
    "resolve_recipe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'nestseg' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
