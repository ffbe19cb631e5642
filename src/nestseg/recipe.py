"""The typed recipe of a run: every number that decides what is trained and how it is scored.

A recipe is data. It is printed by ``nestseg recipes show``, saved as ``RUN/recipe.yaml``, and read back to the same
recipe. Nothing here imports torch. Each field says in its description what it does; the same words are the help that
an error prints.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nestseg.core.errors import RecipeError, nearest
from nestseg.core.types import DilationVariant, Fusion, ImageDtype, Norm, OutputStride, Segmentor
from nestseg.data.spec import DatasetSpec

Positive = Annotated[int, Field(ge=1)]
SizeField = tuple[Positive, Positive]
Rgb = tuple[float, float, float]

OptimizerName = Literal[
    "sgd", "adamw", "adam", "nadam", "radam", "adamax", "adagrad", "adadelta", "adafactor", "rmsprop", "asgd"
]
"""Optimisers of torch that a recipe may name."""

_NO_MOMENTUM = ("adagrad", "adadelta", "adafactor", "asgd")
_PUBLISHED_MOMENTUM = 0.9

IMAGENET_MEAN: Rgb = (123.675, 116.28, 103.53)
IMAGENET_STD: Rgb = (58.395, 57.12, 57.375)


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class BackboneSection(Section):
    """Which ResNeSt, and where its weights come from."""

    name: str
    """A key of `nestseg.models.resnest.BACKBONES`, such as resnest101 or resnest50-fast-2s1x64d."""
    pretrained: str = "none"
    """Weights to start from: ``official:NAME``, a file in any known layout, ``hf:owner/name@revision``, or ``none``."""
    zero_init_residual: bool = False
    """Start every block as its shortcut; for training from random weights."""
    dilation_variant: DilationVariant = "plain"
    """Which of the three networks that share these weights is meant at output stride 8 and 16."""
    norm: Norm = "batch"
    """Normalisation of the backbone; frozen_batch keeps statistics and affine as loaded."""
    frozen_stages: Annotated[int, Field(ge=0, le=4)] = 0
    """0 trains everything, 1 freezes the stem and stage 1, ... 4 the whole backbone."""


class HeadSection(Section):
    """The decode head. Options that the chosen segmentor does not have must stay null."""

    channels: Positive = 512
    """Width of the head."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Probability of dropping a whole channel before the classifier."""
    norm: Norm = "batch"
    """Normalisation of the decode and auxiliary heads."""
    align_corners: bool = False
    """Bilinear convention inside the head and for its logits."""
    num_convs: Positive | None = None
    """FCN only: number of 3x3 convolutions; null means 2."""
    concat_input: bool = False
    """FCN only: also feed C5 to one more convolution, as mmsegmentation does."""
    pool_scales: tuple[Positive, ...] | None = None
    """PSPNet only: sides of the pooled grids; null means 1, 2, 3, 6."""
    atrous_rates: tuple[Positive, Positive, Positive] | None = None
    """DeepLabV3 and V3+ only; null means 12, 24, 36 at output stride 8, 6, 12, 18 at 16 and 3, 6, 9 at 32."""
    fusion: Fusion | None = None
    """DeepLabV3 and V3+ only: how ASPP's branches become one map; null means full, one 3x3 convolution."""
    shortcut_channels: Positive | None = None
    """DeepLabV3+ only: width of the C2 shortcut; null means 48."""


class AuxiliaryHeadSection(Section):
    """The auxiliary FCN head on C4, used in training only."""

    enabled: bool = True
    """Whether there is one."""
    channels: Positive = 512
    """Width; mmsegmentation's is 256."""
    loss_weight: Annotated[float, Field(ge=0)] = 0.4
    """Weight of its loss beside 1.0 for the decode head."""


class InitSection(Section):
    """A whole segmentation model to start from: fine-tuning."""

    model: str | None = None
    """A run folder, a model file in any known layout, a published name, or hf:owner/name@revision."""
    class_map: dict[str, str] = {}
    """Class of the data set -> class of that model, where their names differ; equal names need no entry."""


class RareClassSamplingSection(Section):
    """Draws a class first, rare ones more often, and then a picture and a crop that show it."""

    temperature: Annotated[float, Field(gt=0)] = 0.01
    """The smaller, the more often the rarest classes are drawn."""
    min_pixels: Positive = 3000
    """Pixels of the drawn class that a picture must have."""
    tries: Positive = 10
    """How often a crop is drawn anew that does not show enough of the class."""


class DataSection(Section):
    """What is trained on."""

    dataset: str
    """A key of `nestseg.data.datasets.DATASETS`; for your own data the name in ``spec``."""
    spec: DatasetSpec | None = None
    """Your own data set, as its file describes it; set by ``nestseg train --dataset FILE.yaml``."""
    train_split: str = "train"
    """Split that is trained on."""
    eval_split: str = "val"
    """Split that evaluation during training, and ``nestseg evaluate`` by default, score."""
    batch_size: Positive
    """Images a step, over all devices."""
    crop_size: SizeField
    """[height, width] of a training image."""
    rare_class_sampling: RareClassSamplingSection | None = None
    """How samples are drawn where classes are rare; null draws every picture once an epoch."""
    num_workers: Annotated[int, Field(ge=0)] = 4
    """Loader processes a device; the samples are the same for any number."""
    worker_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that a batch may take before the run stops and names the samples that were being read."""
    bad_samples: Literal["stop", "skip"] = "stop"
    """What a sample that cannot be read does: stop the run, or be replaced by another, which is counted."""
    in_channels: Positive = 3
    """Channels of an image: 3 is RGB; mean and std have as many numbers."""
    image_dtype: ImageDtype = "uint8"
    """Type of an image's values, as they are stored."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean a channel on the scale of image_dtype; the model normalises."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = IMAGENET_STD
    """Standard deviation a channel on the scale of image_dtype."""


class PhotometricSection(Section):
    """Photometric distortion of brightness, contrast, saturation and hue."""

    probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of each of the four."""
    brightness: Annotated[float, Field(ge=0, le=255)] = 32
    """Largest value added or subtracted, grey levels."""
    contrast: tuple[float, float] = (0.5, 1.5)
    """Range of the factor about zero."""
    saturation: tuple[float, float] = (0.5, 1.5)
    """Range of the factor on S of HSV."""
    hue: Annotated[int, Field(ge=0, le=90)] = 18
    """Largest shift on OpenCV's 0-179 hue scale (2 degrees a unit)."""


Probability = Annotated[float, Field(ge=0, le=1)]


class ColourJitterSection(Section):
    """Brightness, contrast, saturation and hue in random order, as torchvision's ColorJitter; for 8-bit RGB."""

    probability: Probability = 0.5
    """Probability of jittering at all."""
    brightness: Probability = 0.4
    """The factor is within so much of 1."""
    contrast: Probability = 0.4
    """The factor about the mean of the grey picture is within so much of 1."""
    saturation: Probability = 0.4
    """The factor about each pixel's grey is within so much of 1."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Largest shift, in turns of the colour wheel."""


class BlurSection(Section):
    """Gaussian blur."""

    probability: Probability = 0.5
    """Probability of blurring at all."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the standard deviation in pixels."""


class RotationSection(Section):
    """Rotation about the centre of the crop; what it uncovers is the mean colour and ignored."""

    probability: Probability = 0.5
    """Probability of turning at all."""
    degrees: Annotated[float, Field(ge=0, le=180)] = 10
    """Largest angle, either way."""


class ErasingSection(Section):
    """A random rectangle becomes the mean colour and ignored."""

    probability: Probability = 0.5
    """Probability of covering at all."""
    area: tuple[float, float] = (0.02, 0.2)
    """Range of its share of the crop."""
    aspect: tuple[float, float] = (0.3, 3.3)
    """Range of height / width."""


class CopyPasteSection(Section):
    """Pastes the pixels of some classes from another sample, whose picture shows one of them."""

    classes: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of the classes, the rare ones."""
    probability: Probability = 0.5
    """Probability of pasting at all."""


class CutMixSection(Section):
    """Replaces a rectangle by what another sample has there, labels included."""

    alpha: Annotated[float, Field(gt=0)] = 1.0
    """The share that stays is drawn from Beta(alpha, alpha)."""
    probability: Probability = 0.5
    """Probability of cutting at all."""


class MixUpSection(Section):
    """Lays another sample's picture over this one, more weakly; the labels stay."""

    alpha: Annotated[float, Field(gt=0)] = 0.2
    """The share of the stronger picture is drawn from Beta(alpha, alpha), folded to at least 0.5."""
    probability: Probability = 0.5
    """Probability of mixing at all."""


class AugmentationSection(Section):
    """Random resize, crop, flip, photometric distortion, colour jitter, blur, padding, then mixing and covering."""

    base_size: SizeField
    """[short, long] side that a factor of 1 resizes an image to, keeping its ratio."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Range of the uniform resize factor."""
    max_class_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    """A crop in which one class covers more of the non-ignored pixels is drawn again."""
    crop_tries: Positive = 10
    """How many crops are tried."""
    flip_probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of a horizontal flip."""
    photometric: PhotometricSection | None = PhotometricSection()
    """null turns it off."""
    padding: Literal["centre", "bottom_right"] = "centre"
    """Where an image smaller than the crop lies in it; the rest is the mean colour and ignored."""
    colour_jitter: ColourJitterSection | None = None
    """null is off."""
    blur: BlurSection | None = None
    """null is off."""
    copy_paste: CopyPasteSection | None = None
    """null is off."""
    cut_mix: CutMixSection | None = None
    """null is off."""
    mix_up: MixUpSection | None = None
    """null is off."""
    rotation: RotationSection | None = None
    """null is off."""
    torchvision: tuple[dict[str, str | bool | int | float | tuple[float, ...] | None], ...] = ()
    """Transforms of torchvision by an allow-listed name: [{name: RandomSolarize, threshold: 128, p: 0.2}]."""
    erasing: ErasingSection | None = None
    """null is off."""


class OptimizerSection(Section):
    """How gradients become steps."""

    name: OptimizerName = "sgd"
    """The optimiser; sgd is the published one."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate at step 0."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = _PUBLISHED_MOMENTUM
    """Momentum of sgd and rmsprop, beta1 of adam, adamw, nadam, radam and adamax; unused by the others."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """L2 penalty added to the gradient; decoupled decay for adamw and adafactor."""
    options: dict[str, bool | int | float | tuple[float, ...]] = {}
    """More arguments of that class of torch.optim, such as {eps: 1.0e-6, amsgrad: true}."""
    nesterov: bool = False
    """Nesterov momentum; sgd only."""
    head_lr_multiplier: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the lr of the decode and auxiliary heads."""
    decay_norm_and_bias: bool = True
    """Whether weight decay also acts on norms and biases, as in the published runs."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Gradients are scaled down to this norm over all parameters where theirs is larger; null leaves them."""


class LossTermSection(Section):
    """One loss of the sum that is minimised."""

    name: str
    """Which loss."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Its factor."""


class CrossEntropySection(LossTermSection):
    """Cross-entropy over the labelled pixels, with class weights."""

    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a pixel's target that is spread evenly over all classes."""


class OhemSection(LossTermSection):
    """Cross-entropy over the hardest pixels, with class weights."""

    name: Literal["ohem"] = "ohem"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Pixels whose class has at most this probability are hard."""
    min_share: Annotated[float, Field(gt=0, le=1)] = 0.0625
    """The least share of the labelled pixels that counts, the hardest."""


class FocalSection(LossTermSection):
    """Cross-entropy that counts sure pixels less, with class weights."""

    name: Literal["focal"] = "focal"
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """The larger, the less sure pixels count; 0 is cross-entropy."""


class DiceSection(LossTermSection):
    """One minus the overlap of each class; class weights do not act on it."""

    name: Literal["dice"] = "dice"


class TverskySection(LossTermSection):
    """Dice with a price for each kind of error; class weights do not act on it."""

    name: Literal["tversky"] = "tversky"
    alpha: Annotated[float, Field(gt=0)] = 0.3
    """What a false positive costs."""
    beta: Annotated[float, Field(gt=0)] = 0.7
    """What a false negative costs."""
    exponent: Annotated[float, Field(gt=0)] = 1.0
    """Power of each class's loss; 0.75 is the focal Tversky loss."""


class LovaszSection(LossTermSection):
    """Lovasz-softmax, a surrogate of the IoU; class weights do not act on it."""

    name: Literal["lovasz"] = "lovasz"


class BoundarySection(LossTermSection):
    """Wrong probability times its distance to the boundary in pixels; class weights do not act on it."""

    name: Literal["boundary"] = "boundary"


AnyLossTerm = Annotated[
    CrossEntropySection | OhemSection | FocalSection | DiceSection | TverskySection | LovaszSection | BoundarySection,
    Field(discriminator="name"),
]

_LOSS_TERMS: Mapping[str, type[LossTermSection]] = {
    section.model_fields["name"].default: section for section in get_args(get_args(AnyLossTerm)[0])
}

CLASS_WEIGHTED_LOSSES = ("cross_entropy", "ohem", "focal")
"""Losses that class weights act on; a test holds them against `nestseg.losses.criterion.CLASS_WEIGHTED`."""


class LossSection(Section):
    """What is minimised: a weighted sum of losses over the labelled pixels."""

    class_weights: Literal["none", "median_frequency", "enet"] | tuple[Annotated[float, Field(ge=0)], ...] = "none"
    """A number a class, or the rule that computes them from the training split; a run's own recipe has the numbers."""
    terms: tuple[AnyLossTerm, ...] = (CrossEntropySection(),)
    """What is added up: [{name: cross_entropy}, {name: dice, weight: 0.5}]."""


class ScheduleSection(Section):
    """Learning rate of step t of T: poly is (lr - min_lr) * (1 - t/T)^power + min_lr, cosine half a wave."""

    name: Literal["poly", "cosine"] = "poly"
    """The policy."""
    power: Annotated[float, Field(gt=0)] = 0.9
    """Exponent of poly."""
    min_lr: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate at the end."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up; an override of max_steps alone shortens them along with the run."""
    epochs: Positive
    """Passes over the training split, each without its last partial batch; read when max_steps is null."""
    max_steps: Positive | None = None
    """Length of the run and of its schedule; null means epochs times the steps of one epoch."""


class EmaSection(Section):
    """An exponential moving average of the weights; it is what is evaluated and what model files hold."""

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9998
    """Share of the average that stays at each step; less at first: at most (1 + t) / (10 + t)."""


class ComputeSection(Section):
    """How a step is computed. The defaults are plain float32."""

    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of activations; weights, losses and the optimiser stay in float32."""
    channels_last: bool = False
    """Keep feature maps with channels last in memory; faster on recent GPUs."""
    compile: bool = False
    """Let torch.compile fuse the network; the first step takes minutes."""
    activation_checkpointing: bool = False
    """Compute the backbone's blocks again in the backward pass: less memory for a quarter more time."""
    accumulate_steps: Positive = 1
    """Parts that a device's share of a batch is run in, one after another; gradients are those of the whole batch."""
    deterministic: bool = False
    """Use only kernels that give the same bits every time; an error where there is none."""


class GuardSection(Section):
    """What happens when numbers go wrong. A step whose gradient is not finite changes nothing and is logged."""

    max_bad_steps: Positive = 10
    """The run stops after so many such steps in a row."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """Also skip steps whose loss is above so many times the median of the last 100; null takes them."""


class CheckpointSection(Section):
    """When a run can be resumed from."""

    every_steps: Positive = 1000
    """Steps between checkpoints; one is also written before the first step and at the end."""
    keep: Positive = 2
    """How many of the newest are kept."""


class EvaluationSection(Section):
    """How the model is scored."""

    base_size: SizeField | None
    """[short, long] that an image is resized to, keeping its ratio; null scores images as they are."""
    logits_resizes: Literal[1, 2] = 1
    """1: logits are upsampled straight to the image's own size. 2: first to the size the network saw."""
    window: SizeField | None = None
    """[height, width] of windows that slide over the resized image; null gives the network the whole image."""
    window_stride: SizeField | None = None
    """Steps of the windows; null means two thirds of the window, rounded up."""
    blend: Literal["flat", "linear", "hann"] = "flat"
    """Weights by which overlapping windows are averaged."""
    scales: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (1.0,)
    """Multiples of base_size whose results are averaged."""
    flip: bool = False
    """Average with the mirrored image, at each scale."""
    average: Literal["probability", "logit"] = "probability"
    """What is averaged over scales and flips."""
    every_steps: Positive | None = 5000
    """Steps between evaluations during training, one more at the end; null means none."""
    max_images: Positive | None = None
    """Evaluate only the first so many images during training; null means all."""

    @model_validator(mode="after")
    def _check_windows(self) -> EvaluationSection:
        if self.window_stride is not None and self.window is None:
            raise ValueError("evaluation.window_stride is set without evaluation.window")
        steps = zip(self.window_stride or (), self.window or (), strict=False)
        if any(step > side for step, side in steps):
            raise ValueError(
                f"evaluation.window_stride {self.window_stride} leaves gaps between windows of {self.window}; allowed "
                "up to the window"
            )
        if self.window is None and self.blend != "flat":
            raise ValueError("evaluation.blend is for windows that overlap; set evaluation.window too")
        return self


class LogSection(Section):
    """How often the run reports, and where to."""

    every_steps: Positive = 50
    """Steps between two records of log.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where records go besides log.jsonl and log.csv; each is an extra of the same name."""


class Recipe(Section):
    """Everything that decides a run.

    Raises:
        RecipeError: From `read` and `parse`, naming the field, what is allowed and the nearest key.

    Example:
        >>> from nestseg.recipes import resolve_recipe
        >>> recipe = resolve_recipe("fcn_resnest50-d8_voc")
        >>> Recipe.parse(recipe.to_yaml()) == recipe
        True
    """

    name: str
    """The recipe's name."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides initial weights, the order of samples, augmentation and dropout."""
    segmentor: Segmentor
    """The decode head."""
    output_stride: OutputStride = 8
    """Stride of C5."""
    backbone: BackboneSection
    head: HeadSection = HeadSection()
    auxiliary_head: AuxiliaryHeadSection = AuxiliaryHeadSection()
    init: InitSection = InitSection()
    data: DataSection
    augmentation: AugmentationSection
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    ema: EmaSection | None = None
    compute: ComputeSection = ComputeSection()
    guard: GuardSection = GuardSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluation: EvaluationSection
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _check_across_fields(self) -> Recipe:
        if self.data.spec is not None and self.data.dataset != self.data.spec.name:
            raise ValueError(f"data.dataset {self.data.dataset} is not data.spec.name {self.data.spec.name}")
        if self.data.spec is not None:
            stored, wanted = (
                (self.data.spec.channels, self.data.spec.dtype),
                (self.data.in_channels, self.data.image_dtype),
            )
            if stored != wanted:
                raise ValueError(
                    f"data.in_channels and data.image_dtype are {wanted[0]} {wanted[1]}, but data.spec reads "
                    f"{stored[0]} {stored[1]}; change channels and dtype of the data set file instead"
                )
        losses = [term.name for term in self.loss.terms]
        if not losses:
            raise ValueError("loss.terms is empty; name at least one loss, as in loss.terms=[{name: cross_entropy}]")
        if self.loss.class_weights != "none" and not set(losses) & set(CLASS_WEIGHTED_LOSSES):
            raise ValueError(
                f"loss.class_weights act on {', '.join(CLASS_WEIGHTED_LOSSES)}, loss.terms has {', '.join(losses)}; "
                "set loss.class_weights=none, or add such a term"
            )
        low, high = self.augmentation.scale_range
        if not 0 < low <= high:
            raise ValueError(f"augmentation.scale_range {[low, high]}: allowed 0 < low <= high")
        if not len(self.data.mean) == len(self.data.std) == self.data.in_channels:
            raise ValueError(
                f"data.mean has {len(self.data.mean)} and data.std {len(self.data.std)} numbers for data.in_channels "
                f"{self.data.in_channels}; give one a channel"
            )
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(
                f"schedule.min_lr {self.schedule.min_lr} is above optimizer.lr {self.optimizer.lr}; lower it"
            )
        if self.schedule.max_steps is not None and self.schedule.warmup_steps > self.schedule.max_steps:
            raise ValueError(
                f"schedule.warmup_steps {self.schedule.warmup_steps} is above schedule.max_steps "
                f"{self.schedule.max_steps}; lower it"
            )
        unused = AuxiliaryHeadSection(enabled=False)
        if not self.auxiliary_head.enabled and self.auxiliary_head != unused:
            raise ValueError(
                "auxiliary_head.channels and auxiliary_head.loss_weight are set, but auxiliary_head.enabled is false; "
                f"leave them at {unused.channels} and {unused.loss_weight}, or enable it"
            )
        if self.schedule.name != "poly" and self.schedule.power != ScheduleSection.model_fields["power"].default:
            raise ValueError("schedule.power is the exponent of poly; leave it at 0.9 with another schedule.name")
        if self.optimizer.name in _NO_MOMENTUM and self.optimizer.momentum != _PUBLISHED_MOMENTUM:
            raise ValueError(
                f"optimizer.momentum is not used by {self.optimizer.name}; leave it at {_PUBLISHED_MOMENTUM}"
            )
        if self.optimizer.nesterov and (self.optimizer.name != "sgd" or self.optimizer.momentum == 0):
            raise ValueError("optimizer.nesterov needs optimizer.name sgd and optimizer.momentum above 0")
        if self.backbone.zero_init_residual and self.backbone.pretrained != "none":
            raise ValueError(
                "backbone.zero_init_residual would undo backbone.pretrained; for a start from noise set "
                "backbone.pretrained=none"
            )
        if self.backbone.zero_init_residual and self.backbone.name.startswith("timm:"):
            raise ValueError("backbone.zero_init_residual is for ResNeSt; set it to false for a backbone of timm")
        if self.init.model is None and self.init.class_map:
            raise ValueError("init.class_map is set without init.model; name the model whose classes it means")
        if self.init.model is not None and (self.backbone.pretrained != "none" or self.backbone.zero_init_residual):
            raise ValueError(
                "init.model brings its own backbone; set backbone.pretrained=none and "
                "backbone.zero_init_residual=false, or leave init.model out"
            )
        return self

    def to_yaml(self) -> str:
        """Write the recipe as YAML, all fields, in the order they are declared."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)

    def digest(self) -> str:
        """Return the sha256 of the recipe's canonical JSON, 64 hex digits."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def parse(cls, text: str, *, source: str = "recipe") -> Recipe:
        """Read a recipe from YAML text; ``source`` names it in errors."""
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(
                "E-RECIPE-001", f"not YAML: {' '.join(str(error).split())}", fix="mend the file", path=source
            ) from error
        if not isinstance(values, Mapping):
            raise RecipeError(
                "E-RECIPE-001",
                f"a recipe is a mapping of sections, this is a {type(values).__name__}",
                fix="start from the output of: nestseg recipes show NAME",
                path=source,
            )
        if "splits" in values and "classes" in values:
            raise RecipeError(
                "E-RECIPE-004",
                "a data set file, not a recipe",
                fix=f"name a network, and the file as its data set: deeplabv3plus_resnest50-d16 --dataset {source}",
                path=source,
            )
        return validate_recipe(dict(values), source=source)

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Read a recipe file."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                "E-RECIPE-002",
                f"cannot be read: {error}",
                fix="check the path; it must be a UTF-8 YAML file",
                path=path,
            ) from error
        return cls.parse(text, source=str(path))


def validate_recipe(values: dict[str, Any], *, source: str) -> Recipe:
    """Turn plain values into a `Recipe`, with every problem in one error.

    Raises:
        RecipeError: Naming each wrong field, what it may be, and the nearest key for an unknown one.
    """
    return _validate(Recipe, values, source=source)


class _EvaluationAlone(Section):
    evaluation: EvaluationSection


def validate_evaluation(values: dict[str, Any], *, source: str) -> EvaluationSection:
    """Turn plain values into the section that says how a model is scored; errors as of `validate_recipe`."""
    return _validate(_EvaluationAlone, {"evaluation": values}, source=source).evaluation


_S = TypeVar("_S", bound=Section)


def _validate(section: type[_S], values: dict[str, Any], *, source: str) -> _S:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        # a value that fits none of several types is one problem, not one a type
        problems = list(dict.fromkeys(_describe(dict(problem)) for problem in error.errors()))
        raise RecipeError(
            "E-RECIPE-003", "; ".join(problems), fix="see: nestseg recipes show NAME", path=source
        ) from error


def known_fields() -> dict[str, str]:
    """Map every dotted field name to its allowed type, in the order of the recipe.

    Example:
        >>> known_fields()["data.batch_size"]
        'integer >= 1'
    """
    return _fields_of(Recipe)


def _fields_of(section: type[Section]) -> dict[str, str]:
    schema = section.model_json_schema()

    def walk(node: Mapping[str, Any], prefix: str) -> dict[str, str]:
        fields: dict[str, str] = {}
        for name, field in node["properties"].items():
            reference = field.get("$ref") or next(
                (option["$ref"] for option in field.get("anyOf", ()) if "$ref" in option), None
            )
            if reference and reference.endswith("/DatasetSpec"):
                fields[prefix + name] = "a data set file's content or null"
            elif reference:
                if "anyOf" in field:
                    fields[prefix + name] = "section or null"
                fields |= walk(schema["$defs"][reference.rsplit("/", 1)[-1]], f"{prefix}{name}.")
            else:
                fields[prefix + name] = _type_words(field)
        return fields

    return walk(schema, "")


def _type_words(schema: Mapping[str, Any]) -> str:
    if "discriminator" in schema:
        return f"{{name: one of {', '.join(_LOSS_TERMS)}; its options}}"
    if "anyOf" in schema:
        return " or ".join(_type_words(option) for option in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(str(value) for value in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    if schema["type"] == "array":
        items = schema.get("prefixItems") or [schema.get("items", {"type": "number"})]
        more = "" if "prefixItems" in schema else ", ..."
        return "[" + ", ".join(_type_words(item) for item in items) + more + "]"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " ".join([schema["type"], *(f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema)])


def _describe(problem: Mapping[str, Any]) -> str:
    # pydantic also names its validators and the types of a union
    location = [part for part in problem["loc"] if not str(part).startswith(("function-", "literal[", "tuple["))]
    if location[:2] == ["loss", "terms"] and (len(location) > 3 or problem["type"].startswith("union_tag_")):
        return _describe_loss_term(problem)
    name = ".".join(str(part) for part in location)
    fields = known_fields()
    if problem["type"] == "extra_forbidden":
        hint = nearest(name, fields)
        return f"unknown field {name}" + (f": {hint}" if hint.startswith("did you mean") else "")
    if not name:
        return str(problem["msg"]).removeprefix("Value error, ")
    allowed = next((words for field, words in fields.items() if name == field or name.startswith(field + ".")), None)
    if problem["type"] == "missing":
        return f"{name} is missing" + (f" ({allowed})" if allowed else "")
    given = problem["input"]
    return f"{name} is {given!r}: {allowed or problem['msg']}"


def _describe_loss_term(problem: Mapping[str, Any]) -> str:
    _, _, index, *below = problem["loc"]
    given = problem["input"]
    if not below:
        which = f"is {given['name']!r}" if "name" in given else "is missing"
        return f"loss.terms.{index}.name {which}: {nearest(str(given.get('name', '')), _LOSS_TERMS)}"
    # below an entry pydantic names the loss
    loss, option, *_ = below
    fields = _fields_of(_LOSS_TERMS[loss])
    if option not in fields:
        return f"unknown field loss.terms.{index}.{option} of {loss}: {nearest(str(option), fields)}"
    return f"loss.terms.{index}.{option} is {given!r}: {fields[option]}"
