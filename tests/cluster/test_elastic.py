"""Sizes and restarts of trainings as Ray Train asks for them, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import FailureConfig, ScalingConfig, WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, NoopDecision, ResizeDecision

from nightseg.cluster import elastic
from nightseg.cluster.nodes import Sizes, Staffing
from nightseg.errors import UserError


class Course:
    """A policy of three workers, and what it hears and says."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.sizes, self.checkpoint = 100.0, Sizes(3, 3), "report-1"
        self.said: list[str] = []
        self.resized, self.given_up = 0, list[UserError]()
        patch.setattr("time.monotonic", lambda: self.now)
        patch.setattr(elastic.nodes, "sizes", lambda each: self.sizes)
        patch.setattr(FixedScalingPolicy, "_maybe_send_resource_request", lambda policy: None)
        self.policy = elastic.scaling_policy(
            ScalingConfig(num_workers=3, resources_per_worker={"CPU": 1}),
            Staffing(3, 1, {"CPU": 1.0}, self.said.append),
            newest=lambda: self.checkpoint,
            resizes=self._resizes,
            gives_up=self.given_up.append,
        )

    def _resizes(self) -> None:
        self.resized += 1

    def start(self) -> Any:
        return self.policy.make_decision_for_non_running_worker_group()

    def goes_on(self, workers: int, seconds: float = elastic.SECONDS_BETWEEN_LOOKS) -> Any:
        self.now += seconds
        return self.policy.make_decision_for_running_worker_group(SimpleNamespace(num_workers=workers), None)


@pytest.fixture
def course(monkeypatch: pytest.MonkeyPatch) -> Course:
    return Course(monkeypatch)


def test_it_starts_waits_and_shrinks(course: Course) -> None:
    assert course.start() == ResizeDecision(3, {"CPU": 1})
    course.policy.before_controller_execute_failure_decision(FailureDecision.RETRY)
    course.sizes = Sizes(2, 2)
    assert isinstance(course.start(), NoopDecision)
    course.now += 31
    assert course.start() == ResizeDecision(2, {"CPU": 1})
    assert course.resized == 0


def test_a_start_that_comes_to_nothing_is_told_until_one_does(course: Course) -> None:
    """Ray gives up on it after 20 seconds, and counts no failure."""
    for _ in range(8):
        assert course.start() == ResizeDecision(3, {"CPU": 1})
        course.now += 20
        course.policy.before_controller_execute_failure_decision(FailureDecision.RETRY)
    assert course.said == [
        f"3 workers (1 CPU each) have not started for {waited}, although there seems to be room: tries again"
        for waited in ("20 s", "80 s", "2 minutes")
    ]
    course.start()
    course.goes_on(3)
    course.start()
    assert len(course.said) == 3


def test_it_grows_right_after_a_checkpoint(course: Course) -> None:
    course.sizes = Sizes(3, 0)
    assert isinstance(course.goes_on(2), NoopDecision)
    course.sizes = Sizes(3, 1)
    assert isinstance(course.goes_on(2, seconds=1.0), NoopDecision)  # too soon to look again
    assert isinstance(course.goes_on(2), NoopDecision)  # room, but what was done since the checkpoint would be lost
    assert isinstance(course.goes_on(2), NoopDecision)
    course.checkpoint = "report-2"
    assert course.goes_on(2) == ResizeDecision(3, {"CPU": 1})
    assert course.said == ["there is room again: goes on with 3 of 3 workers"]
    assert course.resized == 1
    assert isinstance(course.goes_on(3), NoopDecision)


def test_room_that_went_away_again_is_not_waited_for(course: Course) -> None:
    course.sizes = Sizes(3, 1)
    course.goes_on(2)
    course.sizes = Sizes(2, 0)
    course.goes_on(2)
    course.sizes, course.checkpoint = Sizes(3, 1), "report-2"
    assert isinstance(course.goes_on(2), NoopDecision)


def test_who_gives_up_says_so(course: Course) -> None:
    course.sizes = Sizes(0, 0)
    course.start()
    course.now += 1800
    with pytest.raises(UserError, match="no node with room"):
        course.start()
    assert len(course.given_up) == 1


def test_failures_that_a_lost_node_explains_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"a": {}, "b": {}, "c": {}}
    monkeypatch.setattr("nightseg.cluster.nodes.alive", lambda: dict(there))
    policy = elastic.failure_policy(FailureConfig(max_failures=1))
    failure = WorkerGroupError("a worker died", {0: RuntimeError("connection closed")})
    assert policy.make_decision(failure) is FailureDecision.RETRY  # Ray does not know yet that its node is gone
    del there["a"]
    assert policy.make_decision(failure) is FailureDecision.RETRY
    del there["b"]
    assert policy.make_decision(failure) is FailureDecision.RETRY
    assert policy.make_decision(failure) is FailureDecision.RAISE  # of its own
