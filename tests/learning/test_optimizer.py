"""What is decayed and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nightseg.learning.optimizer import build_optimizer


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_only_weights_of_convolutions_are_decayed(kind: str) -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1))
    optimizer = build_optimizer(network, kind, learning_rate=0.1, momentum=0.9, weight_decay=0.5)
    decayed, free = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(1, 1, 3, 3)]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0.0)
    assert sum(p.numel() for p in free["params"]) == 3


def test_sgd_step_is_its_formula() -> None:
    network = nn.Linear(1, 1)
    before = network.weight.detach().clone()
    optimizer = build_optimizer(network, "sgd", learning_rate=0.1, momentum=0.9, weight_decay=0.5)
    network.weight.grad, network.bias.grad = torch.ones(1, 1), torch.zeros(1)
    optimizer.step()
    assert torch.allclose(network.weight, before - 0.1 * (1 + 0.5 * before))
