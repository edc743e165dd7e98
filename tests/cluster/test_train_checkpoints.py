"""Checkpoints: written whole, checked when read, two kept."""

from __future__ import annotations

import io
import secrets
from pathlib import Path

import pytest
import torch

from nightseg.cluster.train import Checkpoints, FitResult, LocalSession
from nightseg.errors import UserError
from nightseg.storage import Location, sha256_of


@pytest.fixture(params=["local", "s3"])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoints:
    place = Location.of(tmp_path)
    if request.param == "s3":
        place = request.getfixturevalue("s3").place(secrets.token_hex(4))
    return Checkpoints(place / "trainer/model")


def save(checkpoints: Checkpoints, report: int) -> None:
    state = {"weight": torch.full((2,), float(report)), "epoch": report, "names": ["a", "b"], "best": None}
    checkpoints.save(report, state, [{"loss": 1.0 / number} for number in range(1, report + 1)])


def names(checkpoints: Checkpoints) -> list[str]:
    return [entry.name for entry in checkpoints.folder.list()]


def test_nothing_there_is_none(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None


def test_the_newest_comes_back_and_two_are_kept(checkpoints: Checkpoints) -> None:
    for report in (1, 2, 3, 12):
        save(checkpoints, report)
    assert names(checkpoints) == ["report-00000003", "report-00000012"]
    newest = checkpoints.newest()
    assert newest is not None
    assert (newest.report, newest.state["epoch"], newest.state["weight"].tolist()) == (12, 12, [12.0, 12.0])
    assert newest.state["names"] == ["a", "b"] and newest.state["best"] is None
    assert newest.history[-1] == {"loss": 1.0 / 12} and len(newest.history) == 12


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "no state"])
def test_a_damaged_one_falls_back_to_the_one_before(checkpoints: Checkpoints, damage: str) -> None:
    save(checkpoints, 1)
    save(checkpoints, 2)
    file = checkpoints.folder / "report-00000002/state.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    match damage:
        case "flipped":
            file.write_bytes(bytes(data))
        case "cut":
            file.write_bytes(bytes(data[:100]))
        case "empty":
            file.write_bytes(b"")
        case _:
            file.delete()
    said: list[str] = []
    newest = checkpoints.newest(said.append)
    assert newest is not None and newest.report == 1
    assert len(said) == 1 and "report-00000002 is damaged and left out" in said[0]


def test_one_without_its_hash_was_never_finished(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    save(checkpoints, 2)
    (checkpoints.folder / "report-00000002/state.sha256").delete()
    newest = checkpoints.newest()
    assert newest is not None and newest.report == 1
    save(checkpoints, 2)  # the same report, done again after the restart
    newest = checkpoints.newest()
    assert newest is not None and newest.report == 2


def test_only_damaged_ones_are_no_reason_to_start_anew(checkpoints: Checkpoints) -> None:
    save(checkpoints, 1)
    (checkpoints.folder / "report-00000001/state.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"every checkpoint is damaged .*delete this folder to train from the start"):
        checkpoints.newest()


def test_a_state_that_could_not_be_read_back_is_refused_at_once(checkpoints: Checkpoints) -> None:
    with pytest.raises(TypeError, match="holds what a checkpoint may not hold"):
        checkpoints.save(1, {"where": Path("/")}, [])
    assert not checkpoints.folder.exists()


def test_no_code_runs_when_a_checkpoint_is_read(checkpoints: Checkpoints) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("code of a checkpoint ran",))

    stream = io.BytesIO()
    torch.save({"report": 1, "state": Evil(), "history": []}, stream)
    place = checkpoints.folder / "report-00000001"
    (place / "state.pt").write_bytes(stream.getvalue())
    (place / "state.sha256").write_bytes(sha256_of(stream.getvalue()).encode())
    with pytest.raises(UserError, match="damaged"):
        checkpoints.newest()


def test_a_result_is_the_last_state_or_an_error(checkpoints: Checkpoints) -> None:
    result = FitResult({}, [], checkpoints)
    with pytest.raises(RuntimeError, match="ended without reporting a state"):
        result.load()
    save(checkpoints, 1)
    save(checkpoints, 2)
    assert result.load()["epoch"] == 2
    (checkpoints.folder / "report-00000002/state.pt").write_bytes(b"x")
    with pytest.raises(RuntimeError, match=r"report-00000002 is damaged.*run the same command again"):
        result.load()


def test_a_local_session_resumes_with_its_history(tmp_path: Path) -> None:
    first = LocalSession(Location.of(tmp_path))
    assert first.restore() is None
    first.report({"loss": 2.0}, {"epoch": 1})
    first.report({"loss": 1.0}, None)
    first.progress(7, loss=1.0)
    assert (first.done, first.metrics) == (7, {"loss": 1.0})
    second = LocalSession(Location.of(tmp_path))
    assert second.restore() == {"epoch": 1}
    assert second.history == [{"loss": 2.0}]  # what came after the checkpoint will be reported again
