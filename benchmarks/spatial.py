"""The true Frechet distance of single frames over their positions, against a matrix root for every frame."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
from pytorch_fid.fid_score import calculate_frechet_distance

from benchmarks.contest import Contest, Size
from nightseg.measures.scores import spatial_reference, spatial_scores

DIMS: dict[Size, int] = {"tiny": 16, "default": 512, "full": 2048}
FRAMES: dict[Size, int] = {"tiny": 4, "default": 100, "full": 200}
POSITIONS = 64  # the 8 x 8 of Inception's last map
RANK = 256
TOLERANCE = 1e-2  # relative: directions left out, and a root that is no better for singular products


def contest(size: Size) -> Contest:
    dims, frames = DIMS[size], FRAMES[size]
    random = np.random.default_rng(0)
    weight = np.geomspace(1.0, 0.01, dims)
    everywhere = random.normal(size=(3 * dims, dims)) * weight
    mean, cov = everywhere.mean(axis=0), np.cov(everywhere.T)
    maps = (random.normal(0.2, 1.0, (frames, POSITIONS, dims)) * weight).astype(np.float32)
    reference = spatial_reference(mean, cov, RANK)

    def peer() -> float:
        positions = maps[0].astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the argument that SciPy takes away, and of singular products
            return float(calculate_frechet_distance(positions.mean(axis=0), np.cov(positions.T), mean, cov))

    def check(ours: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]], theirs: float) -> None:
        scores, errors = ours
        apart = scores[0] - theirs
        assert -TOLERANCE * theirs <= apart <= errors[0] + TOLERANCE * theirs, (scores[0], theirs, errors[0])

    return Contest(
        name="spatial",
        work=f"Frechet distance of one frame, {POSITIONS} positions, d = {dims}",
        peer=f"pytorch-fid {version('pytorch-fid')} calculate_frechet_distance, a frame",
        run_ours=lambda: spatial_scores(maps, reference),
        run_peer=peer,
        check=check,
        ours_units=frames,
    )
