"""Ways to compute a step that change nothing about it: activation checkpointing, torch.compile, channels last."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nestseg.core.errors import ModelError
from nestseg.core.taxonomy import Taxonomy
from nestseg.models.heads import HEADS
from nestseg.models.recompute import recompute_in_backward
from nestseg.models.segmenter import Segmenter, create_model

TIMM = [
    pytest.param(f"timm:{name}", {"output_stride": 32}, marks=[] if fast else [pytest.mark.slow])
    for name, fast in (
        ("resnet18", True),
        ("mobilenetv3_small_100", True),
        # a list of features goes from module to module, and is written to
        ("hrnet_w18_small", True),
        # stochastic depth draws from torch's generator
        ("convnext_atto", False),
        ("swin_tiny_patch4_window7_224", False),
        ("densenet121", False),
        ("dla34", False),
        ("regnety_002", False),
        ("pvt_v2_b0", False),
        ("efficientnet_b0", False),
    )
]

SOME_HEADS = [pytest.param(name, marks=[] if name == "fcn" else [pytest.mark.slow]) for name in HEADS]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_small(segmentor: str = "fcn", backbone: str = "resnest14", **options) -> Segmenter:
    torch.manual_seed(0)
    defaults = {"num_classes": 5, "output_stride": 16, "head_channels": 16, "auxiliary_channels": 16}
    return create_model(segmentor, backbone, **{**defaults, **options})


def draw_image(batch_size: int = 3, height: int = 64, width: int = 96) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8, generator=draw)


def take_pass(model: nn.Module, image: Tensor) -> Tensor:
    torch.manual_seed(1)
    logits = model(image)
    loss = logits.main.square().mean() + logits.main.mean() + logits.auxiliary.square().mean()
    loss.backward()
    return loss.detach()


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name
    for (name, mine), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs), name


def count_saved_bytes(model: nn.Module, image: Tensor) -> int:
    """Count what a forward pass keeps for the backward pass, parameters apart."""
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        if not isinstance(value, nn.Parameter):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        logits = model(image)
    del logits
    return sum(kept.values())


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("resnest14", {}),
        ("resnest14", {"frozen_stages": 2}),
        ("resnest14", {"backbone_norm": "frozen_batch"}),
        ("resnest14", {"dilation_variant": "official", "output_stride": 8}),
        *TIMM,
        pytest.param("timm:resnet18", {"frozen_stages": 4}),
    ],
)
def test_activation_checkpointing_gives_the_same_gradients_and_statistics(backbone, options):
    plain = build_small(backbone=backbone, **options)
    model = copy.deepcopy(plain)
    model.backbone.checkpoint_activations()
    assert list(model.state_dict()) == list(plain.state_dict())
    image = draw_image()
    for _ in range(2):
        assert torch.equal(take_pass(model, image), take_pass(plain, image))
    assert_same_bits(model, plain)
    counters = [int(value) for name, value in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert not counters or set(counters) <= {0, 2}


@pytest.mark.parametrize("backbone", ["resnest14", "timm:resnet18"])
def test_activation_checkpointing_keeps_less(backbone):
    model, image = build_small(backbone=backbone), draw_image()
    plain = count_saved_bytes(model, image)
    model.backbone.checkpoint_activations()
    model.backbone.checkpoint_activations()
    assert count_saved_bytes(model, image) < 0.6 * plain
    blocks = list(model.backbone.blocks())
    share = sum(value.numel() for block in blocks for value in block.parameters()) / sum(
        value.numel() for value in model.backbone.parameters()
    )
    assert share > 0.9


def test_a_copy_of_a_checkpointed_model_computes_with_its_own_weights():
    model = build_small()
    model.backbone.checkpoint_activations()
    other, image = copy.deepcopy(model), draw_image()
    with torch.no_grad():
        for parameter in other.backbone.parameters():
            parameter.zero_()
    take_pass(other, image)
    assert not other.eval()(image).main.any()
    assert model.eval()(image).main.any()


def test_a_backbone_without_blocks_cannot_checkpoint_activations():
    model = build_small(backbone="timm:vgg11_bn", output_stride=32)
    with pytest.raises(ModelError, match="E-MODEL-060"):
        model.backbone.checkpoint_activations()


def test_a_module_that_writes_to_its_input_cannot_be_recomputed():
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2).square()

    module = Doubling()
    recompute_in_backward(module)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        module(torch.ones(2, requires_grad=True) * 1).sum().backward()


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("segmentor", SOME_HEADS)
def test_a_model_compiles_as_one_graph_for_training(segmentor, checkpointing):
    plain = build_small(segmentor, dropout=0.0)
    model = copy.deepcopy(plain)
    if checkpointing:
        model.backbone.checkpoint_activations()
    image = draw_image(3, 33, 65)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(take_pass(compiled, image), take_pass(plain, image))
    for (name, mine), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    gradients = [
        torch.cat([value.grad.flatten() for value in network.parameters()]).double() for network in (model, plain)
    ]
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


@pytest.mark.parametrize("segmentor", SOME_HEADS)
@torch.no_grad()
def test_a_model_compiles_as_one_graph_for_prediction(segmentor):
    model = build_small(segmentor).eval()
    image = draw_image(1, 33, 65)
    torch._dynamo.reset()
    logits = torch.compile(model, fullgraph=True, backend="aot_eager")(image).main
    torch.testing.assert_close(logits, model(image).main)


def test_a_warned_of_batch_of_two_compiles_as_one_graph():
    # the warning is for passes that are not compiled; a run checks the size of its batches before the first
    plain = build_small(dropout=0.0)
    model, image = copy.deepcopy(plain), draw_image(2, 33, 65)
    torch._dynamo.reset()
    loss = take_pass(torch.compile(model, fullgraph=True, backend="aot_eager"), image)
    with pytest.warns(match="two images a device"):
        torch.testing.assert_close(loss, take_pass(plain, image))


@pytest.mark.parametrize("segmentor", HEADS)
def test_channels_last_gives_the_same_logits(segmentor):
    plain = build_small(segmentor, dropout=0.0).double()
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    image = draw_image(3, 33, 65).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(take_pass(model, image), take_pass(plain, image), rtol=1e-9, atol=0)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-9 * max(scale, 1e-6))
    torch.testing.assert_close(model.eval()(image).main, plain.eval()(image).main, rtol=1e-9, atol=1e-9)


def test_a_model_in_channels_last_is_saved_like_any_other(tmp_path):
    taxonomy = Taxonomy(name="five", classes=tuple("abcde"), palette=tuple((value, 0, 0) for value in range(5)))
    plain = build_small()
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert not model.backbone.conv1[3].weight.is_contiguous()
    plain.save_pretrained(tmp_path / "plain", taxonomy=taxonomy)
    model.save_pretrained(tmp_path / "other", taxonomy=taxonomy)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "other")]
    assert files[0] == files[1]
