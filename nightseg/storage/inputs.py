"""Frames and labels of object stores, kept on a disk of the node that reads them, up to a number of bytes.

What is kept is found by the sha256 that a table says the file has, and compared with it when it is read: so it is
never old, damaged, or another's, whoever wrote it, and runs on one node share it. Files of local disks are not kept.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from nightseg.storage.paths import Location, sha256_of
from nightseg.storage.scratch import KEPT_FREE, MOST_KEPT_FREE, Scratch

VARIABLE = "NIGHTSEG_INPUT_CACHE_BYTES"  # for this process and those that it starts; not set: nothing is kept
_LEAST_PART = 64 * 2**20  # bytes: files of a part are looked at whenever one is added to it
_MOST_PARTS = 256


def use(num_bytes: int) -> None:
    """Keep up to so many bytes on each node, in this process and those that it starts from now on; 0: none."""
    os.environ[VARIABLE] = str(num_bytes)


def read(place: Location, sha256: str | None) -> bytes:
    """The file, which should have this sha256 (hex; null = it is not known, and the file is not kept).

    Not kept yet, it is read where it lies, and kept if it has that sha256. Raises FileNotFoundError when absent.
    """
    limit = int(os.environ.get(VARIABLE) or 0)
    if place.is_local or limit <= 0 or sha256 is None or not re.fullmatch("[0-9a-f]{64}", sha256):
        return place.read_bytes()
    folder = _folder()
    if folder is not None and not folder.is_dir():  # temporary folders are swept on some systems
        _folder.cache_clear()
        folder = _folder()
    if folder is None:
        return place.read_bytes()
    num_parts = min(max(limit // _LEAST_PART, 1), _MOST_PARTS)
    part = folder / f"{num_parts:03d}-{int(sha256[:8], 16) % num_parts:03d}"
    data = _kept(part / sha256)
    if data is None:
        data = place.read_bytes()
        if sha256_of(data) == sha256:
            with suppress(OSError):  # no room, or swept away: the next one reads it where it lies
                _keep(part, sha256, data, limit // num_parts)
    return data


@functools.cache
def _folder() -> Path | None:
    """Of this node and user, held until this process ends; it stays for those that come within a day."""
    scratch = Scratch.open("inputs")
    return None if scratch is None else scratch.folder


def _kept(file: Path) -> bytes | None:
    with suppress(OSError):  # not there, or gone meanwhile
        data = file.read_bytes()
        if sha256_of(data) == file.name:
            os.utime(file)  # the least recently used goes first
            return data
        file.unlink()  # damaged
    return None


def _keep(part: Path, name: str, data: bytes, limit: int) -> None:
    """One process at a time adds to a part, so that the limit holds; readers need no lock."""
    if len(data) > limit:
        return
    part.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        seen = [(entry.stat(), entry.path) for entry in os.scandir(part)]
        room = limit - len(data) - sum(status.st_size for status, _ in seen)
        for status, path in sorted(seen, key=lambda one: one[0].st_mtime_ns):
            if room >= 0:
                break
            os.unlink(path)
            room += status.st_size
        disk = shutil.disk_usage(part)
        if disk.free - len(data) < min(KEPT_FREE * disk.total, MOST_KEPT_FREE):
            return
        temporary = part / f".{secrets.token_hex(8)}"  # of a killed writer: it goes when it is the oldest
        try:
            temporary.write_bytes(data)
            temporary.replace(part / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    finally:
        os.close(lock)
