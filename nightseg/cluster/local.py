"""A Ray of this machine alone: on loopback, in a private folder, and gone with the process that started it.

Its object store is small: only rows of paths and small results pass through it.
"""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nightseg.errors import UserError
from nightseg.storage.scratch import temporary_folder

OBJECT_STORE_BYTES = 512 * 2**20
"""Object store of a local Ray: decoded frames never enter it, so half a gibibyte is plenty."""

SMALLEST_OBJECT_STORE_BYTES = 80 * 2**20
"""Ray refuses less than 75 MiB."""

LONGEST_SOCKET_NAME = 107
"""Bytes of the path of a Unix socket, by Linux."""

TOO_SLOW = (
    "timed out during startup",
    "Failed to start the GCS",
    "Timed out waiting for file",
    "Failed to connect to GCS",
)
"""How Ray says that its own processes of a local cluster took too long to start."""

_held: ExitStack | None = None  # the folder of the Ray that this process started


def start(num_cpus: int | None, *, dashboard: bool, logs: bool) -> None:
    """Starts it; null CPUs = the cores this process may use. `logs`: what workers write comes to this terminal.

    Raises UserError where it does not come up in time, twice, or $RAY_TMPDIR cannot hold its folder.
    """
    global _held
    with ExitStack() as held:
        folder = held.enter_context(_folder())
        with _on_loopback():
            _init(folder, num_cpus, dashboard, logs)
        _held = held.pop_all()
    atexit.register(end)


def end() -> None:
    """Ends it, and removes its folder. Harmless without one."""
    global _held
    import ray

    atexit.unregister(end)
    ray.shutdown()
    held, _held = _held, None
    if held is not None:
        held.close()


@contextmanager
def _folder() -> Iterator[Path]:
    """A private folder where the names of Ray's sockets are not too long: in $RAY_TMPDIR, else $TMPDIR, else /tmp."""
    wanted = os.environ.get("RAY_TMPDIR")
    for place in [wanted] if wanted else [tempfile.gettempdir(), "/tmp"]:  # noqa: S108 (a private folder in there)
        with _temporary_folder_in(Path(place)) as folder:
            ray = folder / "r"  # Ray opens it to everybody: the folder around it stays closed
            socket = f"{ray}/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
            if len(os.fsencode(socket)) <= LONGEST_SOCKET_NAME:
                yield ray
                return
    raise UserError(
        f"RAY_TMPDIR: {place} is too long a path: names of sockets have at most {LONGEST_SOCKET_NAME} bytes",
        cure="a shorter path, or unset it",
    )


@contextmanager
def _temporary_folder_in(place: Path) -> Iterator[Path]:
    with ExitStack() as held:
        try:
            place.mkdir(parents=True, exist_ok=True)
            folder = held.enter_context(temporary_folder(place))
        except OSError as error:
            raise UserError(
                f"RAY_TMPDIR: no folder can be made in {place}: {error.strerror}", cure="a folder of yours, or unset it"
            ) from error
        yield folder


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Ray takes another address of this machine for 127.0.0.1, and listens on all of them, unless it believes that this
    system cannot form clusters; then nothing of it listens beyond loopback."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _init(folder: Path, num_cpus: int | None, dashboard: bool, logs: bool) -> None:
    import ray

    for is_last in (False, True):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus or len(os.sched_getaffinity(0)),
                include_dashboard=dashboard,
                object_store_memory=_object_store_bytes(),
                log_to_driver=logs,
                logging_level="ERROR",
                _temp_dir=str(folder),
            )
            return
        except Exception as error:  # Ray raises bare ones here
            ray.shutdown()
            if not any(words in str(error) for words in TOO_SLOW):
                raise
            if is_last:
                busy, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
                raise UserError(
                    f"Ray: its processes did not come up in time on this machine, twice (load {busy:.1f} on {cores} "
                    f"cores, {_free_memory()} of memory free): {str(error).strip().partition('. ')[0]}",
                    cure="wait until the machine is less busy, or end what is busy there, and give the same command; "
                    "work with 0 actors, and what a run has committed, need no Ray",
                ) from error
            logging.getLogger(__name__).warning("Ray did not come up in time: the machine is busy; tried once more")


def _free_memory() -> str:
    return f"{os.sysconf('SC_AVPHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB"


def _object_store_bytes() -> int:
    """Half a gibibyte, or what fits into shared memory: containers often have 64 MiB there, and Ray warns then."""
    try:
        status: Any = os.statvfs("/dev/shm")  # noqa: S108
    except OSError:
        return OBJECT_STORE_BYTES
    free = int(status.f_bsize * status.f_bavail * 0.8)
    return OBJECT_STORE_BYTES if free < SMALLEST_OBJECT_STORE_BYTES else min(OBJECT_STORE_BYTES, free)
