"""Weight files: strict, safe, and whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nestseg.build import describe_model, load_model, load_predictor
from nestseg.core.errors import RunError, WeightsError
from nestseg.core.taxonomy import Taxonomy
from nestseg.models.resnest import BACKBONES, ResNeSt
from nestseg.models.segmenter import create_model
from nestseg.recipes import named_recipe
from nestseg.store.files import (
    check_finite,
    load_strictly,
    read_checkpoint,
    read_metadata,
    read_model_file,
    read_torch_file,
    write_model_file,
)
from nestseg.weights.model import load_backbone


@pytest.fixture(scope="module")
def backbone():
    return ResNeSt(BACKBONES["resnest14"])


def test_missing_file_and_wrong_content_are_named(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="not a table of tensors by name: it holds list"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"a": torch.ones(1), "epoch": 3}, tmp_path / "mixed.pth")
    with pytest.raises(WeightsError, match="not a table of tensors by name: epoch is int"):
        read_checkpoint(tmp_path / "mixed.pth")
    save_file({"a": torch.ones(1)}, tmp_path / "state.pt")
    with pytest.raises(WeightsError, match="a safetensors file, where one of torch is read"):
        read_torch_file(tmp_path / "state.pt")


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("legacy", [False, True])
def test_wrapper_is_opened_and_plain_values_beside_it_kept(tmp_path, wrapper, legacy):
    content = {
        wrapper: {"conv.weight": nn.Parameter(torch.arange(3.0))},
        "meta": {
            "CLASSES": ("road", "sky"),
            "PALETTE": [[1, 2, 3], [4, 5, 6]],
            "config": "model = dict()",
            "seed": None,
        },
        "epoch": 7,
        "best": {"mIoU": np.float64(0.78), "step": 5, "per_class": [0.5, np.float32(0.1)]},
        "mean": torch.ones(3),
        "ema": {"conv.weight": torch.ones(3)},
        "optimizer": {"param_groups": [{"lr": 0.1}]},
        "lr_schedulers": [{"last_epoch": 7}],
        "shape": torch.Size([2, 3]),
        3: "not a name",
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    state, meta = read_checkpoint(tmp_path / "a.pth")
    assert torch.equal(state["conv.weight"], torch.arange(3.0))
    assert type(state["conv.weight"]) is torch.Tensor
    assert not state["conv.weight"].requires_grad
    assert meta == {**content["meta"], "epoch": 7, "best": {"step": 5}, "shape": (2, 3)}


def test_prefix_of_data_parallel_is_dropped_only_where_every_name_has_it(tmp_path):
    for names, expected in ((("module.a", "module.b.c"), ["a", "b.c"]), (("module.a", "b"), ["module.a", "b"])):
        torch.save({name: torch.ones(1) for name in names}, tmp_path / "a.pth")
        assert list(read_checkpoint(tmp_path / "a.pth").state) == expected


def test_first_bytes_decide_and_not_the_suffix(tmp_path):
    state = {"a": torch.arange(4.0, dtype=torch.float16), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(())}
    for legacy in (False, True):
        torch.save(state, tmp_path / "torch.safetensors", _use_new_zipfile_serialization=not legacy)
        read = read_checkpoint(tmp_path / "torch.safetensors")
        assert all(torch.equal(read.state[name], value) for name, value in state.items())
        assert read.meta == {}
    save_file(state, tmp_path / "safe.pth", metadata={"format": "pt"})
    read = read_checkpoint(tmp_path / "safe.pth")
    assert all(torch.equal(read.state[name], value) for name, value in state.items())
    assert read.meta == {"format": "pt"}
    assert read_metadata(read, path=tmp_path / "safe.pth") is None


def make_network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def test_mismatch_shows_a_table_of_names_with_both_shapes():
    network, state = make_network(), make_network().state_dict()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    del state["1.running_var"]
    state |= {"2.weight": torch.ones(5, 4, 1, 1), "2.\nbias": torch.ones(5)}
    with pytest.raises(WeightsError) as raised:
        load_strictly(network, state, path=Path("a.pth"), fix="other")
    assert str(raised.value).splitlines() == [
        "E-WEIGHTS-010 | a.pth | does not fit this network: 1 missing, 1 unexpected, 1 of another shape | fix: other",
        "                    name           given         wanted",
        "  missing           1.running_var  -             (4,)",
        "  unexpected        2.\\nbias       (5,)          -",
        "  of another shape  2.weight       (5, 4, 1, 1)  (2, 4, 1, 1)",
    ]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_mismatch_names_the_first_ten_of_each_kind():
    state = make_network().state_dict() | {f"head.{index}": torch.ones(1) for index in range(23)}
    with pytest.raises(WeightsError, match=r"network: 23 unexpected \|") as raised:
        load_strictly(make_network(), state, path=Path("a.pth"), fix="take another")
    assert len(raised.value.table) == 12
    assert raised.value.table[-1].split() == ["unexpected", "...", "and", "13", "more"]


def test_only_what_is_named_may_be_absent():
    network, source = make_network(), make_network().state_dict()
    state = {name: value for name, value in source.items() if not name.startswith("2.")}
    with pytest.raises(WeightsError, match="2 missing"):
        load_strictly(network, state, path=Path("a.pth"), fix="take another", may_miss=["3."])
    kept = network[2].weight.clone()
    assert load_strictly(network, state, path=Path("a.pth"), fix="", may_miss=["2.", "3."]) == ["2.weight", "2.bias"]
    assert torch.equal(network[2].weight, kept)
    assert torch.equal(network[0].weight, source["0.weight"])
    assert load_strictly(network, source, path=Path("a.pth"), fix="", may_miss=["2."]) == []
    state["2.weight"] = source["2.weight"]
    with pytest.raises(WeightsError, match="1 missing"):  # half a head is damage
        load_strictly(network, state, path=Path("a.pth"), fix="take another", may_miss=["2."])


def test_batch_counters_that_old_files_lack_start_at_zero():
    network = make_network()
    network[1].num_batches_tracked += 5
    state = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    assert load_strictly(network, state, path=Path("a.pth"), fix="") == []
    assert int(network[1].num_batches_tracked) == 0


def test_values_that_are_not_finite_are_counted_and_named():
    state = {
        "a": torch.ones(3),
        "b": torch.tensor([1.0, float("nan"), float("inf")]),
        "c": torch.tensor([-float("inf")], dtype=torch.bfloat16),
        "d": torch.tensor([float("nan")]).to(torch.float8_e4m3fn),
        "count": torch.tensor(3),
    }
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-018 \| a.pth \| 4 values in 3 of 5 tensors .* fix: ") as raised:
        check_finite(state, path=Path("a.pth"))
    assert [line.split() for line in raised.value.table[1:]] == [["b", "2"], ["c", "1"], ["d", "1"]]
    check_finite({name: state[name] for name in ("a", "count")}, path=Path("a.pth"))


def test_official_file_loads_with_classifier_and_prefix_dropped(tmp_path, backbone):
    state = {f"module.{name}": torch.rand_like(value.float()) for name, value in backbone.state_dict().items()}
    state |= {"module.fc.weight": torch.zeros(1000, 2048), "module.fc.bias": torch.zeros(1000)}
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    target = ResNeSt(BACKBONES["resnest14"])
    load_backbone(target, str(tmp_path / "official.pth"), name="resnest14")
    for name, value in target.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, state[f"module.{name}"]), name


def test_file_of_another_network_is_refused_with_counts(tmp_path, backbone):
    torch.save(backbone.state_dict(), tmp_path / "resnest14.pth")
    with pytest.raises(WeightsError, match=r"\d+ missing \| fix: check that backbone\.name[^$]*missing +layer1\.1"):
        load_backbone(ResNeSt(BACKBONES["resnest26"]), str(tmp_path / "resnest14.pth"), name="resnest26")


def test_backbone_with_the_same_keys_and_shapes_is_told_from_another_where_the_file_says_which_it_is(tmp_path):
    torch.manual_seed(0)
    model = create_model("fcn", "resnest50", num_classes=3, head_channels=8, auxiliary=False)
    three = Taxonomy(name="three", classes=("a", "b", "c"), palette=((0, 0, 0), (1, 1, 1), (2, 2, 2)))
    model.save_pretrained(tmp_path, taxonomy=three)
    load_backbone(ResNeSt(BACKBONES["resnest50"]), str(tmp_path), name="resnest50")
    fast = "resnest50-fast-2s1x64d"
    with pytest.raises(WeightsError, match=rf"E-WEIGHTS-056 .* holds the backbone resnest50, not {fast} \| fix: "):
        load_backbone(ResNeSt(BACKBONES[fast]), str(tmp_path), name=fast)


def test_model_file_is_enough_to_predict(tmp_path):
    recipe = named_recipe("pspnet_resnest14-d16_voc")
    metadata = describe_model(recipe, step=5)
    torch.manual_seed(0)
    model = create_model(**dict(metadata.architecture)).eval()
    write_model_file(tmp_path / "model.safetensors", model.state_dict(), metadata)
    state, read_back = read_model_file(tmp_path / "model.safetensors")
    assert read_back == metadata
    assert read_back.architecture.dilation_variant == "plain"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    image = torch.randint(0, 256, (1, 3, 40, 50), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path)(image).main, model(image).main)
    predictor = load_predictor(tmp_path / "model.safetensors", device="cpu")
    assert predictor.base_size == (512, 2048)
    assert predictor.taxonomy.classes[0] == "background"


def test_model_file_of_before_there_were_layouts_is_read(tmp_path):
    metadata = describe_model(named_recipe("fcn_resnest14-d16_voc"), step=5)
    torch.manual_seed(0)
    model = create_model(**dict(metadata.architecture)).eval()
    old = json.loads(metadata.model_dump_json())
    for field in ("logits_resizes", "scores", "source", "licence", "data_licence"):
        del old[field]
    for field in ("num_convs", "fusion"):
        del old["architecture"][field]
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"nestseg": json.dumps(old)})
    loaded = load_model(tmp_path)
    assert loaded.metadata.logits_resizes == 1
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("asked", [{"output_stride": 8}, {"backbone": "resnest50"}, {"layout": "mmseg"}])
def test_what_a_model_file_of_ours_says_cannot_be_said_otherwise(tmp_path, asked):
    metadata = describe_model(named_recipe("fcn_resnest14-d16_voc"), step=5)
    write_model_file(tmp_path / "model.safetensors", create_model(**dict(metadata.architecture)).state_dict(), metadata)
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-054 .*not .* fix: leave that out"):
        load_model(tmp_path, **asked)
    load_model(tmp_path, layout="nestseg", backbone="resnest14", output_stride=16)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    metadata = describe_model(named_recipe("fcn_resnest14-d16_voc"), step=1)
    write_model_file(file, {"a": torch.ones(1)}, metadata)
    before = file.read_bytes()

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nestseg.core.disk.sync_file", full_disk)
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-006 .*No space left.* fix: free space"):
        write_model_file(file, {"a": torch.zeros(1)}, metadata)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_file_cannot_be_written_into_a_folder_that_is_not_there(tmp_path):
    metadata = describe_model(named_recipe("fcn_resnest14-d16_voc"), step=1)
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-006 .*absent/model\.safetensors"):
        write_model_file(tmp_path / "absent" / "model.safetensors", {"a": torch.ones(1)}, metadata)


def test_weights_that_are_not_those_of_the_metadata_are_refused(tmp_path):
    metadata = describe_model(named_recipe("fcn_resnest14-d16_voc"), step=1)
    file = tmp_path / "model.safetensors"
    write_model_file(file, {"stray": torch.ones(1)}, metadata)
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-010 \| .* missing, 1 unexpected \|[^$]*unexpected +stray"):
        load_model(file)
    write_model_file(file, {}, metadata.model_copy(update={"classes": ("one", "two")}))
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-005 .*2 class names and 21 colours for a network of 21"):
        load_model(file)


def test_folder_without_a_model_says_what_to_do(tmp_path):
    with pytest.raises(RunError, match=r"E-RUN-002 .* fix: pass the folder"):
        load_model(tmp_path)
    with pytest.raises(RunError, match="E-RUN-001"):
        load_model(tmp_path / "absent")


def test_foreign_safetensors_has_no_meaning(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "foreign.pth")
    for name in ("foreign.safetensors", "foreign.pth"):
        with pytest.raises(WeightsError, match="E-WEIGHTS-004"):
            read_model_file(tmp_path / name)
