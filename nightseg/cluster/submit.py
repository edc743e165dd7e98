"""Jobs of a cluster: a package and a command are uploaded to its head node, started there, followed, and tried again.

The driver of a job asks for no resources: then Ray runs it on the head, which no spot price takes away, and workers
keep their CPUs. All that is said to the cluster goes to the dashboard of its head by HTTP, with the token.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlsplit

from nightseg.cluster.ray import ADMISSION_CURE, HANDED_ON, REACHABLE_SECONDS
from nightseg.cluster.token import prepare_token
from nightseg.errors import UserError
from nightseg.storage.scratch import temporary_folder

LOCAL_DASHBOARD: Final = "http://127.0.0.1:8265"  # where `ray dashboard` and a port-forward bring it
ADDRESS_VARIABLE: Final = "RAY_API_SERVER_ADDRESS"
WRONG_REQUEST: Final = 2  # exit code of a driver that would end the same way if it were tried again
SECONDS_BETWEEN_TRIES: Final = 10.0
SECONDS_WITHOUT_ANSWER: Final = 600.0
_SECONDS_BETWEEN_LOOKS: Final = 1.0
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_STATUS: Final = re.compile(r"^Request failed with status code (\d{3})|^(\d{3}) Server Error")  # of Ray, of requests
_TOO_LARGE: Final = 413
_SERVER_ERROR: Final = 500

Answered = TypeVar("Answered")


class Request(NamedTuple):
    """What a job does: `command` in a folder that holds what is in `package`, a ZIP archive.

    `work` says where its work lies: one driver at a time there.
    """

    name: str
    package: bytes
    command: Sequence[str]
    work: str

    def metadata(self) -> dict[str, str]:
        """What the cluster is told of the job, by which it is known again."""
        return {"work": self.work, "content": hashlib.sha256(self.package).hexdigest()}


class Job(NamedTuple):
    """A job as it was seen last. `status`: Ray's word for it. `exit_code`: of its driver, None if unknown."""

    id: str
    address: str
    status: str
    exit_code: int | None = None
    message: str = ""
    tries: int = 1


def dashboard_at(given: str | None) -> str:
    """The address to submit to: what is given, what the environment says, or loopback. Raises UserError: none of HTTP.

    RAY_ADDRESS is often that of the control store, which takes no jobs: it counts if it is one of HTTP.
    """
    of_ray = os.environ.get("RAY_ADDRESS", "")
    address = given or os.environ.get(ADDRESS_VARIABLE) or (of_ray if of_ray.startswith("http") else LOCAL_DASHBOARD)
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        shown = address.rpartition("@")[2]
        raise UserError(
            f"address: {shown!r} is not the address of a dashboard, http://HOST:PORT without user and password",
            cure=f"{LOCAL_DASHBOARD}, to which `ray dashboard cluster.yaml` brings it",
        )
    return address.rstrip("/")


def runtime_env(package: Path) -> dict[str, Any]:
    """What a job runs in: what is in the package; what is installed, and the token, are the cluster's own."""
    handed_on = {name: os.environ[name] for name in HANDED_ON if name in os.environ}
    return {"working_dir": str(package), "env_vars": {"PYTHONUNBUFFERED": "1", **handed_on}}


def run_job(
    request: Request,
    address: str,
    *,
    wait: bool,
    max_tries: int,
    say: Callable[[str], None],
    write: Callable[[str], None],
) -> Job:
    """Submit a job; with `wait`, pass its log to `write` and try it again if it dies. Ctrl-C leaves it at work.

    A job that does the same on the same work is followed instead of a second one that would find it locked.

    Raises:
        UserError: nobody answers, or only with errors; the token is missing or wrong; another job is at this work, or
            the same with another recipe, code or files; the package is too large.
    """
    client = _client(address, say)
    for number in range(1, max_tries + 1):
        id = _found_or_submitted(client, request, address, say)
        if not wait:
            cure = f"job {id} may go on; the same command follows it"
            status = _patiently(partial(client.get_job_status, id), address, cure, say)
            return Job(id, address, str(status), tries=number)
        try:
            job = _follow(client, id, address, say, write)._replace(tries=number)
            if job.status != "FAILED" or job.exit_code == WRONG_REQUEST or number == max_tries:
                return job
            say(f"job {id} failed ({job.message or 'without a reason'}): try {number + 1} of {max_tries} goes on")
            time.sleep(SECONDS_BETWEEN_TRIES)
        except KeyboardInterrupt:
            return Job(id, address, "RUNNING", tries=number)
    raise AssertionError("a job is tried at least once")


def _client(address: str, say: Callable[[str], None]) -> Any:
    prepare_token(may_create=False)
    host, port = urlsplit(address).hostname, urlsplit(address).port
    cure = (
        "keep `ray dashboard cluster.yaml` running (on Kubernetes: `kubectl port-forward service/nightseg-head-svc "
        "8265`), or give the address of the dashboard"
    )
    try:
        default = 443 if address.startswith("https") else 80
        socket.create_connection((host or "", port or default), timeout=REACHABLE_SECONDS).close()
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(f"address: no cluster answers at {address}: {error}", cure=cure) from error
    if address.startswith("http:") and host not in _LOOPBACK:
        say(f"the token goes to {host} unencrypted: a tunnel (`ray dashboard`) or https would hide it")
    from ray.job_submission import JobSubmissionClient

    for part in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{part}").setLevel(logging.WARNING)
    try:
        with _only_address(address):
            return _patiently(partial(JobSubmissionClient, address), address, "the same command tries again", say)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"address: what answers at {address} is no Ray dashboard: {first_line}", cure=cure) from error


def _refused(address: str, error: Exception) -> UserError:
    is_wrong = "Authentication failed" in str(error)
    what = "its token is another than the one here" if is_wrong else "it wants its token, and there is none here"
    return UserError(f"address: the cluster at {address} refuses: {what}", cure=ADMISSION_CURE)


@contextmanager
def _only_address(address: str) -> Iterator[None]:
    """Ray lets these variables win over the address that it is given."""
    before = {name: os.environ.pop(name, None) for name in (ADDRESS_VARIABLE, "RAY_ADDRESS")}
    os.environ[ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _found_or_submitted(client: Any, request: Request, address: str, say: Callable[[str], None]) -> str:
    def once() -> str:
        id = _same_at_work(client, request, address)
        if id is not None:
            say(f"job {id} does this already, as it was submitted then: no second one is started")
            return id
        id = _submit(client, request)
        say(f"job {id} is submitted to {address}")
        return id

    return _patiently(once, address, "the same command submits it", say)


def _patiently(ask: Callable[[], Answered], address: str, cure: str, say: Callable[[str], None]) -> Answered:
    """What the cluster answers, after a while if need be: its head may have been lost, or only just be coming up.

    Raises UserError: it does not answer in time, or wants another token.
    """
    from ray.exceptions import AuthenticationError

    patience = _Patience(address, "the cluster does not answer", cure, say)
    while True:
        try:
            return ask()
        except AuthenticationError as error:
            raise _refused(address, error) from error
        except (OSError, RuntimeError) as error:
            if not _may_pass(error):
                raise
            patience.wait(error)


def _may_pass(error: OSError | RuntimeError) -> bool:
    """Whether it is the connection's fault, or the server's and not that of the request."""
    import requests

    passing = requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError
    return isinstance(error, passing) or (_status(error) or 0) >= _SERVER_ERROR


def _status(error: OSError | RuntimeError) -> int | None:
    """The HTTP status for which Ray or requests raised it; None if it was not for one."""
    found = _STATUS.search(str(error))
    return int(found[1] or found[2]) if found else None


def _same_at_work(client: Any, request: Request, address: str) -> str | None:
    """The job that does the same already. Raises UserError if another one is at this work."""
    asked = request.metadata()
    for job in client.list_jobs():
        told = job.metadata or {}
        if not job.submission_id or job.status.is_terminal() or told.get("work") != request.work:
            continue
        if job.entrypoint != shlex.join(request.command):
            what = f"does something else: {job.entrypoint}"
        elif told.get("content") != asked["content"]:
            what = "does the same with another recipe, code or files, as they were when it was submitted"
        else:
            return str(job.submission_id)
        raise UserError(
            f"job {job.submission_id} is at work on {request.work} and {what}",
            cure=f"wait for it, or stop it: ray job stop {job.submission_id} (at {address})",
        )
    return None


def _submit(client: Any, request: Request) -> str:
    """A cluster takes every id once: the name, then the name with a number. Raises UserError: too large a package."""
    taken = {job.submission_id for job in client.list_jobs()}
    with temporary_folder() as folder:
        package = folder / "job.zip"
        package.write_bytes(request.package)
        number = 1
        while True:
            id = request.name if number == 1 else f"{request.name}-{number}"
            number += 1
            if id in taken:
                continue
            try:
                client.submit_job(
                    entrypoint=shlex.join(request.command), submission_id=id, runtime_env=runtime_env(package),
                    metadata=request.metadata(),
                )  # fmt: skip
                return id
            except RuntimeError as error:
                if _status(error) == _TOO_LARGE:
                    raise UserError(
                        f"{request.name}: the {len(request.package) / 2**20:.1f} MiB that go along with the job are "
                        "more than the cluster, or a proxy before it, takes at once",
                        cure="lay the large files that the recipe names on shared storage and name them there, or let "
                        "the proxy pass 100 MiB",
                    ) from error
                if "already exists" not in str(error):
                    raise
                taken.add(id)


def _follow(client: Any, id: str, address: str, say: Callable[[str], None], write: Callable[[str], None]) -> Job:
    from aiohttp import ClientError
    from ray.exceptions import AuthenticationError

    shown = _Shown(write)
    lost = f"job {id}: the connection is lost; it goes on without us, and we look for it"
    patience = _Patience(address, lost, f"job {id} may go on; the same command follows it, or continues its work", say)
    while True:
        try:
            asyncio.run(shown.tail(client, id))
            details = client.get_job_info(id)
            if details.status.is_terminal():
                shown.rest(client.get_job_logs(id))
                code = details.driver_exit_code
                return Job(id, address, str(details.status), code, (details.message or "").partition("\n")[0])
            patience.over()
        except AuthenticationError as error:
            raise _refused(address, error) from error
        except (OSError, ClientError, RuntimeError, ValueError) as error:  # the tunnel, or the head for a while
            if _is_forgotten(client, id):
                return Job(id, address, "FAILED", None, "its head was lost, and the one that is there does not know it")
            patience.wait(error)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _is_forgotten(client: Any, id: str) -> bool:
    """Whether the cluster answers, and has no such job: jobs go with their head."""
    with suppress(OSError, RuntimeError, ValueError):
        return id not in {job.submission_id for job in client.list_jobs()}
    return False


class _Patience:
    """With a cluster that does not answer: it is told once, and given up after a while."""

    def __init__(self, address: str, lost: str, cure: str, say: Callable[[str], None]) -> None:
        self.address, self.lost, self.cure, self.say = address, lost, cure, say
        self.over()

    def over(self) -> None:
        self.since: float | None = None

    def wait(self, error: Exception) -> None:
        """Raises UserError if it has lasted too long."""
        if self.since is None:
            self.since = time.monotonic()
            self.say(f"{self.lost} ({_in_one_line(error)})")
        if time.monotonic() - self.since > SECONDS_WITHOUT_ANSWER:
            raise UserError(
                f"address: {self.address} has not answered for {SECONDS_WITHOUT_ANSWER:g} s, or only so: "
                f"{_in_one_line(error)}",
                cure=self.cure,
            ) from error
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _in_one_line(error: Exception) -> str:
    """The first line, and of a traceback that a head answers with, the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ... ".join(lines if len(lines) < 2 else (lines[0], lines[-1]))


class _Shown:
    """The part of a log that was passed on: each connection tells it from its beginning."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.length = 0

    def rest(self, log: str) -> None:
        if len(log) > self.length:
            self.write(log[self.length :])
            self.length = len(log)

    async def tail(self, client: Any, id: str) -> None:
        seen = 0
        async for text in client.tail_job_logs(id):
            new = text[max(0, self.length - seen) :]
            seen += len(text)
            if new:
                self.write(new)
                self.length = seen
