"""Paths as people write them: what fits a pattern, and what its placeholders stand for."""

from __future__ import annotations

import pytest

from nightseg.data.patterns import pattern_of
from nightseg.storage import UserError


@pytest.mark.parametrize(
    ("text", "folder", "name", "values"),
    [
        ("rgb", "rgb", "a/b.png", {}),
        ("rgb/*.jpg", "rgb", "b.jpg", {}),
        ("rgb/*.jpg", "rgb", "a/b.jpg", None),
        ("rgb/**/*.jpg", "rgb", "a/c/b.jpg", {}),
        ("rgb/**/*.jpg", "rgb", "b.jpg", {}),
        ("rgb/**/left_*.jpg", "rgb", "a/b.jpg", None),
        ("rgb/{name}_left", "rgb", "a/b_left.png", {"name": "a/b"}),
        ("rgb/{name}_left.png", "rgb", "b_left.jpg", None),
        ("{city}/rgb/{name}.jpg", "", "ulm/rgb/1.jpg", {"city": "ulm", "name": "1"}),
        ("{city}/{city}_{name}.jpg", "", "ulm/ulm_1.jpg", {"city": "ulm", "name": "1"}),
        ("{city}/{city}_{name}.jpg", "", "ulm/aachen_1.jpg", None),
        ("cam[01]/?.png", "", "cam1/7.png", {}),
        ("cam[!01]/*", "", "cam1/7.png", None),
        ("/data/x/{name}.png", "/data/x", "y.png", {"name": "y"}),
        ("a.b/{name}+{n}.png", "a.b", "y+z.png", {"name": "y", "n": "z"}),
    ],
)
def test_patterns(text: str, folder: str, name: str, values: dict[str, str] | None) -> None:
    pattern = pattern_of(text)
    assert pattern.folder == folder and pattern.match(name) == values
    if values and "." in text.rpartition("/")[2]:
        assert pattern.filled(values) == name


@pytest.mark.parametrize("text", ["a/{name", "a/name}.png", "a/{}.png", "a/{two words}.png"])
def test_braces_without_a_placeholder_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="a brace without a placeholder"):
        pattern_of(text)
