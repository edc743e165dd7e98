"""Learning rate as a pure function of the step: a resumed training needs no scheduler state.

One warm-up and one decay for the whole training, no restarts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WARMUP_START: Final = 1e-3  # detectron2's WARMUP_FACTOR


@dataclass(frozen=True)
class Schedule:
    """The course of a learning rate over `total_steps` steps.

    `decay`: "poly" uses `power`; "step" multiplies by `factor` after each of the shares `at` of the training; "cosine"
    needs neither.
    """

    peak: float
    total_steps: int
    warmup_steps: int
    decay: str = "poly"
    power: float = 0.9
    at: Sequence[float] = ()
    factor: float = 0.1

    def learning_rate(self, step: int) -> float:
        """Of step 0 .. total_steps - 1: the decay from `peak`, multiplied by the warm-up."""
        match self.decay:
            case "poly":
                share = poly_decay(step, self.total_steps, self.power)
            case "step":
                share = step_decay(step, self.total_steps, self.at, self.factor)
            case "cosine":
                share = cosine_decay(step, self.total_steps)
            case _:
                raise AssertionError(f"unknown decay {self.decay!r}")
        return self.peak * linear_warmup(step, self.warmup_steps) * share


def linear_warmup(step: int, warmup_steps: int) -> float:
    """Factor that rises linearly from 0.001 at step 0 to 1 at `warmup_steps`, and stays 1."""
    if step >= warmup_steps:
        return 1.0
    return WARMUP_START + (1 - WARMUP_START) * step / warmup_steps


def poly_decay(step: int, total_steps: int, power: float) -> float:
    """(1 - step / total_steps)^power (DeepLab, arXiv 1606.00915, section 3): 1 at step 0, above 0 at the last step."""
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    return float((1 - step / total_steps) ** power)


def cosine_decay(step: int, total_steps: int) -> float:
    """Half a cosine (arXiv 1608.03983, equation 5, without restarts): 1 at step 0, above 0 at the last step."""
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    return (1 + math.cos(math.pi * step / total_steps)) / 2


def step_decay(step: int, total_steps: int, at: Sequence[float], factor: float) -> float:
    """`factor` to the power of how many of the shares `at` of the training are over (detectron2's STEPS, GAMMA)."""
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    return float(factor ** sum(step >= round(share * total_steps) for share in at))
