"""Places in a run folder, and in what a trial borrows, hold wherever these lie."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from nightseg.storage import Location, Workspace
from nightseg.storage.portable import absolute, absolute_json, portable, portable_json

ODD = "/data/a b+(c)[d]{2}^$|*?'\"é\\-~#"  # what a regular expression takes for more than it is


@pytest.mark.parametrize("base", ["/data", ODD, "s3://bucket/searches"])
def test_places_of_a_trial_go_with_its_search_and_others_stay(base: str) -> None:
    root = Location(f"{base}/alpha/trials/t1")
    stored = {
        f"{base}/alpha/trials/t1/stages/score/a/k/frames.parquet": "run:stages/score/a/k/frames.parquet",
        f"{base}/alpha/shared/stages/collect/day/k/x.png": "search:shared/stages/collect/day/k/x.png",
        f"{base}/alpha/trials/t2/stages/select/a/k/y.png": "search:trials/t2/stages/select/a/k/y.png",
    }
    same = [  # frames that lie in such folders by chance
        f"{base}/alpha/trials/t2/x.png",
        f"{base}/alpha/shared/x.png",
        f"{base}/alpha/shared/other/stages/x.png",
        f"{base}/alpha/more/stages/x.png",
        f"{base}x/alpha/shared/stages/x.png",
        "relative/x.png",
        "",
        None,
    ]
    table = pa.table({"uri": [*stored, *same], "label_uri": [*same, *stored], "frame_id": [*stored, *same]})
    put = portable(table, root)
    assert put["uri"].to_pylist() == [*stored.values(), *same]
    assert put["label_uri"].to_pylist() == [*same, *stored.values()]
    assert put["frame_id"].to_pylist() == table["frame_id"].to_pylist(), "no place"
    assert absolute(put, root).equals(table)
    json = {"a": [*stored], "b": {"c": same}}
    assert portable_json(json, root) == {"a": [*stored.values()], "b": {"c": same}}
    assert absolute_json(portable_json(json, root), root) == json
    moved = absolute(put, Location("/elsewhere/beta/trials/t1"))["uri"].to_pylist()
    assert moved[1] == "/elsewhere/beta/shared/stages/collect/day/k/x.png" and moved[3:] == same


def test_a_run_that_is_no_trial_keeps_places_of_others_as_they_are() -> None:
    root = Location("/data/runs/mine")
    other = "/data/runs/shared/stages/a/x.png"
    assert portable_json([other, "/data/runs/mine/x", "/data/runs/mine2/x"], root) == [
        other, "run:x", "/data/runs/mine2/x",
    ]  # fmt: skip


def test_what_a_trial_has_committed_of_borrowed_frames_is_found_after_a_move(tmp_path: Path) -> None:
    shared, trial = (Workspace(Location.of(tmp_path / "old" / name)) for name in ("shared", "trials/t1"))
    lent = shared.stage("collect", "day", version=1, recipe={}, inputs={}, seed=0).open()
    (lent.folder / "x.png").write_bytes(b"a frame")
    lent.finish(rows_in=1, rows_out=1, outputs=["x.png"], seconds=0.0)
    frame = (lent.folder / "x.png").uri
    attempt = trial.stage("select", "m", version=1, recipe={}, inputs={}, seed=0).open()
    frames = attempt.write_table("frames", pa.table({"uri": [frame]}))
    commit = attempt.finish(rows_in=1, rows_out=1, outputs=[frames], seconds=0.0)
    assert commit.table("frames")["uri"].to_pylist() == [frame]
    (tmp_path / "old").rename(tmp_path / "new")
    (found,) = Workspace(Location.of(tmp_path / "new/trials/t1")).commits()
    (uri,) = found.table("frames")["uri"].to_pylist()
    assert uri == frame.replace("/old/", "/new/") and Location.of(uri).read_bytes() == b"a frame"
