"""What somebody points at: one file, a folder, a pattern, a frame table or videos, as frames to read.

Listing only, on every store that `Location` reaches: no image is opened here. What counts: `listing.files_below`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from nightseg.data import table as frame
from nightseg.data.images import SUFFIXES
from nightseg.data.layouts import frames_of_files
from nightseg.data.listing import files_below, is_meant, is_own, is_wanted
from nightseg.storage import Entry, Location, UserError, hash_of

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm")
_LISTS = (".csv", ".json", ".lst", ".txt")
_KNOWN = (*SUFFIXES, *VIDEO_SUFFIXES)
_MAGIC = "*?["


class Video(NamedTuple):
    """A video file, and what its frames are called after: frame 7 is `<name>/000007`."""

    name: str
    file: Location


class Source(NamedTuple):
    """Frames to read, as far as a listing knows them."""

    images: list[dict[str, Any]]  # frame_id, uri; sha256 where a table says it
    videos: list[Video]
    bad: list[dict[str, Any]]  # rows of the quarantine table: files whose names no table or store can hold
    identity: str  # hash over names, sizes and times (of a table: its rows): unchanged source, unchanged value


def find_source(source: str, say: Callable[[str], None] = lambda note: None) -> Source:
    """The frames that `source` means: a file that is there, a folder (its images, to the bottom), `*.parquet`, or a
    pattern: *, ? and [] within one name, ** for any folders. What is there under that very name is no pattern.

    An id is the place below the folder, or below the part of the pattern without wildcards; without suffix unless two
    would be the same. `say` is told what does not count. Raises UserError: nothing is there, nothing matches, nothing
    is an image or a video.
    """
    place = Location.of(source)
    if place.exists():
        if place.is_folder():
            entries = files_below(place, SUFFIXES, say=say)
            if not entries:
                cure = f"check the folder; videos need a pattern: '{place}/*.mp4'"
                raise UserError(f"{place}: there is no image; looked for {', '.join(SUFFIXES)}", cure=cure)
            return _found(place, entries)
        if place.name.endswith(".parquet"):
            return _of_table(place)
        if place.name.lower().endswith(_LISTS):
            what = f"{source}: a list of names, and lists are not read"
            raise UserError(what, cure="a folder, a pattern, or a frame table (.parquet with frame_id and uri)")
        return _found(place.parent, [_entry(place)])
    if not _has_magic(place, source):
        raise UserError(f"{source}: there is no such file or folder", cure="check the path; quote a pattern ('*.jpg')")
    root, pattern = _fixed_part(place)
    if known := list(_matches(root, pattern, _KNOWN, say)):
        return _found(root, sorted(known, key=lambda entry: entry.name))
    if others := list(_matches(root, pattern, ("",), say)):
        what = f"{source}: {len(others)} files match, none is an image or a video"
        raise UserError(what, cure=f"name files that end in {', '.join(_KNOWN)}")
    raise UserError(f"{source}: no file matches this pattern", cure="check it; ** stands for any folders")


def _found(root: Location, entries: Sequence[Entry]) -> Source:
    images, videos, bad = [], [], []
    candidates = frames_of_files(root, list(entries), dataset="")
    for entry, candidate in zip(entries, candidates, strict=True):
        row = {frame.FRAME_ID: candidate.frame_id.removeprefix("/"), frame.URI: candidate.uri}
        if candidate.problem:
            bad.append({**row, frame.REASON: "unreadable", frame.DETAIL: candidate.problem})
        elif _is_video(entry):
            videos.append(Video(row[frame.FRAME_ID], Location(candidate.uri)))
        else:
            images.append(row)
    images.sort(key=lambda row: str(row[frame.FRAME_ID]))
    facts = [[row[frame.URI] for row in images], [video.file.uri for video in videos]]
    return Source(images, videos, bad, hash_of([facts, [[entry.size, entry.modified_ns] for entry in entries]]))


def _of_table(file: Location) -> Source:
    rows = frame.resolve(file.read_table(), file.parent)
    frame.check_frames(rows, f"frame table {file}")
    if rows.num_rows == 0:
        raise UserError(f"{file}: the frame table has no row", cure="name a table with frames")
    columns = [name for name in (frame.FRAME_ID, frame.URI, frame.SHA256) if name in rows.column_names]
    images = rows.select(columns).to_pylist()
    return Source(images, [], [], hash_of(images))


def _entry(file: Location) -> Entry:
    """One file, whatever its name is."""
    try:
        modified_ns = file.local.stat().st_mtime_ns if file.is_local else 0
        return Entry(file.name, file.size(), modified_ns, is_folder=False)
    except FileNotFoundError:
        raise UserError(f"{file}: a pipe, socket or device, and no file", cure="save it as a file") from None


def _is_video(entry: Entry) -> bool:
    return entry.name.lower().endswith(VIDEO_SUFFIXES)


# -- patterns --------------------------------------------------------------------------------------------------------


def _has_magic(place: Location, source: str) -> bool:
    """In a URI a question mark starts the options of its store, so it is no wildcard there."""
    return any(mark in source for mark in (_MAGIC if place.is_local else "*["))


def _fixed_part(place: Location) -> tuple[Location, list[str]]:
    """The folder above the first wildcard, and the parts of the pattern below it. A folder whose name has brackets or
    stars, and is there, has no wildcards."""
    parts: list[str] = []
    while any(mark in place.uri for mark in _MAGIC) and not place.is_folder():
        if place.parent.uri == place.uri or not place.name:
            break
        parts.insert(0, place.name)
        place = place.parent
    return place, parts


def _matches(
    root: Location, pattern: Sequence[str], suffixes: Sequence[str], say: Callable[[str], None], below: str = ""
) -> Iterator[Entry]:
    """Files of these suffixes whose path below `root` fits, level by level; all below a ** is listed at once."""
    first, rest = pattern[0], pattern[1:]
    folder = root / below if below else root
    if not folder.is_folder():
        return
    if first == "**":
        for entry in files_below(folder, suffixes, say=say):
            if _fits(entry.name.split("/"), pattern):
                yield _below(below, entry)
        return
    entries = folder.walk(lambda name: False)
    named = [entry for entry in entries if entry.name == first]
    for entry in named or [entry for entry in entries if _is_match(entry.name, first)]:
        if rest and entry.is_folder and (named or not is_own(folder / entry.name)):
            yield from _matches(root, rest, suffixes, say, _below(below, entry).name)
        elif not rest and is_wanted(entry, suffixes):
            yield _below(below, entry)


def _is_match(name: str, part: str) -> bool:
    """A wildcard does not stand for the dot of a hidden file."""
    return fnmatchcase(name, part) and (is_meant(name) or part.startswith("."))


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[skipped:], pattern[1:] or ["*"]) for skipped in range(len(parts)))
    return (
        bool(parts) and (parts[0] == pattern[0] or fnmatchcase(parts[0], pattern[0])) and _fits(parts[1:], pattern[1:])
    )


def _below(folder: str, entry: Entry) -> Entry:
    return replace(entry, name=f"{folder}/{entry.name}" if folder else entry.name)
