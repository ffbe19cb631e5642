"""Any rectangle sliced out of a packed picture is that rectangle of the picture."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestseg.core.types import Sample
from nestseg.data.packed import TILE, PackedDataset, pack_dataset
from nestseg.data.toystreets import ToyStreets

HEIGHTS = (1, TILE[0] - 1, TILE[0], TILE[0] + 1, 3 * TILE[0] - 5)
WIDTHS = (1, TILE[1] - 1, TILE[1], TILE[1] + 1, 2 * TILE[1] + 7)


class Drawn:
    """A picture of every size."""

    taxonomy, terms, absent_classes, official_counts = ToyStreets.taxonomy, "none", "skip", {}
    sizes = tuple(product(HEIGHTS, WIDTHS))

    def __len__(self):
        return len(self.sizes)

    def name(self, index):
        return f"{index}"

    def read(self, index):
        size = self.sizes[index]
        rng = np.random.default_rng(index)
        return Sample(rng.integers(0, 256, (*size, 3), np.uint8), rng.integers(0, 8, size, np.uint8))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    pack_dataset(Drawn(), folder, split="train")
    return PackedDataset(folder, "train")


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_rectangle_of_any_size_of_picture(packed, data):
    index = data.draw(st.integers(0, len(Drawn.sizes) - 1), label="picture")
    height, width = Drawn.sizes[index]
    top, bottom = sorted(data.draw(st.tuples(st.integers(0, height), st.integers(0, height)), label="rows"))
    left, right = sorted(data.draw(st.tuples(st.integers(0, width), st.integers(0, width)), label="columns"))
    image = packed.read_lazily(index).image
    np.testing.assert_array_equal(
        image[top:bottom, left:right], Drawn().read(index).image[top:bottom, left:right], strict=True
    )
