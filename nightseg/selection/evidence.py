"""What shows whether a choice of frames is good: distances to beat, their course with the number, a plane to see.

N frames of the pool, d feature dimensions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from nightseg.data import table as frame
from nightseg.progress import Progress
from nightseg.selection.frechet import Gaussian, Moments, gaussian_distance, gaussian_of_features, gaussian_of_moments
from nightseg.selection.methods import Choice, Described, Reference
from nightseg.selection.rows import Rows, StoredRows, as_rows, blocks, parts_of
from nightseg.selection.subset import ranking

Floats = npt.NDArray[np.float64]

SCORE: Final = "score"  # of the method; smaller is better

_DRAWS: Final = 20  # random subsets that the choice is compared with
_EXAMPLES: Final = 8
_SCORE_BINS: Final = 40
_PLACED: Final = 1500  # frames of the pool, and of the reference, in the picture of the plane
_CURVE_SHARES: Final = tuple(step / 20 for step in range(1, 21))  # 5 % to 100 % of the pool


def evidence_of(
    pool_frames: pa.Table,
    pool: Described,
    reference: Reference | None,
    choice: Choice,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """What a reader needs to judge a choice of the pool, as JSON: distances, their course, pictures, examples."""
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
    with progress.task("compare with random choices", _DRAWS, "choices") as task:
        for distance in random_subset_distances(pool.features, target, len(choice.chosen), draws=_DRAWS, seed=seed):
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
    marks = {*(max(2, round(share * size)) for share in _CURVE_SHARES), max(2, len(choice.chosen))}
    counts = sorted(marks) if target and size > 1 else []
    values: list[float] = []
    with progress.task("FID against the number of frames", len(counts), "points") as task:
        if target is not None and counts:
            for value in distance_curve(pool.features, choice.order(), target, counts):
                values.append(value)
                task.advance()
    return {"counts": [float(count) for count in counts], "fid": values}


def _plane(pool: Described, reference: Reference | None, choice: Choice) -> dict[str, Any]:
    """The pool, the choice and the reference on the first two principal components; at most _PLACED of each."""
    sets: dict[str, Rows] = {"pool": pool.features, "chosen": pool.features[np.sort(choice.chosen)]}
    if reference is not None:
        sets["reference"] = reference.described.features
    plane = principal_plane(*(sets[name] for name in ("pool", "reference") if name in sets))
    points = {
        name: plane.place(rows[np.arange(0, len(rows), max(1, -(-len(rows) // _PLACED)))])
        for name, rows in sets.items()
    }
    return {"share": list(plane.share), "points": {name: placed.round(4).tolist() for name, placed in points.items()}}


def _score_evidence(pool_frames: pa.Table, pool: Described, choice: Choice) -> dict[str, Any]:
    """Histogram of all scores and of the chosen ones, and the frames at both ends and on both sides of the cut."""
    uris = dict(zip(pool_frames[frame.FRAME_ID].to_pylist(), pool_frames[frame.URI].to_pylist(), strict=True))
    scores, count = choice.scores, len(choice.chosen)
    by_score = ranking(scores, pool.frame_ids)
    left_out = by_score[~np.isin(by_score, choice.chosen)]
    a_ranking = set(by_score[:count]) == set(choice.chosen)
    edges = np.histogram_bin_edges(scores, _SCORE_BINS)

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
        "best": named((by_score if a_ranking else choice.chosen)[:_EXAMPLES]),
        "last_chosen": named(choice.chosen[-_EXAMPLES:]),
        "first_left_out": named(left_out[:_EXAMPLES]),
        "worst": named(by_score[-_EXAMPLES:]),
    }


def subset_distance(features: npt.ArrayLike | StoredRows, chosen: npt.ArrayLike, reference: Gaussian) -> float:
    """FID between the chosen rows (at least 2) of (N, d) features and the reference."""
    return gaussian_distance(gaussian_of_features(as_rows(features)[np.asarray(chosen)]), reference)


def random_subset_distances(
    features: npt.ArrayLike | StoredRows, reference: Gaussian, count: int, *, draws: int, seed: int
) -> Iterator[float]:
    """FID of `draws` random subsets of `count` rows (at least 2), one after the other: what a choice has to beat."""
    rows_ND = as_rows(features)
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        yield subset_distance(rows_ND, np.sort(generator.choice(len(rows_ND), count, replace=False)), reference)


def distance_curve(
    features: npt.ArrayLike | StoredRows, order: npt.ArrayLike, reference: Gaussian, counts: Sequence[int]
) -> Iterator[float]:
    """FID of the first c rows of `order` to the reference, for each of the increasing `counts` (each at least 2)."""
    rows_ND, order_N = as_rows(features), np.asarray(order)
    moments = Moments(rows_ND.shape[1])
    for count in counts:
        start = moments.count
        for rows in parts_of(count - start):
            moments.update(rows_ND[order_N[start:count][rows]])
        # Few rows have a thin factor, which is much cheaper than that of a d x d covariance.
        few = count <= rows_ND.shape[1]
        part = gaussian_of_features(rows_ND[order_N[:count]]) if few else gaussian_of_moments(moments.mean, moments.cov)
        yield gaussian_distance(part, reference)


class Plane(NamedTuple):
    """Two directions in which frames differ most, to draw them by."""

    mean: Floats  # (d,)
    directions: Floats  # (d, 2)
    share: tuple[float, float]  # of the whole variance

    def place(self, features: npt.ArrayLike) -> Floats:
        """(N, d) -> (N, 2)."""
        placed: Floats = (np.asarray(features, dtype=np.float64) - self.mean) @ self.directions
        return placed


def principal_plane(*sets: npt.ArrayLike | StoredRows) -> Plane:
    """The first two principal components of several (N, d) feature sets together; signs fixed, so that it repeats."""
    import torch

    every = [as_rows(features) for features in sets]
    moments = Moments(every[0].shape[1])
    for block in itertools.chain.from_iterable(map(blocks, every)):
        moments.update(block)
    values, vectors = torch.linalg.eigh(torch.from_numpy(moments.scatter))
    directions = vectors[:, [-1, -2]].numpy() if len(values) > 1 else np.array([[1.0, 0.0]])
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[largest, [0, 1]] + (directions[largest, [0, 1]] == 0))
    whole = float(values.clamp(min=0).sum()) or 1.0
    first, second = (float(values[-rank]) / whole if len(values) >= rank else 0.0 for rank in (1, 2))
    return Plane(moments.mean.copy(), directions, (first, second))
