"""The fully convolutional head, also the auxiliary head of every segmentor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from nestseg.core.errors import ModelError
from nestseg.core.types import Norm
from nestseg.models.blocks import ConvNormReLU
from nestseg.models.heads.base import DecodeHead


@final
class FCNHead(DecodeHead):
    """3x3 convolutions on one feature map, then the classifier.

    Args:
        feature_channels: Channels of C2..C5.
        num_classes: Classes K, 1 to 255.
        channels: Width of the convolutions.
        num_convs: Number of 3x3 convolutions, 1 or more.
        concat_input: Whether the input joins their output, fused by one more 3x3 convolution.
        feature_index: Which feature map: 0 is C2, 3 is C5. Auxiliary heads take C4.
        dropout: Probability of dropping a channel before the classifier.
        norm: Kind of norm.

    Shape:
        - features: C2..C5, (N, C, h, w) float each
        - returns: (N, K, h', w') float, the size of the chosen map

    Raises:
        ModelError: If the number of convolutions is below 1.

    Reference:
        Long et al., "Fully Convolutional Networks", 2015, section 3; as an auxiliary head: Zhao et al.,
        "Pyramid Scene Parsing Network", 2017, section 3.3.

    Deviations:
        Long et al. classify C5 directly and add finer maps; 3x3 convolutions on dilated features are what the
        toolboxes do. mmsegmentation sets ``concat_input`` in the main head and 256 channels in the auxiliary.
    """

    def __init__(
        self,
        feature_channels: Sequence[int],
        *,
        num_classes: int,
        channels: int = 512,
        num_convs: int = 2,
        concat_input: bool = False,
        feature_index: int = 3,
        dropout: float = 0.1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(channels=channels, num_classes=num_classes, dropout=dropout)
        if num_convs < 1:
            raise ModelError("E-MODEL-009", f"{num_convs} convolutions in an FCN head; allowed 1 or more", fix="give 2")
        self.feature_index = feature_index
        in_channels = feature_channels[feature_index]
        self.convs = nn.Sequential(
            *(
                ConvNormReLU(in_channels if i == 0 else channels, channels, kernel_size=3, norm=norm)
                for i in range(num_convs)
            )
        )
        self.fuse = ConvNormReLU(in_channels + channels, channels, kernel_size=3, norm=norm) if concat_input else None

    @property
    def pools_to_one_pixel(self) -> bool:
        """False: there is no pooled branch."""
        return False

    def fuse_features(self, features: Sequence[Tensor]) -> Tensor:
        """Convolve one of the maps; see `DecodeHead.fuse_features`."""
        x = features[self.feature_index]
        out: Tensor = self.convs(x)
        if self.fuse is not None:
            out = self.fuse(torch.cat([x, out], dim=1))
        return out
