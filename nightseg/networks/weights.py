"""Files of weights: read without running anything that is in them, and compared with the network they are for."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nightseg.storage import Location, UserError


def read_state_dict(file: str | Path | Location, name: str) -> dict[str, Tensor]:
    """The tensors of a PyTorch state dict or a .safetensors file, on the CPU; `name` of the network is for messages.

    Raises UserError: no such file, damaged, asks for code to be run, or not a flat dictionary of tensors.
    """
    location = Location.of(file)
    try:
        data = location.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{name}: there is no weights file {file}; check `encoder_weights`") from None
    try:
        if location.name.endswith(".safetensors"):
            return dict(safetensors.torch.load(data))
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, SafetensorError) as error:
        if asked := asked_of_torch(error):
            raise refusal(f"{name}: {file}", asked) from None
        raise UserError(f"{name}: {file} is not a file of PyTorch weights, or is damaged: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{name}: {file} is not a dictionary of tensors (a PyTorch state dict)")
    return dict(loaded)


def check_names_and_shapes(name: str, file: object, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise UserError with the first differences unless both hold the same names with the same shapes."""
    wrong = [f"{key} is missing" for key in wanted if key not in found]
    wrong += [f"{key} is not part of {name}" for key in found if key not in wanted]
    wrong += [
        f"{key} is {tuple(found[key].shape)}, {name} has {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in found and found[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{file} does not hold the weights of {name}: {'; '.join(wrong[:3])}{more}")


def refusal(where: str, asked: str) -> UserError:
    """The error for a file that asks for a thing by name which is not plain data."""
    return UserError(
        f"{where}: refused, it asks for {asked}, which could run a stranger's code; only tensors, arrays and "
        "plain data are read",
        cure="if you trust the file, load it where it was made and save its model again, as "
        'torch.save({"model": model.state_dict()}, FILE)',
    )


def asked_of_torch(error: Exception) -> str | None:
    """What a file asked for that `torch.load(weights_only=True)` refused with this error, if that was the reason."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return found[1] if found else None
