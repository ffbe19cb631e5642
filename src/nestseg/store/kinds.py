"""What a weights file is, told by its first bytes: its suffix is only what somebody called it."""

from __future__ import annotations

import codecs
import io
import pickletools
from pathlib import Path
from typing import Literal

from nestseg.core.errors import WeightsError

Kind = Literal["safetensors", "zip", "torch", "tar", "pickle"]
"""``torch`` is torch's own format before version 1.6; ``zip`` may hold the one since, or anything else."""

_HEAD_BYTES = 4096

_TORCH_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")
"""The number that torch pickled in front of its files until version 1.6."""

_FETCH = "fetch the file again"

_FOREIGN = (
    (b"\x1f\x8b", "a gzip archive", "unpack it with gunzip and pass what is inside"),
    (b"BZh", "a bzip2 archive", "unpack it with bunzip2 and pass what is inside"),
    (b"\xfd7zXZ\x00", "an xz archive", "unpack it with unxz and pass what is inside"),
    (b"\x89HDF", "an HDF5 file, probably of Keras", "pass PyTorch weights: .pth or .safetensors"),
    (b"\x93NUMPY", "a numpy array", "pass PyTorch weights: .pth or .safetensors"),
)


def find_kind(path: Path) -> Kind:
    """Tell what a weights file is by its first bytes.

    Args:
        path: A file, whatever it is called.

    Returns:
        Its kind. Whether it is sound, and safe to read, is not known yet.

    Raises:
        WeightsError: E-WEIGHTS-001 if there is no such file, E-WEIGHTS-014 if it is a folder, E-WEIGHTS-011 if it holds
            anything but weights: it is named for what it is.
    """
    if path.is_dir():
        raise _name_folder(path)
    if not path.is_file():
        reason = "is not a regular file" if path.exists() else "there is no such file"
        raise WeightsError("E-WEIGHTS-001", reason, fix="check the path", path=path)
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    # a header is shorter than 4 GiB, so the upper half of its length is zero; text has no zero bytes
    if head[4:9] == b"\0\0\0\0{":
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(_TORCH_MAGIC):
        return "torch"
    if head[257:262] == b"ustar":
        return "tar"
    foreign = _name_text(head) or _name_bytes(head)
    if foreign is not None:
        what, fix = foreign
        raise WeightsError("E-WEIGHTS-011", f"holds no weights: {what}", fix=fix, path=path)
    if _is_pickle(head):
        return "pickle"
    if head[8:9] == b"{":
        return "safetensors"  # its length is nonsense, which whoever reads the header says
    raise WeightsError(
        "E-WEIGHTS-011",
        f"holds no weights that are known: it begins with the bytes {head[:8].hex(' ')}",
        fix="pass a .safetensors or a PyTorch .pth file; if it is one, fetch it again",
        path=path,
    )


def show_text(text: str, *, limit: int = 80) -> str:
    r"""Return text from a file such that it can stand in a message: no control characters, not longer than ``limit``.

    The bar that separates the parts of a message is escaped too.

    Example:
        >>> print(show_text("layer\n\x1b[31m|"))
        layer\n\x1b[31m\x7c
    """
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: limit + 1]).replace("|", r"\x7c")
    return shown if len(shown) <= limit else f"{shown[:limit]}..."


def _name_folder(path: Path) -> WeightsError:
    if (path / ".metadata").exists():
        return WeightsError(
            "E-WEIGHTS-014",
            "is a checkpoint folder of torch.distributed, whose .metadata can run code when it is read",
            fix="where it is trusted, make one file of it with dcp_to_torch_save of "
            "torch.distributed.checkpoint.format_utils, and pass that file",
            path=path,
        )
    inside = sorted(file.name for file in path.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    names = ", ".join(show_text(name) for name in inside[:3]) or "it holds no .safetensors or .pth"
    return WeightsError("E-WEIGHTS-014", "is a folder, not a file", fix=f"name the file in it: {names}", path=path)


def _name_text(head: bytes) -> tuple[str, str] | None:
    """Say what text it is and what to do; None for anything that is not text."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n\f\v")
    if start[:1] == b"<" and (start[1:2].isalpha() or start[1:2] in (b"!", b"?")):
        return "an HTML or XML page", "open the address in a browser, log in or accept the terms, then fetch it again"
    if start.startswith(b"version https://git-lfs.github.com"):
        return "a git-lfs pointer to them", "run `git lfs pull` in the repository it is from"
    try:
        # not final: the head may end in the middle of a character
        text, _ = codecs.utf_8_decode(start, "strict", False)
    except UnicodeDecodeError:
        return None
    if not text or any(c < " " and c not in "\t\r\n\f\v" for c in text) or _is_pickle(head):
        return None
    kind = "JSON" if text[0] in "{[" else "text"
    return f"{kind}, which begins with {show_text(text, limit=60)}", f"see what it says, then {_FETCH}"


def _name_bytes(head: bytes) -> tuple[str, str] | None:
    """Say what known format it is and what to do; None for an unknown one."""
    if not head.strip(b"\xef\xbb\xbf \t\r\n\f\v"):
        return ("it is blank" if head else "it is empty"), _FETCH
    if not head.strip(b"\0"):
        return "it begins with zeros only, as a download that broke off does", _FETCH
    if head.startswith(b"PK"):
        return "a zip archive that is empty or cut short", _FETCH
    for magic, what, fix in _FOREIGN:
        if head.startswith(magic):
            return what, fix
    return None


def _is_pickle(head: bytes) -> bool:
    """Whether this is the start of a Python pickle; the text protocols 0 and 1 have no mark, and are parsed."""
    if head[:1] == b"\x80":
        return 2 <= int.from_bytes(head[1:2], "little") <= 5
    try:
        return sum(1 for _ in pickletools.genops(io.BytesIO(head))) > 1
    except ValueError:
        return False
