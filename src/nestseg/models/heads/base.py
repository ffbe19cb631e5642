"""What every decode head has: dropout, a classifier, and a way to get one map out of four."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from nestseg.core.errors import ModelError
from nestseg.models.blocks import make_conv


class DecodeHead(nn.Module, ABC):
    """Backbone features to logits at their own stride.

    A head owns neither a loss nor the upsampling to the image's size.

    Args:
        channels: Width of the map that is classified.
        num_classes: Classes K, 1 to 255.
        dropout: Probability with which a whole channel is dropped before the classifier.

    Shape:
        - features: C2..C5, (N, C, h, w) float each
        - returns: (N, K, h', w') float

    Raises:
        ModelError: If the number of classes or the dropout is out of range.

    Reference:
        Long et al., "Fully Convolutional Networks", 2015, section 3; dropout of whole channels: Tompson et
        al., "Efficient Object Localization Using Convolutional Networks", 2015.

    Deviations:
        Classifier weights start as a normal of standard deviation 0.01 with bias 0, so that the first loss is
        near log K.
    """

    def __init__(self, *, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        if not 1 <= num_classes <= 255:
            raise ModelError(
                "E-MODEL-006",
                f"{num_classes} classes; allowed 1 to 255, because train id 255 marks ignored pixels",
                fix="merge or drop classes",
            )
        if not 0 <= dropout < 1:
            raise ModelError("E-MODEL-008", f"dropout {dropout}; allowed 0 to below 1", fix="0.1 is the default")
        self.num_classes = num_classes
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = make_conv(channels, num_classes, bias=True)
        nn.init.normal_(self.classifier.weight, std=0.01)

    @property
    @abstractmethod
    def pools_to_one_pixel(self) -> bool:
        """Whether a branch has 1x1 features, on which BatchNorm cannot train with a batch of one."""

    @abstractmethod
    def fuse_features(self, features: Sequence[Tensor]) -> Tensor:
        """Make the map that is classified.

        Args:
            features: C2..C5 of the backbone.

        Returns:
            The map, at least 0.

        Shape:
            - features: C2..C5, (N, C, h, w) float each
            - returns: (N, channels, h', w') float
        """

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Fuse the features, drop channels, classify."""
        logits: Tensor = self.classifier(self.dropout(self.fuse_features(features)))
        return logits
