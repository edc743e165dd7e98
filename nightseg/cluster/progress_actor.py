"""The actor between training workers and the driver: how far a training is, and why it failed.

Ray Train itself tells a driver nothing before the end, and hands back errors as text. One small actor, shared by all
trainings of a driver; workers write to it without waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nightseg.errors import UserError
from nightseg.progress import Progress, Task

SECONDS_BETWEEN_UPDATES = 0.25
"""How often the driver asks, and the least time between two messages of a worker."""


@dataclass(frozen=True)
class Failure:
    """Why a worker's loop ended early. With a `user_error`, doing it again cannot help."""

    user_error: UserError | None
    message: str
    trace: str


@dataclass
class Status:
    """What is known of one training. `done`: units of work finished in all; `messages`: for the reader, in order."""

    done: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    messages: list[str] = field(default_factory=list)
    starts: int = 0


class ProgressActor:
    """Runs as an actor. Trainings are told apart by a key, because a search has several at a time."""

    def __init__(self) -> None:
        self._statuses: dict[str, Status] = {}

    def begin(self, key: str, rank: int) -> Failure | None:
        """A worker starts: the user's mistake that ended the training before, if one did; other failures are over."""
        status = self._status(key)
        if status.failure is not None and status.failure.user_error:
            return status.failure
        if rank == 0:
            status.starts += 1
            if status.starts > 1:
                reason = f" ({_of_one_line(status.failure.message)})" if status.failure else ""
                status.messages.append(f"a worker failed{reason}; the training goes on after its last checkpoint")
            status.failure = None
        return None

    def resizes(self, key: str) -> None:
        """The workers are about to start again, and nothing has failed."""
        self._status(key).starts = 0

    def say(self, key: str, message: str) -> None:
        self._status(key).messages.append(message)

    def advance(self, key: str, done: int, metrics: Mapping[str, float]) -> None:
        status = self._status(key)
        status.done = done
        status.metrics.update(metrics)

    def fail(self, key: str, failure: Failure) -> None:
        """The first failure counts, as those of other workers follow from it; a user's mistake counts more."""
        status = self._status(key)
        if status.failure is None or (failure.user_error and not status.failure.user_error):
            status.failure = failure

    def read(self, key: str) -> Status:
        return self._status(key)

    def forget(self, key: str) -> None:
        self._statuses.pop(key, None)

    def _status(self, key: str) -> Status:
        return self._statuses.setdefault(key, Status())


def _of_one_line(message: str) -> str:
    """What Gloo and NCCL write at length: a worker has lost another one, and its own error is not the reason."""
    lost = "gloo" in message.lower() or "nccl" in message.lower()
    return "it lost its connection to another one" if lost else message


_actors: dict[tuple[str, str], Any] = {}


def progress_actor() -> Any:
    """The handle of this process's actor, on the cluster it is connected to now."""
    import ray

    context = ray.get_runtime_context()
    place = (context.get_session_name(), context.get_worker_id())
    if place not in _actors:
        _actors.clear()  # a handle from before a disconnect leads nowhere
        # On the node of the driver: it is there as long as somebody asks.
        here = {ray._raylet.RAY_NODE_ID_KEY: context.get_node_id()}
        _actors[place] = ray.remote(num_cpus=0, max_restarts=-1, label_selector=here)(ProgressActor).remote()
    return _actors[place]


@contextmanager
def shown(actor: Any, key: str, task: Task, progress: Progress, title: str) -> Iterator[None]:
    """While the body runs, the task and the reader follow what rank 0 reports."""
    stop = threading.Event()

    def follow() -> None:
        done = num_said = 0
        while True:
            is_last = stop.wait(SECONDS_BETWEEN_UPDATES)
            status = _read(actor, key)
            if status is not None:
                # A restarted worker begins before where its predecessor died: the bar stands still until it is past it.
                task.advance(max(0, status.done - done), **status.metrics)
                done = max(done, status.done)
                for message in status.messages[num_said:]:
                    progress.say(f"{title}: {message}")
                num_said = len(status.messages)
            if is_last:
                return

    thread = threading.Thread(target=follow, name="nightseg-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        actor.forget.remote(key)


def _read(actor: Any, key: str) -> Status | None:
    import ray

    try:
        status: Status = ray.get(actor.read.remote(key), timeout=5.0)
    except ray.exceptions.RayError:  # busy, or starting again: the training goes on without a display
        return None
    return status
