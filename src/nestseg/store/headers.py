"""The header of a safetensors file, checked so that what is wrong with it can be named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from nestseg.core.errors import WeightsError
from nestseg.store.kinds import show_text

_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

_DTYPE_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E4M3FNUZ": 1, "F8_E5M2": 1, "F8_E5M2FNUZ": 1},
}


def read_header(path: Path) -> dict[str, str]:
    """Check the header of a safetensors file against the file, and return the text that travels in it.

    The tensors must fill the file: one after the other from the first byte after the header to the last.

    Raises:
        WeightsError: E-WEIGHTS-017, if the file is cut short or longer than its tensors, or the header is damaged.

    Reference:
        The format section of the safetensors documentation.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise _fault(path, f"its header claims {length:,} bytes; allowed are {_MAX_HEADER_BYTES:,}")
        if 8 + length > size:
            raise _fault(path, f"it is cut short: its header has {length:,} bytes, the whole file {size:,}")
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_read_once)
    except (ValueError, RecursionError) as error:
        raise _fault(path, f"its header is damaged: {show_text(str(error))}") from error
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _fault(path, "its header is not a table, or its metadata is not text")
    end = 0
    for begin, stop, name in sorted(_read_span(path, name, entry) for name, entry in header.items()):
        if begin != end:
            problem = "overlaps the one before it" if begin < end else "leaves a gap before it"
            raise _fault(path, f"tensor {show_text(name)} {problem}: it begins at byte {begin:,}, expected {end:,}")
        end = stop
    data = size - 8 - length
    if data < end:
        raise _fault(path, f"it is cut short: its tensors need {end:,} bytes, it has {data:,}")
    if data > end:
        raise _fault(path, f"{data - end:,} bytes follow its tensors, which belong to none of them")
    return metadata


def _read_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a table of JSON pairs; of two with one name, other readers take the first or the last."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is given twice")
    return table


def _read_span(path: Path, name: str, entry: object) -> tuple[int, int, str]:
    """Check one tensor's entry and return where its bytes begin and end."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)], **rest} if not rest:
            pass
        case _:
            raise _fault(path, f"tensor {show_text(name)} needs a dtype, a shape and two data_offsets, nothing else")
    if dtype not in _DTYPE_BYTES:
        allowed = ", ".join(_DTYPE_BYTES)
        raise _fault(path, f"tensor {show_text(name)} has the unknown dtype {show_text(dtype)}; allowed: {allowed}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise _fault(path, f"tensor {show_text(name)} has the shape {show_text(str(shape))}")
    needed = math.prod(shape) * _DTYPE_BYTES[dtype]
    if begin < 0 or end - begin != needed:
        given = show_text(f"{begin} to {end}")
        raise _fault(path, f"tensor {show_text(name)} of {needed:,} bytes lies at bytes {given}")
    return begin, end, name


def _fault(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        "E-WEIGHTS-017", f"is not a sound safetensors file: {reason}", fix="fetch the file again", path=path
    )
