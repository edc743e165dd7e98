"""PNG, TIFF, WebP and raw pixels: damage that their decoders show without a word.

What a file can prove: PNG has a checksum of every chunk, deflate in TIFF one of every strip. All others have none, so
a changed bit is another picture. But a hole, a run of one byte as failed copies and lost blocks leave it, is seen: by
what no encoder writes, by bytes that the decoder does not need then, or, of raw pixels, by ends inside of rows.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, TiffImagePlugin

from nightseg.data.jpeg import DamagedFile, check_jpeg

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HOLE = 64  # zeros: strips as LZW and PackBits that were measured have at most 4
_PAGE = 4096  # bytes that file systems lose at a time
_EDGE = 16  # pixels beside the edge of a row that may have the value of a hole by chance
_SURPLUS = 16  # bytes of a WebP that its decoder may leave; 2 were measured
_COMPRESSION, _JPEG_TABLES = 259, 347  # tags of TIFF
_PLACES, _LENGTHS = (273, 324), (279, 325)  # of strips, or tiles
_RAW, _LZW, _JPEG, _DEFLATE, _PACKBITS = 1, 5, 7, (8, 32946), 32773
_PACKED = 0x81  # PackBits has runs of it for flat areas of that value
_SAMPLES = {"L": 1, "P": 1, "RGB": 3, "BGR": 3, "RGBA": 4, "BGRA": 4, "RGBX": 4, "BGRX": 4, "CMYK": 4}


def check_stored(image: ImageFile.ImageFile, data: bytes, is_label: bool) -> None:
    """Raise DamagedFile where `data`, the file of an opened image, is not what an encoder wrote."""
    if image.format == "PNG":
        _check_png(data)
    elif image.format == "WEBP":
        _check_webp(data)
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image, data)
    if image.tile and all(one.codec_name == "raw" for one in image.tile):
        _check_raw(image, data, is_label)


# -- PNG ---------------------------------------------------------------------------------------------------------------


def _check_png(data: bytes) -> None:
    """All pixel data has its checksum: Pillow skips that of IDAT chunks and stops at the last pixel."""
    for kind, place, length in _png_chunks(data):
        if kind == b"IDAT" and place + length + 4 <= len(data):
            expected = struct.unpack_from(">I", data, place + length)[0]
            seen = zlib.crc32(memoryview(data)[place - 4 : place + length])
            if seen != expected:
                raise DamagedFile(f"the checksum of its pixels is {expected:08x}, theirs is {seen:08x}")


def check_rows(image: Image.Image, data: bytes) -> None:
    """DamagedFile if a decoded PNG holds fewer rows than it says, which Pillow leaves at 0 without a word.

    So the data is only counted where the last row is 0 throughout, or rows do not come in their order (Adam7).
    """
    width, height, depth, colours, _, _, interlace = struct.unpack_from(">IIBBBBB", data, 16)
    if not interlace and image.crop((0, height - 1, width, height)).getbbox() is not None:
        return
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    expected = 0
    for left, top, across, down in passes if interlace else [(0, 0, 1, 1)]:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        expected += rows * (1 + -(-columns * bits // 8)) if columns > 0 and rows > 0 else 0
    pixels = b"".join(data[at : at + length] for kind, at, length in _png_chunks(data) if kind == b"IDAT")
    found, _ = _inflated(pixels, expected)
    if found < expected:
        raise DamagedFile(f"its pixels are {found} of {expected} bytes")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where its content begins, length) of the chunks up to IEND."""
    place = len(PNG_SIGNATURE)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind == b"IEND":
            return
        yield kind, place + 8, length
        place += 12 + length


def _inflated(data: bytes, most: int) -> tuple[int, bool]:
    """How many bytes come out, and whether the stream ended with its checksum; of a bomb not much more than `most`."""
    stream, found = zlib.decompressobj(), 0
    try:
        while data and not stream.eof and found <= most:
            found += len(stream.decompress(data, 1 << 20))
            data = stream.unconsumed_tail
    except zlib.error:
        return found, False
    return found, stream.eof or found > most


# -- TIFF --------------------------------------------------------------------------------------------------------------


def _check_tiff(image: TiffImagePlugin.TiffImageFile, data: bytes) -> None:
    tags: Any = image.tag_v2
    compression = tags.get(_COMPRESSION, _RAW)
    if compression == _RAW:
        return
    places, lengths = (tags.get(strips) or tags.get(tiles) or () for strips, tiles in (_PLACES, _LENGTHS))
    for place, length in zip(places, lengths, strict=False):
        strip = data[place : place + length]
        if compression in _DEFLATE:
            if length and not _inflated(strip, 16 * image.width * image.height)[1]:
                raise DamagedFile("a strip has another checksum than its pixels")
        elif compression == _JPEG:
            tables = bytes(tags.get(_JPEG_TABLES) or b"\xff\xd8\xff\xd9")
            check_jpeg(tables[:-2] + strip[2:])
        elif compression in (_LZW, _PACKBITS) and (bytes(_HOLE) in strip or _runs(strip, _PACKED)):
            raise DamagedFile("its pixels have a hole")


# -- WebP --------------------------------------------------------------------------------------------------------------


def _check_webp(data: bytes) -> None:
    """Of a still image with a hole: it needs its bytes to the last few.

    Flat areas may be runs of one byte, too. But what comes behind a hole is read from a wrong place, and then the
    decoder is through with all pixels before the end, or misses bytes.
    """
    place = 12
    while place + 8 <= len(data):
        kind, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        pixels = data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2
        if kind not in (b"VP8 ", b"VP8L") or (bytes(_HOLE) not in pixels and not _runs(pixels)):
            continue
        kept = pixels[: (len(pixels) - _SURPLUS) // 2 * 2]
        chunk = kind + len(kept).to_bytes(4, "little") + kept
        try:
            cut = b"RIFF" + (4 + len(chunk)).to_bytes(4, "little") + b"WEBP" + chunk
            Image.open(io.BytesIO(cut), formats=["WEBP"]).load()
        except Exception:  # noqa: S112 what it is for; decoders raise what they like
            continue
        raise DamagedFile("its pixels have a hole: they need less than all bytes")


# -- raw pixels --------------------------------------------------------------------------------------------------------


def _check_raw(image: ImageFile.ImageFile, data: bytes, is_label: bool) -> None:
    """BMP, PPM and TIFF without compression: no run of one byte that begins and ends inside of rows.

    Either it lies where a file system loses pages; or, of an image, it is two whole rows and more, and the row before
    it and the row behind have next to none of that byte: areas of one colour have another outline.
    """
    first = image.tile[0]
    arguments = first.args if isinstance(first.args, tuple) else (first.args, 0)
    samples = _SAMPLES.get(str(arguments[0]))
    whole_rows = all(one.extents and one.extents[::2] == (0, image.width) for one in image.tile)
    in_order = all(one.offset < two.offset for one, two in itertools.pairwise(image.tile))
    if samples is None or image.width < 4 * _EDGE or not whole_rows or not in_order:
        return
    row = int(arguments[1] or 0) or samples * image.width
    edge = samples * min(_EDGE, image.width // 16)

    def is_inside(place: int) -> bool:
        return edge <= (place - first.offset) % row <= row - edge

    for start, end in _runs(memoryview(data)[first.offset :], least=min(_PAGE, 2 * row)):
        start, end = start + first.offset, end + first.offset
        is_page = start % _PAGE == 0 and (end % _PAGE == 0 or end == len(data))
        around = [data[max(first.offset, start - row) : start], data[end : end + row]]
        alike = [part.count(data[start]) for part in around]
        is_cut = end - start >= 2 * row and all(50 * n <= len(part) for n, part in zip(alike, around, strict=True))
        if is_inside(start) and (is_page or (is_cut and not is_label and (end == len(data) or is_inside(end)))):
            raise DamagedFile(f"its pixels have a hole of {end - start} bytes")


def _runs(data: bytes | memoryview, but: int = -1, least: int = _PAGE // 2) -> list[tuple[int, int]]:
    """Start and end of the runs of at least so many equal bytes, but for one value.

    A window every half of that length is looked at, so that data without such runs costs next to nothing.
    """
    values: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
    step = least // 2
    if step < 16 or len(values) < least:
        return []
    windows = values[: len(values) // step * step].reshape(-1, step)[:, :16]
    found: list[tuple[int, int]] = []
    for index in np.flatnonzero((windows == windows[:, :1]).all(axis=1)):
        place = int(index) * step
        if (found and place < found[-1][1]) or values[place] == but:
            continue
        start, end = place, place
        while start and len(back := np.flatnonzero(values[max(0, start - step) : start] != values[place])) == 0:
            start = max(0, start - step)
        if start:
            start = max(0, start - step) + int(back[-1]) + 1
        while end < len(values) and len(on := np.flatnonzero(values[end : end + step] != values[place])) == 0:
            end += step
        end = min(end + int(on[0]) if end < len(values) else end, len(values))
        if end - start >= least:
            found.append((start, end))
    return found
