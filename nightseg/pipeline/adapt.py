"""The whole way: a recipe file in; a night model, results.json and report.html out. The CLI and the jobs call this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nightseg.pipeline import run
from nightseg.progress import Progress
from nightseg.recipe import load_recipe
from nightseg.report import write_report
from nightseg.storage import Location


class Adapted(NamedTuple):
    """Where the run lies, its outcome and its report."""

    folder: Location
    outcome: run.Outcome
    report: Location


def adapt(
    recipe_file: str,
    overrides: Sequence[str] = (),
    *,
    run_dir: str | None = None,
    only: str | None = None,
    progress: Progress,
) -> Adapted:
    """Run a recipe to its report. Raises `UserError` before anything starts when the recipe is wrong."""
    recipe = load_recipe(recipe_file, overrides)
    folder = run.run_folder(recipe.name, run_dir)
    outcome = run.run(recipe, folder, only=only, progress=progress)
    return Adapted(folder, outcome, write_report(folder, outcome.results))
