"""What a worker ran out of: the amounts of each text are found again, other failures are not taken for it."""

from __future__ import annotations

import pytest
import ray.exceptions

from nightseg.cluster import map as passes
from nightseg.cluster import train
from nightseg.cluster.shortage import shortage

MONITOR = """1 worker(s) were killed due to the node running low on memory.
Memory usage 16320875724B exceeded threshold of 16106127360B (93.8% of 17179869184B limit)
(Actor worker: actor ID=1, pid=77, actual memory used=5.22GB, worker ID=9)
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/"""
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
    failure = passes._failure("score by lite0", cause)
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
