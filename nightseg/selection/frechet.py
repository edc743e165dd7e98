"""FID and KID: distances between two sets of feature vectors, and the statistics they need.

    d^2 = |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^1/2        (Heusel et al., 2017, arXiv 1706.08500, eq. 6)

Everything is float64. The last trace is computed in a symmetric form: with any factors C1 = R1 R1^T and C2 = R2 R2^T it
is the sum of the singular values of R1^T R2. That is exact for singular covariances, which have factors with few
columns; it is never complex; and its rounding error is relative to the largest singular value. The rejected ways:
`sqrtm(C1 @ C2)` is several times slower, returns complex numbers for fewer frames than dimensions, and needs an epsilon
on the diagonal that changes the result; eigenvalues of C1 @ C2 turn a rounding error e into sqrt(e). pytorch-fid and
torchmetrics go one of the rejected ways, and neither merges the moments of shards.

KID (Binkowski et al., 2018, arXiv 1801.01401, section 4), unlike FID, is right on average for small sets. Its kernel is

    k(x, y) = (x . y / d + 1)^3

N rows of one set, M of the other, d dimensions, P positions of a feature map.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.data.table import vectors
from nightseg.errors import UserError
from nightseg.selection.rows import BLOCK_ROWS, Rows, StoredRows, as_rows, blocks
from nightseg.storage import Commit, Location
from nightseg.storage.commits import table_paths

Array = npt.NDArray[np.float64]

_EXACT_ENOUGH = 1e-12  # of the sum of singular values
_ASYMMETRIC_AT_MOST = 1e-4  # of the largest value; sums in float32 reach 1e-6
_CLIPPED_AT_MOST = 1e-4  # of the trace; covariances summed up in float32 reach 1e-6

STATISTICS_NAME: Final = "statistics.npz"
FEATURES: Final = "features"
"""Where the stage `score` leaves statistics and features: a file, and a column of the table of the same name."""

_KID_DRAWS: Final = 100
_KID_ROWS: Final = 1000  # of a draw: what the paper and the common tools use; fewer where a set has fewer
_MOST_ROWS: Final = 20_000  # from which KID draws

PYTORCH_FID_DIMS = 2048
"""Statistics with this many dimensions may be pytorch-fid's own."""


class Moments:
    """Number, mean and covariance of feature vectors that arrive in parts and may be merged; float64.

    Holds the mean and the sum of outer products of deviations from it (Chan et al., 1979), not raw sums: those lose all
    digits when the mean is large against the spread. Memory: d * d * 8 bytes, whatever the number of vectors.
    """

    def __init__(self, dims: int) -> None:
        self.count = 0
        self.mean: Array = np.zeros(dims)
        self.scatter: Array = np.zeros((dims, dims))

    def update(self, features: npt.ArrayLike) -> None:
        """Add the rows of an (N, d) array of any real type."""
        rows_ND = np.asarray(features, dtype=np.float64)
        if rows_ND.ndim != 2 or rows_ND.shape[1] != len(self.mean):
            raise ValueError(f"expected features of shape (N, {len(self.mean)}), got {rows_ND.shape}")
        if len(rows_ND) == 0:
            return
        mean = rows_ND.mean(axis=0)
        centred_ND = rows_ND - mean
        self._add(len(rows_ND), mean, centred_ND.T @ centred_ND)

    def merge(self, other: Moments) -> None:
        """Add everything that `other` has seen; `other` stays as it is."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"cannot merge moments of {len(other.mean)} dimensions into {len(self.mean)}")
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    @property
    def cov(self) -> Array:
        """Covariance (d, d) with divisor n - 1, as numpy.cov and pytorch-fid; raises ValueError for n < 2."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 feature vectors, there are {self.count}")
        return self.scatter / (self.count - 1)

    def _add(self, count: int, mean: Array, scatter: Array) -> None:
        total = self.count + count
        shift = mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(shift, shift * (self.count * count / total))
        self.mean += shift * (count / total)
        self.count = total


def moments_of(features: npt.ArrayLike | StoredRows) -> Moments:
    """Moments of the rows of an (N, d) array."""
    rows_ND = as_rows(features)
    return moments_of_parts(blocks(rows_ND), rows_ND.shape[1])


def moments_of_parts(parts: Iterable[npt.NDArray[Any]], dims: int) -> Moments:
    """Moments of rows that come in arrays (n, d), one in memory at a time.

    Added in blocks of `BLOCK_ROWS` whatever the parts: the same rows in the same order give the same bits.
    """
    moments = Moments(dims)
    open_block: list[npt.NDArray[Any]] = []
    held = 0
    for part_nD in parts:
        start = 0
        while len(part_nD) - start >= BLOCK_ROWS - held:
            end = start + BLOCK_ROWS - held
            moments.update(np.concatenate([*open_block, part_nD[start:end]]))
            open_block, held, start = [], 0, end
        open_block.append(part_nD[start:].copy())
        held += len(part_nD) - start
    if held:
        moments.update(np.concatenate(open_block))
    return moments


class Gaussian(NamedTuple):
    """A normal distribution by its mean (d,) and a factor (d, r) of its covariance: cov = factor @ factor.T."""

    mean: Array
    factor: Array
    clipped: float = 0.0  # sum of the negative eigenvalues that were cut off: rounding error, or no covariance at all

    @property
    def trace(self) -> float:
        return float(np.sum(self.factor**2))


def gaussian_of_features(features: npt.ArrayLike | StoredRows) -> Gaussian:
    """The normal distribution of at least 2 rows of an (N, d) array; no d x d matrix is made when N <= d."""
    rows_ND = as_rows(features)
    if len(rows_ND) < 2:
        raise ValueError(f"a covariance needs at least 2 feature vectors, there are {len(rows_ND)}")
    if len(rows_ND) > rows_ND.shape[1]:
        moments = moments_of(rows_ND)
        return gaussian_of_moments(moments.mean, moments.cov)
    few_ND = np.asarray(rows_ND[:], dtype=np.float64)
    mean = few_ND.mean(axis=0)
    return Gaussian(mean, (few_ND - mean).T / np.sqrt(len(few_ND) - 1))


def gaussian_of_moments(mean: npt.ArrayLike, cov: npt.ArrayLike) -> Gaussian:
    """The normal distribution of a mean (d,) and a covariance (d, d).

    The factor has one column for each eigenvalue above d * eps * the largest, numpy's rule for the rank of a matrix:
    what lies below is rounding error, also where it is negative.
    """
    import torch  # the solvers of its MKL are several times faster here than scipy's, and it is installed anyway

    mean_D, cov_DD = _checked(mean, cov)
    matrix = torch.from_numpy(cov_DD)
    tolerance = len(mean_D) * np.finfo(np.float64).eps * float(np.trace(cov_DD))
    cholesky, failed = torch.linalg.cholesky_ex(matrix)
    # A pivot close to zero means a rank that rounding decides; the eigenvalues then say which columns are real.
    if not int(failed) and float(cholesky.diagonal().min()) ** 2 > tolerance:
        return Gaussian(mean_D, cholesky.numpy())
    values_D, vectors_DD = torch.linalg.eigh(matrix)
    kept = values_D > len(mean_D) * np.finfo(np.float64).eps * max(float(values_D[-1]), 0.0)
    clipped = float(-values_D.clamp(max=0.0).sum())
    if clipped > _CLIPPED_AT_MOST * float(values_D.clamp(min=0.0).sum()):
        raise ValueError(
            f"this is no covariance: its negative eigenvalues sum to {-clipped:g}, far beyond rounding error"
        )
    return Gaussian(mean_D, (vectors_DD[:, kept] * values_D[kept].sqrt()).numpy(), clipped)


def gaussian_distance(first: Gaussian, second: Gaussian) -> float:
    """Squared Frechet distance, >= 0. Costs O(d r1 r2) and the singular values of an r1 x r2 matrix."""
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of {len(first.mean)} and of {len(second.mean)} dimensions do not compare")
    shift = float(np.sum((first.mean - second.mean) ** 2))
    overlap = _sum_of_singular_values(first.factor.T @ second.factor)
    # The distance of a set to itself is zero but for rounding, which may fall below.
    return max(shift + first.trace + second.trace - 2.0 * overlap, 0.0)


def _sum_of_singular_values(matrix: Array) -> float:
    """Roots of the eigenvalues of M M^T, three times as fast as a singular value solver, where that is exact enough.

    A rounding error e of an eigenvalue moves its root by e / (2 root): nothing for large ones, sqrt(e) at zero.
    """
    import torch

    if matrix.size == 0 or not matrix.any():
        return 0.0
    wide = torch.from_numpy(matrix if matrix.shape[0] <= matrix.shape[1] else np.ascontiguousarray(matrix.T))
    values = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0.0)
    roots = values.sqrt()
    noise = 10 * np.finfo(np.float64).eps * float(values[-1])
    error = (noise / (2 * roots)).clamp(max=noise**0.5).sum()
    if float(error) <= _EXACT_ENOUGH * float(roots.sum()):
        return float(roots.sum())
    return float(torch.linalg.svdvals(wide).sum())


def frechet_distance(mean1: npt.ArrayLike, cov1: npt.ArrayLike, mean2: npt.ArrayLike, cov2: npt.ArrayLike) -> float:
    """Squared Frechet distance between N(mean1, cov1) and N(mean2, cov2), in float64: the FID of two feature sets.

    Means have shape (d,), covariances (d, d), symmetric and positive semi-definite but for rounding; singular ones are
    fine. Raises ValueError for other shapes and for values that are not finite.
    """
    return gaussian_distance(gaussian_of_moments(mean1, cov1), gaussian_of_moments(mean2, cov2))


def _checked(mean: npt.ArrayLike, cov: npt.ArrayLike) -> tuple[Array, Array]:
    if any(np.asarray(one).dtype.kind not in "fiu" for one in (mean, cov)):
        raise ValueError(f"expected real numbers, got {np.asarray(mean).dtype} and {np.asarray(cov).dtype}")
    mean_D = np.ascontiguousarray(mean, dtype=np.float64)
    cov_DD = np.ascontiguousarray(cov, dtype=np.float64)
    if mean_D.ndim != 1 or not len(mean_D) or cov_DD.shape != (len(mean_D), len(mean_D)):
        raise ValueError(f"expected a mean (d,) and a covariance (d, d), got {mean_D.shape} and {cov_DD.shape}")
    if not (np.isfinite(mean_D).all() and np.isfinite(cov_DD).all()):
        raise ValueError("mean or covariance hold values that are not finite: were there fewer than 2 frames?")
    apart = float(np.abs(cov_DD - cov_DD.T).max())
    if apart > _ASYMMETRIC_AT_MOST * float(np.abs(cov_DD).max()):
        raise ValueError(f"this is no covariance: values that mirror each other differ by up to {apart:g}")
    return mean_D, np.ascontiguousarray((cov_DD + cov_DD.T) / 2)


# -- statistics files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a set of frames, and what made them; only statistics of the same making compare."""

    mean: Array  # (d,)
    cov: Array  # (d, d), divisor n - 1
    count: int | None  # frames; None = the file does not say
    extractor: str  # "" = the file does not say
    resize: str  # how frames were resized before the network: a part of the metric
    weights_sha256: str  # "" = the file does not say
    precision: str = ""  # of the network's arithmetic; a note, not a difference


_NAMES: Final = (("mu", "sigma"), ("m", "s"), ("mean", "cov"))
_ORIGIN: Final = ("extractor", "resize", "weights_sha256", "precision")  # fields, and arrays of the file


def write_statistics(place: Location, statistics: Statistics) -> None:
    """An `.npz` that pytorch-fid reads too: its `mu` and `sigma`, and beside them our fields. Same content, same bytes.

    Statistics of several sets merge exactly from `n`, `mu` and `sigma`.
    """
    fields: dict[str, Any] = {
        "mu": np.asarray(statistics.mean, dtype=np.float64),
        "sigma": np.asarray(statistics.cov, dtype=np.float64),
        **{name: getattr(statistics, name) for name in _ORIGIN},
    }
    if statistics.count is not None:
        fields["n"] = np.int64(statistics.count)
    buffer = io.BytesIO()
    np.savez(buffer, **fields)
    place.write_bytes(buffer.getvalue())


_BAD_ARCHIVE: Final = (zipfile.BadZipFile, zlib.error, SyntaxError, TypeError)  # the last two: of numpy's headers


def read_statistics(place: Location) -> Statistics:
    """Statistics from our `.npz` or from another's: `mu` and `sigma` (pytorch-fid), `m` and `s`, or `mean` and `cov`.

    What a file does not say stays unknown; see `assumed`. Pickled objects are refused. Raises UserError: no such file,
    damaged, no mean and covariance in it.
    """
    try:
        with np.load(io.BytesIO(place.read_bytes()), allow_pickle=False) as file:
            fields = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{place}: there is no such file of statistics", cure="check the path") from None
    except (ValueError, OSError, EOFError, LookupError, AttributeError, RuntimeError, *_BAD_ARCHIVE) as error:
        raise UserError(
            f"{place}: not an .npz file of statistics, or a damaged one ({error})", cure="make it again"
        ) from error
    named = next((pair for pair in _NAMES if all(name in fields for name in pair)), None)
    if named is None:
        missing = [name for name in _NAMES[0] if name not in fields]
        held = ", ".join(sorted(fields)) or "nothing"
        raise UserError(
            f"{place}: it has no {' and no '.join(missing)}, only {held}", cure="name a file of FID statistics"
        )
    count = fields.get("n", np.int64(0))
    try:
        mean, cov = _checked(*(fields[name] for name in named))
        if count.ndim or count.dtype.kind not in "iu" or ("n" in fields and count < 2):
            raise ValueError(f"its number of frames, n, is {count}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{place}: {error}", cure="make the file again") from error
    origin = {name: str(fields.get(name, "")) for name in _ORIGIN}
    return Statistics(mean, cov, int(count) or None, **origin)


def assumed(one: Statistics, other: Statistics) -> Statistics:
    """`one` with what its file does not say, where the other's is pytorch-fid's way and `one` can be of it.

    Its files are the bare ones that are handed around: 2048 dimensions, Inception, its own resize rule. Whoever assumes
    so says it.
    """
    if len(one.mean) != PYTORCH_FID_DIMS:
        return one
    usual: dict[str, Any] = {"extractor": "inception", "resize": "pytorch-fid"}
    return replace(
        one, **{key: word for key, word in usual.items() if not getattr(one, key) and getattr(other, key) == word}
    )


def check_comparable(first: Statistics, second: Statistics, names: Sequence[str] = ("the first", "the second")) -> None:
    """Raise UserError if a distance between the two would be a number without meaning."""
    differences = [
        f"{what} of {names[0]} is {mine or 'unknown'}, of {names[1]} {theirs or 'unknown'}"
        for what, mine, theirs in (
            ("the number of dimensions", str(len(first.mean)), str(len(second.mean))),
            ("the extractor", first.extractor, second.extractor),
            ("the resize rule", first.resize, second.resize),
        )
        if mine != theirs
    ]
    hashes = first.weights_sha256, second.weights_sha256
    if all(hashes) and hashes[0] != hashes[1]:
        differences.append(f"the network of {names[0]} has other weights than that of {names[1]}")
    if differences:
        raise UserError(
            f"{names[0]} and {names[1]}: these statistics do not compare: {'; '.join(differences)}",
            cure="compute both with the same extractor, weights and resize rule"
            + ("; or state what is unknown, if you know it" if "unknown" in "".join(differences) else ""),
        )


# -- KID ---------------------------------------------------------------------------------------------------------------


class KernelDistance(NamedTuple):
    """Unbiased squared maximum mean discrepancy: mean and standard deviation over the draws. May be below zero."""

    kid: float
    deviation: float


def kernel_distance(
    first: npt.ArrayLike | StoredRows,
    second: npt.ArrayLike | StoredRows,
    *,
    subsets: int = _KID_DRAWS,
    rows: int = _KID_ROWS,
    seed: int = 0,
) -> KernelDistance:
    """KID between two feature sets (N, d) and (M, d), each of at least 2 rows; draws follow from `seed`.

    Sets of up to `rows` are taken whole, once; their draws, of half as many rows, only say how far KID would spread.
    """
    one_ND, two_MD = as_rows(first), as_rows(second)
    if len(one_ND.shape) != 2 or len(two_MD.shape) != 2 or one_ND.shape[1] != two_MD.shape[1]:
        raise ValueError(f"expected features of shapes (N, d) and (M, d), got {one_ND.shape} and {two_MD.shape}")
    smaller = min(len(one_ND), len(two_MD))
    if smaller < 2:
        raise ValueError("a kernel distance needs at least 2 feature vectors of each set")
    whole = max(len(one_ND), len(two_MD)) <= rows
    size = max(2, smaller // 2) if whole else min(rows, smaller)
    generator = np.random.default_rng(seed)
    drawn = []
    for _ in range(subsets):
        mine = one_ND[generator.choice(len(one_ND), size, replace=False)].astype(np.float64)
        theirs = two_MD[generator.choice(len(two_MD), size, replace=False)].astype(np.float64)
        drawn.append(_unbiased(mine, theirs))
    deviation = float(np.std(drawn))
    if not whole:
        return KernelDistance(float(np.mean(drawn)), deviation)
    # A draw of half a set without replacement spreads about as much as independent sets of the whole size do.
    return KernelDistance(_unbiased(*(rows[:].astype(np.float64) for rows in (one_ND, two_MD))), deviation)


def _unbiased(one_ND: Array, two_ND: Array) -> float:
    """Pairs of a row with itself are left out: they are what biases the plain estimate."""
    within = sum(
        (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))
        for kernel in (_cubic_kernel(one_ND, one_ND), _cubic_kernel(two_ND, two_ND))
    )
    return float(within - 2 * _cubic_kernel(one_ND, two_ND).mean())


def _cubic_kernel(one_ND: Array, two_MD: Array) -> Array:
    """The cubic kernel between all rows: (N, M)."""
    kernel: Array = (one_ND @ two_MD.T / one_ND.shape[1] + 1) ** 3
    return kernel


# -- sets of frames --------------------------------------------------------------------------------------------------


class FrameSet(NamedTuple):
    """A set of frames by its statistics and, where they are at hand, its feature vectors (N, d)."""

    statistics: Statistics
    features: Rows | None = None

    @classmethod
    def of(cls, scored: Commit) -> FrameSet:
        """What the stage `score` committed; of very many frames an even draw of the vectors.

        Raises UserError if fewer than 2 frames could be read.
        """
        if not scored.has(STATISTICS_NAME):
            raise UserError(
                f"{scored.name}: {scored.rows_out} of its {scored.rows_in} frames could be read, and a distance needs"
                " at least 2",
                cure="a set of more frames; bad ones have their reasons in its quarantine table",
            )
        vectors_Nd = sampled_vectors(scored, FEATURES, FEATURES, _MOST_ROWS)
        return cls(read_statistics(scored.file(STATISTICS_NAME)), vectors_Nd)

    def gaussian(self) -> Gaussian:
        """Few vectors are a thin factor of their covariance; a d x d matrix would be large, singular and slow."""
        if self.features is not None and len(self.features) <= self.features.shape[1]:
            return gaussian_of_features(self.features)
        return gaussian_of_moments(self.statistics.mean, self.statistics.cov)


def sampled_vectors(commit: Commit, table: str, column: str, most: int) -> StoredRows:
    """float32 (N, d): the vectors of a committed table, of more than `most` rows an even draw; read part by part."""
    paths = table_paths(commit.outputs, table)
    size = sum(output.rows or 0 for output in commit.outputs if output.path in paths)
    wanted = np.sort(np.random.default_rng(0).choice(size, min(size, most), replace=False))
    rows, start, held = StoredRows((0, 0), np.float32), 0, 0
    for path in paths:
        part = vectors((commit.folder / path).read_table()[column])
        mine = wanted[(wanted >= start) & (wanted < start + len(part))] - start
        if len(mine):
            rows = rows if len(rows) else StoredRows((len(wanted), part.shape[1]), np.float32)
            rows[held : held + len(mine)] = part[mine]
        start, held = start + len(part), held + len(mine)
    return rows


class SetDistance(NamedTuple):
    """FID, and KID where both sets have their feature vectors."""

    fid: float
    kid: float | None = None
    kid_deviation: float | None = None  # standard deviation over its draws


def set_distance(first: FrameSet, second: FrameSet, names: Sequence[str] = ("A", "B")) -> SetDistance:
    """The distances of two sets of frames; raises UserError if they do not compare."""
    check_comparable(first.statistics, second.statistics, names)
    gaussians = []
    for one, name in zip((first, second), names, strict=True):
        try:
            gaussians.append(one.gaussian())
        except ValueError as error:
            raise UserError(f"{name}: {error}", cure="make its statistics again from the frames") from error
    fid = gaussian_distance(*gaussians)
    if first.features is None or second.features is None:
        return SetDistance(fid)
    return SetDistance(fid, *kernel_distance(first.features, second.features))


# -- a frame as a distribution over its positions ----------------------------------------------------------------------


class SpatialReference(NamedTuple):
    """Per-position statistics of the reference frames, their covariance by its largest directions only.

    `tail` is the largest eigenvalue left out: what is missing in a distance is at most 2 sqrt(P tail) times the root
    of the trace of the frame's own covariance.
    """

    mean: Array  # (d,)
    root: Array  # (d, rank)
    trace: float  # of the whole covariance
    tail: float


def spatial_reference(mean: npt.ArrayLike, cov: npt.ArrayLike, rank: int = 256) -> SpatialReference:
    """The reference from mean (d,) and covariance (d, d) over all positions of all its frames."""
    import torch

    mean_D, cov_DD = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    values, vectors = torch.linalg.eigh(torch.from_numpy(cov_DD))
    values = values.clamp(min=0)
    first = max(len(values) - rank, 0)
    root = (vectors[:, first:] * values[first:].sqrt()).numpy()
    return SpatialReference(mean_D, root, float(np.trace(cov_DD)), float(values[first - 1]) if first else 0.0)


def spatial_scores(maps_NPd: npt.ArrayLike, reference: SpatialReference) -> tuple[Array, Array]:
    """Squared Frechet distance of each frame's positions (N, P, d), P >= 2, to the reference, and its error bound (N,).

    With Z the centred positions divided by sqrt(P - 1) the cross term is the sum of the singular values of Z root,
    found from P x P matrices: no d x d object is made for a frame. Leaving out directions makes that sum smaller and
    the distance larger, by no more than the bound.
    """
    import torch

    maps = np.asarray(maps_NPd)
    if maps.ndim != 3 or maps.shape[2] != len(reference.mean) or maps.shape[1] < 2:
        raise ValueError(f"expected maps (N, P >= 2, {len(reference.mean)}), got {tuple(maps.shape)}")
    num_frames, num_positions, dims = maps.shape
    root = torch.from_numpy(reference.root)
    means = torch.empty(num_frames, dims, dtype=torch.float64)
    traces = torch.empty(num_frames, dtype=torch.float64)
    seen = torch.empty(num_frames, num_positions, num_positions, dtype=torch.float64)
    # A frame at a time through a buffer that stays in the cache: over all at once, half of the time goes to memory.
    centred_Pd = torch.empty(num_positions, dims, dtype=torch.float64)
    for frame in range(num_frames):
        np.copyto(centred_Pd.numpy(), maps[frame])
        torch.mean(centred_Pd, dim=0, out=means[frame])
        centred_Pd.sub_(means[frame])
        traces[frame] = torch.linalg.vector_norm(centred_Pd) ** 2
        projected = centred_Pd @ root
        torch.mm(projected, projected.T, out=seen[frame])
    traces /= num_positions - 1
    values = torch.linalg.eigvalsh(seen / (num_positions - 1)).clamp(min=0)
    shifts = (means - torch.from_numpy(reference.mean)).square().sum(dim=1)
    distances = shifts + traces + reference.trace - 2 * values.sqrt().sum(dim=1)
    error = 2 * (num_positions * reference.tail * traces).sqrt()
    return distances.clamp(min=0).numpy(), error.numpy()
