"""From facts about a data set to a recipe: the published recipes come out where they apply."""

from __future__ import annotations

import pytest

from nestseg.data.derive import DatasetFacts, DerivedField, choose_splits, derive_recipe
from nestseg.data.spec import DatasetSpec
from nestseg.recipe import known_fields

SPEC = """
name: pets
files: {images: images, labels: masks}
classes: [background, cat, dog]
splits: {train: {share: 0.8}, val: {share: 0.2}}
"""


def derive(sizes: list[tuple[int, int]], num_images: int, text: str = SPEC) -> dict[str, DerivedField]:
    fields = derive_recipe(DatasetSpec.parse(text), DatasetFacts.from_sizes(sizes, num_images=num_images))
    return {entry.field: entry for entry in fields}


def values_of(sizes: list[tuple[int, int]], num_images: int) -> dict[str, object]:
    return {name: entry.value for name, entry in derive(sizes, num_images).items()}


def test_cityscapes_gets_its_published_crop_base_and_batch():
    values = values_of([(1024, 2048)], 2975)
    assert values["data.crop_size"] == (512, 1024)
    assert values["augmentation.base_size"] == (1024, 2048)
    assert values["data.batch_size"] == 8
    assert values["evaluation.base_size"] is None


def test_the_length_of_vocs_schedule_is_the_published_one_within_five_percent():
    epochs = values_of([(375, 500)] * 7 + [(500, 375)] * 3, 10_582)["schedule.epochs"]
    assert 661 * epochs == pytest.approx(39_660, rel=0.05)


def test_images_of_different_shapes_get_a_square_crop_and_are_scored_at_one_scale():
    values = values_of([(375, 500)] * 7 + [(500, 375)] * 3, 1000)
    assert values["data.crop_size"] == (384, 384)
    assert values["augmentation.base_size"] == values["evaluation.base_size"] == (375, 1500)


def test_large_images_are_scaled_down_and_small_ones_up():
    assert values_of([(3000, 4000)], 300)["augmentation.base_size"] == (1024, 1365)
    values = values_of([(48, 64)], 300)
    assert values["augmentation.base_size"] == values["evaluation.base_size"] == (128, 171)
    assert values["data.crop_size"] == (128, 160)


def test_upright_images_get_an_upright_crop():
    assert values_of([(2000, 1000)], 300)["data.crop_size"] == (1024, 512)


@pytest.mark.parametrize("num_images", [1, 3, 17, 100, 1000, 10_000, 1_000_000])
def test_any_number_of_images_gives_a_schedule_that_can_be_trained(num_images):
    values = values_of([(360, 480)], num_images)
    steps = values["schedule.epochs"] * max(1, num_images // values["data.batch_size"])
    assert steps >= 500
    assert values["schedule.epochs"] <= 500
    assert 4 <= values["data.batch_size"] <= 16
    assert values["evaluation.every_steps"] <= max(1, steps)
    assert 0 < values["optimizer.lr"] <= 0.01


def test_more_images_mean_more_steps_but_not_in_proportion():
    few, many = (values_of([(360, 480)], count)["schedule.epochs"] * (count // 16) for count in (1600, 160_000))
    assert 8 * few < many < 12 * few


def test_every_field_is_one_of_the_recipe_and_has_a_reason():
    fields = derive([(360, 480)], 100)
    assert set(fields) <= set(known_fields())
    assert all(len(entry.reason) > 10 for entry in fields.values())
    assert str(fields["data.crop_size"]).startswith("data.crop_size: [352, 480]  # images of 360x480")
    assert str(fields["evaluation.base_size"]).startswith("evaluation.base_size: null  # ")


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        ("[train, val]", ("train", "val")),
        ("[val, test, train]", ("train", "val")),
        ("[train, test]", ("train", "test")),
        ("[train, test, holdout]", ("train", "holdout")),
        ("[everything]", ("everything", None)),
    ],
)
def test_the_test_split_is_scored_only_where_there_is_no_other(splits, expected):
    text = f"{{name: a, files: {{images: '{{split}}/i', labels: '{{split}}/m'}}, classes: [a, b], splits: {splits}}}"
    assert choose_splits(DatasetSpec.parse(text)) == expected
    fields = derive([(360, 480)], 100, text)
    assert (fields["evaluation.every_steps"].value is None) == (expected[1] is None)
