"""What a recipe names: unknown names, cycles, missing folders and labels, settings that contradict each other.

Works on the raw mapping and skips whatever has the wrong shape: the types (`config/`) report that themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from nightseg.data.layouts import FOLDER_LAYOUTS, check_folders
from nightseg.data.taxonomy import Taxonomy, taxonomy
from nightseg.errors import UserError, closest
from nightseg.recipe.types import Recipe
from nightseg.selection.settings import METHODS
from nightseg.storage import Location
from nightseg.translators.settings import LitClasses

STARTS = ("imagenet", "scratch")
Key = tuple[str, str]  # section, name


def is_ready(start: str) -> bool:
    """Whether what a model starts from is there already: one of STARTS, or a model folder, known by its slash."""
    return start in STARTS or "/" in start


class Problem(NamedTuple):
    """One thing that is wrong, at a dotted path."""

    path: tuple[str, ...]
    message: str
    line: str = ""


class Reference(NamedTuple):
    """`owner` cannot be made before the thing of `section` that `name` names."""

    owner: Key
    path: tuple[str, ...]
    section: str
    name: str


def graph_problems(data: Mapping[str, Any]) -> list[Problem]:
    """All problems of the graph, in the order of the recipe."""
    references = list(_references(data))
    problems = [problem for reference in references if (problem := _unknown(data, reference))]
    problems += _cycles(references)
    problems += _contradictions(data)
    problems += _no_way(data)
    problems += _unmeasurable(data)
    problems += _unlabelled(data)
    problems += _bad_taxonomy(data)
    problems += _missing_starts(data)
    problems += _missing_folders(data)
    return problems


def _section(data: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = data.get(name)
    return {str(key): entry for key, entry in value.items()} if isinstance(value, Mapping) else {}


def _references(data: Mapping[str, Any]) -> Iterator[Reference]:
    for name, entry in _section(data, "datasets").items():
        yield from _named(("datasets", name), entry, {"translate": "datasets", "by": "translators", "join": "datasets"})
        if isinstance(entry, Mapping) and "layout" not in entry:
            yield from _named(("datasets", name), entry, {"split": "datasets"})
    for name, entry in _section(data, "translators").items():
        yield from _named(("translators", name), entry, {"day": "datasets", "night": "datasets"})
    for name, entry in _section(data, "models").items():
        owner = ("models", name)
        yield from _named(owner, entry, {"train": "datasets", "validate_on": "datasets"})
        if not isinstance(entry, Mapping):
            continue
        if isinstance(entry.get("start"), str) and not is_ready(entry["start"]):
            yield Reference(owner, (*owner, "start"), "models", entry["start"])
        learning = entry.get("self_training")
        if isinstance(learning, Mapping):
            yield from _named(owner, learning, {"pool": "datasets", "teacher": "models"}, "self_training")
            yield from _named(owner, learning.get("select"), {"reference": "datasets"}, "self_training", "select")
        if isinstance(entry.get("test"), Mapping):
            for test in entry["test"]:
                yield Reference(("evaluations", name), (*owner, "test", str(test)), "test_sets", str(test))
    for name, entry in _section(data, "test_sets").items():
        if isinstance(entry, str):
            yield Reference(("test_sets", name), ("test_sets", name), "datasets", entry)
    for name, entry in _section(data, "predictions").items():
        yield from _named(("predictions", name), entry, {"dataset": "datasets", "model": "models"})
    for name, entry in _section(data, "translations").items():
        yield Reference(("translations", name), ("translations", name), "datasets", name)
        yield from _named(("translations", name), entry, {"segmenter": "models", "real": "datasets"})


def _named(owner: Key, entry: Any, keys: Mapping[str, str], *inside: str) -> Iterator[Reference]:
    if not isinstance(entry, Mapping):
        return
    for key, section in keys.items():
        value = entry.get(key)
        path = (*owner, *inside, key)
        if isinstance(value, str):
            yield Reference(owner, path, section, value)
        elif isinstance(value, list):
            yield from (
                Reference(owner, (*path, str(index)), section, item)
                for index, item in enumerate(value)
                if isinstance(item, str)
            )


def _unknown(data: Mapping[str, Any], reference: Reference) -> Problem | None:
    known = sorted(_section(data, reference.section))
    if reference.name in known:
        return None
    offered = [*STARTS, *known] if reference.path[-1] == "start" else known
    kind = reference.section.replace("_", " ").rstrip("s")
    hint = closest(reference.name, offered)
    return Problem(
        reference.path, f"there is no {kind} {reference.name!r}{hint}; known: {', '.join(offered) or 'none'}"
    )


def _cycles(references: list[Reference]) -> list[Problem]:
    needs: dict[Key, list[Reference]] = {}
    for reference in references:
        needs.setdefault(reference.owner, []).append(reference)
    finished: set[Key] = set()
    problems: list[Problem] = []

    def visit(key: Key, trail: list[Key]) -> None:
        if key in finished:
            return
        if key in trail:
            loop = [*trail[trail.index(key) :], key]
            shown = " needs ".join(f"{section[:-1]} {name}" for section, name in loop)
            problems.append(Problem(key, f"a cycle, so none of them can be made first: {shown}"))
            return
        for reference in needs.get(key, []):
            visit((reference.section, reference.name), [*trail, key])
        finished.add(key)

    for key in list(needs):
        visit(key, [])
    return problems


def _contradictions(data: Mapping[str, Any]) -> Iterator[Problem]:
    datasets = _section(data, "datasets")
    for name, entry in _section(data, "models").items():
        if not isinstance(entry, Mapping):
            continue
        path = ("models", name)
        learning = entry.get("self_training")
        if not isinstance(learning, Mapping):
            if entry.get("rounds", 1) != 1:
                yield Problem((*path, "rounds"), "rounds repeat a self-training, and this model has none")
            continue
        start = entry.get("start", "imagenet")
        if isinstance(start, str) and is_ready(start) and not learning.get("teacher"):
            yield Problem(
                (*path, "self_training"), f"starting from {start} needs a teacher: the model that labels the pool"
            )
        select = learning.get("select")
        if not isinstance(select, Mapping) or select.get("reference"):
            continue
        method = METHODS.get(str(select.get("method", "fid-subset")))
        if method is None or not method.needs_reference:
            continue
        if not any("translate" in _mapping(datasets, item) for item in _names(entry.get("train"))):
            yield Problem(
                (*path, "self_training", "select", "reference"),
                "no train set of this model is translated, so say which dataset the chosen frames should be close to",
            )


def _no_way(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Datasets whose translator cannot go where they ask it to go."""
    translators = _section(data, "translators")
    for name, entry in _section(data, "datasets").items():
        by, to = _mapping({name: entry}, name).get("by"), _mapping({name: entry}, name).get("to", "night")
        settings = _mapping(translators, by)
        if "translate" in _mapping({name: entry}, name) and to in ("day", "night") and settings:
            why = way_missing(settings, to)
            if why:
                yield Problem(("datasets", name, "to"), f"the translator {by} has no way to {to}: {why}")


def way_missing(settings: Mapping[str, Any], to: str) -> str:
    """Why a translator of these raw settings cannot translate to a domain; nothing if it can."""
    match settings.get("kind", "unit"):
        case "photometric" if to == "day":
            return "optics make night of day, and not the other way round"
        case "fourier" | "colour" if not settings.get(to):
            return f"it lacks frames that lend their light; add `{to}: DATASET` to it"
        case "command" if to not in _names(settings.get("to", ["night"])):
            return f"if the program can do it, add {to} to its list `to`"
    return ""


def _unmeasurable(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Evaluations of what is not translated, without real frames, or by a segmenter that learned from translations."""
    datasets, models = _section(data, "datasets"), _section(data, "models")
    for name, entry in _section(data, "translations").items():
        path, settings = ("translations", name), entry if isinstance(entry, Mapping) else {}
        dataset = _mapping(datasets, name)
        if not dataset:
            continue
        if "translate" not in dataset:
            yield Problem(path, f"{name} is no translated dataset, so there is nothing to measure")
            continue
        translator, to = _mapping(_section(data, "translators"), dataset.get("by")), dataset.get("to", "night")
        if not settings.get("real") and translator and not translator.get(to):
            yield Problem((*path, "real"), f"the translator has no {to} frames to compare with: say `real: DATASET`")
        segmenter = settings.get("segmenter") or next(iter(models), None)
        if segmenter is None:
            yield Problem((*path, "segmenter"), "the recipe has no model to measure with; train one on day frames")
        taught = _translated_teacher(data, segmenter, ()) if isinstance(segmenter, str) else None
        if taught:
            cure = "name one that never saw any, such as a model of day frames only"
            yield Problem(
                (*path, "segmenter"),
                f"{segmenter} learned from translated frames ({taught}), so it cannot measure them; {cure}",
            )


def _translated_teacher(data: Mapping[str, Any], model: str, trail: tuple[str, ...]) -> str | None:
    """The first translated dataset that a model, or one it starts from or is taught by, was trained on."""
    entry = _mapping(_section(data, "models"), model)
    if model in trail or not entry:
        return None
    for dataset in _names(entry.get("train")):
        if isinstance(dataset, str) and (found := _translated(data, dataset, ())):
            return found
    before = [entry.get("start"), _mapping(entry, "self_training").get("teacher")]
    found_before = (_translated_teacher(data, name, (*trail, model)) for name in before if isinstance(name, str))
    return next((name for name in found_before if name), None)


def _translated(data: Mapping[str, Any], name: str, trail: tuple[str, ...]) -> str | None:
    """The dataset itself, or the first part of it, that is translated."""
    entry = _mapping(_section(data, "datasets"), name)
    if name in trail:
        return None
    if "translate" in entry:
        return name
    parts = [*_names(entry.get("join")), entry.get("split") if "layout" not in entry else None]
    found = (_translated(data, part, (*trail, name)) for part in parts if isinstance(part, str))
    return next((part for part in found if part), None)


def _unlabelled(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Learning and testing need labels. Found here, it costs nothing; in the stage, all that runs before it."""
    uses: list[tuple[tuple[str, ...], Any]] = [
        (("models", model, key, str(index)), dataset)
        for model, entry in _section(data, "models").items()
        if isinstance(entry, Mapping)
        for key in ("train", "validate_on")
        for index, dataset in enumerate(_names(entry.get(key)))
    ]
    uses += [(("test_sets", test), dataset) for test, dataset in _section(data, "test_sets").items()]
    for path, dataset in uses:
        bare = _without_labels(data, dataset, ()) if isinstance(dataset, str) else None
        if bare is not None:
            whose = "" if bare == dataset else f" (its frames come from {bare})"
            cure = "a model learns from frames without labels through self_training.pool, and shows them by predictions"
            yield Problem(path, f"the frames of {dataset} have no labels{whose}; {cure}")


def _without_labels(data: Mapping[str, Any], name: str, trail: tuple[str, ...]) -> str | None:
    """The first dataset without labels among those that the frames of this one come from."""
    entry = _mapping(_section(data, "datasets"), name)
    if name in trail or not entry:
        return None
    if "layout" in entry:
        return name if entry.get("labelled") is False or entry["layout"] == "images" else None
    sources = [*_names(entry.get("join")), entry.get("translate"), entry.get("split")]
    found = (_without_labels(data, source, (*trail, name)) for source in sources if isinstance(source, str))
    return next((bare for bare in found if bare is not None), None)


def _bad_taxonomy(data: Mapping[str, Any]) -> Iterator[Problem]:
    name = data.get("taxonomy", Recipe.model_fields["taxonomy"].default)
    if not isinstance(name, str):
        return
    try:
        classes = taxonomy(name)
    except (UserError, OSError) as error:
        yield Problem(("taxonomy",), str(error))
        return
    yield from _unknown_classes(data, classes)
    for dataset, entry in _section(data, "datasets").items():
        encoding = _mapping({dataset: entry}, dataset).get("label_encoding")
        if isinstance(encoding, str) and encoding not in classes.encodings:
            hint, known = closest(encoding, classes.encodings), ", ".join(classes.encodings)
            yield Problem(
                ("datasets", dataset, "label_encoding"),
                f"the taxonomy {classes.name} has no label encoding {encoding!r}{hint}; known: {known}",
            )
    yield from _bad_class_weights(data, classes)


def _bad_class_weights(data: Mapping[str, Any], classes: Taxonomy) -> Iterator[Problem]:
    models = [(("models", name), entry) for name, entry in _section(data, "models").items()]
    for path, owner in [((), data), *models]:
        weights = _mapping(owner, "loss").get("class_weights") if isinstance(owner, Mapping) else None
        if not isinstance(weights, Mapping | list):
            continue
        try:
            classes.per_class({str(name): 1.0 for name in weights} if isinstance(weights, Mapping) else weights, 1.0)
        except (UserError, TypeError, ValueError) as error:
            # a value that is no number is reported by the types
            if isinstance(error, UserError):
                yield Problem((*path, "loss", "class_weights"), str(error))


def _missing_starts(data: Mapping[str, Any]) -> Iterator[Problem]:
    for name, entry in _section(data, "models").items():
        start = entry.get("start") if isinstance(entry, Mapping) else None
        if not isinstance(start, str) or "/" not in start:
            continue
        if not all((Location.of(start) / file).exists() for file in ("model.json", "model.safetensors")):
            yield Problem(
                ("models", name, "start"),
                f"there is no model folder {start!r} (it would hold a model.json and a model.safetensors); to start "
                "from a model of this recipe, give its name",
            )


def _unknown_classes(data: Mapping[str, Any], classes: Taxonomy) -> Iterator[Problem]:
    """Classes that a translator is told to light and that the taxonomy lacks."""
    for translator, entry in _section(data, "translators").items():
        for role, names in _mapping(_mapping({translator: entry}, translator), "classes").items():
            usual = LitClasses.model_fields.get(str(role))
            if usual is not None and names == usual.default:  # a saved recipe holds them; no taxonomy has them all
                continue
            for index, name in enumerate(_names(names)):
                if name not in classes.classes:
                    hint, known = closest(str(name), classes.classes), ", ".join(classes.classes)
                    path = ("translators", translator, "classes", str(role), str(index))
                    yield Problem(path, f"{classes.name} has no class {name!r}{hint}; known: {known}")


def _missing_folders(data: Mapping[str, Any]) -> Iterator[Problem]:
    for name, entry in _section(data, "datasets").items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("root"), str) or "{" in entry["root"]:
            continue
        path, root = ("datasets", name, "root"), entry["root"]
        layout, split, labelled = entry.get("layout"), entry.get("split", ""), entry.get("labelled", True)
        try:
            if not Location.of(root).is_folder():
                cure = f"give it with --set {'.'.join(path)}=FOLDER, or --set roots.NAME=FOLDER where roots has it"
                yield Problem(path, f"there is no folder {root!r}; {cure}")
            elif layout in FOLDER_LAYOUTS and isinstance(split, str):
                check_folders(layout, Location.of(root), split=split, labelled=labelled is not False)
        except UserError as error:
            yield Problem(path, str(error))
        except OSError as error:
            yield Problem(path, f"cannot look into {root!r}: {error.strerror or error}")


def _mapping(entries: Mapping[str, Any], name: Any) -> Mapping[str, Any]:
    entry = entries.get(name) if isinstance(name, str) else None
    return entry if isinstance(entry, Mapping) else {}


def _names(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
