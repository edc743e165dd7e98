"""The search of the demo without a training: its trials, and rows of its records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nightseg.pipeline.search.settings import Search
from nightseg.pipeline.search.trials import Trials
from nightseg.recipe import load_recipe, load_settings, save_recipe
from nightseg.storage import Location

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
ALPHA, GAMMA, COUNT = (
    "models.adapted.loss.alpha",
    "models.adapted.loss.gamma",
    "models.adapted.self_training.select.count",
)
VALUES = {ALPHA: 0.5, GAMMA: 1.0, COUNT: 60}


def search_of(*overrides: str) -> Search:
    return load_settings(Search, CONFIGS / "search.yaml", overrides)


def trials_of(folder: Path, *overrides: str) -> Trials:
    settings = search_of(*overrides)
    trials = Trials(settings, Location.of(folder), foundation="shared")
    recipe = load_recipe(CONFIGS / "demo.yaml", [*settings.overrides, "models.adapted.training.epochs=3"])
    save_recipe(recipe, trials.recipe_file)
    return trials


def changed(trials: Trials, *overrides: str) -> Trials:
    """The same trials of a recipe with other settings."""
    save_recipe(load_recipe(trials.recipe_file, overrides), trials.recipe_file)
    return trials


def row(
    number: int, values: dict[str, Any], score: float | None, end: str | None = "done", **more: Any
) -> dict[str, Any]:
    """Of the records."""
    curve = [] if score is None else [[1, score / 2], [3, score]]
    made = {"number": number, "trial": f"t{number}", "label": f"n={number}", "values": values, "curve": curve}
    return {**made, "miou": score, "epochs": 3, "end": end, "error": None, **more}
