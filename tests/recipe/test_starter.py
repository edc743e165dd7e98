"""`nightseg init`: the recipe that it writes is valid, says what it assumed, and trains as the starter recipes do."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from nightseg.recipe import load_recipe
from nightseg.recipe.starter import write_starter
from nightseg.segmenter.settings import Online, Training
from nightseg.stages.train_segmenter import check_online
from nightseg.storage import UserError
from tests.command_line import json_of, nightseg, refused
from tests.data.test_discover import frames, in_colours, label, photograph, put

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[str, str]:
    frames(tmp_path / "my day", "images/{}.jpg", "labels/{}.png")
    for number in range(3):
        put(tmp_path / "night" / f"{number}.jpg", photograph(number, dark=True))
    return str(tmp_path / "my day"), str(tmp_path / "night")


def test_the_recipe_is_valid_and_says_what_was_assumed(tmp_path: Path, folders: tuple[str, str]) -> None:
    starter = write_starter(*folders, str(tmp_path / "mine.yaml"))
    assert starter.files == [str(tmp_path / name) for name in ("mine.yaml", "mine_day.txt", "mine_test.txt")]
    text = (tmp_path / "mine.yaml").read_text()
    assert all(line in text for line in (*starter.assumed, *starter.to_check)) and len(starter.assumed) >= 5
    assert "{name: class_6, color: [" in text and "ids: 6} # " in text and "high in the image" in text
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert list(recipe.models) == ["day_only", "day_only_longer", "day_and_night", "adapted"]
    assert recipe.models["adapted"].train == {"day": 1, "day_by_optics": 2}
    plan = json_of("run", tmp_path / "mine.yaml", "--dry-run", "--run-dir", tmp_path / "run")
    assert "train_segmenter/adapted" in [stage["node"] for stage in plan["stages"]]


def test_it_trains_as_the_starter_recipes_do(tmp_path: Path, folders: tuple[str, str]) -> None:
    write_starter(*folders, str(tmp_path / "mine.yaml"))
    ours, *shipped = (
        yaml.safe_load(file.read_text())
        for file in (tmp_path / "mine.yaml", CONFIGS / "starter_pairs.yaml", CONFIGS / "starter_cityscapes.yaml")
    )
    of_machine = ("crop", "batch", "steps_per_epoch")
    for other in shipped:
        assert {key: value for key, value in other["training"].items() if key not in of_machine}.items() <= ours[
            "training"
        ].items()
        assert all(ours[key] == other[key] for key in ("models", "loss", "translators", "test_sets", "predictions"))
    street = yaml.safe_load((CONFIGS / "street.yaml").read_text())
    assert ours["translators"]["optics"] == street["translators"]["optics"]
    del street["models"]["adapted"]["self_training"]["never_below"]  # of the classes of one list
    assert ours["models"] == street["models"]


def test_colours_and_names_of_ones_own(tmp_path: Path, folders: tuple[str, str]) -> None:
    frames(
        tmp_path / "rgb", "images/{}.jpg", "labels/{}.png", lambda n: in_colours(n, ((1, 2, 3), (0, 0, 0), (9, 9, 9)))
    )
    (tmp_path / "rgb" / "label_colors.txt").write_text("1 2 3 the heaven\n0 0 0 void\n9 9 9 no\n")
    write_starter(str(tmp_path / "rgb"), folders[1], str(tmp_path / "rgb.yaml"))
    recipe = load_recipe(tmp_path / "rgb.yaml")
    assert [(one.name, one.color) for one in recipe.taxonomy.classes] == [("the heaven", (1, 2, 3)), ("no", (9, 9, 9))]  # type: ignore[union-attr]
    assert recipe.translators["optics"].classes.sky == ["the heaven"]  # type: ignore[union-attr]


def test_classes_that_carry_light_are_known_by_their_words(tmp_path: Path, folders: tuple[str, str]) -> None:
    names = ("road", "buses", "my car", "carpet", "streetlight", "vanilla", "sign", "sky")
    (tmp_path / "names.txt").write_text("\n".join(names))
    starter = write_starter(*folders, str(tmp_path / "a.yaml"), classes=str(tmp_path / "names.txt"))
    lit = load_recipe(tmp_path / "a.yaml").translators["optics"].classes  # type: ignore[union-attr]
    assert (lit.vehicle, lit.lamp, lit.sky) == (["buses", "my car"], ["streetlight"], ["sky"])
    assert not any("the sky" in line for line in starter.to_check)
    (tmp_path / "names.txt").write_text("\n".join((*names[:-1], "above")))
    starter = write_starter(*folders, str(tmp_path / "b.yaml"), classes=str(tmp_path / "names.txt"))
    assert [line for line in starter.to_check if "no class is" in line] == [
        "no class is the sky, so nights by optics keep a bright one: set `translators.optics.classes.sky: [NAME]` ([] "
        "if there is none)",
        "no class is signal or facade, so nothing lights up there in nights by optics: set "
        "`translators.optics.classes.signal: [NAME, ...]`, likewise facade ([] if there is none)",
    ]
    (tmp_path / "names.csv").write_text("id,name\n0,tarmac\n1,firmament\n2,masonry\n3,motorcar\n4,a\n5,b\n6,c\n7,d\n")
    starter = write_starter(*folders, str(tmp_path / "c.yaml"), classes=str(tmp_path / "names.csv"))
    assert ["sky" in line or "vehicle or signal or facade or lamp" in line for line in starter.to_check[-2:]] == [
        True
    ] * 2


def test_a_pool_that_is_not_sorted_is_split(tmp_path: Path, folders: tuple[str, str]) -> None:
    for number in range(4):
        put(Path(folders[1]) / f"d{number}.jpg", photograph(number))
    write_starter(*folders, str(tmp_path / "mine.yaml"))
    assert load_recipe(tmp_path / "mine.yaml").datasets["night"].split == "pool"  # type: ignore[union-attr]


def test_the_command(tmp_path: Path, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = nightseg("init", *folders).stdout
    assert said.startswith("wrote ") and "assumed:" in said and "to check:" in said
    assert said.splitlines()[-1] == f"next: nightseg check {tmp_path}/recipe.yaml"
    assert "it is there already. Cure: another name by --out, or --overwrite" in refused("init", *folders)
    answer = json_of("init", *folders, "--overwrite", "--labels", Path(folders[0]) / "labels")
    assert answer["found"]["num"] == {"day": 4, "test": 1, "night": 3}
    assert "a recipe is a YAML file" in refused("init", *folders, "--out", "mine.txt")
    with pytest.raises(UserError, match="unknown taxonomy 'camvid12', did you mean 'camvid11'"):
        write_starter(*folders, "other.yaml", classes="camvid12")
    assert not Path("other.yaml").exists()


def test_however_few_frames_there_are_every_worker_has_its_part_of_a_step() -> None:
    from nightseg.recipe.starter import _workers_and_batch

    for cores, num_day in itertools.product(range(1, 5), range(1, 12)):
        workers, batch = _workers_and_batch(cores, num_day)
        assert 1 <= workers <= cores and 1 <= batch <= min(8, num_day) and batch % workers == 0
        check_online("adapted", Online(), Training(batch=batch, epochs=4, steps_per_epoch=500, ema_decay=0.99), workers)
    assert _workers_and_batch(4, 100) == (4, 8) and _workers_and_batch(2, 3) == (1, 2)


@pytest.mark.parametrize("size", [(360, 480), (1024, 2048), (60, 80), (719, 1283)])
def test_sizes_keep_their_shape(tmp_path: Path, folders: tuple[str, str], size: tuple[int, int]) -> None:
    from nightseg.recipe.starter import _input_size

    height, width = _input_size(size, 240)
    assert height % 16 == width % 16 == 0 and height <= max(64, size[0]) and width <= max(96, size[1])
    # both sides are rounded to a step of 16: each is off by 8 at most
    assert abs(width / height - size[1] / size[0]) <= (8 + 8 * size[1] / size[0]) / height


def label_of_starter(number: int) -> object:
    return label(number, (5, 1, 7))


@pytest.mark.parametrize("name", ["starter_pairs", "starter_cityscapes"])
def test_the_plan_of_a_starter_recipe(tmp_path: Path, folders: tuple[str, str], name: str) -> None:
    for split, first in (("train", 0), ("val", 50)):
        frames(tmp_path / "mine", f"images/{split}/{{}}.jpg", f"labels/{split}/{{}}.png", label_of_starter, first=first)
        for number in range(first, first + 2):
            stem = f"{split}/ulm/ulm_{number}"
            put(tmp_path / "cs" / f"leftImg8bit/{stem}_leftImg8bit.png", photograph(number))
            put(tmp_path / "cs" / f"gtFine/{stem}_gtFine_labelIds.png", label(number, (23, 7, 26)))
    root = {"starter_pairs": f"mine={tmp_path}/mine", "starter_cityscapes": f"cityscapes={tmp_path}/cs"}[name]
    plan = json_of(
        "run", CONFIGS / f"{name}.yaml", "--dry-run", "--run-dir", tmp_path / "run",
        "--set", f"roots.{root}", "--set", f"roots.night={folders[1]}",
    )  # fmt: skip
    stages = {stage["node"] for stage in plan["stages"]}
    assert {"collect/night", "train_segmenter/day_only_longer", "evaluate/adapted", "predict/night"} <= stages
