"""Tests that were not run are named, never passed over in silence."""

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
