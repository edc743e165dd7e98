"""Which of a teacher's labels are learned: thresholds from the index of its labels, and what they keep.

No frame is read and no network runs. Only rules of geometry (`never_below`) need the labels themselves, which are read
at the stride of their logits. Training applies the same thresholds and rules when it reads the labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.data import table as frame
from nightseg.data.class_list import taxonomy as load_taxonomy
from nightseg.data.settings import AnyTaxonomy
from nightseg.data.stored_labels import (
    COUNTS,
    HISTOGRAM,
    HISTOGRAMS,
    INDEX,
    KEPT,
    KEPT_COUNTS,
    KEPT_NAME,
    KEPT_SCHEMA,
    MEAN_CONFIDENCE,
    Kept,
    histograms_of,
    read_stored,
)
from nightseg.data.taxonomy import Taxonomy
from nightseg.progress import Progress
from nightseg.segmenter import self_training
from nightseg.segmenter.self_training import KeptPixels
from nightseg.segmenter.settings import Guard, Threshold
from nightseg.storage import Attempt, Commit, UserError

VERSION = 4

LABELS: Final = "labels"  # table

Counts = npt.NDArray[np.int64]
Thresholds = npt.NDArray[np.float64]


def pseudo_label(
    labels: Commit,
    *,
    name: str,
    threshold: Threshold,
    taxonomy: AnyTaxonomy,
    attempt: Attempt,
    progress: Progress,
    never_below: Mapping[str, Sequence[str]] | None = None,
    labelled: pa.Table | None = None,
    guard: Guard | None = None,
    first_round: Commit | None = None,
    known_warnings: Sequence[str] = (),
) -> Commit:
    """Commit `kept.json` (`Kept`), the table `labels` (KEPT_SCHEMA, in the order of the frames of `labels`) and
    `evidence.json` (`_evidence`).

    `labels` and `first_round` are commits of the stage `label`. `never_below`: pixels of a class below others are not
    kept; `labelled` are the frames whose labels this is checked on. `guard` compares what the teacher sees with what
    that of `first_round`, whose pool was the same, saw. `known_warnings` join those that the labels give.
    Raises UserError: no pixel kept, labels that break `never_below`, a class out of the guard's range where it says
    `stop`.
    """
    classes = load_taxonomy(taxonomy)
    rules = self_training.rules_of(never_below or {}, classes)
    if labelled is not None:
        self_training.check_never_below(never_below or {}, labelled, classes, f"pseudo-labels for {name}")
    histograms_KB = _histograms(labels)
    thresholds_K = self_training.class_thresholds(threshold, histograms_KB)
    warnings = [*known_warnings]
    if guard is not None and first_round is not None:
        warnings += _Watch.of(guard, first_round, classes, name).look(histograms_KB, thresholds_K)
    kept = Kept(self_training.least_bins(thresholds_K), rules)
    kept_K = np.zeros(classes.num_classes, dtype=np.int64)
    parts = []
    with progress.task(f"pseudo-labels for {name}", labels.rows_out, "frames") as task:
        for frames, index in zip(labels.parts("frames"), labels.parts(INDEX), strict=True):
            part, kept_NK = _kept_part(labels, frames, index, kept)
            parts.append(part)
            kept_K += kept_NK.sum(axis=0)
            task.advance(frames.num_rows)
    pixels = KeptPixels(histograms_KB.sum(axis=1), kept_K)
    warnings += self_training.guard(pixels, classes.classes)
    for warning in warnings:
        progress.say(f"pseudo-labels for {name}: {warning}")
    (attempt.folder / KEPT_NAME).write_bytes(kept.text.encode())
    table = attempt.write_table(LABELS, pa.concat_tables(parts))
    (attempt.folder / "evidence.json").write_json(_evidence(labels, threshold, classes, thresholds_K, pixels, warnings))
    return attempt.finish(
        rows_in=labels.rows_out,
        rows_out=labels.rows_out,
        outputs=["evidence.json", KEPT_NAME, table],
        summary={"kept_share": pixels.share, "warnings": len(warnings), "threshold": threshold.kind},
    )


def _histograms(labels: Commit) -> Counts:
    return np.array(labels.table(HISTOGRAMS)[HISTOGRAM].to_pylist(), dtype=np.int64)


def _kept_part(labels: Commit, frames: pa.Table, index: pa.Table, kept: Kept) -> tuple[pa.Table, Counts]:
    """Rows of KEPT_SCHEMA for a part of the labels, and the kept logits of its frames by class."""
    counts_NK = np.array(index[COUNTS].to_pylist(), dtype=np.int64).reshape(-1, len(kept.bins))
    if kept.never_below:
        kept_NK = np.array(list(_read_kept(labels, frames, kept)), dtype=np.int64).reshape(counts_NK.shape)
    else:
        kept_NK = self_training.kept_of_histograms(histograms_of(index, len(kept.bins)), kept.bins)
    logits_N = counts_NK.sum(axis=1)
    pixels_N = frames[frame.HEIGHT].to_numpy().astype(np.float64) * frames[frame.WIDTH].to_numpy()
    pixels_NK = np.rint(kept_NK * (pixels_N / logits_N)[:, None]).astype(np.int64)
    columns = {
        frame.FRAME_ID: index[frame.FRAME_ID],
        KEPT: kept_NK.sum(axis=1) / logits_N,
        MEAN_CONFIDENCE: index[MEAN_CONFIDENCE],
        COUNTS: index[COUNTS],
        KEPT_COUNTS: kept_NK.tolist(),
        frame.LABEL_PIXELS: pixels_NK.tolist(),
    }
    return pa.table(columns, KEPT_SCHEMA), kept_NK


def _read_kept(labels: Commit, frames: pa.Table, kept: Kept) -> Iterator[Counts]:
    """What rules leave of each frame, by class."""
    rows = frame.resolve(frames, labels.folder)
    for uri, sha256 in zip(rows[frame.LABEL_URI].to_pylist(), rows[frame.LABEL_SHA256].to_pylist(), strict=True):
        stored = read_stored(uri, sha256)
        kept_hw = kept.apply(stored.labels_hw, stored.bins_hw)
        yield np.bincount(kept_hw.reshape(-1), minlength=256)[: len(kept.bins)]


# -- evidence --------------------------------------------------------------------------------------------------------


class _Watch(NamedTuple):
    """What the teacher of the first round saw on the pool, and what is done where this one sees something else."""

    guard: Guard
    first_K: Thresholds  # shares of the pixels
    classes: Sequence[str]
    name: str

    @classmethod
    def of(cls, guard: Guard, first_round: Commit, classes: Taxonomy, name: str) -> _Watch:
        counts_K = _histograms(first_round).sum(axis=1)
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


def _evidence(
    labels: Commit,
    threshold: Threshold,
    classes: Taxonomy,
    thresholds_K: Thresholds,
    pixels: KeptPixels,
    warnings: list[str],
) -> dict[str, Any]:
    """Pixels are logits; shares are fractions; `kept_share` of a class is null where the teacher never predicts it,
    `threshold` where the guard lets nothing of it be learned."""
    facts = zip(classes.classes, pixels.predicted, pixels.kept, pixels.share_by_class, thresholds_K, strict=True)
    return {
        "teacher": {"name": labels.summary["teacher"], "key": labels.summary["teacher_key"]},
        "labels": f"{labels.stage}/{labels.name}",
        "threshold": threshold.model_dump(mode="json"),
        "frames": labels.rows_out,
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
