"""Backbones against timm and the authors' package: random weights and statistics, float64, no downloads."""

from __future__ import annotations

import pytest
import timm
import torch
from resnest.torch import resnet as official
from torch import Tensor, nn

from nestseg.core.types import DilationVariant, OutputStride
from nestseg.models.resnest import BACKBONES, ResNeSt, ResNeStSpec

TIMM_NAMES = {
    "resnest14": "resnest14d",
    "resnest26": "resnest26d",
    "resnest50": "resnest50d",
    "resnest101": "resnest101e",
    "resnest50-fast-4s2x40d": "resnest50d_4s2x40d",
    "resnest50-fast-1s4x24d": "resnest50d_1s4x24d",
}
FAST = [name for name in BACKBONES if "fast" in name]
TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_random_backbone(name: str, *, stride: OutputStride, variant: DilationVariant = "plain") -> ResNeSt:
    model = ResNeSt(BACKBONES[name], output_stride=stride, dilation_variant=variant)
    draw = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5, generator=draw)
            module.bias.data.normal_(0, 0.3, generator=draw)
            module.running_mean.normal_(0, 0.3, generator=draw)
            module.running_var.uniform_(0.5, 2.0, generator=draw)
        elif isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, fan_in**-0.5, generator=draw)
            if module.bias is not None:
                module.bias.data.normal_(0, 1, generator=draw)
    return model.double().eval()


def make_official(spec: ResNeStSpec, *, stride: OutputStride) -> nn.Module:
    return official.ResNet(
        official.Bottleneck,
        list(spec.blocks),
        radix=spec.radix,
        groups=spec.cardinality,
        bottleneck_width=spec.group_width,
        deep_stem=True,
        stem_width=spec.stem_channels,
        avg_down=True,
        avd=True,
        avd_first=spec.pool_first,
        dilation={32: 1, 16: 2, 8: 4}[stride],
    )


def run_official(model: nn.Module, image: Tensor) -> list[Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(image))))
    features = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        x = stage(x)
        features.append(x)
    return features


def draw_image(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """In units of the reference's standard deviation; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.std())


def mark_slow(case: tuple[str, int, str]) -> list[pytest.MarkDecorator]:
    name, stride, variant = case
    fast = name == "resnest14" or ("fast" in name and stride == 8 and variant != "plain")
    return [] if fast else [pytest.mark.slow]


TIMM_CASES = [
    (name, stride, variant)
    for name in TIMM_NAMES
    for stride, variant in ((32, "plain"), (32, "official"), (32, "timm"), (16, "timm"), (8, "timm"))
]
OFFICIAL_CASES = [(name, stride, "official") for name in BACKBONES for stride in (8, 16, 32)]


@pytest.mark.parametrize(
    ("name", "stride", "variant"), [pytest.param(*case, marks=mark_slow(case)) for case in TIMM_CASES]
)
@torch.no_grad()
def test_every_feature_equals_timms_at_stride_32_in_all_variants_and_dilated_in_timms(name, stride, variant):
    ours = make_random_backbone(name, stride=stride, variant=variant)
    theirs = timm.create_model(
        TIMM_NAMES[name], pretrained=False, features_only=True, out_indices=(1, 2, 3, 4), output_stride=stride
    )
    theirs.load_state_dict(ours.state_dict())
    theirs.double().eval()
    image = draw_image(65, 97)
    for mine, reference in zip(ours(image), theirs(image), strict=True):
        assert largest_difference(mine, reference) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "stride", "variant"), [pytest.param(*case, marks=mark_slow(case)) for case in OFFICIAL_CASES]
)
@torch.no_grad()
def test_every_feature_equals_the_authors_in_the_official_variant(name, stride, variant):
    ours = make_random_backbone(name, stride=stride, variant=variant)
    theirs = make_official(BACKBONES[name], stride=stride)
    outcome = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert outcome.missing_keys == ["fc.weight", "fc.bias"]
    assert outcome.unexpected_keys == []
    theirs.double().eval()
    image = draw_image(49, 33)
    for mine, reference in zip(ours(image), run_official(theirs, image), strict=True):
        assert largest_difference(mine, reference) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "stride"),
    [("resnest14", 8), ("resnest14", 16), pytest.param("resnest50-fast-2s1x64d", 8, marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_the_three_variants_differ_by_percents_once_dilated_although_they_load_strictly(name, stride):
    features = {}
    for variant in ("plain", "official", "timm"):
        model = make_random_backbone(name, stride=stride)
        other = ResNeSt(BACKBONES[name], output_stride=stride, dilation_variant=variant).double().eval()
        other.load_state_dict(model.state_dict())
        features[variant] = other(draw_image(96, 128))[3]
    for one, two in (("plain", "official"), ("plain", "timm"), ("official", "timm")):
        relative = float((features[one] - features[two]).norm() / features[one].norm())
        assert 1e-3 < relative < 1, (one, two)


@torch.no_grad()
def test_the_plain_variant_is_the_authors_network_without_the_pools_of_dilated_stages():
    ours = make_random_backbone("resnest14", stride=8)
    theirs = make_official(BACKBONES["resnest14"], stride=8)
    for stage in (theirs.layer3, theirs.layer4):
        assert isinstance(stage[0].avd_layer, nn.AvgPool2d)
        stage[0].avd_layer = nn.Identity()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.double().eval()
    image = draw_image(49, 33)
    for mine, reference in zip(ours(image), run_official(theirs, image), strict=True):
        assert largest_difference(mine, reference) <= TOLERANCE


@pytest.mark.parametrize("name", FAST)
def test_fast_variants_have_the_authors_key_names_and_shapes(name):
    with torch.device("meta"):
        ours, theirs = ResNeSt(BACKBONES[name]), make_official(BACKBONES[name], stride=8)
    expected = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected


@pytest.mark.parametrize("radix_case", ["resnest14", "resnest50-fast-4s1x64d", "resnest50-fast-1s2x40d"])
def test_gradients_equal_the_authors_in_training_mode(radix_case):
    spec = BACKBONES[radix_case]._replace(blocks=(1, 1, 1, 1))
    ours = ResNeSt(spec, output_stride=8, dilation_variant="official").double()
    theirs = make_official(spec, stride=8).double()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    image = torch.cat([draw_image(33, 49), 2 * draw_image(33, 49).flip(3), draw_image(33, 49).flip(2)])
    weight = torch.randn(3, 2048, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (ours(image)[3] * weight).sum().backward()
    (run_official(theirs, image)[3] * weight).sum().backward()
    reference = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None
        scale = reference[key].grad.abs().max() + weight.numel() ** 0.5
        assert float((parameter.grad - reference[key].grad).abs().max() / scale) <= TOLERANCE, key
