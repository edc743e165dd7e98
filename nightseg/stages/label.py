"""What a teacher says of unlabelled frames: class and confidence at the stride of its logits, and an index of them.

Nothing of it depends on thresholds: those of `pseudo_label` follow from the index, and training applies them when it
reads, so one pass of the teacher serves every choice of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Unpack

import numpy as np
import pyarrow as pa

from nightseg.cluster.map import Work, map_shards
from nightseg.data import table as frame
from nightseg.data.class_list import taxonomy as load_taxonomy
from nightseg.data.settings import AnyTaxonomy
from nightseg.data.stored_labels import (
    COUNTS,
    HISTOGRAM,
    HISTOGRAMS,
    INDEX,
    INDEX_SCHEMA,
    LABEL,
    MEAN_CONFIDENCE,
    MODEL,
    NUM_BINS,
    STORED_SCHEMA,
    StoredLabel,
    histograms_of,
    packed,
    place_of,
)
from nightseg.data.taxonomy import TRAIN_IDS
from nightseg.segmenter.predict import WHOLE_FRAME, RowSegmenter, check_classes
from nightseg.segmenter.self_training import confidence_bins, confidence_histogram
from nightseg.segmenter.settings import Inference
from nightseg.storage import Commit, Location, UserError, sha256_of

VERSION = 1

LABELS: Final = "labels"  # folder of the stored labels


def label(
    frames: pa.Table,
    teacher: Commit,
    *,
    taxonomy: AnyTaxonomy,
    inference: Inference = WHOLE_FRAME,
    **work: Unpack[Work],
) -> Commit:
    """Commit `frames` (label_uri: a place among the stored labels), `index` (INDEX_SCHEMA), `histograms`, `quarantine`.

    `frames` has absolute uris. Counts are of logits, of which one stands for 4 x 4 pixels of the network's input.
    Raises UserError: no frame, a teacher with other classes, more bad frames than `max_bad_fraction`.
    """
    classes, attempt = load_taxonomy(taxonomy), work["attempt"]
    if frames.num_rows == 0:
        raise UserError(
            f"labels of {teacher.name}: there is no frame to label", cure="look at the pool and at its selection"
        )
    check_classes(teacher.folder / "model", classes)
    rows = frames.select([name for name in frames.column_names if name in frame.FRAME_SCHEMA.names])
    by = RowSegmenter(teacher.folder / "model", work["compute"], inference)
    shards = map_shards(rows, Labeller, {"by": by}, title=f"labels of {teacher.name}", **work)
    histograms_KB = np.zeros((classes.num_classes, NUM_BINS), dtype=np.int64)
    for part in shards.parts(INDEX):
        histograms_KB += histograms_of(part, classes.num_classes).sum(axis=0, dtype=np.int64)
    bins_by_class = pa.table({"class": list(classes.classes), HISTOGRAM: histograms_KB.tolist()})
    outputs = [attempt.write_table(HISTOGRAMS, bins_by_class), LABELS]
    summary = {"teacher": teacher.name, "teacher_key": teacher.key}
    return shards.finish(INDEX, outputs=outputs, summary=summary)


@dataclass
class Labeller:
    """Runs the teacher on a shard."""

    by: RowSegmenter

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        bad: list[dict[str, Any]] = []
        stored: list[dict[str, Any]] = []
        frames, index = [], []
        # Named by its rows: an actor that does a shard again writes the same file.
        file = f"{LABELS}/{sha256_of(rows[frame.FRAME_ID][0].as_py().encode())[:16]}.parquet"
        for row, facts, found in self._labelled(rows, bad):
            at = {frame.LABEL_URI: place_of(file, len(stored)), frame.LABEL_SHA256: sha256_of(found[LABEL])}
            frames.append({**row, **at, frame.LABEL_ENCODING: TRAIN_IDS, frame.LABEL_PIXELS: None})
            index.append(facts)
            stored.append(found)
        (folder / file).write_table(pa.Table.from_pylist(stored, STORED_SCHEMA))
        return {
            "frames": frame.frame_table(frames),
            INDEX: pa.Table.from_pylist(index, INDEX_SCHEMA),
            "quarantine": frame.quarantine_table(bad),
        }

    def _labelled(
        self, rows: pa.Table, bad: list[dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
        """Of each good frame its row, its row of the index, and its stored label."""
        segmenter = self.by.segmenter
        for row, (height, width), found in self.by.at_stride(rows, bad):
            histogram_KB = confidence_histogram(found.labels, found.confidence, segmenter.taxonomy.num_classes)
            facts = {
                frame.FRAME_ID: row[frame.FRAME_ID],
                MODEL: segmenter.card.get("weights_sha256"),
                MEAN_CONFIDENCE: float(found.confidence.mean(dtype=np.float64)),
                COUNTS: histogram_KB.sum(axis=1),
                HISTOGRAM: histogram_KB.reshape(-1),
            }
            size = {frame.HEIGHT: height, frame.WIDTH: width}
            kept = StoredLabel(found.labels, confidence_bins(found.confidence), found.covered)
            yield {**row, **size}, facts, packed(kept)
