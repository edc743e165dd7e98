"""Choose the frames of a pool to learn from, and keep the evidence that the choice was better than chance."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.frames import table as frame
from nightseg.frames.vectors import vectors
from nightseg.measures import subset
from nightseg.measures.frechet import Gaussian, gaussian_distance, gaussian_of_features
from nightseg.progress import Progress
from nightseg.storage import UserError
from nightseg.workspace import Attempt, Commit

VERSION = 1

RANK = "rank"  # 1 = best; null in the table of all scores for frames that were not chosen
SCORE = "score"  # of the method; smaller is better

Method = Literal["pooled", "histogram", "random"]

NUM_DRAWS = 20  # random subsets that the choice is compared with
NUM_EXAMPLES = 8
NUM_SCORE_BINS = 40

# Columns of the table `features` that the stage `score` writes.
_FEATURES = "features"
_HISTOGRAM = "histogram"


class _Scored(NamedTuple):
    """The features of one scored set, in the order of its frames."""

    frame_ids: list[str]
    sha256: list[str | None]
    features: npt.NDArray[np.float32]  # (N, d)
    histograms: npt.NDArray[np.float32]  # (N, 64)


def select(
    pool_frames: pa.Table,
    pool_scores: Commit,
    reference_scores: Commit | None,
    *,
    method: Method,
    count: int,
    seed: int,
    reference_frames: pa.Table | None = None,
    test_frames: Mapping[str, pa.Table] | None = None,
    attempt: Attempt,
    progress: Progress,
) -> Commit:
    """Commit `frames` (the chosen rows of `pool_frames`, best first; columns rank, score), `scores`, evidence.json.

    `pool_scores` and `reference_scores` are commits of the stage `score`, by the same extractor. `pooled` and
    `histogram` prefer frames that are close to the reference; `random` needs none, but is measured against it if there
    is one. `reference_frames` are the frames that the reference was made from, where it is translated.

    Raises UserError: the reference, or what it was made from, has a frame of one of `test_frames` (by content); `count`
    exceeds the pool; the reference is missing, or was scored by another extractor.
    """
    begun = time.monotonic()
    pool = _scored(pool_scores)
    reference = _scored(reference_scores) if reference_scores else None
    if reference is None and method != "random":
        raise UserError(
            f"selection by {method} needs a reference to be close to: set `reference` to a dataset, or train on a"
            " translated dataset, which is the reference by default"
        )
    if reference_scores is not None and reference is not None:
        _check_same_features(pool_scores, reference_scores)
        _refuse_test_frames(reference_scores.name, reference, reference_frames, test_frames or {})
    target = gaussian_of_features(reference.features) if reference and len(reference.frame_ids) > 1 else None
    scores = _scores(method, pool, reference, target, seed)
    chosen = subset.choose(scores, pool.frame_ids, count)
    frames = _chosen_frames(pool_frames, pool, scores, chosen)
    (attempt.folder / "frames.parquet").write_table(frames)
    (attempt.folder / "scores.parquet").write_table(_all_scores(pool, scores, chosen))
    evidence = {
        "method": method,
        "count": count,
        "pool": len(pool.frame_ids),
        "reference": len(reference.frame_ids) if reference else 0,
        "extractor": pool_scores.summary["extractor"],
        "resize": pool_scores.summary["resize"],
        "fid": _distances(pool, target, chosen, seed, progress),
        "shared_with_tests": _shared_with_tests(pool.sha256, test_frames or {}),
        **_score_evidence(pool_frames, pool, scores, chosen),
    }
    (attempt.folder / "evidence.json").write_json(evidence)
    return attempt.finish(
        rows_in=len(pool.frame_ids),
        rows_out=len(pool.frame_ids),
        outputs=["frames.parquet", "scores.parquet", "evidence.json"],
        summary={"method": method, "chosen": count, "pool": len(pool.frame_ids), "fid": evidence["fid"]},
        seconds=time.monotonic() - begun,
    )


def _scored(commit: Commit) -> _Scored:
    table = commit.table("features")
    return _Scored(
        table[frame.FRAME_ID].to_pylist(),
        table[frame.SHA256].to_pylist(),
        vectors(table[_FEATURES]),
        vectors(table[_HISTOGRAM]),
    )


def _scores(
    method: Method, pool: _Scored, reference: _Scored | None, target: Gaussian | None, seed: int
) -> npt.NDArray[np.float64]:
    if method == "random":
        return subset.random_scores(pool.frame_ids, seed)
    assert reference is not None
    if method == "histogram":
        return subset.histogram_scores(pool.histograms, reference.histograms.mean(axis=0, dtype=np.float64))
    if target is None:
        raise UserError("selection by pooled needs a reference of at least 2 frames, it has 1; name a larger dataset")
    return subset.pooled_scores(pool.features, target)


# -- refusals --------------------------------------------------------------------------------------------------------


def _check_same_features(pool: Commit, reference: Commit) -> None:
    for what in ("extractor", "resize", "weights_sha256"):
        if pool.summary[what] != reference.summary[what]:
            raise UserError(
                f"the pool {pool.name} and the reference {reference.name} do not compare: their {what} differs"
                f" ({pool.summary[what]} and {reference.summary[what]}); score both with the same extractor"
            )


def _refuse_test_frames(name: str, reference: _Scored, sources: pa.Table | None, tests: Mapping[str, pa.Table]) -> None:
    """A reference with a test frame in it would choose what is close to the test: the score would be no score."""
    seen = set(reference.sha256)
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


def _chosen_frames(
    pool_frames: pa.Table, pool: _Scored, scores: npt.NDArray[np.float64], chosen: npt.NDArray[np.int64]
) -> pa.Table:
    place = {name: row for row, name in enumerate(pool_frames[frame.FRAME_ID].to_pylist())}
    absent = [pool.frame_ids[row] for row in chosen if pool.frame_ids[row] not in place]
    assert not absent, f"scored, but not in the pool: {absent[:3]}"
    rows = pa.array([place[pool.frame_ids[row]] for row in chosen], pa.int64())
    frames = pool_frames.select(frame.FRAME_SCHEMA.names).take(rows)
    ranks = pa.array(range(1, len(chosen) + 1), pa.int64())
    return frames.append_column(RANK, ranks).append_column(SCORE, pa.array(scores[chosen], pa.float64()))


def _all_scores(pool: _Scored, scores: npt.NDArray[np.float64], chosen: npt.NDArray[np.int64]) -> pa.Table:
    ranks: list[int | None] = [None] * len(scores)
    for rank, row in enumerate(chosen, 1):
        ranks[int(row)] = rank
    return pa.table(
        {
            frame.FRAME_ID: pa.array(pool.frame_ids, pa.string()),
            SCORE: pa.array(scores, pa.float64()),
            RANK: pa.array(ranks, pa.int64()),
        }
    )


def _distances(
    pool: _Scored, target: Gaussian | None, chosen: npt.NDArray[np.int64], seed: int, progress: Progress
) -> dict[str, float | int | None]:
    """FID to the reference of the choice, of random choices of the same size, and of the whole pool; null if undefined.

    FID is biased upwards for few frames: the choice compares with the random ones, not with the larger pool.
    """
    nothing = dict.fromkeys(("selection", "random_mean", "random_sd", "pool"))
    if target is None or len(pool.frame_ids) < 2:
        return {**nothing, "random_draws": 0}
    whole_pool = gaussian_distance(gaussian_of_features(pool.features), target)
    if len(chosen) < 2:
        return {**nothing, "pool": whole_pool, "random_draws": 0}
    drawn = []
    with progress.task("compare with random choices", NUM_DRAWS, "choices") as task:
        for distance in subset.random_subset_distances(pool.features, target, len(chosen), draws=NUM_DRAWS, seed=seed):
            drawn.append(distance)
            task.advance()
    return {
        "selection": subset.subset_distance(pool.features, chosen, target),
        "random_mean": float(np.mean(drawn)),
        "random_sd": float(np.std(drawn, ddof=1)),
        "random_draws": len(drawn),
        "pool": whole_pool,
    }


def _score_evidence(
    pool_frames: pa.Table, pool: _Scored, scores: npt.NDArray[np.float64], chosen: npt.NDArray[np.int64]
) -> dict[str, Any]:
    """Histogram of all scores and of the chosen ones, and the frames at both ends and on both sides of the cut."""
    uris = dict(zip(pool_frames[frame.FRAME_ID].to_pylist(), pool_frames[frame.URI].to_pylist(), strict=True))
    order = subset.choose(scores, pool.frame_ids, len(scores))
    edges = np.histogram_bin_edges(scores, NUM_SCORE_BINS)

    def named(rows: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        ids = [pool.frame_ids[row] for row in rows]
        return [
            {frame.FRAME_ID: name, frame.URI: uris[name], SCORE: float(scores[row])}
            for name, row in zip(ids, rows, strict=True)
        ]

    cut = len(chosen)
    return {
        "scores": {
            "edges": edges.tolist(),
            "pool": np.histogram(scores, edges)[0].tolist(),
            "chosen": np.histogram(scores[chosen], edges)[0].tolist(),
        },
        "cut": float(scores[chosen[-1]]),
        "best": named(order[:NUM_EXAMPLES]),
        "last_chosen": named(order[max(cut - NUM_EXAMPLES, 0) : cut]),
        "first_left_out": named(order[cut : cut + NUM_EXAMPLES]),
        "worst": named(order[-NUM_EXAMPLES:]),
    }
