"""Tune's part: the direction, the grace, what is recorded, kills; in this process, and on a real Ray with a made-up
trial (marker ray): the score follows from the values, and no one trains."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow.fs import LocalFileSystem
from ray.tune.experiment import Trial

from nightseg.errors import UserError
from nightseg.pipeline.search.records import Records
from nightseg.pipeline.search.trials import Outcome, Report, Trials
from nightseg.pipeline.search.tune import IS_LAST, Proposals, Watch, asha, board_name, places, reason, told, tune
from nightseg.progress import SilentProgress
from nightseg.recipe.types import Compute
from nightseg.storage import Location, hash_of
from nightseg.storage.events import Curves
from tests.programs import started
from tests.small_search import ALPHA, COUNT, GAMMA, ROOT, search_of, trials_of

EPOCHS = 4


def bowl(values: Mapping[str, Any]) -> float:
    """Highest, 1, at alpha 0.3 and gamma 3."""
    return float(1 - (values[ALPHA] - 0.3) ** 2 - (values[GAMMA] - 3) ** 2 / 16)


def curve(values: Mapping[str, Any]) -> list[tuple[int, float]]:
    return [(epoch, bowl(values) * epoch / EPOCHS) for epoch in range(1, EPOCHS + 1)]


# -- without Ray ------------------------------------------------------------------------------------------------------


class Bare:
    """The trials of a search, with nothing of a recipe."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.settings, self.folder = search_of(*overrides), Location.of(folder)

    def name(self, values: Mapping[str, Any]) -> str:
        return hash_of(values)[:12]

    def place(self, name: str) -> Location:
        return self.folder / "trials" / name

    @property
    def shared(self) -> Location:
        return self.folder / "shared"

    def graph(self, values: Mapping[str, Any]) -> Any:
        return SimpleNamespace(nodes=range(9))


class Killed(Exception):  # noqa: N818 (nothing went wrong)
    pass


class Machine:
    """In the place of Tune's loop: trials side by side, in an order drawn from `rng`, and a kill after some steps.

    `trained` are the epochs that trials have behind them, as their run folders know it, and `work` what was trained.
    """

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.overrides = folder, overrides
        self.trained: dict[str, int] = {}
        self.work: list[tuple[str, int]] = []

    def start(self, concurrent: int, rng: random.Random, steps: float = float("inf")) -> Records:
        trials: Any = Bare(self.folder, *self.overrides)
        records, search = Records(trials.folder, trials.settings, trials.name), trials.settings
        watch = Watch(trials, records, concurrent, [COUNT], lambda: None)
        watch.task = SilentProgress()
        scheduler = told(asha(search.metric, search.mode, search.grace_epochs, EPOCHS), search.metric, records)
        live: dict[str, Any] = {}
        while True:
            while isinstance(config := watch.next(), dict):
                trial = SimpleNamespace(config=config, trial_id=config["trial"], reported=0)
                live[config["trial"]] = trial
                scheduler.on_trial_add(None, trial)
            if not live:
                return records
            steps -= 1
            if steps < 0:
                raise Killed
            self._step(rng.choice(list(live.values())), live, watch, scheduler, search.metric)

    def _step(self, trial: Any, live: dict[str, Any], watch: Watch, scheduler: Any, metric: str) -> None:
        name, values = trial.config["trial"], trial.config["values"]
        trial.reported += 1
        epoch, score = curve(values)[trial.reported - 1]
        if self.trained.get(name, 0) < epoch:
            self.trained[name] = epoch
            self.work.append((name, epoch))
        last = {IS_LAST: True, "seeds": {"0": score}} if epoch == EPOCHS else {}
        result = {"epoch": epoch, metric: score, **last}
        decision = scheduler.on_trial_result(None, trial, result)
        watch.on_trial_result(0, [], trial, result)
        if decision == "STOP" or last:
            scheduler.on_trial_complete(None, trial, result)
            watch.on_trial_complete(0, [], trial)
            del live[name]


def facts(records: Records) -> list[Any]:
    return [(row["number"], row["values"], row["end"], row["curve"]) for row in records.rows]


@pytest.mark.parametrize("concurrent", [1, 2, 4])
def test_whatever_the_kill_no_trial_is_done_twice_and_all_are_counted(tmp_path: Path, concurrent: int) -> None:
    """At one trial at a time, the very trials of an undisturbed search, with their ends."""
    plain = Machine(tmp_path / "plain", "trials=12").start(concurrent, random.Random(0))
    rng = random.Random(concurrent)
    for kill in range(10):
        machine = Machine(tmp_path / str(kill), "trials=12")
        for steps in (rng.randrange(40), rng.randrange(40)):  # killed twice
            try:
                machine.start(concurrent, rng, steps)
            except Killed:
                continue
        records = machine.start(concurrent, rng)
        assert len(records.rows) == 12 and all(row["end"] in ("done", "stopped") for row in records.rows)
        assert len(machine.work) == len(set(machine.work))  # no epoch was trained twice
        ended = {row["trial"] for row in records.rows if row["end"] == "done"}
        assert ended == {name for name, epoch in machine.trained.items() if epoch == EPOCHS}
        if concurrent == 1:
            assert facts(records) == facts(plain)


def test_asha_knows_after_a_kill_what_it_knew(tmp_path: Path) -> None:
    """A trial that is worse than all before is stopped at the grace, also where those were done by an earlier start."""
    machine = Machine(tmp_path, "trials=12", "sampler=random")
    records = machine.start(1, random.Random(0))
    stopped = [row for row in records.rows if row["end"] == "stopped"]
    assert stopped and all(row["curve"][-1][0] in (1, 4) for row in stopped)
    best = max(records.rows, key=lambda row: bowl(row["values"]))
    assert best["end"] == "done" and records.best == best


@pytest.mark.parametrize(("mode", "is_stopped"), [("max", True), ("min", False)])
@pytest.mark.parametrize("grace", [1, 2, 5])
def test_a_poor_trial_is_stopped_at_its_grace_and_not_before(mode: str, is_stopped: bool, grace: int) -> None:
    scheduler = asha("miou", mode, grace, EPOCHS)
    decisions = []
    for name, level in [(f"good{n}", 0.5 + n / 100) for n in range(4)] + [("poor", 0.1)]:
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)
        decisions = [
            scheduler.on_trial_result(None, trial, {"epoch": epoch, "miou": level * epoch})
            for epoch in range(1, EPOCHS)
        ]
    expected = [epoch == grace and is_stopped for epoch in range(1, EPOCHS)]
    assert [decision == "STOP" for decision in decisions] == expected


def failing(folder: Path, config: Mapping[str, Any], *errors: Exception) -> Trial:
    """A trial of Tune that failed with `errors`, before Tune copied anything of it from the driver's own folder."""
    places = SimpleNamespace(
        storage_filesystem=LocalFileSystem(),
        trial_fs_path=str(folder / "copies"),
        trial_driver_staging_path=str(folder / "staging"),
    )
    trial = Trial("made up", config=config, stub=True)
    trial.storage = places
    (folder / "staging").mkdir(exist_ok=True)
    for error in errors:
        trial.handle_error(error)
    return trial


def test_the_error_of_a_trial_is_told_before_tune_has_copied_it(tmp_path: Path) -> None:
    trials: Any = Bare(tmp_path, "trials=1")
    records = Records(trials.folder, trials.settings, trials.name)
    watch = Watch(trials, records, 1, [], lambda: None)
    watch.task = SilentProgress()
    trial = failing(tmp_path, watch.next(), ValueError("first"), ValueError("second"))
    assert trial.get_error() is None
    watch.on_trial_error(0, [], trial)
    (row,) = records.rows
    assert (row["end"], row["error"]) == ("failed", "second")
    text = (trials.place(row["trial"]) / "error.txt").read_bytes().decode()
    assert "first" in text and "second" in text


def test_a_trial_that_reports_again_after_a_failure_has_one_curve(tmp_path: Path) -> None:
    trials: Any = Bare(tmp_path, "trials=1")
    records = Records(trials.folder, trials.settings, trials.name)
    watch = Watch(trials, records, 1, [], lambda: None)
    watch.task = SilentProgress()
    config = watch.next()
    trial = failing(tmp_path, config, ValueError("gone"))
    assert watch.next() is None  # one at a time
    for epoch, score in ((1, 0.1), (2, 0.2), (1, 0.1), (2, 0.2), (3, 0.3)):
        watch.on_trial_result(0, [], trial, {"epoch": epoch, "miou": score})
    assert records.rows[0]["curve"] == [[1, 0.1], [2, 0.2], [3, 0.3]]
    watch.on_trial_error(0, [], trial)
    (row,) = Records(trials.folder, trials.settings, trials.name).others or records.rows
    assert (row["error"], row["miou"], row["curve"]) == ("gone", None, [])
    assert "gone" in (trials.place(row["trial"]) / "error.txt").read_bytes().decode()
    assert watch.next() == "FINISHED"


def test_seeds_of_a_trial_are_recorded_with_their_spread(tmp_path: Path) -> None:
    trials: Any = Bare(tmp_path, "trials=1")
    records = Records(trials.folder, trials.settings, trials.name)
    watch = Watch(trials, records, 1, [], lambda: None)
    watch.task = SilentProgress()
    trial = SimpleNamespace(config=watch.next())
    watch.on_trial_result(0, [], trial, {"epoch": 3, "miou": 0.375, IS_LAST: True, "seeds": {"4": 0.25, "5": 0.5}})
    watch.on_trial_complete(0, [], trial)
    # Of two values the sample standard deviation is their difference by the root of two.
    assert records.rows[0]["std"] == pytest.approx(0.25 / 2**0.5, rel=1e-12)
    assert (records.rows[0]["end"], records.rows[0]["seeds"]) == ("done", {"4": 0.25, "5": 0.5})


def test_the_outcome_of_a_trial_is_no_point_of_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be of a test set, of the epoch that is kept, or a mean; ASHA, which compares by it, is told of it."""
    drawn, tabled = list[tuple[int, dict[str, float]]](), list[list[str]]()
    monkeypatch.setattr(Curves, "scalars", lambda self, step, values: drawn.append((step, values)))
    monkeypatch.setattr(Curves, "begin", lambda self, values, metrics: tabled.append(metrics))
    trials: Any = Bare(tmp_path, "trials=2")
    records = Records(trials.folder, trials.settings, trials.name)
    watch = Watch(trials, records, 2, [], lambda: None)
    watch.task = SilentProgress()
    done, stopped = (SimpleNamespace(config=watch.next()) for _ in range(2))
    for epoch in (1, 2):
        watch.on_trial_result(0, [], done, {"epoch": epoch, "miou": epoch / 8})
    last = {IS_LAST: True, "seeds": {"0": 0.75}}
    watch.on_trial_result(0, [], done, {"epoch": 4, "miou": 0.75, "validation": 0.5, **last})
    watch.on_trial_complete(0, [], done)
    watch.on_trial_result(0, [], stopped, {"epoch": 1, "miou": 0.25})
    watch.on_trial_complete(0, [], stopped)
    rows = records.rows
    assert [row["curve"] for row in rows] == [[[1, 0.125], [2, 0.25], [4, 0.5]], [[1, 0.25]]]
    assert [(row["miou"], row["epochs"]) for row in rows] == [(0.75, 4), (0.25, 1)]
    seen: list[tuple[str, int, float]] = []
    scheduler: Any = SimpleNamespace(
        on_trial_add=lambda *_: None,
        on_trial_result=lambda _, trial, result: seen.append((trial.trial_id, result["epoch"], result["miou"])),
        on_trial_remove=lambda *_: None,
    )
    told(scheduler, "miou", records)
    first, second = (row["trial"] for row in rows)
    assert seen == [(first, 1, 0.125), (first, 2, 0.25), (first, 4, 0.75), (second, 1, 0.25)]
    curves = [[(epoch, {"validation/miou": score}) for epoch, score in row["curve"]] for row in rows]
    assert drawn == [*curves[0], (4, {"miou": 0.75}), *curves[1], (1, {"miou": 0.25})]
    assert tabled == [["miou", "validation/miou"]] * 2, "HParams shows a score of trials at work, too"


def test_a_last_epoch_without_a_defined_validation_is_left_out_of_the_curve(tmp_path: Path) -> None:
    trials: Any = Bare(tmp_path, "trials=1")
    records = Records(trials.folder, trials.settings, trials.name)
    watch = Watch(trials, records, 1, [], lambda: None)
    watch.task = SilentProgress()
    trial = SimpleNamespace(config=watch.next())
    last = {IS_LAST: True, "seeds": {"0": 0.75}, "validation": float("nan")}
    watch.on_trial_result(0, [], trial, {"epoch": 4, "miou": 0.75, **last})
    watch.on_trial_complete(0, [], trial)
    assert (records.rows[0]["curve"], records.rows[0]["miou"]) == ([], 0.75)


def test_tune_may_begin_all_that_are_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where fewer trials are asked for than there were."""
    Machine(tmp_path, "trials=3").start(1, random.Random(0))
    most: list[int] = []

    def tuner(*_: Any, tune_config: Any, **__: Any) -> Any:
        return SimpleNamespace(fit=lambda: most.append(tune_config.num_samples))

    monkeypatch.setattr("ray.tune.Tuner", tuner)
    for trials, override in ((1, "mode=min"), (1, "mode=max"), (9, "mode=min")):
        bare: Any = Bare(tmp_path, f"trials={trials}", override)
        tune(bare, Records(bare.folder, bare.settings, bare.name), made_up, SilentProgress(), concurrent=1, epochs=4)
    assert most == [3, 1, 9]


def test_tune_may_pickle_what_stays_here(tmp_path: Path) -> None:
    watch = Watch(Bare(tmp_path), None, 1, [], lambda: None)  # type: ignore[arg-type]
    for one in (watch, Proposals(watch)):
        pickle.loads(pickle.dumps(one))


def test_tensorboard_names_a_trial_by_its_values() -> None:
    assert board_name({"number": 7, "label": "alpha=0.55, count=120"}) == "007 alpha=0.55, count=120"
    assert board_name({"number": 7, "label": "start=a/../b?"}) == "007 start=a_.._b_"
    assert len(board_name({"number": 7, "label": "x" * 300})) == 120  # of 255 that a file may have


def test_the_reason_of_a_failure_is_the_message_of_its_error() -> None:
    trace = f"Traceback ...\n  in work\n{UserError.__module__}.UserError: 3 frames are bad\n  first: a.png"
    assert reason(trace) == "3 frames are bad\n  first: a.png"
    assert reason("Traceback ...\nRuntimeError: a worker died\n") == "RuntimeError: a worker died"
    first, last = (f"Failure # {n} (occurred at 2026-11-29_16-00-0{n})\n" for n in (1, 2))
    assert reason(f"{first}{trace}\n{last}Traceback ...\nValueError: another\n") == "ValueError: another"


@pytest.mark.parametrize(
    ("room", "compute", "limits", "most"),
    [
        ({"CPU": 8.0}, {"train": {"workers": 2, "cpus_per_worker": 1}}, (None, None), 4),
        ({"CPU": 8.0}, {"train": {"workers": 2, "cpus_per_worker": 1}}, (5.0, None), 2),
        ({"CPU": 2.0}, {"train": {"workers": 2, "cpus_per_worker": 2}}, (None, None), 1),
        ({"CPU": 8.0}, {"map": {"actors": 4, "cpus_per_actor": 1}}, (None, None), 2),
        ({"CPU": 64.0, "GPU": 3.0}, {"train": {"gpus_per_worker": 1}}, (None, None), 3),
        ({"CPU": 64.0, "GPU": 4.0}, {"train": {"gpus_per_worker": 1}}, (None, 2.0), 2),
        ({"CPU": 0.5}, {}, (None, None), 1),  # it is for the training to say that there is no room
        ({"CPU": 0.3}, {"train": {"cpus_per_worker": 0.1}, "map": {"actors": 0}}, (None, None), 3),
    ],
)
def test_so_many_trials_run_as_there_is_room_for(
    monkeypatch: pytest.MonkeyPatch, room: dict[str, float], compute: dict[str, Any], limits: Any, most: int
) -> None:
    from nightseg.cluster import ray as cluster

    monkeypatch.setattr(cluster, "room", room.__getitem__)
    asked = Compute.model_validate(compute)
    assert places([asked, asked], cpus=limits[0], gpus=limits[1]) == most


# -- on Ray -----------------------------------------------------------------------------------------------------------


def made_up(trials: Trials, values: Mapping[str, Any], borrow: Sequence[Location], report: Report) -> Outcome:
    """A trial whose score follows from its values. Its run folder knows how often it was trained to its end."""
    place = trials.place(trials.name(values))
    for epoch, score in curve(values)[:-1]:
        report(epoch, score)
        time.sleep(0.05)
    if values[COUNT] == 61:
        raise ValueError("this count is not liked")
    done = place / "trained"
    if not done.exists():
        with (trials.folder / "work.txt").local.open("a") as log:
            log.write(f"{place.name}\n")
        done.write_bytes(b"")
    score = float("nan") if values[GAMMA] == 2.5 else bowl(values)
    return Outcome(score, {"0": score}, EPOCHS)


def tuned(folder: Path, *overrides: str, concurrent: int = 2) -> Records:
    trials = trials_of(folder, *overrides)
    records = Records(trials.folder, trials.settings, trials.name)
    tune(trials, records, made_up, SilentProgress(), concurrent=concurrent, epochs=EPOCHS, keys=[COUNT])
    return records


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_tune_finds_the_best_and_records_trials_that_fail(tmp_path: Path) -> None:
    """Real Tune and ASHA. A trial that raises and one whose score is not a number: told, and the search ends."""
    space = f"space={{{ALPHA}: {{choice: [0.3, 0.9]}}, {GAMMA}: {{choice: [2.5, 3.0]}}, {COUNT}: {{choice: [60, 61]}}}}"
    records = tuned(tmp_path, "trials=5", "sampler=grid", "grace_epochs=4", "seed=3", space)
    assert len(records.rows) == 5
    for row in records.rows:
        words = "this count is not liked" if row["values"][COUNT] == 61 else "miou is nan in the end"
        is_good = row["values"][COUNT] == 60 and row["values"][GAMMA] == 3.0
        assert (row["end"], row["miou"]) == (("done", bowl(row["values"])) if is_good else ("failed", None))
        assert is_good or words in row["error"]
    good = [row for row in records.rows if row["end"] == "done"]
    assert good and len(good) < 5 and records.best == max(good, key=lambda row: bowl(row["values"]))
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == [board_name(r) for r in records.rows]
    assert not (tmp_path / "tune").exists()
    trained = (tmp_path / "work.txt").read_text().split()
    assert len(trained) == len(set(trained))


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from nightseg.cluster import ray as cluster
from tests.pipeline.search.test_tune import tuned
cluster.connect(num_cpus=2, dashboard=False)
tuned(Path(sys.argv[1]), "trials=12", concurrent=int(sys.argv[2]))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("concurrent", [1, 2, 4])
def test_a_search_that_is_killed_ends_with_all_of_its_trials(tmp_path: Path, concurrent: int) -> None:
    """SIGKILL of the driver when some trials are done: the rerun does the others."""
    script = tmp_path / "search.py"
    script.write_text(KILLED.format(tests=str(ROOT)))
    folder = tmp_path / "search"
    command = [sys.executable, str(script), str(folder), str(concurrent)]
    killed_at = random.Random(concurrent).choice([3, 5, 8])
    with started(command) as running:
        while running.poll() is None and ended_in(folder) < killed_at:
            time.sleep(0.05)
        running.kill()
    assert killed_at <= ended_in(folder)
    subprocess.run(command, check=True, timeout=600)
    rows = json.loads((folder / "trials.json").read_text())["trials"]
    trained = (folder / "work.txt").read_text().split()
    assert len(rows) == 12 and all(row["end"] in ("done", "stopped") for row in rows)
    assert len(trained) == len(set(trained)) and {row["trial"] for row in rows if row["end"] == "done"} == set(trained)
    if concurrent == 1:
        plain = Machine(tmp_path / "plain", "trials=12").start(1, random.Random(0))
        assert [(row["values"], row["end"]) for row in rows] == [(row["values"], row["end"]) for row in plain.rows]


def ended_in(folder: Path) -> int:
    try:
        rows = json.loads((folder / "trials.json").read_text())["trials"]
    except (FileNotFoundError, ValueError):
        return 0
    return sum(row["end"] is not None for row in rows)
