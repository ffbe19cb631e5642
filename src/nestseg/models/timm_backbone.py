"""Any backbone of timm that gives four feature maps, and timm's pretrained weights for it.

timm is an extra, ``pip install "nestseg[timm]"``, and is imported only when one of its networks is asked for.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Self, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestseg.core.errors import ModelError, nearest
from nestseg.core.types import Norm, OutputStride
from nestseg.models.backbone import Backbone
from nestseg.store.files import load_strictly

TIMM_PREFIX = "timm:"
"""What the names of timm's backbones start with, as in ``timm:convnext_tiny``."""

_LAST_FOUR = (-4, -3, -2, -1)
_STRIDES = (4, 8, 16, 32)
# What makes a network take images of any size. Only Swin needs it: its windows are cut as its authors cut them for
# segmentation, shifted in the last stage too, where timm would not at the size of the classifier.
_SIZE_OPTIONS: tuple[dict[str, Any], ...] = ({}, {"strict_img_size": False, "always_partition": True})
# Sizes that are tried without data: the first are multiples of the stride, the others are not.
_WHOLE_SIZES = ((192, 256), (32, 64))
_ODD_SIZES = ((33, 65), (35, 46), (7, 1))
# Exactly these: what is derived from them has a way of its own to run what it holds.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# timm says no by whatever goes wrong in it
_REFUSALS = (AssertionError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)


class _Plan(NamedTuple):
    """What is to know about a network before it is built.

    Args:
        feature_channels: Channels of C2..C5.
        options: Further arguments for timm.
        pads: Whether images are padded to multiples of 32, without which features are smaller than they should be.
        one_pixel_norms: Names of the BatchNorms that see features of one pixel.
    """

    feature_channels: tuple[int, int, int, int]
    options: dict[str, Any]
    pads: bool
    one_pixel_norms: tuple[str, ...]


class TimmNormalization(NamedTuple):
    """How images were normalised when weights of timm were trained, RGB, range 0-255.

    Args:
        mean: Subtracted from each channel.
        std: What each channel was divided by afterwards.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


class TimmWeights(NamedTuple):
    """What was loaded from timm.

    Args:
        source: Name with its tag, such as ``timm:resnet18.a1_in1k``.
        licence: Licence of the weights as timm states it; None where it does not.
        left_out: Names of the tensors that have no place in a backbone: the classifier, and what else follows C5.
    """

    source: str
    licence: str | None
    left_out: tuple[str, ...]


@final
class TimmBackbone(Backbone):
    """The last four feature maps of a timm network.

    Nearly every network with strides 4, 8, 16, 32 works: ResNet, RegNet, EfficientNet, MobileNet, ConvNeXt, Swin, PVT,
    many more. Not supported: those with one stride (plain ViT), with fewer than four maps (LeViT), and those that are
    built for one image size (CoAtNet, MaxViT, Hiera, GC ViT, EfficientFormer).

    Args:
        name: timm's name of the network, without `TIMM_PREFIX` and without a tag of weights.
        output_stride: Stride of C5. 8 and 16 exist where timm can dilate the network.
        norm: ``batch`` leaves the norms that timm gives the network, whichever they are; ``frozen_batch`` stops each
            BatchNorm from changing; ``group`` is not available.
        frozen_stages: 0 freezes nothing, 4 everything: no gradients, and evaluation mode after ``.train()``.
        in_channels: Channels of the image.

    Attributes:
        name: As given.
        frozen_stages: As given.

    Shape:
        - input: (N, in_channels, H, W) float, normalised; any H and W
        - returns: C2..C5, (N, C, ceil(H / s), ceil(W / s)) float, s = 4, 8, 16, 32 but at most output_stride

    Raises:
        ModelError: If timm is not installed or does not know the name, or the network cannot be used like this.

    Reference:
        Wightman, "PyTorch Image Models", 2019, and the paper of each network.

    Deviations:
        Images for networks that round sizes down or refuse some (ConvNeXt, Swin, PVT, HRNet) are padded with zeros on
        the right and below to multiples of 32, and the features cropped; at such multiples, the only sizes that one
        `torch.export` of them can serve, features are timm's own. Swin shifts the windows of every stage, as for
        segmentation; its maps have no norm of their own. Stochastic depth stays at timm's default for each network.
    """

    def __init__(
        self,
        name: str,
        *,
        output_stride: OutputStride = 32,
        norm: Norm = "batch",
        frozen_stages: int = 0,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        _check_name(name)
        if frozen_stages not in (0, 4):
            raise ModelError(
                "E-MODEL-037",
                f"{frozen_stages} frozen stages; allowed for timm's networks 0 and 4",
                fix="0 freezes nothing, 4 the whole backbone",
            )
        plan = _plan_network(name, output_stride, in_channels)
        self.name, self.frozen_stages, self.in_channels = name, frozen_stages, in_channels
        self.output_stride: OutputStride = output_stride
        self.feature_channels: tuple[int, int, int, int] = plan.feature_channels
        self._pads, self._one_pixel_norms = plan.pads, plan.one_pixel_norms
        self.net = _create_network(name, output_stride, in_channels, plan.options)
        self._is_channels_last = _is_channels_last(self.net)
        norms = [module for module in self.net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        if norm not in ("batch", "frozen_batch") or (norm == "frozen_batch" and not norms):
            raise ModelError(
                "E-MODEL-036",
                f"norm {norm!r} for timm:{name}, which has {f'{len(norms)} BatchNorms' if norms else 'no BatchNorm'}",
                fix="backbone.norm=batch leaves timm's norms as they are"
                + ("; frozen_batch stops them from changing" if norms else ""),
            )
        self._has_frozen_norms = norm == "frozen_batch"
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def _frozen_parts(self) -> list[nn.Module]:
        if self.frozen_stages == 4:
            return [self.net]
        if not self._has_frozen_norms:
            return []
        return [module for module in self.net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except for frozen parts.

        Args:
            mode: True for training, False for evaluation.

        Returns:
            The module itself.
        """
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every move between devices and dtypes comes through here. Swin's tables of positions are in no state dict:
        # compute them again, or `to_empty` would leave garbage in them.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module in self.net.modules():
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()  # type: ignore[operator]
        return self

    def one_pixel_norms(self) -> Iterator[nn.Module]:
        """Find BatchNorms in split attention and its like; see `Backbone.one_pixel_norms`."""
        return (self.net.get_submodule(name) for name in self._one_pixel_norms)

    def blocks(self) -> Iterator[nn.Module]:
        """Find the parts that stages are made of, or whole stages where they keep them to themselves."""
        for child in self.net.children():
            yield from _find_blocks(child)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the network, keep its last four maps; see `Backbone.forward`."""
        height, width = x.shape[2:]
        if self._pads:
            x = F.pad(x, (0, -width % _STRIDES[-1], 0, -height % _STRIDES[-1]))
        features = self.net(x)
        if self._is_channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        if self._pads:
            steps = [min(stride, self.output_stride) for stride in _STRIDES]
            features = [
                feature[:, :, : (height + step - 1) // step, : (width + step - 1) // step]
                for feature, step in zip(features, steps, strict=True)
            ]
        c2, c3, c4, c5 = features
        return c2, c3, c4, c5


def _find_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Find what is to be computed as one in a module of timm.

    Containers are looked into, and so is a module that holds a container of composed modules: a stage. Any other
    composed module is a block; a lone layer is not worth it.
    """
    lists = [module] if type(module) in _CONTAINERS else [x for x in module.children() if type(x) in _CONTAINERS]
    inner = [block for part in lists for child in part.children() for block in _find_blocks(child)]
    if inner or lists == [module]:
        yield from inner
    elif next(module.children(), None) is not None:
        yield module


def load_timm_weights(backbone: TimmBackbone, spec: str, *, cache_dir: Path | None = None) -> TimmWeights:
    """Load weights that timm publishes, through timm: from its cache, or else from the Hugging Face Hub.

    For other than 3 image channels timm adapts the first convolution.

    Args:
        backbone: Changed in place.
        spec: ``timm:NAME`` for timm's default weights of the network, or ``timm:NAME.TAG``.
        cache_dir: Folder of downloaded files; None is timm's own.

    Returns:
        What was loaded.

    Raises:
        ModelError: If timm publishes no such weights for this network, or they cannot be fetched.
        WeightsError: If they do not fit, which would be a fault of timm's or ours.
    """
    timm = _import_timm()
    published = _find_published(spec)
    if published.architecture != backbone.name:
        raise ModelError(
            "E-MODEL-038",
            f"weights {spec!r} for the backbone timm:{backbone.name}",
            fix=f"backbone.pretrained=timm:{backbone.name}, or another backbone.name",
        )
    name = f"{backbone.name}.{published.tag}"
    try:
        # the random weights that are about to be replaced must not move torch's generator
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            whole = timm.create_model(
                name, pretrained=True, in_chans=backbone.in_channels, cache_dir=cache_dir, **_get_size_options(backbone)
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(
            "E-MODEL-039",
            f"timm cannot give the weights {name}: {_shorten(error)}",
            fix="check the network and the disk, or fetch model.safetensors of "
            f"https://huggingface.co/{published.hf_hub_id} elsewhere and pass its path",
        ) from error
    source = TIMM_PREFIX + name
    left_out = _load_fitting(backbone, whole.state_dict(), whole=whole, path=Path(source))
    return TimmWeights(source, published.license, left_out)


def load_timm_state(backbone: TimmBackbone, state: Mapping[str, Tensor], *, path: Path) -> TimmWeights:
    """Load the state dict of timm's classifier of this network, or one that timm converts to it.

    Args:
        backbone: Changed in place.
        state: Tensors by name.
        path: The file that they are from, for messages.

    Returns:
        What was loaded; the licence is None.

    Raises:
        WeightsError: If a name or shape is not that of this network; the message counts them and names the first ten.
    """
    timm = _import_timm()
    with torch.device("meta"):
        whole = timm.create_model(backbone.name, in_chans=backbone.in_channels, **_get_size_options(backbone))
    # where a network's checkpoints come in several layouts, the module that defines it has a function of this name
    convert = vars(sys.modules[timm.models.model_entrypoint(backbone.name).__module__]).get("checkpoint_filter_fn")
    given = dict(state)
    if convert is not None:
        try:
            given = dict(convert(dict(state), whole))
        except _REFUSALS:
            # weights of something else; the strict load below says what they have and lack
            given = dict(state)
    return TimmWeights(str(path), None, _load_fitting(backbone, given, whole=whole, path=path))


def get_timm_normalization(spec: str) -> TimmNormalization:
    """Look up how images were normalised for weights of timm.

    Args:
        spec: ``timm:NAME`` or ``timm:NAME.TAG``.

    Returns:
        Mean and standard deviation.

    Raises:
        ModelError: If timm publishes no such weights.
    """
    published = _find_published(spec)
    return TimmNormalization(
        tuple(round(255 * value, 6) for value in published.mean),
        tuple(round(255 * value, 6) for value in published.std),
    )


def convert_sync_batch_norm(model: nn.Module) -> None:
    """Make every BatchNorm one that counts the images of all devices.

    torch's own conversion would drop the activations that timm keeps inside its norms.

    Args:
        model: Changed in place.
    """
    if any(isinstance(module, TimmBackbone) for module in model.modules()):
        importlib.import_module("timm.layers").convert_sync_batchnorm(model)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]


def _import_timm() -> ModuleType:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ModelError(
            "E-MODEL-030",
            f"backbones named {TIMM_PREFIX}... need timm, which cannot be imported: {_shorten(error)}",
            fix='pip install "nestseg[timm]"',
        ) from error


def _check_name(name: str) -> None:
    names = _import_timm().list_models()
    if name in names:
        return
    network, _, tag = name.partition(".")
    if tag and network in names:
        raise ModelError(
            "E-MODEL-031",
            f"{TIMM_PREFIX}{name} names weights, not only a network",
            fix=f"backbone.name={TIMM_PREFIX}{network} backbone.pretrained={TIMM_PREFIX}{name}",
        )
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    raise ModelError(
        "E-MODEL-031",
        f"timm has no network {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""),
        fix="timm.list_models() gives all names",
    )


def _create_network(name: str, output_stride: OutputStride, in_channels: int, options: Mapping[str, Any]) -> nn.Module:
    # many networks do not know the argument, but all have the stride 32
    stride = {} if output_stride == 32 else {"output_stride": output_stride}
    network: nn.Module = _import_timm().create_model(
        name, features_only=True, out_indices=_LAST_FOUR, in_chans=in_channels, **stride, **options
    )
    return network


@lru_cache
def _plan_network(name: str, output_stride: OutputStride, in_channels: int) -> _Plan:
    """Try a network without data, on the meta device."""
    wanted = [min(stride, output_stride) for stride in _STRIDES]
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            network = _create_network(name, output_stride, in_channels, _SIZE_OPTIONS[0])
        except _REFUSALS as error:
            if output_stride != 32:
                _plan_network(name, 32, in_channels)  # says so if the stride is not the only obstacle
                raise _no_stride(name, output_stride, _shorten(error)) from error
            raise _no_four_maps(name, _shorten(error)) from error
        info: Any = network.feature_info
        if info.reduction() != wanted:
            if info.reduction() == list(_STRIDES):
                raise _no_stride(name, output_stride, "it is ignored")
            raise _no_four_maps(name, f"its last maps have the strides {', '.join(map(str, info.reduction()))}")
        c2, c3, c4, c5 = info.channels()
        for options in _SIZE_OPTIONS:
            try:
                network = _create_network(name, output_stride, in_channels, options).eval()
            except _REFUSALS:
                continue
            norms = _watch_one_pixel_norms(network)
            if _gives_maps(network, _WHOLE_SIZES[:1], in_channels, wanted):
                one_pixel_norms = tuple(sorted(norms))
                pads = not _gives_maps(network, _ODD_SIZES, in_channels, wanted)
                if not pads or _gives_maps(network, _WHOLE_SIZES, in_channels, wanted):
                    return _Plan((c2, c3, c4, c5), options, pads, one_pixel_norms)
    raise ModelError(
        "E-MODEL-033",
        f"{TIMM_PREFIX}{name} takes images of some sizes only",
        fix="a network without a fixed image size, such as timm:convnext_tiny or timm:swin_tiny_patch4_window7_224",
    )


def _watch_one_pixel_norms(network: nn.Module) -> set[str]:
    """Return a set that BatchNorms add their names to when they see features of one pixel."""
    found: set[str] = set()
    for name, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):

            def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                if inputs[0].ndim > 2 and inputs[0].shape[2:].numel() == 1:
                    found.add(name)

            module.register_forward_pre_hook(note)
    return found


def _gives_maps(network: nn.Module, sizes: Sequence[tuple[int, int]], in_channels: int, strides: Sequence[int]) -> bool:
    """Return whether the maps of images of these sizes are as large as the contract of `Backbone` says."""
    for height, width in sizes:
        try:
            features = network(torch.empty(1, in_channels, height, width))
        except _REFUSALS:
            return False
        start = 1 if _is_channels_last(network) else 2
        if [tuple(feature.shape[start : start + 2]) for feature in features] != [
            (-(-height // stride), -(-width // stride)) for stride in strides
        ]:
            return False
    return True


def _is_channels_last(network: nn.Module) -> bool:
    # timm's own feature networks of EfficientNet and HRNet do not say; they are all channels first
    return getattr(network, "output_fmt", "NCHW") == "NHWC"


def _no_stride(name: str, output_stride: int, why: str) -> ModelError:
    return ModelError(
        "E-MODEL-034",
        f"timm does not offer output stride {output_stride} for {name}: {why}",
        fix="output_stride=32, or a network that can be dilated, such as timm:convnext_tiny",
    )


def _no_four_maps(name: str, why: str) -> ModelError:
    return ModelError(
        "E-MODEL-032",
        f"{TIMM_PREFIX}{name} does not give four maps of strides {', '.join(map(str, _STRIDES))}: {why}",
        fix="a network with four stages, such as timm:convnext_tiny",
    )


def _find_published(spec: str) -> Any:
    """Return timm's own record of published weights."""
    timm = _import_timm()
    name, _, tag = spec.removeprefix(TIMM_PREFIX).partition(".")
    _check_name(name)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if not tags or (tag and tag not in tags):
        raise ModelError(
            "E-MODEL-038",
            f"timm publishes no weights {spec!r}" + (f"; {nearest(tag, tags)}" if tags else ""),
            fix=f"backbone.pretrained={TIMM_PREFIX}{name}"
            if tags
            else "the path of a file, or backbone.pretrained=none",
        )
    return timm.models.get_pretrained_cfg(f"{name}.{tag}" if tag else name)


def _get_size_options(backbone: TimmBackbone) -> dict[str, Any]:
    return _plan_network(backbone.name, backbone.output_stride, backbone.in_channels).options


def _load_fitting(
    backbone: TimmBackbone, state: Mapping[str, Tensor], *, whole: nn.Module, path: Path
) -> tuple[str, ...]:
    """Load what a backbone has of a classifier's state dict; return the names that only the classifier has."""
    wanted = backbone.net.state_dict()
    names = {_flatten(name, backbone.net): name for name in wanted}
    assert len(names) == len(wanted), "two names differ only in dots and underscores"
    rest = {name for name in whole.state_dict() if _flatten(name) not in names}
    given = {names.get(_flatten(name), name): value for name, value in state.items() if name not in rest}
    # files older than torch 0.4.1 have no batch counters; they count steps, decide nothing here, and start at zero
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked"):
            given.setdefault(name, torch.zeros_like(value))
    load_strictly(
        backbone.net,
        given,
        path=path,
        fix=f"check that these are weights of timm's {backbone.name} for {backbone.in_channels} image channels",
    )
    return tuple(name for name in state if name in rest)


def _flatten(name: str, wrapper: nn.Module | None = None) -> str:
    """Write a tensor's name so that the classifier's and the feature network's are equal.

    timm's feature networks either hold the classifier as their only child, or hold its children, those of sequences
    among them under names such as ``stages_0`` for ``stages.0``.
    """
    if wrapper is not None:
        children = [child for child, _ in wrapper.named_children()]
        if children in (["model"], ["body"]):
            name = name.removeprefix(f"{children[0]}.")
    return name.replace("_", ".")


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
