"""A finished segmenter with the batch norm statistics of other frames (AdaBN): no label, no gradient, one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa

from nightseg.cluster.settings import MapCompute
from nightseg.data import table as frame
from nightseg.data.images import BadFrame, UInt8
from nightseg.networks.model_folder import load_card, save_model
from nightseg.progress import Progress
from nightseg.segmenter.norms import has_norms, statistics_of
from nightseg.segmenter.predict import Segmenter
from nightseg.segmenter.settings import AdaptNorms
from nightseg.storage import Attempt, Commit, Location, UserError

VERSION = 1

BATCH: Final = 4  # frames whose statistics are taken together; the result follows from it, so it is not the computer's


def adapt_norms(
    frames: pa.Table,
    start: str | Commit,
    *,
    name: str,
    norms: AdaptNorms,
    max_bad_fraction: float,
    attempt: Attempt,
    compute: MapCompute,
    progress: Progress,
) -> Commit:
    """Commit `model/`: that of `start` (a commit, or a model folder) with statistics of `norms.frames` of `frames`.

    In this process: a few hundred frames take as long as actors take to start. Raises UserError: no frame, a network
    without batch norms, more bad frames than `max_bad_fraction`.
    """
    if frames.num_rows == 0:
        raise UserError(f"model {name}: adapt_norms.pool has no frame", cure="look at the counts of its dataset")
    folder = Location.of(start) if isinstance(start, str) else start.folder / "model"
    segmenter, card = Segmenter(folder, compute.device), load_card(folder)
    if not has_norms(segmenter.network):
        raise UserError(
            f"model {name}: {card['encoder']} has no batch norm whose statistics could change", cure="leave it out"
        )
    chosen = np.sort(np.random.default_rng(attempt.seed).permutation(frames.num_rows)[: norms.frames])
    bad: list[dict[str, Any]] = []
    groups = [frames.take(part) for part in np.array_split(chosen, -(-len(chosen) // BATCH))]  # none of one frame
    tensors = statistics_of(segmenter, _batches(groups, bad, name), norms.share)
    num_good = len(chosen) - len(bad)
    told = f"{norms.share:g} of the batch norm statistics from {num_good} frames of {norms.pool}"
    parents = [] if isinstance(start, str) else [{"stage": start.stage, "name": start.name, "key": start.key}]
    source = start if isinstance(start, str) else start.name
    changes = {"weights": f"{card['weights']}; {told}", "start": source, "parents": parents, "key": attempt.key}
    save_model(attempt.folder / "model", tensors, {**card, **changes})
    attempt.write_table("quarantine", frame.quarantine_table(bad))
    return attempt.finish(
        rows_in=len(chosen),
        rows_out=num_good,
        quarantined=len(bad),
        max_bad_fraction=max_bad_fraction,
        outputs=["model/model.safetensors", "model/model.json", "quarantine.parquet"],
        summary={"steps": 0, "frames": num_good},
    )


def _batches(groups: Iterable[pa.Table], bad: list[dict[str, Any]], name: str) -> Iterator[list[UInt8]]:
    """Images of each group; rows of those that cannot be read are added to `bad`."""
    found = 0
    for rows in groups:
        images: list[UInt8] = []
        for row in rows.to_pylist():
            try:
                images.append(frame.image_of(row))
            except BadFrame as fault:
                bad.append(frame.quarantined(row, fault))
        found += len(images)
        if images:
            yield images
    if not found:
        raise UserError(f"model {name}: none of the frames of adapt_norms.pool can be read", cure="look at the files")
