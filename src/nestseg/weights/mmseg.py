"""The layout of mmsegmentation: its segmentation models, and the backbone files that these start from."""

from __future__ import annotations

from nestseg.weights.layout import Layout, Rules, stem_backbone_rows

_COMMON: Rules = (
    *stem_backbone_rows("backbone."),
    ("decode_head.classifier", "decode_head.conv_seg"),
    ("auxiliary_head.convs.0", "auxiliary_head.convs.0.conv", "auxiliary_head.convs.0.bn"),
    ("auxiliary_head.classifier", "auxiliary_head.conv_seg"),
)

_ASPP: Rules = (
    ("decode_head.aspp.branches.{i}", "decode_head.aspp_modules.{i}.conv", "decode_head.aspp_modules.{i}.bn"),
    ("decode_head.aspp.image_pool", "decode_head.image_pool.1.conv", "decode_head.image_pool.1.bn"),
    ("decode_head.aspp.fuse", "decode_head.bottleneck.conv", "decode_head.bottleneck.bn"),
)


def _separable(ours: str, theirs: str) -> Rules:
    return (
        (f"{ours}.depthwise", f"{theirs}.depthwise_conv.conv", f"{theirs}.depthwise_conv.bn"),
        (f"{ours}.pointwise", f"{theirs}.pointwise_conv.conv", f"{theirs}.pointwise_conv.bn"),
    )


MMSEG = Layout(
    name="mmseg",
    rules={
        "backbone": stem_backbone_rows(),
        "fcn": (
            *_COMMON,
            ("decode_head.convs.{i}", "decode_head.convs.{i}.conv", "decode_head.convs.{i}.bn"),
            ("decode_head.fuse", "decode_head.conv_cat.conv", "decode_head.conv_cat.bn"),
        ),
        "pspnet": (
            *_COMMON,
            ("decode_head.branches.{i}", "decode_head.psp_modules.{i}.1.conv", "decode_head.psp_modules.{i}.1.bn"),
            ("decode_head.fuse", "decode_head.bottleneck.conv", "decode_head.bottleneck.bn"),
        ),
        "deeplabv3": (*_COMMON, *_ASPP),
        "deeplabv3plus": (
            *_COMMON,
            *_ASPP,
            *_separable("decode_head.aspp.branches.{i}", "decode_head.aspp_modules.{i}"),
            ("decode_head.shortcut", "decode_head.c1_bottleneck.conv", "decode_head.c1_bottleneck.bn"),
            *_separable("decode_head.refine.{i}", "decode_head.sep_bottleneck.{i}"),
        ),
    },
    unused=("fc",),
    logits_resizes=2,
    pool_first=True,
    wrapper="state_dict",
)
