"""A real cluster on this machine: a head that may not work, and nodes that come and vanish."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nightseg.progress import SilentProgress

ROOT = Path(__file__).parents[1]
STORE_BYTES = 80 * 2**20
SECONDS_TO_HAPPEN = 240.0


def in_a_process(function: Callable[..., None], *words: object) -> str:
    """Calls it with the words as strings in a process of its own, whose cluster ends with it; what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    code = f"import sys; from {function.__module__} import {function.__name__} as it; it(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, words)]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


class Nodes:
    """A head that may not work, and nodes with one CPU each."""

    def __init__(self, count: int) -> None:
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self._new() for _ in range(count)]

    def _new(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)

    def add(self) -> None:
        self.nodes.append(self._new())

    def kill(self) -> None:
        """One node, with all its processes, without a word."""
        self.cluster.remove_node(self.nodes.pop(), allow_graceful=False)


@contextmanager
def connected(count: int) -> Iterator[Nodes]:
    from nightseg.cluster import ray as cluster

    nodes = Nodes(count)
    try:
        os.environ["RAY_ADDRESS"] = nodes.cluster.address
        cluster.connect()
        yield nodes
    finally:
        cluster.disconnect()
        nodes.cluster.shutdown()


def until(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS_TO_HAPPEN
    while not happened():
        assert time.monotonic() < deadline, "it has not happened"
        time.sleep(0.1)


class Said(SilentProgress):
    """A progress that keeps what it is told, and how far the pass is."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.done = 0

    def say(self, message: str) -> None:
        self.messages.append(message)

    def advance(self, count: int = 1, **metrics: float | str) -> None:
        self.done += count
