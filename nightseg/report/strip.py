"""The five pictures that tell the story: a day frame, its night, a real night, its pseudo-label, a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nightseg.data import table as frame
from nightseg.data.images import encode_png
from nightseg.data.taxonomy import TRAIN_IDS
from nightseg.report.pictures import UInt8, frame_pixels, label_pixels, tinted
from nightseg.report.run import Row, Run
from nightseg.storage import Location, UserError

_LOOKED_AT = 64  # frames among which the ones to show are chosen

_GAP = 10  # pixels of the README's strip
_CAPTION = 34
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
        raise UserError(f"{run_folder.uri}: no picture for a strip; the run has neither translations nor predictions")
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
        rows = [row for row in run.rows(node, "frames", _LOOKED_AT) if row[frame.DOMAIN] == "night"]
        if rows:
            row = rows[len(rows) // 2]
            source = source_of(run, row)
            return [
                _panel("day", source[frame.FRAME_ID] if source else "", source[frame.URI] if source else None),
                _panel("its night", f"translated, label kept, {node.partition('/')[2]}", row[frame.URI]),
            ]
    return []


def source_of(run: Run, row: Row) -> Row | None:
    """The frame that a translated frame was made from; its id is that of the source behind the data set's name."""
    source_id = row[frame.FRAME_ID].removeprefix(f"{row[frame.DATASET]}/")
    dataset = source_id.partition("/")[0]
    found = (other for other in run.rows(f"collect/{dataset}", "frames") if other[frame.FRAME_ID] == source_id)
    return next(found, None)


def _pseudo_label(run: Run) -> list[Panel | None]:
    labelled = [model for model in run.models if model in run.results["pseudo_labels"]]
    if not labelled:
        return []
    preferred = run.best(run.main_test) if run.main_test else None
    model = preferred if preferred in labelled else labelled[-1]
    node = run.results["pseudo_labels"][model]["node"]
    frames = run.rows(node, "frames", _LOOKED_AT)
    facts = run.rows(node, "labels", _LOOKED_AT, drop=["histogram"])
    if not frames:
        return []
    # The one with most classes to see; the first of equals.
    row = max(zip(frames, facts, strict=True), key=lambda pair: _num_classes(pair[1]))[0]
    image, label = frame_pixels(row[frame.URI]), label_pixels(row[frame.LABEL_URI], TRAIN_IDS, run.classes)
    if image is None or label is None:
        return []
    note = f"teacher {run.results['pseudo_labels'][model]['evidence']['teacher']['name']}, grey = ignored"
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


def by_accuracy(predictions: list[Row]) -> list[Row]:
    """Predictions from the worst frame to the best, by pixel accuracy; frames without a labelled pixel are left out."""
    return sorted(
        (row for row in predictions if any(row["confusion"])), key=lambda row: (accuracy(row), row["frame_id"])
    )


def accuracy(prediction: Row) -> float:
    """Pixel accuracy of one frame, a fraction."""
    counts = np.asarray(prediction["confusion"], dtype=np.int64)
    side = int(len(counts) ** 0.5)
    return float(np.trace(counts.reshape(side, side)) / counts.sum())


def _panel(title: str, note: str, uri: str | None) -> Panel | None:
    pixels = frame_pixels(uri)
    return None if pixels is None else Panel(title, note, pixels)


def _scaled(pixels: UInt8, height: int) -> Image.Image:
    picture = Image.fromarray(pixels)
    return picture.resize((round(picture.width * height / picture.height), height), Image.Resampling.LANCZOS)
