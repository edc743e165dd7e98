"""Which steps of a graph run when: side by side as long as there is room, and what a failure takes along.

It knows neither stages nor clusters. A step begins once all that it needs is done, in the order of the graph; one that
has to wait for room is passed by those that fit. What begins next follows from that order, from what has ended and
from the room alone; results do not follow from it at all.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from queue import SimpleQueue
from typing import Any, Final, NamedTuple, Protocol, TypeVar

K = TypeVar("K", bound=Hashable)
R = TypeVar("R")
Step = TypeVar("Step", bound=Hashable, contravariant=True)
Result = TypeVar("Result", covariant=True)

SECONDS_TO_STOP: Final = 10.0  # that steps are given to clear up after an interrupt
_ROUNDING: Final = 1e-6  # of sums of shares of CPUs and GPUs


class Room(NamedTuple):
    """What steps may take at a time. `takes(step)`: amounts by resource; `most(resource)`: what there is of one, asked
    only where two steps want it. A step that wants more than there is runs alone."""

    takes: Callable[[Any], Mapping[str, float]]
    most: Callable[[str], float]
    steps: float  # at a time

    def fitting(self, steps: Iterable[K], beside: Collection[K]) -> list[K]:
        """Those that may begin now, in their order."""
        begin: list[K] = []
        for step in steps:
            at_work = [*beside, *begin]
            if len(at_work) >= self.steps:
                break
            if not at_work or all(self._has(at_work, name, amount) for name, amount in self.takes(step).items()):
                begin.append(step)
        return begin

    def _has(self, at_work: Iterable[Any], name: str, amount: float) -> bool:
        taken = sum(self.takes(step).get(name, 0.0) for step in at_work)
        return amount == 0 or (taken < float("inf") and taken + amount <= self.most(name) + _ROUNDING)


class Failed(NamedTuple):
    """Why a step is not done: its error, or that of the step `by` that it needs."""

    by: Any
    error: Exception


class Worker(Protocol[Step, Result]):
    """Who knows what steps are."""

    def find(self, step: Step) -> Result | None:
        """The result of a step that was done earlier; asked once, when what it needs is done."""

    def work(self, step: Step, beside: bool) -> Result:
        """Do it. `beside`: in a thread of its own, others may run beside it; else in the thread that called `run`."""

    def failed(self, step: Step, error: Exception) -> None:
        """Hears of each error at once; what it raises ends everything."""


def run(needs: Mapping[K, Collection[K]], done: dict[K, R], worker: Worker[K, R], room: Room) -> dict[K, Failed]:
    """Do all steps of `needs`, which has them in an order in which they can be done, and add their results to `done`.

    Returns the steps that are not done, in order, and why. An exception that is not a step's, Ctrl-C above all,
    interrupts all steps that run, as Ctrl-C would in the main thread, and waits until they have cleared up.
    """
    found, errors, running = set[K](), dict[K, Exception](), dict[K, threading.Thread]()
    ended = SimpleQueue[tuple[K, R | BaseException]]()

    def is_ready(step: K) -> bool:
        if step in done or step in errors or step in running or any(need not in done for need in needs[step]):
            return False
        if step not in found:
            found.add(step)
            if (result := worker.find(step)) is not None:
                done[step] = result
        return step not in done

    try:
        while (begin := room.fitting(list(filter(is_ready, needs)), running)) or running:
            if not running and len(begin) == 1:
                _attempt(worker, begin[0], False, ended)
            for step in begin if running or len(begin) > 1 else ():
                arguments = (worker, step, True, ended)
                running[step] = threading.Thread(target=_attempt, args=arguments, name=str(step), daemon=True)
                running[step].start()
            step, result = ended.get()
            running.pop(step, None)
            if isinstance(result, Exception):
                errors[step] = result
                worker.failed(step, result)
            elif isinstance(result, BaseException):
                raise result
            else:
                done[step] = result
    except BaseException:
        _interrupt(running.values())
        raise
    missing = dict[K, Failed]()
    for step in (step for step in needs if step not in done):
        failed = Failed(step, errors[step]) if step in errors else None
        missing[step] = failed or next(missing[need] for need in needs[step] if need in missing)
    return missing


def _attempt(worker: Worker[K, R], step: K, beside: bool, ended: SimpleQueue[tuple[K, R | BaseException]]) -> None:
    try:
        ended.put((step, worker.work(step, beside)))
    except BaseException as error:
        if not beside and not isinstance(error, Exception):
            raise
        ended.put((step, error))


def _interrupt(threads: Iterable[threading.Thread]) -> None:
    """KeyboardInterrupt in each thread, at its next step of Python, as the main thread would have it."""
    alive = [thread for thread in threads if thread.is_alive()]
    for thread in alive:
        interrupt = ctypes.py_object(KeyboardInterrupt)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), interrupt)
    deadline = time.monotonic() + SECONDS_TO_STOP
    for thread in alive:
        thread.join(max(0.0, deadline - time.monotonic()))


def seconds_of(steps: Mapping[K, float], needs: Mapping[K, Collection[K]], room: Room) -> float:
    """How long steps take that are run like this, each as many seconds as it says; what is not among them is done."""
    waiting, running, now = dict(steps), dict[K, float](), 0.0
    while waiting or running:
        ready = [step for step in waiting if not any(need in waiting or need in running for need in needs[step])]
        for step in room.fitting(ready, running):
            running[step] = now + waiting.pop(step)
        now = min(running.values())
        running = {step: end for step, end in running.items() if end > now}
    return now
