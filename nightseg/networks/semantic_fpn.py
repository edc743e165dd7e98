"""Semantic FPN: the semantic branch of Panoptic FPN (arXiv 1901.02446, section 3.1) as detectron2 builds it.

B images, K classes, H x W pixels, h x w = a quarter of H x W (rounded up), C channels. Head and pyramid compute what
detectron2's SemSegFPNHead and FPN compute, and the head keeps detectron2's parameter names (p2.0.weight,
p2.0.norm.weight, ..., predictor.weight), so that a checkpoint's head needs no renaming.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from nightseg.networks.encoders import STRIDES, Encoder, build_encoder

SIZE_DIVISOR: Final = 32
COMMON_STRIDE: Final = 4
LEVELS: Final = ("p2", "p3", "p4", "p5")
_NORM_GROUPS: Final = 32


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
    """Encoder, feature pyramid and semantic head."""

    def __init__(
        self, encoder: Encoder, num_classes: int, pyramid_channels: int = 256, head_channels: int = 128
    ) -> None:
        super().__init__()
        self.body = encoder
        self.fpn = FeaturePyramidNetwork(list(encoder.channels), pyramid_channels)
        self.head = SemanticHead(pyramid_channels, head_channels, num_classes)
        self.num_classes = num_classes

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Normalised float images of any size to logits_BKhw at stride 4 with h = ceil(H / 4), w = ceil(W / 4)."""
        height, width = images_B3HW.shape[-2:]
        # Zero after normalisation, right and below: detectron2's padding. It also makes the pyramid's nearest
        # upsampling an exact doubling.
        padded = F.pad(images_B3HW, (0, -width % SIZE_DIVISOR, 0, -height % SIZE_DIVISOR))
        maps = self.body(padded)
        pyramid = self.fpn(OrderedDict(zip(LEVELS, maps, strict=True)))
        logits: Tensor = self.head(list(pyramid.values()))
        return logits[:, :, : -(-height // COMMON_STRIDE), : -(-width // COMMON_STRIDE)]


def build_semantic_fpn(
    *,
    encoder: str,
    num_classes: int,
    pyramid_channels: int = 256,
    head_channels: int = 128,
    encoder_weights: Mapping[str, Tensor] | None = None,
) -> SemanticFPN:
    """The one place where the network is put together.

    `encoder_weights` are tensors from `encoders.imagenet_weights(encoder)`; None leaves the encoder random (to be
    filled from a model folder, or trained from scratch).
    """
    body = build_encoder(encoder)
    if encoder_weights is not None:
        body.load_state_dict(dict(encoder_weights))
    return SemanticFPN(body, num_classes, pyramid_channels=pyramid_channels, head_channels=head_channels)


def upsample_logits(logits_BKhw: Tensor, height: int, width: int) -> Tensor:
    """Logits at stride 4 to float32 logits_BKHW of the H x W input, as detectron2: bilinear, then cropped."""
    full = F.interpolate(logits_BKhw.float(), scale_factor=COMMON_STRIDE, mode="bilinear", align_corners=False)
    return full[:, :, :height, :width]
