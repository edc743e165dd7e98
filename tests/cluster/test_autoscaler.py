"""A real autoscaler, whose machines are processes: a cluster without workers grows for a pass, and ahead of a training.

Ray's own cluster for such tests stops every Ray of the machine first, so this one is started here.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from nightseg.cluster import ahead, nodes
from nightseg.cluster import ray as cluster
from nightseg.cluster.map import map_shards
from nightseg.cluster.settings import MapCompute
from nightseg.storage import Location, Workspace
from tests.cluster.test_lost_nodes import STEPS, trained
from tests.nodes import STORE_BYTES, Said, in_a_process, until

MOST = 3
PORT = 6379  # where the provider's nodes look for the head
HEAD = "ray.head.default"  # no other name is known to the provider
ONE = {"CPU": 1.0, "GPU": 0.0}
LISTS = [
    "initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter",
]  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_grows_for_a_pass_and_ahead_of_a_training(tmp_path: Path) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.skip(f"port {PORT} is in use")
    print(in_a_process(grow, tmp_path))


class Doubles:
    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        return {"doubles": pa.table({"number": [2 * number for number in rows["number"].to_pylist()]})}


def grow(folder: str) -> None:
    from ray.util import placement_group_table

    place, said = Path(folder), Said()
    with autoscaling() as address:
        os.environ["RAY_ADDRESS"] = address
        cluster.connect()
        assert cluster.may_grow() and cluster.capacity("CPU") == MOST and cluster.resources().get("CPU", 0) == 0
        attempt = Workspace(place / "run").stage("double", "pool", version=1, recipe={}, inputs={}, seed=0).open()
        began, rows, compute = time.monotonic(), pa.table({"number": list(range(100))}), MapCompute(actors=1)
        map_shards(rows, Doubles, {}, title="double", attempt=attempt, compute=compute, progress=said).finish("doubles")
        print(f"{time.monotonic() - began:.0f} s of a pass from no node; {said.messages}")
        assert said.done == 100 and cluster.resources()["CPU"] == 1
        assert any("the cluster has 0 now and may grow to 3" in message for message in said.messages)

        assert ahead.missing(2, ONE) == 1
        began = time.monotonic()
        with late():
            ahead.ask(2, ONE)
            assert time.monotonic() - began < 5, "it does not wait"
            until(lambda: any(group["state"] == "REMOVED" for group in placement_group_table().values()))
        until(lambda: cluster.resources()["CPU"] >= 2)
        print(f"{time.monotonic() - began:.0f} s until the node that was asked for ahead is there")
        until(lambda: all(group["state"] == "REMOVED" for group in placement_group_table().values()))
        said = Said()
        result = trained(place, said)
        assert not said.messages, "both workers had their nodes at once"
        assert [row["workers"] for row in result.history] == [2] * len(result.history)
        assert said.done == STEPS and cluster.resources()["CPU"] == 2


@contextmanager
def late() -> Iterator[None]:
    """Ray has not yet told that a node is idle: the first request is for one process less, and that node takes it."""
    at_once, told = nodes.free, list[dict[str, dict[str, float]]]([{}])
    nodes.free = lambda: told.pop() if told else at_once()
    try:
        yield
    finally:
        nodes.free = at_once


@contextmanager
def autoscaling() -> Iterator[str]:
    """The address of a head that may not work, with workers of one CPU from nothing to MOST of them."""
    import ray.util
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

    kinds = {
        HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {
            "resources": {"CPU": 1, "object_store_memory": STORE_BYTES}, "node_config": {},
            "min_workers": 0, "max_workers": MOST,
        },
    }  # fmt: skip
    provider = {
        "type": "external",  # by its own name Ray looks for a file that it is not delivered with
        "module": f"{FakeMultiNodeProvider.__module__}.FakeMultiNodeProvider",
        "launch_multiple": True,
        "head_node_id": FAKE_HEAD_NODE_ID,
    }
    config: dict[str, Any] = {name: list[str]() for name in LISTS} | {
        "cluster_name": "made-up", "max_workers": MOST, "idle_timeout_minutes": 10, "upscaling_speed": 1.0,
        "provider": provider, "available_node_types": kinds, "head_node_type": HEAD,
        "docker": {}, "file_mounts": {}, "file_mounts_sync_continuously": False, "auth": {},
    }  # fmt: skip
    settings = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": HEAD,  # as `ray up` and KubeRay tell their nodes
    }
    with tempfile.TemporaryDirectory(prefix="nsa", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "cluster.json").write_text(json.dumps(config))
        cluster.BOOTSTRAP_CONFIG = f"{folder}/cluster.json"  # `ray up` leaves it there
        words = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--port={PORT}", "--num-cpus=0",
            f"--object-store-memory={STORE_BYTES}", "--include-dashboard=false",
            "--disable-usage-stats", f"--autoscaling-config={folder}/cluster.json", f"--temp-dir={folder}/ray",
        ]  # fmt: skip
        log = Path(folder) / "head.log"
        with log.open("wb") as out:
            head = subprocess.Popen(words, env=os.environ | settings, stdout=out, stderr=out)
        try:
            until(lambda: "Ray runtime started" in log.read_text() or head.poll() is not None)
            assert head.poll() is None, log.read_text()
            yield f"{ray.util.get_node_ip_address()}:{PORT}"
        finally:
            cluster.disconnect()  # or this process is ended, too
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):  # ended
                    if folder.encode() in (process / "cmdline").read_bytes():
                        os.kill(int(process.name), signal.SIGKILL)
            head.wait(30)
