"""The true Frechet distance of single frames over their positions, against a matrix root for every frame."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import numpy as np
import numpy.typing as npt
from pytorch_fid.fid_score import calculate_frechet_distance

from benchmarks.contest import Contest, Size
from benchmarks.extraction import inception_extractor
from nightseg.data.scenes import scene
from nightseg.selection.frechet import spatial_reference, spatial_scores

DIMS: dict[Size, int] = {"tiny": 16, "default": 512, "full": 2048}
FRAMES: dict[Size, int] = {"tiny": 4, "default": 100, "full": 200}
FRAMES_OF_SHARE: dict[Size, int] = {"tiny": 2, "default": 16, "full": 64}
POSITIONS = 64  # the 8 x 8 of Inception's last map
RANK = 256
TOLERANCE = 1e-2  # relative: directions left out, and a root that is no better for singular products


def contest(size: Size) -> Contest:
    dims, frames = DIMS[size], FRAMES[size]
    mean, cov, maps = _data(dims, frames)
    reference = spatial_reference(mean, cov, RANK)

    def peer() -> float:
        positions = maps[0].astype(np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the argument that SciPy takes away, and of singular products
            return float(calculate_frechet_distance(positions.mean(axis=0), np.cov(positions.T), mean, cov))

    def check(ours: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]], theirs: float) -> str:
        scores, errors = ours
        apart = scores[0] - theirs
        assert -TOLERANCE * theirs <= apart <= errors[0] + TOLERANCE * theirs, (scores[0], theirs, errors[0])
        return f"relative difference {apart / theirs:.1g}, of which at most {errors[0] / theirs:.1g} by our own bound"

    return Contest(
        name="spatial",
        work=f"Frechet distance of one frame, {POSITIONS} positions, d = {dims}",
        peer=f"pytorch-fid {version('pytorch-fid')} calculate_frechet_distance, a frame",
        run_ours=lambda: spatial_scores(maps, reference),
        run_peer=peer,
        check=check,
        ours_units=frames,
    )


def share_of_extraction(size: Size) -> Contest:
    """What the score adds to the pass that makes the feature maps: its time against theirs."""
    extractor = inception_extractor(size)
    frames = FRAMES_OF_SHARE[size]
    mean, cov, _ = _data(extractor.dims, 1)
    reference = spatial_reference(mean, cov, RANK)
    images = [np.asarray(scene(0, index, "day", 288, 512)[0]) for index in range(frames)]
    _, maps = extractor.with_positions(images)

    def check(ours: tuple[npt.NDArray[np.float64], ...], theirs: tuple[npt.NDArray[np.float32], ...]) -> str:
        assert len(ours[0]) == len(theirs[1]) and np.isfinite(ours[0]).all()
        return "no answers to compare"

    return Contest(
        name="spatial_share",
        work=f"Frechet distance of one frame, {POSITIONS} positions, d = {extractor.dims}",
        peer="nightseg's own extraction of the frame's feature map, Inception, exact mode",
        run_ours=lambda: spatial_scores(maps, reference),
        run_peer=lambda: extractor.with_positions(images),
        check=check,
        ours_units=frames,
        peer_units=frames,
    )


def _data(dims: int, frames: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float32]]:
    """Mean and covariance of a reference, and feature maps of frames."""
    random = np.random.default_rng(0)
    weight = np.geomspace(1.0, 0.01, dims)
    everywhere = random.normal(size=(3 * dims, dims)) * weight
    maps = (random.normal(0.2, 1.0, (frames, POSITIONS, dims)) * weight).astype(np.float32)
    return everywhere.mean(axis=0), np.cov(everywhere.T), maps
