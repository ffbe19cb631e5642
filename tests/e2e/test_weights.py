"""Weights as a user meets them: fetch, inspect, convert, start from, fine-tune, evaluate a file of another toolbox."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from nestseg.build import load_model
from nestseg.cli import main
from nestseg.core.disk import sha256_of
from nestseg.core.errors import WeightsError
from nestseg.core.image_io import write_image
from nestseg.data.datasets import DATASETS
from nestseg.models.resnest import BACKBONES, ResNeSt
from nestseg.models.segmenter import create_model
from nestseg.weights.model import AssumptionWarning
from nestseg.weights.recognise import LAYOUTS

TINY = ["data.crop_size=[32, 64]", "data.batch_size=3", "optimizer.lr=0.001", "data.num_workers=0"]


def run(*words):
    return main([str(word) for word in words])


def sets(*overrides):
    return [word for override in (*TINY, *overrides) for word in ("--set", override)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NESTSEG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def streets():
    """A small whole model of the streets' classes."""
    torch.manual_seed(0)
    taxonomy = DATASETS["toystreets"].taxonomy
    model = create_model(
        "deeplabv3plus",
        "resnest14",
        num_classes=taxonomy.num_classes,
        output_stride=32,
        head_channels=96,
        auxiliary_channels=32,
    )
    return model, taxonomy


def test_recipe_without_its_pretrained_weights_names_the_command_that_fetches_them(tmp_path, capsys):
    code = run("train", "fcn_resnest14-d32_camvid", "--run", tmp_path / "run", "--data", tmp_path)
    assert code == 1
    assert not (tmp_path / "run").exists()
    # the data set is looked at first; a data set that needs no files shows what comes next
    code = run(
        "train", "demo", "--run", tmp_path / "run", *sets("backbone.pretrained=timm:resnest14"),
        "--set", "backbone.zero_init_residual=false",
    )  # fmt: skip
    assert code == 1
    assert "fix: nestseg weights fetch timm:resnest14" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::nestseg.weights.registry.UncheckedWeightsWarning")
def test_fetched_backbone_is_what_training_starts_from(tmp_path, capsys):
    torch.manual_seed(1)
    backbone = ResNeSt(BACKBONES["resnest14"])
    state = backbone.state_dict() | {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "resnest14.pth")
    assert run("weights", "fetch", "timm:resnest14", "--from", tmp_path / "resnest14.pth") == 0
    folder = tmp_path / "run"
    assert (
        run(
            "train", "demo", "--run", folder, "--max-steps", 1, *sets("backbone.pretrained=timm:resnest14"),
            "--set", "backbone.zero_init_residual=false", "--set", "backbone.frozen_stages=4",
            "--set", "backbone.norm=frozen_batch", "--set", "evaluation.every_steps=null",
        )
        == 0
    )  # fmt: skip
    trained = load_model(folder).backbone.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in backbone.state_dict().items())
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    digest = sha256_of(tmp_path / "resnest14.pth")
    assert f"sha256 {digest[:8]}" in next(record["description"] for record in records if record["kind"] == "init")


@pytest.mark.filterwarnings("ignore::nestseg.weights.registry.UncheckedWeightsWarning")
def test_run_goes_on_without_the_weights_it_started_from_and_from_a_checkpoint_without_scores(tmp_path, capsys):
    torch.manual_seed(1)
    torch.save(ResNeSt(BACKBONES["resnest14"]).state_dict(), tmp_path / "resnest14.pth")
    folder = tmp_path / "run"
    words = (
        "train", "demo", "--run", folder, "--max-steps", 2, "--set", "checkpoint.every_steps=1",
        *sets(f"backbone.pretrained={tmp_path / 'resnest14.pth'}", "backbone.zero_init_residual=false"),
        "--set", "evaluation.every_steps=null",
    )  # fmt: skip
    assert run(*words) == 0
    (tmp_path / "resnest14.pth").unlink()
    (folder / "model.safetensors").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000002")
    old = folder / "checkpoints" / "step-00000001"
    state = torch.load(old / "state.pt", weights_only=True)
    del state["scores"]
    torch.save(state, old / "state.pt")
    meta = json.loads((old / "meta.json").read_text())
    meta["sha256"]["state.pt"] = sha256_of(old / "state.pt")
    meta["format"] = 1  # of the versions that had no scores
    (old / "meta.json").write_text(json.dumps(meta))
    assert run(*words, "--resume") == 0, capsys.readouterr().err
    assert load_model(folder).metadata.step == 2


@pytest.mark.filterwarnings("default::nestseg.weights.model.AssumptionWarning")
def test_file_of_another_toolbox_is_inspected_evaluated_and_predicted_with(tmp_path, streets, capsys):
    model, taxonomy = streets
    model.save_pretrained(tmp_path / "model", taxonomy=taxonomy)
    foreign = tmp_path / "epoch_1.pth"
    assert run("weights", "convert", tmp_path / "model", foreign, "--to", "mmseg", "--output-stride", 32) == 0
    assert "read back equal" in capsys.readouterr().out
    assert run("weights", "inspect", foreign, "--keys", "--output-stride", 32) == 0
    shown = capsys.readouterr().out
    for words in ("mmseg, a whole model", "deeplabv3plus on resnest14", "toystreets: ", "problem"):
        assert words in shown
    assert "backbone.stem.0.weight" in shown
    assert "backbone.conv1.0.weight" in shown
    assert run("weights", "convert", foreign, tmp_path / "ours.safetensors", "--output-stride", 32) == 0
    assert run("evaluate", tmp_path / "ours.safetensors", "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["protocol"]["logits_resizes"] == 2
    capsys.readouterr()
    image = DATASETS["toystreets"](None, "val").read(0).image
    write_image(tmp_path / "street.png", image)
    assert run("predict", foreign, tmp_path / "street.png", "--out", tmp_path / "labels") == 0
    assert "output stride 8 assumed" in capsys.readouterr().err
    assert (tmp_path / "labels" / "street.png").is_file()
    with pytest.warns(AssumptionWarning, match=r"output stride 32 as asked.*weights convert .* --output-stride N"):
        back = load_model(foreign, output_stride=32)
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())


def test_terms_of_the_start_travel_with_the_model():
    from nestseg.build import describe_model
    from nestseg.recipes import resolve_recipe

    terms = describe_model(resolve_recipe("fcn_resnest50-d8_cityscapes"), step=1).data_licence
    assert "Cityscapes" in terms
    assert "ImageNet" in terms
    terms = describe_model(resolve_recipe("demo", ["init.model=runs/other"]), step=1).data_licence
    assert terms.endswith("what runs/other was trained on")


def test_whole_model_is_fine_tuned_and_what_was_kept_is_said(tmp_path, streets, capsys):
    taxonomy = streets[1]
    other = create_model(
        "deeplabv3plus", "resnest14", num_classes=2, output_stride=32, head_channels=96, auxiliary=False
    )
    from nestseg.core.taxonomy import Taxonomy

    two = Taxonomy(name="two", classes=("street", taxonomy.classes[0]), palette=((1, 1, 1), (2, 2, 2)))
    other.save_pretrained(tmp_path / "other", taxonomy=two)
    road = taxonomy.classes[1]
    folder = tmp_path / "run"
    code = run(
        "train", "demo", "--run", folder, "--max-steps", 1, "--init", tmp_path / "other",
        "--class-map", f"{road}=street", *sets("backbone.frozen_stages=4"),
        "--set", "backbone.norm=frozen_batch", "--set", "optimizer.head_lr_multiplier=10",
        "--set", "evaluation.every_steps=null",
    )  # fmt: skip
    shown = capsys.readouterr().err
    assert code == 0, shown
    assert f"2 of {taxonomy.num_classes} classes kept ({road} from street)" in " ".join(shown.split())
    trained = load_model(folder)
    assert all(
        torch.equal(value, trained.backbone.state_dict()[name]) for name, value in other.backbone.state_dict().items()
    )
    assert not torch.equal(trained.decode_head.aspp.fuse.conv.weight, other.decode_head.aspp.fuse.conv.weight)


def test_another_number_of_classes_is_taken_only_when_asked_for(tmp_path, streets, capsys):
    model, taxonomy = streets
    model.save_pretrained(tmp_path / "model", taxonomy=taxonomy)
    with pytest.raises(ValueError, match="E-WEIGHTS-053"):
        load_model(tmp_path / "model", num_classes=3)
    three = load_model(tmp_path / "model", num_classes=3, replace_classifier=True)
    assert three.decode_head.classifier.out_channels == 3
    assert run("weights", "convert", tmp_path / "model", tmp_path / "three.safetensors", "--num-classes", 3) == 0
    assert "classifiers for 3 classes start afresh" in capsys.readouterr().out
    assert load_model(tmp_path / "three.safetensors").metadata.classes == ("class_0", "class_1", "class_2")


def test_conversion_refuses_its_own_source_and_odd_suffixes(tmp_path, streets, capsys):
    model, taxonomy = streets
    model.save_pretrained(tmp_path / "model", taxonomy=taxonomy)
    file = tmp_path / "model" / "model.safetensors"
    assert run("weights", "convert", file, file) == 1
    assert run("weights", "convert", file, tmp_path / "x.pth") == 1
    assert run("weights", "convert", file, tmp_path / "x.onnx", "--to", "mmseg") == 1
    errors = capsys.readouterr().err
    assert errors.count("E-WEIGHTS-061") == 1
    assert errors.count("E-WEIGHTS-060") == 2


@pytest.mark.filterwarnings("ignore::nestseg.weights.registry.UncheckedWeightsWarning")
def test_published_name_of_unknown_hash_means_its_entry_and_nothing_else(tmp_path, capsys):
    torch.manual_seed(0)
    name = "ssseg:fcn_resnest101-d8_voc"
    for file, backbone, num_classes in (
        ("good", "resnest101", 21),
        ("classes", "resnest101", 19),
        ("net", "resnest14", 21),
    ):
        model = create_model("fcn", backbone, num_classes=num_classes, head_channels=8, auxiliary_channels=8)
        torch.save({"model": LAYOUTS["ssseg"].from_ours(model.state_dict()).state}, tmp_path / f"{file}.pth")
    assert run("weights", "fetch", name, "--from", tmp_path / "good.pth") == 0
    metadata = load_model(name).metadata
    assert (metadata.dataset, metadata.source) == ("voc", f"sssegmentation, {name}")
    assert [score.mean_iou for score in metadata.scores] == [0.7741]
    assert not load_model(name, output_stride=16).metadata.scores
    assert run("weights", "inspect", name) == 0
    assert f"{name}, by its name: no hash is known" in capsys.readouterr().out
    for file, reason in (("classes", "fcn of 19 classes, not fcn of 21"), ("net", "resnest14, not resnest101")):
        assert run("weights", "fetch", name, "--from", tmp_path / f"{file}.pth") == 0
        with pytest.raises(WeightsError, match=rf"E-WEIGHTS-055 .* is not what {name} is: .*{reason}.* fix: fetch it"):
            load_model(name)


def test_conversion_of_a_backbone_refuses_what_a_backbone_does_not_have(tmp_path, capsys):
    torch.save(ResNeSt(BACKBONES["resnest14"]).state_dict(), tmp_path / "backbone.pth")
    words = ("weights", "convert", tmp_path / "backbone.pth", tmp_path / "new.pth", "--to", "mmseg")
    assert run(*words, "--num-classes", 7) == run(*words, "--output-stride", 16) == 1
    assert capsys.readouterr().err.count("E-WEIGHTS-064") == 2
    assert run(*words) == 0


def test_inspection_of_a_damaged_model_lists_its_problems_and_exits_with_1(tmp_path, streets, capsys):
    model, _ = streets
    state = dict(model.state_dict())
    state["decode_head.shortcut.conv.weight"] = torch.full_like(state["decode_head.shortcut.conv.weight"], torch.nan)
    state["strange.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "bad.pth")
    assert run("weights", "inspect", tmp_path / "bad.pth") == 1
    shown = capsys.readouterr().out
    assert "strange.weight" in shown
    assert "decode_head.shortcut.conv.weight" in shown
    assert shown.count("problem") >= 2
