"""TensorBoard beside a search: on loopback, as long as the command; where to look from elsewhere."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nightseg.cli import boards as module
from nightseg.cli.boards import boards, where_to_look
from nightseg.cluster import ray as cluster
from nightseg.errors import UserError
from nightseg.storage import Location
from tests.command_line import good


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that are started; each ends when it is told to."""
    commands: list[list[str]] = []

    class Process:
        def __init__(self, command: list[str], **_: Any) -> None:
            commands.append(command)

        def terminate(self) -> None:
            commands.append(["terminated"])

        def wait(self, seconds: float) -> None:
            raise subprocess.TimeoutExpired("tensorboard", seconds)

        def kill(self) -> None:
            commands.append(["killed"])

    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(cluster, "dashboard", lambda: "127.0.0.1:8265")
    return commands


def test_tensorboard_runs_on_loopback_as_long_as_the_search(started: list[list[str]]) -> None:
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt), boards(True, said.append) as watched:
        assert started == [] and watched is not None
        watched(Location.of("/runs/search"))
        ((python, *words),) = started
        raise KeyboardInterrupt
    assert python == sys.executable and words[:2] == ["-m", "tensorboard.main"]
    assert words[words.index("--logdir") + 1] == "/runs/search/tensorboard" and "--host=127.0.0.1" in words
    port = next(word.removeprefix("--port=") for word in words if word.startswith("--port="))
    assert f"http://127.0.0.1:{port}/#hparams" in said[0] and "http://127.0.0.1:8265" in said[1]
    assert len(said) == 2  # nothing to forward on one machine
    assert started[1:] == [["terminated"], ["killed"]]


def test_nothing_is_started_unasked(started: list[list[str]]) -> None:
    with boards(False, lambda line: None) as watched:
        assert watched is None
    assert started == []


def test_on_a_cluster_the_ports_are_forwarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "dashboard", lambda: "10.0.0.7:8265")
    monkeypatch.setattr(cluster, "is_this_machine", lambda: False)
    assert where_to_look(6007)[-1] == (
        "from another machine: ssh -N -L 6007:127.0.0.1:6007 -L 8265:127.0.0.1:8265 10.0.0.7"
    )
    monkeypatch.setattr(cluster, "dashboard", lambda: "")
    assert len(where_to_look(6007)) == 2 and where_to_look(6007)[-1].endswith(" HEAD")


def test_without_tensorboard_the_search_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed") as caught, boards(True, lambda line: None):
        pytest.fail("it began")
    assert "pip install tensorboard" in str(caught.value)


def test_a_taken_port_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(module, "PORT", taken.getsockname()[1])
        assert module._free_port() not in (0, taken.getsockname()[1])


def test_the_page_is_opened_at_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nightseg.pipeline import search as search_module
    from nightseg.pipeline.search import Found

    trial = {"trial": "ab", "values": {"a.alpha": 0.5}, "miou": 0.4, "epochs": 3, "end": "done", "error": None}
    place, opened = Location.of(tmp_path), list[str]()
    found = Found(place, trial, [trial], place / "best.yaml", page=place / "search.html", trainings=12, reused=108)
    monkeypatch.setattr(search_module, "search", lambda *_, **__: found)
    monkeypatch.setattr("webbrowser.open", opened.append)
    out = good("search", "s.yaml", "--open").stdout
    assert opened == [(tmp_path / "search.html").as_uri()]
    assert "12 trainings, 108 stages re-used" in out and f"page: {tmp_path}/search.html" in out
