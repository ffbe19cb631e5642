"""Against segmentation_models_pytorch: random weights and statistics, float64, no downloads."""

from __future__ import annotations

import re

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestseg.models.heads import ASPPHead
from nestseg.models.resnest import BACKBONES, ResNeSt

TOLERANCE = 1e-9
SMP_NAMES = {"resnest14": "tu-resnest14d", "resnest50": "tu-resnest50d"}
CASES = [
    pytest.param(name, stride, marks=[pytest.mark.slow] if name == "resnest50" else [])
    for name in SMP_NAMES
    for stride in (8, 16)
]

# Patterns of smp's keys and what they are called here. Its image pool is the last of the branches, as ours.
DEEPLABV3_KEYS = (
    (r"^encoder\.model\.", "backbone."),
    (r"^decoder\.aspp\.convs\.([0-3])\.0\.", r"decode_head.aspp.branches.\1.conv."),
    (r"^decoder\.aspp\.convs\.([0-3])\.1\.", r"decode_head.aspp.branches.\1.norm."),
    (r"^decoder\.aspp\.convs\.4\.1\.", "decode_head.aspp.image_pool.conv."),
    (r"^decoder\.aspp\.convs\.4\.2\.", "decode_head.aspp.image_pool.norm."),
    (r"^decoder\.aspp\.project\.0\.", "decode_head.aspp.fuse.0.conv."),
    (r"^decoder\.aspp\.project\.1\.", "decode_head.aspp.fuse.0.norm."),
    (r"^decoder\.conv\.", "decode_head.aspp.fuse.2.conv."),
    (r"^decoder\.bn\.", "decode_head.aspp.fuse.2.norm."),
    (r"^segmentation_head\.0\.", "decode_head.classifier."),
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_random(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(7)
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


def draw_image(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.std()) <= TOLERANCE


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        (name,) = {re.sub(pattern, name, key) for pattern, name in DEEPLABV3_KEYS if re.search(pattern, key)}
        renamed[name] = value
    assert len(renamed) == len(state)
    return renamed


@pytest.mark.parametrize(("name", "stride"), CASES)
@torch.no_grad()
def test_encoder_features_equal_ours_in_timms_variant(name, stride):
    theirs = make_random(smp.encoders.get_encoder(SMP_NAMES[name], weights=None, output_stride=stride))
    ours = ResNeSt(BACKBONES[name], output_stride=stride, dilation_variant="timm").double().eval()
    ours.load_state_dict({key.removeprefix("model."): value for key, value in theirs.state_dict().items()})
    image = draw_image(65, 97)
    # theirs begin with the image and the stem
    for mine, reference in zip(ours(image), theirs(image)[2:], strict=True):
        assert_equal(mine, reference)


@pytest.mark.parametrize(("name", "stride"), CASES)
@torch.no_grad()
def test_deeplabv3_equals_ours_with_the_projected_fusion_by_a_map_of_keys(name, stride):
    theirs = smp.DeepLabV3(SMP_NAMES[name], encoder_weights=None, encoder_output_stride=stride, classes=7)
    make_random(theirs)
    rates = [conv.dilation[0] for conv in theirs.decoder.aspp.modules() if isinstance(conv, nn.Conv2d)][1:4]
    assert rates == [12, 24, 36]
    backbone = ResNeSt(BACKBONES[name], output_stride=stride, dilation_variant="timm")
    head = ASPPHead(backbone.feature_channels, num_classes=7, channels=256, atrous_rates=rates, fusion="projected")
    ours = nn.ModuleDict({"backbone": backbone, "decode_head": head}).double().eval()
    ours.load_state_dict(rename(theirs.state_dict()))
    image = draw_image(64, 96)
    logits = head(backbone(image))
    assert logits.shape == (1, 7, 64 // stride, 96 // stride)
    # theirs upsamples in the model, with corners aligned
    upsampled = F.interpolate(logits, scale_factor=stride, mode="bilinear", align_corners=True)
    assert_equal(upsampled, theirs(image))


@torch.no_grad()
def test_a_rotated_fusion_would_be_noticed():
    theirs = make_random(smp.DeepLabV3("tu-resnest14d", encoder_weights=None, classes=7))
    head = ASPPHead((256, 512, 1024, 2048), num_classes=7, channels=256, fusion="projected").double().eval()
    state = {
        key.removeprefix("decode_head."): value
        for key, value in rename(theirs.state_dict()).items()
        if key.startswith("decode_head.")
    }
    features = theirs.encoder(draw_image(64, 96))[2:]
    reference = theirs.segmentation_head[0](theirs.decoder(features))
    head.load_state_dict(state)
    assert_equal(head(features), reference)
    weight = state["aspp.fuse.0.conv.weight"]
    head.load_state_dict({**state, "aspp.fuse.0.conv.weight": weight.roll(256, dims=1)})
    assert float((head(features) - reference).abs().max() / reference.std()) > 0.1
