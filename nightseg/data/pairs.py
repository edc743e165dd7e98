"""Predictions and labels that lie in two folders: which file belongs to which, by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from nightseg.storage import Entry, Location, UserError

# What data sets append to a frame's name, so that a.png, a_leftImg8bit.png and a_gtFine_labelIds.png are one frame.
NAME_ENDINGS = ("_leftImg8bit", "_rgb_anon", "_labelTrainIds", "_labelIds", "_gtFine", "_gtCoarse", "_gt")
_NOT_LABELS = ("_color", "_instanceIds", "_instanceTrainIds", "_polygons", "_invGray")
_MAX_LISTED = 5


class Pair(NamedTuple):
    """One frame: its prediction and its label."""

    prediction: Entry  # below the folder of predictions
    label: Entry  # below the folder of labels


def pair_up(predictions_folder: Location, labels_folder: Location, skip: Sequence[str] = ()) -> list[Pair]:
    """A pair for every PNG below the folder of labels, in the order of their names.

    Suffix and the endings of the Cityscapes family are left out of the comparison; folders of predictions in `skip`
    (pictures to look at) are not searched, and predictions without label are not used.
    Raises UserError: no folder, no label, a label without prediction, names that fit more than once.
    """
    predictions = _label_files(predictions_folder, "predictions", skip)
    labels = _label_files(labels_folder, "labels")
    by_name = _by_name(predictions)
    is_alone = {name for name, keys in _by_name(labels).items() if len(keys) == 1}
    pairs, missing = [], []
    for key, label in labels.items():
        name = PurePosixPath(key).name
        # The same place below both folders; else the same file name, where no other frame has it.
        found = [key] if key in predictions else by_name.get(name, [])
        if len(found) == 1 and (key in predictions or name in is_alone):
            pairs.append(Pair(predictions[found[0]], label))
        else:
            missing.append(f"{label.name} (the name occurs more than once)" if found else label.name)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(labels)} labels in {labels_folder.uri} have no prediction in "
            f"{predictions_folder.uri}: {first_of(missing)}. A prediction is a PNG with the label's name "
            f"(without endings such as {NAME_ENDINGS[0]}); `nightseg predict` writes them so"
        )
    return pairs


def first_of(names: Sequence[str]) -> str:
    """The first names of a list that may be long, in words."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


def _by_name(keys: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key in keys:
        found.setdefault(PurePosixPath(key).name, []).append(key)
    return found


def _label_files(folder: Location, what: str, skip: Sequence[str] = ()) -> dict[str, Entry]:
    """Key of the frame -> file, for the PNG files below a folder, but not below its folders in `skip`."""
    if not folder.is_folder():
        raise UserError(f"{what}: there is no folder {folder.uri}")
    files: dict[str, Entry] = {}
    for entry in folder.list(recursive=True):
        path = PurePosixPath(entry.name)
        hidden = any(part.startswith(".") for part in path.parts)
        skipped = hidden or path.stem.endswith(_NOT_LABELS) or (len(path.parts) > 1 and path.parts[0] in skip)
        if entry.is_folder or skipped or path.suffix.lower() != ".png":
            continue
        key = _key(path)
        # Both kinds of Cityscapes label may be there: the train ids need no map, so they win.
        if key not in files or path.stem.endswith("_labelTrainIds"):
            files[key] = entry
        elif not PurePosixPath(files[key].name).stem.endswith("_labelTrainIds"):
            raise UserError(f"{what}: {files[key].name} and {entry.name} in {folder.uri} are the same frame by name")
    if not files:
        raise UserError(f"{what}: there is no PNG below {folder.uri}")
    return files


def _key(path: PurePosixPath) -> str:
    stem = path.stem
    while stem.endswith(NAME_ENDINGS):
        stem = next(stem.removesuffix(ending) for ending in NAME_ENDINGS if stem.endswith(ending))
    return str(path.with_name(stem)) if stem else str(path.with_suffix(""))
