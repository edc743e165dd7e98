"""Folder layouts: where a data set keeps its images and its labels.

Listing only: `stages/collect.py` reads and checks the files; only labels are opened whose names leave it open whether
they hold ids. A layout is two listings (images and labels) and a rule that pairs them, so a million frames cost two
walks and no look-up a frame.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import PurePosixPath
from typing import Final

from nightseg.data.images import LABEL_SUFFIXES, SUFFIXES, BadFrame, may_be_label, read_bytes
from nightseg.data.label_names import LABEL_IDS, composed, labels_of_frames, name_of, named_encoding, stem
from nightseg.data.listing import files_below
from nightseg.data.patterns import EVERYTHING, NAME, Pattern, pattern_of
from nightseg.data.settings import FolderDataset
from nightseg.data.split_list import Listed, chosen, read_split_list
from nightseg.data.table import DOMAINS
from nightseg.data.taxonomy import COLORS, IDS, TRAIN_IDS
from nightseg.errors import closest, first_of
from nightseg.storage import Entry, Location, UserError, hash_of

_CHECK_DATASET = "check root, split and layout of the dataset"
_IMAGE_ENDINGS = ("_leftImg8bit", "_rgb_anon", "_rgb_ref_anon")
_ABSOLUTE = re.compile(r"/|~|[A-Za-z][A-Za-z0-9+.-]*://")
_NIGHTTIME_LABELS = "gtCoarse_daytime_trainvaltest"

PLACES: Final[Mapping[str, tuple[str, str]]] = {
    "pairs": ("as `images` says", "as `labels` says"),
    "images": ("all below it", ""),
    "camvid": ("<split>/images/*", "<split>/labels/<same stem>.png"),
    "cityscapes": ("leftImg8bit/<split>/<city>/*", "gtFine/<split>/<city>/*_labelIds.png"),
    "nighttime_driving": ("leftImg8bit/<split>/<domain>/*", f"{_NIGHTTIME_LABELS}/<split>/..."),
    "acdc": ("rgb_anon/<condition>/<split>/<drive>/*", "gt/..."),
    "dark_zurich": ("rgb_anon/<split>/<domain>/<drive>/*", "gt/val/night/..."),
    "bdd100k": ("images/10k/<split>/*", "labels/sem_seg/masks/<split>/*"),
    "nightcity": ("NightCity-images/images/<split>/*", "NightCity-label/label/<split>"),
    "mapillary": ("<split>/images/*", "<split>/v1.2/labels/*"),
    "nexet": ("all below it", ""),
}
"""Where a layout has its images and its labels below its root, in words: docs/own-data.md has the table."""


@dataclass(frozen=True)
class Candidate:
    """A frame that the listing promises. Nothing is opened yet: it may be damaged, its label may not exist.

    `problem` is not empty when the file's name cannot be written in a table or opened on every file system, and when it
    is a link that leads nowhere or no file at all.
    """

    frame_id: str
    uri: str
    label_uri: str | None
    sequence: str | None
    domain: str
    label_encoding: str | None
    problem: str = ""


@dataclass(frozen=True)
class _Folders:
    """Where a layout keeps its images (`depth` levels down, None = all), and its labels, if labels are wanted.

    Files count whose names below the folder fit the pattern.
    """

    images: Location
    depth: int | None
    labels: Location | None
    label_depth: int | None = 2
    image_pattern: Pattern = EVERYTHING
    label_pattern: Pattern = EVERYTHING


@dataclass(frozen=True)
class _Listing:
    """The image files of one folder (names relative to it), and the label files of another, if labels are wanted."""

    images: Location
    image_entries: list[Entry]
    labels: Location | None
    label_entries: list[Entry]
    image_pattern: Pattern = EVERYTHING
    label_pattern: Pattern = EVERYTHING
    told: Mapping[str, Listed] = field(default_factory=dict)  # image file -> what the split list says of it


@dataclass(frozen=True)
class _Pair:
    """What a layout's rule makes of one image: the readable stem, and its label's name below the label folder."""

    image: str
    stem: str
    label: str | None
    encoding: str | None
    sequence: str | None
    domain: str | None


def _nobody(note: str) -> None:
    """Takes what a listing has to say where it is said by another call."""


def list_frames(dataset: FolderDataset, name: str, say: Callable[[str], None] = _nobody) -> list[Candidate]:
    """The frames a folder promises, sorted by their unique `frame_id`, which begins with the `name` of the dataset.

    pairs: `images` and `labels` below <root>: folders, patterns, templates; sequence = {sequence}, or the folder.
    camvid: <root>/<split>/images/*, <root>/<split>/labels/<same stem>.png; sequence = the part before the first "_".
    cityscapes: <root>/leftImg8bit/<split>/<city>/*, <root>/gtFine/<split>/<city>/*_labelIds.png (or gtCoarse, or
        *_labelTrainIds.png where there are no labelIds); sequence = the city.
    nighttime_driving: <root>/leftImg8bit/<split>/<domain>/*, labels gtCoarse_daytime_trainvaltest (train ids).
    acdc: <root>/rgb_anon/<condition>/<split>/<drive>/*, gt; split = night/train, or train of all conditions.
    dark_zurich: <root>/rgb_anon/<split>/<domain>/<drive>/*, gt (val alone has labels); split = train/night, or train.
    bdd100k: <root>/images/10k/<split>/*, labels/sem_seg/masks; of the older release images/<split>, labels/<split>.
    nightcity: <root>/images/<split>/*, label/<split> (or labels, NightCity-images/images, .../img and lbl).
    mapillary: <root>/<split>/images/*, v1.2/labels or labels.
    images: all images below <root>/<split>, never labelled; sequence = their folder.
    nexet: the same; domain = what the column `lighting` of train.csv says, or a folder called day, night or twilight;
        a split that is no folder is one of these three.
    Links are followed; what does not count is said by `files_below`, and `say` is told of it.
    Raises UserError: no such folder, no such split, no image.
    """
    listing = _list(dataset, say)
    pairs = _pairs(dataset.layout, listing, dataset.label_encoding)
    candidates = _candidates(listing, pairs, name, dataset.domain)
    candidates.sort(key=lambda candidate: candidate.frame_id)
    return candidates[: dataset.limit]


def frames_of_files(root: Location, entries: list[Entry], dataset: str) -> list[Candidate]:
    """The candidates that `list_frames` would make of these files below `root`, in their order."""
    return _candidates(_Listing(root, entries, None, []), [_plain_pair(e.name) for e in entries], dataset, "unknown")


def _candidates(listing: _Listing, pairs: list[_Pair], dataset: str, domain: str) -> list[Candidate]:
    candidates = []
    labels = {entry.name: entry for entry in listing.label_entries}
    for entry, pair, name in zip(listing.image_entries, pairs, _unique_names(pairs), strict=True):
        uri, image_problem = _file(listing.images, entry)
        label_uri, label_problem = None, ""
        if listing.labels is not None and pair.label is not None:
            label_uri, label_problem = _file(listing.labels, labels.get(pair.label) or Entry(pair.label, 0, 0, False))
        candidates.append(
            Candidate(
                frame_id=f"{dataset}/{_printable(name)}",
                uri=uri,
                label_uri=label_uri,
                sequence=None if pair.sequence is None else _printable(pair.sequence),
                domain=pair.domain if domain == "unknown" and pair.domain is not None else domain,
                label_encoding=None if label_uri is None else pair.encoding,
                problem=image_problem or label_problem,
            )
        )
    return candidates


def check_folders(dataset: FolderDataset) -> None:
    """Raises the UserError that `list_frames` would raise for a folder that is not there, or for a split list that is
    none. No folder is listed."""
    _folders(dataset)
    if dataset.split_list is not None:
        read_split_list(_place_of_list(dataset.split_list, Location.of(dataset.root)), dataset.split)


def count(dataset: FolderDataset) -> int:
    """How many frames `list_frames` would give. Raises the same errors."""
    num_images = len(_list(dataset).image_entries)
    return num_images if dataset.limit is None else min(dataset.limit, num_images)


def fingerprint(dataset: FolderDataset) -> str:
    """sha256 (hex) of what would be read: names, sizes and times of the files. Unchanged folder = unchanged value.

    `limit` does not count: which frames it keeps follows from the names, so they are all hashed.
    """
    listing = _list(dataset)
    facts = [
        [[_printable(entry.name), entry.size, entry.modified_ns] for entry in entries]
        for entries in (listing.image_entries, listing.label_entries)
    ]
    told = [[one.image, one.label, one.domain] for one in listing.told.values()]
    return hash_of([dataset.layout, *facts, *([told] if told else [])])


def scene_domains(mix: Mapping[str, float], first: int, count: int) -> list[str]:
    """The domain of the scenes `first` .. `first + count - 1`: interleaved, a function of the index and `mix` only.

    Among the first n scenes every domain has its share of n, to less than one frame: Tijdeman's rule for the chairman
    assignment problem (Discrete Mathematics 32, 1980). Shares that make n * share whole are met exactly.
    """
    shares = {name: Fraction(mix[name]).limit_denominator(10_000) for name in DOMAINS if mix.get(name)}
    total = sum(shares.values())
    shares = {name: share / total for name, share in shares.items()}
    slack = Fraction(1, 2 * len(shares) - 2) if len(shares) > 1 else Fraction(0)
    given = dict.fromkeys(shares, 0)
    domains = []
    for index in range(first + count):
        # what each domain is owed; those owed enough take turns by how soon they would be owed too much
        owed = {name: share * (index + 1) - given[name] for name, share in shares.items()}
        due = [name for name in shares if owed[name] >= slack]
        chosen = min(due or shares, key=lambda name: (1 - slack - owed[name]) / shares[name])
        given[chosen] += 1
        domains.append(chosen)
    return domains[first:]


# -- what lies where ---------------------------------------------------------------------------------------------------


def _folders(dataset: FolderDataset) -> _Folders:
    root, split, labelled = Location.of(dataset.root), dataset.split, dataset.labelled
    if dataset.layout == "images" and not split and not root.is_folder():  # also the folder of a single command
        wrong = "a file, and no folder of images" if root.exists() else "no such folder"
        raise UserError(f"{wrong}: {root.uri}", cure="check the path")
    _need_folder(root, f"layout {dataset.layout}: root")
    match dataset.layout:
        case "camvid":
            part = _split_folder(dataset.layout, root, split)
            _need_folder(part / "images", "layout camvid: images")
            found = _Folders(part / "images", 1, part / "labels" if labelled else None)
        case "cityscapes":
            images = _split_folder(dataset.layout, root / "leftImg8bit", split)
            found = _Folders(images, 2, _cityscapes_labels(root, split) if labelled else None)
        case "nighttime_driving":
            images = _split_folder(dataset.layout, root / "leftImg8bit", split or "test")
            found = _Folders(images, 2, root / _NIGHTTIME_LABELS / (split or "test") if labelled else None)
        case "images":
            in_list = dataset.split_list is not None and not (split and (root / split).is_folder())
            found = _Folders(root if in_list else _split_folder(dataset.layout, root, split), None, None)
        case "nexet":
            in_folder = not split or (root / split).is_folder() or split not in DOMAINS
            found = _Folders(_split_folder("images", root, split) if in_folder else root, None, None)
        case "pairs":
            found = _pairs_folders(dataset, root)
        case "bdd100k":
            new = (root / "images/10k").is_folder()
            images = _split_folder(dataset.layout, root / ("images/10k" if new else "images"), split)
            masks = "labels/sem_seg/masks" if new else "labels"
            found = _Folders(images, 1, root / f"{masks}/{split}" if labelled else None)
        case "acdc":
            found = _by_condition(dataset, root, ("rgb_anon", "rgb_anon_trainvaltest/rgb_anon"), "*/{}/**")
        case "dark_zurich":
            found = _by_condition(dataset, root, ("rgb_anon",), "")
        case "nightcity":
            images = _first_folder(root, ("NightCity-images/images", "images", "img", ""))
            labels = _first_folder(root, ("NightCity-label/label", "label", "labels", "lbl", ""))
            images = _split_folder(dataset.layout, images, split)
            labels = labels / split
            if (images / "img").is_folder():
                images, labels = images / "img", labels / "lbl"
            found = _Folders(images, 1, labels if labelled else None)
        case "mapillary":
            part = _split_folder(dataset.layout, root, split)
            _need_folder(part / "images", "layout mapillary: images")
            found = _Folders(part / "images", 1, _first_folder(part, ("v1.2/labels", "labels")) if labelled else None)
    if found.labels is not None and not found.labels.is_folder():
        raise UserError(
            f"layout {dataset.layout}: no label folder {found.labels.uri}",
            cure="put the labels there, or set labelled: false if these frames have none",
        )
    return found


def _first_folder(parent: Location, names: Sequence[str]) -> Location:
    """The first of these folders that is there; the last if none is."""
    folders = [parent / name if name else parent for name in names]
    return next((folder for folder in folders if folder.is_folder()), folders[-1])


def _by_condition(dataset: FolderDataset, root: Location, places: Sequence[str], every: str) -> _Folders:
    """ACDC and Dark Zurich: a split is a folder below rgb_anon, or (ACDC) one of that name below each condition."""
    images = _first_folder(root, [*places, places[0]])
    _need_folder(images, f"layout {dataset.layout}: rgb_anon")
    labels = _first_folder(root, ("gt", "gt_trainval/gt"))
    split, pattern = dataset.split, EVERYTHING
    conditions = [entry.name for entry in images.list() if entry.is_folder]
    if (
        every
        and split
        and split not in conditions
        and any((images / f"{one}/{split}").is_folder() for one in conditions)
    ):
        pattern = pattern_of(every.format(split))
    else:
        images, labels = _split_folder(dataset.layout, images, split), labels / split if split else labels
    return _Folders(images, None, labels if dataset.labelled else None, None, pattern, pattern)


def _pairs_folders(dataset: FolderDataset, root: Location) -> _Folders:
    def place(key: str, text: str) -> tuple[Location, Pattern]:
        text = text.replace("{split}", dataset.split)
        try:
            whole = Location.of(text) if _ABSOLUTE.match(text) else root / text if text.strip("./") else root
            if whole.is_folder():  # a path that is there is no pattern
                return whole, EVERYTHING
            pattern = pattern_of(text)
        except UserError as error:
            raise UserError(f"layout pairs: {key}: {error.what}", cure=error.cure) from error
        below = (
            Location.of(pattern.folder) if _ABSOLUTE.match(text) else root / pattern.folder if pattern.folder else root
        )
        if not below.is_folder():
            has = first_of([entry.name for entry in root.list() if entry.is_folder]) or "no folders"
            raise UserError(
                f"layout pairs: {key}: no such folder: {below.uri}; {root.uri} has {has}",
                cure=f"set {key} to a folder, a pattern or a template below root"
                + (", or set labelled: false if these frames have none" if key == "labels" else ""),
            )
        return below, pattern

    images, image_pattern = place("images", dataset.images or "images")
    if not dataset.labelled:
        return _Folders(images, None, None, None, image_pattern)
    labels, label_pattern = place("labels", dataset.labels or "labels")
    if lost := [name for name in label_pattern.places if name not in (NAME, *image_pattern.places)]:
        raise UserError(
            f"layout pairs: labels: {{{lost[0]}}} is in {label_pattern.text!r}, and not in images: "
            f"{image_pattern.text or dataset.images or 'images'!r}",
            cure=f"write {{{lost[0]}}} where it stands in the paths of the images, or * for what differs",
        )
    return _Folders(images, None, labels, None, image_pattern, label_pattern)


def _list(dataset: FolderDataset, say: Callable[[str], None] = _nobody) -> _Listing:
    found = _folders(dataset)
    notes: list[str] = []
    images = _fitting(files_below(found.images, SUFFIXES, depth=found.depth, say=notes.append), found.image_pattern)
    labels = [] if found.labels is None else files_below(
        found.labels, LABEL_SUFFIXES, depth=found.label_depth, predictions=True
    )  # fmt: skip
    labels = _fitting(labels, found.label_pattern)
    if found.labels is not None and not labels:
        _need_labels(dataset, found.labels, found.label_pattern)
    if found.labels == found.images:  # frames and labels side by side: a label is no frame
        images = _without_labels(images, found)
        frames = {entry.name for entry in images}
        labels = [entry for entry in labels if entry.name not in frames]
    told = _of_split_list(dataset, found.images, images)
    if told is not None:
        images = list({entry.name: entry for entry, _ in told}.values())
    listing = _Listing(
        found.images, images, found.labels, labels, found.image_pattern, found.label_pattern,
        {} if told is None else {entry.name: one for entry, one in told},
    )  # fmt: skip
    if not listing.image_entries:
        where = "" if dataset.layout == "images" and not dataset.split else f"layout {dataset.layout}: "
        what = f"{where}no image in {listing.images.uri}; looked for {', '.join(SUFFIXES)}"
        cure = _CHECK_DATASET if where else "check the folder, or convert what is in it"
        raise UserError("; ".join([what, *notes]), cure=cure)
    for note in notes:
        say(note)
    return listing


def _need_labels(dataset: FolderDataset, folder: Location, pattern: Pattern) -> None:
    """Raise UserError if there are files where the labels should be, and none can be one."""
    others = [one.name for one in files_below(folder, ("",), predictions=True) if not one.name.endswith(LABEL_SUFFIXES)]
    those = f" that fits {pattern.text!r}" if pattern.rest else ""
    if others or those:
        seen = f"; there are {first_of(others)}" if others else ""
        raise UserError(
            f"layout {dataset.layout}: labels: no label in {folder.uri}{those}; looked for "
            f"{', '.join(LABEL_SUFFIXES)}{seen}",
            cure="labels are files that keep every id, never JPEG; set labelled: false if these frames have none",
        )


def _fitting(entries: list[Entry], pattern: Pattern) -> list[Entry]:
    return [entry for entry in entries if pattern.match(entry.name) is not None] if pattern.rest else entries


def _without_labels(images: list[Entry], found: _Folders) -> list[Entry]:
    """Of a folder that holds frames and their labels: the frames. Of a.jpg, a.png the label is the one that can be."""
    if found.label_pattern.rest and not found.image_pattern.rest:
        return [entry for entry in images if found.label_pattern.match(entry.name) is None]
    if found.image_pattern.rest:
        return images
    names = {stem(entry.name) for entry in images if not entry.name.lower().endswith(LABEL_SUFFIXES)}
    frames = {stem(entry.name) for entry in images}
    return [
        entry for entry in images
        if not (entry.name.lower().endswith(LABEL_SUFFIXES) and (stem(entry.name) in names or (
            name_of(entry.name).endings and name_of(entry.name).frame in frames)))
    ]  # fmt: skip


def _place_of_list(file: str, root: Location) -> Location:
    return Location.of(file) if _ABSOLUTE.match(file) else root / file


def _of_split_list(dataset: FolderDataset, folder: Location, images: list[Entry]) -> list[tuple[Entry, Listed]] | None:
    """The images that the split list names, and what it says of them; None if there is no list."""
    root = Location.of(dataset.root)
    file, split = dataset.split_list, dataset.split
    is_nexet = dataset.layout == "nexet" and file is None and (root / "train.csv").exists()
    if file is None and not is_nexet:
        return None
    place = _place_of_list(file or "train.csv", root)
    listed = read_split_list(place, "" if is_nexet else split)
    if is_nexet and split in DOMAINS and not (root / split).is_folder():
        listed = [one for one in listed if one.domain == split]
    return chosen(listed, images, place, folder.uri.removeprefix(root.uri).strip("/"))


def _need_folder(folder: Location, what: str) -> None:
    if not folder.is_folder():
        wrong = "a file, and no folder" if folder.exists() else "no such folder"
        raise UserError(f"{what}: {wrong}: {folder.uri}", cure=_CHECK_DATASET)


def _split_folder(layout: str, parent: Location, split: str) -> Location:
    """<parent>/<split>. The empty split is the parent itself, but not where that would mix train and test."""
    _need_folder(parent, f"layout {layout}")
    if not split and layout in ("camvid", "images", "acdc"):
        return parent
    folder = parent / split if split else parent
    if not split or not folder.is_folder():
        found = [entry.name for entry in parent.list() if entry.is_folder]
        wrong = f"unknown split {split!r}{closest(split, found)}" if split else "a split is needed"
        has = ", ".join(found) or "no folders"
        raise UserError(f"layout {layout}: {wrong}; {parent.uri} has {has}", cure="set split to one of its folders")
    return folder


def _cityscapes_labels(root: Location, split: str) -> Location:
    """gtFine, or gtCoarse for the splits that have only that (train_extra)."""
    fine, coarse = root / "gtFine" / split, root / "gtCoarse" / split
    return coarse if not fine.is_folder() and coarse.is_folder() else fine


# -- pairing -----------------------------------------------------------------------------------------------------------


def _pairs(layout: str, listing: _Listing, label_encoding: str | None) -> list[_Pair]:
    match layout:
        case "camvid":
            usual, prefer, ending = "camvid12", TRAIN_IDS, ""
        case "cityscapes":
            coarse = listing.labels is not None and "/gtCoarse/" in listing.labels.uri
            usual, prefer, ending = LABEL_IDS, LABEL_IDS, "_gtCoarse" if coarse else "_gtFine"
        case "nighttime_driving":
            usual, prefer, ending = TRAIN_IDS, TRAIN_IDS, "_gtCoarse"
        case "acdc" | "dark_zurich":
            usual, prefer, ending = TRAIN_IDS, TRAIN_IDS, "_gt"
        case "pairs" if listing.label_pattern.places:
            return _by_template(listing, label_encoding)
        case "pairs" | "mapillary":
            usual, prefer, ending = IDS, TRAIN_IDS, ""
        case "bdd100k" | "nightcity":
            usual, prefer, ending = TRAIN_IDS, TRAIN_IDS, ""
        case "images" | "nexet":
            return [
                _plain_pair(entry.name, _told_domain(layout, entry.name, listing)) for entry in listing.image_entries
            ]
    prefer = label_encoding or prefer
    if ending:
        ending += "_labelTrainIds" if prefer == TRAIN_IDS else "_labelIds"  # of a label that is not there
    stems = {composed(stem(entry.name)) for entry in listing.image_entries}
    look = None if listing.labels is None or prefer == COLORS else partial(may_hold_ids, listing.labels)
    labels = labels_of_frames(
        listing.label_entries, f"layout {layout}: labels", prefer=prefer, frames=stems, may_hold_ids=look
    )
    labels = {composed(frame): entry for frame, entry in labels.items()}
    alike = {composed(stem(entry.name)): entry for entry in listing.label_entries}  # cam_color.png for cam_color.jpg
    bare = _by_bare_name(labels) if layout == "pairs" else {}
    pairs = []
    for image in listing.image_entries:
        values = listing.image_pattern.match(image.name) or {}
        frame = values.get(NAME) or stem(image.name)
        frame = next((frame.removesuffix(one) for one in _IMAGE_ENDINGS if ending and frame.endswith(one)), frame)
        found = labels.get(composed(frame)) or alike.get(composed(stem(image.name)))
        part = composed(name_of(image.name).frame)
        if found is None and part not in stems:  # else it is the label of that other image
            found = labels.get(part)
        if found is None and bare:
            found = bare.get(PurePosixPath(part).name) or bare.get(PurePosixPath(frame).name)
        label = f"{frame}{ending}.png" if found is None else found.name
        label = _listed_label(listing, image.name) or label
        encoding = label_encoding or named_encoding(label) or usual
        sequence = _sequence(layout, frame, values)
        pairs.append(_Pair(image.name, frame, label, encoding, sequence, _told_domain(layout, image.name, listing)))
    return pairs


def _by_template(listing: _Listing, label_encoding: str | None) -> list[_Pair]:
    """Pairs whose labels' template has placeholders: the label is the file for which they stand for the same."""
    places = listing.label_pattern.places
    by_values: dict[tuple[str, ...], str] = {}
    for entry in listing.label_entries:
        values = listing.label_pattern.match(entry.name) or {}
        key = tuple(composed(values[place]) for place in places)
        if key in by_values:
            both = f"{by_values[key]} and {entry.name}"
            raise UserError(f"layout pairs: labels: {both} fit the same frame", cure="make the template narrower")
        by_values[key] = entry.name
    pairs = []
    for image in listing.image_entries:
        values = {NAME: stem(image.name)} | (listing.image_pattern.match(image.name) or {})
        label = by_values.get(tuple(composed(values[place]) for place in places))
        label = _listed_label(listing, image.name) or label or listing.label_pattern.filled(values)
        sequence, domain = _sequence("pairs", stem(image.name), values), _told_domain("pairs", image.name, listing)
        encoding = label_encoding or named_encoding(label) or IDS
        pairs.append(_Pair(image.name, stem(image.name), label, encoding, sequence, domain))
    return pairs


def _by_bare_name(labels: Mapping[str, Entry]) -> dict[str, Entry]:
    """Labels by the name without folders, where only one is called so: folders may differ on the two sides."""
    names = Counter(PurePosixPath(frame).name for frame in labels)
    return {name: entry for frame, entry in labels.items() if names[name := PurePosixPath(frame).name] == 1}


def _listed_label(listing: _Listing, image: str) -> str | None:
    """The label that the split list gives an image, as a name below the folder of labels."""
    told = listing.told.get(image)
    if told is None or told.label is None:
        return None
    names = {entry.name for entry in listing.label_entries}
    parts = PurePosixPath(told.label).parts
    return next((name for start in range(len(parts)) if (name := "/".join(parts[start:])) in names), told.label)


def _sequence(layout: str, frame: str, values: Mapping[str, str]) -> str | None:
    if "sequence" in values:
        return values["sequence"]
    if layout == "camvid":
        return frame.partition("_")[0] if "_" in frame else None
    return None if layout in ("bdd100k", "nightcity", "mapillary") else frame.rpartition("/")[0] or None


def _told_domain(layout: str, image: str, listing: _Listing) -> str | None:
    """What a layout says of a frame's time of day, by the split list or by folders."""
    told = listing.told.get(image)
    if told is not None and told.domain is not None:
        return told.domain
    above = [*PurePosixPath(listing.images.uri).parts[-3:], *PurePosixPath(image).parts[:-1]]
    match layout:
        case "nightcity":
            return "night"
        case "acdc":
            return "night" if "night" in above and not any(part.endswith("_ref") for part in above) else "day"
        case "nexet" | "dark_zurich":
            return next((part for part in reversed(above) if part in DOMAINS), None)
        case "cityscapes" | "nighttime_driving" | "pairs":
            folder = PurePosixPath(image).parent.as_posix()
            return folder if folder in DOMAINS else None
    return None


def _plain_pair(image: str, domain: str | None = None) -> _Pair:
    return _Pair(image, stem(image), None, None, image.rpartition("/")[0] or None, domain)


def _unique_names(pairs: Iterable[_Pair]) -> list[str]:
    """The stem of each image; where two share one (a.png, a.jpg) both keep their suffix."""
    pairs = list(pairs)
    names = [pair.stem for pair in pairs]
    while True:  # a suffix that is kept may collide in turn ('a.png.jpg'); full names end it
        counts = Counter(names)
        clashes = [index for index, name in enumerate(names) if counts[name] > 1 and name != pairs[index].image]
        if not clashes:
            return names
        for index in clashes:
            names[index] = pairs[index].image


def _file(folder: Location, entry: Entry) -> tuple[str, str]:
    """(uri, problem): a name that `Location` refuses is kept in printable form, so that the frame can be reported."""
    try:
        return (folder / entry.name).uri, _printable(entry.problem)
    except UserError as error:
        return f"{folder.uri}/{_printable(entry.name)}", _printable(str(error))


def _printable(name: str) -> str:
    """Names that are not UTF-8 reach us with surrogates, which no table can hold."""
    return name.encode("utf-8", "backslashreplace").decode()


def may_hold_ids(folder: Location, entry: Entry) -> bool:
    try:
        return bool(entry.problem) or may_be_label(read_bytes(folder / entry.name))
    except BadFrame:
        return True  # whoever reads it tells what is wrong
