"""Passes over rows: shards that a worker does one after another, in this process or in a pool of actors of Ray Data.

Shards are cut by us, not by Ray, and every finished one is on disk before the driver hears of it. So a pass can die
at any instant and be repeated: finished shards are skipped, and a shard that is done twice (its actor died between
writing and answering) has the same name both times. Results are exactly once because their names are, and the same
however many actors there are, none included.

A pass goes on while one node is left: whenever Ray loses a node, the shards that are not done are given to actors on
those that are there.

Ray Data's own checkpointing is not used: with blocks from memory it writes rows twice without a word (Ray 2.60).
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol, Required, TypedDict, Unpack

import pyarrow as pa

from nightseg.cluster import nodes
from nightseg.cluster import ray as cluster
from nightseg.cluster.settings import MapCompute
from nightseg.cluster.shortage import Watch, mended, shortage
from nightseg.cluster.turn import waiting
from nightseg.errors import UserError
from nightseg.progress import Progress, Task
from nightseg.storage import Attempt, Location, ShardRecord, Shards

RETRIES_OF_A_SHARD = 3
"""How often a shard is done again because its process died. Ray's default is forever: a file that crashes a decoder,
or a batch that does not fit into memory, would keep a cluster busy until someone looks."""

PASSES_IN_VAIN: Final = 3
"""How often what is left is given to new actors although nothing was done since: each time Ray has lost something."""

SECONDS_UNTIL_KNOWN: Final = 1.5 * nodes.SECONDS_UNTIL_KNOWN

_LESS = "Lower compute.map.batch or compute.map.actors (the batch or the actors of a single command)"

SHARD = "nightseg_shard"
"""Column that tells an actor which shard its rows are; it exists only between driver and actor."""


class ShardWorker(Protocol):
    """`__init__(**arguments)` loads models once; a call does one shard.

    A worker with an attribute `advance` may call it with a number of rows as it finishes them, for the display. In this
    process that is `Task.advance`; in an actor it stays what the worker made it.
    """

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        """Small tables out, by name; anything big is written under `folder` first, with names that the rows fix."""


class Work(TypedDict, total=False):
    """What every pass is given, and hands on whole."""

    attempt: Required[Attempt]  # where shards are written; its finished ones are skipped
    compute: Required[MapCompute]  # who does it
    progress: Required[Progress]  # who watches
    max_bad_fraction: float  # of the rows may be quarantined; default 1


def map_shards(
    rows: pa.Table,
    worker: Callable[..., ShardWorker],
    arguments: Mapping[str, Any],
    *,
    title: str,
    **work: Unpack[Work],
) -> Shards:
    """Does every shard of `rows` that the attempt has not finished, and returns all of them.

    Args:
        rows: plain columns of paths and small values; cut into shards of `compute.shard_rows` in row order.
        worker, arguments: `worker(**arguments)` is built once in every actor, when its first shard arrives.
        work: `actors` 0 of its `compute` does everything in this process, without Ray. Otherwise the most actors at a
            time; fewer start when there are fewer open shards. PyTorch gets int(cpus_per_actor) threads in an actor, at
            least one.

    Raises:
        UserError: raised by a worker, or the cluster is too small for the actors (Ray would wait forever), or no node
            with room for one of them has come for half an hour.
        RuntimeError: any other error of an actor's worker, with its message; its traceback is attached as a note. In
            this process it is what the worker raised.
    """
    attempt, compute, progress = work["attempt"], work["compute"], work["progress"]
    num_shards = attempt.plan(rows.num_rows, compute.shard_rows)
    records = {index: record for index in range(num_shards) if (record := attempt.shard(index)) is not None}
    with progress.task(title, rows.num_rows, "frames") as task:
        task.advance(sum(record.rows_in for record in records.values()))
        shards = _Shards(worker, dict(arguments), attempt)
        todo = [index for index in range(num_shards) if index not in records]
        if todo and compute.actors:
            shards.threads = max(1, int(compute.cpus_per_actor))
            done = _on_what_is_left(shards, rows, todo, compute, progress, task, title)
        else:
            done = (_here(shards, index, shard_slice(rows, index, compute.shard_rows), task, title) for index in todo)
        for record in done:
            records[record.index] = record
    missing = [index for index in range(num_shards) if index not in records]
    assert not missing, f"{title}: Ray finished without shards {missing[:5]}"
    ordered = tuple(records[index] for index in range(num_shards))
    return Shards(attempt, ordered, work.get("max_bad_fraction", 1.0))


class _Shards:
    """Builds the worker when the first shard arrives, and does shards that are not there yet. Picklable before."""

    def __init__(self, worker: Callable[..., ShardWorker], arguments: dict[str, Any], attempt: Attempt) -> None:
        self._worker_class = worker
        self._arguments = arguments
        self._attempt = attempt
        self._worker: Any = None
        self.threads: int | None = None  # of PyTorch, if the worker uses it; None: as many as it has

    def finished(self, index: int) -> ShardRecord | None:
        return self._attempt.shard(index)

    def finish(self, index: int, rows: pa.Table, advance: Callable[[int], None] | None = None) -> ShardRecord:
        finished = self.finished(index)  # by an actor that died before it could answer
        if finished is not None:
            return finished
        if self._worker is None:
            self._worker = self._worker_class(**self._arguments)
            torch = sys.modules.get("torch")
            if torch is not None and self.threads is not None:
                torch.set_num_threads(self.threads)
        if advance is not None and hasattr(self._worker, "advance"):
            self._worker.advance = advance
        started = time.monotonic()
        tables = self._worker(rows, self._attempt.folder)
        return self._attempt.write_shard(index, tables, rows_in=rows.num_rows, seconds=time.monotonic() - started)


def _here(shards: _Shards, index: int, rows: pa.Table, task: Task, title: str) -> ShardRecord:
    shown = 0

    def advance(count: int = 1) -> None:
        nonlocal shown
        shown += count
        task.advance(count)

    try:
        record = shards.finish(index, rows, advance)
    except (MemoryError, RuntimeError) as error:
        short = shortage(f"{type(error).__name__}: {error}")
        if short is None:
            raise
        raise RuntimeError(f"{title}: {mended(short, _LESS)}. Finished shards are kept") from error
    task.advance(record.rows_in - shown)
    return record


# -- tables between driver and actors --------------------------------------------------------------------------------


def shard_slice(rows: pa.Table, index: int, shard_rows: int) -> pa.Table:
    """Rows [index * shard_rows, (index + 1) * shard_rows): the same rows in every run, whoever works on them."""
    return rows.slice(index * shard_rows, shard_rows)


def blocks(rows: pa.Table, indices: Iterable[int], shard_rows: int) -> Iterator[pa.Table]:
    """One contiguous block per shard, each row marked with its shard's index (int64).

    Copied row by row, because a slice of a table drags all of the table's bytes along when it is pickled.
    """
    for index in indices:
        part = shard_slice(rows, index, shard_rows)
        block = part.take(pa.array(range(part.num_rows), pa.int64())).combine_chunks()
        yield block.append_column(SHARD, pa.array([index] * block.num_rows, pa.int64()))


def shards_of(batch: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """The shards of a batch, in order, without the mark: one as `blocks` cuts them, but Ray may join blocks."""
    for index in sorted(set(batch[SHARD].to_pylist())):
        mine = pa.compute.equal(batch[SHARD], index)
        yield index, batch.filter(mine).drop_columns([SHARD])


# -- actors ----------------------------------------------------------------------------------------------------------


def _on_what_is_left(
    shards: _Shards,
    rows: pa.Table,
    todo: list[int],
    compute: MapCompute,
    progress: Progress,
    task: Task,
    title: str,
) -> Iterator[ShardRecord]:
    """Records as shards finish, in any order, whichever nodes Ray loses meanwhile."""
    left, in_vain = dict.fromkeys(todo), 0
    while left:
        before = len(left)
        try:
            tables = list(blocks(rows, left, compute.shard_rows))
            for record in _on_actors(shards, tables, compute, progress, title):
                if record.index in left:  # Ray does lost work again, and tells of it again
                    del left[record.index]
                    task.advance(record.rows_in)
                    yield record
            return
        except _Lost as error:
            lost = error
        for record in filter(None, map(shards.finished, list(left))):  # by actors that died before they could answer
            del left[record.index]
            task.advance(record.rows_in)
            yield record
        in_vain = 0 if len(left) < before else in_vain + 1
        if in_vain and lost.otherwise is not None:
            raise lost.otherwise
        if in_vain >= PASSES_IN_VAIN:
            raise RuntimeError(
                f"{title}: nodes were lost {in_vain} times in a row, and nothing was done in between: {lost.reason}. "
                "Finished shards are kept; give the same command when the cluster is whole"
            )
        if left:
            progress.say(_goes_on(title, lost, len(left), compute))


def _goes_on(title: str, lost: _Lost, num_left: int, compute: MapCompute) -> str:
    there, known, reason = nodes.alive(), lost.nodes, lost.reason
    room = nodes.fitting(there.values(), {"CPU": compute.cpus_per_actor, "GPU": compute.gpus_per_actor})
    actors = f"{room} actor{'s' * (room != 1)}" if room else "actors as soon as there is a node with room for one"
    goes = f"{num_left} shard{'s' * (num_left != 1)} go on" if num_left != 1 else "1 shard goes on"
    gone = len(known - there.keys())
    return f"{title}: {nodes.gone_words(gone, len(known)) if gone else reason}; {goes} with {actors}"


class _Lost(Exception):  # noqa: N818 (what is the case)
    """Ray lost something, and nothing speaks against doing the rest again. `nodes`: those that were there before."""

    def __init__(self, reason: str, known: set[str], otherwise: Exception | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.nodes = known
        self.otherwise = otherwise  # what it is when it happens again, and no node is known to be gone


def _on_actors(
    shards: _Shards, tables: list[pa.Table], compute: MapCompute, progress: Progress, title: str
) -> Iterator[ShardRecord]:
    """Records as shards finish, in any order. Actors end with the iterator, also when it ends with an error."""
    cluster.connect()
    compute = compute.model_copy(update={"actors": min(compute.actors, len(tables))})
    cpus, gpus = compute.cpus_per_actor, compute.gpus_per_actor
    cluster.require("actor", compute.actors, cpus=cpus, gpus=gpus, place="compute.map", say=progress.say)
    cluster.hide_ray_data()
    watch, known = Watch(), set(nodes.alive())
    growth = ", and more are started on demand" if cluster.may_grow() else ""
    idle = nodes.Idle({"CPU": cpus, "GPU": gpus}, lambda message: progress.say(f"{title}: {message}"), growth)
    results = _pass(shards, tables, compute)
    nodes.tell(idle, results.context)
    batches = iter(results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    failure: Exception | None = None
    try:
        while (batch := _next(batches)) is not None:
            for outcome in batch["outcome"].to_pylist():
                yield _record(title, *pickle.loads(outcome))  # noqa: S301 (made by our own actor)
    except _RayFailed as error:
        failure = _judged(title, error.__cause__ or error, watch, known)
    finally:
        batches.close()
    if failure is not None:
        # Ray's error knows every frame it went through, and so the actors. Were it the cause of ours, they would keep
        # their CPUs for as long as somebody looks at the error.
        del results, batches
        gc.collect()
        raise failure


class _RayFailed(Exception):  # noqa: N818 (what is the case)
    """Not the work: what brings it to the actors and back. The error itself is the cause."""


def _next(batches: Iterator[pa.Table]) -> pa.Table | None:
    with waiting():
        try:
            return next(batches, None)
        except Exception as error:  # where a node is gone, Ray Data meets states that it does not expect
            raise _RayFailed(str(error)) from error


def _judged(title: str, error: BaseException, watch: Watch, known: set[str]) -> Exception:
    """What to raise: `_Lost` where the rest may be done again, UserError where no node has come for it.

    A shard that kills its process looks the same as a lost node, until Ray knows that the node is gone.
    """
    if isinstance(error, UserError):
        return UserError(error.what, cure=error.cure)  # without the frames of Ray's
    if isinstance(error, nodes.NodeLost):
        return _Lost(str(error), known)
    is_of_ray = nodes.may_be_a_lost_node(error)
    if not cluster.is_local() and (is_of_ray or nodes.lost(known)):
        until = time.monotonic() + SECONDS_UNTIL_KNOWN
        while not (gone := nodes.lost(known)) and is_of_ray and time.monotonic() < until:
            with waiting():
                time.sleep(nodes.SECONDS_BETWEEN_LOOKS)
        failure = _failure(title, error, watch)
        return _Lost(str(failure), known, None if gone else failure)
    return _failure(title, error, watch)


def _pass(shards: _Shards, tables: list[pa.Table], compute: MapCompute) -> Any:
    """The pass as a Ray dataset, not yet started: a block in, a row with the pickled outcome out."""
    import ray.data

    callbacks = ray.data.DataContext.get_current().custom_execution_callback_classes
    if nodes.watching() not in callbacks:
        callbacks.append(nodes.watching())
    with warnings.catch_warnings():
        # The retries have no other way in (Ray 2.60); pyproject.toml holds Ray below the version that takes this away.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        # from_blocks, not from_arrow, which first starts a task a block to count the rows that we have here.
        return ray.data.from_blocks(tables).map_batches(
            _ShardActor,
            fn_constructor_kwargs={"shards": shards},
            batch_size=None,  # a block is a shard
            batch_format="pyarrow",
            zero_copy_batch=True,
            # Two shards in flight hide the way to the driver and back, and leave the rest to whichever actor is free.
            compute=ray.data.ActorPoolStrategy(size=compute.actors, max_tasks_in_flight_per_actor=2),
            num_cpus=compute.cpus_per_actor,
            num_gpus=compute.gpus_per_actor or None,
            max_task_retries=RETRIES_OF_A_SHARD,
        )


def _record(title: str, outcome: ShardRecord | UserError | str, trace: str) -> ShardRecord:
    """The record, or the worker's error as one of this process."""
    if isinstance(outcome, ShardRecord):
        return outcome
    short = shortage(f"{outcome}")
    told = f"{mended(short, _LESS)}. It said: {outcome}" if short else outcome
    error = outcome if isinstance(outcome, UserError) else RuntimeError(f"{title}: {told}")
    error.add_note(f"In the worker:\n{trace}")
    raise error


class _ShardActor:
    """An error in the worker is an answer and not a dead actor."""

    def __init__(self, shards: _Shards) -> None:
        self._shards = shards
        os.environ["OMP_NUM_THREADS"] = str(shards.threads)  # of what the worker loads later; a node may say otherwise

    def __call__(self, batch: pa.Table) -> pa.Table:
        outcomes: list[tuple[ShardRecord | UserError | str, str]] = []
        for index, rows in shards_of(batch):
            try:
                outcomes.append((self._shards.finish(index, rows), ""))
            except Exception as error:
                told = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                outcomes.append((told, traceback.format_exc()))
        return pa.table({"outcome": pa.array([pickle.dumps(outcome) for outcome in outcomes], pa.binary())})


def _failure(title: str, error: BaseException, watch: Watch) -> RuntimeError:
    """What Ray says, and knows of the processes that died, in one line; its traceback as a note."""
    import ray

    innermost, said = error, f"{type(error).__name__}: {error}"
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
        said += f"\n{type(innermost).__name__}: {innermost}"
    short = shortage(said) or shortage(watch.deaths())
    if short is not None:
        reason = f"{mended(short, _LESS)}. Finished shards are kept"
    elif getattr(error, "actor_init_failed", False):
        last_line = str(error).strip().rpartition("\n")[2].strip()
        reason = f"an actor cannot start: {last_line}. Every node needs this version of nightseg and its packages"
    elif isinstance(error, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError):
        reason = (
            f"the process of a worker died {RETRIES_OF_A_SHARD + 1} times on the same shard, and neither Ray nor the "
            "kernel of this machine says that memory ran out: somebody killed it, or a file crashed a decoder; on "
            f"another machine it may be memory all the same. {_LESS}. Finished shards are kept"
        )
    else:
        first_line = str(innermost).strip().partition("\n")[0]
        reason = f"{type(innermost).__name__}: {first_line}"
    failure = RuntimeError(f"{title}: {reason}")
    failure.add_note("".join(traceback.format_exception(error)))
    return failure
