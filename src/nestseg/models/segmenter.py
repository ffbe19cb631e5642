"""The segmenter: pixels in, logits out; and the one function that makes one from names and numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from nestseg.core.errors import ModelError, nearest
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import DilationVariant, Fusion, Norm, OutputStride, SegLogits, Segmentor
from nestseg.models.backbone import Backbone
from nestseg.models.heads import HEADS, DecodeHead, FCNHead
from nestseg.models.heads.aspp import ATROUS_RATES
from nestseg.models.resnest import build_backbone
from nestseg.store.hub import upload_pretrained, write_pretrained
from nestseg.store.metadata import Architecture, ModelMetadata
from nestseg.version import __version__

_HEAD_OPTIONS: dict[str, dict[str, Any]] = {
    "fcn": {"num_convs": 2, "concat_input": False},
    "pspnet": {"pool_scales": (1, 2, 3, 6)},
    "deeplabv3": {"atrous_rates": ATROUS_RATES, "fusion": "full"},
    "deeplabv3plus": {"atrous_rates": ATROUS_RATES, "fusion": "full", "shortcut_channels": 48},
}
"""Options that belong to one segmentor or two, with what None stands for; rates depend on the output stride."""

_UPSAMPLES_FEATURES = ("pspnet", "deeplabv3plus")

IMAGENET_MEAN = (123.675, 116.28, 103.53)
"""Mean of ImageNet's pixels, RGB, range 0-255."""
IMAGENET_STD = (58.395, 57.12, 57.375)
"""Standard deviation of ImageNet's pixels, RGB, range 0-255."""


class BatchNormWarning(UserWarning):
    """BatchNorm trains on so few values that what it gives carries almost no information."""


@final
class Segmenter(nn.Module):
    """Normalisation, backbone, decode head and auxiliary head.

    Args:
        backbone: Gives C2..C5.
        decode_head: Makes the main logits.
        auxiliary_head: Makes the auxiliary logits in training mode, or None.
        mean: What is subtracted from each channel.
        std: What each channel is divided by afterwards.

    Attributes:
        mean: Non-persistent buffer, (C, 1, 1).
        std: Non-persistent buffer, (C, 1, 1).
        architecture: The arguments of `create_model`; None for a network put together by hand.
        metadata: What the weights mean; None unless they were loaded from a file.

    Shape:
        - image: (N, C, H, W) uint8, or another dtype in the range that mean and std are for; RGB when C is 3
        - returns: `SegLogits`; main (N, K, h, w) at the head's stride, auxiliary (N, K, h', w') or None

    Raises:
        ModelError: If mean and std do not fit the image channels; on a forward pass, if the image has other
            channels, or if BatchNorm would train on one value a channel.

    Reference:
        Zhao et al., "Pyramid Scene Parsing Network", 2017, figures 3 and 4 (main and auxiliary branch).

    Deviations:
        None known.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        decode_head: DecodeHead,
        *,
        auxiliary_head: DecodeHead | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if not len(mean) == len(std) == backbone.in_channels:
            raise ModelError(
                "E-MODEL-012",
                f"{len(mean)} means and {len(std)} stds for {backbone.in_channels} image channels",
                fix="give one mean and one std a channel",
            )
        if min(std) <= 0:
            raise ModelError("E-MODEL-013", f"std {tuple(std)}; allowed above 0", fix="give one std a channel")
        self.backbone = backbone
        self.decode_head = decode_head
        self.auxiliary_head = auxiliary_head
        self._mean, self._std = tuple(mean), tuple(std)
        self.register_buffer("mean", torch.tensor(self._mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(self._std)[:, None, None], persistent=False)
        self._warned_of_batch_norm = False
        self._has_trained = False
        self.architecture: Architecture | None = None
        self.metadata: ModelMetadata | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every move between devices and dtypes comes through here. mean and std are in no state dict: fill
        # them again, or `to_empty` would leave garbage in them and `double` the rounding of float32.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for buffer, values in ((self.mean, self._mean), (self.std, self._std)):
            if not buffer.is_meta:
                buffer.copy_(torch.tensor(values, dtype=torch.float64, device="cpu")[:, None, None])
        return self

    def forward(self, image: Tensor) -> SegLogits:
        """Normalise, extract features, classify."""
        if image.ndim != 4 or image.shape[1] != len(self._mean):
            raise ModelError(
                "E-MODEL-014",
                f"image of shape {tuple(image.shape)}; expected (N, {len(self._mean)}, H, W)",
                fix="give a batch of images, channels second, or build the model with other in_channels",
            )
        if self.training:
            # the compiler cannot trace a warning
            if not torch.compiler.is_compiling():
                self.check_batch_size(image.shape[0])
            self._has_trained = True
        features = self.backbone((image.to(self.mean.dtype) - self.mean) / self.std)
        auxiliary = None
        if self.training and self.auxiliary_head is not None:
            auxiliary = self.auxiliary_head(features)
        return SegLogits(main=self.decode_head(features), auxiliary=auxiliary)

    def save_pretrained(
        self, folder: str | Path, *, taxonomy: Taxonomy | None = None, licence: str | None = None
    ) -> None:
        """Write ``model.safetensors``, ``config.json`` and a model card, ready for `nestseg.load_model` and the Hub.

        Args:
            folder: Made if absent; files of these names there are replaced.
            taxonomy: Names and colours of the classes; None takes those that the weights came with.
            licence: Licence of the weights, such as ``apache-2.0``; None takes the one that they came with.

        Raises:
            ModelError: If the classes are unknown, or the network was put together by hand.
            WeightsError: If the folder cannot be written.
        """
        write_pretrained(Path(folder), self.state_dict(), self.describe(taxonomy, licence=licence))

    def push_to_hub(
        self,
        repository: str,
        *,
        taxonomy: Taxonomy | None = None,
        licence: str | None = None,
        private: bool = False,
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub; needs ``pip install "nestseg[hub]"``.

        Args:
            repository: ``owner/name``; made if absent.
            taxonomy: See `save_pretrained`.
            licence: See `save_pretrained`.
            private: Whether a new repository is private.

        Returns:
            What `nestseg.load_model` takes to load exactly this upload, ``hf:owner/name@revision``.

        Raises:
            ModelError: As `save_pretrained`.
            WeightsError: If the Hub cannot be reached or refuses.
        """
        return upload_pretrained(
            repository, self.state_dict(), self.describe(taxonomy, licence=licence), private=private
        )

    def describe(self, taxonomy: Taxonomy | None = None, *, licence: str | None = None) -> ModelMetadata:
        """Return what travels with the weights; scores do not, after a pass in training mode has changed the weights.

        Args:
            taxonomy: See `save_pretrained`.
            licence: See `save_pretrained`.

        Raises:
            ModelError: If the classes are unknown, or the network was put together by hand.
        """
        if self.metadata is not None and taxonomy is None:
            update: dict[str, Any] = {"scores": ()} if self._has_trained else {}
            return self.metadata.model_copy(update=update if licence is None else update | {"licence": licence})
        if self.architecture is None:
            raise ModelError(
                "E-MODEL-022",
                "nobody knows which arguments built this network",
                fix="build it with nestseg.create_model",
            )
        if taxonomy is None or taxonomy.num_classes != self.architecture.num_classes:
            raise ModelError(
                "E-MODEL-023",
                f"{'no' if taxonomy is None else taxonomy.num_classes} class names for a network of "
                f"{self.architecture.num_classes} classes",
                fix="pass taxonomy=nestseg.Taxonomy(name=..., classes=(...), palette=(...))",
            )
        return ModelMetadata(
            architecture=self.architecture,
            dataset=taxonomy.name,
            classes=taxonomy.classes,
            palette=taxonomy.palette,
            base_size=None,
            recipe=None,
            step=0,
            versions={"nestseg": __version__, "torch": torch.__version__},
            licence=licence,
        )

    def _one_pixel_norms(self) -> Iterator[tuple[str, nn.Module]]:
        for norm in self.backbone.one_pixel_norms():
            yield "backbone", norm
        if self.decode_head.pools_to_one_pixel:
            for module in self.decode_head.modules():
                yield "head", module

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse to train BatchNorm on one value a channel, and warn of two; a forward pass does, unless compiled.

        Args:
            batch_size: Images a device.

        Raises:
            ModelError: For a batch of one.

        Warns:
            BatchNormWarning: For a batch of two, once.
        """
        if batch_size > 2:
            return
        # SyncBatchNorm is no BatchNorm2d: it counts the images of all devices.
        fields = sorted(
            {
                f"{owner}.norm"
                for owner, norm in self._one_pixel_norms()
                if isinstance(norm, nn.BatchNorm2d) and norm.training
            }
        )
        if not fields:
            return
        names = "=batch and ".join(fields)
        if batch_size == 1:
            raise ModelError(
                "E-MODEL-015",
                f"one image a device with {names}=batch: BatchNorm would see one value a channel",
                fix="a bigger batch, or "
                + " and ".join(f"{field}=frozen_batch or {field}=group" for field in fields)
                + ", or SyncBatchNorm over several GPUs",
            )
        if not self._warned_of_batch_norm:
            self._warned_of_batch_norm = True
            warnings.warn(
                f"two images a device with {names}=batch: BatchNorm makes only +1 and -1 of features pooled to one "
                "pixel; fix: a bigger batch, frozen_batch, group, or SyncBatchNorm",
                BatchNormWarning,
                stacklevel=3,
            )


def create_model(
    segmentor: Segmentor,
    backbone: str,
    *,
    num_classes: int,
    output_stride: OutputStride = 8,
    dilation_variant: DilationVariant = "plain",
    auxiliary: bool = True,
    in_channels: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    backbone_norm: Norm = "batch",
    head_norm: Norm = "batch",
    frozen_stages: int = 0,
    head_channels: int = 512,
    auxiliary_channels: int | None = None,
    dropout: float = 0.1,
    align_corners: bool = False,
    num_convs: int | None = None,
    concat_input: bool = False,
    pool_scales: Sequence[int] | None = None,
    atrous_rates: Sequence[int] | None = None,
    fusion: Fusion | None = None,
    shortcut_channels: int | None = None,
) -> Segmenter:
    """Build a segmenter with random weights.

    Some options belong to some segmentors only, which are named; given to another they are an error.

    Args:
        segmentor: Which head.
        backbone: A name in `BACKBONES`, or ``timm:NAME`` for a network of timm, see `TimmBackbone`.
        num_classes: Classes K, 1 to 255.
        output_stride: Stride of C5.
        dilation_variant: See `ResNeSt`.
        auxiliary: Whether to add an auxiliary head, a one-convolution `FCNHead` on C4.
        in_channels: Channels of the image; None is as many as ``mean`` has numbers.
        mean: What is subtracted from each channel.
        std: What each channel is divided by afterwards.
        backbone_norm: Kind of norm in the backbone.
        head_norm: Kind of norm in both heads.
        frozen_stages: See `ResNeSt`.
        head_channels: Width of the decode head.
        auxiliary_channels: Width of the auxiliary head; None is 512 (mmsegmentation's is 256).
        dropout: Probability of dropping a channel before the classifiers.
        align_corners: How the head upsamples features. fcn has none to upsample and deeplabv3 only a map of
            one pixel, which comes out the same, so that they are right either way.
        num_convs: fcn: number of 3x3 convolutions; None is 2.
        concat_input: fcn: whether C5 joins the output of the convolutions.
        pool_scales: pspnet: side of each pooling grid; None is 1, 2, 3, 6.
        atrous_rates: deeplabv3, deeplabv3plus: dilations; None is what `ATROUS_RATES` has for the stride.
        fusion: deeplabv3, deeplabv3plus: how ASPP's branches become one map, see `ASPP`; None is ``full``.
        shortcut_channels: deeplabv3plus: width that C2 is reduced to; None is 48.

    Returns:
        The segmenter, in training mode.

    Raises:
        ModelError: If a name is unknown, a value is out of range, or an option belongs to another segmentor.

    Example:
        >>> model = create_model("pspnet", "resnest14", num_classes=5, output_stride=16).eval()
        >>> model(torch.zeros(1, 3, 33, 65, dtype=torch.uint8)).main.shape
        torch.Size([1, 5, 3, 5])
    """
    if segmentor not in HEADS:
        raise ModelError(
            "E-MODEL-016",
            f"unknown segmentor {segmentor!r}; {nearest(segmentor, HEADS)}",
            fix="choose one of these",
        )
    given: dict[str, Any] = {
        "num_convs": num_convs,
        "concat_input": concat_input,
        "pool_scales": pool_scales,
        "atrous_rates": atrous_rates,
        "fusion": fusion,
        "shortcut_channels": shortcut_channels,
    }
    for option, value in given.items():
        users = [name for name, options in _HEAD_OPTIONS.items() if option in options]
        if value is not None and value is not False and segmentor not in users:
            raise ModelError(
                "E-MODEL-018",
                f"{option}={value!r} given, but {segmentor} has no such option; it belongs to " + ", ".join(users),
                fix=f"leave {option} out",
            )
    if auxiliary_channels is not None and not auxiliary:
        raise ModelError(
            "E-MODEL-019",
            f"auxiliary_channels={auxiliary_channels} given without an auxiliary head",
            fix="leave auxiliary_channels out, or auxiliary=True",
        )
    net = build_backbone(
        backbone,
        output_stride=output_stride,
        dilation_variant=dilation_variant,
        norm=backbone_norm,
        frozen_stages=frozen_stages,
        in_channels=len(mean) if in_channels is None else in_channels,
    )
    channels = net.feature_channels
    options = {
        name: default if given[name] is None else given[name]
        for name, default in _HEAD_OPTIONS.get(segmentor, {}).items()
    }
    if options.get("atrous_rates") is ATROUS_RATES:
        options["atrous_rates"] = ATROUS_RATES[output_stride]
    recorded = {name: None for name in given if name not in options} | {"concat_input": False} | options
    if segmentor in _UPSAMPLES_FEATURES:
        options["align_corners"] = align_corners
    head = HEADS[segmentor](
        channels, num_classes=num_classes, channels=head_channels, dropout=dropout, norm=head_norm, **options
    )
    auxiliary_head = None
    if auxiliary:
        auxiliary_head = FCNHead(
            channels,
            num_classes=num_classes,
            channels=512 if auxiliary_channels is None else auxiliary_channels,
            num_convs=1,
            feature_index=2,
            dropout=dropout,
            norm=head_norm,
        )
    model = Segmenter(net, head, auxiliary_head=auxiliary_head, mean=mean, std=std)
    model.architecture = Architecture(
        segmentor=segmentor,
        backbone=backbone,
        num_classes=num_classes,
        output_stride=output_stride,
        dilation_variant=dilation_variant,
        auxiliary=auxiliary,
        mean=tuple(mean),
        std=tuple(std),
        backbone_norm=backbone_norm,
        head_norm=head_norm,
        frozen_stages=frozen_stages,
        head_channels=head_channels,
        auxiliary_channels=(auxiliary_channels or 512) if auxiliary else None,
        dropout=dropout,
        align_corners=align_corners,
        **recorded,
    )
    return model


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module, frozen ones included, buffers not.

    Args:
        module: Any module, on any device.

    Returns:
        The number of scalars.

    Example:
        >>> count_parameters(nn.Linear(3, 2))
        8
    """
    return sum(parameter.numel() for parameter in module.parameters())
