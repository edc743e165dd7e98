"""Compare predictions with labels, at the labels' own size: a model on a test set, or two folders of label images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.compute.inference import map_shards
from nightseg.config import MapCompute
from nightseg.frames import table as frame
from nightseg.frames.images import BadFrame, decode_label, encode_png, read_bytes, read_label
from nightseg.frames.taxonomy import IGNORE, TRAIN_IDS, Taxonomy
from nightseg.frames.taxonomy import taxonomy as load_taxonomy
from nightseg.learning.inference import WHOLE_FRAME, Inference
from nightseg.learning.prediction import PICTURES, Segmenter, UnreadRow, check_classes, quarantined, segment_rows
from nightseg.measures.confusion import add_up, confusion_matrix, scores
from nightseg.progress import Progress
from nightseg.storage import Location, UserError, sha256_of
from nightseg.workspace import Attempt, Commit

VERSION = 1

PREDICTION_URI = "prediction_uri"  # palette PNG of train ids, relative to the commit's folder
PREDICTION_SHA256 = "prediction_sha256"
CONFUSION = "confusion"  # pixels by label and prediction, K x K values, row by row

AbsentClass = Literal["cityscapes", "detectron2"]
Counts = npt.NDArray[np.int64]


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
    inference: Inference = WHOLE_FRAME,
) -> Commit:
    """Commit `predictions` (the frame's columns, prediction_uri, confusion), `quarantine` and `scores.json`.

    `frames` has absolute uris and a label for every frame. Scores are fractions over the whole set, from one summed
    int64 matrix. Raises UserError: a frame without label, a model of other classes, no labelled pixel, more bad frames
    than `max_bad_fraction`.
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
        {**arguments, "inference": inference},
        attempt=attempt,
        shard_rows=compute.shard_rows,
        actors=compute.actors,
        cpus_per_actor=compute.cpus_per_actor,
        gpus_per_actor=compute.gpus_per_actor,
        progress=progress,
        title=f"evaluate {name}",
    )
    num_frames = sum(record.rows("predictions") for record in records)
    parts = ((attempt.folder / record.tables["predictions"].path).read_table() for record in records)
    size = (classes.num_classes, classes.num_classes)
    matrix = add_up((np.reshape(m, size) for part in parts for m in part[CONFUSION].to_pylist()), classes.num_classes)
    if not matrix.any() and num_frames:
        raise UserError(f"evaluate {name}: none of the {num_frames} labels has a pixel with a class, only ignored ones")
    summary: dict[str, Any] = {}
    if num_frames:
        summary = score_record(matrix, classes, absent_class) | {"frames": num_frames}
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


def score_record(matrix: Counts, classes: Taxonomy, absent_class: AbsentClass) -> dict[str, Any]:
    """Scores as JSON: fractions, null for a class without IoU, and the matrix they come from."""
    found = scores(matrix, absent_class)
    return {
        "pa": found.pa,
        "ca": found.ca,
        "miou": found.miou,
        "fwiou": found.fwiou,
        "iou": {
            name: None if math.isnan(value) else value for name, value in zip(classes.classes, found.iou, strict=True)
        },
        "confusion": matrix.tolist(),
        "absent_class": absent_class,
    }


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
        self, model: Location, batch: int, device: str, classes: Taxonomy, inference: Inference = WHOLE_FRAME
    ) -> None:
        self.segmenter = Segmenter(model, device, inference)
        self.batch = batch
        self.classes = classes

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        made, bad = [], []
        for result in segment_rows(self.segmenter, rows, self.batch):
            try:
                if isinstance(result, UnreadRow):
                    raise result.fault
                label_HW = self._label(result.row, result.image.shape[:2])
            except BadFrame as fault:
                bad.append(quarantined(result.row, fault))
                continue
            prediction_HW = result.segmented.labels
            mask = encode_png(prediction_HW, self.classes.palette)
            uri = f"masks/{frame.file_name(result.row[frame.FRAME_ID], '.png')}"
            (folder / uri).write_bytes(mask)
            matrix = confusion_matrix(label_HW, prediction_HW, self.classes.num_classes)
            facts = {PREDICTION_URI: uri, PREDICTION_SHA256: sha256_of(mask), CONFUSION: matrix.reshape(-1).tolist()}
            made.append({**result.row, **facts})
        extra = {PREDICTION_URI: pa.string(), PREDICTION_SHA256: pa.string(), CONFUSION: pa.list_(pa.int64())}
        return {"predictions": frame.frame_table(made, extra=extra), "quarantine": frame.quarantine_table(bad)}

    def _label(self, row: Mapping[str, Any], size: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        data = read_bytes(Location.of(row[frame.LABEL_URI]), missing="label_missing")
        if row.get(frame.LABEL_SHA256) not in (None, sha256_of(data)):
            raise BadFrame(
                "unreadable", f"the label {row[frame.LABEL_URI]} has changed since it was collected (sha256)"
            )
        label_HW = decode_label(data)
        if label_HW.shape != size:
            raise BadFrame("label_size", f"the label is {label_HW.shape}, the image {size} (height, width)")
        return self.classes.to_train_ids(label_HW, row[frame.LABEL_ENCODING])


# -- two folders -----------------------------------------------------------------------------------------------------

# What data sets append to a frame's name, so that a.png, a_leftImg8bit.png and a_gtFine_labelIds.png are one frame.
_NAME_ENDINGS = ("_leftImg8bit", "_rgb_anon", "_labelTrainIds", "_labelIds", "_gtFine", "_gtCoarse", "_gt")
_NOT_LABELS = ("_color", "_instanceIds", "_instanceTrainIds", "_polygons", "_invGray")
_MAX_LISTED = 5


class _Pair(NamedTuple):
    prediction: Location
    label: Location
    label_name: str


def evaluate_folders(
    predictions_folder: Location,
    labels_folder: Location,
    taxonomy: str,
    absent_class: AbsentClass = "cityscapes",
    label_encoding: str | None = None,
) -> dict[str, Any]:
    """Score label images of train ids against labels: the scores of `score_record`, `frames`, `label_encoding`.

    Files are paired by name below their folders: suffix and the endings of the Cityscapes family are left out, and
    predictions without label are not looked at. `label_encoding` null: train_ids if all values of all labels are known
    there, else the first encoding of the taxonomy that knows them all. A prediction of 255 counts as wrong.
    Raises UserError: no folder, no label, a label without prediction, sizes that differ, unknown ids.
    """
    classes = load_taxonomy(taxonomy)
    pairs = _pair_up(predictions_folder, labels_folder)
    encoding = label_encoding or _guess_encoding(pairs, classes)
    matrices = [_compare(pair, classes, encoding) for pair in pairs]
    matrix = add_up(matrices, classes.num_classes)
    if not matrix.any():
        raise UserError(f"none of the {len(pairs)} labels in {labels_folder.uri} has a pixel with a class")
    facts = {"taxonomy": classes.name, "label_encoding": encoding, "frames": len(pairs)}
    return score_record(matrix, classes, absent_class) | facts


def _pair_up(predictions_folder: Location, labels_folder: Location) -> list[_Pair]:
    predictions = _label_files(predictions_folder, "predictions", skip=PICTURES)  # `nightseg predict --save color`
    labels = _label_files(labels_folder, "labels")
    by_name = _by_name(predictions)
    is_alone = {name for name, keys in _by_name(labels).items() if len(keys) == 1}
    pairs, missing = [], []
    for key, label in labels.items():
        name = PurePosixPath(key).name
        # The same place below both folders; else the same file name, where no other frame has it.
        found = [key] if key in predictions else by_name.get(name, [])
        if len(found) == 1 and (key in predictions or name in is_alone):
            pairs.append(_Pair(predictions_folder / predictions[found[0]], labels_folder / label, label))
        else:
            missing.append(f"{label} (the name occurs more than once)" if found else label)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(labels)} labels in {labels_folder.uri} have no prediction in "
            f"{predictions_folder.uri}: {_first(missing)}. A prediction is a PNG with the label's name "
            f"(without endings such as {_NAME_ENDINGS[0]}); `nightseg predict` writes them so"
        )
    return pairs


def _by_name(keys: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(PurePosixPath(key).name, []).append(key)
    return found


def _label_files(folder: Location, what: str, skip: Sequence[str] = ()) -> dict[str, str]:
    """Key of the frame -> file name, for the PNG files below a folder, but not below its folders in `skip`."""
    if not folder.is_folder():
        raise UserError(f"{what}: there is no folder {folder.uri}")
    files: dict[str, str] = {}
    for entry in folder.list(recursive=True):
        path = PurePosixPath(entry.name)
        hidden = any(part.startswith(".") for part in path.parts)
        skipped = hidden or path.stem.endswith(_NOT_LABELS) or (len(path.parts) > 1 and path.parts[0] in skip)
        if entry.is_folder or skipped or path.suffix.lower() != ".png":
            continue
        key = _key(path)
        # Both kinds of Cityscapes label may be there: the train ids need no map, so they win.
        if key not in files or path.stem.endswith("_labelTrainIds"):
            files[key] = entry.name
        elif not PurePosixPath(files[key]).stem.endswith("_labelTrainIds"):
            raise UserError(f"{what}: {files[key]} and {entry.name} in {folder.uri} are the same frame by name")
    if not files:
        raise UserError(f"{what}: there is no PNG below {folder.uri}")
    return files


def _key(path: PurePosixPath) -> str:
    stem = path.stem
    while stem.endswith(_NAME_ENDINGS):
        stem = next(stem.removesuffix(ending) for ending in _NAME_ENDINGS if stem.endswith(ending))
    return str(path.with_name(stem)) if stem else str(path.with_suffix(""))


def _guess_encoding(pairs: Sequence[_Pair], classes: Taxonomy) -> str:
    """The one encoding that knows every value; the values of one file alone could fit several."""
    present = np.zeros(256, dtype=np.bool_)
    for pair in pairs:
        present |= np.bincount(_read(pair.label).reshape(-1), minlength=256) > 0
    names = [TRAIN_IDS, *(name for name in classes.encodings if name != TRAIN_IDS)]
    if "label_ids" in names and all(PurePosixPath(pair.label_name).stem.endswith("_labelIds") for pair in pairs):
        names = ["label_ids"]  # the name says it, even if the values could be train ids
    for name in names:
        if not (present & ~classes.lut(name)[1]).any():
            return name
    unknown = {name: np.flatnonzero(present & ~classes.lut(name)[1]).tolist() for name in names}
    raise UserError(
        f"the labels hold ids that no encoding of {classes.name} knows: "
        + "; ".join(f"{name} lacks {_first([str(value) for value in values])}" for name, values in unknown.items())
        + ". Is this the right --taxonomy?"
    )


def _compare(pair: _Pair, classes: Taxonomy, encoding: str) -> Counts:
    raw_label_HW, prediction_HW = _read(pair.label), _read(pair.prediction)
    try:
        label_HW = classes.to_train_ids(raw_label_HW, encoding)
    except BadFrame as fault:
        raise UserError(f"{pair.label.uri}: {fault.detail}") from fault
    if label_HW.shape != prediction_HW.shape:
        raise UserError(
            f"{pair.prediction.uri} is {_by(prediction_HW)}, its label {pair.label.uri} is {_by(label_HW)}; "
            "predictions are compared at the label's own size, so scale them back (nearest) first"
        )
    unknown = sorted({int(v) for v in np.unique(prediction_HW)} - {*range(classes.num_classes), IGNORE})
    if unknown:
        raise UserError(
            f"{pair.prediction.uri} holds {_first([str(value) for value in unknown])}, which are no train ids of "
            f"{classes.name} (0 to {classes.num_classes - 1}, or 255); predictions must be train ids, not colours"
        )
    return confusion_matrix(label_HW, prediction_HW, classes.num_classes)


def _read(file: Location) -> npt.NDArray[np.uint8]:
    try:
        return read_label(file)
    except BadFrame as fault:
        raise UserError(f"{file.uri}: {fault}") from fault


def _by(array: npt.NDArray[np.uint8]) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more
