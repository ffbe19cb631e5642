"""What a run minimises: a weighted sum of losses, of the main and of the auxiliary logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, final

from torch import Tensor

from nestseg.core.errors import nearest
from nestseg.core.types import LossTerms, SegLogits
from nestseg.losses.boundary import boundary_loss
from nestseg.losses.cross_entropy import cross_entropy_loss
from nestseg.losses.dice import dice_loss
from nestseg.losses.focal import focal_loss
from nestseg.losses.lovasz import lovasz_loss
from nestseg.losses.ohem import ohem_loss
from nestseg.losses.tversky import tversky_loss
from nestseg.ops.upsample_cross_entropy import sum_weights

LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy_loss,
    "ohem": ohem_loss,
    "focal": focal_loss,
    "dice": dice_loss,
    "tversky": tversky_loss,
    "lovasz": lovasz_loss,
    "boundary": boundary_loss,
}
"""Losses by name: each takes low-resolution logits and a full-resolution target."""

CLASS_WEIGHTED = ("cross_entropy", "ohem", "focal")
"""Losses that are means over pixels, which class weights act on; the others count classes alike by themselves."""


class LossTerm(NamedTuple):
    """One loss of a sum: a key of `LOSSES`, its factor, and arguments of its own."""

    name: str
    weight: float = 1.0
    options: Mapping[str, float] = MappingProxyType({})


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Criterion:
    """A weighted sum of losses, the same for the main and the auxiliary logits.

    Args:
        terms: What is added up; at least one.
        auxiliary_weight: Factor of the sum for the auxiliary logits; that for the main ones has 1.
        class_weights: How much a pixel of each class counts in the terms of `CLASS_WEIGHTED`, (K,) float on the device
            of the logits; None counts all alike.
        align_corners: Grid rule by which logits are upsampled.

    Raises:
        ValueError: Without terms, for an unknown name, a factor that is not above 0, or class weights that no term
            uses.

    Reference:
        Zhao, Shi, Qi, Wang, Jia, "Pyramid Scene Parsing Network", CVPR 2017, section 4 (auxiliary loss) and
        section 5.2 (its weight 0.4).

    Deviations:
        None known for cross-entropy, the paper's only loss.

    Example:
        >>> import torch
        >>> target = torch.zeros(1, 8, 8, dtype=torch.uint8)
        >>> logits = SegLogits(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2))
        >>> [round(term.item(), 4) for term in Criterion()(logits, target)]
        [0.9704, 0.6931, 0.6931]
        >>> criterion = Criterion(terms=(LossTerm("cross_entropy"), LossTerm("tversky", 0.5, {"alpha": 0.4})))
        >>> round(criterion(logits, target).main.item(), 4)
        0.899
    """

    terms: tuple[LossTerm, ...] = (LossTerm("cross_entropy"),)
    auxiliary_weight: float = 0.4
    class_weights: Tensor | None = None
    align_corners: bool = False

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError(f"no loss; name at least one of {', '.join(LOSSES)}")
        for term in self.terms:
            if term.name not in LOSSES:
                raise ValueError(f"no loss is called {term.name}: {nearest(term.name, LOSSES)}")
            if not term.weight > 0:
                raise ValueError(f"{term.name} has weight {term.weight}; allowed above 0")
        if self.class_weights is not None and not any(term.name in CLASS_WEIGHTED for term in self.terms):
            raise ValueError(f"class weights, but none of the losses they act on: {', '.join(CLASS_WEIGHTED)}")

    def __call__(self, logits: SegLogits, target: Tensor) -> LossTerms:
        """Compare logits with a target.

        Args:
            logits: Main and auxiliary scores, each at its own stride.
            target: Train ids in [0, K), or 255 where a pixel does not count.

        Returns:
            ``total = main + auxiliary_weight * auxiliary``. Both parts are weighted sums of the terms, without their
            own factors; without auxiliary logits the total is the main loss.

        Shape:
            - logits.main: (N, K, h, w) float
            - logits.auxiliary: (N, K, h', w') float or None
            - target: (N, H, W) uint8 or int64
            - returns: three scalars, the last one None where there are no auxiliary logits
        """
        main = self._add_terms(logits.main, target)
        if logits.auxiliary is None:
            return LossTerms(total=main, main=main, auxiliary=None)
        auxiliary = self._add_terms(logits.auxiliary, target)
        return LossTerms(total=main + self.auxiliary_weight * auxiliary, main=main, auxiliary=auxiliary)

    def sum_weights(self, target: Tensor) -> Tensor:
        """Return what a part of a batch counts beside others: its labelled pixels, weighted by class weights.

        Losses of parts, averaged by this, are exactly the loss of the whole batch for cross-entropy and focal loss,
        and for boundary loss without class weights. For the others, what is minimised is the mean of the parts' losses:
        overlaps, orders and hardest pixels are those of a part.

        Shape:
            - target: (N, H, W) uint8 or int64
            - returns: () int64, or float with class weights
        """
        return sum_weights(target, class_weights=self.class_weights)

    def _add_terms(self, logits: Tensor, target: Tensor) -> Tensor:
        first, *others = (self._weigh(term, logits, target) for term in self.terms)
        return sum(others, start=first)

    def _weigh(self, term: LossTerm, logits: Tensor, target: Tensor) -> Tensor:
        weights = {"class_weights": self.class_weights} if term.name in CLASS_WEIGHTED else {}
        loss = LOSSES[term.name](logits, target, align_corners=self.align_corners, **weights, **term.options)
        return term.weight * loss
