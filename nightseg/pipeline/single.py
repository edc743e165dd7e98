"""Single stages without a recipe and without a run folder: the work of the verbs of the command line.

Each is a graph of one node, or of the few that it needs, and runs like any other, in a hidden folder beside its output:
what is interrupted continues when the same is asked again, and the folder is removed once the output is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import yaml
from pydantic import ValidationError

from nightseg.cluster.settings import MapCompute
from nightseg.data import layouts
from nightseg.data import table as frame
from nightseg.data.class_list import known_taxonomies
from nightseg.data.class_list import taxonomy as load_taxonomy
from nightseg.data.images import encode_jpeg
from nightseg.data.listing import PREDICTION_CARD, predicted_taxonomy
from nightseg.data.overlay import legend as drawn_legend
from nightseg.data.pairing import Pair, Unpaired, pair_up
from nightseg.data.settings import FolderDataset
from nightseg.data.sources import Source, find_source
from nightseg.data.video import need_av
from nightseg.errors import all_of, first_of, together
from nightseg.networks.devices import usable_device
from nightseg.networks.model_folder import TENSORS, load_card
from nightseg.pipeline import build, run
from nightseg.pipeline.graph import Given, NodeId, part_of_key
from nightseg.pipeline.results import RESULTS_NAME, model_folder
from nightseg.progress import Progress
from nightseg.recipe.types import Evaluation, Recipe
from nightseg.segmenter.network import check_kind
from nightseg.segmenter.pictures import Picture
from nightseg.segmenter.predict import Segmenter, card_taxonomy
from nightseg.segmenter.settings import Inference
from nightseg.selection.features import DIMS, identify
from nightseg.selection.frechet import (
    FrameSet,
    Statistics,
    assumed,
    check_comparable,
    read_statistics,
    set_distance,
    write_statistics,
)
from nightseg.selection.settings import Extraction, Selection
from nightseg.stages.predict import check_pictures, picture_files
from nightseg.storage import Location, UserError, hash_of, sha256_of
from nightseg.storage.scratch import temporary_folder

LEGEND = "legend.jpg"  # no PNG: those of the folder are masks
_LEGEND_WIDTH: Final = 640
_BATCH: Final = 8  # frames at a time


def split_folder(
    images: str, out: str, *, margin: float, max_bad_fraction: float = 1.0, compute: MapCompute, progress: Progress
) -> dict[str, Any]:
    """Separate a folder of images into day, night and twilight; write one frame table with domain, score, margin.

    Beside `out` lie the evidence (histograms, thresholds, borderline frames) and, if there are bad frames, why.
    """
    table = Location.of(out)
    all_of(partial(_check_table_name, table, out), partial(layouts.check_folders, FolderDataset.of_images(images)))
    graph = build.split_graph(images, margin, compute, max_bad_fraction)
    with run.finished(graph, table.parent / f".{table.name}.work", progress) as commits:
        collected, done = commits.values()
        bad = [commit.table("quarantine") for commit in (collected, done) if commit.quarantined]
        table.write_table(frame.resolve(done.table("frames"), done.folder))
        stem = table.name.removesuffix(".parquet")
        (table.parent / f"{stem}.evidence.json").write_json(done.json("evidence.json"))
        if bad:
            (table.parent / f"{stem}.quarantine.parquet").write_table(pa.concat_tables(bad))
    return dict(done.summary) | {"frames": table.uri, "quarantined": sum(part.num_rows for part in bad)}


def _check_table_name(table: Location, out: str) -> None:
    if not table.name.endswith(".parquet"):
        raise UserError(f"{out}: the frame table is a Parquet file", cure="a name that ends in .parquet")


def select_frames(
    pool: str,
    reference: str | None,
    out: str,
    *,
    selection: Selection,
    seed: int,
    max_bad_fraction: float = 1.0,
    compute: MapCompute,
    progress: Progress,
) -> dict[str, Any]:
    """Choose frames of a pool (image folder or frame table); write frames.parquet, scores.parquet, evidence.json.

    Raises UserError before any frame is read: no such pool or reference, a method that needs a reference and has none,
    an extractor whose weights are not at hand.
    """
    folder = Location.of(out)
    found, other, _ = all_of(
        partial(_pool, pool, selection.count),
        partial(_reference, reference, selection),
        partial(identify, selection.extractor),
    )
    places = {build.POOL: found} | ({} if other is None else {build.REFERENCE: other})
    graph = build.selection_graph(places, selection, seed, compute, max_bad_fraction)
    with run.finished(graph, folder / ".work", progress) as commits:
        done = commits[NodeId("select", build.POOL)]
        for name in ("frames.parquet", "scores.parquet", "evidence.json"):
            (folder / name).write_bytes(done.file(name).read_bytes())
    return dict(done.summary) | {"out": folder.uri}


def _pool(pool: str, count: int) -> str | Given:
    found = _frames(pool)
    num_frames = found.table.num_rows if isinstance(found, Given) else layouts.count(FolderDataset.of_images(found))
    if count > num_frames:
        raise UserError(f"count {count}: the pool {pool} has {num_frames} frames", cure="a smaller count")
    return found


def _reference(reference: str | None, selection: Selection) -> str | Given | None:
    if reference is not None:
        found = _frames(reference)
        if isinstance(found, str):
            layouts.check_folders(FolderDataset.of_images(found))
        return found
    if selection.needs_reference:
        raise UserError(
            f"method {selection.method} needs a reference that the chosen frames should be close to",
            cure="name a folder or a frame table as the reference, or the method random",
        )
    return None


def _frames(source: str) -> str | Given:
    """An image folder as it is, or the rows of a frame table."""
    place = Location.of(source)
    if not place.name.lower().endswith(".parquet"):
        return source
    if not place.exists():
        raise UserError(f"{source}: there is no such frame table", cure="check the path")
    rows = frame.resolve(place.read_table(), place.parent)
    frame.check_frames(rows, f"frame table {source}")
    known = [name for name in frame.FRAME_SCHEMA.names if name in rows.column_names]  # `split` writes its scores, too
    whole = frame.frame_table(rows.select(known).to_pylist())  # one made by hand may hold only frame_id and uri
    return Given(whole, hash_of(whole.to_pylist()))


# -- distances --------------------------------------------------------------------------------------------------------


def distance(
    a: str,
    b: str,
    *,
    extraction: Extraction,
    compute: MapCompute,
    work: Location | None = None,
    save_statistics: Sequence[str | None] = (None, None),
    insist: bool = False,
    max_bad_fraction: float = Recipe.model_fields["max_bad_fraction"].default,
    progress: Progress,
) -> dict[str, Any]:
    """FID, and KID, between two sets, each an image folder (searched to the bottom), a frame table or an .npz.

    KID is None where a set is an .npz, which has no features. What is done is kept in a folder below `work`, for actors
    on several machines one that all of them see; by default in a temporary one. `save_statistics` names .npz files, one
    a set, that are kept for the next time; pytorch-fid reads them too. With `insist` two .npz files must come from the
    extractor of `extraction`, else theirs counts, whatever it is; a resize rule in `extraction` always must be theirs.
    What a file does not say is taken from these. `origin` of the answer: a set was measured, or what made it is said by
    its file, stated, assumed (`frechet.assumed`) or unknown.

    Raises UserError: a set does not exist, has fewer than 2 good frames, or was measured in another way than the other.
    """
    read = all_of(*(partial(_set_of_frames, place, progress) for place in (a, b)))  # before the first is measured
    found, origin = _settled(read, (a, b), extraction, insist)
    for name, one, how in zip((a, b), found, origin, strict=True):
        if isinstance(one, Statistics) and how != "file":
            making = f"extractor {one.extractor or 'unknown'}, resize rule {one.resize or 'unknown'}"
            progress.say(f"{name} does not say what made it: {making} ({how})")
    given = {name: one for name, one in zip(("a", "b"), found, strict=True) if isinstance(one, Given)}
    graph = build.distance_graph(given, extraction, compute, max_bad_fraction)
    with run.finished(graph, work and work / ".fid.work", progress) as commits:
        scored = iter(commits.values())
        first, second = (FrameSet(o) if isinstance(o, Statistics) else FrameSet.of(next(scored)) for o in found)
    for side, kept in zip((first, second), save_statistics, strict=True):
        if kept is not None:
            write_statistics(Location.of(kept), side.statistics)
    apart, made = set_distance(first, second, (a, b)), first.statistics
    counts: dict[str, Any] = {"n_a": made.count, "n_b": second.statistics.count}
    provenance: dict[str, Any] = {
        "extractor": made.extractor or "unknown",
        "resize": made.resize or "unknown",
        "origin": dict(zip("ab", origin, strict=True)),
    }
    return apart._asdict() | counts | provenance


def _set_of_frames(source: str, progress: Progress) -> Statistics | Given:
    place = Location.of(source)
    if place.name.lower().endswith(".npz"):
        return read_statistics(place)
    frames = _frames(source)
    if isinstance(frames, Given):
        return _at_least_two(source, frames)
    folder = FolderDataset.of_images(source)
    candidates = layouts.list_frames(folder, place.name, progress.say)
    if broken := [one for one in candidates if one.problem]:
        progress.say(f"{source}: {first_of([f'{one.uri} ({one.problem})' for one in broken])}: bad frames")
    listed = ({frame.FRAME_ID: one.frame_id, frame.URI: one.uri} for one in candidates)
    return _at_least_two(source, Given(frame.frame_table(listed), layouts.fingerprint(folder)))


def _at_least_two(source: str, frames: Given) -> Given:
    if frames.table.num_rows < 2:
        what = f"{source}: it holds {frames.table.num_rows} frames, and a distance needs at least 2"
        raise UserError(what, cure="a set of more frames")
    return frames


def _settled(
    read: Sequence[Statistics | Given], names: Sequence[str], extraction: Extraction, insist: bool
) -> tuple[list[Statistics | Given], list[str]]:
    """Both sets with what is known of their making, and how it is known. Refuses what cannot be compared before hours
    are spent on the frames of one of them."""
    asked = {"extractor": extraction.name if insist else "", "resize": extraction.resize or ""}
    if all(isinstance(one, Statistics) for one in read):
        _refuse_other(read, names, asked)
    stated = [_coming(extraction) if isinstance(one, Given) else _filled(one, asked) for one in read]
    final = [assumed(stated[0], stated[1]), assumed(stated[1], stated[0])]
    check_comparable(final[0], final[1], names)
    found: list[Statistics | Given] = []
    origin: list[str] = []
    for one, by_user, by_rule in zip(read, stated, final, strict=True):
        if isinstance(one, Given):
            found.append(one)
            origin.append("measured")
            continue
        steps = {"file": one, "stated": by_user, "assumed": by_rule}
        found.append(by_rule)
        origin.append(next((how for how, made in steps.items() if made.extractor and made.resize), "unknown"))
    return found, origin


def _refuse_other(made: Sequence[Any], names: Sequence[str], asked: Mapping[str, str]) -> None:
    """Two files, and an extractor or resize rule that was asked for: it is not ignored."""
    for one, name in zip(made, names, strict=True):
        dims = DIMS.get(asked["extractor"], len(one.mean))
        if not one.extractor and len(one.mean) != dims:
            raise UserError(
                f"{name}: these statistics have {len(one.mean)} dimensions, {asked['extractor']} has {dims}",
                cure="ask for the extractor that made them, or for none",
            )
        for key, word in asked.items():
            said = getattr(one, key)
            if word and said not in ("", word):
                what = {"extractor": "an extractor", "resize": "a resize rule"}[key]
                raise UserError(
                    f"{name}: these statistics were made with {said}, not with {word}",
                    cure=f"do not ask for {what}, or make them again from the frames",
                )


def _filled(made: Statistics, words: Mapping[str, Any]) -> Statistics:
    return replace(made, **{key: word for key, word in words.items() if not getattr(made, key)})


def _coming(extraction: Extraction) -> Statistics:
    """What an extractor will say about its statistics."""
    identity = identify(extraction)
    nothing = np.zeros(identity.dims)
    return Statistics(nothing, nothing, None, identity.name, identity.resize, identity.weights_sha256)


# -- predictions ------------------------------------------------------------------------------------------------------


def predict_frames(
    model: str | Location,
    source: str,
    out: Location,
    *,
    save: Sequence[str],
    inference: Inference,
    device: str | None = None,
    overlay_video: bool = False,
    legend: bool = False,
    max_bad_fraction: float = 1.0,
    compute: MapCompute,
    progress: Progress,
) -> dict[str, Any]:
    """Segment what `source` points at (see `find_source`). Returns what was done, and writes it to prediction.json.

    The mask of `a/b.jpg` is `<out>/a/b.png`, its other pictures `<out>/<picture>/a/b.*`; frame 7 of the video `a/c.mp4`
    is `a/c/000007` in the same way. Frames that cannot be used do not stop the rest: `<out>/quarantine.json` lists
    them with their reasons. With `legend` the classes stand below the pictures in their colours, and in `LEGEND`:
    masks are data. `device` None: CUDA where there is one; with actors, the CPU. Videos need no actors.

    Raises UserError: no model, nothing to read, none of it usable or more than `max_bad_fraction` bad, two frames that
    would be written to one file.
    """
    started = time.monotonic()
    pictures, weights, found = all_of(
        partial(check_pictures, save), partial(model_folder, model), partial(find_source, source, progress.say)
    )
    card = load_card(weights)
    check_kind(weights, card)
    device = device or "cpu" if compute.actors else str(usable_device(device))
    _check_source(found, pictures, overlay_video, compute.actors, source, out)
    sha256 = {"model": hash_of([card, sha256_of((weights / TENSORS).read_bytes())]), "source": found.identity}
    images = Given(frame.frame_table(found.images), found.identity) if found.images else None
    settings = {"save": pictures, "inference": inference, "legend": legend}
    unhashed = {"model": weights, "out": out, "device": device}
    graph = build.prediction_graph(
        images, found.videos, found.identity, settings, overlay_video, unhashed, sha256["model"], compute
    )
    with run.finished(graph, out / ".work", progress) as commits:
        bad = [*found.bad, *(row for commit in commits.values() for row in commit.table("quarantine").to_pylist())]
        (out / "quarantine.json").write_json(bad)
        written = sum(commit.rows_out for commit in commits.values())
    _check_written(source, bad, written, max_bad_fraction, out)
    answer = {
        "model": str(weights),
        "source": source,
        "images": written + len(bad),
        "written": written,
        "quarantined": len(bad),
        "out": out.uri,
        "save": list(pictures),
        "taxonomy": card["taxonomy"]["name"],
        "seconds": round(time.monotonic() - started, 3),
    }
    if legend:
        (out / LEGEND).write_bytes(encode_jpeg(drawn_legend(card_taxonomy(card), _LEGEND_WIDTH)))
    (out / PREDICTION_CARD).write_json(answer | {"inference": part_of_key(inference), "sha256": sha256})
    return answer


def _check_written(
    source: str, bad: Sequence[Mapping[str, Any]], written: int, max_bad_fraction: float, out: Location
) -> None:
    """Raise UserError if no frame could be used, or too few."""
    if not written:
        first = bad[0]
        raise UserError(
            f"{source}: none of the {len(bad)} frames can be used; the first, {first[frame.URI]}, is "
            f"{first[frame.REASON]} ({first[frame.DETAIL]})",
            cure=f"mend the files that are listed in {out / 'quarantine.json'}",
        )
    share = len(bad) / (written + len(bad))
    if share > max_bad_fraction:
        raise UserError(
            f"{source}: {len(bad)} of {written + len(bad)} frames ({share:.1%}) are bad, max_bad_fraction allows "
            f"{max_bad_fraction:.1%}; the others are written",
            cure=f"mend the files that are listed in {out / 'quarantine.json'}, or set max_bad_fraction to "
            f"{math.ceil(share * 1000) / 1000} or more",
        )


def _check_source(
    found: Source, save: Sequence[Picture], overlay_video: bool, actors: int, source: str, out: Location
) -> None:
    """What cannot be done is said before anything is."""
    places = [*(row[frame.URI] for row in found.images), *(video.file.uri for video in found.videos)]
    folders = {place.rpartition("/")[0] for place in places}
    among = {folder for folder in folders if out.holds(Location.of(f"{folder}/frame"))}
    if inside := [place for place in places if place.rpartition("/")[0] in among]:
        raise UserError(
            f"{out}: {len(inside)} of the frames lie in the output folder, first {inside[0]}; masks among frames would "
            "replace them, or be taken for frames the next time",
            cure=f"another folder, such as {out / 'predictions'}",
        )
    if found.videos:
        need_av()
        if actors:
            raise UserError(f"{source}: a video is decoded in order, in one process", cure="no actors")
    elif overlay_video:
        raise UserError(f"{source}: an overlay video needs a video", cure="save overlay, a picture of each image")
    owner: dict[str, str] = {}
    for row in found.images:
        for file in picture_files(row[frame.FRAME_ID], save).values():
            if owner.setdefault(file, row[frame.FRAME_ID]) != row[frame.FRAME_ID]:
                raise UserError(
                    f"{source}: the images {owner[file]} and {row[frame.FRAME_ID]} would both write {file}",
                    cure="rename their folder, or save one kind of picture at a time",
                )
    for video in found.videos:
        folders = {str(PurePosixPath(file).parent) for file in picture_files(f"{video.name}/0", save).values()}
        taken = [file for file in owner if str(PurePosixPath(file).parent) in folders]
        if taken:
            raise UserError(
                f"{source}: the frames of the video {video.name} and the image {owner[taken[0]]} would be written to "
                "one folder",
                cure="rename either, or give them one after the other",
            )


# -- scores of a folder -----------------------------------------------------------------------------------------------


def evaluate_folders(
    predictions: Location,
    labels: Location,
    taxonomy: str,
    *,
    label_encoding: str | None = None,
    evaluation: Evaluation,
    max_bad_fraction: float = 0.0,
    compute: MapCompute,
    work: Location | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """Score label images of train ids against labels, paired by name (`pair_up`); see `stages/evaluate.py`.

    What is done is kept in a folder below `work`; by default, with actors, below the predictions. Raises UserError: no
    folder, no label, masks of another taxonomy, a label without prediction, sizes that differ, unknown ids, and more
    than `max_bad_fraction` of the frames with a damaged file; the others are scored then.
    """
    problems: list[UserError] = []

    def paired() -> list[Pair]:
        try:
            return pair_up(predictions, labels, progress.say, label_encoding)
        except Unpaired as error:
            if not error.pairs:
                raise
            problems.append(error)
            return error.pairs[: compute.shard_rows]  # what else is wrong shows at once

    try:
        _, pairs = all_of(partial(_check_classes, predictions, taxonomy, label_encoding), paired)
    except UserError as error:
        raise together([*problems, error]) from error
    places = {
        "prediction_uri": [(predictions / pair.prediction.name).uri for pair in pairs],
        frame.LABEL_URI: [(labels / pair.label.name).uri for pair in pairs],
    }
    listing = [places, [[entry.size, entry.modified_ns] for pair in pairs for entry in pair]]
    kept = work or (predictions if compute.actors else None)  # all actors see it; minutes in this process need no place
    folder = kept and kept / ".evaluate.work"
    given = Given(pa.table(places), hash_of(listing))
    graph = build.evaluation_graph(given, taxonomy, label_encoding, evaluation, compute, max_bad_fraction)
    found: dict[str, Any] = {}
    try:
        with run.finished(graph, folder, progress) as commits:
            found = commits[NodeId("evaluate", "folders")].json("scores.json")
    except UserError as error:
        problems.append(error)
    if problems:
        raise together(problems)
    if own := [pair.label.name for pair in pairs if pair.prediction.same and pair.prediction.same == pair.label.same]:
        warning = f"{len(own)} of {len(pairs)} predictions are the files of their labels themselves: {first_of(own)}"
        progress.say(f"warning: {warning}")
        found["warning"] = "; ".join(filter(None, [warning, found.get("warning")]))
    return found


def _check_classes(predictions: Location, taxonomy: str, label_encoding: str | None) -> None:
    classes = load_taxonomy(taxonomy)
    if label_encoding is not None:
        classes.need(label_encoding)
    predicted = predicted_taxonomy(predictions)
    if predicted not in (None, classes.name):
        raise UserError(
            f"{predictions}: its masks are train ids of the taxonomy {predicted}, and not of {classes.name}",
            cure=f"evaluate against labels of {predicted}, with that taxonomy",
        )


class FolderScores(NamedTuple):
    """Scores on a labelled folder, fractions in [0, 1]; None: a class that is neither there nor found."""

    miou: float | None
    pa: float | None
    ca: float | None
    fwiou: float | None
    iou: dict[str, float | None]
    frames: int
    details: dict[str, Any]  # what `nightseg evaluate` answers in JSON, confusion matrix and label encoding included

    def __repr__(self) -> str:
        names = {"mIoU": self.miou, "PA": self.pa, "CA": self.ca, "FWIoU": self.fwiou}
        of_all = ", ".join(f"{name} {_percent(value)}" for name, value in names.items())
        by_class = ", ".join(f"{name} {_percent(value)}" for name, value in self.iou.items())
        return f"FolderScores({self.frames} frames, percent: {of_all}; IoU: {by_class})"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def evaluate(
    predicted: Any,
    labels: str | Path,
    *,
    images: str | Path | None = None,
    taxonomy: str | None = None,
    label_encoding: str | None = None,
    absent_class: Literal["cityscapes", "detectron2"] = "cityscapes",
    boundary: float | None = None,
    device: str | None = None,
    progress: Progress,
) -> FolderScores:
    """See `nightseg.evaluate`."""
    try:
        evaluation = Evaluation(absent_class=absent_class, boundary=boundary)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{first['loc'][0]}: {first['msg']}, not {first['input']!r}", cure="see the docstring"
        ) from None

    def scored(predictions: Location, classes: str) -> FolderScores:
        found = evaluate_folders(
            predictions, Location.of(labels), classes, label_encoding=label_encoding, evaluation=evaluation,
            compute=MapCompute(actors=0), progress=progress,
        )  # fmt: skip
        return FolderScores(**{key: found[key] for key in FolderScores._fields if key in found}, details=found)

    segmenter = _as_segmenter(predicted, device)
    if segmenter is None:
        place = Location.of(predicted)
        known = taxonomy or predicted_taxonomy(place)
        if known is None:
            raise UserError(
                f"{place}: nothing says whose classes these predictions are", cure="give `taxonomy`: a name or a file"
            )
        return scored(place, known)
    if images is None:
        raise UserError(
            f"{segmenter.folder}: a model needs the frames that the labels belong to",
            cure="give `images`: their folder",
        )
    with temporary_folder() as work:
        masks = Location.of(work) / "masks"
        predict_frames(
            segmenter.folder, str(images), masks, save=("mask",), inference=segmenter.inference,
            device=str(segmenter.device), max_bad_fraction=0.0, compute=MapCompute(actors=0, batch=_BATCH),
            progress=progress,
        )  # fmt: skip
        return scored(masks, taxonomy or _class_list_of(segmenter, Location.of(work)))


def _as_segmenter(predicted: Any, device: str | None) -> Segmenter | None:
    """The model that somebody names; None for a folder of predictions."""
    if isinstance(predicted, Segmenter):
        return predicted
    place = Location.of(predicted)
    if place.is_folder() and not any((place / name).exists() for name in ("model.json", RESULTS_NAME)):
        return None
    return Segmenter(model_folder(predicted), device)


def _class_list_of(segmenter: Segmenter, work: Location) -> str:
    """The model's classes by their name, where it is a known one with these classes, else as a file."""
    classes = segmenter.taxonomy
    if classes.name in known_taxonomies() and load_taxonomy(classes.name).classes == classes.classes:
        return classes.name
    listed = [{"name": name, "color": list(c)} for name, c in zip(classes.classes, classes.palette, strict=True)]
    file = work / "classes.yaml"
    file.write_bytes(yaml.safe_dump({"name": classes.name, "classes": listed}, allow_unicode=True).encode())
    return file.uri
