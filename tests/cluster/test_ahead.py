"""When a stage has so little left that nodes for the next one are asked for, and how many."""

from __future__ import annotations

import threading

import pytest

from nightseg.cluster import ahead, nodes
from nightseg.cluster import ray as cluster
from nightseg.cluster.ahead import SECONDS_AHEAD, EndInSight
from nightseg.progress import SilentProgress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize("of_before", [0, 500])
def test_it_is_near_once_when_so_much_is_left_as_takes_five_minutes(clock: Clock, of_before: int) -> None:
    """A unit a second; what an earlier run had finished comes at once, and says nothing of the rate."""
    told: list[int] = []
    done = of_before
    with EndInSight(SilentProgress(), lambda: told.append(done), clock).task("score", 2000, "frames") as task:
        task.advance(of_before)
        while done < 2000:
            clock.now += 1
            done += 1
            task.advance(1, loss=0.5)
    assert told == [pytest.approx(2000 - SECONDS_AHEAD, abs=1)]


def test_a_stage_of_several_tasks_asks_once_and_one_of_unknown_length_not_at_all(clock: Clock) -> None:
    told: list[str] = []
    progress = EndInSight(SilentProgress(), lambda: told.append("near"), clock)
    with progress.task("read", None, "frames") as task:
        clock.now += 10
        task.advance(5)
    assert told == []
    for _ in range(3):
        with progress.task("short", 10, "frames") as task:
            clock.now += 10
            task.advance(5)
    assert told == ["near"]


def test_what_is_missing_is_what_no_node_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "alive", lambda: {"a": {"CPU": 5.0, "GPU": 1.0}, "b": {"CPU": 4.0}})
    assert ahead.missing(6, {"CPU": 2.0, "GPU": 0.0}) == 2  # two on each
    assert ahead.missing(3, {"CPU": 2.0, "GPU": 0.0}) == 0
    assert ahead.missing(2, {"CPU": 1.0, "GPU": 1.0}) == 1


class Group:
    """A placement group that is never placed."""

    def __init__(self, bundles: list[dict[str, float]]) -> None:
        self.asked, self.is_removed = threading.Event(), False

    def wait(self, timeout_seconds: float) -> bool:
        self.asked.set()
        threading.Event().wait(timeout_seconds)
        return False


def test_nobody_asks_after_the_cluster_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray connects anew whoever asks then."""
    groups, left = list[Group](), list[bool]()

    def made(bundles: list[dict[str, float]]) -> Group:
        groups.append(Group(bundles))
        return groups[-1]

    def is_asked() -> bool:
        return any(thread.name == "nodes asked for ahead" for thread in threading.enumerate())

    monkeypatch.setattr(ahead, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(nodes, "alive", dict)
    monkeypatch.setattr(nodes, "free", dict)
    monkeypatch.setattr("ray.util.placement_group", made)
    monkeypatch.setattr("ray.util.remove_placement_group", lambda group: setattr(group, "is_removed", True))
    monkeypatch.setattr("ray.shutdown", lambda: left.append(is_asked()))
    monkeypatch.setattr(cluster, "_started_here", False)
    ahead.ask(2, {"CPU": 1.0, "GPU": 0.0})
    while not groups:
        pass
    assert groups[0].asked.wait(10) and is_asked()
    cluster.disconnect()
    assert left == [False] and all(group.is_removed for group in groups)
