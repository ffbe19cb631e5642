"""Every key and shape of the S-101-D8 models of mmsegmentation and sssegmentation, as committed lists, is converted.

``manifests/`` was written from their own code; ``tests/peers`` compares it with that code, and the logits too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestseg.models.resnest import BACKBONES, ResNeSt
from nestseg.models.segmenter import create_model
from nestseg.weights.layout import Layout
from nestseg.weights.mmseg import MMSEG
from nestseg.weights.recognise import Recognised, recognise
from nestseg.weights.ssseg import SSSEG

MANIFESTS = Path(__file__).parent / "manifests"
SEGMENTORS = ("fcn", "pspnet", "deeplabv3", "deeplabv3plus")
BACKBONE_PREFIXES = {"mmseg": "backbone.", "ssseg": "backbone_net."}
Shapes = dict[str, tuple[int, ...]]

every_model = pytest.mark.parametrize(
    ("layout", "segmentor"),
    [pytest.param(layout, name, id=f"{layout.name}-{name}") for layout in (MMSEG, SSSEG) for name in SEGMENTORS],
)


def read_manifest(name: str, *, prefix: str = "") -> Shapes:
    rows = (line.split() for line in (MANIFESTS / f"{name}.txt").read_text(encoding="utf-8").splitlines())
    return {prefix + key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape in rows}


def read_model_manifest(layout: Layout, segmentor: str) -> Shapes:
    backbone = read_manifest("resnest101", prefix=BACKBONE_PREFIXES[layout.name])
    return backbone | read_manifest(f"{layout.name}_{segmentor}")


def make_state(shapes: Shapes) -> dict[str, Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def shapes_of(state: dict[str, Tensor]) -> Shapes:
    return {key: tuple(value.shape) for key, value in state.items()}


def build(found: Recognised) -> dict[str, Tensor]:
    assert found.architecture is not None
    with torch.device("meta"):
        return create_model(**dict(found.architecture)).state_dict()


@every_model
def test_every_key_and_shape_of_a_model_has_its_place_in_the_network_that_is_recognised(layout, segmentor):
    found = recognise(make_state(read_model_manifest(layout, segmentor)))
    assert found.layout is layout
    assert found.dropped == ()
    assert shapes_of(found.state) == shapes_of(build(found))


@every_model
def test_the_network_that_is_recognised_is_the_one_of_the_list(layout, segmentor):
    architecture = recognise(make_state(read_model_manifest(layout, segmentor))).architecture
    assert architecture is not None
    assert (architecture.segmentor, architecture.backbone) == (segmentor, "resnest101")
    assert (architecture.num_classes, architecture.output_stride) == (19, 8)
    assert (architecture.dilation_variant, architecture.align_corners) == ("plain", False)
    assert architecture.auxiliary_channels == {"mmseg": 256, "ssseg": 512}[layout.name]
    assert architecture.concat_input == (layout is MMSEG and segmentor == "fcn")


@every_model
def test_our_network_in_their_layout_has_every_key_and_shape_of_the_list_and_no_other(layout, segmentor):
    shapes = read_model_manifest(layout, segmentor)
    back = layout.from_ours(build(recognise(make_state(shapes))))
    assert back.left_out == ()
    assert shapes_of(back.state) == shapes


@pytest.mark.parametrize("layout", [MMSEG, SSSEG], ids=lambda layout: layout.name)
@pytest.mark.parametrize("segmentor", ["deeplabv3", "deeplabv3plus"])
def test_input_channels_of_the_fusion_are_rotated_where_the_image_pool_comes_first(layout, segmentor):
    state = make_state(read_model_manifest(layout, segmentor))
    key = {"mmseg": "decode_head.bottleneck.conv.weight", "ssseg": "aspp_net.bottleneck.0.weight"}[layout.name]
    channels = torch.arange(2560.0).view(1, -1, 1, 1).expand(state[key].shape)
    found = recognise(state | {key: channels}).state["decode_head.aspp.fuse.conv.weight"]
    start = 512 if layout is MMSEG else 0
    assert found[0, :, 0, 0].tolist() == [(start + index) % 2560 for index in range(2560)]
    assert torch.equal(layout.from_ours({"decode_head.aspp.fuse.conv.weight": found}).state[key], channels)


def test_the_backbone_without_prefix_is_a_file_that_mmsegmentation_starts_from():
    found = recognise(make_state(read_manifest("resnest101")))
    with torch.device("meta"):
        wanted = ResNeSt(BACKBONES["resnest101"]).state_dict()
    assert (found.layout, found.kind, found.backbone) == (MMSEG, "backbone", "resnest101")
    assert shapes_of(found.state) == shapes_of(wanted)
