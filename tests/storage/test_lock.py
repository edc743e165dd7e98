"""Two drivers on one run folder."""

import errno
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from nightseg.storage import Location, UserError, Workspace
from nightseg.storage.lock import HOLDER_NAME, LEASE_NAME, WorkspaceBusy, hold

HOLDER = """
import sys, time
from nightseg.storage import Workspace
with Workspace(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_driver_is_told_who_works_here(tmp_path: Path) -> None:
    root = tmp_path / "lauf 1 ü"
    command = [sys.executable, "-c", HOLDER, str(root), "--set", "s3://key:geheim@bucket"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(WorkspaceBusy) as caught, Workspace(root).lock():
            pytest.fail("two drivers in one run folder")
        message = str(caught.value)
        assert (Workspace(root).holder() or "nobody") in message
        assert str(root) in message
        assert f"process {holder.pid} on {os.uname().nodename}, since 20" in message
        assert "--set 's3://***@bucket'" in message or "--set s3://***@bucket" in message
        assert "geheim" not in message
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert Workspace(root).holder() is None
    with Workspace(root).lock():  # free at once, although the holder left its note behind
        assert json.loads((root / HOLDER_NAME).read_text())["pid"] == os.getpid()
    assert not (root / HOLDER_NAME).exists()


def test_the_lock_is_free_after_use_and_after_an_error(tmp_path: Path) -> None:
    with Workspace(tmp_path).lock(), pytest.raises(WorkspaceBusy), Workspace(tmp_path).lock():
        pytest.fail("two drivers in one run folder")
    with pytest.raises(RuntimeError), Workspace(tmp_path).lock():
        raise RuntimeError
    with Workspace(tmp_path).lock():
        assert (tmp_path / HOLDER_NAME).exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_asking_for_the_holder_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    assert Workspace(tmp_path / "none").holder() is None
    assert os.listdir(tmp_path) == []
    with Workspace(tmp_path).lock():
        assert f"process {os.getpid()} on" in (Workspace(tmp_path).holder() or "")
        note = (tmp_path / HOLDER_NAME).read_bytes()

    def fail(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    assert Workspace(tmp_path).holder() is None
    (tmp_path / HOLDER_NAME).write_bytes(note)
    assert f"process {os.getpid()} on" in (Workspace(tmp_path).holder() or "")


def test_other_run_folders_are_not_concerned(tmp_path: Path) -> None:
    with Workspace(tmp_path / "a").lock(), Workspace(tmp_path / "b").lock():
        assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_note_that_cannot_be_read_does_not_hide_the_lock(tmp_path: Path) -> None:
    with Workspace(tmp_path).lock():
        for note in (b"", b"[1]", b'{"command": "a\\u001b[31mb"}'):
            (tmp_path / HOLDER_NAME).write_bytes(note)
            with pytest.raises(WorkspaceBusy) as caught, Workspace(tmp_path).lock():
                pytest.fail("two drivers in one run folder")
            assert "\x1b" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", fail)
    with pytest.raises(UserError, match=r"cannot write .*permissions.*another run folder"), Workspace(tmp_path).lock():
        pytest.fail("locked")


# -- leases on stores without locks ----------------------------------------------------------------------------------


@pytest.fixture
def store() -> Location:
    return Location.of(f"memory://{secrets.token_hex(4)}/run")


def lease(store: Location, owner: str, age: float) -> None:
    (store / LEASE_NAME).write_json({"owner": owner, "host": "far", "pid": 7, "renewed": time.time() - age})


def test_a_lease_keeps_others_out_and_is_given_back(store: Location) -> None:
    with hold(store, settle_seconds=0):
        with pytest.raises(WorkspaceBusy, match=f"process {os.getpid()}"), hold(store, settle_seconds=0):
            pytest.fail("two drivers in one run folder")
        assert (store / LEASE_NAME).exists()
        assert f"process {os.getpid()} on" in (Workspace(store).holder() or "")
    assert Workspace(store).holder() is None
    lease(store, "dead", age=100)
    assert Workspace(store).holder() is None
    (store / LEASE_NAME).delete()
    assert not (store / LEASE_NAME).exists()


def test_a_fresh_lease_of_a_dead_driver_is_respected(store: Location) -> None:
    lease(store, "other", age=5)
    with pytest.raises(WorkspaceBusy, match="process 7 on far"), hold(store, settle_seconds=0):
        pytest.fail("two drivers in one run folder")


@pytest.mark.parametrize("age", [9.0, -9.0], ids=["old", "from a clock that is ahead"])
def test_an_abandoned_lease_is_taken_over(store: Location, age: float) -> None:
    lease(store, "dead", age)
    with hold(store, lease_seconds=0.1, settle_seconds=0):
        assert (store / LEASE_NAME).read_json()["pid"] == os.getpid()


def test_a_lease_that_looks_old_but_is_renewed_is_respected(store: Location) -> None:
    """The holder's clock is an hour behind; what counts is that it still writes."""
    lease(store, "other", age=3600)
    beat = threading.Timer(0.1, lease, (store, "other", 3599.0))
    beat.start()
    with pytest.raises(WorkspaceBusy, match="process 7 on far"), hold(store, lease_seconds=0.5, settle_seconds=0):
        pytest.fail("two drivers in one run folder")
    beat.join()


def test_the_lease_is_renewed(store: Location) -> None:
    with hold(store, lease_seconds=0.2, settle_seconds=0):
        first = (store / LEASE_NAME).read_json()["renewed"]
        time.sleep(0.3)
        assert (store / LEASE_NAME).read_json()["renewed"] > first


def test_the_later_of_two_claims_wins(store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both found nothing and wrote; after the pause each sees who is in."""
    monkeypatch.setattr("time.sleep", lambda seconds: lease(store, "rival", 0))
    with pytest.raises(WorkspaceBusy, match="process 7 on far"), hold(store):
        pytest.fail("two drivers in one run folder")
    assert (store / LEASE_NAME).read_json()["owner"] == "rival"


def test_a_store_that_fails_for_a_moment_does_not_end_the_lease(
    store: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with hold(store, lease_seconds=0.2, settle_seconds=0):
        first = (store / LEASE_NAME).read_json()["renewed"]
        with monkeypatch.context() as patch:

            def fail(self: Location, data: bytes) -> None:
                raise OSError("503 slow down")

            patch.setattr(Location, "write_bytes", fail)
            time.sleep(0.2)
        time.sleep(0.2)
        assert (store / LEASE_NAME).read_json()["renewed"] > first
    assert "cannot renew the lease" in caplog.text


@pytest.mark.parametrize("lease_seconds", [0.2, 60.0], ids=["seen by the heartbeat", "seen at the end"])
def test_a_lost_lease_is_an_error_and_left_to_its_new_owner(store: Location, lease_seconds: float) -> None:
    with (
        pytest.raises(WorkspaceBusy, match="process 7 on far"),
        hold(store, lease_seconds=lease_seconds, settle_seconds=0),
    ):
        lease(store, "thief", 0)
        time.sleep(0.3)
    assert (store / LEASE_NAME).read_json()["owner"] == "thief"
