"""The losses of UNIT (arXiv 1703.00848 section 3, with the weights of its 2018 code), and one step of either side.

The loss functions take networks and the images of one `Translation` and return NamedTuples of scalars: `total` is the
weighted sum that is minimised, every other field is the bare term. All terms are computed in float32.

Letters in tensor names: B batch, 3 RGB, H, W image size; C, h, w of the latent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nightseg.cluster.session import exchange
from nightseg.networks.ema import ema_of
from nightseg.unit.data import Stream, mix_seed
from nightseg.unit.network import Discriminators, Generators, LatentNoise, Translation
from nightseg.unit.settings import LossWeights, Translator
from nightseg.unit.start import load_start

Scores = Callable[[Tensor, Tensor], tuple[list[Tensor], list[Tensor]]]  # network.Discriminators, or its wrapper
Features = Callable[[Tensor], list[Tensor]]  # perceptual.PerceptualFeatures
Adversarial = Callable[[Sequence[Tensor], float], Tensor]  # how far scores are from an aim: below
AdversarialName = Literal["least_squares", "cross_entropy"]

ADAM_BETAS: Final = (0.5, 0.999)
LEARNING_RATE_FACTOR: Final = 0.5


class DiscriminatorLosses(NamedTuple):
    """Terms of the two discriminators; how differently they score real and translated patches."""

    total: Tensor
    day: Tensor
    night: Tensor
    gap_day: Tensor  # mean distance of the scores of a real and a translated patch: 0 when they are all the same
    gap_night: Tensor


class GeneratorLosses(NamedTuple):
    """Bare terms, named after the domain of the image they are about; `total` is weighted. Left-out terms are 0."""

    total: Tensor
    adversarial_day: Tensor
    adversarial_night: Tensor
    reconstruction_day: Tensor
    reconstruction_night: Tensor
    kl_day: Tensor
    kl_night: Tensor
    cycle_day: Tensor
    cycle_night: Tensor
    cycle_kl_day: Tensor
    cycle_kl_night: Tensor
    perceptual_day: Tensor
    perceptual_night: Tensor


TERMS: Final = tuple(f"discriminator_{name}" for name in DiscriminatorLosses._fields) + GeneratorLosses._fields


class TermMeans:
    """Sums of all terms (TERMS) since the last row of a history, kept on the device so that no step waits for them."""

    def __init__(self, device: torch.device, sums: Tensor | None = None, count: int = 0) -> None:
        self.sums = torch.zeros(len(TERMS), device=device) if sums is None else sums.to(device)
        self.count = count

    def add(self, of_discriminators: DiscriminatorLosses, of_generators: GeneratorLosses) -> None:
        self.sums += torch.stack([term.detach().float() for term in (*of_discriminators, *of_generators)])
        self.count += 1

    def close(self, over_workers: Callable[[Tensor], Tensor], num_workers: int) -> dict[str, float]:
        """Mean of every term over the iterations and all workers; counting begins again. `over_workers` sums."""
        means = over_workers(self.sums.clone()) / (num_workers * max(1, self.count))
        self.sums.zero_()
        self.count = 0
        return dict(zip(TERMS, means.tolist(), strict=True))


# -- terms ------------------------------------------------------------------------------------------------------------


def least_squares(scores: Sequence[Tensor], aim: float) -> Tensor:
    """Mean squared distance of the scores to `aim`, summed over the scales (LSGAN, arXiv 1611.04076 equation 9)."""
    return torch.stack([(score.float() - aim).square().mean() for score in scores]).sum()


def cross_entropy(scores: Sequence[Tensor], aim: float) -> Tensor:
    """Binary cross-entropy of sigmoid(score) against `aim`, in nats, summed over the scales (arXiv 1406.2661, with the
    generator's loss of its section 3: -log D)."""
    return torch.stack(
        [F.binary_cross_entropy_with_logits(score.float(), torch.full_like(score, aim).float()) for score in scores]
    ).sum()


def adversarial_loss(name: AdversarialName) -> Adversarial:
    """`least_squares` or `cross_entropy`."""
    return {"least_squares": least_squares, "cross_entropy": cross_entropy}[name]


def chance_loss(name: AdversarialName) -> float:
    """A discriminator's loss a scale at chance level: it cannot tell real from translated and says so."""
    return {"least_squares": 0.5, "cross_entropy": 2 * math.log(2)}[name]


def latent_kl(latent_BChw: Tensor) -> Tensor:
    """KL divergence of N(latent, 1) from N(0, 1) up to the factor 1/2, averaged over the elements: mean(latent^2)."""
    return latent_BChw.float().square().mean()


def absolute_error(found: Tensor, aim: Tensor) -> Tensor:
    """Mean absolute difference, of images in [-1, 1] for example."""
    return (found.float() - aim.float()).abs().mean()


def discriminator_loss(
    discriminators: Scores,
    day_B3HW: Tensor,
    night_B3HW: Tensor,
    translation: Translation,
    adversarial: Adversarial = least_squares,
    weight: float = 1.0,
) -> DiscriminatorLosses:
    """Real images aim at 1, translated ones (detached) at 0; one pass a discriminator over both halves."""
    day_scores, night_scores = discriminators(
        torch.cat((day_B3HW, translation.day_from_night.detach().to(day_B3HW.dtype))),
        torch.cat((night_B3HW, translation.night_from_day.detach().to(night_B3HW.dtype))),
    )
    terms, gaps = [], []
    for scores in (day_scores, night_scores):
        real, translated = zip(*(score.tensor_split(2) for score in scores), strict=True)
        terms.append(adversarial(translated, 0.0) + adversarial(real, 1.0))
        pairs = zip(real, translated, strict=True)
        gaps.append(torch.stack([absolute_error(first.detach(), second.detach()) for first, second in pairs]).mean())
    return DiscriminatorLosses(weight * (terms[0] + terms[1]), terms[0], terms[1], gaps[0], gaps[1])


def generator_loss(
    discriminators: Scores,
    features: Features | None,
    day_B3HW: Tensor,
    night_B3HW: Tensor,
    translation: Translation,
    weights: LossWeights,
    adversarial: Adversarial = least_squares,
) -> GeneratorLosses:
    """All terms of both generators; the caller freezes the discriminators (`requires_grad_(False)`).

    `features` None leaves the perceptual terms out; a `translation` made without the cycle leaves the cycle terms out.
    """
    day_scores, night_scores = discriminators(translation.day_from_night, translation.night_from_day)
    zero = day_B3HW.new_zeros(())
    terms = {
        "adversarial_day": adversarial(day_scores, 1.0),
        "adversarial_night": adversarial(night_scores, 1.0),
        "reconstruction_day": absolute_error(translation.day_from_day, day_B3HW),
        "reconstruction_night": absolute_error(translation.night_from_night, night_B3HW),
        "kl_day": latent_kl(translation.latent_day),
        "kl_night": latent_kl(translation.latent_night),
        **dict.fromkeys(("cycle_day", "cycle_night", "cycle_kl_day", "cycle_kl_night"), zero),
        **dict.fromkeys(("perceptual_day", "perceptual_night"), zero),
    }
    if translation.day_cycled is not None and translation.night_cycled is not None:
        assert translation.latent_day_again is not None and translation.latent_night_again is not None
        terms["cycle_day"] = absolute_error(translation.day_cycled, day_B3HW)
        terms["cycle_night"] = absolute_error(translation.night_cycled, night_B3HW)
        terms["cycle_kl_day"] = latent_kl(translation.latent_day_again)
        terms["cycle_kl_night"] = latent_kl(translation.latent_night_again)
    if features is not None:
        day, night = perceptual_terms(features, day_B3HW, night_B3HW, translation)
        terms["perceptual_day"], terms["perceptual_night"] = day, night
    total = zero
    for name in ("adversarial", "reconstruction", "kl", "cycle", "cycle_kl", "perceptual"):
        total = total + getattr(weights, name) * (terms[f"{name}_day"] + terms[f"{name}_night"])
    return GeneratorLosses(total=total, **terms)


def perceptual_terms(
    features: Features, day_B3HW: Tensor, night_B3HW: Tensor, translation: Translation
) -> tuple[Tensor, Tensor]:
    """Squared feature distance of each translated image to its SOURCE image, averaged over the feature maps.

    Returns (of the day images made from night, of the night images made from day).
    """
    with torch.no_grad():
        source = features(torch.cat((night_B3HW, day_B3HW)))
    translated = features(torch.cat((translation.day_from_night, translation.night_from_day)))
    day_terms, night_terms = [], []
    for map_2BChw, aim_2BChw in zip(translated, source, strict=True):
        from_night, from_day = F.mse_loss(map_2BChw, aim_2BChw, reduction="none").mean((1, 2, 3)).tensor_split(2)
        day_terms.append(from_night.mean())
        night_terms.append(from_day.mean())
    return torch.stack(day_terms).mean(), torch.stack(night_terms).mean()


def latent_noise(
    seed: int, iteration: int, slots: Sequence[int], shape_Chw: tuple[int, int, int], device: torch.device
) -> LatentNoise:
    """The noise of one iteration, a function of (seed, iteration, slot in the global batch) and the kind of device, so
    that a resumed or differently spread training sees the same noise."""
    generator = torch.Generator(device=device)
    draws = []
    for slot in slots:
        generator.manual_seed(mix_seed(seed, Stream.NOISE, iteration, slot))
        draws.append(torch.randn((4, *shape_Chw), generator=generator, device=device))
    return LatentNoise(*torch.stack(draws, dim=1))


# -- networks and their steps -----------------------------------------------------------------------------------------


class Networks(NamedTuple):
    """What is trained, and the two optimisers that do it."""

    generators: Generators
    discriminators: Discriminators
    generator_optimizer: torch.optim.Adam
    discriminator_optimizer: torch.optim.Adam
    ema: Generators  # of the generators: what the model becomes

    def state(self) -> dict[str, Any]:
        """Everything that a step changes."""
        return {name: part.state_dict() for name, part in self._asdict().items()}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, part in self._asdict().items():
            part.load_state_dict(state[name])

    def first_not_finite(self) -> str | None:
        """Name of a weight that is infinite or not a number, if there is one. Waits for the device."""
        modules = {"generators": self.generators, "ema": self.ema, "discriminators": self.discriminators}
        for side, module in modules.items():
            for name, parameter in module.named_parameters():
                if not bool(parameter.isfinite().all()):
                    return f"{side}.{name}"
        return None


def build_networks(settings: Translator, seed: int, device: torch.device) -> Networks:
    """New networks, the same on every worker because they follow from `seed` and the start, and their optimisers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(seed, Stream.WEIGHTS))
        generators = Generators(settings.width, settings.res_blocks, settings.shared_blocks)
        discriminators = Discriminators(
            settings.discriminator_width, settings.discriminator_scales, settings.discriminator_norm
        )
    if settings.start is not None:
        load_start(settings.start, generators, discriminators)
    optimizers = []
    for module in (generators, discriminators):
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizers.append(
            torch.optim.Adam(
                module.parameters(),
                lr=settings.learning_rate,
                betas=ADAM_BETAS,
                weight_decay=settings.weight_decay,
                fused=True,
            )
        )
    return Networks(generators, discriminators, optimizers[0], optimizers[1], ema_of(generators))


def stepped_rate(peak: float, iteration: int, step_every: int) -> float:
    """Learning rate of iteration 0, 1, ...: halved every `step_every` iterations (PyTorch's StepLR)."""
    return float(peak * LEARNING_RATE_FACTOR ** (iteration // step_every))


def set_learning_rate(networks: Networks, rate: float) -> None:
    for optimizer in (networks.generator_optimizer, networks.discriminator_optimizer):
        for group in optimizer.param_groups:
            group["lr"] = rate


def discriminator_step(
    networks: Networks,
    discriminators: Scores,
    day_B3HW: Tensor,
    night_B3HW: Tensor,
    translation: Translation,
    settings: Translator,
    precision: torch.autocast,
) -> DiscriminatorLosses:
    """One update of both discriminators, given as the cluster wraps them; returns the terms before the update."""
    adversarial = adversarial_loss(settings.adversarial_loss)
    with precision:
        losses = discriminator_loss(
            discriminators, day_B3HW, night_B3HW, translation, adversarial, settings.weights.discriminator
        )
    networks.discriminator_optimizer.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    networks.discriminator_optimizer.step()
    return losses


def generator_step(
    networks: Networks,
    discriminators: Scores,
    features: Features | None,
    day_B3HW: Tensor,
    night_B3HW: Tensor,
    translation: Translation,
    settings: Translator,
    precision: torch.autocast,
) -> GeneratorLosses:
    """One update of all generators through the pass that made `translation`; returns the terms before the update.

    `discriminators` are the bare ones, which exchange no gradients; asking for none saves a third of the backward pass.
    """
    adversarial = adversarial_loss(settings.adversarial_loss)
    networks.discriminators.requires_grad_(False)
    with precision:
        losses = generator_loss(
            discriminators, features, day_B3HW, night_B3HW, translation, settings.weights, adversarial
        )
    networks.generator_optimizer.zero_grad(set_to_none=True)
    losses.total.backward()  # type: ignore[no-untyped-call]
    networks.generator_optimizer.step()
    networks.discriminators.requires_grad_(True)
    return losses


class Part(NamedTuple):
    """Some of a worker's crops of an iteration, and their noise. `weight` of its mean loss in that of the worker."""

    day_B3HW: Tensor
    night_B3HW: Tensor
    noise: LatentNoise
    weight: float


def parts_of_batch(
    day_B3HW: Tensor, night_B3HW: Tensor, noise: LatentNoise, count: int, workers: int, batch: int
) -> list[Part]:
    """At most `count` parts, as equal as can be. The mean over `workers` of the weighted means is that over `batch`."""
    count = min(count, len(day_B3HW))
    split = zip(*(tensor.tensor_split(count) for tensor in (day_B3HW, night_B3HW, *noise)), strict=True)
    return [Part(day, night, LatentNoise(*drawn), len(day) * workers / batch) for day, night, *drawn in split]


def step_in_parts(
    networks: Networks,
    generators: nn.Module,
    discriminators: nn.Module,
    bare_discriminators: Scores,
    features: Features | None,
    parts: Sequence[Part],
    settings: Translator,
    precision: torch.autocast,
) -> tuple[DiscriminatorLosses, GeneratorLosses]:
    """`discriminator_step` and `generator_step` in the memory that one part takes; gradients are exchanged once.

    The discriminators see all parts before the generators improve, so of several parts each is translated twice, the
    first time without gradients.
    """
    if len(parts) == 1 and parts[0].weight == 1:
        day_B3HW, night_B3HW, noise, _ = parts[0]
        with precision:
            translation = generators(day_B3HW, night_B3HW, noise, settings.weights.needs_cycle)
        given = (day_B3HW, night_B3HW, translation, settings, precision)
        return discriminator_step(networks, discriminators, *given), generator_step(
            networks, bare_discriminators, features, *given
        )
    adversarial, weights = adversarial_loss(settings.adversarial_loss), settings.weights
    of_discriminators, of_generators = [], []
    networks.discriminator_optimizer.zero_grad(set_to_none=True)
    for number, (day_B3HW, night_B3HW, noise, weight) in enumerate(parts, 1):
        with exchange(discriminators, number == len(parts)):
            with precision:
                with torch.no_grad():
                    translation = networks.generators(day_B3HW, night_B3HW, noise, False)
                losses = discriminator_loss(
                    discriminators, day_B3HW, night_B3HW, translation, adversarial, weights.discriminator
                )
            torch.autograd.backward(weight * losses.total)
        of_discriminators.append(torch.stack([weight * term.detach() for term in losses]))
    networks.discriminator_optimizer.step()
    networks.discriminators.requires_grad_(False)
    networks.generator_optimizer.zero_grad(set_to_none=True)
    for number, (day_B3HW, night_B3HW, noise, weight) in enumerate(parts, 1):
        with exchange(generators, number == len(parts)):
            with precision:
                translation = generators(day_B3HW, night_B3HW, noise, weights.needs_cycle)
                terms = generator_loss(
                    bare_discriminators, features, day_B3HW, night_B3HW, translation, weights, adversarial
                )
            torch.autograd.backward(weight * terms.total)
        of_generators.append(torch.stack([weight * term.detach().float() for term in terms]))
    networks.generator_optimizer.step()
    networks.discriminators.requires_grad_(True)
    return (
        DiscriminatorLosses(*torch.stack(of_discriminators).sum(dim=0)),
        GeneratorLosses(*torch.stack(of_generators).sum(dim=0)),
    )
