"""Tests that were not run are named, never passed over in silence; those that may take least are run first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_what_is_left_out_when_the_time_is_over_is_named() -> None:
    words = [sys.executable, "-m", "pytest", "--start-within", "0", "-p", "no:cacheprovider", "tests/test_errors.py"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    left_out = ended.stdout.count("\nNOT RUN tests/test_errors.py::")
    assert left_out > 0 and f"{left_out} TESTS WERE NOT RUN" in ended.stdout and " passed" not in ended.stdout


def test_tests_that_may_take_longer_come_later_where_time_is_short_and_else_stay_in_their_order() -> None:
    words = [sys.executable, "-m", "pytest", "--collect-only", "-m", "slow and not ssh", "-p", "no:cacheprovider"]
    files = ["tests/pipeline/test_kills.py", "tests/cluster/test_shortage.py", "tests/pipeline/search/test_tune.py"]

    def order(*more: str) -> list[str]:
        ended = subprocess.run(
            [*words, *more, *files], cwd=ROOT, capture_output=True, text=True, timeout=200, check=True
        )
        return [line.split("[")[0] for line in ended.stdout.splitlines() if "::" in line]

    as_named, soonest = order(), order("--start-within", "40")
    assert sorted(as_named) == sorted(soonest) and len(as_named) >= 8
    assert as_named[0].startswith(files[0]) and soonest[0].startswith(files[1]) and soonest[-1].startswith(files[0])
