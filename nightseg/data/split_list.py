"""Split lists: the frames of a set by name, in a text or CSV file, as data sets publish them."""

from __future__ import annotations

import csv
import io
from pathlib import PurePosixPath
from typing import NamedTuple

from nightseg.data.images import LABEL_SUFFIXES, SUFFIXES
from nightseg.errors import UserError, first_of
from nightseg.storage import Entry, Location

_IMAGE = ("image", "image_filename", "image_path", "img", "frame", "frame_id", "filename", "file_name", "file", "path",
          "name")  # fmt: skip
_LABEL = ("label", "label_path", "mask", "annotation", "gt")
_SPLIT = ("split", "subset", "set", "part", "partition")
_DOMAIN = ("domain", "lighting", "timeofday", "time_of_day", "time")
_DOMAINS = {"day": "day", "daytime": "day", "night": "night", "nighttime": "night"}
_DOMAINS |= {"twilight": "twilight", "dawn/dusk": "twilight", "dawn": "twilight", "dusk": "twilight"}


class Listed(NamedTuple):
    """A line: the image as it is called there, its label and domain, if it says so, and where it stands."""

    image: str
    label: str | None
    domain: str | None
    line: int


def read_split_list(file: Location, split: str = "") -> list[Listed]:
    """The frames of a list, in its order.

    Text: a frame a line (name with or without suffix, or a path), its label behind it, if any; # begins a comment. CSV:
    a column `image` (`frame`, `filename`, ...), and `label`, `split`, `domain` (`lighting`, `timeofday`) if they are
    there; of a file with a column `split` only the rows of this `split` count. Raises UserError.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(
            f"split_list: there is no file {file.uri}", cure="give a text or CSV file, below root"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"split_list {file.uri}: not UTF-8 text ({error.reason})", cure="save it as UTF-8") from None
    listed = _table(file, text, split) if file.uri.lower().endswith((".csv", ".tsv")) else _lines(text)
    if not listed:
        raise UserError(f"split_list {file.uri}: it names no frame", cure="write the name of a frame a line")
    seen: dict[str, int] = {}
    for one in listed:
        if one.image in seen:
            what = f"split_list {file.uri}: line {one.line}: {one.image} stands in line {seen[one.image]} already"
            raise UserError(what, cure="name each frame once")
        seen[one.image] = one.line
    return listed


def _lines(text: str) -> list[Listed]:
    listed = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        image, label = words, None
        for separator in ("\t", ",", " "):  # a blank parts two names only where both are files
            first, _, second = words.partition(separator)
            is_two = first.lower().endswith(SUFFIXES) and second.strip().lower().endswith(LABEL_SUFFIXES)
            if is_two:
                image, label = first.strip(), second.strip()
                break
        listed.append(Listed(image, label, None, number))
    return listed


def _table(file: Location, text: str, split: str) -> list[Listed]:
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text), delimiter=max(",;\t", key=head.count), skipinitialspace=True)
    columns = {(name or "").strip().casefold(): name for name in reader.fieldnames or []}

    def column(names: tuple[str, ...]) -> str | None:
        return next((columns[name] for name in names if name in columns), None)

    image, label, part, domain = column(_IMAGE), column(_LABEL), column(_SPLIT), column(_DOMAIN)
    if image is None:
        raise UserError(
            f"split_list {file.uri}: line 1: no column tells the image, it has {', '.join(columns) or 'none'}",
            cure=f"call the column image (or {', '.join(_IMAGE[1:])})",
        )
    listed, parts = [], []
    for number, row in enumerate(reader, start=2):
        if part is not None:
            parts.append((row[part] or "").strip())
            if split and parts[-1] != split:
                continue
        if name := (row[image] or "").strip():
            told = "" if domain is None else (row[domain] or "").strip().casefold()
            listed.append(
                Listed(name, (row[label] or "").strip() or None if label else None, _DOMAINS.get(told), number)
            )
    if part is not None and split and not listed:
        known = ", ".join(dict.fromkeys(parts))
        raise UserError(f"split_list {file.uri}: no row has the split {split!r}, there are {known}", cure="set split")
    return listed


def chosen(listed: list[Listed], entries: list[Entry], file: Location, above: str) -> list[tuple[Entry, Listed]]:
    """The files that a list means, in the order of the files; names that are not there become entries with a problem.

    `above`: what leads from the root of the data set to the folder of the files. A name counts from there or from the
    root, with or without suffix, or alone where only one file is called so. Raises UserError: no name fits.
    """
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        path = PurePosixPath(entry.name)
        for name in dict.fromkeys((entry.name, str(path.with_suffix("")), path.name, path.stem)):
            by_name.setdefault(name, []).append(entry)
    found: list[tuple[Entry, Listed]] = []
    missing: list[Listed] = []
    for one in listed:
        name = one.image.removeprefix("./").removeprefix(f"{above}/" if above else "")
        names = (
            name,
            name.removesuffix(PurePosixPath(name).suffix),
            PurePosixPath(name).name,
            PurePosixPath(name).stem,
        )
        exact = next((hits for key in names if (hits := by_name.get(key)) and len(hits) == 1), None)
        if exact is None:
            missing.append(one)
        else:
            found.append((exact[0], one))
    if not found:
        names_there = first_of([entry.name for entry in entries])
        raise UserError(
            f"split_list {file.uri}: none of its {len(listed)} names is a file of the data set: "
            f"{first_of([one.image for one in listed])}; there are {names_there}",
            cure="name the frames by their paths below root or below the folder of images, with or without suffix",
        )
    for one in missing:
        problem = f"line {one.line} of {file.uri} names it, and there is no such file, or more than one"
        found.append((Entry(one.image, 0, 0, False, problem=problem), one))
    return sorted(found, key=lambda pair: pair[0].name)
