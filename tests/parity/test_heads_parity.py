"""Heads against their mathematics written out with functional calls on the state dict, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestseg.models.heads import HEADS, ASPPHead, DecodeHead, FCNHead, PSPHead, SeparableASPPHead

CHANNELS = (24, 40, 56, 72)
WIDTH, CLASSES = 32, 7
TOLERANCE = 1e-9

State = dict[str, Tensor]


def make_random(head: DecodeHead) -> DecodeHead:
    draw = torch.Generator().manual_seed(11)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=draw)
            module.bias.data.normal_(0, 0.3, generator=draw)
            module.running_mean.normal_(0, 0.3, generator=draw)
            module.running_var.uniform_(0.5, 2.0, generator=draw)
        elif isinstance(module, nn.Conv2d):
            module.weight.data.normal_(0, module.weight[0].numel() ** -0.5, generator=draw)
            if module.bias is not None:
                module.bias.data.normal_(0, 1, generator=draw)
    return head.double().eval()


def draw_features(height: int = 13, width: int = 9) -> list[Tensor]:
    draw = torch.Generator().manual_seed(13)
    sizes = [(2 * height - 1, 2 * width), (height, width), (height, width), (height, width)]
    return [
        torch.randn(2, channels, *size, dtype=torch.float64, generator=draw).relu()
        for channels, size in zip(CHANNELS, sizes, strict=True)
    ]


def conv_norm_relu(x: Tensor, state: State, key: str, *, rate: int = 1) -> Tensor:
    weight = state[f"{key}.conv.weight"]
    groups = x.shape[1] // weight.shape[1]
    x = F.conv2d(x, weight, padding=rate * (weight.shape[2] // 2), dilation=rate, groups=groups)
    mean, var = state[f"{key}.norm.running_mean"], state[f"{key}.norm.running_var"]
    scale = state[f"{key}.norm.weight"] / (var + 1e-5).sqrt()
    shift = state[f"{key}.norm.bias"] - mean * scale
    return (x * scale[:, None, None] + shift[:, None, None]).clamp(min=0)


def separable(x: Tensor, state: State, key: str, *, rate: int = 1) -> Tensor:
    x = conv_norm_relu(x, state, f"{key}.depthwise", rate=rate)
    return conv_norm_relu(x, state, f"{key}.pointwise")


def upsample(x: Tensor, like: Tensor, *, align_corners: bool = False) -> Tensor:
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=align_corners)


def classify(x: Tensor, state: State) -> Tensor:
    return F.conv2d(x, state["classifier.weight"], state["classifier.bias"])


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.std()) <= TOLERANCE


@pytest.mark.parametrize("concat_input", [False, True])
@torch.no_grad()
def test_fcn_is_two_convolutions_on_c5_and_with_concat_input_a_third_on_both(concat_input):
    head = make_random(FCNHead(CHANNELS, num_classes=CLASSES, channels=WIDTH, concat_input=concat_input))
    features, state = draw_features(), head.state_dict()
    x = conv_norm_relu(features[3], state, "convs.0")
    x = conv_norm_relu(x, state, "convs.1")
    if concat_input:
        x = conv_norm_relu(torch.cat([features[3], x], 1), state, "fuse")
    assert_equal(head(features), classify(x, state))


@torch.no_grad()
def test_the_auxiliary_head_is_one_convolution_on_c4():
    head = make_random(FCNHead(CHANNELS, num_classes=CLASSES, channels=WIDTH, num_convs=1, feature_index=2))
    features, state = draw_features(), head.state_dict()
    assert_equal(head(features), classify(conv_norm_relu(features[2], state, "convs.0"), state))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(13, 9), (6, 12), (4, 5), (1, 1)])
@torch.no_grad()
def test_psp_pools_adaptively_over_every_scale_also_where_bins_do_not_divide(size, align_corners):
    head = make_random(PSPHead(CHANNELS, num_classes=CLASSES, channels=WIDTH, align_corners=align_corners))
    features, state = draw_features(*size), head.state_dict()
    c5 = features[3]
    parts = [c5]
    for i, scale in enumerate((1, 2, 3, 6)):
        pooled = conv_norm_relu(F.adaptive_avg_pool2d(c5, scale), state, f"branches.{i}")
        parts.append(upsample(pooled, c5, align_corners=align_corners))
    x = conv_norm_relu(torch.cat(parts, 1), state, "fuse")
    assert_equal(head(features), classify(x, state))


def aspp_by_hand(c5: Tensor, state: State, rates: tuple[int, ...], *, with_separable: bool) -> Tensor:
    branch = separable if with_separable else conv_norm_relu
    parts = [conv_norm_relu(c5, state, "aspp.branches.0")]
    parts += [branch(c5, state, f"aspp.branches.{i}", rate=rate) for i, rate in enumerate(rates, start=1)]
    pooled = conv_norm_relu(F.adaptive_avg_pool2d(c5, 1), state, "aspp.image_pool")
    return conv_norm_relu(torch.cat([*parts, upsample(pooled, c5)], 1), state, "aspp.fuse")


@pytest.mark.parametrize("rates", [(2, 4, 6), (12, 24, 36)])
@torch.no_grad()
def test_deeplabv3_is_aspp_with_the_image_pool_last(rates):
    head = make_random(ASPPHead(CHANNELS, num_classes=CLASSES, channels=WIDTH, atrous_rates=rates))
    features, state = draw_features(), head.state_dict()
    assert_equal(head(features), classify(aspp_by_hand(features[3], state, rates, with_separable=False), state))


@pytest.mark.parametrize("align_corners", [False, True])
@torch.no_grad()
def test_deeplabv3plus_refines_separable_aspp_at_the_size_of_c2(align_corners):
    head = make_random(
        SeparableASPPHead(
            CHANNELS,
            num_classes=CLASSES,
            channels=WIDTH,
            atrous_rates=(2, 4, 6),
            shortcut_channels=6,
            align_corners=align_corners,
        )
    )
    features, state = draw_features(), head.state_dict()
    coarse = aspp_by_hand(features[3], state, (2, 4, 6), with_separable=True)
    coarse = upsample(coarse, features[0], align_corners=align_corners)
    x = torch.cat([coarse, conv_norm_relu(features[0], state, "shortcut")], 1)
    x = separable(separable(x, state, "refine.0"), state, "refine.1")
    assert_equal(head(features), classify(x, state))


def test_every_head_of_the_table_is_covered_here():
    assert set(HEADS.values()) == {FCNHead, PSPHead, ASPPHead, SeparableASPPHead}
