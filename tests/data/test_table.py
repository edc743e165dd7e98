"""The frame table: what counts as one, and file names that are safe whatever a frame is called."""

from __future__ import annotations

import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nightseg.data.table import (
    FRAME_SCHEMA,
    QUARANTINE_SCHEMA,
    check_frames,
    file_name,
    frame_table,
    quarantine_table,
    resolve,
    vector_column,
    vectors,
)
from nightseg.storage import Location, UserError, safe_relative

ROWS = [{"frame_id": "d/a", "uri": "/x/a.png", "domain": "day"}, {"frame_id": "d/b", "uri": "b.png", "domain": "night"}]


def test_missing_columns_are_null_and_types_fixed() -> None:
    table = frame_table(ROWS)
    assert table.schema == FRAME_SCHEMA
    assert table["label_uri"].null_count == 2 and table["width"].type == pa.int32()
    assert frame_table([]).schema == FRAME_SCHEMA and quarantine_table([]).schema == QUARANTINE_SCHEMA
    with_score = frame_table([ROWS[0] | {"score": 1.5}], extra={"score": pa.float32()})
    assert with_score.column_names == [*FRAME_SCHEMA.names, "score"]
    with pytest.raises(AssertionError, match="score"):
        frame_table([ROWS[0] | {"score": 1.5}])


def test_a_good_table_passes() -> None:
    check_frames(frame_table(ROWS))
    check_frames(frame_table([]))
    check_frames(pa.table({"frame_id": ["a"], "uri": ["a.png"], "features": [[1.0, 2.0]], "label_uri": pa.nulls(1)}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], ROWS[0] | {"uri": "/other.png"}], "'d/a' occurs 2 times"),
        ([ROWS[0], {"frame_id": "", "uri": "x", "domain": "day"}], "1 of 2 rows have an empty frame_id"),
        ([ROWS[0], {"frame_id": "d/c", "domain": "day"}], "empty uri"),
        ([ROWS[0] | {"domain": "dusk"}], "unknown domain 'dusk'. Cure: use one of day, night"),
        ([{"frame_id": "d/a", "uri": "x"}], "unknown domain 'None'"),
        ([ROWS[0] | {"label_uri": "l.png"}], "'d/a' has a label but no label_encoding"),
    ],
)
def test_what_is_wrong_is_said(rows: list[dict[str, str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_frames(frame_table(rows))


def test_foreign_tables_are_refused() -> None:
    with pytest.raises(UserError, match="column uri is missing; it has frame_id"):
        check_frames(pa.table({"frame_id": ["a"]}))
    with pytest.raises(UserError, match="frame_id has the type int64"):
        check_frames(pa.table({"frame_id": [1], "uri": ["a"]}))
    with pytest.raises(UserError, match="blob has the type binary"):
        check_frames(pa.table({"frame_id": ["a"], "uri": ["a"], "blob": [b"x"]}))
    with pytest.raises(UserError, match="width has the type string"):
        check_frames(pa.table({"frame_id": ["a"], "uri": ["a"], "width": ["640"]}))
    with pytest.raises(UserError, match=r"^two: the column width has"):
        check_frames(pa.table({"frame_id": ["a"], "uri": ["a"], "width": ["640"]}), "two")


def test_relative_uris_are_below_the_folder() -> None:
    rows = [
        {"frame_id": "1", "uri": "images/a b.png", "label_uri": "/labels/a.png"},
        {"frame_id": "2", "uri": "s3://bucket/b.png"},
    ]
    table = resolve(frame_table(rows), Location("/run/attempt-1"))
    assert table["uri"].to_pylist() == ["/run/attempt-1/images/a b.png", "s3://bucket/b.png"]
    assert table["label_uri"].to_pylist() == ["/labels/a.png", None]
    assert table.schema == FRAME_SCHEMA
    remote = resolve(frame_table(rows), Location("gs://bucket/run"))
    assert remote["uri"][0].as_py() == "gs://bucket/run/images/a b.png"
    with pytest.raises(UserError, match="leads out"):
        resolve(frame_table([{"frame_id": "1", "uri": "../../etc/passwd"}]), Location("/run"))


def test_file_names_stay_readable() -> None:
    assert file_name("city/aachen/aachen_000000", ".png") == "city/aachen/aachen_000000.png"
    assert file_name("Straße bei Nacht/夜 1", ".png") == "Straße bei Nacht/夜 1.png"
    assert file_name("../../etc/passwd", ".png") == "%2E%2E/%2E%2E/etc/passwd.png"
    assert file_name("/a//b\n\x1b[31m", ".png") == "%/a/%/b%0A%1B[31m.png"
    assert file_name("100% c:\\d", ".png") == "100%25 c%3A%5Cd.png"


@given(st.text(max_size=30), st.text(max_size=30))
@example("a", "a.png/b")
@example("..", ".")
@example("%2E", ".")
@example("", "%")
@example("x" * 300, "x" * 301)
@example("夜" * 100, "夜" * 101)
def test_file_names_are_safe_and_injective(first: str, second: str) -> None:
    one, two = file_name(first, ".png"), file_name(second, ".png")
    assert safe_relative(one) == one
    assert not {"Cc", "Cf", "Cs", "Zl", "Zp"} & {unicodedata.category(character) for character in one}
    assert max(len(part.encode()) for part in one.split("/")) <= 200
    assert (one == two) == (first == second)
    assert not two.startswith(one + "/"), "a file cannot also be a folder"


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


@pytest.mark.parametrize("column", ["uri", "label_uri"])
def test_addresses_with_credentials_are_refused(column: str) -> None:
    """Signed links, too: they would stand in every table that is made of this one."""
    row = {"frame_id": "a", "uri": "a.png", "label_uri": "a.png"} | {column: "https://h/a.png?X-Goog-Signature=geheim"}
    with pytest.raises(UserError, match=r"frame table: .*Signature=\*\*\*' holds credentials") as caught:
        resolve(pa.Table.from_pylist([row]), Location("/data"))
    assert "geheim" not in str(caught.value)
