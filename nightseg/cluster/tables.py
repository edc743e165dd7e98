"""How a table of rows becomes blocks of work for Ray Data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pyarrow as pa

SHARD = "nightseg_shard"
"""Column that tells a worker which shard its rows are; it exists only between driver and worker."""


def shard_slice(rows: pa.Table, index: int, shard_rows: int) -> pa.Table:
    """Rows [index * shard_rows, (index + 1) * shard_rows): the same rows in every run, whoever works on them."""
    return rows.slice(index * shard_rows, shard_rows)


def blocks(rows: pa.Table, indices: Iterable[int], shard_rows: int) -> Iterator[pa.Table]:
    """One contiguous block per shard, each row marked with its shard's index (int64).

    Copied row by row, because a slice of a table drags all of the table's bytes along when it is pickled.
    """
    for index in indices:
        part = shard_slice(rows, index, shard_rows)
        block = part.take(pa.array(range(part.num_rows), pa.int64())).combine_chunks()
        yield block.append_column(SHARD, pa.array([index] * block.num_rows, pa.int64()))


def shards_of(batch: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """The shards of a batch, in order, without the mark: one as `blocks` cuts them, but Ray may join blocks."""
    for index in sorted(set(batch[SHARD].to_pylist())):
        mine = pa.compute.equal(batch[SHARD], index)
        yield index, batch.filter(mine).drop_columns([SHARD])
