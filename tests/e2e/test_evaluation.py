"""Evaluate, compare and submit by the commands that people type, with untrained models on a tiny Cityscapes (E7-E9)."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nestseg.build import build_mode, build_model, describe_model, evaluation_of, load_predictor
from nestseg.cli import main
from nestseg.core.errors import DataError, RecipeError
from nestseg.data.cityscapes import TRAIN_ID_TO_LABEL_ID, Cityscapes
from nestseg.engine.details import DetailsCollector
from nestseg.engine.evaluate import evaluate
from nestseg.engine.evaluation_files import write_metrics
from nestseg.inference.modes import MultiScale, Slide, Whole
from nestseg.inference.predictor import Predictor
from nestseg.recipes import change_evaluation, named_recipe, resolve_recipe
from nestseg.store.files import read_model_file, write_model_file

NUM_IMAGES = {"train": 1, "val": 4}
SIZE = (48, 96)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory) -> Path:
    """Blocks of classes, with instances of cars; one image more in the test split, without labels."""
    root = tmp_path_factory.mktemp("cityscapes")
    draw = np.random.default_rng(0)
    for split, count in NUM_IMAGES.items():
        for index in range(count):
            name = f"ulm_{index:06d}_000019"
            labels = TRAIN_ID_TO_LABEL_ID[draw.integers(0, 19, (6, 12), np.uint8)].repeat(8, 0).repeat(8, 1)
            labels[:2] = 0
            instances = labels.astype(np.uint16)
            instances[labels == 26] = 26_001
            places = {
                f"leftImg8bit/{split}/ulm/{name}_leftImg8bit.png": draw.integers(0, 256, (*SIZE, 3), np.uint8),
                f"gtFine/{split}/ulm/{name}_gtFine_labelIds.png": labels,
                f"gtFine/{split}/ulm/{name}_gtFine_instanceIds.png": instances,
            }
            for place, array in places.items():
                (root / place).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(root / place)
    folder = root / "leftImg8bit/test/bonn"
    folder.mkdir(parents=True)
    Image.fromarray(draw.integers(0, 256, (1024, 2048, 3), np.uint8)).save(
        folder / "bonn_000000_000019_leftImg8bit.png"
    )
    return root


@pytest.fixture(scope="module")
def write_model(tmp_path_factory):
    """Write an untrained model of Cityscapes' classes."""

    def write(seed: int) -> Path:
        settings = ["backbone.name=timm:test_resnet", "backbone.pretrained=none", "head.channels=8"]
        settings += ["auxiliary_head.enabled=false", "evaluation.base_size=null"]
        recipe = resolve_recipe("fcn_resnest14-d32_cityscapes", settings)
        torch.manual_seed(seed)
        model = build_model(recipe)
        path = tmp_path_factory.mktemp("model") / f"model{seed}.safetensors"
        metadata = describe_model(recipe, step=0).model_copy(update={"recipe": None})
        write_model_file(path, model.state_dict(), metadata)
        return path

    return write


@pytest.fixture(scope="module")
def model(write_model) -> Path:
    return write_model(0)


def run(*words: object) -> int:
    return main([*map(str, words), "--device", "cpu"])


def test_evaluate_leaves_all_that_it_promises(cityscapes, model, tmp_path, capsys):
    assert run("evaluate", model, "--data", cityscapes, "--out", tmp_path) == 0
    out = capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"metrics.json", "report.html", "summary.md", "classes.csv", "images.csv", "pictures"}
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    interval = metrics["mean_iou_interval"]
    assert interval["value"] == metrics["mean_iou"]
    assert interval["low"] <= metrics["mean_iou"] <= interval["high"]
    assert metrics["cityscapes"]["mean_class_iou"] == pytest.approx(metrics["mean_iou"], abs=1e-12)
    assert metrics["cityscapes"]["num_images_with_instances"] == 4
    assert metrics["cityscapes"]["class_iiou"]["car"] is not None
    assert metrics["mean_iou_with_void_as_false_positive"] < metrics["mean_iou"]
    assert not metrics["partial"]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (metrics["commit"] or "").removesuffix("+changes") == head.stdout.strip()
    assert "by the rules of Cityscapes: IoU of categories" in out
    assert "95 % interval" in out
    assert "ignored pixels not counted" in out
    with (tmp_path / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"ulm_{index:06d}_000019" for index in range(4)]
    matrix = np.array(metrics["confusion_matrix"])
    assert sum(int(row["car right"]) for row in rows) == matrix[13, 13]
    page = (tmp_path / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "iIoU of classes" in page


def test_settings_of_a_trained_model_change_with_set_and_are_recorded(cityscapes, model, tmp_path, capsys):
    settings = ["evaluation.window=[32, 32]", "evaluation.blend=hann", "evaluation.scales=[1.0, 1.5]"]
    words = [word for setting in (*settings, "evaluation.flip=true") for word in ("--set", setting)]
    assert run("evaluate", model, "--data", cityscapes, "--out", tmp_path, *words) == 0
    assert "mean probability of scales 1, 1.5 with flip, windows 32x32 every 22x22 with hann" in capsys.readouterr().out
    protocol = json.loads((tmp_path / "metrics.json").read_text())["protocol"]
    assert (protocol["mode"], protocol["scales"], protocol["flip"]) == ("multi_scale", [1.0, 1.5], True)
    assert protocol["inner"]["window"] == [32, 32]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("evaluation.flp=true", "did you mean evaluation.flip"),
        ("optimizer.lr=1", "no longer decides anything once a model is trained"),
        ("evaluation.every_steps=1", "change one of: evaluation.base_size"),
        ("evaluation.window_stride=[8, 8]", "without evaluation.window"),
        ("evaluation.blend=linear", "set evaluation.window too"),
        ("evaluation.scales=[]", "evaluation.scales"),
        ("evaluation.scales=[0.0]", "evaluation.scales"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_words(setting, words):
    with pytest.raises(RecipeError) as caught:
        change_evaluation(named_recipe("demo").evaluation, [setting], source="--set")
    assert words in str(caught.value)


def test_a_stride_that_leaves_gaps_is_refused():
    settings = ["evaluation.window=[8, 8]", "evaluation.window_stride=[8, 9]"]
    with pytest.raises(RecipeError, match="leaves gaps"):
        change_evaluation(named_recipe("demo").evaluation, settings, source="--set")


def test_windows_go_inside_scales():
    section = named_recipe("demo").evaluation
    assert build_mode(section) == Whole()
    windows = change_evaluation(section, ["evaluation.window=[8, 9]"], source="--set")
    assert build_mode(windows) == Slide(window=(8, 9))
    both = change_evaluation(windows, ["evaluation.scales=[0.5]", "evaluation.average=logit"], source="--set")
    assert build_mode(both) == MultiScale(scales=(0.5,), average="logit", inner=Slide(window=(8, 9)))


def test_models_without_a_recipe_are_scored_whole(model):
    predictor = load_predictor(model, device="cpu")
    assert predictor.mode == Whole()
    assert load_predictor(model, device="cpu", overrides=["evaluation.flip=true"]).mode == MultiScale(flip=True)
    assert evaluation_of(read_model_file(model)[1]).scales == (1.0,)


def test_e7_a_bad_file_stops_the_evaluation_or_makes_it_partial(cityscapes, model, tmp_path, capsys):
    data = tmp_path / "data"
    for source in cityscapes.rglob("*.png"):
        target = data / source.relative_to(cityscapes)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    bad = data / "leftImg8bit/val/ulm/ulm_000001_000019_leftImg8bit.png"
    bad.write_bytes(bad.read_bytes()[:200])
    out = tmp_path / "out"
    assert run("evaluate", model, "--data", data, "--out", out) == 1
    assert str(bad) in capsys.readouterr().err
    assert not list(out.glob("*"))
    assert run("evaluate", model, "--data", data, "--out", out, "--skip-bad") == 3
    captured = capsys.readouterr()
    assert str(bad) in captured.err
    assert "PARTIAL: 1 images were left out" in captured.out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["partial"]
    assert metrics["num_images"] == 3
    assert "PARTIAL" in (out / "report.html").read_text()
    assert "PARTIAL" in (out / "summary.md").read_text()


@pytest.mark.parametrize("fault", ["cut", "size"])
def test_e7_a_bad_instance_map_is_a_bad_file_too(cityscapes, model, tmp_path, capsys, fault):
    data = tmp_path / "data"
    shutil.copytree(cityscapes, data)
    bad = data / "gtFine/val/ulm/ulm_000001_000019_gtFine_instanceIds.png"
    if fault == "cut":
        bad.write_bytes(bad.read_bytes()[:100])
    else:
        Image.fromarray(np.zeros((SIZE[0], SIZE[1] - 1), np.uint16)).save(bad)
    assert run("evaluate", model, "--data", data, "--out", tmp_path / "out") == 1
    assert str(bad) in capsys.readouterr().err
    assert run("evaluate", model, "--data", data, "--out", tmp_path / "out", "--skip-bad") == 3
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["num_images"], metrics["cityscapes"]["num_images"]) == (3, 3)
    with (tmp_path / "out/images.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    matrix = np.array(metrics["confusion_matrix"])
    assert sum(int(row["car right"]) for row in rows) == matrix[13, 13]


def test_pictures_of_the_user_are_not_replaced_by_those_of_an_evaluation(cityscapes, model, tmp_path, capsys):
    own = tmp_path / "pictures/holiday.png"
    own.parent.mkdir()
    own.write_bytes(b"own")
    assert run("evaluate", model, "--data", cityscapes, "--out", tmp_path) == 1
    assert "E-RUN-090" in capsys.readouterr().err
    assert own.read_bytes() == b"own"
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_one_image_has_no_interval(cityscapes, model, tmp_path, capsys):
    assert run("evaluate", model, "--data", cityscapes, "--split", "train", "--out", tmp_path) == 0
    assert "95 % interval" not in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["mean_iou_interval"] is None
    assert "95 % interval" not in (tmp_path / "report.html").read_text()


def test_e9_a_split_without_labels_is_submitted_and_not_scored(cityscapes, model, tmp_path, capsys):
    assert run("evaluate", model, "--data", cityscapes, "--split", "test", "--out", tmp_path / "out") == 1
    assert "--submission" in capsys.readouterr().err
    folder = tmp_path / "upload"
    assert run("evaluate", model, "--data", cityscapes, "--split", "test", "--submission", folder) == 0
    assert "1 label maps" in capsys.readouterr().out
    with Image.open(folder / "bonn_000000_000019_pred_labelIds.png") as labels:
        assert (labels.mode, labels.size) == ("L", (2048, 1024))
        assert set(np.unique(labels)) <= set(TRAIN_ID_TO_LABEL_ID[:19].tolist())
    assert run("evaluate", model, "--data", cityscapes, "--submission", folder) == 2


def test_compare_says_what_a_difference_is_worth(cityscapes, model, write_model, tmp_path, capsys):
    other, out = write_model(1), tmp_path / "compared.json"
    assert run("compare", model, other, "--data", cityscapes, "--out", out) == 0
    text = capsys.readouterr().out
    found = json.loads(out.read_text(), parse_constant=pytest.fail)
    difference = found["scores"][1]["mean_iou"] - found["scores"][0]["mean_iou"]
    assert found["difference"]["difference"] == difference
    assert f"B - A in mean IoU: {100 * difference:+.2f}" in text
    assert sum(found["images"]) == found["num_images"] == 4
    # the class that moved most comes first
    changes = [float(line.split()[-1]) for line in text.splitlines()[3:] if line.split()[-1][:1] in "+-"]
    assert abs(changes[0]) == max(map(abs, changes))


def test_a_model_is_not_better_than_itself(cityscapes, model, capsys):
    assert run("compare", model, model, "--data", cityscapes) == 0
    text = capsys.readouterr().out
    assert "B - A in mean IoU: +0.00, 95 % interval +0.00 to +0.00" in text
    assert "not more than chance would give" in text


class Threshold:
    """A predictor's network that knows the truth of some images: the red of a pixel is its class."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return 10 * torch.nn.functional.one_hot((image[:, 0] // 10).long(), 19).movedim(-1, 1).float()


def test_details_are_those_of_the_worst_and_best_images(cityscapes, tmp_path):
    dataset = Cityscapes(cityscapes, "val")

    class Known(Cityscapes):
        """The same labels, with pictures that give the first two away."""

        def read(self, index):
            sample = dataset.read(index)
            shown = np.where(sample.target == 255, 0, sample.target) if index < 2 else np.zeros_like(sample.target)
            return sample._replace(image=(10 * shown)[:, :, None].repeat(3, 2).astype(np.uint8))

    known = Known(cityscapes, "val")
    with DetailsCollector(known, images_file=tmp_path / "images.csv") as collector:
        result = evaluate(Predictor(Threshold(), known.taxonomy), known, split="val", collector=collector)
    details = result.details
    assert details is not None
    kinds = {kind: [one.name for one in details.pictures if one.kind == kind] for kind in ("worst", "best", "random")}
    assert kinds["best"][:2] == [known.name(0), known.name(1)]
    assert set(kinds["worst"][:2]) == {known.name(2), known.name(3)}
    assert kinds["random"] == [known.name(index) for index in range(4)]
    assert [score.mean_iou for score in details.images.best(2)] == [1.0, 1.0]
    assert details.interval.low < result.scores.mean_iou < details.interval.high


def test_e8_an_evaluation_that_breaks_off_leaves_the_results_of_the_one_before(
    cityscapes, model, tmp_path, monkeypatch
):
    assert run("evaluate", model, "--data", cityscapes, "--out", tmp_path) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    calls: list[int] = []
    compute = Predictor.compute_logits

    def interrupt(self, image):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, image)

    monkeypatch.setattr(Predictor, "compute_logits", interrupt)
    assert run("evaluate", model, "--data", cityscapes, "--out", tmp_path) == 130
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


def test_scores_that_are_not_finite_are_named(cityscapes, tmp_path):
    dataset = Cityscapes(cityscapes, "val")

    def broken(image: torch.Tensor) -> torch.Tensor:
        return torch.full((1, 19, *image.shape[2:]), float("nan"))

    collector = DetailsCollector(dataset, images_file=tmp_path / "images.csv")
    with collector, pytest.raises(DataError, match=r"E-DATA-119 \| ulm_000000_000019 \| .* not finite"):
        evaluate(Predictor(broken, dataset.taxonomy), dataset, split="val", collector=collector)


def test_skipping_every_image_is_the_error_of_the_first(cityscapes, model, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(cityscapes, data)
    for image in (data / "leftImg8bit/val").rglob("*.png"):
        image.write_bytes(b"none")
    assert run("evaluate", model, "--data", data, "--out", tmp_path / "out", "--skip-bad") == 1
    assert "ulm_000000_000019_leftImg8bit.png" in capsys.readouterr().err


def test_figures_of_a_training_take_the_report_of_other_figures_away(cityscapes, model, tmp_path):
    assert run("evaluate", model, "--data", cityscapes, "--out", tmp_path) == 0
    dataset = Cityscapes(cityscapes, "val")
    found = evaluate(load_predictor(model, device="cpu"), dataset, split="val", max_images=1)
    write_metrics(found, tmp_path, context={})
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["metrics.json"]
