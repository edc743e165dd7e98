"""Which rule moves which weights of a segmenter."""

from __future__ import annotations

import torch
from torch import nn


def build_optimizer(
    network: nn.Module, kind: str, *, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with momentum, or AdamW (whose betas are PyTorch's; `momentum` is not used).

    Normalisation weights and all biases are not decayed (detectron2's WEIGHT_DECAY_NORM 0; decay pulls them towards
    values that mean nothing). The order of parameters is that of the network, so a saved state fits after a restart.
    """
    decayed = [parameter for parameter in network.parameters() if parameter.ndim > 1]
    free = [parameter for parameter in network.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    match kind:
        case "sgd":
            return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum)
        case "adamw":
            return torch.optim.AdamW(groups, lr=learning_rate)
    raise AssertionError(f"unknown optimizer {kind!r}")
