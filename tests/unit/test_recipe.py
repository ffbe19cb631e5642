"""Recipes: typed, closed, and telling what is wrong in words."""

from __future__ import annotations

import warnings

import pytest

from nestseg.core.errors import RecipeError
from nestseg.data.derive import DatasetFacts
from nestseg.data.spec import DatasetSpec
from nestseg.recipe import Recipe, known_fields
from nestseg.recipes import (
    LABELLED_VARIANTS,
    PUBLISHED_MEAN_IOU,
    RecipeWarning,
    named_recipe,
    parse_name,
    resolve_recipe,
)


@pytest.mark.parametrize(
    ("dataset", "split", "crop", "batch", "epochs", "base"),
    [
        ("voc", "trainaug", (512, 512), 16, 60, (512, 2048)),
        ("ade20k", "train", (512, 512), 16, 130, (512, 2048)),
        ("cityscapes", "train", (512, 1024), 8, 220, (1024, 2048)),
    ],
)
def test_originals_carry_the_published_schedule(dataset, split, crop, batch, epochs, base):
    for segmentor in ("fcn", "pspnet", "deeplabv3", "deeplabv3plus"):
        recipe = named_recipe(f"{segmentor}_resnest101-d8_{dataset}")
        assert recipe.data.train_split == split
        assert recipe.data.crop_size == crop
        assert (recipe.data.batch_size, recipe.schedule.epochs) == (batch, epochs)
        assert recipe.augmentation.base_size == base == recipe.evaluation.base_size
        assert (recipe.optimizer.lr, recipe.optimizer.momentum, recipe.optimizer.weight_decay) == (0.01, 0.9, 5e-4)
        assert (recipe.schedule.name, recipe.schedule.power, recipe.schedule.min_lr) == ("poly", 0.9, 1e-4)
        assert recipe.auxiliary_head.loss_weight == 0.4
        assert recipe.backbone.dilation_variant == "plain"


def test_zoo_holds_twelve_numbers_and_nine_variants_without_one():
    assert len(PUBLISHED_MEAN_IOU) == 12
    assert len(LABELLED_VARIANTS) == 9
    assert not set(PUBLISHED_MEAN_IOU) & set(LABELLED_VARIANTS)
    assert all("resnest101-d8" in name for name in PUBLISHED_MEAN_IOU)


def test_name_is_taken_apart_even_with_dashes_in_the_backbone():
    parts = parse_name("deeplabv3plus_resnest50-fast-4s2x40d-d16_camvid")
    assert parts == ("deeplabv3plus", "resnest50-fast-4s2x40d", 16, "camvid")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("pspnet_resnest50-d16_ade", "did you mean"),
        ("pspnett_resnest101-d8_voc", "pspnet_resnest101-d8_voc"),
        ("fcn_resnest77-d8_voc", "there is no backbone resnest77"),
        ("fcn_resnest50-d4_voc", "allowed: 8, 16, 32"),
        ("qqq", "nestseg recipes"),
    ],
)
def test_unknown_name_offers_what_is_near(name, hint):
    with pytest.raises(RecipeError, match=r"E-RECIPE-020 .* fix: ") as raised:
        named_recipe(name)
    assert hint in str(raised.value)


def test_override_is_read_as_yaml():
    recipe = resolve_recipe(
        "fcn_resnest50-d8_voc",
        ["data.crop_size=[97, 65]", "evaluation.base_size=null", "optimizer.nesterov=true", "optimizer.lr=2e-3"],
    )
    assert recipe.data.crop_size == (97, 65)
    assert recipe.evaluation.base_size is None
    assert recipe.optimizer.nesterov is True
    assert recipe.optimizer.lr == pytest.approx(0.002)


def test_section_can_be_switched_off_and_its_fields_on_again():
    off = resolve_recipe("fcn_resnest50-d8_voc", ["augmentation.photometric=null"])
    assert off.augmentation.photometric is None
    again = resolve_recipe("fcn_resnest50-d8_voc", ["augmentation.photometric=null", "augmentation.photometric.hue=5"])
    assert again.augmentation.photometric is not None
    assert again.augmentation.photometric.hue == 5


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("data.batchsize=4", ("data.batch_size", "integer >= 1")),
        ("optimiser.lr=1", ("optimizer.lr", "number > 0")),
        ("data.batch_size=many", ("data.batch_size", "'many'", "integer >= 1")),
        ("data.crop_size=[1, 2, 3]", ("data.crop_size",)),
        ("backbone.dilation_variant=strange", ("one of plain, official, timm",)),
        ("output_stride=4", ("one of 8, 16, 32",)),
        ("augmentation.scale_range=[2, 1]", ("low <= high",)),
        ("schedule.min_lr=1", ("schedule.min_lr", "lower it")),
        ("seed", ("no '='",)),
        ("seed=[", ("not YAML",)),
    ],
)
def test_wrong_override_names_field_and_allowed_type(override, parts):
    with pytest.raises(RecipeError, match="fix: ") as raised:
        resolve_recipe("fcn_resnest50-d8_voc", [override])
    for part in parts:
        assert part in str(raised.value)


def test_option_that_the_optimizer_does_not_have_is_an_error():
    with pytest.raises(RecipeError, match="nesterov needs"):
        resolve_recipe("fcn_resnest50-d8_voc", ["optimizer.name=adamw", "optimizer.nesterov=true"])


def test_batch_size_without_lr_warns_with_the_scaled_value():
    with pytest.warns(RecipeWarning, match=r"--set optimizer\.lr=0\.0025"):
        resolve_recipe("fcn_resnest50-d8_voc", ["data.batch_size=4"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_recipe("fcn_resnest50-d8_voc", ["data.batch_size=4", "optimizer.lr=0.0025"])


def test_recipe_file_round_trip_and_every_problem_at_once(tmp_path):
    recipe = named_recipe("pspnet_resnest50-d16_ade20k")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert Recipe.read(file) == recipe
    assert Recipe.read(file).digest() == recipe.digest()
    file.write_text(recipe.to_yaml().replace("batch_size: 16", "batch_size: 0").replace("seed: 0", "sead: 0"))
    with pytest.raises(RecipeError) as raised:
        Recipe.read(file)
    assert "data.batch_size is 0: integer >= 1" in str(raised.value)
    assert "unknown field sead: did you mean seed" in str(raised.value)


def test_a_data_set_file_in_the_place_of_a_recipe_is_recognised():
    with pytest.raises(RecipeError, match=r"E-RECIPE-004 \| pets.yaml .*fix: .*--dataset pets.yaml"):
        Recipe.parse("{name: pets, classes: [a, b], splits: [train]}", source="pets.yaml")


def test_an_unknown_field_far_from_any_is_not_answered_with_all_of_them():
    with pytest.raises(RecipeError) as raised:
        Recipe.parse(named_recipe("demo").to_yaml() + "qqqq: 1\n")
    assert str(raised.value).count(",") < 3
    assert "unknown field qqqq" in str(raised.value)


def test_a_value_that_fits_none_of_several_types_is_one_problem():
    with pytest.raises(RecipeError) as raised:
        resolve_recipe("demo", ["loss.class_weights=medianfreq"])
    assert str(raised.value).count("loss.class_weights") == 1
    assert "loss.class_weights is 'medianfreq': one of none, median_frequency, enet or [number" in str(raised.value)


def test_a_recipe_file_with_a_data_set_file_says_that_one_is_too_much():
    spec = DatasetSpec.parse(
        "{name: pets, files: {images: i, labels: l}, classes: [a, b], splits: {train: {share: 1}}}"
    )
    facts = DatasetFacts.from_sizes([(64, 64)], num_images=1)
    with pytest.raises(RecipeError, match=r"E-RECIPE-022 \| runs/recipe.yaml .*leave out --dataset"):
        resolve_recipe("runs/recipe.yaml", spec=spec, facts=facts)


@pytest.mark.parametrize("text", ["- a", "just words", "a: [", "\x00"])
def test_file_that_is_no_recipe_is_named(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml \| .* \| fix: "):
        Recipe.read(file)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="E-RECIPE-002"):
        resolve_recipe(tmp_path / "absent.yaml")


def test_recipe_cannot_run_code(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("!!python/object/apply:os.system ['touch owned']")
    with pytest.raises(RecipeError, match="not YAML"):
        Recipe.read(file)


def test_fields_that_scripts_rely_on_exist():
    promised = (
        "backbone.pretrained backbone.dilation_variant data.batch_size data.crop_size data.num_workers optimizer.lr "
        "schedule.epochs schedule.max_steps checkpoint.every_steps evaluation.every_steps evaluation.max_images seed"
    )
    assert set(promised.split()) <= set(known_fields())


def test_shorter_run_has_a_shorter_warmup():
    assert resolve_recipe("demo", ["schedule.warmup_steps=30", "schedule.max_steps=300"]).schedule.warmup_steps == 30
    base = resolve_recipe("demo").schedule
    assert base.max_steps is not None
    assert base.warmup_steps > 0
    shorter = base.max_steps // 2
    short = resolve_recipe("demo", [f"schedule.max_steps={shorter}"]).schedule
    # the same share of the run, rounded down
    assert short.warmup_steps <= base.warmup_steps * shorter / base.max_steps < short.warmup_steps + 1
    assert resolve_recipe("demo", ["schedule.max_steps=2"]).schedule.warmup_steps == 0
    longer = resolve_recipe("demo", [f"schedule.max_steps={base.max_steps * 2}"]).schedule
    assert longer.warmup_steps == base.warmup_steps
    with pytest.raises(RecipeError, match=r"warmup_steps 9 is above schedule\.max_steps 8"):
        resolve_recipe("demo", ["schedule.max_steps=8", "schedule.warmup_steps=9"])


def test_numbers_of_an_auxiliary_head_that_is_off_are_refused():
    changes = ["auxiliary_head.enabled=false", "auxiliary_head.channels=256"]
    with pytest.raises(RecipeError, match=r"auxiliary_head\.enabled is false"):
        resolve_recipe("fcn_resnest50-d8_voc", changes)
    assert not resolve_recipe("fcn_resnest50-d8_voc", changes[:1]).auxiliary_head.enabled


def test_true_is_no_number():
    with pytest.raises(RecipeError, match=r"data\.batch_size is True .* data\.batch_size takes integer >= 1"):
        resolve_recipe("demo", ["data.batch_size=true"])
    assert resolve_recipe("fcn_resnest50-d8_voc", ["head.concat_input=true"]).head.concat_input


def test_the_start_of_the_weights_follows_what_an_override_names():
    assert resolve_recipe("fcn_resnest50-d8_voc").backbone.pretrained == "official:resnest50"
    assert resolve_recipe("fcn_resnest14-d8_voc").backbone.pretrained == "timm:resnest14"
    assert resolve_recipe("demo").backbone.pretrained == "none"
    changed = resolve_recipe("fcn_resnest50-d8_voc", ["backbone.name=resnest101"])
    assert changed.backbone.pretrained == "official:resnest101"
    changed = resolve_recipe("fcn_resnest50-d8_voc", ["backbone.name=timm:resnet18", "output_stride=32"])
    assert changed.backbone.pretrained == "timm:resnet18"
    kept = resolve_recipe("fcn_resnest50-d8_voc", ["backbone.name=resnest101", "backbone.pretrained=a.pth"])
    assert kept.backbone.pretrained == "a.pth"
    tuned = resolve_recipe("demo", ["init.model=runs/a"])
    assert tuned.backbone.pretrained == "none"
    assert not tuned.backbone.zero_init_residual
    with pytest.raises(RecipeError, match=r"init\.model brings its own backbone"):
        resolve_recipe("fcn_resnest50-d8_voc", ["init.model=a.pth", "backbone.pretrained=b.pth"])
    with pytest.raises(RecipeError, match=r"init\.class_map is set without init\.model"):
        resolve_recipe("fcn_resnest50-d8_voc", ["init.class_map={a: b}"])
    with pytest.raises(RecipeError, match="is for ResNeSt"):
        resolve_recipe("demo", ["backbone.name=timm:resnet18"])
