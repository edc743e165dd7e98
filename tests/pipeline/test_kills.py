"""A whole small run, killed again and again at random moments: driver, a worker, or all of its processes at once.

What it leaves in the end is what an undisturbed run leaves: the same committed content, the same metrics, each frame
once, and no process, lock or temporary file.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nightseg.data.images import encode_png
from nightseg.data.scenes.street import scene
from nightseg.storage import Workspace
from nightseg.storage.lock import HOLDER_NAME
from nightseg.storage.paths import TEMPORARY_PREFIX

NUM_KILLS = int(os.environ.get("NIGHTSEG_KILLS", "6"))
SEED = int(os.environ.get("NIGHTSEG_KILLS_SEED", "0"))
MARK = "NIGHTSEG_TEST_MARK"  # a variable that all processes of a run inherit
SECONDS_TO_DIE = 90.0  # for what outlives its driver: Ray's agents try for 60 s to tell a GCS that is dead, too

PASSES = """
name: killed
taxonomy: camvid11
compute:
  train: {workers: 1, cpus_per_worker: 1}
  map: {actors: 0, batch: 4, shard_rows: 3}
datasets:
  day: {layout: scenes, count: 7, size: [32, 64], mix: {day: 1.0}}
  pool: {layout: images, root: POOL}
  pool_night: {split: pool, keep: night}
  day_at_night: {translate: day, by: optics}
  day_as_day: {translate: day_at_night, by: colours, to: day}
  test: {layout: scenes, count: 4, first: 50, size: [32, 64], mix: {night: 1.0}}
translators:
  optics: {kind: photometric}
  colours: {kind: colour, day: day, night: pool_night}
max_bad_fraction: 0.5
"""
WHOLE = f"""{PASSES}
network: {{encoder: resnet18, pyramid_channels: 8, head_channels: 8}}
training: {{optimizer: adamw, batch: 2, epochs: 3, steps_per_epoch: 2, warmup_steps: 0, crop: [32, 64]}}
models:
  first: {{train: [day], start: scratch}}
  second:
    train: [day, day_at_night]
    start: first
    self_training:
      pool: pool_night
      select: {{method: pooled, count: 5, reference: day_at_night, extractor: efficientnet_lite0}}
      threshold: {{kind: class_balanced, share: 0.5, confidence: 0.5}}
test_sets: {{night: test}}
predictions: {{pool: {{dataset: pool, model: second}}}}
"""


class Place(NamedTuple):
    """A recipe, and a temporary folder of its own with a short name: sockets of Ray lie there."""

    recipe: Path
    temporary: Path
    mark: str

    def command(self, run: Path) -> list[str]:
        return [sys.executable, "-m", "nightseg.cli.main", "run", str(self.recipe), "--run-dir", str(run)]

    def start(self, run: Path) -> subprocess.Popen[bytes]:
        command = self.command(run)
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {MARK: self.mark, "TMPDIR": str(self.temporary)}
        with (self.recipe.parent / "log.txt").open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def finish(self, run: Path) -> None:
        assert self.start(run).wait(timeout=900) == 0, (self.recipe.parent / "log.txt").read_text()[-3000:]

    def processes(self) -> dict[int, str]:
        """Those that belong to its runs and have not ended: pid -> command."""
        found = {}
        for entry in os.listdir("/proc"):
            with suppress(OSError, ValueError):
                place = Path("/proc") / entry
                alive = place.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
                if int(entry) != os.getpid() and alive and self.mark in place.joinpath("environ").read_text():
                    found[int(entry)] = place.joinpath("cmdline").read_text().replace("\0", " ").strip()
        return found


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    pool = tmp_path / "pool"
    pool.mkdir()
    for index in range(10):
        image = scene(3, index, "day" if index % 4 == 0 else "night", 32, 64).image
        (pool / f"Nacht {index}.png").write_bytes(encode_png(image))
    (pool / "empty.png").touch()
    (tmp_path / "killed.yaml").write_text(request.param.replace("POOL", str(pool)))
    temporary = Path(tempfile.mkdtemp(prefix="nk-", dir="/tmp"))
    found = Place(tmp_path / "killed.yaml", temporary, uuid.uuid4().hex)
    yield found
    for pid in found.processes():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    shutil.rmtree(temporary, ignore_errors=True)


def content_of(run: Path) -> dict[str, str]:
    return {f"{commit.stage}/{commit.name}": commit.content for commit in Workspace(run).commits()}


def metrics_of(run: Path) -> dict[str, Any]:
    results = json.loads((run / "results.json").read_text())
    return {model: facts["tests"] for model, facts in results["models"].items()} | {"frames": results["frames"]}


def ids(run: Path) -> dict[str, list[str]]:
    """Stage -> frames of its main table and of its quarantine."""
    found = {}
    for commit in Workspace(run).commits():
        tables = [name for name in ("frames", "predictions", "histograms", "features") if commit.has_table(name)]
        rows = [commit.table(name) for name in (*tables[:1], "quarantine") if commit.has_table(name)]
        known = [part["frame_id"].to_pylist() for part in rows if "frame_id" in part.column_names]
        found[f"{commit.stage}/{commit.name}"] = [name for names in known for name in names]
    return found


def kill(place: Place, driver: subprocess.Popen[bytes], whom: str, chance: random.Random) -> str:
    """Returns the command of what was killed, if it was there to be killed."""
    found = place.processes()
    workers = [pid for pid, command in found.items() if command.startswith("ray::")]
    one = [chance.choice(sorted(workers))] if workers else []
    victims = {"driver": [driver.pid], "worker": one, "group": [*found]}
    for pid in victims[whom]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return ", ".join(found.get(pid, "")[:40] for pid in victims[whom][:1])


def wait_for_the_dead(place: Place) -> float:
    began = time.monotonic()
    while left := place.processes():
        assert time.monotonic() - began < SECONDS_TO_DIE, f"they outlive their driver: {left}"
        time.sleep(0.1)
    return time.monotonic() - began


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "place", [PASSES, pytest.param(WHOLE, marks=pytest.mark.ray)], ids=["passes", "whole"], indirect=True
)
def test_a_run_that_is_killed_at_random_ends_as_an_undisturbed_one(place: Place, tmp_path: Path) -> None:
    chance = random.Random(SEED)
    began = time.monotonic()
    place.finish(tmp_path / "undisturbed")
    whole = time.monotonic() - began
    wait_for_the_dead(place)
    run, kills, told = tmp_path / "run", 0, list[str]()
    while kills < NUM_KILLS:
        driver = place.start(run)
        whom = ("driver", "worker", "group")[kills % 3]
        # Most of the time is spent on imports, which write nothing: one kill of four may fall there.
        while driver.poll() is None and not (run / HOLDER_NAME).exists() and kills % 4:
            time.sleep(0.05)
        with suppress(subprocess.TimeoutExpired):
            driver.wait(timeout=chance.uniform(0.0, 0.3 * whole))
        if driver.poll() == 0:  # it was faster: all of it begins anew
            assert content_of(run) == content_of(tmp_path / "undisturbed")
            shutil.rmtree(run)
            continue
        killed = kill(place, driver, whom, chance)
        kills += 1
        if whom == "worker" and killed:  # another takes its place; then the driver goes, too
            with suppress(subprocess.TimeoutExpired):
                driver.wait(timeout=whole / 4)
        if driver.poll() is None:
            driver.kill()
        driver.wait()
        outlived = wait_for_the_dead(place) if chance.random() < 0.7 else -1.0  # or the next one starts at once
        told.append(f"{whom} ({killed}): {len(content_of(run))} commits, all ended after {outlived:.1f} s")
    place.finish(run)
    outlived = wait_for_the_dead(place)
    print("\n".join([f"undisturbed: {whole:.0f} s", *told, f"at the end: {outlived:.1f} s"]))
    files = [file.relative_to(place.temporary) for file in place.temporary.glob("*/*")]
    left = sorted(
        str(file) for file in files if file.parts[0] != "ray"
    )  # logs of its sessions, which Ray never removes
    print("left in the temporary folder:", sorted(file.name for file in place.temporary.iterdir()), left)
    temporary = [file for file in run.rglob("*") if TEMPORARY_PREFIX in file.name]
    print("temporary files in the run:", temporary)
    assert content_of(run) == content_of(tmp_path / "undisturbed")
    assert metrics_of(run) == metrics_of(tmp_path / "undisturbed")
    for stage, names in ids(run).items():
        assert len(names) == len(set(names)), f"{stage}: frames are doubled"
    assert ids(run) == ids(tmp_path / "undisturbed")
    assert temporary == []
    assert not (run / HOLDER_NAME).exists()
    assert left == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("place", [PASSES], ids=["passes"], indirect=True)
@pytest.mark.parametrize("most_bytes", [2000, 4600, 5000])
def test_a_disk_without_room_is_told_and_the_run_goes_on_later(place: Place, tmp_path: Path, most_bytes: int) -> None:
    """A limit on the size of files, which nobody needs to be root for, stands for a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    run = tmp_path / "run"
    ended = subprocess.run(place.command(run), preexec_fn=limit, capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert f"cannot write {run}/" in ended.stderr and "raise it (ulimit -f), then run it again" in ended.stderr
    assert all(commit.verify() == [] for commit in Workspace(run).commits())
    assert [file for file in run.rglob("*") if TEMPORARY_PREFIX in file.name] == []
    place.finish(run)
    shutil.move(run, tmp_path / "moved")
    place.finish(tmp_path / "moved")
    place.finish(tmp_path / "undisturbed")
    assert content_of(tmp_path / "moved") == content_of(tmp_path / "undisturbed")
