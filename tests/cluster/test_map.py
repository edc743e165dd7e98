"""Passes over rows: exactly once whatever dies, errors as they were raised, nothing that waits forever."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from nightseg.cluster import map as map_module
from nightseg.cluster import nodes
from nightseg.cluster.map import map_shards
from nightseg.cluster.settings import MapCompute
from nightseg.cluster.shortage import Watch
from nightseg.errors import UserError
from nightseg.progress import SilentProgress
from nightseg.storage import Attempt, Location, Shards, Workspace

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[0, pytest.param(2, marks=pytest.mark.ray)], ids=["in this process", "two actors"])
def actors(request: pytest.FixtureRequest) -> int:
    """How many; with none of them Ray is not even asked for."""
    count: int = request.param
    if count:
        request.getfixturevalue("ray_cluster")
    return count


class Double:
    """Doubles `number`; leaves a file a call under `folder`, so that a test sees who did what."""

    def __init__(self, mishap: str = "", at: int = -1) -> None:
        self.mishap, self.at = mishap, at
        if mishap == "bad model":
            raise UserError("model.safetensors is damaged; train it again")

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        numbers = rows["number"].to_pylist()
        assert rows.column_names == ["number", "text"]
        (folder / f"calls/{numbers[0]:03d}-{os.getpid()}").write_bytes(b"")
        if self.at in numbers:
            self._have_mishap(folder)
        return {"doubles": pa.table({"number": numbers, "double": [2 * number for number in numbers]})}

    def _have_mishap(self, folder: Location) -> None:
        if self.mishap == "dies once" and not (folder / "died").exists():
            (folder / "died").write_bytes(b"")
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mishap == "dies always":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mishap == "user error":
            raise UserError("frame 7 has no label; add one")
        if self.mishap == "bug":
            raise KeyError("colour")
        if self.mishap == "threads":
            import torch

            (folder / "threads").write_bytes(str(torch.get_num_threads()).encode())


class Torch(Double):
    def __init__(self) -> None:
        import torch

        torch.set_num_threads(7)  # as a machine with 7 cores would have it
        super().__init__("threads", 0)


def rows(count: int) -> pa.Table:
    return pa.table({"number": list(range(count)), "text": [f"frame {index}" for index in range(count)]})


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def attempt(request: pytest.FixtureRequest, tmp_path: Path) -> Attempt:
    root = request.getfixturevalue("s3").place(secrets.token_hex(4)) if request.param == "s3" else tmp_path
    return Workspace(root).stage("double", "x", version=1, recipe={}, inputs={}, seed=0).open()


def run(attempt: Attempt, worker: type[Double] = Double, num_rows: int = 23, **changes: Any) -> Shards:
    arguments, progress = changes.pop("arguments", {}), changes.pop("progress", SilentProgress())
    compute = MapCompute(**{"shard_rows": 5, "actors": 2} | changes)
    return map_shards(
        rows(num_rows), worker, arguments, attempt=attempt, compute=compute, progress=progress, title="double x"
    )


def test_shards_know_how_many_bad_rows_they_may_have(attempt: Attempt) -> None:
    work = {"attempt": attempt, "progress": SilentProgress(), "compute": MapCompute(actors=0)}
    assert map_shards(rows(3), Double, {}, title="double", **work).max_bad_fraction == 1.0
    assert map_shards(rows(3), Double, {}, title="double", max_bad_fraction=0.25, **work).max_bad_fraction == 0.25


class Rounds:
    """In the place of actors: does some shards a round, then ends as it is told."""

    def __init__(self, *rounds: tuple[list[int], Exception | None]) -> None:
        self.rounds = list(rounds)
        self.given: list[list[int]] = []

    def __call__(self, shards: Any, tables: list[pa.Table], *rest: Any) -> Iterator[Any]:
        self.given.append([table[map_module.SHARD][0].as_py() for table in tables])
        done, error = self.rounds.pop(0)
        for index, part in (next(map_module.shards_of(table)) for table in tables):
            if index in done:
                record = shards.finish(index, part)
                yield from [record] * done.count(index)
            if -index in done and index:  # written, but its actor died before it could answer
                shards.finish(index, part)
        if error is not None:
            raise error


LOST = map_module._Lost("1 of 3 nodes is gone", {"a", "b", "c"})


def play(attempt: Attempt, monkeypatch: pytest.MonkeyPatch, rounds: Rounds) -> tuple[Shards, Counts]:
    monkeypatch.setattr(map_module, "_on_actors", rounds)
    monkeypatch.setattr("nightseg.cluster.nodes.alive", lambda: {"a": {"CPU": 2.0}})
    progress = Counts()
    return run(attempt, progress=progress), progress


def test_what_a_lost_node_leaves_is_done_by_others_once(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(([0, 0, 1, -2], LOST), ([3], LOST), ([4], None))
    shards, progress = play(attempt, monkeypatch, rounds)
    assert is_complete(shards)
    assert rounds.given == [[0, 1, 2, 3, 4], [3, 4], [4]]
    assert sum(progress.counts) == 23
    assert progress.said == [
        "double x: 2 of 3 nodes are gone; 2 shards go on with 2 actors",
        "double x: 2 of 3 nodes are gone; 1 shard goes on with 2 actors",
    ]


def test_nodes_that_are_lost_again_and_again_end_the_pass(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = Rounds(([0], LOST), *[([], LOST)] * 3)
    with pytest.raises(RuntimeError, match=r"nodes were lost 3 times in a row.*1 of 3 nodes.*Finished shards are kept"):
        play(attempt, monkeypatch, rounds)
    assert len(rounds.given) == 4


def test_without_a_lost_node_a_shard_is_not_given_to_new_actors_for_ever(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    otherwise = map_module._Lost("a worker died", {"a"}, RuntimeError("double x: a worker died 4 times"))
    rounds = Rounds(([0, 1, 2, 3], otherwise), ([], otherwise))
    with pytest.raises(RuntimeError, match="died 4 times"):
        play(attempt, monkeypatch, rounds)
    assert rounds.given == [[0, 1, 2, 3, 4], [4]]


@pytest.mark.parametrize(
    ("is_local", "gone", "error", "expected"),
    [
        (False, {"b"}, "ActorDiedError", "may go on"),
        (False, {"b"}, "KeyError", "may go on"),  # Ray Data's own confusion
        (False, set(), "ActorUnavailableError", "may go on once"),
        (False, set(), "KeyError", "ends"),
        (False, set(), "OutOfMemoryError", "ends"),
        (True, set(), "ActorDiedError", "ends"),
    ],
)
def test_whether_a_pass_goes_on(
    monkeypatch: pytest.MonkeyPatch, is_local: bool, gone: set[str], error: str, expected: str
) -> None:
    from ray import exceptions

    monkeypatch.setattr(map_module, "SECONDS_UNTIL_KNOWN", 0.0)
    monkeypatch.setattr("nightseg.cluster.nodes.lost", lambda known: gone)
    monkeypatch.setattr("nightseg.cluster.ray.is_local", lambda: is_local)
    raised = {
        "ActorDiedError": exceptions.ActorDiedError(),
        "ActorUnavailableError": exceptions.ActorUnavailableError("restarted", bytes(16)),
        "OutOfMemoryError": exceptions.OutOfMemoryError("running low on memory"),
        "KeyError": KeyError("an actor"),
    }
    judged = map_module._judged("score", raised[error], Watch(), {"a", "b"})
    if expected == "ends":
        assert type(judged) is RuntimeError and str(judged).startswith("score: ")
    else:
        assert isinstance(judged, map_module._Lost)
        assert (judged.otherwise is not None) == (expected == "may go on once")


def calls(attempt: Attempt) -> list[str]:
    return [entry.name for entry in (attempt.folder / "calls").list()]


def is_complete(shards: Shards, count: int = 23) -> bool:
    expected = {"number": list(range(count)), "double": [2 * number for number in range(count)]}
    return bool(shards.table("doubles").to_pydict() == expected)


def test_every_row_once_and_in_order(actors: int, attempt: Attempt, capfd: pytest.CaptureFixture[str]) -> None:
    shards = run(attempt, actors=actors)
    assert [(record.index, record.rows_in) for record in shards.records] == [(0, 5), (1, 5), (2, 5), (3, 5), (4, 3)]
    assert is_complete(shards)
    assert len(calls(attempt)) == 5
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")


@pytest.mark.ray
def test_the_shards_of_actors_are_those_of_this_process(ray_cluster: None, tmp_path: Path) -> None:
    files = []
    for count in (0, 1, 2):
        node = Workspace(tmp_path / str(count)).stage("double", "x", version=1, recipe={}, inputs={}, seed=0)
        commit = run(node.open(), actors=count).finish("doubles")
        files.append([(output.path, output.sha256, output.rows) for output in commit.outputs])
        assert (commit.rows_in, commit.rows_out) == (23, 23)
    assert files[0] == files[1] == files[2]


def test_no_actor_needs_no_ray(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from tests.cluster.test_map import Workspace, run
attempt = Workspace(Path({str(tmp_path)!r})).stage("double", "x", version=1, recipe={{}}, inputs={{}}, seed=0).open()
assert run(attempt, actors=0).count("doubles") == 23
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_finished_shards_are_not_done_again(actors: int, attempt: Attempt) -> None:
    run(attempt, actors=actors)
    (attempt.folder / "doubles/part-00002.parquet").delete()
    (attempt.folder / "calls").delete()
    assert is_complete(run(attempt, actors=min(actors, 1)))
    assert [call[:3] for call in calls(attempt)] == ["010"]


def test_nothing_to_do_needs_no_cluster(attempt: Attempt) -> None:
    assert run(attempt, num_rows=0).records == ()


@pytest.mark.ray
def test_an_actor_that_is_killed_is_replaced(ray_cluster: None, attempt: Attempt) -> None:
    shards = run(attempt, arguments={"mishap": "dies once", "at": 12})
    assert (attempt.folder / "died").exists()
    assert is_complete(shards)
    assert sum(call.startswith("010") for call in calls(attempt)) == 2


@pytest.mark.ray
@pytest.mark.parametrize(
    ("mishap", "error", "message"),
    [
        ("user error", UserError, "frame 7 has no label; add one"),
        ("bad model", UserError, "model.safetensors is damaged; train it again"),
        ("bug", RuntimeError, "double x: KeyError: 'colour'"),
    ],
)
def test_errors_of_a_worker_come_out_as_they_were_raised(
    ray_cluster: None, attempt: Attempt, mishap: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        run(attempt, arguments={"mishap": mishap, "at": 7})
    assert str(caught.value) == message
    assert "Traceback" in caught.value.__notes__[0]


def test_a_failed_pass_keeps_what_is_done(actors: int, attempt: Attempt) -> None:
    with pytest.raises(UserError, match=r"^frame 7 has no label; add one"):
        run(attempt, actors=min(actors, 1), arguments={"mishap": "user error", "at": 22})
    (attempt.folder / "calls").delete()
    assert is_complete(run(attempt, actors=min(actors, 1)))
    assert [call[:3] for call in calls(attempt)] == ["020"]


@pytest.mark.ray
@pytest.mark.slow
def test_a_shard_that_kills_its_worker_ends_the_pass(ray_cluster: None, attempt: Attempt) -> None:
    import ray

    with pytest.raises(
        RuntimeError, match=r"died 4 times on the same shard, .* somebody killed it.*Finished shards are kept"
    ):
        run(attempt, actors=1, arguments={"mishap": "dies always", "at": 12})
    assert sum(call.startswith("010") for call in calls(attempt)) == 4
    for _ in range(100):  # its CPU is free again
        if ray.available_resources().get("CPU") == 2.0:
            return
        time.sleep(0.1)
    pytest.fail("an actor of the failed pass is still there")


class OnlyHere(Double):
    """Can be sent, but not be unpacked: as on a node that has another version of the package."""

    @staticmethod
    def unpack() -> type[Double]:
        raise ImportError("cannot import name 'tone' from 'nightseg.metrics'")


@pytest.mark.ray
def test_a_worker_that_a_node_cannot_import_is_told_apart(ray_cluster: None, attempt: Attempt) -> None:
    class Sent:
        def __reduce__(self) -> tuple[Any, tuple[()]]:
            return (OnlyHere.unpack, ())

    with pytest.raises(
        RuntimeError, match=r"an actor cannot start: ImportError: cannot import name 'tone'.*Every node"
    ):
        run(attempt, actors=1, arguments={"mishap": Sent()})


@pytest.mark.ray
@pytest.mark.parametrize(("cpus", "gpus", "key"), [(1.5, 0.0, "cpus_per_actor"), (0.5, 1.0, "gpus_per_actor")])
def test_actors_that_never_fit_are_refused(
    ray_cluster: None, attempt: Attempt, cpus: float, gpus: float, key: str
) -> None:
    message = f"^compute.map: 2 actors with .* but the cluster has .*lower compute.map.actors or compute.map.{key}"
    with pytest.raises(UserError, match=message):
        run(attempt, cpus_per_actor=cpus, gpus_per_actor=gpus)


@pytest.mark.ray
def test_a_pass_says_that_it_waits_for_other_work(
    ray_cluster: None, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    monkeypatch.setattr(nodes, "SECONDS_UNTIL_KNOWN", 0.0)
    monkeypatch.setattr(nodes, "SECONDS_BETWEEN_LOOKS", 0.1)
    held = ray.util.placement_group([{"CPU": ray.cluster_resources()["CPU"]}])
    assert held.wait(20)

    class Ends(Counts):
        def say(self, message: str) -> None:
            super().say(message)
            ray.util.remove_placement_group(held)

    progress = Ends()
    assert is_complete(run(attempt, actors=1, progress=progress))
    assert progress.said == ["double x: waits until other work gives back what an actor takes (1 CPU)"]


@pytest.mark.ray
def test_a_pass_gives_up_where_no_node_comes(
    ray_cluster: None, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "SECONDS_UNTIL_KNOWN", 0.0)
    monkeypatch.setattr(nodes, "SECONDS_BETWEEN_LOOKS", 0.1)
    monkeypatch.setattr(nodes, "Idle", partial(nodes.Idle, most_seconds=1.0))
    monkeypatch.setattr("nightseg.cluster.ray.require", lambda *asked, **more: None)  # as where nodes may start
    progress = Counts()
    with pytest.raises(UserError, match=r"compute.map: no node with room for an actor \(64 CPU each\) came within"):
        run(attempt, actors=1, cpus_per_actor=64.0, progress=progress)
    assert progress.said == [
        "double x: waits for nodes: none that is there has room for an actor (64 CPU each). It gives up in 1 s"
    ]


@pytest.mark.ray
def test_one_actor_may_take_the_whole_cluster(ray_cluster: None, attempt: Attempt) -> None:
    assert is_complete(run(attempt, worker=Torch, actors=1, cpus_per_actor=2.0))
    assert (attempt.folder / "threads").read_bytes() == b"2"


class Counts:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.said: list[str] = []

    @contextmanager
    def task(self, title: str, total: int | None, unit: str) -> Iterator[Counts]:
        assert (title, total, unit) == ("double x", 23, "frames")
        yield self

    def advance(self, count: int = 1, **figures: float | str) -> None:
        self.counts.append(count)

    def say(self, message: str) -> None:
        self.said.append(message)


def test_progress_counts_rows_and_those_of_before(actors: int, attempt: Attempt) -> None:
    first, again = Counts(), Counts()
    run(attempt, actors=min(actors, 1), progress=first)
    run(attempt, actors=min(actors, 1), progress=again)
    assert sorted(first.counts) == [0, 3, 5, 5, 5, 5]
    assert again.counts == [23]
    assert first.said == again.said == []


class Talkative(Double):
    """Tells of some rows as it finishes them."""

    def __init__(self) -> None:
        super().__init__()
        self.advance: Callable[[int], None] = lambda count: None

    def __call__(self, rows: pa.Table, folder: Location) -> Mapping[str, pa.Table]:
        self.advance(1)
        self.advance(2)
        return super().__call__(rows, folder)


def test_a_worker_may_tell_of_every_row(actors: int, attempt: Attempt) -> None:
    progress = Counts()
    run(attempt, worker=Talkative, actors=actors, progress=progress)
    assert sum(progress.counts) == 23
    assert (progress.counts == [0, *4 * [1, 2, 2], 1, 2, 0]) == (actors == 0)
