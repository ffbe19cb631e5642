"""What labels look like, in words: the sentences a user reads when ids do not fit (P15, P24, P25)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nestseg.core.taxonomy import Taxonomy
from nestseg.data.datasets import DATASETS
from nestseg.data.toystreets import ToyStreets
from nestseg.data.verify import problems as kinds
from nestseg.data.verify.files import Picture
from nestseg.data.verify.labels import (
    Edges,
    LabelCheck,
    LabelRule,
    check_labels,
    count_colours,
    count_ids,
    find_undefined,
    guess_colours,
    guess_values,
    measure_edges,
    word_values,
)

NO_EDGES = Edges(0, 0)
PALETTES = {name: dataset.taxonomy.palette for name, dataset in DATASETS.items()}


def make_rule(num_classes: int, *, ignored: Sequence[int] = (255,), bits: int = 8, **options: object) -> LabelRule:
    """A data set of one's own: ids 0 to K - 1 are the train ids."""
    label_map = np.full(1 << bits, 255, np.uint8)
    label_map[:num_classes] = range(num_classes)
    return LabelRule(
        taxonomy=Taxonomy(
            name="mine",
            classes=tuple(f"class {index}" for index in range(num_classes)),
            palette=tuple((index, 255 - index, 7) for index in range(num_classes)),
        ),
        values=frozenset({*range(num_classes), *ignored}),
        label_map=label_map,
        **options,
    )


def count(values: Sequence[int], *, size: int = 256) -> np.ndarray:
    counts = np.zeros(size, np.int64)
    counts[list(values)] = 100
    return counts


def guess(values: Sequence[int], rule: LabelRule, *, edges: Edges = NO_EDGES, size: int = 256) -> tuple[str, str]:
    found = guess_values(count(values, size=size), rule=rule, edges=edges)
    assert found is not None
    return found


# Values


@pytest.mark.parametrize("ignored", [(), (255,)])
def test_a_mask_of_0_and_255(ignored):
    """Also where 255 is defined as ignored: then no pixel of class 1 would be left."""
    assert guess([0, 255], make_rule(2, ignored=ignored)) == (
        "values {0, 255} with 2 classes: looks like a 0/1 mask saved as 0/255",
        "set `label_map: {255: 1}`",
    )


def test_0_and_255_with_more_classes_is_background_and_ignored():
    assert guess_values(count([0, 255]), rule=make_rule(21), edges=NO_EDGES) is None


def test_one_based_ids():
    words, fix = guess(range(1, 22), make_rule(21))
    assert words == "values 1-21 with 21 classes: looks one-based"
    assert fix == "subtract 1 from every id, or set `label_map: {0: ignore, 1: 0, 2: 1, 3: 2, ..., 21: 20}`"
    assert guess([1, 2], make_rule(2))[1].endswith("set `label_map: {0: ignore, 1: 0, 2: 1}`")


def test_one_based_ids_with_zero_for_nothing():
    words, fix = guess(range(22), make_rule(21))
    assert words.endswith("looks one-based, with 0 for pixels that nobody labelled")
    assert fix.endswith("{0: ignore, 1: 0, 2: 1, 3: 2, ..., 21: 20}`")


def test_255_where_it_is_not_defined():
    words, fix = guess([0, 1, 2, 255], make_rule(3, ignored=()))
    assert words == "value 255 stands for ignored pixels in most data sets, and mine does not define it"
    assert fix == "set `label_map: {255: 255}` to ignore it"


def test_minus_one_of_16_bits():
    words, fix = guess([0, 2, 65535], make_rule(3), size=1 << 16)
    assert words == "value 65535 is -1 in 16 bits: pixels that nobody labelled"
    assert "255 in its place" in fix


def test_instance_ids():
    assert "instance ids" in guess([0, 7, 26_000, 26_001, 24_003], make_rule(34), size=1 << 16)[0]


@pytest.mark.parametrize(
    ("values", "num_classes", "factor"),
    [([0, 127, 255], 3, "127.5"), ([0, 85, 170, 255], 4, "85"), ([0, 257], 3, "257")],
)
def test_stretched_ids(values, num_classes, factor):
    words, fix = guess(values, make_rule(num_classes, ignored=()), size=1 << 16)
    assert words.endswith(f"looks like ids stretched by {factor}")
    assert "label_map: {0: 0, " in fix


def test_in_between_values():
    words, fix = guess([0, 3, 5, 77], make_rule(4), edges=Edges(100, 60))
    assert words.startswith("in-between values along edges: resized with interpolation")
    assert "nearest neighbour" in fix


def test_defined_values_need_no_words():
    assert guess_values(count([0, 1, 255]), rule=make_rule(3), edges=Edges(100, 60)) is None


def test_nothing_comes_to_mind():
    assert guess_values(count([0, 1, 77, 91]), rule=make_rule(3), edges=NO_EDGES) is None


@given(values=st.sets(st.integers(0, 255), min_size=1), num_classes=st.integers(1, 255))
def test_any_values_have_words(values, num_classes):
    """P24: never an exception, and a guess only where something is odd."""
    rule = make_rule(num_classes)
    found = guess_values(count(sorted(values)), rule=rule, edges=NO_EDGES)
    assert word_values(sorted(values))
    if found is not None:
        assert find_undefined(count(sorted(values)), rule) or values == {0, 255}
        assert "|" not in "".join(found)


def test_values_are_worded_as_set_or_ranges():
    assert word_values([5]) == "{5}"
    assert word_values([0, 1, 2, 255]) == "0-2, 255"
    assert word_values(range(0, 60, 2)).endswith("16, 18 and 20 more")


# Edges


def test_edges_are_counted_by_hand():
    row = np.array([[0, 0, 4, 9, 9, 8, 7, 7]], np.uint8)
    # along the row: jumps 0-4 and 4-9; in between: 4, and 8
    assert measure_edges(row) == Edges(2, 2)
    assert measure_edges(row.T.copy()) == Edges(2, 2)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_edges_of_the_smallest_maps(shape):
    assert measure_edges(np.zeros(shape, np.uint8)) == NO_EDGES


@pytest.mark.parametrize("scale", [0.5, 0.8, 1.5, 2.0])
def test_interpolation_is_told_from_nearest_neighbour(scale):
    for index in range(10):
        labels = Image.fromarray(ToyStreets(None, "val").read(index).target)
        size = (round(labels.width * scale), round(labels.height * scale))
        assert measure_edges(np.asarray(labels.resize(size, Image.Resampling.BILINEAR))).blended
        assert measure_edges(np.asarray(labels.resize(size, Image.Resampling.BICUBIC))).blended
        assert not measure_edges(np.asarray(labels.resize(size, Image.Resampling.NEAREST))).suspect


def test_large_maps_are_sampled_with_the_same_verdict():
    labels = Image.fromarray(ToyStreets(None, "val").read(0).target)
    large = (2048, 1024)
    assert measure_edges(np.asarray(labels.resize(large, Image.Resampling.BILINEAR))).blended
    assert not measure_edges(np.asarray(labels.resize(large, Image.Resampling.NEAREST))).suspect


# Colours


def paint(palette: Sequence[Sequence[int]], *, void: Sequence[int] = (0, 0, 0)) -> Image.Image:
    colours = np.array([*palette, void], np.uint8)
    return Image.fromarray(colours[np.arange(len(colours)).repeat(40).reshape(1, -1).repeat(20, 0)])


@pytest.mark.parametrize("name", ["voc", "cityscapes", "camvid", "ade20k", "toystreets"])
def test_known_palettes_are_recognised(name):
    found = count_colours(paint(PALETTES[name]))
    words, fix = guess_colours(found, rule=make_rule(5), palettes=PALETTES)
    assert words == f"three-channel labels with {len(found)} colours: these match the {name} palette"
    assert f"map the colours of {name} to their ids" in fix


def test_a_palette_with_colours_in_between_was_resized():
    image = paint(PALETTES["camvid"]).resize((900, 40), Image.Resampling.BILINEAR)
    words, _ = guess_colours(count_colours(image), rule=make_rule(5), palettes=PALETTES)
    assert "match the camvid palette, and" in words
    assert "resized with interpolation" in words


def test_three_equal_channels_are_ids():
    words, fix = guess_colours({(3, 3, 3): 9, (0, 0, 0): 5}, rule=make_rule(5), palettes=PALETTES)
    assert words == "three equal channels, values {0, 3}: looks like ids saved as RGB"
    assert fix == "save one of the channels as 8-bit grey PNG"


def test_a_photo_in_the_place_of_labels():
    noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    words, fix = guess_colours(count_colours(Image.fromarray(noise)), rule=make_rule(5), palettes=PALETTES)
    assert words.endswith("looks like a photo")
    assert "swapped" in fix


def test_colours_nobody_knows():
    assert guess_colours({(1, 2, 3): 5, (9, 8, 7): 5}, rule=make_rule(5), palettes=PALETTES) is None


# Files


def check(image: Image.Image, rule: LabelRule, *, bit_depth: int = 8) -> LabelCheck:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    picture = Picture(Image.open(encoded), image.mode, bit_depth, 1)
    picture.image.load()
    return check_labels("a.png", picture, rule=rule, palettes=PALETTES)


def test_palette_and_grey_labels_count_the_same():
    """P15."""
    grey = Image.fromarray(np.array([[0, 1, 1], [2, 255, 0]], np.uint8))
    palette = grey.copy()
    palette.putpalette(bytes(range(256)) * 3)
    for image in (grey, palette):
        checked = check(image, make_rule(3))
        assert checked.problems == ()
        assert checked.counts[[0, 1, 2, 255]].tolist() == [2, 2, 1, 1]


def test_a_wrong_value_is_worded_with_count_allowed_values_and_guess():
    """P24."""
    (problem,) = check(Image.fromarray(np.array([[1, 2, 3, 3]], np.uint8)), make_rule(3)).problems
    assert problem.code == kinds.LABEL_VALUES.code
    assert problem.reason == (
        "label value 3 (2 pixels); allowed in mine: 0-2, 255; values {1, 2, 3} with 3 classes: looks one-based"
    )


def test_16_bit_labels_are_read_where_the_rule_has_16_bits():
    image = Image.fromarray(np.array([[0, 1, 300]], np.uint16))
    assert check(image, make_rule(3), bit_depth=16).problems[0].code == kinds.LABEL_DEPTH.code
    rule = make_rule(3, bits=16, ignored=(300,))
    checked = check(image, rule, bit_depth=16)
    assert checked.problems == ()
    assert checked.counts[300] == 1
    assert check(image, make_rule(3, bits=16), bit_depth=16).problems[0].code == kinds.LABEL_VALUES.code


COLOURS = {(0, 0, 0): 0, (200, 0, 0): 1, (0, 200, 0): 2}


def test_colour_labels_are_counted_by_their_ids():
    """P15."""
    checked = check(paint(list(COLOURS)[1:]), make_rule(3, colours=COLOURS))
    assert checked.problems == ()
    assert checked.counts[:3].tolist() == [800, 800, 800]


def test_colours_that_are_not_defined_are_named():
    (problem,) = check(paint([(200, 0, 0), (9, 9, 9)]), make_rule(3, colours=COLOURS)).problems
    assert problem.code == kinds.LABEL_COLOUR.code
    assert problem.reason == "label colour (9, 9, 9) (800 pixels); mine defines 3 colours"


def test_colours_in_between_are_recognised():
    image = paint(list(COLOURS)[1:]).resize((700, 30), Image.Resampling.BILINEAR)
    (problem,) = check(image, make_rule(3, colours=COLOURS)).problems
    assert "colours in between: resized with interpolation" in problem.reason


def test_ids_where_colours_are_expected_are_named():
    (problem,) = check(Image.fromarray(np.zeros((4, 4), np.uint8)), make_rule(3, colours=COLOURS)).problems
    assert problem.code == kinds.LABEL_IDS.code


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_ids_are_counted(dtype):
    counts = count_ids(np.array([[0, 5, 5], [7, 0, 0]], dtype))
    assert counts.size == np.iinfo(dtype).max + 1
    assert {value: counts[value] for value in np.flatnonzero(counts).tolist()} == {0: 3, 5: 2, 7: 1}
