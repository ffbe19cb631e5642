"""Heads against torchvision's: random weights and statistics, float64, no downloads."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead as TorchvisionFCNHead

from nestseg.models.heads import ASPPHead, FCNHead

CHANNELS = (24, 40, 56, 72)
TOLERANCE = 1e-9

# Patterns of torchvision's keys and what they are called here; its image pool is the last of the branches, as ours.
DEEPLABV3_KEYS = (
    (r"^0\.convs\.([0-3])\.0\.", r"aspp.branches.\1.conv."),
    (r"^0\.convs\.([0-3])\.1\.", r"aspp.branches.\1.norm."),
    (r"^0\.convs\.4\.1\.", "aspp.image_pool.conv."),
    (r"^0\.convs\.4\.2\.", "aspp.image_pool.norm."),
    (r"^0\.project\.0\.", "aspp.fuse.0.conv."),
    (r"^0\.project\.1\.", "aspp.fuse.0.norm."),
    (r"^1\.", "aspp.fuse.2.conv."),
    (r"^2\.", "aspp.fuse.2.norm."),
    (r"^4\.", "classifier."),
)
FCN_KEYS = ((r"^0\.", "convs.0.conv."), (r"^1\.", "convs.0.norm."), (r"^4\.", "classifier."))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_random(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(11)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=draw)
            module.bias.data.normal_(0, 0.3, generator=draw)
            module.running_mean.normal_(0, 0.3, generator=draw)
            module.running_var.uniform_(0.5, 2.0, generator=draw)
        elif isinstance(module, nn.Conv2d):
            module.weight.data.normal_(0, module.weight[0].numel() ** -0.5, generator=draw)
            if module.bias is not None:
                module.bias.data.normal_(0, 1, generator=draw)
    return model.double().eval()


def draw_features(height: int, width: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(13)
    return [
        torch.randn(2, channels, height, width, dtype=torch.float64, generator=draw).relu() for channels in CHANNELS
    ]


def rename(state: dict[str, Tensor], keys: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        (name,) = {re.sub(pattern, name, key) for pattern, name in keys if re.search(pattern, key)}
        renamed[name] = value
    assert len(renamed) == len(state)
    return renamed


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.std()) <= TOLERANCE


@pytest.mark.parametrize("rates", [(12, 24, 36), (6, 12, 18), (2, 3, 5)])
@pytest.mark.parametrize("size", [(13, 9), (1, 1)])
@torch.no_grad()
def test_deeplabv3_equals_the_aspp_head_with_the_projected_fusion(rates, size):
    theirs = make_random(DeepLabHead(CHANNELS[3], 7, atrous_rates=rates))
    ours = ASPPHead(CHANNELS, num_classes=7, channels=256, atrous_rates=rates, fusion="projected").double().eval()
    ours.load_state_dict(rename(theirs.state_dict(), DEEPLABV3_KEYS))
    features = draw_features(*size)
    assert_equal(ours(features), theirs(features[3]))


@pytest.mark.parametrize("feature_index", [2, 3])
@torch.no_grad()
def test_fcn_equals_the_fcn_head_of_one_convolution_a_quarter_as_wide_as_its_input(feature_index):
    in_channels = CHANNELS[feature_index]
    theirs = make_random(TorchvisionFCNHead(in_channels, 7))
    ours = FCNHead(CHANNELS, num_classes=7, channels=in_channels // 4, num_convs=1, feature_index=feature_index)
    ours.double().eval().load_state_dict(rename(theirs.state_dict(), FCN_KEYS))
    features = draw_features(13, 9)
    assert_equal(ours(features), theirs(features[feature_index]))


def test_gradients_in_training_mode_equal_torchvisions():
    theirs = make_random(DeepLabHead(CHANNELS[3], 7, atrous_rates=(2, 3, 5))).train()
    ours = ASPPHead(CHANNELS, num_classes=7, channels=256, atrous_rates=(2, 3, 5), fusion="projected", dropout=0.0)
    ours.double().train().load_state_dict(rename(theirs.state_dict(), DEEPLABV3_KEYS))
    # torchvision drops single values, we drop channels: not comparable, so neither does here
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0
    features = draw_features(13, 9)
    weight = torch.randn(2, 7, 13, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (ours(features) * weight).sum().backward()
    (theirs(features[3]) * weight).sum().backward()
    gradients = rename({key: value.grad for key, value in theirs.named_parameters()}, DEEPLABV3_KEYS)
    for key, parameter in ours.named_parameters():
        scale = gradients[key].abs().max() + weight.numel() ** 0.5
        assert float((parameter.grad - gradients[key]).abs().max() / scale) <= TOLERANCE, key
