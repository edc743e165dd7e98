"""What a worker ran out of: the amounts of each text are found again, other failures are not taken for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pytest
import ray.exceptions

from nightseg.cluster import map as passes
from nightseg.cluster import shortage as shortages
from nightseg.cluster import train
from nightseg.cluster.settings import MapCompute
from nightseg.cluster.shortage import Watch, shortage
from nightseg.progress import SilentProgress
from nightseg.storage import Attempt, Location, Workspace

ROOT = Path(__file__).parents[2]

MONITOR = """1 worker(s) were killed due to the node running low on memory.
Memory usage 16320875724B exceeded threshold of 16106127360B (93.8% of 17179869184B limit)
(Actor worker: actor ID=1, pid=77, actual memory used=5.22GB, worker ID=9)
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/"""
# Of a real run: Ray's own actors come first, the one that took the memory is among those that were killed.
SEVERAL = """2 worker(s) were killed due to the node running low on memory.
OOM kill reason: Memory usage 4178612224B exceeded threshold of 4170550016B (16.5% of 25276059648B limit)
Considered workers: [
Selected to kill: (Actor(44): task name=AutoscalingCoordinator, pid=62, actual memory used=0.11GB, worker ID=a2)
Selected to kill: (Actor(2f): task name=RayTrainWorker, pid=54, actual memory used=3.68GB, worker ID=83)
(Actor(5c): task name=datasets_stats_actor, pid=55, actual memory used=9.10GB, worker ID=84)
]"""
CUDA = (
    "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.25 GiB is free."
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            MONITOR,
            "the machine ran out of memory: 15.2 of 16.0 GiB were in use, 15.0 are allowed; Ray killed a worker, "
            "which held 5.22 GB",
        ),
        (
            "Task was killed due to the node running low on memory.",
            "the machine ran out of memory; Ray killed a worker",
        ),
        (
            SEVERAL,
            "the machine ran out of memory: 3.9 of 23.5 GiB were in use, 3.9 are allowed; Ray killed a worker, "
            "which held 3.68 GB",
        ),
        ("the kernel killed 2 processes", "the machine ran out of memory, and the kernel killed a worker"),
        (
            "Worker unexpectedly exits with a connection error code 2. Some common causes include: (1) the "
            "process was killed by the OOM killer due to high memory usage, (3) the worker crashed due to SIGSEGV",
            None,  # Ray guesses
        ),
        (CUDA, "the GPU ran out of memory: tried to allocate 2.00 GiB, 1.25 GiB were free"),
        ("CUDA out of memory", "the GPU ran out of memory"),
        (
            "MemoryError: Unable to allocate 3.73 GiB for an array with shape (5,)",
            "the machine ran out of memory: unable to allocate 3.73 GiB",
        ),
        (
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 800 bytes. Error code 12",
            "the machine ran out of memory: you tried to allocate 800 bytes",
        ),
        ("OSError: [Errno 28] No space left on device", "the disk, or the shared memory in /dev/shm, is full"),
        (f"OutOfDiskError: {ray.exceptions.OutOfDiskError()}", "the disk, or the shared memory in /dev/shm, is full"),
        (str(ray.exceptions.ObjectStoreFullError()), "Ray's object store in shared memory is full"),
        ("DataLoader worker is killed by signal: Bus error.", "shared memory (/dev/shm) is too small"),
        ("ValueError: a shape", None),
        ("", None),
    ],
)
def test_what_was_used_up_is_said_with_its_amounts(text: str, expected: str | None) -> None:
    assert shortage(text) == expected


def test_a_pass_says_which_key_to_lower() -> None:
    cause = ray.exceptions.OutOfMemoryError(MONITOR)
    failure = passes._failure("score by lite0", cause, Watch())
    assert str(failure).startswith("score by lite0: the machine ran out of memory: 15.2 of 16.0 GiB were in use")
    assert "Lower compute.map.batch or compute.map.actors" in str(failure)
    with pytest.raises(RuntimeError, match=r"(?s)the GPU ran out.*Lower compute.map.batch.*It said: OutOfMemoryError"):
        passes._record("score by lite0", CUDA, "")


def test_a_training_looks_into_the_errors_of_its_workers() -> None:
    class WrappedError(RuntimeError):
        """As Ray Train's errors hold those of the workers."""

        def __init__(self, *workers: Exception) -> None:
            super().__init__("Training failed due to worker errors. Refer to the documentation")
            self.worker_failures = dict(enumerate(workers))

    died = RuntimeError("health check failed")
    died.health_check_failure = ray.exceptions.OutOfMemoryError(MONITOR)  # type: ignore[attr-defined]
    for error in (WrappedError(ray.exceptions.OutOfMemoryError(MONITOR)), WrappedError(died)):
        found = shortage("\n".join(train._texts(error, None)))
        assert found is not None and "15.2 of 16.0 GiB" in found
    assert shortage("\n".join(train._texts(WrappedError(RuntimeError("a shape")), None))) is None


def test_the_kernel_tells_how_many_processes_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = tmp_path / "vmstat", tmp_path / "memory.events"
    monkeypatch.setattr(shortages, "_COUNTERS", tuple(map(str, (*counters, tmp_path / "not there"))))
    counters[0].write_text("nr_free_pages 7\noom_kill 3\n")
    watch = Watch()
    assert watch.deaths() == ""
    counters[1].write_text("low 0\noom 9\noom_kill 5\noom_group_kill 0\n")
    assert shortage(watch.deaths()) == "the machine ran out of memory, and the kernel killed a worker"
    failure = passes._failure("score", ray.exceptions.ActorUnavailableError("it was restarted", bytes(16)), watch)
    assert str(failure).startswith("score: the machine ran out of memory, and the kernel killed a worker. Lower comp")


class Eater:
    """Runs out of something in this process."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError("Unable to allocate 3.73 GiB for an array"), "out of memory: unable to allocate 3.73 GiB. Lower"),
        (RuntimeError(CUDA), "the GPU ran out of memory: tried to allocate 2.00 GiB, 1.25 GiB were free. Lower comp"),
        (RuntimeError("OSError: [Errno 28] No space left on device"), "is full. Make room there; Ray writes below TMP"),
    ],
)
def test_a_pass_in_this_process_says_it_as_well(error: Exception, message: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=message) as caught:
        passes.map_shards(
            pa.table({"n": [1]}), Eater, {"error": error}, title="score",
            attempt=opened(tmp_path), compute=MapCompute(actors=0), progress=SilentProgress(),
        )  # fmt: skip
    assert caught.value.__cause__ is error
    with pytest.raises(RuntimeError, match=r"^a shape$"):
        passes.map_shards(
            pa.table({"n": [1]}), Eater, {"error": RuntimeError("a shape")}, title="score",
            attempt=opened(tmp_path / "other"), compute=MapCompute(actors=0), progress=SilentProgress(),
        )  # fmt: skip


def opened(folder: Path) -> Attempt:
    stage = Workspace(Location.of(folder)).stage("score", "n", version=1, recipe={}, inputs={}, seed=0)
    return stage.open()


GREEDY = """
import sys, time
import numpy as np, pyarrow as pa
from nightseg.cluster import ray, map, train
from nightseg.cluster.settings import MapCompute, TrainCompute
from nightseg.progress import SilentProgress
from nightseg.storage import Location, Workspace

def eat():
    kept = []
    for _ in range(220):
        kept.append(np.ones(5_000_000))
        time.sleep(0.02)
    time.sleep(30)

class Greedy:
    def __call__(self, rows, folder):
        eat()

def loop(session, settings):
    eat()

ray.connect(num_cpus=2)
place = Location.of(sys.argv[2])
if sys.argv[1] == "map":
    attempt = Workspace(place).stage("s", "n", version=1, recipe={}, inputs={}, seed=0).open()
    compute = MapCompute(actors=1)
    map.map_shards(pa.table({"n": [1]}), Greedy, {}, title="score", attempt=attempt, compute=compute,
                   progress=SilentProgress())
else:
    train.fit(loop, {}, folder=place, name="t", compute=TrainCompute(workers=1, max_failures=0),
              progress=SilentProgress(), title="train m", total=1, unit="steps")
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("what", "less"), [("map", "Lower compute.map.batch or compute.map.actors"), ("train", "Lower training.batch")]
)
def test_the_memory_monitor_of_a_real_ray(what: str, less: str, tmp_path: Path) -> None:
    """It allows 2.5 GB more than is in use, for Ray itself takes 1.5; a worker takes up to 8 GB.

    In a process of its own, whose Ray it is.
    """
    (tmp_path / "greedy.py").write_text(GREEDY)
    sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    whole, free = (int(sizes[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "PYTHONPATH": str(ROOT),
        "RAY_memory_usage_threshold": f"{min(0.95, (whole - free + 2.5) / whole):.3f}",
        "RAY_memory_monitor_refresh_ms": "100",
    }
    command = [sys.executable, str(tmp_path / "greedy.py"), what, str(tmp_path / "run")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    told = next(line for line in ended.stderr.splitlines() if line.startswith("RuntimeError: "))
    assert "the machine ran out of memory: " in told and "GiB were in use" in told and less in told
    held = told.partition("which held ")[2].partition(" GB")[0]
    assert float(held) > 0.5, "not one of Ray's own actors, which hold a tenth"
