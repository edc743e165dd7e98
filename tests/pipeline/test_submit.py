"""What of a recipe goes to a cluster, and what is said of the rest before anything does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nightseg.cli.jobs import words_of_job
from nightseg.cluster.submit import Job, Request
from nightseg.errors import UserError
from nightseg.pipeline import submit as module
from nightseg.recipe import load_recipe

PROJECT = Path(__file__).parents[2]
RECIPE = """
name: mine
base: ../base.yaml
models: {day_only: {train: [day], start: scratch}}
"""
BASE = """
name: base
datasets: {day: {layout: pairs, root: "{frames}/day"}}
roots: {frames: /only/on/the/cluster}
training: {epochs: 3}
"""


class Sent:
    """The last job as it would have been sent, its folder read; what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.files: dict[str, bytes] = {}
        self.request: Request | None = None
        self.more: dict[str, Any] = {}

    def run_job(self, request: Request, address: str, **more: Any) -> Job:
        folder = request.folder
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        self.request, self.more = request, more | {"address": address}
        return Job("mine", address, "SUCCEEDED", 0)

    def recipe(self, name: str = "mine.yaml") -> Any:
        return yaml.safe_load(self.files[name])


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sent:
    made = Sent()
    monkeypatch.setattr(module, "run_job", made.run_job)
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "of").mkdir()
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "of/mine.yaml").write_text(RECIPE)
    return made


def submit(sent: Sent, *overrides: str, file: str = "of/mine.yaml", **more: Any) -> tuple[Job, str]:
    write: Callable[[str], None] = sent.said.append
    more = {"run_dir": "s3://b/mine"} | more
    return module.submit(file, overrides, words=words_of_job, say=sent.said.append, write=write, **more)


def test_code_jobs_and_one_recipe_go_and_nothing_else(sent: Sent, tmp_path: Path) -> None:
    for name in (".git/config", "data/a.png", "runs/x", ".venv/python", "secrets.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    submit(sent, "training.epochs=5")
    assert {name.split("/")[0] for name in sent.files} == {"nightseg", "jobs", "mine.yaml"}
    assert not [name for name in sent.files if "__pycache__" in name]
    real = {str(path.relative_to(PROJECT)) for path in (PROJECT / "nightseg").rglob("*.py")}
    assert real <= sent.files.keys()
    (tmp_path / "there.yaml").write_bytes(sent.files["mine.yaml"])
    there = load_recipe(tmp_path / "there.yaml", elsewhere=True)
    assert there == load_recipe("of/mine.yaml", ["training.epochs=5"], elsewhere=True) and there.training.epochs == 5
    assert sent.request is not None
    assert sent.request.command == ["python", "jobs/self_train.py", "mine.yaml", "--run-dir", "s3://b/mine"]
    assert (sent.request.name, sent.request.work) == ("mine", "s3://b/mine")
    assert sent.said == []


def test_a_stage_and_a_model_can_be_asked_for(sent: Sent) -> None:
    submit(sent, until="score", only="day_only", address="http://head:8265", wait=False, max_tries=3)
    assert sent.request is not None
    words = ["python", "jobs/score.py", "mine.yaml", "--run-dir", "s3://b/mine", "--only", "day_only"]
    assert sent.request.command == words
    assert {key: sent.more[key] for key in ("address", "wait", "max_tries")} == {
        "address": "http://head:8265", "wait": False, "max_tries": 3,
    }  # fmt: skip


def test_a_run_without_a_place_lies_on_the_head_and_that_is_said(sent: Sent) -> None:
    assert submit(sent, run_dir=None)[1] == "~/nightseg-runs/mine"
    assert "on the head node, in ~/nightseg-runs/mine" in sent.said[0]
    assert sent.request is not None and "--run-dir" not in sent.request.command


def test_files_that_a_recipe_names_come_along(sent: Sent, tmp_path: Path) -> None:
    classes = (PROJECT / "nightseg/data/taxonomies/camvid11.yaml").read_bytes()
    (tmp_path / "classes.yaml").write_bytes(classes)
    (tmp_path / "frames.txt").write_text("a\nb\n")
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    (tmp_path / "night.py").write_text("print()")
    submit(
        sent,
        "taxonomy=classes.yaml",
        f"datasets.day.split_list={tmp_path / 'frames.txt'}",
        "network.encoder_weights=vgg.pth",
        "translators.own={kind: command, argv: [python, night.py, '{input}', '{output}']}",
    )
    recipe = sent.recipe()
    assert sent.files[recipe["taxonomy"]] == classes
    assert sent.files[recipe["network"]["encoder_weights"]] == b"weights"
    assert sent.files[recipe["translators"]["own"]["argv"][1]] == b"print()"
    listed = recipe["datasets"]["day"]["split_list"]  # a relative one would be looked for below root
    assert listed.startswith("/proc/self/cwd/") and sent.files[listed.removeprefix("/proc/self/cwd/")] == b"a\nb\n"
    (told,) = sent.said
    assert told.startswith("goes along: ")
    names = ("classes.yaml", "vgg.pth", "night.py", "frames.txt")
    assert set(told.removeprefix("goes along: ").split(", ")) == {str(tmp_path / name) for name in names}


def test_folders_of_this_machine_are_named_before_anything_goes(sent: Sent, tmp_path: Path) -> None:
    for name in ("frames/day", "models/start"):
        (tmp_path / name).mkdir(parents=True)
    submit(sent, "roots.frames=frames", "models.day_only.start=models/start")
    (told,) = sent.said
    assert f"roots.frames ({tmp_path / 'frames'})" in told and "models.day_only.start" in told
    assert sent.recipe()["roots"]["frames"] == str(tmp_path / "frames")
    assert not [name for name in sent.files if name.startswith("frames")]


def test_files_too_large_to_go_are_named(sent: Sent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 3)
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    submit(sent, "network.encoder_weights=vgg.pth")
    assert f"network.encoder_weights ({tmp_path / 'vgg.pth'})" in sent.said[0]
    assert sent.recipe()["network"]["encoder_weights"] == str(tmp_path / "vgg.pth")


@pytest.mark.parametrize(
    ("overrides", "more", "words"),
    [
        (("roots.frames=data/dya",), {}, "roots.frames: there is no 'data/dya' here"),
        (("models.day_only.start=models/x",), {}, "models.day_only.start: there is no 'models/x' here"),
        (("models.day_only.train=[dya]",), {}, "did you mean 'day'"),
        (("training.epoch=3",), {}, "unknown key"),
        ((), {"only": "day_onli"}, "did you mean 'day_only'"),
        ((), {"until": "scor"}, "did you mean 'score'"),
        ((), {"until": "search"}, "no job for the stage 'search'"),
        ((), {"run_dir": "runs/mine"}, "would vanish with the job"),
        ((), {"address": "10.0.0.1:6379"}, "not the address of a dashboard"),
        ((), {"file": "of/yours.yaml"}, "there is no such recipe file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_goes(
    sent: Sent, overrides: tuple[str, ...], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        submit(sent, *overrides, **more)
    assert sent.request is None


def test_a_search_goes_with_its_recipe(sent: Sent, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(
        "{name: found, recipe: of/mine.yaml, set: [training.epochs=7], model: day_only, "
        "space: {loss.gamma: {choice: [1, 2]}}}"
    )
    submit(sent, "trials=2", file="search.yaml")
    assert sent.request is not None and sent.request.command[:3] == ["python", "jobs/search.py", "found.yaml"]
    search = sent.recipe("found.yaml")
    assert (search["trials"], search["set"]) == (2, [])
    assert sent.recipe(search["recipe"])["training"]["epochs"] == 7
    with pytest.raises(UserError, match="a search has one model"):
        submit(sent, file="search.yaml", only="day_only")


def test_what_goes_runs_by_itself_where_it_is_unpacked(sent: Sent, tmp_path: Path) -> None:
    """As Ray does it: the command in the folder, which comes first in PYTHONPATH. Scenes need no Ray."""
    shutil.copyfile(PROJECT / "nightseg/data/taxonomies/camvid11.yaml", tmp_path / "own.yaml")
    (tmp_path / "scenes.yaml").write_text(
        "{name: scenes, taxonomy: own.yaml, compute: {map: {actors: 0}}, datasets: {"
        "pool: {layout: scenes, count: 4, size: [32, 64], mix: {day: 0.5, night: 0.5}, labelled: false}, "
        "night: {split: pool, keep: night}}}"
    )
    submit(sent, file="scenes.yaml", until="split", run_dir=str(tmp_path / "run"))
    there = tmp_path / "there"
    for name, content in sent.files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(content)
    assert sent.request is not None
    words = [sys.executable, *sent.request.command[1:]]
    environment = {**os.environ, "PYTHONPATH": str(there)}
    ended = subprocess.run(words, cwd=there, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == f"{tmp_path / 'run'}: 2 stages done, 0 already committed\n"
