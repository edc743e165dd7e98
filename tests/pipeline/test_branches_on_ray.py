"""Two branches of a recipe at once, on two CPUs: real trainings and passes, with the content they have one by one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nightseg.pipeline import execute
from nightseg.pipeline import run as runner
from nightseg.progress import SilentProgress, Task
from nightseg.recipe import load_recipe
from nightseg.storage import Location
from tests.programs import started

RECIPE = """
name: two
taxonomy: camvid11
compute:
  concurrent: null
  map: {actors: 1, batch: 4, shard_rows: 4}
datasets:
  day: {layout: scenes, count: 4, size: [32, 64], mix: {day: 1.0}}
  pool: {layout: scenes, count: 4, first: 20, labelled: false, size: [32, 64], mix: {night: 1.0}}
network: {encoder: resnet18, pyramid_channels: 8, head_channels: 8}
training: {optimizer: adamw, batch: 2, epochs: 2, steps_per_epoch: 2, warmup_steps: 0, crop: [32, 64]}
models:
  left: {train: [day], start: scratch}
  right: {train: [day], start: scratch, loss: {kind: focal}}
  taught:
    train: [day]
    start: left
    self_training:
      pool: pool
      select: {method: random, count: 2, extractor: efficientnet_lite0}
      threshold: {kind: none}
"""


class Display(SilentProgress):
    """Which tasks were open at the same time."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.met: set[frozenset[str]] = set()
        self.said: list[str] = []
        self.lock = threading.Lock()

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Task]:
        with self.lock:
            self.met |= {frozenset((title, other)) for other in self.open}
            self.open.add(title)
        try:
            yield self
        finally:
            with self.lock:
                self.open.discard(title)

    def say(self, message: str) -> None:
        self.said.append(message)


def contents(outcome: runner.Outcome) -> dict[str, tuple[str, str]]:
    return {node: (facts["key"], facts["content"]) for node, facts in outcome.results["commits"].items()}


def files(run: Path) -> list[str]:
    """What lies in a run folder, but for curves, whose names have the time in them."""
    found = (path.relative_to(run) for path in run.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if "tfevents" not in path.name)


@pytest.fixture(autouse=True)
def memory_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine that runs tests may have little left: these networks need little."""
    monkeypatch.setattr(execute, "PROCESS_BYTES", 0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_branches_at_once_end_with_the_same_content_as_one_after_the_other(
    ray_cluster: None, tmp_path: Path
) -> None:
    (tmp_path / "two.yaml").write_text(RECIPE)

    def run(*overrides: str, display: Display) -> runner.Outcome:
        recipe = load_recipe(tmp_path / "two.yaml", overrides)
        return runner.run(recipe, Location.of(tmp_path / "run"), progress=display)

    alone = run("compute.concurrent=1", display=(display := Display()))
    assert display.met == set()
    (tmp_path / "run").rename(tmp_path / "alone")  # chosen frames of a run folder have their place there in the content
    both = run(display=(display := Display()))
    assert frozenset(("train left", "train right")) in display.met
    assert contents(both) == contents(alone) and len(contents(both)) == 9
    assert files(tmp_path / "run") == files(tmp_path / "alone")
    left_out: Any = {"commits", "seconds", "sha256", "recipe_sha256"}
    for name, value in alone.results.items():
        assert name in left_out or both.results[name] == value, name

    again = run(display=(display := Display()))
    assert (again.done, again.skipped, display.said) == (0, 9, [])
    other = run("models.taught.loss={kind: focal}", display=(display := Display()))
    assert [line.partition("] ")[2].partition(";")[0] for line in display.said if line.startswith("[")] == [
        "train_segmenter/taught"
    ]  # fmt: skip
    assert (other.done, other.skipped) == (1, 8)


def alive(mark: str) -> list[str]:
    """Command lines of all processes that have the mark in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("times", [1, 2])
def test_control_c_stops_all_branches_and_leaves_nothing_but_what_is_committed(tmp_path: Path, times: int) -> None:
    (tmp_path / "two.yaml").write_text(RECIPE)
    mark = f"NIGHTSEG_TEST={tmp_path}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"NIGHTSEG_TEST": str(tmp_path), "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    program = (
        "from nightseg.pipeline import execute; execute.PROCESS_BYTES = 0\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have it ignored
        "from nightseg.cli.main import main; main()"
    )
    words = [sys.executable, "-c", program, "run", str(tmp_path / "two.yaml"), "--run-dir", str(tmp_path / "r")]
    endless = ["--set", "training.epochs=100000"]
    with started([*words, *endless], env=environment, stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stderr is not None
        said, begun = "", set[str]()
        while len(begun) < 2:  # both are at their first steps
            line = driver.stderr.readline()
            assert line, said
            said += line
            begun |= {name for name in ("left", "right") if re.match(rf"\[train {name}\] [1-9]", line)}
        began = time.monotonic()
        for _ in range(times):
            driver.send_signal(signal.SIGINT)
            time.sleep(1.0)
        rest = driver.stderr.read()
        assert driver.wait(timeout=60) == 1
    assert time.monotonic() - began < 30, rest
    assert "Traceback" not in rest and rest.count("nightseg: stopped; the same command continues") == 1, rest
    deadline = time.monotonic() + 20
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive(mark)
    committed = sorted(path.parent.name for path in (tmp_path / "r/stages").rglob("_COMMITTED.json"))
    assert len(committed) == 2, "the frames were collected"
    assert not list((tmp_path / "r").glob(".nightseg-holder.json"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_branch_fails_while_the_other_trains(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(RECIPE)
    asked = ["models.right.training.learning_rate=1.0e+30", "models.right.training.epochs=50"]
    recipe = load_recipe(tmp_path / "two.yaml", asked)
    outcome = runner.run(recipe, Location.of(tmp_path / "run"), progress=Display())
    assert set(outcome.results["models"]) == {"left", "taught"}
    (failed,) = outcome.results["failed"]
    assert failed["stage"] == "train_segmenter/right" and "gradient norm" in failed["error"]
    assert failed["models"] == ["right"]
