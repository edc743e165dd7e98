"""The card of a model as people and hubs read it: README.md beside its weights, by the conventions of Hugging Face."""

from __future__ import annotations

from typing import Any

import yaml

from nightseg.report import formatting
from nightseg.report.comparison import control_of, gain
from nightseg.report.frame_spread import gain_spread, miou_spread
from nightseg.report.run import Run
from nightseg.report.templates import template

METRICS = {"miou": "mean_iou", "pa": "accuracy", "ca": "mean_accuracy", "fwiou": "frequency_weighted_iou"}
NAMES = {"miou": "mIoU", "pa": "PA", "ca": "CA", "fwiou": "FWIoU"}


def model_card(run: Run, model: str, training: str) -> str:
    """Of one training of a model; its front matter is YAML. Scores are those of this training alone."""
    facts = run.results["models"][model]
    one = facts.get("trainings", {}).get(training, facts)
    commit = run.commit(one["model"])
    card = commit.json("model/model.json") if commit is not None and commit.has("model/model.json") else {}
    return template("model_card.md.j2", is_page=False).render(
        front=yaml.safe_dump(_front(run, facts, one, training), sort_keys=False, allow_unicode=True, width=120),
        run=run,
        name=training,
        facts=facts,
        seed=run.results["seed"] + one.get("seed", 0),
        card=card,
        kept=commit.summary.get("kept") if commit is not None else None,
        about=formatting.describe(facts),
        before=facts.get("line", [])[:-1],
        data=[(name, run.results.get("frames", {}).get(name)) for name in facts["train"]],
        tests=[(test, scores, _spread(run, model, test, training)) for test, scores in one["tests"].items()],
    )


def _front(run: Run, facts: dict[str, Any], one: dict[str, Any], name: str) -> dict[str, Any]:
    """What hubs index. The licence follows from the data and start of a model, so it is the owner's to fill in."""
    learned = [*facts["train"], *([facts["self_training"]["pool"]] if facts["self_training"] else [])]
    results = [
        {
            "task": {"type": "image-segmentation", "name": "Semantic segmentation"},
            "dataset": {"type": test, "name": test},
            "metrics": [
                {"type": kind, "name": NAMES[key], "value": round(100 * scores[key], 2)}
                for key, kind in METRICS.items()
                if scores.get(key) is not None
            ],
        }
        for test, scores in one["tests"].items()
    ]
    return {
        "library_name": "nightseg",
        "pipeline_tag": "image-segmentation",
        "license": "other",
        "license_name": "see-training-data",
        "tags": ["semantic-segmentation", "night", "driving", "nightseg"],
        "datasets": list(dict.fromkeys(learned)),
        "metrics": ["mean_iou", "accuracy"],
        "model-index": [{"name": name, "results": results}],
    }


def _spread(run: Run, model: str, test: str, training: str) -> dict[str, Any]:
    """The interval over frames and the gain over the control, of a model with one training; of several the report
    tells."""
    if len(run.results["models"][model].get("trainings", {training: None})) > 1:
        return dict.fromkeys(("interval", "control", "gain", "gain_interval"))
    control = control_of(run, model, test)
    return {
        "interval": miou_spread(run, model, test),
        "control": control,
        "gain": gain(run, model, control, test) if control else None,
        "gain_interval": gain_spread(run, model, control, test) if control else None,
    }
