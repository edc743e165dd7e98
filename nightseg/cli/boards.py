"""TensorBoard beside a search, on loopback, for as long as the command runs; and where else to look."""

from __future__ import annotations

import importlib.util
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from nightseg.errors import UserError
from nightseg.storage import Location

PORT = 6006
LOOPBACK = "127.0.0.1"
SECONDS_TO_END = 10.0


@contextmanager
def boards(is_open: bool, say: Callable[[str], None]) -> Iterator[Callable[[Location], None] | None]:
    """What a search calls with its folder once it is connected: starts TensorBoard and says where to look. None if not
    `is_open`.

    Raises UserError, before anything starts, where TensorBoard is asked for and not installed.
    """
    if is_open and importlib.util.find_spec("tensorboard") is None:
        raise UserError("search: --open needs TensorBoard, and it is not installed", cure="pip install tensorboard")
    running: list[subprocess.Popen[bytes]] = []

    def watched(folder: Location) -> None:
        port = _free_port()
        running.append(_started(folder, port))
        for line in where_to_look(port):
            say(line)

    try:
        yield watched if is_open else None
    finally:
        for process in running:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)
            process.kill()


def words_of(folder: Location) -> list[str]:
    """What shows the trials of a search."""
    return ["tensorboard", "--logdir", f"{folder}/tensorboard", f"--host={LOOPBACK}"]


def where_to_look(port: int) -> list[str]:
    """TensorBoard, Ray's dashboard, and how both are reached from elsewhere."""
    from nightseg.cluster import ray as cluster

    found = [f"TensorBoard, values against scores: http://{LOOPBACK}:{port}/#hparams"]
    dashboard = cluster.dashboard()
    if dashboard:
        found.append(f"Ray's dashboard, trials as actors: http://{dashboard} (it asks for RAY_AUTH_TOKEN)")
    if not cluster.is_this_machine():
        host, _, ray_port = (dashboard or "HEAD:8265").rpartition(":")
        forward = ["ssh", "-N", "-L", f"{port}:{LOOPBACK}:{port}", "-L", f"{ray_port}:{LOOPBACK}:{ray_port}", host]
        found.append(f"from another machine: {shlex.join(forward)}")
    return found


def _started(folder: Location, port: int) -> subprocess.Popen[bytes]:
    program, *words = words_of(folder)
    command = [sys.executable, "-m", f"{program}.main", *words, f"--port={port}", "--reload_interval=5"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)  # noqa: S603 (our own words)


def _free_port() -> int:
    """TensorBoard's own, or another where that is taken."""
    for port in (PORT, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((LOOPBACK, port))
            return int(probe.getsockname()[1])
    return PORT
