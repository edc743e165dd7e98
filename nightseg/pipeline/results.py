"""results.json: every number of a run with where it came from. The report reads it; so may anyone."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from nightseg.data import table as frame
from nightseg.data.class_list import taxonomy
from nightseg.data.settings import Dataset, JoinedDataset, ScenesDataset, SplitDataset, TranslatedDataset
from nightseg.data.taxonomy import Taxonomy
from nightseg.errors import UserError, closest, first_of
from nightseg.metrics.ranks import spearman
from nightseg.metrics.seeds import mean, over_seeds
from nightseg.pipeline.graph import Graph, ModelNodes, NodeId, View, frames_at_most
from nightseg.pipeline.leaks import Leak
from nightseg.pipeline.schedule import Failed
from nightseg.recipe import load_recipe
from nightseg.recipe.types import Recipe
from nightseg.report.comparison import claims, differences
from nightseg.report.run import Run, root_of
from nightseg.storage import Commit, Location, Workspace, hash_of, sha256_of
from nightseg.storage.portable import absolute_json, portable_json

RESULTS_NAME = "results.json"
RECIPE_NAME = "recipe.yaml"
PACKAGES = ("nightseg", "torch", "torchvision", "ray", "timm", "numpy", "pyarrow", "pillow")
MAX_QUARANTINE_ROWS = 1000  # the tables keep all of them; the results show the first


def gather(
    recipe: Recipe, graph: Graph, commits: Mapping[NodeId, Commit], done: set[NodeId], leaks: Sequence[Leak] = ()
) -> dict[str, Any]:
    """The content of results.json: metrics are fractions, matrices are integers, times are seconds."""
    models = _models(recipe, graph, commits)
    order = {node: place for place, node in enumerate(dict.fromkeys([*graph.nodes, *commits]))}
    first = {name: graph.models[next(iter(facts["trainings"]))] for name, facts in models.items()}
    return {
        "nightseg": importlib.metadata.version("nightseg"),
        "recipe": recipe.name,
        "seed": recipe.seed,
        "taxonomy": _told(taxonomy(recipe.taxonomy)),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "hardware": _hardware(),
        "models": models,
        "datasets": {name: [str(view) for view in views] for name, views in graph.datasets.items()},
        "frames": _frames(recipe, graph, commits),
        "labels": {n.name: c.summary["labels"] for n, c in commits.items() if "labels" in c.summary},
        "splits": {n.name: commits[n].json("evidence.json") for n in commits if n.stage == "split"},
        "selections": _evidence(commits, {m: nodes.select for m, nodes in first.items()}),
        "pseudo_labels": _evidence(commits, {m: nodes.pseudo_label for m, nodes in first.items()}),
        "predictions": {name: {"node": str(n), **p.model_dump()} for name, (n, p) in graph.predictions.items()},
        "consistency": _consistency(recipe, models),
        "translations": _translations(recipe, graph, commits, models),
        "leaks": [leak._asdict() | {"text": str(leak)} for leak in leaks],
        "quarantine": _quarantine(commits),
        "commits": {
            str(node): _facts(commit) | {"skipped": node not in done, "order": order[node]}
            for node, commit in commits.items()
        },
        "seconds": {str(node): commit.seconds for node, commit in commits.items()},
    }


def failures(graph: Graph, failed: Mapping[NodeId, Failed]) -> list[dict[str, Any]]:
    """Of each stage that failed: why, which stages were not reached for that, and which models lack something."""
    found = []
    for stage in dict.fromkeys(one.by for one in failed.values()):
        lost = [node for node, one in failed.items() if one.by == stage]
        models = {n.of: None for n in graph.models.values() if {n.train, n.evaluate, n.consistency} & set(lost)}
        error = failed[stage].error
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        not_reached = [str(node) for node in lost if node != stage]
        found.append({"stage": str(stage), "error": why, "models": list(models), "not_reached": not_reached})
    return found


def last_failures(run: Location) -> list[dict[str, Any]]:
    """What failed in the run that the results are of; nothing where there are none."""
    try:
        return list(read_results(run).get("failed", []))
    except UserError:
        return []


def told(failed: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each failure."""
    return [
        f"{one['stage']} failed: {one['error'].removesuffix('.')}"
        + (f". Not reached: {first_of(one['not_reached'])}" if one["not_reached"] else "")
        + (f". Results are missing of {', '.join(one['models'])}" if one["models"] else "")
        for one in failed
    ]


def compared(recipe: Recipe, results: Mapping[str, Any], run: Location) -> dict[str, Any]:
    """The results with the differences of their models, and with what holds of the claims of the recipe."""
    found, first = Run(run, results), next(iter(recipe.test_sets), "")
    said = {name: claim.model_dump() | {"test": claim.test or first} for name, claim in recipe.claims.items()}
    return {**results, "differences": differences(found), "claims": claims(found, said)}


def sealed(results: Mapping[str, Any], run: Location) -> dict[str, Any]:
    """The results as they are written: places in the run folder as `run:...`, the hash of the recipe they follow from,
    and their own: what `read_results` compares."""
    whole: dict[str, Any] = portable_json(
        {**results, "recipe_sha256": sha256_of((run / RECIPE_NAME).read_bytes())}, run
    )
    return whole | {"sha256": hash_of(whole)}


def read_results(run: Location) -> dict[str, Any]:
    """The results of a finished run, wherever it lies now. Raises UserError: there are none, or the file is damaged."""
    file = run / RESULTS_NAME
    try:
        content = file.read_json()
        if seal_of(content) not in (None, content.get("sha256")):
            raise ValueError("it does not match its own sha256")
        found: dict[str, Any] = absolute_json(content, root_of(run))
        return {**found, "models": dict(found["models"]), "commits": dict(found["commits"])}
    except FileNotFoundError:
        raise UserError(f"{run}: no results.json there", cure="finish the run first (nightseg run RECIPE)") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: not the results of a run, or damaged ({error})",
            cure="run the same command again; what is committed is not computed twice",
        ) from error


def results_so_far(run: Location) -> dict[str, Any]:
    """The results of a finished run; of another what its commits and its recipe tell, without models and scores.

    Raises UserError: there is neither, or a file is damaged.
    """
    if (run / RESULTS_NAME).exists():
        return read_results(run)
    recipe = load_recipe(run.uri + f"/{RECIPE_NAME}")
    newest = {f"{commit.stage}/{commit.name}": commit for commit in Workspace(run).commits()}
    return {
        "recipe": recipe.name,
        "taxonomy": _told(taxonomy(recipe.taxonomy)),
        "models": {},
        "commits": {node: _facts(commit) | {"order": place} for place, (node, commit) in enumerate(newest.items())},
    }


def _told(classes: Taxonomy) -> dict[str, Any]:
    return {
        "name": classes.name,
        "classes": list(classes.classes),
        "palette": [list(color) for color in classes.palette],
        "encodings": {name: {str(raw): ids[raw] for raw in ids} for name, ids in classes.encodings.items()},
    }


def seal_of(content: Mapping[str, Any]) -> str | None:
    """What the sha256 of these results has to be; None where they have none."""
    return hash_of({key: value for key, value in content.items() if key != "sha256"}) if "sha256" in content else None


def model_folder(place: str | Path | Location) -> Location:
    """A model folder as it is, or `RUN_DIR:MODEL` through the results of a finished run.

    Raises UserError: neither is there, or the run has no such model.
    """
    folder = Location.of(place)
    if (folder / "model.json").exists():
        return folder
    run, name = folder, ""
    if not (folder / RESULTS_NAME).exists():
        before, _, after = str(place).rpartition(":")
        if before and not after.startswith("//"):  # of s3://bucket/run
            run, name = Location.of(before), after
    if not (run / RESULTS_NAME).exists():
        raise UserError(
            f"{place}: neither a model folder (no model.json) nor a finished run (no results.json)",
            cure="give RUN_DIR:MODEL, for example runs/demo:adapted",
        )
    content = read_results(run)
    nodes = {of: facts["model"] for of, facts in content["models"].items()}
    for facts in content["models"].values():
        nodes |= {training: found["model"] for training, found in facts.get("trainings", {}).items()}
    if name not in nodes:
        wrong = f"the run has no model {name!r}{closest(name, nodes)}" if name else "say which model"
        known = ", ".join(nodes) or "none"
        raise UserError(f"{place}: {wrong}; known: {known}", cure="give RUN_DIR:MODEL")
    node = nodes[name]
    attempt = Location.of(content["commits"][node]["folder"])
    root = Run(run, content).root
    moved = root / f"stages/{node}/{attempt.parent.name}/{attempt.name}/model"  # a run folder may be moved
    return moved if (moved / "model.json").exists() else attempt / "model"


def planned_rows(recipe: Recipe, graph: Graph) -> list[dict[str, Any]]:
    """The published rows that a run will reproduce, by their names: which model on which test set, the models that it
    starts from and is taught by, frames of each set that it learns from (at most, where none is sorted yet)."""
    most = frames_at_most(graph)

    def frames(name: str) -> int | None:
        known = [most[view.node] for view in graph.datasets[_source_of(recipe, name)] if isinstance(view, View)]
        return sum(count for count in known if count is not None) if None not in known else None

    found = []
    for name, nodes in graph.models.items():
        if name != nodes.of:  # another seed
            continue
        learning = nodes.facts["self_training"]
        parents = [*nodes.facts["parents"], *filter(None, [learning and learning["teacher"]])]
        sizes = {dataset: frames(dataset) for dataset in nodes.facts["train"]}
        if learning:
            sizes[learning["pool"]] = most[nodes.select] if nodes.select else frames(learning["pool"])
        for test, row in nodes.tests.items():
            if row.row:
                facts = {"model": name, "test": test, "parents": list(dict.fromkeys(parents)), "frames": sizes}
                test_frames = frames(recipe.test_sets[test])
                found.append({"row": row.row, **facts, "test_frames": test_frames, **row.model_dump(exclude={"row"})})
    return sorted(found, key=lambda row: str(row["row"]))


def _source_of(recipe: Recipe, name: str) -> str:
    """The dataset whose frames are read: of one that trainings translate as they go, its source."""
    dataset = recipe.datasets[name]
    return dataset.translate if isinstance(dataset, TranslatedDataset) and dataset.fresh else name


def _models(recipe: Recipe, graph: Graph, commits: Mapping[NodeId, Commit]) -> dict[str, dict[str, Any]]:
    """Each model with its trainings, one a seed. What stands beside them is that of the first; the scores of a test set
    have the mean over the seeds beside them, and the sample standard deviation (null for one seed)."""
    light = _Light(recipe, graph, commits)
    trainings: dict[str, dict[str, Any]] = {}
    for name, nodes in graph.models.items():
        trainings.setdefault(nodes.of, {})[name] = {
            "seed": nodes.seed,
            "start": nodes.facts["start"],
            "model": str(nodes.train),
            "pseudo_label": str(nodes.pseudo_label) if nodes.pseudo_label else None,
            "tests": _scores(commits, nodes),
            "consistency": commits[nodes.consistency].json("scores.json") if nodes.consistency else None,
        }
    models = {}
    for of, found in trainings.items():
        name, first = next(iter(found.items()))
        tests = {}
        for test in dict.fromkeys(test for one in found.values() for test in one["tests"]):  # some may have failed
            scored = {one["seed"]: one["tests"][test] for one in found.values() if test in one["tests"]}
            tests[test] = next(iter(scored.values())) | over_seeds(scored)
        line = list(_line(graph, name))
        models[of] = {
            **graph.models[name].facts,
            "model": first["model"],
            "tests": tests,
            "consistency": _mean_of([one["consistency"] for one in found.values()]),
            "trainings": found,
            "line": [one.of for one in line],
            "root": line[0].facts["start"],
            **_effort(line, commits),
            "learned": light.of(line),
        }
    return models


def _frames(recipe: Recipe, graph: Graph, commits: Mapping[NodeId, Commit]) -> dict[str, Any]:
    """Of each dataset: how many frames, what they are, and the labelled pixels of each class, where all were counted.
    Of a dataset that trainings translate as they go, those of its source."""
    found: dict[str, Any] = {}
    for name, dataset in recipe.datasets.items():
        views = [
            view
            for view in graph.datasets.get(_source_of(recipe, name), ())
            if isinstance(view, View) and view.node in commits
        ]
        number, counted = 0, list[list[int] | None]()
        for view in views:
            rows = commits[view.node].table("frames")
            rows = rows if view.domain is None else rows.filter(pc.equal(rows[frame.DOMAIN], view.domain))
            number += rows.num_rows
            counted += rows[frame.LABEL_PIXELS].to_pylist() if frame.LABEL_PIXELS in rows.column_names else [None]
        known = [row for row in counted if row is not None]
        is_whole = known and len(known) == len(counted)
        pixels = [sum(of_class) for of_class in zip(*known, strict=True)] if is_whole else None
        shares = None if pixels is None or not sum(pixels) else [count / sum(pixels) for count in pixels]
        if views:
            found[name] = {"what": _in_words(dataset), "frames": number, "class_pixels": pixels, "shares": shares}
    return found


def _in_words(dataset: Dataset) -> str:
    match dataset:
        case ScenesDataset():
            return "procedural scenes of nightseg"
        case SplitDataset():
            return f"{dataset.keep} frames of {dataset.split}"
        case TranslatedDataset():
            return f"{dataset.translate} translated to {dataset.to} by {dataset.by}"
        case JoinedDataset():
            return f"{' and '.join(dataset.join)} together"
    return f"{dataset.layout} frames, {dataset.split}" if dataset.split else f"{dataset.layout} frames"


def _mean_of(scores: Sequence[Mapping[str, float] | None]) -> dict[str, float | None] | None:
    known = [one for one in scores if one is not None]
    return {name: mean([one[name] for one in known]) for name in known[0]} if known else None


def _consistency(recipe: Recipe, models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """How well the scores that need no labels rank the models on each test set: Spearman's correlation with mIoU."""
    if recipe.consistency is None:
        return None
    rated = [facts for facts in models.values() if facts["consistency"]]
    ranks: dict[str, Any] = {}
    for test in dict.fromkeys(test for facts in rated for test in facts["tests"]):
        tested = [facts for facts in rated if test in facts["tests"]]
        reached = [facts["tests"][test]["mean"]["miou"] for facts in tested]
        by_score = {
            name: spearman([facts["consistency"][name] for facts in tested], reached)
            for name in rated[0]["consistency"]
        }
        ranks[test] = {"models": len(tested), "spearman": by_score}
    return {"dataset": recipe.consistency.dataset, "ranks": ranks}


def _line(graph: Graph, name: str) -> Iterator[ModelNodes]:
    """The models that a training starts from, the first one first, and itself."""
    nodes = graph.models[name]
    for parent in nodes.facts["parents"]:
        yield from _line(graph, parent)
    yield nodes


def _effort(line: Sequence[ModelNodes], commits: Mapping[NodeId, Commit]) -> dict[str, Any]:
    """Steps of the last training and of the whole line; frames that the line drew from train sets, steps x batch."""
    steps = [int(commits[nodes.train].summary["steps"]) for nodes in line]
    frames = [count * nodes.facts["training"]["batch"] for count, nodes in zip(steps, line, strict=True)]
    return {"steps": steps[-1], "steps_in_all": sum(steps), "frames_in_all": sum(frames)}


class _Light:
    """In what light the labelled frames were that a line of models learned from."""

    def __init__(self, recipe: Recipe, graph: Graph, commits: Mapping[NodeId, Commit]) -> None:
        self.recipe, self.graph, self.commits = recipe, graph, commits
        self._domains: dict[str, set[str]] = {}

    def of(self, line: Sequence[ModelNodes]) -> dict[str, Any]:
        """Domains of all train sets, whether one is translated, whether one has real night frames with labels, whether
        there was a pool, and if it was day alone."""
        names = {dataset: None for nodes in line for dataset in nodes.facts["train"]}
        domains = sorted(set().union(*map(self._domains_of, names)))
        is_translated = any(_is_translated(self.recipe, name) for name in names)
        has_pool = any(nodes.facts["self_training"] or nodes.facts.get("adapt_norms") for nodes in line)
        has_night_labels = any("night" in self._domains_of(n) and not _is_translated(self.recipe, n) for n in names)
        is_day = domains == ["day"] and not is_translated and not has_pool
        return {
            "domains": domains,
            "translated": is_translated,
            "night_labels": has_night_labels,
            "pool": has_pool,
            "day_only": is_day,
        }

    def _domains_of(self, name: str) -> set[str]:
        match self.recipe.datasets[name]:
            case JoinedDataset(join=parts):
                return set().union(*map(self._domains_of, parts))
            case TranslatedDataset(to=domain) | SplitDataset(keep=domain):
                return {domain}
        if name not in self._domains:
            views = [view for view in self.graph.datasets[name] if isinstance(view, View)]
            tables = [self.commits[view.node].table("frames") for view in views]
            self._domains[name] = {domain for rows in tables for domain in rows[frame.DOMAIN].unique().to_pylist()}
        return self._domains[name]


def _scores(commits: Mapping[NodeId, Commit], nodes: ModelNodes) -> dict[str, dict[str, Any]]:
    """Test set -> scores of a model, with the published row that they reproduce."""
    found = commits[nodes.evaluate].json("scores.json") if nodes.evaluate else {}
    node = {"node": str(nodes.evaluate)}
    return {test: scores | nodes.tests[test].model_dump() | node for test, scores in found.items()}


def _evidence(commits: Mapping[NodeId, Commit], nodes: Mapping[str, NodeId | None]) -> dict[str, Any]:
    """Model -> the stage that chose or labelled its frames, and why it did so."""
    return {
        model: {"node": str(node), "evidence": commits[node].json("evidence.json")}
        for model, node in nodes.items()
        if node is not None
    }


def _translations(
    recipe: Recipe, graph: Graph, commits: Mapping[NodeId, Commit], trained: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What was found about each evaluated translation, and how the models that learned from it do on the test sets."""
    found = {}
    for name, (node, facts) in graph.translations.items():
        models = {
            model: {test: scores["mean"]["miou"] for test, scores in entry["tests"].items()}
            for model, entry in trained.items()
            if any(_holds(recipe, dataset, name) for dataset in entry["train"])
        }
        found[name] = {"node": str(node), **facts, **commits[node].json("scores.json"), "models": models}
    return found


def _holds(recipe: Recipe, dataset: str, wanted: str) -> bool:
    """True if a dataset is the wanted one, or joins it with others."""
    entry = recipe.datasets[dataset]
    parts = entry.join if isinstance(entry, JoinedDataset) else []
    return dataset == wanted or any(_holds(recipe, part, wanted) for part in parts)


def _is_translated(recipe: Recipe, dataset: str) -> bool:
    entry = recipe.datasets[dataset]
    parts = entry.join if isinstance(entry, JoinedDataset) else []
    return isinstance(entry, TranslatedDataset) or any(_is_translated(recipe, part) for part in parts)


def _facts(commit: Commit) -> dict[str, Any]:
    told = ("key", "content", "seconds", "rows_in", "rows_out", "quarantined", "created", "code", "summary")
    return {"folder": commit.folder.uri} | {name: getattr(commit, name) for name in told}


def _quarantine(commits: Mapping[NodeId, Commit]) -> list[dict[str, Any]]:
    rows = [
        {"stage": node.stage, "name": node.name} | row
        for node, commit in commits.items()
        if commit.quarantined
        for row in commit.table("quarantine").to_pylist()
    ]
    return rows[:MAX_QUARANTINE_ROWS]


def _hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count(), "system": platform.system()}
    torch = sys.modules.get("torch")  # an unchanged rerun does not pay for importing torch
    if torch is not None and torch.cuda.is_available():
        facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts
