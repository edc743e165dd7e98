"""What is wrong with own data, as far as a recipe can tell it: the line, the key, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from nightseg.recipe import RecipeError, load_recipe

PAIRS = "layout: pairs, root: ROOT"
LIST = "taxonomy:\n  classes:\n    - {name: road, %s}\n    - {name: sky, ids: 2}\n"


@pytest.mark.parametrize(
    ("day", "more", "where", "parts"),
    [
        (f"{PAIRS}, images: img", "", "line 3: datasets.day.images", ["no such folder", "has labels, rgb"]),
        (
            f"{PAIRS}, images: rgb, labels: mask",
            "",
            "line 3: datasets.day.labels",
            ["no such folder", "labelled: false"],
        ),
        (f"{PAIRS}, images: rgb, labels: 'labels/{{nam}}'", "", "line 3: datasets.day.labels", ["{nam}", "images"]),
        (f"{PAIRS}, images: rgb, labels: 'labels/{{name'", "", "line 3: datasets.day.labels", ["brace"]),
        (f"{PAIRS}, images: rgb, split: train", "", "line 3: datasets.day", ["write {split}", "split_list"]),
        (f"{PAIRS}, images: rgb, split_list: t.txt", "", "line 3: datasets.day.split_list", ["no file", "t.txt"]),
        (f"{PAIRS}, image: rgb", "", "line 3: datasets.day.image", ["did you mean 'images'?"]),
        (
            "layout: camvid, root: ROOT, images: rgb",
            "",
            "line 3: datasets.day",
            ["images and labels are for layout: pairs"],
        ),
        ("layout: pair, root: ROOT", "", "line 3: datasets.day.layout", ["did you mean 'pairs'?", "nightcity"]),
        ("layout: mapillary, root: ROOT, split: training", "", "line 3: datasets.day.split", ["has labels, rgb"]),
        (f"{PAIRS}, images: rgb, map: {{a: b}}", "", "line 3: datasets.day", ["give its `taxonomy`"]),
        (
            f"{PAIRS}, images: rgb, taxonomy: idd_lite7, map: {{drivabel: road}}",
            "",
            "line 3: datasets.day.map",
            ["no class 'drivabel', did you mean 'drivable'?"],
        ),
        (
            f"{PAIRS}, images: rgb, taxonomy: idd_lite7, map: {{drivable: roda}}",
            "",
            "line 3: datasets.day.map",
            ["cityscapes19 has no class 'roda', did you mean 'road'?"],
        ),
        (f"{PAIRS}, images: rgb, taxonomy: idd", "", "line 3: datasets.day.taxonomy", ["known: camvid11", "`classes`"]),
        (f"{PAIRS}, images: rgb, label_encoding: color", "", "line 3: datasets.day.label_encoding", ["'colors'"]),
        (
            f"{PAIRS}, images: rgb",
            LIST % "colour: [1, 2, 3]",
            "line 6: taxonomy.classes.0.colour",
            ["did you mean 'color'?"],
        ),
        (f"{PAIRS}, images: rgb", LIST % "color: [1, 2, 300]", "line 6: taxonomy.classes.0.color.2", ["255", "300"]),
        (f"{PAIRS}, images: rgb", LIST % "ids: one", "line 6: taxonomy.classes.0.ids", ["the text 'one'"]),
        (
            f"{PAIRS}, images: rgb",
            LIST % "ids: 2",
            "line 4: taxonomy",
            ["classes.1.ids.ids: the raw id 2 already means"],
        ),
        (
            f"{PAIRS}, images: rgb",
            LIST.replace("sky", "road") % "ids: 1",
            "line 4: taxonomy",
            ["'road' is given twice"],
        ),
        (f"{PAIRS}, images: rgb", "taxonomy: [a, b]\n", "line 4: taxonomy", ["a mapping with `classes`"]),
        (f"{PAIRS}, images: rgb", "taxonomy: gone.csv\n", "line 4: taxonomy", ["gone.csv", "no such taxonomy file"]),
        ("layout: nexet, root: ROOT", "", "models.m.train.0", ["the frames of day have no labels"]),
    ],
)
def test_each_fault_has_its_line_its_key_and_its_cure(
    tmp_path: Path, day: str, more: str, where: str, parts: list[str]
) -> None:
    for folder in ("rgb", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    text = f"name: t\ndatasets:\n  day: {{{day}}}\n{more}models: {{m: {{train: [day]}}}}\n"
    (tmp_path / "r.yaml").write_text(text.replace("ROOT", str(tmp_path / "data")))
    with pytest.raises(RecipeError) as refused:
        load_recipe(tmp_path / "r.yaml")
    said = str(refused.value)
    line = next((line for line in said.splitlines() if f"{where}: " in line), "")
    assert line and all(part in line for part in parts), said
