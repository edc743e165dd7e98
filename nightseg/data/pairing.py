"""Predictions and labels in two folders: which prediction is of the frame that a label is of, by their names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import NamedTuple

from nightseg.data.images import LABEL_SUFFIXES, SUFFIXES
from nightseg.data.label_names import affixes, composed, labels_of_frames, name_of, stem
from nightseg.data.layouts import may_hold_ids
from nightseg.data.listing import files_below
from nightseg.data.table import file_name
from nightseg.data.taxonomy import COLORS, TRAIN_IDS
from nightseg.errors import MOST_NAMED, first_of, together
from nightseg.storage import Entry, Location, UserError


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
    say: Callable[[str], None] = lambda note: None,
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
    in_labels = {stem(entry.name) for entry in files}
    masks = _id_files(predictions_folder, "predictions", say, labels_folder, in_labels)
    labels = labels_of_frames(
        files,
        "labels",
        prefer=label_encoding or TRAIN_IDS,
        frames={stem(entry.name) for entry in masks} & in_labels,  # called alike on both sides
        may_hold_ids=None if label_encoding == COLORS else partial(may_hold_ids, labels_folder),
        say=say,
    )
    predictions = labels_of_frames(
        [e for e in masks if not e.problem],
        "predictions",
        known=labels.keys(),
        may_hold_ids=partial(may_hold_ids, predictions_folder),
        say=say,
    )
    broken = [f"{label.name} ({label.problem})" for label in labels.values() if label.problem]
    found = _matches(list(labels), predictions) or _without_affixes(list(labels), predictions, say)
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
    masks = [_mask(composed(key)) for key in labels]
    exact, by_composed = {key: key for key in predictions}, {composed(key): key for key in predictions}
    rules: list[tuple[Mapping[str, str], Callable[[str], str]]] = [
        (exact, _mask),
        (exact, str),
        (by_composed, lambda key: _mask(composed(key))),
        (by_composed, composed),
    ]
    if not any("/" in key for key in labels) or not any("/" in key for key in predictions):
        bare: dict[str, list[str]] = {}
        for key in by_composed:
            bare.setdefault(key.rpartition("/")[2], []).append(by_composed[key])
        by_name = {name: keys[0] for name, keys in bare.items() if len(keys) == 1}
        rules.append((by_name, lambda key: _mask(composed(key)).rpartition("/")[2]))
        rules.append((by_name, lambda key: composed(key).rpartition("/")[2]))
    first = f"/{masks[0]}"
    for above in {key.removesuffix(first[1:]) for key in by_composed if f"/{key}".endswith(first)} - {""}:
        below = {key.removeprefix(above): name for key, name in by_composed.items() if key.startswith(above)}
        rules.append((below, lambda key: _mask(composed(key))))
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


def _without_affixes(labels: list[str], predictions: Mapping[str, Entry], say: Callable[[str], None]) -> dict[str, str]:
    """Where no name is alike: what all names of one side begin or end with, and those of the other do not, is left out,
    such as `x_seg.png` beside `x.png`. Nothing if that does not give every label its prediction."""
    own, other = (affixes([PurePosixPath(key).name for key in keys]) for keys in (labels, list(predictions)))
    (start, end), (first, last) = (
        tuple("" if one == two else one for one, two in zip(*pair, strict=True))
        for pair in ((own, other), (other, own))
    )
    by_name = {_bare(key, first, last): key for key in predictions}
    found = {key: by_name[bare] for key in labels if (bare := _bare(key, start, end)) in by_name}
    if not len(found) == len(labels) == len(set(found.values())):
        return {}
    for what, pair in (("labels", (start, end)), ("predictions", (first, last))):
        if any(pair):
            say(f"{what} are called {pair[0]}NAME{pair[1]}: compared by NAME")
    return found


def _bare(key: str, start: str, end: str) -> str:
    folder, slash, name = key.rpartition("/")
    return f"{folder}{slash}{name.removeprefix(start).removesuffix(end)}"


def _below(key: str, above: str) -> str:
    return _mask(composed(key)).removeprefix(above)


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


def _tell_others(predictions: Sequence[str], folder: Location, say: Callable[[str], None]) -> None:
    """Files of other types that are called like predictions without label: perhaps their labels."""
    wanted = {composed(name_of(name).frame) for name in predictions}
    found = [
        entry.name
        for entry in files_below(folder, ("",))
        if not entry.name.lower().endswith(LABEL_SUFFIXES) and composed(name_of(entry.name).frame) in wanted
    ]
    if found:
        say(
            f"warning: {len(found)} files are called like these and are no labels by their type ({first_of(found)}); "
            f"labels are {', '.join(LABEL_SUFFIXES)}"
        )
