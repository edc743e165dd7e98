"""What a run would refuse is refused before its first stage: thirty wrong recipes and folders, each told with file,
line, key and cure. What is found of folders that are right is what they hold."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nightseg.data.images import encode_png
from nightseg.pipeline import estimate
from nightseg.pipeline.build import build_graph
from nightseg.pipeline.check import check, places
from nightseg.pipeline.graph import Graph
from nightseg.pipeline.run import adapt, work_until
from nightseg.progress import SilentProgress
from nightseg.recipe import load_recipe
from nightseg.recipe.types import Recipe
from nightseg.segmenter.settings import Network
from nightseg.storage import Location, UserError
from tests.command_line import forbid_ray, good, json_of, refused

RECIPE = """name: own
taxonomy:
  classes: [{name: road}, {name: sky}, {name: car}]
  ignore: [255]
datasets:
  day: {layout: pairs, root: ROOT/day, domain: day}
  test: {layout: pairs, root: ROOT/test, domain: night}
  pool: {layout: images, root: ROOT/pool, labelled: false}
  night: {split: pool, keep: night}
  dark: {translate: day, by: optics}
translators:
  optics: {kind: photometric}
network: {encoder: efficientnet_lite0, pyramid_channels: 8, head_channels: 8}
training:
  batch: 2
  epochs: 2
  warmup_steps: 1
  crop: [32, 64]
models:
  first: {train: [day]}
  second:
    train: [day, dark]
    start: first
    self_training:
      pool: pool
      select: {method: random, count: 2, extractor: efficientnet_lite0}
test_sets: {night: test}
"""
HEIGHT, WIDTH = 32, 64


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forbid_ray(monkeypatch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights"))
    monkeypatch.delenv("NIGHTSEG_ALLOW_DOWNLOAD", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def image(seed: int, level: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, level, (HEIGHT, WIDTH, 3)).astype(np.uint8)


def label(*ids: int) -> np.ndarray:
    """Stripes of these ids, of equal width."""
    return np.resize(np.repeat(np.array(ids, np.uint8), -(-WIDTH // len(ids))), (WIDTH,))[None].repeat(HEIGHT, 0)


def write(root: Path, folder: str, count: int, first: int, level: int, labels: np.ndarray | None) -> None:
    for number in range(first, first + count):
        name = f"{number:03d}.png"
        place = root / folder / ("images" if labels is not None else "") / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encode_png(image(number, level)))
        if labels is not None:
            file = root / folder / "labels" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(labels))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    write(root, "day", 6, 0, 256, label(0, 1, 2, 255))
    write(root, "test", 3, 100, 40, label(0, 1))
    write(root, "pool", 5, 200, 40, None)
    return root


def file_of(root: Path, text: str = RECIPE) -> Path:
    file = root.parent / "own.yaml"
    file.write_text(text.replace("ROOT", str(root)))
    return file


# -- thirty faults -----------------------------------------------------------------------------------------------------

Change = Callable[[Path], None]


def nothing(root: Path) -> None:
    """The folders are right."""


def labels_of(*ids: int, folder: str = "day") -> Change:
    def change(root: Path) -> None:
        for file in (root / folder / "labels").iterdir():
            file.write_bytes(encode_png(label(*ids)))

    return change


def small_labels(root: Path) -> None:
    for file in (root / "day" / "labels").iterdir():
        file.write_bytes(encode_png(label(0, 1)[::2, ::2].copy()))


def no_labels(root: Path) -> None:
    for file in sorted((root / "day" / "labels").iterdir())[2:]:
        file.unlink()


def broken_images(root: Path) -> None:
    for file in (root / "day" / "images").iterdir():
        file.write_bytes(b"no image")


def empty_pool(root: Path) -> None:
    for file in (root / "pool").iterdir():
        file.rename(file.with_suffix(".txt"))


def same_frames(root: Path) -> None:
    for kind in ("images", "labels"):
        (root / "test" / kind / "000.png").write_bytes((root / "day" / kind / "000.png").read_bytes())


FAULTS: dict[str, tuple[str, str, Change, str, str, str]] = {
    # name: (what is replaced, by what, what is done to the folders, line, key, what the message says)
    "unknown key": ("epochs: 2", "epoch: 2", nothing, "16", "training.epoch", "did you mean 'epochs'"),
    "unknown word": ("layout: images", "layout: image", nothing, "8", "datasets.pool.layout", "did you mean 'images'"),
    "text for a number": ("batch: 2", "batch: two", nothing, "15", "training.batch", "valid integer"),
    "unknown dataset": ("train: [day]}", "train: [dya]}", nothing, "20", "models.first.train.0", "mean 'day'"),
    "unknown model": ("start: first", "start: frist", nothing, "23", "models.second.start", "mean 'first'"),
    "unknown translator": ("by: optics", "by: optic", nothing, "10", "datasets.dark.by", "mean 'optics'"),
    "a circle": ("  first: {", "  first: {start: second, ", nothing, "20", "models.first", "a cycle"),
    "no such folder": ("ROOT/pool", "ROOT/pol", nothing, "8", "datasets.pool.root", "there is no folder"),
    "no such split": ("ROOT/pool", "ROOT/pool, split: x", nothing, "8", "datasets.pool", "unknown split 'x'"),
    "unknown class": (
        "network: {",
        "loss: {class_weights: {raod: 2}}\nnetwork: {",
        nothing,
        "13",
        "loss.class_weights",
        "mean 'road'",
    ),
    "unknown encoder": (
        "efficientnet_lite0, p",
        "efficientnet_lite, p",
        nothing,
        "13",
        "network.encoder",
        "did you mean",
    ),
    "a key twice": ("  batch: 2", "  batch: 2\n  batch: 4", nothing, "16", "training.batch", "stands twice"),
    "labels of nothing": ("[day, dark]", "[pool]", nothing, "22", "models.second.train.0", "have no labels"),
    "warm-up too long": (
        "warmup_steps: 1",
        "warmup_steps: 200",
        nothing,
        "17",
        "training.warmup_steps",
        "set .*warmup",
    ),
    "warm-up of one model": (
        "[day]}",
        "[day], training: {warmup_steps: 99}}",
        nothing,
        "20",
        "models.first.training.warmup_steps",
        "6 steps",
    ),
    "batch of workers": (
        "network: {",
        "compute: {train: {workers: 4}}\nnetwork: {",
        nothing,
        "16",
        "training.batch",
        "multiple of 4",
    ),
    "no weights": (
        "network: {encoder: efficientnet_lite0",
        "network: {encoder: resnet18",
        nothing,
        "13",
        "network.encoder: ",
        "nothing is downloaded unasked",
    ),
    "no file of weights": (
        "network: {",
        "network: {encoder_weights: nowhere.pth, ",
        nothing,
        "13",
        "network.encoder_weights: ",
        "nowhere.pth",
    ),
    "no weights of features": (
        "extractor: efficientnet_lite0",
        "extractor: inception",
        nothing,
        "26",
        "models.second.self_training.select.extractor",
        "use efficientnet_lite0",
    ),
    "another network to start from": (
        "    start: first",
        "    start: first\n    network: {head_channels: 16}",
        nothing,
        "23",
        "models.second.start",
        "give both models the same",
    ),
    "best of nothing": ("epochs: 2", "epochs: 2\n  keep: best", nothing, "17", "training.keep", "validates on nothing"),
    "too many chosen": ("count: 2", "count: 9", nothing, "26", "models.second.self_training.select.count", "5 frames"),
    "no such program": (
        "kind: photometric",
        "kind: command, argv: [no-such-program, '{input}', '{output}']",
        nothing,
        "10",
        "datasets.dark",
        "install it",
    ),
    "crop above frames": (
        "network: {",
        "network: {input_size: [16, 16], ",
        nothing,
        "18",
        "training.crop",
        "set training.crop",
    ),
    "ids above the list": ("", "", labels_of(0, 1, 2, 3, 4), "6", "datasets.day", r"0 to 4|0, 1, 2, 3, 4|ids 3"),
    "only ignored ids": ("", "", labels_of(255), "6", "datasets.day", "only ignored ones"),
    "labels of another size": ("", "", small_labels, "6", "datasets.day", "size of their images"),
    "missing labels": ("", "", no_labels, "6", "datasets.day", "4 of 6 frames have no label file"),
    "images that are none": ("", "", broken_images, "6", "datasets.day", "6 of 6 frames that were read"),
    "no image": ("", "", empty_pool, "8", "datasets.pool", "no image in"),
    "test frames that were learned": ("", "", same_frames, "", "leaks", "take these frames out"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_before_the_first_stage(root: Path, fault: str) -> None:
    old, new, change, line, key, says = FAULTS[fault]
    assert old in RECIPE
    change(root)
    file = file_of(root, RECIPE.replace(old, new, 1) if old else RECIPE)
    run_dir = root.parent / "run"
    with pytest.raises(UserError) as caught:
        adapt(str(file), run_dir=str(run_dir), progress=SilentProgress())
    message = str(caught.value)
    assert str(file) in message or not line, message
    assert re.search(rf"line {line}: ", message) if line else True, message
    assert re.search(key, message) and re.search(says, message), message
    assert not (run_dir / "stages").exists() or not any((run_dir / "stages").rglob("*")), message
    assert "max_bad_fraction to" not in message  # nobody is told to allow what is wrong with a whole set
    assert refused("check", file, "--run-dir", run_dir).endswith(f"nightseg: {message}\n")


def test_all_faults_are_told_at_once(root: Path) -> None:
    small_labels(root)
    empty = root / "test" / "labels"
    for label_file in empty.iterdir():
        label_file.unlink()
    file = file_of(root, RECIPE.replace("warmup_steps: 1", "warmup_steps: 99").replace("count: 2", "count: 99"))
    message = refused("run", file, "--dry-run")
    for part in ("size of their images", "3 of 3 frames have no label file", "warmup_steps is 99", "count is 99"):
        assert part in message, message


# -- what is found -----------------------------------------------------------------------------------------------------


def test_what_a_check_finds(root: Path) -> None:
    found = check(load_recipe(file_of(root)), Location.of(root.parent / "run"), progress=SilentProgress())
    day, pool = found.datasets["day"], found.datasets["pool"]
    assert (day["frames"], day["read"], day["bad"], day["missing_labels"]) == (6, 6, 0, 0)
    assert day["sizes"] == [[HEIGHT, WIDTH, 6]] and day["labels"]["ids"] == [0, 1, 2, 255]
    assert day["classes"] == pytest.approx({"road": 1 / 3, "sky": 1 / 3, "car": 1 / 3})
    assert day["labels"]["valid"] == 0.75
    assert (pool["frames"], "labels" in pool) == (5, False)
    assert sum(found.datasets["night"]["domains"].values()) == 5
    assert found.models["first"] == {"frames_at_most": 6, "steps": 6, "batch": 2}
    assert len(found.overlays) == 7 or len(found.overlays) == 8
    assert found.costs["seconds"] > 0 and found.costs["disk"] > 0 and found.costs["memory"] > 0
    assert not (root.parent / "run").exists()


def test_a_sample_is_spread_over_the_folder_and_told(root: Path) -> None:
    found = check(
        load_recipe(file_of(root)),
        Location.of(root.parent / "run"),
        most=2,
        is_measured=False,
        progress=SilentProgress(),
    )
    assert (found.datasets["day"]["read"], found.datasets["day"]["frames"]) == (2, 6)
    assert "6 frames, 2 of them read" in found.sentences()[0]


def test_what_is_odd_is_no_refusal(root: Path) -> None:
    labels_of(0, 1)(root)
    warnings = check(
        load_recipe(file_of(root)), Location.of(root / "run"), is_measured=False, progress=SilentProgress()
    ).warnings
    assert any("car" in warning for warning in warnings)


def test_classes_that_the_nights_by_optics_do_not_know_are_told(root: Path) -> None:
    def told(text: str) -> list[str]:
        recipe, run = load_recipe(file_of(root, text)), Location.of(root / "run")
        found = check(recipe, run, is_measured=False, progress=SilentProgress())
        return [line for line in found.warnings if "no class is" in line]

    assert [line.split(",")[0] for line in told(RECIPE)] == ["no class is signal or facade or lamp"]
    own = RECIPE.replace("name: sky", "name: firmament")
    assert "set `translators.optics.classes.sky: [NAME]`" in told(own)[0]
    said = "{kind: photometric, classes: {sky: [firmament], facade: [], lamp: []}}"
    assert told(own.replace("{kind: photometric}", said)) == [], "many lists have no traffic lights"


def test_the_graph_is_made_once(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """By a dry run and by a first run alike: making it lists all folders."""
    made: list[Graph] = []

    def counted(recipe: Recipe, only: str | None = None) -> Graph:
        made.append(build_graph(recipe, only))
        return made[-1]

    seen: list[Graph] = []

    def run(*_: object, built: Graph, **__: object) -> None:
        seen.append(built)

    for module in ("check", "build"):
        monkeypatch.setattr(f"nightseg.pipeline.{module}.build_graph", counted)
    monkeypatch.setattr("nightseg.pipeline.run.run", run)
    good("run", file_of(root), "--dry-run")
    assert len(made) == 1
    work_until(file_of(root), stage="score", run_dir=str(root.parent / "run"), progress=SilentProgress())
    assert seen == made[1:]


def test_the_time_of_a_run_follows_its_schedule(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """A training that nobody needs, of 3 steps of 2 crops at a second a pixel, beside another of 6 where it fits."""
    monkeypatch.setattr(estimate, "measure", lambda *_: estimate.Measured(1.0, 0.0, 0.0, 1))
    monkeypatch.setattr("nightseg.cluster.ray.expected_room", lambda resource: 2.0 if resource == "CPU" else 1e12)
    text = RECIPE.replace("test_sets:", "  alone: {train: [day], start: scratch, training: {epochs: 1}}\ntest_sets:")

    def seconds(cpus: int, at_a_time: str) -> float:
        settings = [f"compute.train.cpus_per_worker={cpus}", f"compute.concurrent={at_a_time}"]
        recipe = load_recipe(file_of(root, text), settings)
        return float(check(recipe, Location.of(root / "run"), progress=SilentProgress()).costs["seconds"])

    assert seconds(1, "null") == seconds(1, "2") == seconds(1, "1") - 3 * 2 * 32 * 64
    assert seconds(2, "null") == seconds(1, "1"), "each wants all CPUs"


def test_the_page_stands_alone(root: Path) -> None:
    page = root.parent / "check.html"
    content = json_of("check", file_of(root), "--page", page)
    assert content["page"] == str(page) and content["datasets"]["day"]["frames"] == 6
    html = page.read_text()
    assert html.count("<figure>") in (7, 8) and html.count("data:image/jpeg;base64,") >= 14
    assert "http" not in html and "prefers-color-scheme: dark" in html
    assert "road" in good("check", file_of(root)).stdout


def test_a_measured_step_grows_with_the_network() -> None:
    import torch

    small, large = (
        estimate.measure(Network(encoder="efficientnet_lite0", pyramid_channels=width), 3, torch.device("cpu"), 1)
        for width in (8, 64)
    )
    assert small.weights < large.weights and 0 < small.saved < large.saved
    assert small.step > small.forward > 0


def test_weights_that_may_be_fetched_are_no_fault(root: Path) -> None:
    text = RECIPE.replace("encoder: efficientnet_lite0, p", "encoder: resnet18, p")
    text = text.replace("extractor: efficientnet_lite0", "extractor: inception") + "allow_download: true\n"
    check(load_recipe(file_of(root, text)), Location.of(root / "run"), is_measured=False, progress=SilentProgress())


@pytest.mark.parametrize("method", ["random", "histogram"])
def test_what_looks_at_no_features_needs_no_weights_of_them(root: Path, method: str) -> None:
    """Those of inception, the usual extractor, are nowhere: here, and where frames that repeat others are left out."""
    text = RECIPE.replace(
        "{method: random, count: 2, extractor: efficientnet_lite0}", f"{{method: {method}, count: 2}}"
    )
    recipe = load_recipe(file_of(root, text))
    learning = recipe.models["second"].self_training
    assert learning is not None and learning.select is not None
    assert learning.select.extractor.name == "efficientnet_lite0"
    check(recipe, Location.of(root.parent / "run"), is_measured=False, progress=SilentProgress())
    for more in ("duplicates: 0.9", "extractor: inception"):
        wrong = load_recipe(file_of(root, text.replace("count: 2", f"count: 2, {more}")))
        with pytest.raises(UserError, match=r"extractor: .*nothing is downloaded unasked"):
            check(wrong, Location.of(root.parent / "run"), is_measured=False, progress=SilentProgress())


def test_places_that_other_nodes_must_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of folders, templates, weights and models; not what is relative to another key, in a store, or not there."""
    for name in ("day/images", "labels", "weights"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("w.pt", "features.pth"):
        (tmp_path / "weights" / name).touch()
    monkeypatch.chdir(tmp_path)
    extractor = {"name": "inception", "weights": "weights/features.pth"}
    learning = {"pool": "near", "teacher": "m", "select": {"count": 4, "extractor": extractor, "reference": "near"}}
    recipe = load_recipe(
        {
            "name": "placed",
            "taxonomy": "camvid11",
            "network": {"encoder_weights": str(tmp_path / "weights/w.pt")},
            "datasets": {
                "day": {
                    "layout": "pairs",
                    "root": "./day",
                    "images": "images",
                    "labels": f"{tmp_path}/labels/{{name}}",
                },
                "far": {"layout": "images", "root": "s3://bucket/a", "labelled": False},
                "gone": {"layout": "images", "root": "/nowhere/a", "labelled": False},
                "near": {"layout": "images", "root": "day", "labelled": False},
            },
            "models": {"m": {"train": ["day"]}, "n": {"train": ["day"], "self_training": learning}},
            "test_sets": {"day": "day"},
        },
        elsewhere=True,
    )
    assert places(recipe) == {
        "datasets.day.root": f"{tmp_path}/day",
        "datasets.day.labels": f"{tmp_path}/labels",
        "datasets.near.root": f"{tmp_path}/day",
        "network.encoder_weights": f"{tmp_path}/weights/w.pt",
        "models.n.self_training.select.extractor.weights": f"{tmp_path}/weights/features.pth",
    }
