"""Parquet in memory, with plain columns only.

Extension types are refused, because loading one can run code (CVE-2026-41486).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from nightseg.errors import UserError

MAGIC = b"PAR1"
EXTENSION_MARK = b"ARROW:extension:name"


def format_table(table: pa.Table, where: str) -> pa.Buffer:
    """The table as a Parquet file (zstd, a checksum a page); the same table gives the same bytes.

    `where` names it in errors.
    """
    _refuse_extensions(table.schema, where)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def parse_table(data: bytes | memoryview, where: str) -> pa.Table:
    """The Parquet file in `data`, checksums compared where it has them; `where` names it in errors."""
    with _parquet_errors(where):
        _check_footer(_read_footer(pa.BufferReader(data)), where)
        table = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
    _refuse_extensions(table.schema, where)
    return table


def table_rows(stream: pa.NativeFile, where: str) -> int:
    """Rows of the Parquet file, read from its footer alone."""
    footer = _read_footer(stream)
    with _parquet_errors(where):
        _check_footer(footer, where)
        return int(pq.ParquetFile(pa.BufferReader(MAGIC + footer)).metadata.num_rows)


def _read_footer(stream: pa.NativeFile) -> bytes:
    """The end of the file: metadata, its length (uint32), magic."""
    size = stream.size()
    stream.seek(max(0, size - 8))
    length = int.from_bytes(stream.read(4), "little") + 8
    stream.seek(max(0, size - length))
    return bytes(stream.read(length))


def _check_footer(footer: bytes, where: str) -> None:
    """Raises `UserError` if the footer declares extension types, before pyarrow turns it into a schema.

    Reading a schema is already too late: a registered extension type (importing ray.data registers some) may unpickle
    its metadata then. The Arrow schema lies base64-coded inside the footer, at an unknown alignment.
    """
    if footer[-4:] != MAGIC:
        raise pa.ArrowInvalid("no Parquet footer")
    found = EXTENSION_MARK in footer
    for run in re.finditer(rb"[A-Za-z0-9+/]{24,}", footer):
        for shift in range(4):
            code = run[0][shift:]
            found = found or EXTENSION_MARK in base64.b64decode(code[: len(code) // 4 * 4])
    if found:
        raise _extension_error(where, "its Arrow schema")


def _refuse_extensions(schema: pa.Schema, where: str) -> None:
    for field in schema:
        if _has_extension(field):
            raise _extension_error(where, f"column {field.name!r}")


def _has_extension(field: pa.Field) -> bool:
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType) or EXTENSION_MARK in (field.metadata or {}):
        return True
    if pa.types.is_dictionary(kind):
        return isinstance(kind.value_type, pa.BaseExtensionType)
    return any(_has_extension(kind.field(index)) for index in range(kind.num_fields))


def _extension_error(where: str, what: str) -> UserError:
    return UserError(
        f"table {where}: {what} uses an Arrow extension type, and loading one can run code (CVE-2026-41486)",
        cure="write the table again with plain columns (numbers, strings, lists of numbers)",
    )


@contextmanager
def _parquet_errors(where: str) -> Iterator[None]:
    """For work in memory only: there an OSError means that the bytes are no Parquet."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"table {where}: it is damaged or not Parquet ({reason})", cure="restore it or make it again"
        ) from error
