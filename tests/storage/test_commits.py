"""Stages, their keys, and who finds which commit."""

import json
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from nightseg.storage import Commit, Location, Shards, Stage, UserError, Workspace, check_contents, hash_of
from nightseg.storage import commits as storage_commits
from nightseg.storage.commits import COMMIT_NAME, VERIFIED_NAME, DamagedCommit, Output, seal_fault, table_paths


@pytest.fixture(params=["local", "memory", "file-uri", "s3"])
def workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Workspace:
    if request.param == "s3":
        return Workspace(request.getfixturevalue("s3").place(secrets.token_hex(4)) / "lauf 1 ü")
    roots = {"local": str(tmp_path), "memory": f"memory://{secrets.token_hex(4)}", "file-uri": tmp_path.as_uri()}
    return Workspace(Location.of(roots[request.param]) / "lauf 1 ü")


def split(workspace: Workspace, **changes: Any) -> Stage:
    asked: dict[str, Any] = {
        "version": 1,
        "recipe": {"margin": 0.2, "keep": "night"},
        "inputs": {"pool": "aa"},
        "seed": 0,
    }
    return workspace.stage("split", "pool", **{**asked, **changes})


def done(stage: Stage, value: int = 1) -> Commit:
    attempt = stage.open()
    (attempt.folder / "frames.parquet").write_table(pa.table({"x": [value]}))
    (attempt.folder / "evidence.json").write_json({"value": value})
    return attempt.finish(rows_in=1, rows_out=1, outputs=["frames.parquet", "evidence.json"])


# -- keys ------------------------------------------------------------------------------------------------------------


def test_the_key_is_the_hash_of_all_that_matters(tmp_path: Path) -> None:
    stage = split(Workspace(tmp_path))
    assert stage.key == hash_of(
        {
            "stage": "split",
            "name": "pool",
            "version": 1,
            "recipe": {"margin": 0.2, "keep": "night"},
            "inputs": {"pool": "aa"},
            "seed": 0,
        }
    )
    assert stage.folder.uri == f"{tmp_path}/stages/split/pool/{stage.key[:12]}"
    keys = [
        split(Workspace(tmp_path / "elsewhere"), **changes).key
        for changes in (
            {},
            {"version": 2},
            {"recipe": {"margin": 0.3, "keep": "night"}},
            {"inputs": {"pool": "bb"}},
            {"seed": 1},
        )
    ]
    assert keys[0] == stage.key
    assert len(set(keys)) == 5


def test_the_order_of_the_recipe_does_not_matter(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert split(workspace, recipe={"keep": "night", "margin": 0.2}).key == split(workspace).key
    assert split(workspace, recipe={"size": (1, 2)}).key == split(workspace, recipe={"size": [1, 2]}).key


@pytest.mark.parametrize("name", ["../x", "a/b", "/x", "", "a\\b", "a\0"])
def test_names_that_are_no_folder_name_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError):
        Workspace(tmp_path).stage("split", name, version=1, recipe={}, inputs={}, seed=0)


def test_numbers_that_are_none_have_no_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        split(Workspace(tmp_path), recipe={"margin": float("nan")})


# -- finding commits -------------------------------------------------------------------------------------------------


def test_nothing_is_there_before_it_is_committed(workspace: Workspace) -> None:
    stage = split(workspace)
    assert (stage.commit(), stage.nearest(), workspace.commits()) == (None, None, [])
    stage.open()
    assert (stage.commit(), workspace.commits()) == (None, [])


def test_the_same_key_finds_the_commit(workspace: Workspace) -> None:
    commit = done(split(workspace))
    assert split(workspace).commit() == commit
    assert split(Workspace(workspace.root)).commit() == commit
    assert split(workspace, seed=1).commit() is None
    assert workspace.commits() == [commit]


def test_nearest_differs_least(workspace: Workspace) -> None:
    done(split(workspace, recipe={"margin": 0.9, "keep": "day"}, seed=5))
    close = done(split(workspace, recipe={"margin": 0.3, "keep": "night"}))
    nearest = split(workspace).nearest()
    assert nearest == close.identity
    assert nearest is not None
    assert nearest["recipe"]["margin"] == 0.3


def test_commits_come_in_the_order_they_were_made(workspace: Workspace) -> None:
    made = [done(split(workspace, seed=seed), seed) for seed in (3, 1, 2)]
    assert sorted(made, key=lambda commit: commit.created) == workspace.commits()
    assert {commit.seed for commit in workspace.commits()} == {1, 2, 3}


def test_a_run_folder_can_be_moved(tmp_path: Path) -> None:
    commit = done(split(Workspace(tmp_path / "before")))
    shutil.move(tmp_path / "before", tmp_path / "nachher ü")
    moved = split(Workspace(tmp_path / "nachher ü")).commit()
    assert moved is not None
    assert moved.folder.uri.startswith(f"{tmp_path}/nachher ü/")
    assert (moved.content, moved.verify()) == (commit.content, [])
    assert str(tmp_path) not in (moved.folder.parent / COMMIT_NAME).read_bytes().decode()


def test_commits_are_borrowed_and_stay_where_they_are(tmp_path: Path) -> None:
    lender = done(split(Workspace(tmp_path / "lender")), 1)
    other = Workspace(tmp_path / "mine", borrow=[Location.of(tmp_path / "empty"), Location.of(tmp_path / "lender")])
    before = sorted(tmp_path.rglob("*"))
    borrowed = split(other).commit()
    assert borrowed == lender
    assert borrowed.folder.uri.startswith(f"{tmp_path}/lender/")
    assert split(other, seed=9).commit() is None
    assert other.commits() == []
    assert sorted(tmp_path.rglob("*")) == before
    own = done(split(other), 1)
    found = split(other).commit()
    assert found is not None
    assert found.folder == own.folder  # one's own comes first


def test_a_damaged_borrowed_commit_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lender = done(split(Workspace(tmp_path / "lender")))
    lender.file("evidence.json").delete()
    mine = Workspace(tmp_path / "mine", borrow=[Location.of(tmp_path / "lender")])
    with caplog.at_level(logging.WARNING):
        assert split(mine).commit() is None
    assert "not borrowed" in caplog.text


# -- reading a commit ------------------------------------------------------------------------------------------------


def test_only_listed_outputs_are_read(workspace: Workspace) -> None:
    commit = done(split(workspace), 4)
    (commit.folder / "extra.json").write_json({})
    assert commit.json("evidence.json") == {"value": 4}
    assert commit.table("frames").to_pydict() == {"x": [4]}
    assert commit.has("frames.parquet")
    assert not commit.has("extra.json")
    for path in ("extra.json", "../attempt-1/evidence.json", "attempt.json"):
        with pytest.raises(KeyError, match="committed no"):
            commit.file(path)
    with pytest.raises(KeyError, match="no table 'labels'"):
        commit.table("labels")


def test_shards_are_joined_in_row_order() -> None:
    parts = [Output(f"frames/part-{index:05d}.parquet", 1, "") for index in (100_000, 99_999, 2, 10)]
    other = [Output("frames/deep/part-00001.parquet", 1, ""), Output("frames/a.png", 1, "")]
    assert table_paths([*parts, *other], "frames") == [
        f"frames/part-{index:05d}.parquet" for index in (2, 10, 99_999, 100_000)
    ]


def test_a_column_that_is_empty_in_one_shard_fits_the_others(workspace: Workspace) -> None:
    attempt = split(workspace).open()
    shards: list[list[str | None]] = [[None], ["a.png"], []]
    for index, labels in enumerate(shards):
        attempt.write_shard(index, {"frames": pa.table({"label_uri": labels})}, rows_in=len(labels), seconds=0)
    table = attempt.finish(rows_in=2, rows_out=2, num_shards=3).table("frames")
    assert table.schema == pa.schema([("label_uri", pa.string())])
    assert table.to_pydict() == {"label_uri": [None, "a.png"]}


def test_content_follows_from_the_outputs_alone(tmp_path: Path) -> None:
    first, second = Workspace(tmp_path / "a"), Workspace(tmp_path / "b")
    assert done(split(first)).content == done(split(second, seed=1)).content
    assert done(split(first, seed=2), 2).content != done(split(second, seed=2), 3).content


def test_a_table_with_extension_types_is_refused(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    commit = done(split(Workspace(tmp_path)))
    pq.write_table(pa.table({"id": pa.array([b"0" * 16], pa.uuid())}), commit.file("frames.parquet").uri)
    with pytest.raises(UserError, match="extension type"):
        commit.table("frames")
    attempt = split(Workspace(tmp_path), seed=1).open()
    shutil.copy(commit.file("frames.parquet").uri, attempt.folder.uri)
    with pytest.raises(UserError, match="extension type"):
        attempt.finish(rows_in=1, rows_out=1, outputs=["frames.parquet"])


# -- damage ----------------------------------------------------------------------------------------------------------


def test_missing_and_cut_outputs_are_named(workspace: Workspace) -> None:
    stage = split(workspace)
    commit = done(stage)
    commit.file("evidence.json").write_bytes(b"{}")
    commit.file("frames.parquet").delete()
    with pytest.raises(
        DamagedCommit, match=r"evidence\.json has 2 bytes instead of 17.*; frames\.parquet is missing.*delete"
    ):
        stage.commit()
    assert commit.verify() == ["evidence.json", "frames.parquet"]
    assert workspace.commits() == []
    stage.folder.delete()
    assert stage.commit() is None


def test_a_flipped_bit_is_found_by_verify(workspace: Workspace) -> None:
    commit = done(split(workspace))
    data = bytearray(commit.file("evidence.json").read_bytes())
    data[5] ^= 1
    commit.file("evidence.json").write_bytes(bytes(data))
    assert split(workspace).commit() == commit
    assert commit.verify() == ["evidence.json"]


def test_a_flipped_bit_is_found_when_a_run_reads_the_commit(workspace: Workspace) -> None:
    stage = split(workspace)
    file = done(stage).file("evidence.json")
    whole = file.read_bytes()
    assert stage.commit(check=check_contents) is not None
    file.write_bytes(whole.replace(b"1", b"3"))  # the size stays
    storage_commits._VERIFIED.clear()  # the next process: a store without times is read once by each
    with pytest.raises(DamagedCommit, match=r"evidence\.json has sha256 [0-9a-f]{12} instead of sha256 [0-9a-f]{12}"):
        stage.commit(check=check_contents)
    file.write_bytes(whole)
    assert stage.commit(check=check_contents) is not None
    file.write_bytes(whole + b" ")
    with pytest.raises(DamagedCommit, match=r"evidence\.json has 18 bytes instead of 17"):
        stage.commit(check=check_contents)


def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every output that is hashed from now on, in new processes as it were."""
    seen: list[int] = []
    hashed = storage_commits._size_and_hash

    def count(stream: pa.NativeFile) -> tuple[int, str]:
        found = hashed(stream)
        seen.append(found[0])
        return found

    monkeypatch.setattr(storage_commits, "_size_and_hash", count)
    monkeypatch.setattr(storage_commits, "_VERIFIED", set())
    return seen


def test_contents_are_read_once_until_they_are_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = done(split(Workspace(tmp_path / "run")))
    note = commit.folder.parent / VERIFIED_NAME
    seen = reads(monkeypatch)
    check_contents(commit)
    assert seen == [], "what was just hashed is not read again"
    for lost in (b"", b"{", b"[]", None):
        storage_commits._VERIFIED.clear()
        note.delete() if lost is None else note.write_bytes(lost)
        check_contents(commit)
        check_contents(commit)
        assert len(seen) == 2, "a lost note costs one reading"
        seen.clear()
    os.utime(commit.file("evidence.json").uri)
    check_contents(commit)
    assert len(seen) == 2
    seen.clear()
    same = commit.file("evidence.json").read_bytes()
    status = os.stat(commit.file("evidence.json").uri)
    commit.file("evidence.json").write_bytes(same)  # another inode
    os.utime(commit.file("evidence.json").uri, ns=(status.st_atime_ns, status.st_mtime_ns))
    check_contents(commit)
    assert len(seen) == 2
    seen.clear()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = split(Workspace(tmp_path / "moved")).commit(check=check_contents)
    assert moved is not None and len(seen) == 2


def test_a_store_without_times_is_read_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = done(split(Workspace(f"memory://{secrets.token_hex(4)}")))
    looks = {output.path: (output.bytes, 0, 0) for output in commit.outputs}
    monkeypatch.setattr(storage_commits, "_looks", lambda commit: looks)
    (commit.folder.parent / VERIFIED_NAME).delete()
    seen = reads(monkeypatch)
    check_contents(commit)
    check_contents(commit)
    assert len(seen) == 2
    assert not (commit.folder.parent / VERIFIED_NAME).exists()


def test_a_damaged_commit_is_replaced_by_the_next_attempt(workspace: Workspace) -> None:
    stage = split(workspace)
    first = done(stage)
    first.file("frames.parquet").write_bytes(b"PAR1")
    assert done(stage).folder.name == "attempt-2"
    found = stage.commit(check=check_contents)
    assert found is not None
    assert (found.folder.name, found.content) == ("attempt-2", first.content)


def test_every_flipped_bit_of_a_commit_file_is_found(tmp_path: Path) -> None:
    stage = split(Workspace(tmp_path))
    commit = done(stage)
    place = stage.folder / COMMIT_NAME
    whole = place.read_bytes()
    assert seal_fault(place) is None
    for bit in range(0, 8 * len(whole), 5):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        place.write_bytes(bytes(data))
        assert seal_fault(place) is not None
        assert stage.commit() in (None, commit), "never another one"
    place.write_bytes(whole + b"\n")
    assert seal_fault(place) is not None


@pytest.mark.parametrize("keep", [0, 1, 200, -1, -2])
def test_a_cut_commit_counts_as_none_and_the_next_run_mends_it(workspace: Workspace, keep: int) -> None:
    stage = split(workspace)
    content = done(stage).content
    place = stage.folder / COMMIT_NAME
    place.write_bytes(place.read_bytes()[:keep])
    found = stage.commit()
    if keep == -1:  # only the last line break is gone: all of it is there
        assert found is not None
        return
    assert found is None
    assert stage.open().folder.name == "attempt-1"
    assert done(stage).content == content
    assert stage.commit() is not None


def test_an_edited_commit_counts_as_none(workspace: Workspace) -> None:
    stage = split(workspace)
    done(stage)
    place = stage.folder / COMMIT_NAME
    place.write_json(place.read_json() | {"rows_out": 1000})
    assert stage.commit() is None


def sealed(body: dict[str, Any]) -> bytes:
    plain = {name: value for name, value in body.items() if name != "sha256"}
    return json.dumps(plain | {"sha256": hash_of(plain)}).encode()


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_another_schema_is_refused_with_a_hint(workspace: Workspace, schema: Any) -> None:
    stage = split(workspace)
    done(stage)
    place = stage.folder / COMMIT_NAME
    place.write_bytes(sealed(place.read_json() | {"schema": schema}))
    with pytest.raises(UserError, match=r"schema .*reads schema 1.*use the nightseg that wrote it"):
        stage.commit()


@pytest.mark.parametrize("path", ["../../../secret", "/etc/passwd", "a\\b", "a/../../b"])
def test_paths_that_lead_out_of_a_commit_are_refused(workspace: Workspace, path: str) -> None:
    stage = split(workspace)
    done(stage)
    place = stage.folder / COMMIT_NAME
    body = place.read_json()
    output = {"path": path, "bytes": 1, "sha256": "", "rows": None}
    for change in ({"attempt": path}, {"outputs": [output]}):
        place.write_bytes(sealed(body | change))
        with pytest.raises(UserError, match="refused"):
            stage.commit()


def test_links_that_lead_out_of_a_commit_are_refused(tmp_path: Path) -> None:
    stage = split(Workspace(tmp_path / "run"))
    commit = done(stage)
    secret = tmp_path / "secret.json"
    shutil.move(commit.file("evidence.json").local, secret)
    os.symlink(secret, commit.file("evidence.json").uri)
    with pytest.raises(DamagedCommit, match="leads out"):
        stage.commit()


def test_strange_commits_are_refused(workspace: Workspace) -> None:
    stage = split(workspace)
    done(stage)
    place = stage.folder / COMMIT_NAME
    place.write_bytes(sealed({"schema": 1}))
    with pytest.raises(UserError, match="not written by nightseg"):
        stage.commit()
    place.write_bytes(b"[1, 2]")
    assert stage.commit() is None


# -- places in the run folder ------------------------------------------------------------------------------------------


def referring(workspace: Workspace) -> tuple[Commit, str]:
    """A commit whose tables name a file of another one; and the place of that file."""
    place = done(split(workspace)).file("evidence.json").uri
    attempt = workspace.stage("score", "pool", version=1, recipe={}, inputs={}, seed=0).open()
    rows = {
        "uri": [place, "images/0.png", "/data/0.png", None],
        "label_uri": [None, None, None, place],
        "note": ["run:x"] * 4,
    }
    told = {"rows": [[place], {"a": 1}]}
    names = [attempt.write_table("whole", pa.table(rows)), attempt.write_json("first.json", told)]
    attempt.write_shard(0, {"frames": pa.table(rows)}, rows_in=4, seconds=0)
    record = attempt.shard(0)
    assert record is not None and Shards(attempt, (record,)).table("frames")["uri"][0].as_py() == place
    return attempt.finish(rows_in=4, rows_out=4, num_shards=1, outputs=names), place


def test_places_in_the_run_folder_are_told_wherever_it_lies(workspace: Workspace) -> None:
    commit, place = referring(workspace)
    for table in ("frames", "whole"):
        found = commit.table(table).to_pydict()
        assert found["uri"] == [place, "images/0.png", "/data/0.png", None]
        assert found["label_uri"] == [None, None, None, place] and found["note"] == ["run:x"] * 4
    assert commit.json("first.json") == {"rows": [[place], {"a": 1}]}
    raw = (commit.folder / "whole.parquet").read_table()
    assert raw["uri"][0].as_py() == "run:" + place.removeprefix(f"{workspace.root.uri}/")


def test_a_moved_run_says_the_same_and_knows_its_files(tmp_path: Path) -> None:
    commit, before = referring(Workspace(tmp_path / "before"))
    elsewhere, _ = referring(Workspace(tmp_path / "elsewhere/deep"))
    assert commit.content == elsewhere.content
    shutil.move(tmp_path / "before", tmp_path / "nachher ü")
    (moved,) = [one for one in Workspace(tmp_path / "nachher ü").commits() if one.stage == "score"]
    after = before.replace("/before/", "/nachher ü/")
    assert moved.table("frames")["uri"][0].as_py() == after and Path(after).exists()
    assert moved.json("first.json")["rows"][0] == [after]
