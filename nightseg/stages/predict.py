"""Segment frames and videos to look at and to use elsewhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count, islice
from typing import Any, Unpack

import numpy as np
import pyarrow as pa

from nightseg.cluster.map import Work, map_shards
from nightseg.cluster.settings import MapCompute
from nightseg.data import table as frame
from nightseg.data.images import BadFrame
from nightseg.data.overlay import mixed, with_legend
from nightseg.data.taxonomy import Taxonomy
from nightseg.data.video import new_video, open_video
from nightseg.progress import Progress
from nightseg.segmenter.pictures import PICTURE_SUFFIX, PICTURES, Picture, picture
from nightseg.segmenter.predict import (
    WHOLE_FRAME,
    Image,
    RowSegmenter,
    Segmented,
    Segmenter,
)
from nightseg.segmenter.settings import Inference
from nightseg.storage import Attempt, Commit, Location, UserError, sha256_of

VERSION = 3

PREDICTION_URI = "prediction_uri"  # the mask: palette PNG of train ids, relative to the commit's folder
MEAN_CONFIDENCE = "mean_confidence"
_WRITERS = 2  # threads that encode pictures; the encoders of Pillow leave the interpreter to others
_FOLDERS: Mapping[Picture, str] = {picture: f"{picture}s/" for picture in PICTURES} | {"confidence": "confidence/"}
_FOLDERS_OUTSIDE: Mapping[Picture, str] = {picture: f"{picture}/" for picture in PICTURES} | {"mask": ""}


def predict(
    frames: pa.Table,
    model: Commit | Location,
    *,
    name: str,
    save: Sequence[Picture] = PICTURES,
    inference: Inference = WHOLE_FRAME,
    device: str | None = None,
    out: Location | None = None,
    legend: bool = False,
    **work: Unpack[Work],
) -> Commit:
    """Commit `predictions` (the frame's columns, mean_confidence, `<picture>_uri` and `_sha256` a picture) and
    `quarantine`; the mask's columns are `prediction_uri` and `prediction_sha256`. `frames` has absolute uris.

    `out`: a folder for the pictures, which are named by `picture_files`; None = they lie below the attempt.
    `legend`: the classes stand below the pictures that show their colours.
    Raises UserError: no frame, no model, an unknown picture, more bad frames than `max_bad_fraction`.
    """
    wanted = check_pictures(save)
    if frames.num_rows == 0:
        raise UserError(
            f"predict {name}: the dataset holds no frame; look at its quarantine table", cure="another dataset"
        )
    columns = [column for column in frames.column_names if column in frame.FRAME_SCHEMA.names]
    folder = model if isinstance(model, Location) else model.folder / "model"
    by = RowSegmenter(folder, work["compute"], inference, device)
    arguments = {"by": by, "save": wanted, "out": out, "legend": legend}
    shards = map_shards(frames.select(columns), Predictor, arguments, title=f"predict {name}", **work)
    return shards.finish("predictions", summary={"save": list(wanted)})


@dataclass
class Predictor:
    """Segments the frames of a shard and writes their pictures."""

    by: RowSegmenter
    save: Sequence[Picture]
    out: Location | None = None
    legend: bool = False
    advance: Callable[[int], None] = lambda count: None

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        made: list[tuple[dict[str, Any], Future[dict[str, str]]]] = []
        bad: list[dict[str, Any]] = []
        with PictureWriter(self.by.segmenter.taxonomy, folder, self.save, self.out, self.legend) as writer:
            for result in self.by.segment(rows, bad):
                sure = float(result.segmented.confidence.mean(dtype=np.float64))
                written = writer.write(result.row[frame.FRAME_ID], result.image, result.segmented)
                made.append(({**result.row, MEAN_CONFIDENCE: sure}, written))
                self.advance(1)
        extra = {MEAN_CONFIDENCE: pa.float64()}
        extra |= {_column(kind, part): pa.string() for kind in self.save for part in ("uri", "sha256")}
        good = frame.frame_table(({**row, **written.result()} for row, written in made), extra=extra)
        return {"predictions": good, "quarantine": frame.quarantine_table(bad)}


class PictureWriter:
    """Encodes and writes pictures beside the network's work. All are on disk when the `with` is left."""

    def __init__(
        self,
        classes: Taxonomy,
        folder: Location,
        save: Sequence[Picture],
        out: Location | None = None,
        legend: bool = False,
    ) -> None:
        self.classes = classes
        self.legend = legend
        self.folder = folder if out is None else out
        self.is_outside = out is not None
        self.save = save
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="nightseg-write")
        self._open: deque[Future[dict[str, str]]] = deque()

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._open and kind is None:
                self._open.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, frame_id: str, image: Image, segmented: Segmented) -> Future[dict[str, str]]:
        """The columns of the pictures, later. Raises what an earlier write raised. Few wait: each holds a frame."""
        self._open.append(self._pool.submit(self._write, frame_id, image, segmented))
        latest = self._open[-1]
        if len(self._open) > 2 * _WRITERS:
            self._open.popleft().result()
        return latest

    def _write(self, frame_id: str, image: Image, segmented: Segmented) -> dict[str, str]:
        columns: dict[str, str] = {}
        for kind, file in picture_files(frame_id, self.save, self.is_outside).items():
            data = picture(kind, image, segmented, self.classes, self.legend)
            (self.folder / file).write_bytes(data)
            uri = (self.folder / file).uri if self.is_outside else file
            columns |= {_column(kind): uri, _column(kind, "sha256"): sha256_of(data)}
        return columns


def picture_files(frame_id: str, save: Sequence[Picture], is_outside: bool = True) -> dict[Picture, str]:
    """File of each picture below its folder: outside of a run the mask of `a/b` is `a/b.png`, its overlay
    `overlay/a/b.jpg`."""
    folders = _FOLDERS_OUTSIDE if is_outside else _FOLDERS
    return {kind: folders[kind] + frame.file_name(frame_id, PICTURE_SUFFIX[kind]) for kind in save}


def _column(kind: Picture, part: str = "uri") -> str:
    return f"prediction_{part}" if kind == "mask" else f"{kind}_{part}"


def check_pictures(save: Sequence[str]) -> tuple[Picture, ...]:
    """The pictures in their own order, each once. Raises UserError for an unknown one, or for none."""
    unknown = [kind for kind in save if kind not in PICTURES]
    if unknown or not save:
        what = f"unknown picture '{unknown[0]}'" if unknown else "no picture is asked for"
        raise UserError(f"save: {what}; known: {', '.join(PICTURES)}", cure="name some of these, with commas")
    return tuple(kind for kind in PICTURES if kind in save)


# -- videos ----------------------------------------------------------------------------------------------------------


def predict_video(
    video: Location,
    model: Location,
    *,
    name: str,
    out: Location,
    save: Sequence[Picture],
    inference: Inference,
    overlay_video: bool,
    legend: bool = False,
    device: str | None,
    attempt: Attempt,
    compute: MapCompute,
    progress: Progress,
) -> Commit:
    """Segment a video frame by frame until its end, or until it is damaged; then the frames before stay, and the first
    bad one is committed as `quarantine`. Frame 7 is called `<name>/000007`.

    What an interrupted pass has finished is decoded and not segmented again. For an overlay video all of it is,
    because a video cannot be continued.
    """
    num_frames = 0
    faults: list[BadFrame] = []
    attempt.plan(0, compute.shard_rows)  # how many frames there are is known at the end
    segmenter = Segmenter(model, device, inference)
    try:
        with ExitStack() as stack:
            clip = stack.enter_context(open_video(video))
            task = stack.enter_context(progress.task(f"predict {video.name}", clip.length, "frames"))
            add = None
            if overlay_video:
                add = stack.enter_context(new_video(out / frame.file_name(name, ".overlay.mp4"), clip.rate))
            images = _until_damage(clip.frames, faults)
            for index in count():
                shard = islice(images, compute.shard_rows)
                if add is None and attempt.shard(index) is not None:
                    num_of_shard = sum(1 for _ in shard)
                    task.advance(num_of_shard)
                else:
                    with PictureWriter(segmenter.taxonomy, attempt.folder, save, out, legend) as writer:
                        num_of_shard = _segment(shard, segmenter, writer, f"{name}/", num_frames, compute.batch, add)
                        # Advanced a shard at a time: it is done when its pictures are written.
                    attempt.write_shard(index, {}, rows_in=num_of_shard, seconds=0.0)
                    task.advance(num_of_shard)
                num_frames += num_of_shard
                if num_of_shard < compute.shard_rows:
                    break
    except BadFrame as fault:  # it cannot even be opened
        faults.append(fault)
    row = {frame.FRAME_ID: f"{name}/{num_frames:06d}", frame.URI: video.uri}
    (attempt.folder / "quarantine.parquet").write_table(
        frame.quarantine_table(frame.quarantined(row, fault) for fault in faults)
    )
    return attempt.finish(
        rows_in=num_frames + len(faults),
        rows_out=num_frames,
        quarantined=len(faults),
        outputs=["quarantine.parquet"],
    )


def _segment(
    images: Iterator[Image],
    segmenter: Segmenter,
    writer: PictureWriter,
    prefix: str,
    first: int,
    batch_size: int,
    add: Callable[[Image], None] | None,
) -> int:
    """Takes all images; returns how many there were. `add` takes the frames of the overlay video."""
    number = first
    while batch := list(islice(images, batch_size)):
        for image, segmented in zip(batch, segmenter.batch(batch), strict=True):
            writer.write(f"{prefix}{number:06d}", image, segmented)
            if add is not None:
                shown = mixed(image, writer.classes.colourize(segmented.labels))
                add(with_legend(shown, writer.classes) if writer.legend else shown)
            number += 1
    return number - first


def _until_damage(images: Iterator[Image], faults: list[BadFrame]) -> Iterator[Image]:
    try:
        yield from images
    except BadFrame as fault:
        faults.append(fault)
