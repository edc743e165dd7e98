"""From a recipe file to results and report by the command line, in a process of its own: real Ray, real stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from nightseg.pipeline.results import read_results
from nightseg.storage import Location

RECIPE = """
name: tiny
taxonomy: camvid11
compute:
  train: {workers: 1, cpus_per_worker: 1}
  map: {actors: 1, cpus_per_actor: 1, batch: 4, shard_rows: 4}
datasets:
  day: {layout: scenes, count: 4, size: [32, 64], mix: {day: 1.0}}
  pool: {layout: images, root: POOL}
  test: {layout: scenes, count: 2, first: 50, size: [32, 64], mix: {night: 1.0}}
max_bad_fraction: 0.5
network: {encoder: resnet18, pyramid_channels: 8, head_channels: 8}
training: {optimizer: adamw, batch: 2, epochs: 1, steps_per_epoch: 1, warmup_steps: 0, crop: [32, 64]}
models:
  first: {train: [day], start: scratch}
  second: {train: [day], start: first, seeds: [0, 1], self_training: {pool: pool, threshold: {kind: none}}}
  taught:
    train: [day]
    start: first
    training: {batch: 2, epochs: 2, steps_per_epoch: 1, warmup_steps: 0, crop: [32, 64], ema_decay: 0.5}
    self_training:
      mode: online
      pool: pool
      select: {method: random, count: 2, extractor: efficientnet_lite0}
      never_below: {sky: [road, pavement]}
      online: {masked: {patch: 8}}
test_sets: {night: test}
consistency: {dataset: pool, count: 2}
predictions: {pool: {dataset: pool, model: second}}
"""


def nightseg(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nightseg.cli.main", *map(str, words)]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)


def json_of(*words: object) -> dict[str, Any]:
    ended = nightseg(*words, "--json")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") == 1
    answer = json.loads(ended.stdout)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_recipe_becomes_results_and_a_report_and_is_not_done_twice(tmp_path: Path) -> None:
    from nightseg.data.images import encode_png
    from nightseg.data.scenes.street import scene

    pool, run = tmp_path / "pool", tmp_path / "run"
    pool.mkdir()
    for index in range(3):
        (pool / f"nächste Nacht {index}.png").write_bytes(encode_png(scene(0, index, "night", 32, 64).image))
    (pool / "empty.png").touch()
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("POOL", str(pool)))

    results = json_of("run", tmp_path / "tiny.yaml", "--run-dir", run)
    assert set(results["models"]) == {"first", "second", "taught"}
    assert 0 <= results["models"]["second"]["tests"]["night"]["miou"] <= 1
    second = results["models"]["second"]
    assert second["trainings"].keys() == {"second", "second.seed1"} and second["steps_in_all"] == 2
    assert second["trainings"]["second.seed1"]["start"] == "first" and second["tests"]["night"]["std"]["miou"] >= 0
    assert results["models"]["first"]["learned"]["day_only"] and not second["learned"]["day_only"]
    assert second["consistency"].keys() == {"confidence", "mirrored", "brightened", "diversity"}
    assert [row["reason"] for row in results["quarantine"]] == ["zero_bytes"]
    assert read_results(Location.of(run)) == results
    assert "taught" not in results["pseudo_labels"]  # a model that teaches itself leaves none
    taught = results["commits"]["train_segmenter/taught"]
    history = json.loads((Path(taught["folder"].removeprefix("file://")) / "history.json").read_text())
    for record in history:
        assert sum(record["teacher"]["shares"].values()) == pytest.approx(1.0)
    (warning, *_) = taught["summary"]["warnings"]
    assert warning == history[0]["teacher"]["warnings"][0] and "frames under night light" in warning
    report = (run / "report.html").read_text()
    assert "second" in report and "http://" not in report.replace("http://www.w3.org", "")

    again = nightseg("run", tmp_path / "tiny.yaml", "--run-dir", run)
    assert again.returncode == 0, again.stderr
    assert f"0 stages done, {len(results['commits'])} already committed" in again.stdout
    assert again.stderr in ("", "nightseg run: at work\n")  # said after a second: nothing was done
    assert "% mIoU on night" in again.stdout and "points over" not in again.stdout

    status = json_of("status", run)
    assert status["holder"] is None and len(status["commits"]) == len(results["commits"])
    plan = json_of("run", tmp_path / "tiny.yaml", "--run-dir", run, "--dry-run", "--set", "training.epochs=2")
    states = {stage["node"]: (stage["state"], stage["changed"]) for stage in plan["stages"]}
    assert states["collect/day"] == ("committed", [])
    assert states["train_segmenter/first"] == ("runs", ["recipe.training.epochs"])
    assert states["train_segmenter/second"][0] == "waits"

    masks = json_of("predict", f"{run}:second.seed1", pool, "--out", tmp_path / "masks")
    assert (masks["written"], masks["quarantined"]) == (3, 1)

    page = Path(json_of("explain", run, "day/000000", "--open")["page"])
    assert files_with(run, str(run)) == []
    whole = report_of(run)
    pool.rename(tmp_path / "mounted elsewhere")  # frames of the user are found where they were, or not at all
    without_pool = report_of(run)
    run.rename(tmp_path / "moved")
    assert report_of(tmp_path / "moved") == without_pool != whole
    assert (tmp_path / "moved" / page.relative_to(run)).exists()


def report_of(run: Path) -> str:
    assert nightseg("report", run).returncode == 0
    return (run / "report.html").read_text()


def files_with(folder: Path, text: str) -> list[str]:
    """Files of a run that hold a text, but for notes of attempts' makers and what only people's tools read."""
    found = []
    for file in sorted(folder.rglob("*")):
        if file.is_dir() or file.is_symlink():
            continue
        data = file.read_bytes()
        if file.suffix == ".parquet":
            data += str(pq.read_table(file).to_pylist()).encode()
        if text.encode() in data:
            found.append(str(file.relative_to(folder)))
    return found
