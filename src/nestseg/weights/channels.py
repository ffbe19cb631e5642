"""Weights of RGB images for images of another number of channels."""

from __future__ import annotations

from torch import Tensor

from nestseg.core.errors import WeightsError


def adapt_first_convolution(weight: Tensor, in_channels: int) -> Tensor:
    """Make the filters of a first convolution for RGB fit another number of channels.

    For one channel the three filters are added up: grey that is repeated over RGB gives the same features. For any
    other number the filters of red, green and blue take turns, times 3 / in_channels: a picture whose channels are all
    alike gives about the features that it gave as RGB, and exactly those where in_channels is a multiple of 3.

    Args:
        weight: Filters for RGB; a half is computed in float32.
        in_channels: Channels of the image.

    Returns:
        The filters, in the type given; ``weight`` itself for three channels.

    Shape:
        - weight: (O, 3, h, w) float
        - returns: (O, in_channels, h, w) float

    Raises:
        WeightsError: If the filters are not for three channels.

    Reference:
        timm, ``adapt_input_conv``, which this equals for networks with a convolution on RGB.

    Deviations:
        None known.
    """
    if weight.ndim != 4 or weight.shape[1] != 3:
        raise WeightsError(
            "E-WEIGHTS-090",
            f"first convolution of shape {tuple(weight.shape)}; only one for RGB can be made to fit {in_channels}",
            fix=f"start from weights for RGB or for {in_channels} channels, or set backbone.pretrained=none",
        )
    if in_channels == 3:
        return weight
    if in_channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    turns = [channel % 3 for channel in range(in_channels)]
    return (weight.float()[:, turns] * (3 / in_channels)).to(weight.dtype)
