"""Translation of frames: native size, labels referenced, bad frames quarantined, deterministic files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from nightseg.cluster.settings import MapCompute
from nightseg.data.images import decode_image, encode_png, read_image
from nightseg.data.table import FRAME_SCHEMA, check_frames, frame_table, resolve
from nightseg.networks.model_folder import save_model
from nightseg.progress import SilentProgress
from nightseg.stages import translate as stage
from nightseg.storage import Commit, Location, UserError, Workspace, sha256_of
from nightseg.unit.network import Generators, to_uint8, to_unit_range


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def model_in(folder: Path) -> Location:
    model = Location.of(folder / "model")
    save_model(model, Generators(2, 1).state_dict(), {"kind": "unit", "width": 2, "res_blocks": 1, "shared_blocks": 0})
    return model


def frames(folder: Path, sizes: list[tuple[int, int]]) -> pa.Table:
    rows = []
    for index, (height, width) in enumerate(sizes):
        image = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        file = folder / f"frame {index}.png"
        Location.of(file).write_bytes(encode_png(image))
        row = {"frame_id": f"streets/frame {index}", "uri": str(file), "dataset": "streets", "domain": "day"}
        row |= {"label_uri": f"/labels/{index}.png", "label_encoding": "train_ids", "label_sha256": "f" * 64}
        rows.append(row | {"sequence": "s", "split": "train", "width": width, "height": height, "sha256": "0" * 64})
    return frame_table(rows)


SIZES = [(16, 20), (16, 20), (17, 23), (16, 20), (9, 8)]


def test_a_shard_keeps_sizes_labels_and_order(tmp_path: Path) -> None:
    source, model, out = frames(tmp_path, SIZES), model_in(tmp_path), Location.of(tmp_path / "out")
    tables = stage.TranslateFrames(model, "streets-night", "night", batch=2)(source, out)
    table = tables["frames"]
    assert tables["quarantine"].num_rows == 0
    assert table.schema == FRAME_SCHEMA
    check_frames(table)
    assert table["frame_id"].to_pylist() == [f"streets-night/streets/frame {index}" for index in range(5)]
    assert set(table["domain"].to_pylist()) == {"night"} and set(table["dataset"].to_pylist()) == {"streets-night"}
    for column in ("label_uri", "label_encoding", "label_sha256", "sequence", "split"):
        assert table[column].to_pylist() == source[column].to_pylist()
    generators = stage.load_generators(model)
    for row, before in zip(resolve(table, out).to_pylist(), source.to_pylist(), strict=True):
        assert row["uri"].startswith(str(tmp_path / "out" / "images")) and row["uri"].endswith(".png")
        data = Location.of(row["uri"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(data), sha256_of(data))
        image = decode_image(data)
        assert image.shape[:2] == (row["height"], row["width"]) == (before["height"], before["width"])
        with torch.no_grad():
            alone = read_image(Location.of(before["uri"]))
            made = generators.translate(to_unit_range(torch.from_numpy(alone).permute(2, 0, 1)[None]), "night")
        assert np.abs(image.astype(int) - to_uint8(made)[0].permute(1, 2, 0).numpy()).max() <= 1


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    source, model = frames(tmp_path, SIZES), model_in(tmp_path)
    tables = [
        stage.TranslateFrames(model, "n", "night", batch=2)(source, Location.of(tmp_path / folder))["frames"]
        for folder in ("first", "second")
    ]
    assert tables[0].equals(tables[1])
    other = stage.TranslateFrames(model, "n", "day", batch=2)(source, Location.of(tmp_path / "third"))["frames"]
    assert other["sha256"] != tables[0]["sha256"]


def test_a_sequence_does_not_flicker(tmp_path: Path) -> None:
    """Nothing is drawn: a frame becomes the same image wherever it stands, alone or in a batch, in any shard."""
    source, model = frames(tmp_path, [(16, 20)] * 5), model_in(tmp_path)
    still = (tmp_path / "frame 0.png").read_bytes()
    for index in (2, 4):
        (tmp_path / f"frame {index}.png").write_bytes(still)
    torch.manual_seed(7)
    together = stage.TranslateFrames(model, "n", "night", batch=5)(source, Location.of(tmp_path / "a"))["frames"]
    torch.manual_seed(8)
    alone = [
        stage.TranslateFrames(model, "n", "night", batch=1)(source.slice(index), Location.of(tmp_path / "b"))["frames"]
        for index in (0, 2, 4)
    ]
    images = [read_image(Location.of(tmp_path / "a") / together["uri"][index].as_py()) for index in (0, 2, 4)]
    images += [read_image(Location.of(tmp_path / "b") / table["uri"][0].as_py()) for table in alone]
    assert all(np.array_equal(image, images[0]) for image in images)


def test_large_frames_go_through_in_tiles(tmp_path: Path) -> None:
    sizes = [(100, 84), (84, 84), (100, 203)]
    source, model, out = frames(tmp_path, sizes), model_in(tmp_path), Location.of(tmp_path / "out")
    worker = stage.TranslateFrames(model, "n", "night", batch=4, tile=(84, 84))
    seen: list[tuple[int, int]] = []
    for part in (worker.generators.day_encoder, worker.generators.night_encoder):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    table = worker(source, out)["frames"]
    assert set(seen) == {(84, 84)} and len(seen) == 2 + 1 + 2 * 4  # rows x columns, 204 pixels being 4 tiles of 84
    for row, (height, width) in zip(resolve(table, out).to_pylist(), sizes, strict=True):
        assert read_image(Location.of(row["uri"])).shape == (height, width, 3)
    whole = stage.TranslateFrames(model, "n", "night", batch=1)(source, Location.of(tmp_path / "whole"))["frames"]
    same = [
        first == second for first, second in zip(table["sha256"].to_pylist(), whole["sha256"].to_pylist(), strict=True)
    ]
    assert same == [False, True, False]


def test_grey_frames_are_translated_as_colour(tmp_path: Path) -> None:
    source = frames(tmp_path, [(16, 20)])
    grey = np.random.default_rng(0).integers(0, 256, (16, 20), dtype=np.uint8)
    (tmp_path / "frame 0.png").write_bytes(encode_png(grey))
    worker = stage.TranslateFrames(model_in(tmp_path), "n", "night", batch=1)
    tables = worker(source, Location.of(tmp_path / "out"))
    assert tables["quarantine"].num_rows == 0
    made = read_image(Location.of(tmp_path / "out") / tables["frames"]["uri"][0].as_py())
    expected = worker.translate([np.stack([grey] * 3, axis=2)])[0]
    assert made.shape == (16, 20, 3) and np.array_equal(made, expected)


def test_batches_stay_below_their_size_and_the_pixel_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, worker = frames(tmp_path, [(16, 20)] * 5), stage.TranslateFrames(model_in(tmp_path), "n", "night", batch=8)
    assert [len(group) for group in worker._groups(source.to_pylist(), [])] == [5]
    worker.batch = 2
    assert [len(group) for group in worker._groups(source.to_pylist(), [])] == [2, 2, 1]
    worker.batch = 8
    monkeypatch.setattr(stage, "PIXELS_AT_ONCE", 2 * 16 * 20)
    assert [len(group) for group in worker._groups(source.to_pylist(), [])] == [2, 2, 1]
    monkeypatch.setattr(stage, "PIXELS_AT_ONCE", 1)
    assert [len(group) for group in worker._groups(source.to_pylist(), [])] == [1] * 5


def test_frames_that_have_gone_bad_are_quarantined(tmp_path: Path) -> None:
    source = frames(tmp_path, [(16, 20), (16, 20), (4, 20), (16, 20)])
    (tmp_path / "frame 0.png").unlink()
    (tmp_path / "frame 1.png").write_bytes(b"no image")
    worker = stage.TranslateFrames(model_in(tmp_path), "n", "night", batch=4)
    tables = worker(source, Location.of(tmp_path / "out"))
    assert tables["frames"]["frame_id"].to_pylist() == ["n/streets/frame 3"]
    bad = tables["quarantine"].to_pylist()
    assert [(row["frame_id"], row["reason"]) for row in bad] == [
        ("streets/frame 0", "missing"),
        ("streets/frame 1", "not_an_image"),
        ("streets/frame 2", "not_an_image"),
    ]


def run(folder: Path, source: pa.Table, to: stage.Domain, tile: tuple[int, int] | None = None) -> Commit:
    workspace = Workspace(folder / "run")
    parent = workspace.stage("train_translator", "unit", version=1, recipe={}, inputs={}, seed=0).open()
    save_model(
        parent.folder / "model",
        Generators(2, 1).state_dict(),
        {"kind": "unit", "width": 2, "res_blocks": 1, "shared_blocks": 0},
    )
    translator = parent.finish(rows_in=0, rows_out=0, outputs=["model"])
    attempt = workspace.stage("translate", "streets-night", version=1, recipe={}, inputs={}, seed=0).open()
    return stage.translate(
        source,
        translator,
        name="streets-night",
        to=to,
        attempt=attempt,
        progress=SilentProgress(),
        compute=MapCompute(shard_rows=2, batch=2),
        max_bad_fraction=0.5,
        tile=tile,
        taxonomy="camvid11",
    )


def test_frames_of_the_wanted_domain_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"5 of 5 frames are day frames already \(first streets/frame 0\)"):
        run(tmp_path, frames(tmp_path, SIZES), "day")
    with pytest.raises(UserError, match="no frame to translate"):
        run(tmp_path / "empty", frame_table([]), "night")


def test_a_tile_that_the_translator_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\(64, 84\) must be multiples of 4, 84 or more"):
        run(tmp_path, frames(tmp_path, SIZES), "night", tile=(64, 84))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_stage_commits_frames_and_quarantine(tmp_path: Path) -> None:
    source = frames(tmp_path, SIZES)
    (tmp_path / "frame 3.png").write_bytes(b"")
    commit = run(tmp_path, source, "night")
    assert (commit.rows_in, commit.rows_out, commit.quarantined) == (5, 4, 1)
    table = resolve(commit.table("frames"), commit.folder)
    assert table["frame_id"].to_pylist() == [f"streets-night/streets/frame {index}" for index in (0, 1, 2, 4)]
    for row in table.to_pylist():
        assert read_image(Location.of(row["uri"])).shape == (row["height"], row["width"], 3)
    assert commit.table("quarantine")["reason"].to_pylist() == ["zero_bytes"]
