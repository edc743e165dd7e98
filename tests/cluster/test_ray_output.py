"""What is held back from standard error is one line, and only that."""

from __future__ import annotations

import os

import pytest

from nightseg.cluster.ray import _stderr_without, wants_logs


def test_other_lines_get_through(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), _stderr_without(b"noise"):
        os.write(2, b"before\nsome noise here\nafter, without an end")
        raise KeyError
    os.write(2, b"!\n")
    assert capfd.readouterr().err == "before\nafter, without an end!\n"


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("True", True), ("0", False), (None, False)])
def test_rays_own_switch_brings_the_logs_back(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool
) -> None:
    if value is None:
        monkeypatch.delenv("RAY_LOG_TO_DRIVER", raising=False)
    else:
        monkeypatch.setenv("RAY_LOG_TO_DRIVER", value)
    assert wants_logs() is expected
