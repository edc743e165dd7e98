"""A model folder: `model.safetensors` holds the tensors, `model.json` (the card) says what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nightseg.networks.weights import unwrapped
from nightseg.storage import Location, UserError, sha256_of
from nightseg.storage.paths import canonical_json

TENSORS: Final = "model.safetensors"
CARD: Final = "model.json"
FORMAT: Final = "nightseg-model-1"

_COPY_AGAIN: Final = "copy the whole model folder again"
_EDITED: Final = f"; if you changed it yourself, delete {{}} from {CARD}"


def save_model(folder: Location, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write a model folder: tensors first, the card last, so a folder with a card is whole.

    The same tensors and card give the same bytes; the card holds their sha256 and its own. Tensors may be on any
    device and in any memory format.
    `card["kind"]` names the network. Raises UserError when a floating tensor is not finite: such a model is broken.
    """
    assert card.get("kind"), "a model card names its kind"
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    broken = [name for name, tensor in plain.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"{folder.uri}: not saved, {len(broken)} tensors are not finite, first {broken[0]}",
            cure="train again with a smaller learning rate",
        )
    data = safetensors.torch.save(plain)
    body = {"format": FORMAT, **card, "weights_sha256": sha256_of(data)}
    body.pop("sha256", None)  # of the card that this one was made from
    (folder / TENSORS).write_bytes(data)
    (folder / CARD).write_json(body | {"sha256": sha256_of(canonical_json(json.loads(canonical_json(body))))})


def load_card(folder: Location) -> dict[str, Any]:
    """The card alone. UserError when the folder is not a model of this format."""
    file = folder / CARD
    if not file.exists():
        raise UserError(
            f"{folder.uri} is not a model folder: it has no {CARD}", cure=f"name a folder of {TENSORS} and {CARD}"
        )
    try:
        card = file.read_json()
        json.dumps(card, allow_nan=False)
    except ValueError as error:  # no JSON, no UTF-8, NaN
        raise UserError(f"{file.uri} is damaged: {error}", cure=_COPY_AGAIN) from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise UserError(
            f"{file.uri}: format {found!r}, this version of nightseg reads {FORMAT!r}",
            cure="open it with the version that wrote it, or train the model again",
        )
    seal, seen = card.pop("sha256", None), sha256_of(canonical_json(card))
    if seal not in (None, seen):
        raise UserError(
            f"{file.uri} is damaged: it says that its sha256 is {str(seal)[:12]}, it is {seen[:12]}",
            cure=_COPY_AGAIN + _EDITED.format("sha256"),
        )
    return card


def load_tensors(folder: Location) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and card of a model folder. UserError names the file that is missing or damaged."""
    card = load_card(folder)
    file = folder / TENSORS
    if not file.exists():
        raise UserError(f"{folder.uri} has a {CARD} but no {TENSORS}", cure=_COPY_AGAIN)
    data = file.read_bytes()
    seal, seen = card.get("weights_sha256"), sha256_of(data)
    if seal not in (None, seen):
        raise UserError(
            f"{file.uri} is damaged: {CARD} says that its sha256 is {str(seal)[:12]}, it is {seen[:12]}",
            cure=_COPY_AGAIN + _EDITED.format("weights_sha256 and sha256"),
        )
    try:
        return unwrapped(safetensors.torch.load(data), file.uri), card
    except SafetensorError as error:
        raise UserError(f"{file.uri} is damaged: {error}", cure=_COPY_AGAIN) from error
