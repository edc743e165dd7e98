"""What the types cannot see: unknown names, cycles, missing folders and labels, settings that contradict each other.

Works on the raw mapping and skips whatever has the wrong shape, which the types report themselves: so a misspelt key
does not hide an unknown name or a cycle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, NamedTuple

from pydantic import ValidationError

from nightseg.data.class_list import mapped, taxonomy
from nightseg.data.layouts import PLACES, check_folders
from nightseg.data.settings import ClassList, FolderDataset
from nightseg.data.taxonomy import COLORS, Taxonomy
from nightseg.errors import UserError, closest
from nightseg.recipe.types import STARTS, Recipe, is_ready
from nightseg.selection.settings import METHODS
from nightseg.storage import Location
from nightseg.translators.settings import LitClasses

Key = tuple[str, ...]
Entries = dict[str, Mapping[str, Any]]

# Which keys of a section's entries name something else, and in which section that is.
_NAMES: Mapping[str, Mapping[str, str]] = {
    "datasets": {"translate": "datasets", "by": "translators", "join": "datasets", "split": "datasets"},
    "translators": {"day": "datasets", "night": "datasets"},
    "models": {"train": "datasets", "validate_on": "datasets"},
    "predictions": {"dataset": "datasets", "model": "models"},
    "translations": {"segmenter": "models", "real": "datasets"},
}


class Problem(NamedTuple):
    """One thing that is wrong, at a dotted path."""

    path: Key
    message: str
    line: str = ""


class Reference(NamedTuple):
    """`owner` cannot be made before the thing of `section` that `name` names."""

    owner: Key
    path: Key
    section: str
    name: str


class _Sections:
    """The named things of a raw recipe; an entry that is no mapping is an empty one."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        def entries(section: str) -> Entries:
            part = _mapping(data, section)
            return {name: _mapping(part, name) for name in part}

        self.datasets, self.translators, self.models = map(entries, ("datasets", "translators", "models"))
        self.predictions, self.translations = entries("predictions"), entries("translations")
        self.consistency, self.claims = _mapping(data, "consistency"), entries("claims")
        self.roots = _mapping(data, "roots")
        self.test_sets = _mapping(data, "test_sets")  # name -> name of a dataset


def recipe_problems(data: Mapping[str, Any], elsewhere: bool = False) -> list[Problem]:
    """Everything that is wrong with the names and folders of a recipe; `elsewhere`: folders are not of this machine."""
    sections = _Sections(data)
    references = list(_references(sections))
    return [
        *_unknown(sections, references),
        *_cycles(references),
        *_contradictions(sections),
        *_nothing_to_choose_by(data, sections),
        *_missing_seeds(data, sections),
        *_missing_directions(sections),
        *_not_fresh(sections),
        *_twice(sections),
        *_unfit_translations(sections),
        *_unlabelled(sections),
        *_taxonomy_problems(data, sections),
        *(() if elsewhere else _missing_models(sections)),
        *(() if elsewhere else _missing_folders(sections)),
    ]


# -- names -----------------------------------------------------------------------------------------------------------


def _references(sections: _Sections) -> Iterator[Reference]:
    for section, keys in _NAMES.items():
        for name, entry in getattr(sections, section).items():
            # `split` of a folder is a part of it on disk, not the name of a pool
            own = {key: kind for key, kind in keys.items() if key != "split" or "layout" not in entry}
            yield from _named((section, name), (section, name), entry, own)
    for name, entry in sections.models.items():
        owner, learning = ("models", name), _mapping(entry, "self_training")
        if isinstance(entry.get("start"), str) and not is_ready(entry["start"]):
            yield Reference(owner, (*owner, "start"), "models", entry["start"])
        inside = (*owner, "self_training")
        yield from _named(owner, (*owner, "adapt_norms"), _mapping(entry, "adapt_norms"), {"pool": "datasets"})
        yield from _named(owner, inside, learning, {"pool": "datasets", "teacher": "models"})
        yield from _named(owner, (*inside, "select"), _mapping(learning, "select"), {"reference": "datasets"})
        for test in _mapping(entry, "test"):
            yield Reference(("evaluations", name), (*owner, "test", test), "test_sets", test)
    for name, dataset in sections.test_sets.items():
        if isinstance(dataset, str):
            yield Reference(("test_sets", name), ("test_sets", name), "datasets", dataset)
    yield from _named(("consistency",), ("consistency",), sections.consistency, {"dataset": "datasets"})
    for name, entry in sections.claims.items():
        path = ("claims", name)
        yield from _named(path, path, entry, {"test": "test_sets"})
        for index, pair in enumerate(_list(entry.get("pairs"))):
            yield from _named(path, (*path, "pairs"), {str(index): pair}, {str(index): "models"})
    for name in sections.translations:
        yield Reference(("translations", name), ("translations", name), "datasets", name)


def _named(owner: Key, path: Key, entry: Mapping[str, Any], keys: Mapping[str, str]) -> Iterator[Reference]:
    for key, section in keys.items():
        value = entry.get(key)
        if isinstance(value, str):
            yield Reference(owner, (*path, key), section, value)
        for index, item in enumerate(_names(value)):
            if isinstance(item, str):
                place = item if isinstance(value, Mapping) else str(index)
                yield Reference(owner, (*path, key, place), section, item)


def _unknown(sections: _Sections, references: list[Reference]) -> Iterator[Problem]:
    for _, path, section, name in references:
        known = sorted(getattr(sections, section))
        if name not in known:
            offered = [*STARTS, *known] if path[-1] == "start" else known
            kind, listed = section.replace("_", " ").rstrip("s"), ", ".join(offered) or "none"
            yield Problem(path, f"there is no {kind} {name!r}{closest(name, offered)}; known: {listed}")


def _cycles(references: list[Reference]) -> Iterator[Problem]:
    needs: dict[Key, dict[Key, None]] = {}
    for reference in references:
        needs.setdefault(reference.owner, {})[reference.section, reference.name] = None
    order = list(needs)
    while True:  # graphlib names one cycle; the next one shows once this one is cut
        try:
            TopologicalSorter(needs).prepare()
        except CycleError as error:
            loop: list[Key] = error.args[1][:0:-1]  # each needs the next
            first = min(range(len(loop)), key=lambda index: order.index(loop[index]))
            loop = [*loop[first:], *loop[: first + 1]]
            shown = " needs ".join(f"{section[:-1]} {name}" for section, name in loop)
            yield Problem(loop[0], f"a cycle, so none of them can be made first: {shown}")
            del needs[loop[0]][loop[1]]
        else:
            return


# -- what goes together ----------------------------------------------------------------------------------------------


def _contradictions(sections: _Sections) -> Iterator[Problem]:
    for name, entry in sections.models.items():
        path, learning = ("models", name), entry.get("self_training")
        if not isinstance(learning, Mapping):
            if entry.get("rounds", 1) != 1:
                yield Problem((*path, "rounds"), "rounds repeat a self-training, and this model has none")
            continue
        start, select = entry.get("start", "imagenet"), _mapping(learning, "select")
        is_offline = learning.get("mode", "offline") == "offline"
        if is_offline and isinstance(start, str) and is_ready(start) and not learning.get("teacher"):
            message = f"starting from {start} needs a teacher: the model that labels the pool"
            yield Problem((*path, "self_training"), message)
        method = METHODS.get(str(select.get("method", "fid-subset")))
        if not select or select.get("reference") or method is None or not method.needs_reference:
            continue
        if not any("translate" in _mapping(sections.datasets, item) for item in _names(entry.get("train"))):
            message = (
                "no train set of this model is translated, so say which dataset the chosen frames should be close to"
            )
            yield Problem((*path, "self_training", "select", "reference"), message)


def _nothing_to_choose_by(data: Mapping[str, Any], sections: _Sections) -> Iterator[Problem]:
    """Models that shall keep their best weights, and have no frames to tell which these are."""
    for name, entry in sections.models.items():
        own = _mapping(entry, "training")
        keep = own.get("keep", _mapping(data, "training").get("keep"))
        if keep == "best" and not entry.get("validate_on") and not entry.get("adapt_norms"):
            path: Key = ("models", name, "training", "keep") if "keep" in own else ("training", "keep")
            message = f"{name} shall keep the weights of its best validation, and validates on nothing"
            yield Problem(path, f"{message}; set models.{name}.validate_on, or keep: last")


def _missing_seeds(data: Mapping[str, Any], sections: _Sections) -> Iterator[Problem]:
    """Models that cannot tell which of several trainings of another model they start from or are taught by."""

    def seeds(model: str) -> list[Any]:
        return _list(sections.models[model].get("seeds")) or _list(data.get("seeds")) or [0]

    for name, entry in sections.models.items():
        before = {"starts from": entry.get("start"), "is taught by": _mapping(entry, "self_training").get("teacher")}
        for how, other in before.items():
            known = seeds(other) if isinstance(other, str) and other in sections.models else []
            missing = [seed for seed in seeds(name) if seed not in known]
            if len(known) > 1 and missing:
                listed, without = ", ".join(map(str, known)), ", ".join(map(str, missing))
                message = f"{name} {how} {other}, which is trained with the seeds {listed} and not with {without}"
                yield Problem(("models", name, "seeds"), f"{message}: add it there, or take seeds of these")


def _missing_directions(sections: _Sections) -> Iterator[Problem]:
    """Datasets whose translator cannot go where they ask it to go."""
    for name, entry in sections.datasets.items():
        by, to = entry.get("by"), entry.get("to", "night")
        settings = _mapping(sections.translators, by)
        if "translate" in entry and to in ("day", "night") and settings and (why := way_missing(settings, to)):
            yield Problem(("datasets", name, "to"), f"the translator {by} has no way to {to}: {why}")


def _not_fresh(sections: _Sections) -> Iterator[Problem]:
    """Datasets that shall be translated anew with every sample, and cannot be."""
    fresh = {name: entry for name, entry in sections.datasets.items() if entry.get("fresh") is True}
    for name, entry in fresh.items():
        kind = _mapping(sections.translators, entry.get("by")).get("kind", "unit")
        if entry.get("by") in sections.translators and kind != "photometric":
            yield Problem(
                ("datasets", name, "fresh"), f"a translator of the kind {kind} translates beforehand, not anew"
            )
        elif "translate" in _mapping(sections.datasets, entry.get("translate")):
            yield Problem(
                ("datasets", name, "translate"), "what is translated anew with every sample starts from frames"
            )
    for name, entry in sections.datasets.items():
        for index, part in enumerate(_list(entry.get("join"))):
            if part in fresh:
                message = f"{part} is translated anew where a model trains on it: name it in `train` beside {name}"
                yield Problem(("datasets", name, "join", str(index)), message)
        if "layout" not in entry and isinstance(entry.get("split"), str) and entry["split"] in fresh:
            message = f"{entry['split']} is translated anew where a model trains on it: it has no frames to split"
            yield Problem(("datasets", name, "split"), message)


def _twice(sections: _Sections) -> Iterator[Problem]:
    """A dataset named twice would be one part of the training set, not two."""
    for name, entry in sections.models.items():
        listed = _list(entry.get("train"))
        for dataset in dict.fromkeys(part for part in listed if isinstance(part, str) and listed.count(part) > 1):
            message = (
                f"{dataset} is named {listed.count(dataset)} times; give weights instead: {{{dataset}: 2, ...: 1}}"
            )
            yield Problem(("models", name, "train"), message)


def way_missing(settings: Mapping[str, Any], to: str) -> str:
    """Why a translator of these raw settings cannot translate to a domain; nothing if it can."""
    match settings.get("kind", "unit"):
        case "photometric" if to == "day":
            return "optics make night of day, and not the other way round"
        case "fourier" | "colour" if not settings.get(to):
            return f"it lacks style images of that domain; add `{to}: DATASET` to it"
        case "command" if to not in _list(settings.get("to", ["night"])):
            return f"if the program can do it, add {to} to its list `to`"
    return ""


def _unfit_translations(sections: _Sections) -> Iterator[Problem]:
    """Measurements of what is not translated, without real frames, or by a segmenter that learned from translations."""
    for name, settings in sections.translations.items():
        dataset, path = sections.datasets.get(name), ("translations", name)
        if not dataset:
            continue
        if "translate" not in dataset:
            yield Problem(path, f"{name} is no translated dataset, so there is nothing to measure")
            continue
        translator, to = _mapping(sections.translators, dataset.get("by")), dataset.get("to", "night")
        if not settings.get("real") and translator and not translator.get(to):
            yield Problem((*path, "real"), f"the translator has no {to} frames to compare with: say `real: DATASET`")
        segmenter = settings.get("segmenter") or next(iter(sections.models), None)
        if segmenter is None:
            message = "the recipe has no model to measure with; train one on day frames"
            yield Problem((*path, "segmenter"), message)
        elif learned := _translated_teacher(sections, segmenter, ()):
            message = f"{segmenter} learned from translated frames ({learned}), so it cannot measure them"
            cure = "name one that never saw any, such as a model of day frames only"
            yield Problem((*path, "segmenter"), f"{message}; {cure}")


def _translated_teacher(sections: _Sections, model: Any, trail: tuple[str, ...]) -> str | None:
    """The first translated dataset that a model, or one it starts from or is taught by, was trained on."""
    entry = _mapping(sections.models, model)
    if model in trail or not entry:
        return None
    learned = (_first(sections, name, lambda found: "translate" in found) for name in _names(entry.get("train")))
    before = (entry.get("start"), _mapping(entry, "self_training").get("teacher"))
    inherited = (_translated_teacher(sections, name, (*trail, model)) for name in before)
    return next((name for found in (learned, inherited) for name in found if name), None)


def _unlabelled(sections: _Sections) -> Iterator[Problem]:
    """Learning and testing need labels. Found here, it costs nothing; in the stage, all that runs before it."""
    uses: list[tuple[Key, Any]] = [
        (("models", model, key, str(dataset) if isinstance(entry.get(key), Mapping) else str(index)), dataset)
        for model, entry in sections.models.items()
        for key in ("train", "validate_on")
        for index, dataset in enumerate(_names(entry.get(key)))
    ]
    uses += [(("test_sets", test), dataset) for test, dataset in sections.test_sets.items()]
    for path, dataset in uses:
        if bare := _first(sections, dataset, _has_no_labels):
            whose = "" if bare == dataset else f" (its frames come from {bare})"
            cure = "a model learns from frames without labels through self_training.pool, and shows them by predictions"
            yield Problem(path, f"the frames of {dataset} have no labels{whose}; {cure}")


def _has_no_labels(dataset: Mapping[str, Any]) -> bool:
    return "layout" in dataset and (dataset.get("labelled") is False or dataset["layout"] in ("images", "nexet"))


def _first(
    sections: _Sections, name: Any, fits: Callable[[Mapping[str, Any]], bool], trail: tuple[str, ...] = ()
) -> str | None:
    """The dataset itself, or the first one that its frames come from, that fits."""
    entry = _mapping(sections.datasets, name)
    if name in trail or not entry:
        return None
    if fits(entry):
        return str(name)
    if "layout" in entry:
        return None
    sources = [*_list(entry.get("join")), entry.get("translate"), entry.get("split")]
    found = (_first(sections, source, fits, (*trail, name)) for source in sources)
    return next((part for part in found if part), None)


# -- classes ---------------------------------------------------------------------------------------------------------


def _taxonomy_problems(data: Mapping[str, Any], sections: _Sections) -> Iterator[Problem]:
    classes = None
    given = data.get("taxonomy", Recipe.model_fields["taxonomy"].default)
    try:
        classes = _class_list(given)
    except (UserError, OSError) as error:
        yield Problem(("taxonomy",), str(error))
    for dataset, entry in sections.datasets.items():
        path: Key = ("datasets", dataset)
        try:
            own = _class_list(entry.get("taxonomy"))
        except (UserError, OSError) as error:
            yield Problem((*path, "taxonomy"), str(error))
            continue
        if own is not None and classes is not None:
            names = {str(key): name for key, name in _mapping(entry, "map").items() if isinstance(name, str | None)}
            try:
                mapped(
                    entry["taxonomy"] if isinstance(entry["taxonomy"], str) else _listed(entry["taxonomy"]),
                    names,
                    classes,
                )
            except UserError as error:
                yield Problem((*path, "map"), str(error))
        read_by, encoding = (own if "taxonomy" in entry else classes), entry.get("label_encoding")
        if read_by is not None and isinstance(encoding, str) and encoding not in (*read_by.encodings, COLORS):
            words = [*read_by.encodings, COLORS]
            hint = closest(encoding, words)
            message = f"the taxonomy {read_by.name} has no label encoding {encoding!r}{hint}; known: {', '.join(words)}"
            yield Problem((*path, "label_encoding"), message)
    if classes is None:
        return
    yield from _unknown_classes(sections, classes)
    for model, entry in sections.models.items():
        where: Key = ("models", model, "self_training", "never_below")
        for name, others in _mapping(_mapping(entry, "self_training"), "never_below").items():
            for wrong in (one for one in (name, *_list(others)) if one not in classes.classes):
                hint, known = closest(str(wrong), classes.classes), ", ".join(classes.classes)
                yield Problem((*where, name), f"{classes.name} has no class {wrong!r}{hint}; known: {known}")
            if name in _list(others):
                yield Problem(
                    (*where, name), f"{name} has pixels of itself above it everywhere: leave it out of its own"
                )
    owners: list[tuple[Key, Mapping[str, Any]]] = [((), data)]
    owners += [(("models", name), entry) for name, entry in sections.models.items()]
    for path, owner in owners:
        weights = _mapping(owner, "loss").get("class_weights")
        try:
            if isinstance(weights, Mapping):
                classes.per_class({str(name): 1.0 for name in weights}, 1.0)
            elif isinstance(weights, list):
                classes.per_class([1.0 for _ in weights], 1.0)
        except UserError as error:
            yield Problem((*path, "loss", "class_weights"), str(error))


def _listed(value: Any) -> ClassList:
    return ClassList.model_validate_json(json.dumps(value))


def _class_list(value: Any) -> Taxonomy | None:
    """The class list that is meant; None for what has the wrong shape. Raises UserError: it contradicts itself."""
    if isinstance(value, str):
        return taxonomy(value)
    try:
        return taxonomy(_listed(value)) if isinstance(value, dict) else None
    except (ValidationError, TypeError):
        return None  # the types say so


def _unknown_classes(sections: _Sections, classes: Taxonomy) -> Iterator[Problem]:
    """Classes that a translator is told to light and that the taxonomy lacks."""
    for translator, entry in sections.translators.items():
        for role, names in _mapping(entry, "classes").items():
            usual = LitClasses.model_fields.get(role)
            if usual is not None and names == usual.default:  # a saved recipe holds them; no taxonomy has them all
                continue
            for index, name in enumerate(_list(names)):
                if name not in classes.classes:
                    hint, known = closest(str(name), classes.classes), ", ".join(classes.classes)
                    path = ("translators", translator, "classes", role, str(index))
                    yield Problem(path, f"{classes.name} has no class {name!r}{hint}; known: {known}")


# -- files -----------------------------------------------------------------------------------------------------------


def _missing_models(sections: _Sections) -> Iterator[Problem]:
    for name, entry in sections.models.items():
        start = entry.get("start")
        if not isinstance(start, str) or "/" not in start:
            continue
        if not all((Location.of(start) / file).exists() for file in ("model.json", "model.safetensors")):
            yield Problem(
                ("models", name, "start"),
                f"there is no model folder {start!r} (it would hold a model.json and a model.safetensors); to start "
                "from a model of this recipe, give its name",
            )


def _missing_folders(sections: _Sections) -> Iterator[Problem]:
    """A folder that is not there is told once, of its first dataset, with what should lie in it."""
    missing: dict[tuple[str, Any], list[str]] = {}
    for name, entry in sections.datasets.items():
        path, root = ("datasets", name, "root"), entry.get("root")
        if not isinstance(root, str) or "{" in root:
            continue
        try:
            if not Location.of(root).is_folder():
                missing.setdefault((root, str(entry.get("layout"))), []).append(name)
                continue
            keys = ("layout", "split", "labelled", "images", "labels", "split_list")
            known = {key: value for key, value in entry.items() if key in keys}
            check_folders(FolderDataset(root=root, **known))
        except UserError as error:
            yield Problem((*path[:-1], _key_at_fault(error)), str(error))
        except ValidationError:
            continue  # the types say so
        except OSError as error:
            yield Problem(path, f"cannot look into {root!r}: {error.strerror or error}")
    for (root, layout), (first, *others) in missing.items():
        path = ("datasets", first, "root")
        wanted = _wanted(layout, any(sections.datasets[name].get("labelled", True) for name in (first, *others)))
        also = f"; {', '.join(others)} {'lie' if len(others) > 1 else 'lies'} there, too" if others else ""
        cure = f"set {_key_of(root, sections.roots, path)}"
        yield Problem(path, f"there is no folder {root!r}; {cure}{f' ({wanted}{also})' if wanted else also}")


def _wanted(layout: str, labelled: bool) -> str:
    """What a folder of this layout holds; "" for what is no layout, which the types say."""
    images, labels = PLACES.get(layout, ("", ""))
    in_words = f"layout {layout}: images {images}" if images else ""
    return in_words + (f", labels {labels}" if labels and labelled else "")


def _key_of(root: str, roots: Mapping[str, Any], path: tuple[str, ...]) -> str:
    """The key that moves the folder: that of `roots` which it was made of, if one was."""
    used = [name for name, part in roots.items() if isinstance(part, str) and part and part in root]
    return f"roots.{used[0]}" if used else ".".join(path)


def _key_at_fault(error: UserError) -> str:
    """Of a dataset in folders, by what the layout says of it."""
    found = re.match(r"(?:layout pairs: )?(images|labels|split_list)\b", error.what)
    return found[1] if found else "split" if " split " in error.what.partition(";")[0] else "root"


# -- raw mappings ----------------------------------------------------------------------------------------------------


def _mapping(entries: Mapping[str, Any], name: Any) -> dict[str, Any]:
    entry = entries.get(name) if isinstance(name, str) else None
    return {str(key): value for key, value in entry.items()} if isinstance(entry, Mapping) else {}


def _names(value: Any) -> list[Any]:
    """The items of a list, the keys of a mapping."""
    return list(value) if isinstance(value, list | Mapping) else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
