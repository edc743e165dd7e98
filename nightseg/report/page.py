"""The page: what the numbers say, in the order a reader asks for it. Layout lives in the templates beside this file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from nightseg.metrics.bootstrap import FrameSpread
from nightseg.report import formatting, gallery, translations
from nightseg.report.ablation import ablation
from nightseg.report.comparison import control_of, headline, model_to_use
from nightseg.report.frame_spread import miou_spread
from nightseg.report.published import claims, published
from nightseg.report.run import Run
from nightseg.report.selections import selections
from nightseg.report.templates import template
from nightseg.report.trainings import trainings
from nightseg.storage import Location

REPORT_NAME = "report.html"
METRICS = {"miou": "mIoU", "pa": "PA", "ca": "CA", "fwiou": "FWIoU"}

_NUM_CONFUSIONS = 6
_LISTED = 20  # quarantined frames shown before the fold


def write_report(
    run_folder: Location, results: Mapping[str, Any], samples: int = 4, place: Location | None = None
) -> Location:
    """Write `report.html` into the run folder, or to `place`: self-contained, opens without a network. Returns where.

    `results` is the content of results.json; pictures come from the commits that it names, `samples` of each kind.
    What a run does not have (no translator, no labels, frames that were deleted) is left out of the page.
    """
    run = Run(run_folder, results)
    page = template("report.html.j2").render(
        run=run,
        results=results,
        headline=headline(run),
        tiles=tiles(run),
        strip=gallery.strip(run),
        metrics=METRICS,
        scores=score_table(run),
        published=published(run),
        claims=claims(run),
        helped=ablation(run, samples),
        heat=[heat(run, test) for test in run.tests],
        splits=gallery.splits(run),
        evaluated=translations.translation_table(run),
        extremes=translations.extremes(run, samples),
        translations=gallery.translations(run, samples),
        selections=selections(run, samples),
        trainings=trainings(run),
        model_to_use=model_to_use(run) if run.models else None,
        pseudo_labels=gallery.pseudo_labels(run, samples),
        tests=[gallery.test_samples(run, test, samples) for test in run.tests],
        predictions=gallery.predictions(run, samples),
        leaks=results.get("leaks", []),
        failed=results.get("failed", []),
        quarantine=quarantine(run),
        stages=stages(run),
    )  # fmt: skip
    place = place or run_folder / REPORT_NAME
    place.write_bytes(page.encode())
    return place


# -- numbers ---------------------------------------------------------------------------------------------------------


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(figure, what it counts, detail)."""
    commits = run.results["commits"].values()
    found = []
    labelled = [entry["evidence"] for entry in run.results["pseudo_labels"].values()]
    if labelled:
        frames = max(evidence["frames"] for evidence in labelled)
        share = formatting.percent(labelled[-1]["kept_share"])
        found.append((formatting.count(frames), "frames labelled by a teacher", f"{share} % of their pixels kept"))
    tested = {test: run.score(run.scored(test)[0], test) for test in run.tests}
    if tested:
        frames = sum(scores["frames"] for scores in tested.values() if scores)
        found.append(
            (formatting.count(frames), "labelled test frames", f"in {formatting.plural(len(tested), 'test set')}")
        )
    seconds = sum(facts["seconds"] for facts in commits)
    found.append((formatting.duration(seconds), "of work", f"in {formatting.plural(len(commits), 'stage')}"))
    bad = sum(facts["quarantined"] for facts in commits)
    found.append(
        (formatting.count(bad), "bad frames set aside", "with their reasons below" if bad else "none was lost")
    )
    return found


class Cell(NamedTuple):
    """One model on one test set; scores are fractions, means over the seeds; published numbers are percent."""

    scores: Mapping[str, float]
    std: float | None  # of mIoU over the seeds
    is_best: bool
    row: str
    published: float | None
    difference: float | None  # points, ours minus published
    spread: FrameSpread | None  # of mIoU, over the frames


def score_table(run: Run) -> dict[str, Any]:
    """Models by test sets."""
    cells = {model: {test: _cell(run, model, test) for test in run.tests} for model in run.models}
    rows = [
        {"name": model, "about": formatting.describe(run.results["models"][model]), "cells": cells[model]}
        for model in cells
    ]
    published = {
        test: any((run.score(model, test) or {}).get("published_miou") is not None for model in run.models)
        for test in run.tests
    }
    return {"rows": rows, "published": published}


def _cell(run: Run, model: str, test: str) -> Cell | None:
    scores = run.score(model, test)
    if scores is None:
        return None
    published = scores.get("published_miou")
    mean, std, is_best = run.mean(model, test), run.std(model, test), model == run.best(test)
    difference = None if published is None else 100 * mean["miou"] - published
    row = scores.get("row") or ""
    spread = miou_spread(run, model, test)
    return Cell({key: mean[key] for key in METRICS}, std, is_best, row, published, difference, spread)


def heat(run: Run, test: str) -> dict[str, Any]:
    """IoU of every class and model on one test set, how common the class is, and what the best model confuses."""
    models = run.scored(test)
    best = run.best(test)
    control = control_of(run, best, test)
    labelled = [sum(row) for row in (run.score(best, test) or {})["confusion"]]
    rows = []
    for name, colour, pixels in zip(run.classes.classes, run.classes.palette, labelled, strict=True):
        values = {model: run.mean(model, test)["iou"].get(name) for model in models}
        change = None if control is None or None in (values[best], values[control]) else values[best] - values[control]
        share = pixels / max(sum(labelled), 1)
        rows.append({"name": name, "colour": colour, "share": share, "values": values, "change": change})
    return {
        "test": test,
        "models": models,
        "rows": rows,
        "compared": None if control is None else (control, best),
        "best": best,
        "confusions": confusions(run, best, test),
        "matrices": [
            (model, matrix(run, model, test), len(run.by_seed(model, test))) for model in filter(None, (best, control))
        ],
    }


def matrix(run: Run, model: str, test: str) -> list[tuple[str, Any, list[float | None], int]]:
    """A row for each class of the labels: its name, colour, shares of its pixels by predicted class, and their number.
    The last column, where there is one, is of pixels that are predicted as no class."""
    counts = (run.score(model, test) or {})["confusion"]
    return [
        (name, colour, [count / sum(row) if sum(row) else None for count in row], sum(row))
        for name, colour, row in zip(run.classes.classes, run.classes.palette, counts, strict=True)
    ]


def confusions(run: Run, model: str, test: str) -> list[tuple[str, str, float]]:
    """(class, what it is taken for, share of the class's pixels): the confusions that cost the most pixels."""
    matrix, names = (run.score(model, test) or {})["confusion"], run.classes.classes
    wrong = [
        (pixels, names[label], names[guess], pixels / sum(row))
        for label, row in enumerate(matrix)
        for guess, pixels in enumerate(row[: len(names)])
        if label != guess and pixels
    ]
    return [(label, guess, share) for _, label, guess, share in sorted(wrong, reverse=True)[:_NUM_CONFUSIONS]]


def quarantine(run: Run) -> dict[str, Any]:
    """Frames set aside: how many for which reason, and the rows."""
    rows = run.results["quarantine"]
    total = sum(facts["quarantined"] for facts in run.results["commits"].values())
    return {
        "total": total,
        "reasons": Counter(row["reason"] for row in rows).most_common(),
        "first": rows[:_LISTED],
        "rest": rows[_LISTED:],
        "unlisted": total - len(rows),
    }


def stages(run: Run) -> list[dict[str, Any]]:
    """Every commit with its counts, in the order of the work; `share` is its part of the longest stage's time."""
    commits = run.results["commits"]
    longest = max((facts["seconds"] for facts in commits.values()), default=0.0) or 1.0
    return [
        {"node": node, "share": commits[node]["seconds"] / longest, "kind": node.partition("/")[0], **commits[node]}
        for node in run.order
    ]
