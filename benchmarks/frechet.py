"""Frechet distance of two normal distributions, full rank or from few images: nightseg against pytorch-fid."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import numpy as np
from pytorch_fid.fid_score import calculate_frechet_distance
from scipy.linalg import LinAlgWarning

from benchmarks.contest import Contest, Size
from nightseg.measures.frechet import frechet_distance, gaussian_distance, gaussian_of_features, gaussian_of_moments

DIMS: dict[Size, int] = {"tiny": 16, "default": 512, "full": 2048}  # 2048 is Inception's
TOLERANCE = 1e-6  # relative; the root of a product of matrices is good to about 1e-8 here


FEW = 8  # one side has so many times fewer images than dimensions: 256 at Inception's


def contest(size: Size) -> Contest:
    return _contest("frechet", size, "full rank", [2 * DIMS[size]] * 2, TOLERANCE)


def few(size: Size) -> Contest:
    """Moments of the one side come as they are saved; those of the few images by their features, as selections use."""
    images = DIMS[size] // FEW
    # The root of a singular product is only good to about the square root of the precision.
    return _contest("frechet_few", size, f"one side from {images} images", [2 * DIMS[size], images], 1e-3)


def _contest(name: str, size: Size, words: str, counts: list[int], tolerance: float) -> Contest:
    dims = DIMS[size]
    random = np.random.default_rng(0)
    moments, sets = [], []
    for shift, count in zip((0.0, 0.1), counts, strict=True):
        # Directions of very different weight, as features have them.
        features = random.normal(shift, 1.0, (count, dims)) * np.geomspace(1.0, 0.05, dims) @ _rotation(random, dims)
        sets.append(features)
        moments += [features.mean(axis=0), np.cov(features, rowvar=False)]
    reference = gaussian_of_moments(*moments[:2])

    def ours() -> float:
        if counts[1] > dims:
            return frechet_distance(*moments)
        return gaussian_distance(reference, gaussian_of_features(sets[1]))

    def check(ours: float, peer: float) -> None:
        assert abs(ours - peer) <= tolerance * abs(peer), f"frechet: ours {ours!r}, pytorch-fid {peer!r}"

    return Contest(
        name=name,
        work=f"Frechet distance, d = {dims}, {words}",
        peer=f"pytorch-fid {version('pytorch-fid')} calculate_frechet_distance",
        run_ours=ours,
        run_peer=lambda: _peer(moments),
        check=check,
    )


def _peer(moments: list[np.ndarray]) -> float:
    with warnings.catch_warnings():  # SciPy announces the end of an argument that pytorch-fid uses
        warnings.filterwarnings("ignore", message="The `disp` argument", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Matrix is singular", category=LinAlgWarning)
        return float(calculate_frechet_distance(*moments))


def _rotation(random: np.random.Generator, dims: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(dims, dims)))[0]
