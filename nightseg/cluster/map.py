"""Passes over rows on Ray Data: a pool of actors that each load their worker once and finish one shard after another.

Shards are cut by us, not by Ray, and every finished one is on disk before the driver hears of it. So a pass can die
at any instant and be repeated: finished shards are skipped, and a shard that is done twice (its actor died between
writing and answering) has the same name both times. Results are exactly once because their names are.

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
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import pyarrow as pa

from nightseg.cluster import ray as cluster
from nightseg.cluster.quiet import hide_ray_data
from nightseg.cluster.tables import blocks, shards_of
from nightseg.errors import UserError
from nightseg.progress import Progress
from nightseg.storage import Attempt, Location, ShardRecord

RETRIES_OF_A_SHARD = 3
"""How often a shard is done again because its process died. Ray's default is forever: a file that crashes a decoder,
or a batch that does not fit into memory, would keep a cluster busy until someone looks."""


class ShardWorker(Protocol):
    """What runs in an actor. `__init__(**arguments)` loads models once; a call does one shard."""

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        """Small tables out, by name; anything big is written under `folder` first, with names that the rows fix."""


def map_shards(
    rows: pa.Table,
    worker: type[ShardWorker],
    arguments: Mapping[str, Any],
    *,
    attempt: Attempt,
    shard_rows: int,
    actors: int,
    cpus_per_actor: float,
    gpus_per_actor: float,
    progress: Progress,
    title: str,
    unit: str = "frames",
) -> list[ShardRecord]:
    """Does every shard of `rows` that the attempt has not finished, and returns the records of all, in order.

    Args:
        rows: plain columns of paths and small values; cut into shards of `shard_rows` in row order.
        worker, arguments: `worker(**arguments)` is built once in every actor, when its first shard arrives.
        attempt: where shards are written; its finished ones are skipped.
        actors: most actors at a time; fewer start when there are fewer open shards.
        cpus_per_actor, gpus_per_actor: what Ray reserves for each; PyTorch gets int(cpus) threads, at least one.

    Raises:
        UserError: raised by a worker, or the cluster is too small for the actors (Ray would wait forever).
        RuntimeError: any other error of a worker, with its message; the worker's traceback is attached as a note.
    """
    num_shards = attempt.plan(rows.num_rows, shard_rows)
    records = {index: record for index in range(num_shards) if (record := attempt.shard(index)) is not None}
    todo = [index for index in range(num_shards) if index not in records]
    with progress.task(title, rows.num_rows, unit) as task:
        task.advance(sum(record.rows_in for record in records.values()))
        if actors == 0:
            here = worker(**arguments) if todo else None
            for index in todo:
                assert here is not None
                part, started = rows.slice(index * shard_rows, shard_rows), time.monotonic()
                seconds = time.monotonic() - started
                records[index] = attempt.write_shard(
                    index, here(part, attempt.folder), rows_in=part.num_rows, seconds=seconds
                )
                task.advance(part.num_rows)
        elif todo:
            cluster.connect()
            actors = min(actors, len(todo))
            _check_room(actors, cpus_per_actor, gpus_per_actor, progress)
            actor = {"worker": worker, "arguments": dict(arguments), "attempt": attempt, "title": title}
            tables = list(blocks(rows, todo, shard_rows))
            for record in _run(tables, actor, actors, cpus_per_actor, gpus_per_actor):
                records[record.index] = record
                task.advance(record.rows_in)
    missing = [index for index in range(num_shards) if index not in records]
    assert not missing, f"{title}: Ray finished without shards {missing[:5]}"
    return [records[index] for index in range(num_shards)]


def _check_room(actors: int, cpus: float, gpus: float, progress: Progress) -> None:
    for resource, each in (("CPU", cpus), ("GPU", gpus)):
        key = f"compute.map.actors or compute.map.{resource.lower()}s_per_actor"
        cluster.require(resource, count=actors, each=each, what="actors", recipe_key=key, say=progress.say)


def _run(tables: list[pa.Table], actor: dict[str, Any], actors: int, cpus: float, gpus: float) -> Iterator[ShardRecord]:
    """Records as shards finish, in any order. Actors end with the iterator, also when it ends with an error."""
    import ray

    hide_ray_data()
    title = actor["title"]
    results = _pass(tables, actor, actors, cpus, gpus)
    batches = iter(results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0))
    failure = None
    try:
        for batch in batches:
            for outcome in batch["outcome"].to_pylist():
                yield _record(title, *pickle.loads(outcome))  # noqa: S301 (made by our own actor)
    except ray.exceptions.RayError as error:
        failure = _failure(title, error)
    finally:
        batches.close()
    if failure is not None:
        # Ray's error knows every frame it went through, and so the actors. Were it the cause of ours, they would keep
        # their CPUs for as long as somebody looks at the error.
        del results, batches
        gc.collect()
        raise failure


def _pass(tables: list[pa.Table], actor: dict[str, Any], actors: int, cpus: float, gpus: float) -> Any:
    """The pass as a Ray dataset, not yet started: a block in, a row with the pickled outcome out."""
    import ray.data

    with warnings.catch_warnings():
        # The retries have no other way in (Ray 2.60); pyproject.toml holds Ray below the version that takes this away.
        warnings.simplefilter("ignore", ray.util.annotations.RayDeprecationWarning)
        # from_blocks, not from_arrow, which first starts a task a block to count the rows that we have here.
        return ray.data.from_blocks(tables).map_batches(
            _ShardActor,
            fn_constructor_kwargs=actor,
            batch_size=None,  # a block is a shard
            batch_format="pyarrow",
            zero_copy_batch=True,
            # Two shards in flight hide the way to the driver and back, and leave the rest to whichever actor is free.
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
            num_cpus=cpus,
            num_gpus=gpus or None,
            max_task_retries=RETRIES_OF_A_SHARD,
        )


def _record(title: str, record: ShardRecord | None, failure: tuple[bool, str, str] | None) -> ShardRecord:
    """The record, or the worker's error as one of this process."""
    if failure is None:
        assert record is not None
        return record
    is_user_error, message, trace = failure
    error = UserError(message) if is_user_error else RuntimeError(f"{title}: {message}")
    error.add_note(f"In the worker:\n{trace}")
    raise error


class _ShardActor:
    """Builds the worker when the first shard arrives, so that an error in it is an answer and not a dead actor."""

    def __init__(self, worker: type[ShardWorker], arguments: dict[str, Any], attempt: Attempt, title: str) -> None:
        self._worker_class = worker
        self._arguments = arguments
        self._attempt = attempt
        self._title = title
        self._worker: ShardWorker | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        outcomes: list[tuple[ShardRecord | None, tuple[bool, str, str] | None]] = []
        for index, rows in shards_of(batch):
            try:
                outcomes.append((self._finish(index, rows), None))
            except Exception as error:
                message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                outcomes.append((None, (isinstance(error, UserError), message, traceback.format_exc())))
        return pa.table({"outcome": pa.array([pickle.dumps(outcome) for outcome in outcomes], pa.binary())})

    def _finish(self, index: int, rows: pa.Table) -> ShardRecord:
        finished = self._attempt.shard(index)  # by an actor that died before it could answer
        if finished is not None:
            return finished
        if self._worker is None:
            self._worker = self._worker_class(**self._arguments)
            _set_torch_threads()
        started = time.monotonic()
        tables = self._worker(rows, self._attempt.folder)
        return self._attempt.write_shard(index, tables, rows_in=rows.num_rows, seconds=time.monotonic() - started)


def _set_torch_threads() -> None:
    """As many threads as CPUs reserved (Ray leaves that in OMP_NUM_THREADS), if this worker uses PyTorch at all."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS") or 1)))


def _failure(title: str, error: BaseException) -> RuntimeError:
    """What Ray says, in one line; its traceback as a note."""
    import ray

    if getattr(error, "actor_init_failed", False):
        last_line = str(error).strip().rpartition("\n")[2].strip()
        reason = f"an actor cannot start: {last_line}. Every node needs this version of nightseg and its packages"
    elif isinstance(error, ray.exceptions.RayActorError | ray.exceptions.WorkerCrashedError):
        reason = (
            f"the process of a worker died {RETRIES_OF_A_SHARD + 1} times on the same shard: it ran out of memory "
            "(lower compute.map.batch or compute.map.actors), was killed, or a file crashed a decoder. Finished "
            "shards are kept"
        )
    else:
        innermost = error
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        first_line = str(innermost).strip().partition("\n")[0]
        reason = f"{type(innermost).__name__}: {first_line}"
    failure = RuntimeError(f"{title}: {reason}")
    failure.add_note("".join(traceback.format_exception(error)))
    return failure
