"""What each effect beyond the table's recipe does, by hand on toy samples, and where its numbers come from."""

from __future__ import annotations

import math
import pickle
import sys

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from nestseg.core.errors import DataError, RecipeError
from nestseg.core.resize import Window
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample
from nestseg.data.augment import (
    ColourJitter,
    CopyPaste,
    CutMix,
    GaussianBlur,
    JitterDraw,
    MixUp,
    RandomErasing,
    RandomPartner,
    Rotation,
    blur_image,
    erase,
    find_class_ids,
    jitter_colours,
    list_torchvision_transforms,
    make_torchvision_transform,
    mix_pictures,
    paste_box,
    paste_classes,
    place_cut,
    rotate,
)
from nestseg.data.loader import BatchPlan, training_batches
from nestseg.data.transforms import TrainTransform, apply_torchvision, sample_generator

FILL = (124, 116, 104)
NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0, "order": (0, 1, 2, 3)}
TORCHVISION_ARGUMENTS = {
    "GaussianBlur": {"kernel_size": 5},
    "RandomAdjustSharpness": {"sharpness_factor": 2},
    "RandomAffine": {"degrees": 20, "translate": [0.1, 0.1]},
    "RandomPosterize": {"bits": 3},
    "RandomRotation": {"degrees": [-30, 30], "interpolation": 2},
    "RandomSolarize": {"threshold": 128, "p": 0.2},
}
"""Arguments of those that cannot do without."""


def make_sample(height=6, width=8, *, seed=0, classes=5):
    rng = np.random.default_rng(seed)
    return Sample(
        rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, classes, (height, width), np.uint8)
    )


def jitter(pixels, **draw):
    return jitter_colours(np.array(pixels, np.uint8), JitterDraw(**{**NEUTRAL, **draw}))


def test_neutral_jitter_leaves_the_picture():
    image = make_sample().image
    np.testing.assert_array_equal(jitter(image), image)


def test_brightness_multiplies():
    assert jitter([[[10, 101, 200]]], brightness=1.5).tolist() == [[[15, 152, 255]]]  # 151.5 goes to the even 152


def test_contrast_is_about_the_mean_of_the_grey_picture():
    # grey levels 40 and 80 have the mean 60: 60 + 0.5 * (40 - 60) = 50
    assert jitter([[[40] * 3, [80] * 3]], contrast=0.5).tolist() == [[[50] * 3, [70] * 3]]
    assert jitter([[[40] * 3, [80] * 3]], contrast=0.0).tolist() == [[[60] * 3, [60] * 3]]


def test_saturation_is_about_each_pixels_grey():
    # grey of (100, 50, 200): 29.9 + 29.35 + 22.8 = 82.05, in whole levels 82
    assert jitter([[[100, 50, 200]]], saturation=0.0).tolist() == [[[82, 82, 82]]]
    assert jitter([[[100, 50, 200]]], saturation=0.5).tolist() == [[[91, 66, 141]]]


def test_hue_turns_by_steps_of_two_degrees():
    assert jitter([[[200, 0, 0]]], hue=60).tolist() == [[[0, 200, 0]]]
    assert jitter([[[200, 0, 0]]], hue=-60).tolist() == [[[0, 0, 200]]]


def test_order_of_the_effects_counts():
    picture = [[[40] * 3, [200] * 3]]
    # clipped first: 80 and 255 about 167.5; contrast first: 80 and 160 about 120, then doubled and clipped
    assert jitter(picture, brightness=2.0, contrast=0.5)[0, :, 0].tolist() == [124, 211]
    assert jitter(picture, brightness=2.0, contrast=0.5, order=(1, 0, 2, 3))[0, :, 0].tolist() == [160, 255]


@pytest.mark.parametrize(
    ("draw", "reference", "levels"),
    [
        ({"brightness": 0.7}, lambda image: F.adjust_brightness(image, 0.7), 1),
        ({"contrast": 1.4}, lambda image: F.adjust_contrast(image, 1.4), 1),
        ({"saturation": 0.3}, lambda image: F.adjust_saturation(image, 0.3), 2),
        ({"hue": 18}, lambda image: F.adjust_hue(image, 0.1), 8),  # 8-bit HSV has 180 hues, torchvision's real ones
    ],
)
def test_each_jitter_is_torchvisions_but_for_rounding(draw, reference, levels):
    image = make_sample(40, 50).image
    theirs = reference(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert np.abs(jitter(image, **draw).astype(int) - theirs).max() <= levels


def test_jitter_draws_keep_their_ranges():
    rng = np.random.default_rng(0)
    effect = ColourJitter(brightness=0.2, contrast=0.0, saturation=1.0, hue=0.5)
    draws = [effect.draw(rng) for _ in range(2000)]
    assert min(draw.brightness for draw in draws) == pytest.approx(0.8, abs=0.01)
    assert max(draw.brightness for draw in draws) == pytest.approx(1.2, abs=0.01)
    assert {draw.contrast for draw in draws} == {1.0}
    assert {draw.hue for draw in draws} == set(range(-90, 91))
    assert len({draw.order for draw in draws}) == 24


def test_blur_spreads_a_point_by_the_gaussian():
    image = np.zeros((9, 9, 3), np.float32)
    image[4, 4] = (1000, 0, 500)
    weights = np.exp(-(np.arange(-3, 4) ** 2) / 2)
    weights /= weights.sum()
    expected = 1000 * np.outer(weights, weights)
    blurred = blur_image(image, 1.0)
    np.testing.assert_allclose(blurred[1:8, 1:8, 0], expected, atol=1e-3)
    np.testing.assert_allclose(blurred[..., 2], blurred[..., 0] / 2, atol=1e-3)
    assert (blurred[0] == 0).all()
    assert (blurred[..., 1] == 0).all()
    whole = blur_image(image.astype(np.uint16), 1.0)
    assert np.abs(whole[1:8, 1:8, 0] - expected).max() <= 1


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 7, 1), (5, 2, 6)])
def test_blur_of_small_and_one_coloured_pictures(shape):
    image = np.full(shape, 77, np.uint8)
    np.testing.assert_array_equal(blur_image(image, 2.5), image)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_by_quarters_is_exact_and_counter_clockwise(turns):
    sample = make_sample(7, 7)
    turned = rotate(sample, 90.0 * turns, fill=FILL)
    np.testing.assert_array_equal(turned.image, np.rot90(sample.image, turns))
    np.testing.assert_array_equal(turned.target, np.rot90(sample.target, turns))


def test_rotation_fills_what_it_uncovers_with_the_mean_colour_and_ignores_it():
    turned = rotate(Sample(np.full((4, 8, 3), 9, np.uint8), np.full((4, 8), 3, np.uint8)), 90.0, fill=FILL)
    # the picture was 8 wide and 4 high; upright, its middle 4 columns are covered
    assert turned.target.tolist() == [[255, 255, 3, 3, 3, 3, 255, 255]] * 4
    np.testing.assert_array_equal(turned.image[turned.target == 255], np.tile(FILL, (16, 1)))
    np.testing.assert_array_equal(turned.image[turned.target == 3], 9)


def test_rotation_never_mixes_labels():
    target = np.zeros((40, 40), np.uint8)
    target[10:30, 10:30] = 200
    turned = rotate(Sample(make_sample(40, 40).image, target), 33.0, fill=FILL)
    assert set(np.unique(turned.target)) == {0, 200, 255}


def test_rotation_angles_fill_their_range():
    sample = Sample(np.zeros((21, 21, 3), np.uint8), np.zeros((21, 21), np.uint8))
    rng = np.random.default_rng(0)
    covered = [
        int((Rotation(degrees=45, probability=1.0)(sample, rng, fill=FILL).target == 0).sum()) for _ in range(60)
    ]
    assert max(covered) > 430
    assert min(covered) < 380


def test_erasing_by_hand():
    sample = make_sample(4, 5)
    erased = erase(sample, Window(1, 2, 2, 3), fill=FILL)
    inside = np.zeros((4, 5), bool)
    inside[1:3, 2:5] = True
    assert (erased.target[inside] == 255).all()
    np.testing.assert_array_equal(erased.image[inside], np.tile(FILL, (6, 1)))
    np.testing.assert_array_equal(erased.image[~inside], sample.image[~inside])
    np.testing.assert_array_equal(erased.target[~inside], sample.target[~inside])


def test_erased_rectangles_have_the_area_and_the_shape_asked_for():
    sample = Sample(np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), np.uint8))
    effect = RandomErasing(area=(0.04, 0.16), aspect=(0.5, 2.0), probability=1.0)
    rng = np.random.default_rng(0)
    shares, aspects, tops = [], [], []
    for _ in range(300):
        rows, columns = np.nonzero(effect(sample, rng, fill=FILL).target == 255)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert height * width == len(rows)
        shares.append(len(rows) / 1e4)
        aspects.append(height / width)
        tops.append(rows.min() / (100 - height))
    assert 0.035 < min(shares) < 0.05
    assert 0.15 < max(shares) < 0.165
    assert 0.47 < min(aspects) < 0.6
    assert 1.7 < max(aspects) < 2.13
    assert min(tops) < 0.05
    assert max(tops) > 0.95


def test_erasing_cuts_a_rectangle_that_does_not_fit():
    erased = RandomErasing(area=(1.0, 1.0), aspect=(3.0, 3.0), probability=1.0)(
        make_sample(10, 10), np.random.default_rng(0), fill=FILL
    )
    assert (erased.target == 255).sum() == 60  # sqrt(300) = 17 rows are cut to 10, sqrt(100 / 3) = 6 columns fit


def test_copy_paste_takes_the_pixels_of_its_classes_and_no_others():
    sample = Sample(np.zeros((2, 4, 3), np.uint8), np.array([[0, 1, 2, 255]] * 2, np.uint8))
    partner = Sample(np.full((2, 4, 3), 50, np.uint8), np.array([[7, 8, 255, 7], [0, 8, 9, 2]], np.uint8))
    pasted = paste_classes(sample, partner, classes=(7, 9))
    assert pasted.target.tolist() == [[7, 1, 2, 7], [0, 1, 9, 255]]
    assert pasted.image[..., 0].tolist() == [[50, 0, 0, 50], [0, 0, 50, 0]]
    assert paste_classes(sample, partner, classes=(3,)) is sample


@pytest.mark.parametrize(
    ("kept", "centre", "box"),
    [
        (0.75, (0.5, 0.5), Window(4, 6, 8, 12)),  # half of each side, in the middle
        (0.75, (0.0, 0.9), Window(0, 15, 4, 9)),  # above and right of the picture it is cut off
        (1.0, (0.3, 0.3), Window(4, 7, 0, 0)),
        (0.0, (0.5, 0.5), Window(0, 0, 16, 24)),
    ],
)
def test_cut_by_hand(kept, centre, box):
    assert place_cut((16, 24), kept=kept, centre=centre) == box


def test_cut_mix_is_exact():
    sample, partner = make_sample(6, 8, seed=1), make_sample(6, 8, seed=2)
    mixed = paste_box(sample, partner, Window(2, 3, 3, 4))
    for ours, first, second in zip(mixed, sample, partner, strict=True):
        np.testing.assert_array_equal(ours[2:5, 3:7], second[2:5, 3:7])
        outside = np.ones((6, 8), bool)
        outside[2:5, 3:7] = False
        np.testing.assert_array_equal(ours[outside], first[outside])


def test_cut_mix_replaces_the_share_that_it_drew():
    sample = Sample(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8))
    partner = Sample(np.ones((64, 64, 3), np.uint8), np.ones((64, 64), np.uint8))
    effect, rng = CutMix(probability=1.0), np.random.default_rng(0)
    shares = [effect(sample, rng, partner=lambda _: partner).target.mean() for _ in range(500)]
    # a uniform share, whole where it fits: with the cut-off parts its mean is below a half
    assert 0.25 < np.mean(shares) < 0.45
    assert min(shares) < 0.01
    assert max(shares) > 0.8


def test_mixup_by_hand_keeps_the_labels_of_the_stronger_picture():
    sample = Sample(np.full((1, 2, 3), 100, np.uint8), np.array([[1, 255]], np.uint8))
    partner = Sample(np.full((1, 2, 3), 201, np.uint8), np.array([[2, 2]], np.uint8))
    mixed = mix_pictures(sample, partner, share=0.75)
    assert mixed.image[0, 0].tolist() == [125, 125, 125]  # 125.25
    assert mixed.target.tolist() == [[1, 255]]
    shares = [
        MixUp(alpha=0.4, probability=1.0)(sample, np.random.default_rng(i), partner=lambda _: partner).image[0, 0, 0]
        for i in range(300)
    ]
    assert min(shares) == 100
    assert 140 <= max(shares) <= 150  # half of each is 150.5


def test_partners_must_be_alike():
    for mix in (paste_box, paste_classes, mix_pictures):
        options = {paste_box: {"box": Window(0, 0, 1, 1)}, paste_classes: {"classes": (1,)}, mix_pictures: {"share": 1}}
        with pytest.raises(ValueError, match="both must be alike"):
            mix(make_sample(4, 4), make_sample(4, 5), **options[mix])


@pytest.mark.parametrize(
    ("effect", "options"),
    [
        (ColourJitter(probability=0.3), {}),
        (GaussianBlur(sigma=(1.0, 2.0), probability=0.3), {}),
        (Rotation(degrees=90, probability=0.3), {"fill": FILL}),
        (RandomErasing(probability=0.3), {"fill": FILL}),
        (CopyPaste(classes=(0, 1, 2), probability=0.3), {"partner": lambda rng: make_sample(seed=9)}),
        (CutMix(alpha=20.0, probability=0.3), {"partner": lambda rng: make_sample(seed=9)}),
        (MixUp(alpha=20.0, probability=0.3), {"partner": lambda rng: make_sample(seed=9)}),
    ],
)
def test_each_effect_happens_as_often_as_asked_and_leaves_its_input(effect, options):
    sample = make_sample()
    before = sample.image.copy(), sample.target.copy()
    rng = np.random.default_rng(0)
    changed = sum(effect(sample, rng, **options) is not sample for _ in range(400))
    assert 85 < changed < 155
    np.testing.assert_array_equal(sample.image, before[0])
    np.testing.assert_array_equal(sample.target, before[1])


def test_a_partner_is_asked_for_only_when_the_coin_says_so():
    def refuse(rng):
        raise AssertionError("no partner was needed")

    sample = make_sample()
    for effect in (CopyPaste(classes=(1,), probability=0.0), CutMix(probability=0.0), MixUp(probability=0.0)):
        assert effect(sample, np.random.default_rng(0), partner=refuse) is sample


class Painted:
    """A data set whose pictures show their label: class k is painted 40 * k, and the index stands in blue."""

    taxonomy = Taxonomy(name="painted", classes=("a", "b", "c"), palette=((0, 0, 0),) * 3)

    def __init__(self, size, *, bad=None):
        self.size, self.bad = size, bad

    def __len__(self):
        return self.size

    def name(self, index):
        return f"picture {index}"

    def read(self, index):
        if index == self.bad:
            raise DataError("E-DATA-012", "damaged picture", fix="fetch it again")
        target = np.random.default_rng(index).integers(0, 3, (6, 8), np.uint8).repeat(8, 0).repeat(8, 1)
        return Sample(np.stack([40 * target, 40 * target, np.full_like(target, index)], axis=2), target)


def test_partners_come_from_the_whole_set_or_by_weight():
    rng = np.random.default_rng(0)
    alike = RandomPartner(Painted(5))
    assert {alike.draw_index(rng) for _ in range(200)} == set(range(5))
    weighted = RandomPartner(Painted(4), weights=(0.0, 1.0, 3.0, 0.0))
    drawn = [weighted.draw_index(rng) for _ in range(400)]
    assert set(drawn) == {1, 2}
    assert 70 < drawn.count(1) < 130
    np.testing.assert_array_equal(
        alike(np.random.default_rng(3)).image[0, 0, 2], alike.draw_index(np.random.default_rng(3))
    )
    for weights in ((1.0,), (1.0, -1.0), (0.0, 0.0), (math.inf, 1.0)):
        with pytest.raises(ValueError, match="one a sample"):
            RandomPartner(Painted(2), weights=weights)


def test_a_partner_that_cannot_be_read_is_named():
    with pytest.raises(DataError, match=r"E-DATA-012 \| picture 0 \| damaged"):
        RandomPartner(Painted(1, bad=0))(np.random.default_rng(0))


def everything(dataset, **overrides):
    options = {
        "base_size": (48, 64),
        "crop_size": (40, 48),
        "colour_jitter": ColourJitter(),
        "blur": GaussianBlur(),
        "copy_paste": CopyPaste(classes=(2,)),
        "cut_mix": CutMix(),
        "mix_up": MixUp(),
        "rotation": Rotation(),
        "erasing": RandomErasing(),
        "extra": (make_torchvision_transform("RandomSolarize", {"threshold": 128, "p": 0.5}),),
        "partner": RandomPartner(dataset),
        **overrides,
    }
    return TrainTransform(**options)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")
def test_eight_workers_four_ranks_and_a_restart_see_the_same_samples():
    dataset = Painted(24)
    plan = BatchPlan(num_samples=24, batch_size=8, seed=5)

    def read(**options):
        return list(training_batches(dataset, everything(dataset), plan=plan, **{"start": 0, "stop": 4, **options}))

    straight, workers, resumed = read(), read(num_workers=8), read(start=2)
    ranks = [read(rank=rank, world_size=4) for rank in range(4)]
    for step, batch in enumerate(straight):
        for part in ("image", "target"):
            ours = getattr(batch, part)
            assert torch.equal(ours, getattr(workers[step], part))
            assert torch.equal(ours, torch.cat([getattr(rank[step], part) for rank in ranks]))
            if step >= 2:
                assert torch.equal(ours, getattr(resumed[step - 2], part))


EFFECTS = ("colour_jitter", "blur", "copy_paste", "cut_mix", "mix_up", "rotation", "erasing")


@pytest.mark.parametrize("effect", EFFECTS)
def test_each_effect_reaches_the_samples_of_a_training_run(effect):
    dataset = Painted(8)
    off = dict.fromkeys(EFFECTS)
    without = everything(dataset, **off)
    alone = everything(dataset, **{**off, effect: getattr(everything(dataset), effect)})
    changed = 0
    for index in range(24):
        sample = dataset.read(index % 8)
        first, second = without(sample, sample_generator(0, 0, index)), alone(sample, sample_generator(0, 0, index))
        changed += bool((first.image != second.image).any())
    assert 3 <= changed < 24


@pytest.mark.parametrize("switched", EFFECTS)
def test_switching_one_effect_off_leaves_the_draws_of_the_others(switched):
    dataset = Painted(8)
    # what turning or erasing ignores tells its numbers; without padding nothing else is ignored
    watched = "rotation" if switched == "erasing" else "erasing"
    strong = {"erasing": RandomErasing(probability=1.0), "rotation": Rotation(degrees=40, probability=1.0)}
    options = {**dict.fromkeys(EFFECTS), watched: strong[watched], "extra": (), "scale_range": None}
    alone = everything(dataset, **options)
    with_other = everything(dataset, **{**options, switched: getattr(everything(dataset), switched)})
    for index in range(8):
        first, second = (
            transform(dataset.read(index), sample_generator(0, 0, index)).target == 255
            for transform in (alone, with_other)
        )
        assert 0 < first.sum() < first.size
        assert (second | ~first).all()
        if switched not in ("rotation", "erasing"):
            np.testing.assert_array_equal(first, second)


def test_defaults_are_the_tables_recipe_to_the_bit():
    # the values before any of these effects existed; a change here changes every training run
    transform = TrainTransform(base_size=(48, 64), crop_size=(40, 48))
    sample = transform(Painted(3).read(1), sample_generator(1, 2, 3))
    assert int(sample.image.astype(np.int64).sum()) == PINNED_IMAGE_SUM
    assert int(sample.target.astype(np.int64).sum()) == PINNED_TARGET_SUM


PINNED_IMAGE_SUM, PINNED_TARGET_SUM = 277420, 177390


def test_mixing_needs_a_partner():
    for effect in ({"copy_paste": CopyPaste(classes=(1,))}, {"cut_mix": CutMix()}, {"mix_up": MixUp()}):
        with pytest.raises(ValueError, match="need a partner"):
            TrainTransform(base_size=(8, 8), crop_size=(8, 8), **effect)


def test_pasting_can_have_partners_of_its_own():
    white = Sample(np.full((40, 48, 3), 250, np.uint8), np.full((40, 48), 2, np.uint8))
    options = {"base_size": (40, 48), "crop_size": (40, 48), "scale_range": None, "photometric_probability": 0.0}
    transform = TrainTransform(
        **options, copy_paste=CopyPaste(classes=(2,), probability=1.0), paste_partner=lambda rng: white
    )
    np.testing.assert_array_equal(transform(make_sample(40, 48), sample_generator(0, 0, 0)).image, white.image)
    with pytest.raises(ValueError, match="need a partner"):
        TrainTransform(**options, cut_mix=CutMix(), paste_partner=lambda rng: white)


def test_the_whole_transform_travels_to_workers():
    transform = everything(Painted(4))
    copy = pickle.loads(pickle.dumps(transform))
    ours, theirs = (each(Painted(4).read(2), sample_generator(0, 0, 2)) for each in (transform, copy))
    np.testing.assert_array_equal(ours.image, theirs.image)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ColourJitter(brightness=1.5, hue=0.6), ("brightness 1.5: 0 to 1", "hue 0.6: 0 to 0.5")),
        (lambda: GaussianBlur(sigma=(2.0, 1.0)), ("sigma (2.0, 1.0)",)),
        (lambda: Rotation(degrees=-1.0, probability=1.1), ("degrees -1.0", "probability 1.1")),
        (lambda: RandomErasing(area=(0.0, 2.0), aspect=(0.0, 1.0)), ("area", "aspect")),
        (lambda: CopyPaste(classes=()), ("at least one train id",)),
        (lambda: CopyPaste(classes=(255,)), ("each 0 to 254",)),
        (lambda: CutMix(alpha=0.0), ("alpha 0.0",)),
        (lambda: MixUp(alpha=-1.0, probability=math.nan), ("alpha -1.0", "probability nan")),
    ],
)
def test_wrong_numbers_are_named_at_once(make, words):
    with pytest.raises(RecipeError, match="E-RECIPE-063") as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_classes_are_found_by_name():
    assert find_class_ids(["c", "a"], Painted.taxonomy) == (2, 0)
    taxonomy = Taxonomy(name="toy", classes=("bicycle", "rider"), palette=((0, 0, 0),) * 2)
    with pytest.raises(RecipeError, match=r"E-RECIPE-067 .* no class 'bicycel'; did you mean bicycle"):
        find_class_ids(["rider", "bicycel"], taxonomy)


def test_torchvision_by_name_is_the_class_with_these_arguments():
    sample = make_sample(9, 11)
    ours = make_torchvision_transform("RandomSolarize", {"threshold": 128, "p": 1.0})
    result = apply_torchvision(sample, np.random.default_rng(0), ours)
    np.testing.assert_array_equal(result.image, np.where(sample.image >= 128, 255 - sample.image, sample.image))


@pytest.mark.parametrize("name", list_torchvision_transforms())
def test_every_listed_torchvision_transform_keeps_size_and_labels(name):
    transform = make_torchvision_transform(name, TORCHVISION_ARGUMENTS.get(name, {}))
    sample = make_sample(33, 47)
    for seed in range(4):
        result = apply_torchvision(sample, np.random.default_rng(seed), transform)
        assert result.image.shape == (33, 47, 3)
        assert set(np.unique(result.target)) <= {*np.unique(sample.target), 255}


@pytest.mark.parametrize(
    "name", ["os.system", "nestseg.cli.main", "RandAugment", "MixUp", "Lambda", "RandomSolarise", ""]
)
def test_other_names_are_refused_and_nothing_is_imported(name):
    # T30
    modules = set(sys.modules)
    with pytest.raises(RecipeError, match=r"E-RECIPE-064 .* allowed: ColorJitter, .* fix: "):
        make_torchvision_transform(name, {})
    assert set(sys.modules) == modules


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("RandomSolarize", {"treshold": 3}, "treshold"),
        ("RandomSolarize", {}, "threshold"),
        ("RandomSolarize", {"threshold": "128"}, "threshold is neither a number"),
        ("RandomRotation", {"degrees": [3, "x"]}, "degrees is neither a number"),
        ("RandomAffine", {"degrees": 5, "fill": {"_target_": "os.system"}}, "fill is neither a number"),
        ("GaussianBlur", {"kernel_size": 4}, "odd"),
    ],
)
def test_wrong_arguments_are_refused_in_words(name, arguments, reason):
    with pytest.raises(RecipeError, match=r"E-RECIPE-065 .* fix: ") as caught:
        make_torchvision_transform(name, arguments)
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["ElasticTransform", "RandomPerspective"])
def test_torchvision_on_a_crop_too_small_for_it_is_named(name):
    arguments = {"RandomPerspective": {"p": 1.0}}.get(name, {})
    transform = TrainTransform(base_size=(8, 8), crop_size=(1, 1), extra=(make_torchvision_transform(name, arguments),))
    with pytest.raises(RecipeError, match=rf"E-RECIPE-068 .*{name} of torchvision fails on a crop of \(1, 1\)"):
        transform(make_sample(), sample_generator(0, 0, 0))
