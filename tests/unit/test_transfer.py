"""Fine-tuning: what a network takes from another whole model, and what it says about it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nestseg.core.errors import WeightsError
from nestseg.core.taxonomy import Taxonomy
from nestseg.models.segmenter import create_model
from nestseg.recipes import resolve_recipe
from nestseg.weights.transfer import RECIPE_FIELDS, SILENT_FIELDS, TransferWarning, match_classes, transfer_weights

SMALL = {"head_channels": 16, "auxiliary_channels": 16, "output_stride": 32}
STREET = Taxonomy(name="street", classes=("road", "Side-Walk", "tram"), palette=((0, 0, 0), (1, 1, 1), (2, 2, 2)))
CITY = Taxonomy(
    name="city",
    classes=("sky", "sidewalk", "train", "road"),
    palette=((0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)),
)
PATH = Path("city.safetensors")


def build(segmentor="fcn", *, taxonomy, seed, **options):
    torch.manual_seed(seed)
    model = create_model(segmentor, "resnest14", num_classes=taxonomy.num_classes, **SMALL | options)
    for norm in model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.running_mean)
    torch.nn.init.normal_(model.decode_head.classifier.bias)
    return model


def transfer(model, source, *, class_map=None):
    return transfer_weights(
        model,
        source.state_dict(),
        source=source.describe(CITY),
        classes=STREET.classes,
        class_map=class_map or {},
        path=PATH,
    )


@pytest.mark.parametrize("segmentor", ["fcn", "pspnet", "deeplabv3", "deeplabv3plus"])
def test_everything_but_the_rows_of_new_classes_is_taken(segmentor):
    model, source = build(segmentor, taxonomy=STREET, seed=0), build(segmentor, taxonomy=CITY, seed=1)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    result = transfer(model, source)
    after, there = model.state_dict(), source.state_dict()
    for name, value in after.items():
        if ".classifier." not in name:
            assert torch.equal(value, there[name]), name
    for head in ("decode_head", "auxiliary_head"):
        for leaf in ("weight", "bias"):
            name = f"{head}.classifier.{leaf}"
            assert torch.equal(after[name][0], there[name][3])
            assert torch.equal(after[name][1], there[name][1])
            assert torch.equal(after[name][2], fresh[name][2])
    assert result.kept == (("road", "road"), ("Side-Walk", "sidewalk"))
    assert result.new == ("tram",)
    assert result.unused == ("sky", "train")
    assert str(result) == (
        "backbone and decode head kept; 2 of 3 classes kept (Side-Walk from sidewalk); new: tram; not used: sky, train"
    )


def test_class_map_takes_a_class_of_another_name():
    model, source = build(taxonomy=STREET, seed=0), build(taxonomy=CITY, seed=1)
    result = transfer(model, source, class_map={"tram": "train"})
    assert ("tram", "train") in result.kept
    assert torch.equal(model.decode_head.classifier.weight[2], source.decode_head.classifier.weight[2])


def test_kept_classes_score_as_before():
    model, source = build(taxonomy=STREET, seed=0).eval(), build(taxonomy=CITY, seed=1).eval()
    transfer(model, source)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model(image).main[:, :2], source(image).main[:, [3, 1]], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ({"trm": "train"}, "'trm', which is no class of this data set | fix: did you mean tram"),
        ({"tram": "trains"}, "'trains', which is no class of that model | fix: did you mean train"),
    ],
)
def test_class_map_with_an_unknown_class_is_refused(class_map, message):
    with pytest.raises(WeightsError) as raised:
        match_classes(STREET.classes, CITY.classes, class_map=class_map, path=PATH)
    assert "E-WEIGHTS-051 | city.safetensors" in str(raised.value)
    assert message.replace(" | ", " | ") in str(raised.value)


def test_auxiliary_head_of_another_width_starts_fresh_and_is_named():
    model = build(taxonomy=STREET, seed=0)
    source = build(taxonomy=CITY, seed=1, auxiliary_channels=8)
    before = model.auxiliary_head.classifier.weight.clone()
    result = transfer(model, source)
    assert torch.equal(model.auxiliary_head.classifier.weight, before)
    assert result.fresh == result.left_out == ("auxiliary_head",)
    assert str(result).endswith("starts fresh: auxiliary_head; left out: auxiliary_head")


@pytest.mark.parametrize(
    ("here", "there", "fresh", "left_out"),
    [(True, False, ("auxiliary_head",), ()), (False, True, (), ("auxiliary_head",)), (False, False, (), ())],
)
def test_auxiliary_head_that_one_of_them_lacks_is_named(here, there, fresh, left_out):
    def options(has):
        return {"auxiliary": has, "auxiliary_channels": 16 if has else None}

    result = transfer(build(taxonomy=STREET, seed=0, **options(here)), build(taxonomy=CITY, seed=1, **options(there)))
    assert (result.fresh, result.left_out) == (fresh, left_out)


@pytest.mark.parametrize(
    ("option", "fix"),
    [
        ({"head_channels": 8}, "--set head.channels=8"),
        ({"concat_input": True}, "--set head.concat_input=true"),
        ({"num_convs": 1}, "--set head.num_convs=1"),
        ({"head_norm": "group"}, "--set head.norm=group"),
    ],
)
def test_another_network_is_refused_with_the_fields_that_make_it_one(option, fix):
    model = build(taxonomy=STREET, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match="E-WEIGHTS-050") as raised:
        transfer(model, build(taxonomy=CITY, seed=1, **option))
    assert str(raised.value).endswith(f"fix: {fix}")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_fields_of_the_message_make_a_recipe_of_the_other_network():
    other = build(taxonomy=CITY, seed=1, segmentor="deeplabv3plus")
    with pytest.raises(WeightsError) as raised:
        transfer(build(taxonomy=STREET, seed=0, num_convs=1), other)
    overrides = raised.value.fix.removeprefix("--set ").split(" --set ")
    recipe = resolve_recipe("fcn_resnest14-d16_camvid", ["head.num_convs=1", *overrides])
    assert (recipe.segmentor, recipe.head.num_convs, recipe.head.fusion) == ("deeplabv3plus", None, "full")


def test_another_segmentor_or_backbone_is_refused():
    model = build(taxonomy=STREET, seed=0)
    with pytest.raises(WeightsError, match="segmentor is pspnet there, fcn here"):
        transfer(model, build("pspnet", taxonomy=CITY, seed=1))


def test_frozen_batch_norm_takes_the_weights_of_batch_norm():
    transfer(build(taxonomy=STREET, seed=0, backbone_norm="frozen_batch"), build(taxonomy=CITY, seed=1))


@pytest.mark.parametrize(
    ("option", "fields"),
    [
        ({"dilation_variant": "official"}, ["backbone.dilation_variant=official"]),
        ({"output_stride": 16}, ["output_stride=16"]),
        ({"mean": (0.0, 0.0, 0.0)}, ["data.mean=[0.0,0.0,0.0]"]),
    ],
)
def test_difference_that_weights_do_not_show_is_a_warning(option, fields):
    model = build("deeplabv3", taxonomy=STREET, seed=0)
    with pytest.warns(TransferWarning) as caught:
        transfer(model, build("deeplabv3", taxonomy=CITY, seed=1, **option))
    assert [str(warning.message).rpartition("--set ")[2].split(" ")[0] for warning in caught] == fields


def test_every_argument_of_a_network_is_compared_or_known_not_to_matter():
    from nestseg.store.metadata import Architecture

    handled = set(RECIPE_FIELDS) | set(SILENT_FIELDS)
    assert set(Architecture.model_fields) - handled == {"num_classes", "auxiliary", "frozen_stages", "dropout"}


def test_recipe_fields_of_the_messages_exist():
    from nestseg.recipe import known_fields

    assert {*RECIPE_FIELDS.values(), *SILENT_FIELDS.values()} <= set(known_fields())


def test_scores_do_not_travel_with_weights_that_were_trained_on(tmp_path):
    from nestseg.build import load_model
    from nestseg.store.metadata import Score

    model = build(taxonomy=CITY, seed=0)
    score = Score(dataset="city", split="val", mean_iou=0.5, protocol="single scale")
    model.metadata = model.describe(CITY).model_copy(update={"scores": (score,)})
    model.save_pretrained(tmp_path / "first")
    loaded = load_model(tmp_path / "first")
    assert loaded.describe().scores == (score,)
    loaded.train()(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    loaded.eval().save_pretrained(tmp_path / "second")
    assert load_model(tmp_path / "second").metadata.scores == ()
