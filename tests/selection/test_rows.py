import errno
import os

import numpy as np
import pytest

from nightseg.selection import rows as stored
from nightseg.selection.evidence import distance_curve, principal_plane, subset_distance
from nightseg.selection.frechet import gaussian_of_features, kernel_distance
from nightseg.selection.limits import near_duplicates
from nightseg.selection.methods import herding_order, influence_scores, mahalanobis_scores, pooled_scores
from nightseg.selection.rows import StoredRows, blocks, parts_of, taken
from nightseg.selection.subset import select_subset
from nightseg.storage import UserError

EPS = float(np.finfo(np.float64).eps)


def in_file(rows: np.ndarray) -> StoredRows:
    return StoredRows.of([rows[:3], rows[3:]], *rows.shape, rows.dtype)


def test_a_file_gives_the_rows_that_an_array_gives() -> None:
    rows = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    found = in_file(rows)
    assert found.shape == rows.shape and len(found) == 10
    assert np.array_equal(found[:], rows) and np.array_equal(found[4:7], rows[4:7])
    assert np.array_equal(found[np.array([7, 0, 7])], rows[[7, 0, 7]]) and found[8:99].shape == (2, 3)
    assert np.array_equal(taken(found, np.array([9, 1]))[:], rows[[9, 1]])
    found[2:4] = np.zeros((2, 3))
    assert np.array_equal(found[1:5], [rows[1], [0, 0, 0], [0, 0, 0], rows[4]])
    assert StoredRows((0, 0), np.float32)[:].shape == (0, 0)


def test_the_file_has_no_name_and_goes_with_the_object() -> None:
    found = in_file(np.ones((10, 3)))
    file = found._file
    assert os.fstat(file).st_nlink == 0
    del found
    with pytest.raises(OSError):
        os.fstat(file)


def test_a_disk_without_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(UserError, match=r"no room for 2\.4e-07 GB of features") as told:
        in_file(np.ones((10, 3)))
    assert "TMPDIR" in str(told.value.cure)


def test_parts_hold_every_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BLOCK_ROWS", 4)
    assert parts_of(9) == [slice(0, 4), slice(4, 8), slice(8, 9)] and parts_of(0) == [slice(0, 0)]
    assert [len(block) for block in blocks(in_file(np.ones((9, 2))))] == [4, 4, 1]


def test_every_pass_over_a_file_finds_what_it_finds_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows: what is summed over them differs by rounding, of which some eps a row is the most. The
    bound of a search is that of whichever tangent it ends with, so only its meaning is compared."""
    rng = np.random.default_rng(1)
    pool, reference = rng.normal(size=(60, 5)), rng.normal(0.3, 1, size=(40, 5))
    near, order = gaussian_of_features(reference), rng.permutation(60)

    def all_of(rows: np.ndarray | StoredRows, others: np.ndarray | StoredRows) -> list[np.ndarray]:
        subset = select_subset(rows, near.mean, near.factor @ near.factor.T, 12)
        assert 0 < subset.lower_bound <= subset.fid
        picked, likeness = herding_order(rows, others, 12)
        return [
            subset.indices,
            picked,
            near_duplicates(rows, 0.9),
            np.array([subset.fid, subset_distance(rows, order[:9], near)]),
            likeness,
            pooled_scores(rows, near),
            mahalanobis_scores(rows, near, 40),
            influence_scores(rows, gaussian_of_features(rows), near),
            np.array(list(distance_curve(rows, order, near, [3, 20, 60]))),
            np.array(kernel_distance(rows, others, rows=10, subsets=3)),
            np.array(principal_plane(rows, others).share),
        ]

    whole = all_of(pool, reference)
    monkeypatch.setattr(stored, "BLOCK_ROWS", 7)
    parts = all_of(in_file(pool), in_file(reference))
    assert (whole[2] >= 0).any()
    for one, other in zip(whole[:3], parts[:3], strict=True):
        assert one.tolist() == other.tolist()
    for one, other in zip(whole[3:], parts[3:], strict=True):
        assert other == pytest.approx(one, rel=60 * 5 * 100 * EPS, abs=60 * 5 * 100 * EPS)
