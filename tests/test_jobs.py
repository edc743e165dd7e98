"""The entry points of `ray job submit`: thin, and as plain about a wrong recipe as the command line."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nightseg.pipeline import run as run_module
from nightseg.pipeline import search as search_module
from nightseg.pipeline.build import build_graph
from nightseg.pipeline.run import Outcome
from nightseg.pipeline.search import Found
from nightseg.recipe import load_recipe
from nightseg.storage import Location

JOBS = sorted((Path(__file__).parents[1] / "jobs").glob("*.py"))


def run_job(monkeypatch: pytest.MonkeyPatch, job: str, *words: object) -> int:
    """Exit code of `python jobs/<job>.py words...`, in this process."""
    path = next(path for path in JOBS if path.stem == job)
    monkeypatch.setattr(sys, "argv", [str(path), *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    return int(ended.value.code or 0)


@pytest.fixture(autouse=True)
def own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NIGHTSEG_RUNS", raising=False)
    monkeypatch.setenv("NIGHTSEG_RUNS", "")  # so that what a job sets is taken back
    monkeypatch.delenv("NIGHTSEG_RUNS")


@pytest.mark.parametrize("job", JOBS, ids=lambda path: path.stem)
def test_a_job_is_thin_and_can_be_imported(job: Path) -> None:
    assert len(job.read_text().splitlines()) <= 40
    assert callable(runpy.run_path(str(job))["main"])


@pytest.mark.parametrize("job", [path.stem for path in JOBS])
def test_a_wrong_recipe_ends_a_job_with_2_and_the_reason(
    job: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\nmodles: {}\n")
    assert run_job(monkeypatch, job, tmp_path / "bad.yaml", "--run-dir", tmp_path / "run") == 2
    captured = capsys.readouterr()
    assert "modles: unknown key" in captured.err and "nothing was started" in captured.err
    assert captured.out == "" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("job", [path.stem for path in JOBS])
def test_a_file_that_is_not_there_ends_a_job_with_2(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_job(monkeypatch, job, "/does/not/exist.yaml") == 2
    assert "/does/not/exist.yaml: there is no such" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["select", "self_train", "search"])
def test_a_job_runs_as_a_program_beside_one_that_is_called_as_a_module_of_python(job: str, tmp_path: Path) -> None:
    """Python looks into the folder of a program first, and half of its library imports `select`."""
    environment = {**os.environ, "PYTHONPATH": str(JOBS[0].parents[1])}
    words = [sys.executable, JOBS[0].parent / f"{job}.py", "none.yaml"]
    ended = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 2 and "none.yaml: there is no such" in ended.stderr, ended.stderr


def test_self_train_runs_the_recipe_into_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from nightseg.pipeline.run import run_folder

    asked: dict[str, Any] = {}

    def adapt(recipe: str, overrides: list[str], **more: Any) -> run_module.Adapted:
        folder = run_folder("demo", more["run_dir"])
        asked.update({"recipe": recipe, "overrides": overrides, "only": more["only"], "folder": folder})
        return run_module.Adapted(folder, Outcome({}, 3, 1, 2.0), folder / "report.html")

    monkeypatch.setattr(run_module, "adapt", adapt)
    assert run_job(monkeypatch, "self_train", "r.yaml", "--set", "a=1", "--only", "m") == 0
    home = Path.home() / "nightseg-runs/demo"
    assert asked == {"recipe": "r.yaml", "overrides": ["a=1"], "only": "m", "folder": Location.of(home)}
    assert capsys.readouterr().out == f"{home}: 3 stages done, 1 already committed\n"


def test_a_job_whose_models_failed_ends_with_their_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = [{"stage": "evaluate/m", "error": "the power went", "models": ["m"], "not_reached": []}]
    outcome = Outcome({"failed": failed}, 3, 1, 2.0, (RuntimeError("the power went"),))
    folder = Location.of("/runs/demo")
    done = run_module.Adapted(folder, outcome, folder / "report.html")
    monkeypatch.setattr(run_module, "adapt", lambda *words, **more: done)
    with pytest.raises(ExceptionGroup, match=r"evaluate/m failed: the power went\. Results are missing of m"):
        run_job(monkeypatch, "self_train", "r.yaml")
    assert capsys.readouterr().out == "/runs/demo: 3 stages done, 1 already committed\n"


STAGES = sorted({path.stem for path in JOBS} - {"self_train", "search"})


def test_there_is_a_job_for_every_stage_of_a_round() -> None:
    round_of = {"split", "train_translator", "translate", "train_segmenter", "score", "select", "pseudo_label"}
    assert set(STAGES) == {*round_of, "evaluate"}


@pytest.mark.parametrize("job", STAGES)
def test_the_job_of_a_stage_does_that_stage_of_the_recipe(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def work_until(recipe: str, overrides: list[str], **more: Any) -> tuple[Location, Outcome]:
        asked.update(more | {"recipe": recipe, "overrides": overrides})
        return Location.of("/runs/demo"), Outcome({}, 3, 1, 2.0)

    monkeypatch.setattr(run_module, "work_until", work_until)
    assert run_job(monkeypatch, job, "r.yaml", "--set", "a=1", "--only", "m", "--run-dir", "/runs/demo") == 0
    del asked["progress"]
    expected = {"recipe": "r.yaml", "overrides": ["a=1"], "run_dir": "/runs/demo", "only": "m", "stage": job}
    assert asked == expected
    assert capsys.readouterr().out == "/runs/demo: 3 stages done, 1 already committed\n"


def test_the_demo_has_a_node_for_every_job() -> None:
    graph = build_graph(load_recipe(JOBS[0].parents[1] / "configs/demo.yaml"))
    assert all(graph.until(job)[-1].id.stage == job for job in STAGES)


def test_work_that_fails_is_no_wrong_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def work_until(*_: Any, **__: Any) -> None:
        raise RuntimeError("the power went")

    monkeypatch.setattr(run_module, "work_until", work_until)
    with pytest.raises(RuntimeError, match="the power went"):
        run_job(monkeypatch, "score", "r.yaml")


def test_search_tells_the_best_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def search(file: str, overrides: list[str], **_: Any) -> Found:
        assert (file, overrides) == ("s.yaml", ["trials=2"])
        best, place = {"label": "alpha=0.5", "miou": 0.5}, Location.of("/s")
        return Found(place, best, [{}, {}], place / "best.yaml", place / "search.html", trainings=2, reused=8)

    monkeypatch.setattr(search_module, "search", search)
    assert run_job(monkeypatch, "search", "s.yaml", "--set", "trials=2") == 0
    assert capsys.readouterr().out == (
        "best of 2: alpha=0.5, miou 0.5000; 2 trainings, 8 stages re-used; recipe: /s/best.yaml; page: /s/search.html\n"
    )
