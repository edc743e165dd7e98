"""Paths of local disks and network drives that work on other nodes needs: does every node see them?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from nightseg.cluster import ray as cluster
from nightseg.errors import UserError, first_of, together

SECONDS_TO_ANSWER = 60.0
Seen = dict[str, str]  # path -> what is wrong with it there; nothing for one that is as it should be


def check_places(needed: Mapping[str, str], shared: Mapping[str, bytes], say: Callable[[str], None]) -> None:
    """Raise UserError, naming key, path and nodes, unless every node that works sees them. One machine: no cost.

    needed: key of the request -> absolute local path that is there on this node. shared: file that this process wrote
    -> its content: elsewhere a folder of the same name would be another one. Connects to the cluster.
    """
    if not (needed or shared) or cluster.is_this_machine():
        return
    cluster.connect()
    nodes = working_nodes()
    if not nodes and cluster.may_grow():
        on_disk = [*needed.items(), *(("run folder", os.path.dirname(path)) for path in shared)]
        told = first_of([f"{key} ({path})" for key, path in on_disk])
        say(f"no node that works is there yet; those that are started must see what lies on a disk here: {told}")
    if not nodes.keys() - {this_node()}:
        return
    answers, silent = ask(nodes, sorted(set(needed.values())), dict(shared))
    if silent:
        say(f"whether {first_of(silent)} can read the data is not known: no answer within a minute")
    problems = [*_problems(needed.items(), answers), *_problems((("run folder", path) for path in shared), answers)]
    if problems:
        raise together(problems)


def working_nodes() -> dict[str, str]:
    """Nodes that are alive and have CPUs or GPUs: id -> address."""
    import ray

    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and any(node["Resources"].get(name, 0) > 0 for name in ("CPU", "GPU"))
    }


def this_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def ask(
    nodes: Mapping[str, str], paths: Sequence[str], shared: Mapping[str, bytes]
) -> tuple[dict[str, Seen], list[str]]:
    """What each node sees, by its address (numbered where several have one), and the nodes that do not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(looked_at)
    asked = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(paths, shared): node
        for node in nodes
    }
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=SECONDS_TO_ANSWER)
    names = {node: f"{address} ({node[:8]})" for node, address in nodes.items()}
    answers: dict[str, Seen] = {}
    silent = [names[asked[task]] for task in late]
    for task in ready:
        try:
            answers[names[asked[task]]] = ray.get(task)
        except ray.exceptions.RayError:  # the node is gone: it will not be asked to work, either
            silent.append(names[asked[task]])
    return answers, silent


def looked_at(paths: Sequence[str], shared: Mapping[str, bytes]) -> Seen:
    """What is wrong here with these paths, and with the files that should hold what another node wrote."""
    found = {}
    for path in paths:
        if not os.path.exists(path):
            found[path] = "is not there"
        elif not os.access(path, os.R_OK):
            found[path] = "may not be read"
    for path, content in shared.items():
        folder = os.path.dirname(path)
        try:
            with open(path, "rb") as stream:
                is_same = stream.read() == content
        except OSError:
            is_same = False
        if not is_same:
            found[path] = f"{folder} is not the folder that this run writes to"
        elif not os.access(folder, os.W_OK):
            found[path] = f"{folder} may not be written to"
    return found


def _problems(places: Iterable[tuple[str, str]], answers: Mapping[str, Seen]) -> list[UserError]:
    found = []
    for key, path in places:
        by_reason: dict[str, list[str]] = {}
        for node, seen in answers.items():
            if path in seen:
                by_reason.setdefault(seen[path], []).append(node)
        for reason, nodes in by_reason.items():
            what = reason if reason.startswith("/") else f"{path} {reason}"
            found.append(
                UserError(
                    f"{key}: {what} on {len(nodes)} of {len(answers)} nodes ({first_of(sorted(nodes))})",
                    cure="work runs on every node: mount it there under the same path, or use s3:// or gs://",
                )
            )
    return found
