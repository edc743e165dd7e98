"""Videos as frames and frames as a video, through PyAV: the extra `video`.

PyAV rather than torchcodec: its wheels bring FFmpeg along, it follows no version of PyTorch, and it writes as well.
"""

from __future__ import annotations

import logging
import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nightseg.data.images import MAX_PIXELS, BadFrame
from nightseg.storage import Location, UserError
from nightseg.storage.scratch import temporary_folder

UInt8 = NDArray[np.uint8]

# A video comes from a stranger. FFmpeg also "plays" lists of other files and addresses; these containers hold pictures.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts"
_ENCODERS = ("libx264", "mpeg4")  # the better one is not part of every FFmpeg
_DISCARDED = 2  # AVINDEX_DISCARD_FRAME: decoded for others, not shown itself
_LOG = logging.getLogger("nightseg.data")
_USUAL_RATE = Fraction(25)


class Clip(NamedTuple):
    """An open video."""

    frames: Iterator[UInt8]  # upright uint8 (H, W, 3) RGB, in the order they are shown
    length: int | None  # about how many, as the file says; None if it does not
    rate: Fraction  # frames a second, the mean if it varies


@contextmanager
def open_video(file: Location) -> Iterator[Clip]:
    """The frames of a video, decoded as they are asked for. Damage in the middle is a BadFrame from `frames`.

    Of several streams the film is taken, not a cover; of its packets those that are shown (edit lists hide some).
    Raises UserError without PyAV; BadFrame: missing, unreadable (no video, no picture in it), decompression_bomb.
    """
    av = need_av()
    try:
        with file.open_input() as stream, av.open(stream, options={"format_whitelist": _FORMATS}) as container:
            video = _film(container, file)
            video.thread_type = "AUTO"
            video.codec_context.options = {"err_detect": "crccheck+explode"}  # what it would conceal is damage
            _check_size(video.codec_context.width * video.codec_context.height)
            if "matroska" in container.format.name:
                _check_matroska(file)
            yield Clip(_decoded(container, video), _length(container, video), video.average_rate or _USUAL_RATE)
    except FileNotFoundError as error:
        raise BadFrame("missing", f"{file} is not there") from error
    except av.error.FFmpegError as error:
        raise BadFrame("unreadable", f"no intact video: {error.strerror}") from error


def _film(container: Any, file: Location) -> Any:
    """The video among pictures that lie beside it: covers and thumbnails, marked as such or of a single frame."""
    import av

    films = [one for one in container.streams.video if not one.disposition & av.stream.Disposition.attached_pic]
    if not films:
        raise BadFrame("unreadable", f"{file.name} holds {'only a cover' if container.streams.video else 'no video'}")
    moving = [one for one in films if one.frames != 1] or films
    best = container.streams.best("video")
    if "matroska" in container.format.name and best is not None:  # which does not say how many frames there are
        moving = [best] if best in moving else moving
    chosen = best if best in moving else moving[0]
    if len(moving) > 1:
        _LOG.warning("%s holds %d videos: number %d is read", file, len(moving), 1 + films.index(chosen))
    return chosen


def _decoded(container: Any, video: Any) -> Iterator[UInt8]:
    """Upright frames. What comes before the first key frame, and needs what was cut off before it, is not shown."""
    import av

    num_frames = num_packets = 0
    wanted = _num_packets(container, video)
    first_shown: int | None = None  # time of the first key frame
    try:
        for packet in container.demux(video):
            if packet.is_corrupt:
                break
            num_packets += packet.pts is not None or packet.size > 0  # the last one of all is empty
            if first_shown is None and packet.is_keyframe:
                first_shown = packet.pts
            is_leading = packet.pts is not None and (first_shown is None or packet.pts < first_shown)
            try:
                pictures = packet.decode()
            except av.error.InvalidDataError:
                if not is_leading:
                    raise
                continue
            for picture in pictures:
                if picture.is_corrupt and (picture.pts is None or first_shown is None or picture.pts < first_shown):
                    continue
                yield _shown(picture, num_frames)
                num_frames += 1
        else:
            if num_frames == 0:
                raise BadFrame("truncated", "there is no frame in it")
            if num_packets >= wanted:
                return
        for picture in video.codec_context.decode(None) if packet.is_corrupt else ():
            yield _shown(picture, num_frames)
            num_frames += 1
    except av.error.FFmpegError as error:
        raise BadFrame("truncated", f"damaged after {num_frames} frames: {error.strerror}") from error
    of_all = f" of {video.frames}" if video.frames else ""
    raise BadFrame("truncated", f"the video ends or is damaged after {num_frames}{of_all} frames")


def _num_packets(container: Any, video: Any) -> int:
    """As the file says, without those that an edit list leaves out; 0 if it does not say."""
    indexed = len(video.index_entries) if "mov" in container.format.name else 0
    return (indexed or int(video.frames)) if video.frames else 0


def _shown(picture: Any, num_before: int) -> UInt8:
    if picture.is_corrupt:
        raise BadFrame("truncated", f"damaged after {num_before} frames")
    _check_size(picture.width * picture.height)
    if picture.interlaced_frame and not num_before:
        _LOG.warning("the video is interlaced: odd and even rows of a frame are of two moments")
    matrix = next((bytes(one) for one in picture.side_data if one.type.name == "DISPLAYMATRIX"), None)
    return upright(picture.to_ndarray(format="rgb24"), (1, 0, 0, 1) if matrix is None else _axes(matrix))


def _axes(matrix: bytes) -> tuple[int, int, int, int]:
    """The part of a display matrix (ISO 14496-12, 8.3.2.3) that turns and mirrors: a pixel (p, q), to the right and
    down, is shown at (a p + c q, b p + d q)."""
    a, b, _, c, d, *_ = struct.unpack("=9i", matrix)
    return a, b, c, d


def upright(image_HWC: UInt8, axes: tuple[int, int, int, int]) -> UInt8:
    """Turned, and mirrored, as a player shows it; `axes` (a, b, c, d) as of `_axes`, of the nearest quarter turn."""
    a, b, c, d = axes
    if abs(a) + abs(d) >= abs(b) + abs(c):
        right, down = a, d
    else:
        image_HWC, right, down = image_HWC.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image_HWC[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1])


def _check_matroska(file: Location) -> None:
    """Raise BadFrame if the file is shorter than its segment, which FFmpeg does not say."""
    with file.open_input() as stream:
        head = stream.read(4096)
    place = 4 + _ebml_number(head, 4)[1]
    place += _ebml_number(head, 4)[0]  # the segment follows the header
    if head[place : place + 4] != b"\x18\x53\x80\x67":
        return
    length, num_bytes = _ebml_number(head, place + 4)
    unknown = length == (1 << 7 * num_bytes) - 1  # while it was recorded
    if not unknown and place + 4 + num_bytes + length > file.size():
        missing = place + 4 + num_bytes + length - file.size()
        raise BadFrame("truncated", f"{missing} bytes at the end of the video are missing")


def _ebml_number(data: bytes, place: int) -> tuple[int, int]:
    """A number of variable length (RFC 8794, section 4), and how many bytes it has."""
    num_bytes = 9 - (data[place] if place < len(data) else 0).bit_length()
    if num_bytes > 8:
        return 0, 1
    return int.from_bytes(data[place : place + num_bytes], "big") & ((1 << 7 * num_bytes) - 1), num_bytes


def _length(container: Any, video: Any) -> int | None:
    """What the file says, or what follows from its length; good for a progress bar, not for a promise."""
    if video.frames:
        return _num_packets(container, video) - sum(bool(one.flags & _DISCARDED) for one in video.index_entries)
    if not container.duration or not video.average_rate:
        return None
    seconds = Fraction(container.duration, 1_000_000)
    return round(seconds * Fraction(video.average_rate))


def _check_size(num_pixels: int) -> None:
    if num_pixels > MAX_PIXELS:
        raise BadFrame("decompression_bomb", f"frames of {num_pixels} pixels, at most {MAX_PIXELS} are accepted")


@contextmanager
def new_video(file: Location, rate: Fraction) -> Iterator[Callable[[UInt8], None]]:
    """Write an MP4 (H.264 where FFmpeg has it) frame by frame: `add(image_HWC)` with uint8 RGB of one size.

    The file appears, whole, when the body ends without an error. Raises UserError without PyAV.
    """
    av = need_av()
    with temporary_folder() as folder:
        place = folder / "video.mp4"
        with av.open(str(place), mode="w") as container:
            stream = container.add_stream(_encoder(av), rate=rate)
            stream.pix_fmt = "yuv420p"

            def add(image_HWC: UInt8) -> None:
                height, width = image_HWC.shape[:2]
                # Colour is stored for two pixels at a time, so sides are even.
                even_HWC = np.pad(image_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
                if not stream.codec_context.is_open:
                    stream.height, stream.width = even_HWC.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(even_HWC, format="rgb24")))

            yield add
            if stream.codec_context.is_open:
                container.mux(stream.encode())
        if place.stat().st_size:
            with (
                place.open("rb") as written,
                mmap.mmap(written.fileno(), 0, access=mmap.ACCESS_READ) as data,
                memoryview(data) as view,
            ):
                file.write_bytes(view)


def _encoder(av: Any) -> str:
    return next(name for name in _ENCODERS if name in av.codecs_available)


def need_av() -> Any:
    """PyAV. Raises UserError, with the line that installs it, where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise UserError(
            "videos are read and written with PyAV, which is not installed here",
            cure="pip install av (or the extra `video` of nightseg)",
        ) from error
    return av
