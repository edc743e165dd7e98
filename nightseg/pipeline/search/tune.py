"""Ray Tune's part: trials side by side, ASHA ends poor ones early. What was done before is told it, not done again.

Tune is asked for no state: values come from `proposals`, what has happened goes to `records`, and its own folder is
removed. Its console and loggers are off; curves and values of trials are event files of our own, because Tune names
trials and columns by key paths.
"""

from __future__ import annotations

import io
import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import ray.tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher
from ray.tune.trainable import wrap_function

from nightseg.cluster import ray as cluster
from nightseg.cluster.ray import wants_logs
from nightseg.cluster.train import name_trainings
from nightseg.errors import UserError
from nightseg.metrics.seeds import deviation
from nightseg.pipeline.search.proposals import propose
from nightseg.pipeline.search.records import DONE, FAILED, STOPPED, Records
from nightseg.pipeline.search.trials import EPOCH, TRAINING, Outcome, Report, Trials, lenders, own_stages
from nightseg.progress import Progress, Task
from nightseg.recipe.types import Compute
from nightseg.storage import Location
from nightseg.storage.events import Curves

IS_LAST: Final = "is_last"
SEEDS: Final = "seeds"
VALIDATION: Final = "validation"
BOARD: Final = "tensorboard"  # folder of the event files

# What Tune reserves for the driver of a trial. Its training and its passes ask for their own CPUs, and on a small
# machine for all of them; a request for nothing is refused, so it is a byte of memory.
DRIVER: Final = {"memory": 1}

# What may be set by the user, and is set before the trials
ENVIRONMENT: Final = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Tune would return as if the search were finished
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "1",  # trials are proposed when one can begin, not earlier
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # the trainings of trials in Ray's dashboard
}

Work = Callable[[Trials, Mapping[str, Any], Sequence[Location], Report], Outcome]


def tune(
    trials: Trials,
    records: Records,
    work: Work,
    progress: Progress,
    *,
    concurrent: int,
    epochs: int,
    keys: Sequence[str] = (),
    on_end: Callable[[], object] = lambda: None,
) -> None:
    """All trials that are left, into the records.

    `work`: one trial. `epochs`: the most that one trains. `keys`: those that decide what trials may lend each other.
    `on_end` is called after each trial.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not wants_logs():
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # tracebacks of trials; their reasons are in the rows
    search, folder = trials.settings, trials.folder / "tune"
    folder.delete()
    watch = Watch(trials, records, concurrent, keys, on_end)
    with progress.task("search", search.trials, "trials") as task:
        watch.task = task
        task.advance(sum(row["end"] in (DONE, STOPPED) for row in records.rows))
        tuner = ray.tune.Tuner(
            _trainable(trials, work),
            tune_config=ray.tune.TuneConfig(
                num_samples=max(search.trials, len(records.again)),
                search_alg=Proposals(watch),
                scheduler=told(asha(search.metric, search.mode, search.grace_epochs, epochs), search.metric, records),
                trial_name_creator=lambda trial: trial.config["label"],
                trial_dirname_creator=lambda trial: trial.config["trial"],
            ),
            run_config=ray.tune.RunConfig(
                name="trials",
                storage_path=folder.uri,
                verbose=0,
                callbacks=[watch],
                failure_config=ray.tune.FailureConfig(max_failures=search.tries - 1),
            ),
        )
        with redirect_stdout(io.StringIO()):  # a box of settings
            tuner.fit()
    folder.delete()


def places(computes: Sequence[Compute], *, cpus: float | None, gpus: float | None) -> int:
    """How many trials fit on the cluster, and into what the search may take of it; at least one."""
    most = math.inf
    for resource, limit in (("CPU", cpus), ("GPU", gpus)):
        each = max(max(_taken(compute, resource)) for compute in computes)
        if each:
            most = min(most, min(cluster.room(resource), math.inf if limit is None else limit) / each + 1e-6)
    return max(1, int(min(most, 2**16)))


def _taken(compute: Compute, resource: str) -> tuple[float, float]:
    """By a training and by a pass."""
    train, passes = compute.train, compute.map
    if resource == "CPU":
        return train.workers * train.cpus_per_worker, passes.actors * passes.cpus_per_actor
    return train.workers * train.gpus_per_worker, passes.actors * passes.gpus_per_actor


# -- early stopping ---------------------------------------------------------------------------------------------------


def asha(metric: str, mode: str, grace: int, epochs: int) -> ASHAScheduler:
    return ASHAScheduler(time_attr=EPOCH, metric=metric, mode=mode, max_t=max(epochs, grace), grace_period=grace)


def told(scheduler: ASHAScheduler, metric: str, records: Records) -> ASHAScheduler:
    """The scheduler, once it has seen what the trials of the records reported."""
    for row in records.rows:
        if row["end"] in (DONE, STOPPED):
            trial = SimpleNamespace(trial_id=row["trial"])
            scheduler.on_trial_add(None, trial)
            before = [point for point in row["curve"] if point[0] < row["epochs"]]
            for epoch, score in [*before, (row["epochs"], row[metric])]:
                scheduler.on_trial_result(None, trial, {EPOCH: epoch, metric: score})
            scheduler.on_trial_remove(None, trial)
    return scheduler


# -- one trial --------------------------------------------------------------------------------------------------------


def _trainable(trials: Trials, work: Work) -> type[Any]:
    """A trial as Tune runs it; Ray's dashboard shows it by its values."""
    search = trials.settings

    def trial(config: dict[str, Any]) -> None:
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", ENVIRONMENT["RAY_TRAIN_ENABLE_STATE_TRACKING"])

        def report(epoch: int, score: float) -> None:
            ray.tune.report({search.metric: _finite(score, f"after epoch {epoch}"), EPOCH: epoch})

        name_trainings(config["label"])
        borrow = [Location.of(uri) for uri in config["borrow"]]
        ended = work(trials, config["values"], borrow, report)
        score = _finite(ended.score, "in the end")
        last = {IS_LAST: True, SEEDS: ended.seeds, VALIDATION: ended.validation}
        ray.tune.report({search.metric: score, EPOCH: ended.epochs, **last})

    def _finite(score: float, when: str) -> float:
        if not math.isfinite(score):
            raise ValueError(f"{search.metric} is {score} {when}: no class of the frames it is measured on is defined")
        return score

    class Trial(wrap_function(trial)):  # type: ignore[misc]
        @classmethod
        def default_resource_request(cls, config: Mapping[str, Any]) -> ray.tune.PlacementGroupFactory:
            return ray.tune.PlacementGroupFactory([DRIVER])

        def __repr__(self) -> str:
            return str(self.config["label"])

    Trial.__qualname__ = "Trial"  # as the dashboard calls it
    return Trial


class Proposals(Searcher):  # type: ignore[misc]
    """Hands Tune the trials that the records say are next."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def suggest(self, trial_id: str) -> Any:
        return self.watch.next()

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The watch notes it."""

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **_: Any) -> bool:
        return True

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """There is nothing to save."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return object, ()  # Tune pickles it for a continuation that never comes


class Watch(ray.tune.Callback):  # type: ignore[misc]
    """What happens to trials: into the records, TensorBoard and the progress."""

    task: Task

    def __init__(
        self, trials: Trials, records: Records, concurrent: int, keys: Sequence[str], on_end: Callable[[], object]
    ) -> None:
        self.trials, self.records, self.concurrent, self.keys, self.on_end = trials, records, concurrent, keys, on_end
        self.at_work: dict[str, dict[str, Any]] = {}  # by the name of the trial: its row
        self._begun: dict[str, float] = {}
        self._curves: dict[str, Curves] = {}
        self._best: float | None = None

    def next(self) -> Any:
        """What Tune is to begin now: a config, None for nothing yet, FINISHED."""
        if len(self.at_work) >= self.concurrent:
            return None
        row = self.records.next(propose)
        if row is None:
            return Searcher.FINISHED
        self.at_work[row["trial"]], self._begun[row["trial"]] = row, time.monotonic()
        self._curves[row["trial"]] = self._new_curves(row)
        borrow = [place.uri for place in lenders(self.keys, row, self.records.rows, self.trials)]
        return {"trial": row["trial"], "label": row["label"], "values": row["values"], "borrow": borrow}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Mapping[str, Any], **_: Any) -> None:
        name, metric = trial.config["trial"], self.trials.settings.metric
        if metric not in result or name not in self.at_work:
            return
        row, epoch, score = self.at_work[name], int(result[EPOCH]), float(result[metric])
        validation = float(result.get(VALIDATION, score))
        row["curve"] = [point for point in row["curve"] if point[0] < epoch]
        if math.isfinite(validation):
            row["curve"].append([epoch, validation])
            self._curves[name].scalars(epoch, {f"{VALIDATION}/{metric}": validation})
        row[metric], row["epochs"] = score, epoch
        if result.get(IS_LAST):
            seeds = dict(result[SEEDS])
            row["end"] = DONE
            if len(seeds) > 1:
                row |= {"std": deviation([*seeds.values()]), SEEDS: seeds}
        self._curves[name].flush()
        self.task.advance(0, **self._best_so_far(score))

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        self._end(trial.config["trial"], error=None)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        # Of the folder that Tune writes it to: trial.get_error() reads a copy, which may not be there yet.
        trace = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
        (self.trials.place(trial.config["trial"]) / "error.txt").write_bytes(trace.encode())
        self._end(trial.config["trial"], error=reason(trace))

    def _end(self, name: str, error: str | None) -> None:
        row = self.at_work.pop(name, None)
        if row is None:
            return
        end, metric = FAILED if error else row["end"] or STOPPED, self.trials.settings.metric
        if end == FAILED:
            row |= {metric: None, "epochs": 0, "curve": []}
        else:
            self._curves[name].scalars(row["epochs"], {metric: row[metric]})
        seconds = round(time.monotonic() - self._begun.pop(name), 3)
        self.records.end(row, end=end, error=error, seconds=seconds, **self._work_of(row, end))
        self._curves.pop(name).end(end == DONE)
        self.task.advance(1)
        self.on_end()

    def _work_of(self, row: Mapping[str, Any], end: str) -> dict[str, int]:
        """Trainings that the trial ran, and stages of its graph that it did not have to do."""
        own = own_stages(self.trials.place(row["trial"]))
        needed = len(self.trials.graph(row["values"]).nodes)
        under_way = int(end == STOPPED)  # its training has no commit
        trainings = sum(stage.startswith(f"{TRAINING}/") for stage in own) + under_way
        return {"trainings": trainings, "reused": needed - len(own) - under_way}

    def _best_so_far(self, score: float) -> dict[str, float]:
        choose = max if self.trials.settings.mode == "max" else min
        self._best = score if self._best is None else choose(self._best, score)
        return {"best": self._best}

    def _new_curves(self, row: Mapping[str, Any]) -> Curves:
        search = self.trials.settings
        folder = self.trials.folder / BOARD / board_name(row)
        folder.delete()
        curves = Curves(folder)
        shown = [search.metric, f"{VALIDATION}/{search.metric}"]  # the latter also of trials at work
        curves.begin({search.short[key]: value for key, value in row["values"].items()}, shown)
        curves.flush()
        return curves

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return object, ()


def board_name(row: Mapping[str, Any]) -> str:
    """How a trial is called in TensorBoard: its number and its values."""
    return re.sub(r"[^\w.=, +-]", "_", f"{row['number']:03d} {row['label']}")[:120]


def reason(trace: str) -> str:
    """The message of a trial's last error, of the tracebacks that Ray hands over."""
    trace = re.split(r"^Failure # \d+ \(occurred at .*\)$", trace, flags=re.MULTILINE)[-1]
    message = trace.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")[2]
    return message.strip() if message != trace else trace.strip().rpartition("\n")[2]
