"""select: which frames, in which order, with what evidence, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nightseg.data.table import FRAME_SCHEMA, check_frames, frame_table, quarantine_table, vector_column
from nightseg.progress import SilentProgress
from nightseg.selection.frechet import frechet_distance
from nightseg.selection.settings import METHODS, Selection
from nightseg.stages import select as stage
from nightseg.storage import Commit, UserError, Workspace

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
    if (spatial := summary.pop("spatial", None)) is not None:
        table = table.append_column("spatial", pa.array(spatial, pa.float64()))
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
    limits = {key: settings.pop(key) for key in ("quota", "gap", "duplicates") if key in settings}
    node = Workspace(tmp_path / "run").stage(
        "select", method, version=stage.VERSION, recipe={"count": count}, inputs={}, seed=seed
    )
    return stage.select(
        pool,
        pool_scores,
        reference,
        selection=Selection(method=method, count=count, **limits),
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
    commit = chosen(tmp_path)
    evidence, scores = commit.json("evidence.json"), commit.table("scores").to_pylist()
    left_out = sorted(row["score"] for row in scores if row["rank"] is None)
    assert [example["score"] for example in evidence["first_left_out"]] == left_out[:8] != left_out[-8:]
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
    assert (evidence["method"], evidence["extractor"], evidence["resize"]) == ("pooled", "x", "clean")
    assert evidence["rules"] == {"quota": None, "gap": None, "duplicates": None}
    assert evidence.keys() == {
        *("method", "count", "pool", "duplicates", "rules", "extractor", "resize"),
        *("reference", "fid", "curve", "plane", "scores", "cut", "best", "last_chosen", "first_left_out", "worst"),
    }
    assert fid.keys() == {
        *("selection", "selection_biased", "lower_bound", "random_mean", "random_sd", "random_draws", "pool")
    }
    assert commit.summary == {"method": "pooled", "chosen": 6, "pool": 16, "fid": fid}
    assert commit.seconds > 0 and evidence["curve"]["counts"] == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]
    by_score = [row["frame_id"] for row in sorted(scores, key=lambda row: row["score"])]
    assert [example["frame_id"] for example in evidence["best"]] == by_score[:8]
    assert [example["frame_id"] for example in evidence["worst"]] == by_score[-8:]
    assert [example["frame_id"] for example in evidence["last_chosen"]] == ids(commit)


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


def test_spatial_goes_by_what_the_score_stage_left(tmp_path: Path) -> None:
    pool = frames_of(4)
    made = scored(tmp_path, pool, POOL[:4], spatial=[3.0, 1.0, 2.0, 1.0])
    commit = chosen(tmp_path, "spatial", 3, pool=pool, pool_scores=made)
    assert ids(commit) == ["pool/01", "pool/03", "pool/02"]
    assert commit.table("scores")["spatial"].to_pylist() == [3.0, 1.0, 2.0, 1.0]


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"histogram", "random", "spatial"}))  # which see no features
def test_other_methods_take_the_near_ones_too(tmp_path: Path, method: str) -> None:
    commit = chosen(tmp_path, method)
    assert set(ids(commit)) == {f"pool/{i:02d}" for i in range(10, 16)}
    evidence = commit.json("evidence.json")
    certified = method == "fid-subset"
    assert (evidence["fid"]["lower_bound"] is not None) == certified
    if certified:
        assert 0 <= evidence["fid"]["lower_bound"] <= evidence["fid"]["selection_biased"]


def test_the_certificate_holds_for_every_other_method(tmp_path: Path) -> None:
    best = chosen(tmp_path / "best", "fid-subset", 8).json("evidence.json")["fid"]
    reference = REFERENCE.astype(np.float64)
    scores = scored(tmp_path, frames_of(len(POOL)), POOL, spatial=list(map(float, range(16))))
    for method in sorted(METHODS.keys() - {"fid-subset"}):
        rows = [int(name[-2:]) for name in ids(chosen(tmp_path / method, method, 8, pool_scores=scores))]
        part = POOL[rows].astype(np.float64)
        fid = frechet_distance(part.mean(0), np.cov(part.T, bias=True), reference.mean(0), np.cov(reference.T))
        assert fid >= best["lower_bound"] - 1e-9
        assert fid >= best["selection_biased"] - 1e-9


def test_all_scores_and_the_evidence_to_see(tmp_path: Path) -> None:
    commit = chosen(tmp_path)
    scores = commit.table("scores")
    assert {"pooled", "mahalanobis", "histogram", "influence"} <= set(scores.column_names)
    assert scores["pooled"].to_pylist() == pytest.approx(scores["score"].to_pylist())
    evidence = commit.json("evidence.json")
    assert evidence["curve"]["counts"][-1] == 16
    assert evidence["curve"]["fid"][-1] == pytest.approx(evidence["fid"]["pool"])
    points = evidence["plane"]["points"]
    assert [len(points[name]) for name in ("pool", "chosen", "reference")] == [16, 6, 30]


def drives(sequences: list[str | None]) -> pa.Table:
    pool = frames_of(len(sequences))
    column = pool.schema.get_field_index("sequence")
    return pool.set_column(column, "sequence", pa.array(sequences, pa.string()))


def test_rules_about_sequences(tmp_path: Path) -> None:
    pool = drives(["a"] * 8 + ["b"] * 6 + [None] * 2)
    of = dict(zip(pool["frame_id"].to_pylist(), pool["sequence"].to_pylist(), strict=True))
    quota = ids(chosen(tmp_path / "1", count=6, pool=pool, quota=2))
    assert sum(of[name] == "b" for name in quota) == 2
    gap = ids(chosen(tmp_path / "2", count=6, pool=pool, gap=3))
    for drive in "ab":
        places = sorted(int(name[-2:]) for name in gap if of[name] == drive)
        assert all(later - earlier >= 3 for earlier, later in itertools.pairwise(places))
    with pytest.raises(UserError, match="no frame of the pool has one"):
        chosen(tmp_path / "3", quota=2)
    with pytest.raises(UserError, match="`gap` 9 leaves room for 4 frames"):
        chosen(tmp_path / "4", pool=pool, gap=9)


def test_near_duplicates_are_left_out_and_named(tmp_path: Path) -> None:
    pool = frames_of(16)
    features = POOL.copy()
    features[12] = 2 * features[11]
    scores = scored(tmp_path, pool, features)
    commit = chosen(tmp_path, count=5, pool=pool, pool_scores=scores, duplicates=0.9999)
    assert "pool/12" not in ids(commit)
    table = {row["frame_id"]: row for row in commit.table("scores").to_pylist()}
    assert table["pool/12"]["repeats"] == "pool/11" and table["pool/12"]["score"] is None
    assert commit.json("evidence.json")["duplicates"] == 1
    with pytest.raises(UserError, match=r"`duplicates` 0.9999 leaves 15 of 16 frames"):
        chosen(tmp_path / "2", count=16, pool=pool, pool_scores=scores, duplicates=0.9999)


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
    for method in sorted(METHODS.keys() - {"random"}):
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


def test_a_set_whose_frames_are_all_broken_is_named(tmp_path: Path) -> None:
    node = Workspace(tmp_path / "run").stage("score", "reference", version=1, recipe={}, inputs={}, seed=0)
    attempt = node.open()
    bad = [{"frame_id": "a", "uri": "/a.png", "reason": "not_an_image", "detail": ""}]
    (attempt.folder / "quarantine.parquet").write_table(quarantine_table(bad))
    broken = attempt.finish(rows_in=1, rows_out=0, quarantined=1, max_bad_fraction=1.0, outputs=["quarantine.parquet"])
    for method in METHODS:
        with pytest.raises(UserError, match="reference: none of its 1 frames could be read: not_an_image"):
            chosen(tmp_path / method, method, reference=broken)


def test_places_in_a_drive_follow_the_numbers_in_the_ids(tmp_path: Path) -> None:
    pool = frame_table({"frame_id": f"a/{i}", "uri": f"/{i}.png", "sha256": f"{i}", "sequence": "a"} for i in range(12))
    made = scored(tmp_path, pool, POOL[:12])
    commit = chosen(tmp_path, count=6, pool=pool, pool_scores=made, gap=2)
    places = sorted(int(name[2:]) for name in ids(commit))
    assert all(later - earlier >= 2 for earlier, later in itertools.pairwise(places))
