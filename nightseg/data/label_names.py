"""What names of files say: which frame a label belongs to, what its ids mean, which of several files holds them.

Data sets append words to the name of a frame: x_leftImg8bit.png, x_gtFine_labelIds.png and x_gtFine_color.png are one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from nightseg.data.taxonomy import COLORS, TRAIN_IDS
from nightseg.errors import UserError, first_of
from nightseg.storage import Entry

LABEL_IDS: Final = "label_ids"
IDS: Final[Mapping[str, str]] = {
    "_labelTrainIds": TRAIN_IDS, "_labelcsTrainIds": TRAIN_IDS, "_trainIds": TRAIN_IDS, "_train_ids": TRAIN_IDS,
    "_train_id": TRAIN_IDS, "_trainId": TRAIN_IDS, "_labelIds": LABEL_IDS, "_label_ids": LABEL_IDS,
}  # fmt: skip
"""Endings of labels (Cityscapes, ACDC, Dark Zurich, NightCity, BDD100K, IDD), and the encoding of their ids."""

FRAME: Final = (
    "_leftImg8bit", "_rgb_ref_anon", "_rgb_anon", "_rgb", "_image", "_gtFine", "_gtCoarse", "_gt", "_label", "_L"
)  # fmt: skip
"""Endings that say nothing about ids; `_L` (CamVid) by its capital letter only, `_l` is the left camera."""

NO_IDS: Final = (
    "_color", "_colors", "_labelColor", "_labelColors", "_train_color", "_instanceIds", "_instanceTrainIds",
    "_instance", "_instances", "_inst_label", "_polygons", "_panoptic", "_invGray", "_invIds", "_disparity",
    "_labellevel3Ids",
)  # fmt: skip
_NO_ID_FOLDERS: Final = frozenset(
    {"color", "colors", "colormap", "colormaps", "color_labels", "semantic_rgb", "instance", "instances", "panoptic"}
    | {"polygons", "rles", "bitmasks", "pan_seg", "ins_seg", "pan_mask"}
)
_COLORS: Final = frozenset({"_color", "_colors", "_labelColor", "_labelColors", "_train_color", "_L"})
_BY_LENGTH: Final = sorted([*IDS, *FRAME, *NO_IDS], key=len, reverse=True)
_WEATHER: Final = re.compile(r"_(foggy_beta|rain_alpha)_[0-9][0-9a-z._]*$", re.IGNORECASE)
"""Endings of frames of Foggy and Rain Cityscapes: x_leftImg8bit_foggy_beta_0.02.png."""


class Name(NamedTuple):
    """A path below a folder, taken apart."""

    frame: str  # without suffix and endings
    encoding: str | None  # what an ending says of the ids
    holds_ids: bool  # false: colours, instances, ... by an ending or a folder
    endings: tuple[str, ...]


def name_of(path: str) -> Name:
    """The parts of the name of a file."""
    place = PurePosixPath(path)
    stem = _WEATHER.sub("", place.stem) or place.stem
    endings: list[str] = []
    while ending := next((one for one in _BY_LENGTH if _ends(stem, one) and len(stem) > len(one)), None):
        if ending in NO_IDS and any(one in IDS for one in endings):
            break  # x_color_labelIds: the ids of a frame x_color
        stem = stem[: -len(ending)]
        endings.append(ending)
    encoding = next((IDS[one] for one in endings if one in IDS), None)
    is_picture = any(one in NO_IDS for one in endings) or any(
        part.lower() in _NO_ID_FOLDERS for part in place.parts[:-1]
    )
    return Name(str(place.with_name(stem)), encoding, not is_picture, tuple(endings))


def named_encoding(path: str) -> str | None:
    """The encoding that a label's name tells: `x_gtFine_labelIds.png` holds label ids."""
    return name_of(path).encoding


def labels_of_frames(
    entries: Iterable[Entry],
    where: str,
    *,
    prefer: str = TRAIN_IDS,
    frames: Collection[str] = (),
    known: Collection[str] = (),
    may_hold_ids: Callable[[Entry], bool] | None = None,
    say: Callable[[str], None] = lambda note: None,
) -> dict[str, Entry]:
    """The one file of ids of every frame, by the frame's name: of those of encoding `prefer` if it has several.

    `frames`: names (without suffix) that may be frames of their own, whatever they end in; `known`: that surely are.
    What holds no ids is left out and `say` is told; `may_hold_ids` looks into a file where names leave it open whether
    it does. Raises UserError: two files of a frame with equal right, no file that holds ids.
    """
    groups: dict[str, list[tuple[tuple[int, int], Entry]]] = {}
    pictures: list[Entry] = []
    named = [(name_of(entry.name), entry) for entry in entries]
    with_ids = {name.frame for name, _ in named if name.encoding is not None or (name.holds_ids and not name.endings)}
    for name, entry in named:
        stem = str(PurePosixPath(entry.name).with_suffix(""))
        # a_trainIds beside a is another frame where both are frames, and else the label of a
        is_own = stem in frames and (name.encoding is None or name.frame in frames)
        if is_own and not name.holds_ids and name.frame in with_ids:
            is_own = may_hold_ids is not None and name.frame in frames
        is_own |= stem in known
        if is_own and (name.holds_ids or may_hold_ids is None or may_hold_ids(entry)):
            groups.setdefault(stem, []).append((_OWN_NAME, entry))
        elif name.holds_ids or (prefer == COLORS and _COLORS & set(name.endings)):
            groups.setdefault(name.frame, []).append((_rank(name, prefer), entry))
        else:
            pictures.append(entry)
    if not groups:
        return _only_pictures(pictures, where, may_hold_ids)
    if pictures:
        names = first_of([picture.name for picture in pictures])
        say(f"{where}: {len(pictures)} files hold no ids by their names and are left out: {names}")
    chosen, others = {}, []
    for frame, found in groups.items():
        chosen[frame], rest = _one_of(found, where, may_hold_ids)
        others += rest
    if others:
        names = first_of([entry.name for entry in others])
        say(f"{where}: {len(others)} files are left out, as another one of their frames is meant by its name: {names}")
    return chosen


def _only_pictures(pictures: list[Entry], where: str, may_hold_ids: Callable[[Entry], bool] | None) -> dict[str, Entry]:
    """Nothing else is there, so names may be wrong about them: those that may hold ids."""
    held = pictures if may_hold_ids is None else [entry for entry in pictures if may_hold_ids(entry)]
    if pictures and not held:
        raise UserError(
            f"{where}: all {len(pictures)} files are pictures (colours, instances, ...) and hold no ids of classes: "
            f"{first_of([picture.name for picture in pictures])}",
            cure="name the folder of the ids (such as *_labelIds.png, *_trainIds.png); or, if the colours are the "
            "classes, set label_encoding: colors",
        )
    return {str(PurePosixPath(entry.name).with_suffix("")): entry for entry in held}


def _one_of(
    found: list[tuple[tuple[int, int], Entry]], where: str, may_hold_ids: Callable[[Entry], bool] | None
) -> tuple[Entry, list[Entry]]:
    """The best of the files of a frame, and the others. Those whose names say nothing of ids are looked into."""
    best = min(rank for rank, _ in found)
    if len(found) > 1 and may_hold_ids is not None and (best == _OWN_NAME or best[0] > 1):
        found = [one for one in found if may_hold_ids(one[1])] or found
        best = min(rank for rank, _ in found)
    equal = [entry for rank, entry in found if rank == best]
    if len({PurePosixPath(entry.name).with_suffix("") for entry in equal}) == 1 and may_hold_ids is None:
        equal = [entry for entry in equal if entry.name.lower().endswith(".png")] or equal
    if len(equal) > 1:
        both = f"{equal[0].name} and {equal[1].name}"
        raise UserError(f"{where}: {both} are the same frame by name", cure="keep one of them there")
    return equal[0], [entry for _, entry in found if entry is not equal[0]]


_OWN_NAME: Final = (0, 1)


def _rank(name: Name, prefer: str) -> tuple[int, int]:
    """Smaller is better: the wanted ids, (the frame's own name,) others, files that say nothing of ids; of these
    CamVid's coloured `_L` last."""
    if name.encoding is None:
        return 2, int("_L" in name.endings)
    return int(name.encoding != prefer and (name.encoding == TRAIN_IDS or prefer == TRAIN_IDS)), 0


def _ends(stem: str, ending: str) -> bool:
    return stem.endswith(ending) if ending == "_L" else stem.lower().endswith(ending.lower())


def composed(name: str) -> str:
    """Letters with their accents as one character: macOS takes them apart, and no listing shows the difference."""
    return unicodedata.normalize("NFC", name)


def stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def tail_of(stem: str) -> str:
    """The word at the end of a name that tells its kind: `_gt`, `_leftImg8bit`; nothing of a number."""
    if endings := name_of(stem).endings:
        return "".join(reversed(endings))
    found = re.search(r"[_.-][A-Za-z]+$", stem)
    return found[0] if found else ""


def affixes(stems: Sequence[str]) -> tuple[str, str]:
    """What all names begin and end with, but for digits."""
    if len(stems) < 2:
        return "", tail_of(stems[0]) if stems else ""
    low, high = min(stems), max(stems)
    start = next((low[:index] for index in range(len(low)) if low[index] != high[index : index + 1]), low)
    turned = [stem[::-1] for stem in stems]
    low, high = min(turned), max(turned)
    end = next((low[:index] for index in range(len(low)) if low[index] != high[index : index + 1]), low)[::-1]
    return re.sub(r"[^_.-]*$", "", start), re.sub(r"^[^_.-]*", "", end)
