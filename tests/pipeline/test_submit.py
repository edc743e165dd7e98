"""What of a recipe goes to a cluster, and what is said of the rest before anything does."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

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
    """The last job as it would have been sent, its package read; what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.files: dict[str, bytes] = {}
        self.modes: dict[str, int] = {}
        self.request: Request | None = None
        self.more: dict[str, Any] = {}

    def run_job(self, request: Request, address: str, **more: Any) -> Job:
        with ZipFile(io.BytesIO(request.package)) as package:
            self.files = {name: package.read(name) for name in package.namelist()}
            self.modes = {entry.filename: entry.external_attr >> 16 & 0o777 for entry in package.infolist()}
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
    (tmp_path / "night.py").chmod(0o700)
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
    program = recipe["translators"]["own"]["argv"][1]
    assert sent.files[program] == b"print()" and sent.modes[program] == 0o755
    assert sent.modes[recipe["taxonomy"]] == 0o644
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
    """The code counts: all that is uploaded together stays below what a head takes."""
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    submit(sent)
    code = sum(len(content) for name, content in sent.files.items() if name != "mine.yaml")
    for left, goes in ((7, True), (6, False)):
        sent.said.clear()
        monkeypatch.setattr(module, "MOST_BYTES", code + left)
        submit(sent, "network.encoder_weights=vgg.pth")
        assert (b"weights" in sent.files.values()) is goes
    assert f"network.encoder_weights ({tmp_path / 'vgg.pth'})" in sent.said[0]
    assert sent.recipe()["network"]["encoder_weights"] == str(tmp_path / "vgg.pth")


def test_what_is_uploaded_stays_below_what_a_head_takes() -> None:
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    assert module.MOST_BYTES < DASHBOARD_CLIENT_MAX_SIZE - 5 * 2**20  # the recipe, and what the archive says of files


@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
@pytest.mark.parametrize("key", ["network.encoder_weights", "datasets.day.split_list"])
def test_what_is_no_file_does_not_come_along(sent: Sent, tmp_path: Path, kind: str, key: str) -> None:
    place = Path("/dev/zero") if kind == "device" else tmp_path / kind
    if kind == "pipe":
        os.mkfifo(place)
    with socket.socket(socket.AF_UNIX) as listening:
        if kind == "socket":
            listening.bind("socket")
        with pytest.raises(UserError, match=f"mine.yaml: {key}: {place} is a pipe, socket or device"):
            submit(sent, f"{key}={place}")
    assert sent.request is None


def test_the_same_request_makes_the_same_package_and_another_one_does_not(sent: Sent, tmp_path: Path) -> None:
    (tmp_path / "vgg.pth").write_bytes(b"weights")
    packages = list[bytes]()
    for content, epochs in ((b"weights", 5), (b"weights", 5), (b"weights", 6), (b"Weights", 5)):
        (tmp_path / "vgg.pth").write_bytes(content)
        submit(sent, f"training.epochs={epochs}", "network.encoder_weights=vgg.pth")
        assert sent.request is not None
        packages.append(sent.request.package)
    assert packages[0] == packages[1] and len(set(packages)) == 3


@pytest.mark.parametrize(
    ("given", "work"),
    [
        ("/nfs/runs/mine/", "/nfs/runs/mine"),
        ("/nfs//runs/./mine", "/nfs/runs/mine"),
        ("file:///nfs/runs/mine", "/nfs/runs/mine"),
        ("s3://b/mine/", "s3://b/mine"),
        ("~/runs//./mine/", "~/runs/mine"),
        ("~/../mine", "~/../mine"),
    ],
)
def test_a_run_folder_is_the_same_work_however_it_is_written(sent: Sent, given: str, work: str) -> None:
    assert submit(sent, run_dir=given)[1] == work
    assert sent.request is not None and sent.request.work == work and sent.request.command[-1] == work


def test_nothing_is_left_on_disk(sent: Sent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even while the job is followed, for hours."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    found = list[Path]()

    def run_job(*_: Any, **__: Any) -> Job:
        found.extend(temporary.rglob("*"))
        return Job("mine", "", "SUCCEEDED", 0)

    monkeypatch.setattr(module, "run_job", run_job)
    submit(sent)
    assert not found


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
