"""What two folders hold, one of labelled day frames and one of night frames: layout, labels, classes, sizes, light.

A few files of each kind are opened. What is found is what a person would see who opens the folder; what was assumed
where that leaves several readings is said in `Found.assumed`, and what nobody can see in `Found.to_check`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import exists
from pathlib import PurePosixPath
from typing import Any, Final, NamedTuple

import numpy as np

from nightseg.data.class_list import class_list, known_taxonomies, taxonomy
from nightseg.data.day_night import separate, tone_of
from nightseg.data.encodings import LABEL_FILES_SCHEMA, LabelFile, facts_of, label_files, read_as
from nightseg.data.images import (
    LABEL_SUFFIXES,
    SUFFIXES,
    BadFrame,
    StoredLabel,
    decode_stored_label,
    holds_colors,
    image_size,
    read_bytes,
    read_image,
)
from nightseg.data.label_names import affixes, name_of, tail_of
from nightseg.data.layouts import Candidate, list_frames
from nightseg.data.listing import files_below
from nightseg.data.settings import ClassList, FolderDataset, ListedClass
from nightseg.data.taxonomy import COLORS, FROM_ONE, IDS, IGNORE, TRAIN_IDS, Taxonomy, in_words, packed, unpacked
from nightseg.errors import UserError, first_of
from nightseg.storage import Entry, Location

SPLITS: Final = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
MOST_IDS: Final = 64  # different ids of a label file, or colours; a photograph has more
TEST_SHARE: Final = 0.2  # of the frames, where the data set says nothing
MOST_TWILIGHT: Final = 0.2  # of the night frames that are none, above which the folder counts as unsorted
_SAMPLED: Final = 3  # files of a kind that are opened to see what they are
_LABELS_READ: Final = 60
_LABELS_READ_FOR_IDS: Final = 600  # where their ids are all that is known of the classes
_NIGHTS_READ: Final = 48
_CLASS_LISTS: Final = (
    "classes.yaml", "classes.yml", "class_dict.csv", "classes.csv", "labelmap.txt", "label_colors.txt", "classes.txt",
    "labels.txt", "config_v1.2.json", "config_v2.0.json", "config.json", "classes.json", "labels.json",
)  # fmt: skip
_HIGH, _LOW = 0.4, 0.6  # mean heights of the pixels of a sky, of a road: 0 top, 1 bottom
_CAMVID: Final = re.compile(r"(Seq05VD|0006R0|0016E5|0001TP)_")


class Seen(NamedTuple):
    """An id of the label files: share of their pixels, mean height in the image (0 top, 1 bottom), share of files."""

    share: float
    height: float
    files: float


@dataclass
class Found:
    """What the folders hold. `day` and `test`: settings of datasets; `lists`: split lists to be written, by dataset."""

    day: dict[str, Any]
    test: dict[str, Any]
    lists: dict[str, list[str]] = field(default_factory=dict)
    night: dict[str, Any] = field(default_factory=dict)
    is_sorted: bool = True  # the night folder holds nights only
    num: dict[str, int] = field(default_factory=dict)  # frames: day, test, night
    size: tuple[int, int] = (0, 0)  # (height, width) that most day frames have
    taxonomy: str | ClassList = ""
    is_named: bool = True  # the classes have their names
    seen: dict[int, Seen] = field(default_factory=dict)
    encoding: str = ""
    assumed: list[str] = field(default_factory=list)
    to_check: list[str] = field(default_factory=list)


def discover(day: Location, night: Location, labels: Location | None = None, classes: str | None = None) -> Found:
    """Look at a folder of labelled day frames (their labels may lie elsewhere) and at one of night frames.

    `classes`: a class list by name or file, where the folder does not tell. Raises UserError: no images, no labels,
    images and labels that do not pair, labels that the class list does not fit.
    """
    for what, place in (("DAY", day), ("NIGHT", night), *((("the labels", labels),) if labels is not None else ())):
        if not place.is_folder():
            wrong = "a file, and no folder" if place.exists() else "no such folder"
            raise UserError(f"{what}: {wrong}: {place.uri}", cure="check the path")
    if day == night:
        raise UserError(
            f"DAY and NIGHT are one folder: {day.uri}",
            cure="give the folder of night frames, or one of unsorted frames",
        )
    found = _known_layout(day, labels) or _pairs(day, night, labels)
    frames = {
        name: list_frames(FolderDataset(**_settings(day, one)), name)
        for name, one in (("day", found.day), ("test", found.test))
        if one
    }
    _split(found, frames, day)
    _sizes(found, frames["day"])
    _usable(found, [one for of in frames.values() for one in of])
    _classes(found, frames["day"], day, classes)
    if found.day["layout"] == "pairs" and found.encoding not in (COLORS, IDS, TRAIN_IDS):
        for dataset in filter(None, (found.day, found.test)):
            dataset["label_encoding"] = found.encoding
    _night(found, night)
    return found


def _settings(root: Location, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {"root": root.uri, **settings}


# -- where files lie ---------------------------------------------------------------------------------------------------


def _known_layout(root: Location, labels: Location | None) -> Found | None:
    """One of the published data sets, by its folders."""
    marks = {
        "cityscapes": ("leftImg8bit", "gtFine"),
        "bdd100k": ("images/10k", "labels/sem_seg/masks"),
        "mapillary": ("training/images", "validation/images"),
        "acdc": ("rgb_anon/fog", "gt/fog"),
    }
    layout = next((name for name, two in marks.items() if all((root / one).is_folder() for one in two)), None)
    if layout is None or labels is not None:
        return None
    train, test = ("training", "validation") if layout == "mapillary" else ("train", "val")
    found = Found({"layout": layout, "split": train}, {"layout": layout, "split": test})
    found.assumed.append(f"{root.uri} is laid out as {layout}: split {train} to learn from, {test} to be tested on")
    if layout == "acdc":
        found.to_check.append("ACDC has frames by night: split: fog/train, rain/train or snow/train are by day")
    return found


class _Kind(NamedTuple):
    """Files of one folder that are called alike: what they are (image, ids, colors, other)."""

    folder: str
    suffix: str
    tail: str
    what: str
    entries: list[Entry]


def _pairs(root: Location, night: Location, labels: Location | None) -> Found:
    above = f"{night.uri.removeprefix(root.uri).strip('/')}/" if night.uri.startswith(f"{root.uri}/") else None
    kinds = _kinds(root, above)
    images = [kind for kind in kinds if kind.what == "image"]
    masks = [kind for kind in (kinds if labels is None else _kinds(labels, None)) if kind.what in ("ids", "colors")]
    if not images:
        raise UserError(f"DAY: no image in {root.uri}", cure="give the folder that holds the labelled day frames")
    if not masks:
        place = root if labels is None else labels
        others = first_of([f"{kind.folder or '.'}/*{kind.suffix} ({len(kind.entries)})" for kind in kinds])
        raise UserError(
            f"DAY: no label files in {place.uri}; there are {others}",
            cure="labels are PNG, TIFF, BMP or PGM files of one id or one colour a class, never JPEG; if they lie "
            "elsewhere, say where the labels are",
        )
    best = next((what for what in ("ids", "colors") if any(kind.what == what for kind in masks)), "")
    masks = [kind for kind in masks if kind.what == best]
    by_tail = Counter[tuple[str, str]]()
    for kind in masks:
        by_tail[kind.suffix, kind.tail] += len(kind.entries)
    (suffix, tail), _ = by_tail.most_common(1)[0]
    spare_files = [f"*{one}{two}" for two, one in by_tail if (two, one) != (suffix, tail)]
    masks = [kind for kind in masks if (kind.suffix, kind.tail) == (suffix, tail)]
    image_place, image_splits = _place({kind.folder for kind in images})
    label_place, label_splits = _place({kind.folder for kind in masks})
    splits = [one for one in image_splits if one in label_splits]
    if len(_roles(splits)) < 2 or "train" not in _roles(splits):
        image_place, label_place, splits = _prefix({k.folder for k in images}), _prefix({k.folder for k in masks}), []
    first = "" if labels is None else f"{labels.uri}/"
    settings = _templates(root, images, masks, image_place, f"{first}{label_place}".rstrip("/"), _roles(splits))
    roles = _roles(splits)
    is_asked = best == COLORS and any(name_of(entry.name).endings for kind in masks for entry in kind.entries[:1])
    common = {"layout": "pairs", **settings, **({"label_encoding": COLORS} if is_asked else {})}
    found = Found(
        {**common, **({"split": roles["train"]} if roles else {})},
        {**common, "split": roles.get("test", roles.get("val"))} if roles else {},
    )
    what = "hold a colour a class" if best == COLORS else "hold ids"
    found.assumed.append(f"images are {settings['images']}, labels {settings['labels']} and {what}")
    if spare_files:
        found.assumed.append(f"other files that could be labels are left out: {', '.join(spare_files)}")
    if roles:
        spare = " (val is not used: add it to `validate_on` of the models)" if len(roles) > 2 else ""
        found.assumed.append(f"{found.day['split']} is to learn from, {found.test['split']} to be tested on{spare}")
    return found


def _kinds(root: Location, without: str | None) -> list[_Kind]:
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in files_below(root, SUFFIXES, predictions=True):
        if not entry.problem and not (without and entry.name.startswith(without)):
            path = PurePosixPath(entry.name)
            folder = path.parent.as_posix()
            groups.setdefault(("" if folder == "." else folder, path.suffix.lower(), tail_of(path.stem)), []).append(
                entry
            )
    return [_Kind(*key, _what(root, entries), entries) for key, entries in groups.items()]


def _what(root: Location, entries: Sequence[Entry]) -> str:
    votes = Counter(_of_file(root / entry.name) for entry in _spread(entries, _SAMPLED))
    return votes.most_common(1)[0][0]


def _of_file(file: Location) -> str:
    if not file.uri.lower().endswith(LABEL_SUFFIXES):
        return "image"
    try:
        data = read_bytes(file)
        stored = decode_stored_label(data, colors=holds_colors(data))
    except BadFrame as fault:
        return "image" if "different colours" in fault.detail else "other"
    if len(np.unique(stored.ids)) > MOST_IDS:
        return "image"
    return "colors" if stored.ids.dtype == np.uint32 else "ids"


def _place(folders: Iterable[str]) -> tuple[str, list[str]]:
    """The folder above all of them, with {split} where a part says train, val or test, and these parts."""
    words = {word for group in SPLITS.values() for word in group}
    parts, splits = [], []
    for folder in folders:
        path = folder.split("/") if folder else []
        at = next((index for index, part in enumerate(path) if part.lower() in words), None)
        if at is None:
            return _prefix(folders), []
        splits.append(path[at])
        parts.append([*path[:at], "{split}", *path[at + 1 :]])
    place = _common(parts)
    return ("/".join(place), sorted(set(splits))) if "{split}" in place else (_prefix(folders), [])


def _prefix(folders: Iterable[str]) -> str:
    return "/".join(_common([folder.split("/") if folder else [] for folder in folders]))


def _common(parts: Sequence[Sequence[str]]) -> list[str]:
    common = []
    for steps in zip(*parts, strict=False):
        if len(set(steps)) > 1:
            break
        common.append(steps[0])
    return common


def _roles(splits: Iterable[str]) -> dict[str, str]:
    """train, val, test -> what they are called."""
    splits = list(splits)
    found = {role: next((one for one in splits if one.lower() in words), None) for role, words in SPLITS.items()}
    return {role: name for role, name in found.items() if name is not None}


def _templates(
    root: Location,
    images: list[_Kind],
    masks: list[_Kind],
    image_place: str,
    label_place: str,
    roles: Mapping[str, str],
) -> dict[str, str]:
    """`images` and `labels` of the layout `pairs` that give most images their label. Raises UserError: hardly any."""
    label_files = {entry.name for kind in masks for entry in kind.entries}
    ends = [affixes([PurePosixPath(e.name).stem for k in side for e in k.entries]) for side in (images, masks)]
    (image_start, image_end), (label_start, label_end) = ends
    if image_start == label_start:
        image_start = label_start = ""
    if image_end == label_end:
        image_end = label_end = ""
    image_suffixes, label_suffix = {kind.suffix for kind in images}, masks[0].suffix
    suffix = image_suffixes.pop() if len(image_suffixes) == 1 else ""
    shared = image_place == label_place
    plain = {"images": image_place or ".", "labels": label_place or "."}
    if shared and suffix != label_suffix:
        plain = {
            "images": f"{image_place}/**/*{suffix}".lstrip("/"),
            "labels": f"{label_place}/**/*{label_suffix}".lstrip("/"),
        }
    templates = {
        "images": f"{image_place}/{image_start}{{name}}{image_end}{suffix}".lstrip("/"),
        "labels": f"{label_place}/{label_start}{{name}}{label_end}{label_suffix}".removeprefix(
            "/" if not label_place else ""
        ),
    }
    labels_only = {"images": plain["images"], "labels": templates["labels"]}
    num_images = sum(len(kind.entries) for kind in images)
    tries = []
    for settings in (plain, labels_only, templates):
        frames: list[Candidate] = []
        for split in roles.values() or [""]:
            try:
                dataset = FolderDataset.model_validate(
                    {"layout": "pairs", "root": root.uri, "split": split, **settings}
                )
                frames += list_frames(dataset, "d")
            except UserError:
                continue
        own = label_files if shared else set[str]()  # in folders of their own both may have one name
        hits = sum(
            one.label_uri is not None and _below(one.label_uri, label_files) and not _below(one.uri, own)
            for one in frames
        )
        tries.append((hits / max(len(frames), 1), settings, frames))
    share, settings, frames = max(tries, key=lambda one: one[0])
    if share < 0.5:
        names = first_of([entry.name for kind in images for entry in kind.entries])
        raise UserError(
            f"DAY: {num_images} images and {len(label_files)} labels do not pair by their names: images are {names}; "
            f"labels {first_of(sorted(label_files))}",
            cure="name labels like their images, or write a recipe with templates such as images: 'rgb/{name}_left', "
            "labels: 'masks/{name}_gt' (docs/own-data.md); if the labels lie elsewhere, say where",
        )
    return settings


def _below(uri: str, names: set[str]) -> bool:
    """Whether a file is one of these names below some folder."""
    parts = uri.split("/")
    return any("/".join(parts[start:]) in names for start in range(len(parts)))


def _split(found: Found, frames: Mapping[str, list[Candidate]], root: Location) -> None:
    """Test frames where the data set has none: whole drives, or the last of the names, as neighbours look alike."""
    day = [one for one in frames["day"] if one.label_uri is not None]
    if found.test:
        found.num = {name: len(of) for name, of in frames.items()}
        return
    names = [one.uri.removeprefix(f"{root.uri}/") for one in day]
    if len(names) < 2:
        raise UserError(
            f"DAY: {len(names)} labelled frames in {root.uri}", cure="two are needed: to learn, to be tested"
        )
    drives: dict[str, list[str]] = {}
    for name, one in zip(names, day, strict=True):
        stem = PurePosixPath(name).stem
        drives.setdefault(one.sequence or re.sub(r"[_.-]?[A-Za-z]*\d+\D*$", "", stem), []).append(name)
    wanted = max(1, round(TEST_SHARE * len(names)))
    test: list[str] = []
    for drive in sorted(drives, key=lambda one: len(drives[one])) if len(drives) >= 4 else []:
        if len(test) + len(drives[drive]) <= 1.5 * wanted and len(test) < wanted:
            test += drives[drive]
    how = f"whole drives ({len(drives)} by the names)"
    if not test:
        test, how = names[-wanted:], "the last by name"
    held_out = set(test)
    found.test = dict(found.day)
    found.lists = {"day": [name for name in names if name not in held_out], "test": sorted(test)}
    found.num = {"day": len(found.lists["day"]), "test": len(test)}
    found.assumed.append(
        f"there is no split train, val or test: {len(test)} of {len(names)} frames are kept for the test, {how}"
    )
    found.to_check.append("frames of one drive should not be on both sides: look at the two split lists")


# -- what is in them ---------------------------------------------------------------------------------------------------


def _sizes(found: Found, frames: Sequence[Candidate]) -> None:
    sizes = Counter(size for one in _spread(frames, 40) if (size := _size(one.uri)) is not None)
    if not sizes:
        raise UserError(f"DAY: none of the images can be read, such as {frames[0].uri}", cure="repair these files")
    found.size = sizes.most_common(1)[0][0]
    shown = ", ".join(f"{width} x {height}" for (height, width), _ in sizes.most_common(3))
    found.assumed.append(f"day frames are {shown} (width x height)")
    ratios = {round(width / height, 1) for height, width in sizes}
    if len(ratios) > 1:
        found.to_check.append("day frames have several shapes, and all are resized to one: network.input_size")


def _usable(found: Found, frames: Sequence[Candidate]) -> None:
    """Frames without label, on a local disk, and labels of another size than their image."""
    bad = "; a run sets them aside, and refuses a dataset with more of them than `max_bad_fraction`"
    missing = [one for one in frames if not one.label_uri or (one.label_uri[0] == "/" and not exists(one.label_uri))]
    if missing:
        found.to_check.append(
            f"{len(missing)} of {len(frames)} day frames have no label ({_names([one.uri for one in missing])}): give "
            f"them labels, or take them out of the folder or the split list{bad}"
        )
    read = [(one.uri, one.label_uri) for one in _spread(frames, _LABELS_READ) if one not in missing and one.label_uri]
    sizes = [(uri, _size(uri), _size(label)) for uri, label in read]
    if odd := [uri for uri, of_image, of_label in sizes if of_image and of_label and of_image != of_label]:
        found.to_check.append(
            f"{len(odd)} of {len(read)} labels looked at have another size than their image ({_names(odd)}): scale "
            f"them by nearest neighbour{bad}"
        )


def _names(uris: Sequence[str]) -> str:
    return ", ".join(PurePosixPath(uri).name for uri in uris[:2]) + (", ..." if len(uris) > 2 else "")


def _size(uri: str) -> tuple[int, int] | None:
    try:
        return image_size(read_bytes(Location.of(uri)))
    except BadFrame:
        return None


def _classes(found: Found, frames: Sequence[Candidate], root: Location, given: str | None) -> None:
    labelled = [one.label_uri for one in frames if one.label_uri is not None]
    stored = [(uri, label) for uri in _spread(labelled, _LABELS_READ) if (label := _label(uri, found)) is not None]
    if not stored:
        raise UserError(f"DAY: none of the labels can be read, such as {labelled[0]}", cure="repair these files")
    in_colours = stored[0][1].ids.dtype == np.uint32
    found.seen = _seen([label for _, label in stored])
    words = [in_words(raw_id, COLORS if in_colours else IDS) for raw_id in found.seen]
    found.assumed.append(
        f"{len(stored)} labels looked at, {len(words)} {'colours' if in_colours else 'ids'}: {', '.join(words[:24])}"
        + (", ..." if len(words) > 24 else "")
    )
    files = label_files(_table([facts_of(uri, label) for uri, label in stored]))
    beside = None if given is not None else _list_beside(root)
    if given is not None or beside is not None:
        place = given if given is not None else (beside.uri if beside is not None else "")
        classes = taxonomy(place)
        found.taxonomy = place if place in known_taxonomies() else _as_list(place)
        strange = _not_in(found, in_colours)
        if isinstance(found.taxonomy, ClassList) and strange == [0] and not in_colours:
            ignore = found.taxonomy.ignore if isinstance(found.taxonomy.ignore, dict) else {}
            ignore = {**ignore, IDS: [*ignore.get(IDS, []), 0]}  # type: ignore[misc]
            found.taxonomy = found.taxonomy.model_copy(update={"ignore": ignore})
            classes = taxonomy(found.taxonomy)
            found.assumed.append(f"id 0 is in no row of {place}, and taken for void: add a row for it if it is a class")
        try:
            found.encoding = _fitting(found, files, classes, in_colours)
        except UserError as error:
            if not strange or place in known_taxonomies():
                raise
            raise UserError(error.what, cure=_cure_of_list(place, strange, found, classes, in_colours)) from error
        found.assumed.append(f"the classes are those of {place}, the labels are read as {found.encoding}")
        return
    known = _recognized(found, frames, files, in_colours)
    if known is not None:
        found.taxonomy, found.encoding, why = known
        found.assumed.append(
            f"the classes are those of {found.taxonomy} ({why}), the labels are read as {found.encoding}"
        )
        return
    if len(labelled) > _LABELS_READ:
        more = [label for uri in _spread(labelled, _LABELS_READ_FOR_IDS) if (label := _label(uri, found)) is not None]
        found.seen = _seen([label for label in more if (label.ids.dtype == np.uint32) == in_colours])
        found.assumed.append(f"for the classes {len(more)} of {len(labelled)} labels were read")
    _made_up(found, in_colours)


def _not_in(found: Found, in_colours: bool) -> list[int]:
    """Ids or colours of the labels that the class list does not know."""
    classes = taxonomy(found.taxonomy)
    known = classes.colors if in_colours else classes.encodings.get(IDS, classes.encodings[TRAIN_IDS])
    return sorted(found.seen.keys() - known.keys())


def _cure_of_list(place: str, strange: list[int], found: Found, classes: Taxonomy, in_colours: bool) -> str:
    """What to write into a class list of one's own, or instead of it."""
    file, first = PurePosixPath(place), in_words(strange[0], COLORS if in_colours else IDS)
    if file.suffix in (".yaml", ".yml"):
        what = f"{COLORS}: [{first}]" if in_colours else f"{IDS}: [{first}]"
        return (
            f"in {file.name}, give each class what the labels hold for it, and ignore what is none: ignore: {{{what}}}"
        )
    own = [raw_id for raw_id in sorted(found.seen) if raw_id != IGNORE]
    known = [raw_id for raw_id in sorted(classes.encodings[IDS]) if raw_id != IGNORE]
    if in_colours or known != list(range(len(known))):
        what = f"{'the colour' if in_colours else 'a row with the id'} {first}"
        more = f"; likewise {len(strange) - 1} more" if strange[1:] else ""
        return f"add {what} to {file.name}, with the name of its class or `void`{more}"
    rows = ["void,0"] if own[0] == 0 and len(own) > classes.num_classes else []
    rows.append(f"{classes.classes[0]},{own[len(rows)]}")
    return (
        f"{file.name} says no ids, so its first class is 0: write a classes.csv instead, with a row a class and its "
        f"id: `name,id`, {', '.join(f'`{row}`' for row in rows)}, ..."
    )


def _table(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist(rows, LABEL_FILES_SCHEMA)


def _as_list(place: str) -> str | ClassList:
    """A YAML file stays where it is; what other programs wrote is written out, so that it can be changed."""
    return place if place.lower().endswith((".yaml", ".yml")) else class_list(Location.of(place))


def _label(uri: str, found: Found) -> StoredLabel | None:
    try:
        data = read_bytes(Location.of(uri))
        return decode_stored_label(data, colors=found.day.get("label_encoding") == COLORS or holds_colors(data))
    except BadFrame:
        return None


def _seen(labels: Sequence[StoredLabel]) -> dict[int, Seen]:
    pixels, heights, files = Counter[int](), Counter[int](), Counter[int]()
    total = 0
    for label in labels:
        ids, inverse, counts = np.unique(label.ids, return_inverse=True, return_counts=True)
        rows = np.repeat(np.arange(label.ids.shape[0]) / max(label.ids.shape[0] - 1, 1), label.ids.shape[1])
        sums = np.bincount(inverse.reshape(-1), rows)
        total += label.ids.size
        for raw_id, number, height in zip(ids.tolist(), counts.tolist(), sums.tolist(), strict=True):
            pixels[raw_id] += number
            heights[raw_id] += height
            files[raw_id] += 1
    return {
        raw_id: Seen(pixels[raw_id] / total, heights[raw_id] / pixels[raw_id], files[raw_id] / len(labels))
        for raw_id in sorted(pixels)
    }


def _list_beside(root: Location) -> Location | None:
    """A class list in the folder, or in the one above it, if it can be read as one."""
    for folder in (root, root.parent):
        for name in _CLASS_LISTS:
            if (folder / name).exists():
                try:
                    class_list(folder / name)
                except UserError:
                    continue
                return folder / name
    return None


def _fitting(found: Found, files: Sequence[LabelFile], classes: Taxonomy, in_colours: bool) -> str:
    """The encoding that the labels have. Raises UserError: none, with the cure in the numbers of both."""
    if in_colours:
        read_as("DAY", files, classes.of_colors(found.seen), asked=COLORS)
        return COLORS
    asked = IDS if IDS in classes.encodings else None
    return read_as("DAY", files, classes, asked=asked).encoding


def _recognized(
    found: Found, frames: Sequence[Candidate], files: Sequence[LabelFile], in_colours: bool
) -> tuple[str, str, str] | None:
    """(taxonomy, encoding, why) of a published class list that the labels show to be theirs."""
    layout = found.day["layout"]
    if layout in ("cityscapes", "bdd100k", "acdc"):
        encoding = _fitting(found, files, taxonomy("cityscapes19"), in_colours)
        return "cityscapes19", encoding, f"layout {layout}"
    if any(_CAMVID.match(PurePosixPath(one.uri).name) for one in frames) and not in_colours:
        for encoding in ("camvid12", FROM_ONE):  # void last, as SegNet's copy has it, or first
            if _lies_as(found, taxonomy("camvid11"), encoding):
                return "camvid11", encoding, "the files are called like those of CamVid, sky and road lie as there"
    for name in known_taxonomies():
        classes = taxonomy(name)
        colours = (
            set(found.seen) if in_colours else {packed(colour) for file in files for colour in file.colours.values()}
        )
        meant = {classes.colors[colour] for colour in colours if colour in classes.colors} - {IGNORE}
        if len(meant) < 3 or (in_colours and not classes.knows(colours, COLORS)):
            continue
        if in_colours:
            return name, COLORS, "the colours of the labels"
        try:
            reading = read_as("DAY", files, classes, asked=None)
        except UserError:
            continue
        if reading.why == "by the colours of their palettes":
            return name, reading.encoding, reading.why
    named = {name_of(PurePosixPath(file.uri).name).encoding for file in files}
    if named == {"label_ids"} and found.seen.keys() <= taxonomy("cityscapes19").encodings["label_ids"].keys():
        return "cityscapes19", "label_ids", "the names of the files"
    return None


def _lies_as(found: Found, classes: Taxonomy, encoding: str) -> bool:
    """Whether an encoding knows all ids, and makes a sky of what lies high in the image, a road of what lies low."""
    ids = classes.encodings[encoding]
    if not found.seen.keys() <= ids.keys():
        return False
    sky, road = (
        [one for raw_id, one in found.seen.items() if ids[raw_id] == classes.classes.index(name)]
        for name in ("sky", "road")
    )
    return all(one.height < _HIGH for one in sky) and all(one.height > _LOW for one in road) and bool(sky and road)


def _made_up(found: Found, in_colours: bool) -> None:
    """A class for every id or colour: names are what no file tells."""
    classes: list[ListedClass] = []
    ignored: list[int] = []
    for raw_id in found.seen:
        if raw_id == (0 if in_colours else IGNORE):
            ignored.append(raw_id)
        else:
            number = len(classes)
            name = f"class_{number if in_colours else raw_id}"
            classes.append(
                ListedClass(name=name, color=unpacked(raw_id)) if in_colours else ListedClass(name=name, ids=raw_id)
            )
    what = "colours" if in_colours else "ids"
    if len(classes) > MOST_IDS:
        raise UserError(
            f"DAY: the labels hold {len(classes)} {what}: more than there are classes, as after scaling with "
            "interpolation, or in files of instances",
            cure="scale labels by nearest neighbour; or give the class list",
        )
    if len(classes) < 2:
        shown = ", ".join(in_words(raw_id, COLORS if in_colours else IDS) for raw_id in found.seen)
        raise UserError(f"DAY: the labels hold the {what} {shown}, less than two classes", cure="give finished labels")
    found.taxonomy = ClassList(classes=classes)
    found.is_named = False
    found.encoding = COLORS if in_colours else IDS
    void = "black" if in_colours else "255"
    found.assumed.append(
        f"every {'colour' if in_colours else 'id'} is a class" + (f", {void} is none" if ignored else "")
    )
    found.to_check.append(
        "give the classes their names (`sky`, `car`, `building`, ... are lit by the translator as what they are), and "
        f"move {'colours' if in_colours else 'ids'} that are no class, often "
        f"{'one for void' if in_colours else 'the first or the last'}, to `ignore:`; the comments say where they lie"
    )


# -- the night ---------------------------------------------------------------------------------------------------------


def _night(found: Found, night: Location) -> None:
    found.night = {"layout": "images", "root": night.uri, "labelled": False}
    frames = list_frames(FolderDataset(**found.night), "night")
    found.num["night"] = len(frames)
    tones, sizes = [], Counter[tuple[int, int]]()
    for one in _spread(frames, _NIGHTS_READ):
        try:
            image = read_image(Location.of(one.uri))
        except BadFrame:
            continue
        tones.append(tone_of(image))
        sizes[image.shape[0], image.shape[1]] += 1
    if not tones:
        raise UserError(f"NIGHT: none of the images can be read, such as {frames[0].uri}", cure="repair these files")
    domains = Counter(separate(np.array([one.bands for one in tones]), np.array([one.chroma for one in tones])).domain)
    shown = ", ".join(f"{number} {name}" for name, number in domains.most_common())
    found.is_sorted = domains["night"] >= (1 - MOST_TWILIGHT) * len(tones)
    of = f"{len(tones)} of {len(frames)} frames of the night folder looked at: {shown}"
    if found.is_sorted:
        found.assumed.append(f"{of}; all are taken for night")
    elif domains["night"]:
        found.assumed.append(f"{of}; the folder is taken for unsorted, and the night side of it is used")
    else:
        found.is_sorted = True
        found.assumed.append(f"{of}; none looks like night, and all are taken for it, as you say so")
        found.to_check.append("the night folder does not look like night: dusk, bright streets, or another folder?")
    (height, width), _ = sizes.most_common(1)[0]
    ratio = (width / height) / (found.size[1] / found.size[0])
    if not 0.8 < ratio < 1.25:
        found.to_check.append(
            f"night frames are {width} x {height}, day frames {found.size[1]} x {found.size[0]}: one is squeezed to "
            "the shape of the other (network.input_size)"
        )


def _spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly over all."""
    places: list[int] = (
        np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int).tolist() if items else []
    )
    return [items[place] for place in places]
