"""The command line: parse, validate, call one function, show the answer."""

import sys

from nightseg.cli.greeting import greeting_of


def start() -> None:
    """`nightseg VERB`, as it is installed. The imports alone may take seconds, on a busy machine or from afar."""
    greeting = greeting_of(sys.argv[1:])
    greeting.start()
    from nightseg.cli.main import main

    main(greeting=greeting)
