"""Keys of a space that make no other trials, or trials that cannot be compared, are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from nightseg.pipeline.search.keys import check_keys
from nightseg.progress import SilentProgress
from nightseg.storage import UserError
from tests.small_search import ALPHA, COUNT, GAMMA, changed, trials_of


class Heard(SilentProgress):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)


def said(folder: Path, space: str, *overrides: str) -> list[str]:
    """What is said of a space that is accepted."""
    trials, heard = changed(trials_of(folder, f"space={{{space}}}"), *overrides), Heard()
    check_keys(trials, [(values, trials.graph(values)) for values in trials.edges()], heard)
    return heard.messages


@pytest.mark.parametrize(
    "space",
    [
        f"{ALPHA}: {{uniform: [0, 1]}}, {GAMMA}: {{uniform: [0, 4]}}, {COUNT}: {{choice: [60, 120]}}",
        "models.adapted.start: {choice: [day_and_night, day_only]}",
        "models.adapted.training.learning_rate: {log_uniform: [1e-4, 1e-2]}",
        "models.day_and_night.training.learning_rate: {uniform: [1e-4, 1e-3]}",
        "models.adapted.loss.kind: {choice: [cross_entropy, combined]}, models.adapted.loss.gamma: {uniform: [0, 4]}",
    ],
)
def test_keys_that_make_other_trials_are_taken(tmp_path: Path, space: str) -> None:
    assert said(tmp_path, space) == []


@pytest.mark.parametrize(
    ("space", "overrides", "expected"),
    [
        ("compute.map.batch: {choice: [1, 4]}", (), "all trials would be the same"),
        ("compute.train.workers: {choice: [1, 2]}", (), "all trials would be the same"),
        ("name: {choice: [a, b]}", (), "all trials would be the same"),
        (
            "models.day_only_longer.training.learning_rate: {uniform: [1e-4, 1e-3]}",
            (),
            "adapted does not depend on it",
        ),
        (f"{GAMMA}: {{uniform: [0, 4]}}", ("models.adapted.loss.kind=cross_entropy",), "has no such term"),
        (f"{ALPHA}: {{uniform: [0, 1]}}", ("models.adapted.loss.kind=focal",), "set models.adapted.loss.kind=combined"),
        ("models.adapted.validate_on.0: {choice: [night_val, night_test]}", (), "could not be compared"),
        ("test_sets.night: {choice: [night_test, night_val]}", (), "could not be compared"),
        ("datasets.night_val.count: {choice: [20, 40]}", (), "could not be compared"),
        ("evaluation.absent_class: {choice: [cityscapes, detectron2]}", (), "could not be compared"),
    ],
)
def test_keys_that_make_no_difference_or_another_measure_are_refused(
    tmp_path: Path, space: str, overrides: tuple[str, ...], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        said(tmp_path, space, *overrides)
    assert expected in str(caught.value) and space.split(":")[0] in str(caught.value)


def test_all_such_keys_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        said(tmp_path, f"compute.map.batch: {{choice: [1, 4]}}, {ALPHA}: {{uniform: [0, 1]}}, name: {{choice: [a, b]}}")
    assert "space.compute.map.batch" in str(caught.value) and "space.name" in str(caught.value)


def test_a_key_that_only_the_base_reads_is_told(tmp_path: Path) -> None:
    (message,) = said(tmp_path, "training.learning_rate: {log_uniform: [1e-4, 1e-2]}")
    assert message.startswith("space.training.learning_rate reaches adapted only by train_segmenter/")
