"""detectron2 as the thing that computes, and its names for our tensors.

It is built from source, and nothing here imports it before it is asked for. The state dict of a network made of its
modules has our names, so that a model folder is the same whoever computed it. h x w pixels of a map.
"""

from __future__ import annotations

import importlib.util
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any, Final

from torch import Tensor, nn

from nightseg.segmenter.encoders import IMAGENET_MEAN, IMAGENET_STD, Norm
from nightseg.segmenter.settings import Network
from nightseg.storage import UserError

COMMIT: Final = "02b5c4e295e990042a714712c21dc79b731e8833"
INSTALL: Final = (
    f"pip install --no-build-isolation 'detectron2 @ git+https://github.com/facebookresearch/detectron2@{COMMIT}'"
)

NORMS: Final[dict[Norm, str]] = {"batch": "BN", "frozen": "FrozenBN", "sync": "SyncBN"}
_MAPS: Final = ("res2", "res3", "res4", "res5")
_LEVELS: Final = ("p2", "p3", "p4", "p5")
# IMAGENET_MEAN and IMAGENET_STD as detectron2 has them: for bytes
RGB_MEAN: Final = (123.675, 116.28, 103.53)
RGB_STD: Final = (58.395, 57.12, 57.375)

# -- names ------------------------------------------------------------------------------------------------------------

_BLOCK: Final = r"body\.layer([1-4])\.(\d+)\."
_RULES: Final[tuple[tuple[str, Callable[[re.Match[str]], str]], ...]] = (
    (r"body\.conv1\.", lambda _: "backbone.bottom_up.stem.conv1."),
    (r"body\.bn1\.", lambda _: "backbone.bottom_up.stem.conv1.norm."),
    (_BLOCK + r"conv([1-3])\.", lambda found: f"{_block(found)}conv{found[3]}."),
    (_BLOCK + r"bn([1-3])\.", lambda found: f"{_block(found)}conv{found[3]}.norm."),
    (_BLOCK + r"downsample\.0\.", lambda found: f"{_block(found)}shortcut."),
    (_BLOCK + r"downsample\.1\.", lambda found: f"{_block(found)}shortcut.norm."),
    (r"fpn\.inner_blocks\.([0-3])\.0\.", lambda found: f"backbone.fpn_lateral{int(found[1]) + 2}."),
    (r"fpn\.layer_blocks\.([0-3])\.0\.", lambda found: f"backbone.fpn_output{int(found[1]) + 2}."),
    (r"head\.", lambda _: "sem_seg_head."),
)


def their_name(name: str) -> str:
    """The name in a SemanticSegmentor's state dict of a tensor of our ResNet, pyramid or head."""
    for pattern, replacement in _RULES:
        if found := re.match(pattern, name):
            return replacement(found) + name[found.end() :]
    raise KeyError(name)


def _block(found: re.Match[str]) -> str:
    return f"backbone.bottom_up.res{int(found[1]) + 1}.{found[2]}."


# -- detectron2's own modules -----------------------------------------------------------------------------------------


def is_installed() -> bool:
    return importlib.util.find_spec("detectron2") is not None


def require() -> None:
    """Raise UserError with the line that installs it unless detectron2 can be imported."""
    if not is_installed():
        raise UserError(
            "network.backend: detectron2 is not installed. It is built from source, after torch, with a C++ compiler "
            f"(minutes):\n  {INSTALL}\n",
            cure="install it, or leave network.backend at torchvision: the same network, which also reads and writes "
            "detectron2's checkpoints",
        )


def semantic_segmentor(network: Network, num_classes: int, num_groups: int = 32) -> Any:
    """detectron2's SemanticSegmentor on a ResNet with FPN, from its classes; input RGB, ImageNet mean and deviation.

    What its own builders make of Base-RCNN-FPN.yaml, without its model zoo, whose import fails beside setuptools 82.
    """
    require()
    try:
        from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
        from detectron2.modeling.backbone.resnet import BasicStem, ResNet
        from detectron2.modeling.meta_arch.semantic_seg import SemanticSegmentor, SemSegFPNHead
    except ImportError as error:
        raise UserError(
            f"network.backend: detectron2 is installed but cannot be imported ({error})",
            cure=f"build it against the torch that is installed:\n  {INSTALL}",
        ) from error

    depth, norm = int(network.encoder.removeprefix("resnet")), NORMS[network.norm]
    stages: dict[str, Any] = {"norm": norm} | ({"stride_in_1x1": network.stride_in_1x1} if depth >= 50 else {})
    bottom_up = ResNet(
        BasicStem(norm=norm),
        ResNet.make_default_stages(depth, **stages),
        out_features=list(_MAPS),
        freeze_at=network.freeze_at,
    )
    backbone = FPN(bottom_up, list(_MAPS), network.pyramid_channels, top_block=LastLevelMaxPool())
    head = SemSegFPNHead(
        {level: backbone.output_shape()[level] for level in _LEVELS},
        num_classes=num_classes,
        conv_dims=network.head_channels,
        common_stride=4,
        norm=lambda channels: nn.GroupNorm(num_groups, channels),
        ignore_value=255,
    )
    return SemanticSegmentor(backbone=backbone, sem_seg_head=head, pixel_mean=RGB_MEAN, pixel_std=RGB_STD)


class Encoder(nn.Module):
    """detectron2's ResNet as four maps."""

    def __init__(self, name: str, bottom_up: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.theirs = bottom_up
        shapes: Any = bottom_up.output_shape()  # type: ignore[operator]
        self.channels: tuple[int, ...] = tuple(shapes[level].channels for level in _MAPS)
        self.mean: tuple[float, ...] = IMAGENET_MEAN
        self.std: tuple[float, ...] = IMAGENET_STD

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Normalised float images (H and W divisible by 32) to four maps at strides 4, 8, 16, 32."""
        maps = self.theirs(images_B3HW)
        return [maps[level] for level in _MAPS]


class Pyramid(nn.Module):
    """detectron2's FPN on maps that are there already."""

    def __init__(self, fpn: nn.Module) -> None:
        super().__init__()
        fpn.bottom_up = nn.Identity()  # it computes its own maps; here it gets them
        self.theirs = fpn

    def forward(self, maps: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        levels = self.theirs(dict(zip(_MAPS, maps.values(), strict=True)))
        return OrderedDict((level, levels[level]) for level in _LEVELS)


class Head(nn.Module):
    """detectron2's SemSegFPNHead up to the logits at stride 4: without its loss, without its upsampling."""

    def __init__(self, sem_seg_head: nn.Module) -> None:
        super().__init__()
        self.theirs = sem_seg_head

    def forward(self, levels: list[Tensor]) -> Tensor:
        logits_BKhw: Tensor = self.theirs.layers(dict(zip(_LEVELS, levels, strict=True)))  # type: ignore[operator]
        return logits_BKhw


def build_parts(network: Network, num_classes: int, num_groups: int) -> tuple[Encoder, Pyramid, Head]:
    """Encoder, pyramid and head of a `semantic_segmentor`."""
    segmentor = semantic_segmentor(network, num_classes, num_groups)
    body = Encoder(network.encoder, segmentor.backbone.bottom_up)
    return body, Pyramid(segmentor.backbone), Head(segmentor.sem_seg_head)


def rename_parameters(network: nn.Module, names: Iterable[str]) -> None:
    """Let a network made of `build_parts` write and read its state dict under `names`, those of our own modules."""
    inside = {name: _inside(their_name(name)) for name in names}
    hooks: Any = network  # PyTorch does not say their types
    hooks.register_state_dict_post_hook(partial(_written, {theirs: name for name, theirs in inside.items()}))
    hooks.register_load_state_dict_pre_hook(partial(_read, inside))


def _inside(theirs: str) -> str:
    """Where a tensor of detectron2's name lies in a network made of `build_parts`."""
    for before, after in (("backbone.bottom_up.", "body."), ("backbone.", "fpn."), ("sem_seg_head.", "head.")):
        if theirs.startswith(before):
            return f"{after}theirs.{theirs.removeprefix(before)}"
    raise KeyError(theirs)


def _written(
    names: Mapping[str, str], network: nn.Module, tensors: MutableMapping[str, Tensor], prefix: str, _: object
) -> None:
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensors[prefix + names[name.removeprefix(prefix)]] = tensors.pop(name)


def _read(
    inside: Mapping[str, str], network: nn.Module, tensors: MutableMapping[str, Tensor], prefix: str, *_: object
) -> None:
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensor, ours = tensors.pop(name), name.removeprefix(prefix)
        # a norm that was trainable counts its batches, a frozen one does not
        if ours in inside or not ours.endswith(".num_batches_tracked"):
            tensors[prefix + inside.get(ours, ours)] = tensor
