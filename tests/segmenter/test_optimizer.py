"""What is decayed and what is not, and how fast each part learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nightseg.segmenter.optimizer import build_optimizer, set_learning_rate

RULES = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.5}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.GroupNorm(1, 1), nn.Conv2d(1, 2, 1))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_only_weights_of_convolutions_are_decayed(kind: str) -> None:
    decayed, free = build_optimizer(network(), kind, **RULES).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(1, 1, 3, 3), (2, 1, 1, 1)]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0.0)
    assert sum(p.numel() for p in free["params"]) == 1 + 2 + 2 + 2


def test_biases_of_convolutions_are_decayed_on_demand_and_those_of_norms_never() -> None:
    decayed, free = build_optimizer(network(), "sgd", **RULES, decay_biases=True).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(1, 1, 3, 3), (1,), (2, 1, 1, 1), (2,)]
    assert sum(p.numel() for p in free["params"]) == 4


def test_each_part_has_its_own_rate_and_no_parameter_is_lost() -> None:
    parts = network()
    optimizer = build_optimizer(parts, "adamw", **RULES, encoder=parts[0], encoder_rate=0.1, head_rate=10.0)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(list(parts.parameters()))
    assert [found[id(p)]["lr"] for p in parts[0].parameters()] == pytest.approx([0.01, 0.01])
    assert {found[id(p)]["lr"] for part in parts[1:] for p in part.parameters()} == {1.0}
    assert [found[id(p)]["weight_decay"] for p in parts[0].parameters()] == [0.5, 0.0]
    set_learning_rate(optimizer, 0.02)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.002, 0.2])
    saved = optimizer.state_dict()
    again = build_optimizer(parts, "adamw", **RULES, encoder=parts[0], encoder_rate=0.1, head_rate=10.0)
    again.load_state_dict(saved)
    assert [group["rate"] for group in again.param_groups] == [group["rate"] for group in optimizer.param_groups]


def test_sgd_step_is_its_formula() -> None:
    line = nn.Linear(1, 1)
    before = line.weight.detach().clone()
    optimizer = build_optimizer(line, "sgd", **RULES)
    for _ in range(2):
        line.weight.grad, line.bias.grad = torch.ones(1, 1), torch.zeros(1)
        optimizer.step()
    first = 1 + 0.5 * before
    after = before - 0.1 * first
    second = 0.9 * first + 1 + 0.5 * after
    assert torch.allclose(line.weight, after - 0.1 * second)


def test_adamw_step_is_its_formula() -> None:
    line = nn.Linear(1, 1)
    before = line.weight.detach().clone()
    optimizer = build_optimizer(line, "adamw", **RULES)
    line.weight.grad, line.bias.grad = torch.full((1, 1), 3.0), torch.zeros(1)
    optimizer.step()
    assert torch.allclose(line.weight, before * (1 - 0.1 * 0.5) - 0.1)  # m / sqrt(v) of the first step is the sign
