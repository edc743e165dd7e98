"""Files and folders, on local disk or behind a URI: every byte that nightseg reads or writes goes through `Location`.

location.py  a file or folder; atomic writes, JSON, tables, listings, hashes
remote.py    file systems behind URIs, with retries
parquet.py   tables to bytes and back; refuses files that could run code when read
events.py    curves and pictures as TensorBoard reads them
faults.py    points at which a test may kill the process
"""

from nightseg.errors import UserError
from nightseg.storage.location import (
    Entry,
    Location,
    canonical_json,
    hash_of,
    hide_credentials,
    safe_relative,
    sha256_of,
    write_errors,
)

__all__ = [
    "Entry",
    "Location",
    "UserError",
    "canonical_json",
    "hash_of",
    "hide_credentials",
    "safe_relative",
    "sha256_of",
    "write_errors",
]
