"""Translators of all kinds and evaluations in a recipe: what is right, and what is said about the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from nightseg.recipe import RecipeError, load_recipe, save_recipe
from nightseg.recipe.types import TranslationEvaluation
from nightseg.storage import Location
from nightseg.translators.settings import ColourTranslator, CommandTranslator, FourierTranslator, PhotometricTranslator
from nightseg.unit.settings import Translator

GOOD = """
name: good
taxonomy: camvid11
datasets:
  day: {layout: scenes, count: 4}
  night: {layout: scenes, count: 4, mix: {night: 1.0}, labelled: false}
  made: {translate: day, by: optics}
  all: {join: [day, made]}
  turned: {translate: night, by: reinhard, to: day}
translators:
  unit: {day: day, night: night}
  optics: {kind: photometric, lights: 0.5}
  fourier: {kind: fourier, night: night, beta: 0.05}
  reinhard: {kind: colour, day: day, night: night}
  colour: {kind: colour, night: night, method: histogram, nearest: 1}
  program: {kind: command, argv: [run, "{input}", "{output}", "--seed={seed}"], to: [night, day]}
models:
  first: {train: [day]}
  second: {train: [all], start: first}
  third: {train: [day], start: second}
translations:
  made: {real: night}
"""


def write(folder: Path, text: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(text)
    return str(file)


def errors_of(folder: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, GOOD), overrides)
    return str(caught.value)


def test_every_kind_is_read_and_unit_needs_no_kind(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    kinds = {name: type(settings) for name, settings in recipe.translators.items()}
    assert kinds == {
        "unit": Translator,
        "optics": PhotometricTranslator,
        "fourier": FourierTranslator,
        "reinhard": ColourTranslator,
        "colour": ColourTranslator,
        "program": CommandTranslator,
    }
    assert recipe.translators["unit"].kind == "unit"
    assert recipe.translations == {"made": TranslationEvaluation(real="night")}


def test_a_saved_recipe_is_read_back_equal(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    saved = Location.of(tmp_path / "saved.yaml")
    save_recipe(recipe, saved)
    assert load_recipe(saved) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("translators.fourier.kind=fourrier", "kind: 'fourrier' is not allowed, did you mean 'fourier'?"),
        ("translators.fourier.kind=gan", "'gan' is not allowed; allowed: unit, photometric, fourier, colour, command"),
        ("translators.fourier.bete=0.1", "unknown key, did you mean 'beta'?; allowed: kind, night, day"),
        ("translators.optics.night=night", "unknown key, did you mean 'lights'?; allowed: kind, stops"),
        ("translators.colour.betha=1", "unknown key; allowed: kind, night, day, method, style_images, nearest"),
        ("translators.colour.method=reinhart", "'reinhart' is not allowed, did you mean 'reinhard'?"),
        ("translators.unit.weights.cycel=1", "translators.unit.weights.cycel: unknown key, did you mean 'cycle'?"),
        ("translators.fourier.night=nite", "fourier.night: there is no dataset 'nite', did you mean 'night'?"),
        ("translators.fourier.beta=0.7", "less than or equal to 0.5"),
        ("translators.optics.stops=[-1, -2]", "stops go from the darkest to the brightest exposure"),
        ("translators.optics.stops=[-1, 1]", "at most 0"),
        ("translators.optics.temperature=[900, 3000]", "between 1667 and 25000 kelvin"),
        ("translators.optics.classes={sky: [ski]}", "classes.sky.0: camvid11 has no class 'ski', did you mean 'sky'?"),
        ("translators.program.argv=[run]", "the arguments need {input}: the folder that the program reads"),
        ("translators.program.argv=[run, '{input}', '{ouput}']", "{ouput} is not filled in, did you mean 'output'?"),
        ("translators.program.argv=[]", "translators.program.argv: "),
    ],
)  # fmt: skip
def test_wrong_settings_are_named_in_the_words_of_their_kind(tmp_path: Path, override: str, message: str) -> None:
    found = errors_of(tmp_path, override)
    assert message in found, found
    assert found.startswith(f"{tmp_path}/recipe.yaml: 1 error;"), found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["datasets.made.to=day"], "datasets.made.to: the translator optics has no way to day"),
        (["datasets.turned.by=fourier"], "fourier has no way to day: it lacks style images"),
        (
            ["datasets.turned.by=program", "translators.program.to=[night]"],
            "program has no way to day: if the program can do it, add day to its list `to`",
        ),
    ],
)  # fmt: skip
def test_a_way_that_does_not_exist_is_refused_before_anything_runs(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert message in errors_of(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["translations.maid={}"], "translations.maid: there is no dataset 'maid', did you mean 'made'?"),
        (["translations.day={}"], "translations.day: day is no translated dataset, so there is nothing to measure"),
        (["translations.made.segmenter=fist"], "there is no model 'fist', did you mean 'first'?"),
        (["translations.made.real=null"], "the translator has no night frames to compare with: say `real: DATASET`"),
        (
            ["translations.made.segmenter=second"],
            "second learned from translated frames (made), so it cannot measure them",
        ),
        (
            ["translations.made.segmenter=third"],
            "third learned from translated frames (made), so it cannot measure them",
        ),
        (["models={}"], "translations.made.segmenter: the recipe has no model to measure with"),
        (["translations.made.extractor=inceptoin"], "unknown extractor 'inceptoin', did you mean 'inception'?"),
        (["translations.made.reel=night"], "translations.made.reel: unknown key, did you mean 'real'?"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in errors_of(tmp_path, *overrides)


def test_the_translators_own_frames_are_the_real_ones_by_default(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD), ["datasets.made.by=fourier", "translations.made={}"])
    assert recipe.translations["made"].real is None


def test_a_translator_may_have_the_name_of_a_kind(tmp_path: Path) -> None:
    found = errors_of(tmp_path, "translators.command={kind: colour, night: night, metod: histogram}")
    assert "translators.command.metod: unknown key, did you mean 'method'?; allowed: kind, night, day, method" in found
