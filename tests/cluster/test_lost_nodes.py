"""Nodes of a real cluster that vanish: passes and trainings go on with what is left, and nothing is lost or doubled.

Each test has a process of its own, whose cluster it is: a head that may not work, and nodes with one CPU each.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from nightseg.cluster.map import map_shards
from nightseg.cluster.session import Session
from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.cluster.train import FitResult, LocalSession, fit
from nightseg.progress import SilentProgress
from nightseg.storage import Attempt, Commit, Location, Workspace
from tests.rounding import assert_near

ROOT = Path(__file__).parents[2]
STORE_BYTES = 80 * 2**20
SECONDS_TO_HAPPEN = 240.0
FRAMES = 5000
SHARD_ROWS = 50


def in_a_process(name: str, folder: Path) -> str:
    """The function of this module, whose cluster ends with it; what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}
    code = f"import sys; from tests.cluster import test_lost_nodes as here; here.{name}(here.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(folder)]
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
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


class Scores:
    """As a stage scores and labels: a number and a file of each frame, from its pixels."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds  # of a shard, so that there is time to lose a node in the middle

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        time.sleep(self.seconds)
        numbers = rows["number"].to_pylist()
        frames = [np.random.default_rng(number).integers(0, 256, (8, 16), np.uint8) for number in numbers]
        for number, frame in zip(numbers, frames, strict=True):
            (folder / f"labels/{number:05d}.bin").write_bytes((frame > 127).tobytes())
        return {"scores": pa.table({"number": numbers, "score": [float(frame.mean()) for frame in frames]})}


class Said(SilentProgress):
    """A progress that keeps what it is told, and how far the pass is."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.done = 0

    def say(self, message: str) -> None:
        self.messages.append(message)

    def advance(self, count: int = 1, **metrics: float | str) -> None:
        self.done += count


def scored(folder: Path, progress: Said, **compute: Any) -> Commit:
    attempt = attempt_in(folder)
    rows = pa.table({"number": list(range(FRAMES))})
    arguments = {"seconds": 0.3 if compute["actors"] else 0.0}
    settings = MapCompute(shard_rows=SHARD_ROWS, **compute)
    shards = map_shards(rows, Scores, arguments, title="score", attempt=attempt, compute=settings, progress=progress)
    return shards.finish("scores", outputs=["labels"])


def attempt_in(folder: Path) -> Attempt:
    return Workspace(folder).stage("score", "pool", version=1, recipe={}, inputs={}, seed=0).open()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pass_survives_two_of_three_nodes(tmp_path: Path) -> None:
    print(in_a_process("lose_two_of_three", tmp_path))


def lose_two_of_three(folder: Path) -> None:
    undisturbed, said = scored(folder / "here", Said(), actors=0), Said()
    with connected(3) as nodes:

        def lose_two() -> None:
            for share in (0.15, 0.4):
                until(lambda least=share * FRAMES: said.done >= least)  # type: ignore[misc]
                nodes.kill()

        enemy = threading.Thread(target=lose_two)
        enemy.start()
        began = time.monotonic()
        commit = scored(folder / "there", said, actors=3)
        print(f"{time.monotonic() - began:.0f} s; {said.messages}")
        enemy.join()
    assert len(nodes.nodes) == 1
    assert said.done == FRAMES
    assert (commit.rows_in, commit.rows_out) == (FRAMES, FRAMES)
    assert [(output.path, output.sha256) for output in commit.outputs] == [
        (output.path, output.sha256) for output in undisturbed.outputs
    ]
    assert commit.table("scores")["number"].to_pylist() == list(range(FRAMES))
    assert any("nodes are gone" in message and "go on with" in message for message in said.messages)


STEPS, BATCH, STEPS_A_REPORT = 120, 6, 5


def line(session: Session, settings: dict[str, Any]) -> None:
    """A line through y = 2x; in every step each worker has its share of the same six points."""
    torch.manual_seed(0)
    line = torch.nn.Linear(1, 1).to(session.device)
    state, begin = session.restore(), 0
    if state is not None:
        line.load_state_dict(state["line"])
        begin = int(state["step"])
    model = session.wrap(line)
    for step in range(begin, STEPS):
        time.sleep(settings["seconds"])
        x = torch.arange(float(BATCH))[session.rank :: session.world_size, None]
        loss = ((model(x) - 2 * x) ** 2).sum() * session.world_size / BATCH
        line.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in line.parameters():
                parameter.sub_(parameter.grad, alpha=0.02)  # type: ignore[arg-type]
        points = int(session.sum(torch.tensor([len(x)])))
        session.progress(step + 1)
        if (step + 1) % STEPS_A_REPORT == 0:
            report = {"step": step + 1, "points": points, "workers": session.world_size}
            session.report(report, {"line": line.state_dict(), "step": step + 1})


def trained(place: Path, said: Said) -> FitResult:
    return fit(
        line, {"seconds": 0.5}, folder=Location.of(place / "trainer"), name="line", compute=TrainCompute(workers=2),
        progress=said, title="train line", total=STEPS, unit="steps",
    )  # fmt: skip


def workers_of(history: list[dict[str, Any]]) -> list[int]:
    return [int(row["workers"]) for row in history]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_loses_a_node_shrinks_and_grows_again(tmp_path: Path) -> None:
    print(in_a_process("lose_one_of_two", tmp_path))


def lose_one_of_two(place: Path) -> None:
    """None comes back until it has gone on with one worker; then another node joins."""
    alone = LocalSession(Location.of(place / "alone"))
    line(alone, {"seconds": 0.0})
    said, results = Said(), list[FitResult]()
    with connected(2) as nodes:
        training = threading.Thread(target=lambda: results.append(trained(place, said)))
        training.start()
        until(lambda: said.done >= 20)
        killed = time.monotonic()
        nodes.kill()
        until(lambda: any("goes on with 1 of 2 workers" in message for message in said.messages))
        before = said.done
        until(lambda: said.done > before)
        seconds = time.monotonic() - killed
        nodes.add()
        training.join()
    (result,) = results
    print(f"{seconds:.0f} s until the next new step; {said.messages}; {workers_of(result.history)}")
    assert [int(row["step"]) for row in result.history] == list(range(STEPS_A_REPORT, STEPS + 1, STEPS_A_REPORT))
    assert {int(row["points"]) for row in result.history} == {BATCH}
    changes = [size for size, _ in itertools.groupby(workers_of(result.history))]
    assert changes == [2, 1, 2]
    assert any("waits for nodes: 2 workers" in message for message in said.messages)
    state = alone.restore()
    assert state is not None
    assert_near(result.load()["line"]["weight"], state["line"]["weight"], STEPS * 16)
