"""The graph of a recipe: what stands on what, what is shared, and that the thesis fits into one file."""

import re
from pathlib import Path

import numpy as np
import pytest

from nightseg.data.images import encode_png
from nightseg.pipeline.build import PSEUDO_LABELS, build_graph
from nightseg.pipeline.graph import Frames, Graph, NodeId, View
from nightseg.pipeline.plan import plan
from nightseg.pipeline.results import planned_rows
from nightseg.recipe import load_recipe
from nightseg.recipe.types import Recipe, expand_rounds, expand_seeds
from nightseg.segmenter import detectron2
from nightseg.segmenter.settings import Guard
from nightseg.storage import Location, UserError
from tests.command_line import good, json_of, refused

CONFIGS = Path(__file__).parents[2] / "configs"

# Table 4 of the thesis as facts: row -> (published mIoU, test set, start, teacher, translated sets it trains on,
# how night frames are chosen, loss). Written out here, not read from the file under test.
PLAIN, BOTH, ONLY = "day+plain", "day+night", "night"
THESIS = {
    "1.1": (27.5, "origin", "imagenet", None, "day", None, "cross_entropy"),
    "1.2": (27.1, "origin", "scratch", "m1_1", "day", "all camvid", "cross_entropy"),
    "1.3": (29.0, "origin", "m1_1", "m1_1", "day", "all camvid", "cross_entropy"),
    "2.1": (31.5, "origin", "imagenet", None, PLAIN, None, "cross_entropy"),
    "2.2": (28.8, "origin", "m2_1", "m2_1", PLAIN, "all nexet_night", "cross_entropy"),
    "2.3": (25.2, "converted_plain", "imagenet", None, PLAIN, None, "cross_entropy"),
    "2.4": (24.7, "converted_plain", "m2_1", "m2_1", PLAIN, "all nexet_night", "cross_entropy"),
    "3.1": (33.9, "origin", "imagenet", None, BOTH, None, "cross_entropy"),
    "3.2": (32.1, "origin", "m3_1", "m3_1", BOTH, "all nexet_night", "cross_entropy"),
    "3.3": (29.3, "converted", "imagenet", None, BOTH, None, "cross_entropy"),
    "3.4": (28.4, "converted", "m3_1", "m3_1", BOTH, "all nexet_night", "cross_entropy"),
    "4.1": (34.2, "origin", "m3_1", "m3_1", BOTH, "1600 histogram", "cross_entropy"),
    "4.2": (29.8, "converted", "m3_1", "m3_1", BOTH, "1600 histogram", "cross_entropy"),
    "5.1": (29.6, "origin", "imagenet", None, ONLY, None, "cross_entropy"),
    "5.2": (34.7, "origin", "m3_1", None, ONLY, None, "cross_entropy"),
    "5.3": (29.8, "origin", "m5_1", "m5_1", ONLY, "1600 histogram", "cross_entropy"),
    "5.4": (33.3, "origin", "m5_2", "m5_2", ONLY, "1600 histogram", "cross_entropy"),
    "6.1": (26.9, "origin", "imagenet", None, BOTH, None, "focal"),
    "6.2": (28.3, "origin", "m6_1", "m6_1", BOTH, "1600 histogram", "focal"),
    "7.1": (38.8, "origin", "m3_1", "m3_1", BOTH, "1600 pooled", "cross_entropy"),
    "7.2": (39.3, "origin", "m3_1", "m3_1", BOTH, "1600 pooled", "combined"),
    "7.3": (33.1, "origin", "m3_1", "m3_1", BOTH, "1600 histogram", "combined"),
    "8.1": (37.8, "origin", "m5_2", "m5_2", BOTH, "1600 histogram", "cross_entropy"),
    "8.2": (39.5, "origin", "m8_1", "m8_1", BOTH, "1600 pooled", "cross_entropy"),
    "8.3": (40.7, "origin", "m8_1", "m8_1", BOTH, "1600 pooled", "combined"),
}
TRAIN_SETS = {
    "day": ["cityscapes"],
    PLAIN: ["cityscapes", "night_plain"],
    BOTH: ["cityscapes", "night"],
    ONLY: ["night"],
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Tiny made-up data in the official layouts, and the overrides that point the recipe to them."""
    root = tmp_path_factory.mktemp("data")
    image, label = np.full((8, 16, 3), 90, np.uint8), np.full((8, 16), 7, np.uint8)

    def put(path: str, array: np.ndarray) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(encode_png(array))

    for split, count in (("train", 3), ("val", 2)):
        for number in range(count):
            stem = f"{split}/aachen/aachen_{number:06d}_000019"
            put(f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png", image)
            put(f"cityscapes/gtFine/{stem}_gtFine_labelIds.png", label)
    for number in range(4):
        put(f"nexet/frame_{number}.png", image)
        put(f"camvid/frame_{number}.png", image)
    put("driving/leftImg8bit/test/night/0_frame_0_leftImg8bit.png", image)
    put("driving/gtCoarse_daytime_trainvaltest/test/night/0_frame_0_gtCoarse_labelTrainIds.png", label)
    names = {"cityscapes": "cityscapes", "camvid": "camvid", "nexet": "nexet", "night_driving": "driving"}
    return [f"roots.{name}={root / folder}" for name, folder in names.items()]


@pytest.fixture(scope="module")
def thesis(trees: list[str]) -> Recipe:
    return load_recipe(CONFIGS / "thesis.yaml", trees)


def test_the_thesis_recipe_says_all_25_rows(thesis: Recipe) -> None:
    found = {}
    for name, model in thesis.models.items():
        learning = model.self_training
        teacher = (learning.teacher or model.start) if learning else None
        chosen = None
        if learning:
            select = learning.select
            chosen = f"{select.count} {select.method}" if select else f"all {learning.pool}"
            assert learning.threshold.kind == "none", name  # the thesis keeps every pixel
        train = next(kind for kind, sets in TRAIN_SETS.items() if sets == model.train)
        assert model.test, name
        for test, row in model.test.items():
            loss = thesis.loss_of(model).kind
            found[row.row] = (row.published_miou, test, model.start, teacher, train, chosen, loss)
    assert found == THESIS


def test_the_thesis_on_scenes_differs_in_data_and_sizes_alone(thesis: Recipe) -> None:
    scenes = load_recipe(CONFIGS / "thesis_scenes.yaml")
    kept = ("train", "validate_on", "start", "loss")
    for name, model in thesis.models.items():
        ours, learning = scenes.models[name], model.self_training
        assert {key: getattr(ours, key) for key in kept} == {key: getattr(model, key) for key in kept}, name
        assert ours.test is not None and model.test is not None
        assert ours.test.items() >= model.test.items(), name
        assert len(ours.test) == 2, f"{name}: every row has a number on both test sets"
        if learning is None or ours.self_training is None:
            assert learning is ours.self_training, name
            continue
        sizes = {} if learning.select is None else {"count": 1600, "extractor": learning.select.extractor}
        select = ours.self_training.select and ours.self_training.select.model_copy(update=sizes)
        assert ours.self_training.model_copy(update={"select": select}) == learning, name
    assert scenes.test_sets == thesis.test_sets
    assert not scenes.allow_download
    text = (CONFIGS / "thesis_scenes.yaml").read_text()
    assert not any(word in text for word in ("published_miou", "threshold", "start: m")), "nothing repeated"


def test_the_controls_of_the_thesis(trees: list[str], thesis: Recipe) -> None:
    controls = load_recipe(CONFIGS / "thesis_controls.yaml", trees)
    more = {name: model for name, model in controls.models.items() if name not in thesis.models}
    assert list(more) == ["random", "real_reference", "longer", "day_longer", "m3_1_released", "m7_2_released"]
    seeded = [name for name, model in controls.models.items() if controls.seeds_of(model) == [0, 1, 2]]
    assert seeded == ["m3_1", "m4_1", "m7_1", "m7_2", "m8_3", "random"]
    for name in ("random", "real_reference", "m7_2_released"):  # they differ from 7.1 in one thing
        learning, theirs = more[name].self_training, thesis.models["m7_1"].self_training
        assert learning is not None and theirs is not None
        assert learning.select is not None and theirs.select is not None
        assert learning.select.count == theirs.select.count
        assert (learning.pool, learning.threshold) == (theirs.pool, theirs.threshold)
    frames = {"m1_1": 2975, "m3_1": 5950, "m5_2": 2975, "m8_1": 7550, "m8_3": 7550, "m4_1": 7550, "longer": 5950}
    frames["day_longer"] = 2975

    def steps(name: str) -> int:
        training = controls.training_of(controls.models[name])
        return training.epochs * training.steps_of_epoch(frames[name])

    assert steps("longer") == steps("m4_1")
    assert steps("m1_1") + steps("day_longer") == sum(map(steps, ("m3_1", "m5_2", "m8_1", "m8_3")))


def test_the_thesis_can_be_planned_on_tiny_trees(thesis: Recipe, tmp_path: Path) -> None:
    lines = plan(thesis, Location.of(tmp_path / "run"))
    counted = {str(line.node): line.rows for line in lines}
    assert counted["collect/cityscapes"] == 3
    assert counted["collect/nexet"] == 4
    assert counted["collect/night_driving"] == 1
    states = {str(line.node): line.state for line in lines}
    assert states["collect/nexet"] == "runs"
    assert states["train_segmenter/m8_3"] == "waits"
    assert sum(node.startswith("train_segmenter/") for node in counted) == 20
    assert sum(node.startswith("evaluate/") for node in counted) == 20  # one pass over all test sets of a model
    assert not (tmp_path / "run").exists()  # planning leaves nothing behind


def test_a_plan_lists_the_25_rows(thesis: Recipe, tmp_path: Path) -> None:
    found = planned_rows(thesis, build_graph(thesis))
    assert {row["row"]: (row["published_miou"], row["test"]) for row in found} == {
        name: row[:2] for name, row in THESIS.items()
    }
    rows = {row["row"]: row for row in found}
    for name, (_, _, start, teacher, *_) in THESIS.items():
        known = [parent for parent in (start, teacher) if parent not in ("imagenet", "scratch", None)]
        assert rows[name]["parents"] == list(dict.fromkeys(known)), name
    assert rows["1.2"]["frames"] == {"cityscapes": 3, "camvid": 4}
    assert rows["8.3"]["frames"] == {"cityscapes": 3, "night": 3, "nexet_night": 4}  # of 1,600 the four there are
    assert (rows["8.3"]["model"], rows["8.3"]["test_frames"]) == ("m8_3", 1)
    assert rows["2.3"]["model"] == "m2_1"
    told = json_of("run", CONFIGS / "thesis_scenes.yaml", "--dry-run", "--run-dir", tmp_path / "run")["rows"]
    same = ("row", "model", "test", "parents", "published_miou")
    assert [[row[key] for key in same] for row in told] == [[row[key] for key in same] for row in found]
    assert told[-1]["frames"] == {"cityscapes": 160, "night": 160, "nexet_night": 60}
    shown = good("run", CONFIGS / "thesis_scenes.yaml", "--dry-run", "--run-dir", tmp_path / "run").output
    assert "cityscapes 160, night 160, nexet_night 60" in shown and "40.7" in shown


def test_the_page_of_the_thesis_has_its_rows(thesis: Recipe) -> None:
    page = (CONFIGS.parent / "docs/thesis.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if re.match(r"\| \d\.\d ", line)
    ]
    loss = {"cross_entropy": "cross-entropy", "focal": "focal", "combined": "combined"}
    assert len(rows) == len(THESIS)
    for name, train, chosen, kind, start, test, miou, *_ in rows:
        published, on, from_, teacher, trained_on, how, of = THESIS[name]
        assert (float(miou), test, start, kind) == (published, on, from_, loss[of]), name
        assert train == " + ".join(TRAIN_SETS[trained_on]), name
        words = {"1600": "1,600 of nexet_night, ", "all": "all of "}
        first, _, rest = (how or "").partition(" ")
        other = f", by {teacher}" if teacher not in (None, from_) else ""
        assert chosen == (f"{words[first]}{rest}{other}" if how else ""), name


def test_the_next_row_takes_five_lines_and_one_training(tmp_path: Path) -> None:
    page = (CONFIGS.parent / "docs/thesis.md").read_text()
    (text,) = (block for block in re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S) if "m9_1:" in block)
    lines = text.splitlines()
    assert len(lines) - lines.index("models:") - 1 == 5
    file = tmp_path / "next.yaml"
    file.write_text(text.replace("base: configs/", f"base: {CONFIGS}/"))
    found = json_of("run", file, "--dry-run", "--run-dir", tmp_path / "run")
    last = found["rows"][-1]
    assert (last["row"], last["model"], last["parents"], last["published_miou"]) == ("9.1", "m9_1", ["m8_3"], None)
    before, after = (build_graph(load_recipe(one)).nodes for one in (CONFIGS / "thesis_scenes.yaml", file))
    new = after.keys() - before.keys()
    assert all("m9_1" in node.name for node in new)
    assert [str(node) for node in new if node.stage.startswith("train_")] == ["train_segmenter/m9_1"]
    key = [{name: (node.version, node.recipe, node.seed) for name, node in one.items()} for one in (before, after)]
    assert key[1].items() >= key[0].items()  # so all else is found in the run of its base
    assert load_recipe(file).name == "thesis_scenes"


def test_data_that_are_not_there_are_told_once_each_with_their_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("thesis", "thesis_controls"):
        lines = refused("run", CONFIGS / f"{name}.yaml", "--dry-run", "--json").splitlines()
        missing = [line for line in lines if "there is no folder" in line]
        assert len(missing) == 4 and "4 errors" in "\n".join(lines), lines
        for root, layout in {
            "cityscapes": "layout cityscapes: images leftImg8bit/<split>/<city>/*, labels gtFine/<split>/<city>/",
            "camvid": "layout images: images all below it",
            "nexet": "layout images: images all below it",
            "night_driving": "layout nighttime_driving: images leftImg8bit/<split>/<domain>/*, labels gtCoarse_daytime",
        }.items():
            assert len([line for line in missing if f"set roots.{root} ({layout}" in line]) == 1, root
        assert "cityscapes_val lies there, too" in missing[0]


def test_another_loss_of_one_model_changes_that_model_alone() -> None:
    """What a run does again: the model, and what follows from it."""

    def keys(*overrides: str) -> dict[NodeId, object]:
        nodes = build_graph(load_recipe(CONFIGS / "thesis_scenes.yaml", overrides)).nodes.values()
        return {node.id: (node.version, node.recipe, node.seed) for node in nodes}

    whole, changed = keys(), keys("models.m8_3.loss.gamma=1.0")
    assert whole.keys() == changed.keys()
    again = {str(node) for node in whole if whole[node] != changed[node]}
    assert again == {"train_segmenter/m8_3", "train_segmenter/m8_3.seed1", "train_segmenter/m8_3.seed2"}
    recipe = load_recipe(CONFIGS / "thesis_scenes.yaml")
    trained = [node for node in whole if node.stage == "train_segmenter"]
    assert len(trained) == sum(len(recipe.seeds_of(model)) for model in recipe.models.values()) == 38
    nodes = build_graph(recipe).nodes
    assert {str(node.id) for node in nodes.values() if NodeId("train_segmenter", "m8_3") in node.needs} == {
        "evaluate/m8_3"
    }


def test_shared_work_has_one_node(thesis: Recipe) -> None:
    graph = build_graph(thesis)
    stages = [node.stage for node in graph.nodes]
    assert stages.count("train_translator") == 2
    assert stages.count("split") == 1
    # One pool and one reference, however many of the 14 self-trained models choose from them.
    assert {node.name for node in graph.nodes if node.stage == "score"} == {"nexet_night.inception", "night.inception"}


def test_nodes_come_after_what_they_need(thesis: Recipe) -> None:
    seen: set[NodeId] = set()
    for node in build_graph(thesis).nodes.values():
        assert seen.issuperset(node.needs), node.id
        seen.add(node.id)


def test_only_one_model_brings_its_ancestors_and_no_other(thesis: Recipe) -> None:
    graph = build_graph(thesis, "m1_3")
    assert set(graph.models) == {"m1_1", "m1_3"}
    assert not any(node.stage == "train_translator" for node in graph.nodes)
    assert NodeId("evaluate", "m1_3") in graph.nodes
    assert NodeId("evaluate", "m1_1") not in graph.nodes
    with pytest.raises(UserError, match="no such model"):
        build_graph(thesis, "m9_9")


def scenes_recipe(folder: Path, models: str, more: str = "") -> Recipe:
    file = folder / "recipe.yaml"
    file.write_text(
        f"""
name: made
taxonomy: camvid11
datasets:
  day: {{layout: scenes, count: 4}}
  pool: {{layout: scenes, count: 4, labelled: false}}
  night: {{split: pool, keep: night}}
  both: {{join: [day, night]}}
  test: {{layout: scenes, count: 2, first: 100}}
models:
{models}
test_sets: {{test: test}}
{more}
"""
    )
    return load_recipe(file)


def graph_of(folder: Path, models: str) -> Graph:
    return build_graph(scenes_recipe(folder, models))


def test_rounds_are_a_chain_of_models(tmp_path: Path) -> None:
    models = "  a: {train: [day]}\n  b: {train: [day], start: a, rounds: 3, self_training: {pool: night}}"
    chain = expand_rounds(scenes_recipe(tmp_path, models).models)
    assert list(chain) == ["a", "b.1", "b.2", "b"]
    assert [chain[name].start for name in chain] == ["imagenet", "a", "b.1", "b.2"]
    learning = chain["b"].self_training
    assert learning is not None and learning.teacher == "b.2"
    graph = build_graph(scenes_recipe(tmp_path, models))
    assert graph.nodes[NodeId("pseudo_label", "b")].needs[0] == NodeId("label", "b.2.night")
    assert NodeId("train_segmenter", "b.2") in graph.nodes[NodeId("label", "b.2.night")].needs


def test_rounds_are_watched_against_the_first_one_on_their_pool(tmp_path: Path) -> None:
    models = """
  a: {train: [day]}
  b: {train: [day], start: a, rounds: 3, self_training: {pool: night}}
  c: {train: [day], start: b, self_training: {pool: night, guard: {act: stop, range: [0.9, 1.1]}}}
  d: {train: [day], start: b, self_training: {pool: pool, guard: {act: stop}}}
"""
    graph = build_graph(scenes_recipe(tmp_path, models))
    labels = {name: graph.nodes[NodeId("pseudo_label", name)] for name in ("b.1", "b.2", "b", "c", "d")}
    first = {name: node.inputs.get("first_round") for name, node in labels.items()}
    assert first == {"b.1": None, "d": None} | dict.fromkeys(("b.2", "b", "c"), NodeId("label", "a.night"))
    guards = {name: node.settings.get("guard") for name, node in labels.items()}
    assert guards["b"] == Guard(act="warn") and guards["c"] == Guard(act="stop", range=(0.9, 1.1))
    assert guards["b.1"] is guards["d"] is None


ONLINE = """
  a: {train: [day], start: START}
  b: {train: [day], start: a, rounds: 2, training: {ema_decay: 0.9},
      self_training: {mode: online, pool: night, never_below: {sky: [road]}}}
  c: {train: [day], start: a, self_training: {pool: night, never_below: {sky: [road]}}}
"""


def online_graph(folder: Path, *overrides: str, start: str = "scratch") -> Graph:
    scenes_recipe(folder, ONLINE.replace("START", start))
    return build_graph(load_recipe(folder / "recipe.yaml", overrides))


def test_a_model_that_teaches_itself_has_a_pool_and_no_pseudo_labels(tmp_path: Path) -> None:
    graph = online_graph(tmp_path)
    node = graph.nodes[NodeId("train_segmenter", "b")]
    assert node.inputs["pool"] == Frames(graph.datasets["night"]) and "pool" in node.counted
    assert NodeId("train_segmenter", "b.1") in node.needs  # its second round
    assert {name.name for name in graph.nodes if name.stage == "pseudo_label"} == {"c"}
    assert graph.models["b"].pseudo_label is None
    assert {use.dataset for use in graph.watched["b"].learned} >= {"day", "night"}  # leaks of the pool are found
    labelled = graph.nodes[NodeId("pseudo_label", "c")].inputs["labelled"]
    assert labelled == Frames(graph.datasets["day"])  # what the rule is checked on


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ("", "no train set of a has labelled frames under night light"),
        ("datasets.day.mix={day: 0.5, night: 0.5}", None),
        ("start", "ever saw a labelled frame under night light is not known"),
    ],
)
def test_a_teacher_that_never_saw_night_light_is_warned_of(tmp_path: Path, change: str, warning: str | None) -> None:
    for file in ("model.json", "model.safetensors"):
        (Location.of(tmp_path) / "m" / file).write_bytes(b"{}")
    start = str(tmp_path / "m") if change == "start" else "scratch"
    graph = online_graph(tmp_path, *([change] if "=" in change else []), start=start)
    said = {
        "online": graph.nodes[NodeId("train_segmenter", "b")].unhashed["warnings"],
        "offline": graph.nodes[NodeId("pseudo_label", "c")].unhashed["known_warnings"],
    }
    for mode, warnings in said.items():
        expected = warning.replace("of a ", "of b or b.1 or a ") if warning and mode == "online" else warning
        assert warnings == () if expected is None else expected in warnings[0], mode


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ema_decay: 0.9", "ema_decay: 0.0", "needs the EMA of the weights"),
        (", training: {", ", training: {batch: 4, accumulate: 4, ", "2 frames of the pool cannot be shared evenly"),
        ("pool: night, never", "online: {warmup_steps: 60}, pool: night, never", "the teacher would never teach"),
    ],
)
def test_a_model_that_cannot_teach_itself_is_refused_before_anything_runs(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    models = ONLINE.replace("START", "scratch").replace(old, new, 1)
    models = models.replace(", training: {", ", training: {epochs: 2, steps_per_epoch: 30, ")
    with pytest.raises(UserError, match=message):
        graph_of(tmp_path, models)


SEEDED = """
  a: {train: [day], seeds: [0, 2]}
  b: {train: [day], start: a, seeds: [0, 2, 1]}
  c: {train: [day], start: b, seeds: [2], rounds: 2, self_training: {pool: night, select: SELECT}}
  d: {train: [day], start: a, seeds: [0, 2], self_training: {pool: night, teacher: t, select: SELECT}}
  t: {train: [day]}
""".replace("SELECT", "{method: random, count: 1, extractor: {name: efficientnet_lite0}}")


def test_a_training_takes_that_of_its_own_seed_or_the_only_one(tmp_path: Path) -> None:
    recipe = scenes_recipe(tmp_path, SEEDED.replace("seeds: [0, 2, 1]", "seeds: [0, 2]"), "seed: 5")
    found = {
        name: (model.start, model.self_training.teacher if model.self_training else None, of, seed)
        for name, (model, of, seed) in expand_seeds(recipe).items()
    }
    assert found == {
        "a": ("imagenet", None, "a", 0),
        "b": ("a", None, "b", 0),
        "c.1": ("b.seed2", None, "c.1", 2),
        "c": ("c.1", "c.1", "c", 2),
        "d": ("a", "t", "d", 0),
        "t": ("imagenet", None, "t", 0),
        "a.seed2": ("imagenet", None, "a", 2),
        "b.seed2": ("a.seed2", None, "b", 2),
        "d.seed2": ("a.seed2", "t", "d", 2),
    }
    graph = build_graph(recipe)
    seeds = {node.name: found.seed for node, found in graph.nodes.items() if node.stage == "train_segmenter"}
    assert {name for name, seed in seeds.items() if seed == 7} == {"a.seed2", "b.seed2", "c.1", "c", "d.seed2"}
    assert {name for name, seed in seeds.items() if seed == 5} == {"a", "b", "d", "t"}
    assert set(graph.watched) == {"a", "b", "c.1", "c", "d", "t"}


@pytest.mark.parametrize(
    ("method", "seeds"),
    [("random", {"c.1": 7, "c": 7, "d": 5, "d.seed2": 7}), ("histogram", {"c.1": 5, "c": 5, "d": 5})],
)
def test_frames_are_chosen_once_for_all_seeds_but_by_chance_for_each(
    tmp_path: Path, method: str, seeds: dict[str, int]
) -> None:
    """And labelled once by a teacher that is the same for seeds which have the same frames."""
    text = SEEDED.replace("random", method).replace("count: 1", "count: 1, reference: day").replace("2, 1]", "2]")
    graph = build_graph(scenes_recipe(tmp_path, text, "seed: 5"))
    assert {node.name: one.seed for node, one in graph.nodes.items() if node.stage == "select"} == seeds
    assert {node.name for node in graph.nodes if node.stage == "pseudo_label"} == seeds.keys()
    for name in seeds:
        labels = graph.nodes[NodeId("pseudo_label", name)].inputs["labels"]
        assert isinstance(labels, NodeId)
        assert NodeId("select", name) in graph.nodes[labels].needs
    if method == "random":
        assert graph.models["d.seed2"].select == NodeId("select", "d.seed2")
        assert NodeId("pseudo_label", "d.seed2") in graph.nodes[NodeId("train_segmenter", "d.seed2")].needs


def test_labels_of_a_teacher_with_several_seeds_are_made_by_each(tmp_path: Path) -> None:
    models = "  a: {train: [day]}\n  b: {train: [day], start: a, self_training: {pool: night}}"
    graph = build_graph(scenes_recipe(tmp_path, models, "seeds: [0, 1]"))
    assert graph.nodes[NodeId("pseudo_label", "b.seed1")].needs == (NodeId("label", "a.seed1.night"),)
    needs = graph.nodes[NodeId("label", "a.seed1.night")].needs
    assert NodeId("train_segmenter", "a.seed1") in needs and NodeId("train_segmenter", "a") not in needs
    assert graph.nodes[NodeId("train_segmenter", "b.seed1")].needs[:3] == (
        NodeId("collect", "day"), NodeId("label", "a.seed1.night"), NodeId("pseudo_label", "b.seed1")
    )  # fmt: skip


def test_a_teacher_labels_frames_once_whatever_is_kept_of_them(tmp_path: Path) -> None:
    chosen = "select: {method: random, count: 1, extractor: {name: efficientnet_lite0}}"
    models = f"""
  a: {{train: [day]}}
  b: {{train: [day], start: a, self_training: {{pool: night, threshold: {{kind: none}}}}}}
  c: {{train: [day], start: a, self_training: {{pool: night, threshold: {{floor: 0.5}}, never_below: {{sky: [road]}}}}}}
  d: {{train: [day], start: scratch, self_training: {{pool: night, teacher: a, inference: {{window: null}}}}}}
  e: {{train: [day], start: a, self_training: {{pool: night, inference: {{flip: true}}}}}}
  f: {{train: [day], start: a, self_training: {{pool: night, {chosen}}}}}
  g: {{train: [day], start: a, self_training: {{pool: pool}}}}
"""
    graph = graph_of(tmp_path, models)
    labels = {name: graph.nodes[NodeId("pseudo_label", name)].inputs["labels"] for name in "bcdefg"}
    assert {labels[name] for name in "bcd"} == {NodeId("label", "a.night")}
    assert len({labels[name] for name in "defg"}) == 4
    kept = {PSEUDO_LABELS: NodeId("pseudo_label", "c")}
    assert graph.nodes[NodeId("train_segmenter", "c")].inputs["kept"] == kept


def test_a_threshold_changes_no_pass_of_the_teacher(tmp_path: Path) -> None:
    models = (
        "  a: {train: [day]}\n  b: {train: [day], start: a, self_training: {pool: night, threshold: {kind: fixed}}}"
    )
    one, other = (graph_of(tmp_path, text).nodes for text in (models, models.replace("fixed", "none")))
    changed = {str(node) for node in one if one[node].recipe != other[node].recipe}
    assert changed == {"pseudo_label/b"}


def test_the_first_seed_of_all_models_comes_first_and_is_evaluated(tmp_path: Path) -> None:
    models = "  a: {train: [day]}\n  b: {train: [day], start: a}"
    nodes = list(map(str, build_graph(scenes_recipe(tmp_path, models, "seeds: [3, 1]")).nodes))
    assert nodes[-8:] == [
        "train_segmenter/a", "train_segmenter/b", "evaluate/a", "evaluate/b",
        "train_segmenter/a.seed1", "evaluate/a.seed1", "train_segmenter/b.seed1", "evaluate/b.seed1",
    ]  # fmt: skip
    only = build_graph(scenes_recipe(tmp_path, models, "seeds: [3, 1]"), "b")
    assert [str(node) for node in only.nodes if node.stage == "evaluate"] == ["evaluate/b", "evaluate/b.seed1"]
    assert only.models.keys() == {"a", "b", "a.seed1", "b.seed1"}


def test_seeds_leave_a_model_that_has_one_as_it_was(tmp_path: Path) -> None:
    def keys(more: str) -> dict[str, object]:
        graph = build_graph(scenes_recipe(tmp_path, "  a: {train: [day]}", more))
        return {str(name): (node.recipe, node.seed) for name, node in graph.nodes.items()}

    assert keys("seed: 4").items() < keys("seed: 4\nseeds: [0, 1]").items()


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ("[0, 1, 1]", r"models\.a\.seeds: .*differ, 1 stands there twice"),
        ("[-1]", r"models\.a\.seeds.*greater than or equal to 0"),
        ("[]", r"models\.a\.seeds: .*at least 1 item"),
        ("[1, 2]", r"models\.b\.seeds: b starts from a, which is trained with the seeds 1, 2 and not with 0"),
    ],
)
def test_wrong_seeds_are_refused(tmp_path: Path, seeds: str, message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        scenes_recipe(tmp_path, f"  a: {{train: [day], seeds: {seeds}}}\n  b: {{train: [day], start: a}}")


def test_a_split_dataset_is_a_view_of_one_domain(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, "  a: {train: [day]}")
    assert graph.datasets["night"] == (View(NodeId("split", "pool"), "night"),)
    assert graph.datasets["both"] == (View(NodeId("collect", "day")), View(NodeId("split", "pool"), "night"))


def test_only_stages_that_draw_have_the_seed(tmp_path: Path) -> None:
    recipe = scenes_recipe(tmp_path, "  a: {train: [day]}", "seed: 5")
    seeds = {node.stage: found.seed for node, found in build_graph(recipe).nodes.items()}
    assert seeds == {"collect": 0, "split": 0, "train_segmenter": 5, "evaluate": 0}


def training_part(folder: Path, models: str, more: str = "") -> dict[str, object]:
    return dict(build_graph(scenes_recipe(folder, models, more)).nodes[NodeId("train_segmenter", "a")].recipe)


def test_a_start_that_is_a_folder_counts_by_its_content(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / "model.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"one")
    models = f"  a: {{train: [day], start: {folder}}}"
    first = training_part(tmp_path, models)["start"]
    moved = folder.rename(tmp_path / "moved")
    assert training_part(tmp_path, models.replace("converted", "moved"))["start"] == first
    (moved / "model.safetensors").write_bytes(b"two")
    assert training_part(tmp_path, models.replace("converted", "moved"))["start"] != first
    assert training_part(tmp_path, "  a: {train: [day]}")["start"] == "imagenet"


def test_the_start_of_a_translator_counts_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "start.safetensors"

    def key(content: bytes | None) -> object:
        if content is not None:
            file.write_bytes(content)
        start = "null" if content is None else file
        recipe = scenes_recipe(
            tmp_path, "  a: {train: [day]}", f"translators: {{unit: {{day: day, night: day, start: {start}}}}}"
        )
        return build_graph(recipe).nodes[NodeId("train_translator", "unit")].recipe["start"]

    assert key(None) is None
    first = key(b"one")
    assert first != key(b"two") and first == key(b"one")


@pytest.mark.parametrize(
    ("network", "part"),
    [
        ("encoder: resnet18, backend: detectron2", "pip install --no-build-isolation"),
        ("encoder: timm/convnext_atto, norm: frozen", "no batch norm"),
    ],
)
def test_networks_that_cannot_be_built_here_fail_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, part: str
) -> None:
    monkeypatch.setattr(detectron2, "is_installed", lambda: False)
    recipe = scenes_recipe(tmp_path, f"  a: {{train: [day], network: {{{network}}}}}")
    with pytest.raises(UserError, match=f"(?s)model a: .*{part}"):
        build_graph(recipe)


def test_another_inference_makes_other_passes_with_a_segmenter(tmp_path: Path) -> None:
    models = "  a: {train: [day]}\n  b: {train: [day], start: a, self_training: {pool: night%s}}"
    show = "predictions: {p: {dataset: night, model: b}}\n"
    careful = "{flip: true, scales: [0.75, 1.0]}"

    def parts(own: str = "", more: str = "") -> dict[str, object]:
        graph = build_graph(scenes_recipe(tmp_path, models % own, show + more))
        return {str(node): found.recipe for node, found in graph.nodes.items()}

    plain = parts()
    assert parts(more="inference: {overlap: 0.25, scales: [1.0], window: null}") == plain
    other = parts(more=f"inference: {careful}")
    assert {node for node in plain if other[node] != plain[node]} == {
        "label/a.night", "predict/p", "evaluate/a", "evaluate/b"
    }  # fmt: skip
    taught = parts(own=f", inference: {careful}")
    assert {node for node in plain if taught.get(node) != plain[node]} == {
        "label/a.night", "pseudo_label/b", "train_segmenter/b"
    }  # fmt: skip
    with pytest.raises(UserError, match=r"inference\.windw: unknown key, did you mean 'window'"):
        parts(more="inference: {windw: [4, 4]}")
    with pytest.raises(UserError, match="twice"):
        parts(more="inference: {scales: [1.0, 1.0]}")
    with pytest.raises(UserError, match=r"evaluation\.boundary"):
        parts(more="evaluation: {boundary: 2}")


def test_the_number_of_workers_counts_where_batch_norms_see_it(tmp_path: Path) -> None:
    def part(more: str) -> dict[str, object]:
        return training_part(tmp_path, "  a: {train: [day]}", more)

    two = "compute: {train: {workers: 2}}\n"
    assert part(two) == part("") | {"workers": 2} != part("")
    assert part(two + "network: {norm: frozen}") == part("network: {norm: frozen}")
    assert part(two + "training: {freeze_batch_norm: true}") == part("training: {freeze_batch_norm: true}")
