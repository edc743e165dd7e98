"""Frames that a model has seen and is measured on: in every way that a recipe lets them meet."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nightseg.data.images import encode_jpeg, encode_png
from nightseg.pipeline import build, leaks
from nightseg.pipeline import run as runner
from nightseg.pipeline.graph import FRAME_STAGES, Graph
from nightseg.pipeline.search.run import _examine
from nightseg.pipeline.search.settings import Dimension, Search
from nightseg.pipeline.search.trials import Trials
from nightseg.progress import LineProgress, SilentProgress
from nightseg.recipe import load_recipe, save_recipe
from nightseg.recipe.types import Recipe
from nightseg.report import write_report
from nightseg.storage import Location, UserError


def picture(number: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Blocks of random brightness, larger than those of a thumbnail: no two numbers look alike."""
    blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 1), dtype=np.uint8).repeat(3, axis=2)
    return np.ascontiguousarray(blocks.repeat(height // 4, axis=0).repeat(width // 4, axis=1))


def write(root: Path, split: str, *frames: tuple[str, bytes]) -> None:
    for name, data in frames:
        stem = name.rpartition(".")[0]
        for kind, file, content in (
            ("images", name, data),
            ("labels", f"{stem}.png", encode_png(np.ones((32, 48), np.uint8))),
        ):
            (root / split / kind).mkdir(parents=True, exist_ok=True)
            (root / split / kind / file).write_bytes(content)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two frames each, none shared: train 0 1, val 10 11, test 20 21, pool 30 31, night 40 41, style 50 51."""
    root = tmp_path / "data"
    for first, split in enumerate(("train", "val", "test", "pool", "night", "style")):
        numbers = (10 * first, 10 * first + 1)
        write(root, split, *((f"{number}.png", encode_png(picture(number))) for number in numbers))
    return root


def recipe_of(data: Path, **changes: Any) -> Recipe:
    folder = {"layout": "camvid", "root": str(data), "label_encoding": "train_ids"}
    bare = {"layout": "camvid", "root": str(data), "labelled": False}
    content: dict[str, Any] = {
        "name": "leaky",
        "taxonomy": "camvid11",
        "compute": {"map": {"actors": 0}},
        "datasets": {
            **{split: {**folder, "split": split} for split in ("train", "val", "test")},
            **{split: {**bare, "split": split} for split in ("pool", "night", "style")},
            "night_by_unit": {"translate": "train", "by": "unit"},
            "night_by_style": {"translate": "train", "by": "style"},
            "all": {"join": ["train", "night_by_style"]},
        },
        "translators": {
            "unit": {"preset": "small", "day": "train", "night": "night"},
            "style": {"kind": "colour", "night": "style"},
        },
        "models": {
            "first": {"train": ["train"], "validate_on": ["val"]},
            "second": {
                "train": ["night_by_unit"],
                "start": "first",
                "self_training": {"pool": "pool", "select": {"count": 1, "method": "random"}},
            },
            "third": {"train": ["night_by_style"]},
        },
        "test_sets": {"night": "test"},
    } | changes
    file = data / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return load_recipe(file)


def found(recipe: Recipe, folder: Path, validation: bool = False, only: str | None = None) -> list[leaks.Leak]:
    """Of the frames that lie in folders, without any training."""
    graph = build.build_graph(recipe, only)
    nodes = leaks.needed(graph)
    assert {node.stage for node in nodes} <= {"collect", "split"}
    commits = runner.prepare(recipe, Location.of(folder), nodes, only=only or "second", progress=SilentProgress())
    return leaks.find(graph, commits, validation)


def told(found: list[leaks.Leak]) -> set[tuple[str, str, int, int, str]]:
    return {
        (
            leak.seen,
            leak.measured,
            leak.frames,
            leak.near,
            "+".join(model for models in leak.how.values() for model in models),
        )
        for leak in found
    }


def test_sets_that_share_nothing_are_sound(data: Path, tmp_path: Path) -> None:
    assert found(recipe_of(data), tmp_path / "run") == []


@pytest.mark.parametrize(
    ("split", "models", "how"),
    [
        ("train", "first+second", "trained on, translated"),
        ("pool", "second", "trained on as a pool"),
        ("night", "second", "the translator unit trained on"),
    ],
)
def test_a_test_frame_that_was_seen_is_found_by_its_bytes(
    data: Path, tmp_path: Path, split: str, models: str, how: str
) -> None:
    """Under another name, in whatever role; of the models that start from one that saw it, too."""
    write(data, split, ("other name.png", encode_png(picture(21))))
    (leak,) = found(recipe_of(data), tmp_path / "run", only="second")
    assert (leak.seen, leak.measured, leak.frames, leak.of) == (split, "the test set night", 1, 2)
    assert leak.pairs == [["test/21", f"{split}/other name"]] and leak.how == {how: ["second"]}
    everyone = build.build_graph(recipe_of(data)).watched
    names = [name for name, watched in everyone.items() if split in {use.dataset for use in watched.learned}]
    assert "+".join(names[:2]) == models


def test_style_images_validation_and_translated_tests(data: Path, tmp_path: Path) -> None:
    shared = ("x.png", encode_png(picture(20)))
    write(data, "style", shared)
    graph = build.build_graph(recipe_of(data))
    assert {use.dataset: use.what for use in graph.watched["third"].learned} == {
        "train": "trained on, translated",
        "style": "style images of the translator style",
    }
    write(data, "val", shared, ("y.png", encode_png(picture(1))))
    recipe, trained = recipe_of(data), ("train", "the validation set val", 1, 0, "first")
    assert told(found(recipe, tmp_path / "run", only="first")) == {trained}
    searched = told(found(recipe, tmp_path / "run", validation=True, only="first"))
    assert searched == {trained, ("val", "the test set night", 1, 0, "first")}


def test_frames_that_the_best_weights_were_chosen_on_are_no_test_frames(data: Path, tmp_path: Path) -> None:
    write(data, "val", ("x.png", encode_png(picture(20))))
    first = {"train": ["train"], "validate_on": ["val"], "training": {"keep": "best"}}
    recipe = recipe_of(data, models={"first": first, "second": {"train": ["train"], "start": "first"}})
    (leak,) = found(recipe, tmp_path / "run", only="second")
    assert (leak.seen, leak.measured) == ("val", "the test set night")
    assert leak.how == {"its best weights were chosen on": ["second"]}


def test_a_model_folder_to_start_from_is_named_as_unknown(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "start_identity", lambda start: start)
    for file in ("model.json", "model.safetensors"):
        (data / file).write_bytes(b"{}")
    models = {"old": {"train": ["train"], "start": f"{data}/."}, "new": {"train": ["train"], "start": "old"}}
    graph = build.build_graph(recipe_of(data, models=models))
    assert leaks.unknown(graph) == {f"{data}/.": ["new", "old"]}


def test_the_same_dataset_in_two_roles_is_a_leak(data: Path, tmp_path: Path) -> None:
    (leak,) = found(recipe_of(data, test_sets={"seen": "train"}), tmp_path / "run", only="third")
    assert (leak.frames, leak.of, leak.pairs[0]) == (2, 2, ["train/0", "train/0"])
    assert str(leak).endswith("trained on, translated (model third): train/0, train/1")


def test_the_same_picture_in_another_file_is_counted_and_not_refused(data: Path, tmp_path: Path) -> None:
    """Saved as JPEG, twice as large, and by another encoder; a picture that is only as bright is none of them."""
    brighter = np.clip(picture(21).astype(np.int16) + 12, 0, 255).astype(np.uint8)
    write(
        data,
        "test",
        ("a.jpg", encode_jpeg(picture(0))),
        ("b.png", encode_png(picture(1)) + b"trailing"),
        ("c.png", encode_png(np.zeros((32, 48, 3), np.uint8))),
        ("d.png", encode_png(brighter)),
    )
    write(data, "train", ("black.png", encode_png(np.ones((32, 48, 3), np.uint8))))
    everything = found(recipe_of(data), tmp_path / "run", only="first")
    assert told(everything) == {("train", "the test set night", 0, 2, "first")}
    assert (
        str(everything[0]) == "2 of 6 frames of the test set night look like frames of train, trained on (model first)"
    )
    leaks.tell(everything, "refuse", SilentProgress())


def test_scenes_of_other_numbers_share_nothing(tmp_path: Path) -> None:
    """As the demo has them: no two streets look alike."""
    scenes = {"layout": "scenes", "size": [64, 128]}
    data = tmp_path / "data"
    data.mkdir()
    recipe = recipe_of(
        data,
        datasets={
            "train": {**scenes, "count": 20},
            "test": {**scenes, "count": 20, "first": 4000, "mix": {"day": 0.5, "night": 0.5}},
        },
        translators={},
        models={"second": {"train": ["train"]}},
    )
    assert found(recipe, tmp_path / "run") == []


def test_a_run_refuses_before_it_trains(data: Path, tmp_path: Path) -> None:
    write(data, "train", ("again.png", encode_png(picture(20))), ("more.png", encode_png(picture(10))))
    place = Location.of(tmp_path / "run")
    models = {"first": {"train": ["train"], "validate_on": ["val"]}}
    with pytest.raises(UserError) as caught:
        runner.run(recipe_of(data, models=models), place, only="first", progress=SilentProgress())
    message = str(caught.value)
    assert message.count("\n") == 1 and "leaks: report" in message
    assert (
        "1 of 2 frames of the test set night are in train, trained on (model first): test/20 = train/again" in message
    )
    assert "1 of 2 frames of the validation set val are in train, trained on (model first): val/10 = train" in message
    assert not (place / "stages/train_segmenter").exists()


def test_a_leak_that_is_accepted_is_told_in_log_results_and_report(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose models are made elsewhere: only the frames are real."""
    write(data, "train", ("again.png", encode_png(picture(20))))
    recipe, place = recipe_of(data, leaks="report"), Location.of(tmp_path / "run")
    whole = build.build_graph

    def without_models(recipe: Recipe, only: str | None) -> Graph:
        graph = whole(recipe, only)
        graph.nodes = {name: node for name, node in graph.nodes.items() if name.stage in FRAME_STAGES}
        return replace(graph, models={}, predictions={}, translations={})

    monkeypatch.setattr(build, "build_graph", without_models)
    results = runner.run(recipe, place, progress=LineProgress(sys.stderr)).results
    (leak,) = results["leaks"]
    assert (leak["seen"], leak["frames"]) == ("train", 1)
    assert leak["how"] == {"trained on": ["first"], "trained on, translated": ["second", "third"]}
    assert f"leak: {leak['text']}" in capsys.readouterr().err
    page = write_report(place, results).read_bytes().decode().replace("<wbr>", "")
    assert f'<p class="warn">{leak["text"]}.</p>' in page
    assert Location.of(tmp_path / "run/results.json").read_json()["leaks"] == results["leaks"]


def test_a_search_compares_its_validation_with_the_tests(data: Path, tmp_path: Path) -> None:
    """Before the first trial; what it read is shared with the trials."""
    settings = Search(name="s", recipe="recipe.yaml", model="first", space={"loss.alpha": Dimension(choice=[0.2, 0.4])})
    trials = Trials(settings, Location.of(tmp_path / "search"))
    save_recipe(recipe_of(data), trials.recipe_file)
    _examine(trials, SilentProgress())
    assert {entry.name for entry in (trials.folder / "shared/stages/collect").list()} == {"train", "val", "test"}
    write(data, "val", ("x.png", encode_png(picture(21))))
    with pytest.raises(
        UserError, match=r"1 of 2 frames of the test set night are in val, the validation set val \(mod"
    ):
        _examine(trials, SilentProgress())
    save_recipe(recipe_of(data, leaks="report"), trials.recipe_file)
    _examine(trials, SilentProgress())


def test_all_that_is_wrong_with_the_frames_is_one_message(data: Path, tmp_path: Path) -> None:
    """Broken frames of two datasets, and a leak between sets of which one is among them; nothing twice."""
    write(data, "train", ("again.png", encode_png(picture(20))), ("cut.png", encode_png(picture(99))[:60]))
    (data / "pool/images/gone").symlink_to("/unmounted")
    place = Location.of(tmp_path / "run")
    with pytest.raises(UserError) as caught:
        runner.run(recipe_of(data), place, only="second", progress=SilentProgress())
    head, *problems = str(caught.value).split("\n- ")
    assert head == "3 problems:"
    for part in ("train: 1 of 4 frames", "pool: 1 of 3 frames", "a link to /unmounted", "test/20 = train/again"):
        assert sum(part in problem for problem in problems) == 1, part


def test_the_first_of_each_reason_is_shown(data: Path, tmp_path: Path) -> None:
    write(data, "val", *((f"{number}.png", b"") for number in range(100, 109)), ("z.png", b"text"))
    with pytest.raises(UserError) as caught:
        runner.run(recipe_of(data), Location.of(tmp_path / "run"), only="first", progress=SilentProgress())
    lines = str(caught.value).splitlines()
    assert "10 of 12 frames" in lines[0] and "9 zero_bytes, 1 not_an_image" in lines[0]
    assert [line.split(": ")[0].rpartition("/")[2] for line in lines[1:]] == [
        *("100.png", "z.png", "101.png", "102.png", "103.png"),
    ]
