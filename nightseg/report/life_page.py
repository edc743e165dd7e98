"""The life of a frame in words, and as a page with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from nightseg.data import table as frame
from nightseg.data.taxonomy import TRAIN_IDS
from nightseg.report import formatting
from nightseg.report.formatting import percent
from nightseg.report.life import Life
from nightseg.report.pictures import (
    Picture,
    confidence,
    label_map_uri,
    label_of,
    label_pixels,
    photo,
    there,
    tinted_photo,
)
from nightseg.report.run import Row, Run, as_kept
from nightseg.report.templates import template
from nightseg.storage import Location

PAGES: Final = "explained"  # folder of a run folder
_WIDTH: Final = 640  # pixels of the pictures


def lines(life: Life) -> list[tuple[str, str]]:
    """(what, in words), in the order of a frame's life."""
    return [(title, text) for title, texts in _sections(life) for text in texts]


def _sections(life: Life) -> Iterator[tuple[str, list[str]]]:
    source = life.source
    yield "frame", [life.frame_id]
    yield "file", [", ".join(_file(source))]
    if source.get(frame.SHA256):
        yield "sha256", [source[frame.SHA256]]
    if source.get(frame.DATASET):
        keys = {frame.DOMAIN: "domain", frame.SEQUENCE: "sequence", frame.SPLIT: "split"}
        facts = [f"{word} {source[key]}" for key, word in keys.items() if source.get(key)]
        yield "dataset", [", ".join([source[frame.DATASET], *facts])]
    if source.get(frame.LABEL_URI):
        yield "label", [f"{source[frame.LABEL_URI]}, read as {source[frame.LABEL_ENCODING]}"]
    if life.made_from is not None:
        yield "made from", [f"{life.made_from['frame_id']}, by {life.made_from['translator']}"]
    yield "quarantine", [f"{row['node']}: {row['reason']} {row['detail'] or ''}".strip() for row in life.quarantine]
    yield "split", [_split(row) for row in life.splits]
    yield "translation", [_translation(row) for row in life.translations]
    yield "selection", [_selection(row) for row in life.selections] or ["a candidate of none"]
    yield "pseudo-label", [text for row in life.pseudo_labels for text in _pseudo_label(row)] or ["none"]
    yield "learned by", _learned(life) or ["no model"]
    yield (
        "prediction",
        [_prediction(row, life) for row in life.predictions]
        or ["none is committed: nightseg predict RUN_DIR:MODEL FILE"],
    )
    yield "not there", [f"{node}: its commit is gone, so what it knew is left out" for node in life.missing]


def _file(source: Row) -> Iterator[str]:
    yield str(source[frame.URI])
    if source.get(frame.BYTES) is not None:
        yield f"{formatting.count(source[frame.BYTES])} bytes"
    if source.get(frame.WIDTH):
        yield f"{source[frame.WIDTH]} x {source[frame.HEIGHT]} pixels"
    yield {
        "there": "still there",
        "unchanged": "as it was collected",
        "changed": "changed since it was collected",
        "gone": "gone since it was collected",
        "unreadable": "not readable now",
    }[source["file"]]


def _split(row: Row) -> str:
    side = "above" if row["distance"] >= 0 else "below"
    return (
        f"{row['domain']} by {row['node']}: score {row['score']:.3f} (-1 night, 1 day), margin {row['margin']:.3f}, "
        f"{abs(row['distance']):.3f} {side} the limit of {row['limit']:g}"
    )


def _translation(row: Row) -> str:
    facts = [f"{word} {percent(row[key])} %" for key, word in
             {"edges": "edges agree", "agreement": "pixels agree"}.items() if key in row]  # fmt: skip
    return ", ".join([f"{row['frame_id']}, by {row['translator']}", *facts])


def _selection(row: Row) -> str:
    start = f"{row['model']} (the {row['count']} of method {row['method']})"
    if not row["is_candidate"]:
        return f"{start}: no candidate, {row['why_not']}"
    score = "" if row["score"] is None else f", score {row['score']:.4g} (place {row['place']} of {row['candidates']})"
    if row["chosen"]:
        return f"{start}: chosen, rank {row['rank']} of {row['count']}{score}"
    return f"{start}: not chosen{score}: {row['why_not']}"


def _pseudo_label(row: Row) -> Iterator[str]:
    sure = "" if row["mean_confidence"] is None else f", mean confidence {percent(row['mean_confidence'])} %"
    rule = formatting.threshold(row["threshold"])
    yield f"{row['model']}, by {row['teacher']}: {percent(row['kept'])} % of the pixels kept{sure}; {rule}"
    shares = sorted(row["by_class"].items(), key=lambda item: -item[1]["share"])
    if shares:
        yield "kept of " + ", ".join(
            f"{name} {percent(facts['kept'], 0)} % (of {percent(facts['share'], 0)} % of the frame)"
            for name, facts in shares
        )


def _learned(life: Life) -> list[str]:
    """Models that learned it alike in one line."""
    models: dict[tuple[str, str], list[str]] = {}
    for row in life.learned_by:
        of = "" if row["frame_id"] == life.frame_id else f", as {row['frame_id']}"
        models.setdefault((row["how"], of), []).append(row["model"])
    return [f"{', '.join(dict.fromkeys(names))}: {how}{of}" for (how, of), names in models.items()]


def _prediction(row: Row, life: Life) -> str:
    sets = row["test_sets"] or [row["node"].partition("/")[2]]
    where = f" on {', '.join(sets)}"
    of = "" if row["frame_id"] == life.frame_id else f" of {row['frame_id']}"
    facts = []
    if row["pa"] is not None:
        facts.append(f"{percent(row['pa'])} % of the pixels right, mIoU {percent(row['miou'])} %")
    if row["mean_confidence"] is not None:
        facts.append(f"mean confidence {percent(row['mean_confidence'])} %")
    return f"{row['model']}{where}{of}: {', '.join(facts) or 'without a label'}"


# -- as a page --------------------------------------------------------------------------------------------------------


def life_page(folder: Location, results: Mapping[str, Any], life: Life, place: Location | None = None) -> Location:
    """Write the page of a frame into the run folder, or to `place`: its life in words and pictures, in one file that
    needs no network. Returns where."""
    run = Run(folder, results)
    told = [(title, text.replace(f"{run.root.uri}/", "")) for title, text in lines(life)]  # the folder may be moved
    page = template("life.html.j2").render(life=life, lines=told, groups=_pictures(run, life), run=run)
    place = place or folder / PAGES / frame.file_name(life.frame_id, ".html")
    place.write_bytes(page.encode())
    return place


def _pictures(run: Run, life: Life) -> list[tuple[str, list[Picture]]]:
    """Title -> pictures side by side."""
    source, uri = life.source, life.source[frame.URI]
    label = label_pixels(source.get(frame.LABEL_URI), source.get(frame.LABEL_ENCODING), run.classes)
    frames = there(
        photo(uri, "frame", life.frame_id, _WIDTH),
        None if label is None else Picture(label_map_uri(label, run.classes, _WIDTH), "label", "", True),
        *(photo(row["uri"], "translation", f"by {row['translator']}", _WIDTH) for row in life.translations),
    )
    uris = {life.frame_id: uri} | {row["frame_id"]: row["uri"] for row in life.translations}
    taught = [
        picture
        for row in life.pseudo_labels
        for known in as_kept(run, row["node"], run.rows_of(row["labels"], "frames", [row["frame_id"]]).values())
        for picture in there(
            tinted_photo(uris[row["frame_id"]], label_of(known, run.classes), run.classes,
                         f"pseudo-label for {row['model']}",
                         f"{percent(row['kept'], 0)} % kept; grey: ignored", _WIDTH),
            confidence(known, f"confidence of {row['teacher']}", _WIDTH),
        )
    ]  # fmt: skip
    seen = [
        picture
        for row in life.predictions
        for picture in there(
            _mask(run, row),
            tinted_photo(
                uris[row["frame_id"]],
                label_pixels(row["prediction_uri"], TRAIN_IDS, run.classes),
                run.classes,
                "over the frame",
                "",
                _WIDTH,
            ),
        )
    ]
    return [group for group in (("Frame", frames), ("Pseudo-labels", taught), ("Predictions", seen)) if group[1]]


def _mask(run: Run, row: Row) -> Picture | None:
    label = label_pixels(row["prediction_uri"], TRAIN_IDS, run.classes)
    if label is None:
        return None
    right = "" if row["pa"] is None else f"{percent(row['pa'])} % of its pixels right"
    return Picture(label_map_uri(label, run.classes, _WIDTH), f"{row['model']} sees", right, True)
