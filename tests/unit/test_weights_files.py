"""Weight files: strict, safe, and whole or not there."""

from __future__ import annotations

import pickle

import pytest
import torch

from nestseg.build import describe_model, load_model, load_predictor
from nestseg.core.errors import RunError, WeightsError
from nestseg.models.resnest import BACKBONES, ResNeSt
from nestseg.models.segmenter import create_model
from nestseg.recipes import named_recipe
from nestseg.weights.files import read_model_file, read_state_dict, write_model_file
from nestseg.weights.official import load_official_backbone


@pytest.fixture(scope="module")
def backbone():
    return ResNeSt(BACKBONES["resnest14"])


class Payload:
    """A pickle that would create a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("nested", [False, True])
def test_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, nested):
    sentinel = tmp_path / "owned"
    file = tmp_path / "weights.pth"
    torch.save({"state_dict": {"a": Payload(sentinel)}} if nested else Payload(sentinel), file)
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-002 .* fix: ") as raised:
        read_state_dict(file)
    assert "weights_only" not in str(raised.value)  # torch advises to switch it off
    file.write_bytes(pickle.dumps(Payload(sentinel), protocol=2))
    with pytest.raises(WeightsError, match="E-WEIGHTS-002"):
        read_state_dict(file)
    assert not sentinel.exists()


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"<html>login</html>", b"\x00" * 100, b"version https://git-lfs.github.com"])
def test_file_that_holds_no_weights_is_named(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=name):
        read_state_dict(file)


def test_missing_file_and_wrong_content_are_named(tmp_path):
    with pytest.raises(WeightsError, match="no such file"):
        read_state_dict(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="not a table of tensors"):
        read_state_dict(tmp_path / "list.pth")


def test_official_file_loads_with_classifier_and_prefix_dropped(tmp_path, backbone):
    state = {f"module.{name}": torch.rand_like(value.float()) for name, value in backbone.state_dict().items()}
    state |= {"module.fc.weight": torch.zeros(1000, 2048), "module.fc.bias": torch.zeros(1000)}
    torch.save({"state_dict": state}, tmp_path / "official.pth")
    target = ResNeSt(BACKBONES["resnest14"])
    load_official_backbone(target, tmp_path / "official.pth")
    for name, value in target.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, state[f"module.{name}"]), name


def test_file_of_another_network_is_refused_with_counts(tmp_path, backbone):
    torch.save(backbone.state_dict(), tmp_path / "resnest14.pth")
    with pytest.raises(WeightsError, match=r"missing: layer1\.1\.conv1\.weight.*fix: check that backbone\.name"):
        load_official_backbone(ResNeSt(BACKBONES["resnest26"]), tmp_path / "resnest14.pth")


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
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-010 \| .*missing: .*1 unexpected: stray"):
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
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "foreign.pth")
    for name in ("foreign.safetensors", "foreign.pth"):
        with pytest.raises(WeightsError, match="E-WEIGHTS-004"):
            read_model_file(tmp_path / name)
