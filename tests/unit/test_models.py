"""Building blocks by hand, parameter counts, initial weights, errors and warnings of the models."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestseg.core.errors import ModelError
from nestseg.models.blocks import (
    FrozenBatchNorm2d,
    SeparableConv,
    SplitAttention,
    make_conv,
    make_norm,
    pool_grids,
    pooling_matrix,
    resize_features,
)
from nestseg.models.heads import ASPPHead, FCNHead, PSPHead, SeparableASPPHead
from nestseg.models.heads.aspp import ATROUS_RATES
from nestseg.models.resnest import BACKBONES, ResNeSt
from nestseg.models.segmenter import BatchNormWarning, Segmenter, count_parameters, create_model

CHANNELS = (256, 512, 1024, 2048)
SEGMENTORS = ["fcn", "pspnet", "deeplabv3", "deeplabv3plus"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_small(segmentor: str = "fcn", **options) -> Segmenter:
    torch.manual_seed(0)
    defaults = {"num_classes": 5, "output_stride": 32, "head_channels": 32, "auxiliary": False}
    return create_model(segmentor, "resnest14", **{**defaults, **options})


def black(batch_size: int, *, channels: int = 3) -> Tensor:
    return torch.zeros(batch_size, channels, 33, 33, dtype=torch.uint8)


# Parameter counts


@pytest.mark.parametrize(
    ("name", "millions", "with_classifier"),
    [
        ("resnest14", 8.56, 10.61),
        ("resnest26", 15.02, 17.07),
        ("resnest50", 25.43, 27.48),
        ("resnest101", 46.23, 48.28),
        ("resnest200", 68.15, 70.20),
        ("resnest269", 108.88, 110.93),
    ],
)
def test_backbones_have_the_published_number_of_parameters(name, millions, with_classifier):
    with torch.device("meta"):
        count = count_parameters(ResNeSt(BACKBONES[name]))
    assert round(count / 1e6, 2) == millions
    assert round((count + 2048 * 1000 + 1000) / 1e6, 2) == with_classifier


@pytest.mark.parametrize(
    ("variant", "with_classifier"),
    [
        ("1s1x64d", 26.2),
        ("2s1x64d", 27.5),
        ("4s1x64d", 31.9),
        ("1s2x40d", 25.9),
        ("2s2x40d", 26.9),
        ("4s2x40d", 30.4),
        ("1s4x24d", 25.7),
    ],
)
def test_fast_backbones_have_the_published_number_of_parameters(variant, with_classifier):
    with torch.device("meta"):
        count = count_parameters(ResNeSt(BACKBONES[f"resnest50-fast-{variant}"]))
    assert round((count + 2048 * 1000 + 1000) / 1e6, 1) == with_classifier


@pytest.mark.parametrize(
    ("segmentor", "millions"),
    [
        ("fcn", {21: 62.77, 150: 62.90, 19: 62.76}),
        ("pspnet", {21: 74.04, 150: 74.17, 19: 74.04}),
        ("deeplabv3", {21: 93.18, 150: 93.31, 19: 93.18}),
        ("deeplabv3plus", {21: 68.66, 150: 68.79, 19: 68.65}),
    ],
)
def test_segmenters_have_the_published_number_of_parameters(segmentor, millions):
    for num_classes, expected in millions.items():
        with torch.device("meta"):
            large = count_parameters(create_model(segmentor, "resnest101", num_classes=num_classes))
            small = count_parameters(create_model(segmentor, "resnest50", num_classes=num_classes))
        assert round(large / 1e6, 2) == expected
        assert large - small == 20_791_776


# Blocks


@pytest.mark.parametrize(
    ("channels", "groups"),
    [(8, 1), (16, 1), (32, 2), (48, 3), (64, 4), (128, 8), (304, 19), (512, 32), (560, 28), (2048, 32)],
)
def test_group_norm_has_at_most_32_groups_that_divide_and_at_least_16_channels_each(channels, groups):
    norm = make_norm("group", channels)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups


def test_group_norm_does_not_make_features_of_one_pixel_constant():
    norm = make_norm("group", 32)
    assert norm(torch.randn(1, 32, 1, 1)).std() > 0.5


def test_frozen_batch_norm_has_the_keys_and_values_of_batch_norm_in_evaluation():
    reference, frozen = nn.BatchNorm2d(6), FrozenBatchNorm2d(6)
    with torch.no_grad():
        for value in (reference.weight, reference.bias, reference.running_mean, reference.running_var):
            value.uniform_(0.5, 2)
    frozen.load_state_dict(reference.state_dict())
    x = torch.randn(2, 6, 3, 4)
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    torch.testing.assert_close(frozen.train()(x), reference.eval()(x))
    assert list(frozen.parameters()) == []
    assert list(before) == list(reference.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 13, 64, 97])
@pytest.mark.parametrize("bins", [1, 2, 3, 6, 8])
def test_pooling_matrices_are_adaptive_average_pooling(length, bins):
    line = torch.randn(4, length, dtype=torch.float64)
    pooled = line @ pooling_matrix(length, bins, like=line).T
    torch.testing.assert_close(pooled, F.adaptive_avg_pool1d(line, bins), rtol=0, atol=1e-14)


def test_grids_of_several_scales_and_their_gradient_are_those_of_adaptive_average_pooling():
    x = torch.randn(2, 3, 7, 11, dtype=torch.float64, requires_grad=True)
    ours = pool_grids(x, (1, 2, 3, 6))
    theirs = [F.adaptive_avg_pool2d(x, scale) for scale in (1, 2, 3, 6)]
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-14)
    mine, reference = (
        torch.autograd.grad(sum(part.square().sum() for part in parts), x)[0] for parts in (ours, theirs)
    )
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-14)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 4)])
def test_resizing_equals_bilinear_interpolation_also_from_one_pixel(size, align_corners):
    x = torch.randn(2, 3, *size)
    ours = resize_features(x, size=(5, 7), align_corners=align_corners)
    theirs = F.interpolate(x, (5, 7), mode="bilinear", align_corners=align_corners)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 8), (8, 5), (7, 9), (6, 4)])
def test_the_shortcut_pool_equals_ceil_mode_pooling_to_the_last_bit(size):
    pool = ResNeSt(BACKBONES["resnest14"], output_stride=32).layer2[0].downsample[0]
    x = torch.randn(2, 3, *size)
    expected = F.avg_pool2d(x, 2, stride=2, ceil_mode=True, count_include_pad=False)
    assert torch.equal(pool(x), expected)


@pytest.mark.parametrize(("radix", "cardinality"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2), (1, 4)])
@torch.no_grad()
def test_split_attention_is_the_weighted_sum_of_its_splits(radix, cardinality):
    torch.manual_seed(1)
    channels = 16
    block = SplitAttention(channels, radix=radix, cardinality=cardinality).double().eval()
    x = torch.randn(3, channels, 5, 6, dtype=torch.float64)
    splits = F.relu(block.bn0(block.conv(x))).unflatten(1, (radix, channels))
    pooled = splits.sum(1).mean((2, 3))[:, :, None, None]
    logits = block.fc2(F.relu(block.bn1(block.fc1(pooled)))).flatten(1)
    expected = torch.zeros(3, channels, 5, 6, dtype=torch.float64)
    group = channels // cardinality
    for channel in range(channels):
        k, c = divmod(channel, group)
        # fc2 gives (cardinality, radix, channels of the group).
        places = [k * radix * group + r * group + c for r in range(radix)]
        chosen = logits[:, places]
        weights = chosen.sigmoid() if radix == 1 else chosen.softmax(1)
        for r in range(radix):
            expected[:, channel] += weights[:, r, None, None] * splits[:, r, channel]
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("radix", "cardinality"), [(1, 1), (2, 1), (4, 2)])
def test_split_attention_runs_in_bfloat16_autocast_and_keeps_its_features_in_bfloat16(radix, cardinality):
    block = SplitAttention(64, radix=radix, cardinality=cardinality)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(torch.randn(3, 64, 5, 5))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()


# Initial weights


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kernel_size": 3}, math.sqrt(2 / (9 * 128))),
        ({"kernel_size": 1}, math.sqrt(2 / 128)),
        ({"kernel_size": 3, "groups": 2}, math.sqrt(2 / (9 * 64))),
        ({"kernel_size": 3, "groups": 128}, math.sqrt(2 / 9)),
    ],
)
def test_convolutions_start_he_normal_over_the_outputs_of_a_group(options, expected):
    torch.manual_seed(0)
    conv = make_conv(128, 128, bias=True, **options)
    assert conv.weight.std().item() == pytest.approx(expected, rel=0.1)
    assert not conv.bias.any()


def test_a_separable_convolution_keeps_the_scale_of_its_input_without_help_from_norms():
    torch.manual_seed(0)
    block = SeparableConv(64, 64, norm="frozen_batch")
    out = block(torch.randn(2, 64, 16, 16))
    assert 0.3 < out.square().mean().sqrt() < 3


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("segmentor", SEGMENTORS)
def test_a_fresh_model_gives_every_class_about_the_same_probability(segmentor, norm):
    model = build_small(segmentor, backbone_norm=norm, head_norm=norm, head_channels=512)
    draw = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 3, 65, 65), dtype=torch.uint8, generator=draw)
    logits = model.train()(image).main
    target = torch.zeros(logits.shape[0], *logits.shape[2:], dtype=torch.long)
    assert F.cross_entropy(logits, target).item() == pytest.approx(math.log(5), abs=0.3)
    assert 0.01 < logits.std() < 1


@torch.no_grad()
def test_features_of_a_fresh_backbone_are_of_order_one():
    torch.manual_seed(0)
    model = ResNeSt(BACKBONES["resnest50"], output_stride=16).train()
    for feature in model(torch.randn(4, 3, 64, 64)):
        assert 0.3 < feature.square().mean().sqrt() < 5


# The segmenter


@torch.no_grad()
def test_pixels_are_normalised_by_mean_and_std_before_the_backbone_in_the_dtype_of_the_parameters():
    seen = []
    for dtype in (torch.float32, torch.float64):
        model = build_small(mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 5.0)).to(dtype).eval()
        model.backbone.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        image = black(1)
        image[:, :, 0, 0] = torch.tensor([12, 16, 40])
        assert model(image).main.dtype == dtype
        assert seen[-1].dtype == dtype
        assert seen[-1][0, :, 0, 0].tolist() == [1.0, -1.0, 2.0]
        assert seen[-1][0, :, 1, 1].tolist() == [-5.0, -5.0, -6.0]


def test_mean_and_std_are_exact_after_every_change_of_dtype_and_device_and_in_no_state_dict():
    model = build_small()
    assert not {"mean", "std"} & set(model.state_dict())
    for moved in (model.half(), model.double(), model.to("meta").to_empty(device="cpu")):
        assert moved.mean.flatten().tolist() == [123.675, 116.28, 103.53]
        assert moved.std.flatten().tolist() == [58.395, 57.12, 57.375]


def test_auxiliary_logits_come_in_training_only_and_only_with_an_auxiliary_head():
    with_head = build_small(auxiliary=True, output_stride=8)
    assert with_head.train()(black(3)).auxiliary.shape == (3, 5, 5, 5)
    assert with_head.eval()(black(3)).auxiliary is None
    assert build_small().train()(black(3)).auxiliary is None


@pytest.mark.parametrize("segmentor", ["deeplabv3", "deeplabv3plus"])
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_atrous_rates_follow_the_output_stride_unless_given(segmentor, stride):
    assert ATROUS_RATES == {8: (12, 24, 36), 16: (6, 12, 18), 32: (3, 6, 9)}
    with torch.device("meta"):
        by_stride = create_model(segmentor, "resnest14", num_classes=5, output_stride=stride)
        given = create_model(segmentor, "resnest14", num_classes=5, output_stride=stride, atrous_rates=(1, 2))
    assert by_stride.decode_head.aspp.atrous_rates == ATROUS_RATES[stride]
    assert given.decode_head.aspp.atrous_rates == (1, 2)


def test_options_reach_the_parts_they_are_for():
    with torch.device("meta"):
        fcn = create_model("fcn", "resnest14", num_classes=5, num_convs=3, concat_input=True, dropout=0.25)
        psp = create_model(
            "pspnet", "resnest14", num_classes=5, pool_scales=(1, 4), align_corners=True, auxiliary_channels=256
        )
        plus = create_model("deeplabv3plus", "resnest14", num_classes=5, shortcut_channels=24, align_corners=True)
    assert len(fcn.decode_head.convs) == 3
    assert fcn.decode_head.fuse is not None
    assert fcn.decode_head.dropout.p == 0.25
    assert fcn.auxiliary_head.dropout.p == 0.25
    assert psp.decode_head.pool_scales == (1, 4)
    assert psp.decode_head.align_corners is True
    assert psp.auxiliary_head.classifier.in_channels == 256
    assert plus.decode_head.shortcut.conv.out_channels == 24
    assert plus.decode_head.align_corners is True


def test_other_image_channels_than_three_work_with_their_own_mean_and_std():
    model = build_small(in_channels=5, mean=(1.0,) * 5, std=(2.0,) * 5).eval()
    assert model(black(1, channels=5)).main.shape == (1, 5, 2, 2)


# BatchNorm on features of one pixel


@pytest.mark.parametrize("segmentor", SEGMENTORS)
def test_batch_norm_refuses_a_training_batch_of_one_and_says_what_to_do(segmentor):
    with pytest.raises(ModelError, match=r"E-MODEL-015 .*bigger batch, .*frozen_batch.*group.*SyncBatchNorm"):
        build_small(segmentor).train()(black(1))


@pytest.mark.parametrize("segmentor", ["pspnet", "deeplabv3", "deeplabv3plus"])
def test_the_refusal_names_the_norms_that_are_to_blame(segmentor):
    with pytest.raises(ModelError, match=r"E-MODEL-015 \| .* head\.norm=batch:"):
        build_small(segmentor, backbone_norm="group").train()(black(1))
    with pytest.raises(ModelError, match=r"E-MODEL-015 \| .* backbone\.norm=batch:"):
        build_small(segmentor, head_norm="group").train()(black(1))
    with pytest.raises(ModelError, match=r"E-MODEL-015 \| .* backbone\.norm=batch and head\.norm=batch:"):
        build_small(segmentor).train()(black(1))


def test_heads_without_a_pooled_branch_train_on_one_image_with_batch_norm():
    build_small("fcn", backbone_norm="group").train()(black(1))
    build_small("pspnet", backbone_norm="group", pool_scales=(2, 3)).train()(black(1))


@pytest.mark.parametrize("segmentor", SEGMENTORS)
def test_a_training_batch_of_two_warns_once_a_model_and_one_of_three_does_not(segmentor):
    model = build_small(segmentor).train()
    model(black(3))
    with pytest.warns(BatchNormWarning, match="only \\+1 and -1"):
        model(black(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(black(2))
        build_small(segmentor, backbone_norm="group", head_norm="frozen_batch").train()(black(2))


def test_a_frozen_backbone_is_not_to_blame():
    build_small("fcn", frozen_stages=4).train()(black(1))


def test_synchronised_batch_norm_is_exempt():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build_small("pspnet")).train()
    # Without other processes PyTorch itself refuses, later: our check has let the batch of one pass.
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        model(black(1))
    assert not isinstance(caught.value, ModelError)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (FCNHead(CHANNELS, num_classes=2, channels=16), False),
        (PSPHead(CHANNELS, num_classes=2, channels=16), True),
        (PSPHead(CHANNELS, num_classes=2, channels=16, pool_scales=(2, 3)), False),
        (ASPPHead(CHANNELS, num_classes=2, channels=16), True),
        (SeparableASPPHead(CHANNELS, num_classes=2, channels=16), True),
    ],
)
def test_heads_say_whether_they_pool_to_one_pixel(head, expected):
    assert head.pools_to_one_pixel is expected


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segmentor": "pspnets"}, r"E-MODEL-016 .*did you mean pspnet\?"),
        ({"backbone": "resnest51"}, r"E-MODEL-017 .*did you mean resnest50"),
        ({"num_classes": 0}, r"E-MODEL-006 \| 0 classes; allowed 1 to 255"),
        ({"num_classes": 256}, r"E-MODEL-006 \| 256 classes; allowed 1 to 255"),
        ({"output_stride": 4}, r"E-MODEL-002 .*4; allowed 8, 16, 32"),
        ({"dilation_variant": "tim"}, r"E-MODEL-003 .*did you mean timm\?"),
        ({"frozen_stages": 5}, r"E-MODEL-004 .*allowed 0 to 4"),
        ({"in_channels": 0}, "E-MODEL-005"),
        ({"in_channels": 4}, r"E-MODEL-012 \| 3 means and 3 stds for 4 image channels"),
        ({"std": (1.0, 0.0, 1.0)}, "E-MODEL-013"),
        ({"backbone_norm": "groups"}, r"E-MODEL-001 .*did you mean group\?"),
        ({"head_norm": "layer"}, "E-MODEL-001"),
        ({"head_channels": 0}, r"E-MODEL-007 .*\b0\b.* channels; allowed 1 or more"),
        ({"auxiliary_channels": -1}, r"E-MODEL-007 .*-1.* channels; allowed 1 or more"),
        ({"dropout": 1.0}, r"E-MODEL-008 \| dropout 1.0"),
        ({"num_convs": 0}, "E-MODEL-009"),
        ({"segmentor": "pspnet", "pool_scales": ()}, "E-MODEL-010"),
        ({"segmentor": "deeplabv3", "atrous_rates": (0,)}, "E-MODEL-011"),
        ({"segmentor": "deeplabv3plus", "shortcut_channels": 0}, r"E-MODEL-007 .*\b0\b.* channels; allowed 1 or more"),
        ({"auxiliary": False, "auxiliary_channels": 256}, "E-MODEL-019"),
    ],
)
def test_what_cannot_be_built_says_what_was_given_and_what_is_allowed(options, message):
    arguments = {"segmentor": "fcn", "backbone": "resnest14", "num_classes": 5, **options}
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        create_model(**arguments)


USERS = {
    "num_convs": (1, {"fcn"}),
    "concat_input": (True, {"fcn"}),
    "pool_scales": ((1, 2), {"pspnet"}),
    "atrous_rates": ((1, 2), {"deeplabv3", "deeplabv3plus"}),
    "shortcut_channels": (8, {"deeplabv3plus"}),
}


@pytest.mark.parametrize("option", USERS)
@pytest.mark.parametrize("segmentor", SEGMENTORS)
def test_an_option_of_another_segmentor_is_an_error_and_not_ignored(segmentor, option):
    value, users = USERS[option]
    with torch.device("meta"):
        if segmentor in users:
            create_model(segmentor, "resnest14", num_classes=5, **{option: value})
        else:
            with pytest.raises(ModelError, match=f"E-MODEL-018 .*{option}.*{segmentor} has no such option"):
                create_model(segmentor, "resnest14", num_classes=5, **{option: value})


@pytest.mark.parametrize("image", [black(1, channels=1), black(1)[0], black(1, channels=4)])
def test_an_image_of_another_shape_is_refused_and_not_broadcast(image):
    with pytest.raises(ModelError, match=r"E-MODEL-014 .*expected \(N, 3, H, W\)"):
        build_small().eval()(image)
