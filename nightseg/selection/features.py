"""Feature extractors: frames in, one vector a frame out, for distances between sets of frames.

An extractor is a network, its weights and a resize rule; all three are part of its identity, because a distance only
means something between features of the same making. Which ones there are: networks/extractors.py.

Shapes: B batch, C = D channels, H height, W width, h x w of the feature map, P = h w positions, D feature dimensions.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from nightseg.storage import Location

RESIZE_RULES = ("pytorch-fid", "clean")
PRECISIONS = ("float32", "bfloat16")

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
        assert precision in PRECISIONS, precision
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
        features = [pooled.numpy() for pooled, _ in self._passes(images)]
        return np.concatenate([*features, np.empty((0, self.dims), dtype=np.float32)])

    def with_positions(
        self, images: Sequence[npt.NDArray[np.uint8]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Features (N, D), and the same before they are averaged over the positions of the map: (N, P, D)."""
        if not images:
            return np.empty((0, self.dims), dtype=np.float32), np.empty((0, 0, self.dims), dtype=np.float32)
        parts = [(pooled.numpy(), maps.flatten(2).mT.numpy()) for pooled, maps in self._passes(images)]
        features, maps = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(maps)

    def _passes(self, images: Sequence[npt.NDArray[np.uint8]]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(images), self._pass_rows):
            part = images[start : start + self._pass_rows]
            inputs_BCHW = torch.zeros((self._pass_rows, 3, self._side, self._side))
            for row, image in enumerate(part):
                inputs_BCHW[row] = resized(image, self._side, self.resize)
            maps_BChw = self._maps(inputs_BCHW, self.precision)[: len(part)]
            yield F.adaptive_avg_pool2d(maps_BChw, 1).flatten(1).cpu(), maps_BChw.cpu()

    @torch.inference_mode()
    def _maps(self, inputs_BCHW: Tensor, precision: str) -> Tensor:
        inputs_BCHW = inputs_BCHW.to(self._device, memory_format=torch.channels_last)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            maps_BChw: Tensor = self._network((inputs_BCHW - self._mean) / self._std)
        return maps_BChw.float()

    def faster_precision(self) -> str:
        """Of this machine, by timing: some processors gain three times, others lose as much."""
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
