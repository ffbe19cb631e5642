"""Our own names, for files of ours that lack the metadata of a model file."""

from __future__ import annotations

from nestseg.weights.layout import Layout, Rules, backbone_rows


def _same(*modules: str) -> Rules:
    common = ("decode_head.classifier", "auxiliary_head.convs.0.{rest}", "auxiliary_head.classifier")
    return backbone_rows("backbone.") + tuple((module, module) for module in (*modules, *common))


NESTSEG = Layout(
    name="nestseg",
    rules={
        "fcn": _same("decode_head.convs.{rest}", "decode_head.fuse.{rest}"),
        "pspnet": _same("decode_head.branches.{rest}", "decode_head.fuse.{rest}"),
        "deeplabv3": _same("decode_head.aspp.{rest}"),
        "deeplabv3plus": _same("decode_head.aspp.{rest}", "decode_head.shortcut.{rest}", "decode_head.refine.{rest}"),
    },
)
