"""What a search costs and what it is worth, on the demo's scenes: minutes of quiet CPUs.

    python -m benchmarks.search --folder /tmp/search                            12 trials, two at a time
    python -m benchmarks.search --folder /tmp/search --set trials=4             any other search

Given again, it continues. Prints the wall time, the trainings that ran and the stages that were re-used, the best
trial, and which share of the trials' time was neither training nor evaluation. Then the best values and the thesis's
(alpha 0.5, gamma 2, the demo's number of frames for its 1,600) are trained with three seeds each and tested on night
scenes that the search has not seen. `benchmarks/results/search-TIME.json` keeps it all.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nightseg.metrics.seeds import deviation, mean
from nightseg.pipeline import run
from nightseg.pipeline.search import Found, Search, search
from nightseg.pipeline.search.trials import TRAINING, assignments
from nightseg.progress import Progress, progress_for
from nightseg.recipe import load_recipe, load_settings
from nightseg.storage import Workspace

PROJECT = Path(__file__).parents[1]
SEARCH = PROJECT / "configs/search.yaml"
MODEL = "adapted"
THESIS = {
    "models.adapted.loss.alpha": 0.5,
    "models.adapted.loss.gamma": 2.0,
    "models.adapted.self_training.select.count": 120,
}
UNSEEN = [
    "datasets.night_unseen={layout: scenes, count: 80, first: 9000, mix: {night: 1.0}}",
    "test_sets={unseen: night_unseen}",
    "models.adapted.seeds=[0, 1, 2]",
    "models.adapted.test=null",
]
# Trials that share two cores train with one worker; all of them come to their end, so that all times are known.
PLAIN = ["trials=12", "concurrent=2", "grace_epochs=99"]


def overhead(found: Found) -> dict[str, float]:
    """Of the trials: their seconds, and the share that no stage took, and that neither training nor test took."""
    whole, stages, trained = 0.0, 0.0, 0.0
    for row in found.trials:
        if row["end"] == "done":
            commits = Workspace(found.folder / "trials" / row["trial"]).commits()
            whole += row["seconds"]
            stages += sum(commit.seconds for commit in commits)
            trained += sum(commit.seconds for commit in commits if commit.stage in (TRAINING, "evaluate"))
    return {"seconds": whole, "outside stages": 1 - stages / whole, "outside training": 1 - trained / whole}


def unseen(found: Found, values: Mapping[str, Any], name: str, progress: Progress) -> dict[str, Any]:
    """mIoU on night scenes that no trial has seen, by seed."""
    recipe = load_recipe(found.folder / "recipe.yaml", [*assignments(values), *UNSEEN])
    place = found.folder / "unseen" / name
    results = run.run(recipe, place, only=MODEL, borrow=[found.folder / "shared"], progress=progress).results
    seeds = results["models"][MODEL]["tests"]["unseen"]["seeds"]
    return {
        "values": dict(values),
        "seeds": seeds,
        "mean": mean([*seeds.values()]),
        "std": deviation([*seeds.values()]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="of the search")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="a=b")
    parser.add_argument("--without-test", action="store_true", help="end with the search")
    asked = parser.parse_args()
    changes = ["compute.train.workers=1", *load_settings(Search, SEARCH).set]
    words = [*PLAIN, f"set={json.dumps(changes)}", *asked.overrides]
    progress, began = progress_for(), time.monotonic()
    found = search(str(SEARCH), words, run_dir=asked.folder, progress=progress)
    told: dict[str, Any] = {"wall": time.monotonic() - began, "cost": overhead(found)}
    told |= {"trainings": found.trainings, "reused": found.reused, "best": found.best, "trials": found.trials}
    print(
        f"{len(found.trials)} trials, {found.trainings} trainings, {found.reused} stages re-used: {told['wall']:.0f} s"
    )
    print(f"outside of training and evaluation {100 * told['cost']['outside training']:.1f} % of the trials' time, "
          f"outside of all stages {100 * told['cost']['outside stages']:.1f} %")  # fmt: skip
    print(f"best: {found.best['label']}, validation mIoU {100 * found.best['miou']:.1f} %")
    if not asked.without_test:
        told["unseen"] = {
            name: unseen(found, values, name, progress)
            for name, values in (("best", found.best["values"]), ("thesis", THESIS))
        }
        for name, one in told["unseen"].items():
            by_seed = ", ".join(f"{100 * score:.1f}" for score in one["seeds"].values())
            print(f"{name} on unseen night scenes: {100 * one['mean']:.1f} +- {100 * one['std']:.1f} % ({by_seed})")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / f"search-{datetime.now(UTC):%Y%m%d-%H%M%S}.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
