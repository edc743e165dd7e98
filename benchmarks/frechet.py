"""Frechet distance of two full-rank normal distributions: nightseg against pytorch-fid, which takes a matrix root."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import numpy as np
from pytorch_fid.fid_score import calculate_frechet_distance

from benchmarks.contest import Contest, Size
from nightseg.measures.frechet import frechet_distance

DIMS: dict[Size, int] = {"tiny": 16, "default": 512, "full": 2048}  # 2048 is Inception's
TOLERANCE = 1e-6  # relative; the root of a product of matrices is good to about 1e-8 here


def contest(size: Size) -> Contest:
    dims = DIMS[size]
    random = np.random.default_rng(0)
    moments = []
    for shift in (0.0, 0.1):
        # Directions of very different weight, as features have them; twice as many samples as dimensions.
        features = random.normal(shift, 1.0, (2 * dims, dims)) * np.geomspace(1.0, 0.05, dims) @ _rotation(random, dims)
        moments += [features.mean(axis=0), np.cov(features, rowvar=False)]

    def check(ours: float, peer: float) -> None:
        assert abs(ours - peer) <= TOLERANCE * abs(peer), f"frechet: ours {ours!r}, pytorch-fid {peer!r}"

    return Contest(
        name="frechet",
        work=f"Frechet distance, d = {dims}, full rank",
        peer=f"pytorch-fid {version('pytorch-fid')} calculate_frechet_distance",
        run_ours=lambda: frechet_distance(*moments),
        run_peer=lambda: _peer(moments),
        check=check,
    )


def _peer(moments: list[np.ndarray]) -> float:
    with warnings.catch_warnings():  # SciPy announces the end of an argument that pytorch-fid uses
        warnings.filterwarnings("ignore", message="The `disp` argument", category=DeprecationWarning)
        return float(calculate_frechet_distance(*moments))


def _rotation(random: np.random.Generator, dims: int) -> np.ndarray:
    return np.linalg.qr(random.normal(size=(dims, dims)))[0]
