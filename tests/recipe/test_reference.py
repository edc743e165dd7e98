"""docs/recipe.md is what the types say, and the types say what every key is."""

from pathlib import Path

from nightseg.recipe.reference import allowed_keys, allowed_values, render_reference
from nightseg.recipe.types import Recipe

DOCS = Path(__file__).parents[2] / "docs" / "recipe.md"


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
