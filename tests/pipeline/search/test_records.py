"""Records know what is done, what was under way, and what counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nightseg.pipeline.search.proposals import propose
from nightseg.pipeline.search.records import Records
from nightseg.storage import Location, hash_of
from tests.small_search import ALPHA, COUNT, search_of

SPACE = f"space={{{ALPHA}: {{uniform: [0, 1]}}, {COUNT}: {{choice: [60, 120]}}}}"


def records_of(folder: Path, *overrides: str, recipe: str = "") -> Records:
    return Records(Location.of(folder), search_of(SPACE, *overrides), lambda values: hash_of([recipe, values])[:12])


def begun(folder: Path, count: int) -> Records:
    """Trials that are done with the scores 0.1, 0.2, ..."""
    records = records_of(folder, f"trials={count}")
    for number in range(1, count + 1):
        one = records.next(propose)
        records.end(one, end="done", miou=number / 10, epochs=3, curve=[[3, number / 10]], seconds=1.0, error=None)
    return records


def test_a_trial_is_noted_before_it_begins_and_comes_first_after_a_kill(tmp_path: Path) -> None:
    records = records_of(tmp_path, "trials=3")
    first, second = records.next(propose), records.next(propose)
    records.end(first, end="done", miou=0.3, epochs=3, curve=[[3, 0.3]], error=None)
    again = records_of(tmp_path, "trials=3")  # as after a SIGKILL: only what was written is known
    assert [one["end"] for one in again.rows] == ["done", None]
    assert again.next(propose) == second
    third = again.next(propose)
    assert third["number"] == 3 and third["trial"] not in (first["trial"], second["trial"])
    assert again.next(propose) is None


def test_records_lie_on_any_storage(request: pytest.FixtureRequest) -> None:
    folder = Location.of(request.getfixturevalue("s3").place("records")) / "search"
    search = search_of(SPACE, "trials=2")
    for is_first in (True, False):  # the second finds what the first, killed, had begun
        records = Records(folder, search, lambda values: hash_of(values))
        assert len(records.rows) == (0 if is_first else 1)
        assert records.next(propose)["number"] == 1


def test_trials_count_that_were_done_before(tmp_path: Path) -> None:
    begun(tmp_path, 2)
    finished, more = records_of(tmp_path, "trials=2"), records_of(tmp_path, "trials=3")
    assert finished.is_finished and finished.next(propose) is None
    assert not more.is_finished and more.next(propose)["number"] == 3 and more.next(propose) is None


def test_a_space_without_values_left_is_finished(tmp_path: Path) -> None:
    space = f"space={{{COUNT}: {{choice: [60, 120]}}}}"
    records = Records(Location.of(tmp_path), search_of(space, "trials=9"), lambda values: hash_of(values))
    for _ in range(2):
        records.end(records.next(propose), end="done", miou=0.1)
    assert records.is_finished and records.next(propose) is None


def test_a_search_that_has_too_few_values_says_so_when_it_has_ended(tmp_path: Path) -> None:
    space = f"space={{{COUNT}: {{choice: [60, 120]}}}}"
    records = Records(Location.of(tmp_path), search_of(space, "trials=9"), lambda values: hash_of(values))
    first, last = records.next(propose), records.next(propose)
    records.end(first, end="done", miou=0.1)
    assert records.shortfall is None  # one is at work
    records.end(last, end="done", miou=0.1)
    told = json.loads((tmp_path / "trials.json").read_text())["shortfall"]
    assert told == records.shortfall == "only 2 different values: ended after 2 of 9 trials"
    wide = records_of(tmp_path / "wide", "trials=9")  # a range of real numbers: known when it is asked
    assert wide.shortfall is None and wide.next(lambda *_: None) is None
    assert wide.shortfall == "only 0 different values: ended after 0 of 9 trials"
    assert begun(tmp_path / "enough", 2).shortfall is None


def test_failed_trials_are_asked_again_and_others_are_not(tmp_path: Path) -> None:
    records = begun(tmp_path, 3)
    records.end(records.rows[1], end="failed", error="no room", miou=None)
    again = records_of(tmp_path, "trials=3")
    assert not again.is_finished
    assert again.next(propose)["number"] == 2 and again.next(propose) is None


@pytest.mark.parametrize("override", ["grace_epochs=2", "metric=pa", "mode=min"])
def test_trials_that_are_compared_otherwise_are_asked_again(tmp_path: Path, override: str) -> None:
    """They find what they have committed; what is stopped may go on now."""
    begun(tmp_path, 2)
    again = records_of(tmp_path, "trials=2", override)
    assert [again.next(propose)["number"] for _ in range(2)] == [1, 2] and again.best is None
    same = records_of(tmp_path, "trials=2", "seed=5", "sampler=random", "concurrent=2")
    assert not same.is_finished  # the kill came before they had ended


def scored(records: Records, score: float, **more: Any) -> None:
    """The next trial, done."""
    records.end(records.next(propose), **{"end": "done", records.search.metric: score, "curve": [], **more})


def test_trials_that_come_back_are_asked_again_if_they_were_compared_otherwise(tmp_path: Path) -> None:
    """Both ways out of the space and back: while they are away, the metric and the grace change."""
    for metric, grace in (("miou", 2), ("pa", 1)):
        folder = tmp_path / metric
        first = begun(folder, 3)
        beside = f"space.{ALPHA}={{uniform: [{max(row['values'][ALPHA] for row in first.rows) + 1e-3}, 1.0]}}"
        changes = [f"metric={metric}", f"grace_epochs={grace}"]
        away = records_of(folder, "trials=1", beside, *changes)
        assert away.rows == [] and len(away.others) == 3
        scored(away, 0.5)
        back = records_of(folder, "trials=4", *changes)
        assert [row["number"] for row in back.rows] == [4] and back.best == back.rows[0] == back.ranked[0]
        asked = []
        for score in (0.7, 0.8, 0.6):
            asked.append(back.next(propose))
            assert asked[-1].keys().isdisjoint({"miou", "pa", "epochs", "seconds"})  # nothing of what was
            back.end(asked[-1], end="done", **{metric: score})
        assert [row["number"] for row in asked] == [1, 2, 3] and back.others == [] and back.is_finished
        assert [row["number"] for row in back.rows] == [1, 2, 3, 4]
        assert back.best is not None and back.best["number"] == 2


def test_trials_that_were_not_asked_again_keep_what_they_are(tmp_path: Path) -> None:
    """A change of the metric and back, with a kill in between: two trials of three were asked by then."""
    begun(tmp_path, 3)
    other = records_of(tmp_path, "trials=3", "metric=pa")
    assert other.rows == [] and [row["end"] for row in other.others] == ["done"] * 3
    scored(other, 0.9)
    other.next(propose)
    same = records_of(tmp_path, "trials=3")
    assert [(row["number"], row["miou"]) for row in same.rows] == [(3, 0.3)]
    assert [same.next(propose)["number"] for _ in range(2)] == [1, 2] and same.next(propose) is None


@pytest.mark.parametrize("override", ["grace_epochs=2", "metric=pa", "mode=min"])
def test_trials_that_are_trained_are_asked_again_when_the_time_is_over(tmp_path: Path, override: str) -> None:
    """Also after a kill of that; those that would have to train are not, and stay as they are."""
    records = begun(tmp_path, 4)
    for row, end in zip(records.rows, ("done", "stopped", "done", "failed"), strict=True):
        records.end(row, end=end)
    content = json.loads((tmp_path / "trials.json").read_text())
    (tmp_path / "trials.json").write_text(json.dumps(content | {"seconds": 3601.0}))
    late = ["trials=5", "hours=1"]
    unchanged = records_of(tmp_path, *late)
    assert unchanged.is_finished and [row["end"] for row in unchanged.rows] == ["done", "stopped", "done", "failed"]
    changed = records_of(tmp_path, *late, override)
    assert not changed.is_finished and len(changed.again) == 2
    assert changed.next(propose)["number"] == 1
    changed = records_of(tmp_path, *late, override)  # after a kill
    scored(changed, 0.2)
    scored(changed, 0.4)
    assert changed.next(propose) is None and changed.is_finished and changed.best is not None
    assert [row["number"] for row in changed.rows] == [1, 3]
    assert [(row["number"], row["end"]) for row in changed.others] == [(2, "stopped"), (4, "failed")]
    assert changed.shortfall == "the time was over: ended after 2 of 5 trials"


def test_all_are_asked_again_though_fewer_trials_are_asked_for(tmp_path: Path) -> None:
    begun(tmp_path, 3)
    fewer = records_of(tmp_path, "trials=1", "mode=min")
    assert len(fewer.again) == 3
    for _ in range(3):
        scored(fewer, 0.5)
    assert fewer.next(propose) is None and all(row["end"] == "done" for row in fewer.rows)


def test_trials_outside_of_the_space_or_of_another_recipe_are_kept_and_do_not_count(tmp_path: Path) -> None:
    values = [one["values"] for one in begun(tmp_path, 3).rows]
    narrow = records_of(tmp_path, f"space.{ALPHA}={{uniform: [0.0, {sorted(one[ALPHA] for one in values)[0]}]}}")
    assert len(narrow.rows) == 1 and len(narrow.others) == 2
    narrow.write()
    assert len(records_of(tmp_path).rows) == 3
    other = records_of(tmp_path, "trials=3", recipe="another")
    assert other.rows == [] and other.next(propose)["number"] == 4
    assert [one["number"] for one in records_of(tmp_path).rows] == [1, 2, 3]


@pytest.mark.parametrize(("mode", "order"), [("max", [3, 1, 2]), ("min", [1, 3, 2])])
def test_the_best_is_a_trial_that_came_to_its_end(tmp_path: Path, mode: str, order: list[int]) -> None:
    records = records_of(tmp_path, f"mode={mode}", "trials=5")
    for end, score in (("done", 0.3), ("stopped", 0.9 if mode == "max" else 0.1), ("done", 0.4), ("failed", None)):
        records.end(records.next(propose), end=end, miou=score)
    records.next(propose)  # is at work
    assert [one["number"] for one in records.ranked] == [*order, 4]
    assert records.best is not None and records.best["number"] == order[0]


def test_no_trial_begins_when_the_time_is_over(tmp_path: Path) -> None:
    assert records_of(tmp_path, "hours=1").next(propose)["number"] == 1
    content: dict[str, Any] = json.loads((tmp_path / "trials.json").read_text())
    (tmp_path / "trials.json").write_text(json.dumps(content | {"seconds": 3601.0}))  # of earlier starts
    late = records_of(tmp_path, "hours=1")
    assert late.is_finished and late.next(propose) is None
    assert records_of(tmp_path, "hours=2").next(propose)["number"] == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"trials": 3}', b"\xff"])
def test_damaged_records_are_begun_anew(tmp_path: Path, damage: bytes) -> None:
    """The values follow from the seed, and the run folders of the trials are still there."""
    first = begun(tmp_path, 1).rows[0]
    (tmp_path / "trials.json").write_bytes(damage)
    assert records_of(tmp_path).next(propose)["trial"] == first["trial"]
