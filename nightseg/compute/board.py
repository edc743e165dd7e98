"""The notice board between training workers and the driver: how far the training is, and why it failed.

Ray Train itself tells a driver nothing before the end, and hands back errors as text. The board is one small actor,
shared by all trainings of a driver, that workers write to without waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Failure:
    """Why a worker's loop ended early. `is_user_error`: doing it again cannot help."""

    is_user_error: bool
    message: str
    trace: str


@dataclass
class Notice:
    """What is known of one training. `done`: units of work finished in all."""

    done: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None


class Board:
    """Runs as an actor. Trainings are told apart by a key, because a search has several at a time."""

    def __init__(self) -> None:
        self._notices: dict[str, Notice] = {}

    def begin(self, key: str) -> Failure | None:
        """A worker starts: the user's mistake that ended the training before, if one did; other failures are over."""
        notice = self._notices.setdefault(key, Notice())
        if notice.failure is not None and not notice.failure.is_user_error:
            notice.failure = None
        return notice.failure

    def advance(self, key: str, done: int, figures: Mapping[str, float]) -> None:
        notice = self._notices.setdefault(key, Notice())
        notice.done = done
        notice.figures.update(figures)

    def fail(self, key: str, failure: Failure) -> None:
        """The first failure counts, as those of other workers follow from it; a user's mistake counts more."""
        notice = self._notices.setdefault(key, Notice())
        if notice.failure is None or (failure.is_user_error and not notice.failure.is_user_error):
            notice.failure = failure

    def read(self, key: str) -> Notice:
        return self._notices.get(key, Notice())

    def forget(self, key: str) -> None:
        self._notices.pop(key, None)


_boards: dict[tuple[str, str], Any] = {}


def board() -> Any:
    """The actor handle of this process's board, on the cluster it is connected to now."""
    import ray

    context = ray.get_runtime_context()
    place = (context.get_session_name(), context.get_worker_id())
    if place not in _boards:
        _boards.clear()  # a handle from before a disconnect leads nowhere
        _boards[place] = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()
    return _boards[place]
