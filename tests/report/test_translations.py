"""The table of translations: floors, differences, the best of each column; best and worst frames; the sheet."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nightseg.report import translation_sheet, write_report
from nightseg.report.formatting import decimals
from nightseg.report.run import Run
from nightseg.report.translations import extremes, translation_table
from nightseg.storage import Location, UserError


def with_others(made_up_run: Any, **changes: dict[str, Any]) -> Run:
    """The run with further evaluated translations: the one it has, changed."""
    results = copy.deepcopy(made_up_run.results)
    first = results["translations"]["day_at_night"]
    results["translations"] |= {name: {**first, **change} for name, change in changes.items()}
    return Run(made_up_run.folder, results)


def test_the_untranslated_source_is_the_floor(made_up_run: Any) -> None:
    run = Run(made_up_run.folder, made_up_run.results)
    floor, row = translation_table(run)["rows"]
    assert (floor["name"], floor["is_floor"], floor["fid"], floor["kid"]) == ("day", True, 98.5, 0.0456)
    assert floor["translated"] == 0.55 and floor["survival"] is None and floor["pixels"] is None
    assert floor["models"]["night"] == [("day_only", run.miou("day_only", "night"), None)]
    assert (row["name"], row["fid"], row["translated"], row["back"]) == ("day_at_night", 61.25, 0.31, 0.44)
    assert (row["survival"], row["pixels"], row["agreement"], row["edges"]) == (0.8, 0.7, 0.52, 0.71)


def test_models_are_compared_with_their_controls_of_equal_steps(made_up_run: Any) -> None:
    run = Run(made_up_run.folder, made_up_run.results)
    (model, miou, points) = translation_table(run)["rows"][1]["models"]["night"][0]
    assert (model, miou) == ("self_trained", run.miou("self_trained", "night"))
    assert points == pytest.approx(100 * (miou - run.miou("day_only_longer", "night")))


def test_the_best_of_each_column_is_marked_and_floors_do_not_compete(made_up_run: Any) -> None:
    other = {"fid": {"translated": 99.0, "source": 98.5}, "survival": None, "edges": 0.9}
    found = translation_table(with_others(made_up_run, other=other))
    assert [row["name"] for row in found["rows"]] == ["day", "day_at_night", "other"]
    assert (found["best"]["fid"], found["best"]["edges"], found["best"]["survival"]) == (61.25, 0.9, None)
    again = translation_table(with_others(made_up_run, other={"real": "dusk"}))
    assert [row["name"] for row in again["rows"]] == ["day", "day_at_night", "day", "other"]  # another comparison


def test_frames_with_least_and_most_agreement_are_shown(made_up_run: Any) -> None:
    (part,) = extremes(Run(made_up_run.folder, made_up_run.results), samples=4)
    groups = dict(part["groups"])
    assert set(groups) == {"least agreement", "most agreement"} and [len(rows) for rows in groups.values()] == [2, 2]
    worst, best = groups["least agreement"][0], groups["most agreement"][0]
    assert [picture.caption for picture in worst] == ["source", "night", "day_only on source", "day_only on night"]
    assert (worst[0].detail, best[0].detail) == ("day/000", "day/004")
    assert "60 % of its pixels agree" in worst[-1].detail and "80 % of its pixels agree" in best[-1].detail
    assert worst[1].detail == "edges 0.71" and worst[-1].is_label


def test_the_page_shows_the_table(made_up_run: Any, tmp_path: Path) -> None:
    page = write_report(made_up_run.folder, made_up_run.results, samples=2).read_bytes().decode()
    for text in (
        "61.25",
        "12.30",
        "98.50",
        "45.60",
        "80.0",
        "Least agreement",
        "the distance that a translation has to beat",
    ):
        assert text in page, text


def test_a_run_without_evaluated_translations_has_no_table(made_up_run: Any) -> None:
    plain = made_up_run.results | {"translations": {}}
    run = Run(made_up_run.folder, plain)
    assert translation_table(run)["rows"] == [] and extremes(run, 4) == []
    page = write_report(made_up_run.folder, plain).read_bytes().decode()
    assert "day_<wbr>at_<wbr>night" in page or "day_at_night" in page
    assert "KID" not in page


def test_a_run_whose_pictures_are_gone_keeps_its_table(made_up_run: Any, tmp_path: Path) -> None:
    results = copy.deepcopy(made_up_run.results)
    for facts in results["commits"].values():
        facts["folder"] = "/gone/stages/x/y/0123456789ab/attempt-1"
    run = Run(Location.of(tmp_path), results)
    assert len(translation_table(run)["rows"]) == 2 and extremes(run, 4) == []
    with pytest.raises(UserError, match="no translated frame"):
        translation_sheet(Location.of(tmp_path), results, Location.of(tmp_path / "sheet.png"))


def test_the_sheet_has_a_row_a_frame_and_a_column_a_translation(made_up_run: Any, tmp_path: Path) -> None:
    place = translation_sheet(
        made_up_run.folder, made_up_run.results, Location.of(tmp_path / "sheet.png"), frames=3, width=64
    )
    picture = Image.open(io.BytesIO(place.read_bytes()))
    assert picture.size == (2 * 64 + 6, 26 + 3 * 32 + 2 * 6)


def test_numbers_as_people_read_them() -> None:
    assert [decimals(1.234), decimals(-0.5, 1), decimals(None)] == ["1.23", "\N{MINUS SIGN}0.5", "\N{EN DASH}"]
