"""Frozen deep features in which a translated image should stay close to its source image.

VGG16 up to relu5_3 with torchvision's ImageNet weights (PyTorch can no longer read UNIT's Caffe weights), or
EfficientNet-Lite0, whose weights come in a package. Features have zero mean and unit variance a channel and image,
which keeps what is where and drops how bright it is.

Letters in tensor names: B batch, 3 RGB, H, W image size; C, h, w of a feature map. Images are in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vgg

from nightseg.networks.weights import cached_download, check_names_and_shapes, read_state_dict, read_weights_file
from nightseg.segmenter.encoders import IMAGENET_MEAN, IMAGENET_STD, LITE_MEAN, LITE_STD
from nightseg.segmenter.start import lite_classifier_weights
from nightseg.unit.settings import PERCEPTUAL_STRIDES, PerceptualName, Translator

VGG16_FILE: Final = "vgg16-397923af.pth"
VGG16_URL: Final = f"https://download.pytorch.org/models/{VGG16_FILE}"
VGG16_SHA256_PREFIX: Final = "397923af"
_CURE: Final = (
    "set perceptual_weights to a copy of it, or perceptual_network to efficientnet_lite0, whose weights are installed"
)

DEFAULT_LAYERS: Final[Mapping[PerceptualName, tuple[str, ...]]] = {
    "vgg16": ("relu5_3",),
    "efficientnet_lite0": ("stride_8", "stride_16"),  # fine enough to hold a car, deep enough to know one
}
SMALLEST_PERCEIVED: Final = 32  # pixels a side, for any layer: ImageNet networks know nothing smaller


def smallest_perceived(name: PerceptualName, layers: Sequence[str] | None = None) -> int:
    """Fewest pixels a side of an image: a map of one position has no variance to normalise."""
    return max(SMALLEST_PERCEIVED, *(2 * PERCEPTUAL_STRIDES[name][layer] for layer in layers or DEFAULT_LAYERS[name]))


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


def build_perceptual(
    name: PerceptualName,
    weights: str | None = None,
    *,
    sha256: str | None = None,
    layers: Sequence[str] | None = None,
) -> PerceptualFeatures:
    """The named network with ImageNet weights, frozen; answers with the maps of `layers` (None = DEFAULT_LAYERS).

    `weights`: file or URI of VGG16 weights under torchvision's names, of the given sha256; None = torchvision's file,
    from torch's cache, or downloaded to it if that is allowed. Raises UserError: weights that are not there or do not
    fit.
    """
    wanted = tuple(layers or DEFAULT_LAYERS[name])
    if name == "vgg16":
        return PerceptualFeatures(Vgg16Maps(weights, sha256, wanted), IMAGENET_MEAN, IMAGENET_STD)
    return PerceptualFeatures(_lite0(wanted), LITE_MEAN, LITE_STD)


class Vgg16Maps(nn.Module):
    """torchvision's VGG16 (arXiv 1409.1556, configuration D): images -> the maps of `layers`, first layers first.

    Without the pooling between blocks 4 and 5, as in UNIT: conv5 runs at 1/8 of the image and keeps positions sharper.
    Nothing is computed beyond the last layer that is asked for.
    """

    def __init__(self, weights: str | None, sha256: str | None, layers: Collection[str]) -> None:
        super().__init__()
        with torch.device("meta"):
            network = vgg.make_layers(vgg.cfgs["D"])
        network.load_state_dict(_vgg16_weights(network.state_dict(), weights, sha256), assign=True)
        of_relu = [place for place, layer in enumerate(network) if isinstance(layer, nn.ReLU)]
        places = dict(zip(PERCEPTUAL_STRIDES["vgg16"], of_relu, strict=True))
        network[places["relu4_3"] + 1] = nn.Identity()
        self.places = {places[layer] for layer in layers}
        self.network = network[: max(self.places) + 1]

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        maps_BChw, found = images_B3HW, []
        for place, layer in enumerate(self.network):
            maps_BChw = layer(maps_BChw)
            if place in self.places:
                found.append(maps_BChw)
        return found


def check_weights(settings: Translator) -> None:
    """Raise UserError unless the weights of the perceptual loss are on this machine; none are fetched here."""
    if settings.perceptual_network != "vgg16":
        return
    file = settings.perceptual_weights or cached_download(VGG16_URL, VGG16_SHA256_PREFIX, name="vgg16", cure=_CURE)
    read_weights_file(
        file, "vgg16", key="perceptual_weights", sha256_prefix=settings.perceptual_sha256 or VGG16_SHA256_PREFIX
    )


def _vgg16_weights(wanted: Mapping[str, Tensor], weights: str | None, sha256: str | None) -> Mapping[str, Tensor]:
    """The convolutions' under the names of `wanted`, from a file of the whole network."""
    if weights is None:
        weights = str(cached_download(VGG16_URL, VGG16_SHA256_PREFIX, name="vgg16", cure=_CURE))
    key = "perceptual_weights and, for weights of your own, perceptual_sha256"
    state = read_state_dict(weights, "vgg16", key=key, sha256_prefix=sha256 or VGG16_SHA256_PREFIX)
    named = {name: state[name].float() for name in state if name.startswith("features.")}
    check_names_and_shapes("vgg16", weights, {f"features.{name}": tensor for name, tensor in wanted.items()}, named)
    return {name.removeprefix("features."): tensor for name, tensor in named.items()}


def _lite0(layers: Collection[str]) -> nn.Module:
    import timm  # two seconds to import

    places = [place for place, layer in enumerate(PERCEPTUAL_STRIDES["efficientnet_lite0"]) if layer in layers]
    tensors = lite_classifier_weights()
    network: nn.Module = timm.create_model(
        "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=places
    )
    network.load_state_dict({name: tensors[name] for name in network.state_dict()})
    return network
