"""FID and KID of two sets of frames, without a recipe and without a run folder."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from nightseg.cluster import ray as cluster
from nightseg.cluster.settings import MapCompute
from nightseg.data import table as frame
from nightseg.data.layouts import list_frames
from nightseg.data.settings import FolderDataset
from nightseg.errors import UserError
from nightseg.progress import Progress
from nightseg.selection.features import identify
from nightseg.selection.frechet import (
    FrameSet,
    Statistics,
    check_comparable,
    read_statistics,
    set_distance,
    write_statistics,
)
from nightseg.selection.settings import Extraction
from nightseg.stages import score
from nightseg.storage import Location, Workspace


class Distance(NamedTuple):
    """Distances of two sets of frames, and between what and how they were measured."""

    fid: float
    n_a: int | None  # frames; None = the file of statistics does not say
    n_b: int | None
    extractor: str
    resize: str
    kid: float | None = None  # None = one set is a file of statistics, which has no features
    kid_deviation: float | None = None  # standard deviation over its draws


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
    found = [_found(Location.of(place)) for place in (a, b)]  # both, before the first is measured
    _check_before(found, (a, b), extraction, insist)
    sets: list[FrameSet] = []
    try:
        with cluster.left_as_found() if any(isinstance(one, pa.Table) for one in found) else nullcontext():
            for one, name in zip(found, ("a", "b"), strict=True):
                if isinstance(one, Statistics):
                    sets.append(FrameSet(one))
                    continue
                stage = Workspace(scratch).stage("score", name, version=score.VERSION, recipe={}, inputs={}, seed=0)
                commit = score.score(
                    one,
                    extraction,
                    attempt=stage.open(),
                    progress=progress,
                    compute=compute or MapCompute(),
                    max_bad_fraction=max_bad_fraction,
                )
                sets.append(FrameSet.of(commit))
    finally:
        scratch.delete()
    for side, kept in zip(sets, save_statistics, strict=True):
        if kept is not None:
            write_statistics(Location.of(kept), side.statistics)
    first, second = sets
    apart, made = set_distance(first, second, (a, b)), first.statistics
    counts = made.count, second.statistics.count
    return Distance(apart.fid, *counts, made.extractor, made.resize, apart.kid, apart.kid_deviation)


def _found(place: Location) -> Statistics | pa.Table:
    """Statistics from an .npz, or a frame table from a Parquet file or from all images below a folder."""
    if place.name.lower().endswith(".npz"):
        return read_statistics(place)
    if place.name.lower().endswith(".parquet"):
        if not place.exists():
            raise UserError(f"{place}: there is no such frame table", cure="check the path")
        frames = frame.resolve(place.read_table(), place.parent)
        frame.check_frames(frames)
        return frames
    found = list_frames(FolderDataset.of_images(place.uri), place.name)
    return frame.frame_table({frame.FRAME_ID: one.frame_id, frame.URI: one.uri} for one in found)


def _check_before(
    found: Sequence[Statistics | pa.Table], names: Sequence[str], extraction: Extraction, insist: bool
) -> None:
    """Refuse what cannot be compared before hours are spent on the frames of one of them."""
    made = [one for one in found if isinstance(one, Statistics)]
    if len(made) == len(found):
        for one, name in zip(made, names, strict=True):
            if insist and one.extractor not in ("", extraction.name):
                raise UserError(
                    f"{name}: these statistics were made with {one.extractor}, not with {extraction.name}",
                    cure="do not ask for an extractor, or make them again from the frames",
                )
        return
    identity = identify(extraction)
    nothing = np.zeros((identity.dims, identity.dims))
    coming = Statistics(nothing[0], nothing, None, identity.name, identity.resize, identity.weights_sha256)
    first, second = (one if isinstance(one, Statistics) else coming for one in found)
    check_comparable(first, second, names)
