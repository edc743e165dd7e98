"""Attempts: where a stage works, shard by shard. A shard counts once its marker is there, a commit makes it a result.

What an attempt needed only until it was committed (`_scratch.json` lists it) is removed with the commit, or by the next
driver if this one is killed in between.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import pyarrow as pa

from nightseg.errors import UserError
from nightseg.progress import printable
from nightseg.storage.commits import (
    Commit,
    Output,
    after_others,
    code_version,
    describe,
    outputs_below,
    read_commit,
    run_root,
    table_paths,
    write_commit,
)
from nightseg.storage.paths import (
    Location,
    canonical_json,
    fault_point,
    remove_temporary_files,
    safe_relative,
    sha256_of,
)
from nightseg.storage.portable import absolute, portable, portable_json
from nightseg.storage.tables import format_table

SHARDS_NAME = "_shards"
SCRATCH_NAME = "_scratch.json"
QUARANTINE = "quarantine"
_MOST_ACCIDENTS = 0.3  # of the rows of a pass that are bad: more share one cause, and are not to be left out
_LOG = logging.getLogger("nightseg.storage")


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
        (self.folder / path).write_table(portable(table, run_root(self.stage_folder)))
        return path

    def write_json(self, path: str, obj: Any) -> str:
        (self.folder / path).write_json(portable_json(obj, run_root(self.stage_folder)))
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
            data = memoryview(format_table(portable(tables[name], run_root(self.stage_folder)), str(file)))
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
            created=after_others(self.stage_folder).isoformat(timespec="milliseconds"),
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
        reasons = told_reasons([row for path in paths for row in (self.folder / path).read_table().to_pylist()])
        for record in shards:
            if record.rows(QUARANTINE):
                self._marker(record.index).delete()
        share = quarantined / rows_in
        stage, name = self.identity["stage"], self.identity["name"]
        raise TooManyBad(
            f"{stage}/{name}: {quarantined} of {rows_in} frames ({share:.1%}) are bad, "
            f"max_bad_fraction allows {limit:.1%} {reasons}",
            cure=f"{cure_of_bad(share)}; then run the same command again",
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
                yield absolute(part, run_root(self.attempt.stage_folder))

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


def told_reasons(bad: Sequence[Mapping[str, Any]]) -> str:
    """Of rows of a quarantine table: how many there are of each reason, and the first files, a line each."""
    counts = Counter(str(row.get("reason")) for row in bad)
    by_reason = printable(", ".join(f"{count} {reason}" for reason, count in counts.most_common()))
    one_each = list({row.get("reason"): row for row in reversed(bad)}.values())[::-1]
    shown = [*one_each, *(row for row in bad if row not in one_each)][: max(5, len(one_each))]
    texts = (f"{row.get('uri')}: {row.get('reason')} {row.get('detail') or ''}" for row in shown)
    return f"({by_reason or 'no reasons were noted'})" + "".join(f"\n  {printable(text).strip()}" for text in texts)


def cure_of_bad(share: float) -> str:
    """What to do about this fraction of bad rows."""
    if share > _MOST_ACCIDENTS:
        return "mend what these lines say, so many are no accident"
    return f"repair or remove these files, or set max_bad_fraction to {math.ceil(share * 1000) / 1000} or more"


class TooManyBad(UserError):  # noqa: N818 (a state of the data)
    """More bad rows than are allowed. What was found about the others is in `shards`."""

    def __init__(self, what: str, *, cure: str, shards: Shards) -> None:
        super().__init__(what, cure=cure)
        self.shards = shards
