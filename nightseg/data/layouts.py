"""Folder layouts: where a data set keeps its images and its labels.

Listing only: `stages/collect.py` reads and checks the files; only labels are opened whose names leave it open whether
they hold ids. A layout is two listings (images and labels) and a rule that pairs them, so a million frames cost two
walks and no look-up a frame.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

from nightseg.data.images import LABEL_SUFFIXES, SUFFIXES, BadFrame, may_be_label, read_bytes
from nightseg.data.label_names import LABEL_IDS, labels_of_frames, name_of, named_encoding
from nightseg.data.listing import files_below
from nightseg.data.settings import FolderDataset
from nightseg.data.table import DOMAINS, file_name
from nightseg.data.taxonomy import TRAIN_IDS
from nightseg.errors import MOST_NAMED, closest, first_of, together
from nightseg.storage import Entry, Location, UserError, hash_of

_CHECK_DATASET = "check root, split and layout of the dataset"
_CITYSCAPES_IMAGE = "_leftImg8bit"
_NIGHTTIME_LABELS = "gtCoarse_daytime_trainvaltest"


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
    """Where a layout keeps its images (`depth` levels down, None = all), and its labels, if labels are wanted."""

    images: Location
    depth: int | None
    labels: Location | None


@dataclass(frozen=True)
class _Listing:
    """The image files of one folder (names relative to it), and the label files of another, if labels are wanted."""

    images: Location
    image_entries: list[Entry]
    labels: Location | None
    label_entries: list[Entry]


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

    camvid: <root>/<split>/images/*, <root>/<split>/labels/<same stem>.png; sequence = the part before the first "_".
    cityscapes: <root>/leftImg8bit/<split>/<city>/*, <root>/gtFine/<split>/<city>/*_labelIds.png (or gtCoarse, or
        *_labelTrainIds.png where there are no labelIds); sequence = the city.
    nighttime_driving: <root>/leftImg8bit/<split>/<domain>/*, labels gtCoarse_daytime_trainvaltest (train ids).
    images: all images below <root>/<split>, never labelled; sequence = their folder.
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
    """Raises the UserError that `list_frames` would raise for a folder that is not there. No file is listed."""
    _folders(dataset)


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
    return hash_of([dataset.layout, *facts])


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
            found = _Folders(_split_folder(dataset.layout, root, split), None, None)
    if found.labels is not None and not found.labels.is_folder():
        raise UserError(
            f"layout {dataset.layout}: no label folder {found.labels.uri}",
            cure="put the labels there, or set labelled: false if these frames have none",
        )
    return found


def _list(dataset: FolderDataset, say: Callable[[str], None] = _nobody) -> _Listing:
    found = _folders(dataset)
    notes: list[str] = []
    images = files_below(found.images, SUFFIXES, depth=found.depth, say=notes.append)
    labels = [] if found.labels is None else files_below(found.labels, LABEL_SUFFIXES, depth=2, predictions=True)
    listing = _Listing(found.images, images, found.labels, labels)
    if not listing.image_entries:
        where = "" if dataset.layout == "images" and not dataset.split else f"layout {dataset.layout}: "
        what = f"{where}no image in {listing.images.uri}; looked for {', '.join(SUFFIXES)}"
        cure = _CHECK_DATASET if where else "check the folder, or convert what is in it"
        raise UserError("; ".join([what, *notes]), cure=cure)
    for note in notes:
        say(note)
    return listing


def _need_folder(folder: Location, what: str) -> None:
    if not folder.is_folder():
        wrong = "a file, and no folder" if folder.exists() else "no such folder"
        raise UserError(f"{what}: {wrong}: {folder.uri}", cure=_CHECK_DATASET)


def _split_folder(layout: str, parent: Location, split: str) -> Location:
    """<parent>/<split>. The empty split is the parent itself, but not where that would mix train and test."""
    _need_folder(parent, f"layout {layout}")
    if not split and layout in ("camvid", "images"):
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
        case _:
            return [_plain_pair(entry.name) for entry in listing.image_entries]
    prefer = label_encoding or prefer
    if ending:
        ending += "_labelTrainIds" if prefer == TRAIN_IDS else "_labelIds"  # of a label that is not there
    stems = {_composed(_stem(entry.name)) for entry in listing.image_entries}
    look = None if listing.labels is None else partial(_may_hold_ids, listing.labels)
    labels = labels_of_frames(
        listing.label_entries, f"layout {layout}: labels", prefer=prefer, frames=stems, may_hold_ids=look
    )
    labels = {_composed(frame): entry for frame, entry in labels.items()}
    alike = {_composed(_stem(entry.name)): entry for entry in listing.label_entries}  # cam_color.png for cam_color.jpg
    pairs = []
    for image in listing.image_entries:
        frame = _stem(image.name).removesuffix(_CITYSCAPES_IMAGE) if ending else _stem(image.name)
        found = labels.get(_composed(frame)) or alike.get(_composed(_stem(image.name)))
        part = _composed(name_of(image.name).frame)
        if found is None and part not in stems:  # else it is the label of that other image
            found = labels.get(part)
        label = f"{frame}{ending}.png" if found is None else found.name
        encoding = label_encoding or named_encoding(label) or usual
        folder = frame.rpartition("/")[0] or None
        domain = folder if folder in DOMAINS else None
        if not ending:
            folder, domain = frame.partition("_")[0] if "_" in frame else None, None
        pairs.append(_Pair(image.name, frame, label, encoding, folder, domain))
    return pairs


def _composed(name: str) -> str:
    """Letters with their accents as one character: macOS takes them apart, and no listing shows the difference."""
    return unicodedata.normalize("NFC", name)


def _plain_pair(image: str) -> _Pair:
    return _Pair(image, _stem(image), None, None, image.rpartition("/")[0] or None, None)


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


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


# -- predictions and labels in two folders -----------------------------------------------------------------------------


class Pair(NamedTuple):
    """One frame: its prediction and its label."""

    prediction: Entry  # below the folder of predictions
    label: Entry  # below the folder of labels


class Unpaired(UserError):  # noqa: N818 (what is the case, not what went wrong)
    """Labels without prediction; `pairs` are the others."""

    def __init__(self, what: str, *, cure: str, pairs: list[Pair]) -> None:
        super().__init__(what, cure=cure)
        self.pairs = pairs


def pair_up(
    predictions_folder: Location,
    labels_folder: Location,
    say: Callable[[str], None] = _nobody,
    label_encoding: str | None = None,
) -> list[Pair]:
    """A pair for every frame that has a label below the folder of labels, in the order of their names.

    Suffix and endings such as `_leftImg8bit` are left out of the comparison; names that `predict` had to change are
    known. Predictions without label are not used, and `say` is told of them; nor are pictures for people, and
    predictions that lie among the labels or labels among them. Where one side has no folders, or one more above all,
    the rest of the names counts.
    Raises UserError: no folder, no label, names that fit more than once; Unpaired: a label without prediction.
    """
    places = {"predictions": predictions_folder, "labels": labels_folder}
    if gone := [
        UserError(f"{what}: there is no folder {folder.uri}", cure="check the path")
        for what, folder in places.items()
        if not folder.is_folder()
    ]:
        raise together(gone)
    files = _id_files(labels_folder, "labels", say, predictions_folder)
    in_labels = {_stem(entry.name) for entry in files}
    masks = _id_files(predictions_folder, "predictions", say, labels_folder, in_labels)
    labels = labels_of_frames(
        files,
        "labels",
        prefer=label_encoding or TRAIN_IDS,
        frames={_stem(entry.name) for entry in masks} & in_labels,  # called alike on both sides
        may_hold_ids=partial(_may_hold_ids, labels_folder),
        say=say,
    )
    predictions = labels_of_frames(
        [e for e in masks if not e.problem],
        "predictions",
        known=labels.keys(),
        may_hold_ids=partial(_may_hold_ids, predictions_folder),
        say=say,
    )
    broken = [f"{label.name} ({label.problem})" for label in labels.values() if label.problem]
    found = _matches(list(labels), predictions)
    missing = [key for key, label in labels.items() if key not in found and not label.problem]
    pairs = [Pair(predictions[found[key]], label) for key, label in labels.items() if key in found]
    if broken or missing:
        hints = [f"{labels[key].name}{_hint(key, labels, predictions)}" for key in missing[:MOST_NAMED]]
        shown = broken + hints + missing[MOST_NAMED:]
        free = sorted(predictions[key].name for key in predictions.keys() - set(found.values()))
        have = f"; predictions without label: {first_of(free)}" if free and missing else ""
        raise Unpaired(
            f"{len(shown)} of {len(labels)} labels in {labels_folder.uri} have no prediction in "
            f"{predictions_folder.uri}: {first_of(shown)}{have}",
            cure="name predictions, and the folders that they lie in like their labels (without "
            "endings such as _leftImg8bit); `nightseg predict` does so",
            pairs=[pair for pair in pairs if not pair.label.problem],
        )
    if unused := sorted(predictions[key].name for key in predictions.keys() - set(found.values())):
        say(f"{len(unused)} predictions have no label and are not scored: {first_of(unused)}")
        _tell_others(unused, labels_folder, say)
    return pairs


def _matches(labels: list[str], predictions: Mapping[str, Entry]) -> dict[str, str]:
    """Label -> prediction, by the first rule that finds one for every label; else what the plain ones find."""
    masks = [_mask(_composed(key)) for key in labels]
    exact, by_composed = {key: key for key in predictions}, {_composed(key): key for key in predictions}
    rules: list[tuple[Mapping[str, str], Callable[[str], str]]] = [
        (exact, _mask),
        (exact, str),
        (by_composed, lambda key: _mask(_composed(key))),
        (by_composed, _composed),
    ]
    if not any("/" in key for key in labels) or not any("/" in key for key in predictions):
        bare: dict[str, list[str]] = {}
        for key in by_composed:
            bare.setdefault(key.rpartition("/")[2], []).append(by_composed[key])
        by_name = {name: keys[0] for name, keys in bare.items() if len(keys) == 1}
        rules.append((by_name, lambda key: _mask(_composed(key)).rpartition("/")[2]))
        rules.append((by_name, lambda key: _composed(key).rpartition("/")[2]))
    first = f"/{masks[0]}"
    for above in {key.removesuffix(first[1:]) for key in by_composed if f"/{key}".endswith(first)} - {""}:
        below = {key.removeprefix(above): name for key, name in by_composed.items() if key.startswith(above)}
        rules.append((below, lambda key: _mask(_composed(key))))
    for above in {str(folder) + "/" for folder in list(PurePosixPath(masks[0]).parents)[:-1]}:
        if all(name.startswith(above) for name in masks):  # all labels lie one folder, or several, deeper
            rules.append((by_composed, partial(_below, above=above)))
    results = []
    for names, change in rules:
        found = {key: names[changed] for key in labels if (changed := change(key)) in names}
        if len(found) == len(labels) == len(set(found.values())):
            return found
        results.append(found)
    return max(results[:4], key=len)


def _below(key: str, above: str) -> str:
    return _mask(_composed(key)).removeprefix(above)


def _mask(key: str) -> str:
    """What `predict` calls the mask of a frame, without suffix."""
    return file_name(key, ".png").removesuffix(".png")


def _hint(key: str, labels: Mapping[str, Entry], predictions: Mapping[str, Entry]) -> str:
    """What there is instead."""
    name = PurePosixPath(key).name
    if sum(PurePosixPath(other).name == name for other in labels) > 1:
        return " (the name occurs more than once)"
    near = [entry.name for other, entry in predictions.items() if PurePosixPath(other).name == name]
    return f" (there is {near[0]})" if near else ""


def _id_files(
    folder: Location, what: str, say: Callable[[str], None], other: Location, frames: Collection[str] = ()
) -> list[Entry]:
    """The files below a folder that may hold ids, but not below the `other` one, if that lies in it."""
    others = f"{other.uri.removeprefix(folder.uri).lstrip('/')}/" if other.uri.startswith(f"{folder.uri}/") else None
    entries = files_below(folder, LABEL_SUFFIXES, say=say, predictions=what == "predictions", frames=frames)
    found = [entry for entry in entries if others is None or not entry.name.startswith(others)]
    if not found:
        pictures = files_below(folder, SUFFIXES)
        seen = (
            f"; {len(pictures)} others cannot hold ids: {first_of([one.name for one in pictures])}" if pictures else ""
        )
        raise UserError(
            f"{what}: there is no PNG below {folder.uri}, and none of {', '.join(LABEL_SUFFIXES)}{seen}",
            cure="check the folder; ids lie in files of one byte a pixel, never in JPEG, which changes them",
        )
    return found


def _may_hold_ids(folder: Location, entry: Entry) -> bool:
    try:
        return bool(entry.problem) or may_be_label(read_bytes(folder / entry.name))
    except BadFrame:
        return True  # whoever reads it tells what is wrong


def _tell_others(predictions: Sequence[str], folder: Location, say: Callable[[str], None]) -> None:
    """Files of other types that are called like predictions without label: perhaps their labels."""
    wanted = {_composed(name_of(name).frame) for name in predictions}
    found = [
        entry.name
        for entry in files_below(folder, ("",))
        if not entry.name.lower().endswith(LABEL_SUFFIXES) and _composed(name_of(entry.name).frame) in wanted
    ]
    if found:
        say(
            f"warning: {len(found)} files are called like these and are no labels by their type ({first_of(found)}); "
            f"labels are {', '.join(LABEL_SUFFIXES)}"
        )
