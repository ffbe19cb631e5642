"""What every backbone and every head promises; a new entry in the tables needs no new test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from nestseg.core.errors import ModelError
from nestseg.models.heads import HEADS
from nestseg.models.resnest import BACKBONES, ResNeSt
from nestseg.models.segmenter import Segmenter, create_model

FEATURE_CHANNELS = (256, 512, 1024, 2048)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_small(segmentor: str, **options) -> Segmenter:
    torch.manual_seed(0)
    defaults = {"num_classes": 5, "output_stride": 16, "head_channels": 32, "auxiliary_channels": 32}
    return create_model(segmentor, "resnest14", **{**defaults, **options})


def draw_image(batch_size: int, height: int = 33, width: int = 65, *, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8, generator=draw)


def take_train_step(model: nn.Module, image: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    logits = model.train()(image)
    loss = logits.main.square().mean() + logits.main.mean()
    if logits.auxiliary is not None:
        loss = loss + logits.auxiliary.square().mean() + logits.auxiliary.mean()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("stride", [8, 16, 32])
def test_every_backbone_gives_four_features_of_rounded_up_sizes_on_the_meta_device(name, stride):
    # Two blocks a stage have all there is to sizes; the whole depth once is enough.
    spec = BACKBONES[name] if stride == 8 else BACKBONES[name]._replace(blocks=(1, 2, 1, 2))
    with torch.device("meta"):
        model = ResNeSt(spec, output_stride=stride)
        features = model(torch.empty(2, 3, 33, 65))
    assert model.feature_channels == FEATURE_CHANNELS
    assert model.output_stride == stride
    for feature, channels, reached in zip(features, FEATURE_CHANNELS, (4, 8, 16, 32), strict=True):
        step = min(reached, stride)
        assert feature.shape == (2, channels, -(-33 // step), -(-65 // step))


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_runs_in_every_variant_and_with_every_norm_on_the_meta_device(name):
    spec = BACKBONES[name]._replace(blocks=(1, 1, 1, 2))
    for variant, norm in (("plain", "batch"), ("official", "frozen_batch"), ("timm", "group")):
        with torch.device("meta"):
            model = ResNeSt(spec, output_stride=8, dilation_variant=variant, norm=norm, in_channels=4)
            features = model(torch.empty(2, 4, 33, 65))
        assert features[3].shape == (2, 2048, 5, 9)


@pytest.mark.parametrize("segmentor", HEADS)
@pytest.mark.parametrize("size", [(33, 65), (7, 1), (64, 96)])
@torch.no_grad()
def test_any_size_and_a_batch_of_one_work_in_evaluation(segmentor, size):
    model = build_small(segmentor).eval()
    logits = model(draw_image(1, *size))
    step = 4 if segmentor == "deeplabv3plus" else 16
    assert logits.main.shape == (1, 5, -(-size[0] // step), -(-size[1] // step))
    assert logits.auxiliary is None
    assert logits.main.isfinite().all()


@pytest.mark.parametrize("segmentor", HEADS)
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other_in_evaluation(segmentor):
    model = build_small(segmentor).double().eval()
    image = draw_image(2)
    both, second = model(image).main, model(image[1:]).main
    torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-12)


@pytest.mark.parametrize("segmentor", HEADS)
def test_every_parameter_gets_a_gradient(segmentor):
    model = build_small(segmentor).train()
    logits = model(draw_image(3))
    assert logits.auxiliary is not None
    assert logits.auxiliary.shape == (3, 5, 3, 5)
    target = torch.randint(0, 5, (3, 33, 65))
    loss = sum(F.cross_entropy(F.interpolate(part, target.shape[1:]), target) for part in logits)
    loss.backward()
    without = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


@pytest.mark.parametrize("segmentor", HEADS)
@torch.no_grad()
def test_a_strict_save_and_load_gives_the_same_logits(segmentor, tmp_path):
    model = build_small(segmentor)
    model(draw_image(3))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = build_small(segmentor)
    image = draw_image(1)
    assert not torch.equal(model.eval()(image).main, other.eval()(image).main)
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(model(image).main, other(image).main)


@pytest.mark.parametrize("segmentor", HEADS)
@torch.no_grad()
def test_a_model_built_on_the_meta_device_is_whole_after_to_empty_and_load(segmentor):
    model = build_small(segmentor, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0)).eval()
    with torch.device("meta"):
        other = build_small(segmentor, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0)).eval()
    assert all(value.is_meta for value in other.state_dict().values())
    other.to_empty(device="cpu")
    other.load_state_dict(model.state_dict())
    image = draw_image(1)
    assert torch.equal(other(image).main, model(image).main)


@pytest.mark.parametrize("segmentor", HEADS)
@torch.no_grad()
def test_float_pixels_give_the_logits_of_the_same_uint8_pixels(segmentor):
    model = build_small(segmentor).eval()
    image = draw_image(2)
    for dtype in (torch.float32, torch.float64, torch.uint16):
        assert torch.equal(model(image.to(dtype)).main, model(image).main)


@pytest.mark.parametrize("segmentor", HEADS)
@torch.no_grad()
def test_float_pixels_are_left_as_they_were(segmentor):
    model = build_small(segmentor).eval()
    image = draw_image(1).float()
    before = image.clone()
    model(image)
    assert torch.equal(image, before)


@pytest.mark.parametrize("segmentor", HEADS)
@torch.no_grad()
def test_channels_last_memory_gives_the_same_logits(segmentor):
    model = build_small(segmentor).double().eval()
    image = draw_image(2)
    expected = model(image).main
    moved = model.to(memory_format=torch.channels_last)(image.to(memory_format=torch.channels_last)).main
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("segmentor", HEADS)
def test_group_norm_trains_on_a_batch_of_one(segmentor):
    model = build_small(segmentor, backbone_norm="group", head_norm="group")
    take_train_step(model, draw_image(1))
    assert all(value.grad is not None and value.grad.any() for value in model.parameters())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("segmentor", HEADS)
def test_frozen_norms_do_not_change_in_a_train_step_and_the_rest_does(segmentor):
    model = build_small(segmentor, backbone_norm="frozen_batch", head_norm="frozen_batch")
    reference = build_small(segmentor)
    assert list(reference.state_dict()) == list(model.state_dict())
    model.load_state_dict(reference.state_dict())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    take_train_step(model, draw_image(1))
    parameters = dict(model.named_parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key not in parameters), key


@pytest.mark.parametrize("frozen_stages", [0, 1, 2, 3, 4])
def test_frozen_stages_do_not_change_in_a_train_step_and_the_rest_does(frozen_stages):
    model = build_small("fcn", frozen_stages=frozen_stages)
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    take_train_step(model, draw_image(3))
    frozen = ("backbone.conv1.", "backbone.bn1.", *(f"backbone.layer{i}." for i in range(1, frozen_stages + 1)))
    for key, value in model.state_dict().items():
        is_frozen = frozen_stages > 0 and key.startswith(frozen)
        assert torch.equal(value, before[key]) == is_frozen, key


@pytest.mark.parametrize(
    "segmentor",
    [pytest.param(name, marks=[] if name == "pspnet" else [pytest.mark.slow]) for name in HEADS],
)
@torch.no_grad()
def test_one_export_serves_sizes_odd_and_even(segmentor):
    model = build_small(segmentor).eval()
    sizes = {2: Dim("height", min=33, max=4096), 3: Dim("width", min=33, max=4096)}
    program = torch.export.export(
        model, (draw_image(1, 65, 97),), dynamic_shapes={"image": sizes}, strict=False
    ).module()
    for size in ((33, 65), (64, 96), (130, 71)):
        image = draw_image(1, *size)
        torch.testing.assert_close(program(image).main, model(image).main, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [8, 32])
@pytest.mark.parametrize("variant", ["plain", "official", "timm"])
@torch.no_grad()
def test_one_export_serves_sizes_odd_and_even_at_other_strides(stride, variant):
    model = build_small("pspnet", output_stride=stride, dilation_variant=variant).eval()
    sizes = {2: Dim("height", min=33, max=4096), 3: Dim("width", min=33, max=4096)}
    program = torch.export.export(
        model, (draw_image(1, 65, 97),), dynamic_shapes={"image": sizes}, strict=False
    ).module()
    image = draw_image(1, 130, 71)
    torch.testing.assert_close(program(image).main, model(image).main, rtol=1e-4, atol=1e-5)


def test_zero_residuals_start_every_block_as_its_shortcut():
    model = ResNeSt(BACKBONES["resnest14"], output_stride=32)
    model.zero_residuals()
    x = torch.rand(3, 64, 8, 8)
    block = model.layer1[0]
    assert torch.equal(block(x), F.relu(block.downsample(x)))
    with pytest.raises(ModelError, match=r"E-MODEL-020"):
        ResNeSt(BACKBONES["resnest14"], norm="frozen_batch").zero_residuals()
