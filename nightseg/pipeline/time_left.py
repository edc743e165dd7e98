"""How long a run will still take, by what its stages have cost so far: in this run, or where they are committed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nightseg.pipeline.graph import Node, NodeId
from nightseg.progress import duration
from nightseg.storage import Commit

_LITTLE = 1.0  # seconds that a stage of an unknown rate is not worth telling for: none of those that only sort


def work_of(node: Node, rows: int | None) -> float | None:
    """The work of a node, comparable among those of its stage: pixels of crops, or frames. None: not known yet."""
    settings: Any = node.settings.get("training") or node.settings.get("settings")
    if settings is None:
        return None if rows is None else float(rows)
    if node.id.stage == "train_segmenter":
        of_epoch = settings.steps_per_epoch if rows is None else settings.steps_of_epoch(rows)
        frames = settings.batch
        if teaching := node.settings.get("teaching"):
            frames += 2 * teaching.online.frames(settings)  # seen by the teacher, then learned
        return None if of_epoch is None else settings.epochs * of_epoch * frames * settings.crop[0] * settings.crop[1]
    if node.id.stage == "train_translator":
        return float(settings.iterations * settings.batch * settings.crop[0] * settings.crop[1])
    return None if rows is None else float(rows)


def time_left(
    left: Iterable[Node],
    known: Mapping[NodeId, Node],
    commits: Mapping[NodeId, Commit],
    rows: Mapping[NodeId, int | None],
    together: Callable[[Mapping[NodeId, float]], float] = lambda seconds: sum(seconds.values()),
) -> str:
    """In words, from the costs of the `known` nodes that have commits; "" if nothing is known.

    `together`: the seconds of all nodes from those of each, by default one after the other.
    A stage of a kind that has not been done yet costs nobody knows what: then it is told as a lower bound.
    """
    seconds, work = defaultdict[str, float](float), defaultdict[str, float](float)
    for node_id, commit in commits.items():
        if (node := known.get(node_id)) and (done := work_of(node, rows.get(node_id))):
            seconds[node_id.stage] += commit.seconds
            work[node_id.stage] += done
    costs, unknown = dict[NodeId, float](), dict[str, None]()
    for node in left:
        asked = work_of(node, rows.get(node.id))
        if asked is None or not work[node.id.stage]:
            unknown[node.id.stage] = None
        costs[node.id] = seconds[node.id.stage] / work[node.id.stage] * asked if asked and work[node.id.stage] else 0.0
    total = together(costs)
    if unknown and total < _LITTLE:
        return ""
    more = (
        f"at least {duration(total)}, and what is not known yet: {', '.join(unknown)}" if unknown else duration(total)
    )
    return f"about {more}" if not unknown else more
