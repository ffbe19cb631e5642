"""What the train ids of a data set mean: class names and the colours to draw them with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError

Colour = tuple[int, int, int]


def plain_name(name: str) -> str:
    """Return what counts when class names are compared: letters and digits, without case.

    Example:
        >>> plain_name("Traffic-light") == plain_name("traffic light")
        True
    """
    return "".join(character for character in name.casefold() if character.isalnum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Taxonomy:
    """The classes of a data set in train-id order.

    Args:
        name: The data set's name, for example ``"cityscapes"``.
        classes: One name a train id; at most 255, since 255 marks ignored pixels.
        palette: One (red, green, blue) colour a class, 0-255.

    Raises:
        DataError: If names and colours differ in number, a name is repeated, or there are none or more than 255.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= 255:
            raise DataError(
                "E-DATA-001",
                f"{len(self.classes)} classes; allowed 1 to 255, because train id 255 marks ignored pixels",
                fix="merge or drop classes",
                path=self.name,
            )
        if len(self.palette) != len(self.classes):
            raise DataError(
                "E-DATA-002",
                f"{len(self.classes)} class names but {len(self.palette)} colours",
                fix="give one colour a class",
                path=self.name,
            )
        repeated = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if repeated:
            raise DataError(
                "E-DATA-003",
                f"class names given twice: {', '.join(repeated)}",
                fix="rename them",
                path=self.name,
            )

    @property
    def num_classes(self) -> int:
        """Number of classes K."""
        return len(self.classes)

    def colour_table(self) -> NDArray[np.uint8]:
        """Colours by train id, black for every id without a class.

        Shape:
            - returns: (256, 3) uint8 RGB
        """
        table = np.zeros((256, 3), np.uint8)
        table[: self.num_classes] = self.palette
        return table
