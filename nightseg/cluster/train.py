"""Training loops on Ray Train: the loop is a plain function of a `Session`, and does not know what it runs on.

    def loop(session: Session, settings: dict[str, Any]) -> None:
        network = build(settings).to(session.device)
        state = session.restore()                       # None, or what the last report carried
        if state is not None:
            network.load_state_dict(state["network"])
        model = session.wrap(network)                   # gradients are averaged over the workers
        for epoch in range(state["epoch"] if state else 0, settings["epochs"]):
            ...
            session.report({"loss": loss}, {"network": network.state_dict(), "epoch": epoch + 1})

`fit` runs it on workers of the cluster. A worker that dies is replaced and continues after the last report; so does
the same call after the driver was killed, because the folder is the same. Where its node is gone and no other comes,
the training goes on with fewer workers (`Session.world_size`), until there is room for all of them again.

Tests need no Ray: `loop(LocalSession(Location.of(tmp_path)), settings)` runs in this process, with real checkpoints;
a second call with the same folder resumes. `LocalSession.history` holds what was reported, `.done` the progress.

Reports are few (one an epoch): each is a barrier of all workers. `progress` may be called in every step.
"""

from __future__ import annotations

import io
import logging
import pickle
import re
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nightseg.cluster import nodes
from nightseg.cluster import ray as cluster
from nightseg.cluster.elastic import controller_class, failure_policy, scaling_policy
from nightseg.cluster.progress_actor import SECONDS_BETWEEN_UPDATES, Failure, progress_actor, shown
from nightseg.cluster.session import Session
from nightseg.cluster.settings import TrainCompute
from nightseg.cluster.shortage import Watch, mended, shortage
from nightseg.cluster.turn import waiting
from nightseg.errors import UserError
from nightseg.progress import Progress
from nightseg.storage import Location, sha256_of
from nightseg.storage.scratch import temporary_folder

NUM_KEPT = 2  # checkpoints
SECONDS_TO_ABORT = 8.0  # that workers of an interrupted training are given to end
_LESS = "Lower training.batch or training.crop, or raise training.accumulate (of a translator: its own batch or crop)"
_LOG = logging.getLogger(__name__)
_MOST_BYTES = 180  # of a name that becomes a folder
_owner = ""


class LocalSession:
    """One worker in this process, for tests and small work: no Ray, the same checkpoints."""

    def __init__(self, folder: Location, device: torch.device | str = "cpu") -> None:
        self.rank = 0
        self.world_size = 1
        self.workers = 1
        self.device = torch.device(device)
        self.history: list[dict[str, Any]] = []
        self.done = 0
        self.metrics: dict[str, float] = {}
        self._checkpoints = Checkpoints(folder)

    def wrap(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def restore(self) -> dict[str, Any] | None:
        snapshot = self._checkpoints.newest(self.say)
        if snapshot is None:
            return None
        self.history = snapshot.history
        return snapshot.state

    def report(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> None:
        self.history.append(dict(metrics))
        if self.rank == 0 and state is not None:
            self._checkpoints.save(len(self.history), state, self.history)

    def say(self, message: str) -> None:
        _LOG.warning(message)

    def progress(self, done: int, **metrics: float) -> None:
        self.done = done
        self.metrics.update(metrics)


def exchanging(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with its gradients averaged over the process group; they lie in the buffers that are exchanged."""
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


class _WorkerSession(LocalSession):
    """One worker of a cluster. Rank 0 keeps the history and the checkpoints, and reports progress."""

    def __init__(self, folder: Location, actor: Any, key: str, workers: int) -> None:
        import ray.train.torch

        super().__init__(folder, ray.train.torch.get_device())
        self.rank = ray.train.get_context().get_world_rank()
        self.world_size = ray.train.get_context().get_world_size()
        self.workers = workers
        self._actor = actor
        self._key = key
        self._told = 0.0
        self._untold: tuple[int, dict[str, float]] | None = None

    def wrap(self, module: nn.Module) -> nn.Module:
        return exchanging(module.to(self.device), self.device) if self.world_size > 1 else module.to(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world_size == 1:
            return tensor
        tensor = tensor.to(self.device)  # NCCL knows no other place
        torch.distributed.all_reduce(tensor)
        return tensor

    def report(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> None:
        import ray.train

        # The barrier comes first: no worker can still be in `restore` when a newer checkpoint appears.
        ray.train.report(dict(metrics))
        super().report(metrics, state)

    def progress(self, done: int, **metrics: float) -> None:
        if self.rank == 0:
            held = self._untold[1] if self._untold is not None else {}
            self._untold = (done, held | metrics)  # what an epoch ended with is not lost to the next step
            if time.monotonic() - self._told >= SECONDS_BETWEEN_UPDATES:
                self.tell()

    def say(self, message: str) -> None:
        if self.rank == 0:
            self._actor.say.remote(self._key, message)

    def tell(self) -> None:
        """What `progress` held back goes to the progress actor; nobody waits for an answer."""
        if self._untold is not None:
            self._actor.advance.remote(self._key, *self._untold)
            self._told, self._untold = time.monotonic(), None


@dataclass(frozen=True)
class FitResult:
    """A finished training. `metrics`: of the last report; `history`: of every report of every run, in order."""

    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    checkpoints: Checkpoints = field(repr=False)

    def load(self) -> dict[str, Any]:
        """The state of the last report that carried one, tensors on the CPU.

        Raises RuntimeError if none did, or if it is damaged by now: an older one is not what the training ended with.
        """
        damaged: list[str] = []
        snapshot = self.checkpoints.newest(damaged.append)
        if damaged:
            raise RuntimeError(f"{damaged[0]}; run the same command again to train the rest again")
        if snapshot is None:
            raise RuntimeError(f"the training in {self.checkpoints.folder} ended without reporting a state")
        return snapshot.state


def name_trainings(owner: str) -> None:
    """What stands before the names of the trainings of this process in Ray's dashboard; "" ends that."""
    global _owner
    _owner = owner


def _shown(name: str) -> str:
    """The name of a training in Ray's dashboard. Ray makes a folder of it: no slash, and no more than it may have."""
    return re.sub(r"[^\w.=, +-]", "_", f"{_owner} {name}".strip()).encode()[-_MOST_BYTES:].decode(errors="ignore")


def fit(
    loop: Callable[[Session, dict[str, Any]], None],
    settings: dict[str, Any],
    *,
    folder: Location,
    name: str,
    compute: TrainCompute,
    progress: Progress,
    title: str,
    total: int,
    unit: str,
) -> FitResult:
    """Runs the loop on the workers until it returns on all of them.

    Args:
        loop, settings: called as `loop(session, settings)` on every worker; both are pickled, paths in them absolute.
        folder, name: checkpoints lie in `folder`/`name`, on a file system that all workers reach. What is there is
            continued, so two trainings that differ in anything must have different folders: put it under the attempt.
        compute: what to reserve. PyTorch gets int(cpus_per_worker) threads, at least one. gloo on CPUs, NCCL on GPUs.
        total, unit: of `Session.progress`, for the display.

    Raises:
        UserError: raised in the loop (never tried again), or the cluster is too small (Ray would wait forever).
        RuntimeError: the loop failed otherwise, or its process died, more than `max_failures` times.
    """
    cluster.connect()
    cpus, gpus = compute.cpus_per_worker, compute.gpus_per_worker
    cluster.require("worker", compute.workers, cpus=cpus, gpus=gpus, place="compute.train", say=progress.say)
    job = {
        "loop": loop,
        "settings": settings,
        "checkpoints": Checkpoints(folder / name),
        "threads": max(1, int(cpus)),
        "workers": compute.workers,
        "actor": progress_actor(),
        "key": uuid.uuid4().hex,
    }
    watch = Watch()
    with progress.task(title, total, unit) as task, shown(job["actor"], job["key"], task, progress, title):
        history = _run(job, compute, name, title, watch)
    return FitResult(history[-1] if history else {}, history, job["checkpoints"])


def _run(job: dict[str, Any], compute: TrainCompute, name: str, title: str, watch: Watch) -> list[dict[str, Any]]:
    """The history, from rank 0. Ray's own storage holds nothing and goes away: checkpoints are ours."""
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError

    from nightseg.cluster.rendezvous import torch_config

    on_gpu = compute.gpus_per_worker > 0
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if on_gpu else {})
    scaling = ScalingConfig(num_workers=compute.workers, use_gpu=on_gpu, resources_per_worker=resources)
    failures = FailureConfig(max_failures=compute.max_failures)
    with temporary_folder() as storage:
        trainer = _lean_trainer(_policies(job, scaling, failures, compute))(
            _work,
            train_loop_config=job,
            torch_config=torch_config("nccl" if on_gpu else "gloo", folder=storage, is_local=cluster.is_local()),
            scaling_config=scaling,
            run_config=RunConfig(
                name=_shown(name),
                storage_path=str(storage),
                failure_config=failures,
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            returned = trainer.fit().return_value
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            raise _failure(job, title, error, watch, compute.workers) from error
    if returned is None:
        raise _failure(job, title, None, watch, compute.workers)
    return list(returned)


def _policies(job: dict[str, Any], scaling: Any, failures: Any, compute: TrainCompute) -> dict[str, Any]:
    """What decides on the number of workers and on restarts, as the controller of Ray Train takes it."""
    actor, key, checkpoints = job["actor"], job["key"], job["checkpoints"]
    grows = cluster.may_grow()

    def say(message: str) -> None:
        actor.say.remote(key, message)

    def gives_up(error: UserError) -> None:
        import ray

        ray.get(actor.fail.remote(key, Failure(error, str(error), "")))

    staffing = nodes.Staffing(
        compute.workers,
        min(compute.min_workers, compute.workers),
        {"CPU": compute.cpus_per_worker, "GPU": compute.gpus_per_worker},
        say,
        _patience(grows),
        ", and more are started on demand" if grows else "",
    )
    scaled = scaling_policy(
        scaling,
        staffing,
        newest=checkpoints.newest_name,
        resizes=lambda: actor.resizes.remote(key),
        gives_up=gives_up,
    )
    return {"scaling_policy": scaled, "failure_policy": failure_policy(failures)}


def _patience(grows: bool) -> float:
    """Seconds that a training waits for the workers that it cannot have yet, the first time that it starts."""
    if grows and not nodes.has_lost():
        return nodes.SECONDS_FOR_NODES
    return nodes.SECONDS_FOR_REPLACEMENT if grows else nodes.SECONDS_TO_SETTLE


def _lean_trainer(policies: dict[str, Any]) -> type[Any]:
    """TorchTrainer without helpers that start a process each (2 s of a core) and do nothing here.

    We hand over no Ray dataset, and on a local Ray nothing outlives the driver, so nothing is left to clean up behind
    it. Should a later Ray name them otherwise, they are merely back.

    It waits for the controller in short steps, so that it can be interrupted in any thread. Ray's own way, in the main
    thread alone, answers Ctrl-C by ending the process with status 0.
    """
    import ray
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.constants import get_env_vars_to_propagate

    idle = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if cluster.is_local() else set())

    class LeanTrainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in idle]

        def _initialize_and_run_controller(self, **arguments: Any) -> Any:
            here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
            environment = {"RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0", **get_env_vars_to_propagate()}
            options = {"num_cpus": 0, "label_selector": here, "runtime_env": {"env_vars": environment}}
            controller = ray.remote(**options)(controller_class()).remote(**arguments | policies)
            ending = controller.run.remote()
            with waiting():
                try:
                    while not ray.wait([ending], timeout=SECONDS_BETWEEN_UPDATES)[0]:
                        pass
                except BaseException:
                    with suppress(ray.exceptions.RayError):  # its process ends before it can answer
                        ray.get(controller.abort.remote(), timeout=SECONDS_TO_ABORT)
                    raise
            ray.get(ending)
            return ray.get(controller.get_result.remote())

    return LeanTrainer


def _work(job: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What every worker runs. None: the progress actor knows the user's mistake that ended the training."""
    import ray

    actor, key = job["actor"], job["key"]
    session = _WorkerSession(job["checkpoints"].folder, actor, key, job["workers"])
    if ray.get(actor.begin.remote(key, session.rank)) is not None:
        return None  # Ray started the workers again, but the mistake is still there
    torch.set_num_threads(job["threads"])
    try:
        job["loop"](session, job["settings"])
        session.tell()
    except Exception as error:
        user_error = error if isinstance(error, UserError) else None
        failure = Failure(user_error, f"{type(error).__name__}: {error}", traceback.format_exc())
        ray.get(actor.fail.remote(key, failure))
        if user_error and session.world_size == 1:
            return None
        raise  # the other workers wait in a collective; only a failed worker makes Ray end them
    return session.history


def _failure(job: dict[str, Any], title: str, error: BaseException | None, watch: Watch, num_workers: int) -> Exception:
    """The error to raise: what a worker told the progress actor, else what Ray knows."""
    import ray

    try:
        failure: Failure | None = ray.get(job["actor"].read.remote(job["key"]), timeout=10.0).failure
    except ray.exceptions.RayError:  # the cluster went down, and the actor with it
        failure = None
    less = f"{_LESS}{', or lower compute.train.workers' if num_workers > 1 else ''}"
    has_died = failure is None or _has_died(error)  # what other workers write then is about the connection they lost
    if failure is not None and failure.user_error is not None:
        raised: Exception = failure.user_error
    elif short := shortage("\n".join(_texts(error, failure))) or (has_died and shortage(watch.deaths())):
        raised = RuntimeError(f"{title}: {mended(short, less)}. A rerun goes on after the last checkpoint")
    elif _has_died(error):
        raised = RuntimeError(
            f"{title}: a worker process died, and neither Ray nor the kernel of this machine says that memory ran out: "
            f"somebody killed it, or it crashed; on another machine it may be memory all the same. {less}. A rerun "
            "goes on after the last checkpoint"
        )
    else:
        raised = RuntimeError(f"{title}: {failure.message if failure else _reason(error)}")
    if failure is not None:
        raised.add_note(f"In the worker:\n{failure.trace}")
    return raised


def _texts(error: BaseException | None, failure: Failure | None) -> Iterator[str]:
    """All that is known of a failure: of the loop, of Ray Train's error, of the workers' that it wraps."""
    if failure is not None:
        yield failure.message
    for one in (error, *getattr(error, "worker_failures", {}).values()):
        yield f"{type(one).__name__}: {one} {getattr(one, 'health_check_failure', '')}"


def _has_died(error: BaseException | None) -> bool:
    """Whether a worker's process ended, rather than its loop with an exception."""
    import ray

    causes = getattr(error, "worker_failures", {}).values()
    return any(
        isinstance(getattr(cause, "health_check_failure", cause), ray.exceptions.RayActorError) for cause in causes
    )


def _reason(error: BaseException | None) -> str:
    """Ray's error as a line: its last one, because its first announce and its middle is a traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "the training ended without a result"


# -- checkpoints -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds. `report` counts from 1; `history` has the metrics of every report up to it."""

    report: int
    state: dict[str, Any]
    history: list[dict[str, Any]]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a folder, local or remote: written whole or not at all, checked when read. Picklable.

    Ray Train can keep checkpoints too, but its list of them (`checkpoint_manager_snapshot.json`, Ray 2.60) is
    overwritten in place: a kill between truncating and writing leaves a run that never starts again, and so does a
    damaged checkpoint or another version of Ray. Files that carry their own hash need no list.
    """

    folder: Location

    def save(self, report: int, state: Mapping[str, Any], history: list[dict[str, Any]]) -> None:
        """Writes a checkpoint, then forgets all but the last two.

        `state`: tensors, numbers, strings, None and dicts, lists, tuples of them: what `weights_only` can read back.
        Raises TypeError at the first checkpoint for anything else, rather than when a resume needs it.
        """
        stream = io.BytesIO()
        torch.save({"report": report, "state": dict(state), "history": history}, stream)
        data = stream.getbuffer()
        if not self._names():
            try:
                torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                first_line = str(error).partition("\n")[0]
                raise TypeError(f"a training state holds what a checkpoint may not hold: {first_line}") from error
        place = self.folder / f"report-{report:08d}"
        (place / "state.pt").write_bytes(data)
        (place / "state.sha256").write_bytes(sha256_of(data).encode())  # last: it makes the checkpoint count
        for old in self._names()[:-NUM_KEPT]:
            (self.folder / old).delete()

    def newest(self, warn: Callable[[str], None] = _LOG.warning) -> Snapshot | None:
        """The newest whole checkpoint, tensors on the CPU; None without any. Each damaged one is told to `warn`.

        Raises UserError when there are checkpoints but none is whole: starting anew in silence would hide a loss.
        """
        damaged = self._names()[::-1]
        for name in damaged:
            snapshot = self._read(name, warn)
            if snapshot is not None:
                return snapshot
        if damaged:
            raise UserError(
                f"{self.folder}: every checkpoint is damaged ({', '.join(damaged)})",
                cure="delete this folder to train from the start",
            )
        return None

    def newest_name(self) -> str | None:
        """Of the newest checkpoint; None without any. It is not looked at."""
        return next(iter(self._names()[::-1]), None)

    def _read(self, name: str, warn: Callable[[str], None]) -> Snapshot | None:
        place = self.folder / name
        try:
            data = (place / "state.pt").read_bytes()
            if (place / "state.sha256").read_bytes().decode("ascii", "replace").strip() != sha256_of(data):
                raise ValueError("its content does not match its hash")
            body = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return Snapshot(int(body["report"]), body["state"], body["history"])
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            warn(f"checkpoint {place} is damaged and left out: {error}")
            return None

    def _names(self) -> list[str]:
        """Folders of finished checkpoints, oldest first. One whose writer was killed has no hash and does not count."""
        with suppress(FileNotFoundError):
            files = (entry.name.partition("/") for entry in self.folder.list(recursive=True))
            return sorted(name for name, _, file in files if file == "state.sha256" and name.startswith("report-"))
        return []
