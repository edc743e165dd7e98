"""UNIT's loss terms against plain loops; one step of each side: who learns, who does not; a few steps of tiny ones."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nightseg.unit.loss import (
    TERMS,
    Networks,
    TermMeans,
    adversarial_loss,
    build_networks,
    chance_loss,
    cross_entropy,
    discriminator_loss,
    discriminator_step,
    generator_loss,
    generator_step,
    latent_noise,
    least_squares,
    parts_of_batch,
    set_learning_rate,
    step_in_parts,
    stepped_rate,
)
from nightseg.unit.network import LatentNoise, Translation
from nightseg.unit.settings import LossWeights, Translator
from tests.rounding import assert_near, rounding

NEAR = rounding(2 * 96)
"""Of sums of a few means, each of no more than 96 elements; all of them positive."""

CPU = torch.device("cpu")
FLOAT32 = torch.autocast("cpu", torch.bfloat16, enabled=False)
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


def discriminators(day: Tensor, night: Tensor) -> tuple[list[Tensor], list[Tensor]]:
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
    losses = discriminator_loss(discriminators, day, night, made)
    real, fake = discriminators(day, night), discriminators(made.day_from_night, made.night_from_day)
    expected = [
        sum(
            loop_mean(lambda s: s * s, fake[domain][scale]) + loop_mean(lambda s: (s - 1) ** 2, real[domain][scale])
            for scale in (0, 1)
        )
        for domain in (0, 1)
    ]
    assert [losses.day.item(), losses.night.item()] == pytest.approx(expected, rel=NEAR)
    assert losses.total.item() == pytest.approx(sum(expected), rel=NEAR)

    def gap(domain: int) -> float:
        pairs = zip(real[domain], fake[domain], strict=True)
        return sum(loop_mean(lambda r, f: abs(r - f), first, second) for first, second in pairs) / 2

    assert [losses.gap_day.item(), losses.gap_night.item()] == pytest.approx([gap(0), gap(1)], rel=NEAR)
    weighted = discriminator_loss(discriminators, day, night, made, weight=3.0)
    assert weighted.total.item() == pytest.approx(3 * sum(expected), rel=NEAR) and weighted.day == losses.day


def test_cross_entropy_against_plain_loops() -> None:
    scores = [torch.randn(2, 1, 3, 4) * 3, torch.randn(2, 1, 2, 2)]
    for aim in (0.0, 1.0):

        def nats(score: float, aim: float = aim) -> float:
            chance = 1 / (1 + math.exp(-score))
            return -(aim * math.log(chance) + (1 - aim) * math.log(1 - chance))

        expected = sum(loop_mean(nats, score) for score in scores)
        assert cross_entropy(scores, aim).item() == pytest.approx(expected, rel=NEAR)
    assert cross_entropy([torch.tensor([200.0])], 0.0).item() == 200.0  # sure and wrong: no infinity
    day, night, made = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), random_translation()
    of_discriminators = discriminator_loss(discriminators, day, night, made, cross_entropy)
    real, fake = discriminators(day, night)[0], discriminators(made.day_from_night, made.night_from_day)[0]
    assert of_discriminators.day.item() == pytest.approx(
        (cross_entropy(real, 1) + cross_entropy(fake, 0)).item(), rel=NEAR
    )
    losses = generator_loss(discriminators, None, day, night, made, LossWeights(), cross_entropy)
    assert losses.adversarial_day.item() == pytest.approx(cross_entropy(fake, 1).item(), rel=NEAR)


def test_the_loss_at_chance_level() -> None:
    for name, score in (("least_squares", 0.5), ("cross_entropy", 0.0)):
        loss, scores = adversarial_loss(name), [torch.full((2, 1, 3, 3), score)]
        assert (loss(scores, 0.0) + loss(scores, 1.0)).item() == pytest.approx(chance_loss(name), rel=NEAR)
    assert adversarial_loss("least_squares") is least_squares


def test_means_of_terms_over_iterations_and_workers() -> None:
    day, night = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    made = [random_translation(), random_translation()]
    means, rows = TermMeans(CPU), []
    for one in made:
        both = (
            discriminator_loss(discriminators, day, night, one),
            generator_loss(discriminators, None, day, night, one, LossWeights()),
        )
        means.add(*both)
        rows.append(dict(zip(TERMS, [term.item() for losses in both for term in losses], strict=True)))
    sums, count = means.sums.clone(), means.count
    expected = {name: (rows[0][name] + rows[1][name]) / 2 for name in TERMS}
    assert means.close(lambda tensor: tensor, 1) == pytest.approx(expected, rel=NEAR)
    assert means.count == 0 and not means.sums.any()
    twice = TermMeans(CPU, sums, count).close(lambda tensor: 2 * tensor, 2)  # another worker has as much
    assert twice == pytest.approx(expected, rel=NEAR)
    assert {"discriminator_total", "discriminator_gap_night", "total", "perceptual_day"} <= set(TERMS)


def test_generator_terms_against_plain_loops() -> None:
    day, night, made = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), random_translation()
    weights = LossWeights(adversarial=1.5, reconstruction=10.0, kl=0.01, cycle=7.0, cycle_kl=0.02, perceptual=0.5)
    losses = generator_loss(discriminators, features, day, night, made, weights)
    scores = discriminators(made.day_from_night, made.night_from_day)

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
    assert found == pytest.approx(expected, rel=NEAR)
    weighted = sum(
        weight * (expected[f"{name}_day"] + expected[f"{name}_night"])
        for name, weight in weights.model_dump().items()
        if name != "discriminator"
    )
    assert total == pytest.approx(weighted, rel=NEAR)


def test_left_out_terms_are_zero() -> None:
    made = random_translation()._replace(day_cycled=None, night_cycled=None)
    day = torch.rand(2, 3, 4, 4)
    losses = generator_loss(discriminators, None, day, day, made, LossWeights())
    assert losses.cycle_day == losses.cycle_kl_night == losses.perceptual_day == 0
    assert LossWeights().needs_cycle and not LossWeights(cycle=0.0, cycle_kl=0.0).needs_cycle


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


# -- steps ------------------------------------------------------------------------------------------------------------


def tiny(**changes: Any) -> Translator:
    settings: dict[str, Any] = {
        "width": 4,
        "res_blocks": 1,
        "discriminator_width": 4,
        "discriminator_scales": 1,
        "learning_rate": 2e-3,
    }
    return Translator(day="day", night="night", **settings | changes)


SETTINGS = tiny()


def networks_of(settings: Translator, seed: int = 3) -> Networks:
    return build_networks(settings, seed, CPU)


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
    networks = networks_of(SETTINGS)
    given = (*crops(), translation_of(networks), SETTINGS, FLOAT32)
    generators, discriminators = copies(networks.generators), copies(networks.discriminators)
    discriminator_step(networks, networks.discriminators, *given)
    assert not any(moved(networks.generators, generators)) and all(moved(networks.discriminators, discriminators))
    assert all(parameter.grad is None for parameter in networks.generators.parameters())

    networks.discriminator_optimizer.zero_grad(set_to_none=True)
    discriminators = copies(networks.discriminators)
    asked: list[bool] = []

    def scores_of(day: Tensor, night: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        asked.extend(parameter.requires_grad for parameter in networks.discriminators.parameters())
        scores: tuple[list[Tensor], list[Tensor]] = networks.discriminators(day, night)
        return scores

    generator_step(networks, scores_of, None, *given)
    assert asked and not any(asked)
    assert all(parameter.grad is None for parameter in networks.discriminators.parameters())
    assert not any(moved(networks.discriminators, discriminators)) and all(moved(networks.generators, generators))
    assert all(parameter.requires_grad for parameter in networks.discriminators.parameters())


def test_the_translations_that_are_scored_carry_no_gradient_to_the_generators() -> None:
    networks = networks_of(SETTINGS)
    made = translation_of(networks)
    seen: list[Tensor] = []

    def scores_of(day: Tensor, night: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        seen.extend((day, night))
        scores: tuple[list[Tensor], list[Tensor]] = networks.discriminators(day, night)
        return scores

    discriminator_step(networks, scores_of, *crops(), made, SETTINGS, FLOAT32)
    assert made.day_from_night.requires_grad and not any(images.requires_grad for images in seen)


def test_a_step_is_adams_on_the_weighted_loss() -> None:
    """The discriminators' step, done by hand: gradient, L2 decay, Adam's first step."""
    settings = tiny(weight_decay=0.01, weights=LossWeights(discriminator=3.0))
    networks = networks_of(settings)
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
    discriminator_step(networks, networks.discriminators, day, night, made, settings, FLOAT32)
    for parameter, aim, gradient in zip(parameters, expected, gradients, strict=True):
        # Only where rounding of the gradient, a sum over some 2,000 places and layers, may turn its sign a step of Adam
        # depends on it: by its share of what is divided by itself, two steps at most.
        error = rounding(2000) * gradient.abs().max()
        slack = 2e-3 * (2 * error / (gradient + 0.01 * parameter.detach()).abs().clamp_min(error))
        assert ((parameter.detach() - aim).abs() <= slack + rounding(8)).all()


@pytest.mark.parametrize("side", ["generators", "discriminators"])
@pytest.mark.parametrize(("world_size", "count"), [(1, 1), (1, 3), (2, 2), (3, 1)])
def test_a_step_in_parts_is_that_of_the_whole_batch(side: str, world_size: int, count: int) -> None:
    """Three crops, even shares or not. As DDP does it, by hand: what the workers move is averaged; one side stays."""
    day, night = (torch.cat((one, one[:1] * 0.3)).double() for one in crops())
    noise = LatentNoise(*(one.double() for one in latent_noise(0, 0, [0, 1, 2], (16, 4, 4), CPU)))

    def fresh() -> Networks:
        networks = networks_of(SETTINGS)
        for module in (networks.generators, networks.discriminators):
            module.double()
        rates = {name: float(name == side) for name in ("generators", "discriminators")}
        optimizers = {
            f"{name[:-1]}_optimizer": torch.optim.SGD(getattr(networks, name).parameters(), lr=rate)
            for name, rate in rates.items()
        }
        return networks._replace(**optimizers)  # type: ignore[arg-type]

    whole = fresh()
    before = copies(getattr(whole, side))
    made = whole.generators(day, night, noise)
    expected = (
        discriminator_step(whole, whole.discriminators, day, night, made, SETTINGS, FLOAT32),
        generator_step(whole, whole.discriminators, None, day, night, made, SETTINGS, FLOAT32),
    )
    terms, weights = [], []
    for rank in range(world_size):
        mine = slice(rank, None, world_size)
        share = (day[mine], night[mine], LatentNoise(*(one[mine] for one in noise)))
        networks = fresh()
        bare = networks.discriminators
        parts = parts_of_batch(*share, count, world_size, 3)
        assert [len(part.day_B3HW) for part in parts] == [1] * len(share[0]) if count > 1 else len(parts) == 1
        found = step_in_parts(networks, networks.generators, bare, bare, None, parts, SETTINGS, FLOAT32)
        terms.append(
            torch.stack([*found[0], *(found[1] if side == "generators" else ())])
        )  # else each has moved its own
        weights.append(copies(getattr(networks, side)))
    # Losses are float32 means of some 800 values; the rest is float64.
    assert_near(
        torch.stack(terms).mean(0), torch.stack([term for one in expected for term in one])[: len(terms[0])], 800
    )
    moves = torch.stack([vector(one) for one in weights]).mean(0) - vector(before)
    assert_near(moves, vector(copies(getattr(whole, side))) - vector(before), 800)


def vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def test_the_rate_is_that_of_steplr() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=4, gamma=0.5)
    for iteration in range(13):
        assert stepped_rate(0.3, iteration, 4) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    networks = networks_of(SETTINGS)
    set_learning_rate(networks, 0.125)
    for adam in (networks.generator_optimizer, networks.discriminator_optimizer):
        assert [group["lr"] for group in adam.param_groups] == [0.125]
        assert adam.param_groups[0]["betas"] == (0.5, 0.999)


def test_networks_follow_from_the_seed_and_their_state_brings_them_back() -> None:
    first, same, other = networks_of(SETTINGS), networks_of(SETTINGS), networks_of(SETTINGS, seed=4)
    assert not any(moved(first.generators, copies(same.generators)))
    assert any(moved(first.generators, copies(other.generators)))
    given = (*crops(), translation_of(first), SETTINGS, FLOAT32)
    discriminator_step(first, first.discriminators, *given)
    generator_step(first, first.discriminators, None, *given)
    other.load(first.state())
    assert not any(moved(first.generators, copies(other.generators)))
    assert other.generator_optimizer.state_dict()["state"][0]["step"] == 1
    assert first.first_not_finite() is None
    with torch.no_grad():
        next(first.ema.parameters())[0, 0, 0, 0] = float("inf")
    assert first.first_not_finite() == "ema.day_encoder.layers.0.weight"


@pytest.mark.parametrize(("adversarial", "shared_blocks"), [("least_squares", 0), ("cross_entropy", 1)])
def test_loss_falls_in_twenty_steps(adversarial: str, shared_blocks: int) -> None:
    settings = tiny(adversarial_loss=adversarial, shared_blocks=shared_blocks)
    networks = networks_of(settings)
    history = []
    for iteration in range(20):
        given = (*crops(), translation_of(networks, iteration), settings, FLOAT32)
        of_discriminators = discriminator_step(networks, networks.discriminators, *given)
        made = generator_step(networks, networks.discriminators, None, *given)
        history.append((of_discriminators.total.item(), made.total.item()))
    assert history[-1][0] < history[0][0]
    assert history[-1][1] < 0.7 * history[0][1]


def test_bfloat16_steps_keep_float32_weights_and_terms() -> None:
    networks, exact = networks_of(SETTINGS), networks_of(SETTINGS)
    terms = []
    for each, low in ((networks, True), (exact, False)):
        precision = torch.autocast("cpu", torch.bfloat16, enabled=low)
        with precision:
            made = translation_of(each)
        given = (*crops(), made, SETTINGS, precision)
        of_discriminators = discriminator_step(each, each.discriminators, *given)
        losses = generator_step(each, each.discriminators, None, *given)
        assert all(term.dtype == torch.float32 for term in (*of_discriminators, *losses))
        terms.append([term.item() for term in (*of_discriminators, *losses)])
    assert all(parameter.dtype == torch.float32 for parameter in networks.generators.parameters())
    assert terms[0] == pytest.approx(terms[1], rel=0.1, abs=0.02) and terms[0] != terms[1]
