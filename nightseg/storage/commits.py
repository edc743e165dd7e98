"""Commits: what makes the files of an attempt the result of a stage, and how a reader knows that they still are it.

A stage works in an attempt folder, shard by shard (`attempts.py`). One atomic `_COMMITTED.json` then makes the attempt
the stage's result. The key of a stage is the hash of everything its result follows from, so the same key means: done,
skip (`workspace.py`). Readers go through the commit and never list folders; its paths are
relative to where it was found, so a run folder can be moved or copied. What a run reads has the content that was
committed: hashed when first read, then looked at again only where size, time or inode have changed (`_VERIFIED.json`,
which may be lost at any time).

    root/stages/<stage>/<name>/<key[:12]>/_COMMITTED.json, _VERIFIED.json
                                         /attempt-1/attempt.json, <outputs>, <table>/part-00000.parquet
                                                    _shards/00000.json, _scratch.json

Paths into the run folder are written as `run:stages/...` and read as absolute ones (`portable.py`).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from nightseg.errors import UserError
from nightseg.storage.paths import (
    Entry,
    Location,
    canonical_json,
    hash_of,
    safe_relative,
)
from nightseg.storage.portable import absolute, absolute_json
from nightseg.storage.tables import table_rows

COMMIT_NAME = "_COMMITTED.json"
VERIFIED_NAME = "_VERIFIED.json"
SCHEMA = 1
_CHUNK = 1 << 23  # bytes read at a time when hashing
_LOG = logging.getLogger("nightseg.storage")

Looks = Mapping[str, tuple[int, int, int]]  # path -> size, time of change (0: the store keeps none), inode
_VERIFIED: set[str] = set()  # stamps of what this process has read


class DamagedCommit(UserError):  # noqa: N818 (what is the case, not what went wrong)
    """Outputs of a commit are missing or have another size or content than when they were committed."""


class Damage(NamedTuple):
    """A file that is not as it was written, and how this shows: sizes, or the beginning of a sha256; or it is gone."""

    path: str
    expected: str
    seen: str

    def __str__(self) -> str:
        return f"{self.path} {self.seen}" + (f" instead of {self.expected}" if self.seen.startswith("has") else "")


@dataclass(frozen=True)
class Output:
    """One committed file: path relative to the attempt's folder, bytes, sha256 (hex), rows of a table or None."""

    path: str
    bytes: int
    sha256: str
    rows: int | None = None


@dataclass(frozen=True)
class Commit:
    """What one stage made. `folder` is the attempt's folder; `seconds` wall time; `created` ISO 8601, UTC."""

    stage: str
    name: str
    key: str
    folder: Location
    identity: Mapping[str, Any]
    seed: int
    rows_in: int
    rows_out: int
    quarantined: int
    seconds: float
    summary: Mapping[str, Any]
    outputs: tuple[Output, ...]
    code: str
    created: str

    @property
    def content(self) -> str:
        """Hash over (path, sha256) of all outputs: what later stages put into their `inputs`."""
        return hash_of(sorted([output.path, output.sha256] for output in self.outputs))

    def file(self, path: str) -> Location:
        """A listed output; raises KeyError for anything else, even if such a file lies in the folder."""
        if not self.has(path):
            raise KeyError(f"{self.stage}/{self.name} committed no {path!r}; it has {[o.path for o in self.outputs]}")
        return self.folder / path

    def has(self, path: str) -> bool:
        return any(output.path == path for output in self.outputs)

    def has_table(self, name: str) -> bool:
        return bool(table_paths(self.outputs, name))

    def table(self, name: str) -> pa.Table:
        """`<name>.parquet`, or the shards `<name>/part-*.parquet` in order as one table; KeyError if not committed."""
        return pa.concat_tables(self.parts(name), promote_options="default")  # a column of nulls fits any

    def parts(self, name: str) -> Iterator[pa.Table]:
        """The shards of a table in order, read as they are asked for; KeyError if not committed."""
        paths = table_paths(self.outputs, name)
        if not paths:
            raise KeyError(f"{self.stage}/{self.name} committed no table {name!r}")
        return map(self.part, paths)

    def part(self, path: str) -> pa.Table:
        """One file of a table."""
        return absolute((self.folder / path).read_table(), run_root(self.folder.parent))

    def json(self, path: str) -> Any:
        return absolute_json(self.file(path).read_json(), run_root(self.folder.parent))

    def verify(self) -> list[str]:
        """Reads every output again; the paths of those whose content is not the committed one."""
        return [damage.path for damage in damages(self)]


def run_root(stage_folder: Location) -> Location:
    """The run folder that root/stages/<stage>/<name>/<key> is in."""
    return stage_folder.parent.parent.parent.parent


def table_paths(outputs: Iterable[Output], name: str) -> list[str]:
    """Paths of the files that make up a table, in row order."""
    paths = sorted(output.path for output in outputs)
    if f"{name}.parquet" in paths:
        return [f"{name}.parquet"]
    start = f"{name}/part-"
    # shorter first: part-100000 comes after part-99999
    parts = [path for path in paths if path.startswith(start) and path.endswith(".parquet") and path.count("/") == 1]
    return sorted(parts, key=lambda path: (len(path), path))


def describe(folder: Location, path: str) -> Output:
    """Size, hash and (for Parquet) rows of a file as it is now; FileNotFoundError when absent."""
    file = folder / path
    with file.open_input() as stream:
        size, sha256 = _size_and_hash(stream)
        rows = table_rows(stream, str(file)) if path.endswith(".parquet") else None
    return Output(safe_relative(path), size, sha256, rows)


def _size_and_hash(stream: pa.NativeFile) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


def write_commit(stage_folder: Location, commit: Commit) -> bool:
    """Publishes the commit. False if there is an undamaged one already; then nothing is changed."""
    body = asdict(commit) | {"schema": SCHEMA, "attempt": commit.folder.name, "content": commit.content}
    del body["folder"]
    place = stage_folder / COMMIT_NAME
    data = canonical_json(body | {"sha256": hash_of(body)})
    if not place.create_bytes(data):
        theirs = read_commit(stage_folder)
        if theirs is not None and not damages(theirs):
            return False
        place.write_bytes(data)  # what was there was cut short, or its outputs are damaged
    with suppress(UserError, OSError):  # it counts all the same
        _remember(commit)
    return True


def read_commit(stage_folder: Location) -> Commit | None:
    """The commit of this folder, without a look at its outputs. None if there is none or it was cut short."""
    body = _read_body(stage_folder / COMMIT_NAME)
    if body is None:
        return None
    try:
        fields = {key: body[key] for key in Commit.__dataclass_fields__ if key not in ("folder", "outputs")}
        outputs = tuple(Output(**{**output, "path": safe_relative(output["path"])}) for output in body["outputs"])
        return Commit(folder=stage_folder / body["attempt"], outputs=outputs, **fields)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{stage_folder / COMMIT_NAME}: it was not written by nightseg ({error!r})", cure="delete it"
        ) from error


def seal_fault(place: Location) -> Damage | None:
    """What is wrong with the file of a commit, to the byte; None also where there is none."""
    try:
        data = place.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    opened = _unsealed(data)
    if opened is None:
        return Damage(place.name, "a sealed commit", "has other text")
    body, expected, seen = opened
    if expected == seen and data == canonical_json(body | {"sha256": expected}):
        return None
    return Damage(place.name, f"sha256 {expected[:12]}", f"has sha256 {seen[:12]}")


def check_outputs(commit: Commit) -> None:
    """Raises `DamagedCommit` if an output is missing, has another size, or is a link that leads out of the folder."""
    _refuse(commit, damages(commit, read=False))


def check_contents(commit: Commit) -> None:
    """Raises `DamagedCommit` unless every output is as it was committed.

    Files that had their content the last time, and size, time of change and inode since, are not read again. A store
    that keeps no times is read once a process.
    """
    looks = _looks(commit)
    stamp = _stamp(commit, looks)
    is_known = stamp in _VERIFIED or _is_remembered(commit, stamp, looks)
    _refuse(commit, damages(commit, read=not is_known, looks=looks))
    if not is_known:
        _VERIFIED.add(stamp)
        with suppress(UserError, OSError):  # a folder in which nobody may write is read again by the next process
            _remember(commit)


def damages(
    commit: Commit, *, read: bool = True, looks: Looks | None = None, done: Callable[[], None] | None = None
) -> list[Damage]:
    """What is wrong with the outputs; without `read` as far as a listing tells. `done` is called after each."""
    found = []
    sizes = _looks(commit) if looks is None else looks
    for output in commit.outputs:
        size, *_ = sizes.get(output.path, (None,))
        if size is None:
            found.append(Damage(output.path, f"{output.bytes} bytes", "is missing"))
        elif size != output.bytes:
            found.append(Damage(output.path, f"{output.bytes} bytes", f"has {size} bytes"))
        elif commit.folder.is_local and not _is_inside(commit.folder / output.path, commit.folder):
            found.append(Damage(output.path, f"{output.bytes} bytes", "is a link that leads out of the folder"))
        elif read:
            with (commit.folder / output.path).open_input() as stream:
                _, sha256 = _size_and_hash(stream)
            if sha256 != output.sha256:
                found.append(Damage(output.path, f"sha256 {output.sha256[:12]}", f"has sha256 {sha256[:12]}"))
        if done is not None:
            done()
    return found


def _refuse(commit: Commit, found: Sequence[Damage]) -> None:
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise DamagedCommit(
            f"{commit.stage}/{commit.name}: outputs in {commit.folder} are damaged: "
            f"{'; '.join(map(str, found[:3]))}{more}",
            cure=f"restore them, or delete {commit.folder.parent} to compute them again",
        )


def _looks(commit: Commit) -> Looks:
    """What lies in the commit's folder."""
    if not commit.outputs:
        return {}
    # one listing: on a store every look takes a round trip
    entries = [entry for entry in listed(commit.folder, recursive=True) if not entry.is_folder]
    if not commit.folder.is_local:
        return {entry.name: (entry.size, entry.modified_ns, 0) for entry in entries}
    return {entry.name: (entry.size, entry.modified_ns, os.stat(f"{commit.folder.uri}/{entry.name}").st_ino)
            for entry in entries}  # fmt: skip


def listed(folder: Location, recursive: bool = False) -> list[Entry]:
    """What lies in a folder, nothing where there is none."""
    try:
        return folder.list(recursive)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _stamp(commit: Commit, looks: Looks) -> str:
    """What changes when a file is written: hash over the commit and the looks of all outputs."""
    return hash_of([commit.folder.uri, commit.content, [[o.path, *looks.get(o.path, ())] for o in commit.outputs]])


def _verified_place(commit: Commit) -> Location:
    return commit.folder.parent / VERIFIED_NAME


def _remember(commit: Commit) -> None:
    """Notes that the outputs have their content, where the store can tell later whether they were written since."""
    looks = _looks(commit)
    if all(modified for _, modified, _ in looks.values()):
        _verified_place(commit).write_json({"stamp": _stamp(commit, looks)})


def _is_remembered(commit: Commit, stamp: str, looks: Looks) -> bool:
    """Whether the outputs are known to have their content. Stores tell whole seconds: a note of the same second as
    the newest output does not know what was written after it."""
    place = _verified_place(commit)
    try:
        if place.read_json() != {"stamp": stamp}:
            return False
        newest = max((modified for _, modified, _ in looks.values()), default=0)
        return commit.folder.is_local or newest % 1_000_000_000 > 0 or place.modified_ns() > newest
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def _is_inside(file: Location, folder: Location) -> bool:
    return Path(os.path.realpath(file.uri)).is_relative_to(os.path.realpath(folder.uri))


def _unsealed(data: bytes) -> tuple[dict[str, Any], str, str] | None:
    """The body of a commit, the sha256 it says it has, and the one it has; None if it is no such text."""
    try:
        body = json.loads(data)
        return body, str(body.pop("sha256")), hash_of(body)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def _read_body(place: Location) -> dict[str, Any] | None:
    try:
        data = place.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    opened = _unsealed(data)
    if opened is None or opened[1] != opened[2]:
        _LOG.warning("%s was cut short or does not match its own hash; the stage counts as not committed", place)
        return None
    body, schema = opened[0], opened[0].get("schema")
    if schema != SCHEMA:
        raise UserError(
            f"{place}: it has schema {schema!r}, this nightseg reads schema {SCHEMA}",
            cure="use the nightseg that wrote it (see 'code' in the file), or a new run folder",
        )
    return body


@functools.cache
def code_version() -> str:
    """nightseg's version and a hash of its sources, like `0.1.0+3f9c2ab01d44`."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for source in sorted(root.rglob("*.py")):
        digest.update(f"{source.relative_to(root).as_posix()}\0".encode() + source.read_bytes() + b"\0")
    return f"{metadata.version('nightseg')}+{digest.hexdigest()[:12]}"


def outputs_below(folder: Location, paths: Sequence[str]) -> list[Output]:
    """The named files, and all files below the named folders, described and forced to disk.

    Raises FileNotFoundError for a path that is not there.
    """
    files = set()
    for path in map(safe_relative, paths):
        if (folder / path).is_folder():
            below = (folder / path).list(recursive=True)
            files |= {f"{path}/{entry.name}" for entry in below if not entry.is_folder}
        else:
            files.add(path)
    for path in files:
        (folder / path).flush()
    return [describe(folder, path) for path in sorted(files)]


def after_others(stage_folder: Location) -> datetime:
    """Now, or later: after the commits of the stage's other keys, so that the newest is the newest whatever clocks
    say."""
    folder, newest = stage_folder.parent, datetime.now(UTC)
    for entry in folder.list():
        with suppress(UserError, ValueError):  # not of this nightseg
            if entry.is_folder and (commit := read_commit(folder / entry.name)) is not None:
                newest = max(newest, datetime.fromisoformat(commit.created) + timedelta(milliseconds=1))
    return newest
