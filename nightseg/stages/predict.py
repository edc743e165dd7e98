"""Segment frames to look at and to use elsewhere: a stage of a run, or one folder of images without a run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from nightseg.compute.inference import map_shards
from nightseg.config import MapCompute
from nightseg.frames import table as frame
from nightseg.frames.datasets import list_frames
from nightseg.frames.images import BadFrame
from nightseg.learning.prediction import (
    PICTURE_SUFFIX,
    PICTURES,
    Picture,
    Segmenter,
    UnreadRow,
    picture,
    quarantined,
    segment_rows,
)
from nightseg.progress import Progress
from nightseg.storage import Location, UserError, sha256_of
from nightseg.workspace import Attempt, Commit

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
) -> Commit:
    """Commit `predictions` (the frame's columns, mean_confidence, `<picture>_uri` and `_sha256` a picture) and
    `quarantine`; the mask's columns are `prediction_uri` and `prediction_sha256`. `frames` has absolute uris.

    Raises UserError: no frame, no model, an unknown picture, more bad frames than `max_bad_fraction`.
    """
    started = time.monotonic()
    wanted = check_pictures(save)
    if frames.num_rows == 0:
        raise UserError(f"predict {name}: the dataset holds no frame; look at its quarantine table")
    columns = [column for column in frames.column_names if column in frame.FRAME_SCHEMA.names]
    records = map_shards(
        frames.select(columns),
        Predictor,
        {
            "model": model.folder / "model",
            "batch": compute.batch,
            "device": "cuda" if compute.gpus_per_actor else "cpu",
            "save": wanted,
        },
        attempt=attempt,
        shard_rows=compute.shard_rows,
        actors=compute.actors,
        cpus_per_actor=compute.cpus_per_actor,
        gpus_per_actor=compute.gpus_per_actor,
        progress=progress,
        title=f"predict {name}",
    )
    return attempt.finish(
        rows_in=frames.num_rows,
        rows_out=sum(record.rows("predictions") for record in records),
        quarantined=sum(record.rows("quarantine") for record in records),
        max_bad_fraction=max_bad_fraction,
        num_shards=len(records),
        summary={"save": list(wanted)},
        seconds=time.monotonic() - started,
    )


class Predictor:
    """Segments the frames of a shard and writes their pictures."""

    def __init__(self, model: Location, batch: int, device: str, save: Sequence[Picture]) -> None:
        self.segmenter = Segmenter(model, device)
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


# -- one folder, without a run ---------------------------------------------------------------------------------------


def predict_folder(
    model: Location,
    images: Location,
    out: Location,
    *,
    save: Sequence[str] = ("mask",),
    batch: int = 8,
    device: str | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Segment every image below a folder (or one image file), in this process.

    The mask of `a/b.jpg` is `<out>/a/b.png`, its other pictures `<out>/<picture>/a/b.*`. Images that cannot be used do
    not stop the rest: `<out>/quarantine.json` lists them with their reasons. Returns what was done.
    Raises UserError: no model, no image, none that can be used, two images that would be written to one file.
    """
    started = time.monotonic()
    wanted = check_pictures(save)
    segmenter = Segmenter(model, device)
    rows, bad = _image_rows(images)
    names = {row[frame.FRAME_ID]: _names(row[frame.FRAME_ID], wanted) for row in rows}
    _check_names(names)
    num_written = 0
    with progress.task("predict", len(rows), "images") as task:
        for result in segment_rows(segmenter, frame.frame_table(rows), batch):
            if isinstance(result, UnreadRow):
                bad.append(quarantined(result.row, result.fault))
            else:
                for kind, name in names[result.row[frame.FRAME_ID]].items():
                    data = picture(kind, result.image, result.segmented, segmenter.taxonomy)
                    (out / name).write_bytes(data)
                num_written += 1
            task.advance()
    (out / "quarantine.json").write_json(bad)
    if not num_written:
        raise UserError(
            f"none of the {len(bad)} images in {images.uri} can be used; the first, {bad[0]['uri']}, is "
            f"{bad[0]['reason']} ({bad[0]['detail']}). All are listed in {(out / 'quarantine.json').uri}"
        )
    return {
        "model": model.uri,
        "images": num_written + len(bad),
        "written": num_written,
        "quarantined": len(bad),
        "out": out.uri,
        "save": list(wanted),
        "taxonomy": segmenter.taxonomy.name,
        "seconds": round(time.monotonic() - started, 3),
    }


def _image_rows(images: Location) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Images to read, and quarantine rows of those whose name no table or file system can hold.

    An id is the image's place below the folder, without suffix unless two would be the same.
    """
    if images.exists() and not images.is_folder():
        return [{frame.FRAME_ID: images.name.rpartition(".")[0] or images.name, frame.URI: images.uri}], []
    good, bad = [], []
    for candidate in list_frames("images", images, dataset="images", labelled=False):
        row = {frame.FRAME_ID: candidate.frame_id.removeprefix("images/"), frame.URI: candidate.uri}
        if candidate.problem:
            bad.append(quarantined(row, BadFrame("unreadable", candidate.problem)))
        else:
            good.append(row)
    return good, bad


def _names(frame_id: str, save: Sequence[Picture]) -> dict[Picture, str]:
    """File of each picture below the output folder."""
    return {
        kind: ("" if kind == "mask" else f"{kind}/") + frame.file_name(frame_id, PICTURE_SUFFIX[kind]) for kind in save
    }


def _check_names(names: Mapping[str, Mapping[Picture, str]]) -> None:
    owner: dict[str, str] = {}
    for frame_id, files in names.items():
        for file in files.values():
            if owner.setdefault(file, frame_id) != frame_id:
                raise UserError(
                    f"the images {owner[file]} and {frame_id} would both write {file}; rename their folder, or save "
                    "one kind of picture at a time"
                )
