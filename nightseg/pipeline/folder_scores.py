"""Scores of a folder of predictions against a folder of labels, at the labels' own size, without a recipe.

One pass: each frame is read once and leaves the counts of its (raw label id, prediction) pairs. Which encoding the raw
ids have shows when all were seen; then the sum becomes the confusion matrix.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.cluster import ray as cluster
from nightseg.cluster.map import map_shards
from nightseg.cluster.settings import MapCompute
from nightseg.data.images import BadFrame, read_label
from nightseg.data.layouts import Pair, first_of, pair_up
from nightseg.data.taxonomy import IGNORE, TRAIN_IDS, Taxonomy
from nightseg.data.taxonomy import taxonomy as load_taxonomy
from nightseg.metrics.boundary import boundary_counts
from nightseg.metrics.confusion import Counts, matrix_of_pairs, pair_counts
from nightseg.progress import Progress, SilentProgress
from nightseg.segmenter.predict import PICTURES
from nightseg.stages.evaluate import AbsentClass, boundary_record, score_record
from nightseg.storage import Location, UserError, Workspace, hash_of

FRAMES_FOR_ACTORS = 2000  # below, starting Ray takes as long as reading them
WORK_NAME = ".evaluate.work"
VERSION = 1

PREDICTION, LABEL = "prediction", "label"  # names below the two folders
CODES = "codes"  # label << 8 | prediction, for the pairs that occur
PIXELS = "pixels"  # of each of them


class Counted(NamedTuple):
    """One frame. `boundaries`: counts for every encoding that knows all ids of the label, if they are asked for."""

    label: str
    codes: npt.NDArray[np.int64]
    pixels: Counts
    boundaries: Mapping[str, Counts]

    @property
    def raw_ids(self) -> Counts:
        """Pixels of each raw id of the label, int64 (256,)."""
        return np.bincount(self.codes >> 8, weights=self.pixels, minlength=256).astype(np.int64)


def evaluate_folders(
    predictions_folder: Location,
    labels_folder: Location,
    taxonomy: str,
    absent_class: AbsentClass = "cityscapes",
    label_encoding: str | None = None,
    *,
    boundary: float | None = None,
    actors: int | None = None,
    work: Location | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score label images of train ids against labels: the scores of `score_record`, `frames`, `label_encoding`.

    Files are paired by name (`pair_up`). `label_encoding` None: train_ids if all values of all labels are known there,
    else the first encoding of the taxonomy that knows them all. A prediction of 255 counts as wrong. `boundary`: the
    distance of boundary IoU, a share of the diagonal; None leaves it out.

    `actors` None: threads of this process, and two actors from FRAMES_FOR_ACTORS frames on. A pass of actors keeps what
    it has done in a hidden folder of its own below `work` (default: below the predictions) until it is finished, so the
    same call continues one that was interrupted.

    Raises UserError: no folder, no label, a label without prediction, sizes that differ, unknown ids.
    """
    classes = load_taxonomy(taxonomy)
    pairs = pair_up(predictions_folder, labels_folder, skip=PICTURES)  # `nightseg predict --save color`
    encodings = [label_encoding] if label_encoding else _encodings(pairs, classes)
    counter = PairCounter(predictions_folder, labels_folder, classes, encodings, boundary)
    if actors is None and len(pairs) >= FRAMES_FOR_ACTORS:
        actors = 2
    progress = progress or SilentProgress()
    if actors is None:
        counted = _here(counter, pairs, progress)
    else:
        counted = _on_actors(counter, pairs, actors, (work or predictions_folder) / WORK_NAME, progress)
    total, faults = np.zeros((256, 256), dtype=np.int64), dict[str, str]()
    boundaries = {name: np.zeros((classes.num_classes, 3), dtype=np.int64) for name in encodings}
    for frame in counted:
        total.reshape(-1)[frame.codes] += frame.pixels
        for name, fault in counter.faults(frame).items():
            faults.setdefault(name, fault)
        for name, counts in frame.boundaries.items():
            boundaries[name] += counts
    encoding = next((name for name in encodings if name not in faults), None)
    if encoding is None:
        raise _unknown_ids(classes, faults)
    by_class = np.zeros_like(total)
    np.add.at(by_class, classes.lut(encoding)[0], total)
    matrix = matrix_of_pairs(by_class, classes.num_classes)
    if not matrix.any():
        raise UserError(f"none of the {len(pairs)} labels in {labels_folder.uri} has a pixel with a class")
    record = score_record(matrix, classes, absent_class)
    if boundary is not None:
        record |= {"boundary": boundary_record(boundaries[encoding], classes, absent_class, boundary)}
    return record | {"taxonomy": classes.name, "label_encoding": encoding, "frames": len(pairs)}


def _encodings(pairs: Sequence[Pair], classes: Taxonomy) -> list[str]:
    """The encodings that the labels may have, the likeliest first; the values of one file alone could fit several."""
    names = [TRAIN_IDS, *(name for name in classes.encodings if name != TRAIN_IDS)]
    if "label_ids" in names and all(PurePosixPath(pair.label.name).stem.endswith("_labelIds") for pair in pairs):
        return ["label_ids"]  # the name says it, even if the values could be train ids
    return names


class PairCounter:
    """Reads a prediction and its label, checks both, counts. Also what an actor does with a shard of pairs."""

    def __init__(
        self,
        predictions: Location,
        labels: Location,
        classes: Taxonomy,
        encodings: Sequence[str],
        boundary: float | None,
    ) -> None:
        self.predictions, self.labels = predictions, labels
        self.classes = classes
        self.lookups = {name: classes.lut(name) for name in encodings}
        self.boundary = boundary

    @property
    def arguments(self) -> dict[str, Any]:
        """What another process builds the same counter from."""
        return {
            "predictions": self.predictions,
            "labels": self.labels,
            "classes": self.classes,
            "encodings": list(self.lookups),
            "boundary": self.boundary,
        }

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        counted = [self.count(row[PREDICTION], row[LABEL]) for row in rows.to_pylist()]
        return {"counts": _as_table(counted, list(self.lookups))}

    def count(self, prediction_name: str, label_name: str) -> Counted:
        prediction, label = self.predictions / prediction_name, self.labels / label_name
        raw_label_HW, prediction_HW = _read(label), _read(prediction)
        if raw_label_HW.shape != prediction_HW.shape:
            raise UserError(
                f"{prediction.uri} is {_by(prediction_HW)}, its label {label.uri} is {_by(raw_label_HW)} pixels (width "
                "x height); predictions are compared at the label's own size, so scale them back (nearest neighbour) "
                "first, or predict from images of that size: `nightseg predict` writes masks as large as its images"
            )
        pairs = pair_counts(raw_label_HW, prediction_HW).reshape(-1)
        codes = np.flatnonzero(pairs)
        self._check_prediction(np.unique(codes & 0xFF), prediction)
        frame = Counted(label_name, codes, pairs[codes], {})
        faults = self.faults(frame)
        if len(faults) == len(self.lookups):
            raise _unknown_ids(self.classes, faults)
        if self.boundary is None:
            return frame
        found = {
            name: boundary_counts(ids[raw_label_HW], prediction_HW, self.classes.num_classes, self.boundary)
            for name, (ids, _) in self.lookups.items()
            if name not in faults
        }
        return frame._replace(boundaries=found)

    def faults(self, frame: Counted) -> dict[str, str]:
        """For every encoding that does not know all ids of the label: which, and where, in words."""
        raw_ids = frame.raw_ids
        faults = {}
        for name, (_, known) in self.lookups.items():
            unknown = np.flatnonzero((raw_ids > 0) & ~known)
            if len(unknown):
                ids = first_of([f"{value} ({raw_ids[value]} pixels)" for value in unknown])
                faults[name] = f"ids {ids} of {(self.labels / frame.label).uri} are not in the encoding {name}"
        return faults

    def _check_prediction(self, values: npt.NDArray[np.int64], file: Location) -> None:
        unknown = [str(value) for value in values if value >= self.classes.num_classes and value != IGNORE]
        if unknown:
            raise UserError(
                f"{file.uri} holds {first_of(unknown)}, which are no train ids of {self.classes.name} (0 to "
                f"{self.classes.num_classes - 1}, or 255); predictions must be train ids, not colours"
            )


def _here(counter: PairCounter, pairs: Sequence[Pair], progress: Progress) -> Iterator[Counted]:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads, thread_name_prefix="evaluate")
    try:
        with progress.task("evaluate", len(pairs), "frames") as task:
            for counted in pool.map(lambda pair: counter.count(pair.prediction.name, pair.label.name), pairs):
                task.advance()
                yield counted
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _on_actors(
    counter: PairCounter, pairs: Sequence[Pair], actors: int, folder: Location, progress: Progress
) -> Iterator[Counted]:
    """Through Ray Data. The folder with what is done lives until every count was taken from it."""
    workspace, compute = _workspace(folder), MapCompute(actors=actors)
    listing = [[entry.name, entry.size, entry.modified_ns] for pair in pairs for entry in pair]
    recipe = {
        "ids": {name: ids.tolist() + known.tolist() for name, (ids, known) in counter.lookups.items()},
        "num_classes": counter.classes.num_classes,
        "boundary": counter.boundary,
        "folders": [counter.predictions.uri, counter.labels.uri],
    }
    rows = pa.table({PREDICTION: [p.prediction.name for p in pairs], LABEL: [p.label.name for p in pairs]})
    with workspace.lock(), cluster.left_as_found():
        inputs = {"files": hash_of(listing)}
        stage = workspace.stage("evaluate", "folders", version=VERSION, recipe=recipe, inputs=inputs, seed=0)
        attempt = stage.open()
        records = map_shards(
            rows,
            PairCounter,
            counter.arguments,
            attempt=attempt,
            shard_rows=compute.shard_rows,
            actors=compute.actors,
            cpus_per_actor=compute.cpus_per_actor,
            gpus_per_actor=0.0,
            progress=progress,
            title="evaluate",
        )
        for record in records:
            yield from _from_table((attempt.folder / record.tables["counts"].path).read_table(), list(counter.lookups))
    folder.delete()


def _workspace(folder: Location) -> Workspace:
    try:
        folder.make_folder()
    except UserError as error:
        raise UserError(
            f"{folder.uri}, where actors keep what they have done, cannot be made. Cure: --work DIR with a folder that "
            "you may write and all actors see, or leave out --actors"
        ) from error
    return Workspace(folder)


def _as_table(frames: Sequence[Counted], encodings: Sequence[str]) -> pa.Table:
    whole = pa.list_(pa.int64())
    columns = {
        LABEL: pa.array([frame.label for frame in frames], pa.string()),
        CODES: pa.array([frame.codes for frame in frames], whole),
        PIXELS: pa.array([frame.pixels for frame in frames], whole),
    }
    for name in encodings:
        counts = [frame.boundaries.get(name) for frame in frames]
        columns[_boundary(name)] = pa.array([None if count is None else count.reshape(-1) for count in counts], whole)
    return pa.table(columns)


def _from_table(table: pa.Table, encodings: Sequence[str]) -> Iterable[Counted]:
    for row in table.to_pylist():
        kept = {name: row[_boundary(name)] for name in encodings}
        boundaries = {name: np.reshape(counts, (-1, 3)) for name, counts in kept.items() if counts is not None}
        codes, pixels = np.asarray(row[CODES], dtype=np.int64), np.asarray(row[PIXELS], dtype=np.int64)
        yield Counted(row[LABEL], codes, pixels, boundaries)


def _boundary(encoding: str) -> str:
    return f"boundary {encoding}"


def _unknown_ids(classes: Taxonomy, faults: Mapping[str, str]) -> UserError:
    several = f"the labels hold ids that no encoding of {classes.name} knows: " if len(faults) > 1 else ""
    of = "" if several else f" of the taxonomy {classes.name}"
    return UserError(f"{several}{'; '.join(faults.values())}{of}. Is this the right --taxonomy?")


def _read(file: Location) -> npt.NDArray[np.uint8]:
    try:
        return read_label(file)
    except BadFrame as fault:
        raise UserError(f"{file.uri}: {fault}") from fault


def _by(array: npt.NDArray[np.uint8]) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"
