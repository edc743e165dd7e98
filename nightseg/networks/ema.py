"""Exponential moving average (EMA) of a network's weights over its steps (Polyak and Juditsky 1992; as the teacher of
mean teachers, arXiv 1703.01780).

The rule is torch's; its AveragedModel makes the host wait for the GPU, and blends batch norms' counters.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Network = TypeVar("Network", bound=nn.Module)


def ema_of(network: Network) -> Network:
    """A copy for `update_ema` to keep: without gradients, in evaluation mode."""
    ema = copy.deepcopy(network).requires_grad_(False)
    ema.eval()
    return ema


def warmed_up_decay(decay: float, step: int) -> float:
    """Decay of step 0, 1, ...: small at first, or the initial weights would weigh for 1 / (1 - decay) steps."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """ema = decay ema + (1 - decay) network, for weights and batch norm statistics; integer counters are copied.

    Statistics belong to the weights they were measured with, so they are averaged alike.
    """
    averages, values = [], []
    for average, value in zip(_tensors(ema), _tensors(network), strict=True):
        if average.is_floating_point():
            averages.append(average)
            values.append(value)
        else:
            average.copy_(value)
    get_ema_multi_avg_fn(decay)(averages, values, 0)  # type: ignore[no-untyped-call]


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*(parameter.detach() for parameter in network.parameters()), *network.buffers()]
