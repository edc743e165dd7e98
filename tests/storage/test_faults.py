"""Kills and crashes at every point of the commit protocol: a rerun ends with the same result, and no reader ever sees
half a stage."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from nightseg.storage import Commit, Stage, UserError, Workspace, commits, paths
from nightseg.storage.commits import Attempt

# Two stages, the second built on the first, as a run does it. Returns how many shards it wrote, and the content hashes.
DRIVER = """
import pyarrow as pa
from nightseg.storage import Workspace

def table(seed, index, shift):
    return pa.table({"frame_id": [f"{index}/ä {row}" for row in range(3)], "value": [seed * index + shift] * 3})

def work(stage, shift, written):
    attempt = stage.open()
    for index in range(attempt.plan(9, 3)):
        if attempt.shard(index) is None:
            (attempt.folder / f"images/{index} ü.png").write_bytes(bytes([index, shift % 256]))
            attempt.write_shard(index, {"frames": table(attempt.seed, index, shift)}, rows_in=3, seconds=0.1)
            written.append(index)
    (attempt.folder / "model/model.bin").write_bytes(b"weights" * 1000)
    (attempt.folder / "summary.json").write_json({"shift": shift})
    return attempt.finish(rows_in=9, rows_out=9, outputs=["model", "summary.json"], num_shards=3)

def run(root):
    written = []
    workspace = Workspace(root)
    with workspace.lock():
        first = workspace.stage("collect", "käse 1", version=1, recipe={"a": 1}, inputs={}, seed=3)
        pool = first.commit() or work(first, 1, written)
        second = workspace.stage("score", "pool", version=1, recipe={}, inputs={"pool": pool.content}, seed=4)
        score = second.commit() or work(second, int(pool.content[:4], 16), written)
        return len(written), [pool.content, score.content]
"""

POINTS = [
    "attempt",
    "tables",
    "shard",
    "shard-00001",
    "hashed",
    "commit",
    "temporary-.nightseg-holder.json",
    "temporary-attempt.json",
    "temporary-plan.json",
    "temporary-2 ü.png",
    "temporary-part-00002.parquet",
    "temporary-00001.json",
    "temporary-model.bin",
    "temporary-summary.json",
    "temporary-_COMMITTED.json",
]


def drive(root: Path) -> tuple[int, list[str]]:
    place: dict[str, Any] = {}
    exec(DRIVER, place)
    written, contents = place["run"](str(root))
    return written, contents


def is_killed(root: Path, fault: str) -> bool:
    """Drives in another process, which kills itself at the fault point if it gets there."""
    command = [sys.executable, "-c", f"{DRIVER}\nimport sys\nrun(sys.argv[1])", str(root)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"NIGHTSEG_FAULT": f"after:{fault}"}
    )
    assert done.returncode in (0, -9), done.stderr
    return done.returncode == -9


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    written, contents = drive(tmp_path_factory.mktemp("undisturbed") / "run")
    assert written == 6
    return contents


@pytest.mark.parametrize("point", POINTS)
def test_a_rerun_after_a_kill_ends_the_same(tmp_path: Path, undisturbed: list[str], point: str) -> None:
    root = tmp_path / "lauf 1 ü"
    assert is_killed(root, point)
    for commit in Workspace(root).commits():
        assert commit.verify() == []
        assert commit.content in undisturbed
    assert drive(root)[1] == undisturbed
    assert [commit.verify() for commit in Workspace(root).commits()] == [[], []]
    assert drive(root) == (0, undisturbed)
    assert len(list(root.rglob("attempt-*"))) == 2 + (point == "temporary-attempt.json")


def test_kills_without_end_still_get_there(tmp_path: Path, undisturbed: list[str]) -> None:
    """Every driver dies right after its first new shard, or after its commit; each one still leaves something done."""
    num_kills = 0
    while is_killed(tmp_path / "run", "shard" if num_kills % 4 < 3 else "commit"):
        num_kills += 1
    assert num_kills == 8
    assert drive(tmp_path / "run") == (0, undisturbed)


def test_a_kill_costs_only_open_shards(tmp_path: Path) -> None:
    assert is_killed(tmp_path / "run", "shard-00001")
    assert drive(tmp_path / "run")[0] == 4


# -- two drivers that crash, damage and race in any order --------------------------------------------------------------


class Crash(BaseException):
    """The process is gone: no `except Exception` of the code under test may catch it."""


@contextmanager
def crash_after(num_points: int) -> Iterator[None]:
    """Raises `Crash` at the given fault point passed from here on (0 = never)."""
    passed = 0

    def point(name: str) -> None:
        nonlocal passed
        passed += 1
        if passed == num_points:
            raise Crash(name)

    with pytest.MonkeyPatch.context() as patch:
        for module in (paths, commits):
            patch.setattr(module, "fault_point", point)
        try:
            yield
        except Crash:
            return


NUM_SHARDS = 2
CRASH = st.just(0) | st.integers(1, 12)  # half of the steps run to their end
DAMAGED = ("_shards/00000.json", "frames/part-00001.parquet")


class CommitProtocol(RuleBasedStateMachine):
    """Drivers that each hold an attempt, and a reader who looks after every step."""

    drivers = Bundle("drivers")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.published: Commit | None = None

    def stage(self) -> Stage:
        return Workspace(self.folder.name).stage("score", "pool", version=1, recipe={}, inputs={}, seed=0)

    @rule(target=drivers, crash=CRASH)
    def open(self, crash: int) -> Attempt:
        attempts = []
        with crash_after(crash):
            attempts.append(self.stage().open())
        return attempts[0] if attempts else self.stage().open()

    @rule(driver=drivers, indices=st.sampled_from([[0], [1], [0, 1]]), crash=CRASH)
    def write(self, driver: Attempt, indices: list[int], crash: int) -> None:
        with crash_after(crash):
            for index in indices:
                if driver.shard(index) is None:
                    driver.write_shard(index, {"frames": pa.table({"x": [index] * 3})}, rows_in=3, seconds=0.0)

    @rule(driver=drivers, crash=CRASH)
    def finish(self, driver: Attempt, crash: int) -> None:
        all_there = all(driver.shard(index) for index in range(NUM_SHARDS))
        with crash_after(crash):
            try:
                driver.finish(rows_in=3 * NUM_SHARDS, rows_out=3 * NUM_SHARDS, num_shards=NUM_SHARDS)
            except FileNotFoundError:
                assert not all_there

    @rule(driver=drivers, crash=CRASH)
    @precondition(lambda self: self.published is not None)
    def finish_with_another_result(self, driver: Attempt, crash: int) -> None:
        with crash_after(crash), pytest.raises((UserError, Crash)):
            (driver.folder / "other.json").write_json({})
            driver.finish(rows_in=0, rows_out=0, outputs=["other.json"])
            raise AssertionError("two results were committed under one key")

    @rule(driver=drivers, path=st.sampled_from(DAMAGED), keep=st.integers(0, 99))
    @precondition(lambda self: self.published is None)
    def damage(self, driver: Attempt, path: str, keep: int) -> None:
        place = driver.folder / path
        if place.exists():
            place.local.write_bytes(place.read_bytes()[:keep])

    @rule(keep=st.integers(0, 99))
    @precondition(lambda self: self.published is None)
    def leave_half_a_commit(self, keep: int) -> None:
        """What a store without atomic writes may leave behind."""
        folder = self.stage().folder
        folder.make_folder()
        (folder / "_COMMITTED.json").local.write_bytes(b'{"schema": 1, "stage": "score"'.ljust(100)[:keep])

    @invariant()
    def a_reader_sees_all_or_nothing(self) -> None:
        seen = self.stage().commit()
        if self.published is not None:
            assert seen == self.published, "a commit changed"
        if seen is not None:
            self.published = seen
            assert seen.verify() == []
            assert seen.table("frames").to_pydict() == {"x": [0] * 3 + [1] * 3}

    def teardown(self) -> None:
        self.folder.cleanup()


def test_the_commit_protocol_survives_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_sync: Callable[[int], None] = lambda handle: None  # noqa: E731 (durability is not what this test is about)
    monkeypatch.setattr("os.fsync", skip_sync)
    run_state_machine_as_test(
        CommitProtocol, settings=settings(max_examples=60, stateful_step_count=25, deadline=None, derandomize=True)
    )
