"""The pictures and charts of the page, section by section. A picture whose file is gone is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nightseg.data import table as frame
from nightseg.data.taxonomy import TRAIN_IDS
from nightseg.report import formatting
from nightseg.report.charts import curves, stacked_histogram
from nightseg.report.pictures import (
    THUMBNAIL,
    Picture,
    confidence,
    label_map_uri,
    label_of,
    label_pixels,
    mask,
    photo,
    photo_uri,
    there,
    tinted_photo,
)
from nightseg.report.run import Row, Run, accuracy, by_accuracy, source_of, spread, taught
from nightseg.report.sheets import strip_panels

_MAX_THUMBNAILS = 8


def strip(run: Run) -> list[Picture]:
    """The five pictures at the top."""
    return [Picture(photo_uri(panel.pixels), panel.title, panel.note) for panel in strip_panels(run)]


def splits(run: Run) -> list[dict[str, Any]]:
    """Day and night by histogram: where the frames lie, how the domains look, and the borderline cases."""
    found = []
    for name, evidence in sorted(run.results["splits"].items()):
        scores, margin = evidence["scores"], evidence["margin"]
        by_score = stacked_histogram(
            scores["edges"],
            scores["counts"],
            marks={f"\N{MINUS SIGN}{margin:g}": -margin, f"{margin:g}": margin},
            description=f"Frames of {name} by score, from night (-1) to day (+1)",
        )
        description = f"Mean luminance histogram of each domain of {name}"
        luminance = curves(evidence["histograms"], x_range=(0, 255), description=description)
        borderline = scored(evidence["borderline"], lambda row: f"{row['domain']}, margin {row['margin']:.2f}")
        found.append({**evidence, "name": name, "scores": by_score, "luminance": luminance, "borderline": borderline})
    return found


def translations(run: Run, samples: int) -> list[dict[str, Any]]:
    """Frames beside what the translator made of them."""
    found = []
    for node in run.nodes("translate"):
        if "." in node:  # no dataset of the recipe: translations that were translated back
            continue
        pairs = []
        for row in spread(run.rows(node, "frames", limit=64), samples):
            source = source_of(run, row)
            before = photo(source[frame.URI], "source", str(source[frame.FRAME_ID])) if source else None
            pairs.append(there(before, photo(row[frame.URI], row[frame.DOMAIN])))
        found.append({"name": node.partition("/")[2], "pairs": [pair for pair in pairs if pair]})
    return [*found, *_rendered_anew(run)]


def _rendered_anew(run: Run) -> list[dict[str, Any]]:
    """Frames of train sets that are translated anew with every sample: some of what trainings saw of them."""
    found: dict[str, dict[str, list[Row]]] = {}
    for node in run.nodes("train_segmenter"):
        rows = run.rows(node, "rendered")
        for part in dict.fromkeys(row["part"] for row in rows):
            if part not in found:  # models that share a train set see it alike
                mine = [row for row in rows if row["part"] == part]
                found[part] = {name: [row for row in mine if row["frame_id"] == name] for name in
                               dict.fromkeys(row["frame_id"] for row in mine)}  # fmt: skip
    return [
        {
            "name": f"{part}, anew with every sample",
            "pairs": [
                there(
                    photo(rows[0][frame.URI], "source", name), *(photo(row["rendering_uri"], "night") for row in rows)
                )
                for name, rows in frames.items()
            ],
        }
        for part, frames in found.items()
    ]


def pseudo_labels(run: Run, samples: int) -> list[dict[str, Any]]:
    """What the teacher's labels keep of each class, its warnings, and some of them."""
    found = []
    for model, entry in run.of_models("pseudo_labels"):
        evidence = entry["evidence"]
        by_class = evidence["by_class"]
        total = max(sum(facts["predicted"] for facts in by_class.values()), 1)
        rows = [
            {"name": name, "colour": colour, "of_all": by_class[name]["predicted"] / total, **by_class[name]}
            for name, colour in zip(run.classes.classes, run.classes.palette, strict=True)
        ]
        shown = spread(taught(run, entry, limit=64), samples)
        found.append(
            {
                "model": model,
                "evidence": evidence,
                "warnings": _warnings(run, model, entry),
                "rule": formatting.threshold(evidence["threshold"]),
                "classes": rows,
                "samples": [_labelled_frame(run, *pair) for pair in shown],
            }
        )
    return found


def _warnings(run: Run, model: str, entry: Mapping[str, Any]) -> list[str]:
    """Those of the labels shown, and of the labels for other seeds, where these have their own."""
    found: list[str] = list(entry["evidence"]["warnings"])
    for name, node in run.trainings(model, "pseudo_label").items():
        commit = run.commit(node)
        if node != entry["node"] and commit is not None:
            found += [f"{name}: {text}" for text in commit.json("evidence.json")["warnings"]]
    return found


def _labelled_frame(run: Run, row: Row, facts: Row) -> list[Picture]:
    kept = f"{formatting.percent(facts['kept'], 0)} % kept"
    return there(
        photo(row[frame.URI], "night frame", str(row[frame.FRAME_ID])),
        tinted_photo(row[frame.URI], label_of(row, run.classes), run.classes, "pseudo-label", kept),
        confidence(row, "confidence"),
    )


def test_samples(run: Run, test: str, samples: int) -> dict[str, Any]:
    """Frames from the best model's worst to its best, each with its label and every model's prediction."""
    best = run.best(test)
    ranked = by_accuracy(run.predictions(best, test))
    rows = _beside_labels(run, test, spread(ranked, samples), run.scored(test))
    return {"test": test, "best": best, "frames": len(ranked), "rows": rows}


def worst_frames(run: Run, test: str, models: list[str], samples: int) -> list[list[Picture]]:
    """The frames with the fewest right pixels of the last of these models, with the label and what each model saw."""
    return _beside_labels(run, test, by_accuracy(run.predictions(models[-1], test))[:samples], models)


def _beside_labels(run: Run, test: str, rows: list[Row], models: list[str]) -> list[list[Picture]]:
    """A line of pictures for each frame: itself, its label, predictions."""
    by_model = {model: {row[frame.FRAME_ID]: row for row in run.predictions(model, test)} for model in models}
    lines = []
    for row in rows:
        label = label_pixels(row[frame.LABEL_URI], row[frame.LABEL_ENCODING], run.classes)
        guesses = [(model, by_model[model].get(row[frame.FRAME_ID])) for model in models]
        lines.append(
            there(
                photo(row[frame.URI], "frame", str(row[frame.FRAME_ID])),
                None if label is None else Picture(label_map_uri(label, run.classes, THUMBNAIL), "label", "", True),
                *(mask(guess, run.classes, model, _right(guess)) for model, guess in guesses),
            )
        )
    return [line for line in lines if line]


def _right(guess: Row | None) -> str:
    return f"{formatting.percent(accuracy(guess), 0)} % of its pixels right" if guess else ""


def predictions(run: Run, samples: int) -> list[dict[str, Any]]:
    """Frames without labels, as the models of the recipe's `predictions` see them."""
    found = []
    for name, entry in sorted(run.results["predictions"].items()):
        pairs = []
        for row in spread(run.rows(entry["node"], "predictions", limit=64), samples):
            sure = f"mean confidence {formatting.percent(row['mean_confidence'], 0)} %"
            label = label_pixels(row["prediction_uri"], TRAIN_IDS, run.classes)
            seen = tinted_photo(row[frame.URI], label, run.classes, entry["model"], sure)
            if seen is not None:
                pairs.append(there(photo(row[frame.URI], "frame", str(row[frame.FRAME_ID])), seen))
        found.append({**entry, "name": name, "pairs": pairs})
    return found


def scored(rows: list[Row], detail: Callable[[Row], str]) -> list[Picture]:
    """Some frames with what is known of each."""
    return there(*(photo(row[frame.URI], str(row[frame.FRAME_ID]), detail(row)) for row in rows[:_MAX_THUMBNAILS]))
