"""Settings in YAML: a scalar that Python cannot hold has its line, dates are text, several documents are told apart."""

from pathlib import Path

import pytest
import yaml

from nightseg.errors import UserError
from nightseg.storage import Location
from nightseg.storage.yaml import MAX_NODES, parse_value, read_documents, read_yaml

BAD = {
    "!!bool 7": "'7' is no bool",
    "!!int abc": "'abc' is no int",
    "!!int ''": "'' is no int",
    "!!float abc": "'abc' is no float",
    "!!timestamp 2026-02-30": "'2026-02-30' is no timestamp",
    "!!timestamp soon": "'soon' is no timestamp",
    "0x_": "'0x_' is no int",
    "1" * 5000: f"'{'1' * 40}'... is no int",
    "0x" + "f" * 5000: f"'0x{'f' * 38}'... is no int",
}
DATES = ("2026-02-30", "2026-11-29", "2026-11-29T99:00:00", "2026-11-29T10:00:00+99:99")


def location(folder: Path, text: str) -> Location:
    (folder / "a.yaml").write_text(text)
    return Location.of(folder / "a.yaml")


@pytest.mark.parametrize(("value", "problem"), BAD.items(), ids=[key[:22] for key in BAD])
def test_a_scalar_that_cannot_be_has_its_line(tmp_path: Path, value: str, problem: str) -> None:
    key = f"? {value}\n: 1"  # so it may be long
    for text in (f"a: 1\nb:\n  c: {value}\n", f"a: 1\n\n{key}\n", f"a: 1\nb:\n- {value}\n"):
        with pytest.raises(UserError) as caught:
            read_yaml(location(tmp_path, text), "a.yaml", "recipe")
        assert str(caught.value).startswith(f"a.yaml: line 3: not valid YAML: {problem}")
        assert len(str(caught.value)) < 200
    with pytest.raises(yaml.YAMLError, match="is no "):
        parse_value(value)


@pytest.mark.parametrize("date", DATES)
def test_dates_are_text(tmp_path: Path, date: str) -> None:
    assert read_yaml(location(tmp_path, f"a: {date}"), "a.yaml", "recipe").data == {"a": date}
    assert parse_value(date) == date


@pytest.mark.parametrize(
    "text",
    ["[" * 3000, "&a [*a]", f"[&a [{'0, ' * 1000}], {'*a, ' * (MAX_NODES // 1000 + 1)}]", "a: [", "--- 1\n--- 2"],
)
def test_a_value_that_is_none(text: str) -> None:
    with pytest.raises(yaml.YAMLError):
        parse_value(text)


def test_a_value_shares_nothing() -> None:
    first, second = parse_value("[&a {b: 1}, *a]")
    assert first == second and first is not second
    assert parse_value("") is None and parse_value(b"1e-4") == 1e-4


def test_documents_have_their_lines_and_keys_that_stand_twice(tmp_path: Path) -> None:
    file = location(tmp_path, "---\na: 1\n---\n# nothing\n---\nb: 2\nb: 3\n---\n")
    first, second = read_documents(file, "a.yaml", "cluster")
    assert (first.data, first.twice, second.data, second.twice) == ({"a": 1}, [], {"b": 3}, [(("b",), 7)])
    with pytest.raises(UserError, match="another document"):
        read_yaml(file, "a.yaml", "cluster")


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: 1\n---\n- b\n", "a cluster is a mapping, not a list"), ("a: 1\n---\nb: [", "line 3: not valid YAML")],
)
def test_a_document_that_is_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_documents(location(tmp_path, text), "a.yaml", "cluster")
