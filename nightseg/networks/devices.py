"""Where a network runs: on the CPU, or on a GPU that is there."""

from __future__ import annotations

import torch

from nightseg.errors import UserError


def usable_device(name: str | None) -> torch.device:
    """The named device, or CUDA where there is one, or the CPU. Raises UserError if the named one is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r}: unknown", cure="choose cpu, cuda, cuda:0, ...") from error
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise UserError(
            f"device {name!r}: PyTorch sees {torch.cuda.device_count()} CUDA GPUs here",
            cure="choose the device cpu, or a machine and an installation of PyTorch with CUDA",
        )
    return device
