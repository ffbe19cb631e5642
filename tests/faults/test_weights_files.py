"""Weights from strangers: what would run code is refused and does not run, what is broken is named (W1, W4, W5, W10).

Every file is made here. The programs are put together by hand, so that they can name modules of other systems and use
instructions that Python's own pickler no longer writes; one test shows that they do run where nobody stops them.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save as save_safetensors

from nestseg.core.errors import WeightsError
from nestseg.store.files import read_checkpoint, read_torch_file

LINE = re.compile(r"E-WEIGHTS-\d{3} \| (?P<path>[^|]+) \| [^|]+ \| fix: \w[^|]+")
LEGACY_START = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e") + b"\x80\x02M\xe9\x03."
STATE = {"conv.weight": torch.arange(6.0).reshape(2, 3), "bn.num_batches_tracked": torch.tensor(3)}


def assert_refused(path: Path, *, code: str = r"E-WEIGHTS-\d{3}", reason: str = "") -> None:
    """F14: one line with code, path, reason and fix."""
    with pytest.raises(WeightsError) as raised:
        read_checkpoint(path)
    message = str(raised.value)
    match = LINE.fullmatch(message)
    assert match is not None, message
    assert match["path"] == str(path)
    assert re.search(rf"^{code} \|.*{reason}", message), message
    assert not re.search(r"\bweights_only\b", message)  # torch advises to switch it off


# Programs: what stands in a pickle


def spell(value: object, *, protocol: int = 2) -> bytes:
    """Spell text, a number, None, a list, or a program that is called for its result."""
    if isinstance(value, bytes):
        return value
    if isinstance(value, list):
        return b"(" + b"".join(spell(item, protocol=protocol) for item in value) + b"l"
    if value is None:
        return b"N"
    if isinstance(value, int):
        return f"I{value}\n".encode()
    if protocol == 0:
        return f"V{value}\n".encode()
    return b"X" + struct.pack("<I", len(str(value))) + str(value).encode()


def name_on_stack(name: str) -> bytes:
    """Name a function as protocol 4 does: by two strings on the stack."""
    return b"".join(b"\x8c" + bytes([len(word)]) + word.encode() for word in name.rsplit(".", 1)) + b"\x93"


def name_in_memo(name: str) -> bytes:
    """Name a function by strings of the memo, with harmless ones nearer to the instruction."""
    words = b"".join(b"\x8c" + bytes([len(word)]) + word.encode() + b"\x940" for word in name.rsplit(".", 1))
    return words + name_on_stack("collections.OrderedDict") + b"0h\x00h\x01\x93"


def name_in_text(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(name: str, *arguments: object, protocol: int = 2) -> bytes:
    """Spell a call whose result stays on the stack."""
    function = name_on_stack(name) if protocol >= 4 else name_in_text(name)
    return then(function, *arguments, protocol=protocol)


def then(function: bytes, *arguments: object, protocol: int = 2) -> bytes:
    """Spell the call of what a program leaves on the stack."""
    return function + b"(" + b"".join(spell(argument, protocol=protocol) for argument in arguments) + b"tR"


def finish(program: bytes, *, protocol: int = 2) -> bytes:
    return (b"\x80" + bytes([protocol]) if protocol >= 2 else b"") + program + b"."


def make_armed(ran: Path) -> dict[str, bytes]:
    """Spell programs that make the file ``ran``, each in a way of its own."""
    shell, python = f"touch {ran}", f"open({str(ran)!r}, 'w').close()"
    folder = ran.parent
    inner = folder / "inner.bin"
    module = call("importlib.import_module", "os")
    arguments = b"(" + spell(shell) + b"t"
    return {
        "os.system": call("os.system", shell),
        "posix.system": call("posix.system", shell),
        "os.popen": call("os.popen", shell),
        "os.mkdir": call("os.mkdir", ran),
        "subprocess.Popen": call("subprocess.Popen", ["touch", ran]),
        "subprocess.call": call("subprocess.call", ["touch", ran]),
        "subprocess.check_output": call("subprocess.check_output", ["touch", ran]),
        "exec": call("builtins.exec", python),
        "eval of Python 2": call("__builtin__.eval", python),
        "eval": call("builtins.eval", python),
        "open": call("builtins.open", ran, "w"),
        "io.open": call("io.open", ran, "w"),
        "codecs.open": call("codecs.open", ran, "w"),
        "getattr": then(call("builtins.getattr", module, "system"), shell),
        "import": then(call("builtins.getattr", call("builtins.__import__", "os"), "system"), shell),
        "attrgetter": then(then(call("operator.attrgetter", "system"), module), shell),
        "methodcaller": then(call("operator.methodcaller", "system", shell), module),
        "partial": then(call("functools.partial", name_in_text("os.system"), shell)),
        "reduce": call("functools.reduce", name_in_text("os.mkdir"), [ran, 511]),
        "map": call("builtins.list", call("builtins.map", name_in_text("os.system"), [shell])),
        "runpy": call("runpy.run_path", folder / "hubconf.py"),
        "timeit": call("timeit.timeit", python, "pass", name_in_text("time.time"), 1),
        "pickle in pickle": call("pickle.load", call("io.open", inner, "rb")),
        "numpy.load": call("numpy.load", inner, None, spell(1)),
        "numpy.fromfile": call("numpy.memmap", ran, "uint8", "w+", 0, 8),
        "torch.hub": call("torch.hub._load_local", folder, "model"),
        "torch.save": call("torch.serialization.save", 1, ran),
        "zipfile": call("zipfile.ZipFile", ran, "w"),
        "sqlite3": call("sqlite3.connect", ran),
        "logging": call("logging.FileHandler", ran),
        "inst": b"(" + spell(shell) + b"ios\nsystem\n",
        "obj": b"(" + name_in_text("subprocess.Popen") + spell(["touch", ran]) + b"o",
        "newobj": name_in_text("subprocess.Popen")
        + b"("
        + spell(["touch", ran])
        + b"t\x81"
        + b"0"
        + call("os.mkdir", ran),
        "names in the memo": name_in_memo("os.system") + arguments + b"R",
        "names on the stack": name_on_stack("os.system") + arguments + b"R",
    }


def make_unarmed(ran: Path) -> dict[str, bytes]:
    """Spell programs of other systems, or ones that do harm without a trace."""
    shell = f"touch {ran}"
    return {
        "nt.system": call("nt.system", shell),
        "webbrowser": call("webbrowser.open", "http://127.0.0.1:9/"),
        "torch.load": call("torch.serialization.load", ran.parent / "inner.bin"),
        "torch.load by its short name": call("torch.load", ran.parent / "inner.bin"),
        "allow-list of torch": call("torch.serialization.add_safe_globals", [name_in_text("os.system")]),
        "torch's unpickler": call("torch._weights_only_unpickler._add_safe_globals", [name_in_text("os.system")]),
        "torch.jit": call("torch.jit._serialization.load", ran.parent / "inner.bin"),
        "torch.hub from afar": call("torch.hub.load", "owner/name", "model"),
        "tensor with a type of its own": call("torch._tensor._rebuild_from_type_v2", name_in_text("os.system")),
        "storage that is none": call("torch.storage._load_from_bytes", b"C\x04evil"),
        "attribute named Storage": name_in_text("os.systemStorage"),
        "ctypes": call("ctypes.CDLL", "/nowhere/evil.so"),
        "exit": call("sys.exit", 0),
        "extension registry": b"\x82\x01",
        "numpy function that is not a scalar": call("numpy.f2py.compile", shell),
        "code object": call("marshal.loads", b"C\x04evil"),
    }


def write_accomplices(ran: Path) -> None:
    """Write the files that some programs read."""
    (ran.parent / "inner.bin").write_bytes(finish(call("posix.system", f"touch {ran}")))
    (ran.parent / "hubconf.py").write_text(f"open({str(ran)!r}, 'w').close()\ndef model():\n    pass\n")


# Files: what a program travels in


def zip_files(members: dict[str, bytes], **options: Any) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of two members with one name
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def read_members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def dump(value: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def tar_files(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


EMPTY_DICT, EMPTY_LIST = pickle.dumps({}, 2), pickle.dumps([], 2)
CONTAINERS: dict[str, Callable[[bytes], bytes]] = {
    "zip": lambda program: zip_files({"a/data.pkl": program, "a/version": b"3\n"}),
    "zip, deflated": lambda program: zip_files(
        {"a/data.pkl": program, "a/version": b"3\n"}, compression=zipfile.ZIP_DEFLATED
    ),
    "second pickle of a zip": lambda program: zip_files({**read_members(dump(STATE)), "archive/extra.pkl": program}),
    "zip in a zip": lambda program: zip_files({"a/weights.pth": CONTAINERS["zip"](program)}),
    "legacy": lambda program: LEGACY_START + EMPTY_DICT + program + EMPTY_LIST,
    "system of a legacy file": lambda program: LEGACY_START + program + EMPTY_DICT + EMPTY_LIST,
    "keys of a legacy file": lambda program: LEGACY_START + EMPTY_DICT + EMPTY_DICT + program,
    "bare": lambda program: program,
    "tar": lambda program: tar_files({"sys_info": EMPTY_DICT, "pickle": program, "storages": EMPTY_LIST}),
    "storages of a tar": lambda program: tar_files({"storages": program, "tensors": EMPTY_LIST, "pickle": EMPTY_DICT}),
    "TorchScript": lambda program: zip_files(
        {"a/data.pkl": program, "a/constants.pkl": program, "a/code/__torch__.py": b"", "a/version": b"3\n"}
    ),
}

ARMED, UNARMED = list(make_armed(Path("ran"))), list(make_unarmed(Path("ran")))
PROTOCOLS = range(6)


class Payload:
    """A value whose pickle makes a file when it is read."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.ran,)


def with_attribute(tensor: torch.Tensor, payload: Payload) -> torch.Tensor:
    tensor.payload = payload
    return tensor


PLACES: dict[str, Callable[[Payload], object]] = {
    "alone": lambda payload: payload,
    "in the state dict": lambda payload: {"state_dict": {**STATE, "conv.bias": payload}},
    "attribute of a tensor": lambda payload: {**STATE, "conv.bias": with_attribute(torch.ones(2), payload)},
    "attribute of a parameter": lambda payload: {"a": with_attribute(torch.nn.Parameter(torch.ones(2)), payload)},
    "key of a table": lambda payload: {"state_dict": STATE, "meta": {payload: 1}},
    "in meta": lambda payload: {"state_dict": STATE, "meta": {"CLASSES": [payload]}},
    "in the optimizer": lambda payload: {"state_dict": STATE, "optimizer": {"state": {0: payload}}},
    "in a set": lambda payload: {**STATE, "names": {payload}},
}


def test_the_corpus_is_large_enough():
    num_files = 3 * len(ARMED + UNARMED) + len(CONTAINERS) * len(PROTOCOLS) + 2 * len(PLACES)
    assert num_files >= 200


def test_programs_run_where_nobody_stops_them(tmp_path):
    folders = [tmp_path / str(index) for index in range(len(ARMED))]
    for index, folder in enumerate(folders):
        folder.mkdir()
        write_accomplices(folder / "ran")
        program = list(make_armed(folder / "ran").values())[index]
        (folder / "program").write_bytes(finish(program))
    script = (
        "import pathlib, pickle, sys, time\n"
        "for folder in sys.argv[1:]:\n"
        "    try:\n"
        "        with (pathlib.Path(folder) / 'program').open('rb') as file:\n"
        "            kept = pickle.load(file)\n"
        "    except Exception as error:\n"
        "        print(folder, repr(error))\n"
        "time.sleep(1)\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *folders], capture_output=True, text=True, check=True
    )
    harmless = [name for name, folder in zip(ARMED, folders, strict=True) if not (folder / "ran").exists()]
    assert not harmless, result.stdout


@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
@pytest.mark.parametrize("name", ARMED + UNARMED)
def test_w1_program_is_refused_and_does_not_run(tmp_path, name, container):
    ran, file = tmp_path / "ran", tmp_path / "weights.pth"
    write_accomplices(ran)
    program = {**make_armed(ran), **make_unarmed(ran)}[name]
    file.write_bytes(CONTAINERS[container](finish(program)))
    assert_refused(file, code="E-WEIGHTS-015")
    assert not ran.exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_w1_program_is_refused_in_whatever_it_travels(tmp_path, container, protocol):
    ran = tmp_path / "ran"
    program = finish(call("os.system", f"touch {ran}", protocol=protocol), protocol=protocol)
    for name in ("weights.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(CONTAINERS[container](program))
        assert_refused(tmp_path / name, code="E-WEIGHTS-01[356]")
        with pytest.raises(WeightsError):
            read_torch_file(tmp_path / name)
    assert not ran.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_w1_payload_is_refused_wherever_it_lies(tmp_path, place, legacy):
    ran, file = tmp_path / "ran", tmp_path / "weights.pth"
    file.write_bytes(dump(PLACES[place](Payload(ran)), legacy=legacy))
    assert_refused(file, code="E-WEIGHTS-015", reason="it calls for ")
    assert not ran.exists()


@pytest.mark.parametrize("name", ARMED)
def test_w1_torch_would_refuse_what_the_first_door_let_through(tmp_path, monkeypatch, name):
    ran, file = tmp_path / "ran", tmp_path / "weights.pth"
    write_accomplices(ran)
    file.write_bytes(CONTAINERS["zip"](finish(make_armed(ran)[name])))
    monkeypatch.setattr("nestseg.store.files.check_pickles", lambda *_: None)
    assert_refused(file, code="E-WEIGHTS-002")
    assert not ran.exists()


def test_w1_the_name_that_is_called_for_is_in_the_message(tmp_path):
    file = tmp_path / "weights.pth"
    for program in (call("os.system", "ls"), name_on_stack("os.system"), name_in_memo("os.system")):
        file.write_bytes(CONTAINERS["zip"](finish(program)))
        assert_refused(file, reason=r"it calls for os\.system \| fix: pass a file of tensors")
    file.write_bytes(CONTAINERS["zip"](finish(call("evil\x1b[31m.name", "ls"))))
    assert_refused(file, reason=r"it calls for evil\\x1b\[31m\.name")


def test_w1_instructions_that_torch_does_not_write_are_refused_even_if_harmless(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(STATE, file, pickle_protocol=4)
    assert_refused(file, code="E-WEIGHTS-015", reason="uses pickle protocol 4; .* save it again with torch.save")
    for program, word in ((b"(d", "DICT"), (name_on_stack("collections.OrderedDict") + b")R", "SHORT_BINUNICODE")):
        file.write_bytes(CONTAINERS["zip"](finish(program)))
        assert_refused(file, code="E-WEIGHTS-015", reason=f"uses the pickle instruction {word}; ")


def test_w1_numpy_functions_are_replaced_by_ones_that_do_nothing(tmp_path):
    """With numpy's own, this file has numpy follow the pointer 0x4141414141414141."""
    plain = call("numpy.dtype", "V8", b"\x89", b"\x88")
    fields = b"}" + spell("a") + call("numpy.dtype", "O", b"\x89", b"\x88") + b"K\x00\x86s"
    state = b"(K\x03" + spell("|") + b"N" + spell("a") + b"\x85" + fields + b"K\x08K\x01K\x00tb"
    array = call("numpy._core.multiarray._reconstruct", name_in_text("numpy.ndarray"), b"K\x00\x85", "b")
    data = call("_codecs.encode", "A" * 8, "latin1")
    program = array + b"(K\x01K\x01\x85" + plain + state + b"\x89" + data + b"tb"
    file = tmp_path / "weights.pth"
    file.write_bytes(zip_files({"a/data.pkl": finish(b"}" + spell("best") + program + b"s"), "a/version": b"3\n"}))
    assert not hasattr(read_torch_file(file)["best"], "dtype")
    assert_refused(file, code="E-WEIGHTS-003")


# Archives that torch does not write


def swap(data: bytes, old: bytes, new: bytes) -> bytes:
    assert old in data
    assert len(old) == len(new)
    return data.replace(old, new)


def encrypt(data: bytes) -> bytes:
    changed = bytearray(data)
    changed[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(changed)


GOOD = read_members(dump(STATE))
ARCHIVES = {
    "is there twice": swap(zip_files({**GOOD, "archive/data/X": b"evil"}), b"archive/data/X", b"archive/data/0"),
    "data.pkl is there twice": swap(
        zip_files({**GOOD, "archive/data.pkX": GOOD["archive/data.pkl"]}), b"archive/data.pkX", b"archive/data.pkl"
    ),
    "is there twice for torch": zip_files({**GOOD, "archive/DATA.pkl": GOOD["archive/data.pkl"]}),
    "lies outside the folder": zip_files({**GOOD, "/etc/passwd": b"evil"}),
    "lies outside": zip_files({**GOOD, "archive/../../evil": b"evil"}),
    "backslash lies outside": zip_files({**GOOD, "archive/..\\evil": b"evil"}),
    "NUL lies outside": swap(zip_files({**GOOD, "archive/a-b": b"evil"}), b"archive/a-b", b"archive/a\0b"),
    "two folders lies outside": zip_files({**GOOD, "other/data.pkl": GOOD["archive/data.pkl"]}),
    "is encrypted": encrypt(zip_files(GOOD)),
    "over 200:1": zip_files({**GOOD, "archive/data.pkl": b"0" * 1_000_000}, compression=zipfile.ZIP_DEFLATED),
    "bytes follow the end": zip_files(GOOD)[:-2] + b"\x04\x00evil",
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_w1_archive_that_torch_does_not_write_is_refused(tmp_path, name):
    file = tmp_path / "weights.pth"
    file.write_bytes(ARCHIVES[name])
    reason = re.search("is there twice|lies outside|is encrypted|over 200:1|bytes follow the end", name)
    assert reason is not None
    assert_refused(file, code="E-WEIGHTS-016", reason=reason[0])


# Files that are something else


PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
OTHERS = {
    "it is empty": b"",
    "it is blank": b" \n\n",
    "zeros only": b"\0" * 10_000,
    "HTML or XML page .* log in": PAGE,
    "HTML or XML page": b"\xef\xbb\xbf\r\n  " + PAGE.upper(),
    "HTML or XML": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
    "git-lfs pointer .* `git lfs pull`": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    r"JSON, which begins with {\"error\"": b'{"error": "Repository not found"}',
    "JSON, which": b'{"abcd":{"message": "a brace where safetensors has one"}}',
    "text, which begins with Not Found": b"Not Found",
    r"text, which begins with caf\u00e9": ("caf\u00e9 " * 2000).encode(),
    "gzip archive .* gunzip": gzip.compress(dump(STATE)),
    "numpy array": b"\x93NUMPY\x01\x00v\x00{'descr'",
    "zip archive that is empty": b"PK\x05\x06" + bytes(18),
    "begins with the bytes 89 50 4e 47": b"\x89PNG\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("reason", OTHERS)
def test_w4_file_of_another_kind_is_named_for_what_it_is(tmp_path, name, reason):
    file = tmp_path / name
    file.write_bytes(OTHERS[reason])
    assert_refused(file, code="E-WEIGHTS-011", reason=reason)


def test_w4_what_is_not_a_file_is_named(tmp_path):
    assert_refused(tmp_path / "absent.pth", code="E-WEIGHTS-001", reason="there is no such file")
    assert_refused(tmp_path, code="E-WEIGHTS-014", reason="is a folder.* it holds no .safetensors")
    (tmp_path / "model.safetensors").touch()
    assert_refused(tmp_path, code="E-WEIGHTS-014", reason=r"name the file in it: model\.safetensors")


def test_w10_checkpoint_folder_of_torch_distributed_is_refused(tmp_path):
    ran, folder = tmp_path / "ran", tmp_path / "checkpoint"
    folder.mkdir()
    (folder / ".metadata").write_bytes(finish(call("os.system", f"touch {ran}")))
    assert_refused(
        folder, code="E-WEIGHTS-014", reason="dcp_to_torch_save of torch.distributed.checkpoint.format_utils"
    )
    assert not ran.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_w4_torch_file_that_is_cut_short_is_refused_at_any_length(tmp_path, legacy):
    data, file = dump({"state_dict": STATE}, legacy=legacy), tmp_path / "weights.pth"
    for length in range(0, len(data), 11):
        file.write_bytes(data[:length])
        assert_refused(file)
    file.write_bytes(data[: len(data) // 2])
    assert_refused(file, reason="" if legacy else "cut short or damaged")


def test_w4_zip_of_other_things_says_what_it_holds(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_files({"weights/model.pth": b"", "readme.txt": b""}))
    assert_refused(
        tmp_path / "a.zip", code="E-WEIGHTS-013", reason="it holds weights/model.pth, readme.txt .*unpack it"
    )


# Safetensors


def write_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, *, dtype: object = "F32", shape: object = (1,)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SAFETENSORS = {
    "claims 100,000,001 bytes": (100_000_001).to_bytes(8, "little") + b"{",
    "claims 18,446,744,073,709,551,615 bytes": b"\xff" * 8 + b"{",
    "its header has 5,000 bytes, the whole file 10": (5000).to_bytes(8, "little") + b"{ ",
    "header is damaged": write_header(b'{"a": '),
    "header is damaged: .*decode": write_header(b'{"\xff": 1}'),
    "header is damaged: .*recursion": write_header(b'{"a":' + b"[" * 100_000),
    "a is given twice": write_header(b'{"a": 1, "a": 2}'),
    "dtype is given twice": write_header(
        b'{"a": {"dtype": "F32", "dtype": "F64", "shape": [1], "data_offsets": [0, 4]}}'
    ),
    "metadata is not text": write_header({"__metadata__": {"a": 1}}),
    "needs a dtype": write_header({"a": 1}),
    "tensor b needs a dtype": write_header({"b": {**entry(0, 4), "code": "import os"}}, bytes(4)),
    "unknown dtype F31; allowed: F64": write_header({"a": entry(0, 4, dtype="F31")}, bytes(4)),
    r"tensor a has the shape \[-1\]": write_header({"a": entry(0, 4, shape=[-1])}, bytes(4)),
    r"the shape \[True\]": write_header({"a": entry(0, 4, shape=[True])}, bytes(4)),
    "tensor a of 8 bytes lies at bytes 0 to 4": write_header({"a": entry(0, 4, shape=[2])}, bytes(4)),
    "tensor a of 4 bytes lies at bytes -4 to 0": write_header({"a": entry(-4, 0)}, bytes(4)),
    "tensor a of 4 bytes lies at bytes 4 to 0": write_header({"a": entry(4, 0)}, bytes(4)),
    "tensors need 8 bytes, it has 4": write_header({"a": entry(0, 4), "b": entry(4, 8)}, bytes(4)),
    "tensor b overlaps": write_header({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
    "tensor b leaves a gap": write_header({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "5 bytes follow its tensors": write_header({"a": entry(0, 4)}, bytes(9)),
    "of .* bytes lies at bytes 0 to 4": write_header({"a": entry(0, 4, shape=[2**62, 2**62])}, bytes(4)),
    r"tensor a\\x1b\[2J needs": write_header({"a\x1b[2J": 1}),
}


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
@pytest.mark.parametrize("reason", SAFETENSORS)
def test_w5_unsound_safetensors_file_is_named(tmp_path, name, reason):
    file = tmp_path / name
    file.write_bytes(SAFETENSORS[reason])
    assert_refused(file, code="E-WEIGHTS-017", reason=reason)


def test_w5_safetensors_file_cut_short_or_with_junk_is_refused_at_any_length(tmp_path):
    data, file = save_safetensors(STATE), tmp_path / "weights.safetensors"
    for length in range(len(data)):
        file.write_bytes(data[:length])
        assert_refused(file)
    file.write_bytes(data + b"\0")
    assert_refused(file, reason="1 bytes follow its tensors")


# Values that would fill the memory


def test_values_that_grow_when_they_are_copied_are_refused(tmp_path):
    file = tmp_path / "weights.pth"
    bomb: list[object] = []
    for _ in range(60):
        bomb = [bomb, bomb]
    torch.save({"state_dict": STATE, "meta": {"bomb": bomb}}, file)
    assert_refused(file, code="E-WEIGHTS-002", reason="more than 100,000 values")
    endless: list[object] = []
    endless.append(endless)
    torch.save({"state_dict": STATE, "meta": endless}, file)
    assert_refused(file, code="E-WEIGHTS-002", reason="RecursionError")
    torch.save({"a": torch.ones(1).expand(10**12)}, file)
    assert_refused(file, code="E-WEIGHTS-002", reason="larger than its stored bytes")


# Damage of any kind

SOUND = {
    "zip": dump({"state_dict": STATE, "meta": {"CLASSES": ["road"], "epoch": 3}}),
    "legacy": dump({"state_dict": STATE, "meta": {"CLASSES": ["road"], "epoch": 3}}, legacy=True),
    "safetensors": save_safetensors(STATE, metadata={"format": "pt"}),
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("damage") / "weights.bin"


@pytest.mark.parametrize("kind", SOUND)
@settings(max_examples=100, deadline=None)
@given(draw=st.data())
def test_damaged_file_gives_tensors_or_a_named_error(scratch, kind, draw):
    data = bytearray(SOUND[kind])
    places = st.integers(0, len(data) - 1)
    for place, value in draw.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=4)):
        data[place] = value
    scratch.write_bytes(data[: draw.draw(st.one_of(st.just(len(data)), places))])
    try:
        state, meta = read_checkpoint(scratch)
    except WeightsError:
        assert_refused(scratch)
    else:
        assert all(type(value) is torch.Tensor for value in state.values())
        assert isinstance(meta, dict)
