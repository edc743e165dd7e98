"""Describe every frame by a feature vector and a luminance histogram: what selections and distances are made from."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from nightseg.compute import cluster
from nightseg.compute.inference import map_shards
from nightseg.config import MapCompute
from nightseg.frames import table as frame
from nightseg.frames.datasets import list_frames
from nightseg.frames.images import BadFrame, read_image
from nightseg.frames.vectors import vector_column, vectors
from nightseg.measures.frechet import (
    Statistics,
    check_comparable,
    moments_of,
    read_statistics,
    statistics_distance,
    write_statistics,
)
from nightseg.measures.histogram import NUM_BINS, luminance_histogram
from nightseg.networks.features import Extractor, Identity, build_extractor, identify
from nightseg.progress import Progress
from nightseg.storage import Location, UserError
from nightseg.workspace import Attempt, Commit, Workspace

VERSION = 1

FEATURES = "features"  # float32, as many as the extractor has dimensions
HISTOGRAM = "histogram"  # float32 (64,), luminance of the whole frame, sums to 1
STATISTICS_NAME = "statistics.npz"


def score(
    frames: pa.Table,
    *,
    extractor: str,
    extractor_weights: str | None,
    attempt: Attempt,
    progress: Progress,
    compute: MapCompute,
    max_bad_fraction: float,
) -> Commit:
    """Commit the table `features` (frame_id, sha256, features, histogram), `quarantine`, and statistics.npz.

    `frames` is a frame table with absolute uris. statistics.npz holds mean and covariance of all features; it is left
    out if fewer than two frames are good, which have no covariance. Raises UserError if the extractor's weights are not
    at hand, before any frame is read.
    """
    begun = time.monotonic()
    if frames.num_rows == 0:
        raise UserError("there is no frame to score; look at the counts of the datasets that it is made from")
    identity = identify(extractor, extractor_weights)
    shards = map_shards(
        _described(frames),
        ScoreFrames,
        {
            "extractor": extractor,
            "extractor_weights": extractor_weights,
            "weights_sha256": identity.weights_sha256,
            "batch": compute.batch,
        },
        attempt=attempt,
        shard_rows=compute.shard_rows,
        actors=compute.actors,
        cpus_per_actor=compute.cpus_per_actor,
        gpus_per_actor=compute.gpus_per_actor,
        progress=progress,
        title=f"score by {extractor}",
    )
    parts = [(attempt.folder / shard.tables["features"].path).read_table() for shard in shards]
    moments = moments_of(vectors(pa.concat_tables(parts)[FEATURES]).reshape(-1, identity.dims))
    if moments.count >= 2:
        statistics = Statistics(
            moments.mean, moments.cov, moments.count, identity.name, identity.resize, identity.weights_sha256
        )
        write_statistics(attempt.folder / STATISTICS_NAME, statistics)
    return attempt.finish(
        rows_in=frames.num_rows,
        rows_out=moments.count,
        quarantined=sum(shard.rows("quarantine") for shard in shards),
        max_bad_fraction=max_bad_fraction,
        outputs=[STATISTICS_NAME] if moments.count >= 2 else [],
        num_shards=len(shards),
        summary=_summary(identity),
        seconds=time.monotonic() - begun,
    )


class ScoreFrames:
    """Features and histograms of the frames of a shard. A frame that cannot be read goes to the quarantine table."""

    def __init__(self, extractor: str, extractor_weights: str | None, weights_sha256: str, batch: int) -> None:
        import torch

        self.extractor: Extractor = build_extractor(
            extractor, extractor_weights, "cuda" if torch.cuda.is_available() else "cpu"
        )
        if self.extractor.weights_sha256 != weights_sha256:
            raise UserError(
                f"{extractor}: the weights on this node ({self.extractor.identity.file}) are not those of the driver;"
                " name one file that all nodes see with `extractor_weights`"
            )
        self.batch = batch

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        features: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        histograms: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        table = rows.to_pylist()
        for start in range(0, len(table), self.batch):  # decoded frames are large: no more than a batch at a time
            images = []
            for row in table[start : start + self.batch]:
                try:
                    images.append(read_image(Location.of(row[frame.URI])))
                    good.append(row)
                except BadFrame as fault:
                    keep = {name: row[name] for name in (frame.FRAME_ID, frame.URI)}
                    bad.append({**keep, frame.REASON: fault.reason, frame.DETAIL: fault.detail})
            features.append(self.extractor(images))
            histograms += [luminance_histogram(image) for image in images]
        described = {
            frame.FRAME_ID: pa.array([row[frame.FRAME_ID] for row in good], pa.string()),
            frame.SHA256: pa.array([row[frame.SHA256] for row in good], pa.string()),
            FEATURES: vector_column(np.concatenate(features)),
            HISTOGRAM: vector_column(np.array(histograms, dtype=np.float32).reshape(-1, NUM_BINS)),
        }
        return {"features": pa.table(described), "quarantine": frame.quarantine_table(bad)}


def _described(frames: pa.Table) -> pa.Table:
    """Only what the workers need. Tables made by hand may lack the content hash."""
    if frame.SHA256 not in frames.column_names:
        frames = frames.append_column(frame.SHA256, pa.nulls(frames.num_rows, pa.string()))
    return frames.select([frame.FRAME_ID, frame.URI, frame.SHA256])


def _summary(identity: Identity) -> dict[str, Any]:
    return {
        "extractor": identity.name,
        "dims": identity.dims,
        "resize": identity.resize,
        "weights_sha256": identity.weights_sha256,
    }


# -- the distance of two sets, without a run folder ------------------------------------------------------------------


class Fid(NamedTuple):
    """Frechet distance of two sets of frames, and between what and how it was measured."""

    fid: float
    n_a: int | None  # frames; None = the file of statistics does not say
    n_b: int | None
    extractor: str
    resize: str


def fid(
    a: str,
    b: str,
    *,
    extractor: str,
    weights: str | None = None,
    compute: MapCompute | None = None,
    progress: Progress,
    max_bad_fraction: float = 0.01,
    folder: Location | None = None,
) -> Fid:
    """FID between two sets, each an image folder (searched to the bottom), a frame table (.parquet) or an .npz.

    Work goes into a folder below `folder` that is gone afterwards: the system's temporary folder by default; on a
    cluster of several machines one that all of them see. Ray is joined or started only if there are frames to read.

    Raises UserError: a set does not exist, has fewer than 2 good frames, or was measured in another way than the other.
    """
    scratch = (folder or Location.of(tempfile.gettempdir())) / f"nightseg-fid-{secrets.token_hex(4)}"
    measure = partial(
        score,
        extractor=extractor,
        extractor_weights=weights,
        progress=progress,
        compute=compute or MapCompute(),
        max_bad_fraction=max_bad_fraction,
    )
    was_local = cluster.is_local()
    found = [_found(Location.of(place)) for place in (a, b)]  # both, before the first is measured
    _check_before(found, (a, b), extractor, weights)
    try:
        first = _statistics(found[0], a, measure, scratch / "a")
        second = _statistics(found[1], b, measure, scratch / "b")
    finally:
        scratch.delete()
        if cluster.is_local() and not was_local:
            cluster.disconnect()
    distance = statistics_distance(first, second, (a, b))
    return Fid(distance, first.count, second.count, first.extractor, first.resize)


def _found(place: Location) -> Statistics | pa.Table:
    return read_statistics(place) if place.name.lower().endswith(".npz") else _frames_at(place)


def _check_before(
    found: Sequence[Statistics | pa.Table], names: Sequence[str], extractor: str, weights: str | None
) -> None:
    """Refuse what cannot be compared before hours are spent on the frames of one of them."""
    if all(isinstance(one, Statistics) for one in found):
        return
    identity = identify(extractor, weights)
    nothing = np.zeros((identity.dims, identity.dims))
    coming = Statistics(nothing[0], nothing, None, identity.name, identity.resize, identity.weights_sha256)
    first, second = (one if isinstance(one, Statistics) else coming for one in found)
    check_comparable(first, second, names)


def _statistics(
    found: Statistics | pa.Table, name: str, measure: Callable[..., Commit], scratch: Location
) -> Statistics:
    if isinstance(found, Statistics):
        return found
    stage = Workspace(scratch).stage("score", "fid", version=VERSION, recipe={}, inputs={}, seed=0)
    commit = measure(found, attempt=stage.open())
    if not commit.has(STATISTICS_NAME):
        raise UserError(f"{name}: has {commit.rows_out} good frame; a covariance needs at least 2")
    return read_statistics(commit.file(STATISTICS_NAME))


def _frames_at(place: Location) -> pa.Table:
    """A frame table from a Parquet file, or from all images below a folder."""
    if place.name.lower().endswith(".parquet"):
        if not place.exists():
            raise UserError(f"{place}: there is no such frame table; check the path")
        frames = frame.resolve(place.read_table(), place.parent)
        frame.check_frames(frames)
        return frames
    found = list_frames("images", place, dataset=place.name, labelled=False)
    return frame.frame_table({frame.FRAME_ID: one.frame_id, frame.URI: one.uri} for one in found)
