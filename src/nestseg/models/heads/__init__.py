"""Decode heads by the name of the segmentor that they make."""

from __future__ import annotations

from collections.abc import Callable

from nestseg.models.heads.aspp import ASPPHead
from nestseg.models.heads.base import DecodeHead
from nestseg.models.heads.fcn import FCNHead
from nestseg.models.heads.psp import PSPHead
from nestseg.models.heads.sep_aspp import SeparableASPPHead

HEADS: dict[str, Callable[..., DecodeHead]] = {
    "fcn": FCNHead,
    "pspnet": PSPHead,
    "deeplabv3": ASPPHead,
    "deeplabv3plus": SeparableASPPHead,
}

__all__ = ["HEADS", "ASPPHead", "DecodeHead", "FCNHead", "PSPHead", "SeparableASPPHead"]
