"""How the command line shows answers and errors. Exit code 0: done, 1: the work failed, 2: the request was wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from nightseg.storage import Location, UserError

if TYPE_CHECKING:
    from nightseg.runner import Planned

METRICS = {"miou": "mIoU", "pa": "PA", "ca": "CA", "fwiou": "FWIoU"}


class Failures(click.Group):
    """Turns exceptions into one readable message and an exit code; --debug keeps the traceback."""

    def main(self, args: Sequence[str] | None = None, **extra: Any) -> Any:  # type: ignore[override]
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words  # understood wherever it stands
        try:
            return super().main([word for word in words if word != "--debug"], **(extra | {"standalone_mode": False}))
        except click.ClickException as error:
            error.show()
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt):
            click.echo("nightseg: stopped; the same command continues where this one ended.", err=True)
            sys.exit(1)
        except UserError as error:
            if debug:
                raise
            click.echo(f"nightseg: {error}", err=True)
            sys.exit(2)
        except Exception as error:
            if debug:
                raise
            click.echo(f"nightseg: {type(error).__name__}: {error}\n(--debug shows where)", err=True)
            sys.exit(1)


def answer(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result))
        return
    for key, value in result.items():
        click.echo(f"{key}: {value}")


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def print_plan(folder: Location, lines: list[Planned]) -> None:
    marks = {
        "committed": "[green]committed[/]",
        "runs": "[yellow]runs[/]",
        "continues": "[cyan]continues[/]",
        "waits": "runs later",
    }
    rows = [
        [
            str(line.node),
            marks[line.state],
            "?" if line.rows is None else line.rows,
            line.resources,
            ", ".join(line.changed),
        ]
        for line in lines
    ]
    print_table(
        f"run folder {folder.uri}", ["stage", "state", "frames", "resources", "changed since the last commit"], rows
    )


def print_scores(results: dict[str, Any]) -> None:
    rows = [
        [model, test, *(percent(scores[key]) for key in METRICS),
         "" if scores["published_miou"] is None else f"{scores['published_miou']:.1f}"]
        for model, facts in results["models"].items()
        for test, scores in facts["tests"].items()
    ]  # fmt: skip
    if rows:
        print_table("percent", ["model", "test set", *METRICS.values(), "published mIoU"], rows)


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
