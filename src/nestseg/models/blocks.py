"""Small parts of backbones and heads: convolutions, norms, split attention, pooling by matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestseg.core.errors import ModelError, nearest
from nestseg.core.types import Norm

_MAX_GROUPS = 32
_MIN_GROUP_CHANNELS = 16


@final
class FrozenBatchNorm2d(nn.Module):
    """BatchNorm whose statistics and affine weights never change, in training mode either.

    Everything is a buffer, so that no optimizer sees it; state-dict keys are those of `nn.BatchNorm2d`.

    Args:
        num_features: Channels C.
        eps: Added to the variance.

    Shape:
        - input: (N, C, H, W) float
        - returns: (N, C, H, W) float

    Reference:
        Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 2 (inference).

    Deviations:
        None known.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        # Weight compat: BatchNorm2d saves this counter, and checkpoints are loaded strictly.
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise by the stored statistics."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )

    def extra_repr(self) -> str:
        """Say channels and epsilon when printed."""
        return f"{self.num_features}, eps={self.eps}"


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """Build a normalisation layer with weight 1 and bias 0.

    Args:
        norm: The kind of layer.
        channels: Channels C.

    Returns:
        A module that maps (N, C, H, W) to (N, C, H, W).

    Raises:
        ModelError: If the kind is unknown.

    Reference:
        Wu and He, "Group Normalization", 2018, table 3: 32 groups and 16 channels a group do equally well.

    Deviations:
        The paper fixes the number of groups *or* the channels a group. We take the largest divisor of C that
        is at most 32 and leaves at least 16 channels a group: with one channel a group the 1x1 features of
        split attention would be normalised over one value each, which makes them constant.

    Example:
        >>> make_norm("group", 512).num_groups, make_norm("group", 48).num_groups
        (32, 3)
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "frozen_batch":
        return FrozenBatchNorm2d(channels)
    if norm == "group":
        most = max(1, min(_MAX_GROUPS, channels // _MIN_GROUP_CHANNELS))
        return nn.GroupNorm(max(g for g in range(1, most + 1) if channels % g == 0), channels)
    raise ModelError(
        "E-MODEL-001",
        f"unknown norm {norm!r}; {nearest(norm, get_args(Norm))}",
        fix="choose one of these norms",
    )


def make_conv(
    in_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 1,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv2d:
    """Build a convolution with "same" padding and He-normal weights (fan out, ReLU gain), bias 0.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the square kernel, odd.
        stride: Step in both directions.
        dilation: Distance between kernel taps.
        groups: Groups that channels are split into.
        bias: Whether to add a bias.

    Returns:
        The convolution; an input of height H comes out at ceil(H / stride).

    Raises:
        ModelError: If there is no input or output channel.

    Reference:
        He et al., "Delving Deep into Rectifiers", 2015, equation 14.

    Deviations:
        `nn.init.kaiming_normal_` and the authors' code count the outputs of all groups; we count those of
        one, since an input channel feeds one group only. Otherwise a depthwise 3x3 on 512 channels would
        start 22 times too small. The authors leave the biases of split attention at PyTorch's uniform
        default; ours are 0.
    """
    if min(in_channels, out_channels) < 1:
        raise ModelError(
            "E-MODEL-007",
            f"convolution of {in_channels} to {out_channels} channels; allowed 1 or more",
            fix="heads are usually 512 wide, the shortcut of deeplabv3plus 48",
        )
    conv = nn.Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=dilation * (kernel_size // 2),
        dilation=dilation,
        groups=groups,
        bias=bias,
    )
    fan_out = kernel_size * kernel_size * out_channels // groups
    nn.init.normal_(conv.weight, std=(2.0 / fan_out) ** 0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


@final
class ConvNormReLU(nn.Module):
    """Convolution without bias, norm, ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the square kernel, odd.
        dilation: Distance between kernel taps.
        groups: Groups that channels are split into.
        norm: Kind of norm.

    Shape:
        - input: (N, C, H, W) float
        - returns: (N, C', H, W) float, at least 0

    Reference:
        Ioffe and Szegedy, "Batch Normalization", 2015, section 3.2.

    Deviations:
        None known.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        self.conv = make_conv(in_channels, out_channels, kernel_size=kernel_size, dilation=dilation, groups=groups)
        self.norm = make_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, clip at 0."""
        # In place is safe: no norm layer keeps its output for the backward pass.
        return F.relu_(self.norm(self.conv(x)))


@final
class SeparableConv(nn.Module):
    """Depthwise 3x3 and pointwise 1x1 convolution, each followed by norm and ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        dilation: Distance between the taps of the depthwise kernel.
        norm: Kind of norm.

    Shape:
        - input: (N, C, H, W) float
        - returns: (N, C', H, W) float, at least 0

    Reference:
        Chen et al., "Encoder-Decoder with Atrous Separable Convolution" (DeepLabV3+), 2018, section 3.1.

    Deviations:
        None known.
    """

    def __init__(self, in_channels: int, out_channels: int, *, dilation: int = 1, norm: Norm = "batch") -> None:
        super().__init__()
        self.depthwise = ConvNormReLU(
            in_channels, in_channels, kernel_size=3, dilation=dilation, groups=in_channels, norm=norm
        )
        self.pointwise = ConvNormReLU(in_channels, out_channels, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        """Filter each channel, then mix the channels."""
        out: Tensor = self.pointwise(self.depthwise(x))
        return out


@final
class SplitAttention(nn.Module):
    """Grouped 3x3 convolution into `radix` splits and an attention-weighted sum over the splits.

    Attribute names are those of the authors' checkpoints (weight compat). After ``bn0`` channels are
    radix-major; the attention logits come out of ``fc2`` as (cardinality, radix, C / cardinality).

    Args:
        channels: Channels C of input and output.
        radix: Number of splits; with 1 the attention is a sigmoid gate (squeeze and excitation).
        cardinality: Groups that channels are split into.
        dilation: Distance between kernel taps.
        norm: Kind of norm. ``bn1`` sees 1x1 features, so that ``batch`` cannot train on a batch of one.

    Shape:
        - input: (N, C, H, W) float
        - returns: (N, C, H, W) float, at least 0

    Reference:
        Zhang et al., "ResNeSt: Split-Attention Networks", 2020, section 3.1, equations 1-3, and figure 2.

    Deviations:
        The mean is taken before the sum over splits, and two splits are mixed by one linear interpolation
        (their weights add up to 1): the same function, with fewer passes over memory.
    """

    def __init__(
        self, channels: int, *, radix: int, cardinality: int = 1, dilation: int = 1, norm: Norm = "batch"
    ) -> None:
        super().__init__()
        self.radix, self.cardinality = radix, cardinality
        hidden = max(channels * radix // 4, 32)
        self.conv = make_conv(channels, channels * radix, kernel_size=3, dilation=dilation, groups=cardinality * radix)
        self.bn0 = make_norm(norm, channels * radix)
        self.fc1 = make_conv(channels, hidden, groups=cardinality, bias=True)
        self.bn1 = make_norm(norm, hidden)
        self.fc2 = make_conv(hidden, channels * radix, groups=cardinality, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve into splits, weigh each by what all of them see on average, and add up."""
        x = F.relu_(self.bn0(self.conv(x)))
        channels = x.shape[1] // self.radix
        pooled = x.mean((2, 3)).view(-1, self.radix, channels).sum(1)[:, :, None, None]
        logits: Tensor = self.fc2(F.relu_(self.bn1(self.fc1(pooled))))
        if self.radix == 1:
            return x * logits.sigmoid().to(x.dtype)
        # Autocast gives a float32 softmax: bring it back, or the large features would follow it.
        weights = logits.view(-1, self.cardinality, self.radix, channels // self.cardinality)
        weights = weights.transpose(1, 2).softmax(1).flatten(2).to(x.dtype)[..., None, None]
        splits = x.chunk(self.radix, 1)
        if self.radix == 2:
            return torch.lerp(splits[1], splits[0], weights[:, 0])
        out = splits[0] * weights[:, 0]
        for index in range(1, self.radix):
            out = torch.addcmul(out, splits[index], weights[:, index])
        return out


def pooling_matrix(length: int, bins: int, *, like: Tensor) -> Tensor:
    """Build the matrix that averages a line of `length` values into `bins` windows.

    Window i covers floor(i * length / bins) up to but not including ceil((i + 1) * length / bins). These are
    the windows of `F.adaptive_avg_pool2d`, whose backward pass is not deterministic on CUDA and whose export
    asks for sizes that the bins divide.

    Args:
        length: Number of values.
        bins: Number of windows.
        like: Tensor that gives dtype and device.

    Returns:
        The matrix; its rows add up to 1.

    Shape:
        - like: any
        - returns: (bins, length) float

    Reference:
        Zhao et al., "Pyramid Scene Parsing Network", 2017, section 3.2 (the pooling that it is used for).

    Deviations:
        None known.

    Example:
        >>> pooling_matrix(3, 2, like=torch.zeros(()))
        tensor([[0.5000, 0.5000, 0.0000],
                [0.0000, 0.5000, 0.5000]])
    """
    place = torch.arange(length, device=like.device)
    window = torch.arange(bins, device=like.device)[:, None]
    start = (window * length) // bins
    end = ((window + 1) * length + bins - 1) // bins
    inside = (place >= start) & (place < end)
    return inside.to(like.dtype) / (end - start).to(like.dtype)


def pool_grids(x: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Average feature maps over grids of several sizes; equal to `F.adaptive_avg_pool2d` for each.

    Args:
        x: Features.
        scales: Side of each grid.

    Returns:
        One pooled map a scale.

    Shape:
        - x: (N, C, H, W) float
        - returns: for each scale s (N, C, s, s) float

    Reference:
        Zhao et al., "Pyramid Scene Parsing Network", 2017, section 3.2.

    Deviations:
        None known.
    """
    height, width = x.shape[2:]
    matrices = [
        pooling_matrix(height, scale, like=x)[:, None, :, None] * pooling_matrix(width, scale, like=x)[:, None]
        for scale in scales
    ]
    # One product for all scales reads the features once, in whatever memory format they are.
    cells = x.flatten(2) @ torch.cat([m.reshape(-1, height * width) for m in matrices]).T
    grids = torch.split(cells, [scale * scale for scale in scales], dim=2)
    return [grid.reshape(*x.shape[:2], scale, scale) for scale, grid in zip(scales, grids, strict=True)]


def resize_features(x: Tensor, *, size: Sequence[int], align_corners: bool) -> Tensor:
    """Resize feature maps bilinearly; a map of one pixel is repeated without copying it.

    Args:
        x: Features or logits.
        size: (height, width) of the result.
        align_corners: Whether corner pixels' centres stay at the corners.

    Returns:
        The resized maps; of a one-pixel map a view that must not be written to.

    Shape:
        - x: (N, C, h, w) float
        - returns: (N, C, height, width) float
    """
    if x.shape[2] == 1 and x.shape[3] == 1:
        return x.expand(-1, -1, size[0], size[1])
    return F.interpolate(x, size=(size[0], size[1]), mode="bilinear", align_corners=align_corners)
