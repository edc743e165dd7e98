"""JPEG, strictly: what libjpeg decodes with no more than a warning is damaged, unless only metadata or filler is odd.

A cut scan with an end marker, or a hole of zeros, decodes to a whole image whose lower part is grey or shifted.
`simplejpeg` reports the first warning of libjpeg-turbo and gives the same pixels as Pillow, which hides them all. What
cameras do and no pixel depends on is no damage: extraneous bytes between segments, filler at the end of a scan, odd
versions and parameters in headers. Such files are looked at again without these, as ITU-T T.81 (annex B) lays them out.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray

Colours = Literal["GRAY", "RGB", "CMYK"]
NUM_CHANNELS: dict[Colours, int] = {"GRAY": 1, "RGB": 3, "CMYK": 4}

MAX_SCANS = 500  # as djpeg -maxscans: a progressive file of a few kB may ask for minutes of work
_MAX_JUNK = 8  # bytes of any value that web cameras leave after a scan or restart interval; zeros may be more
_HOLE = bytes(64)
_SEQUENTIAL = (0xC0, 0xC1)
_PROGRESSIVE = 0xC2
_IN_STEPS = (_PROGRESSIVE, 0xCA)  # progressive, Huffman or arithmetic: coefficients come a few, and a few bits, a scan
_FRAMES = (*_SEQUENTIAL, _PROGRESSIVE, 0xC3, 0xC9, 0xCA, 0xCB)
_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_CANNOT = ("Could not determine subsampling", "Unsupported color conversion")  # says nothing about damage


Block = tuple[list[int], list[int]]  # codes of DC and AC, see `_lookup`


class DamagedFile(Exception):  # noqa: N818 a property of the data
    """Pixels of an image file are not those that were encoded; the text says how it shows."""


def decode_jpeg(data: bytes, height: int, width: int, colours: Colours) -> NDArray[np.uint8] | None:
    """uint8 HWC pixels of a JPEG whose header says this size and these colours, not turned upright.

    None: sound as far as can be seen, but with oddities that leave its pixels to another decoder. Raises DamagedFile.
    """
    pixels_HWC = np.empty((height, width, NUM_CHANNELS[colours]), dtype=np.uint8)
    if data.count(b"\xff\xda") > MAX_SCANS and len(_Jpeg.of(data).scans) > MAX_SCANS:
        raise DamagedFile(f"it has more than {MAX_SCANS} scans")
    complaint = _complaint(data, colours, pixels_HWC)
    may_miss_scans = any(b"\xff" + bytes([marker]) in data for marker in _IN_STEPS)
    if complaint is None and _HOLE not in data and not may_miss_scans:
        return pixels_HWC
    jpeg = _Jpeg.of(data)
    if jpeg.lacks_scans():
        raise DamagedFile("scans are missing: some coefficients never come, or not to their last bit")
    if any(scan.has_hole(filler=complaint is not None) for scan in jpeg.scans):
        raise DamagedFile(f"its pixels have a hole of more than {len(_HOLE)} zeros")
    if complaint is None:
        return pixels_HWC
    complaint = _complaint(jpeg.plain(), colours, pixels_HWC)
    if complaint is not None and "extraneous" in complaint and not jpeg.is_sequential:
        complaint = _complaint(jpeg.plain(filler=False), colours, pixels_HWC)
    cannot = complaint is not None and any(words in complaint for words in _CANNOT)
    if complaint is None or (cannot and jpeg.is_progressive):  # in an odd sampling: what Pillow says counts
        return None
    if not jpeg.is_sequential or not (cannot or "extraneous" in complaint):
        raise DamagedFile(complaint)
    for scan in jpeg.scans:
        scan.walk()
    return None


def check_jpeg(data: bytes) -> None:
    """Raises DamagedFile as `decode_jpeg`, of the size and colours that the file's own frame header says."""
    frames = {scan.frame for scan in _Jpeg.of(data).scans}
    if len(frames) == 1:
        frame = frames.pop()
        height, width = (int.from_bytes(frame[place : place + 2], "big") for place in (5, 7))
        colours = next((name for name, channels in NUM_CHANNELS.items() if channels == frame[9]), None)
        if colours is not None and frame[4] == 8:
            decode_jpeg(data, height, width, colours)


def _complaint(data: bytes, colours: Colours, pixels_HWC: NDArray[np.uint8]) -> str | None:
    """The first error or warning of libjpeg; the pixels go to `pixels_HWC` if there is none."""
    try:
        # the buffer is as large as the accepted size: a header that libjpeg reads otherwise cannot ask for more
        decoded = simplejpeg.decode_jpeg(data, colours, buffer=pixels_HWC)
    except ValueError as error:
        return str(error)
    return None if decoded.shape == pixels_HWC.shape else f"two sizes, {pixels_HWC.shape} and {decoded.shape}"


@dataclass(frozen=True)
class _Component:
    identifier: int
    across: int  # sampling factors
    down: int


@dataclass
class _Scan:
    """One scan: its header, what was in force when it came, and its entropy-coded intervals between restarts."""

    header: bytes  # marker and length included
    frame: bytes
    tables: dict[int, bytes]  # Huffman, by class (0x00 DC, 0x10 AC) and identifier: 16 counts, then the symbols
    restart: int  # MCUs of an interval, 0: no restarts
    intervals: list[bytes]

    def has_hole(self, filler: bool) -> bool:
        """True if zeros follow each other that no encoder writes; those that end an interval may be `filler`.

        Sequential: all coefficients of several blocks would be alike and none 0, but where the table gives its first
        code to "the rest of the block is 0", as in flat parts of an image. Progressive: such blocks are counted, not
        written one by one.
        """
        table = self.tables.get(0x10 | self.header[6] & 15, b"")
        if self.frame[1] in _SEQUENTIAL:
            is_flat = len(table) < 17 or table[16] & 15 == 0
        else:
            is_flat = self.frame[1] != _PROGRESSIVE or self.header[-3] == 0
        return not is_flat and any(_HOLE in (one.rstrip(b"\0") if filler else one) for one in self.intervals)

    def walk(self) -> None:
        """Follow the codes of all blocks to see whether the intervals hold them, and what is left. DamagedFile."""
        blocks, num_mcus = self._blocks()
        for number, interval in enumerate(self.intervals):
            left = num_mcus - number * self.restart
            if number and not self.restart:
                raise DamagedFile("restart markers where none belong")
            if left <= 0:
                return  # some scanners go on after the last row; what comes before is whole
            _walk(interval.replace(b"\xff\0", b"\xff"), blocks, min(left, self.restart or left))
        if self.restart and num_mcus > len(self.intervals) * self.restart:
            raise DamagedFile("restart intervals are missing")

    def _blocks(self) -> tuple[list[Block], int]:
        """DC and AC table of each block of an MCU, and the number of MCUs."""
        height, width = (int.from_bytes(self.frame[place : place + 2], "big") for place in (5, 7))
        known = [
            _Component(self.frame[place], self.frame[place + 1] >> 4, self.frame[place + 1] & 15)
            for place in range(10, 10 + 3 * self.frame[9], 3)
        ]
        across, down = max(one.across for one in known), max(one.down for one in known)
        chosen = [
            (next((one for one in known if one.identifier == self.header[place]), None), self.header[place + 1])
            for place in range(5, 5 + 2 * self.header[4], 2)
        ]
        blocks: list[Block] = []
        for component, choice in chosen:
            dc, ac = self.tables.get(choice >> 4), self.tables.get(0x10 | choice & 15)
            if component is None or dc is None or ac is None:
                raise DamagedFile("a scan asks for a component or table that is not there")
            blocks += [(_lookup(dc), _lookup(ac))] * (component.across * component.down if len(chosen) > 1 else 1)
        alone = chosen[0][0] if len(chosen) == 1 else None
        if alone is not None:  # not interleaved: one block an MCU, none beyond the component's own edge
            columns, rows = -(-width * alone.across // across), -(-height * alone.down // down)
            return blocks, -(-columns // 8) * -(-rows // 8)
        return blocks, -(-width // (8 * across)) * -(-height // (8 * down))


@dataclass
class _Jpeg:
    """What pixels depend on: tables, frame, scans."""

    segments: list[bytes | _Scan] = field(default_factory=list)

    @property
    def scans(self) -> list[_Scan]:
        return [segment for segment in self.segments if isinstance(segment, _Scan)]

    @property
    def is_sequential(self) -> bool:
        """True if its scans can be walked: baseline or extended, Huffman."""
        return all(scan.frame[1] in _SEQUENTIAL for scan in self.scans)

    @property
    def is_progressive(self) -> bool:
        return any(scan.frame[1] == _PROGRESSIVE for scan in self.scans)

    def lacks_scans(self) -> bool:
        """True if it is progressive and ends before its pixels are complete, which libjpeg shows without a word."""
        last_bits: dict[tuple[int, int], int] = {}
        for scan in self.scans:
            if scan.frame[1] in _IN_STEPS:
                components = scan.frame[10::3]
                last_bits |= dict.fromkeys(itertools.product(components, range(64)), 1) if not last_bits else {}
                first, last, low = scan.header[-3], scan.header[-2], scan.header[-1] & 15
                last_bits |= dict.fromkeys(itertools.product(scan.header[5:-3:2], range(first, last + 1)), low)
        return any(last_bits.values())

    def plain(self, filler: bool = True) -> bytes:
        """The file again, without metadata and extraneous bytes between segments, or also zeros that end intervals."""
        parts = [b"\xff\xd8"]
        for segment in self.segments:
            if isinstance(segment, bytes):
                parts.append(segment)
                continue
            # the last three bytes mean nothing there, and some cameras write what they like
            is_progressive = segment.frame[1] not in (*_SEQUENTIAL, 0xC9)
            parts.append(segment.header if is_progressive else segment.header[:-3] + b"\0\x3f\0")
            for number, interval in enumerate(segment.intervals):
                parts += [bytes([0xFF, 0xD0 + (number - 1) % 8])] if number else []
                cut = interval if filler else interval.rstrip(b"\0")
                parts.append(cut + b"\0" if cut.endswith(b"\xff") else cut)
        return b"".join([*parts, b"\xff\xd9"])

    @classmethod
    def of(cls, data: bytes) -> _Jpeg:
        """Raises DamagedFile when the segments do not lead to an end marker."""
        jpeg, frame, restart, place = cls(), b"", 0, 2
        tables: dict[int, bytes] = {}
        while found := _MARKER.search(data, place):
            marker, place = data[found.start() + 1], found.end()
            if marker == 0xD9:
                return jpeg
            if marker == 0x01 or 0xD0 <= marker <= 0xD8:
                continue
            place += int.from_bytes(data[place : place + 2], "big")
            segment = data[found.start() : place]
            if not 4 <= len(segment) == place - found.start():
                break
            if marker in _FRAMES:
                frame = segment
            elif marker == 0xC4:
                tables = tables | _huffman_tables(segment)
            elif marker == 0xDD:
                restart = int.from_bytes(segment[4:6], "big")
            if marker != 0xDA:
                is_metadata = marker == 0xFE or (0xE0 <= marker <= 0xEF and not _says_colours(segment))
                jpeg.segments += [] if is_metadata else [segment]
                continue
            end = _END_OF_SCAN.search(data, place)
            if end is None or len(frame) < 10 or len(frame) != 10 + 3 * frame[9] or not frame[9]:
                break
            if len(segment) < 10 or len(segment) != 8 + 2 * segment[4]:
                break
            pieces = _RESTART.split(data[place : end.start()])
            if any(code[0] != 0xD0 + number % 8 for number, code in enumerate(pieces[1::2])):
                raise DamagedFile("restart markers are missing or out of order")
            intervals = [piece.rstrip(b"\xff") for piece in pieces[0::2]]  # fill bytes before a marker
            jpeg.segments.append(_Scan(segment, frame, tables, restart, intervals))
            place = end.start()
        raise DamagedFile("its segments lead to no end marker")


def _says_colours(segment: bytes) -> bool:
    """True for the one piece of metadata that says what the components are, where it says what libjpeg knows."""
    return segment[1] == 0xEE and segment[4:9] == b"Adobe" and len(segment) >= 16 and segment[15] <= 2


def _huffman_tables(segment: bytes) -> dict[int, bytes]:
    """All tables of a DHT segment: by class and identifier, 16 counts and the symbols."""
    tables, place = {}, 4
    while place + 17 <= len(segment):
        start = place + 1
        place = start + 16 + sum(segment[start : start + 16])
        tables[segment[start - 1]] = segment[start:place]
    return tables


@functools.lru_cache(maxsize=16)
def _lookup(table: bytes) -> list[int]:
    """For all 16 next bits: 256 * length of the code they begin with + its symbol; 0 where no code begins so."""
    codes: list[int] = []
    symbols = iter(table[16:])
    for length, count in enumerate(table[:16], 1):
        for symbol in itertools.islice(symbols, count):
            codes += [length << 8 | symbol] * (1 << (16 - length))
    return (codes + [0] * (0x10000 - len(codes)))[:0x10000]


def _walk(data: bytes, blocks: list[Block], num_mcus: int) -> None:
    """Follow one interval (bytes unstuffed). Raises DamagedFile unless it ends with its last block, or filler after."""
    place, end = 0, 8 * len(data)
    data += bytes(300)  # more than a block takes
    for _ in range(num_mcus):
        for table, ac in blocks:
            index = 0
            while index < 64:
                at = place >> 3
                word = ((data[at] << 16 | data[at + 1] << 8 | data[at + 2]) >> (8 - (place & 7))) & 0xFFFF
                code = table[word]
                if not code:
                    raise DamagedFile("bad Huffman code")
                size = code & 15
                place += (code >> 8) + size
                if not index:
                    index, table = 1, ac
                elif size or code & 0xF0 == 0xF0:
                    index += (code >> 4 & 15) + 1
                else:
                    break  # the rest of the block is 0
            if place > end:
                raise DamagedFile("premature end of data segment")
    used = -(-place // 8)
    rest = data[used : end // 8]
    # What the last code leaves of its byte is filled with ones. Zeros after zeros are a hole.
    is_ended = data[used - 1] | (0xFF >> (place & 7 or 8)) == data[used - 1]
    is_filler = any(data[max(0, used - 4) : used]) if not any(rest) else is_ended and len(rest) <= _MAX_JUNK
    if rest and not is_filler:
        raise DamagedFile(f"{len(rest)} bytes more than the image needs")
