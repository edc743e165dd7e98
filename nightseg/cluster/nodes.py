"""Nodes that come and go: what fits on those that are there, and with how many workers a training goes on.

What is decided here is decided from plain numbers, by the clock that is given: nothing in it needs a cluster.
"""

from __future__ import annotations

import functools
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from nightseg.errors import UserError

SECONDS_TO_SETTLE: Final = 5.0  # that a cluster takes to give back what a dead worker held: nothing is said before
SECONDS_UNTIL_KNOWN: Final = 20.0  # that Ray takes to know that a node is gone, whose processes are gone already
SECONDS_FOR_REPLACEMENT: Final = 30.0  # that a training waits for another node before it goes on with fewer workers
SECONDS_FOR_NODES: Final = 1800.0  # that nodes which are started on demand may take, and that work may wait for any
SECONDS_BETWEEN_NOTES: Final = 60.0
SECONDS_BETWEEN_LOOKS: Final = 1.0  # for nodes that are gone
_ROUNDING: Final = 1e-6  # of quotients of shares of CPUs and GPUs

Amounts = Mapping[str, float]  # of "CPU", "GPU", ...


def alive() -> dict[str, dict[str, float]]:
    """What each node that is there has in all, busy or not, by the id of the node."""
    import ray

    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


def free() -> dict[str, dict[str, float]]:
    """What each node that is there has to give now."""
    from ray._private.state import available_resources_per_node

    there = alive()  # Ray may still list what a node that is gone had
    return {node: dict(amounts) for node, amounts in available_resources_per_node().items() if node in there}


def lost(known: Iterable[str]) -> set[str]:
    """Which of these nodes are known to be gone."""
    return set(known) - alive().keys()


def has_lost() -> bool:
    """Whether this cluster was larger once."""
    import ray

    return any(not node["Alive"] for node in ray.nodes())


def are_launched() -> bool:
    """Whether a launcher with an autoscaler started the nodes (`ray up`, KubeRay), rather than somebody by hand."""
    import ray

    return any("ray.io/node-group" in node["Labels"] for node in ray.nodes() if node["Alive"])


def fitting(nodes: Iterable[Amounts], each: Amounts) -> int:
    """How many processes that take `each` fit on the nodes: none reaches over two of them, nor a share over two GPUs.

    For what is free of GPUs that others use in part it is an estimate. Ray does not tell on which of them it lies; but
    it fills those that are begun first, so what is free is taken as whole GPUs and one rest.
    """
    return sum(
        min(_times(node.get(name, 0.0), name, amount) for name, amount in each.items() if amount) for node in nodes
    )


def _times(there: float, name: str, amount: float) -> int:
    """How often a node with so much of a resource gives `amount` of it."""
    if name != "GPU":
        return int(there / amount + _ROUNDING)
    whole, rest = divmod(there + _ROUNDING, 1)
    if amount < 1:
        return int(whole) * int(1 / amount + _ROUNDING) + int(rest / amount + _ROUNDING)
    return int(whole / amount + _ROUNDING)


def sizes(each: Amounts) -> Sizes:
    """Processes that fit now."""
    return Sizes(*(fitting(there.values(), each) for there in (alive(), free())))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it was made from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def may_be_a_lost_node(error: BaseException) -> bool:
    """Whether Ray lost a process, an object or a connection, rather than that the work itself failed.

    What the work raised is never that, nor is an actor that cannot be made: both would happen again anywhere.
    """
    from ray import exceptions

    of_work = (exceptions.UserCodeException, exceptions.RuntimeEnvSetupError, exceptions.AuthenticationError)
    used_up = (exceptions.ObjectStoreFullError, exceptions.OutOfDiskError, exceptions.OutOfMemoryError)
    found = list(chain(error))
    if any(isinstance(one, of_work + used_up) or getattr(one, "actor_init_failed", False) for one in found):
        return False
    gone = (
        exceptions.RayActorError,  # ActorDiedError, ActorUnavailableError
        exceptions.NodeDiedError,
        exceptions.WorkerCrashedError,
        exceptions.ObjectLostError,  # OwnerDiedError, ObjectFetchTimedOutError, ObjectReconstructionFailedError, ...
        exceptions.PlasmaObjectNotAvailable,
        exceptions.RaySystemError,
        exceptions.RpcError,
        exceptions.ActorUnschedulableError,
        exceptions.TaskUnschedulableError,
        exceptions.ActorPlacementGroupRemoved,
        exceptions.TaskPlacementGroupRemoved,
        exceptions.GetTimeoutError,
        NodeLost,
    )
    return any(isinstance(one, gone) for one in found)


class NodeLost(Exception):  # noqa: N818 (what is the case)
    """Nodes of the cluster are gone while work was on them."""


class Sizes(NamedTuple):
    """Processes that fit now: on nodes as they are (`whole`), and on what nobody else holds (`free`)."""

    whole: int
    free: int


@dataclass
class Staffing:
    """With how many workers a training starts, and when a smaller one grows again.

    A training waits while others hold what it needs. It goes on with fewer workers only where nodes are missing, and
    only after it has waited for others in their place: so a short gap costs one start and not two.
    """

    asked: int
    least: int
    each: Amounts
    say: Callable[[str], None]
    patience: float = SECONDS_FOR_REPLACEMENT
    growth: str = ""  # of the cluster, as words
    most_seconds: float = SECONDS_FOR_NODES
    _since: float | None = None  # since when it has waited for workers
    _told: float | None = None
    _tried: int | None = None  # workers of a start that has not come to anything yet

    def start(self, sizes: Sizes, now: float) -> int | None:
        """The number of workers to start with; None: wait. Raises UserError once that has taken too long."""
        self._since = now if self._since is None else self._since
        waited = now - self._since
        if sizes.free >= self.asked:
            return self._tries(self.asked, sizes, now)
        if sizes.whole < self.asked and waited >= self.patience and sizes.free >= self.least:
            workers = min(sizes.free, sizes.whole)
            if self._tried != workers:
                self.say(f"goes on with {workers} of {self.asked} workers, and the same frames in every step")
            return self._tries(workers, sizes, now)
        if sizes.whole < self.least and waited >= self.most_seconds:
            raise UserError(
                f"compute.train: {_none_came(_count(self.least, 'worker'), self.each, self.most_seconds)}",
                cure="add nodes and run the same command: it goes on after the last checkpoint",
            )
        quiet = SECONDS_TO_SETTLE if sizes.whole < self.asked else SECONDS_UNTIL_KNOWN
        if waited >= quiet:
            self._note(self._waiting(sizes, waited), now)
        return None

    def runs(self) -> None:
        """The workers work."""
        self._since = self._told = self._tried = None
        self.patience = SECONDS_FOR_REPLACEMENT  # from now on

    def lost(self, now: float) -> None:
        """A worker died: the time that is waited begins, or goes on where none has worked yet."""
        self._since = now if self._since is None else self._since

    def larger(self, sizes: Sizes, workers: int) -> int | None:
        """To how many workers a training of `workers` may grow; None: it stays as it is."""
        most = min(self.asked, sizes.whole, workers + sizes.free)
        return most if most > workers else None

    def _tries(self, workers: int, sizes: Sizes, now: float) -> int:
        """Ray may not find the room that there seems to be: shares of GPUs that others hold can be spread unluckily."""
        waited = now - (now if self._since is None else self._since)
        if self._tried is not None:
            has = "has" if workers == 1 else "have"
            started = f"{_count(workers, 'worker')} ({words(self.each)} each) {has} not started"
            if sizes.free >= sizes.whole and waited >= self.most_seconds:
                raise UserError(
                    f"compute.train: {started} within {self.most_seconds / 60:.0f} minutes, although nothing else "
                    "works on the nodes",
                    cure="look for what `ray status` says of them; the same command goes on after the last checkpoint",
                )
            self._note(f"{started} for {_minutes(waited)}, although there seems to be room: tries again", now)
        self._tried = workers
        return workers

    def _note(self, message: str, now: float) -> None:
        if self._told is None or now - self._told >= SECONDS_BETWEEN_NOTES:
            self._told = now
            self.say(message)

    def _waiting(self, sizes: Sizes, waited: float) -> str:
        room = f"{_count(self.asked, 'worker')} ({words(self.each)} each)"
        if sizes.whole >= self.asked:
            return f"waits until other work gives back what {room} take: {sizes.free} fit now"
        has = f"waits for nodes: {room} are asked for, {sizes.whole} fit on the nodes that are there{self.growth}"
        if sizes.whole < self.least:
            return f"{has}. It gives up in {_minutes(self.most_seconds - waited)}"
        left = max(0.0, self.patience - waited)
        if left > 0:
            return f"{has}. In {_minutes(left)} it goes on with {sizes.whole}"
        return f"{has}, and other work holds some of that: it goes on with {sizes.whole} as soon as that ends"


@dataclass
class Idle:
    """A pass of which no actor lives. It says every minute what it waits for, and gives up where no node comes."""

    each: Amounts
    say: Callable[[str], None]
    growth: str = ""  # of the cluster, as words
    most_seconds: float = SECONDS_FOR_NODES
    _since: float | None = None
    _told: float | None = None

    def works(self) -> None:
        """An actor lives."""
        self._since = self._told = None

    def waits(self, sizes: Sizes, now: float) -> None:
        """None lives. Raises UserError once there has been no room for one for too long."""
        self._since = now if self._since is None else self._since
        waited = now - self._since
        if not sizes.whole and waited >= self.most_seconds:
            raise UserError(
                f"compute.map: {_none_came('an actor', self.each, self.most_seconds)}",
                cure="add nodes and run the same command: finished shards are kept",
            )
        if waited >= SECONDS_UNTIL_KNOWN and (self._told is None or now - self._told >= SECONDS_BETWEEN_NOTES):
            self._told = now
            self.say(self._waiting(sizes, waited))

    def _waiting(self, sizes: Sizes, waited: float) -> str:
        if not sizes.whole:
            return (
                f"waits for nodes: none that is there has room for an actor ({words(self.each)} each){self.growth}. It "
                f"gives up in {_minutes(self.most_seconds - waited)}"
            )
        if not sizes.free:
            return f"waits until other work gives back what an actor takes ({words(self.each)})"
        return f"no actor ({words(self.each)} each) has started for {_minutes(waited)}, although there seems to be room"


def gone_words(gone: int, known: int) -> str:
    return f"{gone} of {known} nodes {'is' if gone == 1 else 'are'} gone"


def _none_came(whom: str, each: Amounts, seconds: float) -> str:
    return f"no node with room for {whom} ({words(each)} each) came within {seconds / 60:.0f} minutes"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def words(each: Amounts) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in each.items() if amount)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


IDLE_KEY: Final = "nightseg_idle"
_idle: MutableMapping[str, Idle] = weakref.WeakValueDictionary()  # as long as their passes hold them


def tell(idle: Idle, context: Any) -> None:
    """Have it told whether actors of a pass live. `context`: of its dataset; it travels to them, `idle` cannot."""
    name = uuid.uuid4().hex
    context.set_config(IDLE_KEY, name)
    _idle[name] = idle


@functools.cache
def watching() -> type[Any]:
    """The callback of Ray Data that ends a pass when a node is lost, or when none of its actors can ever be.

    Ray Data starts the actors of a lost node again somewhere else, and has their work wait for them: for ever, where no
    other node has room. Whoever made the pass starts another one with what is not done.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class WatchNodes(ExecutionCallback):  # type: ignore[misc]
        def before_execution_starts(self, executor: Any) -> None:
            self.known, self.looked = set(alive()), time.monotonic()
            self.idle = _idle_of(executor)

        def on_execution_step(self, executor: Any) -> None:
            if time.monotonic() - self.looked < SECONDS_BETWEEN_LOOKS:
                return
            self.looked = time.monotonic()
            if gone := lost(self.known):
                raise NodeLost(gone_words(len(gone), len(self.known)))
            if self.idle is None:
                return
            if _lives(executor):
                self.idle.works()
            else:
                self.idle.waits(sizes(self.idle.each), self.looked)

    return WatchNodes


def _idle_of(executor: Any) -> Idle | None:
    """By a function, as Ray pickles the callback with all globals that its own methods name."""
    return _idle.get(executor._data_context.get_config(IDLE_KEY))


def _lives(executor: Any) -> bool:
    """Whether an actor of a pass lives, or none is needed any more."""
    at_work = [operator for operator in executor._topology if not operator.has_completed()]
    pools = [pool for operator in at_work for pool in operator.get_autoscaling_actor_pools()]
    return not pools or any(pool.num_running_actors() > pool.num_restarting_actors() for pool in pools)
