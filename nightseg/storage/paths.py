"""Files and folders, on local disk or on any file system of pyarrow or fsspec, addressed by one `Location`.

All file access of the project goes through here, so that atomic writes, path safety and the refusal of dangerous
Parquet columns are decided once. A file is read and written as the bytes it has, whatever its name says. Retries of a
busy store are those of the file systems themselves.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import stat
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from nightseg.errors import UserError
from nightseg.storage.credentials import hide_in_address, refuse_credentials
from nightseg.storage.stores import SCHEME, create, file_system, get, make_folder, put
from nightseg.storage.tables import format_table, parse_table

FAULT_VARIABLE = "NIGHTSEG_FAULT"
TEMPORARY_PREFIX = ".nightseg-tmp-"
_FREE_SPACE = "free space or choose another run folder, then run it again"
_PERMISSIONS = ("you may not write there", "fix the permissions or choose another run folder")
_WRITE_CURES = {
    errno.ENOSPC: ("the disk is full", _FREE_SPACE),
    errno.EDQUOT: ("your quota is used up", _FREE_SPACE),
    errno.EFBIG: ("the file would grow over the limit on file sizes", "raise it (ulimit -f), then run it again"),
    errno.EROFS: ("the file system is read-only", "choose another run folder"),
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
}


@dataclass(frozen=True)
class Entry:
    """One file or folder listed. `name`: relative, POSIX; `modified_ns`: since 1970, 0 if the store keeps none.

    Of a walk: `problem`, why it cannot be read, as far as a listing can tell; `is_linked`, whether a link is on the
    way; `same`, a text that is equal for two ways to one file or folder ("" on other stores than the local disk).
    """

    name: str
    size: int
    modified_ns: int
    is_folder: bool
    problem: str = ""
    is_linked: bool = False
    same: str = ""


@dataclass(frozen=True)
class Location:
    """A file or folder: an absolute local path, or a URI of any pyarrow or fsspec file system. Picklable."""

    uri: str

    @classmethod
    def of(cls, path: str | Path | Location) -> Location:
        """Local paths (also `~/x` and `file://` URIs) become absolute; other schemes are kept as they are.

        Raises UserError: no path, another host, or an address that lacks a slash (s3:/...) and holds credentials.
        """
        if isinstance(path, Location):
            return path
        text = os.fspath(path)
        if not text or "\0" in text or _is_not_utf8(text):
            raise UserError(f"path {text!r}: it is empty, holds a NUL or is not UTF-8", cure="give the path of a file")
        scheme = SCHEME.match(text)
        if scheme and scheme[1].lower() != "file":
            before, mark, query = text.partition("?")
            return cls(scheme[0] + before[len(scheme[0]) :].rstrip("/") + mark + query)
        if scheme:
            text = unquote(text[len(scheme[0]) :])
            if not text.startswith("/"):
                raise UserError(
                    f"{os.fspath(path)!r}: it names another host", cure="give three slashes, like file:///data"
                )
        if ":/" in text and not text.startswith("/"):
            refuse_credentials(text)
        return cls(_absolute(os.path.expanduser(text)))

    def __truediv__(self, relative: str) -> Location:
        """A file or folder below this one; raises `UserError` for anything that could lead out of it."""
        before, mark, query = self._split()
        if "?" in relative and not self.is_local:
            raise UserError(
                f"path {relative!r} refused: a question mark starts the options of {self}", cure="rename the file"
            )
        slash = "" if before.endswith("/") else "/"
        return Location(before + slash + safe_relative(relative) + mark + query)

    def __str__(self) -> str:
        """The URI as it may be shown: without credentials."""
        return hide_in_address(self.uri)

    @property
    def name(self) -> str:
        return self._split()[0].rpartition("/")[2]

    @property
    def parent(self) -> Location:
        """The folder this lies in."""
        if self.is_local:
            return Location(os.path.dirname(self.uri))
        before, mark, query = self._split()
        scheme, slashes, path = before.partition("://")
        return Location(scheme + slashes + path.rpartition("/")[0] + mark + query)

    def beside(self, path: str) -> Location:
        """What this file refers to: a path relative to its folder, or an absolute path or URI."""
        if "://" in path or path.startswith("~"):
            return Location.of(path)
        return Location.of(os.path.join(self.parent.uri, path))

    @property
    def is_local(self) -> bool:
        return not SCHEME.match(self.uri)

    @property
    def local(self) -> Path:
        if not self.is_local:
            raise UserError(f"{self}: it is remote, and a local path is needed", cure="copy it to a local disk first")
        return Path(self.uri)

    def _split(self) -> tuple[str, str, str]:
        """Path, and the options of the file system that some URIs end with: s3://bucket/a?region=eu-west-1."""
        return (self.uri, "", "") if self.is_local else self.uri.partition("?")

    # -- looking -------------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        return bool(self._info().type != pafs.FileType.NotFound)

    def is_folder(self) -> bool:
        return bool(self._info().type == pafs.FileType.Directory)

    def holds(self, other: Location) -> bool:
        """Whether the other one lies below this folder, links resolved."""
        return _resolved(other).startswith(f"{_resolved(self).rstrip('/')}/")

    def size(self) -> int:
        """Bytes of the file; raises FileNotFoundError when absent."""
        info = self._info()
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(errno.ENOENT, "no such file", str(self))
        return int(info.size)

    def modified_ns(self) -> int:
        """When it was last written, since 1970; 0 if it is not there, or the store keeps no times."""
        return int(self._info().mtime_ns or 0)

    def list(self, recursive: bool = False) -> list[Entry]:
        """Entries sorted by name, without open writes. Links to folders are listed but not followed when recursive."""
        if self.is_local:  # pyarrow follows links, in circles too, and refuses names that are not UTF-8
            entries = _list_local(self.uri, "", recursive)
        else:
            system, path = file_system(self.uri)
            start = len(path.strip("/")) + 1 if path.strip("/") else 0
            entries = (
                Entry(
                    info.path.strip("/")[start:],
                    int(info.size or 0),
                    int(info.mtime_ns or 0),
                    info.type == pafs.FileType.Directory,
                )
                for info in system.get_file_info(pafs.FileSelector(path, recursive=recursive))
            )
        finished = (entry for entry in entries if TEMPORARY_PREFIX not in entry.name)
        return sorted(finished, key=lambda entry: entry.name)

    def walk(self, enter: Callable[[str], bool] = lambda name: True) -> builtins.list[Entry]:
        """Entries of all levels sorted by name, links followed; below a folder only if `enter(name)` is true of it.

        A link to a folder that was listed already, or that holds the link, is not followed again: `problem` says so. A
        link that leads nowhere and what is no file (a pipe, a device) are entries with a `problem`, too.
        Raises UserError: a folder may not be read.
        """
        if self.is_local:
            return sorted(_walk_local(self.uri, enter), key=lambda entry: entry.name)
        return [entry for entry in self.list(recursive=True) if all(map(enter, _folders_above(entry.name)))]

    def _info(self) -> pafs.FileInfo:
        system, path = file_system(self.uri)
        return system.get_file_info(path)

    # -- reading and writing bytes -------------------------------------------------------------------------------

    def open_input(self) -> pa.NativeFile:
        """A random-access stream for reading; raises FileNotFoundError when absent, IsADirectoryError for a folder."""
        system, path = file_system(self.uri)
        try:
            return system.open_input_file(path)
        except OSError as error:
            if error.errno is None and self.is_folder():  # Arrow's own message, without a number
                raise IsADirectoryError(errno.EISDIR, "is a folder", str(self)) from error
            raise

    def read_bytes(self) -> bytes:
        """The whole file; raises FileNotFoundError when absent."""
        if not self.is_local:
            return get(self.uri, *file_system(self.uri))
        with self.open_input() as stream:
            return bytes(stream.read())

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Replaces the file as a whole: readers see the old content or the new one, also after a crash."""
        with write_errors(self):
            if self.is_local:
                with _temporary_file(self.uri, data) as temporary:
                    os.replace(temporary, self.uri)
            else:
                put(*file_system(self.uri), data)

    def create_bytes(self, data: bytes | memoryview) -> bool:
        """Like `write_bytes`, but only if nothing is there; False when something is.

        Local disk decides the race with a hard link, stores by a conditional write. Those that have none only look
        first (`decides_first`), so there the lock of the run folder is what keeps a second writer away.
        """
        with write_errors(self):
            if not self.is_local:
                return create(self.uri, *file_system(self.uri), data)
            with _temporary_file(self.uri, data) as temporary:
                try:
                    os.link(temporary, self.uri)
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                        raise
                    # no hard links here (FAT, some network drives): look, then replace
                    if os.path.lexists(self.uri):
                        return False
                    os.replace(temporary, self.uri)
                return True

    def flush(self) -> None:
        """Forces a local file, written by someone else, to disk. Remote objects are durable once written."""
        if self.is_local:
            _sync(self.uri)
            _sync(os.path.dirname(self.uri))

    def make_folder(self) -> None:
        """On object stores folders are there once something lies in them, so this does nothing."""
        with write_errors(self):
            make_folder(*file_system(self.uri))

    def delete(self) -> None:
        """Removes the file or the folder with all it holds; nothing happens when it is not there."""
        if self.is_local:
            if self.local.is_dir() and not self.local.is_symlink():
                shutil.rmtree(self.uri)
            else:
                self.local.unlink(missing_ok=True)
            return
        system, path = file_system(self.uri)
        with suppress(FileNotFoundError):
            (system.delete_dir if self.is_folder() else system.delete_file)(path)

    # -- JSON and tables -----------------------------------------------------------------------------------------

    def read_json(self) -> Any:
        return json.loads(self.read_bytes())

    def write_json(self, obj: Any) -> None:
        self.write_bytes(canonical_json(obj))

    def read_table(self) -> pa.Table:
        """The Parquet file. Raises `UserError` when it is damaged or has extension types (CVE-2026-41486)."""
        return parse_table(self.read_bytes(), str(self))

    def write_table(self, table: pa.Table) -> None:
        """Parquet, zstd. The same table gives the same bytes. Extension types are refused, as when reading."""
        self.write_bytes(memoryview(format_table(table, str(self))))


def safe_relative(relative: str) -> str:
    """The relative POSIX path with `.` and doubled slashes removed; raises `UserError` if it could leave its folder."""
    why = ""
    if relative.startswith("/") or re.match(r"^[A-Za-z]:(/|$)", relative) or SCHEME.match(relative):
        why = "it is absolute"
    elif "\0" in relative or "\\" in relative:
        why = "it holds a NUL character or a backslash"
    elif ".." in relative.split("/"):
        why = "it leads out of its folder"
    elif _is_not_utf8(relative):
        why = "its name is not valid UTF-8 (rename the file)"
    normal = str(PurePosixPath(relative))
    if not why and normal == ".":
        why = "it is empty"
    if why:
        raise UserError(
            f"path {relative!r} refused: {why}", cure="give a relative path below the folder, like 'a/b.png'"
        )
    return normal


def _absolute(path: str) -> str:
    """Without `..`: after a link they lead where the link leads, as everywhere else, and not back to before it."""
    plain = os.path.abspath(path)
    if ".." not in path.split("/"):
        return plain
    before, _, after = f"{os.path.join(os.getcwd(), path)}/".rpartition("/../")
    real = os.path.join(os.path.realpath(f"{before}/.."), after.rstrip("/"))
    return plain if os.path.realpath(plain) == os.path.realpath(real) else os.path.normpath(real)


def _resolved(place: Location) -> str:
    return os.path.realpath(place.uri) if place.is_local else place.uri


def _is_not_utf8(name: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in name)


def sha256_of(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def hash_of(obj: Any) -> str:
    """sha256 (hex) of the compact canonical JSON of `obj`; NaN and infinities raise ValueError."""
    return sha256_of(
        json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    )


def canonical_json(obj: Any) -> bytes:
    return (json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _list_local(root: str, below: str, recursive: bool) -> Iterator[Entry]:
    with os.scandir(os.path.join(root, below)) as children:
        for child in children:
            name = below + child.name
            is_link = child.is_symlink()
            if is_link and not os.path.exists(child.path):
                continue  # a dangling link holds nothing
            status = child.stat()
            is_folder = child.is_dir()
            yield Entry(name, 0 if is_folder else status.st_size, status.st_mtime_ns, is_folder)
            if is_folder and recursive and not is_link:
                yield from _list_local(root, name + "/", recursive)


def _walk_local(root: str, enter: Callable[[str], bool]) -> Iterator[Entry]:
    """Level by level, what is reached without links first: so a folder has its own name and not that of a link."""
    seen: dict[str, str] = {}  # folder -> where it was listed
    plain, linked = deque([""]), deque[str]()
    while plain or linked:
        is_link = not plain
        name = (linked if is_link else plain).popleft()
        path = os.path.join(root, name)
        try:
            status = os.stat(path)
            folder = _identity(path, status)
            if is_link:
                same = os.path.join(root, seen[folder]).rstrip("/") if folder in seen else ""
                problem = f"a link to {same}, which is listed already" if same else ""
                yield Entry(name, 0, status.st_mtime_ns, True, problem, is_linked=True, same=folder)
                if same:
                    continue
            seen[folder] = name
            with os.scandir(path) as children:
                for child in children:
                    if TEMPORARY_PREFIX in child.name:
                        continue
                    entry = _looked_at(child, f"{name}/{child.name}" if name else child.name, is_link)
                    if entry.is_folder and enter(entry.name):
                        (linked if entry.is_linked else plain).append(entry.name)
                    if not (entry.is_folder and entry.is_linked):  # said above, once it is known whether it is new
                        yield entry
        except PermissionError as error:
            raise UserError(
                f"{error.filename or path}: it may not be read, so what lies there would be missing",
                cure="get the rights to read it (chmod), or move it out of the folder",
            ) from error


def _looked_at(child: os.DirEntry[str], name: str, is_below_link: bool) -> Entry:
    """A file or folder behind its links."""
    is_linked = is_below_link or child.is_symlink()
    try:
        status = child.stat()
    except PermissionError:
        raise
    except OSError as error:  # nothing there, a circle of links, or gone since the folder was opened
        to = f" to {os.readlink(child.path)}" if child.is_symlink() else ""
        why = "leads in a circle" if error.errno == errno.ELOOP else "leads nowhere"
        return Entry(name, 0, 0, False, f"a link{to} that {why}", is_linked)
    is_folder = stat.S_ISDIR(status.st_mode)
    problem = "" if is_folder or stat.S_ISREG(status.st_mode) else "a pipe, socket or device, and no file"
    size = 0 if is_folder else status.st_size
    return Entry(name, size, status.st_mtime_ns, is_folder, problem, is_linked, _identity(child.path, status))


def _identity(path: str, status: os.stat_result) -> str:
    """Device and inode; the real path on the few file systems without inodes."""
    return f"{status.st_dev}:{status.st_ino}" if status.st_ino else os.path.realpath(path)


def _folders_above(name: str) -> list[str]:
    return [str(folder) for folder in PurePosixPath(name).parents][:-1]


@contextmanager
def _temporary_file(target: str, data: bytes | memoryview) -> Iterator[str]:
    """A synced file beside `target`; gone afterwards unless moved. The folder is synced when the body is done."""
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    stream, temporary = _open_temporary(folder)
    try:
        with stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            fault_point(f"temporary-{os.path.basename(target)}")
            yield temporary
        _sync(folder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _open_temporary(folder: str) -> tuple[io.BufferedWriter, str]:
    """A new file and its path. It is locked while it is open, so that others see whether its writer lives."""
    while True:
        # the target's own name is left out: it may be as long as the file system allows
        temporary = os.path.join(folder, f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
        stream = open(temporary, "xb")  # noqa: SIM115
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            is_mine = os.fstat(stream.fileno()).st_nlink > 0
        except BlockingIOError:
            is_mine = False
        except OSError:  # no locks on this file system, so nobody clears up
            is_mine = True
        if is_mine:
            return stream, temporary
        stream.close()  # somebody clears up this very moment, and took it for a dead one's
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def remove_temporary_files(folder: str, enter: Callable[[str], bool] = lambda path: True) -> None:
    """Remove what processes that were killed were writing below a local folder; what one still writes stays.

    The kernel says which is which, by locks that end with their holders: no clock, process id or host name does.
    `enter`: whether to look into a folder, given its path; links are not followed.
    """
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if enter(os.path.join(place, name))]
        for name in files:
            if name.startswith(TEMPORARY_PREFIX):
                with suppress(OSError):  # it is being written, gone meanwhile, or not ours to remove
                    _remove_unless_locked(os.path.join(place, name))


def _remove_unless_locked(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    finally:
        os.close(handle)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


@contextmanager
def write_errors(location: Location) -> Iterator[None]:
    """Turns a full disk, a quota and missing rights into a `UserError` that names the place and the cure."""
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITE_CURES:
            raise
        what, cure = _WRITE_CURES[error.errno]
        raise UserError(f"cannot write {location}: {what} ({error.strerror})", cure=cure) from error


# -- faults ------------------------------------------------------------------------------------------------------------


def fault_point(name: str) -> None:
    """SIGKILLs this process if the environment says `NIGHTSEG_FAULT=after:<name>`, so that a test can prove a rerun.

    The commit protocol passes, in this order: `attempt`, for every shard `tables`, `shard` and `shard-<5 digits>`, then
    `hashed` and `commit`; and `temporary-<file name>` whenever a file is written but not yet in place.
    """
    if os.environ.get(FAULT_VARIABLE) == f"after:{name}":
        os.kill(os.getpid(), signal.SIGKILL)
