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
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from nightseg.data.taxonomy import Taxonomy
from nightseg.networks.model_folder import load_tensors
from nightseg.networks.normaliser import Normaliser
from nightseg.segmenter import detectron2
from nightseg.segmenter.encoders import STRIDES, Encoder, build_encoder
from nightseg.segmenter.settings import Network
from nightseg.storage import Location, UserError

SIZE_DIVISOR: Final = 32
COMMON_STRIDE: Final = 4
LEVELS: Final = ("p2", "p3", "p4", "p5")
ARCHITECTURE: Final = (
    *("encoder", "pyramid_channels", "head_channels", "norm", "freeze_at", "stride_in_1x1", "backend"),
)  # what a model card repeats of the settings
_NORM_GROUPS: Final = 32
_LOG = logging.getLogger("nightseg.segmenter")


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
    `normalise` turns bytes into what `forward` takes.
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
        self.normalise = Normaliser(encoder.mean, encoder.std)

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
    network: Network, num_classes: int, *, encoder_weights: Mapping[str, Tensor] | None = None
) -> SemanticFPN:
    """The one place where the network is put together; the settings' `input_size` is for whoever feeds it.

    `encoder_weights`: tensors from `start.imagenet_weights`; None leaves the encoder random.

    `backend: detectron2` computes with the modules of detectron2's SemanticSegmentor; names of tensors, input and
    output are the same, so a model of either opens with the other. Raises UserError: detectron2 is not installed, or an
    encoder that cannot be had.
    """
    if network.backend == "detectron2":
        parts = detectron2.build_parts(network, num_classes, num_groups=num_groups(network.head_channels))
        built = SemanticFPN(*parts, num_classes)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            ours = build_semantic_fpn(network.model_copy(update={"backend": "torchvision"}), num_classes)
        detectron2.rename_parameters(built, ours.state_dict())
    else:
        body = build_encoder(
            network.encoder, norm=network.norm, freeze_at=network.freeze_at, stride_in_1x1=network.stride_in_1x1
        )
        pyramid = FeaturePyramidNetwork(list(body.channels), network.pyramid_channels)
        head = SemanticHead(network.pyramid_channels, network.head_channels, num_classes)
        built = SemanticFPN(body, pyramid, head, num_classes)
    if encoder_weights is not None:
        built.load_state_dict(built.state_dict() | {f"body.{name}": tensor for name, tensor in encoder_weights.items()})
    return built


def load_semantic_fpn(folder: Location, network: Network, num_classes: int) -> SemanticFPN:
    """This very network, to be trained on, with the weights of a model folder; draws no random numbers."""
    with torch.random.fork_rng(devices=[]):
        built = build_semantic_fpn(network, num_classes)
    built.load_state_dict(load_tensors(folder)[0])
    return built


@functools.cache
def check_architecture(network: Network) -> None:
    """Raise the UserErrors of `build_semantic_fpn` without the memory and the time that building takes."""
    if network.backend == "detectron2":
        detectron2.require()
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        build_semantic_fpn(network.model_copy(update={"backend": "torchvision"}), num_classes=2)


# -- model folders ----------------------------------------------------------------------------------------------------

KIND: Final = "semantic_fpn"


def model_card(network: Network, classes: Taxonomy, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """What the card of every segmenter says: enough to build it, to feed it and to name its classes."""
    return {
        "kind": KIND,
        **{key: getattr(network, key) for key in ARCHITECTURE},
        "num_classes": classes.num_classes,
        "taxonomy": {
            "name": classes.name,
            "classes": list(classes.classes),
            "palette": [list(colour) for colour in classes.palette],
        },
        "input_size": list(network.input_size) if network.input_size else None,
        "mean": list(mean),
        "std": list(std),
    }


def check_kind(folder: Location, card: Mapping[str, Any]) -> None:
    """Raise UserError unless the card is a segmenter's."""
    if card["kind"] != KIND:
        raise UserError(
            f"model {folder.uri}: it is of kind {card['kind']!r}, but a segmenter ({KIND}) is needed",
            cure="give the model folder of a train_segmenter stage",
        )


def network_of(card: Mapping[str, Any]) -> Network:
    """The network settings that a model card states."""
    return Network(**{key: card[key] for key in ARCHITECTURE if key in card})


def open_semantic_fpn(tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> SemanticFPN:
    """The network of a model folder, with its weights, in evaluation mode.

    A model that was computed with detectron2 opens without it, too: the tensors are the same.
    """
    network = network_of(card)
    if network.backend == "detectron2" and not detectron2.is_installed():
        _LOG.warning(
            "this model was made with detectron2, which is not installed: computing with torchvision's modules"
        )
        network = network.model_copy(update={"backend": "torchvision"})
    built = build_semantic_fpn(network, card["num_classes"])
    built.load_state_dict(dict(tensors))
    return built.eval()


def upsample_logits(logits_BKhw: Tensor, height: int, width: int, top: int = 0) -> Tensor:
    """Logits at stride 4 to float32 logits_BKHW of the H x W input, as detectron2: bilinear, then cropped.

    Given the rows `rows_needed(start, stop, h)` alone, `height` = stop - start and `top` = start - 4 x the first of
    them, it gives the rows start .. stop of the whole, bit for bit.
    """
    full = F.interpolate(logits_BKhw.float(), scale_factor=COMMON_STRIDE, mode="bilinear", align_corners=False)
    return full[:, :, top : top + height, :width]


def rows_needed(start: int, stop: int, num_rows: int) -> slice:
    """Of `num_rows` rows of logits those that rows start .. stop at full size are made from: each from its two nearest,
    so one more on either side."""
    return slice(max(0, start // COMMON_STRIDE - 1), min(num_rows, -(-stop // COMMON_STRIDE) + 1))
