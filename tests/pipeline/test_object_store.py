"""A whole small run with its data and its run folder in an object store: killed, raced for, continued."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nightseg.data.images import encode_png
from nightseg.data.scenes.street import scene
from nightseg.storage import Location, Workspace
from nightseg.storage.paths import FAULT_VARIABLE
from tests.command_line import json_of
from tests.object_store import ACCESS_KEY, SECRET, ObjectStore

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
name: stored
taxonomy: camvid11
compute:
  train: {workers: 1, cpus_per_worker: 1}
  map: {actors: 0, batch: 4, shard_rows: 4}
datasets:
  day: {layout: scenes, count: 6, size: [32, 64], mix: {day: 1.0}}
  pool: {layout: images, root: POOL, labelled: false}
  day_at_night: {translate: day, by: optics}
  test: {layout: scenes, count: 4, first: 50, size: [32, 64], mix: {night: 1.0}}
translators:
  optics: {kind: photometric}
network: {encoder: resnet18, pyramid_channels: 8, head_channels: 8}
training: {optimizer: adamw, batch: 2, epochs: 1, steps_per_epoch: 2, warmup_steps: 0, crop: [32, 64]}
models:
  first: {train: [day], start: scratch}
  second:
    train: [day, day_at_night]
    start: first
    self_training:
      pool: pool
      select: {method: pooled, count: 5, reference: day_at_night, extractor: efficientnet_lite0}
      threshold: {kind: class_balanced, share: 0.5, confidence: 0.5}
test_sets: {night: test}
predictions: {pool: {dataset: pool, model: second}}
"""
NUM_FRAMES = 8


@pytest.fixture
def recipe(s3: ObjectStore, tmp_path: Path) -> Path:
    pool = s3.place("data/pool")
    for index in range(NUM_FRAMES):
        image = scene(3, index, "day" if index % 4 == 0 else "night", 32, 64).image
        (pool / f"Nacht {index} ü.png").write_bytes(encode_png(image))
    file = tmp_path / "stored.yaml"
    file.write_text(RECIPE.replace("POOL", pool.uri))
    return file


@contextmanager
def driver(words: list[object], log: Path, fault: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own, which ends with the body. `fault`: where it kills itself."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(ROOT), FAULT_VARIABLE: fault}
    with log.open("wb") as out:
        command = [sys.executable, *map(str, words)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def whole(recipe: Path, run: Location | Path) -> list[object]:
    return ["-c", "from nightseg.cli import start; start()", "run", recipe, "--run-dir", run]


def passes(recipe: Path, run: Location | Path) -> list[object]:
    """Stages without a training, in the driver's process: no Ray is started."""
    return ["jobs/score.py", recipe, "--run-dir", run]


def said(log: Path) -> str:
    return log.read_text(errors="replace")[-3000:]


def race(words: list[object], tmp_path: Path) -> None:
    """Two drivers at once: one works, the other names it."""
    logs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    with driver(words, logs[0]) as first, driver(words, logs[1]) as second:
        codes = [process.wait(timeout=900) for process in (first, second)]
    assert sorted(codes) == [0, 2], [said(log) for log in logs]
    winner = (first, second)[codes.index(0)]
    assert f"process {winner.pid} on {os.uname().nodename}" in said(logs[codes.index(2)])


def check_secrets(run: Location, tmp_path: Path) -> None:
    """Neither what lies in the run folder nor what was printed holds the store's credentials."""
    files = [run / entry.name for entry in run.list(recursive=True) if not entry.is_folder]
    texts = [file.read_bytes() for file in files] + [log.read_bytes() for log in tmp_path.glob("*.txt")]
    assert len(texts) > 10
    assert [text for text in texts if SECRET.encode() in text or ACCESS_KEY.encode() in text] == []


def contents(run: Location | Path) -> dict[str, str]:
    return {f"{commit.stage}/{commit.name}": commit.content for commit in Workspace(run).commits()}


@pytest.mark.slow
def test_passes_in_a_store_are_those_on_a_disk(s3: ObjectStore, recipe: Path, tmp_path: Path) -> None:
    """Killed between two shards, continued by one of two drivers at once; what that asks of the store is counted."""
    with driver(passes(recipe, tmp_path / "local"), tmp_path / "local.txt") as local:
        assert local.wait(timeout=300) == 0, said(tmp_path / "local.txt")
    wanted = contents(tmp_path / "local")
    assert {name.partition("/")[0] for name in wanted} >= {"collect", "translate", "score"}

    run = s3.place(f"runs/{secrets.token_hex(4)}")
    with driver(passes(recipe, run), tmp_path / "killed.txt", fault="after:shard-00001") as killed:
        assert killed.wait(timeout=300) == -signal.SIGKILL, said(tmp_path / "killed.txt")
    s3.requests.clear()
    race(passes(recipe, run), tmp_path)
    assert contents(run) == wanted
    assert [commit.verify() for commit in Workspace(run).commits()] == [[]] * len(wanted)
    check_secrets(run, tmp_path)

    # Of the frames of the pool: half of them are looked at again before the run, two are collected again at most, and
    # each is read once to be scored, and kept. A rerun reads none.
    fetched = s3.count(
        lambda method, path: path if method == "GET" and "Nacht" in path and "list-type" not in path else None
    )
    assert sum(fetched.values()) <= 4 * NUM_FRAMES, fetched
    s3.requests.clear()
    with driver(passes(recipe, run), tmp_path / "again.txt") as again:
        assert again.wait(timeout=300) == 0
    assert s3.count()["PUT"] < 20, s3.count()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_in_a_store_is_the_run_on_a_disk(s3: ObjectStore, recipe: Path, tmp_path: Path) -> None:
    """Killed while it trains, continued by one of two drivers at once, of which the other names it."""
    with driver(whole(recipe, tmp_path / "local"), tmp_path / "local.txt") as local:
        assert local.wait(timeout=900) == 0, said(tmp_path / "local.txt")
    wanted = contents(tmp_path / "local")
    assert len(wanted) == 14

    run = s3.place(f"runs/{secrets.token_hex(4)}")
    with driver(whole(recipe, run), tmp_path / "killed.txt") as killed:
        scored = f"{run.uri.removeprefix('s3:/')}/stages/score/"
        while not any(
            (method, path[: len(scored)], path[-15:]) == ("PUT", scored, "_COMMITTED.json")
            for method, path in s3.requests
        ):
            assert killed.poll() is None, said(tmp_path / "killed.txt")
            time.sleep(0.1)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    done = contents(run)
    assert 0 < len(done) < len(wanted)

    race(whole(recipe, run), tmp_path)
    assert contents(run) == wanted
    assert {name: content for name, content in contents(run).items() if name in done} == done
    assert json_of("verify", run)["good"]
    assert len(json_of("status", run)["commits"]) == len(wanted)
    assert json_of("explain", run, "pool/Nacht 1 ü")["frame_id"] == "pool/Nacht 1 ü"
    for name in ("results.json", "report.html", "recipe.yaml", "models/second/model.safetensors"):
        assert (run / name).exists(), name
    check_secrets(run, tmp_path)
