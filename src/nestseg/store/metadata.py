"""What travels with the weights: the network they are for, its classes, where they come from. No torch in here."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from nestseg.core.taxonomy import Colour, Taxonomy
from nestseg.core.types import DilationVariant, Fusion, ImageDtype, Norm, OutputStride, Segmentor


class Architecture(BaseModel):
    """The arguments of `nestseg.create_model` that built a network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    segmentor: Segmentor
    backbone: str
    num_classes: int
    output_stride: OutputStride
    dilation_variant: DilationVariant
    auxiliary: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    backbone_norm: Norm
    head_norm: Norm
    frozen_stages: int
    head_channels: int
    auxiliary_channels: int | None
    dropout: float
    align_corners: bool
    num_convs: int | None = None
    concat_input: bool
    pool_scales: tuple[int, ...] | None
    atrous_rates: tuple[int, ...] | None
    fusion: Fusion | None = None
    shortcut_channels: int | None


class Score(BaseModel):
    """One measured result of a model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    split: str
    mean_iou: float
    """In [0, 1]."""
    num_images: int | None = None
    protocol: str
    """How it was measured, in words, such as ``single scale, whole image``."""


class ModelMetadata(BaseModel):
    """What the weights of a model file mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    architecture: Architecture
    dataset: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    base_size: tuple[int, int] | None
    """(short, long) that an image is resized to before the network, keeping its ratio; None leaves it as it is."""
    logits_resizes: Literal[1, 2] = 1
    """1: logits go straight to the image's own size. 2: to the network's input size first (mmsegmentation)."""
    image_dtype: ImageDtype = "uint8"
    """Type of an image's values that the weights were trained on; the length of the mean tells its channels."""
    recipe: dict[str, Any] | None
    """The run's recipe as plain values; None for a model that no recipe of ours made."""
    step: int
    versions: dict[str, str]
    scores: tuple[Score, ...] = ()
    source: str | None = None
    """Where weights come from that were not trained here, in words."""
    licence: str | None = None
    """Licence of the weights; None when nobody has stated it."""
    data_licence: str | None = None
    """Terms of the data that the weights were trained on."""

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if not len(self.classes) == len(self.palette) == self.architecture.num_classes:
            raise ValueError(
                f"{len(self.classes)} class names and {len(self.palette)} colours "
                f"for a network of {self.architecture.num_classes} classes"
            )
        return self

    @property
    def taxonomy(self) -> Taxonomy:
        """Names and colours of the classes."""
        return Taxonomy(name=self.dataset, classes=self.classes, palette=self.palette)
