"""Masks of images and videos, without a recipe and without a run: the work of `nightseg predict`.

What was interrupted continues: finished shards of frames are remembered in a hidden work folder below the output, under
a key of the model's bytes, the settings and the listing of the source. Another model, other settings or changed files
have another key, so a mask of theirs is never taken for one of these. When all is done the work folder goes, and the
same command given again makes everything anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from nightseg.cluster import ray as cluster
from nightseg.cluster.map import map_shards
from nightseg.cluster.settings import MapCompute
from nightseg.data import table as frame
from nightseg.data.images import BadFrame
from nightseg.data.sources import Source, Video, find_source
from nightseg.data.video import need_av, new_video, open_video
from nightseg.networks.model_folder import TENSORS, load_card
from nightseg.progress import Progress
from nightseg.segmenter.inference import WHOLE_FRAME, Inference
from nightseg.segmenter.predict import (
    PICTURE_SUFFIX,
    Image,
    Picture,
    Segmented,
    Segmenter,
    UnreadRow,
    check_kind,
    overlay,
    picture,
    quarantined,
    segment_rows,
    usable_device,
)
from nightseg.stages.predict import check_pictures
from nightseg.storage import Attempt, Location, Stage, UserError, Workspace, hash_of, sha256_of

VERSION = 1
SHARD_FRAMES = 64  # what is lost when the work is interrupted, at most
_WRITERS = 2  # threads that encode pictures; the encoders of Pillow leave the interpreter to others
WORKED = "worked"


@dataclass(frozen=True)
class Wishes:
    """What is made of every frame, and how. `device` None: CUDA where there is one."""

    save: tuple[Picture, ...] = ("mask",)
    inference: Inference = WHOLE_FRAME
    batch: int = 8
    device: str | None = None
    overlay_video: bool = False


def predict_frames(
    model: Location, source: str, out: Location, *, wishes: Wishes, actors: int | None = None, progress: Progress
) -> dict[str, Any]:
    """Segment what `source` points at (see `find_source`). Returns what was done, and writes it to prediction.json.

    The mask of `a/b.jpg` is `<out>/a/b.png`, its other pictures `<out>/<picture>/a/b.*`; frame 7 of the video `a/c.mp4`
    is `a/c/000007` in the same way. Frames that cannot be used do not stop the rest: `<out>/quarantine.json` lists
    them with their reasons. `actors` None: in this process; else on as many actors of Ray Data (images only).

    Raises UserError: no model, nothing to read, none of it usable, two frames that would be written to one file.
    """
    started = time.monotonic()
    wishes = check_wishes(wishes)
    card = load_card(model)
    check_kind(model, card)
    if actors is None:
        usable_device(wishes.device)
    found = find_source(source)
    _check_source(found, wishes, actors, source)
    identity = {"model": hash_of([card, sha256_of((model / TENSORS).read_bytes())]), "source": found.identity}
    workspace = Workspace(out / ".work")
    with workspace.lock(), nullcontext() if actors is None else cluster.left_as_found():
        done = _Done(list(found.bad))
        if found.images:
            stage = _stage(workspace, "images", wishes, identity)
            _predict_images(found, model, out, wishes, actors, stage.open(), progress, done)
        if found.videos:
            segmenter = Segmenter(model, wishes.device, wishes.inference)
            for number, video in enumerate(found.videos):
                stage = _stage(workspace, f"video-{number}", wishes, identity)
                _predict_video(video, segmenter, out, wishes, stage.open(), progress, done)
    (out / "quarantine.json").write_json(done.bad)
    workspace.root.delete()
    if not done.written:
        first = done.bad[0]
        raise UserError(
            f"none of the {len(done.bad)} frames of {source} can be used; the first, {first[frame.URI]}, is "
            f"{first[frame.REASON]} ({first[frame.DETAIL]}). All are listed in {out / 'quarantine.json'}"
        )
    answer = {
        "model": str(model),
        "source": source,
        "images": done.written + len(done.bad),
        "written": done.written,
        "quarantined": len(done.bad),
        "out": out.uri,
        "save": list(wishes.save),
        "taxonomy": card["taxonomy"]["name"],
        "seconds": round(time.monotonic() - started, 3),
    }
    (out / "prediction.json").write_json(answer | {"inference": asdict(wishes.inference), "sha256": identity})
    return answer


class _Done:
    """What came of all frames so far."""

    def __init__(self, bad: list[dict[str, Any]]) -> None:
        self.written = 0
        self.bad = bad


def check_wishes(wishes: Wishes) -> Wishes:
    """With pictures in their own order. Raises UserError: an unknown picture, or none, or a batch of no frame."""
    if wishes.batch < 1:
        raise UserError(f"batch {wishes.batch}: at least one frame goes through the network at a time")
    return Wishes(**(vars(wishes) | {"save": check_pictures(wishes.save)}))


def _check_source(found: Source, wishes: Wishes, actors: int | None, source: str) -> None:
    """What cannot be done is said before anything is."""
    if found.videos:
        need_av()
        if actors is not None:
            raise UserError(f"{source}: a video is decoded in order, in one process. Cure: leave --actors out.")
    elif wishes.overlay_video:
        raise UserError(f"{source}: --overlay-video needs a video. Cure: --save overlay, for a picture of each image.")
    owner: dict[str, str] = {}
    for row in found.images:
        for file in _names(row[frame.FRAME_ID], wishes.save).values():
            if owner.setdefault(file, row[frame.FRAME_ID]) != row[frame.FRAME_ID]:
                raise UserError(
                    f"the images {owner[file]} and {row[frame.FRAME_ID]} would both write {file}; rename their folder, "
                    "or save one kind of picture at a time"
                )
    for video in found.videos:
        folders = {str(PurePosixPath(file).parent) for file in _names(f"{video.name}/000000", wishes.save).values()}
        taken = [file for file in owner if str(PurePosixPath(file).parent) in folders]
        if taken:
            raise UserError(
                f"the frames of the video {video.name} and the image {owner[taken[0]]} would be written to one folder; "
                "rename either, or give them one after the other"
            )


def _stage(workspace: Workspace, name: str, wishes: Wishes, identity: Mapping[str, str]) -> Stage:
    # The batch is part of it: a network may round differently with another one.
    recipe = {"save": list(wishes.save), "inference": asdict(wishes.inference), "batch": wishes.batch}
    return workspace.stage("predict", name, version=VERSION, recipe=recipe, inputs=identity, seed=0)


def _names(frame_id: str, save: Sequence[Picture]) -> dict[Picture, str]:
    """File of each picture below the output folder."""
    return {
        kind: ("" if kind == "mask" else f"{kind}/") + frame.file_name(frame_id, PICTURE_SUFFIX[kind]) for kind in save
    }


# -- images ----------------------------------------------------------------------------------------------------------


class MaskWriter:
    """Segments the images of a shard and writes their pictures straight to where they belong."""

    def __init__(
        self,
        model: Location,
        out: Location,
        wishes: Wishes,
    ) -> None:
        self.segmenter = Segmenter(model, wishes.device, wishes.inference)
        self.out = out
        self.wishes = wishes
        self.advance: Callable[[int], None] | None = None

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        """`worked` (frame_id) and `quarantine`; the names of the pictures follow from the ids."""
        worked, bad = [], []
        with Writers(self.segmenter, self.out, self.wishes.save) as writers:
            for result in segment_rows(self.segmenter, rows, self.wishes.batch):
                if isinstance(result, UnreadRow):
                    bad.append(quarantined(result.row, result.fault))
                else:
                    writers.write(result.row[frame.FRAME_ID], result.image, result.segmented)
                    worked.append(result.row[frame.FRAME_ID])
                if self.advance is not None:
                    self.advance(1)
        return {
            WORKED: pa.table({frame.FRAME_ID: pa.array(worked, pa.string())}),
            "quarantine": frame.quarantine_table(bad),
        }


class Writers:
    """Encodes and writes pictures beside the network's work. All are on disk when the `with` is left."""

    def __init__(self, segmenter: Segmenter, out: Location, save: Sequence[Picture]) -> None:
        self.classes = segmenter.taxonomy
        self.out = out
        self.save = save
        self._pool = ThreadPoolExecutor(_WRITERS, thread_name_prefix="nightseg-write")
        self._open: deque[Future[None]] = deque()

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._open and kind is None:
                self._open.popleft().result()
        finally:
            self._pool.shutdown(cancel_futures=True)

    def write(self, frame_id: str, image: Image, segmented: Segmented) -> None:
        """Raises what an earlier write raised. Few wait at a time: each holds a frame in memory."""
        self._open.append(self._pool.submit(self._write, frame_id, image, segmented))
        if len(self._open) > 2 * _WRITERS:
            self._open.popleft().result()

    def _write(self, frame_id: str, image: Image, segmented: Segmented) -> None:
        for kind, name in _names(frame_id, self.save).items():
            (self.out / name).write_bytes(picture(kind, image, segmented, self.classes))


def _predict_images(
    found: Source,
    model: Location,
    out: Location,
    wishes: Wishes,
    actors: int | None,
    attempt: Attempt,
    progress: Progress,
    done: _Done,
) -> None:
    rows = frame.frame_table(found.images)
    if actors is not None:
        wishes = Wishes(**(vars(wishes) | {"device": wishes.device or "cpu"}))
    on_gpu = wishes.device is not None and wishes.device.startswith("cuda")
    compute = MapCompute(actors=actors or 0, gpus_per_actor=float(on_gpu), shard_rows=SHARD_FRAMES)
    arguments = {"model": model, "out": out, "wishes": wishes}
    shards = map_shards(
        rows, MaskWriter, arguments, attempt=attempt, compute=compute, progress=progress, title="predict"
    )
    done.written += shards.count(WORKED)
    done.bad += shards.table("quarantine").to_pylist()


# -- videos ----------------------------------------------------------------------------------------------------------


def _predict_video(
    video: Video,
    segmenter: Segmenter,
    out: Location,
    wishes: Wishes,
    attempt: Attempt,
    progress: Progress,
    done: _Done,
) -> None:
    """Frame by frame until its end, or until it is damaged; then the frames before stay, and the first bad is listed.

    What an interrupted pass has finished is decoded and not segmented again. For an overlay video all of it is,
    because a video cannot be continued.
    """
    attempt.plan(0, SHARD_FRAMES)  # how many frames there are is known at the end
    num_frames = 0
    faults: list[BadFrame] = []
    try:
        with ExitStack() as stack:
            clip = stack.enter_context(open_video(video.file))
            task = stack.enter_context(progress.task(f"predict {video.file.name}", clip.length, "frames"))
            add = None
            if wishes.overlay_video:
                place = out / frame.file_name(video.name, ".overlay.mp4")
                add = stack.enter_context(new_video(place, clip.rate))
            worker = VideoWorker(video.name, segmenter, out, wishes, attempt, add, task.advance)
            images = _until_damage(clip.frames, faults)
            for index in count():
                num_of_shard = worker(index, islice(images, SHARD_FRAMES))
                num_frames += num_of_shard
                if num_of_shard < SHARD_FRAMES:
                    break
    except BadFrame as fault:  # it cannot even be opened
        faults.append(fault)
    done.written += num_frames
    row = {frame.FRAME_ID: f"{video.name}/{num_frames:06d}", frame.URI: video.file.uri}
    done.bad += [quarantined(row, fault) for fault in faults]


def _until_damage(images: Iterator[Image], faults: list[BadFrame]) -> Iterator[Image]:
    try:
        yield from images
    except BadFrame as fault:
        faults.append(fault)


@dataclass(frozen=True)
class VideoWorker:
    """Segments the frames of one video, a shard of consecutive frames at a time."""

    name: str
    segmenter: Segmenter
    out: Location
    wishes: Wishes
    attempt: Attempt
    add: Callable[[Image], None] | None  # takes the frames of the overlay video
    advance: Callable[[int], None]

    def __call__(self, index: int, images: Iterator[Image]) -> int:
        """Takes all images of the shard; returns how many there were."""
        if self.add is None and self.attempt.shard(index) is not None:
            num_images = sum(1 for _ in images)
            self.advance(num_images)
            return num_images
        started, num_images = time.monotonic(), 0
        with Writers(self.segmenter, self.out, self.wishes.save) as writers:
            while batch := list(islice(images, self.wishes.batch)):
                for image, segmented in zip(batch, self.segmenter.batch(batch), strict=True):
                    number = index * SHARD_FRAMES + num_images
                    writers.write(f"{self.name}/{number:06d}", image, segmented)
                    if self.add is not None:
                        self.add(overlay(image, self.segmenter.taxonomy.colourize(segmented.labels)))
                    num_images += 1
                    self.advance(1)
        self.attempt.write_shard(index, {}, rows_in=num_images, seconds=time.monotonic() - started)
        return num_images
