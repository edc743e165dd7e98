"""UNIT's loss terms against plain loops, and a few steps of tiny networks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from nightseg.unit.loss import (
    TERMS,
    TermMeans,
    TermWeights,
    adversarial_loss,
    cross_entropy,
    discriminator_loss,
    generator_loss,
    latent_noise,
    least_squares,
    loss_of_a_coin,
)
from nightseg.unit.network import Translation

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
    assert [losses.day.item(), losses.night.item()] == pytest.approx(expected, abs=1e-6)
    assert losses.total.item() == pytest.approx(sum(expected), abs=1e-6)

    def gap(domain: int) -> float:
        pairs = zip(real[domain], fake[domain], strict=True)
        return sum(loop_mean(lambda r, f: abs(r - f), first, second) for first, second in pairs) / 2

    assert [losses.gap_day.item(), losses.gap_night.item()] == pytest.approx([gap(0), gap(1)], abs=1e-6)
    weighted = discriminator_loss(judges, day, night, made, weight=3.0)
    assert weighted.total.item() == pytest.approx(3 * sum(expected), rel=1e-6) and weighted.day == losses.day


def test_cross_entropy_against_plain_loops() -> None:
    scores = [torch.randn(2, 1, 3, 4) * 3, torch.randn(2, 1, 2, 2)]
    for aim in (0.0, 1.0):

        def nats(score: float, aim: float = aim) -> float:
            chance = 1 / (1 + math.exp(-score))
            return -(aim * math.log(chance) + (1 - aim) * math.log(1 - chance))

        expected = sum(loop_mean(nats, score) for score in scores)
        assert cross_entropy(scores, aim).item() == pytest.approx(expected, abs=1e-6)
    assert cross_entropy([torch.tensor([200.0])], 0.0).item() == 200.0  # sure and wrong: no infinity
    day, night, made = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), random_translation()
    judged = discriminator_loss(judges, day, night, made, cross_entropy)
    real, fake = judges(day, night)[0], judges(made.day_from_night, made.night_from_day)[0]
    assert judged.day.item() == pytest.approx((cross_entropy(real, 1) + cross_entropy(fake, 0)).item(), abs=1e-6)
    losses = generator_loss(judges, None, day, night, made, TermWeights(), cross_entropy)
    assert losses.adversarial_day.item() == pytest.approx(cross_entropy(fake, 1).item(), abs=1e-6)


def test_a_coin_scores_one_half_and_loses_what_is_said() -> None:
    for name, score in (("least_squares", 0.5), ("cross_entropy", 0.0)):
        loss, scores = adversarial_loss(name), [torch.full((2, 1, 3, 3), score)]
        assert (loss(scores, 0.0) + loss(scores, 1.0)).item() == pytest.approx(loss_of_a_coin(name), rel=1e-6)
    assert adversarial_loss("least_squares") is least_squares


def test_means_of_terms_over_iterations_and_workers() -> None:
    day, night = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    made = [random_translation(), random_translation()]
    means, rows = TermMeans(CPU), []
    for one in made:
        both = discriminator_loss(judges, day, night, one), generator_loss(judges, None, day, night, one, TermWeights())
        means.add(*both)
        rows.append(dict(zip(TERMS, [term.item() for losses in both for term in losses], strict=True)))
    sums, count = means.sums.clone(), means.count
    expected = {name: (rows[0][name] + rows[1][name]) / 2 for name in TERMS}
    assert means.close(lambda tensor: tensor, 1) == pytest.approx(expected, rel=1e-6)
    assert means.count == 0 and not means.sums.any()
    twice = TermMeans(CPU, sums, count).close(lambda tensor: 2 * tensor, 2)  # another worker has as much
    assert twice == pytest.approx(expected, rel=1e-6)
    assert {"discriminator_total", "discriminator_gap_night", "total", "perceptual_day"} <= set(TERMS)


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
        weight * (expected[f"{name}_day"] + expected[f"{name}_night"])
        for name, weight in weights._asdict().items()
        if name != "discriminator"
    )
    assert total == pytest.approx(weighted, rel=1e-6)


def test_left_out_terms_are_zero() -> None:
    made = random_translation()._replace(day_cycled=None, night_cycled=None)
    day = torch.rand(2, 3, 4, 4)
    losses = generator_loss(judges, None, day, day, made, TermWeights())
    assert losses.cycle_day == losses.cycle_kl_night == losses.perceptual_day == 0
    assert TermWeights().needs_cycle and not TermWeights(cycle=0.0, cycle_kl=0.0).needs_cycle


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
