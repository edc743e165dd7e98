"""Vectors of a pool, one a frame, more than memory should hold: in a file, of which a few rows are read at a time.

Their number decides neither the memory nor the results of a selection: who works on all of them goes block by block.
"""

from __future__ import annotations

import errno
import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from nightseg.errors import UserError

BLOCK_ROWS: Final = 1024
"""Rows that are worked on at a time. Fixed: sums over them do not depend on how they arrived, in their last bits."""


class StoredRows:
    """An (N, d) array in a file without a name, which is gone with the object, or with the process if that is killed.

    Indexed by a slice without a step or by an array of row numbers, it gives these rows as an array in memory.
    Raises UserError where the disk of temporary files is full.
    """

    def __init__(self, shape: tuple[int, int], dtype: npt.DTypeLike) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype)
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (open as long as the object)
        self._file = file.fileno()
        weakref.finalize(self, file.close)

    @classmethod
    def of(cls, parts: Iterable[npt.NDArray[Any]], count: int, dims: int, dtype: npt.DTypeLike) -> StoredRows:
        """`count` rows that come in arrays (n, dims), one in memory at a time."""
        rows, start = cls((count, dims), dtype), 0
        for part in parts:
            rows[start : start + len(part)] = part
            start += len(part)
        assert start == count, (start, count)
        return rows

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        if isinstance(rows, slice):
            start, stop = self._range(rows)
            found = np.empty((stop - start, self.shape[1]), self.dtype)
            self._read(found, start)
            return found
        found = np.empty((len(rows), self.shape[1]), self.dtype)
        for place, row in enumerate(rows.tolist()):
            assert 0 <= row < len(self), (row, len(self))
            self._read(found[place], row)
        return found

    def __setitem__(self, rows: slice, values: npt.NDArray[Any]) -> None:
        start, stop = self._range(rows)
        data = np.ascontiguousarray(values, self.dtype)
        assert data.shape == (stop - start, self.shape[1]), (data.shape, rows, self.shape)
        left, place = (data.data.cast("B") if data.size else memoryview(b"")), start * self._row_bytes
        try:
            while left:
                written = os.pwrite(self._file, left, place)
                left, place = left[written:], place + written
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            size = len(self) * self._row_bytes / 1e9
            raise UserError(
                f"{tempfile.gettempdir()}: no room for {size:.2g} GB of features ({error.strerror})",
                cure="make room there, or set TMPDIR to a folder with more",
            ) from error

    @property
    def _row_bytes(self) -> int:
        return self.shape[1] * self.dtype.itemsize

    def _range(self, rows: slice) -> tuple[int, int]:
        start, stop, step = rows.indices(len(self))
        assert step == 1, rows
        return start, max(start, stop)

    def _read(self, into: npt.NDArray[Any], row: int) -> None:
        left, place = (into.data.cast("B") if into.size else memoryview(b"")), row * self._row_bytes
        while left:
            got = os.preadv(self._file, [left], place)
            assert got, f"row {row} of {self.shape} was not written"
            left, place = left[got:], place + got


Rows = npt.NDArray[Any] | StoredRows
"""Vectors in memory, or those of a file: both have `shape` and `len`, and give rows by slice and by row numbers."""


def as_rows(features: npt.ArrayLike | StoredRows) -> Rows:
    """What a caller gives as vectors (N, d): those of a file as they are, else as an array."""
    return features if isinstance(features, StoredRows) else np.asarray(features)


def parts_of(num_rows: int) -> list[slice]:
    """Rows that are worked on at a time; at least one part, which may be empty."""
    return [slice(start, min(start + BLOCK_ROWS, num_rows)) for start in range(0, max(num_rows, 1), BLOCK_ROWS)]


def blocks(rows: Rows) -> Iterator[npt.NDArray[Any]]:
    """The rows in order, `BLOCK_ROWS` at a time."""
    return (rows[part] for part in parts_of(len(rows)))


def taken(rows: Rows, wanted: npt.NDArray[np.int64]) -> Rows:
    """Some of the rows, in this order; in a file where they came from one."""
    if not isinstance(rows, StoredRows):
        return rows[wanted]
    parts = (rows[wanted[part]] for part in parts_of(len(wanted)))
    return StoredRows.of(parts, len(wanted), rows.shape[1], rows.dtype)
