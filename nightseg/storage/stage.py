"""The run folder: which stage was done with which inputs, and the protocol that makes a crash harmless.

A stage works in an attempt folder, shard by shard; a shard counts once its marker is there. One atomic
`_COMMITTED.json` then makes the attempt the stage's result. The key of a stage is the hash of everything its result
follows from, so the same key means: done, skip. Readers go through the commit and never list folders.

    root/stages/<stage>/<name>/<key[:12]>/_COMMITTED.json
                                         /attempt-1/attempt.json, <outputs>, <table>/part-00000.parquet
                                                    _shards/00000.json
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from nightseg.errors import UserError
from nightseg.storage.attempt import Attempt
from nightseg.storage.commit import Commit, DamagedCommit, check_outputs, read_commit
from nightseg.storage.faults import fault_point
from nightseg.storage.lock import hold, holder
from nightseg.storage.paths import Location, hash_of, safe_relative

ATTEMPT_NAME = "attempt.json"
_KEY_LETTERS = 12  # of the key in the folder's name; the whole key is compared when reading
_LOG = logging.getLogger("nightseg.storage")


class Workspace:
    """A run folder. `borrow` names other run folders whose commits of the same stage, name and key are used as well."""

    def __init__(self, root: Location | str | Path, borrow: Sequence[Location | str | Path] = ()) -> None:
        self.root = Location.of(root)
        self.borrow = tuple(Location.of(folder) for folder in borrow)

    def lock(self) -> AbstractContextManager[None]:
        """Held by the one driver that works here; raises `WorkspaceBusy`, naming the holder, when another has it."""
        return hold(self.root)

    def holder(self) -> str | None:
        """Who has the lock now: process, host, since when, command. None if nobody has. Takes no lock itself."""
        return holder(self.root)

    def stage(
        self, stage: str, name: str, *, version: int, recipe: Mapping[str, Any], inputs: Mapping[str, str], seed: int
    ) -> Stage:
        """One node of the graph. `recipe` is its part of the recipe, `inputs` the `content` of each commit it reads."""
        identity = {
            "stage": stage,
            "name": name,
            "version": version,
            "recipe": recipe,
            "inputs": dict(inputs),
            "seed": seed,
        }
        return Stage(self, json.loads(json.dumps(identity, default=dict, allow_nan=False)))

    def commits(self) -> list[Commit]:
        """All valid commits of this run folder (borrowed ones not included), in the order they were made."""
        found = []
        for folder in self._key_folders(self.root / "stages", depth=3):
            try:
                commit = read_commit(folder)
                if commit is not None:
                    check_outputs(commit)
                    found.append(commit)
            except DamagedCommit as error:
                _LOG.warning("%s", error)
        return sorted(found, key=lambda commit: (commit.created, commit.stage, commit.name))

    def _key_folders(self, place: Location, depth: int) -> list[Location]:
        if not place.is_folder():
            return []
        children = [place / entry.name for entry in place.list() if entry.is_folder]
        return children if depth == 1 else [deep for child in children for deep in self._key_folders(child, depth - 1)]


class Stage:
    """A stage with all that its result follows from: `identity`, and `key`, its hash (hex)."""

    def __init__(self, workspace: Workspace, identity: dict[str, Any]) -> None:
        self.identity = identity
        self.stage: str = identity["stage"]
        self.name: str = identity["name"]
        for part in (self.stage, self.name):
            if "/" in safe_relative(part):
                raise UserError(f"a stage's name cannot hold a slash: {part!r}")
        self.key = hash_of(identity)
        self._workspace = workspace
        self.folder = workspace.root / self._path(self.key)

    def _path(self, key: str) -> str:
        return f"stages/{self.stage}/{self.name}/{key[:_KEY_LETTERS]}"

    def commit(self) -> Commit | None:
        """The commit with this key, here or in a borrowed run folder; None if there is none.

        The sizes of all outputs are checked; `DamagedCommit` if one is missing or differs. A damaged borrowed commit
        is passed over: this run cannot mend it, but it can compute its own.
        """
        own = self._commit_in(self._workspace.root)
        if own is not None:
            check_outputs(own)
            return own
        for root in self._workspace.borrow:
            borrowed = self._commit_in(root)
            try:
                if borrowed is not None:
                    check_outputs(borrowed)
                    return borrowed
            except DamagedCommit as error:
                _LOG.warning("not borrowed: %s", error)
        return None

    def _commit_in(self, root: Location) -> Commit | None:
        commit = read_commit(root / self._path(self.key))
        return commit if commit is not None and commit.key == self.key else None

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
            attempt = self._attempt(max(self._numbers(), default=0) + 1)
            attempt.folder.make_folder()
            (attempt.folder / ATTEMPT_NAME).write_json(
                {"key": self.key, "identity": self.identity, "host": socket.gethostname(), "pid": os.getpid()}
            )
            fault_point("attempt")
        return attempt

    def _open_attempt(self) -> Attempt | None:
        numbers = self._numbers()
        committed = read_commit(self.folder)
        if not numbers:
            return None
        newest = self._attempt(max(numbers))
        is_committed = committed is not None and committed.folder.name == newest.folder.name
        return newest if not is_committed and _attempt_key(newest.folder) == self.key else None

    def _attempt(self, number: int) -> Attempt:
        return Attempt(self.folder / f"attempt-{number}", self.folder, self.key, self.identity)

    def _numbers(self) -> list[int]:
        entries = self.folder.list() if self.folder.is_folder() else []
        matches = (re.fullmatch(r"attempt-([1-9]\d*)", entry.name) for entry in entries if entry.is_folder)
        return [int(match[1]) for match in matches if match]


def _attempt_key(folder: Location) -> str | None:
    """Key in the attempt's own note; None if it was cut short, then the attempt is left alone."""
    try:
        return str((folder / ATTEMPT_NAME).read_json()["key"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


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
