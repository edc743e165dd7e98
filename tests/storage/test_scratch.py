"""Scratch files: whole or not there, shared while in use, gone with their last user, bounded by the disk."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nightseg.storage import Workspace, scratch
from nightseg.storage.paths import FAULT_VARIABLE
from nightseg.storage.scratch import Scratch, temporary_folder
from tests.programs import started


@pytest.fixture(autouse=True)
def room_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the disk of the tests looks like."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk(total=1000 * 2**30, free=500 * 2**30))


def disk(total: int, free: int) -> Any:
    return SimpleNamespace(total=total, used=total - free, free=free)


def opened(key: str, below: Path) -> Scratch:
    found = Scratch.open(key, below)
    assert found is not None
    return found


def test_what_is_written_is_read_by_every_user_of_the_key(tmp_path: Path) -> None:
    first, second, other = opened("a", tmp_path), opened("a", tmp_path), opened("b", tmp_path)
    assert first.write("x", [b"one", memoryview(b"two")])
    mapped = second.map("x")
    assert mapped is not None and mapped[:] == b"onetwo"
    assert first.map("y") is None and other.map("x") is None
    assert first.folder == second.folder != other.folder
    assert first.folder.stat().st_mode & 0o077 == 0 and first.folder.parent.stat().st_mode & 0o077 == 0


def test_what_is_changed_in_a_map_stays_with_its_reader(tmp_path: Path) -> None:
    place = opened("a", tmp_path)
    place.write("x", [b"abc"])
    mine, theirs = place.map("x"), place.map("x")
    assert mine is not None and theirs is not None
    mine[0:1] = b"z"
    again = place.map("x")
    assert again is not None and (mine[:], theirs[:], again[:]) == (b"zbc", b"abc", b"abc")


def test_the_last_user_removes_the_folder_and_maps_stay_valid(tmp_path: Path) -> None:
    first, second = opened("a", tmp_path), opened("a", tmp_path)
    first.write("x", [b"abc"])
    mapped = second.map("x")
    first.close()
    assert second.map("x") is not None
    second.close()
    second.close()
    assert not second.folder.exists() and mapped is not None and mapped[:] == b"abc"
    assert opened("a", tmp_path).map("x") is None


def test_a_killed_writer_leaves_the_files_it_finished(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from nightseg.storage.scratch import Scratch\n"
        "place = Scratch.open('a', Path(sys.argv[1]))\n"
        "for name in ('1', '2', '3'): place.write(name, [b'x' * 100_000])"
    )
    environment = os.environ | {FAULT_VARIABLE: "after:scratch-2"}
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=False)
    assert ended.returncode == -9
    place = opened("a", tmp_path)
    found = place.map("1")
    assert found is not None and len(found) == 100_000
    assert place.map("2") is None and place.map("3") is None
    place.close()
    assert not place.folder.exists()


def test_a_tenth_of_the_disk_stays_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = opened("a", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk(total=1000, free=200))
    assert place.write("x", [b"x" * 60, b"y" * 40])
    assert not place.write("y", [b"x" * 60, b"y" * 41])
    assert [path.name for path in place.folder.iterdir() if path.name != "lock"] == ["x"]


def test_of_a_large_disk_no_more_than_a_few_gibibytes_stay_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = opened("a", tmp_path)
    free = scratch.MOST_KEPT_FREE + 100
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: disk(total=1000 * 2**30, free=free))
    assert place.write("x", [b"x" * 100])
    assert not place.write("y", [b"x" * 101])


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    place = opened("a", tmp_path)

    def full(self: Path, target: Path) -> Path:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(Path, "replace", full)
    assert not place.write("x", [b"abc"])
    assert [path.name for path in place.folder.iterdir()] == ["lock"]


def test_a_folder_that_was_swept_away_is_no_error(tmp_path: Path) -> None:
    place = opened("a", tmp_path)
    shutil.rmtree(place.folder)
    assert not place.write("x", [b"abc"]) and place.map("x") is None
    place.close()


def test_abandoned_folders_go_and_those_in_use_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_use, abandoned, fresh = (opened(key, tmp_path) for key in ("in use", "abandoned", "fresh"))
    for left in (abandoned, fresh):
        left.write("x", [b"abc"])
        os.close(left._lock)  # type: ignore[arg-type]  # as a killed process leaves it
    yesterday = time.time() - scratch.ABANDONED_SECONDS - 1
    for old in (in_use, abandoned):
        os.utime(old.folder, (yesterday, yesterday))
    opened("new", tmp_path)
    assert in_use.folder.exists() and fresh.folder.exists() and not abandoned.folder.exists()

    monkeypatch.setattr(scratch, "_BOOT", tmp_path / "boot")
    (tmp_path / "boot").write_text("another boot")
    again = opened("fresh", tmp_path)
    assert again.map("x") is None and not fresh.folder.exists()  # what was written before the restart is not read


def test_without_a_boot_to_tell_nothing_is_shared_with_later_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_BOOT", tmp_path / "no such file")
    first = opened("a", tmp_path)
    monkeypatch.setattr(scratch, "_NOWHERE", "another process")
    assert opened("a", tmp_path).folder != first.folder


def test_a_place_that_others_can_write_is_refused(tmp_path: Path) -> None:
    shelf = tmp_path / f"nightseg-{os.getuid()}"
    shelf.mkdir()
    shelf.chmod(0o777)
    assert Scratch.open("a", tmp_path) is None
    shelf.rmdir()
    (tmp_path / "elsewhere").mkdir()
    shelf.symlink_to(tmp_path / "elsewhere")
    assert Scratch.open("a", tmp_path) is None
    assert Scratch.open("a", tmp_path / "elsewhere") is not None


def test_a_missing_temporary_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Scratch.open("a", tmp_path / "gone")


# -- temporary folders ------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from nightseg.storage.scratch import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "x").write_bytes(b"abc")
    if sys.argv[2] == "waits":
        print(folder, flush=True)
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def shelf(below: Path) -> Path:
    return below / f"nightseg-{os.getuid()}"


def test_a_temporary_folder_goes_with_its_user(tmp_path: Path) -> None:
    with temporary_folder(tmp_path) as first, temporary_folder(tmp_path) as second:
        assert first != second and first.stat().st_mode & 0o077 == 0
        (first / "deep").mkdir()
        (first / "deep/x").write_bytes(b"abc")
    assert not list(shelf(tmp_path).iterdir())
    with pytest.raises(RuntimeError), temporary_folder(tmp_path) as third:
        raise RuntimeError
    assert not third.exists()


def test_what_a_killed_process_left_goes_with_the_next_one_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with started([*command, "waits"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alive:
        assert alive.stdin is not None and alive.stdout is not None
        used = Path(alive.stdout.readline().strip())
        assert subprocess.run([*command, "dies"], check=False).returncode == -9
        assert len(list(shelf(tmp_path).iterdir())) == 2
        in_the_past = time.time() - 10 * scratch.ABANDONED_SECONDS
        os.utime(used, (in_the_past, in_the_past))
        with temporary_folder(tmp_path) as mine:
            assert sorted(shelf(tmp_path).iterdir()) == sorted([used, mine]), "no clock ends what is in use"
        alive.stdin.close()
        assert alive.wait(timeout=60) == -9
    scratch.remove_abandoned(tmp_path)
    assert not list(shelf(tmp_path).iterdir())
    scratch.remove_abandoned(tmp_path / "no such folder")


def test_the_driver_of_a_run_removes_what_killed_ones_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "dies"], check=False)
    (left,) = shelf(tmp_path).iterdir()
    with Workspace(tmp_path / "run").lock():
        assert not left.exists()


def test_where_others_can_write_temporary_folders_lie_elsewhere(tmp_path: Path) -> None:
    shelf(tmp_path).mkdir()
    shelf(tmp_path).chmod(0o777)
    with temporary_folder(tmp_path) as folder:
        assert folder.parent == tmp_path and folder.name.startswith("nightseg-")
    assert not folder.exists()
