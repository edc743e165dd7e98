"""How far scores and gains of a run would move with other test frames: from the confusion matrix of each frame."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from nightseg.data import table as frame
from nightseg.metrics.bootstrap import Counts, Floats, FrameSpread, drawn_miou, interval, summed_by
from nightseg.report.run import Run

LEAST_DRIVES = 10  # fewer of them are too few to draw from; then frames are drawn
LEAST_FRAMES = 5


def miou_spread(run: Run, model: str, test: str) -> FrameSpread | None:
    """Of the mean mIoU of a model's seeds; None where matrices of single frames are not there, or of too few."""
    return _spread(run, {model: 1.0}, test)


def gain_spread(run: Run, model: str, other: str, test: str) -> FrameSpread | None:
    """Of a model's mIoU over another's, on the same draws of frames."""
    return _spread(run, {model: 1.0, other: -1.0}, test)


def _spread(run: Run, signs: Mapping[str, float], test: str) -> FrameSpread | None:
    nodes = {model: tuple(run.evaluations(model).values()) for model in signs}
    known = [_counts(run, node, test) for found in nodes.values() for node in found]
    seen = [counts for counts in known if counts is not None]
    if not seen or len(seen) < len(known):
        return None
    shared = tuple(sorted(set.intersection(*(set(counts) for counts in seen))))
    drives = [seen[0][name][0] for name in shared]
    by_drive = None not in drives and len(set(drives)) >= LEAST_DRIVES
    units = len(set(drives)) if by_drive else len(shared)
    if units < LEAST_FRAMES:
        return None
    rule = (run.score(next(iter(signs)), test) or {}).get("absent_class", "cityscapes")
    means = [
        sign * np.mean([_drawn(run, node, test, shared, by_drive, rule) for node in nodes[model]], axis=0)
        for model, sign in signs.items()
    ]
    return FrameSpread(interval(np.sum(means, axis=0)), units, "drive" if by_drive else "frame")


@functools.lru_cache(maxsize=512)
def _drawn(run: Run, node: str, test: str, shared: tuple[str, ...], by_drive: bool, rule: str) -> Floats:
    """mIoU of one training on draws of these frames: one model is compared with many others."""
    counts = _counts(run, node, test)
    assert counts is not None, node
    matrices = np.stack([counts[name][1] for name in shared])
    return drawn_miou(summed_by([str(counts[n][0]) for n in shared], matrices) if by_drive else matrices, rule)


@functools.lru_cache(maxsize=64)
def _counts(run: Run, node: str, test: str) -> dict[str, tuple[str | None, Counts]] | None:
    """Frame -> its drive and confusion matrix (K, K + 1)."""
    commit = run.commit(node)
    if commit is None or not commit.has_table("predictions"):
        return None
    num_classes, found = run.classes.num_classes, dict[str, tuple[str | None, Counts]]()
    columns = (frame.FRAME_ID, frame.SEQUENCE, "test_sets", "confusion")
    table: Any = commit.table("predictions").select(columns)
    for name, drive, tests, counts in zip(*(table[column].to_pylist() for column in columns), strict=True):
        if test in tests:
            matrix = np.zeros((num_classes, num_classes + 1), dtype=np.int64)
            counted = np.reshape(counts, (num_classes, -1))
            matrix[:, : counted.shape[1]] = counted
            found[name] = drive, matrix
    return found
