"""The command line: parse, validate, call one function, show the answer.

`start` is what the installed command calls: it says that something happens before anything heavy is imported.
"""

import sys
import threading
from collections.abc import Sequence

SECONDS_TO_WORDS = 1.0


def start() -> None:
    """`nightseg VERB`. The imports alone may take seconds, on a busy machine or from a network file system."""
    greeting = greeting_of(sys.argv[1:])
    greeting.start()
    from nightseg.cli.main import main

    main(greeting=greeting)


def greeting_of(words: Sequence[str]) -> threading.Timer:
    """Says something once a second has passed: before that, a command may be done, or its own words be there."""
    verb = next((word for word in words if not word.startswith("-")), "")
    greeting = threading.Timer(SECONDS_TO_WORDS, _say, [f"nightseg {verb}: at work"])
    greeting.daemon = True
    return greeting


def _say(message: str) -> None:
    sys.stderr.write("".join(one if one.isprintable() else "?" for one in message) + "\n")
    sys.stderr.flush()
