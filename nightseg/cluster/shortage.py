"""What a worker ran out of, by what Ray, PyTorch and the system write of it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Final

from nightseg.cluster.turn import is_shared

_GIB: Final = 2**30
_KERNEL: Final = "the kernel killed"
_DISK: Final = "the disk, or the shared memory in /dev/shm, is full"
_COUNTERS: Final = ("/proc/vmstat", "/sys/fs/cgroup/memory.events")  # of the machine, of this container


class Watch:
    """From when on the deaths of worker processes are looked at: an object made before they start."""

    def __init__(self) -> None:
        self._began = time.time()
        self._killed = _killed_by_kernel()

    def deaths(self) -> str:
        """What is known of the worker processes of this job that died since then, oldest first; for `shortage`.

        Ray Data and Ray Train often say no more than that an actor was started again. Why its process ended stands in
        the worker table of Ray's control store. The kernel says nothing but counts, on this machine.
        """
        killed = _killed_by_kernel() - self._killed
        return "\n".join([*_exits(self._began), *([f"{_KERNEL} {killed} processes"] if killed > 0 else [])])


def _exits(since: float) -> list[str]:
    """By the private part of Ray 2.60; another version may not have it, and then nothing more is known."""
    try:
        import ray
        from ray._private.state import state
        from ray.core.generated import gcs_pb2

        if not ray.is_initialized():  # asking would start one
            return []
        job = bytes.fromhex(ray.get_runtime_context().get_job_id())
        table = map(gcs_pb2.WorkerTableData.FromString, state._connect_and_get_accessor().get_worker_table())
        dead = [one for one in table if not one.is_alive and one.end_time_ms >= 1000 * since and one.job_id == job]
        return [one.exit_detail for one in sorted(dead, key=lambda one: one.end_time_ms)]
    except Exception:
        return []


def _killed_by_kernel() -> int:
    """Processes that the kernel ended since the machine started, because there was no memory left."""
    counts = [0]
    for place in _COUNTERS:
        try:
            found = re.search(r"^oom_kill (\d+)$", Path(place).read_text(), re.MULTILINE)
        except OSError:
            continue
        counts += [int(found[1])] if found else []
    return max(counts)


def shortage(text: str) -> str | None:
    """A sentence on what was used up, with the amounts that the text says; None if it speaks of something else.

    `text`: all that is known of the failure, the errors that it was wrapped in and `Watch.deaths` included.
    """
    if "running low on memory" in text or "memory usage threshold" in text.lower():
        nodes = re.findall(r"[Mm]emory usage (\d+)B exceeded threshold of (\d+)B \([\d.]+% of (\d+)B limit\)", text)
        node = max(nodes, key=lambda one: int(one[0]), default=None)
        # a report lists what else runs, Ray's own actors first; what was killed is marked
        killed = re.findall(r"Selected to kill.*actual memory used=([\d.]+)GB", text)
        mine = max(killed or re.findall(r"actual memory used=([\d.]+)GB", text), key=float, default=None)
        held = f", which held {mine} GB" if mine else ""
        used, most, whole = (int(part) / _GIB for part in node) if node else (0.0, 0.0, 0.0)
        amounts = f": {used:.1f} of {whole:.1f} GiB were in use, {most:.1f} are allowed" if node else ""
        return f"the machine ran out of memory{amounts}; Ray killed a worker{held}"
    if found := re.search(r"CUDA out of memory\.? ?(Tried to allocate [\d.]+ \w+)?", text):
        free = re.search(r"of which ([\d.]+ \w+) is free", text)
        asked = f": {found[1][0].lower()}{found[1][1:]}" if found[1] else ""
        return f"the GPU ran out of memory{asked}{f', {free[1]} were free' if free else ''}"
    if found := re.search(r"(Unable to allocate [\d.]+ \w+|you tried to allocate \d+ bytes)", text):
        return f"the machine ran out of memory: {found[1][0].lower()}{found[1][1:]}"
    if "MemoryError" in text:
        return "the machine ran out of memory"
    if _KERNEL in text:
        return "the machine ran out of memory, and the kernel killed a worker"
    if "OutOfDiskError" in text or "No space left on device" in text or "utilization is over capacity" in text:
        return _DISK
    if "ObjectStoreFullError" in text or "object store is full" in text:
        return "Ray's object store in shared memory is full"
    if "SIGBUS" in text or "Bus error" in text:
        return "shared memory (/dev/shm) is too small"
    return None


def mended(short: str, less: str) -> str:
    """The sentence, and what to do about it: `less` uses up less memory, but no less of a disk."""
    if short == _DISK:
        return f"{short}. Make room there; Ray writes below TMPDIR"
    others = ", or compute.concurrent: other stages run at the same time" if is_shared() else ""
    return f"{short}. {less}{others}"
