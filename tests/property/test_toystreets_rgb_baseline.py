"""ToyStreets cannot be solved by colour: a score on it says that a network sees shape, texture and place."""

from __future__ import annotations

import numpy as np
import pytest

from nestseg.data.toystreets import TAXONOMY, ToyStreets

NUM_CLASSES = TAXONOMY.num_classes


@pytest.fixture(scope="module")
def pixels() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All pixels of 256 images of train and of val: (N, 3) colours and (N,) train ids of each."""
    columns = []
    for split, count in (("train", 256), ("val", 64)):
        scenes = ToyStreets(None, split)
        samples = [scenes.read(index) for index in range(count)]
        columns += [
            np.concatenate([image.reshape(-1, 3) for image, _ in samples]),
            np.concatenate([target.ravel() for _, target in samples]),
        ]
    return tuple(columns)


def count_pairs(first: np.ndarray, second: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Count how often each pair of numbers occurs, as an int64 matrix."""
    return np.bincount(first.astype(np.int64) * shape[1] + second, minlength=shape[0] * shape[1]).reshape(shape)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_the_best_classifier_by_colour_alone_stays_below_0_42_mean_iou(pixels, bits):
    """The most frequent class of each colour, counted on train, is the best any per-pixel rule of RGB can do.

    Were it good, a network could score well by learning a colour table, and the accuracy that the demo and
    the golden tests report would say nothing about the network. 32 cells a channel are about as fine as 256
    images can fill; the coarser tables guard against the finest losing by fitting noise. The lower bound is what
    naming one class everywhere gets at most, 1 in 8: a score below it would mean that this baseline is broken.
    """
    train_colours, train_ids, val_colours, val_ids = pixels

    def cells(colours: np.ndarray) -> np.ndarray:
        red, green, blue = (colours[:, channel].astype(np.int64) >> (8 - bits) for channel in range(3))
        return (red << 2 * bits) | (green << bits) | blue

    table = count_pairs(cells(train_colours), train_ids, (2 ** (3 * bits), NUM_CLASSES)).argmax(axis=1)
    confusion = count_pairs(val_ids, table[cells(val_colours)], (NUM_CLASSES, NUM_CLASSES))
    hits = confusion.diagonal()
    mean_iou = (hits / (confusion.sum(axis=0) + confusion.sum(axis=1) - hits)).mean()

    assert confusion.dtype == np.int64
    assert confusion.sum() == 64 * 128 * 256
    assert 1 / NUM_CLASSES < mean_iou < 0.42
