"""Translations that need no training: the same bytes however they are cut, labels referenced, bad frames set aside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from nightseg.cluster.settings import MapCompute
from nightseg.data.images import encode_png, read_image
from nightseg.data.scenes import scene
from nightseg.data.table import FRAME_SCHEMA, check_frames, frame_table, resolve
from nightseg.progress import Progress, SilentProgress
from nightseg.stages import translate as stage
from nightseg.storage import Commit, Location, UserError, Workspace, sha256_of
from nightseg.translators.colour import match_histograms
from nightseg.translators.settings import (
    ColourTranslator,
    CommandTranslator,
    FourierTranslator,
    PhotometricTranslator,
    UntrainedTranslator,
)
from nightseg.translators.shards import STYLE_IMAGE

DARKEN = """
import pathlib, sys
from PIL import Image
for file in pathlib.Path(sys.argv[1]).iterdir():
    Image.open(file).point(lambda value: value // 4).save(pathlib.Path(sys.argv[2]) / file.name)
"""
KINDS: dict[str, UntrainedTranslator] = {
    "photometric": PhotometricTranslator(kind="photometric"),
    "fourier": FourierTranslator(kind="fourier", night="night", day="day", beta=0.05),
    "reinhard": ColourTranslator(kind="colour", night="night", day="day"),
    "histogram": ColourTranslator(kind="colour", night="night", method="histogram", nearest=1),
    "command": CommandTranslator(kind="command", argv=[sys.executable, "-c", DARKEN, "{input}", "{output}"]),
}


def frames(folder: Path, domain: str, count: int = 5, labelled: bool = True) -> pa.Table:
    rows = []
    for index in range(count):
        image, label = scene(3, index, domain, 48, 64 + 8 * (index % 2))
        data, mask = encode_png(image), encode_png(label)
        (folder / f"{domain} {index}.png").write_bytes(data)
        (folder / f"{domain} {index} label.png").write_bytes(mask)
        row = {"frame_id": f"{domain}/drive/{index}", "uri": str(folder / f"{domain} {index}.png"), "dataset": domain}
        if labelled:
            row |= {"label_uri": str(folder / f"{domain} {index} label.png"), "label_encoding": "train_ids"}
            row |= {"label_sha256": sha256_of(mask)}
        size = {"height": image.shape[0], "width": image.shape[1]}
        rows.append(row | size | {"domain": domain, "sequence": "drive", "split": "train", "sha256": sha256_of(data)})
    return frame_table(rows)


def run(
    folder: Path,
    settings: UntrainedTranslator,
    source: pa.Table,
    styles: pa.Table | None,
    *,
    to: stage.Domain = "night",
    shard_rows: int = 2,
    seed: int = 0,
    actors: int = 0,
    progress: Progress | None = None,
) -> Commit:
    attempt = Workspace(folder).stage("translate", "made", version=1, recipe={}, inputs={}, seed=seed).open()
    return stage.translate(
        source,
        settings,
        name="made",
        to=to,
        style_images=styles,
        style_dataset="night",
        taxonomy="camvid11",
        attempt=attempt,
        progress=progress or SilentProgress(),
        compute=MapCompute(actors=actors, shard_rows=shard_rows, batch=2),
        max_bad_fraction=0.5,
    )


class Talking(SilentProgress):
    def __init__(self, said: list[str]) -> None:
        self.said = said

    def say(self, message: str) -> None:
        self.said.append(message)


def styles_for(settings: UntrainedTranslator, folder: Path, domain: str = "night") -> pa.Table | None:
    takes = isinstance(settings, FourierTranslator | ColourTranslator)
    return frames(folder, domain, 4, labelled=False) if takes else None


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.usefixtures("shards_done")
def test_the_frames_are_those_of_the_source_at_night(tmp_path: Path, kind: str) -> None:
    settings, source = KINDS[kind], frames(tmp_path, "day")
    commit = run(tmp_path / "run", settings, source, styles_for(settings, tmp_path))
    table = resolve(commit.table("frames"), commit.folder)
    check_frames(table)
    assert table.select(FRAME_SCHEMA.names).schema == FRAME_SCHEMA
    assert (commit.rows_in, commit.rows_out, commit.quarantined) == (5, 5, 0)
    assert commit.summary == {"to": "night", "translator": settings.kind}
    assert table["frame_id"].to_pylist() == [f"made/day/drive/{index}" for index in range(5)]
    assert set(table["domain"].to_pylist()) == {"night"} and set(table["dataset"].to_pylist()) == {"made"}
    for column in ("label_uri", "label_encoding", "label_sha256", "sequence", "split", "height", "width"):
        assert table[column].to_pylist() == source[column].to_pylist()
    for row, before in zip(table.to_pylist(), source.to_pylist(), strict=True):
        image, day = read_image(Location.of(row["uri"])), read_image(Location.of(before["uri"]))
        assert image.shape == day.shape and image.mean() < day.mean()
        data = Location.of(row["uri"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(data), sha256_of(data))
    chosen = table[STYLE_IMAGE].to_pylist()
    has_style = isinstance(settings, FourierTranslator | ColourTranslator)
    assert all((image or "").startswith("night/drive/") == has_style for image in chosen)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.usefixtures("shards_done")
def test_bytes_follow_from_seed_and_frame_not_from_the_shards(tmp_path: Path, kind: str) -> None:
    settings, source = KINDS[kind], frames(tmp_path, "day")
    styles = styles_for(settings, tmp_path)
    turned = styles.take(list(range(styles.num_rows))[::-1]) if styles is not None else None
    made = [
        run(tmp_path / f"run {rows}", settings, source, some, shard_rows=rows).table("frames")
        for rows, some in ((1, styles), (3, turned), (5, styles))
    ]
    assert made[0].equals(made[1]) and made[0].equals(made[2])
    alone = run(tmp_path / "alone", settings, source.slice(3, 1), styles).table("frames")
    assert alone.to_pylist() == made[0].slice(3, 1).to_pylist()
    if kind in ("photometric", "fourier"):
        other = run(tmp_path / "other", settings, source, styles, seed=1).table("frames")
        assert other["sha256"] != made[0]["sha256"]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.usefixtures("shards_done")
def test_bad_frames_are_quarantined_and_the_rest_goes_on(tmp_path: Path, kind: str) -> None:
    settings, source = KINDS[kind], frames(tmp_path, "day")
    (tmp_path / "day 1.png").unlink()
    (tmp_path / "day 4.png").write_bytes(b"no image")
    commit = run(tmp_path / "run", settings, source, styles_for(settings, tmp_path))
    bad = [(row["frame_id"], row["reason"]) for row in commit.table("quarantine").to_pylist()]
    assert bad == [("day/drive/1", "missing"), ("day/drive/4", "not_an_image")]
    assert commit.table("frames")["frame_id"].to_pylist() == [f"made/day/drive/{index}" for index in (0, 2, 3)]


@pytest.mark.usefixtures("shards_done")
def test_a_broken_label_is_a_bad_frame_for_who_looks_at_labels(tmp_path: Path) -> None:
    source = frames(tmp_path, "day")
    (tmp_path / "day 2 label.png").unlink()
    commit = run(tmp_path / "run", KINDS["photometric"], source, None)
    assert commit.table("quarantine")["reason"].to_pylist() == ["label_missing"]
    assert run(tmp_path / "other", KINDS["command"], source, None).quarantined == 0


@pytest.mark.usefixtures("shards_done")
def test_optics_without_labels_only_darken(tmp_path: Path) -> None:
    source = frames(tmp_path, "day", labelled=False)
    quiet = PhotometricTranslator(kind="photometric", electrons=1e15, read_noise=0.0)
    table = resolve((commit := run(tmp_path / "run", quiet, source, None)).table("frames"), commit.folder)
    for row, before in zip(table.to_pylist(), source.to_pylist(), strict=True):
        assert row["label_uri"] is None
        assert (read_image(Location.of(row["uri"])) <= read_image(Location.of(before["uri"]))).all()


@pytest.mark.usefixtures("shards_done")
def test_the_named_style_image_was_used_and_translating_back_uses_day(tmp_path: Path) -> None:
    source, night = frames(tmp_path, "day"), frames(tmp_path, "night", 4)
    places = dict(zip(night["frame_id"].to_pylist(), night["uri"].to_pylist(), strict=True))
    commit = run(tmp_path / "run", KINDS["histogram"], source, night)
    table = resolve(commit.table("frames"), commit.folder)
    for row, before in zip(table.to_pylist(), source.to_pylist(), strict=True):
        day, style = read_image(Location.of(before["uri"])), read_image(Location.of(places[row[STYLE_IMAGE]]))
        assert np.array_equal(read_image(Location.of(row["uri"])), match_histograms(day, style))
    back = run(tmp_path / "back", KINDS["reinhard"], table.select(FRAME_SCHEMA.names), source, to="day").table("frames")
    assert set(back["domain"].to_pylist()) == {"day"}
    for row in back.to_pylist():
        assert row["frame_id"] == f"made/made/{row['frame_id'][10:]}"
        assert row[STYLE_IMAGE] != row["frame_id"].removeprefix("made/made/")  # never the answer itself


@pytest.mark.usefixtures("shards_done")
def test_a_program_that_fails_stops_the_stage_with_its_words(tmp_path: Path) -> None:
    broken = CommandTranslator(
        kind="command", argv=[sys.executable, "-c", "raise SystemExit('no weights')", "{input}", "{output}"]
    )
    said: list[str] = []
    with pytest.raises(UserError, match=r"exit code 1; it printed last:\n  no weights"):
        run(tmp_path / "run", broken, frames(tmp_path, "day"), None, progress=Talking(said))
    assert len(said) == 1 and said[0].startswith("made: the recipe runs a program on every shard: ")
    assert sys.executable in said[0]


def test_a_dataset_without_a_style_image_is_named(tmp_path: Path) -> None:
    night = frames(tmp_path, "night", 2)
    for file in tmp_path.glob("night ?.png"):
        file.unlink()
    with pytest.raises(UserError, match="dataset night: no frame of it can be read, so there is no style image"):
        run(tmp_path / "run", KINDS["reinhard"], frames(tmp_path, "day"), night)


@pytest.mark.usefixtures("shards_done")
def test_an_attempt_that_goes_on_uses_the_same_style_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, source, night = KINDS["fourier"], frames(tmp_path, "day"), frames(tmp_path, "night", 4)
    whole = run(tmp_path / "whole", settings, source, night)
    assert sorted(whole.json(stage.STYLE_IMAGES)) == [f"night/drive/{index}" for index in range(4)]

    def killed(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(stage, "map_shards", killed)
        with pytest.raises(RuntimeError, match="the power went"):
            run(tmp_path / "run", settings, source, night)
    gone = tmp_path / "night 2.png"
    content = gone.read_bytes()
    gone.unlink()
    with pytest.raises(UserError, match=r"dataset night: night/drive/2 is a style image .* cannot be read any more"):
        run(tmp_path / "run", settings, source, night)
    gone.write_bytes(content)
    assert run(tmp_path / "run", settings, source, night).content == whole.content


@pytest.mark.usefixtures("shards_done")
def test_style_images_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    said: list[str] = []

    night = frames(tmp_path, "night", 4)
    (tmp_path / "night 1.png").write_bytes(b"no image")
    commit = run(tmp_path / "run", KINDS["reinhard"], frames(tmp_path, "day"), night, progress=Talking(said))
    assert len(commit.json(stage.STYLE_IMAGES)) == 3
    assert said == ["dataset night: 1 of 4 style images cannot be read"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_gives_what_one_process_gives(tmp_path: Path) -> None:
    settings, source = KINDS["photometric"], frames(tmp_path, "day")
    alone = run(tmp_path / "here", settings, source, None)
    spread = run(tmp_path / "ray", settings, source, None, actors=1)
    assert spread.table("frames").equals(alone.table("frames"))
