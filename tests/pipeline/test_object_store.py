"""A whole small run with its data and its run folder in an object store: killed, raced for, continued."""

from __future__ import annotations

import os
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
from tests.command_line import json_of
from tests.object_store import SECRET, ObjectStore

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
def driver(recipe: Path, run: Location | Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    code = "from nightseg.cli import start; start()"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("wb") as out:
        words = [sys.executable, "-c", code, "run", str(recipe), "--run-dir", str(run)]
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def contents(run: Location | Path) -> dict[str, str]:
    return {f"{commit.stage}/{commit.name}": commit.content for commit in Workspace(run).commits()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_in_a_store_is_the_run_on_a_disk(s3: ObjectStore, recipe: Path, tmp_path: Path) -> None:
    """Killed while it trains, continued by one of two drivers at once, of which the other names it."""
    with driver(recipe, tmp_path / "local", tmp_path / "local.txt") as local:
        assert local.wait(timeout=600) == 0, (tmp_path / "local.txt").read_text()[-3000:]
    wanted = contents(tmp_path / "local")
    assert len(wanted) == 14

    run = s3.place("runs/stored")
    s3.requests.clear()
    with driver(recipe, run, tmp_path / "killed.txt") as killed:
        while not any("score/" in path and "_COMMITTED" in path for _, path in s3.requests):
            assert killed.poll() is None, (tmp_path / "killed.txt").read_text()[-3000:]
            time.sleep(0.1)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
    done = contents(run)
    assert 0 < len(done) < len(wanted)

    logs = [tmp_path / "a.txt", tmp_path / "b.txt"]
    with driver(recipe, run, logs[0]) as first, driver(recipe, run, logs[1]) as second:
        codes = [process.wait(timeout=600) for process in (first, second)]
    assert sorted(codes) == [0, 2], [log.read_text()[-2000:] for log in logs]
    winner = (first, second)[codes.index(0)]
    assert f"process {winner.pid} on {os.uname().nodename}" in logs[codes.index(2)].read_text()

    assert contents(run) == wanted
    assert {name: content for name, content in contents(run).items() if name in done} == done
    assert json_of("verify", run)["good"]
    assert len(json_of("status", run)["commits"]) == len(wanted)
    assert json_of("explain", run, "pool/Nacht 1 ü")["frame_id"] == "pool/Nacht 1 ü"
    for name in ("results.json", "report.html", "recipe.yaml", "models/second/model.safetensors"):
        assert (run / name).exists(), name

    # What is asked for a frame of the pool: by the check before the run (twice), the collection (perhaps twice, as it
    # was killed), the report (twice), and once by whatever reads it first, which keeps it on this machine.
    fetched = s3.count(lambda method, path: path if method == "GET" and "data/pool/" in path else None)
    assert len([path for path in fetched if "Nacht" in path]) == NUM_FRAMES
    print("requests", s3.count(), "of a frame of the pool", sorted(fetched.values()))
    assert sum(count for path, count in fetched.items() if "Nacht" in path) <= 9 * NUM_FRAMES

    written = [entry.name for entry in run.list(recursive=True) if not entry.is_folder]
    for text in ((run / name).read_bytes() for name in written if name.endswith((".json", ".yaml", ".html", ".md"))):
        assert SECRET.encode() not in text and b"AKIATEST" not in text
    for log in tmp_path.glob("*.txt"):
        assert SECRET not in log.read_text() and "AKIATEST" not in log.read_text()
