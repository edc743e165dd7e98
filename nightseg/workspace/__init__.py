"""The run folder and its protocol: a crash at any instant costs at most the open shards, a commit never changes.

stage.py     the run folder; a stage and its key: done, open, or to do
attempt.py   the folder a stage works in, shard by shard, until it is committed
commit.py    what a finished stage left; readers go through it and never list folders
lock.py      one driver at a time
"""

from nightseg.storage.faults import fault_point
from nightseg.workspace.attempt import Attempt, ShardRecord
from nightseg.workspace.commit import Commit, DamagedCommit, Output
from nightseg.workspace.lock import WorkspaceBusy
from nightseg.workspace.stage import Stage, Workspace

__all__ = [
    "Attempt",
    "Commit",
    "DamagedCommit",
    "Output",
    "ShardRecord",
    "Stage",
    "Workspace",
    "WorkspaceBusy",
    "fault_point",
]
