"""A model says what is different for it, a recipe what it changes of its base; what is said otherwise stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nightseg.data.settings import ScenesDataset
from nightseg.pipeline.build import build_graph
from nightseg.recipe import RecipeError, load_recipe, save_recipe
from nightseg.recipe.types import Recipe
from nightseg.segmenter.settings import Training
from nightseg.storage import Location

HEAD = """
name: r
taxonomy: camvid11
datasets:
  day: {layout: scenes, count: 4}
  pool: {layout: scenes, count: 4, first: 9, labelled: false}
"""


def written(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return file


def recipe(folder: Path, text: str, *overrides: str) -> Recipe:
    return load_recipe(written(folder, HEAD + text), overrides)


def errors(file: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    return str(caught.value)


def trainings(found: Recipe) -> dict[str, Training]:
    return {name: found.training_of(model) for name, model in found.models.items()}


def epochs(found: Recipe) -> dict[str, int]:
    return {name: training.epochs for name, training in trainings(found).items()}


def keys(found: Recipe) -> dict[str, Any]:
    return {str(node.id): (node.recipe, node.seed) for node in build_graph(found).nodes.values()}


# -- models ------------------------------------------------------------------------------------------------------------

MODELS = """
network: {encoder: resnet18, pyramid_channels: 64}
loss: {kind: combined, gamma: 1.0, class_weights: {pole: 2.0, car: 0.5}}
inference: {flip: true, overlap: 0.5}
training: {epochs: 5, batch: 8, decay_at: [0.5, 0.7], steps_per_epoch: 9, augmentation: {flip: 0.25, hue: 0.1}}
models:
  plain: {train: [day]}
  other:
    train: [day]
    start: plain
    network: {head_channels: 32}
    loss: {alpha: 0.1, class_weights: {pole: 3.0}}
    training: {learning_rate: 0.5, decay_at: [0.9], steps_per_epoch: null, augmentation: {hue: 0.2}}
    self_training: {pool: pool, inference: {overlap: 0.0}}
  none: {train: [day], training: null}
"""


def test_a_model_changes_only_what_it_names(tmp_path: Path) -> None:
    found = recipe(tmp_path, MODELS)
    other = found.models["other"]
    training = found.training_of(other)
    assert (training.epochs, training.batch, training.learning_rate) == (5, 8, 0.5)
    assert (training.augmentation.flip, training.augmentation.hue) == (0.25, 0.2)  # at every depth
    assert training.decay_at == [0.9]  # a list is one value
    assert training.steps_per_epoch is None  # null is a value
    network, loss = found.network_of(other), found.loss_of(other)
    assert (network.encoder, network.pyramid_channels, network.head_channels) == ("resnet18", 64, 32)
    assert (loss.kind, loss.gamma, loss.alpha, loss.class_weights) == ("combined", 1.0, 0.1, {"pole": 3.0})
    assert other.self_training is not None and other.self_training.inference is not None
    assert (other.self_training.inference.flip, other.self_training.inference.overlap) == (True, 0.0)
    assert found.models["plain"].training is None and found.models["none"].training is None


def test_an_override_reaches_the_models_that_do_not_say_otherwise(tmp_path: Path) -> None:
    text = """
training: {epochs: 5, augmentation: {flip: 0.25}}
models:
  a: {train: [day]}
  b: {train: [day], training: {batch: 2}}
  c: {train: [day], training: {epochs: 7}}
"""
    assert epochs(recipe(tmp_path, text, "training.epochs=3")) == {"a": 3, "b": 3, "c": 7}
    assert epochs(recipe(tmp_path, text, "models.b.training.epochs=9")) == {"a": 5, "b": 9, "c": 7}
    assert epochs(recipe(tmp_path, text, "models.c.training={batch: 2}")) == {"a": 5, "b": 5, "c": 5}
    found = trainings(recipe(tmp_path, text, "training.augmentation.flip=0.5", "models.b.training.augmentation.hue=1"))
    assert [training.augmentation.flip for training in found.values()] == [0.5, 0.5, 0.5]


MERGED = """
training: &training
  epochs: 5
  learning_rate: 0.1
  augmentation: &augmentation {flip: 0.25, hue: 0.1}
models:
  first: {train: [day]}
  merged: {train: [day], training: &longer {<<: *training, epochs: 9}}
  copied: {train: [day], training: *training}
  chained: {train: [day], training: {<<: *longer, learning_rate: 0.2}}
  replaced: {train: [day], training: {<<: *training, augmentation: {flip: 0.0}}}
  inside: {train: [day], training: {<<: *training, augmentation: {<<: *augmentation, flip: 0.0}}}
  listed: {train: [day], training: {<<: [*longer, *training], batch: 2}}
"""


def test_yaml_merges_mean_what_they_meant(tmp_path: Path) -> None:
    found = trainings(recipe(tmp_path, MERGED))
    assert epochs(recipe(tmp_path, MERGED)) == {
        "first": 5,
        "merged": 9,
        "copied": 5,
        "chained": 9,
        "replaced": 5,
        "inside": 5,
        "listed": 9,
    }
    assert found["chained"].learning_rate == 0.2
    assert (found["replaced"].augmentation.flip, found["replaced"].augmentation.hue) == (0.0, 0.0)  # as YAML replaces
    assert (found["inside"].augmentation.flip, found["inside"].augmentation.hue) == (0.0, 0.1)


def test_overrides_reach_what_was_merged(tmp_path: Path) -> None:
    found = recipe(tmp_path, MERGED, "training.epochs=3", "training.batch=2", "training.augmentation.hue=0.7")
    assert epochs(found) == {
        "first": 3,
        "merged": 9,
        "copied": 3,
        "chained": 9,
        "replaced": 3,
        "inside": 3,
        "listed": 9,
    }
    assert {training.batch for training in trainings(found).values()} == {2}
    hues = {name: training.augmentation.hue for name, training in trainings(found).items()}
    assert hues == dict.fromkeys(hues, 0.7) | {"replaced": 0.0}


def test_keys_do_not_depend_on_how_a_value_is_said(tmp_path: Path) -> None:
    said = """
training: {epochs: 5, learning_rate: 0.1, augmentation: {flip: 0.25, hue: 0.1}}
models:
  first: {train: [day]}
  merged: {train: [day], training: {epochs: 9}}
  copied: {train: [day], training: {}}
  chained: {train: [day], training: {epochs: 9, learning_rate: 0.2}}
  replaced:
    {train: [day], training: {augmentation: {flip: 0.0, hue: 0.0}}}
  inside: {train: [day], training: {augmentation: {flip: 0.0}}}
  listed: {train: [day], training: {epochs: 9, learning_rate: 0.1, batch: 2}}
"""
    batch = "models.listed.training.batch=2"
    assert keys(recipe(tmp_path, MERGED, batch)) == keys(recipe(tmp_path, said, batch))


def test_a_preset_says_all_that_presets_say(tmp_path: Path) -> None:
    text = """
training: {preset: detectron2, ema_decay: 0.5}
models:
  a: {train: [day], training: {batch: 2}}
  b: {train: [day], training: {preset: thesis, epochs: 2}}
"""
    a, b = trainings(recipe(tmp_path, text)).values()
    assert (a.batch, a.learning_rate, a.steps_per_epoch, a.ema_decay) == (2, 0.02, 5000, 0.5)
    assert (b.batch, b.epochs, b.decay, b.steps_per_epoch, b.freeze_batch_norm) == (4, 2, "cosine", None, False)
    assert b.ema_decay == 0.5  # no preset says it


def test_what_is_wrong_with_the_recipe_is_told_once_and_of_the_recipe(tmp_path: Path) -> None:
    text = "training: {batch: x, decay_at: [0.9, 0.1]}\nloss: {class_weights: {poel: 1}}\n"
    text += "models: {a: {train: [day], training: {epochs: 2}, loss: {alpha: 0.1}}}\n"
    message = errors(written(tmp_path, HEAD + text))
    assert message.count("training.batch: ") == 1 and "models.a" not in message
    assert message.count("no class 'poel'") == 1
    order = errors(written(tmp_path, HEAD + text.replace("batch: x, ", "")))
    assert order.count("the shares must rise") == 1


def test_what_does_not_go_with_the_recipe_says_where_the_rest_is_from(tmp_path: Path) -> None:
    text = "loss: {ohem: {share: 0.5}}\nmodels: {a: {train: [day], loss: {ohem: {confidence: 0.5}}}}\n"
    message = errors(written(tmp_path, HEAD + text))
    assert "line 8: models.a.loss.ohem: give exactly one of share and confidence" in message
    assert "what it does not say is that of loss.ohem: null takes a key of it away" in message
    text += "inference: {flip: true}\n"
    online = "models.a.self_training={mode: online, pool: pool, inference: {overlap: 0.1}}"
    message = errors(written(tmp_path, HEAD + text.replace("confidence", "share")), online)
    assert message.endswith(
        "models.a.self_training: mode online: the teacher predicts as online.flip and online.scales "
        "say, not as inference"
    )
    found = recipe(tmp_path, text.replace("{confidence", "{share: null, confidence"))
    assert found.loss_of(found.models["a"]).ohem.confidence == 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize("text", [MODELS, MERGED])
def test_a_saved_recipe_is_the_same_and_inherits_still(tmp_path: Path, text: str) -> None:
    found = recipe(tmp_path, text)
    save_recipe(found, Location.of(tmp_path / "saved.yaml"))
    assert load_recipe(tmp_path / "saved.yaml") == found
    sets = ["training.batch=2", "network.pyramid_channels=16"]
    assert load_recipe(tmp_path / "saved.yaml", sets) == recipe(tmp_path, text, *sets)


# -- base --------------------------------------------------------------------------------------------------------------

BASE = (
    HEAD
    + """
translators: {unit: {preset: small, day: day, night: pool, iterations: 7}, optics: {kind: photometric, tint: 0.2}}
training: &training {epochs: 5, batch: 8}
models:
  a: {train: {day: 1, pool: 2}, training: {<<: *training, learning_rate: 0.5}}
  b: {train: [day], start: a}
  c:
    train: [day]
    start: a
    self_training: {pool: pool, select: {count: 2, method: random, extractor: efficientnet_lite0}}
test_sets: {one: day, two: day}
"""
).replace("labelled: false", "labelled: true")


def test_a_recipe_changes_its_base(tmp_path: Path) -> None:
    written(tmp_path, BASE, "base.yaml")
    middle = "base: ../base.yaml\nname: middle\ntraining: {epochs: 6}\nmodels: {b: {training: {batch: 4}}}\n"
    written(tmp_path, middle, "sub/middle.yaml")
    text = """
base: sub/middle.yaml
name: top
datasets: {pool: {count: 5}, day: {layout: images, root: ROOT, labelled: true}}
translators: {unit: {iterations: 8}, optics: {kind: fourier, night: pool}}
training: {crop: [64, 64]}
models: {a: {train: {pool: 1}}, c: {train: [pool], self_training: {select: {extractor: {mode: fast}}}}}
test_sets: {one: null}
"""
    (tmp_path / "images").mkdir()
    text = text.replace("ROOT, labelled: true", f"{tmp_path}/images, labelled: false")
    found = load_recipe(written(tmp_path, text), ["models.b.train=[pool]", "test_sets.two=pool"])
    assert (found.name, found.taxonomy, found.base) == ("top", "camvid11", None)
    assert epochs(found) == {"a": 6, "b": 6, "c": 6}
    assert {name: training.batch for name, training in trainings(found).items()} == {"a": 8, "b": 4, "c": 8}
    assert trainings(found)["a"].learning_rate == 0.5 and trainings(found)["b"].crop == (64, 64)
    assert found.models["a"].train == {"pool": 1.0}  # one value
    assert found.datasets["pool"].model_dump()["first"] == 9 and found.datasets["pool"].model_dump()["count"] == 5
    assert found.datasets["day"].model_dump()["layout"] == "images"  # of another kind: nothing is left of the scenes
    assert (found.translators["unit"].model_dump()["iterations"], found.translators["optics"].kind) == (8, "fourier")
    extractor = found.models["c"].self_training.select.extractor  # type: ignore[union-attr]
    assert (extractor.name, extractor.mode) == ("efficientnet_lite0", "fast")
    assert found.test_sets == {"two": "pool"}  # null took the other one away
    save_recipe(found, Location.of(tmp_path / "elsewhere.yaml"))
    for file in ("base.yaml", "sub/middle.yaml"):
        (tmp_path / file).unlink()
    assert load_recipe(tmp_path / "elsewhere.yaml") == found  # the copy of a run stands alone


def test_test_sets_of_a_model_are_added_changed_and_taken_away(tmp_path: Path) -> None:
    rows = 'test: {one: {row: "1", published_miou: 27.5}, two: {row: "2"}}'
    written(tmp_path, BASE.replace("start: a}", f"start: a, {rows}}}"), "base.yaml")
    text = "base: base.yaml\nname: top\ntest_sets: {three: pool}\n"
    text += "models: {a: {test: {three: {}}}, b: {test: {one: {row: '9'}, two: null, three: {}}}}\n"
    models = load_recipe(written(tmp_path, text), ["datasets.pool.labelled=true"]).models
    assert {test: (row.row, row.published_miou) for test, row in (models["b"].test or {}).items()} == {
        "one": ("9", 27.5),
        "three": ("", None),
    }
    assert list(models["a"].test or {}) == ["three"]  # of a model without: these alone
    assert models["c"].test is None


def test_a_preset_over_a_base_replaces_what_presets_say(tmp_path: Path) -> None:
    written(tmp_path, BASE, "base.yaml")
    text = "base: base.yaml\ntranslators: {unit: {preset: thesis}}\ntraining: {preset: thesis}\n"
    found = load_recipe(written(tmp_path, text))
    unit = found.translators["unit"].model_dump()
    assert (unit["iterations"], unit["day"]) == (330_000, "day")
    assert (found.training.epochs, found.training.batch) == (60, 4)


def test_errors_of_a_base_name_its_file_and_line(tmp_path: Path) -> None:
    base = written(
        tmp_path, BASE.replace("batch: 8", "bach: 8").replace("  b:", "  b: {train: [day]}\n  b:"), "base.yaml"
    )
    file = written(tmp_path, "base: base.yaml\nname: top\nseed: x\ntraining: {epoch: 3}\n")
    message = errors(file, "models.a.start=nothing")
    assert message.startswith(f"{file}: ")
    for expected in (
        f"{base}: line 9: training.bach: unknown key, did you mean 'batch'?",
        f"{base}: line 13: models.b: this key stands twice",
        "  line 3: seed: ",
        "  line 4: training.epoch: unknown key, did you mean 'epochs'?",
        "  set models.a.start=nothing: models.a.start: there is no model 'nothing'",
    ):
        assert expected in message, message


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("nowhere.yaml", "line 1: base: there is no recipe file 'nowhere.yaml'"),
        ("recipe.yaml", "line 1: base: a circle, so none of them can be read first: "),
        ("./link/recipe.yaml", "line 1: base: a circle"),
        ("sub/loop.yaml", "sub/loop.yaml: line 1: base: a circle"),
        ("3", "line 1: base: give the recipe file that this one changes, relative to it, not the number 3"),
        ("sub", "line 1: base: there is no recipe file 'sub'"),
        ("sub/broken.yaml", "sub/broken.yaml: line 3: not valid YAML"),
    ],
)
def test_a_base_that_cannot_be_read(tmp_path: Path, base: str, expected: str) -> None:
    written(tmp_path, "base: ../recipe.yaml\n", "sub/loop.yaml")
    written(tmp_path, "name: x\nmodels: [\n", "sub/broken.yaml")
    (tmp_path / "link").symlink_to(tmp_path)
    file = written(tmp_path, f"base: {base}\n{HEAD}")
    message = errors(file)
    assert expected in message
    if "loop" in base:
        assert f"{file} has the base {tmp_path}/sub/loop.yaml has the base {file}" in message


def test_a_base_is_not_set_by_an_override(tmp_path: Path) -> None:
    assert "a base is read before anything is set" in errors(written(tmp_path, HEAD), "base=other.yaml")


def test_a_base_in_python_is_not_silently_ignored() -> None:
    with pytest.raises(ValueError, match=r"filled in when a recipe file is read"):
        Recipe(name="r", base="x.yaml", datasets={"d": ScenesDataset(layout="scenes", count=1)})
