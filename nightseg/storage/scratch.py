"""Large files that can be made again, on a disk of this machine, shared by the processes that work on it.

A file is there whole or not at all, also when its writer is killed; but nothing waits for the disk, so the folder's
name carries the boot: what was written before the machine went down is not trusted. Files are read by memory maps.

A folder lives while a process has it open, and goes with the last one that closes it. What a killed process leaves is
picked up by the next one that asks for the same key, or removed by any that comes a day later or after a restart.
Temporary folders (`temporary_folder`) have no key: those of killed processes are removed by the next one at once.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from nightseg.storage.paths import fault_point

KEPT_FREE = 0.1  # share of the disk that is left to others,
MOST_KEPT_FREE = 4 * 2**30  # bytes: but no more than this of a large one
ABANDONED_SECONDS = 24 * 3600.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_LOCK = "lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_PLACE = (*_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENOTSUP)
_TEMPORARY = "tmp-"


class Scratch:
    """An open folder of scratch files. Threads may share it, and other processes may have the same one open."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock: int | None = lock

    @classmethod
    def open(cls, key: str, below: Path | None = None) -> Self | None:
        """The folder of that key below `below`, by default the system's temporary folder ($TMPDIR).

        None if there is no place there that is this user's alone, since whoever can write there decides what is read.
        """
        try:
            shelf = _shelf(below)
            if shelf is None:
                return None
            folder = shelf / f"{_boot()}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"
            return cls(folder, _shared_lock(folder))
        except OSError as error:
            if error.errno in _NO_PLACE:
                return None
            raise

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> bool:
        """Put the file there as a whole. False, and nothing is there, if that left others too little of the disk."""
        temporary = self.folder / f".{secrets.token_hex(8)}"
        try:
            usage = shutil.disk_usage(self.folder)
            left = usage.free - sum(memoryview(part).nbytes for part in parts)
            if left < min(KEPT_FREE * usage.total, MOST_KEPT_FREE):
                return False
            with temporary.open("xb") as stream:
                for part in parts:
                    stream.write(part)
            fault_point(f"scratch-{name}")
            temporary.replace(self.folder / name)
        except OSError as error:
            with suppress(FileNotFoundError):
                temporary.unlink()
            if error.errno in (*_FULL, errno.ENOENT):  # ENOENT: temporary folders are swept on some systems
                return False
            raise
        return True

    def map(self, name: str) -> mmap.mmap | None:
        """The bytes of a file, None if it is not there. What is written to the map stays with this process."""
        try:
            with (self.folder / name).open("rb") as stream:
                return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (FileNotFoundError, ValueError):  # ValueError: an empty file cannot be mapped
            return None

    def close(self) -> None:
        """Give the folder up; the last process that does removes it. Maps that are open stay valid."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder, ignore_errors=True)
        except BlockingIOError:
            return  # another process still reads here
        finally:
            os.close(lock)


@contextmanager
def temporary_folder(below: Path | None = None) -> Iterator[Path]:
    """A folder for the body, below `below` or the system's temporary folder. Its name is short: sockets may lie there.

    Where this process is killed, the next one that opens scratch files or a temporary folder, or takes the lock of a
    run folder, removes it.
    """
    held = None
    with suppress(OSError):
        shelf = _shelf(below)
        held = None if shelf is None else _new_temporary(shelf)
    if held is None:  # nowhere that is this user's alone, or without locks: nobody could tell whether we live
        with tempfile.TemporaryDirectory(prefix="nightseg-", dir=below, ignore_cleanup_errors=True) as place:
            yield Path(place)
        return
    folder, lock = held
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_abandoned(below: Path | None = None) -> None:
    """Remove what killed processes of this user have left among the scratch files."""
    with suppress(OSError):
        _shelf(below, create=False)


def _shelf(below: Path | None, create: bool = True) -> Path | None:
    """Where the folders lie, without those that are abandoned; None if others can write there."""
    shelf = (below or Path(tempfile.gettempdir())) / f"nightseg-{os.getuid()}"
    if create:
        shelf.mkdir(mode=0o700, exist_ok=True)
    found = shelf.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        return None
    _remove_abandoned(shelf)
    return shelf


def _shared_lock(folder: Path) -> int:
    """A descriptor that holds the folder, made if need be, against removal. The kernel drops it with the process."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):  # its last user removes it this very moment: make it again
            lock = _open_lock(folder)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(lock), os.stat(folder / _LOCK)):
                    os.utime(folder)
                    return lock
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)


def _open_lock(folder: Path) -> int:
    return os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _new_temporary(shelf: Path) -> tuple[Path, int]:
    """A new folder, and a descriptor that holds it: the lock is on the folder itself."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=shelf))
        with suppress(FileNotFoundError, BlockingIOError):  # somebody clears up this very moment: make another one
            lock = _locked(folder, os.O_RDONLY | os.O_DIRECTORY)
            if folder.exists():
                return folder, lock
            os.close(lock)


def _remove_abandoned(shelf: Path) -> None:
    """Temporary folders, those of another boot, or that nobody has opened for a day, unless somebody has one open."""
    boot = _boot()
    for folder in shelf.iterdir():
        with suppress(OSError):  # another process removes it, too, or it holds what is not ours to remove
            is_temporary = folder.name.startswith(_TEMPORARY)
            old = time.time() - folder.stat().st_mtime > ABANDONED_SECONDS
            if folder.name.startswith(f"{boot}-") and not old:
                continue
            lock = _locked(folder, os.O_RDONLY) if is_temporary else _locked(folder / _LOCK, os.O_RDWR | os.O_CREAT)
            try:
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _locked(place: Path, how: int) -> int:
    """A descriptor that holds it alone. Raises BlockingIOError where another process has it."""
    lock = os.open(place, how | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _boot() -> str:
    """A word for the time since this machine was started; where it does not say, one that no other process has."""
    with suppress(OSError):
        return hashlib.sha256(_BOOT.read_bytes()).hexdigest()[:12]
    return _NOWHERE


_NOWHERE = f"{os.getpid():x}-{secrets.token_hex(4)}"
