"""Segmentors against sssegmentation's own code: random weights and statistics, float64, no downloads."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nestseg.models.segmenter import Segmenter, create_model
from nestseg.weights.recognise import recognise
from nestseg.weights.ssseg import SSSEG

MANIFESTS = Path(__file__).parents[1] / "unit" / "manifests"
TOLERANCE = 1e-9

# Its package comes without configurations: these are the model sections of those named *_resnest101os8_cityscapes.
HEADS = {
    "fcn": ("FCN", {"in_channels": 2048}),
    "pspnet": ("PSPNet", {"in_channels": 2048, "pool_scales": [1, 2, 3, 6]}),
    "deeplabv3": ("Deeplabv3", {"in_channels": 2048, "dilations": [1, 12, 24, 36]}),
    "deeplabv3plus": (
        "Deeplabv3Plus",
        {"in_channels": [256, 2048], "dilations": [1, 12, 24, 36], "shortcut_channels": 48},
    ),
}
BACKBONE = {"type": "ResNeSt", "structure_type": "resnest101", "depth": 101, "outstride": 8, "pretrained": False}


class DataSets(types.ModuleType):
    """Stands where sssegmentation has its data sets, which need packages of their own; no network here uses one."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object()


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def peers() -> types.ModuleType:
    sys.modules["ssseg.modules.datasets"] = DataSets("ssseg.modules.datasets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is older than our torch
        return importlib.import_module("ssseg.modules")


def build_peer(peers: types.ModuleType, segmentor: str) -> nn.Module:
    name, head = HEADS[segmentor]
    configuration = {
        "type": name,
        "num_classes": 19,
        "align_corners": False,
        "norm_cfg": {"type": "SyncBatchNorm"},
        "act_cfg": {"type": "ReLU", "inplace": True},
        "backbone": BACKBONE,
        "head": {"feats_channels": 512, "dropout": 0.1, **head},
        "auxiliary": {"in_channels": 1024, "out_channels": 512, "dropout": 0.1},
    }
    return peers.BuildSegmentor(configuration, mode="TEST")


def randomise(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=draw)
            module.bias.data.normal_(0, 0.3, generator=draw)
            module.running_mean.normal_(0, 0.3, generator=draw)
            module.running_var.uniform_(0.5, 2.0, generator=draw)
            module.num_batches_tracked.fill_(81_620)
        elif isinstance(module, nn.Conv2d):
            module.weight.data.normal_(0, module.weight[0].numel() ** -0.5, generator=draw)
            if module.bias is not None:
                module.bias.data.normal_(0, 1, generator=draw)
    model.double().eval()
    return model


@pytest.fixture(scope="module", params=HEADS)
def pair(request, peers) -> Iterator[tuple[nn.Module, Segmenter]]:
    """Their network with random weights, and ours made of nothing but its state dict."""
    theirs = randomise(build_peer(peers, request.param))
    found = recognise(theirs.state_dict())
    assert found.layout is SSSEG
    assert found.architecture is not None
    assert found.architecture.segmentor == request.param
    assert found.dropped == ()
    ours = create_model(**dict(found.architecture)).double().eval()
    ours.load_state_dict(found.state)
    return theirs, ours


def read_manifest(name: str, *, prefix: str = "") -> dict[str, tuple[int, ...]]:
    rows = (line.split() for line in (MANIFESTS / f"{name}.txt").read_text(encoding="utf-8").splitlines())
    return {prefix + key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape in rows}


def draw_image() -> Tensor:
    # C5 is (5, 38): wide enough for rate 36 of the ASPP to reach more than its centre
    return torch.randint(0, 256, (2, 3, 33, 297), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """In units of the reference's standard deviation; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max() / theirs.std())


@pytest.mark.parametrize("segmentor", HEADS)
def test_the_committed_manifests_are_the_keys_and_shapes_of_their_code(peers, segmentor):
    with torch.device("meta"):
        theirs = build_peer(peers, segmentor)
    given = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert given == read_manifest("resnest101", prefix="backbone_net.") | read_manifest(f"ssseg_{segmentor}")


@torch.no_grad()
def test_features_main_and_auxiliary_logits_equal_theirs(pair, peers):
    theirs, ours = pair
    pixels = (draw_image() - ours.mean) / ours.std
    features, references = ours.backbone(pixels), theirs.backbone_net(pixels)
    for mine, reference in zip(features, references, strict=True):
        assert largest_difference(mine, reference) <= TOLERANCE
    logits = theirs(peers.SSSegInputStructure(images=pixels, mode="TEST")).seg_logits
    assert ours.auxiliary_head is not None
    assert largest_difference(ours(draw_image()).main, logits) <= TOLERANCE
    assert largest_difference(ours.auxiliary_head(features), theirs.auxiliary_decoder(references[2])) <= TOLERANCE


def test_back_in_their_layout_every_tensor_is_theirs(pair):
    theirs, ours = pair
    given = theirs.state_dict()
    back = SSSEG.from_ours(ours.state_dict()).state
    assert back.keys() == given.keys()
    for key, value in given.items():
        assert torch.equal(back[key], value), key
