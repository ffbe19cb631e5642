from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.metrics.confusion import ConfusionMatrix
from nestseg.metrics.image_scores import (
    ImageScores,
    ImageScoreWriter,
    image_counts,
    mean_iou_by_image,
    read_image_scores,
)
from nestseg.metrics.iou import compute_scores

CLASSES = ("road", 'door, "double"', "ciel\u00e9")


def _draw(seed: int = 0, *, num_images: int = 6) -> NDArray[np.int64]:
    generator = np.random.default_rng(seed)
    counts = np.sort(generator.integers(0, 50, (num_images, len(CLASSES), 3)), axis=2)
    counts[generator.random((num_images, len(CLASSES))) < 0.3] = 0
    return counts


def _fill(counts: NDArray[np.int64]) -> ImageScores:
    scores = ImageScores(CLASSES)
    for index, image in enumerate(counts):
        scores.update(index, f"image_{index}", image)
    return scores


def test_counts_of_an_image_are_those_of_its_confusion_matrix() -> None:
    labels = np.array([[0, 1, 1, 200, 2]], np.uint8)
    target = np.array([[0, 0, 1, 1, 255]], np.uint8)
    confusion = ConfusionMatrix(3)
    confusion.update(labels, target)
    assert image_counts(confusion).tolist() == [[1, 2, 1], [1, 2, 2], [0, 0, 0]]
    assert image_counts(confusion, void="false_positive").tolist() == [[1, 2, 1], [1, 2, 2], [0, 0, 1]]
    with pytest.raises(ValueError, match="void_counts are not known"):
        image_counts(ConfusionMatrix.from_counts(confusion.counts), void="false_positive")


def test_the_mean_of_an_image_is_over_the_classes_of_its_ground_truth() -> None:
    counts = np.array(
        [
            [[1, 2, 1], [3, 3, 4], [0, 0, 9]],  # the last class is only predicted
            [[0, 0, 5], [0, 0, 0], [0, 0, 0]],  # no ground truth
            [[0, 4, 0], [0, 0, 0], [0, 0, 0]],  # all missed
        ]
    )
    assert mean_iou_by_image(counts) == ((1 / 2 + 3 / 4) / 2, None, 0.0)


def test_without_false_classes_it_is_the_score_of_that_image_alone() -> None:
    generator = np.random.default_rng(0)
    target = generator.integers(0, 3, (8, 9), np.uint8)
    labels = np.where(generator.random((8, 9)) < 0.3, 0, target).astype(np.uint8)
    confusion = ConfusionMatrix(3)
    confusion.update(labels, target)
    expected = compute_scores(confusion, absent="skip").mean_iou
    assert mean_iou_by_image(image_counts(confusion)[None])[0] == pytest.approx(expected, abs=1e-15)


def test_worst_and_best_leave_out_unlabelled_images_and_break_ties_by_place() -> None:
    scores = ImageScores(("a",))
    for index, right in ((5, 2), (1, 9), (3, 2), (0, 5)):
        scores.update(index, f"n{index}", np.array([[right, 10, right]]))
    scores.update(2, "void", np.zeros((1, 3), np.int64))
    assert [score.index for score in scores.worst(3)] == [3, 5, 0]
    assert [score.index for score in scores.best(3)] == [1, 0, 3]
    assert [score.index for score in scores.worst(99)] == [3, 5, 0, 1]
    assert [(score.name, score.mean_iou) for score in scores.scores()] == [
        ("n0", 0.5),
        ("n1", 0.9),
        ("void", None),
        ("n3", 0.2),
        ("n5", 0.2),
    ]


def test_parts_of_several_processes_add_up_in_any_order_and_survive_pickling() -> None:
    counts = _draw()
    parts = [ImageScores(CLASSES) for _ in range(4)]  # of which the last gets nothing... and 6 is no multiple of 4
    for index, image in enumerate(counts):
        parts[index % 4].update(index, f"image_{index}", image)
    parts = [pickle.loads(pickle.dumps(part)) for part in parts]
    merged = parts[3] + parts[1] + (parts[0] + parts[2])
    assert np.array_equal(merged.counts, counts)
    assert merged.names == tuple(f"image_{index}" for index in range(6))
    assert merged.scores() == _fill(counts).scores()
    assert [len(part) for part in parts] == [2, 2, 1, 1]


def test_an_image_counts_once() -> None:
    scores = _fill(_draw(num_images=2))
    with pytest.raises(ValueError, match=r"image 1 \(again\) was counted before, as image_1"):
        scores.update(1, "again", np.zeros((3, 3), np.int64))
    with pytest.raises(ValueError, match=r"images \[0, 1\] were counted in both"):
        scores + scores
    with pytest.raises(ValueError, match="do not add up"):
        scores + ImageScores(("road", "door", "sky"))
    with pytest.raises(ValueError, match="allowed 0 and up"):
        scores.update(-1, "x", np.zeros((3, 3), np.int64))
    with pytest.raises(ValueError, match="expected"):
        scores.update(9, "x", np.zeros((2, 3), np.int64))


def test_no_image_has_no_score() -> None:
    empty = ImageScores(CLASSES)
    assert (len(empty), empty.counts.shape, empty.worst(), empty.scores()) == (0, (0, 3, 3), (), ())


def test_given_counts_are_copied() -> None:
    counts = _draw()
    scores = _fill(counts)
    before = scores.counts
    counts += 1
    assert np.array_equal(scores.counts, before)


NAMES = ("plain", "a,b", 'quo"ted', "new\nline", "\u00fcml\u00e4ut", "", "bytes\udcff", " blank ")


def test_a_table_read_back_holds_the_same_counts_names_and_scores(tmp_path: Path) -> None:
    counts = _draw(num_images=len(NAMES))
    scores = ImageScores(CLASSES)
    with ImageScoreWriter(tmp_path / "images.csv", CLASSES) as writer:
        for index in np.random.default_rng(1).permutation(len(NAMES)).tolist():
            writer.write(index, NAMES[index], counts[index])
            scores.update(index, NAMES[index], counts[index])
    found = read_image_scores(tmp_path / "images.csv")
    assert found.classes == CLASSES
    assert found.names == NAMES
    assert np.array_equal(found.counts, counts)
    assert found.scores() == scores.scores()
    assert [path.name for path in tmp_path.iterdir()] == ["images.csv"]


def test_the_table_says_nothing_where_an_image_has_no_score(tmp_path: Path) -> None:
    with ImageScoreWriter(tmp_path / "images.csv", ("a",)) as writer:
        writer.write(3, "void", np.zeros((1, 3), np.int64))
    assert (tmp_path / "images.csv").read_text() == "index,image,mean_iou,a right,a actual,a predicted\n3,void,,0,0,0\n"


def test_an_exception_leaves_the_old_table_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "images.csv"
    path.write_text("old")

    def fail() -> None:
        with ImageScoreWriter(path, ("a",)) as writer:
            writer.write(0, "first", np.array([[1, 2, 3]]))
            assert len(list(tmp_path.iterdir())) == 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_a_table_that_cannot_be_made_is_an_error_and_counts_of_other_classes_too(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), ImageScoreWriter(tmp_path / "absent" / "images.csv", ("a",)):
        pass
    with pytest.raises(ValueError, match="expected"), ImageScoreWriter(tmp_path / "images.csv", ("a",)) as writer:
        writer.write(0, "x", np.zeros((2, 3), np.int64))
    assert not list(tmp_path.iterdir())


def test_e8_a_kill_leaves_no_half_table_and_lines_are_seen_while_it_grows(tmp_path: Path) -> None:
    code = (
        "import sys, time, numpy as np; from pathlib import Path\n"
        "from nestseg.metrics.image_scores import ImageScoreWriter\n"
        "with ImageScoreWriter(Path(sys.argv[1]), ('a',)) as writer:\n"
        "    writer.write(0, 'first', np.array([[1, 2, 3]]))\n"
        "    time.sleep(60)\n"
    )
    path = tmp_path / "images.csv"
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as child:
        until = time.monotonic() + 30
        while not any("first" in file.read_text() for file in tmp_path.iterdir()):
            assert time.monotonic() < until
            assert child.poll() is None
            time.sleep(0.02)
        os.kill(child.pid, signal.SIGKILL)
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "E-DATA-120 .* begins nothing; expected index, image, mean_iou"),
        ("a,b,c\n1,2,3\n", "E-DATA-120 .* begins a, b, c"),
        ("index,image,mean_iou\n", "E-DATA-120"),
        ("index,image,mean_iou,a right,a actual,b predicted\n", "E-DATA-120"),
        ("index,image,mean_iou,a right,a actual\n", "E-DATA-120"),
        ("index,image,mean_iou,a right,a actual,a predicted\n0,x,,1,2\n", "E-DATA-121 .* line 2: 5 fields; expected 6"),
        ("index,image,mean_iou,a right,a actual,a predicted\n0,x,,1,2,y\n", "E-DATA-121 .* line 2"),
        ("index,image,mean_iou,a right,a actual,a predicted\n0,x,,1,2,-1\n", "E-DATA-121 .* line 2"),
        ("index,image,mean_iou,a right,a actual,a predicted\n0,x,,1,2,99999999999999999999\n", "E-DATA-121 .* line 2"),
        ("index,image,mean_iou,a right,a actual,a predicted\n0,x,,1,1,1\n0,y,,1,1,1\n", "E-DATA-121 .* line 3"),
        ("index,image,mean_iou,a right,a actual,a predicted\n0,x,,1,1,1\n1,", "E-DATA-121 .* line 3"),
    ],
)
def test_a_table_that_is_damaged_or_another_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "images.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_image_scores(path)
    assert caught.value.path == path
