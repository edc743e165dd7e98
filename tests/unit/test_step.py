"""One step of each side: who learns, who does not, at what rate; and a few steps of tiny networks."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from nightseg.unit.loss import TermWeights, cross_entropy, latent_noise, least_squares
from nightseg.unit.network import Translation
from nightseg.unit.step import (
    Networks,
    average,
    build_networks,
    compiled,
    discriminator_step,
    generator_step,
    set_learning_rate,
    stepped_rate,
)

CPU = torch.device("cpu")
FLOAT32 = torch.autocast("cpu", torch.bfloat16, enabled=False)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def tiny(**changes: Any) -> Networks:
    settings: dict[str, Any] = {
        "width": 4,
        "res_blocks": 1,
        "shared_blocks": 0,
        "discriminator_width": 4,
        "discriminator_scales": 1,
        "discriminator_norm": "none",
        "learning_rate": 2e-3,
        "weight_decay": 1e-4,
        "seed": 3,
        "device": CPU,
    }
    return build_networks(**settings | changes)


def crops() -> tuple[Tensor, Tensor]:
    day = torch.linspace(-0.2, 1, 16).expand(2, 3, 16, 16)
    return day, torch.linspace(-1, -0.6, 16).view(16, 1).expand(2, 3, 16, 16)


def translation_of(networks: Networks, iteration: int = 0) -> Translation:
    made: Translation = networks.generators(*crops(), latent_noise(0, iteration, [0, 1], (16, 4, 4), CPU))
    return made


def copies(module: torch.nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def moved(module: torch.nn.Module, before: list[Tensor]) -> list[bool]:
    return [not torch.equal(now, then) for now, then in zip(module.parameters(), before, strict=True)]


def test_each_step_moves_its_side_only_and_asks_the_other_for_no_gradient() -> None:
    networks = tiny()
    game = (*crops(), translation_of(networks), TermWeights(), least_squares, FLOAT32)
    generators, discriminators = copies(networks.generators), copies(networks.discriminators)
    discriminator_step(networks, networks.discriminators, *game)
    assert not any(moved(networks.generators, generators)) and all(moved(networks.discriminators, discriminators))
    assert all(parameter.grad is None for parameter in networks.generators.parameters())

    networks.discriminator_optimizer.zero_grad(set_to_none=True)
    discriminators = copies(networks.discriminators)
    asked: list[bool] = []

    def judges(day: Tensor, night: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        asked.extend(parameter.requires_grad for parameter in networks.discriminators.parameters())
        scores: tuple[list[Tensor], list[Tensor]] = networks.discriminators(day, night)
        return scores

    generator_step(networks, judges, None, *game)
    assert asked and not any(asked)
    assert all(parameter.grad is None for parameter in networks.discriminators.parameters())
    assert not any(moved(networks.discriminators, discriminators)) and all(moved(networks.generators, generators))
    assert all(parameter.requires_grad for parameter in networks.discriminators.parameters())


def test_the_translations_that_are_judged_carry_no_gradient_to_the_generators() -> None:
    networks = tiny()
    made = translation_of(networks)
    seen: list[Tensor] = []

    def judges(day: Tensor, night: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        seen.extend((day, night))
        scores: tuple[list[Tensor], list[Tensor]] = networks.discriminators(day, night)
        return scores

    discriminator_step(networks, judges, *crops(), made, TermWeights(), least_squares, FLOAT32)
    assert made.day_from_night.requires_grad and not any(images.requires_grad for images in seen)


def test_a_step_is_adams_on_the_weighted_loss() -> None:
    """The discriminators' step, done by hand: gradient, L2 decay, Adam's first step."""
    networks = tiny(weight_decay=0.01)
    made = translation_of(networks)
    day, night = crops()
    parameters = list(networks.discriminators.parameters())
    scores = networks.discriminators(
        torch.cat((day, made.day_from_night.detach())), torch.cat((night, made.night_from_day.detach()))
    )
    loss = sum((s[:2] - 1).square().mean() + s[2:].square().mean() for scales in scores for s in scales)
    gradients = torch.autograd.grad(3.0 * loss, parameters)
    expected = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        decayed = gradient + 0.01 * parameter.detach()
        expected.append(parameter.detach() - 2e-3 * decayed / (decayed.abs() + 1e-8))  # both moments corrected
    weights = TermWeights(discriminator=3.0)
    discriminator_step(networks, networks.discriminators, day, night, made, weights, least_squares, FLOAT32)
    for parameter, aim in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), aim, rtol=1e-4, atol=2e-5)


def test_the_rate_is_that_of_steplr() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    for iteration in range(13):
        assert stepped_rate(0.3, iteration, 4) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()
    networks = tiny()
    set_learning_rate(networks, 0.125)
    for adam in (networks.generator_optimizer, networks.discriminator_optimizer):
        assert [group["lr"] for group in adam.param_groups] == [0.125]
        assert adam.param_groups[0]["betas"] == (0.5, 0.999)


def test_the_average_is_the_running_mean_of_the_generators() -> None:
    networks = tiny()
    weights = next(networks.generators.parameters())
    begun = weights.detach().clone()
    for step in (1.0, 3.0):
        with torch.no_grad():
            weights.copy_(begun + step)
        average(networks, 0.75)
    # 0.75 (0.75 b + 0.25 (b + 1)) + 0.25 (b + 3) = b + 0.9375
    torch.testing.assert_close(next(networks.averaged.parameters()), begun + 0.9375)
    average(networks, 0.0)
    torch.testing.assert_close(next(networks.averaged.parameters()), begun + 3.0)


def test_networks_follow_from_the_seed_and_their_state_brings_them_back() -> None:
    first, same, other = tiny(), tiny(), tiny(seed=4)
    assert not any(moved(first.generators, copies(same.generators)))
    assert any(moved(first.generators, copies(other.generators)))
    game = (*crops(), translation_of(first), TermWeights(), least_squares, FLOAT32)
    discriminator_step(first, first.discriminators, *game)
    generator_step(first, first.discriminators, None, *game)
    other.load(first.state())
    assert not any(moved(first.generators, copies(other.generators)))
    assert other.generator_optimizer.state_dict()["state"][0]["step"] == 1
    assert first.first_not_finite() is None
    with torch.no_grad():
        next(first.averaged.parameters())[0, 0, 0, 0] = float("inf")
    assert first.first_not_finite() == "averaged.day_encoder.layers.0.weight"


@pytest.mark.parametrize(("adversarial", "shared_blocks"), [(least_squares, 0), (cross_entropy, 1)])
def test_loss_falls_in_twenty_steps(adversarial: Any, shared_blocks: int) -> None:
    networks = tiny(shared_blocks=shared_blocks)
    history = []
    for iteration in range(20):
        game = (*crops(), translation_of(networks, iteration), TermWeights(), adversarial, FLOAT32)
        judged = discriminator_step(networks, networks.discriminators, *game)
        made = generator_step(networks, networks.discriminators, None, *game)
        history.append((judged.total.item(), made.total.item()))
    assert history[-1][0] < history[0][0]
    assert history[-1][1] < 0.7 * history[0][1]


def test_bfloat16_steps_keep_float32_weights_and_terms() -> None:
    networks, exact = tiny(), tiny()
    terms = []
    for each, low in ((networks, True), (exact, False)):
        precision = torch.autocast("cpu", torch.bfloat16, enabled=low)
        with precision:
            made = translation_of(each)
        game = (*crops(), made, TermWeights(), least_squares, precision)
        judged = discriminator_step(each, each.discriminators, *game)
        losses = generator_step(each, each.discriminators, None, *game)
        assert all(term.dtype == torch.float32 for term in (*judged, *losses))
        terms.append([term.item() for term in (*judged, *losses)])
    assert all(parameter.dtype == torch.float32 for parameter in networks.generators.parameters())
    assert terms[0] == pytest.approx(terms[1], rel=0.1, abs=0.02) and terms[0] != terms[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch means to hide it
def test_compiled_networks_take_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as torch.compile traces, and run without its C++ compiler, which takes minutes."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = []
    for wanted in (False, True):
        networks = tiny()
        generators, judges = compiled(networks.generators, wanted), compiled(networks.discriminators, wanted)
        assert wanted == (generators is not networks.generators)
        made = generators(*crops(), latent_noise(0, 0, [0, 1], (16, 4, 4), CPU))
        game = (*crops(), made, TermWeights(), least_squares, FLOAT32)
        judged = discriminator_step(networks, judges, *game)
        losses = generator_step(networks, judges, None, *game)
        found.append([term.item() for term in (*judged, *losses)])
        assert "day_encoder.layers.0.weight" in networks.state()["generators"]
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6)
