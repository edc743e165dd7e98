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
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from nightseg.storage import Location, UserError, Workspace, lock, stores
from nightseg.storage.lock import HOLDER_NAME, LEASE_NAME, WorkspaceBusy, hold
from tests.object_store import ObjectStore
from tests.programs import started

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
    with started(command, stdout=subprocess.PIPE, text=True) as holder:
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


@pytest.fixture(params=["s3", "memory", "blind"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A folder of a store that decides who creates an object first; the last one does not."""
    name = secrets.token_hex(4)
    if request.param == "s3":
        return cast(ObjectStore, request.getfixturevalue("s3")).place(name) / "run"
    if request.param == "blind":
        monkeypatch.setitem(stores._decides, f"memory://{name}?", False)
    return Location.of(f"memory://{name}/run")


def claim(store: Location, number: int) -> Location:
    return store / f"{LEASE_NAME}/{number:06d}.json"


def lease(store: Location, owner: str, age: float, number: int = 1, **more: Any) -> None:
    note = {"owner": owner, "host": "far", "pid": 7, "renewed": time.time() - age}
    claim(store, number).write_json(note | more)


def holders(store: Location) -> list[str]:
    """The claims, by number: whose, and whether it was given back."""
    notes = [(store / LEASE_NAME / entry.name).read_json() for entry in (store / LEASE_NAME).list()]
    return [f"{note['owner']}{' gave it back' if note.get('released') else ''}" for note in notes]


def test_a_lease_keeps_others_out_and_is_given_back(store: Location) -> None:
    with hold(store, settle_seconds=0):
        with pytest.raises(WorkspaceBusy, match=f"process {os.getpid()}"), hold(store, settle_seconds=0):
            pytest.fail("two drivers in one run folder")
        assert f"process {os.getpid()} on" in (Workspace(store).holder() or "")
    assert Workspace(store).holder() is None
    with hold(store, settle_seconds=0):
        assert f"process {os.getpid()} on" in (Workspace(store).holder() or "")
    lease(store, "dead", age=100, number=3)
    assert Workspace(store).holder() is None


def test_a_fresh_lease_of_a_driver_elsewhere_is_respected(store: Location) -> None:
    lease(store, "other", age=5)
    with pytest.raises(WorkspaceBusy, match="process 7 on far"), hold(store, settle_seconds=0):
        pytest.fail("two drivers in one run folder")


def test_a_driver_killed_on_this_machine_holds_nothing(s3: ObjectStore) -> None:
    """However fresh its lease is: the same command again goes on at once."""
    root = s3.place(secrets.token_hex(4))
    with started([sys.executable, "-c", HOLDER, root.uri], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(WorkspaceBusy, match=f"process {holder.pid} on"), Workspace(root).lock():
            pytest.fail("two drivers in one run folder")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert Workspace(root).holder() is None
    with Workspace(root).lock():
        assert f"process {os.getpid()} on" in (Workspace(root).holder() or "")


def test_a_number_of_a_process_that_is_used_again_is_no_holder(store: Location) -> None:
    lease(store, "dead", age=0, machine=lock._machine(), pid=os.getpid(), started="1")
    with hold(store, settle_seconds=0):
        assert claim(store, 2).read_json()["started"] == lock._started(os.getpid()) != "1"


@pytest.mark.parametrize("age", [9.0, -9.0], ids=["old", "from a clock that is ahead"])
def test_an_abandoned_lease_is_taken_over(store: Location, age: float) -> None:
    lease(store, "dead", age)
    with hold(store, lease_seconds=0.1, settle_seconds=0):
        assert claim(store, 2).read_json()["pid"] == os.getpid()
        assert not claim(store, 1).exists()


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
        first = claim(store, 1).read_json()["renewed"]
        give_up = time.monotonic() + 60
        while claim(store, 1).read_json()["renewed"] == first:
            assert time.monotonic() < give_up
            time.sleep(0.05)


def test_the_later_of_two_claims_wins_where_the_store_does_not_decide(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Both found nothing and wrote; after the pause each sees who is in."""
    name = secrets.token_hex(4)
    store = Location.of(f"memory://{name}/run")
    monkeypatch.setitem(stores._decides, f"memory://{name}?", False)
    monkeypatch.setattr("time.sleep", lambda seconds: lease(store, "rival", 0))
    with pytest.raises(WorkspaceBusy, match="process 7 on far"), hold(store):
        pytest.fail("two drivers in one run folder")
    assert holders(store) == ["rival"]
    assert "does not tell who of two is first; start no two drivers at once" in caplog.text


def test_of_many_drivers_at_once_one_works_and_the_others_name_it(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = lock._wait_until_dead
    is_dead = lambda held: held["owner"] == "dead"  # known at once here, not after a minute  # noqa: E731
    monkeypatch.setattr(lock, "_wait_until_dead", lambda *told: None if is_dead(told[2]) else watch(*told))
    for dead in (False, True):  # a new folder, and one to take over
        root = s3.place(secrets.token_hex(4))
        if dead:
            lease(root, "dead", age=100)
        inside, told = [], []
        all_told = threading.Event()

        def drive(root: Location, inside: list[int], told: list[str], all_told: threading.Event) -> None:
            try:
                with hold(root, settle_seconds=0):
                    inside.append(1)
                    assert all_told.wait(60)
            except WorkspaceBusy as error:
                told.append(str(error))
                if len(told) == 3:
                    all_told.set()

        drivers = [threading.Thread(target=drive, args=(root, inside, told, all_told)) for _ in range(4)]
        for driver in drivers:
            driver.start()
        for driver in drivers:
            driver.join()
        assert (len(inside), len(told)) == (1, 3)
        assert all(f"process {os.getpid()} on {os.uname().nodename}" in text for text in told)


def test_a_rival_that_is_late_by_a_whole_run_is_refused(store: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """It saw a dead lease and then slept, while others took it over twice and one works now."""
    lease(store, "dead", age=100)
    seen = lock._newest(store)
    lease(store, "gone", age=50, number=2, released=True)
    lease(store, "works", age=1, number=3)
    claim(store, 1).delete()
    claim(store, 2).delete()
    looks = iter([seen])
    look = lock._newest
    monkeypatch.setattr(lock, "_newest", lambda root: next(looks, None) or look(root))
    with pytest.raises(WorkspaceBusy, match="process 7 on far"), hold(store, lease_seconds=0.1, settle_seconds=0):
        pytest.fail("two drivers in one run folder")
    assert claim(store, 3).read_json()["owner"] == "works"


def test_a_store_that_fails_for_a_moment_does_not_end_the_lease(
    store: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def renewed() -> float:
        return float(claim(store, 1).read_json()["renewed"])

    def until(is_so: Callable[[], bool]) -> None:
        give_up = time.monotonic() + 60
        while not is_so():
            assert time.monotonic() < give_up
            time.sleep(0.02)

    with hold(store, lease_seconds=0.2, settle_seconds=0):
        with monkeypatch.context() as patch:

            def fail(self: Location, data: bytes) -> None:
                raise OSError("503 slow down")

            patch.setattr(Location, "write_bytes", fail)
            until(lambda: "cannot renew the lease" in caplog.text)
        first = renewed()
        until(lambda: renewed() > first)


@pytest.mark.parametrize("lease_seconds", [0.2, 60.0], ids=["seen by the heartbeat", "seen at the end"])
@pytest.mark.parametrize("number", [1, 2], ids=["written over", "taken over"])
def test_a_lost_lease_is_an_error_and_left_to_its_new_owner(
    store: Location, lease_seconds: float, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        pytest.raises(WorkspaceBusy, match="process 7 on far"),
        hold(store, lease_seconds=lease_seconds, settle_seconds=0),
    ):
        lease(store, "thief", 0, number)
        give_up = time.monotonic() + 60
        while lease_seconds < 1 and "was taken over by process 7 on far" not in caplog.text:
            assert time.monotonic() < give_up
            time.sleep(0.02)
    assert holders(store)[-1] == "thief"
