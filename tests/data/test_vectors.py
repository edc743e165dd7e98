from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from nightseg.data.vectors import sampled_vectors, vector_column, vectors
from nightseg.storage import Location, Workspace


def test_vectors_survive_a_column_a_file_and_chunks(tmp_path: object) -> None:
    rows = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    table = pa.concat_tables([pa.table({"v": vector_column(rows[:3])}), pa.table({"v": vector_column(rows[3:])})])
    assert np.array_equal(vectors(table["v"]), rows)
    place = Location.of(str(tmp_path)) / "t.parquet"
    place.write_table(table)
    assert np.array_equal(vectors(place.read_table()["v"]), rows)
    assert np.array_equal(vectors(table.slice(2, 3)["v"]), rows[2:5])
    assert np.array_equal(vectors(table.take([6, 0])["v"]), rows[[6, 0]])


def test_no_rows() -> None:
    column = pa.table({"v": vector_column(np.empty((0, 4), dtype=np.float32))})["v"]
    assert vectors(column).shape == (0, 0)


def test_lists_of_different_length_are_no_vectors() -> None:
    with pytest.raises(ValueError, match="lengths"):
        vectors(pa.chunked_array([pa.array([[1.0], [1.0, 2.0]])]))
    with pytest.raises(ValueError, match="null"):
        vectors(pa.chunked_array([pa.array([[1.0], None])]))


def test_a_sample_of_committed_vectors_keeps_their_order(tmp_path: Path) -> None:
    rows = np.arange(40, dtype=np.float32).reshape(10, 4)
    attempt = Workspace(tmp_path).stage("score", "x", version=1, recipe={}, inputs={}, seed=0).open()
    attempt.plan(10, 4)
    for index in range(3):
        part = pa.table({"v": vector_column(rows[4 * index : 4 * index + 4])})
        attempt.write_shard(index, {"t": part, "other": part}, rows_in=part.num_rows, seconds=0.0)
    commit = attempt.finish(rows_in=10, rows_out=10, num_shards=3)
    assert np.array_equal(sampled_vectors(commit, "t", "v", 10), rows)
    some = sampled_vectors(commit, "t", "v", 6)
    assert some.shape == (6, 4) and (np.diff(some[:, 0]) > 0).all()
    assert np.array_equal(some, sampled_vectors(commit, "t", "v", 6))
    assert sampled_vectors(commit, "nothing", "v", 6).shape == (0, 0)
