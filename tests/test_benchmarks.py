"""The harness compares answers before it times, alternates fairly, writes what it measured. Nothing is timed here."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def contests(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.contest")


@pytest.fixture
def command(contests: ModuleType) -> ModuleType:
    return importlib.import_module("benchmarks.__main__")


ON_RAY = {
    "ray_pass",
    "ray_actors",
    "ray_step",
    "unit_workers",
    "translate_pass",
}  # start many processes that import PyTorch, and Ray
PEERS = {  # not installed with nightseg
    "focal": "segmentation_models_pytorch",
    "confusion_torchmetrics": "torchmetrics",
    "confusion_one_hot": "torchmetrics",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("on_ray", [False, True], ids=["alone", "on Ray"])
def test_every_benchmark_runs_at_a_tiny_size_and_leaves_its_measurements(
    command: ModuleType, tmp_path: Path, on_ray: bool
) -> None:
    names = [name for name in command.BENCHMARKS if (name in ON_RAY) == on_ray]
    expected = {name for name in names if name not in PEERS or find_spec(PEERS[name]) is not None}
    # Ray 2.60 warns about its own settings, as in pyproject.toml.
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning:ray.data.context"]
    only = [word for name in names for word in ("--only", name)]
    words = [sys.executable, *warnings, "-m", "benchmarks", "--tiny", "--rounds", "2", "--out", str(tmp_path), *only]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=580, check=False)
    assert ended.returncode == 0, ended.stderr
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert {contest["name"] for contest in content["contests"]} == expected
    assert set(content["skipped"]) == set(names) - expected
    for contest in content["contests"]:
        assert contest["rounds"] == len(contest["ours"]) == len(contest["theirs"]) == 2
        assert set(contest["ours"][0]) == {"wall", "cpu"}
        assert contest["work"] in ended.stdout and contest["peer"] in ended.stdout
    assert content["size"] == "tiny" and {"python", "numpy", "torch"} <= content["versions"].keys()
    assert content["machine"]["cores"] >= 1 and isinstance(content["machine"]["flags"], list)
    table = ended.stdout.splitlines()
    assert len(table) == 2 + len(expected) and len({line.count("|") for line in table}) == 1


def contest(contests: ModuleType, log: list[str], ours: Any = 1, peer: Any = 1) -> Any:
    def run(side: str, answer: Any) -> Any:
        log.append(side)
        return answer

    def check(first: Any, second: Any) -> None:
        log.append("check")
        assert first == second, "they differ"
        return "equal"

    return contests.Contest("c", "work", "peer", lambda: run("ours", ours), lambda: run("peer", peer), check)


@pytest.mark.slow
def test_what_is_run_on_a_gpu_runs_at_a_tiny_size_on_a_cpu(tmp_path: Path) -> None:
    words = [sys.executable, "-W", "error", "-m", "benchmarks.gpu", "--tiny", "--no-compile", "--out", str(tmp_path)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stderr
    (file,) = tmp_path.glob("gpu-*.json")
    content = json.loads(file.read_text())
    assert content["faults"] == {}
    works = {row["work"] for row in content["rows"]}
    assert {"step of the segmenter", "step of UNIT", "predictions", "features"} < works
    assert all(row["images_per_second"] > 0 for row in content["rows"] if "told" not in row)
    if not torch.cuda.is_available():
        refused = subprocess.run(words[:-4] + words[-2:], cwd=ROOT, capture_output=True, text=True, check=False)
        assert refused.returncode == 2 and "no CUDA GPU" in refused.stderr


def test_answers_are_compared_before_anything_is_timed(contests: ModuleType) -> None:
    log: list[str] = []
    with pytest.raises(AssertionError, match="they differ"):
        contests.hold(contest(contests, log, ours=1, peer=2), rounds=3)
    assert log == ["ours", "peer", "check"]


def test_one_that_disagrees_does_not_lose_what_the_others_measured(
    command: ModuleType,
    contests: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    both = {"same": lambda size: contest(contests, []), "other": lambda size: contest(contests, [], peer=2)}
    monkeypatch.setattr(command, "BENCHMARKS", both)
    assert command.main(["--rounds", "1", "--out", str(tmp_path)]) == 1
    assert "other: the answers differ" in capsys.readouterr().err
    (file,) = tmp_path.glob("*.json")
    assert len(json.loads(file.read_text())["contests"]) == 1


def test_a_peer_that_is_not_installed_is_skipped_with_the_way_to_get_it(
    command: ModuleType,
    contests: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def absent(size: str) -> Any:
        raise contests.PeerMissing("torchmetrics")

    monkeypatch.setattr(command, "BENCHMARKS", {"same": lambda size: contest(contests, []), "absent": absent})
    assert command.main(["--rounds", "1", "--out", str(tmp_path)]) == 0
    assert "absent: skipped: torchmetrics is not installed" in capsys.readouterr().err
    (file,) = tmp_path.glob("*.json")
    content = json.loads(file.read_text())
    assert len(content["contests"]) == 1 and "pip install -e '.[peers]'" in content["skipped"]["absent"]


def test_the_two_take_turns_and_change_places(contests: ModuleType) -> None:
    log: list[str] = []
    outcome = contests.hold(contest(contests, log), rounds=4)
    assert log[3:] == ["ours", "peer", "peer", "ours", "ours", "peer", "peer", "ours"]
    assert len(outcome.ours) == len(outcome.peer) == 4


def test_medians_and_ratios(contests: ModuleType, command: ModuleType) -> None:
    seconds = contests.Seconds
    ours = [seconds(1.0, 2.0), seconds(3.0, 4.0), seconds(100.0, 6.0)]
    peer = [seconds(6.0, 0.002)] * 3
    outcome = contests.Outcome(contest(contests, []), ours, peer, "equal")
    assert outcome.median("ours", "wall") == 3.0 and outcome.median("ours", "cpu") == 4.0
    assert outcome.ratio("wall") == 0.5
    assert outcome._replace(contest=replace(outcome.contest, ours_units=3)).median("ours", "wall") == 1.0
    row = command.table([outcome]).splitlines()[-1]
    assert row == "| work | peer | 3.00 s | 6.00 s | 0.5 | 4.00 s | 2.0 ms | 2e+03 |  |  |  | equal |"


def test_the_formula_of_the_peer_counts_as_ours_does(contests: ModuleType) -> None:
    import numpy as np
    import torch

    confusion = importlib.import_module("benchmarks.confusion")
    label = np.array([[0, 1, 255], [18, 0, 2]], dtype=np.uint8)
    guess = np.array([[0, 2, 5], [18, 1, 2]], dtype=np.uint8)
    matrix = confusion.fast_hist(label, guess)
    areas = confusion.histc(torch.from_numpy(label), torch.from_numpy(guess))
    assert areas.labelled.tolist() == matrix.sum(axis=1).tolist() and areas.predicted.tolist() == matrix.sum(0).tolist()
    assert areas.both.tolist() == matrix.diagonal().tolist()
    assert matrix.sum() == 5 and matrix[0, 0] == matrix[1, 2] == matrix[18, 18] == matrix[0, 1] == matrix[2, 2] == 1


def test_a_missing_peer_is_said_and_the_others_are_run(
    command: ModuleType,
    contests: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lonely(size: str) -> Any:
        raise contests.PeerMissing("smp")

    monkeypatch.setattr(command, "BENCHMARKS", {"lonely": lonely, "same": lambda size: contest(contests, [])})
    assert command.main(["--rounds", "1", "--out", str(tmp_path)]) == 0
    assert "lonely: skipped: smp is not installed; to compare with it: pip install" in capsys.readouterr().err
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["skipped"].keys() == {"lonely"}


def test_a_clock_of_the_work_itself_replaces_the_wall(contests: ModuleType) -> None:
    timed = replace(contest(contests, [], 0.25, 0.25), clock=lambda answer: answer)
    outcome = contests.hold(timed, rounds=2)
    assert outcome.median("ours", "wall") == outcome.median("peer", "wall") == 0.25


def test_peaks_may_be_measured_in_processes_of_their_own(contests: ModuleType) -> None:
    from benchmarks import memory

    outcome = contests.hold(replace(contest(contests, []), peaks=lambda: (3, 4)), rounds=1)
    assert outcome.peaks == (3, 4)
    ours = memory.peak_bytes("benchmarks.loss", "chunks_of_ours", "default")
    peer = memory.peak_bytes("benchmarks.loss", "chunks_of_peer", "default")
    assert 110e6 < peer < 150e6  # logits at full size, their log-softmax, its gradient: 40 MB each
    assert ours < 0.15 * peer


def test_wrong_names_are_refused(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in ((["--only", "spatia"], "did you mean 'spatial'?"), (["--rounds", "0"], "at least 1")):
        with pytest.raises(SystemExit) as ended:
            command.main(words)
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_the_processor_is_described_where_linux_says_it(command: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512f amx_bf16\n")
    assert command.cpu_facts(tmp_path / "cpuinfo") == {
        "processor": "Some CPU", "flags": ["avx2", "avx512f", "amx_bf16"]
    }  # fmt: skip
    assert command.cpu_facts(tmp_path / "nothing") == {"processor": "", "flags": []}


def test_memory_is_that_of_each_side(contests: ModuleType) -> None:
    import numpy as np

    contest = contests.Contest(
        *("c", "work", "peer", lambda: np.ones(10_000).sum(), lambda: np.ones(1_000_000).sum(), lambda a, b: ""),
        allocations=True,
    )
    ours, peer = contests.hold(contest, rounds=1).peaks
    assert 80_000 <= ours < 200_000 and 8_000_000 <= peer < 9_000_000
