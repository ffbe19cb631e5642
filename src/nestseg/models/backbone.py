"""What every backbone has: four feature maps, their channels, the stride of the last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn

from nestseg.core.types import OutputStride


class Backbone(nn.Module, ABC):
    """An image to the features C2..C5.

    Attributes:
        feature_channels: Channels of C2..C5.
        output_stride: Stride of C5 with respect to the image.
        in_channels: Channels of the image.

    Shape:
        - input: (N, in_channels, H, W) float, normalised; any H and W
        - returns: C2..C5, (N, C, ceil(H / s), ceil(W / s)) float, s = 4, 8, 16, 32 but at most output_stride

    Reference:
        Lin et al., "Feature Pyramid Networks", 2017, section 3 (the names C2..C5).

    Deviations:
        None known.
    """

    feature_channels: tuple[int, int, int, int]
    output_stride: OutputStride
    in_channels: int

    @abstractmethod
    def one_pixel_norms(self) -> Iterator[nn.Module]:
        """Find the norms that see features pooled to one pixel, on which BatchNorm cannot train with a batch of one."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Extract the features.

        Args:
            x: The normalised image.

        Returns:
            C2..C5.

        Shape:
            - x: (N, in_channels, H, W) float
            - returns: (N, C, h, w) float each
        """
