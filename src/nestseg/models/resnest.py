"""ResNeSt backbones: the authors' weights, a choice of stride, and three ways to dilate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Self, final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestseg.core.errors import ModelError, nearest
from nestseg.core.types import DilationVariant, Norm, OutputStride
from nestseg.models.backbone import Backbone
from nestseg.models.blocks import SplitAttention, make_conv, make_norm
from nestseg.models.timm_backbone import TIMM_PREFIX, TimmBackbone


class ResNeStSpec(NamedTuple):
    """What distinguishes one ResNeSt from another.

    Args:
        blocks: Number of blocks of each of the four stages.
        stem_channels: Width of the first two stem convolutions; the third is twice as wide.
        radix: Splits of split attention.
        cardinality: Groups of split attention.
        group_width: Channels a group in the first stage.
        pool_first: Whether a block pools before its split attention (the "fast" variants) instead of after.
    """

    blocks: tuple[int, int, int, int]
    stem_channels: int = 64
    radix: int = 2
    cardinality: int = 1
    group_width: int = 64
    pool_first: bool = False


def _fast(radix: int, cardinality: int, group_width: int) -> ResNeStSpec:
    return ResNeStSpec((3, 4, 6, 3), 32, radix, cardinality, group_width, pool_first=True)


BACKBONES: dict[str, ResNeStSpec] = {
    "resnest14": ResNeStSpec((1, 1, 1, 1), 32),
    "resnest26": ResNeStSpec((2, 2, 2, 2), 32),
    "resnest50": ResNeStSpec((3, 4, 6, 3), 32),
    "resnest101": ResNeStSpec((3, 4, 23, 3)),
    "resnest200": ResNeStSpec((3, 24, 36, 3)),
    "resnest269": ResNeStSpec((3, 30, 48, 8)),
    "resnest50-fast-1s1x64d": _fast(1, 1, 64),
    "resnest50-fast-2s1x64d": _fast(2, 1, 64),
    "resnest50-fast-4s1x64d": _fast(4, 1, 64),
    "resnest50-fast-1s2x40d": _fast(1, 2, 40),
    "resnest50-fast-2s2x40d": _fast(2, 2, 40),
    "resnest50-fast-4s2x40d": _fast(4, 2, 40),
    "resnest50-fast-1s4x24d": _fast(1, 4, 24),
}
"""Backbones by name. The authors write the fast ones with underscores, ``resnest50_fast_2s1x64d``."""

_EXPANSION = 4


@final
class _HalvingPool(nn.Module):
    """Average of 2x2 blocks, of the one or two pixels that are left where the height or width is odd.

    The same to the last bit as `nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)`, which
    `torch.export` can only trace for either odd or even sizes.

    Shape:
        - input: (N, C, H, W) float
        - returns: (N, C, ceil(H / 2), ceil(W / 2)) float
    """

    def forward(self, x: Tensor) -> Tensor:
        """Average blocks that are padded with zeros, then make up for the padding."""
        out = F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2)
        rows, columns = (
            2 / (length - 2 * torch.arange(blocks, device=x.device)).clamp(max=2).to(x.dtype)
            for length, blocks in zip(x.shape[2:], out.shape[2:], strict=True)
        )
        return out * (rows[:, None] * columns)


@final
class _ShiftedPool(nn.Module):
    """Average of each pixel with its right and lower neighbours, zeros outside.

    timm's "same" 2x2 average pool at stride 1: it pads with zeros and counts them, in spite of its argument
    ``count_include_pad=False``. Weights trained with it need the border it makes.

    Shape:
        - input: (N, C, H, W) float
        - returns: (N, C, H, W) float
    """

    def forward(self, x: Tensor) -> Tensor:
        """Average each pixel with those to the right and below."""
        return F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, stride=1)


@final
class Bottleneck(nn.Module):
    """1x1 convolution, split attention, 1x1 convolution, and a shortcut around them.

    Attribute names are those of the authors' checkpoints (weight compat).

    Args:
        in_channels: Channels of the input.
        planes: A quarter of the channels of the output.
        spec: The network that the block belongs to.
        dilation: Dilation of the 3x3 convolution.
        pool: Average pool of the main path, or None.
        shortcut_pool: Average pool of the shortcut, or None.
        norm: Kind of norm.
        project: Whether the shortcut has a 1x1 convolution.

    Shape:
        - input: (N, C, H, W) float
        - returns: (N, 4 * planes, h, w) float, at least 0, where (h, w) is what the pools leave

    Reference:
        Zhang et al., "ResNeSt: Split-Attention Networks", 2020, section 3.1 and figure 2; the average pools:
        section 4.1 (network tweaks).

    Deviations:
        None known.
    """

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        spec: ResNeStSpec,
        dilation: int = 1,
        pool: nn.Module | None = None,
        shortcut_pool: nn.Module | None = None,
        norm: Norm = "batch",
        project: bool = False,
    ) -> None:
        super().__init__()
        width = planes * spec.group_width // 64 * spec.cardinality
        self.conv1 = make_conv(in_channels, width)
        self.bn1 = make_norm(norm, width)
        self.pool_before = pool if spec.pool_first else None
        self.conv2 = SplitAttention(width, radix=spec.radix, cardinality=spec.cardinality, dilation=dilation, norm=norm)
        self.pool_after = None if spec.pool_first else pool
        self.conv3 = make_conv(width, planes * _EXPANSION)
        self.bn3 = make_norm(norm, planes * _EXPANSION)
        self.downsample: nn.Sequential | None = None
        if project:
            self.downsample = nn.Sequential(
                shortcut_pool or nn.Identity(),
                make_conv(in_channels, planes * _EXPANSION),
                make_norm(norm, planes * _EXPANSION),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Add what the block computes to its shortcut."""
        out: Tensor = F.relu_(self.bn1(self.conv1(x)))
        if self.pool_before is not None:
            out = self.pool_before(out)
        out = self.conv2(out)
        if self.pool_after is not None:
            out = self.pool_after(out)
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu_(out)


@final
class ResNeSt(Backbone):
    """Deep stem and four stages of split-attention blocks; gives the features C2..C5.

    State-dict keys are the authors' without ``fc.*``, for every spec.

    Args:
        spec: Which network, an entry of `BACKBONES`.
        output_stride: Stride of C5 with respect to the image. Stages that would pass it are dilated instead.
        dilation_variant: What becomes of the two average pools in the first block of a dilated stage. Public
            implementations differ here, and as pools have no parameters a strict load cannot tell. ``plain``
            (mmsegmentation, sssegmentation, detectron2): both dropped. ``official`` (the authors' code,
            PyTorch-Encoding): the 3x3 pool of the main path stays, at stride 1. ``timm``: the main one
            dropped, the shortcut's a 2x2 "same" pool at stride 1. All are one network at output stride 32.
        norm: Kind of norm.
        frozen_stages: 0 freezes nothing, 1 the stem and layer1, ... 4 everything. Frozen parts have no
            gradient, and their norms stay in evaluation mode after ``.train()``.
        in_channels: Channels of the image.

    Attributes:
        feature_channels: Channels of C2..C5.
        output_stride: As given.
        in_channels: As given.

    Shape:
        - input: (N, in_channels, H, W) float, normalised; any H and W
        - returns: C2..C5, (N, C, ceil(H / s), ceil(W / s)) float, s = 4, 8, 16, 32 but at most output_stride

    Raises:
        ModelError: If an argument is not among the allowed ones.

    Reference:
        Zhang et al., "ResNeSt: Split-Attention Networks", 2020; stem and shortcut: He et al., "Bag of
        Tricks", 2018, section 4; dilation: Chen et al., "Rethinking Atrous Convolution", 2017, section 3.1.

    Deviations:
        No dropout, DropBlock or classifier. The first block of a dilated stage has the dilation of the stage
        before, as in the authors' code. Initial weights: see `make_conv`.
    """

    def __init__(
        self,
        spec: ResNeStSpec,
        *,
        output_stride: OutputStride = 8,
        dilation_variant: DilationVariant = "plain",
        norm: Norm = "batch",
        frozen_stages: int = 0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_arguments(output_stride, dilation_variant, frozen_stages, in_channels)
        self.output_stride: OutputStride = output_stride
        self.frozen_stages, self.in_channels = frozen_stages, in_channels
        width = spec.stem_channels
        # Weight compat: the authors' stem is a Sequential whose last norm stands outside.
        self.conv1 = nn.Sequential(
            make_conv(in_channels, width, kernel_size=3, stride=2),
            make_norm(norm, width),
            nn.ReLU(inplace=True),
            make_conv(width, width, kernel_size=3),
            make_norm(norm, width),
            nn.ReLU(inplace=True),
            make_conv(width, 2 * width, kernel_size=3),
        )
        self.bn1 = make_norm(norm, 2 * width)
        channels, reached, dilation = 2 * width, 4, 1
        stages: list[nn.Sequential] = []
        for index, count in enumerate(spec.blocks):
            planes = 64 * 2**index
            first_dilation = dilation
            pool: nn.Module | None = None
            shortcut_pool: nn.Module | None = None
            if index > 0 and reached < output_stride:
                reached *= 2
                pool = nn.AvgPool2d(3, stride=2, padding=1)
                shortcut_pool = _HalvingPool()
            elif index > 0:
                dilation *= 2
                pool = nn.AvgPool2d(3, stride=1, padding=1) if dilation_variant == "official" else None
                shortcut_pool = _ShiftedPool() if dilation_variant == "timm" else None
            first = Bottleneck(
                channels,
                planes,
                spec=spec,
                dilation=first_dilation,
                pool=pool,
                shortcut_pool=shortcut_pool,
                norm=norm,
                project=True,
            )
            channels = planes * _EXPANSION
            rest = (Bottleneck(channels, planes, spec=spec, dilation=dilation, norm=norm) for _ in range(count - 1))
            stages.append(nn.Sequential(first, *rest))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.feature_channels: tuple[int, int, int, int] = (256, 512, 1024, 2048)
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def _frozen_parts(self) -> list[nn.Module]:
        if self.frozen_stages == 0:
            return []
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        return [self.conv1, self.bn1, *stages[: self.frozen_stages]]

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen parts.

        Args:
            mode: True for training, False for evaluation.

        Returns:
            The module itself.
        """
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def one_pixel_norms(self) -> Iterator[nn.Module]:
        """Find the norms of split attention; see `Backbone.one_pixel_norms`."""
        return (module.bn1 for module in self.modules() if isinstance(module, SplitAttention))

    def blocks(self) -> Iterator[nn.Module]:
        """Find the bottlenecks; see `Backbone.blocks`."""
        return (module for module in self.modules() if isinstance(module, Bottleneck))

    @torch.no_grad()
    def zero_residuals(self) -> None:
        """Set the last norm's weight of every block to zero, so that each block starts as its shortcut.

        For training from random weights: the first steps then train a much shallower network.

        Raises:
            ModelError: If the norms are frozen, since the blocks would stay shortcuts.

        Reference:
            Goyal et al., "Accurate, Large Minibatch SGD", 2017, section 5.1.

        Deviations:
            None known.
        """
        for block in self.modules():
            if isinstance(block, Bottleneck):
                if not isinstance(block.bn3.weight, nn.Parameter):
                    raise ModelError(
                        "E-MODEL-020", "zero residuals with frozen norms", fix="backbone.norm=batch or group"
                    )
                block.bn3.weight.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run stem and stages, keep what every stage gives."""
        x = F.relu_(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        c2 = self.layer1(x)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        c5 = self.layer4(c4)
        return c2, c3, c4, c5


def build_backbone(
    name: str,
    *,
    output_stride: OutputStride = 8,
    dilation_variant: DilationVariant = "plain",
    norm: Norm = "batch",
    frozen_stages: int = 0,
    in_channels: int = 3,
) -> Backbone:
    """Build a backbone with random weights from its name.

    Args:
        name: A name in `BACKBONES`, or ``timm:`` and one of timm's.
        output_stride: Stride of C5.
        dilation_variant: See `ResNeSt`; timm's networks have only their own, for which this stays ``plain``.
        norm: Kind of norm; for timm's networks see `TimmBackbone`.
        frozen_stages: See `ResNeSt` and `TimmBackbone`.
        in_channels: Channels of the image.

    Returns:
        The backbone, in training mode.

    Raises:
        ModelError: If the name is unknown or the rest does not go with it.

    Example:
        >>> build_backbone("resnest14", output_stride=16).feature_channels
        (256, 512, 1024, 2048)
    """
    if name.startswith(TIMM_PREFIX):
        _check_arguments(output_stride, dilation_variant, frozen_stages, in_channels)
        if dilation_variant != "plain":
            raise ModelError(
                "E-MODEL-035",
                f"dilation variant {dilation_variant!r} for {name}; timm's networks are dilated in timm's way only",
                fix="leave the dilation variant at plain",
            )
        return TimmBackbone(
            name.removeprefix(TIMM_PREFIX),
            output_stride=output_stride,
            norm=norm,
            frozen_stages=frozen_stages,
            in_channels=in_channels,
        )
    if name not in BACKBONES:
        raise ModelError(
            "E-MODEL-017",
            f"unknown backbone {name!r}; {nearest(name, BACKBONES)}",
            fix="choose one of these, or one of timm's as timm:NAME",
        )
    return ResNeSt(
        BACKBONES[name],
        output_stride=output_stride,
        dilation_variant=dilation_variant,
        norm=norm,
        frozen_stages=frozen_stages,
        in_channels=in_channels,
    )


def _check_arguments(output_stride: int, dilation_variant: str, frozen_stages: int, in_channels: int) -> None:
    if output_stride not in get_args(OutputStride):
        raise ModelError("E-MODEL-002", f"output stride {output_stride}; allowed 8, 16, 32", fix="choose one of these")
    if dilation_variant not in get_args(DilationVariant):
        raise ModelError(
            "E-MODEL-003",
            f"unknown dilation variant {dilation_variant!r}; " + nearest(dilation_variant, get_args(DilationVariant)),
            fix="choose plain, or the variant that the weights were trained with",
        )
    if not 0 <= frozen_stages <= 4:
        raise ModelError(
            "E-MODEL-004",
            f"{frozen_stages} frozen stages; allowed 0 to 4",
            fix="0 freezes nothing, 1 stem and layer1, 4 all",
        )
    if in_channels < 1:
        raise ModelError("E-MODEL-005", f"{in_channels} image channels; allowed 1 or more", fix="3 for RGB images")
