"""The layout of PyTorch-Encoding, the toolbox of ResNeSt's authors: FCN, PSPNet and DeepLabV3."""

from __future__ import annotations

from nestseg.weights.layout import Layout, Row, Rules, backbone_rows

_COMMON: Rules = (
    *backbone_rows("pretrained."),
    ("auxiliary_head.convs.0", "auxlayer.conv5.0", "auxlayer.conv5.1"),
    ("auxiliary_head.classifier", "auxlayer.conv5.4"),
)

_PYRAMID: tuple[Row, ...] = tuple(
    (f"decode_head.branches.{i}", f"head.conv5.0.conv{i + 1}.0", f"head.conv5.0.conv{i + 1}.1") for i in range(4)
)

ENCODING = Layout(
    name="encoding",
    rules={
        "fcn": (
            *_COMMON,
            ("decode_head.convs.0", "head.conv5.0", "head.conv5.1"),
            ("decode_head.classifier", "head.conv5.4"),
        ),
        "pspnet": (
            *_COMMON,
            *_PYRAMID,
            ("decode_head.fuse", "head.conv5.1", "head.conv5.2"),
            ("decode_head.classifier", "head.conv5.5"),
        ),
        "deeplabv3": (
            *_COMMON,
            ("decode_head.aspp.branches.{i}", "head.aspp.b{i}.0", "head.aspp.b{i}.1"),
            ("decode_head.aspp.image_pool", "head.aspp.b4.gap.1", "head.aspp.b4.gap.2"),
            ("decode_head.aspp.fuse.0", "head.aspp.project.0", "head.aspp.project.1"),
            ("decode_head.aspp.fuse.2", "head.block.0", "head.block.1"),
            ("decode_head.classifier", "head.block.4"),
        ),
    },
    unused=("pretrained.fc",),
    dilation_variant="official",
    align_corners=True,
    wrapper="state_dict",
)
