"""Jobs as a cluster sees them: what is asked of it, what is told of its answers, tries, Ctrl-C. It is made up."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import requests
from ray.dashboard.modules.job.common import JobStatus

from nightseg.cluster import submit as jobs
from nightseg.cluster.submit import Job, Request, dashboard_at, run_job
from nightseg.errors import UserError

ADDRESS = "http://127.0.0.1:1"


class Details:
    """What a cluster says of a job."""

    def __init__(self, submission_id: str | None, entrypoint: str, metadata: dict[str, str] | None) -> None:
        self.submission_id, self.entrypoint, self.metadata = submission_id, entrypoint, metadata
        self.status, self.driver_exit_code, self.message = JobStatus.RUNNING, None, None


class Cluster:
    """Keeps jobs; each ends as `ends` says, one after the other. `cuts`: how often its log breaks off; `forgets`: its
    head is lost when it is asked for a job next, and the next head does not answer `away` times; `refuses`: what it
    answers first to those who submit, and to those who ask for a job's status."""

    def __init__(self) -> None:
        self.jobs: list[Details] = [Details(None, "python somebody.py", None)]
        self.ends: list[tuple[JobStatus, int | None]] = []
        self.cuts, self.away, self.forgets = 0, 0, False
        self.refuses: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.interrupted = False

    def list_jobs(self) -> list[Details]:
        if self.away and not self.forgets:
            self.away -= 1
            raise requests.ConnectionError("refused")
        return list(self.jobs)

    def submit_job(self, **asked: Any) -> str:
        if asked["submission_id"] in {job.submission_id for job in self.jobs}:
            raise RuntimeError("Request failed with status code 500: Job with submission_id x already exists.")
        self.refuse()
        self.package = Path(asked["runtime_env"]["working_dir"])
        assert self.package.suffix == ".zip" and self.package.read_bytes() == REQUEST.package
        self.asked.append(asked)
        self.jobs.append(Details(asked["submission_id"], asked["entrypoint"], asked["metadata"]))
        return str(asked["submission_id"])

    def job(self, id: str) -> Details:
        return next(job for job in self.jobs if job.submission_id == id)

    def refuse(self) -> None:
        if self.refuses:
            raise RuntimeError(f"Request failed with status code {self.refuses.pop(0)}.")

    def get_job_status(self, id: str) -> JobStatus:
        self.refuse()
        return self.job(id).status

    def get_job_info(self, id: str) -> Details:
        if self.forgets:
            self.forgets, self.jobs, self.ends = False, [], [(JobStatus.SUCCEEDED, 0)]
        if id not in {job.submission_id for job in self.jobs}:
            raise RuntimeError(f"Request failed with status code 404: Job {id} does not exist")
        job = self.job(id)
        if self.ends:
            job.status, code = self.ends.pop(0)
            job.driver_exit_code = code  # type: ignore[assignment]
            job.message = "it died\nTraceback"  # type: ignore[assignment]
        return job

    def get_job_logs(self, id: str) -> str:
        return f"first of {id}\nsecond\nlast\n"

    async def tail_job_logs(self, id: str) -> AsyncIterator[str]:
        assert not self.package.exists(), "it is removed when it is uploaded"
        if self.interrupted:
            raise KeyboardInterrupt
        yield f"first of {id}\n"
        if self.cuts:
            self.cuts -= 1
            raise RuntimeError("WebSocket connection closed unexpectedly")
        yield "second\n"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster()
    monkeypatch.setattr(jobs, "_client", lambda address, say: made)
    monkeypatch.setattr(jobs, "SECONDS_BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(jobs, "_SECONDS_BETWEEN_LOOKS", 0.0)
    return made


class Told:
    """What was said, and the log that was passed on."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.log = ""

    def write(self, text: str) -> None:
        self.log += text


REQUEST = Request("demo", b"package", ["python", "jobs/x.py", "my recipe.yaml", "--only", "$(rm -rf ~)"], "s3://b/r")


def run(told: Told, request: Request = REQUEST, wait: bool = True, max_tries: int = 1) -> Job:
    return run_job(request, ADDRESS, wait=wait, max_tries=max_tries, say=told.said.append, write=told.write)


def test_a_job_is_asked_for_as_words_and_without_resources(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSEG_ALLOW_DOWNLOAD", "1")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    cluster.ends = [(JobStatus.SUCCEEDED, 0)]
    told = Told()
    assert run(told) == Job("demo", ADDRESS, "SUCCEEDED", 0, "it died")
    (asked,) = cluster.asked
    assert shlex.split(asked["entrypoint"]) == REQUEST.command and "'$(rm -rf ~)'" in asked["entrypoint"]
    assert asked["metadata"] == {"work": "s3://b/r", "content": hashlib.sha256(b"package").hexdigest()}
    variables = {"PYTHONUNBUFFERED": "1", "NIGHTSEG_ALLOW_DOWNLOAD": "1"}
    assert asked["runtime_env"] == {"working_dir": str(cluster.package), "env_vars": variables}
    assert asked.keys() == {"entrypoint", "submission_id", "runtime_env", "metadata"}, "Ray puts it on the head then"
    assert told.log == "first of demo\nsecond\nlast\n"


def test_each_job_has_an_id_of_its_own_and_all_show_the_name(cluster: Cluster) -> None:
    cluster.ends = [(JobStatus.FAILED, 1), (JobStatus.STOPPED, None), (JobStatus.SUCCEEDED, 0)]
    assert [run(Told()).id for _ in range(3)] == ["demo", "demo-2", "demo-3"]


def test_two_who_submit_at_once_get_two_ids(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.jobs.append(Details("demo", "python x.py", {}))
    cluster.jobs[-1].status = JobStatus.SUCCEEDED
    monkeypatch.setattr(cluster, "list_jobs", list)
    assert run(Told(), wait=False).id == "demo-2"


def test_a_log_that_breaks_off_is_told_once(cluster: Cluster) -> None:
    cluster.cuts, cluster.ends = 2, [(JobStatus.SUCCEEDED, 0)]
    told = Told()
    run(told)
    assert told.log == "first of demo\nsecond\nlast\n"
    assert len([line for line in told.said if "connection is lost" in line]) == 1


def test_a_cluster_that_stays_away_is_given_up_and_the_job_is_not(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SECONDS_WITHOUT_ANSWER", -1.0)
    cluster.cuts = 9
    with pytest.raises(UserError, match=r"has not answered for .*job demo may go on"):
        run(Told())


def test_a_job_that_went_with_its_head_is_tried_again_on_the_next(cluster: Cluster) -> None:
    told = Told()
    for max_tries, status in ((1, "FAILED"), (2, "SUCCEEDED")):
        cluster.forgets, cluster.away, cluster.ends = True, 2, []
        job = run(told, max_tries=max_tries)
        assert (job.status, job.tries) == (status, max_tries)
    assert "its head was lost" in "".join(told.said)
    assert len(cluster.asked) == 3 and len([line for line in told.said if "it goes on without us" in line]) == 2


def test_a_driver_that_dies_is_tried_again(cluster: Cluster) -> None:
    cluster.ends = [(JobStatus.FAILED, -9), (JobStatus.FAILED, 1), (JobStatus.SUCCEEDED, 0)]
    told = Told()
    job = run(told, max_tries=3)
    assert (job.id, job.status, job.tries) == ("demo-3", "SUCCEEDED", 3)
    assert "job demo failed (it died): try 2 of 3 goes on" in told.said


@pytest.mark.parametrize(
    ("end", "tries"),
    [((JobStatus.FAILED, 2), 1), ((JobStatus.STOPPED, None), 1), ((JobStatus.FAILED, 1), 3)],
    ids=["a wrong request", "stopped by somebody", "it fails each time"],
)
def test_what_ends_tries(cluster: Cluster, end: tuple[JobStatus, int | None], tries: int) -> None:
    cluster.ends = [end] * 5
    job = run(Told(), max_tries=3)
    assert (job.status, job.exit_code, job.tries) == (str(end[0]), end[1], tries)


def test_ctrl_c_leaves_the_job_at_work_and_the_same_command_follows_it(cluster: Cluster) -> None:
    cluster.interrupted = True
    assert run(Told()) == Job("demo", ADDRESS, "RUNNING")
    cluster.interrupted, cluster.ends = False, [(JobStatus.SUCCEEDED, 0)]
    told = Told()
    assert run(told).id == "demo" and len(cluster.asked) == 1
    assert told.said[0] == "job demo does this already, as it was submitted then: no second one is started"


def test_other_work_in_the_same_place_is_refused_and_elsewhere_it_starts(cluster: Cluster) -> None:
    run(Told(), wait=False)
    with pytest.raises(UserError, match=r"job demo is at work on s3://b/r .*ray job stop demo"):
        run(Told(), REQUEST._replace(command=["python", "jobs/y.py"]), wait=False)
    assert run(Told(), REQUEST._replace(work="s3://b/other"), wait=False).id == "demo-2"


def test_the_same_command_with_another_recipe_is_refused_while_the_first_is_at_work(cluster: Cluster) -> None:
    run(Told(), wait=False)
    with pytest.raises(UserError, match=r"demo is at work on s3://b/r .*another recipe, code or files.*ray job stop"):
        run(Told(), REQUEST._replace(package=b"changed"), wait=False)
    assert len(cluster.asked) == 1


NO_AGENT = "500: No available agent to submit job, please try again later."


@pytest.mark.parametrize("wait", [True, False])
def test_a_head_that_is_coming_up_is_waited_for(cluster: Cluster, wait: bool) -> None:
    cluster.refuses, cluster.ends = [NO_AGENT, "503: <html>", NO_AGENT], [(JobStatus.SUCCEEDED, 0)]
    told = Told()
    assert run(told, wait=wait).id == "demo" and len(cluster.asked) == 1
    assert len([line for line in told.said if "No available agent" in line]) == 1


def test_a_status_that_is_not_told_at_first_is_asked_for_again(cluster: Cluster) -> None:
    run(Told(), wait=False)
    cluster.refuses = ["502: Bad Gateway"]
    assert run(Told(), wait=False).status == "RUNNING" and not cluster.refuses


def test_a_head_that_only_answers_with_errors_is_given_up(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SECONDS_WITHOUT_ANSWER", -1.0)
    cluster.refuses = ["500: Traceback (most recent call last):\n  File x\nOSError: no space left"]
    with pytest.raises(UserError, match=r"status code 500: Traceback.* OSError: no space left.*submits it"):
        run(Told())


def test_a_package_that_is_too_large_is_said_with_a_cure(cluster: Cluster) -> None:
    cluster.refuses = ["413: "] * 2
    with pytest.raises(UserError, match=r"demo: the 0.0 MiB .* are more than the cluster.*shared storage"):
        run(Told())
    assert len(cluster.refuses) == 1, "tried once"


def test_what_the_cluster_does_not_understand_is_not_tried_again(cluster: Cluster) -> None:
    cluster.refuses = ["400: TypeError"]
    with pytest.raises(RuntimeError, match="400"):
        run(Told())


@pytest.mark.parametrize(
    ("given", "variables", "address"),
    [
        (None, {}, "http://127.0.0.1:8265"),
        ("https://ray.example:443/", {"RAY_ADDRESS": "http://other:8265"}, "https://ray.example:443"),
        (None, {"RAY_ADDRESS": "http://other:8265"}, "http://other:8265"),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, "http://127.0.0.1:8265"),
        (None, {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:2"}, "http://b:2"),
    ],
)
def test_the_address_is_the_one_that_is_given_or_said(
    monkeypatch: pytest.MonkeyPatch, given: str | None, variables: dict[str, str], address: str
) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert dashboard_at(given) == address


@pytest.mark.parametrize(
    "address", ["10.0.0.1:6379", "ray://head:10001", "head", "http://", "http://me:pass@head:8265"]
)
def test_what_is_no_address_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="not the address of a dashboard") as error:
        dashboard_at(address)
    assert "pass@" not in str(error.value)


def test_nobody_who_answers_is_said_with_what_to_keep_running() -> None:
    with pytest.raises(UserError, match=r"no cluster answers at http://127.0.0.1:1: .*ray dashboard"):
        run(Told())


def answering(statuses: list[int], content: bytes = b"Forbidden") -> HTTPServer:
    """What answers with one status after the other, the last one for good."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing: pytest shows what a test prints."""

    return HTTPServer(("127.0.0.1", 0), Answer)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "refuses: it wants its token, and there is none here.*RAY_AUTH_TOKEN"),
        (403, "refuses: its token is another than the one here.*RAY_AUTH_TOKEN"),
        (404, "is no Ray dashboard"),
        (200, "is no Ray dashboard"),
    ],
)
def test_what_answers_and_does_not_let_in_is_said(monkeypatch: pytest.MonkeyPatch, status: int, words: str) -> None:
    """As Ray's dashboard answers without a token (401) and with another one (403), and as anything else does."""
    monkeypatch.setattr(jobs, "prepare_token", lambda may_create: None)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # Ray alone would go there
    with answering([status]) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(UserError, match=words) as error:
            run_job(REQUEST, address, wait=False, max_tries=1, say=print, write=print)
        server.shutdown()
    assert address in str(error.value) and os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


def test_a_dashboard_that_is_coming_up_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "prepare_token", lambda may_create: None)
    monkeypatch.setattr(jobs, "_SECONDS_BETWEEN_LOOKS", 0.0)
    told = Told()
    with answering([503, 500, 200], json.dumps({"ray_version": "2.60.0"}).encode()) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        assert jobs._client(f"http://127.0.0.1:{server.server_port}", told.said.append).get_version() is None
        server.shutdown()
    (said,) = told.said
    assert said.startswith("the cluster does not answer (503 Server Error")
