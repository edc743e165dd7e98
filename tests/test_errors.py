"""The hint behind a word that is not known, names of a long list, several errors as one."""

import pickle

import pytest

from nightseg.errors import UserError, all_of, closest, first_of, together


def test_the_closest_known_word_is_offered_and_only_if_it_is_close() -> None:
    assert closest("cityscape19", ("cityscapes19", "camvid11")) == ", did you mean 'cityscapes19'?"
    assert closest("mIoU", ("pa", "miou")) == ", did you mean 'miou'?"
    assert closest("rood", ("Road", "Sky")) == ", did you mean 'Road'?"
    assert closest("zebra", ("cityscapes19", "camvid11")) == ""
    assert closest("a", {}) == ""


def test_a_long_list_shows_its_first_names() -> None:
    assert first_of(["a", "b"]) == "a, b"
    assert first_of(list("abcdefg")) == "a, b, c, d, e and 2 more"


def test_several_errors_are_one_each_once_and_the_first_of_each_kind() -> None:
    one, two = UserError("a: wrong", cure="mend a"), UserError("b: wrong", cure="mend b")
    assert together([one, one]) is one
    both = together([one, two])
    assert str(both).splitlines()[:2] == ["2 problems:", "- a: wrong. Cure: mend a."]
    assert str(both).endswith("- b: wrong. Cure: mend b. Cure: all of these, then the same command.")
    flat = together([both, UserError("c: wrong", cure="mend c"), one])
    assert flat.problems == [one, two, flat.problems[2]] and str(flat).startswith("3 problems:\n- a: wrong")
    many = together([UserError(f"{number}: wrong.", cure="mend it") for number in range(30)] + [two])
    assert str(many).split("\n- ") == [
        *("31 problems:", "0: wrong", "1: wrong", "2: wrong", "and 27 more like these. Cure: mend it."),
        "b: wrong. Cure: mend b. Cure: all of these, then the same command.",
    ]
    pair = together([UserError("a: wrong", cure="mend it"), UserError("c: wrong", cure="mend it")])
    assert str(pair) == "2 problems:\n- a: wrong\n- c: wrong. Cure: mend it.", "one cure of all"
    kinds = together([UserError(f"{number}: wrong", cure=f"mend {number % 15}") for number in range(45)])
    assert (
        "\n- and 15 more. Cure: all of these" in str(kinds) and "mend 9." in str(kinds) and "mend 10." not in str(kinds)
    )
    assert str(pickle.loads(pickle.dumps(many))) == str(many)  # it comes from an actor


def test_all_steps_are_tried_and_all_that_fail_are_told() -> None:
    def fails(where: str) -> None:
        raise UserError(f"{where}: wrong", cure="mend it")

    assert all_of(lambda: 1, lambda: "two") == [1, "two"]
    with pytest.raises(UserError) as refused:
        all_of(lambda: fails("a"), lambda: 1, lambda: fails("b"), lambda: fails("a"))
    assert [problem.what for problem in refused.value.problems] == ["a: wrong", "b: wrong"]


def test_a_problem_that_is_told_with_its_place_is_not_told_again_without() -> None:
    bare, placed = (
        UserError("no image in /a", cure="check it"),
        UserError("r.yaml: line 3: no image in /a", cure="check it"),
    )
    assert together([bare, placed]) is placed
    assert together([placed, bare]) is placed
    assert together([UserError("no image in /a.", cure="check it"), placed]) is placed
    other = UserError("r.yaml: line 9: no image in /a", cure="another")
    assert together([bare, other]).problems == [bare, other]
