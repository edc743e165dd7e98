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
from nightseg.storage import Location, UserError

TENSORS: Final = "model.safetensors"
CARD: Final = "model.json"
FORMAT: Final = "nightseg-model-1"

_COPY_AGAIN: Final = "copy the whole model folder again"


def save_model(folder: Location, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> None:
    """Write a model folder: tensors first, the card last, so a folder with a card is whole.

    The same tensors and card give the same bytes. Tensors may be on any device and in any memory format.
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
    (folder / TENSORS).write_bytes(safetensors.torch.save(plain))
    (folder / CARD).write_json({"format": FORMAT, **card})


def load_card(folder: Location) -> dict[str, Any]:
    """The card alone. UserError when the folder is not a model of this format."""
    file = folder / CARD
    if not file.exists():
        raise UserError(
            f"{folder.uri} is not a model folder: it has no {CARD}", cure=f"name a folder of {TENSORS} and {CARD}"
        )
    try:
        card = file.read_json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file.uri} is damaged: {error}", cure=_COPY_AGAIN) from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise UserError(
            f"{file.uri}: format {found!r}, this version of nightseg reads {FORMAT!r}",
            cure="open it with the version that wrote it, or train the model again",
        )
    return card


def load_tensors(folder: Location) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and card of a model folder. UserError names the file that is missing or damaged."""
    card = load_card(folder)
    file = folder / TENSORS
    if not file.exists():
        raise UserError(f"{folder.uri} has a {CARD} but no {TENSORS}", cure=_COPY_AGAIN)
    try:
        return unwrapped(safetensors.torch.load(file.read_bytes()), file.uri), card
    except SafetensorError as error:
        raise UserError(f"{file.uri} is damaged: {error}", cure=_COPY_AGAIN) from error
