"""Segmentors against mmsegmentation: its own code and configurations, random weights, float64, no downloads."""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestseg.models.segmenter import Segmenter, create_model
from nestseg.weights.mmseg import MMSEG
from nestseg.weights.recognise import recognise

MANIFESTS = Path(__file__).parents[1] / "unit" / "manifests"
SEGMENTORS = ("fcn", "pspnet", "deeplabv3", "deeplabv3plus")
TOLERANCE = 1e-9


class CompiledOperators(types.ModuleType):
    """Stands where mmcv has operators that need a compiler; no network here calls one."""

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
    sys.modules["mmcv.ops"] = CompiledOperators("mmcv.ops")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is older than our torch
        peers = importlib.import_module("mmseg.models")
        importlib.import_module("mmengine.registry").init_default_scope("mmseg")
    return peers


def read_configuration(peers: types.ModuleType, segmentor: str, *, dataset: str = "cityscapes") -> Any:
    """Their own, which their package carries."""
    folder = Path(peers.__file__).parents[1] / ".mim" / "configs" / "resnest"
    [path] = folder.glob(f"resnest_s101-d8_{segmentor}_4xb*{dataset}*.py")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("mmengine.config").Config.fromfile(path)


def build_peer(peers: types.ModuleType, segmentor: str, *, dataset: str = "cityscapes") -> nn.Module:
    model = read_configuration(peers, segmentor, dataset=dataset).model
    model.pretrained = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("mmseg.registry").MODELS.build(model)


def randomise(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(7)
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.weight.data.uniform_(0.5, 1.5, generator=draw)
            module.bias.data.normal_(0, 0.3, generator=draw)
            module.running_mean.normal_(0, 0.3, generator=draw)
            module.running_var.uniform_(0.5, 2.0, generator=draw)
            module.num_batches_tracked.fill_(80_000)
        elif isinstance(module, nn.Conv2d):
            module.weight.data.normal_(0, module.weight[0].numel() ** -0.5, generator=draw)
            if module.bias is not None:
                module.bias.data.normal_(0, 1, generator=draw)
    return model.double().eval()


@pytest.fixture(scope="module", params=SEGMENTORS)
def pair(request, peers) -> Iterator[tuple[nn.Module, Segmenter]]:
    """Their network with random weights, and ours made of nothing but its state dict."""
    theirs = randomise(build_peer(peers, request.param))
    found = recognise(theirs.state_dict())
    assert found.layout is MMSEG
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


@pytest.mark.parametrize("segmentor", SEGMENTORS)
def test_the_committed_manifests_are_the_keys_and_shapes_of_their_code(peers, segmentor):
    with torch.device("meta"):
        theirs = build_peer(peers, segmentor)
    given = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert given == read_manifest("resnest101", prefix="backbone.") | read_manifest(f"mmseg_{segmentor}")


@torch.no_grad()
def test_features_main_and_auxiliary_logits_equal_theirs(pair):
    theirs, ours = pair
    pixels = (draw_image() - ours.mean) / ours.std
    features, references = ours.backbone(pixels), theirs.extract_feat(pixels)
    for mine, reference in zip(features, references, strict=True):
        assert largest_difference(mine, reference) <= TOLERANCE
    assert ours.auxiliary_head is not None
    assert largest_difference(ours(draw_image()).main, theirs.decode_head(references)) <= TOLERANCE
    assert largest_difference(ours.auxiliary_head(features), theirs.auxiliary_head(references)) <= TOLERANCE


@torch.no_grad()
def test_logits_of_a_picture_equal_theirs_from_blue_first_pixels_to_the_size_of_the_picture(pair):
    theirs, ours = pair
    prepared = theirs.data_preprocessor({"inputs": list(draw_image().flip(1))})["inputs"].double()
    reference = theirs.encode_decode(prepared, [{"img_shape": prepared.shape[2:]}])
    size = tuple(prepared.shape[2:])
    logits = nn.functional.interpolate(ours(draw_image()).main, size, mode="bilinear", align_corners=False)
    # they normalise in float32
    assert largest_difference(logits, reference) <= 1e-5
    assert float((logits - reference).abs().max()) <= 1e-4


def test_back_in_their_layout_every_tensor_is_theirs(pair):
    theirs, ours = pair
    given = theirs.state_dict()
    back = MMSEG.from_ours(ours.state_dict()).state
    assert back.keys() == given.keys()
    for key, value in given.items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize("dataset", ["cityscapes", "ade20k"])
@pytest.mark.parametrize("segmentor", SEGMENTORS)
def test_a_file_with_their_configuration_and_classes_leaves_nothing_to_assume(peers, segmentor, dataset):
    with torch.device("meta"):
        state = build_peer(peers, segmentor, dataset=dataset).state_dict()
    names = importlib.import_module("mmseg.utils").get_classes(dataset)
    meta = {
        "cfg": read_configuration(peers, segmentor, dataset=dataset).pretty_text,
        "dataset_meta": {"classes": names},
    }
    found, bare = recognise(state, meta=meta), recognise(state)
    assert found.assumptions == ()
    assert found.taxonomy is not None
    assert found.taxonomy.name == dataset
    assert found.architecture == bare.architecture
