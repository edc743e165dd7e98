"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# How long an example takes says nothing about the code on a machine that does other work as well.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


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
