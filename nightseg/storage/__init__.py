"""Files, tables and the run folder: every byte that nightseg reads or writes goes through here.

A crash at any instant costs at most the open shards, and a commit never changes.
"""

from nightseg.errors import UserError
from nightseg.storage.attempts import Attempt, ShardRecord, Shards, TooManyBad
from nightseg.storage.commits import Commit, DamagedCommit, Output, check_contents
from nightseg.storage.lock import WorkspaceBusy
from nightseg.storage.paths import (
    Entry,
    Location,
    fault_point,
    hash_of,
    safe_relative,
    sha256_of,
)
from nightseg.storage.workspace import Stage, Workspace

__all__ = [
    "Attempt",
    "Commit",
    "DamagedCommit",
    "Entry",
    "Location",
    "Output",
    "ShardRecord",
    "Shards",
    "Stage",
    "TooManyBad",
    "UserError",
    "Workspace",
    "WorkspaceBusy",
    "check_contents",
    "fault_point",
    "hash_of",
    "safe_relative",
    "sha256_of",
]
