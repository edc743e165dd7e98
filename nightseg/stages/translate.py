"""Translate frames to the other domain: a frame table and a translator in, images at native size and their table out.

Translation does not move anything, so every translated frame refers to the label of its source. What a translator is
depends on its kind; `open_translator` is the one place that knows them all.
Letters in tensor names: B batch, 3 RGB, H, W frame size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from nightseg.compute.inference import ShardWorker, map_shards
from nightseg.config import MapCompute
from nightseg.config_translators import (
    ColourTranslator,
    CommandTranslator,
    FourierTranslator,
    PhotometricTranslator,
    UntrainedTranslator,
)
from nightseg.frames import table as frame
from nightseg.frames.images import BadFrame, encode_png, read_image
from nightseg.frames.labels import train_ids_of
from nightseg.frames.taxonomy import Taxonomy, taxonomy
from nightseg.networks.unit import STRIDE, load_generators, to_uint8, to_unit_range
from nightseg.progress import Progress
from nightseg.storage import Location, UserError, sha256_of
from nightseg.translators.colour import match_histograms, reinhard
from nightseg.translators.command import Program, translate_by
from nightseg.translators.fourier import swap_low_amplitudes
from nightseg.translators.lenders import LenderReader, Palette, open_palette
from nightseg.translators.lights import Roles
from nightseg.translators.photometric import Optics, night_of
from nightseg.workspace import Attempt, Commit

VERSION = 1

PIXELS_AT_ONCE: Final = 1 << 20  # of one forward pass: about 1 GB at width 64; a larger frame goes alone
SMALLEST_SIDE: Final = 2 * STRIDE  # the latent needs two rows to reflect one

LENDER: Final = "lender"  # column: the frame whose light or colours a frame was given; null = it was given none

Domain = Literal["day", "night"]
Pixels = NDArray[np.uint8]
Row = Mapping[str, Any]


class Untrained(NamedTuple):
    """A translator that needs no training, with what it is given besides the frames."""

    settings: UntrainedTranslator
    lenders: pa.Table | None  # frames of the domain `to`, absolute uris; None = this kind takes none
    lenders_name: str  # of their dataset
    taxonomy: str


class Opened(NamedTuple):
    """The worker that does the shards of a translation, its arguments, and its line in the summary."""

    worker: type[ShardWorker]
    arguments: Mapping[str, Any]
    summary: Mapping[str, Any]


def translate(
    source: pa.Table,
    translator: Commit | Untrained,
    *,
    name: str,
    to: Domain,
    attempt: Attempt,
    progress: Progress,
    compute: MapCompute,
    max_bad_fraction: float,
) -> Commit:
    """Commit `frames` (PNGs under `images/`, domain `to`, dataset and id prefix `name`) and `quarantine`.

    `source` is a frame table with absolute uris; frames already of domain `to` are refused (UserError). UNIT (a commit)
    translates without noise; what other kinds draw follows from the attempt's seed and the frame's id. So the same
    frame, translator, seed and hardware give the same bytes, however the frames are cut into shards. A program of the
    user is deterministic if it says so.
    """
    begun = time.monotonic()
    _check(name, source, to)
    opened = open_translator(translator, name=name, to=to, seed=attempt.seed, batch=compute.batch)
    shards = map_shards(
        source,
        opened.worker,
        opened.arguments,
        attempt=attempt,
        shard_rows=compute.shard_rows,
        actors=compute.actors,
        cpus_per_actor=compute.cpus_per_actor,
        gpus_per_actor=compute.gpus_per_actor,
        progress=progress,
        title=f"translate {name}",
    )
    return attempt.finish(
        rows_in=source.num_rows,
        rows_out=sum(shard.rows("frames") for shard in shards),
        quarantined=sum(shard.rows("quarantine") for shard in shards),
        max_bad_fraction=max_bad_fraction,
        num_shards=len(shards),
        summary={"to": to, **opened.summary},
        seconds=time.monotonic() - begun,
    )


def open_translator(translator: Commit | Untrained, *, name: str, to: Domain, seed: int, batch: int) -> Opened:
    """The worker of a kind of translator. Raises UserError: no lender can be read."""
    where = {"name": name, "to": to}
    if isinstance(translator, Commit):
        arguments = {"model": translator.folder / "model", **where, "batch": batch}
        return Opened(TranslateFrames, arguments, {"translator": translator.name})
    settings, classes = translator.settings, taxonomy(translator.taxonomy)
    way: Way
    match settings:
        case PhotometricTranslator():
            optics = Optics(*(getattr(settings, field) for field in Optics._fields))
            roles = Roles.of(settings.classes.model_dump(), classes.classes)
            way = partial(_each, partial(_photometric, optics=optics, roles=roles, classes=classes, seed=seed))
        case FourierTranslator() | ColourTranslator():
            palette = _palette(translator, settings, seed)
            way = partial(_each, Lent(palette, _transfer(settings)))
        case CommandTranslator():
            program = Program(tuple(settings.argv), to, seed, settings.timeout_seconds)
            way = partial(_by_program, program=program, classes=classes)
    return Opened(TranslateRows, {"way": way, **where}, {"translator": settings.kind})


def _check(name: str, source: pa.Table, to: Domain) -> None:
    if source.num_rows == 0:
        raise UserError(f"dataset {name}: there is no frame to translate; look at the counts of its source dataset")
    already = source.filter(pc.equal(source[frame.DOMAIN], to))
    if already.num_rows:
        raise UserError(
            f"dataset {name}: {already.num_rows} of {source.num_rows} frames are {to} frames already (first "
            f"{already[frame.FRAME_ID][0].as_py()}) and cannot be translated to {to}; translate a dataset of the other "
            f"domain, or set `to: {'day' if to == 'night' else 'night'}`"
        )


class TranslateFrames:
    """Translates the frames of a shard. A frame that cannot be read goes to the quarantine table."""

    def __init__(self, model: Location, name: str, to: Domain, batch: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.generators = load_generators(model).to(self.device)
        self.name = name
        self.to: Domain = to
        self.batch = batch

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for group in self._groups(rows.to_pylist(), bad):
            translated = self.translate([image for _, image in group])
            good.extend(self._write(row, image, folder) for (row, _), image in zip(group, translated, strict=True))
        return {"frames": frame.frame_table(good), "quarantine": frame.quarantine_table(bad)}

    def translate(self, images: list[Pixels]) -> list[Pixels]:
        """uint8 HWC RGB images of one size -> the same in domain `to`."""
        images_B3HW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(self.device)
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda"):
            made_B3HW = to_uint8(self.generators.translate(to_unit_range(images_B3HW), self.to))
        return list(made_B3HW.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def _groups(
        self, rows: list[dict[str, Any]], bad: list[dict[str, Any]]
    ) -> Iterator[list[tuple[dict[str, Any], Pixels]]]:
        """Neighbouring frames of one size, at most `batch` and PIXELS_AT_ONCE; unreadable ones are added to `bad`."""
        group: list[tuple[dict[str, Any], Pixels]] = []
        for row in rows:
            try:
                image = _read(row)
            except BadFrame as error:
                bad.append(_quarantined(row, error))
                continue
            fits = len(group) < self.batch and (len(group) + 1) * image.shape[0] * image.shape[1] <= PIXELS_AT_ONCE
            if group and (not fits or image.shape != group[0][1].shape):
                yield group
                group = []
            group.append((row, image))
        if group:
            yield group

    def _write(self, row: dict[str, Any], image: Pixels, folder: Location) -> dict[str, Any]:
        return _write(row, image, folder, self.name, self.to)


def _read(row: dict[str, Any]) -> Pixels:
    image = read_image(Location.of(row[frame.URI]))
    if min(image.shape[:2]) < SMALLEST_SIDE:
        raise BadFrame(
            "not_an_image", f"{image.shape[1]} x {image.shape[0]} pixels; UNIT needs {SMALLEST_SIDE} pixels a side"
        )
    return image


def _write(row: Row, image: Pixels, folder: Location, name: str, to: Domain) -> dict[str, Any]:
    """Write the translated image; returns its row of the frame table."""
    frame_id = f"{name}/{row[frame.FRAME_ID]}"
    uri = f"images/{frame.file_name(frame_id, '.png')}"
    data = encode_png(image)
    (folder / uri).write_bytes(data)
    kept = {column: row.get(column) for column in frame.FRAME_SCHEMA.names}
    return kept | {
        frame.FRAME_ID: frame_id,
        frame.URI: uri,
        frame.DATASET: name,
        frame.DOMAIN: to,
        frame.HEIGHT: image.shape[0],
        frame.WIDTH: image.shape[1],
        frame.BYTES: len(data),
        frame.SHA256: sha256_of(data),
    }


def _quarantined(row: Row, fault: BadFrame) -> dict[str, Any]:
    keep = {column: row[column] for column in (frame.FRAME_ID, frame.URI)}
    return {**keep, frame.REASON: fault.reason, frame.DETAIL: fault.detail}


# -- translators that need no training --------------------------------------------------------------------------------


class Changed(NamedTuple):
    """A translated frame, and the id of the frame whose look it was given."""

    image: Pixels
    lender: str | None = None


Change = Callable[[Pixels, Row], Changed]
Way = Callable[[Iterable[Row]], Iterator[tuple[Row, Changed | BadFrame]]]


class TranslateRows:
    """Translates the frames of a shard in the way of an untrained translator; bad frames go to the quarantine table."""

    def __init__(self, way: Way, name: str, to: Domain) -> None:
        self.way = way
        self.name = name
        self.to: Domain = to

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        good: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        for row, changed in self.way(rows.to_pylist()):
            if isinstance(changed, BadFrame):
                bad.append(_quarantined(row, changed))
            else:
                written = _write(row, changed.image, folder, self.name, self.to)
                good.append(written | {LENDER: changed.lender})
        frames = frame.frame_table(good, extra={LENDER: pa.string()})
        return {"frames": frames, "quarantine": frame.quarantine_table(bad)}


def _each(change: Change, rows: Iterable[Row]) -> Iterator[tuple[Row, Changed | BadFrame]]:
    """One frame at a time, so one is in memory."""
    for row in rows:
        try:
            yield row, change(read_image(Location.of(row[frame.URI])), row)
        except BadFrame as fault:
            yield row, fault


def _by_program(
    rows: Iterable[Row], *, program: Program, classes: Taxonomy
) -> Iterator[tuple[Row, Changed | BadFrame]]:
    for row, image in translate_by(program, list(rows), classes):
        yield row, image if isinstance(image, BadFrame) else Changed(image)


def _photometric(image: Pixels, row: Row, *, optics: Optics, roles: Roles, classes: Taxonomy, seed: int) -> Changed:
    label = train_ids_of(row, classes, image.shape[:2])
    return Changed(night_of(image, label, optics=optics, roles=roles, seed=seed, frame_id=row[frame.FRAME_ID]))


class Lent:
    """Gives a frame the look of a lender."""

    def __init__(self, palette: Palette, transfer: Callable[[Pixels, Pixels], Pixels]) -> None:
        self.palette = palette
        self.transfer = transfer
        self.read = LenderReader()

    def __call__(self, image: Pixels, row: Row) -> Changed:
        lender = self.palette.choose(image, row[frame.FRAME_ID])
        return Changed(self.transfer(image, self.read(lender)), lender.frame_id)


def _transfer(settings: FourierTranslator | ColourTranslator) -> Callable[[Pixels, Pixels], Pixels]:
    if isinstance(settings, FourierTranslator):
        return partial(swap_low_amplitudes, beta=settings.beta)
    return reinhard if settings.method == "reinhard" else match_histograms


def _palette(translator: Untrained, settings: FourierTranslator | ColourTranslator, seed: int) -> Palette:
    lenders = translator.lenders
    assert lenders is not None, f"a {settings.kind} translator without lenders"
    named = list(zip(lenders[frame.FRAME_ID].to_pylist(), lenders[frame.URI].to_pylist(), strict=True))
    what = f"dataset {translator.lenders_name}"
    return open_palette(named, count=settings.lenders, among=settings.among, seed=seed, what=what)
