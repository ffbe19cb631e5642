"""Class weights and rare-class sampling, whatever the counts are."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nestseg.data.counts import SplitCounts
from nestseg.data.loader import BatchPlan, RareClassSampling
from nestseg.data.stats import enet_weights, median_frequency_weights


@st.composite
def counts(draw: st.DrawFn) -> SplitCounts:
    """Counts of some images, of which at least one has a label."""
    num_classes = draw(st.integers(1, 8))
    image = st.dictionaries(st.integers(0, num_classes - 1), st.integers(1, 10**9), max_size=num_classes)
    images = draw(st.lists(image, min_size=1, max_size=12).filter(any))
    entries = [entry for one in images for entry in sorted(one.items())]
    return SplitCounts(
        num_classes=num_classes,
        sizes=np.ones((len(images), 2), np.int64),
        ignored=np.zeros(len(images), np.int64),
        offsets=np.cumsum([0, *map(len, images)]),
        classes=np.array([train_id for train_id, _ in entries], np.uint8),
        pixels=np.array([pixels for _, pixels in entries], np.int64),
        channel_sums=(),
        channel_squares=(),
    )


@given(counts())
@settings(deadline=None, max_examples=100)
def test_rarer_classes_weigh_more_and_all_weights_are_positive(counts):
    pixels, enet, median = counts.class_pixels, enet_weights(counts), median_frequency_weights(counts)
    assert all(1.42 < weight <= 50.4983 for weight in enet)
    assert all(0 < weight < float("inf") for weight in median)
    order = np.argsort(pixels)
    assert (np.diff(np.array(enet)[order]) <= 0).all()
    # the class of median frequency has weight 1; with an even number 1 lies between the two in the middle
    occurring = np.array(median)[pixels > 0]
    assert occurring.min() <= 1 <= occurring.max()


@given(counts(), st.floats(1e-3, 10), st.integers(1, 10**9), st.integers(0, 2**32), st.integers(0, 50))
@settings(deadline=None, max_examples=100)
def test_every_draw_is_an_image_that_shows_its_class(counts, temperature, min_pixels, seed, epoch):
    sampling = RareClassSampling.from_counts(counts, temperature=temperature, min_pixels=min_pixels)
    assert abs(sampling.probabilities.sum() - 1) < 1e-12
    plan = BatchPlan(num_samples=counts.num_images, batch_size=2, seed=seed, sampling=sampling)
    order = plan.order(epoch)
    shown = set(zip(counts.image_of_entry.tolist(), counts.classes.tolist(), strict=True))
    draws = [order.draw(epoch, place) for place in range(counts.num_images)]
    assert {(draw.sample_index, draw.wanted_class) for draw in draws} <= shown
    assert len({(draw.sample_index, draw.repeat) for draw in draws}) == len(draws)
