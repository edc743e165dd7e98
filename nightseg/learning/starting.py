"""What a segmenter is before its first step: ImageNet, nothing, or another model.

Every worker starts from the same tensors, so this runs once and the result is stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nightseg.frames.taxonomy import Taxonomy
from nightseg.networks.checkpoint import load_tensors
from nightseg.networks.encoders import imagenet_weights
from nightseg.networks.semantic_fpn import SemanticFPN, build_semantic_fpn
from nightseg.storage import Location, UserError

PREDICTOR = ("head.predictor.weight", "head.predictor.bias")


def starting_network(
    start: str | Location,
    *,
    encoder: str,
    encoder_weights: str | None,
    pyramid_channels: int,
    head_channels: int,
    classes: Taxonomy,
    seed: int,
    say: Callable[[str], None],
) -> SemanticFPN:
    """`start` is "imagenet" (encoder only; the rest is random), "scratch", or the folder of another model.

    From another model everything is kept; only its predictor is drawn anew, and that is said, when its class list
    differs. What is random follows from `seed`. Raises UserError: weights missing, another encoder or other widths.
    """
    weights = imagenet_weights(encoder, encoder_weights) if start == "imagenet" else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_semantic_fpn(
            encoder=encoder,
            num_classes=classes.num_classes,
            pyramid_channels=pyramid_channels,
            head_channels=head_channels,
            encoder_weights=weights,
        )
    if isinstance(start, str):
        assert start in ("imagenet", "scratch"), start
        return network

    tensors, card = load_tensors(start)
    wanted = {"encoder": encoder, "pyramid_channels": pyramid_channels, "head_channels": head_channels}
    for key, value in wanted.items():
        if card.get(key) != value:
            raise UserError(
                f"{start.uri}: this model has {key} {card.get(key)!r}, the one that starts from it wants {value!r}; "
                f"give both models the same network.{key}"
            )
    if tuple(card["taxonomy"]["classes"]) != classes.classes:
        say(
            f"{start.uri} knows the {card['num_classes']} classes of {card['taxonomy']['name']}, not the "
            f"{classes.num_classes} of {classes.name}: its predictor is drawn anew, everything else is kept"
        )
        fresh = network.state_dict()
        tensors |= {name: fresh[name] for name in PREDICTOR}
    network.load_state_dict(tensors)
    return network
