"""What is decayed and what is not, how fast each part learns, and the learning rate at steps where it is known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from nightseg.segmenter.encoders import build_encoder
from nightseg.segmenter.optimizer import (
    build_optimizer,
    learning_rate_of,
    linear_warmup,
    set_learning_rate,
    stage_rates,
)
from nightseg.segmenter.settings import Training
from nightseg.storage import UserError
from tests.rounding import assert_near

KINDS: list[dict[str, Any]] = [{"decay": "poly"}, {"decay": "cosine"}, {"decay": "step", "decay_at": [0.5, 0.9]}]


def rules(optimizer: str, **changed: Any) -> Training:
    return Training(optimizer=optimizer, learning_rate=0.1, momentum=0.9, weight_decay=0.5, **changed)  # type: ignore[arg-type]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.GroupNorm(1, 1), nn.Conv2d(1, 2, 1))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_only_weights_of_convolutions_are_decayed(kind: str) -> None:
    decayed, free = build_optimizer(network(), rules(kind)).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(1, 1, 3, 3), (2, 1, 1, 1)]
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0.0)
    assert sum(p.numel() for p in free["params"]) == 1 + 2 + 2 + 2


def test_biases_of_convolutions_are_decayed_on_demand_and_those_of_norms_never() -> None:
    decayed, free = build_optimizer(network(), rules("sgd", decay_biases=True)).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(1, 1, 3, 3), (1,), (2, 1, 1, 1), (2,)]
    assert sum(p.numel() for p in free["params"]) == 4


def test_each_part_has_its_own_rate_and_no_parameter_is_lost() -> None:
    parts = network()
    optimizer = build_optimizer(parts, rules("adamw", encoder_rate=0.1, head_rate=10.0), encoder=parts[0])
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(list(parts.parameters()))
    assert [found[id(p)]["lr"] for p in parts[0].parameters()] == pytest.approx([0.01, 0.01])
    assert {found[id(p)]["lr"] for part in parts[1:] for p in part.parameters()} == {1.0}
    assert [found[id(p)]["weight_decay"] for p in parts[0].parameters()] == [0.5, 0.0]
    set_learning_rate(optimizer, 0.02)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == pytest.approx([0.002, 0.2])
    saved = optimizer.state_dict()
    again = build_optimizer(parts, rules("adamw", encoder_rate=0.1, head_rate=10.0), encoder=parts[0])
    again.load_state_dict(saved)
    assert [group["rate"] for group in again.param_groups] == [group["rate"] for group in optimizer.param_groups]


def test_sgd_step_is_its_formula() -> None:
    line = nn.Linear(1, 1)
    before = line.weight.detach().clone()
    optimizer = build_optimizer(line, rules("sgd"))
    for _ in range(2):
        line.weight.grad, line.bias.grad = torch.ones(1, 1), torch.zeros(1)
        optimizer.step()
    first = 1 + 0.5 * before
    after = before - 0.1 * first
    second = 0.9 * first + 1 + 0.5 * after
    assert_near(line.weight.detach(), after - 0.1 * second, terms=16, magnitude=1.0)


def test_adamw_step_is_its_formula() -> None:
    line = nn.Linear(1, 1)
    before = line.weight.detach().clone()
    optimizer = build_optimizer(line, rules("adamw"))
    line.weight.grad, line.bias.grad = torch.full((1, 1), 3.0), torch.zeros(1)
    optimizer.step()
    # m / sqrt(v) of the first step is the sign; a weight and its step are below 1
    assert_near(line.weight.detach(), before * (1 - 0.1 * 0.5) - 0.1, terms=16, magnitude=1.0)


def test_warmup_is_linear_and_ends_at_one() -> None:
    assert linear_warmup(0, 100) == pytest.approx(1e-3)
    assert linear_warmup(50, 100) == pytest.approx(0.5005)
    assert linear_warmup(100, 100) == 1
    assert linear_warmup(10_000, 100) == 1
    assert linear_warmup(0, 0) == 1


def decayed(steps: Iterable[int], total: int, **kind: Any) -> list[float]:
    training = Training(learning_rate=1.0, warmup_steps=0, **kind)
    return [learning_rate_of(training, step, total) for step in steps]


def test_poly_decay_with_power_one_is_a_line_and_never_reaches_zero() -> None:
    assert decayed(range(4), 4, decay="poly", poly_power=1.0) == [1, 0.75, 0.5, 0.25]
    assert decayed([50], 100, decay="poly", poly_power=0.9) == pytest.approx([0.5**0.9])
    assert decayed([3], 4, decay="poly", poly_power=0.0) == [1]


def test_cosine_decay_is_half_a_cosine() -> None:
    assert decayed((0, 2, 3, 4), 6, decay="cosine") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert 0 < decayed([999], 1000, decay="cosine")[0] < 1e-5


def test_step_decay_falls_where_detectron2_does() -> None:
    """STEPS (60000, 80000) of MAX_ITER 90000, GAMMA 0.1."""
    shares = decayed((0, 59_999, 60_000, 79_999, 80_000, 89_999), 90_000, decay="step")
    assert shares == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_rises_then_falls_once(kind: dict[str, Any]) -> None:
    training = Training(learning_rate=0.01, warmup_steps=20, **kind)
    rates = [learning_rate_of(training, step, 200) for step in range(200)]
    top = rates.index(max(rates))
    assert 19 <= top <= 20
    assert rates[0] == pytest.approx(1e-5, rel=1e-2)
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] <= 1.01e-4


def test_early_stages_learn_slower_by_the_layer_decay() -> None:
    body = nn.Module()
    for name in ("conv1", "layer1", "layer2", "layer3", "rescale"):
        body.add_module(name, nn.Linear(1, 1, bias=False))
    head = nn.Linear(1, 1, bias=False)
    network = nn.ModuleDict({"body": body, "head": head})
    optimizer = build_optimizer(network, rules("adamw", layer_decay=0.5, encoder_rate=0.1), encoder=body)
    found = {id(p): group["rate"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: found[id(part.weight)] for name, part in [*body.named_children(), ("head", head)]}
    assert rates == {"conv1": 0.0125, "layer1": 0.025, "layer2": 0.05, "layer3": 0.1, "rescale": 0.1, "head": 1.0}


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("resnet18", 4),
        ("efficientnet_lite0", 7),
        ("timm/convnext_atto", 4),
        ("timm/vit_tiny_patch16_224", 12),
        ("timm/regnetx_002", 4),
        ("timm/densenet121", 4),
        ("timm/dla46_c", 7),
    ],
)
def test_stages_of_every_kind_of_encoder_are_found(name: str, stages: int) -> None:
    rates = sorted(set(stage_rates(build_encoder(name), 0.5).values()))
    assert rates == [0.5**depth for depth in range(stages, -1, -1)]


def test_an_encoder_without_known_stages_has_no_layer_decay() -> None:
    plain = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert set(stage_rates(plain, 1.0).values()) == {1.0}
    with pytest.raises(UserError, match="layer_decay"):
        stage_rates(plain, 0.9)


def test_tokens_and_positions_of_transformers_are_not_decayed() -> None:
    body = build_encoder("timm/vit_tiny_patch16_224")
    free = {
        id(p) for g in build_optimizer(body, rules("adamw")).param_groups if not g["weight_decay"] for p in g["params"]
    }
    assert {name for name, p in body.named_parameters() if id(p) in free and p.ndim > 1} == {
        "features.model.cls_token", "features.model.pos_embed",
    }  # fmt: skip
