"""Describe every frame by a feature vector and a luminance histogram: what selections and distances are made from."""

from __future__ import annotations

import io
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.compute import cluster
from nightseg.compute.inference import map_shards
from nightseg.config import MapCompute, Selection
from nightseg.frames import table as frame
from nightseg.frames.datasets import list_frames
from nightseg.frames.images import BadFrame, read_image
from nightseg.frames.vectors import vector_column, vectors
from nightseg.measures.frechet import (
    Moments,
    Statistics,
    check_comparable,
    moments_of_parts,
    read_statistics,
    statistics_distance,
    write_statistics,
)
from nightseg.measures.histogram import NUM_BINS, luminance_histogram
from nightseg.measures.kernel import KernelDistance, kernel_distance
from nightseg.measures.scores import SpatialReference, spatial_scores
from nightseg.measures.scores import spatial_reference as spatial_reference_of
from nightseg.networks.extractors import build_extractor, identify
from nightseg.networks.features import Extractor, Identity
from nightseg.progress import Progress
from nightseg.storage import Location, UserError, sha256_of
from nightseg.workspace import Attempt, Commit, Workspace

VERSION = 2

FEATURES = "features"  # float32, as many as the extractor has dimensions
HISTOGRAM = "histogram"  # float32 (64,), luminance of the whole frame, sums to 1
SPATIAL = "spatial"  # float64, squared Frechet distance of the frame's positions to those of a reference
SPATIAL_ERROR = "spatial_error"  # float64, by how much that can be too large
STATISTICS_NAME = "statistics.npz"
POSITIONS_NAME = "positions.npz"  # the same over all positions of all frames

_POSITIONS_SCRATCH = "positions"  # folder of the shards' own position statistics


class Extraction(NamedTuple):
    """Which features; see networks/extractors.py for names, networks/features.py for rules and modes."""

    extractor: str
    weights: str | None = None
    resize: str | None = None
    mode: str = "exact"

    @classmethod
    def of(cls, choice: Selection) -> Extraction:
        """What a selection of the recipe asks for."""
        return cls(choice.extractor, choice.extractor_weights, choice.extractor_resize, choice.extractor_mode)

    @property
    def label(self) -> str:
        """For names of stages: other settings are other features."""
        words = (self.extractor.replace("/", "-"), self.resize, "fast" if self.mode == "fast" else None)
        return "-".join(word for word in words if word)


def score(
    frames: pa.Table,
    extraction: Extraction,
    *,
    positions: bool = False,
    spatial_reference: Commit | None = None,
    attempt: Attempt,
    progress: Progress,
    compute: MapCompute,
    max_bad_fraction: float,
) -> Commit:
    """Commit the table `features` (frame_id, sha256, features, histogram), `quarantine`, and statistics.npz.

    `frames` is a frame table with absolute uris. statistics.npz holds mean and covariance of all features; it is left
    out if fewer than two frames are good, which have no covariance. `positions` adds positions.npz, the same over all
    positions of the feature maps; a commit that has it is a `spatial_reference`, which adds two columns to the table:
    each frame's own Frechet distance to it, and the error bound of that.
    Raises UserError if the extractor's weights are not at hand, before any frame is read.
    """
    begun = time.monotonic()
    if frames.num_rows == 0:
        raise UserError("there is no frame to score; look at the counts of the datasets that it is made from")
    identity = identify(extraction.extractor, extraction.weights, extraction.resize)
    rows = _described(frames)
    shards = map_shards(
        rows,
        ScoreFrames,
        {
            "extraction": extraction,
            "weights_sha256": identity.weights_sha256,
            "batch": compute.batch,
            "positions": positions,
            "spatial_reference": spatial_reference.file(POSITIONS_NAME) if spatial_reference else None,
        },
        attempt=attempt,
        shard_rows=compute.shard_rows,
        actors=compute.actors,
        cpus_per_actor=compute.cpus_per_actor,
        gpus_per_actor=compute.gpus_per_actor,
        progress=progress,
        title=f"score by {extraction.extractor}",
    )
    parts = ((attempt.folder / shard.tables["features"].path).read_table()[FEATURES] for shard in shards)
    moments = moments_of_parts((vectors(part).reshape(-1, identity.dims) for part in parts), identity.dims)
    outputs = _write_statistics(attempt.folder, moments, identity)
    if positions and moments.count:
        firsts = rows[frame.FRAME_ID].take(list(range(0, rows.num_rows, compute.shard_rows))).to_pylist()
        outputs.append(_merge_positions(attempt.folder, firsts, identity))
    return attempt.finish(
        rows_in=frames.num_rows,
        rows_out=moments.count,
        quarantined=sum(shard.rows("quarantine") for shard in shards),
        max_bad_fraction=max_bad_fraction,
        outputs=outputs,
        num_shards=len(shards),
        summary=_summary(identity),
        seconds=time.monotonic() - begun,
    )


class ScoreFrames:
    """Features and histograms of the frames of a shard. A frame that cannot be read goes to the quarantine table."""

    def __init__(
        self,
        extraction: Extraction,
        weights_sha256: str,
        batch: int,
        positions: bool = False,
        spatial_reference: Location | None = None,
    ) -> None:
        import torch

        name, weights, resize, mode = extraction
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.extractor: Extractor = build_extractor(name, weights, device, resize=resize, mode=mode)
        if self.extractor.weights_sha256 != weights_sha256:
            raise UserError(
                f"{name}: the weights on this node ({self.extractor.identity.file}) are not those of the driver;"
                " name one file that all nodes see with `extractor_weights`"
            )
        self.batch = batch
        self.positions = positions
        self.reference: SpatialReference | None = None
        if spatial_reference is not None:
            near = read_statistics(spatial_reference)
            self.reference = spatial_reference_of(near.mean, near.cov)

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        features: list[npt.NDArray[np.float32]] = []
        histograms: list[npt.NDArray[np.float32]] = []
        spatial: list[npt.NDArray[np.float64]] = []
        everywhere = Moments(self.extractor.dims)
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
            histograms += [luminance_histogram(image) for image in images]
            if not (self.positions or self.reference):
                features.append(self.extractor(images))
                continue
            pooled, maps = self.extractor.with_positions(images)
            features.append(pooled)
            if self.positions and images:
                everywhere.update(maps.reshape(-1, self.extractor.dims))
            if self.reference is not None and images:
                spatial.append(np.stack(spatial_scores(maps, self.reference)))
        if self.positions:
            _write_moments(folder / _positions_file(table[0][frame.FRAME_ID]), everywhere)
        described = {
            frame.FRAME_ID: pa.array([row[frame.FRAME_ID] for row in good], pa.string()),
            frame.SHA256: pa.array([row[frame.SHA256] for row in good], pa.string()),
            FEATURES: vector_column(np.concatenate(features)),
            HISTOGRAM: vector_column(np.array(histograms, dtype=np.float32).reshape(-1, NUM_BINS)),
        }
        if self.reference is not None:
            distances, errors = np.concatenate([*spatial, np.empty((2, 0))], axis=1)
            described |= {SPATIAL: pa.array(distances), SPATIAL_ERROR: pa.array(errors)}
        return {"features": pa.table(described), "quarantine": frame.quarantine_table(bad)}


def _write_statistics(folder: Location, moments: Moments, identity: Identity) -> list[str]:
    if moments.count < 2:
        return []
    write_statistics(folder / STATISTICS_NAME, _statistics_of(moments, identity))
    return [STATISTICS_NAME]


def _merge_positions(folder: Location, first_frames: list[str], identity: Identity) -> str:
    """One file from those of the shards, in the order of the shards: any number of actors gives the same bits."""
    everywhere = Moments(identity.dims)
    for name in first_frames:
        everywhere.merge(_read_moments(folder / _positions_file(name)))
    write_statistics(folder / POSITIONS_NAME, _statistics_of(everywhere, identity))
    (folder / _POSITIONS_SCRATCH).delete()
    return POSITIONS_NAME


def _positions_file(first_frame: str) -> str:
    """Scratch of a shard, named by its rows: an actor that does a shard again writes the same file."""
    return f"{_POSITIONS_SCRATCH}/{sha256_of(first_frame.encode())[:16]}.npz"


def _write_moments(place: Location, moments: Moments) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, count=moments.count, mean=moments.mean, scatter=moments.scatter)
    place.write_bytes(buffer.getvalue())


def _read_moments(place: Location) -> Moments:
    with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as file:
        moments = Moments(len(file["mean"]))
        moments.count, moments.mean, moments.scatter = int(file["count"]), file["mean"], file["scatter"]
        return moments


def _statistics_of(moments: Moments, identity: Identity) -> Statistics:
    return Statistics(moments.mean, moments.cov, moments.count, identity.name, identity.resize, identity.weights_sha256)


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
    """Distances of two sets of frames, and between what and how they were measured."""

    fid: float
    n_a: int | None  # frames; None = the file of statistics does not say
    n_b: int | None
    extractor: str
    resize: str
    kid: float | None = None  # None = one set is a file of statistics, which has no features
    kid_deviation: float | None = None  # standard deviation over its draws


class _Side(NamedTuple):
    statistics: Statistics
    features: npt.NDArray[np.float32] | None


def fid(
    a: str,
    b: str,
    *,
    extraction: Extraction,
    compute: MapCompute | None = None,
    progress: Progress,
    max_bad_fraction: float = 0.01,
    folder: Location | None = None,
    save_statistics: Sequence[str | None] = (None, None),
) -> Fid:
    """FID, and KID, between two sets, each an image folder (searched to the bottom), a frame table or an .npz.

    Work goes into a folder below `folder` that is gone afterwards: the system's temporary folder by default; on a
    cluster of several machines one that all of them see. Ray is joined or started only if there are frames to read.
    `save_statistics` names .npz files, one a set, that are kept for the next time; pytorch-fid reads them too.

    Raises UserError: a set does not exist, has fewer than 2 good frames, or was measured in another way than the other.
    """
    scratch = (folder or Location.of(tempfile.gettempdir())) / f"nightseg-fid-{secrets.token_hex(4)}"
    measure = partial(
        score,
        extraction=extraction,
        progress=progress,
        compute=compute or MapCompute(),
        max_bad_fraction=max_bad_fraction,
    )
    was_local = cluster.is_local()
    found = [_found(Location.of(place)) for place in (a, b)]  # both, before the first is measured
    _check_before(found, (a, b), extraction)
    try:
        first, second = (
            _side(one, name, measure, scratch / place)
            for one, name, place in zip(found, (a, b), ("a", "b"), strict=True)
        )
    finally:
        scratch.delete()
        if cluster.is_local() and not was_local:
            cluster.disconnect()
    for side, kept in zip((first, second), save_statistics, strict=True):
        if kept is not None:
            write_statistics(Location.of(kept), side.statistics)
    distance = statistics_distance(first.statistics, second.statistics, (a, b))
    kernel: KernelDistance | None = None
    if first.features is not None and second.features is not None:
        kernel = kernel_distance(first.features, second.features)
    return Fid(
        distance,
        first.statistics.count,
        second.statistics.count,
        first.statistics.extractor,
        first.statistics.resize,
        kernel.kid if kernel else None,
        kernel.deviation if kernel else None,
    )


def _found(place: Location) -> Statistics | pa.Table:
    return read_statistics(place) if place.name.lower().endswith(".npz") else _frames_at(place)


def _check_before(found: Sequence[Statistics | pa.Table], names: Sequence[str], extraction: Extraction) -> None:
    """Refuse what cannot be compared before hours are spent on the frames of one of them."""
    if all(isinstance(one, Statistics) for one in found):
        return
    identity = identify(extraction.extractor, extraction.weights, extraction.resize)
    nothing = np.zeros((identity.dims, identity.dims))
    coming = Statistics(nothing[0], nothing, None, identity.name, identity.resize, identity.weights_sha256)
    first, second = (one if isinstance(one, Statistics) else coming for one in found)
    check_comparable(first, second, names)


def _side(found: Statistics | pa.Table, name: str, measure: Callable[..., Commit], scratch: Location) -> _Side:
    if isinstance(found, Statistics):
        return _Side(found, None)
    stage = Workspace(scratch).stage("score", "fid", version=VERSION, recipe={}, inputs={}, seed=0)
    commit = measure(found, attempt=stage.open())
    if not commit.has(STATISTICS_NAME):
        raise UserError(f"{name}: has {commit.rows_out} good frame; a covariance needs at least 2")
    return _Side(read_statistics(commit.file(STATISTICS_NAME)), vectors(commit.table("features")[FEATURES]))


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
