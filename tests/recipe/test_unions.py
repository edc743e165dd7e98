"""Where several types are allowed an error is about the one that was meant, at the place that was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from nightseg.recipe import RecipeError, load_recipe

TEXT = """
name: a
datasets: {day: {layout: scenes, count: 4}}
translators: {optics: {kind: photometric}, other: {kind: command, argv: [a, "{input}", "{output}"]}}
models: {m: {train: [day]}}
"""


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("models.m.train={day: 0}", "models.m.train.day: input should be greater than 0, got the number 0"),
        ("models.m.train={day: x}", "models.m.train.day: input should be a valid number, got the text 'x'"),
        ("models.m.train=[5]", "models.m.train.0: input should be a valid string, got the number 5"),
        ("models.m.train=5", "models.m.train: input should be a list or a mapping, got the number 5"),
        ("loss.class_weights=5", "loss.class_weights: input should be a mapping or a list, got the number 5"),
        ("loss.class_weights={sky: x}", "loss.class_weights.sky: input should be a valid number, got the text 'x'"),
        ("translators.optics.sky=-1", "translators.optics.sky: input should be greater than or equal to 0"),
        ("translators.optics.sky=[1, x]", "translators.optics.sky.1: input should be a valid number"),
        ("translators.optics.sky=[1]", "translators.optics.sky.1: this key is required"),
        ("translators.optics.sky={}", "translators.optics.sky: input should be a number or a list, got a mapping"),
        ("translators.other.revision=[1]", "translators.other.revision: input should be a whole number or text"),
        ("datasets.day.count=x", "datasets.day.count: input should be a valid integer, got the text 'x'"),
        ("network.input_size=5", "network.input_size: input should be a list, got the number 5"),
        ("network.input_size=[5]", "network.input_size.1: this key is required"),
        ("test_sets=[day]", "test_sets: input should be a mapping, got a list"),
    ],
)
def test_one_error_at_the_place_that_was_written(tmp_path: Path, override: str, expected: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(TEXT)
    load_recipe(file)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, [override])
    head, *lines = str(caught.value).splitlines()
    assert ": 1 error;" in head and len(lines) == 1, str(caught.value)
    assert expected in lines[0] and "constrained" not in lines[0] and "valid array" not in lines[0]
