"""Mean and covariance of many features: nightseg's merged moments against all features in one array, as pytorch-fid."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import numpy as np
import numpy.typing as npt

from benchmarks.contest import Contest, Size
from nightseg.selection.frechet import Moments, moments_of_parts

SIZES: dict[Size, tuple[int, int]] = {"tiny": (500, 16), "default": (10_000, 512), "full": (100_000, 2048)}
PART = 50  # pytorch-fid's batch
SHARDS = 7
TOLERANCE = 1e-10  # relative to the largest entry


def contest(size: Size) -> Contest:
    count, dims = SIZES[size]

    def features() -> Iterator[npt.NDArray[np.float32]]:
        """The same numbers each time, made anew: the input is not part of what is compared."""
        random = np.random.default_rng(0)
        for start in range(0, count, PART):
            yield random.random((min(PART, count - start), dims), dtype=np.float32)

    def ours() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        moments = moments_of_parts(features(), dims)
        return moments.mean, moments.cov

    def peer() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The steps of get_activations and calculate_activation_statistics."""
        everything, start = np.empty((count, dims)), 0
        for part in features():
            everything[start : start + len(part)] = part
            start += len(part)
        return np.mean(everything, axis=0), np.cov(everything, rowvar=False)

    def check(mine: tuple[npt.NDArray[np.float64], ...], theirs: tuple[npt.NDArray[np.float64], ...]) -> str:
        apart = max(_apart(one, other) for one, other in zip(mine, theirs, strict=True))
        shards = [Moments(dims) for _ in range(SHARDS)]
        for number, part in enumerate(features()):
            shards[number % SHARDS].update(part)
        merged = shards[0]
        for shard in shards[1:]:
            merged.merge(shard)
        apart_when_merged = max(_apart(merged.mean, theirs[0]), _apart(merged.cov, theirs[1]))
        assert max(apart, apart_when_merged) <= TOLERANCE, (apart, apart_when_merged)
        return f"relative difference {apart:.1g}; {SHARDS} shards merged {apart_when_merged:.1g}"

    return Contest(
        name="moments",
        work=f"mean and covariance of {count:,} features, d = {dims}",
        peer=f"the steps of pytorch-fid {version('pytorch-fid')} calculate_activation_statistics",
        run_ours=ours,
        run_peer=peer,
        check=check,
        allocations=True,
    )


def _apart(one: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())
