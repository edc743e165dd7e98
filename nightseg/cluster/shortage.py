"""What a worker ran out of, by what Ray, PyTorch and the system write of it."""

from __future__ import annotations

import re
from typing import Final

_GIB: Final = 2**30


def shortage(text: str) -> str | None:
    """A sentence on what was used up, with the amounts that the text says; None if it speaks of something else.

    `text`: all that is known of the failure, the errors that it was wrapped in included.
    """
    if "running low on memory" in text or "memory usage threshold" in text.lower():
        node = re.search(r"[Mm]emory usage (\d+)B exceeded threshold of (\d+)B \([\d.]+% of (\d+)B limit\)", text)
        mine = re.search(r"actual memory used=([\d.]+)GB", text)
        held = f", which held {mine[1]} GB" if mine else ""
        used, most, whole = (int(part) / _GIB for part in node.groups()) if node else (0.0, 0.0, 0.0)
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
    if "OutOfDiskError" in text or "No space left on device" in text or "utilization is over capacity" in text:
        return "the disk, or the shared memory in /dev/shm, is full"
    if "ObjectStoreFullError" in text or "object store is full" in text:
        return "Ray's object store in shared memory is full"
    if "SIGBUS" in text or "Bus error" in text:
        return "shared memory (/dev/shm) is too small"
    return None
