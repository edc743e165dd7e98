"""One benchmark: ours and a named peer on the same input, the same answer asserted first, then timed by turns.

Both run in one process, alternately, and change places every round, so that a busy machine, a warm cache or a clock
that slows down hits both alike. The median of CPU seconds (all threads of the process) says what the work costs, the
median of wall seconds what one waits.
"""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Size = Literal["tiny", "default", "full"]


class PeerMissing(Exception):  # noqa: N818 not a fault: the peer is optional
    """The peer of a contest is not installed; the message says how to install it."""

    def __init__(self, package: str) -> None:
        super().__init__(f"{package} is not installed; to compare with it: pip install -e '.[peers]'")


@dataclass(frozen=True)
class Contest:
    """What is compared. `check` raises AssertionError unless the two answers agree, and says how closely they do."""

    name: str
    work: str  # in words, with its size
    peer: str  # package, version and function, or the formula
    run_ours: Callable[[], Any]
    run_peer: Callable[[], Any]
    check: Callable[[Any, Any], str]
    ours_units: int = 1  # pieces of work in one run, where the peer is too slow to do as many
    peer_units: int = 1
    allocations: bool = False  # compare peaks of traced memory too: NumPy's arrays are traced, PyTorch's are not
    peaks: Callable[[], tuple[int, int]] | None = None  # measures the bytes of ours and the peer, where not traceable
    elsewhere: bool = False  # work is done in other processes: the CPU time of this one says nothing
    clock: Callable[[Any], float] | None = None  # reads the wall seconds off an answer, where starting is not the work
    close: Callable[[], None] = lambda: None  # end what was started for it


class Seconds(NamedTuple):
    """One run."""

    wall: float
    cpu: float


class Outcome(NamedTuple):
    """All runs of a contest, in the order of the rounds."""

    contest: Contest
    ours: list[Seconds]
    peer: list[Seconds]
    agreement: str
    peaks: tuple[int, int] | None = None  # bytes that ours and the peer allocate at most, beyond their input

    def median(self, side: Literal["ours", "peer"], clock: Literal["wall", "cpu"]) -> float:
        """Seconds of one piece of work."""
        times, units = (self.ours, self.contest.ours_units) if side == "ours" else (self.peer, self.contest.peer_units)
        return statistics.median(seconds.wall if clock == "wall" else seconds.cpu for seconds in times) / units

    def ratio(self, clock: Literal["wall", "cpu"]) -> float:
        """Our time as a share of the peer's: below 1 ours is the faster one."""
        return self.median("ours", clock) / self.median("peer", clock)


def hold(contest: Contest, rounds: int) -> Outcome:
    """Check that both give the same answer, which also warms them up; then time `rounds` rounds."""
    try:
        peaks = None
        if contest.allocations:
            (ours, first), (peer, second) = _traced(contest.run_ours), _traced(contest.run_peer)
            peaks = (first, second)
            agreement = contest.check(ours, peer)
        else:
            ours, peer = contest.run_ours(), contest.run_peer()
            agreement = contest.check(ours, peer)
            peaks = contest.peaks() if contest.peaks is not None else None
        outcome = Outcome(contest, [], [], agreement, peaks)
        sides = [(contest.run_ours, outcome.ours), (contest.run_peer, outcome.peer)]
        for number in range(rounds):
            for run, times in sides if number % 2 == 0 else reversed(sides):
                times.append(_timed(run, contest.clock))
    finally:
        contest.close()
    return outcome


def _traced(run: Callable[[], Any]) -> tuple[Any, int]:
    gc.collect()
    tracemalloc.start()
    try:
        answer = run()
        return answer, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _timed(run: Callable[[], Any], clock: Callable[[Any], float] | None) -> Seconds:
    gc.collect()
    gc.disable()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        answer = run()
        seconds = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
        return seconds if clock is None else seconds._replace(wall=clock(answer))
    finally:
        gc.enable()
