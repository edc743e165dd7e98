"""The page of a made-up run: whole, self-contained, safe, and honest about what is missing."""

from __future__ import annotations

import base64
import copy
import io
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nightseg.data.class_list import taxonomy
from nightseg.report import strip_image, write_report
from nightseg.report.comparison import headline
from nightseg.report.page import confusions, quarantine, score_table, tiles
from nightseg.report.pictures import label_map_uri, photo_uri, tinted
from nightseg.report.run import Run
from nightseg.report.templates import breakable
from nightseg.storage import Location, UserError


class Page(HTMLParser):
    """Tags, their attributes, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "img", "input", "br", "wbr", "link", "line", "rect", "polyline"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"line", "rect", "polyline"}:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""


@pytest.fixture(scope="module")
def page(made_up_run: Any) -> Page:
    place = write_report(made_up_run.folder, made_up_run.results, samples=3)
    assert place == made_up_run.folder / "report.html"
    return Page(place.read_bytes().decode())


def test_it_is_whole_and_every_section_is_there(page: Page) -> None:
    assert page.open == []
    ids = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert ids == [
        "models",
        "use",
        "published",
        "helped",
        "training",
        "classes",
        "split",
        "translation",
        "selection",
        "pseudo-labels",
        "samples",
        "quarantine",
        "provenance",
    ]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == [f"#{name}" for name in ids]


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object", "form")]
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#"))
    text = "".join(value or "" for _, attributes in page.tags for value in attributes.values() if value)
    assert "http://" not in text and "https://" not in text


def test_texts_of_the_user_are_never_markup(page: Page) -> None:
    assert "<script>alert(1)</script> & 16 bits" in page.text


def test_every_picture_is_an_image(page: Page) -> None:
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) > 40
    for source in set(sources):
        data = base64.b64decode(source.partition(",")[2])
        assert Image.open(io.BytesIO(data)).format in ("JPEG", "PNG")


def test_numbers_are_those_of_the_results(page: Page, made_up_run: Any) -> None:
    text = re.sub(r"\s+", " ", page.text)
    for model, facts in made_up_run.results["models"].items():
        assert model in text
        for scores in facts["tests"].values():
            for key in ("miou", "pa", "ca", "fwiou"):
                assert f"{100 * scores['mean'][key]:.1f}" in text
            assert f"± {100 * scores['std']['miou']:.1f}" in text
    assert "38.8 row 7.1" in text
    assert "the teacher never predicts sign and fence" in text
    assert "41.20" in text and "47.90 ± 0.80" in text
    for commit in made_up_run.commits.values():
        assert commit.key[:12] in text


def test_a_report_is_the_same_from_the_file(made_up_run: Any) -> None:
    """results.json sorts its keys; models and test sets keep the order of the work all the same."""
    first = write_report(made_up_run.folder, made_up_run.results, samples=3).read_bytes()
    (made_up_run.folder / "results.json").write_json(made_up_run.results)
    again = write_report(made_up_run.folder, (made_up_run.folder / "results.json").read_json(), samples=3).read_bytes()

    def order(data: bytes) -> list[str]:
        return re.findall(r"<tr><th>([\w<>]+)<small>", data.decode())[:3]

    assert order(first) == order(again) == ["day_<wbr>only", "day_<wbr>only_<wbr>longer", "self_<wbr>trained"]


def test_the_headline_is_of_the_best_on_night(made_up_run: Any, page: Page) -> None:
    run = Run(made_up_run.folder, made_up_run.results)
    found = headline(run)
    assert found is not None
    assert (found.test, found.best, found.control) == ("night", "self_trained", "day_only_longer")
    assert found.gain is not None
    assert found.gain.mean == pytest.approx(found.miou - run.miou("day_only_longer", "night"))
    # The seeds of the two are 3 points apart: a deviation of 3 / sqrt(2).
    assert f"+{100 * found.gain.mean:.1f} ± 2.1 points over day_only_longer" in page.text
    assert "Its control of equal steps: labelled day frames alone (240 steps in all, self_trained: 240)" in page.text
    table = score_table(run)
    assert table["published"] == {"night": True, "day": False}
    cell = table["rows"][2]["cells"]["night"]
    assert cell.is_best and cell.difference == pytest.approx(100 * found.miou - 38.8)


def test_confusions_are_the_costliest_and_shares_of_the_class(made_up_run: Any) -> None:
    results = copy.deepcopy(made_up_run.results)
    matrix = np.zeros((11, 11), dtype=int)
    matrix[0] = [6, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    matrix[8, 3] = 1
    results["models"]["day_only"]["tests"]["night"]["confusion"] = matrix.tolist()
    run = Run(made_up_run.folder, results)
    assert confusions(run, "day_only", "night") == [("sky", "building", 0.25), ("car", "road", 1.0)]


def test_quarantine_counts_what_is_not_listed(made_up_run: Any) -> None:
    results = copy.deepcopy(made_up_run.results)
    results["quarantine"] = results["quarantine"][:1]
    found = quarantine(Run(made_up_run.folder, results))
    assert (found["total"], found["unlisted"], found["reasons"]) == (3, 2, [("truncated", 1)])
    assert ("3", "bad frames set aside", "with their reasons below") in tiles(Run(made_up_run.folder, results))


def test_a_moved_run_still_has_its_pictures(made_up_run: Any, tmp_path: Path) -> None:
    """Predictions, masks and translations are found below the new place; the recorded one is gone."""
    shutil.copytree(made_up_run.folder.local, tmp_path / "moved")
    results = copy.deepcopy(made_up_run.results)
    for facts in results["commits"].values():
        facts["folder"] = facts["folder"].replace(made_up_run.folder.uri, "/gone")
    run = Run(Location.of(tmp_path / "moved"), results)
    commit = run.commit("translate/day_at_night")
    assert commit is not None and commit.folder.uri.startswith(str(tmp_path / "moved"))


def test_a_run_without_its_commits_still_has_its_numbers(made_up_run: Any, tmp_path: Path) -> None:
    results = copy.deepcopy(made_up_run.results)
    for facts in results["commits"].values():
        facts["folder"] = "/gone/stages/x/y/0123456789ab/attempt-1"
    page = Page(write_report(Location.of(tmp_path), results).read_bytes().decode())
    assert f"{100 * results['models']['self_trained']['tests']['night']['mean']['miou']:.1f}" in page.text
    with pytest.raises(UserError, match="no picture for a strip"):
        strip_image(Location.of(tmp_path), results, Location.of(tmp_path / "strip.png"))


def test_a_run_with_nothing_but_frames(made_up_run: Any, tmp_path: Path) -> None:
    results = made_up_run.results | {
        "models": {}, "splits": {}, "selections": {}, "pseudo_labels": {}, "predictions": {}, "translations": {},
        "quarantine": [],
        "commits": {"collect/day": made_up_run.results["commits"]["collect/day"]},
    }  # fmt: skip
    page = Page(write_report(Location.of(tmp_path), results).read_bytes().decode())
    assert "No model of this run has been evaluated" in page.text
    assert "Every frame could be read and used" in page.text


def test_what_labels_were_read_as_is_shown(made_up_run: Any, tmp_path: Path) -> None:
    facts = {"encoding": "camvid12", "why": "by their ids", "files": 7, "valid": 0.981, "absent": ["tree", "fence"]}
    results = made_up_run.results | {"labels": {"day": facts}}
    text = Page(write_report(Location.of(tmp_path), results).read_bytes().decode()).text
    assert all(word in text for word in ("camvid12", "by their ids", "98.1", "tree, fence", "classes without a pixel"))


def test_strip_is_five_panels(made_up_run: Any, tmp_path: Path) -> None:
    place = strip_image(made_up_run.folder, made_up_run.results, Location.of(tmp_path / "strip.png"), height=100)
    picture = Image.open(io.BytesIO(place.read_bytes()))
    assert picture.size == (5 * 200 + 4 * 10, 134)


def test_names_break_at_their_joints_and_stay_text() -> None:
    assert breakable("day_only/a-b") == "day_<wbr>only/<wbr>a-<wbr>b"
    assert breakable("<b>_x") == "&lt;b&gt;_<wbr>x"
    assert breakable("_x_") == "_<wbr>x_<wbr>"


def test_ignored_pixels_are_dimmed_or_transparent() -> None:
    classes = taxonomy("camvid11")
    label = np.array([[3, 255]], dtype=np.uint8)
    mixed = tinted(np.full((1, 2, 3), 100, dtype=np.uint8), label, classes)
    assert mixed[0, 0].tolist() == [round(0.72 * v + 28) for v in classes.palette[3]]
    assert mixed[0, 1].tolist() == [38, 38, 38]
    data = base64.b64decode(label_map_uri(label, classes).partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))
    assert pixels[0, 0].tolist() == [*classes.palette[3], 255] and pixels[0, 1, 3] == 0


def test_pictures_are_made_small() -> None:
    data = base64.b64decode(photo_uri(np.zeros((100, 1000, 3), np.uint8), 250).partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (250, 25)


def test_warnings_of_labels_for_other_seeds_are_shown(made_up_run: Any, tmp_path: Path) -> None:
    attempt = made_up_run.attempt("pseudo_label", "self_trained.seed1")
    (attempt.folder / "evidence.json").write_json({"warnings": ["no pole is kept"]})
    commit = attempt.finish(rows_in=1, rows_out=1, seconds=1.0, outputs=["evidence.json"])
    results = copy.deepcopy(made_up_run.results)
    results["commits"]["pseudo_label/self_trained.seed1"] = made_up_run.facts(commit)
    model = results["models"]["self_trained"]
    nodes = {"self_trained": "pseudo_label/self_trained", "self_trained.seed1": "pseudo_label/self_trained.seed1"}
    model["trainings"] = {
        name: {"seed": seed, "model": model["model"], "pseudo_label": node, "tests": model["tests"]}
        for seed, (name, node) in enumerate(nodes.items())
    }
    text = Page(write_report(Location.of(tmp_path), results).read_bytes().decode()).text
    assert "self_trained.seed1: no pole is kept" in text
    assert text.count("the teacher never predicts sign and fence on these frames") == 1


def test_the_order_is_that_of_the_work_whatever_clocks_said(made_up_run: Any) -> None:
    results = copy.deepcopy(made_up_run.results)
    before = Run(made_up_run.folder, results)
    found = before.models, before.tests, before.main_test
    for place, node in enumerate(before.order):
        results["commits"][node] |= {"order": place, "created": f"20{90 - place}-01-01T00:00:00.000+00:00"}
    after = Run(made_up_run.folder, results)
    assert (after.models, after.tests, after.main_test) == found and after.order == before.order
    for facts in results["commits"].values():
        del facts["order"]  # as earlier versions wrote them
    assert Run(made_up_run.folder, results).order == before.order[::-1]


def test_a_class_that_the_guard_shuts_out_is_shown_so(made_up_run: Any, tmp_path: Path) -> None:
    shutil.copytree(str(made_up_run.folder), tmp_path / "run")
    results = copy.deepcopy(made_up_run.results)
    by_class = results["pseudo_labels"]["self_trained"]["evidence"]["by_class"]
    by_class["sky"] |= {"threshold": None, "kept": 0, "kept_share": 0.0}
    text = Page(write_report(Location.of(tmp_path / "run"), results).read_bytes().decode()).text
    assert "not learned: its share left the guard's range" in text
