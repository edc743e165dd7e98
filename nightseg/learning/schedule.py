"""Learning rate as a pure function of the step: a resumed training needs no scheduler state.

One warm-up and one decay for the whole training, no restarts.
"""

from __future__ import annotations

from typing import Final

WARMUP_START: Final = 1e-3  # detectron2's WARMUP_FACTOR


def linear_warmup(step: int, warmup_steps: int) -> float:
    """Factor that rises linearly from 0.001 at step 0 to 1 at `warmup_steps`, and stays 1."""
    if step >= warmup_steps:
        return 1.0
    return WARMUP_START + (1 - WARMUP_START) * step / warmup_steps


def poly_decay(step: int, total_steps: int, power: float) -> float:
    """(1 - step / total_steps)^power (DeepLab, arXiv 1606.00915, section 3): 1 at step 0, above 0 at the last step."""
    assert 0 <= step < total_steps, f"step {step} of {total_steps}"
    return float((1 - step / total_steps) ** power)


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int, power: float) -> float:
    """Learning rate of step 0 .. total_steps - 1: the poly decay from `peak`, multiplied by the warm-up."""
    return peak * linear_warmup(step, warmup_steps) * poly_decay(step, total_steps, power)
