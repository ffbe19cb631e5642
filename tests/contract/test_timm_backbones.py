"""Backbones of timm keep the contract of backbones, with every head; weights go in strictly; refusals help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

from nestseg.core.errors import ModelError, WeightsError
from nestseg.models.heads import HEADS
from nestseg.models.resnest import BACKBONES, ResNeSt, build_backbone
from nestseg.models.segmenter import Segmenter
from nestseg.models.timm_backbone import (
    TimmBackbone,
    convert_sync_batch_norm,
    get_timm_normalization,
    load_timm_state,
    load_timm_weights,
)

# BatchNorm apart from and together with its activation, LayerNorm with sizes rounded down, windows with channels last
SMALL = ("resnet18", "mobilenetv3_small_100", "convnext_atto")
SWIN = "swin_tiny_patch4_window7_224"
EVERY_HEAD = [(name, head) for name in SMALL for head in HEADS]
SOME_SWIN = [pytest.param(SWIN, head, marks=[] if head == "pspnet" else [pytest.mark.slow]) for head in HEADS]
MANY = [
    pytest.param("resnet18", True),
    pytest.param("convnext_atto", True),
    pytest.param("dla34", False),
    *(
        pytest.param(name, dilates, marks=pytest.mark.slow)
        for name, dilates in (
            ("mobilenetv3_small_100", True),
            ("convnext_tiny", True),
            ("regnety_002", True),
            ("efficientnet_b0", True),
            ("mobilenetv3_large_100", True),
            ("resnest50d", True),
            ("xception41", True),
            ("skresnet18", True),
            (SWIN, False),
            ("pvt_v2_b0", False),
            ("hrnet_w18_small", False),
            ("swinv2_tiny_window8_256", False),
            ("swinv2_cr_tiny_ns_224", False),
            ("mambaout_femto", False),
            ("densenet121", False),
            ("hieradet_small", False),
            ("edgenext_xx_small", False),
        )
    ),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build_model(name: str, segmentor: str = "fcn", **options) -> Segmenter:
    torch.manual_seed(0)
    backbone = build_backbone(f"timm:{name}", **{"output_stride": 32, **options})
    channels = {"num_classes": 5, "channels": 16}
    auxiliary_head = HEADS["fcn"](backbone.feature_channels, num_convs=1, feature_index=2, **channels)
    head = HEADS[segmentor](backbone.feature_channels, **channels)
    return Segmenter(backbone, head, auxiliary_head=auxiliary_head)


def draw_image(batch_size: int, height: int = 33, width: int = 65) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8, generator=draw)


def draw_pixels(height: int, width: int) -> Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def randomize(network: nn.Module) -> nn.Module:
    """Draw what timm starts at 0 or 1 too: norms, their statistics, layer scales."""
    draw = torch.Generator().manual_seed(2)
    for name, value in network.state_dict().items():
        if name.endswith("running_var") or (name.endswith("weight") and value.ndim == 1):
            value.uniform_(0.5, 1.5, generator=draw)
        elif value.ndim == 1:
            value.normal_(0, 0.3, generator=draw)
    return network.eval()


@pytest.mark.parametrize(("name", "dilates"), MANY)
def test_four_maps_of_rounded_up_sizes_at_every_stride_that_timm_offers(name, dilates):
    for stride in (8, 16, 32):
        if stride < 32 and not dilates:
            with pytest.raises(ModelError, match=rf"E-MODEL-034 .*output stride {stride} for {name}.*fix: .*=32"):
                build_backbone(f"timm:{name}", output_stride=stride)
            continue
        with torch.device("meta"):
            model = build_backbone(f"timm:{name}", output_stride=stride, in_channels=4)
            assert (model.output_stride, model.in_channels) == (stride, 4)
            for height, width in ((33, 65), (7, 1)):
                features = model.eval()(torch.empty(1, 4, height, width))
                for feature, channels, reached in zip(features, model.feature_channels, (4, 8, 16, 32), strict=True):
                    step = min(reached, stride)
                    assert feature.shape == (1, channels, -(-height // step), -(-width // step))


@pytest.mark.parametrize(("name", "segmentor"), [*EVERY_HEAD, *SOME_SWIN])
@torch.no_grad()
def test_every_head_takes_odd_sizes_and_a_batch_of_one_in_evaluation(name, segmentor):
    model = build_model(name, segmentor).eval()
    for height, width in ((33, 65), (7, 1)):
        logits = model(draw_image(1, height, width))
        step = 4 if segmentor == "deeplabv3plus" else 32
        assert logits.main.shape == (1, 5, -(-height // step), -(-width // step))
        assert logits.main.isfinite().all()


@pytest.mark.parametrize(("name", "segmentor"), [*EVERY_HEAD, *SOME_SWIN])
def test_every_parameter_gets_a_gradient(name, segmentor):
    model = build_model(name, segmentor)
    # timm starts residual branches at weight 0, behind which nothing has a gradient yet
    randomize(model).train()
    target = torch.randint(0, 5, (3, 65, 97))
    loss = sum(F.cross_entropy(F.interpolate(part, target.shape[1:]), target) for part in model(draw_image(3, 65, 97)))
    loss.backward()
    without = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []


@pytest.mark.parametrize("name", [*SMALL, SWIN])
@torch.no_grad()
def test_a_strict_save_and_load_gives_the_same_logits_also_from_the_meta_device(name, tmp_path):
    model = build_model(name)
    randomize(model)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with torch.device("meta"):
        other = build_model(name).eval()
    assert all(value.is_meta for value in other.state_dict().values())
    other.to_empty(device="cpu")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    image = draw_image(1)
    assert torch.equal(model(image).main, other(image).main)
    assert not torch.equal(model(image).main, build_model(name).eval()(image).main)


@torch.no_grad()
def test_one_export_serves_sizes_odd_and_even():
    model = build_model("resnet18").eval()
    sizes = {2: Dim("height", min=33, max=4096), 3: Dim("width", min=33, max=4096)}
    program = torch.export.export(model, (draw_image(1, 65, 97),), dynamic_shapes={"image": sizes}, strict=False)
    for size in ((33, 65), (64, 96), (130, 71)):
        image = draw_image(1, *size)
        torch.testing.assert_close(program.module()(image).main, model(image).main, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_one_export_of_a_network_that_pads_serves_multiples_of_32():
    model = build_model("convnext_atto").eval()
    sizes = {2: 32 * Dim("rows", min=2, max=128), 3: 32 * Dim("columns", min=2, max=128)}
    program = torch.export.export(model, (draw_image(1, 64, 96),), dynamic_shapes={"image": sizes}, strict=False)
    for size in ((64, 64), (64, 96), (160, 128)):
        image = draw_image(1, *size)
        torch.testing.assert_close(program.module()(image).main, model(image).main, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*SMALL, "pvt_v2_b0"])
@torch.no_grad()
def test_features_are_timms_own_at_multiples_of_32(name):
    model = build_backbone(f"timm:{name}", output_stride=32)
    randomize(model)
    theirs = timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1)).eval()
    theirs.load_state_dict(model.net.state_dict())
    image = draw_pixels(64, 96)
    for mine, reference in zip(model(image), theirs(image), strict=True):
        assert torch.equal(mine, reference)


@torch.no_grad()
def test_swin_is_timms_at_its_own_size_except_for_the_shift_of_the_last_stage():
    model = build_backbone(f"timm:{SWIN}", output_stride=32)
    randomize(model)
    theirs = timm.create_model(SWIN, features_only=True).eval()
    theirs.load_state_dict(model.net.state_dict())
    image = draw_pixels(224, 224)
    features, references = model(image), [feature.permute(0, 3, 1, 2) for feature in theirs(image)]
    for mine, reference in zip(features[:3], references[:3], strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
    assert [block.shift_size for block in model.net.layers_3.blocks] == [(0, 0), (3, 3)]
    assert not torch.allclose(features[3], references[3], rtol=1e-2)


@pytest.mark.parametrize("stride", [8, 16])
@torch.no_grad()
def test_timms_resnest_is_ours_in_timms_variant(stride):
    theirs = build_backbone("timm:resnest14d", output_stride=stride)
    randomize(theirs)
    ours = ResNeSt(BACKBONES["resnest14"], output_stride=stride, dilation_variant="timm").eval()
    ours.load_state_dict(theirs.net.state_dict())
    for mine, reference in zip(ours(draw_pixels(65, 97)), theirs(draw_pixels(65, 97)), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)
    names = {id(module): name for name, module in theirs.net.named_modules()}
    assert [names[id(module)] for module in theirs.one_pixel_norms()] == [f"layer{i}.0.conv2.bn1" for i in range(1, 5)]
    assert len(list(ours.one_pixel_norms())) == 4


def test_building_twice_gives_the_same_weights_whether_or_not_the_network_was_tried_before():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_backbone("timm:regnetx_002", output_stride=32).state_dict())
    assert all(torch.equal(first, second) for first, second in zip(*(s.values() for s in states), strict=True))


def take_train_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    main, auxiliary = model.train()(draw_image(3))
    (main.square().mean() + main.mean() + auxiliary.square().mean() + auxiliary.mean()).backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100"])
def test_frozen_norms_do_not_change_in_a_train_step_and_the_rest_does(name):
    model = build_model(name, norm="frozen_batch")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert list(before) == list(build_model(name).state_dict())
    take_train_step(model)
    norms = {
        f"{prefix}.{key}"
        for prefix, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and prefix.startswith("backbone.")
        for key in module.state_dict()
    }
    assert len(norms) > 50
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (key in norms), key
    # they keep their activations: frozen is what the same norms do in evaluation
    free = build_backbone(f"timm:{name}", output_stride=32).eval()
    free.load_state_dict(model.backbone.state_dict())
    with torch.no_grad():
        for mine, reference in zip(model.backbone(draw_pixels(33, 65)), free(draw_pixels(33, 65)), strict=True):
            torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("frozen_stages", [0, 4])
def test_a_frozen_backbone_does_not_change_in_a_train_step_and_the_heads_do(frozen_stages):
    model = build_model("mobilenetv3_small_100", frozen_stages=frozen_stages)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    take_train_step(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) == (frozen_stages == 4 and key.startswith("backbone.")), key


@torch.no_grad()
def test_synchronised_norms_keep_the_activations_of_timm():
    for name in ("mobilenetv3_small_100", "resnet18"):
        model = build_model(name)
        randomize(model)
        expected = model(draw_image(2)).main
        convert_sync_batch_norm(model)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        torch.testing.assert_close(model.eval()(draw_image(2)).main, expected)
    ours = Segmenter(ResNeSt(BACKBONES["resnest14"]), HEADS["fcn"]((256, 512, 1024, 2048), num_classes=5, channels=16))
    convert_sync_batch_norm(ours)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in ours.modules())


# --- weights


def make_classifier(name: str, **options) -> nn.Module:
    torch.manual_seed(5)
    return randomize(timm.create_model(name, **options))


@torch.no_grad()
def assert_same_maps(backbone: TimmBackbone, whole: nn.Module) -> None:
    image = draw_pixels(64, 96)
    references = whole.forward_intermediates(image, intermediates_only=True)[-4:]
    for mine, reference in zip(backbone.eval()(image), references, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-5)


# under dots and underscores; under the same names with a last convolution too many; as the child of a wrapper
@pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in ("efficientnet_b0", "hieradet_small"))]
)
def test_a_classifiers_weights_give_the_classifiers_maps(name):
    # weights for other classes than ours come along too
    whole = make_classifier(name, num_classes=7)
    backbone = build_backbone(f"timm:{name}", output_stride=32)
    loaded = load_timm_state(backbone, whole.state_dict(), path=Path("model.pth"))
    assert loaded.source == "model.pth"
    assert_same_maps(backbone, whole)
    classifier = whole.pretrained_cfg["classifier"]
    assert {f"{classifier}.weight", f"{classifier}.bias"} <= set(loaded.left_out) or name == "hieradet_small"
    kept = {key.replace("_", ".").removeprefix("model.") for key in backbone.net.state_dict()}
    assert not kept & {key.replace("_", ".") for key in loaded.left_out}


def test_old_files_without_batch_counters_load():
    whole = make_classifier("resnet18")
    state = {key: value for key, value in whole.state_dict().items() if not key.endswith("num_batches_tracked")}
    backbone = build_backbone("timm:resnet18", output_stride=32)
    load_timm_state(backbone, state, path=Path("model.pth"))
    assert_same_maps(backbone, whole)


def test_layouts_that_timm_converts_load():
    whole = make_classifier("convnext_atto")
    authors = {}
    for key, value in whole.state_dict().items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        key = key.replace("head.norm.", "norm.").replace("head.fc.", "head.")
        authors[key] = value.reshape(value.shape[:2]) if "pwconv" in key and value.ndim == 4 else value
    assert not set(authors) & set(whole.state_dict())
    backbone = build_backbone("timm:convnext_atto", output_stride=32)
    loaded = load_timm_state(backbone, authors, path=Path("model.pth"))
    assert len(loaded.left_out) == 4
    assert_same_maps(backbone, whole)


@pytest.mark.parametrize("fault", ["another network", "one tensor less", "one tensor more", "another shape", "nothing"])
def test_weights_that_do_not_fit_are_refused_and_change_nothing(fault):
    backbone = build_backbone("timm:resnet18", output_stride=32)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = make_classifier("resnet34" if fault == "another network" else "resnet18").state_dict()
    if fault == "one tensor less":
        del state["layer1.0.bn1.weight"]
    elif fault == "one tensor more":
        state["layer1.0.bn4.weight"] = torch.zeros(64)
    elif fault == "another shape":
        state["conv1.weight"] = torch.zeros(64, 4, 7, 7)
    elif fault == "nothing":
        state = {}
    with pytest.raises(WeightsError, match=r"E-WEIGHTS-010 \| model.pth .*timm's resnet18 for 3 image channels"):
        load_timm_state(backbone, state, path=Path("model.pth"))
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def put_into_cache(folder: Path, tag: str, state: dict[str, Tensor]) -> None:
    repository = folder / f"models--timm--{tag}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file({key: value.contiguous() for key, value in state.items()}, snapshot / "model.safetensors")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("spec", ["timm:mobilenetv3_small_100", "timm:mobilenetv3_small_100.lamb_in1k"])
def test_published_weights_come_from_timms_cache(spec, tmp_path):
    whole = make_classifier("mobilenetv3_small_100")
    put_into_cache(tmp_path, "mobilenetv3_small_100.lamb_in1k", whole.state_dict())
    backbone = build_backbone("timm:mobilenetv3_small_100", output_stride=16)
    torch.manual_seed(6)
    generator = torch.get_rng_state()
    loaded = load_timm_weights(backbone, spec, cache_dir=tmp_path)
    assert torch.equal(torch.get_rng_state(), generator)
    assert (loaded.source, loaded.licence) == ("timm:mobilenetv3_small_100.lamb_in1k", "apache-2.0")
    assert set(loaded.left_out) == {"classifier.weight", "classifier.bias", "conv_head.weight", "conv_head.bias"}
    other = build_backbone("timm:mobilenetv3_small_100", output_stride=32)
    other.load_state_dict(backbone.state_dict())
    assert_same_maps(other, whole)


@pytest.mark.usefixtures("offline")
def test_a_fourth_image_channel_starts_from_the_three_of_the_file(tmp_path):
    whole = make_classifier("resnet18")
    put_into_cache(tmp_path, "resnet18.a1_in1k", whole.state_dict())
    backbone = build_backbone("timm:resnet18", output_stride=32, in_channels=4)
    load_timm_weights(backbone, "timm:resnet18", cache_dir=tmp_path)
    weight = backbone.net.conv1.weight
    torch.testing.assert_close(weight[:, :3], whole.conv1.weight * 3 / 4)
    torch.testing.assert_close(weight[:, 3], whole.conv1.weight[:, 0] * 3 / 4)


@pytest.mark.usefixtures("offline")
def test_weights_that_cannot_be_had_are_named(tmp_path):
    backbone = build_backbone("timm:resnet18", output_stride=32)
    for spec, message in (
        (
            "timm:resnet18.a1_in1k",
            r"E-MODEL-039 .*resnet18\.a1_in1k.*fix: .*https://huggingface.co/timm/resnet18.a1_in1k",
        ),
        ("timm:resnet18.a1_in2k", r"E-MODEL-038 .*did you mean a1_in1k"),
        ("timm:resnet34", r"E-MODEL-038 .*'timm:resnet34' for the backbone timm:resnet18"),
        ("timm:resnest50d_4s2x40d.nothing", r"E-MODEL-038 .*in1k.*fix: backbone.pretrained=timm:resnest50d_4s2x40d$"),
        ("timm:efficientnet_b6", r"E-MODEL-038 .*publishes no weights.*fix: .*pretrained=none"),
        ("timm:resnet19", r"E-MODEL-031 .*did you mean"),
    ):
        with pytest.raises(ModelError, match=message):
            load_timm_weights(backbone, spec, cache_dir=tmp_path)


def test_normalisation_is_that_of_the_weights_on_the_scale_of_pixels():
    assert get_timm_normalization("timm:resnet18").mean == (123.675, 116.28, 103.53)
    assert get_timm_normalization("timm:resnet18").std == (58.395, 57.12, 57.375)
    assert get_timm_normalization("timm:tf_efficientnet_b0.aa_in1k").mean == (123.675, 116.28, 103.53)
    assert get_timm_normalization("timm:tf_efficientnet_b0.ap_in1k") == ((127.5,) * 3, (127.5,) * 3)


# --- refusals


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("convnext_tinny", {}, r"E-MODEL-031 .*did you mean convnext_tiny"),
        ("zzz", {}, r"E-MODEL-031 .*no network 'zzz' \| fix: timm\.list_models"),
        (
            "resnet18.a1_in1k",
            {},
            r"E-MODEL-031 .*backbone.name=timm:resnet18 backbone.pretrained=timm:resnet18.a1_in1k",
        ),
        ("vit_tiny_patch16_224", {}, r"E-MODEL-032 .*strides 16, 16, 16, 16"),
        ("levit_128s", {}, r"E-MODEL-032 .*feature index"),
        ("levit_128s", {"output_stride": 16}, r"E-MODEL-032 .*feature index"),
        ("coatnet_nano_rw_224", {}, r"E-MODEL-033 .*images of some sizes only"),
        ("resnet18", {"dilation_variant": "official"}, r"E-MODEL-035 .*'official'.*fix: .*plain"),
        ("resnet18", {"norm": "group"}, r"E-MODEL-036 .*'group' for timm:resnet18, which has 20 BatchNorms"),
        ("convnext_atto", {"norm": "frozen_batch"}, r"E-MODEL-036 .*which has no BatchNorm"),
        ("resnet18", {"frozen_stages": 2}, r"E-MODEL-037 .*2 frozen stages; allowed for timm's networks 0 and 4"),
        ("resnet18", {"frozen_stages": 5}, r"E-MODEL-004"),
        ("resnet18", {"output_stride": 4}, r"E-MODEL-002"),
        ("resnet18", {"in_channels": 0}, r"E-MODEL-005"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_fix(name, options, message):
    with pytest.raises(ModelError, match=message):
        build_backbone(f"timm:{name}", **{"output_stride": 32, **options})


def test_unknown_backbones_are_met_with_the_nearest():
    with pytest.raises(ModelError, match=r"E-MODEL-017 .*did you mean resnest50.*timm:NAME"):
        build_backbone("resnet50")


def test_models_work_without_timm_and_its_backbones_say_how_to_install_it():
    script = (
        "import sys\n"
        "sys.modules['timm'] = None\n"
        "from nestseg.models.resnest import build_backbone\n"
        "build_backbone('resnest14')\n"
        "build_backbone('timm:resnet18')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert 'fix: pip install "nestseg[timm]"' in result.stderr
    assert "E-MODEL-030" in result.stderr
