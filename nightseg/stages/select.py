"""Choose the frames of a pool to learn from, and keep the evidence that the choice was better than chance."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.data import table as frame
from nightseg.data.table import vectors
from nightseg.progress import Progress, Task
from nightseg.selection.evidence import distance_curve, principal_plane, random_subset_distances, subset_distance
from nightseg.selection.frechet import Gaussian, gaussian_distance, gaussian_of_features
from nightseg.selection.limits import Limits, near_duplicates
from nightseg.selection.methods import Choice, Described, Reference, choose, every_score
from nightseg.selection.settings import Selection
from nightseg.selection.subset import check_count, ranking
from nightseg.storage import Attempt, Commit, UserError

VERSION = 2

RANK = "rank"  # 1 = best; null in the table of all scores for frames that were not chosen
SCORE = "score"  # of the method; smaller is better
REPEATS = "repeats"  # frame_id of the frame that this one is a near duplicate of; null = it is none

NUM_DRAWS: Final = 20  # random subsets that the choice is compared with
NUM_EXAMPLES: Final = 8
NUM_SCORE_BINS: Final = 40
NUM_PLACED: Final = 1500  # frames of the pool, and of the reference, in the picture of the plane
CURVE_SHARES: Final = tuple(step / 20 for step in range(1, 21))  # 5 % to 100 % of the pool

# Columns of the table `features` that the stage `score` writes.
_FEATURES = "features"
_HISTOGRAM = "histogram"
_SPATIAL = "spatial"
_SPATIAL_ERROR = "spatial_error"


class _Scored(NamedTuple):
    """One set as the stage `score` left it."""

    described: Described
    sha256: list[str | None]


def select(
    pool_frames: pa.Table,
    pool_scores: Commit,
    reference_scores: Commit | None,
    *,
    selection: Selection,
    seed: int,
    reference_frames: pa.Table | None = None,
    test_frames: Mapping[str, pa.Table] | None = None,
    attempt: Attempt,
    progress: Progress,
) -> Commit:
    """Commit `frames` (the chosen rows of `pool_frames`, best first; columns rank, score), `scores`, evidence.json.

    `pool_scores` and `reference_scores` are commits of the stage `score`, by the same extractor. All methods prefer
    frames that are close to the reference but `random`, which needs none, and is measured against it if there is one.
    `reference_frames` are the frames that the reference was made from, where it is translated.
    Raises UserError: the reference, or what it was made from, has a frame of one of `test_frames` (by content); the
    count exceeds the pool or what the limits leave of it; the reference is missing, or was scored by another extractor.
    """
    begun = time.monotonic()
    (everything, sha256), reference = _scored(pool_scores), None
    if reference_scores is not None:
        described, reference_sha256 = _scored(reference_scores)
        _check_same_features(pool_scores, reference_scores)
        _refuse_test_frames(reference_scores.name, reference_sha256, reference_frames, test_frames or {})
        reference = Reference.of(described)
    check_count(selection.count, len(everything.frame_ids))
    repeats = _repeats(everything, selection)
    kept = np.flatnonzero(repeats < 0)
    pool = everything.rows(kept)
    limits = _limits(pool_frames, pool, selection)
    with progress.task(f"choose by {selection.method}", None, "iterations") as task:
        choice = choose(selection, pool, reference, limits=limits, seed=seed, watch=_watcher(task))
    (attempt.folder / "frames.parquet").write_table(_chosen_frames(pool_frames, pool, choice))
    (attempt.folder / "scores.parquet").write_table(_all_scores(everything, repeats, kept, choice, reference))
    facts = {
        "method": selection.method,
        "count": selection.count,
        "pool": len(everything.frame_ids),
        "duplicates": int((repeats >= 0).sum()),
        "rules": selection.model_dump(include={"quota", "gap", "duplicates"}),
        "extractor": pool_scores.summary["extractor"],
        "resize": pool_scores.summary["resize"],
        "shared_with_tests": _shared_with_tests(sha256, test_frames or {}),
    }
    evidence = facts | _evidence(pool_frames, pool, reference, choice, seed, progress)
    (attempt.folder / "evidence.json").write_json(evidence)
    return attempt.finish(
        rows_in=len(everything.frame_ids),
        rows_out=len(everything.frame_ids),
        outputs=["frames.parquet", "scores.parquet", "evidence.json"],
        summary={
            "method": selection.method,
            "chosen": selection.count,
            "pool": len(everything.frame_ids),
            "fid": evidence["fid"],
        },
        seconds=time.monotonic() - begun,
    )


def _watcher(task: Task) -> Callable[[float, float], None]:
    def watch(fid: float, lower_bound: float) -> None:
        task.advance(fid=fid, bound=lower_bound)

    return watch


def _scored(commit: Commit) -> _Scored:
    if commit.rows_out == 0:
        bad = [row[frame.REASON] for row in commit.table("quarantine").to_pylist()[:3]]
        raise UserError(f"{commit.name}: none of its {commit.rows_in} frames could be read: {', '.join(bad)}")
    table = commit.table("features")
    described = Described(
        table[frame.FRAME_ID].to_pylist(),
        vectors(table[_FEATURES]),
        vectors(table[_HISTOGRAM]),
        *(table[name].to_numpy() if name in table.column_names else None for name in (_SPATIAL, _SPATIAL_ERROR)),
    )
    return _Scored(described, table[frame.SHA256].to_pylist())


def _repeats(pool: Described, selection: Selection) -> npt.NDArray[np.int64]:
    """For each frame the earlier one, by id, that it repeats; -1 for those that are kept."""
    repeats = np.full(len(pool.frame_ids), -1, dtype=np.int64)
    if selection.duplicates is not None:
        by_id = np.array(sorted(range(len(repeats)), key=pool.frame_ids.__getitem__), dtype=np.int64)
        found = near_duplicates(pool.features[by_id], selection.duplicates)
        repeats[by_id[found >= 0]] = by_id[found[found >= 0]]
    kept = int((repeats < 0).sum())
    if selection.count > kept:
        raise UserError(
            f"`duplicates` {selection.duplicates} leaves {kept} of {len(repeats)} frames, {selection.count} were asked"
            " for: raise it or lower `count`"
        )
    return repeats


def _natural(frame_id: str) -> list[tuple[int, str]]:
    """A key by which frame 9 comes before frame 10, whether or not numbers are padded with zeros."""
    return [(int(word), "") if word.isdigit() else (-1, word) for word in re.split(r"([0-9]+)", frame_id)]


def _limits(pool_frames: pa.Table, pool: Described, selection: Selection) -> Limits:
    """Sequences as numbers and places in them; a frame without a sequence is one of its own."""
    if selection.quota is None and selection.gap is None:
        return Limits()
    sequence = dict(zip(pool_frames[frame.FRAME_ID].to_pylist(), pool_frames[frame.SEQUENCE].to_pylist(), strict=True))
    if not any(sequence.values()):
        raise UserError(
            "`quota` and `gap` are about frames of one sequence, but no frame of the pool has one: leave them out, or"
            f" fill the column `{frame.SEQUENCE}` of the frame table"
        )
    members: dict[str, list[str]] = {}
    for name in sorted(sequence, key=_natural):  # places count all frames of the pool, duplicates too
        members.setdefault(sequence[name] or f"\0{name}", []).append(name)
    where = {name: (group, place) for group, names in enumerate(members.values()) for place, name in enumerate(names)}
    groups, places = zip(*(where[name] for name in pool.frame_ids), strict=True)
    return Limits(np.array(groups), np.array(places), selection.quota, selection.gap)


# -- refusals --------------------------------------------------------------------------------------------------------


def _check_same_features(pool: Commit, reference: Commit) -> None:
    for what in ("extractor", "resize", "weights_sha256"):
        if pool.summary[what] != reference.summary[what]:
            raise UserError(
                f"the pool {pool.name} and the reference {reference.name} do not compare: their {what} differs"
                f" ({pool.summary[what]} and {reference.summary[what]}); score both with the same extractor"
            )


def _refuse_test_frames(
    name: str, reference: list[str | None], sources: pa.Table | None, tests: Mapping[str, pa.Table]
) -> None:
    """A reference with a test frame in it would choose what is close to the test: the score would be no score."""
    seen = set(reference)
    if sources is not None:
        seen |= set(sources[frame.SHA256].to_pylist())
    seen -= {None}
    for test, frames in tests.items():
        rows = frames.select([frame.FRAME_ID, frame.SHA256]).to_pylist()
        shared = [row[frame.FRAME_ID] for row in rows if row[frame.SHA256] in seen]
        if shared:
            raise UserError(
                f"the reference of the selection ({name}) holds {len(shared)} frames of the test set '{test}', first"
                f" {shared[0]}: frames would be chosen by looking at the test. Take these frames out of the reference,"
                " or name another one (`reference`)"
            )


def _shared_with_tests(pool: list[str | None], tests: Mapping[str, pa.Table]) -> dict[str, int]:
    """Pool frames that are test frames too: allowed, they bring no labels, but a reader must know."""
    seen = set(pool) - {None}
    return {test: sum(value in seen for value in table[frame.SHA256].to_pylist()) for test, table in tests.items()}


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


def _evidence(
    pool_frames: pa.Table,
    pool: Described,
    reference: Reference | None,
    choice: Choice,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    target = reference.gaussian if reference else None
    return {
        "reference": len(reference.described.frame_ids) if reference else 0,
        "fid": _distances(pool, target, choice, seed, progress),
        "curve": _curve(pool, target, choice, progress),
        "plane": _plane(pool, reference, choice),
        **_score_evidence(pool_frames, pool, choice),
    }


def _distances(
    pool: Described, target: Gaussian | None, choice: Choice, seed: int, progress: Progress
) -> dict[str, float | int | None]:
    """FID to the reference of the choice, of random choices of the same size, and of the whole pool; null if undefined.

    FID is biased upwards for few frames: the choice compares with the random ones, not with the larger pool. The bound
    is about `selection_biased`, the covariance divided by the number of frames, not by one less.
    """
    certificate = {
        "selection_biased": choice.subset.fid if choice.subset else None,
        "lower_bound": choice.subset.lower_bound if choice.subset else None,
    }
    nothing = dict.fromkeys(("selection", "random_mean", "random_sd", "pool")) | certificate
    if target is None or len(pool.frame_ids) < 2:
        return {**nothing, "random_draws": 0}
    whole_pool = gaussian_distance(gaussian_of_features(pool.features), target)
    if len(choice.chosen) < 2:
        return {**nothing, "pool": whole_pool, "random_draws": 0}
    drawn = []
    with progress.task("compare with random choices", NUM_DRAWS, "choices") as task:
        for distance in random_subset_distances(pool.features, target, len(choice.chosen), draws=NUM_DRAWS, seed=seed):
            drawn.append(distance)
            task.advance()
    return {
        "selection": subset_distance(pool.features, choice.chosen, target),
        "random_mean": float(np.mean(drawn)),
        "random_sd": float(np.std(drawn, ddof=1)),
        "random_draws": len(drawn),
        "pool": whole_pool,
        **certificate,
    }


def _curve(pool: Described, target: Gaussian | None, choice: Choice, progress: Progress) -> dict[str, list[float]]:
    """FID of the first frames in the order of the method, for 5 % to 100 % of the pool."""
    size = len(pool.frame_ids)
    marks = {*(max(2, round(share * size)) for share in CURVE_SHARES), max(2, len(choice.chosen))}
    counts = sorted(marks) if target and size > 1 else []
    values: list[float] = []
    with progress.task("FID against the number of frames", len(counts), "points") as task:
        if target is not None and counts:
            for value in distance_curve(pool.features, choice.order(), target, counts):
                values.append(value)
                task.advance()
    return {"counts": [float(count) for count in counts], "fid": values}


def _plane(pool: Described, reference: Reference | None, choice: Choice) -> dict[str, Any]:
    """The pool, the choice and the reference on the first two principal components; at most NUM_PLACED of each."""
    sets = {"pool": pool.features, "chosen": pool.features[np.sort(choice.chosen)]}
    if reference is not None:
        sets["reference"] = reference.described.features
    plane = principal_plane(*(sets[name] for name in ("pool", "reference") if name in sets))
    points = {name: plane.place(rows[:: max(1, -(-len(rows) // NUM_PLACED))]) for name, rows in sets.items()}
    return {"share": list(plane.share), "points": {name: placed.round(4).tolist() for name, placed in points.items()}}


def _score_evidence(pool_frames: pa.Table, pool: Described, choice: Choice) -> dict[str, Any]:
    """Histogram of all scores and of the chosen ones, and the frames at both ends and on both sides of the cut."""
    uris = dict(zip(pool_frames[frame.FRAME_ID].to_pylist(), pool_frames[frame.URI].to_pylist(), strict=True))
    scores, count = choice.scores, len(choice.chosen)
    by_score = ranking(scores, pool.frame_ids)
    left_out = by_score[~np.isin(by_score, choice.chosen)]
    a_ranking = set(by_score[:count]) == set(choice.chosen)
    edges = np.histogram_bin_edges(scores, NUM_SCORE_BINS)

    def named(rows: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        ids = [pool.frame_ids[row] for row in rows]
        return [
            {frame.FRAME_ID: name, frame.URI: uris[name], SCORE: float(scores[row])}
            for name, row in zip(ids, rows, strict=True)
        ]

    return {
        "scores": {
            "edges": edges.tolist(),
            "pool": np.histogram(scores, edges)[0].tolist(),
            "chosen": np.histogram(scores[choice.chosen], edges)[0].tolist(),
        },
        # Where the choice is more than a ranking there is no score that divides it.
        "cut": float(scores[choice.chosen].max()) if a_ranking else None,
        "best": named((by_score if a_ranking else choice.chosen)[:NUM_EXAMPLES]),
        "last_chosen": named(choice.chosen[-NUM_EXAMPLES:]),
        "first_left_out": named(left_out[:NUM_EXAMPLES]),
        "worst": named(by_score[-NUM_EXAMPLES:]),
    }
