"""Columns that hold one vector a frame: numpy (N, K) on one side, an Arrow list column on the other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from nightseg.storage import Commit
from nightseg.storage.commit import table_paths


def vector_column(rows_NK: npt.NDArray[np.float32]) -> pa.Array:
    """large_list<float32>, one list of K values for each row of a float32 (N, K) array."""
    assert rows_NK.ndim == 2, rows_NK.shape
    offsets = np.arange(len(rows_NK) + 1, dtype=np.int64) * rows_NK.shape[1]
    values = pa.array(np.ascontiguousarray(rows_NK, dtype=np.float32).ravel())
    # 64-bit offsets: at 2,048 values a frame 32 bits would end at a million frames.
    return pa.LargeListArray.from_arrays(pa.array(offsets), values)


def vectors(column: pa.ChunkedArray) -> npt.NDArray[np.float32]:
    """float32 (N, K) from a column of lists of one length, (0, 0) from no rows; ValueError if the lengths differ."""
    if column.null_count:
        raise ValueError(f"{column.null_count} of {len(column)} vectors are null")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) > 1:
        raise ValueError(f"the vectors of a column have different lengths: {sorted(lengths)[:5]}")
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    joined = np.concatenate(values).astype(np.float32) if values else np.empty(0, dtype=np.float32)
    return joined.reshape(len(column), lengths[0] if lengths else 0)


def sampled_vectors(commit: Commit, table: str, column: str, most: int) -> npt.NDArray[np.float32]:
    """float32 (N, K): the vectors of a committed table, of more than `most` rows an even draw; read part by part."""
    paths = table_paths(commit.outputs, table)
    size = sum(output.rows or 0 for output in commit.outputs if output.path in paths)
    wanted = np.sort(np.random.default_rng(0).choice(size, min(size, most), replace=False))
    parts, start = [], 0
    for path in paths:
        part = vectors((commit.folder / path).read_table()[column])
        parts.append(part[wanted[(wanted >= start) & (wanted < start + len(part))] - start])
        start += len(part)
    filled = [part for part in parts if len(part)]
    return np.concatenate(filled) if filled else np.empty((0, 0), dtype=np.float32)
