"""The graph of translators that need no training and of evaluations; the recipes that compare all of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nightseg.cluster.settings import MapCompute
from nightseg.data.images import encode_png
from nightseg.data.settings import TranslatedDataset
from nightseg.pipeline.build import build_graph
from nightseg.pipeline.graph import Graph, Node, NodeId
from nightseg.pipeline.plan import plan
from nightseg.recipe import load_recipe
from nightseg.recipe.types import Recipe
from nightseg.storage import Location
from nightseg.translators.settings import UntrainedTranslator

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPE = """
name: made
taxonomy: camvid11
seed: 5
datasets:
  day: {layout: scenes, count: 4}
  pool: {layout: scenes, count: 4, labelled: false}
  pool_day: {split: pool, keep: day}
  night: {split: pool, keep: night}
  by_unit: {translate: day, by: unit}
  by_optics: {translate: day, by: optics}
  by_colour: {translate: day, by: colour}
  by_program: {translate: day, by: program}
translators:
  unit: {day: day, night: night}
  optics: {kind: photometric}
  colour: {kind: colour, day: pool_day, night: night}
  program: {kind: command, argv: [run, "{input}", "{output}"], timeout_seconds: 9}
models:
  first: {train: [day]}
  second: {train: [day, by_optics], start: first}
test_sets: {day: day}
translations:
  by_unit: {}
  by_optics: {real: night}
  by_colour: {}
"""


def recipe(folder: Path, *overrides: str) -> Recipe:
    (folder / "recipe.yaml").write_text(RECIPE)
    return load_recipe(folder / "recipe.yaml", overrides)


def graph(folder: Path, *overrides: str) -> Graph:
    return build_graph(recipe(folder, *overrides))


def names(made: Graph, stage: str) -> list[str]:
    return [node.name for node in made.nodes if node.stage == stage]


def settings(node: Node) -> str:
    return json.dumps(node.recipe, default=dict, sort_keys=True)


def test_only_unit_is_trained(tmp_path: Path) -> None:
    made = graph(tmp_path)
    assert names(made, "train_translator") == ["unit"]
    for name in ("by_optics", "by_colour", "by_program"):
        assert not any(need.stage == "train_translator" for need in made.nodes[NodeId("translate", name)].needs)


def test_passes_without_a_network_are_given_no_gpu(tmp_path: Path) -> None:
    """Neither asked for before they begin, nor held while they work. A program of the user may have use for one."""
    made = graph(tmp_path, "compute.map.gpus_per_actor=0.5", "compute.map.actors=2", "compute.train.gpus_per_worker=1")
    passes = {name: node for name, node in made.nodes.items() if isinstance(node.resources, MapCompute)}
    assert all(node.unhashed["compute"] == node.resources for node in passes.values())
    found: dict[float, set[str]] = {0.0: set(), 0.5: set()}
    for (stage, name), node in passes.items():
        found[node.resources.gpus_per_actor].add(f"{stage} {name}" if stage == "translate" else stage)
    assert found == {
        0.0: {
            "collect",
            "split",
            "translate by_optics",
            "translate by_colour",
            "translate by_colour.back",
            "evaluate_translation",
        },
        0.5: {"translate by_unit", "translate by_unit.back", "translate by_program", "predict", "score", "evaluate"},
    }


def test_the_frames_that_lend_their_light_are_inputs(tmp_path: Path) -> None:
    made = graph(tmp_path)
    day, pool = NodeId("collect", "day"), NodeId("split", "pool")
    colour = made.nodes[NodeId("translate", "by_colour")]
    assert colour.needs == (day, pool) and colour.takes == (day,)
    assert colour.recipe["style_images"] == ["split/pool:night"]
    back = made.nodes[NodeId("translate", "by_colour.back")]
    assert back.needs == (NodeId("translate", "by_colour"), pool) and back.recipe["style_images"] == ["split/pool:day"]
    assert back.recipe["to"] == "day"
    assert made.nodes[NodeId("translate", "by_optics")].needs == (day,)


def test_keys_hold_what_the_result_follows_from_and_nothing_else(tmp_path: Path) -> None:
    before = graph(tmp_path)

    def changed(*overrides: str) -> set[str]:
        after = graph(tmp_path, *overrides)
        same = {node for node in after.nodes if node in before.nodes}
        return {
            str(node)
            for node in same
            if settings(before.nodes[node]) != settings(after.nodes[node])
            or before.nodes[node].seed != after.nodes[node].seed
        }

    assert changed("translators.optics.sky=0.2") == {"translate/by_optics"}
    assert changed("translators.colour.nearest=2") == {"translate/by_colour", "translate/by_colour.back"}
    assert changed("translators.program.revision=2") == {"translate/by_program"}
    assert changed("translators.program.timeout_seconds=8") == set()
    assert changed("translators.program.to=[night, day]") == set()
    assert changed("translators.unit.kind=unit") == set()
    drawn = changed("seed=6")
    assert {"translate/by_optics", "translate/by_colour", "translate/by_program"} <= drawn
    assert "translate/by_unit" not in drawn and "evaluate_translation/by_optics" not in drawn
    unit = before.nodes[NodeId("train_translator", "unit")].recipe
    assert "kind" not in unit and before.nodes[NodeId("translate", "by_unit")].seed == 0


def test_an_evaluation_stands_on_features_masks_and_the_way_back(tmp_path: Path) -> None:
    made = graph(tmp_path)
    assert names(made, "evaluate_translation") == ["by_unit", "by_optics", "by_colour"]
    needs = {str(need) for need in made.nodes[NodeId("evaluate_translation", "by_unit")].needs}
    assert needs == {
        "translate/by_unit",
        "collect/day",
        "score/by_unit.efficientnet_lite0",
        "score/day.efficientnet_lite0",
        "score/night.efficientnet_lite0",
        "predict/first.by_unit",
        "predict/first.day",
        "predict/first.by_unit.back",
    }
    assert made.nodes[NodeId("predict", "first.by_unit.back")].needs[0] == NodeId("translate", "by_unit.back")
    assert NodeId("translate", "by_optics.back") not in made.nodes  # optics know no way back
    assert NodeId("predict", "first.by_program") not in made.nodes  # nobody asked
    # Source and real frames are measured once for all translations.
    assert len(names(made, "score")) == 5 and len(names(made, "predict")) == 6
    _, facts = made.translations["by_optics"]
    assert facts == {
        "translator": "optics", "kind": "photometric", "to": "night", "source": "day", "segmenter": "first",
        "real": "night",
    }  # fmt: skip


def test_nothing_is_evaluated_unless_it_is_asked_for(tmp_path: Path) -> None:
    asked = recipe(tmp_path, "translations={}")
    stages = {node.stage for node in build_graph(asked).nodes}
    assert not stages & {"evaluate_translation", "score", "predict"}
    assert not any("." in node.name for node in build_graph(asked).nodes if node.stage == "translate")
    only = build_graph(recipe(tmp_path), "second")
    assert "evaluate_translation" not in {node.stage for node in only.nodes}


def test_distances_use_the_features_of_the_selections(tmp_path: Path) -> None:
    choice = "models.second.self_training={pool: night, select: {count: 2, extractor: resnet18, reference: by_optics}}"
    made = graph(tmp_path, choice)
    assert set(names(made, "score")) == {
        f"{name}.resnet18" for name in ("night", "by_optics", "by_unit", "day", "by_colour")
    }
    own = graph(tmp_path, choice, "translations.by_unit.extractor=efficientnet_lite0")
    assert {"by_unit.efficientnet_lite0", "by_optics.resnet18"} <= set(names(own, "score"))


# -- the recipes of the project ---------------------------------------------------------------------------------------


def kinds(found: Recipe) -> dict[str, str]:
    translated = {
        name: dataset.by for name, dataset in found.datasets.items() if isinstance(dataset, TranslatedDataset)
    }
    return {name: found.translators[by].kind for name, by in translated.items()}


def test_translators_yaml_compares_every_way_on_equal_terms(tmp_path: Path) -> None:
    found = load_recipe(CONFIGS / "translators.yaml")
    made = build_graph(found)
    compared = {name: kind for name, kind in kinds(found).items() if name.startswith("by_")}
    assert set(compared.values()) == {"unit", "photometric", "fourier", "colour"}
    assert set(found.translations) == set(made.translations) == set(compared)
    assert names(made, "train_translator") == ["unit"]
    further = [name for name in found.models if name != "day_only"]
    trainings = {str(found.models[name].training) for name in further}
    assert len(trainings) == 1 and {found.models[name].start for name in further} == {"day_only"}
    for dataset in compared:
        assert any(dataset in found.models[name].train for name in further), dataset
    for name in further:
        assert {"night", "day"} <= set(made.models[name].tests)
    assert {"converted", "converted_by_colour"} <= set(made.models["day_only"].tests)
    assert {line.state for line in plan(found, Location.of(tmp_path / "run"))} == {"runs", "waits"}


def test_camvid_translators_yaml_fits_the_folders_of_camvid(tmp_path: Path) -> None:
    image, label = np.full((8, 16, 3), 90, np.uint8), np.full((8, 16), 3, np.uint8)
    for split in ("train", "val", "test"):
        for kind, array in (("images", image), ("labels", label)):
            (tmp_path / f"day/{split}/{kind}").mkdir(parents=True)
            (tmp_path / f"day/{split}/{kind}/0001_f.png").write_bytes(encode_png(array))
    (tmp_path / "dusk/unlabelled/images").mkdir(parents=True)
    (tmp_path / "dusk/unlabelled/images/a.png").write_bytes(encode_png(image))
    found = load_recipe(CONFIGS / "camvid_translators.yaml", [f"roots.camvid={tmp_path}"])
    made = build_graph(found)
    assert set(found.translations) == set(made.translations) == set(kinds(found))
    assert sorted(names(made, "train_translator")) == ["unit", "unit_plain"]
    weights = [found.translators[name].weights.perceptual for name in ("unit", "unit_plain")]  # type: ignore[union-attr]
    assert weights == [0.1, 0.0]
    for name, settings in found.translators.items():
        if isinstance(settings, UntrainedTranslator):
            assert f"by_{name}" in made.datasets


def test_the_recipe_of_the_manual_is_right(tmp_path: Path) -> None:
    manual = (CONFIGS.parent / "docs/translators.md").read_text()
    block = manual.partition("```yaml\n")[2].partition("```")[0]
    rest = """
name: manual
taxonomy: camvid11
models: {day_only: {train: [day]}}
"""
    frames = "".join(
        f"  {name}: {{layout: scenes, count: 2}}\n" for name in ("day", "pool_day", "pool_night", "night_test")
    )
    (tmp_path / "recipe.yaml").write_text(rest + block.replace("datasets:\n", f"datasets:\n{frames}", 1))
    made = build_graph(load_recipe(tmp_path / "recipe.yaml"))
    assert names(made, "evaluate_translation") == ["day_at_night"] and "converted" in made.datasets


@pytest.mark.parametrize("name", [file.name for file in sorted(CONFIGS.glob("*.yaml"))])
def test_every_recipe_is_named_after_its_file(name: str) -> None:
    assert (CONFIGS / name).read_text().partition("\nname: ")[2].startswith(Path(name).stem + "\n")
