"""One driver on one run folder.

On a local disk (or a network drive with locks) the kernel's file lock decides; it is free the moment its holder dies,
even by SIGKILL. On an object store there are no locks: there a lease is renewed every few seconds, and one that nobody
renews is taken over.
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
from nightseg.storage.paths import Location, hide_credentials, write_errors

LOCK_NAME = ".nightseg.lock"
HOLDER_NAME = ".nightseg-holder.json"
LEASE_NAME = ".nightseg-lease.json"
LEASE_SECONDS = 60.0  # how long a lease lives without being renewed
PROBE_SECONDS = 0.2  # `holder` takes the file lock for an instant; a driver that starts just then must not give up
_LOG = logging.getLogger("nightseg.storage")


class WorkspaceBusy(UserError):  # noqa: N818 (what is the case, not what went wrong)
    """Another driver works in this run folder; the message names it."""


@contextmanager
def hold(root: Location, *, lease_seconds: float = LEASE_SECONDS, settle_seconds: float = 1.0) -> Iterator[None]:
    """Holds the run folder while the body runs; raises `WorkspaceBusy`, naming the holder, if it is taken.

    `lease_seconds` and `settle_seconds` matter for remote folders only: how long a lease lives without renewal, and
    how long to wait before looking whether one's own claim was overwritten by a rival's.
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
        held = _read(root / LEASE_NAME)
        return _name(held) if held is not None and abs(_age(held)) <= lease_seconds else None
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
    place = root / LEASE_NAME
    owner = secrets.token_hex(8)
    held = _read(place)
    if held is not None:
        _wait_until_dead(root, place, held, seconds)
        place.delete()
    mine = _who() | {"owner": owner}
    place.create_bytes(_encode(mine))
    time.sleep(settle)  # two rivals may both have found nothing; the later write wins, and both see it now
    found = _read(place)
    if found is None or found.get("owner") != owner:
        raise _busy(root, found)
    stop = threading.Event()
    beat = threading.Thread(target=_renew, args=(place, mine, seconds / 4, stop), daemon=True, name="lease")
    beat.start()
    thief = None
    try:
        yield
    finally:
        stop.set()
        beat.join()
        thief = _other_owner(place, mine)
        if thief is None:
            place.delete()
    if thief is not None:
        raise _busy(root, thief)


def _wait_until_dead(root: Location, place: Location, held: dict[str, Any], seconds: float) -> None:
    """Returns when the lease is dead: old by our clock, and not renewed while we watch (clocks may disagree)."""
    if abs(_age(held)) <= seconds:
        raise _busy(root, held)
    _LOG.warning("the lease on %s looks abandoned; watching it for %.0f s", root, seconds)
    time.sleep(seconds)
    seen = _read(place)
    if seen is not None and seen != held:
        raise _busy(root, seen)


def _renew(place: Location, mine: dict[str, Any], pause: float, stop: threading.Event) -> None:
    while not stop.wait(pause):
        try:
            thief = _other_owner(place, mine)
            if thief is not None:
                _LOG.error("the lease on %s was taken over by %s", place.parent, _name(thief))
                return
            place.write_bytes(_encode(mine))
        except (OSError, UserError) as error:
            _LOG.warning("cannot renew the lease %s: %s", place, error)


def _other_owner(place: Location, mine: dict[str, Any]) -> dict[str, Any] | None:
    found = _read(place)
    return found if found is not None and found.get("owner") != mine["owner"] else None


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
    }


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
