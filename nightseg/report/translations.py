"""How good the translations are: one table, frames with most and least agreement."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nightseg.data import table as frame
from nightseg.report import formatting
from nightseg.report.comparison import control_of, gain
from nightseg.report.pictures import Picture, mask, photo, there
from nightseg.report.run import Row, Run, source_of

_THUMBNAIL = 240  # pixels: five of them stand side by side
_MATRICES = ("label_source", "label_translated", "label_back", "source_translated", "source_back")
_LOWER_IS_BETTER = ("fid", "kid")


def translation_table(run: Run) -> dict[str, Any]:
    """The table: rows of one source stand together, the untranslated one first; `best` is the best of each column.

    Scores are fractions, KID is as it is. A score that is not there (no labels, no way back) is None.
    """
    evaluated = run.results["translations"]
    rows: list[dict[str, Any]] = []
    floors: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for name in sorted(evaluated, key=lambda name: (evaluated[name]["source"], name)):
        entry = evaluated[name]
        same = tuple(entry[key] for key in ("source", "real", "segmenter", "extractor", "resize"))
        if same not in floors:
            floors[same] = [_floor_row(run, entry)]
            rows += floors[same]
        rows.append(_row(run, name, entry))
    return {
        "rows": rows,
        "best": {key: _best(rows, key) for key in _KEYS},
        "tests": run.tests if rows else [],
        "extractors": sorted({f"{entry['extractor']}, {entry['resize']}" for entry in evaluated.values()}),
    }


_KEYS = ("fid", "kid", "translated", "back", "survival", "pixels", "agreement", "edges")


def _floor_row(run: Run, entry: Mapping[str, Any]) -> dict[str, Any]:
    """The source as it is: the distances that a translation has to beat, and the segmenter's mIoU on it."""
    return dict.fromkeys(_KEYS) | {
        "name": entry["source"],
        "about": f"untranslated; real: {entry['real']}, segmenter: {entry['segmenter']}",
        "is_floor": True,
        "fid": entry["fid"]["source"],
        "kid": entry["kid"]["source"],
        "translated": entry["miou"]["source"],
        "models": {test: _downstream(run, [entry["segmenter"]], test) for test in run.tests},
    }


def _row(run: Run, name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "about": f"{entry['translator']} ({entry['kind']}), {formatting.plural(entry['frames'], 'frame')}",
        "is_floor": False,
        "fid": entry["fid"]["translated"],
        "kid": entry["kid"]["translated"],
        "translated": entry["miou"]["translated"],
        "back": entry["miou"]["back"],
        "survival": entry["survival"],
        "pixels": entry["agreement"]["pixels"],
        "agreement": entry["agreement"]["miou"],
        "edges": entry["edges"],
        "models": {test: _downstream(run, list(entry["models"]), test) for test in run.tests},
    }


def _downstream(run: Run, models: Sequence[str], test: str) -> list[tuple[str, float, float | None]]:
    """(model, mIoU, points over its control of equal steps) of those that were tested, in the order of training."""
    scored = [model for model in run.scored(test) if model in models]
    controls = {model: control_of(run, model, test) for model in scored}
    return [(model, run.miou(model, test), _points(run, model, controls[model], test)) for model in scored]


def _points(run: Run, model: str, control: str | None, test: str) -> float | None:
    return None if control is None else 100 * gain(run, model, control, test).mean


def _best(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values: list[float] = [row[key] for row in rows if not row["is_floor"] and row[key] is not None]
    if len(values) < 2:
        return None
    return min(values) if key in _LOWER_IS_BETTER else max(values)


# -- frames -----------------------------------------------------------------------------------------------------------


def extremes(run: Run, samples: int) -> list[dict[str, Any]]:
    """Of each evaluated translation the frames with most and least agreement: source, translation, masks."""
    found = []
    for name, entry in sorted(run.results["translations"].items()):
        ranked = sorted(
            run.rows(entry["node"], "frame_scores", drop=_MATRICES), key=lambda row: (row["agreement"], row["frame_id"])
        )
        count = min(max(1, samples // 2), len(ranked) // 2)
        groups = [("least agreement", ranked[:count]), ("most agreement", ranked[len(ranked) - count :][::-1])]
        shown = [row for _, rows in groups for row in rows]
        pictures = _pictures(run, name, entry, shown)
        found.append({"name": name, "groups": [(title, _there(pictures, rows)) for title, rows in groups]})
    return [part for part in found if any(rows for _, rows in part["groups"])]


def _there(pictures: Mapping[str, list[Picture]], rows: Sequence[Row]) -> list[list[Picture]]:
    return [found for row in rows if (found := pictures[row["frame_id"]])]


def _pictures(run: Run, name: str, entry: Mapping[str, Any], shown: Sequence[Row]) -> dict[str, list[Picture]]:
    """Frame id -> source, translation, way back, and what the segmenter saw in source and translation."""
    ids, sources = {row["frame_id"] for row in shown}, {row["source_id"] for row in shown}
    segmenter, back_ids = entry["segmenter"], {f"{name}.back/{frame_id}" for frame_id in ids}
    made = _by_id(run, f"translate/{name}", "frames", ids)
    back = _by_id(run, f"translate/{name}.back", "frames", back_ids)
    saw = _by_id(run, f"predict/{segmenter}.{entry['source']}", "predictions", sources)
    saw_made = _by_id(run, f"predict/{segmenter}.{name}", "predictions", ids)
    found = {}
    for row in shown:
        translated = made.get(row["frame_id"])
        source = source_of(run, translated) if translated else None
        agreement = f"{formatting.percent(row['agreement'], 0)} % of its pixels agree"
        found[row["frame_id"]] = there(
            photo(_uri(source), "source", row["source_id"], _THUMBNAIL),
            photo(_uri(translated), entry["to"], f"edges {row['edges']:.2f}", _THUMBNAIL),
            photo(_uri(back.get(f"{name}.back/{row['frame_id']}")), "and back", "", _THUMBNAIL),
            mask(saw.get(row["source_id"]), run.classes, f"{segmenter} on source", "", _THUMBNAIL),
            mask(saw_made.get(row["frame_id"]), run.classes, f"{segmenter} on {entry['to']}", agreement, _THUMBNAIL),
        )
    return found


def _by_id(run: Run, node: str, table: str, wanted: Collection[str]) -> dict[str, Row]:
    return {row[frame.FRAME_ID]: row for row in run.rows(node, table) if row[frame.FRAME_ID] in wanted}


def _uri(row: Row | None) -> str | None:
    return row[frame.URI] if row else None
