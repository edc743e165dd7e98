"""What `import nightseg` offers: light to import, readable when shown, and the same work as the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import nightseg
from nightseg.data.class_list import taxonomy
from nightseg.data.images import encode_png
from nightseg.data.scenes import scene
from nightseg.errors import UserError
from nightseg.pipeline import run as run_module
from nightseg.pipeline.run import Adapted, Outcome
from nightseg.recipe import RecipeError, load_recipe
from nightseg.storage import Location
from tests.segmenter.test_predict import CARD, save

PROJECT = Path(__file__).resolve().parents[1]
RECIPE = {
    "name": "small",
    "taxonomy": "camvid11",
    "datasets": {"day": {"layout": "scenes", "count": 4, "size": (48, 96)}},
    "models": {"day_only": {"train": ["day"]}},
}


def test_the_import_is_light() -> None:
    script = "import sys, nightseg; print(sorted({'torch', 'ray', 'numpy', 'pyarrow'} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PROJECT)
    assert told.stdout == "[]\n"


@pytest.mark.parametrize("overrides", [["seed=3"], "seed=3", {"seed": 3}])
def test_run_takes_a_mapping_and_overrides_of_any_form(monkeypatch: pytest.MonkeyPatch, overrides: Any) -> None:
    asked: dict[str, Any] = {}

    def adapt(recipe: Any, given: Any, **more: Any) -> str:
        asked.update(more, recipe=load_recipe(recipe, given))
        return "done"

    monkeypatch.setattr(run_module, "adapt", adapt)
    assert nightseg.run(RECIPE, overrides, run_dir=Path("/r"), only="day_only", log="mlflow", progress=False) == "done"
    assert asked["recipe"].seed == 3 and (asked["run_dir"], asked["only"], asked["log"]) == (
        "/r",
        "day_only",
        ["mlflow"],
    )
    assert asked["recipe"].datasets["day"].size == (48, 96)
    assert RECIPE["datasets"]["day"]["size"] == (48, 96), "what is given stays as it is"  # type: ignore[index]


def test_a_mapping_is_read_as_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(RECIPE))))
    assert load_recipe(RECIPE) == load_recipe("a.yaml")
    changed = load_recipe({"base": "a.yaml", "seed": 5, "datasets": {"day": {"count": 9}}})
    assert changed.seed == 5 and changed.datasets["day"].count == 9  # type: ignore[union-attr]
    root = {"layout": "images", "root": tmp_path / "pool"}
    with pytest.raises(RecipeError) as caught:
        load_recipe({**RECIPE, "sed": 1, "datasets": {**RECIPE["datasets"], "pool": root}})  # type: ignore[dict-item]
    told = str(caught.value)
    assert "recipe: 2 errors; nothing was started." in told and "sed: unknown key, did you mean 'seed'?" in told
    assert f"datasets.pool.root: there is no folder '{tmp_path}/pool'" in told


def test_a_run_is_readable() -> None:
    tests = {"night": {"miou": 0.25, "mean": {"miou": 0.5}}, "day": {"miou": None}}
    results = {"models": {"m": {"tests": tests}, "longer": {"tests": {}}}, "commits": {}}
    folder = Location.of("/runs/a")
    adapted = Adapted(folder, Outcome(results, 1, 2, 3.0), folder / "report.html")
    assert adapted.models == ["m", "longer"] and adapted.results is results
    assert adapted.scores == {"m": {"night": 0.5, "day": None}, "longer": {}}
    assert repr(adapted).splitlines() == [
        "run /runs/a",
        "mIoU in percent  night  day",
        "m                 50.0    -",
        "longer               -    -",
        "report: /runs/a/report.html",
    ]


# -- evaluate ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """images/ and labels/ of two scenes; masks/ with the labels, but for a quarter of one frame."""
    for name in ("images", "labels", "masks"):
        (tmp_path / name).mkdir()
    for number in range(2):
        found = scene(0, number, "day", 32, 64)
        guess = found.label.copy()
        guess[:16, :32] = 0 if number else guess[:16, :32]
        for name, pixels in (("images", found.image), ("labels", found.label), ("masks", guess)):
            (tmp_path / name / f"{number}.png").write_bytes(encode_png(pixels))
    return tmp_path


def test_predictions_are_evaluated(scenes: Path) -> None:
    perfect = nightseg.evaluate(scenes / "labels", scenes / "labels", taxonomy="camvid11", label_encoding="train_ids")
    assert perfect.miou == 1.0 and perfect.frames == 2
    found = nightseg.evaluate(str(scenes / "masks"), scenes / "labels", taxonomy="camvid11", label_encoding="train_ids")
    labels = np.stack([scene(0, n, "day", 32, 64).label for n in range(2)])
    valid = labels < 11
    wrong = (labels[1, :16, :32] != 0) & valid[1, :16, :32]
    assert found.pa == pytest.approx(1 - wrong.sum() / valid.sum())
    assert found.details["pa"] == found.pa and found.iou.keys() == set(taxonomy("camvid11").classes)
    assert "FolderScores(2 frames, percent: mIoU " in repr(found) and "sky" in repr(found)
    with pytest.raises(UserError, match="nothing says whose classes"):
        nightseg.evaluate(scenes / "masks", scenes / "labels")
    with pytest.raises(UserError, match="boundary"):
        nightseg.evaluate(scenes / "masks", scenes / "labels", taxonomy="camvid11", boundary=3)
    with pytest.raises(UserError, match="neither a model folder"):
        nightseg.evaluate(scenes / "gone", scenes / "labels", taxonomy="camvid11")


def test_a_model_is_evaluated_as_its_predictions_are(tmp_path: Path, scenes: Path) -> None:
    model = save(tmp_path / "model")
    for file in (scenes / "labels").iterdir():  # of the three classes of the model
        file.write_bytes(encode_png(np.random.default_rng(0).integers(0, 3, (32, 64), dtype=np.uint8)))
    segment = nightseg.load_model(model.uri, "cpu")
    out = scenes / "predicted"
    out.mkdir()
    for found in segment(scenes / "images"):
        (out / f"{found.name}.png").write_bytes(encode_png(found.labels))
    own = {"name": "three", "classes": [{"name": name} for name in CARD["taxonomy"]["classes"]]}  # type: ignore[index]
    (scenes / "three.yaml").write_text(yaml.safe_dump(own))
    by_hand = nightseg.evaluate(out, scenes / "labels", taxonomy=str(scenes / "three.yaml"))
    assert by_hand.miou is not None and 0 < by_hand.miou < 1
    for predicted in (segment, model.uri):
        found_by_model = nightseg.evaluate(predicted, scenes / "labels", images=scenes / "images", device="cpu")
        assert found_by_model.details["confusion"] == by_hand.details["confusion"]
    with pytest.raises(UserError, match="give `images`"):
        nightseg.evaluate(segment, scenes / "labels")


def test_an_overlay_takes_a_taxonomy_by_name() -> None:
    found = scene(0, 0, "day", 32, 64)
    shown = nightseg.overlay(found.image, found.label, "camvid11", legend=True, opacity=1.0)
    colours = taxonomy("camvid11").colourize(found.label)
    assert shown.width == 64 and np.array_equal(np.asarray(shown)[:32], colours)
    with pytest.raises(UserError, match="unknown taxonomy"):
        nightseg.overlay(found.image, found.label, "camvid1")
