"""split: the pass over the frames, the verdict on all of them together, and the evidence that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from nightseg.cluster.settings import MapCompute
from nightseg.data.day_night import luminance_histogram
from nightseg.data.images import encode_png
from nightseg.data.table import FRAME_SCHEMA, check_frames, frame_table, vectors
from nightseg.progress import SilentProgress
from nightseg.stages import split as stage
from nightseg.storage import Commit, UserError, Workspace


def street(kind: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    sky, ground = {"day": (200, 100), "night": (12, 60)}[kind]
    image = np.full((48, 64, 3), ground) + rng.normal(0, 12, (48, 64, 3))
    image[:16] += sky - ground
    image[rng.integers(16, 48, 40), rng.integers(0, 64, 40)] = 255
    return np.clip(image * [1.0, 0.95, 0.85], 0, 255).astype(np.uint8)


def pool_of(folder: Path, kinds: Mapping[str, str]) -> pa.Table:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed, (name, kind) in enumerate(kinds.items()):
        file = folder / f"{name}.png"
        file.write_bytes(b"" if kind == "broken" else encode_png(street(kind, seed)))
        rows.append({"frame_id": f"pool/{name}", "uri": str(file), "dataset": "pool", "domain": "unknown"})
    return frame_table(rows)


def done(
    tmp_path: Path,
    pool: pa.Table,
    *,
    margin: float = 0.2,
    shard_rows: int = 4,
    bad: float = 1.0,
    actors: int = 0,
) -> Commit:
    run = f"run-{margin}-{shard_rows}"
    node = Workspace(tmp_path / run).stage("split", "pool", version=stage.VERSION, recipe={}, inputs={}, seed=0)
    return stage.split(
        pool,
        margin=margin,
        attempt=node.open(),
        progress=SilentProgress(),
        compute=MapCompute(actors=actors, shard_rows=shard_rows, cpus_per_actor=0.5),
        max_bad_fraction=bad,
    )


def sureness(row: Mapping[str, float]) -> float:
    return -row["margin"]


MIXED = {f"d{i}": "day" for i in range(6)} | {f"n{i}": "night" for i in range(5)}


def check_mixed(commit: Commit) -> None:
    frames = commit.table("frames")
    check_frames(frames)
    assert frames.schema.names == [*FRAME_SCHEMA.names, "score", "margin"]
    assert frames["domain"].to_pylist() == ["day"] * 6 + ["night"] * 5
    assert all(
        (score > 0) == (kind == "day") for score, kind in zip(frames["score"].to_pylist(), MIXED.values(), strict=True)
    )
    assert commit.summary == {"domains": {"day": 6, "night": 5}}
    assert (commit.rows_in, commit.rows_out, commit.quarantined) == (11, 11, 0)


def test_a_pool_comes_apart_with_evidence(tmp_path: Path) -> None:
    commit = done(tmp_path, pool_of(tmp_path / "pool", MIXED))
    check_mixed(commit)
    evidence = commit.json("evidence.json")
    assert evidence["counts"] == {"day": 6, "night": 5} and evidence["margin"] == 0.2
    for name in ("day", "night"):
        assert len(evidence["histograms"][name]) == 64 and sum(evidence["histograms"][name]) == pytest.approx(
            1, abs=1e-4
        )
        assert sum(evidence["scores"]["counts"][name]) == evidence["counts"][name]
        assert all(example["domain"] == name for example in evidence["examples"][name])
    assert len(evidence["scores"]["edges"]) == 41
    margins = [abs(example["margin"] - 0.2) for example in evidence["borderline"]]
    assert margins == sorted(margins) and len(margins) == 8
    assert evidence["borderline"][0].keys() == {"frame_id", "uri", "domain", "score", "margin"}
    for name in ("day", "night"):
        surest = sorted((row for row in commit.table("frames").to_pylist() if row["domain"] == name), key=sureness)
        assert [row["frame_id"] for row in surest] == [row["frame_id"] for row in evidence["examples"][name]]
    assert evidence["examples"]["twilight"] == [] and evidence["centres"].keys() == {"day", "night", "dusk"}
    assert all(len(centre["upper"]) == len(centre["lower"]) == 10 for centre in evidence["centres"].values())
    seen = commit.table("histograms")
    expected = luminance_histogram(street("day", 0))
    bands = vectors(seen["bands"])[0].reshape(2, 64)
    np.testing.assert_allclose(bands[0] / 3 + bands[1] * 2 / 3, expected, atol=1e-6)


def test_shards_change_nothing(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", MIXED)
    one, other = done(tmp_path, pool, shard_rows=100), done(tmp_path, pool, shard_rows=3)
    assert one.table("frames").equals(other.table("frames"))
    assert one.json("evidence.json") == other.json("evidence.json")


def test_a_broken_frame_is_quarantined_and_the_rest_is_split(tmp_path: Path) -> None:
    commit = done(tmp_path, pool_of(tmp_path / "pool", {"a": "day", "b": "broken", "c": "night", "d": "broken"}))
    assert commit.table("frames")["frame_id"].to_pylist() == ["pool/a", "pool/c"]
    assert commit.table("frames")["domain"].to_pylist() == ["day", "night"]
    bad = commit.table("quarantine").to_pylist()
    assert [(row["frame_id"], row["reason"]) for row in bad] == [("pool/b", "zero_bytes"), ("pool/d", "zero_bytes")]
    assert (commit.rows_in, commit.rows_out, commit.quarantined) == (4, 2, 2)


def test_no_good_frame_at_all(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", {"a": "broken", "b": "broken"})
    commit = done(tmp_path, pool)
    assert commit.rows_out == 0 and commit.json("evidence.json")["counts"] == {}
    with pytest.raises(UserError, match="zero_bytes"):
        done(tmp_path, pool, margin=0.3, bad=0.5)


def test_an_empty_pool_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no frame to split"):
        done(tmp_path, frame_table([]))


def test_a_wide_margin_makes_twilight(tmp_path: Path) -> None:
    commit = done(tmp_path, pool_of(tmp_path / "pool", MIXED), margin=1.0)
    assert set(commit.table("frames")["domain"].to_pylist()) == {"twilight"}


@pytest.mark.ray
def test_through_ray(ray_cluster: None, tmp_path: Path) -> None:
    check_mixed(done(tmp_path, pool_of(tmp_path / "pool", MIXED), actors=1))
