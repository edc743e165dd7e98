"""Before anything runs: what a run would refuse later, and what a few frames of each folder say about the rest.

`refuse` costs seconds and reads no frame; every run begins with it. `check` also looks at frames, as `collect` will.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from nightseg.data import table as frame
from nightseg.data.class_list import taxonomy
from nightseg.data.settings import FolderDataset, ScenesDataset, SplitDataset
from nightseg.data.taxonomy import COLORS, Taxonomy, in_words
from nightseg.errors import UserError, all_of, first_of
from nightseg.networks.downloads import may_download
from nightseg.networks.model_folder import load_card
from nightseg.pipeline import estimate
from nightseg.pipeline.build import build_graph
from nightseg.pipeline.graph import Frames, Graph, Node, NodeId, Use, View, frames_at_most
from nightseg.progress import Progress, duration
from nightseg.recipe.types import PATH_KEYS, Recipe
from nightseg.report.check_page import overlay
from nightseg.report.pictures import Picture
from nightseg.segmenter.network import network_of
from nightseg.segmenter.start import check_same_architecture, imagenet_weights
from nightseg.selection.features import identify
from nightseg.stages import split
from nightseg.stages.collect import SCENES_TAXONOMY, Look, look_at
from nightseg.stages.train_segmenter import check_settings, check_steps
from nightseg.stages.train_translator import check_settings as check_translator
from nightseg.storage import Location, Workspace
from nightseg.storage.scratch import temporary_folder
from nightseg.translators.settings import CommandTranslator, PhotometricTranslator
from nightseg.unit.perceptual import check_weights as check_perceptual_weights
from nightseg.unit.settings import Translator

MOST_FRAMES: Final = 24  # that are read of a folder, unless asked otherwise
OVERLAYS: Final = 8
RARE: Final = 0.001  # share of the pixels below which a class is told to be rare
FEW: Final = 0.99  # confidence that a set has more bad frames than it may, before a sample refuses it


class Checked(NamedTuple):
    """What was found; nothing that a run would refuse. Shares are fractions, times seconds, sizes bytes."""

    datasets: dict[str, dict[str, Any]]
    models: dict[str, dict[str, Any]]
    costs: dict[str, Any]
    warnings: list[str]
    overlays: list[Picture]  # frames in the colours of their labels
    graph: Graph  # of the recipe: making it lists all folders

    def sentences(self) -> list[str]:
        """What was found, for people; warnings are told apart."""
        return [
            *(f"dataset {name}: {_dataset_in_words(facts)}" for name, facts in self.datasets.items() if facts),
            *(f"model {name}: {_model_in_words(facts)}" for name, facts in self.models.items()),
            *(_costs_in_words(self.costs) if self.costs else ()),
        ]


# -- without reading a frame -------------------------------------------------------------------------------------------


def refuse(recipe: Recipe, graph: Graph, done: Collection[NodeId] = ()) -> None:
    """Raise UserError with all that stages which are not `done` would refuse: settings, weights, counts."""
    all_of(*_refusals(recipe, graph, done))


def places(recipe: Recipe) -> dict[str, str]:
    """Key -> local file or folder that the recipe names and that is there: what work on other nodes may read."""
    found: dict[str, str] = {}

    def look(value: Any, path: tuple[str, ...]) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                look(item, (*path, str(key)))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                look(item, (*path, str(index)))
        elif isinstance(value, str) and (
            value.startswith(("/", "~")) or path[-1] in PATH_KEYS or (path[-1] == "start" and "/" in value)
        ):
            fixed, mark, _ = re.sub(r"[{*?\[]", "\0", value).partition("\0")  # of a template or pattern: the folder
            place = Location.of(fixed.rpartition("/")[0] or "/" if mark else value)
            if place.is_local and place.uri != "/" and place.exists():
                found[".".join(path)] = place.uri

    look(recipe.model_dump(mode="json"), ())
    return found


def done_in(folder: Location) -> set[NodeId]:
    """Stages that a run folder has a commit of, whatever their settings were."""
    return {NodeId(commit.stage, commit.name) for commit in Workspace(folder).commits()}


def _refusals(recipe: Recipe, graph: Graph, done: Collection[NodeId]) -> Iterator[Callable[[], Any]]:
    rows = frames_at_most(graph)
    for node in graph.nodes.values():
        if node.id not in done and node.id.stage == "train_segmenter" and node.settings:
            yield from _refusals_of_training(node, recipe, graph, rows)
    for node in graph.nodes.values():
        if node.id not in done:
            yield from _refusals_of(node, recipe, graph, rows)


def _refusals_of_training(
    node: Node, recipe: Recipe, graph: Graph, rows: Mapping[NodeId, int | None]
) -> Iterator[Callable[[], Any]]:
    of, start = f"model {node.id.name}", node.unhashed.get("start", node.inputs.get("start"))
    network, training = node.settings["network"], node.settings["training"]
    yield partial(check_settings, network, training, recipe.compute.train, of)
    if most := _frames_of(node.inputs["train"], rows):
        yield partial(check_steps, training, most, of)
    if start == "imagenet" and not _may_fetch(recipe):
        key = "encoder" if network.encoder_weights is None else "encoder_weights"
        weights = partial(imagenet_weights, network.encoder, network.encoder_weights)
        yield partial(_told_of, f"{of}: network.{key}", weights)
    elif isinstance(start, NodeId) and (theirs := graph.nodes[start].settings.get("network")):
        yield partial(_told_of, f"{of}: start", partial(check_same_architecture, start.name, theirs, network))
    elif isinstance(start, str) and "/" in start:
        theirs = network_of(load_card(Location.of(start)))
        yield partial(_told_of, f"{of}: start", partial(check_same_architecture, start, theirs, network))


def _refusals_of(
    node: Node, recipe: Recipe, graph: Graph, rows: Mapping[NodeId, int | None]
) -> Iterator[Callable[[], Any]]:
    name = node.id.name
    match node.id.stage:
        case "train_translator" if node.settings:
            settings = recipe.translators[name]
            assert isinstance(settings, Translator), name
            yield partial(check_translator, name, settings, recipe.compute.train)
            if settings.weights.perceptual > 0 and not _may_fetch(recipe):
                yield partial(_told_of, f"translator {name}", partial(check_perceptual_weights, settings))
        case "score" if "extraction" in node.unhashed and not _may_fetch(recipe):
            yield partial(_told_of, _asked_by(node.id, graph), partial(identify, node.unhashed["extraction"]))
        case "select" if node.settings:
            pool = _frames_of(node.inputs["pool_frames"], rows)
            yield partial(_check_count, name, node.settings["selection"].count, pool)
        case "translate" if isinstance(program := node.settings.get("translator"), CommandTranslator):
            yield partial(_check_program, name, program.argv[0])
        case "collect" if isinstance(node.settings.get("dataset"), ScenesDataset):
            yield partial(_check_scenes, recipe, name, node.settings["dataset"])


def _may_fetch(recipe: Recipe) -> bool:
    return recipe.allow_download or may_download()


def _asked_by(scored: NodeId, graph: Graph) -> str:
    """Whose key names the extractor of a node of features."""
    users = [node.id for node in graph.nodes.values() if scored in node.needs and node.id.stage != "score"]
    chosen = [user.name for user in users if user.stage == "select"]
    if chosen:
        return f"model {chosen[0]}: self_training.select.extractor"
    return f"translation {users[0].name}: extractor" if users else f"features of {scored.name}"


def _told_of(where: str, step: Callable[[], Any]) -> None:
    try:
        step()
    except UserError as error:
        raise UserError(f"{where}: {error.what}", cure=error.cure) from error


def _check_count(name: str, count: int, pool: int | None) -> None:
    if pool is not None and count > pool:
        raise UserError(
            f"model {name}: self_training.select.count is {count}, and the pool has {pool} frames at most",
            cure=f"choose {max(1, pool // 2)} or so, or add frames to the pool",
        )


def _check_program(name: str, program: str) -> None:
    if "RAY_ADDRESS" not in os.environ and shutil.which(program) is None:
        raise UserError(
            f"dataset {name}: its translator starts the program {program!r}, and there is none on this machine",
            cure="install it, give its absolute path in argv, and make it executable",
        )


def _check_scenes(recipe: Recipe, name: str, dataset: ScenesDataset) -> None:
    known = taxonomy(recipe.taxonomy).name
    if dataset.labelled and known != SCENES_TAXONOMY:
        raise UserError(
            f"dataset {name}: scenes are labelled with the classes of {SCENES_TAXONOMY}, not of {known}",
            cure=f"set taxonomy: {SCENES_TAXONOMY}, or labelled: false for this dataset",
        )


def _frames_of(source: Any, rows: Mapping[NodeId, int | None]) -> int | None:
    """At most so many frames are in an input; None if that is not known."""
    views = [view for part in (source.values() if isinstance(source, Mapping) else [source]) for view in part.views]
    counts = [rows.get(view.node) if isinstance(view, View) else view.table.num_rows for view in views]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


# -- with a few frames -------------------------------------------------------------------------------------------------


def check(
    recipe: Recipe,
    folder: Location,
    *,
    only: str | None = None,
    most: int = MOST_FRAMES,
    is_measured: bool = True,
    progress: Progress,
) -> Checked:
    """Look at the recipe and at most so many frames of each of its folders; nothing is written but temporary files.

    `is_measured`: a step of each network tells what the run will cost; without it, `costs` is empty.

    Raises UserError with all that a run in `folder` would refuse, as far as it can be seen without running.
    """
    looks: dict[str, Look] = {}
    graph: list[Graph] = []

    def settings() -> None:
        graph.append(build_graph(recipe, only))
        refuse(recipe, graph[0], done_in(folder))

    folders = {name: one for name, one in recipe.datasets.items() if isinstance(one, FolderDataset)}
    with temporary_folder() as scratch:

        def look(name: str, dataset: FolderDataset) -> None:
            progress.say(f"look at {name}")
            looks[name] = found = look_at(
                dataset,
                name=name,
                taxonomy=recipe.taxonomy,
                most=most,
                max_bad_fraction=recipe.max_bad_fraction,
                folder=Location.of(scratch) / name,
            )
            all_of(partial(_check_missing, recipe, name, found), partial(_check_bad, recipe, name, found))

        steps = [partial(_told_of_dataset, name, partial(look, name, one)) for name, one in folders.items()]
        all_of(settings, *steps, lambda: _check_shared(recipe, graph, looks))
        classes = taxonomy(recipe.taxonomy)
        warnings = [f"dataset {name}: {note}" for name, found in looks.items() for note in found.notes]
        datasets = {name: _facts(recipe, name, looks.get(name), classes, warnings) for name in recipe.datasets}
        _of_splits(recipe, looks, datasets, warnings)
        for name, one in recipe.translators.items():
            if isinstance(one, PhotometricTranslator):
                warnings += one.classes.unknown(name, classes.classes)
        models = _of_models(recipe, graph[0], datasets, classes, warnings)
        costs: dict[str, Any] = {}
        if is_measured:
            progress.say("measure a step of the networks")
            costs = estimate.costs(recipe, graph[0], looks, folder, warnings, done_in(folder))
        return Checked(datasets, models, costs, list(dict.fromkeys(warnings)), _overlays(looks, classes), graph[0])


def _overlays(looks: Mapping[str, Look], classes: Taxonomy) -> list[Picture]:
    """Of all labelled folders in turn."""
    labelled = [
        [row for row in found.frames.to_pylist() if row[frame.LABEL_URI] is not None] for found in looks.values()
    ]
    each = -(-OVERLAYS // max(1, sum(map(bool, labelled))))
    rows = [row for part in labelled for row in part[:: max(1, len(part) // each)][:each]][:OVERLAYS]
    found = [
        overlay(row[frame.URI], row[frame.LABEL_URI], row[frame.LABEL_ENCODING], classes, row[frame.FRAME_ID])
        for row in rows
    ]
    return [picture for picture in found if picture is not None]


def _told_of_dataset(name: str, step: Callable[[], Any]) -> None:
    try:
        step()
    except UserError as error:
        if error.problems or error.what.startswith(f"dataset {name}"):
            raise
        raise UserError(f"dataset {name}: {error.what}", cure=error.cure) from error


def _check_missing(recipe: Recipe, name: str, found: Look) -> None:
    if len(found.missing) > recipe.max_bad_fraction * found.num_frames:
        raise UserError(
            f"dataset {name}: {len(found.missing)} of {found.num_frames} frames have no label file; looked for "
            f"{first_of(found.missing)}",
            cure="put the labels there, leave these frames out (split, split_list, another folder), or set "
            "labelled: false if none are meant to have labels",
        )


def _check_bad(recipe: Recipe, name: str, found: Look) -> None:
    """A sample refuses a set where it is all but certain that the whole set would be."""
    bad, read = found.quarantine.num_rows, found.quarantine.num_rows + found.frames.num_rows
    if bad and _certain(bad, read, recipe.max_bad_fraction):
        reasons = Counter(found.quarantine[frame.REASON].to_pylist())
        first = found.quarantine.slice(0, 1).to_pylist()[0]
        raise UserError(
            f"dataset {name}: {bad} of {read} frames that were read cannot be used ("
            + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
            + f"), such as {first[frame.URI]}: {first[frame.DETAIL]}",
            cure=_CURES.get(reasons.most_common(1)[0][0], "repair or remove these files"),
        )


_CURES: Final = {
    "label_size": "give the labels the size of their images (scale by nearest neighbour)",
    "label_value": "say what the ids mean: another taxonomy, its `ids:`, or label_encoding",
    "label_missing": "put the labels there, or set labelled: false",
}


def _certain(bad: int, read: int, allowed: float) -> bool:
    """Whether so many bad ones would hardly come of a set with the share that is allowed (binomial tail)."""
    tail = sum(math.comb(read, k) * allowed**k * (1 - allowed) ** (read - k) for k in range(bad, read + 1))
    return tail < 1 - FEW


def _check_shared(recipe: Recipe, graph: list[Graph], looks: Mapping[str, Look]) -> None:
    """The same files in what is trained on and what is tested on, or the same bytes in what was read of them. A run
    compares all bytes."""
    if recipe.leaks != "refuse" or not graph:
        return
    told: dict[tuple[str, str], str] = {}
    for watched in graph[0].watched.values():
        for use in watched.learned:
            for other in watched.tests:
                seen, tested = (_files(part, looks) for part in (use, other))
                if both := seen.keys() & tested.keys():
                    told[use.dataset, other.what] = first_of(sorted({tested[key] for key in both}))
    if told:
        shared = "; ".join(f"frames of {one} are in {other}: {names}" for (one, other), names in told.items())
        cure = "take these frames out of one of the two sets, or say `leaks: report` in the recipe"
        raise UserError(f"leaks: {shared}", cure=cure)


def _files(use: Use, looks: Mapping[str, Look]) -> dict[str, str]:
    """Names of all image files and sha256 of those that were read -> name. Sides of a pool are left out."""
    found: dict[str, str] = {}
    for view in use.views:
        if isinstance(view, View) and view.node.stage == "collect" and view.node.name in looks:
            look = looks[view.node.name]
            found |= {uri: uri for uri in look.uris}
            found |= {row[frame.SHA256]: row[frame.URI] for row in look.frames.to_pylist()}
    return found


# -- what is told ------------------------------------------------------------------------------------------------------


def _facts(recipe: Recipe, name: str, found: Look | None, classes: Taxonomy, warnings: list[str]) -> dict[str, Any]:
    dataset = recipe.datasets[name]
    if isinstance(dataset, ScenesDataset):
        return {"frames": dataset.count, "size": list(dataset.size), "read": 0, "drawn": True}
    if found is None:
        return {}
    rows, bad = found.frames, found.quarantine.num_rows
    if bad:
        first = found.quarantine.slice(0, 1).to_pylist()[0]
        warnings.append(
            f"dataset {name}: {bad} of {rows.num_rows + bad} frames that were read cannot be used: "
            f"{first[frame.URI]}: {first[frame.REASON]} {first[frame.DETAIL]}"
        )
    if found.missing:
        warnings.append(f"dataset {name}: {len(found.missing)} of {found.num_frames} frames have no label file")
    sizes = Counter(zip(rows[frame.HEIGHT].to_pylist(), rows[frame.WIDTH].to_pylist(), strict=True))
    facts: dict[str, Any] = {
        "frames": found.num_frames,
        "read": rows.num_rows + bad,
        "bad": bad,
        "missing_labels": len(found.missing),
        "sizes": [[*size, count] for size, count in sizes.most_common(3)],
        "domains": dict(Counter(rows[frame.DOMAIN].to_pylist())),
    }
    counted = [pixels for pixels in rows[frame.LABEL_PIXELS].to_pylist() if pixels is not None]
    if found.reading is not None:
        said, *odd = found.reading.sentences()
        warnings += [f"dataset {name}: {sentence}" for sentence in odd]
        ids = sorted({raw_id for label in found.labels for raw_id in label.pixels})
        facts["labels"] = {"encoding": found.reading.encoding, "said": said, "ids": ids, "valid": found.reading.valid}
    if counted:
        facts["pixels"] = np.array(counted, dtype=np.int64).sum(axis=0).tolist()
        total = max(1, sum(facts["pixels"]))
        facts["classes"] = {one: n / total for one, n in zip(classes.classes, facts["pixels"], strict=True)}
    return facts


def _of_splits(
    recipe: Recipe, looks: Mapping[str, Look], datasets: dict[str, dict[str, Any]], warnings: list[str]
) -> None:
    """How a pool would be split, judged by the frames that were read."""
    for name, dataset in recipe.datasets.items():
        if not isinstance(dataset, SplitDataset) or (found := looks.get(dataset.split)) is None:
            continue
        domains = split.domains_of(found.frames, dataset.margin)
        datasets[name] = {"of": dataset.split, "read": len(domains), "domains": dict(Counter(domains))}
        share = domains.count(dataset.keep) / max(1, len(domains))
        datasets[name]["frames_about"] = round(share * found.num_frames)
        if domains and not share:
            warnings.append(
                f"dataset {name}: none of {len(domains)} frames of {dataset.split} that were read is a {dataset.keep} "
                f"frame (they are {', '.join(f'{count} {domain}' for domain, count in Counter(domains).items())})"
            )


def _of_models(
    recipe: Recipe, graph: Graph, datasets: Mapping[str, dict[str, Any]], classes: Taxonomy, warnings: list[str]
) -> dict[str, dict[str, Any]]:
    """Steps of each training, and the classes that its train sets lack together."""
    rows, told = frames_at_most(graph), {}
    said: dict[str, list[str]] = {}  # once of all models that learn from the same sets
    for name, nodes in graph.models.items():
        node = graph.nodes[nodes.train]
        if "train" not in node.inputs or name != nodes.of:
            continue
        source, training = node.inputs["train"], node.settings["training"]
        views = [view for part in source.values() for view in part.views if isinstance(view, View)]  # type: ignore[union-attr]
        most = _frames_of({k: v for k, v in source.items() if isinstance(v, Frames)}, rows)  # type: ignore[union-attr]
        of_epoch = training.steps_per_epoch if most is None else training.steps_of_epoch(most)
        told[name] = {
            "frames_at_most": most,
            "steps": None if of_epoch is None else training.epochs * of_epoch,
            "batch": training.batch,
        }
        counted = [datasets.get(view.node.name, {}).get("pixels") for view in views if view.node.stage == "collect"]
        if counted and all(counted) and len(counted) == len(views):
            pixels: npt.NDArray[np.int64] = np.array(counted, dtype=np.int64).sum(axis=0)
            shares = pixels / max(1, pixels.sum())
            rare = [f"{one} {100 * s:.2g} %" for one, s in zip(classes.classes, shares, strict=True) if 0 < s < RARE]
            absent = [one for one, n in zip(classes.classes, pixels, strict=True) if not n]
            if absent:
                said.setdefault(f"no pixel of the train frames that were read has {', '.join(absent)}", []).append(name)
            if rare:
                said.setdefault(f"rare in the train sets: {', '.join(rare)}", []).append(name)
    warnings += [f"model {', '.join(names)}: {text}" for text, names in said.items()]
    return told


# -- in words ----------------------------------------------------------------------------------------------------------


def _dataset_in_words(facts: Mapping[str, Any]) -> str:
    if "of" in facts:
        domains = ", ".join(f"{count} {domain}" for domain, count in facts["domains"].items())
        return f"about {facts['frames_about']} frames of {facts['of']} ({facts['read']} read: {domains})"
    if facts.get("drawn"):
        return f"{facts['frames']} scenes of {facts['size'][1]} x {facts['size'][0]} pixels, drawn by the run"
    sizes = ", ".join(f"{width} x {height}" for height, width, _ in facts["sizes"])
    parts = [f"{facts['frames']} frames, {facts['read']} of them read: {sizes or 'none can be used'} pixels"]
    if labels := facts.get("labels"):
        parts.append(f"{labels['said']}; found: {_listed(labels['ids'], labels['encoding'])}")
    if shares := facts.get("classes"):
        ranked = sorted(shares.items(), key=lambda pair: -pair[1])
        parts.append("pixels: " + ", ".join(f"{name} {100 * share:.3g} %" for name, share in ranked if share))
    return "; ".join(parts)


def _listed(ids: list[int], encoding: str) -> str:
    shown = ", ".join(in_words(raw_id, encoding) for raw_id in ids[:32])
    return f"{'colours' if encoding == COLORS else 'ids'} {shown}" + (f" and {len(ids) - 32} more" if ids[32:] else "")


def _model_in_words(facts: Mapping[str, Any]) -> str:
    frames = "an unknown number of" if facts["frames_at_most"] is None else f"at most {facts['frames_at_most']}"
    steps = "an unknown number of" if facts["steps"] is None else facts["steps"]
    return f"{steps} steps of {facts['batch']} frames, drawn from {frames} frames"


def _costs_in_words(costs: Mapping[str, Any]) -> Iterator[str]:
    if costs["seconds"] is None:
        yield "time: not known, nothing could be measured on this machine"
    else:
        without = f"; without {', '.join(costs['without'])}" if costs["without"] else ""
        yield f"time: about {duration(costs['seconds'])}, by a step of each network on this machine{without}"
    free = f" ({estimate.gigabytes(costs['disk_free'])} are free)" if costs["disk_free"] is not None else ""
    yield f"disk: about {estimate.gigabytes(costs['disk'])}{free}"
    if costs["memory"]:
        of = estimate.gigabytes(costs["memory_total"])
        yield f"memory: about {estimate.gigabytes(costs['memory'])} in the largest training (this machine has {of})"
