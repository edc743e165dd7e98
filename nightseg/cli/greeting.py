"""What is said before anything heavy is imported: nothing here needs more than Python."""

import sys
import threading
from collections.abc import Sequence

SECONDS_TO_WORDS = 1.0


def greeting_of(words: Sequence[str]) -> threading.Timer:
    """Says something once a second has passed: before that, a command may be done, or its own words be there."""
    verb = next((word for word in words if not word.startswith("-")), "")
    greeting = threading.Timer(SECONDS_TO_WORDS, _say, [f"nightseg {verb}: at work"])
    greeting.daemon = True
    return greeting


def _say(message: str) -> None:
    sys.stderr.write("".join(one if one.isprintable() else "?" for one in message) + "\n")
    sys.stderr.flush()
