"""Segment frames to look at and to use elsewhere, as a stage of a run. Without a run: `nightseg/masks.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from nightseg.cluster.map import map_shards
from nightseg.cluster.settings import MapCompute
from nightseg.data import table as frame
from nightseg.progress import Progress
from nightseg.segmenter.inference import WHOLE_FRAME, Inference
from nightseg.segmenter.predict import (
    PICTURE_SUFFIX,
    PICTURES,
    Picture,
    Segmenter,
    UnreadRow,
    picture,
    quarantined,
    segment_rows,
)
from nightseg.storage import Attempt, Commit, Location, UserError, sha256_of

VERSION = 2

PREDICTION_URI = "prediction_uri"  # the mask: palette PNG of train ids, relative to the commit's folder
MEAN_CONFIDENCE = "mean_confidence"
_STAGE_FOLDERS: Mapping[Picture, str] = {picture: f"{picture}s" for picture in PICTURES} | {"confidence": "confidence"}


def predict(
    frames: pa.Table,
    model: Commit,
    *,
    name: str,
    attempt: Attempt,
    compute: MapCompute,
    progress: Progress,
    max_bad_fraction: float,
    save: Sequence[Picture] = PICTURES,
    inference: Inference = WHOLE_FRAME,
) -> Commit:
    """Commit `predictions` (the frame's columns, mean_confidence, `<picture>_uri` and `_sha256` a picture) and
    `quarantine`; the mask's columns are `prediction_uri` and `prediction_sha256`. `frames` has absolute uris.

    Raises UserError: no frame, no model, an unknown picture, more bad frames than `max_bad_fraction`.
    """
    wanted = check_pictures(save)
    if frames.num_rows == 0:
        raise UserError(f"predict {name}: the dataset holds no frame; look at its quarantine table")
    columns = [column for column in frames.column_names if column in frame.FRAME_SCHEMA.names]
    shards = map_shards(
        frames.select(columns),
        Predictor,
        {
            "model": model.folder / "model",
            "batch": compute.batch,
            "device": "cuda" if compute.gpus_per_actor else "cpu",
            "save": wanted,
            "inference": inference,
        },
        attempt=attempt,
        compute=compute,
        progress=progress,
        title=f"predict {name}",
    )
    return shards.finish("predictions", max_bad_fraction=max_bad_fraction, summary={"save": list(wanted)})


class Predictor:
    """Segments the frames of a shard and writes their pictures."""

    def __init__(
        self, model: Location, batch: int, device: str, save: Sequence[Picture], inference: Inference = WHOLE_FRAME
    ) -> None:
        self.segmenter = Segmenter(model, device, inference)
        self.batch = batch
        self.save = tuple(save)

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        made, bad = [], []
        for result in segment_rows(self.segmenter, rows, self.batch):
            if isinstance(result, UnreadRow):
                bad.append(quarantined(result.row, result.fault))
                continue
            facts: dict[str, Any] = {MEAN_CONFIDENCE: float(result.segmented.confidence.mean(dtype=np.float64))}
            for kind in self.save:
                file = frame.file_name(result.row[frame.FRAME_ID], PICTURE_SUFFIX[kind])
                data = picture(kind, result.image, result.segmented, self.segmenter.taxonomy)
                (folder / f"{_STAGE_FOLDERS[kind]}/{file}").write_bytes(data)
                facts |= {_column(kind): f"{_STAGE_FOLDERS[kind]}/{file}", _column(kind, "sha256"): sha256_of(data)}
            made.append({**result.row, **facts})
        extra = {MEAN_CONFIDENCE: pa.float64()}
        extra |= {_column(kind, part): pa.string() for kind in self.save for part in ("uri", "sha256")}
        return {"predictions": frame.frame_table(made, extra=extra), "quarantine": frame.quarantine_table(bad)}


def _column(kind: Picture, part: str = "uri") -> str:
    return f"prediction_{part}" if kind == "mask" else f"{kind}_{part}"


def check_pictures(save: Sequence[str]) -> tuple[Picture, ...]:
    """The pictures in their own order, each once. Raises UserError for an unknown one, or for none."""
    unknown = [kind for kind in save if kind not in PICTURES]
    if unknown or not save:
        what = f"unknown picture '{unknown[0]}'" if unknown else "no picture is asked for"
        raise UserError(f"save: {what}; known: {', '.join(PICTURES)}")
    return tuple(kind for kind in PICTURES if kind in save)
