"""Nodes that the next stage needs, asked of an autoscaler while the stage before it still works.

A machine takes minutes to start, and one that is idle costs; so it is asked for when a stage has a few minutes left.
What asks is a placement group that is given up as soon as they are there: new nodes stay for the idle time of the
cluster, work is kept from nothing, and a driver that dies leaves no demand behind. (That of
`ray.autoscaler.sdk.request_resources` stays until somebody takes it back.)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from nightseg.cluster import nodes
from nightseg.cluster.nodes import Amounts
from nightseg.progress import SECONDS_OF_SKIPPING, Progress, Task

SECONDS_AHEAD: Final = 300.0  # before the end of a stage: less than clusters let a node idle
SECONDS_OF_ASKING: Final = nodes.SECONDS_FOR_NODES
SECONDS_BETWEEN_LOOKS: Final = nodes.SECONDS_BETWEEN_LOOKS
SECONDS_TO_STOP: Final = 10.0  # that a call of Ray is given to return

_asking: dict[threading.Thread, threading.Event] = {}  # who asks, and what ends it


class EndInSight:
    """A progress that calls `near` once, as soon as one of its tasks is expected to end within SECONDS_AHEAD.

    `clock` is monotonic seconds. The rate is that of the whole task, but for what an earlier run had finished.
    """

    def __init__(
        self, progress: Progress, near: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress, self._near, self._clock = progress, near, clock
        self._is_told, self._lock = False, threading.Lock()

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        with self._progress.task(title, total, unit) as task:
            yield task if total is None else _Timed(self, task, total)

    def say(self, message: str) -> None:
        self._progress.say(message)

    def seconds(self) -> float:
        return self._clock()

    def tell(self, seconds_left: float) -> None:
        with self._lock:
            is_new = not self._is_told and seconds_left <= SECONDS_AHEAD
            self._is_told |= is_new
        if is_new:
            self._near()


class _Timed:
    """A task that tells how long it will still take."""

    def __init__(self, end: EndInSight, task: Task, total: int) -> None:
        self._end, self._task, self._total = end, task, total
        self._began, self._done, self._skipped, self._lock = end.seconds(), 0, 0, threading.Lock()

    def advance(self, count: int = 1, **metrics: float | str) -> None:
        self._task.advance(count, **metrics)
        took = self._end.seconds() - self._began
        with self._lock:
            self._done += count
            if took < SECONDS_OF_SKIPPING:
                self._skipped = self._done
            left, done = self._total - self._done, self._done - self._skipped
        if done > 0:
            self._end.tell(left * took / done)


def missing(count: int, each: Amounts) -> int:
    """How many of `count` processes have no room on the nodes that are there, whoever uses them now."""
    return max(0, count - nodes.fitting(nodes.alive().values(), each))


def ask(count: int, each: Amounts) -> None:
    """Have the autoscaler start nodes until so many processes have room on all that are there; returns at once."""
    for thread in list(_asking):
        if not thread.is_alive():
            _asking.pop(thread, None)
    stopped = threading.Event()
    words = (count, each, time.monotonic() + SECONDS_OF_ASKING, stopped)
    thread = threading.Thread(target=_until_there, args=words, name="nodes asked for ahead", daemon=True)
    _asking[thread] = stopped
    thread.start()


def stop() -> None:
    """Nobody asks any more: before the cluster is left, as Ray would connect anew, or start, for whoever asks then."""
    asking = dict(_asking)
    for stopped in asking.values():
        stopped.set()
    for thread in asking:
        thread.join(SECONDS_TO_STOP)
        _asking.pop(thread, None)


def _until_there(count: int, each: Amounts, deadline: float, stopped: threading.Event) -> None:
    """Asks, and asks anew as soon as the request no longer fits.

    A request is placed as a whole or not at all. So what is idle is asked for, too, or would be what is given; and Ray
    tells a moment late what has become idle, and nodes become busy while others start.
    """
    import ray.exceptions
    import ray.util

    bundle = {name: amount for name, amount in each.items() if amount}
    group, size = None, 0
    with suppress(ray.exceptions.RayError, ConnectionError):  # the run ends before they come
        while not stopped.is_set() and (lacking := missing(count, each)) and time.monotonic() < deadline:
            wanted = lacking + nodes.fitting(nodes.free().values(), each)
            if group is not None and wanted != size:
                ray.util.remove_placement_group(group)
                group = None
            if group is None:
                group, size = ray.util.placement_group([bundle] * wanted), wanted
            if group.wait(timeout_seconds=SECONDS_BETWEEN_LOOKS):
                ray.util.remove_placement_group(group)
                group = None
                stopped.wait(SECONDS_BETWEEN_LOOKS)  # or what it held would not be seen to be idle
        if group is not None:
            ray.util.remove_placement_group(group)
