"""Every field of a recipe reaches a stage, and the stage's key; a field that is added later without that fails here.

The stages are replaced by recorders. Each field of the types, in turn, gets another value, and what the stages are
given must differ from before: the very settings, the frames (by id), the commits (by node).
"""

from __future__ import annotations

import functools
import inspect
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import pyarrow as pa
import pytest
from pydantic import BaseModel

from nightseg.cluster.settings import MapCompute
from nightseg.data.settings import FolderDataset
from nightseg.data.sources import Video
from nightseg.data.table import frame_table
from nightseg.pipeline import build
from nightseg.pipeline.build import build_graph
from nightseg.pipeline.graph import Frames, Given, Node, NodeId
from nightseg.recipe import load_recipe
from nightseg.recipe.types import Evaluation, Recipe
from nightseg.segmenter.settings import Inference
from nightseg.selection.settings import Selection
from nightseg.storage import Location, hash_of

RECIPE = """
name: wired
seed: 5
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
  by_fresh: {translate: scenes, by: optics, fresh: true}
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
    train: {scenes: 1.0, by_unit: 2.0, by_fresh: 0.5}
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
  adapted: {start: first, adapt_norms: {pool: night}}
  taught:
    train: [scenes]
    start: first
    training: {ema_decay: 0.5}
    self_training:
      mode: online
      pool: pool
      select: {count: 2, reference: by_optics, extractor: {name: efficientnet_lite0}}
      threshold: {kind: class_balanced}
      never_below: {sky: [road]}
      online: {masked: {}, batch: 4}
test_sets: {night: test, other: scenes}
predictions: {shown: {dataset: pool, model: second}}
consistency: {dataset: night, count: 3}
claims: {better: {says: so, pairs: [[second, first]], test: night}}
translations:
  by_unit: {segmenter: first, real: night, extractor: {name: efficientnet_lite0}}
"""
SPLITS: Final = ("day", "night", "twilight", "unknown")

# Names of other parts of the recipe: another one of the same kind.
OTHER_NAMES: Final[Mapping[str, Any]] = {
    "datasets.folder.layout": "nexet", "datasets.folder.split_list": "list.txt",
    "datasets.folder.taxonomy": "cityscapes19",
    "datasets.day.split": "pool2", "datasets.night.split": "pool2", "datasets.both.join": ["scenes"],
    "datasets.by_unit.translate": "test", "datasets.by_optics.translate": "test",
    "datasets.by_fourier.translate": "test", "datasets.by_colour.translate": "test",
    "datasets.by_program.translate": "test", "datasets.by_unit.by": "optics", "datasets.by_optics.by": "fourier",
    "datasets.by_fourier.by": "optics", "datasets.by_colour.by": "optics", "datasets.by_program.by": "optics",
    "translators.unit.day": "pool2", "translators.unit.night": "pool2", "translators.fourier.night": "pool2",
    "translators.colour.night": "pool2",
    "models.first.train": ["test"], "models.first.validate_on": ["scenes"], "models.first.start": "scratch",
    "models.second.train": ["scenes"], "models.second.validate_on": ["scenes"], "models.second.start": "scratch",
    "datasets.by_fresh.translate": "test", "datasets.by_fresh.fresh": False,
    "models.adapted.start": "second", "models.adapted.adapt_norms.pool": "pool2",
    "models.second.rounds": 2, "models.second.self_training.pool": "pool2",
    "models.second.self_training.teacher": None, "models.second.self_training.select.reference": "test",
    "models.second.self_training.select.method": "pooled", "models.first.test": {},
    "models.taught.train": ["test"], "models.taught.validate_on": ["scenes"], "models.taught.start": "third",
    "models.taught.rounds": 2, "models.taught.test": {}, "models.taught.self_training.pool": "pool2",
    "models.taught.self_training.select.reference": "test", "models.taught.self_training.select.method": "pooled",
    "models.second.self_training.never_below": {"sky": ["road"]},
    "models.taught.self_training.never_below": {"sky": ["road", "car"]},
    "models.taught.self_training.online.guard.range": (0.6, 1.6),
    "test_sets": {"night": "scenes", "other": "scenes"},
    "consistency.dataset": "pool", "predictions.shown.dataset": "night", "predictions.shown.model": "first",
    "translations.by_unit.segmenter": "second", "translations.by_unit.real": "day", "taxonomy": "cityscapes19",
}  # fmt: skip

# Fields that no stage is given, and why.
NOT_PASSED: Final = {
    "leaks": "read by the run itself, before anything is trained",
    "allow_download": "read by the run itself: tests/networks/test_downloads.py",
    "name": "the run folder is called so",
    "base": "filled in when the recipe is loaded",
    "roots": "they stand in the roots of datasets when the recipe is loaded",
    "models.first.rounds": "repeats a self-training, and there is none",
    "models.first.self_training": "shown by the second model",
    "models.second.self_training.guard": "there is no round before it: tests/pipeline/test_build.py",
    "models.taught.self_training.guard": "its guard is online.guard",
    "models.first.network": "the recipe's, shown by `network`",
    "models.first.loss": "the recipe's",
    "models.first.training": "the recipe's",
    **{
        f"models.third.{key}": "shown by the first model"
        for key in (
            *(
                "train",
                "validate_on",
                "start",
                "rounds",
                "self_training",
                "network",
                "loss",
                "training",
                "test",
                "seeds",
            ),
        )
    },
    **{f"models.{model}.about": "of the results" for model in ("first", "second", "third", "taught")},
    **{f"models.{model}.adapt_norms": "shown by adapted" for model in ("first", "second", "third", "taught")},
    **{
        f"models.adapted.{key}": "nothing is trained"
        for key in (
            "train",
            "validate_on",
            "rounds",
            "self_training",
            "network",
            "loss",
            "training",
            "test",
            "about",
            "seeds",
        )
    },
    **{f"claims.better.{key}": "of the results: tests/report/test_comparison.py" for key in ("says", "pairs", "test")},
    "models.taught.network": "shown by `network`",
    "models.taught.loss": "shown by `loss`",
    "models.taught.self_training.teacher": "mode online has none but itself",
    "models.taught.self_training.weight": "mode online says it in `online`",
    "models.taught.self_training.inference": "mode online says it in `online`",
    "models.second.self_training.online": "of the mode online, shown by the model taught",
    "models.second.test.night.row": "of the results",
    "models.second.test.night.published_miou": "of the results",
    "translators.fourier.day": "there is no dataset translated to day",
    "translators.colour.day": "of the way back, which is judged only where it is asked for",
    "compute.concurrent": "of the schedule of a run",
    "compute.input_cache_gib": "of all processes of a run; the results are the same",
    "datasets.day.keep": "shown by night",
    "datasets.by_fresh.by": "only optics translate anew",
    "datasets.by_fresh.to": "optics make night",
    **{
        f"datasets.by_{name}.fresh": "shown by by_fresh, and only for what a model trains on"
        for name in ("unit", "optics", "fourier", "colour", "program")
    },
}

# Fields that a stage is given, and its result does not follow from.
NOT_IN_KEYS: Final = (
    *("train.cpus_per_worker", "train.gpus_per_worker", "train.min_workers", "train.max_failures"),
    *("map.actors", "map.cpus_per_actor", "map.gpus_per_actor", "map.batch"),
    *("training.checkpoint_every", "training.preset", "unit.preset", "unit.collapse_after"),
    *("program.timeout_seconds", "translators.program.to"),
    "second.network.encoder_weights",  # it starts from another model
)


# -- recorders --------------------------------------------------------------------------------------------------------


@functools.cache
def frames_of(node: str) -> pa.Table:
    return frame_table({"frame_id": f"{node}:{d}", "uri": f"{node}/{d}", "domain": d} for d in SPLITS)


class MadeUpCommit:
    """Has a frame of each domain, called after the node."""

    def __init__(self, node: NodeId) -> None:
        self.node, self.folder = node, Location.of("/made/up")

    def table(self, name: str) -> pa.Table:
        return frames_of(str(self.node))

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
    "adapt_norms",
    *("collect", "split", "train_translator", "translate", "train_segmenter", "score", "select"),
    *("label", "pseudo_label"),
    *("evaluate", "consistency", "predict", "evaluate_translation"),
)


@pytest.fixture(autouse=True)
def recorders(monkeypatch: pytest.MonkeyPatch) -> None:
    def recorder(*arguments: Any, **named: Any) -> Any:
        return [shown(value) for value in arguments], {name: shown(value) for name, value in named.items()}

    for stage in STAGES:
        module = getattr(build, stage)
        monkeypatch.setattr(module, stage, functools.wraps(getattr(module, stage))(functools.partial(recorder)))
    monkeypatch.setattr(build.layouts, "fingerprint", repr)
    monkeypatch.setattr(build.layouts, "count", lambda dataset: 1)
    monkeypatch.setattr(build, "start_sha256", lambda start: start)
    for check in ("check_network", "check_online"):
        monkeypatch.setattr(build.train_segmenter, check, lambda *settings: None)


def given_and_keys(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any]]:
    """What every stage is given, and what its key is made from."""
    nodes = build_graph(recipe).nodes.values()
    told = {str(node.id): node.work(Commits(), None, None) for node in nodes}  # type: ignore[arg-type]
    return told, {str(node.id): (node.recipe, node.seed) for node in nodes}


def given(recipe: Recipe) -> dict[str, Any]:
    return given_and_keys(recipe)[0]


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
    return loaded(tmp_path_factory.mktemp("wired"), RECIPE)


def loaded(folder: Path, text: str) -> Recipe:
    (folder / "a.png").write_bytes(b"")
    (folder / "list.txt").write_text("a")
    (folder / "recipe.yaml").write_text(text.replace("ROOT", str(folder)))
    return load_recipe(folder / "recipe.yaml")


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # values that no recipe file could bring
def test_every_field_of_a_recipe_arrives_at_a_stage_and_in_its_key(recipe: Recipe) -> None:
    """One test for all fields, because the list of them is only known when the recipe is read."""
    before, keys_before = given_and_keys(recipe)
    lost, unhashed, hashed, count = [], [], [], 0
    for path, annotation, value in fields(recipe):
        name = ".".join(path)
        if name in NOT_PASSED:
            continue
        new = OTHER_NAMES[name] if name in OTHER_NAMES else another(annotation, value)
        if new == value:
            assert get_origin(annotation) is Literal, name  # the only value there is
            continue
        told, made = given_and_keys(changed(recipe, path, new))
        arrived, in_key = told != before, made != keys_before
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


def test_a_selection_is_told_what_to_be_close_to(recipe: Recipe) -> None:
    told = given(recipe)["select/second"][1]
    assert told["reference_scores"] == "commit of score/by_optics.efficientnet_lite0"
    assert told["selection"] is recipe.models["second"].self_training.select  # type: ignore[union-attr]
    assert told["seed"] == recipe.seed


def test_frames_arrive_in_order_and_of_one_domain(recipe: Recipe) -> None:
    told = given(recipe)
    trained = told["train_segmenter/second"][1]
    parts = {"scenes": "collect/scenes", "by_unit": "translate/by_unit", "by_fresh": "collect/scenes"}
    parts[build.PSEUDO_LABELS] = next(node for node in told if node.startswith("label/third.pool.second."))
    assert trained["train"] == {part: [f"{node}:{d}" for d in SPLITS] for part, node in parts.items()}
    assert trained["kept"] == {build.PSEUDO_LABELS: "commit of pseudo_label/second"}
    assert trained["weights"] == {"scenes": 1.0, "by_unit": 2.0, "by_fresh": 0.5, build.PSEUDO_LABELS: 1.0}
    assert (
        trained["fresh"] == {"by_fresh": recipe.translators["optics"]}
        and trained["start"] == "commit of train_segmenter/first"
    )
    assert told["train_translator/unit"][1]["day"] == ["split/pool.margin-0.3:day"]
    assert told["train_translator/unit"][1]["night"] == ["split/pool:night"]
    assert list(told["evaluate/second"][1]["tests"]) == ["night"]


# -- the whole graph --------------------------------------------------------------------------------------------------

# Two more ways to choose frames: by positions, near the translated frames that are trained on, and near nothing.
MORE = """
  fourth:
    train: [by_colour]
    start: third
    self_training: {pool: night, select: {method: spatial, count: 3, extractor: {name: efficientnet_lite0}}}
  fifth:
    train: [test]
    start: third
    self_training: {pool: both, select: {method: random, count: 1, extractor: {name: efficientnet_lite0}}}
"""

# A node and its arguments; those that are no part of its key; facts of its key; how many frames, known beforehand. Left
# out: what is null, and what all nodes of a kind have (name, taxonomy, compute, max_bad_fraction, shard_rows, seed).
GRAPH = """
collect/folder dataset=datasets.folder; facts: taxonomy listing; of 1
collect/scenes dataset=datasets.scenes; facts: taxonomy; of 4
collect/pool dataset=datasets.pool; facts: taxonomy; of 4
collect/pool2 dataset=datasets.pool2; facts: taxonomy; of 4
split/pool.margin-0.3 pool=collect/pool margin=0.3
split/pool pool=collect/pool margin=0.2
collect/test dataset=datasets.test; facts: taxonomy; of 2
train_translator/unit day=split/pool.margin-0.3:day night=split/pool:night settings=translators.unit; facts:
    start=None
translate/by_unit source=collect/scenes translator=train_translator/unit to=night
translate/by_optics source=collect/scenes to=night translator=translators.optics; unhashed: style_dataset=; facts:
    taxonomy
translate/by_fourier source=collect/scenes style_images=split/pool:night to=night translator=translators.fourier;
    unhashed: style_dataset=night
translate/by_colour source=collect/scenes style_images=split/pool:night to=night translator=translators.colour;
    unhashed: style_dataset=night
translate/by_program source=collect/scenes to=night translator=translators.program; unhashed: style_dataset=; facts:
    taxonomy
train_segmenter/first train={both: collect/scenes+collect/test} validate=collect/test network=network loss=loss
    training=training; unhashed: start=imagenet; facts: taxonomy parts start=imagenet encoder_weights workers=1
train_segmenter/third train={test: collect/test} network=network loss=loss training=training; unhashed: start=imagenet;
    facts: taxonomy parts start=imagenet encoder_weights workers=1
score/by_optics.efficientnet_lite0 frames=translate/by_optics positions=False; unhashed:
    extraction=models.second.self_training.select.extractor; facts: name weights resize mode weights_sha256
score/pool.efficientnet_lite0 frames=collect/pool positions=False; unhashed:
    extraction=models.second.self_training.select.extractor; facts: name weights resize mode weights_sha256
select/second pool_frames=collect/pool pool_scores=score/pool.efficientnet_lite0
    reference_scores=score/by_optics.efficientnet_lite0 selection=models.second.self_training.select; at most 2
label/third.pool.second.INFERENCE frames=select/second teacher=train_segmenter/third
    inference=models.second.self_training.inference; facts: taxonomy
pseudo_label/second labels=label/third.pool.second.INFERENCE threshold=models.second.self_training.threshold
    never_below={}; unhashed: known_warnings=1; facts: taxonomy
train_segmenter/second train={scenes: collect/scenes, by_unit: translate/by_unit, by_fresh: collect/scenes,
    (pseudo-labels): label/third.pool.second.INFERENCE} kept={(pseudo-labels): pseudo_label/second}
    start=train_segmenter/first network=models.second.network loss=models.second.loss training=models.second.training
    weights={scenes: 1.0, by_unit: 2.0, by_fresh: 0.5, (pseudo-labels): 1.0} fresh={by_fresh: translators.optics};
    facts: taxonomy parts start=train_segmenter/first encoder_weights workers=1
adapt_norms/adapted frames=split/pool:night start=train_segmenter/first norms=models.adapted.adapt_norms; facts:
    start=train_segmenter/first
select/taught pool_frames=collect/pool pool_scores=score/pool.efficientnet_lite0
    reference_scores=score/by_optics.efficientnet_lite0 selection=models.taught.self_training.select; at most 2
train_segmenter/taught train={scenes: collect/scenes} pool=select/taught start=train_segmenter/first network=network
    loss=loss training=models.taught.training teaching={online: models.taught.self_training.online, threshold:
    models.taught.self_training.threshold, never_below: {sky: ['road']}}; unhashed: warnings=1; facts: taxonomy parts
    start=train_segmenter/first encoder_weights workers=1
score/by_colour.efficientnet_lite0.positions frames=translate/by_colour positions=True; unhashed:
    extraction=models.fourth.self_training.select.extractor; facts: name weights resize mode weights_sha256
score/night.efficientnet_lite0.near-by_colour.efficientnet_lite0.positions frames=split/pool:night
    spatial_reference=score/by_colour.efficientnet_lite0.positions positions=False; unhashed:
    extraction=models.fourth.self_training.select.extractor; facts: name weights resize mode weights_sha256
select/fourth pool_frames=split/pool:night
    pool_scores=score/night.efficientnet_lite0.near-by_colour.efficientnet_lite0.positions
    reference_scores=score/by_colour.efficientnet_lite0.positions selection=models.fourth.self_training.select; at
    most 3
label/third.night.fourth frames=select/fourth teacher=train_segmenter/third inference=inference; facts: taxonomy
pseudo_label/fourth labels=label/third.night.fourth threshold=models.fifth.self_training.threshold never_below={};
    unhashed: known_warnings=1; facts: taxonomy
train_segmenter/fourth train={by_colour: translate/by_colour, (pseudo-labels): label/third.night.fourth}
    kept={(pseudo-labels): pseudo_label/fourth} start=train_segmenter/third network=network loss=loss
    training=training; facts: taxonomy parts start=train_segmenter/third encoder_weights workers=1
score/both.efficientnet_lite0 frames=collect/scenes+collect/test positions=False; unhashed:
    extraction=models.fifth.self_training.select.extractor; facts: name weights resize mode weights_sha256
select/fifth pool_frames=collect/scenes+collect/test pool_scores=score/both.efficientnet_lite0
    selection=models.fifth.self_training.select; at most 1
label/third.both.fifth frames=select/fifth teacher=train_segmenter/third inference=inference; facts: taxonomy
pseudo_label/fifth labels=label/third.both.fifth threshold=models.fifth.self_training.threshold never_below={};
    unhashed: known_warnings=1; facts: taxonomy
train_segmenter/fifth train={test: collect/test, (pseudo-labels): label/third.both.fifth} kept={(pseudo-labels):
    pseudo_label/fifth} start=train_segmenter/third network=network loss=loss training=training; facts: taxonomy parts
    start=train_segmenter/third encoder_weights workers=1
evaluate/first tests={night: collect/test, other: collect/scenes} model=train_segmenter/first evaluation=evaluation
    inference=inference; facts: taxonomy
consistency/first frames=split/pool:night model=train_segmenter/first count=3 inference=inference; at most 3
evaluate/second tests={night: collect/test} model=train_segmenter/second evaluation=evaluation inference=inference;
    facts: taxonomy
consistency/second frames=split/pool:night model=train_segmenter/second count=3 inference=inference; at most 3
evaluate/third tests={night: collect/test, other: collect/scenes} model=train_segmenter/third evaluation=evaluation
    inference=inference; facts: taxonomy
consistency/third frames=split/pool:night model=train_segmenter/third count=3 inference=inference; at most 3
evaluate/adapted tests={night: collect/test, other: collect/scenes} model=adapt_norms/adapted evaluation=evaluation
    inference=inference; facts: taxonomy
consistency/adapted frames=split/pool:night model=adapt_norms/adapted count=3 inference=inference; at most 3
evaluate/taught tests={night: collect/test, other: collect/scenes} model=train_segmenter/taught evaluation=evaluation
    inference=inference; facts: taxonomy
consistency/taught frames=split/pool:night model=train_segmenter/taught count=3 inference=inference; at most 3
evaluate/fourth tests={night: collect/test, other: collect/scenes} model=train_segmenter/fourth evaluation=evaluation
    inference=inference; facts: taxonomy
consistency/fourth frames=split/pool:night model=train_segmenter/fourth count=3 inference=inference; at most 3
evaluate/fifth tests={night: collect/test, other: collect/scenes} model=train_segmenter/fifth evaluation=evaluation
    inference=inference; facts: taxonomy
consistency/fifth frames=split/pool:night model=train_segmenter/fifth count=3 inference=inference; at most 3
predict/shown frames=collect/pool model=train_segmenter/second inference=inference
translate/by_unit.back source=translate/by_unit translator=train_translator/unit to=day
predict/first.by_unit frames=translate/by_unit model=train_segmenter/first save=mask
predict/first.scenes frames=collect/scenes model=train_segmenter/first save=mask
predict/first.by_unit.back frames=translate/by_unit.back model=train_segmenter/first save=mask
score/by_unit.efficientnet_lite0 frames=translate/by_unit positions=False; unhashed:
    extraction=translations.by_unit.extractor; facts: name weights resize mode weights_sha256
score/scenes.efficientnet_lite0 frames=collect/scenes positions=False; unhashed:
    extraction=translations.by_unit.extractor; facts: name weights resize mode weights_sha256
score/night.efficientnet_lite0 frames=split/pool:night positions=False; unhashed:
    extraction=translations.by_unit.extractor; facts: name weights resize mode weights_sha256
evaluate_translation/by_unit translated=translate/by_unit source=collect/scenes masks={translated:
    predict/first.by_unit, source: predict/first.scenes, back: predict/first.by_unit.back} features={translated:
    score/by_unit.efficientnet_lite0, source: score/scenes.efficientnet_lite0, real: score/night.efficientnet_lite0};
    facts: taxonomy
"""


SHORT_FACTS: Final = ("start", "workers", "model", "batch", "source")  # shown with their values


def places(value: Any, path: str = "") -> Iterator[tuple[int, str]]:
    """Where in the recipe each settings object stands, by its identity."""
    if isinstance(value, BaseModel):
        yield id(value), path
        value = dict(value)
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, f"{path}.{key}" if path else key)


def written(value: Any, known: Mapping[int, str]) -> str:
    match value:
        case BaseModel():
            return known[id(value)] if id(value) in known else written(dict(value), known)
        case NodeId():
            return str(value)
        case Frames(views):
            return "+".join(map(str, views))
        case Mapping():
            return "{" + ", ".join(f"{key}: {written(part, known)}" for key, part in value.items()) + "}"
        case tuple() if all(isinstance(part, str) and " " in part for part in value):
            return str(len(value))  # messages
        case tuple():
            return ",".join(map(str, value))
        case _:
            return str(value)


def entry(node: Node, known: Mapping[int, str], common: Mapping[str, Any]) -> str:
    """The node as GRAPH has it. The arguments and facts in `common` have those very values, where it has them."""
    inspect.signature(node.stage).bind(**node.inputs, **node.settings, **node.unhashed, attempt=None, progress=None)
    facts = {name: value if name in SHORT_FACTS else "known" for name, value in node.facts.items()}
    if "shard_rows" in common and "shard_rows" in facts:
        assert node.facts["shard_rows"] == common["shard_rows"] and facts.pop("shard_rows")
    arguments, unhashed = {**node.inputs, **node.settings}, dict(node.unhashed)
    for part in (arguments, unhashed):
        for name in part.keys() & common.keys():
            assert part.pop(name) == common[name], f"{node.id}: {name}"
    words = {
        "": [f"{name}={written(value, known)}" for name, value in arguments.items() if value is not None],
        "unhashed: ": [f"{name}={written(value, known)}" for name, value in unhashed.items() if value is not None],
        "facts: ": [name if value == "known" else f"{name}={value}" for name, value in facts.items()],
        "of ": [str(node.expected_rows)] if node.expected_rows else [],
        "at most ": [str(node.most_rows)] if node.most_rows else [],
    }
    return f"{node.id} " + "; ".join(head + " ".join(part) for head, part in words.items() if part)


def entries(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n(?=\S)", text.strip())]


def test_the_graph_of_a_recipe(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, RECIPE.replace("test_sets:", f"{MORE.strip(chr(10))}\ntest_sets:", 1))
    known, found = dict(places(recipe)), []
    for node in build_graph(recipe).nodes.values():
        common: dict[str, Any] = {"name": node.id.name, "taxonomy": recipe.taxonomy}
        resources: Any = recipe.compute.map
        seed, counted = 0, tuple(node.inputs)[:1]
        if node.id.stage.startswith("train_"):
            resources, seed = recipe.compute.train, recipe.seed
            counted = tuple(name for name in ("train", "validate", "pool", "day", "night") if name in node.inputs)
            common |= {"seed": seed, "compute": resources}
        elif node.id.stage == "select":
            common["seed"] = seed = recipe.seed
        elif node.id.stage != "pseudo_label":
            common |= {"compute": resources, "max_bad_fraction": recipe.max_bad_fraction}
            common |= {"shard_rows": resources.shard_rows}
            assert {"max_bad_fraction", "shard_rows"} <= node.recipe.keys()
        if {"translator", "norms"} & {name for name, value in node.settings.items() if isinstance(value, BaseModel)}:
            seed = recipe.seed
        assert node.resources is resources and node.version == getattr(build, node.id.stage).VERSION
        assert (node.seed, node.counted) == (seed, counted), node.id
        found.append(entry(node, known, common))
    own = hash_of(recipe.models["second"].self_training.inference.model_dump(mode="json"))[:6]  # type: ignore[union-attr]
    assert found == entries(GRAPH.replace("INFERENCE", own))


# The same of the verbs without a recipe: the verb, a node. Left out: compute, and shard_rows.
VERBS = """
split collect/pool dataset=the folder max_bad_fraction=0.2; unhashed: name=pool taxonomy=cityscapes19; facts: taxonomy
    listing; of 1
split split/pool.margin-0.3 pool=collect/pool margin=0.3 max_bad_fraction=0.2
select collect/reference dataset=the folder max_bad_fraction=1.0; unhashed: name=reference taxonomy=cityscapes19;
    facts: taxonomy listing; of 1
select score/reference.inception frames=collect/reference positions=False max_bad_fraction=1.0; unhashed:
    extraction=extraction; facts: name weights resize mode weights_sha256
select score/pool.inception frames=a table positions=False max_bad_fraction=1.0; unhashed: extraction=extraction;
    facts: name weights resize mode weights_sha256
select select/pool pool_frames=a table pool_scores=score/pool.inception reference_scores=score/reference.inception
    selection=selection; unhashed: seed=4; at most 2
random collect/pool dataset=the folder max_bad_fraction=0.3; unhashed: name=pool taxonomy=cityscapes19; facts:
    taxonomy listing; of 1
random score/pool.inception frames=collect/pool positions=False max_bad_fraction=0.3; unhashed: extraction=extraction;
    facts: name weights resize mode weights_sha256
random select/pool pool_frames=collect/pool pool_scores=score/pool.inception selection=selection;
    unhashed: seed=4; at most 2
fid score/a.inception frames=a table positions=False max_bad_fraction=0.01; unhashed: extraction=extraction; facts:
    name weights resize mode weights_sha256
predict predict/images frames=a table save=mask inference=inference max_bad_fraction=1.0; unhashed: model=m out=o
    device=cpu name=images; facts: model=of the model batch=2
predict predict/video-0 save=mask inference=inference overlay_video=True name=drive; unhashed: model=m out=o
    device=cpu video=/v.mp4; facts: model=of the model batch=2 source=of the files
evaluate evaluate/folders pairs=a table taxonomy=camvid11 label_encoding=camvid12 evaluation=evaluation
    max_bad_fraction=0.5
"""


def test_the_graphs_of_verbs(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    folder, table = str(tmp_path), Given(frame_table([]), "a table")
    compute, selection = MapCompute(actors=3, shard_rows=5, batch=2), Selection(count=2)
    evaluation, inference = Evaluation(), Inference()
    graphs = {
        "split": build.split_graph(folder, 0.3, compute, 0.2),
        "select": build.selection_graph({build.POOL: table, build.REFERENCE: folder}, selection, 4, compute),
        "random": build.selection_graph({build.POOL: folder}, selection, 4, compute, 0.3),
        "fid": build.distance_graph({"a": table}, selection.extractor, compute, 0.01),
        "fid of files": build.distance_graph({}, selection.extractor, compute, 0.01),
        "predict": build.prediction_graph(
            table,
            [Video("drive", Location.of("/v.mp4"))],
            "of the files",
            {"save": ("mask",), "inference": inference},
            True,
            {"model": "m", "out": "o", "device": "cpu"},
            "of the model",
            compute,
        ),
        "evaluate": build.evaluation_graph(table, "camvid11", "camvid12", evaluation, compute, 0.5),
    }
    known = {id(selection): "selection", id(selection.extractor): "extraction"}
    known |= {id(inference): "inference", id(evaluation): "evaluation"}
    found = []
    for verb, graph in graphs.items():
        for node in graph.nodes.values():
            assert node.resources is compute and ("shard_rows" in node.facts) == (node.id.stage != "select")
            assert node.seed == (4 if node.id.stage == "select" else 0)
            if isinstance(dataset := node.settings.get("dataset"), BaseModel):
                assert dataset == FolderDataset.of_images(folder)
                known[id(dataset)] = "the folder"
            found.append(f"{verb} {entry(node, known, {'compute': compute, 'shard_rows': 5})}")
    assert found == entries(VERBS)
