"""The run folder: which stage was done with which inputs, and the protocol that makes a crash harmless.

A stage works in an attempt folder, shard by shard; a shard counts once its marker is there. One atomic
`_COMMITTED.json` then makes the attempt the stage's result. The key of a stage is the hash of everything its result
follows from, so the same key means: done, skip. Readers go through the commit and never list folders; its paths are
relative to where it was found, so a run folder can be moved or copied. What a run reads has the content that was
committed: hashed when first read, then looked at again only where size, time or inode have changed (`_VERIFIED.json`,
which may be lost at any time).

    root/stages/<stage>/<name>/<key[:12]>/_COMMITTED.json, _VERIFIED.json
                                         /attempt-1/attempt.json, <outputs>, <table>/part-00000.parquet
                                                    _shards/00000.json, _scratch.json

Paths into the run folder are written as `run:stages/...` and read as absolute ones (`portable.py`).

What a killed driver leaves behind is removed by the next one that takes the lock of the run folder: files that were
being written, and what an attempt needed only until it was committed (`_scratch.json` lists it).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa

from nightseg.errors import UserError
from nightseg.progress import printable
from nightseg.storage.lock import hold, holder
from nightseg.storage.paths import (
    Entry,
    Location,
    canonical_json,
    fault_point,
    hash_of,
    remove_temporary_files,
    safe_relative,
    sha256_of,
)
from nightseg.storage.portable import absolute, absolute_json, portable, portable_json
from nightseg.storage.scratch import remove_abandoned
from nightseg.storage.tables import format_table, table_rows

COMMIT_NAME = "_COMMITTED.json"
VERIFIED_NAME = "_VERIFIED.json"
ATTEMPT_NAME = "attempt.json"
SHARDS_NAME = "_shards"
SCRATCH_NAME = "_scratch.json"
QUARANTINE = "quarantine"
SCHEMA = 1
_KEY_LETTERS = 12  # of the key in the folder's name; the whole key is compared when reading
_MOST_ACCIDENTS = 0.3  # of the rows of a pass that are bad: more share one cause, and are not to be left out
_CHUNK = 1 << 23  # bytes read at a time when hashing
_LOG = logging.getLogger("nightseg.storage")


# -- commits ---------------------------------------------------------------------------------------------------------


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
        return absolute((self.folder / path).read_table(), _root(self.folder.parent))

    def json(self, path: str) -> Any:
        return absolute_json(self.file(path).read_json(), _root(self.folder.parent))

    def verify(self) -> list[str]:
        """Reads every output again; the paths of those whose content is not the committed one."""
        return [damage.path for damage in damages(self)]


def _root(stage_folder: Location) -> Location:
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
    entries = [entry for entry in _listed(commit.folder, recursive=True) if not entry.is_folder]
    if not commit.folder.is_local:
        return {entry.name: (entry.size, entry.modified_ns, 0) for entry in entries}
    return {entry.name: (entry.size, entry.modified_ns, os.stat(f"{commit.folder.uri}/{entry.name}").st_ino)
            for entry in entries}  # fmt: skip


def _listed(folder: Location, recursive: bool = False) -> list[Entry]:
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


# -- attempts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard: input rows, seconds of work, and its part of each table."""

    index: int
    rows_in: int
    seconds: float
    tables: Mapping[str, Output]

    def rows(self, table: str) -> int:
        """Rows of this shard's part of the table; 0 if it wrote no such table."""
        return self.tables[table].rows or 0 if table in self.tables else 0


@dataclass(frozen=True)
class Attempt:
    """Where a stage works. Picklable: workers receive it and write shards. All names in it are deterministic."""

    folder: Location
    stage_folder: Location
    key: str
    identity: Mapping[str, Any]
    opened: float = field(default_factory=time.monotonic, compare=False)  # in the driver

    @property
    def seed(self) -> int:
        return int(self.identity["seed"])

    def write_table(self, name: str, table: pa.Table) -> str:
        """Writes `<name>.parquet`; returns that, for `outputs`."""
        path = f"{name}.parquet"
        (self.folder / path).write_table(portable(table, _root(self.stage_folder)))
        return path

    def write_json(self, path: str, obj: Any) -> str:
        (self.folder / path).write_json(portable_json(obj, _root(self.stage_folder)))
        return path

    def plan(self, num_rows: int, shard_rows: int) -> int:
        """Number of shards when `num_rows` rows are cut into shards of `shard_rows`.

        Call it before `shard`: markers of an earlier run that cut the rows otherwise (the recipe's `shard_rows` was
        changed in between) name other rows by the same index, so they are forgotten here.
        """
        note = self.folder / f"{SHARDS_NAME}/plan.json"
        plan = {"num_rows": num_rows, "shard_rows": shard_rows}
        try:
            is_same = note.read_json() == plan
        except (FileNotFoundError, ValueError):
            is_same = False
        if not is_same:
            (self.folder / SHARDS_NAME).delete()
            note.write_json(plan)
        return -(-num_rows // shard_rows)

    def shard(self, index: int) -> ShardRecord | None:
        """The finished shard, or None if its marker or one of its tables is missing or damaged."""
        try:
            body = self._marker(index).read_json()
            tables = {name: Output(**output) for name, output in body["tables"].items()}
            record = ShardRecord(int(body["index"]), int(body["rows_in"]), float(body["seconds"]), tables)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            _LOG.warning("%s is damaged; the shard is computed again", self._marker(index))
            return None
        if record.index == index and all(self._is_whole(output) for output in tables.values()):
            return record
        return None

    def write_shard(self, index: int, tables: Mapping[str, pa.Table], *, rows_in: int, seconds: float) -> ShardRecord:
        """Writes `<table>/part-<index>.parquet` for each table, then the marker that makes the shard count."""
        outputs = {}
        for name in sorted(tables):
            file = self.folder / f"{name}/part-{index:05d}.parquet"
            data = memoryview(format_table(portable(tables[name], _root(self.stage_folder)), str(file)))
            file.write_bytes(data)
            outputs[name] = Output(f"{name}/{file.name}", len(data), sha256_of(data), tables[name].num_rows)
        fault_point("tables")
        record = ShardRecord(index, rows_in, round(seconds, 6), outputs)
        self._marker(index).write_json(asdict(record))
        fault_point("shard")
        fault_point(f"shard-{index:05d}")
        return record

    def finish(
        self,
        *,
        rows_in: int,
        rows_out: int,
        quarantined: int = 0,
        max_bad_fraction: float = 1.0,
        outputs: Sequence[str] = (),
        num_shards: int = 0,
        scratch: Sequence[str] = (),
        summary: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> Commit:
        """Commits the attempt and returns the commit; the one that is there if another driver was faster.

        `outputs`: relative files or folders that the stage wrote itself. Tables of shards 0..num_shards-1 come from
        their markers. `scratch`: folders that nobody needs once it is committed. `seconds`: by default since the
        attempt was opened. Raises `UserError` if more than `max_bad_fraction` of the rows are quarantined.
        """
        assert rows_in == rows_out + quarantined, f"{rows_in} rows in, but {rows_out} out + {quarantined} quarantined"
        shards = [self._finished(index) for index in range(num_shards)]
        found = {output.path: output for output in outputs_below(self.folder, outputs)}
        found |= {output.path: output for record in shards for output in record.tables.values()}
        listed = tuple(found[path] for path in sorted(found))
        if rows_in and quarantined / rows_in > max_bad_fraction:
            self._reject(listed, shards, quarantined, rows_in, max_bad_fraction)
        commit = Commit(
            stage=self.identity["stage"],
            name=self.identity["name"],
            key=self.key,
            folder=self.folder,
            identity=self.identity,
            seed=self.seed,
            rows_in=rows_in,
            rows_out=rows_out,
            quarantined=quarantined,
            seconds=round(time.monotonic() - self.opened if seconds is None else seconds, 3),
            summary=json.loads(canonical_json(dict(summary or {}))),  # what a later run will read, already now
            outputs=listed,
            code=code_version(),
            created=_after_others(self.stage_folder).isoformat(timespec="milliseconds"),
        )
        if scratch:
            (self.folder / SCRATCH_NAME).write_json(list(map(safe_relative, scratch)))
        if self.folder.is_local:
            remove_temporary_files(self.folder.uri)  # of workers that died
        fault_point("hashed")
        is_first = write_commit(self.stage_folder, commit)
        if is_first:
            fault_point("commit")
        clear_scratch(self.folder)
        return commit if is_first else self._agree(commit)

    def _finished(self, index: int) -> ShardRecord:
        record = self.shard(index)
        if record is None:
            raise FileNotFoundError(f"shard {index} of {self.folder} is not finished; run the same command again")
        return record

    def _agree(self, mine: Commit) -> Commit:
        """What a loser of the race to commit does: nothing, if the winner has the same outputs."""
        theirs = read_commit(self.stage_folder)
        if theirs is not None and theirs.key == mine.key and theirs.content == mine.content:
            return theirs
        raise UserError(
            f"{mine.stage}/{mine.name}: another process committed it in {self.stage_folder}, with other outputs than "
            f"those in {self.folder}",
            cure="run the same command again to go on from that commit, which stays as it is",
        )

    def _reject(
        self, outputs: Sequence[Output], shards: Sequence[ShardRecord], quarantined: int, rows_in: int, limit: float
    ) -> NoReturn:
        """Too many bad rows: says why, and opens the shards that have some, so that mended files are read again."""
        paths = table_paths(outputs, QUARANTINE)
        reasons = [row for path in paths for row in (self.folder / path).read_table().to_pylist()]
        counts = Counter(str(row.get("reason")) for row in reasons)
        by_reason = printable(", ".join(f"{count} {reason}" for reason, count in counts.most_common()))
        one_each = list({row.get("reason"): row for row in reversed(reasons)}.values())[::-1]
        shown = [*one_each, *(row for row in reasons if row not in one_each)][: max(5, len(one_each))]
        texts = (f"{row.get('uri')}: {row.get('reason')} {row.get('detail') or ''}" for row in shown)
        first = "".join(f"\n  {printable(text).strip()}" for text in texts)
        for record in shards:
            if record.rows(QUARANTINE):
                self._marker(record.index).delete()
        share = quarantined / rows_in
        stage, name = self.identity["stage"], self.identity["name"]
        raise TooManyBad(
            f"{stage}/{name}: {quarantined} of {rows_in} frames ({share:.1%}) are bad, "
            f"max_bad_fraction allows {limit:.1%} ({by_reason or 'no reasons were noted'}){first}",
            cure=f"{_cure_of_bad(share)}; then run the same command again",
            shards=Shards(self, tuple(shards)),
        )

    def _marker(self, index: int) -> Location:
        return self.folder / f"{SHARDS_NAME}/{index:05d}.json"

    def _is_whole(self, output: Output) -> bool:
        """The table is the one that was written: size, sha256, rows."""
        try:
            return describe(self.folder, output.path) == output
        except (FileNotFoundError, UserError) as error:
            _LOG.warning("%s; the shard is computed again", error)
        return False


def _after_others(stage_folder: Location) -> datetime:
    """Now, or later: after the commits of the stage's other keys, so that the newest is the newest whatever clocks
    say."""
    folder, newest = stage_folder.parent, datetime.now(UTC)
    for entry in folder.list():
        with suppress(UserError, ValueError):  # not of this nightseg
            if entry.is_folder and (commit := read_commit(folder / entry.name)) is not None:
                newest = max(newest, datetime.fromisoformat(commit.created) + timedelta(milliseconds=1))
    return newest


def clear_scratch(attempt: Location) -> None:
    """Removes the scratch folders of an attempt that is committed; the note that lists them goes last."""
    note = attempt / SCRATCH_NAME
    try:
        names = note.read_json()
    except (FileNotFoundError, ValueError):
        return
    for name in names:
        (attempt / name).delete()
    note.delete()


@dataclass(frozen=True)
class Shards:
    """All shards of a pass, in order. More than `max_bad_fraction` quarantined rows, and it is not committed."""

    attempt: Attempt
    records: tuple[ShardRecord, ...]
    max_bad_fraction: float = 1.0

    def count(self, table: str) -> int:
        """Rows of the table in all shards."""
        return sum(record.rows(table) for record in self.records)

    def parts(self, table: str) -> Iterator[pa.Table]:
        """The table shard by shard, read as it is asked for."""
        for record in self.records:
            if table in record.tables:
                part = (self.attempt.folder / record.tables[table].path).read_table()
                yield absolute(part, _root(self.attempt.stage_folder))

    def has_table(self, name: str) -> bool:
        return any(name in record.tables for record in self.records)

    def table(self, name: str) -> pa.Table:
        """The whole table; KeyError if there is no shard that has it."""
        parts = list(self.parts(name))
        if not parts:
            raise KeyError(f"{self.attempt.folder}: no shard has a table {name!r}")
        return pa.concat_tables(parts, promote_options="default")

    def finish(
        self,
        table: str,
        *,
        outputs: Sequence[str] = (),
        scratch: Sequence[str] = (),
        summary: Mapping[str, Any] | None = None,
        is_whole: bool = True,
    ) -> Commit:
        """Commits a pass that put every row of its input into `table` or into the quarantine.

        `is_whole` False: so much is missing that a single bad frame is too much.
        """
        return self.attempt.finish(
            rows_in=sum(record.rows_in for record in self.records),
            rows_out=self.count(table),
            quarantined=self.count(QUARANTINE),
            max_bad_fraction=self.max_bad_fraction if is_whole else 0.0,
            outputs=outputs,
            num_shards=len(self.records),
            scratch=scratch,
            summary=summary,
        )


def _cure_of_bad(share: float) -> str:
    if share > _MOST_ACCIDENTS:
        return "mend what these lines say, so many are no accident"
    return f"repair or remove these files, or set max_bad_fraction to {math.ceil(share * 1000) / 1000} or more"


class TooManyBad(UserError):  # noqa: N818 (a state of the data)
    """More bad rows than are allowed. What was found about the others is in `shards`."""

    def __init__(self, what: str, *, cure: str, shards: Shards) -> None:
        super().__init__(what, cure=cure)
        self.shards = shards


# -- the run folder --------------------------------------------------------------------------------------------------


class Workspace:
    """A run folder. `borrow` names other run folders whose commits of the same stage, name and key are used as well."""

    def __init__(self, root: Location | str | Path, borrow: Sequence[Location | str | Path] = ()) -> None:
        self.root = Location.of(root)
        self.borrow = tuple(Location.of(folder) for folder in borrow)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the one driver that works here; raises `WorkspaceBusy`, naming the holder, when another has it.

        What drivers that were killed here have left behind is removed.
        """
        with hold(self.root):
            self._clear_up()
            remove_abandoned()
            yield

    def holder(self) -> str | None:
        """Who has the lock now: process, host, since when, command. None if nobody has. Takes no lock itself."""
        return holder(self.root)

    def stage(
        self, stage: str, name: str, *, version: int, recipe: Mapping[str, Any], inputs: Mapping[str, str], seed: int
    ) -> Stage:
        """One node of the graph. `recipe` is its part of the recipe, `inputs` the `content` of each commit it reads."""
        identity = {"stage": stage, "name": name, "version": version, "recipe": recipe, "inputs": inputs, "seed": seed}
        return Stage(self, json.loads(json.dumps(identity, default=dict, allow_nan=False)))

    def commits(self) -> list[Commit]:
        """All valid commits of this run folder (borrowed ones not included), in the order they were made."""
        found = []
        for folder in self.stage_folders():
            try:
                commit = read_commit(folder)
                if commit is not None:
                    check_outputs(commit)
                    found.append(commit)
            except DamagedCommit as error:
                _LOG.warning("%s", error)
        return sorted(found, key=lambda commit: (commit.created, commit.stage, commit.name))

    def stage_folders(self) -> list[Location]:
        """The folders of all stages and keys, those without a commit, too."""
        return self._key_folders(self.root / "stages", depth=3)

    def _clear_up(self) -> None:
        committed = set()
        for folder in self.stage_folders():
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # no commit, or one that was cut short
                attempt = folder / json.loads((folder / COMMIT_NAME).read_bytes())["attempt"]
                clear_scratch(attempt)
                committed.add(attempt.uri)  # nothing was being written there
        if self.root.is_local:
            remove_temporary_files(self.root.uri, lambda path: path not in committed)

    def _key_folders(self, place: Location, depth: int) -> list[Location]:
        children = [place / entry.name for entry in _listed(place) if entry.is_folder]
        return children if depth == 1 else [deep for child in children for deep in self._key_folders(child, depth - 1)]


class Stage:
    """A stage with all that its result follows from: `identity`, and `key`, its hash (hex)."""

    def __init__(self, workspace: Workspace, identity: dict[str, Any]) -> None:
        self.identity = identity
        self.stage: str = identity["stage"]
        self.name: str = identity["name"]
        for part in (self.stage, self.name):
            if "/" in safe_relative(part):
                raise UserError(f"stage {part!r}: its name holds a slash", cure="use letters, digits, - and _")
        self.key = hash_of(identity)
        self._workspace = workspace
        self.folder = workspace.root / self._path(self.key)

    def _path(self, key: str) -> str:
        return f"stages/{self.stage}/{self.name}/{key[:_KEY_LETTERS]}"

    def commit(self, *, check: Callable[[Commit], None] = check_outputs) -> Commit | None:
        """The commit with this key, here or in a borrowed run folder; None if there is none.

        `DamagedCommit` if `check` (the sizes; `check_contents`: all) finds it damaged. A damaged borrowed commit is
        passed over: this run cannot mend it, but it can compute its own.
        """
        for root in (self._workspace.root, *self._workspace.borrow):
            commit = read_commit(root / self._path(self.key))
            if commit is None or commit.key != self.key:
                continue
            try:
                check(commit)
            except DamagedCommit as error:
                if root == self._workspace.root:
                    raise
                _LOG.warning("not borrowed: %s", error)
            else:
                return commit
        return None

    def nearest(self) -> dict[str, Any] | None:
        """Identity of the commit of the same stage and name that differs least: shows why this one is not done yet."""
        folders = self._workspace._key_folders(self.folder.parent, depth=1)
        others = [commit for commit in map(read_commit, folders) if commit is not None and commit.key != self.key]
        newest_first = sorted(others, key=lambda commit: commit.created, reverse=True)
        closest = min(newest_first, key=lambda commit: _differences(self.identity, commit.identity), default=None)
        return dict(closest.identity) if closest else None

    def is_open(self) -> bool:
        """True if `open` would go on with an attempt that an earlier run began."""
        return self._open_attempt() is not None

    def open(self) -> Attempt:
        """The attempt to work in: the newest open one of this key with its finished shards, or a new one."""
        attempt = self._open_attempt()
        if attempt is None:
            attempt = self._new_attempt()
            attempt.folder.make_folder()
            (attempt.folder / ATTEMPT_NAME).write_json(
                {"key": self.key, "identity": self.identity, "host": socket.gethostname(), "pid": os.getpid()}
            )
            fault_point("attempt")
        return attempt

    def _open_attempt(self) -> Attempt | None:
        numbers = self._numbers()
        newest = self._attempt(max(numbers)) if numbers else None
        committed = read_commit(self.folder)
        if newest is None or (committed is not None and committed.folder.name == newest.folder.name):
            return None
        try:
            key = (newest.folder / ATTEMPT_NAME).read_json()["key"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None  # cut short: it is left alone
        return newest if key == self.key else None

    def _new_attempt(self) -> Attempt:
        """One that nobody has begun: a folder may be there already, as its maker was killed before it wrote a note."""
        newest = self._attempt(max(self._numbers(), default=1))
        return newest if not _listed(newest.folder) else self._attempt(max(self._numbers()) + 1)

    def _attempt(self, number: int) -> Attempt:
        return Attempt(self.folder / f"attempt-{number}", self.folder, self.key, self.identity)

    def _numbers(self) -> list[int]:
        entries = (entry.name for entry in _listed(self.folder) if entry.is_folder)
        matches = (re.fullmatch(r"attempt-([1-9]\d*)", name) for name in entries)
        return [int(match[1]) for match in matches if match]


def _differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """Number of leaves in which two identities differ."""
    count = 0
    for key in mine.keys() | other.keys():
        left, right = mine.get(key), other.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            count += _differences(left, right)
        else:
            count += left != right
    return count
