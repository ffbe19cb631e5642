"""What every backbone has: four feature maps, their channels, the stride of the last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from torch import Tensor, nn

from nestseg.core.errors import ModelError
from nestseg.core.types import OutputStride
from nestseg.models.recompute import recompute_in_backward


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
    def blocks(self) -> Iterator[nn.Module]:
        """Find the parts that most of the network consists of, none inside another, for `checkpoint_activations`."""

    def checkpoint_activations(self) -> None:
        """Train with less memory: compute the inside of every block again in the backward pass.

        Costs a second forward pass; what is learnt stays the same to the last bit, see `recompute_in_backward`.

        Raises:
            ModelError: If there are no blocks.
        """
        blocks = list(self.blocks())
        if not blocks:
            raise ModelError(
                "E-MODEL-060",
                "activation checkpointing for a backbone that is not made of blocks",
                fix="compute.activation_checkpointing=false, or another backbone",
            )
        for block in blocks:
            recompute_in_backward(block)

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
