"""Read every frame of a data set once and say which are good: the first stage, the only one that sees raw folders.

A frame is good when its image decodes to 8-bit RGB and its label, if the data set has labels, is a single-channel
file of the same size as the upright image whose ids the encoding knows. All other frames go to the quarantine table
with the reason; later stages can rely on the rest.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nightseg.cluster.map import ShardWorker, Work, map_shards
from nightseg.data import table as columns
from nightseg.data.class_list import mapped, taxonomy
from nightseg.data.encodings import (
    BY_COLOURS,
    BY_LIST,
    LABEL_FILES_SCHEMA,
    LabelFile,
    Reading,
    UnclearLabels,
    facts_of,
    label_files,
    read_as,
    unknown_ids,
)
from nightseg.data.images import BadFrame, UInt8, decode_turned, encode_png, read_bytes
from nightseg.data.labels import are_in_colors, pixels_by_class, stored_label, to_train_ids
from nightseg.data.layouts import Candidate, list_frames, scene_domains
from nightseg.data.scenes import scene
from nightseg.data.settings import AnyTaxonomy, FolderDataset, ScenesDataset
from nightseg.data.table import check_frames, frame_table, quarantine_table
from nightseg.data.taxonomy import COLORS, IDS, TRAIN_IDS, Taxonomy
from nightseg.data.thumbnails import NUM_VALUES, thumbnail
from nightseg.storage import Commit, Location, Shards, UserError, sha256_of

VERSION = 5

TRUE_DOMAIN = "true_domain"  # of a scene, kept beside `domain`, which an unlabelled pool does not reveal
SCENES_TAXONOMY = "camvid11"

THUMBNAILS = "thumbnails"  # table of the commit, by which near duplicates are found
THUMBNAIL = "thumbnail"

_LABEL_FILES = "label_files"  # what each label file holds, of LABEL_FILES_SCHEMA
_PROBLEM = "problem"
_INDEX = "index"


class _Pass(NamedTuple):
    """What is spread over the cluster: candidates, and the worker (with its arguments) that makes frames of them."""

    rows: pa.Table
    worker: type[ShardWorker]
    arguments: dict[str, Any]


def collect(
    dataset: FolderDataset | ScenesDataset,
    *,
    name: str,
    taxonomy: AnyTaxonomy,
    **work: Unpack[Work],
) -> Commit:
    """Tables `frames`, `quarantine`, `thumbnails` (by sha256). Scenes are drawn first: PNG files below the attempt.

    Raises UserError: a folder, split or encoding that does not exist; labels that may mean several things, or without
    one pixel that has a class; more than `max_bad_fraction` bad frames.
    """
    notes: list[str] = []
    if isinstance(dataset, ScenesDataset):
        made = _scenes(dataset, name, taxonomy)
    else:
        made = _folder(dataset, name, taxonomy, notes.append)
    shards = map_shards(*made, title=f"collect {name}", **work)
    frames = shards.table("frames")
    check_frames(frames)
    summary = _summary(frames, shards.table("quarantine"))
    if summary["duplicates"]:
        notes.append(
            f"{summary['duplicates']} of {frames.num_rows} frames repeat others byte for byte, such as "
            f"{' and '.join(_first_pair(frames))}; all of them count"
        )
    if isinstance(dataset, FolderDataset):
        reading = _read_labels(shards, dataset, name, taxonomy)
        if reading is not None:
            summary["labels"] = reading.facts()
            said, *warnings = reading.sentences()
            work["progress"].say(f"dataset {name}: {said}")
            notes += warnings
    for note in notes:
        work["progress"].say(f"dataset {name}: {note}")
    return shards.finish("frames", summary=summary | ({"notes": notes} if notes else {}))


def _first_pair(frames: pa.Table) -> tuple[str, str]:
    """The first two frames with the same bytes."""
    seen: dict[str, str] = {}
    pairs = zip(frames[columns.SHA256].to_pylist(), frames[columns.FRAME_ID].to_pylist(), strict=True)
    return next((seen[sha256], one) for sha256, one in pairs if seen.setdefault(sha256, one) != one)


def _summary(frames: pa.Table, quarantine: pa.Table) -> dict[str, Any]:
    """Counts for people and for the report. Frames with the same bytes are counted: they leak between splits."""
    return {
        "frames": frames.num_rows,
        "labelled": frames.num_rows - frames[columns.LABEL_URI].null_count,
        "domains": dict(sorted(Counter(frames[columns.DOMAIN].to_pylist()).items())),
        "reasons": dict(sorted(Counter(quarantine[columns.REASON].to_pylist()).items())),
        "duplicates": frames.num_rows - len(pc.unique(frames[columns.SHA256])),
    }


# -- folders ---------------------------------------------------------------------------------------------------------


def _classes(dataset: FolderDataset, name: str, classes: AnyTaxonomy, say: Callable[[str], None]) -> Taxonomy:
    """What the labels of a folder are read by: the classes of the run, in the ids of the dataset's own class list."""
    if dataset.taxonomy is None:
        return taxonomy(classes)
    known, dropped, missing = mapped(dataset.taxonomy, dataset.map, taxonomy(classes))
    if dropped:
        say(f"classes of its labels that the run does not have are ignored: {', '.join(dropped)}")
    if missing:
        say(f"classes of the run that its labels do not have: {', '.join(missing)}")
    return known


def _nobody(note: str) -> None:
    """Takes what another call has said already."""


def _folder(dataset: FolderDataset, name: str, classes: AnyTaxonomy, say: Callable[[str], None] = _nobody) -> _Pass:
    candidates = list_frames(dataset, name, say)
    known = _classes(dataset, name, classes, say)
    encodings = _encodings(candidates, dataset, known)
    for encoding in set(encodings) - {None}:
        known.need(encoding or "")  # an error now, not one bad frame each
    rows = frame_table(
        (
            {
                columns.FRAME_ID: candidate.frame_id,
                columns.URI: candidate.uri,
                columns.LABEL_URI: candidate.label_uri,
                columns.DATASET: name,
                columns.SPLIT: dataset.split,
                columns.DOMAIN: candidate.domain,
                columns.SEQUENCE: candidate.sequence,
                columns.LABEL_ENCODING: encoding,
                _PROBLEM: candidate.problem,
            }
            for candidate, encoding in zip(candidates, encodings, strict=True)
        ),
        extra={_PROBLEM: pa.string()},
    )
    rewritten = None if dataset.taxonomy is None else known.palette
    return _Pass(rows, FolderReader, {"classes": known, "rewritten": rewritten})


def _encodings(candidates: Sequence[Candidate], dataset: FolderDataset, known: Taxonomy) -> list[str | None]:
    """Of each label: as asked; else colours where files look so; else what its name and its layout say."""
    told = [candidate.label_encoding for candidate in candidates]
    if dataset.label_encoding is not None:
        return list(told)
    labels = [one.label_uri for one in candidates if one.label_uri is not None and not one.problem]
    in_colours = are_in_colors(labels)
    return [one if one is None else COLORS if in_colours else known.usual(one) for one in told]


class Look(NamedTuple):
    """Some frames of a folder, read as all of them will be."""

    num_frames: int  # in the folder
    uris: list[str]  # of all of them
    missing: list[str]  # labels that are not there, of all frames; only on a local disk
    frames: pa.Table  # of those that were read: the good ones, and the others
    quarantine: pa.Table
    labels: list[LabelFile]
    reading: Reading | None
    classes: Taxonomy  # by which the labels of `frames` are read
    notes: list[str]


class _Sample(NamedTuple):
    tables: Mapping[str, pa.Table]
    max_bad_fraction: float

    def table(self, name: str) -> pa.Table:
        return self.tables[name]


def look_at(
    dataset: FolderDataset,
    *,
    name: str,
    taxonomy: AnyTaxonomy,
    most: int,
    max_bad_fraction: float,
    folder: Location,
    threads: int = 4,
) -> Look:
    """Read at most so many frames, evenly over the folder. Labels that are rewritten go to `folder`.

    Raises UserError as `collect` does, but for too many bad frames.
    """
    notes: list[str] = []
    rows, worker, arguments = _folder(dataset, name, taxonomy, notes.append)
    uris = [uri or "" for uri in rows[columns.LABEL_URI].to_pylist()]
    there = np.array([not uri.startswith("/") or os.path.exists(uri) for uri in uris], dtype=np.bool_)
    kept = np.flatnonzero(there)
    some = kept[np.unique(np.linspace(0, len(kept) - 1, min(most, len(kept))).round().astype(int))]
    read = worker(**arguments)
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda row: read(rows.slice(row, 1), folder), some.tolist()))
    tables = {key: pa.concat_tables([part[key] for part in parts]) for key in (parts[0] if parts else ())}
    labels = label_files(tables[_LABEL_FILES]) if tables else []
    reading = _read_labels(_Sample(tables, max_bad_fraction), dataset, name, taxonomy) if labels else None
    frames = tables["frames"] if tables else frame_table([])
    bad = tables["quarantine"] if tables else quarantine_table([])
    known = _classes(dataset, name, taxonomy, _nobody)
    missing = [uri for uri, is_there in zip(uris, there, strict=True) if not is_there]
    every = rows[columns.URI].to_pylist()
    return Look(rows.num_rows, every, missing, columns.resolve(frames, folder), bad, labels, reading, known, notes)


def _read_labels(shards: Shards | _Sample, dataset: FolderDataset, name: str, classes: AnyTaxonomy) -> Reading | None:
    """What the label files of the set mean together. Raises UserError if that is not what their layout says of them."""
    known, table = _classes(dataset, name, classes, _nobody), shards.table(_LABEL_FILES)
    files = list(zip(label_files(table), table[columns.LABEL_ENCODING].to_pylist(), strict=True))
    if not files:
        return None
    where, asked, why = f"dataset {name}", dataset.label_encoding, "as asked"
    if is_colours := {told == COLORS for _, told in files} == {True}:
        known = known.of_colors({raw_id for file, _ in files for raw_id in file.pixels})
        asked, why = COLORS, why if asked else BY_COLOURS
    elif asked is None and {told for _, told in files} == {IDS}:
        asked, why = IDS, BY_LIST
    fitting = [(file, told) for file, told in files if file.pixels.keys() <= known.encodings[told].keys()]
    ids = {raw_id for file, _ in files for raw_id in file.pixels}
    is_known = any(ids <= known.encodings[encoding].keys() for encoding in known.tried)
    allowed = shards.max_bad_fraction * len(files)
    if len(files) - len(fitting) > allowed:  # as many are no accident
        odd = Counter(i for file, told in files for i in file.pixels if i not in known.encodings[told])
        if (asked is not None or not is_known) and max(odd.values()) > 1:  # not damage of single files
            raise unknown_ids(where, [file for file, _ in files], known, [files[0][1]] if asked else None)
        fitting = files if asked is None and is_known else fitting  # another encoding knows them all
    if not fitting:
        return None
    reading = read_as(where, [file for file, _ in fitting], known, asked=asked, why=why, usual=fitting[0][1])
    if is_colours:
        return reading
    for encoding, (file, told) in zip(reading.encodings, fitting, strict=True):
        if encoding != told:
            raise UnclearLabels(
                f"{where}: the layout {dataset.layout} takes {file.uri} for {told}; {reading.why} it is {encoding}",
                [encoding],
            )
    return reading


@dataclass
class FolderReader:
    """Reads, hashes, decodes and checks the frames of a shard.

    Labels in colours, and with `rewritten` (a palette) those of another class list, are written as train ids.
    """

    classes: Taxonomy
    rewritten: tuple[tuple[int, int, int], ...] | None

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        looks: dict[str, UInt8] = {}
        labels: list[dict[str, Any]] = []
        good, bad = columns.sort_out(rows, lambda row: self._read(row, folder, looks, labels))
        return {
            "frames": frame_table(good),
            "quarantine": quarantine_table(bad),
            THUMBNAILS: thumbnail_table(looks),
            _LABEL_FILES: pa.Table.from_pylist(labels, LABEL_FILES_SCHEMA),
        }

    def _read(
        self, row: dict[str, Any], folder: Location, looks: dict[str, UInt8], labels: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """The row of a good frame; what its label's file holds is added to `labels`, known ids or not."""
        problem = row.pop(_PROBLEM)
        if problem:
            raise BadFrame("unreadable", problem)
        data = read_bytes(Location.of(row[columns.URI]))
        image_HWC, orientation = decode_turned(data)
        height, width = image_HWC.shape[:2]
        row |= {columns.HEIGHT: height, columns.WIDTH: width, columns.BYTES: len(data), columns.SHA256: sha256_of(data)}
        if row[columns.LABEL_URI] is not None:
            label = stored_label(row, (height, width), orientation)
            labels.append(facts_of(row[columns.LABEL_URI], label.stored, row[columns.LABEL_ENCODING]))
            train_ids = to_train_ids(row, label.stored, self.classes)  # raises for unknown ids
            row[columns.LABEL_PIXELS] = pixels_by_class(train_ids, self.classes.num_classes)
            row[columns.LABEL_SHA256] = label.sha256
            if self.rewritten is not None or row[columns.LABEL_ENCODING] == COLORS:
                self._rewrite(row, train_ids, folder)
        looks[row[columns.SHA256]] = thumbnail(image_HWC)
        return row

    def _rewrite(self, row: dict[str, Any], train_ids: UInt8, folder: Location) -> None:
        data = encode_png(train_ids, self.classes.palette)
        uri = f"labels/{columns.file_name(row[columns.FRAME_ID], '.png')}"
        (folder / uri).write_bytes(data)
        row |= {columns.LABEL_URI: uri, columns.LABEL_SHA256: sha256_of(data), columns.LABEL_ENCODING: TRAIN_IDS}


def thumbnail_table(looks: Mapping[str, UInt8]) -> pa.Table:
    """Thumbnails by the sha256 of their image files."""
    values = pa.array([value.tolist() for value in looks.values()], pa.list_(pa.uint8(), NUM_VALUES))
    return pa.table({columns.SHA256: pa.array(looks, pa.string()), THUMBNAIL: values})


# -- scenes ----------------------------------------------------------------------------------------------------------


def _scenes(dataset: ScenesDataset, name: str, classes: AnyTaxonomy) -> _Pass:
    known = taxonomy(classes)
    if dataset.labelled and known.name != SCENES_TAXONOMY:
        raise UserError(
            f"dataset {name}: scenes are labelled with the classes of {SCENES_TAXONOMY}, not of {known.name}",
            cure=f"set taxonomy: {SCENES_TAXONOMY}, or labelled: false for this dataset",
        )
    domains = scene_domains({str(domain): share for domain, share in dataset.mix.items()}, dataset.first, dataset.count)
    rows = pa.table({_INDEX: range(dataset.first, dataset.first + dataset.count), columns.DOMAIN: domains})
    height, width = dataset.size
    palette = tuple(known.palette) if dataset.labelled else None
    settings = {"dataset": name, "scene_seed": dataset.scene_seed, "height": height, "width": width}
    return _Pass(rows, SceneWriter, settings | {"palette": palette})


@dataclass
class SceneWriter:
    """Draws the scenes of a shard and writes them as PNG; `palette` (None = no labels) colours the label files."""

    dataset: str
    scene_seed: int
    height: int
    width: int
    palette: tuple[tuple[int, int, int], ...] | None

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        looks: dict[str, UInt8] = {}
        frames = [self._write(row[_INDEX], row[columns.DOMAIN], folder, looks) for row in rows.to_pylist()]
        return {
            THUMBNAILS: thumbnail_table(looks),
            "frames": frame_table(frames, extra={TRUE_DOMAIN: pa.string()}),
            "quarantine": quarantine_table([]),
        }

    def _write(self, index: int, domain: str, folder: Location, looks: dict[str, UInt8]) -> dict[str, Any]:
        drawn = scene(self.scene_seed, index, domain, self.height, self.width)
        image, uri = encode_png(drawn.image), f"images/{index:06d}.png"
        (folder / uri).write_bytes(image)
        row = {
            columns.FRAME_ID: f"{self.dataset}/{index:06d}",
            columns.URI: uri,
            columns.DATASET: self.dataset,
            columns.DOMAIN: "unknown" if self.palette is None else domain,
            columns.WIDTH: self.width,
            columns.HEIGHT: self.height,
            columns.BYTES: len(image),
            columns.SHA256: sha256_of(image),
            TRUE_DOMAIN: domain,
        }
        looks[sha256_of(image)] = thumbnail(drawn.image)
        if self.palette is not None:
            label, label_uri = encode_png(drawn.label, self.palette), f"labels/{index:06d}.png"
            (folder / label_uri).write_bytes(label)
            row |= {
                columns.LABEL_URI: label_uri,
                columns.LABEL_SHA256: sha256_of(label),
                columns.LABEL_ENCODING: TRAIN_IDS,
                columns.LABEL_PIXELS: pixels_by_class(drawn.label, len(self.palette)),
            }
        return row
