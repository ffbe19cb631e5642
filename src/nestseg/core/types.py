"""The records that cross module borders. Importing this file does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = 255
"""The train id of pixels that count neither in a loss nor in a metric."""

Size = tuple[int, int]
"""Every size in this package: (height, width)."""

Segmentor = Literal["fcn", "pspnet", "deeplabv3", "deeplabv3plus"]
"""Names of the decode heads."""

OutputStride = Literal[8, 16, 32]
"""Stride of C5 with respect to the image."""

DilationVariant = Literal["plain", "official", "timm"]
"""Which of the networks that share ResNeSt's weights is meant where stages are dilated; see `ResNeSt`."""

Norm = Literal["batch", "frozen_batch", "group"]
"""``batch``: BatchNorm. ``frozen_batch``: BatchNorm that never changes. ``group``: GroupNorm."""

Fusion = Literal["full", "separable", "projected"]
"""How the branches of ASPP become one map; see `ASPP`."""


AbsentRule = Literal["skip", "zero"]
"""What a class that occurs neither in ground truth nor in prediction does to a mean: nothing, or adds a 0."""

ImageDtype = Literal["uint8", "uint16", "float32"]
"""What an image may be stored and augmented as; networks compute in floats whatever it is."""


class Sample(NamedTuple):
    """One image with its ground truth, before batching.

    Shape:
        - image: (H, W, C) uint8, uint16 or float32; RGB when C is 3
        - target: (H, W) uint8 train ids in [0, K) or 255 (ignored)
    """

    image: NDArray[Any]
    target: NDArray[np.uint8]


class Batch(NamedTuple):
    """Samples of one size, stacked.

    Shape:
        - image: (N, C, H, W) uint8, uint16 or float32; RGB when C is 3
        - target: (N, H, W) uint8 train ids in [0, K) or 255 (ignored)
        - sample_index: (N,) int64, each sample's place in its data set
    """

    image: Tensor
    target: Tensor
    sample_index: Tensor


class SegLogits(NamedTuple):
    """What a segmenter returns: logits at their own stride, not upsampled.

    Shape:
        - main: (N, K, h, w) float
        - auxiliary: (N, K, h', w') float, or None without an auxiliary head and in evaluation mode
    """

    main: Tensor
    auxiliary: Tensor | None


class LossTerms(NamedTuple):
    """A training loss and what it is made of; all scalars, ``total`` carries the gradient."""

    total: Tensor
    main: Tensor
    auxiliary: Tensor | None
