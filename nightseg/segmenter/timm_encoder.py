"""Any encoder of timm that gives feature maps at strides 4, 8, 16 and 32: `timm/NAME` or `timm/NAME.TAG`.

The tag says which of timm's weights are meant (resnet50.a1_in1k). Mean and deviation are those of timm's record of
these weights.
"""

from __future__ import annotations

import functools
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from nightseg.errors import closest
from nightseg.networks.weights import check_names_and_shapes, read_state_dict
from nightseg.storage import UserError

PREFIX: Final = "timm/"
STRIDES: Final = (4, 8, 16, 32)

_PROBE_SIZE: Final = (64, 96)  # divisible by 32, not square, and no size that a network is usually built for
_DOWNLOAD_TIMEOUT_SECONDS: Final = 30.0


class TimmEncoder(nn.Module):
    """A network of timm without its classifier.

    Parameter names are those of timm's own feature extraction, below `features.`. Its mean and deviation are for
    images in [0, 1].
    """

    def __init__(
        self,
        name: str,
        model: str,
        levels: tuple[int, ...],
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        import timm  # two seconds to import, paid only by who asks for such an encoder

        self.name = name
        self.features = timm.create_model(model, pretrained=False, features_only=True, out_indices=levels)
        self.channels: tuple[int, ...] = tuple(self.features.feature_info.channels())
        known = self.features.pretrained_cfg
        self.mean: tuple[float, ...] = tuple(mean or known["mean"])
        self.std: tuple[float, ...] = tuple(std or known["std"])

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """Normalised float images (H and W divisible by 32) to four maps at strides 4, 8, 16, 32."""
        return list(self.features(images_B3HW))


def timm_encoder(name: str) -> TimmEncoder:
    """The encoder `timm/NAME` with random weights. Raises UserError: no such network, or no four maps to be had."""
    model = name.removeprefix(PREFIX)
    return TimmEncoder(name, model, _levels(model))


@functools.cache
def _levels(model: str) -> tuple[int, ...]:
    """Which of timm's feature maps have strides 4, 8, 16, 32; looked up, then measured on tensors without content."""
    import timm

    if not timm.is_model(model):
        near = closest(model.partition(".")[0], timm.list_models())
        raise UserError(f"timm has no network {model!r}{near}; see timm.list_models()")
    with _explained(model), torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = timm.create_model(model, pretrained=False, features_only=True)
        strides = [int(entry["reduction"]) for entry in network.feature_info.info]
    if missing := [stride for stride in STRIDES if stride not in strides]:
        raise UserError(
            f"{PREFIX}{model} has feature maps at strides {', '.join(map(str, strides))}; a Semantic FPN needs "
            f"{', '.join(map(str, STRIDES))}, and has no {', '.join(map(str, missing))}; choose a network with a "
            "pyramid of maps, such as a ResNet, RegNet, ConvNeXt or EfficientNet"
        )
    levels = tuple(max(index for index, stride in enumerate(strides) if stride == wanted) for wanted in STRIDES)
    height, width = _PROBE_SIZE
    with _explained(model), torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        encoder = TimmEncoder(PREFIX + model, model, levels).eval()
        shapes = [tuple(maps.shape) for maps in encoder(torch.zeros(1, 3, height, width))]
    wanted_shapes = [(1, c, height // s, width // s) for c, s in zip(encoder.channels, STRIDES, strict=True)]
    if shapes != wanted_shapes:
        raise UserError(f"{PREFIX}{model}: its maps of a {height} x {width} image are {shapes}, not {wanted_shapes}")
    return levels


@contextmanager
def _explained(model: str) -> Iterator[None]:
    """timm's networks refuse by a dozen types of error what they cannot do."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{PREFIX}{model} cannot be an encoder of frames of any size, timm says: {error}. Choose another network, "
            "a convolutional one"
        ) from error


def timm_weights(name: str, file: str | Path | None) -> dict[str, Tensor]:
    """Pretrained weights under the parameter names of `timm_encoder(name)`, every one of them found.

    `file`: a state dict of the whole network under timm's names (.pth or .safetensors; its classifier is left out).
    Without it timm's own weights, from its cache or downloaded. Raises UserError: none to be had, or not of this
    network.
    """
    model = name.removeprefix(PREFIX)
    wanted = timm_encoder(name).state_dict()
    whole = _pretrained(model) if file is None else read_state_dict(file, name)
    found = _under_names_of(wanted, whole)
    check_names_and_shapes(name, file or "what timm gave", wanted, found)
    return found


def _under_names_of(wanted: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Feature extraction renames `blocks.0.conv` to `blocks_0.conv` or `model.blocks.0.conv`; nothing else differs."""
    plain = {name.replace(".", "_"): value for name, value in whole.items()}
    found = {}
    for name in wanted:
        key = name.removeprefix("features.").replace(".", "_")
        for candidate in (key, key.removeprefix("model_")):
            if candidate in plain:
                found[name] = plain[candidate]
                break
    return found


def _pretrained(model: str) -> dict[str, Tensor]:
    import timm

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT_SECONDS)  # offline must not hang
    try:
        network: nn.Module = timm.create_model(model, pretrained=True)
    except Exception as error:  # of timm, of its hub, of the network: any of a dozen types
        raise UserError(
            f"{PREFIX}{model}: its pretrained weights are not in the cache and cannot be downloaded "
            f"({type(error).__name__}: {error}).\n  Name a local copy with `encoder_weights: FILE` (a state dict under "
            "timm's names, .pth or .safetensors), or use the encoder efficientnet_lite0, whose weights come with the "
            "installation, or `start: scratch`."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return dict(network.state_dict())
