"""The layout of sssegmentation, whose modules are mostly numbered."""

from __future__ import annotations

from nestseg.weights.layout import Layout, Rules, stem_backbone_rows

_COMMON: Rules = (
    *stem_backbone_rows("backbone_net."),
    ("auxiliary_head.convs.0", "auxiliary_decoder.0", "auxiliary_decoder.1"),
    ("auxiliary_head.classifier", "auxiliary_decoder.4"),
)

_ASPP: Rules = (
    ("decode_head.aspp.branches.{i}", "aspp_net.parallel_branches.{i}.0", "aspp_net.parallel_branches.{i}.1"),
    ("decode_head.aspp.image_pool", "aspp_net.global_branch.1", "aspp_net.global_branch.2"),
    ("decode_head.aspp.fuse", "aspp_net.bottleneck.0", "aspp_net.bottleneck.1"),
)


def _separable(ours: str, theirs: str) -> Rules:
    return (
        (f"{ours}.depthwise", f"{theirs}.depthwise_conv", f"{theirs}.depthwise_bn"),
        (f"{ours}.pointwise", f"{theirs}.pointwise_conv", f"{theirs}.pointwise_bn"),
    )


SSSEG = Layout(
    name="ssseg",
    rules={
        # decoder.4 is a classifier here and a norm below: this must be tried first
        "fcn with one convolution": (
            *_COMMON,
            ("decode_head.convs.0", "decoder.0", "decoder.1"),
            ("decode_head.classifier", "decoder.4"),
        ),
        "fcn": (
            *_COMMON,
            ("decode_head.convs.0", "decoder.0", "decoder.1"),
            ("decode_head.convs.1", "decoder.3", "decoder.4"),
            ("decode_head.classifier", "decoder.7"),
        ),
        "pspnet": (
            *_COMMON,
            ("decode_head.branches.{i}", "ppm_net.branches.{i}.1", "ppm_net.branches.{i}.2"),
            ("decode_head.fuse", "ppm_net.bottleneck.0", "ppm_net.bottleneck.1"),
            ("decode_head.classifier", "decoder.1"),
        ),
        "deeplabv3": (*_COMMON, *_ASPP, ("decode_head.classifier", "decoder.1")),
        "deeplabv3plus": (
            *_COMMON,
            *_ASPP,
            *_separable("decode_head.aspp.branches.{i}", "aspp_net.parallel_branches.{i}"),
            ("decode_head.shortcut", "shortcut.0", "shortcut.1"),
            *_separable("decode_head.refine.{i}", "decoder.{i}"),
            ("decode_head.classifier", "decoder.3"),
        ),
    },
    wrapper="model",
)
