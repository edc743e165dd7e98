"""Trainings: what each model learned from, for how long and at which rates, and how it went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nightseg.report.charts import Chart, progress
from nightseg.report.run import Run


def trainings(run: Run) -> dict[str, Any] | None:
    """Rows of the table, shares of the classes in what was learned from, curves by epoch. None for a run without."""
    rows = [_row(run, name) for name in run.models if run.results["models"][name].get("training")]
    return {"rows": rows, "shares": _shares(run), "curves": _curves(run)} if rows else None


def _row(run: Run, name: str) -> dict[str, Any]:
    facts, known = run.results["models"][name], run.results.get("frames", {})
    training, weights = facts["training"], facts.get("weights") or {}
    nodes = run.trainings(name).values()
    commits = [run.results["commits"].get(node, {}) for node in nodes]
    summary = commits[0].get("summary", {}) if commits else {}
    steps = summary.get("steps", facts.get("steps"))
    return {
        "name": name,
        "data": [(dataset, known.get(dataset, {}).get("frames"), weights.get(dataset)) for dataset in facts["train"]],
        "pool": _pool(facts),
        "start": facts["start"],
        "steps": steps,
        "steps_in_all": facts.get("steps_in_all"),
        "epochs": training.get("epochs"),
        "batch": training.get("batch"),
        "rate": training.get("learning_rate"),
        "how": ", ".join(_schedule(training)),
        "kept": _kept(facts, summary),
        "seeds": len(commits),
        "seconds": sum(commit.get("seconds", 0.0) for commit in commits),
    }


def _schedule(training: Mapping[str, Any]) -> list[str]:
    found = [str(training[key]) for key in ("optimizer", "decay") if training.get(key)]
    if training.get("warmup_steps"):
        found.append(f"{training['warmup_steps']} steps of warm-up")
    if training.get("ema_decay"):
        found.append(f"EMA {training['ema_decay']:g}")
    return found


def _kept(facts: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """Which weights became the model."""
    best = summary.get("kept")
    if best is None:
        return "last"
    return f"best of validation on {' + '.join(facts.get('validate_on', []))}, epoch {best['epoch']}"


def _pool(facts: Mapping[str, Any]) -> str:
    learning = facts["self_training"]
    if not learning:
        return ""
    select = learning.get("select")
    how = f"{select['count']} of {learning['pool']}, {select['method']}" if select else learning["pool"]
    return f"{how} ({'online' if learning.get('mode') == 'online' else 'pseudo-labels'})"


def _shares(run: Run) -> dict[str, Any] | None:
    """Share of the labelled pixels by class, of every set that was learned from, pseudo-labels as far as kept, and of
    the test sets."""
    columns: list[tuple[str, list[float]]] = []
    known = run.results.get("frames", {})
    for name in dict.fromkeys(name for model in run.models for name in run.results["models"][model]["train"]):
        if known.get(name, {}).get("shares"):
            columns.append((name, known[name]["shares"]))
    num_train = len(columns)
    for model, entry in run.of_models("pseudo_labels"):
        kept = [entry["evidence"]["by_class"][name]["kept"] for name in run.classes.classes]
        columns.append((f"pseudo-labels of {model}", [count / max(sum(kept), 1) for count in kept]))
    for test in run.tests:
        labelled = [sum(row) for row in (run.score(run.scored(test)[0], test) or {})["confusion"]]
        columns.append((f"test: {test}", [count / max(sum(labelled), 1) for count in labelled]))
    if not num_train:
        return None
    rows = [
        (name, colour, [shares[place] for _, shares in columns])
        for place, (name, colour) in enumerate(zip(run.classes.classes, run.classes.palette, strict=True))
    ]
    return {"columns": [name for name, _ in columns], "rows": rows}


def _curves(run: Run) -> list[tuple[str, list[tuple[str, Chart]]]]:
    """Model -> loss and validation mIoU by step, a line a seed."""
    found = []
    for name in run.models:
        loss, validation = [], []
        for node in run.trainings(name).values():
            epochs = list(run.epochs(node))
            if any(step for step, _ in epochs):
                loss.append([(step, record["loss"]) for step, record in epochs])
            seen = [(step, (record.get("validation") or {}).get("miou")) for step, record in epochs]
            validation.append([(step, 100 * miou) for step, miou in seen if miou is not None])
        watched = " + ".join(run.results["models"][name].get("validate_on", [])) or "the validation set"
        drawn = [
            (title, progress(lines, description=f"{title} of {name}, by step"))
            for title, lines in (("loss", loss), (f"mIoU on {watched}, %", validation))
            if any(lines)
        ]
        if drawn:
            found.append((name, drawn))
    return found
