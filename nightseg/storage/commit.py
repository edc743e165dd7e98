"""A committed stage as its readers see it: counts, outputs with their hashes, and nothing that is not listed.

`_COMMITTED.json` lies in the folder of the stage's key and points at one attempt below it. Every path in it is
relative to where it was found, so a run folder can be moved or copied.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from nightseg.errors import UserError
from nightseg.storage.paths import Location, hash_of, safe_relative
from nightseg.storage.tables import table_rows

COMMIT_NAME = "_COMMITTED.json"
SCHEMA = 1
_LOG = logging.getLogger("nightseg.storage")
_CHUNK = 1 << 23  # bytes read at a time when hashing


class DamagedCommit(UserError):  # noqa: N818 (what is the case, not what went wrong)
    """Outputs of a commit are missing or have another size than when they were committed."""


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
        return content_of(self.outputs)

    def file(self, path: str) -> Location:
        """A listed output; raises KeyError for anything else, even if such a file lies in the folder."""
        if not self.has(path):
            raise KeyError(f"{self.stage}/{self.name} committed no {path!r}; it has {[o.path for o in self.outputs]}")
        return self.folder / path

    def has(self, path: str) -> bool:
        return any(output.path == path for output in self.outputs)

    def table(self, name: str) -> pa.Table:
        """`<name>.parquet`, or the shards `<name>/part-*.parquet` in order as one table; KeyError if not committed."""
        paths = table_paths(self.outputs, name)
        if not paths:
            raise KeyError(f"{self.stage}/{self.name} committed no table {name!r}")
        tables = [(self.folder / path).read_table() for path in paths]
        return pa.concat_tables(tables, promote_options="default")  # a column that is all null in one shard fits any

    def json(self, path: str) -> Any:
        return self.file(path).read_json()

    def verify(self) -> list[str]:
        """Reads every output again; the paths of those whose content is not the committed one."""
        return [output.path for output in self.outputs if not _is_intact(self.folder, output)]


def table_paths(outputs: Iterable[Output], name: str) -> list[str]:
    """Paths of the files that make up a table, in row order."""
    paths = sorted(output.path for output in outputs)
    if f"{name}.parquet" in paths:
        return [f"{name}.parquet"]
    start = f"{name}/part-"
    # shorter first: part-100000 comes after part-99999
    parts = [path for path in paths if path.startswith(start) and path.endswith(".parquet") and path.count("/") == 1]
    return sorted(parts, key=lambda path: (len(path), path))


def content_of(outputs: Iterable[Output]) -> str:
    return hash_of(sorted([output.path, output.sha256] for output in outputs))


def describe(folder: Location, path: str) -> Output:
    """Size, hash and (for Parquet) rows of a file as it is now; FileNotFoundError when absent."""
    file = folder / path
    digest = hashlib.sha256()
    size = 0
    with file.open_input() as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
        rows = table_rows(stream, str(file)) if path.endswith(".parquet") else None
    return Output(safe_relative(path), size, digest.hexdigest(), rows)


def _is_intact(folder: Location, output: Output) -> bool:
    try:
        return describe(folder, output.path) == output
    except (FileNotFoundError, NotADirectoryError, UserError):
        return False


def write_commit(stage_folder: Location, commit: Commit) -> bool:
    """Publishes the commit. False if there is a readable one already; then nothing is changed."""
    body = asdict(commit) | {"schema": SCHEMA, "attempt": commit.folder.name, "content": commit.content}
    del body["folder"]
    place = stage_folder / COMMIT_NAME
    data = (json.dumps(body | {"sha256": hash_of(body)}, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()
    if place.create_bytes(data):
        return True
    if _read_body(place) is not None:
        return False
    place.write_bytes(data)  # what was there was cut short and never valid
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
        raise UserError(f"{stage_folder / COMMIT_NAME} was not written by nightseg ({error!r}); delete it") from error


def check_outputs(commit: Commit) -> None:
    """Raises `DamagedCommit` if an output is missing, has another size, or is a link that leads out of the folder."""
    problems = []
    sizes = _sizes(commit)
    for output in commit.outputs:
        size = sizes.get(output.path)
        if size is None:
            problems.append(f"{output.path} is missing")
        elif size != output.bytes:
            problems.append(f"{output.path} has {size} bytes instead of {output.bytes}")
        elif commit.folder.is_local and not _is_inside(commit.folder / output.path, commit.folder):
            problems.append(f"{output.path} is a link that leads out of the folder")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise DamagedCommit(
            f"the committed outputs of {commit.stage}/{commit.name} in {commit.folder} are damaged: "
            f"{'; '.join(problems[:3])}{more}. Restore them, or delete {commit.folder.parent} to compute them again"
        )


def _sizes(commit: Commit) -> dict[str, int]:
    """Bytes of the outputs that are there. One listing on a store, where every single look takes a round trip."""
    if not commit.folder.is_local:
        if not commit.outputs or not commit.folder.is_folder():
            return {}
        return {entry.name: entry.size for entry in commit.folder.list(recursive=True) if not entry.is_folder}
    sizes = {}
    for output in commit.outputs:
        with suppress(FileNotFoundError, NotADirectoryError):
            sizes[output.path] = (commit.folder / output.path).size()
    return sizes


def _is_inside(file: Location, folder: Location) -> bool:
    return Path(os.path.realpath(file.uri)).is_relative_to(os.path.realpath(folder.uri))


def _read_body(place: Location) -> dict[str, Any] | None:
    try:
        data = place.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        body = json.loads(data)
        seal = body.pop("sha256")
        schema = body["schema"]
    except (ValueError, KeyError, AttributeError, TypeError):
        _LOG.warning("%s was cut short; the stage counts as not committed", place)
        return None
    if schema != SCHEMA:
        raise UserError(
            f"{place} has schema {schema!r}, this nightseg reads schema {SCHEMA}: "
            "use the nightseg that wrote it (see 'code' in the file), or a new run folder"
        )
    if seal != hash_of(body):
        _LOG.warning("%s does not match its own hash; the stage counts as not committed", place)
        return None
    return dict(body)


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
