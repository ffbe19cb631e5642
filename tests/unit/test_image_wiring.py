"""Recipe fields of augmentation and image types reach what they name."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

from nestseg.build import build_dataset, build_model, build_predictor, build_transform, describe_model
from nestseg.core.errors import RecipeError
from nestseg.core.types import Sample
from nestseg.data.dataset import SegmentationDataset
from nestseg.data.derive import DatasetFacts
from nestseg.data.spec import DatasetSpec
from nestseg.data.toystreets import ToyStreets
from nestseg.data.transforms import sample_generator
from nestseg.recipe import Recipe
from nestseg.recipes import resolve_recipe
from nestseg.store.files import write_model_file
from nestseg.weights.model import load_backbone

SMALL = ["data.crop_size=[64, 96]", "head.channels=16"]


def test_every_effect_is_built_from_its_section():
    recipe = resolve_recipe(
        "demo",
        [
            *SMALL,
            "augmentation.colour_jitter={hue: 0.2}",
            "augmentation.blur={sigma: [1, 2]}",
            "augmentation.copy_paste={classes: [pole, person]}",
            "augmentation.cut_mix={alpha: 2}",
            "augmentation.mix_up={}",
            "augmentation.rotation={degrees: 7}",
            "augmentation.erasing={area: [0.1, 0.2]}",
            "augmentation.torchvision=[{name: RandomSolarize, threshold: 128, p: 0.2}]",
        ],
    )
    assert Recipe.parse(recipe.to_yaml()) == recipe
    dataset = build_dataset(recipe, None, split="val")
    transform = build_transform(recipe, dataset)
    assert transform.colour_jitter.hue == 0.2
    assert transform.copy_paste.classes == (7, 6)
    assert transform.rotation.degrees == 7
    assert transform.extra[0].threshold == 128
    sample = transform(dataset.read(0), sample_generator(0, 0, 0))
    assert sample.image.shape == (64, 96, 3)


def test_unknown_names_are_refused_before_anything_runs():
    dataset = build_dataset(resolve_recipe("demo"), None, split="val")
    for setting, code in (
        ("augmentation.copy_paste={classes: [poel]}", "E-RECIPE-067"),
        ("augmentation.torchvision=[{name: RandAugment}]", "E-RECIPE-064"),
        ("augmentation.erasing={area: [0.3, 0.2]}", "E-RECIPE-063"),
    ):
        with pytest.raises(RecipeError, match=code):
            build_transform(resolve_recipe("demo", [setting]), dataset)
    with pytest.raises(RecipeError, match=r"data\.mean has 3"):
        resolve_recipe("demo", ["data.in_channels=4"])


def test_a_recipe_of_four_channels_builds_predicts_and_is_described():
    four = ["data.in_channels=4", "data.image_dtype=uint16", "data.mean=[1,2,3,4]", "data.std=[5,6,7,8]"]
    recipe = resolve_recipe("demo", [*SMALL, *four])
    model = build_model(recipe)
    metadata = describe_model(recipe, step=0)
    predictor = build_predictor(model, metadata)
    pixels = np.random.default_rng(0).integers(0, 65536, (70, 90, 4), np.uint16)
    assert predictor.predict(pixels).labels.shape == (70, 90)
    assert model.backbone.conv1[0].weight.shape[1] == 4
    assert torch.equal(model.mean.flatten(), torch.tensor([1.0, 2, 3, 4]))
    assert build_transform(recipe, build_dataset(recipe, None, split="val")).pad_colour == (1, 2, 3, 4)


def test_pretrained_rgb_weights_are_adapted_to_other_channels(tmp_path):
    rgb = resolve_recipe("demo", SMALL)
    torch.manual_seed(0)
    source = build_model(rgb)
    write_model_file(tmp_path / "model.safetensors", source.state_dict(), describe_model(rgb, step=0))
    one = resolve_recipe("demo", [*SMALL, "data.in_channels=1", "data.mean=[120]", "data.std=[60]"])
    model = build_model(one)
    words = load_backbone(model.backbone, str(tmp_path / "model.safetensors"), name="resnest14")
    assert words.endswith("first convolution adapted from 3 to 1 channels")
    first, adapted = (net.backbone.conv1[0].weight for net in (source, model))
    assert torch.allclose(adapted, first.sum(1, keepdim=True))
    assert torch.equal(model.backbone.layer1[0].conv1.weight, source.backbone.layer1[0].conv1.weight)


def test_classes_to_paste_that_no_picture_shows_are_an_error_and_not_silently_off():
    recipe = resolve_recipe("demo", ["augmentation.copy_paste={classes: [pole]}"])
    empty = Unlabelled()
    with pytest.raises(RecipeError, match=r"E-RECIPE-071 .*no picture of the 2 .* shows pole"):
        build_transform(recipe, empty)


class Unlabelled(SegmentationDataset):
    """Two pictures of sky."""

    taxonomy = ToyStreets.taxonomy
    splits = ("train",)
    terms = ""
    official_counts: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        """There is nothing to open."""

    def __len__(self) -> int:
        return 2

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> Sample:
        return Sample(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))


def test_a_recipe_and_its_data_set_file_agree_on_the_image_type():
    spec = DatasetSpec.parse(
        "{name: scans, channels: 1, dtype: uint16, files: {images: i, labels: l}, "
        "classes: [a, b], splits: {train: {share: 1}}}"
    )
    facts = DatasetFacts.from_sizes([(64, 64)] * 8, num_images=8)
    name = "fcn_resnest14-d32"
    assert resolve_recipe(name, spec=spec, facts=facts).data.in_channels == 1
    with pytest.raises(RecipeError, match=r"are 1 uint8, but data\.spec reads 1 uint16; change .* of the data set"):
        resolve_recipe(name, ["data.image_dtype=uint8"], spec=spec, facts=facts)
