from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from nestseg.metrics import bootstrap
from nestseg.metrics.bootstrap import bootstrap_mean_iou, paired_bootstrap
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.image_scores import image_counts
from nestseg.metrics.iou import VoidRule, compute_scores

Counts = NDArray[np.int64]
Rule = Literal["skip", "zero"]


def _draw(seed: int = 0, *, num_images: int = 30, num_classes: int = 5) -> Counts:
    generator = np.random.default_rng(seed)
    actual, predicted = generator.integers(0, 1000, (2, num_images, num_classes))
    right = (np.minimum(actual, predicted) * generator.random(actual.shape)).astype(np.int64)
    counts = np.stack([right, actual, predicted], axis=2)
    counts[generator.random((num_images, num_classes)) < 0.7] = 0
    counts[:, -1] = 0
    return counts


def _score(sums: Counts, absent: Rule) -> float:
    values = [right / (actual + predicted - right) for right, actual, predicted in sums.tolist() if actual + predicted]
    return sum(values) / (len(values) if absent == "skip" else len(sums))


def _loop(counts: tuple[Counts, ...], repeats: int, seed: int, absent: Rule) -> NDArray[np.float64]:
    """The definition: draw places with replacement, add the images up, score. One row a repeat, one column a model."""
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(repeats):
        places = generator.integers(len(counts[0]), size=len(counts[0]))
        drawn.append([_score(model[places].sum(axis=0), absent) for model in counts])
    return np.array(drawn)


@pytest.mark.parametrize("void", ["skip", "false_positive"])
@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_the_value_is_that_of_compute_scores_to_the_bit(absent: Rule, void: VoidRule) -> None:
    generator = np.random.default_rng(0)
    whole = ConfusionMatrix(7)
    rows = []
    for _ in range(9):
        target = generator.integers(0, 6, (8, 8), np.uint8)
        target[generator.random((8, 8)) < 0.2] = 255
        confusion = ConfusionMatrix(7)
        confusion.update(np.where(generator.random((8, 8)) < 0.5, 0, target).astype(np.uint8), target)
        whole, rows = whole + confusion, [*rows, image_counts(confusion, void=void)]
    found = bootstrap_mean_iou(np.stack(rows), absent=absent, repeats=10)
    assert found.value == compute_scores(whole, absent=absent, void=void).mean_iou


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_the_interval_is_that_of_a_loop_that_draws_images(absent: Rule) -> None:
    counts = _draw()
    counts = counts[counts.any(axis=(1, 2))]
    found = bootstrap_mean_iou(counts, absent=absent, repeats=300, seed=4, level=0.9)
    low, high = np.quantile(_loop((counts,), 300, 4, absent)[:, 0], [0.05, 0.95])
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    assert found.low < found.value < found.high
    assert (found.level, found.num_images) == (0.9, len(counts))


@pytest.mark.parametrize("absent", ["skip", "zero"])
def test_a_pair_is_that_of_a_loop_that_draws_the_same_images_for_both(absent: Rule) -> None:
    first = _draw(num_images=12)
    first = first[first.any(axis=(1, 2))]
    second = first.copy()
    second[::2, :, 0] = second[::2, :, 0] * 3 // 4
    second[1::2, :, 0] = np.minimum(second[1::2, :, 0] * 5 // 4, second[1::2, :, 1:].min(axis=2))
    found = paired_bootstrap(first, second, absent=absent, repeats=400, seed=1)
    drawn = _loop((first, second), 400, 1, absent)
    differences = drawn[:, 1] - drawn[:, 0]
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])), abs=1e-12)
    assert found.difference == _score(second.sum(axis=0), absent) - _score(first.sum(axis=0), absent)
    below = (differences < 0).sum()
    assert 0 < below < 400
    assert found.share_below_zero == below / 400
    assert found.p_value == pytest.approx(min(1, 2 * (min(below, 400 - below) + 1) / 401))


def test_a_model_beside_itself_differs_by_nothing() -> None:
    found = paired_bootstrap(_draw(), _draw(), absent="skip", repeats=50)
    assert (found.difference, found.low, found.high) == (0, 0, 0)
    assert (found.share_below_zero, found.p_value) == (0.5, 1)


def test_swapping_the_models_mirrors_the_difference() -> None:
    first, second = _draw(), _draw()
    second[:, :, 0] = second[:, :, 0] // 2
    ours, theirs = (paired_bootstrap(*pair, absent="zero", repeats=200) for pair in ((first, second), (second, first)))
    assert ours.difference == -theirs.difference < 0
    assert ours.low == pytest.approx(-theirs.high)
    assert ours.share_below_zero == 1 - theirs.share_below_zero == 1
    assert ours.p_value == theirs.p_value == 2 / 201


@pytest.mark.parametrize(("num_images", "p_value"), [(1, 1), (3, 1 / 4), (6, 1 / 32), (30, 2 / 201)])
def test_few_images_prove_little_even_where_all_of_them_agree(num_images: int, p_value: float) -> None:
    first = np.array([[[5, 10, 10], [5, 10, 10]]] * num_images)
    found = paired_bootstrap(first, first + np.array([1, 0, 0]), absent="skip", repeats=200)
    assert found.low > 0
    assert found.p_value == p_value


def test_images_without_a_counted_pixel_change_nothing() -> None:
    counts = _draw()
    counts = counts[counts.any(axis=(1, 2))]
    padded = np.insert(counts, [0, 3, len(counts)], 0, axis=0)
    assert bootstrap_mean_iou(padded, absent="skip") == bootstrap_mean_iou(counts, absent="skip")
    assert paired_bootstrap(padded, padded, absent="skip") == paired_bootstrap(counts, counts, absent="skip")


def test_one_image_has_an_interval_of_no_width() -> None:
    found = bootstrap_mean_iou(np.array([[[1, 2, 2], [0, 0, 0]]]), absent="skip")
    assert found.value == found.low == found.high == 1 / 3


def test_how_many_are_drawn_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bootstrap_mean_iou(_draw(), absent="skip", repeats=101)
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", 7 * 30)
    assert bootstrap_mean_iou(_draw(), absent="skip", repeats=101) == whole


def test_the_seed_decides_the_draw() -> None:
    intervals = [bootstrap_mean_iou(_draw(), absent="skip", seed=seed) for seed in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Images whose IoU scatters around 0.5; 80 % intervals from 40 of them, 200 times."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        right = generator.binomial(300, generator.beta(8, 4, 40))
        counts = np.stack([right, np.full(40, 300), np.full(40, 300)], axis=1)[:, None].astype(np.int64)
        found = bootstrap_mean_iou(counts, absent="skip", repeats=200, level=0.8)
        held += found.low <= 0.5 <= found.high
    assert 0.7 <= held / 200 <= 0.9


def test_counts_beyond_float32_are_exact() -> None:
    counts = np.array([[[2**40 + 1, 2**40 + 3, 2**40 + 1]]] * 3)
    found = bootstrap_mean_iou(counts, absent="skip", repeats=5)
    assert found.value == found.low == found.high == (2**40 + 1) / (2**40 + 3)


def test_what_cannot_be_drawn_from_is_refused() -> None:
    counts = _draw()
    with pytest.raises(ValueError, match="no image has a counted pixel"):
        bootstrap_mean_iou(np.zeros((4, 2, 3), np.int64), absent="skip")
    with pytest.raises(ValueError, match="no image has a counted pixel"):
        paired_bootstrap(np.zeros((0, 2, 3), np.int64), np.zeros((0, 2, 3), np.int64), absent="skip")
    with pytest.raises(ValueError, match="same ground truth"):
        paired_bootstrap(counts, counts[:-1], absent="skip")
    with pytest.raises(ValueError, match="same ground truth"):
        paired_bootstrap(counts, counts[::-1], absent="skip")
    for arguments in ({"repeats": 0}, {"level": 1.0}, {"level": 0.0}):
        with pytest.raises(ValueError, match="allowed"):
            bootstrap_mean_iou(counts, absent="skip", **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected"):
        bootstrap_mean_iou(counts[..., :2], absent="skip")
