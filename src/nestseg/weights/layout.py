"""What a checkpoint layout is: a table of module names, read in both directions.

A key of a state dict is a module's path and a leaf (``weight``, ``running_mean``, ...). Layouts differ in paths only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from nestseg.core.errors import WeightsError
from nestseg.core.types import DilationVariant
from nestseg.store.kinds import show_text

Row = tuple[str, str] | tuple[str, str, str]
"""(our module, their module), or for a `ConvNormReLU` (our module, their convolution, their norm).

``{rest}`` stands for a whole subtree, any other name in braces for a number. The first row that fits a path wins.
"""

Rules = tuple[Row, ...]

_FUSION = "decode_head.aspp.fuse.conv.weight"


class Renamed(NamedTuple):
    """Weights under other names.

    Args:
        state: Tensors by their new names.
        left_out: Old names of what the other side has no use for, such as an ImageNet classifier.
        names: New names by old ones.
    """

    state: dict[str, Tensor]
    left_out: tuple[str, ...]
    names: Mapping[str, str]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one project names the weights of the networks that we build, and what else its files imply.

    Args:
        name: What users call it.
        rules: A table for each kind of file. The kind that leaves the fewest keys without a row is taken, the first
            of several. Our side always has the prefixes ``backbone.``, ``decode_head.`` and ``auxiliary_head.``.
        unused: Their modules that no network of ours has; left out when reading, and listed.
        dilation_variant: What the project's ResNeSt does where it is dilated, see `ResNeSt`.
        align_corners: How the project upsamples features and logits.
        logits_resizes: How often its evaluation interpolates logits, see `ModelMetadata`.
        pool_first: Whether its ASPP concatenates the image pool before the branches instead of after them.
        wrapper: The entry of its files that holds the state dict; None where the file is the state dict.
    """

    name: str
    rules: Mapping[str, Rules]
    unused: tuple[str, ...] = ()
    dilation_variant: DilationVariant = "plain"
    align_corners: bool = False
    logits_resizes: Literal[1, 2] = 1
    pool_first: bool = False
    wrapper: str | None = None

    @property
    def is_backbone_only(self) -> bool:
        """Whether there is no place for heads."""
        return set(self.rules) == {"backbone"}

    def find_unknown(self, keys: Iterable[str]) -> list[str]:
        """Return those of their keys that no row fits and that are not known to be unused."""
        return _best(self.rules, self._used(keys), to_ours=True)[1]

    def to_ours(self, state: Mapping[str, Tensor]) -> Renamed:
        """Rename weights of this layout to our names.

        Args:
            state: Tensors by their names.

        Returns:
            Tensors by our names, and what was left out. Batch counters that old files lack stay missing.

        Shape:
            - state: any
            - returns: the same; the input channels of an ASPP's fusion rotated where the layout pools first

        Raises:
            WeightsError: E-WEIGHTS-020, if there are keys that no row fits.
        """
        used = self._used(state)
        names, unknown = _best(self.rules, used, to_ours=True)
        if unknown:
            raise WeightsError(
                "E-WEIGHTS-020",
                f"{len(unknown)} of {len(state)} keys are not of layout {self.name}",
                fix="only fcn, pspnet, deeplabv3 and deeplabv3plus on a ResNeSt, and a ResNeSt alone, are read; "
                "name the layout if another is meant",
                table=_list_keys(unknown),
            )
        renamed = {names[key]: state[key] for key in used}
        return Renamed(self._rotate(renamed, -1), tuple(key for key in state if key not in names), names)

    def from_ours(self, state: Mapping[str, Tensor]) -> Renamed:
        """Rename our weights to the names of this layout; the inverse of `to_ours`.

        Args:
            state: Tensors by our names, of a whole network or of a backbone without its prefix.

        Returns:
            Tensors by their names, and what was left out: the heads, where the layout knows only backbones.

        Shape:
            - state: any
            - returns: the same; the input channels of an ASPP's fusion rotated where the layout pools first

        Raises:
            WeightsError: E-WEIGHTS-021, if the layout has no place for some of them.
        """
        if not any(key.startswith(("backbone.", "decode_head.")) for key in state):
            state = {f"backbone.{key}": value for key, value in state.items()}
        used = [key for key in state if key.startswith("backbone.") or not self.is_backbone_only]
        names, unknown = _best(self.rules, used, to_ours=False)
        if unknown:
            raise WeightsError(
                "E-WEIGHTS-021",
                f"layout {self.name} has no place for {len(unknown)} of {len(state)} keys",
                fix="convert to nestseg, which has a place for everything",
                table=_list_keys(unknown),
            )
        rotated = self._rotate({key: state[key] for key in used}, 1)
        renamed = {names[key]: value for key, value in rotated.items()}
        return Renamed(renamed, tuple(key for key in state if key not in names), names)

    def _used(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key.rpartition(".")[0] not in self.unused]

    def _rotate(self, state: dict[str, Tensor], sign: int) -> dict[str, Tensor]:
        """Move the channels of the image pool from the front to the back (-1), or the other way (1)."""
        weight = state.get(_FUSION)
        if self.pool_first and weight is not None and weight.ndim == 4:
            # every branch is as wide as what they are fused to
            state[_FUSION] = torch.roll(weight, sign * weight.shape[0], dims=1)
        return state


def backbone_rows(prefix: str = "") -> Rules:
    """Return the table of a backbone in the authors' names."""
    return (
        ("backbone.conv1.{i}", prefix + "conv1.{i}"),
        ("backbone.bn1", prefix + "bn1"),
        ("backbone.layer{i}.{rest}", prefix + "layer{i}.{rest}"),
    )


def stem_backbone_rows(prefix: str = "") -> Rules:
    """Return the table of a backbone in mmsegmentation's names, which sssegmentation has taken over."""
    return (
        ("backbone.bn1", prefix + "stem.7"),
        ("backbone.conv1.{i}", prefix + "stem.{i}"),
        ("backbone.layer{i}.{rest}", prefix + "layer{i}.{rest}"),
    )


def _best(rules: Mapping[str, Rules], keys: list[str], *, to_ours: bool) -> tuple[dict[str, str], list[str]]:
    """Return new names by old ones, and the keys without one, by the table that leaves fewest of these."""
    tried = (_translate(rows, keys, to_ours=to_ours) for rows in rules.values())
    return min(tried, key=lambda pair: len(pair[1]))


def _translate(rows: Rules, keys: list[str], *, to_ours: bool) -> tuple[dict[str, str], list[str]]:
    compiled = _compile(rows, to_ours)
    modules: dict[str, str | None] = {}
    names, unknown = {}, []
    for key in keys:
        module, _, leaf = key.rpartition(".")
        if module not in modules:
            fits = ((pattern.fullmatch(module), target) for pattern, target in compiled)
            modules[module] = next((target.format(**fit.groupdict()) for fit, target in fits if fit), None)
        new = modules[module]
        if new is None:
            unknown.append(key)
        else:
            names[key] = f"{new}.{leaf}"
    return names, unknown


@cache
def _compile(rows: Rules, to_ours: bool) -> tuple[tuple[re.Pattern[str], str], ...]:
    pairs = [pair for row in rows for pair in _expand(row)]
    return tuple((_pattern(theirs), ours) if to_ours else (_pattern(ours), theirs) for ours, theirs in pairs)


def _expand(row: Row) -> tuple[tuple[str, str], ...]:
    if len(row) == 2:
        return (row,)
    ours, conv, norm = row
    return (f"{ours}.conv", conv), (f"{ours}.norm", norm)


def _pattern(template: str) -> re.Pattern[str]:
    groups = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[0-9]+)", re.escape(template))
    return re.compile(groups.replace("(?P<rest>[0-9]+)", "(?P<rest>.+)"))


def _list_keys(keys: list[str]) -> list[str]:
    more = [f"and {len(keys) - 10} more"] if len(keys) > 10 else []
    return [f"  {line}" for line in (*map(show_text, keys[:10]), *more)]
