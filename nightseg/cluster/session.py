"""What a training loop sees of the cluster, and nothing of how it is spread: a loop needs no more of this room."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Session(Protocol):
    """What a training loop sees of the cluster. Every worker has one; all must make the same calls of `report`."""

    rank: int
    world_size: int  # workers that are there,
    workers: int  # of those that the recipe asks for: fewer while nodes are missing
    device: torch.device

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on this worker's device, DistributedDataParallel if there are several workers."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of the tensor over all workers, on this worker's device; the tensor itself if there is one worker."""

    def restore(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint (tensors on the CPU), or None at the very start."""

    def report(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> None:
        """A barrier. Notes the metrics, and keeps rank 0's state as a checkpoint if it is given."""

    def say(self, message: str) -> None:
        """Something that the user should know, once, whichever workers say it. Cheap; never waits."""

    def progress(self, done: int, **metrics: float) -> None:
        """`done` units of work are finished in all, not since the last call. Cheap; never waits."""


def parts_of(session: Session, planned: int) -> int:
    """In how many parts a worker takes its frames of a step, where it takes them in `planned` parts with all workers.

    With fewer workers each has more frames, and no part is larger than it was planned to be.
    """
    return planned * -(-session.workers // session.world_size)


def exchange(module: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Within it a wrapped module exchanges gradients, or adds them up for a later exchange (`no_sync`)."""
    if wanted or not isinstance(module, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
