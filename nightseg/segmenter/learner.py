"""All that changes while a segmenter learns, and how it goes into a checkpoint and comes back.

Everything else follows from the settings: the learning rate is a function of the step, the order and the augmentation
of the frames of (seed, epoch), and what a network draws at random (dropout) of `step_seed`. So a checkpoint in the
middle of an epoch needs no state of a scheduler, a loader or a generator, and another number of workers can read it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nightseg.networks.ema import average_of
from nightseg.segmenter.data import Pace
from nightseg.segmenter.network import SemanticFPN
from nightseg.segmenter.step import StepFigures
from nightseg.storage import UserError


class Recent(NamedTuple):
    """Means over the last steps."""

    loss: float
    gradient_norm: float


@dataclass
class Learner:
    """A network and its optimiser after `step` steps.

    `average`: running mean of the network, if one is kept. `figures`: steps_per_epoch x 2, loss and gradient norm of
    the steps of the epoch that is under way or has just ended. `history`: one entry for each finished epoch.
    """

    network: SemanticFPN
    optimizer: torch.optim.Optimizer
    average: SemanticFPN | None
    figures: Tensor
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)

    @classmethod
    def start(
        cls, network: SemanticFPN, optimizer: torch.optim.Optimizer, steps_per_epoch: int, *, averages: bool
    ) -> Learner:
        """Before the first step; figures lie on the device of the network."""
        device = next(network.parameters()).device
        figures = torch.zeros(steps_per_epoch, 2, device=device)
        return cls(network, optimizer, average_of(network) if averages else None, figures)

    @property
    def judged(self) -> SemanticFPN:
        """What is validated and becomes the model."""
        return self.network if self.average is None else self.average

    @property
    def steps_of_epoch(self) -> int:
        """Steps of the epoch that is under way; 0 between epochs."""
        return self.step % len(self.figures)

    def note(self, figures: StepFigures) -> None:
        """One more step is done. Nothing is read back from the device."""
        self.figures[self.steps_of_epoch] = torch.stack(figures)
        self.step += 1

    def recent(self, steps: int, frames_of: Callable[[int], Sequence[str]], saved_step: int) -> Recent:
        """Means over the last `steps` steps, which lie in one epoch. Waits for the device.

        Raises UserError if a loss or a gradient is not finite, with the frames of that step: `frames_of` its number in
        the epoch. `saved_step`: where the last checkpoint is, for the message.
        """
        end = self.steps_of_epoch or len(self.figures)
        figures = self.figures[end - steps : end]
        wrong = (~torch.isfinite(figures)).any(dim=1).nonzero()
        if len(wrong):
            kept = "There is no checkpoint yet"
            if saved_step:
                kept = f"The last good checkpoint (step {saved_step}) is kept"
            index = end - steps + int(wrong[0])
            loss, norm = self.figures[index].tolist()
            raise UserError(
                f"training stopped at step {self.step - end + index + 1}: loss {loss:g}, gradient norm {norm:g}\n"
                f"  Frames of that batch: {', '.join(frames_of(index))}\n"
                f"  {kept}. Lower training.learning_rate, lengthen "
                f"training.warmup_steps, set training.clip_norm, or use training.precision: float32."
            )
        return Recent(*figures.mean(dim=0).tolist())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds: tensors, numbers, lists and dictionaries."""
        return {
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "figures": self.figures[: self.steps_of_epoch].cpu().clone(),
            "history": self.history,
            "pace": asdict(self.pace),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what `state` was taken from."""
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(state["step"])
        self.figures[: len(state["figures"])] = state["figures"].to(self.figures.device)
        self.history, self.pace = list(state["history"]), Pace(**state["pace"])


class Lap(NamedTuple):
    """How fast the last steps were. `waited`: share of the time in which no batch was ready."""

    images_per_second: float
    waited: float


class Stopwatch:
    """Adds the time of the steps to a pace, and leaves out what `restart` ends: checkpoints, pictures."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.restart()

    def restart(self) -> None:
        self._mark, self._waited = time.perf_counter(), self._pace.waiting_seconds

    def lap(self, frames: int) -> Lap:
        """`frames` frames were learned from since the last lap or restart."""
        seconds, waiting = time.perf_counter() - self._mark, self._pace.waiting_seconds - self._waited
        self._pace.seconds += seconds
        self._pace.frames += frames
        self.restart()
        return Lap(frames / max(seconds, 1e-9), waiting / max(seconds, 1e-9))


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of torch's generators for one step on one worker."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0] >> 1)
