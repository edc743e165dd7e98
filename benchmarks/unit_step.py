"""One training iteration of UNIT, both steps, against a naive formulation of the same step on the same weights.

The naive one does what the textbook says, in plain PyTorch: NCHW in float32; an encoder or decoder pass wherever an
image or code is needed, also in the discriminators' step, whose images keep the generators' graph until they are cut
off; real and translated images scored separately; discriminators that ask for gradients while the generators learn;
nearest upsampling followed by a 5x5 convolution; PyTorch's instance norm; Adam a parameter at a time. It is ours,
written for this comparison.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.contest import Contest, Size
from nightseg.unit import network
from nightseg.unit.loss import (
    ADAM_BETAS,
    TERMS,
    Networks,
    build_networks,
    discriminator_step,
    generator_step,
    latent_noise,
)
from nightseg.unit.perceptual import PerceptualFeatures, build_perceptual
from nightseg.unit.settings import LossWeights, Translator

WIDTHS: dict[Size, int] = {"tiny": 4, "default": 64, "full": 64}
SIDES: dict[Size, int] = {"tiny": 64, "default": 256, "full": 256}
RATE, DECAY, SEED = 1e-4, 1e-4, 0
CPU = torch.device("cpu")
Terms = dict[str, float]


def contest(size: Size) -> Contest:
    """`full` adds the perceptual loss with EfficientNet-Lite0."""
    width, side = WIDTHS[size], SIDES[size]
    settings = Translator(
        day="day",
        night="night",
        width=width,
        discriminator_width=width,
        discriminator_norm="layer",
        learning_rate=RATE,
        weight_decay=DECAY,
        weights=LossWeights(perceptual=0.1),
    )
    networks = build_networks(settings, SEED, CPU)
    features = build_perceptual("efficientnet_lite0") if size == "full" else None
    naive = Naive(networks, copy.deepcopy(features))
    if features is not None:
        features.to(memory_format=torch.channels_last)
    random = torch.Generator().manual_seed(SEED)
    day_B3HW, night_B3HW = (torch.rand(1, 3, side, side, generator=random) * 2 - 1 for _ in range(2))
    last = [images.to(memory_format=torch.channels_last) for images in (day_B3HW, night_B3HW)]
    latent_Chw = (4 * width, side // 4, side // 4)
    exact = torch.autocast("cpu", torch.bfloat16, enabled=False)
    numbers = {"ours": 0, "peer": 0}

    def noise_of(name: str) -> network.LatentNoise:
        numbers[name] += 1
        return latent_noise(SEED, numbers[name], [0], latent_Chw, CPU)

    def ours() -> Terms:
        translation = networks.generators(*last, noise_of("ours"))
        given: tuple[Any, ...] = (*last, translation, settings, exact)
        of_discriminators = discriminator_step(networks, networks.discriminators, *given)
        of_generators = generator_step(networks, networks.discriminators, features, *given)
        return dict(zip(TERMS, [term.item() for term in (*of_discriminators, *of_generators)], strict=True))

    def peer() -> Terms:
        return naive.step(day_B3HW, night_B3HW, noise_of("peer"), settings.weights)

    def check(mine: Terms, theirs: Terms) -> str:
        apart = max(abs(mine[name] - theirs[name]) / max(1.0, abs(theirs[name])) for name in theirs)
        assert apart < 1e-4, {name: (mine[name], theirs[name]) for name in theirs}
        return f"terms {apart:.1g} apart"

    perceptual = ", perceptual loss" if features is not None else ""
    return Contest(
        name="unit_step",
        work=f"one UNIT iteration, width {width}, {side} x {side}, batch 1{perceptual}",
        peer="naive formulation of the same step: NCHW, a pass a use, every gradient taken",
        run_ours=ours,
        run_peer=peer,
        check=check,
    )


class Naive:
    """The step as the textbook has it, on copies of the same weights."""

    def __init__(self, networks: Networks, features: PerceptualFeatures | None) -> None:
        self.generators = plain(networks.generators)
        self.discriminators = plain(networks.discriminators)
        self.features = features
        self.optimizers = [
            torch.optim.Adam(module.parameters(), RATE, ADAM_BETAS, weight_decay=DECAY, foreach=False)
            for module in (self.generators, self.discriminators)
        ]

    def step(self, day: Tensor, night: Tensor, noise: network.LatentNoise, weights: LossWeights) -> Terms:
        return {name: float(term) for name, term in self.learn(day, night, noise, weights).items()}

    def learn(self, day: Tensor, night: Tensor, noise: network.LatentNoise, weights: LossWeights) -> dict[str, Tensor]:
        """Both steps; the terms stay on their device."""
        generators, discriminators = self.generators, self.discriminators

        day_code, night_code = generators.day_encoder(day), generators.night_encoder(night)
        day_made = generators.day_decoder(night_code + noise.night)
        night_made = generators.night_decoder(day_code + noise.day)
        self.optimizers[1].zero_grad()
        loss_day = discriminator_loss(discriminators.day, day_made.detach(), day)
        loss_night = discriminator_loss(discriminators.night, night_made.detach(), night)
        torch.autograd.backward(loss_day + loss_night)
        self.optimizers[1].step()

        self.optimizers[0].zero_grad()
        day_code, night_code = generators.day_encoder(day), generators.night_encoder(night)
        day_again = generators.day_decoder(day_code + noise.day)
        night_again = generators.night_decoder(night_code + noise.night)
        day_made = generators.day_decoder(night_code + noise.night)
        night_made = generators.night_decoder(day_code + noise.day)
        code_of_day_made, code_of_night_made = generators.day_encoder(day_made), generators.night_encoder(night_made)
        day_cycled = generators.day_decoder(code_of_night_made + noise.day_again)
        night_cycled = generators.night_decoder(code_of_day_made + noise.night_again)
        terms = {
            "adversarial_day": sum((score - 1).square().mean() for score in discriminators.day(day_made)),
            "adversarial_night": sum((score - 1).square().mean() for score in discriminators.night(night_made)),
            "reconstruction_day": (day_again - day).abs().mean(),
            "reconstruction_night": (night_again - night).abs().mean(),
            "kl_day": day_code.square().mean(),
            "kl_night": night_code.square().mean(),
            "cycle_day": (day_cycled - day).abs().mean(),
            "cycle_night": (night_cycled - night).abs().mean(),
            "cycle_kl_day": code_of_night_made.square().mean(),
            "cycle_kl_night": code_of_day_made.square().mean(),
        }
        if self.features is not None:
            terms["perceptual_day"] = self.perceptual(day_made, night)
            terms["perceptual_night"] = self.perceptual(night_made, day)
        total = sum(getattr(weights, name.rsplit("_", 1)[0]) * term for name, term in terms.items())
        torch.autograd.backward(total)
        self.optimizers[0].step()
        terms |= {"discriminator_day": loss_day, "discriminator_night": loss_night, "total": total}
        return {name: term.detach() for name, term in terms.items()}

    def perceptual(self, translated: Tensor, source: Tensor) -> Tensor:
        assert self.features is not None
        pairs = list(zip(self.features(translated), self.features(source), strict=True))
        return torch.stack([F.mse_loss(map_BChw, aim_BChw) for map_BChw, aim_BChw in pairs]).mean()


def discriminator_loss(discriminator: Callable[[Tensor], list[Tensor]], translated: Tensor, real: Tensor) -> Tensor:
    pairs = zip(discriminator(translated), discriminator(real), strict=True)
    return torch.stack([score.square().mean() + (other - 1).square().mean() for score, other in pairs]).sum()


class PlainInstanceNorm(nn.Module):
    """PyTorch's own."""

    def forward(self, features: Tensor) -> Tensor:
        return F.instance_norm(features)


class PlainLayerNorm(nn.Module):
    """By its formula: (x - mean) / (unbiased deviation + epsilon), a sample at a time."""

    def __init__(self, gain: nn.Parameter, shift: nn.Parameter) -> None:
        super().__init__()
        self.gain, self.shift = gain, shift

    def forward(self, features: Tensor) -> Tensor:
        flat = features.flatten(1)
        mean, deviation = flat.mean(1).view(-1, 1, 1, 1), flat.std(1).view(-1, 1, 1, 1)
        normed = (features - mean) / (deviation + 1e-5)
        return normed * self.gain.view(-1, 1, 1) + self.shift.view(-1, 1, 1)


def plain(module: nn.Module) -> Any:
    """A copy in NCHW memory with every layer replaced by PyTorch's own, or by its formula; the same weights."""
    made = copy.deepcopy(module)
    for parent in list(made.modules()):
        for name, layer in list(parent.named_children()):
            setattr(parent, name, _plain_layer(layer))
    return made.to(memory_format=torch.contiguous_format)


def _plain_layer(layer: nn.Module) -> nn.Module:
    match layer:
        case network.InstanceNorm():
            return PlainInstanceNorm()
        case network.LayerNorm():
            return PlainLayerNorm(layer.gain, layer.shift)
        case network.UpsamplingConvolution():
            return nn.Sequential(nn.Upsample(scale_factor=2), _reflecting(layer.weight, layer.bias))
        case _:
            return layer


def _reflecting(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    channels_out, channels_in, kernel, _ = weight.shape
    with torch.device("meta"):
        convolution = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, padding_mode="reflect")
    convolution.weight, convolution.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
    return convolution
