"""The pictures and charts of the page, section by section. A picture whose file is gone is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nightseg.data import table as frame
from nightseg.data.taxonomy import TRAIN_IDS
from nightseg.report import formatting
from nightseg.report.charts import Chart, curves, line, overlaid_histogram, scatter, stacked_histogram
from nightseg.report.pictures import (
    THUMBNAIL,
    Picture,
    frame_pixels,
    label_map_uri,
    label_pixels,
    mask,
    photo,
    photo_uri,
    tinted,
)
from nightseg.report.run import Row, Run, accuracy, by_accuracy, source_of, spread
from nightseg.report.sheets import strip_panels

_MAX_THUMBNAILS = 8


def strip(run: Run) -> list[Picture]:
    """The five pictures at the top."""
    return [Picture(photo_uri(panel.pixels), panel.title, panel.note) for panel in strip_panels(run)]


def splits(run: Run) -> list[dict[str, Any]]:
    """Day and night by histogram: where the frames lie, how the domains look, and the borderline cases."""
    found = []
    for name, evidence in sorted(run.results["splits"].items()):
        scores = evidence["scores"]
        limits = {
            f"\N{MINUS SIGN}{evidence['margin']:g}": -evidence["margin"],
            f"{evidence['margin']:g}": evidence["margin"],
        }
        found.append(
            {
                "name": name,
                "margin": evidence["margin"],
                "counts": evidence["counts"],
                "scores": stacked_histogram(
                    scores["edges"],
                    scores["counts"],
                    marks=limits,
                    description=f"Frames of {name} by score, from night (-1) to day (+1)",
                ),
                "luminance": curves(
                    evidence["histograms"],
                    x_range=(0, 255),
                    description=f"Mean luminance histogram of each domain of {name}",
                ),
                "borderline": _scored(
                    evidence["borderline"], lambda row: f"{row['domain']}, margin {row['margin']:.2f}"
                ),
            }
        )
    return found


def translations(run: Run, samples: int) -> list[dict[str, Any]]:
    """Frames beside what the translator made of them."""
    found = []
    for node in run.nodes("translate"):
        if "." in node:  # no dataset of the recipe: translations that were translated back
            continue
        rows = run.rows(node, "frames", limit=64)
        pairs = []
        for row in spread(rows, samples):
            source = source_of(run, row)
            before = photo(
                source[frame.URI] if source else None, "source", str(source[frame.FRAME_ID] if source else "")
            )
            after = photo(row[frame.URI], row[frame.DOMAIN])
            pairs.append([picture for picture in (before, after) if picture])
        found.append({"name": node.partition("/")[2], "pairs": [pair for pair in pairs if pair]})
    return found


def selections(run: Run, samples: int) -> list[dict[str, Any]]:
    """Which frames of the pool were chosen, by what score, and how the choice compares with chance."""
    found = []
    for model in run.models:
        if model not in run.results["selections"]:
            continue
        evidence = run.results["selections"][model]["evidence"]
        scores, fid = evidence["scores"], evidence["fid"]
        found.append(
            {
                "model": model,
                "evidence": evidence,
                "chart": overlaid_histogram(
                    scores["edges"],
                    scores["pool"],
                    scores["chosen"],
                    kinds=("pool", "chosen"),
                    marks={} if evidence["cut"] is None else {"cut": evidence["cut"]},
                    description=f"Frames of the pool by {evidence['method']} score, the chosen ones marked",
                ),
                "curve": distances_by_count(evidence),
                "plane": plane(evidence),
                "better": _share_of_gap(fid),
                "bound": _certificate(fid),
                "groups": [
                    (title, _scored(evidence[key][:samples], lambda row: f"score {row['score']:.4g}"))
                    for title, key in (
                        ("closest", "best"),
                        ("last chosen", "last_chosen"),
                        ("first left out", "first_left_out"),
                        ("farthest", "worst"),
                    )
                ],
            }
        )
    return found


def _share_of_gap(fid: Mapping[str, float | None]) -> str:
    """The choice against random choices, in words."""
    chosen, mean, spread = fid["selection"], fid["random_mean"], fid["random_sd"]
    if chosen is None or mean is None:
        return ""
    gap = mean - chosen
    sigmas = f", {abs(gap) / spread:.1f} standard deviations" if spread else ""
    return f"{abs(gap):.2f} {'below' if gap > 0 else 'above'} the mean of random choices of the same size{sigmas}"


def distances_by_count(evidence: Mapping[str, Any]) -> Chart | None:
    """FID against the number of frames, the chosen number marked."""
    curve = evidence["curve"]
    counts, values = curve["counts"], curve["fid"]
    if len(counts) < 2:
        return None
    return line(
        counts,
        values,
        kind="chosen",
        marks={f"{evidence['count']} chosen": evidence["count"]},
        description=f"FID to the reference of the first frames by {evidence['method']}, against their number",
    )


def plane(evidence: Mapping[str, Any]) -> Chart | None:
    """Pool, choice and reference on their first two principal components."""
    points = {kind: rows for kind, rows in evidence["plane"]["points"].items() if rows}
    shown = {kind: points[kind] for kind in ("pool", "reference", "chosen") if kind in points}
    return scatter(shown, description="Features of the frames on their first two principal components")


def _certificate(fid: Mapping[str, float | None]) -> str:
    """How far the choice can be from the best one, in words."""
    found, bound = fid.get("selection_biased"), fid.get("lower_bound")
    if found is None or bound is None:
        return ""
    ratio = f", {found / bound:.3f} times that" if bound > 0 else ""
    return (
        f"No choice of as many frames has an FID below {bound:.4g}; this one has {found:.4g}{ratio}"
        " (covariance divided by the number of frames)"
    )


def pseudo_labels(run: Run, samples: int) -> list[dict[str, Any]]:
    """What the teacher's labels keep of each class, its warnings, and some of them."""
    found = []
    for model in run.models:
        if model not in run.results["pseudo_labels"]:
            continue
        entry = run.results["pseudo_labels"][model]
        evidence = entry["evidence"]
        total = max(sum(facts["predicted"] for facts in evidence["by_class"].values()), 1)
        rows = [
            {
                "name": name,
                "colour": colour,
                "of_all": evidence["by_class"][name]["predicted"] / total,
                **evidence["by_class"][name],
            }
            for name, colour in zip(run.classes.classes, run.classes.palette, strict=True)
        ]
        found.append(
            {
                "model": model,
                "evidence": evidence,
                "rule": formatting.threshold(evidence["threshold"]),
                "classes": rows,
                "samples": [_labelled_frame(run, *pair) for pair in _labelled_rows(run, entry["node"], samples)],
            }
        )
    return found


def _labelled_rows(run: Run, node: str, samples: int) -> list[tuple[Row, Row]]:
    frames = run.rows(node, "frames", limit=64)
    facts = run.rows(node, "labels", limit=64, drop=["histogram"])
    return spread(list(zip(frames, facts, strict=True)), samples)


def _labelled_frame(run: Run, row: Row, facts: Row) -> list[Picture]:
    image = frame_pixels(row[frame.URI])
    label = label_pixels(row[frame.LABEL_URI], TRAIN_IDS, run.classes)
    confidence = photo(facts["confidence_uri"], "confidence", "white = certain")
    pictures = []
    if image is not None:
        pictures.append(Picture(photo_uri(image, THUMBNAIL), "night frame", str(row[frame.FRAME_ID])))
    if image is not None and label is not None:
        kept = f"{formatting.percent(facts['kept'], 0)} % kept"
        pictures.append(Picture(photo_uri(tinted(image, label, run.classes), THUMBNAIL), "pseudo-label", kept))
    return pictures + ([confidence] if confidence else [])


def test_samples(run: Run, test: str, samples: int) -> dict[str, Any]:
    """Frames from the best model's worst to its best, each with its label and every model's prediction."""
    models, best = run.scored(test), run.best(test)
    by_model = {model: {row[frame.FRAME_ID]: row for row in run.predictions(model, test)} for model in models}
    ranked = by_accuracy(list(by_model[best].values()))
    rows = []
    for row in spread(ranked, samples):
        image = photo(row[frame.URI], "frame", str(row[frame.FRAME_ID]))
        label = label_pixels(row[frame.LABEL_URI], row[frame.LABEL_ENCODING], run.classes)
        pictures = [image] if image else []
        if label is not None:
            pictures.append(Picture(label_map_uri(label, run.classes, THUMBNAIL), "label", "", True))
        for model in models:
            guess = by_model[model].get(row[frame.FRAME_ID])
            right = f"{formatting.percent(accuracy(guess), 0)} % of its pixels right" if guess else ""
            seen = mask(guess, run.classes, model, right)
            pictures += [seen] if seen else []
        rows.append(pictures)
    return {"test": test, "best": best, "frames": len(ranked), "rows": [row for row in rows if row]}


def predictions(run: Run, samples: int) -> list[dict[str, Any]]:
    """Frames without labels, as the models of the recipe's `predictions` see them."""
    found = []
    for name, entry in sorted(run.results["predictions"].items()):
        pairs = []
        for row in spread(run.rows(entry["node"], "predictions", limit=64), samples):
            image = frame_pixels(row[frame.URI])
            label = label_pixels(row["prediction_uri"], TRAIN_IDS, run.classes)
            if image is not None and label is not None:
                sure = f"mean confidence {formatting.percent(row['mean_confidence'], 0)} %"
                pairs.append(
                    [
                        Picture(photo_uri(image, THUMBNAIL), "frame", str(row[frame.FRAME_ID])),
                        Picture(photo_uri(tinted(image, label, run.classes), THUMBNAIL), entry["model"], sure),
                    ]
                )
        found.append({"name": name, "model": entry["model"], "dataset": entry["dataset"], "pairs": pairs})
    return found


def _scored(rows: list[Row], detail: Any) -> list[Picture]:
    pictures = (photo(row[frame.URI], str(row[frame.FRAME_ID]), detail(row)) for row in rows[:_MAX_THUMBNAILS])
    return [picture for picture in pictures if picture]
