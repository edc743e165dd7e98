"""Sets drawn from a folder by domain, or joined from several: what their labels hold together."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.pipeline import classes, leaks
from nightseg.pipeline import run as runner
from nightseg.pipeline.build import build_graph
from nightseg.progress import LineProgress, SilentProgress
from nightseg.recipe.types import Recipe
from nightseg.storage import Location, UserError

VOID = 11


def write(root: Path, split: str, sky: int, ids: list[int]) -> None:
    """Four frames whose sky has this brightness; a row of their labels for each id."""
    for number in range(4):
        rng = np.random.default_rng(sky + number)
        image = np.full((48, 64, 3), 60 if sky < 50 else 100) + rng.normal(0, 12, (48, 64, 3))
        image[:16] += sky - image.mean()
        image[rng.integers(16, 48, 40), rng.integers(0, 64, 40)] = 255
        image = np.clip(image * [1.0, 0.95, 0.85], 0, 255).astype(np.uint8)
        label = np.repeat(np.array(ids, np.uint8), 48 // len(ids))[:, None].repeat(64, axis=1)
        for kind, array in (("images", image), ("labels", label)):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
            (root / split / kind / f"{sky}_{number}.png").write_bytes(encode_png(array))


def recipe_of(root: Path, **changes: Any) -> Recipe:
    folder = {"layout": "camvid", "root": str(root)}
    content: dict[str, Any] = {
        "name": "labels",
        "taxonomy": "camvid11",
        "compute": {"map": {"actors": 0}},
        "datasets": {
            **{split: {**folder, "split": split} for split in ("one", "two", "mixed")},
            "both": {"join": ["one", "two"]},
            "dark": {"split": "mixed", "keep": "night"},
            "bright": {"split": "mixed", "keep": "day"},
        },
        "models": {"m": {"train": ["both"]}},
        "test_sets": {"night": "dark"},
    }
    return Recipe.model_validate({**content, **changes})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Train: sky and road in one folder, building and car in another. A pool: labelled by day, all void by night."""
    write(tmp_path, "one", 140, [0, 3])
    write(tmp_path, "two", 160, [1, 8])
    write(tmp_path, "mixed", 200, [0, 1, 3, 8])
    write(tmp_path, "mixed", 12, [VOID])
    return tmp_path


def said(recipe: Recipe, place: Path) -> str:
    graph = build_graph(recipe)
    commits = runner.prepare(recipe, Location.of(place), leaks.needed(graph), only="m", progress=SilentProgress())
    stream = io.StringIO()
    classes.check(graph, commits, taxonomy(recipe.taxonomy), LineProgress(stream))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("models", "where"),
    [
        ({"m": {"train": ["both"]}}, "the test set night"),
        ({"m": {"train": ["one"], "validate_on": ["dark"]}}, "the validation set dark"),
        ({"m": {"train": ["dark"]}}, "what is trained on (model m)"),
    ],
)
def test_the_void_side_of_a_pool_is_refused_before_training(
    root: Path, models: dict[str, Any], where: str, tmp_path: Path
) -> None:
    tests = {"night": "dark"} if "test" in where else {"day": "two"}
    recipe, place = recipe_of(root, models=models, test_sets=tests), Location.of(tmp_path / "run")
    with pytest.raises(UserError) as refused:
        runner.run(recipe, place, progress=SilentProgress())
    assert f"{where}: none of the 4 labels has a pixel with a class, only ignored ones" in str(refused.value)
    assert not (place / "stages/train_segmenter").exists()


def test_a_side_without_a_frame_is_refused_before_training(root: Path, tmp_path: Path) -> None:
    recipe = recipe_of(root, datasets=recipe_of(root).datasets | {"dusk": {"split": "mixed", "keep": "twilight"}},
                       models={"m": {"train": ["one"]}}, test_sets={"dusk": "dusk"})  # fmt: skip
    with pytest.raises(UserError, match="the test set dusk: it holds no frame"):
        said(recipe, tmp_path / "run")


def test_classes_that_no_train_set_has_are_said_once(root: Path, tmp_path: Path) -> None:
    recipe = recipe_of(root, test_sets={"day": "bright"})
    assert said(recipe, tmp_path / "run").count("no pixel has") == 1
    assert (
        "what is trained on (model m): no pixel has pole, pavement, tree, sign, fence, pedestrian, bicyclist"
        in said(recipe, tmp_path / "run")
    )


def test_a_side_with_few_valid_pixels_is_warned_of(root: Path, tmp_path: Path) -> None:
    label = np.full((48, 64), VOID, np.uint8)
    label[0, 0] = 3
    (root / "mixed/labels/12_0.png").write_bytes(encode_png(label))
    text = said(recipe_of(root), tmp_path / "run")
    assert "warning: the test set night: only 0.0081 % of the pixels have a class" in text, "1 of 4 x 48 x 64"
