"""How sure a model is on frames without labels, and how consistent: scores that need no label to compare models by.

A model that is right tends to say the same of a frame, of its mirror image and of the frame made brighter. So does one
that has collapsed: hence the diversity beside it. How well each score ranks the models of a run is in its results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Unpack

import numpy as np
import pyarrow as pa

from nightseg.cluster.map import Work, map_shards
from nightseg.data import table as frame
from nightseg.metrics.confusion import confusion_matrix, scores
from nightseg.segmenter.predict import RowSegmenter
from nightseg.segmenter.settings import Inference
from nightseg.storage import Commit, Location, UserError

VERSION = 1

BRIGHTER: Final = 0.6  # the exponent that values in [0, 1] are raised to
MEAN_CONFIDENCE = "mean_confidence"
COUNTS = "counts"  # pixels of each class, K values
MIRRORED = "mirrored"  # pixels by class in the frame and in its mirror image, K x K values, row by row
BRIGHTENED = "brightened"  # the same of the brighter frame


def consistency(
    frames: pa.Table, model: Commit, *, name: str, count: int, inference: Inference, **work: Unpack[Work]
) -> Commit:
    """Commit `views` (a row a frame), `quarantine` and `scores.json`: of at most `count` frames, evenly over the table,

    `confidence`: mean probability of the predicted class; `mirrored`, `brightened`: mean IoU between the predictions
    for the frames and for their mirror images, or for the frames with values ^ BRIGHTER; `diversity`: entropy of the
    shares of the predicted classes, over that of even shares. All are fractions. Raises UserError: no frame, more bad
    frames than `max_bad_fraction`.
    """
    if frames.num_rows == 0:
        raise UserError(f"consistency of {name}: the dataset holds no frame", cure="another dataset in `consistency`")
    places = np.unique(np.linspace(0, frames.num_rows - 1, min(count, frames.num_rows)).round().astype(int))
    by = RowSegmenter(model.folder / "model", work["compute"], inference)
    shards = map_shards(frames.take(places), Views, {"by": by}, title=f"consistency {name}", **work)
    rows = shards.table("views")
    (shards.attempt.folder / "scores.json").write_json(_scores(rows) if rows.num_rows else {})
    return shards.finish("views", outputs=["scores.json"], is_whole=rows.num_rows > 0)


def _scores(rows: pa.Table) -> dict[str, float]:
    counts_NK = np.array(rows[COUNTS].to_pylist())
    shares_K = counts_NK.sum(axis=0) / counts_NK.sum()
    seen_K = shares_K[shares_K > 0]
    size = len(shares_K)

    def agreement(column: str) -> float:
        return scores(np.array(rows[column].to_pylist()).sum(axis=0).reshape(size, size)).miou

    return {
        "confidence": float(np.mean(rows[MEAN_CONFIDENCE].to_pylist())),
        "mirrored": agreement(MIRRORED),
        "brightened": agreement(BRIGHTENED),
        "diversity": float(-(seen_K * np.log(seen_K)).sum()) / math.log(size) if size > 1 else 0.0,
    }


@dataclass
class Views:
    """Segments the frames of a shard in three views, and counts where they agree."""

    by: RowSegmenter
    advance: Callable[[int], None] = lambda count: None

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        made: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        num_classes = self.by.segmenter.taxonomy.num_classes
        brighter = np.rint(255 * (np.arange(256) / 255) ** BRIGHTER).astype(np.uint8)
        for result in self.by.segment(rows, bad):
            labels = result.segmented.labels
            views = [np.ascontiguousarray(result.image[:, ::-1]), brighter[result.image]]
            mirrored, brightened = (view.labels for view in self.by.segmenter.batch(views))
            pairs = {MIRRORED: mirrored[:, ::-1], BRIGHTENED: brightened}
            made.append(
                {
                    frame.FRAME_ID: result.row[frame.FRAME_ID],
                    MEAN_CONFIDENCE: float(result.segmented.confidence.mean(dtype=np.float64)),
                    COUNTS: np.bincount(labels.ravel(), minlength=num_classes).tolist(),
                    **{
                        key: confusion_matrix(labels, seen, num_classes).ravel().tolist() for key, seen in pairs.items()
                    },
                }
            )
            self.advance(1)
        lists = {name: pa.list_(pa.int64()) for name in (COUNTS, MIRRORED, BRIGHTENED)}
        schema = pa.schema({frame.FRAME_ID: pa.string(), MEAN_CONFIDENCE: pa.float64(), **lists})
        return {"views": pa.Table.from_pylist(made, schema=schema), "quarantine": frame.quarantine_table(bad)}
