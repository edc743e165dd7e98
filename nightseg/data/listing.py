"""The files that a user means by a folder: links followed, hidden files and what nightseg wrote left out.

Every verb and every layout lists through here, so that a set is the same set everywhere. No file of the user is opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from nightseg.errors import first_of
from nightseg.storage import Entry, Location
from nightseg.storage.workspace import ATTEMPT_NAME

PREDICTION_CARD = "prediction.json"
"""What `predict` writes into its folder last: by its `save` the folders are known that hold pictures for people."""

_PICTURES = {
    "color": ".png",
    "confidence": ".png",
    "overlay": ".jpg",
}  # folders that `predict` makes for people, masks lie beside them
_WORK = ".work"  # beside the masks of a `predict` that was interrupted
_MAX_CARD_BYTES = 1_000_000
# What file managers, archives and servers put between files: thumbnails, copies of names, waste baskets, snapshots.
_SYSTEM_FOLDERS = frozenset(
    {"__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "@recently-snapshot", "$recycle.bin"}
    | {"system volume information", "lost+found", "network trash folder", "temporary items"}
)
_OTHER_FORMATS = (
    *(".arw", ".avif", ".cr2", ".cr3", ".dng", ".exr", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl"),
    *(".nef", ".psd", ".raw", ".svg", ".tga"),
    *(".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv"),
)  # pictures and videos: worth a word where they lie among the files that are read
_FILE_TYPE = re.compile(r"\.[A-Za-z][A-Za-z0-9]{0,4}$")  # of a broken link: else it may well have been a folder


def files_below(
    folder: Location,
    suffixes: Sequence[str],
    *,
    depth: int | None = None,
    say: Callable[[str], None] = lambda note: None,
    predictions: bool = False,
    frames: Collection[str] = (),
) -> list[Entry]:
    """The files of these suffixes (in any case) down to `depth` levels (1 = the folder itself, None = all), by name.

    Left out: names that start with a dot, folders of the system, the outputs of runs and of `predict` below the folder,
    unless there is nothing else: then they are what is meant, as in a folder that lies inside of them. Of a file that a
    link reaches a second time only one is kept. `predictions`: they are what is looked for, so they are not left out,
    and files that links share are kept under each name; pictures for people beside the masks never count, and where no
    prediction.json tells which these are, `frames` (names without suffix) tells which are none.
    A broken link to such a file, or to what may have been a folder, is an entry with a `problem`.
    `say` is told in a sentence what else was left out. Raises UserError: a folder may not be read.
    """
    entries = folder.walk(lambda name: is_meant(name) and (depth is None or name.count("/") < depth - 1))
    attempts, cards = _written_here(folder, entries)
    wanted = [one for one in entries if is_wanted(one, suffixes) and is_meant(one.name)]
    wanted = _without_pictures(wanted, cards, guess=predictions, frames=frames)
    if not predictions:
        own = [*attempts, *cards]
        of_user = [one for one in wanted if not _is_below(one.name, own)]
        if 0 < len(of_user) < len(wanted):
            say(f"{folder}: {len(wanted) - len(of_user)} files that nightseg wrote are left out ({first_of(own)})")
        wanted = _each_once(of_user or wanted, lambda note: say(f"{folder}: {note}"))
    other = [one.name for one in entries if not one.is_folder and is_meant(one.name)]
    other = [
        name for name in other if name.lower().endswith(_OTHER_FORMATS) and not name.lower().endswith(tuple(suffixes))
    ]
    if other and not predictions:
        say(f"{folder}: {len(other)} pictures or videos of other formats are left out ({first_of(other)})")
    twice = [f"{one.name} ({one.problem})" for one in entries if one.is_folder and one.problem]
    if twice:
        say(f"{folder}: {first_of(twice)}: its files count once")
    gone = [f"{one.name} ({one.problem})" for one in entries if one.problem and not one.is_folder and one not in wanted]
    if gone and not predictions:
        say(f"{folder}: {first_of(gone)}: left out")
    return wanted


def is_meant(name: str) -> bool:
    """Whether a path below a folder is one that users mean: no hidden part, such as macOS's '._x.jpg', no folder of
    the system."""
    return not any(part.startswith(".") or part.lower() in _SYSTEM_FOLDERS for part in name.split("/"))


def is_own(folder: Location) -> bool:
    """Whether nightseg wrote a folder: an attempt of a run, or predictions."""
    return any(_written_here(folder, folder.list()))


def is_wanted(entry: Entry, suffixes: Sequence[str]) -> bool:
    """Whether it is a file of these suffixes, or a broken link to one or to what may have been a folder of them."""
    if entry.is_folder:
        return False
    is_gone = entry.problem.startswith("a link") and _FILE_TYPE.search(entry.name) is None
    return is_gone or entry.name.lower().endswith(tuple(suffixes))


def _written_here(folder: Location, entries: Iterable[Entry]) -> tuple[list[str], dict[str, list[str] | None]]:
    """Folders, relative: attempts of runs, and of predictions with what they saved, if known. '' is the folder."""
    attempts: list[str] = []
    cards: dict[str, list[str] | None] = {}
    for entry in entries:
        above, _, name = entry.name.rpartition("/")
        if name == ATTEMPT_NAME:
            attempts.append(above)
        elif name == PREDICTION_CARD and (saved := _saved(folder / entry.name, entry.size)) is not None:
            cards[above] = saved
        elif name == _WORK and (folder / f"{entry.name}/stages/predict").is_folder():
            cards.setdefault(above, None)
    return attempts, cards


def predicted_taxonomy(masks: Location) -> str | None:
    """The name of the taxonomy whose train ids `predict` wrote into a folder, or a folder of it; None if not known."""
    cards = [place / PREDICTION_CARD for place in (masks, masks.parent)]
    return next((card[0] for place in cards if (card := _predicted(place)) is not None), None)


def _saved(card: Location, size: int) -> list[str] | None:
    """The pictures that a `predict` wrote; None for a file of another program."""
    content = _predicted(card) if size <= _MAX_CARD_BYTES else None
    return None if content is None else content[1]


def _predicted(card: Location) -> tuple[str, list[str]] | None:
    """Taxonomy and pictures of what `predict` says it wrote; None where it did not."""
    try:
        content = card.read_json()
        is_ours = {"model", "taxonomy", "sha256"} <= content.keys()
        return (str(content["taxonomy"]), [str(kind) for kind in content["save"]]) if is_ours else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _without_pictures(
    entries: list[Entry], cards: Mapping[str, Sequence[str] | None], *, guess: bool, frames: Collection[str]
) -> list[Entry]:
    """Without what `predict` made for people: as its cards say, or by a mask of the same name beside the folder."""
    folders = {
        f"{above}/{kind}".lstrip("/"): (above, "mask" in saved)
        for above, saved in cards.items()
        if saved is not None
        for kind in saved
        if kind in _PICTURES
    }
    if guess and cards.get("") is None:
        folders |= {kind: ("", True) for kind in _PICTURES}
    names = {str(PurePosixPath(entry.name).with_suffix("")) for entry in entries}

    def is_picture(entry: Entry) -> bool:
        stem = PurePosixPath(entry.name).with_suffix("")
        for folder in stem.parents:
            above, has_masks = folders.get(str(folder), ("", None))
            if has_masks is None or (str(stem) in frames and above not in cards):
                continue
            if above in cards and not entry.name.endswith(_PICTURES[folder.name]):
                continue
            if not has_masks or str(PurePosixPath(above) / stem.relative_to(folder)) in names:
                return True
        return False

    return [entry for entry in entries if not is_picture(entry)] if folders else entries


def _is_below(name: str, folders: Sequence[str]) -> bool:
    """Below one of the folders, but for '', in which all lie."""
    if not folders:
        return False
    known = set(folders)
    return any(str(above) in known for above in PurePosixPath(name).parents if above.name)


def _each_once(entries: Sequence[Entry], say: Callable[[str], None]) -> list[Entry]:
    """Without the files that only a link reaches again."""
    seen = {entry.same for entry in entries if not entry.is_linked}
    kept, again = [], []
    for entry in entries:
        if entry.is_linked and entry.same and entry.same in seen:
            again.append(entry.name)
            continue
        seen.add(entry.same)
        kept.append(entry)
    if again:
        say(f"{first_of(again)}: links to files that are listed already; they count once")
    return kept
