"""docs/recipe.md is what the types say, and the types say what every key is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from nightseg.recipe.reference import all_keys, allowed_keys, allowed_values, editor_schema, render_reference
from nightseg.recipe.types import Recipe
from nightseg.storage.yaml import Loader

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs" / "recipe.md"
CONFIGS = PROJECT / "configs"


def test_the_docs_are_what_the_types_say() -> None:
    command = "python -c 'from nightseg.recipe.reference import *; print(render_reference())' > docs/recipe.md"
    assert DOCS.read_text() == render_reference() + "\n", f"made again by {command}"


def test_every_key_is_described() -> None:
    schema = Recipe.model_json_schema()
    bare = [
        f"{name}.{key}"
        for name, settings in {"Recipe": schema, **schema["$defs"]}.items()
        for key, value in settings["properties"].items()
        if not value.keys() & {"description", "$ref", "const"}
    ]
    assert not bare, f"give these fields a description: {', '.join(bare)}"


def test_a_tag_of_a_kind_is_no_key() -> None:
    assert allowed_keys(Recipe, ("datasets", "night", "split")) == ["split", "keep", "margin"]
    assert allowed_keys(Recipe, ("datasets", "split", "join")) == ["join"]  # a dataset with the name of a kind
    assert allowed_keys(Recipe, ("models", "m", "loss"))[:2] == ["kind", "alpha"]
    assert allowed_values(Recipe, ("datasets", "d", "folder", "layout"))[-1] == "scenes"


# -- editors -----------------------------------------------------------------------------------------------------------

SCENES = {"layout": "scenes", "count": 2}
WHOLE = {"name": "r", "datasets": {"d": SCENES}}


def faults(recipe: Mapping[str, Any]) -> list[str]:
    return [error.message for error in Draft202012Validator(editor_schema()).iter_errors(recipe)]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_schema_takes_every_recipe_of_the_project(file: Path) -> None:
    Draft202012Validator.check_schema(editor_schema())
    written = yaml.load(file.read_text(), Loader=Loader)
    assert not faults(written) or "space" in written  # a search


@pytest.mark.parametrize(
    ("changed", "is_good"),
    [
        ({}, True),
        ({"trainig": {}}, False),
        ({"training": {"epochs": 0}}, False),
        ({"training": {"preset": "thesis"}}, True),
        ({"models": {"m": {"train": ["d"], "training": {"epochs": 3}}}}, True),
        ({"models": {"m": {"train": ["d"], "training": {"epoch": 3}}}}, False),
        ({"models": {"m": None}}, False),
        ({"datasets": {"d": {"layout": "scenes"}}}, False),
    ],
)
def test_the_schema_says_what_is_wrong_in_an_editor(changed: dict[str, Any], is_good: bool) -> None:
    assert bool(faults(WHOLE | changed)) is not is_good


def test_a_recipe_with_a_base_says_only_what_it_changes() -> None:
    based = {"base": "b.yaml", "datasets": {"d": {"count": 3}, "e": None}, "models": {"m": {"training": {"epochs": 1}}}}
    assert not faults(based)
    assert faults(based | {"training": {"epoch": 1}})
    assert faults({key: value for key, value in based.items() if key != "base"})


# -- all keys ----------------------------------------------------------------------------------------------------------


def test_every_key_is_listed_with_type_and_default() -> None:
    keys = {key.key: key for key in all_keys()}
    assert keys["training.epochs"][1:] == ("integer >= 1", "60", "number of epochs")
    assert keys["name"].default == "required"
    assert keys["models.NAME.training.*"].description == "as training.*"
    listed = {
        f"{name}.{key}" for name, kind in Recipe.model_json_schema()["$defs"].items() for key in kind["properties"]
    }
    assert len(keys) > len(listed) - 20  # mappings of settings have no line of their own
