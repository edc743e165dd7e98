"""A disk on which a process may die within any operation: what has been done until then is all that is there.

Operations are the calls of Python that change something below a folder: a file made, written (which may end half way),
forced to disk, renamed, linked, removed; a folder made or removed. After its death the process does nothing more:
`finally` blocks change nothing, and only what the kernel frees is free. The power may fail with it: then what was
written but not forced to disk is gone, and a rename, link or removal whose folder was not forced to disk never was.
"""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import pytest

from nightseg.storage import Location

How = Literal["before", "within", "power"]


class Crash(BaseException):
    """The process is gone: no `except Exception` of the code under test may catch it."""


class CrashingDisk:
    """Dies before or within the operation of number `at`, counted from 1; never where that is 0. `watch` is called
    before each.

    `operations` has the name of each that was begun: what can be died in is known after an undisturbed run.
    """

    def __init__(
        self, root: object, at: int = 0, how: How = "before", watch: Callable[[], None] = lambda: None
    ) -> None:
        self.root, self.at, self.how = os.path.realpath(str(root)), at, how
        self.operations: list[str] = []
        self.is_dead = False
        self.watch = watch
        self._undo: dict[str, list[Callable[[], None]]] = {}  # folder -> what takes back its changes that are not safe
        self._unsafe: set[str] = set()  # files whose content is not safe
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> CrashingDisk:
        self._real = {name: getattr(os, name) for name in ("replace", "link", "unlink", "mkdir", "rmdir", "symlink")}
        self._fsync, self._open, self._make_folder = os.fsync, builtins.open, Location.make_folder
        for name in self._real:
            self._patch.setattr(os, name, self._stands_for(name))
        self._patch.setattr(os, "fsync", self._forced)
        self._patch.setattr(builtins, "open", self._opened)
        disk = self

        def make_folder(place: Location) -> None:
            disk._step("mkdir", lambda: disk._make_folder(place))

        self._patch.setattr(Location, "make_folder", make_folder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._patch.undo()
        if self.is_dead and self.how == "power":
            for changes in self._undo.values():
                for take_back in reversed(changes):
                    take_back()
            for path in self._unsafe:
                if os.path.exists(path):
                    os.truncate(path, 0)
        return kind is Crash

    def _step(self, name: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        if self.is_dead:
            raise Crash
        self.watch()
        self.operations.append(name)
        if len(self.operations) == self.at:
            self.is_dead = True
            if half is not None and self.how == "within":
                half()
            raise Crash(name)
        return act()

    def _is_here(self, path: str) -> bool:
        return f"{path}/".startswith(f"{self.root}/")

    def _stands_for(self, name: str) -> Callable[..., None]:
        def call(*places: Any, **options: Any) -> None:
            folder = options.get("dir_fd")
            start = os.getcwd() if folder is None else os.readlink(f"/proc/self/fd/{folder}")
            paths = [os.path.join(start, os.fspath(place)) for place in places if isinstance(place, str | os.PathLike)]
            if not self._is_here(paths[-1]):
                return self._real[name](*places, **options)
            return self._step(name, lambda: self._done(name, paths, lambda: self._real[name](*places, **options)))

        return call

    def _done(self, name: str, paths: list[str], act: Callable[[], None]) -> None:
        """Does it, and notes how the failing power takes it back."""
        target, before = paths[-1], None
        if name in ("replace", "unlink") and os.path.isfile(target) and not os.path.islink(target):
            with self._open(target, "rb") as stream:
                before = stream.read()
        act()
        changes = self._undo.setdefault(os.path.dirname(target), [])
        if name == "replace" and paths[0] in self._unsafe:
            self._unsafe.add(target)
        if name in ("replace", "link") and before is None:
            changes.append(lambda: os.path.lexists(target) and self._real["unlink"](target))
        elif name in ("replace", "unlink") and before is not None:
            changes.append(lambda: self._restore(target, before))

    def _restore(self, path: str, data: bytes) -> None:
        if os.path.isdir(os.path.dirname(path)):
            with self._open(path, "wb") as stream:
                stream.write(data)

    def _forced(self, handle: Any) -> None:
        path = os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}")
        if self._is_here(path):
            self._step("fsync", lambda: None)  # how long a real one takes is no matter here
            self._undo.pop(path, None)
            self._unsafe.discard(path)

    def _opened(self, file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        path = os.path.abspath(file) if isinstance(file, str | os.PathLike) else ""
        if not self._is_here(path) or not set(mode) & set("wxa+"):
            return self._open(file, mode, *more, **options)
        stream = self._step("open", lambda: self._open(file, mode, *more, **options))
        self._unsafe.add(path)
        write = stream.write

        def written(data: Any) -> Any:
            half = memoryview(data)[: len(data) // 2]
            return self._step("write", lambda: write(data), lambda: (write(half), stream.flush()))

        return _Stream(stream, written)


class _Stream:
    """A file whose writes are operations."""

    def __init__(self, stream: Any, write: Callable[[Any], Any]) -> None:
        self._stream, self.write = stream, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
