"""The two sides of UNIT's game: their networks and optimisers, and one step of either.

A step of one side leaves the other alone: the discriminators judge images that are cut off from the generators, and
while the generators learn the discriminators ask for no gradient, which also saves a third of their backward pass.

Letters in tensor names: B batch, 3 RGB, H, W crop size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nightseg.unit.data import Stream, mix_seed
from nightseg.unit.loss import (
    Adversarial,
    DiscriminatorLosses,
    Features,
    GeneratorLosses,
    Judges,
    TermWeights,
    discriminator_loss,
    generator_loss,
)
from nightseg.unit.network import Discriminators, Generators, Translation
from nightseg.unit.start import load_start

ADAM_BETAS: Final = (0.5, 0.999)
LEARNING_RATE_FACTOR: Final = 0.5


class Networks(NamedTuple):
    """What is trained, and the two optimisers that do it."""

    generators: Generators
    discriminators: Discriminators
    generator_optimizer: torch.optim.Adam
    discriminator_optimizer: torch.optim.Adam
    averaged: Generators  # running mean of the generators: what the model becomes

    def state(self) -> dict[str, Any]:
        """Everything that a step changes."""
        return {name: part.state_dict() for name, part in self._asdict().items()}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, part in self._asdict().items():
            part.load_state_dict(state[name])

    def first_not_finite(self) -> str | None:
        """Name of a weight that is infinite or not a number, if there is one. Waits for the device."""
        modules = {"generators": self.generators, "averaged": self.averaged, "discriminators": self.discriminators}
        for side, module in modules.items():
            for name, parameter in module.named_parameters():
                if not bool(parameter.isfinite().all()):
                    return f"{side}.{name}"
        return None


def build_networks(
    *,
    width: int,
    res_blocks: int,
    shared_blocks: int,
    discriminator_width: int,
    discriminator_scales: int,
    discriminator_norm: Literal["none", "layer"],
    learning_rate: float,
    weight_decay: float,
    seed: int,
    device: torch.device,
    start: str | None = None,
) -> Networks:
    """New networks, the same on every worker because they follow from `seed` and `start`, and their optimisers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix_seed(seed, Stream.WEIGHTS))
        generators = Generators(width, res_blocks, shared_blocks)
        discriminators = Discriminators(discriminator_width, discriminator_scales, discriminator_norm)
    if start is not None:
        load_start(start, generators, discriminators)
    optimizers = []
    for module in (generators, discriminators):
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizers.append(
            torch.optim.Adam(
                module.parameters(), lr=learning_rate, betas=ADAM_BETAS, weight_decay=weight_decay, fused=True
            )
        )
    averaged = copy.deepcopy(generators).requires_grad_(False)
    return Networks(generators, discriminators, optimizers[0], optimizers[1], averaged)


def stepped_rate(peak: float, iteration: int, step_every: int) -> float:
    """Learning rate of iteration 0, 1, ...: halved every `step_every` iterations (PyTorch's StepLR)."""
    return float(peak * LEARNING_RATE_FACTOR ** (iteration // step_every))


def set_learning_rate(networks: Networks, rate: float) -> None:
    for optimizer in (networks.generator_optimizer, networks.discriminator_optimizer):
        for group in optimizer.param_groups:
            group["lr"] = rate


def discriminator_step(
    networks: Networks,
    judges: Judges,
    day_B3HW: Tensor,
    night_B3HW: Tensor,
    translation: Translation,
    weights: TermWeights,
    adversarial: Adversarial,
    precision: torch.autocast,
) -> DiscriminatorLosses:
    """One update of both discriminators. `judges` are they, as the cluster wraps them; terms of before the update."""
    with precision:
        judged = discriminator_loss(judges, day_B3HW, night_B3HW, translation, adversarial, weights.discriminator)
    networks.discriminator_optimizer.zero_grad(set_to_none=True)
    judged.total.backward()  # type: ignore[no-untyped-call]
    networks.discriminator_optimizer.step()
    return judged


def generator_step(
    networks: Networks,
    judges: Judges,
    features: Features | None,
    day_B3HW: Tensor,
    night_B3HW: Tensor,
    translation: Translation,
    weights: TermWeights,
    adversarial: Adversarial,
    precision: torch.autocast,
) -> GeneratorLosses:
    """One update of all generators through the pass that made `translation`; terms of before the update.

    `judges` are the bare discriminators: nothing of theirs is exchanged between workers here.
    """
    networks.discriminators.requires_grad_(False)
    with precision:
        made = generator_loss(judges, features, day_B3HW, night_B3HW, translation, weights, adversarial)
    networks.generator_optimizer.zero_grad(set_to_none=True)
    made.total.backward()  # type: ignore[no-untyped-call]
    networks.generator_optimizer.step()
    networks.discriminators.requires_grad_(True)
    return made


def average(networks: Networks, decay: float) -> None:
    """One step of the running mean of the generators' weights; `decay` 0 keeps the latest ones.

    An adversarial game circles around its solution, and the mean of the circle is nearer to it (arXiv 1806.04498).
    """
    latest = [parameter.detach() for parameter in networks.generators.parameters()]
    torch._foreach_lerp_(list(networks.averaged.parameters()), latest, 1 - decay)


def compiled(module: nn.Module, wanted: bool) -> nn.Module:
    """The module, compiled when it is first used if that is wanted; its weights and their names stay the same."""
    if not wanted:
        return module
    faster: nn.Module = torch.compile(module)  # type: ignore[assignment]
    return faster
