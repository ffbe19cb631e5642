"""A run from a recipe to pictures, by the commands that people type, on tiny drawn streets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nestseg
from nestseg.cli import main
from nestseg.core.errors import NestsegError, RunError
from nestseg.core.types import Batch
from nestseg.engine.step import Stepper
from nestseg.engine.train import train
from nestseg.recipe import Recipe
from nestseg.recipes import resolve_recipe
from nestseg.store.files import read_model_file

TINY = (
    "data.crop_size=[64, 64]",
    "data.batch_size=4",
    "optimizer.lr=0.01",
    "data.num_workers=0",
    "head.channels=16",
    "auxiliary_head.enabled=true",
    "auxiliary_head.channels=8",
    "log.every_steps=2",
    "checkpoint.every_steps=3",
    "evaluation.every_steps=4",
    "evaluation.max_images=2",
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def set_options(*overrides: str) -> list[str]:
    return [word for override in (*TINY, *overrides) for word in ("--set", override)]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", "demo", "--run", str(run), "--max-steps", "6", "--device", "cpu", *set_options()]) == 0
    return run


def fingerprint(run: Path) -> str:
    """Hash of all tensors of the last model and of the optimizer and random state behind it."""
    digest = hashlib.sha256()
    state, _ = read_model_file(run / "model.safetensors")
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    checkpoint = max((run / "checkpoints").iterdir())
    values = torch.load(checkpoint / "state.pt", weights_only=True)
    for entry in values["optimizer"]["state"].values():
        for value in entry.values():
            digest.update(torch.as_tensor(value).numpy().tobytes())
    digest.update(values["generators"][0]["cpu"].numpy().tobytes())
    return digest.hexdigest()


def test_run_folder_holds_what_is_promised(finished_run):
    names = {path.name for path in finished_run.iterdir()}
    assert {"recipe.yaml", "log.jsonl", "checkpoints", "model.safetensors", "best.safetensors", "evaluation"} <= names
    recipe = Recipe.read(finished_run / "recipe.yaml")
    assert recipe.schedule.max_steps == 6
    checkpoints = sorted(path.name for path in (finished_run / "checkpoints").iterdir())
    assert checkpoints == ["step-00000003", "step-00000006"]
    records = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines()]
    # how busy the machine is decides whether the loader's verdict is among them
    records = [record for record in records if record["kind"] != "loader"]
    kinds = [record["kind"] for record in records]
    assert kinds == ["start", "step", "step", "evaluation", "step", "evaluation", "end"]
    assert [record["step"] for record in records if record["kind"] == "step"] == [2, 4, 6]
    assert records[1]["lr"] > records[2]["lr"] > records[4]["lr"]
    assert {"loss", "images_per_second", "data_wait_share", "seconds_left"} <= set(records[1])
    _, metadata = read_model_file(finished_run / "model.safetensors")
    assert metadata.step == 6
    assert metadata.classes == nestseg.open_dataset("toystreets", None, "val").taxonomy.classes
    assert metadata.recipe == recipe.model_dump(mode="json")


def test_evaluate_writes_metrics_and_pictures(finished_run, tmp_path, capsys):
    assert main(["evaluate", str(finished_run), "--out", str(tmp_path), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["num_images"] == 64
    assert 0 <= metrics["mean_iou"] <= 1
    matrix = np.array(metrics["confusion_matrix"])
    assert matrix.sum() == 64 * 128 * 256
    ious = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert metrics["mean_iou"] == pytest.approx(np.nanmean(ious), abs=1e-12)
    assert metrics["pixel_accuracy"] == pytest.approx(matrix.diagonal().sum() / matrix.sum(), abs=1e-12)
    assert set(metrics) >= {"iou_per_class", "mean_accuracy", "protocol", "versions"}
    assert f"{100 * metrics['mean_iou']:.2f}" in out
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 8


def test_evaluate_agrees_with_the_predictor_alone(finished_run, tmp_path):
    result = nestseg.evaluate_model(finished_run, None, out=tmp_path, device="cpu")
    predictor = nestseg.load_predictor(finished_run, device="cpu")
    dataset = nestseg.open_dataset("toystreets", None, "val")
    samples = [dataset.read(index) for index in range(len(dataset))]
    right = sum(int((predictor.predict(image).labels == target).sum()) for image, target in samples)
    assert result.scores.pixel_accuracy == right / (64 * 128 * 256)


def test_predict_writes_labels_and_overlay_and_never_overwrites(finished_run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, size in (("odd.png", (33, 65)), ("street two.jpg", (100, 60))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(pictures / name)
    (pictures / "broken.jpg").write_bytes(b"<html>not here</html>")
    (pictures / "notes.txt").write_text("no picture")
    arguments = ["predict", str(finished_run), str(pictures), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(arguments) == 3
    assert "broken.jpg" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "odd.png",
        "odd_overlay.png",
        "street two.png",
        "street two_overlay.png",
    ]
    with Image.open(tmp_path / "out" / "odd.png") as labels:
        assert (labels.mode, labels.size) == ("P", (65, 33))
        assert np.asarray(labels).max() < 8
    with Image.open(tmp_path / "out" / "odd_overlay.png") as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (65, 33))

    (tmp_path / "out" / "odd.png").write_bytes(b"mine")
    (pictures / "broken.jpg").unlink()
    assert main(arguments) == 0
    assert "skipped" in capsys.readouterr().err
    assert (tmp_path / "out" / "odd.png").read_bytes() == b"mine"
    assert main([*arguments, "--overwrite"]) == 0
    assert (tmp_path / "out" / "odd.png").read_bytes() != b"mine"


def test_predict_refuses_outputs_that_collide(finished_run, tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "same.png")
    inputs = [str(tmp_path / folder / "same.png") for folder in ("a", "b")]
    assert main(["predict", str(finished_run), *inputs, "--out", str(tmp_path / "out")]) == 1
    assert "another input would also write" in capsys.readouterr().err
    assert main(["predict", str(finished_run), inputs[0], "--out", str(tmp_path / "a"), "--overwrite"]) == 1
    assert "is one of the inputs" in capsys.readouterr().err
    assert main(["predict", str(finished_run), str(tmp_path / "no.png"), "--out", str(tmp_path / "out")]) == 1
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_ends_with_the_same_bits(finished_run, tmp_path, monkeypatch, num_workers):
    recipe = resolve_recipe("demo", [*TINY, f"data.num_workers={num_workers}", "schedule.max_steps=6"])
    run = tmp_path / "run"

    class Killed(Exception):  # noqa: N818 - it stands for no error
        """Stands for the process's end after step 5, with the newest checkpoint at step 3."""

    real_step = Stepper.step

    def step_until_killed(self: Stepper, batch: Batch, *, step: int, lr: float) -> object:
        if step == 6:
            raise Killed
        return real_step(self, batch, step=step, lr=lr)

    monkeypatch.setattr(Stepper, "step", step_until_killed)
    with pytest.raises(Killed):
        train(recipe, None, run=run, device="cpu")
    monkeypatch.undo()
    assert not (run / "model.safetensors").exists()
    train(recipe, None, run=run, device="cpu", resume=True)
    assert fingerprint(run) == fingerprint(finished_run)


def test_finished_run_is_left_as_it_is_on_resume(finished_run):
    before = (finished_run / "model.safetensors").stat().st_mtime_ns
    recipe = Recipe.read(finished_run / "recipe.yaml")
    assert train(recipe, None, run=finished_run, device="cpu", resume=True) == finished_run / "model.safetensors"
    assert (finished_run / "model.safetensors").stat().st_mtime_ns == before


def test_taken_folder_and_other_recipe_are_refused(finished_run, tmp_path):
    recipe = Recipe.read(finished_run / "recipe.yaml")
    with pytest.raises(RunError, match="E-RUN-004"):
        train(recipe, None, run=finished_run, device="cpu")
    changed = resolve_recipe(finished_run / "recipe.yaml", ["optimizer.lr=0.5"])
    with pytest.raises(RunError, match=r"optimizer\.lr was 0\.01, now 0\.5"):
        train(changed, None, run=finished_run, device="cpu", resume=True)
    with pytest.raises(RunError, match="no run to resume"):
        train(recipe, None, run=tmp_path / "empty", device="cpu", resume=True)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("data.batch_size=1", "E-MODEL-015"),
        ("augmentation.photometric={contrast: [1.5, 0.5]}", "E-RECIPE-061"),
        ("backbone.pretrained=absent.pth", "E-RUN-001"),
        ("data.eval_split=tesst", "E-DATA-021"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_folder_is_claimed(tmp_path, change, code):
    changes = [*TINY, "schedule.max_steps=2", "backbone.zero_init_residual=false", change]
    with pytest.raises(NestsegError, match=code):
        train(resolve_recipe("demo", changes), None, run=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite_stops_before_a_checkpoint(tmp_path):
    recipe = resolve_recipe("demo", [*TINY, "optimizer.lr=1e9", "schedule.max_steps=6", "guard.max_bad_steps=2"])
    with pytest.raises(RunError, match=r"E-RUN-020 .* fix: lower optimizer\.lr"):
        train(recipe, None, run=tmp_path / "run", device="cpu")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000000"]


def test_pictures_of_another_type_are_refused_before_the_folder_is_claimed(tmp_path):
    changes = [*TINY, "data.in_channels=1", "data.mean=[127]", "data.std=[60]", "augmentation.photometric=null"]
    with pytest.raises(NestsegError, match="E-DATA-087"):
        train(resolve_recipe("demo", changes), None, run=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_pretrained_backbone_is_where_training_starts(tmp_path):
    from nestseg.build import build_model, initialise_model
    from nestseg.models.resnest import BACKBONES, ResNeSt

    torch.manual_seed(5)
    source = ResNeSt(BACKBONES["resnest14"]).state_dict()
    torch.save(source, tmp_path / "official.pth")
    changes = [f"backbone.pretrained={tmp_path}/official.pth", "backbone.zero_init_residual=false"]
    recipe = resolve_recipe("demo", changes)
    model = build_model(recipe)
    assert "official.pth" in initialise_model(model, recipe)
    assert all(torch.equal(value, source[name]) for name, value in model.backbone.state_dict().items())


def test_own_data_packed_trains_as_unpacked_and_can_be_previewed_before(tmp_path, capsys):
    root = tmp_path / "scans"
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 65536, (6, 48, 64), np.uint16)
    for number, picture in enumerate(pixels):
        mask = np.zeros((48, 64), np.uint8)
        mask[10 : 20 + number, 12:40] = 255
        Image.fromarray(picture).save(root / f"images/{number}.png")
        Image.fromarray(mask).save(root / f"masks/{number}.png")
    assert main(["data", "init", str(root)]) == 0
    file = root / "dataset.yaml"
    packed = tmp_path / "packed"
    splits = ["--split", "train", "--split", "val"]
    assert main(["data", "pack", str(file), "--data", str(root), *splits, "--out", str(packed)]) == 0
    options = [*set_options("backbone.pretrained=none", "loss.class_weights=enet"), "--dataset", str(file)]
    weights = []
    for data in (root, packed):
        name = ["fcn_resnest14-d32", *options, "--data", str(data)]
        assert main(["data", "preview", *name, "--out", str(tmp_path / "preview")]) == 0
        run = tmp_path / f"run-{data.name}"
        assert main(["train", *name, "--run", str(run), "--max-steps", "2", "--device", "cpu"]) == 0
        weights.append(fingerprint(run))
    assert weights[0] == weights[1]
    assert (tmp_path / "preview/preview.png").is_file()
    capsys.readouterr()
