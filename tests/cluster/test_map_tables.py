"""Blocks of work: every row in exactly one, small enough to send."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pytest

from nightseg.cluster.map import SHARD, blocks, shard_slice, shards_of


@pytest.fixture
def rows() -> pa.Table:
    return pa.table({"number": list(range(7)), "text": ["a", None, "c", "d", "e", "f", "g"]})


def test_shards_cover_the_rows_in_order(rows: pa.Table) -> None:
    parts = [shard_slice(rows, index, 3) for index in range(3)]
    assert [part.num_rows for part in parts] == [3, 3, 1]
    assert pa.concat_tables(parts).equals(rows)


def test_blocks_come_back_as_the_shards_they_were(rows: pa.Table) -> None:
    sent = list(blocks(rows, [2, 0], 3))
    assert [block[SHARD].to_pylist() for block in sent] == [[2], [0, 0, 0]]
    joined = list(shards_of(pa.concat_tables(sent)))  # as if Ray had put them into one batch
    assert [index for index, _ in joined] == [0, 2]
    assert joined[0][1].to_pydict() == rows.slice(0, 3).to_pydict()
    assert joined[1][1].to_pydict() == rows.slice(6, 1).to_pydict()


def test_a_block_does_not_carry_the_whole_table() -> None:
    many = pa.table({"uri": [f"/data/night/frame-{index:09d}.jpg" for index in range(100_000)]})
    block = next(blocks(many, [7], 10))
    assert len(pickle.dumps(block)) < 5_000
