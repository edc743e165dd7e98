"""Pictures for a README or a note: the strip (day, its night, real night, pseudo-label, prediction) and the sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nightseg.data import table as frame
from nightseg.data.images import encode_jpeg, encode_png
from nightseg.data.taxonomy import TRAIN_IDS
from nightseg.report.pictures import UInt8, frame_pixels, label_of, label_pixels, tinted
from nightseg.report.run import Row, Run, by_accuracy, source_id, source_of, spread, taught
from nightseg.storage import Commit, Location, UserError

_CANDIDATES = 64  # frames among which the ones to show are chosen

_GAP = 10  # pixels of the README's strip
_CAPTION = 34
_SHEET_GAP, _SHEET_HEAD = 6, 26  # pixels
_CONTACTS, _ABREAST, _CONTACT = 60, 6, 190  # frames, frames in a line, pixels of one
_INK, _PAPER = (87, 96, 106), (255, 255, 255)


class Panel(NamedTuple):
    """One picture of the strip."""

    title: str
    note: str  # which frame and which model
    pixels: UInt8  # (H, W, 3)


def strip_image(run_folder: Location, results: Mapping[str, Any], file: Location, height: int = 220) -> Location:
    """Write the strip as a PNG: panels of `height` pixels side by side, their titles below. For a README.

    Raises UserError when the run has none of the pictures.
    """
    panels = strip_panels(Run(run_folder, results))
    if not panels:
        raise UserError(
            f"{run_folder.uri}: no picture for a strip",
            cure="use a run with translations or predictions whose files exist",
        )
    pictures = [_scaled(panel.pixels, height) for panel in panels]
    width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, height + _CAPTION), _PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    left = 0
    for panel, picture in zip(panels, pictures, strict=True):
        canvas.paste(picture, (left, 0))
        draw.text((left + picture.width / 2, height + _CAPTION / 2 + 2), panel.title, _INK, font, anchor="mm")
        left += picture.width + _GAP
    file.write_bytes(encode_png(np.asarray(canvas)))
    return file


def strip_panels(run: Run) -> list[Panel]:
    """Those of the five pictures that the run has."""
    return [panel for panel in (*_translation(run), *_pseudo_label(run), _prediction(run)) if panel is not None]


def _translation(run: Run) -> list[Panel | None]:
    for node in run.nodes("translate"):
        rows = [row for row in run.rows(node, "frames", _CANDIDATES) if row[frame.DOMAIN] == "night"]
        if rows:
            row = rows[len(rows) // 2]
            source = source_of(run, row)
            return [
                _panel("day", source[frame.FRAME_ID] if source else "", source[frame.URI] if source else None),
                _panel("its night", f"translated, label kept, {node.partition('/')[2]}", row[frame.URI]),
            ]
    return []


def _pseudo_label(run: Run) -> list[Panel | None]:
    labelled = dict(run.of_models("pseudo_labels"))
    if not labelled:
        return []
    preferred = run.best(run.main_test) if run.main_test else None
    entry = labelled.get(preferred or "", list(labelled.values())[-1])
    frames = taught(run, entry, _CANDIDATES)
    if not frames:
        return []
    # The one with most classes to see; the first of equals.
    row = max(frames, key=lambda pair: _num_classes(pair[1]))[0]
    image, label = frame_pixels(row[frame.URI]), label_of(row, run.classes)
    if image is None or label is None:
        return []
    note = f"teacher {entry['evidence']['teacher']['name']}, grey = ignored"
    return [
        Panel("real night", str(row[frame.FRAME_ID]), image),
        Panel("pseudo-label", note, tinted(image, label, run.classes)),
    ]


def _num_classes(facts: Row) -> int:
    """Classes that keep at least half a percent of the frame."""
    total = sum(facts["counts"])
    return sum(kept > 0.005 * total for kept in facts["kept_counts"])


def _prediction(run: Run) -> Panel | None:
    """The best model on the frame of middle accuracy: neither the best nor the worst it can do."""
    if run.main_test is None:
        return None
    model = run.best(run.main_test)
    ranked = by_accuracy(run.predictions(model, run.main_test))
    if not ranked:
        return None
    row = ranked[len(ranked) // 2]
    image, label = frame_pixels(row[frame.URI]), label_pixels(row["prediction_uri"], TRAIN_IDS, run.classes)
    if image is None or label is None:
        return None
    return Panel(
        "prediction", f"{model}, frame of median accuracy in {run.main_test}", tinted(image, label, run.classes)
    )


def _panel(title: str, note: str, uri: str | None) -> Panel | None:
    pixels = frame_pixels(uri)
    return None if pixels is None else Panel(title, note, pixels)


def _scaled(pixels: UInt8, height: int) -> Image.Image:
    picture = Image.fromarray(pixels)
    return picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.LANCZOS)


def translation_sheet(
    run_folder: Location, results: Mapping[str, Any], file: Location, frames: int = 6, width: int = 320
) -> Location:
    """Write a PNG: a row for each of `frames` source frames, evenly over their dataset, a column for each translation.

    The source with the most translations is shown. Raises UserError: the run has no translation of which source and
    image are still there.
    """
    run = Run(run_folder, results)
    names = [node.partition("/")[2] for node in run.nodes("translate") if "." not in node]
    made = {name: {source_id(row): row for row in run.rows(f"translate/{name}", "frames")} for name in names}
    groups: dict[frozenset[str], list[str]] = {}
    for name, by_source in made.items():
        groups.setdefault(frozenset(by_source), []).append(name)
    ids, columns = max(groups.items(), key=lambda group: len(group[1]), default=(frozenset(), []))
    chosen = [sorted(ids)[place] for place in np.linspace(0, len(ids) - 1, min(frames, len(ids))).round().astype(int)]
    lines = []
    for chosen_id in chosen:
        rows = [made[name][chosen_id] for name in columns]
        pictures = [frame_pixels(row[frame.URI] if row else None) for row in (source_of(run, rows[0]), *rows)]
        if all(picture is not None for picture in pictures):
            lines.append([_fitted(picture, width) for picture in pictures if picture is not None])
    if not lines:
        raise UserError(
            f"{run_folder.uri}: no translated frame that is there with its source",
            cure="use a run whose translations and datasets still exist",
        )
    file.write_bytes(encode_png(_tiled(lines, ["source", *columns], width)))
    return file


def contact_sheet(run: Run, selection: Commit) -> bytes:
    """A JPEG of at most 60 of the chosen frames, evenly over their ranks, with rank and name.

    Raises UserError: none of them can be read.
    """
    rows = spread(frame.resolve(selection.table("frames"), selection.folder).to_pylist(), _CONTACTS)
    font, cells = ImageFont.load_default(11), []
    for row in rows:
        pixels = frame_pixels(row[frame.URI])
        if pixels is None:
            continue
        picture = _fitted(pixels, _CONTACT)
        cell = Image.new("RGB", (_CONTACT, picture.height + 18), _PAPER)
        cell.paste(picture, (0, 0))
        ImageDraw.Draw(cell).text(
            (1, picture.height + 9), f"{row['rank']}  {row[frame.FRAME_ID]}"[-28:], _INK, font, "lm"
        )
        cells.append(cell)
    if not cells:
        raise UserError(f"{run.folder.uri}: none of the chosen frames can be read", cure="look at their files")
    lines = [cells[start : start + _ABREAST] for start in range(0, len(cells), _ABREAST)]
    return encode_jpeg(_tiled(lines, [""] * min(_ABREAST, len(cells)), _CONTACT))


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
