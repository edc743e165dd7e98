"""Every field of a recipe reaches a stage, and the stage's key; a field that is added later without that fails here.

The stages are replaced by recorders. Each field of the types, in turn, gets another value, and what the stages are
given must differ from before: the very settings, the frames (by id), the commits (by node).
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import pyarrow as pa
import pytest
from pydantic import BaseModel

from nightseg.data.table import frame_table
from nightseg.pipeline import build
from nightseg.pipeline.build import build_graph
from nightseg.pipeline.graph import NodeId
from nightseg.recipe import load_recipe
from nightseg.recipe.types import Recipe
from nightseg.storage import Location

RECIPE = """
name: wired
taxonomy: camvid11
datasets:
  folder: {layout: images, root: ROOT, labelled: false}
  scenes: {layout: scenes, count: 4}
  pool: {layout: scenes, count: 4, labelled: false}
  pool2: {layout: scenes, count: 4, labelled: false, first: 9}
  day: {split: pool, keep: day, margin: 0.3}
  night: {split: pool, keep: night}
  both: {join: [scenes, test]}
  by_unit: {translate: scenes, by: unit}
  by_optics: {translate: scenes, by: optics}
  by_fourier: {translate: scenes, by: fourier}
  by_colour: {translate: scenes, by: colour}
  by_program: {translate: scenes, by: program}
  test: {layout: scenes, count: 2, first: 100}
translators:
  unit: {day: day, night: night}
  optics: {kind: photometric}
  fourier: {kind: fourier, night: night, day: day}
  colour: {kind: colour, night: night, day: day}
  program: {kind: command, argv: [run, "{input}", "{output}"]}
models:
  first: {train: [both], validate_on: [test]}
  second:
    train: [scenes, by_unit]
    start: first
    network: {encoder: resnet18}
    loss: {kind: combined}
    training: {epochs: 2}
    self_training:
      pool: pool
      teacher: third
      select: {count: 2, reference: by_optics, extractor: {name: efficientnet_lite0}}
      threshold: {kind: fixed}
      inference: {flip: true}
    test: {night: {row: "1", published_miou: 30.0}}
  third: {train: [test]}
test_sets: {night: test, other: scenes}
predictions: {shown: {dataset: pool, model: second}}
translations:
  by_unit: {segmenter: first, real: night, extractor: {name: efficientnet_lite0}}
"""
SPLITS: Final = ("day", "night", "twilight", "unknown")

# Names of other parts of the recipe: another one of the same kind.
OTHER_NAMES: Final[Mapping[str, Any]] = {
    "datasets.day.split": "pool2", "datasets.night.split": "pool2", "datasets.both.join": ["scenes"],
    "datasets.by_unit.translate": "test", "datasets.by_optics.translate": "test",
    "datasets.by_fourier.translate": "test", "datasets.by_colour.translate": "test",
    "datasets.by_program.translate": "test", "datasets.by_unit.by": "optics", "datasets.by_optics.by": "fourier",
    "datasets.by_fourier.by": "optics", "datasets.by_colour.by": "optics", "datasets.by_program.by": "optics",
    "translators.unit.day": "pool2", "translators.unit.night": "pool2", "translators.fourier.night": "pool2",
    "translators.colour.night": "pool2",
    "models.first.train": ["test"], "models.first.validate_on": ["scenes"], "models.first.start": "scratch",
    "models.second.train": ["scenes"], "models.second.validate_on": ["scenes"], "models.second.start": "scratch",
    "models.second.rounds": 2, "models.second.self_training.pool": "pool2",
    "models.second.self_training.teacher": None, "models.second.self_training.select.reference": "test",
    "models.second.self_training.select.method": "pooled", "models.first.test": {},
    "test_sets": {"night": "scenes", "other": "scenes"},
    "predictions.shown.dataset": "night", "predictions.shown.model": "first",
    "translations.by_unit.segmenter": "second", "translations.by_unit.real": "day", "taxonomy": "cityscapes19",
}  # fmt: skip

# Fields that no stage is given, and why.
NOT_PASSED: Final = {
    "name": "the run folder is called so",
    "roots": "they stand in the roots of datasets when the recipe is loaded",
    "models.first.rounds": "repeats a self-training, and there is none",
    "models.first.self_training": "shown by the second model",
    "models.first.network": "the recipe's, shown by `network`",
    "models.first.loss": "the recipe's",
    "models.first.training": "the recipe's",
    **{
        f"models.third.{key}": "shown by the first model"
        for key in (
            *("train", "validate_on", "start", "rounds", "self_training", "network", "loss", "training", "test"),
        )
    },
    "models.second.test.night.row": "of the results",
    "models.second.test.night.published_miou": "of the results",
    "translators.fourier.day": "there is no dataset translated to day",
    "translators.colour.day": "of the way back, which is judged only where it is asked for",
    "datasets.day.keep": "shown by night",
}

# Fields that a stage is given, and its result does not follow from.
NOT_IN_KEYS: Final = (
    *("train.cpus_per_worker", "train.gpus_per_worker", "train.max_failures"),
    *("map.actors", "map.cpus_per_actor", "map.gpus_per_actor", "map.batch"),
    *("training.checkpoint_every", "training.preset", "unit.preset", "unit.collapse_after"),
    *("program.timeout_seconds", "translators.program.to"),
    "second.network.encoder_weights",  # it starts from another model
)


# -- recorders --------------------------------------------------------------------------------------------------------


class MadeUpCommit:
    """Has a frame of each domain, called after the node."""

    def __init__(self, node: NodeId) -> None:
        self.node, self.folder = node, Location.of("/made/up")

    def table(self, name: str) -> pa.Table:
        return frame_table({"frame_id": f"{self.node}:{d}", "uri": f"{self.node}/{d}", "domain": d} for d in SPLITS)

    def __repr__(self) -> str:
        return f"commit of {self.node}"


class Commits(dict[NodeId, Any]):
    def __missing__(self, node: NodeId) -> MadeUpCommit:
        return MadeUpCommit(node)


def shown(value: Any) -> Any:
    match value:
        case pa.Table():
            return value["frame_id"].to_pylist()
        case Mapping():
            return {key: shown(part) for key, part in value.items()}
        case BaseModel():
            return value
        case tuple() if hasattr(value, "_asdict"):
            return {key: shown(part) for key, part in value._asdict().items()}
        case _:
            return repr(value) if isinstance(value, MadeUpCommit) else value


STAGES: Final = (
    *("collect", "split", "train_translator", "translate", "train_segmenter", "score", "select", "pseudo_label"),
    *("evaluate", "predict", "evaluate_translation"),
)


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> None:
    def recorder(*arguments: Any, **named: Any) -> Any:
        return [shown(value) for value in arguments], {name: shown(value) for name, value in named.items()}

    for stage in STAGES:
        monkeypatch.setattr(getattr(build, stage), stage, recorder)
    monkeypatch.setattr(build.layouts, "fingerprint", repr)
    monkeypatch.setattr(build.layouts, "count", lambda dataset: 1)
    monkeypatch.setattr(build, "start_sha256", lambda start: start)
    monkeypatch.setattr(build.train_segmenter, "check_network", lambda network, name: None)


def given(recipe: Recipe) -> dict[str, Any]:
    """What every stage is given."""
    return {
        str(node.id): node.work(Commits(), None, None)  # type: ignore[arg-type]
        for node in build_graph(recipe).nodes.values()
    }


def keys(recipe: Recipe) -> dict[str, Any]:
    return {str(node.id): (node.recipe, node.seed) for node in build_graph(recipe).nodes.values()}


# -- fields -----------------------------------------------------------------------------------------------------------


def fields(value: BaseModel, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Path, annotation and value of every field that is no settings object itself."""
    for name, info in type(value).model_fields.items():
        child, place = getattr(value, name), (*path, name)
        if isinstance(child, BaseModel):
            yield from fields(child, place)
        elif isinstance(child, dict) and child and all(isinstance(part, BaseModel) for part in child.values()):
            for key, part in child.items():
                yield from fields(part, (*place, key))
        else:
            yield place, info.annotation, child


def another(annotation: Any, value: Any) -> Any:
    """A value of the type that is not this one."""
    kind = get_origin(annotation)
    if kind is Annotated:
        return another(get_args(annotation)[0], value)
    if kind in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        return another(options[0], value)
    if kind is Literal:
        return next((option for option in get_args(annotation) if option != value), value)
    if kind is dict:
        return {another(get_args(annotation)[0], next(iter(value or ()), None)): 0.5}
    if kind in (list, tuple) or isinstance(value, list | tuple):
        inner = get_args(annotation)[0] if get_args(annotation) else str
        parts = [another(inner, part) for part in value or [None]]
        return tuple(parts) if kind is tuple else parts
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.model_construct()
    match annotation:
        case _ if annotation is bool:
            return not value
        case _ if annotation is int:
            return (value or 0) + 1
        case _ if annotation is float:
            return (value or 0.25) / 2
        case _ if annotation is str:
            return f"{value or ''}x"
    raise AssertionError(f"no other value known for {annotation}")


def changed(recipe: Any, path: tuple[str, ...], value: Any) -> Any:
    first, rest = path[0], path[1:]
    if isinstance(recipe, dict):
        return recipe | {first: changed(recipe[first], rest, value) if rest else value}
    return recipe.model_copy(update={first: changed(getattr(recipe, first), rest, value) if rest else value})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("wired")
    (folder / "a.png").write_bytes(b"")
    (folder / "recipe.yaml").write_text(RECIPE.replace("ROOT", str(folder)))
    return load_recipe(folder / "recipe.yaml")


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # values that no recipe file could bring
def test_every_field_of_a_recipe_arrives_at_a_stage_and_in_its_key(recipe: Recipe) -> None:
    """One test for all fields, because the list of them is only known when the recipe is read."""
    before, keys_before = given(recipe), keys(recipe)
    lost, unhashed, hashed, count = [], [], [], 0
    for path, annotation, value in fields(recipe):
        name = ".".join(path)
        if name in NOT_PASSED:
            continue
        new = OTHER_NAMES[name] if name in OTHER_NAMES else another(annotation, value)
        if new == value:
            assert get_origin(annotation) is Literal, name  # the only value there is
            continue
        other = changed(recipe, path, new)
        arrived, in_key = given(other) != before, keys(other) != keys_before
        count += 1
        if not arrived:
            lost.append(f"{name}: {value!r} -> {new!r}")
        if not in_key and not name.endswith(NOT_IN_KEYS):
            unhashed.append(name)
        if in_key and name.endswith(NOT_IN_KEYS):
            hashed.append(name)
    assert not lost, "no stage is given:\n" + "\n".join(lost)
    assert not unhashed, "not in any key:\n" + "\n".join(unhashed)
    assert not hashed, "in a key, though the result does not follow from it:\n" + "\n".join(hashed)
    assert count > 150
    assert set(NOT_PASSED) | set(OTHER_NAMES) <= {".".join(path) for path, _, _ in fields(recipe)}


# -- single connections -----------------------------------------------------------------------------------------------


def test_a_selection_is_told_the_test_sets_and_what_translations_were_made_from(recipe: Recipe) -> None:
    told = given(recipe)["select/second"][1]
    scenes, test = [f"collect/scenes:{domain}" for domain in SPLITS], [f"collect/test:{domain}" for domain in SPLITS]
    assert told["test_frames"] == {"night": test, "other": scenes}
    assert told["reference_frames"] == scenes  # by_optics is made of them
    assert told["reference_scores"] == "commit of score/by_optics.efficientnet_lite0"
    assert told["selection"] is recipe.models["second"].self_training.select  # type: ignore[union-attr]
    assert told["seed"] == recipe.seed


def test_a_selection_hands_on_as_many_frames_as_it_chooses(recipe: Recipe) -> None:
    nodes = build_graph(recipe).nodes
    assert nodes[NodeId("select", "second")].most_rows == 2
    assert {node.most_rows for node in nodes.values() if node.id.stage != "select"} == {None}


@pytest.mark.parametrize("stage", ["train_segmenter/second", "pseudo_label/second", "evaluate/second", "predict/shown"])
def test_settings_arrive_as_they_are(recipe: Recipe, stage: str) -> None:
    model, told = recipe.models["second"], given(recipe)[stage][1]
    learning = model.self_training
    assert learning is not None
    expected = {
        "train_segmenter/second": {"network": model.network, "loss": model.loss, "training": model.training},
        "pseudo_label/second": {"threshold": learning.threshold, "inference": learning.inference},
        "evaluate/second": {"evaluation": recipe.evaluation, "inference": recipe.inference},
        "predict/shown": {"inference": recipe.inference},
    }[stage]
    for name, value in expected.items():
        assert told[name] is value, name


def test_frames_arrive_in_order_and_of_one_domain(recipe: Recipe) -> None:
    told = given(recipe)
    trained = told["train_segmenter/second"][1]
    everything = [
        f"{node}:{d}" for node in ("collect/scenes", "translate/by_unit", "pseudo_label/second") for d in SPLITS
    ]
    assert trained["train"] == everything and trained["start"] == "commit of train_segmenter/first"
    assert told["train_translator/unit"][1]["day"] == ["split/pool.margin-0.3:day"]
    assert told["train_translator/unit"][1]["night"] == ["split/pool:night"]
    assert list(told["evaluate/second"][1]["tests"]) == ["night"]
