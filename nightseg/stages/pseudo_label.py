"""Label unlabelled frames with a teacher: its argmax where it is confident enough, 255 (ignored) elsewhere.

`none` and `fixed` thresholds are known beforehand: one pass writes the labels. `class_balanced` thresholds follow from
the confidence of all frames, so a first pass leaves drafts (labels and confidence bins, which cost no second run of
the network) and a histogram a shard, and a second one applies the thresholds. Both passes are made of shards, so a
crash at any time loses only the open ones; the drafts go when the labels are committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nightseg.cluster.map import Work, map_shards
from nightseg.data import table as frame
from nightseg.data.class_list import taxonomy as load_taxonomy
from nightseg.data.images import encode_png
from nightseg.data.settings import AnyTaxonomy
from nightseg.data.taxonomy import TRAIN_IDS, Taxonomy
from nightseg.segmenter import self_training
from nightseg.segmenter.predict import WHOLE_FRAME, RowSegmenter, check_classes
from nightseg.segmenter.self_training import NUM_BINS, KeptPixels, Rules
from nightseg.segmenter.settings import Guard, Inference, Threshold
from nightseg.storage import Attempt, Commit, Location, Shards, UserError, sha256_of

VERSION = 3

CONFIDENCE_URI = "confidence_uri"  # grey PNG at a quarter of the frame's size, 255 = certain
CONFIDENCE_SHA256 = "confidence_sha256"
KEPT = "kept"  # share of the frame's pixels that keep a label, a fraction
COUNTS = "counts"  # pixels the teacher gives to each class, K values
KEPT_COUNTS = "kept_counts"  # those of them that keep their label, K values
HISTOGRAM = "histogram"  # pixels by class and confidence bin, K x 256 values, row by row
LABELS_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in (frame.FRAME_ID, CONFIDENCE_URI, CONFIDENCE_SHA256)),
        (KEPT, pa.float64()),
        *((name, pa.list_(pa.int64())) for name in (COUNTS, KEPT_COUNTS, HISTOGRAM)),
    ]
)
_DRAFT_SCHEMA = pa.schema([(frame.FRAME_ID, pa.string()), (frame.HEIGHT, pa.int32()), (frame.WIDTH, pa.int32())])
Counts = npt.NDArray[np.int64]
Thresholds = npt.NDArray[np.float64]


class _Labelled(NamedTuple):
    """What the passes leave: thresholds, shards that hold `frames` and `labels`, and the frames that were bad."""

    thresholds: Thresholds
    shards: Shards
    quarantine: pa.Table
    outputs: list[str]
    warnings: Sequence[str] = ()


class _Asked(NamedTuple):
    """What the passes are told."""

    name: str
    by: RowSegmenter
    threshold: Threshold
    rules: Rules
    classes: Taxonomy
    watch: _Watch | None


class _Watch(NamedTuple):
    """What the teacher of the first round saw on the pool, and what is done where this one sees something else."""

    guard: Guard
    first_K: Thresholds  # shares of the pixels
    classes: Sequence[str]
    name: str

    @classmethod
    def of(cls, guard: Guard, first_round: Commit, classes: Taxonomy, name: str) -> _Watch:
        counts_K = np.array([sum(counts) for counts in first_round.table("histograms")[HISTOGRAM].to_pylist()])
        return cls(guard, counts_K / max(counts_K.sum(), 1), classes.classes, name)

    def look(self, histograms_KB: Counts, thresholds_K: Thresholds) -> list[str]:
        """What is told of classes out of range; with `ignore` their thresholds are raised, with `stop` it is an
        error."""
        shares_K = histograms_KB.sum(axis=1) / max(histograms_KB.sum(), 1)
        outside_K = self_training.out_of_range(shares_K, self.first_K, self.guard.range)
        found = [
            f"the teacher sees {name} on {share:.2%} of the pool, that of the first round on {first:.2%}"
            for name, share, first, is_outside in zip(self.classes, shares_K, self.first_K, outside_K, strict=True)
            if is_outside
        ]
        if found and self.guard.act == "stop":
            raise UserError(
                f"pseudo-labels for {self.name}: {'; '.join(found)}",
                cure="end with the round before, give the teacher more labelled frames under night light, or set "
                "self_training.guard.act: ignore, which does not learn these classes",
            )
        if self.guard.act == "ignore":
            thresholds_K[outside_K] = self_training.NOTHING_KEPT
        done = "its pixels are not learned" if self.guard.act == "ignore" else "it is learned all the same"
        return [f"{text}; {done} (guard.act)" for text in found]


def pseudo_label(
    frames: pa.Table,
    teacher: Commit,
    *,
    name: str,
    threshold: Threshold,
    taxonomy: AnyTaxonomy,
    inference: Inference = WHOLE_FRAME,
    never_below: Mapping[str, Sequence[str]] | None = None,
    labelled: pa.Table | None = None,
    guard: Guard | None = None,
    first_round: Commit | None = None,
    known_warnings: Sequence[str] = (),
    **work: Unpack[Work],
) -> Commit:
    """Commit `frames` (label_uri: palette PNG of train ids and 255), `labels` (LABELS_SCHEMA), `quarantine`,
    `histograms` (one row a class: pixels by confidence bin over all frames) and `evidence.json` (`_evidence`).

    `frames` has absolute uris. `never_below`: pixels of a class below others are not kept; `labelled` are the frames
    whose labels this is checked on. `guard` compares what the teacher sees with what that of `first_round`, whose pool
    was the same, saw. `known_warnings` join those that the labels give.
    Raises UserError: no frame, a teacher with other classes, no pixel kept, more bad frames than `max_bad_fraction`,
    labels that break `never_below`, a class out of the guard's range where it says `stop`.
    """
    classes = load_taxonomy(taxonomy)
    rules = self_training.rules_of(never_below or {}, classes)
    if labelled is not None:
        self_training.check_never_below(never_below or {}, labelled, classes, f"pseudo-labels for {name}")
    check_classes(teacher.folder / "model", classes)
    rows = _to_label(frames, name)
    by = RowSegmenter(teacher.folder / "model", work["compute"], inference)
    attempt = work["attempt"]
    drafts = replace(attempt, folder=attempt.folder / "drafts")
    watch = None if guard is None or first_round is None else _Watch.of(guard, first_round, classes, name)
    asked = _Asked(name, by, threshold, rules, classes, watch)
    if threshold.kind == "class_balanced" or (watch is not None and watch.guard.act != "warn"):
        done = _label_drafts(rows, asked, drafts, work)
    else:
        done = _label_directly(rows, asked, work)
    histograms_KB, pixels = _totals(done.shards, classes.num_classes)
    bins_by_class = pa.table({"class": list(classes.classes), HISTOGRAM: histograms_KB.tolist()})
    warnings = [*known_warnings, *done.warnings, *self_training.guard(pixels, classes.classes)]
    for warning in warnings:
        work["progress"].say(f"pseudo-labels for {name}: {warning}")
    num_frames = rows.num_rows - done.quarantine.num_rows
    evidence = _evidence(teacher, threshold, classes, num_frames, done.thresholds, pixels, warnings)
    (attempt.folder / "evidence.json").write_json(evidence)
    (attempt.folder / "histograms.parquet").write_table(bins_by_class)
    return attempt.finish(
        rows_in=rows.num_rows,
        rows_out=num_frames,
        quarantined=done.quarantine.num_rows,
        max_bad_fraction=done.shards.max_bad_fraction,
        outputs=["evidence.json", "histograms.parquet", *done.outputs],
        num_shards=len(done.shards.records),
        scratch=["drafts"],
        summary={"kept_share": pixels.share, "warnings": len(warnings), "threshold": threshold.kind},
    )


def _to_label(frames: pa.Table, name: str) -> pa.Table:
    """The frames without the columns of the selection that chose them."""
    if frames.num_rows == 0:
        raise UserError(
            f"pseudo-labels for {name}: there is no frame to label", cure="look at the pool and at its selection"
        )
    columns = [column for column in frames.column_names if column in frame.FRAME_SCHEMA.names]
    return frame.frame_table(frames.select(columns).to_pylist())


def _label_directly(rows: pa.Table, asked: _Asked, work: Work) -> _Labelled:
    """One pass, for thresholds that do not depend on the frames."""
    classes, watch = asked.classes, asked.watch
    nothing_yet = np.zeros((classes.num_classes, NUM_BINS), dtype=np.int64)
    thresholds_K = self_training.class_thresholds(asked.threshold, nothing_yet)
    arguments = {"by": asked.by, "thresholds_K": thresholds_K, "rules": asked.rules, "classes": classes}
    shards = map_shards(rows, DirectLabeller, arguments, title=f"pseudo-labels of {asked.name}", **work)
    warnings = [] if watch is None else watch.look(_totals(shards, classes.num_classes)[0], thresholds_K)
    return _Labelled(thresholds_K, shards, shards.table("quarantine"), [], warnings)


def _label_drafts(rows: pa.Table, asked: _Asked, drafts: Attempt, work: Work) -> _Labelled:
    """Two passes, for thresholds that follow from what the teacher says of all frames."""
    of_drafts: Work = {**work, "attempt": drafts}
    shards = map_shards(rows, Drafter, {"by": asked.by}, title=f"teacher of {asked.name}", **of_drafts)
    quarantine, drafted = shards.table("quarantine"), shards.table("drafts")
    limit = shards.max_bad_fraction if drafted.num_rows else 0.0
    if quarantine.num_rows > limit * rows.num_rows:
        # Refused now, with the first pass's shards: labels made with thresholds of too few frames must not exist.
        shards.finish("drafts", is_whole=drafted.num_rows > 0)
    (work["attempt"].folder / "quarantine.parquet").write_table(quarantine)
    num_classes, watch = asked.classes.num_classes, asked.watch
    histograms = sum(_arrays(shards, "histograms", HISTOGRAM), start=np.zeros(num_classes * NUM_BINS, dtype=np.int64))
    histograms_KB = histograms.reshape(num_classes, NUM_BINS)
    thresholds_K = self_training.class_thresholds(asked.threshold, histograms_KB)
    warnings = [] if watch is None else watch.look(histograms_KB, thresholds_K)
    readable = rows.filter(pc.is_in(rows[frame.FRAME_ID], value_set=drafted[frame.FRAME_ID].combine_chunks()))
    for column in (frame.HEIGHT, frame.WIDTH):
        readable = readable.set_column(readable.schema.get_field_index(column), column, drafted[column])
    arguments = {
        "drafts": drafts.folder, "thresholds_K": thresholds_K, "rules": asked.rules, "classes": asked.classes
    }  # fmt: skip
    labelled = map_shards(readable, DraftLabeller, arguments, title=f"pseudo-labels of {asked.name}", **work)
    return _Labelled(thresholds_K, labelled, quarantine, ["quarantine.parquet"], warnings)


# -- workers ---------------------------------------------------------------------------------------------------------


@dataclass
class Drafter:
    """Runs the teacher and leaves labels and confidence bins as they are, below `folder`."""

    by: RowSegmenter

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        num_classes = self.by.segmenter.taxonomy.num_classes
        histogram_KB = np.zeros((num_classes, NUM_BINS), dtype=np.int64)
        drafts: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for result in self.by.segment(rows, bad):
            labels_HW, confidence_HW = result.segmented
            histogram_KB += self_training.confidence_histogram(labels_HW, confidence_HW, num_classes)
            frame_id = result.row[frame.FRAME_ID]
            draft_2HW = np.stack([labels_HW, self_training.confidence_bins(confidence_HW)])
            _draft(folder, frame_id).write_bytes(pa.compress(draft_2HW.tobytes(), codec="zstd", asbytes=True))
            height, width = labels_HW.shape
            drafts.append({frame.FRAME_ID: frame_id, frame.HEIGHT: height, frame.WIDTH: width})
        return {
            "drafts": pa.Table.from_pylist(drafts, _DRAFT_SCHEMA),
            "histograms": pa.table({HISTOGRAM: [histogram_KB.reshape(-1).tolist()]}),
            "quarantine": frame.quarantine_table(bad),
        }


@dataclass
class DraftLabeller:
    """Applies thresholds to drafts; needs no network."""

    drafts: Location
    thresholds_K: Thresholds
    classes: Taxonomy
    rules: Rules = field(default_factory=dict)

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        made = []
        for row in rows.to_pylist():
            size = (2, row[frame.HEIGHT], row[frame.WIDTH])
            data = _draft(self.drafts, row[frame.FRAME_ID]).read_bytes()
            raw = pa.decompress(data, decompressed_size=int(np.prod(size)), codec="zstd", asbytes=True)
            labels_HW, bins_HW = np.frombuffer(raw, dtype=np.uint8).reshape(size)
            confidence_HW = self_training.bins_to_confidence(bins_HW)
            made.append(_write(row, labels_HW, confidence_HW, self.thresholds_K, self.rules, self.classes, folder))
        return _tables(made)


@dataclass
class DirectLabeller:
    """Runs the teacher and applies known thresholds."""

    by: RowSegmenter
    thresholds_K: Thresholds
    classes: Taxonomy
    rules: Rules = field(default_factory=dict)

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        bad: list[dict[str, Any]] = []
        segmented = self.by.segment(rows, bad)
        made = [
            _write(
                one.row,
                one.segmented.labels,
                one.segmented.confidence,
                self.thresholds_K,
                self.rules,
                self.classes,
                folder,
            )
            for one in segmented
        ]
        return {**_tables(made), "quarantine": frame.quarantine_table(bad)}


def _draft(folder: Location, frame_id: str) -> Location:
    return folder / f"raw/{frame.file_name(frame_id, '.zst')}"


def _write(
    row: Mapping[str, Any],
    labels_HW: npt.NDArray[np.uint8],
    confidence_HW: npt.NDArray[np.float32],
    thresholds_K: Thresholds,
    rules: Rules,
    classes: Taxonomy,
    folder: Location,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the label and the confidence of one frame; its rows of `frames` and `labels`."""
    sure_HW = self_training.apply_thresholds(labels_HW, confidence_HW, thresholds_K)
    kept_HW = self_training.drop_impossible(sure_HW, rules)
    histogram_KB = self_training.confidence_histogram(labels_HW, confidence_HW, classes.num_classes)
    kept_K = np.bincount(kept_HW.reshape(-1), minlength=256)[: classes.num_classes]
    name = frame.file_name(row[frame.FRAME_ID], ".png")
    label = encode_png(kept_HW, classes.palette)
    confidence = encode_png(self_training.confidence_preview(confidence_HW))
    (folder / f"masks/{name}").write_bytes(label)
    (folder / f"confidence/{name}").write_bytes(confidence)
    labelled = {
        **row,
        frame.LABEL_URI: f"masks/{name}",
        frame.LABEL_SHA256: sha256_of(label),
        frame.LABEL_ENCODING: TRAIN_IDS,
        frame.LABEL_PIXELS: kept_K.tolist(),
    }
    facts = {
        frame.FRAME_ID: row[frame.FRAME_ID],
        CONFIDENCE_URI: f"confidence/{name}",
        CONFIDENCE_SHA256: sha256_of(confidence),
        KEPT: int(kept_K.sum()) / labels_HW.size,
        COUNTS: histogram_KB.sum(axis=1).tolist(),
        KEPT_COUNTS: kept_K.tolist(),
        HISTOGRAM: histogram_KB.reshape(-1).tolist(),
    }
    return labelled, facts


def _tables(made: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, pa.Table]:
    return {
        "frames": frame.frame_table(labelled for labelled, _ in made),
        "labels": pa.Table.from_pylist([facts for _, facts in made], LABELS_SCHEMA),
    }


# -- evidence --------------------------------------------------------------------------------------------------------


def _evidence(
    teacher: Commit,
    threshold: Threshold,
    classes: Taxonomy,
    num_frames: int,
    thresholds_K: Thresholds,
    pixels: KeptPixels,
    warnings: list[str],
) -> dict[str, Any]:
    """Shares are fractions; `kept_share` of a class is null where the teacher never predicts it, `threshold` where the
    guard lets nothing of it be learned."""
    facts = zip(classes.classes, pixels.predicted, pixels.kept, pixels.share_by_class, thresholds_K, strict=True)
    return {
        "teacher": {"name": teacher.name, "key": teacher.key},
        "threshold": threshold.model_dump(mode="json"),
        "frames": num_frames,
        "pixels": int(pixels.predicted.sum()),
        "kept_share": pixels.share,
        "by_class": {
            name: {
                "predicted": int(predicted),
                "kept": int(kept),
                "kept_share": share,
                "threshold": float(limit) if limit <= 1 else None,
            }
            for name, predicted, kept, share, limit in facts
        },
        "warnings": warnings,
    }


def _totals(shards: Shards, num_classes: int) -> tuple[Counts, KeptPixels]:
    """Histograms (K, B) and pixel counts over all frames, shard by shard."""
    histogram_KB = np.zeros((num_classes, NUM_BINS), dtype=np.int64)
    kept_K = np.zeros(num_classes, dtype=np.int64)
    for values in _arrays(shards, "labels", HISTOGRAM):
        histogram_KB += values.reshape(-1, num_classes, NUM_BINS).sum(axis=0)
    for values in _arrays(shards, "labels", KEPT_COUNTS):
        kept_K += values.reshape(-1, num_classes).sum(axis=0)
    return histogram_KB, KeptPixels(histogram_KB.sum(axis=1), kept_K)


def _arrays(shards: Shards, table: str, column: str) -> Iterator[Counts]:
    """The lists of a column laid end to end, one array a shard."""
    for part in shards.parts(table):
        yield part[column].combine_chunks().flatten().to_numpy()
