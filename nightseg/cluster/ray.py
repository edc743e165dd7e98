"""The Ray cluster this process works on: joined where there is one, started here where there is none.

A local Ray is meant to be unnoticed: no dashboard, no usage statistics, no worker output in the terminal, nobody else
who reaches it (`cluster.local`), and token authentication with a token that never touches the disk.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from nightseg.cluster import ahead, local, nodes
from nightseg.cluster.launch import most_nodes, most_resources, node_types
from nightseg.cluster.token import prepare_token
from nightseg.errors import UserError
from nightseg.storage.yaml import parse_value

REACHABLE_SECONDS = 20.0

ADDRESS_CURE = "unset RAY_ADDRESS to work on this machine"
ADMISSION_CURE = "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to what `ray get-auth-token` prints on its head node"

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # workers stay where they are; paths are absolute all the same
    # Without it Ray prints a notice about GPU visibility of actors that ask for no GPU.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Ray's settings, read in this process and handed to its workers. What the user set wins."""

WORKER_ENVIRONMENT = {
    # OpenMP threads that wait for each other spin. With anything else on the cores (Ray's own daemons, a browser) a
    # long spin makes a training seven times slower; a short one costs a few percent where the machine is quiet.
    "GOMP_SPINCOUNT": "1000",
}
LOCAL_ENVIRONMENT = WORKER_ENVIRONMENT | {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away, and it costs a process
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # reports and the end wait for the next check; Ray's 2 s are long here
    "GLOO_SOCKET_IFNAME": "lo",  # else the workers of a training listen where the name of this machine leads
    "NCCL_SOCKET_IFNAME": "lo",
}
HANDED_ON = (
    "NIGHTSEG_ALLOW_DOWNLOAD",
    "NIGHTSEG_INPUT_CACHE_BYTES",
)  # what was decided here holds for workers on other machines
BOOTSTRAP_CONFIG = "~/ray_bootstrap_config.yaml"  # the cluster.yaml of `ray up`, with all that its provider fills in
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # where Ray says what a submitted job asked for
CLUSTER_ENVIRONMENT = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # of workers for whom there is room; nodes.py waits for nodes
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1.0",
}

_started_here = False
_is_notice_out = False  # Ray's warning of actors as Ray Data makes them


def connect(num_cpus: int | None = None, *, dashboard: bool = False) -> None:
    """Join the cluster of RAY_ADDRESS or of the surrounding Ray job, else start a quiet local Ray. Idempotent.

    Args:
        num_cpus: CPUs of a local Ray; null = the cores this process may use. Ignored where a cluster is joined.
        dashboard: a local Ray serves its dashboard, on loopback. Without it Ray cannot see that a training was stopped
            from outside, and keeps its CPUs reserved for ever: work that stops trainings early needs it.

    Raises:
        UserError: RAY_ADDRESS is not the address of a cluster, the cluster does not answer, or it wants a token.
    """
    global _started_here
    import ray

    _set_defaults(ENVIRONMENT)
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "").strip()
    with _own_sigterm():
        if address and address != "local":
            _join(address)
        else:
            _set_defaults(LOCAL_ENVIRONMENT)
            prepare_token(may_create=True)
            local.start(num_cpus, dashboard=dashboard, logs=wants_logs())
            _started_here = True
    hide_daemons()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """A handler that this program has for SIGTERM stays: Ray's own prints stacks of C++, and ends without a word."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def disconnect() -> None:
    """Leave the cluster; a Ray that `connect` started here ends. Harmless when not connected."""
    global _started_here
    import ray

    ahead.stop()
    if _started_here:
        local.end()
    else:
        ray.shutdown()
    _started_here = False


@contextmanager
def left_as_found() -> Iterator[None]:
    """What the body connects to is left when it ends; a connection that was there before stays.

    A run may thus be started alone or inside other work on the same cluster: a trial of a search is a run in a worker
    that Ray itself has connected.
    """
    was_connected = is_connected()
    try:
        yield
    finally:
        if not was_connected and "ray" in sys.modules:
            disconnect()


def is_local() -> bool:
    """Whether `connect` started the Ray of this process on this machine."""
    return _started_here


def is_connected() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()  # work without actors imports none


def is_this_machine() -> bool:
    """Whether the cluster is this machine alone; before `connect`, whether it will be."""
    return _started_here or (not is_connected() and os.environ.get("RAY_ADDRESS", "").strip() in ("", "local"))


def dashboard() -> str:
    """HOST:PORT of Ray's dashboard; empty where there is none."""
    from ray._private.worker import get_dashboard_url

    return str(get_dashboard_url() or "") if is_connected() else ""


def room(resource: str) -> float:
    """The most of a resource that work may take at a time; connects. Memory (bytes) is counted on one machine only."""
    connect()
    if resource == "memory":
        return resources().get(resource, math.inf) if _started_here else math.inf
    return capacity(resource)


def expected_room(resource: str) -> float:
    """What `room` says or will say, as far as that is known without a connection."""
    if is_connected():
        return room(resource)
    return float(len(os.sched_getaffinity(0))) if resource == "CPU" and is_this_machine() else math.inf


def resources() -> dict[str, float]:
    """What the cluster has now, busy or not: "CPU", "GPU", "memory" in bytes, ..."""
    import ray

    return {name: float(amount) for name, amount in ray.cluster_resources().items()}


def capacity(resource: str) -> float:
    """The most of a resource ("CPU", "GPU") that this cluster can ever offer.

    A cluster that adds nodes on demand has little now and much later: its limit is that of its node types, and
    infinity where nobody states it, so that a request is never refused because the nodes still sleep.
    """
    now = resources().get(resource, 0.0)
    if not may_grow():
        return now
    limits = _limits()
    return math.inf if limits is None else max(now, float(limits.get(resource, 0.0)))


def _limits() -> Mapping[str, float] | None:
    """What all nodes that the cluster may have would have together; None where nobody says it.

    Ray's global state has it only of clusters whose autoscaler tells it, which Ray 2.60's own two do not. `ray up`
    leaves what it was given on the head, where jobs run.
    """
    from ray._private.state import state

    told: Mapping[str, float] | None = state.get_max_resources_from_cluster_config()
    return told or most_resources(_left_by_ray_up())


def _left_by_ray_up() -> Any:
    with suppress(OSError, yaml.YAMLError):
        return parse_value(Path(BOOTSTRAP_CONFIG).expanduser().read_bytes())
    return None


def require(who: str, count: int, *, cpus: float, gpus: float, place: str, say: Callable[[str], None]) -> None:
    """Refuse a request that the cluster can never serve: Ray would wait for it without a word.

    `who`: "actor" or "worker", of which each takes `cpus` and `gpus`; `place`: where the recipe says so. What comes
    later, with nodes that are started on demand or again, is announced through `say`.

    Raises:
        UserError: names what is asked, what there is and may be, and the recipe keys that ask for it.
    """
    each = {"CPU": cpus, "GPU": gpus}
    cure = f"lower {place}.{who}s or {place}.%s_per_{who}, or add nodes"
    has_lost = not _started_here and not may_grow() and nodes.has_lost()
    for resource, amount in each.items():
        asked, most, now = count * amount, capacity(resource), resources().get(resource, 0.0)
        if asked > most + 1e-6 and not (has_lost and amount <= most):
            raise UserError(
                f"{place}: {count} {who}s with {amount:g} {resource} each need {asked:g} {resource}, but the cluster "
                f"has {now:g}{f' and can grow to {most:g}' if most > now else ''}",
                cure=cure % f"{resource.lower()}s",
            )
        if asked > now + 1e-6:
            grows = "" if math.isinf(most) else f" and may grow to {most:g}"
            later = f"{grows}: waiting for more nodes" if most > now else ", as nodes were lost: fewer work at a time"
            say(f"{count} {who}s need {asked:g} {resource}, the cluster has {now:g} now{later}")
    is_growing = may_grow()
    fits = max(nodes.fitting(nodes.alive().values(), each), _fitting_later(each) if is_growing else 0.0)
    if fits < count and not has_lost:
        of = "that this cluster has or may start" if is_growing else "of this cluster"
        raise UserError(
            f"{place}: {count} {who}s with {nodes.words(each)} each do not fit on the nodes {of}, {fits:g} do: none "
            f"reaches over two nodes{', nor a share of a GPU over two GPUs' if 0 < gpus < 1 else ''}",
            cure=cure % ("gpus" if gpus else "cpus"),
        )


def _fitting_later(each: nodes.Amounts) -> float:
    """How many processes fit on all nodes that the cluster may start; infinity where nobody says what those have."""
    kinds = node_types(_left_by_ray_up())
    return math.inf if kinds is None else sum(kind.most * nodes.fitting([kind.resources], each) for kind in kinds)


def may_grow() -> bool:
    """Whether the cluster adds nodes on demand: an autoscaler says so, or a launcher that has one (`ray up`, KubeRay)
    started its nodes, and they are not all that it may start. Without a connection nothing asks for nodes: False."""
    if _started_here or not is_connected():
        return False
    from ray._private.state import state

    if state.get_cluster_config() is not None:
        return True
    return nodes.are_launched() and len(nodes.alive()) < most_nodes(_left_by_ray_up())


def _set_defaults(environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def _join(address: str) -> None:
    global _started_here
    import ray
    from ray.exceptions import AuthenticationError

    scheme, slashes, rest = address.rpartition("://")
    shown = scheme + slashes + rest.rpartition("@")[2]  # never repeat a password of an address in a message
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS: {shown!r} is not the address of a cluster's control store (HOST:PORT)",
            cure=f"submit with `ray job submit --working-dir . -- python jobs/...`, or {ADDRESS_CURE}",
        )
    _set_defaults(CLUSTER_ENVIRONMENT)
    prepare_token(may_create=False)
    _check_reachable(address, shown)
    # A cluster that others started does not pass our environment on. A job that sets a variable itself keeps it, and
    # Ray refuses one that is set in both places.
    variables = {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in os.environ}
    of_job = json.loads(os.environ.get(JOB_CONFIG) or "{}").get("runtime_env", {}).get("env_vars", {})
    variables |= {name: os.environ[name] for name in HANDED_ON if name in os.environ and name not in of_job}
    environment = {"env_vars": variables} if variables else None
    try:
        ray.init(address=address, log_to_driver=wants_logs(), logging_level="ERROR", runtime_env=environment)
    except AuthenticationError as error:
        raise UserError(f"RAY_ADDRESS: the cluster at {shown} wants its token", cure=ADMISSION_CURE) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"RAY_ADDRESS: the cluster at {shown} does not let us in: {first_line}. Its token may be another, or its "
            f"version of Ray (here {ray.__version__})",
            cure=f"{ADMISSION_CURE}, or {ADDRESS_CURE}",
        ) from error
    _started_here = False


def _check_reachable(address: str, shown: str) -> None:
    """Ray itself tries for minutes before it gives up on an address where nobody listens."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto" and the like: Ray finds the cluster, or says at once that there is none
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHABLE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise UserError(
            f"RAY_ADDRESS: no cluster answers at {shown}: {error}",
            cure=f"start it, correct the address, or {ADDRESS_CURE}",
        ) from error


# -- Ray's own output ------------------------------------------------------------------------------------------------
# A run shows its own progress and nothing else. What matters comes back as an exception, the rest is in Ray's log
# folder, and RAY_LOG_TO_DRIVER=1 (Ray's own switch) brings everything back.


def wants_logs() -> bool:
    """Whether the user asks for the output of Ray's workers and daemons."""
    return os.environ.get("RAY_LOG_TO_DRIVER", "0").lower() in ("1", "true")


def hide_daemons() -> None:
    """Ray prints what its daemons say to standard output, even with log_to_driver off; that belongs to `--json`."""
    if not wants_logs():
        import ray._private.worker

        ray._private.worker._worker_logs_enabled = False


def hide_ray_data() -> None:
    """Ray Data's bars, banners, tracebacks of errors that we raise anyway, and a debug log that grows without limit."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not wants_logs():
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # after the import, which sets it to DEBUG
        _let_out_actor_notice()


def _let_out_actor_notice() -> None:
    """Ray's C++ core warns on standard error, once a process, of actors as Ray Data makes them. Here nobody sees it."""
    global _is_notice_out
    if _is_notice_out:
        return
    import ray

    class Nobody:
        def __init__(self, argument: object) -> None:
            del argument

    with _stderr_without(b"has constructor arguments in the object store"):
        actor = ray.remote(num_cpus=0, max_restarts=1)(Nobody).remote(ray.put(None))
        ray.kill(actor)
    _is_notice_out = True


@contextmanager
def _stderr_without(unwanted: bytes) -> Iterator[None]:
    """Holds standard error (the descriptor: C++ does not know sys.stderr) back, and lets out lines without the text."""
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            for line in held:
                if unwanted not in line:
                    os.write(2, line)
