"""Steps of a made-up graph: what runs at the same time, in which order, and what is left when one fails."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import pytest

from nightseg.pipeline import schedule
from nightseg.pipeline.schedule import Room, seconds_of
from tests.programs import started

DIAMOND: Mapping[str, Collection[str]] = {"base": (), "a": ["base"], "b": ["base"], "end": ["a", "b"]}
SOON = 20.0  # seconds that a thread of a busy machine may need


def room(most: Mapping[str, float], takes: Mapping[str, Mapping[str, float]] | None = None, steps: float = 9) -> Room:
    return Room(lambda step: (takes or {}).get(step, {"CPU": 1}), most.__getitem__, steps)


class Recorder:
    """Its steps wait for each other where `meet` says so; `log` has what began and ended, and in which thread."""

    def __init__(self, meet: Collection[str] = (), known: Collection[str] = ()) -> None:
        self.meeting, self.known = threading.Barrier(max(1, len(meet))), known
        self.meet, self.asked = meet, list[str]()
        self.log, self.errors = list[str](), list[str]()
        self.beside: dict[str, bool] = {}
        self.act: dict[str, Callable[[], None]] = {}

    def find(self, step: str) -> str | None:
        self.asked.append(step)
        return f"old {step}" if step in self.known else None

    def work(self, step: str, beside: bool) -> str:
        self.beside[step] = beside
        assert beside == (threading.current_thread() is not threading.main_thread())
        self.log.append(step)
        if step in self.meet:
            self.meeting.wait(SOON)  # passes only if they run at the same time
        self.act.get(step, lambda: None)()
        self.log.append(f"/{step}")
        return f"new {step}"

    def failed(self, step: str, error: Exception) -> None:
        self.errors.append(step)

    def run(self, needs: Mapping[str, Collection[str]], space: Room, done: dict[str, str] | None = None) -> Any:
        self.done = {} if done is None else done
        return schedule.run(needs, self.done, self, space)


def test_branches_run_side_by_side_and_what_needs_both_waits() -> None:
    worker = Recorder(meet=("a", "b"))
    assert worker.run(DIAMOND, room({"CPU": 2})) == {}
    assert worker.done == {step: f"new {step}" for step in DIAMOND}
    assert worker.log[:2] == ["base", "/base"] and worker.log[-2:] == ["end", "/end"]
    assert worker.beside == {"base": False, "a": True, "b": True, "end": False}  # alone: where `run` was called


@pytest.mark.parametrize("space", [room({"CPU": 2}, steps=1), room({"CPU": 1})])
def test_one_after_the_other_in_the_order_of_the_graph(space: Room) -> None:
    worker = Recorder()
    worker.run(DIAMOND, space)
    assert worker.log == ["base", "/base", "a", "/a", "b", "/b", "end", "/end"]
    assert not any(worker.beside.values())


def test_only_what_is_not_done_yet_is_done_and_room_is_not_asked_for_one() -> None:
    def most(resource: str) -> float:
        raise AssertionError("there is nothing to choose")

    worker = Recorder(known=("a", "end"))
    worker.run(DIAMOND, Room(lambda step: {"CPU": 1}, most, 9), {"base": "given"})
    assert worker.log == ["b", "/b"] and worker.asked == ["a", "b", "end"]
    assert worker.done == {"base": "given", "a": "old a", "b": "new b", "end": "old end"}


def test_what_does_not_fit_is_passed_and_what_fits_nowhere_runs_alone() -> None:
    needs: dict[str, tuple[str, ...]] = {"small": (), "large": (), "huge": (), "other": ()}
    takes = {"small": {"CPU": 1}, "large": {"CPU": 2}, "huge": {"CPU": 99, "GPU": 1}, "other": {"CPU": 1}}
    worker = Recorder(meet=("small", "other"))
    assert worker.run(needs, room({"CPU": 2, "GPU": 0}, takes)) == {}
    assert set(worker.log[:2]) == {"small", "other"}
    assert worker.log[4:] == ["large", "/large", "huge", "/huge"]


def test_shares_of_a_gpu_add_up() -> None:
    thirds = room({"GPU": 1}, {key: {"GPU": 1 / 3} for key in "abcd"})
    assert thirds.fitting("abcd", ()) == ["a", "b", "c"] and thirds.fitting("d", ["a", "b"]) == ["d"]
    without = room({"GPU": 0, "CPU": 2}, {key: {"GPU": 0, "CPU": 1} for key in "ab"})
    assert without.fitting("ab", ()) == ["a", "b"]
    everything = room({"CPU": float("inf")}, {key: {"CPU": float("inf")} for key in "ab"})
    assert everything.fitting("ab", ()) == ["a"]


def fails() -> None:
    raise ValueError("no frames")


def test_a_failure_takes_along_what_needs_it_and_nothing_else() -> None:
    needs = {"a": (), "b": (), "a2": ["a"], "b2": ["b"], "a3": ["a2"], "both": ["b2", "a3"]}
    for space in (room({"CPU": 2}), room({"CPU": 2}, steps=1)):
        worker = Recorder()
        worker.act["a"] = fails
        missing = worker.run(needs, space)
        assert list(worker.done) == ["b", "b2"] and worker.errors == ["a"]
        assert list(missing) == ["a", "a2", "a3", "both"]
        assert {found.by for found in missing.values()} == {"a"} and str(missing["both"].error) == "no frames"


def test_another_branch_is_finished_when_one_fails_meanwhile() -> None:
    worker = Recorder(meet=("a", "b"))
    failed = threading.Event()
    worker.act["a"] = fails
    worker.act["b"] = lambda: failed.wait(SOON) and None
    worker.failed = lambda step, error: failed.set()  # type: ignore[method-assign]
    assert list(worker.run(DIAMOND, room({"CPU": 2}))) == ["a", "end"]
    assert failed.is_set() and worker.done.keys() == {"base", "b"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupt_reaches_all_branches_and_waits_for_them(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether Ctrl-C comes, or a step's error is to end everything."""
    ended, asleep = list[str](), threading.Semaphore(0)

    def sleeps() -> None:
        try:
            asleep.release()
            while True:
                time.sleep(0.01)
        except KeyboardInterrupt:
            time.sleep(0.1)
            ended.append(threading.current_thread().name)
            raise

    def stops() -> None:
        assert all(asleep.acquire(timeout=SOON) for _ in "ab")
        raise error("stop")

    worker = Recorder()
    worker.act = {"a": sleeps, "b": sleeps, "c": stops}

    def failed(step: str, error: Exception) -> None:
        raise error

    monkeypatch.setattr(worker, "failed", failed)
    with pytest.raises(error, match="stop"):
        worker.run(dict.fromkeys("abc", ()), room({"CPU": 3}))
    assert sorted(ended) == ["a", "b"] and worker.done == {}
    assert not [thread for thread in threading.enumerate() if thread.name in "abc"]


def test_a_step_that_hears_no_interrupt_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "SECONDS_TO_STOP", 0.2)
    release = threading.Event()
    worker = Recorder(meet=("a", "b"))
    worker.act = {"a": lambda: release.wait(SOON) and None, "b": fails}

    def stop(step: str, error: Exception) -> None:
        raise error

    monkeypatch.setattr(worker, "failed", stop)
    with pytest.raises(ValueError, match="no frames"):
        worker.run(dict.fromkeys("ab", ()), room({"CPU": 2}))
    assert "/a" not in worker.log
    release.set()


COMMAND = """
import os, signal, sys, time, click
from nightseg.cli import output
from nightseg.pipeline import schedule
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored in the background

class Sleepers:
    def find(self, step): pass
    def failed(self, step, error): raise error
    def work(self, step, beside):
        try:
            os.write(1, f"{step}\\n".encode())  # in one piece, as two threads write
            while True: time.sleep(0.01)
        finally:
            os.write(1, b"clears up\\n")
            time.sleep(float(sys.argv[2]))

@click.group(cls=output.Failures)
def group(): pass

@group.command()
@click.argument("seconds")
def work(seconds):
    schedule.run({"a": (), "b": ()}, {}, Sleepers(), schedule.Room(lambda step: {}, lambda resource: 1.0, 2))

group()
"""


@pytest.mark.parametrize(("seconds", "interrupts"), [(0.2, 1), (60.0, 2)])
def test_control_c_stops_a_command_at_its_branches_and_again_at_once(seconds: float, interrupts: int) -> None:
    words = [sys.executable, "-c", COMMAND, "work", str(seconds)]
    with started(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert {process.stdout.readline(), process.stdout.readline()} == {"a\n", "b\n"}
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert [process.stdout.readline() for _ in "ab"] == ["clears up\n"] * 2
        for _ in range(interrupts - 1):
            process.send_signal(signal.SIGINT)
        said = process.stderr.read().replace("nightseg work: at work\n", "")
        assert process.wait(SOON) == 1 and time.monotonic() - began < SOON
        assert said.splitlines()[-1].startswith("nightseg: stopped; the same command continues"), said
        assert "Traceback" not in said


def test_the_time_of_branches_is_that_of_the_longest_way_or_of_the_room() -> None:
    seconds = {"base": 5.0, "a": 10.0, "b": 20.0, "end": 1.0}
    assert seconds_of(seconds, DIAMOND, room({"CPU": 1})) == 36.0
    assert seconds_of(seconds, DIAMOND, room({"CPU": 2})) == 26.0
    del seconds["base"]  # it is done
    assert seconds_of(seconds, DIAMOND, room({"CPU": 2})) == 21.0
    assert seconds_of({}, DIAMOND, room({"CPU": 2})) == 0.0
    three = dict.fromkeys("abc", 10.0)
    assert seconds_of(three, dict.fromkeys("abc", ()), room({"CPU": 2})) == 20.0
