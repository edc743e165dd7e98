"""The frame table: one row a frame, the same columns everywhere; and the quarantine table beside it.

Stages meet through these tables. A frame's files are named by `uri` and `label_uri`; inside a commit they may be
relative to the commit's folder, `resolve` makes them absolute for the reader.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from nightseg.data.images import BadFrame, UInt8, read_image
from nightseg.errors import UserError
from nightseg.storage import Location
from nightseg.storage.credentials import refuse_credentials

FRAME_ID = "frame_id"  # unique, stable, readable: "<dataset>/<name>"
URI = "uri"
LABEL_URI = "label_uri"  # null = unlabelled
DATASET = "dataset"
SPLIT = "split"
DOMAIN = "domain"  # one of DOMAINS
SEQUENCE = "sequence"  # the drive or city the frame belongs to; null = unknown
WIDTH = "width"  # pixels of the upright image
HEIGHT = "height"
BYTES = "bytes"  # size of the image file
SHA256 = "sha256"  # of the image file
LABEL_SHA256 = "label_sha256"  # of the label file
LABEL_ENCODING = "label_encoding"  # which raw-id map of the taxonomy the label file uses; null = unlabelled
LABEL_KEPT = "label_kept"  # of labels of a teacher what is kept (segmenter/stored_labels.py); not in all tables
LABEL_PIXELS = "label_pixels"  # of the label by train id, K values; null = unlabelled, or not counted
REASON = "reason"  # one of images.REASONS
DETAIL = "detail"

DOMAINS = ("day", "night", "twilight", "unknown")

FRAME_SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in (FRAME_ID, URI, LABEL_URI, DATASET, SPLIT, DOMAIN, SEQUENCE)),
        *((WIDTH, pa.int32()), (HEIGHT, pa.int32()), (BYTES, pa.int64())),
        *((name, pa.string()) for name in (SHA256, LABEL_SHA256, LABEL_ENCODING)),
        (LABEL_PIXELS, pa.list_(pa.int64())),
    ]
)
QUARANTINE_SCHEMA = pa.schema([(name, pa.string()) for name in (FRAME_ID, URI, REASON, DETAIL)])

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_MAX_NAME_BYTES = 180  # file systems allow 255; the rest is for suffixes and temporary names
_ESCAPED_CHARACTERS = frozenset('%\\:*?"<>|')  # our own escape, and what Windows and shells trip over


def frame_table(rows: Iterable[Mapping[str, Any]], extra: Mapping[str, pa.DataType] | None = None) -> pa.Table:
    """Rows as a table of FRAME_SCHEMA, then the `extra` columns. Columns a row lacks are null."""
    return _table(rows, pa.schema([*FRAME_SCHEMA, *(extra or {}).items()]))


def quarantine_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table of QUARANTINE_SCHEMA."""
    return _table(rows, QUARANTINE_SCHEMA)


def image_of(row: Mapping[str, Any]) -> UInt8:
    """The image of a row with an absolute uri: HWC RGB, upright. Raises BadFrame."""
    return read_image(Location.of(row[URI]), row.get(SHA256))


def quarantined(row: Mapping[str, Any], fault: BadFrame) -> dict[str, Any]:
    """The row of the quarantine table for a frame that could not be used."""
    return {FRAME_ID: row[FRAME_ID], URI: row[URI], REASON: fault.reason, DETAIL: fault.detail}


def sort_out(rows: pa.Table, work: Callable[[dict[str, Any]], Any]) -> tuple[list[Any], list[dict[str, Any]]]:
    """What `work` makes of each row, in order; and rows of the quarantine table for those it raises BadFrame about."""
    good, bad = [], []
    for row in rows.to_pylist():
        try:
            good.append(work(row))
        except BadFrame as fault:
            bad.append(quarantined(row, fault))
    return good, bad


def check_frames(table: pa.Table, where: str = "frame table") -> None:
    """Raise UserError unless `table` is a frame table: ids and uris there, ids unique, domains known, plain types."""
    missing = [name for name in (FRAME_ID, URI) if name not in table.column_names]
    if missing:
        raise UserError(
            f"{where}: not a frame table, the column {missing[0]} is missing; it has {', '.join(table.column_names)}",
            cure=f"a frame table has at least the text columns {FRAME_ID} and {URI}",
        )
    for field in table.schema:
        _check_type(field, where)
    for name in (FRAME_ID, URI):
        blank = pc.sum(pc.fill_null(pc.equal(pc.utf8_length(table[name]), 0), True)).as_py() or 0
        if blank:
            raise UserError(f"{where}: {blank} of {table.num_rows} rows have an empty {name}", cure="fill it in")
    counts = pc.value_counts(table[FRAME_ID].combine_chunks())
    repeated = [(row["values"], row["counts"]) for row in counts.to_pylist() if row["counts"] > 1]
    if repeated:
        name, count = repeated[0]
        raise UserError(
            f"{where}: {len(repeated)} frame ids are not unique; '{name}' occurs {count} times",
            cure="list a frame once; give data sets that are joined different names",
        )
    if DOMAIN in table.column_names:
        unknown = sorted({str(value) for value in pc.unique(table[DOMAIN]).to_pylist()} - set(DOMAINS))
        if unknown:
            raise UserError(f"{where}: unknown domain '{unknown[0]}'", cure=f"use one of {', '.join(DOMAINS)}")
    if LABEL_URI in table.column_names and LABEL_ENCODING in table.column_names:
        undeclared = pc.and_(pc.is_valid(table[LABEL_URI]), pc.is_null(table[LABEL_ENCODING]))
        if pc.any(undeclared).as_py():
            first = table.filter(undeclared)[FRAME_ID][0].as_py()
            what = f"{where}: '{first}' has a label but no {LABEL_ENCODING}, so its ids mean nothing"
            raise UserError(what, cure=f"say what its ids mean, such as {LABEL_ENCODING} = train_ids")


def resolve(table: pa.Table, folder: Location) -> pa.Table:
    """The table with absolute `uri` and `label_uri`: relative ones are below `folder`.

    Raises UserError: '..', or credentials in an address, which would be written into every table made of this one.
    """

    def absolute(uri: str | None) -> str | None:
        if uri is not None and "://" in uri:
            refuse_credentials(uri, "frame table")
        return uri if uri is None or uri.startswith("/") or _SCHEME.match(uri) else (folder / uri).uri

    for name in (URI, LABEL_URI):
        if name in table.column_names:
            table = _map_column(table, name, absolute)
    return table


def file_name(frame_id: str, suffix: str) -> str:
    """A relative path for a file made from the frame: '<frame_id><suffix>', safe on every file system.

    Different ids give different paths, and no path is a folder of another. Spaces and letters of all languages stay;
    control characters and what leads out of a folder are %-escaped; parts too long for a file system end in a hash.
    """
    *folders, name = frame_id.split("/")
    return "/".join([*(_safe_part(part, folder_unlike=suffix) for part in folders), _safe_part(name) + suffix])


# -- columns that hold one vector a frame ------------------------------------------------------------------------------


def vector_column(rows_NK: NDArray[np.float32]) -> pa.Array:
    """large_list<float32>, one list of K values for each row of a float32 (N, K) array."""
    assert rows_NK.ndim == 2, rows_NK.shape
    offsets = np.arange(len(rows_NK) + 1, dtype=np.int64) * rows_NK.shape[1]
    values = pa.array(np.ascontiguousarray(rows_NK, dtype=np.float32).ravel())
    # 64-bit offsets: at 2,048 values a frame 32 bits would end at a million frames.
    return pa.LargeListArray.from_arrays(pa.array(offsets), values)


def vectors(column: pa.ChunkedArray) -> NDArray[np.float32]:
    """float32 (N, K) from a column of lists of one length, (0, 0) from no rows; ValueError if the lengths differ."""
    if column.null_count:
        raise ValueError(f"{column.null_count} of {len(column)} vectors are null")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) > 1:
        raise ValueError(f"the vectors of a column have different lengths: {sorted(lengths)[:5]}")
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    joined = np.concatenate(values).astype(np.float32, copy=False) if values else np.empty(0, dtype=np.float32)
    return joined.reshape(len(column), lengths[0] if lengths else 0)


# -- details -----------------------------------------------------------------------------------------------------------


def _safe_part(part: str, folder_unlike: str = "") -> str:
    if not part:
        return "%"  # otherwise a % is always followed by two digits
    safe = "".join(_escape(character) if _is_unsafe(character) else character for character in part)
    if set(safe) == {"."} or (folder_unlike and safe.endswith(folder_unlike)):
        # '..' leads out; a folder 'a.png' would collide with the file of the frame 'a'
        safe = safe.replace(".", "%2E")
    if len(safe.encode()) > _MAX_NAME_BYTES:
        digest = hashlib.sha256(part.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        safe = safe.encode()[: _MAX_NAME_BYTES - 34].decode(errors="ignore") + "%~" + digest
    return safe


def _is_unsafe(character: str) -> bool:
    # C*: control, format (right-to-left overrides), surrogates; Zl, Zp: line and paragraph separators
    return character in _ESCAPED_CHARACTERS or unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escape(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _table(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    rows = list(rows)
    for row in rows:
        unknown = row.keys() - set(schema.names)
        assert not unknown, f"columns {sorted(unknown)} are not in the schema; name them in `extra`"
    columns = [pa.array([row.get(field.name) for row in rows], type=field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _map_column(table: pa.Table, name: str, change: Callable[[str | None], str | None]) -> pa.Table:
    values = pa.array([change(value) for value in table[name].to_pylist()], type=pa.string())
    return table.set_column(table.schema.get_field_index(name), pa.field(name, pa.string()), values)


def _check_type(field: pa.Field, where: str) -> None:
    """Text columns are text, numbers are integers; extra columns are plain: text, numbers, or lists of numbers."""
    kind = field.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    value = kind.value_type if is_list else None
    if field.name in FRAME_SCHEMA.names:
        wanted = FRAME_SCHEMA.field(field.name).type
        fits = is_text if pa.types.is_string(wanted) else pa.types.is_integer(value if is_list else kind)
    else:
        fits = is_text or is_number or (is_list and (pa.types.is_integer(value) or pa.types.is_floating(value)))
        wanted = "text, a number or a list of numbers"
    # An all-null column has no type of its own yet.
    if not fits and not pa.types.is_null(kind):
        raise UserError(f"{where}: the column {field.name} has the type {kind}", cure=f"make it {wanted}")
