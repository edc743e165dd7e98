"""What Ray would print, kept out of the terminal: a run shows its own progress and nothing else.

Nothing is lost by it. What matters comes back as an exception, the rest is in Ray's log folder, and RAY_LOG_TO_DRIVER=1
(Ray's own switch) brings everything back for who looks for a fault.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

_is_notice_out = False


def wants_logs() -> bool:
    """Whether the user asks for the output of Ray's workers and daemons."""
    return os.environ.get("RAY_LOG_TO_DRIVER", "0").lower() in ("1", "true")


def hide_daemons() -> None:
    """Ray prints what its daemons say to standard output, even with log_to_driver off; that belongs to `--json`."""
    if not wants_logs():
        import ray._private.worker

        ray._private.worker._worker_logs_enabled = False


def hide_ray_data() -> None:
    """Ray Data's bars, banners, tracebacks of errors that we raise anyway, and a debug log that grows without limit."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not wants_logs():
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # after the import, which sets it to DEBUG
        _let_out_actor_notice()


def _let_out_actor_notice() -> None:
    """Ray's C++ core warns on standard error, once a process, of actors as Ray Data makes them. Here nobody sees it."""
    global _is_notice_out
    if _is_notice_out:
        return
    import ray

    class Nobody:
        def __init__(self, argument: object) -> None:
            del argument

    with _stderr_without(b"has constructor arguments in the object store"):
        actor = ray.remote(num_cpus=0, max_restarts=1)(Nobody).remote(ray.put(None))
        ray.kill(actor)
    _is_notice_out = True


@contextmanager
def _stderr_without(unwanted: bytes) -> Iterator[None]:
    """Holds standard error (the descriptor: C++ does not know sys.stderr) back, and lets out lines without the text."""
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if unwanted not in line:
                    os.write(2, line)
