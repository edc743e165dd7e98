"""The command line as tests use it: run a verb, look at what a user would see."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nightseg.cli.main import main


def nightseg(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def good(*words: object) -> Result:
    result = nightseg(*words)
    assert result.exit_code == 0, result.output
    return result


def json_of(*words: object) -> dict[str, Any]:
    """The one object on standard output."""
    out = good(*words, "--json").stdout
    assert out.count("\n") == 1
    answer = json.loads(out)
    assert isinstance(answer, dict)
    return answer


def refused(*words: object) -> str:
    """What the user reads when a request is wrong: exit code 2, no traceback, nothing on standard output."""
    result = nightseg(*words)
    assert result.exit_code == 2, result.output
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr


def forbid_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from nightseg.cluster import ray as cluster

    def connect() -> None:
        raise AssertionError("a test of the command line must not start Ray")

    monkeypatch.setattr(cluster, "connect", connect)
