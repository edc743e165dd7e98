"""Predictions against labels, at the labels' own size: a model on all of its test sets, or two folders of images."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nightseg.cluster.map import Work, map_shards
from nightseg.data import table as frame
from nightseg.data.class_list import taxonomy as load_taxonomy
from nightseg.data.encodings import (
    BY_COLOURS,
    BY_LIST,
    LABEL_FILES_SCHEMA,
    LabelFile,
    Reading,
    UnclearLabels,
    check_palettes,
    facts_of,
    label_files,
    read_as,
    unknown_ids,
)
from nightseg.data.images import BadFrame, Ids, StoredLabel, decode_stored_label, encode_png, read_bytes
from nightseg.data.label_names import named_encoding
from nightseg.data.labels import are_in_colors, check_labelled, check_orientation, train_ids_of
from nightseg.data.prefetch import prefetch
from nightseg.data.settings import AnyTaxonomy
from nightseg.data.taxonomy import COLORS, FROM_ONE, IDS, IGNORE, TRAIN_IDS, Taxonomy
from nightseg.errors import first_of, together
from nightseg.metrics.boundary import boundary_counts, boundary_scores
from nightseg.metrics.confusion import add_up, confusion_matrix, scores
from nightseg.recipe.types import Evaluation
from nightseg.segmenter.predict import RowSegmenter, check_classes
from nightseg.segmenter.settings import Inference
from nightseg.storage import Commit, Location, UserError, sha256_of

VERSION = 4

PREDICTION_URI = "prediction_uri"  # palette PNG of train ids, relative to the commit's folder
PREDICTION_SHA256 = "prediction_sha256"
TEST_SETS = "test_sets"  # names of those that the frame is in
CONFUSION = "confusion"  # pixels by label and prediction, K rows of K or K + 1 values
BOUNDARY = "boundary"  # pixels in the bands of label, prediction and both, K x 3 values, if they are asked for

AGREEING = "agreeing"  # of a sample of pixels, those that agree as they lie, and if the prediction lay in _WAYS

_WAYS = ("mirrored", "upside down", "turned by 180 degrees", "transposed", "turned left", "turned right")
_MOST_BETTER = 0.05  # of the sample: what another way may gain by chance

COUNTS = {CONFUSION: pa.list_(pa.int64()), BOUNDARY: pa.list_(pa.int64())}
Labels = npt.NDArray[np.uint8]


def evaluate(
    tests: Mapping[str, pa.Table],
    model: Commit,
    *,
    name: str,
    taxonomy: AnyTaxonomy,
    evaluation: Evaluation,
    inference: Inference,
    **work: Unpack[Work],
) -> Commit:
    """Commit `predictions` (the frame's columns, prediction_uri, test_sets, confusion), `quarantine` and `scores.json`.

    `tests`: frame tables with absolute uris, by the name of the test set; every frame has a label, and one that is in
    several sets is segmented once. scores.json has for every set the record of `_record`: fractions over the whole set,
    from one summed int64 matrix. Raises UserError: a frame without label, a model of other classes, a set without a
    labelled pixel or a good frame, more bad frames than `max_bad_fraction`.
    """
    classes = load_taxonomy(taxonomy)
    for test, frames in tests.items():
        if frames.num_rows == 0:
            what = f"evaluate {name}.{test}: the test set holds no frame"
            raise UserError(what, cure="look at the quarantine table of its dataset")
        cure = "`predictions` in the recipe, to only look at a model's output"
        check_labelled(frames, f"evaluate {name}.{test}", cure)
    check_classes(model.folder / "model", classes)
    by = RowSegmenter(model.folder / "model", work["compute"], inference)
    arguments = {"by": by, "classes": classes, "evaluation": evaluation}
    shards = map_shards(_together(tests), Evaluator, arguments, title=f"evaluate {name}", **work)
    columns = [TEST_SETS, *(column for column in COUNTS if column == CONFUSION or evaluation.boundary)]
    counted = shards.table("predictions").select(columns)
    of_tests = {test: counted.filter(_is_in(counted[TEST_SETS], test)) for test in tests}
    whole = all(part.num_rows for part in of_tests.values())  # else there is a set without a score to commit
    found = {test: _record(part, f"{name}.{test}", classes, evaluation) for test, part in of_tests.items() if whole}
    for test, record in found.items():
        if warning := _mix_up(np.array(record["confusion"]), classes):
            work["progress"].say(f"warning: evaluate {name}.{test}: {warning}")
            record["warning"] = warning
    (shards.attempt.folder / "scores.json").write_json(found)
    summary = {"miou": {test: record["miou"] for test, record in found.items()}}
    return shards.finish("predictions", outputs=["scores.json"], summary=summary, is_whole=whole)


def _together(tests: Mapping[str, pa.Table]) -> pa.Table:
    """The frames of all test sets, each once, with the names of its sets."""
    rows: dict[str, dict[str, Any]] = {}
    for test, frames in tests.items():
        columns = [column for column in frames.column_names if column in frame.FRAME_SCHEMA.names]
        for row in frames.select(columns).to_pylist():
            rows.setdefault(row[frame.FRAME_ID], row | {TEST_SETS: []})[TEST_SETS].append(test)
    return frame.frame_table(rows.values(), extra={TEST_SETS: pa.list_(pa.string())})


def _is_in(sets: pa.ChunkedArray, test: str) -> pa.Array:
    return pa.array([test in names for names in sets.to_pylist()], pa.bool_())


@dataclass
class Evaluator:
    """Segments the frames of a shard, counts their pixels against the labels, and keeps the predictions."""

    by: RowSegmenter
    classes: Taxonomy
    evaluation: Evaluation

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        made: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for result in self.by.segment(rows, bad):
            try:
                label_HW = train_ids_of(result.row, self.classes, result.image.shape[:2])
            except BadFrame as fault:
                bad.append(frame.quarantined(result.row, fault))
                continue
            assert label_HW is not None, "frames without label were refused before the pass"
            prediction_HW = result.segmented.labels
            mask = encode_png(prediction_HW, self.classes.palette)
            uri = f"masks/{frame.file_name(result.row[frame.FRAME_ID], '.png')}"
            (folder / uri).write_bytes(mask)
            counts = _counts(label_HW, prediction_HW, self.classes, self.evaluation)
            made.append({**result.row, PREDICTION_URI: uri, PREDICTION_SHA256: sha256_of(mask), **counts})
        extra = {PREDICTION_URI: pa.string(), PREDICTION_SHA256: pa.string(), TEST_SETS: pa.list_(pa.string())}
        extra |= {column: kind for column, kind in COUNTS.items() if column == CONFUSION or self.evaluation.boundary}
        return {"predictions": frame.frame_table(made, extra=extra), "quarantine": frame.quarantine_table(bad)}


# -- two folders -----------------------------------------------------------------------------------------------------


def evaluate_folders(
    pairs: pa.Table,
    *,
    taxonomy: AnyTaxonomy,
    label_encoding: str | None,
    evaluation: Evaluation,
    **work: Unpack[Work],
) -> Commit:
    """Commit `counts` and `scores.json`: the record of `_record` with `taxonomy`, `label_encoding`, `labels`, `frames`.

    `pairs`: absolute places of predictions (train ids; 255 counts as wrong) and labels, by the columns prediction_uri
    and label_uri. `label_encoding` None: colours where the files hold them, the `ids` of the class list, else what the
    names and the ids of all labels say together (`data/encodings.py`).
    Up to `max_bad_fraction` of them may have a damaged file; these are not scored, and `quarantined` of scores.json.
    Raises UserError: sizes that differ, files that are no labels, unknown ids, labels that may mean several things.
    """
    classes = load_taxonomy(taxonomy)
    asked, why = label_encoding, "as asked"
    if asked is None and are_in_colors(pairs[frame.LABEL_URI].to_pylist()):
        asked, why = COLORS, BY_COLOURS
    encodings = [asked] if asked else classes.tried
    for encoding in encodings:
        classes.need(encoding)
    threads = 1 if work["compute"].actors else len(os.sched_getaffinity(0))
    arguments = {"classes": classes, "encodings": encodings, "evaluation": evaluation, "threads": threads}
    arguments["skips_bad"] = work.get("max_bad_fraction", 1.0) > 0
    shards = map_shards(pairs, PairCounter, arguments, title="evaluate", **work)
    bad, num_pairs = shards.table("quarantine"), pairs.num_rows
    finish = partial(
        shards.attempt.finish, rows_in=num_pairs, rows_out=num_pairs - bad.num_rows, quarantined=bad.num_rows,
        max_bad_fraction=shards.max_bad_fraction, num_shards=len(shards.records),
    )  # fmt: skip
    if bad.num_rows > shards.max_bad_fraction * num_pairs or bad.num_rows == num_pairs:
        finish(max_bad_fraction=min(shards.max_bad_fraction, 1 - 1 / num_pairs))  # refuses
    if bad.num_rows:
        shown = first_of(bad[frame.DETAIL].to_pylist())
        work["progress"].say(f"warning: {bad.num_rows} of {num_pairs} frames are bad and not scored: {shown}")
    counted = shards.table("counts")
    check_palettes("the predictions", label_files(shards.table("predictions")), classes)
    of_files = counted.filter(pc.equal(counted[frame.LABEL_ENCODING], encodings[0]))
    files = label_files(of_files)
    reading = _reading(files, classes, asked, why)
    for sentence in reading.sentences():
        work["progress"].say(sentence)
    wanted = set(zip(of_files[frame.LABEL_URI].to_pylist(), reading.encodings, strict=True))
    places = zip(counted[frame.LABEL_URI].to_pylist(), counted[frame.LABEL_ENCODING].to_pylist(), strict=True)
    counted = counted.filter([place in wanted for place in places])
    found = _record(counted, "the folders", classes, evaluation)
    found |= {"taxonomy": classes.name, "label_encoding": reading.encoding, "labels": reading.facts()}
    found |= {"quarantined": bad.num_rows}
    matrix = np.array(found["confusion"])
    other = _other_meaning(matrix, reading, classes)
    if other is not None and label_encoding is None:
        raise other
    lies = _lies_otherwise(counted)  # which mixes up classes, too
    if warning := other.what if other is not None else lies or _mix_up(matrix, classes):
        work["progress"].say(f"warning: {warning}")
        found["warning"] = warning
    (shards.attempt.folder / "scores.json").write_json(found)
    return finish(outputs=["scores.json"])


def _reading(files: Sequence[LabelFile], classes: Taxonomy, asked: str | None, why: str) -> Reading:
    """What the labels mean: as asked, else by a class list that says it of all ids, where names do not, or by both."""
    ids = {i for file in files for i in file.pixels}
    known = classes.of_colors(ids) if asked == COLORS else classes
    is_named = any(named_encoding(file.uri) in classes.encodings for file in files)
    if asked is None and not is_named and classes.usual(IDS) == IDS and classes.knows(ids, IDS):
        asked, why = IDS, BY_LIST
    return read_as("the labels", files, known, asked=asked, why=why)


@dataclass
class PairCounter:
    """Reads predictions and labels, checks both, counts: one row a frame and encoding that knows all of its ids."""

    classes: Taxonomy
    encodings: list[str]
    evaluation: Evaluation
    threads: int
    skips_bad: bool  # else a damaged file is an error like any other

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        with ThreadPoolExecutor(self.threads, thread_name_prefix="nightseg-read") as pool:
            of_pairs = list(prefetch(pool, self._counted, rows.to_pylist(), ahead=2 * self.threads))
        if problems := [of_pair for of_pair in of_pairs if isinstance(of_pair, UserError)]:
            raise together(problems)
        sound = [of_pair for of_pair in of_pairs if isinstance(of_pair, tuple)]
        columns = [*LABEL_FILES_SCHEMA, *(pa.field(name, kind) for name, kind in COUNTS.items())]
        columns.append(pa.field(AGREEING, pa.list_(pa.int64())))
        return {
            "counts": pa.Table.from_pylist([row for found, _ in sound for row in found], pa.schema(columns)),
            "predictions": pa.Table.from_pylist([one for _, one in sound if one is not None], LABEL_FILES_SCHEMA),
            "quarantine": frame.quarantine_table(of_pair for of_pair in of_pairs if isinstance(of_pair, dict)),
        }

    def _counted(
        self, pair: Mapping[str, str]
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None] | dict[str, Any] | UserError:
        """What is wrong is told for a shard at once: all of it for some frames, and not after the last of a million.

        Of a damaged file that may be left out the row of the quarantine table.
        """
        try:
            return self._count(pair)
        except UserError as error:
            if not self.skips_bad or not isinstance(error.__cause__, BadFrame):
                return error
            row = {frame.FRAME_ID: pair[PREDICTION_URI], frame.URI: pair[frame.LABEL_URI]}
            return frame.quarantined(row, error.__cause__) | {frame.DETAIL: error.what}

    def _count(self, pair: Mapping[str, str]) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """The rows, and what the prediction's file says of its ids if it has a palette."""
        prediction_uri, label_uri = pair[PREDICTION_URI], pair[frame.LABEL_URI]
        label, prediction = _read(label_uri, COLORS in self.encodings), _read(prediction_uri)
        prediction_HW = prediction.ids.astype(np.uint8, copy=False)
        if label.ids.shape != prediction_HW.shape:
            raise UserError(
                f"{prediction_uri}: it is {_by(prediction_HW)}, its label {label_uri} is {_by(label.ids)} pixels "
                "(width x height), and predictions are compared at the label's own size",
                cure="scale them back (nearest neighbour), or predict from images of that size: `nightseg predict` "
                "writes masks as large as its images",
            )
        try:
            check_orientation(label, prediction_HW.shape, prediction.orientation, "prediction")
        except BadFrame as fault:
            raise UserError(f"{label_uri}: {fault.detail}", cure="write both upright, without EXIF") from fault
        unknown = [value for value in np.unique(prediction_HW) if self.classes.num_classes <= value != IGNORE]
        if unknown:
            raise UserError(
                f"{prediction_uri}: it holds {', '.join(map(str, unknown[:5]))}, which are no train ids of "
                f"{self.classes.name} (0 to {self.classes.num_classes - 1}, or 255){self._known(prediction_HW)}",
                cure="predictions must be train ids, not colours",
            )
        facts = facts_of(label_uri, label)
        found: list[dict[str, Any]] = []
        for encoding in self.encodings:
            row = facts | {frame.LABEL_ENCODING: encoding}
            if self.classes.knows(facts["ids"], encoding):
                label_HW = self.classes.to_train_ids(label.ids, encoding)
                row |= _counts(label_HW, prediction_HW, self.classes, self.evaluation)
                row[AGREEING] = _agreeing(label_HW, prediction_HW)
            found.append(row)
        if not any(CONFUSION in row for row in found):  # now, and not after the last of a million
            classes = self.classes.of_colors([]) if COLORS in self.encodings else self.classes
            files = label_files(pa.Table.from_pylist([facts], LABEL_FILES_SCHEMA))
            raise unknown_ids("the labels", files, classes, self.encodings)
        return found, None if prediction.palette is None else facts_of(prediction_uri, prediction)

    def _known(self, prediction_HW: Labels) -> str:
        """Which encodings have what is no train id."""
        ids = set(np.unique(prediction_HW).tolist())
        knowing = [name for name, known in self.classes.encodings.items() if name != TRAIN_IDS and ids <= known.keys()]
        return f"; all of its ids are in {' and '.join(knowing)}" if knowing else ""


def _other_meaning(matrix: npt.NDArray[np.int64], reading: Reading, classes: Taxonomy) -> UserError | None:
    """Labels whose ids begin with 1, predictions of another encoding, as far as both agree then: at half of the pixels
    that could, twice as often as they do now, in three classes. A model that has collapsed has one class."""
    counts = matrix[:, : classes.num_classes]
    right, best = np.trace(counts), matrix.argmax(axis=1)
    present = matrix.sum(axis=1) > 0

    def agreeing(class_of: npt.NDArray[np.int64]) -> float:
        """Share of the pixels that agree if predictions p are class_of[p]; 0 if that is no better explanation."""
        predicted = np.flatnonzero(class_of < classes.num_classes)
        meant = class_of[predicted]
        hits, possible = counts[meant, predicted].sum(), matrix[np.unique(meant)].sum()
        rows = np.unique(meant[(best[meant] == predicted) & present[meant] & (meant != predicted)])
        return hits / possible if len(rows) >= 3 and 2 * hits >= possible > 0 and hits > 2 * right else 0.0

    ids = np.arange(classes.num_classes)
    what = f"read as {reading.encoding}, they agree with the predictions at {right / matrix.sum():.0%} of the pixels"
    if share := agreeing(ids + 1):
        lowest = matrix[0, classes.num_classes :].sum()
        if 2 * lowest > matrix[0].sum():
            return _not_train_ids(f"they agree with the labels at {share:.0%} of the pixels if they are one too low")
        if FROM_ONE in classes.encodings:
            return UnclearLabels(
                f"the labels: {what}, but at {share:.0%} if their id k + 1 is class k",
                [FROM_ONE, *dict.fromkeys(reading.encodings)],
                "" if present[0] else "if the predictions are one too low, mend these",
            )
    for name, known in classes.encodings.items():
        if name != TRAIN_IDS and (share := agreeing(np.array([known.get(int(i), IGNORE) for i in ids]))):
            return _not_train_ids(f"they agree with the labels at {share:.0%} of the pixels if they are {name}")
    return None


def _not_train_ids(what: str) -> UserError:
    return UserError(
        f"the predictions: {what}, and hardly as train ids",
        cure="write train ids: 0 is the first class, 255 no class; or, to have them scored as they are, say what the "
        "ids of the labels mean",
    )


def _mix_up(matrix: npt.NDArray[np.int64], classes: Taxonomy) -> str:
    """What to say if classes change places: most of one is predicted as another, whose pixels mostly are that one's.

    That is so for three of them, or for some that are each other's: ids in another order, two exchanged.
    """
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    best = {row: int(shares[row].argmax()) for row in np.flatnonzero(matrix.any(axis=1)).tolist()}
    moved = {row: to for row, to in best.items() if to != row and shares[row, to] > 0.5}
    moved = {row: to for row, to in moved.items() if shares[:, to].argmax() == row}
    if len(moved) < 3 and not (moved and set(moved) == set(moved.values())):
        return ""
    names = [*classes.classes, "no class"]
    shown = ", ".join(f"{names[row]} is predicted as {names[to]}" for row, to in moved.items())
    return (
        f"{len(moved)} classes of the labels are others in the predictions ({shown}): the ids of one of the two do not "
        "mean what they were taken for"
    )


def _agreeing(label_HW: Labels, prediction_HW: Labels) -> list[int]:
    """The column AGREEING, behind it the number of labelled pixels in the sample. Ways that change the size have 0."""
    step = max(1, min(label_HW.shape) // 64)
    label, prediction = label_HW[::step, ::step], prediction_HW[::step, ::step]
    lies = [prediction, prediction[:, ::-1], prediction[::-1], prediction[::-1, ::-1]]
    lies += [prediction.T, prediction.T[::-1], prediction.T[:, ::-1]]
    is_labelled = label != IGNORE
    agree = [int(np.count_nonzero((one == label) & is_labelled)) if one.shape == label.shape else 0 for one in lies]
    return [*agree, int(np.count_nonzero(is_labelled))]


def _lies_otherwise(counted: pa.Table) -> str:
    """What to say if labels lie another way than predictions: no model is right more often upside down."""
    as_is, *turned, sample = np.sum(counted[AGREEING].to_pylist(), axis=0)
    best = max(turned)
    if 2 * best < sample or best - as_is < _MOST_BETTER * sample:
        return ""
    way = _WAYS[turned.index(best)]
    return (
        f"the predictions agree with the labels at {as_is / sample:.0%} of the pixels, but at {best / sample:.0%} if "
        f"they are {way}: one of the two does not lie like the images"
    )


def _read(uri: str, colors: bool = False) -> StoredLabel:
    try:
        return decode_stored_label(read_bytes(Location.of(uri), missing="label_missing"), colors=colors)
    except BadFrame as fault:
        cure = "write it again, or allow a share of bad frames by max_bad_fraction"
        if fault.reason in ("wrong_mode", "not_an_image"):
            cure = f"give a folder of PNG files of one byte a pixel, or say that the encoding of the labels is {COLORS}"
        raise UserError(f"{uri}: {fault}", cure=cure) from fault


def _by(array: Ids) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"


# -- counts and scores -----------------------------------------------------------------------------------------------


def _counts(label_HW: Labels, prediction_HW: Labels, classes: Taxonomy, evaluation: Evaluation) -> dict[str, list[int]]:
    """The columns of one frame, from train ids."""
    facts = {CONFUSION: confusion_matrix(label_HW, prediction_HW, classes.num_classes).reshape(-1).tolist()}
    if evaluation.boundary is not None:
        bands = boundary_counts(label_HW, prediction_HW, classes.num_classes, evaluation.boundary)
        facts[BOUNDARY] = bands.reshape(-1).tolist()
    return facts


def _record(counted: pa.Table, name: str, classes: Taxonomy, evaluation: Evaluation) -> dict[str, Any]:
    """Scores of at least one frame as JSON: fractions, null for a class without IoU, and the counts they come from."""
    rows: Iterable[list[int]] = counted[CONFUSION].to_pylist()
    matrix = add_up((np.reshape(row, (classes.num_classes, -1)) for row in rows), classes.num_classes)
    if not matrix.any():
        raise UserError(
            f"evaluate {name}: none of the {counted.num_rows} labels has a pixel with a class, only ignored ones",
            cure="check the encoding of the labels",
        )
    found = scores(matrix, evaluation.absent_class)
    record: dict[str, Any] = {
        "pa": found.pa,
        "ca": found.ca,
        "miou": found.miou,
        "fwiou": found.fwiou,
        "iou": _by_class(found.iou, classes),
        "confusion": matrix.tolist(),
        "absent_class": evaluation.absent_class,
        "frames": counted.num_rows,
    }
    if evaluation.boundary is not None:
        bands = np.sum([np.reshape(row, (-1, 3)) for row in counted[BOUNDARY].to_pylist()], axis=0)
        contours = boundary_scores(bands, evaluation.absent_class)
        record["boundary"] = {
            "distance": evaluation.boundary,
            "miou": None if math.isnan(contours.miou) else contours.miou,
            "iou": _by_class(contours.iou, classes),
            "counts": bands.tolist(),
        }
    return record


def _by_class(values: tuple[float, ...], classes: Taxonomy) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in zip(classes.classes, values, strict=True)}
