"""What a segmenter is before its first step: ImageNet, nothing, or another model.

Every worker starts from the same tensors, so this runs once and the result is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from nightseg.data.taxonomy import Taxonomy
from nightseg.networks.model_folder import CARD, TENSORS, load_tensors
from nightseg.segmenter.encoders import imagenet_weights
from nightseg.segmenter.network import SemanticFPN, architecture_of, build_semantic_fpn
from nightseg.storage import Location, UserError, sha256_of

PREDICTOR = ("head.predictor.weight", "head.predictor.bias")


def starting_network(
    start: str | Location,
    *,
    encoder_weights: str | None,
    classes: Taxonomy,
    seed: int,
    say: Callable[[str], None],
    **architecture: Any,
) -> SemanticFPN:
    """`start` is "imagenet" (encoder only; the rest is random), "scratch", or the folder of another model (as text, a
    path with a slash).

    `architecture`: arguments of `build_semantic_fpn`. From another model everything is kept; only its predictor is
    drawn anew, and that is said, when its class list differs. What is random follows from `seed`. Raises UserError:
    weights missing, or of a network that is built otherwise.
    """
    weights = None
    if start == "imagenet":
        if architecture.get("stride_in_1x1") and encoder_weights is None:
            raise UserError(
                f"the ImageNet weights of {architecture['encoder']} that nightseg fetches have no stride in 1x1 "
                "convolutions; set network.stride_in_1x1 to false, or give network.encoder_weights that have"
            )
        weights = imagenet_weights(architecture["encoder"], encoder_weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_semantic_fpn(**architecture, num_classes=classes.num_classes, encoder_weights=weights)
    if start in ("imagenet", "scratch"):
        return network

    start = Location.of(start)
    tensors, card = load_tensors(start)
    if card.get("kind") != "semantic_fpn":
        raise UserError(
            f"{start.uri} holds a model of kind {card.get('kind')!r}; a segmenter starts from one of kind semantic_fpn"
        )
    _check_same_network(start, architecture_of(card), architecture_of(architecture))
    if tuple(card["taxonomy"]["classes"]) != classes.classes:
        say(
            f"{start.uri} knows the {card['num_classes']} classes of {card['taxonomy']['name']}, not the "
            f"{classes.num_classes} of {classes.name}: its predictor is drawn anew, everything else is kept"
        )
        fresh = network.state_dict()
        tensors |= {name: fresh[name] for name in PREDICTOR}
    network.load_state_dict(tensors)
    return network


def weights_identity(file: str | None, start: str) -> str | None:
    """What a training follows from by a file of encoder weights: its content, and nothing where it is not read."""
    if file is None or start != "imagenet":
        return None
    place = Location.of(file)
    return sha256_of(place.read_bytes()) if place.exists() else file  # a missing file is an error of the training


def start_identity(start: str) -> str:
    """What a training follows from by its start: the word itself, or the content of a model folder."""
    if "/" not in start:
        return start
    folder = Location.of(start)
    return " ".join(sha256_of((folder / file).read_bytes()) for file in (CARD, TENSORS))


def _check_same_network(start: Location, theirs: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Whose modules compute and which stages learn may change from one model to the next, the rest may not."""
    for key in ("encoder", "pyramid_channels", "head_channels", "stride_in_1x1"):
        if theirs[key] != wanted[key]:
            raise UserError(
                f"{start.uri}: this model has {key} {theirs[key]!r}, the one that starts from it wants "
                f"{wanted[key]!r}; give both models the same network.{key}"
            )
    if theirs["norm"] == "frozen" != wanted["norm"]:
        raise UserError(
            f"{start.uri}: the batch norms of this model never learned, so their statistics need not be those of any "
            "data; give both models network.norm: frozen, or convert the checkpoint it comes from with --unfreeze"
        )
