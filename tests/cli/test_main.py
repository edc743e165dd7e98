"""Every verb: its help, its exit codes, its one JSON object; the work behind it is tested where it lives."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from nightseg.cli import doctor as doctor_module
from nightseg.cli.doctor import Finding
from nightseg.cli.main import main
from nightseg.pipeline import run as run_module
from nightseg.pipeline import search as search_module
from nightseg.pipeline import single
from nightseg.pipeline.run import Outcome
from nightseg.pipeline.search import Found
from nightseg.recipe import load_recipe
from nightseg.storage import Location, Workspace
from tests.command_line import forbid_ray, good, json_of, nightseg, refused

CONFIGS = Path(__file__).parents[2] / "configs"
VERBS = sorted(main.commands)
JSON_VERBS = [
    "check",
    "doctor",
    "evaluate",
    "explain",
    "export",
    "fid",
    "predict",
    "run",
    "search",
    "select",
    "split",
    "status",
    "verify",
]
BAD = """
name: bad
seed: one
taxonomy: camvid1
datasets:
  day: {layout: scenes, cont: 4}
  street: {layout: camvid, root: ROOT, split: trian, label_encoding: camvid}
  pool: {layout: images, root: /does/not/exist}
models:
  first: {train: [dya], start: second}
  second: {train: [day], start: first}
  third: {train: [pool]}
"""


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_ray(monkeypatch)


# -- help -------------------------------------------------------------------------------------------------------------


def test_the_verbs_are_those_of_the_design() -> None:
    assert set(VERBS) >= {*JSON_VERBS, "report"}
    out = good("--help").stdout
    assert all(verb in out for verb in VERBS) and "..." not in out.partition("Commands:")[2]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_teaches_with_an_example(verb: str) -> None:
    command = main.commands[verb]
    forms = {verb: command} | {f"{verb} {name}": form for name, form in getattr(command, "commands", {}).items()}
    examples = []
    for words in forms:
        out = good(*words.split(), "--help").stdout
        found = [line.split() for line in out.splitlines() if line.startswith(f"  nightseg {words} ")]
        assert found, out
        examples += found
    options = {option for form in forms.values() for parameter in form.params for option in parameter.opts}
    for example in examples:
        assert {word for word in example if word.startswith("--")} <= options


@pytest.mark.parametrize("verb", JSON_VERBS)
def test_verbs_that_answer_can_answer_in_json(verb: str) -> None:
    assert "--json" in good(verb, "--help").stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Usage: "),
        (("rnu",), "No such command 'rnu', did you mean 'run'?"),
        (("trian", "r.yaml"), "No such command 'trian', did you mean 'run'?"),
        (("Train",), "No such command 'Train', did you mean 'run'?"),
        (("evalute",), "did you mean 'evaluate'?"),
        (("infer",), "did you mean 'predict'?"),
        (("configs/demo.yaml",), "No such command 'configs/demo.yaml', did you mean 'run configs/demo.yaml'?"),
        (("xyz",), "No such command 'xyz'; known: "),
        (("convert", "detectron"), "No such command 'detectron', did you mean 'detectron2'?"),
        (("run",), "Missing argument 'RECIPE'"),
        (("run", "a.yaml", "--dryrun"), "--dry-run"),
        (("run", "/does/not/exist.yaml"), "there is no such recipe file"),
        (("run", "/"), "there is no such recipe file"),
        (("search", "/does/not/exist.yaml"), "there is no such search file"),
        (("status", "/does/not/exist"), "there is no such run folder"),
        (("status", CONFIGS), "not a run folder"),
        (("verify", "/does/not/exist"), "there is no such run folder"),
        (("verify", CONFIGS), "not a run folder"),
        (("report", "/does/not/exist"), "no results.json there"),
        (("explain", "/does/not/exist", "f"), "there is no such run folder"),
        (("explain", CONFIGS, "f"), "not a run folder"),
        (("why", "runs/demo"), "did you mean 'explain'?"),
        (("split", "/does/not/exist", "--out", "a.parquet"), "no such folder: /does/not/exist"),
        (("split", CONFIGS, "--out", "a.parquet"), "no image in"),
        (("split", CONFIGS, "--out", "a.csv"), "a name that ends in .parquet"),
        (("split", CONFIGS, "--out", "a.parquet", "--margin", "2"), "--margin"),
        (("fid", "/does/not/exist.npz", "b.npz"), "there is no such file of statistics"),
        (("fid", "/does/not/exist", "b.npz"), "no such folder"),
        (("fid", "/does/not/exist.parquet", "b.npz"), "there is no such frame table"),
        (("select", CONFIGS, "--count", "3", "--out", "o"), "needs a reference"),
        (("select", CONFIGS, "--count", "3", "--out", "o", "--method", "random"), "no image in"),
        (("select", "no.parquet", "--count", "3", "--out", "o", "--method", "random"), "there is no such frame table"),
        (("evaluate", "/does/not/exist", "b", "--taxonomy", "camvid11"), "there is no folder /does/not/exist"),
        (("evaluate", "a", "b", "--taxonomy", "camvid1"), "unknown taxonomy 'camvid1', did you mean 'camvid11'"),
        (("evaluate", "a", "b", "--taxonomy", "no.yaml"), "no such taxonomy file"),
        (("predict", "/does/not/exist", "a", "--out", "o"), "neither a model folder"),
        (("predict", "m", "a", "--out", "o", "--save", "maks"), "unknown picture 'maks'"),
        (("predict", "m", "a", "--out", "o", "--window", "512"), "'512' is not HEIGHTxWIDTH in pixels, like 512x1024"),
        (("predict", "m", "a", "--out", "o", "--window", "0x8"), "'0x8' is not HEIGHTxWIDTH in pixels, like 512x1024"),
        (("predict", "m", "a", "--out", "o", "--scales", "1;2"), "'1;2' is not a list of numbers, like 0.75,1,1.25"),
        (
            ("predict", "m", "a", "--out", "o", "--scales", "1,9"),
            "--scales 9.0: Input should be less than or equal to 4",
        ),
        (("predict", "m", "a", "--out", "o", "--overlap", "1"), "--overlap 1.0: "),
        (("export", "/does/not/exist", "--out", "o.onnx"), "neither a model folder"),
        (("export", "m", "--out", "o.onnx", "--size", "0x4"), "'0x4' is not HEIGHTxWIDTH in pixels, like 512x1024"),
        (("export", "m", "--out", "o.onnx", "--tolerance", "0"), "--tolerance"),
        (("doctor", "--cluster", "/does/not/exist"), "there is no such cluster file"),
        (("doctor", "--cluster", CONFIGS), "there is no such cluster file"),
    ],
)
def test_wrong_requests_are_refused_with_a_reason(words: tuple[object, ...], message: str) -> None:
    assert message in refused(*words)


def test_a_folder_that_may_not_be_read_is_a_wrong_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied", "/secret")

    monkeypatch.setattr(single, "split_folder", forbidden)
    assert "/secret: Permission denied" in refused("split", "/secret", "--out", "a.parquet")


# -- run --------------------------------------------------------------------------------------------------------------


def test_all_errors_of_a_recipe_are_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "train/images").mkdir(parents=True)
    (tmp_path / "bad.yaml").write_text(BAD.replace("ROOT", str(tmp_path)))
    message = refused("run", tmp_path / "bad.yaml", "--run-dir", tmp_path / "run", "--set", "training.epoch=3")
    for expected in (
        "nothing was started",
        "line 3: seed: ",
        "line 4: taxonomy: unknown taxonomy 'camvid1', did you mean 'camvid11'?",
        "line 6: datasets.day.cont: unknown key, did you mean 'count'?",
        "line 7: datasets.street.split: layout camvid: unknown split 'trian', did you mean 'train'?",
        "line 8: datasets.pool.root: there is no folder '/does/not/exist'",
        "line 10: models.first.train.0: there is no dataset 'dya', did you mean 'day'?",
        "models.first: a cycle",
        "line 12: models.third.train.0: the frames of pool have no labels",
        "set training.epoch=3: training.epoch: unknown key, did you mean 'epochs'?",
    ):
        assert expected in message, f"{expected}\nis missing in\n{message}"
    assert not (tmp_path / "run").exists()


def test_an_encoding_that_the_taxonomy_lacks_is_named(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    day = f"{{layout: camvid, root: {tmp_path}, label_encoding: camvid21}}"
    (tmp_path / "bad.yaml").write_text(f"name: bad\ntaxonomy: camvid11\ndatasets: {{day: {day}}}\n")
    message = refused("run", tmp_path / "bad.yaml")
    assert "datasets.day.label_encoding: the taxonomy camvid11 has no label encoding 'camvid21'" in message
    assert "did you mean 'camvid12'?; known: train_ids, camvid12" in message


def test_an_unknown_model_is_refused_before_the_run_folder_is_made(tmp_path: Path) -> None:
    message = refused("run", CONFIGS / "demo.yaml", "--only", "nobody", "--run-dir", tmp_path / "run")
    assert "no such model" in message and "adapted" in message
    assert not (tmp_path / "run").exists()


def test_a_dry_run_shows_the_graph_and_leaves_nothing(tmp_path: Path) -> None:
    words = ("run", CONFIGS / "demo.yaml", "--run-dir", tmp_path / "run", "--dry-run")
    answer = json_of(*words)
    stages = {stage["node"]: stage for stage in answer["stages"]}
    assert answer["run_dir"] == f"{tmp_path}/run"
    assert stages["collect/day"]["state"] == "runs" and stages["collect/day"]["rows"] > 0
    assert stages["evaluate/adapted"]["state"] == "waits"
    assert "evaluate/adapted" in good(*words).stdout
    assert not (tmp_path / "run").exists()


def test_run_passes_on_what_it_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    score = {"miou": 0.5, "pa": 0.9, "ca": 0.6, "fwiou": 0.8, "published_miou": None}
    results = {"models": {"m": {"tests": {"night": score}}}, "commits": {}}

    def adapt(recipe: str, overrides: Any, **more: Any) -> run_module.Adapted:
        asked.update({"recipe": recipe, "overrides": overrides, **more})
        print("a library prints")
        folder = Location.of(tmp_path)
        return run_module.Adapted(folder, Outcome(results, 3, 2, 61.4), folder / "report.html")

    monkeypatch.setattr(run_module, "adapt", adapt)
    words = ("run", "r.yaml", "--set", "a=1", "--set", "b=2", "--run-dir", "d", "--only", "m")
    assert json_of(*words) == results
    assert asked["overrides"] == ("a=1", "b=2")
    assert (asked["recipe"], asked["run_dir"], asked["only"]) == ("r.yaml", "d", "m")
    out = good(*words).stdout
    assert "50.0" in out and f"3 stages done, 2 already committed, 61 s. Report: {tmp_path}/report.html" in out
    assert "m reaches 50.0 % mIoU on night (1 seed); no control of equal steps" in out
    assert "a library prints" not in out
    *_, segment, python, card, curves = out.splitlines()  # how to go on, one line each
    assert segment.endswith(f"nightseg predict {tmp_path}:m IMAGES --out masks --save mask,overlay")
    assert python.endswith(f'nightseg.load_model("{tmp_path}:m")') and f"{tmp_path}/models/m" in card
    assert curves.endswith(f"tensorboard --logdir {tmp_path}/tensorboard")


def test_work_that_fails_is_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapt(*_: Any, **__: Any) -> None:
        raise RuntimeError("train m: a worker process died")

    monkeypatch.setattr(run_module, "adapt", adapt)
    result = nightseg("run", "r.yaml", "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "nightseg: RuntimeError: train m: a worker process died\n(--debug shows where)\n"


# -- status and report ------------------------------------------------------------------------------------------------


def test_status_shows_what_is_committed_and_who_works(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    attempt = workspace.stage("collect", "day", version=1, recipe={}, inputs={}, seed=0).open()
    attempt.finish(rows_in=5, rows_out=4, quarantined=1, seconds=2.0)
    answer = json_of("status", tmp_path)
    assert answer["holder"] is None
    (commit,) = answer["commits"]
    assert (commit["stage"], commit["name"], commit["rows_in"], commit["quarantined"]) == ("collect", "day", 5, 1)
    with workspace.lock():
        out = good("status", tmp_path).stdout
        assert "being worked on by process" in out and "collect/day" in out
        assert json_of("status", tmp_path)["holder"].startswith("process ")


def test_verify_names_damaged_files(tmp_path: Path) -> None:
    attempt = Workspace(tmp_path).stage("collect", "day", version=1, recipe={}, inputs={}, seed=0).open()
    (attempt.folder / "history.json").write_bytes(b"[0.25]")
    file = attempt.finish(rows_in=5, rows_out=5, outputs=["history.json"]).file("history.json")
    assert "1 files of 1 commits read, 6 bytes: 0 damaged" in good("verify", tmp_path).stdout
    assert json_of("verify", tmp_path) == {
        "run_dir": str(tmp_path), "good": True, "commits": 1, "files": 1, "bytes": 6, "damaged": []
    }  # fmt: skip
    file.write_bytes(b"[0.75]")
    result = nightseg("verify", tmp_path)
    assert result.exit_code == 1
    assert "history.json" in result.stdout and "1 damaged" in result.stdout
    result = nightseg("verify", tmp_path, "--json")
    assert result.exit_code == 1
    (damage,) = json.loads(result.stdout)["damaged"]
    assert (Location.of(tmp_path) / damage["path"]) == file
    assert damage["seen"] == f"has sha256 {hashlib.sha256(b'[0.75]').hexdigest()[:12]}"
    assert damage["expected"] == f"sha256 {hashlib.sha256(b'[0.25]').hexdigest()[:12]}"


def test_report_is_written_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import nightseg.report

    seen: list[Any] = []

    def write_report(folder: Location, results: dict[str, Any], place: Location | None) -> Location:
        seen.append(results)
        return place or folder / "report.html"

    monkeypatch.setattr(nightseg.report, "write_report", write_report)
    (tmp_path / "results.json").write_text('{"models": {}, "commits": {}, "seed": 3}')
    assert good("report", tmp_path).stdout == f"{tmp_path}/report.html\n"
    assert good("report", tmp_path, "--out", tmp_path / "else.html").stdout == f"{tmp_path}/else.html\n"
    assert seen == 2 * [{"models": {}, "commits": {}, "seed": 3}]
    (tmp_path / "results.json").write_text("{")
    assert "damaged" in refused("report", tmp_path)


def unfinished(folder: Path) -> Path:
    """A run that has collected two scenes, and not more."""
    (folder / "r.yaml").write_text(
        "{name: r, taxonomy: camvid11, compute: {map: {actors: 0}}, "
        "datasets: {day: {layout: scenes, count: 2, size: [32, 64]}}}"
    )
    good("run", folder / "r.yaml", "--run-dir", folder / "run")
    (folder / "run/results.json").unlink()
    return folder / "run"


def test_explain_tells_of_a_run_that_is_not_finished(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = unfinished(tmp_path)
    assert good("explain", run).stdout == "day/000000\nday/000001\n"
    assert json_of("explain", run)["frames"] == ["day/000000", "day/000001"]
    lines = good("explain", run, "000001").stdout.splitlines()
    assert lines[0] == "frame         day/000001" and "learned by    no model" in lines
    answer = json_of("explain", run, "day/000001")
    assert answer["frame_id"] == "day/000001" and answer["page"] is None and answer["learned_by"] == []
    assert answer["source"]["file"] == "unchanged"
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    page = json_of("explain", run, "day/000001", "--open")["page"]
    assert opened == [Path(page).as_uri()] and Path(page).read_text().count("src=") == 2
    assert "no such frame, did you mean 'day/000001'" in refused("explain", run, "day/00001")
    assert "give FRAME_ID" in refused("explain", run, "--open")
    beside = json_of("explain", run, "day/000001", "--out", tmp_path / "here.html")["page"]
    assert beside == f"{tmp_path}/here.html" and len(opened) == 1
    assert Path(beside).read_bytes() == Path(page).read_bytes() and str(run) not in Path(page).read_text()
    assert "trained none yet" in refused("explain", run, "day/000001", "--model", "adapted")


# -- search and doctor ------------------------------------------------------------------------------------------------


def test_search_shows_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = {"trial": "ab", "values": {"a.alpha": 0.5}, "miou": 0.4, "epochs": 3, "end": "done", "error": None}
    folder = Location.of("/runs/search")

    def tune(*_: Any, **__: Any) -> Found:
        return Found(folder, trial, [trial], folder / "best.yaml")

    monkeypatch.setattr(search_module, "search", tune)
    told = {"best": trial, "trials": [trial], "recipe": "/runs/search/best.yaml", "trainings": 0, "reused": 0}
    assert json_of("search", "s.yaml") == told
    out = good("search", "s.yaml").stdout
    assert "40.0" in out and "tensorboard --logdir /runs/search/tensorboard --host=127.0.0.1" in out


@pytest.mark.parametrize(("is_good", "code"), [(True, 0), (False, 1)])
def test_doctor_answers_in_one_object_and_by_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, is_good: bool, code: int
) -> None:
    def examine(cluster: str | None) -> list[Finding]:
        return [Finding("torch", is_good, "2.10")]

    monkeypatch.setattr(doctor_module, "examine", examine)
    result = nightseg("doctor", "--json")
    assert result.exit_code == code
    assert json.loads(result.stdout) == {
        "good": is_good, "findings": [{"what": "torch", "good": is_good, "detail": "2.10"}]
    }  # fmt: skip
    assert nightseg("doctor").stdout == f"{'ok  ' if is_good else 'FIX '} torch: 2.10\n"


def test_recipe_shows_what_holds(tmp_path: Path) -> None:
    shown = good("recipe", CONFIGS / "demo.yaml", "--set", "training.crop=[64, 64]").stdout
    (tmp_path / "whole.yaml").write_text(shown)
    found, whole = load_recipe(CONFIGS / "demo.yaml", ["training.crop=[64, 64]"]), load_recipe(tmp_path / "whole.yaml")
    for name, model in found.models.items():  # what they have from the recipe is written there
        assert whole.models[name].training == found.training_of(model)
        assert whole.models[name].network == found.network_of(model)
    assert json_of("recipe", CONFIGS / "demo.yaml")["models"]["day_only"]["training"]["batch"] == 8


def test_recipe_lists_all_keys_or_their_schema() -> None:
    assert "\ntraining.epochs (integer >= 1; default 60): number of epochs\n" in good("recipe").stdout
    assert json.loads(good("recipe", "--schema").stdout)["$defs"]["Training"]["properties"]["epochs"]["default"] == 60
    assert "give RECIPE" in refused("recipe", CONFIGS / "demo.yaml", "--schema")
    assert "give RECIPE" in refused("recipe", "--set", "seed=3")
