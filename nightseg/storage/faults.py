"""Places where a test can kill the process, to prove that a rerun ends with the same result.

The commit protocol passes, in this order: `attempt`, for every shard `tables`, `shard` and `shard-<5 digits>`, then
`hashed` and `commit`; and `temporary-<file name>` whenever a file is written but not yet in place.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "NIGHTSEG_FAULT"


def fault_point(name: str) -> None:
    """SIGKILLs this process if the environment says `NIGHTSEG_FAULT=after:<name>`; otherwise nothing happens."""
    if os.environ.get(VARIABLE) == f"after:{name}":
        os.kill(os.getpid(), signal.SIGKILL)
