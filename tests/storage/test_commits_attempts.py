"""Shards and commits of one attempt."""

import errno
import fcntl
import os
import pickle
import secrets
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from nightseg import storage
from nightseg.storage import Location, Stage, UserError, Workspace, paths
from nightseg.storage.attempts import Attempt
from nightseg.storage.paths import TEMPORARY_PREFIX


@pytest.fixture(params=["local", "memory", "s3"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Stage:
    root: Path | Location = tmp_path / "mein Lauf"
    if request.param == "s3":
        root = request.getfixturevalue("s3").place(secrets.token_hex(4)) / "mein Lauf"
    elif request.param == "memory":
        root = Location.of(f"memory://{secrets.token_hex(4)}/mein Lauf")
    return collect(Workspace(root))


def collect(workspace: Workspace) -> Stage:
    return workspace.stage("collect", "day 1 ü", version=1, recipe={"root": "x"}, inputs={}, seed=7)


def shard_tables(index: int, bad: int = 0) -> dict[str, pa.Table]:
    names = [f"{index}/{row}" for row in range(4)]
    return {
        "frames": pa.table({"frame_id": names[bad:]}),
        "quarantine": pa.table(
            {"frame_id": names[:bad], "uri": names[:bad], "reason": ["truncated"] * bad, "detail": ["end at 3"] * bad},
            schema=pa.schema([(name, pa.string()) for name in ("frame_id", "uri", "reason", "detail")]),
        ),
    }


def fill(attempt: Attempt, num_shards: int = 3, bad: int = 0) -> list[int]:
    """Writes what is not finished yet; the indices of those shards."""
    written = []
    for index in range(attempt.plan(4 * num_shards, 4)):
        if attempt.shard(index) is None:
            attempt.write_shard(index, shard_tables(index, bad), rows_in=4, seconds=0.5)
            written.append(index)
    return written


# -- shards ----------------------------------------------------------------------------------------------------------


def test_a_shard_counts_once_its_marker_is_there(stage: Stage) -> None:
    attempt = pickle.loads(pickle.dumps(stage.open()))
    assert attempt.seed == 7
    assert attempt.shard(0) is None
    record = attempt.write_shard(0, shard_tables(0, bad=1), rows_in=4, seconds=0.25)
    assert attempt.shard(0) == record
    assert (record.rows_in, record.seconds, record.rows("frames"), record.rows("quarantine")) == (4, 0.25, 3, 1)
    assert record.rows("labels") == 0
    assert record.tables["frames"].path == "frames/part-00000.parquet"
    assert attempt.shard(1) is None


def test_another_process_goes_on_with_the_same_attempt(stage: Stage) -> None:
    assert not stage.is_open()
    fill(stage.open(), 2)
    assert stage.is_open()
    again = stage.open()
    assert again.folder.name == "attempt-1"
    assert fill(again, 2) == []
    (again.folder / "_shards/00001.json").delete()
    assert fill(stage.open(), 2) == [1]


@pytest.mark.parametrize("keep", [0, 1, 0.5, -2], ids=["nothing", "one byte", "half", "all but two"])
@pytest.mark.parametrize("path", ["_shards/00001.json", "frames/part-00001.parquet"])
def test_a_cut_file_opens_the_shard_again(stage: Stage, path: str, keep: float) -> None:
    attempt = stage.open()
    fill(attempt)
    data = (attempt.folder / path).read_bytes()
    (attempt.folder / path).write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    assert [index for index in range(3) if attempt.shard(index) is None] == [1]
    assert fill(attempt) == [1]
    assert (attempt.folder / path).read_bytes() == data


@pytest.mark.parametrize("marker", [b"[]", b"null", b"{}", b'{"index": 0, "rows_in": 4, "seconds": 1, "tables": [1]}'])
def test_a_strange_marker_opens_the_shard_again(stage: Stage, marker: bytes) -> None:
    attempt = stage.open()
    fill(attempt, 1)
    (attempt.folder / "_shards/00000.json").write_bytes(marker)
    assert attempt.shard(0) is None


def test_a_table_with_a_broken_footer_opens_the_shard_again(stage: Stage) -> None:
    attempt = stage.open()
    fill(attempt, 1)
    file = attempt.folder / "frames/part-00000.parquet"
    data = file.read_bytes()
    file.write_bytes(b"\0" * len(data))
    assert attempt.shard(0) is None
    (attempt.folder / "frames/part-00000.parquet").delete()
    assert attempt.shard(0) is None


def test_shards_cut_otherwise_are_forgotten(stage: Stage) -> None:
    """96 rows in shards of 64 and of 32: the second shard has 32 rows both times, but other rows."""
    attempt = stage.open()
    assert attempt.plan(96, 64) == 2
    attempt.write_shard(1, shard_tables(1), rows_in=32, seconds=0)
    assert attempt.plan(96, 64) == 2
    assert attempt.shard(1) is not None
    assert attempt.plan(96, 32) == 3
    assert attempt.shard(1) is None
    assert attempt.plan(0, 32) == 0
    (attempt.folder / "_shards/plan.json").write_bytes(b"{")
    assert attempt.plan(96, 32) == 3


# -- finish ----------------------------------------------------------------------------------------------------------


def test_finish_lists_everything_and_counts(stage: Stage) -> None:
    attempt = stage.open()
    fill(attempt, bad=1)
    (attempt.folder / "model/model.bin").write_bytes(b"12345")
    (attempt.folder / "model/deep/ä.json").write_json({})
    (attempt.folder / "evidence.json").write_json({"a": 1})
    (attempt.folder / "scratch.txt").write_bytes(b"not promised")
    commit = attempt.finish(
        rows_in=12,
        rows_out=9,
        quarantined=3,
        outputs=["evidence.json", "model"],
        num_shards=3,
        summary={"n": (1, 2), "empty": None},
        seconds=2,
    )
    assert [output.path for output in commit.outputs] == [
        "evidence.json",
        *(f"frames/part-0000{index}.parquet" for index in range(3)),
        "model/deep/ä.json",
        "model/model.bin",
        *(f"quarantine/part-0000{index}.parquet" for index in range(3)),
    ]
    model = next(output for output in commit.outputs if output.path == "model/model.bin")
    assert (model.bytes, model.sha256, model.rows) == (5, storage.sha256_of(b"12345"), None)
    assert sum(output.rows or 0 for output in commit.outputs) == 12
    assert (commit.rows_in, commit.rows_out, commit.quarantined, commit.seconds, commit.seed) == (12, 9, 3, 2, 7)
    assert commit.summary == {"n": [1, 2], "empty": None}
    assert commit.code.startswith("0.1.0+")
    assert stage.commit() == commit
    assert commit.verify() == []


def test_what_goes_in_must_come_out(stage: Stage) -> None:
    with pytest.raises(AssertionError, match="5 rows in, but 3 out \\+ 1 quarantined"):
        stage.open().finish(rows_in=5, rows_out=3, quarantined=1)
    assert stage.commit() is None


def test_a_missing_output_or_shard_is_no_commit(stage: Stage) -> None:
    attempt = stage.open()
    with pytest.raises(FileNotFoundError):
        attempt.finish(rows_in=0, rows_out=0, outputs=["model/model.bin"])
    fill(attempt, 2)
    with pytest.raises(FileNotFoundError, match="shard 2"):
        attempt.finish(rows_in=8, rows_out=8, num_shards=3)
    assert stage.commit() is None


def test_outputs_cannot_lie_outside(stage: Stage) -> None:
    for path in ("../other", "/etc/passwd", "."):
        with pytest.raises(UserError, match="refused"):
            stage.open().finish(rows_in=0, rows_out=0, outputs=[path])


def test_too_many_bad_frames_stop_the_stage(stage: Stage) -> None:
    attempt = stage.open()
    fill(attempt, 2)
    attempt.write_shard(1, shard_tables(1, bad=2), rows_in=4, seconds=0)
    with pytest.raises(UserError) as caught:
        attempt.finish(rows_in=8, rows_out=6, quarantined=2, max_bad_fraction=0.2, num_shards=2)
    assert str(caught.value) == (
        "collect/day 1 ü: 2 of 8 frames (25.0%) are bad, max_bad_fraction allows 20.0% (2 truncated)\n"
        "  1/0: truncated end at 3\n"
        "  1/1: truncated end at 3. Cure: repair or remove these files, or set max_bad_fraction to 0.25 or more; then "
        "run the same command again."
    )
    assert stage.commit() is None
    assert fill(stage.open(), 2) == [1]  # the files may have been mended: only the shard with bad ones is read again
    stage.open().finish(rows_in=8, rows_out=8, max_bad_fraction=0.0, num_shards=2)


def test_a_limit_that_would_leave_out_most_is_not_proposed(stage: Stage) -> None:
    attempt = stage.open()
    attempt.write_shard(0, shard_tables(0, bad=3), rows_in=4, seconds=0)
    with pytest.raises(UserError) as caught:
        attempt.finish(rows_in=4, rows_out=1, quarantined=3, max_bad_fraction=0.2, num_shards=1)
    assert caught.value.cure == "mend what these lines say, so many are no accident; then run the same command again"


def test_the_limit_itself_is_allowed(stage: Stage) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point."""
    assert stage.open().finish(rows_in=100, rows_out=71, quarantined=29, max_bad_fraction=0.29).quarantined == 29


def test_reasons_come_from_a_single_quarantine_table_too(stage: Stage) -> None:
    attempt = stage.open()
    (attempt.folder / "quarantine.parquet").write_table(shard_tables(0, bad=1)["quarantine"])
    with pytest.raises(UserError, match="1 truncated"):
        attempt.finish(rows_in=4, rows_out=3, quarantined=1, max_bad_fraction=0.01, outputs=["quarantine.parquet"])
    assert attempt.finish(
        rows_in=4, rows_out=3, quarantined=1, max_bad_fraction=0.25, outputs=["quarantine.parquet"]
    ).table("quarantine")["reason"].to_pylist() == ["truncated"]


def test_control_characters_of_file_names_do_not_reach_the_terminal(stage: Stage) -> None:
    attempt = stage.open()
    row = {"frame_id": ["a"], "uri": ["a\x1b[31m.png"], "reason": ["missing"], "detail": [None]}
    (attempt.folder / "quarantine.parquet").write_table(pa.table(row))
    with pytest.raises(UserError, match=r"  a\[31m\.png: missing"):
        attempt.finish(rows_in=1, rows_out=0, quarantined=1, max_bad_fraction=0, outputs=["quarantine.parquet"])


def test_an_empty_stage_can_be_committed(stage: Stage) -> None:
    commit = stage.open().finish(rows_in=0, rows_out=0, max_bad_fraction=0.0)
    assert commit.outputs == ()


# -- what killed drivers leave ----------------------------------------------------------------------------------------


def test_scratch_folders_go_with_the_commit_and_not_before(stage: Stage) -> None:
    attempt = stage.open()
    fill(attempt, 1)
    (attempt.folder / "trainer/report-1/state.pt").write_bytes(b"state")
    with pytest.raises(FileNotFoundError):
        attempt.finish(rows_in=8, rows_out=8, num_shards=2, scratch=["trainer"])
    assert (attempt.folder / "trainer/report-1/state.pt").exists()
    commit = attempt.finish(rows_in=4, rows_out=4, num_shards=1, scratch=["trainer", "never made"])
    assert {entry.name for entry in commit.folder.list()} == {"_shards", "attempt.json", "frames", "quarantine"}
    with pytest.raises(UserError, match="refused"):
        stage.open().finish(rows_in=0, rows_out=0, scratch=["../other"])


def test_scratch_of_a_driver_that_was_killed_after_its_commit_goes_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path)
    attempt = collect(workspace).open()
    (attempt.folder / "trainer/state.pt").write_bytes(b"state")
    with monkeypatch.context() as patch:
        patch.setattr("nightseg.storage.attempts.clear_scratch", lambda attempt: None)  # it is killed before
        attempt.finish(rows_in=0, rows_out=0, scratch=["trainer"])
    other = workspace.stage("collect", "night", version=1, recipe={}, inputs={}, seed=0).open()
    (other.folder / "trainer/state.pt").write_bytes(b"needed")
    with workspace.lock():
        assert [entry.name for entry in attempt.folder.list()] == ["attempt.json"]
        assert (other.folder / "trainer/state.pt").exists()


def test_files_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    done, open_ = collect(workspace), workspace.stage("collect", "night", version=1, recipe={}, inputs={}, seed=0)
    done.open().finish(rows_in=0, rows_out=0)
    attempt = open_.open()
    (tmp_path / "models/first").mkdir(parents=True)
    places = [tmp_path, tmp_path / "models/first", done.folder.local, attempt.folder.local]
    for place in places:
        (place / f"{TEMPORARY_PREFIX}dead").write_bytes(b"half")
    os.symlink(tmp_path, tmp_path / "models/round")  # in circles
    alive = f"{attempt.folder}/frames.parquet"
    with paths._temporary_file(alive, b"whole") as living:
        with workspace.lock():
            assert [path for place in places for path in place.glob(f"{TEMPORARY_PREFIX}*")] == [Path(living)]
        os.replace(living, alive)
    assert Path(alive).read_bytes() == b"whole"


def test_a_writer_whose_file_is_taken_for_that_of_a_dead_one_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between making its file and locking it."""
    locks, lock = [], fcntl.flock

    def late(file: Any, how: int) -> None:
        if not locks:
            locks.append(how)
            paths.remove_temporary_files(str(tmp_path))
            assert not list(tmp_path.iterdir())
        lock(file, how)

    monkeypatch.setattr("fcntl.flock", late)
    Location.of(tmp_path / "a.json").write_json({"a": 1})
    assert locks and Location.of(tmp_path / "a.json").read_json() == {"a": 1}


def test_without_locks_files_are_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", fail)
    Location.of(tmp_path / "a.json").write_json({"a": 1})
    (tmp_path / f"{TEMPORARY_PREFIX}x").touch()
    paths.remove_temporary_files(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [f"{TEMPORARY_PREFIX}x", "a.json"], "nobody can tell whose it is"


# -- races and full disks --------------------------------------------------------------------------------------------


def test_the_loser_of_a_race_returns_the_winner(stage: Stage) -> None:
    first, second = stage.open(), stage.open()
    fill(first)
    winner = first.finish(rows_in=12, rows_out=12, num_shards=3, seconds=1)
    assert second.finish(rows_in=12, rows_out=12, num_shards=3, seconds=99) == winner
    assert not stage.is_open()
    third = stage.open()
    assert third.folder.name == "attempt-2"  # a committed attempt is never opened again
    fill(third)
    assert third.finish(rows_in=12, rows_out=12, num_shards=3) == winner


def test_a_loser_with_another_result_fails_loudly(stage: Stage) -> None:
    first = stage.open()
    winner = first.finish(rows_in=0, rows_out=0)
    second = stage.open()
    (second.folder / "a.json").write_json(1)
    with pytest.raises(UserError, match="with other outputs"):
        second.finish(rows_in=0, rows_out=0, outputs=["a.json"])
    assert stage.commit() == winner


def test_a_damaged_note_starts_a_new_attempt(stage: Stage) -> None:
    (stage.open().folder / "attempt.json").write_bytes(b'{"key')
    assert stage.open().folder.name == "attempt-2"
    assert stage.open().folder.name == "attempt-2"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_leaves_no_half_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    stage = collect(Workspace(tmp_path))
    attempt = stage.open()
    fill(attempt, 1)
    before = sorted(path.name for path in tmp_path.rglob("*"))

    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    for call in ("fsync", "link", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{call}", fail)
            with pytest.raises(UserError, match=r"cannot write .*another run folder"):
                attempt.write_shard(0, shard_tables(0), rows_in=4, seconds=0)
                attempt.finish(rows_in=4, rows_out=4, num_shards=1)
        assert stage.commit() is None
        assert sorted(path.name for path in tmp_path.rglob("*")) == before
    commit = attempt.finish(rows_in=4, rows_out=4, num_shards=1)
    assert Location.of(tmp_path).exists()
    assert stage.commit() == commit
