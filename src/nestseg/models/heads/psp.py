"""The pyramid pooling head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from nestseg.core.errors import ModelError
from nestseg.core.types import Norm
from nestseg.models.blocks import ConvNormReLU, pool_grids, resize_features
from nestseg.models.heads.base import DecodeHead


@final
class PSPHead(DecodeHead):
    """C5 averaged over grids of several sizes, upsampled, concatenated with C5, fused by a 3x3 convolution.

    Args:
        feature_channels: Channels of C2..C5.
        num_classes: Classes K, 1 to 255.
        channels: Width of each pooled branch and of the fused map.
        pool_scales: Side of each grid.
        dropout: Probability of dropping a channel before the classifier.
        norm: Kind of norm.
        align_corners: How pooled maps are upsampled.

    Shape:
        - features: C2..C5, (N, C, h, w) float each
        - returns: (N, K, h', w') float, the size of C5

    Raises:
        ModelError: If there is no scale, or one below 1.

    Reference:
        Zhao et al., "Pyramid Scene Parsing Network", 2017, section 3.2 and figure 3.

    Deviations:
        Branches are `channels` wide, 512 by default, a quarter of C5 as in the paper for four scales. Pools
        are matrix products (see `pooling_matrix`), equal to adaptive average pooling.
    """

    def __init__(
        self,
        feature_channels: Sequence[int],
        *,
        num_classes: int,
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        norm: Norm = "batch",
        align_corners: bool = False,
    ) -> None:
        super().__init__(channels=channels, num_classes=num_classes, dropout=dropout)
        if not pool_scales or min(pool_scales) < 1:
            raise ModelError(
                "E-MODEL-010",
                f"pool scales {tuple(pool_scales)}; allowed one or more, each at least 1",
                fix="1,2,3,6",
            )
        self.pool_scales, self.align_corners = tuple(pool_scales), align_corners
        in_channels = feature_channels[3]
        self.branches = nn.ModuleList(ConvNormReLU(in_channels, channels, norm=norm) for _ in self.pool_scales)
        self.fuse = ConvNormReLU(in_channels + len(self.pool_scales) * channels, channels, kernel_size=3, norm=norm)

    @property
    def pools_to_one_pixel(self) -> bool:
        """Whether one of the grids has a single cell."""
        return 1 in self.pool_scales

    def fuse_features(self, features: Sequence[Tensor]) -> Tensor:
        """Pool C5 over the pyramid; see `DecodeHead.fuse_features`."""
        x = features[3]
        grids = pool_grids(x, self.pool_scales)
        pooled = [
            resize_features(branch(grid), size=x.shape[2:], align_corners=self.align_corners)
            for branch, grid in zip(self.branches, grids, strict=True)
        ]
        out: Tensor = self.fuse(torch.cat([x, *pooled], dim=1))
        return out
