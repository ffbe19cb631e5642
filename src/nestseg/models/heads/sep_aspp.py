"""The DeepLabV3+ head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from nestseg.core.types import Fusion, Norm
from nestseg.models.blocks import ConvNormReLU, SeparableConv, resize_features
from nestseg.models.heads.aspp import ASPP, ATROUS_RATES
from nestseg.models.heads.base import DecodeHead


@final
class SeparableASPPHead(DecodeHead):
    """DeepLabV3+: separable ASPP on C5, upsampled to C2, joined with a narrow C2, two separable 3x3.

    Args:
        feature_channels: Channels of C2..C5.
        num_classes: Classes K, 1 to 255.
        channels: Width of the ASPP branches and of the refined map.
        atrous_rates: Dilation of each 3x3 branch; `ATROUS_RATES` has those that fit an output stride.
        fusion: How the branches are fused, see `ASPP`.
        shortcut_channels: Width that C2 is reduced to.
        dropout: Probability of dropping a channel before the classifier.
        norm: Kind of norm.
        align_corners: How the ASPP's map is upsampled.

    Shape:
        - features: C2..C5, (N, C, h, w) float each
        - returns: (N, K, h', w') float, the size of C2

    Reference:
        Chen et al., "Encoder-Decoder with Atrous Separable Convolution" (DeepLabV3+), 2018, section 3.1 and
        figure 2.

    Deviations:
        512 wide (the paper: 256). The fusion of the branches is by default a full 3x3 (the paper: 1x1), and the last
        two 3x3 are separable (the paper: full), as in sssegmentation and mmsegmentation.
    """

    def __init__(
        self,
        feature_channels: Sequence[int],
        *,
        num_classes: int,
        channels: int = 512,
        atrous_rates: Sequence[int] = ATROUS_RATES[8],
        fusion: Fusion = "full",
        shortcut_channels: int = 48,
        dropout: float = 0.1,
        norm: Norm = "batch",
        align_corners: bool = False,
    ) -> None:
        super().__init__(channels=channels, num_classes=num_classes, dropout=dropout)
        self.align_corners = align_corners
        self.aspp = ASPP(
            feature_channels[3], channels, atrous_rates=atrous_rates, separable=True, fusion=fusion, norm=norm
        )
        self.shortcut = ConvNormReLU(feature_channels[0], shortcut_channels, norm=norm)
        self.refine = nn.Sequential(
            SeparableConv(channels + shortcut_channels, channels, norm=norm),
            SeparableConv(channels, channels, norm=norm),
        )

    @property
    def pools_to_one_pixel(self) -> bool:
        """True: the image pool."""
        return True

    def fuse_features(self, features: Sequence[Tensor]) -> Tensor:
        """Refine ASPP's map with C2; see `DecodeHead.fuse_features`."""
        fine = self.shortcut(features[0])
        coarse = resize_features(self.aspp(features[3]), size=fine.shape[2:], align_corners=self.align_corners)
        out: Tensor = self.refine(torch.cat([coarse, fine], dim=1))
        return out
