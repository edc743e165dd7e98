"""The run folder and its stages: which of them is done, and where it is worked on.

What a killed driver leaves behind is removed by the next one that takes the lock of the run folder: files that were
being written, and what an attempt needed only until it was committed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nightseg.errors import UserError
from nightseg.storage.attempts import Attempt, clear_scratch
from nightseg.storage.commits import COMMIT_NAME, Commit, DamagedCommit, check_outputs, listed, read_commit
from nightseg.storage.lock import hold, holder
from nightseg.storage.paths import Location, fault_point, hash_of, remove_temporary_files, safe_relative
from nightseg.storage.scratch import remove_abandoned

ATTEMPT_NAME = "attempt.json"
_KEY_LETTERS = 12  # of the key in the folder's name; the whole key is compared when reading
_LOG = logging.getLogger("nightseg.storage")


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
        children = [place / entry.name for entry in listed(place) if entry.is_folder]
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
        return newest if not listed(newest.folder) else self._attempt(max(self._numbers()) + 1)

    def _attempt(self, number: int) -> Attempt:
        return Attempt(self.folder / f"attempt-{number}", self.folder, self.key, self.identity)

    def _numbers(self) -> list[int]:
        entries = (entry.name for entry in listed(self.folder) if entry.is_folder)
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
