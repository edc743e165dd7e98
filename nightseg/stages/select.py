"""Choose the frames of a pool to learn from, and keep the evidence that the choice was better than chance."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.data import table as frame
from nightseg.errors import UserError
from nightseg.progress import Progress
from nightseg.selection.evidence import SCORE, evidence_of
from nightseg.selection.limits import Limits, near_duplicates
from nightseg.selection.methods import Choice, Described, Reference, Request, choose, every_score
from nightseg.selection.rows import taken
from nightseg.selection.settings import Selection
from nightseg.selection.subset import check_count
from nightseg.storage import Attempt, Commit

VERSION = 3

RANK = "rank"  # 1 = best; null in the table of all scores for frames that were not chosen
REPEATS = "repeats"  # frame_id of the frame that this one is a near duplicate of; null = it is none


def select(
    pool_frames: pa.Table,
    pool_scores: Commit,
    reference_scores: Commit | None,
    *,
    selection: Selection,
    seed: int,
    attempt: Attempt,
    progress: Progress,
) -> Commit:
    """Commit `frames` (the chosen rows of `pool_frames`, best first; columns rank, score), `scores`, evidence.json.

    `pool_scores` and `reference_scores` are commits of the stage `score`, by the same extractor. All methods prefer
    frames that are close to the reference but `random`, which needs none, and is measured against it if there is one.
    Raises UserError: the count exceeds the pool or what the limits leave of it; the reference is missing, or was scored
    by another extractor.
    """
    everything, reference = Described.of(pool_scores), None
    if reference_scores is not None:
        described = Described.of(reference_scores)
        _check_same_features(pool_scores, reference_scores)
        reference = Reference.of(described)
    check_count(selection.count, len(everything.frame_ids))
    repeats = _repeats(everything, selection)
    kept = np.flatnonzero(repeats < 0)
    pool = everything.rows(kept)
    limits = Limits.of(selection, pool.frame_ids, pool_frames)
    with progress.task(f"choose by {selection.method}", None, "iterations") as task:
        choice = choose(
            Request(selection, pool, reference, limits, seed, lambda fid, bound: task.advance(fid=fid, bound=bound))
        )
    attempt.write_table("frames", _chosen_frames(pool_frames, pool, choice))
    attempt.write_table("scores", _all_scores(everything, repeats, kept, choice, reference))
    num_frames = len(everything.frame_ids)
    facts = {
        "method": selection.method,
        "count": selection.count,
        "pool": num_frames,
        "duplicates": int((repeats >= 0).sum()),
        "rules": selection.model_dump(include={"quota", "gap", "duplicates"}),
        "extractor": pool_scores.summary["extractor"],
        "resize": pool_scores.summary["resize"],
    }
    evidence = facts | evidence_of(pool_frames, pool, reference, choice, seed, progress)
    attempt.write_json("evidence.json", evidence)
    return attempt.finish(
        rows_in=num_frames,
        rows_out=num_frames,
        outputs=["frames.parquet", "scores.parquet", "evidence.json"],
        summary={key: facts[key] for key in ("method", "pool")} | {"chosen": selection.count, "fid": evidence["fid"]},
    )


def _repeats(pool: Described, selection: Selection) -> npt.NDArray[np.int64]:
    """For each frame the earlier one, by id, that it repeats; -1 for those that are kept."""
    repeats = np.full(len(pool.frame_ids), -1, dtype=np.int64)
    if selection.duplicates is not None:
        by_id = np.array(sorted(range(len(repeats)), key=pool.frame_ids.__getitem__), dtype=np.int64)
        found = near_duplicates(taken(pool.features, by_id), selection.duplicates)
        repeats[by_id[found >= 0]] = by_id[found[found >= 0]]
    kept = int((repeats < 0).sum())
    if selection.count > kept:
        raise UserError(
            f"count: `duplicates` {selection.duplicates} leaves {kept} of {len(repeats)} frames, {selection.count} were"
            " asked for",
            cure="raise `duplicates` or lower `count`",
        )
    return repeats


# -- refusals --------------------------------------------------------------------------------------------------------


def _check_same_features(pool: Commit, reference: Commit) -> None:
    for what in ("extractor", "resize", "weights_sha256"):
        if pool.summary[what] != reference.summary[what]:
            raise UserError(
                f"{pool.name} and {reference.name}: pool and reference do not compare, their {what} differs"
                f" ({pool.summary[what]} and {reference.summary[what]})",
                cure="score both with the same extractor",
            )


# -- what is written -------------------------------------------------------------------------------------------------


def _chosen_frames(pool_frames: pa.Table, pool: Described, choice: Choice) -> pa.Table:
    place = {name: row for row, name in enumerate(pool_frames[frame.FRAME_ID].to_pylist())}
    absent = [pool.frame_ids[row] for row in choice.chosen if pool.frame_ids[row] not in place]
    assert not absent, f"scored, but not in the pool: {absent[:3]}"
    rows = pa.array([place[pool.frame_ids[row]] for row in choice.chosen], pa.int64())
    frames = pool_frames.select(frame.FRAME_SCHEMA.names).take(rows)
    ranks = pa.array(range(1, len(choice.chosen) + 1), pa.int64())
    return frames.append_column(RANK, ranks).append_column(SCORE, pa.array(choice.scores[choice.chosen], pa.float64()))


def _all_scores(
    everything: Described,
    repeats: npt.NDArray[np.int64],
    kept: npt.NDArray[np.int64],
    choice: Choice,
    reference: Reference | None,
) -> pa.Table:
    """One row a frame of the pool: score of the method, rank, what it repeats, and every other score there is."""
    ranks = np.zeros(len(repeats), dtype=np.int64)
    ranks[kept[choice.chosen]] = np.arange(1, len(choice.chosen) + 1)
    scores = np.full(len(repeats), np.nan)
    scores[kept] = choice.scores
    others = every_score(everything, kept[choice.chosen], reference)
    return pa.table(
        {
            frame.FRAME_ID: pa.array(everything.frame_ids, pa.string()),
            SCORE: pa.array(scores, pa.float64(), mask=repeats >= 0),
            RANK: pa.array(ranks, pa.int64(), mask=ranks == 0),
            REPEATS: pa.array([everything.frame_ids[row] if row >= 0 else None for row in repeats], pa.string()),
            **{name: pa.array(values, pa.float64()) for name, values in others.items()},
        }
    )
