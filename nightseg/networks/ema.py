"""The running mean of a network's weights over its last steps: smoother than the last weights, and often better.

(Polyak and Juditsky 1992; as an exponential mean in mean teachers, arXiv 1703.01780.)
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)


def average_of(network: Network) -> Network:
    """A copy that `update_average` keeps; it is never trained itself and stays in evaluation mode."""
    average = copy.deepcopy(network).requires_grad_(False)
    average.eval()
    return average


def decay_of_step(decay: float, step: int) -> float:
    """What step 0, 1, ... keeps of the mean: little at first, or the start would weigh for 1 / (1 - decay) steps."""
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) network, for weights and statistics of batch norms; counters are copied.

    Statistics belong to the weights they were measured with, so they are averaged alike.
    """
    means, values = [], []
    for mean, value in zip(_tensors(average), _tensors(network), strict=True):
        if mean.is_floating_point():
            means.append(mean)
            values.append(value)
        else:
            mean.copy_(value)
    torch._foreach_lerp_(means, values, 1 - decay)


def _tensors(network: nn.Module) -> list[torch.Tensor]:
    return [*(parameter.detach() for parameter in network.parameters()), *network.buffers()]
