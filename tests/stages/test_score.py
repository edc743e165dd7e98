"""score: one feature vector and histogram a frame, statistics of all, and the distance of two sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from nightseg.cluster.settings import MapCompute
from nightseg.data.day_night import luminance_histogram
from nightseg.data.table import frame_table, vectors
from nightseg.progress import SilentProgress
from nightseg.selection.features import Extractor, build_extractor
from nightseg.selection.frechet import read_statistics, spatial_reference, spatial_scores
from nightseg.selection.settings import Extraction
from nightseg.stages import score as stage
from nightseg.storage import Commit, UserError, Workspace
from tests.frames_on_disk import folder_of, image

LITE0 = "efficientnet_lite0"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scored(tmp_path: Path, frames: pa.Table, shard_rows: int = 3, actors: int = 0, **settings: Any) -> Commit:
    node = Workspace(tmp_path / f"run{shard_rows}").stage(
        "score", "d", version=stage.VERSION, recipe={}, inputs={}, seed=0
    )
    asked = {key: settings.pop(key) for key in ("name", "weights", "mode") if key in settings}
    extraction = Extraction(**{"name": LITE0} | asked)
    settings = {"max_bad_fraction": 1.0} | settings
    return stage.score(
        frames,
        extraction,
        attempt=node.open(),
        progress=SilentProgress(),
        compute=MapCompute(actors=actors, shard_rows=shard_rows, batch=2, cpus_per_actor=0.5),
        **settings,
    )


def check(commit: Commit, frames: pa.Table) -> None:
    table = commit.table("features")
    assert table["frame_id"].to_pylist() == frames["frame_id"].to_pylist()
    assert table["sha256"].to_pylist() == frames["sha256"].to_pylist()
    features = vectors(table["features"])
    assert features.shape == (frames.num_rows, 1280)
    wanted = build_extractor(Extraction(name=LITE0))([image(0), image(1)])
    np.testing.assert_allclose(features[:2], wanted, atol=1e-5 * np.abs(wanted).max())
    histograms = vectors(table["histogram"])
    np.testing.assert_allclose(histograms[1], luminance_histogram(image(1)), atol=1e-7)
    statistics = read_statistics(commit.file("statistics.npz"))
    assert (statistics.count, statistics.extractor, statistics.resize) == (frames.num_rows, LITE0, "clean")
    np.testing.assert_allclose(statistics.mean, features.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(statistics.cov, np.cov(features.astype(np.float64).T), rtol=1e-8, atol=1e-12)
    assert commit.summary.pop("weights_sha256").startswith("57934424")
    assert commit.summary == {"extractor": LITE0, "dims": 1280, "resize": "clean", "precision": "float32"}


def test_features_histograms_and_statistics(tmp_path: Path) -> None:
    frames = folder_of(tmp_path / "d", range(7))
    commit = scored(tmp_path, frames)
    check(commit, frames)
    other = scored(tmp_path, frames, shard_rows=100)
    assert commit.file("statistics.npz").read_bytes() == other.file("statistics.npz").read_bytes()


def test_broken_frames_are_quarantined(tmp_path: Path) -> None:
    commit = scored(tmp_path, folder_of(tmp_path / "d", range(2), broken=2))
    assert commit.table("features")["frame_id"].to_pylist() == ["d/000", "d/001"]
    assert [row["reason"] for row in commit.table("quarantine").to_pylist()] == ["not_an_image"] * 2
    assert (commit.rows_in, commit.rows_out, commit.quarantined) == (4, 2, 2)
    assert read_statistics(commit.file("statistics.npz")).count == 2  # the fewest that have a covariance


def test_one_frame_has_features_but_no_statistics(tmp_path: Path) -> None:
    commit = scored(tmp_path, folder_of(tmp_path / "d", range(1)))
    assert commit.rows_out == 1 and not commit.has("statistics.npz")


def test_nothing_to_score_and_no_weights_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no frame to score"):
        scored(tmp_path, frame_table([]))
    with pytest.raises(UserError, match="no weights file"):
        scored(tmp_path, folder_of(tmp_path / "d", range(1)), name="inception", weights="/absent.pth")


def test_positions_of_a_reference_and_spatial_scores_of_a_pool(tmp_path: Path) -> None:
    near = scored(tmp_path / "near", folder_of(tmp_path / "r", range(5, 9)), positions=True, shard_rows=3)
    extractor = build_extractor(Extraction(name=LITE0))
    _, maps = extractor.with_positions([image(seed) for seed in range(5, 9)])
    everywhere = maps.reshape(-1, 1280).astype(np.float64)
    positions = read_statistics(near.file("positions.npz"))
    assert positions.count == len(everywhere)
    np.testing.assert_allclose(positions.mean, everywhere.mean(0), atol=1e-4)
    np.testing.assert_allclose(positions.cov, np.cov(everywhere.T), rtol=1e-2, atol=1e-3)
    assert not list(Path(near.folder.local).glob("**/positions/*"))

    frames = folder_of(tmp_path / "d", range(4), broken=1)
    pool = scored(tmp_path / "pool", frames, spatial_reference=near)
    table = pool.table("features")
    _, maps = extractor.with_positions([image(seed) for seed in range(4)])
    wanted, error = spatial_scores(maps, spatial_reference(positions.mean, positions.cov))
    np.testing.assert_allclose(table["spatial"].to_numpy(), wanted, rtol=1e-4)
    np.testing.assert_allclose(table["spatial_error"].to_numpy(), error, rtol=1e-2, atol=1e-3)


def test_a_pass_with_positions_that_was_refused_can_be_given_again(tmp_path: Path) -> None:
    frames = folder_of(tmp_path / "r", range(3), broken=1)
    for _ in range(2):
        with pytest.raises(UserError, match="not_an_image"):
            scored(tmp_path, frames, shard_rows=2, positions=True, max_bad_fraction=0.0)
    commit = scored(tmp_path, frames, shard_rows=2, positions=True)
    assert read_statistics(commit.file("positions.npz")).count == 3 * 49


def test_fast_mode_is_decided_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = folder_of(tmp_path / "d", range(2))
    monkeypatch.setattr(Extractor, "faster_precision", lambda self: "bfloat16")
    with pytest.raises(UserError):
        scored(tmp_path, folder_of(tmp_path / "d", range(2), broken=1), mode="fast", max_bad_fraction=0.0)
    monkeypatch.setattr(Extractor, "faster_precision", lambda self: "float32")
    commit = scored(tmp_path, frames, mode="fast")
    assert commit.summary["precision"] == "bfloat16"
    assert read_statistics(commit.file("statistics.npz")).precision == "bfloat16"


def test_files_of_weights_are_part_of_name_and_key(tmp_path: Path) -> None:
    (tmp_path / "one.pth").write_bytes(b"1")
    one, two = (Extraction(name="resnet18", weights=str(tmp_path / name)) for name in ("one.pth", "two.pth"))
    assert len({one.label, two.label, Extraction(name="resnet18").label}) == 3
    first = stage.facts(one)
    (tmp_path / "one.pth").write_bytes(b"2")
    assert first != stage.facts(one) and stage.facts(two)["weights_sha256"] is None
    assert Extraction(name="timm/x", resize="clean", mode="fast").label == "timm-x-clean-fast"


@pytest.mark.ray
def test_through_ray(ray_cluster: None, tmp_path: Path) -> None:
    frames = folder_of(tmp_path / "d", range(4))
    check(scored(tmp_path, frames, actors=1), frames)


def test_a_spatial_reference_without_a_good_frame_is_named(tmp_path: Path) -> None:
    near = scored(tmp_path / "near", folder_of(tmp_path / "r", range(0), broken=2), positions=True)
    with pytest.raises(UserError, match="d: none of its 2 frames could be read"):
        scored(tmp_path / "pool", folder_of(tmp_path / "d", range(2)), spatial_reference=near)
