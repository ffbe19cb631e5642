"""No network with no loss uses an operation without a deterministic CUDA kernel (F13, T32), and the audit can fail.

Operations are recorded on the meta device, which has no data, so that neither a GPU nor time is needed. The lists are
those of PyTorch's documentation of `torch.use_deterministic_algorithms`, version 2.14: what raises in deterministic
mode, and what is replaced by another kernel there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nestseg.core.errors import RunError
from nestseg.core.types import SegLogits
from nestseg.engine import determinism
from nestseg.engine.determinism import use_deterministic_kernels
from nestseg.losses.criterion import LOSSES, Criterion, LossTerm
from nestseg.models.heads import HEADS
from nestseg.models.resnest import BACKBONES, ResNeSt
from nestseg.models.segmenter import create_model

RAISES = {
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "max_unpool2d",
    "max_unpool3d",
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    # the documentation says NLLLoss; it is the one over pictures that raises, the one over rows has a fixed order
    "nll_loss2d_forward",
    "nll_loss2d_backward",
    "_ctc_loss_backward",
    "_embedding_bag_backward",
    "put",
    "put_",
    "histc",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
}
REPLACED = {
    "convolution",
    "convolution_backward",
    "replication_pad1d_backward",
    "replication_pad2d_backward",
    "replication_pad3d_backward",
    "index_put",
    "index_put_",
    "scatter_add",
    "scatter_add_",
    "index_add",
    "index_add_",
    "index_copy",
    "index_copy_",
    "max_pool3d_with_indices_backward",
    "embedding_dense_backward",
}
# Flagged or not by their arguments: the packet's name to a question about the call.
BY_ARGUMENTS: dict[str, Callable[[Any, tuple[Any, ...]], bool]] = {
    "cumsum": lambda _, args: args[0].is_floating_point(),
    "cumsum_": lambda _, args: args[0].is_floating_point(),
    "bincount": lambda _, args: len(args) > 1 and args[1] is not None,
    "median": lambda func, _: func._overloadname == "dim",
    "scatter": lambda func, _: func._overloadname == "src",
    "scatter_": lambda func, _: func._overloadname == "src",
    "scatter_reduce": lambda _, args: args[4] in ("sum", "mean", "prod"),
    "scatter_reduce_": lambda _, args: args[4] in ("sum", "mean", "prod"),
}
ALLOWED = {
    # cuDNN has deterministic algorithms for every convolution; they are what deterministic mode takes
    "convolution",
    "convolution_backward",
    # Lovasz puts sorted values back, to every place once
    "scatter_",
}


class Audit(TorchDispatchMode):
    """Notes flagged operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.flagged: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.seen.add(name)
        question = BY_ARGUMENTS.get(name)
        if name in RAISES | REPLACED or (question is not None and question(func, args)):
            self.flagged.add(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def deterministic_mode(monkeypatch):
    # a loss that is computed on the host in between gets zeros for what has no data
    monkeypatch.setattr(Tensor, "cpu", lambda self: torch.zeros(self.shape, dtype=self.dtype, device="cpu"))
    # in this mode torch upsamples by other operations than without
    with use_deterministic_kernels():
        yield


def audit(run: Callable[[], Tensor]) -> Audit:
    with Audit() as found:
        run().sum().backward()
    assert found.seen, "nothing was recorded"
    return found


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def all_losses(**options: Any) -> Criterion:
    # a loss that is new in the table is here without being named
    return Criterion(terms=tuple(LossTerm(name) for name in LOSSES), **options)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("segmentor", HEADS)
def test_every_segmentor_at_every_stride_with_all_losses_is_deterministic(segmentor, stride):
    with torch.device("meta"):
        model = create_model(
            segmentor, "resnest14", num_classes=5, output_stride=stride, head_channels=32, auxiliary_channels=32
        )
    # 5 and 9 cells at stride 8: none of the grids of pspnet divides them
    image, target = draw(3, 3, 33, 65, dtype=torch.uint8), draw(3, 33, 65, dtype=torch.uint8)
    criterion = all_losses(class_weights=torch.ones(5, device="meta"))
    found = audit(lambda: criterion(model(image), target).total)
    assert {"convolution_backward", "native_batch_norm_backward", "_unsafe_index_put"} <= found.seen
    assert found.flagged - ALLOWED == set()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_deterministic(name, align_corners):
    criterion = Criterion(terms=(LossTerm(name),), align_corners=align_corners)
    logits = SegLogits(draw(2, 5, 4, 8), draw(2, 5, 2, 4))
    found = audit(lambda: criterion(logits, draw(2, 33, 65, dtype=torch.uint8)).total)
    assert found.flagged - ALLOWED == set()


@pytest.mark.parametrize(
    ("name", "variant", "norm"),
    [
        *((name, "plain", "batch") for name in BACKBONES),
        ("resnest14", "official", "frozen_batch"),
        ("resnest50-fast-4s2x40d", "timm", "group"),
    ],
)
def test_every_backbone_and_variant_is_deterministic(name, variant, norm):
    with torch.device("meta"):
        model = ResNeSt(
            BACKBONES[name]._replace(blocks=(1, 1, 1, 2)), output_stride=8, dilation_variant=variant, norm=norm
        )
    found = audit(lambda: sum(feature.sum() for feature in model(draw(2, 3, 33, 65))))
    assert found.flagged - ALLOWED == set()


@pytest.mark.parametrize(
    ("segmentor", "options"),
    [
        ("fcn", {"concat_input": True}),
        ("deeplabv3", {"fusion": "projected"}),
        ("deeplabv3plus", {"fusion": "separable", "align_corners": True}),
        ("pspnet", {"pool_scales": (1, 2, 3, 6, 7), "align_corners": True}),
    ],
)
def test_options_of_heads_are_deterministic(segmentor, options):
    with torch.device("meta"):
        head = create_model(segmentor, "resnest14", num_classes=5, head_channels=32, **options).decode_head
    features = [
        draw(3, channels, *size) for channels, size in ((256, (9, 17)), (512, (5, 9)), (1024, (5, 9)), (2048, (5, 9)))
    ]
    assert audit(lambda: head(features)).flagged - ALLOWED == set()


@pytest.mark.parametrize(
    ("culprit", "run"),
    [
        ("_adaptive_avg_pool2d_backward", lambda: F.adaptive_avg_pool2d(draw(1, 2, 5, 5), 2)),
        ("nll_loss2d_forward", lambda: F.cross_entropy(draw(1, 2, 5, 5), draw(1, 5, 5, dtype=torch.int64))),
        ("cumsum", lambda: draw(5).cumsum(0)),
        ("index_put", lambda: draw(5).index_put((draw(3, dtype=torch.int64),), draw(3), accumulate=True)),
        ("scatter_add", lambda: draw(5).gather(0, draw(3, dtype=torch.int64))),
        ("index_add", lambda: draw(5).index_select(0, draw(3, dtype=torch.int64))),
        ("reflection_pad2d_backward", lambda: F.pad(draw(1, 2, 5, 5), (1, 1, 1, 1), mode="reflect")),
        ("grid_sampler_2d_backward", lambda: F.grid_sample(draw(1, 2, 5, 5), draw(1, 3, 3, 2), align_corners=False)),
        ("upsample_bilinear2d_backward", lambda: torch._C._nn.upsample_bilinear2d(draw(1, 2, 5, 5), [9, 9], False)),
    ],
)
def test_the_audit_catches_an_operation_without_a_deterministic_kernel(culprit, run):
    found = audit(run)
    assert culprit in found.flagged - ALLOWED, found.seen


def test_counting_in_integers_is_not_flagged():
    found = audit(lambda: draw(5) * draw(5, dtype=torch.int64).cumsum(0))
    assert "cumsum" in found.seen
    assert found.flagged == set()


def test_flagged_names_are_names_of_operations():
    unknown = [name for name in RAISES | REPLACED | set(BY_ARGUMENTS) if not hasattr(torch.ops.aten, name)]
    assert unknown == []


def test_settings_come_back_after_deterministic_kernels(monkeypatch):
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv(determinism.WORKSPACE)
    with use_deterministic_kernels():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ[determinism.WORKSPACE] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    # CUDA has started by now; a second run in this process finds what it read
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with use_deterministic_kernels():
        assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("workspace", [None, ":0:0"])
def test_a_workspace_of_cublas_that_cannot_be_right_is_refused(monkeypatch, workspace):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    if workspace is None:
        monkeypatch.delenv(determinism.WORKSPACE)
    else:
        monkeypatch.setenv(determinism.WORKSPACE, workspace)
    with (
        pytest.raises(RunError, match=r"E-RUN-070.*export CUBLAS_WORKSPACE_CONFIG=:4096:8"),
        use_deterministic_kernels(),
    ):
        raise AssertionError


def test_an_operation_without_a_deterministic_kernel_is_named():
    with pytest.raises(RunError, match=r"E-RUN-071 \| put_ has no deterministic kernel"), use_deterministic_kernels():
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), use_deterministic_kernels():
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_a_step_on_the_processor_takes_deterministic_kernels_only():
    torch.manual_seed(0)
    model = create_model("pspnet", "resnest14", num_classes=5, head_channels=16, auxiliary_channels=16)
    target = torch.randint(0, 5, (3, 33, 65), dtype=torch.uint8)
    nn.Module.train(model)
    all_losses()(model(torch.zeros(3, 3, 33, 65, dtype=torch.uint8)), target).total.backward()
