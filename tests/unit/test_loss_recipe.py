"""The losses of a recipe: what may be named, how mistakes are answered, and that the words fit the functions."""

from __future__ import annotations

import inspect

import pytest

from nestseg.build import build_criterion
from nestseg.core.errors import RecipeError
from nestseg.losses.criterion import CLASS_WEIGHTED, LOSSES, Criterion, LossTerm
from nestseg.recipe import _LOSS_TERMS, CLASS_WEIGHTED_LOSSES, CrossEntropySection, LossSection, Recipe, known_fields
from nestseg.recipes import named_recipe, resolve_recipe

COMMON = ("logits", "target", "class_weights", "ignore_index", "align_corners")


def test_recipes_name_the_losses_that_there_are():
    assert list(_LOSS_TERMS) == list(LOSSES)
    assert CLASS_WEIGHTED_LOSSES == CLASS_WEIGHTED


@pytest.mark.parametrize("name", LOSSES)
def test_options_of_a_term_and_their_defaults_are_those_of_its_function(name):
    parameters = inspect.signature(LOSSES[name]).parameters
    options = {key: value.default for key, value in parameters.items() if key not in COMMON}
    fields = _LOSS_TERMS[name](name=name).model_dump()
    assert fields == {"name": name, "weight": 1.0, **options}
    assert ("class_weights" in parameters) is (name in CLASS_WEIGHTED)


def test_every_named_recipe_has_plain_cross_entropy():
    assert LossSection().terms == (CrossEntropySection(),)
    assert named_recipe("fcn_resnest50-d8_voc").loss == LossSection()


def test_terms_are_set_on_the_command_line_and_survive_yaml():
    recipe = resolve_recipe("demo", ["loss.terms=[{name: cross_entropy}, {name: dice, weight: 0.5}]"])
    assert [(term.name, term.weight) for term in recipe.loss.terms] == [("cross_entropy", 1.0), ("dice", 0.5)]
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert "- {name: dice, weight: 0.5}" in recipe.to_yaml()


def test_a_recipe_written_before_there_were_terms_means_cross_entropy():
    values = resolve_recipe("demo").model_dump()
    del values["loss"]["terms"]
    assert Recipe.model_validate(values) == resolve_recipe("demo")


@pytest.mark.parametrize(
    ("terms", "answer"),
    [
        ("[{name: dyce}]", "loss.terms.0.name is 'dyce': did you mean dice?"),
        (
            "[{weight: 2}]",
            "loss.terms.0.name is missing: allowed: cross_entropy, ohem, focal, dice, tversky, lovasz, bou",
        ),
        ("[{name: ohem}, {name: zzz}]", "loss.terms.1.name is 'zzz': allowed: cross_entropy, ohem"),
        ("[{name: [dice]}]", "loss.terms.0.name is ['dice']: "),
        ("[{name: focal, gama: 1}]", "unknown field loss.terms.0.gama of focal: did you mean gamma"),
        ("[{name: dice, label_smoothing: 0.1}]", "label_smoothing of dice: allowed: name, weight"),
        ("[{name: dice, 3: 1}]", "unknown field loss.terms.0.3 of dice: allowed: name, weight"),
        ("[{name: focal, gamma: -1}]", "loss.terms.0.gamma is -1: number >= 0"),
        ("[{name: ohem, threshold: 0}]", "loss.terms.0.threshold is 0: number > 0 <= 1"),
        ("[{name: dice, weight: 0}]", "loss.terms.0.weight is 0: number > 0"),
        ("[{name: tversky, alpha: .inf}]", "loss.terms.0.alpha is inf: number > 0"),
        ("[]", "loss.terms is empty; name at least one"),
        ("dice", "loss.terms is 'dice': [{name: one of cross_entropy, ohem"),
        ("[dice]", "loss.terms.0 is 'dice': [{name: one of cross_entropy, ohem"),
    ],
)
def test_a_mistake_in_the_terms_is_one_problem_that_names_what_is_allowed(terms, answer):
    with pytest.raises(RecipeError) as raised:
        resolve_recipe("demo", [f"loss.terms={terms}"])
    assert raised.value.code == "E-RECIPE-003"
    assert answer in raised.value.reason
    assert ";" not in raised.value.reason.removeprefix("loss.terms is empty;").replace("; its options", "")


def test_all_mistakes_are_answered_at_once():
    with pytest.raises(RecipeError) as raised:
        resolve_recipe("demo", ["loss.terms=[{name: dyce}, {name: focal, gamma: x}]"])
    assert "dyce" in raised.value.reason
    assert "loss.terms.1.gamma is 'x': number >= 0" in raised.value.reason


def test_the_field_of_terms_is_known_and_no_field_is_below_it():
    words = known_fields()["loss.terms"]
    assert words.startswith("[{name: one of cross_entropy")
    assert not [field for field in known_fields() if field.startswith("loss.terms.")]
    with pytest.raises(RecipeError, match=r"E-RECIPE-011.*did you mean loss\.terms"):
        resolve_recipe("demo", ["loss.terms.0.name=dice"])


def test_class_weights_that_no_term_uses_are_refused():
    weights = "loss.class_weights=median_frequency"
    with pytest.raises(
        RecipeError, match=r"loss\.class_weights act on cross_entropy, ohem, focal, loss\.terms has dice"
    ):
        resolve_recipe("demo", ["loss.terms=[{name: dice}, {name: lovasz}]", weights])
    for name in CLASS_WEIGHTED:
        resolve_recipe("demo", [f"loss.terms=[{{name: dice}}, {{name: {name}}}]", weights])


def test_the_criterion_of_a_recipe_has_its_numbers():
    plain = build_criterion(resolve_recipe("demo"), device="cpu")
    assert isinstance(plain, Criterion)
    assert plain.terms == (LossTerm("cross_entropy", 1.0, {"label_smoothing": 0.0}),)
    assert plain.class_weights is None
    recipe = resolve_recipe(
        "demo",
        [
            "loss.class_weights=[0.5, 1, 2, 3, 4, 5, 6, 7]",
            "loss.terms=[{name: ohem, threshold: 0.6}, {name: tversky, weight: 0.25, exponent: 0.75}]",
            "auxiliary_head.enabled=true",
            "auxiliary_head.loss_weight=0.3",
            "head.align_corners=true",
        ],
    )
    criterion = build_criterion(recipe, device="cpu")
    assert criterion.terms == (
        LossTerm("ohem", 1.0, {"threshold": 0.6, "min_share": 0.0625}),
        LossTerm("tversky", 0.25, {"alpha": 0.3, "beta": 0.7, "exponent": 0.75}),
    )
    assert criterion.class_weights is not None
    assert criterion.class_weights.tolist() == [0.5, 1, 2, 3, 4, 5, 6, 7]
    assert criterion.auxiliary_weight == 0.3
    assert criterion.align_corners
