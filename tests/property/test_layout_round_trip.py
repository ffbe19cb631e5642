"""Whatever network we build: into another project's names and back is the identity, or an error that says why."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestseg.core.errors import WeightsError
from nestseg.models.heads import HEADS
from nestseg.models.segmenter import create_model
from nestseg.weights.recognise import LAYOUTS, recognise


@st.composite
def networks(draw):
    segmentor = draw(st.sampled_from(list(HEADS)))
    options = {}
    if segmentor == "fcn":
        options = {"num_convs": draw(st.integers(1, 3)), "concat_input": draw(st.booleans())}
    if segmentor.startswith("deeplab"):
        options = {"fusion": draw(st.sampled_from(["full", "separable", "projected"]))}
    if segmentor == "deeplabv3plus":
        options["shortcut_channels"] = draw(st.integers(1, 9))
    auxiliary = draw(st.booleans())
    return {
        "segmentor": segmentor,
        "backbone": draw(st.sampled_from(["resnest14", "resnest26"])),
        "num_classes": draw(st.integers(1, 40)),
        "head_channels": draw(st.integers(1, 9)),
        "auxiliary": auxiliary,
        "auxiliary_channels": draw(st.integers(1, 9)) if auxiliary else None,
        **options,
    }


def fill(shapes):
    """Tensors that all differ; those of the backbone hold one number each and take no memory."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.rand(shape, generator=generator)
        if not name.startswith("backbone.")
        else torch.full((), float(index)).expand(shape)
        for index, (name, shape) in enumerate(shapes.items())
    }


def has_place(layout, network):
    """Whether a project has the network at all, by what its code can build."""
    plain = network.get("fusion", "full") == "full"
    if layout == "mmseg":
        return plain
    if layout == "ssseg":
        return plain and network.get("num_convs", 2) < 3 and not network.get("concat_input")
    if layout == "encoding":
        fcn = network.get("num_convs", 1) == 1 and not network.get("concat_input")
        return fcn and network.get("fusion", "projected") == "projected" and network["segmentor"] != "deeplabv3plus"
    return True


@pytest.mark.parametrize("layout", ["nestseg", "mmseg", "ssseg", "encoding"])
@settings(deadline=None, max_examples=12)
@given(network=networks())
def test_there_and_back_is_the_identity_or_an_error(layout, network):
    with torch.device("meta"):
        model = create_model(**network)
    ours = fill({name: value.shape for name, value in model.state_dict().items()})
    if not has_place(layout, network):
        with pytest.raises(WeightsError, match="E-WEIGHTS-021"):
            LAYOUTS[layout].from_ours(ours)
        return
    theirs = LAYOUTS[layout].from_ours(ours)
    assert theirs.left_out == ()
    found = recognise(theirs.state)
    assert found.layout.name == layout
    # what weights show is read right; what they do not show comes from the layout
    silent = {"dilation_variant", "align_corners"}
    assert found.architecture.model_dump(exclude=silent) == model.architecture.model_dump(exclude=silent)
    assert list(found.state) == list(ours)
    assert all(torch.equal(found.state[name], value) for name, value in ours.items())


@pytest.mark.parametrize("layout", ["official", "timm", "mmseg"])
@settings(deadline=None, max_examples=5)
@given(network=networks())
def test_backbones_go_there_and_back(layout, network):
    with torch.device("meta"):
        backbone = create_model(**network).backbone
    shapes = {f"backbone.{name}": value.shape for name, value in backbone.state_dict().items()}
    ours = {name.removeprefix("backbone."): value for name, value in fill(shapes).items()}
    found = recognise(LAYOUTS[layout].from_ours(ours).state, layout=layout)
    assert (found.kind, found.backbone, found.dropped) == ("backbone", network["backbone"], ())
    assert list(found.state) == list(ours)
    assert all(torch.equal(found.state[name], value) for name, value in ours.items())
