"""The public API is what api.txt says: a change of it is a decision, seen in review.

After a change that is meant, write the file again with ``python tests/architecture/test_api_surface.py --write``.
"""

from __future__ import annotations

import difflib
import inspect
import sys
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import nestseg

FILE = Path(__file__).with_name("api.txt")
MAX_NAMES = 25
MAX_LINE = 110


class Word:
    """Stands for an annotation or a default; its text goes into a signature without quotes."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def word_annotation(annotation: object) -> object:
    if annotation is inspect.Parameter.empty or isinstance(annotation, type):
        return annotation
    return Word(annotation.__forward_arg__ if isinstance(annotation, typing.ForwardRef) else str(annotation))


def word_signature(function: Any, *, with_return: bool, names_only: bool = False) -> str:
    """Write a signature as in the source; a parameter a line where that is long."""
    signature = inspect.signature(function)
    parameters = []
    for parameter in signature.parameters.values():
        has_default = parameter.default is not inspect.Parameter.empty
        if names_only:
            parameter = parameter.replace(annotation=inspect.Parameter.empty)
            parameter = parameter.replace(default=Word("...")) if has_default else parameter
        else:
            parameter = parameter.replace(annotation=word_annotation(parameter.annotation))
        parameters.append(parameter)
    returned = word_annotation(signature.return_annotation) if with_return else inspect.Signature.empty
    text = str(signature.replace(parameters=parameters, return_annotation=returned))
    if len(text) <= MAX_LINE:
        return text
    lines = [str(parameter) for parameter in parameters if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    named = [str(parameter) for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    lines += ["*", *named] if named else []
    return "(\n" + "".join(f"    {line},\n" for line in lines) + ")" + text[text.rindex(")") + 1 :]


def word_class(name: str, kind: type) -> list[str]:
    """Write a constructor, and the public members that the class itself defines; fields stand in the constructor."""
    # what the fields of a recipe are is told by `nestseg recipes show`
    lines = [name + word_signature(kind, with_return=False, names_only=issubclass(kind, BaseModel))]
    for member, value in sorted(vars(kind).items()):
        if member.startswith("_"):
            continue
        if isinstance(value, property):
            returned = word_annotation(inspect.signature(value.fget).return_annotation)
            lines.append(f"{name}.{member}: {getattr(returned, '__name__', returned)}")
        elif isinstance(value, classmethod | staticmethod) or inspect.isfunction(value):
            lines.append(f"{name}.{member}" + word_signature(getattr(kind, member), with_return=True))
    return lines


def word_api() -> str:
    lines = []
    for name in sorted(nestseg.__all__):
        thing = getattr(nestseg, name)
        if inspect.isclass(thing):
            lines += word_class(name, thing)
        elif callable(thing):
            lines.append(name + word_signature(thing, with_return=True))
        else:
            lines.append(f"{name}: {type(thing).__name__}")
    return "\n".join(lines) + "\n"


def test_public_names_and_signatures_are_those_of_the_file():
    difference = "\n".join(
        difflib.unified_diff(
            FILE.read_text(encoding="utf-8").splitlines(), word_api().splitlines(), "api.txt", "now", lineterm="", n=1
        )
    )
    assert not difference, f"{difference}\nif that is meant: python tests/architecture/test_api_surface.py --write"


def test_there_are_at_most_25_public_names_and_each_of_them_exists():
    assert len(nestseg.__all__) == len(set(nestseg.__all__)) <= MAX_NAMES
    assert [name for name in nestseg.__all__ if not hasattr(nestseg, name)] == []
    assert dir(nestseg) == sorted(nestseg.__all__)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/architecture/test_api_surface.py --write")
    FILE.write_text(word_api(), encoding="utf-8")
