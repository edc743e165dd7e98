"""What the searched keys reach: each must make other trials, and none may change what trials are compared on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nightseg.errors import UserError, first_of, together
from nightseg.pipeline.graph import Graph, NodeId, View
from nightseg.pipeline.search.trials import Trials, shared_nodes
from nightseg.progress import Progress
from nightseg.segmenter.settings import Loss

Edges = Sequence[tuple[Mapping[str, Any], Graph]]  # values of `Trials.edges`, and the graph that they make


def check_keys(trials: Trials, edges: Edges, progress: Progress) -> None:
    """Raise UserError naming every key that makes no difference, or that changes the frames that trials are compared
    on; say which one reaches the searched model only by what it stands on."""
    problems = []
    for key in trials.settings.space:
        some = _varying(key, edges)
        if len(some) < 2:
            continue
        if wrong := _wrong_with(key, trials, some):
            problems.append(UserError(f"space.{key}: {wrong[0]}", cure=wrong[1]))
        elif (above := _only_above(key, trials, some)) is not None:
            reached = f"only by {first_of(above)}, made anew for each of its values"
            progress.say(f"space.{key} reaches {trials.settings.model} {reached}")
    if problems:
        raise together(problems)


def preparing_keys(trials: Trials, edges: Edges) -> list[str]:
    """The searched keys that reach more than the training of the searched model: the frames that it learns from.

    Trials that agree in them select and label the same frames, and the first of them does it for all.
    """
    found = []
    for key in trials.settings.space:
        some = _varying(key, edges)
        trained = _trained(trials, some)
        tested = {node.id for _, graph in some for node in graph.nodes.values() if trained.intersection(node.needs)}
        if _touched(some) - trained - tested:
            found.append(key)
    return found


def _varying(key: str, edges: Edges) -> Edges:
    """The edges that differ in this key alone."""
    first = edges[0][0]
    return [
        (values, graph)
        for values, graph in edges
        if all(values[other] == first[other] for other in first if other != key)
    ]


def _wrong_with(key: str, trials: Trials, some: Edges) -> tuple[str, str] | None:
    """What is wrong, and the cure."""
    out = "take it out of the space"
    touched = _touched(some)
    if ".validate_on" in key or key.split(".")[0] in ("test_sets", "evaluation") or touched & _judges(trials, some):
        return "it changes what trials are compared on, so their scores could not be compared", out
    if len({trials.name(values) for values, _ in some}) == 1 or not touched & _trained(trials, some):
        return f"{trials.settings.model} does not depend on it: all trials would be the same", out
    losses = [_losses(trials, values, graph) for values, graph in some]
    if all(loss == losses[0] for loss in losses) and key.split(".")[-1] in ("alpha", "gamma", "focal_weight"):
        kind = f"{key.rpartition('.')[0]}.kind"
        if kind not in trials.settings.space:
            return "the kind of the loss has no such term: all trials would be the same", f"set {kind}=combined"
    return None


def _only_above(key: str, trials: Trials, some: Edges) -> list[str] | None:
    """The stages that the key changes, where none of them is the searched model's own and the key does not say so."""
    own = {
        node
        for _, graph in some
        for nodes in graph.models.values()
        if nodes.of == trials.settings.model
        for node in (nodes.train, nodes.select, nodes.pseudo_label)
    }
    changed = _changed(some)
    return None if key.startswith("models.") or changed & own else sorted(map(str, changed))


def _touched(some: Edges) -> set[NodeId]:
    return {node for _, graph in some for node in graph.nodes} - shared_nodes(graph for _, graph in some)


def _changed(some: Edges) -> set[NodeId]:
    """The stages whose own settings differ; what stands on them is left out."""
    seen: dict[NodeId, Any] = {}
    return {
        node.id
        for _, graph in some
        for node in graph.nodes.values()
        if seen.setdefault(node.id, (node.recipe, node.seed)) != (node.recipe, node.seed)
    }


def _trained(trials: Trials, some: Edges) -> set[NodeId]:
    return {nodes.train for _, graph in some for nodes in graph.models.values() if nodes.of == trials.settings.model}


def _judges(trials: Trials, some: Edges) -> set[NodeId]:
    """The stages that make the frames which trials are compared on."""
    found = set()
    for values, graph in some:
        recipe, test = trials.recipe(values), trials.settings.test
        names = recipe.models[trials.settings.model].validate_on if test is None else [recipe.test_sets[test]]
        found |= {view.node for name in names for view in graph.datasets.get(name, ()) if isinstance(view, View)}
    return found


def _losses(trials: Trials, values: Mapping[str, Any], graph: Graph) -> dict[str, tuple[Any, ...]]:
    """What the losses of the models that are trained come to."""
    recipe = trials.recipe(values)
    return {name: _effective(recipe.loss_of(recipe.models[name])) for name in recipe.models if name in graph.models}


def _effective(loss: Loss) -> tuple[Any, ...]:
    share = loss.cross_entropy_share
    focal = None if share == 1 else (loss.gamma, loss.focal_weight if share else 1.0)
    return share, focal, *loss.model_dump(exclude={"kind", "alpha", "gamma", "focal_weight"}).items()
