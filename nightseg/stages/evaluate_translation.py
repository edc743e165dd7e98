"""How good is a translation? Distances to real frames, and how much of the frames and their labels survives.

With x a source frame, y its label, t its translation, b the translation of t back, S the fixed segmenter (it never saw
a translated frame), all over the whole set from summed matrices, fractions in [0, 1]:

    FID, KID        of all t to real frames; the same of all x is the baseline that a translation has to beat
    mIoU source     S(x) against y
    mIoU translated S(t) against y: also pays for what S does not know about the other domain
    mIoU back       S(b) against y: in the source domain again, so what is lost was lost by translating
    survival        mIoU back / mIoU source
    agreement       pixels with S(t) = S(x), and the mIoU of S(t) with S(x) as its label; the same for b
    edges           correlation of local edge strength in x and t (metrics/edges.py), mean over the frames

A cycle can hide what it needs to go back in patterns that no eye sees (arXiv 1712.02950), so survival alone proves
nothing: agreement and edges are about t itself. Mistakes of S that x, t and b share cost nothing in agreement.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.cluster.map import Work, map_shards
from nightseg.data import table as frame
from nightseg.data.class_list import taxonomy as load_taxonomy
from nightseg.data.images import BadFrame, read_image, read_label
from nightseg.data.labels import train_ids_of
from nightseg.data.settings import AnyTaxonomy
from nightseg.data.taxonomy import Taxonomy
from nightseg.metrics.confusion import add_up, confusion_matrix, scores
from nightseg.metrics.edges import edge_agreement
from nightseg.selection.frechet import FrameSet, SetDistance, set_distance
from nightseg.storage import Commit, Location

VERSION = 2

SCORES_NAME: Final = "scores.json"

# Tables and files of the commits that are read here, by the names under which their stages write them.
PREDICTIONS, PREDICTION_URI = "predictions", "prediction_uri"

# Columns that a worker is given: absolute places of what a frame is compared with; null = it was left out somewhere.
SOURCE_URI = "source_uri"
MASK_URIS: Final = {"source": "source_mask_uri", "translated": "translated_mask_uri", "back": "back_mask_uri"}

# Columns of `frame_scores`, one row a frame.
SOURCE_ID, EDGES, AGREEMENT, BACK_AGREEMENT = "source_id", "edges", "agreement", "back_agreement"
# Matrices K x K, row by row: label or S(x) against S(x), S(t) or S(b).
MATRICES: Final = ("label_source", "label_translated", "label_back", "source_translated", "source_back")

SCHEMA: Final = pa.schema(
    [
        *(pa.field(column, pa.string()) for column in (frame.FRAME_ID, SOURCE_ID)),
        *(pa.field(column, pa.float64()) for column in (EDGES, AGREEMENT, BACK_AGREEMENT)),
        *(pa.field(column, pa.list_(pa.int64())) for column in MATRICES),
    ]
)
BACK_SUFFIX: Final = ".back"  # of the dataset of translations that were translated back

Counts = npt.NDArray[np.int64]
Labels = npt.NDArray[np.uint8]


def evaluate_translation(
    translated: pa.Table,
    source: pa.Table,
    *,
    name: str,
    masks: Mapping[str, Commit],
    features: Mapping[str, Commit],
    taxonomy: AnyTaxonomy,
    **work: Unpack[Work],
) -> Commit:
    """Commit the table `frame_scores` (frame_id, source_id, measures of each frame), `quarantine` and scores.json.

    Frame tables have absolute uris. `masks` are commits of `predict` on "source", "translated" and, where there is a
    translation back, "back"; `features` are commits of `score` with one extractor on "translated", "source" and "real".
    Labels are optional. A frame that one of the passes before had to leave out is quarantined here. Raises UserError: a
    set with fewer than two good frames, features that do not compare.
    """
    classes, has_back = load_taxonomy(taxonomy), "back" in masks
    distances = _distances(features)
    rows, arguments = _rows(translated, source, masks), {"classes": classes, "has_back": has_back}
    shards = map_shards(rows, MeasureFrames, arguments, title=f"evaluate {name}", **work)
    found = _summed(shards.parts("frame_scores"), classes, has_back)
    if found["frames"]:
        (shards.attempt.folder / SCORES_NAME).write_json({**distances, **found})
    return shards.finish(
        "frame_scores",
        outputs=[SCORES_NAME] if found["frames"] else [],
        summary={"fid": distances["fid"]["translated"], "agreement": found["agreement"], "edges": found["edges"]},
        is_whole=found["frames"] > 0,  # without a frame there are no scores
    )


# -- distances of the sets --------------------------------------------------------------------------------------------


def _distances(features: Mapping[str, Commit]) -> dict[str, Any]:
    """FID and KID of translated and source frames to real ones, and between what they were measured."""
    sets = {what: FrameSet.of(commit) for what, commit in features.items()}
    real = sets["real"]
    measured = {what: set_distance(sets[what], real, (what, "real")) for what in ("translated", "source")}
    return {
        **{figure: {what: getattr(one, figure) for what, one in measured.items()} for figure in SetDistance._fields},
        "extractor": real.statistics.extractor,
        "resize": real.statistics.resize,
        "compared": {what: commit.rows_out for what, commit in features.items()},
    }


# -- frame by frame ---------------------------------------------------------------------------------------------------


def _rows(translated: pa.Table, source: pa.Table, masks: Mapping[str, Commit]) -> pa.Table:
    """The translated frames with the places of their source and of all masks."""
    sources = dict(zip(source[frame.FRAME_ID].to_pylist(), source[frame.URI].to_pylist(), strict=True))
    seen = {what: _mask_places(commit) for what, commit in masks.items()}
    rows = []
    for row in translated.to_pylist():
        dataset, frame_id = row[frame.DATASET], row[frame.FRAME_ID]
        source_id = frame_id.removeprefix(f"{dataset}/")
        ids = {"source": source_id, "translated": frame_id, "back": f"{dataset}{BACK_SUFFIX}/{frame_id}"}
        places = {column: seen.get(what, {}).get(ids[what]) for what, column in MASK_URIS.items()}
        rows.append(row | places | {SOURCE_ID: source_id, SOURCE_URI: sources.get(source_id)})
    return frame.frame_table(rows, extra=dict.fromkeys((SOURCE_ID, SOURCE_URI, *MASK_URIS.values()), pa.string()))


def _mask_places(commit: Commit) -> dict[str, str]:
    """Frame id -> absolute place of the mask of it."""
    table = commit.table(PREDICTIONS).select([frame.FRAME_ID, PREDICTION_URI]).to_pylist()
    return {row[frame.FRAME_ID]: (commit.folder / row[PREDICTION_URI]).uri for row in table}


@dataclass
class MeasureFrames:
    """Measures of the frames of a shard. A frame of which something is missing goes to the quarantine table."""

    classes: Taxonomy
    has_back: bool

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        good, bad = frame.sort_out(rows, self._measures)
        return {"frame_scores": pa.Table.from_pylist(good, schema=SCHEMA), "quarantine": frame.quarantine_table(bad)}

    def _measures(self, row: Mapping[str, Any]) -> dict[str, Any]:
        source, translated = read_image(_place(row, SOURCE_URI)), read_image(Location.of(row[frame.URI]))
        if source.shape != translated.shape:
            raise BadFrame("label_size", f"the source is {source.shape[:2]}, its translation {translated.shape[:2]}")
        seen = {what: self._mask(row, what, source.shape[:2]) for what in MASK_URIS if what != "back" or self.has_back}
        label = train_ids_of(row, self.classes, source.shape[:2])
        against: dict[str, Labels] = {"source": seen["source"]} | ({"label": label} if label is not None else {})
        matrices = {
            f"{truth}_{what}": confusion_matrix(against[truth], mask, self.classes.num_classes)
            for truth in against
            for what, mask in seen.items()
            if truth != what
        }
        return {
            **{column: row[column] for column in (frame.FRAME_ID, SOURCE_ID)},
            EDGES: edge_agreement(source, translated),
            AGREEMENT: _right(matrices["source_translated"]),
            BACK_AGREEMENT: _right(matrices["source_back"]) if self.has_back else None,
            **{which: matrix.reshape(-1).tolist() for which, matrix in matrices.items()},
        }

    def _mask(self, row: Mapping[str, Any], what: str, size: tuple[int, ...]) -> Labels:
        mask = read_label(_place(row, MASK_URIS[what]))
        if mask.shape != size:
            raise BadFrame("label_size", f"the mask is {mask.shape}, the frame {size} (height, width)")
        return mask


def _place(row: Mapping[str, Any], column: str) -> Location:
    if row[column] is None:
        what = column.removesuffix("_uri").replace("_", " ")
        raise BadFrame("missing", f"there is no {what} of it; see the quarantine table of the pass that left it out")
    return Location.of(row[column])


def _right(matrix: Counts) -> float:
    """Share of the pixels on the diagonal."""
    return float(np.trace(matrix) / matrix.sum())


# -- the whole set ----------------------------------------------------------------------------------------------------


def _summed(parts: Iterable[pa.Table], classes: Taxonomy, has_back: bool) -> dict[str, Any]:
    """Scores over all frames, from their matrices; null where there is no label or no translation back."""
    size = classes.num_classes
    totals: dict[str, list[Counts]] = {which: [] for which in MATRICES}
    frames, labelled, edges = 0, 0, 0.0
    for table in parts:
        frames += table.num_rows
        edges += float(np.sum(table[EDGES].to_numpy()))
        labelled += table.num_rows - table[MATRICES[0]].null_count
        for which in MATRICES:
            matrices = (np.reshape(flat, (size, size)) for flat in table[which].to_pylist() if flat is not None)
            totals[which].append(add_up(matrices, size))
    found = {which: _miou(add_up(some, size)) for which, some in totals.items()}
    miou = {what: found[f"label_{what}"]["miou"] for what in ("source", "translated", "back")}
    source, back = miou["source"], miou["back"]
    return {
        "frames": frames,
        "labelled": labelled,
        "has_back_translation": has_back,
        "miou": miou,
        "survival": back / source if source and back is not None else None,
        "agreement": found["source_translated"],
        "back_agreement": found["source_back"],
        "edges": edges / frames if frames else None,
    }


def _miou(matrix: Counts) -> dict[str, float | None]:
    """Share of right pixels and mIoU; null for a matrix without a pixel."""
    result = scores(matrix)
    return {
        "pixels": None if math.isnan(result.pa) else result.pa,
        "miou": None if math.isnan(result.miou) else result.miou,
    }
