"""What a torch file would do when it is read, told without reading it.

A pickle is a program, and ``torch.load(weights_only=True)`` is an interpreter that knows few words of it. It has had
holes, so this is a second door in front of it: the programs are read as text, and one that uses any word or name which
weights do not need is refused before torch sees it.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO

from nestseg.core.errors import WeightsError
from nestseg.store.kinds import Kind, show_text

INERT_GLOBALS = (
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
)
"""Names that training loops leave beside the weights, as in ``{"best_miou": np.float64(0.78)}``.

Whoever reads such a file must put something inert in their place. The real ones are not safe: a pickled numpy dtype
sets its own fields and flags, and an array made with it takes bytes of the file for pointers (numpy 2 then crashes).
"""

_ALLOWED_GLOBALS = frozenset(
    (
        *("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"),
        *(f"torch.{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16", "ComplexFloat", "ComplexDouble")),
        *(f"torch.{kind}Storage" for kind in ("Long", "Int", "Short", "Char", "Byte", "Bool")),
        *(f"torch.{dtype}" for dtype in ("float64", "float32", "float16", "bfloat16", "complex64", "complex128")),
        *(f"torch.{dtype}" for dtype in ("int64", "int32", "int16", "int8", "uint8", "bool", "Size", "device")),
        *("collections.OrderedDict", "collections.Counter", "builtins.set", "__builtin__.set"),
        "_codecs.encode",  # how the pickle protocol of torch spells bytes
        *INERT_GLOBALS,
    )
)

# exactly what torch's weights_only interpreter knows, so that both read every program alike to its end
_TORCH_OPCODES = """
APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE BUILD EMPTY_DICT EMPTY_LIST EMPTY_SET
EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK NEWFALSE NEWOBJ NEWTRUE NONE PROTO REDUCE SETITEM SETITEMS
SHORT_BINSTRING STOP TUPLE TUPLE1 TUPLE2 TUPLE3
"""
_ALLOWED_OPCODES = frozenset(_TORCH_OPCODES.split())

_MAX_RATIO = 200
_NUM_TORCH_PICKLES = 5  # magic number, protocol, system, the values, the keys of their storages


def check_pickles(path: Path, kind: Kind) -> None:
    """Refuse a pickle-based file that would do anything but make tensors and plain values.

    Args:
        path: The file.
        kind: What `nestseg.store.kinds.find_kind` says it is; not ``"safetensors"``.

    Raises:
        WeightsError: E-WEIGHTS-012 for a zip cut short, E-WEIGHTS-013 for formats that cannot be read without running
            what is in them, E-WEIGHTS-015 for a pickle with a forbidden name or instruction, E-WEIGHTS-016 for an
            archive that is not as torch writes them.
        ValueError: Or another plain exception, if a pickle is damaged.
    """
    if kind == "zip":
        _check_zip(path)
        return
    if kind == "tar":
        raise _refuse(path, "a tar archive (torch wrote weights so before version 0.1.10)")
    with path.open("rb") as file:
        for _ in range(_NUM_TORCH_PICKLES if kind == "torch" else 1):
            _check_pickle(file, path=path)
    if kind == "pickle":
        raise _refuse(path, "a plain Python pickle, or the damaged start of a torch file")


def _check_zip(path: Path) -> None:
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise WeightsError(
            "E-WEIGHTS-012",
            "is cut short or damaged: it begins as a zip archive, but has no sound table of contents",
            fix="fetch the file again",
            path=path,
        ) from error
    with archive:
        members = archive.infolist()
        inside = [member.filename.partition("/")[2] for member in members]
        if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
            raise _refuse(path, "a TorchScript archive: a program together with its weights")
        if "data.pkl" not in inside:
            first = ", ".join(show_text(member.filename) for member in members[:3]) or "nothing"
            raise WeightsError(
                "E-WEIGHTS-013",
                f"is a zip archive, but not one of torch: it holds {first}",
                fix="unpack it, and pass the weights file inside",
                path=path,
            )
        _check_members(path, archive)
        for member in members:
            if member.filename.lower().endswith(".pkl"):
                _check_pickle(io.BytesIO(archive.read(member)), path=path)


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse what torch never writes, where its reader and ours might see two different archives."""
    members = archive.infolist()
    folder = members[0].filename.partition("/")[0] + "/"
    # torch's reader does not tell upper from lower case
    seen: set[str] = set()
    for member in members:
        name = member.orig_filename
        if member.flag_bits & 1:
            problem = "is encrypted"
        elif name.lower() in seen:
            problem = "is there twice"
        elif not name.startswith(folder) or ".." in name.split("/") or "\\" in name or "\0" in name or folder == "/":
            problem = f"lies outside the folder {show_text(folder)}"
        elif member.file_size > _MAX_RATIO * max(member.compress_size, 1):
            problem = f"unpacks from {member.compress_size:,} to {member.file_size:,} bytes, over {_MAX_RATIO}:1"
        else:
            seen.add(name.lower())
            continue
        raise _not_torch(path, f"its member {show_text(name)} {problem}")
    if archive.comment:
        raise _not_torch(path, f"{len(archive.comment)} bytes follow the end of the archive")


def _check_pickle(file: IO[bytes], *, path: Path) -> None:
    """Read one pickle as text, to its end; refuse the names and instructions that weights do not need."""
    strings: list[str] = []
    memo: dict[int, str | None] = {}
    latest: str | None = None
    foreign: str | None = None
    for opcode, value, _ in pickletools.genops(file):
        name = opcode.name
        if name == "PROTO" and value != 2:
            foreign = foreign or f"pickle protocol {value}"
        elif name in ("GLOBAL", "INST"):
            _check_global(str(value).replace(" ", ".", 1), path=path)
        elif name == "STACK_GLOBAL":
            # module and name were put there as strings; which ones is for the message only, none passes below
            _check_global(".".join(strings[-2:]) or "a name made at run time", path=path)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            strings.append(memo.get(int(value or 0)) or "?")
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if value is None else value] = latest
        if name not in _ALLOWED_OPCODES:
            foreign = foreign or f"the pickle instruction {name}"
        latest = value if isinstance(value, str) and "GLOBAL" not in name else None
        if latest is not None:
            strings.append(latest)
    if foreign is not None:
        raise WeightsError(
            "E-WEIGHTS-015",
            f"uses {foreign}; torch writes weights in protocol 2",
            fix="where it is trusted, save it again with torch.save as it is by default, or as safetensors",
            path=path,
        )


def _check_global(name: str, *, path: Path) -> None:
    if name in _ALLOWED_GLOBALS:
        return
    raise WeightsError(
        "E-WEIGHTS-015",
        f"would run code when it is read: it calls for {show_text(name)}",
        fix="pass a file of tensors and plain values: where this one is trusted, save only its state dict again",
        path=path,
    )


def _refuse(path: Path, what: str) -> WeightsError:
    return WeightsError(
        "E-WEIGHTS-013",
        f"is {what}; it cannot be read without running what is in it",
        fix="where it is trusted, read it there and save its state dict with torch.save or as safetensors",
        path=path,
    )


def _not_torch(path: Path, reason: str) -> WeightsError:
    return WeightsError(
        "E-WEIGHTS-016",
        f"is not an archive as torch writes them: {reason}",
        fix="fetch the file again, from the address its authors give",
        path=path,
    )
