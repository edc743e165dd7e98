"""What is left of a run follows from what its stages have cost; what nobody knows is told as such."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nightseg.pipeline.build import build_graph
from nightseg.pipeline.graph import NodeId, frames_at_most
from nightseg.pipeline.time_left import time_left
from nightseg.recipe import load_recipe

RECIPE = """
name: r
taxonomy: camvid11
datasets:
  day: {layout: scenes, count: 10}
  test: {layout: scenes, count: 40, first: 50}
network: {encoder: efficientnet_lite0}
training: {epochs: 2, batch: 5, crop: [32, 32]}
models:
  one: {train: [day], start: scratch}
  two: {train: [day], start: one, training: {epochs: 6}}
test_sets: {night: test}
"""


@pytest.fixture
def told(tmp_path: Path) -> Any:
    (tmp_path / "r.yaml").write_text(RECIPE)
    graph = build_graph(load_recipe(tmp_path / "r.yaml"))
    rows = frames_at_most(graph)
    assert rows[NodeId("collect", "test")] == rows[NodeId("evaluate", "one")] == 40

    def left(costs: dict[str, float]) -> str:
        commits = {NodeId(*name.split("/")): SimpleNamespace(seconds=seconds) for name, seconds in costs.items()}
        open_nodes = [node for node in graph.nodes.values() if node.id not in commits]
        return time_left(open_nodes, graph.nodes, commits, rows)  # type: ignore[arg-type]

    return left


def test_nothing_is_known_at_first(told: Any) -> None:
    assert told({}) == "" and told({"collect/day": 2.0}) == "at least 8 s, and what is not known yet: " + (
        "train_segmenter, evaluate"
    )


def test_costs_follow_the_work(told: Any) -> None:
    # `two` has three times the steps of `one`; each evaluation sees as many frames
    costs = {"collect/day": 1.0, "collect/test": 4.0, "train_segmenter/one": 20.0}
    assert told(costs) == "at least 1 min 0 s, and what is not known yet: evaluate"
    assert told(costs | {"evaluate/one": 5.0}) == "about 1 min 5 s"
    assert told(costs | {"evaluate/one": 5.0, "train_segmenter/two": 50.0}) == "about 5 s"
