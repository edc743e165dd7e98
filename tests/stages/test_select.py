"""select: which frames, in which order, with what evidence, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nightseg.frames.table import FRAME_SCHEMA, check_frames, frame_table
from nightseg.frames.vectors import vector_column
from nightseg.measures.frechet import frechet_distance
from nightseg.progress import SilentProgress
from nightseg.stages import select as stage
from nightseg.storage import UserError
from nightseg.workspace import Commit, Workspace

RNG = np.random.default_rng(0)
DIMS = 4
NEAR = RNG.normal(0, 1, (6, DIMS))
FAR = RNG.normal(8, 1, (10, DIMS))
POOL = np.concatenate([FAR, NEAR]).astype(np.float32)
REFERENCE = RNG.normal(0, 1, (30, DIMS)).astype(np.float32)


def frames_of(count: int, name: str = "pool") -> pa.Table:
    return frame_table(
        {"frame_id": f"{name}/{i:02d}", "uri": f"/data/{name}/{i:02d}.png", "sha256": f"{name}-{i}", "domain": "night"}
        for i in range(count)
    )


def scored(tmp_path: Path, frames: pa.Table, features: np.ndarray, name: str = "pool", **summary: Any) -> Commit:
    """A commit as the stage `score` makes it; histograms: frame i has all its light in bin i."""
    node = Workspace(tmp_path / "run").stage("score", name, version=1, recipe=summary, inputs={}, seed=0)
    attempt = node.open()
    histograms = np.eye(64, dtype=np.float32)[np.arange(len(features)) % 64]
    table = frames.select(["frame_id", "sha256"])
    table = table.append_column("features", vector_column(features.astype(np.float32)))
    (attempt.folder / "features.parquet").write_table(table.append_column("histogram", vector_column(histograms)))
    made = {"extractor": "x", "dims": DIMS, "resize": "clean", "weights_sha256": "ab"} | summary
    return attempt.finish(rows_in=len(features), rows_out=len(features), outputs=["features.parquet"], summary=made)


def chosen(tmp_path: Path, method: str = "pooled", count: int = 6, **settings: Any) -> Commit:
    pool = settings.pop("pool", frames_of(len(POOL)))
    pool_scores = settings.pop("pool_scores", None) or scored(tmp_path, pool, POOL)
    if "reference" in settings:
        reference = settings.pop("reference")
    else:
        reference = scored(tmp_path, frames_of(len(REFERENCE), "reference"), REFERENCE, "reference")
    seed = settings.pop("seed", 0)
    node = Workspace(tmp_path / "run").stage(
        "select", method, version=stage.VERSION, recipe={"count": count}, inputs={}, seed=seed
    )
    return stage.select(
        pool,
        pool_scores,
        reference,
        method=method,  # type: ignore[arg-type]
        count=count,
        seed=seed,
        attempt=node.open(),
        progress=SilentProgress(),
        **settings,
    )


def ids(commit: Commit) -> list[str]:
    return list(commit.table("frames")["frame_id"].to_pylist())


def test_pooled_takes_the_near_ones_best_first(tmp_path: Path) -> None:
    commit = chosen(tmp_path)
    frames = commit.table("frames")
    check_frames(frames)
    assert frames.schema.names == [*FRAME_SCHEMA.names, "rank", "score"]
    assert set(ids(commit)) == {f"pool/{i:02d}" for i in range(10, 16)}
    assert frames["rank"].to_pylist() == [1, 2, 3, 4, 5, 6]
    scores = frames["score"].to_pylist()
    assert scores == sorted(scores)
    row = int(ids(commit)[0][-2:])
    reference = REFERENCE.astype(np.float64)
    known = frechet_distance(POOL[row], np.zeros((DIMS, DIMS)), reference.mean(0), np.cov(reference.T))
    assert scores[0] == pytest.approx(known)


def test_every_frame_keeps_its_score(tmp_path: Path) -> None:
    commit = chosen(tmp_path)
    scores = commit.table("scores")
    assert scores["frame_id"].to_pylist() == [f"pool/{i:02d}" for i in range(16)]
    ranks = [rank for rank in scores["rank"].to_pylist() if rank is not None]
    assert sorted(ranks) == [1, 2, 3, 4, 5, 6]
    assert (commit.rows_in, commit.rows_out) == (16, 16)


def test_evidence_compares_with_chance(tmp_path: Path) -> None:
    evidence = chosen(tmp_path).json("evidence.json")
    fid = evidence["fid"]
    assert fid["random_draws"] == 20 and fid["random_sd"] > 0
    assert fid["selection"] < fid["random_mean"] - 2 * fid["random_sd"]
    near, reference = POOL[10:].astype(np.float64), REFERENCE.astype(np.float64)
    sides = near.mean(0), np.cov(near.T), reference.mean(0), np.cov(reference.T)
    assert fid["selection"] == pytest.approx(frechet_distance(*sides), rel=1e-9)
    assert sum(evidence["scores"]["pool"]) == 16 and sum(evidence["scores"]["chosen"]) == 6
    assert len(evidence["scores"]["edges"]) == 41
    assert evidence["cut"] == evidence["last_chosen"][-1]["score"] <= evidence["first_left_out"][0]["score"]
    assert evidence["best"][0]["uri"].startswith("/data/pool/")
    assert evidence["worst"][-1]["score"] == max(example["score"] for example in evidence["worst"])
    assert (evidence["pool"], evidence["count"], evidence["reference"]) == (16, 6, 30)


def test_histogram_takes_the_same_light(tmp_path: Path) -> None:
    histograms = frames_of(3, "reference")
    reference = scored(tmp_path, histograms, REFERENCE[:3], "reference")
    commit = chosen(tmp_path, "histogram", 3, reference=reference)
    # Light in bins 0, 1 and 2 on average: the middle one is nearest, then its neighbours in order of id.
    assert ids(commit) == ["pool/01", "pool/00", "pool/02"]


def test_random_follows_the_seed_and_needs_no_reference(tmp_path: Path) -> None:
    one = chosen(tmp_path / "1", "random", seed=1, reference=None)
    again = chosen(tmp_path / "2", "random", seed=1, reference=None)
    other = chosen(tmp_path / "3", "random", seed=2, reference=None)
    assert ids(one) == ids(again) != ids(other)
    assert one.json("evidence.json")["fid"]["selection"] is None
    measured = chosen(tmp_path / "4", "random", seed=1)
    assert ids(measured) == ids(one) and measured.json("evidence.json")["fid"]["selection"] > 0


def test_the_same_work_gives_the_same_bytes(tmp_path: Path) -> None:
    assert chosen(tmp_path / "1").content == chosen(tmp_path / "2").content


def test_the_whole_pool_and_a_single_frame(tmp_path: Path) -> None:
    everything = chosen(tmp_path, count=16).json("evidence.json")["fid"]
    assert everything["selection"] == pytest.approx(everything["pool"]) == pytest.approx(everything["random_mean"])
    single = chosen(tmp_path, count=1).json("evidence.json")
    assert single["fid"]["selection"] is None and single["fid"]["pool"] > 0 and len(single["best"]) == 8


def test_equal_scores_go_by_name(tmp_path: Path) -> None:
    pool = frames_of(4)
    scores = scored(tmp_path, pool, np.ones((4, DIMS)))
    assert ids(chosen(tmp_path, count=3, pool=pool, pool_scores=scores)) == ["pool/00", "pool/01", "pool/02"]


def test_frames_that_were_not_scored_are_not_chosen(tmp_path: Path) -> None:
    scores = scored(tmp_path, frames_of(16).slice(0, 12), POOL[:12])
    commit = chosen(tmp_path, count=12, pool_scores=scores)
    assert set(ids(commit)) == {f"pool/{i:02d}" for i in range(12)}


# -- refusals --------------------------------------------------------------------------------------------------------


def test_more_than_the_pool(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the pool has 16 frames, 17 were asked for"):
        chosen(tmp_path, count=17)


def test_no_reference(tmp_path: Path) -> None:
    for method in ("pooled", "histogram"):
        with pytest.raises(UserError, match="needs a reference"):
            chosen(tmp_path, method, reference=None)
    one = scored(tmp_path, frames_of(1, "one"), REFERENCE[:1], "one")
    with pytest.raises(UserError, match="at least 2 frames"):
        chosen(tmp_path, reference=one)


@pytest.mark.parametrize("what", ["extractor", "resize", "weights_sha256"])
def test_another_extractor(tmp_path: Path, what: str) -> None:
    reference = scored(tmp_path, frames_of(30, "reference"), REFERENCE, "reference", **{what: "other"})
    with pytest.raises(UserError, match=f"their {what} differs"):
        chosen(tmp_path, reference=reference)


def test_a_reference_with_a_test_frame(tmp_path: Path) -> None:
    tests = {"night": frames_of(3, "reference"), "clean": frames_of(3, "elsewhere")}
    with pytest.raises(UserError, match=r"holds 3 frames of the test set 'night', first reference/00"):
        chosen(tmp_path, test_frames=tests)


def test_a_reference_made_from_a_test_frame(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="test set 'night'"):
        chosen(tmp_path, reference_frames=frames_of(4, "source"), test_frames={"night": frames_of(1, "source")})


def test_tests_that_share_nothing_pass_and_a_shared_pool_is_stated(tmp_path: Path) -> None:
    nameless = frame_table([{"frame_id": "t", "uri": "/t.png"}])
    commit = chosen(tmp_path, test_frames={"a": frames_of(2, "pool"), "b": frames_of(2, "elsewhere"), "c": nameless})
    assert commit.json("evidence.json")["shared_with_tests"] == {"a": 2, "b": 0, "c": 0}
