"""The configuration text in the ``meta`` of mmsegmentation's files: what weights do not show.

The text is Python source. It is parsed and read as plain values, never run.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from nestseg.core.errors import WeightsError
from nestseg.core.types import OutputStride

_DILATED: dict[tuple[tuple[int, ...], tuple[int, ...]], OutputStride] = {
    ((1, 2, 1, 1), (1, 1, 2, 4)): 8,
    ((1, 2, 2, 1), (1, 1, 1, 2)): 16,
    ((1, 2, 2, 2), (1, 1, 1, 1)): 32,
}
"""Output stride by the strides and dilations of the four stages."""


class MmsegSettings(NamedTuple):
    """Arguments of `create_model` that a configuration gives."""

    output_stride: OutputStride
    atrous_rates: tuple[int, ...]
    pool_scales: tuple[int, ...]
    align_corners: bool
    dropout: float
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


# Defaults are mmsegmentation's: what a configuration does not say has them.
class _Norm(BaseModel):
    eps: float = 1e-5


class _Backbone(BaseModel):
    strides: tuple[int, ...] = (1, 2, 2, 2)
    dilations: tuple[int, ...] = (1, 1, 1, 1)
    contract_dilation: bool = False
    avg_down_stride: bool = True
    multi_grid: tuple[int, ...] | None = None
    norm_cfg: _Norm = _Norm()


class _Head(BaseModel):
    dilations: tuple[int, ...] = (1, 6, 12, 18)
    dilation: int = 1
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    align_corners: bool = False
    dropout_ratio: float = 0.1
    norm_cfg: _Norm = _Norm()


class _NormConfig(BaseModel):
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    is_rgb: bool = Field(True, alias="to_rgb")


class _Preprocessor(BaseModel):
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    is_rgb: bool = Field(False, alias="bgr_to_rgb")


class _Model(BaseModel):
    backbone: _Backbone
    decode_head: _Head
    data_preprocessor: _Preprocessor | None = None


class _Config(BaseModel):
    model: _Model
    img_norm_cfg: _NormConfig | None = None  # up to version 0.30
    data_preprocessor: _Preprocessor | None = None


def read_config(text: str) -> MmsegSettings | None:
    """Read what a configuration says of the network.

    Args:
        text: Python source with ``model = dict(...)``, every value of which is plain.

    Returns:
        The settings; None if there is no such model in the text.

    Raises:
        WeightsError: E-WEIGHTS-025, if it is a network that we cannot build.

    Example:
        >>> read_config("model = dict(backbone=dict(), decode_head=dict(dilations=(1, 3, 6, 9)))").atrous_rates
        (3, 6, 9)
        >>> read_config("model = __import__('os').getcwd()") is None
        True
    """
    try:
        config = _Config.model_validate(_read_assignments(text))
    except ValidationError:
        return None
    backbone, head = config.model.backbone, config.model.decode_head
    pixels = config.model.data_preprocessor or config.data_preprocessor or config.img_norm_cfg
    stride = _DILATED.get((backbone.strides, backbone.dilations))
    problems = {
        f"strides {backbone.strides} with dilations {backbone.dilations}": stride is None,
        "contract_dilation=False": stride in (8, 16) and not backbone.contract_dilation,
        "avg_down_stride=False": not backbone.avg_down_stride,
        f"multi_grid={backbone.multi_grid}": backbone.multi_grid is not None,
        f"dilation={head.dilation} in the head": head.dilation != 1,
        f"dilations {head.dilations} in the head": head.dilations[:1] != (1,),
        "a norm with eps other than 1e-5": {backbone.norm_cfg.eps, head.norm_cfg.eps} != {1e-5},
        "images in BGR order": pixels is not None and not pixels.is_rgb,
    }
    found = [problem for problem, there in problems.items() if there]
    if stride is None or found:
        raise WeightsError(
            "E-WEIGHTS-025",
            "the configuration in the file asks for what nestseg's network does not have: " + ", ".join(found),
            fix="run it with mmsegmentation; if the difference does not matter, remove meta from the file",
        )
    return MmsegSettings(
        output_stride=stride,
        atrous_rates=head.dilations[1:],
        pool_scales=head.pool_scales,
        align_corners=head.align_corners,
        dropout=head.dropout_ratio,
        mean=pixels.mean if pixels else None,
        std=pixels.std if pixels else None,
    )


def _read_assignments(text: str) -> dict[str, Any]:
    """Return the plain values that are assigned to names at the top; others are left out."""
    values: dict[str, Any] = {}
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    for statement in statements:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            try:
                values[statement.targets[0].id] = _read_value(statement.value, values)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                values.pop(statement.targets[0].id, None)
    return values


def _read_value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """Read literals, ``dict(...)`` of them, and names assigned before; a `ValueError` for all else."""
    match node:
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords) if all(k.arg for k in keywords):
            return {keyword.arg: _read_value(keyword.value, known) for keyword in keywords}
        case ast.Dict(keys=keys, values=items) if None not in keys:
            pairs = zip(keys, items, strict=True)
            return {ast.literal_eval(key): _read_value(item, known) for key, item in pairs if key is not None}
        case ast.Tuple(elts=items) | ast.List(elts=items):
            return [_read_value(item, known) for item in items]
    return ast.literal_eval(node)
