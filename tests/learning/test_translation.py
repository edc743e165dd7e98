"""UNIT's loss terms against plain loops, and a few steps of tiny networks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nightseg.learning.translation import (
    TermWeights,
    discriminator_loss,
    generator_loss,
    latent_noise,
)
from nightseg.networks.unit import Discriminators, Generators, LatentNoise, Translation

CPU = torch.device("cpu")
IMAGES = ("day_from_day", "night_from_night", "night_from_day", "day_from_night", "day_cycled", "night_cycled")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def random_translation() -> Translation:
    fields = {
        name: torch.rand(2, 3, 4, 4) * 2 - 1 if name in IMAGES else torch.randn(2, 4, 1, 1)
        for name in Translation._fields
    }
    return Translation(**fields)


def judges(day: Tensor, night: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Two scales, each a fixed function of the image."""
    return [day[:, :1] * 2, day[:, 1:2, ::2, ::2] + 1], [night[:, :1] - 1, night[:, 2:, ::2, ::2]]


def features(images: Tensor) -> list[Tensor]:
    return [images[:, :2] * 3, images[:, 2:, ::2, ::2] ** 2]


def loop_mean(function: object, *tensors: Tensor) -> float:
    """Mean of function over the elements, one at a time."""
    values = [function(*each) for each in zip(*(t.flatten().tolist() for t in tensors), strict=True)]  # type: ignore[operator]
    return sum(values) / len(values)


def test_discriminator_terms_against_plain_loops() -> None:
    day, night, made = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), random_translation()
    losses = discriminator_loss(judges, day, night, made)
    real, fake = judges(day, night), judges(made.day_from_night, made.night_from_day)
    expected = [
        sum(
            loop_mean(lambda s: s * s, fake[domain][scale]) + loop_mean(lambda s: (s - 1) ** 2, real[domain][scale])
            for scale in (0, 1)
        )
        for domain in (0, 1)
    ]
    assert [losses.day.item(), losses.night.item()] == pytest.approx(expected, rel=1e-6)
    assert losses.total.item() == pytest.approx(sum(expected), abs=1e-6)


def test_generator_terms_against_plain_loops() -> None:
    day, night, made = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), random_translation()
    weights = TermWeights(adversarial=1.5, reconstruction=10.0, kl=0.01, cycle=7.0, cycle_kl=0.02, perceptual=0.5)
    losses = generator_loss(judges, features, day, night, made, weights)
    scores = judges(made.day_from_night, made.night_from_day)

    def adversarial(domain: int) -> float:
        return sum(loop_mean(lambda s: (s - 1) ** 2, score) for score in scores[domain])

    def absolute(first: Tensor, second: Tensor) -> float:
        return loop_mean(lambda a, b: abs(a - b), first, second)

    def squared(latent: Tensor | None) -> float:
        assert latent is not None
        return loop_mean(lambda h: h * h, latent)

    def perceptual(translated: Tensor, source: Tensor) -> float:
        pairs = zip(features(translated), features(source), strict=True)
        return sum(loop_mean(lambda a, b: (a - b) ** 2, a, b) for a, b in pairs) / 2

    assert made.day_cycled is not None and made.night_cycled is not None
    expected = {
        "adversarial_day": adversarial(0),
        "adversarial_night": adversarial(1),
        "reconstruction_day": absolute(made.day_from_day, day),
        "reconstruction_night": absolute(made.night_from_night, night),
        "kl_day": squared(made.latent_day),
        "kl_night": squared(made.latent_night),
        "cycle_day": absolute(made.day_cycled, day),
        "cycle_night": absolute(made.night_cycled, night),
        "cycle_kl_day": squared(made.latent_day_again),
        "cycle_kl_night": squared(made.latent_night_again),
        "perceptual_day": perceptual(made.day_from_night, night),
        "perceptual_night": perceptual(made.night_from_day, day),
    }
    found = {name: value.item() for name, value in losses._asdict().items()}
    total = found.pop("total")
    assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)
    weighted = sum(
        weight * (expected[f"{name}_day"] + expected[f"{name}_night"]) for name, weight in weights._asdict().items()
    )
    assert total == pytest.approx(weighted, rel=1e-6)


def test_left_out_terms_are_zero() -> None:
    made = random_translation()._replace(day_cycled=None, night_cycled=None)
    day = torch.rand(2, 3, 4, 4)
    losses = generator_loss(judges, None, day, day, made, TermWeights())
    assert losses.cycle_day == losses.cycle_kl_night == losses.perceptual_day == 0
    assert TermWeights().needs_cycle and not TermWeights(cycle=0.0, cycle_kl=0.0).needs_cycle


def test_the_discriminators_step_leaves_the_generators_alone() -> None:
    generators, discriminators = Generators(2, 1), Discriminators(2, 1)
    day, night = torch.rand(2, 2, 3, 16, 16)
    made = generators(day, night, LatentNoise(*torch.zeros(4, 2, 8, 4, 4)))
    discriminator_loss(discriminators, day, night, made).total.backward()
    assert all(parameter.grad is None for parameter in generators.parameters())
    assert all(parameter.grad is not None for parameter in discriminators.parameters())
    discriminators.requires_grad_(False)
    before = [parameter.grad.clone() for parameter in discriminators.parameters() if parameter.grad is not None]
    generator_loss(discriminators, None, day, night, made, TermWeights()).total.backward()
    after = [parameter.grad for parameter in discriminators.parameters() if parameter.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is not None for parameter in generators.parameters())


def test_noise_is_a_function_of_seed_iteration_and_slot() -> None:
    shape = (16, 8, 8)
    both = latent_noise(3, 5, [0, 1], shape, CPU)
    second = latent_noise(3, 5, [1], shape, CPU)
    for whole, part in zip(both, second, strict=True):
        assert whole.shape == (2, *shape)
        assert torch.equal(whole[1:], part)
    others = [both.day[0], both.day[1], both.night[0], both.day_again[0], both.night_again[0]]
    others += [latent_noise(3, 6, [0], shape, CPU).day[0], latent_noise(4, 5, [0], shape, CPU).day[0]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(others, 2))
    assert torch.stack(others).std().item() == pytest.approx(1.0, abs=0.05)


def test_loss_falls_in_twenty_steps() -> None:
    generators, discriminators = Generators(4, 1), Discriminators(4, 1)
    optimizer = torch.optim.Adam(generators.parameters(), 2e-3, betas=(0.5, 0.999))
    judge = torch.optim.Adam(discriminators.parameters(), 2e-3, betas=(0.5, 0.999))
    day = torch.linspace(-0.2, 1, 16).expand(2, 3, 16, 16)
    night = torch.linspace(-1, -0.6, 16).view(16, 1).expand(2, 3, 16, 16)
    history = []
    for iteration in range(20):
        made = generators(day, night, latent_noise(0, iteration, [0, 1], (16, 4, 4), CPU))
        judged = discriminator_loss(discriminators, day, night, made)
        judge.zero_grad()
        judged.total.backward()
        judge.step()
        discriminators.requires_grad_(False)
        losses = generator_loss(discriminators, None, day, night, made, TermWeights())
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        discriminators.requires_grad_(True)
        history.append((judged.total.item(), losses.total.item()))
    assert history[-1][0] < 0.9 * history[0][0]
    assert history[-1][1] < 0.7 * history[0][1]
