"""Checkpoints of other projects: recognised by keys and shapes, renamed, and meaning what they meant."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nestseg.core.errors import WeightsError
from nestseg.data.datasets import DATASETS
from nestseg.models.heads import HEADS
from nestseg.models.resnest import BACKBONES, ResNeSt
from nestseg.models.segmenter import create_model
from nestseg.weights.mmseg_config import read_config
from nestseg.weights.recognise import LAYOUTS, generic_taxonomy, recognise

K, WIDTH, AUX, SHORT = 5, 8, 4, 6


# Foreign names and shapes, written out here and not derived from the tables under test.


def conv(name, *shape, bias=False):
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if bias else {})


def norm(name, channels):
    leaves = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{leaf}": (channels,) for leaf in leaves} | {f"{name}.num_batches_tracked": ()}


def unit(conv_name, norm_name, *shape):
    return conv(conv_name, *shape) | norm(norm_name, shape[0])


def resnest14(prefix, stem):
    """The keys of resnest14; stem gives the names of its three convolutions and norms."""
    (c1, n1), (c2, n2), (c3, n3) = stem
    shapes = unit(prefix + c1, prefix + n1, 32, 3, 3, 3) | unit(prefix + c2, prefix + n2, 32, 32, 3, 3)
    shapes |= unit(prefix + c3, prefix + n3, 64, 32, 3, 3)
    for stage, (width, inner) in enumerate([(64, 64), (128, 256), (256, 512), (512, 1024)], start=1):
        block = f"{prefix}layer{stage}.0"
        shapes |= unit(f"{block}.conv1", f"{block}.bn1", width, inner, 1, 1)
        shapes |= unit(f"{block}.conv2.conv", f"{block}.conv2.bn0", 2 * width, width // 2, 3, 3)
        shapes |= conv(f"{block}.conv2.fc1", width // 2, width, 1, 1, bias=True) | norm(
            f"{block}.conv2.bn1", width // 2
        )
        shapes |= conv(f"{block}.conv2.fc2", 2 * width, width // 2, 1, 1, bias=True)
        shapes |= unit(f"{block}.conv3", f"{block}.bn3", 4 * width, width, 1, 1)
        shapes |= unit(f"{block}.downsample.1", f"{block}.downsample.2", 4 * width, inner, 1, 1)
    return shapes


AUTHORS_STEM = [("conv1.0", "conv1.1"), ("conv1.3", "conv1.4"), ("conv1.6", "bn1")]
MMSEG_STEM = [("stem.0", "stem.1"), ("stem.3", "stem.4"), ("stem.6", "stem.7")]


def mmseg_separable(name, channels, width):
    shapes = unit(f"{name}.depthwise_conv.conv", f"{name}.depthwise_conv.bn", channels, 1, 3, 3)
    return shapes | unit(f"{name}.pointwise_conv.conv", f"{name}.pointwise_conv.bn", width, channels, 1, 1)


def mmseg_unit(name, *shape):
    return unit(f"{name}.conv", f"{name}.bn", *shape)


def mmseg_shapes(segmentor, auxiliary):
    head = "decode_head."
    shapes = resnest14("backbone.", MMSEG_STEM) | conv(head + "conv_seg", K, WIDTH, 1, 1, bias=True)
    if segmentor == "fcn":
        shapes |= mmseg_unit(head + "convs.0", WIDTH, 2048, 3, 3) | mmseg_unit(head + "convs.1", WIDTH, WIDTH, 3, 3)
        shapes |= mmseg_unit(head + "conv_cat", WIDTH, 2048 + WIDTH, 3, 3)
    elif segmentor == "pspnet":
        for i in range(4):
            shapes |= mmseg_unit(f"{head}psp_modules.{i}.1", WIDTH, 2048, 1, 1)
        shapes |= mmseg_unit(head + "bottleneck", WIDTH, 2048 + 4 * WIDTH, 3, 3)
    else:
        shapes |= mmseg_unit(head + "image_pool.1", WIDTH, 2048, 1, 1)
        shapes |= mmseg_unit(head + "aspp_modules.0", WIDTH, 2048, 1, 1)
        shapes |= mmseg_unit(head + "bottleneck", WIDTH, 5 * WIDTH, 3, 3)
        for i in (1, 2, 3):
            name = f"{head}aspp_modules.{i}"
            plus = segmentor == "deeplabv3plus"
            shapes |= mmseg_separable(name, 2048, WIDTH) if plus else mmseg_unit(name, WIDTH, 2048, 3, 3)
    if segmentor == "deeplabv3plus":
        shapes |= mmseg_unit(head + "c1_bottleneck", SHORT, 256, 1, 1)
        shapes |= mmseg_separable(head + "sep_bottleneck.0", WIDTH + SHORT, WIDTH)
        shapes |= mmseg_separable(head + "sep_bottleneck.1", WIDTH, WIDTH)
    if auxiliary:
        shapes |= mmseg_unit("auxiliary_head.convs.0", AUX, 1024, 3, 3)
        shapes |= conv("auxiliary_head.conv_seg", K, AUX, 1, 1, bias=True)
    return shapes


def ssseg_separable(name, channels, width):
    shapes = unit(f"{name}.depthwise_conv", f"{name}.depthwise_bn", channels, 1, 3, 3)
    return shapes | unit(f"{name}.pointwise_conv", f"{name}.pointwise_bn", width, channels, 1, 1)


def ssseg_shapes(segmentor, auxiliary):
    shapes = resnest14("backbone_net.", MMSEG_STEM)
    if segmentor == "fcn":
        shapes |= unit("decoder.0", "decoder.1", WIDTH, 2048, 3, 3) | unit("decoder.3", "decoder.4", WIDTH, WIDTH, 3, 3)
        shapes |= conv("decoder.7", K, WIDTH, 1, 1, bias=True)
    elif segmentor == "pspnet":
        for i in range(4):
            shapes |= unit(f"ppm_net.branches.{i}.1", f"ppm_net.branches.{i}.2", WIDTH, 2048, 1, 1)
        shapes |= unit("ppm_net.bottleneck.0", "ppm_net.bottleneck.1", WIDTH, 2048 + 4 * WIDTH, 3, 3)
        shapes |= conv("decoder.1", K, WIDTH, 1, 1, bias=True)
    else:
        branch = "aspp_net.parallel_branches."
        shapes |= unit(branch + "0.0", branch + "0.1", WIDTH, 2048, 1, 1)
        shapes |= unit("aspp_net.global_branch.1", "aspp_net.global_branch.2", WIDTH, 2048, 1, 1)
        shapes |= unit("aspp_net.bottleneck.0", "aspp_net.bottleneck.1", WIDTH, 5 * WIDTH, 3, 3)
        for i in (1, 2, 3):
            plain = unit(f"{branch}{i}.0", f"{branch}{i}.1", WIDTH, 2048, 3, 3)
            shapes |= plain if segmentor == "deeplabv3" else ssseg_separable(f"{branch}{i}", 2048, WIDTH)
        if segmentor == "deeplabv3":
            shapes |= conv("decoder.1", K, WIDTH, 1, 1, bias=True)
        else:
            shapes |= unit("shortcut.0", "shortcut.1", SHORT, 256, 1, 1)
            shapes |= ssseg_separable("decoder.0", WIDTH + SHORT, WIDTH) | ssseg_separable("decoder.1", WIDTH, WIDTH)
            shapes |= conv("decoder.3", K, WIDTH, 1, 1, bias=True)
    if auxiliary:
        shapes |= unit("auxiliary_decoder.0", "auxiliary_decoder.1", AUX, 1024, 3, 3)
        shapes |= conv("auxiliary_decoder.4", K, AUX, 1, 1, bias=True)
    return shapes


def encoding_shapes(segmentor, auxiliary):
    shapes = resnest14("pretrained.", AUTHORS_STEM)
    if segmentor == "fcn":
        shapes |= unit("head.conv5.0", "head.conv5.1", WIDTH, 2048, 3, 3)
        shapes |= conv("head.conv5.4", K, WIDTH, 1, 1, bias=True)
    elif segmentor == "pspnet":
        for i in (1, 2, 3, 4):
            shapes |= unit(f"head.conv5.0.conv{i}.0", f"head.conv5.0.conv{i}.1", WIDTH, 2048, 1, 1)
        shapes |= unit("head.conv5.1", "head.conv5.2", WIDTH, 2048 + 4 * WIDTH, 3, 3)
        shapes |= conv("head.conv5.5", K, WIDTH, 1, 1, bias=True)
    else:
        shapes |= unit("head.aspp.b0.0", "head.aspp.b0.1", WIDTH, 2048, 1, 1)
        for i in (1, 2, 3):
            shapes |= unit(f"head.aspp.b{i}.0", f"head.aspp.b{i}.1", WIDTH, 2048, 3, 3)
        shapes |= unit("head.aspp.b4.gap.1", "head.aspp.b4.gap.2", WIDTH, 2048, 1, 1)
        shapes |= unit("head.aspp.project.0", "head.aspp.project.1", WIDTH, 5 * WIDTH, 1, 1)
        shapes |= unit("head.block.0", "head.block.1", WIDTH, WIDTH, 3, 3)
        shapes |= conv("head.block.4", K, WIDTH, 1, 1, bias=True)
    if auxiliary:
        shapes |= unit("auxlayer.conv5.0", "auxlayer.conv5.1", AUX, 1024, 3, 3)
        shapes |= conv("auxlayer.conv5.4", K, AUX, 1, 1, bias=True)
    return shapes


def nestseg_shapes(segmentor, auxiliary):
    with torch.device("meta"):
        model = create_model(
            segmentor,
            "resnest14",
            num_classes=K,
            head_channels=WIDTH,
            auxiliary=auxiliary,
            auxiliary_channels=AUX if auxiliary else None,
            shortcut_channels=SHORT if segmentor == "deeplabv3plus" else None,
        )
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


SHAPES = {"nestseg": nestseg_shapes, "mmseg": mmseg_shapes, "ssseg": ssseg_shapes, "encoding": encoding_shapes}
WHOLE = [(name, head) for name in SHAPES for head in HEADS if (name, head) != ("encoding", "deeplabv3plus")]


def fill(shapes, *, dtype=torch.float32):
    """Tensors of these shapes that all differ, small where they are weights; one number each in the backbone."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (name, shape) in enumerate(shapes.items()):
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(index)
        elif "layer" in name and not name.startswith("auxlayer"):
            state[name] = torch.full((), float(index), dtype=dtype).expand(shape)
        else:
            values = torch.rand(shape, generator=generator, dtype=dtype)
            state[name] = (values - 0.5) * (3 / math.prod(shape[1:])) ** 0.5 if len(shape) == 4 else values
    return state


def on_meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize(("layout", "segmentor"), WHOLE)
def test_whole_models_are_recognised_load_strictly_and_go_back_unchanged(layout, segmentor, auxiliary):
    theirs = fill(SHAPES[layout](segmentor, auxiliary))
    found = recognise({f"module.{name}": value for name, value in theirs.items()})
    assert (found.layout.name, found.kind, found.backbone, found.dropped) == (layout, "segmentation", "resnest14", ())
    assert found.taxonomy == generic_taxonomy(K)
    wide = found.architecture
    assert (wide.segmentor, wide.backbone, wide.num_classes, wide.output_stride) == (segmentor, "resnest14", K, 8)
    assert (wide.head_channels, wide.auxiliary) == (WIDTH, auxiliary)
    assert wide.auxiliary_channels == (AUX if auxiliary else None)
    assert wide.concat_input is (layout == "mmseg" and segmentor == "fcn")
    assert wide.num_convs == ((1 if layout == "encoding" else 2) if segmentor == "fcn" else None)
    assert wide.pool_scales == ((1, 2, 3, 6) if segmentor == "pspnet" else None)
    aspp = segmentor.startswith("deeplab")
    assert wide.fusion == (("projected" if layout == "encoding" else "full") if aspp else None)
    assert wide.atrous_rates == ((12, 24, 36) if aspp else None)
    assert wide.shortcut_channels == (SHORT if segmentor == "deeplabv3plus" else None)
    assert (wide.dilation_variant, wide.align_corners) == (
        ("official", True) if layout == "encoding" else ("plain", False)
    )
    assert found.layout.logits_resizes == (2 if layout == "mmseg" else 1)
    with torch.device("meta"):
        model = create_model(**dict(wide))
    model.load_state_dict(found.state, strict=True, assign=True)
    assert model.architecture == wide  # W6: nothing was guessed that the network then fills in otherwise
    back = found.layout.from_ours(found.state)
    assert back.left_out == ()
    assert list(back.state) == list(theirs)
    assert all(torch.equal(back.state[name], value) for name, value in theirs.items())


# Modules of one shape, which a strict load cannot tell apart; {i} runs over all that there are.
TWINS = [
    ("mmseg", "fcn", "backbone.stem.1", "backbone.conv1.1", ""),
    ("mmseg", "fcn", "backbone.stem.4", "backbone.conv1.4", ""),
    ("mmseg", "pspnet", "decode_head.psp_modules.{i}.1.conv", "decode_head.branches.{i}.conv", "0123"),
    ("mmseg", "pspnet", "decode_head.psp_modules.{i}.1.bn", "decode_head.branches.{i}.norm", "0123"),
    ("mmseg", "pspnet", "decode_head.bottleneck.bn", "decode_head.fuse.norm", ""),
    ("mmseg", "deeplabv3", "decode_head.aspp_modules.{i}.conv", "decode_head.aspp.branches.{i}.conv", "0123"),
    ("mmseg", "deeplabv3", "decode_head.aspp_modules.{i}.bn", "decode_head.aspp.branches.{i}.norm", "0123"),
    ("mmseg", "deeplabv3", "decode_head.image_pool.1.conv", "decode_head.aspp.image_pool.conv", ""),
    ("mmseg", "deeplabv3", "decode_head.image_pool.1.bn", "decode_head.aspp.image_pool.norm", ""),
    ("ssseg", "fcn", "backbone_net.stem.1", "backbone.conv1.1", ""),
    ("ssseg", "fcn", "decoder.1", "decode_head.convs.0.norm", ""),
    ("ssseg", "fcn", "decoder.4", "decode_head.convs.1.norm", ""),
    ("ssseg", "pspnet", "ppm_net.branches.{i}.1", "decode_head.branches.{i}.conv", "0123"),
    ("ssseg", "pspnet", "ppm_net.branches.{i}.2", "decode_head.branches.{i}.norm", "0123"),
    ("ssseg", "pspnet", "ppm_net.bottleneck.1", "decode_head.fuse.norm", ""),
    ("ssseg", "deeplabv3", "aspp_net.parallel_branches.{i}.0", "decode_head.aspp.branches.{i}.conv", "0123"),
    ("ssseg", "deeplabv3", "aspp_net.parallel_branches.{i}.1", "decode_head.aspp.branches.{i}.norm", "0123"),
    ("ssseg", "deeplabv3", "aspp_net.global_branch.1", "decode_head.aspp.image_pool.conv", ""),
    ("ssseg", "deeplabv3", "aspp_net.bottleneck.0", "decode_head.aspp.fuse.conv", ""),
    (
        "ssseg",
        "deeplabv3plus",
        "aspp_net.parallel_branches.{i}.pointwise_bn",
        "decode_head.aspp.branches.{i}.pointwise.norm",
        "123",
    ),
    ("ssseg", "deeplabv3plus", "decoder.1.depthwise_bn", "decode_head.refine.1.depthwise.norm", ""),
    ("ssseg", "deeplabv3plus", "decoder.1.pointwise_bn", "decode_head.refine.1.pointwise.norm", ""),
    ("encoding", "fcn", "pretrained.conv1.4", "backbone.conv1.4", ""),
    ("encoding", "pspnet", "head.conv5.0.conv1.0", "decode_head.branches.0.conv", ""),
    ("encoding", "pspnet", "head.conv5.0.conv2.0", "decode_head.branches.1.conv", ""),
    ("encoding", "pspnet", "head.conv5.0.conv3.1", "decode_head.branches.2.norm", ""),
    ("encoding", "pspnet", "head.conv5.0.conv4.1", "decode_head.branches.3.norm", ""),
    ("encoding", "deeplabv3", "head.aspp.b{i}.0", "decode_head.aspp.branches.{i}.conv", "0123"),
    ("encoding", "deeplabv3", "head.aspp.b4.gap.1", "decode_head.aspp.image_pool.conv", ""),
    ("encoding", "deeplabv3", "head.aspp.project.0", "decode_head.aspp.fuse.0.conv", ""),
    ("encoding", "deeplabv3", "head.aspp.project.1", "decode_head.aspp.fuse.0.norm", ""),
    ("encoding", "deeplabv3", "head.block.1", "decode_head.aspp.fuse.2.norm", ""),
]


@pytest.mark.parametrize(("layout", "segmentor", "theirs", "ours", "numbers"), TWINS)
def test_modules_of_one_shape_are_not_confused(layout, segmentor, theirs, ours, numbers):
    state = on_meta(SHAPES[layout](segmentor, True))
    found = recognise(state).state
    for i in numbers or " ":
        assert found[f"{ours}.weight".format(i=i)] is state[f"{theirs}.weight".format(i=i)]


@pytest.mark.parametrize("layout", ["official", "timm", "mmseg"])
def test_backbone_files_are_recognised_and_lose_only_their_classifier(layout):
    shapes = resnest14("", MMSEG_STEM if layout == "mmseg" else AUTHORS_STEM)
    theirs = fill(shapes)
    classifier = {"fc.weight": torch.zeros(10, 2048), "fc.bias": torch.zeros(10)}
    found = recognise(theirs | classifier, layout="timm" if layout == "timm" else "auto")
    assert (found.layout.name, found.kind, found.backbone) == (layout, "backbone", "resnest14")
    assert (found.architecture, found.taxonomy, found.dropped) == (None, None, ("fc.weight", "fc.bias"))
    assert ["timm" in line for line in found.assumptions] == ([True] if layout == "official" else [])
    backbone = ResNeSt(BACKBONES["resnest14"], dilation_variant=found.layout.dilation_variant)
    backbone.load_state_dict(found.state, strict=True)
    back = found.layout.from_ours(found.state).state
    assert list(back) == list(theirs)
    assert all(torch.equal(back[name], value) for name, value in theirs.items())


def test_layouts_say_how_their_networks_dilate():
    variants = {name: layout.dilation_variant for name, layout in LAYOUTS.items()}
    assert variants == {
        "nestseg": "plain",
        "official": "official",
        "timm": "timm",
        "mmseg": "plain",
        "ssseg": "plain",
        "encoding": "official",
    }
    assert [name for name, layout in LAYOUTS.items() if layout.is_backbone_only] == ["official", "timm"]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_is_recognised_by_its_shapes(name):
    with torch.device("meta"):
        state = ResNeSt(BACKBONES[name]).state_dict()
    for layout in ("official", "timm", "mmseg"):
        theirs = LAYOUTS[layout].from_ours(state).state
        found = recognise(theirs, layout=layout)
        twins = ["resnest50", "resnest50-fast-2s1x64d"]
        assert found.backbone == ("resnest50" if name in twins else name)
        assert any("same shapes" in line for line in found.assumptions) is (name in twins)
        assert list(found.state) == list(state)
        assert recognise(theirs, layout=layout, backbone=name).backbone == name
        assert recognise(theirs, layout=layout, backbone=name).assumptions == ()


def test_backbone_that_does_not_fit_is_refused():
    state = on_meta(resnest14("", AUTHORS_STEM))
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-023.*are resnest14, not resnest50 .*fix: name resnest14"):
        recognise(state, backbone="resnest50")
    deeper = state | {name.replace("layer3.0", "layer3.1"): value for name, value in state.items() if "layer3" in name}
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-023.*blocks \(1, 1, 2, 1\).*no ResNeSt that nestseg has"):
        recognise(deeper)


def test_one_convolution_of_sssegmentation_is_not_taken_for_two():
    shapes = resnest14("backbone_net.", MMSEG_STEM) | unit("decoder.0", "decoder.1", WIDTH, 2048, 3, 3)
    theirs = on_meta(shapes | conv("decoder.4", K, WIDTH, 1, 1, bias=True))
    found = recognise(theirs)
    assert (found.architecture.segmentor, found.architecture.num_convs) == ("fcn", 1)
    assert list(found.layout.from_ours(found.state).state) == list(theirs)


def run_unit(x, state, conv_name, norm_name, **options):
    x = F.conv2d(x, state[f"{conv_name}.weight"], **options)
    mean, var, weight, bias = (
        state[f"{norm_name}.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return F.relu(F.batch_norm(x, mean, var, weight, bias, eps=1e-5))


def mmseg_branches(x, state, segmentor):
    """mmsegmentation's ASPP up to the concatenation: the image pool first."""
    head = "decode_head."
    pooled = F.adaptive_avg_pool2d(x, 1)
    pooled = run_unit(pooled, state, head + "image_pool.1.conv", head + "image_pool.1.bn")
    maps = [F.interpolate(pooled, size=x.shape[2:], mode="bilinear", align_corners=False)]
    maps.append(run_unit(x, state, head + "aspp_modules.0.conv", head + "aspp_modules.0.bn"))
    for i, rate in ((1, 12), (2, 24), (3, 36)):
        name, atrous = f"{head}aspp_modules.{i}.", {"padding": rate, "dilation": rate}
        if segmentor == "deeplabv3":
            maps.append(run_unit(x, state, name + "conv", name + "bn", **atrous))
        else:
            deep = run_unit(x, state, name + "depthwise_conv.conv", name + "depthwise_conv.bn", groups=2048, **atrous)
            maps.append(run_unit(deep, state, name + "pointwise_conv.conv", name + "pointwise_conv.bn"))
    return maps


@pytest.mark.parametrize("segmentor", ["deeplabv3", "deeplabv3plus"])
def test_aspp_of_mmsegmentation_computes_the_same_with_its_channels_rotated(segmentor):
    torch.set_num_threads(1)
    state = fill(mmseg_shapes(segmentor, False), dtype=torch.float64)
    found = recognise(state)
    with torch.device("meta"):
        model = create_model(**dict(found.architecture)).eval()
    model.load_state_dict(found.state, assign=True)
    x = torch.rand((1, 2048, 5, 7), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    maps = mmseg_branches(x, state, segmentor)
    names = ("decode_head.bottleneck.conv", "decode_head.bottleneck.bn")
    expected = run_unit(torch.cat(maps, 1), state, *names, padding=1)
    given = model.decode_head.aspp(x)
    assert torch.allclose(given, expected, rtol=0, atol=1e-12)
    other_order = run_unit(torch.cat([*maps[1:], maps[0]], 1), state, *names, padding=1)
    assert (given - other_order).abs().max() > 1e-3  # the order matters: the test above can fail


def test_official_takes_the_backbone_of_a_whole_model_and_says_what_it_leaves():
    state = on_meta(nestseg_shapes("pspnet", True))
    out = LAYOUTS["official"].from_ours(state)
    assert set(out.state) == set(resnest14("", AUTHORS_STEM))
    assert set(out.left_out) == {name for name in state if not name.startswith("backbone.")}


def test_layout_without_a_place_for_a_part_names_it():
    state = on_meta(nestseg_shapes("deeplabv3", True))
    with pytest.raises(WeightsError, match=r"(?s)E-WEIGHTS-021.*encoding has no place for 6.*aspp.fuse.conv.weight"):
        LAYOUTS["encoding"].from_ours(state)


def test_unknown_keys_are_counted_and_the_first_ten_listed():
    state = on_meta(mmseg_shapes("fcn", True))
    extra = {f"decode_head.enc.{i}.weight": torch.zeros(1) for i in range(12)}
    with pytest.raises(WeightsError) as raised:
        recognise(state | extra)
    message = str(raised.value)
    assert f"E-WEIGHTS-020 | 12 of {len(state) + 12} keys are not of layout mmseg" in message
    assert [line.strip() for line in message.splitlines()[1:12]] == [*list(extra)[:10], "and 2 more"]
    assert "fix: only fcn, pspnet" in message
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-020 .*layout ssseg"):
        recognise(state, layout="ssseg")


def test_unknown_layouts_strides_and_doubled_keys_are_refused():
    state = on_meta(resnest14("", AUTHORS_STEM))
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-022.*did you mean mmseg.*fix: choose"):
        recognise(state, layout="mmsegs")
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-027 .*output stride 4; allowed 8, 16, 32"):
        recognise(state, output_stride=4)
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-026.*both bn1.bias and module.bn1.bias"):
        recognise(state | {"module.bn1.bias": torch.zeros(64)})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"decode_head.conv_seg.weight": None}, "classifier.weight .* is missing"),
        ({"decode_head.conv_seg.weight": (5,)}, r"classifier.weight .* is of shape \(5,\)"),
        ({"backbone.stem.0.weight": (0, 3, 3, 3)}, r"conv1.0.weight .* of shape \(0, 3, 3, 3\)"),
        ({"backbone.stem.0.weight": (32, 4, 3, 3)}, "4 image channels"),
        ({"auxiliary_head.conv_seg.weight": None}, "auxiliary_head.classifier.weight .* is missing"),
        ({"decode_head.c1_bottleneck.conv.weight": None}, "shortcut.conv.weight .* is missing"),
        ({"decode_head.aspp_modules.4.conv.weight": (1,)}, "4 atrous branches for atrous rates"),
    ],
)
def test_tensors_that_are_missing_or_strange_are_named(change, reason):
    state = on_meta(mmseg_shapes("deeplabv3plus", True))
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state |= on_meta({name: shape})
    with pytest.raises(WeightsError, match=f"E-WEIGHTS-024 .*{reason}"):
        recognise(state)


def test_nothing_at_all_is_refused():
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-024.*is missing"):
        recognise({})


# What weights do not show


D16 = """
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    pretrained='open-mmlab://resnest101',
    backbone=dict(
        type='ResNeSt', depth=101, num_stages=4, out_indices=(0, 1, 2, 3),
        dilations=(1, 1, 1, 2), strides=(1, 2, 2, 1), norm_cfg=norm_cfg, norm_eval=False,
        style='pytorch', contract_dilation=True, stem_channels=128, radix=2, avg_down_stride=True),
    decode_head=dict(
        type='DepthwiseSeparableASPPHead', in_channels=2048, in_index=3, channels=512, dilations=(1, 6, 12, 18),
        c1_in_channels=256, c1_channels=48, dropout_ratio=0.2, num_classes=19, pool_scales=(1, 2, 3, 4),
        norm_cfg=dict(type='SyncBN', requires_grad=True), align_corners=True,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(type='FCNHead', in_channels=1024, channels=256),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
img_norm_cfg = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)
log_level = 'INFO'
"""


@pytest.mark.parametrize("entry", ["config", "cfg"])
@pytest.mark.parametrize("segmentor", HEADS)
def test_configuration_of_mmsegmentation_gives_what_weights_do_not_show(segmentor, entry):
    found = recognise(on_meta(mmseg_shapes(segmentor, True)), meta={entry: D16, "epoch": 3})
    wide = found.architecture
    assert (wide.output_stride, wide.align_corners, wide.dropout) == (16, True, 0.2)
    assert (wide.mean, wide.std) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert wide.atrous_rates == ((6, 12, 18) if segmentor.startswith("deeplab") else None)
    assert wide.pool_scales == ((1, 2, 3, 4) if segmentor == "pspnet" else None)
    assert found.assumptions == ("5 classes without names",)
    create_model(**dict(wide) | {"backbone": "resnest14"})


def test_newer_configuration_names_its_pixels_elsewhere():
    pixels = "dict(mean=[7, 8, 9], std=[1, 1, 1], bgr_to_rgb=True)"
    text = D16.replace("img_norm_cfg", "other").replace("model = dict(", f"model = dict(data_preprocessor={pixels},")
    assert read_config(text).mean == (7, 8, 9)
    top = D16.replace("img_norm_cfg", "data_preprocessor").replace("to_rgb", "bgr_to_rgb")
    assert read_config(top).std == (4, 5, 6)
    assert read_config(D16.replace("img_norm_cfg", "other")).mean is None


def test_stride_that_is_asked_for_wins_over_the_configuration_and_takes_its_own_rates():
    state = on_meta(mmseg_shapes("deeplabv3", False))
    found = recognise(state, meta={"config": D16}, output_stride=8)
    assert (found.architecture.output_stride, found.architecture.atrous_rates) == (8, (12, 24, 36))
    assert any("output stride 8 as asked" in line and "says 16" in line for line in found.assumptions)
    assert recognise(state, output_stride=16).architecture.atrous_rates == (6, 12, 18)


def test_without_a_configuration_every_default_is_said():
    found = recognise(on_meta(mmseg_shapes("pspnet", False)))
    said = " ".join(found.assumptions)
    for word in ("output stride 8", "atrous rates", "align_corners=False", "dropout", "mean", "pool scales", "classes"):
        assert word in said


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("contract_dilation=True", "contract_dilation=False", "contract_dilation=False"),
        (", contract_dilation=True", "", "contract_dilation=False"),
        ("avg_down_stride=True", "avg_down_stride=False", "avg_down_stride"),
        ("dilations=(1, 1, 1, 2)", "dilations=(1, 1, 1, 1)", r"strides \(1, 2, 2, 1\) with dilations"),
        ("radix=2", "radix=2, multi_grid=(1, 2, 4)", "multi_grid"),
        ("in_index=3", "in_index=3, dilation=6", "dilation=6 in the head"),
        ("to_rgb=True", "to_rgb=False", "BGR"),
        ("requires_grad=True", "requires_grad=True, eps=1e-3", "eps"),
    ],
)
def test_network_that_cannot_be_built_is_refused(old, new, reason):
    assert old in D16
    with pytest.raises(WeightsError, match=f"E-WEIGHTS-025 .*{reason}.*fix: "):
        read_config(D16.replace(old, new))


def test_configuration_is_never_run(tmp_path, monkeypatch):
    # W1 and W11 for the text beside the tensors
    monkeypatch.chdir(tmp_path)
    attack = "__import__('os').system('touch owned')"
    lines = [
        f"model = {attack}",
        attack,
        f"model = dict(backbone=dict(strides={attack}), decode_head=dict())",
        f"model = dict(**{attack})",
        "model = dict(backbone=dict(a=open('owned', 'w')), decode_head=dict())",
        "def dict(**k): open('owned', 'w')\nmodel = dict(backbone=dict())",
        "model = [open('owned', 'w') for _ in 'a']",
        "model = f\"{open('owned', 'w')}\"",
        "model = (lambda: open('owned', 'w'))()",
        "class model:\n    open('owned', 'w')",
    ]
    state = on_meta(mmseg_shapes("fcn", True))
    for text in lines:
        found = recognise(state, meta={"config": text})
        assert found.architecture.output_stride == 8
        assert any("was not used" in line for line in found.assumptions), text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model = ",
        "model = 3",
        "model = unknown",
        "model = {[]: 1}",
        "model = dict(backbone=[], decode_head={})",
        "model = dict(backbone=dict(strides=5), decode_head=dict())",
        "model\0",
        "-" * 100_000 + "1",
        "(" * 999,
    ],
)
def test_configuration_that_makes_no_sense_is_said_not_to_be_used(text):
    found = recognise(on_meta(mmseg_shapes("fcn", True)), meta={"config": text})
    assert any("was not used" in line for line in found.assumptions)


def test_entry_that_refers_to_itself_many_times_stays_small():
    text = "x0 = [1, 1]\n" + "".join(f"x{i + 1} = [x{i}, x{i}]\n" for i in range(200))
    assert read_config(text + D16.replace("radix=2", "radix=2, plugins=x200")).output_stride == 16


# Classes


def test_classes_that_the_file_names_are_taken_and_those_of_a_data_set_recognised():
    state = on_meta(mmseg_shapes("fcn", True))
    names, colours = ("a", "b", "c", "d", "e "), [[i, i, i] for i in range(K)]
    expected = ("custom", ("a", "b", "c", "d", "e"), tuple((i, i, i) for i in range(K)))
    for meta in (
        {"CLASSES": names, "PALETTE": colours},
        {"dataset_meta": {"classes": list(names), "palette": colours}},
        {"dataset_meta": {"CLASSES": names, "PALETTE": colours}},
    ):
        found = recognise(state, meta=meta)
        assert (found.taxonomy.name, found.taxonomy.classes, found.taxonomy.palette) == expected
        assert not any("classes" in line for line in found.assumptions)
    for palette in (None, colours[:2], [[1, 2]] * K, [[0, 0, 300]] * K):
        taxonomy = recognise(state, meta={"CLASSES": names, "PALETTE": palette}).taxonomy
        assert len(set(taxonomy.palette)) == K


@pytest.mark.parametrize("dataset", DATASETS)
def test_names_of_a_data_set_in_its_order_are_that_data_set_however_they_are_spelt(dataset):
    taxonomy = DATASETS[dataset].taxonomy
    names = [name.upper().replace(" ", "_") + " " for name in taxonomy.classes]
    state = on_meta(mmseg_shapes("fcn", False))
    state["decode_head.conv_seg.weight"] = torch.empty((len(names), WIDTH, 1, 1), device="meta")
    assert recognise(state, meta={"CLASSES": names}).taxonomy is taxonomy
    moved = [*names[1:], names[0]]
    assert recognise(state, meta={"CLASSES": moved}).taxonomy.name == "custom"
    guessed = recognise(state)
    if dataset == "toystreets":
        assert guessed.taxonomy.name == "custom"
    else:
        assert guessed.taxonomy is taxonomy
        assert f"{len(names)} classes: those of {dataset} assumed" in guessed.assumptions


@pytest.mark.parametrize("names", [["a"], ["a"] * K, ["a", "b", "c", "d", "e", "f"], 7, [None]])
def test_names_that_do_not_fit_are_not_used_and_it_is_said(names):
    found = recognise(on_meta(mmseg_shapes("fcn", True)), meta={"CLASSES": names})
    assert found.taxonomy == generic_taxonomy(K)
    assert "5 classes without names" in found.assumptions
    assert any("names were not used" in line for line in found.assumptions) is (names != 7)


@pytest.mark.parametrize("count", [1, 2, 19, 150, 255])
def test_generic_colours_differ(count):
    assert len(set(generic_taxonomy(count).palette)) == count


def test_group_norm_and_separable_fusion_of_our_own_files_are_seen():
    with torch.device("meta"):
        model = create_model(
            "deeplabv3plus", "resnest14", num_classes=K, head_channels=32, head_norm="group", fusion="separable"
        )
    found = recognise(model.state_dict())
    assert found.architecture == model.architecture
    assert list(found.state) == list(model.state_dict())


def test_batch_counters_may_be_missing_and_other_keys_stay():
    shapes = resnest14("", AUTHORS_STEM)
    old = on_meta({name: shape for name, shape in shapes.items() if not name.endswith("num_batches_tracked")})
    assert list(recognise(old).state) == list(old)
