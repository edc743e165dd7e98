"""Every way in which a file of a run can be damaged, and where it is told."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from nightseg.pipeline.results import read_results, sealed
from nightseg.pipeline.verify import verify
from nightseg.progress import SilentProgress
from nightseg.storage import Commit, DamagedCommit, Location, UserError, Workspace, check_contents
from nightseg.storage.commits import read_commit


def commit(run: Location, stage: str, name: str) -> Commit:
    attempt = Workspace(run).stage(stage, name, version=1, recipe={"a": 0.5}, inputs={}, seed=3).open()
    (attempt.folder / "frames.parquet").write_table(pa.table({"x": [1.5, 2.5], "id": [f"{stage}/1", name]}))
    (attempt.folder / "history.json").write_json([{"loss": 0.25, "epoch": 1}])
    (attempt.folder / "masks/1.png").write_bytes(bytes(range(256)))
    return attempt.finish(rows_in=2, rows_out=2, outputs=["frames.parquet", "history.json", "masks"])


def finished(run: Location, commits: list[Commit]) -> Location:
    (run / "recipe.yaml").write_bytes(b"name: small\nseed: 3\n")
    facts = {f"{c.stage}/{c.name}": {"content": c.content, "folder": c.folder.uri, "key": c.key} for c in commits}
    (run / "results.json").write_json(sealed({"models": {}, "commits": facts, "miou": 0.625}, run))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Location:
    folder = Location.of(tmp_path / "run")
    return finished(folder, [commit(folder, "collect", "day"), commit(folder, "split", "pool")])


def files_of(run: Location) -> list[Location]:
    """What was committed: outputs, commits, results, recipe; not the notes of attempts."""
    kept = (name for name in (entry.name for entry in run.list(recursive=True) if not entry.is_folder))
    return [run / name for name in kept if not name.endswith(("attempt.json", "_VERIFIED.json"))]


def damaged(run: Location) -> list[str]:
    return [damage.path for damage in verify(run, SilentProgress()).damaged]


def test_a_sound_run_is_counted_and_good(run: Location) -> None:
    found = verify(run, SilentProgress())
    assert (found.commits, found.files, found.damaged) == (2, 6, [])
    assert found.bytes == sum(output.bytes for c in Workspace(run).commits() for output in c.outputs)


CHANGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-1],
    "emptied": lambda data: b"",
    "longer": lambda data: data + b"\n",
    "zeros": lambda data: bytes(len(data)),
    "one bit": lambda data: bytes([data[0] ^ 1]) + data[1:],
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_changed_file_is_named(run: Location, change: str) -> None:
    files = files_of(run)
    assert len(files) == 10
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(CHANGES[change](whole))
        assert damaged(run) == [file.uri.removeprefix(f"{run.uri}/")]
        file.write_bytes(whole)
    assert damaged(run) == []


def test_every_missing_file_is_named(run: Location) -> None:
    for file in files_of(run):
        if file.name == "results.json":  # a run that is not finished has none
            continue
        whole = file.read_bytes()
        file.delete()
        assert damaged(run) == [file.uri.removeprefix(f"{run.uri}/")]
        file.write_bytes(whole)


def test_times_and_notes_hide_nothing(run: Location) -> None:
    """`verify` reads all, also what a rerun believes because its size, time and inode are as they were."""
    import os

    file = next(one for one in files_of(run) if one.name == "1.png")
    status = os.stat(file.uri)
    with open(file.uri, "r+b") as stream:
        stream.write(b"\x01")
    os.utime(file.uri, ns=(status.st_atime_ns, status.st_mtime_ns))
    for found in Workspace(run).commits():
        check_contents(found)
    assert damaged(run) == [file.uri.removeprefix(f"{run.uri}/")]


def test_a_commit_that_is_another_than_the_results_say_is_named(run: Location) -> None:
    found = Workspace(run).commits()[0]
    found.folder.parent.delete()
    attempt = Workspace(run).stage("collect", "day", version=1, recipe={"a": 0.5}, inputs={}, seed=3).open()
    (attempt.folder / "other.json").write_json({})
    attempt.finish(rows_in=1, rows_out=1, outputs=["other.json"])
    (damage,) = verify(run, SilentProgress()).damaged
    assert damage.path.startswith("stages/collect/day/") and damage.expected == f"content {found.content[:12]}"


def test_moved_and_borrowed_commits_are_read(run: Location, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    Path(run.uri).rename(moved)
    assert damaged(Location.of(moved)) == []
    other = Location.of(tmp_path / "other")
    lent = Workspace(moved).commits()
    finished(other, [commit(other, "split", "mine"), lent[0]])
    assert verify(other, SilentProgress()).commits == 2
    lent[0].file("history.json").write_bytes(b"[]")
    assert damaged(other) == [lent[0].file("history.json").uri]


def test_the_runs_of_a_search_are_read(run: Location, tmp_path: Path) -> None:
    search = tmp_path / "search"
    (search / "trials").mkdir(parents=True)
    Path(run.uri).rename(search / "trials" / "a=1")
    (search / "trials" / "a=1" / "results.json").write_bytes(b"{}")
    assert damaged(Location.of(search)) == ["trials/a=1/results.json"]


def test_flipped_bits_are_never_silent(run: Location) -> None:
    """Each is told by the check of a rerun, or leaves the stage without a commit; and `verify` names the file."""
    rng = random.Random(0)
    files, commits = files_of(run), Workspace(run).commits()
    for _ in range(60):
        file = rng.choice(files)
        whole = file.read_bytes()
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(bytes(data))
        assert damaged(run) == [file.uri.removeprefix(f"{run.uri}/")]
        told = 0
        for one in commits:
            try:
                found = read_commit(one.folder.parent)
                told += found is None
                if found is not None:
                    check_contents(found)
            except DamagedCommit:
                told += 1
        try:
            read_results(run)
        except UserError:
            told += 1
        assert told == (file.name != "recipe.yaml")  # a copy, written anew by each run
        file.write_bytes(whole)
