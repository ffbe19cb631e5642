"""recipe -> YAML -> recipe is the identity, for every name and any values."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from nestseg.data.datasets import DATASETS
from nestseg.recipe import Recipe, validate_recipe
from nestseg.recipes import BACKBONES, SEGMENTORS, named_recipe

NAMES = st.builds(
    "{}_{}-d{}_{}".format,
    st.sampled_from(SEGMENTORS),
    st.sampled_from(BACKBONES),
    st.sampled_from((8, 16, 32)),
    st.sampled_from(sorted(DATASETS)),
)


@settings(max_examples=60, deadline=None)
@given(
    name=NAMES,
    seed=st.integers(0, 2**63 - 1),
    lr=st.floats(1e-3, 10),
    crop=st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
    mean=st.tuples(*[st.floats(0, 255)] * 3),
    pretrained=st.text(min_size=1),
)
def test_any_recipe_survives_yaml(name, seed, lr, crop, mean, pretrained):
    values = named_recipe(name).model_dump()
    values["seed"] = seed
    values["optimizer"]["lr"] = lr
    values["data"] |= {"crop_size": crop, "mean": mean}
    values["backbone"]["pretrained"] = pretrained
    recipe = validate_recipe(values, source="test")
    assert Recipe.parse(recipe.to_yaml()) == recipe
