"""How good the translations are: one table, frames with most and least agreement, one sheet."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nightseg.data import table as frame
from nightseg.data.images import encode_png
from nightseg.data.taxonomy import TRAIN_IDS
from nightseg.report import formatting
from nightseg.report.gallery import Picture
from nightseg.report.pictures import frame_pixels, label_map_uri, label_pixels, photo_uri
from nightseg.report.run import Row, Run
from nightseg.report.strip import source_of
from nightseg.storage import Location, UserError

_THUMBNAIL = 240  # pixels: five of them stand side by side
_MATRICES = ("label_source", "label_translated", "label_back", "source_translated", "source_back")
_LOWER_IS_BETTER = ("fid", "kid")
_SHEET_GAP, _SHEET_HEAD = 6, 26  # pixels
_INK, _PAPER = (87, 96, 106), (255, 255, 255)


def translation_table(run: Run) -> dict[str, Any]:
    """The table: rows of one source stand together, the untranslated one first; `best` is the best of each column.

    Scores are fractions, KID is as it is. A score that is not there (no labels, no way back) is None.
    """
    evaluated = run.results.get("translations", {})  # results of older versions have none
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
        "models": {test: _downstream(run, [entry["segmenter"]], test, None) for test in run.tests},
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
        "models": {test: _downstream(run, list(entry["models"]), test, entry["segmenter"]) for test in run.tests},
    }


def _downstream(
    run: Run, models: Sequence[str], test: str, segmenter: str | None
) -> list[tuple[str, float, float | None]]:
    """(model, mIoU, points over the segmenter) of those that were tested, in the order of their training."""
    scored = [model for model in run.models if model in models and run.score(model, test)]
    before = run.miou(segmenter, test) if segmenter in run.models and run.score(str(segmenter), test) else None
    reached = [(model, run.miou(model, test)) for model in scored]
    return [(model, miou, None if before is None else 100 * (miou - before)) for model, miou in reached]


def _best(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values: list[float] = [row[key] for row in rows if not row["is_floor"] and row[key] is not None]
    if len(values) < 2:
        return None
    return min(values) if key in _LOWER_IS_BETTER else max(values)


# -- frames -----------------------------------------------------------------------------------------------------------


def extremes(run: Run, samples: int) -> list[dict[str, Any]]:
    """Of each evaluated translation the frames with most and least agreement: source, translation, masks."""
    found = []
    for name, entry in sorted(run.results.get("translations", {}).items()):
        ranked = sorted(
            run.rows(entry["node"], "frame_scores", drop=_MATRICES), key=lambda row: (row["agreement"], row["frame_id"])
        )
        count = min(max(1, samples // 2), len(ranked) // 2)
        groups = [("least agreement", ranked[:count]), ("most agreement", ranked[len(ranked) - count :][::-1])]
        shown = [row for _, rows in groups for row in rows]
        pictures = _pictures(run, name, entry, shown)
        filled = [(title, [pictures[row["frame_id"]] for row in rows]) for title, rows in groups]
        found.append({"name": name, "groups": [(title, [row for row in rows if row]) for title, rows in filled]})
    return [part for part in found if any(rows for _, rows in part["groups"])]


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
        candidates = [
            _photo(source, "source", row["source_id"]),
            _photo(translated, entry["to"], f"edges {row['edges']:.2f}"),
            _photo(back.get(f"{name}.back/{row['frame_id']}"), "and back", ""),
            _mask(run, saw.get(row["source_id"]), f"{segmenter} on source", ""),
            _mask(
                run,
                saw_made.get(row["frame_id"]),
                f"{segmenter} on {entry['to']}",
                f"{formatting.percent(row['agreement'], 0)} % of its pixels agree",
            ),
        ]
        found[row["frame_id"]] = [picture for picture in candidates if picture]
    return found


def _by_id(run: Run, node: str, table: str, wanted: Collection[str]) -> dict[str, Row]:
    return {row[frame.FRAME_ID]: row for row in run.rows(node, table) if row[frame.FRAME_ID] in wanted}


def _photo(row: Row | None, caption: str, detail: str) -> Picture | None:
    pixels = frame_pixels(row[frame.URI]) if row else None
    return None if pixels is None else Picture(photo_uri(pixels, _THUMBNAIL), caption, detail)


def _mask(run: Run, row: Row | None, caption: str, detail: str) -> Picture | None:
    mask = label_pixels(row["prediction_uri"], TRAIN_IDS, run.classes) if row else None
    return None if mask is None else Picture(label_map_uri(mask, run.classes, _THUMBNAIL), caption, detail, True)


# -- a sheet for a note or a README -----------------------------------------------------------------------------------


def translation_sheet(
    run_folder: Location, results: Mapping[str, Any], file: Location, frames: int = 6, width: int = 320
) -> Location:
    """Write a PNG: a row for each of `frames` source frames, evenly over their dataset, a column for each translation.

    The source with the most translations is shown. Raises UserError: the run has no translation of which source and
    image are still there.
    """
    run = Run(run_folder, results)
    names = [node.partition("/")[2] for node in run.nodes("translate") if "." not in node]
    made = {name: {_source_id(row): row for row in run.rows(f"translate/{name}", "frames")} for name in names}
    groups: dict[frozenset[str], list[str]] = {}
    for name, by_source in made.items():
        groups.setdefault(frozenset(by_source), []).append(name)
    ids, columns = max(groups.items(), key=lambda group: len(group[1]), default=(frozenset(), []))
    chosen = [sorted(ids)[place] for place in np.linspace(0, len(ids) - 1, min(frames, len(ids))).round().astype(int)]
    lines = []
    for source_id in chosen:
        rows = [made[name][source_id] for name in columns]
        pictures = [frame_pixels(row[frame.URI] if row else None) for row in (source_of(run, rows[0]), *rows)]
        if all(picture is not None for picture in pictures):
            lines.append([_fitted(picture, width) for picture in pictures if picture is not None])
    if not lines:
        raise UserError(f"{run_folder.uri}: no translated frame that is there with its source")
    file.write_bytes(encode_png(_tiled(lines, ["source", *columns], width)))
    return file


def _source_id(row: Row) -> str:
    return str(row[frame.FRAME_ID]).removeprefix(f"{row[frame.DATASET]}/")


def _fitted(pixels: Any, width: int) -> Image.Image:
    picture = Image.fromarray(pixels)
    return picture.resize((width, max(1, round(picture.height * width / picture.width))), Image.Resampling.LANCZOS)


def _tiled(lines: Sequence[Sequence[Image.Image]], titles: Sequence[str], width: int) -> np.ndarray[Any, Any]:
    heights = [max(picture.height for picture in line) for line in lines]
    size = (len(titles) * (width + _SHEET_GAP) - _SHEET_GAP, _SHEET_HEAD + sum(heights) + _SHEET_GAP * (len(lines) - 1))
    canvas = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(15)
    for column, title in enumerate(titles):
        place = (column * (width + _SHEET_GAP) + width / 2, _SHEET_HEAD / 2)
        draw.text(place, title, _INK, font, anchor="mm")
    top = _SHEET_HEAD
    for line, height in zip(lines, heights, strict=True):
        for column, picture in enumerate(line):
            canvas.paste(picture, (column * (width + _SHEET_GAP), top))
        top += height + _SHEET_GAP
    return np.asarray(canvas)
