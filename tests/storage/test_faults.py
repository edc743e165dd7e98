"""Kills and crashes at every point of the commit protocol: a rerun ends with the same result, and no reader ever sees
half a stage."""

import logging
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from nightseg.storage import Commit, Location, Stage, UserError, Workspace
from nightseg.storage.attempts import SCRATCH_NAME, Attempt
from nightseg.storage.commits import DamagedCommit
from nightseg.storage.lock import HOLDER_NAME
from nightseg.storage.paths import TEMPORARY_PREFIX
from tests.crashing_disk import Crash, CrashingDisk, How
from tests.object_store import ObjectStore

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
    (attempt.folder / "drafts/deep/one.bin").write_bytes(b"needed until it is committed")
    (attempt.folder / "summary.json").write_json({"shift": shift})
    return attempt.finish(rows_in=9, rows_out=9, outputs=["model", "summary.json"], num_shards=3,
                          scratch=["drafts"])

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


def drive(root: Path | Location) -> tuple[int, list[str]]:
    place: dict[str, Any] = {}
    exec(DRIVER, place)
    written, contents = place["run"](str(root))
    return written, contents


def leftovers(root: Path) -> list[str]:
    """What nobody needs any more."""
    files = [file for file in root.rglob("*") if file.name.startswith((TEMPORARY_PREFIX, HOLDER_NAME, SCRATCH_NAME))]
    scratch = [commit.folder.local / "drafts" for commit in Workspace(root).commits()]
    return sorted(str(file) for file in [*files, *filter(Path.exists, scratch)])


def is_killed(root: Path | Location, fault: str) -> bool:
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


def dies_and_ends_the_same(root: Path | Location, point: str, undisturbed: list[str]) -> None:
    assert is_killed(root, point)
    for commit in Workspace(root).commits():
        assert commit.verify() == []
        assert commit.content in undisturbed
    assert drive(root)[1] == undisturbed
    assert [commit.verify() for commit in Workspace(root).commits()] == [[], []]
    assert drive(root) == (0, undisturbed)


@pytest.mark.parametrize("point", POINTS)
def test_a_rerun_after_a_kill_ends_the_same(tmp_path: Path, undisturbed: list[str], point: str) -> None:
    root = tmp_path / "lauf 1 ü"
    dies_and_ends_the_same(root, point, undisturbed)
    assert len(list(root.rglob("attempt-*"))) == 2
    assert leftovers(root) == []


@pytest.mark.parametrize(
    "point",
    ["shard", "commit", *(pytest.param(point, marks=pytest.mark.slow) for point in ("attempt", "tables", "hashed"))],
)
def test_a_rerun_after_a_kill_ends_the_same_on_an_object_store(
    s3: ObjectStore, undisturbed: list[str], point: str
) -> None:
    root = s3.place(secrets.token_hex(4)) / "lauf 1 ü"
    dies_and_ends_the_same(root, point, undisturbed)
    left = [entry.name for entry in root.list(recursive=True)]
    assert [name for name in left if SCRATCH_NAME in name or "drafts/deep" in name] == []
    assert len([name for name in left if name.rpartition("/")[2].startswith("attempt-")]) == 2


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


# -- a death within every single operation ---------------------------------------------------------------------------


def do_not_sync(handle: int) -> None:
    """A disk that forgets nothing is fast enough where forgetting is simulated."""


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["before", "within", "power"])
def test_a_rerun_after_a_death_within_any_operation_ends_the_same(
    tmp_path: Path, undisturbed: list[str], how: How, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before an operation is after the one before it. The rerun dies, too, some operations later."""
    monkeypatch.setattr("os.fsync", do_not_sync)
    with CrashingDisk(tmp_path / "undisturbed") as disk:
        drive(tmp_path / "undisturbed")
    names, chance = disk.operations, random.Random(1)
    assert {"open", "write", "fsync", "replace", "link", "unlink", "mkdir", "rmdir"} == set(names)
    places = [at for at, name in enumerate(names, 1) if how != "within" or name == "write"]
    for at in places[chance.randrange(step) :: step]:
        root = tmp_path / f"{how}-{at}"
        root.mkdir()
        for place in (at, chance.randint(1, 40)):
            with CrashingDisk(root, place, how) as disk:
                drive(root)
            assert disk.is_dead or place != at
            for commit in Workspace(root).commits():
                assert commit.verify() == [] and commit.content in undisturbed, (at, names[at - 1])
        assert drive(root)[1] == undisturbed, (at, names[at - 1])
        assert leftovers(root) == [], (at, names[at - 1])
        shutil.rmtree(root)


# -- drivers that crash, damage and race in any order ------------------------------------------------------------------

NUM_SHARDS = 2
CRASH = st.just(0) | st.integers(1, 30)  # half of the steps run to their end
HOW = st.sampled_from(["before", "within", "power"])
DAMAGED = ("_shards/00000.json", "frames/part-00001.parquet", "quarantine/part-00000.parquet")
CONTENT = {"frames": {"x": [0, 0, 1, 1]}, "quarantine": {"frame_id": ["bad 0", "bad 1"]}}


class CommitProtocol(RuleBasedStateMachine):
    """Drivers that each hold an attempt, and a reader who looks before every operation on the disk."""

    drivers = Bundle("drivers")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.published: Commit | None = None
        self.is_damaged = False

    def stage(self) -> Stage:
        return Workspace(self.folder.name).stage("score", "pool", version=1, recipe={}, inputs={}, seed=0)

    def disk(self, crash: int, how: How) -> CrashingDisk:
        return CrashingDisk(self.folder.name, crash, how, self.a_reader_sees_all_or_nothing)

    def fill(self, driver: Attempt, indices: list[int]) -> None:
        for index in indices:
            if driver.shard(index) is None:
                (driver.folder / f"drafts/{index}.bin").write_bytes(b"draft")
                tables = {
                    "frames": pa.table({"x": [index] * 2}),
                    "quarantine": pa.table({"frame_id": [f"bad {index}"]}),
                }
                driver.write_shard(index, tables, rows_in=3, seconds=0.0)

    def commit(self, driver: Attempt) -> Commit:
        return driver.finish(rows_in=6, rows_out=4, quarantined=2, num_shards=NUM_SHARDS, scratch=["drafts"])

    @rule(target=drivers, crash=CRASH, how=HOW)
    def open(self, crash: int, how: How) -> Attempt:
        attempts = []
        with self.disk(crash, how):
            attempts.append(self.stage().open())
        return attempts[0] if attempts else self.stage().open()

    @rule(driver=drivers, indices=st.sampled_from([[0], [1], [0, 1]]), crash=CRASH, how=HOW)
    def write(self, driver: Attempt, indices: list[int], crash: int, how: How) -> None:
        with self.disk(crash, how):
            self.fill(driver, indices)

    @rule(driver=drivers, crash=CRASH, how=HOW)
    def finish(self, driver: Attempt, crash: int, how: How) -> None:
        all_there = all(driver.shard(index) for index in range(NUM_SHARDS))
        with self.disk(crash, how):
            try:
                self.commit(driver)
            except FileNotFoundError:
                assert not all_there

    @rule(driver=drivers, crash=CRASH, how=HOW)
    @precondition(lambda self: self.published is not None and not self.is_damaged)
    def finish_with_another_result(self, driver: Attempt, crash: int, how: How) -> None:
        with self.disk(crash, how), pytest.raises((UserError, Crash)):
            (driver.folder / "other.json").write_json({})
            driver.finish(rows_in=0, rows_out=0, outputs=["other.json"])
            raise AssertionError("two results were committed under one key")

    @rule(driver=drivers, path=st.sampled_from(DAMAGED), keep=st.integers(0, 99))
    def damage(self, driver: Attempt, path: str, keep: int) -> None:
        place = driver.folder / path
        if place.exists():
            place.local.write_bytes(place.read_bytes()[:keep])
            self.is_damaged |= self.published is not None and not path.startswith("_shards")

    @rule(driver=drivers, keep=st.integers(0, 20))
    def damage_the_note(self, driver: Attempt, keep: int) -> None:
        place = driver.folder / "attempt.json"
        place.local.write_bytes(place.read_bytes()[:keep])

    @rule(keep=st.integers(0, 99))
    @precondition(lambda self: self.published is None)
    def leave_half_a_commit(self, keep: int) -> None:
        """What a store without atomic writes may leave behind."""
        folder = self.stage().folder
        folder.make_folder()
        (folder / "_COMMITTED.json").local.write_bytes(b'{"schema": 1, "stage": "score"'.ljust(100)[:keep])

    @rule(crash=CRASH, how=HOW)
    def run(self, crash: int, how: How) -> None:
        """What a whole driver does, alone; the next one that comes to its end leaves nothing of its predecessors."""
        for at in (crash, 0):
            with self.disk(at, how), Workspace(self.folder.name).lock():
                try:
                    done = self.stage().commit()
                except DamagedCommit:
                    done = None
                if done is None:
                    attempt = self.stage().open()
                    self.fill(attempt, list(range(NUM_SHARDS)))
                    self.commit(attempt)
        assert leftovers(Path(self.folder.name)) == []
        assert self.published is not None and not self.is_damaged

    @invariant()
    def a_reader_sees_all_or_nothing(self) -> None:
        try:
            seen = self.stage().commit()
        except DamagedCommit:
            assert self.is_damaged
            return
        if self.published is not None and not self.is_damaged:
            assert seen == self.published, "a commit changed"
        if seen is None:
            return
        assert seen.rows_in == seen.rows_out + seen.quarantined == 6
        assert not seen.verify() or self.is_damaged
        if not seen.verify():
            assert {name: seen.table(name).to_pydict() for name in CONTENT} == CONTENT
            self.published, self.is_damaged = seen, False

    def teardown(self) -> None:
        self.folder.cleanup()


@pytest.mark.parametrize("examples", [8, pytest.param(150, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_the_commit_protocol_survives_everything(monkeypatch: pytest.MonkeyPatch, examples: int) -> None:
    monkeypatch.setattr("os.fsync", do_not_sync)
    for module in ("commits", "attempts", "workspace"):
        monkeypatch.setattr(f"nightseg.storage.{module}._LOG", logging.Logger("nobody listens", logging.CRITICAL))
    run_state_machine_as_test(
        CommitProtocol,
        settings=settings(
            max_examples=examples, stateful_step_count=15, deadline=None, derandomize=True, report_multiple_bugs=False
        ),
    )
