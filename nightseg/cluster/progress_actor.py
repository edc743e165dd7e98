"""The notice board between training workers and the driver: how far the training is, and why it failed.

Ray Train itself tells a driver nothing before the end, and hands back errors as text. The board is one small actor,
shared by all trainings of a driver, that workers write to without waiting.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from nightseg.progress import Progress, Task

SECONDS_BETWEEN_LOOKS = 0.25
"""How often the driver looks at the board, and the least time between two messages of a worker."""


@dataclass(frozen=True)
class Failure:
    """Why a worker's loop ended early. `is_user_error`: doing it again cannot help."""

    is_user_error: bool
    message: str
    trace: str


@dataclass
class Notice:
    """What is known of one training. `done`: units of work finished in all; `messages`: for the reader, in order."""

    done: int = 0
    figures: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None
    messages: list[str] = field(default_factory=list)
    starts: int = 0


class Board:
    """Runs as an actor. Trainings are told apart by a key, because a search has several at a time."""

    def __init__(self) -> None:
        self._notices: dict[str, Notice] = {}

    def begin(self, key: str, rank: int) -> Failure | None:
        """A worker starts: the user's mistake that ended the training before, if one did; other failures are over."""
        notice = self._notice(key)
        if notice.failure is not None and notice.failure.is_user_error:
            return notice.failure
        if rank == 0:
            notice.starts += 1
            if notice.starts > 1:
                reason = f" ({notice.failure.message})" if notice.failure else ""
                notice.messages.append(f"a worker failed{reason}; the training goes on after its last checkpoint")
            notice.failure = None
        return None

    def say(self, key: str, message: str) -> None:
        self._notice(key).messages.append(message)

    def advance(self, key: str, done: int, figures: Mapping[str, float]) -> None:
        notice = self._notice(key)
        notice.done = done
        notice.figures.update(figures)

    def fail(self, key: str, failure: Failure) -> None:
        """The first failure counts, as those of other workers follow from it; a user's mistake counts more."""
        notice = self._notice(key)
        if notice.failure is None or (failure.is_user_error and not notice.failure.is_user_error):
            notice.failure = failure

    def read(self, key: str) -> Notice:
        return self._notice(key)

    def forget(self, key: str) -> None:
        self._notices.pop(key, None)

    def _notice(self, key: str) -> Notice:
        return self._notices.setdefault(key, Notice())


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


@contextmanager
def shown(board: Any, key: str, task: Task, progress: Progress, title: str) -> Iterator[None]:
    """While the body runs, the task and the reader follow what rank 0 writes on the board."""
    stop = threading.Event()
    display = _Display(board, key, task, progress, title)

    def follow() -> None:
        while not stop.wait(SECONDS_BETWEEN_LOOKS):
            display.refresh()

    thread = threading.Thread(target=follow, name="nightseg-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        display.refresh()
        board.forget.remote(key)


class _Display:
    def __init__(self, board: Any, key: str, task: Task, progress: Progress, title: str) -> None:
        self._board, self._key, self._task, self._progress, self._title = board, key, task, progress, title
        self._done = 0
        self._num_said = 0

    def refresh(self) -> None:
        import ray

        try:
            notice: Notice = ray.get(self._board.read.remote(self._key), timeout=5.0)
        except ray.exceptions.RayError:  # busy, or starting anew: the training goes on without a display
            return
        # A restarted worker begins before where its predecessor died: the bar stands still until it is past that.
        self._task.advance(max(0, notice.done - self._done), **notice.figures)
        self._done = max(self._done, notice.done)
        for message in notice.messages[self._num_said :]:
            self._progress.say(f"{self._title}: {message}")
        self._num_said = len(notice.messages)
