"""Single stages for the command line, without a recipe: split a pool, choose from a pool.

Each works in a run folder of its own beside its output, so that a pass over tens of thousands of frames that is
interrupted continues when the command is given again; the folder is removed once the output is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from nightseg.cluster import ray as cluster
from nightseg.cluster.settings import MapCompute
from nightseg.data import layouts
from nightseg.data import table as frame
from nightseg.data.settings import FolderDataset
from nightseg.progress import Progress
from nightseg.selection.features import identify
from nightseg.selection.settings import Selection
from nightseg.stages import collect, score, select, split
from nightseg.storage import Commit, Location, UserError, Workspace, hash_of

TAXONOMY = "cityscapes19"  # unlabelled frames need none; the stage that collects asks for one


def split_folder(images: str, out: str, *, margin: float, compute: MapCompute, progress: Progress) -> dict[str, Any]:
    """Separate a folder of images into day, night and twilight; write one frame table with domain, score, margin.

    Beside `out` lie the evidence (histograms, thresholds, borderline frames) and, if there are bad frames, why.
    """
    table = Location.of(out)
    if not table.name.endswith(".parquet"):
        raise UserError(f"--out {out}: the frame table is a Parquet file. Cure: a name that ends in .parquet.")
    layouts.count(FolderDataset.of_images(images))
    with _workshop(table.parent / f".{table.name}.work") as workspace:
        found = _collected(workspace, images, compute, progress)
        pool = frame.resolve(found.table("frames"), found.folder)
        inputs, recipe = {"pool": found.content}, {"margin": margin}
        stage = workspace.stage("split", "pool", version=split.VERSION, recipe=recipe, inputs=inputs, seed=0)
        done = stage.commit() or split.split(
            pool,
            margin=margin,
            attempt=stage.open(),
            progress=progress,
            compute=compute,
            max_bad_fraction=1.0,
        )
        bad = [commit.table("quarantine") for commit in (found, done) if commit.quarantined]
        table.write_table(frame.resolve(done.table("frames"), done.folder))
        stem = table.name.removesuffix(".parquet")
        (table.parent / f"{stem}.evidence.json").write_json(done.json("evidence.json"))
        if bad:
            (table.parent / f"{stem}.quarantine.parquet").write_table(pa.concat_tables(bad))
        return dict(done.summary) | {"frames": table.uri, "quarantined": sum(part.num_rows for part in bad)}


def select_frames(
    pool: str, reference: str | None, out: str, *, choice: Selection, seed: int, compute: MapCompute, progress: Progress
) -> dict[str, Any]:
    """Choose frames of a pool (image folder or frame table); write frames.parquet, scores.parquet, evidence.json.

    Raises UserError before any frame is read: no such pool or reference, a method that needs a reference and has none,
    an extractor whose weights are not at hand.
    """
    folder = Location.of(out)
    if reference is None and choice.needs_reference:
        raise UserError(
            f"--method {choice.method} needs a reference that the chosen frames should be close to. "
            "Cure: --reference FOLDER_OR_TABLE, or --method random."
        )
    num_frames = _count(pool)
    if choice.count > num_frames:
        raise UserError(f"--count {choice.count}: the pool {pool} has {num_frames} frames. Cure: a smaller count.")
    if reference is not None:
        _count(reference)
    identify(choice.extractor)
    with _workshop(folder / ".work") as workspace:
        frames = _frames(workspace, "pool", pool, compute, progress)
        near = None
        if reference is not None:
            reference_frames = _frames(workspace, "reference", reference, compute, progress)
            near = _scored(workspace, "reference", reference_frames, None, choice, compute, progress)
        scored = _scored(workspace, "pool", frames, near, choice, compute, progress)
        inputs = {"pool": scored.content} | ({"reference": near.content} if near else {})
        recipe = choice.model_dump(mode="json")
        stage = workspace.stage("select", "pool", version=select.VERSION, recipe=recipe, inputs=inputs, seed=seed)
        done = stage.commit() or select.select(
            frames,
            scored,
            near,
            selection=choice,
            seed=seed,
            attempt=stage.open(),
            progress=progress,
        )
        for name in ("frames.parquet", "scores.parquet", "evidence.json"):
            (folder / name).write_bytes(done.file(name).read_bytes())
        return dict(done.summary) | {"out": folder.uri}


@contextmanager
def _workshop(folder: Location) -> Iterator[Workspace]:
    """A run folder that is removed once the work is done, and kept for the next try if it is not."""
    workspace = Workspace(folder)
    with workspace.lock(), cluster.left_as_found():
        yield workspace
    folder.delete()


def _collected(
    workspace: Workspace, images: str, compute: MapCompute, progress: Progress, name: str = "pool"
) -> Commit:
    dataset = FolderDataset.of_images(images)
    listing = layouts.fingerprint(dataset)
    stage = workspace.stage("collect", name, version=collect.VERSION, recipe={"listing": listing}, inputs={}, seed=0)
    return stage.commit() or collect.collect(
        dataset,
        name=name,
        taxonomy=TAXONOMY,
        attempt=stage.open(),
        progress=progress,
        compute=compute,
        max_bad_fraction=1.0,  # of a pool from the road some are always broken; they are listed, not fatal
    )


def _count(source: str) -> int:
    """The frames that an image folder or a frame table promises."""
    place = Location.of(source)
    if not place.name.endswith(".parquet"):
        return layouts.count(FolderDataset.of_images(source))
    if not place.exists():
        raise UserError(f"{source}: there is no such frame table. Cure: check the path.")
    return int(place.read_table().num_rows)


def _frames(workspace: Workspace, name: str, source: str, compute: MapCompute, progress: Progress) -> pa.Table:
    """The frames of an image folder or of a frame table."""
    place = Location.of(source)
    if not place.name.endswith(".parquet"):
        found = _collected(workspace, source, compute, progress, name)
        return frame.resolve(found.table("frames"), found.folder)
    rows = frame.resolve(place.read_table(), place.parent)
    frame.check_frames(rows)
    missing = [name for name in frame.FRAME_SCHEMA.names if name not in rows.column_names]
    for name in missing:  # a table made by hand may hold only frame_id and uri
        rows = rows.append_column(name, pa.nulls(rows.num_rows, frame.FRAME_SCHEMA.field(name).type))
    return rows


def _scored(
    workspace: Workspace,
    name: str,
    frames: pa.Table,
    near: Commit | None,
    choice: Selection,
    compute: MapCompute,
    progress: Progress,
) -> Commit:
    """Features of a set; with `near` and the spatial method, each frame's own distance to that reference."""
    extraction, spatial = choice.extractor, choice.needs_positions
    inputs = {"frames": hash_of(frames.select([frame.FRAME_ID, frame.URI, frame.SHA256]).to_pylist())}
    if spatial and near is not None:
        inputs["near"] = near.content
    recipe = score.facts(extraction) | {"spatial": spatial}
    stage = workspace.stage("score", name, version=score.VERSION, recipe=recipe, inputs=inputs, seed=0)
    return stage.commit() or score.score(
        frames,
        extraction,
        positions=spatial and near is None,
        spatial_reference=near if spatial else None,
        attempt=stage.open(),
        progress=progress,
        compute=compute,
        max_bad_fraction=1.0,
    )
