"""Frechet distance of two normal distributions, full rank or from few images: nightseg against pytorch-fid."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from pytorch_fid.fid_score import calculate_frechet_distance
from scipy.linalg import LinAlgWarning

from benchmarks.contest import Contest, Size
from nightseg.selection.frechet import (
    frechet_distance,
    gaussian_distance,
    gaussian_of_features,
    gaussian_of_moments,
)

DIMS: dict[Size, int] = {"tiny": 16, "default": 512, "full": 2048}  # 2048 is Inception's
FEW = 8  # one side has so many times fewer images than dimensions: 256 at Inception's
TOLERANCE = 1e-8  # relative
# The root of a singular product is only good to about the square root of the precision: that is the peer's error.
TOLERANCE_OF_FEW = 1e-3


def even(size: Size) -> Contest:
    return _full_rank(size, "even", smallest=0.5)


def decaying(size: Size) -> Contest:
    return _full_rank(size, "decaying", smallest=0.05)


def ill_conditioned(size: Size) -> Contest:
    """Condition number of the covariances 1e10."""
    return _full_rank(size, "ill-conditioned", smallest=1e-5)


def _full_rank(size: Size, spectrum: str, smallest: float) -> Contest:
    first, second = (_features(size, seed, 2 * DIMS[size], smallest) for seed in (0, 1))
    moments = [*_moments(first), *_moments(second)]
    return Contest(
        name=f"frechet_{spectrum.partition('-')[0]}",
        work=f"Frechet distance, d = {DIMS[size]}, full rank, {spectrum} spectrum",
        peer=PEER,
        run_ours=lambda: frechet_distance(*moments),
        run_peer=lambda: _peer(moments),
        check=lambda ours, peer: _agreement(ours, peer, TOLERANCE),
    )


def few(size: Size) -> Contest:
    """The reference by its moments, as it is saved; the few images by their features, from which both must start."""
    images = DIMS[size] // FEW
    reference = _moments(_features(size, 0, 2 * DIMS[size], 0.05))
    features = _features(size, 1, images, 0.05)
    return Contest(
        name="frechet_few",
        work=f"Frechet distance, d = {DIMS[size]}, one side from {images} images",
        peer=PEER,
        run_ours=lambda: gaussian_distance(gaussian_of_features(features), gaussian_of_moments(*reference)),
        run_peer=lambda: _peer([*reference, *_moments(features)]),
        check=lambda ours, peer: _agreement(ours, peer, TOLERANCE_OF_FEW),
    )


PEER = f"pytorch-fid {version('pytorch-fid')} calculate_frechet_distance"


def _agreement(ours: float, peer: float, tolerance: float) -> str:
    apart = abs(ours - peer) / abs(peer)
    assert apart <= tolerance, f"frechet: ours {ours!r}, pytorch-fid {peer!r}"
    return f"relative difference {apart:.1g}"


def _features(size: Size, seed: int, count: int, smallest: float) -> np.ndarray:
    """Directions of spread from 1 to `smallest`, turned in a way of their own for each seed."""
    dims = DIMS[size]
    random = np.random.default_rng(seed)
    rotation = np.linalg.qr(random.normal(size=(dims, dims)))[0]
    return np.asarray(random.normal(0.1 * seed, 1.0, (count, dims)) * np.geomspace(1.0, smallest, dims) @ rotation)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(axis=0), np.cov(features, rowvar=False)


def _peer(moments: Sequence[np.ndarray]) -> float:
    with warnings.catch_warnings():  # SciPy announces the end of an argument that pytorch-fid uses
        warnings.filterwarnings("ignore", message="The `disp` argument", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Matrix is singular", category=LinAlgWarning)
        return float(calculate_frechet_distance(*moments))
