"""One driver on one run folder.

On a local disk (or a network drive with locks) the kernel's file lock decides; it is free the moment its holder dies,
even by SIGKILL. On an object store there are no locks: there a lease is created, which only the first can, and renewed
every few seconds; one that nobody renews, or whose holder died on this machine, is taken over.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock

from nightseg.errors import UserError
from nightseg.progress import printable
from nightseg.storage.credentials import hide_credentials
from nightseg.storage.paths import Location, write_errors
from nightseg.storage.stores import decides_first

LOCK_NAME = ".nightseg.lock"
HOLDER_NAME = ".nightseg-holder.json"
LEASE_NAME = ".nightseg-lease"
LEASE_SECONDS = 60.0  # how long a lease lives without being renewed
PROBE_SECONDS = 0.2  # `holder` takes the file lock for an instant; a driver that starts just then must not give up
_LOG = logging.getLogger("nightseg.storage")


class WorkspaceBusy(UserError):  # noqa: N818 (what is the case, not what went wrong)
    """Another driver works in this run folder; the message names it."""


@contextmanager
def hold(root: Location, *, lease_seconds: float = LEASE_SECONDS, settle_seconds: float = 1.0) -> Iterator[None]:
    """Holds the run folder while the body runs; raises `WorkspaceBusy`, naming the holder, if it is taken.

    `lease_seconds` and `settle_seconds` matter for remote folders only: how long a lease lives without renewal, and
    how long to wait, where a store does not decide who is first, before looking whether a rival wrote over the claim.
    """
    root.make_folder()
    if root.is_local:
        with _file_lock(root):
            yield
    else:
        with _lease(root, lease_seconds, settle_seconds):
            yield


def holder(root: Location, *, lease_seconds: float = LEASE_SECONDS) -> str | None:
    """Who holds the run folder, in words; None if nobody does. A holder killed a moment ago is no holder."""
    if not root.is_local:
        _, held = _newest(root)
        return _name(held) if held and not _is_over(held) and abs(_age(held)) <= lease_seconds else None
    lock = root.local / LOCK_NAME
    if not lock.exists():
        return None
    try:
        with filelock.FileLock(str(lock), timeout=0):
            return None
    except filelock.Timeout:
        return _name(_read(root / HOLDER_NAME))
    except OSError as error:  # someone else's run folder, or a read-only one: what its holder noted must do
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        note = _read(root / HOLDER_NAME)
        return _name(note) if note is not None else None


@contextmanager
def _file_lock(root: Location) -> Iterator[None]:
    lock = filelock.FileLock(str(root.local / LOCK_NAME), timeout=PROBE_SECONDS, poll_interval=0.02)
    note = root / HOLDER_NAME
    try:
        with write_errors(root):
            lock.acquire()
    except filelock.Timeout:
        raise _busy(root, _read(note)) from None
    try:
        note.write_json(_who())
        try:
            yield
        finally:
            note.delete()
    finally:
        lock.release()


@contextmanager
def _lease(root: Location, seconds: float, settle: float) -> Iterator[None]:
    """Claims have numbers, and the newest holds. To take it over is to create the next, which only one can.

    A claim that is given back stays, as it must keep its number taken for rivals that are late.
    """
    mine = _who() | {"owner": secrets.token_hex(8)}
    place = _claimed(root, mine, seconds, settle)
    stop = threading.Event()
    beat = threading.Thread(target=_renew, args=(place, mine, seconds / 4, stop), daemon=True, name="lease")
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        thief = _thief(place, mine)
        if thief is None:
            place.write_bytes(_encode(mine | {"released": True}))
    if thief is not None:
        raise _busy(root, thief)


def _claimed(root: Location, mine: dict[str, Any], seconds: float, settle: float) -> Location:
    """The claim that holds now. Raises `WorkspaceBusy` where another one lives."""
    while True:
        newest, held = _newest(root)
        if held is not None and not _is_over(held):
            _wait_until_dead(root, root / f"{LEASE_NAME}/{newest:06d}.json", held, seconds)
        place = root / f"{LEASE_NAME}/{newest + 1:06d}.json"
        if not place.create_bytes(_encode(mine)) and (_read(place) or {}).get("owner") != mine["owner"]:
            continue  # another one was faster: look who
        if not decides_first(root.uri):
            _LOG.warning("%s: this store does not tell who of two is first; start no two drivers at once there", root)
            time.sleep(settle)  # two rivals may both have found nothing; the later write wins, and both see it now
        rival = _thief(place, mine)
        if rival is None:
            break
        if not _is_over(rival):
            raise _busy(root, rival)
    for entry in (root / LEASE_NAME).list():
        if _number(entry.name) <= newest:
            (root / LEASE_NAME / entry.name).delete()
    return place


def _newest(root: Location) -> tuple[int, dict[str, Any] | None]:
    """The highest number of a claim, 0 if there is none, and what stands in it."""
    try:
        number = max((_number(entry.name) for entry in (root / LEASE_NAME).list()), default=0)
    except FileNotFoundError:
        number = 0
    return number, _read(root / f"{LEASE_NAME}/{number:06d}.json") if number else None


def _number(name: str) -> int:
    digits = name.removesuffix(".json")
    return int(digits) if digits.isdecimal() else 0


def _thief(place: Location, mine: dict[str, Any]) -> dict[str, Any] | None:
    """Who has claimed after this claim or, where the store does not decide, wrote into it."""
    number, found = _newest(place.parent.parent)
    if number > _number(place.name):
        return found or {}
    return found if found is not None and found.get("owner") != mine["owner"] else None


def _wait_until_dead(root: Location, place: Location, held: dict[str, Any], seconds: float) -> None:
    """Returns when the lease is dead: old by our clock, and not renewed while we watch (clocks may disagree)."""
    if abs(_age(held)) <= seconds:
        raise _busy(root, held)
    _LOG.warning("the lease on %s looks abandoned; watching it for %.0f s", root, seconds)
    time.sleep(seconds)
    seen = _read(place)
    if seen is not None and seen != held and not _is_over(seen):
        raise _busy(root, seen)


def _is_over(held: dict[str, Any]) -> bool:
    """It was given back, or its holder was a process of this machine that is no more."""
    if held.get("released"):
        return True
    here = _machine()
    return here is not None and held.get("machine") == here and held.get("started") != _started(held.get("pid"))


def _renew(place: Location, mine: dict[str, Any], pause: float, stop: threading.Event) -> None:
    while not stop.wait(pause):
        try:
            thief = _thief(place, mine)
            if thief is not None:
                _LOG.error("the lease on %s was taken over by %s", place.parent.parent, _name(thief))
                return
            place.write_bytes(_encode(mine))
        except (OSError, UserError) as error:
            _LOG.warning("cannot renew the lease %s: %s", place, error)


def _age(lease: dict[str, Any]) -> float:
    """Seconds since the last renewal, by the clocks of both machines: only a hint."""
    return time.time() - float(lease.get("renewed", 0.0))


def _encode(lease: dict[str, Any]) -> bytes:
    return json.dumps(lease | {"renewed": time.time()}, sort_keys=True).encode()


def _who() -> dict[str, Any]:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": hide_credentials(command)[:300],
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _machine() -> str | None:
    """Where a process number means the same process: this boot, and this container. None if it cannot be told."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: Any) -> str | None:
    """When that process began (ticks since boot), None if there is none: numbers of processes are used again."""
    try:
        state, *rest = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if state == "Z" else rest[18]


def _read(place: Location) -> dict[str, Any] | None:
    try:
        found = place.read_json()
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _name(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process (it has not written its name yet)"
    text = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}: {holder.get('command')}"
    return printable(text)


def _busy(root: Location, holder: dict[str, Any] | None) -> WorkspaceBusy:
    return WorkspaceBusy(
        f"run folder {root}: it is in use by {_name(holder)}", cure="wait for it, stop it, or choose another folder"
    )
