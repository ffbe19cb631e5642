"""The layout of the ResNeSt authors' backbones, which timm's files share key for key.

Our backbone uses the same keys, so that reading is a strict load; only the ImageNet classifier is left out.
"""

from __future__ import annotations

from nestseg.weights.layout import Layout, backbone_rows

OFFICIAL = Layout(name="official", rules={"backbone": backbone_rows()}, unused=("fc",), dilation_variant="official")
