"""Peak memory of one call in a process of its own: what PyTorch allocates, no tracer in Python sees.

    python -m benchmarks.memory MODULE FUNCTION SIZE    prints by how many bytes the resident memory rose at most

`FUNCTION(size)` prepares everything that is not measured and returns the call; it is called first at the tiny size, so
that libraries, threads and their buffers are there before.
"""

from __future__ import annotations

import gc
import importlib
import resource
import subprocess
import sys
from pathlib import Path

from benchmarks.contest import Size

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(module: str, function: str, size: Size) -> int:
    """The rise in a new process, as if the call were the only thing it does."""
    words = [sys.executable, "-m", "benchmarks.memory", module, function, size]
    ended = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


def _measure(module: str, function: str, size: Size) -> int:
    prepare = getattr(importlib.import_module(module), function)
    prepare("tiny")()
    call = prepare(size)
    gc.collect()
    before = _reset()
    call()
    return max(1, _highest() - before)


def _reset() -> int:
    """Resident bytes now. Linux also forgets the highest value so far; elsewhere it is that of the whole process."""
    if not _CLEAR.exists():
        return _highest()
    _CLEAR.write_text("5")
    return _field("VmRSS")


def _highest() -> int:
    if _CLEAR.exists():
        return _field("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _field(name: str) -> int:
    (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(_measure(sys.argv[1], sys.argv[2], sys.argv[3]))  # type: ignore[arg-type]
