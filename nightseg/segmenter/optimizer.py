"""Which rule moves which weights of a segmenter, and how fast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def build_optimizer(
    network: nn.Module,
    kind: str,
    *,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
    decay_biases: bool = False,
    encoder: nn.Module | None = None,
    encoder_rate: float = 1.0,
    head_rate: float = 1.0,
) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW (whose betas are PyTorch's; `momentum` is not used).

    Weights of normalisations are not decayed (detectron2's WEIGHT_DECAY_NORM 0; decay pulls them towards values that
    mean nothing), biases of convolutions only with `decay_biases` (detectron2 does). Each group of parameters carries
    `rate`, what its learning rate is multiplied by: `encoder_rate` for the parameters of `encoder`, which is a part of
    `network`, `head_rate` for all others. The order of parameters is that of the network, so a saved state fits after
    a restart.
    """
    inside = {id(parameter) for parameter in encoder.parameters()} if encoder is not None else set()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, is_decayed in _decayed(network, decay_biases):
        rate = encoder_rate if id(parameter) in inside else head_rate
        groups.setdefault((rate, weight_decay if is_decayed else 0.0), []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "rate": rate} for (rate, decay), parameters in groups.items()
    ]
    match kind:  # fused: one pass over the weights instead of one for each operation
        case "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                described, lr=learning_rate, momentum=momentum, fused=True
            )
        case "adamw":
            optimizer = torch.optim.AdamW(described, lr=learning_rate, fused=True)
        case _:
            raise AssertionError(f"unknown optimizer {kind!r}")
    set_learning_rate(optimizer, learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """`learning_rate` for every group, multiplied by the group's own `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]


def _decayed(network: nn.Module, decay_biases: bool) -> Iterator[tuple[nn.Parameter, bool]]:
    """Every parameter once, in the order of the network, and whether it is decayed."""
    seen: set[int] = set()
    for module in network.modules():
        own = dict(module.named_parameters(recurse=False))
        is_bias_decayed = decay_biases and "weight" in own and own["weight"].ndim > 1
        for name, parameter in own.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter, parameter.ndim > 1 or (name == "bias" and is_bias_decayed)
