"""What fits on nodes, how many workers a training goes on with, which errors are those of lost nodes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import exceptions

from nightseg.cluster import nodes
from nightseg.cluster.nodes import Idle, NodeLost, Sizes, Staffing, fitting, may_be_a_lost_node
from nightseg.errors import UserError


@pytest.mark.parametrize(
    ("there", "each", "count"),
    [
        ([], {"CPU": 1.0}, 0),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"CPU": 2.0, "GPU": 0.0}, 2),  # none reaches over two nodes
        ([{"CPU": 0.0}, {"CPU": 4.0}], {"CPU": 1.0}, 4),  # a head without CPUs has no room
        ([{}, {"CPU": 8.0, "GPU": 1.0}], {"CPU": 1.0, "GPU": 0.25}, 4),
        ([{"CPU": 8.0}], {"CPU": 1.0, "GPU": 1.0}, 0),
        ([{"CPU": 1.0}], {"CPU": 0.1}, 10),  # 1 / 0.1 and the like are whole numbers
        ([{"CPU": 8.0, "GPU": 2.0}], {"CPU": 1.0, "GPU": 0.6}, 2),  # nor does a share reach over two GPUs
        ([{"CPU": 8.0, "GPU": 2.0}], {"CPU": 1.0, "GPU": 0.4}, 4),
        ([{"CPU": 8.0, "GPU": 2.0}], {"CPU": 1.0, "GPU": 0.1}, 8),
        ([{"CPU": 8.0, "GPU": 8.0}], {"CPU": 1.0, "GPU": 3.0}, 2),
        ([{"CPU": 8.0, "GPU": 1.2}], {"CPU": 1.0, "GPU": 0.6}, 1),  # what is free of two, used in part
        ([{"CPU": 8.0, "GPU": 1.5}], {"CPU": 1.0, "GPU": 0.5}, 3),
        ([{"CPU": 8.0, "GPU": 1.5}], {"CPU": 1.0, "GPU": 1.0}, 1),
    ],
)
def test_processes_fit_on_nodes(there: list[dict[str, float]], each: dict[str, float], count: int) -> None:
    assert fitting(there, each) == count


def test_nodes_that_are_dead_or_gone_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0}},
        {"NodeID": "b", "Alive": False, "Resources": {}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: table)
    assert nodes.alive() == {"a": {"CPU": 2.0}}
    assert nodes.lost(["a", "b", "c"]) == {"b", "c"}
    assert nodes.has_lost()
    table.pop()
    assert not nodes.has_lost()


def staffing(asked: int = 3, least: int = 1, **changes: Any) -> tuple[Staffing, list[str]]:
    said: list[str] = []
    return Staffing(asked, least, {"CPU": 1.0, "GPU": 0.0}, said.append, **changes), said


def test_where_all_fit_all_start_at_once() -> None:
    plan, said = staffing()
    assert plan.start(Sizes(5, 3), 0.0) == 3
    assert said == []


def test_with_a_node_less_it_waits_says_so_and_goes_on_with_fewer() -> None:
    plan, said = staffing()
    assert plan.start(Sizes(3, 3), 0.0) == 3
    plan.runs()
    plan.lost(100.0)
    assert [plan.start(Sizes(2, 2), now) for now in (100.0, 104.0)] == [None, None]
    assert said == []  # what a dead worker held may come back in a moment
    assert plan.start(Sizes(2, 2), 106.0) is None
    assert said == [
        "waits for nodes: 3 workers (1 CPU each) are asked for, 2 fit on the nodes that are there. In 24 s it goes on "
        "with 2"
    ]
    assert plan.start(Sizes(2, 2), 129.0) is None
    assert plan.start(Sizes(2, 2), 130.0) == 2
    assert said[1:] == ["goes on with 2 of 3 workers, and the same frames in every step"]


def test_with_another_node_in_time_it_goes_on_with_all() -> None:
    plan, said = staffing()
    plan.lost(0.0)
    assert plan.start(Sizes(2, 2), 3.0) is None
    assert plan.start(Sizes(3, 3), 20.0) == 3
    assert said == []


def test_a_training_does_not_shrink_because_others_work() -> None:
    plan, said = staffing()
    assert [plan.start(Sizes(4, 1), now) for now in (0.0, 6.0, 50.0, 5000.0)] == [None] * 4
    assert said[0] == "waits until other work gives back what 3 workers (1 CPU each) take: 1 fit now"
    assert len(said) == 2  # one a minute at most
    assert plan.start(Sizes(4, 4), 5001.0) == 3


def test_fewer_start_as_soon_as_others_give_them_room() -> None:
    plan, said = staffing(least=2)
    assert [plan.start(Sizes(2, 1), now) for now in (0.0, 40.0)] == [None, None]
    assert said[-1].endswith("and other work holds some of that: it goes on with 2 as soon as that ends")
    assert plan.start(Sizes(2, 2), 41.0) == 2


def test_without_room_for_any_it_says_until_when_and_gives_up() -> None:
    plan, said = staffing(least=2, growth=", and more are started on demand")
    plan.start(Sizes(1, 1), 0.0)
    assert plan.start(Sizes(1, 1), 60.0) is None
    assert said == [
        "waits for nodes: 3 workers (1 CPU each) are asked for, 1 fit on the nodes that are there, and more are "
        "started on demand. It gives up in 29 minutes"
    ]
    with pytest.raises(UserError, match=r"no node with room for 2 workers \(1 CPU each\) came within 30 minutes.*add"):
        plan.start(Sizes(1, 1), 1800.0)


def test_the_first_start_waits_longer_where_nodes_are_started_on_demand() -> None:
    plan, _ = staffing(patience=1800.0)
    assert [plan.start(Sizes(1, 1), now) for now in (0.0, 1799.0)] == [None, None]
    assert plan.start(Sizes(1, 1), 1800.0) == 1
    plan.runs()
    plan.lost(2000.0)
    assert plan.start(Sizes(2, 2), 2030.0) == 2


def test_workers_that_nothing_keeps_from_starting_are_given_up() -> None:
    plan, said = staffing()
    assert [plan.start(Sizes(3, 3), now) for now in (0.0, 20.0, 1799.0)] == [3] * 3
    with pytest.raises(UserError, match=r"compute.train: 3 workers \(1 CPU each\) have not started within 30 minutes"):
        plan.start(Sizes(3, 3), 1800.0)
    assert plan.start(Sizes(4, 3), 1800.0) == 3, "others hold something: shares of GPUs may lie unluckily"
    assert len(said) == 2 and said[0].endswith(
        "have not started for 20 s, although there seems to be room: tries again"
    )


def test_a_smaller_start_that_comes_to_nothing_is_announced_once() -> None:
    plan, said = staffing()
    plan.start(Sizes(2, 2), 0.0)
    assert [plan.start(Sizes(2, 2), now) for now in (30.0, 51.0, 72.0)] == [2] * 3
    assert said == [
        "goes on with 2 of 3 workers, and the same frames in every step",
        "2 workers (1 CPU each) have not started for 51 s, although there seems to be room: tries again",
    ]


@pytest.mark.parametrize(("free", "workers", "larger"), [(0, 1, None), (1, 1, 2), (7, 1, 3), (1, 3, None)])
def test_a_smaller_training_grows_into_what_is_free(free: int, workers: int, larger: int | None) -> None:
    assert staffing()[0].larger(Sizes(9, free), workers) == larger


def test_it_does_not_grow_beyond_what_the_nodes_have_room_for() -> None:
    """Two workers of 0.6 on two GPUs leave 0.8 of them, 0.4 on each."""
    assert staffing()[0].larger(Sizes(2, 1), 2) is None


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


NOBODY = bytes(16)
LOST = [
    exceptions.ActorDiedError(),
    exceptions.ActorUnavailableError("it was restarted", NOBODY),
    exceptions.NodeDiedError("gone"),
    exceptions.WorkerCrashedError(),
    exceptions.ObjectLostError("00" * 28, None, "here"),
    exceptions.OwnerDiedError("00" * 28, None, "here"),
    exceptions.ObjectFetchTimedOutError("00" * 28, None, "here"),
    exceptions.ObjectReconstructionFailedError("00" * 28, None, "here"),
    exceptions.RaySystemError("the raylet is gone"),
    exceptions.RpcError("unavailable"),
    exceptions.ActorUnschedulableError("its node is gone"),
    exceptions.GetTimeoutError("late"),
    NodeLost("1 of 3 nodes is gone"),
    raised(RuntimeError("Ray Data"), exceptions.ActorDiedError()),
]
OTHERS = [
    ValueError("a shape"),
    exceptions.UserCodeException("a bug"),
    raised(exceptions.UserCodeException("a bug"), exceptions.ActorDiedError()),
    exceptions.RuntimeEnvSetupError("no such package"),
    exceptions.AuthenticationError("no token"),
    exceptions.OutOfMemoryError("running low on memory"),
    exceptions.ObjectStoreFullError("full"),
    exceptions.OutOfDiskError("full"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: type(error).__name__)
def test_what_ray_loses_may_be_a_lost_node(error: BaseException) -> None:
    assert may_be_a_lost_node(error)


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_what_would_happen_again_is_no_lost_node(error: BaseException) -> None:
    assert not may_be_a_lost_node(error)


def test_an_actor_that_cannot_be_made_is_no_lost_node() -> None:
    class CannotStartError(exceptions.ActorDiedError):
        actor_init_failed = True

    assert not may_be_a_lost_node(CannotStartError())


def executor_of(config: str | None, *pools: tuple[int, int], has_completed: bool = False) -> SimpleNamespace:
    """An executor of Ray Data with pools of so many actors that run, and that start again."""
    made = [
        SimpleNamespace(num_running_actors=lambda n=n: n, num_restarting_actors=lambda n=again: n) for n, again in pools
    ]
    operator = SimpleNamespace(has_completed=lambda: has_completed, get_autoscaling_actor_pools=lambda: made)
    return SimpleNamespace(_data_context=SimpleNamespace(get_config=lambda key: config), _topology=[operator])


def test_a_pass_is_ended_when_a_node_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"a": {"CPU": 1.0}, "b": {"CPU": 1.0}}
    clock = [0.0]
    monkeypatch.setattr(nodes, "alive", lambda: there)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    watch, executor = nodes.watching()(), executor_of(None)
    watch.before_execution_starts(executor)
    del there["b"]
    watch.on_execution_step(executor)  # it looks once a second
    clock[0] = 2.0
    with pytest.raises(NodeLost, match="1 of 2 nodes is gone"):
        watch.on_execution_step(executor)


# -- passes without an actor -------------------------------------------------------------------------------------------


def idle(growth: str = "") -> tuple[Idle, list[str]]:
    said: list[str] = []
    return Idle({"CPU": 2.0, "GPU": 1.0}, said.append, growth), said


def test_a_pass_without_an_actor_says_every_minute_what_it_waits_for_and_gives_up() -> None:
    waiting, said = idle(", and more are started on demand")
    for second in range(1800):
        waiting.waits(Sizes(0, 0), float(second))
    assert said[0] == (
        "waits for nodes: none that is there has room for an actor (2 CPU, 1 GPU each), and more are started on "
        "demand. It gives up in 30 minutes"
    )
    assert len(said) == 30
    with pytest.raises(UserError) as caught:
        waiting.waits(Sizes(0, 0), 1800.0)
    assert str(caught.value) == (
        "compute.map: no node with room for an actor (2 CPU, 1 GPU each) came within 30 minutes. Cure: add nodes and "
        "run the same command: finished shards are kept."
    )


def test_a_pass_waits_for_others_as_long_as_they_work() -> None:
    waiting, said = idle()
    for now in (0.0, 20.0, 5000.0):
        waiting.waits(Sizes(1, 0), now)
    assert said == ["waits until other work gives back what an actor takes (2 CPU, 1 GPU)"] * 2
    waiting.waits(Sizes(1, 1), 5100.0)
    assert said[2] == "no actor (2 CPU, 1 GPU each) has started for 85 minutes, although there seems to be room"


def test_as_long_as_an_actor_lives_nothing_is_given_up() -> None:
    waiting, said = idle()
    waiting.waits(Sizes(0, 0), 0.0)
    waiting.works()
    waiting.waits(Sizes(0, 0), 3000.0)
    assert said == []


@pytest.mark.parametrize(
    ("pools", "has_completed", "is_told"),
    [
        ([(0, 0)], False, True),
        ([(1, 1)], False, True),
        ([(2, 1)], False, False),
        ([(0, 0)], True, False),
        ([], False, False),
    ],
)
def test_whether_an_actor_lives_is_asked_of_its_pool(
    monkeypatch: pytest.MonkeyPatch, pools: list[tuple[int, int]], has_completed: bool, is_told: bool
) -> None:
    clock, configs = [0.0], {}
    monkeypatch.setattr(nodes, "alive", lambda: {"a": {"CPU": 1.0}})
    monkeypatch.setattr(nodes, "free", dict)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    waiting, said = idle()
    nodes.tell(waiting, SimpleNamespace(set_config=configs.__setitem__))
    watch, executor = nodes.watching()(), executor_of(configs[nodes.IDLE_KEY], *pools, has_completed=has_completed)
    watch.before_execution_starts(executor)
    for clock[0] in (1.0, 21.0):
        watch.on_execution_step(executor)
    assert bool(said) == is_told
