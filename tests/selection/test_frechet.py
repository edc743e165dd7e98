import io
import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from nightseg.data.table import vector_column
from nightseg.selection.frechet import (
    FrameSet,
    Moments,
    Statistics,
    assumed,
    check_comparable,
    frechet_distance,
    gaussian_distance,
    gaussian_of_features,
    gaussian_of_moments,
    kernel_distance,
    moments_of,
    moments_of_parts,
    read_statistics,
    sampled_vectors,
    set_distance,
    spatial_reference,
    spatial_scores,
    write_statistics,
)
from nightseg.storage import Location, UserError, Workspace

CLOSE = 1e-9
"""Of a distance, relative. It is a sum of traces and of d <= 128 roots of eigenvalues of covariances of condition
(2 / 0.1)^2 = 400; rounding moves it by d * 400 * eps = 1e-11 of the traces at most, and the solver of roots is taken
for exact at 1e-12 of their sum. The traces are no more than ten times the distance here. The order of sums is free."""

EPS = float(np.finfo(np.float64).eps)


def features(count: int, dims: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, dims)) @ np.diag(np.linspace(0.1, 2, dims)) + shift


def with_sqrtm(mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray) -> float:
    """The textbook form, as pytorch-fid computes it."""
    root = scipy.linalg.sqrtm(cov1 @ cov2)
    return float(np.sum((mean1 - mean2) ** 2) + np.trace(cov1 + cov2) - 2 * np.trace(root).real)


# -- distances with a known answer -----------------------------------------------------------------------------------


def test_shifted_unit_gaussians_of_inception_size_are_as_far_as_their_means() -> None:
    dims = 2048
    assert frechet_distance(np.zeros(dims), np.eye(dims), np.ones(dims), np.eye(dims)) == pytest.approx(2048, rel=CLOSE)


def test_scaled_unit_gaussians() -> None:
    # tr(I + 4 I - 2 (4 I)^1/2) = d (1 + 4 - 4)
    assert frechet_distance(np.zeros(8), np.eye(8), np.zeros(8), 4 * np.eye(8)) == pytest.approx(8)


def test_one_dimension_is_the_difference_of_means_and_of_standard_deviations() -> None:
    assert frechet_distance([1.0], [[9.0]], [5.0], [[4.0]]) == pytest.approx(16 + 1)


def test_the_same_set_is_at_distance_zero() -> None:
    for count in (2, 5, 300):
        rows = features(count, 32)
        assert frechet_distance(rows[0], np.cov(rows.T), rows[0], np.cov(rows.T)) == pytest.approx(0, abs=CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_full_rank_agrees_with_sqrtm(seed: int) -> None:
    a, b = features(400, 64, seed), features(300, 64, seed + 10, shift=0.3)
    sides = a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T)
    assert frechet_distance(*sides) == pytest.approx(with_sqrtm(*sides), rel=CLOSE)
    assert frechet_distance(*sides) == pytest.approx(frechet_distance(*sides[2:], *sides[:2]), rel=CLOSE)


@pytest.mark.parametrize(("count1", "count2"), [(2, 500), (30, 500), (500, 30), (30, 25)])
def test_fewer_frames_than_dimensions_is_exact(count1: int, count2: int) -> None:
    a, b = features(count1, 128, 1), features(count2, 128, 2, shift=0.1)
    # tr (C1 C2)^1/2 is the nuclear norm of the product of the centred features, whatever the rank.
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    nuclear = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    known = np.sum((a.mean(0) - b.mean(0)) ** 2) + sum((x**2).sum() for x in centred) - 2 * nuclear
    from_moments = frechet_distance(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    from_features = gaussian_distance(gaussian_of_features(a), gaussian_of_features(b))
    assert from_moments == pytest.approx(known, rel=CLOSE)
    assert from_features == pytest.approx(known, rel=CLOSE)


def test_constant_features_have_no_spread() -> None:
    constant = gaussian_of_features(np.full((3, 4), 2.0))
    other = features(50, 4, 3)
    mean, cov = other.mean(0), np.cov(other.T)
    assert constant.trace == 0
    assert gaussian_distance(constant, gaussian_of_moments(mean, cov)) == pytest.approx(
        np.sum((2 - mean) ** 2) + np.trace(cov)
    )
    assert frechet_distance(np.full(4, 2.0), np.zeros((4, 4)), np.full(4, 3.0), np.zeros((4, 4))) == pytest.approx(4)


def test_rounding_below_zero_in_a_covariance_is_no_direction() -> None:
    cov = np.diag([1.0, 1e-17, -1e-17])
    assert gaussian_of_moments(np.zeros(3), cov).factor.shape == (3, 1)
    assert frechet_distance(np.zeros(3), cov, np.zeros(3), np.eye(3)) == pytest.approx(1 + 3 - 2)


@given(seed=st.integers(0, 1000), count=st.integers(2, 40), dims=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_never_negative_never_complex_and_symmetric(seed: int, count: int, dims: int) -> None:
    a, b = features(count, dims, seed), features(17, dims, seed + 1)
    there = gaussian_distance(gaussian_of_features(a), gaussian_of_features(b))
    back = gaussian_distance(gaussian_of_features(b), gaussian_of_features(a))
    assert there >= 0
    assert there == pytest.approx(back, rel=CLOSE, abs=CLOSE)


@pytest.mark.parametrize(
    "sides",
    [
        (np.zeros(3), np.eye(3), np.zeros(4), np.eye(4)),
        (np.zeros(3), np.eye(4), np.zeros(3), np.eye(3)),
        (np.zeros(3), np.full((3, 3), np.nan), np.zeros(3), np.eye(3)),
    ],
)
def test_what_cannot_be_a_distance_is_an_error(sides: tuple[np.ndarray, ...]) -> None:
    with pytest.raises(ValueError):
        frechet_distance(*sides)


# -- moments ---------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_numpy() -> None:
    rows = features(500, 20, shift=1000.0).astype(np.float32)
    moments = moments_of(rows)
    assert moments.count == 500
    # A sum of 500 numbers is off by 500 eps at most; entries of the covariance are sums of products of up to 2 x 2 sd.
    np.testing.assert_allclose(moments.mean, rows.astype(np.float64).mean(0), rtol=2 * 500 * EPS)
    np.testing.assert_allclose(moments.cov, np.cov(rows.astype(np.float64).T), rtol=1e-10, atol=4 * 500 * EPS * 4)


@pytest.mark.parametrize("parts", [(1, 499), (250, 250), (3, 400, 97), (0, 500)])
def test_any_sharding_merges_to_the_same_moments(parts: tuple[int, ...]) -> None:
    rows = features(500, 16, shift=50.0)
    ends = list(itertools.accumulate(parts, initial=0))
    total = Moments(16)
    for start, end in itertools.pairwise(ends):
        shard = Moments(16)
        shard.update(rows[start:end])
        total.merge(shard)
    whole = moments_of(rows)
    assert total.count == whole.count
    np.testing.assert_allclose(total.mean, whole.mean, rtol=1e-10)
    np.testing.assert_allclose(total.cov, whole.cov, rtol=1e-10, atol=4 * 500 * EPS * 4)


def test_merging_leaves_the_other_side_alone() -> None:
    one, other = moments_of(features(5, 3)), moments_of(features(7, 3, 1))
    kept = other.mean.copy(), other.scatter.copy()
    one.merge(other)
    one.update(features(9, 3, 2))
    assert np.array_equal(other.mean, kept[0]) and np.array_equal(other.scatter, kept[1])


def test_a_large_mean_does_not_eat_the_covariance() -> None:
    rows = features(200, 4)
    moments = moments_of(rows + 1e8)
    # The shift itself rounds each number by 1e8 eps / 2, times a spread of up to 2 on both sides of a product.
    np.testing.assert_allclose(moments.cov, np.cov(rows.T), rtol=1e-6, atol=2 * 2 * 1e8 * EPS)


def test_one_frame_has_no_covariance() -> None:
    moments = moments_of(features(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        _ = moments.cov
    with pytest.raises(ValueError, match="at least 2"):
        gaussian_of_features(features(1, 3))


def test_features_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        Moments(3).update(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="4 dimensions into 3"):
        Moments(3).merge(Moments(4))


# -- files -----------------------------------------------------------------------------------------------------------


def statistics(dims: int = 3, **changes: object) -> Statistics:
    made = dict(
        mean=np.arange(dims) * 1.0, cov=np.eye(dims), count=10, extractor="x", resize="clean", weights_sha256="ab"
    )
    return Statistics(**(made | changes))  # type: ignore[arg-type]


def test_statistics_survive_the_file_and_pytorch_fid_can_read_it(tmp_path: object) -> None:
    place = Location.of(str(tmp_path)) / "s.npz"
    write_statistics(place, statistics())
    again = read_statistics(place)
    assert (again.count, again.extractor, again.resize, again.weights_sha256) == (10, "x", "clean", "ab")
    with np.load(io.BytesIO(place.read_bytes())) as file:  # as pytorch-fid does
        assert np.array_equal(file["mu"][:], np.arange(3.0)) and np.array_equal(file["sigma"][:], np.eye(3))


def test_the_same_statistics_give_the_same_bytes(tmp_path: object) -> None:
    one, two = Location.of(str(tmp_path)) / "1.npz", Location.of(str(tmp_path)) / "2.npz"
    write_statistics(one, statistics())
    write_statistics(two, statistics())
    assert one.read_bytes() == two.read_bytes()


def test_a_bare_file_can_be_pytorch_fids_own_and_nothing_else(tmp_path: object) -> None:
    place = Location.of(str(tmp_path)) / "fid.npz"
    np.savez_compressed(place.local, mu=np.zeros(2048), sigma=np.eye(2048))
    read = read_statistics(place)
    assert (read.extractor, read.resize, read.count) == ("", "", None)
    theirs = statistics(2048, extractor="inception", resize="pytorch-fid")
    check_comparable(assumed(read, theirs), theirs)
    clean = statistics(2048, extractor="inception", resize="clean")
    assert (assumed(read, clean).extractor, assumed(read, clean).resize) == ("inception", "")
    with pytest.raises(UserError, match=r"resize rule of the first is unknown.*state what is unknown"):
        check_comparable(assumed(read, clean), clean)
    assert assumed(statistics(5, extractor="", resize=""), theirs).extractor == ""


@pytest.mark.parametrize(("mean", "cov"), [("m", "s"), ("mean", "cov"), ("mu", "sigma")])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_other_names_and_float32_are_read(tmp_path: object, mean: str, cov: str, kind: type) -> None:
    place = Location.of(str(tmp_path)) / "a.npz"
    np.savez(place.local, **{mean: np.arange(3, dtype=kind), cov: np.eye(3, dtype=kind)})
    read = read_statistics(place)
    assert read.mean.dtype == read.cov.dtype == np.float64
    assert read.mean.tolist() == [0, 1, 2] and read.cov.tolist() == np.eye(3).tolist()


WRONG = np.diag([1.0, 1.0, 1.0]) + np.array([[0, 0.5, 0], [0, 0, 0], [0, 0, 0]])


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"mu": np.zeros(3), "sigma": WRONG}, "no covariance: values that mirror"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"\(3,\) and \(4, 4\)"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"\(1, 3\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"\(0,\)"),
        ({"mu": np.array([0, np.nan, 0]), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "not finite"),
        ({"mu": np.zeros(3, complex), "sigma": np.eye(3)}, "real numbers, got complex128"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "real numbers"),
        ({"mu": np.array([None, 1]), "sigma": np.eye(2)}, "allow_pickle"),
        ({"mu": np.zeros(3)}, "no sigma, only mu"),
        ({"m": np.zeros(3), "sigma": np.eye(3)}, "no mu, only m, sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "n": 1}, "n, is 1"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "n": 2.5}, "n, is 2.5"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "n": [2, 3]}, "n, is"),
    ],
)
def test_files_that_are_no_statistics_are_refused(tmp_path: object, fields: dict[str, Any], part: str) -> None:
    place = Location.of(str(tmp_path)) / "a.npz"
    np.savez(place.local, **fields)
    with pytest.raises(UserError, match=part):
        read_statistics(place)


def test_a_matrix_that_is_no_covariance_names_its_set() -> None:
    wrong = statistics(3, cov=np.diag([1.0, -1.0, 1.0]))
    with pytest.raises(UserError, match=r"^b\.npz: this is no covariance"):
        set_distance(FrameSet(statistics(3)), FrameSet(wrong), ("a.npz", "b.npz"))


def test_bare_files_of_any_size_compare_with_each_other(tmp_path: object) -> None:
    places = [Location.of(str(tmp_path)) / name for name in ("a.npz", "b.npz")]
    for value, place in enumerate(places):
        np.savez(place.local, mu=np.full(5, float(value)), sigma=np.eye(5))
    a, b = map(read_statistics, places)
    assert set_distance(FrameSet(a), FrameSet(b)).fid == pytest.approx(5)
    with pytest.raises(UserError, match="unknown"):
        check_comparable(a, statistics(5))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"extractor": "inception"}, "extractor of the first is x, of the second inception"),
        ({"resize": "pytorch-fid"}, "resize rule"),
        ({"weights_sha256": "cd"}, "other weights"),
    ],
)
def test_statistics_of_another_making_do_not_compare(changes: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        check_comparable(statistics(), statistics(**changes))
    check_comparable(statistics(), statistics(weights_sha256=""))


def test_damaged_and_foreign_files_are_named(tmp_path: object) -> None:
    folder = Location.of(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        read_statistics(folder / "absent.npz")
    (folder / "text.npz").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"not an \.npz"):
        read_statistics(folder / "text.npz")
    write_statistics(folder / "cut.npz", statistics())
    (folder / "cut.npz").write_bytes((folder / "cut.npz").read_bytes()[:200])
    with pytest.raises(UserError, match=r"cut\.npz"):
        read_statistics(folder / "cut.npz")
    np.savez((folder / "other.npz").local, weights=np.zeros(3))
    with pytest.raises(UserError, match="no mu and no sigma"):
        read_statistics(folder / "other.npz")
    np.savez((folder / "single.npz").local, mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
    with pytest.raises(UserError, match="fewer than 2 frames"):
        read_statistics(folder / "single.npz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.savez((folder / "evil.npz").local, mu=np.array([print], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match=r"evil\.npz"):
        read_statistics(folder / "evil.npz")


@pytest.mark.parametrize("sizes", [[2500], [1, 2499], [1024, 1024, 452], [700, 0, 900, 900], [1000] * 2 + [500]])
def test_the_parts_that_features_come_in_change_no_bit(sizes: list[int]) -> None:
    rows = np.random.default_rng(0).normal(size=(2500, 5)).astype(np.float32)
    parts = np.split(rows, np.cumsum(sizes)[:-1])
    found, whole = moments_of_parts(parts, 5), moments_of(rows)
    assert found.count == 2500
    assert np.array_equal(found.mean, whole.mean) and np.array_equal(found.scatter, whole.scatter)
    np.testing.assert_allclose(found.cov, np.cov(rows.astype(np.float64).T), rtol=0, atol=4 * 2500 * EPS)


def test_what_is_cut_off_of_a_covariance_is_told_and_must_be_small() -> None:
    assert gaussian_of_moments(np.zeros(3), np.diag([4.0, 1.0, -1e-5])).clipped == pytest.approx(1e-5)
    assert gaussian_of_moments(np.zeros(3), np.eye(3)).clipped == 0.0
    with pytest.raises(ValueError, match=r"negative eigenvalues sum to -0\.25"):
        gaussian_of_moments(np.zeros(3), np.diag([4.0, 1.0, -0.25]))


# -- KID ---------------------------------------------------------------------------------------------------------------


def test_kid_of_one_draw_is_the_double_sum() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(6, 3)), rng.normal(1, 1, size=(6, 3))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 3 + 1) ** 3)

    pairs = [(i, j) for i in range(6) for j in range(6) if i != j]
    within = sum(kernel(one[i], one[j]) + kernel(two[i], two[j]) for i, j in pairs) / 30
    across = sum(kernel(x, y) for x in one for y in two) / 36
    got = kernel_distance(one, two, subsets=3)
    assert got.kid == pytest.approx(within - 2 * across)


def test_kid_is_zero_on_average_for_two_halves_of_one_set_whatever_their_size() -> None:
    rng = np.random.default_rng(1)
    found = [kernel_distance(*rng.normal(size=(2, size, 5)), subsets=1).kid for size in (8, 60) for _ in range(150)]
    for part in (found[:150], found[150:]):
        assert abs(np.mean(part)) < 3 * np.std(part) / 150**0.5


def test_kid_sees_a_shift_and_follows_from_the_seed() -> None:
    rng = np.random.default_rng(2)
    one, two = rng.normal(size=(300, 4)), rng.normal(0.7, 1, size=(200, 4))
    got = kernel_distance(one, two, rows=50, seed=3)
    assert got.kid > 5 * got.deviation / 10
    assert got == kernel_distance(one, two, rows=50, seed=3)
    with pytest.raises(ValueError, match="at least 2"):
        kernel_distance(one[:1], two)
    with pytest.raises(ValueError, match="shapes"):
        kernel_distance(one, two[:, :3])


def test_the_deviation_of_small_sets_is_that_of_new_sets_of_their_size() -> None:
    rng = np.random.default_rng(5)
    found = [kernel_distance(*rng.normal(size=(2, 40, 4))) for _ in range(60)]
    true = np.std([one.kid for one in found])
    assert 0.5 * true < np.mean([one.deviation for one in found]) < 2 * true


def test_sets_with_few_vectors_are_as_far_as_by_their_statistics() -> None:
    rows = [features(count, 40, count).astype(np.float32) for count in (7, 9)]
    sets = [
        FrameSet(Statistics(moments.mean, moments.cov, moments.count, "x", "clean", ""), part)
        for part, moments in ((part, moments_of(part)) for part in rows)
    ]
    both, files = set_distance(*sets), set_distance(*(one._replace(features=None) for one in sets))
    assert both.fid == pytest.approx(files.fid, rel=CLOSE) and files.kid is None
    assert both.kid == kernel_distance(*rows).kid


# -- a frame as a distribution over its positions ----------------------------------------------------------------------


def test_spatial_is_the_distance_of_the_positions() -> None:
    rng = np.random.default_rng(0)
    everywhere = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    maps = rng.normal(size=(3, 16, 6))
    mean, cov = everywhere.mean(axis=0), np.cov(everywhere.T)
    # Six dimensions have no more than six of the sixteen singular values; of the others rounding leaves roots of P eps
    # times the largest product of spreads.
    noise = 2 * 16 * (16 * EPS * np.trace(cov) * np.square(maps).sum(axis=(1, 2)).max()) ** 0.5
    got, error = spatial_scores(maps, spatial_reference(mean, cov))
    for positions, score in zip(maps, got, strict=True):
        assert score == pytest.approx(
            frechet_distance(positions.mean(axis=0), np.cov(positions.T), mean, cov), abs=noise
        )
    assert error.tolist() == [0, 0, 0]


def test_spatial_with_fewer_directions_is_larger_by_no_more_than_its_bound() -> None:
    rng = np.random.default_rng(1)
    everywhere = rng.normal(size=(600, 30)) * np.linspace(0.05, 3, 30)
    mean, cov = everywhere.mean(axis=0), np.cov(everywhere.T)
    maps = rng.normal(size=(5, 9, 30))
    exact, _ = spatial_scores(maps, spatial_reference(mean, cov))
    fast, error = spatial_scores(maps, spatial_reference(mean, cov, rank=20))
    assert ((fast >= exact - 1e-6) & (fast <= exact + error)).all()
    assert (error > 0).all()
    with pytest.raises(ValueError, match="P >= 2"):
        spatial_scores(maps[:, :1], spatial_reference(mean, cov))


def test_a_sample_of_committed_vectors_keeps_their_order(tmp_path: Path) -> None:
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    attempt = Workspace(tmp_path).stage("score", "x", version=1, recipe={}, inputs={}, seed=0).open()
    attempt.plan(10, 4)
    for index in range(3):
        part = pa.table({"v": vector_column(rows[4 * index : 4 * index + 4])})
        attempt.write_shard(index, {"t": part, "other": part}, rows_in=part.num_rows, seconds=0.0)
    commit = attempt.finish(rows_in=10, rows_out=10, num_shards=3)
    assert np.array_equal(sampled_vectors(commit, "t", "v", 10)[:], rows)
    some = sampled_vectors(commit, "t", "v", 6)
    assert some.shape == (6, 4) and (np.diff(some[:][:, 0]) > 0).all()
    assert np.array_equal(some[:], sampled_vectors(commit, "t", "v", 6)[:])
    assert sampled_vectors(commit, "nothing", "v", 6).shape == (0, 0)


def test_flipped_bits_of_a_statistics_file_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", mu=np.arange(6.0), sigma=np.eye(6))
    whole = (tmp_path / "a.npz").read_bytes()
    for bit in range(0, 8 * len(whole), 11):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / "b.npz").write_bytes(bytes(data))
        try:
            found = read_statistics(Location.of(tmp_path / "b.npz"))
        except UserError:
            continue
        assert np.array_equal(found.mean, np.arange(6.0)) and np.array_equal(found.cov, np.eye(6))
