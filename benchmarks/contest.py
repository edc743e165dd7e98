"""One benchmark: ours and a named peer on the same input, the same answer asserted first, then timed by turns.

Both run in one process, alternately, and change places every round, so that a busy machine, a warm cache or a clock
that slows down hits both alike. The median of CPU seconds (all threads of the process) says what the work costs, the
median of wall seconds what one waits.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Size = Literal["tiny", "default", "full"]


@dataclass(frozen=True)
class Contest:
    """What is compared. `check` raises AssertionError unless the two answers are the same."""

    name: str
    work: str  # in words, with its size
    peer: str  # package, version and function, or the formula
    run_ours: Callable[[], Any]
    run_peer: Callable[[], Any]
    check: Callable[[Any, Any], None]


class Seconds(NamedTuple):
    """One run."""

    wall: float
    cpu: float


class Outcome(NamedTuple):
    """All runs of a contest, in the order of the rounds."""

    contest: Contest
    ours: list[Seconds]
    peer: list[Seconds]

    def median(self, side: Literal["ours", "peer"], clock: Literal["wall", "cpu"]) -> float:
        times = self.ours if side == "ours" else self.peer
        return statistics.median(seconds.wall if clock == "wall" else seconds.cpu for seconds in times)

    def ratio(self, clock: Literal["wall", "cpu"]) -> float:
        """How many times as long the peer takes; below 1 it is the faster one."""
        return self.median("peer", clock) / self.median("ours", clock)


def hold(contest: Contest, rounds: int) -> Outcome:
    """Check that both give the same answer, which also warms them up; then time `rounds` rounds."""
    contest.check(contest.run_ours(), contest.run_peer())
    outcome = Outcome(contest, [], [])
    sides = [(contest.run_ours, outcome.ours), (contest.run_peer, outcome.peer)]
    for number in range(rounds):
        for run, times in sides if number % 2 == 0 else reversed(sides):
            times.append(_timed(run))
    return outcome


def _timed(run: Callable[[], Any]) -> Seconds:
    gc.collect()
    gc.disable()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu)
    finally:
        gc.enable()
