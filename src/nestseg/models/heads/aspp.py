"""Atrous spatial pyramid pooling, and the DeepLabV3 head made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final, get_args

import torch
from torch import Tensor, nn

from nestseg.core.errors import ModelError, nearest
from nestseg.core.types import Fusion, Norm
from nestseg.models.blocks import ConvNormReLU, SeparableConv
from nestseg.models.heads.base import DecodeHead

ATROUS_RATES: dict[int, tuple[int, ...]] = {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}
"""Rates by output stride: the same field of view in image pixels. The paper has 8 and 16; 32 is our guess."""


@final
class ASPP(nn.Module):
    """Parallel 1x1, atrous 3x3 and image-pool branches, concatenated in this order and fused.

    Args:
        in_channels: Channels of the input.
        channels: Width of each branch and of the result.
        atrous_rates: Dilation of each 3x3 branch.
        separable: Whether the 3x3 branches are depthwise separable.
        fusion: ``full``: a 3x3 convolution (sssegmentation, mmsegmentation). ``separable``: a depthwise separable
            one. ``projected``: a 1x1 convolution, dropout of half the channels, then a 3x3 convolution
            (PyTorch-Encoding, torchvision).
        norm: Kind of norm.

    Shape:
        - input: (N, C, H, W) float
        - returns: (N, channels, H, W) float, at least 0

    Raises:
        ModelError: If there is no rate, or one below 1, or the fusion is unknown.

    Reference:
        Chen et al., "Rethinking Atrous Convolution" (DeepLabV3), 2017, section 3.3;
        separable: Chen et al., DeepLabV3+, 2018, section 3.1.

    Deviations:
        The paper is 256 wide and fuses by 1x1; this is by default 512 wide and fuses by 3x3, as sssegmentation
        and mmsegmentation. mmsegmentation concatenates the image pool first, this last.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        atrous_rates: Sequence[int],
        separable: bool = False,
        fusion: Fusion = "full",
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        if not atrous_rates or min(atrous_rates) < 1:
            raise ModelError(
                "E-MODEL-011",
                f"atrous rates {tuple(atrous_rates)}; allowed one or more, each at least 1",
                fix="12,24,36 at output stride 8; 6,12,18 at 16",
            )
        self.atrous_rates = tuple(atrous_rates)
        self.branches = nn.ModuleList([ConvNormReLU(in_channels, channels, norm=norm)])
        for rate in self.atrous_rates:
            self.branches.append(
                SeparableConv(in_channels, channels, dilation=rate, norm=norm)
                if separable
                else ConvNormReLU(in_channels, channels, kernel_size=3, dilation=rate, norm=norm)
            )
        self.image_pool = ConvNormReLU(in_channels, channels, norm=norm)
        self.fuse = _make_fusion(fusion, (len(self.branches) + 1) * channels, channels, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Run all branches on the same map and fuse them."""
        # A map of one pixel is the same everywhere when upsampled, with corners aligned or not.
        pooled = self.image_pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, x.shape[2], x.shape[3])
        out: Tensor = self.fuse(torch.cat([*(branch(x) for branch in self.branches), pooled], dim=1))
        return out


def _make_fusion(fusion: Fusion, in_channels: int, channels: int, *, norm: Norm) -> nn.Module:
    if fusion == "full":
        return ConvNormReLU(in_channels, channels, kernel_size=3, norm=norm)
    if fusion == "separable":
        return SeparableConv(in_channels, channels, norm=norm)
    if fusion == "projected":
        return nn.Sequential(
            ConvNormReLU(in_channels, channels, norm=norm),
            nn.Dropout2d(0.5),
            ConvNormReLU(channels, channels, kernel_size=3, norm=norm),
        )
    raise ModelError(
        "E-MODEL-021", f"unknown fusion {fusion!r}; {nearest(fusion, get_args(Fusion))}", fix="choose one of these"
    )


@final
class ASPPHead(DecodeHead):
    """DeepLabV3: ASPP on C5, then the classifier.

    Args:
        feature_channels: Channels of C2..C5.
        num_classes: Classes K, 1 to 255.
        channels: Width of each branch and of the fused map.
        atrous_rates: Dilation of each 3x3 branch; `ATROUS_RATES` has those that fit an output stride.
        fusion: How the branches are fused, see `ASPP`.
        dropout: Probability of dropping a channel before the classifier.
        norm: Kind of norm.

    Shape:
        - features: C2..C5, (N, C, h, w) float each
        - returns: (N, K, h', w') float, the size of C5

    Reference:
        Chen et al., "Rethinking Atrous Convolution" (DeepLabV3), 2017, section 3.3.

    Deviations:
        See `ASPP`.
    """

    def __init__(
        self,
        feature_channels: Sequence[int],
        *,
        num_classes: int,
        channels: int = 512,
        atrous_rates: Sequence[int] = ATROUS_RATES[8],
        fusion: Fusion = "full",
        dropout: float = 0.1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(channels=channels, num_classes=num_classes, dropout=dropout)
        self.aspp = ASPP(feature_channels[3], channels, atrous_rates=atrous_rates, fusion=fusion, norm=norm)

    @property
    def pools_to_one_pixel(self) -> bool:
        """True: the image pool."""
        return True

    def fuse_features(self, features: Sequence[Tensor]) -> Tensor:
        """Run ASPP on C5; see `DecodeHead.fuse_features`."""
        out: Tensor = self.aspp(features[3])
        return out
