"""Neither clocks nor names of hosts decide anything: they jump by hours, and two machines may be called the same."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from nightseg.storage import Attempt, Commit, Stage, Workspace, check_contents
from nightseg.storage import commits as storage_commits
from nightseg.storage.lock import HOLDER_NAME, LOCK_NAME, WorkspaceBusy
from tests.programs import started

HOURS = [-7, 7]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets all clocks that tell the time of day this many hours off."""
    true = time.time

    def set_off(hours: float) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
                return datetime.fromtimestamp(true() + 3600 * hours, tz)

        monkeypatch.setattr(storage_commits, "datetime", Clock)
        monkeypatch.setattr("nightseg.storage.lock.datetime", Clock)
        monkeypatch.setattr(time, "time", lambda: true() + 3600 * hours)

    return set_off


def stage_of(workspace: Workspace, margin: float = 0.2) -> Stage:
    return workspace.stage("split", "pool", version=1, recipe={"margin": margin}, inputs={}, seed=0)


def shard(attempt: Attempt, index: int) -> None:
    attempt.write_shard(index, {"frames": pa.table({"x": [index, index]})}, rows_in=2, seconds=0.0)


def commit_of(attempt: Attempt) -> Commit:
    return attempt.finish(rows_in=6, rows_out=6, num_shards=3)


@pytest.mark.parametrize("hours", HOURS)
def test_the_newest_commit_is_the_one_that_was_made_last(tmp_path: Path, clock: Any, hours: float) -> None:
    workspace, made = Workspace(tmp_path), []
    for margin, off in ((0.1, 0), (0.2, hours), (0.3, -hours), (0.4, 2 * hours)):
        clock(off)
        attempt = stage_of(workspace, margin).open()
        attempt.plan(6, 2)
        for index in range(3):
            shard(attempt, index)
        made.append(commit_of(attempt))
    assert [commit.key for commit in workspace.commits()] == [commit.key for commit in made]
    nearest = stage_of(workspace, 0.5).nearest()  # all differ alike: the last one is meant
    assert nearest is not None and nearest["recipe"]["margin"] == 0.4


@pytest.mark.parametrize("hours", HOURS)
def test_an_attempt_goes_on_after_a_jump_and_under_another_name(
    tmp_path: Path, clock: Any, monkeypatch: pytest.MonkeyPatch, hours: float
) -> None:
    workspace = Workspace(tmp_path)
    with workspace.lock():
        attempt = stage_of(workspace).open()
        attempt.plan(6, 2)
        shard(attempt, 0)
        shard(attempt, 1)
    clock(hours)
    monkeypatch.setattr(socket, "gethostname", lambda: "another")
    written: list[str] = []
    with workspace.lock():
        again = stage_of(workspace).open()
        assert again.folder == attempt.folder and again.plan(6, 2) == 3
        for index in range(3):
            if again.shard(index) is None:
                shard(again, index)
                written.append(str(index))
        commit = commit_of(again)
    assert written == ["2"] and commit.seconds >= 0
    clock(-hours)
    found = stage_of(workspace).commit(check=check_contents)
    assert found is not None and found.content == commit.content
    assert found.table("frames")["x"].to_pylist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("hours", HOURS)
def test_what_is_remembered_of_contents_does_not_hide_a_change(tmp_path: Path, clock: Any, hours: float) -> None:
    workspace = Workspace(tmp_path)
    attempt = stage_of(workspace).open()
    attempt.plan(6, 2)
    for index in range(3):
        shard(attempt, index)
    commit = commit_of(attempt)
    assert stage_of(workspace).commit(check=check_contents) is not None
    file = commit.folder.local / "frames/part-00001.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    clock(hours)
    file.write_bytes(data)
    moved = (datetime.now(UTC) + timedelta(hours=hours)).timestamp()
    os.utime(file, (moved, moved))  # as the jumped clock of the file's server would have it
    with pytest.raises(storage_commits.DamagedCommit):
        stage_of(workspace).commit(check=check_contents)


HOLDER = """
import socket, sys, time
socket.gethostname = lambda: sys.argv[2]
from nightseg.storage import Workspace
with Workspace(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("host", ["another", socket.gethostname()], ids=["another host", "the same name"])
@pytest.mark.parametrize("hours", HOURS)
def test_a_lock_is_as_old_as_its_holder_lives(tmp_path: Path, clock: Any, host: str, hours: float) -> None:
    """Whatever the note beside it says of host, process and time: a living holder is respected, a dead one is not."""
    with started([sys.executable, "-c", HOLDER, str(tmp_path), host], stdout=subprocess.PIPE, text=True) as holding:
        try:
            assert holding.stdout is not None and holding.stdout.readline() == "held\n"
            clock(hours)
            with pytest.raises(WorkspaceBusy, match=host), Workspace(tmp_path).lock():
                pass
            assert host in str(Workspace(tmp_path).holder())
        finally:
            holding.send_signal(signal.SIGKILL)
    note = json.loads((tmp_path / HOLDER_NAME).read_text())
    (tmp_path / HOLDER_NAME).write_text(json.dumps(note | {"pid": os.getpid()}))  # a number that lives here
    assert (tmp_path / LOCK_NAME).exists() and Workspace(tmp_path).holder() is None
    with Workspace(tmp_path).lock():
        assert json.loads((tmp_path / HOLDER_NAME).read_text())["host"] == socket.gethostname()
