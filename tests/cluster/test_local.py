"""A Ray of this machine alone: who could reach it, where it lies, what is left of it, and one that is slow to start."""

from __future__ import annotations

import http.client
import ipaddress
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import grpc
import pytest
from ray.core.generated import core_worker_pb2 as core_worker
from ray.core.generated import gcs_service_pb2 as gcs
from ray.core.generated import node_manager_pb2 as node_manager
from ray.core.generated import reporter_pb2 as reporter
from ray.core.generated.core_worker_pb2_grpc import CoreWorkerServiceStub
from ray.core.generated.gcs_service_pb2_grpc import InternalKVGcsServiceStub, NodeInfoGcsServiceStub
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
from ray.core.generated.reporter_pb2_grpc import ReporterServiceStub

from nightseg.cluster import local
from nightseg.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


class Listener(NamedTuple):
    process: str
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int


def listeners(pid: int) -> set[Listener]:
    """Where a process and all below it listen, TCP and UDP, by the kernel."""
    owners = {}
    for process in [pid, *below(pid)]:
        try:
            name = Path(f"/proc/{process}/comm").read_text().strip()
            for file in Path(f"/proc/{process}/fd").iterdir():
                owners[os.readlink(file)] = name
        except OSError:
            continue  # it ends this moment
    found = set()
    for kind, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            fields = line.split()
            owner = owners.get(f"socket:[{fields[9]}]")
            if owner is not None and fields[3] == state:
                place, _, port = fields[1].partition(":")
                words = [bytes.fromhex(place[start : start + 8])[::-1] for start in range(0, len(place), 8)]
                address = ipaddress.ip_address(b"".join(words))
                mapped = getattr(address, "ipv4_mapped", None)
                found.add(Listener(owner, mapped or address, int(port, 16)))
    return found


def below(pid: int) -> Iterator[int]:
    parents: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(place.name))
    open_ones = [pid]
    while open_ones:
        children = parents.get(open_ones.pop(), [])
        yield from children
        open_ones += children


def beyond_loopback(found: set[Listener]) -> list[Listener]:
    return [one for one in found if not one.address.is_loopback]


def done_for_strangers(found: set[Listener]) -> list[str]:
    """What is answered to those without the token. Counts of Prometheus are for all on this machine."""
    calls = {
        "GCS": lambda channel: NodeInfoGcsServiceStub(channel).GetAllNodeInfo(gcs.GetAllNodeInfoRequest(), timeout=20),
        "store": lambda channel: InternalKVGcsServiceStub(channel).InternalKVGet(
            gcs.InternalKVGetRequest(), timeout=20
        ),
        "task": lambda channel: CoreWorkerServiceStub(channel).PushTask(core_worker.PushTaskRequest(), timeout=20),
        "node": lambda channel: NodeManagerServiceStub(channel).GetNodeStats(
            node_manager.GetNodeStatsRequest(), timeout=20
        ),
        "trace": lambda channel: ReporterServiceStub(channel).GetTraceback(
            reporter.GetTracebackRequest(pid=1), timeout=20
        ),
    }
    answers, refused = [], set()
    for one in found:
        for path in ("api/jobs/", "api/job_agent/jobs/", "get_or_create_runtime_env"):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{one.port}/{path}", timeout=20) as answer:
                    if not answer.read().startswith(b"# HELP"):
                        answers.append(f"{one.process}: {path}")
            except urllib.error.HTTPError as error:
                refused.add((path, error.code))
                error.close()
            except (OSError, http.client.HTTPException):
                break  # it does not speak HTTP
        for name, call in calls.items():
            with grpc.insecure_channel(f"127.0.0.1:{one.port}") as channel:
                try:
                    call(channel)
                    answers.append(f"{one.process}: {name}")
                except grpc.RpcError as error:
                    refused.add((name, error.code()))
    unknown = grpc.StatusCode.UNAUTHENTICATED
    asked = {("api/jobs/", 401), ("api/job_agent/jobs/", 401), *((name, unknown) for name in calls)}
    assert asked <= refused, "each was asked at its own door, too"
    return answers


@pytest.mark.ray
def test_all_of_it_listens_on_loopback_and_its_folder_is_closed(ray_cluster: None) -> None:
    import ray

    ray.get(ray.remote(num_cpus=0)(lambda: None).remote())  # one worker at least
    found = listeners(os.getpid())
    assert {"gcs_server", "raylet"} <= {one.process for one in found}
    assert beyond_loopback(found) == []
    node = ray._private.worker._global_node
    assert node is not None
    folder = Path(node.get_session_dir_path())
    assert stat.S_IMODE(folder.parents[1].stat().st_mode) == 0o700
    assert folder.parents[2].name == f"nightseg-{os.getuid()}"


RECIPE = """
name: tiny
taxonomy: camvid11
compute: {train: {workers: 2, cpus_per_worker: 1}, map: {actors: 1}}
datasets:
  day: {layout: scenes, count: 4, size: [32, 64], mix: {day: 1.0}}
  test: {layout: scenes, count: 2, first: 50, size: [32, 64], mix: {night: 1.0}}
network: {encoder: resnet18, pyramid_channels: 8, head_channels: 8}
training: {optimizer: adamw, batch: 2, epochs: 1, steps_per_epoch: 1, warmup_steps: 0, crop: [32, 64]}
models: {day_only: {train: [day], start: scratch}}
test_sets: {night: test}
"""
RUN = """
import sys
import nightseg
from nightseg.cluster import ray as cluster
cluster.connect(num_cpus=3, dashboard=True)
nightseg.run(sys.argv[1], run_dir=sys.argv[2])
print("done", flush=True)
sys.stdin.read()
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_opens_no_door(short: Path, tmp_path: Path) -> None:
    """Two workers that train together, actors and the dashboard: on loopback, and silent to who has no token."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = clean | {"HOME": str(tmp_path), "TMPDIR": str(short), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", RUN, tmp_path / "tiny.yaml", tmp_path / "run"]
    seen: set[Listener] = set()
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert running.stdout is not None
    try:
        finished = threading.Event()
        done = threading.Thread(target=lambda: (running.stdout.readline(), finished.set()), daemon=True)
        done.start()
        while not finished.wait(0.1):
            seen |= listeners(running.pid)
        assert running.poll() is None, (tmp_path / "log").read_text()
        assert "ray::RayTrainWo" in {one.process for one in seen}, "a training was seen at work"
        assert beyond_loopback(seen) == []
        assert done_for_strangers(listeners(running.pid)) == []
        made = {place.name: place.stat().st_mode & 0o022 for place in short.iterdir()}  # PyTorch's and Python's, too
        assert f"nightseg-{os.getuid()}" in made and "ray" not in made and not any(made.values()), made
    finally:
        running.communicate(timeout=120)  # its input ends, and so does the run
    assert running.returncode == 0 and folders(short) == []


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (2**34, local.OBJECT_STORE_BYTES),
        (200 * 2**20, 160 * 2**20),
        (64 * 2**20, local.OBJECT_STORE_BYTES),  # too little for any store: Ray takes a file then
    ],
)
def test_the_object_store_fits_into_shared_memory(monkeypatch: pytest.MonkeyPatch, free: int, expected: int) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bsize=1, f_bavail=free))
    assert local._object_store_bytes() == expected


@pytest.fixture
def short() -> Iterator[Path]:
    """A place for the folder of Ray; pytest's own are too deep for the names of sockets."""
    place = Path(tempfile.mkdtemp(prefix="ns", dir="/tmp"))
    yield place
    shutil.rmtree(place)


def folders(place: Path) -> list[Path]:
    return list(place.glob("nightseg-*/*"))


@pytest.fixture
def calls(short: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of Ray, which does not start."""
    asked: list[str] = []
    monkeypatch.setattr(local, "_held", None)  # a Ray that other tests use
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    monkeypatch.setattr("ray.shutdown", lambda: asked.append("shutdown"))
    return asked


@pytest.mark.parametrize(("num_slow", "num_tries"), [(0, 1), (1, 2), (2, 2)])
def test_a_ray_that_is_slow_to_start_is_tried_once_more(
    short: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch, num_slow: int, num_tries: int
) -> None:
    def init(**settings: Any) -> None:
        calls.append("init")
        if calls.count("init") <= num_slow:
            raise Exception("The current node timed out during startup. This could happen because some of the raylet")

    monkeypatch.setattr("ray.init", init)
    if num_slow == 2:
        with pytest.raises(
            UserError, match=r"did not come up in time on this machine, twice \(load .*Cure: wait until"
        ):
            local.start(1, dashboard=False, logs=False)
        assert folders(short) == []
    else:
        local.start(1, dashboard=False, logs=False)
        assert len(folders(short)) == 1
        local.end()
        assert folders(short) == [] and calls.pop() == "shutdown"
    assert calls.count("init") == num_tries and calls.count("shutdown") == num_slow


def test_another_failure_of_ray_is_not_tried_again(
    short: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**settings: Any) -> None:
        calls.append("init")
        raise ValueError("no such port")

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(ValueError, match="no such port"):
        local.start(1, dashboard=False, logs=False)
    assert calls == ["init", "shutdown"] and folders(short) == []


def test_its_folder_is_nobody_elses_and_short_enough_for_sockets(
    short: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []

    def init(*, _temp_dir: str, **settings: Any) -> None:
        place = Path(_temp_dir)
        place.mkdir()
        place.chmod(0o777)  # as Ray does
        assert [stat.S_IMODE(above.stat().st_mode) for above in (place.parent, place.parents[1])] == [0o700, 0o700]
        places.append(place)

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("RAY_TMPDIR", str(short / "new"))  # as for Ray itself, it may still have to be made
    local.start(1, dashboard=False, logs=False)
    assert places[0].is_relative_to(short / "new")
    local.end()

    monkeypatch.delenv("RAY_TMPDIR")
    long = short / ("x" * 60)
    long.mkdir()
    for place, expected in ((short, short), (long, Path("/tmp"))):
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        local.start(1, dashboard=False, logs=False)
        assert places[-1].is_relative_to(expected) and not places[-1].is_relative_to(long)
        local.end()
        assert not places[-1].parent.exists()

    file = short / "file"
    file.touch()
    for wrong, words in ((long, "too long a path"), (file / "below", "no folder can be made in")):
        monkeypatch.setenv("RAY_TMPDIR", str(wrong))
        with pytest.raises(UserError, match=f"RAY_TMPDIR: .*{words}"):
            local.start(1, dashboard=False, logs=False)
    assert len(places) == 3


def test_what_a_killed_process_left_goes_with_the_next(short: Path) -> None:
    script = (
        "import ray, os, signal\nfrom pathlib import Path\nfrom nightseg.cluster import local\n"
        "ray.init = lambda **settings: Path(settings['_temp_dir']).mkdir()\n"
        "local.start(1, dashboard=False, logs=False)\n{end}"
    )

    def run(end: str) -> int:
        environment = os.environ | {"RAY_TMPDIR": str(short), "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", script.format(end=end)], env=environment, timeout=200).returncode

    assert run("os.kill(os.getpid(), signal.SIGKILL)") == -signal.SIGKILL
    assert len(folders(short)) == 1
    assert run("") == 0  # nobody ended it: that is done at the end of the process
    assert folders(short) == []
