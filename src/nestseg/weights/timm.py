"""The layout of timm's ResNeSt files: the authors' names, another network where it is dilated."""

from __future__ import annotations

from nestseg.weights.layout import Layout, backbone_rows

TIMM = Layout(name="timm", rules={"backbone": backbone_rows()}, unused=("fc",), dilation_variant="timm")
"""Keys and shapes are those of the official layout, so that only its name can choose it."""
