"""FID and KID of two sets of frames, without a recipe and without a run folder."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.cluster import ray as cluster
from nightseg.cluster.settings import MapCompute
from nightseg.data import table as frame
from nightseg.data.layouts import list_frames
from nightseg.data.settings import FolderDataset
from nightseg.data.table import sampled_vectors
from nightseg.progress import Progress
from nightseg.selection.features import identify
from nightseg.selection.frechet import (
    Statistics,
    check_comparable,
    few_frames_distance,
    gaussian_distance,
    gaussian_of_features,
    read_statistics,
    statistics_distance,
    write_statistics,
)
from nightseg.selection.kernel import KernelDistance, kernel_distance
from nightseg.selection.settings import Extraction
from nightseg.stages.score import FEATURES, STATISTICS_NAME, VERSION, score
from nightseg.storage import Commit, Location, UserError, Workspace

ROWS_FOR_KERNEL = 20_000


class Distance(NamedTuple):
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


def distance(
    a: str,
    b: str,
    *,
    extraction: Extraction,
    compute: MapCompute | None = None,
    progress: Progress,
    max_bad_fraction: float = 0.01,
    folder: Location | None = None,
    save_statistics: Sequence[str | None] = (None, None),
    insist: bool = False,
) -> Distance:
    """FID, and KID, between two sets, each an image folder (searched to the bottom), a frame table or an .npz.

    Work goes into a folder below `folder` that is gone afterwards: the system's temporary folder by default; on a
    cluster of several machines one that all of them see. Ray is joined or started only if there are frames to read.
    `save_statistics` names .npz files, one a set, that are kept for the next time; pytorch-fid reads them too. With
    `insist` two .npz files must come from the extractor of `extraction`; else theirs counts, whatever it is.

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
    _check_before(found, (a, b), extraction, insist)
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
    apart = _frechet(first, second, (a, b))
    kernel: KernelDistance | None = None
    if first.features is not None and second.features is not None:
        kernel = kernel_distance(first.features, second.features)
    return Distance(
        apart,
        first.statistics.count,
        second.statistics.count,
        first.statistics.extractor,
        first.statistics.resize,
        kernel.kid if kernel else None,
        kernel.deviation if kernel else None,
    )


def _frechet(first: _Side, second: _Side, names: Sequence[str]) -> float:
    """From features where a side has few frames: its covariance would be large, singular and slow."""
    check_comparable(first.statistics, second.statistics, names)
    few = [side.features for side in (first, second) if side.features is not None and _are_few(side.features)]
    if len(few) == 2:
        return gaussian_distance(gaussian_of_features(few[0]), gaussian_of_features(few[1]))
    if few:
        other = second if few[0] is first.features else first
        return few_frames_distance(few[0], other.statistics.mean, other.statistics.cov)
    return statistics_distance(first.statistics, second.statistics, names)


def _are_few(features: npt.NDArray[np.float32]) -> bool:
    return bool(2 * len(features) <= features.shape[1])


def _found(place: Location) -> Statistics | pa.Table:
    return read_statistics(place) if place.name.lower().endswith(".npz") else _frames_at(place)


def _check_before(
    found: Sequence[Statistics | pa.Table], names: Sequence[str], extraction: Extraction, insist: bool
) -> None:
    """Refuse what cannot be compared before hours are spent on the frames of one of them."""
    made = [one for one in found if isinstance(one, Statistics)]
    if len(made) == len(found):
        for one, name in zip(made, names, strict=True):
            if insist and one.extractor not in ("", extraction.name):
                raise UserError(
                    f"{name}: these statistics were made with {one.extractor}, not with {extraction.name}. "
                    f"Cure: leave --extractor out, or make them again from the frames"
                )
        return
    identity = identify(extraction)
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
    return _Side(
        read_statistics(commit.file(STATISTICS_NAME)), sampled_vectors(commit, FEATURES, FEATURES, ROWS_FOR_KERNEL)
    )


def _frames_at(place: Location) -> pa.Table:
    """A frame table from a Parquet file, or from all images below a folder."""
    if place.name.lower().endswith(".parquet"):
        if not place.exists():
            raise UserError(f"{place}: there is no such frame table; check the path")
        frames = frame.resolve(place.read_table(), place.parent)
        frame.check_frames(frames)
        return frames
    found = list_frames(FolderDataset.of_images(place.uri), place.name)
    return frame.frame_table({frame.FRAME_ID: one.frame_id, frame.URI: one.uri} for one in found)
