"""Fixtures of all tests; how long a run may go on starting them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.object_store import ObjectStore, object_store

ROOT = Path(__file__).resolve().parent.parent
STARTED = time.monotonic()
NOT_RUN = "not run: the time for starting tests was over"

# How long an example takes says nothing about the code on a machine that does other work as well.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--start-within", type=float, metavar="MINUTES", help="start no test later; name those left out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where the time may be over before all have run, those come first that may take least: more of them are run."""
    if config.getoption("--start-within") is not None:
        items.sort(key=_seconds_allowed)


def _seconds_allowed(item: pytest.Item) -> float:
    own = item.get_closest_marker("timeout")
    return float(own.args[0] if own is not None else item.config.getini("timeout"))


@pytest.hookimpl(tryfirst=True)  # before fixtures
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--start-within")
    if minutes is not None and time.monotonic() - STARTED >= 60 * minutes:
        pytest.skip(NOT_RUN)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left_out = [
        report.nodeid for report in terminalreporter.stats.get("skipped", []) if NOT_RUN in str(report.longrepr)
    ]
    if left_out:
        terminalreporter.section(f"{len(left_out)} TESTS WERE NOT RUN: the time was over", red=True, bold=True)
        for name in left_out:
            terminalreporter.line(f"NOT RUN {name}")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with two CPUs, for all tests that ask for it; they are marked `ray`.

    Loops and workers that a test module defines reach Ray's processes by their names, so these find the tests.
    """
    from nightseg.cluster import ray as cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
        cluster.connect(num_cpus=2)
        yield
        cluster.disconnect()


@pytest.fixture(autouse=True)
def no_cache_of_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process leaves it on for all that come after."""
    monkeypatch.delenv("NIGHTSEG_INPUT_CACHE_BYTES", raising=False)


@pytest.fixture(scope="session")
def s3() -> Iterator[ObjectStore]:
    """An object store on loopback, for all tests that ask for it; each takes places of its own in it."""
    with object_store() as store:
        yield store
