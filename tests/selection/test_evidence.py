import numpy as np
import pytest

from nightseg.selection.evidence import distance_curve, principal_plane, subset_distance
from nightseg.selection.frechet import gaussian_of_features


def test_the_curve_is_the_distance_of_each_beginning() -> None:
    rng = np.random.default_rng(0)
    pool, reference = rng.normal(size=(40, 6)), gaussian_of_features(rng.normal(size=(50, 6)))
    order = rng.permutation(40)
    counts = [2, 5, 20, 40]  # below and above the number of dimensions
    got = list(distance_curve(pool, order, reference, counts))
    assert got == pytest.approx([subset_distance(pool, order[:count], reference) for count in counts])


def test_the_plane_shows_where_frames_differ() -> None:
    rng = np.random.default_rng(1)
    long = np.zeros((200, 5))
    long[:, 3] = 10 * rng.normal(size=200)
    long[:, 1] = 3 * rng.normal(size=200)
    plane = principal_plane(long[:120], long[120:])
    assert plane.directions[3, 0] == pytest.approx(1, abs=0.01)
    assert plane.directions[1, 1] == pytest.approx(1, abs=0.01)
    assert plane.share[0] > 0.8 and sum(plane.share) == pytest.approx(1)
    assert plane.place(long).shape == (200, 2)
    assert plane.place(plane.mean[None]) == pytest.approx(np.zeros((1, 2)))


def test_a_plane_of_one_dimension_or_one_frame() -> None:
    assert principal_plane(np.arange(4.0)[:, None]).place([[0.0]]).shape == (1, 2)
    assert principal_plane(np.ones((1, 3))).share == (0, 0)
