"""A recipe is right, or one message names everything that is wrong with it."""

from pathlib import Path

import pytest

from nightseg.data.settings import SplitDataset, TranslatedDataset
from nightseg.recipe import RecipeError, load_recipe, renamed, save_recipe
from nightseg.storage import Location

GOOD = """
name: good
datasets:
  day: {layout: scenes, count: 4}
  night: {split: day, keep: night}
  made: {translate: day, by: unit}
translators:
  unit: {day: day, night: night}
training: {learning_rate: 1e-4}
models:
  first: {train: [day, made]}
  second: {train: [day], start: first, self_training: {pool: night}}
test_sets: {day: day}
"""


def write(folder: Path, text: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return str(file)


def errors_of(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides)
    return str(caught.value)


def test_kinds_of_datasets_and_numbers(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    assert isinstance(recipe.datasets["night"], SplitDataset)
    assert isinstance(recipe.datasets["made"], TranslatedDataset)
    assert recipe.training.learning_rate == 1e-4  # YAML 1.1 reads 1e-4 as text


def test_overrides_reach_every_depth_and_create_sections(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD),
        ["seed=7", "models.first.train.0=night", "models.first.loss.kind=focal", "compute.map.actors=3"],
    )
    assert recipe.seed == 7
    assert recipe.models["first"].train == ["night", "made"]
    assert recipe.loss_of(recipe.models["first"]).kind == "focal"
    assert recipe.compute.map.actors == 3


def test_an_override_of_one_alias_leaves_the_others(tmp_path: Path) -> None:
    text = GOOD.replace("first: {train: [day, made]}", "first: {train: [day, made], loss: &loss {alpha: 0.5}}").replace(
        "second: {train: [day],", "second: {train: [day], loss: *loss,"
    )
    recipe = load_recipe(write(tmp_path, text), ["models.second.loss.alpha=0.1"])
    assert [recipe.loss_of(recipe.models[name]).alpha for name in ("first", "second")] == [0.5, 0.1]


def test_a_saved_recipe_is_read_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    saved = Location.of(tmp_path / "saved.yaml")
    save_recipe(recipe, saved)
    assert load_recipe(saved) == recipe


def test_a_model_may_start_from_a_model_folder(tmp_path: Path) -> None:
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "model.json").write_text("{}")
    (tmp_path / "converted" / "model.safetensors").write_bytes(b"")
    text = GOOD.replace("first: {train: [day, made]}", f"first: {{train: [day, made], start: {tmp_path}/converted}}")
    assert load_recipe(write(tmp_path, text)).models["first"].start == f"{tmp_path}/converted"


def test_recipes_are_frozen(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]


def test_the_key_that_moves_a_missing_folder_is_named(tmp_path: Path) -> None:
    text = """name: bad
roots: {own: /does/not/exist}
datasets:
  day: {layout: camvid, root: "{own}", split: train}
  night: {layout: images, root: "{own}/night"}
  pool: {layout: images, root: /nowhere}
"""
    message = errors_of(tmp_path, text)
    assert "datasets.day.root: there is no folder '/does/not/exist'; set roots.own" in message
    assert "datasets.night.root: there is no folder '/does/not/exist/night'; set roots.own" in message
    assert "datasets.pool.root: there is no folder '/nowhere'; set datasets.pool.root" in message


def test_all_errors_in_one_message_with_line_key_and_hint(tmp_path: Path) -> None:
    text = """name: bad
seed: one
datasets:
  day: {layout: camvidd, root: .}
  other: {layout: images, root: /does/not/exist, splitt: x}
  turn: {translate: back, by: unit}
  back: {translate: turn, by: unitt}
translators:
  unit: {day: day, night: day}
training: {batch: 2.5}
models:
  first: {trian: [day], train: [day]}
  second: {train: [dya], start: fist}
"""
    message = errors_of(tmp_path, text)
    assert "nothing was started" in message
    for expected in (
        "line 2: seed: input should be a valid integer, got the text 'one'",
        "line 4: datasets.day.layout: 'camvidd' is not allowed, did you mean 'camvid'?",
        "line 5: datasets.other.splitt: unknown key, did you mean 'split'?",
        "line 5: datasets.other.root: there is no folder '/does/not/exist'",
        "datasets.turn: a cycle",
        "line 7: datasets.back.by: there is no translator 'unitt', did you mean 'unit'?",
        "line 10: training.batch: ",
        "line 12: models.first.trian: unknown key, did you mean 'train'?",
        "line 13: models.second.train.0: there is no dataset 'dya', did you mean 'day'?",
        "line 13: models.second.start: there is no model 'fist', did you mean 'first'?",
    ):
        assert expected in message, f"{expected}\nis missing in\n{message}"
    assert "scenes" in message  # the allowed layouts are those of every kind of dataset


def test_class_weights_name_classes_of_the_taxonomy(tmp_path: Path) -> None:
    text = GOOD + "loss: {class_weights: {pole: 2, car: 0.5}}\n"
    assert load_recipe(write(tmp_path, text)).loss.class_weights == {"pole": 2.0, "car": 0.5}
    wrong = errors_of(tmp_path, text, "loss.class_weights.poel=3", "models.first.loss={class_weights: [1, 2]}")
    assert "set loss.class_weights.poel=3" not in wrong  # the mapping is named, and its keys
    assert "loss.class_weights: cityscapes19 has no class 'poel', did you mean 'pole'?" in wrong
    assert "models.first.loss.class_weights: 2 values for the 19 classes of cityscapes19" in wrong


def test_keeping_the_best_weights_needs_frames_to_tell_them_by(tmp_path: Path) -> None:
    message = errors_of(tmp_path, GOOD, "training.keep=best")
    assert "training.keep: first shall keep the weights of its best validation, and validates on nothing" in message
    load_recipe(
        write(tmp_path, GOOD), ["training.keep=best", *(f"models.{n}.validate_on=[day]" for n in ("first", "second"))]
    )


def test_keys_of_the_other_mode_of_self_training_are_refused(tmp_path: Path) -> None:
    at = "models.second.self_training"
    recipe = load_recipe(write(tmp_path, GOOD), [f"{at}={{mode: online, pool: night, never_below: {{sky: [road]}}}}"])
    assert recipe.models["second"].self_training.mode == "online"  # type: ignore[union-attr]
    for key, message in {
        "online: {batch: 2}": "online is for mode: online",
        "threshold: {precision: 0.8}": "threshold.precision is measured while a model learns",
        "mode: online, teacher: first": "mode online: the model teaches itself, leave teacher out",
        "mode: online, inference: {flip: true}": "as online.flip and online.scales say",
        "mode: online, weight: 2.0": "the weight of the pool is online.weight",
        "never_below: {sky: [raod], sky_: [road]}": "cityscapes19 has no class 'raod', did you mean 'road'?",
        "never_below: {sky: [sky]}": "leave it out of its own",
    }.items():
        assert message in errors_of(tmp_path, GOOD, f"{at}={{pool: night, {key}}}"), key


def test_a_model_that_teaches_itself_is_a_cycle(tmp_path: Path) -> None:
    message = errors_of(tmp_path, GOOD, "models.second.self_training.teacher=second")
    assert "model second needs model second" in message


def test_duplicate_keys_are_refused_at_every_depth(tmp_path: Path) -> None:
    message = errors_of(tmp_path, GOOD.replace("  first:", "  first: {train: [day]}\n  first:"))
    assert "models.first: this key stands twice" in message


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("!!int abc", "'abc' is no int"),
        ("0x_", "'0x_' is no int"),
        ("[" * 3000, "nested too deeply"),
        ("[", "expected"),
    ],
)
def test_an_override_that_is_no_yaml(tmp_path: Path, value: str, why: str) -> None:
    text = errors_of(tmp_path, "name: x\ndatasets: {d: {layout: scenes, count: 1}}", f"seed={value}")
    assert f"seed={value}: the value is not valid YAML (" in text and why in text


def test_an_error_in_an_override_names_the_override(tmp_path: Path) -> None:
    message = errors_of(tmp_path, GOOD, "training.epoch=3", "nonsense", "seed.deep.er=1", "models.first.train.7=x")
    assert "set training.epoch=3: training.epoch: unknown key, did you mean 'epochs'?" in message
    assert "set nonsense: write it as key.key=value" in message
    assert "set models.first.train.7=x: models.first.train is a list of 2, it has no '7'" in message


def test_an_old_key_is_answered_with_its_new_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "RENAMED", {"epoch_count": "epochs", "unit.steps": "iterations"})
    message = errors_of(tmp_path, GOOD.replace("{learning_rate: 1e-4}", "{epoch_count: 3}"), "translators.unit.steps=3")
    assert "line 9: training.epoch_count: unknown key; epoch_count is called epochs now; allowed: " in message
    assert "translators.unit.steps: unknown key; steps is called iterations now; allowed: " in message


def test_roots_move_many_datasets_at_once(tmp_path: Path) -> None:
    text = """name: rooted
roots: {frames: nowhere}
datasets:
  one: {layout: images, root: "{frames}/one"}
  two: {layout: images, root: "{frmaes}/two"}
"""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert "there is no root 'frmaes', did you mean 'frames'?" in errors_of(tmp_path, text)
    recipe = load_recipe(write(tmp_path, text.replace("frmaes", "frames")), [f"roots.frames={tmp_path}"])
    assert recipe.model_dump()["datasets"]["two"]["root"] == f"{tmp_path}/two"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n- b", "a recipe is a mapping"),
        ("name: !!python/object/apply:os.system [echo]", "not valid YAML"),
        ("name: x\nseed: !!int abc", "line 2: not valid YAML: 'abc' is no int"),
        ("name: x\nseed: 2026-02-30", "line 2: seed: "),
        ("name: x\ndatasets: {d: {layout: scenes, count: 1, mix: {day: 0.5}}}", "must add up to 1"),
        ("name: x y\ndatasets: {d: {layout: scenes, count: 1}}", "is not a name"),
        ("name: x\ndatasets: {d: {layout: scenes, count: 1}}\nmodels: {m: {train: [d], rounds: 2}}", "has none"),
        (
            "name: x\ndatasets: {d: {layout: scenes, count: 1}}\nmodels: {m: {train: [d], self_training: {pool: d}}}",
            "needs a teacher",
        ),
        *[
            (f"name: x\ndatasets: {{d: {{layout: scenes, count: 1}}}}\n{rest}", expected)
            for rest, expected in (
                ("network: {encoder: resnet5}", "unknown encoder 'resnet5', did you mean 'resnet50'?"),
                ("network: {encoder: resnet34, stride_in_1x1: true}", "stride_in_1x1 is for resnet50"),
                ("network: {encoder: timm/resnet50d, freeze_at: 2}", "freeze_at counts the stages of resnet18"),
                ("network: {encoder: efficientnet_lite0, backend: detectron2}", "backend detectron2 computes resnet18"),
                ("network: {norm: frosen}", "did you mean 'frozen'?"),
                (
                    "compute: {train: {gpus_per_worker: 1.5}}",
                    "compute.train.gpus_per_worker: a share of one GPU, or whole",
                ),
                ("compute: {map: {gpus_per_actor: 2.5}}", "compute.map.gpus_per_actor: a share of one GPU, or whole"),
                ("compute: {map: {gpus_per_actor: 0.00005}}", "Ray does not lend less than 0.0001, got 5e-05"),
                ("compute: {map: {cpus_per_actor: 0.00005}}", "Ray does not lend less than 0.0001, got 5e-05"),
                ("compute: {train: {cpus_per_worker: 0.00005}}", "Ray does not lend less than 0.0001, got 5e-05"),
                ("models: {m: {train: [d], start: ./nowhere}}", "there is no model folder './nowhere'"),
                ("models: {m: {train: [d], start: ./m, self_training: {pool: d}}}", "needs a teacher"),
            )
        ],
    ],
)
def test_other_faults_are_named(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in errors_of(tmp_path, text)


@pytest.mark.parametrize("gpus", [0, 0.0001, 0.6, 1, 2.0])
def test_gpus_come_in_shares_of_one_or_whole(tmp_path: Path, gpus: float) -> None:
    compute = f"compute: {{train: {{gpus_per_worker: {gpus}, cpus_per_worker: 1.5}}, map: {{gpus_per_actor: {gpus}}}}}"
    recipe = load_recipe(write(tmp_path, f"{GOOD}{compute}"))
    assert recipe.compute.train.gpus_per_worker == recipe.compute.map.gpus_per_actor == gpus


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    assert "once aliases are followed" in errors_of(tmp_path, "\n".join(levels))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(RecipeError, match="there is no such recipe file"):
        load_recipe("/does/not/exist.yaml")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("preset: smal", "translators.unit.preset: 'smal' is not allowed, did you mean 'small'?"),
        ("perceptual_layers: [relu5_4]", "vgg16 has no layer 'relu5_4', did you mean"),
        ("preset: small, perceptual_weights: vgg.pth", "perceptual_weights and perceptual_sha256 are of vgg16 only"),
        ("preset: small, perceptual_layers: [relu5_3]", "efficientnet_lite0 has no layer 'relu5_3'; it has stride_2"),
        ("shared_blocks: 5", "shared_blocks 5 of res_blocks 4"),
        ("preset: small, iterationz: 5", "translators.unit.iterationz: unknown key, did you mean 'iterations'?"),
        ("preset: small, crop: [64]", "translators.unit.crop"),
        ("adversarial_loss: hinge", "allowed: least_squares, cross_entropy"),
        ("perceptual_sha256: abc", "translators.unit.perceptual_sha256"),
    ],
)
def test_faults_of_translators_are_named(tmp_path: Path, keys: str, expected: str) -> None:
    text = GOOD.replace("unit: {day: day, night: night}", f"unit: {{day: day, night: night, {keys}}}")
    assert expected in errors_of(tmp_path, text)


@pytest.mark.parametrize("key", ["datasets.day.root", "models.m.start", "roots.data", "name"])
@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIA:geheim@bucket/a",
        "s3://AKIA:7/geheim@bucket/a",
        "s3:/AKIA:geheim@bucket/a",
        "https://host/a?X-Amz-Signature=geheim",
    ],
)
def test_credentials_in_a_recipe_are_refused_and_not_repeated(tmp_path: Path, key: str, address: str) -> None:
    """Wherever they stand: a recipe is stored with its run and shown in its report."""
    file = tmp_path / "r.yaml"
    file.write_text(
        "name: r\ntaxonomy: camvid11\ndatasets: {day: {layout: images, root: /nowhere}}\n"
        "models: {m: {train: [day]}}\ntest_sets: {day: day}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, [f"{key}={address}"])
    text = str(caught.value)
    assert f"{key}: " in text and "holds credentials" in text and "set them in the environment" in text
    assert "geheim" not in text and "AKIA" not in text
