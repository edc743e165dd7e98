"""Semantic FPN: the semantic branch of Panoptic FPN (arXiv 1901.02446, section 3.1) as detectron2 builds it.

B images, K classes, H x W pixels, h x w = a quarter of H x W padded to multiples of 32, C channels. Head and pyramid
compute what detectron2's SemSegFPNHead and FPN compute, and the head keeps detectron2's parameter names (p2.0.weight,
p2.0.norm.weight, ..., predictor.weight), so that a checkpoint's head needs no renaming.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from nightseg.errors import UserError
from nightseg.segmenter import detectron2
from nightseg.segmenter.batch_norm import Norm
from nightseg.segmenter.encoders import RESNETS, Encoder, build_encoder
from nightseg.segmenter.timm_encoder import STRIDES

SIZE_DIVISOR: Final = 32
COMMON_STRIDE: Final = 4
LEVELS: Final = ("p2", "p3", "p4", "p5")
_NORM_GROUPS: Final = 32
_LOG = logging.getLogger("nightseg.networks")

Backend = Literal["torchvision", "detectron2"]


def num_groups(channels: int) -> int:
    """Groups of the head's GroupNorm: detectron2's 32 where they divide the channels, else about 4 channels a group.

    Four is what 32 groups of the usual 128 channels hold; one channel a group would be instance norm, which forgets
    how strong a feature is.
    """
    return _NORM_GROUPS if channels % _NORM_GROUPS == 0 else math.gcd(channels, max(1, channels // 4))


class NormedConvolution(nn.Conv2d):
    """3x3 convolution without bias, then GroupNorm, then ReLU. It *is* a convolution so that its parameters are called
    `weight` and `norm.weight`, as in detectron2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm = nn.GroupNorm(num_groups(out_channels), out_channels)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps_BChw: Tensor) -> Tensor:
        return F.relu(self.norm(super().forward(maps_BChw)))


class SemanticHead(nn.Module):
    """Brings every pyramid level to stride 4, adds them up and predicts the classes."""

    def __init__(self, pyramid_channels: int, head_channels: int, num_classes: int) -> None:
        super().__init__()
        for level, stride in zip(LEVELS, STRIDES, strict=True):
            num_doublings = int(math.log2(stride // COMMON_STRIDE))
            layers: list[nn.Module] = []
            for index in range(max(1, num_doublings)):
                layers.append(NormedConvolution(pyramid_channels if index == 0 else head_channels, head_channels))
                if num_doublings:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.add_module(level, nn.Sequential(*layers))
        self.predictor = nn.Conv2d(head_channels, num_classes, kernel_size=1)
        self.reset_predictor()

    def reset_predictor(self) -> None:
        """Forget the classes: the start of a model for another class list."""
        nn.init.kaiming_normal_(self.predictor.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.predictor.bias)  # type: ignore[arg-type]  # the predictor has a bias

    def forward(self, levels: list[Tensor]) -> Tensor:
        finest, *coarser = (self.get_submodule(name)(maps) for name, maps in zip(LEVELS, levels, strict=True))
        total = finest
        for maps in coarser:
            total = total + maps
        logits: Tensor = self.predictor(total)
        return logits


class SemanticFPN(nn.Module):
    """Encoder, feature pyramid and semantic head.

    `fpn` takes and returns an ordered mapping with one map for each of LEVELS; `head` takes the list of levels.
    """

    def __init__(
        self,
        encoder: Encoder | detectron2.Encoder,
        pyramid: FeaturePyramidNetwork | detectron2.Pyramid,
        head: SemanticHead | detectron2.Head,
        num_classes: int,
    ) -> None:
        super().__init__()
        self.body = encoder
        self.fpn = pyramid
        self.head = head
        self.num_classes = num_classes

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Normalised float images of any size to logits_BKhw at stride 4, of the image as it is padded.

        What lies beyond the image is for `upsample_logits`: its last pixels are interpolated between the last logit
        inside and the first one outside, as in detectron2.
        """
        height, width = images_B3HW.shape[-2:]
        # Zero after normalisation, right and below: detectron2's padding. It also makes the pyramid's nearest
        # upsampling an exact doubling.
        padded = F.pad(images_B3HW, (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR))
        maps = self.body(padded)
        pyramid = self.fpn(OrderedDict(zip(LEVELS, maps, strict=True)))
        logits: Tensor = self.head(list(pyramid.values()))
        return logits


def build_semantic_fpn(
    *,
    encoder: str,
    num_classes: int,
    pyramid_channels: int = 256,
    head_channels: int = 128,
    norm: Norm = "batch",
    freeze_at: int = 0,
    stride_in_1x1: bool = False,
    backend: Backend = "torchvision",
    encoder_weights: Mapping[str, Tensor] | None = None,
) -> SemanticFPN:
    """The one place where the network is put together.

    `encoder`: one of `encoders.ENCODERS` or timm/NAME. `norm`: batch norms of the encoder that learn from each worker's
    batch, from all workers' (sync), or not at all (frozen). `freeze_at`: so many first stages of a ResNet do not learn.
    `stride_in_1x1`: see `ResNetEncoder`. `encoder_weights` are tensors from `encoders.imagenet_weights(encoder)`; None
    leaves the encoder random (to be filled from a model folder, or trained from scratch).

    `backend: detectron2` computes with the modules of detectron2's SemanticSegmentor; names of tensors, input and
    output are the same, so a model of either opens with the other. Raises UserError: detectron2 is not installed, or a
    setting that this encoder does not have.
    """
    if backend == "detectron2":
        network = _detectron2_fpn(
            encoder=encoder,
            num_classes=num_classes,
            pyramid_channels=pyramid_channels,
            head_channels=head_channels,
            norm=norm,
            freeze_at=freeze_at,
            stride_in_1x1=stride_in_1x1,
        )
    else:
        body = build_encoder(encoder, norm=norm, freeze_at=freeze_at, stride_in_1x1=stride_in_1x1)
        pyramid = FeaturePyramidNetwork(list(body.channels), pyramid_channels)
        network = SemanticFPN(body, pyramid, SemanticHead(pyramid_channels, head_channels, num_classes), num_classes)
    if encoder_weights is not None:
        drawn = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("body.")}
        network.load_state_dict(drawn | {f"body.{name}": tensor for name, tensor in encoder_weights.items()})
    return network


def _detectron2_fpn(*, encoder: str, num_classes: int, head_channels: int, **settings: Any) -> SemanticFPN:
    if encoder not in RESNETS:
        raise UserError(
            f"network.backend detectron2 computes {', '.join(RESNETS)}, not {encoder}; use backend torchvision"
        )
    shape = {"encoder": encoder, "num_classes": num_classes, "head_channels": head_channels, **settings}
    parts = detectron2.build_parts(**shape, num_groups=num_groups(head_channels))
    network = SemanticFPN(*parts, num_classes)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        twin = build_semantic_fpn(**shape, backend="torchvision")
    detectron2.rename_parameters(network, twin.state_dict())
    return network


@functools.cache
def check_architecture(**architecture: Any) -> None:
    """Raise the UserErrors of `build_semantic_fpn` without the memory and the time that building takes."""
    if architecture.get("backend") == "detectron2":
        detectron2.require()
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        build_semantic_fpn(**{**architecture, "backend": "torchvision"}, num_classes=2)


def architecture_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `build_semantic_fpn` that a model card states; older cards lack what was not yet a choice."""
    later = {"norm": "batch", "freeze_at": 0, "stride_in_1x1": False, "backend": "torchvision"}
    always = ("encoder", "pyramid_channels", "head_channels")
    return {key: card[key] for key in always} | {key: card.get(key, default) for key, default in later.items()}


def open_semantic_fpn(tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> SemanticFPN:
    """The network of a model folder, with its weights, in evaluation mode.

    A model that was computed with detectron2 opens without it, too: the tensors are the same.
    """
    architecture = architecture_of(card)
    if architecture["backend"] == "detectron2" and not detectron2.is_installed():
        _LOG.warning(
            "this model was made with detectron2, which is not installed: computing with torchvision's modules"
        )
        architecture["backend"] = "torchvision"
    network = build_semantic_fpn(**architecture, num_classes=card["num_classes"])
    network.load_state_dict(dict(tensors))
    return network.eval()


def upsample_logits(logits_BKhw: Tensor, height: int, width: int) -> Tensor:
    """Logits at stride 4 to float32 logits_BKHW of the H x W input, as detectron2: bilinear, then cropped."""
    full = F.interpolate(logits_BKhw.float(), scale_factor=COMMON_STRIDE, mode="bilinear", align_corners=False)
    return full[:, :, :height, :width]
