"""Describe every frame by a feature vector and a luminance histogram: what selections and distances are made from."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.cluster.map import Work, map_shards
from nightseg.data import table as frame
from nightseg.data.day_night import NUM_BINS, luminance_histogram
from nightseg.data.images import BadFrame
from nightseg.data.table import vector_column, vectors
from nightseg.networks.devices import usable_device
from nightseg.selection import frechet
from nightseg.selection.features import Extractor, Identity, build_extractor, identify
from nightseg.selection.frechet import FEATURES, STATISTICS_NAME, Moments, Statistics
from nightseg.selection.methods import HISTOGRAM, SPATIAL, SPATIAL_ERROR
from nightseg.selection.settings import Extraction
from nightseg.storage import Commit, Location, UserError, sha256_of

VERSION = 3

POSITIONS_NAME = "positions.npz"  # statistics over all positions of all frames

_POSITIONS_SCRATCH = "positions"  # folder of the shards' own position statistics


def facts(extraction: Extraction) -> dict[str, Any]:
    """For the key of a stage: what is asked for, and the content of a file of weights if it is there already."""
    file = Location.of(extraction.weights) if extraction.weights else None
    known = file is not None and file.exists()
    return extraction.model_dump() | {"weights_sha256": sha256_of(file.read_bytes()) if file and known else None}


def score(
    frames: pa.Table,
    extraction: Extraction,
    *,
    positions: bool = False,
    spatial_reference: Commit | None = None,
    **work: Unpack[Work],
) -> Commit:
    """Commit the table `features` (frame_id, sha256, features, histogram), `quarantine`, and statistics.npz.

    `frames` is a frame table with absolute uris. statistics.npz holds mean and covariance of all features; it is left
    out if fewer than two frames are good, which have no covariance. `positions` adds positions.npz, the same over all
    positions of the feature maps; a commit that has it is a `spatial_reference`, which adds two columns to the table:
    each frame's own Frechet distance to it, and the error bound of that.
    Raises UserError if the extractor's weights are not at hand, before any frame is read.
    """
    attempt, compute = work["attempt"], work["compute"]
    if frames.num_rows == 0:
        raise UserError(
            f"{attempt.identity['name']}: there is no frame to score",
            cure="see the counts of the datasets that it is made from",
        )
    identity = identify(extraction)
    precision = _precision(extraction, work)
    rows = _described(frames)
    near = _positions_of(spatial_reference) if spatial_reference else None
    worker = {"extraction": extraction, "precision": precision, "weights_sha256": identity.weights_sha256}
    worker |= {"batch": compute.batch, "positions": positions, "spatial_reference": near, "device": compute.device}
    shards = map_shards(rows, ScoreFrames, worker, title=f"score by {extraction.name}", **work)
    parts = (vectors(part[FEATURES]).reshape(-1, identity.dims) for part in shards.parts("features"))
    moments = frechet.moments_of_parts(parts, identity.dims)
    outputs = []
    if moments.count >= 2:
        outputs.append(STATISTICS_NAME)
        frechet.write_statistics(attempt.folder / STATISTICS_NAME, _statistics_of(moments, identity, precision))
    if positions and moments.count:
        outputs.append(POSITIONS_NAME)
        firsts = rows[frame.FRAME_ID].take(list(range(0, rows.num_rows, compute.shard_rows))).to_pylist()
        everywhere = _merged_positions(attempt.folder, firsts, identity.dims)
        frechet.write_statistics(attempt.folder / POSITIONS_NAME, _statistics_of(everywhere, identity, precision))
    told = {"extractor": identity.name} | {key: getattr(identity, key) for key in ("dims", "resize", "weights_sha256")}
    summary = told | {"precision": precision}
    return shards.finish(
        "features", outputs=outputs, scratch=[_POSITIONS_SCRATCH] if positions else [], summary=summary
    )


def _positions_of(reference: Commit) -> Location:
    if not reference.has(POSITIONS_NAME):
        raise UserError(
            f"{reference.name}: none of its {reference.rows_in} frames could be read to be close to",
            cure="mend the files, or name another reference",
        )
    return reference.file(POSITIONS_NAME)


def _precision(extraction: Extraction, work: Work) -> str:
    """Decided once, here, for all actors and for what continues this attempt: shards must not differ in it."""
    if extraction.mode == "exact":
        return "float32"
    decided = work["attempt"].folder / "precision.json"
    if not decided.exists():
        on_gpu = work["compute"].device == "cuda"
        found = "bfloat16" if on_gpu else build_extractor(extraction).faster_precision()
        decided.write_json({"precision": found})
    precision = str(decided.read_json()["precision"])
    work["progress"].say(f"{extraction.name}: fast mode computes in {precision}")
    return precision


class ScoreFrames:
    """Features and histograms of the frames of a shard. A frame that cannot be read goes to the quarantine table."""

    def __init__(
        self,
        extraction: Extraction,
        precision: str,
        weights_sha256: str,
        batch: int,
        positions: bool = False,
        spatial_reference: Location | None = None,
        device: str = "cpu",
    ) -> None:
        self.extractor: Extractor = build_extractor(extraction, usable_device(device), precision=precision)
        identity = self.extractor.identity
        if identity.weights_sha256 != weights_sha256:
            raise UserError(
                f"{identity.name}: the weights on this node ({identity.file}) are not those of the driver",
                cure="name one file that all nodes see with `extractor.weights`",
            )
        self.batch = batch
        self.positions = positions
        self.reference: frechet.SpatialReference | None = None
        if spatial_reference is not None:
            near = frechet.read_statistics(spatial_reference)
            self.reference = frechet.spatial_reference(near.mean, near.cov)

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
                    images.append(frame.image_of(row))
                    good.append(row)
                except BadFrame as fault:
                    bad.append(frame.quarantined(row, fault))
            histograms += [luminance_histogram(image) for image in images]
            if not (self.positions or self.reference):
                features.append(self.extractor(images))
                continue
            pooled, maps = self.extractor.with_positions(images)
            features.append(pooled)
            if self.positions and images:
                everywhere.update(maps.reshape(-1, self.extractor.dims))
            if self.reference is not None and images:
                spatial.append(np.stack(frechet.spatial_scores(maps, self.reference)))
        if self.positions:
            _write_moments(folder / _positions_file(table[0][frame.FRAME_ID]), everywhere)
        described = {
            frame.FRAME_ID: pa.array([row[frame.FRAME_ID] for row in good], pa.string()),
            frame.SHA256: pa.array([row[frame.SHA256] for row in good], pa.string()),
            FEATURES: vector_column(np.concatenate(features)),
            HISTOGRAM: vector_column(np.array(histograms).reshape(-1, NUM_BINS)),
        }
        if self.reference is not None:
            distances, errors = np.concatenate([*spatial, np.empty((2, 0))], axis=1)
            described |= {SPATIAL: pa.array(distances), SPATIAL_ERROR: pa.array(errors)}
        return {"features": pa.table(described), "quarantine": frame.quarantine_table(bad)}


def _merged_positions(folder: Location, first_frames: list[str], dims: int) -> Moments:
    """Of all shards, in their order: any number of actors gives the same bits."""
    everywhere = Moments(dims)
    for name in first_frames:
        everywhere.merge(_read_moments(folder / _positions_file(name)))
    return everywhere


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


def _statistics_of(moments: Moments, identity: Identity, precision: str) -> Statistics:
    made_by = identity.name, identity.resize, identity.weights_sha256, precision
    return Statistics(moments.mean, moments.cov, moments.count, *made_by)


def _described(frames: pa.Table) -> pa.Table:
    """Only what the workers need. Tables made by hand may lack the content hash."""
    if frame.SHA256 not in frames.column_names:
        frames = frames.append_column(frame.SHA256, pa.nulls(frames.num_rows, pa.string()))
    return frames.select([frame.FRAME_ID, frame.URI, frame.SHA256])
