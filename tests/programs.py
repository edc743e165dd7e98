"""Programs that a test talks to while they run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


@contextmanager
def started(words: Sequence[str], **settings: Any) -> Iterator[subprocess.Popen[Any]]:
    """`subprocess.Popen`, but a test that fails does not wait for a program that nobody ends."""
    with subprocess.Popen(words, **settings) as program:
        try:
            yield program
        except BaseException:
            program.kill()
            raise
