"""Stages that run side by side share the driver's process: one of them works there at a time.

What a process has once would otherwise be changed by two of them at once: PyTorch's random state, from which networks
get their first weights, and its number of threads; the filters of warnings; the connection to Ray. Most of the time a
stage waits for the cluster, and hands the turn on meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TURN = threading.Lock()
_HELD = threading.local()
_at_work: set[int] = set()  # threads that have or wait for a turn


@contextmanager
def turn() -> Iterator[None]:
    """The body works in this process alone, but for where it waits. May be nested."""
    if _is_held():
        yield
        return
    _at_work.add(threading.get_ident())
    try:
        with _TURN:
            _HELD.by_this_thread = True
            try:
                yield
            finally:
                _HELD.by_this_thread = False
    finally:
        _at_work.discard(threading.get_ident())


@contextmanager
def waiting() -> Iterator[None]:
    """The body only waits for the cluster: others have their turn until it ends. Nothing where nobody holds one."""
    if not _is_held():
        yield
        return
    _HELD.by_this_thread = False
    _TURN.release()
    try:
        yield
    finally:
        _TURN.acquire()
        _HELD.by_this_thread = True


def is_shared() -> bool:
    """Whether several stages are at work in this moment."""
    return len(_at_work) > 1


def _is_held() -> bool:
    return getattr(_HELD, "by_this_thread", False)
