"""A model on a test set: its predictions against labels, at the labels' own size."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.cluster.map import map_shards
from nightseg.cluster.settings import MapCompute
from nightseg.data import table as frame
from nightseg.data.images import BadFrame, encode_png
from nightseg.data.taxonomy import Taxonomy, train_ids_of
from nightseg.data.taxonomy import taxonomy as load_taxonomy
from nightseg.metrics.boundary import boundary_counts, boundary_scores
from nightseg.metrics.confusion import Counts, add_up, confusion_matrix, scores
from nightseg.progress import Progress
from nightseg.segmenter.inference import WHOLE_FRAME, Inference
from nightseg.segmenter.predict import Segmenter, UnreadRow, check_classes, quarantined, segment_rows
from nightseg.storage import Attempt, Commit, Location, UserError, sha256_of

VERSION = 2

PREDICTION_URI = "prediction_uri"  # palette PNG of train ids, relative to the commit's folder
PREDICTION_SHA256 = "prediction_sha256"
CONFUSION = "confusion"  # pixels by label and prediction, K x K values, row by row
BOUNDARY = "boundary"  # pixels in the bands of label, prediction and both, K x 3 values, if they are asked for

AbsentClass = Literal["cityscapes", "detectron2"]


def evaluate(
    frames: pa.Table,
    model: Commit,
    *,
    name: str,
    taxonomy: str,
    attempt: Attempt,
    compute: MapCompute,
    progress: Progress,
    max_bad_fraction: float,
    absent_class: AbsentClass = "cityscapes",
    boundary: float | None = None,
    inference: Inference = WHOLE_FRAME,
) -> Commit:
    """Commit `predictions` (the frame's columns, prediction_uri, confusion), `quarantine` and `scores.json`.

    `frames` has absolute uris and a label for every frame. Scores are fractions over the whole set, from one summed
    int64 matrix. `boundary`: the distance of boundary IoU, a share of the diagonal; None leaves it out.
    Raises UserError: a frame without label, a model of other classes, no labelled pixel, more bad frames than
    `max_bad_fraction`.
    """
    started = time.monotonic()
    classes = load_taxonomy(taxonomy)
    _check_labelled(frames, name)
    check_classes(model.folder / "model", classes)
    columns = [column for column in frames.column_names if column in frame.FRAME_SCHEMA.names]
    device = "cuda" if compute.gpus_per_actor else "cpu"
    arguments = {"model": model.folder / "model", "batch": compute.batch, "device": device, "classes": classes}
    records = map_shards(
        frames.select(columns),
        Evaluator,
        arguments | {"boundary": boundary, "inference": inference},
        attempt=attempt,
        shard_rows=compute.shard_rows,
        actors=compute.actors,
        cpus_per_actor=compute.cpus_per_actor,
        gpus_per_actor=compute.gpus_per_actor,
        progress=progress,
        title=f"evaluate {name}",
    )
    num_frames = sum(record.rows("predictions") for record in records)
    summary: dict[str, Any] = {}
    if num_frames:
        parts = [(attempt.folder / record.tables["predictions"].path).read_table() for record in records]
        summary = _scores_of(parts, name, classes, absent_class, boundary)
        (attempt.folder / "scores.json").write_json(summary)
    return attempt.finish(
        rows_in=frames.num_rows,
        rows_out=num_frames,
        quarantined=sum(record.rows("quarantine") for record in records),
        max_bad_fraction=max_bad_fraction if num_frames else 0.0,  # without a frame there is no score to commit
        outputs=["scores.json"] if num_frames else [],
        num_shards=len(records),
        summary={key: summary[key] for key in ("miou", "pa", "ca", "fwiou") if key in summary},
        seconds=time.monotonic() - started,
    )


def _scores_of(
    parts: Sequence[pa.Table], name: str, classes: Taxonomy, absent_class: AbsentClass, boundary: float | None
) -> dict[str, Any]:
    """The content of scores.json, from the predictions of at least one frame."""
    size, num_frames = (classes.num_classes, classes.num_classes), sum(part.num_rows for part in parts)
    matrix = add_up((np.reshape(m, size) for part in parts for m in part[CONFUSION].to_pylist()), classes.num_classes)
    if not matrix.any():
        raise UserError(f"evaluate {name}: none of the {num_frames} labels has a pixel with a class, only ignored ones")
    record = score_record(matrix, classes, absent_class) | {"frames": num_frames}
    if boundary is not None:
        bands = sum(np.reshape(counts, (-1, 3)) for part in parts for counts in part[BOUNDARY].to_pylist())
        record |= {"boundary": boundary_record(bands, classes, absent_class, boundary)}
    return record


def score_record(matrix: Counts, classes: Taxonomy, absent_class: AbsentClass) -> dict[str, Any]:
    """Scores as JSON: fractions, null for a class without IoU, and the matrix they come from."""
    found = scores(matrix, absent_class)
    return {
        "pa": found.pa,
        "ca": found.ca,
        "miou": found.miou,
        "fwiou": found.fwiou,
        "iou": _by_class(found.iou, classes),
        "confusion": matrix.tolist(),
        "absent_class": absent_class,
    }


def boundary_record(
    counts: npt.ArrayLike, classes: Taxonomy, absent_class: AbsentClass, distance: float
) -> dict[str, Any]:
    """Boundary IoU as JSON: fractions, null where there is none, the counts they come from, and their distance."""
    found = boundary_scores(counts, absent_class)
    return {
        "distance": distance,
        "miou": None if math.isnan(found.miou) else found.miou,
        "iou": _by_class(found.iou, classes),
        "counts": np.asarray(counts).tolist(),
    }


def _by_class(values: tuple[float, ...], classes: Taxonomy) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in zip(classes.classes, values, strict=True)}


def _check_labelled(frames: pa.Table, name: str) -> None:
    if frames.num_rows == 0:
        raise UserError(f"evaluate {name}: the test set holds no frame; look at the quarantine table of its dataset")
    bare = [
        row[frame.FRAME_ID]
        for row in frames.select([frame.FRAME_ID, frame.LABEL_URI, frame.LABEL_ENCODING]).to_pylist()
        if row[frame.LABEL_URI] is None or row[frame.LABEL_ENCODING] is None
    ]
    if bare:
        raise UserError(
            f"evaluate {name}: {len(bare)} of {frames.num_rows} frames have no label (first {bare[0]}), so nothing can "
            "be measured on them; use `predictions` in the recipe to only look at a model's output"
        )


class Evaluator:
    """Segments the frames of a shard, counts their pixels against the labels, and keeps the predictions."""

    def __init__(
        self,
        model: Location,
        batch: int,
        device: str,
        classes: Taxonomy,
        boundary: float | None = None,
        inference: Inference = WHOLE_FRAME,
    ) -> None:
        self.segmenter = Segmenter(model, device, inference)
        self.batch = batch
        self.classes = classes
        self.boundary = boundary

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        made, bad = [], []
        for result in segment_rows(self.segmenter, rows, self.batch):
            try:
                if isinstance(result, UnreadRow):
                    raise result.fault
                label_HW = train_ids_of(result.row, self.classes, result.image.shape[:2])
            except BadFrame as fault:
                bad.append(quarantined(result.row, fault))
                continue
            assert label_HW is not None, "frames without label were refused before the pass"
            prediction_HW = result.segmented.labels
            mask = encode_png(prediction_HW, self.classes.palette)
            uri = f"masks/{frame.file_name(result.row[frame.FRAME_ID], '.png')}"
            (folder / uri).write_bytes(mask)
            matrix = confusion_matrix(label_HW, prediction_HW, self.classes.num_classes)
            facts = {PREDICTION_URI: uri, PREDICTION_SHA256: sha256_of(mask), CONFUSION: matrix.reshape(-1).tolist()}
            if self.boundary is not None:
                bands = boundary_counts(label_HW, prediction_HW, self.classes.num_classes, self.boundary)
                facts[BOUNDARY] = bands.reshape(-1).tolist()
            made.append({**result.row, **facts})
        extra = {PREDICTION_URI: pa.string(), PREDICTION_SHA256: pa.string(), CONFUSION: pa.list_(pa.int64())}
        if self.boundary is not None:
            extra[BOUNDARY] = pa.list_(pa.int64())
        return {"predictions": frame.frame_table(made, extra=extra), "quarantine": frame.quarantine_table(bad)}
