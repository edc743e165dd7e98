"""Presets stand under what the recipe says; what they stand for is what their sources say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nightseg.recipe import load_recipe, presets
from nightseg.recipe.load import RecipeError, save_recipe
from nightseg.segmenter.settings import Training
from nightseg.storage import Location
from nightseg.unit.settings import Translator


def recipe(folder: Path, **sections: Any) -> Path:
    file = folder / "recipe.yaml"
    day = {"day": {"layout": "scenes", "count": 2}}
    file.write_text(yaml.safe_dump({"name": "r", "taxonomy": "camvid11", "datasets": day, **sections}))
    return file


def test_detectron2_is_its_1x_schedule(tmp_path: Path) -> None:
    training = load_recipe(recipe(tmp_path, training={"preset": "detectron2"})).training
    assert (training.optimizer, training.learning_rate, training.momentum, training.weight_decay) == (
        "sgd",
        0.02,
        0.9,
        1e-4,
    )
    total = training.epochs * (training.steps_per_epoch or 0)
    assert (training.batch, total, training.warmup_steps) == (16, 90_000, 1000)
    assert [round(share * total) for share in training.decay_at] == [60_000, 80_000]
    assert (training.decay, training.decay_factor, training.decay_biases) == ("step", 0.1, True)
    assert training.freeze_batch_norm
    assert training.augmentation.scale == (640 / 800, 1.0)


def test_thesis_is_the_released_code_with_one_decay(tmp_path: Path) -> None:
    training = load_recipe(recipe(tmp_path, training={"preset": "thesis"})).training
    assert (training.optimizer, training.learning_rate, training.momentum, training.weight_decay) == (
        "sgd",
        0.01,
        0.9,
        1e-5,
    )
    assert (training.batch, training.epochs, training.decay, training.crop) == (4, 60, "cosine", (512, 1024))
    assert (training.augmentation.scale, training.augmentation.flip) == ((0.5, 2.0), 0.0)


def test_what_is_written_wins_mapping_by_mapping(tmp_path: Path) -> None:
    file = recipe(
        tmp_path,
        training={"preset": "detectron2", "batch": 8, "augmentation": {"flip": 0.0}},
        models={"m": {"train": ["day"], "training": {"preset": "thesis", "epochs": 3}}, "n": {"train": ["day"]}},
    )
    found = load_recipe(file, ["training.learning_rate=0.01", "models.n.training.preset=detectron2"])
    assert (found.training.batch, found.training.learning_rate, found.training.steps_per_epoch) == (8, 0.01, 5000)
    assert (found.training.augmentation.scale, found.training.augmentation.flip) == ((0.8, 1.0), 0.0)
    assert found.models["m"].training is not None and found.models["n"].training is not None
    assert (found.models["m"].training.epochs, found.models["m"].training.decay) == (3, "cosine")
    assert found.models["n"].training.learning_rate == 0.02


def test_the_resolved_recipe_has_the_values_and_reads_back(tmp_path: Path) -> None:
    found = load_recipe(recipe(tmp_path, training={"preset": "detectron2"}))
    assert found.training.preset is None
    save_recipe(found, Location.of(tmp_path / "resolved.yaml"))
    assert load_recipe(tmp_path / "resolved.yaml") == found


def test_an_unknown_preset_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"training.preset: 'detectron' is not allowed, did you mean 'detectron2'\?"):
        load_recipe(recipe(tmp_path, training={"preset": "detectron"}))


def test_a_preset_outside_of_a_file_is_not_silently_empty() -> None:
    with pytest.raises(ValidationError, match=r"filled in when a recipe file is read"):
        Training(preset="thesis")


@pytest.mark.parametrize("name", presets("training"))
def test_every_preset_is_a_training(name: str, tmp_path: Path) -> None:
    assert load_recipe(recipe(tmp_path, training={"preset": name})).training.epochs > 0


def unit(folder: Path, **settings: Any) -> Translator:
    translators = {"unit": {"day": "day", "night": "day", **settings}}
    translator = load_recipe(recipe(folder, translators=translators)).translators["unit"]
    assert isinstance(translator, Translator)
    return translator


@pytest.mark.parametrize("name", presets("unit"))
def test_every_preset_is_a_translator(name: str, tmp_path: Path) -> None:
    assert unit(tmp_path, preset=name).iterations > 0


def test_unit_is_filled_mapping_by_mapping(tmp_path: Path) -> None:
    paper = unit(tmp_path, preset="paper", crop=[64, 128], batch=3, weights={"cycle": 7, "perceptual": 0.5})
    assert (paper.crop, paper.batch, paper.weights.cycle, paper.weights.perceptual) == ((64, 128), 3, 7.0, 0.5)
    assert (paper.adversarial_loss, paper.shared_blocks, paper.iterations) == ("cross_entropy", 1, 500_000)
    assert (paper.weights.adversarial, paper.weights.reconstruction, paper.weights.cycle_kl) == (10.0, 100.0, 0.1)


def test_a_preset_is_of_unit_only(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"translators.p.preset: unknown key"):
        load_recipe(recipe(tmp_path, translators={"p": {"kind": "photometric", "preset": "small"}}))
