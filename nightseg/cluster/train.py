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
the same call after the driver was killed, because the folder is the same.

Tests need no Ray: `loop(LocalSession(Location.of(tmp_path)), settings)` runs in this process, with real checkpoints;
a second call with the same folder resumes. `LocalSession.history` holds what was reported, `.done` the progress.

Reports are few (one an epoch): each is a barrier of all workers. `progress` may be called in every step.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nightseg.cluster import ray as cluster
from nightseg.cluster.checkpoints import Checkpoints
from nightseg.cluster.progress_actor import SECONDS_BETWEEN_LOOKS, Failure, board, shown
from nightseg.errors import UserError
from nightseg.progress import Progress
from nightseg.storage import Location


@dataclass(frozen=True)
class Workers:
    """How a training is spread: `count` processes with `cpus` and `gpus` each; `max_failures` deaths are survived."""

    count: int
    cpus: float
    gpus: float
    max_failures: int


class Session(Protocol):
    """What a training loop sees of the cluster. Every worker has one; all must make the same calls of `report`."""

    rank: int
    world_size: int
    device: torch.device

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module on this worker's device, DistributedDataParallel if there are several workers."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of the tensor over all workers, on this worker's device; the tensor itself if there is one worker."""

    def restore(self) -> dict[str, Any] | None:
        """The state of the newest whole checkpoint (tensors on the CPU), or None at the very start."""

    def report(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> None:
        """A barrier. Notes the metrics, and keeps rank 0's state as a checkpoint if it is given."""

    def progress(self, done: int, **figures: float) -> None:
        """`done` units of work are finished in all, not since the last call. Cheap; never waits."""


class LocalSession:
    """One worker in this process, for tests and small work: no Ray, the same checkpoints."""

    def __init__(self, folder: Location, device: torch.device | str = "cpu") -> None:
        self.rank = 0
        self.world_size = 1
        self.device = torch.device(device)
        self.history: list[dict[str, Any]] = []
        self.done = 0
        self.figures: dict[str, float] = {}
        self._checkpoints = Checkpoints(folder)

    def wrap(self, module: nn.Module) -> nn.Module:
        return module.to(self.device)

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def restore(self) -> dict[str, Any] | None:
        snapshot = self._checkpoints.newest()
        if snapshot is None:
            return None
        self.history = snapshot.history
        return snapshot.state

    def report(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> None:
        self.history.append(dict(metrics))
        if state is not None:
            self._checkpoints.save(len(self.history), state, self.history)

    def progress(self, done: int, **figures: float) -> None:
        self.done = done
        self.figures.update(figures)


def exchanging(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with its gradients averaged over the process group; they lie in the buffers that are exchanged."""
    devices = [device] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


class _WorkerSession:
    """One worker of a cluster. Rank 0 keeps the history, the checkpoints and the board."""

    def __init__(self, checkpoints: Checkpoints, board: Any, key: str) -> None:
        import ray.train.torch

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self.history: list[dict[str, Any]] = []
        self._checkpoints = checkpoints
        self._board = board
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

    def restore(self) -> dict[str, Any] | None:
        snapshot = self._checkpoints.newest(self._say)
        if snapshot is None:
            return None
        self.history = snapshot.history
        return snapshot.state

    def report(self, metrics: Mapping[str, float], state: Mapping[str, Any] | None) -> None:
        import ray.train

        self.history.append(dict(metrics))
        # The barrier comes first: no worker can still be in `restore` when a newer checkpoint appears.
        ray.train.report(dict(metrics))
        if self.rank == 0 and state is not None:
            self._checkpoints.save(len(self.history), state, self.history)

    def progress(self, done: int, **figures: float) -> None:
        if self.rank == 0:
            held = self._untold[1] if self._untold is not None else {}
            self._untold = (done, held | figures)  # what an epoch ended with is not lost to the next step
            if time.monotonic() - self._told >= SECONDS_BETWEEN_LOOKS:
                self.tell()

    def _say(self, message: str) -> None:
        if self.rank == 0:
            self._board.say.remote(self._key, message)

    def tell(self) -> None:
        """What `progress` held back goes to the board; nobody waits for an answer."""
        if self._untold is not None:
            self._board.advance.remote(self._key, *self._untold)
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
            raise RuntimeError(f"{damaged[0]}; run the same command again to train the rest anew")
        if snapshot is None:
            raise RuntimeError(f"the training in {self.checkpoints.folder} ended without reporting a state")
        return snapshot.state


def fit(
    loop: Callable[[Session, dict[str, Any]], None],
    settings: dict[str, Any],
    *,
    folder: Location,
    name: str,
    workers: Workers,
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
        workers: what to reserve. PyTorch gets int(cpus) threads, at least one. gloo on CPUs, NCCL on GPUs.
        total, unit: of `Session.progress`, for the display.

    Raises:
        UserError: raised in the loop (never tried again), or the cluster is too small (Ray would wait forever).
        RuntimeError: the loop failed otherwise, or its process died, more than `max_failures` times.
    """
    cluster.connect()
    for resource, each in (("CPU", workers.cpus), ("GPU", workers.gpus)):
        key = f"compute.train.workers or compute.train.{resource.lower()}s_per_worker"
        what = "training workers"
        cluster.require(resource, count=workers.count, each=each, what=what, recipe_key=key, say=progress.say)
    job = {
        "loop": loop,
        "settings": settings,
        "checkpoints": Checkpoints(folder / name),
        "threads": max(1, int(workers.cpus)),
        "board": board(),
        "key": uuid.uuid4().hex,
    }
    with progress.task(title, total, unit) as task, shown(job["board"], job["key"], task, progress, title):
        history = _run(job, workers, name, title)
    return FitResult(history[-1] if history else {}, history, job["checkpoints"])


def _run(job: dict[str, Any], workers: Workers, name: str, title: str) -> list[dict[str, Any]]:
    """The history, from rank 0. Ray's own storage holds nothing and goes away: checkpoints are ours."""
    import ray
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig

    resources = {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
    with tempfile.TemporaryDirectory(prefix="nightseg-train-", ignore_cleanup_errors=True) as storage:
        trainer = _lean_trainer()(
            _work,
            train_loop_config=job,
            torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers.count, use_gpu=workers.gpus > 0, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage,
                failure_config=FailureConfig(max_failures=workers.max_failures),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        try:
            with _interrupts_stay_interrupts():
                returned = trainer.fit().return_value
        except (TrainingFailedError, ray.exceptions.RayError) as error:
            raise _failure(job, title, error) from error
    if returned is None:
        raise _failure(job, title, None)
    return list(returned)


def _lean_trainer() -> type[Any]:
    """TorchTrainer without helpers that start a process each (2 s of a core) and do nothing here.

    We hand over no Ray dataset, and on a local Ray nothing outlives the driver, so nothing is left to clean up behind
    it. Should a later Ray name them otherwise, they are merely back.
    """
    from ray.train.torch import TorchTrainer

    idle = {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if cluster.is_local() else set())

    class LeanTrainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            return [one for one in super()._create_default_callbacks() if type(one).__name__ not in idle]

    return LeanTrainer


def _work(job: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What every worker runs. None: the user's mistake that ended the training is on the board."""
    import ray

    board, key = job["board"], job["key"]
    session = _WorkerSession(job["checkpoints"], board, key)
    if ray.get(board.begin.remote(key, session.rank)) is not None:
        return None  # Ray started the workers again, but the mistake is still there
    torch.set_num_threads(job["threads"])
    try:
        job["loop"](session, job["settings"])
        session.tell()
    except Exception as error:
        is_user_error = isinstance(error, UserError)
        message = str(error) if is_user_error else f"{type(error).__name__}: {error}"
        ray.get(board.fail.remote(key, Failure(is_user_error, message, traceback.format_exc())))
        if is_user_error and session.world_size == 1:
            return None
        raise  # the other workers wait in a collective; only a failed worker makes Ray end them
    return session.history


def _failure(job: dict[str, Any], title: str, error: BaseException | None) -> Exception:
    """The error to raise: what a worker wrote on the board, else what Ray knows."""
    import ray

    try:
        failure: Failure | None = ray.get(job["board"].read.remote(job["key"]), timeout=10.0).failure
    except ray.exceptions.RayError:  # the cluster went down, and the board with it
        failure = None
    if failure is not None and failure.is_user_error:
        raised: Exception = UserError(failure.message)
    elif _has_died(error):  # what other workers wrote then is about the connection they lost
        raised = RuntimeError(f"{title}: a worker process died: it ran out of memory, was killed, or crashed")
    else:
        raised = RuntimeError(f"{title}: {failure.message if failure else _reason(error)}")
    if failure is not None:
        raised.add_note(f"In the worker:\n{failure.trace}")
    return raised


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


@contextmanager
def _interrupts_stay_interrupts() -> Iterator[None]:
    """Ray Train answers Ctrl-C by ending the process with status 0, and leaves its handler behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)
