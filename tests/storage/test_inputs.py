"""Inputs of stores on a disk of the node: fetched once, never more bytes than allowed, never old or damaged."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightseg.storage import Location, inputs, sha256_of
from tests.object_store import ObjectStore


@pytest.fixture
def limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """As large as one part: its files and no others are counted."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv(inputs.VARIABLE, "1000")
    inputs._folder.cache_clear()
    yield 1000
    inputs._folder.cache_clear()


@pytest.fixture
def folder(s3: ObjectStore) -> Location:
    return s3.place(secrets.token_hex(4))


def kept(tmp_path: Path) -> dict[str, bytes]:
    files = tmp_path.glob("nightseg-*/*/001-000/*")
    return {file.name: file.read_bytes() for file in files}


def test_a_file_is_fetched_once(s3: ObjectStore, folder: Location, limit: int, tmp_path: Path) -> None:
    place, data = folder / "ü 1.png", b"pixels"
    place.write_bytes(data)
    before = len(s3.requests)
    assert [inputs.read(place, sha256_of(data)) for _ in range(3)] == [data] * 3
    assert [method for method, _ in s3.requests[before:]] == ["GET"]
    assert kept(tmp_path) == {sha256_of(data): data}
    assert (tmp_path / next(os.walk(tmp_path))[1][0]).stat().st_mode & 0o077 == 0, "frames are private"


@pytest.mark.parametrize("sha256", [None, "", "../../etc/passwd", "0" * 64])
def test_what_is_not_known_by_its_hash_is_read_where_it_lies(
    s3: ObjectStore, folder: Location, limit: int, tmp_path: Path, sha256: str | None
) -> None:
    """Also what has changed since: callers see that, as without a cache."""
    place = folder / "a.png"
    place.write_bytes(b"pixels")
    before = len(s3.requests)
    assert [inputs.read(place, sha256) for _ in range(2)] == [b"pixels"] * 2
    assert len(s3.requests) - before == 2
    assert kept(tmp_path) == {}


def test_local_files_and_a_limit_of_zero_keep_nothing(
    folder: Location, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Location.of(tmp_path / "a.png")
    local.write_bytes(b"pixels")
    assert inputs.read(local, sha256_of(b"pixels")) == b"pixels"
    (folder / "a.png").write_bytes(b"pixels")
    inputs.use(0)
    assert inputs.read(folder / "a.png", sha256_of(b"pixels")) == b"pixels"
    assert kept(tmp_path) == {}
    with pytest.raises(FileNotFoundError):
        inputs.read(folder / "none.png", sha256_of(b"pixels"))


def test_a_damaged_file_is_fetched_again(folder: Location, limit: int, tmp_path: Path) -> None:
    place, data = folder / "a.png", b"pixels"
    place.write_bytes(data)
    inputs.read(place, sha256_of(data))
    (file,) = tmp_path.glob("nightseg-*/*/001-000/*")
    for damaged in (b"", data[:3], b"pixelz"):
        file.write_bytes(damaged)
        assert inputs.read(place, sha256_of(data)) == data
        assert kept(tmp_path) == {sha256_of(data): data}


def test_a_folder_that_was_swept_away_is_made_again(folder: Location, limit: int, tmp_path: Path) -> None:
    place, data = folder / "a.png", b"pixels"
    place.write_bytes(data)
    inputs.read(place, sha256_of(data))
    for shelf in tmp_path.glob("nightseg-*"):
        shutil.rmtree(shelf)
    assert inputs.read(place, sha256_of(data)) == data
    assert kept(tmp_path) == {sha256_of(data): data}


def test_the_least_recently_used_go_first(folder: Location, limit: int, tmp_path: Path) -> None:
    contents = [bytes([number]) * 300 for number in range(5)]
    places = [folder / f"{number}.png" for number in range(5)]
    for place, data in zip(places, contents, strict=True):
        place.write_bytes(data)

    def use(*numbers: int) -> list[int]:
        for number in numbers:
            assert inputs.read(places[number], sha256_of(contents[number])) == contents[number]
        assert sum(map(len, kept(tmp_path).values())) <= limit
        return sorted(contents.index(data) for data in kept(tmp_path).values())

    assert use(0, 1, 2) == [0, 1, 2]
    assert use(0, 3) == [0, 2, 3]
    assert use(2, 4) == [2, 3, 4]
    (folder / "large.png").write_bytes(b"x" * 1001)
    inputs.read(folder / "large.png", sha256_of(b"x" * 1001))
    assert use() == [2, 3, 4], "what is larger than the whole is not kept"


def test_processes_of_a_node_share_it_and_its_limit(
    s3: ObjectStore, folder: Location, limit: int, tmp_path: Path
) -> None:
    """One is killed while it writes: what it leaves is not read, and counts."""
    for number in range(8):
        (folder / f"{number}.png").write_bytes(bytes([number]) * 300)
    code = (
        "import sys; from nightseg.storage import Location, inputs, sha256_of\n"
        "for turn in range(20):\n"
        "    for number in range(8):\n"
        "        data = bytes([number]) * 300\n"
        "        assert inputs.read(Location.of(sys.argv[1]) / f'{number}.png', sha256_of(data)) == data\n"
    )
    first = inputs.read(folder / "0.png", sha256_of(bytes([0]) * 300))
    part = next(tmp_path.glob("nightseg-*/*/001-000"))
    (part / ".killed").write_bytes(first[:100])
    workers = [subprocess.Popen([sys.executable, "-c", code, folder.uri]) for _ in range(3)]
    while any(worker.poll() is None for worker in workers):
        lock = os.open(part, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)  # nobody adds meanwhile
        assert sum(entry.stat().st_size for entry in os.scandir(part)) <= limit
        os.close(lock)
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert all(name == sha256_of(data) for name, data in kept(tmp_path).items() if name != ".killed")
