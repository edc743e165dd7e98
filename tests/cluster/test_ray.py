"""Where the cluster is, how it is entered, and that a local one is quiet and leaves no token behind."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nightseg.cluster import ray as cluster
from nightseg.cluster.launch import most_resources, node_types
from nightseg.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://127.0.0.1:8265", "'http://127.0.0.1:8265'"),
        ("ray://head:10001", "'ray://head:10001'"),
        ("http://someone:secret@head:8265", "'http://head:8265'"),
        ("http://someone:sec/ret@head:8265", "'http://head:8265'"),
    ],
)
def test_an_address_of_another_kind_is_refused(
    not_connected: None, monkeypatch: pytest.MonkeyPatch, address: str, shown: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as caught:
        cluster.connect()
    assert f"RAY_ADDRESS: {shown}" in str(caught.value)
    assert "ray job submit" in str(caught.value) and "unset RAY_ADDRESS" in str(caught.value)


def test_an_address_where_nobody_listens_is_refused_at_once(
    not_connected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"RAY_ADDRESS: no cluster answers at {address}"):
        cluster.connect()
    assert time.monotonic() - started < 5


def ask(count: int, said: list[str]) -> None:
    cluster.require("actor", count, cpus=0.5, gpus=0.0, place="compute.map", say=said.append)


def a_cluster(
    patch: pytest.MonkeyPatch, *cpus: float, most: float | None = None, is_here: bool = False, has_lost: bool = False
) -> None:
    """Nodes with so many CPUs. `most`: that an autoscaler may bring it to."""
    patch.setattr(cluster, "_started_here", is_here)
    patch.setattr(cluster, "resources", lambda: {"CPU": sum(cpus)})
    patch.setattr(cluster, "capacity", lambda resource: {"CPU": most or sum(cpus)}.get(resource, 0.0))
    patch.setattr(cluster, "may_grow", lambda: most is not None)
    patch.setattr("nightseg.cluster.nodes.alive", lambda: {str(i): {"CPU": count} for i, count in enumerate(cpus)})
    patch.setattr("nightseg.cluster.nodes.has_lost", lambda: has_lost)


@pytest.mark.usefixtures("not_connected")
def test_work_that_needs_no_ray_asks_no_cluster_whether_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job whose stages are all done in its driver."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert not cluster.is_this_machine() and not cluster.may_grow()


def test_a_request_that_needs_sleeping_nodes_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    a_cluster(monkeypatch, 1.0, most=64.0)
    said: list[str] = []
    ask(2, said)
    assert said == []
    ask(6, said)
    assert said == ["6 actors need 3 CPU, the cluster has 1 now and may grow to 64: waiting for more nodes"]
    a_cluster(monkeypatch, 1.0, most=math.inf)
    ask(6, said)
    assert said[1] == "6 actors need 3 CPU, the cluster has 1 now: waiting for more nodes"


@pytest.mark.parametrize(("count", "fits"), [(4, True), (5, False)])
def test_requests_beyond_the_cluster_are_refused(monkeypatch: pytest.MonkeyPatch, count: int, fits: bool) -> None:
    a_cluster(monkeypatch, 2.0, is_here=True)
    if fits:
        ask(count, [])
        return
    with pytest.raises(UserError) as caught:
        ask(count, [])
    assert str(caught.value) == (
        "compute.map: 5 actors with 0.5 CPU each need 2.5 CPU, but the cluster has 2. Cure: lower "
        "compute.map.actors or compute.map.cpus_per_actor, or add nodes."
    )


def test_requests_beyond_what_a_cluster_can_grow_to_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a_cluster(monkeypatch, 2.0, most=8.0)
    with pytest.raises(UserError, match=r"20 actors .* need 10 CPU, but the cluster has 2 and can grow to 8\."):
        ask(20, [])


def test_no_process_reaches_over_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    a_cluster(monkeypatch, 0.4, 0.8, 0.8)
    with pytest.raises(UserError, match=r"^compute.map: 4 actors with 0.5 CPU each do not fit on the nodes .*, 2 do"):
        ask(4, [])


def test_a_cluster_that_has_lost_nodes_works_on_with_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    a_cluster(monkeypatch, 1.0, has_lost=True)
    said: list[str] = []
    ask(6, said)
    assert said == ["6 actors need 3 CPU, the cluster has 1 now, as nodes were lost: fewer work at a time"]
    a_cluster(monkeypatch, 1.0, is_here=True, has_lost=True)  # one machine loses no nodes
    with pytest.raises(UserError):
        ask(6, [])


CLUSTER = {
    "head_node_type": "head",
    "max_workers": 6,
    "available_node_types": {
        "head": {"resources": {"CPU": 0}},
        "cpus": {"resources": {"CPU": 16}, "max_workers": 3},
        "gpus": {"resources": {"CPU": 8, "GPU": 4}, "max_workers": 2},
    },
}


@pytest.mark.parametrize(
    ("count", "cpus", "gpus", "fit"),
    [
        (1, 16.0, 0.0, None),
        (1, 20.0, 0.0, 0),  # of 64 that all nodes have together
        (3, 9.0, 0.0, None),
        (4, 9.0, 0.0, 3),
        (2, 8.0, 4.0, None),
        (1, 10.0, 1.0, 0),  # one type has the CPUs, another one the GPUs
        (8, 1.0, 0.6, None),
        (9, 1.0, 0.6, 8),  # of 13 that the sum of GPUs would be enough for
    ],
)
def test_a_growing_cluster_refuses_what_fits_on_no_node_that_it_may_start(
    monkeypatch: pytest.MonkeyPatch, count: int, cpus: float, gpus: float, fit: int | None
) -> None:
    a_cluster(monkeypatch, 0.0, most=64.0)
    monkeypatch.setattr(cluster, "capacity", {"CPU": 64.0, "GPU": 8.0}.__getitem__)
    wants = {"cpus": cpus, "gpus": gpus, "place": "compute.map", "say": lambda message: None}
    monkeypatch.setattr(cluster, "_left_by_ray_up", lambda: CLUSTER)
    if fit is None:
        cluster.require("actor", count, **wants)
    else:
        with pytest.raises(UserError, match=rf"do not fit on the nodes that this cluster has or may start, {fit} do:"):
            cluster.require("actor", count, **wants)
    monkeypatch.setattr(cluster, "_left_by_ray_up", lambda: None)  # KubeRay says nothing of its types
    cluster.require("actor", count, **wants)


LOCAL = {"head_node_type": "head", "max_workers": 3, "available_node_types": {"head": {}, "any": {"resources": {}}}}


@pytest.mark.parametrize(
    ("config", "launched", "limits", "left", "expected"),
    [
        (None, 0, None, CLUSTER, 2.0),  # by hand: what is there
        (None, 3, None, None, math.inf),
        (None, 3, None, CLUSTER, 64.0),
        (None, 6, None, CLUSTER, 2.0),  # all that it may start are there
        (None, 3, None, LOCAL, math.inf),
        (None, 4, None, LOCAL, 2.0),
        (None, 3, None, "{a: [", math.inf),
        ("autoscaling", 0, None, None, math.inf),
        ("autoscaling", 0, {"CPU": 32, "GPU": 8}, CLUSTER, 32.0),
        ("autoscaling", 0, {"GPU": 8}, None, 2.0),
    ],
)
def test_sleeping_nodes_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str | None, launched: int, limits: dict[str, int] | None,
    left: Any, expected: float,
) -> None:  # fmt: skip
    """`launched`: nodes that a launcher started; `left`: what `ray up` left on the head."""
    state = SimpleNamespace(get_cluster_config=lambda: config, get_max_resources_from_cluster_config=lambda: limits)
    monkeypatch.setattr("ray._private.state.state", state)
    monkeypatch.setattr("nightseg.cluster.nodes.are_launched", lambda: launched > 0)
    monkeypatch.setattr("nightseg.cluster.nodes.alive", lambda: dict.fromkeys(range(launched)))
    monkeypatch.setattr(cluster, "_started_here", False)
    monkeypatch.setattr(cluster, "is_connected", lambda: True)
    monkeypatch.setattr(cluster, "resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(cluster, "BOOTSTRAP_CONFIG", str(tmp_path / "left.yaml"))
    if left is not None:
        (tmp_path / "left.yaml").write_text(left if isinstance(left, str) else json.dumps(left))
    assert cluster.capacity("CPU") == expected


def test_what_a_cluster_file_allows_together() -> None:
    kinds = node_types(CLUSTER)
    assert kinds == [({"CPU": 0.0}, 1), ({"CPU": 16.0}, 3), ({"CPU": 8.0, "GPU": 4.0}, 2)]
    assert most_resources(CLUSTER) == {"CPU": 64.0, "GPU": 8.0}
    workers = {"head": {}, "any": {"resources": {"CPU": 2}}}
    assert most_resources(CLUSTER | {"available_node_types": workers}) is None, "the head tells by itself what it has"
    workers["head"] = {"resources": {"CPU": 1}}
    assert most_resources(CLUSTER | {"available_node_types": workers}) == {"CPU": 13.0}, "max_workers of all"
    assert most_resources(None) is None and most_resources({}) is None


@pytest.mark.parametrize(("is_here", "memory"), [(True, 8e9), (False, math.inf)])
def test_memory_is_shared_by_the_work_of_one_machine_only(
    monkeypatch: pytest.MonkeyPatch, is_here: bool, memory: float
) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "_started_here", is_here)
    monkeypatch.setattr(cluster, "resources", lambda: {"CPU": 2.0, "memory": 8e9})
    monkeypatch.setattr(cluster, "capacity", lambda resource: {"CPU": 64.0, "GPU": 0.0}[resource])
    assert [cluster.room(name) for name in ("CPU", "GPU", "memory")] == [64.0, 0.0, memory]


def test_before_it_connects_it_knows_whether_the_cluster_will_be_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    connected = SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    monkeypatch.setattr(cluster, "_started_here", False)
    for address, is_here in (("", True), ("local", True), ("10.0.0.1:6379", False), ("auto", False)):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert cluster.is_this_machine() == is_here
        assert cluster.expected_room("CPU") == (len(os.sched_getaffinity(0)) if is_here else math.inf)
        assert cluster.expected_room("GPU") == math.inf
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setitem(sys.modules, "ray", connected)
    assert not cluster.is_this_machine()  # somebody else has joined it
    monkeypatch.setattr(cluster, "_started_here", True)
    assert cluster.is_this_machine()


LOCAL = """
import json, os, stat, sys
from nightseg.cluster import ray as cluster
cluster.connect(num_cpus=1)
cluster.connect(num_cpus=5)
import ray
seen = ray.get(ray.remote(lambda: (os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_AUTH_TOKEN"))).remote())
print(json.dumps({"cpus": cluster.resources()["CPU"], "local": cluster.is_local(), "mode": seen[0],
    "has_token": bool(seen[1])}))
cluster.disconnect()
assert not cluster.is_local()
"""


def run_local(home: Path, **environment: str) -> dict[str, Any]:
    import json

    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOCAL],
        env=clean | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    answer: dict[str, Any] = json.loads(finished.stdout)
    return answer


@pytest.mark.ray
def test_a_local_ray_is_quiet_and_its_token_stays_in_memory(tmp_path: Path) -> None:
    home = tmp_path / "home"  # does not exist, and cannot be made: as in a container without a home
    tmp_path.chmod(0o500)
    answer = run_local(home)
    assert answer == {"cpus": 1.0, "local": True, "mode": "token", "has_token": True}
    assert not home.exists()
    tmp_path.chmod(0o700)


@pytest.mark.ray
@pytest.mark.slow
def test_a_token_file_is_used_and_closed_to_others(tmp_path: Path) -> None:
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("0123456789abcdef" * 4)
    file.chmod(0o644)
    file.parent.chmod(0o755)
    assert run_local(tmp_path)["has_token"] is False
    assert [stat.S_IMODE(place.stat().st_mode) for place in (file, file.parent)] == [0o600, 0o700]


@pytest.mark.ray
@pytest.mark.slow
def test_the_users_choice_of_authentication_is_kept(tmp_path: Path) -> None:
    assert run_local(tmp_path, RAY_AUTH_MODE="disabled")["mode"] == "disabled"
    assert list(tmp_path.iterdir()) == []


JOIN = """
import os
import ray
from nightseg.cluster import ray as cluster
from nightseg.errors import UserError
try:
    cluster.connect(num_cpus=5)
    spins = ray.get(ray.remote(lambda: os.environ.get("GOMP_SPINCOUNT")).remote())
    print(cluster.resources()["CPU"], cluster.is_local(), spins)
except UserError as error:
    print(error)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_cluster_is_joined_with_its_token_only(tmp_path: Path) -> None:
    port, token = free_port(), "0123456789abcdef" * 4
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}", "--num-cpus=1"]
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(
            [*start, "--include-dashboard=false", "--disable-usage-stats", "--block"],
            env=clean | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in (tmp_path / "head.log").read_text() and time.monotonic() < deadline:
            time.sleep(0.2)

        def join(token: str) -> str:
            environment = clean | {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_TOKEN": token}
            joined = subprocess.run(
                [sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=100
            )
            return joined.stdout

        assert join(token) == "1.0 False 1000\n"
        refusal = join("f" * 64)
        assert f"RAY_ADDRESS: the cluster at 127.0.0.1:{port}" in refusal
        assert "RAY_AUTH_TOKEN" in refusal and token not in refusal and "f" * 64 not in refusal
    finally:
        head.terminate()
        head.wait(timeout=60)


@pytest.mark.parametrize("was_connected", [False, True])
def test_work_inside_other_work_leaves_the_connection_that_it_found(
    monkeypatch: pytest.MonkeyPatch, was_connected: bool
) -> None:
    calls: list[str] = []
    monkeypatch.setattr("ray.is_initialized", lambda: was_connected)
    monkeypatch.setattr(cluster, "disconnect", lambda: calls.append("disconnect"))
    with pytest.raises(KeyError), cluster.left_as_found():
        raise KeyError
    assert calls == ([] if was_connected else ["disconnect"])


@pytest.mark.parametrize("own", [None, lambda *_: None])
def test_a_program_keeps_its_handler_of_sigterm(not_connected: None, monkeypatch: pytest.MonkeyPatch, own: Any) -> None:
    """Ray's ends the process in its own words, and with stacks of C++; one that has no handler gets it."""
    import ray

    def of_ray(*_: Any) -> None: ...

    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, of_ray))
    monkeypatch.setattr(cluster, "hide_daemons", lambda: None)
    before = signal.signal(signal.SIGTERM, own or signal.SIG_DFL)
    try:
        cluster.connect()
        assert signal.getsignal(signal.SIGTERM) is (own or of_ray)
    finally:
        signal.signal(signal.SIGTERM, before)
