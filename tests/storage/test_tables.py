"""Parquet files are read only if they have plain columns."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nightseg.storage import UserError
from nightseg.storage.tables import format_table, parse_table, table_rows

LOADED: list[bytes] = []


class Trap(pa.ExtensionType):  # type: ignore[misc]  # pyarrow is not typed
    """What an attacker relies on: merely reading a schema hands bytes of the file to this class."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "nightseg.test.trap")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"payload"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Trap":
        LOADED.append(serialized)
        return cls()


@pytest.fixture
def trap() -> Iterator[Trap]:
    pa.register_extension_type(Trap())
    LOADED.clear()
    yield Trap()
    pa.unregister_extension_type("nightseg.test.trap")


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("prefix", ["", "x", "xy", "xyz"], ids=str)
def test_extension_types_are_refused_before_they_are_loaded(trap: Trap, prefix: str) -> None:
    column = pa.ExtensionArray.from_storage(trap, pa.array([1, 2], pa.int64()))
    # column names of several lengths shift the mark within the base64 text
    data = parquet(pa.table({f"{prefix}plain": ["a", "b"], "bad": column}))
    LOADED.clear()
    for read in (lambda: parse_table(data, "t.parquet"), lambda: table_rows(pa.BufferReader(data), "t.parquet")):
        with pytest.raises(UserError, match=r"t\.parquet.*extension type.*CVE-2026-41486"):
            read()
    assert LOADED == []


def test_nested_extension_types_are_refused(trap: Trap) -> None:
    for kind in (pa.list_(trap), pa.struct([("b", trap)]), pa.map_(pa.string(), trap)):
        with pytest.raises(UserError, match="extension"):
            format_table(pa.Table.from_batches([], pa.schema([("a", kind)])), "t.parquet")


def test_canonical_extension_types_are_refused() -> None:
    data = parquet(pa.table({"id": pa.array([b"0" * 16], pa.uuid())}))
    with pytest.raises(UserError, match="extension"):
        parse_table(data, "t.parquet")


def test_unregistered_extension_types_are_refused_too() -> None:
    """Without the class the column would read as plain storage here, and unpickle in a process that has the class."""
    metadata = {b"ARROW:extension:name": b"ray.data.arrow_tensor", b"ARROW:extension:metadata": b"x"}
    table = pa.table({"a": [1]}, schema=pa.schema([pa.field("a", pa.int64(), metadata=metadata)]))
    with pytest.raises(UserError, match="extension"):
        format_table(table, "t.parquet")
    with pytest.raises(UserError, match="extension"):
        parse_table(parquet(table), "t.parquet")


@pytest.mark.parametrize(
    "name",
    [
        "arrow.py_extension_type",  # of old pyarrow: its metadata is a pickle
        "ray.data.arrow_tensor",
        "ray.data.arrow_tensor_v2",
        "ray.data.arrow_variable_shaped_tensor",
        "ray.data.arrow_pickled_object",
        "arrow.json",
        "anything.else",
    ],
)
@pytest.mark.parametrize("depth", ["column", "list", "struct", "map"])
def test_no_extension_type_is_read_by_any_name_at_any_depth(name: str, depth: str) -> None:
    metadata = {b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": b"\x80\x04cos\nsystem\n."}
    marked = pa.field("item", pa.int64(), metadata=metadata)
    kind = {
        "list": lambda: pa.list_(marked),
        "struct": lambda: pa.struct([marked]),
        "map": lambda: pa.map_(pa.string(), marked),
    }
    field = marked if depth == "column" else pa.field("a", kind[depth]())
    data = parquet(pa.Table.from_batches([], pa.schema([pa.field("frame_id", pa.string()), field])))
    for read in (lambda: parse_table(data, "t.parquet"), lambda: table_rows(pa.BufferReader(data), "t.parquet")):
        with pytest.raises(UserError, match=r"table t\.parquet: .*extension type"):
            read()


def test_plain_columns_come_back() -> None:
    table = pa.table(
        {
            "text": ["a", None],
            "list": pa.array([[1.0], []], pa.list_(pa.float32())),
            "nested": pa.array([{"a": [1]}, None]),
            "words": pa.array(["x", "y"]).dictionary_encode(),
            "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
        }
    )
    data = bytes(format_table(table, "t"))
    assert parse_table(data, "t").equals(table)
    assert table_rows(pa.BufferReader(data), "t") == 2


def test_damage_is_told_in_a_sentence() -> None:
    data = bytes(format_table(pa.table({"a": list(range(100))}), "t"))
    footer = int.from_bytes(data[-8:-4], "little")
    blanked = data[: -8 - footer] + b"\0" * footer + data[-8:]
    for broken in (b"", data[:4], data[: len(data) // 2], data[:-1], blanked, b"x" * 500):
        with pytest.raises(UserError, match=r"table t\.parquet: it is damaged"):
            parse_table(broken, "t.parquet")
        with pytest.raises(UserError, match=r"table t\.parquet: it is damaged"):
            table_rows(pa.BufferReader(broken), "t.parquet")


def test_importing_ray_data_changes_nothing(tmp_path: Path) -> None:
    """The real attack: a file that names ray.data's tensor type, read in a process where Ray has registered it."""
    code = (
        "import sys, pyarrow as pa, pyarrow.parquet as pq\n"
        "from nightseg.storage.tables import parse_table\n"
        "field = pa.field('a', pa.list_(pa.int64()), metadata={'ARROW:extension:name': 'ray.data.arrow_tensor',"
        " 'ARROW:extension:metadata': 'no pickle'})\n"
        "pq.write_table(pa.table({'a': [[1]]}, schema=pa.schema([field])), sys.argv[1])\n"
        "import ray.data\n"
        "parse_table(open(sys.argv[1], 'rb').read(), 'evil')\n"
    )
    path = tmp_path / "evil.parquet"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], capture_output=True, text=True)
    assert "UserError: table evil: its Arrow schema uses an Arrow extension type" in done.stderr


def test_flipped_bits_of_the_rows_are_refused() -> None:
    """In tables that lie outside of any commit, too: every page has a checksum."""
    table = pa.table({"uri": [f"frames/{number}.png" for number in range(500)], "luma": [0.5] * 500})
    whole = bytes(format_table(table, "t.parquet"))
    assert parse_table(whole, "t.parquet").equals(table)
    pages = range(4, len(whole) - int.from_bytes(whole[-8:-4], "little") - 8)
    silent = 0
    for place in pages[::7]:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        try:
            silent += not parse_table(bytes(data), "t.parquet").equals(table)
        except UserError:
            continue
    assert silent == 0


def test_tables_without_checksums_are_read() -> None:
    table = pa.table({"x": [1, 2]})
    assert parse_table(parquet(table), "t.parquet").equals(table)
