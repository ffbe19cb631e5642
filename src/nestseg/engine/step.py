"""One optimisation step: forward, loss, backward, update. No value is read back to the host here."""

from __future__ import annotations

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from nestseg.core.dist import share_of_pixels
from nestseg.core.types import Batch, LossTerms
from nestseg.losses.cross_entropy import segmentation_loss
from nestseg.ops.upsample_cross_entropy import sum_weights
from nestseg.optim import set_lr


def train_step(
    fabric: Fabric,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    batch: Batch,
    lr: float,
    auxiliary_weight: float,
    class_weights: Tensor | None = None,
    align_corners: bool = False,
) -> LossTerms:
    """Take one step on one batch.

    Args:
        fabric: Runs the backward pass.
        model: A segmenter in training mode.
        optimizer: Its optimizer.
        batch: This rank's images, on the model's device.
        lr: Learning rate of this step.
        auxiliary_weight: Weight of the auxiliary loss.
        class_weights: (K,) float weight of each class in the loss, on the model's device; None weighs all alike.
        align_corners: Grid rule by which the loss upsamples logits.

    Returns:
        This rank's loss terms, detached, on the device. Gradients are those of the (weighted) mean over the labelled
        pixels of all ranks.
    """
    set_lr(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    terms = segmentation_loss(
        model(batch.image),
        batch.target,
        auxiliary_weight=auxiliary_weight,
        class_weights=class_weights,
        align_corners=align_corners,
    )
    fabric.backward(terms.total * share_of_pixels(sum_weights(batch.target, class_weights=class_weights)))
    optimizer.step()
    auxiliary = None if terms.auxiliary is None else terms.auxiliary.detach()
    return LossTerms(terms.total.detach(), terms.main.detach(), auxiliary)
