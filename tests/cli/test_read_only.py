"""A finished run that may only be read, by children for whom the modes of files hold, also where we are root."""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import nightseg

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # linux/prctl.h, linux/capability.h
SOURCES = Path(nightseg.__file__).parents[1]
RECIPE = """
name: r
taxonomy: camvid11
compute: {map: {actors: 0}}
datasets: {day: {layout: scenes, count: 2, size: [32, 64]}}
"""


@pytest.fixture
def run() -> Iterator[Path]:
    """A run folder in which the child may not write, beside a folder `mine` in which it may."""
    place = Path(tempfile.mkdtemp(prefix="nightseg-read-only-"))
    (place / "r.yaml").write_text(RECIPE)
    (place / "mine").mkdir()
    made = call("run", place / "r.yaml", "--run-dir", place / "run", home=place / "mine")
    assert made.returncode == 0, made.stderr
    for path in [place / "run", *(place / "run").rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield place / "run"
    for path in [place / "run", *(one for one in (place / "run").rglob("*") if one.is_dir())]:
        path.chmod(0o755)
    shutil.rmtree(place)


def without_override() -> None:
    """From the next program on, modes of files hold for root, too."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0)


def call(*words: object, home: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOME": str(home), "PYTHONPATH": str(SOURCES), "BROWSER": "true", "TMPDIR": str(home)}
    command = [sys.executable, "-m", "nightseg.cli.main", *map(str, words)]
    return subprocess.run(
        command, env=environment, cwd=home, preexec_fn=without_override,
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_may_only_be_read_is_told_of_and_its_pages_go_elsewhere(run: Path) -> None:
    mine = run.parent / "mine"
    before = {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]}

    def ask(*words: object) -> subprocess.CompletedProcess[str]:
        return call(*words, home=mine)

    for words in (("status", run), ("verify", run), ("explain", run), ("explain", run, "day/000001")):
        assert (ended := ask(*words)).returncode == 0, (words, ended.stderr)
    for words in (("report", run), ("explain", run, "day/000001", "--open")):
        refused = ask(*words)
        assert refused.returncode == 2 and "you may not write there" in refused.stderr
        assert "--out FILE" in refused.stderr and "run folder" not in refused.stderr
        assert (ended := ask(*words, "--out", mine / "page.html")).returncode == 0, ended.stderr
        assert (mine / "page.html").read_text().startswith("<!doctype html>")
        (mine / "page.html").unlink()
    refused = ask("run", run.parent / "r.yaml", "--run-dir", run)
    assert refused.returncode == 2 and "you may not write there" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in [run, *run.rglob("*")]} == before
