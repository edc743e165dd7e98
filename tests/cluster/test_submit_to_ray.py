"""`nightseg submit` to a cluster that asks for a token, from another folder: to the report, again, and refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

PROJECT = Path(__file__).parents[2]
TOKEN = "4" * 64
RECIPE = """
base: below/base.yaml
name: tiny
taxonomy: classes.yaml
models:
  day_only: {train: [day], start: scratch}
test_sets: {night: test}
"""
BASE = """
name: base
compute: {train: {workers: 1, cpus_per_worker: 1}, map: {actors: 0}}
datasets:
  day: {layout: scenes, count: 4, size: [32, 64], mix: {day: 1.0}}
  test: {layout: scenes, count: 2, first: 50, size: [32, 64], mix: {night: 1.0}}
network: {encoder: resnet18, pyramid_channels: 8, head_channels: 8}
training: {optimizer: adamw, batch: 2, epochs: 1, steps_per_epoch: 1, warmup_steps: 0, crop: [32, 64]}
"""


SEARCH = """
name: tiny_search
recipe: tiny.yaml
model: day_only
set: ["datasets.val={layout: scenes, count: 2, first: 90, size: [32, 64]}", "models.day_only.validate_on=[val]"]
space: {training.learning_rate: {log_uniform: [1.0e-4, 1.0e-3]}}
trials: 2
"""


class Head(NamedTuple):
    """A head node: where jobs are submitted, and the folder of its user."""

    address: str
    home: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def outside(home: Path) -> dict[str, str]:
    """The environment of a shell that knows no Ray and no source tree."""
    left_out = ("RAY_", "NIGHTSEG_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return kept | {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """A Ray of its own; it is ended by its process, as `ray stop` would end all of this machine."""
    home, sessions = tmp_path_factory.mktemp("home"), tempfile.mkdtemp(prefix="ns", dir="/tmp")
    ports = [free_port() for _ in range(5)]
    words = [
        "start", "--head", "--block", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--num-cpus=1",
        f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}",
        f"--ray-client-server-port={ports[3]}", f"--metrics-export-port={ports[4]}", f"--temp-dir={sessions}",
        f"--object-store-memory={100 * 2**20}", "--disable-usage-stats",
    ]  # fmt: skip
    environment = outside(home) | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with (home / "ray.log").open("w") as log:
        ray = Path(sys.executable).with_name("ray")
        running = subprocess.Popen([ray, *words], env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(f"http://127.0.0.1:{ports[1]}/api/version", running, home / "ray.log")
        yield Head(f"http://127.0.0.1:{ports[1]}", home)
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(60)
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
            shutil.rmtree(sessions, ignore_errors=True)


def wait_for(url: str, running: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(240):
        assert running.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"}), timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text())


COMMAND = ("-m", "nightseg.cli.main")


def submit(
    head: Head, cwd: Path, *words: object, token: str | None = TOKEN, program: Sequence[str] = COMMAND
) -> subprocess.CompletedProcess[str]:
    laptop = cwd / "home"
    laptop.mkdir(exist_ok=True)
    environment = outside(laptop) | ({"RAY_AUTH_TOKEN": token} if token else {}) | {"PYTHONPATH": str(PROJECT)}
    command = [sys.executable, *program, "submit", *map(str, words), "--address", head.address]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


def write_recipe(folder: Path) -> None:
    """tiny.yaml, and what it reads beside and below it."""
    (folder / "below").mkdir()
    (folder / "below/base.yaml").write_text(BASE)
    shutil.copyfile(PROJECT / "nightseg/data/taxonomies/camvid11.yaml", folder / "classes.yaml")
    (folder / "tiny.yaml").write_text(RECIPE)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_recipe_is_submitted_to_its_report_and_not_done_twice(head: Head, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    run = tmp_path / "shared/run"

    scored = submit(head, tmp_path, "tiny.yaml", "--run-dir", run, "--until", "train_segmenter", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["id"] == "tiny" and not (run / "results.json").exists()

    first = submit(head, tmp_path, "tiny.yaml", "--run-dir", run, "--json")
    assert first.returncode == 0, first.stderr
    job = json.loads(first.stdout)
    assert (job["id"], job["status"], job["run_dir"]) == ("tiny-2", "SUCCEEDED", str(run))
    assert f"{run}: 2 stages done, 2 already committed" in first.stderr
    assert json.loads((run / "results.json").read_text())["models"].keys() == {"day_only"}
    assert (run / "report.html").exists()

    again = submit(head, tmp_path, "tiny.yaml", "--run-dir", run)
    assert again.returncode == 0, again.stderr
    assert "0 stages done, 4 already committed" in again.stderr
    assert again.stdout == f"job tiny-3: SUCCEEDED; its run: {run}\n"

    wrong = submit(head, tmp_path, "tiny.yaml", "--run-dir", run, "--set", "datasets.day={layout: pairs, root: /gone}")
    assert wrong.returncode == 2 and "there is no folder '/gone'" in wrong.stderr, wrong.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_is_submitted_and_continued_for_more_trials(head: Head, tmp_path: Path) -> None:
    write_recipe(tmp_path)
    (tmp_path / "search.yaml").write_text(SEARCH)
    folder = tmp_path / "shared/search"
    trials: list[set[str]] = []
    for words in ([], ["--set", "trials=3"]):
        done = submit(head, tmp_path, "search.yaml", "--run-dir", folder, *words)
        assert done.returncode == 0, done.stderr
        rows = json.loads((folder / "trials.json").read_text())["trials"]
        assert all(row["end"] in ("done", "stopped") for row in rows)
        trials.append({row["trial"] for row in rows})
        assert f"best of {len(rows)}: learning_rate=" in done.stderr and f"page: {folder}/search.html" in done.stderr
    assert len(trials[0]) == 2 and len(trials[1]) == 3 and trials[0] < trials[1]
    assert "learning_rate: " in (folder / "best.yaml").read_text()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_driver_that_is_killed_is_submitted_again_and_goes_on(head: Head, tmp_path: Path) -> None:
    (tmp_path / "killed.yaml").write_text(
        f"{BASE}taxonomy: camvid11\nmodels: {{m: {{train: [day], start: scratch}}}}\ntest_sets: {{night: test}}\n"
    )
    run = tmp_path / "shared/run"
    killed = threading.Event()

    def kill_once() -> None:
        while not killed.is_set():
            if any(run.rglob("_COMMITTED.json")):
                for place in Path("/proc").glob("[0-9]*"):
                    with suppress(OSError):
                        words = (place / "cmdline").read_bytes().split(b"\0")
                        if b"jobs/self_train.py" in words and str(run).encode() in words:
                            os.kill(int(place.name), signal.SIGKILL)
                            killed.set()
            time.sleep(0.05)

    killer = threading.Thread(target=kill_once, daemon=True)
    killer.start()
    try:
        done = submit(head, tmp_path, "killed.yaml", "--run-dir", run, "--max-tries", 2, "--json")
    finally:
        killed.set()
        killer.join()
    assert done.returncode == 0, done.stderr
    job = json.loads(done.stdout)
    assert (job["id"], job["status"]) == ("base-2", "SUCCEEDED") and "try 2 of 2 goes on" in done.stderr
    assert "0 already committed" not in done.stderr and (run / "report.html").exists()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_head_takes_all_that_goes_along_and_more_is_refused_with_a_cure(head: Head, tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_text(f"{BASE}taxonomy: camvid11\n")
    night = "datasets.night={split: test, keep: night}"
    set_words = ("--set", night, "--set", "network.encoder_weights=large.pth")
    words = ("large.yaml", *set_words, "--until", "split", "--run-dir", tmp_path / "run")
    large = tmp_path / "large.pth"
    large.write_bytes(os.urandom(84 * 2**20))
    done = submit(head, tmp_path, *words)
    assert "goes along: " in done.stderr and f"{large}" in done.stderr and done.returncode == 0, done.stderr
    assert "excludes" not in done.stderr and not list(tmp_path.glob("home/**/job.zip"))

    large.write_bytes(os.urandom(105 * 10**6))
    without_limit = (
        "from nightseg.pipeline import submit; submit.MOST_BYTES = 2**40; import nightseg.cli.main as m; m.main()"
    )
    done = submit(head, tmp_path, *words, program=("-c", without_limit))
    assert done.returncode == 2 and "MiB that go along with the job are more than the cluster" in done.stderr, (
        done.stderr
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(("token", "words"), [(None, "it wants its token"), ("5" * 64, "another than the one here")])
def test_nobody_comes_in_without_the_token(head: Head, tmp_path: Path, token: str | None, words: str) -> None:
    (tmp_path / "tiny.yaml").write_text(BASE)
    refused = submit(head, tmp_path, "tiny.yaml", token=token)
    assert refused.returncode == 2 and words in refused.stderr and "RAY_AUTH_TOKEN" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr and TOKEN not in refused.stderr and refused.stdout == ""
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{head.address}/api/jobs/", timeout=5)
